"""Check that colour profiles are converted rightly, and that runs count what defaults decide about pictures."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

import featcli
from featcli.inputs.image_list import MISSING
from featcli.inputs.image_list import Image as Input
from featcli.pixels.colour import settings_of, upright_rgb
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import UnreadableError
from featcli.pixels.profiles import is_srgb
from featcli.pixels.traits import lines
from featcli.spec.groups import PixelSpec

H, W = 30, 40
CONVERT = PixelSpec(colour="convert")
NOISE = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
D50 = (0.9642, 1.0, 0.8249)
# The primaries of Display P3 and of sRGB in XYZ, adapted to D50: red, green and blue.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
GAMMA = 1.5


def profile(kind, space, pcs, tags, description="of a test"):
    """Return the bytes of an ICC profile of version 2."""
    name = description.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(D50),
        **tags,
    }
    table, body, first = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", first + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = first + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, kind, space, pcs, b"acsp")
    head += b"".join(fixed(value) for value in D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def xyz(values):
    return b"XYZ \0\0\0\0" + b"".join(fixed(value) for value in values)


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries=P3, gamma=GAMMA, description="of a test"):
    tags = {name + b"XYZ": xyz(one) for name, one in zip((b"r", b"g", b"b"), primaries, strict=True)}
    tags |= {name + b"TRC": curve(gamma) for name in (b"r", b"g", b"b")}
    return profile(b"mntr", b"RGB ", b"XYZ ", tags, description)


def grey_profile(gamma=GAMMA):
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve(gamma)})


def cmyk_profile():
    """Return a profile of inks in which only black counts: L falls from 100 to 0 with it."""
    straight = bytes(range(256))
    corners = b"".join(bytes([0 if k else 255, 128, 128]) for _ in range(8) for k in (0, 1))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(fixed(one) for one in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut + straight * 4 + corners + straight * 3})


def lab_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def in_srgb(values, primaries=P3, gamma=GAMMA):
    """Return what a display with these primaries shows, as 8 bits of sRGB, by the formulas of the standards."""
    linear = (values / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path, content, rules=PixelSpec(), size=(H, W)):  # noqa: B008
    """Return the (H, W, 3) pixels of a file, and its traits."""
    (tmp_path / "x").write_bytes(content)
    out = np.empty((3, *size), np.uint8)
    traits = read_pixels(
        Input("x", str(tmp_path / "x"), MISSING), rules, lambda picture: np.asarray(picture).transpose(2, 0, 1), out
    )
    return out.transpose(1, 2, 0).astype(int), {*traits}


def assert_near(pixels, expected, levels=2):
    assert np.abs(pixels - expected).max() <= levels


def test_plans_of_before_keep_their_fingerprint():
    """A plan with the default says nothing about profiles, so plans of older versions keep their fingerprint."""
    assert "colour" not in settings_of(PixelSpec())
    assert settings_of(CONVERT)["colour"] == "convert"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "PPM"])
def test_colours_are_converted(tmp_path, kind):
    """--colour convert turns a picture of another profile into what its display shows, in sRGB; else it stays."""
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    content = encoded(PICTURE, kind, icc_profile=rgb_profile(), **options)
    plain, traits = read(tmp_path, content)
    assert np.array_equal(plain, read(tmp_path, encoded(PICTURE, kind, **options))[0])
    assert traits == (set() if kind == "PPM" else {"profile"})  # PPM holds no profiles
    converted, _ = read(tmp_path, content, CONVERT)
    assert_near(converted, plain if kind == "PPM" else in_srgb(plain))


def test_greys_palettes_and_transparency(tmp_path):
    """Greys with a profile of greys or colours, palettes, and backgrounds behind transparency are converted, too."""
    grey = PICTURE.convert("L")
    expected = np.asarray(grey)[..., None].repeat(3, 2)
    by_grey = read(tmp_path, encoded(grey, icc_profile=grey_profile()), CONVERT)
    assert_near(by_grey[0], in_srgb(expected, SRGB))
    assert_near(read(tmp_path, encoded(grey, icc_profile=rgb_profile()), CONVERT)[0], in_srgb(expected))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(read(tmp_path, encoded(deep, icc_profile=grey_profile()), CONVERT)[0], by_grey[0])
    palette = PICTURE.quantize(16)
    assert_near(
        read(tmp_path, encoded(palette, icc_profile=rgb_profile()), CONVERT)[0],
        in_srgb(np.asarray(palette.convert("RGB"))),
    )
    half = PICTURE.convert("RGBA")
    half.putalpha(Image.fromarray(np.full((H, W), 51, np.uint8)))
    on_white = PixelSpec(colour="convert", alpha="white")
    pixels, traits = read(tmp_path, encoded(half, icc_profile=rgb_profile()), on_white)
    assert traits == {"profile", "transparent"}
    assert_near(pixels, in_srgb(NOISE) * 0.2 + 255 * 0.8)


def test_inks(tmp_path):
    """A CMYK JPEG, which is stored inverted, is converted by its profile: no ink is white, all black is black."""
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 8:16, 3], inks[:, 16:24, 0], inks[:, 24:, 1:3] = 255, 255, 255
    content = encoded(Image.fromarray(inks, "CMYK"), "JPEG", icc_profile=cmyk_profile(), quality=100)
    pixels, traits = read(tmp_path, content, CONVERT, (16, 32))
    assert_near(pixels, np.where(np.arange(32) // 8 == 1, 0, 255)[None, :, None])
    assert traits == {"profile"}
    assert read(tmp_path, content, size=(16, 32))[0][8, 20].tolist() == [0, 255, 255]  # Pillow's way: ink of cyan


def test_lab():
    """A picture in CIE Lab is converted by its profile, too."""
    lab = np.zeros((4, 3, 3), np.uint8)
    lab[:, :, 0] = (0, 128, 255)
    picture = Image.fromarray(lab, "LAB")
    picture.info["icc_profile"] = lab_profile()
    pixels = np.asarray(upright_rgb(picture, CONVERT)).astype(int)
    lightness = (np.array([0, 128, 255]) * 100 / 255 + 16) / 116
    luminance = np.where(lightness > 6 / 29, lightness**3, 3 * (6 / 29) ** 2 * (lightness - 4 / 29)).clip(0)
    assert_near(pixels, in_srgb(255 * luminance[None, :, None].repeat(4, 0).repeat(3, 2), SRGB, 1))


def test_srgb_moves_nothing(tmp_path):
    """A profile is known as sRGB by what it does: conversion keeps every bit, and nothing is counted."""
    named_otherwise = rgb_profile(SRGB, 2.2).replace(b"of a test", b"Adobe RGB")
    assert is_srgb(srgb_profile())
    assert not is_srgb(named_otherwise.replace(curve(2.2), curve(1.8)))
    pixels, traits = read(tmp_path, encoded(PICTURE, icc_profile=srgb_profile()), CONVERT)
    assert (np.array_equal(pixels, NOISE), traits) == (True, set())
    assert read(tmp_path, encoded(PICTURE, icc_profile=rgb_profile(description="sRGB IEC61966-2.1")))[1] == {"profile"}


def test_xyb(tmp_path):
    """An XYB JPEG is converted even if profiles are ignored, because its values are no colours by themselves."""
    content = encoded(PICTURE, "JPEG", quality=100, subsampling=0, icc_profile=rgb_profile(description="XYB_Per"))
    plain, _ = read(tmp_path, encoded(PICTURE, "JPEG", quality=100, subsampling=0))
    pixels, traits = read(tmp_path, content)
    assert traits == {"xyb"}
    assert_near(pixels, in_srgb(plain))


def test_tiff_that_another_library_reads(tmp_path):
    """The profile of a TIFF is used, too, if another library reads its pixels."""
    content = deep_tiff(NOISE.transpose(2, 0, 1).astype(np.uint16) * 257, iccprofile=rgb_profile())
    assert_near(read(tmp_path, content, CONVERT)[0], in_srgb(NOISE))


@pytest.mark.parametrize(
    ("mode", "broken"),
    [("RGB", b"no profile" * 20), ("RGB", cmyk_profile()), ("RGB", grey_profile()), ("CMYK", rgb_profile())],
)
def test_profiles_that_cannot_be_used(tmp_path, mode, broken):
    """A profile that is broken or of other colours fails with --colour convert; else it is ignored and not counted."""
    content = encoded(PICTURE.convert(mode), "JPEG", icc_profile=broken)
    plain = encoded(PICTURE.convert(mode), "JPEG")
    pixels, traits = read(tmp_path, content)
    assert (np.array_equal(pixels, read(tmp_path, plain)[0]), traits) == (True, set())
    with pytest.raises(UnreadableError, match=r"profile cannot be used \(.*\); --colour ignore") as failed:
        read(tmp_path, content, CONVERT)
    assert failed.value.reason == "decode_error"


def png_of(bits, kind, values, *chunks):
    """Return a PNG of (H, W, ...) values with so many bits, made by hand."""
    ones = (values.reshape(H, -1, 1) >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(ones.reshape(H, -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", W, H, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
        for name, content in ((b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b""))
    )


BROKEN = {
    "packed wrongly": lambda: png_of(8, 2, NOISE, (b"iCCP", b"x\0\0no zlib")),
    "checksum": lambda: encoded(PICTURE, icc_profile=rgb_profile()).replace(b"iCCPICC", b"iCCPICD"),
    "too large": lambda: encoded(PICTURE, icc_profile=rgb_profile() + bytes(1 << 25)),
    "a part is missing": lambda: encoded(PICTURE, "JPEG", icc_profile=rgb_profile()).replace(
        b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_profiles_that_cannot_be_read(tmp_path, name):
    """A profile that cannot be read is a failure with --colour convert, as a broken one is."""
    assert read(tmp_path, BROKEN[name]())[1] == set()
    with pytest.raises(UnreadableError, match="its colour profile cannot be used"):
        read(tmp_path, BROKEN[name](), CONVERT)


def test_profiles_that_are_no_bytes(tmp_path):
    """A TIFF with a number or a text in place of its profile is read, unless it has to be converted."""
    for kind, value in ((3, 7), (2, "abc")):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[34675], tags[34675] = kind, value
        content = encoded(PICTURE, "TIFF", tiffinfo=tags)
        pixels, traits = read(tmp_path, content)
        assert (np.array_equal(pixels, NOISE), traits) == (True, set())
        with pytest.raises(UnreadableError, match="its colour profile cannot be used"):
            read(tmp_path, content, CONVERT)


def deep_avif(bits):
    imagecodecs = pytest.importorskip("imagecodecs")
    return imagecodecs.avif_encode(NOISE.astype(np.uint16) << (bits - 8), bitspersample=bits)


def deep_jxl(bits):
    pytest.importorskip("pillow_jxl")
    imagecodecs = pytest.importorskip("imagecodecs")
    values = (NOISE.astype(np.uint16) << (bits - 8)).astype(np.uint8 if bits == 8 else np.uint16)
    return imagecodecs.jpegxl_encode(values, bitspersample=bits, lossless=True)


def with_alpha(least):
    picture = PICTURE.convert("RGBA")
    alpha = np.full((H, W), 255, np.uint8)
    alpha[3, 4] = least
    picture.putalpha(Image.fromarray(alpha))
    return picture


def deep_jpeg2000(bits):
    """Return a JPEG 2000 of RGB with so many bits a value."""
    imagecodecs = pytest.importorskip("imagecodecs")
    values = NOISE if bits == 8 else NOISE.astype(np.uint16) << (bits - 8)
    return imagecodecs.jpeg2k_encode(values, bitspersample=bits, reversible=True)


def deep_tiff(picture, **options):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    file = io.BytesIO()
    tifffile.imwrite(file, picture, planarconfig="separate", photometric="rgb", **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def bitmap(*masks):
    """Return a BMP of white 16-bit pixels, whose colours are at these bits."""
    head = struct.pack("<IiiHHIIiiII", 40, W, H, 1, 16, 3, 2 * W * H, 0, 0, 0, 0) + struct.pack("<III", *masks)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + 2 * W * H, 0, 0, 14 + len(head)) + head + b"\xff" * 2 * W * H


GREYS = (np.asarray(PICTURE.convert("L")).astype(np.uint16) + 1) * 200
TRAITS = {
    "plain": (lambda: encoded(PICTURE), set()),
    "opaque": (lambda: encoded(with_alpha(255)), set()),
    "alpha": (lambda: encoded(with_alpha(254)), {"transparent"}),
    "alpha webp": (lambda: encoded(with_alpha(0), "WEBP"), {"transparent"}),
    "grey alpha": (lambda: encoded(with_alpha(0).convert("LA")), {"transparent"}),
    "key": (lambda: encoded(PICTURE, transparency=tuple(NOISE[0, 0].tolist())), {"transparent"}),
    "key of none": (lambda: encoded(PICTURE.point(lambda value: value & 254), transparency=(1, 1, 1)), set()),
    "palette": (lambda: encoded(PICTURE.quantize(8), transparency=bytes([255] * 7 + [0])), {"transparent"}),
    "gif": (lambda: encoded(PICTURE.quantize(8), "GIF", transparency=3), {"transparent"}),
    "deep key": (
        lambda: encoded(Image.fromarray(GREYS), transparency=int(GREYS[0, 0])),
        {"deep", "transparent"},
    ),
    "deep grey": (lambda: encoded(Image.fromarray(GREYS)), {"deep"}),
    "bmp of 5, 6 and 5 bits": (lambda: bitmap(0xF800, 0x7E0, 0x1F), set()),
    "deep ppm": (lambda: b"P6 40 30 65535\n" + NOISE.astype(">u2").tobytes(), {"deep"}),
    "ppm": (lambda: b"P6 40 30 255\n" + NOISE.tobytes(), set()),
    "avif of 8": (lambda: encoded(PICTURE, "AVIF"), set()),
    "avif of 10": (lambda: deep_avif(10), {"deep"}),
    "avif of 12": (lambda: deep_avif(12), {"deep"}),
    "jxl of 8": (lambda: deep_jxl(8), set()),
    "jxl of 12": (lambda: deep_jxl(12), {"deep", "profile"}),  # of linear light
    "jpeg 2000": (lambda: encoded(PICTURE, "JPEG2000"), set()),
    "deep jpeg 2000": (lambda: encoded(Image.fromarray(GREYS), "JPEG2000"), {"deep"}),
    "deep jpeg 2000 in colour": (lambda: deep_jpeg2000(16), {"deep"}),
    "jpeg 2000 in colour": (lambda: deep_jpeg2000(8), set()),
    "planar tiff of 8": (lambda: deep_tiff(NOISE.transpose(2, 0, 1)), set()),
    "planar tiff of 16": (lambda: deep_tiff(NOISE.transpose(2, 0, 1).astype(np.uint16)), {"deep"}),
    "planar tiff that is turned": (
        lambda: deep_tiff(NOISE.transpose(2, 0, 1).astype(np.uint16), extratags=[(274, "H", 1, 3, False)]),
        {"deep", "turned"},
    ),
    "planar tiff with a profile": (
        lambda: deep_tiff(NOISE.transpose(2, 0, 1).astype(np.uint16), iccprofile=rgb_profile()),
        {"deep", "profile"},
    ),
    "turned": (lambda: encoded(PICTURE, "JPEG", exif=turned(3)), {"turned"}),
    "turned tiff": (lambda: encoded(PICTURE, "TIFF", exif=turned(3)), {"turned"}),
    "upright": (lambda: encoded(PICTURE, "JPEG", exif=turned(1)), set()),
    "frames": (
        lambda: encoded(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
        {"frames"},
    ),
}


@pytest.mark.parametrize("name", TRAITS)
def test_traits(tmp_path, name):
    """Each format shows the traits that defaults decide about: depth, and transparency only if a pixel has some."""
    make, expected = TRAITS[name]
    assert read(tmp_path, make())[1] == expected


def test_transparency_of_deep_greys(tmp_path):
    """The grey that a 16-bit picture calls transparent is put on the background, as in an 8-bit picture."""
    content = encoded(Image.fromarray(GREYS), transparency=int(GREYS[0, 0]))
    dropped, _ = read(tmp_path, content)
    on_white, _ = read(tmp_path, content, PixelSpec(alpha="white"))
    is_clear = np.equal(GREYS, GREYS[0, 0])
    assert (on_white[is_clear] == 255).all()
    assert np.array_equal(on_white[~is_clear], dropped[~is_clear])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparency_of_greys_of_few_bits(tmp_path, bits):
    """The grey that a PNG calls transparent is found among its pixels, however few bits they have."""
    values = (np.arange(H * W).reshape(H, W) * 7) % 2**bits
    content = png_of(bits, 0, values, (b"tRNS", struct.pack(">H", 1)))
    pixels, traits = read(tmp_path, content, PixelSpec(alpha="white"))
    assert np.array_equal(pixels[..., 0], np.where(values == 1, 255, values * 255 // (2**bits - 1)))
    assert traits == {"transparent"}


def test_transparency_of_deep_colours(tmp_path):
    """A PNG of 16-bit colours with a transparent one is refused if that shows, because 8 bits cannot tell it."""
    values = NOISE.astype(int) * 256 + 7
    content = png_of(16, 2, values, (b"tRNS", struct.pack(">HHH", *values[0, 0].tolist())))
    pixels, traits = read(tmp_path, content)
    assert (np.array_equal(pixels, NOISE), traits) == (True, {"deep", "transparent"})
    with pytest.raises(UnreadableError, match="one of them transparent") as failed:
        read(tmp_path, content, PixelSpec(alpha="white"))
    assert failed.value.reason == "unsupported_depth"


OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "pool": "avg", "batch_size": 2, "shard_size": 2}


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, name in enumerate(("alpha", "deep grey", "turned", "plain", "frames")):
        (folder / f"{number}.png").write_bytes(TRAITS[name][0]())
    (folder / "5.png").write_bytes(b"broken")
    (folder / "6.png").write_bytes(encoded(with_alpha(0), icc_profile=rgb_profile()))
    return folder


COUNTS = {"read": 6, "transparent": 2, "deep": 1, "turned": 1, "profile": 1, "xyb": 0, "frames": 1}


def test_a_run_says_what_defaults_decided(mixed, tmp_path, cli):
    """A run ends with counts of what defaults decided, each with its option; events and `inspect` have them, too."""
    run = cli("extract", mixed, "-c", "test_resnet", "--random-init", "--pool", "avg", "-o", tmp_path / "d", "--json")
    (end,) = [event for event in run.events if event["type"] == "end"]
    assert end["pictures"] == COUNTS
    warned = [event["text"] for event in run.events if event["type"] == "warning"]
    said = list(lines(COUNTS, 6, PixelSpec()))
    assert (
        said[0]
        == "2 of 6 pictures have transparency: it is dropped, so hidden colours show; --alpha white puts white there"
    )
    assert [text for text in warned if "pictures" in text] == said
    (facts,) = cli("inspect", tmp_path / "d", "--json").events
    assert (facts["pictures"], facts["said_of_pictures"]) == (COUNTS, said)
    shown = cli("inspect", tmp_path / "d").out
    assert all(text in shown for text in said)
    assert cli("show", tmp_path / "d", "-o", tmp_path / "page.html", "-q").code == 0
    assert all(text in (tmp_path / "page.html").read_text() for text in said)


def test_counts_add_up(mixed, tmp_path):
    """The counts of parts and of resumed runs add up to those of one run; records and manifest hold them."""
    whole = featcli.extract(mixed, output=tmp_path / "whole", **OPTIONS)
    for part in ("1/3", "0/3", "2/3"):
        last = featcli.extract(mixed, output=tmp_path / "parts", part=part, **OPTIONS)
    assert sum(last.pictures.values()) < sum(whole.pictures.values())
    assert featcli.extract(mixed, output=tmp_path / "parts", **OPTIONS).pictures == whole.pictures == COUNTS
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "parts" / "shards").glob("*.json"))]
    assert [shard["pictures"] for shard in manifest["shards"]] == [record["pictures"] for record in records]
    assert records[2]["pictures"] == {"read": 1, "frames": 1}


def test_the_words_follow_the_rules():
    """The lines say what the options did to pictures, and advise no option that is already used."""
    counts = {"transparent": 1, "turned": 2, "profile": 3, "deep": 4}
    rules = PixelSpec(alpha="black", orientation="ignore", colour="convert", depth_range="0:4095")
    assert list(lines(counts, 1200, rules)) == [
        "1 of 1,200 pictures has transparency: black is put behind it",
        "4 of 1,200 pictures have more than 8 bits a value: these are reduced to 8",
        "2 of 1,200 pictures have an EXIF orientation: it is ignored; --orientation apply turns them upright",
        "3 of 1,200 pictures have a colour profile that is not sRGB: it is converted to sRGB",
    ]
