"""Check processes that decode beside the one that computes: the same rows, and an end in any case."""

import errno
import os
import tarfile
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from stand_in_pixels import DEADLY, DEADLY_ONCE, FAULTY, OwnNumber

from conftest import draw, tree
from featcli import extract
from featcli.errors import MachineError, UsageError
from featcli.inputs.image_list import Image as Input
from featcli.inputs.listing import find
from featcli.pixels import decode_processes
from featcli.pixels.batches import SizedImages, read
from featcli.pixels.decoder import Decoder
from featcli.pixels.sizes import Sizes
from featcli.run import loading
from featcli.run.loading import MANY_IMAGES, decode_processes_of
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import InputSpec, PixelSpec

OPTIONS = {"random_init": True, "batch_size": 3, "shard_size": 6, "threads": 1, "decode_threads": 2}


def batches(images, count=1, stops=(4, 8, 10)):
    """Have images decoded by processes, in batches that end at these rows."""
    decoder = Decoder(PixelSpec(), OwnNumber(), threads=2, processes=count)
    sized = SizedImages(images, Sizes((4, 4)))
    return closing(read(decoder, ((sized, range(*rows)) for rows in pairwise((0, *stops)))))


def listed(folder, **options):
    return find(InputSpec((str(folder),), **options)).images


def children():
    """Return the processes that this one has started and that have not ended."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found += Path(f"/proc/self/task/{thread}/children").read_text().split()
    return {int(one) for one in found}


@pytest.fixture
def pictures(tmp_path):
    """Draw ten pictures; the third is broken."""
    for i in range(10):
        draw(tmp_path / "p" / f"{i}.png", i, (12, 12))
    (tmp_path / "p" / "2.png").write_bytes(b"no picture")
    return tmp_path / "p"


@pytest.mark.parametrize("library", ["timm", pytest.param("transformers", marks=pytest.mark.long)])
def test_the_same_dump(library, tmp_path, request):
    """Files, files in a tar and broken ones become the very rows that threads make of them, each of its own size."""
    for i in range(7):
        draw(tmp_path / "in" / "p" / f"{i}.{'png' if i % 2 else 'jpg'}", i, (64 + 32 * (i % 3), 64))
    (tmp_path / "in" / "p" / "3.png").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "in" / "t.tar", "w") as tar:
        tar.add(tmp_path / "in" / "p" / "5.png", "a.png")
    options = {**OPTIONS, "checkpoint": "test_resnet", "fit": "native"}
    if library == "transformers":
        options |= {"checkpoint": request.getfixturevalue("swin_folder"), "random_init": False, "fit": None}
    inputs = [tmp_path / "in" / "p", tmp_path / "in" / "t.tar"]
    for count in (0, 2):
        assert extract(inputs, output=tmp_path / f"{count}", decode_processes=count, **options).failed == 1
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


def test_each_process_has_a_part(pictures):
    """A batch is shared out among the processes in the order of its rows, and so are batches of one image."""
    rows, makers = [], []
    with batches(listed(pictures), count=2, stops=(4, 8, 9, 10)) as found:
        for batch in found:
            rows.append([*batch.rows])
            makers.append(batch.pixels[:, 0, 0, 0].tolist())
            assert [one.row for one in batch.failures] == [row for row in batch.rows if row == 2]
            assert {*makers[-1]} <= {0, *children()}
    first, second = makers[1][0], makers[1][-1]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8], [9]]
    assert makers == [[second, second, 0, first], [first, first, second, second], [second], [first]]
    assert len({first, second, os.getpid()} - children()) == 3  # none is left


def test_what_stays_in_this_process(pictures):
    """Pictures in memory and behind URLs are decoded by threads of this process, whose file systems others may lack."""
    for i in range(3):
        fsspec.filesystem("memory").pipe(f"/beside/{i}.png", (pictures / f"{i + 3}.png").read_bytes())
    in_memory = [Input("0", "", 432, picture=np.zeros((12, 12, 3), np.uint8))]
    for images in (listed("memory://beside"), in_memory):
        with batches(images, stops=(len(images),)) as found:
            assert {int(number) for batch in found for number in batch.pixels.unique()} == {os.getpid()}


def test_a_death(pictures, tmp_path, monkeypatch):
    """If a process dies, another one makes the same rows in its place, and those that were asked for behind them."""
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    Image.new("RGB", (DEADLY_ONCE, 8)).save(pictures / "1.png")
    with batches(listed(pictures)) as found:
        made = [
            [row for row, maker in zip(batch.rows, batch.pixels[:, 0, 0, 0], strict=True) if maker] for batch in found
        ]
    assert (tmp_path / "died").exists()
    assert made == [[0, 1, 3], [4, 5, 6, 7], [8, 9]]


def test_memory_that_cannot_be_shared(pictures, monkeypatch):
    """If this process cannot map the memory of another one, the run ends, and nobody waits for ever."""

    def array(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(decode_processes.Part, "array", array)
    with pytest.raises(MachineError, match="pixels cannot be shared"), batches(listed(pictures)) as found:
        next(iter(found))


DIES = r"a process that decodes died 3 times at image '\d\.png' or one of \d behind it: killed by SIGKILL"


@pytest.mark.parametrize(("width", "message"), [(DEADLY, DIES), (FAULTY, "the machine cannot")])
def test_what_ends_a_run(pictures, tmp_path, monkeypatch, width, message):
    """A picture at which processes die ends the run in one line, as the machine's fault does. No process is left."""
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    Image.new("RGB", (width, 8)).save(pictures / "6.png")
    before = children()
    with pytest.raises(MachineError, match=message) as raised, batches(listed(pictures)) as found:
        for batch in found:
            assert batch.rows.start == 0
    assert width == FAULTY or "--decode-processes 0" in raised.value.hint
    assert children() <= before


@pytest.mark.parametrize(
    ("asked", "threads", "device", "images", "expected"),
    [
        ("auto", 16, "cuda", MANY_IMAGES, 2),
        ("auto", 17, "cuda", MANY_IMAGES, 3),
        ("auto", 8, "cuda", MANY_IMAGES, 0),
        ("auto", 16, "cuda", MANY_IMAGES - 1, 0),
        ("auto", 16, "cpu", MANY_IMAGES, 0),
        (0, 16, "cuda", MANY_IMAGES, 0),
        (3, 4, "cpu", 1, 3),
        (3, 2, "cpu", 1, 2),
    ],
)
def test_how_many(asked, threads, device, images, expected, monkeypatch):
    """Only on a GPU, for many images and more threads than one interpreter feeds, there are processes by themselves."""
    spec = ExtractSpec(("x",), checkpoint="c", output="o", decode_processes=asked)
    assert decode_processes_of(spec, threads, torch.device(device), images) == expected
    monkeypatch.setattr(loading, "CAN_SHARE", False)
    if asked == "auto":
        assert decode_processes_of(spec, threads, torch.device(device), images) == 0
    elif asked:
        with pytest.raises(UsageError, match="--decode-processes"):
            decode_processes_of(spec, threads, torch.device(device), images)
