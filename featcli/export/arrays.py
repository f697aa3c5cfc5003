"""Export HDF5 and safetensors: every array gets its place before a row is written, as in shards, but in one file.

Each stage is one array, and `valid` is another. Keys and attributes are those of shards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump.atomic_file import write_all
from featcli.dump.formats import FORMATS
from featcli.dump.formats.layout import SHAPES, VALID
from featcli.dump.plan import arrays_of
from featcli.export.content import Content
from featcli.spec import words


class ArrayFile:
    """A format of shards, used as a format of exports."""

    DTYPES: tuple[str, ...] = words.DTYPES

    def __init__(self, name: str) -> None:
        self._format = FORMATS[name]

    def write(self, content: Content, path: Path) -> None:
        """Write the file: first its layout, then the arrays, and last the bytes that make it readable.

        See formats.Format.
        """
        shapes = {stage.name: content.shapes(stage) for stage in content.outputs if stage.is_ragged}
        arrays = arrays_of(content.outputs, len(content.rows), shapes)
        beside = {VALID: content.valid.astype(np.uint8), **{name + SHAPES: found for name, found in shapes.items()}}
        layout = self._format.lay_out(str(path), arrays, content.keys, content.attributes)
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            ends = {name: array.offset for name, array in layout.arrays.items()}  # where each array ends so far

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
