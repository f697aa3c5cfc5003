"""List what a dump can be exported to. A format is a function `write`, the dtypes that it can hold, and a suffix."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from featcli.dump.formats import FORMATS

if TYPE_CHECKING:
    from featcli.export.content import Content

SUFFIXES = {
    "hdf5": (".h5", ".hdf5"),
    "safetensors": (".safetensors",),
    "npy": (".npy",),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
}


class Format(Protocol):
    """What a format must have."""

    DTYPES: tuple[str, ...]  # that it can hold; other dtypes become float32

    def write(self, content: Content, path: Path) -> None:
        """Write everything into the empty file at `path`, some rows at a time.

        Raises UsageError for what it cannot hold.
        """


def export_format(name: str) -> Format:
    """Return a format by its name. Its module is imported now."""
    if name in FORMATS:  # the formats of shards
        from featcli.export.arrays import ArrayFile

        return ArrayFile(name)
    return importlib.import_module(f"featcli.export.{name}")


def format_of(path: str) -> str | None:
    """Return the name of the format that the suffix of a file says, or None."""
    return next((name for name, suffixes in SUFFIXES.items() if path.lower().endswith(suffixes)), None)
