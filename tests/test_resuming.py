"""Check that resuming depends on what the checkpoint's files and the user set, never on the words of a library."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import featcli
from conftest import tree
from featcli.backbones.places import Places
from featcli.dump.checksummed_json import publish_checksummed, read_checksummed
from featcli.errors import ConflictError

transformers = pytest.importorskip("transformers")

ZOO = Path(__file__).parent / "zoo"
OPTIONS_OF_ZOO = {"threads": 1, "batch_size": 2, "layout": "channels-first", "fold": False, "shard_size": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a function that makes a checkpoint folder by name, in a folder with the pictures of the zoo."""
    shutil.copytree(ZOO / "pictures", tmp_path / "pictures", copy_function=shutil.copyfile)
    shutil.copytree(ZOO / "weights", tmp_path / "weights", copy_function=shutil.copyfile)
    shutil.copytree(ZOO / "dumps", tmp_path / "dumps", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def extracted(checkpoint, dump, **options):
    """Extract, and return the warnings of the run."""
    said = []
    featcli.extract(
        "pictures", checkpoint=f"weights/{checkpoint}", output=dump,
        report=lambda kind, **facts: said.append(facts["text"]) if kind == "warning" else None, **options,
    )  # fmt: skip
    return [text for text in said if "other words" in text]


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def other_words(monkeypatch, kind, **fields):
    """Make the library describe objects of a class with other fields."""
    plain = kind.to_dict
    monkeypatch.setattr(kind, "to_dict", lambda self: plain(self) | fields)


def test_a_layer_that_prints_itself_in_other_words(folder, monkeypatch):
    """A run is resumed without a warning if torch prints its network in other words."""
    extracted("timm", "d", pool="avg")
    assert "structure" not in featcli.open_dump("d").plan.settings.backbone
    plain = torch.nn.Conv2d.extra_repr
    monkeypatch.setattr(torch.nn.Conv2d, "extra_repr", lambda self: plain(self) + ", device=cpu")
    assert extracted("timm", "d", pool="avg") == []


def test_a_configuration_with_a_new_default(folder, monkeypatch):
    """A field that a new transformers adds to a configuration changes no plan; one that config.json sets does."""
    extracted("dinov2", "d", pool="cls")
    assert featcli.open_dump("d").plan.settings.backbone["config_json"]["hidden_size"] == 16
    other_words(monkeypatch, transformers.Dinov2Config, use_rope=False)
    assert extracted("dinov2", "d", pool="cls") == []
    change(folder / "weights" / "dinov2" / "config.json", layer_norm_eps=0.1)
    with pytest.raises(ConflictError, match=r"backbone\.config_json\.layer_norm_eps: 1e-06 there, 0\.1 now"):
        extracted("dinov2", "d", pool="cls")


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [("timm", {"model_args": {"channels": [8, 8, 16, 16], "stem_width": 8, "act_layer": "gelu"}}, "act_layer"),
     ("dinov2", {"hidden_act": "relu"}, "hidden_act")],
)  # fmt: skip
def test_random_weights_of_other_arguments(folder, name, fields, named):
    """With random weights, which are the same, an argument that changes only the network gives another plan."""
    extracted(name, "d", pool="avg", random_init=True)
    digest = featcli.open_dump("d").plan.settings.weights_digest
    change(folder / "weights" / name / "config.json", **fields)
    with pytest.raises(ConflictError, match=rf"backbone\.\w+\.{named}"):
        extracted(name, "d", pool="avg", random_init=True)
    extracted(name, "other", pool="avg", random_init=True)
    assert featcli.open_dump("other").plan.settings.weights_digest == digest


def test_a_plan_with_other_names_of_modules(folder, monkeypatch):
    """A dump whose plan has another name for the module of a stage is resumed, and keeps the name."""
    with monkeypatch.context() as patch:
        patch.setattr(Places, "of", lambda *_: "older.name")
        extracted("dinov2", "d", pool="cls", shard_size=2, batch_size=2)
    (folder / "d" / "manifest.json").unlink()
    (folder / "d" / "shards" / "00001.json").unlink()
    assert featcli.load_backbone("weights/dinov2").selected[0].module != "older.name"
    assert extracted("dinov2", "d", pool="cls", shard_size=2, batch_size=2) == []
    dump = featcli.open_dump("d")
    assert [stage.module for stage in dump.plan.outputs] == ["older.name"]


def test_a_plan_with_a_whole_configuration(folder, monkeypatch):
    """An older dump is resumed if only fields differ that config.json does not set, and a warning names them.

    With the versions that it was made with no default has changed, so such a field was set, and it is refused.
    """
    asked = OPTIONS_OF_ZOO | {"pool": "cls", "dtype": "float16", "format": "safetensors"}
    plan = read_checksummed(folder / "dumps" / "class_tokens" / "plan.json")
    versions = {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}
    path = folder / "dumps" / "class_tokens" / "plan.json"
    publish_checksummed(path, plan | {"environment": versions | {"transformers": "4.0"}}, replace=True)
    assert extracted("dinov2", "dumps/class_tokens", **asked) == []
    other_words(monkeypatch, transformers.Dinov2Config, use_rope=False, problem_type="none")
    (said,) = extracted("dinov2", "dumps/class_tokens", **asked)
    assert "config.use_rope" in said
    assert "config.problem_type" in said
    publish_checksummed(path, plan | {"environment": versions}, replace=True)
    with pytest.raises(ConflictError, match=r"backbone\.config\.problem_type"):
        extracted("dinov2", "dumps/class_tokens", **asked)
    publish_checksummed(path, plan | {"environment": versions | {"transformers": "4.0"}}, replace=True)
    change(folder / "weights" / "dinov2" / "config.json", layer_norm_eps=0.1)
    with pytest.raises(ConflictError, match=r"backbone\.config\.layer_norm_eps"):
        extracted("dinov2", "dumps/class_tokens", **asked)


def test_a_plan_with_a_printed_network(folder, monkeypatch):
    """An older dump that holds a hash of the printed network is resumed with another version of torch.

    With the same version it is another network, as its model_args say.
    """
    asked = OPTIONS_OF_ZOO | {"image_size": 32, "out_indices": "all"}
    plan = read_checksummed(folder / "dumps" / "maps" / "plan.json")
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    publish_checksummed(folder / "dumps/maps/plan.json", plan | {"environment": versions}, replace=True)
    made_with = plan["environment"]["torch"].partition("+")[0]
    if torch.__version__.partition("+")[0] == made_with:  # other versions already print this network differently
        assert extracted("timm", "dumps/maps", **asked) == []
    plain = torch.nn.Conv2d.extra_repr
    monkeypatch.setattr(torch.nn.Conv2d, "extra_repr", lambda self: plain(self) + ", device=cpu")
    with pytest.raises(ConflictError, match=r"backbone\.structure"):
        extracted("timm", "dumps/maps", **asked)
    publish_checksummed(folder / "dumps/maps/plan.json", plan | {"environment": {"torch": "2.0"}}, replace=True)
    (said,) = extracted("timm", "dumps/maps", **asked)
    assert "structure" in said


OF_PICTURES = [("fit", "pad"), ("fit", "squash"), ("fit", "crop"), ("fit", "native"), ("colour", "convert"),
               ("alpha", "white"), ("orientation", "ignore"), ("depth_range", "0:4095"), ("max_pixels", 10**6),
               ("decode", "scaled"), ("decode", "fast"), ("mean", "0.1,0.2,0.3"), ("std", "0.3"),
               ("interpolation", "nearest"), ("crop_pct", 0.5), ("image_size", 70)]  # fmt: skip


@pytest.mark.parametrize("checkpoint", ["timm", "dinov2"])
@pytest.mark.parametrize(("option", "value"), OF_PICTURES)
def test_an_option_for_pictures_is_no_other_wording(folder, checkpoint, option, value):
    """A dump made without an option for pictures is not resumed with it, nor the other way round."""
    if value == "fast":
        pytest.importorskip("simplejpeg")
    extracted(checkpoint, "plain", pool="avg")
    extracted(checkpoint, "asked", pool="avg", **{option: value})
    for dump, other, extend in (("plain", {option: value}, True), ("asked", {}, False)):
        before = tree(folder / dump)
        name = f"--{option.replace('_', '-')}"
        with pytest.raises(ConflictError, match=f"another plan: ({name}|preprocessing)") as refused:
            extracted(checkpoint, dump, pool="avg", extend=extend, **other)
        assert str(refused.value).count(f"{name}:") <= 1
        assert tree(folder / dump) == before


def test_a_backend_is_no_other_wording(folder):
    """What an image processor resizes with stands, also where both give the same of most pictures."""
    options = {"pool": "avg", "interpolation": "nearest"}
    extracted("dinov2", "plain", **options)
    extracted("dinov2", "asked", **options, processor_backend="torchvision")
    for dump, other in (("plain", {"processor_backend": "torchvision"}), ("asked", {})):
        with pytest.raises(ConflictError, match=r"--processor-backend|preprocessing"):
            extracted("dinov2", dump, **options, **other)


def test_a_processor_that_rounds_sizes_is_another(folder):
    """Processors that differ only where a size has to be rounded are told apart."""
    file = folder / "weights" / "dinov2" / "preprocessor_config.json"
    change(file, size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70})
    extracted("dinov2", "d", pool="avg")
    change(file, image_processor_type="TextNetImageProcessor", size_divisor=14)
    with pytest.raises(ConflictError, match="preprocessing"):
        extracted("dinov2", "d", pool="avg")


def test_an_image_processor_with_a_new_field(folder, monkeypatch):
    """A new field of a transformers processor changes no plan if pixels are the same; another value does."""
    kind = transformers.AutoImageProcessor.from_pretrained("weights/dinov2", backend="pil").__class__
    extracted("dinov2", "d", pool="cls")
    other_words(monkeypatch, kind, is_patient=True)
    (said,) = extracted("dinov2", "d", pool="cls")
    assert "preprocessing.is_patient" in said
    change(folder / "weights" / "dinov2" / "preprocessor_config.json", image_std=[0.5, 0.5, 0.5])
    with pytest.raises(ConflictError, match=r"preprocessing\.image_std"):
        extracted("dinov2", "d", pool="cls")
