"""What of Typer is used though it is not promised: the one place to mend when a later Typer changes it.

`TyperCommand.format_options`, `get_params`, `get_help_record` and `param_type_name` come from the click that Typer has
in it; `HelpFormatter.section` and `write_dl` likewise. tests/test_internals.py says what breaks without each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command whose help has a heading for each group of options, without Rich, which takes longer than all else."""

    headings: Mapping[str, str] = {}  # name of the parameter -> heading; what has none stands under Options

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options by group, in the order in which groups first occur."""
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


def error_of_typer(error: Exception) -> tuple[str, str, int] | None:
    """(message, command, exit code) of an error of Typer's own; None for any other, which is a bug.

    Typer's errors are those of the click that it has in it, and have no type that can be imported.
    """
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "featcli"
    return error.format_message(), command, getattr(error, "exit_code", 2)
