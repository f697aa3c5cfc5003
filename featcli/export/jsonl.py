"""Write JSON lines: an object for each image, with its key first, for jq and other programs that read line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from featcli.export.content import Content

DTYPES = ("float32", "float16")


def write(content: Content, path: Path) -> None:
    """Write the lines into a file. See formats.Format."""
    with path.open("wb") as file:
        file.writelines(lines(content))


def lines(content: Content) -> Iterator[bytes]:
    """Yield a line for each row.

    Stages of failed images are null, and so are values that JSON lacks: NaN and infinity.
    """
    valid = content.dump.valid
    for run in content.runs():
        for place, (row, key) in enumerate(zip(run.rows, run.keys, strict=True)):
            maps = {name: _numbers(found[place]) if valid[row] else "null" for name, found in run.maps.items()}
            fields = [f"{json.dumps(name)}: {text}" for name, text in maps.items()]
            yield f'{{"key": {json.dumps(key)}, {", ".join(fields)}}}\n'.encode("ascii")


def _numbers(array: np.ndarray) -> str:
    """Return nested lists. Each number has as few digits as it needs to be read back exactly as float32."""
    if array.ndim > 1:
        return f"[{', '.join(map(_numbers, array))}]"
    wide = array.astype(np.float32)  # float16 would need fewer digits, but only for those who read it as float16 again
    pairs = zip(wide.astype("U").tolist(), np.isfinite(array).tolist(), strict=True)
    return f"[{', '.join([text if is_finite else 'null' for text, is_finite in pairs])}]"
