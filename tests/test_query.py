"""Check that a query is treated like the dump: the backbone and the pixels of a plan, for pictures of every kind."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_colour import rgb_profile

import featcli
from conftest import SAMPLES, draw
from featcli.errors import CheckpointError, ConflictError, UsageError
from featcli.pixels.pictures import prepared
from featcli.spec.groups import PixelSpec

TINY = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "threads": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Make eight pictures, one of every kind that an option of pixels is about."""
    folder = tmp_path_factory.mktemp("odd")
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.jpg")
    Image.fromarray(noise).save(folder / "several.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 3))])
    colours = np.dstack([noise[:32, :40], np.full((32, 40), 255, np.uint8)])
    colours[:, :20, 3] = 0
    Image.fromarray(colours).save(folder / "see-through.png")
    Image.fromarray(np.linspace(0, 4095, 32 * 40).reshape(32, 40).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(noise[:40, :48]).save(folder / "wide.png", icc_profile=rgb_profile())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise[:40, :48]).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise[:40, :48, 0]).save(folder / "grey.png")
    draw(folder / "plain.png", 1)
    return folder


DUMPS = {
    "defaults": {},
    "seed": {"seed": 3, "out_indices": (1, 3)},
    "alpha": {"alpha": "white", "fit": "pad"},
    "orientation": {"orientation": "ignore", "fit": "squash"},
    "depth": {"depth_range": "0:4095", "layout": "channels-last"},
    "colour": {"colour": "convert", "num_channels": 1},
    "decode": {"decode": "scaled", "fit": "crop"},
    "fast": {"decode": "fast", "image_size": 48, "checkpoint": "test_vit"},
    "fast pad": {"decode": "fast", "fit": "pad"},
    "own": {"mean": 0.4, "std": (0.1, 0.2, 0.3), "interpolation": "box", "crop_pct": 0.6},
    "own grey": {"mean": 0.4, "interpolation": "lanczos", "fit": "pad", "num_channels": 1},
    "precision": {"precision": "bf16", "fold": True},
    "own size": {"image_size": None, "checkpoint": "test_vit", "norm": "model"},
    "size": {"image_size": 48, "checkpoint": "test_vit"},
}


@pytest.mark.parametrize("name", DUMPS)
def test_a_query_equals_its_row(odd, tmp_path, name):
    """Paths, opened pictures and files give, through the plan's backbone, the rows of the dump to the last bit."""
    dump = featcli.open_dump(featcli.extract(odd, output=tmp_path / "d", **TINY | DUMPS[name]).dump)
    backbone = dump.load_backbone()
    paths = [odd / key for key in dump.keys]
    pixels = dump.preprocess(paths)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        maps = backbone(pixels)
    finally:
        torch.set_num_threads(threads)
    assert backbone.out_features == list(dump.stages)
    for stage, found in maps.items():
        assert torch.equal(found.float(), dump[stage].tensor(slice(None)).float()), stage
    opened = [Image.open(path) for path in paths]
    assert torch.equal(pixels, backbone.preprocess(opened))
    assert torch.equal(pixels, dump.preprocess([str(path) for path in paths]))
    for picture, path, row in zip(opened, paths, pixels, strict=True):
        picture.load()
        if name != "decode" or path.suffix != ".jpg":  # a picture that was unpacked before is not decoded smaller
            assert torch.equal(dump.preprocess(picture), row), path
        picture.close()


def test_pictures_of_their_own_sizes(odd, tmp_path):
    """With --fit native every picture keeps its own size, and pictures of several sizes make no batch."""
    options = TINY | {"fit": "native", "image_size": 64}
    dump = featcli.open_dump(featcli.extract(odd, output=tmp_path / "d", **options).dump)
    backbone = dump.load_backbone()
    for key in dump.keys:
        np.testing.assert_allclose(
            backbone(dump.preprocess(odd / key)[None])["stage4"][0].numpy(), dump["stage4"][key], rtol=1e-4, atol=1e-5
        )
    with pytest.raises(UsageError, match="cannot form one batch"):
        dump.preprocess([odd / "noise.jpg", odd / "deep.png"])


@pytest.mark.parametrize("rules", [{}, {"alpha": "white"}, {"alpha": "white", "depth_range": "0:4095"}])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_arrays_are_read_as_their_files_are(tmp_path, channels, rules):
    """A 16-bit array gives the pixels of a TIFF of it, and `depth_range` leaves its transparency alone."""
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 65536, (9, 8, channels)).astype(np.uint16)
    kind = {"photometric": "rgb" if channels > 2 else "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "x.tif", values, **kind, extrasamples=["unassalpha"] * (1 - channels % 2))
    whole = SimpleNamespace(fit_for=lambda _: lambda one: np.asarray(one).transpose(2, 0, 1), channels=3)
    of_array, of_file = (prepared(one, PixelSpec(**rules), whole, (9, 8)) for one in (values, tmp_path / "x.tif"))
    assert torch.equal(of_array, of_file)


def test_arrays_are_pictures(odd):
    """Arrays and tensors of uint8, uint16 and bool give the pixels that a file of them would."""
    backbone = featcli.load_backbone("test_resnet", random_init=True, image_size=32, alpha="black")
    see_through = np.asarray(Image.open(odd / "see-through.png"))
    grey, deep = np.asarray(Image.open(odd / "grey.png")), np.asarray(Image.open(odd / "deep.png"))
    plain = np.asarray(Image.open(odd / "plain.png"))
    for name, arrays in {
        "see-through": [see_through, see_through.transpose(2, 0, 1), torch.tensor(see_through)],
        "grey": [grey, grey[..., None], torch.tensor(grey)[None], np.dstack([grey] * 3), np.dstack([grey, grey | 255])],
        "deep": [deep, deep[..., None]],
        "plain": [plain, torch.tensor(plain).permute(2, 0, 1), plain.astype(np.uint16) * 257],
    }.items():
        expected = backbone.preprocess(odd / f"{name}.png")
        for array in arrays:
            assert torch.equal(backbone.preprocess(array), expected), (name, array.shape)
    black = backbone.preprocess(np.zeros((40, 40), bool))
    assert (black.shape, int(black.max())) == ((3, 32, 32), 0)
    assert backbone.preprocess(np.zeros((2, 40, 40, 3), np.uint8)).shape == (2, 3, 32, 32)


NO_PICTURES = {
    "floats": (np.zeros((4, 4, 3), np.float32), "floats are normalised already"),
    "whole numbers": (np.zeros((4, 4, 3), np.int64), "of int64 is not a picture"),
    "five channels": (np.zeros((9, 9, 5), np.uint8), "is not a picture"),
    "nothing of it": (np.zeros((0, 4, 3), np.uint8), "is not a picture"),
    "a row": (np.zeros(4, np.uint8), "is not a picture"),
    "a number": (5, "int is not a picture"),
    "nothing": (None, "NoneType is not a picture"),
    "bytes": (b"\x89PNG", "bytes is not a picture"),
    "no pictures": ([], "cannot form one batch"),
    "a picture and none": ([Image.new("RGB", (4, 4)), 5], "int is not a picture"),
    "lists of lists": ([[Image.new("RGB", (4, 4))]], "cannot form one batch"),
    "a missing file": ("missing.png", "missing.png' cannot be prepared: not_found"),
    "no picture": (__file__, "cannot be prepared: not_an_image"),
    "values without a range": (Image.new("F", (4, 4)), "cannot be prepared: unsupported_depth"),
}


@pytest.mark.parametrize("what", NO_PICTURES)
def test_what_is_no_picture(what):
    """Anything that is no picture is refused with a message before anything is computed."""
    given, message = NO_PICTURES[what]
    backbone = featcli.load_backbone("test_resnet", random_init=True, image_size=32)
    with pytest.raises(UsageError, match=message):
        backbone.preprocess(given)


def test_the_checkpoint_of_a_dump(tmp_path, odd):
    """A folder must be given again, because a plan keeps only its last name; one with other weights is refused."""
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16}
    for seed, name in enumerate(("right", "other")):
        torch.manual_seed(seed)
        transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path / name)
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / name)
    dump = featcli.open_dump(featcli.extract(odd, checkpoint=tmp_path / "right", output=tmp_path / "d").dump)
    with pytest.raises(UsageError, match="made with 'right', a file, a folder or a configuration"):
        dump.load_backbone()
    backbone = dump.load_backbone(tmp_path / "right")
    np.testing.assert_allclose(
        backbone(dump.preprocess([odd / dump.keys[0]]))["stage2"][0], dump["stage2"][0], atol=1e-5
    )
    with pytest.raises(ConflictError, match="its weights are not those of this dump"):
        dump.load_backbone(tmp_path / "other")
    with pytest.raises(ConflictError, match="its architecture is not that of this dump"):
        dump.load_backbone(transformers.ResNetConfig(**sizes | {"layer_type": "basic"}))
    with pytest.raises((UsageError, CheckpointError)):
        dump.load_backbone(SAMPLES)


def test_arguments_of_the_model_of_a_dump(tmp_path, odd):
    """Arguments of the model must be given again, because a plan has other words for them; others are refused."""
    options = {"checkpoint": "test_vit", "random_init": True, "model_arg": ["init_values=0.1"]}
    dump = featcli.open_dump(featcli.extract(odd, output=tmp_path / "d", **options).dump)
    assert dump.load_backbone(model_arg=["init_values=0.1"]).digest == dump.plan.settings.weights_digest
    with pytest.raises(ConflictError, match="and the same model_arg"):
        dump.load_backbone()
    with pytest.raises(UsageError, match="alpha: a dump's backbone has the settings of its plan"):
        dump.load_backbone(alpha="white")


def test_a_weights_file_of_a_dump(tmp_path, odd):
    """A weights file must be given again, without its architecture, which the plan has."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    options = {"checkpoint": tmp_path / "w.pth", "arch": "test_vit", "image_size": 48}
    dump = featcli.open_dump(featcli.extract(odd, output=tmp_path / "d", **options).dump)
    assert dump.load_backbone(tmp_path / "w.pth").digest == dump.plan.settings.weights_digest
