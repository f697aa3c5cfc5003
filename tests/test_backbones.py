import argparse
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import SAMPLES, upright
from featcli import load_backbone
from featcli.backbones.checkpoint import resolve
from featcli.backbones.stages import Points, names_by_stride
from featcli.backbones.torchvision_operators import declare_missing_operators
from featcli.errors import CheckpointError, MachineError, UsageError
from featcli.spec.groups import CheckpointSpec

PICTURES = [upright(path) for path in sorted(SAMPLES.rglob("*.jpg"))[:3]]


def reference(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=0, **options).eval()


def run(backbone):
    return backbone.forward(torch.stack([backbone.preprocess(picture) for picture in PICTURES]))


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout"],
)
def test_timm_maps_equal_timms_own(name):
    """Every stage of a cut backbone equals, bit for bit, that of timm's whole model with timm's own transform."""
    model = reference(name)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model.forward_intermediates(
            torch.stack([transform(picture) for picture in PICTURES]), output_fmt="NCHW", intermediates_only=True
        )
    source = resolve(CheckpointSpec(checkpoint=name, random_init=True))
    assert [stage.shape for stage in source.stages] == [tuple(maps.shape[1:]) for maps in expected]
    for index in range(len(expected)):
        backbone = load_backbone(name, random_init=True, out_indices=[index])
        (found,) = run(backbone).values()
        assert torch.equal(found, expected[index]), source.stages[index]


def test_last_stage_is_what_the_model_itself_ends_in():
    """The default map of a convolution network is the input of its head."""
    model = reference("resnet18")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model.forward_features(torch.stack([transform(picture) for picture in PICTURES]))
    assert torch.equal(run(load_backbone("resnet18", random_init=True))["stage4"], expected)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ([2, 4, 8, 16, 32], ["stem", "stage1", "stage2", "stage3", "stage4"]),
        ([4, 8, 16, 32], ["stage1", "stage2", "stage3", "stage4"]),
        ([1, 2, 4, 8, 16, 32], ["stem0", "stem", "stage1", "stage2", "stage3", "stage4"]),
        ([16, 16, 16], ["stage1", "stage2", "stage3"]),
        ([8, 16], ["stage1", "stage2"]),
    ],
)
def test_stage1_has_stride_4_in_every_pyramid(strides, expected):
    """timm's maps are named by their stride, wherever timm begins to count."""
    assert names_by_stride(strides) == expected


def flops_of(module):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops()


def prefix_of(model):
    """Return the layers up to stage2 of a ResNet, or stage1 of an EfficientNet, and nothing else."""
    if hasattr(model, "layer2"):
        return torch.nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool, model.layer1, model.layer2)
    return torch.nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:2])


@pytest.mark.parametrize(("name", "stage"), [("resnet50", "stage2"), ("efficientnet_b0", "stage1")])
def test_only_what_is_needed_is_computed(name, stage):
    """A cut backbone costs what the layers up to its deepest stage cost, to 3 %, and has no later weights."""
    model = reference(name)
    prefix = prefix_of(model)
    backbone = load_backbone(name, random_init=True, out_features=[stage])
    assert flops_of(backbone.network.maps) == pytest.approx(flops_of(prefix), rel=0.03)
    whole = load_backbone(name, random_init=True).network.maps
    share = resolve(CheckpointSpec(checkpoint=name, random_init=True)).share(Points((backbone.selected[0].index,)))
    assert share == pytest.approx(flops_of(prefix) / flops_of(whole), rel=0.03)
    kept = backbone.network.module
    assert sum(p.numel() for p in kept.parameters()) == sum(p.numel() for p in prefix.parameters())


def test_class_token():
    """`class_tokens` gives the class token of each stage, which never leaks into the map."""
    model = reference("test_vit")
    backbone = load_backbone("test_vit", random_init=True, out_indices="all")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model.forward_intermediates(
            torch.stack([transform(picture) for picture in PICTURES]),
            return_prefix_tokens=True,
            intermediates_only=True,
        )
    found = backbone.class_tokens(torch.stack([backbone.preprocess(picture) for picture in PICTURES]))
    for tokens, (_, prefix) in zip(found.values(), expected, strict=True):
        assert torch.equal(tokens, prefix[:, 0])
    with pytest.raises(UsageError, match="no class token"):
        load_backbone("resnet18", random_init=True).class_tokens(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))


def test_random_weights_follow_the_seed():
    """A seed gives the same weights each time, and another seed gives others."""
    digests = [load_backbone("test_resnet", random_init=True, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("name", "size"), [("resnet18", (96, 160)), ("vit_tiny_patch16_224", (64, 96))])
def test_image_size(name, size):
    """For another input size, the maps are those of timm's own model and transform at that size."""
    source = resolve(CheckpointSpec(checkpoint=name, image_size=size))
    kwargs = {"img_size": size} if name.startswith("vit") else {}
    model = reference(name, **kwargs)
    transform = create_transform(**resolve_data_config({"input_size": (3, *size)}, model=model), is_training=False)
    backbone = load_backbone(name, random_init=True, image_size=size)
    pixels = backbone.preprocess(PICTURES[0])
    assert tuple(pixels.shape) == (3, *size)
    assert torch.equal(backbone.preprocessing.normalize(pixels[None])[0], transform(PICTURES[0]))
    assert source.stages[-1].shape[1:] == (
        size[0] // source.stages[-1].stride[0],
        size[1] // source.stages[-1].stride[1],
    )


@pytest.fixture
def weights():
    return reference("test_resnet", seed=5, in_chans=3).state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "encoder.body.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_weights_files(tmp_path, weights, prefix, suffix):
    """A weights file loads whatever prefix its keys have, with a head or without."""
    content = {prefix + name: tensor for name, tensor in weights.items()} | {"fc.weight": torch.ones(3, 96)}
    path = tmp_path / f"w{suffix}"
    safetensors.torch.save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    backbone = load_backbone(str(path), arch="test_resnet", out_indices="all")
    assert backbone.digest == load_backbone("test_resnet", random_init=True, seed=5, out_indices="all").digest
    assert backbone.weights.matched == backbone.weights.total > 0


def test_training_checkpoint(tmp_path, weights):
    """A training checkpoint gives its averaged weights instead of the last ones, and its options do no harm."""
    worse = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    content = {"state_dict": worse, "state_dict_ema": weights, "args": argparse.Namespace(lr=1), "epoch": 3}
    content["optimizer"] = optimizer.state_dict()
    torch.save(content, tmp_path / "last.ckpt")
    backbone = load_backbone(str(tmp_path / "last.ckpt"), arch="test_resnet", out_indices="all")
    assert backbone.digest == load_backbone("test_resnet", random_init=True, seed=5, out_indices="all").digest


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (lambda good, bad: {"model": bad, "model_ema": {"module": good}}, "model_ema.module"),
        (lambda good, bad: {"model": bad, "ema": good}, "ema"),
        (lambda good, bad: {"net": good, "best": np.float64(0.7)}, "net"),
        (lambda good, bad: {"foo": {"bar": good}, "optimizer": {"state": {0: bad["fc.weight"]}}}, "foo.bar"),
        (lambda good, bad: {"student": bad, "teacher": good}, "teacher"),
        (lambda good, bad: {"ema": {"loss": torch.ones(1)}, "model": good}, "model"),
        (lambda good, bad: {"foo": {**good, "_extra_state": {"scale": torch.ones(1)}}}, "foo"),
    ],
)
def test_containers_of_training_checkpoints(tmp_path, weights, content, place):
    """Weights are found in any known container, the averaged ones first, and the container is named."""
    good = {f"module.{name}": tensor for name, tensor in weights.items()} | {"fc.weight": torch.ones(2)}
    bad = {name: torch.zeros_like(tensor) for name, tensor in good.items()}
    torch.save(content(good, bad), tmp_path / "best.pth.tar")
    backbone = load_backbone(tmp_path / "best.pth.tar", arch="test_resnet", out_indices="all")
    assert backbone.digest == load_backbone("test_resnet", random_init=True, seed=5, out_indices="all").digest
    assert f"best.pth.tar ({place}, module.*)" in backbone.weights.summary()


def test_two_sets_of_weights(tmp_path, weights):
    """If a student's and a teacher's weights fit equally well, neither is chosen."""
    both = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in weights.items()}
    torch.save(both, tmp_path / "w.pth")
    assert "student.* and teacher.*" in refused(tmp_path / "w.pth")


def test_files_that_stand_for_weights(tmp_path):
    """A pointer of git-lfs and a web page in place of weights are named as such."""
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "a pointer of git-lfs" in refused(tmp_path / "w.safetensors")
    (tmp_path / "w.pth").write_text("<!DOCTYPE html><html></html>")
    assert "a web page" in refused(tmp_path / "w.pth")


def refused(path, arch="test_resnet"):
    with pytest.raises(CheckpointError) as error:
        load_backbone(str(path), arch=arch)
    assert "\n" not in error.value.message
    return error.value.message


def test_weights_that_do_not_cover_the_backbone(tmp_path, weights):
    """Weights that lack stages, or have another architecture or wrong shapes, are refused with the first names."""
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({k: v for k, v in weights.items() if not k.startswith("layer2")}, path)
    assert "layer2.0.conv1.weight" in refused(path)
    safetensors.torch.save_file(weights, path)
    assert "tensors of test_vit, first" in refused(path, "test_vit")
    safetensors.torch.save_file({**weights, "layer1.0.conv1.weight": torch.ones(2, 2)}, path)
    assert "layer1.0.conv1.weight" in refused(path)
    safetensors.torch.save_file({"something.else": torch.ones(2)}, path)
    assert "it lacks" in refused(path)


class Code:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_files_that_are_no_weights(tmp_path, weights):
    """Truncated, empty and foreign files are refused; code in a pickle is never run."""
    torch.save(weights, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    assert "not a readable weights file" in refused(tmp_path / "cut.pth")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert "not a readable weights file" in refused(tmp_path / "empty.safetensors")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code(tmp_path / "marker")))
    assert "other than tensors" in refused(tmp_path / "code.pth")
    torch.save({"state_dict": Code(tmp_path / "marker")}, tmp_path / "code2.pth")
    assert "other than tensors" in refused(tmp_path / "code2.pth")
    assert not (tmp_path / "marker").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    assert "not a readable weights file" in refused(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    assert "it holds no weights, only epoch" in refused(tmp_path / "none.pth")


def test_timm_folder(tmp_path):
    """A folder saved by timm's `save_for_hf` loads from its path, with its own configuration."""
    model = timm.create_model("test_resnet", num_classes=5)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    backbone = load_backbone(str(tmp_path / "saved"), out_indices="all")
    plain = load_backbone("local-dir:" + str(tmp_path / "saved"), out_indices="all")
    assert backbone.digest == plain.digest
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    with torch.inference_mode():
        expected = model.eval().forward_features(backbone.preprocessing.normalize(pixels))
    assert torch.equal(backbone(pixels)["stage4"], expected)


@pytest.mark.parametrize(
    ("checkpoint", "options", "message", "hint"),
    [
        ("resnet5", {}, "no such timm model", "did you mean resnet5"),
        ("resnet50.a9_in1k", {}, "no tag 'a9_in1k'", "a1_in1k"),
        ("resnet18", {"arch": "resnet18"}, "--arch is only for a weights file", "leave"),
        ("resnet18", {"out_features": "layer9"}, "there is no stage 'layer9'", "layer4"),
    ],
)
def test_usage_errors(checkpoint, options, message, hint):
    """Names that do not exist are refused, and the hint has the nearest that do."""
    with pytest.raises(UsageError) as error:
        load_backbone(checkpoint, **options)
    assert message in error.value.message
    assert hint in error.value.hint


def test_files_without_arch_and_folders_without_config(tmp_path, weights, monkeypatch):
    """A bare weights file needs --arch, a folder needs its config.json, and an ambiguous name is refused."""
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="does not say its architecture"):
        load_backbone(str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_backbone(str(tmp_path))
    (tmp_path / "resnet18").mkdir()
    (tmp_path / "resnet18" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is a folder of this name here, and a timm model"):
        load_backbone("resnet18")


def test_a_checkpoint_that_is_not_here(monkeypatch):
    """Weights that are neither here nor cached nor reachable are refused, with a command that downloads them."""
    commands = {
        "resnet18": "hf download timm/resnet18.a1_in1k --local-dir resnet18.a1_in1k",
        "nobody/nothing": "hf download nobody/nothing --local-dir nothing",
        "nobody/nothing@v2": "hf download nobody/nothing --revision v2 --local-dir nothing",
    }
    for name, command in commands.items():
        with pytest.raises(CheckpointError, match="not on this machine") as error:
            load_backbone(name)
        assert error.value.hint.endswith(f"where there is a network by: {command}")
        assert ("--random-init" in error.value.hint) is (name == "resnet18")  # a hub id has no configuration here


def test_devices_that_are_not_there():
    """A device that does not exist is refused before anything is loaded."""
    with pytest.raises(UsageError, match="there is no such device"):
        load_backbone("resnet18", random_init=True, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="--device cuda"):
            load_backbone("resnet18", random_init=True, device="cuda")


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_is_close(precision, tolerance):
    """Lower precision gives the same maps up to its rounding."""
    exact = run(load_backbone("test_resnet", random_init=True))["stage4"]
    found = run(load_backbone("test_resnet", random_init=True, precision=precision))["stage4"].float()
    assert ((found - exact).norm() / exact.norm()).item() < tolerance


def test_operators_are_declared_once():
    """If torchvision's compiled operators work, or were declared already, nothing is declared."""
    assert declare_missing_operators() is False


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 160, 160),
        torch.zeros(3, 160, 160, dtype=torch.uint8),
        torch.zeros(1, 1, 160, 160, dtype=torch.uint8),
        np.zeros((1, 3, 160, 160), np.uint8),
    ],
)
def test_pixels_that_preprocess_does_not_give(pixels):
    """Normalised floats, a single picture, other numbers of channels, and arrays are refused."""
    with pytest.raises(UsageError, match="this backbone takes"):
        load_backbone("test_resnet", random_init=True)(pixels)


def test_pixels_are_left_alone():
    """A backbone leaves its input unchanged: the same pixels give the same maps again."""
    backbone = load_backbone("test_resnet", random_init=True)
    pixels = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    floats = pixels.float()
    backbone.preprocessing.normalize(floats)
    assert torch.equal(floats, pixels.float())


@pytest.mark.parametrize(("name", "size"), [("pvt_v2_b0", 256), ("twins_pcpvt_small", 240), ("levit_128s", 256)])
def test_sizes_that_timm_takes(name, size):
    """Overlapping patches are padded, and a size is refused only if timm's model cannot run at it."""
    shapes = [stage.shape[1] for stage in resolve(CheckpointSpec(checkpoint=name, image_size=(size, size))).stages]
    assert shapes[0] == size // resolve(CheckpointSpec(checkpoint=name)).stages[0].stride[0]


def test_grey_models_of_folders(tmp_path):
    """A folder of a model for one channel is used with one channel."""
    timm.models.save_for_hf(timm.create_model("test_resnet", in_chans=1), tmp_path / "g", model_args={"in_chans": 1})
    assert load_backbone(tmp_path / "g").preprocessing.channels == 1


def test_noise_in_another_size_keeps_the_promised_shape():
    """Extreme and tiny pictures come out at the model's input size."""
    backbone = load_backbone("test_resnet", random_init=True)
    for size in ((1, 1), (3, 500), (161, 160)):
        picture = Image.fromarray(np.zeros((*size, 3), np.uint8))
        assert tuple(backbone.preprocess(picture).shape) == (3, 160, 160)


def test_inputs_of_another_size(dinov2_folder):
    """If a network takes another size, its maps equal those of a backbone that was loaded for that size."""
    for checkpoint, size in (("test_resnet", (96, 130)), (dinov2_folder, (56, 98))):
        pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        options = {"random_init": True, "out_features": "all"}
        made_for_it = load_backbone(checkpoint, image_size=size, fit="squash", **options)
        backbone = load_backbone(checkpoint, **options)
        for name, found in backbone(pixels).items():
            assert torch.equal(found, made_for_it(pixels)[name])
            assert backbone(pixels[:0])[name].shape == (0, *found.shape[1:])  # no pictures give no maps


@pytest.mark.parametrize(
    ("size", "cause"), [((256, 256), "does not take them"), ((232, 232), "not a multiple of 16x16")]
)
def test_an_input_that_is_refused_or_would_be_cut(size, cause):
    """An input that the network refuses, or would cut off, is refused with a message."""
    with pytest.raises(UsageError, match=cause) as refused:
        load_backbone("vit_tiny_patch16_224", random_init=True, out_indices=0)(
            torch.zeros(1, 3, *size, dtype=torch.uint8)
        )
    assert f"pixels of {size[0]}x{size[1]}" in refused.value.message


def test_an_input_that_would_be_resized():
    """A network that resizes its input by itself, as timm's CrossViT, is recognised by the size of its maps."""
    backbone = load_backbone("test_resnet", random_init=True)
    plain = backbone.network.run
    backbone.network = replace(
        backbone.network, run=lambda x, **more: plain(nn.functional.interpolate(x, (160, 160)), **more)
    )
    with pytest.raises(UsageError, match="the map of stage4 is 5x5"):
        backbone(torch.zeros(1, 3, 320, 320, dtype=torch.uint8))
