"""Write the user's columns into an HDF5 file by h5py, a dataset for each, before the rows of maps are there.

Numbers are int64 or float64, and true and false are what h5py makes of bool. Where one of these is missing, the column
is float64 with NaN. All else is text: JSON where the kind is json, so that null is a missing cell. A missing text is
the empty text, and the dataset `NAME.missing` tells it from those that were empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from featcli.dump.atomic_file import write_all
from featcli.dump.formats.hdf5 import PlacedFile
from featcli.errors import UsageError, shown
from featcli.export.content import Content, free_names
from featcli.inputs.cells import EXACT, Kind
from featcli.reading.columns import as_python, as_utf8

MISSING = ".missing"  # ends the name of the dataset that says which texts are missing
AT_ONCE = 8192  # rows whose cells are in memory at once
NUMBERS: dict[Kind, type] = {"bool": bool, "int": np.int64, "float": np.float64}


def add_columns(content: Content, path: Path) -> None:
    """Add the columns to the HDF5 file at `path`.

    Raises UsageError for a text that HDF5 cannot hold, before the file is changed, OSError, DamagedError and
    MachineError.
    """
    columns = [_Column(column, name, content.kinds[name]) for column, name in content.columns.items()]
    if not columns:
        return
    for _, cells in content.cells():
        for column in columns:
            column.learn(cells[column.name])
    with _opened(path) as file:
        links = free_names([_link(column.name) for column in columns], {*file, "", "."})
        masks = free_names([link + MISSING for link in links], {*file, *links})
        for column, link, mask in zip(columns, links, masks, strict=True):
            column.create(file, link, mask, len(content.rows))
        first, rows = 0, content.cells()
        while some := [cells for _, cells in islice(rows, AT_ONCE)]:
            for column in columns:
                column.write(first, [cells[column.name] for cells in some])
            first += len(some)


class _Column:
    """A column, what its cells have in common, and its datasets."""

    def __init__(self, column: str, name: str, kind: Kind) -> None:
        self.name = name  # in the file
        self._column = column  # its name in the dump
        self._kind: Kind = kind
        self._has_missing = False
        self._is_exact = True  # float64 holds each of its whole numbers
        self._values: Any = None  # datasets
        self._mask: Any = None

    def learn(self, cell: Any) -> None:
        """Take a cell into account. Raises UsageError for a text that HDF5 cannot hold."""
        if cell is None:
            self._has_missing = True
        elif self._kind == "int" and abs(cell) > EXACT:
            self._is_exact = False
        elif self._kind == "text" and "\0" in cell:
            raise UsageError(
                f"column {shown(self._column)}: {shown(cell[:40])} has a zero byte in it, at which HDF5 ends a text",
                "name a .parquet or .jsonl file",
            )

    def create(self, file: Any, link: str, mask: str, count: int) -> None:
        """Create the datasets. Attributes say the kind, the name of the column in the dump, and that of the mask."""
        import h5py

        self._values = file.create_dataset(link, (count,), self._dtype or h5py.string_dtype())
        self._values.attrs["column"], self._values.attrs["kind"] = _text(self._column), self._kind
        if self._kind == "text" and self._has_missing:
            self._mask = file.create_dataset(mask, (count,), bool)
            self._values.attrs["missing"] = mask

    def write(self, first: int, cells: Sequence[Any]) -> None:
        """Write the cells of some rows from `first` on."""
        place = slice(first, first + len(cells))
        if self._dtype is not None:
            values = [np.nan if cell is None else as_python(cell, self._kind) for cell in cells]
            self._values[place] = np.array(values, self._dtype)
        elif self._kind == "text":
            self._values[place] = np.array(["" if cell is None else _text(cell) for cell in cells], object)
        else:
            self._values[place] = np.array([json.dumps(cell) for cell in cells], object)
        if self._mask is not None:
            self._mask[place] = np.array([cell is None for cell in cells])

    @property
    def _dtype(self) -> type | None:
        """The type of its numbers; None if it is text."""
        if self._kind not in NUMBERS or (self._has_missing and not self._is_exact):
            return None
        return np.float64 if self._has_missing else NUMBERS[self._kind]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file for h5py. What went wrong below it is raised once h5py has closed the file."""
    import h5py

    with path.open("r+b", buffering=0) as raw:
        remembering = _Remembering(raw)
        try:
            with h5py.File(remembering, "r+") as file:
                yield file
        finally:
            if remembering.error is not None:
                raise remembering.error


class _Remembering(PlacedFile):
    """A file that remembers the first error, and then does nothing, because HDF5 cannot close a file that fails.

    HDF5 would keep it open, and call into Python for it when Python has ended.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__(os.fstat(raw.fileno()).st_size)
        self._descriptor = raw.fileno()
        self.error: BaseException | None = None

    def write(self, content: Any) -> int:
        """See io.RawIOBase."""
        view = memoryview(content).cast("B")
        self._try(lambda: write_all(self._descriptor, view, self._position))
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """See io.IOBase."""
        self.size = self._position if size is None else size
        self._try(lambda: os.ftruncate(self._descriptor, self.size))
        return self.size

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        self._try(lambda: os.preadv(self._descriptor, [view], self._position))
        self._position += len(view)
        return len(view)

    def _try(self, act: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            act()
        except BaseException as error:  # Ctrl-C, too
            self.error = error


def _link(name: str) -> str:
    """Return a name of a dataset: the slash would lead into a group, and HDF5 ends a name at a zero byte."""
    return _text(name).replace("/", "_")


def _text(text: str) -> str:
    return as_utf8(text).replace("\0", "\\0")
