"""Bytes of a shard file at their place: rows read from where the layout says they are, and what is written."""

from __future__ import annotations

import os

import numpy as np

from featcli.writers.layout import Array

# numpy has no bfloat16: its values are read as the same bits under another name.
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "uint8": np.uint8, "bfloat16": np.uint16}


def read_rows(descriptor: int, array: Array, first: int, count: int) -> np.ndarray:
    """`count` rows from `first` on as they are stored. Raises EOFError where the file ends before."""
    content = np.empty((count, *array.shape[1:]), NUMPY_TYPES[array.dtype])
    view = content.data.cast("B")
    offset = array.offset + first * array.row_bytes
    while view:
        received = os.preadv(descriptor, [view], offset)
        if not received:
            raise EOFError("cut short while it was read")
        view, offset = view[received:], offset + received
    return content


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of it at `offset`; the system may take less at a time."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def values_of(stored: np.ndarray) -> np.ndarray:
    """The numbers: bfloat16, stored as uint16, as float32, which holds each of them exactly; all others as they are."""
    if stored.dtype != np.uint16:
        return stored
    return np.asarray(np.left_shift(stored, 16, dtype=np.uint32)).view(np.float32)
