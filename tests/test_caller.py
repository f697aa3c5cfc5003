"""Check that the process that calls featcli is left as it was, whatever is called and however it ends."""

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageFile, PngImagePlugin
from transformers.utils import logging as of_transformers

import featcli
from conftest import draw
from featcli.dump.verify import verify
from featcli.errors import FeatcliError
from featcli.export.export import export
from featcli.spec.commands import ExportCommand
from featcli.system.device import settled_arithmetic

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "batch_size": 2, "shard_size": 2}
OPTIONS |= {"threads": 2}  # the fixtures change torch's own number, which changes the last bits
OPTIONS |= {"layout": "channels-first", "fold": False}  # no trial chooses by timing
PRECISIONS = [(torch.backends, ""), (torch.backends.cudnn, "cudnn"), (torch.backends.cuda.matmul, "cuda.matmul")]
PRECISIONS += [(torch.backends.cudnn.conv, "conv"), (torch.backends.cudnn.rnn, "rnn")]
PRECISIONS += [(getattr(torch.backends.mkldnn, kind), f"mkldnn.{kind}") for kind in ("matmul", "conv", "rnn")]


def said(function):
    """Return what a function of torch's older interface says, which raises if the newer one disagrees."""
    try:
        return function()
    except RuntimeError:
        return RuntimeError


def state():
    """Return what a program may have set in its process, by name."""
    loggers = ("", "PIL", "timm", "transformers", "huggingface_hub", "torch", "h5py")
    return {
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "random": random.getstate(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS),
        "png": (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "loggers": [(name, logging.getLogger(name).level, logging.getLogger(name).disabled) for name in loggers],
        "transformers": (of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()),
        "precisions": {name: place.fp32_precision for place, name in PRECISIONS},
        "matmul": said(torch.get_float32_matmul_precision),
        "cublas": said(lambda: torch.backends.cuda.matmul.allow_tf32),
        "cudnn": (said(lambda: torch.backends.cudnn.allow_tf32), torch.backends.cudnn.benchmark),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "load": torch.nn.Module.load_state_dict,
        "environment": dict(os.environ),
        "hub": constants.HF_HUB_OFFLINE,
        "path": list(sys.path),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
    }  # fmt: skip


@pytest.fixture
def settings(monkeypatch):
    """Make settings that no program has by default."""
    before = torch.get_num_threads()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    logging.getLogger("timm").setLevel(logging.INFO)
    verbosity = of_transformers.get_verbosity()
    of_transformers.set_verbosity(of_transformers.INFO)
    of_transformers.set_verbosity(verbosity)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="PIL")
        yield
    logging.getLogger("timm").setLevel(logging.NOTSET)
    torch.set_num_threads(before)
    torch.set_default_dtype(torch.float32)
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a folder with pictures, one of them broken, and a dump of them."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(5):
        draw(folder / "p" / f"{i}.png", i, (40, 36))
    (folder / "p" / "3.png").write_bytes((folder / "p" / "3.png").read_bytes()[:900])
    featcli.extract(folder / "p", output=folder / "d", **OPTIONS)
    return folder


PIXELS = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


def interrupted(kind, **_):
    if kind == "batch":
        raise KeyboardInterrupt


def extract(made, own, **options):
    return featcli.extract(made / "p", output=own / "d", **{**OPTIONS, **options})


def export_dump(made, own):
    export(featcli.open_dump(made / "d"), ExportCommand(dump=str(made / "d"), output=str(own / "x.npy")))


CALLS = {  # calls that get this folder and one for their own files
    "extract": extract,
    "native": lambda made, own: extract(made, own, fit="native", image_size=None),
    "resume": lambda made, own: extract(made, made),
    "load_backbone": lambda made, own: featcli.load_backbone("test_resnet", random_init=True),
    "forward": lambda made, own: featcli.load_backbone("test_resnet", random_init=True, image_size=32).forward(PIXELS),
    "read": lambda made, own: featcli.open_dump(made / "d")["stage4"][:],
    "verify": lambda made, own: verify(made / "d"),
    "export": export_dump,
}
RAISING = {
    "no images": lambda made, own: featcli.extract(own, output=own / "d", **OPTIONS),
    "another plan": lambda made, own: extract(made, made, image_size=64),
    "no checkpoint": lambda made, own: extract(made, own, checkpoint="no_such_model"),
    "no weights": lambda made, own: featcli.load_backbone("resnet18"),
    "interrupted": lambda made, own: extract(made, own, report=interrupted),
    "no dump": lambda made, own: featcli.open_dump(own / "nothing"),
}


@pytest.mark.parametrize("name", [*CALLS, *RAISING])
def test_a_call_leaves_no_trace(tmp_path, made, settings, name):
    """A call leaves random state, environment, signals, and settings of Pillow, torch, loggers and warnings alone."""
    before = state()
    if name in CALLS:
        CALLS[name](made, tmp_path)
    else:
        with pytest.raises((FeatcliError, KeyboardInterrupt)):
            RAISING[name](made, tmp_path)
    after = state()
    assert {part for part in before if before[part] != after[part]} == set()


def test_two_calls_at_once(tmp_path, made, settings):
    """If two runs overlap in two threads, the settings from before the first are back after the last."""
    before, rows = state(), {}
    inside, go_on = threading.Event(), threading.Event()

    def waiting(kind, **_):
        if kind == "batch":
            inside.set()
            go_on.wait(60)

    def run(name, report):
        featcli.extract(made / "p", output=tmp_path / name, report=report, **OPTIONS)
        rows[name] = featcli.open_dump(tmp_path / name)["stage4"][:]

    first = threading.Thread(target=run, args=("first", waiting))
    first.start()
    inside.wait(60)
    run("second", lambda kind, **_: None)
    go_on.set()
    first.join()
    assert {part for part, value in state().items() if value != before[part]} == set()
    expected = featcli.open_dump(made / "d")["stage4"][:]
    for name in ("first", "second"):
        assert np.array_equal(rows[name], expected, equal_nan=True)


def test_the_callers_settings_change_no_number(tmp_path, made, settings):
    """The caller's precision, default dtype, autocast, truncated pictures and strict warnings change no row."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = extract(made, tmp_path)
    assert outcome.failed == 1
    found, expected = featcli.open_dump(tmp_path / "d"), featcli.open_dump(made / "d")
    assert np.array_equal(found["stage4"][:], expected["stage4"][:], equal_nan=True)
    assert found.plan.fingerprint == expected.plan.fingerprint


def test_exact_arithmetic_under_any_settings():
    """Whatever either interface of torch has set, fp32 means fp32 inside, and all settings are back afterwards."""
    chance = random.Random(0)
    places = {name: place for place, name in PRECISIONS}

    def set_something():
        kind = chance.choice(("matmul", "cudnn", *places))
        if kind == "matmul":
            torch.set_float32_matmul_precision(chance.choice(("highest", "high", "medium")))
        elif kind == "cudnn":
            torch.backends.cudnn.allow_tf32 = chance.random() < 0.5
        else:
            words = ("none", "ieee", "tf32", *(["bf16"] if kind.startswith("mkldnn") else []))
            places[kind].fp32_precision = chance.choice(words)

    def precisions():
        kinds = ("matmul", "cublas", "cudnn", "precisions")
        return {kind: value for kind, value in state().items() if kind in kinds}

    def reactions():
        """Return each setting, and each again after a change of those above it, which shows what is inherited."""
        found, above = [precisions()], torch.backends.fp32_precision
        for word in ("ieee", "tf32", "none"):
            torch.backends.fp32_precision = word
            found.append(precisions())
        torch.backends.fp32_precision = above
        return found

    try:
        for _ in range(200):
            set_something()
            before = reactions()
            with settled_arithmetic(torch.get_num_threads(), torch.device("cpu")):
                assert {place.fp32_precision for place in places.values()} == {"ieee"}
                assert torch.get_float32_matmul_precision() == "highest"
            assert reactions() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for place in places.values():
            place.fp32_precision = "none"
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
