"""Tell what kind a column of the user's is from its cells, and turn each cell into the value that is kept."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

Kind = Literal["bool", "int", "float", "text", "json"]  # json: lists, objects, or values of several kinds
KINDS: tuple[Kind, ...] = get_args(Kind)
INT = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
SMALL = re.compile(r"-?(0\.0{4,19}[0-9]*[1-9]|[1-9](\.[0-9]*[1-9])?e-[1-9][0-9]{0,2})", re.ASCII)
LEAST_INT, MOST_INT = -(1 << 63), (1 << 63) - 1
EXACT = 1 << 53  # whole numbers up to here are exact as floats
LONGEST_LINE = 1 << 25  # bytes of all cells of an image as columns.jsonl holds them
INFINITIES = {math.inf: "inf", -math.inf: "-inf"}  # JSON has no number for them


def kind_of_text(text: str) -> Kind:
    """Return the kind of a cell of a text format.

    It is a number only if it is written as Python writes that number, so that 007, 1.50 and 1e3 stay text, and so that
    different cells stay different. Numbers near zero have two more ways: 0.00001 and 1e-5, as polars writes 1e-05.
    """
    if INT.fullmatch(text) and LEAST_INT <= int(text) <= MOST_INT:
        return "int"
    try:
        number = float(text)
    except ValueError:
        return "text"
    if not math.isfinite(number):
        return "text"
    if SMALL.fullmatch(text) and decimal.Decimal(text) == decimal.Decimal(repr(number)):
        return "float"
    return "float" if repr(number) == text else "text"


def kind_of_value(value: Any) -> Kind:
    """Return the kind of a value as JSON has it."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if LEAST_INT <= value <= MOST_INT else "json"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "json"


class LearntKind:
    """The kind of a column as far as its cells are known."""

    __slots__ = ("_is_inexact", "_of_texts", "kind")

    def __init__(self, of_texts: bool) -> None:
        self.kind: Kind | None = None  # while every cell is missing
        self._of_texts = of_texts  # every cell is text: numbers are told by how they are written
        self._is_inexact = False  # a whole number that no float equals

    def add(self, cell: Any) -> None:
        """Take a cell into account. None is a missing one."""
        if cell is None or (self.kind == "text" and self._of_texts) or self.kind == "json":
            return
        kind = kind_of_text(cell) if self._of_texts else kind_of_value(cell)
        if kind == "int" and abs(int(cell)) > EXACT:
            self._is_inexact = True
        if self.kind is None:
            self.kind = kind
        elif kind != self.kind:
            self.kind = self._joined(self.kind, kind)
        if self._is_inexact and self.kind == "float":
            self.kind = self._otherwise

    def _joined(self, one: Kind, other: Kind) -> Kind:
        return "float" if {one, other} == {"int", "float"} else self._otherwise

    @property
    def _otherwise(self) -> Kind:
        return "text" if self._of_texts else "json"


def value_of(cell: Any, kind: Kind) -> Any:
    """Return a cell as a line of columns.jsonl holds it, for a column of this kind."""
    if kind == "text" and not (cell is None or isinstance(cell, str)):
        return str(cell)  # as a cell of text was written, which was taken for a number
    if cell is None or kind in ("text", "bool", "json"):
        return cell
    if kind == "int":
        return int(cell)
    number = float(cell)
    return INFINITIES.get(number, number)


def is_of_kind(cell: Any, kind: Kind) -> bool:
    """Return whether a line of columns.jsonl may hold this cell in a column of this kind."""
    if cell is None or kind == "json":
        return True
    found = kind_of_value(cell)
    return found == kind or (kind == "float" and (found == "int" or (found == "text" and cell in INFINITIES.values())))


def joined_kinds(kinds: Iterable[Mapping[str, Kind | None]]) -> dict[str, Kind]:
    """Return the kind of each column over several sources. Where they differ, values stay as they are."""
    found: dict[str, Kind | None] = {}
    for one in kinds:
        for name, kind in one.items():
            before = found.get(name)
            if before is None or kind is None:
                found[name] = before or kind
            elif before != kind:
                found[name] = "float" if {before, kind} == {"int", "float"} else "json"
    return {name: kind or "text" for name, kind in found.items()}
