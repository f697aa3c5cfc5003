"""Decode in processes of their own: the threads of one interpreter wait for its lock if there are many of them.

Each process gets a part of every batch, decodes it by threads into memory that it shares with this one, and says what
became of each image. A thread of this process copies the pixels into the batch. If a process dies, another one takes
its place.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from mmap import mmap
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from featcli.errors import FeatcliError, MachineError, shown
from featcli.pixels.decoder import Decoder, Outcome, Outcomes
from featcli.pixels.internals import pillow_set_up
from featcli.system.child import start_python, wait_or_kill
from featcli.system.faults import RESUMES, how_it_ended
from featcli.system.threads import DecodeThreads

if TYPE_CHECKING:
    from featcli.inputs.image_list import Image

CAN_SHARE = hasattr(os, "memfd_create")  # files in memory that need no mount, such as /dev/shm, which may be small
MOST_DEATHS = 3  # of a process, one after the other without a part that was decoded between
PATIENCE = 5.0  # seconds that a process may take to end when nobody can talk to it any more
PROGRAM = "from featcli.pixels.decode_processes import serve; serve({socket})"
# The GPU is for the backbone, and torch, where it resizes, starts no threads of its own.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
LESS_MEMORY = f"free some memory, or use --decode-processes 0; {RESUMES}"
LEAVE_OUT = f"leave that image out with --exclude; {RESUMES}"


class Part:
    """Memory for a part of a batch, which two processes share."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap | None = None

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array in this memory, which grows if it is too small for it. Raises OSError."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if self._map is None or len(self._map) < size:
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, size)
            self._map = mmap(self.descriptor, size)
        return np.frombuffer(self._map, dtype, count=prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Order:
    """A part of a batch that a process is to decode."""

    part: int  # the number of its memory
    shape: tuple[int, ...]  # of all its images
    images: Sequence[Image]
    rows: range


class DecodeProcesses:
    """Processes that decode parts of batches. They start with the first batch.

    At most `ahead` batches may be asked for and not be ready.
    """

    def __init__(self, decoder: Decoder, ahead: int) -> None:
        self._decoder = decoder
        self._ahead = ahead
        self._processes: list[_Process] = []
        self._turn = 0

    def fill(self, images: Sequence[Image], rows: range, out: np.ndarray) -> Outcomes:
        """Have the images of these rows decoded into `out` (B, C, H, W).

        The result raises what `Decoder.fill` raises, and MachineError if a process dies again and again.
        """
        if not self._processes:
            self._start()
        count = len(self._processes)
        stops = [len(rows) * place // count for place in range(count + 1)]
        parts = [slice(first, stop) for first, stop in pairwise(stops) if stop > first]
        self._turn += 1  # so that batches of few images do not all go to the first
        turn = self._processes[self._turn % count :] + self._processes
        futures = [one.ask(images[part], rows[part], out[part]) for one, part in zip(turn, parts, strict=False)]
        return lambda: [outcome for future in futures for outcome in future.result()]

    def _start(self) -> None:
        count, threads = self._decoder.processes, self._decoder.threads
        for place in range(count):
            each = replace(self._decoder, processes=0, threads=max(1, threads // count + (place < threads % count)))
            self._processes.append(_Process(each, self._ahead))

    def __enter__(self) -> DecodeProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes. They write nothing but memory, so nothing is lost by that."""
        for one in self._processes:
            one.kill()
        for one in self._processes:
            one.close()


class _Process:
    """A process that decodes, what was asked of it, and the thread that takes what it gives."""

    def __init__(self, decoder: Decoder, num_parts: int) -> None:
        """Start the process. Raises MachineError."""
        self._decoder = decoder
        self._parts: list[Part] = []
        self._free = deque(range(num_parts))  # numbers of parts that nobody uses
        self._asked: deque[tuple[Order, np.ndarray, Future[list[Outcome]]]] = deque()
        self._lock = threading.Lock()  # orders are sent in the order of `_asked`, also to a process that takes over
        self._deaths = 0
        self._is_over = False
        self._error: BaseException | None = None  # that ended the thread
        try:
            for _ in range(num_parts):
                self._parts.append(Part(os.memfd_create("featcli", os.MFD_CLOEXEC)))
            self._process, self._connection = self._started()
        except BaseException as error:
            self._close_parts()
            if isinstance(error, OSError):
                raise MachineError(f"a process that decodes cannot start: {error.strerror}", LESS_MEMORY) from error
            raise
        self._receiver = threading.Thread(target=self._receive, name="decoded", daemon=True)
        self._receiver.start()

    def ask(self, images: Sequence[Image], rows: range, out: np.ndarray) -> Future[list[Outcome]]:
        """Have images decoded into `out`. The future raises whatever ends the run."""
        future: Future[list[Outcome]] = Future()
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            order = Order(self._free.popleft(), out.shape, images, rows)
            self._asked.append((order, out, future))
            self._send(order)
        return future

    def kill(self) -> None:
        """End the process, and start none in its place."""
        with self._lock:
            self._is_over = True
            self._process.kill()

    def close(self) -> None:
        """Wait for the end, and free what it took."""
        self._process.wait()
        self._receiver.join()
        self._connection.close()
        self._close_parts()

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        descriptors = [part.descriptor for part in self._parts]
        process, connection = start_python(PROGRAM, descriptors, ENVIRONMENT)
        with suppress(OSError):  # it has died already, which the thread that listens finds out
            connection.send((self._decoder, descriptors))
        return process, connection

    def _send(self, order: Order) -> None:
        with suppress(OSError):  # as above
            self._connection.send(order)

    def _receive(self) -> None:
        """Take what the process has decoded, until it is ended. Whatever happens, nobody waits for ever."""
        try:
            while True:
                try:
                    found = self._connection.recv()
                except (EOFError, OSError):
                    if not self._replace():
                        raise
                else:
                    self._take(found)
        except OSError as error:
            self._give_up(MachineError(f"pixels cannot be shared with another process: {error.strerror}", LESS_MEMORY))
        except BaseException as error:
            self._give_up(error)

    def _take(self, found: list[Outcome] | Exception) -> None:
        order, out, future = self._asked[0]
        if isinstance(found, list):
            out[...] = self._parts[order.part].array(order.shape, self._decoder.preprocessing.dtype)
        self._asked.popleft()
        self._free.append(order.part)  # first, because the next batch is asked for once this one is ready
        self._deaths = 0
        if isinstance(found, list):
            future.set_result(found)
        else:
            future.set_exception(found)

    def _replace(self) -> bool:
        """Start another process in the place of one that has died, and ask it for the same. False if all is over.

        Raises MachineError if they die one after the other.
        """
        code = wait_or_kill(self._process, PATIENCE)
        with self._lock:
            if self._is_over:
                return False
            self._deaths += 1
            if self._deaths == MOST_DEATHS:
                raise self._death(code)
            self._connection.close()
            self._process, self._connection = self._started()
            for order, _, _ in self._asked:
                self._send(order)
        return True

    def _death(self, code: int) -> MachineError:
        keys = [image.key for order, _, _ in self._asked for image in order.images]
        at = f" at image {shown(keys[0])}" if keys else ""
        at += f" or one of {len(keys) - 1} behind it" if keys[1:] else ""
        hint = LESS_MEMORY if code == -signal.SIGKILL else LEAVE_OUT
        return MachineError(f"a process that decodes died {MOST_DEATHS} times{at}: {how_it_ended(code)}", hint)

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            self._is_over = True
            self._process.kill()
        for _, _, future in self._asked:
            future.set_exception(error)

    def _close_parts(self) -> None:
        for part in self._parts:
            os.close(part.descriptor)


def serve(descriptor: int) -> None:
    """Decode what this process is asked for, until nobody asks any more."""
    os.dup2(2, 1)  # what a library prints is no result of the run
    connection = Connection(descriptor)
    try:
        _decode(connection)
    except BaseException as error:
        with suppress(OSError):
            connection.send(_sendable(error))
    finally:
        os._exit(0)  # threads that are busy write into memory that nobody reads


def _decode(connection: Connection) -> None:
    decoder, descriptors = connection.recv()
    parts = [Part(one) for one in descriptors]
    answers: SimpleQueue[list[Future[Outcome]]] = SimpleQueue()
    threading.Thread(target=_answer, args=(connection, answers), daemon=True).start()
    with pillow_set_up(decoder.rules.max_pixels), DecodeThreads(decoder.threads, "decode") as pool:
        while True:
            try:
                order = connection.recv()
            except (EOFError, OSError):  # whoever asked has ended
                return
            out = parts[order.part].array(order.shape, decoder.preprocessing.dtype)
            asked = zip(order.images, order.rows, out, strict=True)
            answers.put([pool.submit(decoder.fill, *each) for each in asked])


def _answer(connection: Connection, answers: SimpleQueue[list[Future[Outcome]]]) -> None:
    try:
        while True:
            connection.send(_outcomes(answers.get()))
    finally:  # nobody would get an answer any more
        os._exit(1)


def _outcomes(futures: Sequence[Future[Outcome]]) -> list[Outcome] | Exception:
    """Return the outcomes, or the error that ends the run."""
    try:
        return [future.result() for future in futures]
    except BaseException as error:
        return _sendable(error)


def _sendable(error: BaseException) -> Exception:
    """Return the error as another process can take it: a fault in the code with its traceback, which is of here."""
    return error if isinstance(error, FeatcliError) else RuntimeError("".join(traceback.format_exception(error)))
