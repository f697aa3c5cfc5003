"""Which rows are meant: by number, key, slice, list of either, or mask."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from featcli.dump.folder import Dump
from featcli.errors import nearest, shown


class RowIndex:
    """The rows of a dump by what people name them with. Its keys are read when first asked for."""

    def __init__(self, dump: Dump) -> None:
        self._dump = dump

    def __len__(self) -> int:
        return self._dump.plan.num_images

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row."""
        return self._dump.keys()

    @cached_property
    def row_of_key(self) -> Mapping[str, int]:
        """The row of each key."""
        return {key: row for row, key in enumerate(self.keys)}

    def rows_of(self, index: Any) -> int | Sequence[int]:
        """What is asked for as a row, or as rows in the order that was given.

        Raises KeyError and IndexError as a dict and an array do, TypeError for what names no rows.
        """
        if type(index) is int:  # first: single maps are read often
            return self._absolute(index)
        if isinstance(index, slice):
            return range(len(self))[index]
        if isinstance(index, str):
            return self._row(index)
        if isinstance(index, tuple | bytes | bool | np.bool_):
            raise TypeError("a stage is indexed by images alone: dump[stage][image][channel]")
        if not hasattr(index, "__len__") or getattr(index, "shape", None) == ():
            if not hasattr(index, "__index__"):
                raise TypeError(f"{index!r} is neither a row nor a key")
            return self._absolute(operator.index(index))
        return self._listed(index)

    def _listed(self, index: Any) -> list[int]:
        """A mask, or rows and keys in any order, as rows. Whatever holds other things is an error, never a guess."""
        listed = index.tolist() if hasattr(index, "tolist") else [getattr(i, "item", lambda i=i: i)() for i in index]
        if listed and all(type(i) is bool for i in listed):
            if len(listed) != len(self):
                raise IndexError(f"a mask of {len(listed)} for {len(self)} rows")
            return [row for row, chosen in enumerate(listed) if chosen]
        wrong = [i for i in listed if type(i) not in (int, str)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is neither a row nor a key")
        return [self._row(i) if isinstance(i, str) else self._absolute(i) for i in listed]

    def _row(self, key: str) -> int:
        if key not in self.row_of_key:
            near = nearest(key, self.row_of_key, 1)
            raise KeyError(f"no key {shown(key)} in this dump" + (f"; did you mean {shown(near[0])}?" if near else ""))
        return self.row_of_key[key]

    def _absolute(self, row: int) -> int:
        count = len(self)
        if not -count <= row < count:
            raise IndexError(f"row {row} of {count}")
        return row if row >= 0 else row + count
