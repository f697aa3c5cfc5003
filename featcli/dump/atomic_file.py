"""Give a finished file its name: complete, durable, and never over another one.

The order makes it safe. Data is on the disk before the name exists, because a power cut could otherwise leave the name
on an empty file. The name is on the disk before anything relies on it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from featcli.errors import MachineError, shown
from featcli.system.faults import RESUMES
from featcli.system.files import is_there, names_in

PARTIAL = ".partial"
PARTIAL_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.partial", re.DOTALL)  # as create_partial names it
# File systems without hard links say so with one of these errors.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
FULL = (errno.ENOSPC, errno.EDQUOT)


def create_partial(final: Path) -> tuple[int, Path]:
    """Create a new, empty, locked file beside `final`. Returns (file descriptor, path).

    The lock says that the writer lives. It ends with the process in any case, so `remove_stale` can tell dead writers
    from living ones without clocks or process numbers. The lock is shared, because the file still has it for a moment
    under its final name, and HDF5 opens no file that another process locks exclusively.
    """
    while True:
        path = final.with_name(f".{final.name}.{secrets.token_hex(8)}{PARTIAL}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # a cleaner was faster, and is about to remove the file
            taken = True
        except OSError:  # the file system has no locks, so nobody cleans up there either
            pass
        if not taken and _names(path, descriptor):
            return descriptor, path
        os.close(descriptor)


def take_partial(path: Path) -> tuple[int, bool] | None:
    """Open a partial file whose writer is dead, and lock it as `create_partial` does.

    Returns (file descriptor, whether it is locked). On a file system without locks nobody can tell whether the writer
    lives. Returns None if it lives, if another process was faster, and if there is no such file. A file that another
    user allows only to be read is opened for reading.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | flags)
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:
        return None
    is_locked, is_free = True, True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if anybody holds it
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails if somebody was faster in between
    except BlockingIOError:
        is_free = False
    except OSError:
        is_locked = False
    if is_free and _names(path, descriptor):
        return descriptor, is_locked
    os.close(descriptor)
    return None


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_stale(folder: Path, final: str = "", keep: Container[str] = ()) -> int:
    """Remove the partial files whose writers are dead, only those of `final` if it is given.

    Returns how many there were.

    `keep` are names of partial files that somebody can still use.
    """
    removed = 0
    for name in names_in(folder):
        path, named = folder / name, PARTIAL_NAME.fullmatch(name)
        if named is None or final not in ("", named[1]) or name in keep:
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another process removed it, or it belongs to another user
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed += 1
        except OSError:
            continue  # its writer lives
        finally:
            os.close(descriptor)
    return removed


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of `content` at `offset`, in several writes if the system takes less at a time."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def publish(partial: Path, final: Path, replace: bool = False) -> bool:
    """Give a partial file that is already on the disk its final name, unless that name is taken.

    Returns whether the name was free. The partial name is gone afterwards in either case. With `replace`, the name is
    taken over at once from whatever had it.
    """
    if replace:
        os.replace(partial, final)
        partial.unlink(missing_ok=True)  # it stays if both are names of one file
        sync_folder(final.parent)
        return True
    try:
        os.link(partial, final)
        free = True
    except FileExistsError:
        free = False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        free = not is_there(final)
        if free:
            os.rename(partial, final)
    partial.unlink(missing_ok=True)
    sync_folder(final.parent)
    return free


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this for folders
            raise
    finally:
        os.close(descriptor)


def publish_lines(final: Path, lines: Iterable[bytes], replace: bool = False, unless: Path | None = None) -> bool:
    """Write a file and publish it. Returns whether the name was free, and `unless` is not there by then."""
    descriptor, partial = create_partial(final)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            if unless is not None and is_there(unless):
                return False
            return publish(partial, final, replace)  # inside the block, because the lock ends when the file is closed
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, what: str = "dump") -> Iterator[None]:
    """Turn an error of the disk inside the block into one line that says what to do."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads our output has stopped, which is no error of the disk
    except OSError as error:
        full = error.errno in FULL
        cause = "no space left" if full else os.strerror(error.errno) if error.errno else str(error)
        todo = "free some space" if full else "raise ulimit -f" if error.errno == errno.EFBIG else "check the disk"
        if what == "dump":
            todo += f"; {RESUMES}"
        raise MachineError(f"{what} {shown(path)}: {cause}", todo) from error
