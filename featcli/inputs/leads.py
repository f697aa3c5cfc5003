"""What leads the keys of several inputs: their last names as given, or tails of their paths where two are equal.

A link has its own name and not that of its target.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from featcli.inputs.archives import SUFFIX
from featcli.inputs.image_list import is_url, without_dots

FOLDER, TAR, FILE = "folder", "tar", "file"  # kinds of inputs, as plans name them

Names = tuple[str, ...]  # the names of a path, from the root on


class Input(NamedTuple):
    """An input by its name, and what it is."""

    name: str
    kind: str


def leads_of(inputs: Sequence[Input]) -> list[str]:
    """What leads the keys of each of several inputs: nothing, or names with a slash after each.

    Of an image it is what its own name follows: nothing, unless another image has that name.
    """
    paths = _paths(inputs)
    tails: dict[Names, Names] = {}
    for kinds in ((FILE,), (FOLDER, TAR)):
        tails |= _shortest_tails({path for path, one in zip(paths, inputs, strict=True) if one.kind in kinds})
    leads = []
    for path, one in zip(paths, inputs, strict=True):
        names = tails[path][:-1] if one.kind == FILE else tails[path]
        leads.append("".join(f"{name}/" for name in names))
    return leads


def is_only_one(names: Sequence[str]) -> bool:
    """Whether inputs are one, however often and in whichever ways it was named."""
    return len({_names_of(name) for name in names}) == 1


def older_lead(one: Input) -> str:
    """What led the keys of one of several inputs before plans said what does: its last name, a link's target's."""
    if one.kind == FILE:
        return ""
    if is_url(one.name):
        last = one.name.rstrip("/").rpartition("/")[2]
        return (last[: -len(SUFFIX)] if one.kind == TAR else last) + "/"
    return (Path(one.name).stem if one.kind == TAR else Path(one.name).resolve().name) + "/"


def _paths(inputs: Iterable[Input]) -> list[Names]:
    """The path of each input, of tars without their suffix, unless it is then that of another."""
    whole = [_names_of(one.name) for one in inputs]
    taken: Mapping[Names, set[Names]] = defaultdict(set)
    for path, one in zip(whole, inputs, strict=True):
        taken[_without_suffix(path, one.kind)].add(path)
    found = []
    for path, one in zip(whole, inputs, strict=True):
        short = _without_suffix(path, one.kind)
        found.append(short if len(taken[short]) == 1 else path)
    return found


def _names_of(name: str) -> Names:
    if is_url(name):
        protocol, _, path = name.partition("://")
        return (protocol, *filter(None, path.split("/")))
    return tuple(filter(None, without_dots(os.path.join(os.getcwd(), name)).split(os.sep)))


def _without_suffix(path: Names, kind: str) -> Names:
    return (*path[:-1], path[-1][: -len(SUFFIX)]) if kind == TAR else path


def _shortest_tails(paths: set[Names]) -> dict[Names, Names]:
    """The last names of each path, as few as make it differ from all others, and from what begins another."""
    tails = {path: path[-1:] for path in paths}
    longer = set(paths)
    while longer:
        paths_of = defaultdict(list)
        for path, tail in tails.items():
            paths_of[tail].append(path)
        longer = {path for equal in paths_of.values() if len(equal) > 1 for path in equal}
        longer |= {
            path
            for path, tail in tails.items()
            if any(tail[:count] in paths_of for count in range(1, len(tail)))  # `a` and `a/b` would share keys
        }
        longer = {path for path in longer if len(tails[path]) < len(path)}
        for path in longer:
            tails[path] = path[-len(tails[path]) - 1 :]
    return tails
