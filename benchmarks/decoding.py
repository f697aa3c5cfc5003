"""Measure what --decode scaled gains for JPEGs of 12 megapixels, and what it does to pixels and maps.

Seconds are those of `featcli.extract` with a ResNet-50, last stage, in turn, as medians of several rounds. `pixels` is
the mean and the largest difference of the 224x224 input in grey levels. `maps` is the least cosine between a picture's
map and that of the exact way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from host import described
from photographs import LARGE, draw
from PIL import Image

import featcli
from featcli.inputs.listing import find
from featcli.pixels.decode import read_pixels
from featcli.spec.groups import InputSpec, PixelSpec


def pixels(folder, decode, fit):
    """Return (N, 3, 224, 224) of the first pictures."""
    found, images = [], find(InputSpec((str(folder),))).images
    for row in range(min(16, len(images))):
        out = np.empty((3, 224, 224), np.uint8)
        read_pixels(images[row], PixelSpec(decode=decode), fit, out, False)
        found.append(out)
    return np.stack(found).astype(float)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="keep the drawn pictures there")
    chosen = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    print(described(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = draw(chosen.pictures or Path(scratch) / "pictures", chosen.images, LARGE)
        seconds = {"exact": [], "scaled": []}
        for _ in range(chosen.rounds):
            for decode, found in seconds.items():
                target = Path(scratch) / decode
                options = {"checkpoint": "resnet50", "random_init": True, "decode": decode, "overwrite": True}
                found.append(featcli.extract(folder, output=target, **options).seconds)
        maps = {decode: featcli.open_dump(Path(scratch) / decode)["stage4"][:] for decode in seconds}
        fit = featcli.load_backbone("resnet50", random_init=True).preprocessing.fit
        off = np.abs(pixels(folder, "exact", fit) - pixels(folder, "scaled", fit))
    one, other = (found.reshape(len(found), -1) for found in maps.values())
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    ratio = statistics.median(seconds["exact"]) / statistics.median(seconds["scaled"])
    rate = chosen.images / statistics.median(seconds["exact"])
    print(f"exact / scaled {ratio:.2f} ({rate:.1f} images/s exact)")
    print(f"pixels {off.mean():.2f}, {off.max():.0f}; maps {cosine.min():.5f}")


if __name__ == "__main__":
    main()
