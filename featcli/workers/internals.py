"""Hold what featcli uses of Ray although another version may differ: the one place to mend when a later Ray changes it.

tests/test_internals.py says what breaks without each. Ray comes only with its extra, so callers pass the module.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

from featcli.errors import UsageError

STORE_BYTES = 80 << 20  # for Ray's object store, which only carries names: near the least that Ray allows
# Ray's makers are told nothing. If `uv run` started the driver, Ray does not start workers through uv again.
HOUSEKEEPING = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
NO_CLUSTER = Exception  # raised by `begin` without a cluster; a bare Exception if a Ray of its own starts too slowly


def imported_ray() -> Any:
    """Set Ray's variables, which it reads on import, and return the module. Raises UsageError without the extra."""
    for name, value in HOUSEKEEPING.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray: ray is not installed", "pip install 'featcli[ray]'") from error
    return ray


def begin(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one for this process that prints nothing. Raises NO_CLUSTER.

    Ray sets signal handlers that do not clean up what featcli leaves. The handlers from before are put back, and get a
    SIGTERM that Ray has received meanwhile.
    """
    options: dict[str, Any] = {"address": address or "local", "logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    is_main, ended_by_ray = threading.current_thread() is threading.main_thread(), None
    try:
        ray.init(**options)
    except SystemExit as error:  # raised by Ray's handler of SIGTERM, wherever Ray was
        ended_by_ray = error
    finally:
        if is_main:
            for one, handler in before.items():
                signal.signal(one, handler)
    if ended_by_ray is not None:
        if is_main and ended_by_ray.code == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        raise ended_by_ray


def started_worker(ray: Any, kind: type, task: Any, wants: Mapping[str, float], environment: Mapping[str, str]) -> Any:
    """Return a handle of a new actor; Ray spreads actors over nodes. Ray neither restarts it nor repeats its calls.

    Two of its methods can run at a time, each in a thread of Ray's: one keeps the rows that the other has made.

    A method that is a generator yields references as they come. `ray.wait` takes the generator itself and returns one
    equal to it, and `next` of it is a reference for `ray.get`.
    """
    options = {**wants, "runtime_env": {"env_vars": dict(environment)}}
    actor = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=2, **options)(kind)
    return actor.options(scheduling_strategy="SPREAD").remote(task)


def raised_by_worker(ray: Any, error: BaseException) -> Exception | None:
    """Return the error that a method of an actor raised, or None if the actor is lost."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return cause if isinstance(cause, Exception) else None
