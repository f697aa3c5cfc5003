"""A bare weights file -> the state dict inside it. Never runs code from the file."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from featcli.errors import CheckpointError, shown

# Training checkpoints hold the weights beside optimizers and counters; the averaged ones are the better model.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .bin or .ckpt file by name. Raises CheckpointError."""
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


def strip_prefix(tensors: Mapping[str, torch.Tensor], expected: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors under the prefix (`module.`, `backbone.`, `encoder.body.` ...) that fits most expected names.

    With no fit at all the tensors come back as they are: the library may know another way to read them.
    """
    names, fits = set(expected), Counter[str]()
    for key in tensors:
        starts = [0, *(i + 1 for i, char in enumerate(key) if char == ".")]
        fits.update(key[:start] for start in starts if key[start:] in names)
    best = max(sorted(fits), key=fits.__getitem__, default="")
    return {key[len(best) :]: tensor for key, tensor in tensors.items() if key.startswith(best)}
