"""Check which cores and memory may be used, and how the C library keeps memory."""

import os
import platform
import resource
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

import featcli
from conftest import IS_THERE
from featcli.run import pipeline
from featcli.system.device import resolve_device, settled_arithmetic
from featcli.system.machine import available_cores, available_memory


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def system(root, groups, files):
    """Make a file system as Linux shows it: /proc/self/cgroup, and files of control groups."""
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
    """A container's share of the processor counts, rounded up, at whatever level above the process it is set."""
    assert available_cores(system(tmp_path, groups, files)) == expected


def test_no_control_groups(tmp_path, eight_cores):
    """Without control groups the scheduler's number of cores counts."""
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
    """The available memory is between a hundred megabytes and all that the machine has."""
    assert 1e8 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# It runs in a process of its own: after memory has run out once, glibc may take a thread's memory from another place
# for good.
WITH_KEPT_MEMORY = """
import resource
from pathlib import Path
from featcli.system.machine import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        b"x" * (100 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

before = resident()
with kept_memory():
    faults()
    print(faults(), resident() - before)
print(resident() - before)
"""
PAGES = (100 << 20) // resource.getpagesize()  # pages of what it allocates
IN_A_THREAD = """
import threading

def work():
    exec(PROGRAM, {})

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(program, environment=None):
    """Return the numbers that a program prints: pages handed out again, pages kept, pages left."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_memory_is_kept_and_given_back():
    """Large tensors inside take the memory of earlier ones, and afterwards it goes back to the system."""
    handed_out, kept, left = run(WITH_KEPT_MEMORY)
    assert handed_out < PAGES  # the memory that was there is enough
    assert kept > PAGES // 2
    assert left < PAGES // 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_memory_is_kept_in_workers_of_ray():
    """Memory is kept in Ray's workers, too, which make shards in a thread that is not the first."""
    from featcli.workers.worker import ONE_ARENA

    handed_out, *_ = run(f"PROGRAM = {WITH_KEPT_MEMORY!r}" + IN_A_THREAD, {**os.environ, **ONE_ARENA})
    assert handed_out < PAGES


@pytest.mark.parametrize(("seconds", "expected"), [(-1.0, 3), (pipeline.TIDY_SECONDS, 0)])
def test_memory_goes_back_now_and_then(tmp_path, photos, monkeypatch, seconds, expected):
    """Memory goes back after some time, and not with every shard, because it has to be handed out again."""
    given_back = []
    monkeypatch.setattr(pipeline, "give_memory_back", lambda: given_back.append(1))
    monkeypatch.setattr(pipeline, "TIDY_SECONDS", seconds)
    options = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 4}
    featcli.extract(photos, output=tmp_path / "d", **options)
    assert len(given_back) == expected


def test_the_current_gpu(monkeypatch):
    """While a network runs on a GPU, that GPU is the current one; on a CPU nothing changes."""
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(str(device)) or nullcontext())
    for device in ("cuda:1", "cpu"):
        with settled_arithmetic(1, torch.device(device)):
            assert torch.get_num_threads() == 1
    assert current == ["cuda:1", "-1"]


def test_tests_see_no_gpu():
    """A GPU of this machine is hidden from tests and their processes, so that --device auto is the CPU in them."""
    assert torch.cuda.is_available is not IS_THERE
    assert str(resolve_device("auto").value) == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
