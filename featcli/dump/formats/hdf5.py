"""Write HDF5 shards: h5py lays out one contiguous dataset for each stage and closes the file; rows go to known offsets.

HDF5 itself never touches the file. For maps, its slice assignment reaches a quarter to two thirds of the speed of a
plain write. For the rest, a full disk makes HDF5 fail while it closes the file, without an error code and with messages
of its own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

from featcli.dump.atomic_file import write_all
from featcli.dump.formats.layout import ALIGNMENT, KEYS, Array, Layout
from featcli.errors import DamagedError, shown
from featcli.system.files import ReadFile, reading

SUFFIX = ".h5"
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def lay_out(
    path: str, arrays: Mapping[str, tuple[str, tuple[int, ...]]], keys: Sequence[str], attributes: Mapping[str, str]
) -> Layout:
    """Write everything but the contents of arrays into the empty file at `path`. Returns where each array belongs."""
    import h5py

    sparse = _Sparse()
    options = {"libver": ("earliest", "v110"), "alignment_threshold": ALIGNMENT, "alignment_interval": ALIGNMENT}
    with h5py.File(sparse, "w", **options) as file:
        # All texts have a fixed length: HDF5 keeps a heap for other texts, and a damaged heap makes it read memory that
        # is not its own, or read for ever. Keys are bytes, because a name may hold any byte but zero.
        for name, text in attributes.items():
            file.attrs.create(name, text.encode(), dtype=h5py.string_dtype("ascii", len(text)))
        names = [os.fsencode(key) for key in keys]
        longest = max(1, *map(len, names)) if names else 1
        file.create_dataset(KEYS, data=names, dtype=h5py.string_dtype("utf-8", longest), shape=(len(names),))
        for name, (dtype, shape) in arrays.items():
            _create(file, name, dtype, shape)
        # An array without a row has no offset.
        placed = {name: Array(dtype, shape, file[name].id.get_offset() or 0) for name, (dtype, shape) in arrays.items()}
    size = max([sparse.size, *(array.end for array in placed.values())])
    os.truncate(path, size)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        for offset, content in sparse.written:
            write_all(descriptor, memoryview(content), offset)
    finally:
        os.close(descriptor)
    return Layout(placed, size, keys, attributes)


class PlacedFile(io.RawIOBase):
    """A file that HDF5 moves about in. Subclasses say what it holds."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """See io.IOBase."""
        return self._position


class _Sparse(PlacedFile):
    """A file in memory that stores what was written into it, but not the gaps between."""

    def __init__(self) -> None:
        super().__init__(0)
        self.written: list[tuple[int, bytes]] = []  # (offset, content); later ones cover earlier ones

    def truncate(self, size: int | None = None) -> int:
        """Make the file longer; HDF5 never makes it shorter. See io.IOBase."""
        self.size = max(self.size, self._position if size is None else size)
        return self.size

    def write(self, content: Any) -> int:
        """See io.RawIOBase."""
        self.written.append((self._position, bytes(content)))
        self._position += len(content)
        self.size = max(self.size, self._position)
        return len(content)

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        first, view = self._position, memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        for offset, content in self.written:
            begin, end = max(offset, first), min(offset + len(content), first + len(view))
            if begin < end:
                view[begin - first : end - first] = content[begin - offset : end - offset]
        self._position += len(view)
        return len(view)


class _Calm(PlacedFile):
    """A file that returns zeros if the machine refuses to read. The file below it remembers the error.

    After an error HDF5 would keep its file open, and call into Python for it when Python has ended.
    """

    def __init__(self, file: ReadFile) -> None:
        super().__init__(file.regular.state().st_size)
        self._file = file

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        view = memoryview(buffer).cast("B")
        try:
            self._file.seek(self._position)
            count = self._file.readinto(view)
        except OSError:
            count = len(view)
            view[:] = bytes(count)
        self._position += count
        return count


def _create(file: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Create a contiguous dataset whose space exists at once and is not filled, because the rows will fill it."""
    from h5py import h5d, h5p, h5s

    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # no times in the file, so that equal work gives equal bytes
    h5d.create(file.id, name.encode(), _types()[dtype], h5s.create_simple(shape), creation)


def _types() -> dict[str, Any]:
    """Return HDF5's own types. bfloat16 equals the library's predefined H5T_FLOAT_BFLOAT16LE (HDF5 2.0)."""
    from h5py import h5t

    bfloat16 = h5t.IEEE_F16LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)  # sign, exponent at 7 with 8 bits, mantissa at 0 with 7 bits
    bfloat16.set_ebias(127)
    known = {"float32": h5t.IEEE_F32LE, "float16": h5t.IEEE_F16LE, "uint8": h5t.STD_U8LE, "uint32": h5t.STD_U32LE}
    return {**known, "bfloat16": bfloat16}


def read_layout(path: str, num_keys: int | None) -> Layout:
    """Return where the arrays of a finished file are, and its keys unless `num_keys` is None.

    Raises DamagedError for anything that is not such a file, and MachineError.
    """
    import h5py

    problem = ""
    try:
        # A file of Python's is used because HDF5 refuses a path that the same process has opened with other lock
        # settings.
        with reading(path, "shard", strict=True) as raw:
            try:
                with h5py.File(_Calm(raw), "r") as file:
                    size = raw.regular.state().st_size
                    keys = [] if num_keys is None else _keys(file, num_keys, size, raw)
                    arrays = {name: _placed(file, name, size) for name in file if name != KEYS}
                    attributes = {name: _text(file, name) for name in file.attrs}
            # Only the text of HDF5's errors is kept: while such an error lives, so do the objects through which HDF5
            # calls into Python.
            except UNREADABLE as error:
                problem = str(error) or type(error).__name__
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise DamagedError(
            f"shard {shown(path)}: this is not a readable HDF5 shard ({problem})", "is the file complete?"
        )
    return Layout(arrays, size, keys, attributes)


def _keys(file: Any, num_keys: int, size: int, raw: IO[bytes]) -> list[str]:
    dataset = _plain(file, KEYS)
    length, offset = _text_length(dataset.dtype), dataset.id.get_offset()
    if dataset.shape != (num_keys,) or offset + num_keys * length > size:
        raise ValueError("its keys are no list of texts, one for each row")
    raw.seek(offset)
    names = raw.read(num_keys * length)
    return [os.fsdecode(names[i : i + length].rstrip(b"\0")) for i in range(0, len(names), length)]


def _text(file: Any, name: str) -> str:
    attribute = file.attrs.get_id(name)
    _text_length(attribute.dtype)
    if attribute.shape != ():
        raise ValueError(f"its attribute {name} is no text")
    return bytes(file.attrs[name]).decode()


def _text_length(dtype: Any) -> int:
    import h5py

    info = h5py.check_string_dtype(dtype)
    if info is None or not info.length:
        raise ValueError("a text of no fixed length")
    return int(info.length)


def _placed(file: Any, name: str, size: int) -> Array:
    dataset = _plain(file, name)
    kind = dataset.id.get_type()
    dtype = next((known for known, stored in _types().items() if stored.equal(kind)), None)
    if dtype is None or not dataset.shape:
        raise ValueError(f"{name} is not an array of rows")
    array = Array(dtype, dataset.shape, dataset.id.get_offset())
    if array.end > size:
        raise ValueError(f"{name} is longer than the file")
    return array


def _plain(file: Any, name: str) -> Any:
    """Return a dataset whose bytes lie plainly in this file. Any other could lead anywhere, or unpack to any size."""
    import h5py

    if file.get(name, getclass=True, getlink=True) is not h5py.HardLink:
        raise ValueError(f"{name} is a link out of the file")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual or found.chunks:
        raise ValueError(f"{name} is not a plain contiguous array")
    if found.id.get_offset() is None:
        raise ValueError(f"{name} is empty")
    return found
