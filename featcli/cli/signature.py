"""Make commands from specs: every option of a spec becomes one of the command, with its help and its default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from featcli.cli.internals import GroupedCommand, typed_in
from featcli.spec.groups import GROUPS
from featcli.spec.option import OptionField, Spec, options_of
from featcli.spec.parsers import parse_number

S = TypeVar("S", bound=Spec)
FEW = 10  # a command with fewer options needs no headings
CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def command_of(app: typer.Typer, spec: type[S], **more: Any) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
    """Add a function of one spec to the command line, under its own name. Its docstring is the help of the command.

    `more` goes to `typer.Typer.command`.
    """

    def decorate(function: Callable[[S], None]) -> Callable[[S], None]:
        options = in_order_of_help(spec)

        def command(context: typer.Context, **values: Any) -> None:
            asked = spec(**{option.name: _value(option, values[option.name]) for option in options})
            object.__setattr__(asked, "typed", typed_in(context))
            function(asked)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature([CONTEXT, *map(_parameter, options)])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        app.command(cls=type("Command", (GroupedCommand,), {"headings": headings_of(spec), "spec": spec}), **more)(
            command
        )
        return function

    return decorate


def in_order_of_help(spec: type[Spec]) -> list[OptionField]:
    """Return the options of a spec in the order of its help: arguments, then the others, by group if there are many."""
    options, headings = options_of(spec), headings_of(spec)
    arguments = sorted((one for one in options if one.option.is_argument), key=lambda one: not one.is_required)
    others = [one for one in options if not one.option.is_argument]
    if headings:
        others.sort(key=lambda one: GROUPS.index(headings[one.name]))
    return arguments + others


def headings_of(spec: type[Spec]) -> dict[str, str]:
    """Return the heading of each option in the help, by name; none if there are few options."""
    headings = {one.name: one.option.group for one in options_of(spec) if not one.option.is_argument}
    return headings if len(headings) > FEW else {}


def _parameter(option: OptionField) -> inspect.Parameter:
    """Return the option as a parameter of a function, from which Typer makes commands."""
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=_info(option), annotation=_type(option)
    )


def _type(option: OptionField) -> Any:
    """Return what Typer turns the text of a shell into: bool if nothing else is possible, else text."""
    if option.is_repeated:
        return list[str] | None
    plain = bool if option.kinds - {type(None)} == {bool} else str
    return plain | None if option.default is None else plain


def _number(option: OptionField) -> type[int] | type[float] | None:
    """Return the type of the numbers that an option takes, or None if it takes anything else, too."""
    kinds = option.kinds - {type(None)}
    return next((kind for kind in (int, float) if kinds == {kind}), None)


def _default(option: OptionField) -> Any:
    if option.is_required:
        return ...
    if option.is_repeated:
        return None
    is_written = option.default is not None and (option.option.parse is not None or _number(option) is not None)
    return str(option.default) if is_written else option.default


def _info(option: OptionField) -> Any:
    one, number = option.option, _number(option)
    if one.is_argument:
        return typer.Argument(_default(option), metavar=one.metavar, help=one.help, autocompletion=_completion(option))
    return typer.Option(
        _default(option),
        *option.flags,
        help=one.help,
        metavar=one.metavar or (f"<{number.__name__}>" if number else None),
        autocompletion=_completion(option),
    )


def _completion(option: OptionField) -> Callable[[str], list[str]] | None:
    """Return a function that completes what was typed with words or names of models, or None."""
    if option.option.is_model:
        return _model_names
    words = option.words or option.option.offers
    return (lambda incomplete: [word for word in words if word.startswith(incomplete)]) if words else None


def _model_names(incomplete: str) -> list[str]:
    """Return the names of models that begin so, or those of a model with its tags. The shell completes local paths."""
    from featcli.views.models import read_facts  # reads the list of a sweep, because timm takes seconds to import

    models, (model, dot, _) = read_facts()["timm"]["models"], incomplete.partition(".")
    names = [f"{model}.{tag}" for tag in models.get(model, {"tags": ()})["tags"]] if dot else models
    return [name for name in names if name.startswith(incomplete)]


def _value(option: OptionField, given: Any) -> Any:
    """Return the value of the field for what the shell gave."""
    if given is None:
        return () if option.is_repeated else None
    if option.option.parse is not None:
        return option.option.parse(option.called, given)
    number = _number(option)
    return given if number is None else parse_number(option.called, given, number)
