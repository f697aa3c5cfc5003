"""Compare writer and reader with the disk: a shard is laid out, written, hashed, synced, named, recorded, and read.

Ways run in turn, and numbers are medians of several rounds. The bytes are those of all five stages of a ResNet-50 for
64 images (590 MB). `raw` is a buffered `write` and `fsync` of the same bytes; `buffered` is featcli's writer without
O_DIRECT. Above 1 is faster than raw. CPU is seconds of this process for a gigabyte, in user and kernel. Reads are
single maps of stage2 (1.6 MB), drawn at random, in memory already, against `pread` of the same bytes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from math import prod
from pathlib import Path

import numpy as np
from host import described
from photographs import SMALL, draw

import featcli
from featcli.dump.atomic_file import publish_lines
from featcli.dump.formats import FORMATS
from featcli.dump.shard import ShardWriter
from featcli.run.transfers import Buffers

SHAPES = {"stem": (64, 112, 112), "stage1": (256, 56, 56), "stage2": (512, 28, 28)}
SHAPES |= {"stage3": (1024, 14, 14), "stage4": (2048, 7, 7)}
BATCH, BATCHES = 32, 2


def maps():
    """Return a batch of rows in buffers such as the pipeline's."""
    chance, buffers, found = np.random.default_rng(0), Buffers(), {}
    for name, shape in SHAPES.items():
        size = prod(shape) * 4 * BATCH
        array = buffers.take(name, size).numpy()[:size].view(np.float32).reshape(BATCH, *shape)
        array[...] = chance.standard_normal(array.shape, np.float32)
        found[name] = array
    return found


def raw(folder, batch):
    """Write as any program could."""
    with open(folder / "raw", "wb", buffering=0) as file:
        for _ in range(BATCHES):
            for rows in batch.values():
                content = rows.data.cast("B")
                while content:
                    content = content[file.write(content) :]
        os.fsync(file.fileno())


def shard_of(folder, batch, format_name, direct):
    """Write a shard, from nothing to its record."""
    rows = BATCH * BATCHES
    arrays = {name: ("float32", (rows, *shape)) for name, shape in SHAPES.items()} | {"valid": ("uint8", (rows,))}
    keys = [f"{i:05d}.jpg" for i in range(rows)]
    shard = ShardWriter(folder / f"00000{FORMATS[format_name].SUFFIX}", FORMATS[format_name], arrays, keys, {})
    if not direct:
        shard._file._flag = 0
    for _ in range(BATCHES):
        shard.write(batch)
    written = shard.finish({"valid": np.ones(rows, np.uint8)})
    shard.publish()
    publish_lines(folder / "00000.json", [repr(written).encode()])


def read(folder, format_name, rounds):
    """Print how fast single maps come out of a dump."""
    pictures = draw(folder / "pictures", BATCH * BATCHES, SMALL)
    target = folder / format_name
    options = {"checkpoint": "resnet50", "random_init": True, "out_features": ("stage2",), "format": format_name}
    featcli.extract(pictures, output=target, **options)
    dump = featcli.open_dump(target)
    maps, path = dump["stage2"], next((target / "shards").glob(f"*{FORMATS[format_name].SUFFIX}"))
    array = FORMATS[format_name].read_layout(str(path), None).arrays["stage2"]
    descriptor = os.open(path, os.O_RDONLY)

    def by_pread(row):
        raw = os.pread(descriptor, array.row_bytes, array.offset + row * array.row_bytes)
        return np.frombuffer(raw, np.float32).reshape(maps.shape[1:])

    seconds = {"ours": [], "pread": []}
    for seed in range(rounds):
        for name, one in (("ours", lambda row: maps[row]), ("pread", by_pread)):
            rows = np.random.default_rng(seed).integers(0, len(maps), 500)
            began = time.perf_counter()
            for row in rows:
                one(int(row))
            seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(seconds["pread"]) / statistics.median(seconds["ours"])
    print(f"{format_name:<22} {ratio:5.2f} of pread")
    os.close(descriptor)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure; default: the one for temporary files")
    chosen = parser.parse_args()
    print(described(), flush=True)
    batch = maps()
    gigabytes = BATCHES * sum(rows.nbytes for rows in batch.values()) / 1e9
    ways = {"raw": raw}
    for name in FORMATS:
        ways[name] = lambda folder, batch, name=name: shard_of(folder, batch, name, True)
        ways[f"{name} buffered"] = lambda folder, batch, name=name: shard_of(folder, batch, name, False)
    seconds = {name: [] for name in ways}
    for _ in range(chosen.rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
                os.sync()
                began, cpu = time.perf_counter(), time.process_time()
                way(Path(folder), batch)
                seconds[name].append((time.perf_counter() - began, time.process_time() - cpu))
    least = statistics.median(wall for wall, _ in seconds["raw"])
    for name, found in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:<22} {least / wall:5.2f} of raw   CPU {cpu / gigabytes:.2f} s/GB")
    for name in FORMATS:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            read(Path(folder), name, chosen.rounds)


if __name__ == "__main__":
    main()
