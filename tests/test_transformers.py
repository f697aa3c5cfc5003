import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from conftest import SAMPLES, upright
from featcli import load_backbone
from featcli.backbones.checkpoint import resolve
from featcli.backbones.image_processor import read_processor
from featcli.backbones.preprocessing import processor_preprocessing, recorded_preprocessing
from featcli.errors import CheckpointError, UsageError
from featcli.spec.groups import CheckpointSpec

transformers = pytest.importorskip("transformers")

PICTURES = [upright(path) for path in sorted(SAMPLES.rglob("*.jpg"))[:3]]


def reference(folder, out_indices):
    """Return transformers' own backbone and processor for a folder, which AutoBackbone cannot read offline."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.out_indices = out_indices
    kind = transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING[type(config)]
    model = kind.from_pretrained(folder, config=config).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return model(processor(PICTURES, return_tensors="pt").pixel_values).feature_maps


def run(backbone):
    return backbone(torch.stack([backbone.preprocess(picture) for picture in PICTURES]))


@pytest.mark.parametrize("name", ["swin_folder", "resnet_folder", "dinov2_folder"])
def test_maps_equal_transformers_own(name, request):
    """Every stage of a cut backbone equals that of the whole backbone, on the processor's own pixels."""
    folder = str(request.getfixturevalue(name))
    source = resolve(CheckpointSpec(checkpoint=folder))
    everything = reference(folder, list(range(len(source.stages))))
    assert [stage.shape for stage in source.stages] == [tuple(maps.shape[1:]) for maps in everything]
    for index, expected in enumerate(everything):
        (found,) = run(load_backbone(folder, out_indices=[index])).values()
        assert torch.equal(found, expected), source.stages[index]


def test_default_stage_and_names(swin_folder):
    """Stages have transformers' own names, the last is the default, and each names its module."""
    source = resolve(CheckpointSpec(checkpoint=str(swin_folder)))
    assert [stage.name for stage in source.stages] == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert source.stages[1].module == "swin.encoder.layers.0.blocks.1"  # before the layer makes the map smaller
    assert [stage.name for stage in load_backbone(str(swin_folder)).selected] == ["stage4"]


def test_norms_that_plain_checkpoints_lack_are_named(swin_folder):
    """Norms of maps that a classifier's checkpoint lacks are named."""
    weights = load_backbone(str(swin_folder), out_indices=[1]).weights
    assert weights.missing == ("hidden_states_norms.stage1.bias", "hidden_states_norms.stage1.weight")
    assert "hidden_states_norms.stage1" in weights.summary()


def test_class_token(dinov2_folder):
    """The class token is token 0 of the normalised hidden state."""
    config = transformers.AutoConfig.from_pretrained(dinov2_folder)
    config.out_indices, config.reshape_hidden_states = [1, 3], False
    model = transformers.Dinov2Backbone.from_pretrained(dinov2_folder, config=config).eval()
    backbone = load_backbone(str(dinov2_folder), out_indices=[1, 3])
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    with torch.no_grad():
        expected = model(backbone.preprocessing.normalize(pixels)).feature_maps
    for found, whole in zip(backbone.class_tokens(pixels).values(), expected, strict=True):
        assert torch.equal(found, whole[:, 0])


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_image_size(swin_folder, dinov2_folder, size):
    """Another input size changes the processor and the model alike."""
    for folder, expected in ((swin_folder, size), (dinov2_folder, (size[0] // 14 * 14, size[1] // 14 * 14))):
        backbone = load_backbone(str(folder), image_size=expected)
        assert tuple(backbone.preprocess(PICTURES[0]).shape[1:]) == expected
        assert tuple(run(backbone)[backbone.selected[0].name].shape[1:]) == backbone.selected[0].shape


CROPPING = {
    "BitImageProcessor": ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 0.875),
    "CLIPImageProcessor": ({}, 1.0),
    "ConvNextImageProcessor": ({"size": {"shortest_edge": 224}, "crop_pct": 0.95}, 0.95),
    "PoolFormerImageProcessor": ({}, 0.9),
    "LevitImageProcessor": ({}, 0.875),
}


@pytest.mark.parametrize("kind", CROPPING)
def test_a_rectangle_keeps_of_a_picture_what_timm_keeps(tmp_path, kind):
    """Processors that cut out a square cut out a rectangle as timm does with their share, bit for bit.

    A plan records this, and pictures are the same by the plan.
    """
    options, share = CROPPING[kind]
    getattr(transformers, kind)(**options).save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (301, 500, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2).copy()), *PICTURES[:1]]
    size = (96, 131)
    processor = read_processor(str(tmp_path), size)
    found = processor_preprocessing(processor, size)
    how = {"input_size": (3, *size), "crop_pct": share, "interpolation": processor.resampling.name.lower()}
    expected = create_transform(**how, use_prefetcher=True)
    again = recorded_preprocessing(found.settings, size=size, channels=3, resize_mode=None)
    for picture in pictures:
        pixels = found.fit(picture)
        assert np.array_equal(pixels, np.asarray(expected(picture)))
        assert np.array_equal(pixels, again.fit(picture))
    assert read_processor(str(tmp_path), (400, 416)).fit_bytes(pictures[0]).shape == (3, 400, 416)


def test_a_plan_of_a_rectangle_of_before():
    """Older dumps with a wider cut keep it: their plans give the same pixels."""
    own = transformers.BitImageProcessorPil(size={"shortest_edge": 146}, crop_size={"height": 96, "width": 128})
    before = {**own.to_dict(), "backend": "pil"}
    found = recorded_preprocessing(before, size=(96, 128), channels=3, resize_mode=None)
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    assert np.array_equal(found.fit(PICTURES[0]), own(PICTURES[0], **options)["pixel_values"][0])


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_the_backend_of_an_image_processor(dinov2_folder, backend):
    """Pixels are those of the requested backend of the processor, by default `pil`, and the plan names it."""
    own = transformers.AutoImageProcessor.from_pretrained(dinov2_folder, backend=backend)
    backbone = load_backbone(dinov2_folder, processor_backend=backend)
    for picture in PICTURES:
        expected = own(picture, return_tensors="pt")["pixel_values"]
        ready = backbone.preprocessing.normalize(backbone.preprocess(picture)[None])
        torch.testing.assert_close(ready, expected, rtol=0, atol=1e-6)
    assert backbone.preprocessing.settings["backend"] == backend
    default = load_backbone(dinov2_folder).preprocess(PICTURES[0])
    assert torch.equal(default, backbone.preprocess(PICTURES[0])) == (backend == "pil")
    again = recorded_preprocessing(backbone.preprocessing.settings, size=(70, 70), channels=3, resize_mode=None)
    assert np.array_equal(again.fit(PICTURES[0]), backbone.preprocess(PICTURES[0]).numpy())
    with pytest.raises(UsageError, match=f"--processor-backend {backend} cannot be used with --fit"):
        load_backbone(dinov2_folder, processor_backend=backend, fit="pad")


def test_backends_that_are_not_there(tmp_path, dinov2_folder):
    """A backend that a timm checkpoint, or a type of processor, lacks is refused by name."""
    with pytest.raises(UsageError, match="--processor-backend pil: 'test_resnet'"):
        load_backbone("test_resnet", random_init=True, processor_backend="pil")
    shutil.copytree(dinov2_folder, tmp_path / "d")
    transformers.Llama4ImageProcessor().save_pretrained(tmp_path / "d")
    with pytest.raises(UsageError, match=r"--processor-backend pil: .* has only torchvision"):
        load_backbone(tmp_path / "d", processor_backend="pil")


def test_what_a_refused_size_hints_at(tmp_path):
    """The hint for a refused size names sizes and --fit only if they work."""
    transformers.MaskFormerImageProcessor().save_pretrained(tmp_path / "steps")
    with pytest.raises(CheckpointError, match="200x300") as refused:
        read_processor(str(tmp_path / "steps"), (200, 300))
    assert refused.value.hint == "try --fit crop, squash or pad or --image-size 192x288"
    assert read_processor(str(tmp_path / "steps"), (192, 288)) is not None
    transformers.VideoMAEImageProcessor().save_pretrained(tmp_path / "video")
    with pytest.raises(CheckpointError, match="200x300") as refused:
        read_processor(str(tmp_path / "video"), (200, 300))
    assert refused.value.hint == "leave --image-size out"


def test_random_weights_from_a_configuration(tmp_path, dinov2_folder):
    """A folder without weights gives a backbone with random ones if asked for, and is refused otherwise."""
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(dinov2_folder / name, tmp_path)
    digests = [load_backbone(str(tmp_path), random_init=True, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(CheckpointError):
        load_backbone(str(tmp_path))


def test_a_configuration_takes_the_processor_beside_it(tmp_path, dinov2_folder):
    """`-c FOLDER/config.json --random-init` gives the same as `-c FOLDER --random-init`, also pixels and sizes."""
    shutil.copy(dinov2_folder / "config.json", tmp_path)
    size = {"height": 42, "width": 42}
    transformers.ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    folder, config = (load_backbone(path, random_init=True) for path in (tmp_path, tmp_path / "config.json"))
    assert folder.preprocessing.size == (42, 42)
    assert config.preprocessing.settings == folder.preprocessing.settings
    assert (config.settings, config.digest) == (folder.settings, folder.digest)
    (tmp_path / "preprocessor_config.json").unlink()
    alone = load_backbone(tmp_path / "config.json", random_init=True)
    assert alone.preprocessing.settings != folder.preprocessing.settings


def test_weights_of_another_configuration(tmp_path, dinov2_folder):
    """Weights that do not cover the backbone are refused, with the first names."""
    for file in dinov2_folder.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="3 stages are named"):
        load_backbone(str(tmp_path))
    for name in ("stage_names", "out_features", "out_indices"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.3"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_backbone(str(tmp_path))


def test_without_a_processor(tmp_path, dinov2_folder):
    """The stages of a checkpoint without preprocessing can be inspected, but extract refuses it."""
    for file in dinov2_folder.iterdir():
        if file.name != "preprocessor_config.json":
            shutil.copy(file, tmp_path)
    assert resolve(CheckpointSpec(checkpoint=str(tmp_path))).stages[-1].shape == (48, 5, 5)
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        load_backbone(str(tmp_path))


def test_only_what_is_needed_is_computed(resnet_folder):
    """stage2 of transformers' ResNet-50 costs what its embedder and two stages cost, to 3 %."""
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.ResNetModel.from_pretrained(resnet_folder).eval()
    prefix = torch.nn.Sequential(model.embedder, *model.encoder.stages[:2])
    flops = []
    for run in (prefix, load_backbone(str(resnet_folder), out_features="stage2").network.maps):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(torch.zeros(1, 3, 224, 224))
        flops.append(counter.get_total_flops())
    assert flops[1] == pytest.approx(flops[0], rel=0.03)


def test_timm_wrapper_folder(tmp_path):
    """A timm model that transformers saved in its wrapper loads from its folder, with its own preprocessing."""
    torch.manual_seed(0)
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(architecture="test_resnet")).eval()
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    pixels = torch.stack([backbone.preprocess(picture) for picture in PICTURES])
    with torch.inference_mode():
        expected = model.timm_model.forward_features(backbone.preprocessing.normalize(pixels))
    assert torch.equal(backbone(pixels)["stage4"], expected)
    assert backbone.weights.matched == backbone.weights.total > 0


@pytest.mark.parametrize("change", ["config", "option"])
def test_weights_of_other_shapes(tmp_path, change):
    """Weights whose shapes differ from config.json are refused with both, also by channels of pixels."""
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "embedding_size": 16}
    transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    if change == "config":
        transformers.ResNetConfig(**sizes | {"embedding_size": 8}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"have another shape, first .*: \(.*\), not \(") as refused:
        load_backbone(tmp_path, num_channels=1 if change == "option" else None)
    assert ("--num-channels" in refused.value.hint) is (change == "option")


def test_model_types_without_a_vision_model(tmp_path):
    """A model type that sees no pictures is refused by name."""
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model type 'bert' has no vision model"):
        load_backbone(str(tmp_path))


def test_a_processor_with_steps_of_its_own_is_taken_as_it_is(swin_folder, monkeypatch):
    """If a processor does more after the crop than scale and normalise, its floats are used as they are."""
    kind = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    plain = kind.normalize
    monkeypatch.setattr(kind, "normalize", lambda self, *a, **k: plain(self, *a, **k) * 2 + 1)
    backbone = load_backbone(str(swin_folder))
    pixels = backbone.preprocess(PICTURES[0])
    assert pixels.dtype == torch.float32
    processor = transformers.AutoImageProcessor.from_pretrained(swin_folder, backend="pil")
    assert torch.equal(
        backbone.preprocessing.normalize(pixels), processor(PICTURES[0], return_tensors="pt").pixel_values[0]
    )


def test_no_code_from_a_checkpoint_is_run(tmp_path, dinov2_folder, monkeypatch):
    """A checkpoint that brings its own code is refused or read without it, and nobody is asked."""
    import io
    import sys

    for file in dinov2_folder.iterdir():
        shutil.copy(file, tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("preprocessor_config.json", "AutoImageProcessor")):
        content = json.loads((tmp_path / name).read_text())
        content |= {"auto_map": {key: "code.Mine"}, "model_type": "mine", "image_processor_type": "Mine"}
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(CheckpointError):
        load_backbone(str(tmp_path))
    assert not marker.exists()


def test_a_trained_norm_that_is_missing_is_a_refusal(tmp_path, dinov2_folder):
    """A missing norm that was trained, such as DINOv2's final one, is refused."""
    from safetensors.torch import load_file, save_file

    for file in dinov2_folder.iterdir():
        shutil.copy(file, tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("layernorm")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layernorm\.bias"):
        load_backbone(str(tmp_path))
