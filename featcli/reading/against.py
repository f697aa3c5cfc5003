"""Compare two dumps of the same images by key: `featcli verify A --against B`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featcli.events import Report, silent
from featcli.reading.reader import DumpReader

LARGEST = 1e300  # stands for an infinite difference, because JSON knows no infinity
NAMED = 10  # keys of each kind that a comparison holds


@dataclass
class Difference:
    """How the rows of one output differ in two dumps."""

    output: str
    rows: int = 0  # that both dumps hold
    values: int = 0  # in these rows
    differing_rows: int = 0  # with other bits, or with other numbers if the dtypes differ
    largest: float = 0.0  # absolute; LARGEST if a value is finite in only one of the dumps, or if maps differ in size
    key: str = ""  # of the row with the largest difference
    total: float = 0.0  # of all absolute differences that are finite
    magnitude: float = 0.0  # the largest absolute value in the first dump

    @property
    def is_infinite(self) -> bool:
        """Whether some values cannot be subtracted."""
        return self.largest == LARGEST

    @property
    def mean(self) -> float:
        """The mean absolute difference over all values; infinite differences are left out."""
        return self.total / max(1, self.values)

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest absolute value in the first dump."""
        if self.largest == 0:
            return 0.0
        return min(LARGEST, self.largest / self.magnitude) if self.magnitude else LARGEST

    def is_beyond(self, tolerance: float) -> bool:
        """Return whether the values differ by more than a tolerance; 0 stands for the same bits."""
        return self.relative > tolerance or (tolerance == 0 and self.differing_rows > 0)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for programs."""
        fields = {name: value for name, value in vars(self).items() if name != "total"}
        return {**fields, "mean": self.mean, "relative": self.relative}

    def add(self, keys: Sequence[str], ours: Any, theirs: Any) -> None:
        """Take some more rows into account: two arrays (n, ...), or two lists of arrays if maps differ in size."""
        if isinstance(ours, np.ndarray):
            self._add_rows(keys, ours.reshape(len(keys), -1), theirs.reshape(len(keys), -1))
            return
        for key, one, other in zip(keys, ours, theirs, strict=True):
            if one.shape == other.shape:
                self._add_rows([key], one.reshape(1, -1), other.reshape(1, -1))
            else:
                self.rows += 1
                self._add_differing(1, LARGEST, key)

    def _add_rows(self, keys: Sequence[str], ours: np.ndarray, theirs: np.ndarray) -> None:
        self.rows += len(keys)
        self.values += ours.size
        self.magnitude = max(self.magnitude, float(np.abs(ours[np.isfinite(ours)]).max(initial=0)))
        (places,) = np.nonzero(~_are_same(ours, theirs).all(1))
        if not len(places):
            return
        ours, theirs = ours[places].astype(np.float64), theirs[places].astype(np.float64)
        with np.errstate(invalid="ignore"):  # for infinity minus infinity
            off = np.abs(ours - theirs)
        off[(ours == theirs) | (np.isnan(ours) & np.isnan(theirs))] = 0
        is_finite = np.isfinite(off)
        self.total += float(off[is_finite].sum())
        off[~is_finite] = LARGEST
        largest = off.max(1)
        worst = int(largest.argmax())
        self._add_differing(len(places), float(largest[worst]), keys[places[worst]])

    def _add_differing(self, rows: int, largest: float, key: str) -> None:
        self.differing_rows += rows
        if largest > self.largest or not self.key:
            self.largest, self.key = largest, key


def _are_same(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return for each value whether both have the same bits, or the same number if the dtypes differ."""
    same: np.ndarray
    if ours.dtype == theirs.dtype:
        bits = f"u{ours.itemsize}"
        same = np.ascontiguousarray(ours).view(bits) == np.ascontiguousarray(theirs).view(bits)
    else:
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    return same


@dataclass
class Keys:
    """The number of images for which something is true, and the first of their keys."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, keys: Iterable[str]) -> None:
        """Count some more keys."""
        for key in keys:
            self.count += 1
            if len(self.first) < NAMED:
                self.first.append(key)


@dataclass
class OnlyIn:
    """The things that only one of two dumps has."""

    outputs: list[str] = field(default_factory=list)
    images: Keys = field(default_factory=Keys)
    failed: Keys = field(default_factory=Keys)  # images that both have, and only this one could not read

    def __bool__(self) -> bool:
        return bool(self.outputs or self.images.count or self.failed.count)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for programs."""
        return {"outputs": self.outputs, "images": vars(self.images), "failed": vars(self.failed)}


@dataclass
class Comparison:
    """The differences between two dumps."""

    dump: str
    against: str
    tolerance: float
    images: int = 0  # that both dumps hold, without those that failed in one of them
    differences: list[Difference] = field(default_factory=list)  # of each output that both hold in the same shape
    shapes: dict[str, list[list[int | None]]] = field(default_factory=dict)  # of outputs whose two shapes differ
    only_in_dump: OnlyIn = field(default_factory=OnlyIn)
    only_in_against: OnlyIn = field(default_factory=OnlyIn)

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same images, outputs and shapes, and values that differ by at most the tolerance."""
        is_same = not (self.shapes or self.only_in_dump or self.only_in_against)
        return is_same and not any(one.is_beyond(self.tolerance) for one in self.differences)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for programs."""
        only = {name: getattr(self, name).to_json() for name in ("only_in_dump", "only_in_against")}
        outputs = [one.to_json() for one in self.differences]
        fields = {name: value for name, value in vars(self).items() if name != "differences"}
        return {"type": "against", "is_equal": self.is_equal, **fields, **only, "outputs": outputs}


def compare(one: DumpReader, other: DumpReader, tolerance: float = 0.0, report: Report = silent) -> Comparison:
    """Compare all rows of two dumps by key, whatever their formats, dtypes, shards and order.

    `tolerance` is the difference that is allowed, as a share of the largest absolute value that the first dump has of
    an output; 0 stands for the same bits, or the same numbers if the dtypes differ. About 4 MB are read at a time.
    Raises DamagedError and MachineError.
    """
    found = Comparison(str(one.path), str(other.path), tolerance)
    ours, theirs = list(one.outputs), list(other.outputs)
    found.only_in_dump.outputs = [name for name in ours if name not in theirs]
    found.only_in_against.outputs = [name for name in theirs if name not in ours]
    shapes = {name: [list(dump[name].shape[1:]) for dump in (one, other)] for name in ours if name in theirs}
    found.shapes = {name: both for name, both in shapes.items() if both[0] != both[1]}
    found.differences = [Difference(name) for name in shapes if name not in found.shapes]
    chosen = _rows_of_both(one, other, found)
    found.images = int(chosen.sum())
    report("start", images=found.images, done=0)
    names = [difference.output for difference in found.differences]
    for run in one.walk(names, rows=chosen) if names else ():
        rows = [other.rows[key] for key in run.keys]
        for difference in found.differences:
            difference.add(run.keys, run.maps[difference.output], other[difference.output][rows])
        report("batch", images=len(rows))
    return found


def _rows_of_both(one: DumpReader, other: DumpReader, found: Comparison) -> np.ndarray:
    """Find the rows of the first dump, (N,) bool, that both hold, and note the images that only one holds or failed."""
    chosen = np.zeros(len(one), bool)
    for row, key in enumerate(one.keys):
        place = other.rows.get(key)
        if place is None:
            found.only_in_dump.images.add([key])
        elif one.valid[row] and other.valid[place]:
            chosen[row] = True
        elif one.valid[row] or other.valid[place]:
            (found.only_in_against if one.valid[row] else found.only_in_dump).failed.add([key])
    found.only_in_against.images.add(key for key in other.keys if key not in one.rows)
    return chosen
