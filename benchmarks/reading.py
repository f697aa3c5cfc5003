"""Read a dump back, against `pread` and `np.memmap` of the same bytes, which are in memory already. Above 1 is faster.

Ways run in turn, and numbers are medians of several rounds. Single maps are drawn at random. An epoch is all maps,
shuffled, in batches of 32 through the torch Dataset: by its own loader, whose two workers are threads, and by a
DataLoader with two processes, which are started before. The first is compared with a `pread` of the same maps in order
into memory of batches that exists already, too. The second is compared with a DataLoader of maps that need no reading,
which costs only the way between processes. The dump is read once from beginning to end before, because that decides how
large the pages are in which the system keeps it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from host import described
from photographs import SMALL, draw
from torch.utils.data import DataLoader, Dataset

import featcli
from featcli.dump.formats import FORMATS

IMAGES, SINGLE, BATCH = 256, 500, 32
STAGES = ("stage1", "stage2", "stage4")  # of a ResNet-50: 3.2, 1.6 and 0.4 MB a map


class ReadyMaps(Dataset):
    """As many maps, all the same one, which are in memory."""

    def __init__(self, count, shape):
        self.count, self.map = count, torch.ones(shape)

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return self.map


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def epoch(loader):
    for _ in loader:
        pass


def in_order(descriptor, array, batches):
    """Return all rows, one after another."""
    for row in range(array.shape[0]):
        into = batches[row // BATCH % len(batches)][row % BATCH]
        os.preadv(descriptor, [into.data.cast("B")], array.offset + row * array.row_bytes)


def compare(dump, stage, path, rounds):
    """Print one line."""
    maps = dump[stage]
    array = FORMATS[dump.plan.settings["format"]].read_layout(str(path), None).arrays[stage]
    mapped = np.memmap(path, np.float32, "r", array.offset, array.shape)
    descriptor = os.open(path, os.O_RDONLY)
    while os.read(descriptor, 1 << 20):
        pass

    def by_pread(row):
        raw = os.pread(descriptor, array.row_bytes, array.offset + row * array.row_bytes)
        return np.frombuffer(raw, np.float32).reshape(maps.shape[1:])

    batches = [np.ones((BATCH, *maps.shape[1:]), np.float32) for _ in range(3)]
    data = dump.as_torch_dataset(stage)
    by_processes = {"batch_size": BATCH, "shuffle": True, "num_workers": 2, "persistent_workers": True}
    loaders = {
        "loader": data.loader(BATCH, shuffle=True, num_workers=2),
        "single": DataLoader(data, **by_processes),
        "ready": DataLoader(ReadyMaps(len(data), maps.shape[1:]), **by_processes),
    }
    for loader in loaders.values():
        epoch(loader)  # starts the workers
    found = {name: [] for name in ("ours", "pread", "memmap", "in order", *loaders)}
    for seed in range(rounds):
        rows = np.random.default_rng(seed).integers(0, len(maps), SINGLE).tolist()
        ways = {"ours": maps.__getitem__, "pread": by_pread, "memmap": lambda row: mapped[row].copy()}
        for name, one in ways.items():
            found[name].append(seconds_of(lambda one=one, rows=rows: [one(row) is None for row in rows]))
        found["in order"].append(seconds_of(lambda: in_order(descriptor, array, batches)))
        for name, loader in loaders.items():
            found[name].append(seconds_of(lambda loader=loader: epoch(loader)))
    os.close(descriptor)
    median = {name: statistics.median(times) for name, times in found.items()}
    print(
        f"{dump.plan.settings['format']:<12} {stage:<7} {array.row_bytes / 1e6:4.1f} MB"
        f" {median['pread'] / median['ours']:8.2f} {median['memmap'] / median['ours']:8.2f}"
        f" {median['in order'] / median['loader']:14.2f} {median['ready'] / median['single']:21.2f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    print(
        f"{described()}, medians of {chosen.rounds}\n"
        f"{'':<28} a single map /         an epoch of the Dataset\n"
        f"{'':<28}    pread   memmap    loader() / pread  DataLoader / ready maps"
    )
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw(chosen.pictures or Path(folder) / "pictures", IMAGES, SMALL)
        paths = sorted(pictures.iterdir())[:IMAGES]
        for name in FORMATS:
            target = Path(folder) / name
            options = {"checkpoint": "resnet50", "random_init": True, "out_features": STAGES, "format": name}
            featcli.extract(paths, output=target, layout="channels-last", fold=True, shard_size=IMAGES, **options)
            for stage in STAGES:
                compare(
                    featcli.open_dump(target),
                    stage,
                    next((target / "shards").glob(f"*{FORMATS[name].SUFFIX}")),
                    chosen.rounds,
                )


if __name__ == "__main__":
    main()
