"""Reading a dump back: `open_dump(path)`, lazy arrays by stage, rows by number or key. One way for both formats."""

from __future__ import annotations

import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump import Dump
from featcli.errors import DamagedError, IncompleteError, UsageError, nearest, shown
from featcli.plan import Plan, StoredStage
from featcli.writers.files import open_regular
from featcli.writers.layout import SHAPES, VALID, Layout
from featcli.writers.rows import NUMPY_TYPES, read_rows, starts_of, values_of

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
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
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
        valid = np.zeros(len(self.keys), bool)  # of the list that is there, whatever the plan claims
        for number in self.records:
            rows = self.plan.shard(number)
            valid[rows.start : rows.stop] = self._read(VALID, number, 0, len(rows)) == 1
        return valid

    def __len__(self) -> int:
        """Images, failed ones too: row i is image i."""
        return self.plan.num_images

    def __iter__(self) -> Iterator[str]:
        """The names of the stages, in network order."""
        return iter(self.stages)

    def __contains__(self, stage: object) -> bool:
        return stage in self.stages

    def __getitem__(self, stage: str) -> StageArray:
        """The maps of a stage. Raises UsageError for an unknown one."""
        if stage not in self.stages:
            near = (nearest(stage, self.stages) if isinstance(stage, str) else []) or list(self.stages)
            raise UsageError(f"stage {shown(str(stage))} is not in this dump", f"it has {', '.join(near)}")
        return StageArray(self, self.stages[stage])

    def __repr__(self) -> str:
        return f"<dump {shown(self.path)}: {len(self)} images, stages {', '.join(self.stages)}>"

    def close(self) -> None:
        """Close the shard files; they are opened again when needed."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1].descriptor)

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
        found = self._shard(shard)
        array = found.layout.arrays[name]
        try:
            return read_rows(found.descriptor, array, first, count)
        except EOFError:
            path = shown(self._dump.shard_path(shard))
            raise DamagedError(f"shard {path}: cut short", "see featcli inspect") from None

    def _starts(self, stage: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a stage whose maps differ in size: (rows, 3) shapes, and where each map begins among the values."""
        with self._lock:
            found = self._shard(shard)
            return found.shapes[stage], found.starts[stage]

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._dump.shard_path(number)
        try:
            descriptor = open_regular(path)
        except (OSError, ValueError) as error:
            cause = (isinstance(error, OSError) and error.strerror) or error
            raise DamagedError(f"shard {shown(path)}: {cause}", "see featcli inspect for its state") from error
        try:
            layout = self._dump.format.read_layout(str(path), None)
            if (layout.attributes.get("fingerprint"), layout.attributes.get("shard")) != (
                self.plan.fingerprint,
                str(number),
            ):
                raise DamagedError(f"shard {shown(path)}: it belongs elsewhere", "see featcli inspect for its state")
            shapes, starts = checked_shapes(self._dump, number, descriptor, layout)
        except BaseException:
            os.close(descriptor)
            raise
        self._open[number] = _OpenShard(descriptor, layout, shapes, starts)
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return self._open[number]


@dataclass(frozen=True)
class _OpenShard:
    descriptor: int
    layout: Layout
    shapes: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]


class StageArray:
    """The maps of one stage over all images, read when asked for. Rows of failed images are NaN.

    Where maps differ in size (`--fit native`), several are a list of arrays, and `shape` has None for both edges.
    """

    def __init__(self, reader: DumpReader, stage: StoredStage) -> None:
        self._reader = reader
        self.stage = stage

    @property
    def shape(self) -> tuple[int | None, ...]:
        """(N, C, H, W), or less where the maps were pooled."""
        return (len(self._reader), *self.stage.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what indexing gives. numpy has no bfloat16: its values come as float32, exactly."""
        return np.dtype(np.float32 if self.stage.dtype == "bfloat16" else NUMPY_TYPES[self.stage.dtype])

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int | str | slice | Sequence[int | str] | np.ndarray) -> Any:
        """One image by row or key, or several by slice, list of rows or keys, or mask.

        Raises KeyError and IndexError as a dict and an array do, IncompleteError for rows not extracted yet.
        """
        if isinstance(index, slice):
            return self._several(range(len(self))[index])
        if isinstance(index, str):
            return self._row(self._reader.rows[index])
        if isinstance(index, tuple | bytes | bool | np.bool_):
            raise TypeError("a stage is indexed by images alone: dump[stage][image][channel]")
        if not hasattr(index, "__len__") or getattr(index, "shape", None) == ():
            return self._row(self._absolute(operator.index(index)))  # type: ignore[arg-type]
        return self._several(self._rows_of(index))

    def _rows_of(self, index: Any) -> list[int]:
        """A mask, or rows and keys in any order, as rows. Whatever holds other things is an error, never a guess."""
        listed = index.tolist() if hasattr(index, "tolist") else [getattr(i, "item", lambda i=i: i)() for i in index]
        if listed and all(type(i) is bool for i in listed):
            if len(listed) != len(self):
                raise IndexError(f"a mask of {len(listed)} for {len(self)} rows")
            return [row for row, chosen in enumerate(listed) if chosen]
        wrong = [i for i in listed if type(i) not in (int, str)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is neither a row nor a key")
        return [self._reader.rows[i] if isinstance(i, str) else self._absolute(i) for i in listed]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._row(row) for row in range(len(self)))

    def _absolute(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row % len(self)

    def _row(self, row: int) -> np.ndarray:
        return np.asarray(self._run(row, 1)[0])

    def _several(self, rows: Sequence[int]) -> np.ndarray | list[np.ndarray]:
        """Rows in any order; neighbours in one shard are read at once."""
        if self.stage.is_ragged:
            return [found for run in self._neighbours(rows) for found in self._run(run.start, len(run))]
        if len(rows):
            self._run(rows[0], 1)  # a plan may claim any shape: the file has the last word before memory is taken
        out, done = np.empty((len(rows), *self.stage.shape_at((0, 0))), self.dtype), 0
        for run in self._neighbours(rows):
            out[done : done + len(run)] = self._run(run.start, len(run))
            done += len(run)
        return out

    def _neighbours(self, rows: Sequence[int]) -> Iterator[range]:
        """The rows, in their order, as runs of neighbours within one shard."""
        done = 0
        while done < len(rows):
            first, count = rows[done], 1
            room = self._reader.plan.shard_rows - first % self._reader.plan.shard_rows
            while done + count < len(rows) and count < room and rows[done + count] == first + count:
                count += 1
            yield range(first, first + count)
            done += count

    def _run(self, first: int, count: int) -> np.ndarray | list[np.ndarray]:
        """Neighbouring rows within one shard."""
        shard, row = divmod(first, self._reader.plan.shard_rows)
        if shard not in self._reader.records:
            raise IncompleteError(f"row {first} is not extracted yet", "run the extract command of this dump again")
        name = self.stage.name
        if not self.stage.is_ragged:
            return values_of(self._reader._read(name, shard, row, count))
        shapes, starts = self._reader._starts(name, shard)
        begin, end = int(starts[row]), int(starts[row + count])
        values = values_of(self._reader._read(name, shard, begin, end - begin))
        return [values[starts[i] - begin : starts[i + 1] - begin].reshape(shapes[i]) for i in range(row, row + count)]


def checked_shapes(
    dump: Dump, number: int, descriptor: int, layout: Layout
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For the stages of a shard whose maps differ in size: (rows, 3) shapes, and where each map begins.

    Raises DamagedError where the shard's arrays are not those of the plan.
    """
    shapes: dict[str, np.ndarray] = {}
    starts: dict[str, np.ndarray] = {}
    try:
        for stage in dump.plan.stages:
            if stage.is_ragged:
                array = layout.arrays[stage.name + SHAPES]
                if array.dtype != "uint32" or array.shape != (len(dump.plan.shard(number)), 3):
                    raise ValueError("shapes that are none")
                shapes[stage.name] = read_rows(descriptor, array, 0, array.shape[0])
                if (shapes[stage.name][:, 0] != stage.shape[0]).any():
                    raise ValueError("shapes of other channels")
                starts[stage.name] = starts_of(shapes[stage.name], layout.arrays[stage.name].shape[0])
        found = {name: (array.dtype, array.shape) for name, array in layout.arrays.items()}
        if found != dump.plan.arrays(number, shapes):
            raise ValueError("other arrays")
    except (KeyError, IndexError, ValueError, EOFError) as error:
        raise DamagedError(
            f"shard {shown(dump.shard_path(number))}: its arrays are not as planned",
            "delete its record: the shard is redone by the next extract",
        ) from error
    return shapes, starts
