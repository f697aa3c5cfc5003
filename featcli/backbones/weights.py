"""Read the state dict inside weights files, and hash them. Code from a file never runs."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from featcli.backbones.hub import find_weights
from featcli.backbones.internals import class_in_pickle, ends_too_early, numpy_numbers
from featcli.errors import CheckpointError, FeatcliError, UsageError, did_you_mean, nearest, shown
from featcli.system.borrowed import silent_warnings
from featcli.system.files import is_file, reading

# Training checkpoints hold the weights beside optimizers and counters, and the averaged ones are the better model. The
# first of these that exists is used, whatever else is there.
CONTAINERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema", "state_dict", "model_state_dict", "model",
    "teacher", "module", "net", "network", "params", "weights", "backbone", "student",
)  # fmt: skip
DEEPEST = 4  # containers in containers; vissl's are in classy_state_dict.base_model.model.trunk
LEAST_SHARE = 10  # a container with fewer than 1/10 of the tensors of another is no set of weights
# Files that are not the weights but tell where they are: (first bytes, what it is, what to do).
POINTERS = (
    (
        b"version https://git-lfs",
        "a pointer of git-lfs, not the weights themselves",
        "run git lfs pull where it is from",
    ),
    (b"<!doctype", "a web page, not weights", "download the file itself"),
    (b"<html", "a web page, not weights", "download the file itself"),
)


def weights_files(folder: Path) -> list[Path]:
    """Return the weights files of a checkpoint folder, whole or in shards with an index. Raises CheckpointError."""
    return find_weights(lambda name: folder / name if is_file(folder / name) else None)


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name, as the hub shows it."""
    hashes = {}
    for path in paths:
        digest = hashlib.sha256()
        with reading(path, "checkpoint") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        hashes[path.name] = digest.hexdigest()
    return hashes


def read_weights(
    paths: Sequence[Path], key: str | None = None, device: str = "cpu"
) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the container of a training checkpoint that holds the weights, and the tensors of the files by name.

    `key` names containers, then a prefix of names, which is removed: `teacher.backbone`. Without it the first known
    container is used. On the `device` meta they have shapes alone, and their values are not read. Raises
    CheckpointError, MachineError, and UsageError for a key that does not exist.
    """
    refuse_pretenders(paths)
    read = [_read(path, key and key.rstrip("."), device) for path in paths]
    return read[0][0], {name: tensor for _, tensors in read for name, tensor in tensors.items()}


def _read(path: Path, key: str | None = None, device: str = "cpu") -> tuple[str, dict[str, torch.Tensor]]:
    try:
        content: Any = _read_safetensors(path, device) if _is_safetensors(path) else _read_pickle(path, device)
    except pickle.UnpicklingError as error:
        if not _begins(path).startswith((b"PK", b"\x80")) or ends_too_early(error):  # neither an archive nor a pickle
            raise CheckpointError(
                f"checkpoint {shown(path)}: this is not a readable weights file", "is the file complete?"
            ) from error
        raise CheckpointError(
            f"checkpoint {shown(path)}: it holds {more_than_tensors(error)}, which could run code when read",
            "convert it to .safetensors on a machine where you trust it",
        ) from error
    except FeatcliError:
        raise
    except Exception as error:  # zip, pickle, JSON and torch raise errors for a damaged file without a common type
        raise CheckpointError(
            f"checkpoint {shown(path)}: this is not a readable weights file ({type(error).__name__})",
            "is the file complete?",
        ) from error
    found = _find_tensors(content) if key is None else _tensors_under(path, content, key)
    if found is None:
        top = ", ".join(map(str, list(content)[:5]))
        what = f"it holds no weights, only {top}" if top else "it is empty, so it holds no weights"
        raise CheckpointError(f"checkpoint {shown(path)}: {what}", "is it a weights file?")
    return found


def more_than_tensors(error: Exception) -> str:
    """Return what is in a weights file that torch refused: the class of an object, if torch names it."""
    name = class_in_pickle(error)
    return f"something other than tensors ({name})" if name else "something other than tensors"


def _find_tensors(content: Mapping[Any, Any], place: str = "") -> tuple[str, dict[str, torch.Tensor]] | None:
    """Return the names of the containers that hold the weights in a training checkpoint, and the weights.

    Known containers come first, then others, then tensors outside of containers. A few tensors beside many are
    statistics, counters or what an optimizer keeps.
    """
    found: list[tuple[str, dict[str, torch.Tensor]]] = []
    for name in (*CONTAINERS, *(key for key in content if key not in (*CONTAINERS, "optimizer", "optimizers"))):
        inner = content.get(name)
        if isinstance(inner, Mapping) and place.count(".") < DEEPEST:
            within = _find_tensors(inner, f"{place}{name}.")
            found += [] if within is None else [within]
    if tensors := {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}:
        found.append((place.rstrip("."), tensors))
    most = max((len(tensors) for _, tensors in found), default=0)
    return next((one for one in found if LEAST_SHARE * len(one[1]) >= most), None)


def _tensors_under(path: Path, content: Mapping[Any, Any], key: str) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the tensors in the containers that a key names first, whose names have the rest of the key as a prefix.

    A key that names no container applies to the one that is used without a key.
    """
    typed, key = key, key.rstrip(".")
    inner, parts = content, key.split(".")
    while parts and isinstance(inner.get(parts[0]), Mapping):
        inner = inner[parts.pop(0)]
    if not parts:
        found = _find_tensors(inner)
        if found is not None:
            return f"{key}.{found[0]}".rstrip("."), found[1]
    tensors = _with_prefix(inner, ".".join([*parts, ""]))
    if not tensors and inner is content and (taken := _find_tensors(content)) is not None:
        tensors = _with_prefix(taken[1], f"{key}.")
        key = f"{taken[0]}.{key}"
    if not tensors:
        asked = typed.rstrip(".").split(".")
        before = asked[: len(asked) - len(parts)]  # containers that exist
        heads = [".".join([*before, name]) for name in dict.fromkeys(str(name).partition(".")[0] for name in inner)]
        raise UsageError(
            f"--weights-key {shown(typed)}: there is nothing of that name in {shown(path)}",
            did_you_mean(
                nearest(typed, heads), f"choose from {', '.join(heads[:8])}{' ...' if len(heads) > 8 else ''}"
            ),
        )
    return key, tensors


def _with_prefix(content: Mapping[Any, Any], prefix: str) -> dict[str, torch.Tensor]:
    return {
        str(name)[len(prefix) :]: value
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and str(name).startswith(prefix)
    }


def refuse_pretenders(paths: Iterable[Path]) -> None:
    """Raise CheckpointError for files that only look like weights.

    These are what git-lfs or a browser left in their place, and archives that unpack to more than they are, which torch
    would notice when the memory is gone.
    """
    for path in paths:
        if _unpacks(path):
            raise CheckpointError(
                f"checkpoint {shown(path)}: it is a compressed archive, which torch never writes", "download it again"
            )
        start = _begins(path).lstrip().lower()
        for mark, what, hint in POINTERS:
            if start.startswith(mark):
                raise CheckpointError(f"checkpoint {shown(path)}: {what}", hint)


def _begins(path: Path) -> bytes:
    with reading(path, "checkpoint") as file:
        return file.read(64)


def _unpacks(path: Path) -> bool:
    """Return whether a file is a zip archive with compressed members, or with more in them than the file holds."""
    with reading(path, "checkpoint") as file:
        size = file.regular.state().st_size
        if not zipfile.is_zipfile(file):
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (OSError, ValueError, zipfile.BadZipFile):
            return False  # torch will say what is wrong with it
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return not stored or sum(member.file_size for member in members) > size


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors does, whatever its name ends in: a length, then JSON."""
    return _begins(path)[8:9] == b"{"


def _read_safetensors(path: Path, device: str) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load

    if device == "meta":
        return {name: torch.empty(shape, device=device) for name, (shape, _) in _safetensors_header(path).items()}
    with reading(path, "checkpoint") as file:
        return load(file.read())


def _safetensors_header(path: Path) -> dict[str, tuple[Sequence[int], str]]:
    """Return the shape and the dtype of each tensor, such as `F32`, by name."""
    from safetensors import safe_open

    with reading(path, "checkpoint"), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
        return {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}


def _read_pickle(path: Path, device: str) -> Mapping[str, object]:
    # timm's training script stores its options beside the weights. The warnings are about old pickles, which are either
    # read or refused.
    known = torch.serialization.safe_globals([argparse.Namespace, *numpy_numbers()])
    with silent_warnings(), known, reading(path, "checkpoint") as file:
        content = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(content, Mapping):
        raise TypeError("not a dictionary")
    return content


def tensors_in(paths: Iterable[Path]) -> dict[str, bool]:
    """Return the tensors in weights files by name, and whether they hold floating-point numbers.

    Only the header of a safetensors file is read. Raises CheckpointError and MachineError.
    """
    found: dict[str, bool] = {}
    for path in paths:
        if _is_safetensors(path):
            found |= {name: dtype.startswith(("F", "BF")) for name, (_, dtype) in _safetensors_header(path).items()}
        else:
            found |= {name: tensor.is_floating_point() for name, tensor in _read(path)[1].items()}
    return found


def refuse_whole_numbers(checkpoint: str, names: Sequence[str]) -> None:
    """Raise CheckpointError for weights that are no floating-point numbers: they are quantised, or damaged.

    Libraries would copy an int8 value such as 97 into the network as 97.0.
    """
    if names:
        raise CheckpointError(
            f"checkpoint {shown(checkpoint)}: {len(names)} of its weights are not floating-point numbers, first"
            f" {', '.join(names[:3])}",
            "give the weights that these were quantised from: featcli reads no quantised weights",
        )


def is_counter(key: str) -> bool:
    """Return whether a tensor is a norm's count of batches. Only training uses it, so checkpoints may lack it."""
    return key.endswith("num_batches_tracked")
