"""Hold the columns that come with the images: those of a table, of sidecars in tars, and the labels of folders.

Cells stay where they are, in a file as a rule, and are walked through again whenever they are needed, so that they take
no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import xxhash

from featcli.errors import ConflictError, UsageError, shown
from featcli.inputs.cells import INFINITIES, LONGEST_LINE, Kind, joined_kinds, value_of
from featcli.inputs.image_list import ImageList
from featcli.inputs.keys import Keys
from featcli.inputs.labels import LABEL, labels_of

MOST_CLASSES = 65_536  # different labels, of which more are no classes
encoded = json.JSONEncoder(allow_nan=False).encode  # made once, since a table has many rows


class ColumnSource(Protocol):
    """Where the cells of some images are."""

    name: str  # for people
    path_column: str | None  # the column of paths, if keys are no paths
    is_table: bool  # not the sidecars in a tar

    @property
    def of_texts(self) -> bool:
        """Whether every cell is text, whose kind is told by how it is written."""

    @property
    def kinds(self) -> Mapping[str, Kind | None]:
        """The kind of each column; None for one whose cells are all missing."""

    def rows(self, kinds: Mapping[str, Kind]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the place of each image in the source, in its order, and the cells by column.

        `kinds` are those in the dump, as which cells are kept: a text that was taken for a number stays as it is.
        """


@dataclass(frozen=True)
class ListedColumns:
    """The columns of a list of images."""

    images: ImageList
    kinds: Mapping[str, Kind]
    labels: Sequence[str] | None = None  # of folders, for the images that no source gives one; "" for none
    path_column: str | None = None  # the column of paths, if keys are no paths
    table: str | None = None  # the table for people; None if the columns are those of tars alone
    of_texts: bool = False  # every cell is a text in its source, and can be kept as one
    without_cells: frozenset[str] = frozenset()  # columns whose cells are all missing

    def can_be(self, name: str, kind: Kind) -> bool:
        """Return whether the cells of a column can be kept as another kind, without a loss."""
        now = self.kinds[name]
        return name in self.without_cells or (now, kind) == ("int", "float") or (kind == "text" and self.of_texts)

    @property
    def origin(self) -> str:
        """Where they come from, for people."""
        return self.table or "files beside the pictures in tars"

    @property
    def are_in_order(self) -> bool:
        """Whether the images are in the order in which the sources hold them."""
        return self._order is None

    @property
    def digest(self) -> str:
        """The xxh3-128 over the lines in row order. The images must be in the order in which they were found."""
        return self._summary[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted; none if they are no texts, or too many to be classes."""
        return self._summary[1]

    @cached_property
    def _summary(self) -> tuple[str, tuple[str, ...]]:
        digest, labels = xxhash.xxh3_128(), set[str]()
        is_wanted = self.kinds.get(LABEL) == "text"
        for line in self.lines():
            digest.update(line)
            if is_wanted:
                label = json.loads(line)[LABEL]
                labels.update(() if label is None else (label,))
                is_wanted = len(labels) <= MOST_CLASSES
        return digest.hexdigest(), tuple(sorted(labels)) if is_wanted else ()

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
            source = images.origin(row).columns
            if source is None:
                yield row, self._line(none, row)
                continue
            walk = walks.get(id(source)) or walks.setdefault(id(source), source.rows(self.kinds))
            place = images.place_of(row)
            cells = next((cells for at, cells in walk if at == place), None)
            if cells is None:
                raise ConflictError(f"{source.name} was changed while it was read", "run the command again")
            yield row, self._line({**none, **cells}, row)
        for walk in walks.values():
            for _ in walk:  # to the end, where a table says whether it was changed meanwhile
                pass

    @cached_property
    def _order(self) -> Sequence[int] | None:
        """The rows in the order in which they were found; None if that is their order."""
        return self.images.found_order()

    def _line(self, cells: Mapping[str, Any], row: int) -> bytes:
        values = {name: value_of(cell, self.kinds[name]) for name, cell in cells.items()}
        if self.labels is not None and values[LABEL] is None:
            values[LABEL] = self.labels[row] or None
        try:
            text = encoded(values)
        except ValueError:  # infinity inside a list or an object
            text = json.dumps(_finite(values))
        if len(text) >= LONGEST_LINE:
            raise UsageError(
                f"image {shown(self.images.keys[row])}: its columns have {len(text):,} bytes, more than"
                f" {LONGEST_LINE:,}",
                "leave long columns out",
            )
        return text.encode("ascii") + b"\n"


def listed_columns(images: ImageList, leads: Mapping[str, str], label_level: int | None = None) -> ListedColumns | None:
    """Return the columns of images that have some of a table or of tars; None if there are none but labels of folders.

    `leads` are the kinds of inputs by what leads keys. Labels of folders are for images of no table, unless
    `label_level` says which folder. Raises UsageError if it names one that no image lies in.
    """
    sources = list({id(one.columns): one.columns for one in images.origins if one.columns is not None}.values())
    table = next((one for one in sources if one.path_column is not None or one.is_table), None)
    kinds = joined_kinds(source.kinds for source in sources)
    if table is not None and label_level is not None and LABEL in table.kinds:
        raise UsageError(f"--label-level cannot be used: {table.name} has a column {shown(LABEL)}", "leave it out")
    labels = None
    if label_level is not None or (sources and any(one.columns is None or one.tar for one in images.origins)):
        has_label = [label_level is not None or one.columns is None or bool(one.tar) for one in images.origins]
        keys = Keys(key for key, number in zip(images.keys, images.numbers, strict=True) if has_label[number])
        found = iter(labels_of(keys, leads, "", label_level or 1))
        labels = [next(found) if has_label[number] else "" for number in images.numbers]
        if not any(labels):
            labels = None
            if label_level is not None:
                folders = "a folder" if label_level == 1 else f"{label_level} folders, one in another,"
                raise UsageError(
                    f"--label-level {label_level}: no image lies in {folders} inside its INPUT", "give less"
                )
    if not sources:
        return None
    if labels is not None:
        kinds = {**kinds, LABEL: "text" if kinds.get(LABEL, "text") == "text" else "json"}
    known = {name for source in sources for name, kind in source.kinds.items() if kind is not None}
    known |= {LABEL} if labels is not None else set()
    of_texts = all(source.of_texts for source in sources)
    path_column, name = (None, None) if table is None else (table.path_column, table.name)
    return ListedColumns(images, kinds, labels, path_column, name, of_texts, frozenset(kinds.keys() - known))


def _finite(value: Any) -> Any:
    """Return a value with infinity as text, which JSON lacks as a number."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return INFINITIES.get(value, value) if isinstance(value, float) else value
