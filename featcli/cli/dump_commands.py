"""The commands that take a dump: check it, write its last files. As commands.py: parse, call one function, print."""

# Annotations are evaluated here, not kept as text: Typer would take longer over the text than all of --help may.
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from featcli.cli.commands import DEFAULT, app
from featcli.cli.options import (
    EPILOG,
    AllowOutside,
    Arch,
    Device,
    FilesFrom,
    FollowLinks,
    Incomplete,
    Json,
    Null,
    Quiet,
    RandomInit,
    Root,
    Seed,
)
from featcli.errors import DamagedError, UsageError, counted, printable, shown
from featcli.export.formats import SUFFIXES
from featcli.spec.config import DTYPES, ExtractConfig

SHEET_IMAGES, PAGE_IMAGES = 3, 60  # that are drawn where no key is given


@app.command(epilog=EPILOG, short_help="Check every byte of a dump.")
def verify(
    dump: Annotated[str, typer.Argument(metavar="DUMP", help="The folder that extract -o made.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[INPUT]...", help="For --recompute: what extract was given.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put damaged shards aside, so that the next extract makes them again.")
    ] = False,
    recompute: Annotated[int, typer.Option(help="Extract so many images anew, drawn by chance, and compare.")] = 0,
    checkpoint: Annotated[str, typer.Option("-c", "--checkpoint", help="For --recompute: as for extract.")] = "",
    arch: Arch = None,
    random_init: RandomInit = False,
    seed: Seed = DEFAULT.seed,
    files_from: FilesFrom = None,
    null: Null = False,
    root: Root = None,
    allow_outside: AllowOutside = False,
    follow_links: FollowLinks = False,
    device: Device = DEFAULT.device,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check structure, counts and every byte of a dump against its hashes, and count values that are not finite.

    Exit code 4 where something is damaged, 8 where the dump is whole but not complete.

    featcli verify feats --recompute 8 -c resnet50 photos
    """
    from featcli.cli.tables import print_verdict
    from featcli.cli.terminal import Terminal
    from featcli.dump.verify import repair as put_aside
    from featcli.dump.verify import verify as check
    from featcli.events import silent

    if recompute < 0:
        raise UsageError(f"--recompute {recompute}: must be at least 0", "say how many images")
    if recompute and not (checkpoint and (inputs or files_from)):
        raise UsageError("--recompute needs what extract was given", "give -c/--checkpoint and the INPUT, or a list")
    terminal = Terminal(work="verifying")
    try:
        verdict = check(dump, silent if quiet else terminal)
    finally:
        terminal.close()
    if as_json:
        print(json.dumps(verdict.to_json()))
    elif not quiet:
        print_verdict(verdict.to_json())
    if verdict.damages and not repair:
        raise DamagedError(
            f"dump {shown(dump)}: {counted(len(verdict.damages), 'damage')} found",
            "featcli verify --repair puts shards aside, for the next extract to make again, and mends a plan",
        )
    for line in put_aside(verdict) if verdict.damages else ():
        print(printable(line), file=sys.stderr)
    if verdict.damages or verdict.state == "incomplete":
        if recompute:
            print("nothing was extracted anew: complete the dump first", file=sys.stderr)
        raise typer.Exit(8)
    if recompute:
        config = ExtractConfig(
            tuple(inputs or ()),
            checkpoint,
            dump,
            files_from,
            null,
            root,
            allow_outside,
            follow_links,
            arch,
            random_init,
            seed,
            device=device,
        )
        _recompute(config, recompute, as_json)


def _recompute(config: ExtractConfig, count: int, as_json: bool) -> None:
    from featcli.cli.tables import comparison_line
    from featcli.dump.folder import Dump
    from featcli.extraction.recompute import recompute

    comparison = recompute(Dump.at(Path(config.output)), config, count)
    print(json.dumps({"type": "recompute", **vars(comparison)}) if as_json else comparison_line(comparison))
    if comparison.off:
        raise DamagedError(
            f"dump {shown(config.output)}: other values for {counted(len(comparison.off), 'image')}, first"
            f" {shown(comparison.off[0])}",
            "is it the same checkpoint, and are the pictures what they were?",
        )


@app.command(epilog=EPILOG, short_help="Write a dump as one file, or as JSON lines.")
def export(
    dump: Annotated[str, typer.Argument(metavar="DUMP", help="The folder that extract -o made.")],
    output: Annotated[
        str, typer.Option("-o", "--output", help="A file, a folder for one .npy file a stage, or - for JSON lines.")
    ],
    to: Annotated[str | None, typer.Option(help=f"{', '.join(SUFFIXES)}. Default: what the suffix says.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stages by name, such as stage2,stage4 or stage2:stage4. Default: all.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="avg, max, or a grid HxW of averages such as 7x7. Default: as stored.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}. Default: as stored.")] = None,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep the rows of failed images: NaN, null in JSON lines.")
    ] = False,
    incomplete: Incomplete = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of a file that is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write the maps of a dump with their keys to one file, or as JSON lines to stdout.

    \b
    featcli export feats --stage stage4 --pool avg -o stage4.h5
    featcli export feats --pool avg -o - | jq -c '[.key, .stage4[0]]'
    """
    from featcli.backbones.stages import given_features
    from featcli.cli.terminal import Terminal
    from featcli.dump.plan import shown_shape
    from featcli.errors import size
    from featcli.events import silent
    from featcli.export.export import STDOUT, images_beside
    from featcli.export.export import export as write
    from featcli.reading.reader import open_dump

    terminal = Terminal(work="exporting")
    try:
        content = write(
            open_dump(dump, incomplete),
            output,
            to,
            given_features(stage),
            pool,
            dtype,
            keep_failed,
            overwrite,
            silent if quiet else terminal,
        )
    finally:
        terminal.close()
    if not quiet and output != STDOUT:
        path = Path(output)
        num_bytes = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
        stages = ", ".join(f"{one.name} {shown_shape(one.shape)} {one.dtype}" for one in content.stages)
        there = len(content.dump)
        images = counted(there, "image") if len(content.rows) == there else f"{len(content.rows):,} of {there:,} images"
        beside = f" with {images_beside(path).name}" if path.suffix == ".npy" else ""
        print(printable(f"{output}{beside}: {images}, {stages}, {size(num_bytes)}"))


@app.command(epilog=EPILOG, short_help="Draw the maps of a dump: a picture, or a page.")
def show(
    dump: Annotated[str, typer.Argument(metavar="DUMP", help="The folder that extract -o made.")],
    output: Annotated[
        str,
        typer.Option("-o", "--output", help="A picture (.png, .jpg, .webp), or a page on the dump (.html)."),
    ],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="Images by their keys. Default: evenly spaced ones.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Folder that the keys are relative to: the INPUT of extract. Default: here.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Stages by name, such as stage2,stage4 or stage2:stage4. Default: all.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(help=f"Without keys: so many. Default: {SHEET_IMAGES}, on a page {PAGE_IMAGES}.")
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Follow keys that lead out of that folder, too.")
    ] = False,
    incomplete: Incomplete = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of a file that is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Draw images beside their maps, or survey a dump on one page that works offline.

    \b
    featcli show feats nature/sea.jpg --root sample_images -o sea.png
    featcli show feats --root sample_images -o feats.html
    """
    from featcli.backbones.stages import given_features
    from featcli.cli.terminal import Terminal
    from featcli.events import silent
    from featcli.reading.reader import open_dump
    from featcli.views.dump_pictures import DumpPictures
    from featcli.views.show import Drawing, rows_of, rows_to_draw
    from featcli.views.show import show as draw
    from featcli.views.survey import SUFFIXES as PAGES
    from featcli.views.survey import survey

    is_page = output.lower().endswith(PAGES)
    if num_images is not None and num_images < 1:
        raise UsageError(f"--num-images {num_images}: must be at least 1", "say how many images")
    found = open_dump(dump, incomplete)
    rows = (
        rows_of(found, keys) if keys else rows_to_draw(found, num_images or (PAGE_IMAGES if is_page else SHEET_IMAGES))
    )
    terminal = Terminal(work="drawing", unit="steps")
    try:
        pictures = DumpPictures(found, root, allow_outside)
        drawing = Drawing(found, rows, found.chosen_stages(given_features(stage)), pictures)
        (survey if is_page else draw)(drawing, output, overwrite, silent if quiet else terminal)
    finally:
        terminal.close()
    if not quiet:
        for why, count in pictures.missing.most_common():
            print(printable(f"{counted(count, 'picture')} of {shown(root or '.')} not shown: {why}"), file=sys.stderr)
        print(printable(f"{output}: {counted(len(rows), 'image')}, {counted(len(drawing.stages), 'stage')}"))


@app.command(epilog=EPILOG, short_help="Write the manifest of a dump whose shards are all there.")
def finalize(
    dump: Annotated[str, typer.Argument(metavar="DUMP", help="The folder that extract -o made.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write failures.jsonl and manifest.json from the records of the shards. `extract` does so by itself.

    featcli finalize feats
    """
    from featcli.dump.atomic_file import disk_errors
    from featcli.dump.folder import Dump, in_use
    from featcli.dump.lock import FolderLock
    from featcli.dump.writer import finalize as write_last_files

    found = Dump.at(Path(dump))
    if damaged := sorted(found.committed().damaged):
        raise DamagedError(
            f"dump {shown(dump)}: {counted(len(damaged), 'shard file')} gone or of another size",
            "run its extract command again: it makes them again",
        )
    with disk_errors(found.path), FolderLock(found.path) as lock:
        if not lock.alone():
            raise in_use(found.path)
        totals = write_last_files(found)["totals"]
    if as_json:
        print(json.dumps({"type": "finalized", "dump": dump, **totals}))
    elif not quiet:
        print(printable(f"{dump}: complete, {totals['written']:,} images written, {totals['failed']:,} failed"))
