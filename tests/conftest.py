"""Define what tests share: drawn pictures, checkpoints on disk, and the command line run in this process."""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads of torch that wait leave the cores to other tests
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers already share the cores

from featcli.backbones.torchvision_operators import declare_missing_operators
from featcli.cli.boundary import main
from featcli.dump.checksummed_json import publish_checksummed, read_checksummed

declare_missing_operators()  # comes before a test imports timm or transformers as its reference
gc.set_threshold(10_000, 20, 20)  # torch and the tests make many objects, and to look at all of them takes long

IS_THERE, VISIBLE = torch.cuda.is_available, os.environ.get("CUDA_VISIBLE_DEVICES")
GPUS = torch.cuda.device_count() if IS_THERE() else 0  # of this machine; CUDA reads the variable here, and never again

REPOSITORY = Path(__file__).parent.parent
SAMPLES = REPOSITORY / "sample_images"


@pytest.fixture(scope="session", autouse=True)
def hidden_gpus():
    """Hide the GPUs of this machine from tests and the processes that they start: what they expect is of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def gpus(monkeypatch):
    """Show the GPUs to a test, and to the processes that it starts by itself; those of `forks` see none."""
    monkeypatch.setattr(torch.cuda, "is_available", IS_THERE)
    if VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


@dataclass
class Run:
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict]:
        """The JSON lines on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def cli(capfd):
    """Run featcli in this process, through the same `main` as the console script."""

    def run(*arguments: object) -> Run:
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main([str(a) for a in arguments])
        finally:
            gc.unfreeze()  # what a command freezes until its process ends
        out, err = capfd.readouterr()
        return Run(ended.value.code, out, err)

    return run


@cache
def forks(**environment: str) -> Path:
    """Return the folder of a `featcli` that need not import torch again. It works until these tests are over.

    `environment` holds variables that libraries read when they are imported.
    """
    folder = mkdtemp(prefix="fc")  # short, because sockets have short names
    command = [sys.executable, Path(__file__).with_name("forked_featcli.py"), f"{folder}/socket", folder]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as most have it
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env={**buffered, **environment}, **pipes)
    assert server.stdout.readline() == "ready\n"
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.communicate)
    return Path(folder)


class Featcli(subprocess.Popen):
    """featcli in a process and a session of its own. Its process number is `featcli`, and signals go to it."""

    def __init__(self, *arguments: object, env=os.environ, stderr=subprocess.PIPE, **options):
        told, tells = os.pipe()
        super().__init__(
            [forks() / "featcli", *map(str, arguments)],
            **{"stdout": subprocess.PIPE, "stderr": stderr, "text": True, **options},
            env={**env, "FEATCLI_TELLS": str(tells)},
            pass_fds=(tells,),
        )
        os.close(tells)
        self.featcli = int(os.read(told, 100))
        os.close(told)
        atexit.register(self.end)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.featcli, number)

    def end(self) -> None:
        """End it after a test that failed, because nobody else would."""
        if self.poll() is None:
            os.killpg(self.featcli, signal.SIGKILL)


@contextmanager
def little_memory(most: int):
    """Fail if the block ever takes more than so many bytes beyond what the process has."""
    status, peak = Path("/proc/self/status"), re.compile(r"VmHWM:\s+(\d+) kB")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest value so far
    before = int(peak.search(status.read_text())[1])
    yield
    assert (int(peak.search(status.read_text())[1]) - before) * 1024 < most


def draw(path: Path, seed: int, size: tuple[int, int] = (96, 80)) -> Path:
    """Draw a smooth coloured picture, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def with_columns(path: Path, columns: dict[str, tuple[str, list]]) -> None:
    """Give a dump columns, by name, each with its kind and its cells."""
    rows = zip(*(cells for _, cells in columns.values()), strict=True)
    lines = b"".join(json.dumps(dict(zip(columns, row, strict=True))).encode() + b"\n" for row in rows)
    (path / "columns.jsonl").write_bytes(lines)
    plan = read_checksummed(path / "plan.json")
    kinds = {name: kind for name, (kind, _) in columns.items()}
    plan["columns"] = {"digest": xxhash.xxh3_128(lines).hexdigest(), "kinds": kinds}
    publish_checksummed(path / "plan.json", plan, replace=True)


@pytest.fixture
def photos(tmp_path):
    """Make a folder with twelve pictures, some of them in a folder below."""
    for i in range(12):
        draw(tmp_path / "photos" / ("trip" if i % 3 == 0 else "") / f"{i:02d}.{'png' if i % 2 else 'jpg'}", i)
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def swin_folder(tmp_path_factory):
    """Save a small Swin of transformers, and a ViT image processor for 224x224 pixels."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "swin"
    config = transformers.SwinConfig(embed_dim=24, depths=[2, 1, 1, 1])
    transformers.SwinForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def resnet_folder(tmp_path_factory):
    """Save a small ResNet of transformers with bottlenecks, as ResNet-50 has, and its own kind of image processor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("checkpoints") / "resnet"
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 64, 128], depths=[2, 2, 1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory):
    """Save a small DINOv2: tokens, a class token, and a processor that crops."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("checkpoints") / "dinov2"
    config = transformers.Dinov2Config(num_hidden_layers=3, hidden_size=48, num_attention_heads=4, image_size=70)
    transformers.Dinov2Model(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 80}, "crop_size": {"height": 70, "width": 70}}
    transformers.BitImageProcessor(**sizes).save_pretrained(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def upright(path: Path) -> Image.Image:
    """Return the picture as a person sees it, by Pillow alone."""
    from PIL import ImageOps

    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


MANY_SHARDS = "-c test_resnet --random-init --out-indices 1,-1 --image-size 32".split()
MANY_SHARDS += "--threads 1 --batch-size 1 --shard-size 1".split()
SHARDS = 48


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """Make a picture for each of many shards; one is broken."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(SHARDS):
        draw(folder / f"{i:02d}.png", i, (32, 32))
    (folder / "33.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="session")
def whole(many, tmp_path_factory):
    """Make the dump of those pictures in one process."""
    target = tmp_path_factory.mktemp("whole") / "d"
    with pytest.raises(SystemExit) as ended:
        main(["extract", str(many), *MANY_SHARDS, "-o", str(target), "-q"])
    assert ended.value.code == 3
    return target


def content(dump: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a dump."""
    return {str(path.relative_to(dump)): path.read_bytes() for path in dump.rglob("*") if path.is_file()}


def hooked(**variables: object) -> dict[str, str]:
    """Return the environment in which workers have those hooks."""
    hooks = Path(__file__).parent / "worker_hooks"
    path = os.pathsep.join([str(hooks), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}


def finished(*arguments: object, **options) -> tuple[int, str]:
    """Return the exit code of a process, and what it said on stderr."""
    run = Featcli(*arguments, **options)
    err = run.communicate()[1]
    return run.returncode, err


def at_work(*arguments: object, shards: int = 10, **options) -> Featcli:
    """Return a process that has committed so many shards and continues."""
    run = Featcli(*arguments, **options)
    for line in run.stderr:
        shards -= "committed" in line
        if not shards:
            return run
    raise AssertionError(run.wait())
