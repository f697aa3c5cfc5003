"""Suggest what to type instead of an option or command that does not exist: a word of another program, or a typo."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from pathlib import Path

from featcli.errors import UsageError, did_you_mean, nearest, shown
from featcli.spec.groups import CheckpointSpec, DumpSpec, InputSpec
from featcli.spec.option import OptionField, Spec, options_of

# Names that other programs have for a command.
COMMANDS = {
    "models": ("list", "ls", "list-models", "search", "find"),
    "inspect": ("info", "stages", "layers", "describe", "summary", "status"),
    "extract": ("run", "dump", "features", "embed", "encode", "resume", "predict"),
    "verify": ("check", "validate", "test"),
    "export": ("convert", "save", "write"),
    "show": ("plot", "view", "draw", "visualize", "visualise", "display"),
    "finalize": ("finalise", "finish", "merge", "join"),
}
# Options of other programs for what featcli does anyway, in commands of these kinds.
NOT_NEEDED: dict[tuple[str, ...], tuple[type[Spec], str]] = {
    ("--resume", "--continue", "--skip-existing"): (
        DumpSpec,
        "leave it out: the same command resumes what is there",
    ),
    ("--recursive", "-r", "-R"): (InputSpec, "leave it out: folders are searched with all that is below them"),
    ("--pretrained",): (CheckpointSpec, "leave it out: weights are trained ones unless --random-init is given"),
    ("--no-grad", "--eval", "--frozen"): (CheckpointSpec, "leave it out: networks are frozen"),
    ("--progress", "--tqdm"): (DumpSpec, "leave it out: a terminal has a bar, a log a line a minute"),
    ("--label", "--label-column", "--label-col", "--target", "--target-column", "--split", "--split-column"): (
        DumpSpec,
        "leave it out: all columns of a --table go into the dump, and one is chosen when the dump is read",
    ),
    ("--help-all", "-help", "-?"): (Spec, "type --help, which lists all options"),
}
NO_COMMAND = re.compile(r"""No such command ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\.""")  # the name as Python quotes it
GLUED = re.compile(r"-[A-Za-z][A-Za-z_-]+")  # one dash and several letters: a long option, or short ones together
ALIKE = 0.7  # similarity of two words, by difflib: that of tiems and times is 0.8


def as_typed(option: str, arguments: Sequence[str]) -> tuple[str, str]:
    """Return an option that a command does not have, as it was typed among its arguments, and the text that follows it.

    click takes `-weird` for `-w` and others, and names the first of these that is not there.
    """
    names = [argument.partition("=")[0] for argument in arguments]
    glued = (name for name in names if GLUED.fullmatch(name) and option[1:] in name)
    found = option if option in names else next(glued, None) if len(option) == 2 else None
    if found is None:
        return option, ""
    after = [*arguments, ""][names.index(found) :]
    return found, after[0].partition("=")[2] or after[1]


def instead_of_option(typed: str, spec: type[Spec], command: str, value: str = "") -> str:
    """Return a hint for an option that a command does not have. `value` is the text that was typed after it."""
    options = options_of(spec)
    for words, (kind, hint) in NOT_NEEDED.items():
        if typed in words and issubclass(spec, kind):
            return hint
    meant = [one for one in options if typed in one.option.known_as]
    value = "" if re.match(r"-\D", value) else value  # it is the next option
    meant = [one for one in meant if value and _takes(one, value)][:1] or meant
    argument = next((one for one in meant if one.option.is_argument), None)
    if argument is not None:
        return f"give {argument.named} by itself, without an option in front of it"
    flags = {flag.lstrip("-"): flag for flag in _long_flags(options)}  # all flags have dashes, which must not count
    names = [_written(one) for one in meant] or [flags[one] for one in nearest(typed.lstrip("-"), flags, cutoff=ALIKE)]
    return did_you_mean(names, f"see '{command} --help'")


def instead_of_command(typed: str) -> str:
    """Return a hint for a command that does not exist."""
    meant = [name for name, words in COMMANDS.items() if typed.lower() in (name, *words)]
    if not meant and ("://" in typed or os.path.exists(typed)):
        return f"a command comes first: {_command_for(typed)}"
    names = meant or nearest(typed, COMMANDS, cutoff=ALIKE)
    return did_you_mean([f"featcli {name}" for name in names], "see 'featcli --help'")


def _command_for(path: str) -> str:
    from featcli.dump.folder import PLAN

    is_dump = os.path.exists(Path(path) / PLAN)
    return f"featcli inspect {shown(path)}" if is_dump else f"featcli extract {shown(path)} -c CHECKPOINT -o DUMP"


def unknown_command(message: str) -> str | None:
    """Return the command that does not exist by a message of Typer; None for any other message."""
    found = NO_COMMAND.match(message)
    return None if found is None else str(ast.literal_eval(found[1]))


def _takes(option: OptionField, value: str) -> bool:
    try:
        option.kept(value)
    except UsageError:
        return False
    return True


def in_our_words(message: str) -> str:
    """Return a message of Typer as other errors are written: it begins in lower case, has a verb and no full stop."""
    if missing := re.fullmatch(r"Missing (?:option|argument) (.+)\.", message):
        return f"{missing[1].replace(chr(39), '').replace(' / ', '/')} is missing"
    if more := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        return f"there is no place for {shown(more[1])} in this command"
    return message[:1].lower() + message[1:].removesuffix(".")


def _written(option: OptionField) -> str:
    return "/".join(option.flags)


def _long_flags(options: Sequence[OptionField]) -> list[str]:
    flags = (flag for one in options if not one.option.is_argument for text in one.flags for flag in text.split("/"))
    return [flag for flag in flags if flag.startswith("--")]
