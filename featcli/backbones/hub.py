"""The model hub: asked once whether it answers, so that a machine without a network fails in seconds, not minutes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# What libraries call the weights of a checkpoint, in the order in which they look for them.
WEIGHTS_NAMES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")

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


def fetched_weights(repository: str) -> list[Path]:
    """The weights files of a hub repository, fetched where they are not cached. Raises what the hub's client raises."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in WEIGHTS_NAMES:
        for wanted in (name, f"{name}.index.json"):
            try:
                path = Path(hf_hub_download(repository, wanted))
            except LocalEntryNotFoundError:
                continue
            except EntryNotFoundError:
                continue
            if wanted == name:
                return [path]
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            return [Path(hf_hub_download(repository, shard)) for shard in shards]
    return []


def cached_weights(repository: str, filename: str | None = None) -> list[Path]:
    """The weights file of a hub repository in the cache, where there is one."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    for wanted in (*([filename] if filename else []), *WEIGHTS_NAMES):
        found = try_to_load_from_cache(name, wanted, revision=revision or None)
        if isinstance(found, str):
            return [Path(found)]
    return []


@cache
def _answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # whatever HTTP library the client is built on: no answer is no answer
        return False
    return True
