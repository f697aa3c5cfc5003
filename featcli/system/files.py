"""Read files and folders: only regular files, by descriptor, never mapped into memory.

A read error under a memory map kills the process. If the machine cannot say what is at a path, these functions raise
MachineError; `os.path` and `pathlib` would say that nothing is there.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from featcli.errors import shown
from featcli.system.faults import ABSENT, is_of_machine, machine_error, machine_errors

LEASE_SECONDS = 90.0  # twice the time that Linux lets a file server keep a file that somebody else opens
LEASE_PAUSE = 0.02
PIECE_BYTES = 1 << 30  # asked for at once: Linux gives at most 2 GiB
MOST_TEXT = 1 << 26  # bytes
MOST_SPOOLED = 1 << 26  # bytes that stay in memory

AnyPath = str | os.PathLike[str]


def open_regular(path: AnyPath) -> int:
    """Return a descriptor for reading. Raises OSError, and ValueError for anything but a regular file.

    A read from a pipe could wait for ever, and one from a device never end.
    """
    try:
        descriptor = _opened_at_once(path)
    except OSError as error:
        if is_of_machine(error) and _is_special(path):  # the system cannot open a socket, or a device without a driver
            raise ValueError("not a regular file") from error
        raise
    try:
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    if not is_regular:
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def _is_special(path: AnyPath) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode))


def _opened_at_once(path: AnyPath) -> int:
    """Open without waiting for the writer of a pipe. Only a file server that holds a lease is waited for."""
    patience = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except BlockingIOError:  # Samba or NFS was asked to give the file up
            if time.monotonic() > patience:
                raise
            time.sleep(LEASE_PAUSE)


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Return `count` bytes from `offset` on, or fewer if the file ends before. Raises OSError."""
    content = os.pread(descriptor, min(count, PIECE_BYTES), offset)
    if len(content) == count:
        return content
    pieces = []
    while content:  # the system may return fewer bytes at a time
        pieces.append(content)
        count, offset = count - len(content), offset + len(content)
        content = os.pread(descriptor, min(count, PIECE_BYTES), offset) if count else b""
    return b"".join(pieces)


def read_regular(path: AnyPath, most: int) -> bytes:
    """Return all bytes of a file. Raises OSError, and ValueError for a file of more than `most` bytes."""
    descriptor = open_regular(path)
    try:  # a read takes memory for as many bytes as it asks for
        raw = read_at(descriptor, min(os.fstat(descriptor).st_size, most) + 1, 0)
    finally:
        os.close(descriptor)
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return raw


def read_start(path: AnyPath, count: int) -> bytes:
    """Return the first bytes of a file. Raises OSError, and ValueError for anything but a regular file."""
    descriptor = open_regular(path)
    try:
        return read_at(descriptor, count, 0)
    finally:
        os.close(descriptor)


def read_fresh(path: AnyPath, offset: int, count: int) -> bytes:
    """Read bytes of a file from the disk again, instead of from the system's cache.

    Raises OSError, and ValueError for anything but a regular file.
    """
    descriptor = open_regular(path)
    try:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a refusal only means that the cache is read
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return read_at(descriptor, count, offset) if count else b""
    finally:
        os.close(descriptor)


class RegularFile(io.RawIOBase):
    """A file for libraries to read. It remembers the first error of the machine, because libraries may drop it.

    It has no descriptor, because C code would map the file with one. Raises what `open_regular` raises.
    """

    _descriptor = -1  # stays so if the file cannot be opened; Python closes the object in that case, too

    def __init__(self, path: AnyPath) -> None:
        super().__init__()
        self.name = os.fspath(path)
        self.fault: OSError | None = None  # without its traceback, which would keep buffers of C code alive
        self.place_of_fault = (0, 0)  # offset and number of the bytes that were asked for
        self._position = 0
        self._descriptor = open_regular(path)

    def state(self) -> os.stat_result:
        """Return what the system says about the open file. Raises OSError."""
        try:
            return os.fstat(self._descriptor)
        except OSError as error:
            self.fault = self.fault or OSError(*error.args)
            raise

    def readable(self) -> bool:
        """See io.IOBase."""
        return True

    def seekable(self) -> bool:
        """See io.IOBase."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase."""
        ends = self.state().st_size if whence == os.SEEK_END else 0
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: ends}[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def tell(self) -> int:
        """See io.IOBase."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        view = memoryview(buffer).cast("B")
        try:
            received = os.preadv(self._descriptor, [view[:PIECE_BYTES]], self._position) if view else 0
        except OSError as error:
            if self.fault is None:
                self.fault, self.place_of_fault = OSError(*error.args), (self._position, len(view))
            raise
        self._position += received
        return received

    def readall(self) -> bytes:
        """See io.RawIOBase."""
        return self.read_next(self.state().st_size + 1 - self._position)

    def read_next(self, count: int) -> bytes:
        """Return the next bytes, or fewer if the file ends before. Raises OSError."""
        try:
            content = read_at(self._descriptor, count, self._position) if count > 0 else b""
        except OSError as error:
            if self.fault is None:
                self.fault, self.place_of_fault = OSError(*error.args), (self._position, count)
            raise
        self._position += len(content)
        return content

    def close(self) -> None:
        """See io.IOBase."""
        if not self.closed and self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
        super().close()


class ReadFile(io.BufferedReader):
    """A RegularFile that reads ahead."""

    def __init__(self, path: AnyPath) -> None:
        self.regular = RegularFile(path)
        super().__init__(self.regular)


class Spooled(tempfile.SpooledTemporaryFile[bytes]):
    """A file without a name for what has to be read again. It is in memory while it is small."""

    def __init__(self) -> None:
        super().__init__(MOST_SPOOLED)

    def __del__(self) -> None:
        self.close()


@contextmanager
def reading(path: AnyPath, what: str = "", strict: bool = False) -> Iterator[ReadFile]:
    """Open a regular file for a library to read.

    Raises MachineError for any error of the machine, whatever the library made of it. Other errors pass, also those of
    `open_regular`. For `strict` see `machine_errors`.
    """
    with machine_errors(what, path, strict), ReadFile(path) as file:
        try:
            yield file
        finally:  # an error of the machine comes before whatever was made of it
            fault = file.regular.fault
            if fault is not None and (strict or is_of_machine(fault)):
                raise fault


def state_at(path: AnyPath, follow_links: bool = True) -> os.stat_result | None:
    """Return what the system says about a path, or None if nothing is there. Raises MachineError if it cannot tell."""
    try:
        return os.stat(path, follow_symlinks=follow_links)
    except ValueError:  # no file can have such a name
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise machine_error(shown(path), error) from error


def is_there(path: AnyPath) -> bool:
    """Return whether something is there; a link that leads nowhere does not count.

    Raises MachineError if nobody can tell.
    """
    return state_at(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Return whether a folder is there. Raises MachineError if nobody can tell."""
    found = state_at(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: AnyPath) -> bool:
    """Return whether a regular file is there. Raises MachineError if nobody can tell."""
    found = state_at(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_link(path: AnyPath) -> bool:
    """Return whether a link is there, wherever it leads. Raises MachineError if nobody can tell."""
    found = state_at(path, follow_links=False)
    return found is not None and stat.S_ISLNK(found.st_mode)


def names_in(folder: AnyPath) -> list[str]:
    """Return the names in a folder; none if there is no such folder. Raises MachineError if they cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise machine_error(f"folder {shown(folder)}", error) from error


def allocated_bytes(path: AnyPath) -> int:
    """Return the bytes that a file takes on the disk, fewer than its size if parts are not written; 0 if it is gone."""
    found = state_at(path, follow_links=False)
    return 0 if found is None else min(found.st_size, 512 * found.st_blocks)


def bytes_at(path: AnyPath) -> int:
    """Return the bytes of a file, or of all files in a folder. Raises MachineError if nobody can tell."""
    paths = [os.path.join(path, name) for name in names_in(path)] if is_folder(path) else [path]
    return sum(found.st_size for found in map(state_at, paths) if found is not None)


def identity(path: AnyPath) -> tuple[int, int] | None:
    """Return device and inode of what is at a path, or None. After an unmount another folder is at the same path."""
    found = state_at(path)
    return None if found is None else (found.st_dev, found.st_ino)


def read_text(path: Path) -> str:
    """Return a small UTF-8 file as text. Raises MachineError, OSError and ValueError."""
    with machine_errors("file", path):
        return read_regular(path, MOST_TEXT).decode("utf-8")
