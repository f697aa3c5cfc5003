"""Read the model types of transformers' AutoBackbone mapping, and cut them after the deepest stage asked for.

transformers runs all stages whatever is asked. Its mapping gives the class, and its plain loader reads it. Then the
list of stages is cut after the last one that is needed, and the maps that are left keep every bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from featcli.backbones.backbone import Network, Pass
from featcli.backbones.composites import names_of_backbone, names_of_task, norm_freezer
from featcli.backbones.heads import Head, heads_alone, run_with_heads
from featcli.backbones.internals import backbone_classes, silent_transformers
from featcli.backbones.stages import Points
from featcli.backbones.transformers_model import TransformersModelSpec, copied, num_registers
from featcli.errors import CheckpointError, one_line, shown
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import Size

# Some types normalise each requested map with a norm of its own, which only a checkpoint saved as a backbone has. Any
# other absent weight is refused.
UNTRAINED_NORM = re.compile(r"hidden_states_norms\.")
NORM_OF_STAGE = re.compile(r"hidden_states_norms\.(\w+)\.")
# pixio has a norm for all its maps, which a plain checkpoint lacks, too.
UNTRAINED_NORMS = {"pixio": re.compile(r"layernorm\.")}
# These types apply a final norm to whichever stage is last. After a cut it would meet the wrong width.
FINAL_NORM = {
    "swin": "swin.layernorm",
    "maskformer-swin": "model.layernorm",
    "focalnet": "focalnet.layernorm",
    "bit": "bit.norm",
}
# These are the names of the norm of all maps, in types that have one.
SHARED_NORMS = ("layernorm", "norm")
# These types name a stem in their configuration, but refuse to give it.
NO_STEM = ("maskformer-swin",)


def is_mapped(config: Any) -> bool:
    """Return whether AutoBackbone has a class for this configuration."""
    return type(config) in backbone_classes()


class AutoBackboneModelSpec(TransformersModelSpec):
    """A checkpoint of a mapped type, or of a larger model with one inside, before its weights are read."""

    default_norm = "model"
    norms_of_maps = ("hidden_states_norms", *SHARED_NORMS)

    def __init__(self, asked: CheckpointSpec, config: Any, outer: Any = None) -> None:
        super().__init__(asked, config, outer)
        self._freeze_norms = norm_freezer(outer)
        self._class = backbone_classes()[type(self.config)]
        if getattr(self.config, "add_fpn", False):  # BEiT makes a map from a stage by its place among the chosen four
            raise CheckpointError(
                f"checkpoint {shown(asked.checkpoint_name)}: with add_fpn it gives a pyramid made of four"
                " stages, not the stages themselves",
                "give --model-arg add_fpn=false for the maps of its stages, without the pyramid",
            )
        self.norm = asked.norm or self.default_norm
        self.norm_reason = "as asked" if asked.norm else "default: AutoBackbone's own"
        self.first_index = int(self.model_type in NO_STEM)
        names = list(getattr(self.config, "stage_names", None) or [])
        if not names:
            raise CheckpointError(
                f"checkpoint {shown(asked.checkpoint_name)}: model type {shown(self.model_type)} names no stages",
                "is config.json complete?",
            )
        self.stage_names = tuple(zip(names, self._module_names(names), strict=True))[self.first_index :]
        self.default_indices = tuple(self.config.out_indices)
        patch = getattr(self.config, "patch_size", None)
        if patch is not None and not hasattr(self.config, "depths"):  # pyramids pad pixels that do not fill a patch
            self.patch = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])

    def _may_be_absent(self, key: str) -> bool:
        return UNTRAINED_NORMS.get(self.model_type, UNTRAINED_NORM).match(key) is not None

    def _is_of_other_stages(self, key: str) -> bool:
        found = NORM_OF_STAGE.match(key)
        return found is not None and found[1] in self.config.stage_names

    def _blank(self, points: Points) -> Any:
        try:
            return self._class(self._config_for(points.positions))
        except ImportError as error:  # dinat needs natten
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: model type {shown(self.model_type)} needs a library"
                f" that is not installed ({one_line(error)})",
                "install it, or choose another backbone",
            ) from error

    def _read(self, points: Points) -> tuple[Any, Mapping[str, Any]]:
        return self.from_pretrained(self._class, self._config_for(points.positions), self._ways_to_name())

    def _ways_to_name(self) -> Iterator[Mapping[str, str] | None]:
        """Yield what may have to be replaced in names on disk, the most common first."""
        if self.outer is None:
            yield None
        yield names_of_backbone(self.on_disk) or None
        yield names_of_task(self.outer or self.config) or None

    def _config_for(self, positions: Sequence[int]) -> Any:
        config, positions = copied(self.config), positions or (len(self.stage_names) - 1,)
        config.out_indices = [position + self.first_index for position in positions]
        return config

    def _run_trunk(self, module: Any, pixels: torch.Tensor) -> Any:
        return module(pixels)

    def _network(self, module: Any, points: Points, heads: Sequence[Head]) -> Network:
        positions, names = points.positions, self.config.stage_names
        deepest = points.deepest(len(self.stage_names)) + self.first_index
        if deepest < len(names) - 1:
            _drop_stages_after(module, deepest, names, self.model_type)
        if self.norm == "raw" or not positions:
            _drop_norms(module)
        self._freeze_norms(module)
        if not positions and not any(head.shared for head in heads):
            module = heads_alone(module)
        is_token_model = bool(positions) and hasattr(self.config, "reshape_hidden_states")
        has_class_token = any(name.endswith("cls_token") for name, _ in module.named_parameters())
        has_class_token = is_token_model and has_class_token
        return Network(
            module=module,
            run=partial(_run, module, positions=positions, patch=self.patch, heads=tuple(heads)),
            has_class_token=has_class_token,
            num_registers=num_registers(module) if has_class_token else 0,
        )

    def _module_names(self, names: list[str]) -> list[str]:
        with torch.device("meta"), silent_transformers():
            module = self._blank(Points((len(names) - 1 - self.first_index,)))
        path, _ = _stage_list(module, names)
        has_stem = names[0] == "stem"
        stem = [next(name for name, _ in module.named_children())] if has_stem else []
        return stem + [f"{path}.{i}" for i in range(len(names) - has_stem)]


def _run(
    module: Any,
    pixels: torch.Tensor,
    positions: Sequence[int],
    patch: Size | None,
    heads: Sequence[Head],
    with_prefixes: bool = False,
) -> Pass:
    """Run a backbone for (B, C, h, w) maps, also one that leaves its patches in a row: (B, tokens, C)."""
    height, width = pixels.shape[2:]
    run = partial(module, pixels, **({"output_hidden_states": True} if with_prefixes else {}))
    found, vectors = run_with_heads(module, run, heads, pixels, bool(positions))
    maps = [_as_grid(one, height, width, patch) for one in found.feature_maps] if positions else []
    prefixes = _prefixes_of(module, found.hidden_states, maps, positions) if with_prefixes else []
    return Pass(maps, prefixes, vectors)


def _as_grid(found: torch.Tensor, height: int, width: int, patch: Size | None) -> torch.Tensor:
    if found.ndim != 3:
        return found
    assert patch is not None
    grid = height // patch[0], width // patch[1]
    tokens = found[:, found.shape[1] - grid[0] * grid[1] :]  # tokens in front of the patches are none
    return tokens.transpose(1, 2).reshape(len(found), -1, *grid)


def _prefixes_of(
    module: Any, hidden: Sequence[torch.Tensor], maps: Sequence[torch.Tensor], positions: Sequence[int]
) -> list[torch.Tensor]:
    norm = next((found for name in SHARED_NORMS if isinstance(found := getattr(module, name, None), nn.Module)), None)
    wants_norm = norm is not None and getattr(module.config, "apply_layernorm", True)
    states = [norm(hidden[i]) if norm is not None and wants_norm else hidden[i] for i in positions]
    return [state[:, : state.shape[1] - one.shape[2] * one.shape[3]] for state, one in zip(states, maps, strict=True)]


def _stage_list(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """Find the module list nearest to the root that has one entry for each stage. The stem is not in it."""
    count = len(names) - (names[0] == "stem")
    lists = [
        (name, found)
        for name, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and "norms" not in name and len(found) == count
    ]
    if not lists:
        raise CheckpointError(
            f"{type(module).__name__}: {count} stages are named, but no list of {count} stages is in the model",
            "is config.json complete? stage_names must fit the number of layers",
        )
    return min(lists, key=lambda pair: pair[0].count("."))


def _drop_stages_after(module: nn.Module, deepest: int, names: Sequence[str], model_type: str) -> None:
    """Cut the stage list after the stage at position `deepest`. The maps that are left keep every bit."""
    _, stage_list = _stage_list(module, names)
    keep = deepest + (names[0] != "stem")
    del stage_list[max(1, keep) :]  # without any stage some types give no maps, and no error
    if path := FINAL_NORM.get(model_type):
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())


def _drop_norms(module: nn.Module) -> None:
    """Replace the norms of stages, and the one for all maps, so that maps stay as the stages gave them."""
    norms = getattr(module, "hidden_states_norms", None)
    if isinstance(norms, nn.Module):
        for name, _ in list(norms.named_children()):
            setattr(norms, name, nn.Identity())
    for name in SHARED_NORMS:
        if isinstance(getattr(module, name, None), nn.Module):
            setattr(module, name, nn.Identity())
