"""Draw images of a dump beside their maps into a PNG, JPEG or WebP: components as colours, the channel mean as heat."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from featcli.dump.target import refuse_taken, write_files
from featcli.errors import UsageError, counted, printable, shown, shown_shape
from featcli.events import Report, silent
from featcli.inputs.labels import LABEL
from featcli.reading.keys import match_keys
from featcli.reading.reader import DumpReader
from featcli.views.dump_pictures import DumpPictures
from featcli.views.stage_view import HIGH, LOW, Colours, evenly_spaced, study

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

STUDIED = 256  # images that colours are fitted to
PANEL, GAP, MARGIN = 224, 10, 20  # pixels
PICTURE = 2 * PANEL + GAP  # the picture stands beside two rows of maps
TITLE, LINE = 40, 20
SIZE, CHARACTER = 14, 7  # of the text: its height, and the usual width of a character
PAPER, INK, FAINT, EDGE = "#ffffff", "#1b1b1b", "#6b6b6b", "#b5b0a5"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST_PIXELS = {"PNG": 40_000, "JPEG": 65_500, "WEBP": 16_383}  # along an edge; for PNG, what other programs still open


@dataclass(frozen=True)
class Drawing:
    """The rows and stages of a dump that are drawn, and the place of their pictures."""

    dump: DumpReader
    rows: Sequence[int]
    stages: Sequence[str]
    pictures: DumpPictures

    @property
    def maps(self) -> list[str]:
        """Those of the stages that hold maps, which can be drawn."""
        return [name for name in self.stages if self.dump.outputs[name].is_map]


def show(drawing: Drawing, output: str, overwrite: bool = False, report: Report = silent) -> None:
    """Draw these images and their maps into the file `output`.

    Raises UsageError for dumps without maps, ConflictError if `output` exists already, DamagedError and MachineError.
    """
    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        known = f"{' '.join(FORMATS)}, or .html for a page"
        raise UsageError(f"-o {shown(output)}: no picture has that suffix", f"use one of {known}")
    refuse_taken(path, overwrite)
    dump, rows = drawing.dump, drawing.rows
    if not rows:
        raise UsageError(f"dump {dump.name}: no image of it has maps", "give -o page.html for a page that says why")
    colours = _fitted(drawing, report)
    found = [drawing.pictures[row] for row in rows]
    kind = FORMATS[path.suffix.lower()]
    sheet = _sheet(dump, rows, found, colours, MOST_PIXELS[kind])
    write_files({path: lambda partial: sheet.save(partial, kind)}, overwrite)


def rows_of(dump: DumpReader, keys: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Return the rows of keys, of keys without suffix, and of patterns: see featcli.reading.keys.

    A pattern adds rows that are not there yet and have maps. The second result counts the rows without maps, by
    pattern. Raises UsageError for a text that stands for nothing, and for a key without maps.
    """
    rows: list[int] = []
    without_maps: dict[str, int] = {}
    for match in match_keys(keys, dump.rows):
        if match.is_pattern and (drawn := [row for row in match.rows if dump.valid[row]]):
            there = {*rows}
            rows += [row for row in drawn if row not in there]
            if len(drawn) < len(match.rows):
                without_maps[match.text] = len(match.rows) - len(drawn)
        else:
            for row in match.rows:
                _refuse_without_maps(dump, row)
            rows += match.rows
    return rows, without_maps


def rows_to_draw(dump: DumpReader, count: int) -> list[int]:
    """Return `count` rows with maps, evenly spaced over the dump."""
    return evenly_spaced(np.flatnonzero(dump.valid).tolist(), count)


def _refuse_without_maps(dump: DumpReader, row: int) -> None:
    if not dump.valid[row]:
        failure = next((f for f in dump.failures if f["row"] == row), None)
        why = f"{failure['reason']} ({failure['detail']})" if failure else "its shard is not finished yet"
        why += f" in {failure['dump']}" if failure and "dump" in failure else ""
        raise UsageError(f"key {shown(dump.keys[row])}: it has no maps: {why}", "choose another key")


def _fitted(drawing: Drawing, report: Report) -> dict[str, Colours]:
    """Return the colours of each stage that has maps. Raises UsageError where none has."""
    dump, stages = drawing.dump, drawing.maps
    if not stages:
        _refuse_vectors(drawing)
    rows = evenly_spaced(np.flatnonzero(dump.valid).tolist(), STUDIED)
    found = {}
    report("start", images=len(stages), done=0)
    for name in stages:
        colours = study(dump[name], rows)[1]
        if colours is not None:
            found[name] = colours
        report("batch", images=1)
    return found


def _refuse_vectors(drawing: Drawing) -> NoReturn:
    dump = drawing.dump
    if maps := [name for name, one in dump.outputs.items() if one.is_map]:
        are = "is no map" if len(drawing.stages) == 1 else "are no maps"
        raise UsageError(
            f"dump {dump.name}: {' and '.join(drawing.stages)} {are}, so there is nothing to draw",
            f"choose maps with --stage {','.join(maps)}, or run featcli show DUMP -o page.html, which surveys vectors",
        )
    what = "its maps were pooled to vectors" if dump.stages else "it holds vectors alone"
    raise UsageError(
        f"dump {dump.name}: {what}, so there is nothing to draw",
        "run featcli show DUMP -o page.html, which surveys vectors, or extract with --pool none or 7x7",
    )


def _sheet(
    dump: DumpReader,
    rows: Sequence[int],
    pictures: Sequence[Image.Image | None],
    colours: dict[str, Colours],
    limit: int,
) -> Image.Image:
    """Draw for each image its picture on the left, and its maps in two rows, stage by stage, to the right.

    Raises UsageError if the sheet would have more than `limit` pixels along an edge.
    """
    from PIL import Image, ImageDraw

    width = 2 * MARGIN + PICTURE + len(colours) * (GAP + PANEL)
    characters = (width - 2 * MARGIN) // CHARACTER
    lines = textwrap.wrap(_caption(dump), characters)
    height = MARGIN + TITLE + len(rows) * (2 * (PANEL + GAP) + LINE) + len(lines) * LINE + MARGIN
    if max(width, height) > limit:
        raise UsageError(
            f"{counted(len(rows), 'image')} of {counted(len(colours), 'stage')} make a picture of {width}x{height}"
            f" pixels, and this format ends at {limit:,}",
            "draw fewer images or stages (--num-images, --stage), or a page: -o page.html",
        )
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = {name: MARGIN + PICTURE + GAP + column * (PANEL + GAP) for column, name in enumerate(colours)}
    for name, left in lefts.items():
        _write(draw, (left, MARGIN), _cut(name, PANEL), INK)
        _write(draw, (left, MARGIN + LINE - 2), shown_shape(dump.outputs[name].shape), FAINT)
    top = MARGIN + TITLE
    for row, picture, title in zip(rows, pictures, _titles(dump, rows), strict=True):
        _write(draw, (MARGIN, top), _cut(_plain(title), width - 2 * MARGIN), INK)
        top += LINE
        if picture is None:
            draw.rectangle((MARGIN, top, MARGIN + PICTURE - 1, top + PICTURE - 1), outline=EDGE)
            _write(draw, (MARGIN + 12, top + PICTURE // 2 - 9), "its picture cannot be shown", FAINT)
        else:
            _paste(draw, sheet, _panel(np.asarray(picture), PICTURE, smooth=True), (MARGIN, top))
        for name, of_stage in colours.items():
            maps = dump[name][row]
            _paste(draw, sheet, _panel(of_stage.components_of(maps), PANEL), (lefts[name], top))
            _paste(draw, sheet, _panel(of_stage.mean_of(maps), PANEL), (lefts[name], top + PANEL + GAP))
        top += PICTURE + GAP
    for line in lines:
        _write(draw, (MARGIN, top), line, FAINT)
        top += LINE
    return sheet


def _titles(dump: DumpReader, rows: Sequence[int]) -> list[str]:
    """Return the key of each row, with its label if no folder of the key is called so."""
    cells = dict(dump.columns.rows(sorted({*rows})))
    labels = [cells[row].get(LABEL) for row in rows]
    keys = [dump.keys[row] for row in rows]
    return [
        key if label is None or str(label) in key.split("/") else f"{key}: {label}"
        for key, label in zip(keys, labels, strict=True)
    ]


def _caption(dump: DumpReader) -> str:
    studied = min(STUDIED, int(dump.valid.sum()))
    return (
        "Above: the first three principal components of each stage as red, green and blue. Below: the mean over"
        f" channels, dark to bright. Both are fitted to {counted(studied, 'image')} of the dump, so a colour means the"
        f" same in every picture; the lowest {LOW}% and the highest {100 - HIGH}% are cut off."
        f" {'; '.join(_checkpoints(dump))}"
    )


def _checkpoints(dump: DumpReader) -> list[str]:
    """Return the checkpoint of the dump, or that of each of dumps along outputs, with what its weights are."""
    names = list(dump.dumps.items()) if dump.is_along_outputs else [("", dump)]
    said = [(f"{name} " if name else "", one.plan.provenance) for name, one in names]
    return [printable(f"{lead}{words['checkpoint']}: {words['weights']}") for lead, words in said]


def _paste(draw: ImageDraw.ImageDraw, sheet: Image.Image, panel: Image.Image, place: tuple[int, int]) -> None:
    """Put a picture on the sheet with an edge around it, because a white picture would have none."""
    left, top = place
    draw.rectangle((left - 1, top - 1, left + panel.width, top + panel.height), outline=EDGE)
    sheet.paste(panel, place)


def _panel(pixels: np.ndarray, edge: int, smooth: bool = False) -> Image.Image:
    """Return (H, W, 3) as a picture whose longer edge has `edge` pixels. Cells stay cells, and proportions stay."""
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = edge / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return Image.fromarray(pixels).resize(size, how)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: str) -> None:
    from PIL import ImageFont

    draw.text(place, text, colour, ImageFont.load_default(SIZE))


def _plain(key: str) -> str:
    """Return the key in one line. Characters that the font lacks are escaped: it has Latin without accents."""
    return printable(key).replace("\n", "\\n").encode("ascii", "backslashreplace").decode()


def _cut(text: str, width: int) -> str:
    """Return the text, without its middle if it is wider than `width` pixels."""
    from PIL import ImageFont

    half, shown = len(text) // 2, text
    while half and ImageFont.load_default(SIZE).getlength(shown) > width:
        half -= 1
        shown = f"{text[:half]}...{text[-half:]}"
    return shown
