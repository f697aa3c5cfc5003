"""The command line: parse, call one function, print. The one place that catches FeatcliError."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from featcli import __version__
from featcli.backbones.checkpoint import Request
from featcli.backbones.input_size import parse_size
from featcli.backbones.stages import parse_features, parse_indices
from featcli.config import DTYPES, PRECISIONS, ExtractConfig, one_of
from featcli.errors import FeatcliError, MachineError, shown
from featcli.pooling import POOLINGS
from featcli.progress import Terminal, json_lines, tee
from featcli.tables import print_checkpoint, print_dump, print_models
from featcli.writers import FORMATS

# Heavy modules (torch, timm, transformers) are imported inside the commands: `--help` must not wait for them.

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141

EPILOG = """\b
Exit codes:
  0        done
  1        unexpected: a bug
  2        usage: a bad option, no images, an unknown stage or checkpoint name
  3        done, but some images failed and are recorded
  4        the dump is damaged
  5        the dump exists with another plan
  6        the checkpoint is refused
  7        disk, device or memory
  8        inspect: the dump is incomplete, or shards of it are gone
  130/143  interrupted, terminated: what is committed stays, the same command goes on
  141      whoever read stdout went away
"""

app = typer.Typer(
    help="Dump the feature maps of frozen vision backbones.",
    rich_markup_mode=None,  # plain help and plain errors, which documents and logs can hold
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
)
DEFAULT = ExtractConfig(inputs=(".",))

Checkpoint = Annotated[
    str, typer.Option("-c", "--checkpoint", help="timm model, local folder, weights file (with --arch) or hub id.")
]
Arch = Annotated[str | None, typer.Option(help="timm architecture, for a bare weights file.")]
OutIndices = Annotated[
    str | None, typer.Option(help="Stages by index, such as 1,2,-1, or all. Default: the last stage.")
]
OutFeatures = Annotated[
    str | None, typer.Option(help="Stages by name, such as stem,stage2 or stage2:stage4 (both ends) or all.")
]
NumChannels = Annotated[
    int | None, typer.Option(help="Of the input: 1 is grey. Default: the checkpoint's own, 3 as a rule.")
]
Norm = Annotated[
    str | None,
    typer.Option(help="Maps before (raw) or after (model) the model's final norm. Default: as its library gives them."),
]
ImageSize = Annotated[str | None, typer.Option(help="Input size N or HxW. Default: the checkpoint's own.")]
Dtype = Annotated[str, typer.Option(help=f"Type that is stored: {', '.join(DTYPES)}.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of featcli itself."""
    if version:
        print(f"featcli {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog=EPILOG, short_help="Write the feature maps of images to a dump.")
def extract(
    checkpoint: Checkpoint,
    output: Annotated[str, typer.Option("-o", "--output", help="The dump: a folder to make or to go on with.")],
    inputs: Annotated[list[str] | None, typer.Argument(metavar="INPUT", help="Folders (recursive) and images.")] = None,
    files_from: Annotated[str | None, typer.Option(help="A list of images, one a line; - is stdin.")] = None,
    null: Annotated[bool, typer.Option("-0", "--null", help="Names in the list end in a zero byte.")] = False,
    root: Annotated[
        str | None, typer.Option(help="Folder that listed names, and their keys, are relative to. Default: here.")
    ] = None,
    arch: Arch = None,
    random_init: Annotated[bool, typer.Option("--random-init", help="Random weights instead of trained ones.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = DEFAULT.seed,
    out_indices: OutIndices = None,
    out_features: OutFeatures = None,
    image_size: ImageSize = None,
    num_channels: NumChannels = None,
    norm: Norm = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = DEFAULT.device,
    precision: Annotated[str, typer.Option(help=f"Of the computation: {', '.join(PRECISIONS)}.")] = DEFAULT.precision,
    batch_size: Annotated[int, typer.Option(help="Images that go through the backbone together.")] = DEFAULT.batch_size,
    threads: Annotated[int | None, typer.Option(help="Of the forward pass on a CPU. Default: torch's choice.")] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Default: one for each available core.")] = None,
    pool: Annotated[
        str, typer.Option(help=f"{', '.join(POOLINGS)}, or a grid HxW of averages such as 7x7.")
    ] = DEFAULT.pool,
    dtype: Dtype = DEFAULT.dtype,
    format: Annotated[str, typer.Option("-f", "--format", help=f"{', '.join(FORMATS)}.")] = DEFAULT.format,
    shard_size: Annotated[
        int | None, typer.Option(help="Images in a shard, rounded up to whole batches. Default: about 1 GiB.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dump that is there; start anew.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; read no weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also every failure and shard.")] = False,
) -> None:
    """Write the feature map of each chosen stage, for every image, to a dump.

    The same command again goes on where it stopped.

    featcli extract photos -c resnet50 --out-indices 2,-1 -o feats
    """
    config = ExtractConfig(
        inputs=tuple(inputs or ()),
        checkpoint=checkpoint,
        output=output,
        files_from=files_from,
        null=null,
        root=root,
        arch=arch,
        random_init=random_init,
        seed=seed,
        out_indices=_indices(out_indices),
        out_features=None if out_features is None else tuple(parse_features(out_features)),
        image_size=image_size,
        num_channels=num_channels,
        norm=norm,
        device=device,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        decode_threads=decode_threads,
        pool=pool,
        dtype=dtype,
        format=format,
        shard_size=shard_size,
        overwrite=overwrite,
    )
    terminal = Terminal(verbose)
    reports = ([] if quiet else [terminal]) + ([json_lines] if as_json else [])
    try:
        if dry_run:
            from featcli.planning import dry_run as plan_only

            plan_only(config, tee(*reports))
            return
        from featcli.extraction import run

        outcome = run(config, tee(*reports))
    finally:
        terminal.close()
    raise typer.Exit(outcome.exit_code)


@app.command(epilog=EPILOG, short_help="List the stages of a checkpoint, or the state of a dump.")
def inspect(
    target: Annotated[str, typer.Argument(metavar="CHECKPOINT|DUMP", help="What extract -c or -o take.")],
    arch: Arch = None,
    out_indices: OutIndices = None,
    out_features: OutFeatures = None,
    image_size: ImageSize = None,
    num_channels: NumChannels = None,
    norm: Norm = None,
    dtype: Dtype = DEFAULT.dtype,
    as_json: Json = False,
) -> None:
    """List the stages of a checkpoint with names and shapes, or the state of a dump. Reads no weights.

    featcli inspect resnet50 --out-indices 2,-1
    """
    from featcli.inspection import inspect_checkpoint, inspect_dump

    one_of("--dtype", dtype, DTYPES)
    facts = inspect_dump(Path(target))
    if facts is None:
        facts = inspect_checkpoint(
            Request(target, arch, image_size=parse_size(image_size), num_channels=num_channels, norm=norm),
            out_indices=_indices(out_indices),
            out_features=None if out_features is None else parse_features(out_features),
            dtype=dtype,
        )
    if as_json:
        print(json.dumps(facts))
    elif facts["type"] == "dump":
        print_dump(facts)
    else:
        print_checkpoint(facts)
    if facts.get("state") in ("incomplete", "damaged"):
        raise typer.Exit(8)


@app.command(epilog=EPILOG, short_help="List the models whose stages can be dumped.")
def models(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="A part of the name, or a pattern such as '*vit*patch14*'.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List timm's architectures, and the model types of transformers whose folders and hub ids can be given.

    featcli models convnext
    """
    from featcli.models import list_models

    found = list_models(pattern)
    if as_json:
        print("\n".join(json.dumps(model) for model in found))
    else:
        print_models(found)


def _indices(text: str | None) -> tuple[int, ...] | str | None:
    indices = None if text is None else parse_indices(text)
    return tuple(indices) if isinstance(indices, list) else indices


@contextmanager
def _terminating() -> Iterator[list[int]]:
    """Let SIGTERM clean up on its way out as Ctrl-C does; the list says whether it came."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit with a documented code."""
    warnings.filterwarnings("ignore", module="PIL")  # what matters of them is a recorded failure
    with _terminating() as terminated:
        code = _run(arguments)
        if code == INTERRUPTED:
            what, code = ("terminated", TERMINATED) if terminated else ("interrupted", INTERRUPTED)
            again = "the same command without --overwrite" if "--overwrite" in _given(arguments) else "the same command"
            _fail(what, f"what is committed stays; {again} goes on", code, arguments)
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        # Not standalone: usage errors come as exceptions and are worded like all others.
        result = command.main(arguments, prog_name="featcli", standalone_mode=False)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except FeatcliError as error:
        return _fail(error.message, error.hint, error.exit_code, arguments)
    except KeyboardInterrupt:  # Typer makes it an exit code of its own; this one came a moment before or after
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
            raise
        # Whoever read stdout has seen enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(*_explained(error), MachineError.exit_code, arguments)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not Typer's: a bug, which shows its traceback
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "featcli"
        return _fail(error.format_message(), f"see '{path} --help'", getattr(error, "exit_code", 2), arguments)


def _explained(error: OSError) -> tuple[str, str]:
    """A system error that reached the command line, as message and hint; one that is a bug goes on."""
    if error.filename is not None:  # a path in somebody else's folder, a name too long
        return f"{shown(error.filename)}: {error.strerror}", "check the path and its rights"
    if error.errno == errno.ENOSPC:
        return "cannot write the results: no space left", "see to where stdout goes"
    raise error


def _fail(message: str, hint: str, code: int, arguments: list[str] | None) -> int:
    print(f"featcli: error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    if "--json" in _given(arguments):
        with suppress(OSError):
            json_lines("error", message=message, hint=hint, exit_code=code)
    return code


def _given(arguments: list[str] | None) -> list[str]:
    return sys.argv[1:] if arguments is None else arguments
