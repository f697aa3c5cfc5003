"""Find the class of each image by its folders: those inside the inputs, or else the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from sys import intern

from featcli.errors import UsageError, shown
from featcli.inputs.leads import TAR

LABEL = "label"  # the column that they are


def labels_of(keys: Sequence[str], leads: Mapping[str, str] | None, dump: object, level: int = 1) -> list[str]:
    """Return a label for each key: a folder inside its input, or "" for an image that lies in none at that level.

    Level 1 is the first folder inside the input. If no image lies in a folder there, the leads are the labels of level
    1, but never those of tar files. `leads` are those of the plan, or None if it has none. Then the folders of the
    whole key count, and UsageError is raised for level 1 if a key has two or more of them, because the first may be an
    input. `dump` is the path of the dump, for that message.
    """
    if leads is None and level == 1:
        deep = next((key for key in keys if key.count("/") > 1), None)
        if deep is not None:
            raise UsageError(
                f"dump {shown(dump)}: its plan is older than labels by folder, and {shown(deep)} lies in"
                " several folders: which of them is the class?",
                "give labels={key: key.split('/')[1] for key in dump.keys}, or [0] where it is the first",
            )
    if not leads:
        return [_folder(key, level) for key in keys]
    inside = [_folder(rest, level) for _, rest in _parts(keys, leads)]
    if level > 1 or any(inside):
        return inside
    return [intern(lead) if leads.get(lead, TAR) != TAR else "" for lead, _ in _parts(keys, leads)]


def _parts(keys: Iterable[str], leads: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (lead, rest) of each key; the lead is empty if there is none."""
    depths = sorted({lead.count("/") + 1 for lead in leads}, reverse=True)
    for key in keys:
        names = key.split("/")
        led = next((count for count in depths if count < len(names) and "/".join(names[:count]) in leads), 0)
        yield "/".join(names[:led]), "/".join(names[led:])


def _folder(key: str, level: int) -> str:
    """Return the name of the folder at a level; equal ones are one object, which keeps a long list small."""
    *folders, _ = key.split("/", level)
    return intern(folders[level - 1]) if len(folders) == level else ""
