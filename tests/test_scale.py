"""Run the files of examples/scale as far as a machine without a cluster allows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MANY_SHARDS, REPOSITORY, content, forks
from featcli.errors import EXIT_CODES

SCALE = REPOSITORY / "examples" / "scale"
OPTIONS = " ".join(MANY_SHARDS[2:])


def script(name, *arguments, **variables):
    path = os.pathsep.join([str(forks()), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CHECKPOINT": "test_resnet", "OPTIONS": OPTIONS, **variables}
    return subprocess.Popen(["bash", SCALE / name, *map(str, arguments)], env=environment, stderr=subprocess.PIPE)


def test_a_slurm_array(many, whole, tmp_path):
    """Each task of the array makes its part, failed images fail no task, and the parts make the dump."""
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    tasks = [
        script("slurm.sh", many, tmp_path / "d", SLURM_ARRAY_TASK_ID=str(i), FEATCLI_PARTS="2", **array)
        for i in range(2)
    ]
    said = [task.communicate()[1].decode() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert content(tmp_path / "d") == content(whole)


@pytest.mark.long
def test_torchrun(many, whole, tmp_path):
    """torchrun starts a part for each process, and no process ends because another has failed images."""
    run = script("torchrun.sh", many, tmp_path / "d", "--nproc-per-node", "2")
    said = run.communicate()[1].decode()
    assert run.returncode == 0, said
    assert "(auto: torchrun)" in said
    assert content(tmp_path / "d") == content(whole)


def test_the_kubernetes_job(many, tmp_path):
    """The job names the number of parts wherever it must, and its command is one that featcli understands."""
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((SCALE / "kubernetes.yaml").read_text())["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "FEATCLI_PARTS", "value": str(spec["completions"])}]
    given_up = next(rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
    shell, option = container["command"]
    text = container["args"][0].replace("/photos", str(many)).replace("/dumps/feats", str(tmp_path / "d"))
    text = text.replace("-c resnet50", " ".join(MANY_SHARDS))
    path = f"{forks()}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FEATCLI_PARTS": "16", "JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run([shell, option, text], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # 33.png, which is broken, is in this part
    assert "part           1/16: 3 shards of 48  (auto: Kubernetes indexed job)" in done.stderr
    for code in (0, 2, 3, 6, 7):
        ended = subprocess.run([shell, option, f"featcli() {{ return {code}; }}; {container['args'][0]}"], check=False)
        assert ended.returncode == (0 if code == 3 else code)
    assert given_up["operator"] == "NotIn"
    again = {number for code in EXIT_CODES if code.again.startswith(("yes", "only")) for number in code.codes}
    assert {*given_up["values"]} == again - {8} | {137}  # extract never ends with these, and 137 is a kill
