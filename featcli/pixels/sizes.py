"""Hold the input size of each image, one for all or each from its file's header, and say which images go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from featcli.inputs.image_list import ImageList
from featcli.pixels.decode import read_size
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import pillow_set_up
from featcli.pixels.resize import ResizeMode
from featcli.spec.groups import PixelSpec
from featcli.spec.parsers import Size
from featcli.system.threads import DecodeThreads

AT_ONCE = 4096  # headers that are read together


@dataclass(frozen=True)
class Sizes:
    """The (H, W) of the input of each image."""

    common: Size  # the size of all images; if each has its own, batches are measured in pixels of this one
    own: np.ndarray | None = None  # (N, 2), one row per image
    first: int = 0  # the row of the first size in `own`

    def __getitem__(self, row: int) -> Size:
        if self.own is None:
            return self.common
        height, width = self.own[row - self.first].tolist()
        return height, width

    def of(self, rows: range) -> Sizes:
        """Return the sizes of some neighbouring rows alone."""
        return self if self.own is None else Sizes(self.common, self.own_of(rows), rows.start)

    def own_of(self, rows: range) -> np.ndarray:
        """Return the own (H, W) of each of some neighbouring rows, as (rows, 2)."""
        assert self.own is not None
        return self.own[rows.start - self.first : rows.stop - self.first]

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.own is None:
            return "{}x{}".format(*self.common)
        least, most, different = self.own.min(0), self.own.max(0), len(np.unique(self.own, axis=0))
        return f"{different:,} different, heights {least[0]} to {most[0]}, widths {least[1]} to {most[1]}"

    def batches(self, rows: range, batch_size: int) -> Iterator[range]:
        """Yield the rows in batches. Each has one size, and no more pixels than `batch_size` images of the common size.

        A larger image makes a batch by itself.
        """
        first = rows.start
        while first < rows.stop:
            height, width = self[first]
            most = max(1, batch_size * self.common[0] * self.common[1] // (height * width))
            stop = min(first + min(most, batch_size), rows.stop)
            if self.own is not None:
                own = self.own_of(range(first, stop))
                other = (own != own[0]).any(1)
                stop = first + int(other.argmax()) if other.any() else stop
            yield range(first, stop)
            first = stop


def native_sizes(
    images: ImageList, rules: PixelSpec, mode: ResizeMode, common: Size, threads: int, channels: int = 3
) -> Sizes:
    """Return the size that each image keeps, read from the files' headers by `threads` threads.

    An image that cannot be read gets the size of the one before it, so that no batch has to end for it. If it is the
    first, it gets the common size as a picture of that size would. Raises MachineError if no image could be opened.
    """
    own = np.zeros((len(images), 2), np.int32)

    def read(row: int) -> Size:
        try:
            return mode.native_size(read_size(images[row], rules, channels))
        except UnreadableError:
            return 0, 0

    with pillow_set_up(rules.max_pixels), DecodeThreads(threads, "header") as pool:
        for first in range(0, len(images), AT_ONCE):
            rows = range(first, min(first + AT_ONCE, len(images)))
            own[rows.start : rows.stop] = pool.map(read, rows)
    readable = own[:, 0] > 0
    if not readable.all():
        before = np.maximum.accumulate(np.where(readable, np.arange(len(own)), 0))
        own = np.where(readable[before][:, None], own[before], np.array(mode.native_size(common), np.int32))
    return Sizes(common, own)
