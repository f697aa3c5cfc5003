"""Load a backbone and all that goes with it from options, in the process that plans a run and in its workers."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

import featcli
from featcli.backbones.assembly import assemble_backbone
from featcli.backbones.backbone import Backbone
from featcli.backbones.checkpoint import resolve
from featcli.backbones.execution import Execution
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.stages import Points
from featcli.dump.plan import Output, Plan
from featcli.dump.settings import Settings
from featcli.errors import UsageError
from featcli.events import Choice, Report, silent
from featcli.pixels import extras
from featcli.pixels.bands import refuse_idle_rules
from featcli.pixels.colour import settings_of
from featcli.pixels.decode_processes import CAN_SHARE
from featcli.pixels.decoder import Decoder
from featcli.run.outputs import outputs_of
from featcli.run.resuming import InMannerOf
from featcli.run.trials import Trials
from featcli.run.tuning import AS_BEGUN, Tuning, named, tune
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import PixelSpec
from featcli.spec.option import narrowed
from featcli.spec.words import AUTO, NATIVE
from featcli.system.device import device_names, memory_errors, resolve_device, settled_arithmetic
from featcli.system.machine import available_cores

THREADS_OF_INTERPRETER = 8  # that decode JPEGs of 500x375 and hardly wait for one another
MANY_IMAGES = 50_000  # that take longer than processes take to start


@dataclass(frozen=True)
class Setup:
    """All that makes rows from images in a process. It is loaded once and used for every shard."""

    backbone: Backbone
    plan: Plan
    decoder: Decoder
    threads: int


def load(asked: ExtractSpec, plan: Plan) -> Setup:
    """Load in another process what a run has loaded, by the plan of its dump. Raises what `prepare` raises.

    The result holds the plan that these options lead to on this machine, so that the caller can compare the two.
    """
    selection = select(asked, resolve_device(asked.device)).worded_as(plan)
    loading = load_selected(asked, selection, plan.num_images, plan, silent)
    found = replace(plan, settings=loading.settings, outputs=selection.outputs, environment=loading.environment)
    return loading.setup(asked, found)


@dataclass(frozen=True)
class Selection:
    """The chosen stages of a checkpoint, and the device that computes them."""

    model: ModelSpec
    points: Points
    outputs: tuple[Output, ...]
    device: Choice[torch.device]

    def worded_as(self, begun: Plan) -> Selection:
        """Return the same with the plan's words: another version of a library may name modules of stages otherwise."""
        before = {one.name: one.module for one in begun.outputs}
        outputs = (replace(one, module=before.get(one.name, one.module)) for one in self.outputs)
        return replace(self, outputs=tuple(outputs))


@dataclass(frozen=True)
class LoadedBackbone:
    """A loaded backbone, and all that goes with it."""

    backbone: Backbone
    decoder: Decoder
    threads: Choice[int]
    settings: Settings
    environment: Mapping[str, str]

    def setup(self, asked: ExtractSpec, plan: Plan) -> Setup:
        """Return what makes the rows of a plan."""
        return Setup(self.backbone, plan, self.decoder, self.threads.value)


def select(asked: ExtractSpec, device: Choice[torch.device]) -> Selection:
    """Return the stages that the options mean. Reads no weights. Raises UsageError and CheckpointError."""
    model = resolve(asked)
    refuse_idle_rules(narrowed(asked, PixelSpec), model.channels)
    points = model.choose(asked.features, asked.indices)
    if asked.fit == NATIVE:
        model.refuse_other_sizes(points)
    return Selection(model, points, outputs_of(asked, model, points), device)


def load_selected(
    asked: ExtractSpec,
    selection: Selection,
    num_images: int,
    begun: Plan | None,
    report: Report,
    loaded: Backbone | None = None,
) -> LoadedBackbone:
    """Load the backbone. `begun` is the plan of the dump that is resumed, or None.

    `loaded` is a backbone of the same checkpoint, which is taken if it is what the run needs. Raises UsageError,
    CheckpointError and MachineError.
    """
    model, device, before = selection.model, selection.device.value, None if begun is None else begun.settings
    threads = threads_of(asked, before)
    with memory_errors("the backbone does", device), settled_arithmetic(threads.value, device):
        trials = Trials(model, selection.points, selection.outputs, device, partial(_report_trials, report))
        tuning = tune(asked, trials, num_images, before)
        backbone = None if loaded is None else _as_loaded(loaded, selection, tuning.execution, report)
        if backbone is None:
            backbone = assemble_backbone(model, selection.points, device, tuning.execution)
    _report_tuning(device, backbone.execution, tuning, report)
    rules = narrowed(asked, PixelSpec)
    decode_threads = decode_threads_of(asked)
    processes = decode_processes_of(asked, decode_threads, device, num_images)
    decoder = Decoder(rules, backbone.preprocessing, decode_threads, device.type == "cuda", processes)
    settings = _settings(asked, backbone, rules, threads.value, tuning.batch_size.value)
    if begun is not None and begun.format_version == 1:
        settings = replace(settings, pool=",".join(dict.fromkeys(one.reduction for one in selection.outputs)))
    environment = _environment(device, model.library, rules)
    if begun is not None:
        settings = InMannerOf(begun, environment, report).settings(settings, model, backbone.preprocessing)
    return LoadedBackbone(backbone, decoder, threads, settings, environment)


def _as_loaded(loaded: Backbone, selection: Selection, execution: Execution, report: Report) -> Backbone | None:
    """Return a loaded backbone with the preprocessing of this run, or None, with the reason told, if it is another."""
    model, points = selection.model, selection.points
    theirs = [*loaded.out_features, *(vector.name for vector in loaded.vectors)]
    ours = [*(model.stages[position].name for position in points.positions), *points.vectors]
    other = ""
    if loaded.device != selection.device.value:
        other = f"this run computes on {selection.device.value}, and it is on {loaded.device}"
    elif loaded.execution != execution:
        other = f"this run computes in {_said(execution)}, and it in {_said(loaded.execution)}"
    elif theirs != ours:
        other = f"this run takes {', '.join(ours)}, and it gives {', '.join(theirs)}"
    elif loaded.settings != model.settings():
        other = "this run builds the network otherwise: for another norm or input size, or --fit native"
    value = "loaded anew" if other else "the loaded one"
    report("choice", name="backbone", value=value, reason=other or "its weights are not read again in this process")
    return None if other else replace(loaded, preprocessing=model.preprocessing())


def _said(execution: Execution) -> str:
    compiled = ", compiled" if execution.compiled else ""
    return f"{execution.precision}, {named(execution)}{compiled}"


def _report_trials(report: Report) -> None:
    report("choice", name="trying", value="ways to run the network", reason="some short runs of each")


def _report_tuning(device: torch.device, execution: Execution, tuning: Tuning, report: Report) -> None:
    report("choice", name="precision", value=execution.precision, reason=tuning.precision.reason)
    report("choice", name="layout", value=named(execution), reason=tuning.layout.reason)
    if device.type == "cpu" and execution.precision == "fp16":
        report("warning", text="fp16 is slow on most CPUs; bf16 is what newer ones are built for")
    if tuning.compiled.value:
        said = f"{tuning.compiled.reason}; it takes up to half a minute before the first batch"
        report("choice", name="compile", value="yes", reason=said)
    elif tuning.compiled.reason.startswith(f"{AUTO}: "):  # it was tried
        report("choice", name="compile", value="no", reason=tuning.compiled.reason)
    report("choice", name="batch size", value=tuning.batch_size.value, reason=tuning.batch_size.reason)


def threads_of(asked: ExtractSpec, begun: Settings | None) -> Choice[int]:
    """Return the threads of the forward pass. They can change the last bits, so a dump keeps its first number."""
    if asked.threads != AUTO:
        return Choice(int(asked.threads), "as asked")
    if begun is not None:
        return Choice(begun.threads, AS_BEGUN)
    cores = available_cores()
    if (workers := num_workers(asked)) > 1:
        return Choice(max(1, cores // workers), f"auto: {cores} cores, {workers} workers")
    if torch.get_num_threads() > cores:  # torch does not know about quotas
        return Choice(cores, "auto: the cores that may be used")
    return Choice(torch.get_num_threads(), "auto: torch's own choice")


def num_workers(asked: ExtractSpec) -> int:
    """Return the number of workers on this machine; each has a process of its own."""
    return len(device_names(asked.device))


def decode_threads_of(asked: ExtractSpec) -> int:
    """Return the decode threads of each worker."""
    if asked.decode_threads != AUTO:
        return int(asked.decode_threads)
    return max(1, available_cores() // num_workers(asked))


def decode_processes_of(asked: ExtractSpec, threads: int, device: torch.device, num_images: int) -> int:
    """Return how many processes decode beside each that computes. Raises UsageError where there can be none.

    The threads of one interpreter wait for its lock where there are more than THREADS_OF_INTERPRETER: docs/speed.md has
    the measurement. On a CPU the backbone has the cores.
    """
    if asked.decode_processes != AUTO:
        if asked.decode_processes and not CAN_SHARE:
            raise UsageError("--decode-processes: this system has no memory that processes can share", "leave it out")
        return min(int(asked.decode_processes), threads)
    pays = CAN_SHARE and device.type != "cpu" and threads > THREADS_OF_INTERPRETER and num_images >= MANY_IMAGES
    return -(-threads // THREADS_OF_INTERPRETER) if pays else 0


def _settings(asked: ExtractSpec, backbone: Backbone, rules: PixelSpec, threads: int, batch_size: int) -> Settings:
    """Return what was chosen, as the plan holds it."""
    execution = backbone.execution
    return Settings(
        backbone=dict(backbone.settings),
        weights_digest=backbone.digest,
        preprocessing={**backbone.preprocessing.settings, **settings_of(rules)},
        precision=execution.precision,
        layout=execution.layout,
        folded=execution.folded,
        compiled=execution.compiled,
        batch_size=batch_size,
        threads=threads,
        format=asked.format,
    )


def _environment(device: torch.device, library: str, rules: PixelSpec) -> dict[str, str]:
    """Return what can change the last bits of a result and cannot be set by an option."""
    import h5py
    import PIL
    import timm

    return {
        "featcli": featcli.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        **extras.in_use(rules.decode),
        **({"transformers": sys.modules["transformers"].__version__} if library == "transformers" else {}),
        **({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
