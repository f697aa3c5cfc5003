"""List the words that options take, their defaults and their limits. Tables elsewhere have these words as keys."""

from __future__ import annotations

from typing import Final, Literal, get_args

Auto = Literal["auto"]
AUTO: Final = "auto"  # featcli chooses and says so; a dump keeps choices that can change a bit

Precision = Literal["fp32", "bf16", "fp16"]
Layout = Literal["channels-first", "channels-last"]
Fit = Literal["crop", "squash", "pad", "native"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]  # words of timm and Pillow
ProcessorBackend = Literal["pil", "torchvision"]  # what transformers' image processors compute with
Norm = Literal["raw", "model"]  # maps before, or after, the model's final norm
Orientation = Literal["apply", "ignore"]
Alpha = Literal["drop", "white", "black"]
Colour = Literal["ignore", "convert"]
Decode = Literal["exact", "fast", "scaled"]
Dtype = Literal["float32", "float16", "bfloat16"]
Format = Literal["hdf5", "safetensors"]
ExportFormat = Literal["hdf5", "safetensors", "npy", "jsonl", "parquet"]
EngineName = Literal["local", "ray"]
VectorName = Literal["embedding", "projection", "logits"]

PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)
FITS: Final[tuple[Fit, ...]] = get_args(Fit)
INTERPOLATIONS: Final[tuple[Interpolation, ...]] = get_args(Interpolation)
NATIVE: Final = "native"  # the only fit under which pictures keep sizes of their own
DTYPES: Final[tuple[Dtype, ...]] = get_args(Dtype)
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
EXPORT_FORMATS: Final[tuple[ExportFormat, ...]] = get_args(ExportFormat)
ENGINES: Final[tuple[EngineName, ...]] = get_args(EngineName)
POOLS: Final = ("none", "avg", "max", "gem", "cls", "registers", "cls+avg")  # in addition to grids such as 7x7
VECTORS: Final[tuple[VectorName, ...]] = get_args(VectorName)  # points behind the stages, one vector for a picture
ALL: Final = "all"  # every stage
# What other programs call vectors: named where somebody types that.
OTHER_VECTORS: Final = {
    **dict.fromkeys(("pooler_output", "pooler", "pre_logits", "features", "embeddings", "head"), "embedding"),
    **dict.fromkeys(("image_embeds", "image_features"), "projection"),
    **dict.fromkeys(("logit", "classifier", "fc", "scores"), "logits"),
}
# Words of other programs. They are understood, and stored as featcli's own.
OTHER_WORDS: Final = {
    "pool": {"mean": "avg", "gap": "avg"},
    "precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
    "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"},
    "format": {"h5": "hdf5"},
}

DEFAULT_PRECISION: Final[Precision] = "fp32"
DEFAULT_LAYOUT: Final[Layout] = "channels-first"
DEFAULT_BATCH_SIZE: Final = 32
DEFAULT_DTYPE: Final[Dtype] = "float32"
MAX_PIXELS: Final = 89_478_485  # Pillow begins to warn here; a picture of this size takes 270 MB as RGB
MOST: Final = 200_000  # largest count of anything: the keys of a shard must fit into a safetensors header
MOST_THREADS: Final = 1024  # more than anybody needs, and fewer than the number at which some libraries die
PATH_COLUMNS = ("path", "image", "file_name", "filename", "filepath")  # the usual names of a column of paths
MOST_CHANNELS: Final = 1024
LEAST_CROP: Final = 0.1  # share of a picture, which is resized to the input size divided by it
