"""Write the tables of options into the pages of the commands, and those of exit codes into others: `make docs`.

A test fails while they differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from featcli.cli.signature import in_order_of_help
from featcli.errors import EXIT_CODES, ExitCode
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
TABLE = re.compile(r"(<!-- \w[\w ]*: written by make docs -->\n).*?(<!-- end of \w[\w ]* -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return every page with a table, as it should be."""
    tables = {name: _table(in_order_of_help(spec)) for name, spec in SPECS.items()}
    tables |= {"troubleshooting": _what_to_do(), "pipelines": _another_try(), "scale": _another_try()}
    found = {}
    for name, table in tables.items():
        page = DOCS / f"{name}.md"
        text, count = TABLE.subn(lambda match, table=table: match[1] + table + match[2], page.read_text())
        assert count == 1, f"{page} has {count} places for a table"
        found[page] = text
    return found


def _table(options: Sequence[OptionField]) -> str:
    """Return a table of arguments, then options: name, what it is for, default."""
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


def _what_to_do() -> str:
    """Return the exit codes for people."""
    lines = ["| exit code | means | what to do |", "|---|---|---|"]
    lines += [f"| {_codes(code)} | {_code_words(code.means)} | {code.to_do} |" for code in EXIT_CODES]
    return "\n".join(lines) + "\n"


def _another_try() -> str:
    """Return the exit codes for programs that run featcli."""
    lines = ["| exit code | means | another try |", "|---|---|---|"]
    lines += [f"| {_codes(code)} | {_code_words(code.means)} | {code.again} |" for code in EXIT_CODES]
    return "\n".join(lines) + "\n"


def _codes(code: ExitCode) -> str:
    return ", ".join(map(str, code.codes))


def _code_words(text: str) -> str:
    """Return the text with its options as code."""
    return re.sub(r"--[\w-]+", r"`\g<0>`", text)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
