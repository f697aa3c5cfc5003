"""Check what can be asked of any backbone: channels, norm, size, and a configuration instead of a checkpoint."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from tiny_transformers import PYRAMID, TINY, TOKENS, randomize

from conftest import SAMPLES, upright
from featcli import extract, load_backbone, open_dump
from featcli.backbones.checkpoint import resolve
from featcli.backbones.image_processor import ImageProcessor
from featcli.backbones.preprocessing import processor_preprocessing, timm_preprocessing
from featcli.errors import CheckpointError, UsageError
from featcli.extraction.planning import dry_run
from featcli.pixels.resize import ResizeMode
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import CheckpointSpec

T = pytest.importorskip("transformers")
PICTURE = upright(SAMPLES / "nature" / "sea.jpg")
VIT = TOKENS | {"image_size": 64, "patch_size": 16}


def processor(folder, edge=64):
    T.ViTImageProcessor(size={"height": edge, "width": edge}).save_pretrained(folder)


def test_grey_pictures_for_timm():
    """`num_channels=1` gives timm's model for one channel, on the grey that timm's own loader makes."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0, in_chans=1).eval()
    config = resolve_model_data_config(model)
    mean, std = (np.mean(config[name]).item() for name in ("mean", "std"))
    fitted = create_transform(**config, is_training=False, use_prefetcher=True)(PICTURE.convert("L"))
    backbone = load_backbone("test_resnet", random_init=True, num_channels=1)
    pixels = backbone.preprocess(PICTURE)
    assert np.array_equal(pixels.numpy(), np.asarray(fitted))
    with torch.inference_mode():
        ready = torch.from_numpy(np.asarray(fitted))[None].float().div(255).sub(mean).div(std)
        torch.testing.assert_close(backbone(pixels[None])["stage4"], model.forward_features(ready), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "numbers"), [(1, 3), (1, 1), (3, 3), (3, 1), (2, 2), (5, 1)])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_channels_in_every_crop_mode_of_timm(crop_mode, channels, numbers):
    """Greys, colours and bands are cropped as timm does it, and a border has the pixels that normalise to zero.

    `numbers` is how many means the checkpoint has. benchmarks/preprocessing.py compares more of these.
    """
    means = (0.5, 0.4, 0.2)[:numbers]
    config = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": crop_mode, "std": (0.25,) * numbers}
    if channels in (1, 3):
        given, pictures = PICTURE, [PICTURE.convert("L") if channels == 1 else PICTURE]
        of_pictures = [(np.mean(means).item(),) if channels == 1 else (means * 3)[:3]]
    else:
        pictures = [PICTURE.getchannel(band % 3) for band in range(channels)]
        given = [picture.convert("RGB") for picture in pictures]
        of_pictures = [(mean,) for mean in (means * channels)[:channels]]
    for size in ((64, 64), (48, 80)):
        config |= {"input_size": (3, *size)}
        found = timm_preprocessing({**config, "mean": means}, channels, "", None).fit(given)
        expected = [
            create_transform(**config, mean=mean, use_prefetcher=True)(picture)
            for picture, mean in zip(pictures, of_pictures, strict=True)
        ]
        assert np.array_equal(found, np.concatenate(expected))
        if crop_mode == "border":
            assert found[:, 0, 0].tolist() == [round(255 * mean) for one in of_pictures for mean in one]


def test_trained_weights_for_other_channels(tmp_path):
    """timm adapts the first layer of trained weights to one channel by summing over the colours."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    grey = load_backbone(tmp_path / "w.pth", arch="test_resnet", num_channels=1)
    colours = load_backbone(tmp_path / "w.pth", arch="test_resnet")
    first = colours.network.module.conv1[0].weight
    torch.testing.assert_close(grey.network.module.conv1[0].weight, first.sum(1, keepdim=True))


def test_numbers_for_greys_alone(tmp_path):
    """An image processor whose lists have one number, for the greys of its network, gives its own pixels."""
    T.ViTModel(T.ViTConfig(**VIT, num_channels=1)).save_pretrained(tmp_path)
    own = T.ViTImageProcessorPil(size={"height": 64, "width": 64}, image_mean=[0.4], image_std=[0.25])
    own.save_pretrained(tmp_path)
    ours = load_backbone(tmp_path).preprocessing
    processor = ImageProcessor(own)
    padded = ImageOps.pad(PICTURE, (64, 64), 2, color=(102,) * 3)
    by_fit = processor_preprocessing(processor, (64, 64), 1, ResizeMode("pad", (64, 64), (16, 16)))
    for preprocessing, picture in ((ours, PICTURE), (by_fit, padded)):
        expected = own(picture.convert("L"), return_tensors="pt")["pixel_values"]
        for found in (preprocessing, pickle.loads(pickle.dumps(preprocessing))):
            pixels = found.normalize(torch.from_numpy(found.fit(PICTURE))[None])
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
            assert found.settings["image_mean"] == [0.4]
    for asked, mean, overrides in (((0.4,), 0.4, {}), ((0.3,), 0.3, {"mean": (0.3,)})):
        found = processor.overridden({"mean": asked}, (64, 64), is_sized_by_fit=False)
        assert found.overrides == overrides
        assert processor_preprocessing(found, (64, 64), 1).mean == (mean,)


def test_grey_pictures_for_transformers(tmp_path):
    """A transformers checkpoint for one channel gets the grey of the picture."""
    torch.manual_seed(0)
    config = T.ResNetConfig(**PYRAMID, hidden_sizes=[16, 32, 32, 64], embedding_size=16, num_channels=1)
    T.ResNetModel(config).save_pretrained(tmp_path)
    processor(tmp_path)
    outcome = extract([str(SAMPLES / "nature")], checkpoint=tmp_path, output=tmp_path / "d")
    backbone = load_backbone(tmp_path)
    pixels = backbone.preprocess(PICTURE)
    grey = PICTURE.convert("L").resize((64, 64), 2)
    assert pixels.shape == (1, 64, 64)
    assert np.array_equal(pixels[0].numpy(), np.asarray(grey))
    dump = open_dump(outcome.dump)
    row = torch.from_numpy(dump["stage4"]["sea.jpg"])
    torch.testing.assert_close(row, backbone(pixels[None])["stage4"][0], rtol=0, atol=1e-5)  # in another batch size


def test_greys_of_a_processor_with_steps_of_its_own():
    """Greys are refused for EfficientNet's processor, which shifts values in a way of its own."""
    small = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
    with pytest.raises(UsageError, match="no greys"):
        load_backbone(T.EfficientNetConfig(**small), num_channels=1)


def test_options_that_change_nothing_are_no_part_of_the_plan(tmp_path, cli):
    """An option that asks for what the checkpoint has anyway does not change the plan, so the dump is resumed."""
    arguments = ["extract", SAMPLES / "things", "-c", "test_vit", "--random-init", "-o", tmp_path / "d"]
    assert cli(*arguments).code == 0
    same = cli(*arguments, "--num-channels", 3, "--image-size", 160, "--norm", "raw")
    assert (same.code, "nothing left to do" in same.err) == (0, True)


def test_channels_whose_numbers_nobody_says(cli, tmp_path):
    """A model of four channels can be inspected, but extract refuses it without a mean and a deviation for them."""
    shown = cli("inspect", "resnet18", "--num-channels", "4")
    assert (shown.code, "input 4x224x224" in shown.out) == (0, True)
    run = cli("extract", SAMPLES, "-c", "resnet18", "--random-init", "--num-channels", "4", "-o", tmp_path / "d")
    assert (run.code, "give --mean and --std" in run.err) == (2, True)
    assert cli("inspect", "resnet18", "--num-channels", "0").code == 2


def test_norm_of_timm():
    """`norm="model"` gives the last map of `forward_features`, and `raw`, the default, gives what the norm gets."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    backbone = load_backbone("test_vit", random_init=True, norm="model", out_indices="all")
    pixels = backbone.preprocess(PICTURE)[None]
    ready = backbone.preprocessing.normalize(pixels)
    with torch.inference_mode():
        whole = model.forward_features(ready)
        expected = model.forward_intermediates(ready, norm=True, intermediates_only=True)
        raw = model.forward_intermediates(ready, intermediates_only=True)
    *_, last = backbone(pixels).values()
    assert torch.equal(last.flatten(2).transpose(1, 2), whole[:, model.num_prefix_tokens :])
    assert torch.equal(backbone.class_tokens(pixels)["stage6"], whole[:, 0])
    for found, maps in zip(backbone(pixels).values(), expected, strict=True):
        assert torch.equal(found, maps)
    (middle,) = load_backbone("test_vit", random_init=True, norm="model", out_indices=[2])(pixels).values()
    assert torch.equal(middle, expected[2])
    (middle,) = load_backbone("test_vit", random_init=True, norm="raw", out_indices=[2])(pixels).values()
    assert torch.equal(middle, raw[2])


def test_norm_of_a_pyramid_of_timm():
    """A pyramid's final norm applies to its last stage, and the other stages stay the same, cut or not."""
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depths": [1, 1, 1, 1]}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **small).eval()
    options = {"random_init": True, "norm": "model", "model_arg": small}
    whole = load_backbone("swin_tiny_patch4_window7_224", **options, out_indices="all")
    with pytest.raises(UsageError, match="the final norm of swin_tiny_patch4_window7_224 is for stage4 alone"):
        load_backbone("swin_tiny_patch4_window7_224", **options, out_indices=[1])
    cut = load_backbone("swin_tiny_patch4_window7_224", random_init=True, model_arg=small, out_indices=[1])
    pixels = whole.preprocess(PICTURE)[None]
    with torch.inference_mode():
        ready = whole.preprocessing.normalize(pixels)
        expected = model.forward_intermediates(ready, norm=True, output_fmt="NCHW", intermediates_only=True)
        features = model.forward_features(ready).permute(0, 3, 1, 2)
    for found, maps in zip(whole(pixels).values(), expected, strict=True):
        assert torch.equal(found, maps)
    assert torch.equal(whole(pixels)["stage4"], features)
    assert torch.equal(cut(pixels)["stage2"], expected[1])


@pytest.mark.parametrize(
    ("checkpoint", "norm"),
    [("test_convnext", "model"), ("test_resnet", "model"), ("test_vit2", "model"), ("resnet", "raw"), ("bit", "raw")],
)
def test_norms_that_change_no_map(checkpoint, norm):
    """`norm` is refused if a model has no final norm for its maps, or has it only after its pooling."""
    given = {"checkpoint": checkpoint, "random_init": True}
    if checkpoint in TINY:
        given["checkpoint"] = T.CONFIG_MAPPING[checkpoint](**TINY[checkpoint])
    with pytest.raises(UsageError, match=f"--norm {norm}: .* has no final norm for its maps") as refused:
        load_backbone(**given, norm=norm)
    assert refused.value.hint == "leave --norm out"
    other = {"raw": "model", "model": "raw"}[norm]
    pixels = load_backbone(**given).preprocess(PICTURE)[None]
    (default,), (same,) = (load_backbone(**given, norm=one)(pixels).values() for one in (None, other))
    assert torch.equal(default, same)  # a value that equals the default is allowed


def warned(checkpoint, pool, **options):
    """Return what a dry run says about vectors."""
    said = []
    asked = ExtractSpec(SAMPLES, checkpoint=checkpoint, random_init=True, output="d", pool=pool, **options)
    dry_run(asked, lambda kind, **facts: said.append(facts.get("text", "")))
    return [text for text in said if "pooled before" in text]


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_vectors_before_the_norm(pool):
    """A run warns about vectors of a last stage that timm norms before pooling, and the way out gives timm's own."""
    (line,) = warned("test_vit", pool)
    assert line == (
        "stage6 is pooled before the model's final norm, and test_vit itself pools after it:"
        " --out-features embedding gives its own vector, --norm model gives maps after it"
    )
    assert warned("test_vit", pool, norm="model") == warned("test_vit", pool, out_indices=0) == []
    torch.manual_seed(0)
    model = timm.create_model(
        "test_vit", num_classes=0, global_pool={"avg": "avg", "cls": "token"}[pool], fc_norm=False
    )
    backbone = load_backbone("test_vit", random_init=True, norm="model")
    pixels = backbone.preprocess(PICTURE)[None]
    with torch.inference_mode():
        expected = model.eval()(backbone.preprocessing.normalize(pixels))
    found = backbone(pixels)["stage6"].mean((2, 3)) if pool == "avg" else backbone.class_tokens(pixels)["stage6"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_vectors_before_a_norm_of_class_tokens_alone():
    """The run warns about them whatever other reductions stand before them, and not about averages."""
    checkpoint = T.CLIPVisionConfig(**{**VIT, "hidden_size": 32})
    assert [len(warned(checkpoint, pool)) for pool in ("cls", "avg,cls", "cls+avg", "avg")] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("checkpoint", "of_average", "of_class_token"),
    [
        ("test_convnext", False, False),  # timm's pools first, then norms
        ("test_vit2", False, False),  # this one, too
        ("test_efficientnet", False, False),  # a convolution comes before its pooling
        ("test_resnet", False, False),
        ("rexnet_100", False, False),  # a convolution, with a norm in one module
        ("resnetv2_18", True, True),
        ("vit", True, True),
        ("clip_vision_model", False, True),  # its norm is for the class token alone
        ("dinov2", False, False),  # its maps have passed the norm
        ("convnext", False, False),
        ("swinv2", True, True),
        ("beit", False, False),
    ],
)
def test_models_that_norm_before_they_pool(checkpoint, of_average, of_class_token):
    """Where the final norm stands is found in the model itself, for both libraries."""
    if checkpoint in (*TINY, "vit", "clip_vision_model"):
        options = TINY.get(checkpoint, {**VIT, "hidden_size": 32})
        checkpoint = T.CONFIG_MAPPING[checkpoint](**options)
    model = resolve(CheckpointSpec(checkpoint=checkpoint))
    found = [bool(model.norms_before_pooling(of_class_token)) for of_class_token in (False, True)]
    assert found == [of_average, of_class_token]


@pytest.mark.parametrize("checkpoint", [T.Swinv2Config(**TINY["swinv2"]), "efficientvim_m1"], ids=["swinv2", "timm"])
def test_maps_that_no_option_gives_after_the_norm(checkpoint):
    """Only the embedding is named if a model norms before it pools and its library gives no map after that norm.

    AutoBackbone gives none for Swinv2; timm gives EfficientViM's after the norm of another tensor.
    """
    (line,) = warned(checkpoint, "avg")
    assert line.endswith("itself pools after it: --out-features embedding gives its own vector")


# Each type normalises a raw map (B, C, h, w) of a stage in this way.
def stage_norm(module, raw, stage):
    norms = module.hidden_states_norms
    norm = norms[stage] if isinstance(norms, torch.nn.ModuleDict) else norms[int(stage.removeprefix("stage")) - 1]
    return norm(raw.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(raw.shape)


def shared_norm(module, raw, _):
    norm = getattr(module, "layernorm", None) or module.norm
    return norm(raw.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(raw.shape)


def channels_first_norm(module, raw, stage):
    return module.hidden_states_norms[stage](raw)


@pytest.mark.parametrize(
    ("model_type", "normalize"),
    [
        ("swin", stage_norm),
        ("maskformer-swin", stage_norm),
        ("hiera", stage_norm),
        ("convnext", channels_first_norm),
        ("dinov2", shared_norm),
        ("dinov2_with_registers", shared_norm),
        ("dinov3_vit", shared_norm),
        ("sapiens2", shared_norm),
    ],
)
def test_raw_maps_of_transformers(tmp_path, model_type, normalize):
    """`norm="raw"` gives what a type's norm is applied to: passed through that norm it is the default map."""
    torch.manual_seed(0)
    config = T.CONFIG_MAPPING[model_type](**TINY[model_type])
    config.out_features = config.stage_names[1:]
    randomize(T.AutoBackbone.from_config(config)).save_pretrained(tmp_path)
    processor(tmp_path, 56 if model_type == "dinov2" else 64)
    raw, model = (load_backbone(tmp_path, norm=norm) for norm in ("raw", None))
    pixels = raw.preprocess(PICTURE)[None]
    found, expected = raw(pixels), model(pixels)
    assert list(found) == config.out_features
    for stage, maps in found.items():
        with torch.inference_mode():
            assert not torch.equal(maps, expected[stage])
            again = normalize(model.network.module, maps, stage)
            torch.testing.assert_close(again, expected[stage], rtol=1e-6, atol=1e-6)


def test_raw_maps_need_no_untrained_norms(tmp_path):
    """A classifier's checkpoint, which lacks the norms of its stages, gives raw maps and reports nothing missing."""
    T.SwinModel(T.SwinConfig(**TINY["swin"])).save_pretrained(tmp_path)
    processor(tmp_path)
    assert len(load_backbone(tmp_path).weights.missing) == 2
    assert load_backbone(tmp_path, norm="raw").weights.missing == ()


def test_norm_is_part_of_the_plan(tmp_path, cli):
    """A dump of raw maps is not resumed with normalised ones, and inspect and manifest say which it has."""
    arguments = ["extract", SAMPLES / "things", "-c", "test_vit", "--random-init", "-o", tmp_path / "d"]
    assert cli(*arguments).code == 0
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["settings"]["backbone"]["norm"] == "raw"
    refused = cli(*arguments, "--norm", "model")
    assert (refused.code, '--norm: "raw" there, "model" now' in refused.err) == (5, True)
    assert cli("inspect", "test_vit", "--norm", "both").code == 2


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("test_vit", (100, 170), "96x160 or 112x176 would do"),
        ("swin_tiny_patch4_window7_224", (226, 226), "224x224 or 228x228 would do"),
        ("efficientformer_l1", (256, 256), "224x224 would do"),
    ],
)
def test_sizes_that_do_not_fit(cli, name, size, hint):
    """A size that a timm model cannot take ends with exit code 2 and the nearest sizes that it can."""
    shown = cli("inspect", name, "--image-size", f"{size[0]}x{size[1]}")
    assert (shown.code, hint in shown.err) == (2, True), shown.err


def test_sizes_that_no_patch_fits_in_transformers(tmp_path):
    """DINOv2 refuses a size whose pixels do not fill patches; a Swin pads them, and takes it."""
    T.Dinov2Model(T.Dinov2Config(**TINY["dinov2"])).save_pretrained(tmp_path / "dinov2")
    processor(tmp_path / "dinov2")
    with pytest.raises(UsageError, match="not a multiple of its patch of 14x14") as refused:
        load_backbone(tmp_path / "dinov2", image_size=60)
    assert refused.value.hint == "56x56 or 70x70 would do"
    T.SwinModel(T.SwinConfig(**TINY["swin"])).save_pretrained(tmp_path / "swin")
    processor(tmp_path / "swin")
    assert load_backbone(tmp_path / "swin", image_size=66).selected[0].shape[1:] == (3, 3)


def same(one, other):
    return one.digest == other.digest and one.out_features == other.out_features


@pytest.mark.parametrize("random_init", [True, False])
def test_configuration_instead_of_a_checkpoint(tmp_path, random_init):
    """An object, its dictionary, its file and its folder give the same random backbone, with the stages it names."""
    config = T.SwinConfig(**TINY["swin"], out_features=["stage1", "stage3"])
    config.save_pretrained(tmp_path)
    backbone = load_backbone(config, random_init=random_init, seed=3)
    assert backbone.out_features == ["stage1", "stage3"]
    assert backbone.weights.random
    assert same(backbone, load_backbone(config.to_dict(), seed=3))
    assert same(backbone, load_backbone(tmp_path, random_init=True, seed=3))
    assert same(backbone, load_backbone(tmp_path / "config.json", random_init=True, seed=3))
    torch.manual_seed(3)
    reference = T.AutoBackbone.from_config(config).eval()
    pixels = backbone.preprocess(PICTURE)[None]
    with torch.no_grad():
        expected = reference(backbone.preprocessing.normalize(pixels)).feature_maps
    for found, maps in zip(backbone(pixels).values(), expected, strict=True):
        assert torch.equal(found, maps)


def test_a_configuration_has_no_weights(tmp_path):
    """A config.json by itself can be inspected, and needs --random-init for more."""
    T.SwinConfig(**TINY["swin"]).save_pretrained(tmp_path)
    assert len(resolve(CheckpointSpec(checkpoint=str(tmp_path / "config.json"))).stages) == 5
    with pytest.raises(CheckpointError, match="a configuration without weights") as refused:
        load_backbone(tmp_path / "config.json")
    assert "--random-init" in refused.value.hint


def test_a_configuration_on_the_command_line(tmp_path, cli):
    """`-c` takes a config.json with --random-init, and prepares pictures as transformers does for its type."""
    T.ConvNextConfig(**TINY["convnext"]).save_pretrained(tmp_path)
    run = cli("extract", SAMPLES / "things", "-c", tmp_path / "config.json", "--random-init", "-o", tmp_path / "d")
    assert run.code == 0, run.err
    assert open_dump(tmp_path / "d")["stage4"].shape[1:] == (32, 2, 2)


def test_timm_backbone_config():
    """A TimmBackboneConfig gives stages, channels and dilation; logits are refused, and norms are always frozen."""
    config = T.TimmBackboneConfig(backbone="test_resnet", num_channels=1, out_indices=[1, 4], output_stride=16)
    backbone = load_backbone(config, seed=4)
    model = timm.create_model("test_resnet", features_only=True, out_indices=[1, 4], output_stride=16, in_chans=1)
    assert (backbone.out_indices, backbone.channels) == ([1, 4], model.feature_info.channels())
    assert [stage.stride[0] for stage in backbone.selected] == model.feature_info.reduction() == [4, 16]
    assert backbone.preprocessing.channels == 1
    frozen = T.TimmBackboneConfig(backbone="test_resnet", out_indices=[4], freeze_batch_norm_2d=True)
    torch.manual_seed(0)
    reference = T.TimmBackbone(frozen)  # in training mode, which frozen norms ignore
    backbone = load_backbone(frozen)
    pixels = backbone.preprocess(PICTURE)[None]
    state = {name.removeprefix("_backbone."): tensor for name, tensor in reference.state_dict().items()}
    backbone.network.module.load_state_dict(state, strict=False)
    with torch.no_grad():
        (expected,) = reference(backbone.preprocessing.normalize(pixels)).feature_maps
    torch.testing.assert_close(backbone(pixels)["stage4"], expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="stage index 9 is out of range"):
        load_backbone(T.TimmBackboneConfig(backbone="test_resnet", out_indices=[9]))
    with pytest.raises(UsageError, match="features_only=False: a backbone gives features"):
        load_backbone(T.TimmBackboneConfig(backbone="test_resnet", features_only=False))


def test_modules_in_a_timm_configuration():
    """Names of modules in a TimmBackboneConfig choose their stages, and must not contradict its indices."""
    for options in ({"out_features": ["layer2"]}, {"out_features": ["layer2"], "out_indices": [2]}):
        config = T.TimmBackboneConfig(backbone="test_resnet", **options)
        assert load_backbone(config).out_features == ["stage2"]
    model = T.AutoBackbone.from_config(config)
    assert model.out_features == [stage.module for stage in load_backbone(config).selected]
    with pytest.raises(UsageError, match="mean different stages"):
        load_backbone(T.TimmBackboneConfig(backbone="test_resnet", out_features=["layer2"], out_indices=[3]))


@pytest.mark.parametrize("name", ["timm", "swin"])
def test_to_dict(name):
    """`to_dict` is plain JSON and names the chosen stages as a transformers configuration does."""
    checkpoint = "test_resnet" if name == "timm" else T.SwinConfig(**TINY["swin"])
    backbone = load_backbone(checkpoint, random_init=True, out_indices=[1, -1])
    described = json.loads(json.dumps(backbone.to_dict()))
    assert described["out_features"] == ["stage1", "stage4"]
    assert described["out_indices"] == [1, 4]
    assert described["channels"] == [maps.shape[1] for maps in backbone(backbone.preprocess(PICTURE)[None]).values()]
    assert described["stage_names"] == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert described["num_channels"] == 3


@pytest.mark.parametrize("key", ["nature/tower_on_its_side.jpg", "nature/sea.jpg"])
def test_preprocess_turns_pictures_upright(key):
    """`preprocess` prepares an opened photo as `extract` does, so that it lies as a person sees it."""
    backbone = load_backbone("test_resnet", random_init=True)
    with Image.open(SAMPLES / key) as picture:
        assert torch.equal(backbone.preprocess(picture), backbone.preprocess(upright(SAMPLES / key)))
    with pytest.raises(UsageError, match="32-bit"):
        backbone.preprocess(Image.new("F", (8, 8)))
