"""What the maps of a stage look like over a dump: its statistics, and colours that mean the same for every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcli.stage_array import StageArray

MOST_NUMBERS = 1 << 22  # that components and histograms are made of: 16 MB
BINS = 40
LOW, HIGH = 1, 99  # percent: what lies beyond is darkest, or brightest
HEAT = ("#0b0b2e", "#c8375e", "#fff3b8")  # from low to high, readable without telling red from green


@dataclass(frozen=True)
class Statistics:
    """Of all values of a stage over the studied images."""

    mean: float
    std: float
    least: float
    most: float
    zeros: float  # the share of values that are exactly zero
    channels: int
    dead: list[int]  # the channels that are zero everywhere
    counts: list[int]  # histogram of what is not zero, BINS from `low` to `high`; what lies beyond is in the outer ones
    low: float
    high: float


@dataclass(frozen=True)
class Colours:
    """How maps become pictures: the same for every image of the dump."""

    mean: np.ndarray  # (C,)
    components: np.ndarray  # (3, C): the first principal components; rows of zeros where there are fewer
    low: np.ndarray  # (3,): what becomes 0
    high: np.ndarray  # (3,): what becomes 255
    heat_low: float
    heat_high: float

    def components_of(self, maps: np.ndarray) -> np.ndarray:
        """A map (C, H, W) -> (H, W, 3) uint8, the first three components as red, green and blue."""
        vectors = maps.reshape(len(maps), -1).T.astype(np.float32) - self.mean
        return _scaled(vectors @ self.components.T, self.low, self.high).reshape(*maps.shape[1:], 3)

    def mean_of(self, maps: np.ndarray) -> np.ndarray:
        """A map (C, H, W) -> (H, W, 3) uint8, the mean over its channels from dark to bright."""
        from PIL import Image, ImageOps

        means = _scaled(maps.astype(np.float32).mean(0), self.heat_low, self.heat_high)
        black, mid, white = HEAT
        return np.asarray(ImageOps.colorize(Image.fromarray(means), black, white, mid))


def study(array: StageArray, rows: Sequence[int]) -> tuple[Statistics, Colours | None]:
    """Statistics over these rows, and the colours; None where maps were pooled to vectors. Reads one map at a time."""
    channels = array.stage.shape[0] or 1
    share = max(1, MOST_NUMBERS // (len(rows) * channels))  # positions of an image that points are drawn from
    total = squares = zeros = count = 0.0
    least, most = np.inf, -np.inf
    alive = np.zeros(channels, bool)
    drawn, means = [], []
    for row in rows:
        vectors = np.nan_to_num(array[row].astype(np.float32)).reshape(channels, -1)  # (C, positions)
        total += float(vectors.sum(dtype=np.float64))
        squares += float(np.square(vectors, dtype=np.float64).sum())
        zeros += int((vectors == 0).sum())
        count += vectors.size
        least, most = min(least, float(vectors.min())), max(most, float(vectors.max()))
        alive |= (vectors != 0).any(1)
        some = vectors[:, :: -(-vectors.shape[1] // share)]
        drawn.append(some.T.copy())
        means.append(some.mean(0))
    points = np.concatenate(drawn)  # (n, C)
    mean = total / count
    values = points[points != 0] if points.any() else points
    low, high = (float(edge) for edge in np.percentile(values, (0.1, 99.9)))
    high = high if high > low else low + 1
    statistics = Statistics(
        mean=mean,
        std=max(squares / count - mean**2, 0.0) ** 0.5,
        least=least,
        most=most,
        zeros=zeros / count,
        channels=channels,
        dead=np.flatnonzero(~alive).tolist(),
        counts=np.histogram(values.clip(low, high), BINS, (low, high))[0].tolist(),
        low=low,
        high=high,
    )
    return statistics, _colours(points, np.concatenate(means)) if len(array.stage.shape) == 3 else None


def _colours(points: np.ndarray, means: np.ndarray) -> Colours:
    import torch

    centre = points.mean(0)
    centred = torch.from_numpy(points - centre)
    wanted = min(12, *centred.shape)  # more than the three that are kept: it finds those better
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(centred, q=wanted, center=False, niter=8)
    components = np.zeros((3, points.shape[1]), np.float32)
    components[: min(3, wanted)] = directions.T[:3].numpy()
    # Either sign would do; this one does not depend on chance.
    signs = np.sign(components[np.arange(3), np.abs(components).argmax(1)])
    components *= np.where(signs == 0, 1, signs)[:, None].astype(np.float32)
    low, high = np.percentile((points - centre) @ components.T, (LOW, HIGH), axis=0)
    heat_low, heat_high = np.percentile(means, (LOW, HIGH))
    return Colours(centre, components, low, high, float(heat_low), float(heat_high))


def _scaled(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """From `low` to `high` as 0 to 255; where the two are one, all is in the middle."""
    span = np.asarray(high - low, np.float32)
    flat = span <= 1e-12
    scaled = np.where(flat, 0.5, (values - low) / np.where(flat, 1, span))
    return np.asarray(np.nan_to_num(scaled, nan=0.0).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def evenly_spaced(rows: Sequence[int], most: int) -> list[int]:
    """At most so many of the rows, from the first to the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place)] for place in np.linspace(0, len(rows) - 1, most)]
