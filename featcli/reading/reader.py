"""Read dumps back with `open_dump(path)`: arrays by stage, rows by number or key, in one way for both formats.

Several dumps are read as one, along rows or along outputs. A dump by itself is the case of one of each.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from featcli.dump.folder import Dump
from featcli.dump.generations import all_generations
from featcli.dump.plan import Output, Plan
from featcli.errors import CheckpointError, FeatcliError, IncompleteError, UsageError, counted, nearest, one_line, shown
from featcli.inputs.labels import LABEL
from featcli.pixels.failure import UnreadableError
from featcli.reading.along_outputs import (
    check_names,
    columns_along_outputs,
    output_of,
    outputs_named,
    rows_by_key,
    same_digests,
)
from featcli.reading.along_rows import (
    AlongRows,
    columns_along_rows,
    labels_along_rows,
    refuse_other_dumps,
    refuse_repeated_keys,
)
from featcli.reading.columns import Columns, as_arrow
from featcli.reading.open_shards import OpenShards
from featcli.reading.picture_files import PictureFiles
from featcli.reading.stage_array import RowIndex, StageArray

if TYPE_CHECKING:
    import torch

    from featcli.backbones.backbone import Backbone
    from featcli.backbones.preprocessing import Preprocessing
    from featcli.reading.torch_dataset import StageDataset

WALK_BYTES = 4 * 1024**2  # about as many are read at once when rows are walked through


AnyDump: TypeAlias = "str | os.PathLike[str] | DumpReader"


def open_dump(
    path: AnyDump | Sequence[AnyDump] | Mapping[str, AnyDump | Sequence[AnyDump]], incomplete: bool = False
) -> DumpReader:
    """Open a dump for reading, or several as one. With `incomplete`, they may lack shards, whose rows are not valid.

    A list puts dumps along rows: the rows of each follow those of the one before. Their outputs and settings are equal
    but for the number of threads, the batch size and the format, and no key is in two of them. A mapping from names
    puts dumps of the same keys along outputs: several models over the same images, whose outputs are `name.stage4`.
    Dumps are folders, or readers that this function returned.

    Raises UsageError if there is no dump, or for a name that cannot be one, ConflictError with the first difference for
    dumps that cannot be one, IncompleteError if a dump is not complete, DamagedError if its files are damaged, and
    MachineError if they cannot be read.
    """
    if not isinstance(incomplete, bool):
        raise UsageError(
            f"incomplete={shown(incomplete)} is neither on nor off", "give several dumps as one list: open_dump([a, b])"
        )
    if isinstance(path, Mapping):
        return _along_outputs({name: open_dump(one, incomplete) for name, one in path.items()})
    if isinstance(path, DumpReader):
        return path
    if isinstance(path, str | os.PathLike):
        return reader_of(_opened(path, incomplete))
    return _along_rows([open_dump(one, incomplete) for one in path])


def reader_of(dumps: Sequence[Dump]) -> DumpReader:
    """Return a reader of dumps along rows, which are complete or not, and fit together."""
    return DumpReader({"": Side.of(AlongRows(dumps))})


def _opened(path: str | os.PathLike[str], incomplete: bool) -> list[Dump]:
    """Return all generations of a dump."""
    generations = all_generations(Dump.at(Path(path)))
    dumps = generations.dumps
    if not (incomplete or generations.are_complete):
        there = sum(len(dump.numbered(".json")) for dump in dumps)
        shards = sum(dump.plan.num_shards for dump in dumps)
        way_out = "run its extract command again" if there < shards else "run featcli finalize, which completes it"
        as_it_is = ", or give --incomplete (in Python incomplete=True) for the rows that are there" if there else ""
        raise IncompleteError(
            f"dump {shown(path)}: it is not complete and has {there:,} of {counted(shards, 'shard')}",
            way_out + as_it_is,
        )
    return dumps


def _along_rows(readers: Sequence[DumpReader]) -> DumpReader:
    """Return the dumps as one along rows. Raises UsageError and ConflictError for those that do not fit."""
    if not readers:
        raise UsageError("open_dump was given no dump", "give the folder that extract -o made, or several")
    if len(readers) == 1:
        return readers[0]
    dumps = [dump for reader in readers for dump in reader.side("dumps along rows").dumps.dumps]
    refuse_other_dumps(dumps)
    joined = reader_of(dumps)
    refuse_repeated_keys(joined.along_rows, joined.keys)
    return joined


def _along_outputs(readers: Mapping[str, DumpReader]) -> DumpReader:
    """Return the dumps as one along outputs. Raises UsageError and ConflictError for those that do not fit."""
    if not readers:
        raise UsageError("open_dump was given no dump", "give a name and a folder for each, as {'a': 'feats'}")
    sides = {name: reader.side("dumps along outputs") for name, reader in readers.items()}
    check_names({name: side.dumps.plan.outputs for name, side in sides.items()})
    first = next(iter(readers))
    orders = {name: rows_by_key((first, readers[first]), (name, reader)) for name, reader in readers.items()}
    shards = {name: OpenShards(side.dumps, len(sides)) for name, side in sides.items()}
    return DumpReader({name: replace(s, shards=shards[name], order=orders[name]) for name, s in sides.items()})


def _reopened(sides: Mapping[str, tuple[Sequence[Path], np.ndarray | None]]) -> DumpReader:
    """Return a reader as it was before it was pickled. Raises as `Dump.at` does."""
    return DumpReader({name: Side.of(AlongRows.at(paths), order, len(sides)) for name, (paths, order) in sides.items()})


@dataclass(frozen=True)
class Side:
    """Dumps along rows that may stand beside others, of the same images and along outputs."""

    dumps: AlongRows
    index: RowIndex
    shards: OpenShards
    order: np.ndarray | None = None  # for each row of the first side its row here, if it is another

    @classmethod
    def of(cls, dumps: AlongRows, order: np.ndarray | None = None, share: int = 1) -> Side:
        """Return the side, whose files are not open yet. `share` is the number of sides."""
        return cls(dumps, RowIndex(dumps), OpenShards(dumps, share), order)

    def in_order(self, of_rows: np.ndarray) -> np.ndarray:
        """Return what was found of each row here, (N, ...), in the order of the first side."""
        return of_rows if self.order is None else of_rows[self.order]


@dataclass(frozen=True)
class Run:
    """Some rows of a dump in the order in which they are stored."""

    rows: list[int]
    keys: list[str]
    maps: dict[str, Any]  # stage -> (rows, ...), or a list of arrays if maps differ in size


class DumpReader:
    """A dump: `stages`, `keys`, `labels`, `failures`, `valid`, and `dump["stage4"]`, which has a row for each image.

    Several dumps are read in the same way. Rows, with what is known of their pictures, are those of the first side.
    What only one plan can say, such as `plan` and `load_backbone`, is that of the first dump along rows, and is refused
    where there are several along outputs: `dumps` has each by itself.

    It may be used from any number of threads and after a fork, and may be pickled. Files are read when they are needed,
    so every attribute may raise DamagedError and MachineError.
    """

    def __init__(self, sides: Mapping[str, Side]) -> None:
        """`sides` are by name; one that stands alone has none."""
        self._sides = dict(sides)
        self._first = next(iter(self._sides.values()))
        self._index = self._first.index

    def __reduce__(self) -> tuple[Callable[..., DumpReader], tuple[Any]]:
        paths = {
            name: ([dump.path.absolute() for dump in side.dumps.dumps], side.order)
            for name, side in self._sides.items()
        }
        return _reopened, (paths,)

    @property
    def is_along_outputs(self) -> bool:
        """Whether several dumps stand beside one another, with the name of each before its outputs."""
        return "" not in self._sides

    def side(self, what: str = "it") -> Side:
        """Return the only side. Raises UsageError with `what` is asked for, if there are names."""
        if self.is_along_outputs:
            names = ", ".join(self._sides)
            raise UsageError(
                f"{what}: dumps along outputs have none in common, each of {names} has its own",
                f"ask one of them: dump.dumps[{next(iter(self._sides))!r}]",
            )
        return self._first

    @property
    def dumps(self) -> dict[str, DumpReader]:
        """Each dump by itself: by its name along outputs, or by its path along rows."""
        is_one = not self.is_along_outputs and len(self.along_rows.dumps) == 1
        return {str(self.path): self} if is_one else dict(self._dumps)

    @cached_property
    def _dumps(self) -> dict[str, DumpReader]:
        if self.is_along_outputs:
            return {name: DumpReader({"": replace(side, order=None)}) for name, side in self._sides.items()}
        return {str(dump.path): reader_of([dump]) for dump in self.along_rows.dumps}

    @property
    def along_rows(self) -> AlongRows:
        """The dumps that the rows are of: all, or along outputs those of the first name."""
        return self._first.dumps

    @property
    def leading(self) -> DumpReader:
        """The dump whose rows and pictures these are: along outputs the first by itself."""
        return next(iter(self.dumps.values())) if self.is_along_outputs else self

    @property
    def path(self) -> Path:
        """The folder of the dump, or of the first one."""
        return self.along_rows.dumps[0].path

    @property
    def plan(self) -> Plan:
        """All settings of the dump, or of the first one along rows. Raises UsageError along outputs."""
        return self.side("plan").dumps.plan

    @cached_property
    def outputs(self) -> dict[str, Output]:
        """All stored arrays by name: those of stages in network order, then embedding, projection and logits.

        Each has its point, reduction, axes, shape and dtype; those of stages also stride, index and module.
        """
        return {one.name: one for _, _, one in self._arrays.values()}

    @cached_property
    def _arrays(self) -> dict[str, tuple[Side, str, Output]]:
        """The side of each output, its name there, and the output with its name here."""
        found = {}
        for name, side in self._sides.items():
            for one in side.dumps.plan.outputs:
                here = output_of(name, one)
                found[here.name] = side, one.name, here
        return found

    @cached_property
    def stages(self) -> dict[str, Output]:
        """Those of the outputs that are made of feature maps."""
        return {name: one for name, one in self.outputs.items() if one.is_of_stage}

    @property
    def norm(self) -> str:
        """Whether maps come before (`raw`) or after (`model`) the model's final norm, if it has one."""
        return self.plan.settings.norm

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing, made again from the plan: `fit`, `normalize` and their numbers.

        Raises CheckpointError if its library is not installed, or does not know these settings.
        """
        from featcli.backbones.preprocessing import recorded_preprocessing

        settings = self.plan.settings
        try:
            return recorded_preprocessing(
                settings.preprocessing,
                size=settings.input_size,
                channels=settings.channels,
                resize_mode=settings.resize_mode,
            )
        except Exception as error:  # anybody may have written the settings, and libraries raise anything
            raise CheckpointError(
                f"dump {shown(self.path)}: its preprocessing cannot be repeated here: {one_line(error)}",
                "is its library installed, in the version that it was made with?",
            ) from error

    def load_backbone(self, checkpoint: Any = None, device: Any = "cpu", **weights: Any) -> Backbone:
        """Load the backbone that the dump was made with, with all settings of its plan except `--compile`.

        A picture that goes through its `preprocess` gives the maps of its row. They are equal to the last bit on a
        machine of the same kind, in a batch of the same size, with as many threads. `checkpoint` is a folder, a file or
        a configuration, and is needed if the plan cannot name it. `weights` are the `model_arg` and `weights_key` of
        the extraction.

        Raises UsageError if the checkpoint is missing, ConflictError if it is not that of the dump, and what
        `featcli.load_backbone` raises.
        """
        from featcli.reading.plan_backbone import load_plan_backbone

        backbone = load_plan_backbone(self.plan, checkpoint, device, weights)
        return replace(backbone, preprocessing=self.preprocessing)

    def preprocess(self, picture: Any) -> torch.Tensor:
        """Return the pixels that the backbone gets for a picture, or for a list of them, by the plan alone.

        The shape is (C, H, W), or (B, C, H, W) for a list; the dtype is uint8 as a rule. A picture is a path or URL, a
        picture of Pillow, or an array. Raises UsageError for something that is no picture or cannot be read, and
        CheckpointError as `preprocessing` does.
        """
        from featcli.pixels.pictures import prepared

        settings = self.plan.settings
        try:
            rules = settings.pixel_rules
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"dump {shown(self.path)}: its plan does not say how pictures were read",
                "use the featcli that made it",
            ) from error
        return prepared(picture, rules, self.preprocessing, settings.input_size)

    @property
    def keys(self) -> list[str]:
        """The key of each row."""
        return self._index.keys

    @property
    def rows(self) -> Mapping[str, int]:
        """The row of each key."""
        return self._index.row_of_key

    @property
    def sizes(self) -> list[int]:
        """The size of each row's file in bytes, as it was read."""
        return self.along_rows.sizes

    @cached_property
    def digests(self) -> list[str]:
        """The xxh3-128 of the bytes of the file of each row, in hex; empty where they were not read.

        Raises UsageError if a dump is of format version 1, which has none, and ConflictError if dumps along outputs
        read other bytes under one key.
        """
        found = {
            name: side.dumps.digests if side.order is None else [side.dumps.digests[row] for row in side.order]
            for name, side in self._sides.items()
        }
        return same_digests(self.keys, found)

    def picture_path(self, row: int | str, root: str | os.PathLike[str] | None = None) -> str:
        """Return the file of a row's picture, by number or key, if it still has its size.

        It is looked for below `root`. By default that is where the last run of `extract` found the pictures, if it was
        noted (see docs/format.md) and is still there, and otherwise the current folder. Raises UsageError if the file
        is not found, and KeyError and IndexError for a row that is not there.
        """
        number = self._index.rows_of(row)
        if not isinstance(number, int):
            raise UsageError(f"picture_path takes one row or key, not {row!r}", "call it once for each row")
        try:
            return PictureFiles(self.leading, None if root is None else os.fspath(root)).find(number)[0]
        except UnreadableError as error:
            is_in_memory = self.along_rows.dump_of(number).plan.is_in_memory
            hint = "look in the program that extracted it" if is_in_memory else "give its folder with root="
            raise UsageError(f"picture {shown(self.keys[number])}: {error.reason}", hint) from error

    @cached_property
    def columns(self) -> Columns:
        """The columns that came with the images, by name: see Columns. The labels of folders are the column `label`."""
        found = [
            (name, columns_along_rows(side.dumps, side.index.keys), side.order)
            for name, side in self._sides.items()
            if side is self._first or side.dumps.have_tables  # labels of folders are those of the first
        ]
        return columns_along_outputs(self.keys, found) if self.is_along_outputs else found[0][1]

    @property
    def table(self) -> Any:
        """The keys and all columns as a pyarrow.Table, row i for image i. Raises UsageError without pyarrow."""
        return as_arrow(self.columns, self.keys)

    def where(self, conditions: Mapping[str, Any] | None = None, /, **more: Any) -> np.ndarray:
        """Return the numbers of the rows whose columns have these values, in row order: (n,) int64.

        `where(split="train", label=["cat", "dog"])` takes the rows of both classes in one split; None stands for a
        missing cell. A mapping takes names that are no keywords, as `where({"meta.width": 640})`. Raises UsageError for
        an unknown column, and for a value of another kind than its cells.
        """
        return np.flatnonzero(self.columns.where({**(conditions or {}), **more}))

    @cached_property
    def _labels_of_folders(self) -> list[str]:
        return labels_along_rows(self.along_rows, self.keys)

    @property
    def _has_table(self) -> bool:
        return any(side.dumps.have_tables for side in self._sides.values())

    @cached_property
    def labels(self) -> list[Any]:
        """The label of each row: its cell in the column `label`, or None where that is missing.

        Without columns of a table or of tars it is the folder inside the input, or "" (see featcli.inputs.labels).
        Raises UsageError if no column is called `label`, and if it cannot be told which folder is the label.
        """
        if not self._has_table:
            return self._labels_of_folders
        if LABEL not in self.columns.kinds:
            raise UsageError(
                f"dump {self.name}: no column is called {LABEL}",
                f"name one of {', '.join(self.columns)}, as with labels={next(iter(self.columns))!r}",
            )
        return list(self.columns.values_of(LABEL))

    @cached_property
    def classes(self) -> list[Any]:
        """The labels that occur, sorted. Their places are the numbers that a dataset gives. Raises UsageError."""
        return self.columns.classes_of(LABEL, self.labels) if self._has_table else sorted({*self.labels})

    @property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of each committed shard, by number; along rows, shards are numbered over all dumps."""
        return self.side("records").dumps.records

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """The images that could not be read: key, row, reason and detail of each; along outputs also its `dump`."""
        if not self.is_along_outputs:
            return self.along_rows.failures
        found = [
            {**failure, "row": self.rows[failure["key"]], "dump": name}
            for name, side in self._sides.items()
            for failure in side.dumps.failures
        ]
        return sorted(found, key=lambda failure: int(failure["row"]))

    @property
    def num_failed(self) -> int:
        """The number of images that could not be read, in any of the dumps."""
        return len({failure["row"] for failure in self.failures})

    @cached_property
    def valid(self) -> np.ndarray:
        """(N,) bool: whether a row holds maps, in all dumps. Rows of failed images and of missing shards do not."""
        valid = np.ones(len(self.keys), bool)  # the length of the list that is there, whatever the plan claims
        for side in self._sides.values():
            valid &= side.in_order(side.dumps.valid)
        return valid

    @cached_property
    def committed(self) -> np.ndarray:
        """(N,) bool: whether the shard of a row is finished, in all dumps. Such rows can be read."""
        sides = self._sides.values()
        return np.asarray(np.logical_and.reduce([side.in_order(side.dumps.committed) for side in sides]))

    @property
    def num_missing(self) -> int:
        """The number of images in shards that are missing."""
        return len(self) - int(self.committed.sum())

    @property
    def num_kept(self) -> int:
        """The number of missing images whose rows are already on the disk.

        They can be read once their shards are finished.
        """
        return int(self.kept().sum()) if self.num_missing else 0

    def kept(self) -> np.ndarray:
        """Return (N,) bool: the missing images whose rows are already on the disk, as they are now."""
        sides = self._sides.values()
        there = [side.in_order(side.dumps.committed | side.dumps.kept()) for side in sides]
        return np.asarray(np.logical_and.reduce(there) & ~self.committed)

    def refuse_without_shards(self) -> None:
        """Raise IncompleteError if no shard is finished, because then no row can be read."""
        for side in self._sides.values():
            dumps = side.dumps
            if dumps.records:
                continue
            kept = f": {counted(self.num_kept, 'image')} kept in unfinished ones" if self.num_kept else ""
            raise IncompleteError(
                f"dump {dumps.name}: none of its {counted(dumps.num_shards, 'shard')} is finished yet{kept}",
                "run its extract command again: rows can be read when their shard is finished",
            )

    def __len__(self) -> int:
        """Return the number of images, including failed ones: row i is image i."""
        return len(self.along_rows)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the stages in network order, and warn, because `len(dump)` counts rows.

        Use `dump.stages`.
        """
        text = "iterating over a dump gives its stages, while len() counts its rows: use dump.stages, or dump.keys"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return iter(self.stages)

    def __contains__(self, output: object) -> bool:
        return output in self.outputs

    def __getitem__(self, output: str) -> StageArray:
        """Return the maps of a stage. Raises UsageError for an unknown one."""
        if output not in self.outputs:
            near = (nearest(output, self.outputs) if isinstance(output, str) else []) or list(self.outputs)
            raise UsageError(f"stage {shown(str(output))} is not in this dump", f"choose from {', '.join(near)}")
        side, stored, here = self._arrays[output]
        return StageArray(here, self._index, side.dumps, side.shards, stored, side.order)

    def as_numpy(self, stage: str, shard: int | None = None) -> np.ndarray:
        """Return a stage mapped into memory, without a copy, if that is possible: see StageArray.as_numpy."""
        return self[stage].as_numpy(shard)

    def walk(
        self, stages: Sequence[str] | str | None = None, at_once: int = 0, rows: Any = None, failed: bool = False
    ) -> Iterator[Run]:
        """Yield all rows in the order in which they are stored, `at_once` at a time (by default about 4 MB).

        Rows of failed images are left out unless `failed` is true, and rows of missing shards are always left out.
        `stages` are all by default. `rows` chooses some, by row, key or mask. Raises UsageError, KeyError, IndexError,
        DamagedError and MachineError.
        """
        if at_once < 0:
            raise UsageError(f"at_once must be at least 1, not {at_once}", "leave it out for the default")
        names = [stages] if isinstance(stages, str) else list(self.outputs if stages is None else stages)
        arrays = {stage: self[stage] for stage in names}
        step = at_once or max(1, WALK_BYTES // max(1, sum(array.row_bytes for array in arrays.values())))
        chosen = self.chosen(rows) & (self.committed if failed else self.valid)
        for number in sorted(self.along_rows.records):
            shard = self.along_rows.rows(number)
            left = (shard.start + np.flatnonzero(chosen[shard.start : shard.stop])).tolist()
            for first in range(0, len(left), step):
                some = left[first : first + step]
                maps = {stage: array[some] for stage, array in arrays.items()}
                yield Run(some, [self.keys[row] for row in some], maps)

    def chosen_outputs(self, asked: Sequence[str] | None = None) -> list[str]:
        """Return the outputs that names of outputs and stages, and ranges such as `stage2:stage4`, mean, in order.

        A stage stands for the output of that name, or for all of its outputs where none has it. Along outputs a name
        without that of a dump stands for all of them. All outputs where `asked` is None. Raises UsageError.
        """
        from featcli.backbones.stages import select

        if asked is None:
            return list(self.outputs)
        if self.is_along_outputs:
            found = outputs_named(self.dumps, asked)
            return [name for name in self.outputs if name in found]
        points = list(
            {one.point: one.module if one.is_of_stage else one.point for one in self.outputs.values()}.items()
        )
        # A range is one of points: of an output such as stage2@avg nobody could say what lies between it and a stage.
        named = [
            name for one in asked for name in ([points[at][0] for at in select(points, [one])] if ":" in one else [one])
        ]
        places = [*points, *((name, name) for name in self.outputs if name not in dict(points))]
        names = {places[position][0] for position in select(places, named)}
        whole = names - self.outputs.keys()  # stages without an output of their name
        return [name for name, one in self.outputs.items() if name in names or one.point in whole]

    def chosen(self, rows: Any = None) -> np.ndarray:
        """Return (N,) bool: the rows that are given by row, key or mask; all for None.

        Raises KeyError and IndexError.
        """
        if rows is None:
            return np.ones(len(self), bool)
        if isinstance(rows, np.ndarray) and rows.dtype == bool and rows.shape == (len(self),):
            return rows
        chosen = np.zeros(len(self), bool)
        chosen[self._index.rows_of(rows)] = True
        return chosen

    def pooled(self, stage: str, rows: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the average of each map over its positions, (n, C) float32, and its row, (n,).

        Failed images are left out.

        Vectors that were already pooled are returned as they are. `rows` chooses some, by row, key or mask. Raises as
        `walk` does.
        """
        features: list[np.ndarray] = []
        found: list[int] = []
        output = self[stage].stage
        for run in self.walk(stage, rows=rows):
            features += [output.columns(row[None])[0].mean(1, dtype=np.float32) for row in run.maps[stage]]
            found += run.rows
        return np.array(features, np.float32).reshape(len(found), output.channels), np.array(found, int)

    def as_torch_dataset(
        self, stages: Sequence[str] | str | None = None, labels: Any = None, rows: Any = None
    ) -> StageDataset:
        """Return the images that could be read as a torch Dataset: see featcli.reading.torch_dataset.StageDataset.

        `stages` is one name, whose maps are then the items, or several (by default all), which make dicts by name.
        `labels` is True for the number of the image's class in `classes`; or the name of a column, whose texts become
        the numbers of the dataset's own `classes`; or a mapping with a label for each key, or a sequence with a label
        for each row. An image without a label is refused: choose others by `rows`. `rows` chooses images by row, key or
        mask; they stay in the order of the dump. Raises UsageError, KeyError and IndexError.
        """
        from featcli.reading.torch_dataset import StageDataset

        return StageDataset(self, stages, labels, rows)

    def __repr__(self) -> str:
        counts = [f"{len(self):,} images"]
        with suppress(FeatcliError):  # a damaged record is reported by whatever needs it
            counts += [f"{self.num_failed:,} failed"] if self.failures else []
            kept = self.num_kept
            of_them = f" ({kept:,} of them kept, to be read when their shards are finished)" if kept else ""
            counts += [f"{self.num_missing:,} missing{of_them}"] if self.num_missing else []
        what = "stages" if len(self.stages) == len(self.outputs) else "outputs"
        return f"<dump {self.name}: {', '.join(counts)}, {what} {', '.join(self.outputs)}>"

    @property
    def name(self) -> str:
        """The dump or dumps for people, by their paths, and by the names that they have along outputs."""
        if not self.is_along_outputs:
            return self.along_rows.name
        return ", ".join(f"{name} {side.dumps.name}" for name, side in self._sides.items())

    def close(self) -> None:
        """Close the shard files. They are opened again when needed."""
        for side in self._sides.values():
            side.shards.close()

    def __enter__(self) -> DumpReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
