"""Know the larger models with a backbone inside: where it is in memory and on disk, and what they do to its norms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from featcli.backbones.internals import norm_replacer, renamings_of_transformers, silent_transformers
from featcli.backbones.torchvision_operators import import_transformers

# Attribute paths of the backbone in a model in memory. The first that a model has is used.
IN_MEMORY = (
    "model.pixel_level_module.encoder",  # MaskFormer, Mask2Former, OneFormer
    "pixel_level_module.encoder",
    "model.backbone.conv_encoder.model",  # GroundingDINO and relatives
    "model.backbone.model",  # DETR, RT-DETR
    "model.backbone.backbone",  # LW-DETR, RF-DETR
    "model.conv_encoder.model",
    "backbone.conv_encoder.model",
    "backbone.model",
    "backbone",  # UperNet, DepthAnything, ZoeDepth
)
OUTSIDE = "outside_of_backbone."  # begins the names of tensors outside of the backbone
# Prefixes of its weights in a checkpoint on disk, the longest first. transformers renames some as it loads, so a model
# may hold its backbone at another path in memory.
ON_DISK = (
    "model.pixel_level_module.encoder.",  # MaskFormer, Mask2Former, OneFormer
    "pixel_level_module.encoder.",
    "model.backbone.conv_encoder.model.",  # the DETR family, GroundingDINO
    "backbone.conv_encoder.model.",
    "model.backbone.model.",  # RT-DETR, D-FINE
    "model.backbone.backbone.",  # LW-DETR, RF-DETR
    "backbone.backbone.",
    "model.backbone.",
    "backbone.",  # UperNet, DepthAnything, DPT, ZoeDepth, VitPose, VitMatte
    "vision_model.",  # TIPSv2
)


def backbone_config_of(outer: Any) -> Any:
    """Return the configuration of the backbone that a larger model makes, None where it has none.

    A MaskFormer makes its own kind of a plain Swin, all four stages of it, as the checkpoints at the hub want.
    """
    inner: Any = getattr(outer, "backbone_config", None)
    if inner is not None and (outer.model_type, inner.model_type) == ("maskformer", "swin"):
        fields = {name: value for name, value in inner.to_dict().items() if name != "model_type"}
        inner = import_transformers().MaskFormerSwinConfig.from_dict(fields)
        inner.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return inner


def place_of_backbone(model: nn.Module) -> str:
    """Return the attribute path of the backbone inside a composite; "" if there is none."""
    return next((place for place in IN_MEMORY if _has(model, place)), "")


def names_of_backbone(on_disk: Iterable[str]) -> dict[str, str]:
    """Return how the names of a composite's tensors on disk are changed: pattern -> replacement.

    The prefix of the backbone is removed, and names without it are marked as outside. If no name has a prefix, none is
    changed.
    """
    names = list(on_disk)
    return names_under([prefix for prefix in ON_DISK if any(name.startswith(prefix) for name in names)])


def names_of_task(config: Any, prefixes: Sequence[str] = ON_DISK) -> dict[str, str]:
    """Return the same for names from before transformers renamed them, by its own table for the whole model.

    `config` is that of the whole model. If transformers makes a single class, it applies only the table of that class.
    Returns {} if the whole model has no table.
    """
    renamings = renamings_of_transformers(config)
    return {**renamings, **names_under(prefixes)} if renamings else {}


def names_under(prefixes: Sequence[str]) -> dict[str, str]:
    """Return the patterns that remove the first of these prefixes that fits, and put OUTSIDE before all other names."""
    if not prefixes:
        return {}
    either = "|".join(map(re.escape, prefixes))
    return {f"^(?!{either})": OUTSIDE, f"^(?:{either})": ""}


def described_place(outer: Any) -> str:
    """Return where the backbone sits in a larger model, for people; "" if that cannot be told.

    `outer` is the configuration of that model, which is built without weights to find out.
    """
    transformers = import_transformers()
    for name in outer.architectures or ():
        try:
            with torch.device("meta"), silent_transformers():
                place = place_of_backbone(getattr(transformers, name)(outer))
        except Exception:  # the class needs more libraries, or is of another transformers: the place only informs
            continue
        if place:
            return f"{place} of {name}"
    return ""


def norm_freezer(outer: Any) -> Callable[[nn.Module], None]:
    """Return what a larger model does to the norms of its backbone: DETR and its relatives replace them by frozen ones.

    Frozen norms give other last bits, and `replay` promises every bit. `outer` is the configuration of that model, or
    None. Raises CheckpointError if this transformers no longer has such norms.
    """
    return partial(_freeze, norm_replacer(outer) if outer is not None else None)


def _freeze(replace: Callable[[nn.Module], object] | None, backbone: nn.Module) -> None:
    if replace is not None:
        with torch.no_grad():
            replace(backbone)


def _has(model: nn.Module, place: str) -> bool:
    try:
        return isinstance(model.get_submodule(place), nn.Module)
    except AttributeError:
        return False
