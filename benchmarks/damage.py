"""Read cut, shortened and whole pictures of every kind that can be written here, and count what is refused.

    python benchmarks/damage.py --pictures 300

A whole picture must be read, with Pillow's pixels. One that ends early, with whatever end marker, must be refused, or
have the right pixels nevertheless, except in the last block of a JPEG. libvips, told to fail on warnings, is the
witness if it is installed.
"""

import argparse
import io
import re
import struct
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import UnreadableError
from featcli.spec.groups import PixelSpec

try:
    import pyvips
except ImportError:
    pyvips = None
EOI = b"\xff\xd9"
CORNER = 256  # pixels of the last unit of a JPEG, in which some may be invented


def read(content: bytes, folder: Path) -> np.ndarray | None:
    """Return the pixels of a file, or None if it is refused."""
    path, found = folder / "picture", []
    path.write_bytes(content)

    def fit(picture: Image.Image) -> np.ndarray:
        found.append(np.asarray(picture))
        return np.zeros((3, 1, 1), np.float32)

    try:
        read_pixels(Input("picture", str(path), len(content)), PixelSpec(), fit, np.zeros((3, 1, 1), np.float32))
    except UnreadableError:
        return None
    return found[0]


def picture(rng: np.random.Generator, kind: str) -> Image.Image:
    width, height = (int(edge) for edge in rng.integers(1, 200, 2))
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack(
        [127 + 100 * np.sin(x / 17 + y / 31), 127 + 90 * np.cos(y / 23), 127 + 80 * np.sin((x + y) / 31)], -1
    )
    pixels = {
        "noise": lambda: rng.integers(0, 256, (height, width, 3)),
        "flat": lambda: np.full((height, width, 3), rng.integers(0, 256, 3)),
        "photograph": lambda: (waves + rng.normal(0, 4, waves.shape)).clip(0, 255),
    }[kind]()
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, format_name: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format_name, **options)
    return out.getvalue()


def jpegs(rng: np.random.Generator, count: int):
    """Yield (what it is, content) of JPEGs with random sizes, colours, qualities, tables, scans and restarts."""
    for number in range(count):
        mode = ["RGB", "L", "CMYK", "RGB"][int(rng.integers(4))]
        options = {"quality": int(rng.integers(1, 101)), "optimize": bool(rng.integers(2))}
        options["progressive"] = bool(rng.integers(2))
        if mode == "RGB":
            options["subsampling"] = int(rng.integers(3))
        restarts = int(rng.integers(4))
        if restarts == 1:
            options["restart_marker_rows"] = int(rng.integers(1, 4))
        elif restarts == 2:
            options["restart_marker_blocks"] = int(rng.integers(1, 50))
        image = picture(rng, ["noise", "flat", "photograph"][number % 3]).convert(mode)
        yield ("progressive JPEG" if options["progressive"] else "JPEG"), saved(image, "JPEG", **options)


def others(rng: np.random.Generator, count: int):
    """Yield (what it is, content) of other formats, each whole."""
    kinds = {
        "PNG": {},
        "WEBP": {},
        "lossless WEBP": {"lossless": True},
        "AVIF": {},
        "GIF": {},
        "BMP": {},
        "PPM": {},
        "TGA": {},
        "packed TGA": {"compression": "tga_rle"},
        "TIFF": {},
        "packed TIFF": {"compression": "tiff_adobe_deflate"},
        "JPEG2000": {},
    }
    for _ in range(count):
        for name, options in kinds.items():
            yield name, saved(picture(rng, "photograph"), name.split()[-1], **options)


def early_ends(content: bytes, rng: np.random.Generator):
    """Yield a JPEG cut anywhere in its data, with an end marker, and one whose header has more lines than it."""
    body = content.index(b"\xff\xda") + 14
    near = [len(content) - 2 - cut for cut in range(1, 9)]
    for cut in {*near, *(int(at) for at in rng.integers(body, max(body + 1, len(content) - 9), 8))}:
        if cut > body:
            yield content[:cut].rstrip(b"\xff") + EOI
    at = re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", content).start()
    lines = struct.unpack(">H", content[at + 5 : at + 7])[0]
    yield content[: at + 5] + struct.pack(">H", lines + 16) + content[at + 7 :]


def short_pngs(content: bytes):
    """Yield a PNG whose data are packed again without some of its last rows, with right checksums and end."""
    width, height = struct.unpack(">II", content[16:24])
    at, data = 33, b""
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        data += content[at + 8 : end - 4] if content[at + 4 : at + 8] == b"IDAT" else b""
        at = end
    rows = zlib.decompress(data)
    for lost in {1, height // 2}:
        packed = zlib.compress(rows[: -lost * (1 + 3 * width)])
        if 0 < lost < height:
            chunk = b"IDAT" + packed
            whole = len(packed).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
            yield content[:33] + whole + content[-12:]


def warns(content: bytes) -> bool:
    """Return whether libvips refuses a file when it is told to fail on warnings."""
    try:
        pyvips.Image.new_from_buffer(content, "", fail_on="warning").write_to_memory()
    except pyvips.Error:
        return True
    return False


def judged(count: Counter, name: str, content: bytes, truth: np.ndarray, folder: Path) -> int:
    """Count what happens to a file that ends early. Returns how many of its pixels are invented."""
    found = read(content, folder)
    if pyvips is not None and "JPEG" in name and "2000" not in name:
        ours, theirs = ("refused" if is_bad else "read" for is_bad in (found is None, warns(content)))
        count[f"{name}: early ends {ours} here, {theirs} by libvips"] += 1
    if found is None:
        count[f"{name}: early ends refused"] += 1
        return 0
    wrong = (
        int((found[: len(truth)] != truth[: len(found)]).any(-1).sum()) if found.shape == truth.shape else found.size
    )
    count[f"{name}: early ends read, " + ("to the right pixels" if not wrong else "some pixels made up")] += 1
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, count, most, refused = np.random.default_rng(asked.seed), Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, content in [*jpegs(rng, asked.pictures), *others(rng, max(1, asked.pictures // 30))]:
            with Image.open(io.BytesIO(content)) as image:
                truth = np.asarray(image.convert("RGB"))
            found = read(content, folder)
            is_right = found is not None and np.array_equal(found, truth)
            count[f"{kind}: whole, " + ("read" if is_right else "REFUSED OR WRONG")] += 1
            refused += not is_right
            cuts = early_ends(content, rng) if kind.endswith("JPEG") else [content[: len(content) * 2 // 3]]
            for bad in [*cuts, *(short_pngs(content) if kind == "PNG" else [])]:
                most[kind] = max(most[kind], judged(count, kind, bad, truth, folder))
    for what, number in sorted(count.items()):
        print(f"{number:7,}  {what}")
    print("most pixels made up:", ", ".join(f"{kind} {number}" for kind, number in most.items() if number) or "none")
    too_many = [kind for kind, number in most.items() if number > (CORNER if "JPEG" in kind else 0)]
    sys.exit(1 if refused or too_many else 0)


if __name__ == "__main__":
    main()
