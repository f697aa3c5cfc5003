"""One HDF5 file: a contiguous dataset for each stage, `keys` and `valid`, as the shards of a dump have them."""

from __future__ import annotations

from pathlib import Path

from featcli.export.arrays import write_arrays
from featcli.export.content import Content

DTYPES = ("float32", "float16", "bfloat16")


def write(content: Content, path: Path) -> None:
    """See exports.Format."""
    write_arrays(content, path, "hdf5")
