"""Say why an image gives no pixels: the closed list of reasons, and what is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REASONS = (
    "not_found",
    "not_regular",
    "unreadable",
    "empty",
    "too_large",
    "changed",
    "not_an_image",
    "format_not_allowed",
    "truncated",
    "decode_error",
    "too_many_pixels",
    "unsupported_depth",
)


NOT_READ = "0" * 32  # in the place of the digest (xxh3-128, hex) of a file whose bytes were not read


class UnreadableError(Exception):
    """The reason why one file gives no pixels: one of REASONS, and a text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Failure:
    """An image that could not be read. It keeps its row, which is filled with NaN."""

    key: str
    row: int
    reason: str  # one of REASONS
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as records and failures.jsonl hold them."""
        return {"key": self.key, "row": self.row, "reason": self.reason, "detail": self.detail}
