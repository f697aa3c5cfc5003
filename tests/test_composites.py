"""Check the backbones inside larger models: MaskFormer, DETR and others, tiny and with random weights."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transformers import TOKENS

from conftest import SAMPLES, upright
from featcli import extract, load_backbone, open_dump, replay
from featcli.backbones.checkpoint import resolve
from featcli.backbones.stages import Points
from featcli.errors import CheckpointError, UsageError
from featcli.spec.groups import CheckpointSpec

T = pytest.importorskip("transformers")
from old_names import OLD  # noqa: E402 (they are made of transformers)

RESNET = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "embedding_size": 16}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 64}
DINOV2 = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 56}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
}


def maskformer(backbone):
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return T.MaskFormerForInstanceSegmentation(
        T.MaskFormerConfig(backbone_config=backbone, decoder_config=T.DetrConfig(**DETR), **sizes)
    )


def mask2former():
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2}
    more = {"num_attention_heads": 2, "dim_feedforward": 32, "encoder_feedforward_dim": 32, "num_queries": 5}
    backbone = T.SwinConfig(**SWIN, out_features=STAGES)
    return T.Mask2FormerForUniversalSegmentation(T.Mask2FormerConfig(backbone_config=backbone, **sizes, **more))


def rt_detr():
    backbone = T.RTDetrResNetConfig(**RESNET, out_features=STAGES[1:])
    sizes = {"encoder_hidden_dim": 32, "encoder_in_channels": [32, 32, 64], "decoder_in_channels": [32, 32, 32]}
    more = {key: value for key, value in DETR.items() if key != "encoder_layers"}
    return T.RTDetrForObjectDetection(T.RTDetrConfig(backbone_config=backbone, **sizes, **more))


def upernet():
    backbone = T.ResNetConfig(**RESNET, out_features=STAGES)
    sizes = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 32}
    return T.UperNetForSemanticSegmentation(T.UperNetConfig(backbone_config=backbone, **sizes))


def depth_anything():
    backbone = T.Dinov2Config(**DINOV2, out_indices=[0, 1, 2, 3], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "reassemble_hidden_size": 32, "fusion_hidden_size": 8}
    return T.DepthAnythingForDepthEstimation(
        T.DepthAnythingConfig(backbone_config=backbone, patch_size=14, head_hidden_size=4, **sizes)
    )


def dpt():
    backbone = T.Dinov2Config(**DINOV2, out_indices=[0, 1, 2, 3], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "hidden_size": 32}
    return T.DPTForDepthEstimation(T.DPTConfig(backbone_config=backbone, is_hybrid=False, **sizes))


def detr(backbone):
    return T.DetrForObjectDetection(T.DetrConfig(**DETR, backbone_config=backbone))


def conditional_detr():
    return T.ConditionalDetrForObjectDetection(
        T.ConditionalDetrConfig(**DETR, backbone_config=T.ResNetConfig(**RESNET, out_features=["stage4"]))
    )


def deformable_detr(backbone):
    sizes = DETR | {"decoder_layers": 2, "encoder_n_points": 2, "decoder_n_points": 2}
    return T.DeformableDetrForObjectDetection(T.DeformableDetrConfig(**sizes, backbone_config=backbone))


def grounding_dino():
    text = T.BertConfig(**TOKENS | {"num_hidden_layers": 1, "vocab_size": 50})
    sizes = DETR | {"decoder_layers": 2, "encoder_n_points": 2, "decoder_n_points": 2, "text_config": text}
    backbone = T.SwinConfig(**SWIN, out_features=STAGES[1:])
    return T.GroundingDinoForObjectDetection(T.GroundingDinoConfig(**sizes, backbone_config=backbone))


def oneformer():
    sizes = {"hidden_dim": 32, "conv_dim": 32, "mask_dim": 32, "num_queries": 5, "task_seq_len": 8}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "query_dec_layers": 1, "num_attention_heads": 2}
    text = {"text_encoder_width": 32, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 50}
    widths = {"dim_feedforward": 32, "encoder_feedforward_dim": 32, "text_encoder_context_length": 8}
    backbone = T.SwinConfig(**SWIN, out_features=STAGES)
    return T.OneFormerForUniversalSegmentation(
        T.OneFormerConfig(backbone_config=backbone, **sizes, **layers, **text, **widths)
    )


def zoedepth():
    backbone = T.BeitConfig(
        **TOKENS | {"num_hidden_layers": 4}, image_size=64, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "bottleneck_features": 8}
    bins = {"bin_configurations": [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}], "bin_embedding_dim": 8}
    patches = {"patch_transformer_hidden_size": 16, "patch_transformer_intermediate_size": 16}
    return T.ZoeDepthForDepthEstimation(
        T.ZoeDepthConfig(backbone_config=backbone, **sizes, **bins, **patches, num_attractors=[4, 2, 2, 1])
    )


def table_transformer():
    backbone = T.ResNetConfig(**RESNET, out_features=["stage4"])
    return T.TableTransformerForObjectDetection(T.TableTransformerConfig(**DETR, backbone_config=backbone))


def lw_detr():
    return OLD["LW-DETR"].make()


def rf_detr():
    return OLD["RF-DETR"].make()


# name -> (how to make the model, where its backbone is in memory)
COMPOSITES = {
    "maskformer-resnet": (
        lambda: maskformer(T.ResNetConfig(**RESNET, out_features=STAGES)),
        "model.pixel_level_module.encoder",
    ),
    "maskformer-swin": (
        lambda: maskformer(T.SwinConfig(**SWIN, out_features=STAGES)),
        "model.pixel_level_module.encoder",
    ),
    "mask2former": (mask2former, "model.pixel_level_module.encoder"),
    "detr-timm": (
        lambda: detr(T.TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4])),
        "model.backbone.model",
    ),
    "detr-resnet": (lambda: detr(T.ResNetConfig(**RESNET, out_features=["stage4"])), "model.backbone.model"),
    "detr-dilated": (
        lambda: detr(T.TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4], output_stride=16)),
        "model.backbone.model",
    ),
    "conditional-detr": (conditional_detr, "model.backbone.model"),
    "deformable-detr-timm": (
        lambda: deformable_detr(T.TimmBackboneConfig(backbone="test_resnet", out_indices=[2, 3, 4])),
        "model.backbone.model",
    ),
    "deformable-detr-resnet": (
        lambda: deformable_detr(T.ResNetConfig(**RESNET, out_features=STAGES[1:])),
        "model.backbone.model",
    ),
    "table-transformer": (table_transformer, "model.backbone.conv_encoder.model"),
    "grounding-dino": (grounding_dino, "model.backbone.conv_encoder.model"),
    "oneformer": (oneformer, "model.pixel_level_module.encoder"),
    "zoedepth": (zoedepth, "backbone"),
    "rt-detr": (rt_detr, "model.backbone.model"),
    "lw-detr": (lw_detr, "model.backbone.backbone"),
    "rf-detr": (rf_detr, "model.backbone.backbone"),
    "upernet": (upernet, "backbone"),
    "depth-anything": (depth_anything, "backbone"),
    "dpt": (dpt, "backbone"),
}


# Inputs that some models take besides pixels.
INPUTS = {
    "oneformer": {"task_inputs": torch.ones(6, 8)},
    "grounding-dino": {"input_ids": torch.tensor([[101, 7, 8, 1012, 102]]).clamp(max=49).expand(6, 5)},
}


@pytest.fixture(scope="module", params=COMPOSITES)
def composite(request, tmp_path_factory):
    """Save a composite to a folder and load it: (folder, model, its backbone's place, ...)."""
    make, place = COMPOSITES[request.param]
    made = tmp_path_factory.mktemp("composite")
    torch.manual_seed(0)
    model = make().eval()
    for name, buffer in model.named_buffers():  # norms are trained, because fresh ones are all alike
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    model.save_pretrained(made / "checkpoint")
    edge = 56 if "dinov2" in str(model.config) else 64
    T.ViTImageProcessor(size={"height": edge, "width": edge}).save_pretrained(made / "checkpoint")
    outcome = extract(SAMPLES / "nature", checkpoint=str(made / "checkpoint"), output=made / "dump")
    return made / "checkpoint", model, place, load_backbone(str(made / "checkpoint")), outcome.dump


def maps_of(backbone, pixels):
    """Return what the model's head gets, with patches as a grid."""
    with torch.no_grad():
        found = backbone(pixels)
    found = found if isinstance(found, list) else found.feature_maps
    return [m if m.ndim == 4 else m[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for m in found]


def test_backbone_inside(composite):
    """A composite's folder gives its inner backbone, with its weights and the stages that the model itself uses."""
    folder, model, place, backbone, dump = composite
    pixels = torch.randint(0, 256, (2, 3, *backbone.preprocessing.size), dtype=torch.uint8)
    expected = maps_of(model.get_submodule(place), backbone.preprocessing.normalize(pixels))
    assert [stage.name for stage in backbone.selected] == list(open_dump(dump).stages)
    for found, maps in zip(backbone(pixels).values(), expected, strict=True):
        assert torch.equal(found, maps)
    assert " in a " in backbone.name
    assert resolve(CheckpointSpec(checkpoint=str(folder))).inside == f"{place} of {type(model).__name__}"
    assert backbone.weights.matched == backbone.weights.total > 0


def test_a_maskformer_as_it_is_at_the_hub(tmp_path):
    """A MaskFormer whose configuration names a plain Swin makes its own kind of it, whose names the weights have."""
    torch.manual_seed(0)
    model = maskformer(T.SwinConfig(**SWIN, out_features=STAGES)).eval()
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone_config"]["model_type"] == "maskformer-swin"
    config["backbone_config"] = T.SwinConfig(**SWIN).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(tmp_path)
    assert backbone.out_features == STAGES
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = maps_of(model.model.pixel_level_module.encoder, backbone.preprocessing.normalize(pixels))
    for found, maps in zip(backbone(pixels).values(), expected, strict=True):
        assert torch.equal(found, maps)


def test_replay(composite, tmp_path):
    """The rest of a model, run on a dump's maps, gives bit for bit what the whole model gives for the pictures."""
    folder, model, _, backbone, path = composite
    dump = open_dump(path)
    size = backbone.preprocessing.size
    inputs = INPUTS.get(model.config.model_type, {})
    if model.config.model_type in ("dpt", "zoedepth"):
        with pytest.raises(UsageError, match="reads class tokens"):
            replay(model, dump, size)
        tokens = open_dump(extract(SAMPLES / "nature", checkpoint=folder, pool="cls", output=tmp_path / "c").dump)
        inputs = {"class_tokens": tokens}
    pictures = [upright(SAMPLES / "nature" / key) for key in dump.keys]
    pixels = backbone.preprocessing.normalize(torch.stack([backbone.preprocess(picture) for picture in pictures]))
    with torch.inference_mode():
        found = replay(model, dump, size, **inputs)
        inputs.pop("class_tokens", None)
        whole, again = (model(pixel_values=pixels, **inputs) for _ in range(2))
    tensors = [name for name, value in whole.items() if torch.is_tensor(value)]
    assert tensors
    assert [name for name in tensors if not torch.equal(whole[name], found[name])] == []
    assert [name for name in tensors if not torch.equal(whole[name], again[name])] == []  # the backbone is back


def test_replay_of_what_is_no_composite():
    """A model without a backbone inside cannot be replayed, and the size of the pixels must be known."""
    with pytest.raises(UsageError, match="holds no backbone"):
        replay(T.ResNetModel(T.ResNetConfig(**RESNET)), [torch.zeros(1, 64, 2, 2)], (64, 64))
    with pytest.raises(UsageError, match="size of the pixels"):
        replay(upernet(), [torch.zeros(1, 16, 16, 16)] * 4)


@pytest.fixture(scope="module")
def small():
    """Return a model, the (H, W) that its backbone was run with, and the four maps that it gave for two pictures."""
    torch.manual_seed(0)
    model = upernet().eval()
    with torch.no_grad():
        maps = model.backbone(torch.rand(2, 3, 64, 64)).feature_maps
    return model, (64, 64), dict(zip(STAGES, maps, strict=True))


def test_replay_knows_maps_by_name(small):
    """Maps in a mapping are found by name: neither their order matters, nor stages that the model does not use."""
    model, size, maps = small
    with torch.no_grad():
        expected = replay(model, list(maps.values()), size).logits
        turned = {"stem": torch.zeros(2, 16, 16, 16), **dict(reversed(maps.items()))}
        found = replay(model, turned, list(size)).logits
        arrays = replay(model, {name: found.numpy() for name, found in maps.items()}, np.array(size).tolist()).logits
    assert torch.equal(expected, found)
    assert torch.equal(expected, arrays)


def test_replay_knows_maps_of_timm_by_name():
    """The maps of a timm backbone in a larger model may have featcli's names or timm's, in any order."""
    torch.manual_seed(0)
    model = deformable_detr(T.TimmBackboneConfig(backbone="test_resnet", out_indices=[2, 3, 4])).eval()
    pixels = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        maps = model.get_submodule("model.backbone.model")(pixels)
        whole = model(pixel_values=pixels).logits
        for names in (STAGES[1:], ["layer2", "layer3", "layer4"]):
            turned = dict(reversed([*zip(names, maps, strict=True)]))
            assert torch.equal(whole, replay(model, turned, (128, 128)).logits)


def test_replay_trains_the_neck(small):
    """Gradients reach the neck, and maps that ask for them, but never the backbone."""
    model, size, maps = small
    with torch.inference_mode():
        frozen = {name: found.clone() for name, found in maps.items()}  # these are tensors that autograd would refuse
    wanting = {**frozen, "stage2": maps["stage2"].clone().requires_grad_()}
    replay(model, wanting, size).logits.sum().backward()
    assert wanting["stage2"].grad.abs().sum() > 0
    assert all(one.grad is None for one in model.backbone.parameters())
    assert model.decode_head.classifier.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_replay_in_threads_leaves_the_model_alone(small):
    """Eight threads on one model each get their own result, and the model stays as it was, also if a call fails."""
    model, size, maps = small
    others = [maps, {name: found + 1 for name, found in maps.items()}]
    parts, values = list(model.modules()), {name: found.clone() for name, found in model.state_dict().items()}
    hooks = [len(part._forward_hooks) for part in parts]

    def call(number):
        with torch.no_grad():
            if number % 50 == 49:
                with pytest.raises(TypeError, match="must be Tensor"):
                    replay(model, maps, size, labels="none")
            return replay(model, others[number % 2], size).logits

    expected = [call(0), call(1)]
    assert not torch.equal(*expected)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(call, range(200)))
    assert all(torch.equal(expected[number % 2], logits) for number, logits in enumerate(found))
    assert [id(part) for part in model.modules()] == [id(part) for part in parts]
    assert [len(part._forward_hooks) for part in parts] == hooks
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_replay_records_as_the_model_does():
    """Attentions that are asked for come once for each layer, however often the model was replayed before."""
    torch.manual_seed(0)
    model = detr(T.ResNetConfig(**RESNET, out_features=["stage4"])).eval()
    model.set_attn_implementation("eager")
    maps = [torch.rand(1, 64, 2, 2)]
    with torch.no_grad():
        found = [replay(model, maps, (64, 64), output_attentions=True) for _ in range(3)]
    assert [len(one.decoder_attentions) for one in found] == [1, 1, 1]


MISUSES = {
    "nothing": ({"maps": {}}, r"one float32 map \(B, C, H, W\)"),
    "pooled": ({"maps": [torch.zeros(1, 4)] * 4}, r"one float32 map \(B, C, H, W\)"),
    "half precision": ({"maps": [torch.zeros(1, 16, 8, 8).half()] * 4}, r"one float32 map \(B, C, H, W\)"),
    "an empty batch": ({"maps": [torch.zeros(0, 16, 16, 16)] * 4}, r"one float32 map \(B, C, H, W\)"),
    "no maps": ({"maps": None}, "neither a mapping nor a sequence"),
    "one tensor": ({"maps": torch.zeros(4, 1, 16, 16, 16)}, "neither a mapping nor a sequence"),
    "names alone": ({"maps": STAGES}, "not an array of numbers"),
    "maps of many sizes": ({"maps": [[np.zeros((16, 4, 4)), np.zeros((16, 5, 4))]] * 4}, "not an array of numbers"),
    "a stage less": ({"without": "stage2"}, "stage2 is not there"),
    "a map less": ({"sequence": slice(3)}, "3 maps: UperNetForSemanticSegmentation needs 4"),
    "another order": ({"sequence": slice(None, None, -1)}, r"the map of stage1 is \(64, 2, 2\)"),
    "another size": ({"size": (128, 128)}, r"gives \(16, 32, 32\) for 128x128 pixels"),
    "no size": ({"size": None}, "size of the pixels"),
    "half a size": ({"size": 64}, "not \\(H, W\\)"),
    "a broken size": ({"size": (64.0, 64)}, "not \\(H, W\\)"),
    "two sizes": ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "pixel_values are 32x32"),
    "pixels of others": ({"pixel_values": torch.zeros(1, 3, 64, 64)}, "of 2 maps"),
    "class tokens of others": ({"class_tokens": [torch.zeros(2, 1)] * 4}, "class_tokens"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuses_of_replay(small, misuse):
    """Maps that are not of this model or these pixels are refused with a message before anything runs."""
    model, size, maps = small
    given, message = MISUSES[misuse]
    maps = {name: found for name, found in maps.items() if name != given.get("without")}
    maps = list(maps.values())[given["sequence"]] if "sequence" in given else maps
    more = {name: value for name, value in given.items() if name not in ("without", "sequence")}
    with pytest.raises(UsageError, match=message):
        replay(model, **{"maps": maps, "size": size, **more})


def test_hints_of_replay(small):
    """Each refusal names what would be right: the type, the rows, the names or the sizes."""
    model, size, maps = small
    numpy, half = [found.numpy() for found in maps.values()], [found.half() for found in maps.values()]
    fewer = [numpy[0][:1], *numpy[1:]]
    cases = [
        (upernet().half(), numpy, {}, "model.float()"),
        (model, half, {}, "--dtype float32"),
        (model, fewer, {}, "the same rows of each stage"),
        (model, STAGES, {}, "give an open dump"),
        (model, [[found[0], found[0, :, :1]] for found in numpy], {}, "maps of one size"),
        (model, numpy, {"class_tokens": [found[:1, :, 0, 0] for found in numpy]}, "the same rows of both"),
        (model, numpy, {"class_tokens": numpy}, "--pool cls"),
    ]
    for one, given, more, hint in cases:
        with pytest.raises(UsageError) as refusal:
            replay(one, given, size, **more)
        assert hint in refusal.value.hint, (refusal.value.message, refusal.value.hint)


def test_replay_through_a_model_that_goes_around_it(small):
    """If a replaced forward does not use the stored maps, replay raises instead of returning."""
    model, size, maps = small
    model.forward = model.forward  # binds it to this model, as accelerate does
    try:
        with pytest.raises(UsageError, match="never called its backbone"), torch.no_grad():
            replay(model, maps, size)
    finally:
        del model.forward


def test_a_processor_that_keeps_proportions_in_another_way(tmp_path):
    """DepthAnything's processor, asked for one size, gives it to all pictures, though it works in steps of a patch."""
    depth_anything().save_pretrained(tmp_path)
    sizes = {"size": {"height": 56, "width": 56}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    T.DPTImageProcessor(**sizes).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="every picture another size"):
        load_backbone(tmp_path)
    outcome = extract(SAMPLES / "nature", checkpoint=tmp_path, image_size=56, output=tmp_path / "d")
    assert outcome.failed == 0


def test_the_vision_model_of_tipsv2(tmp_path):
    """TIPSv2 gives the stages of its vision model, with that model's weights."""
    torch.manual_seed(0)
    sizes = TOKENS | {"num_hidden_layers": 3}
    config = T.Tipsv2Config(vision_config=sizes | {"image_size": 56}, text_config=sizes | {"vocab_size": 50})
    model = T.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, out_indices="all")
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    ready = backbone.preprocessing.normalize(pixels)
    with torch.no_grad():
        output = model.vision_model(ready, output_hidden_states=True)
    last = output.last_hidden_state[:, -16:].transpose(1, 2).unflatten(2, (4, 4))
    assert list(backbone(pixels)) == ["stem", "stage1", "stage2", "stage3"]
    assert torch.equal(backbone(pixels)["stage3"], last)
    assert backbone.weights.matched == backbone.weights.total > 0


def test_other_stages_can_be_asked_for(tmp_path):
    """The model's own stages are a default, not a limit."""
    detr(T.ResNetConfig(**RESNET, out_features=["stage4"])).save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), out_features=["stem", "stage2"])
    assert [stage.name for stage in backbone.selected] == ["stem", "stage2"]
    assert resolve(CheckpointSpec(checkpoint=str(tmp_path))).share(Points((0, 2))) < 1


def test_processors_that_give_every_picture_another_size(tmp_path):
    """MaskFormer's own processor keeps proportions, so a size must be given."""
    maskformer(T.ResNetConfig(**RESNET, out_features=STAGES)).save_pretrained(tmp_path)
    T.MaskFormerImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="every picture another size") as refused:
        load_backbone(str(tmp_path))
    assert "--image-size" in refused.value.hint
    backbone = load_backbone(str(tmp_path), image_size=(64, 96))
    assert backbone.selected[0].shape == (16, 16, 24)
    assert backbone.preprocess(Image.new("RGB", (200, 120))).shape == (3, 64, 96)


def test_timm_backbone_folder(tmp_path):
    """A `timm_backbone` folder that transformers saved loads from its path, which transformers itself cannot do."""
    torch.manual_seed(3)
    model = T.TimmBackbone(T.TimmBackboneConfig(backbone="test_resnet", out_indices=[2, 4])).eval()
    model.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert [stage.name for stage in backbone.selected] == ["stage2", "stage4"]
    pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(backbone.preprocessing.normalize(pixels)).feature_maps
    for found, maps in zip(backbone(pixels).values(), expected, strict=True):
        assert torch.equal(found, maps)


def test_random_weights_for_a_composite(tmp_path):
    """The configuration of a composite alone gives its backbone with random weights, if asked."""
    T.DetrConfig(**DETR, backbone_config=T.ResNetConfig(**RESNET, out_features=["stage4"])).save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path), random_init=True).weights.random
    assert resolve(CheckpointSpec(checkpoint=str(tmp_path))).stages[-1].shape == (64, 2, 2)
    with pytest.raises(CheckpointError):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("limit", [None, (96, 128)])
def test_native_sizes_of_a_timm_backbone(tmp_path, limit):
    """With --fit native the processor's size stays the model's own, and --image-size limits the pictures."""
    model = T.TimmBackbone(T.TimmBackboneConfig(backbone="vit_tiny_patch16_224", out_indices=[1])).eval()
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 64, "width": 80}).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, fit="native", image_size=limit)
    assert backbone.settings["input_size"] == [64, 80]
    assert backbone.settings["options"] == {"img_size": [64, 80], "dynamic_img_size": True}
    assert backbone.preprocessing.settings["largest"] == (list(limit) if limit else None)
    pixels = backbone.preprocess(Image.new("RGB", (200, 120)))
    assert tuple(pixels.shape) == ((3, 80, 128) if limit else (3, 128, 192))
    height, width = pixels.shape[1:]
    assert backbone(pixels[None])["stage2"].shape[2:] == (height // 16, width // 16)
