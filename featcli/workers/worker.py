"""A worker process: loads the backbone once, then makes the shards that it is given over a connection.

Messages to the driver are pairs of a kind and its content: "event" (kind, facts), "more" (while shards are at work),
"idle" (when none is), "tally", "error" (a FeatcliError), "crash" (a text).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from featcli.dump.folder import Dump, no_dump
from featcli.dump.plan import refuse_other_plan
from featcli.errors import FeatcliError, one_line, shown
from featcli.events import Report
from featcli.run.loading import load
from featcli.run.pipeline import Shard, ShardRunner
from featcli.spec.commands import ExtractSpec

UNHEARD = ("choice", "start", "end")  # the driver says those


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is told when it starts."""

    config: ExtractSpec  # for its one device
    path: str  # of the dump
    again: frozenset[int]  # committed shards that are to be made again
    resized: Mapping[int, int]  # row -> bytes, of images that are not as they were listed


def runner_for(task: WorkerSpec, report: Report) -> tuple[Dump, ShardRunner]:
    """The dump, and what makes its shards. Raises ConflictError unless that comes to the same plan here."""
    warnings.filterwarnings("ignore", module="PIL")  # as the command line does
    dump = Dump.existing(Path(task.path))
    if dump is None:
        raise no_dump(task.path)
    loaded = load(task.config, dump.plan)
    refuse_other_plan(shown(task.path), dump.plan, loaded.plan)
    dump.again, dump.resized, dump.environment = task.again, dict(task.resized), loaded.plan.environment
    runner = ShardRunner(loaded, report)
    runner.compile()
    return dump, runner


def main(descriptor: int, lock: int) -> None:
    """Serve the driver at the other end of a socket until it has no more to do. `lock`: held on the dump with it."""
    for one in (descriptor, lock):
        os.set_inheritable(one, False)  # whatever a compiler starts does not outlive this process for the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal: the driver decides
    signal.signal(signal.SIGTERM, _stop)
    with suppress(OSError):  # where there is no stderr
        os.dup2(2, 1)  # stdout carries results alone
    try:
        with Connection(descriptor) as driver:
            _serve(driver)
    except (BrokenPipeError, ConnectionResetError, EOFError, KeyboardInterrupt):
        sys.exit(1)  # the driver is gone, or has had enough
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to tidy up


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # tidying up is not to be stopped in its turn
    raise KeyboardInterrupt


def _serve(driver: Connection) -> None:
    one_at_a_time = threading.Lock()  # events come from the main and the writer thread

    def tell(kind: str, content: Any = None) -> None:
        with one_at_a_time:
            driver.send((kind, content))

    def report(kind: str, **facts: Any) -> None:
        if kind not in UNHEARD:
            tell("event", (kind, facts))

    try:
        dump, runner = runner_for(driver.recv(), report)
        while True:
            tell("idle")
            first = driver.recv()
            if first is None:
                return
            runner.run(dump, _asked(first, tell, driver), partial(tell, "tally"))
    except FeatcliError as error:
        tell("error", error)
    except (OSError, EOFError):  # of the connection: those of disks and images are FeatcliErrors by now
        raise
    except Exception as error:  # a bug, or a device that broke: said here in full, and what can be is tried again
        traceback.print_exc()
        tell("crash", f"{type(error).__name__}: {one_line(error)}")
        sys.exit(1)


def _asked(first: Shard, tell: Any, driver: Connection) -> Iterator[Shard]:
    shard = first
    while shard is not None:
        yield shard
        tell("more")
        shard = driver.recv()
