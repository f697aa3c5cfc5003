"""The preprocessing that a plan records, made again without the checkpoint: pictures as the backbone saw them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcli.backbones.backbone import Preprocessing
from featcli.pixels.resize import ResizeMode
from featcli.spec.words import NATIVE

OF_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def recorded_preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    """From the settings of a plan. Raises CheckpointError, and whatever libraries say of what they do not know."""
    pixels, backbone = settings["preprocessing"], settings["backbone"]
    size = tuple(backbone["input_size"])
    channels = backbone.get("options", {}).get("in_chans") or backbone.get("config", {}).get("num_channels") or 3
    resize_mode = None
    if "fit" in pixels:
        largest = pixels["largest"] if pixels["fit"] == NATIVE else size
        resize_mode = ResizeMode(pixels["fit"], largest and tuple(largest), tuple(pixels.get("step", (1, 1))))
    if "image_processor_type" in pixels:
        from featcli.backbones.image_processor import preprocessing_of, read_processor

        with tempfile.TemporaryDirectory() as folder:
            config = {name: value for name, value in pixels.items() if name != "backend"}
            # Recorded as false, for `resize_mode` resizes; but in the processor's own manner.
            if resize_mode is not None:
                config["do_resize"] = True
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))
            return preprocessing_of(read_processor(folder, None), size, channels, resize_mode)
    from featcli.backbones.preprocessing import timm_preprocessing

    config = {name: tuple(v) if isinstance(v := pixels[name], list) else v for name in OF_TIMM if name in pixels}
    return timm_preprocessing({**config, "input_size": (channels, *size)}, channels, "", resize_mode)
