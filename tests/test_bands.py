"""Check pictures of networks that have another number of channels than greys and colours."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from timm.data import create_transform

import featcli
from featcli import load_backbone
from featcli.errors import UsageError
from featcli.views.dump_pictures import DumpPictures

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

VALUES = np.random.default_rng(0).integers(0, 65536, (75, 117, 5), dtype=np.uint16)
EIGHT = (VALUES >> 8).astype(np.uint8)
MEAN, STD = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.25, 0.2)
FIVE = {"checkpoint": "test_resnet", "random_init": True, "num_channels": 5, "mean": MEAN, "std": STD}


def written(path, values, planes="contig", **options):
    """Write (H, W, bands) as a TIFF whose samples are unspecified, unless `options` say otherwise."""
    stored = values if planes == "contig" else values.transpose(2, 0, 1)
    tifffile.imwrite(path, stored, **{"photometric": "minisblack", "planarconfig": planes} | options)
    return path


def reference(band, fit, config, mean, std):
    """Return what timm, or Pillow and torch, make of a band (H, W) of 8 or 16 bits."""
    picture = Image.fromarray(band if band.dtype == np.uint8 else np.rint(band / 257).astype(np.uint8))
    if fit is None:
        words = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
        return create_transform(input_size=(1, 160, 160), mean=(mean,), std=(std,), **words)(picture)
    how = Image.Resampling[config["interpolation"].upper()]
    sized = {
        "squash": lambda: picture.resize((160, 160), how),
        "pad": lambda: ImageOps.pad(picture, (160, 160), how, color=round(255 * mean)),
        "native": lambda: picture.resize((128, 64), how),
    }[fit]()
    return torch.from_numpy(np.asarray(sized).copy()).float().div(255)[None].sub(mean).div(std)


@pytest.mark.parametrize(  # every combination: benchmarks/bands.py
    ("fit", "count", "values", "planes", "compression"),
    [
        (None, 5, VALUES, "contig", "deflate"),
        ("pad", 4, EIGHT, "separate", "lzw"),
        ("native", 2, VALUES, "separate", None),
    ],
)
def test_each_band_is_prepared_as_a_grey_picture(tmp_path, fit, count, values, planes, compression):
    """Each band of the input is, to the bit, what timm or Pillow and torch make of it, and what its grey file gives."""
    values = values[..., :count]
    of_bands = {**FIVE, "num_channels": count, "mean": MEAN[:count], "std": STD[:count], "fit": fit}
    ours = load_backbone(**of_bands)
    pixels = ours.preprocess(written(tmp_path / "x.tif", values, planes, compression=compression))
    assert torch.equal(ours.preprocess(values), pixels)
    assert torch.equal(ours.preprocess([values.transpose(2, 0, 1)])[0], pixels)
    found = ours.preprocessing.normalize(pixels[None])[0]
    for band, (mean, std) in enumerate(zip(MEAN[:count], STD[:count], strict=True)):
        one = np.ascontiguousarray(values[..., band])
        expected = reference(one, fit, ours.preprocessing.settings, mean, std)
        assert torch.equal(found[band : band + 1], expected), band
    Image.fromarray(one).save(tmp_path / "grey.png")
    grey = load_backbone(**of_bands | {"num_channels": 1, "mean": mean, "std": std})
    assert torch.equal(grey.preprocess(tmp_path / "grey.png")[0], pixels[-1])
    assert pickle.loads(pickle.dumps(ours.preprocessing)).mean == MEAN[:count]
    if fit is None:
        embedded = ours.embed(values)
        assert embedded.shape == (1, 96)
        assert torch.equal(ours.embed(tmp_path / "x.tif"), embedded)


@pytest.fixture(scope="module")
def four():
    """Load a network of four channels."""
    return load_backbone("test_resnet", random_init=True, num_channels=4, mean=0.5, std=0.25)


def test_samples_are_bands_unless_the_file_calls_them_transparency(four, tmp_path):
    """ExtraSamples says what transparency is; it is no band, and --alpha puts a colour behind each band."""
    plain = four.preprocess(EIGHT[..., :4])
    written(tmp_path / "rgbn.tif", EIGHT[..., :4], photometric="rgb", extrasamples=["unspecified"])
    assert torch.equal(four.preprocess(tmp_path / "rgbn.tif"), plain)
    written(tmp_path / "more.tif", EIGHT, extrasamples=[*["unspecified"] * 3, "unassalpha"])
    assert torch.equal(four.preprocess(tmp_path / "more.tif"), plain)
    options = {"checkpoint": "test_resnet", "random_init": True, "mean": 0.5, "std": 0.25, "alpha": "white"}
    seen = load_backbone(num_channels=4, **options).preprocess(tmp_path / "more.tif")
    Image.fromarray(np.ascontiguousarray(EIGHT[..., [3, 4]])).save(tmp_path / "grey.png")
    assert torch.equal(seen[3], load_backbone(num_channels=1, **options).preprocess(tmp_path / "grey.png")[0])


def test_bands_are_turned_and_have_a_range_as_greys_do(tmp_path):
    """--orientation and --depth-range do to each band what they do to a grey TIFF of it."""
    options = {"checkpoint": "test_resnet", "random_init": True, "mean": 0.5, "std": 0.25, "depth_range": "0:4095"}
    many, grey = (load_backbone(num_channels=count, **options) for count in (5, 1))
    for number, dtype in enumerate((np.uint16, np.float32, np.int16, *[np.uint8] * 5), 1):
        values = (VALUES % 256 if dtype == np.uint8 else VALUES % 5000).astype(dtype)
        turned = {"extratags": [(274, "H", 1, number, True)]}
        found = many.preprocess(written(tmp_path / "x.tif", values, **turned))
        one = grey.preprocess(written(tmp_path / "grey.tif", values[..., 1], **turned))
        assert torch.equal(found[1], one[0]), (number, dtype)


@pytest.mark.parametrize(
    ("count", "options", "detail"),
    [
        (1, {}, "1 band; the network takes 4"),
        (5, {}, "5 bands; the network takes 4"),
        (3, {"photometric": "rgb"}, "3 bands; the network takes 4"),
        (4, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, "3 bands and transparency, which is no band;"),
        (4, {"photometric": "separated"}, "3 bands; the network takes 4"),
        (4, {"compression": "jpeg"}, "compression 7"),
        (5, {"extrasamples": [*["unspecified"] * 3, "assocalpha"]}, "multiplied by transparency"),
    ],
)
def test_tiffs_of_other_bands_are_refused(four, tmp_path, count, options, detail):
    """A TIFF that is no picture of four bands is refused with both numbers, and a kind that is not read by name."""
    written(tmp_path / "x.tif", EIGHT[..., :count] if count > 1 else EIGHT[..., 0], **options)
    with pytest.raises(UsageError, match=detail):
        four.preprocess(tmp_path / "x.tif")


def test_pictures_in_memory_of_other_bands_are_refused(four):
    """An array or a picture of Pillow with other bands is refused with both numbers."""
    for given in (EIGHT[..., :3], Image.fromarray(EIGHT[..., :3])):
        with pytest.raises(UsageError, match="3 bands; the network takes 4"):
            four.preprocess(given)
    with pytest.raises(UsageError, match="not a picture of 4 bands"):
        four.preprocess(EIGHT[..., :4].astype(np.float32))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": 0.5}, "the checkpoint says the std of 3 channels, and the input has 4"),
        ({"mean": 0.5, "std": 0.5, "colour": "convert"}, "--colour convert changes nothing"),
        ({"mean": 0.5, "std": 0.5, "decode": "scaled"}, "--decode scaled changes nothing"),
    ],
)
def test_what_bands_need_or_cannot_have_is_said(options, said):
    """Numbers for three colours are not taken for bands, and rules for colours alone are refused."""
    with pytest.raises(UsageError, match=said):
        load_backbone("test_resnet", random_init=True, num_channels=4, **options)


def test_a_dump_of_bands_from_a_checkpoint_that_says_all(tmp_path, cli):
    """A folder that says channels and numbers needs no option. Its dump is resumed, recomputed, read and shown."""
    folder, photos = tmp_path / "checkpoint", tmp_path / "photos"
    folder.mkdir()
    photos.mkdir()
    save_file(timm.create_model("test_resnet", in_chans=5).state_dict(), folder / "model.safetensors")
    own = {"input_size": [5, 64, 64], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9}
    own |= {"num_classes": 1000, "first_conv": "conv1.0", "classifier": "fc"}
    config = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(config))
    written(photos / "a.tif", VALUES, compression="zlib")
    Image.fromarray(EIGHT[..., :4]).save(photos / "b.png")
    run = ["extract", photos, "-c", folder, "-o", tmp_path / "d"]
    assert cli(*run).code == 3
    assert "nothing left to do" in cli(*run).err
    verified = cli("verify", tmp_path / "d", photos, "--recompute", 2, "-c", folder)
    assert (verified.code, "1 equal bit for bit" in verified.out + verified.err) == (0, True)
    dump = featcli.open_dump(tmp_path / "d")
    failure = dump.failures[0]
    assert failure["reason"] == "format_not_allowed"
    assert failure["detail"] == "3 bands and transparency, which is no band; the network takes 5"
    first = dump.preprocess(VALUES)[:3].numpy().transpose(1, 2, 0)
    assert np.array_equal(np.asarray(DumpPictures(dump, str(photos))[0]), first)
    maps = dump.load_backbone(folder)(dump.preprocess(VALUES)[None])["stage4"][0]
    np.testing.assert_allclose(maps.numpy(), dump["stage4"]["a.tif"], rtol=1e-4, atol=1e-5)


def test_a_dump_of_arrays_of_bands(tmp_path):
    """Arrays of bands in memory give the rows of their files, and one with other bands is a failure with its row."""
    options = {**FIVE, "image_size": 64}
    pictures = {"a.tif": VALUES, "b.tif": VALUES.transpose(2, 0, 1), "c.tif": EIGHT[..., :4]}
    outcome = featcli.extract(pictures, output=tmp_path / "d", **options)
    assert (outcome.written, outcome.failed) == (2, 1)
    dump = featcli.open_dump(tmp_path / "d")
    assert dump.failures[0]["detail"] == "4 bands; the network takes 5"
    assert np.array_equal(dump["stage4"]["a.tif"], dump["stage4"]["b.tif"])
    assert featcli.extract(pictures, output=tmp_path / "d", **options).extracted == 0
    with pytest.raises(UsageError, match=r"picture 'a.tif': an array .* is not a picture"):
        featcli.extract(pictures, output=tmp_path / "e", checkpoint="test_resnet", random_init=True)


def test_bands_of_transformers(tmp_path):
    """An image processor with a number for each band says how bands become the input, in a plan as well."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 64, "num_hidden_layers": 1}
    config = transformers.ViTConfig(num_channels=5, num_attention_heads=1, **sizes)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=list(MEAN), image_std=list(STD)
    )
    processor.save_pretrained(tmp_path)
    how = Image.Resampling(processor.resample)
    ours, asked = load_backbone(str(tmp_path)), load_backbone(config, mean=MEAN, std=STD)
    again = pickle.loads(pickle.dumps(ours.preprocessing))
    found = ours.preprocess(EIGHT)
    for band in range(5):
        expected = np.asarray(Image.fromarray(np.ascontiguousarray(EIGHT[..., band])).resize((64, 64), how))
        assert np.array_equal(found[band].numpy(), expected)
    assert torch.equal(asked.preprocess(EIGHT), found)
    assert (again.mean, again.std) == (asked.preprocessing.mean, asked.preprocessing.std) == (MEAN, STD)
