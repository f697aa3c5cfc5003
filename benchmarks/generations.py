"""Open, read and verify a dump of many generations, in turn with one dump that has as many shards. Medians of rounds.

The maps are numbers that nobody computed. All files are in memory, unless --cold says otherwise. Verifying is timed as
a function and as the command.
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
from dataclasses import replace
from pathlib import Path

import numpy as np
from host import described
from photographs import SMALL, draw
from shards import SINGLE, STAGE, make

import featcli
from featcli.dump import shard
from featcli.dump.folder import Dump
from featcli.dump.formats import FORMATS
from featcli.dump.generations import commit, folder_of
from featcli.dump.plan import Extends
from featcli.dump.verify import verify


def make_grown(like, path, keys, count, rows, side):
    """Make a dump of so many generations beside the first, all with as many images."""
    each, name = len(keys) // (count + 1), like.settings.format
    for number in range(count + 1):
        own, folder = keys[number * each : (number + 1) * each], folder_of(path, number) if number else path
        if number:
            root = Dump.at(path)
            own_plan = replace(like, extends=Extends(root.plan.fingerprint, number, number * each))
            make(own_plan, folder, name, own, rows, side)
            commit(root, Dump.at(folder))
        else:
            make(like, folder, name, own, rows, side)


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def forget(folder):
    """Let the system forget what it has in memory of these files, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(path, rounds, is_cold):
    """Return the median seconds of opening, a random row, and verifying, each for one dump and for one that grew."""
    names = ("one", "grown")
    maps = {name: featcli.open_dump(path / name)[STAGE] for name in names}
    count = len(maps["one"])
    for one in maps.values():  # puts files into memory, and makes every layout known
        for row in range(count):
            one[row]
    found = {(what, name): [] for what in ("open", "row", "verify", "command") for name in names}
    for seed in range(rounds):
        order = np.random.default_rng(seed).permutation(count).tolist()
        rows = (order * -(-SINGLE // count))[:SINGLE]
        for name in names if seed % 2 else reversed(names):
            one, folder = maps[name].__getitem__, path / name
            found["open", name].append(seconds_of(lambda folder=folder: featcli.open_dump(folder).close()))
            taken = seconds_of(lambda one=one, rows=rows: [one(row) is None for row in rows])
            found["row", name].append(taken / SINGLE)
            command = [Path(sys.executable).with_name("featcli"), "verify", folder]
            works = {
                "verify": lambda folder=folder: verify(folder),
                "command": lambda command=command: subprocess.run(command, check=True, capture_output=True),
            }
            for what, work in works.items():
                if is_cold:
                    forget(folder)
                found[what, name].append(seconds_of(work))
    return {key: statistics.median(times) for key, times in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kilobytes", type=int, default=100, help="of a map")
    parser.add_argument("--generations", type=int, nargs="+", default=[10, 100], help="beside the first")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 5], help="of each")
    parser.add_argument("--rows", type=int, default=50, help="of a shard")
    parser.add_argument("--cold", action="store_true", help="verify reads from the disk; TMPDIR says which")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    chosen = parser.parse_args()
    os.fsync = lambda descriptor: None  # nothing of it has to outlive a power cut
    shard.LEAST = sys.maxsize  # through the page cache: files that are read into it later lie in smaller pieces
    print(
        f"{described()}, medians of {chosen.rounds}\n"
        f"{'':<49} open, ms                          a random row, us  verify, s      featcli verify, s\n"
        f"{'':<49} one / grown / a generation        one / grown       one / grown    one / grown"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pictures = draw(folder / "pictures", 2, SMALL)
        options = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 1, "layout": "channels-first"}
        featcli.extract(str(pictures), output=folder / "like", **options)
        like, side = featcli.open_dump(folder / "like").plan, round((chosen.kilobytes * 1000 / 32) ** 0.5)
        for name in chosen.formats:
            for count in chosen.generations:
                for shards in chosen.shards:
                    path = folder / f"{name} {count} {shards}"
                    rows = chosen.rows
                    keys = [f"{row:06d}.jpg" for row in range(rows * (count + 1) * shards)]
                    make(like, path / "one", name, keys, rows, side)
                    of_format = replace(like, settings=replace(like.settings, format=name))
                    make_grown(of_format, path / "grown", keys, count, rows, side)
                    os.sync()
                    median = compare(path, chosen.rounds, chosen.cold)
                    more = (median["open", "grown"] - median["open", "one"]) / count
                    ms, us = median["open", "one"] * 1e3, median["row", "one"] * 1e6
                    by = {what: median[what, "grown"] / median[what, "one"] for what in ("row", "verify", "command")}
                    shutil.rmtree(path)
                    print(
                        f"{name:<12} {count:4} generations of {shards} shards, {len(keys):6,} rows"
                        f" {ms:6.1f} {median['open', 'grown'] * 1e3:7.1f} {more * 1e3:7.2f}"
                        f" {us:20.0f} {by['row']:6.2f} {median['verify', 'one']:10.2f} {by['verify']:6.2f}"
                        f" {median['command', 'one']:8.2f} {by['command']:6.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
