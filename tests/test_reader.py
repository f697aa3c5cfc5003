import multiprocessing
import os
import pickle
import resource
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import featcli
from conftest import draw
from featcli import open_dump
from featcli.dump.formats import FORMATS
from featcli.errors import IncompleteError, UsageError
from featcli.reading import open_shards as opening
from featcli.reading.torch_dataset import BatchMemory

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "out_indices": (1, 2), "batch_size": 2, "shard_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a dump of eleven pictures in two classes and none, one of them broken."""
    made = tmp_path_factory.mktemp("pictures")
    for i in range(11):
        draw(made / ("cats" if i < 4 else "dogs/old" if i < 9 else "") / f"{i:02d}.png", i)
    (made / "dogs/old/05.png").write_bytes(b"no picture")
    return made


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def dump(request, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dumps") / request.param
    featcli.extract(folder, output=path, format=request.param, **OPTIONS)
    return open_dump(path)


@pytest.fixture(scope="module")
def bfloat16(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dumps") / "bfloat16"
    featcli.extract(folder, output=path, dtype="bfloat16", **OPTIONS)
    return open_dump(path)


def test_what_a_dump_says_of_itself(dump):
    """A dump has stages with shape, dtype and stride, keys, rows by key, failures, and the norm."""
    assert list(dump.stages) == ["stage1", "stage2"]
    stage = dump.stages["stage2"]
    assert (stage.dtype, stage.stride, stage.index, len(stage.shape)) == ("float32", (8, 8), 2, 3)
    assert dump["stage2"].shape == (11, *stage.shape)
    assert (dump.rows["cats/00.png"], dump.keys[dump.rows["10.png"]]) == (2, "10.png")
    assert [failure["key"] for failure in dump.failures] == ["dogs/old/05.png"]
    assert dump.norm == "raw"
    assert repr(dump["stage2"]).startswith("<stage 'stage2': 11x")


def test_labels_are_the_first_folder(dump):
    """Images in a folder for each class are labelled by it, and those above all folders by ''."""
    assert dump.labels == ["", "", *["cats"] * 4, *["dogs"] * 5]
    assert dump.classes == ["", "cats", "dogs"]


def test_tensors_are_what_was_stored(dump, bfloat16):
    """torch gets the same numbers by every kind of index, in the stored dtype, also bfloat16."""
    maps = dump["stage1"]
    for index in (3, -1, "cats/00.png", slice(1, 9, 2), [7, 2, "10.png"], dump.valid, slice(0)):
        assert torch.equal(maps.tensor(index).nan_to_num(), torch.from_numpy(maps[index]).nan_to_num())
    assert maps.tensor().shape == maps.shape
    stored = bfloat16["stage1"].tensor([0, 10])
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored.float(), torch.from_numpy(bfloat16["stage1"][[0, 10]]))
    assert torch.equal(stored, maps.tensor([0, 10]).bfloat16())


def test_tensors_into_memory_of_ones_own(dump):
    """With `out` that tensor is filled, and one that does not fit is refused."""
    maps, rows = dump["stage1"], [4, 0, 9]
    out = torch.empty(3, *maps.shape[1:])
    assert maps.tensor(rows, out) is out
    assert torch.equal(out, maps.tensor(rows))
    one = torch.empty(maps.shape[1:], requires_grad=True)
    assert torch.equal(maps.tensor(9, one), maps.tensor(9))
    for other in (out[:2], out.double(), out.transpose(1, 2)):
        with pytest.raises(UsageError, match="contiguous"):
            maps.tensor(rows, other)


def test_a_stage_is_an_array_for_numpy(dump):
    """numpy's functions take a stage as it is."""
    valid = dump.valid
    assert np.mean(np.asarray(dump["stage2"])[valid]) == np.mean(dump["stage2"][valid])


def test_maps_are_mapped_without_a_copy(dump, folder, tmp_path, bfloat16):
    """A shard, or the only one, is a memory map of the file; if none is possible, the error has the way out."""
    maps = dump["stage2"]
    mapped = dump.as_numpy("stage2", shard=1)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    assert np.array_equal(mapped, maps[4:8], equal_nan=True)
    with pytest.raises(UsageError, match="in 3 shards"):
        maps.as_numpy()
    with pytest.raises(IndexError):
        maps.as_numpy(3)
    with pytest.raises(UsageError, match="bfloat16"):
        bfloat16["stage2"].as_numpy(0)
    featcli.extract(folder, output=tmp_path / "one", **{**OPTIONS, "shard_size": 16})
    assert np.array_equal(open_dump(tmp_path / "one").as_numpy("stage2"), maps[:], equal_nan=True)


def test_walking_through_the_rows(dump):
    """All images that could be read come once, in the order in which they are stored, with their keys."""
    runs = list(dump.walk("stage2", at_once=3))
    rows = [row for run in runs for row in run.rows]
    assert rows == np.flatnonzero(dump.valid).tolist()
    assert [key for run in runs for key in run.keys] == [dump.keys[row] for row in rows]
    assert np.array_equal(np.concatenate([run.maps["stage2"] for run in runs]), dump["stage2"][rows])
    assert max(len(run.rows) for run in runs) == 3
    assert [run.rows for run in dump.walk(failed=True)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert set(runs[0].maps) == {"stage2"}
    some = ["dogs/old/05.png", "10.png", "cats/00.png"]
    assert [run.keys for run in dump.walk(rows=some)] == [["10.png", "cats/00.png"]]
    assert [run.rows for run in dump.walk(rows=~dump.valid, failed=True)] == [[7]]
    assert [*next(dump.walk()).maps] == ["stage1", "stage2"]


def test_pooled_features(dump, folder, tmp_path):
    """`pooled` averages each map over its positions, for images that could be read; vectors stay as they are."""
    features, rows = dump.pooled("stage2")
    assert rows.tolist() == np.flatnonzero(dump.valid).tolist()
    np.testing.assert_allclose(features, dump["stage2"][rows].mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert dump.pooled("stage2", rows=["10.png"])[1].tolist() == [dump.rows["10.png"]]
    assert dump.pooled("stage2", rows=[])[0].shape == (0, features.shape[1])
    featcli.extract(folder, output=tmp_path / "d", pool="max", **OPTIONS)
    vectors = open_dump(tmp_path / "d")
    assert np.array_equal(vectors.pooled("stage2")[0], vectors["stage2"][rows])


def test_a_dump_that_misses_shards(dump, tmp_path):
    """A dump without some shards, opened on purpose, gives its rows, and says why the others are not valid."""
    shutil.copytree(dump.path, tmp_path / "d")
    for gone in ("manifest.json", "shards/00001.json"):
        (tmp_path / "d" / gone).unlink()
    with pytest.raises(IncompleteError):
        open_dump(tmp_path / "d")
    part = open_dump(tmp_path / "d", incomplete=True)
    assert [row for run in part.walk() for row in run.rows] == [
        row for row in (0, 1, 2, 3, 8, 9, 10) if dump.valid[row]
    ]
    assert np.array_equal(part["stage1"][8:], dump["stage1"][8:], equal_nan=True)
    for read in (lambda: part["stage1"][4], lambda: part["stage1"].tensor([0, 5]), lambda: part.as_numpy("stage1", 1)):
        with pytest.raises(IncompleteError, match="not extracted yet"):
            read()
    assert len(part.as_torch_dataset("stage1")) == part.valid.sum()


def test_items_of_the_dataset(dump):
    """An item is a map, or one for each stage, with or without its label, and failed images are no items."""
    data = dump.as_torch_dataset("stage2", labels=True)
    assert len(data) == 10
    assert torch.equal(data[2:4][0], data[[2, 3]][0])
    assert torch.equal(data[torch.tensor(3)][0], data[3][0])
    assert "dogs/old/05.png" not in data.keys
    for item in (0, 4, -1):
        maps, label = data[item]
        assert torch.equal(maps, dump["stage2"].tensor(data.keys[item]))
        assert dump.classes[label] == dump.labels[dump.rows[data.keys[item]]]
    both = dump.as_torch_dataset()[3]
    assert torch.equal(both["stage1"], dump["stage1"].tensor(3))
    by_key = dump.as_torch_dataset("stage2", labels={key: len(key) for key in dump.keys})
    by_row = dump.as_torch_dataset("stage2", labels=[len(key) for key in dump.keys])
    assert by_key[5][1] == by_row[5][1] == len(by_key.keys[5])
    assert dump.as_torch_dataset("stage2", labels=dump.keys)[[1, 2]][1] == data.keys[1:3]
    held_out = dump.as_torch_dataset("stage2", labels=True, rows=["10.png", "dogs/old/05.png", 0])
    assert held_out.keys == [dump.keys[0], "10.png"]
    masks = [np.full((2, 3), row, np.uint8) for row in range(11)]
    for labels in (masks, [torch.from_numpy(mask) for mask in masks], np.stack(masks)):
        found = dump.as_torch_dataset("stage2", labels=labels)[[4, 9]][1]
        assert torch.equal(found, torch.from_numpy(np.stack(masks)[data.rows[[4, 9]]]))


def test_labels_of_any_kind(dump):
    """Labels of several lengths, such as boxes, stay lists."""
    boxes = [[0] * (row % 3) for row in range(11)]
    data = dump.as_torch_dataset("stage2", labels=boxes)
    assert data[[1, 4]][1] == [boxes[data.rows[1]], boxes[data.rows[4]]]


def test_keys_that_are_not_there(dump):
    """A wrong key is a KeyError that names the nearest, and something that is no index is a TypeError."""
    with pytest.raises(KeyError, match=r"no key 'cats/0\.png' in this dump; did you mean 'cats/0\d\.png'"):
        dump["stage1"]["cats/0.png"]
    for index in (None, 1.5, (0, [1, 2]), (0, None), (0, "cats"), (0, True), ("cats/00.png", "cats/01.png"), (1.5, 0)):
        with pytest.raises(TypeError):
            dump["stage1"][index]
    with pytest.raises(UsageError, match="at_once must be at least 1, not -1"):
        next(dump.walk(at_once=-1))


@pytest.mark.parametrize("images", [3, -1, "cats/00.png", slice(1, 6), slice(0), [7, 0], ["10.png"]], ids=str)
@pytest.mark.parametrize("inside", [(0,), (slice(1, 3),), (..., -1), (2, slice(None), 0), (1, 2, 3), ()], ids=str)
def test_parts_of_maps(dump, images, inside):
    """Numbers and slices after the images take of each map what numpy takes of an array, also as tensors."""
    rows = {"cats/00.png": 2, "['10.png']": [1]}.get(str(images), images)
    stage = dump["stage2"]
    expected = stage[:][rows][inside if isinstance(rows, int) else (slice(None), *inside)]
    np.testing.assert_array_equal(stage[(images, *inside)], expected)
    np.testing.assert_array_equal(stage.tensor((images, *inside)).numpy(), expected)


@pytest.mark.parametrize("index", [..., (..., 0), (..., slice(2), 1), ()], ids=str)
def test_parts_of_all_maps(dump, index):
    """Three dots stand for all images, as in an array."""
    np.testing.assert_array_equal(dump["stage2"][index], dump["stage2"][:][index])


def test_iterating_warns(dump):
    """Iterating a dump gives the names of stages and warns, because `len(dump)` counts rows."""
    with pytest.warns(FutureWarning, match=r"use dump\.stages"):
        assert list(dump) == list(dump.stages)
    assert len(dump) == len(dump.keys) == len(dump["stage1"])


@pytest.mark.parametrize("labels", [{"cats/00.png": 1}, [1, 2, 3], 5], ids=["mapping", "sequence", "number"])
def test_labels_that_do_not_fit(dump, labels):
    """A missing label is an error at once, so no label is shifted."""
    with pytest.raises(UsageError, match="labels"):
        dump.as_torch_dataset("stage2", labels=labels)


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_the_dataset_in_worker_processes(dump, start):
    """Workers, forked or started anew, give each image once with its own label."""
    # Workers that are started anew find torch imported, because that takes longer than all that they do.
    multiprocessing.set_forkserver_preload(["torch.utils.data", "featcli.reading.torch_dataset"])
    dump["stage2"][0]  # files are open before the fork
    data = dump.as_torch_dataset("stage2", labels=list(range(11)))
    check_epoch(dump, DataLoader(data, 4, shuffle=True, num_workers=2, multiprocessing_context=start))
    whole = BatchSampler(RandomSampler(data), 4, drop_last=False)  # batches are read as a whole
    check_epoch(dump, DataLoader(data, None, sampler=whole, num_workers=2, multiprocessing_context=start))


def check_epoch(dump, loader):
    """Check that all images that could be read come once, under their own rows."""
    seen = []
    for maps, labels in loader:
        assert torch.equal(maps, dump["stage2"].tensor(labels))
        seen += labels.tolist()
    assert sorted(seen) == np.flatnonzero(dump.valid).tolist()


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_the_loader(dump, num_workers):
    """The loader gives whole batches, each image once with its label, in a new order each time, also after a break."""
    data = dump.as_torch_dataset("stage2", labels=list(range(11)))
    loader = data.loader(3, shuffle=True, num_workers=num_workers)
    assert len(loader) == 4
    for _ in range(3):
        check_epoch(dump, loader)
    orders = {tuple(row for _, labels in loader for row in labels.tolist()) for _ in range(9)}
    assert len(orders) > 1
    next(iter(loader))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    with pytest.raises(UsageError, match="num_workers must be at least 0, not -1"):
        data.loader(num_workers=-1)


def test_batches_that_are_kept_stay_as_they_are(dump):
    """Memory is used again only for batches that nobody holds, not even as a view or as numpy's."""
    data = dump.as_torch_dataset("stage2")
    kept = []
    for epoch in range(4):
        for number, maps in enumerate(data.loader(3)):
            kept.append([maps, maps.numpy(), maps[1:], None][(epoch + number) % 4])
    expected = [data[list(range(first, min(first + 3, 10)))] for first in (0, 3, 6, 9)] * 4
    for held, maps in zip(kept, expected, strict=True):
        if held is not None:
            held = torch.as_tensor(held)
            assert torch.equal(held, maps[len(maps) - len(held) :])


def test_memory_of_batches_is_used_again():
    """Whoever holds a tensor, or a part of it as numpy's, keeps its memory; free memory is given again."""
    memory = BatchMemory()
    first = memory.take((3, 4), "float32")
    place = first.data_ptr()
    assert memory.take((3, 4), "float32").data_ptr() != place
    del first
    again = memory.take((6, 4), "bfloat16")
    assert (again.data_ptr(), again.shape, again.dtype) == (place, (6, 4), torch.bfloat16)
    part = again[1:].view(torch.uint16).numpy()
    del again
    assert memory.take((3, 4), "float32").data_ptr() != place
    del part
    tracemalloc.start()
    memory.take((1 << 20,), "float32")
    assert tracemalloc.get_traced_memory()[0] > 1 << 22
    memory.take((1,), "float32")  # free memory of another size is dropped
    assert tracemalloc.get_traced_memory()[0] < 1 << 20
    tracemalloc.stop()


def open_shards(dump):
    """Return the descriptors of this process through which shards of a dump are read."""
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor by which they are listed
            if Path("/proc/self/fd", name).readlink().parent == dump.path / "shards":
                descriptors.append(int(name))
    return descriptors


def test_a_shard_is_open_while_it_is_read(dump, monkeypatch):
    """A shard that is closed for another stays open while somebody reads it, and is closed then."""
    expected, real, open_meanwhile = dump["stage1"][0], os.preadv, []

    def closed_meanwhile(descriptor, *arguments):
        dump.close()
        open_meanwhile.extend(open_shards(dump))
        assert open_meanwhile == [descriptor]
        return real(descriptor, *arguments)

    dump.close()
    assert open_shards(dump) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", closed_meanwhile)
        assert np.array_equal(dump["stage1"][0], expected)
    assert len(open_meanwhile) == 1
    assert open_shards(dump) == []
    assert np.array_equal(dump["stage1"][0], expected)


def test_the_order_can_be_repeated(dump):
    """A generator gives the same order again, and drop_last leaves out the short batch."""
    data = dump.as_torch_dataset("stage2", labels=list(range(11)))

    def order(seed):
        loader = data.loader(4, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
        return [labels.tolist() for _, labels in loader]

    assert order(1) == order(1) != order(2)
    assert [len(labels) for labels in order(1)] == [4, 4]


def test_maps_of_many_sizes_make_no_dataset(tmp_path, folder):
    """A dump of maps in many sizes makes no dataset, with the way out, and is read one by one as tensors."""
    draw(folder.parent / "wide" / "a.png", 1, (160, 96))
    draw(folder.parent / "wide" / "b.png", 2, (96, 160))
    featcli.extract(folder.parent / "wide", output=tmp_path / "d", **OPTIONS, fit="native")
    dump = open_dump(tmp_path / "d")
    with pytest.raises(UsageError, match="many sizes cannot form one batch"):
        dump.as_torch_dataset()
    wide, tall = dump["stage1"].tensor(slice(None))
    assert wide.shape[1:] == tall.shape[1:][::-1]
    assert torch.equal(wide, torch.from_numpy(dump["stage1"][0]))
    assert torch.equal(dump["stage1"].tensor("b.png"), tall)
    with pytest.raises(UsageError, match="many sizes"):
        np.asarray(dump["stage1"])


def test_a_pickled_dump(dump):
    """A dump is pickled as its path, and opened there in another process."""
    again = pickle.loads(pickle.dumps(dump))
    assert again.keys == dump.keys
    assert np.array_equal(again["stage2"][:], dump["stage2"][:], equal_nan=True)


def test_forks_and_threads_read_at_once(dump):
    """Forked processes and threads of their parent read the same files at once, each rightly."""
    expected = [dump["stage2"][row] for row in range(11)]

    def check():
        for row in [*range(11)] * 20:
            assert np.array_equal(dump["stage2"][row], expected[row], equal_nan=True)
            if row == 5:
                dump.close()

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(check) for _ in range(2)]
        children = [multiprocessing.get_context("fork").Process(target=check) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0]
        assert [thread.result() for thread in threads] == [None, None]


@pytest.fixture
def many(tmp_path, folder):
    """Make a dump of twelve shards with a picture each."""
    for i in range(12):
        draw(tmp_path / "many" / f"{i:03d}.png", i, (16, 16))
    options = {**OPTIONS, "shard_size": 1, "batch_size": 1, "image_size": "32"}
    featcli.extract(tmp_path / "many", output=tmp_path / "d", **options)
    return tmp_path / "d"


def test_open_files_are_few(many, monkeypatch):
    """However many shards are read, only a limited number of files is open, those that were read last."""
    monkeypatch.setattr(opening, "most_open", lambda: 5)
    dump = open_dump(many)
    assert len(dump["stage1"][:]) == 12
    assert len(open_shards(dump)) == 5
    for row in (8, 0, 1, 2, 8, 3, 4):  # 8 is read again, so it is not the first to be closed
        assert np.isfinite(dump["stage1"][row]).all()
    names = {Path("/proc/self/fd", str(descriptor)).readlink().stem for descriptor in open_shards(dump)}
    assert names == {"00001", "00002", "00008", "00003", "00004"}


@pytest.mark.parametrize(
    ("allowed", "most"), [(1024, 256), (256, 64), (20, 8), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)]
)
def test_how_many_files_follows_the_limit(monkeypatch, allowed, most):
    """A process that may open few files keeps few shards open, and its limit stays as it is."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, resource.RLIM_INFINITY))
    assert opening.most_open() == most


def test_a_shard_is_checked_once(many, monkeypatch):
    """Each shard is parsed once, whatever the order of rows, because the places of its arrays are kept."""
    monkeypatch.setattr(opening, "most_open", lambda: 2)
    dump, parsed, shards = open_dump(many), [], FORMATS["hdf5"]
    real = shards.read_layout
    monkeypatch.setattr(shards, "read_layout", lambda path, *rest: parsed.append(path) or real(path, *rest))
    expected = dump["stage2"][:]
    for row in np.random.default_rng(0).integers(0, 12, 200).tolist():
        assert np.array_equal(dump["stage2"][row], expected[row])
    assert len(parsed) == len(set(parsed)) == 12


def test_valid_opens_no_shard(dump):
    """Valid rows are known from the records, without opening a shard, and agree with the shards."""
    dump.close()
    valid = open_dump(dump.path).valid
    assert open_shards(dump) == []
    shards = sorted(path for path in (dump.path / "shards").iterdir() if path.suffix != ".json")
    said = [h5py.File(path)["valid"][:] if path.suffix == ".h5" else load_file(path)["valid"] for path in shards]
    assert valid.tolist() == (np.concatenate(said) == 1).tolist()


def test_a_shard_that_was_made_again_is_read_anew(tmp_path):
    """An open dump gives the maps of a repaired picture once its shard was made again, whatever their size."""
    folder, options = tmp_path / "p", {**OPTIONS, "fit": "native", "shard_size": 2, "batch_size": 2}
    for i in range(2):
        draw(folder / f"{i}.png", i, (64, 64))
    (folder / "1.png").write_bytes(b"broken")
    featcli.extract(folder, output=tmp_path / "d", **options)
    dump = open_dump(tmp_path / "d")
    before = dump["stage1"][1].shape
    draw(folder / "1.png", 1, (128, 96))
    assert featcli.extract(folder, output=tmp_path / "d", retry_failed=True, **options).failed == 0
    dump.close()
    assert dump["stage1"][1].shape != before
    assert np.isfinite(dump["stage1"][1]).all()
    assert np.array_equal(dump["stage1"][1], open_dump(tmp_path / "d")["stage1"][1])
