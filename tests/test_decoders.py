"""Check every kind of picture in TIFF and JPEG 2000: it equals the array that made it, or is refused by name."""

import io
import itertools
import struct
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

import featcli
from conftest import REPOSITORY
from featcli.errors import ConflictError
from featcli.inputs.image_list import Image as Input
from featcli.pixels import extras
from featcli.pixels.decode import read_pixels, read_size
from featcli.pixels.failure import UnreadableError
from featcli.spec.groups import PixelSpec

sys.path.append(str(REPOSITORY / "benchmarks"))  # scripts there import each other
pytest.importorskip("imagecodecs")
import decoders
import tiffs
import witnesses
from tiffs import CMYK, GREY, GREY_WHITE_IS_ZERO, RGB, SHORT, Layout, image_of

RAMP = np.linspace(0, 65535, 32 * 40).astype(np.uint16).reshape(32, 40, 1)
COLOURS = np.concatenate([RAMP, RAMP[::-1], RAMP[:, ::-1]], 2)
BIT_12 = (RAMP >> 4).astype(np.uint16)


def written(tmp_path, data):
    path = tmp_path / "x.tif"
    path.write_bytes(data)
    return Input("x.tif", str(path), len(data))


def read(tmp_path, data, **rules):
    found = []

    def fit(picture):
        found.append(np.asarray(picture))
        return np.zeros((3, 1, 1), np.uint8)

    read_pixels(written(tmp_path, data), PixelSpec(**rules), fit, np.zeros((3, 1, 1), np.uint8))
    return found[0]


def failure(tmp_path, data, **rules):
    with pytest.raises(UnreadableError) as failed:
        read(tmp_path, data, **rules)
    return failed.value.reason, failed.value.detail


def test_kinds_of_tiff(tmp_path):
    """Any mode, depth, byte order, planes, tiles and compression of a TIFF gives the array's pixels or is refused."""
    cells = [make() for make in itertools.islice(decoders.grid(), 0, None, 307)]
    found = [decoders.verdict(cell, tmp_path) for cell in cells]
    wanted = ["refused" if cell.expected is None else "equal" for cell in cells]
    rows = zip(cells, found, wanted, strict=True)
    assert [(cell.mode, cell.depth, cell.layout, said) for cell, said, want in rows if not said.startswith(want)] == []
    assert len({cell.mode for cell in cells}) > 20


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("meaning", [GREY, GREY_WHITE_IS_ZERO, RGB, CMYK])
def test_another_reader_finds_the_same(order, meaning):
    """libvips finds the same samples in the files that featcli is measured with."""
    pytest.importorskip("pyvips")
    count = {RGB: 3, CMYK: 4}.get(meaning, 1)
    samples = np.random.default_rng(0).integers(0, 65536, (20, 30, count)).astype(np.uint16)
    seen = decoders.seen_by_libvips(samples, 16, meaning, None)
    for planar, tiled in ((False, False), (False, True), (True, False)):  # libvips reads no tiles in planes
        data = tiffs.tiff(samples, 16, meaning, Layout(order, planar=planar, tiles=tiled, compression=tiffs.DEFLATE))
        cell = decoders.Cell("", "", "", data, None, samples=samples, bits=16, seen=seen)
        assert witnesses.libvips(cell) == witnesses.SAME


def test_planes_give_the_pixels_of_their_twin(tmp_path):
    """16-bit colours in separate planes give, bit for bit, the pixels of those that lie side by side."""
    for colours, meaning in ((COLOURS, RGB), (np.dstack([COLOURS, RAMP]), CMYK)):
        together = read(tmp_path, tiffs.tiff(colours, 16, meaning))
        assert np.array_equal(read(tmp_path, tiffs.tiff(colours, 16, meaning, Layout(planar=True))), together)


def test_depth_range_of_colours(tmp_path):
    """--depth-range applies to deep colours and to greys with transparency as it does to greys."""
    twelve = COLOURS >> 4
    shown = (twelve / (4095 / 255)).round().astype(np.uint8)
    assert np.array_equal(read(tmp_path, tiffs.tiff(twelve, 16, RGB), depth_range="0:4095"), shown)
    grey = read(tmp_path, tiffs.tiff(twelve[..., :2], 16, GREY, tags=[(338, SHORT, [2])]), depth_range="0:4095")
    assert np.array_equal(grey, np.repeat(shown[..., :1], 3, 2))


def test_depth_range_that_comes_too_late(tmp_path):
    """Deep colours that are already 8 bits when --depth-range applies are failures with it, and are read without it."""
    import imagecodecs

    for data in (
        imagecodecs.png_encode(COLOURS),
        b"P6 40 32\n# 12 bits\n4095\n" + (COLOURS >> 4).astype(">u2").tobytes(),
    ):
        assert read(tmp_path, data).shape == (32, 40, 3)
        reason, detail = failure(tmp_path, data, depth_range="0:4095")
        assert (reason, "--depth-range" in detail) == ("unsupported_depth", True)
    grey = imagecodecs.png_encode(RAMP[..., 0])
    assert read(tmp_path, grey, depth_range="0:4095").max() == 255


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("suffix", ["avif", "jxl"])
def test_depth_range_of_formats_that_are_read_in_8_bits(tmp_path, suffix, bits):
    """AVIF and JPEG XL of more than 8 bits are failures with --depth-range."""
    import imagecodecs

    pytest.importorskip("pillow_jxl")
    if (suffix, bits) == ("avif", 16):
        pytest.skip("AVIF has up to 12 bits")
    encode = imagecodecs.avif_encode if suffix == "avif" else imagecodecs.jpegxl_encode
    data = encode((COLOURS >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16), bitspersample=bits)
    whole = read(tmp_path, data)
    if bits == 8:
        assert np.array_equal(read(tmp_path, data, depth_range="0:4095"), whole)
    else:
        reason, detail = failure(tmp_path, data, depth_range="0:4095")
        assert (reason, "--depth-range" in detail) == ("unsupported_depth", True)


def test_lab(tmp_path):
    """8-bit CIELAB with a profile becomes sRGB by the formula of CIE; without one it is refused by name."""
    rng = np.random.default_rng(0)
    lab = np.dstack([rng.integers(100, 200, (20, 30)), *rng.integers(-15, 15, (2, 20, 30))])
    samples = lab.astype(np.uint8)  # a and b are signed
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = tiffs.tiff(samples, 8, tiffs.CIELAB, tags=[(34675, 1, list(profile))])
    levels = (lab[..., 0] / 2.55 + 16) / 116
    xyz = np.dstack([levels + lab[..., 1] / 500, levels, levels - lab[..., 2] / 200]) ** 3 * (0.9642, 1, 0.8249)
    to_rgb = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = xyz @ np.transpose(to_rgb)
    shown = (1.055 * linear ** (1 / 2.4) - 0.055) * 255
    off = np.abs(read(tmp_path, data, colour="convert") - shown)
    assert (off.max() < 3.5, off.mean() < 0.5) == (True, True)  # the conversion uses a table
    bare = tiffs.tiff(samples, 8, tiffs.CIELAB)
    planar = tiffs.tiff(samples, 8, tiffs.CIELAB, Layout(planar=True), tags=[(34675, 1, list(profile))])
    for found in (failure(tmp_path, data), *(failure(tmp_path, each, colour="convert") for each in (bare, planar))):
        assert (found[0], "CIELAB" in found[1]) == ("format_not_allowed", True)
    assert "--colour convert" in failure(tmp_path, data)[1]


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("number", range(1, 9))
def test_orientation_of_tiffs(tmp_path, bits, number):
    """TIFFs are turned upright like other pictures unless that is switched off, and their size agrees."""
    samples = (COLOURS >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    data = tiffs.tiff(samples, bits, RGB, tags=[(274, SHORT, [number])])
    lying = read(tmp_path, tiffs.tiff(samples, bits, RGB))
    assert np.array_equal(read(tmp_path, data, orientation="ignore"), lying)
    exif = Image.Exif()
    exif[0x0112] = number
    out = io.BytesIO()
    Image.fromarray(lying).save(out, "PNG", exif=exif)
    assert np.array_equal(read(tmp_path, data), read(tmp_path, out.getvalue()))
    image = written(tmp_path, data)
    assert read_size(image, PixelSpec(orientation="ignore")) == (32, 40)
    assert read_size(image, PixelSpec()) == ((40, 32) if number > 4 else (32, 40))


def test_orientation_in_xmp(tmp_path):
    """A TIFF whose orientation is in its XMP alone is turned, and its size is that of the turned picture."""
    xmp = b'<x tiff:Orientation="6"/>'
    data = tiffs.tiff(COLOURS, 16, RGB, tags=[(700, 1, list(xmp))])
    assert read(tmp_path, data).shape == (40, 32, 3)
    assert read_size(written(tmp_path, data), PixelSpec()) == (40, 32)
    assert read(tmp_path, data, orientation="ignore").shape == (32, 40, 3)


def test_previews_are_refused(tmp_path):
    """If the first image of a TIFF is a small version of another, it is refused with that reason."""
    small, large = COLOURS[::4, ::4], image_of(COLOURS, 16, RGB)
    reason, detail = failure(tmp_path, tiffs.tiff(small, 16, RGB, tags=[(254, 4, [1])], later=[large]))
    assert (reason, "preview" in detail) == ("format_not_allowed", True)
    assert failure(tmp_path, tiffs.tiff(small, 16, RGB, tags=[(255, SHORT, [2])], later=[large]))[0] == reason
    raw = tiffs.tiff(small, 16, RGB, tags=[(254, 4, [1]), (50706, 1, [1, 4, 0, 0])], later=[large])
    assert "DNG" in failure(tmp_path, raw)[1]
    whole = read(tmp_path, tiffs.tiff(COLOURS, 16, RGB, later=[image_of(small, 16, RGB, tags=[(254, 4, [1])])]))
    assert np.array_equal(whole, COLOURS >> 8)
    alone = tiffs.tiff(COLOURS, 16, RGB, tags=[(254, 4, [1])])
    assert np.array_equal(read(tmp_path, alone), whole)


@pytest.mark.parametrize(
    ("samples", "bits", "meaning", "reason", "said"),
    [
        (np.repeat(RAMP, 5, 2), 16, GREY, "format_not_allowed", "5 values for each pixel"),
        (np.repeat(RAMP, 4, 2), 16, GREY, "format_not_allowed", "4 values for each pixel"),
        (RAMP, 16, tiffs.CFA, "format_not_allowed", "colour filter array"),
        (COLOURS.astype(np.uint8), 8, tiffs.CIELAB, "format_not_allowed", "CIELAB"),
        (COLOURS.astype(np.float32), 32, RGB, "unsupported_depth", "--depth-range"),
        (RAMP.astype(np.int16), 16, GREY, "unsupported_depth", "16-bit signed grey"),
        (RAMP.astype(np.float64), 64, GREY, "unsupported_depth", "64-bit floating-point grey"),
    ],
)
def test_kinds_that_are_not_read_are_named(tmp_path, samples, bits, meaning, reason, said):
    """A whole file of a kind that is not read is not called damaged: the failure names the kind."""
    found = failure(tmp_path, tiffs.tiff(samples, bits, meaning))
    assert (found[0], said in found[1]) == (reason, True), found


@pytest.mark.parametrize("layout", [Layout(), Layout(compression=tiffs.LZW), Layout(compression=tiffs.DEFLATE)])
def test_deep_tiffs_that_were_cut_short(tmp_path, layout):
    """A file that tifffile unpacks must be complete: a missing part is never filled up."""
    data = tiffs.tiff(BIT_12, 12, GREY, layout)
    assert read(tmp_path, data).shape == (32, 40, 3)
    assert {failure(tmp_path, data[:-cut])[0] for cut in (2, 40, 100)} <= {"truncated", "decode_error"}


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 12, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_white_of_jpeg_2000(tmp_path, bits, count):
    """White is white and black is black, however many bits a JPEG 2000 has, and a cut file is a failure."""
    import imagecodecs

    samples = np.zeros((20, 30, count), np.uint8 if bits <= 8 else np.uint16)
    samples[:10] = 2**bits - 1
    data = imagecodecs.jpeg2k_encode(samples.squeeze(), level=0, reversible=True, bitspersample=bits)
    shown = read(tmp_path, data)
    assert (shown[:10].min(), shown[10:].max()) == (255, 0)
    assert failure(tmp_path, data[:-2])[0] in ("decode_error", "truncated")


def test_deep_colours_in_8_bits(tmp_path):
    """16-bit colours in PNG, TIFF and JPEG 2000 keep the upper 8 bits; PPM and fewer bits take the nearest level."""
    import imagecodecs

    every = np.arange(0, 65536, 17, dtype=np.uint16)[: 60 * 64].reshape(60, 64)
    deep = np.dstack([every, every[::-1], every[:, ::-1]])
    for bits in (16, 12, 9):
        values = deep >> (16 - bits)
        nearest = (values.astype(float) * 255 / (2**bits - 1)).round()
        data = [tiffs.tiff(values, bits, RGB)]
        data += [
            bytes(imagecodecs.jpeg2k_encode(values, level=0, reversible=True, bitspersample=bits, codecformat=boxes))
            for boxes in ("JP2", "J2K")
        ]
        data += [imagecodecs.png_encode(values)] if bits == 16 else []
        for each in data:
            assert np.array_equal(read(tmp_path, each), deep >> 8 if bits == 16 else nearest)
        ppm = b"P6 64 60\n%d\n" % (2**bits - 1) + values.astype(">u2").tobytes()
        assert np.array_equal(read(tmp_path, ppm), nearest)


def test_parts_of_tiles_that_jpeg_2000_miscounts(tmp_path):
    """A tile with a part more than it declares, which Pillow calls broken, has the pixels of a correct file."""
    import imagecodecs

    eight = (COLOURS >> 8).astype(np.uint8)
    whole = bytes(imagecodecs.jpeg2k_encode(eight, level=0, reversible=True, codecformat="J2K"))
    at, end = whole.index(b"\xff\x90"), len(whole) - 2
    cuts = [at + 14 + (end - at - 14) * part // 3 for part in range(4)]

    def split(said):
        parts = b""
        for part, (first, last) in enumerate(itertools.pairwise(cuts)):
            parts += struct.pack(">HHHIBBH", 0xFF90, 10, 0, last - first + 14, part, said, 0xFF93) + whole[first:last]
        return whole[:at] + parts + whole[end:]

    for said in (3, 2):
        assert np.array_equal(read(tmp_path, split(said)), eight)
    with pytest.raises(OSError, match="broken data stream"):
        Image.open(io.BytesIO(split(2))).load()


def test_without_the_second_decoder(tmp_path, monkeypatch):
    """Without tifffile its kinds fail and say so, and all others have the same pixels."""
    monkeypatch.setattr(extras, "reads_more_tiff", lambda: False)
    import imagecodecs

    deep = imagecodecs.jpeg2k_encode(COLOURS, level=0, reversible=True)
    for data in (tiffs.tiff(COLOURS, 16, RGB, Layout(planar=True)), tiffs.tiff(BIT_12, 12, GREY), deep):
        reason, detail = failure(tmp_path, data)
        assert (reason, "pip install 'featcli[tiff]'" in detail) == ("format_not_allowed", True)
    assert read(tmp_path, tiffs.tiff(COLOURS, 16, RGB)).shape == (32, 40, 3)


def dumped(tmp_path, **options):
    return featcli.extract(
        tmp_path / "p", output=tmp_path / "d", checkpoint="test_resnet", random_init=True, out_indices="0", **options
    )


def test_a_dump_takes_deep_pictures_once_they_can_be_read(tmp_path, monkeypatch):
    """Pictures that failed without tifffile are read later by --retry-failed, and the dump then needs tifffile."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.tif").write_bytes(tiffs.tiff(BIT_12, 12, GREY))
    Image.new("L", (40, 32), 77).save(tmp_path / "p" / "b.png")
    (tmp_path / "p" / "c.png").write_bytes(b"damaged")
    there = extras.versions()
    with monkeypatch.context() as missing:
        missing.setattr(extras, "reads_more_tiff", lambda: False)
        missing.setattr(extras, "versions", dict)
        dumped(tmp_path)
        assert featcli.open_dump(tmp_path / "d").valid.tolist() == [False, True, False]
    assert extras.versions() == there
    dumped(tmp_path, retry_failed=True)
    assert featcli.open_dump(tmp_path / "d").valid.tolist() == [True, True, False]
    with monkeypatch.context() as missing:
        missing.setattr(extras, "versions", dict)
        dumped(tmp_path)  # nothing is left to do
        with pytest.raises(ConflictError, match=r"made with tifffile .* to read \.tif, which is not installed here"):
            dumped(tmp_path, retry_failed=True)
    dumped(tmp_path, overwrite=True)
    monkeypatch.setattr(extras, "versions", dict)
    with pytest.raises(ConflictError, match=r"made with tifffile"):
        dumped(tmp_path, retry_failed=True)


def test_files_that_nothing_reads_are_counted_before_the_first_image(tmp_path, cli, monkeypatch):
    """If a suffix says that a package is missing, the plan says how many files need it and what to install."""
    (tmp_path / "p").mkdir()
    for name in ("a.heic", "b.HEIC", "c.jxl", "d.png"):
        Image.new("L", (40, 32), 77).save(tmp_path / "p" / name, "PNG")
    command = ("extract", tmp_path / "p", "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "--dry-run")
    assert "pip install" not in cli(*command).err
    monkeypatch.setattr(extras, "versions", dict)
    said = cli(*command).err
    assert "2 files end in .heic: pip install 'featcli[heif]'" in said
    assert "1 file ends in .jxl: pip install 'featcli[jxl]'" in said
