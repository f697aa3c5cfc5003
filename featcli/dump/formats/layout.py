"""Say where the arrays of a shard file lie, and read their rows from there, for both formats."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# Bytes of a number. "valid" is uint8, shapes are uint32, and the others are what --dtype offers.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "uint32": 4}
VALID = "valid"
SHAPES = ".shapes"  # end of the name of the array with the (C, H, W) of each row, for a stage whose maps differ in size
KEYS = "keys"
ALIGNMENT = 4096  # an array that is large enough starts on a page, if the format allows it


def is_stage(name: str) -> bool:
    """Return whether an array holds the maps of a stage. Each of these is hashed by itself."""
    return name != VALID and not name.endswith(SHAPES)


class DoesNotFitError(ValueError):
    """Something that a format cannot hold. Its text ends a message."""


@dataclass(frozen=True)
class Array:
    """An array in a file: row-major, little-endian, without gaps, from `offset` on."""

    dtype: str
    shape: tuple[int, ...]  # rows first; if maps differ in size, only the number of all their values
    offset: int

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    @cached_property
    def row_type(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and stored dtype of one row, for numpy."""
        return self.shape[1:], np.dtype(NUMPY_TYPES[self.dtype])

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.offset + self.row_bytes * self.shape[0]


@dataclass(frozen=True)
class Layout:
    """A shard file of known size: its arrays, and what it says about itself."""

    arrays: Mapping[str, Array]
    size: int
    keys: Sequence[str]
    attributes: Mapping[str, str]
    header: bytes = b""  # is written at offset 0 after everything else; empty if the file has it already


# numpy has no bfloat16, so its values are read as the same bits with another dtype.
NUMPY_TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "uint8": np.uint8,
    "uint32": np.uint32,
    "bfloat16": np.uint16,
}


def read_rows(descriptor: int, array: Array, first: int, count: int) -> np.ndarray:
    """Return `count` rows from `first` on as they are stored. Raises EOFError if the file ends before."""
    content = np.empty((count, *array.shape[1:]), NUMPY_TYPES[array.dtype])
    fill_rows(content, descriptor, array, first)
    return content


def read_row(descriptor: int, array: Array, row: int) -> np.ndarray:
    """Return one row as it is stored. Raises EOFError if the file ends before."""
    content = np.empty(*array.row_type)
    fill_rows(content, descriptor, array, row)
    return content


def fill_rows(out: np.ndarray, descriptor: int, array: Array, first: int) -> None:
    """Fill a contiguous array of the stored dtype with the rows from `first` on.

    Raises EOFError if the file ends before.
    """
    offset = array.offset + first * array.row_bytes
    received = os.preadv(descriptor, [out.data], offset)
    if received == out.nbytes:
        return
    view = out.data.cast("B")
    while view := view[received:]:  # the system may return fewer bytes at a time
        offset += received
        received = os.preadv(descriptor, [view], offset)
        if not received:
            raise EOFError("cut short while it was read")


def starts_of(shapes: np.ndarray, values: int) -> np.ndarray:
    """Return where each map begins in the array that holds them one after another, and where the last ends.

    `shapes` are their (C, H, W), `values` is the length of the array. Raises ValueError if the two do not fit.
    """
    if (shapes.astype(np.float64).prod(1) > values).any():  # checked before whole numbers could overflow
        raise ValueError("a map larger than all of them")
    starts: np.ndarray = np.concatenate([[0], shapes.astype(np.int64).prod(1).cumsum()])
    if starts[-1] != values:
        raise ValueError("maps of another size than its shapes say")
    return starts


def values_of(stored: np.ndarray) -> np.ndarray:
    """Return the numbers: bfloat16, which is stored as uint16, becomes float32 without loss.

    Others stay as they are.
    """
    if stored.dtype.char != "H":
        return stored
    return np.asarray(np.left_shift(stored, 16, dtype=np.uint32)).view(np.float32)
