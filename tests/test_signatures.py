"""Check that files which people take for pictures are recognised as other libraries write them."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import pickle
import re
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from conftest import draw
from featcli.errors import UsageError
from featcli.inputs.listing import find
from featcli.inputs.signatures import ARCHIVE, ARRAY, DATA, DOCUMENT, PACKED, START, TABLE, TAR, TEXT, VIDEO, foreign
from featcli.pixels.failure import UnreadableError
from featcli.pixels.formats import FORMATS, identified
from featcli.spec.groups import InputSpec, PixelSpec


def in_memory(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jpg", b"x")


def tarred(file):
    with tarfile.open(None, "w", file) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))


def arrow(make):
    table = pa.table({"path": ["a.jpg"]})
    return in_memory(lambda file: make(file, table))


def arrow_file(file, table):
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def arrow_stream(file, table):
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def hdf5(file):
    with h5py.File(file, "w") as made:
        made["images"] = np.zeros((2, 8, 8, 3), np.uint8)


def sqlite():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.db"
        database = sqlite3.connect(path)
        database.execute("create table a (path text)")
        database.commit()
        database.close()
        return path.read_bytes()


def video(brand):
    return struct.pack(">I4s4sI", 24, b"ftyp", brand, 0) + brand + b"mp41"


# name -> (content as another library writes it, kind, whether the content alone tells)
FOREIGN = {
    "images.zip": (in_memory(zipped), ARCHIVE, True),
    "images.7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24), ARCHIVE, True),
    "images.rar": (b"Rar!\x1a\x07\1\0" + bytes(24), ARCHIVE, True),
    "a.jpg.gz": (gzip.compress(b"x"), PACKED, True),
    "a.jpg.bz2": (bz2.compress(b"x"), PACKED, True),
    "a.jpg.xz": (lzma.compress(b"x"), PACKED, True),
    "00000": (in_memory(tarred), TAR, True),
    "train.parquet": (arrow(lambda file, table: pa.parquet.write_table(table, file)), TABLE, True),
    "train.arrow": (arrow(arrow_file), TABLE, True),
    "data-00000-of-00001.arrow": (arrow(arrow_stream), TABLE, False),
    "train.feather": (arrow(lambda file, table: pa.feather.write_feather(table, file)), TABLE, True),
    "train.orc": (arrow(lambda file, table: pa.orc.write_table(table, file)), TABLE, False),
    "train.sqlite": (sqlite(), TABLE, True),
    "images.npy": (in_memory(lambda file: np.save(file, np.zeros(3))), ARRAY, True),
    "images.npz": (in_memory(lambda file: np.savez(file, images=np.zeros(3))), ARRAY, False),
    "images.h5": (in_memory(hdf5), ARRAY, True),
    "images.safetensors": (save({"images": np.zeros(3)}), ARRAY, True),
    "images.pt": (in_memory(lambda file: torch.save(torch.zeros(3), file)), ARRAY, False),
    "old.pth": (
        in_memory(lambda file: torch.save(torch.zeros(3), file, _use_new_zipfile_serialization=False)), ARRAY, True
    ),
    "cifar_batch_1": (pickle.dumps({b"data": np.zeros(3)}, protocol=2), ARRAY, True),
    "images.mat": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\1IM", ARRAY, True),
    "data.mdb": (bytes(16) + b"\xde\xc0\xef\xbe\1\0\0\0", ARRAY, True),
    "train.tfrecord": (struct.pack("<QI", 40, 0x1234) + b"\x0a\x26\x0a\x24", ARRAY, False),
    "clip.mp4": (video(b"isom"), VIDEO, True),
    "clip.mov": (video(b"qt  "), VIDEO, True),
    "clip.avi": (b"RIFF" + struct.pack("<I", 99) + b"AVI LIST" + bytes(8), VIDEO, True),
    "clip.mkv": (b"\x1a\x45\xdf\xa3\x01\0\0\0\0\0\0\x1fB\x86\x81\1", VIDEO, True),
    "paper.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", DOCUMENT, True),
    "list.txt": (b"a.jpg\nb.jpg\n", TEXT, True),
    "names": ("\ufeffdir/café.jpg\r\n".encode(), TEXT, True),
    "empty.txt": (b"", TEXT, False),
    "latin.lst": ("café.jpg\n".encode("latin-1"), TEXT, False),
    "labels.csv": (b"path,label\na.jpg,1\n", DATA, False),
    "coco.json": (json.dumps({"images": [{"file_name": "a.jpg"}]}).encode(), DATA, True),
    "index.html": (b"\n<!DOCTYPE html>\n<title>403</title>", DATA, True),
    "voc.xml": (b"<?xml version='1.0'?><annotation><folder>a</folder></annotation>", DATA, True),
}  # fmt: skip

each = pytest.mark.parametrize("name", FOREIGN)


@each
def test_an_input_that_is_no_picture_is_refused(tmp_path, name):
    """A file that is no picture is refused with a way out, under its own name or by its bytes, alone or with others."""
    content, kind, by_content = FOREIGN[name]
    assert foreign(content[:START], name).kind == kind
    picture = draw(tmp_path / "a.png", 0)
    for path in [tmp_path / name] + ([tmp_path / "nameless"] if by_content else []):
        path.write_bytes(content)
        for inputs in ([path], [picture, path]):
            with pytest.raises(UsageError, match="not a picture") as refused:
                find(InputSpec(inputs))
            assert foreign(content[:START], path.name).hint in refused.value.hint
    listed = tmp_path / "named"
    listed.write_text(f"{name}\n")
    with pytest.raises(UsageError, match="nothing here is a picture"):
        find(InputSpec(files_from=listed, root=tmp_path))
    listed.write_text(f"a.png\n{name}\n")
    assert len(find(InputSpec(files_from=listed, root=tmp_path)).images) == 2  # one of them will fail


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("images.zip", "ZIP archive"), ("00000", "tar file"), ("train.parquet", "Parquet"), ("images.h5", "HDF5"),
        ("images.npy", "NumPy"), ("clip.mp4", "video"), ("list.txt", "text"), ("index.html", "HTML"),
        ("coco.json", "JSON"), ("paper.pdf", "PDF"),
    ],
)  # fmt: skip
def test_in_a_list_it_fails_by_name(name, says):
    """Among many listed images such a file is a failure that says what it is."""
    with pytest.raises(UnreadableError, match=says) as failed:
        identified(io.BytesIO(FOREIGN[name][0]), PixelSpec())
    assert failed.value.reason == ("format_not_allowed" if name == "paper.pdf" else "not_an_image")


def test_img2dataset_by_a_shell_pattern(tmp_path):
    """For img2dataset's tars, tables and statistics, given by a pattern, the message says which are no pictures."""
    picture = draw(tmp_path / "0.png", 0).read_bytes()
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(picture)
        tar.addfile(info, io.BytesIO(picture))
    (tmp_path / "00000.parquet").write_bytes(FOREIGN["train.parquet"][0])
    (tmp_path / "00000_stats.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"00000\.parquet': it is a Parquet table, not a picture, and 1 other input"
    ) as refused:
        find(InputSpec(sorted(tmp_path.glob("00000*"))))
    assert "name the others alone" in refused.value.hint
    assert find(InputSpec([tmp_path / "00000.tar"])).images.keys == ["0.png"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_a_picture_under_any_name(tmp_path, format):
    """No picture of a format that is read is taken for something else, whatever its name."""
    for name in ("picture", "picture.zip", "picture.txt", "picture.json"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name, format)
        if format != "TGA" or name == "picture":  # TGA has no mark
            assert find(InputSpec([tmp_path / name])).images.keys == [name]


def test_a_plain_text_picture(tmp_path):
    """A PPM in text is a picture, and no list."""
    (tmp_path / "picture").write_bytes(b"P3\n1 1\n255\n1 2 3\n")
    assert find(InputSpec([tmp_path / "picture"])).images.keys == ["picture"]


@pytest.mark.parametrize(
    "content", [b"<html>403</html>", b"no picture", b'{"error": 1}', b"\xff\xd8\xff", b"", bytes(99)]
)
def test_a_broken_picture_stays_a_failure(tmp_path, content):
    """A file named as a picture that holds an error page, nothing or damage is listed, and fails by itself."""
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "list").write_text("a.jpg")
    assert find(InputSpec([tmp_path / "a.jpg"])).images.keys == ["a.jpg"]
    assert find(InputSpec(files_from=tmp_path / "list", root=tmp_path)).images.keys == ["a.jpg"]


@pytest.mark.parametrize("path", [os.devnull, "pipe.jpg"])
def test_a_device_is_no_input(tmp_path, monkeypatch, path):
    """An input that is neither a file nor a folder is refused before anything is written."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jpg")
    with pytest.raises(UsageError, match="a device, pipe or socket"):
        find(InputSpec([path]))


def test_a_folder_of_something_else(tmp_path):
    """For a folder without pictures the message says what it holds, and what to do with that."""
    (tmp_path / "hub").mkdir()
    for name in ("train-0.parquet", "train-1.parquet", "README.md"):
        (tmp_path / "hub" / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"3 files of other kinds: 2 \.parquet, 1 \.md") as refused:
        find(InputSpec([tmp_path / "hub"]))
    assert "give it with --table" in refused.value.hint
    for name in ("train-0.parquet", "train-1.parquet", "README.md"):
        (tmp_path / "hub" / name).rename(tmp_path / "hub" / f"{name}.dcm")
    with pytest.raises(UsageError, match=r"3 \.dcm") as refused:
        find(InputSpec([tmp_path / "hub"]))
    assert "convert" in refused.value.hint


def test_only_linked_folders(tmp_path):
    """A folder that has only links to folders is refused with the option that follows them."""
    draw(tmp_path / "real" / "n01" / "a.png", 0)
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "n01").symlink_to(tmp_path / "real" / "n01")
    with pytest.raises(UsageError, match=r"1 linked folder not looked into") as refused:
        find(InputSpec([tmp_path / "subset"]))
    assert "--follow-links" in refused.value.hint
    assert find(InputSpec([tmp_path / "subset"], follow_links=True)).images.keys == ["n01/a.png"]


def test_behind_a_url(monkeypatch):
    """Files behind a URL are recognised in the same way, by name if the server gives no first bytes."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("images.zip", "nameless", "a.png"):
        system.pipe_file(f"/bucket/{name}", FOREIGN["images.zip"][0])
    try:
        for name in ("images.zip", "nameless"):
            with pytest.raises(UsageError, match="it is a ZIP archive, not a picture"):
                find(InputSpec([f"memory://bucket/{name}"]))
        assert find(InputSpec(["memory://bucket/a.png"])).images.keys == ["a.png"]  # listing does not fetch it
        monkeypatch.setattr(type(system), "cat_file", lambda *_, **__: 1 / 0)
        with pytest.raises(UsageError, match="it is an archive, not a picture"):
            find(InputSpec(["memory://bucket/images.zip"]))
        assert find(InputSpec(["memory://bucket/nameless"])).images.keys == ["nameless"]
    finally:
        system.store.clear()


PICTURES = {
    "a.psd": b"8BPS\0\1", "b.exr": b"v/1\1", "c.dcm": bytes(128) + b"DICM", "d.dds": b"DDS |", "e.qoi": b"qoif",
    "f.hdr": b"#?RADIANCE\n", "g.jls": b"\xff\xd8\xff\xf7\0\x0b", "h.jxr": b"II\xbc\1", "i.icns": b"icns\0",
    "j.cr3": b"\0\0\0\x18ftypcrx ", "k.raf": b"FUJIFILMCCD-RAW 0201", "l.orf": b"IIRO\x08\0", "m.rw2": b"IIU\0\x18",
    "n.pcx": b"\n\5\1\x08", "o.sgi": b"\1\xda\1\1", "p.xcf": b"gimp xcf v011", "q.fits": b"SIMPLE  =    T",
    "r.svg": codecs.BOM_UTF8 + b"<svg xmlns=''/>", "s.svg": b"<!-- made by hand -->\n<!-- twice -->\n<svg xmlns=''/>",
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_not_read(tmp_path, name):
    """A picture of a format that is not read is named, with a way out, so that nobody looks for damage in it.

    As an input, or as all that a list names, it is refused before the plan is made; among others it is a failure.
    """
    content = PICTURES[name] + bytes(600)
    with pytest.raises(UnreadableError) as failed:
        identified(io.BytesIO(content), PixelSpec())
    assert failed.value.reason == "format_not_allowed"
    assert re.fullmatch(r"[^:]+: convert it to JPEG or PNG", failed.value.detail)
    draw(tmp_path / "a.png", 0)
    for path in (tmp_path / name, tmp_path / "nameless"):
        path.write_bytes(content)
        for inputs in ([path], [tmp_path / "a.png", path]):
            with pytest.raises(UsageError, match="which is not read") as refused:
                find(InputSpec(inputs))
            assert "convert it to JPEG or PNG" in refused.value.hint
    (tmp_path / "list").write_text(name)
    with pytest.raises(UsageError, match="which is not read"):
        find(InputSpec(files_from=tmp_path / "list", root=tmp_path))
    (tmp_path / "list").write_text(f"{name}\na.png")
    assert len(find(InputSpec(files_from=tmp_path / "list", root=tmp_path)).images) == 2
    (tmp_path / "a.jpg").write_bytes(content)  # named as a picture that is read
    assert find(InputSpec([tmp_path / "a.jpg"])).images.keys == ["a.jpg"]


@pytest.mark.parametrize("suffix", "svg psd exr dcm fits eps pdf".split())
def test_pictures_told_by_their_suffix(tmp_path, suffix):
    """If the bytes say nothing, as in an empty file, the suffix tells that a format is not read."""
    (tmp_path / f"a.{suffix}").write_bytes(b"")
    with pytest.raises(UsageError, match=r"not read|not a picture"):
        find(InputSpec([tmp_path / f"a.{suffix}"]))


@pytest.mark.parametrize("start", [b"\0\0\0\x18ftypheic", b"\xff\x0a", b"\0\0\0\x0cJXL "])
def test_what_a_plugin_reads_is_an_input(tmp_path, start):
    """HEIF and JPEG XL are listed under any name, because a plugin may read them."""
    (tmp_path / "picture").write_bytes(start + bytes(99))
    assert find(InputSpec([tmp_path / "picture"])).images.keys == ["picture"]
