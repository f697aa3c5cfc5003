"""What a run reports: events for whoever listens, and the choices that were made, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Report = Callable[..., None]  # report(kind, **facts)


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value and why it is that value."""

    value: T
    reason: str


def silent(kind: str, **facts: Any) -> None:
    """Say nothing."""


def tee(*reports: Report) -> Report:
    """Tell several."""

    def report(kind: str, **facts: Any) -> None:
        for one in reports:
            one(kind, **facts)

    return report
