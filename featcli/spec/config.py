"""What can be asked of `extract`: each option's name, default and check live here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featcli.backbones.execution import DEFAULT_PRECISION, LAYOUTS, PRECISIONS
from featcli.dump.formats import FORMATS
from featcli.errors import UsageError, one_of, shown
from featcli.pixels.colour import MAX_PIXELS, PixelRules, parse_depth_range
from featcli.pixels.resize import NATIVE
from featcli.run.pooling import pooling

if TYPE_CHECKING:
    from featcli.backbones.checkpoint import Request
    from featcli.inputs.listing import Given

AUTO = "auto"  # featcli chooses, says so, and what can move a bit is kept by the dump
DEFAULT_BATCH_SIZE = 32
MOST_THREADS = 1024  # far more than helps, and far fewer than some libraries die of
ENGINES = ("local", "ray")
DTYPES = ("float32", "float16", "bfloat16")
SHARD_BYTES = 1024**3  # about 1 GiB: minutes of work, a commit that costs nothing beside it
MOST = 200_000  # of anything that is counted: the keys of a shard must fit into a safetensors header
MAX_SHARD_ROWS = 4096  # where rows are small: what a kill can cost is minutes of work, not a gigabyte


def parse_count(option: str, text: str) -> int | str:
    """`auto`, or how many. Raises UsageError."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        hint = "leave it out for the default"
        raise UsageError(f"{option} {shown(text)}: neither a number nor {AUTO}", hint) from None


@dataclass(frozen=True)
class ExtractConfig:
    """The options of an extraction. Raises UsageError where one of them can be seen to be wrong by itself."""

    inputs: tuple[str, ...] = ()
    checkpoint: Any = ""  # a name, a path, or a transformers configuration object (random weights)
    output: str = ""
    files_from: str | None = None
    null: bool = False
    root: str | None = None
    allow_outside: bool = False
    follow_links: bool = False
    arch: str | None = None
    random_init: bool = False
    seed: int = 0
    num_channels: int | None = None
    norm: str | None = None
    out_indices: tuple[int, ...] | str | None = None
    out_features: tuple[str, ...] | None = None
    image_size: str | int | tuple[int, int] | None = None
    fit: str | None = None
    orientation: str = "apply"
    alpha: str = "drop"
    depth_range: str | None = None
    max_pixels: int = MAX_PIXELS
    decode: str = "exact"
    device: str = "auto"
    precision: str = DEFAULT_PRECISION
    layout: str = AUTO
    fold: bool | None = None  # None: where it is faster
    compile: bool = False
    batch_size: int | str = DEFAULT_BATCH_SIZE
    threads: int | str = AUTO
    decode_threads: int | str = AUTO
    pool: str = "none"
    dtype: str = "float32"
    format: str = "hdf5"
    shard_size: int | None = None
    part: str | None = None
    overwrite: bool = False
    retry_failed: bool = False
    engine: str = ENGINES[0]
    ray_address: str | None = None  # None: a Ray of its own
    workers: int | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        self._check_inputs()
        if "://" in self.output:
            raise UsageError(f"-o {shown(self.output)}: a dump is a local folder", "copy it there when it is complete")
        one_of("--precision", self.precision, (*PRECISIONS, AUTO))
        one_of("--layout", self.layout, (*LAYOUTS, AUTO))
        one_of("--dtype", self.dtype, DTYPES)
        one_of("--format", self.format, tuple(FORMATS))
        one_of("--engine", self.engine, ENGINES)
        if self.part is not None:
            self._check_part(self.part)
        self._check_counts()
        self._check_engine()
        if self.retry_failed and self.overwrite:
            raise UsageError("--retry-failed and --overwrite exclude each other", "--overwrite tries all images anyway")
        if self.compile and self.fit == NATIVE:
            raise UsageError("--compile does not go with --fit native", "a network is compiled for one size")
        if self.decode == "scaled" and self.fit == NATIVE:
            raise UsageError("--decode scaled does not go with --fit native", "native keeps every pixel of a picture")
        pooling(self.pool)
        if self.checkpoint:  # without one there are only defaults, and `--help` must not wait for more
            self.request()
        self.decoding()

    def _check_part(self, part: str) -> None:
        from featcli.system.scheduler import parse_part  # `--help` must not wait for it

        parse_part(part)
        if self.overwrite:
            raise UsageError("--part and --overwrite exclude each other", "delete the dump before its parts begin")

    def _check_counts(self) -> None:
        for option, value, most in (
            ("--batch-size", self.batch_size, MOST),
            ("--threads", self.threads, MOST_THREADS),
            ("--decode-threads", self.decode_threads, MOST_THREADS),
            ("--shard-size", self.shard_size, MOST),
        ):
            if value == (None if option == "--shard-size" else AUTO):
                continue
            if not isinstance(value, int):
                raise UsageError(f"{option} {shown(str(value))}: not a number", "leave it out for the default")
            if value < 1:
                raise UsageError(f"{option} {value}: must be at least 1", "leave it out for the default")
            if value > most:
                raise UsageError(f"{option} {value}: must be at most {most}", "leave it out for the default")

    def _check_engine(self) -> None:
        for option, value, least in (
            ("--workers", self.workers, 1),
            ("--cpus-per-worker", self.cpus_per_worker, 0),
            ("--gpus-per-worker", self.gpus_per_worker, 0),
        ):
            if value is not None and not least <= value <= MOST:
                raise UsageError(f"{option} {value}: must be from {least} to {MOST}", "leave it out for the default")
        if self.engine != "ray":
            for option, given in (
                ("--ray-address", self.ray_address),
                ("--workers", self.workers),
                ("--cpus-per-worker", self.cpus_per_worker),
                ("--gpus-per-worker", self.gpus_per_worker),
            ):
                if given is not None:
                    raise UsageError(
                        f"{option} goes with --engine ray", "on this machine name devices: --device cpu,cpu"
                    )
        elif self.retry_failed:
            raise UsageError("--retry-failed does not go with --engine ray", "leave --engine out: they are few shards")
        elif "," in self.device or self.device == "cuda:all":
            raise UsageError(f"--device {shown(self.device)} does not go with --engine ray", "see --workers")

    def _check_inputs(self) -> None:
        if not self.inputs and self.files_from is None:
            raise UsageError("no input", "name a folder or images, or a list with --files-from")
        if "" in self.inputs:
            raise UsageError("an input is empty", "is a shell variable unset? Write . for the current folder")
        for option, is_given, hint in (
            ("-0/--null", self.null, "it says how the names in the list are separated"),
            ("--root", self.root is not None, "names in a list are relative to it"),
            ("--allow-outside", self.allow_outside, "images in a folder are never outside it"),
        ):
            if is_given and self.files_from is None:
                raise UsageError(f"{option} goes with --files-from", hint)

    def given(self) -> Given:
        """Where the images are."""
        from featcli.inputs.listing import Given

        return Given(self.inputs, self.files_from, self.null, self.root, self.allow_outside, self.follow_links)

    def request(self) -> Request:
        """What is asked of the checkpoint. Raises UsageError."""
        from featcli.backbones.checkpoint import Request, sizes_asked

        return Request(
            self.checkpoint,
            self.arch,
            self.random_init,
            self.seed,
            num_channels=self.num_channels,
            norm=self.norm,
            fit=self.fit,
            **sizes_asked(self.image_size, self.fit),
        )

    def decoding(self) -> PixelRules:
        """The rules by which pictures are read. Raises UsageError."""
        return PixelRules(
            self.orientation, self.alpha, parse_depth_range(self.depth_range), self.max_pixels, self.decode
        )
