"""Read the maps of one stage over all images, and find which rows an index means: a number, key, slice, list or mask.

Maps are read when they are asked for, as numpy arrays or torch tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from featcli.dump.formats.layout import NUMPY_TYPES, values_of
from featcli.dump.plan import Output
from featcli.errors import UsageError, nearest, shown, shown_shape
from featcli.reading.along_rows import AlongRows
from featcli.reading.open_shards import OpenShards

if TYPE_CHECKING:
    import torch

SOME = 64  # maps that are read at once if only a part of each is kept
Index = int | str | slice | Sequence[int | str] | np.ndarray


class StageArray:
    """The maps of one stage. Rows of failed images are NaN.

    If maps differ in size (`--fit native`), several maps are a list of arrays, and `shape` has None for both edges.
    """

    def __init__(
        self,
        stage: Output,
        index: RowIndex,
        dumps: AlongRows,
        shards: OpenShards,
        stored: str,
        order: np.ndarray | None = None,
    ) -> None:
        """`stored` is the name in shard files. `order` has for each row here its row in the dumps, if it is another."""
        self.stage = stage
        self._index = index
        self._dumps = dumps
        self._shards = shards
        self._stored = stored
        self._order = order
        self._first = dumps.first

    @property
    def shape(self) -> tuple[int | None, ...]:
        """(N, C, H, W), or fewer dimensions if the maps were pooled."""
        return (len(self), *self.stage.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of what indexing returns. numpy has no bfloat16, so its values come exactly as float32."""
        return np.dtype(np.float32 if self.stage.dtype == "bfloat16" else NUMPY_TYPES[self.stage.dtype])

    @property
    def row_bytes(self) -> int:
        """The bytes that are stored of a row; if maps differ in size, of one of the common size."""
        return self.stage.row_bytes(self._dumps.plan.settings.input_size)

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"<stage {shown(self.stage.name)}: {shown_shape(self.shape)} {self.stage.dtype}>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows for numpy's functions. Raises UsageError if maps differ in size."""
        if self.stage.is_ragged:
            raise UsageError(
                f"stage {shown(self.stage.name)}: maps of many sizes cannot form one array", "take them one by one"
            )
        if copy is False:
            raise ValueError("a stage is read, never shared: see as_numpy")
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Index) -> Any:
        """Return one image by row or key, or several by slice, list of rows or keys, or mask, as numpy arrays.

        Numbers and slices after the images choose channels and positions: `[:, 0]` is the first channel of all images.
        Raises KeyError and IndexError as a dict and an array do, TypeError for other indices, IncompleteError for rows
        that are not extracted yet, DamagedError and MachineError.
        """
        images, inside = images_and_inside(index)
        if inside:
            return self._inside(images, inside)
        rows = self._index.rows_of(images) if self._order is None else self._reordered(images)
        if isinstance(rows, int):
            shard, place = self._located(rows)
            if self.stage.is_ragged:
                return values_of(self._maps(shard, place, 1)[0])
            return values_of(self._shards.read_row(shard, self._stored, place))
        if self.stage.is_ragged:
            return [values_of(found) for run in self._runs(rows) for found in self._maps(*run)]
        self._open_first(rows)
        stored = np.empty((len(rows), *self.stage.shape_at((0, 0))), NUMPY_TYPES[self.stage.dtype])
        self._fill(stored, rows)
        return values_of(stored)

    def _inside(self, images: Any, inside: tuple[Any, ...]) -> Any:
        """Return a part of each map. Only some maps are read at a time, because all of them may not fit into memory."""
        rows = self._index.rows_of(images)
        if isinstance(rows, int):
            return self[rows][inside]
        if self.stage.is_ragged:
            return [found[inside] for found in self[rows]]
        whole = (slice(None), *inside)
        parts = [self[rows[first : first + SOME]][whole] for first in range(0, len(rows), SOME)]
        return np.concatenate(parts) if parts else self[rows][whole]

    def tensor(self, index: Index = slice(None), out: torch.Tensor | None = None) -> Any:
        """Return the same as torch tensors, in the stored dtype, also bfloat16. Raises as indexing does.

        `out` is a contiguous tensor of this shape and dtype, which is filled instead of a new one.
        """
        import torch

        images, inside = images_and_inside(index)
        if inside:
            if out is not None:
                raise UsageError("out is only for whole maps", "leave it out, or index by images alone")
            maps = self.tensor(images)
            is_one = isinstance(self._index.rows_of(images), int)
            if isinstance(maps, list):
                return [found[inside] for found in maps]
            return maps[inside if is_one else (slice(None), *inside)]
        rows = self._index.rows_of(images) if self._order is None else self._reordered(images)
        kind = getattr(torch, self.stage.dtype)
        several = [rows] if isinstance(rows, int) else rows
        if self.stage.is_ragged:
            found = [row for run in self._runs(several) for row in self._maps(*run)]
            tensors = [torch.from_numpy(row).view(kind) for row in found]
            return tensors[0] if isinstance(rows, int) else tensors
        self._open_first(several)
        shape = self.stage.shape_at((0, 0)) if isinstance(rows, int) else (len(several), *self.stage.shape_at((0, 0)))
        # numpy asks for large pages, which the system gives faster.
        whole = torch.from_numpy(np.empty(shape, NUMPY_TYPES[self.stage.dtype])).view(kind) if out is None else out
        if (tuple(whole.shape), whole.dtype) != (shape, kind) or not whole.is_contiguous():
            raise UsageError(
                f"out: a contiguous {kind} tensor of shape {shape} is needed", "leave it out for a new one"
            )
        stored = (whole.detach().view(torch.uint16) if kind is torch.bfloat16 else whole.detach()).numpy()
        self._fill(stored.reshape(len(several), *self.stage.shape_at((0, 0))), several)
        return whole

    def as_numpy(self, shard: int | None = None) -> np.ndarray:
        """Return the rows of a shard, or of a dump with only one, mapped into memory: nothing is read or copied yet.

        The array is read-only, (rows, ...). Raises UsageError if that is impossible: there are several shards and none
        is named, the dtype is bfloat16, which numpy lacks, or maps differ in size. Raises IncompleteError for a shard
        that is missing, IndexError for a number without a shard, DamagedError and MachineError.
        """
        name = shown(self.stage.name)
        if self.stage.is_ragged or self.stage.dtype == "bfloat16":
            what = "numpy has no bfloat16" if self.stage.dtype == "bfloat16" else "maps of many sizes"
            raise UsageError(f"stage {name}: {what}: there is no array to map", "take rows by index, or .tensor()")
        if self._order is not None:
            raise UsageError(
                f"stage {name}: its rows are stored in another order than those of the first dump",
                "take rows by index, or map the dump by itself: dump.dumps[NAME]",
            )
        count = self._dumps.num_shards
        if shard is None and count > 1:
            raise UsageError(
                f"stage {name}: it is in {count} shards, and one array can map only one",
                f"name it, from 0 to {count - 1}, or take rows by index",
            )
        number = operator.index(shard or 0)
        if not 0 <= number < count:
            raise IndexError(f"shard {number} of {count}")
        if number not in self._dumps.records:
            raise self._dumps.not_yet(f"shard {number}", number)
        path, array = self._shards.place(number, self._stored)
        return np.memmap(path, self.dtype, "r", array.offset, array.shape)

    def _open_first(self, rows: Sequence[int]) -> None:
        """Check the first file before memory is taken, because a plan may claim any shape."""
        if len(rows):
            shard, _ = self._located(rows[0])
            self._shards.place(shard, self._stored)

    def map_shapes(self, rows: Sequence[int]) -> np.ndarray:
        """Return (rows, 3): the (C, H, W) of each row of a stage whose maps differ in size.

        Failed images have one, too.
        """
        out, done = np.empty((len(rows), 3), np.uint32), 0
        for shard, first, count in self._runs(rows if self._order is None else self._reordered(rows)):
            shapes, _ = self._shards.starts(shard, self._stored)
            out[done : done + count] = shapes[first : first + count]
            done += count
        return out

    def _reordered(self, images: Any) -> Any:
        """Return the row or rows of an index as the dumps number them. Raises as indexing does."""
        order, rows = cast(np.ndarray, self._order), self._index.rows_of(images)
        return int(order[rows]) if isinstance(rows, int) else order[list(rows)].tolist()

    def _runs(self, rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield the rows, in their order, as runs of neighbours within one shard: (shard, first place, count)."""
        done = 0
        while done < len(rows):
            first, count = rows[done], 1
            shard, place = self._located(first)
            if done + 1 < len(rows) and rows[done + 1] == first + 1:
                room = len(self._dumps.rows(shard)) - place
                while done + count < len(rows) and count < room and rows[done + count] == first + count:
                    count += 1
            yield shard, place, count
            done += count

    def _maps(self, shard: int, first: int, count: int) -> list[np.ndarray]:
        """Return neighbouring maps of different sizes as they are stored, bfloat16 as uint16."""
        shapes, starts = self._shards.starts(shard, self._stored)
        begin, end = int(starts[first]), int(starts[first + count])
        stored = self._shards.read(shard, self._stored, begin, end - begin)
        rows = range(first, first + count)
        return [stored[starts[i] - begin : starts[i + 1] - begin].reshape(shapes[i]) for i in rows]

    def _fill(self, out: np.ndarray, rows: Sequence[int]) -> None:
        """Fill `out` with rows in any order, as they are stored. All maps of the stage have one size."""
        done = 0
        for shard, place, count in self._runs(rows):
            self._shards.read_into(out[done : done + count], shard, self._stored, place)
            done += count

    def _located(self, row: int) -> tuple[int, int]:
        """Return the shard of a row, and its place in it. Raises IncompleteError."""
        end, shard_rows = self._first  # most dumps are one, and single rows are read often
        shard, place = divmod(row, shard_rows) if row < end else self._dumps.located(row)
        if shard not in self._dumps.records:
            raise self._dumps.not_yet(f"row {row}", shard)
        return shard, place


def images_and_inside(index: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split an index into what names images and what is taken of each map: numbers, slices and `...`.

    Raises TypeError for an index that an array could understand in several ways.
    """
    if index is Ellipsis:
        return slice(None), ()
    if not isinstance(index, tuple):
        return index, ()
    images, *inside = index or (slice(None),)
    if images is Ellipsis:
        images, inside = slice(None), [Ellipsis, *inside]
    if all(part is Ellipsis or type(part) is slice or _is_number(part) for part in inside):
        return images, tuple(inside)
    raise TypeError(
        "behind the images a stage takes numbers and slices: dump[stage][images][:, channels] takes any other index,"
        " and a list names several images: dump[stage][[0, 2]]"
    )


def _is_number(part: Any) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, bool | np.bool_) and getattr(part, "ndim", 0) == 0


class RowIndex:
    """The rows of dumps, by whatever people name them with. Their keys are read when they are first needed."""

    def __init__(self, dumps: AlongRows) -> None:
        self._dumps = dumps

    def __len__(self) -> int:
        return len(self._dumps)

    @cached_property
    def keys(self) -> list[str]:
        """The key of each row."""
        return [*chain.from_iterable(dump.keys() for dump in self._dumps.dumps)]

    @cached_property
    def row_of_key(self) -> Mapping[str, int]:
        """The row of each key."""
        return {key: row for row, key in enumerate(self.keys)}

    def rows_of(self, index: Any) -> int | Sequence[int]:
        """Return a row, or rows in the order in which they were given.

        Raises KeyError and IndexError as a dict and an array do, and TypeError for something that names no rows.
        """
        if type(index) is int:  # comes first, because single maps are read often
            return self._absolute(index)
        if isinstance(index, slice):
            return range(len(self))[index]
        if isinstance(index, str):
            return self._row(index)
        if isinstance(index, tuple | bytes | bool | np.bool_):
            raise TypeError(f"{index!r} is neither a row nor a key")
        if not hasattr(index, "__len__") or getattr(index, "shape", None) == ():
            if not hasattr(index, "__index__"):
                raise TypeError(f"{index!r} is neither a row nor a key")
            return self._absolute(operator.index(index))
        return self._listed(index)

    def _listed(self, index: Any) -> list[int]:
        """Return the rows for a mask, or for rows and keys in any order.

        Anything else raises, because a guess could be wrong.
        """
        listed = index.tolist() if hasattr(index, "tolist") else [getattr(i, "item", lambda i=i: i)() for i in index]
        if listed and all(type(i) is bool for i in listed):
            if len(listed) != len(self):
                raise IndexError(f"a mask of {len(listed)} for {len(self)} rows")
            return [row for row, chosen in enumerate(listed) if chosen]
        wrong = [i for i in listed if type(i) not in (int, str)]
        if wrong:
            raise TypeError(f"{wrong[0]!r} is neither a row nor a key")
        return [self._row(i) if isinstance(i, str) else self._absolute(i) for i in listed]

    def _row(self, key: str) -> int:
        if key not in self.row_of_key:
            near = nearest(key, self.row_of_key, 1)
            raise KeyError(f"no key {shown(key)} in this dump" + (f"; did you mean {shown(near[0])}?" if near else ""))
        return self.row_of_key[key]

    def _absolute(self, row: int) -> int:
        count = len(self)
        if not -count <= row < count:
            raise IndexError(f"row {row} of {count}")
        return row if row >= 0 else row + count
