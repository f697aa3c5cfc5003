"""Read every kind of TIFF and JPEG 2000 that can be written here: each must equal its array, or be refused.

A kind is a mode, a depth, a layout and a way to read it. The expected pixels come from the array alone, by the rules of
docs/pictures.md, with tolerance 0. Other readers, as far as they are installed (`pip install rasterio pyvips[binary]
av`), say whether a file is what it is meant to be: they are asked for its samples. A kind is confirmed if one of them
finds those of the array. If one finds others, either the reason is known, or the kind counts as contradicted. The exit
code is 1 if anything differs, or if a kind that is decoded is contradicted.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiffs
import witnesses
from PIL import Image
from tiffs import CMYK, EXTRA, GREY, GREY_WHITE_IS_ZERO, PALETTE, PHOTOMETRIC, PLANAR, RGB, SHORT, Layout
from witnesses import OTHER, SAME, UNREAD, Peculiarity

from featcli.inputs.image_list import Image as Input
from featcli.pixels.decode import read_pixels
from featcli.pixels.failure import UnreadableError
from featcli.spec.groups import PixelSpec

HEIGHT, WIDTH = 19, 21
DROP, ON_WHITE, IGNORED = PixelSpec(), PixelSpec(alpha="white"), PixelSpec(orientation="ignore")
WITH_RANGE = PixelSpec(depth_range="10:3000")
NAMES = {GREY: "grey", GREY_WHITE_IS_ZERO: "grey, white is zero", RGB: "RGB", PALETTE: "palette", CMYK: "CMYK"}
ALPHA = {0: "ignored sample", 1: "multiplied alpha", 2: "alpha"}


@dataclass(frozen=True)
class Cell:
    """A file with a picture of one kind."""

    mode: str
    depth: str
    layout: str
    data: bytes
    expected: np.ndarray | None  # (H, W, 3); None if it must be refused
    rules: PixelSpec = DROP
    samples: np.ndarray | None = None  # what another reader must find, (H, W, S)
    bits: int = 8
    seen: np.ndarray | None = None  # the samples as libvips should return them, if that is known
    peculiar: tuple[Peculiarity, ...] = ()  # what libvips does differently


def read(cell, folder):
    """Return (H, W, 3), or the failure."""
    path, found = folder / "picture", []
    path.write_bytes(cell.data)

    def fit(picture):
        found.append(np.asarray(picture))
        return np.zeros((3, 1, 1), np.uint8)

    try:
        image = Input("picture", str(path), len(cell.data))
        read_pixels(image, cell.rules, fit, np.zeros((3, 1, 1), np.uint8))
    except UnreadableError as error:
        return error
    return found[0]


def verdict(cell, folder):
    """Return `equal`, `refused: why` or `DIFFERENT: how`."""
    found = read(cell, folder)
    if isinstance(found, UnreadableError):
        return f"refused: {found.reason}: {found.detail}"
    if cell.expected is None:
        return "DIFFERENT: read, and should not be"
    if found.shape != cell.expected.shape:
        return f"DIFFERENT: {found.shape} for {cell.expected.shape}"
    most = np.abs(found.astype(int) - cell.expected).max()
    return f"DIFFERENT: by {most}" if most else "equal"


# Expected pixels, from the array alone.


def eight_bits(values, bits, is_colour, known=None):
    if known is None and bits == 16 and is_colour:
        return (values >> 8).astype(np.uint8)
    low, high = known or (0, 2**bits - 1)
    return ((values.astype(float) - low) * 255 / (high - low)).round().clip(0, 255).astype(np.uint8)


def on(background, shown, alpha):
    """Composite by Pillow: (H, W, 3) and (H, W)."""
    picture = Image.fromarray(np.dstack([shown, alpha]), "RGBA")
    whole = Image.new("RGBA", picture.size, background)
    whole.alpha_composite(picture)
    return np.asarray(whole.convert("RGB"))


def unmultiplied(shown, alpha):
    out = np.minimum(255, shown.astype(int) * 255 // np.maximum(alpha, 1)[..., None])
    return np.where(alpha[..., None] == 0, 0, out).astype(np.uint8)


def expected(samples, bits, meaning, extra, rules, colours=None):
    known = rules.black_and_white if bits > 8 else None
    count = {RGB: 3, CMYK: 4}.get(meaning, 1)
    is_colour = count > 1
    values = samples[..., :count].astype(np.int64)
    if meaning == PALETTE:
        shown = colours[samples[..., 0]]
    elif meaning == GREY_WHITE_IS_ZERO and known:
        shown = eight_bits(sum(known) - values, bits, False, known)
    else:
        values = 2**bits - 1 - values if meaning == GREY_WHITE_IS_ZERO else values
        shown = eight_bits(values, bits, is_colour, known)
    if meaning == CMYK:
        return np.asarray(Image.fromarray(shown, "CMYK").convert("RGB"))
    shown = np.repeat(shown, 3, 2) if shown.shape[2] == 1 else shown
    if extra[:1] in ((1,), (2,)):
        alpha = eight_bits(samples[..., count].astype(np.int64), bits, is_colour)
        shown = unmultiplied(shown, alpha) if extra[0] == 1 else shown
        return on(rules.alpha, shown, alpha) if rules.alpha != "drop" else shown
    return shown


# The grid.


def drawn(count, bits, rng, kind="u"):
    """Return (H, W, count) random samples, with the extremes among them."""
    if kind == "f":
        values = rng.normal(1000, 1500, (HEIGHT, WIDTH, count))
        return values.astype({16: np.float16, 32: np.float32, 64: np.float64}[bits])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "i" else (0, 2**bits - 1)
    size = 1 if bits <= 8 else 2 if bits <= 16 else bits // 8
    values = rng.integers(low, high, (HEIGHT, WIDTH, count), f"{kind}{size}", endpoint=True)
    if bits > 16:
        values[::2] = rng.integers(0, 5000, values[::2].shape)
    values[0, :4] = np.array([low, high, min(low + 1, high), max(high - 1, low)], values.dtype)[:, None]
    return values


def layouts(bits, kind):
    """Yield every layout that a reader may meet for samples of this kind."""
    ways = [(way, 1) for way in (tiffs.NONE, tiffs.LZW, tiffs.DEFLATE, tiffs.PACKBITS, tiffs.ZSTD, tiffs.LZMA)]
    ways += [(tiffs.OLD_DEFLATE, 1)]
    if kind == "f":
        ways += [(tiffs.DEFLATE, 3), (tiffs.LZW, 3)]
    elif bits in (8, 16, 32):
        ways += [(tiffs.DEFLATE, 2), (tiffs.LZW, 2), (tiffs.ZSTD, 2)]
    for order, big, planar, tiles in itertools.product("<>", (False, True), (False, True), (False, True)):
        for compression, predictor in ways:
            yield Layout(order, big, planar, tiles, compression, predictor)
    yield from (Layout(order, planar=planar, lowest_bit_first=True) for order in "<>" for planar in (False, True))
    yield from (Layout(order, compression=tiffs.LZW, lowest_bit_first=True) for order in "<>")


def described(layout):
    ways = {1: "raw", 5: "LZW", 8: "deflate", 32946: "old deflate", 32773: "PackBits", 34925: "LZMA", 50000: "zstd"}
    return " ".join([
        "II" if layout.order == "<" else "MM",
        "Big" if layout.big else "",
        "planar" if layout.planar else "",
        "tiles" if layout.tiles else "strips",
        ways[layout.compression],
        f"predictor {layout.predictor}" if layout.predictor > 1 else "",
        "lowest bit first" if layout.lowest_bit_first else "",
    ])  # fmt: skip


def modes():
    """Yield (meaning, samples, extra)."""
    for meaning in (GREY, GREY_WHITE_IS_ZERO):
        yield from ((meaning, 1, ()), (meaning, 2, (0,)), (meaning, 2, (2,)))
    yield GREY, 2, (1,)
    yield from ((RGB, 3, ()), (RGB, 4, ()), (RGB, 4, (0,)), (RGB, 4, (1,)), (RGB, 4, (2,)))
    yield from ((RGB, 5, (0, 0)), (RGB, 5, (1, 0)), (RGB, 5, (2, 0)), (CMYK, 4, ()), (CMYK, 5, (0,)))
    yield from ((PALETTE, 1, ()), (PALETTE, 2, (2,)))


def named(meaning, count, extra):
    plain = {RGB: 3, CMYK: 4}.get(meaning, 1)
    more = ALPHA[extra[0]] if extra else "fourth sample" if count > plain else ""
    return NAMES[meaning] + (f" + {more}" if more else "") + (" + 1" if len(extra) > 1 else "")


def whole_numbers(rng):
    """Yield unsigned integers of 1 to 16 bits, whose range is known."""
    for (meaning, count, extra), bits in itertools.product(modes(), range(1, 17)):
        if meaning == PALETTE and bits > 8:
            continue
        samples = drawn(count, bits, rng)
        maps = [None]
        if meaning == PALETTE:
            wide = rng.integers(0, 65536, (3, 2**bits))
            maps = [(wide, (wide >> 8).T.astype(np.uint8)), (wide >> 8, (wide >> 8).T.astype(np.uint8))]
        seen = extra or ((2,) if (meaning, count) == (RGB, 4) else ())
        readings = [DROP, *[ON_WHITE] * (seen[:1] in ((1,), (2,))), *[WITH_RANGE] * (bits > 8)]
        for layout, colours, rules in itertools.product(layouts(bits, "u"), maps, readings):
            yield partial(whole_number, samples, bits, meaning, (extra, seen), (layout, colours, rules))


def whole_number(samples, bits, meaning, extras, way):
    (extra, seen), (layout, colours, rules) = extras, way
    tags = [(338, SHORT, list(extra))] if extra else []
    tags += [(320, SHORT, colours[0].ravel().tolist())] if colours else []
    return Cell(
        named(meaning, samples.shape[2], extra) + (" of 8-bit colours" if colours and colours[0].max() < 256 else ""),
        f"{bits}",
        described(layout) + said(rules),
        tiffs.tiff(samples, bits, meaning, layout, tags),
        expected(samples, bits, meaning, seen, rules, colours and colours[1]),
        rules,
        samples,
        bits,
        seen_by_libvips(samples, bits, meaning, colours),
        peculiarities(samples, bits, meaning, extra, layout),
    )


def seen_by_libvips(samples, bits, meaning, colours):
    """Return samples as libvips returns them: inverted, through the palette, greys of a few bits spread over 8."""
    if meaning == PALETTE:
        return np.dstack([colours[1][samples[..., 0]], samples[..., 1:]])
    values = samples.astype(np.int64)
    if meaning == GREY_WHITE_IS_ZERO:
        values = 2**bits - 1 - values
    return witnesses.spread(values, bits)


def peculiarities(samples, bits, meaning, extra, layout):
    """Return what libvips does to this kind of TIFF that others do not."""
    found = []
    if extra[:1] == (1,):
        found.append(Peculiarity("colours are divided by their alpha", {EXTRA: 2}))
    if meaning == PALETTE and samples.shape[2] > 1 and bits < 8:
        found.append(Peculiarity("alpha of few bits beside a palette is something else; colours are right", channels=3))
    if meaning == GREY_WHITE_IS_ZERO and (samples.shape[2] > 1 or samples.dtype.kind != "u" or bits > 16):
        found.append(Peculiarity("white is zero: alpha, or what has no range, is inverted too", {PHOTOMETRIC: GREY}))
    if layout.planar and not layout.tiles and bits < 8:  # for one plane, the same file without planes shows it
        why, tags = "strips of planes of few bits are taken for bytes", {PLANAR: 1}
        found.append(Peculiarity(why, tags) if samples.shape[2] == 1 else Peculiarity(why, channels=0))
    elif layout.planar and not layout.tiles and samples.shape[2] > 1:
        found.append(Peculiarity("rows of planes are sought at the wrong places", step=tiffs.ROWS))
    return tuple(found)


def said(rules):
    range_ = f" range {rules.depth_range}" if rules.depth_range else ""
    return range_ + (f" on {rules.alpha}" if rules.alpha != "drop" else "")


def other_numbers(rng):
    """Yield signed, long and floating-point samples: refused without a range, and read by one."""
    kinds = [("i", 8), ("i", 16), ("i", 32), ("i", 64), ("u", 32), ("u", 64), ("f", 16), ("f", 32), ("f", 64)]
    for (kind, bits), (meaning, count, extra) in itertools.product(kinds, modes()):
        if meaning != PALETTE:
            samples = drawn(count, bits, rng, kind)
            for layout, rules in itertools.product(layouts(bits, kind), (DROP, WITH_RANGE)):
                yield partial(other_number, samples, bits, meaning, extra, (layout, rules))


def other_number(samples, bits, meaning, extra, way):
    (layout, rules), kind = way, samples.dtype.kind
    shown = None
    if rules is WITH_RANGE and meaning in (GREY, RGB):
        numbers = samples.astype(np.float64 if bits == 64 else np.float32)
        reduced = ((numbers - 10) / (2990 / 255)).round().clip(0, 255).astype(np.uint8)
        shown = np.repeat(reduced[..., :1], 3, 2) if meaning == GREY else reduced[..., :3]
        if extra[:1] == (1,):
            shown = unmultiplied(shown, reduced[..., shown.shape[2] if meaning == RGB else 1])
    return Cell(
        named(meaning, samples.shape[2], extra),
        {"i": "signed ", "u": "", "f": "float "}[kind] + str(bits),
        described(layout) + said(rules),
        tiffs.tiff(samples, bits, meaning, layout, [(338, SHORT, list(extra))] if extra else []),
        shown,
        rules,
        samples,
        bits,
        samples if meaning != GREY_WHITE_IS_ZERO else None,
        peculiarities(samples, bits, meaning, extra, layout),
    )


def orientations(rng):
    """Yield TIFFs that lie on their side, turned or not as asked, both those that Pillow unpacks and others."""
    ways = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # numbers of Image.Transpose
    for number, (bits, planar), rules in itertools.product(range(1, 9), ((8, 0), (16, 1), (12, 0)), (DROP, IGNORED)):
        samples = drawn(3, bits, rng)
        shown = expected(samples, bits, RGB, (), DROP)
        if rules is DROP and number > 1:
            shown = np.asarray(Image.fromarray(shown).transpose(Image.Transpose(ways[number])))
        data = tiffs.tiff(samples, bits, RGB, Layout(planar=bool(planar)), [(274, SHORT, [number])])
        yield partial(
            Cell, f"orientation {number}", f"{bits}", rules.orientation, data, shown, rules, samples, bits, samples
        )


def jpeg_2000(rng):
    """Yield JPEG 2000 by components, depth, sign and boxes, read with a range and without."""
    names = {1: "grey", 2: "grey + alpha", 3: "RGB", 4: "RGB + alpha", 5: "five components"}
    for count, bits, kind, boxes in itertools.product(names, range(1, 17), "ui", ("JP2", "J2K")):
        for rules in (DROP, *[ON_WHITE] * (count in (2, 4)), *[WITH_RANGE] * (bits > 8 and count > 1)):
            samples = drawn(count, bits, rng, kind)
            yield partial(jpeg_2000_cell, samples, bits, f"JPEG 2000, {names[count]}", boxes, rules)


def jpeg_2000_cell(samples, bits, mode, boxes, rules):
    import imagecodecs

    values, count = samples.astype(np.int64) + (2 ** (bits - 1) if samples.dtype.kind == "i" else 0), samples.shape[2]
    shown = eight_bits(values, bits, count > 2)
    alpha = shown[..., -1]
    if count == 1 and bits > 8:  # as other 16-bit greys
        in_16 = values << (16 - bits)
        shown = shown if (bits, boxes) == (9, "JP2") else (in_16 / 257).round().astype(np.uint8)
    elif rules is WITH_RANGE:
        low, high = rules.black_and_white
        shown = (((values << (16 - bits)) - low) * 255 / (high - low)).round().clip(0, 255).astype(np.uint8)
    shown = np.repeat(shown[..., :1], 3, 2) if count < 3 else shown[..., :3]
    shown = on(rules.alpha, np.ascontiguousarray(shown), alpha) if rules is ON_WHITE else shown
    data = imagecodecs.jpeg2k_encode(
        samples[..., 0] if count == 1 else samples, level=0, reversible=True, bitspersample=bits, codecformat=boxes
    )
    sign = "signed " if samples.dtype.kind == "i" else ""
    wanted = None if count == 5 else shown
    return Cell(mode, sign + str(bits), boxes + said(rules), bytes(data), wanted, rules, samples, bits)


def grid():
    """Return what makes each cell."""
    for part in (jpeg_2000, orientations, whole_numbers, other_numbers):
        yield from part(np.random.default_rng(0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth of them")
    chosen = parser.parse_args()
    counts, reasons, explained, wrong = defaultdict(Counter), Counter(), Counter(), []
    asked = witnesses.installed()
    with tempfile.TemporaryDirectory() as folder:
        for make in itertools.islice(grid(), 0, None, chosen.every):
            cell = make()
            found = verdict(cell, Path(folder))
            row = counts[cell.mode, cell.depth]
            row["all"] += 1
            row[found.partition(":")[0]] += 1
            if found.startswith("refused"):
                reasons[found.removeprefix("refused: ")] += 1
            if found.startswith("DIFFERENT") or (found.startswith("refused") and cell.expected is not None):
                wrong.append(f"{cell.mode}, {cell.depth} bits, {cell.layout}: {found}")
            said = witnesses.testimony(cell, asked)
            state = state_of(said.values())
            row[state] += 1
            row[f"equal, {state}"] += found == "equal"
            for name, answer in said.items():
                row[f"{name} {answer}"] += 1
                if answer not in (SAME, OTHER, UNREAD):
                    explained[f"{name}: {answer} ({state})"] += 1
            if state == "contradicted" and found == "equal":
                wrong.append(f"{cell.mode}, {cell.depth} bits, {cell.layout}: contradicted, {said}")
    columns = ("all", "equal", "refused", "DIFFERENT", "confirmed", "explained", "contradicted", "no witness")
    print("mode".ljust(42), "bits".ljust(10), *(column.rjust(12) for column in columns))
    for (mode, depth), row in counts.items():
        print(mode.ljust(42), depth.ljust(10), *(str(row[column] or "").rjust(12) for column in columns))
    total = sum(counts.values(), Counter())
    print("together".ljust(53), *(str(total[column]).rjust(12) for column in columns))
    states = ("confirmed", "explained", "contradicted", "no witness")
    print("Decoded and equal:", ", ".join(f"{total[f'equal, {state}']} {state}" for state in states))
    for name in asked:
        print(f"{name}: {total[f'{name} {SAME}']} the same, {total[f'{name} {OTHER}']} others without a known cause")
    print("Others, with a known cause:")
    print(*(f"{count:7} {why}" for why, count in explained.most_common()), sep="\n")
    print("Refused:")
    print(*(f"{count:7} {reason}" for reason, count in reasons.most_common()), sep="\n")
    print(*wrong[:100], f"{len(wrong)} not as expected", sep="\n")
    return 1 if wrong else 0


def state_of(answers):
    """Return `confirmed` if one says so and all others are explained; `explained`; `contradicted`; or `no witness`."""
    found = {answer for answer in answers if answer is not UNREAD}
    if OTHER in found:
        return "contradicted"
    return "confirmed" if SAME in found else "explained" if found else "no witness"


if __name__ == "__main__":
    sys.exit(main())
