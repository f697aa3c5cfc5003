"""Files by their descriptors: only regular ones are read."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

LEASE_SECONDS = 90.0  # twice as long as Linux lets a server keep a file to itself that somebody else opens
LEASE_PAUSE = 0.02


def open_regular(path: str | os.PathLike[str]) -> int:
    """Return a descriptor to read from. Raises OSError, and ValueError for what is no regular file.

    A pipe would wait for ever, a device never end.
    """
    descriptor = _opened_at_once(path)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def _opened_at_once(path: str | os.PathLike[str]) -> int:
    """Open without waiting for a writer, as a pipe would; only a file server is waited for that holds a lease."""
    patience = time.monotonic() + LEASE_SECONDS
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except BlockingIOError:  # Samba or NFS has been told to give the file up
            if time.monotonic() > patience:
                raise
            time.sleep(LEASE_PAUSE)


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a file. Raises OSError, and ValueError for one of more than `most` bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        raw = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)  # memory is taken for as many as are asked for
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return raw
