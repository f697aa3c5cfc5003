"""Who may write into a folder: locks on the folder itself, which go with the process, however that ends.

Where a file system knows no locks, everybody may; what then keeps two processes apart is that names are given once.
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

PATIENCE = 30.0  # seconds that somebody else may take to lay out a plan
STEP = 0.05


class FolderLock:
    """A lock on a folder, held until it is closed: by any number of processes together, or by one alone.

    Raises MachineError where the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.is_real = True  # until the file system says otherwise
        self._descriptor = _opened(folder)

    @property
    def descriptor(self) -> int:
        """Of the folder: a process that is given it holds the lock too, until it ends."""
        return self._descriptor

    def alone(self) -> bool:
        """Hold it alone; False where another process holds it."""
        return self._take(fcntl.LOCK_EX)

    def together(self) -> bool:
        """Hold it with others; False where one that holds it alone does not let go in time."""
        until = time.monotonic() + PATIENCE
        while not self._take(fcntl.LOCK_SH):
            if time.monotonic() > until:
                return False
            time.sleep(STEP)
        return True

    def beside(self) -> None:
        """Hold it with others where that can be done at once."""
        self._take(fcntl.LOCK_SH)

    def _take(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                return False
            self.is_real = False  # NFS, for one, locks no folders
        return True

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[bool]:
    """Wait until no other process is inside such a block for this folder; for a block that takes no time.

    Gives False where the file system locks no folders, and nobody waits.
    """
    descriptor, is_real = _opened(folder), False
    try:
        with suppress(OSError):  # as above: no locks there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_real = True
        yield is_real
    finally:
        os.close(descriptor)


def _opened(folder: Path) -> int:
    with machine_errors("folder", folder, strict=True):
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
