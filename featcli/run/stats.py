"""Count what was done, and tell which part of the pipeline set the pace: seconds at work, seconds waited, advice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from featcli.dump.plan import Plan
from featcli.pixels.traits import Trait
from featcli.system.machine import available_cores

PARTS = ("decode", "compute", "write")
BUSY = 0.4  # decoding that takes this share of a run is worth advice even if another part set the pace
WORTH_COMPILING = 60  # seconds of compute that make half a minute of compilation worth it
SMALL_BATCH = 32  # images; fewer may not keep a GPU busy


@dataclass
class Timings:
    """Seconds of a run, which grow as it goes."""

    preparation: float = 0.0  # loading, trials and compilation, before the start
    started: float = field(default_factory=time.perf_counter)
    decode: float = 0.0  # at work, summed over threads
    compute: float = 0.0
    write: float = 0.0
    waited_for_decode: float = 0.0  # while compute waited for decode
    waited_for_write: float = 0.0
    waited_for_compute: float = 0.0  # while the writer waited for the device

    def add(self, other: Timings) -> None:
        """Add the seconds of another process."""
        self.preparation += other.preparation
        self.started += other.preparation
        for part in (*PARTS, "waited_for_decode", "waited_for_write", "waited_for_compute"):
            setattr(self, part, getattr(self, part) + getattr(other, part))

    def pace(self, workers: int, decode_threads: int, plan: Plan) -> Throughput:
        """Return the pace of the run so far. `decode_threads` counts those of all workers."""
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
    """What was done. It can be added up over processes."""

    images: int = 0  # in committed shards
    failed: int = 0  # failed images among them
    traits: Counter[Trait] = field(default_factory=Counter)  # how many images have each trait
    overflown: Counter[str] = field(default_factory=Counter)  # values that are not finite, by stage
    clamped: Counter[str] = field(default_factory=Counter)  # shares of values that `gem` clamped, summed, by output
    timings: Timings = field(default_factory=Timings)

    @property
    def pictures(self) -> dict[str, int]:
        """The images of this run and their traits, as `pictures_of` gives them for a whole dump."""
        return {"read": self.images - self.failed, **{str(trait): count for trait, count in self.traits.items()}}

    def add(self, other: RunStats) -> None:
        """Add what another process has done."""
        self.images += other.images
        self.failed += other.failed
        self.traits.update(other.traits)
        self.overflown.update(other.overflown)
        self.clamped.update(other.clamped)
        self.timings.add(other.timings)


@dataclass(frozen=True)
class Throughput:
    """The time of a run, by its parts."""

    seconds: float
    preparation: float  # seconds of loading, trials and compilation before that
    worked: Mapping[str, float]  # seconds, by part, summed over threads
    busy: Mapping[str, float]  # share of the run, by part, averaged over threads
    waited: Mapping[str, float]  # seconds that one part waited for another
    threads: Mapping[str, int]  # by part, of all workers
    set_by: str
    advice: str

    def followed_by(self, other: Throughput) -> Throughput:
        """Return the time of this run and one that came after it. What the longer one says of advice counts."""
        seconds = self.seconds + other.seconds
        longer = max(self, other, key=lambda one: one.seconds)
        worked = {part: round(self.worked[part] + other.worked[part], 3) for part in PARTS}
        waited = {part: round(self.waited[part] + other.waited[part], 3) for part in self.waited}
        shares = {part: self.busy[part] * self.seconds + other.busy[part] * other.seconds for part in PARTS}
        busy = {part: round(share / seconds, 4) if seconds else 0.0 for part, share in shares.items()}
        preparation = round(self.preparation + other.preparation, 3)
        of_both = replace(longer, seconds=round(seconds, 3), preparation=preparation)
        return replace(of_both, worked=worked, busy=busy, waited=waited)

    def lines(self) -> Iterable[str]:
        """Yield lines for people."""
        for part in PARTS:
            threads = f" on {self.threads[part]} threads" if self.threads[part] > 1 else ""
            waited = {name.partition(" for ")[2]: s for name, s in self.waited.items() if name.startswith(part)}
            waits = [f"{seconds:.1f} s for {other}" for other, seconds in waited.items() if seconds >= 0.05]
            text = f"{part:<8} {self.busy[part]:>4.0%} busy: {self.worked[part]:.1f} s of work{threads}"
            together = " in all" if waits and self.threads["compute"] > 1 else ""
            yield text + (f"; waited {', '.join(waits)}{together}" if waits else "")
        yield f"pace set by {self.set_by}; what could help: {self.advice}"


def _advice(slowest: str, decoding: float, computing: float, threads: int, plan: Plan) -> list[str]:
    """Return unused options that would take work from the slowest part. Those that change least come first.

    `decoding` is the share of the run that decoding was busy, which on a CPU slows the backbone. `computing` is in
    seconds. `threads` are those of decoding.
    """
    settings, is_on_cpu = plan.settings, plan.environment.get("device") == "cpu"
    may_be_bf16 = settings.precision == "fp32" or (is_on_cpu and settings.precision == "fp16")
    can_scale = settings.pixels_are_exact and not settings.is_native
    can_be_fast = can_scale and not settings.sizes_by_processor
    options = {
        "decode": {
            "--decode fast": can_be_fast,
            "--decode scaled for large JPEGs": can_scale,
            "more --decode-threads": threads < available_cores(),
            "--precision bf16": is_on_cpu and may_be_bf16,  # they share cores
            "more cores": True,
        },
        "compute": {
            "--compile": not (settings.compiled or settings.is_native) and computing > WORTH_COMPILING,
            "--precision bf16": may_be_bf16,
            "--batch-size auto": not is_on_cpu and settings.batch_size <= SMALL_BATCH,
            "--decode fast": is_on_cpu and decoding > BUSY and can_be_fast,  # they share cores
            "--decode scaled for large JPEGs": is_on_cpu and decoding > BUSY and can_scale,
            "an earlier last stage": True,
            "a faster --device": True,
        },
        "write": {
            "--dtype float16": plan.outputs[0].dtype == "float32",
            "--pool": any(one.is_map for one in plan.outputs),
            "fewer stages": True,
            "a faster disk": True,
        },
    }
    return [text for text, is_open in options[slowest].items() if is_open]
