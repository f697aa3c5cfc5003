"""Measure what an image costs here, in core-seconds, and what ten million and a billion cost: tables of docs/scale.md.

Core-seconds are CPU time of one thread, which other work on the machine hardly changes. The network is a ResNet-50, and
pictures have 500x375 pixels.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from photographs import SMALL, draw

import featcli
from featcli.extraction.sharding import MAX_SHARD_ROWS, MAX_VECTORS, default_shard_rows
from featcli.inputs.listing import find
from featcli.pixels import batches
from featcli.pixels.batches import SizedImages
from featcli.pixels.decoder import Decoder
from featcli.pixels.sizes import Sizes
from featcli.spec.groups import InputSpec, PixelSpec

BATCH, BATCHES = 32, 4
STORED = {  # (name, bytes of an image)
    "stage4, `--pool avg`, float16": 2048 * 2,
    "stage4, float16": 2048 * 7 * 7 * 2,
    "stage2 and stage4, float32": (512 * 28 * 28 + 2048 * 7 * 7) * 4,
    "all five stages, float32": (64 * 112**2 + 256 * 56**2 + 512 * 28**2 + 1024 * 14**2 + 2048 * 7**2) * 4,
}
IMAGES = {"10 million": 10_000_000, "1 billion": 1_000_000_000}


def cpu_seconds(work):
    """Return the CPU seconds of one batch: the median of several."""
    found = []
    for _ in range(BATCHES + 1):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def decoding(paths, backbone):
    images = find(InputSpec(tuple(map(str, paths)))).images
    pictures = SizedImages(images, Sizes(backbone.preprocessing.size))
    reading = Decoder(PixelSpec(), backbone.preprocessing, 1)

    def work():
        with closing(batches.read(reading, [(pictures, range(len(paths)))])) as decoded:
            for _ in decoded:
                pass

    return cpu_seconds(work) / len(paths)


def computing(precision):
    backbone = featcli.load_backbone(
        "resnet50", random_init=True, precision=precision, layout="channels-last", fold=True
    )
    pixels = torch.randint(0, 256, (BATCH, 3, *backbone.preprocessing.size), dtype=torch.uint8)
    return cpu_seconds(lambda: backbone(pixels)) / BATCH


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(draw(chosen.pictures or Path(folder), BATCH, SMALL).iterdir())[:BATCH]
        decode = decoding(paths, featcli.load_backbone("resnet50", random_init=True))
    compute = {precision: computing(precision) for precision in ("fp32", "bf16")}
    print(f"an image in core-milliseconds: decoding {1000 * decode:.1f}, ResNet-50 "
          + ", ".join(f"{precision} {1000 * seconds:.1f}" for precision, seconds in compute.items()))  # fmt: skip
    print("\n| images | core-hours: decoding | ResNet-50 in bf16 | hours of a GPU at 1,000 images/s |")
    print("|---|---|---|---|")
    for name, count in IMAGES.items():
        print(
            f"| {name} | {count * decode / 3600:,.0f} | {count * compute['bf16'] / 3600:,.0f} | {count / 3.6e6:,.1f} |"
        )
    ends = " | ".join(f"{name}: shards | TB | hours at 1 GB/s" for name in IMAGES)
    print(f"\n| what is stored | bytes of an image | images a shard | {ends} |")
    print("|---|---|---|" + "---|---|---|" * len(IMAGES))
    for name, size in STORED.items():
        rows = default_shard_rows(BATCH, size, MAX_VECTORS if "avg" in name else MAX_SHARD_ROWS)
        cells = [
            f"{-(-count // rows):,} | {count * size / 1e12:,.2f} | {count * size / 3.6e12:,.2f}"
            for count in IMAGES.values()
        ]
        print(f"| {name} | {size:,} | {rows:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
