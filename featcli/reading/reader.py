"""Read a dump back with `open_dump(path)`: arrays by stage, rows by number or key, in one way for both formats."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcli.dump.folder import Dump
from featcli.dump.plan import Output, Plan
from featcli.dump.records import split_digests
from featcli.errors import CheckpointError, FeatcliError, IncompleteError, UsageError, counted, nearest, one_line, shown
from featcli.inputs.labels import labels_of
from featcli.pixels.failure import NOT_READ, UnreadableError
from featcli.reading.columns import LABEL, Columns, as_arrow
from featcli.reading.open_shards import OpenShards
from featcli.reading.picture_files import PictureFiles
from featcli.reading.stage_array import RowIndex, StageArray

if TYPE_CHECKING:
    import torch

    from featcli.backbones.backbone import Backbone
    from featcli.backbones.preprocessing import Preprocessing
    from featcli.reading.torch_dataset import StageDataset

WALK_BYTES = 4 * 1024**2  # about as many are read at once when rows are walked through


def open_dump(path: str | os.PathLike[str], incomplete: bool = False) -> DumpReader:
    """Open a dump for reading. With `incomplete`, a dump may lack shards; the rows of these are not valid.

    Raises UsageError if there is no dump, IncompleteError if it is not complete, DamagedError if its files are damaged,
    and MachineError if they cannot be read.
    """
    dump = Dump.at(Path(path))
    if not (dump.is_complete() or incomplete):
        there, shards = len(dump.numbered(".json")), dump.plan.num_shards
        way_out = "run its extract command again" if there < shards else "run featcli finalize, which completes it"
        as_it_is = ", or give --incomplete (in Python incomplete=True) for the rows that are there" if there else ""
        raise IncompleteError(
            f"dump {shown(path)}: it is not complete and has {there:,} of {counted(shards, 'shard')}",
            way_out + as_it_is,
        )
    return DumpReader(dump)


@dataclass(frozen=True)
class Run:
    """Some rows of a dump in the order in which they are stored."""

    rows: list[int]
    keys: list[str]
    maps: dict[str, Any]  # stage -> (rows, ...), or a list of arrays if maps differ in size


class DumpReader:
    """A dump: `stages`, `keys`, `labels`, `failures`, `valid`, and `dump["stage4"]`, which has a row for each image.

    It may be used from any number of threads and after a fork, and may be pickled. Files are read when they are needed,
    so every attribute may raise DamagedError and MachineError.
    """

    def __init__(self, dump: Dump) -> None:
        self._dump = dump
        self._index = RowIndex(dump)
        self._shards = OpenShards(dump)

    def __reduce__(self) -> tuple[Callable[..., DumpReader], tuple[Path, bool]]:
        return open_dump, (self.path.absolute(), True)

    @property
    def path(self) -> Path:
        """The folder of the dump."""
        return self._dump.path

    @property
    def plan(self) -> Plan:
        """All settings of the dump."""
        return self._dump.plan

    @cached_property
    def outputs(self) -> dict[str, Output]:
        """All stored arrays by name: those of stages in network order, then embedding, projection and logits.

        Each has its point, reduction, axes, shape and dtype; those of stages also stride, index and module.
        """
        return {one.name: one for one in self.plan.outputs}

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

        try:
            settings = self.plan.settings
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

    @cached_property
    def sizes(self) -> list[int]:
        """The size of each row's file in bytes, as it was read."""
        sizes = [size for _, size in self._dump.images()]
        for record in self.records.values():
            for row, size in record.get("sizes", {}).items():  # of images that failed first and were read later
                sizes[int(row)] = size
        return sizes

    @cached_property
    def digests(self) -> list[str]:
        """The xxh3-128 of the bytes of the file of each row, in hex; empty where they were not read.

        Raises UsageError for a dump of format version 1, which has none.
        """
        if not self.plan.has_digests:
            raise UsageError(
                f"dump {shown(self.path)}: it is of format version 1, which holds no digests of pictures",
                "extract into another dump to have them",
            )
        digests = [""] * len(self)
        for number, record in self.records.items():
            rows = self.plan.shard(number)
            found = split_digests(record["digests"])
            digests[rows.start : rows.stop] = ["" if one == NOT_READ else one for one in found]
        return digests

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
            return PictureFiles(self, None if root is None else os.fspath(root)).find(number)[0]
        except UnreadableError as error:
            hint = "look in the program that extracted it" if self.plan.is_in_memory else "give its folder with root="
            raise UsageError(f"picture {shown(self.keys[number])}: {error.reason}", hint) from error

    @cached_property
    def columns(self) -> Columns:
        """The columns that came with the images, by name: see Columns. The labels of folders are the column `label`."""
        planned = self.plan.columns
        if planned is not None:
            return Columns(planned.kinds, lambda name: (cells[name] for cells in self._dump.cells()), len(self))
        try:
            labels = self._labels_of_folders
        except UsageError:  # which folder is the label cannot be told
            labels = []
        kinds: dict[str, Any] = {LABEL: "text"} if any(labels) else {}
        return Columns(kinds, lambda _: (label or None for label in labels), len(self))

    @property
    def table(self) -> Any:
        """The keys and all columns as a pyarrow.Table, row i for image i. Raises UsageError without pyarrow."""
        return as_arrow(self.columns, self.keys)

    def where(self, **conditions: Any) -> np.ndarray:
        """Return the numbers of the rows whose columns have these values, in row order: (n,) int64.

        `where(split="train", label=["cat", "dog"])` takes the rows of both classes in one split; None stands for a
        missing cell. Raises UsageError for an unknown column, and for a value of another kind than its cells.
        """
        return np.flatnonzero(self.columns.where(conditions))

    @cached_property
    def _labels_of_folders(self) -> list[str]:
        return labels_of(self.keys, self.plan.leads, self.path, self.plan.label_level)

    @cached_property
    def labels(self) -> list[Any]:
        """The label of each row: its cell in the column `label`, or None where that is missing.

        Without columns of a table or of tars it is the folder inside the input, or "" (see featcli.inputs.labels).
        Raises UsageError if no column is called `label`, and if it cannot be told which folder is the label.
        """
        if self.plan.columns is None:
            return self._labels_of_folders
        if LABEL not in self.columns.kinds:
            raise UsageError(
                f"dump {shown(self.path)}: no column is called {LABEL}",
                f"name one of {', '.join(self.columns)}, as with labels={next(iter(self.columns))!r}",
            )
        return list(self.columns.values_of(LABEL))

    @cached_property
    def classes(self) -> list[Any]:
        """The labels that occur, sorted. Their places are the numbers that a dataset gives. Raises UsageError."""
        return sorted({*self.labels}) if self.plan.columns is None else self.columns.classes_of(LABEL, self.labels)

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of each committed shard, by number."""
        return {record["shard"]: record for record in self._dump.records()}

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """The images that could not be read: key, row, reason and detail of each."""
        return [failure for record in self.records.values() for failure in record["failures"]]

    @cached_property
    def valid(self) -> np.ndarray:
        """(N,) bool: whether a row holds maps. Rows of failed images and of missing shards do not."""
        valid = np.zeros(len(self.keys), bool)  # the length of the list that is there, whatever the plan claims
        for number in self.records:
            rows = self.plan.shard(number)
            valid[rows.start : rows.stop] = True
        # `verify` compares the arrays `valid` of the shards with this one.
        valid[[failure["row"] for failure in self.failures]] = False
        return valid

    @property
    def num_missing(self) -> int:
        """The number of images in shards that are missing."""
        return len(self) - sum(len(self.plan.shard(number)) for number in self.records)

    @property
    def num_kept(self) -> int:
        """The number of missing images whose rows are already on the disk.

        They can be read once their shards are finished.
        """
        return sum(self._dump.rows_kept().values())

    def refuse_without_shards(self) -> None:
        """Raise IncompleteError if no shard is finished, because then no row can be read."""
        if self.records:
            return
        kept = f": {counted(self.num_kept, 'image')} kept in unfinished ones" if self.num_kept else ""
        raise IncompleteError(
            f"dump {shown(self.path)}: none of its {counted(self.plan.num_shards, 'shard')} is finished yet{kept}",
            "run its extract command again: rows can be read when their shard is finished",
        )

    def __len__(self) -> int:
        """Return the number of images, including failed ones: row i is image i."""
        return self.plan.num_images

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
        return StageArray(self.outputs[output], self.plan, self._index, self._shards, self.records)

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
        size = sum(array.stage.row_bytes(self.plan.settings.input_size) for array in arrays.values())
        step = at_once or max(1, WALK_BYTES // max(1, size))
        chosen = self.chosen(rows) if failed else self.chosen(rows) & self.valid
        for number in sorted(self.records):
            shard = self.plan.shard(number)
            left = (shard.start + np.flatnonzero(chosen[shard.start : shard.stop])).tolist()
            for first in range(0, len(left), step):
                some = left[first : first + step]
                maps = {stage: array[some] for stage, array in arrays.items()}
                yield Run(some, [self.keys[row] for row in some], maps)

    def chosen_outputs(self, asked: Sequence[str] | None = None) -> list[str]:
        """Return the outputs that names of outputs and stages, and ranges such as `stage2:stage4`, mean, in order.

        A stage stands for the output of that name, or for all of its outputs where none has it. All outputs where
        `asked` is None. Raises UsageError.
        """
        from featcli.backbones.stages import select

        if asked is None:
            return list(self.outputs)
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
            counts += [f"{len(self.failures):,} failed"] if self.failures else []
            kept = self.num_kept
            of_them = f" ({kept:,} of them kept, to be read when their shards are finished)" if kept else ""
            counts += [f"{self.num_missing:,} missing{of_them}"] if self.num_missing else []
        what = "stages" if len(self.stages) == len(self.outputs) else "outputs"
        return f"<dump {shown(self.path)}: {', '.join(counts)}, {what} {', '.join(self.outputs)}>"

    def close(self) -> None:
        """Close the shard files. They are opened again when needed."""
        self._shards.close()

    def __enter__(self) -> DumpReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
