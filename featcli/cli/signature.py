"""Commands made from specs: every option of a spec becomes one of the command, with its help and its default."""

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
FEW = 10  # options that need no headings
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
    """The options of a spec as its help has them: arguments, then the others, by group where they are many."""
    options, headings = options_of(spec), headings_of(spec)
    arguments = sorted((one for one in options if one.option.is_argument), key=lambda one: not one.is_required)
    others = [one for one in options if not one.option.is_argument]
    if headings:
        others.sort(key=lambda one: GROUPS.index(headings[one.name]))
    return arguments + others


def headings_of(spec: type[Spec]) -> dict[str, str]:
    """The name of each option -> its heading in the help; none where the options are few."""
    headings = {one.name: one.option.group for one in options_of(spec) if not one.option.is_argument}
    return headings if len(headings) > FEW else {}


def _parameter(option: OptionField) -> inspect.Parameter:
    """The option as a parameter of a function, which is what Typer makes commands from."""
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=_info(option), annotation=_type(option)
    )


def _type(option: OptionField) -> Any:
    """What Typer turns the text of a shell into: bool where nothing else can be given, else text."""
    if option.is_repeated:
        return list[str] | None
    plain = bool if option.kinds - {type(None)} == {bool} else str
    return plain | None if option.default is None else plain


def _number(option: OptionField) -> type[int] | type[float] | None:
    """The type of the numbers that an option takes, None where it takes something else as well."""
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
    """What a shell offers for what was begun: words, or names of models."""
    if option.option.is_model:
        return _model_names
    words = option.words or option.option.offers
    return (lambda incomplete: [word for word in words if word.startswith(incomplete)]) if words else None


def _model_names(incomplete: str) -> list[str]:
    """The names of models that begin so, or those of a model with its tags. Local paths are the shell's to complete."""
    from featcli.views.models import read_facts  # the list of a sweep: timm takes seconds to import

    models, (model, dot, _) = read_facts()["timm"]["models"], incomplete.partition(".")
    names = [f"{model}.{tag}" for tag in models.get(model, {"tags": ()})["tags"]] if dot else models
    return [name for name in names if name.startswith(incomplete)]


def _value(option: OptionField, given: Any) -> Any:
    """What the shell gave as the value of the field."""
    if given is None:
        return () if option.is_repeated else None
    if option.option.parse is not None:
        return option.option.parse(option.called, given)
    number = _number(option)
    return given if number is None else parse_number(option.called, given, number)
