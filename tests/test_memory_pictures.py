"""Check `featcli.extract` of pictures in memory, of lists of paths, and with a backbone that is loaded already."""

import copy
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from test_colour import rgb_profile

import featcli
from conftest import SAMPLES, draw
from featcli.errors import ConflictError, UsageError

OPTIONS = {
    "checkpoint": "test_resnet",
    "random_init": True,
    "image_size": 32,
    "threads": 1,
    "batch_size": 2,
    "shard_size": 2,
    "pool": "max",  # of which nothing has to be found out
}
NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 4), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 4096, (40, 48, 4), np.uint16)


def png_of_16_bits(values):
    """Return a PNG of 16-bit colours, which Pillow cannot write."""
    kind = {2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(data)) + name + data for name, data in parts)
    sums = (struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(part for pair in zip(chunks, sums, strict=True) for part in pair)


def turned():
    """Return a picture with an orientation in its EXIF, as Pillow has it of a camera."""
    picture = Image.fromarray(NOISE[:30, :, :3])
    picture.getexif()[0x0112] = 6
    return picture


def see_through():
    """Return a picture with a palette of which one colour is transparent."""
    picture = Image.fromarray(NOISE[..., :3]).quantize(7)
    picture.info["transparency"] = 3
    return picture


def with_profile():
    """Return a picture whose colours are not those of sRGB."""
    picture = Image.fromarray(NOISE[..., :3])
    picture.info["icc_profile"] = rgb_profile()
    return picture


PICTURES = {
    "grey": Image.fromarray(NOISE[..., 0]),
    "grey array": NOISE[..., 0],
    "grey with a channel": NOISE[..., :1],
    "grey and alpha": NOISE[..., :2],
    "colours": NOISE[..., :3],
    "colours and alpha": NOISE,
    "colours and alpha of Pillow": Image.fromarray(NOISE),
    "tensor": torch.from_numpy(NOISE[..., :3]).permute(2, 0, 1),
    "tensor of 16 bits": torch.from_numpy(DEEP[..., 0]),
    "yes and no": NOISE[..., 0] > 99,
    "one bit": Image.fromarray(NOISE[..., 0] > 99),
    "deep": Image.fromarray(DEEP[..., 0]),
    "deep colours": DEEP[..., :3],
    "deep colours and alpha": DEEP,
    "palette": Image.fromarray(NOISE[..., :3]).quantize(7),
    "see-through palette": see_through(),
    "turned": turned(),
    "profile": with_profile(),
}


def saved(pictures, folder):
    """Save pictures as PNG, each under its key."""
    folder.mkdir()
    for key, picture in pictures.items():
        array = picture.numpy() if isinstance(picture, torch.Tensor) else picture
        if isinstance(array, np.ndarray) and array.ndim == 3 and array.dtype == np.uint16:
            (folder / key).write_bytes(png_of_16_bits(array))
            continue
        if isinstance(array, np.ndarray):
            array = array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[2] > 4 else array
            array = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        array.save(folder / key, exif=array.getexif())
    return folder


def content(dump):
    """Return the bytes of every file of a dump, by name."""
    return {str(path.relative_to(dump)): path.read_bytes() for path in Path(dump).rglob("*") if path.is_file()}


def shards_of(dump):
    """Return the bytes of every shard file of a dump, by name."""
    return {name: held for name, held in content(dump).items() if name.endswith(".h5")}


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"alpha": "white", "colour": "convert", "depth_range": (0, 4095), "fit": "pad"},
        {"alpha": "black", "orientation": "ignore", "fit": "native"},
    ],
    ids=str,
)
def test_rows_equal_those_of_files(tmp_path, rules):
    """Pictures in memory give the bytes of shards, traits and failures that the same pictures saved as PNG give."""
    left_out = ("deep colours",) if "depth_range" in rules else ()  # Pillow reduces those of a PNG by itself
    names = [name for name in PICTURES if not name.startswith(left_out)]
    pictures = {key: PICTURES[key.removesuffix(".png")] for key in sorted(f"{name}.png" for name in names)}
    files = featcli.extract(saved(pictures, tmp_path / "files"), output=tmp_path / "a", **OPTIONS | rules)
    memory = featcli.extract(pictures, output=tmp_path / "b", **OPTIONS | rules)
    assert shards_of(memory.dump) == shards_of(files.dump)
    assert memory.pictures == files.pictures
    assert memory.written == len(pictures)
    if not rules:
        assert featcli.extract(pictures, output=tmp_path / "b", **OPTIONS).extracted == 0  # they are as they were


def test_rows_are_in_the_callers_order(tmp_path):
    """Row i is picture i, under its key, whether pictures come in a list, a batch or a mapping; labels are of keys."""
    keys = ["dog/2", "cat/10", "cat/9"]
    batch = np.stack([NOISE[..., :3], NOISE[..., 1:], 255 - NOISE[..., :3]])
    dumps = [
        featcli.extract(pictures, output=tmp_path / str(number), **named, **OPTIONS).dump
        for number, (pictures, named) in enumerate(
            [(list(batch), {"keys": keys}), (batch, {"keys": iter(keys)}), (dict(zip(keys, batch, strict=True)), {})]
        )
    ]
    dump = featcli.open_dump(dumps[0])
    assert (dump.keys, dump.labels) == (keys, ["dog", "cat", "cat"])
    assert content(dumps[0]) == content(dumps[1]) == content(dumps[2])
    alone = featcli.extract(batch[2], keys="cat/9", output=tmp_path / "alone", **OPTIONS).dump
    np.testing.assert_allclose(featcli.open_dump(alone)["stage4"][0], dump["stage4"]["cat/9"], rtol=1e-4)


def test_an_opened_picture_is_read_from_its_file(tmp_path):
    """Pictures that were opened and not looked at give the rows of their files, also damaged ones, and stay so."""
    folder = tmp_path / "files"
    draw(folder / "b.jpg", 1, (200, 150))
    Image.fromarray(NOISE).save(folder / "a.webp", lossless=True)
    turned().save(folder / "c.jpg", exif=turned().getexif())
    (folder / "d.jpg").write_bytes((folder / "b.jpg").read_bytes()[:3000])  # Pillow alone would tell as well
    whole = draw(tmp_path / "e.jpg", 2).read_bytes()
    (folder / "e.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")  # libjpeg alone would fill it with grey
    opened = {path.name: Image.open(path) for path in sorted(folder.iterdir())}
    files = featcli.extract(folder, output=tmp_path / "a", **OPTIONS)
    memory = featcli.extract(opened, output=tmp_path / "b", **OPTIONS)
    assert (memory.failed_by_reason, memory.pictures) == (files.failed_by_reason, files.pictures)
    assert memory.failed == 2
    assert shards_of(memory.dump) == shards_of(files.dump)
    assert opened["b.jpg"].fp is not None  # nothing was unpacked, so a thousand such pictures take no memory
    assert "000" not in featcli.open_dump(memory.dump).digests[0]
    opened["c.jpg"].load()
    assert featcli.extract(opened, output=tmp_path / "b", **OPTIONS).extracted == 0  # the same pixels are the same
    for picture in opened.values():
        picture.close()


def test_a_picture_from_bytes(tmp_path):
    """A picture that was opened from bytes is unpacked for its row, also where it stands in two, or fails."""
    whole = draw(tmp_path / "x.png", 1).read_bytes()
    opened = Image.open(io.BytesIO(whole))
    pictures = [opened, Image.open(io.BytesIO(whole[:-200])), opened, Image.new("F", (9, 9)), NOISE[..., 0]]
    outcome = featcli.extract(pictures, keys=list("abcde"), output=tmp_path / "d", max_pixels=96 * 80, **OPTIONS)
    dump = featcli.open_dump(outcome.dump)
    assert [(one["key"], one["reason"]) for one in dump.failures] == [("b", "truncated"), ("d", "unsupported_depth")]
    again = featcli.extract(tmp_path / "x.png", output=tmp_path / "file", **OPTIONS).dump
    np.testing.assert_allclose(dump["stage4"]["a"], featcli.open_dump(again)["stage4"][0], rtol=1e-4)
    few = featcli.extract(pictures[-1], keys="e", output=tmp_path / "few", max_pixels=5, **OPTIONS)
    assert few.failed_by_reason == {"too_many_pixels": 1}


def test_digests_are_what_the_format_says(tmp_path):
    """The digest of an array is over a line with its dtype and shape, and its values; that of a picture likewise."""
    picture, values = Image.fromarray(NOISE[..., :3]), torch.from_numpy(DEEP[..., 0])
    dump = featcli.extract({"a": picture, "b": values, "c": see_through()}, output=tmp_path / "d", **OPTIONS).dump
    parts = [
        b"RGB (40, 48)\n" + NOISE[..., :3].tobytes(),
        b"uint16 (40, 48)\n" + DEEP[..., 0].tobytes(),
        b"P (40, 48)\n" + see_through().tobytes() + b"palette 21\n" + bytes(see_through().getpalette()),
    ]
    parts[2] += b"transparency 1\n3"
    assert featcli.open_dump(dump).digests == [xxhash.xxh3_128_hexdigest(part) for part in parts]
    sizes = featcli.open_dump(dump).sizes
    assert sizes == [40 * 48 * 3, 40 * 48 * 2, 40 * 48]


class StoppedError(Exception):
    """What a report raises to end a run."""


def stopped_at(event):
    """Return a report that ends the run at the first such event."""

    def report(kind, **facts):
        if kind == event:
            raise StoppedError

    return report


@pytest.mark.parametrize("event", ["shard", "batch"])
def test_the_same_call_resumes(tmp_path, event):
    """A run of pictures in memory that ended half way is resumed by the same call, to the same bytes."""
    pictures = {f"{number}": np.roll(NOISE[..., :3], number, 0) for number in range(7)}
    options = OPTIONS | {"shard_size": 4}
    whole = featcli.extract(pictures, output=tmp_path / "whole", **options).dump
    with pytest.raises(StoppedError):
        featcli.extract(pictures, output=tmp_path / "d", report=stopped_at(event), **options)
    assert not (tmp_path / "d" / "manifest.json").exists()
    featcli.extract(pictures, output=tmp_path / "d", **options)
    assert content(tmp_path / "d") == content(whole)


def test_other_pictures_are_refused(tmp_path):
    """Other pixels under a key whose row is there are a conflict that names the first, and so are other keys."""
    pictures = {key: np.roll(NOISE[..., :3], number, 0) for number, key in enumerate("abcdefg")}
    options = OPTIONS | {"output": tmp_path / "d"}
    with pytest.raises(StoppedError):
        featcli.extract(pictures, report=stopped_at("shard"), **options)
    other = {**pictures, "b": pictures["a"], "c": pictures["a"]}
    with pytest.raises(ConflictError, match="the picture 'b' is another than its row was made of"):
        featcli.extract(other, **options)
    with pytest.raises(ConflictError, match="other images: 1 is gone, first 'g'"):
        featcli.extract({key: pictures[key] for key in "abcdef"}, **options)
    with pytest.raises(ConflictError, match="'b': 5760 bytes there, 3 bytes now"):
        featcli.extract({**pictures, "b": np.zeros((1, 1, 3), np.uint8)}, **options)
    featcli.extract(pictures, **options)
    with pytest.raises(ConflictError, match="the picture 'b' is another"):
        featcli.extract(other, **options)


def test_failed_pictures_may_be_replaced(tmp_path):
    """With retry_failed, another picture takes the place of one that failed, and of no other."""
    pictures = {"a": NOISE[..., :3], "b": Image.new("F", (48, 40)), "c": NOISE[..., 1:]}
    options = OPTIONS | {"output": tmp_path / "d"}
    assert featcli.extract(pictures, **options).failed == 1
    mended = {**pictures, "b": NOISE[..., :1]}
    with pytest.raises(ConflictError, match="they failed before: --retry-failed tries such images again"):
        featcli.extract(mended, **options)
    with pytest.raises(ConflictError, match="the picture 'c' is another"):
        featcli.extract({**mended, "c": NOISE[..., :3]}, retry_failed=True, **options)
    assert featcli.extract(mended, retry_failed=True, **options).failed == 0
    whole = featcli.extract(mended, **OPTIONS, output=tmp_path / "whole").dump
    assert shards_of(whole) == shards_of(tmp_path / "d")


def test_no_pictures_are_refused_before_anything_is_made(tmp_path):
    """What is no picture, has no key, or goes with files alone is refused in a whole sentence, and nothing is made."""
    closed = Image.open(SAMPLES / "nature" / "sea.jpg")
    closed.close()
    two = {"a": NOISE, "b": NOISE}
    refused = [
        (([NOISE],), {}, "have no keys"),
        (([NOISE],), {"keys": ["a", "b"]}, "1 picture and 2 keys are given"),
        (([NOISE, NOISE],), {"keys": ["a", "a"]}, "two pictures would both have the key 'a'"),
        ((two,), {"keys": ["a", "b"]}, "keys are given twice"),
        (({},), {}, "the list of pictures is empty"),
        ((str(SAMPLES),), {"keys": ["a"]}, "keys need pictures in memory"),
        ((["x.png", NOISE],), {"keys": ["a", "b"]}, "'x.png' stands beside pictures"),
        (({"a": "x.png"},), {}, "is not a picture, and only pictures are given keys"),
        (({"a": NOISE.astype(float)},), {}, "picture 'a': an array .* of float64 is not a picture; pixels of floats"),
        (({"a": torch.zeros(5, 9, 9, dtype=torch.uint8)},), {}, r"picture 'a': an array \(5, 9, 9\) of uint8 is not"),
        (({"a": closed},), {}, "picture 'a': it is closed"),
        ((two,), {"engine": "ray"}, "--engine ray cannot be used with pictures in memory"),
        ((two,), {"device": "cpu,cpu"}, "'cpu,cpu' cannot be used with pictures in memory"),
        ((two,), {"files_from": "list"}, "--files-from cannot be used with pictures in memory"),
        ((two,), {"root": "."}, "--root cannot be used with pictures in memory"),
        ((two,), {"follow_links": True}, "--follow-links cannot be used with pictures in memory"),
        ((two,), {"decode": "scaled"}, "--decode scaled cannot be used with pictures in memory"),
        *((([NOISE],), {"keys": [key]}, "^key ") for key in (3, b"x", "", "a\nb", "a/", "../a", "a//b", "\ud800")),
    ]
    for pictures, given, why in refused:
        with pytest.raises(UsageError, match=why) as raised:
            featcli.extract(*pictures, **given, **OPTIONS, output=tmp_path / "d")
        assert raised.value.hint
    assert not (tmp_path / "d").exists()


def test_what_needs_files_says_that_there_are_none(tmp_path, cli):
    """`show`, `picture_path` and `verify` say that the pictures were in memory; files do not take their place."""
    folder = saved({"a.png": NOISE[..., :3], "b.png": NOISE[..., 1:]}, tmp_path / "files")
    options = {**OPTIONS, "pool": "none"}
    dump = featcli.extract({"a.png": NOISE[..., :3], "b.png": NOISE[..., 1:]}, output=tmp_path / "d", **options).dump
    shown = cli("show", dump, "-o", tmp_path / "sheet.png", "--root", folder)
    assert shown.code == 0
    assert "2 pictures of this dump not shown: extracted from the memory of a Python program, in no file" in shown.err
    with pytest.raises(UsageError, match=r"'a.png': extracted from the memory of a Python program, in no file"):
        featcli.open_dump(dump).picture_path("a.png", root=folder)
    assert cli("verify", dump).code == 0
    for option in (("--recompute", 1), ("--inputs",)):
        refused = cli("verify", dump, folder, *option)
        assert refused.code == 5
        assert "its pictures were in the memory of a Python program, in no file" in refused.err
    with pytest.raises(ConflictError, match="its pictures were in memory, and now they are files"):
        featcli.extract(folder, output=dump, **options)
    of_files = featcli.extract(folder, output=tmp_path / "f", **options).dump
    with pytest.raises(ConflictError, match="its pictures were files, and now they are in memory"):
        featcli.extract({"a.png": NOISE[..., :3], "b.png": NOISE[..., 1:]}, output=of_files, **options)


def test_a_list_of_paths_is_like_a_file_that_lists_them(tmp_path):
    """`files_from` takes paths themselves, in any order and repeated, and gives the dump of a list file."""
    names = ["things/flower.png", "nature/sea.jpg", "nature/../nature/sea.jpg", "gone.jpg"]
    (tmp_path / "list").write_text("\n".join(names))
    notes = []

    def report(kind, **facts):
        notes.extend([facts["reason"]] if facts.get("name") == "images" else [])

    options = {**OPTIONS, "root": SAMPLES, "report": report}
    dumps = [
        featcli.extract(files_from=given, output=tmp_path / str(number), **options).dump
        for number, given in enumerate([tmp_path / "list", names, (Path(name) for name in names)])
    ]
    assert content(dumps[0]) == content(dumps[1]) == content(dumps[2])
    assert notes == ["1 name listed again; 1 file not there"] * 3
    for given, why in [
        ([], "no images in the list"),
        (["../x"], "outside"),
        ([""], "a listed image is empty"),
        ([7], "'7' is neither a path nor a URL"),
        (7, "is neither a file nor a list"),
    ]:
        with pytest.raises(UsageError, match=why):
            featcli.extract(files_from=given, output=tmp_path / "d", **options)
    with pytest.raises(UsageError, match="-0 needs a list in a file"):
        featcli.extract(files_from=names, null=True, output=tmp_path / "d", **options)


RANDOM = {"checkpoint": "test_resnet", "random_init": True}
RUN = {"threads": 1, "batch_size": 2, "shard_size": 2}
LOADED = {
    "of stages": {"seed": 3, "out_features": "stage2,embedding", "image_size": 48, "alpha": "white", "mean": 0.4},
    "as it is run": {"precision": "bf16", "layout": "channels-last", "fold": True, "fit": "pad", "num_channels": 1},
    "of a transformer": {"checkpoint": "test_vit", "norm": "model", "image_size": (64, 96), "out_indices": (1, 2)},
}
PHOTOS = {"a": NOISE, "b": NOISE[::-1].copy(), "c": NOISE[:, ::-1].copy()}


def told(notes):
    """Return a report that notes what becomes of a loaded backbone."""

    def report(kind, **facts):
        notes.extend([(facts["value"], facts["reason"])] if facts.get("name") == "backbone" else [])

    return report


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_backbone_makes_the_dump_of_its_name(tmp_path, monkeypatch, name):
    """A loaded backbone is taken as it is, reads no weights again, and gives the dump of its name and options."""
    options = RANDOM | LOADED[name]
    featcli.extract(PHOTOS, output=tmp_path / "name", **options, **RUN)
    backbone = copy.deepcopy(featcli.load_backbone(**options))
    notes = []
    with monkeypatch.context() as without:
        without.setattr("featcli.run.loading.assemble_backbone", None)
        featcli.extract(PHOTOS, checkpoint=backbone, output=tmp_path / "loaded", report=told(notes), **RUN)
    assert notes == [("the loaded one", "its weights are not read again in this process")]
    assert content(tmp_path / "loaded") == content(tmp_path / "name")


def test_a_dump_goes_on_with_a_loaded_backbone(tmp_path):
    """A dump that was begun by a name is resumed with a loaded backbone, and the reverse, also by the dump's own."""
    backbone = featcli.load_backbone(**RANDOM, image_size=32)
    ways = [{"checkpoint": backbone}, {**RANDOM, "image_size": 32}]
    for number, (first, then) in enumerate([ways, ways[::-1]]):
        dump = tmp_path / str(number)
        with pytest.raises(StoppedError):
            featcli.extract(PHOTOS, output=dump, report=stopped_at("shard"), **first, **RUN)
        featcli.extract(PHOTOS, output=dump, **then, **RUN)
    assert content(tmp_path / "0") == content(tmp_path / "1")
    its_own = featcli.open_dump(tmp_path / "0").load_backbone()
    featcli.extract(PHOTOS, checkpoint=its_own, output=tmp_path / "own", **RUN)
    assert content(tmp_path / "own") == content(tmp_path / "0")


def test_what_another_backbone_is_loaded_for(tmp_path):
    """Options of the call go before those of the backbone, also with their defaults; it is loaded anew if it has to."""
    options = RANDOM | {"image_size": 32, "alpha": "white"}
    backbone = featcli.load_backbone(**options)
    for number, (given, why) in enumerate(
        [
            ({"precision": "bf16"}, "this run computes in bf16, channels-first, and it in fp32, channels-first"),
            ({"out_indices": [1]}, "this run takes stage1, and it gives stage4"),
            (
                {"image_size": 48},
                "this run builds the network otherwise: for another norm or input size, or --fit native",
            ),
            ({"alpha": "drop", "mean": 0.5}, "its weights are not read again in this process"),
        ]
    ):
        notes, call = [], RUN | given
        loaded = featcli.extract(
            PHOTOS, checkpoint=backbone, output=tmp_path / f"a{number}", report=told(notes), **call
        )
        named = featcli.extract(PHOTOS, output=tmp_path / f"b{number}", **options | call)
        assert notes == [("the loaded one" if "alpha" in given else "loaded anew", why)]
        assert content(loaded.dump) == content(named.dump)


def test_a_loaded_backbone_keeps_its_weights(tmp_path):
    """Options that ask for another checkpoint than that of the backbone are refused; the same ones are not."""
    backbone = featcli.load_backbone(**RANDOM, seed=3, image_size=32)
    call = {"checkpoint": backbone, "output": tmp_path / "d", **RUN}
    for given in ({"seed": 4}, {"random_init": False}, {"num_channels": 1}, {"model_arg": ["act_layer=relu"]}):
        with pytest.raises(UsageError, match="contradicts the loaded backbone"):
            featcli.extract(PHOTOS, **call, **given)
    assert not (tmp_path / "d").exists()
    assert featcli.extract(PHOTOS, **call, seed=3, random_init=True).written == 3
