"""Read hostile dumps: whatever their files hold, reading ends with maps or with a FeatcliError."""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featcli
from conftest import draw, little_memory
from featcli import open_dump
from featcli.dump.checksummed_json import CHECKSUM, checksummed
from featcli.dump.verify import verify
from featcli.errors import FeatcliError
from featcli.views.inspection import inspect_dump

MAX_GROWTH = 512 << 20  # bytes that reading hostile files may add to a process
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "120")),  # make torture asks for more
    deadline=10_000,  # milliseconds for one input
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "../../etc/passwd", "stage4", "hdf5", "\udc80", "a\x00b"]), st.just([]), st.just({}),
    st.just([[0] * 3] * 3), st.just({"a": {"b": []}}),
)  # fmt: skip


@pytest.fixture(scope="module", params=["hdf5", "safetensors"])
def made(request, tmp_path_factory):
    """Make a dump of five pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("fuzz")
    for i in range(5):
        draw(folder / "photos" / f"{i}.png", i, (32, 32))
    (folder / "photos" / "3.png").write_bytes(b"")
    options = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 2, "shard_size": 2, "pool": "avg"}
    featcli.extract(folder / "photos", output=folder / "d", format=request.param, **options)
    return folder / "d"


@pytest.fixture(autouse=True, scope="module")
def bounded():
    """Check that reading takes little memory, whatever the files claim to hold."""
    with little_memory(MAX_GROWTH):
        yield


def read_all(folder):
    """Read a dump in every way. FeatcliError is an answer; anything else is a bug."""
    answers = []
    for read in (_maps, _keys, _failures, _valid, inspect_dump, verify):
        try:
            answers.append(read(folder))
        except FeatcliError as error:
            answers.append(error)
    return answers


def _maps(folder):
    dump = open_dump(folder, incomplete=True)
    return [dump[stage][:2].shape for stage in dump.stages]


def _keys(folder):
    return open_dump(folder, incomplete=True).keys


def _failures(folder):
    return open_dump(folder, incomplete=True).failures


def _valid(folder):
    return open_dump(folder, incomplete=True).valid.sum()


@FUZZ
@given(data=st.data())
def test_any_bytes(made, tmp_path_factory, data):
    """Overwritten, missing or inserted bytes in any file of a dump give maps or a FeatcliError."""
    folder = tmp_path_factory.mktemp("d") / "d"
    shutil.copytree(made, folder)
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content)))
    cut = data.draw(st.sampled_from([0, 1, 4, 8, 100, len(content)]))
    path.write_bytes(content[:place] + data.draw(st.binary(max_size=16)) + content[place + cut :])
    read_all(folder)
    shutil.rmtree(folder)


ODD_BYTES = st.one_of(st.sampled_from([0, 1, 2, 6, 9, 0x19, 0x7F, 0x80, 0xFF]), st.integers(0, 255))


@FUZZ
@given(data=st.data())
def test_any_header(made, tmp_path_factory, data):
    """Overwritten bytes in the header of a shard file make no reader crash or wait for ever."""
    folder = tmp_path_factory.mktemp("d") / "d"
    shutil.copytree(made, folder)
    path = next(path for path in sorted((folder / "shards").iterdir()) if path.suffix != ".json")
    content = bytearray(path.read_bytes())
    told = [place for place, byte in enumerate(content[:20_000]) if byte]
    for place in data.draw(st.lists(st.sampled_from(told), min_size=1, max_size=4)):
        content[place] = data.draw(ODD_BYTES)
    path.write_bytes(content)
    read_all(folder)
    shutil.rmtree(folder)


def places(content, above=()):
    """Yield the path of every value in JSON content."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


@FUZZ
@given(data=st.data())
def test_any_values(made, tmp_path_factory, data):
    """Odd values in a plan, record or manifest, sealed with a right checksum, give maps or a FeatcliError."""
    folder = tmp_path_factory.mktemp("d") / "d"
    shutil.copytree(made, folder)
    path = data.draw(st.sampled_from(sorted(folder.rglob("*.json"))))
    content = json.loads(path.read_bytes())
    del content[CHECKSUM]
    *above, last = data.draw(st.sampled_from(list(places(content))))
    owner = content
    for key in above:
        owner = owner[key]
    owner[last] = data.draw(ODD)
    if path.name == "plan.json" and data.draw(st.booleans()):
        content["fingerprint"] = _fingerprint(content)
        for record in (folder / "shards").glob("*.json"):  # so that these are read, too
            said = json.loads(record.read_bytes())
            del said[CHECKSUM]
            record.write_bytes(checksummed({**said, "fingerprint": content["fingerprint"]}))
    path.write_bytes(checksummed(content))
    read_all(folder)
    shutil.rmtree(folder)


def _fingerprint(content):
    from featcli.dump.checksummed_json import hash_json

    left_out = ("fingerprint", "images_digest", "provenance", "environment")
    return hash_json({name: value for name, value in content.items() if name not in left_out})


@pytest.mark.parametrize("number", [0.0, False])
@pytest.mark.parametrize("name", ["shard", "first_row"])
def test_numbers_that_are_equal_to_whole_ones(made, tmp_path, name, number):
    """A record that says 0.0 or false in place of 0 is damaged for every reader."""
    shutil.copytree(made, tmp_path / "d")
    path = tmp_path / "d" / "shards" / "00000.json"
    content = json.loads(path.read_bytes())
    del content[CHECKSUM]
    path.write_bytes(checksummed({**content, name: number}))
    (tmp_path / "d" / "manifest.json").unlink()
    assert [damage.file for damage in verify(tmp_path / "d").damages] == ["shards/00000.json"]
