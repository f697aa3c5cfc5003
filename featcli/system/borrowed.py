"""Settings of the whole process that calls borrow: what was there before the first call is back after the last."""

from __future__ import annotations

import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

# For what libraries do to the whole process: one lock for all of it, so that two of them cannot wait for one another.
one_at_a_time = threading.RLock()


class Borrowed(Generic[Value]):
    """A setting that calls have as they need it, also in several threads at once.

    `read` gives what it is, `write` changes it, and `joined` makes one value of what was there before and of what
    those want that have it now: the last one's, unless it is given.
    """

    def __init__(
        self,
        read: Callable[[], Value],
        write: Callable[[Value], None],
        joined: Callable[[Value, Sequence[Value]], Value] = lambda _, wanted: wanted[-1],
    ) -> None:
        self._read = read
        self._write = write
        self._joined = joined
        self._wanted: list[tuple[object, Value]] = []

    @contextmanager
    def set_to(self, value: Value) -> Iterator[None]:
        """Have the setting so inside the block."""
        holder = object()
        with one_at_a_time:
            if not self._wanted:
                self._before = self._read()
            self._wanted.append((holder, value))
        try:
            with one_at_a_time:
                self._apply()
            yield
        finally:
            with one_at_a_time:
                self._wanted = [one for one in self._wanted if one[0] is not holder]
                self._apply()

    def _apply(self) -> None:
        values = [value for _, value in self._wanted]
        self._write(self._joined(self._before, values) if values else self._before)


def _set_filters(filters: Sequence[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with warnings.catch_warnings():
        pass  # which has Python look at them anew


# Modules whose warnings are ignored while they are borrowed, by the beginnings of their names.
unheard = Borrowed[Sequence[Any]](
    lambda: tuple(warnings.filters),
    _set_filters,
    lambda before, modules: [*(("ignore", None, Warning, re.compile(name), 0) for (name,) in modules), *before],
)


@contextmanager
def silent_warnings() -> Iterator[None]:
    """Ignore Python's warnings inside the block, which no other thread enters meanwhile."""
    with one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def own_random_numbers(seed: int | None = None) -> Iterator[None]:
    """Draw random numbers inside the block, from a seed or not, and leave those of the caller as they were.

    No other thread enters meanwhile: the generators are those of the whole process.
    """
    import numpy as np
    import torch

    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    with one_at_a_time:
        of_gpus: Any = torch.cuda.get_rng_state_all() if is_initialized() else None
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # of the CPU alone, where networks are made
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            if of_gpus is not None:
                torch.cuda.set_rng_state_all(of_gpus)
