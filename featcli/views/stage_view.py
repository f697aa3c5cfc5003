"""Describe the maps of a stage over a dump: statistics, and colours that mean the same for every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcli.reading.stage_array import StageArray

MOST_NUMBERS = 1 << 22  # from which components and histograms are made: 16 MB
BINS = 40
LOW, HIGH = 1, 99  # percent: values beyond these are darkest or brightest
OUTERMOST = 0.1  # percent that a histogram leaves out at either end
HEAT = ("#0b0b2e", "#c8375e", "#fff3b8")  # from low to high, readable without telling red from green


@dataclass(frozen=True)
class Statistics:
    """Statistics of all values of a stage over the studied images."""

    mean: float
    std: float
    least: float
    most: float
    zeros: float  # the share of values that are exactly zero
    not_finite: int  # values that are infinite or undefined; no other number here counts them
    channels: int
    dead: list[int]  # channels that are zero everywhere
    counts: list[int]  # histogram of values that are not zero, in BINS bins from `low` to `high`
    low: float
    high: float


@dataclass(frozen=True)
class Colours:
    """How maps become pictures, in the same way for every image of the dump."""

    mean: np.ndarray  # (C,)
    components: np.ndarray  # (3, C): the first principal components; missing ones are zero
    low: np.ndarray  # (3,): the values that become 0
    high: np.ndarray  # (3,): the values that become 255
    heat_low: float
    heat_high: float

    def components_of(self, maps: np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8 of a map (C, H, W): its first three components as red, green and blue."""
        with np.errstate(invalid="ignore"):  # the map may hold infinite values
            projected = (maps.reshape(len(maps), -1).T - self.mean) @ self.components.T
        return _scaled(projected, self.low, self.high).reshape(*maps.shape[1:], 3)

    def mean_of(self, maps: np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8 of a map (C, H, W): the mean over its channels, from dark to bright."""
        from PIL import Image, ImageOps

        with np.errstate(invalid="ignore"):
            means = _scaled(maps.mean(0, dtype=np.float64), self.heat_low, self.heat_high)
        black, mid, white = HEAT
        return np.asarray(ImageOps.colorize(Image.fromarray(means), black, white, mid))


def study(array: StageArray, rows: Sequence[int]) -> tuple[Statistics, Colours | None]:
    """Return statistics over these rows, and the colours, or None if maps were pooled to vectors.

    Reads one map at a time.

    Values that are not finite are counted, and left out of everything else.
    """
    channels = array.stage.channels
    share = max(1, MOST_NUMBERS // (len(rows) * channels))  # positions of an image that points are drawn from
    total = squares = zeros = count = not_finite = 0.0
    least, most = np.inf, -np.inf
    alive = np.zeros(channels, bool)
    chance = np.random.default_rng(0)
    drawn = [np.empty((0, channels), np.float32)]
    for row in rows:
        vectors = array.stage.columns(array[row][None].astype(np.float64))[0]  # (C, positions)
        finite = np.isfinite(vectors)
        values = vectors[finite]
        not_finite += vectors.size - values.size
        if not values.size:
            continue
        total, squares = total + values.sum(), squares + np.square(values).sum()
        zeros, count = zeros + (values == 0).sum(), count + values.size
        least, most = min(least, values.min()), max(most, values.max())
        alive |= ((vectors != 0) & finite).any(1)
        places = chance.permutation(vectors.shape[1])[:share]  # of the whole map: its border differs from the rest
        drawn.append(vectors[:, places[finite[:, places].all(0)]].T.astype(np.float32))
    points = np.concatenate(drawn)  # (n, C)
    points = points if len(points) else np.zeros((1, channels), np.float32)
    mean = total / max(count, 1)
    counts, low, high = _histogram(points)
    statistics = Statistics(
        mean=float(mean),
        std=float(max(squares / max(count, 1) - mean**2, 0.0) ** 0.5),
        least=float(least) if count else 0.0,
        most=float(most) if count else 0.0,
        zeros=float(zeros / max(count, 1)),
        not_finite=int(not_finite),
        channels=channels,
        dead=np.flatnonzero(~alive).tolist(),
        counts=counts,
        low=low,
        high=high,
    )
    return statistics, _colours(points) if array.stage.is_map else None


def _histogram(points: np.ndarray) -> tuple[list[int], float, float]:
    """Return (counts, begin, end) of the values that are not zero. The outermost at either end are left out."""
    values = points[points != 0].astype(np.float64) if points.any() else np.zeros(1)
    low, high = (float(edge) for edge in np.percentile(values, (OUTERMOST, 100 - OUTERMOST)))
    high = low + max(high - low, abs(low) * 1e-6, 1e-30)
    return np.histogram(values, BINS, (low, high))[0].tolist(), low, high


def _colours(points: np.ndarray) -> Colours:
    import torch

    centre = points.mean(0, dtype=np.float64)
    centred = points - centre
    scale = max(float(np.abs(centred).max()), 1e-30)
    wanted = min(12, *centred.shape)  # the three that are kept get better if more are computed
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(torch.from_numpy(centred / scale).float(), q=wanted, center=False, niter=8)
    components = np.zeros((3, points.shape[1]))
    components[: min(3, wanted)] = directions.T[:3].double().numpy()
    # Either sign is right; this one does not depend on chance.
    signs = np.sign(components[np.arange(3), np.abs(components).argmax(1)])
    components *= np.where(signs == 0, 1, signs)[:, None]
    low, high = np.percentile(centred @ components.T, (LOW, HIGH), axis=0)
    heat_low, heat_high = np.percentile(points.mean(1, dtype=np.float64), (LOW, HIGH))
    return Colours(
        mean=centre,
        components=components,
        low=low,
        high=high,
        heat_low=float(heat_low),
        heat_high=float(heat_high),
    )


def _scaled(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Scale `low` to `high` to 0 to 255. If the two are equal, every value is in the middle."""
    span = np.asarray(high - low)
    flat = span <= 1e-30
    scaled = np.where(flat & np.isfinite(values), 0.5, (values - low) / np.where(flat, 1, span))
    return np.asarray(np.nan_to_num(scaled, nan=0.0).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def evenly_spaced(rows: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the rows, from the first to the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place)] for place in np.linspace(0, len(rows) - 1, most)]
