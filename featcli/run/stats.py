"""What was done, and which part of the pipeline set the pace: seconds at work, seconds waited, and what would help."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from featcli.dump.plan import Plan
from featcli.pixels.traits import Trait
from featcli.system.machine import available_cores

PARTS = ("decode", "compute", "write")
BUSY = 0.4  # share of a run from which decoding is worth a word though another part set the pace
WORTH_COMPILING = 60  # seconds of compute for which half a minute of compilation is no loss
SMALL_BATCH = 32  # images, which may not keep a GPU busy


@dataclass
class Timings:
    """Seconds of a run, added to as it goes on."""

    preparation: float = 0.0  # before: loading, trials, compilation
    started: float = field(default_factory=time.perf_counter)
    decode: float = 0.0  # at work, summed over threads
    compute: float = 0.0
    write: float = 0.0
    waited_for_decode: float = 0.0  # that compute stood still for it
    waited_for_write: float = 0.0
    waited_for_compute: float = 0.0  # that the writer stood still for a device

    def add(self, other: Timings) -> None:
        """What other processes were busy with, and waited for, and what their start took."""
        self.preparation += other.preparation
        self.started += other.preparation
        for part in (*PARTS, "waited_for_decode", "waited_for_write", "waited_for_compute"):
            setattr(self, part, getattr(self, part) + getattr(other, part))

    def pace(self, workers: int, decode_threads: int, plan: Plan) -> Throughput:
        """What the run comes to, by now. `decode_threads`: of all workers together."""
        seconds = time.perf_counter() - self.started
        worked = {"decode": self.decode, "compute": self.compute, "write": self.write}
        threads = {"decode": decode_threads, "compute": workers, "write": workers}
        busy = {part: worked[part] / threads[part] for part in PARTS}
        slowest = max(busy, key=lambda part: busy[part])
        advice = _advice(slowest, busy["decode"] / seconds, self.compute, threads["decode"], plan)
        return Throughput(
            seconds=round(seconds, 3),
            preparation=round(self.preparation, 3),
            worked={part: round(worked[part], 3) for part in PARTS},
            busy={part: round(busy[part] / seconds, 4) for part in PARTS},
            waited={
                "compute for decode": round(self.waited_for_decode, 3),
                "compute for write": round(self.waited_for_write, 3),
                "write for compute": round(self.waited_for_compute, 3),
            },
            threads=threads,
            set_by=slowest,
            advice=", ".join(advice),
        )


@dataclass
class RunStats:
    """What was done, to be added up over processes."""

    images: int = 0  # in shards that were committed
    failed: int = 0  # of these
    traits: Counter[Trait] = field(default_factory=Counter)  # of how many images each is true
    overflown: Counter[str] = field(default_factory=Counter)  # values that are not finite, by stage
    timings: Timings = field(default_factory=Timings)

    @property
    def pictures(self) -> dict[str, int]:
        """The images of this run and the traits of them, as `pictures_of` has them of a whole dump."""
        return {"read": self.images - self.failed, **{str(trait): count for trait, count in self.traits.items()}}

    def add(self, other: RunStats) -> None:
        """What another process has done."""
        self.images += other.images
        self.failed += other.failed
        self.traits.update(other.traits)
        self.overflown.update(other.overflown)
        self.timings.add(other.timings)


@dataclass(frozen=True)
class Throughput:
    """Where the time of a run went."""

    seconds: float
    preparation: float  # seconds before that: loading, trials, compilation
    worked: Mapping[str, float]  # seconds, by part, summed over threads
    busy: Mapping[str, float]  # as shares of the run, the average over threads
    waited: Mapping[str, float]  # seconds that one part stood still for another
    threads: Mapping[str, int]  # by part; of all workers, where there are several
    set_by: str
    advice: str

    def lines(self) -> Iterable[str]:
        """For people."""
        for part in PARTS:
            threads = f" on {self.threads[part]} threads" if self.threads[part] > 1 else ""
            waited = {name.partition(" for ")[2]: s for name, s in self.waited.items() if name.startswith(part)}
            waits = [f"{seconds:.1f} s for {other}" for other, seconds in waited.items() if seconds >= 0.05]
            text = f"{part:<8} {self.busy[part]:>4.0%} busy: {self.worked[part]:.1f} s of work{threads}"
            together = " in all" if waits and self.threads["compute"] > 1 else ""
            yield text + (f"; waited {', '.join(waits)}{together}" if waits else "")
        yield f"pace set by {self.set_by}; what could help: {self.advice}"


def _advice(slowest: str, decoding: float, computing: float, threads: int, plan: Plan) -> list[str]:
    """Options that would take work from the slowest part and are not used yet, those that change least first.

    `decoding`: the share of the run that it was busy; on a CPU at the cost of the backbone. `computing`: seconds.
    `threads`: of decoding.
    """
    settings, is_on_cpu = plan.settings, plan.environment.get("device") == "cpu"
    may_be_bf16 = settings.precision == "fp32" or (is_on_cpu and settings.precision == "fp16")
    can_scale = not (settings.is_scaled or settings.is_native)
    options = {
        "decode": {
            "--decode scaled for large JPEGs": can_scale,
            "more --decode-threads": threads < available_cores(),
            "--precision bf16": is_on_cpu and may_be_bf16,  # they share the cores
            "more cores": True,
        },
        "compute": {
            "--compile": not (settings.compiled or settings.is_native) and computing > WORTH_COMPILING,
            "--precision bf16": may_be_bf16,
            "--batch-size auto": not is_on_cpu and settings.batch_size <= SMALL_BATCH,
            "--decode scaled for large JPEGs": is_on_cpu and decoding > BUSY and can_scale,  # they share the cores
            "an earlier last stage": True,
            "a faster --device": True,
        },
        "write": {
            "--dtype float16": plan.stages[0].dtype == "float32",
            "--pool": settings.pool == "none",
            "fewer stages": True,
            "a faster disk": True,
        },
    }
    return [text for text, is_open in options[slowest].items() if is_open]
