"""Fold batch norms into the convolutions before them: in eval mode a norm is arithmetic on weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featcli.backbones.backbone import Network
from featcli.backbones.internals import fused_weights, is_plain_convolution, is_plain_norm, steps_after_norm
from featcli.errors import UsageError

TOLERANCE = 1e-5  # of the largest number of a map


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A convolution and the norm that takes its output."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    path: str  # of the norm in the network


def fold(network: Network, channels: int, size: tuple[int, int]) -> int:
    """Fold what can be folded, in place, on the CPU in fp32, for an input of these channels and this (H, W).

    A norm is folded if it takes the output of one convolution, and both run once. A run checks that maps stay within
    TOLERANCE; if not, everything is put back. Returns how many norms were folded.
    """
    pixels = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs, before = _pairs(network, pixels)
        undo = [_fold(network.module, pair) for pair in pairs]
        after = network.outputs(pixels) if pairs else before
    if all(_is_near(one, other) for one, other in zip(before, after, strict=True)):
        return len(pairs)
    for put_back in undo:
        put_back()
    return 0


def has_norms(network: Network) -> bool:
    """Return whether there may be something to fold."""
    return any(is_plain_norm(module) for module in network.module.modules())


def nothing_to_fold(name: str) -> UsageError:
    """Return the error for a backbone whose norms cannot be folded although that was asked."""
    return UsageError(
        f"--fold: {name} has no norm that can be folded into a convolution without changing its maps",
        "leave --fold out",
    )


def _pairs(network: Network, pixels: torch.Tensor) -> tuple[list[_Pair], list[torch.Tensor]]:
    """Return the pairs that can be folded, as they meet in a forward pass, and the maps."""
    came_from: dict[int, nn.Conv2d] = {}
    kept: list[torch.Tensor] = []  # otherwise another tensor could get the same id
    met: list[_Pair] = []
    calls: Counter[nn.Module] = Counter()

    def leave(conv: nn.Module, _: Any, output: torch.Tensor) -> None:
        calls[conv] += 1
        kept.append(output)
        came_from[id(output)] = conv  # type: ignore[assignment]

    def enter(path: str, norm: nn.BatchNorm2d, inputs: Any) -> None:
        calls[norm] += 1
        if inputs and id(inputs[0]) in came_from:
            met.append(_Pair(convolution=came_from[id(inputs[0])], norm=norm, path=path))

    hooks: list[Any] = []
    for path, module in network.module.named_modules():
        if is_plain_convolution(module):
            hooks.append(module.register_forward_hook(leave))
        elif is_plain_norm(module):
            hooks.append(module.register_forward_pre_hook(lambda norm, given, path=path: enter(path, norm, given)))
    try:
        maps = network.outputs(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in met if calls[pair.convolution] == calls[pair.norm] == 1], maps


def _fold(module: nn.Module, pair: _Pair) -> Callable[[], None]:
    """Fold one norm. Returns a function that undoes it."""
    conv, norm = pair.convolution, pair.norm
    weight, bias = conv.weight, conv.bias

    def put_back() -> None:
        conv.weight, conv.bias = weight, bias
        _replace(module, pair.path, norm)

    fused_weight, fused_bias = fused_weights(conv, norm)
    conv.weight, conv.bias = fused_weight.requires_grad_(False), fused_bias.requires_grad_(False)
    _replace(module, pair.path, nn.Sequential(*steps_after_norm(norm)))
    return put_back


def _replace(module: nn.Module, path: str, by: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, by)


def _is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
