"""timm's evaluation transforms -> `Preprocessing`, with the very pixels that timm itself gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from featcli.backbones.torchvision_operators import declare_missing_operators

declare_missing_operators()  # before timm, which imports torchvision

from timm.data import create_transform  # noqa: E402
from timm.data.loader import adapt_to_chs  # noqa: E402
from timm.data.transforms import str_to_pil_interp  # noqa: E402

from featcli.backbones.backbone import Preprocessing  # noqa: E402
from featcli.pixels.resize import ResizeMode, fill_of, within_reason  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image


def timm_preprocessing(
    config: Mapping[str, Any], channels: int, tag: str, resize_mode: ResizeMode | None
) -> Preprocessing:
    """What a resolved data configuration of timm says; `resize_mode` in place of its resizing and cropping."""
    transform = create_transform(**config, is_training=False, use_prefetcher=True)
    with silent_timm():  # greys are normalised by the average of the colours, as timm's own loader does it
        mean, std = (adapt_to_chs(config[name], channels) for name in ("mean", "std"))
    is_grey = channels == 1
    if resize_mode is None:
        steps = [_step(step, config["interpolation"]) for step in transform.transforms[:-1]]  # the last: type only
    else:
        resize = resize_mode.fitted(str_to_pil_interp(config["interpolation"]), fill_of(config["mean"], channels))
        steps = [resize_mode.summary(config["interpolation"])]

    def fit(picture: Image.Image) -> np.ndarray:
        if resize_mode is None:
            return np.asarray(transform(picture.convert("L") if is_grey else picture))
        fitted = np.asarray(resize(picture).convert("L" if is_grey else "RGB"))
        return fitted[None] if is_grey else fitted.transpose(2, 0, 1)

    cuts_centre = resize_mode is None and config.get("crop_mode", "center") == "center"
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return Preprocessing(
        fit=within_reason(fit, config["input_size"][1:]) if cuts_centre else fit,
        size=config["input_size"][1:],
        dtype="uint8",
        scale=1 / 255,
        mean=tuple(mean),
        std=tuple(std),
        origin=f"timm, tag {tag}" if tag else "timm",
        settings={**settings, **(resize_mode.settings if resize_mode else {})},
        summary=f"{', '.join(steps)}, mean {_row(mean)}, std {_row(std)}" + (", grey" if is_grey else ""),
        channels=channels,
        resize_mode=resize_mode,
    )


@contextmanager
def silent_timm() -> Iterator[None]:
    """timm without its warnings of every key that a file has too much: what matters, featcli says itself."""
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _step(step: Any, interpolation: str) -> str:
    """A transform of timm or torchvision in a few words, such as `Resize 235 bicubic`."""
    size = step.size if isinstance(step.size, int) else "x".join(map(str, step.size))
    return f"{type(step).__name__} {size}" + (f" {interpolation}" if hasattr(step, "interpolation") else "")


def _row(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
