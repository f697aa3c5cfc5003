"""What can be asked of `extract`: each option's name, default and check live here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass

from featcli.errors import UsageError, shown
from featcli.pooling import pooling
from featcli.writers import FORMATS

PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = ("float32", "float16", "bfloat16")
SHARD_BYTES = 1024**3  # about 1 GiB: minutes of work, a commit that costs nothing beside it
MAX_SHARD_ROWS = 65_536  # keeps the key list in a shard's header small where rows are


@dataclass(frozen=True)
class ExtractConfig:
    """The options of an extraction. Raises UsageError where one of them can be seen to be wrong by itself."""

    inputs: tuple[str, ...] = ()
    checkpoint: str = ""
    output: str = ""
    files_from: str | None = None
    null: bool = False
    root: str | None = None
    arch: str | None = None
    random_init: bool = False
    seed: int = 0
    out_indices: tuple[int, ...] | str | None = None
    out_features: tuple[str, ...] | None = None
    image_size: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    batch_size: int = 32
    threads: int | None = None
    decode_threads: int | None = None
    pool: str = "none"
    dtype: str = "float32"
    format: str = "hdf5"
    shard_size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.inputs and self.files_from is None:
            raise UsageError("no input", "name a folder or images, or a list with --files-from")
        one_of("--precision", self.precision, PRECISIONS)
        one_of("--dtype", self.dtype, DTYPES)
        one_of("--format", self.format, tuple(FORMATS))
        for option, value in (
            ("--batch-size", self.batch_size),
            ("--threads", self.threads),
            ("--decode-threads", self.decode_threads),
            ("--shard-size", self.shard_size),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value}: must be at least 1", "leave it out for the default")
        if self.null and self.files_from is None:
            raise UsageError("-0/--null goes with --files-from", "it says how the names in the list are separated")
        if self.root is not None and self.files_from is None:
            raise UsageError("--root goes with --files-from", "names in a list are relative to it")
        parse_size(self.image_size)
        pooling(self.pool)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`"224"` or `"224x288"` as (H, W), None as None. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise UsageError(f"--image-size {shown(text)}: not a size", "write for example 224, or 224x288 (height first)")
    return int(match[1]), int(match[2] or match[1])


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless the value is one of those."""
    if value not in known:
        raise UsageError(f"{option} {shown(value)}: no such choice", f"use {', '.join(known)}")
