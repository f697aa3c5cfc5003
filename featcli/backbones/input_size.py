"""Refuse an input size that the backbone does not take, and name the nearest that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from featcli.backbones.model_spec import ModelSpec
from featcli.errors import FeatcliError, UsageError
from featcli.spec.parsers import Size

TRIES = 8  # multiples of the stride in each direction: windows of 7 patches and three halvings repeat after 7


def refuse_unfit(model: ModelSpec, at_size: Callable[[Size | None], ModelSpec]) -> None:
    """Raise UsageError if the backbone cannot run at the size that was asked for, and name the nearest sizes.

    `at_size` opens the same checkpoint at another size; None is its own. Some models silently cut off pixels that do
    not fill a patch, and others refuse them. Here they are always refused.
    """
    height, width = model.input_size
    if model.patch is not None and (height % model.patch[0] or width % model.patch[1]):
        cause = f"not a multiple of its patch of {_said(model.patch)}"
        step = model.patch
    else:
        try:
            _ = model.stages
        except FeatcliError as error:
            cause, step = error.message, _stride(at_size)
        else:
            return
    good = [found for found in (_first(sizes, at_size) for sizes in _nearest((height, width), step)) if found]
    hint = f"{' or '.join(map(_said, good))} would do" if good else "leave it out for the checkpoint's own"
    raise UsageError(f"--image-size {_said((height, width))}: {model.name} does not take it: {cause}", hint)


def _stride(at_size: Callable[[Size | None], ModelSpec]) -> Size:
    """Return the largest stride at the checkpoint's own size, if it has one. Sizes that fit are multiples of it."""
    try:
        return at_size(None).stages[-1].stride
    except FeatcliError:
        return (32, 32)


def _nearest(size: Size, step: Size) -> Iterator[list[Size]]:
    """Yield multiples of the step: first the smaller ones from the nearest on, then the larger ones."""
    whole = size[0] // step[0], size[1] // step[1]
    yield [(whole[0] * step[0] - k * step[0], whole[1] * step[1] - k * step[1]) for k in range(TRIES)]
    above = -(-size[0] // step[0]), -(-size[1] // step[1])
    yield [(above[0] * step[0] + k * step[0], above[1] * step[1] + k * step[1]) for k in range(TRIES)]


def _first(sizes: list[Size], at_size: Callable[[Size | None], ModelSpec]) -> Size | None:
    for size in sizes:
        if min(size) <= 0:
            return None
        try:
            _ = at_size(size).stages
        except FeatcliError:
            continue
        return size
    return None


def _said(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
