"""Hold the keys of many images in few bytes, find the same ones in two lists, and know which fit a pattern."""

from __future__ import annotations

import fnmatch
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

MANY = 1 << 10  # keys that are turned into text at once


class Keys(Sequence[str]):
    """Texts in a given order, in the bytes that they have as names of files. Each takes nine bytes more than these."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._content = bytearray()  # each key, and a zero byte after it
        self._ends = array("q")  # where each ends, behind its zero byte
        for key in keys:
            self.append(key)

    def append(self, key: str) -> None:
        """Add a key. Raises UnicodeEncodeError for a text that no file can have as its name."""
        self._content += os.fsencode(key)
        self._content.append(0)
        self._ends.append(len(self._content))

    @property
    def content(self) -> bytearray:
        """The bytes of all keys in order, each followed by a zero byte."""
        return self._content

    @property
    def longest(self) -> int:
        """The bytes of the longest key."""
        return int(np.diff(np.frombuffer(self._ends, np.int64), prepend=0).max()) - 1

    def bytes_of(self, row: int) -> bytes:
        """Return the bytes of a key. `row` counts from the first."""
        return bytes(self._content[self._ends[row - 1] if row else 0 : self._ends[row] - 1])

    def taken(self, rows: Iterable[int]) -> Keys:
        """Return the keys of some rows, in the order of these."""
        found = Keys()
        content, ends, taken, lengths = self._content, self._ends, found._content, found._ends
        for row in rows:
            taken += content[ends[row - 1] if row else 0 : ends[row]]
            lengths.append(len(taken))
        return found

    def hashes(self) -> Iterator[int]:
        """Yield a number for each key, the same for the same key, but only within this process."""
        first = 0
        for end in self._ends:
            yield hash(bytes(self._content[first:end]))
            first = end

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        return os.fsdecode(self.bytes_of(range(len(self))[row]))

    def __iter__(self) -> Iterator[str]:
        first = 0
        for row in range(0, len(self), MANY):
            rows = range(row, min(row + MANY, len(self)))
            end = self._ends[rows.stop - 1]
            some = os.fsdecode(bytes(self._content[first : end - 1])).split("\0")
            yield from some if len(some) == len(rows) else map(self.__getitem__, rows)  # one has a zero byte in it
            first = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return self._content == other._content and self._ends == other._ends
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # a list of keys has none either

    def __repr__(self) -> str:
        return f"Keys({[*self]!r})"


def first_rows(keys: Keys, more: Keys | None = None) -> np.ndarray:
    """Return (N,) int64: for each row the first row with the same key, which is its own number for most.

    The rows of `more` follow those of `keys`, and are counted on.
    """
    parts = [keys] if more is None else [keys, more]
    hashes = np.fromiter((one for part in parts for one in part.hashes()), np.int64, sum(map(len, parts)))
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    del hashes  # the lists may be long
    alike = np.flatnonzero(ordered[1:] == ordered[:-1])
    del ordered
    first = np.arange(len(order))
    seen: dict[bytes, int] = {}  # the first row of each key, among the keys of one hash
    before = -2
    for place in alike.data:
        row, next_row = order[place : place + 2].tolist()
        if place != before + 1:
            seen = {_key_of(row, parts): row}
        first[next_row] = seen.setdefault(_key_of(next_row, parts), next_row)
        before = place
    return first


def missing_from(keys: Keys, others: Keys) -> Keys:
    """Return those of the other keys that are not among these, in their order. Each key occurs once in both."""
    first = first_rows(keys, others)[len(keys) :]
    return others.taken(np.flatnonzero(first >= len(keys)).data)


def _key_of(row: int, parts: Sequence[Keys]) -> bytes:
    count = len(parts[0])
    return parts[0].bytes_of(row) if row < count else parts[1].bytes_of(row - count)


class KeyPattern:
    """A pattern of keys, as fnmatch has them, in which `*` also stands for slashes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._fits = re.compile(fnmatch.translate(text)).fullmatch

    def fits(self, key: str) -> bool:
        """Return whether the pattern is that of the key, or of the key without its suffix."""
        stem = os.path.splitext(key)[0]
        return self.text in (key, stem) or self._fits(key) is not None or self._fits(stem) is not None
