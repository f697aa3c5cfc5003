"""Find the class of each image by its folders: those inside the inputs, or else the inputs themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from featcli.errors import UsageError, shown
from featcli.inputs.leads import TAR


def labels_of(keys: Sequence[str], leads: Mapping[str, str] | None, dump: object) -> list[str]:
    """Return a label for each key: the first folder inside its input, or "" for an image above all folders.

    If no image lies in a folder inside its input, the leads are the labels, but never those of tar files. `leads` are
    those of the plan, or None if it has none. Then the first folder of a key is the label, and UsageError is raised if
    a key has two or more folders, because the first may be an input. `dump` is the path of the dump, for that message.
    """
    if leads is None:
        deep = next((key for key in keys if key.count("/") > 1), None)
        if deep is not None:
            raise UsageError(
                f"dump {shown(dump)}: its plan is older than labels by folder, and {shown(deep)} lies in"
                " several folders: which of them is the class?",
                "give labels={key: key.split('/')[1] for key in dump.keys}, or [0] where it is the first",
            )
    if not leads:
        return [_first_folder(key) for key in keys]
    parts = [*_parts(keys, leads)]
    inside = [_first_folder(rest) for _, rest in parts]
    if any(inside):
        return inside
    return [lead if leads.get(lead, TAR) != TAR else "" for lead, _ in parts]


def _parts(keys: Sequence[str], leads: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (lead, rest) of each key; the lead is empty if there is none."""
    depths = sorted({lead.count("/") + 1 for lead in leads}, reverse=True)
    for key in keys:
        names = key.split("/")
        led = next((count for count in depths if count < len(names) and "/".join(names[:count]) in leads), 0)
        yield "/".join(names[:led]), "/".join(names[led:])


def _first_folder(key: str) -> str:
    return key.partition("/")[0] if "/" in key else ""
