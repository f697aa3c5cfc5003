"""Shard formats. A format is two functions, `lay_out` and `read_layout`, and a suffix: a file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from featcli.dump.formats import hdf5, safetensors
from featcli.dump.formats.layout import Layout


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
        """Prepare the empty file at `path`. Raises DoesNotFitError."""

    def read_layout(self, path: str, num_keys: int | None) -> Layout:
        """Where the arrays of a finished file with so many keys are. The keys are not read where it is None."""


# Keyed by the words of --format.
FORMATS: Mapping[str, Format] = {"hdf5": hdf5, "safetensors": safetensors}
