"""Read tables in text: CSV, TSV and JSON Lines, line by line, with the place of whatever is wrong in them."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from featcli.errors import UsageError, counted, shown

LONGEST_LINE = 1 << 24  # bytes
MOST_COLUMNS = 10_000
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HEADER = "give it a first line with the names of its columns, such as path,label"

Line = tuple[int, list[Any]]  # the number of the line that a row begins in, and its cells; None is a missing one


class TextTable:
    """A table in a text file. `file` is binary and begins anew for each walk through the rows."""

    unit = "line"

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self._name = name
        self._file = file

    def wrong(self, line: int, what: str, hint: str) -> UsageError:
        """Return the error that names a line of the table."""
        return UsageError(f"table {shown(self._name)}, line {line:,}: {what}", hint)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yield the lines as text, with their numbers from 1 on. Raises UsageError for bytes that are no UTF-8 text."""
        self._file.seek(0)
        number = 0
        while raw := self._file.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1:
                if raw.startswith(WIDE):
                    raise self.wrong(1, "it is UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if len(raw) > LONGEST_LINE:
                raise self.wrong(number, f"it has more than {LONGEST_LINE:,} bytes", "is it a table in text?")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                before = raw[: error.start].decode("utf-8")
                raise self.wrong(
                    number,
                    f"character {len(before) + 1:,} is the byte 0x{byte:02x}, which is not UTF-8",
                    "convert it, as with iconv -f LATIN1 -t UTF-8",
                ) from error
            if "\0" in text:
                raise self.wrong(number, "there is a zero byte in it", "is it UTF-8 text?")
            yield number, text


class SeparatedTable(TextTable):
    """A CSV or TSV file. Its first line names the columns; every cell is text."""

    of_texts = True

    def __init__(self, name: str, file: IO[bytes], delimiter: str | None = None) -> None:
        super().__init__(name, file)
        self._asked = delimiter
        self.names = self._header()

    def rows(self) -> Iterator[Line]:
        """Yield the rows after the header. Empty lines are none.

        Raises UsageError for a row with another number of cells than the header, and for wrong quotes.
        """
        rows = self._records()
        next(rows)
        for line, cells in rows:
            if len(cells) != len(self.names):
                more = len(cells) > len(self.names)
                at = f"nothing in the header names cell {len(self.names) + 1}" if more else (
                    f"column {shown(self.names[len(cells)])} is not there"
                )  # fmt: skip
                raise self.wrong(
                    line,
                    f"it has {counted(len(cells), 'cell')}, and the header {counted(len(self.names), 'column')}: {at}",
                    'write a cell that holds a separator or a line break in quotes: "a, b"',
                )
            yield line, [cell or None for cell in cells]

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line that each record begins in, and its cells."""
        last = 0

        def lines() -> Iterator[str]:
            nonlocal last
            for number, text in self._lines():
                if number == 1 and self._asked is None:
                    self._asked = _delimiter_of(text)
                last = number
                yield text

        source = lines()
        first = next(source, None)
        if first is None:
            return
        reader = csv.reader(_led_by(first, source), delimiter=self._asked or ",", strict=True)
        while True:
            begin = 1 if reader.line_num == 0 else last + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                hint = 'put quotes around a whole cell, and double those inside: "a ""b"" c"'
                if self._asked == "\t":  # some programs write quotes into a TSV as they are
                    hint += """; where none means that: sed 's/"/""/g; s/[^\\t]*/"&"/g' TABLE > TABLE.tsv"""
                raise self.wrong(begin, _why(str(error)), hint) from error
            if cells is None:
                return
            if cells and not (len(cells) == 1 and not cells[0].strip()):
                yield begin, cells

    def _header(self) -> list[str]:
        _, cells = next(self._records(), (1, []))
        if not cells:
            raise UsageError(f"table {shown(self._name)}: it is empty", HEADER)
        if len(cells) <= 2 and cells[0].lower().startswith("sep="):
            raise self.wrong(1, f"it holds {shown(cells[0])}, which is for Excel alone", "leave that line out")
        return checked_names(f"table {shown(self._name)}, line 1", [cell.strip() for cell in cells])


class JsonLinesTable(TextTable):
    """A file of JSON Lines: each line is an object, whose fields are cells."""

    of_texts = False

    def __init__(self, name: str, file: IO[bytes]) -> None:
        super().__init__(name, file)
        self._fields = self._all_fields()
        self.names = checked_names(f"table {shown(name)}", self._fields)

    def rows(self) -> Iterator[Line]:
        """Yield the rows. A field that a line lacks is missing. Raises UsageError for lines that are no objects."""
        for line, found in self._objects():
            yield line, [found.get(name) for name in self._fields]

    def _all_fields(self) -> list[str]:
        names: dict[str, None] = {}
        for line, found in self._objects():
            names.update(dict.fromkeys(found))
            if len(names) > MOST_COLUMNS:
                raise self.wrong(line, f"there are more than {MOST_COLUMNS:,} names of fields by now", "is it a table?")
        if not names:
            raise UsageError(f"table {shown(self._name)}: it is empty", 'give a line such as {"path": "a.jpg"}')
        return list(names)

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, text in self._lines():
            if not text.strip():
                continue
            try:
                found = json.loads(text, object_pairs_hook=unique_fields, parse_constant=constant)
                if "\\ud" in text or "\\uD" in text:
                    refuse_surrogates(found)
            except RecursionError as error:
                raise self.wrong(number, "it is nested too deeply", "leave such fields out") from error
            except json.JSONDecodeError as error:
                what = f"it is not JSON: {error.msg} at character {error.colno:,}"
                raise self.wrong(number, what, self._hint(text)) from error
            except ValueError as error:
                raise self.wrong(number, str(error), self._hint(text)) from error
            if not isinstance(found, dict):
                raise self.wrong(number, "it is not a JSON object", self._hint(text))
            yield number, found

    def _hint(self, text: str) -> str:
        if text.lstrip().startswith("["):
            return f"each line is an object: jq -c '.[]' {shown(self._name)} makes lines of an array"
        return 'each line is an object, such as {"path": "a.jpg", "label": "cat"}'


def checked_names(called: str, names: Sequence[str]) -> list[str]:
    """Return the names of columns. A first one that is empty, as pandas writes its index, is called `index`.

    `called` is the table for people. Raises UsageError for a name that is empty or stands twice, and for too many.
    """
    if not names:
        raise UsageError(f"{called}: it has no columns", "is it the right one?")
    if len(names) > MOST_COLUMNS:
        raise UsageError(f"{called}: it has more than {MOST_COLUMNS:,} columns", "is it a table?")
    if len(names) > 1 and not names[0] and "index" not in names:
        names = ["index", *names[1:]]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise UsageError(f"{called}: column {number} has no name", "give each column a name")
        if name in first:
            raise UsageError(
                f"{called}: columns {first[name]} and {number} are both called {shown(name)}",
                "give each column a name of its own",
            )
        first[name] = number
    return list(names)


def _delimiter_of(header: str) -> str:
    """Return what separates the cells of a CSV: a comma, or what Excel writes where numbers have commas."""
    return next((one for one in (",", ";", "\t") if one in header), ",")


def _led_by(first: str, others: Iterator[str]) -> Iterator[str]:
    yield first
    yield from others


def _why(error: str) -> str:
    """Return what is wrong with the quotes of a record, by the message of the csv module."""
    if "unexpected end" in error:
        return "a quoted cell begins in it that never ends"
    if "field larger" in error:
        return f"a cell begins in it that has more than {csv.field_size_limit():,} characters"
    if "new-line" in error:
        return "there is a carriage return in it that ends no line"
    return "there is text behind a quoted cell"


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError if a field stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} stands in it twice")
    return found


def constant(word: str) -> float | None:
    """Return what a number that JSON lacks stands for: Python, pandas and others write NaN for a missing one."""
    return None if word == "NaN" else float(word)


def refuse_surrogates(found: Any) -> None:
    """Raise ValueError if a text in a JSON value is no valid text."""
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a single surrogate)") from error


def text_table(name: str, file: IO[bytes], suffix: str) -> SeparatedTable | JsonLinesTable:
    """Return a table in text by its suffix, or by its beginning if there is none."""
    if suffix in (".jsonl", ".ndjson", ".json"):
        return JsonLinesTable(name, file)
    if suffix in (".tsv", ".tab"):
        return SeparatedTable(name, file, "\t")
    if suffix != ".csv":
        file.seek(0)
        start = file.read(io.DEFAULT_BUFFER_SIZE).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith((b"{", b"[")):
            return JsonLinesTable(name, file)
    return SeparatedTable(name, file)
