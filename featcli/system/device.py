"""Choices that featcli makes for the user, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from featcli.errors import MachineError, UsageError, counted, shown
from featcli.events import Choice

if TYPE_CHECKING:
    import torch

# How allocators, CUDA and its libraries say that there is no memory left, in errors of no type of their own.
MEMORY_SAID = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",  # cuBLAS, and cuDNN up to 8
    "ALLOCATION_FAILED",  # cuDNN 9
    "unable to find an engine to execute this computation",  # there are some, but none fits into what is left
)


def resolve_device(wanted: str, rank: int | None = None) -> Choice[torch.device]:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a device that works. Raises UsageError and MachineError.

    `rank`: which of several processes on this machine asks: `auto` gives each a GPU of its own.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        if gpus:
            reason = f"auto: {counted(gpus, 'GPU')}" + ("" if rank is None else f", local rank {rank}")
            return Choice(torch.device("cuda", (rank or 0) % gpus), reason)
        if torch.backends.mps.is_available():
            return Choice(torch.device("mps"), "auto: Apple GPU")
        return Choice(torch.device("cpu"), "auto: no GPU found")
    kind, _, number = wanted.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", wanted):
        raise UsageError(
            f"--device {shown(wanted)}: no such kind of device",
            "use auto, cpu, cuda, cuda:N, mps, a list of them, or cuda:all",
        )
    if kind == "cuda" and not gpus:
        why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise MachineError(f"--device {wanted}: {why}", "use --device cpu, or install the torch build for your driver")
    if kind == "cuda" and number and int(number) >= gpus:
        raise MachineError(f"--device {wanted}: there are {gpus} GPUs", f"use cuda:0 to cuda:{gpus - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise MachineError("--device mps: torch finds no Apple GPU", "use --device cpu")
    return Choice(torch.device(wanted if number or kind != "cuda" else "cuda:0"), "as asked")


def device_names(wanted: str) -> tuple[str, ...]:
    """The devices of a list such as `cuda:0,cuda:1`; `cuda:all` is every GPU there is. Raises MachineError."""
    if wanted != "cuda:all":
        return tuple(wanted.split(","))
    import torch

    if not torch.cuda.is_available():
        resolve_device("cuda")  # says why
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


@contextmanager
def settled_arithmetic(threads: int, device: torch.device) -> Iterator[None]:
    """So many threads, and fp32 that means fp32: cuDNN would round its inputs to TF32, and tune itself by the clock.

    A GPU is the current one meanwhile: else libraries would take memory of the first one beside it.
    """
    import torch

    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    matmul = torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: all stays as it is
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


@contextmanager
def memory_errors(what: str, device: torch.device) -> Iterator[None]:
    """Whatever inside does not fit into memory, as one line with what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what, device) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of torch or Python says."""
    import torch

    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in text for said in MEMORY_SAID)


def out_of_memory(what: str, device: torch.device) -> MachineError:
    """What does not fit ("the backbone does"), as one line with what to do."""
    return MachineError(
        f"{what} not fit into the memory of {device}",
        "use a smaller --image-size, a smaller backbone, or another --device",
    )
