"""Check workers of a Ray cluster.

Each test starts and ends a Ray of its own, and leaves others on the machine alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import MANY_SHARDS, SHARDS, at_work, content, hooked
from featcli.errors import MachineError, UsageError
from featcli.pixels.batches import SizedImages
from featcli.run.stats import RunStats, Timings
from featcli.workers.ray import MOST_SHARDS

pytest.importorskip("ray")

QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
RAY = ["--engine", "ray"]


@pytest.fixture
def cluster(tmp_path):
    """Start a cluster of one node. Returns its address, and a function that tells it things.

    Its workers wait at image 20 for a file "go", and are killed at image 45.
    """
    script = Path(__file__).with_name("ray_cluster.py")
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=hooked(**QUIET, WAITS_AT="20.png", WAITS_FOR=tmp_path / "go", DIES_AT="45.png"),
    )
    address = process.stdout.readline().strip()

    def tell(what):
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    yield address, tell
    process.communicate(timeout=60)


@pytest.mark.parametrize("extend", [pytest.param([], marks=pytest.mark.long), ["--extend"]], ids=["dump", "generation"])
def test_a_death_a_part_and_an_interruption(cli, many, whole, tmp_path, extend):
    """A Ray whose worker dies, a part beside it, Ctrl-C, and another run make the very files of one process.

    They do so for a dump, and for a generation of one that grows.
    """
    dump, expected = tmp_path / "d", whole
    if extend:
        first = [many / f"{i:02d}.png" for i in (1, 30)]
        assert cli("extract", *first, *MANY_SHARDS, "-o", dump).code == 0
        expected = shutil.copytree(dump, tmp_path / "expected")
        assert cli("extract", many, *MANY_SHARDS, *extend, "-o", expected).code == 3
    command = ["extract", many, *MANY_SHARDS, *extend, "-o", dump]
    waits = {"WAITS_AT": "40.png", "WAITS_FOR": tmp_path / "go"}
    environment = hooked(**QUIET, DIES_AT="20.png", DIES_ONCE=tmp_path / "died", **waits)
    run = at_work(*command, *RAY, "--workers", "2", "-v", shards=35, env=environment)  # 20 comes after all others
    assert cli(*command, "--part", "1/3").code == 0
    run.send_signal(signal.SIGINT)
    err = run.communicate()[1]
    assert run.returncode == 130, err
    assert (tmp_path / "died").exists()
    assert "Traceback" not in err
    assert content(dump) != content(expected)
    assert cli(*command).code == 3
    assert content(dump) == content(expected)


@pytest.mark.long
def test_a_node_comes_a_node_goes_and_a_shard_is_poisonous(cli, cluster, many, whole, tmp_path):
    """A run begins with the workers that have a place; others join with a new node, and do the work of dead ones.

    A shard that kills every worker is given up and named. All others are made, and a later run completes the dump.
    """
    address, tell = cluster
    here = ["extract", os.path.relpath(many, tmp_path), *MANY_SHARDS, "-o", "d"]  # workers are in other folders
    here += [*RAY, "--ray-address", address, "-v", "--workers", "2"]  # one has to wait
    run = at_work(*here, shards=20, env={**os.environ, **QUIET}, cwd=tmp_path)
    tell("add")
    tell("kill")
    assert any("warning: a worker died" in line for line in run.stderr)
    (tmp_path / "go").touch()
    err = run.communicate()[1]
    assert run.returncode == 1, err
    given_up = "shard 45 was given up after 3 workers died at it without keeping more rows"
    assert f"featcli: error: {given_up}, the last one lost" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "d" / "shards").glob("*.json"))) == SHARDS - 1
    assert cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d").code == 3
    assert content(tmp_path / "d") == content(whole)


class StandInForRay:
    """Stands for the module: each worker loads, and makes shards, as a test says, at once."""

    exceptions = SimpleNamespace(RayTaskError=RuntimeError, RayError=RuntimeError)

    def __init__(self, loads=(), make=None, nodes=(), has_room=True):
        """Take what each worker `loads`, and `make`, which returns what a worker says while it makes these shards."""
        self._loads, self._make, self._nodes, self._has_room = iter(loads), make, nodes, has_room
        self.calls = []  # those that end workers

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 2.0}

    def nodes(self):
        return self._nodes

    def remote(self, **wants):
        def actor(task):
            methods = {"ping": lambda: None, "load": lambda: next(self._loads)}
            made = {name: SimpleNamespace(remote=partial(Reference, method)) for name, method in methods.items()}
            made["keep"] = SimpleNamespace(remote=lambda: self.calls.append("keep"))
            made["make"] = SimpleNamespace(remote=lambda shards: map(Reference, map(constant, self._make(shards))))
            return SimpleNamespace(**made)

        kind = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=actor))
        return lambda worker: kind

    def wait(self, references, timeout, num_returns=1):
        if num_returns > 1:
            self.calls.append(f"wait for {num_returns}")
        return (references, []) if self._has_room else ([], references)

    def get(self, reference):
        return reference.value()

    def kill(self, handle):
        self.calls.append("kill")


@dataclass(eq=False)
class Reference:
    """Stands for Ray's reference to something that is to come."""

    value: Callable[[], object]


def constant(value):
    return lambda: value


NO_PICTURES = SimpleNamespace(images=(), of=lambda rows: SizedImages({}, None))


@pytest.fixture
def engine(whole):
    """Make an engine with a stand-in for Ray, its work, and the list of what it will report."""
    from featcli.dump.folder import Dump
    from featcli.dump.writer import DumpWriter
    from featcli.spec.commands import ExtractSpec
    from featcli.workers.engine import WorkOrder
    from featcli.workers.ray import RayEngine

    def make(ray, shards=(0,), **options):
        dump, said = Dump.at(whole), []
        asked = {"engine": "ray", "gpus_per_worker": 1, **options}
        config = ExtractSpec(("x",), checkpoint="test_resnet", output=str(whole), **asked)
        engine = RayEngine(config, "cpu", dump.plan, lambda kind, **facts: said.append((kind, facts)), ray)
        engine.start()
        return engine, WorkOrder(DumpWriter(dump, dump.plan.environment), shards, NO_PICTURES, 0), said

    return make


def environment_of(dump):
    """Return the environment of the process that made a dump."""
    return json.loads((dump / "plan.json").read_text())["environment"]


def test_no_place_for_a_worker(engine, monkeypatch):
    """If no worker gets a place in time, the run ends, and says what each wants and what there is."""
    from featcli.workers import ray

    monkeypatch.setattr(ray, "START_SECONDS", -1.0)
    engine, order, _ = engine(StandInForRay(has_room=False), cpus_per_worker=1)
    with pytest.raises(MachineError, match="each asks for 1 CPUs and 1 GPUs, and the cluster offers 2 CPUs, 0 GPUs"):
        engine.run(order)


def test_a_ray_that_does_not_start(engine, monkeypatch):
    """If a Ray of its own does not start, as on a busy machine, the run ends in one line."""

    def init(**_):
        raise Exception("The current node timed out during startup.")

    ray = StandInForRay()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init, raising=False)
    with pytest.raises(MachineError, match="timed out during startup"):
        engine(ray)


def test_workers_of_other_versions(engine, whole):
    """A worker with another featcli is refused, and one warning names other libraries that differ."""
    same = environment_of(whole)
    other, old = {**same, "torch": "1.0"}, {**same, "featcli": "0.0.1"}

    def warnings(*loads):
        made, order, said = engine(StandInForRay(loads, all_made), range(9), workers=len(loads))
        try:
            made.run(order)
        finally:
            made.close()
        return [facts["text"] for kind, facts in said if kind == "warning"]

    assert warnings(same, same) == []
    assert warnings(same, other, other) == [
        f"a worker is not like the others, so last bits may differ: torch {same['torch']} -> 1.0"
    ]
    with pytest.raises(UsageError, match=r"a worker has featcli 0\.0\.1"):
        warnings(old)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--ray-address", "127.0.0.1:1"], 7),  # nobody is there
        (["--ray-address", "ray://127.0.0.1:10001"], 2),
        (["--ray-address", "nowhere"], 2),
        (["--workers", "0"], 2),
        (["--cpus-per-worker", "-1"], 2),
        (["--device", "cpu,cpu"], 2),
    ],
)
def test_what_cannot_be(cli, many, tmp_path, options, code):
    """An address without a cluster, and options that make no sense, are refused before anything is written."""
    run = cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", *RAY, *options)
    assert run.code == code
    assert f"featcli: error: {options[0]}" in run.err
    assert not (tmp_path / "d").exists()


def all_made(shards):
    """Yield what a worker says that makes all it gets."""
    for shard in shards:
        yield "event", ("shard", {"shard": shard.number, "rows": 1, "file": "", "bytes": 0, "failed": 0})
    yield "done", None


def test_several_shards_together(engine, whole):
    """A worker gets several shards, so that it prefetches from one to the next, and fewer towards the end."""
    given = []

    def make(shards):
        given.append([shard.number for shard in shards])
        return all_made(shards)

    made, order, _ = engine(StandInForRay([environment_of(whole)], make), range(100))
    made.run(order)
    assert [number for numbers in given for number in numbers] == list(range(100))
    assert [len(given[0]), len(given[-1])] == [MOST_SHARDS, 1]


def test_the_machines_fault_is_handed_on(engine, whole):
    """If a worker cannot read something because of its machine, the run ends with exit code 7, as in one process."""

    def make(shards):
        error = RuntimeError("as Ray tells it")
        error.cause = MachineError("input folder 'photos': no longer there", "bring it back")
        raise error
        yield

    made, order, _ = engine(StandInForRay([environment_of(whole)], make))
    with pytest.raises(MachineError, match="no longer there") as raised:
        made.run(order)
    assert raised.value.exit_code == 7


def test_workers_keep_their_rows_before_they_are_ended(engine, whole):
    """If a run ends half way, workers keep the rows that they have made, and are killed only then."""

    def make(shards):
        if shards[0].number == 0:
            error = RuntimeError("as Ray tells it")
            error.cause = MachineError("input folder 'photos': no longer there", "bring it back")
            raise error
        yield from all_made(shards)

    ray = StandInForRay([environment_of(whole)] * 2, make)
    made, order, _ = engine(ray, range(2), workers=2)
    with pytest.raises(MachineError):
        made.run(order)
    made.close()
    assert ray.calls == ["keep", "keep", "wait for 2", "kill", "kill"]


def test_the_last_times_are_heard(engine, whole):
    """A worker's times count, although it reports them after its last shard."""

    def make(shards):
        shard, done = all_made(shards)
        return [shard, ("stats", RunStats(timings=Timings(compute=5.0))), done]

    made, order, _ = engine(StandInForRay([environment_of(whole)], make))
    assert made.run(order).timings.compute == 5.0


def test_cpus_of_workers_with_a_gpu(engine):
    """Each worker gets the CPUs that every node with GPUs has for one worker, so that no worker fits on no node."""
    nodes = [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 96.0, "GPU": 8.0}]
    living = [{"Alive": True, "Resources": resources} for resources in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 1.0, "GPU": 8.0}}
    for there, cpus in (([*living, dead], 8), (living[:1], 1)):
        _, _, said = engine(StandInForRay(nodes=there))
        assert [facts["value"] for _, facts in said] == [f"ray, 1 worker of {cpus} CPUs, 1 GPUs"]
