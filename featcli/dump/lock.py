"""Decide who may write into a folder, by locks on the folder itself. They end with the process in any case.

On a file system without locks everybody may write. Two processes are then kept apart because a name is given only once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from featcli.system.faults import machine_errors

PATIENCE = 30.0  # seconds that another process may take to lay out a plan
STEP = 0.05


class FolderLock:
    """A lock on a folder, held until it is closed, by any number of processes together or by one alone.

    Raises MachineError if the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.is_real = True  # until the file system refuses
        self._descriptor = _opened(folder)

    @property
    def descriptor(self) -> int:
        """The descriptor of the folder. A process that gets it holds the lock, too, until it ends."""
        return self._descriptor

    def alone(self) -> bool:
        """Hold it alone. Returns False if another process holds it."""
        return self._take(fcntl.LOCK_EX)

    def together(self) -> bool:
        """Hold it with others. Returns False if a process that holds it alone does not release it in time."""
        until = time.monotonic() + PATIENCE
        while not self._take(fcntl.LOCK_SH):
            if time.monotonic() > until:
                return False
            time.sleep(STEP)
        return True

    def beside(self) -> None:
        """Hold it with others if that is possible at once."""
        self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return False
            self.is_real = False  # NFS, for example, locks no folders
        return True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine holds a lock on the folder now.

    The kernel's list is read, if there is one: to take a lock only for a look could get in the way of a process that
    begins. The list has no locks of other machines, or of containers beside this one.
    """
    with suppress(OSError, ValueError, LookupError):
        descriptor = _opened(folder)
        try:
            known = dict(line.split(":\t") for line in _lines(f"/proc/self/fdinfo/{descriptor}") if ":\t" in line)
        finally:
            os.close(descriptor)
        mounts = (line.split() for line in _lines("/proc/self/mountinfo"))
        major, minor = next((one[2] for one in mounts if one[0] == known["mnt_id"]), "").split(":")
        name = f"{int(major):02x}:{int(minor):02x}:{int(known['ino'])}"  # stat gives other numbers on some file systems
        return any(line.split()[1:2] == ["FLOCK"] and name in line.split() for line in _lines("/proc/locks"))
    return False


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[bool]:
    """Wait until no other process is inside such a block for this folder. The block must take no time.

    Yields False if the file system locks no folders, so that nobody waits.
    """
    descriptor, is_real = _opened(folder), False
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_real = True
        yield is_real
    finally:
        os.close(descriptor)


def _opened(folder: Path) -> int:
    with machine_errors("folder", folder, strict=True):
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
