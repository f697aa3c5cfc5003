from itertools import chain

import pytest

from featcli.errors import UsageError
from featcli.system.scheduler import part_of

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "8"}
ARRAY = {f"SLURM_ARRAY_TASK_{name}": text for name, text in (("ID", "5"), ("MIN", "2"), ("MAX", "9"), ("COUNT", "8"))}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "6", "FEATCLI_PARTS": "7"}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_parts_are_all_and_apart(count):
    """Every shard is in exactly one part, and parts differ by one shard at most."""
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
    """auto takes the part from Slurm arrays, srun, torchrun, Open MPI and Kubernetes, and says from which."""
    part = part_of("auto", environment)
    assert str(part) == expected
    assert part.reason.startswith("auto: ")
    assert says in part.reason


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "no Slurm array"),
        ({"RANK": "1", "WORLD_SIZE": "8"}, "no Slurm array"),  # a stray pair in a container is not torchrun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "no Slurm array"),  # a batch script is one process
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, "not all of an array"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
        (ARRAY | {"SLURM_ARRAY_TASK_MAX": "many"}, "'many'"),
        ({"JOB_COMPLETION_INDEX": "1"}, "Kubernetes tells the index"),
        (KUBERNETES | {"FEATCLI_PARTS": "3"}, "part 6/3"),
        (ARRAY | {"FEATCLI_PARTS": "16"}, "makes 8 parts, FEATCLI_PARTS says 16"),
    ],
)
def test_nothing_is_guessed(environment, says):
    """auto refuses what does not say how many parts there are, above all an array of which some tasks run again."""
    with pytest.raises(UsageError, match=says):
        part_of("auto", environment)


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "2/2", "-1/2", "1/0", "0/0", "a/b", "1/2/3", "٣/٤", "1.0/2"])
def test_what_is_no_part(text):
    """Anything but i/n with i below n is refused before anything is loaded."""
    with pytest.raises(UsageError, match="part"):
        part_of(text)
