"""One shard file from its layout to its name: rows are written where they belong and hashed on the way.

Rows go past the page cache (O_DIRECT) where they can: they are not read again soon, and need not be copied through
memory. On a CPU the copies, and the kernel's work to get them on the disk, take from the backbone what they need. Only
whole pages can go this way, and not every file system has it; all else is written as usual.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from featcli.dump.atomic_file import create_partial, publish, write_all
from featcli.dump.formats import Format
from featcli.dump.formats.layout import Array, DoesNotFitError, is_stage
from featcli.errors import UsageError, shown
from featcli.system.files import state_at

PIECE_BYTES = 1 << 24  # that are hashed at once
REST = "rest"  # the hash of everything in the file that is not a stage: header, keys, valid
PAGE = 4096  # address, offset and length must be multiples of the disk's block, which is never larger
LEAST = 1 << 18  # bytes of a write: the disk is waited for
# How file systems say that they have it not; EFAULT: not from the memory of this driver.
NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EFAULT)


@dataclass(frozen=True)
class ShardSummary:
    """What became of a shard file."""

    file: str
    bytes: int
    hashes: Mapping[str, str]  # stage -> xxh3-128 of its rows in order; REST -> of all other bytes in order


class DirectFile:
    """A file that is open for writing, and its way past the page cache."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._direct = -1
        self._flag: int = getattr(os, "O_DIRECT", 0)  # 0: there is no such way, or not any more

    def write(self, rows: np.ndarray, offset: int) -> None:
        """Write all of a contiguous array at `offset`."""
        content = rows.data.cast("B")
        pages = all(number % PAGE == 0 for number in (rows.ctypes.data, offset, len(content)))
        if pages and len(content) >= LEAST and self._flag:
            written = self._write_past_cache(content, offset)
            content, offset = content[written:], offset + written
        write_all(self._descriptor, content, offset)

    def _write_past_cache(self, content: memoryview, offset: int) -> int:
        """Write what goes; how many bytes that were."""
        done = 0
        try:
            if self._direct < 0:
                self._direct = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | self._flag)
            while done < len(content) and done % PAGE == 0:  # the system may take less at a time
                done += os.pwrite(self._direct, content[done:], offset + done)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            self._flag = 0
        return done

    def close(self) -> None:
        """Close both ways in."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1


class ShardWriter:
    """A shard being written under a partial name. Nothing exists under its own name before `commit`.

    Raises UsageError for keys that the format cannot hold.
    """

    def __init__(
        self,
        final: Path,
        shard_format: Format,
        arrays: Mapping[str, tuple[str, tuple[int, ...]]],  # name -> (dtype, shape)
        keys: Sequence[str],
        attributes: Mapping[str, str],
    ) -> None:
        self.final = final
        self._descriptor, self._partial = create_partial(final)
        self._file = DirectFile(self._descriptor, self._partial)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")  # while the disk is waited for
        try:
            self.layout = shard_format.lay_out(str(self._partial), arrays, keys, attributes)
        except DoesNotFitError as error:
            self.abort()
            raise UsageError(
                f"shard {shown(final)}: {error}",
                "use --format hdf5 or a smaller --shard-size, in another -o or with --overwrite",
            ) from None
        except BaseException:
            self.abort()
            raise
        self._digests = {name: xxhash.xxh3_128() for name in arrays if is_stage(name)}
        self._ends = {name: array.offset for name, array in self.layout.arrays.items()}  # of what is written of each

    def write(self, maps: Mapping[str, np.ndarray]) -> None:
        """Write the next rows of each stage."""
        hashing = [self._hasher.submit(self._digests[name].update, rows.data.cast("B")) for name, rows in maps.items()]
        try:
            for name, rows in maps.items():
                assert self._ends[name] + rows.nbytes <= self.layout.arrays[name].end
                self._file.write(rows, self._ends[name])
                self._ends[name] += rows.nbytes
        finally:
            wait(hashing)  # the rows are the caller's again
        for hashed in hashing:
            hashed.result()

    def finish(self, beside: Mapping[str, np.ndarray]) -> ShardSummary:
        """Write the arrays that are not of stages. Afterwards all is on the disk but the name."""
        layout = self.layout
        assert all(self._ends[name] == layout.arrays[name].end for name in self._digests)  # every row, and no more
        for name, content in beside.items():
            write_all(self._descriptor, content.data.cast("B"), layout.arrays[name].offset)
        write_all(self._descriptor, memoryview(layout.header), 0)  # last: it makes the file a file
        os.fsync(self._descriptor)
        hashes = {name: digest.hexdigest() for name, digest in self._digests.items()}
        hashes[REST] = hash_rest(self._descriptor, self.layout.size, [layout.arrays[name] for name in self._digests])
        return ShardSummary(self.final.name, layout.size, hashes)

    def publish(self) -> None:
        """Give the file its name, which whoever calls knows to be free of committed shards. It is then on the disk."""
        publish(self._partial, self.final, replace=state_at(self.final, follow_links=False) is not None)
        self._close()

    def abort(self) -> None:
        """Remove the partial file, if it has not got its name."""
        self._partial.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._hasher.shutdown()
        self._file.close()


def hash_rest(descriptor: int, size: int, arrays: Sequence[Array]) -> str:
    """xxh3-128 over the bytes of a file that lie outside the given arrays, in file order."""
    digest, position = xxhash.xxh3_128(), 0
    spans = sorted((array.offset, array.end) for array in arrays)
    for begin, end in [*spans, (size, size)]:
        while position < begin:
            piece = os.pread(descriptor, min(begin - position, PIECE_BYTES), position)
            if not piece:
                raise EOFError("cut short while it was read")
            digest.update(piece)
            position += len(piece)
        position = max(position, end)
    return digest.hexdigest()
