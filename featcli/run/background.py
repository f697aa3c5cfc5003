"""Run work in order in one thread while the backbone computes. The memory that waits is limited in bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType


class Background:
    """Does work in the order in which it is given. The first exception stops it and is raised to whoever gives work."""

    def __init__(self, max_bytes: int) -> None:
        self.busy_seconds = 0.0  # of the thread
        self.waited_seconds = 0.0  # of the thread that gives work
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def give(self, work: Callable[[], None], num_bytes: int = 0) -> None:
        """Queue some work that holds `num_bytes` of memory. Waits while too much is queued already."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._waiting or self._waiting_bytes + num_bytes <= self._max_bytes
            )
            self._raise()
            self.waited_seconds += time.perf_counter() - began
            self._waiting.append((work, num_bytes))
            self._waiting_bytes += num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread once it has done all queued work."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            self._thread.join()
        except BaseException:  # Ctrl-C: finish only what the thread is doing now, but all of that
            with self._changed:
                self._waiting.clear()
            self._thread.join()
            raise

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()  # an error of the caller leaves work that still has to be done
        if error is None:
            self._raise()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                work, num_bytes = self._waiting.popleft()
            started = time.perf_counter()
            try:
                work()
            except BaseException as error:  # the caller raises it
                with self._changed:
                    self._error = error
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            del work  # free its memory, before waiting for more work
            with self._changed:
                self.busy_seconds += time.perf_counter() - started
                self._waiting_bytes -= num_bytes
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
