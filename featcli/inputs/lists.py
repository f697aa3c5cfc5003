"""Lists of names, from a file or stdin: each name becomes a key below the folder or URL that it is relative to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from featcli.errors import UsageError, shown
from featcli.inputs.image_list import MISSING, file_size, is_url
from featcli.inputs.urls import CHAINED, Remote
from featcli.spec.groups import InputSpec


def read_list(asked: InputSpec, files_from: str) -> dict[str, list[tuple[str, int]]]:
    """(key, size) of the names in a list, by the folder that they are below: a path or, of URLs, what leads them."""
    root = asked.root_name or ""
    if root and not is_url(root) and not os.path.isdir(root):
        raise UsageError(f"--root {shown(root)}: no such folder", "names in the list are relative to it")
    found: dict[str, list[tuple[str, int]]] = {}
    for name in _names(asked, files_from):
        folder, key, size = _listed_url(root, name) if is_url(root) or is_url(name) else _listed_path(asked, name)
        found.setdefault(folder, []).append((key, size))
    for folder in filter(is_url, found):
        Remote(folder)  # whatever it needs is said before anything is planned
    return found


def _listed_url(root: str, name: str) -> tuple[str, str, int]:
    """What a URL in a list is below, its key and its size, which is not asked for: that would take as long as it."""
    base = root.rstrip("/")
    if is_url(root) and (not is_url(name) or name.startswith(base + "/")):
        folder, key = base, name.removeprefix(base + "/")
    else:
        protocol, _, path = name.partition("://")
        key = path.lstrip("/")
        folder = f"{protocol}://" + "/" * (len(path) - len(key))
        if protocol in ("file", "local"):
            raise UsageError(f"listed image {shown(name)}: a file of this machine", "write it as a path")
    if {os.pardir, ""} & {*key.split("/")} or CHAINED in key:
        raise UsageError(f"listed image {shown(name)}: '..', '//' or '{CHAINED}' in a URL", "write it without")
    return folder, key, MISSING


def _listed_path(asked: InputSpec, name: str) -> tuple[str, str, int]:
    base = os.path.abspath(asked.root_name or os.curdir)
    key = os.path.relpath(_without_dots(os.path.join(base, name)), base)
    if key == os.pardir or key.startswith(os.pardir + os.sep) or os.path.isabs(key):
        if not asked.allow_outside:
            raise UsageError(
                f"listed image {shown(name)}: outside {shown(asked.root_name or os.curdir)}",
                "give a folder that holds all listed images with --root (keys are relative to it), or --allow-outside",
            )
        key = _without_dots(os.path.join(base, name))
    return asked.root_name or "", key.replace(os.sep, "/"), file_size(os.path.join(base, key))


def _names(asked: InputSpec, files_from: str) -> Iterator[str]:
    names = _read_names(files_from)
    if b"\0" in names and not asked.null:
        raise UsageError(
            f"--files-from {shown(files_from)}: zero bytes in the list",
            "for a list from find -print0 give -0; otherwise it is no list of names in UTF-8",
        )
    for line in names.removeprefix(b"\xef\xbb\xbf").split(b"\0" if asked.null else b"\n"):
        name = os.fsdecode(line if asked.null else line.removesuffix(b"\r"))
        if name:
            yield name


def _without_dots(path: str) -> str:
    """An absolute path without `.` and `..`; where links make `link/..` another folder than it looks, the system's."""
    plain = os.path.normpath(path)
    folder, name = os.path.split(path)
    if os.pardir not in path.split(os.sep) or os.path.realpath(folder) == os.path.realpath(os.path.dirname(plain)):
        return plain
    return os.path.join(os.path.realpath(folder), name)


def _read_names(files_from: str) -> bytes:
    if files_from == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(files_from).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--files-from {shown(files_from)}: {error.strerror}", "give a file, or - for stdin"
        ) from error
