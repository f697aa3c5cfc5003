"""The preprocessing that a plan records, made again without the checkpoint: pictures as the backbone saw them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcli.backbones.backbone import Preprocessing
from featcli.pixels.resize import ResizeMode
from featcli.spec.parsers import Size

OF_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def recorded_preprocessing(
    pixels: Mapping[str, Any], *, size: Size, channels: int, fitting: ResizeMode | None
) -> Preprocessing:
    """From the library's own words in a plan, for inputs of that (H, W) and so many channels.

    Raises CheckpointError, and whatever libraries say of what they do not know.
    """
    if "image_processor_type" in pixels:
        from featcli.backbones.image_processor import preprocessing_of, read_processor

        with tempfile.TemporaryDirectory() as folder:
            config = {name: value for name, value in pixels.items() if name != "backend"}
            if fitting is not None:  # recorded as false, for `fitting` resizes; but in the processor's own manner
                config["do_resize"] = True
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))
            return preprocessing_of(read_processor(folder, None), size, channels, fitting)
    from featcli.backbones.timm_transform import timm_preprocessing

    config = {name: tuple(v) if isinstance(v := pixels[name], list) else v for name in OF_TIMM if name in pixels}
    return timm_preprocessing({**config, "input_size": (channels, *size)}, channels, "", fitting)
