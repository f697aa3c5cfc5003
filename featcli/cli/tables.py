"""Print what `featcli inspect`, `models` and `verify` found, for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featcli.cli.terminal import folded
from featcli.errors import counted, printable, shown_shape, size

if TYPE_CHECKING:
    from featcli.reading.against import Comparison

WIDE = 240
FOREIGN_SHOWN = 5
COLUMNS_SHOWN = 50
IN_USE = "a process is at work in it now: what was found may have changed since"


def print_checkpoint(facts: Mapping[str, Any]) -> None:
    """Print the stages of a checkpoint, from `inspect_checkpoint`."""
    height, width = facts["input_size"]
    millions = facts["parameters"] / 1e6
    pixels = f"{facts['num_channels']}x{height}x{width}"
    _say(f"{facts['name']} ({facts['library']}, {millions:.1f} M parameters without head), input {pixels}")
    if facts["inside"]:
        _say(f"inside         {facts['inside']}")
    rows = [
        (
            f"{'*' if stage['selected'] else ' '} {stage['index']}",
            stage["name"],
            stage["module"],
            str(stage["channels"]),
            _stride(stage["stride"]),
            "x".join(map(str, stage["shape"])),
            size(stage["bytes_per_image"]),
        )
        for stage in facts["stages"]
    ]
    _print_table(("index", "stage", "module", "channels", "stride", "shape", f"{facts['dtype']}/image"), rows)
    if facts["vectors"]:
        _print_table(
            ("", "vector", "module", "shape", f"{facts['dtype']}/image", ""), _rows_of_vectors(facts["vectors"])
        )
    selected = sum(stage["selected"] for stage in facts["stages"])
    chosen = [vector["name"] for vector in facts["vectors"] if vector["selected"]]
    what = " and ".join(filter(None, (f"{selected} of {len(rows)} stages" if selected or not chosen else "", *chosen)))
    _say(
        f"{what} selected (*), {size(facts['bytes_per_image'])} per image,"
        f" computes {facts['share_computed']:.0%} of the model"
    )
    origin = facts["preprocessing"]["origin"]
    _say(f"preprocessing  {facts['preprocessing']['summary']}{f'  ({origin})' if origin else ''}")


def _rows_of_vectors(vectors: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            "*" if vector["selected"] else " ",
            vector["name"],
            vector["module"],
            "x".join(map(str, vector["shape"])),
            size(vector["bytes_per_image"]),
            vector["remark"],
        )
        for vector in vectors
    ]


def print_models(models: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `list_models`."""
    rows = [
        (
            model["name"],
            model["library"],
            f"{model['parameters'] / 1e6:.1f} M" if model["parameters"] is not None else "",
            "x".join(map(str, model["input"] or ())),
            model["stages"] or "",
            " ".join(map(str, _shortened(model["strides"] or []))),
            " ".join(model["tags"][:1]) + (f" and {len(model['tags']) - 1} more" if len(model["tags"]) > 1 else ""),
        )
        for model in models
    ]
    _print_table(("model", "library", "parameters", "input", "stages", "strides", "trained"), rows)


def _shortened(strides: list[int]) -> list[int]:
    """Return one number if all stages have the same stride."""
    return strides[:1] if len(set(strides)) == 1 else strides


def print_dump(facts: Mapping[str, Any]) -> None:
    """Print the state of a dump, from `inspect_dump`."""
    is_open = facts["state"] == "incomplete"
    safe = f", {facts['safe']:,} of {counted(facts['images'], 'image')} are safe" if is_open else ""
    _say(f"{facts['path']}: {facts['state']}, {facts['committed_shards']:,} of {facts['shards']:,} shards{safe}")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["failed_by_reason"].items())
    _say(f"images         {facts['images']:,}: {facts['written']:,} written, {facts['failed']:,} failed", end="")
    _say(f" ({reasons})" if reasons else "")
    if facts["unfinished_shards"]:
        _say(f"unfinished     {_kept(facts['unfinished_shards'])}")
    for text in facts["said_of_pictures"]:
        _say(f"pictures       {text}")
    _say(f"checkpoint     {facts['checkpoint']}: {facts['weights']}")
    _say(f"stored         {facts['format']}, {size(facts['bytes'])}, pool {facts['pool']}")
    if facts["generations"]:
        _say(f"generations    {len(facts['generations']):,}: {_images_of(facts['generations'])} images")
    if facts["begun"]:
        _say(f"begun          {_begun(facts['begun'])}")
    if facts["columns"]:
        named = [f"{name} ({kind})" for name, kind in facts["columns"].items()]
        more = [f"{len(named) - COLUMNS_SHOWN:,} more"] if len(named) > COLUMNS_SHOWN else []
        _say(f"columns        {', '.join(named[:COLUMNS_SHOWN] + more)}")
    rows = [
        (
            "" if one["index"] is None else str(one["index"]),
            one["name"],
            one["module"],
            shown_shape(one["map_shape"]) if one["map_shape"] else "",
            shown_shape(one["shape"]),
            one["dtype"],
        )
        for one in facts["outputs"]
    ]
    _print_table(("index", "output", "module", "map", "stored", "dtype"), rows)
    if facts["damaged_files"]:
        _say(f"gone or damaged: {', '.join(facts['damaged_files'])}; featcli verify says more")
    _say_each(foreign_lines(facts["foreign_files"]))
    if facts["in_use"]:
        _say(IN_USE)
    elif facts["state"] == "incomplete" and facts["committed_shards"] == facts["shards"]:
        _say("featcli finalize writes its last files")
    elif facts["state"] != "complete":
        _say("run its extract command again to complete it")


def _images_of(generations: Sequence[Mapping[str, Any]]) -> str:
    """Return the images of each generation, or of the last ones of many."""
    counts = [f"{one['images']:,}" for one in generations]
    return " + ".join(counts if len(counts) <= COLUMNS_SHOWN else ["...", *counts[-COLUMNS_SHOWN:]])


def print_verdict(facts: Mapping[str, Any]) -> None:
    """Print what `verify` found: a line for each damage, then a summary."""
    for damage in facts["damages"]:
        _say(f"{damage['file']}: {damage['what']}")
    _say_each(foreign_lines(facts["foreign_files"]))
    for kind in ("nan", "inf"):
        for stage, count in facts[kind].items():
            _say(f"{stage}: {count:,} values are {kind} in rows of images that were read")
    if facts["unfinished_shards"]:
        _say(f"unfinished: {_kept(facts['unfinished_shards'])}, to be checked by the run that takes them up")
    if facts["begun"]:
        _say(begun_line(facts["begun"]))
    there = facts["shards"] - facts["missing_shards"]
    _say(
        f"{facts['dump']}: {facts['state']}, {there:,} of {facts['shards']:,} shards, {size(facts['bytes'])} checked,"
        f" {counted(len(facts['damages']), 'damage')}"
    )
    if facts["in_use"]:
        _say(IN_USE)
    elif facts["state"] == "incomplete":
        _say("run its extract command again to complete it")


def begun_line(begun: Mapping[str, Any]) -> str:
    """Return a line about a generation that is not part of the dump yet."""
    if begun["problem"]:
        return f"no run can add {_begun(begun)}"
    return f"not part of the dump yet: {_begun(begun)}; its extract --extend, run again, completes it"


def _begun(begun: Mapping[str, Any]) -> str:
    if begun["problem"]:
        return f"generation {begun['generation']}: {begun['problem']}"
    return f"generation {begun['generation']}, {begun['safe']:,} of {counted(begun['images'], 'image')} are safe"


def _kept(unfinished: Sequence[Mapping[str, int]]) -> str:
    """Say how many rows of unfinished shards are on the disk."""
    kept, rows = (sum(one[name] for one in unfinished) for name in ("kept", "rows"))
    which = f"shard {unfinished[0]['shard']}" if len(unfinished) == 1 else counted(len(unfinished), "shard")
    return f"{kept:,} of {counted(rows, 'row')} of {which} are kept"


def foreign_lines(files: Sequence[Mapping[str, str]]) -> list[str]:
    """Return lines about files among the shards that are not read. The first of them are named."""
    lines = [f"{one['file']}: not of this dump, and not read: {one['what']}" for one in files[:FOREIGN_SHOWN]]
    more = len(files) - FOREIGN_SHOWN
    return lines + (
        [f"{counted(more, 'more file')} beside the shards not of this dump: --json names all"] if more > 0 else []
    )


def print_picture_check(found: Any) -> None:
    """Print which pictures of a dump changed, are gone, or are copies of one another."""
    for keys, what in ((found.changed, "changed"), (found.gone, "gone")):
        _say_each(f"{what}: {key}" for key in keys)
    _say_each(f"copies: {' = '.join(keys)}" for keys in found.copies)
    of_copies = sum(map(len, found.copies))
    _say(
        f"{counted(found.images, 'picture')} compared: {len(found.changed):,} changed, {len(found.gone):,} gone,"
        f" {of_copies:,} with an exact copy in the dump"
    )


def comparison_line(comparison: Any) -> str:
    """Return one line about the result of `--recompute`."""
    images = counted(comparison.images, "image")
    return (
        f"{images} extracted anew: {comparison.equal} equal bit for bit, largest difference"
        f" {comparison.largest:.2g} of the largest number in a row (tolerance {comparison.tolerance:.2g})"
    )


def print_comparison(found: Comparison) -> None:
    """Print what `verify --against` found: a line for each thing that only one dump has, then one for each output."""
    for which, only in ((found.dump, found.only_in_dump), (found.against, found.only_in_against)):
        for name in only.outputs:
            _say(f"{name}: only in {which}")
        for keys, what in ((only.images, "only in"), (only.failed, "failed only in")):
            if keys.count:
                _say(f"{counted(keys.count, 'image')} {what} {which}, first {keys.first[0]}")
    for name, (ours, theirs) in found.shapes.items():
        _say(f"{name}: {shown_shape(ours)} in {found.dump}, {shown_shape(theirs)} in {found.against}")
    for one in found.differences:
        if not one.differing_rows:
            _say(f"{one.output}: all {counted(one.rows, 'row')} equal")
            continue
        share = f"{one.largest:.2g}, {one.relative:.2g} of the largest value"
        _say(
            f"{one.output}: {one.differing_rows:,} of {counted(one.rows, 'row')} differ, largest difference"
            f" {'infinite' if one.is_infinite else share}, in {one.key}, mean {one.mean:.2g}"
        )
    verdict = "equal" if found.is_equal else "not equal"
    _say(f"{found.dump} and {found.against}: {verdict} with a tolerance of {found.tolerance:g}")


def _say_each(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


def _say(text: str, end: str = "\n") -> None:
    """Print text that may hold names of files."""
    print(folded(printable(text), sys.stdout), end=end)


def _stride(stride: list[int]) -> str:
    return str(stride[0]) if stride[0] == stride[1] else "x".join(map(str, stride))


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table, or a paragraph for each row if the terminal is too narrow. Nothing is ever cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(highlight=False, width=WIDE, markup=False)
    if sys.stdout.isatty() and console.measure(table).maximum > Console().width:
        for row in rows:
            _say(
                f"{row[0]}  "
                + ", ".join(f"{name} {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell)
            )
        return
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))  # without styles except on a terminal
