"""Read environment variables that belong to the machine: each stands for an option that was left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from featcli.dump.folder import Dump
from featcli.errors import FeatcliError
from featcli.events import Report
from featcli.spec.commands import VerifyCommand
from featcli.spec.groups import DumpSpec, EngineSpec
from featcli.spec.option import Spec, options_of

VARIABLES = {
    "device": "FEATCLI_DEVICE",
    "threads": "FEATCLI_THREADS",
    "decode_threads": "FEATCLI_DECODE_THREADS",
    "ray_address": "FEATCLI_RAY_ADDRESS",
}
S = TypeVar("S", bound=Spec)


@contextmanager
def with_variables(asked: S, environment: Mapping[str, str] = os.environ) -> Iterator[S]:
    """Yield the spec with variables for options that were not typed and have a use.

    Threads can change the last bits of a map, so a dump that is resumed keeps its own. Raises UsageError for a value
    that the option does not take. An error inside the block names the variable instead of the option.
    """
    used: dict[str, str] = {}  # option as messages call it -> variable
    typed = asked.typed
    with _named(used):
        for option in options_of(type(asked)):
            text = environment.get(VARIABLES.get(option.name, ""), "")
            is_given = option.name in typed or asked.is_given(option.name)
            if text and not is_given and _has_use(asked, option.name, text):
                used[option.called] = VARIABLES[option.name]
                value: Any = option.option.parse(option.called, text) if option.option.parse else text
                asked = replace(asked, **{option.name: value})  # type: ignore[type-var]
        yield asked


def naming_variables(asked: Spec, chosen: Spec, report: Report) -> Report:
    """Return a report that names the variable as the reason of its value. `chosen` has the value, `asked` has not."""
    used = {
        name: variable
        for name, variable in VARIABLES.items()
        if getattr(asked, name, None) != getattr(chosen, name, None)
    }

    def named(kind: str, **facts: Any) -> None:
        variable = used.get(facts["name"]) if kind == "choice" else None
        if variable is not None:
            facts["reason"] = facts["reason"].replace("as asked", f"as {variable} says", 1)
        report(kind, **facts)

    return named


def _has_use(asked: Spec, name: str, text: str) -> bool:
    is_of_ray = isinstance(asked, EngineSpec) and asked.engine == "ray"
    if name == "ray_address":
        return is_of_ray
    if name == "device":  # workers of Ray take no list of devices
        several = "," in text or text == "cuda:all"
        return not (is_of_ray and several) and (not isinstance(asked, VerifyCommand) or bool(asked.recompute))
    if name == "threads" and isinstance(asked, DumpSpec) and not asked.overwrite:
        return Dump.existing(Path(asked.output)) is None
    return True


@contextmanager
def _named(used: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except FeatcliError as error:
        option, space, rest = error.message.partition(" ")
        if not (space and option in used):
            raise
        hint = error.hint.replace("leave it out", "unset it")
        raise type(error)(f"{used[option]} {rest}", hint) from error
