"""Define the commands. Each takes its spec, calls one function, and prints. boundary.py says what goes wrong."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcli import __version__
from featcli.cli.signature import command_of
from featcli.errors import EXIT_CODES, NOTHING_READ, DamagedError, counted, printable, shown, size
from featcli.spec.commands import (
    PAGE_IMAGES,
    SHEET_IMAGES,
    ExportCommand,
    ExtractCommand,
    ExtractSpec,
    FinalizeCommand,
    InspectCommand,
    ModelsCommand,
    ShowCommand,
    VerifyCommand,
)
from featcli.spec.groups import CheckpointSpec
from featcli.spec.option import narrowed, shared_options
from featcli.spec.parsers import parse_features
from featcli.spec.words import DEFAULT_DTYPE
from featcli.system.borrowed import collector

if TYPE_CHECKING:
    from featcli.cli.terminal import Terminal
    from featcli.dump.verify import Verdict
    from featcli.events import Report
    from featcli.extraction.recompute import Sample
    from featcli.reading.reader import DumpReader

# The commands import what they need when they run, because `--help` must not wait for it.

EPILOG = "\b\nExit codes:\n" + "".join(f"  {'/'.join(map(str, code.codes)):<7}  {code.means}\n" for code in EXIT_CODES)

app = typer.Typer(
    help="Dump the feature maps of frozen vision backbones.",
    rich_markup_mode=None,  # plain text for help and errors, which documents and logs can hold
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
command = partial(command_of, app, epilog=EPILOG)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Take the options of featcli itself."""
    if version:
        print(f"featcli {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@contextmanager
def _terminal(**words: str | bool) -> Iterator[Terminal]:
    """Yield a terminal, and leave it as it was, whatever happens."""
    from featcli.cli.terminal import Terminal

    terminal = Terminal(**words)  # type: ignore[arg-type]
    try:
        yield terminal
    finally:
        terminal.close()


@contextmanager
def _uncollected() -> Iterator[Report]:
    """Keep Python from looking for garbage inside the block, but only until the report that is yielded hears `start`.

    Until then libraries are imported, which make a million objects and no garbage. Nobody looks at those again, not
    even when the process ends.
    """
    with ExitStack() as paused:
        paused.enter_context(collector.set_to(False))
        paused.callback(gc.freeze)

        def hear(kind: str, **_: Any) -> None:
            if kind == "start":
                paused.close()

        yield hear


def _print_json(*objects: Mapping[str, Any]) -> None:
    """Print each object as a line of JSON: results for programs."""
    import json

    print("\n".join(map(json.dumps, objects)))


@command(ExtractCommand, short_help="Write the feature maps of images to a dump.")
def extract(asked: ExtractCommand) -> None:
    """Write the feature map of each chosen stage, for every image, to a dump.

    The same command again resumes where it stopped.

    featcli extract photos -c resnet50 --out-indices 2,-1 -o feats
    """
    from featcli.cli.terminal import JsonLines, nothing_read, quiet
    from featcli.cli.variables import naming_variables, with_variables
    from featcli.events import tee

    with with_variables(asked) as chosen, _terminal(verbose=asked.verbose) as terminal, _uncollected() as begun:
        spec = narrowed(chosen, ExtractSpec)
        lines = JsonLines()
        said = quiet if asked.quiet else terminal
        heard = tee(begun, said, lines) if asked.as_json else tee(begun, said)
        report = naming_variables(asked, chosen, heard)
        if asked.dry_run:
            from featcli.extraction.growing import dry_run

            dry_run(spec, report, asked.rate)
            return
        from featcli.extraction.extract import run

        outcome = run(spec, report, if_there=replace(spec, threads=asked.threads))  # a dump keeps its own threads
    if outcome.exit_code == NOTHING_READ:
        print(printable(nothing_read(outcome.dump, outcome.failed_by_reason)), file=sys.stderr)
    if asked.as_json and not lines.is_read:  # the dump is complete, whether or not anybody has read the lines
        raise BrokenPipeError
    raise typer.Exit(outcome.exit_code)


@command(InspectCommand, short_help="List the stages of a checkpoint, or the state of a dump.")
def inspect(asked: InspectCommand) -> None:
    """List the stages of a checkpoint with names and shapes, or the state of a dump. Reads no weights.

    featcli inspect resnet50 --out-indices 2,-1
    """
    from featcli.cli.tables import print_checkpoint, print_dump
    from featcli.views.inspection import inspect_checkpoint, inspect_dump

    facts = inspect_dump(Path(asked.target))
    if facts is None:
        checkpoint = CheckpointSpec(checkpoint=asked.target, **shared_options(asked, CheckpointSpec))
        with _uncollected():
            facts = inspect_checkpoint(checkpoint, asked, dtype=asked.dtype or DEFAULT_DTYPE)
    else:
        asked.refuse_beside_dump()
    if asked.as_json:
        _print_json(facts)
    elif facts["type"] == "dump":
        print_dump(facts)
    else:
        print_checkpoint(facts)
    if facts.get("state") in ("incomplete", "damaged"):
        raise typer.Exit(8)


@command(ModelsCommand, short_help="List the models whose stages can be dumped.")
def models(asked: ModelsCommand) -> None:
    """List timm's architectures, and the model types of transformers whose folders and hub ids can be given.

    \b
    featcli models convnext
    featcli models clip --with projection
    """
    from featcli.cli.tables import print_models
    from featcli.views.models import list_models

    found = list_models(asked.pattern, asked.vector)
    if asked.as_json:
        _print_json(*found)
    else:
        print_models(found)


@command(VerifyCommand, short_help="Check every byte of a dump.")
def verify(asked: VerifyCommand) -> None:
    """Check structure, counts and every byte of a dump against its hashes, and count values that are not finite.

    Exit code 4 where something is damaged, 8 where the dump is whole but not complete.

    \b
    featcli verify feats photos --recompute 8
    featcli verify feats --against other-feats --tolerance 1e-4
    """
    from featcli.dump.folder import PLAN
    from featcli.dump.verify import repair
    from featcli.reading.reader import open_dump

    other = None if asked.against is None else open_dump(asked.against)  # first, because it may be a wrong one
    samples = None
    if asked.recompute:  # a wrong -c should not cost hours of reading
        with suppress(DamagedError):  # the verdict says more about it
            samples = _samples(asked)
    verdict = _judge(asked)
    if verdict.damages and not asked.repair:
        raise DamagedError(
            f"dump {shown(asked.dump)}: verify found {counted(len(verdict.damages), 'damage')}",
            verdict.way_out,
        )
    if verdict.damages:
        for line in repair(verdict):
            print(printable(line), file=sys.stderr)
        if any(Path(damage.file).name == PLAN for damage in verdict.damages):  # the rest is found only after its repair
            verdict = _judge(asked)
    if verdict.damages or verdict.state == "incomplete":
        if asked.recompute or asked.check_inputs or other is not None:
            what = "extracted anew" if asked.recompute else "compared"
            print(f"nothing was {what}: complete the dump first", file=sys.stderr)
        raise typer.Exit(8)
    _compare_beyond(asked, samples, other)


def _compare_beyond(asked: VerifyCommand, samples: list[Sample] | None, other: DumpReader | None) -> None:
    """Compare a whole dump with its pictures, with the backbone's own maps, and with another dump, as asked."""
    if asked.check_inputs:
        _check_inputs(asked)
    if asked.recompute:
        _recompute(asked, samples or _samples(asked))
    if other is not None:
        _compare(asked, other)


def _judge(asked: VerifyCommand) -> Verdict:
    """Verify the dump, and print what was found."""
    from featcli.cli.tables import print_verdict
    from featcli.dump.verify import verify as check
    from featcli.events import silent
    from featcli.run.progress import ProgressReport

    with _terminal(work="verifying") as terminal:
        verdict = check(asked.dump, silent if asked.quiet else ProgressReport(terminal))
    if asked.as_json:
        _print_json(verdict.to_json())
    elif not asked.quiet:
        print_verdict(verdict.to_json())
    return verdict


def _check_inputs(asked: VerifyCommand) -> None:
    from featcli.cli.tables import print_picture_check
    from featcli.dump.folder import Dump
    from featcli.events import silent
    from featcli.extraction.picture_check import check_pictures
    from featcli.run.progress import ProgressReport

    with _terminal(work="comparing pictures") as terminal:
        found = check_pictures(Dump.at(Path(asked.dump)), asked, silent if asked.quiet else ProgressReport(terminal))
    if asked.as_json:
        _print_json({"type": "inputs", **vars(found)})
    elif not asked.quiet:
        print_picture_check(found)
    if found.changed or found.gone:
        whats = [(found.changed, "changed"), (found.gone, "gone")]
        texts = [f"{len(keys):,} {what}, first {shown(keys[0])}" for keys, what in whats if keys]
        raise DamagedError(
            f"dump {shown(asked.dump)}: pictures are not what they were: {'; '.join(texts)}",
            "bring them back, or extract what is there now to another dump",
        )


def _samples(asked: VerifyCommand) -> list[Sample]:
    """Prepare the jobs of the dump's plans again."""
    from featcli.cli.variables import with_variables
    from featcli.dump.folder import Dump
    from featcli.extraction.recompute import samples_of

    with with_variables(asked) as spec:
        return samples_of(Dump.at(Path(asked.dump)), spec)


def _recompute(asked: VerifyCommand, samples: list[Sample]) -> None:
    from featcli.cli.tables import comparison_line
    from featcli.extraction.recompute import recompute

    comparison = recompute(samples)
    if asked.as_json:
        _print_json({"type": "recompute", **vars(comparison)})
    else:
        print(comparison_line(comparison))
    if comparison.off:
        raise DamagedError(
            f"dump {shown(asked.dump)}: verify found other values for {counted(len(comparison.off), 'image')}, first"
            f" {shown(comparison.off[0])}",
            "is it the same checkpoint, and are the pictures what they were?",
        )


def _compare(asked: VerifyCommand, other: DumpReader) -> None:
    """Compare the dump with another one, and print what differs."""
    from featcli.cli.tables import print_comparison
    from featcli.events import silent
    from featcli.reading.against import compare
    from featcli.reading.reader import open_dump
    from featcli.run.progress import ProgressReport

    with _terminal(work="comparing") as terminal:
        report = silent if asked.quiet else ProgressReport(terminal)
        found = compare(open_dump(asked.dump), other, asked.tolerance or 0.0, report)
    if asked.as_json:
        _print_json(found.to_json())
    else:
        print_comparison(found)
    if not found.is_equal:
        raise DamagedError(
            f"dump {shown(asked.dump)}: it is not equal to {shown(found.against)}",
            "the lines above say where they differ; --tolerance allows small differences of values",
        )


@command(ExportCommand, short_help="Write a dump as one file, or as JSON lines.")
def export(asked: ExportCommand) -> None:
    """Write the maps of a dump with their keys to one file, or as JSON lines to stdout.

    \b
    featcli export feats --stage stage4 --pool avg -o stage4.h5
    featcli export feats --pool avg -o - | jq -c '[.key, .stage4[0]]'
    featcli export january february --where split=train -o both.parquet
    """
    from featcli.errors import shown_shape
    from featcli.events import silent
    from featcli.export.export import STDOUT, images_beside
    from featcli.export.export import export as write
    from featcli.reading.named import open_named
    from featcli.run.progress import ProgressReport
    from featcli.system.files import bytes_at

    with _terminal(work="exporting") as terminal:
        found = open_named([asked.dump, *asked.more], asked.others, asked.incomplete)
        content = write(found, asked, silent if asked.quiet else ProgressReport(terminal))
    if not asked.quiet and asked.output != STDOUT:
        path = Path(asked.output)
        num_bytes = bytes_at(path)
        stages = ", ".join(f"{one.name} {shown_shape(one.shape)} {one.dtype}" for one in content.outputs)
        there = len(content.dump)
        images = counted(there, "image") if len(content.rows) == there else f"{len(content.rows):,} of {there:,} images"
        beside = f" with {images_beside(path).name}" if path.suffix == ".npy" else ""
        print(
            printable("; ".join([f"{asked.output}{beside}: {images}, {stages}, {size(num_bytes)}", *content.remarks]))
        )
    elif content.remarks and (content.dump.failures or not asked.quiet):
        name = content.dump.name if asked.more or asked.others else asked.dump
        print(printable(f"{name}: {'; '.join(content.remarks)}"), file=sys.stderr)


@command(ShowCommand, short_help="Draw the maps of a dump: a picture, or a page.")
def show(asked: ShowCommand) -> None:
    """Draw images beside their maps, or survey a dump on one page that works offline.

    \b
    featcli show feats nature/sea 'things/*' -o sheet.png
    featcli show feats -o feats.html
    featcli show resnet nature/sea --with vit -o two-models.png
    """
    from featcli.events import silent
    from featcli.reading.named import open_named
    from featcli.run.progress import ProgressReport
    from featcli.views.dump_pictures import DumpPictures
    from featcli.views.show import Drawing, rows_of, rows_to_draw
    from featcli.views.show import show as draw
    from featcli.views.survey import SUFFIXES as PAGES
    from featcli.views.survey import survey

    is_page = asked.output.lower().endswith(PAGES)
    found = open_named([asked.dump], asked.others, asked.incomplete)
    found.refuse_without_shards()
    count = asked.num_images or (PAGE_IMAGES if is_page else SHEET_IMAGES)
    rows, without_maps = rows_of(found, asked.keys) if asked.keys else (rows_to_draw(found, count), {})
    with _terminal(work="drawing", unit="steps") as terminal:
        pictures = DumpPictures(found, asked.root, asked.allow_outside)
        drawing = Drawing(found, rows, found.chosen_outputs(parse_features(asked.stage)), pictures)
        report = silent if asked.quiet else ProgressReport(terminal)
        (survey if is_page else draw)(drawing, asked.output, asked.overwrite, report)
    if not asked.quiet:
        for pattern, number in without_maps.items():
            print(printable(f"{shown(pattern)}: {counted(number, 'image')} without maps left out"), file=sys.stderr)
        for why, number in pictures.missing.most_common():
            missing = f"{counted(number, 'picture')} of {pictures.files.where} not shown: {why}"
            print(printable(missing), file=sys.stderr)
        from_there = f", pictures from {pictures.files.where}" if pictures.files.are_noted else ""
        drawn = drawing.stages if is_page else drawing.maps
        if vectors := [name for name in drawing.stages if name not in drawn]:
            print(f"{', '.join(vectors)} not drawn: vectors are for a page, -o page.html", file=sys.stderr)
        counts = f"{counted(len(rows), 'image')}, {counted(len(drawn), 'stage')}"
        print(printable(f"{asked.output}: {counts}{from_there}"))


@command(FinalizeCommand, short_help="Write the manifest of a dump whose shards are all there.")
def finalize(asked: FinalizeCommand) -> None:
    """Write failures.jsonl and manifest.json from the records of the shards. `extract` does so by itself.

    featcli finalize feats
    """
    from featcli.cli.tables import begun_line, foreign_lines
    from featcli.cli.terminal import nothing_read, some_failed
    from featcli.dump.atomic_file import disk_errors
    from featcli.dump.folder import Dump, in_use
    from featcli.dump.foreign import foreign_files
    from featcli.dump.generations import begun_generation
    from featcli.dump.lock import FolderLock
    from featcli.dump.writer import finalize_all

    found = Dump.at(Path(asked.dump))
    foreign = [vars(one) for one in foreign_files(found)]
    for line in () if asked.quiet else foreign_lines(foreign):
        print(printable(f"warning: {line}"), file=sys.stderr)
    found.refuse_damaged_shards()
    with disk_errors(found.path), FolderLock(found.path) as lock:
        if not lock.alone():
            raise in_use(found.path)
        totals = finalize_all(found)
    begun = begun_generation(found)
    if asked.as_json:
        exit_code = 0 if totals["written"] else NOTHING_READ
        facts = {**totals, "foreign_files": foreign, "begun": begun}
        _print_json({"type": "finalized", "dump": asked.dump, **facts, "exit_code": exit_code})
    elif not asked.quiet:
        print(printable(f"{asked.dump}: complete, {totals['written']:,} images written, {totals['failed']:,} failed"))
        if begun is not None:
            print(printable(begun_line(begun)))
    elif totals["failed"] and totals["written"]:
        print(printable(some_failed(asked.dump, **totals)), file=sys.stderr)
    if not totals["written"]:
        print(printable(nothing_read(asked.dump, totals["failed_by_reason"])), file=sys.stderr)
        raise typer.Exit(NOTHING_READ)
