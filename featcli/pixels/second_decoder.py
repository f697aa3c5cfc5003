"""tifffile and imagecodecs, the extra `tiff`: whether they are there."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import cache
from importlib import import_module

from featcli.pixels.failure import UnreadableError

LIBRARIES = ("tifffile", "imagecodecs")
INSTALL = "pip install 'featcli[tiff]'"


@cache
def is_installed() -> bool:
    """Whether both can be imported."""
    with suppress(ImportError):
        for library in LIBRARIES:
            import_module(library)
        logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what it finds wrong becomes a failure
        return True
    return False


def refuse_where_missing(kind: str) -> None:
    """Raise UnreadableError for a picture of this kind where they are not installed."""
    if not is_installed():
        raise UnreadableError("format_not_allowed", f"{kind}: {INSTALL}, or convert it to JPEG or PNG")
