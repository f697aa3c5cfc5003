"""Measure how long a very large dump takes to look at and to finish, by records without real shards.

    python benchmarks/scale.py --shards 100000

The plan has a thousand images a shard, and each shard has a record and an empty file. Planning is measured with
invented names.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import featcli
from featcli.dump.checksummed_json import checksummed, publish_checksummed
from featcli.dump.folder import Dump
from featcli.dump.plan import digest_images, digest_keys, with_fingerprint
from featcli.dump.records import record_content
from featcli.dump.shard import REST, ShardSummary
from featcli.dump.writer import finalize
from featcli.inputs.image_list import ImageList, Origin

ROWS = 1000


def timed(name, work):
    began = time.perf_counter()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:<44} {time.perf_counter() - began:8.1f} s, peak {peak:6.0f} MiB")
    return result


def simulated(folder, num_shards):
    """Make a dump with all its records and no rows."""
    sample = featcli.extract(
        Path(__file__).parent.parent / "sample_images", checkpoint="test_resnet", random_init=True,
        output=folder / "sample",
    )  # fmt: skip
    plan = replace(Dump.plan_in(Path(sample.dump)), num_images=num_shards * ROWS, shard_rows=ROWS)
    path = folder / "dump"
    (path / "shards").mkdir(parents=True)
    publish_checksummed(path / "plan.json", with_fingerprint(plan))
    dump = Dump(path, plan)
    hashes = {stage.name: "0" * 32 for stage in plan.outputs} | {REST: "0" * 32}
    for number in range(num_shards):
        file = dump.shard_path(number)
        dump.record_path(number).write_bytes(
            checksummed(record_content(plan, number, ShardSummary(file.name, 0, hashes), []))
        )
        file.touch()
    return dump


def planned(num_images):
    """Print what planning does with the names of images, once they are listed."""
    images = ImageList([Origin("")])
    for i in range(num_images):
        images.add(f"class{i % 1000:04d}/image{i:09d}.jpg", 0, 100_000)
    images = images.taken(images.row_order(num_images))
    digest_keys(images.keys)
    digest_images(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=1_000_000, help="names, for planning")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump = simulated(Path(folder), chosen.shards)
        name = f"{chosen.shards:,} shards, {chosen.shards * ROWS:,} rows"
        timed(f"{name}: all records", lambda: dump.found)
        timed(f"{name}: finalize", lambda: finalize(dump))
    timed(f"{chosen.images:,} names: sorted, digested", lambda: planned(chosen.images))


if __name__ == "__main__":
    main()
