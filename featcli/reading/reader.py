"""Reading a dump back: `open_dump(path)`, arrays by stage, rows by number or key. One way for both formats."""

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
from featcli.dump.plan import Plan, StoredStage
from featcli.errors import CheckpointError, FeatcliError, IncompleteError, UsageError, counted, nearest, one_line, shown
from featcli.pixels.failure import UnreadableError
from featcli.reading.labels import labels_of
from featcli.reading.open_shards import OpenShards
from featcli.reading.picture_files import PictureFiles
from featcli.reading.stage_array import RowIndex, StageArray

if TYPE_CHECKING:
    import torch

    from featcli.backbones.backbone import Backbone
    from featcli.backbones.preprocessing import Preprocessing
    from featcli.reading.torch_dataset import StageDataset

WALK_BYTES = 4 * 1024**2  # that are read at once, about, when rows are walked through


def open_dump(path: str | os.PathLike[str], incomplete: bool = False) -> DumpReader:
    """Open a dump for reading. With `incomplete`, one that still misses shards: their rows are not valid.

    Raises UsageError where there is no dump, IncompleteError where it is not complete, DamagedError where its
    files are damaged.
    """
    dump = Dump.at(Path(path))
    if not (dump.is_complete() or incomplete):
        there, shards = len(dump.numbered(".json")), dump.plan.num_shards
        way_out = "run its extract command again" if there < shards else "featcli finalize completes it"
        as_it_is = ", or take what is there: --incomplete, in Python incomplete=True" if there else ""
        raise IncompleteError(
            f"dump {shown(path)}: not complete, {there:,} of {counted(shards, 'shard')} there", way_out + as_it_is
        )
    return DumpReader(dump)


@dataclass(frozen=True)
class Run:
    """Rows of a dump in the order in which they are stored."""

    rows: list[int]
    keys: list[str]
    maps: dict[str, Any]  # stage -> [rows, ...], a list of arrays where maps differ in size


class DumpReader:
    """A dump: `stages`, `keys`, `labels`, `failures`, `valid`, and `dump["stage4"]`, an array with one row per image.

    May be used from any number of threads, after a fork, and pickled.
    """

    def __init__(self, dump: Dump) -> None:
        self._dump = dump
        self._index = RowIndex(dump)
        self._shards = OpenShards(dump)

    def __reduce__(self) -> tuple[Callable[..., DumpReader], tuple[Path, bool]]:
        return open_dump, (self.path.absolute(), True)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._dump.path

    @property
    def plan(self) -> Plan:
        """What was asked."""
        return self._dump.plan

    @cached_property
    def stages(self) -> dict[str, StoredStage]:
        """The stored stages by name, in network order: shape, dtype, stride, index and module of each."""
        return {stage.name: stage for stage in self.plan.stages}

    @property
    def norm(self) -> str:
        """Whether maps are those before (`raw`) or after (`model`) the model's final norm, where it has one."""
        return self.plan.settings.norm

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How pictures became the backbone's input, made again from the plan: `fit`, `normalize` and the numbers.

        Raises CheckpointError where the library that it is of is not here, or does not know these settings.
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
        except Exception as error:  # settings of anybody, read by libraries
            raise CheckpointError(
                f"dump {shown(self.path)}: its preprocessing cannot be repeated here: {one_line(error)}",
                "is its library installed, in the version that it was made with?",
            ) from error

    def load_backbone(self, checkpoint: Any = None, device: Any = "cpu", **weights: Any) -> Backbone:
        """Load the backbone that the dump was made with, with all settings of its plan but `--compile`.

        A picture that goes through its `preprocess` gives the maps that its row has; to the last bit on a machine of
        the same kind, in a batch of the same size, with as many threads. `checkpoint` is needed where the plan cannot
        name it: a folder, a file, a configuration. `weights`: the `model_arg` and `weights_key` that it was extracted
        with. Raises UsageError without a checkpoint, ConflictError where it is another than that of the dump, and what
        `featcli.load_backbone` raises.
        """
        from featcli.reading.plan_backbone import load_plan_backbone

        backbone = load_plan_backbone(self.plan, checkpoint, device, weights)
        return replace(backbone, preprocessing=self.preprocessing)

    def preprocess(self, picture: Any) -> torch.Tensor:
        """Make of a picture, or a list of them, what the backbone was given: by the plan alone, without the checkpoint.

        (C, H, W), or (B, C, H, W) of a list; uint8 as a rule. A picture is a path or URL, a picture of Pillow, or an
        array. Raises UsageError for what is no picture, or cannot be read, and CheckpointError as `preprocessing` does.
        """
        from featcli.pixels.pictures import prepared

        settings = self.plan.settings
        try:
            rules = settings.pixel_rules
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"dump {shown(self.path)}: its plan does not say how pictures were read",
                "it was made by another featcli",
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
        """The size in bytes of the file of each row, as it was read."""
        sizes = [size for _, size in self._dump.images()]
        for record in self.records.values():
            for row, size in record.get("sizes", {}).items():  # of images that failed, and were read later
                sizes[int(row)] = size
        return sizes

    def picture_path(self, row: int | str, root: str | os.PathLike[str] | None = None) -> str:
        """The file of the picture of a row, given by number or key, if it still has the size that it had.

        It is looked for below `root`; by default where the last run of `extract` found the pictures, if that was noted
        (see docs/format.md) and they are still there, and else in the current folder. Raises UsageError.
        """
        number = self._index.rows_of(row)
        if not isinstance(number, int):
            raise UsageError(f"picture_path of {row!r}", "give one row or key")
        try:
            return PictureFiles(self, None if root is None else os.fspath(root)).find(number)[0]
        except UnreadableError as error:
            raise UsageError(
                f"picture {shown(self.keys[number])}: {error.reason}", "give its folder with root="
            ) from error

    @cached_property
    def labels(self) -> list[str]:
        """The class of each row, by the folders inside the inputs: see featcli.reading.labels. Raises UsageError."""
        return labels_of(self.keys, self.plan.leads, self.path)

    @cached_property
    def classes(self) -> list[str]:
        """The classes that occur, sorted: their places are the numbers that a dataset gives."""
        return sorted({*self.labels})

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """The record of each committed shard by number."""
        return {record["shard"]: record for record in self._dump.records()}

    @cached_property
    def failures(self) -> list[dict[str, Any]]:
        """The images that could not be read: key, row, reason, detail."""
        return [failure for record in self.records.values() for failure in record["failures"]]

    @cached_property
    def valid(self) -> np.ndarray:
        """(N,) bool: whether a row holds maps. It does not for failures, nor for shards that are missing."""
        valid = np.zeros(len(self.keys), bool)  # of the list that is there, whatever the plan claims
        for number in self.records:
            rows = self.plan.shard(number)
            valid[rows.start : rows.stop] = True
        # `verify` holds the shards' own arrays `valid` to this.
        valid[[failure["row"] for failure in self.failures]] = False
        return valid

    @property
    def num_missing(self) -> int:
        """Images of shards that are not there yet."""
        return len(self) - sum(len(self.plan.shard(number)) for number in self.records)

    @property
    def num_kept(self) -> int:
        """Of the missing images those whose rows are on the disk already: to be read when their shards are finished."""
        return sum(self._dump.rows_kept().values())

    def refuse_without_shards(self) -> None:
        """Raise IncompleteError where no shard is finished: then there is no row to be read."""
        if self.records:
            return
        kept = f": {counted(self.num_kept, 'image')} kept in unfinished ones" if self.num_kept else ""
        raise IncompleteError(
            f"dump {shown(self.path)}: none of its {counted(self.plan.num_shards, 'shard')} is finished yet{kept}",
            "run its extract command again: rows can be read when their shard is finished",
        )

    def __len__(self) -> int:
        """Images, failed ones too: row i is image i."""
        return self.plan.num_images

    def __iter__(self) -> Iterator[str]:
        """The names of the stages, in network order, with a warning: `len(dump)` counts rows. Use `dump.stages`."""
        text = "iterating over a dump gives its stages, while len() counts its rows: use dump.stages, or dump.keys"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return iter(self.stages)

    def __contains__(self, stage: object) -> bool:
        return stage in self.stages

    def __getitem__(self, stage: str) -> StageArray:
        """The maps of a stage. Raises UsageError for an unknown one."""
        if stage not in self.stages:
            near = (nearest(stage, self.stages) if isinstance(stage, str) else []) or list(self.stages)
            raise UsageError(f"stage {shown(str(stage))} is not in this dump", f"it has {', '.join(near)}")
        return StageArray(self.stages[stage], self.plan, self._index, self._shards, self.records)

    def as_numpy(self, stage: str, shard: int | None = None) -> np.ndarray:
        """A stage mapped into memory, without a copy, where that can be: see StageArray.as_numpy."""
        return self[stage].as_numpy(shard)

    def walk(
        self, stages: Sequence[str] | str | None = None, at_once: int = 0, rows: Any = None, failed: bool = False
    ) -> Iterator[Run]:
        """All rows in the order in which they are stored, some at a time (by default as many as make 4 MB).

        Without rows of failed images, unless `failed`, and without shards that are missing. `stages`: all by default;
        `rows`: those alone, by row, key or mask.
        """
        if at_once < 0:
            raise UsageError(f"at_once={at_once}: must be at least 1", "leave it out for the default")
        names = [stages] if isinstance(stages, str) else list(self.stages if stages is None else stages)
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

    def chosen_stages(self, asked: Sequence[str] | None = None) -> list[str]:
        """Names and ranges such as `stage2:stage4` as names, in network order; all where it is None. UsageError."""
        from featcli.backbones.stages import select

        stages = [(stage.name, stage.module) for stage in self.plan.stages]
        return [stages[position][0] for position in (range(len(stages)) if asked is None else select(stages, asked))]

    def chosen(self, rows: Any = None) -> np.ndarray:
        """(N,) bool: these rows, given by row, key or mask; all where it is None. Raises KeyError and IndexError."""
        if rows is None:
            return np.ones(len(self), bool)
        chosen = np.zeros(len(self), bool)
        chosen[self._index.rows_of(rows)] = True
        return chosen

    def pooled(self, stage: str, rows: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(n, C) float32, the average of each map over its positions, and the n rows they are of; failed ones are out.

        Vectors that were pooled before are given as they are. `rows`: those alone, by row, key or mask.
        """
        features: list[np.ndarray] = []
        found: list[int] = []
        for run in self.walk(stage, rows=rows):
            features += [maps.reshape(len(maps), -1).mean(1, dtype=np.float32) for maps in run.maps[stage]]
            found += run.rows
        channels = int(self[stage].stage.shape[0] or 0)
        return np.array(features, np.float32).reshape(len(found), channels), np.array(found, int)

    def as_torch_dataset(
        self, stages: Sequence[str] | str | None = None, labels: Any = None, rows: Any = None
    ) -> StageDataset:
        """The images as a torch Dataset, failed ones left out: see featcli.reading.torch_dataset.StageDataset.

        `stages`: one by name, whose maps are then given alone, or several (all by default), given by name. `labels`:
        True for the number of the image's class in `classes`; or a label for each key, in a mapping; or one for each
        row, in a sequence. `rows`: those images alone, by row, key or mask, in the order of the dump.
        """
        from featcli.reading.torch_dataset import StageDataset

        return StageDataset(self, stages, labels, rows)

    def __repr__(self) -> str:
        counts = [f"{len(self):,} images"]
        with suppress(FeatcliError):  # a record that is damaged is told by what needs it
            counts += [f"{len(self.failures):,} failed"] if self.failures else []
            kept = self.num_kept
            of_them = f" ({kept:,} of them kept, to be read when their shards are finished)" if kept else ""
            counts += [f"{self.num_missing:,} missing{of_them}"] if self.num_missing else []
        return f"<dump {shown(self.path)}: {', '.join(counts)}, stages {', '.join(self.stages)}>"

    def close(self) -> None:
        """Close the shard files; they are opened again when needed."""
        self._shards.close()

    def __enter__(self) -> DumpReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
