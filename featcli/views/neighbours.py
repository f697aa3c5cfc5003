"""Find the images of a dump that are nearest to given ones, by the cosine of maps averaged over all positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from featcli.dump.plan import Output
from featcli.reading.reader import DumpReader
from featcli.views.stage_view import evenly_spaced

NEIGHBOURS = 6
MOST_BYTES = 1 << 33  # of maps that are read to compare all images of a dump

Near = list[list[tuple[int, float]]]  # for each image the nearest others: (row or place, similarity)


def averaged(output: Output, maps: Any) -> np.ndarray:
    """Return the averages over all positions, (N, C) float64, of rows of an output, or of a list of them.

    Values that are not finite count as zero.
    """
    if isinstance(maps, list):
        return np.concatenate([averaged(output, one[None]) for one in maps])
    finite = np.where(np.isfinite(maps), maps, 0)
    return np.asarray(output.columns(finite).mean(2, dtype=np.float64))


def neighbours(vectors: np.ndarray) -> Near:
    """Return for each of (N, C) vectors the places of the others that are nearest by cosine, the nearest first."""
    return _nearest(vectors, range(len(vectors)), [(range(len(vectors)), vectors)])


def rows_to_compare(dump: DumpReader, stage: str, shown: Sequence[int]) -> list[int]:
    """Return the rows to compare with the shown ones: all that have maps, or as many as may be read.

    If there are too many, they are evenly spaced, and the shown rows are added.
    """
    most = max(1, MOST_BYTES // max(1, dump[stage].row_bytes))
    some = evenly_spaced(np.flatnonzero(dump.valid).tolist(), most)
    return sorted({*some, *shown})


def neighbours_in_dump(dump: DumpReader, stage: str, vectors: np.ndarray, shown: Sequence[int], among: Any) -> Near:
    """Return for each of the shown rows those that are nearest by the maps of a stage.

    `vectors` are the averages of the shown rows, (N, C). `among` are rows of the dump, which are read once.
    """
    runs = ((run.rows, averaged(dump.outputs[stage], run.maps[stage])) for run in dump.walk(stage, rows=among))
    return _nearest(vectors, shown, runs)


def _nearest(vectors: np.ndarray, rows: Sequence[int], others: Iterable[tuple[Sequence[int], np.ndarray]]) -> Near:
    """Return for each vector, which also has a row, the nearest of all others.

    These come in portions with their rows.
    """
    unit, own = _unit(vectors), np.asarray(rows)[:, None]
    best, found = np.full((len(unit), 0), -np.inf), np.zeros((len(unit), 0), int)
    for some, theirs in others:
        similar = unit @ _unit(theirs).T
        numbers = np.broadcast_to(np.asarray(some), similar.shape)
        best = np.concatenate([best, np.where(numbers == own, -np.inf, similar)], 1)
        found = np.concatenate([found, numbers], 1)
        order = np.argsort(-best, 1, kind="stable")[:, :NEIGHBOURS]
        best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
    return [
        [(int(row), round(float(value), 4)) for row, value in zip(*of_one, strict=True) if value > -np.inf]
        for of_one in zip(found, best, strict=True)
    ]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30))
