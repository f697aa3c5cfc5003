"""Choose what is exported: rows in the order of the dump, with or without failed ones, pooled, in one dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from featcli.dump.formats.layout import KEYS, NUMPY_TYPES, SHAPES, VALID
from featcli.dump.plan import Output
from featcli.errors import UsageError, counted, shown, shown_shape
from featcli.events import Report, silent
from featcli.inputs.cells import Kind
from featcli.reading.columns import Cells
from featcli.reading.reader import DumpReader, Run
from featcli.run.pooling import clamped, pooling, remark_on_clamped
from featcli.spec.words import Dtype

COLUMN = "column."  # begins the name of a column whose own name is taken in the file
SHAPE = ".shape"  # ends the name of what says the (C, H, W) of a row, where each row says its own


@dataclass(frozen=True)
class Content:
    """Rows of a dump for export. `stages` have the shape and dtype that is exported."""

    dump: DumpReader
    outputs: tuple[Output, ...]
    chosen: np.ndarray  # (N,) bool: the rows of the dump that are asked for, whether or not they hold maps
    keeps_failed: bool
    report: Report = silent
    clamped: dict[str, list[float]] = field(default_factory=dict)  # share of values of each image, where gem took them

    @cached_property
    def rows(self) -> list[int]:
        """The rows of the dump that are written."""
        there = self.dump.committed if self.keeps_failed else self.dump.valid
        return list(map(int, np.flatnonzero(there & self.chosen)))

    @property
    def keys(self) -> list[str]:
        """The key of each row."""
        return [self.dump.keys[row] for row in self.rows]

    @property
    def valid(self) -> np.ndarray:
        """(rows,) bool: false for failed images that were kept, whose values are all NaN."""
        return np.asarray(self.dump.valid[self.rows])

    @cached_property
    def columns(self) -> dict[str, str]:
        """The columns of the dump, each with the name that it has in the file, where keys and outputs have names, too.

        A name that is taken there is led by `column.`.
        """
        of_outputs = (one.name + end for one in self.outputs for end in ("", SHAPE, SHAPES))
        names = [*self.dump.columns]
        return dict(zip(names, free_names(names, {"key", "row", KEYS, VALID, *of_outputs}), strict=True))

    @property
    def kinds(self) -> dict[str, Kind]:
        """The kind of each column, by the name that it has in the file."""
        return {self.columns[name]: kind for name, kind in self.dump.columns.kinds.items()}

    def cells(self) -> Iterator[tuple[int, Cells]]:
        """Yield each row with its cells, by the names that `columns` gives: see Columns.rows."""
        for row, cells in self.dump.columns.rows(self.rows):
            yield row, {name: cells[column] for column, name in self.columns.items()}

    def runs_with_cells(self) -> Iterator[tuple[Run, list[Cells]]]:
        """Yield some rows at a time, with the cells of each."""
        cells = self.cells()
        for run in self.runs():
            of_row = dict(islice(cells, len(run.rows)))
            yield run, [of_row[row] for row in run.rows]

    @property
    def remarks(self) -> list[str]:
        """Remarks about chosen rows of the dump that hold no maps, and about columns with another name in the file."""
        failed = int((self.chosen & self.dump.committed & ~self.dump.valid).sum())
        missing = int((self.chosen & ~self.dump.committed).sum())
        kept = int((self.chosen & self.dump.kept()).sum()) if missing else 0
        became = "kept as NaN" if self.keeps_failed else "left out"
        of_them = f" ({kept:,} of them in unfinished shards)" if kept else ""
        return [
            *([f"{counted(failed, 'failed image')} {became}"] if failed else []),
            *([f"{counted(missing, 'image')} not there yet{of_them}"] if missing else []),
            *filter(None, (remark_on_clamped(name, sum(all_) / len(all_)) for name, all_ in self.clamped.items())),
            *(f"column {shown(name)} is {shown(new)} in it" for name, new in self.columns.items() if name != new),
        ]

    @property
    def attributes(self) -> dict[str, str]:
        """What the file says about itself, in ASCII."""
        attributes = {"featcli_export_version": "1"}
        for name, dump in self.dump.dumps.items() if self.dump.is_along_outputs else [("", self.dump)]:
            lead, plans = f"{name}." if name else "", [one.plan for one in dump.along_rows.dumps]
            attributes[f"{lead}fingerprint"] = ",".join(plan.fingerprint for plan in plans)
            for what in ("checkpoint", "weights"):
                attributes[lead + what] = ", ".join(dict.fromkeys(str(plan.provenance[what]) for plan in plans))
        attributes["pool"] = ",".join(dict.fromkeys(one.reduction for one in self.outputs))
        attributes["images"] = f"{len(self.rows)} of {len(self.dump)}"
        return {name: text.encode("ascii", "backslashreplace").decode() or "-" for name, text in attributes.items()}

    def shapes(self, stage: Output) -> np.ndarray:
        """Return (rows, 3): the (C, H, W) of each row, for a stage whose maps differ in size."""
        return self.dump[stage.name].map_shapes(self.rows)

    def runs(self) -> Iterator[Run]:
        """Yield some rows at a time, in the dtype that is written; bfloat16 is uint16."""
        names = [stage.name for stage in self.outputs]
        for run in self.dump.walk(names, rows=self.chosen, failed=self.keeps_failed):
            maps = {stage.name: self._converted(stage, run.maps[stage.name]) for stage in self.outputs}
            yield Run(run.rows, run.keys, maps)
            self.report("batch", images=len(run.rows))

    def _converted(self, stage: Output, found: Any) -> Any:
        """Pool maps that numpy holds (bfloat16 as float32), and cast them to the dtype of the stage.

        Raises UsageError.
        """
        if isinstance(found, list):
            converted = [self._converted(stage, maps[None])[0] for maps in found]
            return converted if stage.is_ragged else np.stack(converted)
        is_pooled = stage.reduction == self.dump.outputs[stage.name].reduction
        if is_pooled and NUMPY_TYPES[stage.dtype] == found.dtype:
            return found
        import torch

        maps = torch.from_numpy(found)
        pooled = maps if is_pooled else pooling(stage.reduction).of_maps(maps)
        if stage.reduction == "gem" and not is_pooled:
            self.clamped.setdefault(stage.name, []).extend(clamped(maps).tolist())
        cast = pooled.to(getattr(torch, stage.dtype))
        if not bool((cast.isfinite() | ~pooled.isfinite()).all()):
            raise UsageError(
                f"stage {shown(stage.name)}: a value is too large for {stage.dtype}", "use --dtype bfloat16 or float32"
            )
        return (cast.view(torch.uint16) if cast.dtype is torch.bfloat16 else cast).numpy()


def free_names(names: Sequence[str], taken: Collection[str]) -> list[str]:
    """Return a name for each of these: itself, led by `column.` as often as that is taken."""
    own, found = {*names}, dict[str, None]()
    for name in names:
        new = name
        while new in taken or new in found or (new != name and new in own):
            new = COLUMN + new
        found[new] = None
    return [*found]


def content_of(
    dump: DumpReader, names: Sequence[str], pool: str | None, dtype: Dtype | None, keeps_failed: bool, rows: Any = None
) -> Content:
    """Return the content that is asked for. For `dtype` None, values stay as stored. `rows` are all for None.

    Raises UsageError.
    """
    stored = [dump.outputs[name] for name in names]
    outputs = tuple(
        replace(one, dtype=dtype or one.dtype) for one in (stored if pool is None else _pooled(stored, pool))
    )
    return Content(dump=dump, outputs=outputs, chosen=dump.chosen(rows), keeps_failed=keeps_failed)


def _pooled(outputs: Sequence[Output], pool: str) -> list[Output]:
    """Outputs with their maps reduced; those that hold none stay as they are. Raises UsageError."""
    reduction = pooling(pool)
    if not any(one.reduction in ("none", pool) and one.is_of_stage for one in outputs):
        there = ", ".join(dict.fromkeys(one.reduction for one in outputs if one.is_of_stage))
        what = f"this dump was pooled by {there} already" if there else "vectors of the model's own hold no maps"
        raise UsageError(f"--pool {shown(pool)}: {what}", "leave --pool out, or extract again into another dump")
    if reduction.needs_prefix and any(one.reduction == "none" and one.is_of_stage for one in outputs):
        what = "class token" if reduction.needs_class_token else "registers"
        holding = [one.name for one in outputs if one.reduction == pool]
        way = f"choose what holds it, as with --stage {holding[0]}" if holding else f"extract with --pool {pool}"
        raise UsageError(f"--pool {pool}: maps hold no {what}", way)
    pooled = []
    for one in outputs:
        if one.reduction != "none" or one.map_shape is None:
            pooled.append(one)
            continue
        if reduction.is_finer_than(one.shape):
            raise UsageError(
                f"--pool {pool}: it is finer than stage {shown(one.name)}, {shown_shape(one.shape)}",
                "use a coarser grid, or choose stages with --stage",
            )
        pooled.append(replace(one, reduction=pool, shape=reduction.shape(one.map_shape, 0), axes=reduction.axes))
    return pooled
