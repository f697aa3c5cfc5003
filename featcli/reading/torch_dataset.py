"""Give the maps of a dump as a torch Dataset, safe in worker processes, and as a loader whose workers are threads."""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from featcli.errors import UsageError, shown
from featcli.reading.internals import is_held_by_none_but, shared_tensor

if TYPE_CHECKING:
    from featcli.reading.reader import DumpReader


class StageDataset(Dataset[Any]):
    """The images of a dump that could be read, in its order. `rows[i]` and `keys[i]` say which image item i is.

    An item is the map of the stage, or a dict of maps by stage; with labels it is a pair of that and the label. Several
    items at once, by a list of numbers, are stacked. Raises UsageError for stages and labels that do not fit the dump.
    """

    def __init__(
        self, dump: DumpReader, stages: Sequence[str] | str | None = None, labels: Any = None, rows: Any = None
    ) -> None:
        self.dump = dump
        self.stages = [stages] if isinstance(stages, str) else list(dump.outputs if stages is None else stages)
        self._is_single = isinstance(stages, str)
        for stage in self.stages:
            if dump[stage].stage.is_ragged:
                raise UsageError(
                    f"stage {shown(stage)}: maps of many sizes cannot form one batch",
                    "read them by dump[stage].tensor(row), or extract with --pool avg or another --fit",
                )
        self.rows = (dump.valid & dump.chosen(rows)).nonzero()[0]
        self.classes: list[Any] | None = None  # of labels that are numbers of classes: what each number stands for
        self._labels = None if labels is None or labels is False else self._labels_of(labels)

    def _labels_of(self, labels: Any) -> torch.Tensor | list[Any]:
        """Return one label for each item."""
        dump = self.dump
        if labels is True:
            self.classes = dump.classes
            return self._numbers_of(dump.labels, "label")
        if isinstance(labels, str):
            return self._of_column(labels)
        if isinstance(labels, Mapping):
            missing = next((dump.keys[row] for row in self.rows if dump.keys[row] not in labels), None)
            if missing is not None:
                raise UsageError(f"labels: there is none for {shown(missing)}", "give one for each key of the dump")
            found = [labels[dump.keys[row]] for row in self.rows]
        else:
            if not (hasattr(labels, "__len__") and hasattr(labels, "__getitem__")):
                raise UsageError(
                    f"labels={labels!r} cannot be labels", "give True, a mapping by key, or one for each row"
                )
            if len(labels) != len(dump):
                raise UsageError(
                    f"there are {len(labels)} labels for {len(dump)} rows", "give one for each row of the dump"
                )
            found = [labels[row] for row in self.rows]
        if found and isinstance(found[0], torch.Tensor):
            return torch.stack(found)
        try:
            as_array = np.asarray(found)
        except ValueError:  # lists of several lengths
            return found
        return torch.from_numpy(as_array) if as_array.dtype.kind in "biuf" else found  # names stay as they are

    def _of_column(self, name: str) -> torch.Tensor | list[Any]:
        """Return the cells of a column: numbers as they are, texts as the numbers of classes, anything else as a list.

        Raises UsageError for a column that is not there, and for an image whose cell is missing.
        """
        columns = self.dump.columns
        if name not in columns:
            there = f"the columns are {', '.join(columns)}" if columns else "the dump has no columns"
            raise UsageError(f"labels: there is no column {shown(name)}", there)
        if columns.kinds.get(name) == "text":
            self.classes = columns.classes_of(name)
            return self._numbers_of(columns[name], name)
        found = columns[name]
        self._refuse_missing(found, name)
        if found.dtype == object:
            return [found[row] for row in self.rows]
        whole = np.int64 if columns.kinds.get(name) == "int" else found.dtype  # others may lack theirs, so it was NaN
        return torch.from_numpy(found[self.rows].astype(whole))

    def _numbers_of(self, names: Sequence[Any] | np.ndarray, column: str) -> torch.Tensor:
        self._refuse_missing(names, column)
        numbers = {name: number for number, name in enumerate(self.classes or ())}
        return torch.tensor([numbers[names[row]] for row in self.rows], dtype=torch.int64)

    def _refuse_missing(self, values: Sequence[Any] | np.ndarray, column: str) -> None:
        missing = [row for row in self.rows if values[row] is None or values[row] != values[row]]  # or NaN
        if missing:
            more = f", nor have {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise UsageError(
                f"labels: {shown(self.dump.keys[missing[0]])} has no {column}{more}",
                f"choose rows that have one, as with rows=dump.where({column}=[...])",
            )

    @property
    def keys(self) -> list[str]:
        """The key of each item."""
        return [self.dump.keys[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<dataset of {self.dump!r}: {len(self)} items of {', '.join(self.stages)}>"

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        if isinstance(item, slice):
            return self.read(range(len(self))[item])
        if getattr(item, "ndim", 1) and hasattr(item, "__len__"):
            return self.read(item)  # type: ignore[arg-type]
        item = operator.index(item)  # type: ignore[arg-type]
        labels, row = self._labels_at([item]), int(self.rows[item])
        found = {stage: self.dump[stage].tensor(row) for stage in self.stages}
        maps = found[self.stages[0]] if self._is_single else found
        return maps if labels is None else (maps, labels[0])

    def read(self, items: Sequence[int], memory: BatchMemory | None = None) -> Any:
        """Return several items, stacked. Raises as indexing a StageArray does."""
        maps, labels = self._maps(items, memory), self._labels_at(items)
        return maps if labels is None else (maps, labels)

    def _maps(self, items: Sequence[int], memory: BatchMemory | None = None) -> Any:
        rows = self.rows[list(items)]
        found = {stage: self._read(stage, rows, memory) for stage in self.stages}
        return found[self.stages[0]] if self._is_single else found

    def _labels_at(self, items: Sequence[int]) -> Any:
        if self._labels is None or isinstance(self._labels, list):
            return self._labels and [self._labels[item] for item in items]
        return self._labels[torch.as_tensor(items)]

    def _read(self, stage: str, rows: np.ndarray, memory: BatchMemory | None) -> torch.Tensor:
        """Return a batch.

        In a worker process it is in memory that the main process shares, so it is not copied again.
        """
        array = self.dump[stage]
        shape, out = (len(rows), *array.stage.shape_at((0, 0))), None
        if memory is not None:
            out = memory.take(shape, array.stage.dtype)
        elif get_worker_info() is not None:
            out = shared_tensor(shape, getattr(torch, array.stage.dtype))
        found: torch.Tensor = array.tensor(rows, out)
        return found

    def loader(
        self,
        batch_size: int = 64,
        shuffle: bool = False,
        num_workers: int = 2,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> BatchLoader:
        """Return a loader of batches, read ahead by `num_workers` threads; 0 reads in this thread. See BatchLoader."""
        return BatchLoader(self, batch_size, shuffle, num_workers, drop_last, generator)


class BatchMemory:
    """Memory of batches, which is used again once nobody holds a batch: a system takes long to give new memory."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return an uninitialised tensor of this shape and dtype."""
        kind = getattr(torch, dtype)
        size = prod(shape) * kind.itemsize
        with self._lock:
            places = range(len(self._arrays))
            free = [at for at in places if is_held_by_none_but(self._arrays, at)]
            place = next((at for at in free if self._arrays[at].nbytes == size), None)
            if place is None:
                self._arrays = [self._arrays[at] for at in places if at not in free]
                self._arrays.append(np.empty(size, np.uint8))
                place = -1
            return torch.from_numpy(self._arrays[place]).view(kind).view(shape)


class BatchLoader:
    """Iterates over the batches of a dataset as DataLoader does, in a new order each time if it shuffles.

    Its workers are threads: reads release the interpreter's lock. Processes would have to copy what they read, or share
    new memory for every batch. Batches come in order, and some are read ahead.
    """

    def __init__(
        self,
        data: StageDataset,
        batch_size: int,
        shuffle: bool,
        num_workers: int,
        drop_last: bool,
        generator: torch.Generator | None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}", "leave it out for the default")
        if generator is not None and not shuffle:
            raise UsageError(
                "generator needs shuffle=True", "leave it out: nothing is drawn by chance in the order of the dump"
            )
        self._data = data
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._num_workers = num_workers
        self._drop_last = drop_last
        self._generator = generator
        self._memory = BatchMemory()  # kept from epoch to epoch

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        whole, rest = divmod(len(self._data), self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[Any]:
        count = len(self._data)
        order = torch.randperm(count, generator=self._generator) if self._shuffle else torch.arange(count)
        batches = iter(torch.split(order, self._batch_size)[: len(self)])
        waiting: deque[Future[Any]] = deque()
        if not self._num_workers:
            yield from (self._data.read(batch.tolist(), self._memory) for batch in batches)
            return
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="reader")
        try:
            while True:
                for batch in islice(batches, self._num_workers + 1 - len(waiting)):
                    waiting.append(pool.submit(self._data.read, batch.tolist(), self._memory))
                if not waiting:
                    return
                yield waiting.popleft().result()  # after this nothing here holds the batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
