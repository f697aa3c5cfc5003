"""Resize pictures by torch, for --decode fast: 8 bits, with the windows and weights of Pillow, rounded otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from featcli.pixels.resize import MOST_RESIZED, ResizeMode, padded_size, surrounded
from featcli.spec.parsers import Size

MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
FURTHEST = 2  # levels of 255 by which a value may differ from Pillow's


def takes(before: Size, after: Size, resample: Image.Resampling) -> bool:
    """Return whether torch resizes pictures of one (H, W) to another as Pillow does.

    torch begins with the width. Pillow 13 begins with the height if it then loses more than two rows for each column.
    Both round and clip in between, so that pixels would differ.
    """
    if resample not in MODES or max(before) > MOST_RESIZED or min(after) < 1:
        return False
    rows, columns = before[0] - after[0], before[1] - after[1]
    return columns == 0 or rows <= max(0, 2 * columns)


def resized(pixels: np.ndarray, size: Size, resample: Image.Resampling) -> torch.Tensor:
    """Return (H, W, 3) or (H, W) uint8 in another (H, W), as (C, H, W). `takes` says which sizes are allowed."""
    planes = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    if planes.shape[1:] == size:
        return planes
    return torch.nn.functional.interpolate(planes[None], size=size, mode=MODES[resample], antialias=True)[0]


def values_of(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Return a picture as an array that torch takes: one of its own, which may be written to."""
    return picture if isinstance(picture, np.ndarray) else np.array(picture)


def edges_of(picture: Image.Image | np.ndarray) -> Size:
    """Return the (H, W) of a picture or an array."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else (len(picture), len(picture[0]))


def picture_of(pixels: Image.Image | np.ndarray) -> Image.Image:
    """Return an array as a picture."""
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def picture_of_planes(planes: torch.Tensor) -> Image.Image:
    """Return uint8 (C, H, W) as a picture: a grey one of one plane, an RGB one of three."""
    values = planes.permute(1, 2, 0).numpy()
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def fitted(
    mode: ResizeMode, resample: Image.Resampling, fill: tuple[int, ...] = (0, 0, 0)
) -> Callable[[Image.Image | np.ndarray], Image.Image] | None:
    """Return a function that gives a picture, or an array (H, W, 3), the wanted size as `mode.fitted` does.

    Pillow itself resizes where `takes` says so, and for `crop` if the cut goes through pixels. Returns None if it
    always does: for other filters, and for native sizes, which change by a few pixels.
    """
    by_pillow, whole = mode.fitted(resample, fill), mode.size
    if whole is None or mode.is_native or resample not in MODES:
        return None

    def fit(picture: Image.Image | np.ndarray) -> Image.Image:
        height, width = edges_of(picture)
        inner = padded_size((height, width), whole) if mode.name == "pad" else whole
        is_cut = mode.name == "crop" and height * whole[1] != width * whole[0]
        if is_cut or not takes((height, width), inner, resample):
            return by_pillow(picture_of(picture))
        found = picture_of_planes(resized(values_of(picture), inner, resample))
        return found if inner == whole else surrounded(found, whole, fill)

    return fit
