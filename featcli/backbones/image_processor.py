"""Use transformers' image processors: find them, give them a size, and split them into resize, scale, normalise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
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
    resized_by_torchvision,
    silent_transformers,
)
from featcli.errors import CheckpointError, UsageError, one_line, shown
from featcli.pixels.bands import OF_COLOURS
from featcli.pixels.resize import covering, shorter_edge, widest_for, within_reason
from featcli.spec.parsers import Size
from featcli.spec.words import Interpolation, ProcessorBackend
from featcli.system.faults import fault_behind, machine_error
from featcli.system.files import is_folder, is_there

DEFAULT_BACKEND: ProcessorBackend = "pil"
RECTANGLE = "rectangle"  # a plan's word for a size whose edges differ, see `Rectangle`
COLOURS = 3
Fit = Callable[[Image.Image], np.ndarray]  # RGB picture -> (C, H, W)
WARPED = 384  # from this edge on, processors with a `crop_pct` squash pictures
STEP = 32  # pixels; some processors only give multiples of it
# Pixels of the long picture that a processor is tried on. No picture is resized to them, because filters such as box
# give the same directly and through a multiple.
HIGH = 37
SCALE = 1 / 255  # turns values of 0 to 255 into values of 0 to 1
RESAMPLINGS: dict[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
OF_TORCHVISION = ("nearest", "bilinear", "bicubic")  # every version of torchvision resizes tensors by these
NEAR = 2.5 / 255  # of all values: pixels that differ by less are equal but for rounding


class ImageProcessor:
    """One of transformers' image processors. Its attributes are the words of preprocessor_config.json."""

    def __init__(self, processor: Any, overrides: Mapping[str, Any] | None = None) -> None:
        """Wrap a processor. `overrides` are the settings that `overridden` has changed."""
        self._processor = processor
        self.overrides = dict(overrides or {})
        self._covering_edges: dict[Size, int | None] = {}
        self._rectangle: Rectangle | None = None  # used if it only knows squares

    def in_rectangle(self, box: Sequence[int] | None, size: Sequence[int]) -> ImageProcessor:
        """Return one that brings pictures to a rectangle (H, W) instead of its own square: see `Rectangle`."""
        found = ImageProcessor(self._processor, self.overrides)
        pair = None if box is None else (box[0], box[1])
        found._rectangle = Rectangle(pair, (size[0], size[1]), self.resampling, self.backend)
        return found

    @property
    def backend(self) -> ProcessorBackend:
        """What it computes with."""
        backend: ProcessorBackend = str(self._processor.backend)  # type: ignore[assignment]
        return backend

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self._processor).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """All its fields as JSON, with the backend, because a few types lack the PIL one."""
        rectangle = {} if self._rectangle is None else {RECTANGLE: self._rectangle.settings}
        return {**plain_json(self._processor.to_dict()), "backend": self.backend, **rectangle}

    @property
    def resampling(self) -> Image.Resampling:
        """The filter that it resizes with; if it does not resize, that of --fit."""
        if not self._processor.do_resize:
            return Image.Resampling.BICUBIC
        return Image.Resampling(int(self._processor.resample))

    @property
    def scale(self) -> float:
        """The factor by which pixels are multiplied before they are normalised."""
        return float(self._processor.rescale_factor) if self._processor.do_rescale else 1.0

    @property
    def mean(self) -> tuple[float, ...]:
        """The number that is subtracted from each colour; 0 for none."""
        return _three(self._processor.image_mean if self._processor.do_normalize else 0.0)

    @property
    def std(self) -> tuple[float, ...]:
        """The number that each colour is divided by then; 1 for none."""
        return _three(self._processor.image_std if self._processor.do_normalize else 1.0)

    @property
    def numbers(self) -> dict[str, tuple[float, ...]]:
        """Its `mean` and `std`, as many as it has: one for all channels, or one for each."""
        own = self._processor
        found = {"mean": own.image_mean, "std": own.image_std} if own.do_normalize else {"mean": 0.0, "std": 1.0}
        is_one = {name: isinstance(one, int | float) or len(one) == 1 for name, one in found.items()}
        return {name: _three(one)[: 1 if is_one[name] else None] for name, one in found.items()}

    def of_band(self, mean: float, std: float) -> ImageProcessor:
        """Return one that normalises greys, which have three equal channels, by these numbers."""
        own = copy.deepcopy(self._processor)
        if own.do_normalize:
            own.image_mean, own.image_std = [mean] * 3, [std] * 3
        return ImageProcessor(own, self.overrides)._in_rectangle_of(self)

    @property
    def _counts(self) -> list[int]:
        """How many numbers its lists of means and deviations have."""
        found = (getattr(self._processor, name, None) for name in ("image_mean", "image_std"))
        return [len(values) for values in found if isinstance(values, list | tuple)]

    @property
    def _is_of_bands(self) -> bool:
        return any(count not in OF_COLOURS for count in self._counts)

    @property
    def is_of_greys(self) -> bool:
        """Whether a list of its means or deviations has one number, which its own code takes for greys alone."""
        return bool(self._processor.do_normalize) and 1 in self._counts and not self._is_of_bands

    @property
    def of_colours(self) -> ImageProcessor:
        """One that takes colours: itself, or one with three numbers if its lists are for greys or bands."""
        if all(count == COLOURS for count in self._counts) or not self._processor.do_normalize:
            return self
        own = copy.deepcopy(self._processor)
        own.image_mean, own.image_std = (
            list(values if len(values) == COLOURS else values[:1] * COLOURS) for values in (self.mean, self.std)
        )
        return ImageProcessor(own, self.overrides)._in_rectangle_of(self)

    @property
    def background(self) -> tuple[float, ...]:
        """The colour, from 0 to 1, that stands for nothing: it normalises to 0, or is grey if nothing is normalised."""
        return _three(self._processor.image_mean if self._processor.do_normalize else 0.5)

    def covering(self, size: Size) -> Callable[[Size], Size] | None:
        """Return a function from the (H, W) of a picture to its resized size before this (H, W) is cut out.

        Returns None if the processor cuts nothing.
        """
        if self._rectangle is not None:
            return self._rectangle.covering
        edge = self.covering_edge(size)
        return None if edge is None else shorter_edge(edge)

    def covering_edge(self, size: Size) -> int | None:
        """Return the length of the shorter edge before this (H, W) is cut out; None if the processor does not work so.

        Processors have that length in several ways, so these are tried once on a long picture.
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
        with suppress(Exception):  # a processor that takes no such picture may raise anything
            whole = self.fit_bytes(picture).astype(np.float32)
            for one in dict.fromkeys(edges if edge else ()):
                fit = within_reason(self.fit_bytes, size, shorter_edge(one), self.resampling)
                middle = fit(picture)
                if middle.shape == whole.shape and np.abs(middle - whole).max() <= NEAR * np.ptp(whole):
                    return one
        return None

    @property
    def steps(self) -> list[str]:
        """What it does, step by step in words."""
        own, steps = self._processor, []
        if self._rectangle is not None:
            steps += self._rectangle.steps
        elif own.do_resize:
            wanted = " ".join(f"{k} {v}" for k, v in dict(own.size).items() if v)
            steps.append(f"resize {wanted} {self.resampling.name.lower()}")
        if getattr(own, "do_center_crop", False) and self._rectangle is None:
            steps.append(f"crop {own.crop_size.height}x{own.crop_size.width}")
        if own.do_normalize:
            steps.append(normalisation(self.mean, self.std))
        return steps

    @cached_property
    def _not_resizing(self) -> ImageProcessor:
        return self.without_resizing()

    def without_resizing(self) -> ImageProcessor:
        """Return one that only scales and normalises. It keeps its `resampling`, with which another resizes."""
        own = copy.deepcopy(self._processor)
        for step in ("do_resize", "do_center_crop", "do_pad"):
            if getattr(own, step, None):
                setattr(own, step, False)
        own.resample = self.resampling
        return ImageProcessor(own, self.overrides)

    def fit_bytes(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop an RGB picture: (3, H, W), uint8 unless the processor has steps of its own."""
        if self._rectangle is not None:
            return self._not_resizing.fit_bytes(self._rectangle.fitted(picture))
        done = self._processor(picture, return_tensors="np", do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(done["pixel_values"][0])

    def fit_grey(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop the greys of an RGB picture: (1, H, W), uint8 unless the processor has steps of its own."""
        return np.ascontiguousarray(self.fit_bytes(picture.convert("L").convert("RGB"))[:1])

    def fit_floats(self, picture: Image.Image) -> np.ndarray:
        """Return all that the processor makes of a picture: (3, H, W) float32."""
        if self._rectangle is not None:
            return self._not_resizing.fit_floats(self._rectangle.fitted(picture))
        done = self._processor(picture, return_tensors="np")
        return np.ascontiguousarray(done["pixel_values"][0], dtype=np.float32)

    def output_sizes(self) -> set[Size]:
        """Return the (H, W) that it gives a landscape and a portrait picture."""
        tried = self.of_colours
        return {tried.fit_floats(picture).shape[1:] for picture in probe_pictures()}

    def at(self, size: Size) -> ImageProcessor | None:
        """Return one that gives every picture this (H, W), or None if it cannot."""
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # it has a single edge, or none
            found = self.sized(size)
            if found.output_sizes() == {size}:
                return found
        return None

    def ways_to(self, size: Size) -> list[str]:
        """Return options that give every picture this (H, W), or nearly, if `at` does not."""
        height, width = (max(1, round(edge / STEP)) * STEP for edge in size)
        near = [f"--image-size {height}x{width}"] if (height, width) != size and self.at((height, width)) else []
        with suppress(Exception):  # processors refuse in many ways
            blank = Image.new("RGB", (size[1], size[0]))
            if self.of_colours.without_resizing().fit_floats(blank).shape == (COLOURS, *size):
                return ["--fit crop, squash or pad", *near]
        return near

    def sized(self, size: Size) -> ImageProcessor:
        """Return one that gives pictures of this (H, W).

        An edge that is resized before a crop keeps its ratio to the crop.
        """
        found = ImageProcessor(copy.deepcopy(self._processor), self.overrides)
        if size[0] != size[1] and (rectangle := found._rectangle_for(size)):
            return found.in_rectangle(*rectangle)
        found._set_size(size)
        return found

    def _rectangle_for(self, size: Size) -> tuple[Size | None, Size] | None:
        """Return the (H, W) to cover before this one is cut out, None for squashing, and this (H, W).

        As in timm, it is larger than the input on both sides by the share that the processor cuts off its own square.
        Returns None instead of a pair if the processor does not cut.
        """
        own = self._processor
        edge, crop = dict(own.size).get("shortest_edge"), self._crop
        kept = getattr(own, "crop_pct", None)
        if not (own.do_resize and edge and (crop or kept)):
            return None
        if not crop or kept:
            assert kept
            is_warped = not crop and min(size) >= WARPED
            return (None, size) if is_warped else ((int(size[0] / kept), int(size[1] / kept)), size)
        square = min(crop)
        resized = self.covering_edge(crop) or edge
        return (size[0] * resized // square, size[1] * resized // square), size

    def overridden(self, asked: Mapping[str, Any], size: Size, is_sized_by_fit: bool) -> ImageProcessor:
        """Return one that follows these options instead of its own words: `mean`, `std`, `interpolation`, `crop_pct`.

        `size` is the (H, W) of the input, which this processor gives unless --fit does. Options that ask for what it
        does anyway are not in `overrides`. Raises UsageError if it does not follow an option.
        """
        found = self
        if "mean" in asked or "std" in asked:
            found = found._normalising(asked.get("mean"), asked.get("std"))
        if "interpolation" in asked:
            found = found._resampling(asked["interpolation"], is_sized_by_fit)
        return found._cropping(asked["crop_pct"], size) if "crop_pct" in asked else found

    def _normalising(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> ImageProcessor:
        """Return one that subtracts and divides by these numbers, for values from 0 to 1."""
        highest = 1.0 if self.scale == SCALE else 255 * self.scale  # its own numbers are for values up to this
        wanted = {
            name: _three([value * highest for value in values] if len(values) > 1 else values[0] * highest)
            for name, values in (("mean", mean), ("std", std))
            if values is not None
        }
        before = {"mean": self.mean, "std": self.std}
        changed = [name for name, values in wanted.items() if values != before[name]]
        if not changed:
            return self
        own, now = copy.deepcopy(self._processor), before | wanted
        own.do_normalize, own.image_mean, own.image_std = True, list(now["mean"]), list(now["std"])
        given = {"mean": mean, "std": std}
        overrides = self.overrides | {name: given[name] for name in changed}
        found = ImageProcessor(own, overrides)._in_rectangle_of(self)
        if not found._is_of_bands:
            self._refuse_idle(found, f"--{changed[0]}", "normalises")
        return found

    def _resampling(self, interpolation: Interpolation, is_sized_by_fit: bool) -> ImageProcessor:
        """Return one that resizes with this filter. With --fit, Pillow resizes."""
        if not (self._processor.do_resize or is_sized_by_fit):
            raise UsageError(
                f"--interpolation {interpolation}: {self.name} does not resize pictures",
                "leave it out, or choose by --fit how they get the input size",
            )
        if self.backend == "torchvision" and not is_sized_by_fit and interpolation not in OF_TORCHVISION:
            raise UsageError(
                f"--interpolation {interpolation}: {self.name} resizes with torchvision, which does not have it here",
                f"use {', '.join(OF_TORCHVISION)}",
            )
        resample = RESAMPLINGS[interpolation]
        if resample == self.resampling:
            return self
        own = copy.deepcopy(self._processor)
        own.do_resize, own.resample = True, resample
        found = ImageProcessor(own, self.overrides | {"interpolation": interpolation})._in_rectangle_of(self)
        if not is_sized_by_fit:
            self._refuse_idle(found, f"--interpolation {interpolation}", "resizes")
        return found

    def _cropping(self, share: float, size: Size) -> ImageProcessor:
        """Return one that resizes to `size` divided by this share, and then cuts out the centre.

        It uses its own words for that if it has some, and otherwise does it as timm does.
        """
        if not self._processor.do_resize:
            raise UsageError(f"--crop-pct {share:g}: {self.name} does not resize pictures", "leave it out")
        box = (math.floor(size[0] / share), math.floor(size[1] / share))
        overrides = self.overrides | {"crop_pct": share}
        for found in self._with_box(box, size, share):
            if found is self:
                return self
            with suppress(Exception):  # of processors that take no picture of another size, whatever they raise
                if found.output_sizes() == {size}:
                    found.overrides = overrides
                    return found
        raise UsageError(
            f"--crop-pct {share:g}: {self.name} sizes pictures in its own way",
            "leave it out, or choose by --fit how they get the input size",
        )

    def _with_box(self, box: Size, size: Size, share: float) -> Iterator[ImageProcessor]:
        """Yield processors that resize to `box` and cut `size` out of it, the best first."""
        if self._rectangle is None and size[0] == size[1]:
            if self.covering_edge(size) == box[0]:
                yield self
            has_edge = dict(self._processor.size or {}).get("shortest_edge")
            for name in ("size", "crop_pct") if has_edge else ():
                own = copy.deepcopy(self._processor)
                if getattr(own, name, None):
                    setattr(own, name, share if name == "crop_pct" else type(own.size)(shortest_edge=box[0]))
                    found = ImageProcessor(own)
                    if found.covering_edge(size) == box[0]:
                        yield found
        elif self._rectangle is not None and self._rectangle.box == box:
            yield self
        yield self.in_rectangle(box, size)

    def _in_rectangle_of(self, other: ImageProcessor) -> ImageProcessor:
        """Return this one with the size of another, if that is a rectangle."""
        rectangle = other._rectangle
        return self if rectangle is None else self.in_rectangle(rectangle.box, rectangle.size)

    def _refuse_idle(self, found: ImageProcessor, option: str, does: str) -> None:
        """Raise UsageError if a processor that was made for an option gives the same numbers as this one."""
        before, now = self.of_colours, found.of_colours
        if all(np.array_equal(before.fit_floats(one), now.fit_floats(one)) for one in probe_pictures()):
            raise UsageError(f"{option} changes nothing: {self.name} {does} pictures in its own way", "leave it out")

    @property
    def _crop(self) -> Size | None:
        """The (H, W) that it cuts out after resizing; None if it does not cut, or says so in another way."""
        crop = self._processor.crop_size if getattr(self._processor, "do_center_crop", False) else None
        return (crop.height, crop.width) if crop and dict(crop).get("height") else None

    def _set_size(self, size: Size) -> None:
        """Set every size of the processor."""
        own, (height, width) = self._processor, size
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


@dataclass(frozen=True)
class Rectangle:
    """How pictures get a size whose edges differ, if a processor resizes by one edge and cuts out a square.

    A picture just covers `box`, as in timm, and its middle is cut out as in the processor. Without a box it is
    squashed.
    """

    box: Size | None
    size: Size  # (H, W)
    resample: Image.Resampling
    backend: ProcessorBackend

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as the plan holds them."""
        return {"box": self.box and list(self.box), "size": list(self.size)}

    @property
    def steps(self) -> list[str]:
        """What it does, step by step in words."""
        how = self.resample.name.lower()
        cut, box = "{}x{}".format(*self.size), self.box
        return [f"squash to {cut} {how}"] if box is None else [f"cover {box[0]}x{box[1]} {how}", f"crop {cut}"]

    @property
    def covering(self) -> Callable[[Size], Size] | None:
        """A function from the (H, W) of a picture to its resized size. See `ImageProcessor.covering`."""
        if self.box is None:
            return None
        return shorter_edge(self.box[0]) if self.box[0] == self.box[1] else covering(self.box)

    def fitted(self, picture: Image.Image) -> Image.Image:
        """Resize an RGB picture with the processor's backend, and cut out the middle."""
        height, width = self.size if self.covering is None else self.covering((picture.height, picture.width))
        if self.backend == "torchvision":
            pixels = resized_by_torchvision(picture, (height, width), self.resample)
            resized = Image.fromarray(pixels.transpose(1, 2, 0))
        else:
            resized = picture.resize((width, height), self.resample)
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)  # rounds halves as timm does
        return resized.crop((left, top, left + self.size[1], top + self.size[0]))


def read_processor(
    checkpoint: str, image_size: Size | None, backend: ProcessorBackend | None = None
) -> ImageProcessor | None:
    """Read the image processor of a checkpoint, at `image_size` (H, W) if that is given; None if it has none.

    `backend` is by default Pillow's, if the type has it. Raises UsageError for a backend that the type lacks here, and
    CheckpointError for a processor that cannot be used, or does not give every picture this size.
    """
    try:
        with silent_transformers(), hub_or_cache(wanted=not is_folder(checkpoint)), faults_are_heard(checkpoint):
            processor = ImageProcessor(load_processor(checkpoint, backend or DEFAULT_BACKEND))
    except Exception as error:  # files, JSON and unknown or custom classes raise errors without a common type
        if is_folder(checkpoint) and (fault := fault_behind(error)) is not None:
            raise machine_error(f"checkpoint {shown(checkpoint)}", fault) from error
        if is_there(Path(checkpoint) / "preprocessor_config.json"):
            raise CheckpointError(
                f"checkpoint {shown(checkpoint)}: its preprocessor_config.json cannot be used: {one_line(error)}",
                "is it complete? featcli runs no image processor that brings its own code",
            ) from error
        if not isinstance(error, OSError | ValueError):
            raise
        return None
    if backend is not None and processor.backend != backend:
        raise UsageError(
            f"--processor-backend {backend}: {processor.name} has only {processor.backend} here",
            "leave it out" if backend == "pil" else "pip install torchvision, or leave it out",
        )
    if image_size is None:
        return processor
    found = processor.at(image_size)
    if found is None:
        ways = processor.ways_to(image_size)
        raise CheckpointError(
            f"checkpoint {shown(checkpoint)}: its {processor.name} does not give every picture"
            f" {image_size[0]}x{image_size[1]} pixels",
            f"try {' or '.join(ways)}" if ways else "leave --image-size out",
        )
    return found


def default_processor(model_type: str, size: Size, backend: ProcessorBackend | None = None) -> ImageProcessor:
    """Return the image processor that transformers pairs with a model type, with its defaults and this size.

    If that one does not give every picture this size, it is ViT's.
    """
    backend = backend or DEFAULT_BACKEND
    with silent_transformers(), suppress(AttributeError, TypeError, ValueError):  # it has no size to set
        kind = processor_class(model_type, backend)
        own = kind() if kind is not None else None
        if getattr(own, "size", None) and (processor := ImageProcessor(own).at(size)):
            return processor
    return ImageProcessor(plain_processor(size, backend))


def probe_pictures() -> list[Image.Image]:
    """Return a landscape and a portrait picture of noise, on which processors are tried."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 320, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())]


def normalisation(mean: Sequence[float], std: Sequence[float]) -> str:
    """Say in words what is subtracted from each channel, and what it is divided by."""
    rows = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return "mean {}, std {}".format(*rows)


def plain_json(value: Any) -> Any:
    """Return a copy of the parts that JSON has, as JSON has them."""
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(str(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _three(value: Any) -> tuple[float, ...]:
    """Return numbers as they are, and one number, alone or in a list, for each of three colours."""
    values = (float(value),) if isinstance(value, int | float) else tuple(float(one) for one in value)
    return values * COLOURS if len(values) == 1 else values
