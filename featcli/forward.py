"""The pixels of a batch -> the rows that are stored: forward pass, pooling, type; in portions where memory is short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from featcli.batches import Batch
from featcli.device import is_out_of_memory, out_of_memory
from featcli.errors import UsageError, one_line
from featcli.planning import Job
from featcli.progress import Report, silent

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Forward:
    """The backbone and the pooling of a job, batch after batch.

    `at_once`: how many images go through the backbone together. It is halved where they do not fit into memory,
    and stays so. `overflown`: how many values were not finite, by stage.
    """

    def __init__(self, job: Job, report: Report = silent) -> None:
        self._job = job
        self._report = report
        self._forward = job.backbone.class_tokens if job.pooling.of_class_token else job.backbone.forward
        self.at_once: int = job.plan.settings["batch_size"]
        self.overflown: Counter[str] = Counter()

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """What is stored of each image, by stage; NaN where there was no image.

        Raises MachineError where not even one image fits into memory.
        """
        rows = None
        while rows is None:
            try:
                rows = self._rows(batch.pixels)
            except (MemoryError, RuntimeError, IndexError, ValueError, AssertionError) as error:
                if is_out_of_memory(error):
                    self._halve(len(batch.rows), error)
                elif self._job.backbone.preprocessing.is_native:  # these are how networks refuse a size
                    raise self._refused(error, batch) from error
                else:
                    raise
            if rows is None and self._job.backbone.device.type == "cuda":
                torch.cuda.empty_cache()  # here the error is gone, and the tensors that it held
        return self._finished(rows, batch)

    def _refused(self, error: Exception, batch: Batch) -> UsageError:
        """What an error means where pictures keep their own sizes, which not every network takes."""
        height, width = batch.pixels.shape[2:]
        return UsageError(
            f"--fit native: {self._job.backbone.name} does not take an input of {height}x{width}: {one_line(error)}",
            "a smaller --image-size is a limit for larger pictures; --fit pad keeps all of a picture at one size",
        )

    def _rows(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """On the CPU."""
        portions = [self._portion(portion) for portion in pixels.split(self.at_once)]  # type: ignore[no-untyped-call]
        if len(portions) == 1:
            return portions[0]
        return {name: torch.cat([portion[name] for portion in portions]) for name in portions[0]}

    def _portion(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        found: Mapping[str, torch.Tensor] = self._forward(pixels)
        reduce = self._job.pooling.reduce
        return {
            stage.name: reduce(found[stage.name]).to(TORCH_DTYPES[stage.dtype]).cpu().contiguous()
            for stage in self._job.plan.stages
        }

    def _halve(self, images: int, error: BaseException) -> None:
        device, tried = self._job.backbone.device, min(images, self.at_once)
        if tried == 1:
            raise out_of_memory("one image does", device) from error
        self.at_once = tried // 2
        self._report("warning", text=f"{tried} images do not fit into the memory of {device}: {self.at_once} at once")

    def _finished(self, rows: Mapping[str, torch.Tensor], batch: Batch) -> dict[str, np.ndarray]:
        failed = [failure.row - batch.rows.start for failure in batch.failures]
        stored = {}
        for stage in self._job.plan.stages:
            values = rows[stage.name]
            expected = (len(batch.rows), *stage.shape_at((batch.pixels.shape[2], batch.pixels.shape[3])))
            if values.shape != expected:
                raise AssertionError(f"{stage.name} yields {tuple(values.shape)}, planned {expected}")
            if not (finite := torch.isfinite(values)).all():
                finite[failed] = True
                self.overflown[stage.name] += int((~finite).sum())
            if failed:
                values = values.clone() if values.is_inference() else values
                values[failed] = torch.nan
            # numpy has no bfloat16: the same bytes under another name
            stored[stage.name] = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        return stored
