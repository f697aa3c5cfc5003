"""Draw pictures for the benchmarks from numbers. They cost a decoder what photographs do: detail on every scale."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

SMALL, LARGE = (500, 375), (4000, 3000)  # (width, height) of a picture from the web, and of one with 12 megapixels
FIELD = 5120  # pixels of each edge of the field from which pictures are cut


def field(seed=0):
    """Return (FIELD, FIELD, 3) uint8 with the spectrum of photographs: the amplitude falls with the frequency."""
    chance = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(FIELD)[:, None], np.fft.rfftfreq(FIELD)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * chance.random(frequency.shape))
        plane = np.fft.irfft2(phases / frequency**1.1, s=(FIELD, FIELD))
        planes.append((plane - plane.mean()) / plane.std())
    light, *colours = planes
    mixed = np.stack([light + 0.4 * colours[0], light, light + 0.4 * colours[1]], -1)
    return np.clip(128 + 48 * mixed, 0, 255).astype(np.uint8)


def draw(folder, count, size, threads=2):
    """Fill a folder once with `count` JPEGs of (width, height) `size`: 0000.jpg and so on."""
    if folder.is_dir() and len(list(folder.iterdir())) == count:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pixels, (width, height) = field(), size

    def one(i):
        chance = np.random.default_rng(i)
        top, left = chance.integers(0, FIELD - height), chance.integers(0, FIELD - width)
        cut = pixels[top : top + height, left : left + width, chance.permutation(3)][:, :: chance.choice([-1, 1])]
        Image.fromarray(np.ascontiguousarray(cut)).save(folder / f"{i:04d}.jpg", quality=90)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(count)))
    return folder
