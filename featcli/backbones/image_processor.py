"""transformers' image processors: found, given a size, and seen as steps: resize and crop, scale, normalise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featcli.backbones.hub import hub_or_cache
from featcli.backbones.internals import (
    faults_are_heard,
    load_processor,
    plain_processor,
    processor_class,
    silent_transformers,
)
from featcli.errors import CheckpointError, one_line, shown
from featcli.pixels.resize import shorter_edge, widest_for, within_reason
from featcli.spec.parsers import Size
from featcli.system.faults import fault_behind, machine_error
from featcli.system.files import is_folder, is_there

Fit = Callable[[Image.Image], np.ndarray]  # RGB picture -> (C, H, W)
HIGH = 32  # pixels of the long picture on which a processor is tried
NEAR = 2.5 / 255  # of all values, by which pixels differ that are the same but for rounding


class ImageProcessor:
    """One of transformers' image processors, whose attributes are the words of preprocessor_config.json."""

    def __init__(self, processor: Any) -> None:
        """Take over a processor: `set_size` changes it."""
        self._processor = processor
        self._covering_edges: dict[Size, int | None] = {}

    @property
    def name(self) -> str:
        """Its class."""
        return type(self._processor).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """All that it is, as JSON, with the backend: a few types have no PIL one."""
        return {**plain_json(self._processor.to_dict()), "backend": str(self._processor.backend)}

    @property
    def resampling(self) -> Image.Resampling:
        """How it resizes; where it does not, how --fit does."""
        if not self._processor.do_resize:
            return Image.Resampling.BICUBIC
        return Image.Resampling(int(self._processor.resample))

    @property
    def scale(self) -> float:
        """What pixels are multiplied by before they are normalised."""
        return float(self._processor.rescale_factor) if self._processor.do_rescale else 1.0

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from each colour, 0 where nothing is."""
        return _three(self._processor.image_mean if self._processor.do_normalize else 0.0)

    @property
    def std(self) -> tuple[float, ...]:
        """What each colour is divided by then, 1 where it is not."""
        return _three(self._processor.image_std if self._processor.do_normalize else 1.0)

    @property
    def background(self) -> tuple[float, ...]:
        """The colour, from 0 to 1, that stands for nothing: what becomes 0, or grey where nothing is normalised."""
        return _three(self._processor.image_mean if self._processor.do_normalize else 0.5)

    def covering_edge(self, size: Size) -> int | None:
        """Find the length to which it resizes the shorter edge before it cuts out this (H, W); None where it does not.

        Processors have that length in several ways, so those are tried on a long picture, once.
        """
        if size not in self._covering_edges:
            self._covering_edges[size] = self._tried_edge(size)
        return self._covering_edges[size]

    def _tried_edge(self, size: Size) -> int | None:
        own = self._processor
        edge = (dict(own.size).get("shortest_edge") or dict(own.size).get("height") or 0) if own.do_resize else 0
        edges = [edge, int(edge / (getattr(own, "crop_pct", None) or 1)), int(256 / 224 * edge)]
        shape = (HIGH, HIGH * (widest_for(size) + 8), 3)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        with suppress(Exception):  # of those that take no such picture, whatever they raise
            whole = self.fit_bytes(picture).astype(np.float32)
            for one in dict.fromkeys(edges if edge else ()):
                fit = within_reason(self.fit_bytes, size, shorter_edge(one), self.resampling)
                middle = fit(picture)
                if middle.shape == whole.shape and np.abs(middle - whole).max() <= NEAR * np.ptp(whole):
                    return one
        return None

    @property
    def steps(self) -> list[str]:
        """What it does, in words."""
        own, steps = self._processor, []
        if own.do_resize:
            wanted = " ".join(f"{k} {v}" for k, v in dict(own.size).items() if v)
            steps.append(f"resize {wanted} {self.resampling.name.lower()}")
        if getattr(own, "do_center_crop", False):
            steps.append(f"crop {own.crop_size.height}x{own.crop_size.width}")
        if own.do_normalize:
            steps.append(normalisation(self.mean, self.std))
        return steps

    def without_resizing(self) -> ImageProcessor:
        """Make one that only scales and normalises. It keeps `resampling` on record, with which another resizes."""
        own = copy.deepcopy(self._processor)
        for step in ("do_resize", "do_center_crop", "do_pad"):
            if getattr(own, step, None):
                setattr(own, step, False)
        own.resample = self.resampling
        return ImageProcessor(own)

    def fit_bytes(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop an RGB picture: (3, H, W), uint8 unless the processor has steps of its own."""
        done = self._processor(picture, return_tensors="np", do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(done["pixel_values"][0])

    def fit_grey(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop the greys of an RGB picture: (1, H, W), uint8 likewise."""
        return np.ascontiguousarray(self.fit_bytes(picture.convert("L").convert("RGB"))[:1])

    def fit_floats(self, picture: Image.Image) -> np.ndarray:
        """Do all that the processor does: (3, H, W) float32."""
        done = self._processor(picture, return_tensors="np")
        return np.ascontiguousarray(done["pixel_values"][0], dtype=np.float32)

    def output_sizes(self) -> set[Size]:
        """Find the (H, W) that it gives a landscape and a portrait picture."""
        return {self.fit_floats(picture).shape[1:] for picture in probe_pictures()}

    def set_size(self, size: Size) -> None:
        """Give every size of the processor the wanted one; an edge that is resized before a crop keeps its ratio to it,
        and is never shorter than the crop, which would pad the picture with black.
        """
        own, (height, width) = self._processor, size
        self._covering_edges.clear()
        crop = own.crop_size if getattr(own, "do_center_crop", False) else None
        edge = dict(own.size).get("shortest_edge")
        if edge and crop and dict(crop).get("height"):
            own.size = type(own.size)(shortest_edge=round(edge * max(size) / min(crop.height, crop.width)))
        elif edge and hasattr(own, "crop_pct") and height == width:
            own.size = type(own.size)(shortest_edge=height)
        else:
            own.size = type(own.size)(height=height, width=width)
        for keeps_proportions in ("keep_aspect_ratio", "do_pad"):
            if getattr(own, keeps_proportions, None):
                setattr(own, keeps_proportions, False)
        if crop:
            own.crop_size = type(crop)(height=height, width=width)


def read_processor(checkpoint: str, image_size: Size | None) -> ImageProcessor | None:
    """Read the image processor of a checkpoint, at `image_size` (H, W) where one is given; None where it has none.

    Raises CheckpointError for one that cannot be used, or that does not give every picture this size.
    """
    try:
        with silent_transformers(), hub_or_cache(wanted=not is_folder(checkpoint)), faults_are_heard(checkpoint):
            processor = ImageProcessor(load_processor(checkpoint))
    except Exception as error:  # files, JSON, unknown or custom classes: there is no common type
        if is_folder(checkpoint) and (fault := fault_behind(error)) is not None:
            raise machine_error(f"checkpoint {shown(checkpoint)}", fault) from error
        if is_there(Path(checkpoint) / "preprocessor_config.json"):
            raise CheckpointError(
                f"checkpoint {shown(checkpoint)}: its preprocessor_config.json cannot be used: {one_line(error)}",
                "is it whole? An image processor with code of its own is not run",
            ) from error
        if not isinstance(error, OSError | ValueError):
            raise
        return None
    if image_size is not None:
        processor.set_size(image_size)
        try:
            sizes = processor.output_sizes()
        except (AttributeError, KeyError, TypeError, ValueError):  # of one that knows a single edge only
            sizes = set()
        if sizes != {image_size}:
            raise CheckpointError(
                f"checkpoint {shown(checkpoint)}: its {processor.name} does not give every picture"
                f" {image_size[0]}x{image_size[1]} pixels",
                "try --fit crop, squash or pad, or a multiple of the patch or of 32",
            )
    return processor


def default_processor(model_type: str, size: Size) -> ImageProcessor:
    """Make the image processor that transformers pairs with a model type, with its defaults but for the size; ViT's
    where that one does not give every picture this size.
    """
    with silent_transformers(), suppress(AttributeError, TypeError, ValueError):  # of those that have no size to set
        kind = processor_class(model_type)
        if kind is not None and getattr(own := kind(), "size", None):
            processor = ImageProcessor(own)
            processor.set_size(size)
            if processor.output_sizes() == {size}:
                return processor
    return ImageProcessor(plain_processor(size))


def probe_pictures() -> list[Image.Image]:
    """Draw a landscape and a portrait picture of noise: what a processor does is tried on them."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 320, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())]


def normalisation(mean: Sequence[float], std: Sequence[float]) -> str:
    """Say in words what is subtracted from each channel, and what it is divided by."""
    rows = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return "mean {}, std {}".format(*rows)


def plain_json(value: Any) -> Any:
    """Copy only what JSON has, as JSON has it."""
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(str(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _three(value: Any) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)
