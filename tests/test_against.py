"""Check `featcli verify A --against B`: two dumps of the same images, compared by key."""

import json
import shutil
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import featcli
from conftest import draw
from featcli import open_dump
from featcli.reading.against import LARGEST, NAMED, Difference, compare

TINY = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "threads": 1, "batch_size": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Make five pictures, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        draw(folder / f"{number}.png", number, (40 + number, 32))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(99))
    return folder


@pytest.fixture(scope="module")
def first(photos, tmp_path_factory):
    """Make a dump of two stages."""
    return featcli.extract(photos, output=tmp_path_factory.mktemp("d") / "a", out_indices=(1, -1), **TINY).dump


def against(one, other, tolerance=0.0):
    return compare(open_dump(one), open_dump(other), tolerance)


def comparison_in(run):
    """Return the facts that a command printed as JSON."""
    return next(found for found in map(json.loads, run.out.splitlines()) if found["type"] == "against")


def test_the_same_rows_in_other_places(photos, first, tmp_path, cli):
    """Shards and format do not matter, a failure of both is no difference, and rows are found by key."""
    options = {**TINY, "out_indices": (1, -1), "shard_size": 2, "format": "safetensors"}
    other = featcli.extract(photos, output=tmp_path / "b", **options).dump
    run = cli("verify", first, "--against", other)
    assert run.code == 0
    assert "stage1: all 5 rows equal\nstage4: all 5 rows equal" in run.out
    assert f"{first} and {other}: equal with a tolerance of 0" in run.out
    with tarfile.open(tmp_path / "p.tar", "w") as tar:  # a tar keeps this order
        for path in sorted(photos.iterdir(), reverse=True):
            tar.add(path, path.name)
    other = featcli.extract(tmp_path / "p.tar", output=tmp_path / "c", **options).dump
    assert open_dump(other).keys == open_dump(first).keys[::-1]
    assert against(first, other).is_equal


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_differences_are_those_of_numpy(photos, first, tmp_path, cli, dtype):
    """Largest, mean and relative differences are numpy's of the whole arrays; the tolerance decides the exit code."""
    more = {"precision": "bf16"} if dtype == "float32" else {"dtype": dtype}
    other = featcli.extract(photos, output=tmp_path / "b", out_indices=(1, -1), **TINY, **more).dump
    run = cli("verify", first, "--against", other, "--json")
    assert run.code == 4
    assert "it is not equal to" in run.err
    said = comparison_in(run)
    dumps = open_dump(first), open_dump(other)
    relative = []
    for found in said["outputs"]:
        ours, theirs = (dump[found["output"]][:][dump.valid].astype(np.float64) for dump in dumps)
        off = np.abs(ours - theirs)
        assert found["largest"] == off.max()
        assert found["mean"] == pytest.approx(off.mean(), rel=1e-9)
        assert found["magnitude"] == np.abs(ours).max()
        assert found["relative"] == pytest.approx(off.max() / np.abs(ours).max())
        assert found["key"] == np.array(dumps[0].keys)[dumps[0].valid][off.reshape(5, -1).max(1).argmax()]
        assert (found["rows"], found["values"]) == (5, ours.size)
        assert found["differing_rows"] == (off.reshape(5, -1).max(1) > 0).sum()
        relative.append(found["relative"])
    assert cli("verify", first, "--against", other, "--tolerance", max(relative) * 1.01).code == 0
    assert cli("verify", first, "--against", other, "--tolerance", max(relative) * 0.99).code == 4


def test_what_only_one_has_is_named(photos, first, tmp_path, cli):
    """Images, stages, shapes and failures of only one of the two are named, and are a difference."""
    folder = shutil.copytree(photos, tmp_path / "p")
    (folder / "0.png").unlink()
    draw(folder / "more.png", 7, (40, 32))
    draw(folder / "broken.jpg", 8, (40, 32))
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    options = TINY | {"image_size": 64, "out_indices": (2, -1)}
    other = featcli.extract(folder, output=tmp_path / "b", **options).dump
    run = cli("verify", first, "--against", other, "--tolerance", 1)
    assert run.code == 4
    for line in (
        f"stage1: only in {first}", f"stage2: only in {other}", f"1 image only in {first}, first 0.png",
        f"1 image only in {other}, first more.png", f"1 image failed only in {first}, first broken.jpg",
        f"1 image failed only in {other}, first 1.png", f"stage4: 96x1x1 in {first}, 96x2x2 in {other}",
    ):  # fmt: skip
        assert line in run.out
    found = comparison_in(cli("verify", first, "--against", other, "--json"))
    assert (found["is_equal"], found["images"], found["outputs"]) == (False, 3, [])
    assert found["only_in_dump"]["images"] == {"count": 1, "first": ["0.png"]}
    assert found["only_in_against"]["failed"] == {"count": 1, "first": ["1.png"]}
    assert found["shapes"] == {"stage4": [[96, 1, 1], [96, 2, 2]]}


def test_maps_of_many_sizes(photos, tmp_path, cli):
    """Maps that differ in size are compared image by image; one of another size is an infinite difference."""
    options = {**TINY, "fit": "native", "image_size": 64}
    one = featcli.extract(photos, output=tmp_path / "a", **options).dump
    two = featcli.extract(photos, output=tmp_path / "b", **options, shard_size=2).dump
    assert against(one, two).is_equal
    folder = shutil.copytree(photos, tmp_path / "p")
    Image.open(folder / "2.png").resize((64, 96)).save(folder / "2.png")
    three = featcli.extract(folder, output=tmp_path / "c", **{**options, "image_size": None}).dump
    (found,) = against(one, three).differences
    assert (found.differing_rows, found.key, found.largest, found.is_infinite) == (1, "2.png", LARGEST, True)
    assert "largest difference infinite, in 2.png" in cli("verify", one, "--against", three).out


@pytest.mark.parametrize(
    ("ours", "theirs", "differing", "largest", "total"),
    [
        ([1.0, np.nan], [1.0, np.nan], 0, 0, 0),
        ([1.0, np.nan], [1.0, 2.0], 1, LARGEST, 0),
        ([np.inf, 3.0], [np.inf, 2.5], 1, 0.5, 0.5),
        ([np.inf, 3.0], [-np.inf, 3.0], 1, LARGEST, 0),
        ([0.0, 0.0], [-0.0, 0.0], 1, 0, 0),
        ([1e38, 0.0], [-3e38, 0.0], 1, 4e38, 4e38),
    ],
)
def test_numbers_that_are_odd(ours, theirs, differing, largest, total):
    """NaN and infinity equal only themselves, a zero of another sign has other bits, and nothing overflows."""
    found = Difference("stage1")
    found.add(["a"], np.array([ours], np.float32), np.array([theirs], np.float32))
    assert (found.differing_rows, found.largest, found.total) == (
        differing,
        pytest.approx(largest, rel=1e-6),
        pytest.approx(total, rel=1e-6),
    )
    assert found.is_beyond(0.0) is bool(differing)
    assert found.is_beyond(0.99) is (largest / max(found.magnitude, 1e-30) > 0.99)


def test_memory_does_not_grow_with_the_dumps(photos, tmp_path):
    """Only a few blocks are in memory at a time, and only the first keys of missing images."""
    for number in range(NAMED + 3):
        draw(tmp_path / "p" / f"x{number}.png", number, (40, 32))
    dumps = [
        featcli.extract(where, output=tmp_path / name, **{**TINY, "image_size": 224}, out_indices="all").dump
        for where, name in ((tmp_path / "p", "a"), (tmp_path / "p", "b"), (photos, "c"))
    ]
    one, two = map(open_dump, dumps[:2])
    whole = sum(one[stage][:].nbytes for stage in one.stages)
    tracemalloc.start()
    assert compare(one, two).is_equal
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 4 * 1024**2 < whole * 3
    found = against(dumps[0], dumps[2])
    assert (found.only_in_dump.images.count, len(found.only_in_dump.images.first)) == (NAMED + 3, NAMED)


def test_what_cannot_be_compared(photos, first, tmp_path, cli):
    """A path that is no dump, or no complete one, ends with its own exit code."""
    assert cli("verify", first, "--against", tmp_path / "none").code == 2
    begun = shutil.copytree(first, tmp_path / "begun")
    (begun / "manifest.json").unlink()
    assert cli("verify", first, "--against", begun).code == 8
    for asked in (["--against", first], [photos, "--inputs"]):
        run = cli("verify", begun, *asked)
        assert (run.code, "nothing was compared: complete the dump first" in run.err) == (8, True)
