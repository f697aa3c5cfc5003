import fcntl
import os
import signal
import socket
import struct
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from conftest import SAMPLES, draw, upright
from featcli.errors import MachineError
from featcli.inputs.image_list import MISSING
from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import REASONS, UnreadableError
from featcli.spec.groups import PixelSpec

SIZE = (40, 48)


def fit(picture):
    assert picture.mode == "RGB"
    return np.asarray(picture.resize(SIZE[::-1])).transpose(2, 0, 1)


def pixels(path, size=MISSING, rules=PixelSpec()):  # noqa: B008
    out = np.full((3, *SIZE), 77, np.uint8)
    read_pixels(Input(str(path), str(path), size), rules, fit, out)
    return out


def reason(path, size=MISSING, rules=PixelSpec()):  # noqa: B008
    with pytest.raises(UnreadableError) as failed:
        pixels(path, size, rules)
    assert failed.value.reason in REASONS
    assert str(path) not in failed.value.detail  # equal work gives equal bytes, wherever the images lie
    return failed.value.reason


@pytest.mark.parametrize("path", sorted(SAMPLES.rglob("*.[jpw]*[gp]")), ids=lambda p: p.name)
def test_every_sample_image_is_upright_rgb(path):
    """Each sample image is read as Pillow shows it upright: JPEG, PNG, WebP, grey, palette, transparent."""
    assert np.array_equal(pixels(path), fit(upright(path)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    """A picture gives the same pixels however the camera was held."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # undoes each orientation, as Image.Transpose
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(draw(tmp_path / "plain.png", 0)) as plain:
        stored = plain.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else plain
        stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), pixels(tmp_path / "plain.png"))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "bmp", "tga", "ppm"])
def test_lossless_formats_agree(tmp_path, suffix):
    """A picture gives the same pixels in every lossless format."""
    with Image.open(draw(tmp_path / "plain.png", 0)) as plain:
        plain.save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(pixels(tmp_path / f"x.{suffix}"), pixels(tmp_path / "plain.png"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_modes(tmp_path, mode):
    """Every mode with at most 8 bits is read as its RGB."""
    suffix = {"CMYK": "tif", "PA": "tif", "YCbCr": "jpg"}.get(mode, "png")
    with Image.open(draw(tmp_path / "plain.png", 0)) as plain:
        converted = plain.convert("P").convert("PA") if mode == "PA" else plain.convert(mode)
        if mode == "PA":
            converted = converted.convert("RGBA")
        converted.save(tmp_path / f"x.{suffix}")
    assert np.array_equal(pixels(tmp_path / f"x.{suffix}"), fit(upright(tmp_path / f"x.{suffix}")))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    """A 16-bit picture keeps its greys; Pillow's own conversion would make it white."""
    ramp = np.tile(np.linspace(0, 65535, SIZE[1]).astype(np.uint16), (SIZE[0], 1))
    Image.fromarray(ramp).save(tmp_path / "x.png")
    assert np.array_equal(pixels(tmp_path / "x.png")[0], (ramp / 257).round().astype(np.uint8))


def test_content_decides_not_the_suffix(tmp_path):
    """A PNG that is named .jpg is read."""
    draw(tmp_path / "x.png", 3)
    (tmp_path / "x.png").rename(tmp_path / "y.jpg")
    assert pixels(tmp_path / "y.jpg").std() > 0


def test_truncated_files(tmp_path):
    """A file that was cut short is a failure, and never a picture with a grey half."""
    for suffix in ("jpg", "png", "tif"):
        path = draw(tmp_path / f"x.{suffix}", 0, (400, 300))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        assert reason(path) in ("truncated", "decode_error"), suffix
    assert reason(tmp_path / "x.jpg") == "truncated"


# A BMP whose colours have four bits each, which Pillow does not read.
ODD_BITMAP = b"BM" + struct.pack(
    "<IHHI IiiHHIIiiII III", 66 + 2, 0, 0, 66, 40, 1, 1, 1, 16, 3, 2, 0, 0, 0, 0, 0xF00, 0xF0, 0xF
) + bytes(2)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "format_not_allowed"),
        (b"%PDF-1.7\n", "format_not_allowed"),
        (b"\xff\xd8\xff\xe0", "decode_error"),
        (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\1\0\1\1\1\x11\0" + bytes(9), "unsupported_depth"),  # JPEG of 12 bits
        (b"\xff\xd8\xff\xe8\0\4LS\xff\xf7\0\x0b\x08\0\1\0\1\1\1\x11\0" + bytes(9), "format_not_allowed"),
        (b"\0\0\0\x1cftypavis", "decode_error"),
        (b"P7\nWIDTH 1\n", "format_not_allowed"),
        (b"PF\n1 1\n-1.0\n", "format_not_allowed"),
        (b"P6 9 9 1023\n" + bytes(40), "truncated"),
        (ODD_BITMAP, "format_not_allowed"),
        pytest.param(np.random.default_rng(0).bytes(2000), "not_an_image", id="noise"),
    ],
)
def test_what_is_no_picture(tmp_path, content, expected):
    """Empty files, web pages, PostScript and noise are failures with a reason, and start no interpreter."""
    (tmp_path / "x.jpg").write_bytes(content)
    assert reason(tmp_path / "x.jpg") == expected


def test_files_that_cannot_be_opened(tmp_path):
    """Missing files, folders, pipes and sockets are failures, and no pipe is waited for."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    assert reason(tmp_path / "pipe.jpg") == "not_regular"
    assert reason(tmp_path / "folder.jpg") == "not_regular"
    assert reason(tmp_path / "socket.jpg") == "not_regular"
    assert reason(tmp_path / "gone.jpg") == "not_found"
    assert reason(tmp_path / "loop.jpg") == "unreadable"


def test_a_file_that_changed(tmp_path):
    """A file whose size differs from the list is a failure, because the plan was made for another picture."""
    path = draw(tmp_path / "x.png", 0)
    assert reason(path, path.stat().st_size + 1) == "changed"
    assert pixels(path, path.stat().st_size).std() > 0


def test_too_many_pixels_cost_nothing(tmp_path, monkeypatch):
    """A picture whose header declares too many pixels is never unpacked."""
    path = draw(tmp_path / "x.png", 0, (96, 80))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    assert reason(path, rules=PixelSpec(max_pixels=95 * 80)) == "too_many_pixels"


def test_unknown_depth(tmp_path):
    """A float picture, whose range is unknown, is a failure."""
    Image.fromarray(np.random.default_rng(0).random((9, 9)).astype(np.float32)).save(tmp_path / "x.tif")
    assert reason(tmp_path / "x.tif") == "unsupported_depth"


def test_damaged_exif_beside_good_pixels(tmp_path):
    """A picture with unreadable EXIF data is read."""
    with Image.open(draw(tmp_path / "plain.png", 0)) as plain:
        plain.save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
        plain.save(tmp_path / "y.jpg")
    assert np.array_equal(pixels(tmp_path / "x.jpg"), pixels(tmp_path / "y.jpg"))


def test_any_decoder_error_is_that_image_alone(tmp_path):
    """Any error of a decoder becomes a reason; a lack of memory ends the run and names the image."""
    path = draw(tmp_path / "x.png", 0)

    def broken(error):
        def fit(picture):
            raise error

        return lambda: read_pixels(Input("x", str(path), MISSING), PixelSpec(), fit, np.empty((3, 4, 4), np.uint8))

    for error in (ValueError("at 0xdeadbeef"), SyntaxError("x"), KeyError(3), RuntimeError()):
        with pytest.raises(UnreadableError) as failed:
            broken(error)()
        assert failed.value.reason == "decode_error"
        assert "0x" not in failed.value.detail
    with pytest.raises(MachineError, match=r"image 'x' does not fit into memory .*--max-pixels.*resumes"):
        broken(MemoryError())()


def test_a_file_that_becomes_a_pipe(tmp_path, monkeypatch):
    """A file that is replaced by a pipe before it is opened is a failure, and no writer is waited for."""
    path, real = draw(tmp_path / "x.png", 0), os.open

    def replacing(name, *rest):
        if name == str(path):
            path.unlink()
            os.mkfifo(path)
        return real(name, *rest)

    monkeypatch.setattr(os, "open", replacing)
    with alarm(10):
        assert reason(path) == "not_regular"


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="leases are Linux's")
def test_a_file_that_a_server_holds(tmp_path):
    """A file that a file server holds is read as soon as the server lets it go, which it is asked to do."""
    path = draw(tmp_path / "x.png", 0)
    with path.open("r+b") as held:
        try:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("this file system knows no leases")
        asked = []

        def let_go(*_):
            asked.append(True)
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)

        before = signal.signal(signal.SIGIO, let_go)
        try:
            found = pixels(path)
        finally:
            signal.signal(signal.SIGIO, before)
    assert asked
    assert np.array_equal(found, fit(upright(path)))


@contextmanager
def alarm(seconds):
    """Fail if the block takes longer."""

    def ring(*_):
        raise AssertionError(f"waited for {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
