"""Choose the device, make fp32 exact, and explain a lack of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from featcli.errors import MachineError, UsageError, counted, shown
from featcli.events import Choice
from featcli.system.borrowed import Borrowed

if TYPE_CHECKING:
    import torch

# How allocators, CUDA and its libraries say that no memory is left, in errors without a type of their own.
MEMORY_SAID = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",  # cuBLAS, and cuDNN before version 9
    "ALLOCATION_FAILED",  # cuDNN 9
    "unable to find an engine to execute this computation",  # some exist, but none fits into the memory left
)


def resolve_device(wanted: str, rank: int | None = None) -> Choice[torch.device]:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, once it works.

    Raises UsageError and MachineError.

    `rank` is the number of this process among those on this machine: `auto` gives each a GPU of its own.
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
            f"--device {shown(wanted)}: there is no such device",
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
    """Return the devices of a list such as `cuda:0,cuda:1`; `cuda:all` is every GPU there is. Raises MachineError."""
    if wanted != "cuda:all":
        return tuple(wanted.split(","))
    import torch

    if not torch.cuda.is_available():
        resolve_device("cuda")  # raises, and says why
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Make fp32 mean fp32, and new tensors be fp32, whatever the caller has set for the process."""
    with _ARITHMETIC.set_to(EXACT):
        yield


@contextmanager
def settled_arithmetic(threads: int, device: torch.device) -> Iterator[None]:
    """Use this many threads, and exact fp32: cuDNN would round its inputs to TF32, and time algorithms to choose one.

    A GPU becomes the current one inside the block. Otherwise libraries would also take memory of the first GPU.
    """
    import torch

    before = torch.get_num_threads()  # the number of this thread
    with (
        exact_arithmetic(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False) if device.type == "cuda" else nullcontext(),
        torch.cuda.device(device if device.type == "cuda" else -1),  # -1 changes nothing
    ):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# Where torch.backends has fp32_precision: for everything, for CUDA's libraries, and for each kind of operation.
_ABOVE = ("", "cudnn")
_MATMULS = ("cuda.matmul", "mkldnn.matmul")
_OTHERS = ("cudnn.conv", "cudnn.rnn", "mkldnn.conv", "mkldnn.rnn")
_OLD_MATMUL = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}  # of _MATMULS


@dataclass(frozen=True)
class Arithmetic:
    """The settings of torch that change what fp32 means, and its default dtype. The defaults mean exact fp32.

    Torch has two interfaces, and the older one remembers its own words. "none" means that the setting above applies.
    cuDNN's convolutions can be in a state that nobody can set: TF32 until a setting above says something. So settings
    that allow exact fp32 are left as they are.
    """

    precisions: Mapping[str, str]
    matmul: str = "highest"
    benchmark: bool = False
    dtype: str = "torch.float32"


EXACT = Arithmetic({"": "ieee", "cudnn": "none", **dict.fromkeys(_MATMULS, "ieee")})


def _arithmetic() -> Arithmetic:
    """Read the settings. The older interface can only be read while the newer one agrees with it."""
    import torch

    above, matmuls = {}, {}
    for name in _ABOVE:
        above[name] = _place_of(name).fp32_precision
        _place_of(name).fp32_precision = "none"  # else the settings below would show what they inherit
    try:
        matmuls = {name: _place_of(name).fp32_precision for name in _MATMULS}
        matmul = next(word for word in _OLD_MATMUL if _says(word))
        _place_of("").fp32_precision = "ieee"
        others = {name: _place_of(name).fp32_precision for name in _OTHERS}
    finally:
        _set_precisions({**above, **matmuls})
    in_the_way = {name: precision for name, precision in others.items() if precision != "ieee"}
    precisions = {**above, **matmuls, **in_the_way}
    return Arithmetic(precisions, matmul, torch.backends.cudnn.benchmark, str(torch.get_default_dtype()))


def _says(word: str) -> bool:
    import torch

    _set_precisions(dict(zip(_MATMULS, _OLD_MATMUL[word], strict=True)))
    try:
        return torch.get_float32_matmul_precision() == word
    except RuntimeError:
        return False


def _set_arithmetic(wanted: Arithmetic) -> None:
    import torch

    torch.set_float32_matmul_precision(wanted.matmul)
    torch.backends.cudnn.benchmark = wanted.benchmark
    torch.set_default_dtype(getattr(torch, wanted.dtype.removeprefix("torch.")))
    _set_precisions(wanted.precisions)


def _set_precisions(wanted: Mapping[str, str]) -> None:
    for name, precision in wanted.items():
        _place_of(name).fp32_precision = precision


def _place_of(name: str) -> Any:
    import torch

    return reduce(getattr, filter(None, name.split(".")), torch.backends)


def _exact(before: Arithmetic, _: Sequence[Arithmetic]) -> Arithmetic:
    """Return exact fp32, and overrule all settings that prevent it."""
    return replace(EXACT, precisions={**dict.fromkeys(before.precisions, "ieee"), **EXACT.precisions})


_ARITHMETIC = Borrowed(_arithmetic, _set_arithmetic, _exact)


@contextmanager
def memory_errors(what: str, device: torch.device) -> Iterator[None]:
    """Turn a lack of memory inside the block into one line that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what, device) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch or Python says that memory is short."""
    import torch

    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in text for said in MEMORY_SAID)


def out_of_memory(what: str, device: torch.device) -> MachineError:
    """Return the error that says what does not fit, such as "the backbone does", and what to do."""
    return MachineError(
        f"{what} not fit into the memory of {device}",
        "use a smaller --image-size, a smaller backbone, or another --device",
    )
