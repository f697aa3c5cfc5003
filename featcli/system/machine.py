"""The cores and the memory that this process may use, and how the C library keeps the latter."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

# Threads of the backbone that wait for one another sleep instead of spinning: decoding can use their core. It is read
# when torch is loaded.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, which containers and job schedulers make fewer than the machine has.

    They do so by affinity, or by a quota of time for a control group (cpu.max, or cpu.cfs_quota_us of version 1).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [
        math.ceil(quota / period)
        for folder in _groups(root, "cpu")
        for quota, period in (*_numbers(folder, "cpu.max"), *_numbers(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us"))
        if quota > 0 < period
    ]
    return max(1, min([cores, *quotas]))


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that may be taken without pushing anything out: of the machine, and of the control group."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    limits = [
        limit - used
        for folder in _groups(root, "memory")
        for limit, used in (
            *_numbers(folder, "memory.max", "memory.current"),
            *_numbers(folder, "memory.limit_in_bytes", "memory.usage_in_bytes"),
        )
    ]
    return max(0, min([free, *limits]))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folder of this process's control group, and of those above it, in version 2 and in version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = mount / path.lstrip("/")
        for folder in (inside, *inside.parents):  # a container may see itself at the top, whatever its path says
            if folder.is_relative_to(mount):
                yield folder


def _numbers(folder: Path, *names: str) -> Iterator[tuple[int, int]]:
    """The two numbers in these files, where they are there; no limit is no number, or below zero."""
    with suppress(OSError, ValueError):
        one, other = map(int, " ".join((folder / name).read_text() for name in names).split())
        yield one, other


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library keep the memory of large tensors for the next ones instead of giving it back each time.

    The system clears every page that it hands out: a ResNet-50 on a CPU spends a third of its time on that.
    Only where the library is glibc (mallopt(3)); elsewhere, and for tensors of other devices, nothing changes. In other
    threads than the first glibc keeps nothing above 64 MiB, unless MALLOC_ARENA_MAX=1 when the process starts.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # the default; of the others, what they grow to by themselves
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def give_memory_back() -> None:
    """Give back what is kept and free, which other sizes of images and maps than those to come may have left."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library with these functions; None if it is another."""
    import ctypes  # for this alone, and every command imports this module

    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError, TypeError):
        return None
