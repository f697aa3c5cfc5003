"""Cores and memory that may be used, and the C library's keeping of memory."""

import os
import platform
import resource
from pathlib import Path

import pytest

from featcli.machine import available_cores, available_memory, kept_memory


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def system(root, groups, files):
    """A file system as Linux shows it: /proc/self/cgroup, and files of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, 8),
        ("0::/job\n", {"job/cpu.max": "250000 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/seen/from/outside\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/job\n", {"job/cpu.max": "1000 100000\n"}, 1),
        (
            "4:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("4:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
        ("4:memory:/job\n", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
        ("0::/job\n", {"job/cpu.max": "nonsense"}, 8),
        ("nonsense\n", {}, 8),
    ],
)
def test_quotas_of_control_groups(tmp_path, eight_cores, groups, files, expected):
    """A container's share of the processor counts, rounded up, wherever above the process it is set."""
    assert available_cores(system(tmp_path, groups, files)) == expected


def test_no_control_groups(tmp_path, eight_cores):
    """Elsewhere it is what the scheduler says."""
    assert available_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 3 << 30),
        ("0::/job\n", {"job/memory.max": "max\n", "job/memory.current": "1000\n"}, 3 << 30),
        ("0::/job\n", {"job/memory.max": "1073741824\n", "job/memory.current": "73741824\n"}, 1_000_000_000),
        ("0::/job\n", {"job/memory.max": "1000\n", "job/memory.current": "2000\n"}, 0),
        (
            "4:memory:/job\n",
            {"memory/job/memory.limit_in_bytes": "5000", "memory/job/memory.usage_in_bytes": "2000"},
            3000,
        ),
    ],
)
def test_limits_of_control_groups(tmp_path, groups, files, expected):
    """A container's share of the memory counts."""
    root = system(tmp_path, groups, files)
    (root / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 3145728 kB\n")
    assert available_memory(root) == expected


def test_memory_is_a_number_of_bytes():
    """Between a hundred megabytes and all that there is."""
    assert 1e8 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def faults(times):
    """Pages that the system had to hand out for so many tensors of 64 MiB, one after the other."""
    import torch

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    """Pages of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_memory_is_kept_and_given_back():
    """Inside, large tensors take the memory of those before; afterwards it goes back to the system."""
    pages, before = (64 << 20) // resource.getpagesize(), resident()
    with kept_memory():
        faults(20)
        assert faults(20) < pages  # what there was is enough
        assert resident() > before + pages // 2
    assert resident() < before + pages // 2
