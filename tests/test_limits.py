"""Check limits of what a file may cost: small files meet limits without which larger ones would take minutes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import little_memory
from featcli.inputs.image_list import MISSING
from featcli.inputs.image_list import Image as Input
from featcli.pixels import limits
from featcli.pixels.colour import upright_rgb
from featcli.pixels.decode import read_pixels, read_size
from featcli.pixels.failure import UnreadableError
from featcli.spec.groups import PixelSpec

NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def saved(format_name, picture=None, **options):
    out = io.BytesIO()
    (picture or Image.fromarray(NOISE)).save(out, format_name, **options)
    return out.getvalue()


def outcome(path, content, rules=PixelSpec()):  # noqa: B008
    """Return the pixels of a file, or the reason and the words for why there are none."""
    path.write_bytes(content)
    image, out = Input("x", str(path), MISSING), np.empty((3, 40, 50), np.uint8)
    try:
        read_pixels(image, rules, lambda picture: np.asarray(picture.resize((50, 40))).transpose(2, 0, 1), out)
    except UnreadableError as error:
        return error.reason, error.detail
    return out


def segment(marker, content=b""):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def many_scans(scans, edge=9408):
    """Return a progressive JPEG of one grey: the first scan has its values, and all others add nothing."""

    def table(kind, symbol):
        return segment(0xC4, bytes([kind, 1, *[0] * 15, symbol]))

    def scan(first, last):
        return segment(0xDA, bytes([1, 1, 0, first, last, 0]))

    blocks = (edge // 8) ** 2
    head = b"\xff\xd8" + segment(0xDB, bytes([0, *[1] * 64]))
    head += segment(0xC2, struct.pack(">BHHB", 8, edge, edge, 1) + b"\1\x11\0") + table(0, 0) + table(0x10, 0xE0)
    empty = scan(1, 63) + bytes((blocks // (1 << 14) + 1) * 15 // 8 + 1)
    return head + scan(0, 0) + bytes((blocks + 7) // 8) + empty * (scans - 1) + b"\xff\xd9"


def tiff(*tags, order="<"):
    """Return a TIFF of these tags, (number, type, count, value), and nothing else."""
    entries = b"".join(
        struct.pack(order + "HHI", tag, kind, count)
        + (struct.pack(order + "HH", value, 0) if kind == 3 and count == 1 else struct.pack(order + "I", value))
        for tag, kind, count, value in sorted(tags)
    )
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)


def plain(tag, kind=4, count=1, value=16):
    """Return the tags of a grey TIFF of 16x16 with one of them changed."""
    tags = {256: (4, 1, 16), 257: (4, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    return [(number, *rest) for number, rest in {**tags, tag: (kind, count, value)}.items()]


def icon(content):
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(content), 22) + content


JPEG = saved("JPEG")
GIF = saved("GIF", Image.new("L", (1, 1)))
LARGE = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0))
COSTLY = {
    "junk.jpg": JPEG[:20] + bytes(2 << 20) + JPEG[20:],
    "fill.jpg": JPEG[:2] + b"\xff" * (2 << 20) + JPEG[2:],
    "segments.jpg": JPEG[:2] + segment(0xE5) * 10_001 + JPEG[2:],
    "tables.jpg": JPEG[:20] + segment(0xDB, bytes([0, *[1] * 64])) * 10_001 + JPEG[20:],
    "exif.jpg": JPEG[:2] + segment(0xE1, b"Exif\0\0" + b"a" * 99) * 101 + JPEG[2:],
    "hidden exif.jpg": JPEG[:2] + (b"\0" + segment(0xE1, b"Exif\0\0" + b"a" * 99)) * 101 + JPEG[2:],
    "comment.ppm": b"P6 #" + b"a" * 70_000 + b"\n2 1 255\n" + bytes(6),
    "spaces.pgm": b"P5 " + b" " * 70_000 + b"\n2 1 255\n" + bytes(2),
    "digits.pgm": b"P2 5800 5800 255\n" + b"0 " * 100,
    "digits.ppm": b"P3 3400 3400 255\n" + b"0 " * 100,
    "comments.pgm": b"P2 9 9 255\n" + b"#\n" * 5_000 + b"0 " * 81,
    "strips.tif": tiff(*plain(273, 4, 600_000, 8)),
    "strips big-endian.tif": tiff(*plain(273, 4, 600_000, 8), order=">"),
    "offsets.tif": tiff(*plain(324, 4, 600_000, 8)),
    "resolution.tif": tiff(*plain(282, 5, 600_000, 8)),
    "tile.tif": tiff(*plain(322, 4, 1, 30_000), (323, 4, 1, 30_000)),
    "short tile.tif": tiff(*plain(322, 3, 1, 30_000), (323, 3, 1, 30_000), order=">"),
    "chunks.webp": saved("WEBP") + (b"abcd" + bytes(4)) * 100_001,
    "boxes.jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x08free" * 10_001,
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files(tmp_path, name):
    """A file in which decoders would search or count for minutes is `too_large`, and the detail names the count."""
    reason, detail = outcome(tmp_path / name, COSTLY[name])
    assert reason == "too_large", detail
    assert any(character.isdigit() for character in detail)


@pytest.mark.parametrize("scans", [100, 500])
def test_scans(tmp_path, scans):
    """Scans of a JPEG count by their pixels, so many scans of a small picture are read."""
    assert isinstance(outcome(tmp_path / "x.jpg", many_scans(scans, 64)), np.ndarray)
    if scans > limits.MOST_SCANS:
        found = outcome(tmp_path / "y.jpg", many_scans(scans))
        assert found[0] == "too_large"
        assert "scans" in found[1]


def test_what_looks_like_a_scan(tmp_path, monkeypatch):
    """Data after the end of a JPEG, such as a phone's film, and inside its segments, is not counted as scans."""
    monkeypatch.setattr(limits, "MOST_SCANS", 12)
    monkeypatch.setattr(limits, "MOST_SCANNED_PIXELS", 1)
    whole = saved("JPEG", progressive=True)
    expected = outcome(tmp_path / "x.jpg", whole)
    assert isinstance(expected, np.ndarray)
    first = whole.index(b"\xff\xda")
    between = whole.index(b"\xff\xc4", first)
    comment = segment(0xFE, b"\xff\xda\0\x08" * 50 + b"\xff\xd9")
    for content in (whole + b"\xff\xda\0\2" * 50, whole[:between] + comment + whole[between:]):
        assert np.array_equal(outcome(tmp_path / "x.jpg", content), expected)


def test_too_large_before_it_is_unpacked(tmp_path):
    """An icon or a JPEG XL that is too large is refused by its header, which their decoders read last."""
    bitmap = struct.pack("<IiiHHIIiiII", 40, 13_000, 26_000, 1, 32, 0, 0, 0, 0, 0, 0)
    contents = {"png.ico": icon(b"\x89PNG\r\n\x1a\n" + LARGE), "bmp.ico": icon(bitmap), "x.jxl": large_jxl()}
    for name, content in contents.items():
        with little_memory(64 << 20):
            found = outcome(tmp_path / name, content)
        assert found == ("too_many_pixels", "13000x13000, the limit is 89,478,485 pixels (--max-pixels)"), name


def large_jxl():
    """Return the first bytes of a JPEG XL of 13000x13000: not small, 18 bits for its height, and an equal width."""
    bits = 2 << 1 | (13_000 - 1) << 3 | 1 << 21
    return b"\xff\x0a" + bits.to_bytes(16, "little")


@pytest.mark.parametrize("container", [False, True])
def test_sizes_of_jxl(container):
    """The size read from the header of a JPEG XL is the one that its decoder finds."""
    pytest.importorskip("pillow_jxl")
    for size in [
        (1, 1),
        (8, 8),
        (256, 256),
        (264, 256),
        (512, 300),
        (513, 8),
        (40, 50),
        (1200, 1000),
        (160, 90),
        (9, 600),
    ]:
        content = saved("JXL", Image.new("L", size), use_container=container)
        assert limits.header_of_jxl(io.BytesIO(content)) == (*size, 1, 8)
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == size


@pytest.mark.parametrize("sizes", [[(16, 16)], [(16, 16), (48, 48), (32, 32)], [(256, 256), (64, 64)]])
def test_sizes_of_icons(tmp_path, sizes):
    """The size of an icon is that of the picture that is unpacked, be it a PNG or a bitmap."""
    for kind in ("png", "bmp"):
        content = saved("ICO", Image.new("RGBA", (256, 256), "red"), sizes=sizes, bitmap_format=kind)
        assert limits._size_of_icon(io.BytesIO(content)) == max(sizes)


READ_IN_PIECES = {
    "chunks.png": saved("PNG")[:33] + chunk(b"abCd") * 600 + saved("PNG")[33:],
    "chunks behind.png": saved("PNG")[:-12] + chunk(b"abCd") * 600 + saved("PNG")[-12:],
    "junk.gif": GIF[:13] + bytes(2_000) + GIF[13:],
    "comments.gif": GIF[:13] + b"!\xfe\1a\0" * 600 + GIF[13:],
    "boxes.jp2": saved("JPEG2000")[:12] + b"\0\0\0\x08free" * 2_000 + saved("JPEG2000")[12:],
    "runs.bmp": b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078)
    + struct.pack("<IiiHHIIiiII", 40, 50, 40, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024) + b"\1\5" * 2_000,
}  # fmt: skip


@pytest.mark.parametrize("name", READ_IN_PIECES)
def test_files_in_small_pieces(tmp_path, monkeypatch, name):
    """A file that a decoder reads in millions of small pieces is `too_large`, whatever the decoder makes of it."""
    monkeypatch.setattr(limits, "MOST_READS", 1_000)
    assert outcome(tmp_path / name, READ_IN_PIECES[name]) == ("too_large", "no picture after 1,000 reads")


def test_a_gif_that_is_empty_for_long(tmp_path, monkeypatch):
    """A GIF whose pixels take far more bytes than they can need is `too_large`."""
    monkeypatch.setattr(limits, "MOST_ENCODED_BYTES", 1 << 17)
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0)
    found = outcome(tmp_path / "x.gif", head + b"\2" + (b"\3\x24\x49\x92") * 100_000 + b"\0;")
    assert found == ("too_large", "far more bytes than its pixels can need")


def test_a_header_is_all_that_is_read_for_a_size(tmp_path):
    """The size of a picture is read from its header alone, however long the file is."""
    path = tmp_path / "x.jpg"
    with path.open("wb") as file:
        file.write(many_scans(500))
        file.truncate(1 << 30)
    with little_memory(16 << 20):
        assert read_size(Input("x", str(path), MISSING), PixelSpec()) == (9408, 9408)


def test_deep_pictures_take_little_more_than_themselves(tmp_path):
    """A 16-bit picture is reduced to 8 bits in strips, to the same values as in one piece."""
    values = (np.arange(3000)[:, None] * 7919 + np.arange(3000) * 104_729).astype(np.uint16)
    with Image.fromarray(values) as picture, little_memory(9_000_000 * 5 + (6 << 20)):
        found = upright_rgb(picture)  # 8 bits, and 4 bytes a pixel as RGB
    assert np.array_equal(np.asarray(found)[..., 1], (values / 257).round().astype(np.uint8))
