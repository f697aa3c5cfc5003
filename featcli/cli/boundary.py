"""Run a command and end in a documented exit code. This is the one place that catches FeatcliError."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import typer

from featcli.cli.commands import app
from featcli.cli.internals import TyperError, error_of_typer
from featcli.cli.suggestions import as_typed, in_our_words, instead_of_command, instead_of_option, unknown_command
from featcli.errors import FeatcliError, MachineError, shown
from featcli.system.faults import RESUMES, is_of_machine
from featcli.system.machine import SLEEPING_THREADS
from featcli.system.threads import exit_process

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141
# `timeout` and some schedulers send a signal to the process and then to its group, so that it comes twice.
ECHO_SECONDS = 0.2


@contextmanager
def _heeding_signals() -> Iterator[list[int]]:
    """Let SIGTERM clean up as Ctrl-C does. A second signal ends at once. The list holds the signals that came."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        time.sleep(ECHO_SECONDS)
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        received.append(number)
        raise KeyboardInterrupt

    heeded = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, stop) for one in heeded}
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. It always ends in SystemExit with a documented code."""
    for name, value in SLEEPING_THREADS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="PIL")  # warnings that matter become failures
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # so do its log messages, which name no file
    with _heeding_signals() as received:
        code = _run(arguments)
        if code == INTERRUPTED:
            what, code = ("terminated", TERMINATED) if signal.SIGTERM in received else ("interrupted", INTERRUPTED)
            hint = "run it again: nothing that was there is lost"
            if "extract" in _given(arguments)[:1]:
                how = "without --overwrite" if "--overwrite" in _given(arguments) else "again"
                hint = f"run the same command {how}: it resumes, and what is safe stays"
            _fail(what, hint, code, arguments)
    exit_process(code)


def _run(arguments: list[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        # Typer then raises usage errors, which are worded here like all others.
        result = command.main(arguments, prog_name="featcli", standalone_mode=False)
        if sys.stdout is not None:  # the parent may have closed it
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except FeatcliError as error:
        return _fail(error.message, error.hint, error.exit_code, arguments)
    except KeyboardInterrupt:  # Typer turns it into an exit code; this one came just before or after that
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
            raise
        _let_go_of_stdout()  # its reader has stopped reading
        return BROKEN_PIPE
    except OSError as error:
        code = _fail(*_explained(error), MachineError.exit_code, arguments)
        _let_go_of_stdout()
        return code
    except Exception as error:
        found = error_of_typer(error)
        if found is None:  # it is a bug, so its traceback is shown
            raise
        return _fail(*_suggested(found, _given(arguments)), found.exit_code, arguments)


def _suggested(error: TyperError, arguments: Sequence[str]) -> tuple[str, str]:
    """Return message and hint of an error of Typer's."""
    if error.option is not None and error.spec is not None:
        option, value = as_typed(error.option, arguments)
        message = f"there is no option {option if option.isprintable() else shown(option)}"
        return message, instead_of_option(option, error.spec, error.command, value)
    typed = unknown_command(error.message)
    if typed is not None:
        return f"there is no command {shown(typed)}", instead_of_command(typed)
    return in_our_words(error.message), f"see '{error.command} --help'"


def _let_go_of_stdout() -> None:
    """Drop output that stdout does not take. Python would try again when it closes stdout, and complain."""
    try:
        if sys.stdout is not None:  # the parent may have closed it
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: OSError) -> tuple[str, str]:
    """Return message and hint for a system error that reached the command line. One that is a bug is raised again."""
    if error.filename is not None:  # a path in a folder of another user, or a name that is too long
        return f"{shown(error.filename)}: {error.strerror}", "check the path and its rights"
    if error.errno == errno.ENOSPC:
        return "the results cannot be written: no space is left", "check where stdout goes"
    if is_of_machine(error):
        return f"a file cannot be read or written: {error.strerror}", f"check the disk or the network share; {RESUMES}"
    raise error


def _fail(message: str, hint: str, code: int, arguments: list[str] | None) -> int:
    print(f"featcli: error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    if "--json" in _given(arguments):
        with suppress(OSError):
            from featcli.cli.terminal import JsonLines

            JsonLines()("error", message=message, hint=hint, exit_code=code)
    return code


def _given(arguments: list[str] | None) -> list[str]:
    return sys.argv[1:] if arguments is None else arguments
