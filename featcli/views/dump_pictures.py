"""Show the pictures of a dump as its backbone saw them: found again by their keys, resized and cut as the plan says."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from featcli.errors import CheckpointError, UsageError
from featcli.inputs.image_list import MISSING
from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels, read_size
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import pillow_set_up
from featcli.reading.picture_files import PictureFiles
from featcli.reading.reader import DumpReader
from featcli.spec.groups import PixelSpec
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class DumpPictures:
    """`pictures[row]` is the picture of a row, or None if it cannot be shown. `missing` counts why.

    For `root` and `allow_outside` see PictureFiles. Raises UsageError if `root` is no folder.
    """

    def __init__(self, dump: DumpReader, root: str | None = None, allow_outside: bool = False) -> None:
        self.missing: Counter[str] = Counter()
        self._dump = dump.leading
        self.files = PictureFiles(self._dump, root, allow_outside)

    def __getitem__(self, row: int) -> Picture | None:
        try:
            path, folder = self.files.find(row)
            return self._read(Input(self._dump.keys[row], path, MISSING, folder))
        except UnreadableError as error:
            self.missing[error.reason] += 1
        except CheckpointError as error:
            self.missing[error.message] += 1
        return None

    def _read(self, image: Input) -> Picture:
        """Read a picture in another thread, because Ctrl-C could not interrupt it in the main one."""
        with pillow_set_up(self._rules.max_pixels), DecodeThreads(1, "picture") as pool:
            return pool.submit(self._decoded, image).result()

    def _decoded(self, image: Input) -> Picture:
        from PIL import Image

        seen, rules = self._dump.preprocessing, self._rules
        size = seen.size
        if seen.resize_mode is not None and seen.is_native:
            size = seen.resize_mode.native_size(read_size(image, rules, seen.channels))
        if size[0] * size[1] > rules.max_pixels:
            raise UnreadableError("larger than can be", f"{size[0]}x{size[1]}")
        pixels = np.empty((seen.channels, *size), seen.dtype)
        read_pixels(image, rules, seen.fit_for(rules.decode), pixels, seen.is_native)
        if pixels.dtype != np.uint8:  # its processor normalises by itself: scale from darkest to brightest
            low, high = float(pixels.min()), float(pixels.max())
            pixels = ((pixels - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
        few = pixels[: 3 if len(pixels) >= 3 else 1]  # of bands the first three, as if they were red, green and blue
        colours = np.broadcast_to(few, (3, *size))  # greys become three equal channels
        return Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))

    @cached_property
    def _rules(self) -> PixelSpec:
        try:
            return self._dump.plan.settings.pixel_rules
        except (KeyError, TypeError, UsageError) as error:
            raise CheckpointError(
                "this dump was preprocessed by rules that are not known here", "use the featcli that made it"
            ) from error
