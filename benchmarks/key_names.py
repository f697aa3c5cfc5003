"""Read checkpoints with the names of official repositories, as they are and with prefixes before their names.

    python benchmarks/key_names.py

For each of timm's converters a model is made, small if its constructor allows that, and its tensors get the names,
shapes and containers of the official file (tests/official_names.py). featcli reads the file, and its maps are compared
with those of the model. Folders with names that transformers gave tensors before follow (tests/old_names.py). It prints
a table; the exit code is 1 if a cell is wrong.
"""

from __future__ import annotations

import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch

from featcli.backbones.torchvision_operators import import_timm

import_timm()
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
_names, _old_names = import_module("official_names"), import_module("old_names")

# None stands for the file as it is, with its containers, as a pickle. The others are safetensors files.
PREFIXES = (None, "", "module.", "backbone.", "model.encoder.")
CLOSE = 1e-4  # of the greatest value, because some converters compute with the tensors


def cell(official, prefix: str | None) -> str:
    """Return how far the maps are off, or what was raised."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found, expected = _names.read(official, Path(folder), prefix)
        except Exception as error:  # the table names whatever it is
            return f"{type(error).__name__}: {error}"
    if len(found) != len(expected):
        return f"maps: {len(found)} of {len(expected)}"
    off = max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))
    return "equal" if not off else f"{off:.0e}" if off < CLOSE else f"off by {off:.1e}"


def cell_of_folder(old) -> str:
    """Say whether a folder with older names gives the maps of one with new names, or what was raised."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = _old_names.read(old, Path(folder))
        except Exception as error:  # whatever it is, the table names it
            return f"{type(error).__name__}: {error}"
    pairs = zip(found["before"], found.get("now", found["before"]), strict=True)
    return "equal" if all(torch.equal(one, other) for one, other in pairs) else "other maps"


def main(only: str = "") -> int:
    """Print the table, and return 1 if a cell is wrong. `only` is a part of the names to try."""
    wrong, done = [], 0
    print(f"{'checkpoint':36} {'names in timm/models':58} as it is, flat, {', '.join(filter(None, PREFIXES))}")
    for name, official in _names.OFFICIAL.items():
        if only not in name:
            continue
        began = time.perf_counter()
        prefixes = PREFIXES if official.weights_key is None and name != "DINO" else PREFIXES[:1]
        cells = [cell(official, prefix) for prefix in prefixes]
        wrong += [f"{name}: {found}" for found in cells if found != "equal" and not found[0].isdigit()]
        done += len(cells)
        print(f"{name:36} {official.source:58} {' '.join(cells)}  ({time.perf_counter() - began:.0f} s)", flush=True)
    for name, old in _old_names.OLD.items():
        if only in name:
            found = cell_of_folder(old)
            wrong += [f"{name}: {found}"] if found != "equal" else []
            done += 1
            print(f"{name:36} conversion_mapping.py, {', '.join(old.sources)}: {found}", flush=True)
    kinds = len(_names.OFFICIAL) + len(_old_names.OLD)
    print(f"{done - len(wrong)} of {done} cells right, {kinds} kinds of checkpoint")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
