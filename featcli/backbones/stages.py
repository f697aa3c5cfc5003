"""Name stages, and choose some of them by rules. These are pure functions without torch.

The rules are those of transformers' `BackboneConfigMixin`: the default is the last stage; names and indices must exist,
must not repeat, and must agree if both are given. There are three differences on purpose. The order in which stages are
asked for does not matter. An index that is too negative is an error like any other. `all`, `stage2:stage4`, `stage2:`
and `:stage2` are understood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from featcli.errors import UsageError, did_you_mean, nearest, shown
from featcli.spec.words import ALL, OTHER_VECTORS, VECTORS


@dataclass(frozen=True)
class Stage:
    """A named place in a backbone that gives a feature map."""

    name: str
    index: int  # the library's own index, as in out_indices
    module: str  # the library's own name of the place
    shape: tuple[int, int, int]  # (C, H, W) at the backbone's input size
    stride: tuple[int, int]  # input pixels per cell: (vertical, horizontal)

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0]

    def shape_at(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) at another input size, a multiple of the stride."""
        return self.channels, size[0] // self.stride[0], size[1] // self.stride[1]


@dataclass(frozen=True)
class Points:
    """What a network is made for: stages, by their positions in network order, and vectors behind them, by name."""

    positions: tuple[int, ...]
    vectors: tuple[str, ...] = ()

    def deepest(self, count: int) -> int:
        """Find the position of the deepest stage, of so many, that has to be computed: vectors need all of them."""
        return count - 1 if self.vectors else max(self.positions)


@dataclass(frozen=True)
class Vector:
    """A vector that the model makes of a whole picture: what stands behind its last stage."""

    name: str  # embedding, projection or logits
    shape: tuple[int]  # (D,)
    module: str  # what gives it, in the library's own words
    remark: str = ""  # what a user should know before it is chosen


def names_by_stride(strides: Sequence[int]) -> list[str]:
    """Return names for the stages of a backbone that only counts them, so that `stage1` has stride 4 in every pyramid.

    timm begins at stride 1, 2, 4 or 16. If strides double from 2, the first stage is the stem; if they double from 1,
    the first two are. Otherwise place i is stage i + 1, which for a vision transformer is also how transformers counts
    its blocks.
    """
    strides = list(strides)
    stems = ["stem0", "stem"] if strides[:3] == [1, 2, 4] else ["stem"] if strides[:2] == [2, 4] else []
    return stems + [f"stage{i + 1}" for i in range(len(strides) - len(stems))]


def select(
    stages: Sequence[tuple[str, str]],
    out_features: Sequence[str] | None = None,
    out_indices: Sequence[int] | str | None = None,
    first_index: int = 0,
) -> tuple[int, ...]:
    """Return the positions of the chosen stages, in network order.

    `stages` are the backbone's (name, module) pairs in network order, and `first_index` is the library's own index of
    the first. Without a choice it is the last stage; if both are given, they must mean the same stages. Raises
    UsageError.
    """
    names = [name for name, _ in stages]
    by_name = None if out_features is None else _from_features(stages, out_features)
    by_index = None if out_indices is None else _from_indices(names, out_indices, first_index)
    if by_name is not None and by_index is not None and by_name != by_index:
        raise UsageError(
            f"--out-features means {_listed(names, by_name)} but --out-indices means {_listed(names, by_index)}",
            "give one of the two, or make them agree",
        )
    if by_name is not None:
        return by_name
    if by_index is not None:
        return by_index
    return (len(names) - 1,)


def _from_features(stages: Sequence[tuple[str, str]], features: Sequence[str]) -> tuple[int, ...]:
    chosen: list[int] = []
    for feature in features:
        if feature == ALL:
            chosen += range(len(stages))
        elif ":" in feature:
            first, _, last = feature.partition(":")
            begin = _position(stages, first) if first else 0
            span = range(begin, _position(stages, last) + 1 if last else len(stages))
            if not span:
                raise UsageError(f"range {shown(feature)} runs backwards", f"write {last}:{first}")
            chosen += span
        else:
            chosen.append(_position(stages, feature))
    return _checked([name for name, _ in stages], chosen, "--out-features", features)


def _position(stages: Sequence[tuple[str, str]], feature: str) -> int:
    names, modules = [name for name, _ in stages], [module for _, module in stages]
    if feature in names:
        return names.index(feature)
    if modules.count(feature) == 1:
        return modules.index(feature)
    if feature in modules:
        several = [name for name, module in stages if module == feature]
        hint = f"module {shown(feature)} is the place of {' and '.join(several)}: choose by those names"
    elif vector := OTHER_VECTORS.get(feature) or next(iter(nearest(feature, VECTORS)), None):
        hint = f"{did_you_mean([vector])} The stages are {_brief(names)}"
    elif near := nearest(feature, list(dict.fromkeys([*names, *modules]))):
        hint = f"{did_you_mean(near)} The stages are {_brief(names)}"
    elif re.fullmatch(r"-?\d+", feature):
        hint = f"give --out-indices {feature} for an index; the names of stages are {_brief(names)}"
    else:
        hint = f"choose from {_brief(names)}"
    raise UsageError(f"there is no stage {shown(feature)}", hint)


def _from_indices(names: Sequence[str], indices: Sequence[int] | str, first: int) -> tuple[int, ...]:
    if isinstance(indices, str):
        return tuple(range(len(names)))
    last = first + len(names) - 1
    for index in indices:
        if not (first <= index <= last or -len(names) <= index < 0):
            raise UsageError(
                f"stage index {index} is out of range: there are {len(names)} stages",
                f"use {first} to {last}, or {-len(names)} to -1 counted from the end: {_brief(names)}",
            )
    positions = [index + len(names) if index < 0 else index - first for index in indices]
    return _checked(names, positions, "--out-indices", indices)


def _checked(names: Sequence[str], chosen: list[int], option: str, asked: Sequence[object]) -> tuple[int, ...]:
    if not chosen:
        raise UsageError(f"{option} chooses no stage", f"choose from {_brief(names)}")
    if len(set(chosen)) < len(chosen):
        again = next(names[i] for i in chosen if chosen.count(i) > 1)
        raise UsageError(f"{option} {','.join(map(str, asked))} chooses {again} twice", "name each stage once")
    return tuple(sorted(chosen))


def _listed(names: Sequence[str], positions: Sequence[int]) -> str:
    return ", ".join(names[i] for i in positions)


def _brief(names: Sequence[str]) -> str:
    """Return all names, or the ends of a long row of them."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:3])} ... {names[-1]}"
