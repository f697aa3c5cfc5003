"""Measure the memory of runs of 20,000 and of 2,000 images, and how long the command line takes to answer.

Memory is the peak resident memory of `featcli extract` in a process of its own, with pooled maps of a small network,
and with whole maps in many shards. Times are those of `featcli --help` against `import typer`, and of `featcli inspect
resnet50` against the imports that it needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from host import described
from photographs import SMALL, draw

IMPORTS = "from featcli.backbones.torchvision_operators import declare_missing_operators as d; d(); import timm"


def peak(command):
    """Return the most mebibytes that a command had in memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss / 1024


def seconds(command):
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def memory(pictures, scratch, counts, options):
    """Print the peak for each number of images, which are links to the same few pictures."""
    print(" ".join(options), flush=True)
    files = sorted(pictures.iterdir())
    found = []
    for count in counts:
        folder = scratch / str(count)
        if not folder.exists():
            folder.mkdir()
            for i in range(count):
                (folder / f"{i:05d}.jpg").symlink_to(files[i % len(files)])
        dump = scratch / "dump"
        command = [sys.executable, "-m", "featcli", "extract", folder, "-c", "test_resnet", "--random-init"]
        found.append(peak([*map(str, command), *options, "-o", str(dump), "-q"]))
        shutil.rmtree(dump)
        print(f"{count:>7,} images: {found[-1]:.0f} MiB at most", flush=True)
    print(f"difference: {found[-1] - found[0]:.0f} MiB")


def start(rounds):
    """Print how long the command line takes to answer, as ratios."""
    python = sys.executable
    pairs = {
        "featcli --help / import typer": (["-m", "featcli", "--help"], ["-c", "import typer"]),
        "featcli inspect resnet50 / its imports": (["-m", "featcli", "inspect", "resnet50"], ["-c", IMPORTS]),
    }
    for name, (ours, bare) in pairs.items():
        found = [(seconds([python, *ours]), seconds([python, *bare])) for _ in range(rounds)]
        ratio = statistics.median(one for one, _ in found) / statistics.median(other for _, other in found)
        print(f"{name}: {ratio:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(2000, 20000))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    print(described(), flush=True)
    start(chosen.rounds)
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(chosen.pictures or Path(folder) / "pictures", 1000, SMALL).resolve()
        memory(pictures, Path(folder), chosen.images, ["--pool", "avg"])
        memory(pictures, Path(folder), chosen.images, ["--shard-size", "100"])


if __name__ == "__main__":
    main()
