"""Start Python in a process that this one talks to. Neither the folder it is started in nor Ctrl-C gets in its way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

# The first entry of the path would be the current folder, whose files may have the names of Python's own modules.
# Ctrl-C reaches all processes of a terminal, but the first alone decides what to do, even while another one imports.
START = "import sys; sys.path[:] = {path!r}; import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "


def start_python(
    program: str, descriptors: Sequence[int], environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Run a program, in which `{socket}` is the descriptor of its end of a connection. Returns the other end, too.

    The process gets these descriptors under their numbers. Raises OSError.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            start = START.format(path=[str(one) for one in sys.path])
            process = subprocess.Popen(
                [sys.executable, "-c", start + program.replace("{socket}", str(theirs.fileno()))],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *descriptors),
                env={**os.environ, **environment},
            )
    except BaseException:
        ours.close()
        raise
    return process, Connection(ours.detach())


def wait_or_kill(process: subprocess.Popen[bytes], patience: float) -> int:
    """Wait for a process that is about to end, and return its exit code. One that takes more seconds is killed."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
