"""Write Parquet with pyarrow, a row group at a time: `key` and `row`, the user's columns, and lists for each stage.

Lists have a fixed length if all maps have it. But pyarrow before version 25 does not write such a column with nulls,
and before version 26 does not read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcli.errors import UsageError
from featcli.export.arrow_columns import arrow_column, column_fields
from featcli.export.content import Content
from featcli.reading.columns import Cells, as_utf8
from featcli.reading.reader import Run

DTYPES = ("float32", "float16")
ROWS, BYTES = 1024, 1 << 24  # of a row group
MOST_ROWS = 1 << 20  # pyarrow's limit for a row group, which none of these reaches


def write(content: Content, path: Path) -> None:
    """Write the columns. `row` is the row in the dump, keys that are not UTF-8 are escaped, and failed rows are null.

    See formats.Format.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("--to parquet: pyarrow is not installed", "pip install 'featcli[parquet]'") from error
    fields = [pyarrow.field("key", pyarrow.string()), pyarrow.field("row", pyarrow.int64()), *column_fields(content)]
    for stage in content.outputs:
        kind = getattr(pyarrow, stage.dtype)()
        is_fixed = not stage.is_ragged and content.valid.all()
        length = int(np.prod(stage.shape_at((0, 0)))) if is_fixed else -1
        shape = {"shape": json.dumps(stage.shape)}
        fields.append(pyarrow.field(stage.name, pyarrow.list_(kind, length), metadata=shape))
        if stage.is_ragged:
            fields.append(pyarrow.field(f"{stage.name}.shape", pyarrow.list_(pyarrow.int32(), 3)))
    schema = pyarrow.schema(fields, metadata=content.attributes)
    with parquet.ParquetWriter(path, schema, compression="none") as file:
        waiting: list[Any] = []  # each row group has costs of its own
        for run, cells in content.runs_with_cells():
            waiting.append(_batch(content, run, cells, schema))
            if sum(batch.num_rows for batch in waiting) >= ROWS or sum(batch.nbytes for batch in waiting) >= BYTES:
                file.write_table(pyarrow.Table.from_batches(waiting), row_group_size=MOST_ROWS)
                waiting.clear()
        file.write_table(pyarrow.Table.from_batches(waiting, schema), row_group_size=MOST_ROWS)


def _batch(content: Content, run: Run, cells: Sequence[Cells], schema: Any) -> Any:
    import pyarrow

    valid = content.dump.valid[run.rows]
    columns = [pyarrow.array([as_utf8(key) for key in run.keys]), pyarrow.array(run.rows, pyarrow.int64())]
    columns += [
        arrow_column([of_row[name] for of_row in cells], kind, schema.field(name).type)
        for name, kind in content.kinds.items()
    ]
    for stage in content.outputs:
        maps = run.maps[stage.name]
        columns.append(_lists(maps, valid, schema.field(stage.name).type))
        if stage.is_ragged:
            shapes = [list(one.shape) for one in maps]
            columns.append(pyarrow.array(shapes, schema.field(f"{stage.name}.shape").type))
    return pyarrow.record_batch(columns, schema=schema)


def _lists(maps: Any, valid: np.ndarray, kind: Any) -> Any:
    """Return a column of lists, null for rows that are not valid. Lists of equal length are not copied."""
    import pyarrow

    if not pyarrow.types.is_fixed_size_list(kind):
        there = [one.ravel() if is_valid else one.ravel()[:0] for one, is_valid in zip(maps, valid, strict=True)]
        ends = pyarrow.array(np.cumsum([0, *(one.size for one in there)], dtype=np.int32))
        mask = None if valid.all() else pyarrow.array(~valid)
        return pyarrow.ListArray.from_arrays(ends, pyarrow.array(np.concatenate(there)), type=kind, mask=mask)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(maps.reshape(-1)), type=kind)
