"""Let timm and transformers be imported if torchvision's compiled operators do not fit the torch build.

The package registry's torchvision is compiled against CUDA builds of torch. Beside a CPU-only torch its shared library
cannot be loaded, and `import torchvision` fails while it registers a fake kernel for operators that nobody declared
("operator torchvision::nms does not exist"). featcli needs none of those operators, so it is enough to declare their
schemas.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

MISSING = ("nms", "qnms")
_library: torch.library.Library | None = None  # the declarations live as long as this object


def declare_missing_operators() -> bool:
    """Declare what torchvision's import expects, if its compiled operators cannot be loaded.

    Call it before the first import of torchvision. Returns whether anything was declared.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return False
    compiled = sorted(Path(spec.origin).parent.glob("_C*"))
    try:
        for path in compiled:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        if compiled:
            return False
    except OSError:
        pass  # it is built for another torch
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in MISSING:
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return True


def import_timm() -> Any:
    """Import timm, whose import of torchvision then works, and return it."""
    declare_missing_operators()
    import timm

    return timm


def import_transformers() -> Any:
    """Import transformers in the same way. Raises ModuleNotFoundError if that extra is not installed."""
    declare_missing_operators()
    import transformers

    return transformers
