"""Change settings of the whole calling process for a time: the caller's values are back after the last call ends."""

from __future__ import annotations

import gc
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")

# Libraries also change the whole process at times. One lock serves for all of it, so that no two locks can wait for
# each other.
one_at_a_time = threading.RLock()


class Borrowed(Generic[Value]):
    """A setting that calls change while they need it, also in several threads at once.

    `read` returns it and `write` changes it. `joined` makes one value from the caller's and from those that are wanted
    now; by default the last one wins.
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
        """Apply a value inside the block."""
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
        pass  # makes Python read the filters again


# Modules whose warnings are ignored for a time, by the beginnings of their names.
unheard = Borrowed[Sequence[Any]](
    lambda: tuple(warnings.filters),
    _set_filters,
    lambda before, modules: [*(("ignore", None, Warning, re.compile(name), 0) for (name,) in modules), *before],
)


# Python looks for garbage again and again while a large library is imported, which makes none. This takes a fourth of
# the time.
collector = Borrowed[bool](gc.isenabled, lambda is_on: gc.enable() if is_on else gc.disable())


@contextmanager
def silent_warnings() -> Iterator[None]:
    """Ignore Python's warnings inside the block, which only one thread enters at a time."""
    with one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def own_random_numbers(seed: int | None = None) -> Iterator[None]:
    """Draw random numbers inside the block, from a seed if one is given, and leave the caller's generators unchanged.

    Only one thread enters at a time, because the generators are those of the whole process.
    """
    import numpy as np
    import torch

    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    with one_at_a_time:
        of_gpus: Any = torch.cuda.get_rng_state_all() if is_initialized() else None
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # only that of the CPU, where networks are made
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            if of_gpus is not None:
                torch.cuda.set_rng_state_all(of_gpus)
