"""Hold what featcli uses of Typer although nobody promises it: the one place to mend when a later Typer changes it.

The click that is inside Typer has `TyperCommand.format_options`, `parse_args`, `make_parser`, `get_params`,
`get_help_record` and `param_type_name`, `HelpFormatter.section` and `write_dl`, `Context.get_parameter_source`, and the
options of its parser. tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand

from featcli.errors import UsageError, shown
from featcli.spec.option import Spec


class GroupedCommand(TyperCommand):
    """A command whose help has a heading for each group of options.

    It does without Rich, which takes longer than all else.

    An option that is given twice with different values is refused, because click would keep the last.
    """

    headings: Mapping[str, str] = {}  # name of the parameter -> heading; all others stand under Options
    spec: type[Spec] | None = None  # the spec that it was made from

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options by group. Groups stand in the order of their first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            is_argument = parameter.param_type_name == "argument"
            heading = "Arguments" if is_argument else self.headings.get(str(parameter.name), "Options")
            if record is not None:
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Tell errors of click's parser their command, which some of them do not know."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def make_parser(self, ctx: Any) -> Any:
        """Make click's parser, and let each of its options know which value it was given before."""
        parser = super().make_parser(ctx)
        given: dict[str, tuple[str, Any]] = {}
        options: dict[int, Any] = {id(one): one for one in (*parser._long_opt.values(), *parser._short_opt.values())}
        for option in () if ctx.resilient_parsing else options.values():  # a shell completes an unfinished line
            option.process = partial(_process_once, option, option.process, given)
        return parser


def _process_once(
    option: Any, process: Callable[[Any, Any], None], given: dict[str, tuple[str, Any]], text: Any, state: Any
) -> None:
    """Take the text of an option, unless another was given before. Raises UsageError.

    `given` holds for each parameter the option and the text that came first. A switch such as --fold/--no-fold is two
    options of one parameter, each with a constant.
    """
    if option.action in ("store", "store_const"):  # other options collect what they are given
        name, value = (option._long_opts or option._short_opts)[-1], option.const if text is None else text
        before, first = given.setdefault(option.dest, (name, value))
        if before != name:
            raise UsageError(f"{before} and {name} exclude each other", "give one of the two")
        if first != value:
            raise UsageError(f"{name} is given twice: {shown(first)} and {shown(value)}", "give it once")
    process(text, state)


def typed_in(context: typer.Context) -> frozenset[str]:
    """Return the parameters that the command line names, even if it gives them their default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


class TyperError(NamedTuple):
    """An error of Typer's own."""

    message: str
    command: str  # as it was typed, such as `featcli extract`
    spec: type[Spec] | None  # of that command; None if there is no command yet
    exit_code: int
    option: str | None  # an option that the command does not have


def error_of_typer(error: Exception) -> TyperError | None:
    """Return what an error of Typer's own says; None for any other, which is a bug.

    Typer's errors are those of the click that is inside it, and have no type that can be imported.
    """
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "featcli"
    spec = getattr(context.command, "spec", None) if context is not None else None
    option = str(getattr(error, "option_name", "")) if hasattr(error, "possibilities") else None
    message = error.format_message() if option is None else f"there is no option {option}"
    return TyperError(message, path, spec, getattr(error, "exit_code", 2), option)
