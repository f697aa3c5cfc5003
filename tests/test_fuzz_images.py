"""Mutate pictures of every format that Pillow writes: each is read or fails with a reason, soon, in little memory."""

import io
import os
import random
import struct
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image, features

from conftest import little_memory
from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import REASONS, UnreadableError
from featcli.pixels.formats import readable_formats
from featcli.spec.groups import PixelSpec

COUNT = int(os.environ.get("FUZZ_IMAGES", "60"))  # mutations of each seed; make torture asks for more
MOST_SECONDS = 10.0
MOST_GROWTH = 1 << 30  # bytes: the largest picture that the limit allows, in three forms
SIZE = (32, 32)
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def seeds():
    """Return name -> the bytes of a whole file."""
    rgb = Image.fromarray(NOISE)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    ways = {
        "jpeg": ("JPEG", rgb, {"exif": exif}),
        "jpeg progressive": ("JPEG", rgb, {"progressive": True, "quality": 50}),
        "jpeg cmyk": ("JPEG", rgb.convert("CMYK"), {}),
        "png": ("PNG", rgb, {"exif": exif}),
        "png palette": ("PNG", rgb.convert("P"), {"transparency": 3}),
        "png 16 bit": ("PNG", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), {}),
        "png animated": ("PNG", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "webp": ("WEBP", rgb, {"exif": exif}),
        "webp lossless": ("WEBP", rgb.convert("RGBA"), {"lossless": True}),
        "webp animated": ("WEBP", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "gif": ("GIF", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "bmp": ("BMP", rgb, {}),
        "ppm": ("PPM", rgb, {}),
        "pgm 16 bit": ("PPM", Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), {}),
        "ico": ("ICO", rgb, {}),
        "tga": ("TGA", rgb, {"compression": "tga_rle"}),
        "jpeg 2000": ("JPEG2000", rgb, {}),
        "tiff": ("TIFF", rgb, {"exif": exif}),
        "tiff float": ("TIFF", Image.fromarray(NOISE[..., 0].astype(np.float32)), {}),
    }
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        ways[f"tiff {compression}"] = ("TIFF", rgb, {"compression": compression})
    ways["tiff group4"] = ("TIFF", rgb.convert("1"), {"compression": "group4"})
    if features.check("avif"):
        ways["avif"] = ("AVIF", rgb, {})
    for plugin in ("HEIF", "JXL"):
        if plugin in readable_formats():
            ways[plugin.lower()] = (plugin, rgb, {})
    made = {}
    for name, (format_name, picture, options) in ways.items():
        out = io.BytesIO()
        picture.save(out, format_name, **options)
        made[name] = out.getvalue()
    return made


SEEDS = seeds()
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


def mutated(content, rng):
    """Return the content with changes that break parsers: flips, odd numbers, cuts, repeats, mixtures."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = int(len(data) * rng.random() ** 2)  # headers matter most
        what = rng.randrange(7)
        if what == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(INTERESTING))
        elif what == 2:
            data[place : place + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(INTERESTING) & 0xFFFF)
        elif what == 3:
            del data[place : place + rng.randrange(1, 64)]
        elif what == 4:
            data[place:place] = data[place : place + rng.randrange(1, 64)] * rng.choice([1, 2, 50])
        elif what == 5:
            del data[place:]
        else:
            other = rng.choice(list(SEEDS.values()))
            data[place:] = other[place:]
        if not data:
            data = bytearray(content[:1])
    return bytes(data)


def fit(picture):
    assert picture.mode == "RGB"
    return np.asarray(picture.resize(SIZE[::-1])).transpose(2, 0, 1)


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_pictures(tmp_path, name):
    """Whatever the bytes, a picture is read or fails with a reason, soon, and memory stays limited."""
    rng, out = random.Random(name), np.empty((3, *SIZE), np.uint8)
    path = tmp_path / "x"
    image = Input("x", str(path), -1, str(tmp_path))
    rules = [PixelSpec(), PixelSpec(orientation="ignore", alpha="white", depth_range="0:1000")]
    ended = Counter()
    path.write_bytes(SEEDS[name])
    if name != "tiff float":
        assert outcome(image, rules[0], out) == "read"
    with little_memory(MOST_GROWTH):
        for i in range(COUNT):
            path.write_bytes(mutated(SEEDS[name], rng))
            began = time.perf_counter()
            ended[outcome(image, rules[i % 2], out)] += 1
            assert time.perf_counter() - began < MOST_SECONDS, (name, i)
    assert set(ended) <= {"read", *REASONS}
    assert len(ended) > 1, ended


def outcome(image, rules, out):
    """Return `read`, or the reason why not. Any other exception is a bug."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_pixels(image, rules, fit, out)
        except UnreadableError as failure:
            cause = failure.__cause__
            is_bug = isinstance(cause, NameError | AttributeError | AssertionError) and "PIL" not in _raised_in(cause)
            return f"a bug: {cause!r}" if is_bug else failure.reason
    return "read"


def _raised_in(error):
    """Return the file whose line raised an error."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename
