"""transformers' image processors -> `Preprocessing`, with the very pixels that the processor itself gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # before transformers, which imports torchvision

import transformers  # noqa: E402

from featcli.backbones.backbone import Preprocessing  # noqa: E402
from featcli.backbones.hub import hub_or_cache  # noqa: E402
from featcli.errors import CheckpointError, UsageError, one_line, shown  # noqa: E402
from featcli.pixels.resize import ResizeMode, fill_of, within_reason  # noqa: E402

Fit = Callable[[Image.Image], np.ndarray]  # RGB picture -> (C, H, W)


def read_processor(checkpoint: str, image_size: tuple[int, int] | None) -> Any:
    """The image processor of a checkpoint, or None where it has none. Its backend is pinned: the others differ."""
    try:
        with quiet(), hub_or_cache(wanted=not Path(checkpoint).is_dir()):
            processor = transformers.AutoImageProcessor.from_pretrained(
                checkpoint, backend="pil", trust_remote_code=False
            )
    except Exception as error:  # files, JSON, unknown or custom classes: there is no common type
        if (Path(checkpoint) / "preprocessor_config.json").exists():
            raise CheckpointError(
                f"checkpoint {shown(checkpoint)}: its preprocessor_config.json cannot be used: {one_line(error)}",
                "is it whole? An image processor with code of its own is not run",
            ) from error
        if not isinstance(error, OSError | ValueError):
            raise
        return None
    if image_size is not None:
        _resize_processor(processor, image_size)
        try:
            sizes = output_sizes(processor)
        except (AttributeError, KeyError, TypeError, ValueError):  # of one that knows a single edge only
            sizes = set()
        if sizes != {image_size}:
            raise CheckpointError(
                f"checkpoint {shown(checkpoint)}: its {type(processor).__name__} does not give every picture"
                f" {image_size[0]}x{image_size[1]} pixels",
                "try --fit crop, squash or pad, or a multiple of the patch or of 32",
            )
    return processor


def default_processor(model_type: str, size: tuple[int, int]) -> Any:
    """The image processor that transformers pairs with a model type, with its defaults but for the size; ViT's where
    that one does not give every picture this size.
    """
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    kinds = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, {})
    with quiet(), suppress(AttributeError, TypeError, ValueError):  # of processors that have no size to set
        if (kind := getattr(transformers, str(kinds.get("pil")), None)) is not None and getattr(kind(), "size", None):
            processor = kind()
            _resize_processor(processor, size)
            if output_sizes(processor) == {size}:
                return processor
    return transformers.ViTImageProcessorPil(size={"height": size[0], "width": size[1]})


def output_sizes(processor: Any) -> set[tuple[int, int]]:
    """The (H, W) that the processor gives a landscape and a portrait picture."""
    return {_fit_float(processor)(picture).shape[1:] for picture in _test_pictures()}


def preprocessing_of(
    processor: Any, size: tuple[int, int], channels: int = 3, resize_mode: ResizeMode | None = None
) -> Preprocessing:
    """The processor up to the point where it would leave uint8, and what is left of it; `resize_mode` in place of its
    resizing and cropping.

    One channel is the grey of the picture, normalised by the average of what the processor has for its colours.
    """
    own = processor
    if resize_mode is not None:
        processor = copy.deepcopy(own)
        for step in ("do_resize", "do_center_crop", "do_pad"):
            if getattr(processor, step, None):
                setattr(processor, step, False)
        processor.resample = _resample(own)  # with which `resize_mode` resizes, and which is to be on record
    resize = _resizing(own, resize_mode, size, channels)
    mean = _three(processor.image_mean if processor.do_normalize else 0.0)
    std = _three(processor.image_std if processor.do_normalize else 1.0)
    ours = Preprocessing(
        fit=resize(_fit_uint8(processor) if channels == 3 else _fit_grey(processor)),
        size=size,
        dtype="uint8",
        scale=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=mean if channels == 3 else (sum(mean) / len(mean),),
        std=std if channels == 3 else (sum(std) / len(std),),
        origin="preprocessor_config.json",
        settings=plain_json(processor.to_dict())
        | {"backend": str(processor.backend)}  # a few types have no PIL one
        | (resize_mode.settings if resize_mode else {}),
        summary=_summary(processor, size, resize_mode) + (", grey" if channels == 1 else ""),
        channels=channels,
        resize_mode=resize_mode,
    )
    if resize_mode is not None:
        _refuse_other_pixels(own, ours)
    if channels == 1:
        colours = preprocessing_of(own, size, resize_mode=resize_mode)
        if colours.dtype != ours.dtype:
            raise UsageError(
                f"{type(processor).__name__} prepares colours in a way of its own, and no greys",
                "leave --num-channels out, or save another image processor there",
            )
        return ours
    # A processor with steps of its own between the two: take its floats as they are.
    whole = resize(_fit_float(processor))
    return ours if _equals(ours, whole) else replace(ours, fit=whole, dtype="float32")


def _resizing(
    processor: Any, resize_mode: ResizeMode | None, size: tuple[int, int], channels: int
) -> Callable[[Fit], Fit]:
    """What goes before (or around) the processor's own steps."""
    if resize_mode is not None:
        mean = _three(processor.image_mean if processor.do_normalize else 0.5)
        fill = fill_of(mean, channels)
        resized = resize_mode.fitted(_resample(processor), fill)
        return lambda fit: lambda picture: fit(resized(picture))
    shorter = (dict(processor.size).get("shortest_edge") or 0) if processor.do_resize else 0
    # ConvNext's kind cuts out the centre below this size, and squashes from there on.
    cuts_centre = getattr(processor, "do_center_crop", False) or (hasattr(processor, "crop_pct") and shorter < 384)
    return (lambda fit: within_reason(fit, size)) if cuts_centre and shorter else lambda fit: fit


def _resample(processor: Any) -> Image.Resampling:
    """How a processor resizes; where it does not, how --fit does."""
    return Image.Resampling(int(processor.resample)) if processor.do_resize else Image.Resampling.BICUBIC


def _refuse_other_pixels(processor: Any, ours: Preprocessing) -> None:
    """Raise UsageError for a processor that resizes or cuts in ways of its own, whatever it is told."""
    for picture in _test_pictures():
        resize_mode = ours.resize_mode
        assert resize_mode is not None
        size = resize_mode.native_size((picture.height, picture.width)) if resize_mode.is_native else ours.size
        if ours.fit(picture).shape[1:] != size:
            raise UsageError(
                f"--fit {resize_mode.name}: {type(processor).__name__} sizes pictures in a way of its own",
                "leave --fit out, or save another image processor there",
            )


def _fit_uint8(processor: Any) -> Fit:
    def fit(picture: Image.Image) -> np.ndarray:
        done = processor(picture, return_tensors="np", do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(done["pixel_values"][0])

    return fit


def _fit_grey(processor: Any) -> Fit:
    fit_colours = _fit_uint8(processor)

    def fit(picture: Image.Image) -> np.ndarray:
        return np.ascontiguousarray(fit_colours(picture.convert("L").convert("RGB"))[:1])

    return fit


def _fit_float(processor: Any) -> Fit:
    def fit(picture: Image.Image) -> np.ndarray:
        done = processor(picture, return_tensors="np")
        return np.ascontiguousarray(done["pixel_values"][0], dtype=np.float32)

    return fit


def _equals(ours: Preprocessing, whole: Fit) -> bool:
    """Whether uint8 plus our normalisation equals the whole processor, tried on pictures of two shapes."""
    for picture in _test_pictures():
        fitted = ours.fit(picture)
        if fitted.dtype != np.uint8:
            return False
        normalized = ours.normalize(torch.from_numpy(fitted)[None])[0].numpy()
        if not np.allclose(normalized, whole(picture), rtol=0, atol=1e-6):
            return False
    return True


def _resize_processor(processor: Any, size: tuple[int, int]) -> None:
    """Give every size of a processor the wanted one; an edge that is resized before a crop keeps its ratio to it,
    and is never shorter than the crop, which would pad the picture with black."""
    height, width = size
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    edge = dict(processor.size).get("shortest_edge")
    if edge and crop and dict(crop).get("height"):
        processor.size = type(processor.size)(shortest_edge=round(edge * max(size) / min(crop.height, crop.width)))
    elif edge and hasattr(processor, "crop_pct") and height == width:
        processor.size = type(processor.size)(shortest_edge=height)
    else:
        processor.size = type(processor.size)(height=height, width=width)
    for keeps_proportions in ("keep_aspect_ratio", "do_pad"):
        if getattr(processor, keeps_proportions, None):
            setattr(processor, keeps_proportions, False)
    if crop:
        processor.crop_size = type(crop)(height=height, width=width)


def _test_pictures() -> list[Image.Image]:
    """A landscape and a portrait picture of noise."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (200, 320, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy())]


def _summary(processor: Any, size: tuple[int, int], resize_mode: ResizeMode | None) -> str:
    steps = [resize_mode.summary(Image.Resampling(int(processor.resample)).name.lower())] if resize_mode else []
    if processor.do_resize:
        wanted = " ".join(f"{k} {v}" for k, v in dict(processor.size).items() if v)
        steps.append(f"resize {wanted} {Image.Resampling(int(processor.resample)).name.lower()}")
    if getattr(processor, "do_center_crop", False):
        steps.append(f"crop {processor.crop_size.height}x{processor.crop_size.width}")
    if processor.do_normalize:
        mean, std = (" ".join(f"{v:.4g}" for v in _three(w)) for w in (processor.image_mean, processor.image_std))
        steps.append(f"mean {mean}, std {std}")
    result = f" -> {size[0]}x{size[1]}" if resize_mode is None else ""
    return f"{type(processor).__name__}: {', '.join(steps)}{result}"


def _three(value: Any) -> tuple[float, ...]:
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(float(v) for v in value)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its own progress bars and load reports: what matters of them, featcli says itself."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def plain_json(value: Any) -> Any:
    """Only what JSON has, as JSON has it."""
    if isinstance(value, dict):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(str(v) for v in value)
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
