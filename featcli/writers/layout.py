"""Where the arrays of a shard file lie. Both formats come down to this, and are read and written alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Bytes per number. "valid" is uint8; the others are what --dtype offers.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
VALID = "valid"
KEYS = "keys"
ALIGNMENT = 4096  # where formats allow it, an array that is large enough starts on a page


@dataclass(frozen=True)
class Array:
    """An array in a file: row-major, little-endian, without gaps, from `offset` on."""

    dtype: str
    shape: tuple[int, ...]  # the first dimension is the rows
    offset: int

    @property
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
