"""Say what a plan holds of the columns of a run, and whether they are those of the dump that is resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import xxhash

from featcli.dump.columns import PlannedColumns
from featcli.dump.folder import Dump
from featcli.dump.generations import all_generations
from featcli.errors import ConflictError, shown
from featcli.inputs.cells import Kind
from featcli.inputs.columns import ListedColumns

ANOTHER = "give the table as before, use another -o, or --overwrite to start anew"


def as_known(dump: Dump | None, listed: ListedColumns | None) -> ListedColumns | None:
    """Return the columns with the kinds that they have in a dump, in all generations, where their cells allow it.

    Raises ConflictError where they do not.
    """
    if dump is None or listed is None:
        return listed
    kinds: dict[str, Kind] = {}
    for one in all_generations(dump).dumps:
        kinds |= {} if one.plan.columns is None else one.plan.columns.kinds_of_cells
    for name, now in listed.kinds.items():
        was = kinds.get(name, now)
        if not (was == now or listed.can_be(name, was)):
            raise _conflict(dump, f"the column {shown(name)} held {was}, and now holds {now}")
    return replace(listed, kinds={name: kinds.get(name, now) for name, now in listed.kinds.items()})


def planned_columns(
    dump: Dump | None, listed: ListedColumns | None
) -> tuple[PlannedColumns | None, ListedColumns | None]:
    """Return the columns for the plan, and those listed as it has them.

    The images that are listed are those of the dump, in its order. Raises ConflictError if columns are others than
    those of `dump`, by key. Columns of tars are left out of a dump that was begun without columns, by a version that
    did not read them.
    """
    if dump is None:
        if listed is None:
            return None, None
        empty = tuple(sorted(listed.without_cells))
        return PlannedColumns(listed.digest, listed.kinds, listed.path_column, empty, listed.classes), listed
    before = dump.plan.columns
    if listed is None or before is None:
        if listed is None and before is not None:
            raise _conflict(dump, f"it was made with the columns {', '.join(before.kinds)}, and now there are none")
        if listed is not None and listed.table is not None:
            raise _conflict(dump, f"it was made without columns, and now there are {', '.join(listed.kinds)}")
        return None, None
    _refuse_other_kinds(dump, before, listed)
    listed = replace(listed, kinds=before.kinds)  # in the order of the dump
    if not (listed.are_in_order and listed.digest == before.digest):
        _refuse_other_cells(dump, listed)
    return before, listed


def _refuse_other_kinds(dump: Dump, before: PlannedColumns, listed: ListedColumns) -> None:
    for name in {**before.kinds, **listed.kinds}:
        was, now = before.kinds.get(name), listed.kinds.get(name)
        if was != now:
            what = "is new" if was is None else "is gone" if now is None else f"held {was}, and now holds {now}"
            raise _conflict(dump, f"the column {shown(name)} {what}")
    if before.path_column != listed.path_column:
        raise _conflict(dump, "its keys were made in another way")


def _refuse_other_cells(dump: Dump, listed: ListedColumns) -> None:
    """Raise ConflictError with the first image whose cells differ, column and both values."""
    hashes = np.zeros(len(listed.images), np.uint64)
    for row, line in listed.found():
        hashes[row] = xxhash.xxh3_64_intdigest(line)
    for row, cells in enumerate(dump.cells()):
        if xxhash.xxh3_64_intdigest(json.dumps(cells).encode("ascii") + b"\n") != hashes[row]:
            now = json.loads(next(line for at, line in listed.found() if at == row))
            name = next(name for name in cells if json.dumps(cells[name]) != json.dumps(now[name]))  # 1 is not 1.0
            raise _conflict(
                dump,
                f"the column {shown(name)} of {shown(listed.images.keys[row])} was"
                f" {json.dumps(cells[name]):.60}, and is {json.dumps(now[name]):.60} now",
            )


def _conflict(dump: Dump, what: str) -> ConflictError:
    return ConflictError(f"dump {shown(dump.path)}: {what}", ANOTHER)
