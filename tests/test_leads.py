"""Check keys of several inputs, and the labels that come from them: they say what the user gave."""

import json
import os
import tarfile
from dataclasses import replace

import pytest

from conftest import draw, tree
from featcli import extract, open_dump
from featcli.dump.checksummed_json import publish_checksummed
from featcli.dump.plan import Plan, with_fingerprint
from featcli.errors import ConflictError, UsageError
from featcli.inputs.labels import labels_of
from featcli.inputs.leads import FILE, FOLDER, TAR
from featcli.inputs.listing import find
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "pool": "avg", "threads": 1}
OPTIONS |= {"batch_size": 2, "shard_size": 2}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*paths):
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if path.endswith(".tar"):
            with tarfile.open(path, "w") as tar:
                info = tarfile.TarInfo("x.jpg")
                tar.addfile(info)
        else:
            with open(path, "w") as file:
                file.write(path)


@pytest.mark.parametrize(
    ("files", "inputs", "keys"),
    [
        # Last names, if they differ.
        (["s/train/x.jpg", "s/val/x.jpg"], ["s/train", "s/val/"], ["train/x.jpg", "val/x.jpg"]),
        # More names of two that are equal.
        (
            ["a/train/x.jpg", "b/train/x.jpg", "c/x.jpg"],
            ["a/train", "b/train", "c"],
            ["a/train/x.jpg", "b/train/x.jpg", "c/x.jpg"],
        ),
        (["1/a/t/x.jpg", "2/a/t/x.jpg"], ["1/a/t", "2/a/t"], ["1/a/t/x.jpg", "2/a/t/x.jpg"]),
        # Several files, by a shell pattern.
        (
            ["p/cats/000.jpg", "p/dogs/000.jpg", "p/dogs/001.jpg"],
            ["p/cats/000.jpg", "p/dogs/000.jpg", "p/dogs/001.jpg"],
            ["001.jpg", "cats/000.jpg", "dogs/000.jpg"],
        ),
        # One input by several names is one.
        (["a/x.jpg"], ["a", "./a/", "a/../a"], ["x.jpg"]),
        (["a/x.jpg", "b/y.jpg"], ["a/x.jpg", "./a/x.jpg", "b/y.jpg"], ["x.jpg", "y.jpg"]),
        (["a/x.jpg", "b/x.jpg"], ["a", "b", "a"], ["a/x.jpg", "b/x.jpg"]),
        # No lead begins another, because two files could then have one key.
        (
            ["p/a/train/x.jpg", "q/a/train/x.jpg", "r/train/x.jpg"],
            ["p/a", "q/a/train", "r/train"],
            ["a/train/x.jpg", "q/a/train/x.jpg", "r/train/x.jpg"],
        ),
        # Tars have their names without suffix, unless that is another input's.
        (["a/0.tar", "a/1.tar"], ["a/0.tar", "a/1.tar"], ["0/x.jpg", "1/x.jpg"]),
        (["a/0.tar", "b/0.tar"], ["a/0.tar", "b/0.tar"], ["a/0/x.jpg", "b/0/x.jpg"]),
        (["a/0.tar", "b/0/x.jpg"], ["a/0.tar", "b/0"], ["b/0/x.jpg", "a/0/x.jpg"]),
        (["a/0.tar", "a/0/x.jpg"], ["a/0.tar", "a/0"], ["0/x.jpg", "0.tar/x.jpg"]),
        # A single input leads nothing.
        (["a/b/x.jpg"], ["a"], ["b/x.jpg"]),
    ],
)
def test_keys_of_several_inputs(here, files, inputs, keys):
    """Keys are led by the last names of the inputs as given; if two are equal, by the shortest tails that differ."""
    touch(*files)
    assert find(InputSpec(inputs)).images.keys == keys


def test_every_key_has_its_own_file(here):
    """However keys are led, each leads to the file that was named."""
    files = [f"p/{i}/{j}/000.jpg" for i in "ab" for j in "cd"]
    touch(*files)
    images = find(InputSpec(files)).images
    assert {images.keys[row]: images[row].path for row in range(4)} == {name.removeprefix("p/"): name for name in files}
    assert sorted(images.paths()) == files


def test_a_link_has_its_own_name(here):
    """A link leads keys by its own name, not by that of its target."""
    touch("store/f81d4fae/x.jpg", "store/7dec11d0/x.jpg")
    for name, target in (("cats", "f81d4fae"), ("dogs", "7dec11d0")):
        os.symlink(f"store/{target}", name)
    assert find(InputSpec(["cats", "dogs"])).images.keys == ["cats/x.jpg", "dogs/x.jpg"]


def test_leads_of_urls(here):
    """Buckets and protocols tell apart URLs that end in the same name."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for folder in ("/one/train", "/two/train"):
        system.pipe_file(f"{folder}/x.jpg", b"x")
    touch("three/x.jpg")
    try:
        images = find(InputSpec(["memory://one/train", "memory://two/train/", "three"])).images
    finally:
        system.store.clear()
    assert images.keys == ["one/train/x.jpg", "three/x.jpg", "two/train/x.jpg"]
    assert images[2].path == "memory://two/train/x.jpg"


SPLITS = {"train": FOLDER, "val": FOLDER}


@pytest.mark.parametrize(
    ("keys", "leads", "labels"),
    [
        # Folders inside the inputs, whatever leads them.
        (["train/cat/1.jpg", "val/dog/old/2.jpg", "val/3.jpg"], SPLITS, ["cat", "dog", ""]),
        (["a/train/cat/1.jpg", "b/train/2.jpg"], {"a/train": FOLDER, "b/train": FOLDER}, ["cat", ""]),
        (["00000/cat/1.jpg", "00001/2.jpg"], {"00000": TAR, "00001": TAR}, ["cat", ""]),
        # The inputs, if nothing inside them lies in a folder.
        (["cats/1.jpg", "dogs/2.jpg"], {"cats": FOLDER, "dogs": FOLDER}, ["cats", "dogs"]),
        (["a/cats/1.jpg", "b/cats/2.jpg"], {"a/cats": FOLDER, "b/cats": FOLDER}, ["a/cats", "b/cats"]),
        (["train/cat/1.jpg", "val/cat/1.jpg"], {"train/cat": FOLDER, "val/cat": FOLDER}, ["train/cat", "val/cat"]),
        (["cats/000.jpg", "dogs/000.jpg", "1.jpg"], {"cats": FILE, "dogs": FILE}, ["cats", "dogs", ""]),
        # Tars never.
        (["00000/1.jpg", "00001/2.jpg"], {"00000": TAR, "00001": TAR}, ["", ""]),
        (["cats/1.jpg", "00001/2.jpg"], {"cats": FOLDER, "00001": TAR}, ["cats", ""]),
        # One input, or a list.
        (["cat/1.jpg", "dog/old/2.jpg", "3.jpg"], {}, ["cat", "dog", ""]),
        # An older plan without leads, if there is no doubt.
        (["train/1.jpg", "2.jpg"], None, ["train", ""]),
    ],
)
def test_labels(keys, leads, labels):
    """Labels are the folders inside the inputs, and the inputs' own names only if there are no such folders."""
    assert labels_of(keys, leads, "d") == labels


def test_labels_of_splits_are_classes(tmp_path):
    """Two splits with a folder for each class give those folders as classes, and the plan holds the leads."""
    for i, folder in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        draw(tmp_path / "split" / folder / "0.png", i)
    splits = [tmp_path / "split" / name for name in ("train", "val")]
    dump = open_dump(extract(splits, output=tmp_path / "d", **OPTIONS).dump)
    assert dump.keys == ["train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"]
    assert (dump.labels, dump.classes) == (["cat", "dog", "cat", "dog"], ["cat", "dog"])
    assert [int(label) for _, label in dump.as_torch_dataset("stage4", labels=True)] == [0, 1, 0, 1]
    assert dump.plan.provenance["leads"] == SPLITS
    without = replace(dump.plan, provenance={**dump.plan.provenance, "leads": {}})
    assert without.fingerprint == dump.plan.fingerprint


def of_before(path):
    """Make a dump one of a version that did not write leads into plans."""
    plan = Plan.from_json(json.loads((path / "plan.json").read_text()))
    without = {name: value for name, value in plan.provenance.items() if name != "leads"}
    publish_checksummed(path / "plan.json", with_fingerprint(replace(plan, provenance=without)), replace=True)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["provenance"]["leads"], manifest["checksum"]
    publish_checksummed(path / "manifest.json", manifest, replace=True)


@pytest.fixture
def older(tmp_path, monkeypatch):
    """Make an older dump of two folders with one name, whose keys are led by the names of links' targets."""
    for i, name in enumerate(("one/train/cat/0", "one/train/cat/1", "two/train/dog/2")):
        draw(tmp_path / f"{name}.png", i)
    (tmp_path / "link").symlink_to("two/train")
    inputs = [tmp_path / "one" / "train", tmp_path / "link"]
    with monkeypatch.context() as patched:
        patched.setattr("featcli.inputs.listing.leads_of", lambda inputs: ["train/"] * 2)
        extract(inputs, output=tmp_path / "d", **OPTIONS)
    of_before(tmp_path / "d")
    return inputs, tmp_path / "d"


def test_an_older_dump_is_resumed_with_its_keys(older, cli):
    """The command that made an older dump finds nothing to do, makes a lost shard again, and verifies."""
    inputs, path = older
    before = tree(path)
    assert open_dump(path).keys == ["train/cat/0.png", "train/cat/1.png", "train/dog/2.png"]
    assert extract(inputs, output=path, **OPTIONS).extracted == 0
    for name in ("manifest.json", "shards/00001.h5", "shards/00001.json"):
        (path / name).unlink()
    assert extract(inputs, output=path, **OPTIONS).extracted == 1
    assert tree(path) == before
    run = cli("verify", path, "--recompute", "2", "-c", "test_resnet", "--random-init", *inputs)
    assert run.code == 0, run.err
    anew = open_dump(extract(inputs, output=path, overwrite=True, **OPTIONS).dump)
    assert anew.keys == ["link/dog/2.png", "train/cat/0.png", "train/cat/1.png"]


def test_labels_of_an_older_dump_in_doubt(older, cli):
    """If a key of an older dump has two folders, labels are refused, with the mapping to give."""
    dump = open_dump(older[1])
    with pytest.raises(UsageError, match=r"'train/cat/0\.png' lies in several") as refused:
        dump.as_torch_dataset("stage4", labels=True)
    assert "labels={key: key.split('/')[1] for key in dump.keys}" in refused.value.hint
    labels = {key: key.split("/")[1] for key in dump.keys}
    assert [label for _, label in dump.as_torch_dataset("stage4", labels=labels)] == ["cat", "cat", "dog"]
    run = cli("show", older[1], "-o", older[1].parent / "page.html", "-q")
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("before", "now", "says", "hint"),
    [
        ("01", "012", "1 is new, first '2.png'", "give --extend"),
        ("012", "01", "1 is gone, first '2.png'", "put the images back, use"),
        ("01", "12", "1 is gone, first '0.png'; 1 is new, first '2.png'", "give --extend"),
    ],
)
def test_images_that_came_or_went(tmp_path, before, now, says, hint):
    """The hint for other images says whether images came or went."""
    for name in before:
        draw(tmp_path / "p" / f"{name}.png", int(name))
    extract(tmp_path / "p", output=tmp_path / "d", **OPTIONS)
    for name in {*before} - {*now}:
        (tmp_path / "p" / f"{name}.png").unlink()
    for name in now:
        draw(tmp_path / "p" / f"{name}.png", int(name))
    with pytest.raises(ConflictError, match=says) as refused:
        extract(tmp_path / "p", output=tmp_path / "d", **OPTIONS)
    assert refused.value.hint.startswith(hint)
