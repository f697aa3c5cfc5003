"""Check runs that meet while a dump grows: those that make the same generation, another one, or mend the dump."""

import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from conftest import draw, tree
from featcli import extract, open_dump
from featcli.dump.lock import FolderLock
from featcli.dump.verify import repair, verify
from featcli.dump.writer import reopen
from featcli.errors import ConflictError, DamagedError, FeatcliError, MachineError
from featcli.extraction import extract as module

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "pool": "avg", "threads": 1}
OPTIONS |= {"batch_size": 2, "shard_size": 2, "decode_threads": 1}
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "random_init"]
WORDS.append("--random-init")
FIRST, NEW, OTHERS = ("b.png", "d.png"), ("a.png", "c.png", "e.png"), ("f.png", "g.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with `first`, `new` and `others`, which hold pictures, and a dump `d` of the first."""
    made = tmp_path_factory.mktemp("made")
    for folder, names in {"first": FIRST, "new": FIRST + NEW, "others": FIRST + OTHERS}.items():
        for name in names:
            draw(made / folder / name, ord(name[0]), (40, 40))
    extract(made / "first", output=made / "d", **OPTIONS)
    return made


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made / "d", tmp_path / "d")


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request, monkeypatch):
    """Say whether the file system has locks."""
    if not request.param:
        monkeypatch.setattr(FolderLock, "_take", lambda lock, kind: setattr(lock, "is_real", False) or True)
    return request.param


class Killed(BaseException):
    """Stands for a kill."""


@contextmanager
def at_work(folder, path, **options):
    """Begin a run, and hold it at its first shard inside the block. Yields a list that has its outcome afterwards."""
    begun, release, outcomes = threading.Event(), threading.Event(), []

    def report(kind, **_):
        if kind == "start":
            begun.set()
            assert release.wait(60)

    def work():
        try:
            outcomes.append(extract(folder, output=path, report=report, **OPTIONS | options))
        except FeatcliError as error:
            outcomes.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    try:
        yield outcomes
    finally:
        release.set()
        thread.join()


def begun_just_before(monkeypatch, other):
    """Let another run begin after the next one has looked for what is there, and before it claims it."""
    claim, entered = module.claim, []

    def after(*arguments):
        monkeypatch.setattr(module, "claim", claim)
        entered.append(other.__enter__())
        return claim(*arguments)

    monkeypatch.setattr(module, "claim", after)
    return entered


@pytest.mark.parametrize("meet", ["before", "meanwhile"])
def test_the_same_new_images(made, path, locks, meet, monkeypatch):
    """A run joins the generation of another one that found the same images; both end, and it exists once."""
    other = at_work(made / "new", path, extend=True)
    entered = begun_just_before(monkeypatch, other) if meet == "meanwhile" else [other.__enter__()]
    joined = extract(made / "new", output=path, extend=True, **OPTIONS)
    assert (joined.is_complete, joined.written) == (True, 5)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *NEW]
    before = tree(path)
    other.__exit__(None, None, None)
    assert [one.is_complete for one in entered[0]] == [True]
    assert tree(path) == before


@pytest.mark.parametrize("meet", ["before", "meanwhile"])
def test_other_new_images(made, path, meet, monkeypatch):
    """A run with other images is refused while the first is at work, also if neither saw the other when it began."""
    other = at_work(made / "new", path, extend=True)
    entered = begun_just_before(monkeypatch, other) if meet == "meanwhile" else [other.__enter__()]
    with pytest.raises(ConflictError, match="it is in use by another process"):
        extract(made / "others", output=path, extend=True, **OPTIONS)
    other.__exit__(None, None, None)
    assert [one.is_complete for one in entered[0]] == [True]
    extract(made / "others", output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *NEW, *OTHERS]
    assert verify(path).state == "whole"


@pytest.mark.parametrize("meet", ["before", "meanwhile"])
def test_other_images_for_a_new_dump(made, tmp_path, meet, monkeypatch):
    """The first generation is no exception: a run that finds other images is refused until it is there."""
    path = tmp_path / "new"
    other = at_work(made / "first", path, extend=True)
    entered = begun_just_before(monkeypatch, other) if meet == "meanwhile" else [other.__enter__()]
    with pytest.raises(ConflictError, match="it is in use by another process"):
        extract(made / "new", output=path, extend=True, **OPTIONS)
    other.__exit__(None, None, None)
    assert [one.is_complete for one in entered[0]] == [True]
    extract(made / "new", output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *NEW]


def test_images_of_other_folders_are_no_failures(made, path, tmp_path, monkeypatch):
    """An unfinished generation is not finished by a run that cannot see its images: it would record them as gone."""
    days = [tmp_path / "day1", tmp_path / "day2"]
    for day, names in zip(days, (NEW, OTHERS), strict=True):
        for name in names:
            draw(day / name, ord(name[0]), (40, 40))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract(days[0], output=path, extend=True, **OPTIONS)
    before = tree(path)
    with pytest.raises(ConflictError, match="unfinished, and 3 images of it are not given"):
        extract(days[1], output=path, extend=True, **OPTIONS)
    assert tree(path) == before
    extract(days[0], output=path, extend=True, **OPTIONS)
    extract(days[1], output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert (dump.keys, dump.valid.all()) == ([*FIRST, *NEW, *OTHERS], True)


def test_what_needs_the_dump_alone(made, path):
    """While a generation is made nobody deletes or repairs the dump, or tries failures again: exit code 5."""
    shard = path / "shards" / "00000.h5"
    with at_work(made / "new", path, extend=True) as outcomes:
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        verdict = verify(path)
        assert {damage.file for damage in verdict.damages} == {"shards/00000.h5"}
        with pytest.raises(ConflictError, match="in use"):
            repair(verdict)
        with pytest.raises(ConflictError, match="in use"):
            extract(made / "first", output=path, overwrite=True, **OPTIONS)
    assert outcomes[0].is_complete
    repair(verify(path))
    extract(made / "new", output=path, extend=True, **OPTIONS)  # a damaged first generation is mended, too
    assert verify(path).state == "whole"


def test_a_first_generation_that_lost_a_file(made, path):
    """--extend makes a shard again whose file is gone, for which it needs the dump alone."""
    whole = tree(path)
    (path / "manifest.json").unlink()
    (path / "shards" / "00000.h5").unlink()
    extract(made / "new", output=path, extend=True, **OPTIONS)
    assert {name: tree(path)[name] for name in whole if name != "manifest.json"} == {
        name: content for name, content in whole.items() if name != "manifest.json"
    }
    assert verify(path).state == "whole"


def test_parts_complete_generations_in_any_order(made, path, tmp_path):
    """A part that ends before others does not call the dump complete, though its own generation is."""
    extract(made / "new", output=path, extend=True, **OPTIONS)
    whole = tree(path)
    for below in (path, path / "more" / "00001"):
        for shard in (below / "shards").glob("*.h5"):
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    repair(verify(path))
    first = extract(made / "new", output=path, part="1/2", **OPTIONS)
    assert not first.is_complete
    assert verify(path).state == "incomplete"
    assert extract(made / "new", output=path, part="0/2", **OPTIONS).is_complete
    assert {name: content for name, content in tree(path).items() if "damaged" not in name} == whole


def test_a_commit_while_the_dump_is_verified(made, path):
    """A generation that joins the dump while it is verified is no damage."""

    def report(kind, **_):
        if kind == "batch" and not (path / "more").exists():
            extract(made / "new", output=path, extend=True, **OPTIONS)

    assert verify(path, report).state == "whole"
    assert verify(path).images == 5


@pytest.mark.parametrize("moment", ["reopened", "completed"])
def test_a_generation_that_is_made_again(made, path, moment, monkeypatch):
    """A kill between the manifests of a generation and of the dump leaves an incomplete dump, not a damaged one."""
    broken = made / "new" / "c.png"
    good = broken.read_bytes()
    broken.write_bytes(b"broken")
    extract(made / "new", output=path, extend=True, **OPTIONS)
    broken.write_bytes(good)
    with monkeypatch.context() as patch:

        def killed(dump, *_):
            if moment == "reopened":
                reopen(dump)
            raise Killed

        patch.setattr(module, {"completed": "commit", "reopened": "reopen"}[moment], killed)
        with pytest.raises(Killed):
            extract(made / "new", output=path, retry_failed=True, **OPTIONS)
    assert verify(path).state == "incomplete"
    extract(made / "new", output=path, retry_failed=True, **OPTIONS)
    assert verify(path).state == "whole"
    with open_dump(path) as dump:
        assert dump.valid.all()


def test_the_folder_of_a_generation_is_no_target(made, path):
    """A generation is not extracted into by itself."""
    extract(made / "new", output=path, extend=True, **OPTIONS)
    for name in ("00001", "00002"):
        with pytest.raises(ConflictError, match="this folder is for a generation of dump"):
            extract(made / "new", output=path / "more" / name, **OPTIONS)
    with open_dump(path / "more" / "00001") as dump:
        assert (dump.keys, np.isfinite(dump["stage4"][:]).all()) == ([*NEW], True)


def test_what_lies_among_generations(made, path, cli):
    """Whatever is among the generations and is none is named and left alone; failures are where it is said."""
    broken = made / "new" / "c.png"
    good = broken.read_bytes()
    broken.write_bytes(b"broken")
    ran = cli("extract", made / "new", "-o", path, "--extend", *WORDS)
    broken.write_bytes(good)
    assert f"see {path}/more/00001/failures.jsonl" in ran.err.splitlines()
    shutil.copytree(path / "more" / "00001", path / "more" / "00007")
    shutil.copytree(path / "more" / "00001", path / "more" / "00001.bak")
    verdict = cli("verify", path, "--json").events[0]
    assert (verdict["state"], verdict["foreign_files"]) == (
        "whole",
        [
            {"file": "more/00001.bak", "what": "no name that featcli gives"},
            {"file": "more/00007", "what": "the dump has only 2 generations"},
        ],
    )
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *NEW]
    shutil.rmtree(path / "more" / "00007")
    shutil.copytree(path / "more" / "00001", path / "more" / "00002")
    with pytest.raises(ConflictError, match=r"00002' is not a generation of it"):
        extract(made / "others", output=path, extend=True, **OPTIONS)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_place_for_generations_that_is_none(made, path, tmp_path, kind):
    """A file called `more` ends the run, and a folder behind a link is used, and never emptied by --overwrite."""
    before = tree(path)
    if kind == "file":
        (path / "more").write_text("mine")
        with pytest.raises(MachineError, match="Not a directory"):
            extract(made / "new", output=path, extend=True, **OPTIONS)
        assert tree(path) == before | {"more": b"mine"}
        return
    (tmp_path / "elsewhere").mkdir()
    (path / "more").symlink_to(tmp_path / "elsewhere")
    extract(made / "new", output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *NEW]
    with pytest.raises(ConflictError, match="its more folder is a link"):
        extract(made / "new", output=path, overwrite=True, **OPTIONS)


def test_machines_without_a_shared_folder(made, path, cli):
    """Parts of a generation that were made in copies of the dump are copied together, and finalize makes it a part."""
    here, there = path, shutil.copytree(path, path.with_name("there"))
    extract(made / "new", output=here, extend=True, part="0/2", **OPTIONS)
    (there / "more" / "00001" / "shards").mkdir(parents=True)
    for name in ("plan.json", "images.jsonl"):
        shutil.copy(here / "more" / "00001" / name, there / "more" / "00001" / name)
    extract(made / "new", output=there, extend=True, part="1/2", **OPTIONS)
    for file in (there / "more" / "00001" / "shards").iterdir():
        shutil.copy(file, here / "more" / "00001" / "shards")
    with open_dump(here) as dump:
        assert dump.keys == [*FIRST]
    assert cli("finalize", here).code == 0
    with open_dump(here) as dump:
        assert dump.keys == [*FIRST, *NEW]
    assert verify(here).state == "whole"


@pytest.mark.parametrize(("below", "harm", "extend"), [("", "cut", False), ("more/00001", "gone", True)])
def test_a_damaged_list(made, path, cli, below, harm, extend):
    """verify says that extract writes the list of a generation again, and that is what it does."""
    extract(made / "new", output=path, extend=True, **OPTIONS)
    whole, file = tree(path), path / below / "images.jsonl"
    content = file.read_bytes()
    file.unlink() if harm == "gone" else file.write_bytes(content[:-4])
    assert cli("verify", path).code == 4
    assert cli("verify", path, "--repair").code == 4
    extract(made / "new", output=path, extend=extend, **OPTIONS)
    assert tree(path) == whole
    assert verify(path).state == "whole"
    file.write_bytes(b"{}")
    with pytest.raises(DamagedError, match=r"images\.jsonl is"):
        extract(made / "others", output=path, extend=extend, **OPTIONS)


def test_a_damaged_list_of_a_generation_that_was_begun(made, path, monkeypatch):
    """The list of a generation that is no part of the dump yet is written again, too."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            extract(made / "new", output=path, extend=True, **OPTIONS)
    (path / "more" / "00001" / "images.jsonl").write_bytes(b"")
    extract(made / "new", output=path, extend=True, **OPTIONS)
    with open_dump(path) as dump:
        assert dump.keys == [*FIRST, *NEW]
    assert verify(path).state == "whole"


def test_damaged_columns(made, tmp_path):
    """The cells of a generation are written again from the table, as those of a dump that has not grown."""
    table, path = tmp_path / "table.csv", tmp_path / "d"
    for names in (FIRST, FIRST + NEW):
        table.write_text("path,n\n" + "".join(f"{name},{ord(name[0])}\n" for name in names))
        extract(table=table, root=made / "new", output=path, extend=True, **OPTIONS)
    whole = tree(path)
    (path / "more" / "00001" / "columns.jsonl").write_bytes(b"{}\n")
    assert {damage.file.rpartition("/")[2] for damage in verify(path).damages} == {"columns.jsonl"}
    extract(table=table, root=made / "new", output=path, **OPTIONS)
    assert tree(path) == whole
    with open_dump(path) as dump:
        assert dump.columns["n"].tolist() == [ord(key[0]) for key in dump.keys]
