"""Check weights that lack tensors, or have them in another shape: the hint names the argument with which they fit."""

import datetime
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

from featcli import load_backbone
from featcli.errors import CheckpointError, UsageError


def refused(**opened):
    with pytest.raises(CheckpointError) as error:
        load_backbone(**opened, out_indices="all")
    return error.value


def as_hinted(hint):
    """Return the options that a hint gives, as load_backbone takes them."""
    words = shlex.split(hint.partition("Then add ")[2])
    pairs = list(zip(words[::2], words[1::2], strict=True))
    arguments = [value for name, value in pairs if name == "--model-arg"]
    channels = [int(value) for name, value in pairs if name == "--num-channels"]
    assert len(arguments) + len(channels) == len(pairs) > 0, hint
    return ({"model_arg": arguments} if arguments else {}) | ({"num_channels": channels[0]} if channels else {})


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("test_vit", {"qkv_bias": False}),
        ("test_vit", {"class_token": False, "global_pool": "avg"}),
        ("test_vit", {"mlp_ratio": 2}),
        ("test_resnet", {"in_chans": 1}),
    ],
)
def test_arguments_of_timm(tmp_path, arch, arguments):
    """A file of the same architecture made with other arguments is refused in words, and loads as the hint says."""
    torch.manual_seed(0)
    state = timm.create_model(arch, num_classes=0, **arguments).state_dict()
    torch.save(state, tmp_path / "w.pth")
    opened = {"checkpoint": tmp_path / "w.pth", "arch": arch}
    error = refused(**opened)
    assert re.search(r"it lacks .*, first|have another shape in it, first [\w.]+: \(.*\), not \(", error.message)
    assert "is invalid" not in error.message
    tensors = load_backbone(**opened, **as_hinted(error.hint), out_indices="all").network.tensors()
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("kind", "there", "here"),
    [
        ("ViT", {"qkv_bias": False}, {}),
        ("ViT", {"intermediate_size": 32}, {}),
        ("ViT", {"num_channels": 1}, {}),
        ("Dinov2WithRegisters", {"num_register_tokens": 2}, {}),
    ],
)
def test_fields_of_transformers(tmp_path, kind, there, here):
    """A folder whose configuration was edited is refused in words, and loads as the hint says."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 64, "patch_size": 16}
    config = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, f"{kind}Model")(config(**sizes | here | there))
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    config(**sizes | here).save_pretrained(tmp_path)
    hint = refused(checkpoint=tmp_path).hint
    backbone = load_backbone(tmp_path, **as_hinted(hint), out_indices="all")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.network.tensors().items())


def test_damage_has_no_argument(tmp_path):
    """For one absent or cut tensor no argument is named, although one would remove it."""
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    for damaged in (
        {key: tensor for key, tensor in state.items() if key != "blocks.1.attn.qkv.bias"},
        state | {"blocks.1.mlp.fc1.weight": torch.ones(128, 64)},
    ):
        torch.save(damaged, tmp_path / "w.pth")
        error = refused(checkpoint=tmp_path / "w.pth", arch="test_vit")
        assert error.hint == "do these weights belong to test_vit?"


def test_a_name_that_was_changed_is_shown(tmp_path):
    """If some keys have other names, the message has one of them beside the absent one."""
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save({key.replace("attn.qkv", "attn.in_proj"): t for key, t in state.items()}, tmp_path / "w.pth")
    message = refused(checkpoint=tmp_path / "w.pth", arch="test_vit").message
    assert "first blocks.0.attn.qkv.weight" in message
    assert message.endswith("; it has blocks.0.attn.in_proj.weight in place of the first")


@pytest.mark.parametrize(("word", "meant"), [("no", "false"), ("off", "false"), ("Yes", "true"), ("on", "true")])
def test_words_for_true_and_false(word, meant):
    """A word in place of true or false is refused, and the hint has what was meant."""
    transformers = pytest.importorskip("transformers")
    for checkpoint in ("test_vit", transformers.ViTConfig()):
        with pytest.raises(UsageError, match="qkv_bias: it has to be true or false, not") as error:
            load_backbone(checkpoint, random_init=True, model_arg=[f"qkv_bias={word}"])
        assert error.value.hint == f"did you mean --model-arg qkv_bias={meant}?"


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (datetime.datetime(2020, 1, 1), "datetime.datetime"),
        (Path("a"), "pathlib."),
        (torch.nn.Linear(1, 1), "torch.nn."),
    ],
)
def test_objects_in_a_pickle_are_named(tmp_path, held, name):
    """A file that torch refuses to read without running code is refused with the class of the object in it."""
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": held}, tmp_path / "w.pth")
    error = refused(checkpoint=tmp_path / "w.pth", arch="test_resnet")
    assert f"it holds something other than tensors ({name}" in error.message
