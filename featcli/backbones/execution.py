"""How a network is run: what moves its numbers by a little and its speed by factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featcli.spec.words import DEFAULT_LAYOUT, DEFAULT_PRECISION, Layout, Precision

# The words of the options -> torch's names.
PRECISIONS: Mapping[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LAYOUTS: Mapping[Layout, str] = {"channels-first": "contiguous_format", "channels-last": "channels_last"}


@dataclass(frozen=True)
class Execution:
    """As the library runs it, or faster. Frozen in the plan, since each of these can move the last bits."""

    precision: Precision = DEFAULT_PRECISION
    layout: Layout = DEFAULT_LAYOUT  # of maps in memory on their way through the network; on disk it is channels first
    folded: bool = False  # batch norms into the convolutions before them
    compiled: bool = False  # by torch.compile, for one batch size, with the weights as constants

    @property
    def settings(self) -> dict[str, Any]:
        """Part of the plan."""
        return asdict(self)
