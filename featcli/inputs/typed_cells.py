"""Turn cells of Arrow, numpy, pandas and polars into values that JSON can hold, the same whoever holds them."""

from __future__ import annotations

import datetime
import decimal
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from featcli.errors import UsageError, one_line, shown

AS_TEXT = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID, os.PathLike)


def column_cells(some: Any, called: str) -> list[Any]:
    """Return some cells of a column as Python has them. `called` is the column for people. Raises UsageError.

    Nanoseconds, which Python lacks, make text of a time or a duration.
    """
    try:
        return _listed(some)
    except Exception as error:  # libraries raise whatever they like for values that Python lacks
        raise UsageError(f"{called} cannot be read: {one_line(error)}", "write it as text, or leave it out") from error


def _listed(some: Any) -> list[Any]:
    if isinstance(some, np.ndarray) and some.dtype.kind in "mM" and np.datetime_data(some.dtype)[0] == "ns":
        numbers = [None if missing else int(one) for missing, one in zip(np.isnat(some), some.view("i8"), strict=True)]
        return _in_nanoseconds(numbers, lambda micro: np.array(micro, f"{some.dtype.kind}8[us]").tolist())
    kind = str(getattr(some, "type", ""))
    if kind.startswith(("timestamp[ns", "duration[ns")):  # of Arrow, which would give what pandas has, if it is there
        import pyarrow

        to = pyarrow.duration("us") if kind.startswith("d") else pyarrow.timestamp("us", some.type.tz)
        return _in_nanoseconds(
            some.cast("int64").to_pylist(), lambda micro: pyarrow.array(micro, "int64").cast(to).to_pylist()
        )
    for method in ("to_pylist", "tolist", "to_list"):
        if hasattr(some, method):
            found: list[Any] = getattr(some, method)()
            return found
    return list(some)


def _in_nanoseconds(numbers: list[int | None], from_micro: Callable[[list[int | None]], list[Any]]) -> list[Any]:
    """Return times or durations from their nanoseconds; `from_micro` makes them from microseconds."""
    whole = from_micro([None if number is None else number // 1000 for number in numbers])
    return [cell if n is None else _finer(cell, n % 1000) for cell, n in zip(whole, numbers, strict=True)]


def _finer(cell: Any, nanoseconds: int) -> Any:
    """Return a time or a duration, as text if it has nanoseconds beside its microseconds."""
    if not nanoseconds:
        return cell
    if isinstance(cell, datetime.timedelta):
        return f"{cell}{'' if cell.microseconds else '.000000'}{nanoseconds:03d}"
    text = cell.isoformat(timespec="microseconds")  # a time zone may stand behind it
    return f"{text[:26]}{nanoseconds:03d}{text[26:]}"


def plain_cells(cells: Sequence[Any], names: Sequence[str], row: str) -> list[Any]:
    """Return the cells of a row as JSON can hold them; None for what libraries have for missing ones.

    `names` are those of the columns, `row` is the row for people. Raises UsageError with both.
    """
    try:
        return [_plain(cell) for cell in cells]
    except (UsageError, RecursionError):
        for name, cell in zip(names, cells, strict=True):
            try:
                _plain(cell)
            except UsageError as error:
                raise UsageError(f"{row}: column {shown(name)} holds {error.message}", error.hint) from error
            except RecursionError as error:
                raise UsageError(f"{row}: column {shown(name)} is nested too deeply", "leave it out") from error
        raise


def _plain(cell: Any) -> Any:
    if cell is None or type(cell) in (str, int, bool):
        return _whole_text(cell) if type(cell) is str and not cell.isascii() else cell
    if isinstance(cell, float):
        return None if math.isnan(cell) else float(cell)
    if type(cell).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    if isinstance(cell, AS_TEXT):
        return _as_text(cell)
    if isinstance(cell, Mapping):
        return {str(name): _plain(one) for name, one in cell.items()}
    if isinstance(cell, list | tuple):
        return [_plain(one) for one in cell]
    if isinstance(cell, str | int):  # numpy's text, enumerations
        return _plain(str(cell) if isinstance(cell, str) else int(cell))
    if hasattr(cell, "tolist"):  # numpy's scalars and arrays
        is_time = isinstance(cell, np.datetime64 | np.timedelta64)
        return _plain(_listed(cell.reshape(1))[0] if is_time else cell.tolist())
    raise UsageError(
        f"a cell of type {type(cell).__name__}, which cannot be kept",
        "leave its column out, or give text or numbers",
    )


def _as_text(cell: Any) -> str:
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    if isinstance(cell, datetime.timedelta):  # also one of pandas, which writes them in another way
        return str(
            _finer(datetime.timedelta(cell.days, cell.seconds, cell.microseconds), getattr(cell, "nanoseconds", 0))
        )
    return os.fspath(cell) if isinstance(cell, os.PathLike) else str(cell)


def _whole_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{shown(text)}, which is not valid text", "write it as UTF-8") from error
    return text
