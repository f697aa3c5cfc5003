"""Workers of a Ray cluster. Each test starts a Ray of its own, and ends it; another on the machine is left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MANY_SHARDS, SHARDS, at_work, content, finished, hooked

pytest.importorskip("ray")

QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
RAY = ["--engine", "ray"]


@pytest.fixture
def cluster(tmp_path):
    """A cluster of two nodes, whose workers wait at image 20 for a file "go": its address, and how to kill a node."""
    script = Path(__file__).with_name("ray_cluster.py")
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=hooked(**QUIET, WAITS_AT="20.png", WAITS_FOR=tmp_path / "go"),
    )
    address = process.stdout.readline().strip()

    def kill():
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline() == "killed\n"

    yield address, kill
    process.communicate(timeout=60)


def test_a_death_a_part_and_an_interruption(cli, many, whole, tmp_path):
    """A Ray of which a worker dies, a part beside it, Ctrl-C, another run: the very files that one process makes."""
    command = ["extract", many, *MANY_SHARDS, "-o", tmp_path / "d"]
    waits = {"WAITS_AT": "40.png", "WAITS_FOR": tmp_path / "go"}
    environment = hooked(**QUIET, DIES_AT="20.png", DIES_ONCE=tmp_path / "died", **waits)
    run = at_work(*command, *RAY, "--workers", "2", "-v", shards=39, env=environment)  # 20 comes after all others
    assert cli(*command, "--part", "1/3").code == 0
    run.send_signal(signal.SIGINT)
    err = run.communicate()[1]
    assert run.returncode == 130, err
    assert (tmp_path / "died").exists()
    assert "Traceback" not in err
    assert not (tmp_path / "d" / "manifest.json").exists()
    assert cli(*command).code == 3
    assert content(tmp_path / "d") == content(whole)


def test_a_poisonous_shard_with_ray(cli, many, whole, tmp_path):
    """A shard that kills every worker is given up and named; all others are there, and a later run completes it."""
    command = ["extract", many, *MANY_SHARDS, "-o", tmp_path / "d"]
    here = ["extract", os.path.relpath(many, tmp_path), *MANY_SHARDS, "-o", "d"]  # workers are in other folders
    environment = hooked(**QUIET, DIES_AT="20.png")
    code, err = finished(*here, *RAY, "--workers", "2", env=environment, cwd=tmp_path)
    assert code == 1, err
    assert "engine         ray, 2 workers of 1 CPUs" in err
    assert "featcli: error: shard 20: given up after 3 workers died at it, the last one lost" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "d" / "shards").glob("*.json"))) == SHARDS - 1
    assert cli(*command).code == 3
    assert content(tmp_path / "d") == content(whole)


def test_a_node_is_killed(cluster, many, whole, tmp_path):
    """Where a node of a cluster goes, its shards are made elsewhere, to the same bytes."""
    address, kill = cluster
    command = ["extract", many, *MANY_SHARDS, "-o", tmp_path / "d", *RAY, "--ray-address", address, "-v"]
    run = at_work(*command, shards=20, env={**os.environ, **QUIET})
    kill()
    assert any("warning: a worker died" in line for line in run.stderr)
    (tmp_path / "go").touch()
    err = run.communicate()[1]
    assert run.returncode == 3, err
    assert content(tmp_path / "d") == content(whole)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--ray-address", "127.0.0.1:1"], 7),  # nobody there
        (["--ray-address", "ray://127.0.0.1:10001"], 2),
        (["--ray-address", "nowhere"], 2),
        (["--workers", "0"], 2),
        (["--cpus-per-worker", "-1"], 2),
        (["--device", "cpu,cpu"], 2),
    ],
)
def test_what_cannot_be(cli, many, tmp_path, options, code):
    """An address where there is no cluster, and what makes no sense, are said before anything is written."""
    run = cli("extract", many, *MANY_SHARDS, "-o", tmp_path / "d", *RAY, *options)
    assert run.code == code
    assert f"featcli: error: {options[0]}" in run.err
    assert not (tmp_path / "d").exists()
