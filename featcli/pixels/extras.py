"""Know the extras that read pictures: which are installed, and which files need them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module, metadata
from typing import NamedTuple

from featcli.errors import ConflictError, UsageError, counted, shown
from featcli.pixels.failure import UnreadableError
from featcli.spec.words import Decode


class Extra(NamedTuple):
    """An extra of featcli that reads pictures."""

    name: str
    packages: tuple[str, ...]
    suffixes: tuple[str, ...]  # of the files that may need it
    is_always: bool  # whether each of these files needs it

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'featcli[{self.name}]'"


TIFF = Extra("tiff", ("tifffile", "imagecodecs"), (".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c"), False)
HEIF = Extra("heif", ("pillow-heif",), (".heic", ".heif", ".hif"), True)
JXL = Extra("jxl", ("pillow-jxl-plugin",), (".jxl",), True)
FAST = Extra("fast", ("simplejpeg",), (), False)  # it reads JPEGs with --decode fast alone
EXTRAS = (HEIF, JXL, TIFF, FAST)


def versions() -> dict[str, str]:
    """Return the versions of the extras' packages that are installed."""
    found: dict[str, str] = {}
    for package in (package for extra in EXTRAS for package in extra.packages):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def in_use(decode: Decode) -> dict[str, str]:
    """Return the versions of the packages that can have a part in what is read."""
    unused = () if decode == "fast" else FAST.packages
    return {package: version for package, version in versions().items() if package not in unused}


def refuse_without_fast(decode: Decode) -> None:
    """Raise UsageError for --decode fast if simplejpeg is missing."""
    if decode == "fast" and not _has(versions(), FAST):
        raise UsageError("--decode fast needs simplejpeg, which is not installed here", FAST.install)


@cache
def reads_more_tiff() -> bool:
    """Return whether tifffile and imagecodecs can be imported."""
    with suppress(ImportError):
        for library in TIFF.packages:
            import_module(library)
        logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it finds wrong becomes a failure instead
        return True
    return False


def refuse_without_tiff(kind: str, otherwise: str = ", or convert it to JPEG or PNG") -> None:
    """Raise UnreadableError for a picture of this kind if tifffile or imagecodecs is missing."""
    if not reads_more_tiff():
        raise UnreadableError("format_not_allowed", f"{kind}: {TIFF.install}{otherwise}")


def missing(keys: Iterable[str], installed: Collection[str]) -> list[str]:
    """Return a line for each suffix that cannot be read here: how many files have it, and what to install."""
    lacking = {suffix: extra for extra in EXTRAS for suffix in extra.suffixes if not _has(installed, extra)}
    found = Counter(suffix for suffix in map(_suffix, keys) if suffix in lacking) if lacking else {}
    return [
        f"{counted(count, 'file')} {'end' if count > 1 else 'ends'} in {suffix}: {lacking[suffix].install}"
        for suffix, count in sorted(found.items())
        if lacking[suffix].is_always
    ]


def refuse_without(used: Mapping[str, str], keys: Iterable[str], installed: Collection[str], path: str) -> None:
    """Raise ConflictError if a dump was made with an extra that is missing here, and holds files that may need it.

    `used` are the packages with which its shards were made. Without this check, files would fail from here on although
    files of the same kind were read before.
    """
    lacking = [extra for extra in EXTRAS if _has(used, extra) and not _has(installed, extra)]
    if not lacking:
        return
    needed_by = {suffix for extra in lacking for suffix in extra.suffixes}
    suffixes = {suffix for suffix in map(_suffix, keys) if suffix in needed_by}
    for extra in lacking:
        needed = ["JPEGs with --decode fast"] if extra is FAST else sorted(suffixes & {*extra.suffixes})
        if needed:
            packages = " and ".join(f"{package} {used[package]}" for package in extra.packages)
            raise ConflictError(
                f"dump {shown(path)} was made with {packages}, to read {', '.join(needed)},"
                " which is not installed here",
                extra.install,
            )


def _has(packages: Collection[str], extra: Extra) -> bool:
    return all(package in packages for package in extra.packages)


def _suffix(key: str) -> str:
    return os.path.splitext(key)[1].lower()
