import os
from dataclasses import dataclass, replace
from itertools import chain

import pytest
import torch

from conftest import content
from featcli.dump.formats import FORMATS
from featcli.dump.plan import Outline, Output
from featcli.errors import UsageError
from featcli.extraction import sharding
from featcli.extraction.sharding import Rows, Sharers, choose_shard_rows, sharers_of, too_few
from featcli.inputs.keys import Keys
from featcli.pixels.sizes import Sizes
from featcli.spec.commands import ExtractSpec
from featcli.system.scheduler import part_of

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8"}
ARRAY = {f"SLURM_ARRAY_TASK_{name}": text for name, text in (("ID", "5"), ("MIN", "2"), ("MAX", "9"), ("COUNT", "8"))}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "6", "FEATCLI_PARTS": "7"}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_parts_are_all_and_apart(count):
    """Every shard is in exactly one part, and parts differ by at most one shard."""
    parts = [part_of(f"{index}/{count}").of(range(23)) for index in range(count)]
    assert sorted(chain(*parts)) == list(range(23))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == list(range(23))[index::count] for index, part in enumerate(parts))


@pytest.mark.parametrize(
    ("environment", "expected", "says"),
    [
        (TORCHRUN, "3/8", "torchrun"),
        (ARRAY, "3/8", "Slurm array task 5 of 2-9"),
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "1"}, "3/8", "Slurm array"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_COUNT": "4",
          "SLURM_ARRAY_TASK_STEP": "2"}, "2/4", "Slurm array"),
        (STEP, "1/4", "srun"),
        (ARRAY | STEP, "13/32", "srun within Slurm array"),
        (ARRAY | STEP | TORCHRUN, "27/64", "torchrun within Slurm array"),
        (MPI, "2/3", "Open MPI"),
        (MPI | STEP, "2/3", "Open MPI"),
        (KUBERNETES, "6/7", "Kubernetes"),
    ],
)  # fmt: skip
def test_what_schedulers_say(environment, expected, says):
    """auto takes the part from Slurm arrays, srun, torchrun, Open MPI or Kubernetes, and says from which."""
    part = part_of("auto", environment)
    assert str(part) == expected
    assert part.reason.startswith("auto: ")
    assert says in part.reason


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "no Slurm array"),
        ({"RANK": "1", "WORLD_SIZE": "8"}, "no Slurm array"),  # such a pair, left over in a container, is not torchrun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "no Slurm array"),  # a batch script is one process
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, "so this is not a whole array"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
        (ARRAY | {"SLURM_ARRAY_TASK_MAX": "many"}, "'many'"),
        ({"JOB_COMPLETION_INDEX": "1"}, "Kubernetes tells the index"),
        (KUBERNETES | {"FEATCLI_PARTS": "3"}, "part 6/3"),
        (ARRAY | {"FEATCLI_PARTS": "16"}, "makes 8 parts, and FEATCLI_PARTS says 16"),
    ],
)
def test_nothing_is_guessed(environment, says):
    """auto refuses schedulers that do not say how many parts there are, and arrays of which some tasks run again."""
    with pytest.raises(UsageError, match=says):
        part_of("auto", environment)


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "2/2", "-1/2", "1/0", "0/0", "a/b", "1/2/3", "٣/٤", "1.0/2"])
def test_what_is_no_part(text):
    """Anything but i/n with i below n is refused before anything is loaded."""
    with pytest.raises(UsageError, match="part"):
        part_of(text)


VECTOR = Output(
    "stage4", "stage4", "avg", ("C",), (512,), "float16", "layer4", index=4, stride=(32, 32), map_shape=(512, 7, 7)
)
MAPS = replace(VECTOR, reduction="none", axes=("C", "H", "W"), shape=(512, 7, 7))
CPU = torch.device("cpu")


@dataclass
class Names:
    """A list of so many images that all have the same key."""

    count: int
    key: str = "0001.jpg"

    def __len__(self):
        return self.count

    @property
    def keys(self):
        return Keys([self.key])


def asked(**options):
    return ExtractSpec(inputs="photos", checkpoint="resnet18", output="feats", **options)


def rows_of(names, *stages):
    return Rows(names, Sizes((224, 224)), stages or (VECTOR,))


def test_everybody_has_several_shards():
    """Each worker has at least four shards of whole batches, unless a shard is one batch, and none is larger for it."""
    for images in (1, 2, 31, 501, 5000, 100_000):
        for batch in (1, 8, 32, 500):
            alone = choose_shard_rows(asked(), None, rows_of(Names(images)), batch, Sharers(1, 1))
            assert alone.reason == "default"
            for sharers in (Sharers(2, 1), Sharers(1, 3), Sharers(4, 2), Sharers(1000, 1)):
                size = choose_shard_rows(asked(), None, rows_of(Names(images)), batch, sharers).value
                assert size % batch == 0
                assert size <= alone.value
                shards = [part_of(f"{i}/{sharers.count}").of(range(-(-images // size))) for i in range(sharers.count)]
                assert size == batch or min(map(len, shards)) >= 4


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"part": "1/4"}, 4),
        ({"device": "cpu,cpu,cpu"}, 3),
        ({"part": "1/4", "device": "cpu,cpu"}, 8),
        ({"engine": "ray", "workers": 5}, 5),
        ({"engine": "ray", "ray_address": "auto"}, 16),
        ({"engine": "ray", "ray_address": "auto", "workers": 3, "part": "0/2"}, 6),
    ],
)
def test_who_shares_the_work(options, count):
    """Parts, devices and Ray's workers are multiplied, and a cluster not asked yet counts as sixteen."""
    assert sharers_of(asked(**options), 2, CPU).count == count


def test_a_ray_of_its_own_has_as_many_workers_as_there_are_cores_for(monkeypatch):
    """A Ray on this machine has as many workers as the cores allow."""
    monkeypatch.setattr(sharding, "available_cores", lambda: 8)
    assert sharers_of(asked(engine="ray"), 2, CPU).count == 4
    assert sharers_of(asked(engine="ray", cpus_per_worker=0.5), 2, CPU).count == 16


def test_a_shard_size_that_is_asked_for_stays():
    """A --shard-size that was asked for is used, whoever shares the work, and an existing dump keeps its own."""
    sharers, begun = Sharers(4, 1), Outline(outputs=(VECTOR,), num_images=501, keys_digest="", shard_rows=96)
    for there in (None, begun):
        assert choose_shard_rows(asked(shard_size=100), there, rows_of(Names(501)), 32, sharers).value == 128
    resumed = choose_shard_rows(asked(), begun, rows_of(Names(501)), 32, sharers)
    assert (resumed.value, resumed.reason) == (96, "shard size as this dump was begun")


@pytest.mark.parametrize(
    ("images", "shard_rows", "sharers", "says"),
    [
        (
            501,
            4096,
            Sharers(2, 1),
            "there is 1 shard for 2 parts: with a smaller --shard-size in the command that begins",
        ),
        (501, 32, Sharers(30, 1), "there are 16 shards for 30 parts: with a smaller --batch-size and --shard-size in"),
        (3, 32, Sharers(2, 3), "there is 1 shard for 2 parts of 3 workers: the list has no more than 3 images"),
        (501, 32, Sharers(16, 1), None),
    ],
)
def test_fewer_shards_than_workers_are_said(images, shard_rows, sharers, says):
    """If a worker gets no shard, the run says so, with the option that would change it."""
    plan = Outline(outputs=(VECTOR,), num_images=images, keys_digest="", shard_rows=shard_rows)
    said = too_few(plan, 32, sharers)
    assert said is says is None or said.startswith(says)


def test_shards_of_vectors_of_long_lists():
    """Vectors of more than a million images come in shards of 65,536; maps, and shorter lists, in shards of 4,096."""
    long = Names(1_000_001)
    for names, stage, most in [
        (long, VECTOR, 65_536),
        (Names(1_000_000), VECTOR, 4096),
        (long, MAPS, 4096),
        (Names(long.count, "k" * 1000), VECTOR, 12_896),
        (Names(long.count, "k" * 4000), VECTOR, 4096),
    ]:
        assert choose_shard_rows(asked(), None, rows_of(names, stage), 1, Sharers(1, 1)).value == most


@pytest.mark.parametrize("name", ["\udcff", "\x01", "\\", '"', "\u4e2d", "\U0001f600", "k"])
def test_keys_of_large_shards_fit_into_a_header(name, tmp_path):
    """The largest shard of vectors holds its keys in either format, whatever characters they have."""
    key = name * (300 // len(os.fsencode(name)))
    rows = rows_of(Names(2_000_000, key)).most_of_a_shard
    assert rows > 4096
    for format_name, of_a_key in (("safetensors", 8), ("hdf5", 1)):
        path = tmp_path / format_name
        path.touch()
        layout = FORMATS[format_name].lay_out(str(path), {"valid": ("uint8", (rows,))}, [key] * rows, {})
        assert layout.size < of_a_key * 13_000_000 + rows


def test_two_parts_without_a_shard_size(many, cli, tmp_path, monkeypatch):
    """Parts without --shard-size each get work, a later part keeps the size, and the dump is that of one process."""
    given = ["extract", many, "-c", "test_resnet", "--random-init", "--image-size", 32, "--threads", 1]
    given += ["--batch-size", 4, "--pool", "avg", "-o"]
    first = cli(*given, tmp_path / "d", "--part", "0/2")
    assert "part           0/2: 6 shards of 12  (as asked)" in first.err
    assert "12 shards of up to 4 images  (new; shard size for 2 parts)" in first.err
    monkeypatch.setattr(sharding, "FOR_EACH", 1)  # another rule, as another version may have
    second = cli(*given, tmp_path / "d", "--part", "1/2")
    assert "part           1/2: 6 shards of 12  (as asked)" in second.err
    idle = cli(*given, tmp_path / "d", "--part", "14/15")
    assert idle.code == 0
    assert "warning: there are 12 shards for 15 parts: with a smaller --batch-size and --shard-size" in idle.err
    assert idle.err.endswith("part 14/15 has no shards: the 12 of this dump belong to parts 0/15 to 11/15\n")
    assert cli(*given, tmp_path / "whole", "--shard-size", 4, "-q").code == 3
    assert content(tmp_path / "d") == content(tmp_path / "whole")
    refused = cli(*given, tmp_path / "d", "--part", "0/2", "--shard-size", 8)
    assert (refused.code, "--shard-size: 4 there, 8 now" in refused.err) == (5, True)
