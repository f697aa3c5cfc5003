"""Choose how many images a shard holds, with the reason, and tell whether there are shards for all workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featcli.dump.plan import Outline, Output, bytes_of_rows
from featcli.errors import counted
from featcli.events import Choice
from featcli.inputs.image_list import ImageList
from featcli.pixels.sizes import Sizes
from featcli.run.loading import num_workers
from featcli.run.tuning import AS_BEGUN
from featcli.spec.commands import ExtractSpec
from featcli.spec.words import MOST
from featcli.system.machine import available_cores
from featcli.system.scheduler import part_of

SHARD_BYTES = 1024**3  # about 1 GiB: minutes of work, for which a commit costs nothing
MAX_SHARD_ROWS = 4096  # for small rows
MAX_VECTORS = 65_536  # for vectors of so long a list that smaller shards would be thousands of small files
LONG_LIST = 1_000_000  # images
# Limits for the keys of a shard with more than MAX_SHARD_ROWS. A safetensors header needs at most seven bytes for a
# byte of a key, and its limit is 100 MB. HDF5 gives every key the room of the longest.
KEY_BYTES, BESIDE_KEY = 13_000_000, 8
FOR_EACH = 4  # shards for each worker, so that a slow one leaves few images to wait for
DEFAULT = "default"  # a reason that need not be said
SIZE_AS_BEGUN = f"shard size {AS_BEGUN}"
WORKERS_OF_A_CLUSTER = 16  # while nobody knows yet how many a Ray cluster has room for


@dataclass(frozen=True)
class Sharers:
    """Who makes the shards of a dump: a number of parts, each with a number of workers."""

    parts: int
    workers: int

    @property
    def count(self) -> int:
        """The number of all workers."""
        return self.parts * self.workers

    def __str__(self) -> str:
        workers = counted(self.workers, "worker")
        if self.parts == 1:
            return workers
        return counted(self.parts, "part") + (f" of {workers}" if self.workers > 1 else "")


def sharers_of(asked: ExtractSpec, threads: int, device: torch.device) -> Sharers:
    """Return who will share the work, as far as it is known before a start. `threads` are those of each worker."""
    part = part_of(asked.part)
    return Sharers(1 if part is None else part.count, _workers(asked, threads, device))


def _workers(asked: ExtractSpec, threads: int, device: torch.device) -> int:
    if asked.engine != "ray":
        return num_workers(asked)
    if asked.workers is not None:
        return asked.workers
    if asked.ray_address is not None:
        return WORKERS_OF_A_CLUSTER
    if device.type == "cuda":
        return max(1, int(torch.cuda.device_count() // (asked.gpus_per_worker or 1)))
    return max(1, int(available_cores() // (asked.cpus_per_worker or threads)))


@dataclass(frozen=True)
class Rows:
    """The rows that are stored: their images, the input size of each, and the stages."""

    images: ImageList
    sizes: Sizes
    stages: Sequence[Output]

    @property
    def bytes_of_each(self) -> int:
        """Bytes of a row, on average."""
        count = len(self.images)
        return bytes_of_rows(self.stages, self.sizes, range(count)) // count

    @property
    def most_of_a_shard(self) -> int:
        """The most rows that a shard may have, however small they are."""
        if len(self.images) <= LONG_LIST or any(len(stage.shape) > 1 for stage in self.stages):
            return MAX_SHARD_ROWS
        return max(MAX_SHARD_ROWS, min(MAX_VECTORS, KEY_BYTES // (self.images.keys.longest + BESIDE_KEY)))


def choose_shard_rows(
    asked: ExtractSpec, begun: Outline | None, rows: Rows, batch_size: int, sharers: Sharers, extends: bool = False
) -> Choice[int]:
    """Choose the rows of a shard: whole batches, so that no batch spans two shards.

    `begun` is the plan that is resumed, or None. `rows` are all of the dump, or of the generation that is added to it
    if it `extends` that plan.
    """
    if asked.shard_size is not None:
        return Choice(_whole_batches(-(-asked.shard_size // batch_size), batch_size), "shard size as asked")
    if begun is None:
        default = Choice(default_shard_rows(batch_size, rows.bytes_of_each, rows.most_of_a_shard), DEFAULT)
    else:
        default = Choice(begun.shard_rows, SIZE_AS_BEGUN)
        if not extends:  # other memory, another average or another rule must not change a dump
            return default
    num_batches = -(-len(rows.images) // batch_size)
    shared = _whole_batches(num_batches // (FOR_EACH * sharers.count), batch_size)
    if sharers.count > 1 and shared < default.value:
        return Choice(shared, f"shard size for {sharers}")
    return default


def default_shard_rows(batch_size: int, bytes_per_image: int, most: int = MAX_SHARD_ROWS) -> int:
    """Return as many rows as have about SHARD_BYTES, at most `most`, but at least a batch."""
    return _whole_batches(min(SHARD_BYTES // max(1, bytes_per_image), most) // batch_size, batch_size)


def _whole_batches(number: int, batch_size: int) -> int:
    return min(max(1, number), max(1, MOST // batch_size)) * batch_size


def too_few(plan: Outline, batch_size: int, sharers: Sharers) -> str | None:
    """Return what to say if some workers get no shard, with the way out; None if all get one."""
    if plan.num_shards >= sharers.count:
        return None
    fewer = f"there {'is' if plan.num_shards == 1 else 'are'} {counted(plan.num_shards, 'shard')} for {sharers}"
    if plan.num_images < sharers.count:
        return f"{fewer}: the list has no more than {counted(plan.num_images, 'image')}"
    is_one_batch = -(-plan.num_images // batch_size) < sharers.count
    smaller = "--batch-size and --shard-size" if is_one_batch else "--shard-size"
    return f"{fewer}: with a smaller {smaller} in the command that begins it, all have work"
