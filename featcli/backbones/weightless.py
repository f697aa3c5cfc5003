"""Make networks without values for their weights: only shapes matter, or a checkpoint gives the values afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from featcli.backbones.internals import OperationMode, leaves_of, mapped

LEAST = 1 << 12  # values; smaller tensors are made as they are
DRAWS = frozenset("kaiming_uniform_ uniform_ normal_ erfinv_ mul_ add_ clamp_".split())  # what draws random weights


class _Leaving(TorchFunctionMode):
    """Leaves some tensors as they are inside the block: functions that would write into them do nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        written = args[0] if args else kwargs.get("tensor")
        if self._leaves(getattr(func, "__name__", ""), written):
            return written
        return self._made(func, func(*args, **kwargs))

    def _leaves(self, name: str, written: Any) -> bool:
        """Return whether a function of this name leaves its first argument as it is."""
        raise NotImplementedError

    def _made(self, func: Callable[..., Any], found: Any) -> Any:
        """Return what stands for the result of a function."""
        return found


class WithoutDraws(_Leaving):
    """Inside the block no random numbers are drawn for parameters, which keep what happens to be in their memory.

    To draw those of a large network takes seconds, and they are in vain if a checkpoint replaces all of them.
    """

    def _leaves(self, name: str, written: Any) -> bool:
        return name in DRAWS and (isinstance(written, nn.Parameter) or _is_on_meta(written))


class WithoutWeights(_Leaving):
    """Inside the block, each tensor that this thread makes with `torch.empty` is a single zero seen in every place.

    Nothing is written into such tensors, because to initialise the weights of a large network takes minutes and
    gigabytes.
    """

    def _leaves(self, name: str, written: Any) -> bool:
        return _writes(name) and _is_one_value(written)

    def _made(self, func: Callable[..., Any], found: Any) -> Any:
        if func is torch.empty and found.numel() > LEAST:
            return found.new_zeros(()).expand(found.shape)
        return found


def _writes(name: str) -> bool:
    """Return whether a function changes the values of its first tensor, as torch's naming of functions tells."""
    if name == "requires_grad_":
        return False
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _is_on_meta(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_meta


def _is_one_value(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.numel() > LEAST and not any(tensor.stride())


class WithoutValues(OperationMode):  # type: ignore[no-untyped-call]
    """Inside the block, results of tensors with one value in every place are such tensors, too.

    Their shapes come from the meta device, so maps need neither memory nor time. Numbers that a network looks into,
    such as the places of its patches, are computed. Small results are computed as they are.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See OperationMode."""
        kwargs = kwargs or {}
        if not any(_is_one_value(one) for one in leaves_of((args, kwargs))):
            return func(*args, **kwargs)
        schema: Any = getattr(func, "_schema", None)
        if schema is None or schema.is_mutable or any(one.alias_info is not None for one in schema.returns):
            return args[0] if schema is not None and schema.is_mutable else func(*args, **kwargs)  # or a view of one
        try:
            shapes = func(*mapped(_on_meta, args), **mapped(_on_meta, kwargs))
        except NotImplementedError:  # the meta device lacks the operation
            return func(*args, **kwargs)
        found = [one for one in leaves_of(shapes) if isinstance(one, torch.Tensor)]
        if not found or any(one.numel() <= LEAST or not one.is_floating_point() for one in found[:1]):
            return func(*args, **kwargs)
        return mapped(_blank_as, shapes)


def blank(size: Sequence[int]) -> torch.Tensor:
    """Return blank pixels, as one value."""
    return torch.zeros(()).expand(tuple(size))


def _on_meta(one: Any) -> Any:
    if isinstance(one, torch.Tensor):
        return one.to("meta")
    return torch.device("meta") if isinstance(one, torch.device) else one


def _blank_as(one: Any) -> Any:
    return torch.zeros((), dtype=one.dtype).expand(one.shape) if isinstance(one, torch.Tensor) else one
