"""Read tables whose cells have types: Parquet and Arrow files, and tables in the memory of a Python program."""

from __future__ import annotations

import datetime
import decimal
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from featcli.errors import UsageError, counted, one_line, shown
from featcli.inputs.table_files import Line, checked_names

AT_ONCE = 8192  # rows that are in memory at once
IN_MEMORY = "in memory"  # the name of a table without a file
AS_TEXT = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, os.PathLike)


class ArrowTable:
    """A Parquet or Arrow file. Its types are those of the cells; times and decimals become text."""

    of_texts = False

    def __init__(self, name: str, file: IO[bytes], suffix: str) -> None:
        try:
            import pyarrow
        except ImportError as error:
            raise UsageError(
                f"table {shown(name)}: pyarrow is not installed", "pip install 'featcli[parquet]', or give a CSV"
            ) from error
        self._errors = (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError)
        self._name = name
        self._file = file
        self._is_parquet = suffix in (".parquet", ".pq")
        try:
            schema = self._open().schema_arrow if self._is_parquet else self._open().schema
            types = [(field.name, str(field.type)) for field in schema]
        except self._errors as error:
            raise self._damaged(error) from error
        self.names = checked_names(name, [column for column, _ in types])
        for column, kind in types:
            if "binary" in kind:  # by itself, or somewhere inside
                raise UsageError(
                    f"table {shown(name)}: column {shown(column)} holds bytes",
                    "write the pictures to files or to a tar, and give a table of their paths without that column",
                )

    def rows(self) -> Iterator[Line]:
        """Yield the rows with their numbers from 1 on. Raises UsageError for a damaged file."""
        number = 0
        batches = self._batches()
        while True:
            try:
                batch = next(batches, None)
                if batch is not None:
                    batch.validate(full=True)  # or a damaged file would make pyarrow read memory that is not its own
                columns = [] if batch is None else [column.to_pylist() for column in batch.columns]
            except self._errors as error:
                raise self._damaged(error) from error
            if batch is None:
                return
            for cells in zip(*columns, strict=True):
                number += 1
                yield number, [_plain(cell, self._name, number) for cell in cells]

    def wrong(self, row: int, what: str, hint: str) -> UsageError:
        """Return the error that names a row of the table."""
        return UsageError(f"table {shown(self._name)}, row {row:,}: {what}", hint)

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import parquet

        self._file.seek(0)
        if self._is_parquet:
            return parquet.ParquetFile(self._file)
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        try:
            return pyarrow.ipc.open_file(self._file, options=options)
        except pyarrow.ArrowInvalid:  # the format of streams, which `datasets` writes under the same suffix
            self._file.seek(0)
            return pyarrow.ipc.open_stream(self._file, options=options)

    def _batches(self) -> Iterator[Any]:
        opened = self._open()
        if self._is_parquet:
            yield from opened.iter_batches(AT_ONCE, use_threads=False)
            return
        count = getattr(opened, "num_record_batches", None)
        whole = opened if count is None else (opened.get_batch(number) for number in range(count))
        for batch in whole:
            for first in range(0, batch.num_rows, AT_ONCE):
                yield batch.slice(first, AT_ONCE)

    def _damaged(self, error: BaseException) -> UsageError:
        kind = "Parquet" if self._is_parquet else "Arrow"
        return UsageError(
            f"table {shown(self._name)}: it is not a whole {kind} file: {one_line(error)}", "write it again"
        )


class MemoryTable:
    """A table of pandas, Arrow or polars, or a mapping from names to columns, such as lists and arrays.

    None of these libraries is imported. Raises UsageError for anything else, and for columns of several lengths.
    """

    of_texts = False

    def __init__(self, table: Any) -> None:
        self._table = table
        names, self._columns = _columns_of(table)
        self.names = checked_names(IN_MEMORY, [str(name) for name in names])
        lengths = [len(column) for column in self._columns]
        if not lengths:
            raise UsageError("the table has no columns", "give a column of paths, such as {'path': [...]}")
        for name, length in zip(self.names, lengths, strict=True):
            if length != lengths[0]:
                raise UsageError(
                    f"the columns {shown(self.names[0])} and {shown(name)} have {counted(lengths[0], 'row')} and"
                    f" {counted(length, 'row')}",
                    "give columns of one length",
                )
        self._count = lengths[0]

    def rows(self) -> Iterator[Line]:
        """Yield the rows with their numbers from 1 on."""
        for first in range(0, self._count, AT_ONCE):
            some = [_listed(column[first : first + AT_ONCE]) for column in self._columns]
            for number, cells in enumerate(zip(*some, strict=True), first + 1):
                yield number, [_plain(cell, IN_MEMORY, number) for cell in cells]

    def wrong(self, row: int, what: str, hint: str) -> UsageError:
        """Return the error that names a row of the table."""
        return UsageError(f"table in memory, row {row:,}: {what}", hint)


def _columns_of(table: Any) -> tuple[Sequence[Any], list[Any]]:
    """Return names and columns. Each column has a length, and slices of it are columns, too."""
    if isinstance(table, Mapping):
        names, columns = list(table), list(table.values())
    elif hasattr(table, "iloc") and hasattr(table, "columns"):  # pandas, in which two columns may have one name
        names = list(table.columns)
        columns = [table.iloc[:, place].array for place in range(len(names))]
    elif hasattr(table, "column_names") and hasattr(table, "column"):  # Arrow
        names = list(table.column_names)
        columns = [table.column(place) for place in range(len(names))]
    elif hasattr(table, "get_columns"):  # polars
        columns = list(table.get_columns())
        names = [column.name for column in columns]
    else:
        raise UsageError(
            f"a table of type {type(table).__name__} cannot be read",
            "give the path of one, a pandas or Arrow table, or a mapping from names to lists",
        )
    for name, column in zip(names, columns, strict=True):
        if isinstance(column, str | bytes | Mapping) or not (
            hasattr(column, "__len__") and hasattr(column, "__getitem__") and getattr(column, "ndim", 1) == 1
        ):
            raise UsageError(
                f"column {shown(name)} is not a list or an array of one dimension", "give a value for each row"
            )
    return names, columns


def _listed(some: Any) -> list[Any]:
    """Return some cells as Python has them."""
    for method in ("to_pylist", "to_list", "tolist"):
        if hasattr(some, method):
            found: list[Any] = getattr(some, method)()
            return found
    return list(some)


def _plain(cell: Any, table: str, row: int) -> Any:
    """Return a cell as JSON can hold it; None for what libraries have for missing ones. Raises UsageError."""
    if cell is None or type(cell) in (str, int, bool):
        return _whole_text(cell, table, row) if type(cell) is str and not cell.isascii() else cell
    if isinstance(cell, float):
        return None if math.isnan(cell) else float(cell)
    if type(cell).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    if isinstance(cell, AS_TEXT):
        return _as_text(cell)
    if isinstance(cell, Mapping):
        return {str(name): _plain(one, table, row) for name, one in cell.items()}
    if isinstance(cell, list | tuple):
        return [_plain(one, table, row) for one in cell]
    if isinstance(cell, str | int):  # numpy's text, enumerations
        return _plain(str(cell) if isinstance(cell, str) else int(cell), table, row)
    if hasattr(cell, "tolist"):  # numpy's scalars and arrays
        return _plain(cell.tolist(), table, row)
    raise UsageError(
        f"table {shown(table)}, row {row:,}: a cell of type {type(cell).__name__} cannot be kept",
        "leave its column out, or give text or numbers",
    )


def _as_text(cell: Any) -> str:
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return os.fspath(cell) if isinstance(cell, os.PathLike) else str(cell)


def _whole_text(text: str, table: str, row: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"table {shown(table)}, row {row:,}: {shown(text)} is not valid text", "write it as UTF-8"
        ) from error
    return text
