"""Find rows of a dump by what people type: a key, a key without its suffix, or a pattern of keys."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featcli.errors import UsageError, nearest, shown
from featcli.inputs.keys import KeyPattern

MOST_COMPARED = 10_000  # keys that are compared with a wrong one, which takes long for many
SPECIAL = re.compile(r"[*?\[\]!]")


@dataclass(frozen=True)
class Match:
    """What a text stands for."""

    text: str
    rows: Sequence[int]  # in row order, at least one
    is_pattern: bool = False


def match_keys(texts: Sequence[str], rows: Mapping[str, int]) -> list[Match]:
    """Return what each text stands for, in the order of the texts. `rows` holds the row of each key, in row order.

    A text is a key; or else a key without its suffix; or else a pattern of either: see KeyPattern. The first of these
    that exists counts. Raises UsageError for a text that stands for nothing.
    """
    by_stem: dict[str, list[int]] = defaultdict(list)
    if any(text not in rows for text in texts):
        for key, row in rows.items():
            by_stem[os.path.splitext(key)[0]].append(row)
    return [_match(text, rows, by_stem) for text in texts]


def _match(text: str, rows: Mapping[str, int], by_stem: Mapping[str, list[int]]) -> Match:
    if text in rows:
        return Match(text, [rows[text]])
    if text in by_stem:
        return Match(text, by_stem[text])
    is_pattern, pattern = SPECIAL.search(text) is not None, KeyPattern(text)
    found = [row for key, row in rows.items() if pattern.fits(key)] if is_pattern else []
    if not found:
        what = "no key of this dump is like that" if is_pattern else "it is not in this dump"
        raise UsageError(f"key {shown(text)}: {what}", f"{_near(text, rows)} all keys are in its images.jsonl")
    return Match(text, found, is_pattern)


def _near(text: str, rows: Mapping[str, int]) -> str:
    """Return the beginning of a hint: the key that is most like a wrong one."""
    plain = SPECIAL.sub("", text)
    name = os.path.splitext(plain)[0].rpartition("/")[2].lower()
    fits = re.compile(fnmatch.translate(text), re.IGNORECASE).fullmatch
    near = [key for key in rows if fits(key)] or (nearest(plain, rows) if len(rows) <= MOST_COMPARED else [])
    near = near or [key for key in rows if name and name in key.lower()]
    return f"did you mean {shown(near[0])}?" if near else f"there is {shown(next(iter(rows)))}, for one;"
