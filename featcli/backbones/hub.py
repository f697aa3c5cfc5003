"""The model hub: asked once whether it answers, so that a machine without a network fails in seconds, not minutes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

ANSWER_SECONDS = 10


@contextmanager
def hub_or_cache(wanted: bool = True) -> Iterator[None]:
    """Inside the block, the hub's client uses its cache alone if the hub does not answer, or is not `wanted`.

    Without this the client retries every file for half a minute. `HF_HUB_OFFLINE=1` is honoured.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not wanted or not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def _answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # whatever HTTP library the client is built on: no answer is no answer
        return False
    return True
