"""The shard files of a dump that is read: opened when needed, checked against the plan, few at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from featcli.dump import Dump
from featcli.errors import DamagedError, shown
from featcli.writers.files import open_regular
from featcli.writers.layout import SHAPES, Array, Layout
from featcli.writers.rows import fill_rows, read_rows, starts_of

MOST = 32  # files that are open at once: file descriptors are few


@dataclass
class OpenShard:
    """A shard file, and of its stages whose maps differ in size the shapes and places of the maps."""

    descriptor: int
    layout: Layout
    shapes: Mapping[str, np.ndarray]  # (rows, 3)
    starts: Mapping[str, np.ndarray]  # (rows + 1,)
    readers: int = 0  # that are at it
    is_done: bool = False  # closed, as soon as nobody reads it


class OpenShards:
    """Reads rows by shard number, from any number of threads at once; a forked process opens its own files."""

    def __init__(self, dump: Dump) -> None:
        self._dump = dump
        self._begin()

    def _begin(self) -> None:
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, shard: int, name: str, first: int, count: int) -> np.ndarray:
        """`count` rows of an array as they are stored, bfloat16 as uint16. Raises DamagedError."""
        with self._reading(shard) as found:
            return read_rows(found.descriptor, found.layout.arrays[name], first, count)

    def read_into(self, out: np.ndarray, shard: int, name: str, first: int) -> None:
        """As many rows as `out` (contiguous, of the stored type) has, without another copy. Raises DamagedError."""
        with self._reading(shard) as found:
            fill_rows(out, found.descriptor, found.layout.arrays[name], first)

    def place(self, shard: int, name: str) -> tuple[str, Array]:
        """The path of a shard file, and where in it an array is."""
        with self._reading(shard) as found:
            return str(self._dump.shard_path(shard)), found.layout.arrays[name]

    def starts(self, shard: int, stage: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a stage whose maps differ in size: (rows, 3) shapes, and where each map begins among the values."""
        with self._reading(shard) as found:
            return found.shapes[stage], found.starts[stage]

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        with self._own_lock():
            while self._open:
                self._done(self._open.popitem()[1])

    def _own_lock(self) -> threading.Lock:
        """The lock of this process: in a fork another thread may have held the one before, for ever."""
        if self._process != os.getpid():
            self._begin()
        return self._lock

    def _reading(self, number: int) -> _Reading:
        """A shard whose file stays open for the block, whatever other threads open meanwhile."""
        with self._own_lock():
            found = self._open.get(number)
            if found is None:
                found = self._open[number] = self._opened(number)
                if len(self._open) > MOST:
                    self._done(self._open.popitem(last=False)[1])
            self._open.move_to_end(number)
            found.readers += 1
            return _Reading(self, number, found)

    def _leave(self, number: int, found: OpenShard, is_cut_short: bool) -> None:
        with self._own_lock():
            found.readers -= 1
            if found.is_done:
                self._done(found)
        if is_cut_short:
            path = shown(self._dump.shard_path(number))
            raise DamagedError(f"shard {path}: cut short", "see featcli inspect") from None

    @staticmethod
    def _done(shard: OpenShard) -> None:
        shard.is_done = True
        if not shard.readers:
            os.close(shard.descriptor)

    def _opened(self, number: int) -> OpenShard:
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
            return OpenShard(descriptor, layout, *checked_shapes(self._dump, number, descriptor, layout))
        except BaseException:
            os.close(descriptor)
            raise


class _Reading:
    """Of a shard: a class, since a context made of a generator takes as long as reading a small map does."""

    __slots__ = ("_found", "_number", "_shards")

    def __init__(self, shards: OpenShards, number: int, found: OpenShard) -> None:
        self._shards = shards
        self._number = number
        self._found = found

    def __enter__(self) -> OpenShard:
        return self._found

    def __exit__(self, _: object, error: object, __: object) -> None:
        self._shards._leave(self._number, self._found, isinstance(error, EOFError))


def checked_shapes(
    dump: Dump, number: int, descriptor: int, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For the stages of a shard whose maps differ in size: (rows, 3) shapes, and where each map begins.

    Raises DamagedError where the shard's arrays are not those of the plan.
    """
    shapes: dict[str, np.ndarray] = {}
    starts: dict[str, np.ndarray] = {}
    try:
        for stage in dump.plan.stages:
            if stage.is_ragged:
                array = layout.arrays[stage.name + SHAPES]
                if array.dtype != "uint32" or array.shape != (len(dump.plan.shard(number)), 3):
                    raise ValueError("shapes that are none")
                shapes[stage.name] = read_rows(descriptor, array, 0, array.shape[0])
                if (shapes[stage.name][:, 0] != stage.shape[0]).any():
                    raise ValueError("shapes of other channels")
                starts[stage.name] = starts_of(shapes[stage.name], layout.arrays[stage.name].shape[0])
        found = {name: (array.dtype, array.shape) for name, array in layout.arrays.items()}
        if found != dump.plan.arrays(number, shapes):
            raise ValueError("other arrays")
    except (KeyError, IndexError, ValueError, EOFError) as error:
        raise DamagedError(
            f"shard {shown(dump.shard_path(number))}: its arrays are not as planned",
            "delete its record: the shard is redone by the next extract",
        ) from error
    return shapes, starts
