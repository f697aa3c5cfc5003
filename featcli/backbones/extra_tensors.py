"""Judge tensors of a checkpoint that the network lacks: some would have changed its maps, others are heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from featcli.backbones.backbone import Network
from featcli.backbones.internals import is_whole_model, names_without_value
from featcli.backbones.trimming import idle_tensors

# Names of tensors that no evaluation needs, wherever they are: counters and masks of training, tables that models
# compute themselves, and what profilers and other libraries leave behind.
OF_NO_EFFECT = re.compile(
    r"(?:^|\.)(?:mask_token|num_batches_tracked|position_ids|relative_position_index|relative_coords_table|attn_mask"
    r"|attention_bias_idxs|bias_mask|total_ops|total_params|_extra_state"
    r"|periods|inv_freq|freqs|freqs_cos|freqs_sin)$"
)
MOST_DIMENSIONS = 2  # of a table of frequencies; learnt ones have a dimension for layers and heads
# Modules of the root that all blocks share. They are None if a model has none, and change its maps if it has.
SHARED = ("rel_pos_bias", "shared_rel_pos", "rope", "rope_global", "rope_window", "parallel_blocks")
# Modules of the root that come after the maps. In a backbone they exist, but do nothing: BEiT's are for segmentation.
NECKS = ("fpn",)


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """The structure of a whole network, before it is cut."""

    modules: frozenset[str]  # paths of all modules; "" is the root
    roots: frozenset[str]  # paths of models, which each count as a root, such as one inside another
    absent: Mapping[str, frozenset[str]]  # by root: what its class has and this one lacks


def skeleton_of(module: nn.Module) -> Skeleton:
    """Return the structure of a whole network."""
    parts = dict(module.named_modules())
    roots = {""}
    for path, part in parts.items():  # outer modules come first
        if path.rpartition(".")[0] in roots and is_whole_model(part):
            roots.add(path)
    return Skeleton(
        modules=frozenset(parts),
        roots=frozenset(roots),
        absent={root: frozenset(_absent(parts[root])) for root in roots},
    )


def _absent(module: nn.Module) -> set[str]:
    """Return the attributes of a module that are None, and the tokens that other models of its family have."""
    lacks_token = hasattr(module, "cls_token") and not hasattr(module, "dist_token")
    return names_without_value(module) | ({"dist_token"} if lacks_token else set())


def place_of(key: str, skeleton: Skeleton) -> tuple[str, str]:
    """Split a name into the path of the deepest module that the network has, and the rest."""
    place = key
    while place not in skeleton.modules:
        place = place.rpartition(".")[0]
    return place, key[len(place) + 1 :] if place else key


def foreign_tensors(
    extra: Iterable[str],
    skeleton: Skeleton,
    modules_in_use: Callable[[], frozenset[str]],
    shapes: Mapping[str, torch.Size] | None = None,
) -> list[str]:
    """Return those extra names of a checkpoint that belong to another network than this one.

    These are a tensor under a module that runs, a token of the root that its class has and this network lacks, and one
    for a module that does nothing here. Heads and other towers are absent at the root, and stages that were not asked
    for do not run. `modules_in_use` is only called if it matters; `shapes` are those of the tensors, as far as they are
    known.
    """
    found: list[str] = []
    for key in extra:
        place, rest = place_of(key, skeleton)
        if OF_NO_EFFECT.search(key):
            if _is_learnt(key, shapes or {}):
                found.append(key)
            continue
        if place in skeleton.roots:
            first, _, deeper = rest.partition(".")
            absent = first in skeleton.absent[place]
            if absent and (not deeper or first in SHARED):
                found.append(key)
        elif place not in NECKS and place in modules_in_use():
            found.append(key)
    return found


def _is_learnt(key: str, shapes: Mapping[str, torch.Size]) -> bool:
    return key.endswith("freqs") and len(shapes.get(key, ())) > MOST_DIMENSIONS


def layers_in(names: Iterable[str]) -> int:
    """Return how many layers names such as `blocks.11.norm1.weight` mean; 0 for other names."""
    numbers = [re.search(r"\.(\d+)\.", name) for name in names]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def modules_in_use(network: Network, pixels: torch.Tensor) -> frozenset[str]:
    """Return the modules that run for the maps of a network: called, used by their tensors, or around such a module.

    `pixels` are (1, C, H, W), on the device of the network. Raises whatever the network raises.
    """
    module, called = network.module.eval(), set[str]()
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.add(name)) for name, part in module.named_modules()
    ]
    try:
        with torch.no_grad():
            network.outputs(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    idle = idle_tensors(module, network.outputs, pixels)
    called |= {name.rpartition(".")[0] for name, _ in module.named_parameters() if name not in idle}
    return frozenset(path[:end] for path in called for end in _ends(path))


def _ends(path: str) -> list[int]:
    """Return where a path and those of all modules around it end, also the root's."""
    return [0, *(i for i, char in enumerate(path) if char == "."), len(path)]
