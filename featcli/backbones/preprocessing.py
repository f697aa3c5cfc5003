"""Turn pictures into a backbone's input: as timm says, as transformers says, or as a plan records it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featcli.backbones.image_processor import (
    RECTANGLE,
    Fit,
    ImageProcessor,
    normalisation,
    probe_pictures,
    read_processor,
)
from featcli.backbones.internals import timm_resampling, timm_sizes, timm_transform, values_for_channels
from featcli.backbones.own_preprocessing import OVERRIDES, numbers_of_bands
from featcli.errors import CheckpointError, UsageError, shown
from featcli.pixels import torch_resize
from featcli.pixels.bands import OF_COLOURS
from featcli.pixels.resize import ResizeMode, fill_of, shortened, widest_for, within_reason
from featcli.pixels.torch_resize import edges_of, picture_of, picture_of_planes, values_of
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import Size
from featcli.spec.words import Decode

AnyFit = Callable[[Any], np.ndarray]  # as Fit, and takes arrays (H, W, 3) uint8, too
# Words of timm's data configuration that a plan holds.
WORDS_OF_TIMM = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an upright RGB picture becomes the backbone's input, as the checkpoint says.

    `fit` resizes and crops on the CPU. Scaling and normalising are left, which are arithmetic on every pixel:
    `normalize` does them on the device, so that uint8 is copied there.
    """

    fit: Callable[[Any], np.ndarray]  # RGB picture, or C bands that are each RGB -> (C, H, W) of `dtype`
    size: Size  # (H, W)
    dtype: str  # "uint8", or "float32" if `fit` also normalises
    scale: float  # 1 / 255 almost always
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str  # where the settings come from
    settings: Mapping[str, Any]  # the checkpoint's own words, as the plan stores them
    summary: str  # the same for people, in one line
    channels: int = 3  # C: the picture's colours, 1 for its greys, or the number of its bands
    resize_mode: ResizeMode | None = None  # if pictures do not get their size in the checkpoint's own way
    fast: AnyFit | None = None  # as `fit`, resized by torch; None if torch cannot do what resizes here

    def __post_init__(self) -> None:
        """Raise CheckpointError for a standard deviation of 0, which would make every map infinite."""
        if not all(self.std):
            raise CheckpointError(
                f"{self.origin}: pixels cannot be divided by its standard deviations, {', '.join(map(str, self.std))}",
                "is the checkpoint's configuration complete?",
            )
        if self.channels in OF_COLOURS:
            object.__setattr__(self, "fit", _of_rgb(self.fit))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the settings, from which everything else is made again."""
        settings = {**self.settings}
        return _made_again, (settings, self.size, self.channels, self.resize_mode, self.origin, self.summary)

    def __deepcopy__(self, _: Any) -> Preprocessing:
        """Return itself, because nothing of it changes."""
        return self

    @property
    def is_native(self) -> bool:
        """Whether each picture gives pixels of a size of its own; `size` is then the checkpoint's."""
        return self.resize_mode is not None and self.resize_mode.is_native

    def fit_for(self, decode: Decode) -> AnyFit:
        """Return what makes the input of upright RGB pictures, and for "fast" of arrays (H, W, 3), too."""
        if decode != "fast":
            return self.fit
        return self.fast or (lambda picture: self.fit(picture_of(picture)))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scale and normalise (B, C, H, W) of `dtype` to float32.

        Operations, their order and so the bits are torchvision's.
        """
        if self.dtype == "float32":
            return pixels.clone()  # never the buffer itself: a stage may be the input, and buffers are used again
        mean, std = _on(pixels.device, self.mean), _on(pixels.device, self.std)
        scaled = pixels.to(torch.float32, copy=True)  # what follows works in place
        # n / 255 and n * (1 / 255) differ in the last bit for some n, and the libraries divide.
        scaled = scaled.div_(255) if self.scale == 1 / 255 else scaled.mul_(self.scale)
        return scaled.sub_(mean).div_(std)


def _of_rgb(fit: Fit) -> Fit:
    """Make `fit` refuse pictures that are not RGB: from four channels, say, it would silently make other colours."""

    def fit_rgb(picture: Image.Image) -> np.ndarray:
        mode = getattr(picture, "mode", None)
        if mode != "RGB":
            what = f"a picture of mode {mode}" if mode else f"{type(picture).__name__}"
            raise UsageError(
                f"{what}: fit takes an upright RGB picture of Pillow",
                "use backbone.preprocess(picture), which takes any picture as extract does, or picture.convert('RGB')",
            )
        return fit(picture)

    return fit_rgb


@lru_cache(maxsize=16)
def _on(device: torch.device, values: tuple[float, ...]) -> torch.Tensor:
    """Return (C, 1, 1), and make it only once: a copy to a GPU waits for all that the GPU is doing."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(-1, 1, 1)


def refuse_processor_backend(asked: CheckpointSpec) -> None:
    """Raise UsageError if a processor backend is asked for a checkpoint whose pixels timm prepares."""
    if asked.processor_backend is not None:
        raise UsageError(
            f"--processor-backend {asked.processor_backend}: {shown(asked.checkpoint_name)} has no image processor of"
            " transformers: timm prepares its pictures, with Pillow",
            "leave it out",
        )


def timm_preprocessing(
    config: Mapping[str, Any], channels: int, tag: str, resize_mode: ResizeMode | None
) -> Preprocessing:
    """Follow a resolved data configuration of timm, with exactly the pixels of timm's evaluation transform.

    `resize_mode` replaces its resizing and cropping. `tag` is that of the weights, for `origin`. Raises UsageError for
    bands without a mean and a standard deviation of their own.
    """
    if channels not in OF_COLOURS:
        return _of_bands(
            numbers_of_bands({name: config[name] for name in ("mean", "std")}, channels),
            lambda mean, std: timm_preprocessing({**config, "mean": (mean,), "std": (std,)}, 1, tag, resize_mode),
            {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
        )
    mean, std = (values_for_channels(config[name], channels) for name in ("mean", "std"))
    transform, steps = timm_transform({**config, "mean": mean})  # a border has as many colours as the picture
    is_grey, size = channels == 1, config["input_size"][1:]

    fit: Fit = _for_all_proportions(lambda picture: _planes(transform(picture)), config, size)
    if is_grey:
        fit = partial(_fit_grey, fit)
    fast = _by_torch(fit, transform, config, is_grey)
    if resize_mode is not None:
        resample, fill = timm_resampling(config["interpolation"]), fill_of(mean, channels)
        fit = _fit_resized(resize_mode.fitted(resample, fill), is_grey)
        by_torch = torch_resize.fitted(resize_mode, resample, fill)
        fast = None if by_torch is None else _fit_resized(by_torch, is_grey)
        steps = [resize_mode.summary(config["interpolation"])]
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return Preprocessing(
        fit=fit,
        size=size,
        dtype="uint8",
        scale=1 / 255,
        mean=mean,
        std=std,
        origin=f"timm, tag {tag}" if tag else "timm",
        settings={**settings, **(resize_mode.settings if resize_mode else {})},
        summary=f"{', '.join([*steps, normalisation(mean, std)])}" + (", grey" if is_grey else ""),
        channels=channels,
        resize_mode=resize_mode,
        fast=fast,
    )


def _by_torch(fit: Fit, transform: Callable[[Any], Any], config: Mapping[str, Any], is_grey: bool) -> AnyFit | None:
    """Return the same as timm's `fit`, resized by torch where torch resizes as Pillow does; None if it never does.

    `transform` then finds pictures of the size to which it would resize them, and only cuts out the middle.
    """
    resample, mode = timm_resampling(config["interpolation"]), config.get("crop_mode")
    size_of, widest = timm_sizes(config), widest_for(config["input_size"][1:])
    if resample not in torch_resize.MODES:
        return None

    def fit_any(picture: Image.Image | np.ndarray) -> np.ndarray:
        height, width = edges_of(picture)
        size = size_of((height, width))
        is_usual = max(height, width) <= widest * min(height, width)
        if not (is_usual and torch_resize.takes((height, width), size, resample)):
            return fit(picture_of(picture))
        values = values_of(picture_of(picture).convert("L") if is_grey else picture)
        resized = torch_resize.resized(values, size, resample)
        if mode == "border":  # torchvision puts colours around pictures, and only greys around tensors
            return _planes(transform(picture_of_planes(resized)))
        return np.asarray(transform(resized))

    return fit_any


def _for_all_proportions(fit: Fit, config: Mapping[str, Any], size: Size) -> Fit:
    """Make timm's `fit` work for pictures of any proportions, in any of its crop modes."""
    resample, mode = timm_resampling(config["interpolation"]), config.get("crop_mode")
    covering = timm_sizes(config)
    if mode == "squash":
        return lambda picture: fit(shortened(picture, resample))
    if mode != "border":
        return within_reason(fit, size, covering, resample)

    def fit_whole(picture: Image.Image) -> np.ndarray:
        height, width = covering((picture.height, picture.width))
        if min(height, width) < 1:  # timm has no picture of that size
            thin = max(1, width), max(1, height)
            return fit(shortened(picture, resample).resize(thin, resample))
        return fit(shortened(picture, resample))

    return fit_whole


def _fit_grey(fit: Fit, picture: Image.Image) -> np.ndarray:
    return fit(picture.convert("L"))


def _fit_resized(resize: Callable[[Any], Image.Image], is_grey: bool) -> AnyFit:
    return lambda picture: _planes(resize(picture).convert("L" if is_grey else "RGB"))


def _planes(picture: Image.Image) -> np.ndarray:
    """Return a grey or RGB picture as (C, H, W)."""
    values = np.asarray(picture)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _of_bands(
    numbers: tuple[tuple[float, ...], tuple[float, ...]],
    of_one: Callable[[float, float], Preprocessing],
    settings: Mapping[str, Any],
) -> Preprocessing:
    """Return the preprocessing of bands with these means and deviations. `of_one` makes that of a grey picture.

    `settings` are the words for a plan, without those of a resize mode.
    """
    made = {pair: of_one(*pair) for pair in zip(*numbers, strict=True)}
    bands = [made[pair] for pair in zip(*numbers, strict=True)]
    first = bands[0]
    mean, std = (tuple(getattr(one, name)[0] for one in bands) for name in ("mean", "std"))

    def fit(pictures: Iterable[Image.Image]) -> np.ndarray:
        return np.concatenate([one.fit(picture) for one, picture in zip(bands, pictures, strict=True)])

    summary = first.summary.removesuffix(", grey")
    for count in (1, 3):  # processors have numbers for three colours
        summary = summary.replace(normalisation(first.mean * count, first.std * count), normalisation(mean, std))
    return replace(
        first,
        fit=fit,
        fast=None,
        mean=mean,
        std=std,
        settings={**settings, **(first.resize_mode.settings if first.resize_mode else {})},
        summary=f"{summary}, {len(bands)} bands",
        channels=len(bands),
    )


def processor_preprocessing(
    processor: ImageProcessor, size: Size, channels: int = 3, resize_mode: ResizeMode | None = None
) -> Preprocessing:
    """Follow an image processor of transformers, with exactly its own pixels.

    Its steps up to the point where it would leave uint8 are `fit`, and the others are numbers. If it has steps of its
    own between the two, its floats are taken as they are. One channel is the grey of the picture, normalised by the
    average of the processor's numbers for colours. Bands are greys with numbers of their own. `resize_mode` replaces
    its resizing and cropping.

    Raises UsageError for a processor that does not allow what was asked for.
    """
    if channels not in OF_COLOURS:
        return _of_bands(
            numbers_of_bands(processor.numbers, channels),
            lambda mean, std: processor_preprocessing(processor.of_band(mean, std), size, 1, resize_mode),
            processor.settings if resize_mode is None else processor.without_resizing().settings,
        )
    if processor.is_of_greys:
        own = processor.settings if resize_mode is None else processor.without_resizing().settings
        settings = {**own, **(resize_mode.settings if resize_mode else {})}
        return replace(processor_preprocessing(processor.of_colours, size, channels, resize_mode), settings=settings)
    ours = _in_bytes(processor, size, channels, resize_mode)
    if resize_mode is not None:
        _refuse_other_sizes(processor, ours, resize_mode)
    colours = ours if channels == 3 else _in_bytes(processor, size, 3, resize_mode)
    steps = processor if resize_mode is None else processor.without_resizing()
    whole = _sizing(processor, size, 3, resize_mode)(steps.fit_floats)
    if _are_equal(colours, whole):
        return ours
    if channels == 1:
        raise UsageError(
            f"{processor.name} prepares colours in its own way, and takes no greys",
            "leave --num-channels out, or save another image processor there",
        )
    return replace(ours, fit=whole, dtype="float32", fast=None)


def _in_bytes(processor: ImageProcessor, size: Size, channels: int, resize_mode: ResizeMode | None) -> Preprocessing:
    """Return the processor as uint8 and a normalisation."""
    steps = processor if resize_mode is None else processor.without_resizing()
    said = steps.steps if resize_mode is None else [_said(resize_mode, processor), *steps.steps]
    result = f" -> {size[0]}x{size[1]}" if resize_mode is None else ""
    own = steps.fit_bytes if channels == 3 else steps.fit_grey
    by_torch = None
    if resize_mode is not None:
        by_torch = torch_resize.fitted(resize_mode, processor.resampling, fill_of(processor.background, channels))
    return Preprocessing(
        fit=_sizing(processor, size, channels, resize_mode)(own),
        fast=None if by_torch is None else lambda picture: own(by_torch(picture)),
        size=size,
        dtype="uint8",
        scale=steps.scale,
        mean=_for_channels(steps.mean, channels),
        std=_for_channels(steps.std, channels),
        origin="preprocessor_config.json",
        settings=steps.settings | (resize_mode.settings if resize_mode else {}),
        summary=f"{processor.name}: {', '.join(said)}{result}" + (", grey" if channels == 1 else ""),
        channels=channels,
        resize_mode=resize_mode,
    )


def _said(resize_mode: ResizeMode, processor: ImageProcessor) -> str:
    return resize_mode.summary(processor.resampling.name.lower())


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    is_one = len(set(values)) == 1  # its average may differ in the last bit
    return values if channels == 3 else values[:1] if is_one else (sum(values) / len(values),)


def _sizing(
    processor: ImageProcessor, size: Size, channels: int, resize_mode: ResizeMode | None
) -> Callable[[Fit], Fit]:
    """Return what goes before, or around, the processor's own steps."""
    if resize_mode is not None:
        resize = resize_mode.fitted(processor.resampling, fill_of(processor.background, channels))
        return lambda fit: lambda picture: fit(resize(picture))
    resample, covering = processor.resampling, processor.covering(size)

    def for_all_proportions(fit: Fit) -> Fit:
        if covering is None:
            return lambda picture: fit(shortened(picture, resample))
        fit_any = within_reason(fit, size, covering, resample)
        # Greys come first, as they do if the whole picture is resized.
        return fit_any if channels == 3 else lambda picture: fit_any(picture.convert("L").convert("RGB"))

    return for_all_proportions


def _refuse_other_sizes(processor: ImageProcessor, ours: Preprocessing, resize_mode: ResizeMode) -> None:
    """Raise UsageError for a processor that resizes or cuts in ways of its own, whatever it is told."""
    for picture in probe_pictures():
        own_size = (picture.height, picture.width)
        size = resize_mode.native_size(own_size) if resize_mode.is_native else ours.size
        if ours.fit(picture).shape[1:] != size:
            raise UsageError(
                f"--fit {resize_mode.name}: {processor.name} sizes pictures in its own way",
                "leave --fit out, or save another image processor there",
            )


def _are_equal(ours: Preprocessing, whole: Fit) -> bool:
    """Return whether uint8 and our normalisation equal the whole processor, tried on pictures of two shapes."""
    for picture in probe_pictures():
        try:
            fitted = ours.fit(picture)
        except TypeError:  # its own steps are only for floats
            return False
        if fitted.dtype != np.uint8:
            return False
        normalized = ours.normalize(torch.from_numpy(fitted)[None])[0].numpy()
        if not np.allclose(normalized, whole(picture), rtol=0, atol=1e-6):
            return False
    return True


def recorded_preprocessing(
    preprocessing: Mapping[str, Any], *, size: Size, channels: int, resize_mode: ResizeMode | None
) -> Preprocessing:
    """Make the preprocessing that a plan records again, without the checkpoint. `preprocessing` are its settings.

    Raises CheckpointError, and whatever libraries raise for words that they do not know.
    """
    if "image_processor_type" not in preprocessing:
        words = ((name, preprocessing[name]) for name in WORDS_OF_TIMM if name in preprocessing)
        config = {name: tuple(value) if isinstance(value, list) else value for name, value in words}
        return timm_preprocessing({**config, "input_size": (channels, *size)}, channels, "", resize_mode)
    config = {name: value for name, value in preprocessing.items() if name not in ("backend", RECTANGLE, OVERRIDES)}
    if resize_mode is not None:  # recorded as false, because `resize_mode` resizes, but in the processor's manner
        config["do_resize"] = True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))
        processor = read_processor(folder, None, preprocessing.get("backend"))
    assert processor is not None  # the file is there: it was read, or refused
    if rectangle := preprocessing.get(RECTANGLE):
        processor = processor.in_rectangle(rectangle["box"], rectangle["size"])
    return processor_preprocessing(processor, size, channels, resize_mode)


def _made_again(
    settings: Mapping[str, Any], size: Size, channels: int, resize_mode: ResizeMode | None, origin: str, summary: str
) -> Preprocessing:
    """Make a pickled preprocessing again."""
    found = recorded_preprocessing(settings, size=size, channels=channels, resize_mode=resize_mode)
    return replace(found, origin=origin, summary=summary, settings=settings)
