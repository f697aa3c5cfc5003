"""--fit: how a picture gets the size of the backbone's input, where it is not to be the checkpoint's own way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featcli.spec.parsers import Size
from featcli.spec.words import NATIVE, Fit

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

WIDEST = 32  # beyond this ratio of its edges, only the middle of a picture is resized before the centre is cut out

LONGEST = 65_536  # edge of an input, in pixels


@dataclass(frozen=True)
class ResizeMode:
    """A way to bring pictures to the size of the input.

    `crop` covers the size and cuts off what is too much on both sides; `squash` changes the proportions; `pad` keeps
    the whole picture, centred, and fills up with a colour; `native` keeps the picture's own size, rounded to a multiple
    of `step`, and shrunk to fit into `size` where there is one.
    """

    name: Fit
    size: Size | None  # None only for native: as large as the picture
    step: Size  # what the edges of native inputs are multiples of

    @property
    def is_native(self) -> bool:
        """Whether every picture keeps a size of its own."""
        return self.name == NATIVE

    @property
    def settings(self) -> dict[str, Any]:
        """As part of the plan."""
        native = {"step": list(self.step), "largest": self.size and list(self.size)} if self.is_native else {}
        return {"fit": self.name, **native}

    def summary(self, interpolation: str) -> str:
        """For people."""
        size = "x".join(map(str, self.size or ()))
        if not self.is_native:
            return f"{self.name} to {size} {interpolation}"
        largest = f", at most {size}" if size else ""
        return f"native size in steps of {self.step[0]}x{self.step[1]}{largest} {interpolation}"

    def fitted(
        self, resample: Image.Resampling, fill: tuple[int, ...] = (0, 0, 0)
    ) -> Callable[[Image.Image], Image.Image]:
        """RGB picture -> RGB picture of the wanted size. `fill` is the colour beside padded pictures.

        Raises ValueError for a mode that is none.
        """
        if self.is_native:
            return lambda picture: _resized(picture, self.native_size((picture.height, picture.width)), resample)
        assert self.size is not None
        size = self.size
        if self.name == "squash":
            return lambda picture: _resized(picture, size, resample)
        if self.name == "pad":
            return lambda picture: _padded(picture, size, resample, fill)
        if self.name != "crop":  # of a plan that a later featcli made
            raise ValueError(f"no such way to size pictures: {self.name}")
        from PIL import ImageOps

        return lambda picture: ImageOps.fit(picture, (size[1], size[0]), resample)

    def native_size(self, size: Size) -> Size:
        """The (H, W) of a picture's input: within `size`, then the nearest multiple of the step, one at the least."""
        most = self.size or (LONGEST, LONGEST)
        scale = min(1.0, most[0] / size[0], most[1] / size[1])
        height, width = (
            max(1, min(round(edge * scale / step), limit // step)) * step
            for edge, step, limit in zip(size, self.step, most, strict=True)
        )
        return height, width


def _resized(picture: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return picture.resize((size[1], size[0]), resample)  # Pillow counts the width first


def _padded(picture: Image.Image, size: Size, resample: Image.Resampling, fill: tuple[int, ...]) -> Image.Image:
    """As Pillow's ImageOps.pad, which loses a picture of which an edge would come out below half a pixel."""
    from PIL import Image

    if picture.width * size[0] > picture.height * size[1]:
        height, width = max(1, round(picture.height / picture.width * size[1])), size[1]
    else:
        height, width = size[0], max(1, round(picture.width / picture.height * size[0]))
    whole = Image.new("RGB", (size[1], size[0]), fill)
    place = round((size[1] - width) * 0.5), round((size[0] - height) * 0.5)
    whole.paste(_resized(picture, (height, width), resample), place)
    return whole


def fill_of(mean: Sequence[float], channels: int) -> tuple[int, ...]:
    """The colour that normalises to zero, as near as 8 bits come; for one channel the grey that does."""
    values = mean if channels == 3 else [sum(mean) / len(mean)] * 3
    return tuple(round(255 * value) for value in values)


def within_reason(fit: Callable[[Image.Image], np.ndarray], size: Size) -> Callable[[Image.Image], np.ndarray]:
    """A `fit` to this (H, W) that resizes the shorter edge and cuts out the centre, for pictures of any proportions.

    Of 20000x1 pixels it would make gigabytes first, of which it keeps a square. Where one edge is more than WIDEST
    times the other (more, where the input itself is wide), it gets the middle of the picture alone.
    """
    widest = max(WIDEST, math.ceil(4 * max(size) / min(size)))
    return lambda picture: fit(_middle(picture, widest))


def _middle(picture: Image.Image, widest: int) -> Image.Image:
    width, height = picture.size
    keep = widest * min(width, height)
    if max(width, height) <= keep:
        return picture
    cut = (max(width, height) - keep) // 2
    return picture.crop((cut, 0, cut + keep, height) if width > height else (0, cut, width, cut + keep))
