"""Turn a feature map (B, C, H, W) into what is stored of it, on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featcli.spec.parsers import parse_pool

if TYPE_CHECKING:
    import torch

LARGEST_GRID = 1024  # cells along an edge, if maps have sizes of their own


@dataclass(frozen=True)
class Pooling:
    """A way to reduce maps. With `of_class_token` it reduces class tokens (B, C) instead."""

    name: str
    reduce: Callable[[torch.Tensor], torch.Tensor]
    shape: Callable[[tuple[int | None, ...]], tuple[int | None, ...]]  # (C, H, W) -> the stored shape of an image
    of_class_token: bool = False

    def is_finer_than(self, shape: tuple[int | None, ...]) -> bool:
        """Return whether it makes more cells than a map (C, H, W) has, or than LARGEST_GRID along an unknown edge."""
        edges = zip(self.shape(shape), shape, strict=False)
        return any((made or 0) > (there or LARGEST_GRID) for made, there in edges)


def _grid(height: int, width: int) -> Pooling:
    def reduce(maps: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import adaptive_avg_pool2d

        return adaptive_avg_pool2d(maps.float(), (height, width))

    return Pooling(f"{height}x{width}", reduce, lambda shape: (shape[0], height, width))


POOLINGS = {
    "none": Pooling("none", lambda maps: maps, lambda shape: shape),
    "avg": Pooling("avg", lambda maps: maps.float().mean((2, 3)), lambda shape: shape[:1]),
    "max": Pooling("max", lambda maps: maps.amax((2, 3)), lambda shape: shape[:1]),
    "cls": Pooling("cls", lambda tokens: tokens, lambda shape: shape[:1], of_class_token=True),
}


def pooling(name: str) -> Pooling:
    """Return a pooling by its name: one of POOLINGS, or a grid `HxW` of averages such as `7x7`. Raises UsageError."""
    grid = parse_pool(name)
    return POOLINGS[name] if grid is None else _grid(*grid)
