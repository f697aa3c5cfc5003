"""The pictures of a dump as its backbone saw them: found again below a folder, sized and cut as the plan records."""

from __future__ import annotations

import os
import stat
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcli.errors import CheckpointError, UsageError, shown
from featcli.inputs.image_list import MISSING
from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels, read_size
from featcli.pixels.failure import UnreadableError
from featcli.pixels.internals import pillow_set_up
from featcli.reading.reader import DumpReader
from featcli.spec.groups import PixelSpec
from featcli.system.files import is_folder, state_at
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class DumpPictures:
    """`pictures[row]` is the picture of a row, or None where it cannot be shown; `missing` counts why.

    A dump knows keys, not folders: `root` is what they are relative to. A key that leads out of it is only followed
    with `allow_outside`: a dump may be anybody's. Raises UsageError for a folder that is none.
    """

    def __init__(self, dump: DumpReader, root: str | None, allow_outside: bool = False) -> None:
        self.missing: Counter[str] = Counter()
        self._dump = dump
        self._root = root or os.curdir
        self._allow_outside = allow_outside
        if not is_folder(self._root):
            raise UsageError(f"--root {shown(self._root)}: no such folder", "give the one that extract was given")

    def __getitem__(self, row: int) -> Picture | None:
        key = self._dump.keys[row]
        path = str(Path(self._root, key))
        is_outside = os.path.isabs(key) or ".." in key.split("/")
        try:
            if is_outside and not self._allow_outside:
                raise UnreadableError("outside of it (see --allow-outside)", key)
            found = state_at(path)
            if found is None or not stat.S_ISREG(found.st_mode):
                raise UnreadableError("not there (see --root)", key)
            if found.st_size != self._dump.sizes[row]:
                raise UnreadableError("not the file that was extracted", key)
            return self._read(Input(key, path, MISSING, self._root))
        except UnreadableError as error:
            self.missing[error.reason] += 1
        except CheckpointError as error:
            self.missing[error.message] += 1
        return None

    def _read(self, image: Input) -> Picture:
        """Read a picture in a thread of its own: the first one could not be interrupted."""
        with pillow_set_up(self._rules.max_pixels), DecodeThreads(1, "picture") as pool:
            return pool.submit(self._decoded, image).result()

    def _decoded(self, image: Input) -> Picture:
        from PIL import Image

        seen, rules = self._dump.preprocessing, self._rules
        size = seen.size
        if seen.resize_mode is not None and seen.is_native:
            size = seen.resize_mode.native_size(read_size(image, rules))
        if size[0] * size[1] > rules.max_pixels:
            raise UnreadableError("larger than can be", f"{size[0]}x{size[1]}")
        pixels = np.empty((seen.channels, *size), seen.dtype)
        read_pixels(image, rules, seen.fit, pixels, seen.is_native)
        if pixels.dtype != np.uint8:  # of a processor that normalises by itself: from its darkest to its brightest
            low, high = float(pixels.min()), float(pixels.max())
            pixels = ((pixels - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
        colours = np.broadcast_to(pixels, (3, *size))  # of greys, the same three times
        return Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))

    @cached_property
    def _rules(self) -> PixelSpec:
        try:
            return self._dump.plan.settings.pixel_rules
        except (KeyError, TypeError, UsageError) as error:
            raise CheckpointError(
                "preprocessed by rules that are not known here", "use the featcli that made it"
            ) from error
