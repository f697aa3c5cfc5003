"""Define the specs of `featcli.extract` and `featcli.load_backbone`: the options, and what only Python takes."""

# Annotations must not be text here: see commands.py.
from dataclasses import dataclass, field
from typing import Annotated, Any

from featcli.events import Report
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import COMPUTATION, OF_DEVICE, CheckpointSpec, PixelSpec, StageSpec
from featcli.spec.option import Option
from featcli.spec.parsers import precision_of_type
from featcli.spec.words import DEFAULT_LAYOUT, DEFAULT_PRECISION, LAYOUTS, PRECISIONS, Layout, Precision


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractCall(ExtractSpec):
    """`featcli.extract` in Python: the options, and a report that is called with every event of the run."""

    report: Report | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BackboneCall(StageSpec, PixelSpec, CheckpointSpec):
    """`featcli.load_backbone` in Python: a checkpoint, its stages and pixels, and how the network is run."""

    checkpoint: Any = field(kw_only=False)
    device: Annotated[str, OF_DEVICE] = "cpu"
    precision: Annotated[
        Precision,
        Option(
            f"Of the computation: {', '.join(PRECISIONS)}.",
            flags=("precision",),
            group=COMPUTATION,
            keep=precision_of_type,
        ),
    ] = DEFAULT_PRECISION
    layout: Annotated[
        Layout, Option(f"Of maps while they are computed: {', '.join(LAYOUTS)}.", flags=("layout",), group=COMPUTATION)
    ] = DEFAULT_LAYOUT
    fold: Annotated[bool, Option("Batch norms into convolutions.", flags=("fold",), group=COMPUTATION)] = False

    def refuse_conflicts(self) -> None:
        """Refuse None as a checkpoint. See Spec."""
        super().refuse_conflicts()
        if self.checkpoint is None:
            self.check_configuration()
