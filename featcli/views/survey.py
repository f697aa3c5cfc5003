"""Write a dump as one HTML page that needs no other file: its settings, its numbers, images with maps, and failures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcli.dump.records import pictures_of, said_of_pictures
from featcli.dump.target import refuse_taken, write_files
from featcli.errors import CheckpointError, UsageError, counted, printable, shown_shape, size
from featcli.events import Report, silent
from featcli.inputs.cells import EXACT, Kind
from featcli.reading.reader import DumpReader
from featcli.views.neighbours import averaged, neighbours, neighbours_in_dump, rows_to_compare
from featcli.views.show import STUDIED, Drawing
from featcli.views.stage_view import HIGH, LOW, Colours, Statistics, evenly_spaced, study

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".html", ".htm")
PICTURE, MAP = 224, 64  # pixels along the longer edge, at most
MOST_IMAGES = 1000
MOST_FAILURES = 200  # failures that are named
MOST_COLUMNS, MOST_CHARACTERS = 100, 300  # columns, and characters of a cell, that are shown
MOST_NAMED = 10  # dumps along rows that are named
TEMPLATE, TITLE, FACTS = "survey.html", "FEATCLI-TITLE", "FEATCLI-FACTS"


def survey(drawing: Drawing, output: str, overwrite: bool = False, report: Report = silent) -> None:
    """Write the page with these images.

    Raises UsageError for too many images, ConflictError if `output` exists already, DamagedError and MachineError.
    """
    path = Path(output)
    refuse_taken(path, overwrite)
    if len(drawing.rows) > MOST_IMAGES:
        raise UsageError(
            f"a page holds at most {MOST_IMAGES:,} images, not {len(drawing.rows):,}", "choose fewer images"
        )
    dump, rows, stages = drawing.dump, drawing.rows, drawing.stages
    report("start", images=len(stages) + len(rows) + 1, done=0)
    studied = evenly_spaced(np.flatnonzero(dump.valid).tolist(), STUDIED)
    of_stage: dict[str, tuple[Statistics, Colours | None]] = {}
    for name in stages if studied else ():
        of_stage[name] = study(dump[name], studied)
        report("batch", images=1)
    images: list[dict[str, Any]] = []
    pooled: dict[str, list[np.ndarray]] = {name: [] for name in of_stage}
    for row in rows:
        images.append(_image(dump, row, drawing.pictures[row], of_stage, pooled))
        report("batch", images=1)
    compared = _add_neighbours(dump, rows, images, pooled)
    report("batch", images=1)
    facts = {
        "title": printable(_title(dump)),
        "about": _about(dump),
        "stages": [_stage(dump, name, statistics) for name, (statistics, _) in of_stage.items()],
        "studied": len(studied),
        "compared": compared,
        "cut": [LOW, 100 - HIGH],
        "images": images,
        "columns": _columns(dump, rows),
        "more_columns": max(0, len(dump.columns) - MOST_COLUMNS),
        "valid": int(dump.valid.sum()),
        "failures": [_failure(failure) for failure in dump.failures[:MOST_FAILURES]],
        "failed": dict(Counter(failure["reason"] for failure in dump.failures).most_common()),
    }
    page = _page(facts)
    write_files({path: lambda partial: partial.write_bytes(page)}, overwrite)


def _title(dump: DumpReader) -> str:
    """Return the names of the dumps' folders."""
    first, *others = (one.path.absolute().name for one in dump.dumps.values())
    return first if not others else f"{first} and {others[0] if len(others) == 1 else f'{len(others)} more'}"


def _about(dump: DumpReader) -> list[tuple[str, str]]:
    """Return what the dump is, or each of dumps along outputs, as plans and records say."""
    if not dump.is_along_outputs:
        return _about_rows(dump)
    return [(f"{name}: {what}", text) for name, one in dump.dumps.items() for what, text in _about_rows(one)]


def _about_rows(dump: DumpReader) -> list[tuple[str, str]]:
    """Return what a dump is, or dumps along rows. Settings and versions are those of the first."""
    plan, settings = dump.plan, dump.plan.settings
    missing = dump.along_rows.num_shards - len(dump.records)
    state = "" if not missing else f"; {counted(missing, 'shard')} missing"
    edges = settings.largest if settings.is_native else settings.input_size
    try:
        preprocessing = dump.preprocessing.summary
    except CheckpointError:
        preprocessing = "as its checkpoint says"
    stored = sum(record["bytes"] for record in dump.records.values())
    facts = [
        ("checkpoint", plan.provenance["checkpoint"]),
        ("weights", plan.provenance["weights"]),
        ("images", f"{len(dump):,}: {int(dump.valid.sum()):,} written, {len(dump.failures):,} failed{state}"),
        *(("pictures", text) for text in said_of_pictures(plan, pictures_of(dump.records.values()))),
        ("input", f"{'x'.join(map(str, edges)) if edges else 'any size'}: {preprocessing}"),
        ("maps", f"pool {plan.reductions}, norm {dump.norm}, computed in {settings.precision}"),
        ("stored", f"{settings.format}, {size(stored)} in {counted(len(dump.records), 'shard')}"),
        ("made by", ", ".join(f"{name} {version}" for name, version in plan.environment.items())),
        *(("fingerprint", one.plan.fingerprint) for one in dump.along_rows.dumps[:MOST_NAMED]),
    ]
    return [(name, printable(str(text))) for name, text in facts]


def _stage(dump: DumpReader, name: str, statistics: Statistics) -> dict[str, Any]:
    stage = dump.outputs[name]
    numbers = asdict(statistics) | {"dead": statistics.dead[:50], "num_dead": len(statistics.dead)}
    return {
        "name": printable(name),
        "shape": shown_shape(stage.shape),
        "module": printable(stage.module),
        "stride": "x".join(map(str, stage.stride or ())) or "none",
        "drawn": stage.is_map,
        "dtype": stage.dtype,
        **numbers,
    }


def _failure(failure: Mapping[str, Any]) -> dict[str, str]:
    lead = f"{failure['dump']}: " if "dump" in failure else ""
    return {
        "key": printable(str(failure["key"])),
        "reason": printable(str(failure["reason"])),
        "detail": printable(f"{lead}{failure['detail']}"),
    }


def _image(
    dump: DumpReader,
    row: int,
    picture: Image.Image | None,
    of_stage: Mapping[str, tuple[Statistics, Colours | None]],
    pooled: dict[str, list[np.ndarray]],
) -> dict[str, Any]:
    """Return an image with its pictures as data. Its averages over all positions go into `pooled`, stage by stage."""
    maps = {}
    for name, (_, colours) in of_stage.items():
        found = dump[name][row]
        pooled[name].append(averaged(dump.outputs[name], found[None])[0])
        if colours is not None:
            drawn = (colours.components_of(found), colours.mean_of(found))
            maps[name] = [_as_data(_small(pixels, MAP), "PNG") for pixels in drawn]
    seen = None if picture is None else _as_data(_small(np.asarray(picture), PICTURE), "JPEG")
    key = dump.keys[row]
    return {
        "key": printable(key),
        "row": row,
        "picture": seen,
        "maps": maps,
        "near": {},
    }


def _add_neighbours(
    dump: DumpReader,
    rows: Sequence[int],
    images: Sequence[dict[str, Any]],
    pooled: Mapping[str, Sequence[np.ndarray]],
) -> int:
    """Give each image its neighbours by each stage: from the whole dump by the last stage, from the page by the others.

    A neighbour is a place on the page, or the key of an image that is not on it. Returns how many images of the dump
    were compared.
    """
    if not rows:
        return 0
    *others, last = pooled
    for name in others:
        for image, near in zip(images, neighbours(np.array(pooled[name])), strict=True):
            image["near"][name] = near
    compared = rows_to_compare(dump, last, rows)
    places = {row: place for place, row in enumerate(rows)}
    for image, of_image in zip(
        images, neighbours_in_dump(dump, last, np.array(pooled[last]), rows, compared), strict=True
    ):
        image["near"][last] = [(places.get(row, printable(dump.keys[row])), value) for row, value in of_image]
    return len(compared)


def _columns(dump: DumpReader, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return the columns with a value for each of the rows: a number, true, false or text, and null if missing."""
    cells = dict(dump.columns.rows(sorted({*rows})))
    kinds = list(dump.columns.kinds.items())[:MOST_COLUMNS]
    return [
        {"name": printable(_cut(name)), "kind": kind, "values": [_value(cells[row][name], kind) for row in rows]}
        for name, kind in kinds
    ]


def _value(cell: Any, kind: Kind) -> Any:
    """Return what a page shows of a cell. A number that a page would round is text."""
    if cell is None or (kind != "json" and (isinstance(cell, float) or (isinstance(cell, int) and abs(cell) <= EXACT))):
        return cell
    return printable(_cut(cell if isinstance(cell, str) and kind != "json" else json.dumps(cell, ensure_ascii=False)))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def _small(pixels: np.ndarray, most: int) -> Image.Image:
    from PIL import Image

    picture = Image.fromarray(pixels)
    scale = most / max(picture.size)
    if scale >= 1:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BOX)


def _as_data(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _page(facts: Mapping[str, Any]) -> bytes:
    """Return the template with the facts in it. They are JSON inside a script element, which only `<` could end."""
    template = resources.files("featcli.views").joinpath(TEMPLATE).read_text("utf-8")
    content = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
    before, _, after = template.partition(FACTS)
    return (before.replace(TITLE, html.escape(facts["title"])) + content + after).encode()
