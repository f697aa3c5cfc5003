"""Twins of modules: modules of their own with the same tensors, in which a part can be another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def twin_of(
    module: nn.Module,
    instead: Mapping[nn.Module, nn.Module] | None = None,
    tensors: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """Make a module of the same class with the same parts, down to its tensors, which are shared.

    What is put into the twin, removed from it or hooked into it leaves the module as it was. A part that is a key of
    `instead` is replaced by the value. `tensors` makes the twin's parameters and buffers from those of the module.
    """
    made: dict[nn.Module, nn.Module] = dict(instead or {})

    def twin(part: nn.Module) -> nn.Module:
        if part in made:  # one that stands in two places is one in the twin as well
            return made[part]
        other = made[part] = part.__class__.__new__(part.__class__)
        # Not copy.copy: some classes have a way of their own to be copied, which copies tensors.
        for name, value in vars(part).items():
            vars(other)[name] = value.copy() if isinstance(value, dict) and name.startswith("_") else value
        for name, child in part._modules.items():
            other._modules[name] = None if child is None else twin(child)
        for kept in (other._parameters, other._buffers) if tensors is not None else ():
            for name, tensor in kept.items():
                kept[name] = None if tensor is None else tensors(tensor)  # type: ignore[assignment,misc]
        return other

    return twin(module)


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the same shape and type that takes no memory."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
