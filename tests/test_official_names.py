"""Check files with the names of official repositories, which timm's converters know: maps are those of the weights."""

import importlib
import sys

import pytest
import timm
import torch
from official_names import OFFICIAL, read

# These dozen are cheap and differ from each other. benchmarks/key_names.py tries all, also under prefixes.
CHEAP = (
    "DINO", "MAE", "DINOv2 with registers", "CLIP", "BEiT v2", "EVA-CLIP", "Perception Encoder", "ConvNeXt V2", "Swin",
    "Hiera", "TNT", "PVTv2", "RegNet, SEER", "MoCo", "PoolFormer", "Qwen 3.5",
)  # fmt: skip
# Modules of timm whose converters change no name.
NO_NAMES = {
    "fasternet": "gives back what it was given",
    "nest": "resizes positions",
    "shvit": "opens a container",
    "starnet": "opens a container",
    "vision_transformer_relpos": "resizes tables",
}


@pytest.mark.parametrize("name", CHEAP)
def test_official_names(tmp_path, name):
    """The maps of all stages equal those of timm's own model with these weights."""
    found, expected = read(OFFICIAL[name], tmp_path)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("name", "prefix"), [("ConvNeXt V2", "module.encoder."), ("CLIP", "model."), ("TNT", "backbone.")]
)
def test_official_names_under_a_prefix(tmp_path, name, prefix):
    """A prefix that the converter does not expect is removed, and one that it expects stays."""
    found, expected = read(OFFICIAL[name], tmp_path, prefix)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_converter_of_timm_has_a_checkpoint():
    """Every converter of timm has a checkpoint in `OFFICIAL` with its names."""
    modules = {
        name.removeprefix("timm.models."): module for name, module in sys.modules.items() if "timm.models." in name
    }
    own = {
        name
        for name, module in modules.items()
        for function in vars(module).values()
        if "filter_fn" in getattr(function, "__name__", "") and function.__module__ == module.__name__
    }
    sources = " ".join(official.source for official in OFFICIAL.values())
    assert {name for name in own if f"{name}.py" not in sources} <= NO_NAMES.keys()
    for official in OFFICIAL.values():  # and the places that are named exist
        for place in official.source.split(", ")[:-1]:
            assert place.removesuffix(".py") in modules, official.source


def test_converters_say_nothing(tmp_path, capsys):
    """What a converter prints does not reach the output of a command."""
    read(OFFICIAL["DINOv3"], tmp_path)
    assert capsys.readouterr().out == ""
    assert "print" not in vars(importlib.import_module("timm.models.eva")) or timm.models.eva.print is print
