"""Writes the tables of options into the pages of the commands: `make docs`. A test fails while they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from featcli.cli.signature import in_order_of_help
from featcli.spec import commands
from featcli.spec.option import OptionField, Spec

DOCS = Path(__file__).parent
SPECS: dict[str, type[Spec]] = {
    "extract": commands.ExtractCommand,
    "inspect": commands.InspectCommand,
    "models": commands.ModelsCommand,
    "export": commands.ExportCommand,
    "show": commands.ShowCommand,
    "verify": commands.VerifyCommand,
    "finalize": commands.FinalizeCommand,
}
TABLE = re.compile(r"(<!-- options: written by make docs -->\n).*?(<!-- end of options -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Every page with a table, as it should be."""
    found = {}
    for name, spec in SPECS.items():
        page = DOCS / f"{name}.md"
        table = _table(in_order_of_help(spec))
        found[page] = TABLE.sub(lambda match, table=table: match[1] + table + match[2], page.read_text())
    return found


def _table(options: Sequence[OptionField]) -> str:
    """Arguments, then options: name, what it is for, default."""
    lines = ["| argument or option | |", "|---|---|"]
    for option in options:
        names = (
            [option.option.metavar]
            if option.option.is_argument
            else [f for one in option.flags for f in one.split("/")]
        )
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {shown} | {_text(option)} |")
    return "\n".join(lines) + "\n"


def _text(option: OptionField) -> str:
    text, default = option.option.help.replace("|", "\\|"), option.default
    if option.is_required and not option.option.is_argument:
        return f"{text} **Must be given.**"
    if option.is_required or default is False or default in (None, "", ()) or "efault" in text:
        return text
    return f"{text} Default: `{default}`."


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
