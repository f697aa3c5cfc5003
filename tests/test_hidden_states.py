"""Check vision models outside transformers' AutoBackbone mapping: their hidden states, stage by stage."""

from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import PYRAMID, TOKENS, randomize

from conftest import SAMPLES, upright
from featcli import extract, load_backbone, open_dump
from featcli.backbones import hidden_states
from featcli.backbones.trimming import idle_tensors, trim
from featcli.errors import CheckpointError, FeatcliError, UsageError

T = pytest.importorskip("transformers")

PICTURES = [upright(path) for path in sorted(SAMPLES.rglob("*.jpg"))[:2]]
VIT = TOKENS | {"image_size": 64, "patch_size": 16}
NARROW = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2]}
SAM2 = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "embed_dim_per_stage": [16, 32, 48, 64],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
}
SAM2 |= {"blocks_per_stage": [1, 1, 2, 1], "window_size_per_stage": [8, 4, 4, 4], "global_attention_blocks": [3]}
# model type -> (configuration, tokens before the patches, or None for maps)
TYPES = {
    "vit": (VIT, 1),
    "deit": (VIT, 2),
    "vit_msn": (VIT, 1),
    "ijepa": (VIT, 0),
    "data2vec-vision": (VIT, 1),
    "dpt": (VIT | {"is_hybrid": False}, 1),
    "yolos": (VIT | {"image_size": [64, 64], "num_detection_tokens": 5}, 1),
    "clip_vision_model": (VIT, 1),
    "chinese_clip_vision_model": (VIT, 1),
    "siglip_vision_model": (VIT, 0),
    "aimv2_vision_model": (VIT, 0),
    "mlcd_vision_model": (VIT, 1),
    "internvl_vision": (VIT | {"image_size": [64, 64], "patch_size": [16, 16]}, 1),
    "sam_vision_model": (VIT | {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}, None),
    "regnet": (PYRAMID | {"hidden_sizes": [16, 32, 32, 64], "embedding_size": 16, "groups_width": 8}, None),
    "segformer": (PYRAMID | NARROW, None),
    "glpn": (PYRAMID | NARROW, None),
    "poolformer": (PYRAMID | {"hidden_sizes": [8, 16, 24, 32]}, None),
    "mobilenet_v1": ({"depth_multiplier": 0.25}, None),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, None),
    "mobilevit": (
        {"image_size": 64, "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "hidden_sizes": [16, 24, 32]},
        None,
    ),
    "mobilevitv2": ({"image_size": 64, "width_multiplier": 0.25}, None),
    "swiftformer": (PYRAMID | {"embed_dims": [16, 16, 32, 32], "image_size": 64}, None),
    "efficientnet": ({"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}, None),
    "cvt": ({"depth": [1, 2, 3]}, None),
    "levit": ({"image_size": 64, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1]}, 0),
    "pvt": (PYRAMID | NARROW | {"image_size": 64}, 0),
    "sam2_vision_model": ({"backbone_config": SAM2, "backbone_channel_list": [64, 48, 32, 16]}, None),
    "donut-swin": (
        {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4, "image_size": 64},
        None,
    ),
}

# Types that only `make sweep` tries, because another type here is built in the same way.
SWEPT = {"vit_msn", "ijepa", "data2vec-vision", "dpt", "chinese_clip_vision_model", "aimv2_vision_model"}
SWEPT |= {"mlcd_vision_model", "regnet", "glpn", "mobilenet_v1", "mobilenet_v2", "mobilevitv2", "swiftformer"}
SWEPT |= {"efficientnet"}
# Types whose code needs all its layers, whatever the maps need. LeViT's bits depend on where its tensors lie in memory.
COMPUTES_ALL = ("sam2_vision_model", "yolos")
CLOSE = ("levit",)


def save(model_type, folder, config=None):
    """Save a checkpoint with every parameter random. Returns the model."""
    torch.manual_seed(0)
    config = config or T.CONFIG_MAPPING[model_type](**TYPES[model_type][0])
    model = randomize(T.AutoModel.from_config(config)).eval()
    model.save_pretrained(folder)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return model


def as_map(found, prefix, behind=0, channels_last=False):
    """Return the patches of a hidden state as (B, C, h, w)."""
    if found.ndim == 4:
        return found.permute(0, 3, 1, 2) if channels_last else found
    found = found[:, prefix : found.shape[1] - behind]
    side = int(found.shape[1] ** 0.5)
    if side * side != found.shape[1]:  # PVT has a class token only in its last stage
        found, side = found[:, 1:], int((found.shape[1] - 1) ** 0.5)
    return found.transpose(1, 2).unflatten(2, (side, side))


def reference(model_type, folder, pixels):
    """Return the hidden states of transformers' own model as maps."""
    model = T.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    behind = getattr(model.config, "num_detection_tokens", 0)
    hidden = output.get("reshaped_hidden_states") or output.hidden_states
    return [as_map(found, TYPES[model_type][1], behind, model_type.startswith("sam")) for found in hidden]


@pytest.mark.parametrize("model_type", [model_type for model_type in TYPES if model_type not in SWEPT])
def test_every_hidden_state_is_a_stage(tmp_path, model_type):
    """Each stage, also of a cut model, is bit for bit the hidden state of transformers' own model."""
    save(model_type, tmp_path)
    backbone = load_backbone(tmp_path, out_indices="all")
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    expected = reference(model_type, tmp_path, backbone.preprocessing.normalize(pixels))
    tolerance = {"rtol": 0, "atol": 1e-5 if model_type in CLOSE else 0}
    for maps, found in zip(expected, backbone(pixels).values(), strict=True):
        torch.testing.assert_close(found, maps, **tolerance)
    cut = load_backbone(tmp_path, out_indices=[middle := (len(expected) - 1) // 2])
    (found,) = cut(pixels).values()
    torch.testing.assert_close(found, expected[middle], **tolerance)
    assert cut.weights.matched == cut.weights.total > 0
    assert cut.weights.total < backbone.weights.total or model_type in COMPUTES_ALL


TOWER = VIT | {"projection_dim": 16}
TEXT = TOKENS | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 16}


@pytest.mark.parametrize("model_type", ["clip", "siglip", "metaclip_2", "blip"])
def test_the_vision_tower_of_a_text_and_image_model(tmp_path, model_type):
    """A CLIP or SigLIP folder gives the hidden states of its vision tower, with the tower's weights."""
    config = T.CONFIG_MAPPING[model_type](vision_config=TOWER, text_config=TEXT)
    model = save(model_type, tmp_path, config)
    backbone = load_backbone(tmp_path, out_indices="all")
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    with torch.no_grad():
        output = model.vision_model(backbone.preprocessing.normalize(pixels), output_hidden_states=True)
    found = backbone(pixels)
    assert list(found) == ["stem", "stage1", "stage2", "stage3"]
    for maps, hidden in zip(found.values(), output.hidden_states, strict=True):
        assert torch.equal(maps, as_map(hidden, hidden.shape[1] - 16))
    assert f"in a {model_type})" in backbone.name
    assert any("text_model" in name for name in backbone.weights.unexpected)


def test_a_classifier_gives_its_backbone(tmp_path):
    """ViTForImageClassification loads, although it has no pooler and its head is not needed."""
    torch.manual_seed(0)
    model = randomize(T.ViTForImageClassification(T.ViTConfig(**VIT, num_labels=3))).eval()
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    first, again = load_backbone(tmp_path), load_backbone(tmp_path)
    assert first.weights.unexpected == ("classifier.bias", "classifier.weight")
    assert first.digest == again.digest  # tensors that the file lacks are random, and not part of the digest


def test_mae_is_read_as_a_plain_vit(tmp_path):
    """MAE gives every patch in its place, although MAE's own model drops and shuffles patches."""
    torch.manual_seed(0)
    mae = randomize(T.ViTMAEModel(T.ViTMAEConfig(**VIT, mask_ratio=0.0))).eval()
    mae.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    kept = torch.arange(16.0).expand(2, 16)  # noise in order: nothing is shuffled
    with torch.no_grad():
        expected = mae(backbone.preprocessing.normalize(pixels), noise=kept, output_hidden_states=True).hidden_states[
            -1
        ]
    (found,) = backbone(pixels).values()
    torch.testing.assert_close(found, as_map(expected, 1), rtol=0, atol=1e-5)


def test_norm_and_class_token(tmp_path):
    """`norm="model"` is the model's last hidden state, patches and class token, and `raw` the one before the norm."""
    model = save("vit", tmp_path)
    for norm, name in (("model", "last_hidden_state"), ("raw", "hidden_states"), (None, "hidden_states")):
        backbone = load_backbone(tmp_path, norm=norm)
        pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
        with torch.no_grad():
            output = model(backbone.preprocessing.normalize(pixels), output_hidden_states=True)
        expected = output[name] if norm == "model" else output[name][-1]
        assert torch.equal(backbone(pixels)["stage3"], as_map(expected, 1))
        assert torch.equal(backbone.class_tokens(pixels)["stage3"], expected[:, 0])
    save("regnet", tmp_path / "pyramid")
    with pytest.raises(UsageError, match="no final norm"):
        load_backbone(tmp_path / "pyramid", norm="model")


@pytest.mark.parametrize(("model_type", "size"), [("vit", (96, 80)), ("deit", (32, 96))])
def test_another_image_size(tmp_path, model_type, size):
    """For another size position embeddings are interpolated as in transformers; patches keep rows and columns."""
    model = save(model_type, tmp_path)
    backbone = load_backbone(tmp_path, image_size=size)
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    with torch.no_grad():
        ready = backbone.preprocessing.normalize(pixels)
        expected = model(ready, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
    patches = expected[:, TYPES[model_type][1] :].transpose(1, 2)
    assert torch.equal(backbone(pixels)["stage3"], patches.unflatten(2, (size[0] // 16, size[1] // 16)))


def test_a_size_that_no_patch_fits(tmp_path):
    """A size whose pixels do not fill patches is refused, with the nearest sizes that fit."""
    save("vit", tmp_path)
    with pytest.raises(UsageError, match="not a multiple of its patch of 16x16") as refused:
        load_backbone(tmp_path, image_size=100)
    assert refused.value.hint == "96x96 or 112x112 would do"


def test_rows_of_a_dump(tmp_path, cli):
    """`extract` stores the hidden states of a CLIP tower, and `inspect` shows their modules."""
    save("clip", tmp_path / "clip", T.CLIPConfig(vision_config=TOWER, text_config=TEXT))
    extract(SAMPLES / "nature", checkpoint=tmp_path / "clip", pool="cls", output=tmp_path / "d")
    dump = open_dump(tmp_path / "d")
    backbone = load_backbone(tmp_path / "clip")
    pixels = torch.stack([backbone.preprocess(upright(SAMPLES / "nature" / key)) for key in dump.keys])
    assert torch.equal(torch.from_numpy(dump["stage3"][:]), backbone.class_tokens(pixels)["stage3"])
    shown = cli("inspect", tmp_path / "clip")
    assert shown.code == 0
    assert "the clip_vision_model in a clip" in shown.out


def test_weights_that_do_not_cover_the_model(tmp_path):
    """A file that lacks a hidden layer is refused."""
    model = save("vit", tmp_path)
    model.layers = model.layers[:2]
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensors of its vit backbone, first layers\.2"):
        load_backbone(tmp_path)
    assert load_backbone(tmp_path, out_features="stage2").weights.matched > 0  # the tensor is not needed there


def test_models_that_need_more_than_a_picture(tmp_path):
    """SigLIP 2 with packed patches, which needs more than a picture, is refused with a clear reason."""
    T.Siglip2Model(T.Siglip2Config(vision_config=TOKENS | {"patch_size": 16}, text_config=TEXT)).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="does not give the hidden states of a picture"):
        load_backbone(tmp_path)


def test_a_text_tower_never_stands_in_for_the_vision_tower(tmp_path):
    """If a tensor of the vision tower is missing, the text tower's of the same name and shape is not used."""
    text = TEXT | {"max_position_embeddings": 16}
    save("siglip", tmp_path, T.SiglipConfig(vision_config=VIT, text_config=text))
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file(
        {k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"lacks 1 of the .*, first encoder\.layers\.1\.mlp\.fc1\.weight"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "sizes", "cause"),
    [
        ("pixtral", TOKENS | {"image_size": 64, "patch_size": 16}, "packs the pictures of a batch"),
        ("groupvit_vision_model", {}, "not always the patches of a grid"),
    ],
)
def test_hidden_states_that_are_no_maps(model_type, sizes, cause):
    """Models that pack pictures together, or whose tokens are groups of patches, are refused."""
    with pytest.raises(CheckpointError, match=cause):
        load_backbone(T.CONFIG_MAPPING[model_type](**sizes))


@pytest.mark.parametrize("model_type", ["pvt", "cvt"])
def test_class_tokens_are_only_where_all_stages_have_them(model_type):
    """Class tokens are refused for PVT, which has one only in its last stage, and for CvT, which has maps."""
    config = T.CONFIG_MAPPING[model_type](**TYPES[model_type][0])
    backbone = load_backbone(config, out_indices=[0, 1])
    with pytest.raises(UsageError, match="no class token"):
        backbone.class_tokens(backbone.preprocess(PICTURES[0])[None])
    assert load_backbone(config, out_indices=[-1]).has_class_token is (model_type == "pvt")


def test_what_was_taken_for_idle_is_put_back(tmp_path, monkeypatch):
    """A tensor that a map needs is put back if it was taken out, and counts again in proof and digest."""
    model = save("vit", tmp_path)
    whole = load_backbone(tmp_path, norm="model")
    norm = {name for name, _ in model.named_parameters() if name.startswith("layernorm.")}
    monkeypatch.setattr(hidden_states, "idle_tensors", lambda *_: frozenset(norm))
    monkeypatch.setattr(hidden_states.HiddenStatesModelSpec, "refuse_idle_norm", lambda *_: None)  # it does the same
    again = load_backbone(tmp_path, norm="model")
    pixels = whole.preprocess(PICTURES[0])[None]
    assert torch.equal(whole(pixels)["stage3"], again(pixels)["stage3"])
    assert norm <= set(again.network.tensors())


def test_idle_modules_are_found_and_taken_out():
    """Heads and layers after the last map are removed, and everything that a map depends on stays."""
    torch.manual_seed(0)
    model = randomize(T.ViTModel(T.ViTConfig(**VIT))).eval()
    pixels = torch.rand(1, 3, 64, 64)

    def maps(given):
        return [model(given, output_hidden_states=True).hidden_states[2]]

    with torch.inference_mode():
        (before,) = maps(pixels)
    names = {name for name, _ in model.named_parameters()}
    idle = idle_tensors(model, maps, pixels)
    assert {name.split(".")[0] for name in idle} == {"layers", "layernorm", "pooler"}
    assert {name.split(".")[1] for name in idle if name.startswith("layers.")} == {"2"}
    needed = frozenset(name for name in names if name.startswith("layernorm."))
    assert trim(model, needed, lambda given: [model(given).last_hidden_state], pixels) == frozenset()
    assert {name for name, _ in model.named_parameters()} == names
    assert trim(model, idle, maps, pixels) == idle
    assert len(model.layers) == 2
    with torch.inference_mode():
        assert torch.equal(maps(pixels)[0], before)


@pytest.mark.parametrize(
    ("model_type", "size"), [("sam_vision_model", 512), ("vitpose_backbone", 100), ("cvt", 8), ("swin", 3)]
)
def test_sizes_never_end_in_another_exception(model_type, size):
    """Every size is taken or refused as a usage error, however the model itself complains."""
    from tiny_transformers import TINY

    config = T.CONFIG_MAPPING[model_type](**(TYPES[model_type][0] if model_type in TYPES else TINY[model_type]))
    with suppress(UsageError):
        assert min(load_backbone(config, image_size=size).selected[-1].shape) > 0


@pytest.mark.parametrize(
    "config", [{"model_type": "vit", "num_hidden_layers": 0}, {"model_type": "vit", "hidden_act": "zzz"},
               {"model_type": "vit", "patch_size": 0}, {"model_type": "nonsense"}, {"a": 1}, {}, 3, None]
)  # fmt: skip
def test_configurations_of_nothing(config):
    """A configuration that makes no model, and an object that is no configuration, raise a FeatcliError."""
    with pytest.raises(FeatcliError):
        load_backbone(config)
