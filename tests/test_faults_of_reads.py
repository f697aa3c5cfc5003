"""Check that a fault of the machine is never an image's, nor a dump's: a failing disk ends a run with exit code 7."""

import errno
import os
import shutil
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import timm
import torch
from PIL import Image as Pillow
from safetensors.torch import save_file
from timm.models import save_for_hf

from conftest import draw, tree
from featcli import extract, load_backbone, open_dump
from featcli.dump import folder as folder_of_dump
from featcli.dump.folder import Dump
from featcli.dump.verify import Damage, Verdict, repair, verify
from featcli.errors import MachineError, UsageError
from featcli.inputs.image_list import MISSING
from featcli.inputs.listing import find
from featcli.inputs.storage import Ground, Storage
from featcli.pixels.decode import read_pixels, read_size
from featcli.pixels.failure import UnreadableError
from featcli.spec.groups import InputSpec, PixelSpec


@pytest.fixture
def fails(monkeypatch):
    """Make a call of `os` fail for paths below a folder, or for their descriptors. The returned function mends it.

    It works `first` times before it fails, and fails for the last time at call `last`.
    """

    def fail(call, number, below, first=0, last=10**9):
        real, count = getattr(os, call), 0

        def failing(what, *rest, **options):
            nonlocal count
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
            if (path + "/").startswith(str(below)):
                count += 1
                if first < count <= last:
                    raise OSError(number, os.strerror(number))
            return real(what, *rest, **options)

        monkeypatch.setattr(os, call, failing)
        return lambda: monkeypatch.setattr(os, call, real)

    return fail


@pytest.fixture
def folder(tmp_path):
    """Make pictures of four kinds, one of which libtiff would map."""
    for i, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        draw(tmp_path / "p" / name, i)
    with Pillow.open(draw(tmp_path / "d.png", 3)) as picture:
        picture.save(tmp_path / "p" / "d.tif", compression="tiff_lzw")
    return tmp_path / "p"


def listed(*inputs, **options):
    return find(InputSpec(inputs=tuple(map(str, inputs)), **options)).images


def decoded(image):
    out = np.zeros((3, 8, 8), np.uint8)
    read_pixels(image, PixelSpec(), lambda picture: np.asarray(picture.resize((8, 8))).transpose(2, 0, 1), out)


def header(image):
    read_size(image, PixelSpec())


def outcome(image, read=decoded):
    """Return `read`, `machine`, or the reason of a failure."""
    try:
        read(image)
    except UnreadableError as error:
        return error.reason
    except MachineError:
        return "machine"
    return "read"


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ENXIO", "ENODEV", "ENOMEM", "EMFILE"])
def test_no_image_is_blamed_for_its_storage(folder, fails, name):
    """Whatever call fails, for any kind of picture, read whole or for its header, the machine is at fault."""
    images, number = listed(folder), getattr(errno, name)
    for call, read in (("open", decoded), ("open", header), ("fstat", decoded), ("pread", decoded), ("preadv", header)):
        mend = fails(call, number, folder)
        assert {outcome(image, read) for image in images} == {"machine"}, (call, read)
        mend()
        assert {outcome(image, read) for image in images} == {"read"}


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_what_a_decoder_makes_of_an_error_does_not_matter(folder, fails, monkeypatch, name):
    """An error at any read of a large file is the machine's, whatever its decoder makes of it, and never damage."""
    from featcli.pixels import image_file

    monkeypatch.setattr(image_file, "WHOLE_BYTES", 100)
    for image in listed(folder):
        outcomes = []
        while outcomes[-1:] != ["read"]:
            mend = [fails(call, getattr(errno, name), folder, len(outcomes)) for call in ("preadv", "pread")]
            outcomes.append(outcome(image))
            for one in mend:
                one()
        assert set(outcomes[:-1]) == {"machine"}


def test_a_bad_sector(folder, fails):
    """A file that cannot be read twice is a failure by itself if others of its folder can be read."""
    images = listed(folder)
    mend = fails("pread", errno.EIO, folder / "b.jpg")
    assert [outcome(image) for image in images] == ["read", "unreadable", "read", "read"]
    mend()
    mend = fails("pread", errno.EIO, folder / "b.jpg", last=1)  # a sector that can be read again was not bad
    assert outcome(images[1]) == "machine"
    mend()
    fails("pread", errno.ESTALE, folder / "b.jpg")  # an error that no disk gives
    assert outcome(images[1]) == "machine"


def test_a_bad_sector_in_a_tar(tmp_path, folder, monkeypatch):
    """An image whose bytes in a tar are lost is a failure by itself if the tar's first header can be read."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, "p")
    image = listed(tmp_path / "x.tar")[2]
    real = os.pread

    def pread(descriptor, count, offset):
        if offset == image.place or (offset == 0 and is_all):
            raise OSError(errno.EIO, "lost")
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    for is_all in (False, True):
        assert outcome(image) == ("machine" if is_all else "unreadable")


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_listing_fails_as_the_machine_does(tmp_path, folder, fails, call):
    """A folder that the machine cannot list is an error of the machine, and no folder without images."""
    (tmp_path / "list").write_text("a.png\nb.jpg\n")
    fails(call, errno.ESTALE, folder)
    with pytest.raises(MachineError):
        listed(folder)
    if call == "stat":
        with pytest.raises(MachineError):
            listed(files_from=str(tmp_path / "list"), root=str(folder))
        with pytest.raises(MachineError):
            listed(folder / "a.png")


def test_a_folder_that_may_not_be_listed(folder, fails):
    """A folder that the user may not list is a usage error."""
    fails("scandir", errno.EACCES, folder)
    with pytest.raises(UsageError, match="Permission denied"):
        listed(folder)


def test_a_folder_that_may_not_be_entered(folder, fails):
    """Images in a folder that may not be entered are a usage error; links to such a place are failures."""
    storage = Storage(str(folder))
    fails("stat", errno.EACCES, folder / "a.png")
    assert storage.size_of(str(folder / "a.png")) == MISSING  # its name at least can be seen
    fails("lstat", errno.EACCES, folder / "a.png")
    with pytest.raises(UsageError, match="Permission denied"):
        storage.size_of(str(folder / "a.png"))


def test_a_folder_that_closes_while_it_is_read(folder, fails):
    """If the rights of a folder go away, the run ends; if those of a file do, it is a failure."""
    image = listed(folder)[0]
    fails("open", errno.EACCES, image.path)
    assert outcome(image) == "unreadable"
    fails("lstat", errno.EACCES, image.path)
    assert outcome(image) == "machine"


def replaced_by_an_empty_one(folder):
    folder.rename(folder.with_name("gone"))
    folder.mkdir()


def test_a_mount_that_goes_away(tmp_path, folder):
    """If the input folder, a list's root or an image's folder is empty, no image counts as missing."""
    (tmp_path / "list").write_text("a.png\n")
    in_list = listed(files_from=str(tmp_path / "list"), root=str(folder))
    images = [listed(folder)[0], in_list[0], listed(folder / "a.png")[0]]
    (folder / "a.png").rename(tmp_path / "a.png")
    assert [outcome(image) for image in images] == ["not_found"] * 3
    (tmp_path / "a.png").rename(folder / "a.png")
    replaced_by_an_empty_one(folder)
    assert [outcome(image) for image in images] == ["machine"] * 3


def test_another_file_system_that_goes_away(tmp_path, monkeypatch):
    """Images that are links, or listed by whole paths, are no failures if their file system has been unmounted."""
    away = tmp_path / "mnt" / "share"
    draw(away / "deep" / "a.png", 0)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").symlink_to(away / "deep" / "a.png")
    (tmp_path / "list").write_text(str(away / "deep" / "a.png"))

    real = os.stat

    def stat(path, **options):  # as if it were on another device
        found = real(path, **options)
        is_away = os.path.realpath(path).startswith(str(away)) and os.listdir(away)
        return os.stat_result((*found[:2], found.st_dev + 1000 if is_away else found.st_dev, *found[3:]))

    monkeypatch.setattr(os, "stat", stat)
    in_list = listed(files_from=str(tmp_path / "list"), root=str(tmp_path / "p"), allow_outside=True)
    images = listed(tmp_path / "p"), in_list
    assert [[ground.path for ground in one[0].grounds] for one in images] == [[str(tmp_path / "p"), str(away)]] * 2
    (away / "deep").rename(tmp_path / "gone")
    assert [outcome(one[0]) for one in images] == ["machine"] * 2


def test_a_mount_of_another_machine(tmp_path, folder):
    """On another machine, where device numbers differ, an empty input folder counts as gone, too."""
    image = listed(folder)[0]._replace(grounds=(Ground(str(folder), None),))
    assert outcome(image) == "read"
    (folder / "a.png").unlink()
    assert outcome(image) == "not_found"
    replaced_by_an_empty_one(folder)
    assert outcome(image) == "machine"


def test_a_mount_that_goes_away_while_it_is_listed(tmp_path, folder, monkeypatch):
    """A folder that has become another one while it was listed gives no list."""
    real = os.scandir

    def scandir(path):
        found = list(real(path))
        replaced_by_an_empty_one(folder)

        class Entries(list):
            __enter__ = list.__iter__

            def __exit__(self, *_):
                pass

        return Entries(found)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(MachineError, match="it is empty, or not the folder that was listed"):
        listed(folder)


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def dump(request, tmp_path_factory):
    """Make a dump of three shards, which no test changes."""
    folder = tmp_path_factory.mktemp("faults")
    for i in range(3):
        draw(folder / "p" / f"{i}.png", i, (32, 32))
    options = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 1, "shard_size": 1, "pool": "avg"}
    extract(folder / "p", output=folder / "d", format=request.param, **options)
    return folder / "d"


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EACCES"])
@pytest.mark.parametrize("call", ["open", "stat", "fstat", "pread", "preadv", "listdir"])
def test_no_shard_is_damaged_by_what_cannot_be_read(dump, fails, call, name):
    """While a share fails now and then, verification ends with code 7, finds no damage and moves no file."""
    before = tree(dump)
    for first in (0, 3):
        mend = fails(call, getattr(errno, name), dump, first, first + 1)
        with suppress(MachineError) if first else pytest.raises(MachineError, match=os.strerror(getattr(errno, name))):
            assert not verify(dump).damages
        mend()
    damaged = Verdict(str(dump), damages=[Damage(file="shards/00000.json", what="gone", shard=0)])
    mend = fails(call, getattr(errno, name), dump)
    with pytest.raises(MachineError):
        repair(damaged)
    mend()
    assert tree(dump) == before


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "EACCES"])
@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("file", ["plan.json", "images.jsonl", "shards/00000.json", "failures.jsonl", "manifest.json"])
def test_no_file_is_damaged_that_cannot_be_read(dump, fails, file, call, name):
    """Whichever file of a dump the machine cannot read, verification ends with its error, and finds no damage."""
    fails("preadv" if (call, file) == ("pread", "images.jsonl") else call, getattr(errno, name), dump / file)
    with pytest.raises(MachineError, match=os.strerror(getattr(errno, name))):
        verify(dump)


@pytest.mark.parametrize("call", ["listdir", "stat", "open", "pread"])
def test_no_committed_shard_is_forgotten(dump, fails, call):
    """A folder that cannot be listed is not empty, and a shard that cannot be looked at is not gone."""
    assert Dump.at(dump).committed().missing == []
    known = Dump.at(dump)
    fails(call, errno.ESTALE, dump / "shards")
    with pytest.raises(MachineError):
        known.committed()


def test_a_dump_that_goes_away_is_not_damaged(tmp_path, dump, monkeypatch):
    """An empty folder in place of a dump during verification says nothing about its shards."""
    shutil.copytree(dump, tmp_path / "d")
    monkeypatch.setattr(folder_of_dump, "read_record", leaving(tmp_path / "d", folder_of_dump.read_record))
    with pytest.raises(MachineError, match="no longer there"):
        verify(tmp_path / "d")


def leaving(path, call):
    """Return the same function, at whose second call the dump is gone from its folder."""
    calls = []

    def left(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            replaced_by_an_empty_one(path)
            (path / "shards").mkdir()
        return call(*arguments)

    return left


@pytest.mark.parametrize("call", ["open", "fstat", "pread", "preadv"])
def test_a_reader_says_what_the_machine_refused(dump, fails, call):
    """Rows that the machine cannot read raise MachineError, and are no damage."""
    found = open_dump(dump)
    fails(call, errno.ETIMEDOUT, dump / "shards")
    with pytest.raises(MachineError, match="timed out"):
        found[found.plan.outputs[0].name][0]


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder"])
def test_a_checkpoint_that_cannot_be_read(tmp_path, fails, kind):
    """A checkpoint that the machine cannot read is no broken one, whichever read fails."""
    model = timm.create_model("test_resnet")
    path = tmp_path / "c" / f"w.{kind}"
    path.parent.mkdir()
    if kind == "folder":
        save_for_hf(model, tmp_path / "c", model_args={})
        path = tmp_path / "c"
    else:
        (save_file if kind == "safetensors" else torch.save)(model.state_dict(), path)
    arch = {} if kind == "folder" else {"arch": "test_resnet"}
    load_backbone(path, **arch)
    for call in ("open", "stat", "fstat", "pread" if kind != "pth" else "preadv"):
        mend = fails(call, errno.ESTALE, path)
        with pytest.raises(MachineError):
            load_backbone(path, **arch)
        mend()
