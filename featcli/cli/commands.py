"""The commands: parse, call one function, print. What goes wrong is for cli.py to say."""

# Annotations are evaluated here, not kept as text: Typer would take longer over the text than all of --help may.
import json
from pathlib import Path
from typing import Annotated

import typer

from featcli import __version__
from featcli.backbones.execution import LAYOUTS, PRECISIONS
from featcli.cli.options import (
    EPILOG,
    AllowOutside,
    Alpha,
    Arch,
    Checkpoint,
    Decode,
    DepthRange,
    Device,
    Dtype,
    FilesFrom,
    Fit,
    FollowLinks,
    ImageSize,
    Json,
    MaxPixels,
    Norm,
    Null,
    NumChannels,
    Orientation,
    OutFeatures,
    OutIndices,
    Quiet,
    RandomInit,
    Root,
    Seed,
)
from featcli.dump.formats import FORMATS
from featcli.errors import UsageError, one_of
from featcli.run.pooling import POOLINGS
from featcli.spec.config import AUTO, DTYPES, ENGINES, ExtractConfig, parse_count

# What the work needs is imported inside the commands: `--help` must not wait for it.

app = typer.Typer(
    help="Dump the feature maps of frozen vision backbones.",
    rich_markup_mode=None,  # plain help and plain errors, which documents and logs can hold
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
DEFAULT = ExtractConfig(inputs=(".",))


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
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT", help="Folders (recursive), tar files, images; or URLs of such."),
    ] = None,
    files_from: FilesFrom = None,
    null: Null = False,
    root: Root = None,
    allow_outside: AllowOutside = False,
    follow_links: FollowLinks = False,
    arch: Arch = None,
    random_init: RandomInit = False,
    seed: Seed = DEFAULT.seed,
    out_indices: OutIndices = None,
    out_features: OutFeatures = None,
    image_size: ImageSize = None,
    num_channels: NumChannels = None,
    norm: Norm = None,
    fit: Fit = None,
    orientation: Orientation = DEFAULT.orientation,
    alpha: Alpha = DEFAULT.alpha,
    depth_range: DepthRange = None,
    max_pixels: MaxPixels = DEFAULT.max_pixels,
    decode: Decode = DEFAULT.decode,
    device: Device = DEFAULT.device,
    precision: Annotated[
        str, typer.Option(help=f"Of the computation: {', '.join(PRECISIONS)}, or {AUTO}: the fastest here.")
    ] = DEFAULT.precision,
    layout: Annotated[
        str, typer.Option(help=f"Of maps while they are computed: {', '.join(LAYOUTS)}, or {AUTO}: the fastest here.")
    ] = DEFAULT.layout,
    fold: Annotated[
        bool | None,
        typer.Option(
            help="Batch norms into convolutions. Default: where it is faster. With --layout channels-first"
            " --no-fold numbers are the library's to the last bit."
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Let torch.compile make it faster: up to half a minute at the start.")
    ] = False,
    batch_size: Annotated[
        str, typer.Option(help=f"Images that go through the backbone together, or {AUTO}: the fastest here.")
    ] = str(DEFAULT.batch_size),
    threads: Annotated[str, typer.Option(help=f"Of the forward pass on a CPU, or {AUTO}: torch's choice.")] = AUTO,
    decode_threads: Annotated[
        str, typer.Option(help=f"Of each process, or {AUTO}: the cores that may be used, divided by the processes.")
    ] = AUTO,
    pool: Annotated[
        str, typer.Option(help=f"{', '.join(POOLINGS)}, or a grid HxW of averages such as 7x7.")
    ] = DEFAULT.pool,
    dtype: Dtype = DEFAULT.dtype,
    format: Annotated[str, typer.Option("-f", "--format", help=f"{', '.join(FORMATS)}.")] = DEFAULT.format,
    shard_size: Annotated[
        int | None, typer.Option(help="Images in a shard, rounded up to whole batches. Default: about 1 GiB.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the dump that is there; start anew.")] = False,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="The I-th of N parts of the shards, from 0; auto: as the scheduler says."),
    ] = None,
    engine: Annotated[str, typer.Option(help=f"Who makes the shards: {', '.join(ENGINES)}.")] = DEFAULT.engine,
    ray_address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster: auto, or host:port. Default: a Ray of its own, on this machine."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="With --engine ray. Default: as many as the cluster has room for.")
    ] = None,
    cpus_per_worker: Annotated[
        float | None,
        typer.Option(help="With --engine ray. Default: those of --threads; with GPUs what a node has for each."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="With --engine ray. Default: 1 with --device cuda, else 0.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do the shards with failed images again; others stay.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; read no weights.")] = False,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1e9, help="Images a second of one worker: --dry-run says how long it would take."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on stdout.")] = False,
    quiet: Quiet = False,
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
        allow_outside=allow_outside,
        follow_links=follow_links,
        arch=arch,
        random_init=random_init,
        seed=seed,
        out_indices=_indices(out_indices),
        out_features=_features(out_features),
        image_size=image_size,
        num_channels=num_channels,
        norm=norm,
        fit=fit,
        orientation=orientation,
        alpha=alpha,
        depth_range=depth_range,
        max_pixels=max_pixels,
        decode=decode,
        device=device,
        precision=precision,
        layout=layout,
        fold=fold,
        compile=compile,
        batch_size=parse_count("--batch-size", batch_size),
        threads=parse_count("--threads", threads),
        decode_threads=parse_count("--decode-threads", decode_threads),
        pool=pool,
        dtype=dtype,
        format=format,
        shard_size=shard_size,
        part=part,
        overwrite=overwrite,
        retry_failed=retry_failed,
        engine=engine,
        ray_address=ray_address,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
    )
    from featcli.cli.terminal import Terminal, json_lines
    from featcli.events import tee

    terminal = Terminal(verbose)
    reports = ([] if quiet else [terminal]) + ([json_lines] if as_json else [])
    try:
        if dry_run:
            from featcli.extraction.planning import dry_run as plan_only

            plan_only(config, tee(*reports), rate)
            return
        if rate is not None:
            raise UsageError("--rate goes with --dry-run", "a run measures its own")
        from featcli.extraction.extract import run

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
    from featcli.backbones.checkpoint import Request
    from featcli.backbones.input_size import parse_size
    from featcli.cli.tables import print_checkpoint, print_dump
    from featcli.views.inspection import inspect_checkpoint, inspect_dump

    one_of("--dtype", dtype, DTYPES)
    facts = inspect_dump(Path(target))
    if facts is None:
        facts = inspect_checkpoint(
            Request(target, arch, image_size=parse_size(image_size), num_channels=num_channels, norm=norm),
            out_indices=_indices(out_indices),
            out_features=_features(out_features),
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
    from featcli.cli.tables import print_models
    from featcli.views.models import list_models

    found = list_models(pattern)
    if as_json:
        print("\n".join(json.dumps(model) for model in found))
    else:
        print_models(found)


def _indices(text: str | None) -> tuple[int, ...] | str | None:
    from featcli.backbones.stages import parse_indices

    indices = None if text is None else parse_indices(text)
    return tuple(indices) if isinstance(indices, list) else indices


def _features(text: str | None) -> tuple[str, ...] | None:
    from featcli.backbones.stages import parse_features

    return None if text is None else tuple(parse_features(text))
