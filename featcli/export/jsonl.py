"""Write JSON lines: an object for each image, its key first, for jq and other programs that read line by line."""

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
    """Yield a line for each row: its key, its columns, its maps.

    Stages of failed images are null, and so are values of maps that JSON lacks: NaN and infinity. In columns infinity
    is the text inf or -inf, and null is a missing cell.
    """
    valid = content.dump.valid
    for run, all_cells in content.runs_with_cells():
        for place, (row, key, cells) in enumerate(zip(run.rows, run.keys, all_cells, strict=True)):
            maps = {name: _numbers(found[place]) if valid[row] else "null" for name, found in run.maps.items()}
            texts = {name: json.dumps(value) for name, value in {"key": key, **cells}.items()}
            fields = [f"{json.dumps(name)}: {text}" for name, text in {**texts, **maps}.items()]
            yield f"{{{', '.join(fields)}}}\n".encode("ascii")


def _numbers(array: np.ndarray) -> str:
    """Return nested lists. Each number has as few digits as it needs to be read back exactly as float32."""
    if array.ndim > 1:
        return f"[{', '.join(map(_numbers, array))}]"
    wide = array.astype(np.float32)  # float16 would need fewer digits, but only for those who read it as float16 again
    pairs = zip(wide.astype("U").tolist(), np.isfinite(array).tolist(), strict=True)
    return f"[{', '.join([text if is_finite else 'null' for text, is_finite in pairs])}]"
