"""Check that damaged pictures have no invented pixels, and that damage beside the pixels costs none.

The whole grid is in benchmarks/damage.py.
"""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels, read_size
from featcli.pixels.failure import UnreadableError
from featcli.pixels.png import PATTERNS, essential
from featcli.spec.groups import PixelSpec

NOISE = np.random.default_rng(0).integers(64, 192, (100, 120, 3), dtype=np.uint8)


# A JPEG of 16x24 pixels in arithmetic coding, which no library here writes: by TurboJPEG 2.1 with TJ_ARITHMETIC=1.
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8"
    "jhBplmUDiAeE-`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0=}O"
    "01*fP5C9kh0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#0APK+D3XRVx7e<U6`Ib{l-$8#OcIR9Rp&j@Tr)st6IlP*"
)


def saved(format_name="JPEG", picture=NOISE, **options):
    """Return the bytes of a picture in a format."""
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, format_name, **options)
    return out.getvalue()


def read(content, tmp_path, **rules):
    """Return the pixels that featcli reads from a file, in its own size (H, W, 3)."""
    path = tmp_path / "picture"
    path.write_bytes(content)
    found = []

    def fit(picture):
        found.append(np.asarray(picture))
        return np.zeros((3, 8, 8), np.float32)

    read_pixels(Input("picture", str(path), len(content)), PixelSpec(**rules), fit, np.zeros((3, 8, 8), np.float32))
    return found[0]


def size(content, tmp_path, **rules):
    """Return the size that the header gives, (H, W)."""
    (tmp_path / "picture").write_bytes(content)
    return read_size(Input("picture", str(tmp_path / "picture"), len(content)), PixelSpec(**rules))


def reason(content, tmp_path, **rules):
    """Return why a file gives no pixels."""
    with pytest.raises(UnreadableError) as raised:
        read(content, tmp_path, **rules)
    return raised.value.reason


def segments(content):
    """Return (the segments of a JPEG of one scan before its data, by marker; these data)."""
    at, found = 2, {}
    while True:
        length = struct.unpack(">H", content[at + 2 : at + 4])[0]
        found[content[at + 1]] = found.get(content[at + 1], b"") + content[at : at + 2 + length]
        at += 2 + length
        if content[at - 2 - length + 1] == 0xDA:
            return found, content[at:-2]


def scan_by_scan():
    """Return the head and the scans of a JPEG with a scan for each colour, which Pillow cannot write."""
    parts = [segments(saved(picture=plane, quality=80)) for plane in Image.fromarray(NOISE).convert("YCbCr").split()]
    first = parts[0][0]
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 100, 120, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    headers = [b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([number, 0, 0, 63, 0]) for number in (1, 2, 3)]
    head = b"\xff\xd8" + first[0xE0] + first[0xDB] + frame + first[0xC4]
    return head, [header + data for header, (_, data) in zip(headers, parts, strict=True)]


def with_height(content, height):
    at = next(content.index(bytes([0xFF, marker])) for marker in (0xC0, 0xC2) if bytes([0xFF, marker]) in content)
    return content[: at + 5] + struct.pack(">H", height) + content[at + 7 :]


def before_scan(content, number):
    """Return a progressive JPEG up to one of its scans, with all tables."""
    at = [place for place in range(len(content)) if content.startswith(b"\xff\xda", place)][number]
    return content[: content.rindex(b"\xff\xc4", 0, at)]


EOI = b"\xff\xd9"
KINDS = {
    "baseline": {},
    "4:2:0": {"subsampling": 2, "quality": 60},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "progressive with restarts": {"progressive": True, "restart_marker_blocks": 7},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_early_ends(kind, mode, tmp_path):
    """A JPEG that ends early is refused wherever it was cut, even with an end marker; a whole one equals Pillow's."""
    content = saved(picture=Image.fromarray(NOISE).convert(mode), **KINDS[kind])
    with Image.open(io.BytesIO(content)) as picture:
        assert np.array_equal(read(content, tmp_path), np.asarray(picture.convert("RGB")))
    body = content.index(b"\xff\xda") + 30
    for cut in [*np.linspace(body, len(content) - 40, 12).astype(int)]:
        assert reason(content[:cut].rstrip(b"\xff") + EOI, tmp_path) == "truncated"
    assert reason(with_height(content, 200), tmp_path) == "truncated"
    assert reason(with_height(content, 200), tmp_path, decode="scaled") == "truncated"
    assert reason(content[: len(content) // 2], tmp_path) == "truncated"
    joined = content[: len(content) // 2].rstrip(b"\xff") + content
    assert reason(joined, tmp_path) in ("truncated", "decode_error")


def test_missing_scans(tmp_path):
    """A JPEG of several scans that was cut between two scans, or inside any of them, is refused."""
    content = saved(progressive=True)
    for number in range(1, 10):
        assert reason(before_scan(content, number) + EOI, tmp_path) == "truncated"
    begin, end = len(before_scan(content, 4)), len(before_scan(content, 5))
    assert reason(content[: begin + (end - begin) // 2].rstrip(b"\xff") + content[end:], tmp_path) == "truncated"
    head, scans = scan_by_scan()
    content = head + b"".join(scans) + EOI
    with Image.open(io.BytesIO(content)) as picture:
        assert np.array_equal(read(content, tmp_path), np.asarray(picture))
    for number in range(3):
        cut = [scan[:500].rstrip(b"\xff") if number == which else scan for which, scan in enumerate(scans)]
        assert reason(head + b"".join(cut) + EOI, tmp_path) == "truncated"
    assert reason(head + b"".join(scans[:2]) + EOI, tmp_path) == "truncated"


def test_lost_restart_intervals(tmp_path):
    """A JPEG that lacks one or eight of its restart intervals is refused, though its end is whole."""
    content = saved(restart_marker_rows=1)
    marks = [at for at in range(len(content)) if content[at] == 0xFF and 0xD0 <= content[at + 1] <= 0xD7]
    assert len(marks) == 6
    for count in (1, 3):
        assert reason(content[: marks[1]] + content[marks[1 + count] :], tmp_path) == "truncated"
    many = saved(picture=np.tile(NOISE, (4, 1, 1)), restart_marker_rows=1)
    marks = [at for at in range(len(many)) if many[at] == 0xFF and 0xD0 <= many[at + 1] <= 0xD7]
    assert reason(many[: marks[2]] + many[marks[10] :], tmp_path) == "truncated"


def test_what_is_no_early_end(tmp_path):
    """Bytes after a JPEG, fill before its end marker, and a header with fewer lines cost a whole picture nothing."""
    content = saved()
    whole = read(content, tmp_path)
    for same in (content + b"<html>" * 99, content + content, content[:-2] + b"\xff" * 9 + EOI):
        assert np.array_equal(read(same, tmp_path), whole)
    assert np.array_equal(read(content[:-2] + b"\xff\xd5" + EOI, tmp_path), whole)
    assert np.array_equal(read(with_height(content, 48), tmp_path)[:40], whole[:40])


def test_several_pictures_in_one_jpeg(tmp_path):
    """The first picture of an MPO is read and must be whole; --decode scaled makes it smaller, as it does a JPEG."""
    small = Image.fromarray(NOISE).resize((40, 30))
    content = saved("MPO", save_all=True, append_images=[small])
    assert np.array_equal(read(content, tmp_path), read(saved(), tmp_path))
    end = content.index(EOI)
    assert reason(content[: end - 900].rstrip(b"\xff") + content[end:], tmp_path) == "truncated"
    assert read(content, tmp_path, decode="scaled").shape == (25, 30, 3)


def test_lossless_jpeg(tmp_path):
    """A lossless JPEG is read exactly, or refused if it ends early."""
    content = pytest.importorskip("imagecodecs").jpeg8_encode(NOISE, lossless=True)
    assert np.array_equal(read(content, tmp_path), NOISE)
    assert reason(content[: len(content) // 2].rstrip(b"\xff") + EOI, tmp_path) == "truncated"


def test_arithmetic_coding(tmp_path):
    """A JPEG in arithmetic coding is read as Pillow reads it, and refused without its end."""
    with Image.open(io.BytesIO(ARITHMETIC)) as picture:
        assert np.array_equal(read(ARITHMETIC, tmp_path), np.asarray(picture))
    assert reason(ARITHMETIC[:-20], tmp_path) in ("truncated", "decode_error")


def test_strict_witness(tmp_path):
    """libvips, told to fail on libjpeg's warnings, judges whole and cut JPEGs in the same way."""
    vips = pytest.importorskip("pyvips")
    for options in KINDS.values():
        content = saved(**options)
        for one in (content, content[: len(content) * 2 // 3].rstrip(b"\xff") + EOI, with_height(content, 180)):
            try:
                expected = vips.Image.new_from_buffer(one, "", fail_on="warning").numpy()
            except vips.Error:
                assert reason(one, tmp_path) == "truncated"
            else:
                assert np.abs(read(one, tmp_path).astype(int) - expected).max() <= 8


def chunk(kind, content, wrong=0):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def png(picture, before=b"", after=b"", rows=None, height=None):
    """Return a PNG of 8 bits from an array, with chunks before and after its pixels, and with some of its rows."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[picture.shape[2]]
    head = struct.pack(">IIBBBBB", picture.shape[1], height or picture.shape[0], 8, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in picture[:rows]))
    pieces = chunk(b"IHDR", head) + before + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + pieces


def interlaced(picture):
    """Return an interlaced PNG as libvips writes it, and the same without its last pass."""
    content = pytest.importorskip("pyvips").Image.new_from_array(picture).write_to_buffer(".png", interlace=True)
    at, head, data = 8, content[:8], b""
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] == b"IDAT":
            data += content[at + 8 : end - 4]
        elif not data:
            head += content[at:end]
        at = end
    less = zlib.decompress(data)[: -(1 + picture[0].size) * (len(picture) // 2)]
    return content, head + chunk(b"IDAT", zlib.compress(less)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pngs_that_end_early(channels, tmp_path):
    """A PNG whose data end properly, but before its last row, is refused; a whole one is exact, down to one pixel."""
    picture = np.concatenate([NOISE, NOISE[..., :1]], -1)[..., :channels]
    for height, width in ((100, 120), (7, 3), (1, 1), (2, 1)):
        whole = picture[:height, :width]
        expected = whole[..., :3] if channels > 2 else np.repeat(whole[..., :1], 3, -1)
        assert np.array_equal(read(png(whole), tmp_path), expected)
        assert reason(png(whole, height=height + 1), tmp_path) == "truncated"
        assert reason(png(whole, height=height + 9), tmp_path) == "truncated"


def test_interlaced_pngs_that_end_early(tmp_path):
    """An interlaced PNG without its last pass, which has every second row, is refused."""
    for height in (2, 3, 8, 9):
        whole, less = interlaced(NOISE[:height])
        assert np.array_equal(read(whole, tmp_path), NOISE[:height])
        assert reason(less, tmp_path) == "truncated"


def test_a_png_that_ends_in_the_mark(tmp_path):
    """A PNG whose last row happens to be the pattern that marks missing rows is read as it is."""
    picture = NOISE.copy()
    picture[-1] = np.frombuffer((PATTERNS[0] * 60)[:360], np.uint8).reshape(120, 3)
    assert np.array_equal(read(png(picture), tmp_path), picture)
    assert reason(png(picture[:-1], height=100), tmp_path) == "truncated"


LONG = b"x" * (2 << 20)
SIX = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"  # an EXIF with orientation 6
BESIDE = {
    "a packed text": chunk(b"zTXt", b"w\0\0" + zlib.compress(LONG)),
    "an international text": chunk(b"iTXt", b"w\0\1\0\0\0" + zlib.compress(LONG)),
    "a profile": chunk(b"iCCP", b"w\0\0" + zlib.compress(LONG)),
    "a wrong checksum": chunk(b"tEXt", b"Comment\0hello", wrong=1),
    "a wrong checksum of something private": chunk(b"abCd", b"hello", wrong=1),
    "a text that cannot be unpacked": chunk(b"zTXt", b"w\0\0abc"),
    "too short a resolution": chunk(b"pHYs", b"ab"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_beside_the_pixels_of_a_png(what, tmp_path):
    """A chunk without pixels costs a PNG neither its pixels nor its orientation, wherever it lies."""
    turned = np.rot90(NOISE, -1)
    for more in ({"before": BESIDE[what]}, {"after": BESIDE[what]}):
        assert np.array_equal(read(png(NOISE, **more), tmp_path), NOISE)
    content = png(NOISE, before=BESIDE[what] + chunk(b"eXIf", SIX))
    assert np.array_equal(read(content, tmp_path), turned)
    assert np.array_equal(read(png(NOISE, before=BESIDE[what], after=chunk(b"eXIf", SIX)), tmp_path), turned)
    assert size(content, tmp_path) == turned.shape[:2]
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20  # of the caller's process


def test_an_orientation_in_a_long_text(tmp_path):
    """A PNG whose XMP or EXIF text is too long for Pillow is turned; damage to its pixels is still found."""
    xmp = b'<x tiff:Orientation="6"/>' + LONG
    text = b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n32\n" + (b"Exif\0\0" + SIX).hex().encode() + b" " * 2**20
    )
    for one in (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)), chunk(b"zTXt", text)):
        for more in ({"before": one}, {"after": one}):
            assert np.array_equal(read(png(NOISE, **more), tmp_path), np.rot90(NOISE, -1))
            assert size(png(NOISE, **more), tmp_path) == (120, 100)
    content = png(NOISE, before=BESIDE["a wrong checksum"])
    assert reason(content[:-20] + b"????" + content[-16:], tmp_path) == "decode_error"
    assert reason(content[: len(content) // 2], tmp_path) == "truncated"
    assert reason(content.replace(b"IHDR", b"IHdR"), tmp_path) == "decode_error"


def test_a_long_profile_of_a_png(tmp_path):
    """A picture keeps a colour profile that is above Pillow's limit."""
    (tmp_path / "picture").write_bytes(png(NOISE, before=BESIDE["a profile"]))
    with (tmp_path / "picture").open("rb") as file:
        assert essential(file)[1] == LONG


CORNERS = np.kron(np.random.default_rng(1).integers(0, 256, (5, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)
TURNED = {  # what each orientation does to a picture
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def jxl_of(orientation, in_exif):
    """Return a JPEG XL of CORNERS, with an orientation in its codestream, as no plugin writes it, and one in EXIF."""
    stream = saved("JXL", CORNERS, lossless=True)
    bits = "".join(f"{byte:08b}"[::-1] for byte in stream[2:6])
    # After the size (14 bits) comes a header in which only the orientation is unusual.
    bits = bits[:15] + "1" + f"{orientation - 1:03b}"[::-1] + "000" + bits[16:23] + "1" + bits[23:30]
    head = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    boxes = (b"JXL ", b"\r\n\x87\n"), (b"ftyp", b"jxl \0\0\0\0jxl "), (b"Exif", bytes(4) + exif_of(in_exif)[6:])
    boxes += ((b"jxlc", stream[:2] + head + stream[6:]),)
    return b"".join((len(content) + 8).to_bytes(4, "big") + kind + content for kind, content in boxes)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "JXL"])
def test_orientations(kind, orientation, tmp_path):
    """Each orientation is applied once or not at all in each format, and the header gives the size after that."""
    if kind == "JXL":
        pytest.importorskip("pillow_jxl")
        content = jxl_of(orientation, in_exif=6)
    elif kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
        content = saved("HEIF", CORNERS, quality=-1, chroma=444, exif=exif_of(orientation))
    else:
        exact = {
            "WEBP": {"lossless": True},
            "AVIF": {"quality": 100, "subsampling": "4:4:4"},
            "JPEG": {"quality": 98, "subsampling": 0},
        }
        content = saved(kind, CORNERS, exif=exif_of(orientation), **exact.get(kind, {}))
    for rule, expected in (("apply", TURNED[orientation](CORNERS)), ("ignore", CORNERS)):
        found = read(content, tmp_path, orientation=rule)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= (0 if kind in ("PNG", "WEBP", "JXL") else 24)
        assert size(content, tmp_path, orientation=rule) == found.shape[:2]


def test_an_avif_whose_transparency_has_no_size(tmp_path):
    """An AVIF whose alpha image does not give its size, as early writers left it, is read like one that does."""
    content = saved("AVIF", np.concatenate([NOISE, NOISE[::-1, :, :1]], -1))
    ipma = content.index(b"ipma") + 12
    assert content[ipma + 7 : ipma + 11] == b"\0\2\4\1"  # the first of the alpha image's four properties is its size
    lacking = bytearray(content)
    lacking[ipma + 10] = lacking[ipma + 11]
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(lacking))
    for alpha in ("drop", "white"):
        assert np.array_equal(read(bytes(lacking), tmp_path, alpha=alpha), read(content, tmp_path, alpha=alpha))
    assert size(bytes(lacking), tmp_path) == (100, 120)
    assert reason(bytes(lacking[:-900]), tmp_path) in ("truncated", "decode_error")
