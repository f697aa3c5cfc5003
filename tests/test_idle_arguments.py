"""Check that arguments which change nothing about a network are refused by name."""

import pytest
from torch import nn

from conftest import SAMPLES
from featcli import extract, load_backbone
from featcli.backbones import timm_model
from featcli.backbones.checkpoint import resolve
from featcli.backbones.idle_arguments import refuse_idle
from featcli.errors import UsageError
from featcli.spec.groups import CheckpointSpec
from featcli.spec.parsers import parse_model_args


def resolved(arch, is_random=False, **arguments):
    model = resolve(CheckpointSpec(checkpoint=arch, random_init=is_random, model_arg=parse_model_args(arguments)))
    model.refuse_idle_arguments()
    return model


class Swallowing(nn.Module):
    """A network that takes any argument, as some of timm's do."""

    def __init__(self, width=4, slope=0.1, seed=3, **kwargs):
        super().__init__()
        self.layer, self.act = nn.Linear(3, width), nn.LeakyReLU(slope)
        self.register_buffer("table", self.layer.weight.new_ones(2) * seed)


def judged(is_random=False, **arguments):
    refuse_idle(arguments, lambda device, some: Swallowing(**some).to(device), is_random)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"widht": 8}, "did you mean width?"),
        ({"zzz": 1}, "give an argument of its class"),
        ({"width": 5, "slop": 0.1}, "slope?"),
    ],
)
def test_swallowed_arguments(arguments, hint):
    """An argument that a constructor ignores is refused, with those of similar names."""
    with pytest.raises(UsageError, match="has no such argument, and ignores it") as error:
        judged(**arguments)
    assert hint in error.value.hint


@pytest.mark.parametrize("arguments", [{"width": 5}, {"width": 4}, {"slope": 0.2}, {"seed": 4}, {"seed": 3}])
def test_arguments_with_effect(arguments):
    """An argument that changes a shape, a number or a table is taken, and so is a documented default."""
    judged(**arguments)


def test_arguments_that_need_one_another():
    """An argument without which the others make no network is taken."""
    resolved("test_vit", embed_dim=45, num_heads=3)


@pytest.mark.parametrize(
    ("arch", "arguments", "what"),
    [
        ("test_resnet", {"zero_init_last": False}, "ResNet is the same without it"),
        ("cait_xxs24_224", {"init_values": 0.3, "depth": 1}, "init_values: Cait is the same without it"),
        ("test_vit", {"scriptable": True}, "has no such argument, and ignores it"),
        ("test_vit", {"init_values": None}, "timm ignores an argument that is null"),
        ("test_vit", {"init_value": 0.1}, "cannot be made so"),
    ],
)
def test_arguments_of_timm(arch, arguments, what):
    """timm's own networks refuse arguments without effect, too."""
    with pytest.raises(UsageError, match=what):
        resolved(arch, **arguments)


def test_the_hint_names_what_was_meant():
    """If timm itself refuses an argument, the hint has those of similar names."""
    with pytest.raises(UsageError) as error:
        resolved("test_vit", init_value=0.1)
    assert error.value.hint == "did you mean init_values?"


def test_random_weights():
    """An argument that only changes initial weights is taken if weights are random."""
    assert resolved("test_resnet", is_random=True, zero_init_last=False).settings()["options"]


def test_a_dump_that_was_begun_so(cli, tmp_path, monkeypatch):
    """An older dump, begun with an argument without effect, is resumed by its own command; a new one is not begun."""
    options = {"checkpoint": "test_vit", "random_init": True, "pool": "avg", "model_arg": {"scriptable": True}}
    with monkeypatch.context() as older:
        older.setattr(timm_model, "refuse_idle", lambda *_, **__: None)
        extract(SAMPLES / "nature", output=tmp_path / "d", image_size=32, **options)
    assert extract(SAMPLES / "nature", output=tmp_path / "d", image_size=32, **options).extracted == 0
    for ask in (
        lambda: extract(SAMPLES / "nature", output=tmp_path / "new", image_size=32, **options),
        lambda: load_backbone("test_vit", random_init=True, model_arg={"scriptable": True}),
    ):
        with pytest.raises(UsageError, match="ignores it"):
            ask()
    assert "ignores it" in cli("inspect", "test_vit", "--model-arg", "scriptable=true").err
