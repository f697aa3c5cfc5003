"""Describe the machine of a benchmark in the line that each prints first."""

import platform
from contextlib import suppress
from pathlib import Path

import torch

from featcli.system.machine import available_cores


def described() -> str:
    """Return cores, processor, instructions, and torch."""
    name = platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{available_cores()} cores, {name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
