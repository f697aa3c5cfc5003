"""Turn the map (B, C, H, W) and the tokens of a stage into what is stored of it, on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from featcli.dump.plan import MAP, REGISTERS
from featcli.spec.parsers import parse_pool

if TYPE_CHECKING:
    import torch

LARGEST_GRID = 1024  # cells of an edge, where maps have sizes of their own
GEM_POWER = 3.0
GEM_LEAST = 1e-6  # smaller values are taken for it: the power of a negative one would not be its size

MOST_CLAMPED = 0.5  # share of values above which the generalised mean is one of other numbers than the map holds


class StageTensors(NamedTuple):
    """What one pass gives of a stage."""

    map: torch.Tensor  # (B, C, h, w)
    prefix: torch.Tensor | None = None  # (B, P, C), the tokens before the patches, where a reduction needs them
    num_registers: int = 0  # the last of those

    @property
    def class_token(self) -> torch.Tensor:
        """(B, C)."""
        assert self.prefix is not None
        return self.prefix[:, 0]


@dataclass(frozen=True)
class Pooling:
    """How a stage is reduced."""

    name: str
    reduce: Callable[[StageTensors], torch.Tensor]
    # (C, H, W) of a map and its registers -> what is stored of one image
    shape: Callable[[tuple[int | None, ...], int], tuple[int | None, ...]]
    axes: tuple[str, ...] = ("C",)
    needs_class_token: bool = False
    needs_registers: bool = False

    @property
    def needs_prefix(self) -> bool:
        """Whether it is made of tokens that are no part of a map."""
        return self.needs_class_token or self.needs_registers

    def is_finer_than(self, shape: tuple[int | None, ...]) -> bool:
        """Whether it makes more cells than a map (C, H, W) has; LARGEST_GRID where maps have sizes of their own."""
        if self.axes != MAP:
            return False
        edges = zip(self.shape(shape, 0), shape, strict=False)
        return any((made or 0) > (there or LARGEST_GRID) for made, there in edges)

    def of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Reduce maps (B, C, h, w) by themselves."""
        return self.reduce(StageTensors(maps))


def average(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, C), in fp32."""
    return maps.float().mean((2, 3))


def generalised_mean(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, C), in fp32: the mean of powers, and its root (Radenovic and others, 2018)."""
    return maps.float().clamp(min=GEM_LEAST).pow(GEM_POWER).mean((2, 3)).pow(1 / GEM_POWER)


def clamped(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B,): which share of the values of each `generalised_mean` takes for a larger one."""
    return (maps < GEM_LEAST).flatten(1).float().mean(1)


def remark_on_clamped(name: str, share: float) -> str:
    """Return a line for people where most of the values that `gem` took of an output were clamped; "" otherwise."""
    if share <= MOST_CLAMPED:
        return ""
    text = f"{share:.0%} of the values that gem took of {name} are below 1e-6, and count as that"
    return f"{text}: its means say little, use --pool avg or max"


def _class_token_and_average(stage: StageTensors) -> torch.Tensor:
    import torch

    return torch.cat([stage.class_token.float(), average(stage.map)], 1)


def _grid(height: int, width: int) -> Pooling:
    def reduce(stage: StageTensors) -> torch.Tensor:
        from torch.nn.functional import adaptive_avg_pool2d

        return adaptive_avg_pool2d(stage.map.float(), (height, width))

    return Pooling(f"{height}x{width}", reduce, lambda shape, _: (shape[0], height, width), axes=MAP)


def _registers(stage: StageTensors) -> torch.Tensor:
    assert stage.prefix is not None
    return stage.prefix[:, stage.prefix.shape[1] - stage.num_registers :]


def _channels(shape: tuple[int | None, ...], _: int) -> tuple[int | None, ...]:
    return shape[:1]


POOLINGS = {
    "none": Pooling("none", lambda stage: stage.map, lambda shape, _: shape, axes=MAP),
    "avg": Pooling("avg", lambda stage: average(stage.map), _channels),
    "max": Pooling("max", lambda stage: stage.map.amax((2, 3)), _channels),
    "gem": Pooling("gem", lambda stage: generalised_mean(stage.map), _channels),
    "cls": Pooling("cls", lambda stage: stage.class_token, _channels, needs_class_token=True),
    "registers": Pooling(
        "registers",
        _registers,
        lambda shape, registers: (registers, shape[0]),
        axes=REGISTERS,
        needs_registers=True,
    ),
    "cls+avg": Pooling(
        "cls+avg", _class_token_and_average, lambda shape, _: (2 * (shape[0] or 0),), needs_class_token=True
    ),
}


def pooling(name: str) -> Pooling:
    """Return a pooling by its name: one of POOLINGS, or a grid `HxW` of averages such as `7x7`. Raises UsageError."""
    grid = parse_pool(name)
    return POOLINGS[name] if grid is None else _grid(*grid)
