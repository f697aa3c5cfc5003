"""The specs of `featcli.extract` and `featcli.load_backbone`: what Python takes beside, or instead of, the shell."""

# No `from __future__ import annotations` here, as in commands.py.
from dataclasses import dataclass, field
from typing import Annotated, Any

from featcli.events import Report
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import COMPUTATION, CheckpointSpec, StageSpec
from featcli.spec.option import Option
from featcli.spec.words import DEFAULT_LAYOUT, DEFAULT_PRECISION, LAYOUTS, PRECISIONS, Layout, Precision


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractCall(ExtractSpec):
    """`featcli.extract` in Python: the options, and who is told of every event of the run."""

    report: Report | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BackboneCall(StageSpec, CheckpointSpec):
    """`featcli.load_backbone` in Python: a checkpoint, its stages, and how the network is run."""

    checkpoint: Any = field(kw_only=False)
    device: str = "cpu"
    precision: Annotated[
        Precision, Option(f"Of the computation: {', '.join(PRECISIONS)}.", flags=("precision",), group=COMPUTATION)
    ] = DEFAULT_PRECISION
    layout: Annotated[
        Layout, Option(f"Of maps while they are computed: {', '.join(LAYOUTS)}.", flags=("layout",), group=COMPUTATION)
    ] = DEFAULT_LAYOUT
    fold: Annotated[bool, Option("Batch norms into convolutions.", flags=("fold",), group=COMPUTATION)] = False

    def refuse_conflicts(self) -> None:
        """See Spec: None is no checkpoint."""
        super().refuse_conflicts()
        if self.checkpoint is None:
            self.check_configuration()
