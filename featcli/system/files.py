"""Files and folders as they are read: regular files alone, by descriptor, and never mapped into memory.

A fault under a map kills the process. A question about a path that the machine cannot answer is a MachineError here,
where `os.path` and `pathlib` would say that nothing is there.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from featcli.errors import shown
from featcli.system.faults import ABSENT, is_of_machine, machine_error, machine_errors

LEASE_SECONDS = 90.0  # twice as long as Linux lets a server keep a file to itself that somebody else opens
LEASE_PAUSE = 0.02
PIECE_BYTES = 1 << 30  # that are asked for at once: Linux gives up to 2 GiB
MOST_TEXT = 1 << 26  # bytes

AnyPath = str | os.PathLike[str]


def open_regular(path: AnyPath) -> int:
    """Return a descriptor to read from. Raises OSError, and ValueError for what is no regular file.

    A pipe would wait for ever, a device never end.
    """
    try:
        descriptor = _opened_at_once(path)
    except OSError as error:
        if is_of_machine(error) and _is_special(path):  # a socket or a device without a driver cannot be opened
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
    """Open without waiting for a writer, as a pipe would; only a file server is waited for that holds a lease."""
    patience = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except BlockingIOError:  # Samba or NFS has been told to give the file up
            if time.monotonic() > patience:
                raise
            time.sleep(LEASE_PAUSE)


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Read `count` bytes from `offset` on, fewer only where the file ends. Raises OSError."""
    content = os.pread(descriptor, min(count, PIECE_BYTES), offset)
    if len(content) == count:
        return content
    pieces = []
    while content:  # the system may give less at a time
        pieces.append(content)
        count, offset = count - len(content), offset + len(content)
        content = os.pread(descriptor, min(count, PIECE_BYTES), offset) if count else b""
    return b"".join(pieces)


def read_regular(path: AnyPath, most: int) -> bytes:
    """Read all bytes of a file. Raises OSError, and ValueError for one of more than `most` bytes."""
    descriptor = open_regular(path)
    try:  # memory is taken for as many as are asked for
        raw = read_at(descriptor, min(os.fstat(descriptor).st_size, most) + 1, 0)
    finally:
        os.close(descriptor)
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return raw


def read_fresh(path: AnyPath, offset: int, count: int) -> bytes:
    """Read bytes of a file from the disk once more, not from what the system keeps of them in memory.

    Raises OSError, and ValueError for what is no regular file.
    """
    descriptor = open_regular(path)
    try:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a favour
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return read_at(descriptor, count, offset) if count else b""
    finally:
        os.close(descriptor)


class RegularFile(io.RawIOBase):
    """A file for libraries to read. It remembers the first error of the machine, which they may well drop.

    It offers no descriptor: C code would map with it what it is to read. Raises what `open_regular` raises.
    """

    _descriptor = -1  # where the file could not be opened: Python closes the object all the same

    def __init__(self, path: AnyPath) -> None:
        super().__init__()
        self.name = os.fspath(path)
        self.fault: OSError | None = None  # without its traceback, which would keep the buffers of C code alive
        self.place_of_fault = (0, 0)  # offset and number of the bytes that were asked for
        self._position = 0
        self._descriptor = open_regular(path)

    def state(self) -> os.stat_result:
        """Ask the system about the open file. Raises OSError."""
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
        count = self.state().st_size + 1 - self._position
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
    """The same, with what was read ahead."""

    def __init__(self, path: AnyPath) -> None:
        self.regular = RegularFile(path)
        super().__init__(self.regular)


@contextmanager
def reading(path: AnyPath, what: str = "", strict: bool = False) -> Iterator[ReadFile]:
    """Open a regular file for a library to read.

    Raises MachineError for whatever the machine refused, whatever the library made of it; all else passes, also what
    `open_regular` raises. `strict`: see `machine_errors`.
    """
    with machine_errors(what, path, strict), ReadFile(path) as file:
        try:
            yield file
        finally:  # whatever was made of it
            fault = file.regular.fault
            if fault is not None and is_of_machine(fault):
                raise fault


def state_at(path: AnyPath, follow_links: bool = True) -> os.stat_result | None:
    """What the system says of a path, None where nothing is there. Raises MachineError where it cannot tell."""
    try:
        return os.stat(path, follow_symlinks=follow_links)
    except ValueError:  # what no file can be named
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise machine_error(shown(path), error) from error


def is_there(path: AnyPath) -> bool:
    """Whether anything is there, a link that leads nowhere left out. Raises MachineError where nobody can tell."""
    return state_at(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Whether a folder is there. Raises MachineError where nobody can tell."""
    found = state_at(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: AnyPath) -> bool:
    """Whether a regular file is there. Raises MachineError where nobody can tell."""
    found = state_at(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_link(path: AnyPath) -> bool:
    """Whether a link is there, wherever it leads. Raises MachineError where nobody can tell."""
    found = state_at(path, follow_links=False)
    return found is not None and stat.S_ISLNK(found.st_mode)


def names_in(folder: AnyPath) -> list[str]:
    """The names in a folder, none where there is no such folder. Raises MachineError where they cannot be listed."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise machine_error(f"folder {shown(folder)}", error) from error


def allocated_bytes(path: AnyPath) -> int:
    """Bytes of the disk that a file takes: less than its size where parts were not written; 0 where there is none."""
    found = state_at(path, follow_links=False)
    return 0 if found is None else min(found.st_size, 512 * found.st_blocks)


def bytes_at(path: AnyPath) -> int:
    """How large a file is, or the files in a folder are. Raises MachineError where nobody can tell."""
    paths = [os.path.join(path, name) for name in names_in(path)] if is_folder(path) else [path]
    return sum(found.st_size for found in map(state_at, paths) if found is not None)


def identity(path: AnyPath) -> tuple[int, int] | None:
    """Device and inode of what is at a path: a mount that goes away leaves another folder there. None for nothing."""
    found = state_at(path)
    return None if found is None else (found.st_dev, found.st_ino)


def read_text(path: Path) -> str:
    """Read a small file in UTF-8. Raises MachineError, OSError and ValueError."""
    with machine_errors("file", path):
        return read_regular(path, MOST_TEXT).decode("utf-8")
