"""Measure the memory of runs of 20,000 and of 2,000 images.

This is the peak resident memory of `featcli extract` in a process of its own, with pooled maps of a small network, and
with whole maps in many shards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from host import described
from photographs import SMALL, draw


def peak(command):
    """Return the most mebibytes that a command had in memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss / 1024


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(2000, 20000))
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    print(described(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(chosen.pictures or Path(folder) / "pictures", 1000, SMALL).resolve()
        memory(pictures, Path(folder), chosen.images, ["--pool", "avg"])
        memory(pictures, Path(folder), chosen.images, ["--shard-size", "100"])


if __name__ == "__main__":
    main()
