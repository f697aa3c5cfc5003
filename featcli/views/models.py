"""List timm's architectures and transformers' model types, with what a sweep found of each, for `featcli models`.

The facts are in models.csv. `make sweep` writes it by building every model; nothing is built here.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from featcli.backbones.model_names import containing
from featcli.errors import UsageError, counted, did_you_mean, nearest, shown
from featcli.spec.words import VectorName

FACTS = "models.csv"
# Types of AutoBackbone that no sweep has built: one needs natten, the other is a backbone and a text model in one.
NOT_SWEPT = ("dinat", "tipsv2")
UNKNOWN: dict[str, Any] = dict.fromkeys(("parameters", "input", "strides", "stages", "stage_names", "vectors"))


def list_models(pattern: str | None = None, vector: VectorName | None = None) -> list[dict[str, Any]]:
    """Return the models whose name matches, timm's first. A pattern without `*`, `?` or `[` matches any part of a name.

    If no name contains the pattern, names that contain its parts match, the shortest first, as for `vit_b_16` or
    `ViT-L/14`.

    Each model has its name, library, parameters (without a head), input (C, H, W), stages (a range as --out-features
    takes it), stage_names (a list), strides, vectors that it makes of a picture, and tags of its trained weights, as
    far as they are known. With `vector`, models that make no such vector are left out. Raises UsageError if none is
    left.
    """
    models = list(_models())
    wanted, by_name = pattern or "", {str(model["name"]): model for model in models}
    if "." in wanted and not any(wanted in name for name in by_name):
        wanted = wanted.partition(".")[0]  # a name with its tag
    glob = wanted if any(char in wanted for char in "*?[") else f"*{wanted}*"
    found = [model for name, model in by_name.items() if fnmatchcase(name.lower(), glob.lower())]
    found = found or [by_name[name] for name in containing(wanted, by_name)]
    if not found:
        hint = did_you_mean(nearest(wanted, by_name), "try a part of its name, such as resnet or *dino*")
        raise UsageError(f"no model has {shown(wanted)} in its name", hint)
    if vector is None:
        return found
    making = [model for model in found if vector in (model["vectors"] or ())]
    if not making:
        raise UsageError(
            f"none of {counted(len(found), 'model')} with {shown(wanted)} in the name makes a vector {vector}",
            f"leave --with out, or list all that make one: featcli models --with {vector}",
        )
    return making


def _models() -> Iterator[dict[str, Any]]:
    facts = read_facts()
    if importlib.metadata.version("timm") != facts["timm"]["version"]:
        yield from _installed(facts["timm"]["models"])
    else:  # this release was swept, so its names are known, and timm takes seconds to import
        yield from facts["timm"]["models"].values()
    others = [{"name": name, "library": "transformers", **UNKNOWN, "tags": []} for name in NOT_SWEPT]
    yield from sorted([*others, *facts["transformers"]["models"].values()], key=lambda model: str(model["name"]))


def _installed(known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the models of a timm release that was not swept, with facts if they are known."""
    from featcli.backbones.torchvision_operators import declare_missing_operators

    declare_missing_operators()
    import timm

    for name in timm.list_models():
        yield known.get(name, {"name": name, "library": "timm", **UNKNOWN, "tags": []})


@cache
def read_facts() -> dict[str, Any]:
    """Return models.csv: for each library, its version and its models by name."""
    facts: dict[str, Any] = {}
    text = resources.files("featcli.views").joinpath(FACTS).read_text("utf-8")
    for row in csv.DictReader(io.StringIO(text)):
        if row["name"] == "":
            facts[row["library"]] = {"version": row["tags"], "models": {}}
            continue
        facts[row["library"]]["models"][row["name"]] = {
            "name": row["name"],
            "library": row["library"],
            "parameters": int(row["parameters"]),
            "input": [int(edge) for edge in row["input"].split("x")],
            "stages": row["stages"],
            "stage_names": _stage_names(row["stages"], len(row["strides"].split())),
            "strides": [int(stride) for stride in row["strides"].split()],
            "vectors": row["vectors"].split(),
            "tags": row["tags"].split(),
        }
    return facts


def _stage_names(first_to_last: str, count: int) -> list[str]:
    """Return the names of `count` stages that are given by their first and last, such as `stem:stage4`."""
    last = int(first_to_last.rpartition("stage")[2])
    return [*["stem0", "stem"][2 - (count - last) :], *(f"stage{number}" for number in range(1, last + 1))]
