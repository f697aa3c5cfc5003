"""Define the formats of shards. A format is a module with two functions, `lay_out` and `read_layout`, and a suffix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from featcli.dump.formats import hdf5, safetensors
from featcli.dump.formats.layout import Layout


class Format(Protocol):
    """What a format must have. It never writes a map, because rows go straight to the offsets of its layout."""

    SUFFIX: str

    def lay_out(
        self,
        path: str,
        arrays: Mapping[str, tuple[str, tuple[int, ...]]],
        keys: Sequence[str],
        attributes: Mapping[str, str],
    ) -> Layout:
        """Prepare the empty file at `path`, and return where each array belongs. Raises DoesNotFitError."""

    def read_layout(self, path: str, num_keys: int | None) -> Layout:
        """Return where the arrays of a finished file with `num_keys` keys are. For None the keys are not read.

        Raises DamagedError and MachineError.
        """


# The keys are the words of --format.
FORMATS: Mapping[str, Format] = {"hdf5": hdf5, "safetensors": safetensors}
