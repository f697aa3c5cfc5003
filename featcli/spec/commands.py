"""Define one spec for each command, and which of its options do not go together."""

# `from __future__ import annotations` would make annotations text, which every command would have to evaluate.
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from featcli.errors import UsageError, shown
from featcli.spec.groups import (
    CHECKPOINT,
    DUMP,
    IMAGES,
    OF_DEVICE,
    OF_QUIET,
    OF_REPLACE,
    OF_SEED,
    REPORT,
    STAGES,
    Arch,
    CheckpointSpec,
    ComputationSpec,
    DumpFolder,
    DumpSpec,
    EngineSpec,
    ImageSize,
    Incomplete,
    InputSpec,
    Json,
    ModelArg,
    ModelNorm,
    NumChannels,
    PixelSpec,
    Quiet,
    RandomInit,
    Replace,
    StageNames,
    StageSpec,
    WeightsKey,
)
from featcli.spec.option import Option, Other, Spec, options_of
from featcli.spec.parsers import (
    Path,
    at_least,
    between,
    format_name,
    names_and_values,
    no_empty_text,
    parse_inputs,
    parse_pool,
    pool_name,
    type_name,
)
from featcli.spec.words import (
    AUTO,
    DEFAULT_DTYPE,
    DTYPES,
    EXPORT_FORMATS,
    VECTORS,
    Dtype,
    ExportFormat,
    VectorName,
)

SHEET_IMAGES, PAGE_IMAGES = 3, 60  # images that are drawn if no key is given

OtherDumps = Annotated[
    Sequence[str],
    Option(
        "Another dump. If it is of the same images, it goes beside the first, and outputs are called NAME.stage4; by"
        " default NAME is the last name of its path. If it is of other images, its rows follow. May be given several"
        " times.",
        known_as=("--and", "--join", "--other"),
        flags=("--with",),
        metavar="[NAME=]DUMP",
        group=DUMP,
        keep=tuple,
        check=no_empty_text,
    ),
]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractSpec(EngineSpec, DumpSpec, ComputationSpec, PixelSpec, StageSpec, CheckpointSpec, InputSpec):
    """What can be asked of an extraction. Raises UsageError for an option that is wrong whatever is on the disk."""

    def refuse_conflicts(self) -> None:
        """Check options of several groups together. See Spec."""
        super().refuse_conflicts()
        for name, value in (("-c/--checkpoint", self.checkpoint), ("-o/--output", self.output)):
            if not value:
                raise UsageError(f"{name} is empty", "is a shell variable unset?")
        if self.engine == "ray" and ("," in self.device or self.device == "cuda:all"):
            raise UsageError(
                f"--device {shown(self.device)} cannot be used with --engine ray",
                "say with --workers how many workers Ray starts",
            )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractCommand(ExtractSpec):
    """`featcli extract`: the options, and what the command prints."""

    dry_run: Annotated[bool, Option("Print what would be done, and read no weights.", group=REPORT)] = False
    rate: Annotated[
        float | None,
        Option(
            "Images a second of one worker, from which --dry-run tells how long a run would take.",
            group=REPORT,
            check=between(1e-6, 1e9),
            needs=Other("dry_run", "leave --rate out: a run measures it"),
        ),
    ] = None
    as_json: Annotated[bool, Option("Print events as JSON lines on stdout.", flags=("--json",), group=REPORT)] = False
    quiet: Quiet = False
    verbose: Annotated[
        bool,
        Option(
            "Also print every failure and every shard.",
            flags=("-v", "--verbose"),
            group=REPORT,
            excludes=(Other("quiet", "give one of the two: -q leaves these lines out"),),
        ),
    ] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InspectCommand(StageSpec):
    """The options of `featcli inspect`."""

    target: Annotated[
        str,
        Option(
            "A checkpoint as extract -c takes it, or the folder of a dump.",
            known_as=("-c", "--checkpoint", "--model", "-m", "--weights", "--backbone", "--dump", "-o"),
            metavar="CHECKPOINT|DUMP",
            is_argument=True,
            is_model=True,
        ),
    ]
    arch: Arch = None
    model_arg: ModelArg = ()
    image_size: ImageSize = None
    num_channels: NumChannels = None
    norm: ModelNorm = None
    dtype: Annotated[
        Dtype | None,
        Option(
            f"Type in which maps would be stored: {', '.join(DTYPES)}. Default: {DEFAULT_DTYPE}.",
            group=DUMP,
            keep=type_name,
            stands_for=DEFAULT_DTYPE,
        ),
    ] = None
    as_json: Json = False

    def refuse_beside_dump(self) -> None:
        """Raise UsageError for options that are about a checkpoint, if the target is a dump."""
        of_checkpoint = {one.name for one in options_of(InspectCommand)} - {"target", "as_json"}
        self.refuse_given(of_checkpoint, "is only for a checkpoint", f"leave it out: {shown(self.target)} is a dump")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ModelsCommand(Spec):
    """The options of `featcli models`."""

    pattern: Annotated[
        str | None,
        Option(
            "A part of the name, or a pattern such as '*vit*patch14*'.",
            metavar="PATTERN",
            is_argument=True,
            is_model=True,
        ),
    ] = None
    vector: Annotated[
        VectorName | None,
        Option(
            f"List only models that make this vector of a picture: {', '.join(VECTORS)}.",
            flags=("--with",),
            group=STAGES,
        ),
    ] = None
    as_json: Json = False


NO_IMAGES = "give --recompute N or --inputs, too: without them verify reads nothing but dumps"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VerifyCommand(InputSpec):
    """The options of `featcli verify`."""

    dump: DumpFolder
    inputs: Annotated[
        Path | Sequence[Path],
        Option(
            "Images for --recompute and --inputs, as extract was given them.",
            metavar="[INPUT]...",
            is_argument=True,
            keep=parse_inputs,
        ),
    ] = ()
    repair: Annotated[
        bool, Option("Set damaged shards aside, so that the next extract makes them again.", group=DUMP)
    ] = False
    recompute: Annotated[
        int,
        Option(
            "Extract this many of the images again, chosen at random, and compare.",
            group=DUMP,
            check=at_least(0, "say how many images"),
        ),
    ] = 0
    against: Annotated[
        str | None,
        Option(
            "Another dump of the same images, with which all values are compared.",
            known_as=("--compare", "--with", "--reference"),
            metavar="DUMP",
            group=DUMP,
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        Option(
            "Difference that --against allows, as a share of the largest value of an output. Default: 0, equal bits.",
            known_as=("--rtol", "--atol", "--tol"),
            group=DUMP,
            check=between(0, 1, "it is a share of the largest value, such as 0.001"),
            stands_for=0,
            needs=Other("against", "give --against, too: it says how much the values of two dumps may differ"),
        ),
    ] = None
    check_inputs: Annotated[
        bool,
        Option(
            "Say which pictures changed, are gone, or are exact copies of one another.",
            flags=("--inputs",),
            group=DUMP,
        ),
    ] = False
    checkpoint: Annotated[
        str | None,
        Option(
            "The checkpoint for --recompute. Default: the one that the dump names, unless it is a local file.",
            known_as=("--model", "--weights", "-m"),
            flags=("-c", "--checkpoint"),
            group=CHECKPOINT,
            is_model=True,
        ),
    ] = None
    arch: Arch = None
    weights_key: WeightsKey = None
    model_arg: ModelArg = ()
    random_init: RandomInit = False
    seed: Annotated[
        int | None,
        replace(
            OF_SEED, help="Number from which random weights are drawn. Default: that of the dump.", stands_for=None
        ),
    ] = None
    device: Annotated[str | None, replace(OF_DEVICE, help=f"{OF_DEVICE.help} Default: {AUTO}.", stands_for=AUTO)] = None
    as_json: Json = False
    quiet: Annotated[
        bool, replace(OF_QUIET, help="Print only errors, and what --repair does, and --recompute and --against find.")
    ] = False

    def refuse_conflicts(self) -> None:
        """Refuse images and a checkpoint without an option that reads them, and the reverse. See Spec."""
        if not self.recompute:
            of_images = {one.name for one in options_of(InputSpec)} if self.check_inputs else set()
            of_extract = {one.name for one in options_of(ExtractSpec)} - of_images
            wanted = "--recompute" if of_images else "--recompute and --inputs"
            hint = "give --recompute N, too: without it verify reads no checkpoint" if of_images else NO_IMAGES
            self.refuse_given(of_extract, f"is only for {wanted}", hint)
        if not (self.recompute or self.check_inputs):
            Spec.refuse_conflicts(self)  # the one of InputSpec wants an input
            return
        if not (self.input_names or self.files_from or self.table):
            option = "--recompute" if self.recompute else "--inputs"
            raise UsageError(
                f"{option} needs the images", "give them as extract was given them: INPUT, --files-from or --table"
            )
        super().refuse_conflicts()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExportCommand(Spec):
    """The options of `featcli export`."""

    dump: DumpFolder
    output: Annotated[
        str,
        Option(
            "A file, a folder for one .npy file a stage, or - for JSON lines on stdout.",
            flags=("-o", "--output"),
            group=DUMP,
        ),
    ]
    more: Annotated[
        Sequence[str],
        Option(
            "More dumps, of other images and with the same settings. Their rows follow.",
            metavar="[DUMP]...",
            is_argument=True,
            keep=tuple,
            check=no_empty_text,
        ),
    ] = ()
    others: OtherDumps = ()
    keys: Annotated[
        Sequence[str],
        Option(
            "Write only images of this key, with or without suffix, or of a pattern such as 'cats/*'. May be given"
            " several times.",
            known_as=("--key", "--include", "--images", "--only"),
            metavar="GLOB",
            group=IMAGES,
            keep=tuple,
            check=no_empty_text,
        ),
    ] = ()
    where: Annotated[
        Sequence[str],
        Option(
            "Write only images whose column has this value, such as split=train. Given several times, any of the values"
            " of one column counts, and all columns must fit.",
            known_as=("--filter", "--select", "--query"),
            metavar="NAME=VALUE",
            group=IMAGES,
            keep=tuple,
            check=names_and_values,
        ),
    ] = ()
    to: Annotated[
        ExportFormat | None,
        Option(
            f"Format of the file: {', '.join(EXPORT_FORMATS)}. Default: what its suffix says.",
            known_as=("--format", "-f", "--file-format", "--output-format"),
            group=DUMP,
            keep=format_name,
        ),
    ] = None
    stage: StageNames = None
    pool: Annotated[
        str | None,
        Option(
            "Pool stored maps: avg, max, or a grid HxW of averages such as 7x7. Default: as stored.",
            group=STAGES,
            keep=pool_name,
            check=lambda _, value: parse_pool(value),
            offers=("avg", "max"),
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        Option(
            f"Type in which values are written: {', '.join(DTYPES)}. Default: as stored.", group=DUMP, keep=type_name
        ),
    ] = None
    keep_failed: Annotated[
        bool, Option("Also write the rows of failed images, as NaN, or null in JSON lines.", group=DUMP)
    ] = False
    incomplete: Incomplete = False
    overwrite: Annotated[
        bool,
        replace(
            OF_REPLACE,
            excludes=(Other("output", "leave --overwrite out: there is nothing to replace on stdout", value="-"),),
        ),
    ] = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShowCommand(Spec):
    """The options of `featcli show`."""

    dump: DumpFolder
    output: Annotated[
        str,
        Option(
            "A picture (.png, .jpg, .webp), or a page about the dump (.html).", flags=("-o", "--output"), group=DUMP
        ),
    ]
    keys: Annotated[
        Sequence[str],
        Option(
            "Keys, with or without suffix, or patterns such as 'cats/*'. Default: evenly spaced images.",
            known_as=("--key", "--keys", "--image", "--images"),
            metavar="[KEY]...",
            is_argument=True,
        ),
    ] = ()
    root: Annotated[
        str | None,
        Option(
            "Folder to which the keys are relative. Default: where extract found the pictures, or this folder.",
            group=IMAGES,
        ),
    ] = None
    stage: StageNames = None
    num_images: Annotated[
        int | None,
        Option(
            f"Number of images where no keys are given. Default: {SHEET_IMAGES}, on a page {PAGE_IMAGES}.",
            known_as=("--num", "--count", "-n", "--limit", "--samples"),
            group=IMAGES,
            check=at_least(1, "say how many images"),
            excludes=(Other("keys", "leave --num-images out: all images whose keys are given are drawn"),),
        ),
    ] = None
    allow_outside: Annotated[bool, Option("Also draw pictures outside --root.", group=IMAGES)] = False
    others: OtherDumps = ()
    incomplete: Incomplete = False
    overwrite: Replace = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FinalizeCommand(Spec):
    """The options of `featcli finalize`."""

    dump: DumpFolder
    as_json: Json = False
    quiet: Annotated[
        bool, replace(OF_QUIET, excludes=(Other("as_json", "leave -q out: JSON is all that it prints"),))
    ] = False
