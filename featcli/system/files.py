"""Files by their descriptors: only regular ones are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor to read from. Raises OSError, and ValueError for what is no regular file.

    A pipe would wait for ever, a device never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a file. Raises OSError, and ValueError for one of more than `most` bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        raw = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)  # memory is taken for as many as are asked for
    if len(raw) > most:
        raise ValueError(f"larger than {most} bytes")
    return raw
