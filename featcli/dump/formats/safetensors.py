"""Write safetensors shards: 8 bytes of header length, a JSON header, the arrays.

The format is described at https://github.com/huggingface/safetensors. The header is written last. Before that the file
begins with zeros, which no reader accepts. A header over data that is not there yet would be a valid file full of
zeros.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence

from featcli.dump.formats.layout import ALIGNMENT, ITEM_BYTES, KEYS, Array, DoesNotFitError, Layout
from featcli.errors import DamagedError, shown
from featcli.system.files import reading

SUFFIX = ".safetensors"
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "uint32": "U32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def lay_out(
    path: str, arrays: Mapping[str, tuple[str, tuple[int, ...]]], keys: Sequence[str], attributes: Mapping[str, str]
) -> Layout:
    """Give the empty file at `path` its size. Returns where each array (dtype, shape) belongs.

    Raises DoesNotFitError.
    """
    header: dict[str, object] = {"__metadata__": {**attributes, KEYS: json.dumps(keys)}}
    begins, placed = 0, {}
    for name, (dtype, shape) in arrays.items():
        ends = begins + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begins, ends]}
        placed[name] = Array(dtype, shape, begins)
        begins = ends
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format allows spaces after the JSON
    if len(text) > MAX_HEADER_BYTES:
        what = "keys and columns" if "columns" in attributes else "keys"
        raise DoesNotFitError(f"the {what} of {len(keys):,} images do not fit into the header of a safetensors file")
    start = 8 + len(text)
    os.truncate(path, start + begins)
    placed = {name: Array(a.dtype, a.shape, start + a.offset) for name, a in placed.items()}
    return Layout(placed, start + begins, keys, attributes, len(text).to_bytes(8, "little") + text)


def read_layout(path: str, num_keys: int | None) -> Layout:
    """Return where the arrays of a finished file are, and its keys unless `num_keys` is None.

    Raises DamagedError for anything that is not such a file, and MachineError.
    """
    try:
        with reading(path, "shard", strict=True) as file:
            size = file.regular.state().st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        text = metadata.pop(KEYS)
        keys = [] if num_keys is None else json.loads(text)
        if not isinstance(keys, list) or len(keys) != (num_keys or 0) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its keys are no list of texts, one for each row")
        arrays = {}
        for name, entry in header.items():
            begins, ends = entry["data_offsets"]
            numbers = (begins, ends, *entry["shape"])
            if not 0 < len(entry["shape"]) <= 4 or not all(type(n) is int and 0 <= n <= size for n in numbers):
                raise ValueError(f"array {name} has a shape or a place that is none")
            array = Array(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begins)
            if array.end != 8 + length + ends or array.end > size:
                raise ValueError(f"array {name} does not fit its offsets")
            arrays[name] = array
        ends_at = 8 + length
        for array in sorted(arrays.values(), key=lambda array: array.offset):  # the format allows no gaps
            if array.offset != ends_at:
                raise ValueError("arrays with gaps between them")
            ends_at = array.end
        if ends_at != size:
            raise ValueError("the file is longer than its arrays")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DamagedError(
            f"shard {shown(path)}: this is not a readable safetensors file ({error})", "is the file complete?"
        ) from error
    return Layout(arrays, size, keys, metadata)
