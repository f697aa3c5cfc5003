"""Say what a plan knows about the user's columns, and read columns.jsonl: line i has the cells of row i."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from featcli.errors import shown
from featcli.inputs.cells import KINDS, LONGEST_LINE, Kind, is_of_kind
from featcli.system.files import reading

COLUMNS = "columns.jsonl"
USUAL: dict[Kind, type] = {"bool": bool, "float": float, "text": str}  # types whose values all fit


@dataclass(frozen=True)
class PlannedColumns:
    """The columns of a dump: the hash of their file, and the kind of each."""

    digest: str  # xxh3-128 over columns.jsonl
    kinds: Mapping[str, Kind]
    path_column: str | None = None  # the column of paths below the input folder; None if keys are these paths
    without_cells: tuple[str, ...] = ()  # columns whose cells are all missing, so that their kind says nothing
    classes: tuple[str, ...] = ()  # the different texts in the column `label`, sorted

    @property
    def kinds_of_cells(self) -> dict[str, Kind]:
        """The kinds of the columns that have a cell."""
        return {name: kind for name, kind in self.kinds.items() if name not in self.without_cells}

    def to_json(self) -> dict[str, Any]:
        """Return the field `columns` of plan.json."""
        beside = {} if self.path_column is None else {"path_column": self.path_column}
        lists = {"without_cells": list(self.without_cells), "classes": list(self.classes)}
        there = {name: found for name, found in lists.items() if found}
        return {"digest": self.digest, "kinds": dict(self.kinds), **beside, **there}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlannedColumns:
        """Return the columns of a plan. Raises KeyError, TypeError or ValueError for anything else."""
        empty, classes = tuple(content.get("without_cells", ())), tuple(content.get("classes", ()))
        found = cls(content["digest"], dict(content["kinds"]), content.get("path_column"), empty, classes)
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("classes that are no texts")
        if not isinstance(found.digest, str) or not {*found.kinds.values()} <= {*KINDS}:
            raise ValueError("columns that are none")
        if not {*found.without_cells} <= found.kinds.keys():
            raise ValueError("columns without cells that are not there")
        if found.path_column is not None and found.path_column not in found.kinds:
            raise ValueError("a column of paths that is not there")
        return found


def _finite(text: str) -> float:
    """Return a number. Raises ValueError for one that is none in JSON, or is too large for a float."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def read_columns(folder: Path, planned: PlannedColumns, num_rows: int) -> Iterator[dict[str, Any]]:
    """Yield the cells of each row, by column, as columns.jsonl holds them.

    Raises OSError, and ValueError at the end if it is not the planned file.
    """
    digest, count = xxhash.xxh3_128(), 0
    checked = [(name, kind, USUAL.get(kind)) for name, kind in planned.kinds.items() if kind != "json"]
    with reading(folder / COLUMNS, "columns", strict=True) as file:
        while line := file.readline(LONGEST_LINE + 1):
            cells = DECODER.decode(line.decode())
            if not isinstance(cells, dict) or cells.keys() != planned.kinds.keys():
                raise ValueError(f"row {count} has other columns")
            for name, kind, usual in checked:
                cell = cells[name]
                if type(cell) is not usual and not is_of_kind(cell, kind):
                    raise ValueError(f"row {count} has a cell in column {shown(name)} that is no {kind}")
            digest.update(line)
            count += 1
            yield cells
    if (digest.hexdigest(), count) != (planned.digest, num_rows):
        raise ValueError("not the columns that were planned")
