"""Check that a job gives the same dump whoever does it: parts, or a process for each device.

For Ray see test_ray.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import featcli
from conftest import MANY_SHARDS, SHARDS, Featcli, at_work, content, finished, hooked
from featcli.dump.folder import Dump
from featcli.errors import MachineError, WorkerError
from featcli.system.child import START
from featcli.workers import processes
from featcli.workers.shard_progress import ShardProgress
from featcli.workers.shard_queue import TRIES, ShardQueue


def test_two_parts_at_once(many, whole, tmp_path):
    """Two parts that start together make the very files of one process, and the last to end writes the manifest."""
    runs = [Featcli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--part", f"{i}/2") for i in range(2)]
    said = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 3], said  # one of them has the broken picture
    assert all(f"part           {i}/2: 24 shards of 48  (as asked)" in text for i, text in enumerate(said))
    assert content(tmp_path / "d") == content(whole)


def test_a_part_alone(cli, many, whole, tmp_path):
    """A part makes only its shards, says what is missing, and leaves the dump incomplete; later parts may be others."""
    run = cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--part", "0/3")
    assert run.code == 3
    assert f"part 0/3 of {tmp_path / 'd'}: 15 images, 1 failed (1 not_an_image)\n" in run.err
    assert "other parts have to make 32 of 48 shards" in run.err
    made = sorted(int(path.stem) for path in (tmp_path / "d" / "shards").glob("*.h5"))
    assert made == list(range(0, SHARDS, 3))
    assert cli("inspect", tmp_path / "d").code == 8
    again = cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--part", "0/3")
    assert again.code == 3
    assert "nothing left to do" in again.err
    assert cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--part", "0/2", "-q").code in (0, 3)
    assert cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "-q").code == 3
    assert content(tmp_path / "d") == content(whole)


def test_part_options(cli, many, tmp_path):
    """A value that is no part, and a part that would delete what others make, are usage errors."""
    for options in (["--part", "2/2"], ["--part", "0/2", "--overwrite"], ["--part", "auto"], ["--workers", "2"]):
        assert cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", *options).code == 2
    assert not (tmp_path / "d").exists()


def test_the_schedulers_part_is_said(cli, many, tmp_path, monkeypatch):
    """--part auto prints where it found the part."""
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    monkeypatch.setenv("FEATCLI_PARTS", "24")
    run = cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--part", "auto")
    assert "part           3/24: 2 shards of 48  (auto: Kubernetes indexed job)" in run.err


def test_a_process_for_each_device(cli, many, whole, tmp_path):
    """--device cpu,cpu makes the files of one process with the events of one run, although workers die.

    A shard that kills every worker is given up and named. All others are made, and a later run completes the dump.
    """
    command = ["extract", many, *MANY_SHARDS, "-o", tmp_path / "d"]
    run = Featcli(*command, "--device", "cpu,cpu", "--json", env=hooked(DIES_AT="20.png"))
    out, err = run.communicate()
    assert run.returncode == 1, err
    assert "device         cpu, cpu  (as asked: a process for each)" in err
    assert re.search(r"warning: worker \d \(cpu\) died at shard .*20.*: killed by SIGKILL", err)
    assert err.count("failed '33.png'") == 1
    given_up = "shard 20 was given up after 3 workers died at it without keeping more rows"
    assert f"featcli: error: {given_up}, the last one killed by SIGKILL" in err
    assert "Traceback" not in err
    events = [json.loads(line) for line in out.splitlines()]
    made = sorted(event["shard"] for event in events if event["type"] == "shard")
    assert made == sorted({*range(SHARDS)} - {20})
    assert [event["key"] for event in events if event["type"] == "failure"] == ["33.png"]
    assert len(list((tmp_path / "d" / "shards").glob("*.json"))) == SHARDS - 1
    assert cli(*command).code == 3
    assert content(tmp_path / "d") == content(whole)


@pytest.mark.long
def test_fewer_shards_than_workers(cli, many, tmp_path):
    """A run says beforehand that some workers have no work, and its busy shares count only the others."""
    given = ["-c", "test_resnet", "--random-init", "--threads", 1, "--device", "cpu,cpu", "--json"]
    run = cli("extract", many / "01.png", *given, "-o", tmp_path / "d")
    assert run.code == 0
    assert "warning: there is 1 shard for 2 workers: the list has no more than 1 image" in run.err
    assert run.events[-1]["pace"]["threads"]["compute"] == 1


def test_workers_that_cannot_start(many, tmp_path):
    """If workers die before they begin, the run ends instead of starting others for ever."""
    (tmp_path / "sitecustomize.py").write_text("import os, sys\nif sys.orig_argv[1] == '-c': os.kill(os.getpid(), 9)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code, err = finished("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--device", "cpu,cpu", env=environment)
    assert code == 1
    assert f"{TRIES} workers died before they could begin, the last one killed by SIGKILL" in err


def test_workers_that_crash_while_they_load(cli, many, tmp_path, monkeypatch):
    """If workers crash while they load, the run ends and repeats what they said."""
    light = "class Light: load = ShardRunner = Shard = lambda *_: 1 / 0"  # so the worker need not import torch
    program = f"import sys\n{light}\nfor name in 'loading', 'pipeline', 'source':"
    program += " sys.modules['featcli.run.' + name] = Light\nfrom featcli.workers import worker\n"
    monkeypatch.setattr(processes, "PROGRAM", f"{program}worker.main({{socket}}, {{lock}})")
    run = cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--device", "cpu,cpu")
    assert run.code == 1
    assert f"{TRIES} workers died before they could begin, the last one ZeroDivisionError" in run.err


@pytest.mark.long
def test_an_error_of_a_worker_is_the_runs(many, tmp_path):
    """An error that every shard would meet ends the run as it would in one process."""
    environment = hooked(WAITS_AT="10.png", WAITS_FOR=tmp_path / "gone")
    run = at_work("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", "--device", "cpu,cpu", "-v", env=environment)
    many.rename(many.with_name("moved"))
    try:
        (tmp_path / "gone").touch()
        err = run.communicate()[1]
        assert run.returncode == 7, err
        assert "no longer there" in err
    finally:
        many.with_name("moved").rename(many)


def test_interrupting_workers(cli, many, whole, tmp_path):
    """Ctrl-C also ends workers, even one whose decoder does not end, and what is committed stays."""
    environment = hooked(WAITS_AT="10.png", WAITS_FOR=tmp_path / "go")
    command = ["extract", many, *MANY_SHARDS, "-o", tmp_path / "d"]
    run = at_work(*command, "--device", "cpu,cpu", "-v", env=environment)
    children = Path(f"/proc/{run.featcli}/task/{run.featcli}/children").read_text().split()
    assert len(children) == 2
    os.killpg(run.featcli, signal.SIGINT)  # a terminal sends it to all of them
    run.communicate(timeout=60)
    assert run.returncode == 130
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not list((tmp_path / "d").rglob("*.partial"))
    assert cli(*command).code == 3
    assert content(tmp_path / "d") == content(whole)


def test_ctrl_c_while_workers_import(tmp_path):
    """A worker ignores Ctrl-C from its first line on, so it prints no traceback of its imports."""
    package = tmp_path / "featcli" / "workers"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    worker = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nmain = print\n"  # in place of the real one
    (package / "worker.py").write_text(worker)
    program = START.format(path=[str(tmp_path), *sys.path]) + processes.PROGRAM.format(socket=3, lock=4)
    run = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "3 4\n", "")


def test_workers_keep_their_rows(many, tmp_path):
    """If a run is stopped, rows that workers have made of unfinished shards are on the disk.

    The next run, in one process, makes only the rest, and the dump is that of one process.
    """
    options = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "threads": 1, "decode_threads": 1}
    options |= {"batch_size": 2, "shard_size": 24}
    computed, again, dump = [], [], tmp_path / "d"

    class Stop(BaseException):
        """Stands for anything outside that stops a run."""

    def stop(kind, **facts):
        if kind == "batch":
            computed.append(facts["images"])
            if sum(computed) == 12:
                raise Stop

    def count(kind, **facts):
        if kind == "batch":
            again.append(facts["images"])

    with pytest.raises(Stop):
        featcli.extract(many, output=dump, device="cpu,cpu", report=stop, **options)
    begun = Dump.at(dump)
    assert sorted(dump.rglob("*.partial")) == sorted(one.partial for one in begun.unfinished())
    safe = sum(begun.rows_kept().values()) + sum(len(begun.plan.shard(number)) for number in begun.numbered(".json"))
    assert safe >= 12
    featcli.extract(many, output=dump, report=count, **options)
    assert sum(again) == SHARDS - safe
    featcli.extract(many, output=tmp_path / "whole", **options)
    assert content(dump) == content(tmp_path / "whole")


@pytest.mark.long
def test_a_driver_that_is_killed(cli, many, whole, tmp_path):
    """Workers end with the process that feeds them, and hold the dump until then."""
    environment = hooked(WAITS_AT="10.png", WAITS_FOR=tmp_path / "go")
    command = ["extract", many, *MANY_SHARDS, "-o", tmp_path / "d"]
    run = at_work(*command, "--device", "cpu,cpu", "-v", env=environment)
    run.kill()
    run.wait()
    refused = cli(*command, "--overwrite")
    assert refused.code == 5
    assert "in use by another process" in refused.err
    (tmp_path / "go").touch()
    assert "Traceback" not in run.communicate()[1]  # returns when no worker has its stderr any more
    assert cli(*command).code == 3
    assert content(tmp_path / "d") == content(whole)


def test_the_queue_isolates():
    """Shards of a worker that died are tried again one by one, and only the one that kills is given up."""
    queue = ShardQueue(range(5), dict)
    assert [queue.take_new() for _ in range(2)] == [0, 1]
    queue.died([0, 1], "killed", had_started=True, is_last=False)
    assert queue.take_again() is None  # all others come first
    for number in (2, 3, 4):
        assert queue.take_new() == number
        queue.done(number)
    for _ in range(TRIES - 1):
        while (number := queue.take_again()) == 0:
            queue.done(0)
        assert number == 1
        queue.died([1], "killed again", had_started=True, is_last=False)
    assert queue.is_over
    assert queue.given_up == {1: "killed again"}
    with pytest.raises(WorkerError, match="shard 1 was given up after 3 workers died at it without keeping more rows"):
        queue.refuse_given_up()


@pytest.mark.parametrize(
    ("kept", "deaths"),
    [
        ([0, 0, 0], 3),
        ([10, 10, 10], 3),  # by an earlier run
        ([10, 20, 20, 20, 20], 5),
        ([0, 4, 4, 8, 8, 12, 12, 12, 12], 9),  # two deaths without progress, then one with progress
        ([10, 0, 5, 5], 3),  # rows were dropped, and fewer were kept since: no progress
    ],
)
def test_only_deaths_without_progress_give_a_shard_up(kept, deaths):
    """Three deaths in a row that add no `kept` rows give a shard up, and no others do."""
    rows = iter([{0: count} if count else {} for count in [kept[0], *kept]])
    queue, died = ShardQueue([0, 1], lambda: next(rows)), 0
    assert (queue.take_new(), queue.take_new()) == (0, 1)
    queue.done(1)
    while not queue.is_over:
        queue.died([0], "killed", had_started=True, is_last=False)
        died += 1
        assert queue.take_again() == (None if queue.given_up else 0)
    assert died == deaths
    assert [*queue.given_up] == [0]


def test_no_shard_pays_for_another():
    """If a worker had several shards and rows of one were kept, its death counts against none of them."""
    rows = iter([{}, {3: 10}, {3: 10}, {3: 10}])
    queue = ShardQueue([3, 4], lambda: next(rows))
    assert (queue.take_new(), queue.take_new()) == (3, 4)
    queue.died([3, 4], "killed", had_started=True, is_last=False)
    assert queue.take_again() == 3
    queue.done(3)
    for _ in range(TRIES - 1):
        assert queue.take_again() == 4
        queue.died([4], "killed", had_started=True, is_last=False)
    assert queue.given_up == {}


def test_progress_is_taken_back(whole):
    """What a dead worker had not committed is not counted, and its failures are not reported twice."""
    told = []
    progress = ShardProgress(Dump.at(whole).plan, lambda kind, **facts: told.append((kind, facts)))
    failure = {"key": "33.png", "row": 33, "reason": "not_an_image", "detail": ""}
    for kind, facts in (("failure", failure), ("batch", {"images": 1})):
        assert progress.hear(kind, facts) is None
    progress.take_back()
    assert told == [("batch", {"images": 1}), ("batch", {"images": -1})]
    for kind, facts in (("failure", failure), ("batch", {"images": 1})):
        progress.hear(kind, facts)
    for kind in ("resumed", "kept"):  # the shard is not committed yet
        told.clear()
        assert progress.hear(kind, {"shard": 33, "rows": 0}) is None
    told.clear()
    assert progress.hear("shard", {"shard": 33, "rows": 1}) == 33
    assert progress.take_back() == 0
    assert told == [("failure", failure), ("shard", {"shard": 33, "rows": 1})]


def test_rows_that_a_dead_worker_kept_count_as_made(whole):
    """Rows that a dead worker kept count as made, without those that were on the disk before it."""
    progress = ShardProgress(Dump.at(whole).plan, lambda kind, **facts: None)
    for kind, rows in (("resumed", 2), ("kept", 4), ("kept", 7)):
        progress.hear(kind, {"shard": 5, "rows": rows})
    assert progress.take_back() == 5
    assert progress.take_back() == 0


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "cuda:1", ("cuda:0", {"CUDA_VISIBLE_DEVICES": "1"})),
        ("4,7", "cuda:1", ("cuda:0", {"CUDA_VISIBLE_DEVICES": "7"})),
        ("GPU-5d,GPU-af", "cuda", ("cuda:0", {"CUDA_VISIBLE_DEVICES": "GPU-5d"})),
        ("4,7", "cpu", ("cpu", {})),
    ],
)
def test_a_worker_sees_its_gpu_alone(monkeypatch, visible, device, expected):
    """A worker of cuda:N sees that one of the allowed GPUs, and no other."""
    from featcli.workers.processes import as_the_only_one

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert as_the_only_one(device) == expected


def test_every_gpu_there_is(monkeypatch):
    """cuda:all names every GPU, and auto gives each process of a machine one of its own."""
    import torch

    from featcli.system.device import device_names, resolve_device

    with pytest.raises(MachineError, match="--device cuda"):
        device_names("cuda:all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert device_names("cuda:all") == ("cuda:0", "cuda:1", "cuda:2")
    assert [str(resolve_device("auto", rank).value) for rank in (None, 0, 2, 4)] == [
        "cuda:0",
        "cuda:0",
        "cuda:2",
        "cuda:1",
    ]


def test_errors_travel():
    """An error that goes from one process to another keeps its type, message and hint."""
    import pickle

    error = pickle.loads(pickle.dumps(MachineError("no space", "free some")))
    assert (type(error), error.message, error.hint) == (MachineError, "no space", "free some")
