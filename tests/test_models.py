import subprocess
import sys

import pytest
import timm
from tiny_transformers import TINY

from featcli.backbones.checkpoint import resolve
from featcli.errors import UsageError
from featcli.spec.groups import CheckpointSpec
from featcli.views import models
from featcli.views.models import list_models


def test_every_architecture_of_timm_is_listed():
    """The list has all architectures of timm in timm's order, then transformers' model types."""
    found = list_models()
    assert [model["name"] for model in found if model["library"] == "timm"] == timm.list_models()
    assert set(TINY) <= {model["name"] for model in found if model["library"] == "transformers"}
    assert {model["library"] for model in found} == {"timm", "transformers"}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vgg11"])
def test_facts_are_those_of_inspect(name):
    """Parameters, input, strides and stages of a listed model are those that the model itself has."""
    (model,) = [model for model in list_models(name) if model["name"] == name]
    source = resolve(CheckpointSpec(checkpoint=name, random_init=True))
    assert model["parameters"] == source.num_parameters
    assert model["input"] == [3, *source.input_size]
    assert model["strides"] == [stage.stride[0] for stage in source.stages]
    assert model["stages"] == f"{source.stages[0].name}:{source.stages[-1].name}"
    assert model["stage_names"] == [stage.name for stage in source.stages]
    assert model["vectors"] == [vector.name for vector in source.vectors]
    assert {f"{name}.{tag}" for tag in model["tags"]} == set(timm.list_pretrained(name))
    assert model["tags"][0] == timm.get_pretrained_cfg(name).tag


def test_models_that_make_a_vector(cli):
    """`--with` leaves models out that make no such vector, and says so where none is left."""
    names = [model["name"] for model in list_models("resnet", "projection")]
    assert names
    assert all(name.startswith("resnet") and "clip" in name for name in names)
    assert {"dinov2", "vit"} <= {model["name"] for model in list_models(vector="embedding")}
    run = cli("models", "resnet18", "--with", "projection")
    assert run.code == 2
    assert "with 'resnet18' in the name makes a vector projection" in run.err


def test_every_model_has_its_stages_as_a_list():
    """Each list of stages begins and ends as the range does, and has a stage for each stride."""
    for model in list_models():
        if model["stages"]:
            names = model["stage_names"]
            assert (f"{names[0]}:{names[-1]}", len(names)) == (model["stages"], len(model["strides"])), model["name"]


def test_patterns():
    """A part of a name matches in any case, and wildcards match whole names."""
    assert {"resnet50", "wide_resnet50_2"} <= {model["name"] for model in list_models("ResNet50")}
    assert [model["name"] for model in list_models("resnet50?")] == timm.list_models("resnet50?")
    with pytest.raises(UsageError, match="in its name") as error:
        list_models("resnt50")
    assert "resnet50" in error.value.hint


def test_the_list_is_fast():
    """Neither torch nor timm is imported to list the models of the swept timm."""
    code = "import sys; from featcli.cli import main\ntry: main(['models', 'resnet18'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "resnet18" in done.stdout
    assert not {"torch", "timm", "transformers"} & set(done.stdout.splitlines()[-1].split())


def test_another_release_of_timm(monkeypatch):
    """Models that were not swept are listed without facts."""
    monkeypatch.setattr(models.importlib.metadata, "version", lambda _: "9.9")
    monkeypatch.setattr(timm, "list_models", lambda: ["resnet18", "novelty"])
    found = {model["name"]: model for model in list_models() if model["library"] == "timm"}
    assert list(found) == ["resnet18", "novelty"]
    assert found["resnet18"]["parameters"] > 0
    assert found["novelty"]["parameters"] is None


def test_the_command(cli):
    """`featcli models` prints a table, or with --json an object a line, and ends with 2 if nothing matches."""
    shown = cli("models", "convnext_tiny")
    assert (shown.code, shown.out.splitlines()[0].split()[:2]) == (0, ["model", "library"])
    assert cli("models", "convnext_tiny", "--json").events[0]["strides"] == [4, 8, 16, 32]
    assert cli("models", "nothing_like_it_at_all").code == 2


def test_types_that_no_sweep_builds():
    """Every type of AutoBackbone is listed, by its name alone if the sweep could not build it."""
    names = pytest.importorskip("transformers").models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES
    listed = {model["name"]: model for model in list_models("*") if model["library"] == "transformers"}
    assert set(names) - listed.keys() == {"timm_backbone"}  # its models are timm's
    assert listed["dinat"]["stages"] is None
