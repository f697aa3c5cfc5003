"""Choose what leads the keys of several inputs: their last names as given, or longer tails if two are equal.

A link has its own name, not that of its target.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from featcli.inputs.archives import SUFFIX
from featcli.inputs.image_list import is_url, without_dots

FOLDER, TAR, FILE = "folder", "tar", "file"  # kinds of inputs, by their names in plans

Names = tuple[str, ...]  # the names in a path, from the root on


class Input(NamedTuple):
    """An input, by name and kind."""

    name: str
    kind: str


def leads_of(inputs: Sequence[Input]) -> list[str]:
    """Return what leads the keys of each of several inputs: nothing, or names with a slash after each.

    For an image it is what its own name follows: nothing, unless another image has the same name.
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
    """Return whether all names are of one input, however it was written."""
    return len({_names_of(name) for name in names}) == 1


def older_lead(one: Input) -> str:
    """Return the lead of an input in older plans, which do not name it: its last name, for a link the target's."""
    if one.kind == FILE:
        return ""
    if is_url(one.name):
        last = one.name.rstrip("/").rpartition("/")[2]
        return (last[: -len(SUFFIX)] if one.kind == TAR else last) + "/"
    return (Path(one.name).stem if one.kind == TAR else Path(one.name).resolve().name) + "/"


def _paths(inputs: Iterable[Input]) -> list[Names]:
    """Return the path of each input. A tar loses its suffix, unless it would then have the path of another input."""
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
    """Return the last names of each path: as few as make it differ from all others and from their beginnings."""
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
            if any(tail[:count] in paths_of for count in range(1, len(tail)))  # `a` and `a/b` could have equal keys
        }
        longer = {path for path in longer if len(tails[path]) < len(path)}
        for path in longer:
            tails[path] = path[-len(tails[path]) - 1 :]
    return tails
