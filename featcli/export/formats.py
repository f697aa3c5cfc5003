"""What a dump can be exported to. A format is one function, `write`, the types it has, and a suffix."""

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
    """What a format must say."""

    DTYPES: tuple[str, ...]  # that it can hold; whatever is stored in another becomes float32

    def write(self, content: Content, path: Path) -> None:
        """Write all of it into the empty file at `path`, some rows at a time. Raises UsageError for what it has not."""


def export_format(name: str) -> Format:
    """A format by its name, imported when it is used."""
    if name in FORMATS:  # as those of shards
        from featcli.export.arrays import ArrayFile

        return ArrayFile(name)
    return importlib.import_module(f"featcli.export.{name}")


def format_of(path: str) -> str | None:
    """The name of the format that a file's suffix says, or None."""
    return next((name for name, suffixes in SUFFIXES.items() if path.lower().endswith(suffixes)), None)
