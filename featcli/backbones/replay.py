"""Stored maps through the rest of a larger model: its neck and head run, its backbone does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from featcli.backbones.composites import place_of_backbone
from featcli.errors import UsageError

# What the heads of DPT and ZoeDepth do with class tokens, where they read them at all.
READS_CLASS_TOKENS = ("project", "add")


def replay(
    model: nn.Module,
    maps: Mapping[str, Any] | Sequence[Any],
    size: tuple[int, int] | None = None,
    class_tokens: Mapping[str, Any] | Sequence[Any] | None = None,
    pixel_values: torch.Tensor | None = None,
    **inputs: Any,
) -> Any:
    """Run a transformers model on maps that its backbone gave earlier, as `featcli extract` stored them.

    `maps` are (B, C, H, W) tensors or arrays, in network order or by stage name: the stages that the model itself
    uses, unpooled. `size` is the (H, W) of the pixels they came from; a model that reads the picture itself
    needs `pixel_values` instead, one whose head reads class tokens (DPT, ZoeDepth) needs those too, (B, C) for each
    stage, as `--pool cls` stores them. Whatever else the model takes goes through. Returns what the model returns.
    Raises UsageError where this model cannot be run so.
    """
    place = place_of_backbone(model)
    if not place:
        raise UsageError(
            f"{type(model).__name__} holds no backbone that can be replaced",
            "give a MaskFormer, Mask2Former, DETR, RT-DETR, UperNet, DepthAnything or the like",
        )
    if class_tokens is None and getattr(model.config, "readout_type", "") in READS_CLASS_TOKENS:
        raise UsageError(
            f"the head of {type(model).__name__} reads class tokens, which are not in maps",
            "extract them too, with --pool cls, and give them as class_tokens",
        )
    found, tokens = _tensors(maps), None if class_tokens is None else _tensors(class_tokens)
    if not found or any(m.ndim != 4 or m.dtype != torch.float32 or len(m) != len(found[0]) for m in found):
        shapes = ", ".join(f"{tuple(m.shape)} {m.dtype}" for m in found) or "none"
        raise UsageError(
            f"replay takes one float32 map (B, C, H, W) for each stage, not {shapes}",
            "extract with --pool none and --dtype float32; dump[stage][:8] gives a batch",
        )
    if size is not None and not (isinstance(size, tuple | list) and len(size) == 2):
        raise UsageError(f"size {size!r}: not (H, W)", "give size=(H, W) as it was extracted")
    if pixel_values is None:
        if size is None:
            raise UsageError("replay needs the size of the pixels", "give size=(H, W) as it was extracted")
        pixel_values = torch.zeros(1, 1, 1, 1).expand(len(found[0]), 3, *size)  # no memory: nobody reads it
    backbone = model.get_submodule(place)
    parent, _, leaf = place.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    setattr(owner, leaf, _Stored(found, tokens, backbone))
    try:
        return model(pixel_values=pixel_values, **inputs)
    finally:
        setattr(owner, leaf, backbone)


def _tensors(arrays: Mapping[str, Any] | Sequence[Any]) -> list[torch.Tensor]:
    values = arrays.values() if isinstance(arrays, Mapping) else arrays
    return [torch.as_tensor(np.ascontiguousarray(value)) for value in values]


class _Stored(nn.Module):
    """In a backbone's place: gives stored maps as that backbone would."""

    def __init__(self, maps: list[torch.Tensor], class_tokens: list[torch.Tensor] | None, backbone: nn.Module) -> None:
        super().__init__()
        self.config = getattr(backbone, "config", None)
        # transformers' backbones return an output object; timm's, inside DETR, a plain list.
        self._as_list = self.config is None
        if self._leaves_tokens():  # in a head that reads no class token, any will do
            class_tokens = class_tokens or [found.new_zeros(found.shape[:2]) for found in maps]
            maps = [self._tokens(found, token) for found, token in zip(maps, class_tokens, strict=True)]
        self._maps = maps

    def _leaves_tokens(self) -> bool:
        return getattr(self.config, "reshape_hidden_states", True) is False

    @staticmethod
    def _tokens(found: torch.Tensor, class_token: torch.Tensor) -> torch.Tensor:
        """Join (B, C, h, w) and (B, C) as (B, 1 + tokens, C): the class token, then the patches."""
        return torch.cat([class_token[:, None], found.flatten(2).transpose(1, 2)], 1)

    def forward(self, *_: Any, **__: Any) -> Any:
        if self._as_list:
            return list(self._maps)
        from transformers.modeling_outputs import BackboneOutput

        return BackboneOutput(feature_maps=tuple(self._maps))

    forward_with_filtered_kwargs = forward
