"""Check tensors that a checkpoint has and the network lacks: those that would change maps are refused, not heads."""

import json
import re

import pytest
import safetensors.torch
import timm
import torch
from tiny_transformers import PYRAMID, TOKENS, WINDOWS

from featcli import load_backbone
from featcli.errors import CheckpointError, UsageError
from featcli.spec.parsers import as_given

T = pytest.importorskip("transformers")
VIT = TOKENS | {"image_size": 64}
RESNET = PYRAMID | {"hidden_sizes": [16, 32, 32, 64], "embedding_size": 16}


def write(folder, tensors, **options):
    """Write a weights file of timm with these tensors. Returns what load_backbone takes."""
    file = folder / "w.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return {"checkpoint": file, **options}


def saved(model, folder):
    """Save a folder of transformers. Returns what load_backbone takes."""
    model.save_pretrained(folder)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return {"checkpoint": folder}


def put(folder, tensors):
    """Add tensors to the weights of a folder."""
    file = folder / "model.safetensors"
    whole = safetensors.torch.load_file(file) | tensors
    safetensors.torch.save_file(whole, file, metadata={"format": "pt"})


def timm_state(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).state_dict()


def refused(opened, first, hint=""):
    """Check that loading is refused with this tensor as the first without a place."""
    with pytest.raises(CheckpointError, match=r"of its tensors have no place in") as error:
        load_backbone(**opened)
    assert error.value.message.endswith(f"first {first}") or f"first {first}, " in error.value.message
    assert hint in error.value.hint
    return error.value


@pytest.mark.parametrize(
    ("options", "name", "first"),
    [
        ({"init_values": 1e-5}, "test_vit", "blocks.0.ls1.gamma"),  # an Identity that runs
        ({"block_args": {"attn_layer": "se"}}, "test_resnet", "layer1.0.se.fc1.bias"),  # under a module that runs
    ],
)
def test_parts_that_the_architecture_lacks(tmp_path, options, name, first):
    """A file with more parts than the architecture is refused, and with the hint's argument it loads."""
    opened = write(tmp_path, timm_state(name, **options), arch=name)
    ((argument, value),) = options.items()
    refused(opened, first, f"--model-arg {as_given(argument, value)}")
    weights = load_backbone(**opened, model_arg=[f"{argument}={json.dumps(value)}"]).weights
    assert weights.matched == weights.total


def test_positions_that_do_not_fit(tmp_path):
    """The hint for register tokens names all of them, although timm's converter fails at the positions."""
    opened = write(tmp_path, timm_state("test_vit", reg_tokens=2), arch="test_vit")
    with pytest.raises(CheckpointError) as error:
        load_backbone(**opened)
    assert "--model-arg reg_tokens=2" in error.value.hint
    assert load_backbone(**opened, model_arg={"reg_tokens": 2}).settings["options"] == {"reg_tokens": 2}


def test_a_norm_that_does_nothing_here(tmp_path):
    """A norm of the root that is an Identity here but runs is refused."""
    norm = {"norm_pre.weight": torch.ones(64), "norm_pre.bias": torch.ones(64)}
    refused(write(tmp_path, timm_state("test_vit") | norm, arch="test_vit"), "norm_pre.bias")


@pytest.mark.parametrize("token", ["reg_token", "dist_token"])
def test_tokens_of_the_root(tmp_path, token):
    """A token that other models of the family have is refused, although no module that runs holds it."""
    state = timm_state("test_vit") | {token: torch.ones(1, 1, 64)}
    refused(write(tmp_path, state, arch="test_vit"), token)


def test_what_all_blocks_share(tmp_path):
    """Positions for all blocks are refused if the network has none and its class can have them."""
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2, "use_rot_pos_emb": False}
    state = timm_state("eva02_tiny_patch14_224", **small) | {"rope.freqs": torch.ones(2, 3, 4)}
    refused(write(tmp_path, state, arch="eva02_tiny_patch14_224") | {"model_arg": small}, "rope.freqs")


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_heads_are_not_judged(tmp_path, prefix):
    """Tensors absent at the root, or outside of the prefix, are named and do not matter."""
    state = {prefix + key: tensor for key, tensor in timm_state("test_vit", num_classes=3).items()}
    more = ["decoder.0.weight", "AuxLogits.fc.weight", "logit_scale", "blocks_of_text.0.weight", "projector.1.bias"]
    opened = write(tmp_path, state | {key: torch.ones(2) for key in more}, arch="test_vit")
    assert {*more, "head.weight"} <= {*load_backbone(**opened).weights.unexpected}


def test_stages_that_were_not_asked_for_are_not_judged(tmp_path):
    """A further tensor matters under a block that runs, and not under one that is cut off."""
    state = timm_state("test_vit") | {"blocks.5.attn.gate.weight": torch.ones(2)}
    opened = write(tmp_path, state, arch="test_vit")
    assert "blocks.5.attn.gate.weight" in load_backbone(**opened, out_indices=[4]).weights.unexpected
    refused(opened, "blocks.5.attn.gate.weight")


# Names of tensors, and the checkpoints that have them there.
HARMLESS = {
    "test_resnet": ["layer1.0.conv1.num_batches_tracked", "layer1.0.total_ops", "layer1.0.conv1.total_params"],
    "test_vit": [
        "mask_token",  # EVA and BEiT, pretraining
        "blocks.0.attn.relative_position_index",  # BEiT and Swin, as first published
        "blocks.0.attn.relative_coords_table",  # Swin V2
        "blocks.0.attn_mask",  # Swin
        "blocks.0.attn.attention_bias_idxs",  # LeViT, TinyViT, EfficientFormer
        "blocks.0.attn.qkv.bias_mask",  # DINOv3
        "rope_embed.periods",  # DINOv3
        "blocks.0.attn.rope.freqs_cos",  # EVA02
        "blocks.0.attn.rotary_emb.inv_freq",  # code that is based on Llama's
        "blocks.0.attn.rope.freqs",  # the ViT of Segment Anything and Perception Encoder
        "blocks.0.norm1._extra_state",  # Transformer Engine
    ],
}


def accepted(opened, *leaves):
    """Check that a checkpoint is read whole, and has tensors of these names that the network lacks."""
    weights = load_backbone(**opened, out_indices="all").weights
    assert weights.matched == weights.total
    unexpected = {key.rpartition(".")[2] for key in weights.unexpected}
    assert unexpected.issuperset(leaves), unexpected


@pytest.mark.parametrize("kind", ["ViT", "Swin", "Beit"])
def test_mask_tokens_of_pretraining(tmp_path, kind):
    """The token for masked patches that transformers' pretraining classes save is accepted, because no map needs it."""
    torch.manual_seed(0)
    options = {
        "ViT": VIT,
        "Swin": WINDOWS | {"encoder_stride": 32},
        "Beit": VIT | {"vocab_size": 9, "use_mask_token": True, "out_indices": [3]},
    }[kind]
    opened = saved(getattr(T, f"{kind}ForMaskedImageModeling")(getattr(T, f"{kind}Config")(**options)), tmp_path)
    assert any(key.endswith("mask_token") for key in safetensors.torch.load_file(tmp_path / "model.safetensors"))
    weights = load_backbone(**opened, out_indices="all").weights
    assert weights.matched + len(weights.missing) == weights.total


def test_counters_of_norms_that_are_frozen_here(tmp_path):
    """Counters of batches, which the norms in a DETR lack and those of a ResNet have, are accepted."""
    torch.manual_seed(0)
    backbone = T.ResNetConfig(**RESNET, out_features=["stage4"])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    model = T.DetrForObjectDetection(T.DetrConfig(**sizes, backbone_config=backbone))
    opened, own = saved(model, tmp_path), T.ResNetBackbone(backbone).state_dict()
    put(tmp_path, {f"model.backbone.conv_encoder.model.{key}": tensor for key, tensor in own.items()})
    accepted(opened)


def test_tables_of_torchvision(tmp_path):
    """The tables that torchvision's Swin keeps in its state are accepted under timm's names."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    state = timm_state("swin_tiny_patch4_window7_224", num_classes=0, **small)
    for kind in (swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2):
        own = kind(16, [7, 7], [0, 0], 1).state_dict()
        tables = {key: tensor for key, tensor in own.items() if key.startswith("relative_") and "bias" not in key}
        assert tables
        state |= {f"layers.0.blocks.0.attn.{key}": tensor for key, tensor in tables.items()}
    opened = write(tmp_path, state, arch="swin_tiny_patch4_window7_224", model_arg=small)
    accepted(opened, "relative_position_index", "relative_coords_table")


def test_states_of_other_kinds_of_modules(tmp_path):
    """`_extra_state` of modules with more state than tensors, such as those of Transformer Engine, is accepted."""

    class Norm(torch.nn.LayerNorm):
        def get_extra_state(self):
            return torch.zeros(3, dtype=torch.uint8)

        def set_extra_state(self, state):
            raise AssertionError

    model = timm.create_model("test_vit", num_classes=0)
    model.blocks[0].norm1 = Norm(64)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    accepted({"checkpoint": tmp_path / "w.pth", "arch": "test_vit"}, "_extra_state")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_what_a_profiler_leaves_behind(tmp_path, name):
    """Counters that a profiler (thop) leaves in layers that it does not know are accepted."""
    thop = pytest.importorskip("thop")
    model = timm.create_model(name).eval()
    thop.profile(model, (torch.zeros(1, 3, *model.default_cfg["input_size"][1:]),), verbose=False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    accepted({"checkpoint": tmp_path / "w.pth", "arch": name}, "total_ops", "total_params")


@pytest.mark.parametrize("name", HARMLESS)
def test_names_without_effect(tmp_path, name):
    """Counters, masks and tables that models compute themselves are accepted wherever they are."""
    state = {key: torch.ones(2) for key in HARMLESS[name]} | timm_state(name)
    assert load_backbone(**write(tmp_path, state, arch=name)).weights.undecided == ()


def test_learnt_frequencies_are_no_table(tmp_path):
    """Rotary frequencies that were learnt for each layer and head are refused if a network computes its own."""
    state = timm_state("test_vit") | {"blocks.0.attn.rope.freqs": torch.ones(2, 1, 2, 4)}
    refused(write(tmp_path, state, arch="test_vit"), "blocks.0.attn.rope.freqs")


def test_positions_of_clip(tmp_path):
    """`position_ids`, which every CLIP checkpoint before 2023 has under a module that runs, is accepted."""
    opened = saved(T.CLIPVisionModel(T.CLIPVisionConfig(**VIT)), tmp_path)
    put(tmp_path, {"vision_model.embeddings.position_ids": torch.arange(5)[None]})
    assert load_backbone(**opened).weights.matched


def test_norms_of_other_stages(tmp_path):
    """A checkpoint saved as a backbone has a norm for each stage, and those of other stages do not matter."""
    config = T.SwinConfig(**WINDOWS, out_features=["stage1", "stage2", "stage3", "stage4"])
    opened = saved(T.SwinBackbone(config), tmp_path)
    assert load_backbone(**opened, out_features=["stage2"]).weights.missing == ()
    put(tmp_path, {"hidden_states_norms.stage9.weight": torch.ones(2)})
    refused(opened, "hidden_states_norms.stage9.weight")


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        ("ResNet", RESNET, "encoder.stages.1.layers.0.se.weight"),
        ("Swin", WINDOWS, "encoder.layers.1.blocks.0.ls.gamma"),
        ("ViT", VIT, "embeddings.register_tokens"),
    ],
)
def test_prefixes_of_transformers(tmp_path, kind, options, key, prefixed):
    """A tensor is judged by its place in the model, with the prefix of a larger one or without."""
    torch.manual_seed(0)
    model = getattr(T, f"{kind}ForImageClassification")(getattr(T, f"{kind}Config")(**options))
    prefix = f"{model.base_model_prefix}." if prefixed else ""
    opened = saved(model if prefixed else getattr(model, model.base_model_prefix), tmp_path)
    put(tmp_path, {prefix + key: torch.ones(2), "decoder.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="1 of its tensors have no place in"):
        load_backbone(**opened)


def test_a_neck_for_segmentation(tmp_path):
    """BEiT's pyramid for segmentation is accepted, because it comes after the maps."""
    config = T.BeitConfig(**VIT | {"num_hidden_layers": 4}, out_indices=[0, 1, 2, 3], num_labels=3)
    opened = saved(T.BeitForSemanticSegmentation(config), tmp_path)
    assert any("fpn1" in name for name in load_backbone(**opened).weights.unexpected)


def test_an_edited_configuration(tmp_path):
    """A file with more layers than the configuration, or with biases that it leaves out, is refused."""
    opened = saved(T.ViTModel(T.ViTConfig(**VIT)), tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    refused(opened, "layers.2.attention.k_proj.bias", "--model-arg num_hidden_layers=3")
    whole = load_backbone(**opened, model_arg=["num_hidden_layers=3"])
    assert (whole.out_features, whole.settings["config_json"]["num_hidden_layers"]) == (["stage3"], 3)
    config.write_text(re.sub('"qkv_bias": true', '"qkv_bias": false', text))
    refused(opened, "layers.0.attention.k_proj.bias", "--model-arg qkv_bias=true")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("in_chans=1", "featcli sets it by itself"),
        ("nonsense=1", "cannot be made so"),
        ("init_values", "not NAME=VALUE"),
        (["depth=1", "depth=2"], "given twice"),
    ],
)
def test_arguments_that_are_refused(argument, message):
    """An argument that the network lacks, or that another option stands for, is refused."""
    with pytest.raises(UsageError, match=message):
        load_backbone("test_vit", random_init=True, model_arg=argument)


def test_fields_that_are_refused():
    """A field that a configuration lacks is refused, with the nearest that it has."""
    with pytest.raises(UsageError, match="ViTConfig has no such field") as error:
        load_backbone(T.ViTConfig(**VIT), model_arg={"num_hidden_layer": 2})
    assert "num_hidden_layers" in error.value.hint
    with pytest.raises(UsageError, match="num_hidden_layers: the configuration has that value already"):
        load_backbone(T.ViTConfig(**VIT), model_arg={"num_hidden_layers": 3})


def test_a_larger_model(tmp_path):
    """Inside a larger model only the backbone's tensors are judged, although its decoder has equal names."""
    backbone = T.ResNetConfig(**RESNET, out_features=["stage4"])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    opened = saved(T.DetrForObjectDetection(T.DetrConfig(**sizes, backbone_config=backbone)), tmp_path)
    inside = "model.backbone.conv_encoder.model."
    put(tmp_path, {"model.encoder.stages.0.gate": torch.ones(2), "encoder.layers.0.gate": torch.ones(2)})
    assert "model.encoder.stages.0.gate" in load_backbone(**opened).weights.unexpected
    put(tmp_path, {f"{inside}encoder.stages.0.gate": torch.ones(2)})
    refused(opened, "encoder.stages.0.gate")


def test_what_a_converter_leaves_out_is_said(tmp_path):
    """The weights line names tensors that timm's converters drop before featcli can judge them."""
    state = timm_state("test_vit") | {"blocks.0.pre_logits.weight": torch.ones(3)}
    weights = load_backbone(**write(tmp_path, state, arch="test_vit")).weights
    assert weights.undecided == ("blocks.0.pre_logits.weight",)
    assert "1 that the library leaves out or merges, which is not proven" in weights.summary()
