"""Give a picture the size of the backbone's input by --fit, if not in the checkpoint's own way."""

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

WIDEST = 32  # if the ratio of the edges is larger, only the middle is resized, and then the centre is cut out

NEAREST, BOX = 0, 4  # numbers of Pillow
JUMPING = (NEAREST, BOX)
ONE = 1 << 22  # the weight 1 in Pillow's whole numbers
COUNTED = 1 << 24  # up to this many steps, Pillow adds up step by step
REACH = 3  # pixels of the result to either side that Pillow's widest filter takes in

MOST_RESIZED = 1 << 22  # pixels along an edge; Pillow takes up to 200 MB to resize this many

LONGEST = 65_536  # pixels along an edge of the input


@dataclass(frozen=True)
class ResizeMode:
    """A way to bring pictures to the size of the input.

    `crop` covers the size and cuts off what is too much on both sides. `squash` changes the proportions. `pad` keeps
    the whole picture, centred, and fills up with a colour. `native` keeps the picture's own size, shrunk to fit into
    `size` if there is one, and rounded to a multiple of `step`.
    """

    name: Fit
    size: Size | None  # None only for native: each picture keeps its size
    step: Size  # edges of native inputs are multiples of it

    @property
    def is_native(self) -> bool:
        """Whether each picture keeps a size of its own."""
        return self.name == NATIVE

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as the plan holds them."""
        native = {"step": list(self.step), "largest": self.size and list(self.size)} if self.is_native else {}
        return {"fit": self.name, **native}

    def summary(self, interpolation: str) -> str:
        """Describe the mode in one line for people."""
        size = "x".join(map(str, self.size or ()))
        if not self.is_native:
            return f"{self.name} to {size} {interpolation}"
        largest = f", at most {size}" if size else ""
        return f"native size in steps of {self.step[0]}x{self.step[1]}{largest} {interpolation}"

    def fitted(
        self, resample: Image.Resampling, fill: tuple[int, ...] = (0, 0, 0)
    ) -> Callable[[Image.Image], Image.Image]:
        """Return a function that gives an RGB picture the wanted size. `fill` is the colour beside padded pictures.

        Raises ValueError for a mode that this version does not know.
        """
        if self.is_native:
            return lambda picture: _resized(picture, self.native_size((picture.height, picture.width)), resample)
        assert self.size is not None
        size = self.size
        if self.name == "squash":
            return lambda picture: _resized(picture, size, resample)
        if self.name == "pad":
            return lambda picture: _padded(picture, size, resample, fill)
        if self.name != "crop":  # the plan may be from a later featcli
            raise ValueError(f"no such way to size pictures: {self.name}")
        return lambda picture: _covered(picture, size, resample)

    def native_size(self, size: Size) -> Size:
        """Return the (H, W) of a native input: within `size`, then the nearest multiple of the step, at least one."""
        most = self.size or (LONGEST, LONGEST)
        scale = min(1.0, most[0] / size[0], most[1] / size[1])
        height, width = (
            max(1, min(round(edge * scale / step), limit // step)) * step
            for edge, step, limit in zip(size, self.step, most, strict=True)
        )
        return height, width


def _resized(picture: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    return shortened(picture, resample).resize((size[1], size[0]), resample)  # Pillow takes the width first


def _covered(picture: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """Resize as Pillow's ImageOps.fit, which misplaces the cut in pictures of millions of pixels in a row."""
    from PIL import ImageOps

    short, long = sorted(picture.size)
    spare = long - widest_for(size) * short
    if spare > 0:
        near, far = spare // 2, long - spare // 2  # the centre stays where it is
        is_wide = picture.width > picture.height
        picture = picture.crop((near, 0, far, short) if is_wide else (0, near, short, far))
    return ImageOps.fit(picture, (size[1], size[0]), resample)


def shortened(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
    """Average the picture down to at most MOST_RESIZED pixels along its longer edge.

    Pillow's memory for resizing grows with that edge, whatever the result: an edge of 89 million pixels needs too much.
    """
    times = -(-max(picture.size) // MOST_RESIZED)
    if times <= 1 or resample == NEAREST:
        return picture
    return picture.reduce((times, 1) if picture.width > picture.height else (1, times))


def _padded(picture: Image.Image, size: Size, resample: Image.Resampling, fill: tuple[int, ...]) -> Image.Image:
    """Resize as Pillow's ImageOps.pad, which loses a picture if an edge would become shorter than half a pixel."""
    inner = padded_size((picture.height, picture.width), size)
    return surrounded(_resized(picture, inner, resample), size, fill)


def padded_size(picture: Size, size: Size) -> Size:
    """Return the (H, W) to which a whole picture of some (H, W) is resized to fit into another."""
    height, width = picture
    if width * size[0] > height * size[1]:
        return max(1, round(height / width * size[1])), size[1]
    return size[0], max(1, round(width / height * size[0]))


def surrounded(picture: Image.Image, size: Size, fill: tuple[int, ...]) -> Image.Image:
    """Return a picture in the middle of one of this (H, W), which is filled with a colour."""
    from PIL import Image

    whole = Image.new("RGB", (size[1], size[0]), fill)
    whole.paste(picture, (round((size[1] - picture.width) * 0.5), round((size[0] - picture.height) * 0.5)))
    return whole


def fill_of(mean: Sequence[float], channels: int) -> tuple[int, ...]:
    """Return the colour that normalises to zero, as near as 8 bits come; for one channel, the grey that does."""
    values = mean if channels == 3 else [sum(mean) / len(mean)] * 3
    return tuple(round(255 * value) for value in values)


def within_reason(
    fit: Callable[[Image.Image], np.ndarray],
    size: Size,
    covering: Callable[[Size], Size],
    resample: Image.Resampling,
) -> Callable[[Image.Image], np.ndarray]:
    """Make a `fit` that covers a size and cuts out the centre fit for pictures of any proportions, and return it.

    `covering` says the (H, W) to which `fit` first resizes a picture of a given (H, W). For 20000x1 pixels that would
    be gigabytes, of which it keeps a square. So if one edge is more than WIDEST times the other (or more, if the input
    itself is wide), `fit` is given only the middle, already resized. Pixels then differ by at most 2 levels.
    """
    widest = widest_for(size)

    def fit_any(picture: Image.Image) -> np.ndarray:
        if max(picture.size) <= widest * min(picture.size):
            return fit(picture)
        height, width = covering((picture.height, picture.width))
        return fit(_resized_middle(picture, (height, width), 2 * max(*size, min(height, width)), resample))

    return fit_any


def widest_for(size: Size) -> int:
    """Return the ratio of edges above which only the middle of a picture is resized to this (H, W)."""
    return max(WIDEST, math.ceil(4 * max(size) / min(size)))


def _resized_middle(picture: Image.Image, whole: Size, keep: int, resample: Image.Resampling) -> Image.Image:
    """Return the middle of the picture that resizing to the (H, W) `whole` would give.

    Along the longer edge `keep` pixels are left, or up to 3 more. The number that is cut off from either side is even,
    so that a caller who cuts out the centre rounds halves in the same way.
    """
    is_wide = picture.width > picture.height
    length, resized = (picture.width, whole[1]) if is_wide else (picture.height, whole[0])
    cut = max(0, (resized - keep) // 4 * 2)
    kept = range(cut, resized - cut)
    if resample in JUMPING:
        return _picked(picture, whole, kept, resample)
    scale = length / resized
    reach = math.ceil(REACH * max(scale, 1)) + 1
    # Only pixels that the result depends on are cut out first: Pillow stores the edges of a box with 24 bits, which are
    # too few in long pictures.
    first, last = max(0, int(kept.start * scale) - reach), min(length, math.ceil(kept.stop * scale) + reach)
    begin, end = kept.start * scale - first, kept.stop * scale - first
    if is_wide:
        near = picture.crop((first, 0, last, picture.height))
        return near.resize((len(kept), whole[0]), resample, (begin, 0, end, picture.height))
    near = picture.crop((0, first, picture.width, last))
    return near.resize((whole[1], len(kept)), resample, (0, begin, picture.width, end))


def _picked(picture: Image.Image, whole: Size, kept: range, resample: Image.Resampling) -> Image.Image:
    """Return the same as `_resized_middle`, for filters that weigh pixels 0 or 1.

    Which pixel gets the 1 can depend on the last bit of a position. So positions are computed in Pillow's way, from the
    start of the whole picture.
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
    """Return where the pixels begin and end of which Pillow makes each of the `kept` pixels of a resized edge."""
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
    """Return a function from the (H, W) of a picture to the (H, W) that just covers `box`, as timm computes it."""

    def sizes(size: Size) -> Size:
        ratio = min(size[0] / box[0], size[1] / box[1])
        return round(size[0] / ratio), round(size[1] / ratio)

    return sizes


def shorter_edge(edge: int) -> Callable[[Size], Size]:
    """Return a function from the (H, W) of a picture to the (H, W) whose shorter edge is `edge`, as in torchvision.

    transformers computes the same.
    """

    def covering(size: Size) -> Size:
        height, width = size
        if height <= width:
            return edge, int(edge * width / height)
        return int(edge * height / width), edge

    return covering
