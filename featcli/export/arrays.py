"""Export HDF5 and safetensors: every array gets its place before a row is written, as in shards, but in one file.

Each stage is one array, and `valid` is another. Keys and attributes are those of shards. The user's columns are
datasets of HDF5, and JSON among the attributes of safetensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from featcli.dump.atomic_file import write_all
from featcli.dump.formats import FORMATS
from featcli.dump.formats.layout import SHAPES, VALID, DoesNotFitError
from featcli.dump.formats.safetensors import MAX_HEADER_BYTES
from featcli.dump.plan import arrays_of
from featcli.export.content import Content
from featcli.export.hdf5_columns import add_columns
from featcli.spec import words

COLUMNS = "columns"  # attribute of a safetensors file


class ArrayFile:
    """A format of shards, used as a format of exports."""

    DTYPES: tuple[str, ...] = words.DTYPES

    def __init__(self, name: str) -> None:
        self._name = name
        self._format = FORMATS[name]

    def write(self, content: Content, path: Path) -> None:
        """Write the file: first its layout, then the arrays, and last the bytes that make it readable.

        See formats.Format.
        """
        shapes = {stage.name: content.shapes(stage) for stage in content.outputs if stage.is_ragged}
        arrays = arrays_of(content.outputs, len(content.rows), shapes)
        beside = {VALID: content.valid.astype(np.uint8), **{name + SHAPES: found for name, found in shapes.items()}}
        is_hdf5 = self._name == "hdf5"
        attributes = content.attributes if is_hdf5 else {**content.attributes, **_columns_as_json(content)}
        layout = self._format.lay_out(str(path), arrays, content.keys, attributes)
        if is_hdf5:
            add_columns(content, path)
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


def _columns_as_json(content: Content) -> dict[str, str]:
    """Return the attribute `columns`: a list of values for each column. Raises DoesNotFitError, before it is whole."""
    lists: dict[str, list[str]] = {name: [] for name in content.kinds}
    num_bytes = 0
    for _, cells in content.cells() if lists else ():
        for name, cell in cells.items():
            lists[name].append(json.dumps(cell))
            num_bytes += len(lists[name][-1])
        if num_bytes > MAX_HEADER_BYTES:
            raise DoesNotFitError(
                f"the columns of {len(content.rows):,} images do not fit into the header of a safetensors file"
            )
    texts = [f"{json.dumps(name)}: [{', '.join(cells)}]" for name, cells in lists.items()]
    return {COLUMNS: f"{{{', '.join(texts)}}}"} if texts else {}
