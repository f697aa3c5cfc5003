"""Writes docs/cli.md from `--help`: `make docs`. A test fails while the two differ."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
COMMANDS = ("", "extract", "inspect", "models", "export", "show", "verify", "finalize")


def page() -> str:
    """The page as it should be."""
    parts = ["# The command line\n\nWritten by `make docs` from `featcli --help`.\n"]
    for command in COMMANDS:
        arguments = [sys.executable, "-m", "featcli", *command.split(), "--help"]
        environment = {**os.environ, "COLUMNS": "100"}
        shown = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
        parts.append(f"## {' '.join(['featcli', command]).strip()}\n\n```text\n{shown.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
