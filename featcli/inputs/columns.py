"""Hold the columns that come with the images: those of a table, of sidecars in tars, and the labels of folders.

Cells stay where they are, in a file as a rule, and are walked through again whenever they are needed, so that they take
no memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import xxhash

from featcli.errors import ConflictError, UsageError, shown
from featcli.inputs.cells import INFINITIES, LONGEST_LINE, Kind, value_of
from featcli.inputs.image_list import ImageList

LABEL = "label"


class ColumnSource(Protocol):
    """Where the cells of some images are."""

    name: str  # for people

    @property
    def kinds(self) -> Mapping[str, Kind | None]:
        """The kind of each column; None for one whose cells are all missing."""

    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the place of each image in the source, in its order, and the cells by column."""


@dataclass(frozen=True)
class ListedColumns:
    """The columns of a list of images."""

    images: ImageList
    kinds: Mapping[str, Kind]
    label_of: Callable[[str], str | None] | None = None  # of a key of an image that no source knows
    path_column: str | None = None  # the column of paths, if keys are no paths
    is_of_table: bool = True  # not of tars alone

    @cached_property
    def digest(self) -> str:
        """The xxh3-128 over the lines in row order. The images must be in the order in which they were found."""
        digest = xxhash.xxh3_128()
        for line in self.lines():
            digest.update(line)
        return digest.hexdigest()

    def lines(self) -> Iterator[bytes]:
        """Yield a line for each row, in row order. Raises UsageError and ConflictError."""
        if self._order is None:
            yield from (line for _, line in self.found())
            return
        lines = [b""] * len(self.images)
        for row, line in self.found():
            lines[row] = line
        yield from lines

    def found(self) -> Iterator[tuple[int, bytes]]:
        """Yield each row and its line, in the order in which the sources hold them.

        Raises ConflictError if a source is no longer what it was when the images were listed.
        """
        images, none = self.images, dict.fromkeys(self.kinds)
        walks: dict[int, Iterator[tuple[int, Mapping[str, Any]]]] = {}
        for row in range(len(images)) if self._order is None else self._order:
            source = images.column_source(row)
            if source is None:
                label = None if self.label_of is None else self.label_of(images.keys[row])
                yield row, self._line({**none, LABEL: label} if LABEL in none else none, row)
                continue
            walk = walks.setdefault(id(source), source.rows())
            place = images.place_of(row)
            cells = next((cells for at, cells in walk if at == place), None)
            if cells is None:
                raise ConflictError(f"{source.name} was changed while it was read", "run the command again")
            yield row, self._line({**none, **cells}, row)

    @cached_property
    def _order(self) -> Sequence[int] | None:
        """The rows in the order in which they were found; None if that is their order."""
        return self.images.found_order()

    def _line(self, cells: Mapping[str, Any], row: int) -> bytes:
        values = {name: value_of(cell, self.kinds[name]) for name, cell in cells.items()}
        try:
            text = json.dumps(values, allow_nan=False)
        except ValueError:  # infinity inside a list or an object
            text = json.dumps(_finite(values))
        if len(text) >= LONGEST_LINE:
            raise UsageError(
                f"image {shown(self.images.keys[row])}: its columns have {len(text):,} bytes, more than"
                f" {LONGEST_LINE:,}",
                "leave long columns out",
            )
        return text.encode("ascii") + b"\n"


def _finite(value: Any) -> Any:
    """Return a value with infinity as text, which JSON lacks as a number."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return INFINITIES.get(value, value) if isinstance(value, float) else value
