"""Measure what it costs to keep the rows of an unfinished shard, and how long it takes to resume one.

`cost` runs one extraction in turn with and without. Processor time is user and kernel of the whole process, and beside
it that of the keeping alone, as the writer thread spends it. `--seconds` stands for the minute: if it is shorter, rows
are kept that much more often, and the share of a minute is computed from what one keeping takes. `resume` lays out a
shard of one gigabyte of which so much is done, reads it back and hashes it; cold is with its pages dropped from memory.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from host import described
from photographs import SMALL, draw

STORED = {"vectors": {"pool": "avg"}, "whole maps": {"out_indices": "1,2,3,4"}}
ROWS, SHAPE = 1024, (256, 32, 32)  # a gigabyte
ROUNDS = 7


def extraction(pictures, output, stored, seconds):
    """Extract, and return what that took."""
    import featcli
    from featcli.run import sink

    kept, plain, before = [], sink.Sink._keep, sink.KEEP_SECONDS

    def timed(self):
        began, wall = time.thread_time(), time.perf_counter()
        plain(self)
        kept.append((time.thread_time() - began, time.perf_counter() - wall))

    how = {"random_init": True, "batch_size": 16, "shard_size": 1 << 14, "fold": True, "layout": "channels-last"}
    sink.Sink._keep, sink.KEEP_SECONDS, began = timed, seconds, os.times()
    try:
        featcli.extract(pictures, checkpoint="resnet18", output=output, **how, **STORED[stored])
    finally:
        sink.Sink._keep, sink.KEEP_SECONDS = plain, before
    spent = os.times()
    return spent.user + spent.system - began.user - began.system, kept


def cost(pictures, seconds, rounds):
    """Print the processor time with and without, in turn."""
    print(f"rows kept every {seconds:g} s; medians of {rounds} in turn")
    print("| stored | without, CPU s | with, CPU s | with / without | kept | one: CPU ms | one: ms | of a minute |")
    print("|---|---|---|---|---|---|---|---|")
    for stored in STORED:
        found = {math.inf: [], seconds: []}
        for number in range(rounds):
            for each in sorted(found, reverse=bool(number % 2)):
                with tempfile.TemporaryDirectory() as folder:
                    found[each].append(extraction(pictures, f"{folder}/d", stored, each))
        without, with_ = (statistics.median(spent for spent, _ in found[each]) for each in (math.inf, seconds))
        kept = [one for _, each in found[seconds] for one in each]
        processor, wall = (statistics.median(one[place] for one in kept) for place in (0, 1))
        ratio = statistics.median(b / a for (a, _), (b, _) in zip(*found.values(), strict=True))
        print(
            f"| {stored} | {without:.1f} | {with_:.1f} | {ratio:.3f} | {len(kept) / rounds:.0f} |"
            f" {1e3 * processor:.1f} | {1e3 * wall:.0f} | {processor / 60:.4%} |",
            flush=True,
        )


def begun(folder, format_name, share):
    """Return the file of a gigabyte's shard of which a share is written and kept, and what is kept of it."""
    from featcli.dump.formats import FORMATS
    from featcli.dump.shard import ShardWriter

    arrays = {"stage": ("float32", (ROWS, *SHAPE)), "valid": ("uint8", (ROWS,))}
    keys = [f"{row:05d}.jpg" for row in range(ROWS)]
    what = (Path(folder) / f"00000{FORMATS[format_name].SUFFIX}", FORMATS[format_name], arrays, keys, {})
    shard, batch = ShardWriter(*what), np.random.default_rng(0).standard_normal((32, *SHAPE), np.float32)
    for _ in range(round(ROWS * share) // 32):
        shard.write({"stage": batch})
    kept = shard.keep()
    shard.close()
    return what, shard.partial, kept


def resume(folder, rounds):
    """Print the seconds until the rows of a begun shard are resumed."""
    from featcli.dump.atomic_file import take_partial
    from featcli.dump.shard import ShardWriter

    print(f"\nseconds to take up a shard of 1 GiB, medians of {rounds}")
    print("| format | memory | 0 % | 25 % | 50 % | 75 % | 100 % |\n|---|---|---|---|---|---|---|")
    for format_name in ("hdf5", "safetensors"):
        found = {"warm": [], "cold": []}
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            what, partial, kept = begun(folder, format_name, share)
            for memory, medians in found.items():
                times = []
                for _ in range(rounds):
                    descriptor, _ = take_partial(partial)
                    if memory == "cold":
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        while os.read(descriptor, 1 << 24):
                            pass
                    began, done = time.perf_counter(), {"stage": round(ROWS * share) * 4 * math.prod(SHAPE)}
                    shard = ShardWriter(*what, (descriptor, partial))
                    assert shard.take_up(descriptor, done, done, kept)
                    times.append(time.perf_counter() - began)
                    shard.close()
                medians.append(statistics.median(times))
            partial.unlink()
        for memory, medians in found.items():
            print(f"| {format_name} | {memory} | {' | '.join(f'{one:.2f}' for one in medians)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=Path("build/pictures/small"))
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured", default=Path("build"))
    asked = parser.parse_args()
    print(described())
    asked.folder.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(asked.folder)
    with tempfile.TemporaryDirectory() as scratch:
        resume(scratch, min(5, asked.rounds))
    cost(draw(asked.pictures, asked.images, SMALL), asked.seconds, asked.rounds)
