"""Vision models of transformers outside the AutoBackbone mapping (ViT, CLIP, Segformer ...): their hidden states.

The counting is that of the mapping: of tokens the embedding is the stem and what a layer gives is a stage, pyramids are
named by stride. Only shapes say what a hidden state is, rows of tokens or maps, since every model has its own habits;
all of them end up as (B, C, h, w).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from featcli.backbones.backbone import Network
from featcli.backbones.image_processor import quiet
from featcli.backbones.stages import names_by_stride
from featcli.backbones.transformers_model import TransformersModelSpec, config_size
from featcli.backbones.weights import find_prefix
from featcli.errors import CheckpointError, UsageError, one_line, shown
from featcli.spec.groups import CheckpointSpec

import transformers  # isort: skip  (transformers_model has seen to what its import needs)


MAPPING = transformers.models.auto.modeling_auto.MODEL_MAPPING
# MAE drops three quarters of its patches and shuffles the rest; a plain ViT reads the same weights and does not.
READ_AS = {"vit_mae": "vit"}
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
FINAL_NORMS = ("layernorm", "post_layernorm", "norm", "rms_norm")
MOST_PREFIX_TOKENS = 16  # class token, distillation token, registers


class HiddenStatesModelSpec(TransformersModelSpec):
    """A checkpoint whose hidden states are its stages, before its weights are read."""

    def __init__(self, asked: CheckpointSpec, config: Any) -> None:
        tower = getattr(config, "vision_config", None)
        super().__init__(asked, tower or config, config if tower is not None else None)
        if self.model_type in READ_AS:
            fields = {k: v for k, v in self.config.to_dict().items() if k not in ("model_type", "architectures")}
            self.config = transformers.CONFIG_MAPPING[READ_AS[self.model_type]].from_dict(fields)
        self.config.tie_last_hidden_states = False  # the last one as the others: before the final norm
        self._class = self._find_class()
        self.norm = asked.norm or "raw"
        self.norm_reason = "as asked" if asked.norm else "default: hidden states, which no final norm has seen"
        self.patch = _patch(self.config)
        self._is_trimmed = True
        self._is_channels_last = False
        self._prefixes: list[int] = []  # tokens in front of the patches, by stage
        self.stage_names = self._name_stages()

    def _find_class(self) -> Any:
        kind = MAPPING.get(type(self.config), None) or getattr(
            transformers, type(self.config).__name__.removesuffix("Config") + "Model", None
        )
        kind = kind[0] if isinstance(kind, tuple) else kind
        if kind is None or getattr(kind, "main_input_name", "") != "pixel_values":
            raise CheckpointError(
                f"checkpoint {shown(self.asked.checkpoint_name)}: model type {shown(self.model_type)} has no vision"
                " model whose stages could be dumped",
                "use a vision model (swin, resnet, dinov2, vit, clip ...), or a timm model",
            )
        return kind

    def _blank(self, positions: Sequence[int]) -> Any:
        return self._class(self.config).eval()

    def _read(self, positions: Sequence[int]) -> tuple[Any, Mapping[str, Any]]:
        module, report = self.from_pretrained(self._class, self.config, None)
        names = {name for name, _ in module.named_parameters()}
        if names <= set(report["missing_keys"]):  # nothing of it was found: it lies deeper in a larger model
            others = [key for key in report["unexpected_keys"] if "text" not in key]  # whose layers have the same names
            if prefix := find_prefix(others, names):
                return self.from_pretrained(self._class, self.config, {f"^{re.escape(prefix)}": ""})
        return module, report

    def _network(self, module: Any, positions: Sequence[int]) -> Network:
        with torch.device("meta"):
            twin = self._blank(positions)
        idle = self._idle(twin, positions) if self._is_trimmed else frozenset()
        if idle and not self._trim(module, idle, positions):
            idle, self._is_trimmed = frozenset(), False  # what was taken for idle was not: all of it counts

        def maps(pixels: torch.Tensor) -> list[torch.Tensor]:
            return self._maps(module, pixels, positions)

        def class_tokens(pixels: torch.Tensor) -> list[torch.Tensor]:
            hidden = self._hidden(module, pixels)
            return [self._normed(module, hidden[i])[:, 0] for i in positions]

        has_class_token = _has_class_token(module) and all(self._prefixes[i] > 0 for i in positions)
        return Network(module, maps, class_tokens if has_class_token else None, idle)

    def _hidden(self, module: Any, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        options: dict[str, Any] = {"output_hidden_states": True}
        if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
            options["interpolate_pos_encoding"] = tuple(pixels.shape[2:]) != config_size(self.config)
        found = module(pixel_values=pixels, **options)
        hidden: Sequence[torch.Tensor] = found.get("reshaped_hidden_states") or found.hidden_states
        return hidden

    def _maps(self, module: Any, pixels: torch.Tensor, positions: Sequence[int]) -> list[torch.Tensor]:
        hidden = self._hidden(module, pixels)
        return [self._as_map(self._normed(module, hidden[i]), *pixels.shape[2:]) for i in positions]

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

    def _as_map(self, found: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, tokens, C), (B, C, h, w) or (B, h, w, C) as (B, C, h, w); only patches are in it."""
        if found.ndim == 4:
            return found.permute(0, 3, 1, 2) if self._is_channels_last else found
        behind = getattr(self.config, "num_detection_tokens", 0)  # YOLOS
        tokens = found[:, : found.shape[1] - behind]
        rows, columns = self._grid(tokens.shape[1], height, width)
        patches = tokens[:, tokens.shape[1] - rows * columns :]
        return patches.transpose(1, 2).reshape(len(found), -1, rows, columns)

    def _grid(self, tokens: int, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches among so many tokens; what is in front of them is no patch."""
        if self.patch is not None:
            rows, columns = height // self.patch[0], width // self.patch[1]
            if 0 <= tokens - rows * columns <= MOST_PREFIX_TOKENS:
                return rows, columns
        for patches in range(tokens, max(0, tokens - MOST_PREFIX_TOKENS - 1), -1):
            rows, columns = round((patches * height / width) ** 0.5), round((patches * width / height) ** 0.5)
            if rows * columns == patches:
                return rows, columns
        raise ValueError(f"{tokens} tokens of an input of {height}x{width} are no grid of patches")

    def _name_stages(self) -> tuple[tuple[str, str], ...]:
        size = config_size(self.config) if self.asked.input_size else self.input_size
        module, maps = self._first_maps(size)
        strides = [round(size[0] / found.shape[2]) for found in maps]
        if len(set(strides)) > 1:
            self.patch = None  # of its first stage only, and what does not fit is padded
        if len(set(strides)) > 1 or len(maps) != getattr(self.config, "num_hidden_layers", 0) + 1:
            names = names_by_stride(strides)
        else:
            names = ["stem"] + [f"stage{i + 1}" for i in range(len(maps) - 1)]
        return tuple(zip(names, _module_names(module, names), strict=True))

    def _first_maps(self, size: tuple[int, int]) -> tuple[Any, list[torch.Tensor]]:
        """The maps of all hidden states, for their number and shapes. Raises CheckpointError."""
        cause: Exception | None = None
        for device in ("meta", "cpu"):  # some models look into their tensors
            try:
                with torch.device(device), quiet():
                    module = self._blank(())
                with torch.no_grad():
                    hidden = self._hidden(module, torch.zeros(2, self.channels, *size, device=device))
                return module, self._settled(hidden, size)
            except UsageError:
                raise
            except Exception as error:  # whatever a model's forward does with an input that it does not expect
                cause = error
        assert cause is not None
        raise CheckpointError(
            f"checkpoint {shown(self.asked.checkpoint_name)}: {self._class.__name__} does not give the hidden states of"
            f" a picture: {one_line(cause)}",
            "use another vision model",
        ) from cause

    def _settled(self, hidden: Sequence[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        """All maps of two pictures; what is in front of the patches and where channels are is settled by the way."""
        if not hidden:
            raise ValueError("it has none")
        if any(len(found) != 2 for found in hidden):
            raise ValueError("it packs the pictures of a batch together")
        fields = [found.shape for found in hidden if found.ndim == 4]
        last = sum(_aspect_off(shape[1:3], *size) for shape in fields)
        self._is_channels_last = last < sum(_aspect_off(shape[2:], *size) for shape in fields)
        maps = [self._as_map(found, *size) for found in hidden]
        pairs = list(zip(hidden, maps, strict=True))
        behind = getattr(self.config, "num_detection_tokens", 0)
        self._prefixes = [h.shape[1] - behind - m.shape[2] * m.shape[3] if h.ndim == 3 else 0 for h, m in pairs]
        if len(set(self._prefixes)) > 1 and max(self._prefixes) > 1:
            raise ValueError("its tokens are not always the patches of a grid")
        return maps

    def _idle(self, twin: Any, positions: Sequence[int]) -> frozenset[str]:
        """Names of the parameters and buffers that none of these stages depends on, as autograd has it."""
        names, parameters = zip(*twin.named_parameters(), strict=True)
        pixels = torch.zeros(1, self.channels, *self.input_size, device="meta")
        try:
            with torch.enable_grad(), quiet():
                total = sum(found.sum() for found in self._maps(twin, pixels, positions))
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return frozenset()
        idle = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
        owners = {name.rpartition(".")[0] for name in idle} - {name.rpartition(".")[0] for name in {*names} - idle}
        return frozenset(idle | {name for name, _ in twin.named_buffers() if name.rpartition(".")[0] in owners})

    def _trim(self, module: Any, idle: frozenset[str], positions: Sequence[int]) -> bool:
        """Take out what no stage depends on, and put it back if the code cannot do without it, or if a bit changes.

        Returns False where one did: then it was not idle.
        """
        device = next(module.parameters()).device
        pixels = torch.rand(1, self.channels, *self.input_size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.inference_mode():
            before = self._maps(module, pixels, positions)
            undo = _take_out(module, idle)
            try:
                after = self._maps(module, pixels, positions)
            except Exception:  # what was taken out was needed by the code, though not by the result
                after = []
        same = [_same_bits(a, b) for a, b in zip(before, after, strict=False)]
        if len(after) != len(before) or not all(same):
            for put_back in reversed(undo):
                put_back()
        return all(same)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two maps are equal, NaN in weights that diverged included."""
    return one.shape == other.shape and (one.is_meta or torch.equal(one.view(torch.int32), other.view(torch.int32)))


def _take_out(module: nn.Module, idle: frozenset[str]) -> list[Callable[[], object]]:
    """Cut idle layers off the ends of lists, replace idle modules elsewhere by nothing. Returns how to undo it."""
    undo: list[Callable[[], object]] = []

    def is_idle(path: str, part: nn.Module) -> bool:
        names = [f"{path}.{name}" for name, _ in part.named_parameters()]
        return bool(names) and idle.issuperset(names)

    def visit(owner: nn.Module, above: str) -> None:
        for leaf, part in list(owner.named_children()):
            path = above + leaf
            if isinstance(part, nn.ModuleList):
                kept = len(part)
                while kept > 1 and is_idle(f"{path}.{kept - 1}", part[kept - 1]):
                    kept -= 1
                undo.append(partial(part.extend, list(part[kept:])))
                del part[kept:]
            elif is_idle(path, part) and not any(isinstance(inner, nn.ModuleList) for inner in part.modules()):
                undo.append(partial(setattr, owner, leaf, part))
                setattr(owner, leaf, nn.Identity())
            else:
                visit(part, f"{path}.")

    visit(module, "")
    return undo


def _module_names(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Where in the model each stage is, as far as a list of layers tells."""
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


def _aspect_off(grid: Sequence[int], height: int, width: int) -> float:
    """How far a grid is from the shape of the input, as a share of it."""
    return abs(grid[0] * width - grid[1] * height) / (grid[0] * width)
