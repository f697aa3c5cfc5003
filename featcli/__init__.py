"""Dump the feature maps of frozen vision backbones.

Data flows through spec, inputs, pixels, backbones, run, dump and reading, in this order: see docs/architecture.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcli.backbones.backbone import Backbone
    from featcli.backbones.load import load_backbone
    from featcli.backbones.replay import replay
    from featcli.errors import (
        CheckpointError,
        ConflictError,
        DamagedError,
        FeatcliError,
        IncompleteError,
        MachineError,
        UsageError,
        WorkerError,
    )
    from featcli.events import Report
    from featcli.extraction.extract import extract
    from featcli.reading.reader import DumpReader, open_dump
    from featcli.reading.stage_array import StageArray
    from featcli.run.progress import progress_bar

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "CheckpointError",
    "ConflictError",
    "DamagedError",
    "DumpReader",
    "FeatcliError",
    "IncompleteError",
    "MachineError",
    "Report",
    "StageArray",
    "UsageError",
    "WorkerError",
    "extract",
    "load_backbone",
    "open_dump",
    "progress_bar",
    "replay",
]

_HOMES = {
    "Backbone": "backbones.backbone",
    "DumpReader": "reading.reader",
    "Report": "events",
    "StageArray": "reading.stage_array",
    "extract": "extraction.extract",
    "load_backbone": "backbones.load",
    "open_dump": "reading.reader",
    "progress_bar": "run.progress",
    "replay": "backbones.replay",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Names are imported when they are first used: `featcli --help` must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'featcli' has no attribute {name!r}")
    return getattr(importlib.import_module(f"featcli.{_HOMES.get(name, 'errors')}"), name)
