"""Compare several processes with one, on the cores of this machine: images per second, from first image to manifest.

Ways run in turn, and numbers are medians of several rounds: one process with a thread for each core, `--device cpu,cpu`
with a thread each, and with `--ray` two workers of a Ray. Each runs in both layouts, and the better one is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from photographs import SMALL, draw

LAYOUTS = {"channels-first": ["--no-fold"], "channels-last": ["--fold"]}


def rate(command, target):
    """Return images per second of a run, without its start."""
    done = subprocess.run(
        [sys.executable, "-m", "featcli", "extract", *command, "-o", target, "--json", "-q"],
        capture_output=True,
        text=True,
        check=True,
    )
    end = json.loads(done.stdout.splitlines()[-1])
    return end["extracted"] / end["pace"]["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways = {
        "one process": ["--threads", str(cores)],
        "a process for each core": ["--threads", "1", "--device", ",".join(["cpu"] * cores)],
    }
    if chosen.ray:
        ways["Ray"] = ["--threads", "1", "--engine", "ray", "--workers", str(cores)]
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(chosen.pictures or Path(folder) / "pictures", chosen.images, SMALL)
        names = Path(folder) / "names"
        names.write_text("\n".join(map(str, sorted(pictures.iterdir())[: chosen.images])))
        command = ["--files-from", names, "--allow-outside", "-c", chosen.model, "--random-init", "--shard-size", "100"]
        found = {way: {layout: [] for layout in LAYOUTS} for way in ways}
        for turn in range(chosen.rounds):
            for layout, options in LAYOUTS.items():
                for way, threads in ways.items():
                    target = Path(folder) / f"{turn}{layout}{way}".replace(" ", "")
                    found[way][layout].append(rate([*command, *threads, "--layout", layout, *options], target))
    best = {way: max(statistics.median(rates) for rates in of_way.values()) for way, of_way in found.items()}
    print(
        f"{cores} cores, {chosen.model}, {chosen.images} images, medians of {chosen.rounds}, the better of both layouts"
    )
    for way, images in best.items():
        print(f"{way:<24} {images:7.1f} images/s, {images / best['one process']:.2f} of one process")


if __name__ == "__main__":
    main()
