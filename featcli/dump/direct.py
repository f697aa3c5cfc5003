"""Writes past the page cache (O_DIRECT): rows that are not read again soon need not be copied through memory.

On a CPU the copies, and the kernel's work to get them on the disk, take from the backbone what they need. Only whole
pages can go this way, and not every file system has it; all else is written as usual.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from featcli.system.files import write_all

PAGE = 4096  # address, offset and length must be multiples of the disk's block, which is never larger
LEAST = 1 << 18  # bytes of a write: the disk is waited for
# How file systems say that they have it not; EFAULT: not from the memory of this driver.
NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EFAULT)


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
