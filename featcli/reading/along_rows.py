"""Put one or more dumps along rows: the rows of each follow those of the one before, and so do its shards."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump.folder import Dump
from featcli.dump.plan import Plan, first_difference
from featcli.dump.records import split_digests
from featcli.errors import ConflictError, IncompleteError, UsageError, shown
from featcli.inputs.cells import Kind
from featcli.inputs.keys import Keys, first_rows
from featcli.inputs.labels import LABEL, labels_of
from featcli.pixels.failure import NOT_READ
from featcli.reading.columns import KINDS_SAID, Cells, Columns


class AlongRows:
    """Dumps along rows: the shard of each row, and what records say of all rows.

    Rows and shards are numbered over all dumps. A dump by itself is the case of one.
    """

    def __init__(self, dumps: Sequence[Dump]) -> None:
        self.dumps = tuple(dumps)
        plans = [dump.plan for dump in dumps]
        self._rows = [*accumulate((plan.num_images for plan in plans), initial=0)]  # the first of each, and the end
        self._shards = [*accumulate((plan.num_shards for plan in plans), initial=0)]
        self._shard_rows = [plan.shard_rows for plan in plans]
        self.first = self._rows[1], self._shard_rows[0]  # rows of the first dump, and of a shard of it

    @classmethod
    def at(cls, paths: Sequence[Path]) -> AlongRows:
        """Return the dumps in these folders, complete or not. Raises as `Dump.at` does."""
        return cls([Dump.at(path) for path in paths])

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._rows[-1]

    @property
    def plan(self) -> Plan:
        """The plan of the first dump: outputs and settings that matter are those of all."""
        return self.dumps[0].plan

    @property
    def num_shards(self) -> int:
        """The number of shards, also of those that are missing."""
        return self._shards[-1]

    @property
    def name(self) -> str:
        """The dumps for people: `'a'`, `'a' and 'b'`, or `'a' and 99 more`."""
        roots = [dump for dump in self.dumps if dump.plan.extends is None]  # without the generations added to them
        first, *others = (shown(dump.path) for dump in roots or self.dumps)
        return first if not others else f"{first} and {others[0] if len(others) == 1 else f'{len(others):,} more'}"

    def located(self, row: int) -> tuple[int, int]:
        """Return the shard of a row, and its place in it."""
        at = bisect_right(self._rows, row) - 1
        shard, place = divmod(row - self._rows[at], self._shard_rows[at])
        return self._shards[at] + shard, place

    def shard(self, number: int) -> tuple[Dump, int]:
        """Return the dump of a shard, and the number that the shard has there."""
        at = bisect_right(self._shards, number) - 1
        return self.dumps[at], number - self._shards[at]

    def rows(self, number: int) -> range:
        """Return the rows of a shard."""
        at = bisect_right(self._shards, number) - 1
        rows = self.dumps[at].plan.shard(number - self._shards[at])
        return range(self._rows[at] + rows.start, self._rows[at] + rows.stop)

    def dump_of(self, row: int) -> Dump:
        """Return the dump of a row."""
        return self.dumps[bisect_right(self._rows, row) - 1]

    def parts(self) -> Iterator[tuple[Dump, range]]:
        """Yield each dump with its rows."""
        for dump, first, end in zip(self.dumps, self._rows, self._rows[1:], strict=False):
            yield dump, range(first, end)

    def grown(self) -> Iterator[tuple[list[Dump], range]]:
        """Yield each dump with the generations that follow it here, and all their rows."""
        some: list[Dump] = []
        first = end = 0
        for dump, rows in self.parts():
            if some and dump.plan.extends is None:
                yield some, range(first, end)
                some, first = [], rows.start
            some.append(dump)
            end = rows.stop
        yield some, range(first, end)

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of each committed shard, as it is on the disk. Raises DamagedError and MachineError."""
        firsts = zip(self.dumps, self._shards, strict=False)
        return {first + record["shard"]: record for dump, first in firsts for record in dump.records()}

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """The images that could not be read: key, row, reason and detail of each."""
        found = []
        for number, record in self.records.items():
            before = self.rows(number).start - record["first_row"]  # rows in the dumps before
            found += [{**failure, "row": before + failure["row"]} for failure in record["failures"]]
        return found

    @cached_property
    def committed(self) -> np.ndarray:
        """(N,) bool: whether the shard of a row is committed."""
        committed = np.zeros(len(self), bool)
        for number in self.records:
            rows = self.rows(number)
            committed[rows.start : rows.stop] = True
        return committed

    @cached_property
    def valid(self) -> np.ndarray:
        """(N,) bool: whether a row holds maps. Rows of failed images and of missing shards do not."""
        valid = np.array(self.committed)
        # `verify` compares the arrays `valid` of the shards with this one.
        valid[[failure["row"] for failure in self.failures]] = False
        return valid

    def kept(self) -> np.ndarray:
        """(N,) bool: the rows of unfinished shards that are on the disk now."""
        kept = np.zeros(len(self), bool)
        for dump, rows in self.parts():
            for number, count in dump.rows_kept().items():
                first = rows.start + dump.plan.shard(number).start
                kept[first : first + count] = True
        return kept

    @cached_property
    def sizes(self) -> list[int]:
        """The size of each row's file in bytes, as it was read."""
        sizes = [size for dump in self.dumps for _, size in dump.images()]
        for number, record in self.records.items():
            before = self.rows(number).start - record["first_row"]
            for row, size in record.get("sizes", {}).items():  # of images that failed first and were read later
                sizes[before + int(row)] = size
        return sizes

    @cached_property
    def digests(self) -> list[str]:
        """The xxh3-128 of the bytes of the file of each row, in hex; empty where they were not read.

        Raises UsageError if a dump is of format version 1, which has none.
        """
        for dump in self.dumps:
            if not dump.plan.has_digests:
                raise UsageError(
                    f"dump {shown(dump.path)}: it is of format version 1, which holds no digests of pictures",
                    "extract into another dump to have them",
                )
        digests = [""] * len(self)
        for number, record in self.records.items():
            rows = self.rows(number)
            found = split_digests(record["digests"])
            digests[rows.start : rows.stop] = ["" if one == NOT_READ else one for one in found]
        return digests

    @property
    def have_tables(self) -> bool:
        """Whether any of the dumps has columns of a table or of tars."""
        return any(dump.plan.columns is not None for dump in self.dumps)

    def not_yet(self, what: str, shard: int) -> IncompleteError:
        """Return the error that says that something of a shard cannot be read because the shard is not committed."""
        dump, number = self.shard(shard)
        kept = dump.rows_kept().get(number)
        unfinished = f": shard {number} is unfinished, {kept:,} of its rows are kept" if kept else ""
        which = "this dump" if len(self.dumps) == 1 else f"dump {shown(dump.path)}"
        return IncompleteError(f"{what} is not extracted yet{unfinished}", f"run the extract command of {which} again")


def labels_along_rows(dumps: AlongRows, keys: Sequence[str]) -> list[str]:
    """Return the label of each row by its folders: see featcli.inputs.labels. Raises UsageError."""
    return [label for some, rows in dumps.grown() for label in _labels(some, keys[rows.start : rows.stop])]


def _labels(generations: Sequence[Dump], keys: Sequence[str]) -> list[str]:
    """Return the label of each row of a dump, with all generations: one image in a folder decides about all of them."""
    first = generations[0].plan
    leads = first.leads and {lead: kind for one in generations for lead, kind in (one.plan.leads or {}).items()}
    return labels_of(keys, leads, generations[0].path, first.label_level)


def columns_along_rows(dumps: AlongRows, keys: Sequence[str]) -> Columns:
    """Return the columns of all dumps; where one lacks a column, its cells are missing.

    Raises ConflictError if a column is of two kinds.
    """
    parts = [part for some, rows in dumps.grown() for part in _columns(some, keys[rows.start : rows.stop])]
    if len(parts) == 1:
        return parts[0][1]

    def cells(names: Collection[str]) -> Iterator[Cells]:
        none = dict.fromkeys(names)
        for dump, columns in parts:
            here = [name for name in names if name in columns.kinds]
            found = columns.cells(here) if here else repeat({}, dump.plan.num_images)
            yield from ({**none, **of_row} for of_row in found)

    return Columns(_kinds([(dump, columns.kinds) for dump, columns in parts]), cells, len(dumps))


def _columns(generations: Sequence[Dump], keys: Sequence[str]) -> Iterator[tuple[Dump, Columns]]:
    """Yield the columns of each generation of a dump. The labels of folders are the column `label`."""
    labels: list[str] = []
    if any(dump.plan.columns is None for dump in generations):
        with suppress(UsageError):  # which folder is the label cannot be told
            labels = _labels(generations, keys)
    first = 0
    for dump in generations:
        count, planned = dump.plan.num_images, dump.plan.columns
        of_rows = labels[first : first + count]
        first += count
        if planned is not None:
            yield dump, Columns(planned.kinds, partial(_cells, dump), count)
        else:
            kinds: dict[str, Kind] = {LABEL: "text"} if any(of_rows) else {}
            yield dump, Columns(kinds, partial(_label_cells, of_rows), count)


def _cells(dump: Dump, _: Collection[str]) -> Iterator[Cells]:
    return dump.cells()


def _label_cells(labels: Sequence[str], _: Collection[str]) -> Iterator[Cells]:
    return ({LABEL: label or None} for label in labels)


def _kinds(columns: Sequence[tuple[Dump, Mapping[str, Kind]]]) -> dict[str, Kind]:
    """Return the kind of each column of all dumps. Raises ConflictError if one is of two kinds.

    Where a dump has no cell of a column, its kind is that of the others.
    """
    found: dict[str, tuple[Dump, Kind]] = {}
    for dump, kinds in columns:
        for name, kind in kinds.items():
            if dump.plan.columns is not None and name in dump.plan.columns.without_cells:
                continue
            first, known = found.setdefault(name, (dump, kind))
            if kind != known:
                raise ConflictError(
                    f"dumps {shown(first.path)} and {shown(dump.path)} cannot be one along rows: column {shown(name)}"
                    f" holds {KINDS_SAID[known]} in the first and {KINDS_SAID[kind]} in the second",
                    "give one of the two columns another name, and extract again",
                )
    return {name: found[name][1] if name in found else kind for _, kinds in columns for name, kind in kinds.items()}


def refuse_other_dumps(dumps: Sequence[Dump]) -> None:
    """Raise ConflictError with the first difference if settings, outputs or kinds of columns are not the same.

    The number of threads, the batch size and the format of shards may differ.
    """
    for dump in dumps[1:]:
        if difference := first_difference(dumps[0].plan, dump.plan):
            raise ConflictError(
                f"dumps {shown(dumps[0].path)} and {shown(dump.path)} cannot be one along rows: {difference}",
                "extract one of them again with the settings of the other; several models of the same images go along"
                " outputs: open_dump({'a': ..., 'b': ...}), as --with does",
            )
    _kinds([(dump, dump.plan.columns.kinds) for dump in dumps if dump.plan.columns is not None])


def refuse_repeated_keys(dumps: AlongRows, keys: Sequence[str]) -> None:
    """Raise ConflictError with the first key that stands in two of the dumps."""
    first = first_rows(Keys(keys))
    (repeated,) = np.nonzero(first != np.arange(len(first)))
    if not len(repeated):
        return
    row = int(repeated[0])
    one, other = (shown(dumps.dump_of(of).path) for of in (int(first[row]), row))
    raise ConflictError(
        f"dumps {one} and {other} cannot be one along rows: both have {shown(keys[row])}",
        "dumps of the same images go along outputs: open_dump({'a': ..., 'b': ...}), as --with does",
    )
