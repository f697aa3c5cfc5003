"""Refuse arguments that change nothing about a network, which some constructors of timm take silently."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from featcli.backbones.internals import NOTES_OF_TIMM, arguments_of_timm
from featcli.backbones.weightless import WithoutWeights
from featcli.errors import UsageError, did_you_mean, nearest, shown

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def refuse_idle(
    arguments: Mapping[str, Any], make: Callable[[str, Mapping[str, Any]], nn.Module], is_random: bool
) -> None:
    """Raise UsageError for an argument without which the network is the same, unless it has its default value.

    `make` builds the network on a device with some of the arguments. Some arguments only matter to random weights.
    """
    changed = described(make("meta", arguments)) if arguments else []
    for name, value in arguments.items():
        others = {other: given for other, given in arguments.items() if other != name}
        if value is None:
            raise UsageError(f"--model-arg {name}: timm ignores an argument that is null", "leave it out")
        try:
            plain = make("meta", others)
        except UsageError:  # other arguments need it
            continue
        if described(plain) != changed:
            continue
        known = arguments_of_timm(plain)
        if name not in known:
            raise UsageError(
                f"--model-arg {name}: {type(plain).__name__} has no such argument, and ignores it",
                did_you_mean(nearest(name, known), "give an argument of its class in timm"),
            )
        if is_random or _plain(known[name]) == _plain(value):
            continue
        with WithoutWeights():  # a table may hold what is computed from it
            pair = make("cpu", others), make("cpu", arguments)
        if _same_tables(*pair):
            raise UsageError(f"--model-arg {name}: {type(plain).__name__} is the same without it", "leave it out")


def refuse_words(arguments: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise UsageError for a word in place of true or false, because any word would be taken for true.

    `known` are the defaults.
    """
    for name, value in arguments.items():
        if isinstance(value, str) and isinstance(known.get(name), bool):
            meant = {"no": "false", "off": "false", "yes": "true", "on": "true"}.get(value.lower(), "")
            raise UsageError(
                f"--model-arg {name}: it has to be true or false, not {shown(value)}",
                did_you_mean([f"--model-arg {name}={meant}"] if meant else [], f"give {name}=true or {name}=false"),
            )


def described(module: nn.Module) -> list[Any]:
    """Return a description of a network: its modules with all their attributes, and the shapes of its tensors."""
    parts = [
        (path, type(part).__qualname__, {key: _plain(value) for key, value in _noted(part).items()})
        for path, part in module.named_modules()
    ]
    return [parts, [(name, tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())]]


def _noted(part: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE | NOTES_OF_TIMM}


def _same_tables(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two networks computed the same tables, which no checkpoint has."""
    pairs = zip(one.buffers(), other.buffers(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _plain(value: Any) -> Any:
    """Return something that equals the same value of another network."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype)
    if inspect.isfunction(value) or inspect.isclass(value) or inspect.ismethod(value):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    simple = {key: one for key, one in getattr(value, "__dict__", {}).items() if isinstance(one, (int, float, str))}
    return [type(value).__qualname__, {} if isinstance(value, nn.Module) else simple]
