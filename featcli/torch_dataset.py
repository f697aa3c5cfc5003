"""The maps of a dump as a torch Dataset: safe in worker processes, and read into the memory they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, get_worker_info

from featcli.errors import UsageError, shown

if TYPE_CHECKING:
    from featcli.reader import DumpReader


class StageDataset(Dataset[Any]):
    """The images of a dump that could be read, in its order: `rows[i]` and `keys[i]` say which item i is.

    An item is the map of the stage, or a dict of them by stage; with labels a pair of that and the label. Several
    items at once, by a list of them, come stacked. Raises UsageError for stages and labels that do not fit the dump.
    """

    def __init__(
        self, dump: DumpReader, stages: Sequence[str] | str | None = None, labels: Any = None, rows: Any = None
    ) -> None:
        self.dump = dump
        self.stages = [stages] if isinstance(stages, str) else list(dump.stages if stages is None else stages)
        self._is_single = isinstance(stages, str)
        for stage in self.stages:
            if dump[stage].stage.is_ragged:
                raise UsageError(
                    f"stage {shown(stage)}: maps of many sizes make no batch",
                    "read them by dump[stage].tensor(row), or extract with --pool avg or another --fit",
                )
        self.rows = (dump.valid & dump.chosen(rows)).nonzero()[0]
        self._labels = None if labels is None or labels is False else self._labels_of(labels)

    def _labels_of(self, labels: Any) -> torch.Tensor | list[Any]:
        """One for each item."""
        dump = self.dump
        if labels is True:
            numbers = {name: number for number, name in enumerate(dump.classes)}
            names = dump.labels
            return torch.tensor([numbers[names[row]] for row in self.rows])
        if isinstance(labels, Mapping):
            missing = next((dump.keys[row] for row in self.rows if dump.keys[row] not in labels), None)
            if missing is not None:
                raise UsageError(f"labels: none for {shown(missing)}", "give one for each key of the dump")
            found = [labels[dump.keys[row]] for row in self.rows]
        else:
            if len(labels) != len(dump):
                raise UsageError(f"labels: {len(labels)} for {len(dump)} rows", "give one for each row of the dump")
            found = [labels[row] for row in self.rows]
        if found and isinstance(found[0], torch.Tensor):
            return torch.stack(found)
        as_array = np.asarray(found)
        return torch.from_numpy(as_array) if as_array.dtype.kind in "biuf" else found  # names are given as they are

    @property
    def keys(self) -> list[str]:
        """The key of each item."""
        return [self.dump.keys[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | Sequence[int]) -> Any:
        single = isinstance(item, int) or not hasattr(item, "__len__")
        rows = self.rows[[item] if single else list(item)]  # type: ignore[arg-type]
        found = {stage: self._read(stage, rows) for stage in self.stages}
        if single:
            found = {stage: maps[0] for stage, maps in found.items()}
        maps = found[self.stages[0]] if self._is_single else found
        if self._labels is None:
            return maps
        if single:
            return maps, self._labels[item]  # type: ignore[index]
        if isinstance(self._labels, torch.Tensor):
            return maps, self._labels[torch.as_tensor(item)]
        return maps, [self._labels[one] for one in item]  # type: ignore[union-attr]

    def _read(self, stage: str, rows: Any) -> torch.Tensor:
        """The maps of some rows; in a worker process in memory that the main process has too, without another copy."""
        array = self.dump[stage]
        out = None
        if get_worker_info() is not None:
            shape, kind = (len(rows), *array.stage.shape_at((0, 0))), getattr(torch, array.stage.dtype)
            # As torch's own collate makes it; share_memory_() would copy what is not there yet.
            storage = torch.UntypedStorage._new_shared(prod(shape) * kind.itemsize)  # type: ignore[no-untyped-call]
            out = torch.empty(0, dtype=kind).set_(storage, 0, shape)  # type: ignore[call-overload]
        found: torch.Tensor = array.tensor(rows, out)
        return found

    def loader(self, batch_size: int = 64, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A DataLoader that reads each batch as a whole: faster than one that stacks single items.

        `options` are DataLoader's: num_workers, pin_memory, generator (here also of the order) and so on.
        """
        if shuffle:
            sampler: Any = RandomSampler(self, generator=options.get("generator"))
        else:
            sampler = SequentialSampler(self)
        batches = BatchSampler(sampler, batch_size, options.pop("drop_last", False))
        return DataLoader(self, batch_size=None, sampler=batches, **options)
