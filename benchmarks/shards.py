"""Read random rows of dumps of 10 to 10,000 shards, in memory already, against `pread`. Above 1 is faster.

Ways run in turn, and numbers are medians of several rounds. Beside each row stands a plain `pread` of the same bytes at
the same place. It keeps as many files open as featcli does; if there are more shards, it opens the file of each row,
and closes it. A shuffled epoch is all rows by `loader(shuffle=True)` with two workers, against `preadv` of the same
rows, also in random order, into batches that exist already, also by two threads. The maps are numbers that nobody
computed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from host import described
from photographs import SMALL, draw

import featcli
from featcli.dump import shard
from featcli.dump.folder import Dump
from featcli.dump.formats import FORMATS
from featcli.dump.plan import digest_images, digest_keys
from featcli.dump.writer import DumpWriter, create, finalize
from featcli.inputs.keys import Keys
from featcli.pixels.failure import NOT_READ
from featcli.reading.open_shards import most_open

LEAST_ROWS, SINGLE, BATCH, STAGE, WORKERS = 1000, 2000, 32, "stage4", 2


def make(like, path, name, keys, rows, side):
    """Make a dump of float32 maps (8, side, side), all equal, with so many rows a shard and the settings of `like`."""
    num_shards = len(keys) // rows
    images = SimpleNamespace(keys=Keys(keys), sizes=[1] * len(keys))
    shape = (8, side, side)
    plan = replace(
        like,
        settings=replace(like.settings, format=name),
        outputs=(replace(like.outputs[0], name=STAGE, point=STAGE, map_shape=shape, shape=shape),),
        num_images=len(images.keys),
        keys_digest=digest_keys(images.keys),
        images_digest=digest_images(images),
        shard_rows=rows,
    )
    (path / "shards").mkdir(parents=True)
    create(path, plan, images)
    dump = Dump.at(path)
    writer, maps = DumpWriter(dump, plan.environment), np.random.default_rng(0).random((rows, *shape), np.float32)
    valid = np.ones(rows, np.uint8)
    for number in range(num_shards):
        shard = writer.start(number, images.keys[number * rows : (number + 1) * rows], {})
        shard.file.write({STAGE: maps})
        shard.made.digests += [NOT_READ] * rows
        writer.commit(shard, {"valid": valid})
    finalize(dump)


def make_dumps(like, path, name, num_shards, num_dumps, side):
    """Make dumps that have so many shards together, and return the folder, or several."""
    rows = max(num_shards, LEAST_ROWS) // num_shards
    keys, each = [f"{row:06d}.jpg" for row in range(rows * num_shards)], rows * num_shards // num_dumps
    folders = [path / f"{number:05d}" for number in range(num_dumps)]
    for number, folder in enumerate(folders):
        make(like, folder, name, keys[number * each : (number + 1) * each], rows, side)
    return folders if num_dumps > 1 else folders[0]


class Plain:
    """`pread` of rows, with a file open for each shard if that many may be open."""

    def __init__(self, dump):
        self.rows, parts = dump.plan.shard_rows, [one.plan for one in dump.along_rows.dumps]
        suffix, reader = FORMATS[dump.plan.settings.format].SUFFIX, FORMATS[dump.plan.settings.format]
        self.paths = [
            str(one.path / "shards" / f"{number:05d}{suffix}")
            for one, plan in zip(dump.along_rows.dumps, parts, strict=True)
            for number in range(plan.num_shards)
        ]
        self.arrays = [reader.read_layout(path, None).arrays[STAGE] for path in self.paths]
        self.shape = dump[STAGE].shape[1:]
        few = len(self.paths) <= most_open()
        self.open = [os.open(path, os.O_RDONLY) for path in self.paths] if few else None

    def read(self, row):
        """Return a row as an array."""
        shard, at = divmod(row, self.rows)
        array = self.arrays[shard]
        file = self.open[shard] if self.open else os.open(self.paths[shard], os.O_RDONLY)
        raw = os.pread(file, array.row_bytes, array.offset + at * array.row_bytes)
        if not self.open:
            os.close(file)
        return np.frombuffer(raw, np.float32).reshape(self.shape)

    def read_into(self, batch, rows):
        """Read rows, one after another, into memory that exists already."""
        for place, row in enumerate(rows):
            shard, at = divmod(row, self.rows)
            array = self.arrays[shard]
            file = self.open[shard] if self.open else os.open(self.paths[shard], os.O_RDONLY)
            os.preadv(file, [batch[place].data.cast("B")], array.offset + at * array.row_bytes)
            if not self.open:
                os.close(file)

    def close(self):
        for file in self.open or ():
            os.close(file)


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_epoch(plain, batches, order):
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]
        for _ in pool.map(
            lambda numbered: plain.read_into(batches[numbered[0] % len(batches)], numbered[1]), enumerate(parts)
        ):
            pass


def epoch(loader):
    for _ in loader:
        pass


def compare(path, rounds):
    """Return microseconds a row, and ratios, of one dump, or of several along rows."""
    opening = seconds_of(lambda: featcli.open_dump(path))
    dump = featcli.open_dump(path)
    validity = seconds_of(lambda: dump.valid.all())
    maps, plain = dump[STAGE], Plain(dump)
    count = len(maps)
    for row in range(count):  # puts files into memory, and makes every layout known
        plain.read(row)
        maps[row]
    loader = dump.as_torch_dataset(STAGE).loader(BATCH, shuffle=True, num_workers=WORKERS)
    batches = [np.ones((BATCH, *maps.shape[1:]), np.float32) for _ in range(WORKERS + 1)]
    epoch(loader)
    found = {name: [] for name in ("ours", "pread", "loader", "preadv")}
    for seed in range(rounds):
        order = np.random.default_rng(seed).permutation(count).tolist()
        rows = (order * -(-SINGLE // count))[:SINGLE]
        for name, one in {"ours": maps.__getitem__, "pread": plain.read}.items():
            found[name].append(seconds_of(lambda one=one, rows=rows: [one(row) is None for row in rows]) / SINGLE)
        found["loader"].append(seconds_of(lambda: epoch(loader)) / count)
        found["preadv"].append(seconds_of(lambda order=order: plain_epoch(plain, batches, order)) / count)
    plain.close()
    dump.close()
    median = {name: statistics.median(times) for name, times in found.items()}
    return opening, validity, median


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--kilobytes", type=int, nargs="+", default=[100, 500], help="of a map; 10,000 of them are stored"
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--dumps", type=int, nargs="+", default=[1], help="that hold the shards, along rows")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    chosen = parser.parse_args()
    os.fsync = lambda descriptor: None  # nothing of it has to outlive a power cut
    shard.LEAST = sys.maxsize  # through the page cache: files that are read into it later lie in smaller pieces
    print(
        f"{described()}, medians of {chosen.rounds}, {most_open()} files open at most\n"
        f"{'':<46} a random row         a shuffled epoch, a row\n"
        f"{'':<46} us    / least  / pread   us    / preadv   open_dump   valid"
    )
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(Path(folder) / "pictures", 2, SMALL)
        options = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 1, "layout": "channels-first"}
        featcli.extract(str(pictures), output=Path(folder) / "like", **options)
        like = featcli.open_dump(Path(folder) / "like").plan
        for name in chosen.formats:
            for kilobytes in chosen.kilobytes:
                least, side = 0.0, round((kilobytes * 1000 / 32) ** 0.5)
                for num_shards, num_dumps in product(chosen.shards, chosen.dumps):
                    path = Path(folder) / "dumps"
                    dumps = make_dumps(like, path, name, num_shards, num_dumps, side)
                    opening, validity, median = compare(dumps, chosen.rounds)
                    shutil.rmtree(path)
                    least = min(least, median["ours"]) or median["ours"]
                    ours = median["ours"]
                    print(
                        f"{name:<12} {32 * side * side / 1000:4.0f} kB {num_shards:6,} shards {num_dumps:4} dumps"
                        f" {ours * 1e6:6.0f} {ours / least:7.2f} {median['pread'] / ours:8.2f}"
                        f" {median['loader'] * 1e6:9.0f} {median['preadv'] / median['loader']:8.2f}"
                        f" {opening:10.3f} s {validity:6.3f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
