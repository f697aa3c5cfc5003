"""Check that each file has one key and its own row, whatever its name and place, and that no name harms a terminal."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import featcli
from conftest import SAMPLES, Featcli, draw
from featcli import open_dump
from featcli.errors import MachineError, UsageError
from featcli.inputs.listing import find
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "pool": "avg", "batch_size": 4, "threads": 1}
NAMES = {
    "line break": b"a\nb.png",
    "quotes": b"a'b\"c.png",
    "backslash": b"a\\b.png",
    "control": b"\x1b[31mred\x07.png",
    "bidi": "\u202egnp.exe.png".encode(),
    "not UTF-8": b"caf\xe9\xff.png",
    "long": b"x" * 251 + b".png",
    "composed": "é.png".encode(),
    "decomposed": "e\u0301.png".encode(),
    "lower": b"case.png",
    "upper": b"CASE.png",
    "leading dash": b"-rf.png",
    "spaces": b"  .png",
    "stem in a": b"a/same.png",
    "stem in b": b"b/same.png",
    "suffix": b"a/same.bmp",
    "percent": b"%s%d.png",
    "html": b"<b>&amp;.png",
    "deep": b"/".join([b"d"] * 100) + b"/x.png",
}


@pytest.fixture
def photos(tmp_path):
    """Make a picture under each of the names, no two of them alike."""
    for seed, name in enumerate(NAMES.values()):
        path = os.path.join(os.fsencode(tmp_path), b"photos", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draw(tmp_path / "drawn.png", seed)
        if name.endswith(b"bmp"):
            os.remove(tmp_path / "drawn.png")
            draw(tmp_path / "drawn.bmp", seed).rename(tmp_path / "drawn.png")
        os.rename(tmp_path / "drawn.png", path)
    return tmp_path / "photos"


@pytest.mark.parametrize("format_name", ["hdf5", "safetensors"])
def test_names_are_kept_byte_for_byte(tmp_path, photos, format_name):
    """Each name is a key of its own in both formats, and leads to the row of its own picture."""
    (tmp_path / "plain").mkdir()
    for i, name in enumerate(sorted(NAMES.values())):  # the same pictures under plain names
        shutil.copy(os.path.join(os.fsencode(photos), name), tmp_path / "plain" / f"{i:02d}.{os.fsdecode(name[-3:])}")
    for folder in ("photos", "plain"):
        featcli.extract(tmp_path / folder, output=tmp_path / f"{folder}-dump", format=format_name, **OPTIONS)
    dump, plain = (open_dump(tmp_path / f"{folder}-dump") for folder in ("photos", "plain"))
    assert {os.fsencode(key) for key in dump.keys} == set(NAMES.values())
    assert [os.fsencode(key) for key in dump.keys] == sorted(NAMES.values())
    for key, expected in zip(dump.keys, plain["stage4"][:], strict=True):
        assert np.array_equal(dump["stage4"][key], expected), ascii(key)
    assert len(np.unique(plain["stage4"][:], axis=0)) == len(NAMES)


def test_names_in_a_list(tmp_path, photos):
    """A list from `find -print0` gives the same keys as the folder, whatever the names."""
    listed = subprocess.run(["find", ".", "-type", "f", "-print0"], cwd=photos, capture_output=True, check=True).stdout
    (tmp_path / "list").write_bytes(listed)
    found = find(InputSpec(files_from=str(tmp_path / "list"), null=True, root=str(photos)))
    assert sorted(found.images.keys) == sorted(find(InputSpec([str(photos)])).images.keys)


def test_names_never_reach_the_terminal_raw(tmp_path, photos, cli):
    """Messages show names with everything escaped that could control the terminal."""
    for name in NAMES.values():
        with open(os.path.join(os.fsencode(photos), name), "wb") as file:
            file.write(b"broken")
    run = cli("extract", photos, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d", "-v")
    assert run.code == 9
    assert all(line.isprintable() for line in run.err.split("\n"))
    assert run.err.count("failed '") == len(NAMES)
    assert r"failed '\x1b[31mred\x07.png'" in run.err
    assert r"'caf\xe9\xff.png'" in run.err


def test_a_dash_is_no_option(tmp_path, photos):
    """After -- a name that begins with a dash is an input; before it, it is an unknown option."""
    given = ["-c", "test_resnet", "--random-init", "--pool", "avg", "-q", "-o", str(tmp_path / "d")]
    with Featcli("extract", *given, "--", "-rf.png", cwd=photos) as process:
        process.communicate()
    assert process.returncode == 0
    assert open_dump(tmp_path / "d").keys == ["-rf.png"]


def test_linked_folders(tmp_path, cli):
    """Linked folders are counted, and entered if asked for; a loop ends, and a folder seen twice gives two keys."""
    draw(tmp_path / "p" / "x.png", 0)
    draw(tmp_path / "elsewhere" / "y.png", 1)
    (tmp_path / "p" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "back").symlink_to(tmp_path / "p")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    given = ("extract", tmp_path / "p", "-c", "test_resnet", "--random-init", "--dry-run", "-o", tmp_path / "d")
    run = cli(*given)
    assert "1  (3 linked folders not looked into: --follow-links would)" in run.err
    found = find(InputSpec([str(tmp_path / "p")], follow_links=True))
    assert {"x.png", "there/y.png", "again/y.png"} <= set(found.images.keys)
    assert len(found.images) < 20
    assert found.ignored["links back"] >= 1
    assert cli(*given, "--follow-links").code == 0


def test_a_deep_folder(tmp_path):
    """Pictures are found however deep their folder lies."""
    folder = tmp_path / "p"
    folder.mkdir()
    place = os.open(folder, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=place)
        below = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(place)
    draw(folder / "x.png", 0)
    try:
        assert find(InputSpec([str(folder)])).images.keys == ["x.png"]
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)  # shutil.rmtree would recurse as deep


def test_names_that_lead_outside(tmp_path):
    """Names outside --root need --allow-outside and keep their whole path; inside, each file has one key."""
    inside, outside = draw(tmp_path / "root" / "x.png", 0), draw(tmp_path / "y.png", 1)
    listed = tmp_path / "list"
    for name in ("../y.png", str(outside), "a/../../y.png"):
        listed.write_text(name)
        with pytest.raises(UsageError, match="outside") as refused:
            find(InputSpec(files_from=str(listed), root=str(tmp_path / "root")))
        assert "--allow-outside" in refused.value.hint
        images = find(InputSpec(files_from=str(listed), root=str(tmp_path / "root"), allow_outside=True)).images
        assert [tuple(images[0])[:2]] == [(str(outside), str(outside))]
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "far" / "away")
    draw(tmp_path / "far" / "x.png", 2)
    listed.write_text("link/../x.png\n")
    images = find(InputSpec(files_from=str(listed), root=str(tmp_path / "root"), allow_outside=True)).images
    assert os.path.samefile(images[0].path, tmp_path / "far" / "x.png")  # as the system resolves it
    listed.write_text(f"x.png\n./x.png\n{inside}\na/../x.png\n")
    found = find(InputSpec(files_from=str(listed), root=str(tmp_path / "root"), allow_outside=True))
    assert (found.images.keys, found.repeated) == (["x.png"], 3)


AS_NOBODY = """
import os, sys
from featcli.cli.boundary import main
def run(folder, dump):
    try:
        main(["extract", folder, "-c", "test_resnet", "--random-init", "--threads", "1", "-o", dump])
    except SystemExit as ended:
        print(ended.code, flush=True)
folders, scratch = sys.argv[1:-1], sys.argv[-1]
run(folders[0], scratch + "/warm")  # nobody may not import anything: all of it now
os.setgid(65534)
os.setuid(65534)
for folder in folders[1:]:
    run(folder, scratch + "/" + os.path.basename(folder) + "-dump")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="to become nobody one must be root")
def test_what_may_not_be_read(tmp_path):
    """An unreadable picture is a failure, and an unreadable folder ends the run."""
    draw(tmp_path / "p" / "a.png", 0)
    draw(tmp_path / "p" / "b.png", 1).chmod(0)
    draw(tmp_path / "q" / "a.png", 0)
    (tmp_path / "q" / "closed").mkdir(mode=0)
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        folder.chmod(folder.stat().st_mode | 0o011)
    command = [sys.executable, "-c", AS_NOBODY, SAMPLES / "things", tmp_path / "p", tmp_path / "q", tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "3", "2"], done.stderr
    assert "failed 'b.png': unreadable (Permission denied)" in done.stderr
    assert "closed': Permission denied" in done.stderr


def test_a_folder_that_goes_away(tmp_path, monkeypatch):
    """A share that is unmounted during a run ends it without failures, so that it can be resumed."""
    for i in range(8):
        draw(tmp_path / "p" / f"{i}.png", i)
    options = {**OPTIONS, "batch_size": 2, "shard_size": 2, "decode_threads": 1}
    featcli.extract(tmp_path / "p", output=tmp_path / "whole", **options)
    real = Image.open

    def vanishing(file, **options):
        if file.name.endswith("4.png"):
            (tmp_path / "p").rename(tmp_path / "gone")
        return real(file, **options)

    monkeypatch.setattr(Image, "open", vanishing)
    with pytest.raises(MachineError, match="no longer there"):
        featcli.extract(tmp_path / "p", output=tmp_path / "d", **options)
    monkeypatch.undo()
    (tmp_path / "gone").rename(tmp_path / "p")
    assert featcli.extract(tmp_path / "p", output=tmp_path / "d", **options).failed == 0
    assert np.array_equal(open_dump(tmp_path / "d")["stage4"][:], open_dump(tmp_path / "whole")["stage4"][:])


def test_too_many_open_files(tmp_path, monkeypatch):
    """If the machine has no more descriptors, the run ends and no image fails."""
    picture, real = draw(tmp_path / "p" / "x.png", 0), os.open

    def refused(path, *rest):
        if path == str(picture):
            raise OSError(24, "Too many open files")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(MachineError, match="Too many open files"):
        featcli.extract(tmp_path / "p", output=tmp_path / "d", **OPTIONS)


def test_a_million_names(tmp_path):
    """Images take less than 250 bytes each in planning, with the key, and a fourth of that afterwards."""
    import tracemalloc

    from featcli.dump.plan import digest_images, digest_keys
    from featcli.inputs.image_list import ImageList, Origin

    tracemalloc.start()
    images = ImageList([Origin("")])
    for i in range(100_000):
        images.add(f"class{i % 1000:04d}/{i:07d}.jpg", 0, 100_000 + i)
    images = images.taken(images.row_order(len(images)))
    assert digest_images(images) != digest_keys(images.keys)
    assert tracemalloc.get_traced_memory()[0] / len(images) < 60
    assert tracemalloc.get_traced_memory()[1] / len(images) < 250
    tracemalloc.stop()
