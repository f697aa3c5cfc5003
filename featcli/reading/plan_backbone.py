"""The backbone that a dump was made with, loaded again by its plan: a query is treated as the dump's images were."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from featcli.dump.plan import Plan
from featcli.errors import ConflictError, FeatcliError, UsageError, shown
from featcli.spec.calls import BackboneCall
from featcli.spec.parsers import Size
from featcli.system.files import is_file

if TYPE_CHECKING:
    from featcli.backbones.backbone import Backbone

OF_RANDOM_WEIGHTS = re.compile(r"random weights, seed (\d+)")  # as the provenance of a plan says it
OF_WEIGHTS = ("model_arg", "weights_key")  # options that no plan has as they were given
THE_OTHER = "give the checkpoint that the dump was made with, and the model_arg of then"


def load_plan_backbone(plan: Plan, checkpoint: Any, device: Any, weights: Mapping[str, Any]) -> Backbone:
    """Load the backbone of a plan: its stages, norm, size, pixels, precision, layout and folding.

    `checkpoint`: needed where the plan names none that can be found from here, since it keeps only the last name of a
    folder or file. `weights`: options of OF_WEIGHTS. Raises UsageError without a checkpoint and for other options,
    ConflictError for another architecture or other weights than the dump's, and what `load_backbone` raises.
    """
    from featcli.backbones.load import load_backbone

    if unknown := weights.keys() - OF_WEIGHTS:
        raise UsageError(
            f"{min(unknown)}: a dump's backbone has the settings of its plan",
            f"it takes {' and '.join(OF_WEIGHTS)} beside them; featcli.load_backbone takes any option",
        )
    options = {**_options(plan, checkpoint, device), **weights}
    backbone = load_backbone(**options, image_size=_image_size(plan, options))
    if backbone.digest != plan.settings.weights_digest:
        raise ConflictError(f"checkpoint {shown(backbone.name)}: its weights are not those of this dump", THE_OTHER)
    return backbone


def _options(plan: Plan, checkpoint: Any, device: Any) -> dict[str, Any]:
    """The options that ask for the backbone of a plan, but for the size of its input."""
    known = {one.name for one in fields(BackboneCall)} - {"image_size"}
    options = {name: value for name, value in plan.settings.options().items() if name in known and value is not None}
    options |= checkpoint_options(plan, checkpoint, "give it: dump.load_backbone(checkpoint)") | {"device": device}
    options["out_indices"] = tuple(stage.index for stage in plan.stages)
    return options


def checkpoint_options(plan: Plan, checkpoint: Any, hint: str) -> dict[str, Any]:
    """Give the options that ask for the checkpoint of a plan: its name, random weights and seed, or architecture.

    `checkpoint`: stands for the name; None takes the plan's. Raises UsageError with that hint where it names none.
    """
    options: dict[str, Any] = {"checkpoint": _named(plan, hint) if checkpoint is None else checkpoint}
    is_name = isinstance(options["checkpoint"], str | os.PathLike)
    if is_name and is_file(options["checkpoint"]):  # it holds weights
        options |= {} if plan.settings.timm_architecture is None else {"arch": plan.settings.timm_architecture}
    elif is_name and (random := OF_RANDOM_WEIGHTS.match(plan.provenance["weights"])):
        options |= {"random_init": True, "seed": int(random[1])}
    return options


def _named(plan: Plan, hint: str) -> str:
    """The checkpoint that a plan names, where that is a name which means the same everywhere. Raises UsageError."""
    name, _, within = str(plan.provenance["checkpoint"]).partition(" (")
    if (plan.settings.timm_architecture is not None and not within) or name.count("/") == 1:
        return name
    raise UsageError(
        f"this dump was made with {shown(name)}, a file, a folder or a configuration that its plan cannot find", hint
    )


def _image_size(plan: Plan, options: dict[str, Any]) -> Size | None:
    """The size to ask for: the checkpoint's own where that is the plan's, since asking can change a network.

    Raises ConflictError where the checkpoint is of another architecture at either, or what `resolve` raises.
    """
    from featcli.backbones.checkpoint import resolve

    settings = plan.settings
    cause: FeatcliError | None = None
    for size in (settings.largest,) if settings.is_native else (None, settings.input_size):
        try:
            model = resolve(BackboneCall(**options, image_size=size))
        except FeatcliError as error:  # of a checkpoint that has no size of its own, the first try
            cause = error
            continue
        if model.is_of(settings.backbone):
            return size
        cause = None
    if cause is not None:
        raise cause
    raise ConflictError(f"checkpoint {shown(model.name)}: its architecture is not that of this dump", THE_OTHER)
