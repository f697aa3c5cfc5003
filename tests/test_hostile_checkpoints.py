"""Check checkpoints that are broken, wrong or harmful: exit code 6 (2 for names), one line, one hint, little memory.

Every file is built here. The harmful ones do as little harm as possible while they still show what they would do.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save

from conftest import SAMPLES, little_memory

TENSORS = {
    name: tensor.contiguous() for name, tensor in timm.create_model("test_resnet", num_classes=0).state_dict().items()
}


class Harm:
    """A call that a pickle holds, and that is made when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickled(content):
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def old_pickle(content):
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def header(text, length=None, body=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def bomb():
    """Return a third of a megabyte that unpacks to 300 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(300_000_000))
    return out.getvalue()


def changed(**changes):
    return save({**TENSORS, **changes})


def without(*names):
    return save({name: tensor for name, tensor in TENSORS.items() if name not in names})


WHOLE = save(TENSORS)
FIRST = "conv1.weight" if "conv1.weight" in TENSORS else next(iter(TENSORS))
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
FILES = {  # name -> (content, what the message says)
    "code.pth": (lambda marker: pickled({"state_dict": Harm(marker)}), "could run code"),
    "old_code.pt": (lambda marker: old_pickle({"x": Harm(marker)}), "could run code"),
    "code.bin": (lambda marker: pickle.dumps(Harm(marker)), "could run code"),
    "cut.pth": (lambda _: pickled(TENSORS)[:-1000], "not a readable weights file"),
    "garbage.pt": (lambda _: bytes(range(1, 256)) * 20, "not a readable weights file"),
    "empty.pt": (lambda _: b"", "not a readable weights file"),
    "bomb.pt": (lambda _: bomb(), "a compressed archive"),
    "list.pt": (lambda _: pickled([1, 2]), "not a readable weights file"),
    "nothing.pt": (lambda _: pickled({}), "it is empty, so it holds no weights"),
    "numbers.pt": (lambda _: pickled({"epoch": 3}), "it holds no weights, only epoch"),
    "cut.safetensors": (lambda _: WHOLE[:-1000], "not a readable weights file"),
    "empty.safetensors": (lambda _: b"", "not a readable weights file"),
    "endless.safetensors": (lambda _: header(b"{}", 2**62), "not a readable weights file"),
    "long.safetensors": (lambda _: header(b"{}", 200_000_000), "not a readable weights file"),
    "json.safetensors": (lambda _: header(b"{nonsense"), "not a readable weights file"),
    "overflow.safetensors": (
        lambda _: header({"x": ENTRY | {"shape": [2**62, 2**62]}}, body=bytes(16)),
        "not a readable weights file",
    ),
    "overlap.safetensors": (lambda _: header({"x": ENTRY, "y": ENTRY}, body=bytes(16)), "not a readable weights file"),
    "missing.safetensors": (lambda _: without(FIRST), f"first {FIRST}"),
    "other_model.safetensors": (lambda _: save({"a.b": torch.zeros(3)}), "it lacks"),
    "shape.safetensors": (lambda _: changed(**{FIRST: torch.zeros(7, 3, 3, 3)}), FIRST),
    "nan.safetensors": (
        lambda _: changed(**{FIRST: TENSORS[FIRST] * torch.nan}),
        "1 of its weights are NaN or infinite",
    ),
    "pointer.safetensors": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs"),
    "page.bin": (lambda _: b"<!DOCTYPE html><html></html>", "a web page"),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_files(tmp_path, cli, name):
    """Each file is refused with exit code 6, its path and the cause; nothing in it runs, nothing is written."""
    make, message = FILES[name]
    (tmp_path / name).write_bytes(make(tmp_path / "marker"))
    with little_memory(200_000_000):
        run = cli("extract", SAMPLES, "-c", tmp_path / name, "--arch", "test_resnet", "-o", tmp_path / "d", "-q")
    assert run.code == 6, run.err
    assert message in run.err
    assert name in run.err
    assert len(run.err.splitlines()) == 2
    assert "weights_only" not in run.err  # its advice is to run the code nevertheless
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_whole_file(tmp_path, cli):
    """The undamaged file from which the others are made is read."""
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    given = ("-c", tmp_path / "x.safetensors", "--arch", "test_resnet", "-o", tmp_path / "d")
    assert cli("extract", SAMPLES, *given).code == 0


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), 6, "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), 6, "config.json"),
        (lambda f: (f / "config.json").unlink(), 6, "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), 6, "no file named"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), 6, "git-lfs"),
        (lambda f: (f / "model.safetensors").write_bytes(bomb()), 6, "archive"),
        (lambda f: _config(f, model_type="nobody_knows"), 6, "nobody_knows"),
        (lambda f: _config(f, auto_map={"AutoModel": "code.Model"}, model_type="own"), 6, "own"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), 6, "preprocessor_config.json"),
    ],
    ids=[
        "bad JSON",
        "no object",
        "no config",
        "no weights",
        "pointer",
        "bomb",
        "unknown type",
        "own code",
        "processor",
    ],
)
def test_folders(tmp_path, cli, resnet_folder, change, code, message):
    """A broken transformers folder is refused with the cause, and code that it brings never runs."""
    folder = tmp_path / "model"
    shutil.copytree(resnet_folder, folder)
    (folder / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'marker')!r})")
    change(folder)
    run = cli("extract", SAMPLES, "-c", folder, "-o", tmp_path / "d", "-q")
    assert run.code == code, run.err
    assert message in run.err
    assert len(run.err.splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def _config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("-c resnet999", 2, "did you mean"),
        ("-c resnet50.no_such_tag", 2, "choose a tag of resnet50: "),
        ("-c resnet18 --out-features stage7", 2, "stage"),
        ("-c x.safetensors --arch resnet999", 2, "no such timm architecture"),
        ("-c nobody/knows-this", 6, "not on this machine"),
        ("-c hf-hub:nobody/knows-this", 6, "nobody/knows-this"),
        ("-c missing.safetensors --arch resnet18", 2, "no such folder or file"),
    ],
)
def test_names(tmp_path, cli, monkeypatch, arguments, code, message):
    """Names of models, tags, stages and repositories that do not exist end in one line with a way out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    run = cli("extract", SAMPLES, *arguments.split(), "-o", "d", "-q")
    assert run.code == code, run.err
    assert message in run.err
    assert len(run.err.splitlines()) == 2
