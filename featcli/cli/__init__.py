"""The command line: words typed in a shell come in; calls of the packages below, text and exit codes go out."""

from featcli.cli.boundary import main

__all__ = ["main"]
