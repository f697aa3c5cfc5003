"""featcli for the shells of the tests, forked from a process that has imported torch and timm already.

Importing takes three of the four seconds of a short command. `python forked_featcli.py SOCKET FOLDER` puts a `featcli`
into the folder, says "ready" and serves until its stdin ends.
"""

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
socket.send_fds(server, [asked.encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 1))
"""


def serve(path: str, folder: str) -> None:
    from featcli.backbones import from_timm  # noqa: F401
    from featcli.extraction import extract  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    client = Path(folder, "featcli")
    client.write_text(CLIENT.format(python=sys.executable, socket=path))
    client.chmod(0o755)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forked ones
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        asking = listener.accept()[0]
        if not os.fork():
            answer(asking)
        asking.close()


def answer(asking: socket.socket) -> None:
    """Be that command, in this process, and say what it ended with."""
    from featcli.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, descriptors, *_ = socket.recv_fds(asking, 1 << 20, 3)
    arguments, folder, environment = json.loads(said)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        asking.send(str(code).encode())
        os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
