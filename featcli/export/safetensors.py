"""One safetensors file: a tensor for each stage and `valid`; the keys are in its metadata, as JSON."""

from __future__ import annotations

from pathlib import Path

from featcli.export.arrays import write_arrays
from featcli.export.content import Content

DTYPES = ("float32", "float16", "bfloat16")


def write(content: Content, path: Path) -> None:
    """See exports.Format."""
    write_arrays(content, path, "safetensors")
