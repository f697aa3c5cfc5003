"""Look for a picture whose path a table has only in part, to say in a hint how its paths are made."""

from __future__ import annotations

import os
import shlex
from itertools import islice

from featcli.inputs.image_list import SUFFIXES
from featcli.system.files import is_file

MOST_ENTRIES = 10_000  # of a folder, among which folders are looked for
MOST_FOLDERS = 100  # that are looked into
NOT_IN_FORMATS = {*"{}:!"}  # signs that --path-format takes for others


def found_nearby(root: str, path: str) -> tuple[str, str] | None:
    """Return the folder in `root`, or an empty text for it, and the suffix that make `path` one of a file; else None.

    Folders inside these folders are not looked into. Raises MachineError.
    """
    if not path or "\0" in path:
        return None
    try:
        with os.scandir(root or os.curdir) as entries:
            folders = sorted(entry.name for entry in islice(entries, MOST_ENTRIES) if entry.is_dir())
    except OSError:
        return None
    for folder in ["", *folders[:MOST_FOLDERS]]:
        for suffix in ["", *sorted(SUFFIXES)]:
            if is_file(os.path.join(root, folder, path + suffix)):
                return folder, suffix
    return None


def options_by_column(root: str, column: str, path: str) -> str | None:
    """Return the options that make the paths of a column whose cells are such paths, or None if there are none."""
    found = found_nearby(root, path)
    if found is None:
        return None
    folder, suffix = found
    if suffix:
        return None if NOT_IN_FORMATS & {*column} else _path_format(folder, f"{{{column}}}", suffix)
    return f"--path-column {shlex.quote(column)}" + (
        f" --root {shlex.quote(os.path.join(root, folder))}" if folder else ""
    )


def options_by_format(root: str, text: str, path: str) -> str | None:
    """Return the option that mends a --path-format, which makes such paths, or None if there is none."""
    found = found_nearby(root, path)
    return None if found is None else _path_format(found[0], text, found[1])


def _path_format(folder: str, text: str, suffix: str) -> str:
    escaped = folder.replace("{", "{{").replace("}", "}}")
    return f"--path-format {shlex.quote(os.path.join(escaped, text) + suffix)}"
