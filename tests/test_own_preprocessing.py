"""Check --mean, --std, --interpolation and --crop-pct, which say the preprocessing instead of the checkpoint."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import featcli
from conftest import draw
from featcli import load_backbone
from featcli.dump.settings import Settings
from featcli.errors import CheckpointError, UsageError
from featcli.spec.words import INTERPOLATIONS

NOISE = np.random.default_rng(0).integers(0, 256, (200, 321, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(pixels) for pixels in (NOISE, NOISE.transpose(1, 0, 2).copy(), NOISE[:40, :40])]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
OPTIONS = {  # each alone, and without --crop-pct: benchmarks/preprocessing.py
    "crop-pct": {"crop_pct": 0.7},
    "all": {"mean": MEAN, "std": STD, "interpolation": "box", "crop_pct": 0.9},
}
RANDOM = {"checkpoint": "test_resnet", "random_init": True}
of_each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Save weights of test_resnet, which do not say what pixels they are for."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """Save a tiny ViT of transformers for 64x64 pixels, whose processor changes proportions and cuts off nothing."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints") / "vit"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 64}
    transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)).save_pretrained(
        folder
    )
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def assert_equal(backbone, reference):
    """Check that the backbone's input is, to the bit, what the reference makes of a picture."""
    for picture in PICTURES:
        found = backbone.preprocessing.normalize(backbone.preprocess(picture)[None])[0]
        assert torch.equal(found, torch.as_tensor(reference(picture))), picture.size


def fitted(picture, *, fit, size, interpolation, mean, std):
    """Return what Pillow alone makes of a picture, normalised as torchvision does it."""
    how, fill = Image.Resampling[interpolation.upper()], tuple(round(255 * value) for value in mean)
    pixels = {
        "crop": lambda: ImageOps.fit(picture, size[::-1], how),
        "squash": lambda: picture.resize(size[::-1], how),
        "pad": lambda: ImageOps.pad(picture, size[::-1], how, color=fill),
    }[fit]()
    values = torch.from_numpy(np.asarray(pixels).transpose(2, 0, 1).copy()).float().div(255)
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize(
    ("source", "options"), [*(("name", options) for options in OPTIONS.values()), ("file", OPTIONS["all"])]
)
def test_pixels_of_timm(weights_file, source, options):
    """A timm model, by name or from a file, gets the pixels of timm's own transform with these values."""
    by_file = {"checkpoint": weights_file, "arch": "test_resnet"}
    own = resolve_data_config({}, pretrained_cfg=timm.create_model("test_resnet").pretrained_cfg)
    backbone = load_backbone(**(by_file if source == "file" else RANDOM), **options)
    assert_equal(backbone, create_transform(**own | options, is_training=False))


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_pixels_with_fit(vit_folder, library, fit):
    """With --fit pixels are Pillow's with these values, and padding has the colour that becomes zero."""
    options = {"mean": MEAN, "std": STD, "interpolation": "hamming"}
    checkpoint = RANDOM if library == "timm" else {"checkpoint": vit_folder}
    backbone = load_backbone(**checkpoint, **options, fit=fit, image_size=(48, 64))
    assert_equal(backbone, partial(fitted, fit=fit, size=(48, 64), **options))


@of_each_option
@pytest.mark.parametrize("kind", ["squashes", "crops", "has a crop_pct"])
def test_pixels_of_image_processors(vit_folder, tmp_path, kind, options):
    """An image processor gives its own pixels with these values, and one that cuts off nothing cuts as timm does."""
    transformers = pytest.importorskip("transformers")
    words = {"mean": "image_mean", "std": "image_std", "interpolation": "resample"}
    values = {words[name]: value for name, value in options.items() if name in words}
    if "resample" in values:
        values["resample"] = Image.Resampling[values["resample"].upper()]
    share = options.get("crop_pct")
    shutil.copytree(vit_folder, tmp_path / "c")
    if kind == "squashes":
        made = partial(transformers.ViTImageProcessorPil, size={"height": 64, "width": 64})
        with_share = {}
    elif kind == "crops":
        made = partial(transformers.CLIPImageProcessorPil, size={"shortest_edge": 70}, crop_size=64)
        with_share = {"size": {"shortest_edge": math.floor(64 / share)}} if share else {}
    else:
        made = partial(transformers.ConvNextImageProcessorPil, size={"shortest_edge": 64})
        with_share = {"crop_pct": share} if share else {}
    made().save_pretrained(tmp_path / "c")
    backbone = load_backbone(tmp_path / "c", **options)
    expected = made(**values, **with_share)
    if kind == "squashes" and share:
        how = Image.Resampling(int(expected.resample)).name.lower()
        numbers = {"mean": tuple(expected.image_mean), "std": tuple(expected.image_std)}
        assert_equal(backbone, create_transform((3, 64, 64), interpolation=how, crop_pct=share, **numbers))
        return
    for picture in PICTURES:
        as_bytes = expected(picture, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
        assert np.array_equal(backbone.preprocess(picture), as_bytes)
        whole = torch.from_numpy(np.array(expected(picture, return_tensors="np").pixel_values[0]))
        normalised = backbone.preprocessing.normalize(backbone.preprocess(picture)[None])[0]
        torch.testing.assert_close(normalised, whole, rtol=0, atol=1e-6)


def test_a_folder_without_an_image_processor(vit_folder, tmp_path, cli):
    """A folder without a processor is extracted with --mean and --std, and the plan calls the rest a guess."""
    shutil.copytree(vit_folder, tmp_path / "c")
    (tmp_path / "c" / "preprocessor_config.json").unlink()
    draw(tmp_path / "p" / "a.png", 1, (90, 64))
    given = ("extract", tmp_path / "p", "-c", tmp_path / "c", "-o", tmp_path / "d", "-v")
    run = cli(*given, "--mean", "0.4")
    assert (run.code, "give --mean and --std" in run.err) == (6, True)
    run = cli(*given, "--mean", "0.4,0.5,0.6", "--std", "0.25", "--crop-pct", "0.9")
    assert run.code == 0
    assert (
        "(a guess: transformers' default for vit; --mean, --std, --crop-pct as asked; --interpolation says otherwise)"
        in run.err
    )
    dump = featcli.open_dump(tmp_path / "d")
    reference = create_transform(64, interpolation="bilinear", crop_pct=0.9, mean=MEAN, std=(0.25,) * 3)
    pixels = torch.as_tensor(reference(Image.open(tmp_path / "p" / "a.png")))
    assert torch.equal(dump.preprocessing.normalize(dump.preprocess(tmp_path / "p" / "a.png")[None])[0], pixels)
    assert dump.load_backbone(tmp_path / "c").preprocess(PICTURES[0]).equal(dump.preprocess(PICTURES[0]))


def test_numbers_of_a_default_count_where_nothing_says_them(vit_folder, tmp_path, cli):
    """Without an image processor a plan holds --mean and --std even if they are those of the default."""
    shutil.copytree(vit_folder, tmp_path / "c", ignore=lambda *_: ["preprocessor_config.json"])
    draw(tmp_path / "p" / "a.png", 1)
    featcli.extract(tmp_path / "p", checkpoint=tmp_path / "c", output=tmp_path / "d", mean=0.5, std=0.5)
    found = cli("verify", tmp_path / "d", tmp_path / "p", "-c", tmp_path / "c", "--recompute", 1)
    assert "1 equal bit for bit" in found.out, found.err
    assert featcli.open_dump(tmp_path / "d").load_backbone(tmp_path / "c").preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("source", ["timm", "squashes"])
def test_a_dump_is_made_again(vit_folder, tmp_path, cli, source):
    """The plan has the options: the same command resumes, others are refused, verify recomputes, show draws it."""
    checkpoint = "test_resnet" if source == "timm" else vit_folder
    for number in range(2):
        draw(tmp_path / "p" / f"{number}.png", number, (90, 64))
    random = ("--random-init",) if source == "timm" else ()
    given = ("extract", tmp_path / "p", "-c", checkpoint, *random, "-o", tmp_path / "d", "--threads", 1)
    own = ("--mean", 0.4, "--std", "0.2,0.3,0.4", "--interpolation", "box", "--crop-pct", 0.6)
    assert cli(*given, *own).code == 0
    assert "preprocessing.overrides" in cli(*given, *own[:-2]).err
    assert cli(*given, *own).code == 0
    words = json.loads((tmp_path / "d" / "plan.json").read_text())["settings"]["preprocessing"]["overrides"]
    wanted = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.3, 0.4], "interpolation": "box", "crop_pct": 0.6}
    assert words == wanted
    found = cli("verify", tmp_path / "d", tmp_path / "p", "-c", checkpoint, *random, "--recompute", 2)
    assert "2 equal bit for bit" in found.out, found.err
    assert cli("show", tmp_path / "d", "-o", tmp_path / "s.png", "--root", tmp_path / "p").code == 0


def test_what_says_the_same_is_no_other_plan(vit_folder, weights_file):
    """Options that ask for what the checkpoint does anyway change nothing, and no fingerprint."""
    same = {"mean": 0.5, "std": "0.5", "interpolation": "bilinear"}
    one, two = (load_backbone(vit_folder, **more).preprocessing for more in ({}, same))
    assert one.settings == two.settings
    of_timm = {"checkpoint": weights_file, "arch": "test_resnet"}
    own = load_backbone(**of_timm).preprocessing.settings
    same = {name: own[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    assert load_backbone(**of_timm, **same).preprocessing.settings == own


def test_greys(vit_folder):
    """A backbone for greys takes one number, and refuses numbers for three colours."""
    for checkpoint in (RANDOM, {"checkpoint": vit_folder, "random_init": True}):
        backbone = load_backbone(**checkpoint, num_channels=1, mean=0.3, std=[0.2])
        assert (backbone.preprocessing.mean, backbone.preprocessing.std) == ((0.3,), (0.2,))
        with pytest.raises(UsageError, match="--mean has 3 numbers, and the input has 1 channel"):
            load_backbone(**checkpoint, num_channels=1, mean=MEAN)


def test_a_guess_is_called_one(cli, weights_file):
    """The run and inspect call the pixels for a weights file, and for random weights, a guess."""
    said = "a guess: timm's default for test_resnet; --mean, --std, --interpolation, --crop-pct say otherwise"
    assert f"({said})" in cli("inspect", weights_file, "--arch", "test_resnet").out
    assert load_backbone(weights_file, arch="test_resnet").preprocessing.origin == said
    assert load_backbone(**RANDOM).preprocessing.origin == "a guess: timm's default for test_resnet"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mean": "123.7,116.3,103.5"}, "--mean must be from 0 to 1, not 123.7"),
        ({"mean": "white"}, "--mean 'white' is not a list of numbers"),
        ({"mean": (0.1, float("nan"), 0.2)}, "--mean must be from 0 to 1, not nan"),
        ({"mean": ()}, "--mean .* is not a list of numbers"),
        ({"mean": "0.1,0.2"}, "--mean has 2 numbers, and the input has 3 channels"),
        ({"std": 0}, "--std must be above 0 and at most 1, not 0"),
        ({"std": True}, "--std 'True' is not a list of numbers"),
        ({"crop_pct": 87.5}, "--crop-pct must be from 0.1 to 1, not 87.5"),
        ({"crop_pct": 0.9, "fit": "pad"}, "--crop-pct cannot be used with --fit"),
        ({"interpolation": "cubic"}, "--interpolation cannot be 'cubic'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, says):
    """Numbers of another scale, unknown words, and options without effect are refused by name, with a way out."""
    with pytest.raises(UsageError, match=says) as refused:
        load_backbone(**RANDOM, **options)
    assert refused.value.hint


def test_processors_that_do_not_follow(vit_folder, tmp_path):
    """A processor that does not resize refuses interpolation and crop, and torchvision's refuses unknown filters."""
    transformers = pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="resizes with torchvision"):
        load_backbone(vit_folder, processor_backend="torchvision", interpolation="lanczos")
    shutil.copytree(vit_folder, tmp_path / "c")
    transformers.ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained(tmp_path / "c")
    for options in ({"interpolation": "box"}, {"crop_pct": 0.9}):
        with pytest.raises((UsageError, CheckpointError)):
            load_backbone(tmp_path / "c", **options)
    backbone = load_backbone(tmp_path / "c", fit="squash", image_size=64, interpolation="box", mean=0.25)
    own = {"mean": (0.25,) * 3, "std": (1.0,) * 3, "interpolation": "box"}
    assert_equal(backbone, partial(fitted, fit="squash", size=(64, 64), **own))


def test_every_interpolation_is_pillows():
    """Each word of --interpolation is Pillow's filter of that name, in timm and with image processors."""
    from featcli.backbones.image_processor import RESAMPLINGS
    from featcli.backbones.internals import timm_resampling

    assert tuple(RESAMPLINGS) == INTERPOLATIONS
    for word in INTERPOLATIONS:
        assert timm_resampling(word) == RESAMPLINGS[word] == Image.Resampling[word.upper()]


def test_plans_hold_no_other_overrides(tmp_path):
    """A plan whose overrides are no options is refused as damaged."""
    draw(tmp_path / "p" / "a.png", 1)
    dump = featcli.open_dump(featcli.extract(tmp_path / "p", output=tmp_path / "d", **RANDOM, crop_pct=1).dump)
    words = dump.plan.settings.to_json()
    for overrides in (["mean"], {"gamma": 2}):
        with pytest.raises(ValueError, match="no option"):
            Settings.from_json({**words, "preprocessing": {**words["preprocessing"], "overrides": overrides}})
