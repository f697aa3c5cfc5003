"""Ask the model hub once for each checkpoint, so that a machine without a network fails in seconds, not minutes."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from featcli.backbones.internals import HUB_ERRORS, ask_hub, hub_is_offline, set_hub_offline
from featcli.errors import CheckpointError, one_line, shown
from featcli.system.borrowed import one_at_a_time
from featcli.system.files import read_text

# Names of the weights of a checkpoint, in the order in which libraries look for them.
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

ANSWER_SECONDS = 10
_answered, _did_not_answer = threading.Event(), threading.Event()


@contextmanager
def hub_or_cache(wanted: bool = True) -> Iterator[None]:
    """Let the hub's client use only its cache inside the block if the hub does not answer, or is not `wanted`.

    Otherwise the client retries every file for half a minute. `HF_HUB_OFFLINE=1` is honoured.
    """
    with one_at_a_time:  # all threads share the setting
        before = hub_is_offline()
        set_hub_offline(before or not wanted or not _answers())
        try:
            yield
        finally:
            set_hub_offline(before)


def hub_weights(repository: str, first: str | None = None) -> list[Path]:
    """Fetch the weights files of a hub repository, whole or in shards, unless they are cached.

    `first` is the name to look for before those in WEIGHTS_NAMES, and `repository` may end in `@revision`. Returns []
    if there are none. Call it inside `hub_or_cache`, which decides whether the hub is asked at all.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = repository.partition("@")

    def file(wanted: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, wanted, revision=revision or None))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None

    return find_weights(file, first)


def find_weights(file: Callable[[str], Path | None], first: str | None = None) -> list[Path]:
    """Return the weights of a checkpoint, one file or all of an index. `file` returns the path of a name, or None.

    Raises CheckpointError for an index that is damaged, or names a missing file.
    """
    for wanted in (*([first] if first else []), *WEIGHTS_NAMES):
        if (whole := file(wanted)) is not None:
            return [whole]
        if (index := file(f"{wanted}.index.json")) is not None:
            try:
                shards = sorted(set(json.loads(read_text(index))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"checkpoint {shown(index)}: this is not an index of weights", "is the file complete?"
                ) from error
            found = {shard: file(shard) for shard in shards}
            if absent := [shard for shard, path in found.items() if path is None]:
                raise CheckpointError(
                    f"checkpoint {shown(index)}: it names {shown(absent[0])}, which is not there",
                    "is the folder complete?",
                )
            return [path for path in found.values() if path is not None]
    return []


def unreachable(checkpoint: str, error: Exception, repository: str | None, or_else: str = "") -> CheckpointError:
    """Return the error for a checkpoint that is not here, not cached and not within reach.

    `repository` is its place at the hub, `owner/name` or `owner/name@revision`, for a command that downloads it.
    `or_else` is another way out.
    """
    cause = HUB_ERRORS.get(type(error).__name__, f"{type(error).__name__}: {one_line(error)}")
    name, _, revision = (repository or "").partition("@")
    folder = name.rpartition("/")[2]
    elsewhere = "download its folder where there is a network, and give -c ./FOLDER here"
    if folder:
        command = ["hf", "download", name, *(["--revision", revision] if revision else []), "--local-dir", folder]
        elsewhere = f"give -c ./{shlex.quote(folder)}, downloaded where there is a network by: {shlex.join(command)}"
    return CheckpointError(
        f"checkpoint {shown(checkpoint)}: it is not on this machine, and the hub does not give it: {cause}",
        f"check the name{or_else}, or {elsewhere}",
    )


def ask_hub_again() -> None:
    """Forget that the hub did not answer, because networks come back.

    Called once for each checkpoint that is opened.
    """
    _did_not_answer.clear()


def _answers() -> bool:
    if not (_answered.is_set() or _did_not_answer.is_set()):
        try:
            ask_hub(ANSWER_SECONDS)
            _answered.set()
        except Exception:  # whatever HTTP library the client uses, no answer is no answer
            _did_not_answer.set()
    return _answered.is_set()
