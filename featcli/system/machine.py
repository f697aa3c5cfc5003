"""Find the cores and the memory that this process may use, and decide how the C library keeps memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

# Threads of the backbone that wait for each other sleep instead of spinning, so that decoding can use their core. torch
# reads this when it is loaded.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # numbers from malloc.h


def available_cores(root: Path = Path("/")) -> int:
    """Return the cores that this process may use. Containers and job schedulers allow fewer than the machine has.

    They limit them by affinity, or by a quota of time for a control group (cpu.max, or cpu.cfs_quota_us in version 1).
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
    """Return the bytes that can be taken without pushing anything out, within the machine and the control group."""
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
    """Yield the folder of this process's control group and those above it, in version 2 and in version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:  # the system is no Linux
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = mount / path.lstrip("/")
        for folder in (inside, *inside.parents):  # a container may see its group at the top, whatever its path says
            if folder.is_relative_to(mount):
                yield folder


def _numbers(folder: Path, *names: str) -> Iterator[tuple[int, int]]:
    """Yield the two numbers in these files, if they exist.

    A group without limit has no number there, or a negative one.
    """
    with suppress(OSError, ValueError):
        one, other = map(int, " ".join((folder / name).read_text() for name in names).split())
        yield one, other


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library keep the memory of large tensors for the next ones instead of giving it back each time.

    The system clears every page that it hands out, which takes a third of the time of a ResNet-50 on a CPU. This works
    only with glibc (mallopt(3)), and only for tensors of the CPU. In all threads but the first, glibc keeps nothing
    above 64 MiB, unless the process was started with MALLOC_ARENA_MAX=1.
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
        libc.mallopt(M_MMAP_MAX, 65536)  # the default; the other two get the values that they grow to by themselves
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def give_memory_back() -> None:
    """Give back free memory that was kept: the sizes of images and maps to come may be others."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library if it has these functions, else None."""
    import ctypes  # imported late, because every command imports this module

    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError, TypeError):
        return None
