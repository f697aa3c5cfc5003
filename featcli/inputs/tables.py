"""Read --table: which column holds the paths, an image for each row in the order of the table, and the other columns.

A table is walked through several times, because it may be longer than memory: once for the images and the kinds of the
columns, and again whenever its cells are written.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex
import stat
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple, Protocol

from featcli.errors import UsageError, any_of, did_you_mean, nearest, shown
from featcli.inputs.cells import Kind, LearntKind, value_of
from featcli.inputs.image_list import MISSING, SUFFIXES, ImageList, Origin, is_url
from featcli.inputs.lists import listed_path, listed_url, note_sizes
from featcli.inputs.nearby import NOT_IN_FORMATS, options_by_column, options_by_format
from featcli.inputs.signatures import PACKED, START, foreign
from featcli.inputs.storage import Storage, refuse_if_gone
from featcli.inputs.table_files import Line, text_table
from featcli.inputs.typed_tables import IN_MEMORY, ArrowTable, MemoryTable
from featcli.inputs.urls import Remote
from featcli.spec.groups import InputSpec
from featcli.spec.parsers import TableInMemory, checked_key
from featcli.spec.words import PATH_COLUMNS
from featcli.system.faults import is_of_machine, machine_error, machine_errors
from featcli.system.files import ReadFile, Spooled, is_folder

STDIN = "-"
ARROW = (".parquet", ".pq", ".arrow", ".feather", ".ipc")
COCO = re.compile(rb'"(images|annotations|categories|licenses)"\s*:\s*\[|^\{\s*"info"\s*:\s*\{')  # parts of its files
NO_PATH = "give the column of paths with --path-column, or make paths of other columns with --path-format"
IN_AN_INPUT = "leave the INPUT out if the table names all its images, else the row"
LOOKED_AT = 5  # rows by which a hint is made
LONGEST_NAME = 255  # bytes
HOW = "name the column of paths with --path-column, or make paths of other columns, as"


class Rows(Protocol):
    """A table as it can be walked through."""

    of_texts: bool  # every cell is text, whose kind is told by how it is written
    unit: str  # what the numbers of rows count: lines or rows
    names: list[str]

    def rows(self) -> Iterator[Line]:
        """Yield the number of the line or row, and its cells."""

    def wrong(self, line: int, what: str, hint: str) -> UsageError:
        """Return the error that names a line or row."""


class TableRow(NamedTuple):
    """A row of a table that is an image."""

    line: int
    path: str  # as the table has it, or as --path-format makes it
    key: str | None  # of --key-column


class OpenTable:
    """A table that can be walked through any number of times, and notices if it was changed meanwhile."""

    def __init__(self, given: str | TableInMemory) -> None:
        """Open it. Raises UsageError and MachineError."""
        self.name = given if isinstance(given, str) else IN_MEMORY
        self.folder = ""  # to which its paths are relative; empty for the current one
        self._file: IO[bytes] | None = None
        if not isinstance(given, str):
            self._table: Rows = MemoryTable(given.table)
            return
        if given != STDIN:
            self.folder = os.path.dirname(given)
        suffix = os.path.splitext(given)[1].lower()
        try:
            with machine_errors("table", given):
                self._file = _spooled(sys.stdin.buffer) if given == STDIN else _opened(given)
        except (OSError, ValueError) as error:
            cause = (isinstance(error, OSError) and error.strerror) or error
            raise UsageError(f"table {shown(given)}: {cause}", "give a file, or - for stdin") from error
        self._state = self._state_now()
        start = self._file.read(START)
        _refuse_other(given, start, suffix)
        is_arrow = suffix in ARROW or start.startswith((b"PAR1", b"ARROW1"))
        with machine_errors("table", given):
            if is_arrow:
                kind = suffix if suffix in ARROW else ".parquet" if start.startswith(b"PAR1") else ".arrow"
                self._table = ArrowTable(given, self._file, kind)
            else:
                self._table = text_table(given, self._file, suffix)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return self._table.names

    @property
    def of_texts(self) -> bool:
        """Whether every cell is text."""
        return self._table.of_texts

    @property
    def unit(self) -> str:
        """What the numbers of rows count: lines or rows."""
        return self._table.unit

    @property
    def called(self) -> str:
        """The table for people."""
        return "the table in memory" if self.name == IN_MEMORY else f"table {shown(self.name)}"

    def wrong(self, line: int, what: str, hint: str) -> UsageError:
        """Return the error that names a line or row of the table."""
        return self._table.wrong(line, what, hint)

    def rows(self) -> Iterator[Line]:
        """Yield the rows. Raises UsageError for a table that is wrong or was changed, and MachineError."""
        with machine_errors("table", self.name):
            try:
                yield from self._table.rows()
            finally:  # libraries may drop an error of the machine, or make something else of it
                fault = getattr(getattr(self._file, "regular", None), "fault", None)
                if fault is not None and is_of_machine(fault):
                    raise machine_error(self.called, fault) from fault
        if self._file is not None and self._state_now() != self._state:
            raise UsageError(f"{self.called} was changed while it was read", "run the command again")

    def _state_now(self) -> tuple[int, int] | None:
        if not isinstance(self._file, ReadFile):
            return None
        found = self._file.regular.state()
        return found.st_size, found.st_mtime_ns


def _opened(path: str) -> IO[bytes]:
    """Open a regular file, or keep what a pipe gives, such as a shell's `<(...)`. Raises OSError and ValueError."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        with open(path, "rb") as pipe:
            return _spooled(pipe)
    return ReadFile(path)


def _spooled(source: IO[bytes]) -> IO[bytes]:
    """Return all that is read from a source in a file without a name, because a table is read several times."""
    kept = Spooled()
    while piece := source.read(1 << 20):
        kept.write(piece)
    kept.seek(0)
    return kept


def _refuse_other(name: str, start: bytes, suffix: str) -> None:
    """Raise UsageError for a file that is no table that can be read, by its first bytes or its suffix."""
    found = foreign(start, name)
    hint = "give CSV, TSV, JSON Lines, Parquet or Arrow"
    if suffix == ".json":
        text = start.removeprefix(codecs.BOM_UTF8).lstrip()
        part = ".[]" if text.startswith(b"[") else ".images[]" if COCO.search(text) else ""
        if part:
            hint = f"write JSON Lines, an object a line: jq -c '{part}' TABLE.json > TABLE.jsonl"
            raise UsageError(f"table {shown(name)}: a file of JSON as a whole is not read", hint)
    if start.startswith((b"PAR1", b"ARROW1", codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return
    if suffix == ".xlsx" or (found is not None and not found.is_text and suffix not in ARROW):
        what = "an Excel workbook" if suffix == ".xlsx" else (found.what if found is not None else "")
        if suffix == ".xlsx":
            hint = "save it as CSV UTF-8, or read it with pandas and give that table to featcli.extract"
        elif found is not None and found.kind == PACKED:
            hint = "unpack it, as with zcat TABLE.csv.gz | featcli extract --table - --root FOLDER"
        raise UsageError(f"table {shown(name)}: it is {what}, not a table that can be read", hint)


class Table:
    """The table of --table as images see it: a source of paths, of keys, and of the cells of all other columns."""

    is_table = True

    @property
    def of_texts(self) -> bool:
        """Whether every cell is text."""
        return self._table.of_texts

    def __init__(self, asked: InputSpec) -> None:
        """Open the table and find its columns. Raises UsageError and MachineError."""
        self._asked = asked
        self._table = OpenTable(asked.table)
        self.name = self._table.called
        self.root = self._table.folder if asked.root_name is None else asked.root_name
        if self.root and not is_url(self.root) and not is_folder(self.root):
            raise UsageError(
                f"--root {shown(self.root)}: there is no such folder", "give the folder that paths are relative to"
            )
        self._storage = Storage("" if is_url(self.root) else self.root)
        self._format = None if asked.path_format is None else PathFormat(asked.path_format, self._table)
        self._path = None if self._format else self._path_column()
        self._key = None if asked.key_column is None else self._column("--key-column", asked.key_column)
        # Where keys are no paths, the paths are kept as a column.
        self.path_column = None if self._key is None else "path" if self._path is None else self._names[self._path]
        if self.path_column is not None and self._path is None and self.path_column in self._names:
            raise UsageError(
                f"{self.name}: --path-format makes a column {shown(self.path_column)}, and there is one already",
                "give that column with --path-column",
            )
        left_out = {self._path, self._key}
        self._kept = [place for place in range(len(self._names)) if place not in left_out]
        self._learnt = [LearntKind(self._table.of_texts) for _ in self._kept]
        self._first = 0  # the number of its first origin

    @property
    def _names(self) -> list[str]:
        return self._table.names

    @property
    def kinds(self) -> Mapping[str, Kind | None]:
        """The kind of each column that is kept; None for one whose cells are all missing."""
        own = {self._names[place]: learnt.kind for place, learnt in zip(self._kept, self._learnt, strict=True)}
        return own if self.path_column is None else {self.path_column: "text", **own}

    def add_to(self, images: ImageList, wanted: Callable[[str], bool]) -> None:
        """Add the wanted images, in the order of the table, without their sizes. Raises UsageError and MachineError."""
        numbers: dict[str, int] = {}
        self._first = len(images.origins)
        before = None
        for number, row in enumerate(self._images()):
            try:
                folder, path = self._located(row.path)
            except UsageError as error:
                raise self._table.wrong(row.line, error.message, error.hint) from error
            key = path if row.key is None else row.key
            if not wanted(key):
                continue
            if folder not in numbers:
                storage = None if is_url(folder) else self._storage
                numbers[folder] = images.add_origin(Origin(folder, storage=storage, columns=self))
            images.add(key, numbers[folder], MISSING, number, None if row.key is None else path)
            if key == before:  # a small file of Parquet can have more rows of one path than memory holds
                self.refuse_repeated(images, len(images) - 2, len(images) - 1)
            before = key
        for folder in filter(is_url, numbers):
            Remote(folder)  # raises now if a package or an option is missing, before anything is planned

    def look_at(self, images: ImageList) -> None:
        """Note the sizes of the files of this machine.

        Raises UsageError if none is there, and if the first is in a folder that was given, too. Raises MachineError.
        """
        sizes = note_sizes(images, self._first)
        refuse_if_gone(self._storage.grounds)
        rows = images.rows_since(self._first)
        if len(rows):
            self._refuse_if_in_folder(images, int(rows[0]))
        if sizes and max(sizes) == MISSING and len(sizes) == len(rows):
            raise UsageError(
                f"{self.name}: none of its paths names a file that is there, as {shown(images.path(int(rows[0])))}",
                self._how_to_mend_paths(),
            )

    def _refuse_if_in_folder(self, images: ImageList, row: int) -> None:
        """Raise UsageError if an image of the table is in a folder that was given, where it has another key."""
        path = os.path.abspath(images.path(row))
        for origin in images.origins[: self._first]:
            folder = os.path.abspath(origin.folder)
            if origin.storage is not None and os.path.commonpath([path, folder]) == folder:
                key = origin.leads + os.path.relpath(path, folder).replace(os.sep, "/")
                if any(key == other for other in images.keys):
                    line = self._line_of(images.place_of(row))
                    raise self.wrong(line, f"{shown(images.path(row))} is also in an INPUT", IN_AN_INPUT)

    def _how_to_mend_paths(self) -> str:
        """Return a hint for paths of which none names a file."""
        line, cells = next(self._table.rows())
        path = self._path_of(line, cells)
        if self._format is not None:
            options = options_by_format(self.root, self._format.text, path)
        else:
            assert self._path is not None
            options = options_by_column(self.root, self._names[self._path], path)
        where = shown(self.root) if self.root else "the current folder"
        if options is not None:
            return f"they are relative to {where}: give {options}"
        hint = f"they are relative to {where}: give --root FOLDER, or --path-format 'images/{{id}}.jpg'"
        return hint + (" if they are ids" if self._format is None else "")

    def refuse_repeated(self, images: ImageList, before: int, row: int) -> None:
        """Raise UsageError for a row of the table whose key another row before has, unless the first is to be taken."""
        is_in_table = images.origin(before).columns is self
        if self._asked.unique and is_in_table:
            return
        key, line = shown(images.keys[row]), self._line_of(images.place_of(row))
        if not is_in_table:
            raise self.wrong(line, f"{key} is also in an INPUT", IN_AN_INPUT)
        what = "has the key" if self._key is not None else "names"
        hint = "give --unique to take the first"
        hint += "" if self._key is not None else ", or --key-column to give rows of one image keys of their own"
        raise self.wrong(
            line, f"it {what} {key}, as {self._table.unit} {self._line_of(images.place_of(before)):,} does", hint
        )

    def _line_of(self, place: int) -> int:
        return next(line for number, (line, _) in enumerate(self._table.rows()) if number == place)

    def wrong(self, line: int, what: str, hint: str) -> UsageError:
        """Return the error that names a line or row of the table."""
        return self._table.wrong(line, what, hint)

    def rows(self, kinds: Mapping[str, Kind]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the number of each row from 0 on, and its cells by column, once their own kinds are known.

        See ColumnSource.
        """
        own = {name: "text" if kinds[name] == "text" else kind for name, kind in self.kinds.items()}
        kept = [(place, self._names[place], own[self._names[place]]) for place in self._kept]
        for number, (line, cells) in enumerate(self._table.rows()):
            found = {name: None if kind is None else value_of(cells[at], kind) for at, name, kind in kept}
            if self.path_column is not None:
                found = {self.path_column: self._located(self._path_of(line, cells))[1], **found}
            yield number, found

    def _images(self) -> Iterator[TableRow]:
        """Yield all rows, and learn the kinds of the columns from them. Raises UsageError."""
        count = 0
        for line, cells in self._table.rows():
            count += 1
            for place, learnt in zip(self._kept, self._learnt, strict=True):
                learnt.add(cells[place])
            yield TableRow(line, self._path_of(line, cells), self._key_of(line, cells))
        if not count:
            raise UsageError(f"{self.name}: it has no rows", "is it the right one?")

    def _located(self, path: str) -> tuple[str, str]:
        """Return the folder or beginning of a URL that a path is below, and the rest. Raises UsageError."""
        if is_url(self.root) or is_url(path):
            return listed_url(self.root, path)
        return self.root, listed_path(self.root, path, self._asked.allow_outside)

    def _path_of(self, line: int, cells: Sequence[Any]) -> str:
        if self._format is not None:
            return self._format.path_of(line, cells)
        assert self._path is not None
        path, name = cells[self._path], self._names[self._path]
        if path is None or path == "":
            raise self._table.wrong(
                line, f"column {shown(name)} is empty", "leave rows without a picture out of the table"
            )
        if not isinstance(path, str):
            raise self._table.wrong(line, f"column {shown(name)} holds {path!r:.40}, which is not a path", NO_PATH)
        if "\0" in path or "\n" in path:
            raise self._table.wrong(line, f"column {shown(name)} holds {shown(path)}, which is not a path", NO_PATH)
        return path

    def _key_of(self, line: int, cells: Sequence[Any]) -> str | None:
        if self._key is None:
            return None
        key, name = cells[self._key], self._names[self._key]
        if key is None or isinstance(key, float | bool | list | dict):
            what = "is empty" if key is None else f"holds {key!r:.40}, which is neither a text nor a whole number"
            raise self._table.wrong(line, f"column {shown(name)} {what}", "give each row a key of its own")
        try:
            return checked_key(str(key))
        except UsageError as error:
            raise self._table.wrong(line, error.message, error.hint) from error

    def _path_column(self) -> int:
        if self._asked.path_column is not None:
            return self._column("--path-column", self._asked.path_column)
        found = [name for name in self._names if name.lower() in PATH_COLUMNS]
        if len(found) > 1:
            raise UsageError(
                f"{self.name}: {any_of([shown(name) for name in found])} could be the column of paths",
                "choose one with --path-column",
            )
        if not found:
            _refuse_without_header(self.name, self._names)
            there = ", ".join(map(shown, self._names[:8])) + (", ..." if len(self._names) > 8 else "")
            raise UsageError(
                f"{self.name}: no column is called {any_of(PATH_COLUMNS)}: there are {there}", self._how_to_find_paths()
            )
        return self._names.index(found[0])

    def _how_to_find_paths(self) -> str:
        """Return a hint by the first rows: a column that holds paths there, one that names pictures, or one of ids."""
        rows = [cells for _, cells in islice(self._table.rows(), LOOKED_AT)]
        columns = {name: [row[place] for row in rows] for place, name in enumerate(self._names)}
        held = ((name, cells[0]) for name, cells in columns.items() if cells and isinstance(cells[0], str))
        of_paths = next((one for one in held if _is_path(one[1])), None)
        ids_first = sorted(columns, key=lambda name: not name.lower().endswith("id"))  # others may be alike by chance
        for name in ids_first if of_paths is None else of_paths[:1]:
            cells = columns[name]
            if all(type(cell) in (str, int) for cell in cells) and len({*cells}) == len(cells):
                found = {options_by_column(self.root, name, str(cell)) for cell in cells}
                options = found.pop() if len(found) == 1 else None
                if options is not None and not options.endswith(shlex.quote(name)):  # it needs more than its name
                    return f"give {options}"
        if of_paths is not None:
            return f"give --path-column {shlex.quote(of_paths[0])}, which holds {shown(of_paths[1])}"
        fit = (name for name in self._names if not {*name} & {*NOT_IN_FORMATS, "'"})
        ids = next((name for name in fit if name.lower().endswith("id")), "id")
        return f"{HOW} --path-format 'images/{{{ids}}}.jpg'"

    def _column(self, option: str, name: str) -> int:
        if name not in self._names:
            near = did_you_mean(nearest(name, self._names), f"the columns are {', '.join(self._names[:20])}")
            raise UsageError(f"{option} {shown(name)}: {self.name} has no such column", near)
        return self._names.index(name)


def _refuse_without_header(called: str, names: Sequence[str]) -> None:
    """Raise UsageError if the first line of a table holds a path where the names of columns should be."""
    path = next((name for name in names if _is_path(name)), None)
    words = names[0].split() if len(names) == 1 else []
    at = next((place for place, word in enumerate(words) if _is_path(word)), None)
    if len(words) > 1 and at is not None:
        named = ["label" if at == 0 else "id", *(f"column{number}" for number in range(3, len(words) + 1))]
        header = ",".join([*named[:at], "path", *named[at:]])
        raise UsageError(
            f"{called}: its first line is {shown(names[0])}, without names of columns, and spaces separate its cells",
            f"write commas and a header: (echo {header}; sed 's/  */,/g' TABLE) > TABLE.csv",
        )
    if path is not None:
        raise UsageError(
            f"{called}: its first line holds {shown(path)} and not the names of columns",
            "give it a header, such as path,label; a list of paths alone is for --files-from",
        )


def _is_path(text: str) -> bool:
    """Return whether a text is a path or a URL of a picture, as it seems."""
    return os.path.splitext(text)[1].lower() in SUFFIXES or is_url(text)


class PathFormat:
    """A path with columns in braces, such as `images/{id}.jpg`, or `{id:012d}.jpg` with zeros before."""

    def __init__(self, text: str, table: OpenTable) -> None:
        """Find the columns. Raises UsageError for an unknown one, and for what no path can be made of."""
        self.text = text
        self._table = table
        self._pieces: list[tuple[str, int | None, str]] = []  # text, then a column and its width
        try:
            pieces = [*string.Formatter().parse(text)]
        except ValueError as error:
            raise self._wrong(text, str(error)) from error
        for literal, name, width, conversion in pieces:
            digits = (width or "").removeprefix("0").removesuffix("d")
            if conversion or (width and not (digits.isascii() and digits.isdecimal())):
                raise self._wrong(text, f"{{{name}}} has more behind it than a width such as :012d")
            if len(digits) > 3 or int(digits or 0) > LONGEST_NAME:
                raise self._wrong(text, f"{{{name}}} would be longer than a name of a file can be")
            if name is not None and name not in table.names:
                near = did_you_mean(nearest(name, table.names), f"the columns are {', '.join(table.names[:20])}")
                raise UsageError(f"--path-format {shown(text)}: {table.called} has no column {shown(name)}", near)
            self._pieces.append((literal, None if name is None else table.names.index(name), width or ""))
        if all(place is None for _, place, _ in self._pieces):
            raise self._wrong(text, "it names no column, so every row would have one path")

    def path_of(self, line: int, cells: Sequence[Any]) -> str:
        """Return the path of a row. Raises UsageError for a cell that is missing or no part of a path."""
        path = ""
        for literal, place, width in self._pieces:
            path += literal
            if place is None:
                continue
            cell, name = cells[place], self._table.names[place]
            if cell is None or isinstance(cell, float | bool | list | dict) or "\0" in str(cell):
                what = "is empty" if cell is None else f"holds {cell!r:.40}, of which no path can be made"
                raise self._table.wrong(line, f"column {shown(name)} {what}", "mend it, or leave the row out")
            path += self._filled(line, str(cell), name, width) if width else str(cell)
        return path

    def _filled(self, line: int, cell: str, name: str, width: str) -> str:
        if not (cell.isascii() and cell.isdecimal()):
            raise self._table.wrong(
                line, f"column {shown(name)} holds {shown(cell)}, which is not a whole number", "leave the width out"
            )
        return (cell.lstrip("0") or "0").rjust(int(width.removesuffix("d")), "0" if width.startswith("0") else " ")

    def _wrong(self, text: str, what: str) -> UsageError:
        return UsageError(f"--path-format {shown(text)}: {what}", "write it as in 'images/{id}.jpg'")
