import io
import os
import sys

import pytest

from conftest import draw
from featcli.errors import UsageError
from featcli.inputs.image_list import MISSING, SUFFIXES
from featcli.inputs.listing import find
from featcli.pixels.formats import FORMATS
from featcli.spec.groups import InputSpec


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def keys(*names, **options):
    return find(InputSpec([str(name) for name in names], **options)).images.keys


def test_folder_is_walked_and_sorted_by_key(tmp_path):
    """A folder gives every picture below it, with keys relative to it, in the order of their bytes."""
    for name in ("b.jpg", "a/z.PNG", "a/b/c.webp", "Z.jpeg", "é.jpg"):
        touch(tmp_path / name)
    assert keys(tmp_path) == ["Z.jpeg", "a/b/c.webp", "a/z.PNG", "b.jpg", "é.jpg"]


def test_an_image_finds_its_file(tmp_path):
    """Each image has the path of its file and its size."""
    touch(tmp_path / "a" / "x.jpg", b"12345")
    image = find(InputSpec([str(tmp_path)])).images[0]
    assert (image.key, os.path.samefile(image.path, tmp_path / "a" / "x.jpg"), image.bytes) == ("a/x.jpg", True, 5)


def test_other_files_are_counted_not_hidden(tmp_path):
    """Hidden files and files that are no pictures are skipped, and counted by suffix."""
    for name in ("a.jpg", "notes.txt", "b.txt", ".hidden.jpg", ".git/x.jpg", "README"):
        touch(tmp_path / name)
    listing = find(InputSpec([str(tmp_path)]))
    assert listing.images.keys == ["a.jpg"]
    assert listing.ignored == {".txt": 2, "hidden": 2, "no suffix": 1}


def test_several_folders_lead_their_keys(tmp_path):
    """With several inputs a folder's name leads the keys, so equal names in two folders stay apart."""
    touch(tmp_path / "one" / "x.jpg")
    touch(tmp_path / "two" / "x.jpg")
    listing = find(InputSpec([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert listing.images.keys == ["one/x.jpg", "two/x.jpg"]
    assert os.path.samefile(listing.images[1].path, tmp_path / "two" / "x.jpg")


def test_single_images(tmp_path):
    """An image given by itself has its name as key, whatever its suffix."""
    touch(tmp_path / "x.jpg")
    touch(tmp_path / "scan.0001", b"\x89PNG")
    assert keys(tmp_path / "x.jpg", tmp_path / "scan.0001") == ["scan.0001", "x.jpg"]


def test_two_files_with_one_key_are_refused(tmp_path):
    """Two different files with one key are refused, and the message names both."""
    touch(tmp_path / "a" / "x.jpg")
    touch(tmp_path / "b" / "a" / "x.jpg")
    listed = touch(tmp_path / "list", b"a/x.jpg")
    with pytest.raises(UsageError, match=r"would both have the key 'a/x\.jpg'"):
        keys(tmp_path / "b" / "a", files_from=str(listed), root=str(tmp_path))


@pytest.mark.parametrize("null", [False, True])
def test_list_of_names(tmp_path, monkeypatch, null):
    """A list gives each named file once, relative to --root, and with -0 names may hold any character."""
    odd = "new\nline.jpg" if null else "spa ce.jpg"
    for name in ("b.jpg", odd):
        touch(tmp_path / name)
    names = ["./b.jpg", odd, str(tmp_path / "b.jpg")]
    listed = touch(tmp_path / "list", ("\0" if null else "\n").join(names).encode())
    listing = find(InputSpec(files_from=str(listed), null=null, root=str(tmp_path)))
    assert listing.images.keys == ["b.jpg", odd]
    assert listing.repeated == 1


def test_list_from_stdin(tmp_path, monkeypatch):
    """`--files-from -` reads names from stdin, relative to the current folder."""
    touch(tmp_path / "a" / "x.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a/x.jpg\r\n\n")))
    assert keys(files_from="-") == ["a/x.jpg"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"path,label\na.png,1\n", "a table"),
        (b"path\tlabel\na.png\t1\n", "a table"),
        (b'\xef\xbb\xbf[{"path": "a.png"}]', "JSON"),
        (b"PAR1\0\0", "a Parquet table"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
    ],
)
def test_a_table_is_no_list(tmp_path, content, what):
    """A table or a file of arrays in place of a list is named as such, with a way out, before anything is planned."""
    draw(tmp_path / "a.png", 0)
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UsageError, match=f"{what}, not a list of names") as refused:
        find(InputSpec(files_from=tmp_path / "list", root=tmp_path))
    assert refused.value.hint
    draw(tmp_path / "b,c.png", 0)  # a name may look like that
    (tmp_path / "list").write_bytes(b"b,c.png\nx,y.png\n")
    assert len(find(InputSpec(files_from=tmp_path / "list", root=tmp_path)).images) == 2


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg"])
def test_names_outside_the_root_are_refused(tmp_path, name):
    """A listed name outside --root is refused."""
    with pytest.raises(UsageError, match="outside"):
        keys(files_from=str(touch(tmp_path / "list", name.encode())), root=str(tmp_path))


def test_bytes_that_are_no_text(tmp_path):
    """A name that is not UTF-8 is kept byte for byte."""
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(path, "wb") as file:
        file.write(b"x")
    image = find(InputSpec([str(tmp_path)])).images[0]
    assert os.fsencode(image.key) == b"caf\xe9.jpg"
    assert os.path.exists(image.path)


def test_links(tmp_path):
    """Links to pictures are followed and links to folders are not, so a loop ends."""
    draw(tmp_path / "photos" / "x.png", 0)
    (tmp_path / "photos" / "y.png").symlink_to("x.png")
    (tmp_path / "photos" / "loop").symlink_to(".")
    (tmp_path / "photos" / "gone.png").symlink_to("nowhere.png")
    images = find(InputSpec([str(tmp_path / "photos")])).images
    assert images.keys == ["gone.png", "x.png", "y.png"]
    assert images[0].bytes == MISSING
    assert images[1].bytes == images[2].bytes > 0


@pytest.mark.parametrize("make", [lambda p: None, lambda p: touch(p / "a.txt")])
def test_no_images_is_a_usage_error(tmp_path, make):
    """A folder without pictures is refused, and the message lists suffixes of pictures."""
    make(tmp_path)
    with pytest.raises(UsageError, match="no images in") as refused:
        keys(tmp_path)
    assert ".jpg" in refused.value.hint


def test_missing_input(tmp_path):
    """An input that does not exist is refused by name."""
    with pytest.raises(UsageError, match=r"input '.*nowhere': there is no such file"):
        keys(tmp_path / "nowhere")


def test_every_allowed_format_is_collected():
    """A folder gives files with the suffixes of every format that can be decoded."""
    from PIL import Image

    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    rare = known - SUFFIXES
    assert rare <= {".icb", ".vda", ".vst"}  # of TGA, and of other formats
    assert {".mpo", ".hif", ".heifs", ".heics", ".tpic", ".jpm", ".jif"} <= SUFFIXES
