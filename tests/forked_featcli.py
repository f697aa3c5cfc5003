"""Fork featcli for the tests from a process that has already imported torch and timm.

Imports take three of the four seconds of a short command. `python forked_featcli.py SOCKET FOLDER` puts a `featcli`
into the folder, says "ready", and serves until its stdin ends. That `featcli` ends as the forked process does, also by
the same signal. It writes the number of the forked process to the descriptor in FEATCLI_TELLS, if that is set.
"""

import atexit
import json
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
tells = os.environ.pop("FEATCLI_TELLS", None)
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
socket.send_fds(server, [asked.encode()], [0, 1, 2])
answers = server.makefile()
number = next(answers)
if tells:
    os.write(int(tells), number.encode())
status = int(next(answers))
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def serve(path: str, folder: str) -> None:
    from featcli.backbones import timm_model  # noqa: F401
    from featcli.extraction.extract import extract  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    client = Path(folder, "featcli")
    client.write_text(CLIENT.format(python=sys.executable, socket=path))
    client.chmod(0o755)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that watch the forked ones
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        asking = listener.accept()[0]
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            forked = os.fork()
            if not forked:
                become(asking)
            for number in (0, 1):  # the server has ended when nobody holds these any more
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            asking.send(f"{forked}\n".encode())
            asking.send(f"{os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])}\n".encode())
            os._exit(0)
        asking.close()


def become(asking: socket.socket) -> None:
    """Become that command in this process, with a session of its own."""
    from featcli.cli.boundary import main

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    said, descriptors, *_ = socket.recv_fds(asking, 1 << 20, 3)
    asking.close()
    arguments, folder, environment = json.loads(said)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        main(arguments)
    except SystemExit as ended:
        sys.stdout.flush()
        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(ended.code or 0)  # to free torch takes as long as to import it


if __name__ == "__main__":
    serve(*sys.argv[1:])
