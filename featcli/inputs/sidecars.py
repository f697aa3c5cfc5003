"""Read the files that stand beside pictures in tars, as webdataset writes them: a.cls, a.json and a.txt of a.jpg.

They become the columns `cls`, `json` and `txt`. What is beside several pictures of one name, such as a.left.jpg and
a.right.jpg, belongs to each of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from featcli.errors import UsageError, shown
from featcli.inputs.cells import Kind, LearntKind, value_of
from featcli.inputs.table_files import constant, refuse_surrogates, unique_fields
from featcli.system.files import Spooled

CLS, JSON, TXT = "cls", "json", "txt"
COLUMNS = (CLS, JSON, TXT)
LARGEST = 1 << 24  # bytes of a sidecar
AGAIN = "pack the tar again without it, or mend it"


class Spool:
    """The cells of the pictures in all tars of a run, in a file without a name."""

    def __init__(self) -> None:
        self._file = Spooled()
        self.apart = 0  # sidecars that do not stand beside the picture of their name, and belong to none therefore

    @property
    def size(self) -> int:
        """The bytes that were added so far."""
        return self._file.seek(0, 2)

    def add(self, place: int, cells: Mapping[str, Any]) -> None:
        """Add the cells of a picture."""
        self._file.write(json.dumps([place, cells]).encode("ascii") + b"\n")

    def lines(self, begin: int, end: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what was added between two sizes."""
        while begin < end:
            self._file.seek(begin)
            line = self._file.readline()
            begin += len(line)
            place, cells = json.loads(line)
            yield place, cells


class Sidecars:
    """The sidecars in one tar, collected while its members are listed, and then the source of the columns."""

    path_column: str | None = None
    is_table = False
    of_texts = False

    def __init__(self, tar: str, spool: Spool, ignored: Counter[str]) -> None:
        self.name = f"tar {shown(tar)}"
        self._tar = tar
        self._spool = spool
        self._ignored = ignored
        self._begin = self._end = spool.size
        self._learnt = {name: LearntKind(of_texts=name == CLS) for name in COLUMNS}
        self._found: dict[str, None] = {}  # the columns that occur
        self._base = ""  # what the names of the current group begin with
        self._places: list[int] = []  # of the pictures in it
        self._bases: set[str] = set()  # of all pictures so far
        self._apart: Counter[str] = Counter()  # sidecars without a picture beside them, by the same
        self._beside: dict[str, tuple[str, bytes | None]] = {}  # column -> name and content; None if it is too large

    @property
    def kinds(self) -> Mapping[str, Kind | None]:
        """The kind of each column."""
        return {name: self._learnt[name].kind or "text" for name in COLUMNS if name in self._found}

    def rows(self, kinds: Mapping[str, Kind]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the place of each picture in the tar, and its cells. See ColumnSource."""
        own = self.kinds
        for place, cells in self._spool.lines(self._begin, self._end):
            yield place, {name: value_of(cells.get(name), kind) for name, kind in own.items() if kind is not None}

    def add_picture(self, name: str, place: int) -> None:
        """Take a picture into account, in the order of the tar."""
        self._next(_split(name)[0])
        self._places.append(place)

    def add(self, name: str, content: bytes | None) -> None:
        """Take a sidecar into account. Raises UsageError for a second one of the same picture."""
        base, column = _split(name)
        self._next(base)
        if column in self._beside:
            raise UsageError(
                f"input {shown(self._tar)}: there are two of {shown(name)}", "pack the tar again, with one of them"
            )
        self._beside[column] = name, content

    def end(self) -> bool:
        """Return whether there were any sidecars of pictures, after the last member. Raises UsageError."""
        self._next("")
        self._end = self._spool.size
        self._spool.apart += sum(count for base, count in self._apart.items() if base in self._bases)
        self._bases.clear()
        self._apart.clear()
        return bool(self._found)

    def _next(self, base: str) -> None:
        """Begin a group of members, unless it is the current one, whose cells are known when it ends."""
        if base == self._base:
            return
        if self._places:
            self._bases.add(self._base)
            cells = {column: self._cell(column, *found) for column, found in self._beside.items()}
            self._found.update(dict.fromkeys(cells))
            for place in self._places:
                self._spool.add(place, cells)
        else:
            self._apart[self._base] += len(self._beside)
            self._ignored.update(f".{column}" for column in self._beside)
        self._base, self._places, self._beside = base, [], {}

    def _cell(self, column: str, name: str, content: bytes | None) -> Any:
        if content is None:
            raise self._wrong(name, f"it has more than {LARGEST:,} bytes")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(name, f"byte {error.start + 1:,} is not UTF-8") from error
        cell = self._parsed(name, text) if column == JSON else text.rstrip("\r\n")
        cell = cell.strip() or None if column == CLS else cell
        if column == TXT and cell is not None:
            self._learnt[TXT].kind = "text"
        else:
            self._learnt[column].add(cell)
        return cell

    def _parsed(self, name: str, text: str) -> Any:
        try:
            found = json.loads(text, object_pairs_hook=unique_fields, parse_constant=constant)
            refuse_surrogates(found)
        except RecursionError as error:
            raise self._wrong(name, "it is nested too deeply") from error
        except json.JSONDecodeError as error:
            what = f"it is not JSON: {error.msg} at line {error.lineno:,}, character {error.colno:,}"
            raise self._wrong(name, what) from error
        except ValueError as error:
            raise self._wrong(name, str(error)) from error
        return found

    def _wrong(self, name: str, what: str) -> UsageError:
        return UsageError(f"input {shown(self._tar)}: {shown(name)}: {what}", AGAIN)


def is_sidecar(name: str) -> bool:
    """Return whether a member of a tar is one by its name: its suffixes after the first dot are one of COLUMNS."""
    return _split(name)[1] in COLUMNS


def _split(name: str) -> tuple[str, str]:
    """Return the name without suffixes, with its folders, and the suffixes, as webdataset splits names."""
    folder, slash, last = name.rpartition("/")
    base, _, suffixes = last.partition(".")
    return f"{folder}{slash}{base}", suffixes.lower()
