"""Load the backbone of a dump again by its plan, so that a query is treated as the dump's images were."""

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
OF_WEIGHTS = ("model_arg", "weights_key")  # options whose given form is in no plan
THE_OTHER = "give the checkpoint that the dump was made with, and the same model_arg"


def load_plan_backbone(plan: Plan, checkpoint: Any, device: Any, weights: Mapping[str, Any]) -> Backbone:
    """Load the backbone of a plan with its stages, norm, size, pixels, precision, layout and folding.

    `checkpoint` is needed if the plan names none that can be found from here: of a folder or file it keeps only the
    last name. `weights` are options of OF_WEIGHTS. Raises UsageError if the checkpoint is missing and for other
    options, ConflictError if architecture or weights are not those of the dump, and what `load_backbone` raises.
    """
    from featcli.backbones.load import load_backbone

    if unknown := weights.keys() - OF_WEIGHTS:
        raise UsageError(
            f"{min(unknown)}: a dump's backbone has the settings of its plan",
            f"give only {' and '.join(OF_WEIGHTS)}, or call featcli.load_backbone, which takes any option",
        )
    options = {**_options(plan, checkpoint, device), **weights}
    backbone = load_backbone(**options, image_size=_image_size(plan, options))
    if backbone.digest != plan.settings.weights_digest:
        raise ConflictError(f"checkpoint {shown(backbone.name)}: its weights are not those of this dump", THE_OTHER)
    return backbone


def _options(plan: Plan, checkpoint: Any, device: Any) -> dict[str, Any]:
    """Return the options that ask for the backbone of a plan, without the size of its input."""
    known = {one.name for one in fields(BackboneCall)} - {"image_size"}
    options = {name: value for name, value in plan.settings.options().items() if name in known and value is not None}
    options |= checkpoint_options(plan, checkpoint, "give it: dump.load_backbone(checkpoint)") | {"device": device}
    options |= {name: value for name, value in plan.options().items() if name in known}
    return options


def checkpoint_options(plan: Plan, checkpoint: Any, hint: str) -> dict[str, Any]:
    """Return the options that ask for the checkpoint of a plan: its name, random weights and seed, or architecture.

    `checkpoint` replaces the plan's name; None takes the plan's. Raises UsageError with `hint` if there is no name.
    """
    options: dict[str, Any] = {"checkpoint": _named(plan, hint) if checkpoint is None else checkpoint}
    is_name = isinstance(options["checkpoint"], str | os.PathLike)
    if is_name and is_file(options["checkpoint"]):  # the file holds weights
        options |= {} if plan.settings.timm_architecture is None else {"arch": plan.settings.timm_architecture}
    elif is_name and (random := OF_RANDOM_WEIGHTS.match(plan.provenance["weights"])):
        options |= {"random_init": True, "seed": int(random[1])}
    return options


def _named(plan: Plan, hint: str) -> str:
    """Return the checkpoint of a plan if its name means the same everywhere. Raises UsageError if it does not."""
    name, _, within = str(plan.provenance["checkpoint"]).partition(" (")
    if (plan.settings.timm_architecture is not None and not within) or name.count("/") == 1:
        return name
    raise UsageError(
        f"this dump was made with {shown(name)}, a file, a folder or a configuration that its plan cannot find", hint
    )


def _image_size(plan: Plan, options: dict[str, Any]) -> Size | None:
    """Return the size to ask for, None if the checkpoint has it by itself: asking can change a network.

    Raises ConflictError if the checkpoint has another architecture at both sizes, and what `resolve` raises.
    """
    from featcli.backbones.checkpoint import resolve

    settings = plan.settings
    cause: FeatcliError | None = None
    for size in (settings.largest,) if settings.is_native else (None, settings.input_size):
        try:
            model = resolve(BackboneCall(**options, image_size=size))
        except FeatcliError as error:  # the first try fails for a checkpoint without a size of its own
            cause = error
            continue
        if model.is_of(settings.backbone):
            return size
        cause = None
    if cause is not None:
        raise cause
    raise ConflictError(f"checkpoint {shown(model.name)}: its architecture is not that of this dump", THE_OTHER)
