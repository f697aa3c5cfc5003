"""Write and read the JSON files of a dump: equal content gives equal bytes, and every reader notices a changed byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from featcli.dump.atomic_file import publish_lines
from featcli.system.faults import machine_errors
from featcli.system.files import read_regular

CHECKSUM = "checksum"  # the last field: hash_json of all others
MAX_BYTES = 1 << 30  # largest file that is read as a whole


def hash_json(content: Any) -> str:
    """Return the xxh3-128 of JSON content as ASCII with sorted keys, so that the order of fields does not count."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode("ascii"))


def checksummed(content: Mapping[str, Any], checksum: str | None = None) -> bytes:
    """Return the bytes of a file with this content. `checksum` is its `hash_json`, if that is known."""
    checksum = hash_json(content) if checksum is None else checksum
    return json.dumps({**content, CHECKSUM: checksum}, indent=1).encode("ascii") + b"\n"


def publish_checksummed(final: Path, content: Mapping[str, Any], replace: bool = False) -> bool:
    """Write such a file and publish it. Returns whether the name was free."""
    return publish_lines(final, [checksummed(content)], replace)


def read_checksummed(path: Path) -> dict[str, Any]:
    """Return the content of such a file. Raises ValueError if any byte is not as it was written, and MachineError."""
    try:
        with machine_errors("file", path, strict=True):
            raw = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise ValueError(error.strerror) from error
    try:
        content = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:  # also for bytes that are no text; where the parser stopped helps nobody
        raise ValueError("empty" if not raw else "not JSON") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    content.pop(CHECKSUM, None)
    try:
        is_whole = raw == checksummed(content)
    except (RecursionError, ValueError):  # JSON that its checksum cannot be computed for
        is_whole = False
    if not is_whole:
        raise ValueError("its checksum does not fit its content")
    return content


def why_refused(error: Exception) -> str:
    """Say what was wrong with such a file or its fields, by the error that reading them raised."""
    if isinstance(error, KeyError):
        return f"no field {error}"
    return str(error) if isinstance(error, ValueError) else "a field of another type"
