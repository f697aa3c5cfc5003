"""Formats in which every array has its place before a row is written: what the shards of a dump are, in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump.formats import FORMATS
from featcli.dump.formats.layout import SHAPES, VALID
from featcli.export.content import Content
from featcli.system.files import write_all


def write_arrays(content: Content, path: Path, format_name: str) -> None:
    """Lay the file out, fill the arrays some rows at a time, and write what makes it readable last."""
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    beside = {VALID: content.valid.astype(np.uint8)}
    for stage in content.stages:
        if stage.is_ragged:
            shapes = content.shapes(stage)
            arrays[stage.name] = stage.dtype, (int(shapes.astype(np.int64).prod(1).sum()),)
            beside[stage.name + SHAPES] = shapes
        else:
            arrays[stage.name] = stage.dtype, (len(content.rows), *stage.shape_at((0, 0)))
    arrays |= {name: (array.dtype.name, array.shape) for name, array in beside.items()}
    layout = FORMATS[format_name].lay_out(str(path), arrays, content.keys, content.attributes)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        ends = {name: array.offset for name, array in layout.arrays.items()}  # of what is written so far

        def append(name: str, rows: Any) -> None:
            content = np.ascontiguousarray(rows).data.cast("B")
            write_all(descriptor, content, ends[name])
            ends[name] += len(content)

        for run in content.runs():
            for name, maps in run.maps.items():
                for rows in maps if isinstance(maps, list) else [maps]:
                    append(name, rows)
        for name, array in beside.items():
            append(name, array)
        write_all(descriptor, memoryview(layout.header), 0)
    finally:
        os.close(descriptor)
