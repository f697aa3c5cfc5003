"""Shard formats. A format is two functions, `lay_out` and `read_layout`, and a suffix: one file and its name here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from featcli.dump.formats.layout import Layout

NAMES = ("hdf5", "safetensors")


class Format(Protocol):
    """What a format must say. It never writes a map: rows go straight to the offsets of its layout."""

    SUFFIX: str

    def lay_out(
        self,
        path: str,
        arrays: Mapping[str, tuple[str, tuple[int, ...]]],
        keys: Sequence[str],
        attributes: Mapping[str, str],
    ) -> Layout:
        """Prepare the empty file at `path`."""

    def read_layout(self, path: str, num_keys: int | None) -> Layout:
        """Where the arrays of a finished file with so many keys are. The keys are not read where it is None."""


class _Formats(Mapping[str, Format]):
    """By name. Imported when it is used: `--help` must not wait for all of them."""

    def __getitem__(self, name: str) -> Format:
        if name not in NAMES:
            raise KeyError(name)
        return importlib.import_module(f"{__name__}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


FORMATS = _Formats()
