"""Check --fit, which gives pictures the size of the input; native keeps each picture's own, so maps have many sizes."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import featcli
from conftest import SAMPLES, draw, little_memory, tree, upright
from featcli import load_backbone, open_dump
from featcli.backbones.image_processor import ImageProcessor
from featcli.backbones.preprocessing import processor_preprocessing, timm_preprocessing
from featcli.dump.formats import FORMATS
from featcli.dump.verify import verify
from featcli.errors import DamagedError, UsageError
from featcli.pixels.resize import MOST_RESIZED, WIDEST, ResizeMode
from featcli.pixels.sizes import Sizes
from featcli.spec.groups import InputSpec, PixelSpec
from featcli.spec.words import FITS

MEAN = (0.5, 0.5, 0.5)
TINY = {"checkpoint": "test_resnet", "random_init": True}
EDGES = [(96, 80), (200, 120), (64, 64), (64, 65), (300, 40), (20, 20), (1, 1)]


@pytest.fixture
def pictures(tmp_path):
    """Make a folder of pictures of many sizes, one of which cannot be read."""
    for i, size in enumerate(EDGES):
        draw(tmp_path / "p" / f"{i}.png", i, size)
    (tmp_path / "p" / "2b.png").write_bytes(b"broken")
    return tmp_path / "p"


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_fits_are_pillows(fit):
    """Each fit equals Pillow's own function of that kind, with the checkpoint's interpolation."""
    backbone = load_backbone("resnet18", random_init=True, fit=fit, image_size=(96, 128))
    mean = tuple(round(255 * value) for value in backbone.preprocessing.mean)
    for path in sorted(SAMPLES.rglob("*.jpg")):
        picture, size, cubic = upright(path), (128, 96), Image.Resampling.BICUBIC
        expected = {
            "crop": lambda: ImageOps.fit(picture, size, cubic),  # noqa: B023
            "squash": lambda: picture.resize(size, cubic),  # noqa: B023
            "pad": lambda: ImageOps.pad(picture, size, cubic, color=mean),  # noqa: B023
        }[fit]()
        assert np.array_equal(backbone.preprocess(picture), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("fit", FITS)
def test_fits_of_transformers(fit, dinov2_folder):
    """Fits work for transformers' checkpoints, too: the processor normalises what the fit gives."""
    size = None if fit == "native" else (84, 56)
    backbone = load_backbone(dinov2_folder, fit=fit, image_size=size)
    picture = upright(SAMPLES / "nature" / "sea.jpg")
    pixels = backbone.preprocess(picture)
    height, width = size or ResizeMode("native", None, backbone.stages[0].stride).native_size(picture.size[::-1])
    assert pixels.shape == (3, height, width)
    if fit == "squash":
        assert np.array_equal(pixels, np.asarray(picture.resize((56, 84), Image.Resampling.BICUBIC)).transpose(2, 0, 1))
    maps = backbone(pixels[None])["stage3"]
    assert maps.shape[2:] == (height // 14, width // 14)


@pytest.mark.parametrize("format_name", FORMATS)
def test_native_maps(tmp_path, pictures, format_name):
    """Each image's maps equal those of the backbone at the picture's own size, rounded to the largest stride."""
    featcli.extract(pictures, output=tmp_path / "d", fit="native", format=format_name, out_indices="all", **TINY)
    backbone = load_backbone(TINY["checkpoint"], random_init=True, fit="native", out_indices="all")
    dump = open_dump(tmp_path / "d")
    assert [failure["key"] for failure in dump.failures] == ["2b.png"]
    assert dump["stage4"].shape == (8, backbone.channels[-1], None, None)
    for row, key in enumerate(dump.keys):
        if not dump.valid[row]:
            assert np.isnan(dump["stage4"][row]).all()
            continue
        picture = upright(pictures / key)
        expected = backbone(backbone.preprocess(picture)[None])
        for stage in backbone.selected:
            found = dump[stage.name][key]
            assert np.allclose(found, expected[stage.name][0], rtol=1e-4, atol=1e-5)
            assert found.shape[1:] == tuple(max(1, round(e / 32)) * 32 // stage.stride[0] for e in picture.size[::-1])
    several = dump["stage4"][[5, 0, 1]]
    assert [np.array_equal(one, dump["stage4"][row]) for one, row in zip(several, (5, 0, 1), strict=True)] == [True] * 3
    assert verify(tmp_path / "d").state == "whole"


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_native_dump_survives(tmp_path, pictures, format_name, cli):
    """A native dump does what others do: it shards, resumes, retries, finds every damage, and recomputes."""
    options = {"fit": "native", "format": format_name, "batch_size": 2, "shard_size": 2, "threads": 1, **TINY}
    featcli.extract(pictures, output=tmp_path / "d", **options)
    before = tree(tmp_path / "d")
    shards = sorted(path for path in (tmp_path / "d" / "shards").iterdir() if path.suffix != ".json")
    shards[1].unlink()
    featcli.extract(pictures, output=tmp_path / "d", **options)
    assert tree(tmp_path / "d") == before
    content = shards[0].read_bytes()
    for place in range(0, len(content), max(1, len(content) // 60)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        shards[0].write_bytes(flipped)
        assert verify(tmp_path / "d").state == "damaged", place
    shards[0].write_bytes(content)
    given = (pictures, "-c", "test_resnet", "--random-init", "--recompute", 20)
    assert "7 images extracted anew: 7 equal bit for bit" in cli("verify", tmp_path / "d", *given).out
    draw(pictures / "2b.png", 5, (50, 300))
    assert featcli.extract(pictures, output=tmp_path / "d", retry_failed=True, **options).failed == 0
    assert verify(tmp_path / "d").state == "whole"
    assert open_dump(tmp_path / "d")["stage4"]["2b.png"].shape[1:] == (9, 2)


def test_native_pooled(tmp_path, pictures):
    """Pooled maps of a native dump have one shape, as in any other dump."""
    featcli.extract(pictures, output=tmp_path / "d", fit="native", pool="avg", **TINY)
    featcli.extract(pictures, output=tmp_path / "maps", fit="native", **TINY)
    pooled, maps = open_dump(tmp_path / "d")["stage4"], open_dump(tmp_path / "maps")["stage4"]
    assert pooled[:].shape == (8, 96)
    assert all(np.allclose(pooled[row], maps[row].mean((1, 2)), atol=1e-5) for row in (0, 1, 2, 4, 5, 6, 7))


def test_native_with_a_limit(tmp_path, pictures, cli):
    """With --image-size larger pictures are shrunk to fit, and inspect and a dry run say so."""
    given = ("extract", pictures, "-c", "test_resnet", "--random-init", "--fit", "native", "--image-size", "96x128")
    planned = cli(*given, "-o", tmp_path / "d", "--dry-run", "--json").events[-1]["bytes"]
    assert cli(*given, "-o", tmp_path / "d").code == 3
    dump = open_dump(tmp_path / "d")
    assert [dump["stage4"][f"{i}.png"].shape[1:] for i in range(7)] == [
        (2, 3), (2, 4), (2, 2), (2, 2), (1, 4), (1, 1), (1, 1)
    ]  # fmt: skip
    assert sum(maps.nbytes for maps in dump["stage4"][:]) == planned
    assert "96x*x*" in cli("inspect", tmp_path / "d").out
    assert cli(*given[:-1], "16", "-o", tmp_path / "e").code == 2


def test_native_needs_a_backbone_for_every_size(cli, tmp_path, pictures):
    """A backbone that needs one size is refused before anything runs, with a way out."""
    run = cli("extract", pictures, "-c", "levit_128s", "--random-init", "--fit", "native", "-o", tmp_path / "d")
    assert (run.code, "--fit pad" in run.err) == (2, True)


def test_a_size_that_only_turns_out_too_large(cli, tmp_path):
    """A network that refuses a size in the middle of a run ends it with the size and a way out."""
    draw(tmp_path / "p" / "a.png", 0, (224, 224))
    draw(tmp_path / "p" / "b.png", 0, (672, 672))
    given = ("extract", tmp_path / "p", "-c", "mvitv2_tiny", "--random-init", "--out-indices", 0, "--fit", "native")
    run = cli(*given, "-o", tmp_path / "d", "-q")
    assert (run.code, "does not take" in run.err, "--image-size" in run.err) == (2, True, True), run.err
    assert len(run.err.splitlines()) == 3  # one line says how many images are safe


def test_native_batches():
    """Neighbours of one size make batches, up to the pixels of a common batch, with every row once and in order."""
    own = np.array([[32, 32]] * 5 + [[64, 32]] * 3 + [[320, 320]] * 2 + [[32, 32]])
    found = list(Sizes((64, 64), own).batches(range(11), 4))
    assert found == [range(4), range(4, 5), range(5, 8), range(8, 9), range(9, 10), range(10, 11)]
    assert list(Sizes((64, 64)).batches(range(3, 10), 4)) == [range(3, 7), range(7, 10)]


def test_images_that_cannot_be_read_have_a_size(tmp_path):
    """An unreadable image gets the size of the one before it, and the first one the checkpoint's."""
    from featcli.inputs.listing import find
    from featcli.pixels.sizes import native_sizes

    for name in ("a", "c", "d"):
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    draw(tmp_path / "b.png", 0, (64, 100))
    images = find(InputSpec([str(tmp_path)])).images
    sizes = native_sizes(images, PixelSpec(), ResizeMode("native", None, (32, 32)), (224, 224), 2)
    assert [sizes[row] for row in range(4)] == [(224, 224), (96, 64), (96, 64), (96, 64)]
    (tmp_path / "b.png").write_bytes(b"")
    assert native_sizes(images, PixelSpec(), ResizeMode("native", None, (32, 32)), (240, 299), 2)[1] == (256, 288)
    assert native_sizes(images, PixelSpec(), ResizeMode("native", None, (32, 32)), (224, 224), 2)[1] == (224, 224)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "late.png", "webp", "tif", "avif", "heic", "jxl"])
def test_the_header_tells_the_size(tmp_path, orientation, suffix):
    """The size that the header gives is that of the decoded, upright picture in every format."""
    from featcli.inputs.image_list import Image as Input
    from featcli.pixels.decode import read_pixels, read_size

    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(draw(tmp_path / "plain.png", 0, (50, 30))) as plain:
        if suffix in ("heic", "jxl"):
            pytest.importorskip({"heic": "pillow_heif", "jxl": "pillow_jxl"}[suffix])
            from featcli.pixels.formats import readable_formats

            readable_formats()
        plain.save(tmp_path / f"x.{suffix}", exif=exif.tobytes() if suffix == "jxl" else exif)
    if suffix == "late.png":  # its orientation comes after the pixels
        content = (tmp_path / "x.late.png").read_bytes()
        at = content.index(b"eXIf") - 4
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        (tmp_path / "x.late.png").write_bytes(content[:at] + content[end:-12] + content[at:end] + content[-12:])
    image = Input("x", str(tmp_path / f"x.{suffix}"), -1, str(tmp_path))
    for choice in ("apply", "ignore"):
        rules = PixelSpec(orientation=choice)
        height, width = read_size(image, rules)
        pixels = np.empty((3, height, width), np.uint8)
        read_pixels(image, rules, lambda picture: np.asarray(picture).transpose(2, 0, 1), pixels)


def test_the_size_of_a_png_costs_no_pixels(tmp_path, monkeypatch):
    """The size of a PNG is read from its header without unpacking pixels."""
    from PIL import PngImagePlugin

    from featcli.inputs.image_list import Image as Input
    from featcli.pixels.decode import read_size

    path = draw(tmp_path / "x.png", 0, (50, 30))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("unpacked"))
    assert read_size(Input("x", str(path), -1, str(tmp_path)), PixelSpec()) == (30, 50)


def test_odd_shapes_of_native_maps_are_refused(tmp_path, pictures):
    """A shard whose shapes do not fit its values is damaged."""
    featcli.extract(pictures, output=tmp_path / "d", fit="native", format="safetensors", **TINY)
    from featcli.dump.folder import Dump

    dump = Dump.existing(tmp_path / "d")
    path = dump.shard_path(0)
    array = dump.format.read_layout(str(path), 8).arrays["stage4.shapes"]
    content = bytearray(path.read_bytes())
    for shape in ([2**31, 2**31, 2**31], [96, 0, 0], [0, 2, 3], [48, 2, 6]):
        content[array.offset : array.offset + 12] = np.array(shape, "<u4").tobytes()
        path.write_bytes(content)
        with pytest.raises(DamagedError):
            open_dump(tmp_path / "d")["stage4"][0]
        assert verify(tmp_path / "d").state == "damaged"


def test_wide_pictures_cost_what_others_do(tmp_path):
    """Only the middle of a very wide picture is resized if the centre is cut out; others equal the library's."""
    backbone = load_backbone("resnet18", random_init=True)
    noise = np.random.default_rng(0).integers(0, 256, (4, 4 * WIDEST, 3), dtype=np.uint8)
    from timm.data import create_transform

    plain = create_transform(224, is_training=False, crop_pct=0.95, interpolation="bicubic", use_prefetcher=True)
    assert np.array_equal(backbone.preprocess(Image.fromarray(noise)), plain(Image.fromarray(noise)))
    for size in ((20_000, 1), (1, 20_000)):
        with little_memory(64_000_000):
            assert backbone.preprocess(Image.new("RGB", size, "red")).shape == (3, 224, 224)


def noise_of(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def furthest(one, other):
    """Return the largest difference of two pictures, in levels of 255."""
    one, other = (np.asarray(each).astype(int) for each in (one, other))
    assert one.shape == other.shape
    return np.abs(one - other).max()


WIDE_AND_TALL = [(1000, 7), (7, 1000), (1700, 50), (50, 1701)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"])
def test_elongated_pictures_are_as_timm_has_them(interpolation):
    """The middle of a wide or tall picture equals, to 2 levels, the centre that timm cuts from the whole."""
    from timm.data import create_transform

    for shape, crop_pct in (((3, 64, 64), 0.95), ((3, 48, 80), 0.875), ((1, 64, 64), 0.95)):
        config = {"input_size": shape, "interpolation": interpolation, "crop_pct": crop_pct, "mean": MEAN, "std": MEAN}
        plain = create_transform(**config, is_training=False, use_prefetcher=True)
        ours = timm_preprocessing(config, shape[0], "", None)
        for size in WIDE_AND_TALL:
            picture = noise_of(*size)
            expected = plain(picture.convert("L") if shape[0] == 1 else picture)
            assert furthest(ours.fit(picture), expected) <= 2, (shape, size)


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_crop_modes_that_keep_the_whole_picture(mode):
    """timm's other crop modes give timm's own pixels of long pictures, also of one that is too thin for timm."""
    from timm.data import create_transform

    config = {"input_size": (3, 64, 64), "interpolation": "bicubic", "mean": MEAN, "std": MEAN, "crop_mode": mode}
    plain, ours = (
        create_transform(**config, is_training=False, use_prefetcher=True),
        timm_preprocessing(config, 3, "", None),
    )
    for size in WIDE_AND_TALL:
        assert furthest(ours.fit(noise_of(*size)), plain(noise_of(*size))) == 0
    thin = ours.fit(Image.new("RGB", (3000, 1), "red"))
    assert (thin == np.array([255, 0, 0])[:, None, None]).all(0).sum() >= 64


@pytest.mark.parametrize("kind", ["CLIP", "ConvNext", "Levit", "PoolFormer", "MobileNetV2", "ViT"])
def test_elongated_pictures_are_as_processors_have_them(kind):
    """Long pictures equal those of processors that cut out the centre, however these give their size."""
    transformers = pytest.importorskip("transformers")
    sized = {"size": {"shortest_edge": 224}} if kind == "ConvNext" else {}
    own = getattr(transformers, f"{kind}ImageProcessorPil")(**sized)
    ours, greys = (processor_preprocessing(ImageProcessor(own), (224, 224), channels) for channels in (3, 1))
    for size in ((300, 7), (7, 300)):
        whole = own(noise_of(*size), return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert (ours.dtype, furthest(ours.fit(noise_of(*size)), whole) <= 2) == ("uint8", True)
        grey = own(
            noise_of(*size).convert("L").convert("RGB"), return_tensors="np", do_rescale=False, do_normalize=False
        )
        assert furthest(greys.fit(noise_of(*size)), grey["pixel_values"][0][:1]) <= 2
        found = {size: ours.fit(Image.new("RGB", size)).shape for size in ((20_000, 1), (1, 20_000))}
        assert {*found.values()} == {(3, 224, 224)}


@pytest.mark.parametrize("size", [(5_000, 3), (3, 5_001)])
def test_fits_of_elongated_pictures(size):
    """`crop` and `squash` do to a long picture what Pillow does, `crop` to 2 levels."""
    picture, cubic = noise_of(*size), Image.Resampling.BICUBIC
    crop, squash = (ResizeMode(fit, (64, 96), (1, 1)).fitted(cubic) for fit in ("crop", "squash"))
    assert furthest(crop(picture), ImageOps.fit(picture, (96, 64), cubic)) <= 2
    assert furthest(squash(picture), picture.resize((96, 64), cubic)) == 0


def test_pictures_for_which_pillow_finds_no_memory():
    """A picture of one row is fitted in each way, however long it is."""
    row = Image.new("RGB", (70_000_000, 1), (9, 9, 9))
    with pytest.raises(MemoryError):
        row.resize((96, 64), Image.Resampling.BICUBIC)
    for fit in FITS:
        with little_memory(300_000_000):
            fitted = ResizeMode(fit, (64, 96), (32, 32)).fitted(Image.Resampling.BICUBIC)(row)
        assert np.asarray(fitted).max() == 9


def test_long_pictures_are_averaged_first():
    """Pictures that are averaged first equal, up to rounding, those that Pillow resizes as they are."""
    row = noise_of(MOST_RESIZED + 1_000_003, 1)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.NEAREST):
        ours = ResizeMode("squash", (4, 64), (1, 1)).fitted(resample)(row)
        assert furthest(ours, row.resize((64, 4), resample)) <= 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "I;16"])
def test_what_is_no_rgb_picture_is_refused(mode):
    """`fit` refuses a picture that is not RGB, and says how to convert it."""
    preprocessing = load_backbone(**TINY).preprocessing
    with pytest.raises(UsageError, match=f"mode {mode}.*upright RGB"):
        preprocessing.fit(Image.new(mode, (50, 40)))
    with pytest.raises(UsageError, match="ndarray"):
        preprocessing.fit(np.zeros((40, 50, 3), np.uint8))


def test_wide_inputs_and_squashing_processors_see_all_of_a_picture(tmp_path):
    """If the input is wide, or pictures are squashed, nothing is cut off that the library would use."""
    transformers = pytest.importorskip("transformers")
    from timm.data import create_transform

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 70 * 8, 3), dtype=np.uint8))
    backbone = load_backbone("resnet18", random_init=True, image_size=(32, 2048))
    plain = create_transform((32, 2048), is_training=False, crop_pct=0.95, interpolation="bicubic", use_prefetcher=True)
    assert np.array_equal(backbone.preprocess(noise), plain(noise))
    config = transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])
    transformers.ConvNextModel(config).save_pretrained(tmp_path)
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 384})
    processor.save_pretrained(tmp_path)
    ours = load_backbone(tmp_path)
    expected = torch.from_numpy(processor(noise, return_tensors="np")["pixel_values"][0])
    assert torch.allclose(ours.preprocessing.normalize(ours.preprocess(noise)[None])[0], expected, atol=1e-6)


def test_unknown_fits():
    """A fit that does not exist is refused with those that do."""
    with pytest.raises(UsageError, match="cannot be") as refused:
        load_backbone("resnet18", random_init=True, fit="stretch")
    assert "squash" in refused.value.hint


def test_native_pixels_are_checked():
    """A native backbone takes any multiple of its step, and no other size."""
    backbone = load_backbone("test_resnet", random_init=True, fit="native")
    assert backbone(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))["stage4"].shape[2:] == (2, 3)
    with pytest.raises(UsageError, match="not a multiple of 32x32"):
        backbone(torch.zeros(1, 3, 64, 90, dtype=torch.uint8))


def test_a_fit_in_place_of_what_a_processor_cannot(tmp_path, cli):
    """A processor that knows only one edge refuses another size by itself, says so, and takes any with --fit."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], embedding_size=16)
    transformers.ResNetModel(config).save_pretrained(tmp_path / "m")
    transformers.TextNetImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(tmp_path / "m")
    given = ("extract", SAMPLES, "-c", tmp_path / "m", "--image-size", "64x96", "-q")
    refused = cli(*given, "-o", tmp_path / "d")
    assert (refused.code, "64x96 pixels" in refused.err, "--fit" in refused.err) == (6, True, True), refused.err
    assert cli(*given, "--fit", "pad", "-o", tmp_path / "d").code == 0
    assert open_dump(tmp_path / "d")["stage4"].shape[2:] == (2, 3)


def test_a_grid_larger_than_the_map(cli, tmp_path):
    """A grid that would only repeat the cells of a map is refused."""
    given = ("extract", SAMPLES, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "-q")
    refused = cli(*given, "--pool", "9x2")
    assert (refused.code, "have 5x5 cells only" in refused.err) == (2, True), refused.err
    assert cli(*given, "--pool", "5x2").code == 0
