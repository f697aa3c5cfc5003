"""Decode in processes of their own: the threads of one interpreter wait for its lock if there are many of them.

Each process gets a part of every batch, decodes it by threads into memory that it shares with this one, and says what
became of each image. A thread of this process copies the pixels into the batch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from mmap import mmap
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from featcli.errors import FeatcliError, MachineError
from featcli.pixels.decoder import Decoder, Outcome, Outcomes
from featcli.pixels.internals import pillow_set_up
from featcli.system.faults import RESUMES, how_it_ended
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    import numpy as np

    from featcli.inputs.image_list import Image

CAN_SHARE = hasattr(os, "memfd_create")  # files in memory that need no mount, such as /dev/shm, which may be small
# Ctrl-C reaches all processes of a terminal, but the first alone decides what to do.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import sys; sys.path[:] = {path!r}; "
    "from featcli.pixels.decode_processes import serve; serve({socket})"
)
# The GPU is for the backbone, and torch, where it resizes, starts no threads of its own.
LESS = f"free some memory, or use --decode-processes 0; {RESUMES}"
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Part:
    """Memory for a part of a batch, which two processes share."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap | None = None

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array in this memory, which grows if it is too small for it."""
        import numpy as np

        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._map is None or len(self._map) < size:
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, size)
            self._map = mmap(self.descriptor, size)
        return np.frombuffer(self._map, dtype, count=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Order:
    """A part of a batch that a process is to decode."""

    part: int  # the number of its memory
    shape: tuple[int, ...]  # of all its images
    images: Sequence[Image]
    rows: range


@dataclass(eq=False)
class _Process:
    """A process that decodes, and what was asked of it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    parts: list[Part]
    free: deque[int]  # numbers of parts that nobody uses
    asked: deque[tuple[Order, np.ndarray, Future[list[Outcome]]]] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)
    has_ended: bool = False
    receiver: threading.Thread = field(init=False)


class DecodeProcesses:
    """Processes that decode parts of batches. At most `ahead` batches may be asked for and not be ready."""

    def __init__(self, decoder: Decoder, ahead: int) -> None:
        self._dtype = decoder.preprocessing.dtype
        each = replace(decoder, processes=0, threads=-(-decoder.threads // decoder.processes))
        self._processes: list[_Process] = []
        self._turn = 0
        try:
            for _ in range(decoder.processes):
                one = _started(each, ahead)
                one.receiver = threading.Thread(target=self._receive, args=(one,), name="decoded", daemon=True)
                one.receiver.start()
                self._processes.append(one)
        except BaseException:
            self.__exit__()
            raise

    def fill(self, images: Sequence[Image], rows: range, out: np.ndarray) -> Outcomes:
        """Have the images of these rows decoded into `out` (B, C, H, W).

        The result raises what `Decoder.fill` raises, and MachineError if a process has died.
        """
        count = len(self._processes)
        stops = [len(rows) * place // count for place in range(count + 1)]
        parts = [slice(first, stop) for first, stop in pairwise(stops) if stop > first]
        self._turn += 1  # so that batches of few images do not all go to the first
        turn = self._processes[self._turn % count :] + self._processes
        futures = [self._ask(one, images[part], rows[part], out[part]) for one, part in zip(turn, parts, strict=False)]
        return lambda: [outcome for future in futures for outcome in future.result()]

    def _ask(self, one: _Process, images: Sequence[Image], rows: range, out: np.ndarray) -> Future[list[Outcome]]:
        future: Future[list[Outcome]] = Future()
        with one.lock:
            if one.has_ended:
                future.set_exception(_death(one))
                return future
            order = Order(one.free.popleft(), out.shape, images, rows)
            one.asked.append((order, out, future))
        with suppress(OSError):  # it is dead, which whoever listens to it finds out
            one.connection.send(order)
        return future

    def _receive(self, one: _Process) -> None:
        """Take what a process has decoded until it ends."""
        with suppress(EOFError, OSError):
            while True:
                found = one.connection.recv()
                order, out, future = one.asked.popleft()
                if isinstance(found, list):
                    out[...] = one.parts[order.part].array(order.shape, self._dtype)
                one.free.append(order.part)  # first, because the next batch is asked for once this one is ready
                if isinstance(found, list):
                    future.set_result(found)
                else:
                    future.set_exception(found)
        with one.lock:
            one.has_ended = True
        for _, _, future in one.asked:
            future.set_exception(_death(one))

    def __enter__(self) -> DecodeProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes. They write nothing but memory, so nothing is lost by that."""
        for one in self._processes:
            one.process.kill()
        for one in self._processes:
            one.process.wait()
            one.receiver.join()
            one.connection.close()
            for part in one.parts:
                os.close(part.descriptor)


def _started(decoder: Decoder, num_parts: int) -> _Process:
    """Start a process that decodes. Raises MachineError."""
    try:
        parts = [Part(os.memfd_create("featcli", os.MFD_CLOEXEC)) for _ in range(num_parts)]
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(path=sys.path, socket=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *(part.descriptor for part in parts)),
                env={**os.environ, **ENVIRONMENT},
            )
    except OSError as error:
        raise MachineError(f"a process that decodes cannot be started: {error.strerror}", LESS) from error
    connection = Connection(ours.detach())
    with suppress(OSError):  # it has died, which whoever listens to it finds out
        connection.send((decoder, [part.descriptor for part in parts]))
    return _Process(process, connection, parts, deque(range(num_parts)))


def _death(one: _Process) -> MachineError:
    return MachineError(f"a process that decodes has died: {how_it_ended(one.process.wait())}", LESS)


def serve(descriptor: int) -> None:
    """Decode what this process is asked for, until nobody asks any more."""
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        decoder, descriptors = connection.recv()
        parts = [Part(one) for one in descriptors]
        answers: SimpleQueue[list[Future[Outcome]]] = SimpleQueue()
        threading.Thread(target=_answer, args=(connection, answers), daemon=True).start()
        with pillow_set_up(decoder.rules.max_pixels), DecodeThreads(decoder.threads, "decode") as pool:
            while True:
                order = connection.recv()
                out = parts[order.part].array(order.shape, decoder.preprocessing.dtype)
                asked = zip(order.images, order.rows, out, strict=True)
                answers.put([pool.submit(decoder.fill, *each) for each in asked])
    os._exit(0)  # threads that are busy write into memory that nobody reads


def _answer(connection: Connection, answers: SimpleQueue[list[Future[Outcome]]]) -> None:
    with suppress(OSError):  # nobody asks any more
        while True:
            connection.send(_outcomes(answers.get()))


def _outcomes(futures: Sequence[Future[Outcome]]) -> Any:
    """Return the outcomes, or the error that ends the run."""
    try:
        return [future.result() for future in futures]
    except FeatcliError as error:
        return error
    except Exception as error:  # a fault in the code: its traceback is of this process
        return RuntimeError("".join(traceback.format_exception(error)))
