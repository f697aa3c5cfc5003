"""Choose what is exported: rows in the order of the dump, with or without failed ones, pooled, in one dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from featcli.dump.formats.layout import NUMPY_TYPES
from featcli.dump.plan import Output
from featcli.errors import UsageError, counted, shown, shown_shape
from featcli.events import Report, silent
from featcli.reading.reader import DumpReader, Run
from featcli.run.pooling import clamped, pooling, remark_on_clamped
from featcli.spec.words import Dtype


@dataclass(frozen=True)
class Content:
    """Rows of a dump for export. `stages` have the shape and dtype that is exported."""

    dump: DumpReader
    outputs: tuple[Output, ...]
    rows: Sequence[int]
    keeps_failed: bool
    report: Report = silent
    clamped: dict[str, list[float]] = field(default_factory=dict)  # share of values of each image, where gem took them

    @property
    def keys(self) -> list[str]:
        """The key of each row."""
        return [self.dump.keys[row] for row in self.rows]

    @property
    def valid(self) -> np.ndarray:
        """(rows,) bool: false for failed images that were kept, whose values are all NaN."""
        return np.asarray(self.dump.valid[self.rows])

    @property
    def remarks(self) -> list[str]:
        """Remarks about rows of the dump that hold no maps."""
        failed, missing, kept = len(self.dump.failures), self.dump.num_missing, self.dump.num_kept
        became = "kept as NaN" if self.keeps_failed else "left out"
        of_them = f" ({kept:,} of them in unfinished shards)" if kept else ""
        return [
            *([f"{counted(failed, 'failed image')} {became}"] if failed else []),
            *([f"{counted(missing, 'image')} not there yet{of_them}"] if missing else []),
            *filter(None, (remark_on_clamped(name, sum(all_) / len(all_)) for name, all_ in self.clamped.items())),
        ]

    @property
    def attributes(self) -> dict[str, str]:
        """What the file says about itself, in ASCII."""
        provenance = self.dump.plan.provenance
        attributes = {
            "featcli_export_version": "1",
            "fingerprint": self.dump.plan.fingerprint,
            "checkpoint": provenance["checkpoint"],
            "weights": provenance["weights"],
            "pool": ",".join(dict.fromkeys(one.reduction for one in self.outputs)),
            "images": f"{len(self.rows)} of {self.dump.plan.num_images}",
        }
        return {name: text.encode("ascii", "backslashreplace").decode() or "-" for name, text in attributes.items()}

    def shapes(self, stage: Output) -> np.ndarray:
        """Return (rows, 3): the (C, H, W) of each row, for a stage whose maps differ in size."""
        return self.dump[stage.name].map_shapes(self.rows)

    def runs(self) -> Iterator[Run]:
        """Yield some rows at a time, in the dtype that is written; bfloat16 is uint16."""
        names = [stage.name for stage in self.outputs]
        for run in self.dump.walk(names, failed=self.keeps_failed):
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


def content_of(
    dump: DumpReader, names: Sequence[str], pool: str | None, dtype: Dtype | None, keeps_failed: bool
) -> Content:
    """Return the content that is asked for. For `dtype` None, values stay as stored. Raises UsageError."""
    stored = [dump.outputs[name] for name in names]
    outputs = tuple(
        replace(one, dtype=dtype or one.dtype) for one in (stored if pool is None else _pooled(stored, pool))
    )
    if keeps_failed:
        rows = [row for number in sorted(dump.records) for row in dump.plan.shard(number)]
    else:
        rows = np.flatnonzero(dump.valid).tolist()
    return Content(dump=dump, outputs=outputs, rows=rows, keeps_failed=keeps_failed)


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
