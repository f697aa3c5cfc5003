"""Read vision models of transformers outside the AutoBackbone mapping (ViT, CLIP, Segformer ...): their hidden states.

Stages are counted as in the mapping: for tokens the embedding is the stem and each layer gives a stage; pyramids are
named by stride. Only shapes tell whether a hidden state is rows of tokens or maps, because every model has its own
habits. All become (B, C, h, w).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from featcli.backbones.backbone import Network, Pass
from featcli.backbones.composites import names_of_task, names_under
from featcli.backbones.heads import Head, as_vector, run_with_heads
from featcli.backbones.internals import is_of_meta, silent_transformers, vision_class
from featcli.backbones.key_names import find_prefix
from featcli.backbones.model_spec import Outputs, Wanted
from featcli.backbones.stages import Points, Vector, names_by_stride
from featcli.backbones.torchvision_operators import import_transformers
from featcli.backbones.transformers_model import (
    FINAL_NORMS,
    TransformersModelSpec,
    config_size,
    copied,
    num_registers,
)
from featcli.backbones.trimming import idle_tensors, trim
from featcli.backbones.weightless import WithoutWeights
from featcli.errors import CheckpointError, UsageError, one_line, shown
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import Size

# MAE drops three quarters of its patches and shuffles the rest. A plain ViT reads the same weights, and does not.
READ_AS = {"vit_mae": "vit"}
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
MOST_PREFIX_TOKENS = 16  # class token, distillation token, registers


@dataclass(frozen=True, kw_only=True)
class HiddenLayout:
    """The form of a model's hidden states, as one forward pass shows it."""

    patch: Size | None  # (height, width) of the patches of tokens, if it is the same in all stages
    behind: int  # tokens after the patches
    is_channels_last: bool  # whether maps are (B, h, w, C)
    prefixes: tuple[int, ...]  # tokens before the patches, by stage
    strides: tuple[int, ...]  # pixels per cell, by stage

    def as_map(self, hidden: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return (B, tokens, C), (B, C, h, w) or (B, h, w, C) for pixels of this size as (B, C, h, w) of patches only.

        Raises ValueError if the tokens make no grid.
        """
        if hidden.ndim == 4:
            return hidden.permute(0, 3, 1, 2) if self.is_channels_last else hidden
        tokens = hidden[:, : hidden.shape[1] - self.behind]
        rows, columns = self._grid(tokens.shape[1], height, width)
        patches = tokens[:, tokens.shape[1] - rows * columns :]
        return patches.transpose(1, 2).reshape(len(hidden), -1, rows, columns)

    def _grid(self, tokens: int, height: int, width: int) -> Size:
        """Return (rows, columns) of the patches among so many tokens. Tokens before them are no patches."""
        if self.patch is not None:
            rows, columns = height // self.patch[0], width // self.patch[1]
            if 0 <= tokens - rows * columns <= MOST_PREFIX_TOKENS:
                return rows, columns
        for patches in range(tokens, max(0, tokens - MOST_PREFIX_TOKENS - 1), -1):
            rows, columns = round((patches * height / width) ** 0.5), round((patches * width / height) ** 0.5)
            if rows * columns == patches:
                return rows, columns
        raise ValueError(f"{tokens} tokens of an input of {height}x{width} are no grid of patches")


def find_layout(hidden: Sequence[torch.Tensor], size: Size, patch: Size | None, behind: int) -> HiddenLayout:
    """Return the layout of all hidden states of two pictures of this (H, W).

    `patch` is the size of patches by the configuration, `behind` the number of tokens after them. Raises ValueError if
    the hidden states are no maps.
    """
    if not hidden:
        raise ValueError("it has none")
    if any(len(found) != 2 for found in hidden):
        raise ValueError("it packs the pictures of a batch together")
    first = HiddenLayout(
        patch=patch, behind=behind, is_channels_last=_is_channels_last(hidden, size), prefixes=(), strides=()
    )
    maps = [first.as_map(found, *size) for found in hidden]
    pairs = list(zip(hidden, maps, strict=True))
    prefixes = tuple(h.shape[1] - behind - m.shape[2] * m.shape[3] if h.ndim == 3 else 0 for h, m in pairs)
    if len(set(prefixes)) > 1 and max(prefixes) > 1:
        raise ValueError("its tokens are not always the patches of a grid")
    strides = tuple(round(size[0] / found.shape[2]) for found in maps)
    is_pyramid = len(set(strides)) > 1  # its patch is that of its first stage, and pixels that fill none are padded
    return replace(first, patch=None if is_pyramid else patch, prefixes=prefixes, strides=strides)


def _is_channels_last(hidden: Sequence[torch.Tensor], size: Size) -> bool:
    """Return whether maps have the shape of the input rather as (B, h, w, C) than as (B, C, h, w)."""
    shapes = [found.shape for found in hidden if found.ndim == 4]
    last = sum(_aspect_off(shape[1:3], *size) for shape in shapes)
    return last < sum(_aspect_off(shape[2:], *size) for shape in shapes)


def _aspect_off(grid: Sequence[int], height: int, width: int) -> float:
    """Return how far the proportions of a grid are from those of the input, as a share."""
    return abs(grid[0] * width - grid[1] * height) / (grid[0] * width)


class HiddenStatesModelSpec(TransformersModelSpec):
    """A checkpoint whose hidden states are its stages, before its weights are read."""

    norms_of_maps = FINAL_NORMS
    is_plain_of_trunk = True

    def __init__(self, asked: CheckpointSpec, config: Any) -> None:
        """Run the model once without weights, to find the form of its hidden states. Raises CheckpointError."""
        tower = getattr(config, "vision_config", None)
        super().__init__(asked, tower or config, config if tower is not None else None)
        self.config = _config_to_run(self.config, self.model_type)
        self._class = vision_class(self.config)
        if self._class is None:
            raise CheckpointError(
                f"checkpoint {shown(asked.checkpoint_name)}: model type {shown(self.model_type)} has no vision"
                " model whose stages could be dumped",
                "use a vision model (swin, resnet, dinov2, vit, clip ...), or a timm model",
            )
        self.norm = asked.norm or self.default_norm
        self.norm_reason = "as asked" if asked.norm else "default: hidden states, which no final norm has seen"
        module, self.layout, self.vectors_of_trunk = self._probed_layout()
        self.patch = self.layout.patch
        self.stage_names = self._name_stages(module)

    def _probed_layout(self) -> tuple[Any, HiddenLayout, dict[str, int]]:
        """Return the model without weights, the form of its hidden states, and the sizes of its vectors.

        Raises CheckpointError.
        """
        size = config_size(self.config) if self.asked.input_size else self.input_size
        behind = getattr(self.config, "num_detection_tokens", 0)  # YOLOS has these
        try:
            try:
                module, found = self._run_blank(size, "meta")
            except Exception as error:  # a model's forward raises anything for an unexpected input
                if not is_of_meta(error):
                    raise
                with WithoutWeights():
                    module, found = self._run_blank(size, "cpu")
            sizes: dict[str, int] = {}
            with suppress(ValueError):
                sizes["embedding"] = int(as_vector(found.get("pooler_output")).shape[1])
            return module, find_layout(self._states_of(found), size, _patch(self.config), behind), sizes
        except UsageError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: {self._class.__name__} does not give the hidden"
                f" states of a picture: {one_line(error)}",
                "use another vision model",
            ) from error

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """See ModelSpec. A type that is read as another one has none."""
        return () if self.model_type in READ_AS else super().vectors

    def _run_blank(self, size: Size, device: str) -> tuple[Any, Any]:
        """Return the model without weights, and what it makes of two pictures."""
        with torch.device(device), silent_transformers():
            module = self._blank(Points(()))
        with torch.no_grad():
            return module, self._run_with_states(module, torch.zeros(2, self.channels, *size, device=device))

    def _name_stages(self, module: nn.Module) -> tuple[tuple[str, str], ...]:
        strides = self.layout.strides
        is_embedding_and_layers = len(strides) == getattr(self.config, "num_hidden_layers", 0) + 1
        if len(set(strides)) == 1 and is_embedding_and_layers:
            names = ["stem"] + [f"stage{i + 1}" for i in range(len(strides) - 1)]
        else:
            names = names_by_stride(strides)
        return tuple(zip(names, _module_names(module, names), strict=True))

    def _blank(self, points: Points) -> Any:
        return self._class(self.config).eval()

    def _read(self, points: Points) -> tuple[Any, Mapping[str, Any]]:
        module, report = self.from_pretrained(self._class, self.config, [None])
        names = {name for name, _ in module.named_parameters()}
        if names <= set(report["missing_keys"]):  # nothing was found, because the model lies deeper in a larger one
            others = [key for key in report["unexpected_keys"] if "text" not in key]  # its layers have the same names
            if prefix := find_prefix(others, names):
                return self.from_pretrained(self._class, self.config, [names_under([prefix])])
        if self.outer is not None and self._lost(report["missing_keys"]):
            return self.from_pretrained(self._class, self.config, [None, names_of_task(self.outer, ()) or None])
        return module, report

    def _network(self, module: Any, points: Points, heads: Sequence[Head]) -> Network:
        positions, idle = points.positions, self._idle(points, heads)
        run = partial(self._pass, module, positions=positions, vectors=points.vectors, heads=tuple(heads))
        if idle:
            noise = torch.rand(1, self.channels, *self.input_size, generator=torch.Generator().manual_seed(0))
            idle = trim(module, idle, Network(module, run).outputs, noise.to(next(module.parameters()).device))
        has_class_token = _has_class_token(module) and all(self.layout.prefixes[i] > 0 for i in positions)
        return Network(
            module=module,
            run=run,
            has_class_token=has_class_token,
            num_registers=num_registers(module) if has_class_token else 0,
            idle=idle,
        )

    def _idle(self, points: Points, heads: Sequence[Head]) -> frozenset[str]:
        """Return the tensors that these points do not depend on, as a copy without weights shows."""
        with torch.device("meta"), silent_transformers():
            twin = self._built(points)
            run = partial(self._pass, twin, positions=points.positions, vectors=points.vectors, heads=tuple(heads))
            return idle_tensors(twin, Network(twin, run).outputs, self.blank("meta"))

    def _are_of_head(self, lost: Sequence[str]) -> bool:
        return self._idle(Points((len(self.stage_names) - 1,)), ()).issuperset(lost)

    def _run_trunk(self, module: Any, pixels: torch.Tensor) -> Any:
        return self._run_with_states(module, pixels)

    def _hidden(self, module: Any, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return all hidden states of (B, C, H, W), as the model gives them."""
        return self._states_of(self._run_with_states(module, pixels))

    def _run_with_states(self, module: Any, pixels: torch.Tensor, **more: bool) -> Any:
        options: dict[str, Any] = {"output_hidden_states": True, **more}
        if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
            options["interpolate_pos_encoding"] = tuple(pixels.shape[2:]) != config_size(self.config)
        return module(pixel_values=pixels, **options)

    @staticmethod
    def _states_of(found: Any) -> Sequence[torch.Tensor]:
        hidden: Sequence[torch.Tensor] = found.get("reshaped_hidden_states") or found.hidden_states
        return hidden

    def module_config(self) -> Any:
        """Return the model's own configuration. See ModelSpec."""
        return copied(self.config)

    def run(self, module: Any, pixels: torch.Tensor, wanted: Wanted) -> Outputs:
        """Run the model. See ModelSpec."""
        found = self._run_with_states(module, pixels, **({"output_attentions": True} if wanted.attentions else {}))
        hidden = self._states_of(found)
        maps = tuple(self.layout.as_map(self._normed(module, hidden[i]), *pixels.shape[2:]) for i in wanted.positions)
        return Outputs(
            maps,
            tuple(found.hidden_states) if wanted.hidden_states else None,
            tuple(found.attentions) if wanted.attentions and found.get("attentions") else None,
        )

    def _run_whole(self, module: Any, pixels: torch.Tensor) -> None:
        self._hidden(module, pixels)

    def _pass(
        self,
        module: Any,
        pixels: torch.Tensor,
        positions: Sequence[int],
        vectors: Sequence[str],
        heads: Sequence[Head],
        with_prefixes: bool = False,
    ) -> Pass:
        found, made = run_with_heads(module, partial(self._run_with_states, module, pixels), heads, pixels)
        hidden = self._states_of(found)
        states = [self._normed(module, hidden[i]) for i in positions]
        maps = [self.layout.as_map(state, *pixels.shape[2:]) for state in states]
        prefixes = [state[:, : self.layout.prefixes[i]] for i, state in zip(positions, states, strict=True)]
        if "embedding" in vectors:
            made["embedding"] = as_vector(found.get("pooler_output"))
        return Pass(maps, prefixes if with_prefixes else [], {name: made[name] for name in vectors})

    def _normed(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        if self.norm == "raw":
            return hidden
        norm = next(
            (found for name in FINAL_NORMS if isinstance(found := getattr(module, name, None), nn.Module)), None
        )
        if norm is None or hidden.ndim != 3:
            raise UsageError(f"--norm model: {self.name} has no final norm for its tokens", "leave --norm out")
        normed: torch.Tensor = norm(hidden)
        return normed


def _config_to_run(config: Any, model_type: str) -> Any:
    """Change a configuration to that of the model that is run, so that every hidden state is as its layer gives it."""
    if model_type in READ_AS:
        fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        config = import_transformers().CONFIG_MAPPING[READ_AS[model_type]].from_dict(fields)
    config.tie_last_hidden_states = False  # the last one comes before the final norm, as the others do
    return config


def _module_names(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the module of each stage, as far as a list of layers shows it."""
    lists = [
        (path, len(part))
        for path, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) in (len(names), len(names) - 1)
    ]
    path, count = min(lists, key=lambda found: found[0].count("."), default=("", 0))
    if count == len(names):
        return [f"{path}.{i}" for i in range(count)]
    if count and names[0] == "stem":
        return [next(name for name, _ in module.named_children()), *(f"{path}.{i}" for i in range(count))]
    return [f"hidden_states.{i}" for i in range(len(names))]


def _patch(config: Any) -> tuple[int, int] | None:
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    return (patch[0], patch[1]) if isinstance(patch, Sequence) and len(patch) == 2 else None


def _has_class_token(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name, _ in module.named_parameters())
