"""Define how a network is run, which changes its numbers a little and its speed by factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featcli.spec.words import DEFAULT_LAYOUT, DEFAULT_PRECISION, Layout, Precision

# Words of the options -> torch's names.
PRECISIONS: Mapping[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LAYOUTS: Mapping[Layout, str] = {"channels-first": "contiguous_format", "channels-last": "channels_last"}


@dataclass(frozen=True)
class Execution:
    """How a network is run: as in its library, or faster.

    The plan holds it, because each field can change the last bits.
    """

    precision: Precision = DEFAULT_PRECISION
    layout: Layout = DEFAULT_LAYOUT  # of maps in memory inside the network; on disk it is channels first
    folded: bool = False  # batch norms are folded into the convolutions before them
    compiled: bool = False  # by torch.compile, for one batch size, with the weights as constants

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as the plan holds them."""
        return asdict(self)
