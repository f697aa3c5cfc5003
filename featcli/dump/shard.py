"""Write one shard file, from its layout to its name. Rows are written to their places and hashed on the way.

If possible, rows go past the page cache (O_DIRECT): they are not read again soon, and need not be copied through
memory. On a CPU the copies, and the kernel's work to put them on the disk, take time from the backbone. Only whole
pages can go this way, and some file systems lack it. Everything else is written as usual.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
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
REST = "rest"  # hash of everything in the file that is not a stage: header, keys, valid
PAGE = 4096  # address, offset and length must be multiples of the disk's block, which is never larger
RESERVE = 1 << 18  # bytes after the arrays while rows come in; on a full disk they make room for a record
LEAST = 1 << 18  # bytes of a direct write, which waits for the disk
# Errors that say that direct writes do not work. EFAULT: not from the memory of this driver. ENOENT: another process
# has committed the shard on a file system without locks and removed this file, which goes on without its name.
NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EFAULT, errno.ENOENT)


@dataclass(frozen=True)
class ShardSummary:
    """What was written into a shard file."""

    file: str
    bytes: int
    hashes: Mapping[str, str]  # stage -> xxh3-128 of its rows in order; REST -> of all other bytes in order


class DirectFile:
    """A file that is open for writing, also past the page cache."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._direct = -1
        self._flag: int = getattr(os, "O_DIRECT", 0)  # 0 if there are no direct writes, or none any more

    def write(self, rows: np.ndarray, offset: int) -> None:
        """Write all of a contiguous array at `offset`."""
        content = rows.data.cast("B")
        pages = all(number % PAGE == 0 for number in (rows.ctypes.data, offset, len(content)))
        if pages and len(content) >= LEAST and self._flag:
            written = self._write_past_cache(content, offset)
            content, offset = content[written:], offset + written
        write_all(self._descriptor, content, offset)

    def _write_past_cache(self, content: memoryview, offset: int) -> int:
        """Write what can go past the cache. Returns how many bytes that were."""
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
        """Close both descriptors."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1


class ShardWriter:
    """Writes a shard under a partial name. Nothing exists under its own name before `publish`.

    `partial` is the descriptor and path of a partial file of that shard that is resumed; without it a new file is made.
    Raises UsageError for keys that the format cannot hold.
    """

    def __init__(
        self,
        final: Path,
        shard_format: Format,
        arrays: Mapping[str, tuple[str, tuple[int, ...]]],  # name -> (dtype, shape)
        keys: Sequence[str],
        attributes: Mapping[str, str],
        partial: tuple[int, Path] | None = None,
    ) -> None:
        self.final = final
        self._descriptor, self.partial = partial or create_partial(final)
        self._file = DirectFile(self._descriptor, self.partial)
        self._is_lost = False  # after one failure to keep data, a disk may say later that it has them
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")  # it hashes while the disk is waited for
        try:  # a resumed file has all of this already, and gets the same bytes
            self.layout = shard_format.lay_out(str(self.partial), arrays, keys, attributes)
        except DoesNotFitError as error:
            self.abort()
            raise UsageError(
                f"shard {shown(final)}: {error}",
                "use --format hdf5 or a smaller --shard-size, in another -o or with --overwrite",
            ) from None
        except BaseException:
            self.abort() if partial is None else self.close()
            raise
        # Some file systems cannot reserve space. If the disk is full already, the first row will say so.
        with suppress(OSError, AttributeError):
            os.posix_fallocate(self._descriptor, self.layout.size, RESERVE)
        self._digests = {name: xxhash.xxh3_128() for name in arrays if is_stage(name)}
        self._ends = {name: array.offset for name, array in self.layout.arrays.items()}  # where each array ends so far

    def write(self, maps: Mapping[str, np.ndarray]) -> None:
        """Write the next rows of each stage. After an error none of them counts as written."""
        digests = {name: self._digests[name].copy() for name in maps}
        hashing = [self._hasher.submit(digests[name].update, rows.data.cast("B")) for name, rows in maps.items()]
        try:
            for name, rows in maps.items():
                assert self._ends[name] + rows.nbytes <= self.layout.arrays[name].end
                self._file.write(rows, self._ends[name])
        finally:
            wait(hashing)  # the caller may change the rows now
        for hashed in hashing:
            hashed.result()
        self._digests.update(digests)
        for name, rows in maps.items():
            self._ends[name] += rows.nbytes

    def keep(self) -> ShardSummary:
        """Put what is written so far on the disk, and say what that is.

        Raises OSError, also after it has done so before.

        REST does not include what `finish` writes, so a kill during `finish` loses no row.
        """
        self._sync()
        return ShardSummary(self.partial.name, self.layout.size, self._hashes(self._written_by_finish()))

    def make_room(self) -> None:
        """Give the disk back what was reserved."""
        os.ftruncate(self._descriptor, self.layout.size)

    def take_up(self, source: int, num_bytes: Mapping[str, int], hashed: Mapping[str, int], kept: ShardSummary) -> bool:
        """Take over rows that are on the disk, in this file or in another that they are copied from.

        Returns whether they are what was `kept`. `source` is the descriptor. `num_bytes` are wanted of each stage, and
        the hashes are of the first `hashed` bytes.
        """
        stages = {name: self.layout.arrays[name] for name in self._digests}
        if kept.bytes != self.layout.size:
            return False
        is_copied = source != self._descriptor
        for name, array in stages.items():
            digest, end = xxhash.xxh3_128(), array.offset + hashed[name]
            self._ends[name] = array.offset + num_bytes[name]
            for begin, content in _pieces(source, array.offset, self._ends[name]):
                digest.update(content)
                if is_copied:
                    write_all(self._descriptor, memoryview(content), begin)
            self._digests[name] = digest.copy()
            for _, content in _pieces(source, self._ends[name], end):
                digest.update(content)
            if digest.hexdigest() != kept.hashes[name]:
                return False
        return is_copied or hash_rest(source, kept.bytes, self._written_by_finish()) == kept.hashes[REST]

    def finish(self, beside: Mapping[str, np.ndarray]) -> ShardSummary:
        """Write the arrays that are no stages. Afterwards everything except the name is on the disk."""
        layout = self.layout
        assert all(self._ends[name] == layout.arrays[name].end for name in self._digests)  # every row, and nothing else
        for name, content in beside.items():
            write_all(self._descriptor, content.data.cast("B"), layout.arrays[name].offset)
        self.make_room()
        write_all(self._descriptor, memoryview(layout.header), 0)  # comes last, because it makes the file readable
        self._sync()
        return ShardSummary(self.final.name, layout.size, self._hashes(self._stages()))

    def _sync(self) -> None:
        if self._is_lost or self._descriptor < 0:  # or if the file was left
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        try:
            os.fsync(self._descriptor)
        except OSError:
            self._is_lost = True
            raise

    def _hashes(self, but: Sequence[Array]) -> dict[str, str]:
        """Return the hashes of the rows of each stage, and of everything outside `but`."""
        hashes = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return {**hashes, REST: hash_rest(self._descriptor, self.layout.size, but)}

    def _stages(self) -> list[Array]:
        return [self.layout.arrays[name] for name in self._digests]

    def _written_by_finish(self) -> list[Array]:
        """Return what `write` and `finish` write: every array, and the header if the format writes it last."""
        return [*self.layout.arrays.values(), Array("uint8", (len(self.layout.header),), 0)]

    def publish(self) -> None:
        """Give the file its name, which no committed shard has, as the caller knows. The name is then on the disk."""
        publish(self.partial, self.final, replace=state_at(self.final, follow_links=False) is not None)
        self.close()

    def abort(self) -> None:
        """Remove the partial file, unless it has got its name or was left."""
        if self._descriptor >= 0:
            self.partial.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the file: what is there stays for whoever resumes it."""
        self._hasher.shutdown()
        self._file.close()
        self._descriptor = -1  # the number may soon be another file's


def _pieces(descriptor: int, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes of a file from one place to another as (place, bytes); fewer if the file ends before."""
    while begin < end and (content := os.pread(descriptor, min(end - begin, PIECE_BYTES), begin)):
        yield begin, content
        begin += len(content)


def hash_rest(descriptor: int, size: int, arrays: Sequence[Array]) -> str:
    """Return the xxh3-128 of the bytes of a file that lie outside the given arrays, in file order."""
    digest, position = xxhash.xxh3_128(), 0
    spans = sorted((array.offset, array.end) for array in arrays)
    for begin, end in [*spans, (size, size)]:
        for place, content in _pieces(descriptor, position, begin):
            digest.update(content)
            position = place + len(content)
        if position < begin:
            raise EOFError("cut short while it was read")
        position = max(position, end)
    return digest.hexdigest()
