"""Check that each file in a folder of pictures is read or named with its reason, and changes no other row.

Every file here is built by the test. The rows of the good pictures are compared, bit for bit, with those of a run
without the others.
"""

import io
import os
import re
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import featcli
from conftest import Featcli, draw
from featcli import open_dump
from featcli.inputs.image_list import Image as Input
from featcli.pixels import formats
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import UnreadableError
from featcli.spec.groups import PixelSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "threads": 1, "out_features": "stem"}
NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def saved(format_name, picture=None, **options):
    """Return the bytes of a picture in a format."""
    out = io.BytesIO()
    (picture or Image.fromarray(NOISE)).save(out, format_name, **options)
    return out.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *more):
    """Return a PNG that declares a size and holds no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IEND", b"")


def text_bomb():
    """Return a PNG with two megabytes of packed text before its pixels."""
    whole = saved("PNG")
    packed = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 2_000_000))
    return whole[:33] + packed + whole[33:]


def noisy_tiff():
    """Return a TIFF about which libtiff complains on the terminal: "Using code not yet in table"."""
    whole = saved("TIFF", compression="tiff_lzw")
    return whole[:50] + b"\xff" * 9 + whole[59:]


def grey(values, mode=None):
    return Image.fromarray(values, mode) if mode else Image.fromarray(values)


def palette_with_transparency():
    picture = Image.fromarray(NOISE).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    return saved("PNG", picture, transparency=bytes(range(16)))


def frames(format_name, **options):
    pictures = [Image.fromarray(np.roll(NOISE, i, 0)) for i in range(3)]
    return saved(format_name, pictures[0], save_all=True, append_images=pictures[1:], **options)


def huge_exif():
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return saved("JPEG", exif=exif)


DEEP = np.linspace(0, 65535, 2000).reshape(40, 50)
FAILING = {  # reason -> name -> content
    "truncated": {
        "cut.jpg": saved("JPEG")[:-400],
        "cut.png": saved("PNG")[:-900],
        "cut.bmp": saved("BMP")[:-900],
        "header.jpg": saved("JPEG")[:300],
    },
    "empty": {"empty.jpg": b""},
    "not_an_image": {
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "text.png": b"just some text\n" * 10,
        "random.jpg": np.random.default_rng(1).bytes(3000),
    },
    "format_not_allowed": {
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "paper.png": b"%PDF-1.7\n1 0 obj\n",
        "drawing.xml.jpg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'></svg>",
        "drawing.jpg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    },
    "too_many_pixels": {"bomb.png": png(60_000, 60_000), "large.png": png(12_000, 12_000)},
    "unsupported_depth": {
        "floats.tif": saved("TIFF", grey(DEEP.astype(np.float32) / 65535)),
        "floats.pfm.ppm": saved("PPM", grey(DEEP.astype(np.float32) / 65535)),
        "integers.tif": saved("TIFF", grey(DEEP.astype(np.int32) * 1000)),
    },
    "decode_error": {
        "head.png": saved("PNG")[:29] + b"????" + saved("PNG")[33:],  # the checksum of its header is wrong
        "noisy.tif": noisy_tiff(),
        "cut.tif": saved("TIFF", compression="tiff_lzw")[:-900],  # its header is at the end
        "cut.webp": saved("WEBP")[:-300],
    },
}
READ = {  # name -> content
    "png_named.jpg": saved("PNG"),
    "cmyk.jpg": saved("JPEG", Image.fromarray(NOISE).convert("CMYK")),
    "ycck.tif": saved("TIFF", Image.fromarray(NOISE).convert("YCbCr")),
    "deep.png": saved("PNG", grey(DEEP.astype(np.uint16))),
    "deep.tif": saved("TIFF", grey(DEEP.astype(np.uint16))),
    "deep.pgm": saved("PPM", grey(DEEP.astype(np.uint16))),
    "bits.png": saved("PNG", Image.fromarray(NOISE).convert("1")),
    "grey.jpg": saved("JPEG", Image.fromarray(NOISE).convert("L")),
    "grey_alpha.png": saved("PNG", Image.fromarray(NOISE).convert("LA")),
    "alpha.webp": saved("WEBP", Image.fromarray(NOISE).convert("RGBA"), lossless=True),
    "palette.png": palette_with_transparency(),
    "palette.gif": saved("GIF"),
    "frames.gif": frames("GIF"),
    "frames.png": frames("PNG"),
    "frames.webp": frames("WEBP", lossless=True),
    "pages.tif": frames("TIFF"),
    "progressive.jpg": saved("JPEG", progressive=True),
    "exif.jpg": huge_exif(),
    "profile.png": saved("PNG", icc_profile=b"no profile at all"),
    "one_pixel.png": saved("PNG", Image.new("RGB", (1, 1), "red")),
    "wide.png": saved("PNG", Image.new("RGB", (20_000, 1), "red")),
    "high.png": saved("PNG", Image.new("RGB", (1, 20_000), "blue")),
    "text_bomb.png": text_bomb(),
    "crc.png": saved("PNG")[:-1] + b"?",  # the checksum of IEND, on which no pixel depends
    "photo.avif": saved("AVIF"),
    "scan.jp2": saved("JPEG2000"),
    "icon.ico": saved("ICO"),
    "old.tga": saved("TGA"),
}
SEVERAL_FRAMES = {"frames.gif", "frames.png", "frames.webp", "pages.tif"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return (the folder, the dump of good pictures alone, the dump of everything, what the run said)."""
    folder = tmp_path_factory.mktemp("hostile")
    for i in range(9):
        draw(folder / "photos" / f"good{i}.png", i)
    featcli.extract(folder / "photos", output=folder / "alone", **OPTIONS)
    for name, content in [*READ.items(), *(item for files in FAILING.values() for item in files.items())]:
        (folder / "photos" / name).write_bytes(content)
    os.mkfifo(folder / "photos" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "photos" / "socket.png"))
    (folder / "photos" / "dangling.jpg").symlink_to("nowhere")
    (folder / "photos" / "loop.jpg").symlink_to("loop.jpg")
    (folder / "photos" / "zero.jpg").symlink_to("/dev/zero")
    (folder / "photos" / "folder.jpg").mkdir()
    os.link(folder / "photos" / "good0.png", folder / "photos" / "twin.png")
    with (folder / "photos" / "endless.bmp").open("wb") as file:
        file.truncate(3 * 1024**3)  # sparse
    given = ["-c", "test_resnet", "--random-init", "--batch-size", 4, "--threads", 1, "--out-features", "stem"]
    with Featcli("extract", folder / "photos", *given, "-o", folder / "all", "-v") as process:
        out, err = process.communicate()
    return folder / "photos", open_dump(folder / "alone"), open_dump(folder / "all"), (process.returncode, out, err)


def test_the_run(runs):
    """One run over all files ends with exit code 3, no traceback, nothing on stdout, and every image accounted for."""
    _, alone, everything, (code, out, err) = runs
    assert (code, out) == (3, "")
    assert "Traceback" not in err
    assert not [
        line for line in err.splitlines() if line.startswith(("tempfile.tif", "TIFF", "LZW", "JPEG"))
    ]  # as libtiff would
    assert everything.valid.sum() + len(everything.failures) == len(everything)
    assert everything.valid.sum() == len(alone) + len(READ) + 1
    several = f"{len(SEVERAL_FRAMES)} of {everything.valid.sum()} pictures have several frames or pages"
    assert f"{several}: only the first is read" in err


def test_neighbours(runs):
    """The rows of the good pictures are the same as without the others."""
    _, alone, everything, _ = runs
    for key in alone.keys:
        assert np.array_equal(everything["stem"][key], alone["stem"][key]), key
    assert np.array_equal(everything["stem"]["twin.png"], everything["stem"]["good0.png"])


SYSTEM = {
    "pipe.jpg": "not_regular", "socket.png": "not_regular", "zero.jpg": "not_regular", "dangling.jpg": "not_found",
    "loop.jpg": "unreadable", "endless.bmp": "too_large",
}  # fmt: skip
REASONS = {name: reason for reason, files in FAILING.items() for name in files} | SYSTEM


@pytest.mark.parametrize("name", REASONS)
def test_failing_files(runs, name):
    """Each file that cannot be read is a failure with its reason, an explanation, and a row of NaN."""
    _, _, everything, (_, _, err) = runs
    (failure,) = [failure for failure in everything.failures if failure["key"] == name]
    assert failure["reason"] == REASONS[name], failure
    assert failure["detail"]
    assert "\n" not in failure["detail"]
    assert f"failed '{name}': {REASONS[name]} ({failure['detail']})" in err
    assert np.isnan(everything["stem"][name]).all()


@pytest.mark.parametrize("name", READ)
def test_odd_files(runs, name):
    """Each odd but whole file is read and gives finite values."""
    photos, _, everything, _ = runs
    assert everything.valid[everything.rows[name]]
    assert np.isfinite(everything["stem"][name]).all()
    assert (photos / name).stat().st_size == len(READ[name])


def test_equal_pictures(runs):
    """Suffix, container, further frames and damaged extras change no pixel."""
    maps = runs[2]["stem"]
    for one, *others in (
        ["png_named.jpg", "profile.png", "crc.png", "old.tga", "frames.png", "pages.tif"],
        ["deep.png", "deep.tif", "deep.pgm"],
        ["palette.gif", "frames.gif"],
    ):
        for other in others:
            assert np.array_equal(maps[one], maps[other]), (one, other)


def test_transparency(tmp_path):
    """Hidden colours or a background appear, as was asked for, in every way in which formats have transparency."""
    half = np.dstack([NOISE, np.where(np.arange(50) < 25, 0, 255)[None].repeat(40, 0)]).astype(np.uint8)
    draw(tmp_path / "p" / "a.png", 0)
    Image.fromarray(half).save(tmp_path / "p" / "rgba.png")
    grey_alpha = Image.fromarray(half).convert("LA")
    grey_alpha.save(tmp_path / "p" / "la.png")
    (tmp_path / "p" / "p.png").write_bytes(palette_with_transparency())
    flat = Image.new("RGB", (50, 40), (10, 20, 30))
    flat.paste((90, 80, 70), (0, 0, 25, 40))
    flat.save(tmp_path / "p" / "rgb.png", transparency=(10, 20, 30))
    Image.fromarray(NOISE).save(tmp_path / "p" / "plain.png")
    rows = {}
    for alpha in ("drop", "white", "black"):
        featcli.extract(tmp_path / "p", output=tmp_path / alpha, alpha=alpha, **OPTIONS)
        rows[alpha] = open_dump(tmp_path / alpha)["stem"]
    assert np.array_equal(rows["drop"]["rgba.png"], rows["drop"]["plain.png"])
    for name in ("rgba.png", "la.png", "p.png", "rgb.png"):
        found = [rows[alpha][name] for alpha in rows]
        assert not np.array_equal(found[0], found[1]), name
        assert not np.array_equal(found[1], found[2]), name
    assert np.array_equal(rows["white"]["plain.png"], rows["drop"]["plain.png"])
    on_white = Image.new("RGB", (50, 40), "white")
    on_white.paste(Image.fromarray(half), mask=Image.fromarray(half).getchannel("A"))
    on_white.save(tmp_path / "p" / "a.png")
    featcli.extract(tmp_path / "p", output=tmp_path / "again", **OPTIONS)
    assert np.array_equal(open_dump(tmp_path / "again")["stem"]["a.png"], rows["white"]["rgba.png"])


def test_depth_range(tmp_path, cli):
    """With a range, one scene in 8, 12 and 32 bits and as floats gives equal rows; without one, floats fail."""
    values = np.random.default_rng(0).integers(0, 256, (40, 50))
    (tmp_path / "p").mkdir()
    grey((values * 16).astype(np.uint16)).save(tmp_path / "p" / "twelve.png")
    grey((values * 16).astype(np.int32)).save(tmp_path / "p" / "integers.tif")
    grey((values * 16).astype(np.float32)).save(tmp_path / "p" / "floats.tif")
    grey(values.astype(np.uint8)).save(tmp_path / "p" / "eight.png")
    grey(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "p" / "nan.tif")
    given = ("extract", tmp_path / "p", "-c", "test_resnet", "--random-init", "--out-features", "stem")
    assert cli(*given, "-o", tmp_path / "d", "--depth-range", f"0:{255 * 16}").code == 3
    maps = open_dump(tmp_path / "d")["stem"]
    for name in ("twelve.png", "integers.tif", "floats.tif"):
        assert np.array_equal(maps[name], maps["eight.png"]), name
    refused = cli(*given, "-o", tmp_path / "e")
    assert (refused.code, refused.err.count("unsupported_depth (TIFF of ")) == (3, 3)
    assert "--depth-range" in refused.err
    for odd in ("5", "9:1", "a:b", "1:1", "nan:inf", "0:1e99"):
        assert cli(*given, "-o", tmp_path / "f", "--depth-range", odd).code == 2, odd


@pytest.mark.parametrize("format_name", ["HEIF", "JXL"])
def test_formats_of_plugins(tmp_path, format_name, monkeypatch):
    """HEIC and JPEG XL are read if a plugin is installed; else the failure says which one to install."""
    draw(tmp_path / "p" / "a.png", 0)
    if format_name not in formats.readable_formats():
        pytest.skip(f"no plugin for {format_name}")
    (tmp_path / "p" / "x.jpg").write_bytes(saved(format_name))
    featcli.extract(tmp_path / "p", output=tmp_path / "d", **OPTIONS)
    assert open_dump(tmp_path / "d").valid.all()
    monkeypatch.setattr(formats, "readable_formats", lambda: formats.FORMATS)
    featcli.extract(tmp_path / "p", output=tmp_path / "e", **OPTIONS)
    (failure,) = open_dump(tmp_path / "e").failures
    assert failure["reason"] == "format_not_allowed"
    assert (
        failure["detail"] == f"{format_name}: {formats.PLUGINS[format_name][1].install}, or convert it to JPEG or PNG"
    )


@pytest.mark.parametrize("orientation", ["apply", "ignore"])
def test_orientations(tmp_path, orientation):
    """However a picture was held, its row is that of the upright one, or of the pixels as they lie if asked for."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # undoes each orientation, as Image.Transpose
    upright = Image.fromarray(NOISE)
    (tmp_path / "p").mkdir()
    upright.save(tmp_path / "p" / "1.png")
    for number, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = number
        lying = upright.transpose(Image.Transpose(turn))
        lying.save(tmp_path / "p" / f"{number}.png", exif=exif)
        lying.save(tmp_path / "p" / f"{number}.webp", exif=exif, lossless=True)
        lying.save(tmp_path / "p" / f"{number}plain.png")
    featcli.extract(tmp_path / "p", output=tmp_path / "d", orientation=orientation, **OPTIONS)
    maps = open_dump(tmp_path / "d")["stem"]
    for number in turns:
        expected = maps["1.png"] if orientation == "apply" else maps[f"{number}plain.png"]
        assert np.array_equal(maps[f"{number}.png"], expected), number
        assert np.array_equal(maps[f"{number}.webp"], expected), number


def test_what_changes_no_row(tmp_path):
    """Order, names, shards, threads, neighbours in a batch and lossless containers change no bit of a row."""
    for i in range(11):
        draw(tmp_path / "p" / f"{i:02d}.png", i, (90 + i, 80))
        for suffix in ("webp", "tif", "bmp"):
            with Image.open(tmp_path / "p" / f"{i:02d}.png") as picture:
                (tmp_path / suffix).mkdir(exist_ok=True)
                options = {"lossless": True} if suffix == "webp" else {}
                picture.save(tmp_path / suffix / f"{i:02d}.{suffix}", **options)
        name = f"{(i * 7) % 11:02d} renamed.png"
        (tmp_path / "shuffled").mkdir(exist_ok=True)
        os.link(tmp_path / "p" / f"{i:02d}.png", tmp_path / "shuffled" / name)
    whole = {**OPTIONS, "out_features": "all"}
    featcli.extract(tmp_path / "p", output=tmp_path / "d", **whole)
    reference = open_dump(tmp_path / "d")
    for number, (folder, options) in enumerate(
        [
            ("p", {"shard_size": 4}),
            ("p", {"decode_threads": 5}),
            ("p", {"batch_size": 3}),
            ("p", {"batch_size": 11}),
            ("webp", {}),
            ("tif", {}),
            ("bmp", {"shard_size": 8, "decode_threads": 1}),
            ("shuffled", {"shard_size": 4}),
        ]
    ):
        featcli.extract(tmp_path / folder, output=tmp_path / str(number), **{**whole, **options})
        found = open_dump(tmp_path / str(number))
        for i in range(11):
            key = f"{(i * 7) % 11:02d} renamed.png" if folder == "shuffled" else found.keys[i]
            for stage in reference.stages:
                same = np.array_equal(found[stage][key], reference[stage][f"{i:02d}.png"])
                assert same, (folder, options, stage, key)


def test_pictures_that_go_or_change_under_the_run(tmp_path, monkeypatch):
    """A picture that is gone, longer or being written when it is read fails, and no other does."""
    from featcli.pixels import image_file

    for i in range(8):
        draw(tmp_path / "p" / f"{i}.png", i)
    featcli.extract(tmp_path / "p", output=tmp_path / "whole", **OPTIONS)
    real = Image.open

    def meddling(file, **options):
        if file.name.endswith("1.png"):
            (tmp_path / "p" / "5.png").unlink()
            (tmp_path / "p" / "6.png").write_bytes((tmp_path / "p" / "6.png").read_bytes() + b"more")
        return real(file, **options)

    monkeypatch.setattr(Image, "open", meddling)
    monkeypatch.setattr(image_file.os, "fstat", _moving(os.fstat, tmp_path / "p" / "3.png"))
    assert featcli.extract(tmp_path / "p", output=tmp_path / "d", decode_threads=1, **OPTIONS).failed == 3
    dump, whole = open_dump(tmp_path / "d"), open_dump(tmp_path / "whole")
    assert {f["key"]: f["reason"] for f in dump.failures} == {
        "3.png": "changed", "5.png": "not_found", "6.png": "changed"
    }  # fmt: skip
    for key in ("0.png", "1.png", "2.png", "4.png", "7.png"):
        assert np.array_equal(dump["stem"][key], whole["stem"][key])


def _moving(real, path):
    """Return an `fstat` at whose calls one file is written to."""
    asked = iter(range(1, 10))

    def fstat(descriptor):
        found = real(descriptor)
        if os.path.samestat(found, os.stat(path)):
            os.utime(path, (next(asked), next(asked)))
        return found

    return fstat


def test_large_jpegs_decoded_smaller(tmp_path):
    """With --decode scaled large JPEGs are unpacked smaller, to nearly the same pixels, and all others are exact."""
    rows = {}
    large = Image.fromarray(NOISE).resize((1600, 1200), Image.Resampling.BICUBIC)
    (tmp_path / "p").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "p" / "large.jpg", quality=95)
    large.save(tmp_path / "p" / "turned.jpg", quality=95, exif=exif)
    large.convert("L").save(tmp_path / "p" / "grey.jpg", quality=95)
    large.convert("CMYK").save(tmp_path / "p" / "cmyk.jpg", quality=95)
    large.save(tmp_path / "p" / "large.png")
    draw(tmp_path / "p" / "small.jpg", 0, (300, 310))
    for decode in ("exact", "scaled"):
        featcli.extract(tmp_path / "p", output=tmp_path / decode, decode=decode, **OPTIONS)
        rows[decode] = open_dump(tmp_path / decode)["stem"]
    for key in ("large.png", "small.jpg"):
        assert np.array_equal(rows["exact"][key], rows["scaled"][key]), key
    for key in ("large.jpg", "turned.jpg", "grey.jpg", "cmyk.jpg"):
        one, other = rows["exact"][key].ravel(), rows["scaled"][key].ravel()
        assert not np.array_equal(one, other), key
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.999, key


def test_a_damaged_picture_of_a_plugin(tmp_path, cli):
    """A HEIC file that was cut short is damaged, and not of a format to install; its details are one line."""
    plugin = pytest.importorskip("pillow_heif")
    plugin.register_heif_opener()
    Image.new("RGB", (600, 400), "red").save(tmp_path / "whole.heic")
    content = (tmp_path / "whole.heic").read_bytes()
    (tmp_path / "p").mkdir()
    for part in (60, len(content) // 2, len(content) - 40):
        (tmp_path / "p" / f"{part}.heic").write_bytes(content[:part])
    draw(tmp_path / "p" / "good.png", 1)
    run = cli("extract", tmp_path / "p", "-o", tmp_path / "d", "-c", "test_resnet", "--random-init", "-q")
    assert run.code == 3
    failures = open_dump(tmp_path / "d").failures
    assert len(failures) == 3
    assert {failure["reason"] for failure in failures} <= {"decode_error", "truncated"}
    assert not [failure for failure in failures if "\n" in failure["detail"] or "pip install" in failure["detail"]]


SAID_BY_LIBRARIES = re.compile("Error|libjxl|stream|decoder|not processed|stderr")


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "JXL", "HEIF", "ICO", "TGA"]
)
def test_damage_is_said_in_plain_words(tmp_path, kind):
    """Damage by cutting or overwriting is described in featcli's words if the library has none."""
    if kind not in formats.readable_formats():
        pytest.skip("its plugin is not installed")
    content = saved(kind)
    half, details = len(content) // 2, []
    for damaged in (content[:half], content[:half] + bytes(len(content) - half), content[: len(content) * 9 // 10]):
        (tmp_path / "x").write_bytes(damaged)
        image, pixels = Input("x", str(tmp_path / "x"), len(damaged)), np.empty((3, 8, 8), np.uint8)
        try:
            read_pixels(image, PixelSpec(), lambda _: np.zeros((3, 8, 8), np.uint8), pixels)
        except UnreadableError as error:
            details.append(error.detail)
    assert details, "what has no checksum may be read once it is overwritten, but not when it is cut"
    assert [detail for detail in details if SAID_BY_LIBRARIES.search(detail)] == []
    assert [detail for detail in details if not re.search("damaged|end", detail)] == []
