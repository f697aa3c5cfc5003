"""Find which shards this process makes: `--part i/n` as given, or as a scheduler says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from featcli.errors import UsageError, shown
from featcli.spec.parsers import HOW_PARTS, parse_part, refuse_no_part
from featcli.spec.words import AUTO

COUNT = "FEATCLI_PARTS"  # for schedulers that tell only the index


@dataclass(frozen=True)
class Part:
    """The shards index, index + count, index + 2 count ... `reason` says where the numbers come from."""

    index: int
    count: int
    reason: str = "as asked"

    def __post_init__(self) -> None:
        refuse_no_part(self.index, self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, shards: Iterable[int]) -> list[int]:
        """Return the shards that are in this part."""
        return [number for number in shards if number % self.count == self.index]


def part_of(text: str | None, environment: Mapping[str, str] = os.environ) -> Part | None:
    """Return the part for `i/n`; for `auto`, the one that the scheduler of this process says; for None, None.

    Raises UsageError.
    """
    asked = None if text is None else parse_part(text)
    if asked is None:
        return None
    return _scheduled(environment) if asked == AUTO else Part(*asked)


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of this process among those on its machine, if a launcher says it."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    return next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), None)


def _scheduled(environment: Mapping[str, str]) -> Part:
    """Return the part of this job, divided among its processes if it has several."""
    outer = _slurm_array(environment) or _kubernetes(environment)
    if outer is not None and COUNT in environment and number(environment, COUNT) != outer.count:
        raise UsageError(
            f"--part {AUTO}: {outer.reason} makes {outer.count} parts, and {COUNT} says {environment[COUNT]}",
            "submit the whole array, which skips what is there, or give --part i/n",
        )
    inner = next(
        (
            Part(number(environment, index), number(environment, count), name)
            for name, sign, index, count in (
                ("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"),
                ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
                ("srun", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
            )
            if sign in environment and index in environment and count in environment
        ),
        None,
    )
    if outer is None and inner is None:
        raise UsageError(
            f"--part {AUTO}: no Slurm array, Kubernetes indexed job, torchrun, Open MPI or srun started this process",
            HOW_PARTS,
        )
    if outer is None or inner is None:
        part = outer or inner
        assert part is not None
        return Part(part.index, part.count, f"{AUTO}: {part.reason}")
    reason = f"{AUTO}: {inner.reason} within {outer.reason}"
    return Part(outer.index * inner.count + inner.index, outer.count * inner.count, reason)


def _slurm_array(environment: Mapping[str, str]) -> Part | None:
    """Return the part of an array that was submitted whole.

    If only some of its tasks run again, its count is another.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    task, least, most, count, step = (
        number(environment, f"SLURM_ARRAY_TASK_{name}", default)
        for name, default in (("ID", None), ("MIN", None), ("MAX", None), ("COUNT", None), ("STEP", 1))
    )
    if (most - least) // step + 1 != count:
        raise UsageError(
            f"--part {AUTO}: the Slurm array has {count} tasks between {least} and {most}, so this"
            " is not a whole array",
            "submit the whole array again, which skips what is there, or give --part i/n as it was",
        )
    return Part((task - least) // step, count, f"Slurm array task {task} of {least}-{most}")


def _kubernetes(environment: Mapping[str, str]) -> Part | None:
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if COUNT not in environment:
        raise UsageError(
            f"--part {AUTO}: Kubernetes tells the index of a job and not how many there are",
            f"set {COUNT} in the job to its completions",
        )
    return Part(number(environment, "JOB_COMPLETION_INDEX"), number(environment, COUNT), "Kubernetes indexed job")


def number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a whole number from the environment. Raises UsageError for anything else."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UsageError(f"--part {AUTO}: {name} is {'not set' if text is None else shown(text)}", HOW_PARTS)
    return max(1, int(text)) if name.endswith("STEP") else int(text)
