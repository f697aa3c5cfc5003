"""How the network is run and how many images go through it together: as asked, as the dump was begun, or measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch

from featcli.backbones.assembly import prepare_network
from featcli.backbones.backbone import Network, as_run
from featcli.backbones.execution import Execution
from featcli.backbones.folding import has_norms
from featcli.backbones.model_spec import ModelSpec
from featcli.dump.plan import StoredStage
from featcli.dump.settings import Settings
from featcli.events import Choice
from featcli.spec.commands import ExtractSpec
from featcli.spec.words import AUTO, DEFAULT_BATCH_SIZE, DEFAULT_LAYOUT, LAYOUTS, Precision
from featcli.system.device import is_out_of_memory
from featcli.system.machine import available_memory, kept_memory

FEWEST = 1000  # images for which it pays to try layouts: the trials take as long as some hundred
AT_ONCE = 8  # images in a trial on a CPU
AT_ONCE_ELSEWHERE = 64  # less would not keep a GPU busy while the next operation is launched
ROUNDS = 3  # of which the fastest counts: whatever else a machine does only ever makes it slower
GAIN = 1.1  # what another layout must bring
PRECISION_GAIN = 1.2  # and another precision
BATCH_GAIN = 1.05  # and twice the batch
CONVOLUTIONS = 0.25  # of the operations: below that the layout of maps in memory hardly matters
MOST_ON_CPU, MOST = 64, 512  # images in a batch that are tried
SHARE_OF_MEMORY = 1 / 12  # for the maps of a batch: three of them are on their way at any time
AS_BEGUN = "as this dump was begun"
TO_MEASURE = "a run measures"


@dataclass(frozen=True)
class Tuning:
    """The choices, each with its reason."""

    execution: Execution
    batch_size: int
    reasons: Mapping[str, str]  # of precision, layout and batch_size


def tune(config: ExtractSpec, trials: Trials, num_images: int, begun: Settings | None) -> Tuning:
    """Choose all that was left open. `begun`: the settings of the plan that is to be gone on with."""
    if begun is not None:
        return _as_begun(config, begun)
    if config.batch_size != AUTO:
        trials.images = min(trials.images, int(config.batch_size))
    with kept_memory():
        execution, precision_reason, layout_reason = _execution(config, trials, num_images)
        batch_size = _batch_size(config, trials, execution)
    trials.forget()
    reasons = {"precision": precision_reason, "layout": layout_reason, "batch_size": batch_size.reason}
    return Tuning(replace(execution, compiled=config.compile), batch_size.value, reasons)


def _as_begun(config: ExtractSpec, begun: Settings) -> Tuning:
    """Parts and resumed runs do as the first one did, whatever they would measure."""

    def settled(name: str, asked: Any) -> Choice[Any]:
        return (
            Choice(getattr(begun, name), AS_BEGUN) if asked in (None, AUTO) else Choice(asked, reason_for(name, asked))
        )

    precision, layout = settled("precision", config.precision), settled("layout", config.layout)
    folded, batch_size = settled("folded", config.fold), settled("batch_size", config.batch_size)
    layout_reason = layout.reason if layout.reason == folded.reason else f"{layout.reason}; folding {folded.reason}"
    reasons = {"precision": precision.reason, "layout": layout_reason, "batch_size": batch_size.reason}
    execution = Execution(precision=precision.value, layout=layout.value, folded=folded.value, compiled=config.compile)
    return Tuning(execution, batch_size.value, reasons)


def reason_for(name: str, asked: Any) -> str:
    """Why an option is what was given."""
    is_default = {"precision": "fp32", "batch_size": DEFAULT_BATCH_SIZE}.get(name) == asked
    return "default" if is_default else "as asked"


def expected(
    config: ExtractSpec, source: ModelSpec, positions: Sequence[int], num_images: int, begun: Settings | None
) -> Iterator[tuple[str, Choice[Any]]]:
    """What a run would choose, by name, as far as that is known before anything is measured."""
    if begun is not None:
        tuning = _as_begun(config, begun)
        yield "precision", Choice(tuning.execution.precision, tuning.reasons["precision"])
        yield "layout", Choice(named(tuning.execution), tuning.reasons["layout"])
        yield "batch size", Choice(tuning.batch_size, tuning.reasons["batch_size"])
        return
    to_measure, layout = Choice(AUTO, TO_MEASURE), untried_layout(config, source, positions, num_images)
    precision, batch_size = (
        to_measure if asked == AUTO else Choice(asked, reason_for(name, asked))
        for name, asked in (("precision", config.precision), ("batch_size", config.batch_size))
    )
    yield "precision", precision
    yield "layout", to_measure if layout is None else Choice(named(layout.value), layout.reason)
    yield "batch size", batch_size


@dataclass
class Trials:
    """How fast throwaway networks of a kind are: speed does not ask what the weights are."""

    source: ModelSpec
    positions: Sequence[int]
    stages: Sequence[StoredStage]
    device: torch.device
    began: Callable[[], None] = lambda: None  # called before the first trial
    images: int = field(init=False)  # that go through the network together, where nothing else is asked for
    rates: dict[tuple[Execution, int], float] = field(default_factory=dict)
    _last: tuple[Execution, Network] | None = None

    def __post_init__(self) -> None:
        self.images = AT_ONCE if self.device.type == "cpu" else AT_ONCE_ELSEWHERE

    def rate(self, execution: Execution, images: int = 0) -> float:
        """Images a second, the maps laid out as on disk included; 0 where they do not fit into memory.

        Only the first way that is tried may raise: where the network does not take another, that one is out.
        """
        images = images or self.images
        if (execution, images) not in self.rates:
            try:
                self.rates[execution, images] = self._measure(execution, images)
            except Exception as error:  # networks refuse layouts and precisions in many ways
                if not self.rates and not is_out_of_memory(error):
                    raise
                self.rates[execution, images] = 0.0
        return self.rates[execution, images]

    def make_room(self, execution: Execution) -> None:
        """Try with fewer images from now on where so many do not fit, for ways to be compared with what is there."""
        while self.images > 1 and not self.rate(execution):
            self.images //= 2

    def compared(self, one: Execution, other: Execution) -> float:
        """How many times as fast one is."""
        if self.rate(other):
            return self.rate(one) / self.rate(other)
        return inf if self.rate(one) else 1.0

    def forget(self) -> None:
        """Let go of the last network: the real one needs the memory."""
        self._last = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, execution: Execution, images: int) -> float:
        if not self.rates:
            self.began()
        network = self._network(execution)
        pixels = torch.rand(images, self.source.channels, *self.source.input_size, device=self.device)
        dtypes = [getattr(torch, stage.dtype) for stage in self.stages]
        seconds = []
        with torch.inference_mode():
            pixels = as_run(pixels, execution)
            for _ in range(1 + ROUNDS):  # the first warms up
                began = time.perf_counter()
                for found, dtype in zip(network.maps(pixels), dtypes, strict=True):
                    torch.empty(found.shape, dtype=dtype, device=self.device).copy_(found)
                if self.device.type != "cpu":
                    torch.accelerator.synchronize(self.device)
                seconds.append(time.perf_counter() - began)
        return images / min(seconds[1:])

    def _network(self, execution: Execution) -> Network:
        if self._last is None or self._last[0] != execution:
            self.forget()
            blank = self.source.build(self.positions, "cpu")
            self._last = execution, prepare_network(self.source, blank, self.device, execution)[0]
        return self._last[1]


def _execution(config: ExtractSpec, trials: Trials, num_images: int) -> tuple[Execution, str, str]:
    """How to run, and the reasons for the precision and for the layout."""
    layouts, why_not = _layouts(config, trials, num_images)
    is_open = config.precision == AUTO and trials.device.type in ("cpu", "cuda")
    asked: Precision = "fp32" if config.precision == AUTO else config.precision
    precisions: list[Precision] = ["fp32", "bf16"] if is_open else [asked]
    if len(layouts) * len(precisions) > 1:
        trials.make_room(layouts[0])
    found = [_best([replace(layout, precision=p) for layout in layouts], trials, why_not) for p in precisions]
    best, layout_reason = found[0]
    if config.precision != AUTO:
        return best, reason_for("precision", config.precision), layout_reason
    if len(found) == 1:
        return best, f"auto: the one to use on {trials.device.type}", layout_reason
    gain = trials.compared(found[1][0], best)
    if gain >= PRECISION_GAIN:
        return found[1][0], f"auto: {_times(gain)} as fast as fp32 here", found[1][1]
    return best, f"auto: bf16 would be {gain:.2f} x as fast here, which is less than {PRECISION_GAIN}", layout_reason


def untried_layout(
    config: ExtractSpec, source: ModelSpec, positions: Sequence[int], num_images: int
) -> Choice[Execution] | None:
    """The layout where no other is tried, and why not; None where some are."""
    asked = _layout_asked(config)
    if config.layout != AUTO and config.fold is not None:
        return asked
    if source.share_of_convolutions(positions) < CONVOLUTIONS:
        return replace(asked, reason=f"{asked.reason}: few convolutions")
    if num_images < FEWEST:
        faster = "; --layout channels-last --fold may be faster" if asked.reason == AUTO else ""
        return replace(asked, reason=f"{asked.reason}: fewer than {FEWEST:,} images{faster}")
    return None


def _layout_asked(config: ExtractSpec) -> Choice[Execution]:
    """What the options say of it; the library's own way where they say nothing."""
    layout, folded = DEFAULT_LAYOUT if config.layout == AUTO else config.layout, bool(config.fold)
    layout_is_open, fold_is_open = config.layout == AUTO, config.fold is None
    reasons = {(True, True): AUTO, (True, False): "folding as asked; auto", (False, True): "as asked; folding auto"}
    return Choice(Execution(layout=layout, folded=folded), reasons.get((layout_is_open, fold_is_open), "as asked"))


def _layouts(config: ExtractSpec, trials: Trials, num_images: int) -> tuple[list[Execution], str]:
    """What is to be tried, the library's own way first; and where that is all there is, why."""
    untried = untried_layout(config, trials.source, trials.positions, num_images)
    if untried is not None:
        return [untried.value], untried.reason
    way = _layout_asked(config)
    asked, reason = way.value, way.reason
    can_fold = config.fold is None and has_norms(trials.source.build(trials.positions, "meta"))
    folded = replace(asked, folded=asked.folded or can_fold)
    layouts = LAYOUTS if config.layout == AUTO else (asked.layout,)
    return list(dict.fromkeys([asked, *(replace(folded, layout=layout) for layout in layouts)])), reason


def _best(candidates: Sequence[Execution], trials: Trials, why_not: str) -> tuple[Execution, str]:
    """The first, unless another is faster by GAIN. `why_not`: the reason where there is no other."""
    if len(candidates) == 1:
        return candidates[0], why_not
    fastest = max(candidates, key=trials.rate)
    gain = trials.compared(fastest, candidates[0])
    if gain < GAIN:
        return candidates[0], f"auto: no other is {GAIN} x as fast here"
    return fastest, f"auto: {_times(gain)} as fast as {named(candidates[0])} here"


def _times(gain: float) -> str:
    return "more than 100 x" if gain > 100 else f"{gain:.1f} x"  # where the other does not fit into memory


def _batch_size(config: ExtractSpec, trials: Trials, execution: Execution) -> Choice[int]:
    """Twice as many as long as that is faster, and the maps of three batches stay a small part of the memory."""
    if config.batch_size != AUTO:
        return Choice(int(config.batch_size), reason_for("batch_size", config.batch_size))
    row_bytes = sum(stage.row_bytes(trials.source.input_size) for stage in trials.stages)
    most = int(available_memory() * SHARE_OF_MEMORY / max(1, row_bytes))
    most = max(1, min(most, MOST_ON_CPU if trials.device.type == "cpu" else MOST))
    best = min(trials.images, most)
    while best > 1 and not trials.rate(execution, best):
        best //= 2
    while best * 2 <= most and trials.rate(execution, best * 2) >= max(BATCH_GAIN * trials.rate(execution, best), 1e-9):
        best *= 2
    tried = sorted((images, rate) for (one, images), rate in trials.rates.items() if one == execution)
    return Choice(best, f"auto: {', '.join(f'{images} at {rate:.0f} images/s' for images, rate in tried)}")


def named(execution: Execution) -> str:
    """The layout for people."""
    return execution.layout + (", norms folded" if execution.folded else "")
