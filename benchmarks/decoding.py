"""Measure what the levels of --decode cost and gain, and what they do to pixels and maps.

First decoding alone, for pictures from the web and of 12 megapixels: core time of a picture from its file to the
224x224 input, on one thread, the levels in turn, as the least of several rounds; with the mean and the largest
difference of the input in grey levels. Then runs: seconds of `featcli.extract` with a ResNet-50, last stage, on the
large pictures, in turn, as medians. `maps` is the least cosine between a picture's map and that of the exact way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from host import described
from photographs import LARGE, SMALL, draw
from PIL import Image

import featcli
from featcli.inputs.listing import find
from featcli.pixels.decode import read_pixels
from featcli.spec.groups import InputSpec, PixelSpec
from featcli.spec.words import Decode

LEVELS: tuple[Decode, ...] = ("exact", "fast", "scaled")


def decoded(folder, preprocessing, decode, most):
    """Return (core seconds of a picture, (N, 3, 224, 224)) of the first pictures."""
    images = find(InputSpec((str(folder),))).images
    rows, fit, rules = range(min(most, len(images))), preprocessing.fit_for(decode), PixelSpec(decode=decode)
    found = np.empty((len(rows), 3, 224, 224), np.uint8)
    started = time.thread_time()
    for row in rows:
        read_pixels(images[row], rules, fit, found[row])
    return (time.thread_time() - started) / len(rows), found.astype(float)


def levels(name, folder, rounds, most):
    """Print what decoding alone costs by each level, and how far its pixels are from the exact ones."""
    preprocessing = featcli.load_backbone("resnet50", random_init=True).preprocessing
    seconds, pixels = {decode: [] for decode in LEVELS}, {}
    for _ in range(rounds):
        for decode in LEVELS:
            spent, pixels[decode] = decoded(folder, preprocessing, decode, most)
            seconds[decode].append(spent)
    least = {decode: min(found) for decode, found in seconds.items()}
    for decode in LEVELS:
        off = np.abs(pixels[decode] - pixels["exact"])
        cost = f"{1000 * least[decode]:.2f} ms of a core, exact / {decode} {least['exact'] / least[decode]:.2f}"
        error = f"pixels off by {off.mean():.3f} on average, {off.max():.0f} at most, {(off > 0).mean():.2%} of them"
        print(f"{name} {decode:<6} {cost}; {error}", flush=True)


def runs(folder, scratch, rounds, count):
    """Print how long runs take by each level, and how near their maps are."""
    seconds = {decode: [] for decode in LEVELS}
    for _ in range(rounds):
        for decode, found in seconds.items():
            options = {"checkpoint": "resnet50", "random_init": True, "decode": decode, "overwrite": True}
            found.append(featcli.extract(folder, output=Path(scratch) / decode, **options).seconds)
    maps = {decode: featcli.open_dump(Path(scratch) / decode)["stage4"][:] for decode in LEVELS}
    exact = maps["exact"].reshape(count, -1)
    for decode in LEVELS[1:]:
        other = maps[decode].reshape(count, -1)
        cosine = (exact * other).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(other, axis=1)
        ratio = statistics.median(seconds["exact"]) / statistics.median(seconds[decode])
        print(f"runs: exact / {decode} {ratio:.2f}; maps {cosine.min():.5f}")
    print(f"runs: {count / statistics.median(seconds['exact']):.1f} images/s exact")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures of 12 megapixels there")
    parser.add_argument("--decode-only", action="store_true", help="leave the runs out")
    chosen = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    print(described(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        levels("500x375", draw(Path(scratch) / "small", 64, SMALL), chosen.rounds, 64)
        count = 8 if chosen.decode_only and chosen.pictures is None else chosen.images
        large = draw(chosen.pictures or Path(scratch) / "pictures", count, LARGE)
        levels("4000x3000", large, chosen.rounds, 8)
        if not chosen.decode_only:
            runs(large, scratch, chosen.rounds, chosen.images)


if __name__ == "__main__":
    main()
