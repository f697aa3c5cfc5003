"""HDF5 shards: one contiguous dataset per stage, laid out by h5py, then closed; rows go to known offsets.

HDF5's own write path is never used for the maps: slice assignment reaches a quarter to two thirds of a plain
write, and a file that is open when its process dies cannot be read again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from featcli.errors import DamagedError, shown
from featcli.writers.layout import ALIGNMENT, KEYS, Array, Layout

SUFFIX = ".h5"


def lay_out(
    path: str, arrays: Mapping[str, tuple[str, tuple[int, ...]]], keys: Sequence[str], attributes: Mapping[str, str]
) -> Layout:
    """Write everything but the arrays' contents into the empty file at `path`; say where each array belongs."""
    import h5py

    # Nobody else knows the file yet, and some network file systems have no locks: locking=False.
    options = {"libver": ("earliest", "v110"), "locking": False}
    with h5py.File(path, "w", **options, alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file:
        file.attrs.update(attributes)
        names = [os.fsencode(key) for key in keys]  # bytes: a name may be anything a file system allows
        file.create_dataset(KEYS, data=names, dtype=h5py.string_dtype("utf-8"), shape=(len(names),))
        for name, (dtype, shape) in arrays.items():
            _create(file, name, dtype, shape)
        placed = {name: Array(dtype, shape, file[name].id.get_offset()) for name, (dtype, shape) in arrays.items()}
    size = max([os.stat(path).st_size, *(array.end for array in placed.values())])
    os.truncate(path, size)
    return Layout(placed, size, keys, attributes)


def _create(file: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """A contiguous dataset whose space exists at once and is never filled: the rows will be."""
    from h5py import h5d, h5p, h5s

    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # no clock in the file: equal work gives equal bytes
    h5d.create(file.id, name.encode(), _types()[dtype], h5s.create_simple(shape), creation)


def _types() -> dict[str, Any]:
    """HDF5's own types. bfloat16 equals the library's predefined H5T_FLOAT_BFLOAT16LE (HDF5 2.0)."""
    from h5py import h5t

    bfloat16 = h5t.IEEE_F16LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)  # sign, exponent at 7 with 8 bits, mantissa at 0 with 7 bits
    bfloat16.set_ebias(127)
    return {"float32": h5t.IEEE_F32LE, "float16": h5t.IEEE_F16LE, "bfloat16": bfloat16, "uint8": h5t.STD_U8LE}


def read_layout(path: str) -> Layout:
    """Where the arrays of a finished file are. Raises DamagedError for anything that is not such a file."""
    import h5py

    try:
        size = os.stat(path).st_size
        with h5py.File(path, "r", locking=False) as file:
            keys = [os.fsdecode(name) for name in file[KEYS][:]]
            arrays = {name: _placed(file, name, size) for name in file if name != KEYS}
            attributes = {name: str(value) for name, value in file.attrs.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"shard {shown(path)}: not a readable HDF5 shard ({error})", "is it whole?") from error
    return Layout(arrays, size, keys, attributes)


def _placed(file: Any, name: str, size: int) -> Array:
    import h5py

    if file.get(name, getclass=True, getlink=True) is not h5py.HardLink:
        raise ValueError(f"{name} is a link out of the file")
    dataset = file[name]
    kind = dataset.id.get_type()
    dtype = next((known for known, stored in _types().items() if stored.equal(kind)), None)
    if dtype is None or dataset.external or dataset.is_virtual or dataset.chunks or dataset.id.get_offset() is None:
        raise ValueError(f"{name} is not a plain contiguous array")
    array = Array(dtype, dataset.shape, dataset.id.get_offset())
    if array.end > size:
        raise ValueError(f"{name} is longer than the file")
    return array
