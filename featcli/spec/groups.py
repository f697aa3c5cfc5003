"""Define the options, group by group, as mixins for specs.

Help, words, default and check of an option stand here alone.
"""

# `from __future__ import annotations` would make annotations text, which every command would have to evaluate.
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from featcli.errors import UsageError, any_of, shown
from featcli.spec.option import Option, Other, Spec
from featcli.spec.parsers import (
    Path,
    Size,
    at_least,
    between,
    count_up_to,
    depth_as_given,
    device_text,
    dump_format,
    interpolation_name,
    list_as_given,
    model_args,
    numbers_as_given,
    parse_count,
    parse_depth_range,
    parse_features,
    parse_indices,
    parse_inputs,
    parse_model_args,
    parse_part,
    parse_pools,
    parse_size,
    path_text,
    patterns_as_given,
    pools_by_stage,
    precision_of_type,
    size_as_given,
    table_as_given,
    type_name,
    within_picture,
)
from featcli.spec.words import (
    ALL,
    AUTO,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DEFAULT_PRECISION,
    DTYPES,
    ENGINES,
    FITS,
    FORMATS,
    INTERPOLATIONS,
    LAYOUTS,
    LEAST_CROP,
    MAX_PIXELS,
    MOST,
    MOST_CHANNELS,
    MOST_THREADS,
    NATIVE,
    PATH_COLUMNS,
    POOLS,
    PRECISIONS,
    VECTORS,
    Alpha,
    Auto,
    Colour,
    Decode,
    Dtype,
    EngineName,
    Fit,
    Format,
    Interpolation,
    Layout,
    Norm,
    Orientation,
    Precision,
    ProcessorBackend,
)

# The headings of the help, in order.
IMAGES, CHECKPOINT, STAGES, PIXELS = "Images", "Checkpoint", "Stages", "Pixels"
COMPUTATION, DUMP, WORKERS, REPORT = "Computation", "Dump", "Workers", "Report"
GROUPS = (IMAGES, CHECKPOINT, STAGES, PIXELS, COMPUTATION, DUMP, WORKERS, REPORT)


# These options occur in several specs, in one group or another.
Arch = Annotated[
    str | None,
    Option(
        "The timm architecture that a weights file belongs to.",
        known_as=("--architecture", "--model-arch"),
        group=CHECKPOINT,
        is_model=True,
    ),
]
RandomInit = Annotated[
    bool,
    Option(
        "Use random weights instead of trained ones.",
        known_as=("--no-pretrained", "--random", "--scratch"),
        group=CHECKPOINT,
    ),
]
OF_SEED = Option(
    "Number from which random weights are drawn. Default: 0.",
    group=CHECKPOINT,
    check=between(0, 2**63 - 1, most_said="2**63 - 1"),
    stands_for=0,
    needs=Other("random_init", "leave --seed out, or give --random-init: it draws random weights"),
)
Seed = Annotated[int | None, OF_SEED]
ModelArg = Annotated[
    Mapping[str, Any] | Sequence[str],
    Option(
        "An argument of the network, such as init_values=1e-5. May be given several times.",
        metavar="NAME=VALUE",
        group=CHECKPOINT,
        keep=parse_model_args,
    ),
]
WeightsKey = Annotated[
    str | None,
    Option(
        "Which weights of the file to take: a container, a prefix of their names, or both,"
        " such as teacher.backbone. Default: those that fit best.",
        metavar="NAME",
        group=CHECKPOINT,
        needs=Other(
            "arch", "leave --weights-key out: it chooses within a weights file, whose architecture --arch names"
        ),
    ),
]
NumChannels = Annotated[
    int | None,
    Option(
        "Channels of the input: 1 for greys, 3 for colours, else bands. Default: the checkpoint's own, mostly 3.",
        known_as=("--in-chans", "--in-channels", "--channels"),
        group=CHECKPOINT,
        check=between(1, MOST_CHANNELS, "1 is grey"),
    ),
]
ModelNorm = Annotated[
    Norm | None,
    Option(
        "Take maps before (raw) or after (model) the final norm. Default: as the library gives them.",
        group=STAGES,
    ),
]
ImageSize = Annotated[
    str | int | Size | None,
    Option(
        "Size of the input, N or HxW; with --fit native the largest. Default: the checkpoint's own.",
        known_as=("--size", "--resolution", "--img-size", "--input-size", "--resize", "--imgsz"),
        group=PIXELS,
        keep=size_as_given,
        check=lambda option, value: parse_size(value, option),
    ),
]
OF_DEVICE = Option(
    "Where to compute: auto, cpu, cuda, cuda:N or mps. Several, such as cuda:0,cuda:1 or cuda:all,"
    " get one process each.",
    known_as=("--gpu", "--gpus", "--cuda", "--device-id", "-d"),
    group=COMPUTATION,
    keep=device_text,
    offers=(AUTO, "cpu", "cuda", "cuda:all", "mps"),
)
Incomplete = Annotated[bool, Option("Read a dump that is not complete yet.", group=DUMP)]
OF_QUIET = Option(
    "Print errors, and nothing else but how many images failed or are safe.",
    known_as=("--silent", "--no-progress"),
    flags=("-q", "--quiet"),
    group=REPORT,
)
Quiet = Annotated[bool, OF_QUIET]
Json = Annotated[bool, Option("Print JSON on stdout.", flags=("--json",), group=REPORT)]
OF_REPLACE = Option("Replace a file that is there.", known_as=("--force", "--replace"), group=DUMP)
Replace = Annotated[bool, OF_REPLACE]
DumpFolder = Annotated[
    str,
    Option(
        "A folder that featcli extract made.",
        known_as=("--dump", "--input", "-i", "-d", "--features", "--folder"),
        metavar="DUMP",
        is_argument=True,
    ),
]
StageNames = Annotated[
    Sequence[str] | str | None,
    Option(
        "Names of stages or other outputs, such as stage2,stage4, stage2:stage4 or embedding. Default: all.",
        known_as=("--out-features", "--layer", "--layers", "--stages", "--features"),
        group=STAGES,
        keep=parse_features,
    ),
]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InputSpec(Spec):
    """Where images are looked for."""

    inputs: Annotated[
        Path | Sequence[Path],
        Option(
            "Images, tar files, or folders with all that is below them; or URLs of these.",
            metavar="INPUT",
            known_as=(
                "--input",
                "-i",
                "--inputs",
                "--images",
                "--data",
                "--data-dir",
                "--image-dir",
                "--folder",
                "--dir",
                "--path",
                "--source",
            ),
            is_argument=True,
            keep=parse_inputs,
        ),
    ] = field(default=(), kw_only=False)
    files_from: Annotated[
        Path | Sequence[Path] | None,
        Option(
            "A file that lists paths or URLs of images, one a line; - reads stdin.",
            known_as=("--list", "--file-list", "--filelist", "--image-list", "--images-from", "--list-file"),
            group=IMAGES,
            keep=list_as_given,
        ),
    ] = None
    null: Annotated[
        bool,
        Option(
            "The names in the list end in a zero byte.",
            flags=("-0", "--null"),
            group=IMAGES,
            needs=Other("files_from", "give the list, too: -0 says how its names are separated"),
        ),
    ] = False
    table: Annotated[
        Any,
        Option(
            "A table with a row for each image: CSV, TSV, JSON Lines, Parquet or Arrow; - reads stdin. Its other"
            " columns, such as labels and splits, go into the dump.",
            metavar="FILE",
            known_as=(
                "--csv",
                "--tsv",
                "--metadata",
                "--annotations",
                "--parquet",
                "--dataframe",
                "--labels",
                "--jsonl",
            ),
            group=IMAGES,
            keep=table_as_given,
            excludes=(Other("files_from", "give one of the two: a table lists images, too"),),
        ),
    ] = None
    path_column: Annotated[
        str | None,
        Option(
            f"Column of the table that holds the paths or URLs of the images. Default: {any_of(PATH_COLUMNS)}.",
            metavar="NAME",
            known_as=("--image-column", "--image-col", "--img-col", "--path-col", "--filename-column", "--file-column"),
            group=IMAGES,
            needs=Other("table", "give the table, too"),
        ),
    ] = None
    path_format: Annotated[
        str | None,
        Option(
            "Make the paths from other columns of the table, such as 'images/{id}.jpg'. {id:06d} writes 7 as 000007.",
            metavar="FORMAT",
            known_as=("--path-template", "--path-pattern"),
            group=IMAGES,
            needs=Other("table", "give the table, too: its columns stand in the braces"),
            excludes=(Other("path_column", "give one of the two: each says what the paths are"),),
        ),
    ] = None
    key_column: Annotated[
        str | None,
        Option(
            "Column of the table that holds the keys, so that several rows may name one image. Default: the paths are"
            " the keys.",
            metavar="NAME",
            known_as=("--id-column", "--id-col", "--index-column"),
            group=IMAGES,
            needs=Other("table", "give the table, too"),
        ),
    ] = None
    unique: Annotated[
        bool,
        Option(
            "Take the first of the rows of a table that have the same key. Otherwise the second one is an error.",
            known_as=("--dedup", "--drop-duplicates"),
            group=IMAGES,
            needs=Other("table", "leave --unique out: a name that is listed again is read once"),
        ),
    ] = False
    root: Annotated[
        Path | None,
        Option(
            "Folder or URL to which the paths of a list or table, and their keys, are relative. Default: the current"
            " folder for a list, the table's own folder for a table.",
            group=IMAGES,
            keep=path_text,
        ),
    ] = None
    allow_outside: Annotated[
        bool, Option("Allow listed paths outside --root; their keys are absolute paths.", group=IMAGES)
    ] = False
    follow_links: Annotated[
        bool,
        Option(
            "Also search folders that are symbolic links.",
            group=IMAGES,
            needs=Other("inputs", "leave --follow-links out: a list names every image"),
        ),
    ] = False
    exclude: Annotated[
        Sequence[str] | str,
        Option(
            "Leave out images whose key fits this pattern, with or without its suffix, such as 'val/*'; * also stands"
            " for slashes. May be given several times.",
            metavar="GLOB",
            known_as=("--ignore", "--skip", "--exclude-pattern"),
            group=IMAGES,
            keep=patterns_as_given,
        ),
    ] = ()
    limit: Annotated[
        int | None,
        Option(
            "Take only the first N images in row order. Default: all.",
            metavar="N",
            known_as=("--max-images", "--max-samples", "--num-images", "--num-samples", "--head", "-n"),
            group=IMAGES,
            check=at_least(1, "say how many images"),
        ),
    ] = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs as text."""
        return parse_inputs(self.inputs)

    @property
    def list_name(self) -> str | None:
        """The file that lists names, as text; None if there is none."""
        return os.fspath(self.files_from) if isinstance(self.files_from, str | os.PathLike) else None

    @property
    def listed_names(self) -> tuple[str, ...] | None:
        """The names themselves, if they were listed in Python and not in a file."""
        is_file = self.files_from is None or self.list_name is not None
        return None if is_file else tuple(map(os.fspath, self.files_from))  # type: ignore[arg-type]

    @property
    def root_name(self) -> str | None:
        """The folder or URL that listed names are relative to, as text."""
        return None if self.root is None else os.fspath(self.root)

    def refuse_conflicts(self) -> None:
        """Check that there is an input. See Spec."""
        super().refuse_conflicts()
        if self.files_from is None and self.table is None:
            for name, hint in (
                ("root", "give a list or a table, too: its names are relative to --root"),
                ("allow_outside", "leave --allow-outside out: images in a folder are never outside it"),
            ):
                self.refuse_given((name,), "needs --files-from or --table", hint)
        self.refuse_no_input()
        if self.listed_names is not None and self.null:
            raise UsageError(
                "-0 needs a list in a file", "leave -0 out: the names in a list of Python need no separator"
            )
        if "" in self.input_names:
            raise UsageError("an input is empty", "is a shell variable unset? Write . for the current folder")

    def refuse_no_input(self) -> None:
        """Raise UsageError if no image is named."""
        if not self.input_names and self.files_from is None and self.table is None:
            raise UsageError("there is no input", "name a folder or images, a list with --files-from, or a --table")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CheckpointSpec(Spec):
    """A checkpoint, its weights, and the input that it takes.

    In Python the checkpoint may be a path or a transformers configuration (an object, or its dictionary). A
    configuration has no weights, so it means `random_init`, as in `AutoBackbone.from_config`, unless it says
    `use_pretrained_backbone`.
    """

    checkpoint: Annotated[
        Any,
        Option(
            "A timm model, a folder, a weights file (with --arch) or a hub id.",
            known_as=("--model", "--weights", "--backbone", "--model-name", "--ckpt", "--network", "--net", "-m"),
            flags=("-c", "--checkpoint"),
            group=CHECKPOINT,
            is_model=True,
        ),
    ]
    arch: Arch = None
    weights_key: WeightsKey = None
    model_arg: ModelArg = ()
    random_init: RandomInit = False
    seed: Seed = None
    num_channels: NumChannels = None
    norm: ModelNorm = None
    image_size: ImageSize = None
    fit: Annotated[
        Fit | None,
        Option(
            f"How pictures get the input size: {', '.join(FITS)} (which keeps their own)."
            " Default: as the checkpoint does.",
            group=PIXELS,
        ),
    ] = None
    processor_backend: Annotated[
        ProcessorBackend | None,
        Option(
            "How an image processor of transformers resizes: pil, torchvision. Default: pil where it can.",
            group=PIXELS,
            excludes=(Other("fit", "leave one of them out: Pillow resizes pictures for --fit"),),
        ),
    ] = None
    mean: Annotated[
        str | float | Sequence[float] | None,
        Option(
            "Subtract this from the picture's values, which go from 0 to 1: a number for each channel, or one for all."
            " Default: the checkpoint's own.",
            metavar="X[,X...]",
            group=PIXELS,
            keep=numbers_as_given,
            check=within_picture(above_zero=False),
        ),
    ] = None
    std: Annotated[
        str | float | Sequence[float] | None,
        Option(
            "Divide by this after --mean: a number for each channel, or one for all. Default: the checkpoint's own.",
            metavar="X[,X...]",
            group=PIXELS,
            keep=numbers_as_given,
            check=within_picture(above_zero=True),
        ),
    ] = None
    interpolation: Annotated[
        Interpolation | None,
        Option(
            f"How pictures are resized: {', '.join(INTERPOLATIONS)}. Default: the checkpoint's own.",
            known_as=("--resample", "--resampling"),
            group=PIXELS,
            keep=interpolation_name,
        ),
    ] = None
    crop_pct: Annotated[
        float | None,
        Option(
            "Resize pictures to the input size divided by this share, then cut out the centre, such as 0.875."
            " Default: as the checkpoint does.",
            known_as=("--crop-percent", "--crop-ratio"),
            group=PIXELS,
            check=between(LEAST_CROP, 1, "it is a share, such as 0.875 or 1"),
            excludes=(Other("fit", "--fit says by itself what is cut off: leave one of them out"),),
        ),
    ] = None

    @property
    def config(self) -> Any:
        """The transformers configuration that was given in place of a checkpoint, or None."""
        return None if isinstance(self.checkpoint, str | os.PathLike) else self.checkpoint

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint as text; for a configuration, the name of its class."""
        return os.fspath(self.checkpoint) if self.config is None else type(self.checkpoint).__name__

    @property
    def is_random(self) -> bool:
        """Whether weights are random."""
        return self.random_init or (self.config is not None and not _wants_pretrained(self.config))

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of the network, by name."""
        return model_args(tuple(self.model_arg))

    @property
    def seed_of_weights(self) -> int:
        """The seed of random weights."""
        return self.seed or 0

    def is_given(self, name: str) -> bool:
        """Return whether an option is given; a configuration gives `random_init`. See Spec."""
        return self.is_random if name == "random_init" else super().is_given(name)

    @property
    def input_size(self) -> Size | None:
        """The (H, W) of the input that was asked for; None is the checkpoint's own."""
        return None if self.fit == NATIVE else parse_size(self.image_size)

    @property
    def largest_size(self) -> Size | None:
        """The (H, W) that pictures with sizes of their own are shrunk into; None is no limit."""
        return parse_size(self.image_size) if self.fit == NATIVE else None

    def refuse_conflicts(self) -> None:
        """Check that the checkpoint is a name, a path or a configuration. See Spec."""
        super().refuse_conflicts()
        if self.config is not None:
            self.check_configuration()

    def check_configuration(self) -> None:
        """Raise UsageError if the checkpoint is neither text nor a configuration."""
        config = self.checkpoint
        if not ("model_type" in config if isinstance(config, Mapping) else hasattr(config, "model_type")):
            raise UsageError(
                f"checkpoint {shown(config)} is neither a name, a path nor a configuration of transformers",
                "give a configuration object, or its dictionary with a model_type",
            )


def _wants_pretrained(config: Any) -> bool:
    """Return whether a configuration, or that of the backbone inside it, asks for trained weights."""
    for _ in range(2):
        fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        if fields.get("use_pretrained_backbone"):
            return True
        config = fields.get("backbone_config") or {}
    return False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StageSpec(Spec):
    """The stages that are chosen."""

    out_indices: Annotated[
        Sequence[int] | int | str | None,
        Option(
            "Indices of stages, such as 1,2,-1, or all. Default: the last stage.",
            known_as=(
                *("--indices", "--index", "--layer-index", "--layer-indices"),
                *("--layer", "--layers", "--stage", "--stages", "--blocks"),  # usually with numbers
            ),
            group=STAGES,
            keep=parse_indices,
            offers=(ALL,),
        ),
    ] = None
    out_features: Annotated[
        Sequence[str] | str | None,
        Option(
            "Names of stages, such as stem,stage2, a range such as stage2:stage4, or all; and of the model's own"
            f" vectors: {', '.join(VECTORS)}.",
            known_as=("--layer", "--layers", "--stage", "--stages", "--features", "--blocks", "--return-nodes"),
            group=STAGES,
            keep=parse_features,
            offers=(ALL,),
        ),
    ] = None

    @property
    def indices(self) -> tuple[int, ...] | Literal["all"] | None:
        """The indices as numbers, `all`, or None."""
        return parse_indices(self.out_indices)

    @property
    def features(self) -> tuple[str, ...] | None:
        """The names and ranges of names, or None."""
        return parse_features(self.out_features)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PixelSpec(Spec):
    """What happens to a picture before the checkpoint's own preprocessing."""

    orientation: Annotated[
        Orientation, Option("What to do with the orientation that a file names: apply, ignore.", group=PIXELS)
    ] = "apply"
    alpha: Annotated[
        Alpha,
        Option("What to put behind transparent pixels: white, black; drop shows their hidden colours.", group=PIXELS),
    ] = "drop"
    depth_range: Annotated[
        str | None,
        Option(
            "Values of black and white in pictures deeper than 8 bits, such as 0:4095. Default: the whole range.",
            group=PIXELS,
            keep=depth_as_given,
            check=lambda option, value: parse_depth_range(value, option),
        ),
    ] = None
    colour: Annotated[
        Colour,
        Option("What to do with ICC profiles that are not sRGB: ignore them, or convert to sRGB.", group=PIXELS),
    ] = "ignore"
    max_pixels: Annotated[int, Option("Pictures with more pixels than this fail.", group=PIXELS, check=at_least(1))] = (
        MAX_PIXELS
    )
    decode: Annotated[
        Decode,
        Option(
            "How pictures are read and resized: exact; fast, which may differ by 2 of 256 levels and needs"
            " featcli[fast]; or scaled, which reads large JPEGs at a smaller size.",
            group=PIXELS,
        ),
    ] = "exact"

    def refuse_conflicts(self) -> None:
        """Refuse to read JPEGs smaller than they are if pictures keep their sizes. See Spec."""
        super().refuse_conflicts()
        if self.decode == "scaled" and getattr(self, "fit", None) == NATIVE:
            raise UsageError(
                "--decode scaled cannot be used with --fit native",
                "leave --decode out: native keeps every pixel of a picture",
            )

    @property
    def black_and_white(self) -> tuple[float, float] | None:
        """The values of deep pictures that become black and white, or None."""
        return parse_depth_range(self.depth_range)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ComputationSpec(Spec):
    """How and where the network is run."""

    device: Annotated[str, OF_DEVICE] = AUTO
    precision: Annotated[
        Precision | Auto,
        Option(
            f"Precision of the computation: {', '.join(PRECISIONS)}, or {AUTO}, the fastest here."
            " The names of dtypes, such as float16, are understood.",
            known_as=("--half", "--amp", "--fp16", "--bf16", "--float16", "--mixed-precision"),
            group=COMPUTATION,
            keep=precision_of_type,
        ),
    ] = DEFAULT_PRECISION
    layout: Annotated[
        Layout | Auto,
        Option(
            f"Memory layout of the computation: {', '.join(LAYOUTS)}, or {AUTO}, the fastest here.", group=COMPUTATION
        ),
    ] = AUTO
    fold: Annotated[
        bool | None,
        Option(
            "Fold batch norms into convolutions. Default: where that is faster. With --layout channels-first"
            " --no-fold all numbers equal the library's to the last bit.",
            group=COMPUTATION,
        ),
    ] = None
    compile: Annotated[
        bool | None,
        Option(
            "Compile the network with torch.compile, which takes up to half a minute at the start. Default: in long"
            " runs, where a trial says that it pays.",
            known_as=("--torch-compile",),
            group=COMPUTATION,
            excludes=(Other("fit", "leave one of them out: a network is compiled for one size", value=NATIVE),),
            stands_for=False,
        ),
    ] = None
    batch_size: Annotated[
        int | Auto | None,
        Option(
            f"Images that go through the backbone together, or {AUTO}, the fastest number here. Default:"
            f" {DEFAULT_BATCH_SIZE}, or fewer where a trial says that this is faster.",
            known_as=("--batch", "--bs", "-b"),
            group=COMPUTATION,
            parse=parse_count,
            check=count_up_to(MOST),
        ),
    ] = None
    threads: Annotated[
        int | Auto,
        Option(
            f"Threads of the forward pass on a CPU, or {AUTO}, which leaves it to torch.",
            known_as=("--num-threads", "--cpu-threads"),
            group=COMPUTATION,
            parse=parse_count,
            check=count_up_to(MOST_THREADS),
        ),
    ] = AUTO
    decode_threads: Annotated[
        int | Auto,
        Option(
            f"Threads of each process that decode pictures, or {AUTO}, the cores divided by the processes.",
            known_as=("--num-workers", "--loader-threads", "--jobs", "-j", "--nproc"),
            group=COMPUTATION,
            parse=parse_count,
            check=count_up_to(MOST_THREADS),
        ),
    ] = AUTO
    decode_processes: Annotated[
        int | Auto,
        Option(
            f"Processes among which these threads are divided; 0 keeps them in the process that computes. {AUTO} takes"
            " several on a GPU where more than 8 threads decode many images.",
            known_as=("--loader-processes",),
            group=COMPUTATION,
            parse=parse_count,
            check=count_up_to(MOST_THREADS, least=0),
        ),
    ] = AUTO


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DumpSpec(Spec):
    """What is stored, and where."""

    output: Annotated[
        Path,
        Option(
            "Folder of the dump, which is made or resumed.",
            known_as=("--out", "--output-dir", "--out-dir", "--outdir", "--save", "--save-dir", "--dest"),
            flags=("-o", "--output"),
            group=DUMP,
            keep=path_text,
        ),
    ]
    label_level: Annotated[
        int | None,
        Option(
            "Which folder inside its INPUT is the label of an image: 1 is the first, 2 the one in that. Default: 1.",
            metavar="N",
            known_as=("--class-level", "--label-depth"),
            group=IMAGES,
            check=at_least(1, "1 is the first folder"),
            stands_for=1,
        ),
    ] = None
    pool: Annotated[
        str | int | Sequence[str] | Mapping[str, Any],
        Option(
            f"What is stored of a map: {', '.join(POOLS)}, or a grid HxW of averages such as 7x7. mean and gap are"
            " avg, 7 is 7x7. Several, as in none,cls, are stored side by side; stage4=avg is for one stage, and may be"
            " given several times. Default: none.",
            known_as=("--pooling", "--global-pool", "--reduce", "--reduction", "--gap"),
            metavar="[STAGE=]POOL[,POOL]",
            group=DUMP,
            keep=parse_pools,
            offers=POOLS,
        ),
    ] = ()
    dtype: Annotated[
        Dtype,
        Option(
            f"Type in which maps are stored: {', '.join(DTYPES)}; fp32, fp16, half and bf16 are understood.",
            known_as=("--half", "--fp16", "--bf16", "--float16", "--output-dtype"),
            group=DUMP,
            keep=type_name,
        ),
    ] = DEFAULT_DTYPE
    format: Annotated[
        Format,
        Option(
            f"Format of the shard files: {', '.join(FORMATS)}; h5 is hdf5.",
            known_as=("--file-format", "--output-format", "--hdf5", "--h5", "--safetensors"),
            flags=("-f", "--format"),
            group=DUMP,
            keep=dump_format,
        ),
    ] = "hdf5"
    shard_size: Annotated[
        int | None,
        Option(
            "Images in a shard, rounded up to whole batches. Default: as many as make about 1 GiB;"
            " fewer where several processes share the work.",
            group=DUMP,
            check=count_up_to(MOST, or_auto=False),
        ),
    ] = None
    overwrite: Annotated[
        bool,
        Option(
            "Delete the dump that is there, and start anew.",
            known_as=("--force", "--replace", "--exist-ok", "--clobber", "--restart"),
            group=DUMP,
        ),
    ] = False
    extend: Annotated[
        bool,
        Option(
            "Add images that the dump does not hold yet. A dump that is not there is begun.",
            known_as=("--append", "--update", "--add", "--incremental", "--grow"),
            group=DUMP,
            excludes=(
                Other("overwrite", "leave one of them out: --overwrite deletes what --extend adds to"),
                Other("retry_failed", "give --retry-failed in a run of its own"),
            ),
        ),
    ] = False
    check_digests: Annotated[
        bool,
        Option(
            "Read all pictures that the dump holds already, and name those whose bytes changed.",
            group=DUMP,
            needs=Other("extend", "leave --check-digests out, or use featcli verify --inputs"),
        ),
    ] = False
    retry_failed: Annotated[
        bool,
        Option(
            "Try failed images again; shards without any stay as they are.",
            known_as=("--retry", "--retries"),
            group=DUMP,
            excludes=(
                Other("overwrite", "leave --retry-failed out: --overwrite tries all images anyway"),
                Other("engine", "leave --engine out: there are few such shards", value="ray"),
            ),
        ),
    ] = False

    @property
    def pools(self) -> tuple[str, ...]:
        """The reductions of all maps that have none of their own."""
        return self._pools[0] or ("none",)

    @property
    def is_pool_for_all(self) -> bool:
        """Whether reductions are given for all maps that have none of their own."""
        return bool(self._pools[0])

    @property
    def pools_of_stages(self) -> dict[str, tuple[str, ...]]:
        """The reductions of those stages that have some of their own."""
        return self._pools[1]

    @property
    def _pools(self) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        return pools_by_stage(tuple(self.pool))  # type: ignore[arg-type]  # see `keep`

    @property
    def dump_path(self) -> pathlib.Path:
        """The folder of the dump."""
        return pathlib.Path(self.output)

    def refuse_conflicts(self) -> None:
        """Check that the dump is a local folder. See Spec."""
        super().refuse_conflicts()
        if "://" in os.fspath(self.output):
            raise UsageError(
                f"-o {shown(os.fspath(self.output))}: a dump is a local folder", "copy it there when it is complete"
            )


RAY = Other("engine", "name devices instead, for several processes on this machine: --device cpu,cpu", value="ray")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EngineSpec(Spec):
    """Who makes the shards."""

    part: Annotated[
        str | None,
        Option(
            "Make only part I of N, counted from 0; auto takes both from the scheduler.",
            group=WORKERS,
            metavar="I/N",
            check=lambda _, value: parse_part(value),
            offers=(AUTO,),
            excludes=(Other("overwrite", "leave --overwrite out, and delete the dump before its parts begin"),),
        ),
    ] = None
    engine: Annotated[
        EngineName, Option(f"Where shards are made: {', '.join(ENGINES)}; ray is a cluster.", group=WORKERS)
    ] = "local"
    ray_address: Annotated[
        str | None,
        Option(
            "Address of the Ray cluster, auto or host:port. Default: start Ray on this machine.",
            group=WORKERS,
            offers=(AUTO,),
            needs=RAY,
        ),
    ] = None
    workers: Annotated[
        int | None,
        Option(
            "Number of Ray workers. Default: as many as the cluster has room for.",
            group=WORKERS,
            check=between(1, MOST),
            needs=RAY,
        ),
    ] = None
    cpus_per_worker: Annotated[
        float | None,
        Option(
            "CPUs of each Ray worker. Default: as many as --threads; with GPUs the CPUs of a node for each.",
            group=WORKERS,
            check=between(0, MOST),
            needs=RAY,
        ),
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        Option(
            "GPUs of each Ray worker. Default: 1 with --device cuda, else 0.",
            group=WORKERS,
            check=between(0, MOST),
            needs=RAY,
        ),
    ] = None
