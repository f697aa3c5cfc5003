"""Batch norms folded into the convolutions before them: what they do in eval mode is arithmetic on weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from featcli.backbones.backbone import Network

TOLERANCE = 1e-5  # of the largest number of a map
PLAIN = ("Conv2d", "Conv2dSame")  # convolutions that use their weights as they are; others standardise them first


def fold(network: Network, channels: int, size: tuple[int, int]) -> int:
    """Fold what can be folded, in place, on the CPU in fp32; returns how many norms.

    A norm is folded where it takes the output of one convolution, and both run once. That the maps stay within
    TOLERANCE is seen, not believed: else everything is put back, and the answer is 0.
    """
    pixels = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs, before = _pairs(network, pixels)
        undo = [_fold(network.module, *pair) for pair in pairs]
        after = network.maps(pixels) if pairs else before
    if all(_is_near(one, other) for one, other in zip(before, after, strict=True)):
        return len(pairs)
    for conv, weight, bias, path, norm in undo:
        conv.weight, conv.bias = weight, bias
        _replace(network.module, path, norm)
    return 0


def has_norms(network: Network) -> bool:
    """Whether there may be something to fold."""
    return any(isinstance(module, nn.BatchNorm2d) and _is_known(module) for module in network.module.modules())


def _pairs(network: Network, pixels: torch.Tensor) -> tuple[list[tuple[nn.Conv2d, str, nn.BatchNorm2d]], Any]:
    """(convolution, path of the norm, norm) as they meet in a forward pass; and the maps."""
    came_from: dict[int, nn.Conv2d] = {}
    kept: list[torch.Tensor] = []  # or another tensor would get the same id
    met: list[tuple[nn.Conv2d, str, nn.BatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()

    def leave(conv: nn.Module, _: Any, output: torch.Tensor) -> None:
        calls[conv] += 1
        kept.append(output)
        came_from[id(output)] = conv  # type: ignore[assignment]

    def enter(path: str, norm: nn.BatchNorm2d, inputs: Any) -> None:
        calls[norm] += 1
        if inputs and id(inputs[0]) in came_from:
            met.append((came_from[id(inputs[0])], path, norm))

    hooks: list[Any] = []
    for path, module in network.module.named_modules():
        if isinstance(module, nn.Conv2d) and type(module).__name__ in PLAIN:
            hooks.append(module.register_forward_hook(leave))
        elif isinstance(module, nn.BatchNorm2d) and _is_known(module):
            hooks.append(module.register_forward_pre_hook(lambda norm, given, path=path: enter(path, norm, given)))
    try:
        maps = network.maps(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in met if calls[pair[0]] == calls[pair[2]] == 1], maps


def _is_known(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm has statistics, and does nothing else, or what timm's BatchNormAct2d does."""
    return norm.running_mean is not None and (type(norm) is nn.BatchNorm2d or type(norm).__name__ == "BatchNormAct2d")


def _fold(module: nn.Module, conv: nn.Conv2d, path: str, norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    """What is needed to undo it."""
    before = conv, conv.weight, conv.bias, path, norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
    more: list[Any] = [] if type(norm) is nn.BatchNorm2d else [norm.drop, norm.act]
    _replace(module, path, nn.Sequential(*more))
    return before


def _replace(module: nn.Module, path: str, by: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, by)


def _is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
