"""Where the arrays of a shard file lie. Both formats come down to this, and are read and written alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

# Bytes per number. "valid" is uint8, shapes are uint32; the others are what --dtype offers.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "uint32": 4}
VALID = "valid"
SHAPES = ".shapes"  # ends the name of the array with the (C, H, W) of each row of a stage whose maps differ in size
KEYS = "keys"
ALIGNMENT = 4096  # where formats allow it, an array that is large enough starts on a page


def is_stage(name: str) -> bool:
    """Whether an array holds the maps of a stage, and is hashed by itself."""
    return name != VALID and not name.endswith(SHAPES)


@dataclass(frozen=True)
class Array:
    """An array in a file: row-major, little-endian, without gaps, from `offset` on."""

    dtype: str
    shape: tuple[int, ...]  # the first dimension is the rows; of maps that differ in size, all their values
    offset: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """The first byte after the array."""
        return self.offset + self.row_bytes * self.shape[0]


@dataclass(frozen=True)
class Layout:
    """A shard file of known size: its arrays, and what it says about itself."""

    arrays: Mapping[str, Array]
    size: int
    keys: Sequence[str]
    attributes: Mapping[str, str]
    header: bytes = b""  # to be written at offset 0 when all else is there; empty where the file has it already
