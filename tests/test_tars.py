"""Check images that are not files in a folder: those in tar files, and behind URLs."""

import io
import os
import sys
import tarfile
import tracemalloc

import numpy as np
import pytest

from conftest import SAMPLES, draw
from featcli import extract, open_dump
from featcli.errors import MachineError, UsageError
from featcli.inputs import archives
from featcli.inputs.listing import find
from featcli.pixels.image_file import opened
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "batch_size": 1, "shard_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pictures")
    for i in range(9):
        draw(made / f"{i:02d}.png", i, (40, 40))
    (made / "04.png").write_bytes(b"no picture")
    (made / "05.png").write_bytes(b"")
    return made


def packed(path, entries):
    """Make a tar file of (name, bytes or what tarfile takes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(*inputs, **options):
    return find(InputSpec([str(name) for name in inputs], **options)).images.keys


@pytest.fixture(scope="module")
def tar(folder, tmp_path_factory):
    """Make a tar of the same pictures in another order, beside their labels, as webdataset does."""
    order = [3, 1, 8, 4, 0, 5, 2, 7, 6]
    entries = []
    for i in order:
        entries.append((f"./{i:02d}.png", (folder / f"{i:02d}.png").read_bytes()))
        entries.append((f"./{i:02d}.cls", b"7"))
    return packed(tmp_path_factory.mktemp("tars") / "train.tar", entries)


@pytest.mark.parametrize("format", ["hdf5", "safetensors"])
def test_a_tar_gives_what_its_folder_gives(tmp_path, folder, tar, format):
    """A tar's rows have its order, its names as keys, and the maps and failures of the same files in a folder."""
    plain = open_dump(extract(folder, output=tmp_path / "plain", format=format, **OPTIONS).dump)
    inside = open_dump(extract(tar, output=tmp_path / "inside", format=format, **OPTIONS).dump)
    assert inside.keys == [f"{i:02d}.png" for i in (3, 1, 8, 4, 0, 5, 2, 7, 6)]
    for key in plain.keys:
        assert np.array_equal(inside["stage4"][key], plain["stage4"][key], equal_nan=True)
    assert {(f["key"], f["reason"]) for f in inside.failures} == {("04.png", "not_an_image"), ("05.png", "empty")}
    assert {(f["key"], f["reason"]) for f in plain.failures} == {(f["key"], f["reason"]) for f in inside.failures}


def test_tars_and_folders_together(folder, tar):
    """Keys of several inputs are led by the inputs' names; folders come first, then tars as they were given."""
    other = packed(tar.parent / "other.tar", [("a/b.JPG", b"x"), ("a/._b.jpg", b"x"), ("a/b.txt", b"x")])
    listing = find(InputSpec([str(other), str(tar), str(folder)]))
    assert listing.images.keys[:9] == [f"{folder.name}/{i:02d}.png" for i in range(9)]
    assert listing.images.keys[9:12] == ["other/a/b.JPG", "train/03.png", "train/01.png"]
    assert dict(listing.ignored) == {"hidden": 1}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([("../a.jpg", b"x")], "may lead out"),
        ([("/etc/a.jpg", b"x")], "may lead out"),
        ([("a/../../b.jpg", b"x")], "may lead out"),
        ([("a.jpg", b"x"), ("a.jpg", b"y")], "would both have the key 'a.jpg'"),
        ([("a.txt", b"x")], "no images"),
        ([], "no images"),
    ],
)
def test_what_a_tar_may_not_hold(tmp_path, entries, says):
    """A tar with names that lead out of a folder, two equal names or no picture is refused, and nothing is unpacked."""
    with pytest.raises(UsageError, match=says):
        names(packed(tmp_path / "x.tar", entries))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_pictures_that_are_links_in_a_tar(tmp_path, kind):
    """A picture that is a link in a tar is refused, because it would be missing; folders and other links are not."""
    made, other, link = tarfile.TarInfo("d.jpg"), tarfile.TarInfo("latest"), tarfile.TarInfo("b.jpg")
    made.type, other.type, link.type = tarfile.DIRTYPE, tarfile.SYMTYPE, kind
    other.linkname = link.linkname = "a.jpg"
    entries = [("a//a.jpg", b"x"), ("", made), ("", other)]
    assert names(packed(tmp_path / "x.tar", entries)) == ["a/a.jpg"]
    with pytest.raises(UsageError, match=r"'b.jpg' is a link, a device or sparse"):
        names(packed(tmp_path / "x.tar", [*entries, ("", link)]))


def test_a_tar_that_is_damaged_or_packed(tmp_path, tar):
    """A tar that is cut short or compressed is refused, because images would be missing or could not be found."""
    whole = tar.read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut.tar': it is damaged or cut short after \d+ members"):
        names(tmp_path / "cut.tar")
    (tmp_path / "none.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(UsageError, match="damaged or cut short after 0 members"):
        names(tmp_path / "none.tar")
    for suffix in ("tar.gz", "tgz", "tar.xz"):
        (tmp_path / f"x.{suffix}").write_bytes(b"x")
        with pytest.raises(UsageError, match="it is a compressed tar file"):
            names(tmp_path / f"x.{suffix}")


def test_a_cut_or_a_flipped_bit_anywhere(tmp_path):
    """Wherever a tar is cut, and whichever header is damaged, no image is silently missing."""
    whole = packed(tmp_path / "x.tar", [(f"{i}.jpg", bytes([i]) * 700) for i in range(3)]).read_bytes()
    end = 3 * (512 + 1024)
    for length in range(0, end + 512, 64):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"damaged or cut short"):
            names(tmp_path / "cut.tar")
    for at in (0, 100, 148, 150, 156):
        for header in (0, 1536, 3072):
            damaged = bytearray(whole)
            damaged[header + at] ^= 1
            (tmp_path / "flipped.tar").write_bytes(damaged)
            with pytest.raises(UsageError, match="damaged or cut short"):
                names(tmp_path / "flipped.tar")
    (tmp_path / "two.tar").write_bytes(whole + whole)
    with pytest.raises(UsageError, match="another tar behind"):
        names(tmp_path / "two.tar")


@pytest.mark.parametrize(
    "headers", [{"size": "-1536"}, {"size": "-2560"}, {"size": "1" + "0" * 23}, {"GNU.sparse.map": "a,b"}]
)
def test_headers_that_lie(tmp_path, headers):
    """Sizes that are negative, endless or no number end in one line, without a loop or a missing image."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size, info.pax_headers = 600, headers if i == 1 else {}
            tar.addfile(info, io.BytesIO(b"x" * 600))
    with pytest.raises(UsageError, match="damaged or cut short"):
        names(tmp_path / "x.tar")


def pax(kind, content):
    """Return a pax header of that many bytes."""
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def record(name, value):
    """Return a value in a pax header, which begins with its length."""
    rest = len(f" {name}={value}\n")
    length = rest + len(str(rest + len(str(rest))))
    return f"{length} {name}={value}\n".encode()


LONG = {
    "a comment": pax(tarfile.XHDTYPE, record("comment", "a" * (1 << 21))),
    "a comment for all": pax(tarfile.XGLTYPE, record("comment", "a" * (1 << 21))),
    "a name": pax(tarfile.GNUTYPE_LONGNAME, b"a" * (1 << 21)),
    "a link": pax(tarfile.GNUTYPE_LONGLINK, b"a" * (1 << 21)),
    "a chain": pax(tarfile.XHDTYPE, record("comment", "a")) * 2_000,
    "values for all": pax(tarfile.XGLTYPE, b"".join(record(f"x{i}", "a") for i in range(2_000))),
    "a long name": pax(tarfile.XHDTYPE, record("path", "a" * 70_000 + ".png")),
    "a map of holes": pax(tarfile.XHDTYPE, record("GNU.sparse.major", 1) + record("GNU.sparse.minor", 0))
    + tarfile.TarInfo("GNUSparseFile.0/a.png").tobuf(tarfile.USTAR_FORMAT) + b"1000000\n" + b"1\n" * 1_500_000,
}  # fmt: skip


@pytest.mark.parametrize("what", LONG)
def test_headers_without_end(tmp_path, monkeypatch, what):
    """Headers that would take memory without limit are refused before they are read."""
    if what == "a map of holes":  # a quarter of them, because each is counted, which takes time
        monkeypatch.setattr(archives, "MOST_HEADER_BYTES", archives.MOST_HEADER_BYTES // 4)
    whole = packed(tmp_path / "x.tar", [("b.png", draw(tmp_path / "b.png", 0).read_bytes())]).read_bytes()
    (tmp_path / "x.tar").write_bytes(LONG[what] + whole)
    tracemalloc.start()  # counts no other threads of the process
    try:
        with pytest.raises(UsageError, match=r"x.tar'?: it is damaged or cut short after . member"):
            names(tmp_path / "x.tar")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_pipe_named_as_a_tar(tmp_path):
    """A pipe named as a tar is refused, and not waited for."""
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UsageError, match=r"x\.tar"):
        names(tmp_path / "x.tar")


def test_a_tar_that_changes(tmp_path, folder, cli):
    """A tar that is rewritten or gone while it is read ends the run, and no image fails or gets another's pixels."""
    entries = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    path = packed(tmp_path / "train.tar", entries)
    size = path.stat().st_size

    def rewrite(kind, **facts):
        if kind == "start":
            packed(path, entries[::-1])
            assert path.stat().st_size == size

    with pytest.raises(MachineError, match="written to since it was listed"):
        extract(path, output=tmp_path / "d", report=rewrite, **OPTIONS)
    with pytest.raises(MachineError, match="No such file"):
        extract(
            path, output=tmp_path / "e", report=lambda kind, **facts: path.unlink() if kind == "start" else None,
            **OPTIONS,
        )  # fmt: skip
    assert not list(tmp_path.rglob("manifest.json"))


def test_tars_resume(tmp_path, tar, cli):
    """An interrupted run over a tar is resumed, also by parts."""
    command = ["extract", tar, "-c", "test_resnet", "--random-init", "--batch-size", "2", "--shard-size", "2", "-q"]
    assert cli(*command, "-o", tmp_path / "whole").code == 3
    for part in ("1/2", "0/2"):
        assert cli(*command, "-o", tmp_path / "parts", "--part", part).code == 3
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "parts" / path.relative_to(tmp_path / "whole")).read_bytes()


@pytest.fixture
def memory(folder, tar):
    """Put the pictures on fsspec's file system in memory."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in sorted(folder.iterdir()):
        system.pipe_file(f"/bucket/photos/{path.name}", path.read_bytes())
    system.pipe_file("/bucket/photos/.hidden.png", b"x")
    system.pipe_file("/bucket/photos/notes.txt", b"x")
    system.pipe_file("/bucket/train.tar", tar.read_bytes())
    yield system
    system.store.clear()


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls_give_what_files_give(tmp_path, folder, tar, memory, protocol):
    """A folder, a tar and a list behind URLs give the maps of the same files."""
    base = "memory://bucket" if protocol == "memory" else f"file://{folder.parent}"
    photos = f"{base}/photos" if protocol == "memory" else f"file://{folder}"
    archive = f"{base}/train.tar" if protocol == "memory" else f"file://{tar}"
    plain = open_dump(extract(folder, output=tmp_path / "plain", **OPTIONS).dump)
    (tmp_path / "names").write_text("\n".join([f"{photos}/01.png", "03.png"]))
    for name, inputs, options in (
        ("folder", photos, {}),
        ("tar", archive, {}),
        ("list", [], {"files_from": str(tmp_path / "names"), "root": photos}),
        ("one", f"{photos}/02.png", {}),
    ):
        found = open_dump(extract(inputs, output=tmp_path / name, **OPTIONS, **options).dump)
        assert {"folder": 9, "tar": 9, "list": 2, "one": 1}[name] == len(found)
        for key in found.keys:
            assert np.array_equal(found["stage4"][key], plain["stage4"][key], equal_nan=True)


def test_listed_urls_without_a_root(tmp_path, memory):
    """Listed URLs without a root have themselves as keys, without protocol, beside local names with theirs."""
    (tmp_path / "list").write_text(f"memory://bucket/photos/01.png\n{SAMPLES / 'nature' / 'sea.jpg'}\n")
    images = find(InputSpec(files_from=str(tmp_path / "list"), root=str(SAMPLES))).images
    assert images.keys == ["bucket/photos/01.png", "nature/sea.jpg"]
    assert images[0].path == "memory://bucket/photos/01.png"
    (tmp_path / "list").write_text("memory://bucket/../01.png\n")
    with pytest.raises(UsageError, match=r"'\.\.', .* is in its URL"):
        names(files_from=str(tmp_path / "list"))


def test_urls_that_lead_nowhere(memory, monkeypatch):
    """A URL of nothing, of an unknown protocol or of a missing package is refused with a way out."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for url, says in (
        ("memory://bucket/nothing", "there is nothing at this URL"),
        ("nosuch://bucket/x", "Protocol not known"),
        ("s3://bucket/x", "s3fs"),
        ("memory://bucket/photos/notes", "there is nothing at this URL"),
    ):
        with pytest.raises(UsageError, match=says):
            names(url)


@pytest.mark.parametrize("cache", ["simplecache", "filecache"])
def test_chains_of_file_systems(tmp_path, memory, folder, cache):
    """Images are read through a cache as without it, and any other chain is refused in planning."""
    image = find(InputSpec([f"{cache}::memory://bucket/photos"])).images[0]
    with opened(image) as file:
        assert file.read() == (folder / "00.png").read_bytes()
    for url in (
        "zip://::memory://bucket/x.zip",
        "zip://in/00.png::/x.zip",
        "zip:///x.zip",
        "tar://::memory://bucket/t.tar",
    ):
        with pytest.raises(UsageError, match="inside of an archive"):
            names(url)
    for chain in ("blockcache", "dir"):
        with pytest.raises(UsageError, match="a chain of file systems"):
            names(f"{chain}::memory://bucket/photos")
    (tmp_path / "list").write_text("00.png")
    with pytest.raises(UsageError, match="inside of an archive"):
        names(files_from=str(tmp_path / "list"), root="zip://::memory://bucket/x.zip")


@pytest.mark.parametrize("name", ["/b.png", "x::y.png"])
def test_objects_that_no_file_can_be_named(memory, name):
    """Objects whose names lead elsewhere are refused, and no local file is read for them."""
    memory.store[f"/bucket/odd/{name}"] = memory.store["/bucket/photos/01.png"]
    with pytest.raises(
        UsageError, match=r"a name that no file can have|no images in"
    ):  # fsspec 2025.3 does not list it
        names("memory://bucket/odd")


def test_listed_urls_that_are_files(tmp_path, folder):
    """A listed URL of a local file does not get around --root, and one with three slashes is no local path."""
    (tmp_path / "list").write_text(f"file://{folder}/01.png\n")
    with pytest.raises(UsageError, match="a file of this machine"):
        names(files_from=str(tmp_path / "list"))
    (tmp_path / "list").write_text(f"memory://{folder}/01.png\n")
    images = find(InputSpec(files_from=str(tmp_path / "list"))).images
    assert images[0].path == f"memory://{folder}/01.png"
    assert images.keys == [f"{folder}/01.png".lstrip("/")]


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), PermissionError("the token has expired")])
def test_an_object_that_goes_and_a_network_that_does(tmp_path, memory, monkeypatch, error):
    """An object that is gone is a failed image; a network or a token that is gone ends the run and fails no image."""
    from fsspec.implementations.memory import MemoryFileSystem

    whole = MemoryFileSystem.cat_file

    def cat_file(self, path, *rest, **options):
        if path.endswith("03.png"):
            raise FileNotFoundError(path)
        if path.endswith(broken) or lost:
            lost.append(path)
            raise error
        return whole(self, path, *rest, **options)

    broken, lost = "06.png", []
    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.raises(MachineError, match=rf"06.png.*{error}"):
        extract("memory://bucket/photos", output=tmp_path / "d", **OPTIONS)
    broken, lost = "nothing", []
    dump = open_dump(extract("memory://bucket/photos", output=tmp_path / "d", **OPTIONS).dump)
    assert {f["key"]: f["reason"] for f in dump.failures} == {
        "03.png": "not_found", "04.png": "not_an_image", "05.png": "empty",
    }  # fmt: skip


def test_a_bucket_that_goes(tmp_path, memory):
    """A bucket that is gone ends the run, and fails no image."""

    def empty(kind, **facts):
        if kind == "start":
            memory.store.clear()

    with pytest.raises(MachineError, match="memory://bucket/photos"):
        extract("memory://bucket/photos", output=tmp_path / "d", report=empty, **OPTIONS)
