"""Reduce deep samples to 8 bits, linearly between the value of black and the value of white."""

from __future__ import annotations

import numpy as np

from featcli.pixels.failure import UnreadableError

AT_ONCE = 2**20  # samples that are computed together, because each takes several copies of 4 bytes


def highest(bits: int) -> float:
    """Return the largest value of this many bits, which becomes white. The lowest is 0."""
    return float(2**bits - 1)


def reduced(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Reduce (H, W, ...) numbers to 8 bits. `black` may be larger than `white`.

    Raises UnreadableError for NaN and infinity.
    """
    out = np.empty(values.shape, np.uint8)
    rows = max(1, AT_ONCE // max(1, values[:1].size))
    table = _eight_bits(np.arange(2**16), black, white) if values.dtype.kind == "u" and values.itemsize <= 2 else None
    for first in range(0, len(values), rows):
        strip = values[first : first + rows]
        out[first : first + rows] = _eight_bits(strip, black, white) if table is None else table[strip]
    return out


def high_bits(values: np.ndarray) -> np.ndarray:
    """Return the upper 8 bits of 16-bit values, as Pillow does for colours."""
    return (values >> 8).astype(np.uint8)


def _eight_bits(values: np.ndarray, black: float, white: float) -> np.ndarray:
    numbers = values.astype(np.float64 if values.dtype in ("f8", "i8", "u8") else np.float32)
    if not np.isfinite(numbers).all():
        raise UnreadableError("unsupported_depth", "values that are not finite")
    scaled: np.ndarray = ((numbers - black) / ((white - black) / 255)).round().clip(0, 255).astype(np.uint8)
    return scaled
