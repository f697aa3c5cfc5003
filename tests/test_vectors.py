"""Embedding, projection and logits: those of timm's and transformers' own models, in one run with the maps."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_hidden_states import TEXT, TOWER, TYPES, VIT
from tiny_transformers import TINY, randomize

from featcli import load_backbone
from featcli.backbones.checkpoint import resolve
from featcli.errors import CheckpointError, UsageError
from featcli.spec.groups import CheckpointSpec

T = pytest.importorskip("transformers")
# Heads that pool, that take a token, that have layers of their own, that norm before and after.
OF_TIMM = "test_byobnet test_convnext test_mambaout test_resnet test_vit lcnet_035".split()


def differences_of_timm(name, size=None, vectors=("embedding", "logits")):
    """For each map and vector of an architecture, the largest difference from what timm itself gives.

    Maps are compared with those of a run without vectors, too.
    """
    whole = load_backbone(name, random_init=True, out_features=["all", *vectors], image_size=size)
    maps = load_backbone(name, random_init=True, out_features=["all"], image_size=size)
    options = {"img_size": size} if "img_size" in dict(whole.settings["options"]) else {}
    classes = {} if len(vectors) > 1 else {"num_classes": 0}
    model = timm.create_model(name, **classes, **options).eval().requires_grad_(False)
    headless = timm.create_model(name, num_classes=0, **options).eval().requires_grad_(False)
    model.load_state_dict(whole.network.module.state_dict())
    headless.load_state_dict({key: model.state_dict()[key] for key in headless.state_dict()})
    pixels = torch.randint(0, 256, (2, 3, *whole.preprocessing.size), dtype=torch.uint8)
    ready = whole.preprocessing.normalize(pixels)
    with torch.no_grad():
        last = model.forward_features(ready)
        expected = {
            vectors[-1]: model(ready),
            "embedding": model.forward_head(last, pre_logits=True),
            "embedding of a model without classes": headless(ready),
            **maps(pixels),
        }
    found = whole(pixels)
    found["embedding of a model without classes"] = found["embedding"]
    assert found.keys() == expected.keys()
    return {point: (found[point] - one).abs().max().item() for point, one in expected.items()}


@pytest.mark.parametrize("name", OF_TIMM)
def test_vectors_of_timm(name):
    """Embedding and logits are timm's own bit for bit, and the maps beside them those of a run without.

    `make sweep` compares one architecture of each of timm's files so.
    """
    assert set(differences_of_timm(name, None if name == "test_vit" else 64).values()) == {0.0}


def test_a_model_that_makes_no_vector():
    """A model of timm whose head refuses has no vector: that is said, with exit code 2."""
    model = resolve(CheckpointSpec(checkpoint="mobilenetv5_300m_enc", random_init=True))
    assert model.vectors == ()
    with pytest.raises(UsageError, match="has none, it makes no vector of a picture") as refused:
        model.choose(["embedding"])
    assert refused.value.exit_code == 2


# Types of the larger models that project pictures and texts onto one space.
LARGER = {
    "clip": {},
    "siglip": {},
    "metaclip_2": {},
    "blip": {"image_text_hidden_size": 16},
    "chinese_clip": {},
    "clipseg": {},
    "aimv2": {},
    "owlvit": {},
}


# Classes that have no pooler in their checkpoints, though the plain model of the type has one.
WITHOUT_POOLER = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")


def kinds_of(model_type):
    """The classes of a type that make vectors: the plain one, and those of image classification."""
    auto, config = T.models.auto.modeling_auto, type(configured(model_type))
    classifiers = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(config, None) or ()
    plain = auto.MODEL_MAPPING.get(config, None) or getattr(T, config.__name__.removesuffix("Config") + "Model", None)
    kinds = [plain, *(classifiers if isinstance(classifiers, tuple) else (classifiers,))]
    return [kind for kind in kinds if kind is not None and not kind.__name__.endswith("Backbone")]


def configured(model_type):
    """A small configuration of a type, with five classes that have names."""
    if model_type in LARGER:
        sizes = {} if model_type == "siglip" else {"projection_dim": 16}
        config = T.CONFIG_MAPPING[model_type](vision_config=TOWER, text_config=TEXT, **sizes, **LARGER[model_type])
    else:
        config = T.CONFIG_MAPPING[model_type](**(TINY[model_type] if model_type in TINY else TYPES[model_type][0]))
    if "window_size" in TINY.get(model_type, ()):  # Swin itself cannot run where its windows are larger than a map
        config.image_size = 128
    for name in ("hidden_sizes", "depths"):  # tuples as defaults break some backbones of transformers itself
        if isinstance(getattr(config, name, None), tuple):
            setattr(config, name, list(getattr(config, name)))
    config.id2label = {number: f"class {number}" for number in range(5)}
    return config


def save(kind, folder, config=None, model_type=""):
    """A checkpoint of a class, with every parameter random; the model, frozen as a backbone is."""
    torch.manual_seed(0)
    config = config or configured(model_type)
    randomize(kind(config)).save_pretrained(folder)
    size = getattr(config, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    T.ViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
    return kind.from_pretrained(folder).eval().requires_grad_(False)


def vectors_of(kind, folder, pixels):
    """The vectors that transformers' own classes give, by name."""
    model = kind.from_pretrained(folder).eval().requires_grad_(False)
    found, plain = {}, model
    if hasattr(model, "get_image_features") or hasattr(model, "clip"):
        larger = model if hasattr(model, "get_image_features") else model.clip
        found["projection"] = larger.get_image_features(pixel_values=pixels).pooler_output
    if hasattr(model.config, "vision_config"):
        plain = getattr(model, "clip", model).vision_model
    if "ForImageClassification" in kind.__name__:
        output = model(pixels)
        found["logits"] = output.get("logits") if "logits" in output else output.last_hidden_state
        name = type(model.config).__name__.removesuffix("Config") + "Model"
        if not hasattr(model.config, "vision_config") and (plain := getattr(T, name, None)):
            plain = plain.from_pretrained(folder).eval().requires_grad_(False)
    pooled = plain(pixels).get("pooler_output") if plain is not None else None
    if pooled is not None and pooled.flatten(1).shape[1] == pooled.shape[1]:
        found["embedding"] = pooled.flatten(1)
    return found


def differences_of_transformers(kind, folder):
    """For each map and vector of a saved checkpoint, the largest difference from what transformers' own class gives.

    Maps are compared with those of a run without vectors.
    """
    with torch.no_grad():
        maps = load_backbone(folder, out_indices="all")
        pixels = torch.randint(0, 256, (2, 3, *maps.preprocessing.size), dtype=torch.uint8)
        expected = vectors_of(kind, folder, maps.preprocessing.normalize(pixels))
        names = [vector.name for vector in resolve(CheckpointSpec(checkpoint=str(folder))).vectors]
        assert set(names) == set(expected)
        if kind.__name__ in WITHOUT_POOLER:
            del expected["embedding"]
        found = load_backbone(folder, out_features=["all", *expected])(pixels)
        expected |= maps(pixels)
    return {point: (found[point] - one).abs().max().item() for point, one in expected.items()}


# Classes whose vectors are made behind the maps in one pass, with the type of their configuration.
IN_ONE_PASS = {
    "DeiTForImageClassificationWithTeacher": "deit",
    "ResNetForImageClassification": "resnet",
    "BeitForImageClassification": "beit",
    "DINOv3ViTModel": "dinov3_vit",
    "CLIPModel": "clip",
    "SiglipModel": "siglip",
}
# Classes whose layers run otherwise than those of their backbone: Swin's windows, the order of Hiera's tokens.
IN_TWO_PASSES = {"HieraModel": "hiera"}


@pytest.mark.parametrize("name", [*IN_ONE_PASS, *IN_TWO_PASSES])
def test_vectors_of_transformers(tmp_path, name):
    """Vectors are those of transformers' own classes bit for bit, and the maps beside them those of a run without.

    Where a second pass is needed, it is said. `make sweep` compares every type so.
    """
    save(getattr(T, name), tmp_path, model_type={**IN_ONE_PASS, **IN_TWO_PASSES}[name])
    assert set(differences_of_transformers(getattr(T, name), tmp_path).values()) == {0.0}
    remarks = {vector.remark for vector in resolve(CheckpointSpec(checkpoint=str(tmp_path))).vectors}
    assert all("a second pass" in remark for remark in remarks) if name in IN_TWO_PASSES else remarks == {""}


def test_a_head_that_the_checkpoint_lacks(tmp_path):
    """ViT's classifiers have no pooler: exit code 6 names it, and what gives a vector without; logits are there."""
    save(T.ViTForImageClassification, tmp_path, model_type="vit")
    with pytest.raises(CheckpointError, match=r"embedding, first pooler\.dense") as refused:
        load_backbone(tmp_path, out_features=["embedding"])
    assert refused.value.exit_code == 6
    assert "--out-features stage3 --pool cls --norm model" in refused.value.hint
    assert load_backbone(tmp_path, out_features=["logits"]).weights.unexpected == ()


def test_a_head_without_its_weights(tmp_path):
    """A head that lacks a tensor, or has one too many or of another shape, is refused when its logits are wanted."""
    model = save(T.Dinov2ForImageClassification, tmp_path, model_type="dinov2")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "classifier.bias"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"1 of the \d+ tensors of its dinov2 logits, first classifier\.bias"):
        load_backbone(tmp_path, out_features=["logits"])
    state |= {"classifier.bias": model.classifier.bias, "classifier.scale": model.classifier.bias.clone()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.scale has no place in Dinov2ForImageClassification"):
        load_backbone(tmp_path, out_features=["logits"])
    model.config.id2label = {number: str(number) for number in range(7)}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="logits have another shape, first classifier"):
        load_backbone(tmp_path, out_features=["logits"])
    assert load_backbone(tmp_path, out_features=["embedding"]).weights.matched


def test_what_a_checkpoint_has(tmp_path):
    """Logits are a classifier's alone, projections a larger model's; what is absent is refused by name."""
    save(T.CLIPVisionModel, tmp_path / "tower", T.CLIPVisionConfig(**TOWER))
    save(T.CLIPVisionModelWithProjection, tmp_path / "ends", T.CLIPVisionConfig(**TOWER))
    save(T.Dinov2Model, tmp_path / "plain", model_type="dinov2")
    save(T.ViTMAEModel, tmp_path / "mae", T.ViTMAEConfig(**VIT))
    found = {
        folder: [vector.name for vector in resolve(CheckpointSpec(checkpoint=str(tmp_path / folder))).vectors]
        for folder in ("tower", "ends", "plain", "mae")
    }
    assert found == {
        "tower": ["embedding"],
        "ends": ["embedding", "projection"],
        "plain": ["embedding"],
        "mae": [],
    }
    with pytest.raises(UsageError, match="logits: plain has none, it makes embedding"):
        load_backbone(tmp_path / "plain", out_features=["logits"])
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    backbone = load_backbone(tmp_path / "ends", out_features=["projection"])
    model = T.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "ends").eval().requires_grad_(False)
    expected = model(backbone.preprocessing.normalize(pixels)).image_embeds
    assert torch.equal(backbone(pixels)["projection"], expected)


def test_a_configuration_without_weights():
    """Of a configuration that names no class there is whatever can be made of it, with random weights."""
    config = T.ViTConfig(**VIT)
    assert [vector.name for vector in resolve(CheckpointSpec(checkpoint=config)).vectors] == ["embedding", "logits"]


def test_classes_have_names(tmp_path):
    """The names of its classes are read of a checkpoint that names them, and not those that transformers makes up."""
    save(T.ResNetForImageClassification, tmp_path, model_type="resnet")
    assert resolve(CheckpointSpec(checkpoint=str(tmp_path))).class_names() == tuple(f"class {i}" for i in range(5))
    assert resolve(CheckpointSpec(checkpoint=T.ResNetConfig(**TINY["resnet"]))).class_names() == ()


def test_a_backbone_in_a_larger_model(tmp_path):
    """The backbone in an UperNet has the embedding of its plain model, and the larger model's end is no logits."""
    inner = T.ResNetConfig(**TINY["resnet"] | {"out_features": ["stage1", "stage2", "stage3", "stage4"]})
    config = T.UperNetConfig(backbone_config=inner, hidden_size=16, use_auxiliary_head=False, pool_scales=[1])
    save(T.UperNetForSemanticSegmentation, tmp_path, config)
    backbone = load_backbone(tmp_path, out_features=["stage4", "embedding"])
    pixels = torch.randint(0, 256, (1, 3, *backbone.preprocessing.size), dtype=torch.uint8)
    found = backbone(pixels)
    assert torch.equal(found["embedding"], found["stage4"].mean((2, 3), keepdim=True).flatten(1))
    assert [vector.name for vector in resolve(CheckpointSpec(checkpoint=str(tmp_path))).vectors] == ["embedding"]


def test_inspect_lists_vectors(tmp_path, cli):
    """`inspect` shows each vector below the stages: its shape and bytes, and what to know before choosing it."""
    save(T.SwinForImageClassification, tmp_path, model_type="swin")
    run = cli("inspect", str(tmp_path), "--out-features", "stage1,embedding")
    listed = r"\* +embedding +SwinModel\.pooler_output +128 +512 B +a second pass: its layers run otherwise than"
    assert re.search(listed, run.out)
    assert "1 of 5 stages and embedding selected (*)" in run.out
