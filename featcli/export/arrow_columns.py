"""Give each of the user's columns a type of Arrow that all of its cells have, and turn cells into arrays of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from featcli.export.content import Content
from featcli.inputs.cells import Kind
from featcli.reading.columns import arrow_types, as_python, as_utf8

AT_ONCE = 8192  # rows whose cells are in memory at once
LONGEST_TYPE = 10_000  # characters: objects whose fields are names of things become text, not a field for each thing


def column_fields(content: Content) -> list[Any]:
    """Return a field for each column. Its metadata has the name of the column in the dump, and its kind.

    JSON is nested if one type holds all values of its column, and text otherwise.
    """
    import pyarrow

    types, nested = arrow_types(), _nested_types(content)
    return [
        pyarrow.field(
            name,
            nested.get(name) or types.get(kind, pyarrow.string()),
            metadata={"column": as_utf8(column), "kind": kind},
        )
        for (column, name), kind in zip(content.columns.items(), content.kinds.values(), strict=True)
    ]


def arrow_column(cells: Sequence[Any], kind: Kind, of_type: Any) -> Any:
    """Return cells of a column as an Arrow array of its type. Text that is not UTF-8 is escaped."""
    import pyarrow

    if kind == "text":
        cells = [None if cell is None else as_utf8(cell) for cell in cells]
    elif kind == "json" and of_type == pyarrow.string():
        cells = [None if cell is None else json.dumps(cell) for cell in cells]
    else:
        cells = [as_python(cell, kind) for cell in cells]
    return pyarrow.array(cells, of_type)


def _nested_types(content: Content) -> dict[str, Any]:
    """Return the types of those columns of JSON that have one: found in a first walk, tried in a second."""
    import pyarrow

    refused = (pyarrow.ArrowException, TypeError, ValueError, OverflowError, RecursionError)
    found = {name: pyarrow.null() for name, kind in content.kinds.items() if kind == "json"}
    for is_known in (False, True):
        for cells in _some_at_once(content) if found else ():
            for name, of_type in list(found.items()):
                values = [of_row[name] for of_row in cells]
                try:
                    fits = _holds(of_type, values) if is_known else True
                    found[name] = of_type if is_known else _joined(of_type, values)
                except refused:
                    fits = False
                if not fits or len(str(found[name])) > LONGEST_TYPE:
                    del found[name]
    # Text in a column of JSON is always the JSON of a value, so a column of texts alone is that, too.
    plain = (pyarrow.string(), pyarrow.null())
    return {name: of_type for name, of_type in found.items() if of_type not in plain and _is_written(of_type)}


def _some_at_once(content: Content) -> Iterator[list[Any]]:
    cells = (of_row for _, of_row in content.cells())
    while some := list(islice(cells, AT_ONCE)):
        yield some


def _joined(of_type: Any, values: Sequence[Any]) -> Any:
    """Return a type for these values and those of another type. Raises errors of pyarrow and Python if none is."""
    import pyarrow

    schemas = [pyarrow.schema([("all", one)]) for one in (of_type, pyarrow.infer_type(values))]
    return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type


def _holds(of_type: Any, values: Sequence[Any]) -> bool:
    import pyarrow

    return all(map(_are_same, pyarrow.array(values, of_type).to_pylist(), values))


def _are_same(held: Any, value: Any) -> bool:
    """Return whether Arrow holds a value as it is. A field that an object lacks may be null."""
    if isinstance(value, dict):
        return isinstance(held, dict) and all(_are_same(one, value.get(name)) for name, one in held.items())
    if isinstance(value, list):
        return isinstance(held, list) and len(held) == len(value) and all(map(_are_same, held, value))
    return bool(held == value) and isinstance(held, bool) == isinstance(value, bool)


def _is_written(of_type: Any) -> bool:
    """Return whether Parquet has the type: it has none for an object without fields."""
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.write_table(pyarrow.schema([("all", of_type)]).empty_table(), pyarrow.BufferOutputStream())
    except pyarrow.ArrowException:
        return False
    return True
