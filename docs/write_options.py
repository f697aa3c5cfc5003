"""Writes the tables of options into the pages of the commands: `make docs`. A test fails while they differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from featcli.cli.boundary import app

DOCS = Path(__file__).parent
COMMANDS = ("extract", "inspect", "models", "export", "show", "verify", "finalize")
TABLE = re.compile(r"(<!-- options: written by make docs -->\n).*?(<!-- end of options -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Every page with a table, as it should be."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {}
    for name in COMMANDS:
        page = DOCS / f"{name}.md"
        found[page] = TABLE.sub(lambda match, name=name: match[1] + _table(commands[name]) + match[2], page.read_text())
    return found


def _table(command: Any) -> str:
    """Arguments, then options: name, what it is for, default."""
    lines = ["| argument or option | |", "|---|---|"]
    parameters = [parameter for parameter in command.params if parameter.name != "help"]
    for parameter in sorted(parameters, key=lambda parameter: parameter.opts[0].startswith("-")):
        is_option = parameter.opts[0].startswith("-")
        names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.metavar or parameter.name]
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {shown} | {_text(parameter)} |")
    return "\n".join(lines) + "\n"


def _text(parameter: Any) -> str:
    text = (parameter.help or "").replace("|", "\\|")
    if parameter.required and parameter.opts[0].startswith("-"):
        return f"{text} **Must be given.**"
    if parameter.default is None or parameter.default is False or not str(parameter.default) or "efault" in text:
        return text
    return f"{text} Default: `{parameter.default}`."


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
