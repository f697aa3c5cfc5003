import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import safetensors
import torch
import xxhash
from safetensors.torch import load_file

from conftest import little_memory
from featcli.dump.atomic_file import PARTIAL, create_partial, publish, remove_stale
from featcli.dump.checksummed_json import publish_checksummed
from featcli.dump.formats import FORMATS
from featcli.dump.shard import REST, ShardWriter
from featcli.errors import DamagedError, FeatcliError, UsageError

KEYS = ["a.jpg", "b/é.jpg", "caf\udce9.jpg", "new\nline.jpg", "z.jpg"]
DTYPES = ["float32", "float16", "bfloat16"]


def maps(dtype):
    generator = torch.Generator().manual_seed(0)
    return {
        "stem": torch.randn(5, 2, 4, 3, generator=generator).to(getattr(torch, dtype)),
        "stage1": torch.randn(5, 7, generator=generator).to(getattr(torch, dtype)),
    }


def stored(tensor):
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def start(path, format_name, dtype):
    arrays = {name: (dtype, tuple(tensor.shape)) for name, tensor in maps(dtype).items()}
    arrays["valid"] = ("uint8", (5,))
    return ShardWriter(path, FORMATS[format_name], arrays, KEYS, {"shard": "0", "fingerprint": "f"})


def write(folder, format_name, dtype="float32", runs=((0, 3), (3, 5))):
    path = folder / f"00000{FORMATS[format_name].SUFFIX}"
    writer = start(path, format_name, dtype)
    for begin, end in runs:
        writer.write({name: stored(tensor[begin:end]) for name, tensor in maps(dtype).items()})
    return path, commit(writer, np.array([1, 1, 0, 1, 1], np.uint8))


def commit(writer, valid):
    written = writer.finish({"valid": valid})
    writer.publish()
    return written


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_opens_in_the_library(tmp_path, dtype):
    """A safetensors shard opens in the safetensors library, with maps, valid and keys."""
    path, _ = write(tmp_path, "safetensors", dtype)
    tensors = load_file(path)
    assert {name: tensors[name].equal(tensor) for name, tensor in maps(dtype).items()} == {"stem": True, "stage1": True}
    assert tensors["valid"].tolist() == [1, 1, 0, 1, 1]
    with safetensors.safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["keys"]) == KEYS
        assert file.metadata()["shard"] == "0"


@pytest.mark.parametrize("dtype", DTYPES)
def test_hdf5_opens_in_h5py(tmp_path, dtype):
    """An HDF5 shard opens in plain h5py, with maps, valid and keys; bfloat16 comes as its float32 values."""
    path, _ = write(tmp_path, "hdf5", dtype)
    with h5py.File(path) as file:
        for name, tensor in maps(dtype).items():
            assert np.array_equal(file[name][:], tensor.float().numpy())
        assert file["valid"][:].tolist() == [1, 1, 0, 1, 1]
        assert [os.fsdecode(key) for key in file["keys"][:]] == KEYS
        assert file.attrs["shard"] == b"0"


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_is_read_back(tmp_path, format_name, dtype):
    """The layout that a format reads from a finished file says where the bytes are."""
    path, _ = write(tmp_path, format_name, dtype)
    layout = FORMATS[format_name].read_layout(str(path), 5)
    content = path.read_bytes()
    assert list(layout.keys) == KEYS
    assert layout.attributes["fingerprint"] == "f"
    for name, tensor in maps(dtype).items():
        array = layout.arrays[name]
        assert content[array.offset : array.end] == stored(tensor).tobytes()
        assert (array.dtype, array.shape) == (dtype, tuple(tensor.shape))


@pytest.mark.parametrize("format_name", FORMATS)
def test_equal_work_gives_equal_bytes(tmp_path, format_name):
    """The bytes of a shard depend only on its content, not on the runs that wrote it."""
    files = []
    for name, runs in (("one", [(0, 5)]), ("two", [(0, 1), (1, 2), (2, 5)])):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name, format_name, runs=runs))
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert files[0][1] == files[1][1]


@pytest.mark.parametrize("format_name", FORMATS)
def test_hashes_cover_every_byte(tmp_path, format_name):
    """Each stage has the xxh3-128 of its rows, and all bytes outside the stages have one, too."""
    path, written = write(tmp_path, format_name)
    content = bytearray(path.read_bytes())
    layout = FORMATS[format_name].read_layout(str(path), 5)
    for name in sorted(("stem", "stage1"), key=lambda name: -layout.arrays[name].offset):
        array = layout.arrays[name]
        assert xxhash.xxh3_128_hexdigest(content[array.offset : array.end]) == written.hashes[name]
        del content[array.offset : array.end]
    assert xxhash.xxh3_128_hexdigest(content) == written.hashes[REST]
    assert written.bytes == path.stat().st_size


@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_under_the_final_name_before_commit(tmp_path, format_name):
    """Before a commit a shard does not have its name, and an abort leaves nothing behind."""
    writer = start(tmp_path / "x", format_name, "float32")
    writer.write({name: stored(tensor) for name, tensor in maps("float32").items()})
    assert [path.name.endswith(PARTIAL) for path in tmp_path.iterdir()] == [True]
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_an_uncommitted_safetensors_file_is_not_readable(tmp_path):
    """Before its header is written, which comes last, readers refuse the file instead of reading zeros."""
    writer = start(tmp_path / "x", "safetensors", "float32")
    (partial,) = tmp_path.iterdir()
    with pytest.raises(safetensors.SafetensorError):
        load_file(partial)
    writer.abort()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_file_without_a_record_is_taken_over_or_replaced(tmp_path, format_name):
    """A shard file that a killed process left without a record is kept if equal, and replaced otherwise."""
    path, written = write(tmp_path, format_name)
    content = path.read_bytes()
    assert write(tmp_path, format_name) == (path, written)
    path.write_bytes(content[:-1] + b"?")
    assert write(tmp_path, format_name) == (path, written)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def damages(content):
    """Yield a file cut short, emptied, and with each of its first bytes changed."""
    yield from (b"", content[:5], content[: len(content) // 2], content[:-1], b"\0" * 100, os.urandom(300))
    for position in range(0, 256, 3):
        yield content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize("format_name", FORMATS)
def test_damaged_files_raise_nothing_but_featcli_errors(tmp_path, format_name):
    """A damaged shard still has its arrays inside the file, or raises a FeatcliError."""
    path, _ = write(tmp_path, format_name)
    content, refused = path.read_bytes(), 0
    for damaged in damages(content):
        path.write_bytes(damaged)
        try:
            layout = FORMATS[format_name].read_layout(str(path), 5)
            assert all(0 < array.offset <= array.end <= len(damaged) for array in layout.arrays.values())
        except FeatcliError:
            refused += 1
    assert refused >= 6


KEYS_DATA = {"data": [b"a"], "dtype": h5py.string_dtype("utf-8", 1)}
ODD_HDF5 = {
    "link": lambda f, _: f.__setitem__("stem", h5py.ExternalLink("other.h5", "/stem")),
    "soft link": lambda f, _: f.__setitem__("stem", h5py.SoftLink("/keys")),
    "storage elsewhere": lambda f, name: f.create_dataset(name, (2,), "f4", external=[("secret", 0, 8)]),
    "chunks": lambda f, _: f.create_dataset("stem", (2,), "f4", chunks=(1,)),
    "zipped": lambda f, _: f.create_dataset("stem", (1000,), "f4", compression="gzip"),
    "integers": lambda f, _: f.create_dataset("stem", (2,), "i8"),
    "virtual": lambda f, _: f.create_virtual_dataset("stem", h5py.VirtualLayout((2,), "f4")),
    "scalar": lambda f, _: f.create_dataset("stem", (), "f4"),
    "group": lambda f, _: f.create_group("stem"),
}


ODD_KEYS = {
    "of any length": lambda f: f.create_dataset("keys", data=[b"a"], dtype=h5py.string_dtype()),
    "longer than the file": lambda f: f.create_dataset("keys", (1,), "S100000000"),
    "link": lambda f: f.__setitem__("keys", h5py.ExternalLink("/dev/zero", "/keys")),
    "storage elsewhere": lambda f: f.create_dataset("keys", (1,), "S8", external=[("secret", 0, 8)]),
    "a billion": lambda f: f.create_dataset("keys", (10**9,), "S100", chunks=(1000,)),
    "a billion never written": lambda f: f.create_dataset("keys", (10**9,), "S100"),
    "another number of them": lambda f: f.create_dataset("keys", data=[b"a", b"b"]),
    "numbers": lambda f: f.create_dataset("keys", (1,), "f4"),
    "none": lambda f: None,
}


@pytest.mark.parametrize("kind", ODD_HDF5)
def test_odd_hdf5_arrays_are_refused(tmp_path, kind):
    """HDF5 arrays that lead out of the file, unpack to any size or have no rows are not read."""
    (tmp_path / "secret").write_bytes(b"12345678")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("keys", **KEYS_DATA)
        ODD_HDF5[kind](file, "stem")
    with pytest.raises(DamagedError):
        FORMATS["hdf5"].read_layout(str(tmp_path / "x.h5"), 1)


@pytest.mark.parametrize("kind", ODD_KEYS)
def test_odd_hdf5_keys_are_refused(tmp_path, kind):
    """HDF5 keys that are no plain list of texts of the planned length are not read."""
    (tmp_path / "secret").write_bytes(b"12345678")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("stem", data=np.zeros((1, 2), np.float32))
        ODD_KEYS[kind](file)
    with pytest.raises(DamagedError), little_memory(64_000_000):
        FORMATS["hdf5"].read_layout(str(tmp_path / "x.h5"), 1)


def header(path, **changes):
    """Return a safetensors file of one stage and one row, with other things in its header."""
    keys = changes.pop("keys", json.dumps(["a"]))
    entry = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]} | changes.pop("entry", {})
    text = json.dumps({"__metadata__": {"keys": keys}, "stem": entry} | changes).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return str(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": "5"}, {"keys": "null"}, {"keys": '["a", "b"]'}, {"keys": "[1]"}, {"keys": "[" * 100_000},
        {"entry": {"shape": [1.0, 2]}}, {"entry": {"data_offsets": [0.0, 8.0]}}, {"entry": {"shape": []}},
        {"entry": {"shape": [-1, -2]}}, {"entry": {"dtype": []}}, {"entry": {"data_offsets": [4, 12]}},
        {"entry": {"data_offsets": [0]}}, {"entry": {"shape": [1 << 70, 0]}},
        {"entry": {"shape": [int("9" * 4000)] * 500}}, {"entry": {"shape": [1] * 9}}, {"stem": 5}, {"__metadata__": []},
    ],
    ids=str,
)  # fmt: skip
def test_odd_safetensors_headers_are_refused(tmp_path, changes):
    """A header with claims that its file does not keep is refused, and a right one is read."""
    assert FORMATS["safetensors"].read_layout(header(tmp_path / "right"), 1).arrays["stem"].shape == (1, 2)
    with pytest.raises(DamagedError):
        FORMATS["safetensors"].read_layout(header(tmp_path / "x", **changes), 1)


@pytest.mark.parametrize("format_name", FORMATS)
def test_writes_that_take_less_than_given(tmp_path, monkeypatch, format_name):
    """If the system takes only a part of what is written, the rest follows."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    path, _ = write(tmp_path / "one", format_name)
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, offset: plain(descriptor, content[:7], offset))
    assert write(tmp_path / "two", format_name)[0].read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_pipe_is_no_shard(tmp_path, format_name):
    """A pipe in place of a shard is refused at once."""
    os.mkfifo(tmp_path / "x")
    with pytest.raises(DamagedError, match="regular"):
        FORMATS[format_name].read_layout(str(tmp_path / "x"), 1)


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_has_a_name_can_be_opened(tmp_path, monkeypatch, format_name):
    """A shard can be read as soon as it has its name, even before its folder is on the disk."""
    plain, shapes = os.fsync, []

    def sync(descriptor):
        for path in tmp_path.glob("[!.]*") if os.path.isdir(f"/proc/self/fd/{descriptor}") else ():
            if format_name == "hdf5":
                with h5py.File(path, "r") as file:
                    shapes.append(file["stem"].shape)
            else:
                shapes.append(load_file(path)["stem"].shape)
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path, format_name)
    assert shapes == [(5, 2, 4, 3)]


def test_a_writer_that_lives_keeps_its_file(tmp_path):
    """A file that another process writes is not removed, although its lock lets readers in; an abandoned one is."""
    descriptor, partial = create_partial(tmp_path / "x")
    assert remove_stale(tmp_path) == 0
    assert partial.exists()
    os.close(descriptor)
    assert remove_stale(tmp_path) == 1


def test_keys_that_no_header_can_hold(tmp_path):
    """Names too many and too long for the header of a safetensors file are refused before a row is written."""
    keys = ["\u00fc" * 74 + str(i) for i in range(200_000)]
    with pytest.raises(UsageError, match="do not fit into the header"):
        ShardWriter(tmp_path / "x", FORMATS["safetensors"], {"valid": ("uint8", (len(keys),))}, keys, {})
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_not_cleaned_up(tmp_path):
    """Only names as featcli makes them are taken for its partial files."""
    (tmp_path / ".download.partial").write_bytes(b"x")
    (tmp_path / f".folder.{'a' * 16}.partial").mkdir()
    assert remove_stale(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_publish_never_overwrites(tmp_path):
    """The first to publish a name wins, and later ones leave it as it is."""
    assert publish_checksummed(tmp_path / "x.json", {"a": 1})
    assert not publish_checksummed(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text())["a"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_publish_without_hard_links(tmp_path, monkeypatch):
    """Without hard links files are renamed, but never over a name that is taken."""
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    for number, expected in ((1, True), (2, False)):
        descriptor, partial = create_partial(tmp_path / "x")
        os.write(descriptor, b"%d" % number)
        os.close(descriptor)
        assert publish(partial, tmp_path / "x") is expected
    assert (tmp_path / "x").read_bytes() == b"1"
    assert len(list(tmp_path.iterdir())) == 1


def test_stale_partials_of_the_dead_are_removed_and_the_living_are_not(tmp_path):
    """Partial files are removed once their process is gone, and not before."""
    script = "import sys, pathlib; from featcli.dump.atomic_file import *; create_partial(pathlib.Path(sys.argv[1])); "
    dead = [sys.executable, "-c", script + "import os; os._exit(1)", str(tmp_path / "dead")]
    subprocess.run(dead, check=False)
    living = [sys.executable, "-c", script + "print(flush=True); input()", str(tmp_path / "living")]
    with subprocess.Popen(living, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert remove_stale(tmp_path) == 1
        assert [path.name.startswith(".living") for path in tmp_path.iterdir()] == [True]
        process.communicate(b"\n")
    assert remove_stale(tmp_path) == 1


@pytest.mark.parametrize("format_name", FORMATS)
def test_memory_does_not_grow_with_the_shard(tmp_path, format_name):
    """A shard is written through buffers of its batches, and is never in memory as a whole."""
    import tracemalloc

    peaks = []
    for rows in (64, 1024):
        arrays = {"s": ("float32", (rows, 64, 7, 7)), "valid": ("uint8", (rows,))}
        tracemalloc.start()
        writer = ShardWriter(
            tmp_path / f"{rows}.x", FORMATS[format_name], arrays, [str(i) for i in range(rows)], {"a": "b"}
        )
        for _ in range(0, rows, 32):
            writer.write({"s": np.ones((32, 64, 7, 7), np.float32)})
        commit(writer, np.ones(rows, np.uint8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]  # sixteen times the rows
