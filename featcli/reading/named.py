"""Open the dumps that a command names, and find the rows that it names by --keys and --where."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featcli.errors import ConflictError, UsageError, shown
from featcli.inputs.keys import Keys, missing_from
from featcli.reading.along_outputs import NAME
from featcli.reading.columns import no_such_rows
from featcli.reading.keys import match_keys
from featcli.reading.reader import DumpReader, open_dump


def open_named(dumps: Sequence[str], others: Sequence[str] = (), incomplete: bool = False) -> DumpReader:
    """Open dumps along rows, and put others with them, each `DUMP` or `NAME=DUMP`.

    Others of the same keys go along outputs: a name before the outputs says which dump they are of, by default the last
    name of its path. Others that have no key in common with the first go along rows. Raises UsageError for names that
    do not fit, and what `open_dump` raises.
    """
    first = open_dump(dumps, incomplete)
    if not others:
        return first
    named = [_name_and_path(text) for text in others]
    readers = [open_dump(path, incomplete) for _, path in named]
    if not any(_have_a_key_in_common(first, reader) for reader in readers):
        given = next((name for name, _ in named if name), None)
        if given is not None:
            raise UsageError(
                f"--with {given}={named[0][1]}: it is of other images, so its rows follow, and no name is needed",
                "leave NAME= out: names are for dumps of the same images",
            )
        try:
            return open_dump([first, *readers])
        except ConflictError as error:
            keys = f"{shown(first.keys[0])} and {shown(readers[0].keys[0])}"
            raise ConflictError(
                f"{error.message}; they would be that, because they have no key in common, with such as {keys}",
                "for several models of the same images, give extract the same inputs",
            ) from error
    beside = {_last_name(dumps[0]): first}
    for (name, path), reader in zip(named, readers, strict=True):
        called = name or _last_name(path)
        if called in beside:
            raise UsageError(
                f"--with {shown(path)}: two dumps are called {called}", f"give this one a name: --with NAME={path}"
            )
        beside[called] = reader
    return open_dump(beside)


def _name_and_path(text: str) -> tuple[str, str]:
    """Return the name and the path of a text; without a name that is one, the whole text is the path."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and path and NAME.fullmatch(name) else ("", text)


def _last_name(path: str) -> str:
    """Return the last name of a path, with a dash in place of what cannot stand in a name."""
    return re.sub(r"[^\w-]", "-", os.path.basename(os.path.abspath(path)), flags=re.ASCII).lstrip("-") or "dump"


def _have_a_key_in_common(one: DumpReader, other: DumpReader) -> bool:
    return len(missing_from(Keys(one.keys), Keys(other.keys))) < len(other)


def rows_named(dump: DumpReader, keys: Sequence[str] = (), where: Sequence[str] = ()) -> np.ndarray:
    """Return (N,) bool: the rows of these keys whose columns have these values.

    A key is one as `match_keys` takes it. A text of `where` is `NAME=VALUE`: several of one name mean any of them, and
    those of different names all. Raises UsageError for what names no row.
    """
    chosen = np.ones(len(dump), bool)
    if keys:
        chosen[:] = False
        for match in match_keys(keys, dump.rows):
            chosen[list(match.rows)] = True
    if not where:
        return chosen
    conditions: dict[str, list[Any]] = {}
    for text in where:
        name, _, value = text.partition("=")
        conditions.setdefault(name, []).append(dump.columns.parsed(name, value))
    having = dump.columns.where(conditions)
    if not having.any():
        raise _no_such_rows(dump, conditions)
    if not (having & chosen).any():
        raise UsageError("no image of --keys has what --where asks for", "leave one of the two out")
    return np.asarray(chosen & having)


def _no_such_rows(dump: DumpReader, conditions: Mapping[str, list[Any]]) -> UsageError:
    """Return the error for conditions that no row meets; a single value is named without its list."""
    return no_such_rows(dump.columns, {name: one[0] if len(one) == 1 else one for name, one in conditions.items()})
