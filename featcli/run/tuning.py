"""Choose how the network runs, and how many images go through it together: as asked, as before, or as measured.

Every choice has a reason, which the run prints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from featcli.backbones.execution import Execution
from featcli.backbones.folding import has_norms
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.stages import Points
from featcli.dump.settings import Settings
from featcli.errors import duration
from featcli.events import Choice
from featcli.run.trials import Trials
from featcli.spec.commands import ExtractSpec
from featcli.spec.option import options_of
from featcli.spec.words import AUTO, DEFAULT_BATCH_SIZE, DEFAULT_LAYOUT, LAYOUTS, NATIVE, Precision
from featcli.system.device import device_names
from featcli.system.machine import available_memory, kept_memory

FEWEST = 1000  # images; with fewer, trials of layouts do not pay, because they take as long as some hundred images
GAIN = 1.1  # that another layout must bring
PRECISION_GAIN = 1.2  # that another precision must bring
BATCH_GAIN = 1.05  # that twice the batch must bring
CONVOLUTIONS = 0.25  # of the operations; below that, the layout of maps in memory hardly matters
MOST_ON_CPU, MOST = 64, 512  # images in the largest batch that is tried
SHARE_OF_MEMORY = 1 / 12  # for the maps of a batch: three batches are on their way at any time
FEWEST_FOR_BATCHES = 10_000  # images; a trial of batch sizes takes as long as some 200
SMALLER = (16, 8)  # batches that are tried beside the default one
LONG = 1800.0  # seconds of a run in which compiling is tried
COMPILE_GAIN = 1.05  # that compiling must bring
WORTH = 3  # times its own time that compiling must save
# The most that compiling may move a map, of its largest number: about what other arithmetic in this precision does.
MOVED: Mapping[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
AS_BEGUN = "as this dump was begun"
DEFAULTS = {option.name: option.default for option in options_of(ExtractSpec)}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the network will be run."""

    precision: Choice[Precision]
    layout: Choice[Execution]  # layout and folding, in that precision
    batch_size: Choice[int]
    compiled: Choice[bool]

    @property
    def execution(self) -> Execution:
        """All of it except the batch size."""
        return replace(self.layout.value, precision=self.precision.value, compiled=self.compiled.value)


def tune(asked: ExtractSpec, trials: Trials, num_images: int, begun: Settings | None) -> Tuning:
    """Choose all that was left open for a run of this many images.

    `begun` are the settings of the plan that is resumed, or None.
    """
    if begun is not None:
        return _as_begun(asked, begun)
    if isinstance(asked.batch_size, int):
        trials.images = min(trials.images, asked.batch_size)
    with kept_memory():
        precision, layout = _precision_and_layout(asked, trials, num_images)
        batch_size = _batch_size(asked, trials, layout.value, num_images)
        compiled = _compiled(asked, trials, layout.value, batch_size.value, num_images)
    trials.forget()
    return Tuning(precision=precision, layout=layout, batch_size=batch_size, compiled=compiled)


def expected(
    asked: ExtractSpec, model: ModelSpec, points: Points, device: str, num_images: int, begun: Settings | None
) -> Mapping[str, Choice[Any]]:
    """Return what a run would choose, by name, as far as it is known without measuring."""
    if begun is not None:
        tuning = _as_begun(asked, begun)
        precision: Choice[Any] = tuning.precision
        layout: Choice[Execution] | None = tuning.layout
        batch_size: Choice[Any] = tuning.batch_size
    else:
        precision = _as_asked("precision", asked.precision)
        layout = untried_layout(asked, model, points, num_images)
        batch_size = untried_batch_size(asked, model, points, device, num_images) or _to_measure()
    named_layout = _to_measure() if layout is None else Choice(named(layout.value), layout.reason)
    return {"precision": precision, "layout": named_layout, "batch size": batch_size}


def named(execution: Execution) -> str:
    """Return the layout for people."""
    return execution.layout + (", norms folded" if execution.folded else "")


def untried_layout(asked: ExtractSpec, model: ModelSpec, points: Points, num_images: int) -> Choice[Execution] | None:
    """Return the layout and why no other is tried, or None if others are tried."""
    plain = _layout_asked(asked)
    if asked.layout != AUTO and asked.fold is not None:
        return plain
    if model.share_of_convolutions(points) < CONVOLUTIONS:
        return replace(plain, reason=f"{plain.reason}: few convolutions")
    if num_images < FEWEST:
        faster = "; --layout channels-last --fold may be faster" if plain.reason == AUTO else ""
        return replace(plain, reason=f"{plain.reason}: fewer than {FEWEST:,} images{faster}")
    return None


def _as_begun(asked: ExtractSpec, begun: Settings) -> Tuning:
    """Return the choices of the first run: parts and resumed runs do the same, whatever they would measure."""

    def settled(name: str, value: Any) -> Choice[Any]:
        is_open = value is None or value == AUTO
        return Choice(getattr(begun, name), AS_BEGUN) if is_open else _as_asked(name, value)

    layout, folded = settled("layout", asked.layout), settled("folded", asked.fold)
    reason = layout.reason if layout.reason == folded.reason else f"{layout.reason}; folding {folded.reason}"
    batch_size = settled("batch_size", asked.batch_size)
    if asked.batch_size is None and batch_size.value == DEFAULT_BATCH_SIZE:
        batch_size = Choice(DEFAULT_BATCH_SIZE, "default")
    return Tuning(
        precision=settled("precision", asked.precision),
        layout=Choice(Execution(layout=layout.value, folded=folded.value), reason),
        batch_size=batch_size,
        compiled=settled("compiled", asked.compile),
    )


def _as_asked(name: str, value: Any) -> Choice[Any]:
    """Return the value of an option, or say that a run measures it."""
    if value == AUTO:
        return _to_measure()
    return Choice(value, "default" if DEFAULTS.get(name) == value else "as asked")


def _to_measure() -> Choice[str]:
    return Choice(AUTO, "a run measures")


def _precision_and_layout(
    asked: ExtractSpec, trials: Trials, num_images: int
) -> tuple[Choice[Precision], Choice[Execution]]:
    """Choose precision and layout together, because a layout may be fast in one precision only."""
    layouts, why_alone = _layouts(asked, trials, num_images)
    precisions = _precisions(asked, trials.device.type)
    if len(layouts) * len(precisions) > 1:
        trials.make_room(layouts[0])
    fastest = {
        one: _fastest([replace(layout, precision=one) for layout in layouts], trials, why_alone) for one in precisions
    }
    first = precisions[0]
    if asked.precision != AUTO:
        return _as_asked("precision", asked.precision), fastest[first]
    if len(precisions) == 1:
        return Choice(first, f"auto: the one to use on {trials.device.type}"), fastest[first]
    other = precisions[1]
    gain = trials.compared(fastest[other].value, fastest[first].value)
    if gain >= PRECISION_GAIN:
        return Choice(other, f"auto: {_times(gain)} as fast as {first} here"), fastest[other]
    reason = f"auto: {other} would be {gain:.2f} x as fast here, which is less than {PRECISION_GAIN}"
    return Choice(first, reason), fastest[first]


def _precisions(asked: ExtractSpec, device: str) -> tuple[Precision, ...]:
    """Return the precisions to try, with the one to keep first."""
    if asked.precision != AUTO:
        return (asked.precision,)
    return ("fp32", "bf16") if device in ("cpu", "cuda") else ("fp32",)


def _layout_asked(asked: ExtractSpec) -> Choice[Execution]:
    """Return the layout that the options ask for. What they leave open is the library's own."""
    layout, folded = DEFAULT_LAYOUT if asked.layout == AUTO else asked.layout, bool(asked.fold)
    layout_is_open, fold_is_open = asked.layout == AUTO, asked.fold is None
    reasons = {(True, True): AUTO, (True, False): "folding as asked; auto", (False, True): "as asked; folding auto"}
    return Choice(Execution(layout=layout, folded=folded), reasons.get((layout_is_open, fold_is_open), "as asked"))


def _layouts(asked: ExtractSpec, trials: Trials, num_images: int) -> tuple[list[Execution], str]:
    """Return the layouts to try, the library's own first. If there is only one, the second value says why."""
    untried = untried_layout(asked, trials.model, trials.points, num_images)
    if untried is not None:
        return [untried.value], untried.reason
    plain = _layout_asked(asked)
    can_fold = asked.fold is None and has_norms(trials.model.build(trials.points, "meta"))
    folded = replace(plain.value, folded=plain.value.folded or can_fold)
    layouts = LAYOUTS if asked.layout == AUTO else (plain.value.layout,)
    return list(dict.fromkeys([plain.value, *(replace(folded, layout=layout) for layout in layouts)])), plain.reason


def _fastest(candidates: Sequence[Execution], trials: Trials, why_alone: str) -> Choice[Execution]:
    """Return the first candidate, unless another is faster by GAIN. `why_alone` is the reason if there is no other."""
    first = candidates[0]
    if len(candidates) == 1:
        return Choice(first, why_alone)
    fastest = max(candidates, key=trials.rate)
    gain = trials.compared(fastest, first)
    if gain < GAIN:
        return Choice(first, f"auto: no other is {GAIN} x as fast here")
    return Choice(fastest, f"auto: {_times(gain)} as fast as {named(first)} here")


def _times(gain: float) -> str:
    return "more than 100 x" if gain > 100 else f"{gain:.1f} x"  # the other may not fit into memory


def untried_batch_size(
    asked: ExtractSpec, model: ModelSpec, points: Points, device: str, num_images: int
) -> Choice[int] | None:
    """Return the batch size and why no other is tried, or None if others are tried.

    On a CPU the maps of a batch of a vision transformer leave its caches. Convolutions work on parts of a map anyway.
    """
    if asked.batch_size == AUTO:
        return None
    if asked.batch_size is not None:
        return _as_asked("batch_size", int(asked.batch_size))
    is_tried = num_images >= FEWEST_FOR_BATCHES and asked.fit != NATIVE and asked.part is None and device == "cpu"
    is_tried = is_tried and model.share_of_convolutions(points) < CONVOLUTIONS
    return None if is_tried else Choice(DEFAULT_BATCH_SIZE, "default")


def _batch_size(asked: ExtractSpec, trials: Trials, execution: Execution, num_images: int) -> Choice[int]:
    untried = untried_batch_size(asked, trials.model, trials.points, trials.device.type, num_images)
    if untried is not None:
        return untried
    if asked.batch_size is None:
        return _smaller_batch(trials, execution)
    return _fastest_batch(trials, execution)


def _smaller_batch(trials: Trials, execution: Execution) -> Choice[int]:
    """Return the default batch size, unless fewer images at once are faster by GAIN."""
    first = DEFAULT_BATCH_SIZE
    fastest = max((first, *SMALLER), key=lambda images: trials.rate(execution, images))
    least = trials.rate(execution, first)
    if fastest == first or trials.rate(execution, fastest) < GAIN * least:
        return Choice(first, f"auto: no fewer are {GAIN} x as fast here")
    gain = trials.rate(execution, fastest) / least if least else inf
    return Choice(fastest, f"auto: {_times(gain)} as fast as {first} here")


def _fastest_batch(trials: Trials, execution: Execution) -> Choice[int]:
    """Double the batch while that is faster and the maps of three batches take a small part of the memory."""
    row_bytes = sum(stage.row_bytes(trials.model.input_size) for stage in trials.outputs)
    most = int(available_memory() * SHARE_OF_MEMORY / max(1, row_bytes))
    most = max(1, min(most, MOST_ON_CPU if trials.device.type == "cpu" else MOST))
    best = min(trials.images, most)
    while best > 1 and not trials.rate(execution, best):
        best //= 2
    while best * 2 <= most and trials.rate(execution, best * 2) >= max(BATCH_GAIN * trials.rate(execution, best), 1e-9):
        best *= 2
    tried = sorted((images, rate) for (one, images), rate in trials.rates.items() if one == execution)
    return Choice(best, f"auto: {', '.join(f'{images} at {rate:.0f} images/s' for images, rate in tried)}")


def _compiled(
    asked: ExtractSpec, trials: Trials, execution: Execution, batch_size: int, num_images: int
) -> Choice[bool]:
    """Return whether to compile the network: in a long run, if it saves more time than it takes.

    Compiling is measured on a throwaway network, so it is paid for twice. A network whose maps it would move by more
    than other arithmetic does stays as it is.
    """
    if asked.compile is not None:
        return Choice(asked.compile, "as asked")
    is_shared = asked.part is not None or asked.engine == "ray"  # with machines that may have no compiler
    if asked.fit == NATIVE or is_shared or num_images < FEWEST_FOR_BATCHES:
        return Choice(False, AUTO)
    workers = len(device_names(asked.device))
    rate = trials.rate(execution)
    seconds = num_images / workers / rate if rate else 0.0
    if seconds < LONG:
        return Choice(False, AUTO)
    other, rate = replace(execution, compiled=True), trials.rate(execution, batch_size)
    began = time.perf_counter()
    gain = trials.rate(other, batch_size) / rate if rate else 0.0
    cost = time.perf_counter() - began
    if not gain:
        return Choice(False, "auto: torch.compile does not run here")
    saved = seconds * (1 - 1 / gain)
    if gain < COMPILE_GAIN or saved < WORTH * cost:
        return Choice(False, f"auto: it would be {gain:.2f} x as fast here, which does not pay")
    moved = trials.moved_by_compiling(other, batch_size)
    if not moved <= MOVED[execution.precision]:
        return Choice(False, f"auto: it would move maps by {moved:.0e} of their largest number")
    return Choice(True, f"auto: {gain:.2f} x as fast here, which saves {duration(saved)} of {duration(seconds)}")
