"""Networks whose weights take no memory, for those that cannot be run on the meta device: only their shapes matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LEAST = 1 << 12  # values: smaller tensors are made as they are


class WithoutWeights(TorchFunctionMode):
    """Inside the block, what this thread makes by `torch.empty` is one zero that is seen in every place.

    Nothing is written into such tensors: to initialise the weights of a large network takes minutes and gigabytes.
    """

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
        if _writes(getattr(func, "__name__", "")) and _is_one_value(written):
            return written
        found = func(*args, **kwargs)
        if func is torch.empty and found.numel() > LEAST:
            return found.new_zeros(()).expand(found.shape)
        return found


def _writes(name: str) -> bool:
    """Tell whether a function changes the values of its first tensor, by torch's way to name such."""
    if name == "requires_grad_":
        return False
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def _is_one_value(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.numel() > LEAST and not any(tensor.stride())
