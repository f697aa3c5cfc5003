"""Put dumps of the same images along outputs: each has a name, which stands before its outputs, as in `a.stage4`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from featcli.dump.plan import OUTPUT_NAME, Output
from featcli.errors import ConflictError, UsageError, nearest, shown
from featcli.reading.columns import KINDS_SAID, Cells, Columns

if TYPE_CHECKING:
    from featcli.reading.reader import DumpReader

NAME = re.compile(r"\w[\w-]*", re.ASCII)  # has no dot, so the first dot of an output ends the name of its dump


def check_names(outputs: Mapping[str, Iterable[Output]]) -> None:
    """Raise UsageError for a name that cannot stand before the outputs of its dump."""
    for name, of_dump in outputs.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UsageError(
                f"name {shown(name)} cannot stand before outputs", "use letters and digits of ASCII, _ and -"
            )
        for one in of_dump:
            if not OUTPUT_NAME.fullmatch(output_of(name, one).name):
                raise UsageError(f"name {shown(name)} cannot stand before output {shown(one.name)}", "use another name")


def output_of(name: str, one: Output) -> Output:
    """Return an output as it is called along outputs; the name of a dump that stands alone is empty."""
    return replace(one, name=f"{name}.{one.name}") if name else one


def outputs_named(dumps: Mapping[str, DumpReader], asked: Sequence[str]) -> set[str]:
    """Return the outputs that names mean along outputs. One without the name of a dump means those of all dumps.

    Raises UsageError as `DumpReader.chosen_outputs` does.
    """
    found: set[str] = set()
    for one in asked:
        name, _, rest = one.partition(".")
        if name in dumps and rest:  # a range may name the dump twice
            found |= {f"{name}.{output}" for output in dumps[name].chosen_outputs([rest.replace(f":{name}.", ":")])}
            continue
        of_all: set[str] = set()
        for name, dump in dumps.items():
            with suppress(UsageError):  # another dump may have it
                of_all |= {f"{name}.{output}" for output in dump.chosen_outputs([one])}
        if not of_all:
            known = [f"{name}.{output}" for name, dump in dumps.items() for output in dump.outputs]
            raise UsageError(
                f"there is no output {shown(one)} in any of the dumps",
                f"choose from {', '.join(nearest(one, known) or known)}",
            )
        found |= of_all
    return found


def rows_by_key(first: tuple[str, DumpReader], other: tuple[str, DumpReader]) -> np.ndarray | None:
    """Return for each row of the first dump, (N,) int64, the row of its key in the other; None if all are equal.

    Each dump comes with its name. Raises ConflictError unless both have the same keys.
    """
    ours, theirs = first[1], other[1]
    if ours.keys == theirs.keys:
        return None
    for (has, one), (lacks, two) in ((first, other), (other, first)):
        missing = next((key for key in one.keys if key not in two.rows), None)
        if missing is not None:
            is_none = not any(key in two.rows for key in one.keys)
            hint = "they are of other images: open_dump([a, b]) puts them along rows, as featcli export A B does"
            raise ConflictError(
                f"dumps {one.name} and {two.name} cannot be one along outputs: {shown(missing)} is in {has}, and not in"
                f" {lacks}",
                hint if is_none else "extract the same images into both",
            )
    return np.array([theirs.rows[key] for key in ours.keys], np.int64)


def columns_along_outputs(keys: Sequence[str], dumps: Sequence[tuple[str, Columns, np.ndarray | None]]) -> Columns:
    """Return the columns of all dumps, each a name, its columns and the order of its rows.

    One that stands in several is equal in all: ConflictError is raised for another kind, and when it is read for
    another cell.
    """
    having: dict[str, list[tuple[str, Columns, np.ndarray | None]]] = {}
    for dump in dumps:
        for column, kind in dump[1].kinds.items():
            of_column = having.setdefault(column, [])
            of_column.append(dump)
            first, columns, _ = of_column[0]
            if columns.kinds[column] != kind:
                two = KINDS_SAID[columns.kinds[column]], KINDS_SAID[kind]
                raise _other_column(column, f"it holds {two[0]} in {first} and {two[1]} in {dump[0]}")

    def cells(wanted: Collection[str]) -> Iterator[Cells]:
        asked = {name: [one for one in wanted if one in columns.kinds] for name, columns, _ in dumps}
        sides = [(dump[0], _in_order(dump, asked[dump[0]])) for dump in dumps if asked[dump[0]]]
        for key, *of_row in zip(keys, *(rows for _, rows in sides), strict=True):
            found: dict[str, tuple[str, Any]] = {}
            for (name, _), of_side in zip(sides, of_row, strict=True):
                for column in asked[name]:
                    first, cell = found.setdefault(column, (name, of_side[column]))
                    if of_side[column] != cell:
                        values = f"{json.dumps(cell)} in {first} and {json.dumps(of_side[column])} in {name}"
                        raise _other_column(column, f"the cell of {shown(key)} is {values}")
            yield {column: cell for column, (_, cell) in found.items()}

    return Columns({column: of_column[0][1].kinds[column] for column, of_column in having.items()}, cells, len(keys))


def _in_order(dump: tuple[str, Columns, np.ndarray | None], names: Sequence[str]) -> Iterable[Cells]:
    _, columns, order = dump
    rows = columns.cells(names)
    if order is None:
        return rows
    listed = [tuple(of_row[name] for name in names) for of_row in rows]  # of these columns alone, to be small
    return (dict(zip(names, listed[row], strict=True)) for row in order)


def _other_column(column: str, how: str) -> ConflictError:
    return ConflictError(
        f"column {shown(column)} is not the same in dumps along outputs: {how}",
        "ask one of them: dump.dumps[NAME].columns",
    )


def same_digests(keys: Sequence[str], digests: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the digests of pictures that the dumps have in common. One that a dump did not read is that of the others.

    Raises ConflictError if two differ: then the dumps read other bytes under one key.
    """
    (first, ours), *others = digests.items()
    found = list(ours)
    for name, theirs in others:
        for row, (one, other) in enumerate(zip(found, theirs, strict=True)):
            if one and other and one != other:
                raise ConflictError(
                    f"picture {shown(keys[row])} was another file for {first} than for {name}",
                    "ask one of them: dump.dumps[NAME].digests",
                )
            found[row] = one or other
    return found
