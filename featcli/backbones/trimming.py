"""Find what no map of a network depends on by autograd, remove it, and put it back if that changes a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from featcli.errors import UsageError

Maps = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def idle_tensors(module: nn.Module, maps: Maps, pixels: torch.Tensor) -> frozenset[str]:
    """Return the parameters and buffers of a module that none of its maps depends on, as autograd shows.

    `maps` runs the module, which computes nothing on the meta device. A buffer is idle with the parameters beside it.
    Returns none if the module cannot run in this way.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    try:
        with torch.enable_grad():
            total = sum(found.sum() for found in maps(pixels))
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
    except UsageError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return frozenset()
    idle = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    owners = {name.rpartition(".")[0] for name in idle} - {name.rpartition(".")[0] for name in {*names} - idle}
    return frozenset(idle | {name for name, _ in module.named_buffers() if name.rpartition(".")[0] in owners})


def trim(module: nn.Module, idle: frozenset[str], maps: Maps, pixels: torch.Tensor) -> frozenset[str]:
    """Remove idle layers and modules from a module, in place. `maps` runs it on `pixels` (B, C, H, W).

    They are put back if the code cannot do without them, or if a bit of a map changes. Returns the idle names, and none
    if a bit did change, because a map depends on them then.
    """
    with torch.inference_mode():
        before = maps(pixels)
        undo = _take_out(module, idle)
        try:
            after = maps(pixels)
        except Exception:  # the code needs what was removed, though not for its result
            after = []
    same = [_same_bits(one, other) for one, other in zip(before, after, strict=False)]
    if len(after) != len(before) or not all(same):
        for put_back in reversed(undo):
            put_back()
    return idle if all(same) else frozenset()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two maps are equal. NaN, which comes from weights that diverged, equals itself."""
    return one.shape == other.shape and (one.is_meta or torch.equal(one.view(torch.int32), other.view(torch.int32)))


def _take_out(module: nn.Module, idle: frozenset[str]) -> list[Callable[[], object]]:
    """Cut idle layers off the ends of lists, and replace other idle modules by nothing. Returns how to undo it."""
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
