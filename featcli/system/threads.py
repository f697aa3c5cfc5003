"""Run threads that a process can end without: Ctrl-C must not wait a minute for a decoder that is busy in C."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, TypeVar

GRACE = 0.5  # seconds that busy threads get to finish once their results are not needed any more

Result = TypeVar("Result")
_left_behind: list[threading.Thread] = []  # threads of pools that ended before them


class DecodeThreads:
    """A pool like ThreadPoolExecutor, which leaves threads behind that are busy for longer than GRACE.

    Python's own pool would wait for them, at its end and again when the interpreter ends.
    """

    def __init__(self, number: int, name: str) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}_{place}", daemon=True) for place in range(number)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Let a thread call the function. Returns the future of its result."""
        future: Future[Result] = Future()
        self._work.put((future, lambda: function(*arguments)))
        return future

    def map(self, function: Callable[..., Result], items: Iterable[Any]) -> list[Result]:
        """Let the threads call the function with each item. Returns the results in the order of the items."""
        return [future.result() for future in [self.submit(function, item) for item in items]]

    def __enter__(self) -> DecodeThreads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads. Work that has not begun is dropped."""
        self._is_over.set()
        for _ in self._threads:
            self._work.put(None)
        patience = time.monotonic() + GRACE
        try:
            for thread in self._threads:
                thread.join(max(0.0, patience - time.monotonic()))
        finally:
            _left_behind.extend(thread for thread in self._threads if thread.is_alive())

    def _serve(self) -> None:
        while (work := self._work.get()) is not None and not self._is_over.is_set():
            future, call = work
            try:
                future.set_result(call())
            except BaseException as error:  # the error is handed to whoever asks for the result
                future.set_exception(error)
            del work, future, call  # free what they hold, before waiting for more work


def exit_process(code: int) -> NoReturn:
    """End the process as `sys.exit` does, or at once if a thread that was left behind is still busy.

    Python would take down what such a thread is using, which can end in a crash.
    """
    if any(thread.is_alive() for thread in _left_behind):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or not there at all
                stream.flush()
        os._exit(code)
    sys.exit(code)
