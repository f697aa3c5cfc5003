"""The shard files of a dump that is read: opened when needed, checked against the plan, few at a time."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from featcli.dump.folder import Dump
from featcli.dump.formats.layout import Array, Layout, fill_rows, read_rows
from featcli.errors import DamagedError, shown
from featcli.system.files import open_regular

MOST = 32  # files that are open at once: file descriptors are few


@dataclass(eq=False)
class OpenShard:
    """A shard file, and of its stages whose maps differ in size the shapes and places of the maps.

    The file is closed when nobody holds the shard any more: who reads it need not care what others open meanwhile.
    """

    descriptor: int
    layout: Layout
    shapes: Mapping[str, np.ndarray]  # (rows, 3)
    starts: Mapping[str, np.ndarray]  # (rows + 1,)

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenShards:
    """Reads rows by shard number, from any number of threads and forked processes at once.

    There is no lock, which a fork could copy while it is held: each step on the dictionary is one of the interpreter's
    own, two threads that open the same file do it twice, and reading by place moves nothing that others see.
    """

    def __init__(self, dump: Dump) -> None:
        self._dump = dump
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def read(self, shard: int, name: str, first: int, count: int) -> np.ndarray:
        """`count` rows of an array as they are stored, bfloat16 as uint16. Raises DamagedError."""
        found = self._open.get(shard) or self._opened(shard)
        try:
            return read_rows(found.descriptor, found.layout.arrays[name], first, count)
        except EOFError:
            raise self._cut_short(shard) from None

    def read_into(self, out: np.ndarray, shard: int, name: str, first: int) -> None:
        """As many rows as `out` (contiguous, of the stored type) has, without another copy. Raises DamagedError."""
        found = self._open.get(shard) or self._opened(shard)
        try:
            fill_rows(out, found.descriptor, found.layout.arrays[name], first)
        except EOFError:
            raise self._cut_short(shard) from None

    def place(self, shard: int, name: str) -> tuple[str, Array]:
        """The path of a shard file, and where in it an array is."""
        found = self._open.get(shard) or self._opened(shard)
        return str(self._dump.shard_path(shard)), found.layout.arrays[name]

    def starts(self, shard: int, stage: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a stage whose maps differ in size: (rows, 3) shapes, and where each map begins among the values."""
        found = self._open.get(shard) or self._opened(shard)
        return found.shapes[stage], found.starts[stage]

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        self._open.clear()

    def _opened(self, number: int) -> OpenShard:
        found = self._open[number] = self._read_layout(number)
        if len(self._open) > MOST:
            self._open.popitem(last=False)
        return found

    def _cut_short(self, number: int) -> DamagedError:
        return DamagedError(f"shard {shown(self._dump.shard_path(number))}: cut short", "see featcli inspect")

    def _read_layout(self, number: int) -> OpenShard:
        path = self._dump.shard_path(number)
        try:
            descriptor = open_regular(path)
        except (OSError, ValueError) as error:
            cause = (isinstance(error, OSError) and error.strerror) or error
            raise DamagedError(f"shard {shown(path)}: {cause}", "see featcli inspect for its state") from error
        try:
            layout = self._dump.format.read_layout(str(path), None)
            attributes = layout.attributes.get("fingerprint"), layout.attributes.get("shard")
            if attributes != (self._dump.plan.fingerprint, str(number)):
                raise DamagedError(f"shard {shown(path)}: it belongs elsewhere", "see featcli inspect for its state")
            shapes, starts = self._dump.checked_shapes(number, descriptor, layout)
            return OpenShard(descriptor=descriptor, layout=layout, shapes=shapes, starts=starts)
        except BaseException:
            os.close(descriptor)
            raise
