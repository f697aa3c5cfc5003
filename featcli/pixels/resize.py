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

NEAREST, BOX = 0, 4  # as Pillow numbers them
JUMPING = (NEAREST, BOX)
ONE = 1 << 22  # as Pillow has weights, in whole numbers
COUNTED = 1 << 24  # steps that are added up
REACH = 3  # pixels of the result that Pillow's widest filter reaches to either side

MOST_RESIZED = 1 << 22  # pixels of an edge that is resized as it is, for which Pillow takes up to 200 MB

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
        return lambda picture: _covered(picture, size, resample)

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
    return shortened(picture, resample).resize((size[1], size[0]), resample)  # Pillow counts the width first


def _covered(picture: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """As Pillow's ImageOps.fit, which loses its place in pictures of millions of pixels in a row."""
    from PIL import ImageOps

    short, long = sorted(picture.size)
    spare = long - widest_for(size) * short
    if spare > 0:
        near, far = spare // 2, long - spare // 2  # as much on both sides: the centre stays where it is
        is_wide = picture.width > picture.height
        picture = picture.crop((near, 0, far, short) if is_wide else (0, near, short, far))
    return ImageOps.fit(picture, (size[1], size[0]), resample)


def shortened(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
    """The picture, averaged to at most MOST_RESIZED pixels along its longer edge.

    Pillow's memory for resizing grows with that edge, whatever the result: it has none for an edge of 89 million.
    """
    times = -(-max(picture.size) // MOST_RESIZED)
    if times <= 1 or resample == NEAREST:
        return picture
    return picture.reduce((times, 1) if picture.width > picture.height else (1, times))


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


def within_reason(
    fit: Callable[[Image.Image], np.ndarray],
    size: Size,
    covering: Callable[[Size], Size],
    resample: Image.Resampling,
) -> Callable[[Image.Image], np.ndarray]:
    """A `fit` to this (H, W) that covers some size and cuts out the centre, for pictures of any proportions.

    `covering` says the (H, W) to which it resizes a picture of another first. Of 20000x1 pixels that would be
    gigabytes, of which it keeps a square. Where one edge is more than WIDEST times the other (more, where the input
    itself is wide), it is given the middle alone, which has that size already. Pixels then differ by 2 levels at most.
    """
    widest = widest_for(size)

    def fit_any(picture: Image.Image) -> np.ndarray:
        if max(picture.size) <= widest * min(picture.size):
            return fit(picture)
        height, width = covering((picture.height, picture.width))
        return fit(_resized_middle(picture, (height, width), 2 * max(*size, min(height, width)), resample))

    return fit_any


def widest_for(size: Size) -> int:
    """How many times longer than the other an edge can be before only the middle is resized to this (H, W)."""
    return max(WIDEST, math.ceil(4 * max(size) / min(size)))


def _resized_middle(picture: Image.Image, whole: Size, keep: int, resample: Image.Resampling) -> Image.Image:
    """The middle of what the picture would be if it were resized to the (H, W) `whole`.

    Along the longer edge `keep` pixels are left, or up to 3 more: an even number is cut off from either side, so that
    whoever cuts the centre out rounds halves alike.
    """
    is_wide = picture.width > picture.height
    length, resized = (picture.width, whole[1]) if is_wide else (picture.height, whole[0])
    cut = max(0, (resized - keep) // 4 * 2)
    kept = range(cut, resized - cut)
    if resample in JUMPING:
        return _picked(picture, whole, kept, resample)
    scale = length / resized
    reach = math.ceil(REACH * max(scale, 1)) + 1
    # The pixels that have a say, since Pillow has edges of a box with 24 bits: of long pictures these are too few.
    first, last = max(0, int(kept.start * scale) - reach), min(length, math.ceil(kept.stop * scale) + reach)
    begin, end = kept.start * scale - first, kept.stop * scale - first
    if is_wide:
        near = picture.crop((first, 0, last, picture.height))
        return near.resize((len(kept), whole[0]), resample, (begin, 0, end, picture.height))
    near = picture.crop((0, first, picture.width, last))
    return near.resize((whole[1], len(kept)), resample, (0, begin, picture.width, end))


def _picked(picture: Image.Image, whole: Size, kept: range, resample: Image.Resampling) -> Image.Image:
    """As `_resized_middle`, by the filters that weigh pixels 0 or 1.

    Which they weigh 1 can hang on the last bit of a position, so that is computed in Pillow's way, from the start of
    the whole picture.
    """
    import numpy as np
    from PIL import Image

    is_wide = picture.width > picture.height
    length, resized = (picture.width, whole[1]) if is_wide else (picture.height, whole[0])
    first, last = _windows(length, resized, kept, resample)
    begin, end = int(first[0]), int(last[-1])
    if is_wide:
        near = picture.crop((begin, 0, end, picture.height))
    else:
        near = picture.crop((0, begin, picture.width, end)).resize((whole[1], end - begin), resample)
    along = np.moveaxis(np.asarray(near).astype(np.int64), 1 if is_wide else 0, 0)
    sums = np.concatenate([np.zeros_like(along[:1]), along.cumsum(0)])
    number = (last - first).reshape(-1, *[1] * (along.ndim - 1))
    means = ((sums[last - begin] - sums[first - begin]) * (ONE / number + 0.5).astype(np.int64) + ONE // 2) // ONE
    found = Image.fromarray(np.moveaxis(means, 0, 1 if is_wide else 0).astype(np.uint8))
    return found.resize((len(kept), whole[0]), resample) if is_wide else found


def _windows(length: int, resized: int, kept: range, resample: Image.Resampling) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels of an edge of which Pillow makes each of the `kept` ones of the resized edge: first, and end."""
    import numpy as np

    scale = float(np.float32(length)) / resized
    centre = (np.arange(kept.start, kept.stop) + 0.5) * scale
    if resample == NEAREST:
        if kept.stop <= COUNTED:  # Pillow adds up step by step
            centre = np.add.accumulate([scale / 2, *[scale] * (kept.stop - 1)])[kept.start :]
        first = centre.astype(np.int64).clip(0, length - 1)
        return first, first + 1
    stretch = max(scale, 1.0)
    first = (centre - 0.5 * stretch + 0.5).astype(np.int64).clip(0)
    last = (centre + 0.5 * stretch + 0.5).astype(np.int64).clip(None, length)
    first += (first - centre + 0.5) * (1 / stretch) <= -0.5
    last -= (last - 1 - centre + 0.5) * (1 / stretch) > 0.5
    return first, last


def covering(box: Size) -> Callable[[Size], Size]:
    """Make what says the (H, W) of a picture that just covers this one, as timm does it for edges that differ."""

    def sizes(size: Size) -> Size:
        ratio = min(size[0] / box[0], size[1] / box[1])
        return round(size[0] / ratio), round(size[1] / ratio)

    return sizes


def shorter_edge(edge: int) -> Callable[[Size], Size]:
    """Make what says the (H, W) of a picture whose shorter edge becomes this, as torchvision and transformers do it."""

    def covering(size: Size) -> Size:
        height, width = size
        if height <= width:
            return edge, int(edge * width / height)
        return int(edge * height / width), edge

    return covering
