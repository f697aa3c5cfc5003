"""Weights files -> the state dict inside them, and what they are by hash. Never runs code from a file."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from featcli.backbones.hub import WEIGHTS_NAMES
from featcli.errors import CheckpointError, shown

# Training checkpoints hold the weights beside optimizers and counters; the averaged ones are the better model.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")


def weights_files(folder: Path) -> list[Path]:
    """The weights files of a checkpoint folder, whole or in shards with an index. Raises CheckpointError."""
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"checkpoint {shown(index)}: not an index of weights", "is it whole?") from error
            return [folder / shard for shard in shards]
    return []


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its name, which is what the hub shows of it."""
    hashes = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        hashes[path.name] = digest.hexdigest()
    return hashes


def read_weights(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of .safetensors, .pth, .pt, .bin or .ckpt files by name. Raises CheckpointError."""
    return {name: tensor for path in paths for name, tensor in _read(path).items()}


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except pickle.UnpicklingError as error:
        if "load key" in str(error) or "EOF" in str(error):  # not even a pickle
            raise CheckpointError(
                f"checkpoint {shown(path)}: not a readable weights file", "is the file whole?"
            ) from error
        raise CheckpointError(
            f"checkpoint {shown(path)}: it holds something other than tensors, which could run code when read",
            "convert it to .safetensors on a machine where you trust it",
        ) from error
    except Exception as error:  # zip, pickle, JSON and torch errors: there is no common type for a damaged file
        raise CheckpointError(
            f"checkpoint {shown(path)}: not a readable weights file ({type(error).__name__})", "is the file whole?"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"checkpoint {shown(path)}: no tensors in it", "is it a weights file?")
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_pickle(path: Path) -> Mapping[str, object]:
    # timm's training script stores its options beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old pickles, which are read all the same or refused
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise TypeError("not a dictionary")
    return content


def strip_prefix(
    tensors: Mapping[str, torch.Tensor], expected: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors under the prefix (`module.`, `backbone.`, `encoder.body.` ...) that fits most expected names, and
    the names of all others.

    With no fit at all the tensors come back as they are: the library may know another way to read them.
    """
    best = find_prefix(tensors, expected)
    under = {key[len(best) :]: tensor for key, tensor in tensors.items() if key.startswith(best)}
    return under, [key for key in tensors if not key.startswith(best)]


def find_prefix(found: Iterable[str], expected: Collection[str]) -> str:
    """The prefix under which most of the expected names are found."""
    names, fits = set(expected), Counter[str]()
    for key in found:
        starts = [0, *(i + 1 for i, char in enumerate(key) if char == ".")]
        fits.update(key[:start] for start in starts if key[start:] in names)
    return max(sorted(fits), key=fits.__getitem__, default="")
