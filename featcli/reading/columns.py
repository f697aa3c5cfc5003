"""Give the columns of a dump: arrays by name, rows by value, and the labels that a dataset has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featcli.errors import UsageError, any_of, did_you_mean, nearest, shown
from featcli.inputs.cells import EXACT, Kind

NUMBERS = ("int", "float")
KINDS_SAID = {"bool": "true or false", "int": "whole numbers", "float": "numbers", "text": "texts", "json": "JSON"}
MOST_SHARED = 65_536  # different texts of a column that are held once for all rows
NAMED = 5  # values that a message names

Cells = Mapping[str, Any]  # of one row, by column, as columns.jsonl holds them
CellsOf = Callable[[Collection[str]], Iterator[Cells]]  # some columns -> their cells, and maybe others', of each row


class Columns(Mapping[str, np.ndarray]):
    """The columns of a dump by name, each an array (N,) in row order, read from the disk when it is first asked for.

    Whole numbers are int64, other numbers float64, true and false bool. Where cells are missing, numbers are float64
    with NaN, and all else is an array of objects with None, as texts always are. A name such as `json.width` reaches
    into the objects of the column `json`.
    """

    def __init__(self, kinds: Mapping[str, Kind], cells: CellsOf, num_rows: int) -> None:
        self.kinds = dict(kinds)
        self.cells = cells
        self._num_rows = num_rows
        self._arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column. Raises KeyError, DamagedError and MachineError."""
        if name not in self._arrays:
            if name not in self:
                near = nearest(str(name), self.kinds)
                there = f"there are {', '.join(self.kinds)}" if self.kinds else "the dump has no columns"
                raise KeyError(f"no column {shown(name)}: " + did_you_mean(near, there))
            self._arrays[name] = _array(self.values_of(name), self.kinds.get(name, "json"), self._num_rows)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __contains__(self, name: object) -> bool:
        return name in self.kinds or (isinstance(name, str) and self.kinds.get(name.partition(".")[0]) == "json")

    def __repr__(self) -> str:
        return f"<columns {', '.join(f'{name} ({kind})' for name, kind in self.kinds.items())}>"

    def values_of(self, name: str) -> Iterator[Any]:
        """Yield the values of a column in row order as Python has them; None for a missing one.

        Raises DamagedError and MachineError.
        """
        if name in self.kinds:
            kind = self.kinds[name]
            return (as_python(cells[name], kind) for cells in self.cells([name]))
        outer, _, inner = name.partition(".")
        found = (cells[outer] for cells in self.cells([outer]))
        return (cell.get(inner) if isinstance(cell, dict) else None for cell in found)

    def rows(self, numbers: Sequence[int]) -> Iterator[tuple[int, Cells]]:
        """Yield the number and the cells of each of these rows, whose numbers ascend, in one reading of the file.

        Cells are as columns.jsonl holds them: see `as_python`. The file is compared with its hash before the last row
        is given. Raises DamagedError and MachineError.
        """
        if not self.kinds:
            yield from ((number, {}) for number in numbers)
            return
        rows = enumerate(self.cells(self.kinds))
        for number in numbers:
            cells = next(cells for row, cells in rows if row == number)
            if number == numbers[-1]:
                for _ in rows:
                    pass
            yield number, cells

    def where(self, conditions: Mapping[str, Any]) -> np.ndarray:
        """Return (N,) bool: the rows whose cells have these values.

        A list, tuple or set of values means any of them, and None means a missing cell. Raises UsageError for a column
        that is not there, and for a value that its column cannot hold.
        """
        chosen = np.ones(self._num_rows, bool)
        for name, asked in conditions.items():
            if name not in self:
                there = f"the columns are {', '.join(self.kinds)}" if self.kinds else "the dump has no columns"
                raise UsageError(f"there is no column {shown(name)}", did_you_mean(nearest(name, self.kinds), there))
            wanted = list(asked) if isinstance(asked, list | tuple | set | frozenset | np.ndarray) else [asked]
            wanted = [one.item() if isinstance(one, np.generic) else one for one in wanted]
            for one in wanted:
                self._refuse_other(name, one)
            chosen &= _are_among(self[name], wanted)
        return chosen

    def _refuse_other(self, name: str, value: Any) -> None:
        kind = self.kinds.get(name, "json")
        is_flag = isinstance(value, bool)
        fits = {
            "text": isinstance(value, str),
            "bool": is_flag,
            "int": isinstance(value, int | float) and not is_flag,
            "float": isinstance(value, int | float) and not is_flag,
            "json": True,
        }
        if value is not None and not fits[kind]:
            raise UsageError(
                f"column {shown(name)} holds {KINDS_SAID[kind]}, so no cell is {value!r}", "give a value of its kind"
            )

    def parsed(self, name: str, text: str) -> Any:
        """Return the value of a column that a text in a shell means; the empty text means a missing cell.

        Raises UsageError.
        """
        kind = self.kinds.get(name, "json")
        if not text or kind == "text":
            return text or None
        try:
            return json.loads(text.lower() if kind == "bool" else text)
        except (ValueError, RecursionError):
            return text

    def classes_of(self, name: str, values: Iterable[Any] | None = None) -> list[Any]:
        """Return the values that occur in a column, sorted, without missing ones. Raises UsageError for lists.

        `values` are those of the column, if they were read already.
        """
        try:
            return sorted({*(self.values_of(name) if values is None else values)} - {None})
        except TypeError:
            raise UsageError(
                f"column {shown(name)} holds {KINDS_SAID['json']}, which has no order", "choose another column"
            ) from None


def as_python(cell: Any, kind: Kind) -> Any:
    """Return the value of a cell, whose infinity is a text where its column holds numbers; None for a missing one."""
    return float(cell) if kind == "float" and cell is not None else cell


def no_such_rows(columns: Columns, conditions: Mapping[str, Any]) -> UsageError:
    """Return the error for conditions that no row meets, with values that are there."""
    for name, asked in conditions.items():
        if not columns.where({name: asked}).any():
            there = columns.classes_of(name) if columns.kinds.get(name, "json") != "json" else []
            hint = "look at the column first"
            if there:
                hint = f"use {any_of([str(one) for one in there[:NAMED]])}" + (", ..." if len(there) > NAMED else "")
            return UsageError(f"no row has {name} = {shown(asked)}", hint)
    said = " and ".join(f"{name} = {shown(asked)}" for name, asked in conditions.items())
    return UsageError(f"no row has {said}", "leave one of them out: each occurs, but in other rows")


def _array(values: Iterable[Any], kind: Kind, count: int) -> np.ndarray:
    """Return values as an array. Equal texts become one object, so that a column of few classes stays small."""
    if kind in NUMBERS:
        return _numbers(values, kind, count)
    if kind == "text":
        shared: dict[str, str] = {}
        values = (
            shared.setdefault(value, value) if len(shared) < MOST_SHARED else shared.get(value, value)
            for value in values
        )
    found = np.empty(count, object)
    row = -1
    for row, value in enumerate(values):
        found[row] = value
    assert row + 1 == count
    if kind == "bool" and not any(value is None for value in found):
        return found.astype(bool)
    return found


def _numbers(values: Iterable[Any], kind: Kind, count: int) -> np.ndarray:
    """Return int64 or float64 with NaN; whole numbers that float64 does not hold stay objects if some are missing."""
    if kind == "float":
        # Without a count, because the file is compared with its hash behind its last row.
        numbers = np.fromiter((math.nan if value is None else value for value in values), np.float64)
        assert len(numbers) == count
        return numbers
    found, missing = np.zeros(count, np.int64), np.zeros(count, bool)
    for row, value in enumerate(values):
        if value is None:
            missing[row] = True
        else:
            found[row] = value
    if not missing.any():
        return found
    if np.abs(found).max(initial=0) > EXACT:
        as_objects = found.astype(object)
        as_objects[missing] = None
        return as_objects
    as_floats = found.astype(np.float64)
    as_floats[missing] = np.nan
    return as_floats


def _are_among(column: np.ndarray, wanted: list[Any]) -> np.ndarray:
    chosen = np.zeros(len(column), bool)
    for one in wanted:
        if one is None:
            is_number = column.dtype.kind == "f"
            chosen |= np.isnan(column) if is_number else np.fromiter((v is None for v in column), bool, len(column))
        elif column.dtype == object:
            chosen |= np.fromiter((type(v) is not bool and v == one if type(one) is not bool else v is one
                                   for v in column), bool, len(column))  # fmt: skip
        else:
            chosen |= column == one
    return chosen


def as_arrow(columns: Columns, keys: list[str]) -> Any:
    """Return a pyarrow.Table of `key` and the columns. Values of `json` are nested, or text if they have several types.

    Text that is not UTF-8 is escaped. Raises UsageError if pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UsageError("pyarrow is not installed", "pip install 'featcli[parquet]'") from error
    types = arrow_types()
    found = {"key": pyarrow.array([as_utf8(key) for key in keys], pyarrow.string())}
    for name, kind in columns.kinds.items():
        values = list(columns.values_of(name))
        if kind == "text":  # labels of folders, whose names may be any bytes
            values = [None if value is None else as_utf8(value) for value in values]
        array = arrow_nested(values) if kind == "json" else pyarrow.array(values, types[kind])
        found[name if name != "key" else "column.key"] = array
    return pyarrow.table(found)


def arrow_types() -> dict[str, Any]:
    """Return the type of Arrow for each kind of column but `json`."""
    import pyarrow

    return {"bool": pyarrow.bool_(), "int": pyarrow.int64(), "float": pyarrow.float64(), "text": pyarrow.string()}


def as_utf8(text: str) -> str:
    """Return a text as UTF-8 can hold it: bytes of names that are none are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def arrow_nested(values: list[Any]) -> Any:
    """Return values of JSON as an Arrow array: nested if one type fits all, else their JSON as text."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return pyarrow.array([None if value is None else json.dumps(value) for value in values], pyarrow.string())
