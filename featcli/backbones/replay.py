"""Run the rest of a larger model on stored maps: its neck and head run, its backbone does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from featcli.backbones.composites import place_of_backbone
from featcli.backbones.internals import twin_of, without_values
from featcli.backbones.stages import names_by_stride
from featcli.errors import UsageError, shown
from featcli.spec.parsers import Size

# The heads of DPT and ZoeDepth do this with class tokens, if they read them at all.
READS_CLASS_TOKENS = ("project", "add")
MOST_PREFIX_TOKENS = 16  # class token, distillation token, registers
AS_EXTRACTED = "extract with --pool none and --dtype float32; dump[stage][:8] gives a batch"
BY_NAME = "give an open dump for all of its rows, or {stage: dump[stage][:8] for stage in dump.stages}"

# The shapes of what a backbone gives, by the size of its input; None if computing is needed to tell.
_shapes_of: WeakKeyDictionary[nn.Module, dict[Size, list[torch.Size] | None]] = WeakKeyDictionary()


@runtime_checkable
class OpenDump(Protocol):
    """The part of an open dump from which maps are read."""

    @property
    def stages(self) -> Mapping[str, Any]:
        """The stages by name."""

    def __getitem__(self, stage: str, /) -> Any:
        """Return the array of a stage."""


def replay(
    model: nn.Module,
    maps: Mapping[str, Any] | Sequence[Any] | OpenDump,
    size: tuple[int, int] | None = None,
    class_tokens: Mapping[str, Any] | Sequence[Any] | OpenDump | None = None,
    pixel_values: torch.Tensor | None = None,
    **inputs: Any,
) -> Any:
    """Run a transformers model on maps that its backbone gave earlier, as `featcli extract` stored them.

    `maps` are (B, C, H, W) tensors or arrays of the stages that the model itself uses, unpooled. They come as a mapping
    by the names of the stages, in any order, as a sequence in network order, or as an open dump, whose rows are all
    read. Tensors are taken as they are, so that gradients reach them if they want some. `size` is the (H, W) of the
    pixels that they came from. A model that reads the picture itself needs `pixel_values` instead. A model whose head
    reads class tokens (DPT, ZoeDepth) needs `class_tokens`, (B, C) for each stage, as `--pool cls` stores them. All
    other keywords go to the model. Returns what the model returns.

    The model is not changed, so any number of threads may replay through it at once. Raises UsageError if this model
    cannot run in this way, or not on these maps, and for a dump what reading it raises.
    """
    backbone = _Backbone.inside(model)
    if class_tokens is None and getattr(model.config, "readout_type", "") in READS_CLASS_TOKENS:
        raise UsageError(
            f"the head of {type(model).__name__} reads class tokens, which are not in maps",
            "extract them too, with --pool cls, and give them as class_tokens",
        )
    like = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    found = backbone.in_order("maps", maps, like)
    tokens = None if class_tokens is None else backbone.in_order("class_tokens", class_tokens, like)
    _refuse_wrong_kinds(found, tokens, like)
    seen = _size(size, pixel_values, len(found[0]))
    backbone.refuse_other_shapes(found, seen)
    if pixel_values is None:  # takes no memory, because nobody reads it
        pixel_values = torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device).expand(len(found[0]), 3, *seen)
    stored = _Stored(found, tokens, backbone.module)
    result = twin_of(model, {backbone.module: stored})(pixel_values=pixel_values, **inputs)
    if not stored.was_asked:
        raise UsageError(
            f"{type(model).__name__} never called its backbone, so these maps had no part in its output",
            "was its forward replaced, by hooks of accelerate or the like? Give the model as from_pretrained loads it",
        )
    return result


@dataclass(frozen=True, eq=False)
class _Backbone:
    """The backbone of a larger model, as far as the maps in its place must be like its own."""

    module: Any
    owner: str  # the name of the larger model

    @classmethod
    def inside(cls, model: Any) -> _Backbone:
        """Return the backbone inside a model. Raises UsageError if there is none."""
        place = place_of_backbone(model) if isinstance(model, nn.Module) else ""
        if not place or not hasattr(model, "config"):
            raise UsageError(
                f"{type(model).__name__} holds no backbone that can be replaced",
                "give a MaskFormer, Mask2Former, DETR, RT-DETR, UperNet, DepthAnything or the like",
            )
        return cls(model.get_submodule(place), type(model).__name__)

    @cached_property
    def names(self) -> list[tuple[str, ...]]:
        """The names that each of its stages may have: featcli's first, then its library's."""
        timm = getattr(getattr(self.module, "_backbone", self.module), "feature_info", None)
        if timm is None:
            return [(name,) for name in getattr(getattr(self.module, "config", None), "out_features", None) or ()]
        ours = names_by_stride([one["reduction"] for one in timm.info])
        return [(ours[index], name) for index, name in zip(timm.out_indices, timm.module_name(), strict=True)]

    def in_order(self, what: str, arrays: Any, like: torch.Tensor) -> list[torch.Tensor]:
        """Return tensors of arrays, in network order. Raises UsageError unless there is one for each stage."""
        known = ", ".join(name for name, *_ in self.names)
        if isinstance(arrays, OpenDump):
            arrays = {stage: arrays[stage] for stage in arrays.stages}  # they are not read yet
        if isinstance(arrays, Mapping):
            keys = [next((name for name in names if name in arrays), None) for names in self.names]
            missing = [names[0] for names, key in zip(self.names, keys, strict=True) if key is None]
            if missing and arrays:
                raise UsageError(
                    f"{what} of {', '.join(map(str, arrays))}: {self.owner} needs {known},"
                    f" and {missing[0]} is not there",
                    f"extract with --out-features {known.replace(' ', '')}",
                )
            values = [] if missing else [arrays[key] for key in keys]
        elif isinstance(arrays, str | bytes | torch.Tensor | np.ndarray) or not isinstance(arrays, Iterable):
            raise UsageError(f"{what}: {type(arrays).__name__} is neither a mapping nor a sequence", BY_NAME)
        else:
            values = list(arrays)
        if values and self.names and len(values) != len(self.names):
            raise UsageError(f"{len(values)} {what}: {self.owner} needs {len(self.names)}, of {known}", BY_NAME)
        return [_tensor(what, value, like) for value in values]

    def refuse_other_shapes(self, maps: Sequence[torch.Tensor], size: Size) -> None:
        """Raise UsageError for maps of other shapes than the backbone itself gives for pixels of this size."""
        for place, (found, own) in enumerate(zip(maps, self._shapes(size) or (), strict=False)):
            height, width = found.shape[2:]
            if len(own) == 4:
                is_like, expected = found.shape[1:] == own[1:], str(tuple(own[1:]))
            else:  # tokens: a class token and others may come before the patches
                is_like = found.shape[1] == own[2] and 0 <= own[1] - height * width <= MOST_PREFIX_TOKENS
                expected = f"tokens ({own[1]}, {own[2]})"
            if not is_like:
                name = f" of {self.names[place][0]}" if self.names else f" {place}"
                shape = f"{tuple(found.shape[1:])}"
                raise UsageError(
                    f"the map{name} is {shape}, the backbone of {self.owner} gives {expected} for"
                    f" {size[0]}x{size[1]} pixels",
                    "give the maps of this model in network order, or by name, and the size that they were"
                    " extracted with",
                )

    def _shapes(self, size: Size) -> list[torch.Size] | None:
        known = _shapes_of.setdefault(self.module, {})
        if size not in known:
            known[size] = self._shapes_by_running(size)
        return known[size]

    def _shapes_by_running(self, size: Size) -> list[torch.Size] | None:
        twin = twin_of(self.module, tensors=without_values).eval()
        like = next(twin.parameters(), torch.empty(0, device="meta"))
        channels = getattr(getattr(self.module, "config", None), "num_channels", 3)
        try:
            with torch.no_grad():
                found = twin(torch.empty(1, channels, *size, dtype=like.dtype, device="meta"))
        except Exception:  # some models look into their tensors, and libraries refuse a size in many ways
            return None
        return [one.shape for one in getattr(found, "feature_maps", found)]


def _tensor(what: str, value: Any, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        # Autograd keeps no tensor of inference mode.
        return value.clone() if value.is_inference() and torch.is_grad_enabled() else value
    try:
        array = np.asarray(value)  # a stage of a dump, too
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # some heads work in place
    except UsageError:  # the dump has maps of many sizes
        raise
    except (TypeError, ValueError) as error:
        hint = BY_NAME if isinstance(value, str) else "give (B, C, H, W) arrays, so maps of one size in each call"
        raise UsageError(f"{what}: {shown(type(value).__name__)} is not an array of numbers", hint) from error
    return tensor.to(like.device)


def _refuse_wrong_kinds(maps: list[torch.Tensor], tokens: list[torch.Tensor] | None, like: torch.Tensor) -> None:
    """Raise UsageError for values that are no maps or class tokens, and for another number, dtype or device."""
    kind, batch = str(like.dtype).removeprefix("torch."), len(maps[0]) if maps and maps[0].ndim else 0
    if not batch or any(one.ndim != 4 or one.dtype != like.dtype or len(one) != batch for one in maps):
        shapes = ", ".join(f"{tuple(one.shape)} {one.dtype}" for one in maps) or "none"
        if not maps or any(one.ndim != 4 for one in maps):
            hint = AS_EXTRACTED
        elif any(len(one) != batch for one in maps) or not batch:
            hint = "give the same rows of each stage, one at least"
        elif like.dtype != torch.float32 and all(one.dtype == torch.float32 for one in maps):
            hint = "run the model in the type of the maps: model.float()"
        else:
            hint = f"cast them, or the model: both have to be of one type; {AS_EXTRACTED}"
        raise UsageError(f"replay takes one {kind} map (B, C, H, W) for each stage, not {shapes}", hint)
    for one, token in zip(maps, tokens or (), strict=tokens is not None):
        if token.shape != one.shape[:2] or token.dtype != like.dtype:
            is_vector = token.ndim == 2 and token.shape[1] == one.shape[1]
            raise UsageError(
                f"class_tokens {tuple(token.shape)} {token.dtype} do not fit maps {tuple(one.shape)}, which need"
                f" {tuple(one.shape[:2])} {like.dtype}",
                "give the same rows of both, in one type" if is_vector else "extract the same pictures with --pool cls",
            )
    for one in (*maps, *(tokens or ())):
        if one.device != like.device:
            raise UsageError(
                f"the maps are on {one.device}, and the model is on {like.device}", f"move them: .to('{like.device}')"
            )


def _size(size: Any, pixel_values: Any, batch: int) -> Size:
    """Return the (H, W) of the pixels. Raises UsageError if it is missing, or given twice with different values."""
    said: Size | None = None
    if size is not None:
        is_pair = isinstance(size, tuple | list | torch.Size) and len(size) == 2
        if not is_pair or not all(isinstance(edge, Integral) and int(edge) > 0 for edge in size):
            raise UsageError(f"size {size!r} is not (H, W)", "give size=(H, W) as it was extracted")
        said = int(size[0]), int(size[1])
    if pixel_values is None:
        if said is None:
            raise UsageError("replay needs the size of the pixels", "give size=(H, W) as it was extracted")
        return said
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4 or len(pixel_values) != batch:
        what = getattr(pixel_values, "shape", type(pixel_values).__name__)
        raise UsageError(f"pixel_values are {what}, not (B, C, H, W) of {batch} maps", "give the normalised pixels")
    seen = int(pixel_values.shape[2]), int(pixel_values.shape[3])
    if said not in (None, seen):
        raise UsageError(f"size {said}: pixel_values are {seen[0]}x{seen[1]}", "leave size out")
    return seen


class _Stored(nn.Module):
    """In a backbone's place, returns stored maps as that backbone would."""

    def __init__(self, maps: list[torch.Tensor], class_tokens: list[torch.Tensor] | None, backbone: nn.Module) -> None:
        super().__init__()
        self.was_asked = False
        self.config = getattr(backbone, "config", None)
        # transformers' backbones return an output object; timm's, inside DETR, return a plain list.
        self._as_list = self.config is None
        if self._leaves_tokens():  # a head that reads no class token takes any
            class_tokens = class_tokens or [found.new_zeros(found.shape[:2]) for found in maps]
            maps = [self._tokens(found, token) for found, token in zip(maps, class_tokens, strict=True)]
        self._maps = maps

    def _leaves_tokens(self) -> bool:
        return getattr(self.config, "reshape_hidden_states", True) is False

    @staticmethod
    def _tokens(found: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
        """Join (B, C, h, w) and (B, C) to (B, 1 + tokens, C): the class token, then the patches."""
        return torch.cat([class_token[:, None], found.flatten(2).transpose(1, 2)], 1)

    def forward(self, *_: Any, **__: Any) -> Any:
        self.was_asked = True
        if self._as_list:
            return list(self._maps)
        from transformers.modeling_outputs import BackboneOutput

        return BackboneOutput(feature_maps=tuple(self._maps))

    forward_with_filtered_kwargs = forward
