"""Open the shard files of dumps when they are needed, check them against the plan, and keep a limited number open.

A file is checked once, and the places of its arrays are kept. So a row costs the same with ten shards or ten thousand.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcli.dump.folder import SHARDS
from featcli.dump.formats.layout import Array, fill_rows, read_row, read_rows
from featcli.errors import DamagedError, FeatcliError, shown
from featcli.reading.along_rows import AlongRows
from featcli.system.faults import machine_error, machine_errors
from featcli.system.files import open_regular

AGAIN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
LEAST, MOST = 8, 4096  # files that are open at once, as far as the process may open them
SHARE = 4  # one in this many descriptors is used: other code needs some, and several dumps may be open

Version = int  # a hash of inode, bytes and time of the last change, which tells a file from another of its name


@dataclass(frozen=True, kw_only=True)
class Places:
    """The places of the arrays in a shard file.

    For stages whose maps differ in size, also shapes and places of the maps.
    """

    version: Version  # of the file that this is true for
    arrays: Mapping[str, Array]
    shapes: Mapping[str, np.ndarray]  # (rows, 3)
    starts: Mapping[str, np.ndarray]  # (rows + 1,)


class OpenShard:
    """A shard file. It is closed when nobody holds it any more, whatever is opened or closed meanwhile."""

    __slots__ = ("descriptor", "places")

    def __init__(self, descriptor: int, places: Places) -> None:
        self.descriptor = descriptor
        self.places = places

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenShards:
    """Reads rows by shard number, over all dumps along rows, from any number of threads and forked processes at once.

    There is no lock, because a fork could copy it while it is held. Each step on the dictionaries is one step of the
    interpreter, two threads that open the same file do it twice, and a read by offset moves nothing that others see.
    """

    def __init__(self, dumps: AlongRows, share: int = 1) -> None:
        """`share` is how many of these are used beside one another: each keeps fewer files open."""
        self._dumps = dumps
        self._open: OrderedDict[int, OpenShard] = OrderedDict()  # those used last come last
        self._places: dict[int, Places] = {}
        self._arrays: Mapping[str, Array] = {}  # of the last shard: nearly all are equal, and then share one object
        self._names = {dump: (f"{dump.path / SHARDS}{os.sep}", dump.format.SUFFIX) for dump in dumps.dumps}
        self._most = max(1, most_open() // share)

    def read(self, shard: int, name: str, first: int, count: int) -> np.ndarray:
        """Return `count` rows of an array as stored, bfloat16 as uint16. Raises DamagedError and MachineError."""
        found = self._shard(shard)
        try:
            return read_rows(found.descriptor, found.places.arrays[name], first, count)
        except (EOFError, OSError) as error:
            raise self._unreadable(shard, error) from error

    def read_row(self, shard: int, name: str, row: int) -> np.ndarray:
        """Return one row of an array as stored. Raises DamagedError and MachineError."""
        found = self._shard(shard)
        try:
            return read_row(found.descriptor, found.places.arrays[name], row)
        except (EOFError, OSError) as error:
            raise self._unreadable(shard, error) from error

    def read_into(self, out: np.ndarray, shard: int, name: str, first: int) -> None:
        """Fill `out`, which is contiguous and of the stored dtype, with as many rows as it has.

        Nothing is copied twice.

        Raises DamagedError and MachineError.
        """
        found = self._shard(shard)
        try:
            fill_rows(out, found.descriptor, found.places.arrays[name], first)
        except (EOFError, OSError) as error:
            raise self._unreadable(shard, error) from error

    def place(self, shard: int, name: str) -> tuple[str, Array]:
        """Return the path of a shard file, and where in it an array is. Raises DamagedError and MachineError."""
        return str(self._path(shard)), self._shard(shard).places.arrays[name]

    def starts(self, shard: int, stage: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows, 3) shapes, and where each map begins among the values. The maps of the stage differ in size."""
        places = self._shard(shard).places
        return places.shapes[stage], places.starts[stage]

    def close(self) -> None:
        """Close the files. They are opened again when needed."""
        self._open.clear()

    def _shard(self, number: int) -> OpenShard:
        """Return the open file of a shard. Raises DamagedError and MachineError."""
        found = self._open.get(number)
        if found is None:
            return self._opened(number)
        try:  # noqa: SIM105 - rows are read by the hundred thousand
            self._open.move_to_end(number)
        except KeyError:  # another thread has dropped it, but it stays open while it is held here
            pass
        return found

    def _opened(self, number: int) -> OpenShard:
        places = self._places.get(number)
        found = self._open[number] = (places and self._open_again(number, places)) or self._open_and_check(number)
        if len(self._open) > self._most:
            try:  # noqa: SIM105 - as above
                self._open.popitem(last=False)
            except KeyError:  # several threads at once may find nothing left
                pass
        return found

    def _open_and_check(self, number: int) -> OpenShard:
        path = self._path(number)
        try:
            with machine_errors("shard", path, strict=True):
                descriptor = open_regular(path)
        except (OSError, ValueError) as error:
            cause = (isinstance(error, OSError) and error.strerror) or error
            raise DamagedError(
                f"shard {shown(path)}: {cause}", "run featcli inspect on the dump to see its state"
            ) from error
        try:
            with machine_errors("shard", path, strict=True):
                places = self._places[number] = self._checked(number, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return OpenShard(descriptor, places)

    def _checked(self, number: int, descriptor: int) -> Places:
        """Return the places in a shard file. Raises DamagedError unless it is as the plan says."""
        (dump, own), version = self._dumps.shard(number), _version(descriptor)
        path = dump.shard_path(own)
        layout = dump.format.read_layout(str(path), None)
        attributes = layout.attributes.get("fingerprint"), layout.attributes.get("shard")
        if attributes != (dump.plan.fingerprint, str(own)):
            raise DamagedError(
                f"shard {shown(path)}: it belongs elsewhere", "run featcli inspect on the dump to see its state"
            )
        shapes, starts = dump.checked_shapes(own, descriptor, layout)
        if layout.arrays != self._arrays:
            self._arrays = layout.arrays
        return Places(version=version, arrays=self._arrays, shapes=shapes, starts=starts)

    def _open_again(self, number: int, places: Places) -> OpenShard | None:
        """Open a file that was checked before. Returns None if it is another file now, or cannot be opened."""
        try:  # the path is made here: to read one from memory that is not cached would take longer
            dump, own = self._dumps.shard(number)
            folder, suffix = self._names[dump]
            descriptor = os.open(f"{folder}{own:05d}{suffix}", AGAIN)
        except OSError:  # the error is raised when the file is opened and checked again
            return None
        try:
            if _version(descriptor) == places.version:
                return OpenShard(descriptor, places)
        except OSError:
            pass
        os.close(descriptor)
        return None

    def _path(self, number: int) -> Path:
        dump, own = self._dumps.shard(number)
        return dump.shard_path(own)

    def _unreadable(self, number: int, error: EOFError | OSError) -> FeatcliError:
        what = f"shard {shown(self._path(number))}"
        if isinstance(error, OSError):
            return machine_error(what, error)
        return DamagedError(f"{what}: it is cut short", "run featcli inspect on the dump to see its state")


def most_open() -> int:
    """Return how many shard files may be open at once: a part of RLIMIT_NOFILE, which is not changed."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if allowed == resource.RLIM_INFINITY else max(LEAST, min(MOST, allowed // SHARE))


def _version(descriptor: int) -> Version:
    found = os.fstat(descriptor)
    return hash((found.st_ino, found.st_size, found.st_mtime_ns))
