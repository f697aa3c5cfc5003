"""Reading a dump back: `open_dump(path)`, lazy arrays by stage, rows by number or key. One way for both formats."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump import Dump
from featcli.errors import DamagedError, IncompleteError, UsageError, nearest, shown
from featcli.plan import Plan, StoredStage
from featcli.writers.layout import VALID, Array, Layout
from featcli.writers.rows import NUMPY_TYPES, read_rows, values_of

MAX_OPEN_SHARDS = 32  # file descriptors are few


def open_dump(path: str | os.PathLike[str], incomplete: bool = False) -> DumpReader:
    """Open a dump for reading. With `incomplete`, one that still misses shards: their rows are not valid.

    Raises UsageError where there is no dump, IncompleteError where it is not complete, DamagedError where its
    files are damaged.
    """
    dump = Dump.at(Path(path))
    if not (dump.is_complete() or incomplete):
        raise IncompleteError(
            f"dump {shown(path)}: not complete",
            "run its extract command again, or open it with incomplete=True",
        )
    return DumpReader(dump)


class DumpReader:
    """A dump: `stages`, `keys`, `failures`, `valid`, and `dump["stage4"]`, an array with one row per image."""

    def __init__(self, dump: Dump) -> None:
        self._dump = dump
        self._open: OrderedDict[int, tuple[int, Layout]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._dump.path

    @property
    def plan(self) -> Plan:
        """What was asked."""
        return self._dump.plan

    @property
    def stages(self) -> dict[str, StoredStage]:
        """The stored stages by name, in network order."""
        return {stage.name: stage for stage in self.plan.stages}

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row."""
        return self._dump.keys()

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each key."""
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of each committed shard by number."""
        return {record["shard"]: record for record in self._dump.records()}

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The images that could not be read: key, row, reason, detail."""
        return [failure for record in self.records.values() for failure in record["failures"]]

    @cached_property
    def valid(self) -> np.ndarray:
        """(N,) bool: whether a row holds maps. It does not for failures, nor for shards that are missing."""
        valid = np.zeros(len(self), bool)
        for number in self.records:
            rows = self.plan.shard(number)
            valid[rows.start : rows.stop] = self._read(VALID, number, 0, len(rows)) == 1
        return valid

    def __len__(self) -> int:
        """Images, failed ones too: row i is image i."""
        return self.plan.num_images

    def __getitem__(self, stage: str) -> StageArray:
        """The maps of a stage. Raises UsageError for an unknown one."""
        if stage not in self.stages:
            near = nearest(stage, self.stages) or list(self.stages)
            raise UsageError(f"stage {shown(stage)} is not in this dump", f"it has {', '.join(near)}")
        return StageArray(self, self.stages[stage])

    def __repr__(self) -> str:
        return f"<dump {shown(self.path)}: {len(self)} images, stages {', '.join(self.stages)}>"

    def close(self) -> None:
        """Close the shard files; they are opened again when needed."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __enter__(self) -> DumpReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _read(self, name: str, shard: int, first: int, count: int) -> np.ndarray:
        """`count` rows of an array of a shard as they are stored, bfloat16 as uint16."""
        with self._lock:  # a shard must not be closed for another while it is read
            return self._read_locked(name, shard, first, count)

    def _read_locked(self, name: str, shard: int, first: int, count: int) -> np.ndarray:
        descriptor, layout = self._shard(shard)
        array = layout.arrays.get(name)
        if array is None or not self._is_expected(name, shard, array):
            raise DamagedError(
                f"shard {shown(self._dump.shard_path(shard))}: array {shown(name)} is not as planned",
                "delete its record: the shard is redone by the next extract",
            )
        try:
            return read_rows(descriptor, array, first, count)
        except EOFError:
            path = shown(self._dump.shard_path(shard))
            raise DamagedError(f"shard {path}: cut short", "see featcli inspect") from None

    def _is_expected(self, name: str, shard: int, array: Array) -> bool:
        rows = len(self.plan.shard(shard))
        if name == VALID:
            return array.dtype == "uint8" and array.shape == (rows,)
        stage = self.stages[name]
        return array.dtype == stage.dtype and array.shape == (rows, *stage.shape)

    def _shard(self, number: int) -> tuple[int, Layout]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._dump.shard_path(number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedError(f"shard {shown(path)}: {error.strerror}", "see featcli inspect for its state") from error
        try:
            layout = self._dump.format.read_layout(str(path))
            if (layout.attributes.get("fingerprint"), layout.attributes.get("shard")) != (
                self.plan.fingerprint,
                str(number),
            ):
                raise DamagedError(f"shard {shown(path)}: it belongs elsewhere", "see featcli inspect for its state")
        except BaseException:
            os.close(descriptor)
            raise
        self._open[number] = descriptor, layout
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[number]


class StageArray:
    """The maps of one stage over all images, read when asked for. Rows of failed images are NaN."""

    def __init__(self, reader: DumpReader, stage: StoredStage) -> None:
        self._reader = reader
        self.stage = stage

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W), or less where the maps were pooled."""
        return (len(self._reader), *self.stage.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what indexing gives. numpy has no bfloat16: its values come as float32, exactly."""
        return np.dtype(np.float32 if self.stage.dtype == "bfloat16" else NUMPY_TYPES[self.stage.dtype])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | str | slice | Sequence[int | str] | np.ndarray) -> np.ndarray:
        """One image by row or key, or several by slice, list of rows or keys, or mask.

        Raises KeyError and IndexError as a dict and an array do, IncompleteError for rows not extracted yet.
        """
        if isinstance(index, tuple):
            raise TypeError("a stage is indexed by images alone: dump[stage][image][channel]")
        if isinstance(index, list) and index and all(isinstance(i, bool) for i in index):
            index = np.array(index)
        if isinstance(index, str):
            return self._row(self._reader.rows[index])
        if isinstance(index, int | np.integer):
            return self._row(self._absolute(int(index)))
        if isinstance(index, slice):
            return self._several(range(len(self))[index])
        if isinstance(index, np.ndarray) and index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of {index.shape} for {len(self)} rows")
            return self._several(np.flatnonzero(index).tolist())
        rows = [self._reader.rows[i] if isinstance(i, str) else self._absolute(int(i)) for i in index]
        return self._several(rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._row(row) for row in range(len(self)))

    def _absolute(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row % len(self)

    def _row(self, row: int) -> np.ndarray:
        return np.asarray(self._run(row, 1)[0])

    def _several(self, rows: Sequence[int]) -> np.ndarray:
        """Rows in any order; neighbours in one shard are read at once."""
        out = np.empty((len(rows), *self.stage.shape), self.dtype)
        done = 0
        while done < len(rows):
            first, count = rows[done], 1
            room = self._reader.plan.shard_rows - first % self._reader.plan.shard_rows
            while done + count < len(rows) and count < room and rows[done + count] == first + count:
                count += 1
            out[done : done + count] = self._run(first, count)
            done += count
        return out

    def _run(self, first: int, count: int) -> np.ndarray:
        """Neighbouring rows within one shard."""
        shard, row = divmod(first, self._reader.plan.shard_rows)
        if shard not in self._reader.records:
            raise IncompleteError(f"row {first} is not extracted yet", "run the extract command of this dump again")
        return values_of(self._reader._read(self.stage.name, shard, row, count))
