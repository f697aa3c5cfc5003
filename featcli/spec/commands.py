"""One spec for each command, and which of its options do not go together."""

# No `from __future__ import annotations` here: every command looks into these, and text would have to be evaluated.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from featcli.errors import UsageError, shown
from featcli.spec.groups import (
    CHECKPOINT,
    DUMP,
    IMAGES,
    REPORT,
    STAGES,
    Arch,
    CheckpointSpec,
    ComputationSpec,
    Device,
    DumpFolder,
    DumpSpec,
    EngineSpec,
    ImageSize,
    Incomplete,
    InputSpec,
    Json,
    ModelNorm,
    NumChannels,
    PixelSpec,
    Quiet,
    RandomInit,
    Replace,
    Seed,
    StageNames,
    StageSpec,
    StoredDtype,
)
from featcli.spec.option import Option, Spec
from featcli.spec.parsers import Path, at_least, parse_inputs, parse_pool
from featcli.spec.words import (
    AUTO,
    DEFAULT_DTYPE,
    DTYPES,
    EXPORT_FORMATS,
    NATIVE,
    Dtype,
    ExportFormat,
)

SHEET_IMAGES, PAGE_IMAGES = 3, 60  # that are drawn where no key is given


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractSpec(EngineSpec, DumpSpec, ComputationSpec, PixelSpec, StageSpec, CheckpointSpec, InputSpec):
    """What can be asked of an extraction. Raises UsageError where an option can be seen to be wrong without looking."""

    def refuse_conflicts(self) -> None:
        """See Spec: what is said by options of several groups goes together."""
        super().refuse_conflicts()
        if not self.checkpoint or not self.output:
            raise UsageError("checkpoint and output are needed", "give -c/--checkpoint and -o/--output")
        if self.part is not None and self.overwrite:
            raise UsageError("--part and --overwrite exclude each other", "delete the dump before its parts begin")
        if self.engine == "ray" and self.retry_failed:
            raise UsageError("--retry-failed does not go with --engine ray", "leave --engine out: they are few shards")
        if self.engine == "ray" and ("," in self.device or self.device == "cuda:all"):
            raise UsageError(f"--device {shown(self.device)} does not go with --engine ray", "see --workers")
        if self.compile and self.fit == NATIVE:
            raise UsageError("--compile does not go with --fit native", "a network is compiled for one size")
        if self.decode == "scaled" and self.fit == NATIVE:
            raise UsageError("--decode scaled does not go with --fit native", "native keeps every pixel of a picture")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExtractCommand(ExtractSpec):
    """`featcli extract`: the options, and what the command says."""

    dry_run: Annotated[bool, Option("Say what would be done; read no weights.", group=REPORT)] = False
    rate: Annotated[
        float | None,
        Option(
            "Images a second of one worker: --dry-run says how long it would take.", group=REPORT, least=1e-6, most=1e9
        ),
    ] = None
    as_json: Annotated[bool, Option("Events as JSON lines on stdout.", flags=("--json",), group=REPORT)] = False
    quiet: Quiet = False
    verbose: Annotated[bool, Option("Also every failure and shard.", flags=("-v", "--verbose"), group=REPORT)] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InspectCommand(StageSpec):
    """`featcli inspect`."""

    target: Annotated[
        str, Option("What extract -c or -o take.", metavar="CHECKPOINT|DUMP", is_argument=True, is_model=True)
    ]
    arch: Arch = None
    image_size: ImageSize = None
    num_channels: NumChannels = None
    norm: ModelNorm = None
    dtype: StoredDtype = DEFAULT_DTYPE
    as_json: Json = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ModelsCommand(Spec):
    """`featcli models`."""

    pattern: Annotated[
        str | None,
        Option(
            "A part of the name, or a pattern such as '*vit*patch14*'.",
            metavar="PATTERN",
            is_argument=True,
            is_model=True,
        ),
    ] = None
    as_json: Json = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VerifyCommand(InputSpec):
    """`featcli verify`."""

    dump: DumpFolder
    inputs: Annotated[
        Path | Sequence[Path],
        Option("For --recompute: what extract was given.", metavar="[INPUT]...", is_argument=True, keep=parse_inputs),
    ] = ()
    repair: Annotated[
        bool, Option("Put damaged shards aside, so that the next extract makes them again.", group=DUMP)
    ] = False
    recompute: Annotated[
        int,
        Option(
            "Extract so many images anew, drawn by chance, and compare.",
            group=DUMP,
            check=at_least(0, "say how many images"),
        ),
    ] = 0
    checkpoint: Annotated[
        str,
        Option("For --recompute: as for extract.", flags=("-c", "--checkpoint"), group=CHECKPOINT, is_model=True),
    ] = ""
    arch: Arch = None
    random_init: RandomInit = False
    seed: Seed = 0
    device: Device = AUTO
    as_json: Json = False
    quiet: Quiet = False

    def refuse_conflicts(self) -> None:
        """See Spec: images and a checkpoint are for --recompute, which needs both."""
        if not self.recompute:
            return
        if not (self.checkpoint and (self.input_names or self.files_from)):
            raise UsageError(
                "--recompute needs what extract was given", "give -c/--checkpoint and the INPUT, or a list"
            )
        super().refuse_conflicts()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExportCommand(Spec):
    """`featcli export`."""

    dump: DumpFolder
    output: Annotated[
        str,
        Option(
            "A file, a folder for one .npy file a stage, or - for JSON lines.", flags=("-o", "--output"), group=DUMP
        ),
    ]
    to: Annotated[
        ExportFormat | None, Option(f"{', '.join(EXPORT_FORMATS)}. Default: what the suffix says.", group=DUMP)
    ] = None
    stage: StageNames = None
    pool: Annotated[
        str | None,
        Option(
            "avg, max, or a grid HxW of averages such as 7x7. Default: as stored.",
            group=STAGES,
            check=lambda _, value: parse_pool(value),
            offers=("avg", "max"),
        ),
    ] = None
    dtype: Annotated[Dtype | None, Option(f"{', '.join(DTYPES)}. Default: as stored.", group=DUMP)] = None
    keep_failed: Annotated[bool, Option("Keep the rows of failed images: NaN, null in JSON lines.", group=DUMP)] = False
    incomplete: Incomplete = False
    overwrite: Replace = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShowCommand(Spec):
    """`featcli show`."""

    dump: DumpFolder
    output: Annotated[
        str,
        Option("A picture (.png, .jpg, .webp), or a page on the dump (.html).", flags=("-o", "--output"), group=DUMP),
    ]
    keys: Annotated[
        Sequence[str],
        Option("Images by their keys. Default: evenly spaced ones.", metavar="[KEY]...", is_argument=True),
    ] = ()
    root: Annotated[
        str | None,
        Option("Folder that the keys are relative to: the INPUT of extract. Default: here.", group=IMAGES),
    ] = None
    stage: StageNames = None
    num_images: Annotated[
        int | None,
        Option(
            f"Without keys: so many. Default: {SHEET_IMAGES}, on a page {PAGE_IMAGES}.",
            group=IMAGES,
            check=at_least(1, "say how many images"),
        ),
    ] = None
    allow_outside: Annotated[bool, Option("Follow keys that lead out of that folder, too.", group=IMAGES)] = False
    incomplete: Incomplete = False
    overwrite: Replace = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FinalizeCommand(Spec):
    """`featcli finalize`."""

    dump: DumpFolder
    as_json: Json = False
    quiet: Quiet = False
