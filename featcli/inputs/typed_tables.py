"""Read tables whose cells have types: Parquet and Arrow files, and tables in the memory of a Python program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from featcli.errors import FeatcliError, UsageError, counted, one_line, shown
from featcli.inputs.cells import LONGEST_LINE
from featcli.inputs.table_files import Line, checked_names
from featcli.inputs.typed_cells import column_cells, plain_cells
from featcli.system.faults import is_of_machine, machine_error
from featcli.system.files import ReadFile

AT_ONCE = 8192  # rows that are in memory at once
AT_ONCE_PARQUET = 256  # fewer, because a cell of many bytes that is repeated takes few of them in the file
NULL = 4  # bytes of a missing value in a list, as JSON has it
BYTES_AT_ONCE = 1 << 27  # of these rows, as the file says
IN_MEMORY = "in memory"  # the name of a table without a file
TABLE_IN_MEMORY = f"table {IN_MEMORY}"  # for people


class ArrowTable:
    """A Parquet or Arrow file. Its types are those of the cells; times and decimals become text."""

    of_texts = False
    unit = "row"

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
            holds_bytes = {field.name: _holds_bytes(field.type) for field in schema}
            names = [field.name for field in schema]
        except self._errors as error:
            raise self._damaged(error) from error
        self.names = checked_names(f"table {shown(name)}", names)
        for column in names:
            if holds_bytes[column]:
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
            except UsageError:
                raise
            except self._errors as error:
                raise self._damaged(error) from error
            if batch is None:
                return
            columns = [
                column_cells(column, f"table {shown(self._name)}: column {shown(name)}")
                for name, column in zip(self.names, batch.columns, strict=True)
            ]
            for cells in zip(*columns, strict=True):
                number += 1
                yield number, plain_cells(cells, self.names, f"table {shown(self._name)}, row {number:,}")

    def wrong(self, row: int, what: str, hint: str) -> UsageError:
        """Return the error that names a row of the table."""
        return UsageError(f"table {shown(self._name)}, row {row:,}: {what}", hint)

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import parquet

        source = self._source()
        if self._is_parquet:
            return parquet.ParquetFile(source)
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        try:
            return pyarrow.ipc.open_file(source, options=options)
        except pyarrow.ArrowInvalid:  # the format of streams, which `datasets` writes under the same suffix
            return pyarrow.ipc.open_stream(self._source(), options=options)

    def _source(self) -> Any:
        """Return the file as pyarrow reads it by itself.

        Its threads let go of what they have read at any time, and if that is memory of Python while Python ends, the
        process is aborted.
        """
        import pyarrow

        if isinstance(self._file, ReadFile):
            return pyarrow.OSFile(self._file.regular.name)
        self._file.seek(0)
        content = self._file.read()
        buffer = pyarrow.allocate_buffer(len(content))
        memoryview(buffer).cast("B")[:] = content
        return pyarrow.BufferReader(buffer)

    def _batches(self) -> Iterator[Any]:
        opened = self._open()
        if self._is_parquet:
            yield from opened.iter_batches(self._rows_at_once(opened), use_threads=False)
            return
        count = getattr(opened, "num_record_batches", None)
        whole = opened if count is None else (opened.get_batch(number) for number in range(count))
        for batch in whole:
            for first in range(0, batch.num_rows, AT_ONCE):
                yield batch.slice(first, AT_ONCE)

    def _rows_at_once(self, opened: Any) -> int:
        """Return how many rows of a Parquet file may be in memory at once. Raises UsageError if not even one may."""
        metadata = opened.metadata
        groups = [*map(metadata.row_group, range(metadata.num_row_groups))]
        most: int = max([1, *(group.total_byte_size // max(1, group.num_rows) for group in groups)])
        lists = [n for n in range(metadata.num_columns) if metadata.schema.column(n).max_repetition_level]
        if lists and most <= LONGEST_LINE:  # of missing values, which may take no bytes at all
            # Reads them, value by value: what a column says of itself ends the process if it is damaged.
            opened.scan_contents([metadata.schema.column(number).path for number in lists])
            for group in groups:
                values = sum(group.column(number).num_values for number in lists)
                most = max(most, NULL * values // max(1, group.num_rows))
        if most > LONGEST_LINE:
            raise UsageError(
                f"table {shown(self._name)}: its rows have {most:,} bytes each, more than {LONGEST_LINE:,}",
                "leave long columns out",
            )
        return min(AT_ONCE_PARQUET, max(1, BYTES_AT_ONCE // most))

    def _damaged(self, error: BaseException) -> FeatcliError:
        if isinstance(error, OSError) and is_of_machine(error):
            return machine_error(f"table {shown(self._name)}", error)
        kind = "Parquet" if self._is_parquet else "Arrow"
        return UsageError(
            f"table {shown(self._name)}: it is not a whole {kind} file: {one_line(error)}", "write it again"
        )


class MemoryTable:
    """A table of pandas, Arrow or polars, or a mapping from names to columns, such as lists and arrays.

    None of these libraries is imported. Raises UsageError for anything else, and for columns of several lengths.
    """

    of_texts = False
    unit = "row"

    def __init__(self, table: Any) -> None:
        self._table = table
        names, self._columns = _columns_of(table)
        self.names = checked_names(TABLE_IN_MEMORY, [str(name) for name in names])
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
            some = [
                column_cells(column[first : first + AT_ONCE], f"{TABLE_IN_MEMORY}: column {shown(name)}")
                for name, column in zip(self.names, self._columns, strict=True)
            ]
            for number, cells in enumerate(zip(*some, strict=True), first + 1):
                yield number, plain_cells(cells, self.names, f"{TABLE_IN_MEMORY}, row {number:,}")

    def wrong(self, row: int, what: str, hint: str) -> UsageError:
        """Return the error that names a row of the table."""
        return UsageError(f"{TABLE_IN_MEMORY}, row {row:,}: {what}", hint)


def _columns_of(table: Any) -> tuple[Sequence[Any], list[Any]]:
    """Return names and columns. Each column has a length, and slices of it are columns, too."""
    if isinstance(table, Mapping):
        names, columns = list(table), list(table.values())
    elif hasattr(table, "iloc") and hasattr(table, "columns"):  # pandas, in which two columns may have one name
        if getattr(table.columns, "nlevels", 1) > 1:
            raise UsageError(
                f"{TABLE_IN_MEMORY}: the names of its columns have several levels",
                "make one of them first: table.columns = ['_'.join(map(str, name)) for name in table.columns]",
            )
        index: Any = getattr(
            table, "index", None
        )  # a column like others if it has a name, as in files that pandas writes
        levels = [place for place, name in enumerate(getattr(index, "names", ())) if name is not None]
        names = [*(index.names[place] for place in levels), *table.columns]
        columns = [index.get_level_values(place).array for place in levels]
        columns += [table.iloc[:, place].array for place in range(len(table.columns))]
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


def _holds_bytes(kind: Any) -> bool:
    """Return whether cells of this type of Arrow are bytes, or have some inside."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return kind.extension_name != "arrow.uuid" and _holds_bytes(kind.storage_type)
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    inner += [kind.value_type] if hasattr(kind, "value_type") else []
    return "binary" in str(kind).partition("<")[0].partition("[")[0] or any(map(_holds_bytes, inner))
