"""Check the order of rows, that a dump keeps it whatever the order of the next run, and which images are left out."""

import fnmatch
import io
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

import featcli
from conftest import draw, tree
from featcli.dump.folder import Dump
from featcli.dump.lock import FolderLock
from featcli.dump.writer import create
from featcli.errors import ConflictError, UsageError
from featcli.events import silent
from featcli.extraction.claim import BegunMeanwhileError, claim
from featcli.extraction.planning import prepare
from featcli.inputs.keys import KeyPattern, Keys, first_rows, missing_from
from featcli.inputs.listing import find
from featcli.inputs.storage import Storage
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import InputSpec

OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "image_size": 32, "threads": 1, "batch_size": 2}
OPTIONS |= {"shard_size": 2, "pool": "max"}
NAMES = ["b/2.png", "a.png", "b/1.png", "c.png", "b/0.png"]  # in no order
ODD = ["é.png", "日本.png", "", "sp ace/x.jpg", "\udcff.png", "a\nb.png", "a" * 300, "0", "dir/a[1].png"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Go to a folder with five pictures in `photos`, three of them in a tar, too."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(NAMES):
        draw(tmp_path / "photos" / name, number, (40, 32))
    with tarfile.open("three.tar", "w") as tar:
        for name in NAMES[:3]:
            tar.add(f"photos/{name}", f"t/{name}")
    return tmp_path


def keys(*inputs, **options):
    return [*find(InputSpec(**{"inputs": inputs, **options})).images.keys]


def listed(names, root="photos"):
    return {"files_from": names, "root": root}


def test_rows_are_in_the_order_of_the_list(here):
    """Row i is line i, from a file and from Python; a name that is listed again is left out and counted."""
    assert keys(**listed(NAMES)) == NAMES
    (here / "list").write_text("\n".join([NAMES[0], *NAMES, "./a.png", str(here / "photos/c.png")]))
    found = find(InputSpec(**listed("list")))
    assert (found.images.keys, found.repeated) == (NAMES, 3)
    assert [found.images[row].path for row in range(5)] == [f"photos/{name}" for name in NAMES]
    sizes = [(here / "photos" / name).stat().st_size for name in NAMES]
    assert [*found.images.sizes] == [found.images[row].bytes for row in range(5)] == sizes


def test_a_list_comes_after_folders_images_and_tars(here):
    """Folders and images are sorted by key, tars keep theirs and follow them, and listed names come last."""
    draw(here / "z.png", 9)
    draw(here / "y.png", 8)
    names = ["z.png", "photos/c.png", "y.png", "x.png"]
    assert keys("three.tar", "photos/b", "y.png", files_from=names) == [
        *("b/0.png", "b/1.png", "b/2.png", "y.png"),
        *(f"three/t/{name}" for name in NAMES[:3]),
        *("z.png", "photos/c.png", "x.png"),
    ]


def shuffled(names, seed=0):
    return random.Random(seed).sample(names, len(names))


@pytest.mark.parametrize("is_in_memory", [False, True])
def test_a_dump_is_resumed_in_any_order(here, is_in_memory):
    """The order of the dump stands: another order of the same images ends with the bytes of a run in one go."""

    def given(names):
        if not is_in_memory:
            return listed(names)
        return {"inputs": {name: np.asarray(Image.open(here / "photos" / name)) for name in names}}

    whole = tree(here / featcli.extract(**given(NAMES), output="whole", **OPTIONS).dump)
    assert featcli.open_dump("whole").keys == NAMES
    featcli.extract(**given(NAMES), output="d", **OPTIONS)
    for number, order in enumerate([NAMES, sorted(NAMES), NAMES[::-1], shuffled(NAMES)]):
        for path in ("manifest.json", "failures.jsonl", f"shards/0000{number % 3}.json"):
            (here / "d" / path).unlink()
        outcome = featcli.extract(**given(order), output="d", **OPTIONS)
        assert (outcome.extracted, tree(here / "d") == whole) == (2 if number % 3 < 2 else 1, True)


def test_a_dump_of_a_sorted_list_is_resumed(here):
    """A dump that an older featcli began, which sorted lists, is resumed with its list, also without images.jsonl."""
    featcli.extract(**listed(sorted(NAMES)), output="d", **OPTIONS)
    whole = tree(here / "d")
    (here / "d" / "manifest.json").unlink()
    assert featcli.extract(**listed(NAMES), output="d", **OPTIONS).extracted == 0
    (here / "d" / "images.jsonl").unlink()
    assert featcli.extract(**listed(NAMES), output="d", **OPTIONS).extracted == 0
    assert tree(here / "d") == whole


def test_inputs_in_another_order(here):
    """Tars and folders may be named in another order than that of the command that began the dump."""
    featcli.extract(["three.tar", "photos"], output="d", **OPTIONS)
    with tarfile.open("more.tar", "w") as tar:
        tar.add("photos/a.png", "a.png")
    featcli.extract(["three.tar", "more.tar"], output="tars", **OPTIONS)
    assert featcli.extract(["photos", "three.tar"], output="d", **OPTIONS).extracted == 0
    assert featcli.extract(["more.tar", "three.tar"], output="tars", **OPTIONS).extracted == 0
    assert featcli.open_dump("tars").keys[-1] == "more/a.png"


def test_a_changed_image_is_named_in_any_order(here):
    """A file that has changed is refused by its name, not one in its place of another order."""
    featcli.extract(**listed(NAMES), output="d", **OPTIONS)
    draw(here / "photos" / "b/1.png", 7, (90, 90))
    for order in (NAMES, NAMES[::-1]):
        with pytest.raises(ConflictError, match=r"1 image changed since its plan was made, first 'b/1\.png'"):
            featcli.extract(**listed(order), output="d", **OPTIONS)


def test_images_that_came_and_went_are_named(here):
    """If the set of keys differs, the first that is gone and the first that is new are named."""
    featcli.extract(**listed(NAMES[:4]), output="d", **OPTIONS)
    with pytest.raises(ConflictError, match=r"1 is gone, first 'a\.png'; 1 is new, first 'b/0\.png' \("):
        featcli.extract(**listed([*reversed(NAMES[2:]), NAMES[0]]), output="d", **OPTIONS)
    with pytest.raises(ConflictError, match=r"other images: 1 is new, first 'b/0\.png' \("):
        featcli.extract(**listed(NAMES[::-1]), output="d", **OPTIONS)


def test_another_process_begins_the_dump_in_another_order(here):
    """A run that finds a dump begun meanwhile, with its images in another order, takes that order and helps."""
    specs = [ExtractSpec(**listed(names), output="d", **OPTIONS) for names in (NAMES, NAMES[::-1])]
    jobs = [prepare(spec, None)[0] for spec in specs]
    assert jobs[0].plan.keys_digest != jobs[1].plan.keys_digest
    (here / "d").mkdir()
    with FolderLock(here / "d") as first, FolderLock(here / "d") as second:
        claim(jobs[0], specs[0], None, first)
        with pytest.raises(BegunMeanwhileError) as begun:
            claim(jobs[1], specs[1], None, second)
        again, _ = prepare(specs[1], Dump.existing(here / "d"), silent, begun.value.listing)
        assert claim(again, specs[1], Dump.existing(here / "d"), second).shards
    assert [*again.images.keys] == NAMES
    assert [again.images[row].path for row in range(5)] == [f"photos/{name}" for name in NAMES]


def test_the_list_of_another_plan_stays(here):
    """A process that begins a dump just after another one, without locks, leaves the other's list as it is."""
    jobs = [prepare(ExtractSpec(**listed(names), output="d", **OPTIONS), None)[0] for names in (NAMES, NAMES[::-1])]
    (here / "d").mkdir()
    assert [create(here / "d", job.plan, job.images) for job in jobs] == [True, False]
    assert Dump.existing(here / "d").keys() == NAMES
    assert sorted(path.name for path in (here / "d").iterdir()) == ["images.jsonl", "plan.json"]


def test_verify_takes_images_in_any_order(here, cli):
    """verify compares by key as extract does, when it computes images again and when it reads their files."""
    featcli.extract(**listed(NAMES), output="d", **OPTIONS)
    (here / "list").write_text("\n".join(shuffled(NAMES)))
    options = ["--recompute", "5", "-c", "test_resnet", "--random-init", "--files-from", "list", "--root", "photos"]
    run = cli("verify", "d", *options)
    assert (run.code, "5 equal bit for bit" in run.out + run.err) == (0, True), run.err
    run = cli("verify", "d", "--inputs", "--files-from", "list", "--root", "photos", "--exclude", "x")
    assert (run.code, "--exclude 'x': no key is like that" in run.err) == (0, True)


def test_keys_are_texts():
    """Keys give back every name that a file can have, by row and in order, as a list does."""
    found = Keys(ODD)
    assert found == Keys(ODD) == [*found] == ODD
    assert (found[-1], found[2:5], found.taken([3, 0, 3])) == (ODD[-1], ODD[2:5], [ODD[3], ODD[0], ODD[3]])
    assert (found == ODD[1:], found == [*ODD[1:], ""], Keys() == [], "日本.png" in found) == (False, False, True, True)
    assert found.longest == 300
    many = [*ODD, "zero\0byte"] * 300  # more than are turned into text at once
    assert [*Keys(many)] == many
    with pytest.raises(IndexError):
        found[len(ODD)]


@pytest.mark.parametrize("has_collisions", [False, True])
def test_the_same_keys_are_found(monkeypatch, has_collisions):
    """Each row is paired with the first of its key, and rows of other keys are told apart even if hashes are equal."""
    if has_collisions:
        monkeypatch.setattr(Keys, "hashes", lambda self: iter([len(key) % 2 for key in self]))
    draws = random.Random(0)
    for _ in range(50):
        one, two = (draws.choices("abcdefgh", k=draws.randrange(9)) for _ in range(2))
        both = one + two
        assert first_rows(Keys(one), Keys(two)).tolist() == [both.index(key) for key in both]
        assert first_rows(Keys(both)).tolist() == [both.index(key) for key in both]
        assert missing_from(Keys(one), Keys(two)) == [key for key in two if key not in one]


PATTERNS = ["b/*", "*.png", "*", "?.png", "b/[01].png", "[!b]*", "a", "b/1", "A.png", "*/*", "dir/a[1].png", "c.*", ""]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_one_of_fnmatch(pattern):
    """A pattern fits a key, or a key without suffix, as fnmatch has it, or if it is the key to the letter."""
    for key in [*NAMES, *ODD]:
        stem = key.rpartition(".")[0] if "." in key.rpartition("/")[2] else key
        expected = pattern in (key, stem) or any(fnmatch.fnmatchcase(one, pattern) for one in (key, stem))
        assert KeyPattern(pattern).fits(key) == expected, key


def kinds_of_input(here):
    """Return options that name the same five pictures in different ways, and the beginning of their keys."""
    import fsspec

    with tarfile.open("all.tar", "w") as tar:
        for name in NAMES:
            tar.add(f"photos/{name}", name)
    web = fsspec.filesystem("memory")
    for name in NAMES:
        web.pipe(f"/order/photos/{name}", (here / "photos" / name).read_bytes())
    (here / "list").write_text("\n".join(NAMES))
    return {
        "folder": {"inputs": "photos"},
        "files": {"inputs": [f"photos/{name}" for name in NAMES]},
        "tar": {"inputs": "all.tar"},
        "list": listed("list"),
        "names": listed(NAMES),
        "folder of a server": {"inputs": "memory://order/photos"},
        "files of a server": {"inputs": [f"memory://order/photos/{name}" for name in NAMES]},
        "listed URLs": listed(NAMES, "memory://order/photos"),
    }


def test_what_is_excluded_is_not_there(here):
    """--exclude leaves out what fits one of its patterns, of every kind of input, and --limit takes the first rows."""
    for kind, options in kinds_of_input(here).items():
        all_keys = keys(**options)
        for patterns in ("b/*", ["*1*"], ["[a-z]", "*2*", "no such"]):
            wanted = [patterns] if isinstance(patterns, str) else patterns
            left = [key for key in all_keys if not any(KeyPattern(one).fits(key) for one in wanted)]
            found = find(InputSpec(**options, exclude=patterns))
            assert [*found.images.keys] == left, kind
            assert found.excluded == len(all_keys) - len(left)
            assert [key for key in found.idle if any(KeyPattern(key).fits(one) for one in all_keys)] == []
            for limit in (1, 2, 99):
                assert keys(**options, exclude=patterns, limit=limit) == left[:limit], kind


def test_nothing_is_asked_about_other_files(here, monkeypatch):
    """The size of a file is not asked for if it is excluded, nor that of a listed one behind the limit."""
    asked, real = [], Storage.size_of
    monkeypatch.setattr(Storage, "size_of", lambda self, path: asked.append(path) or real(self, path))
    assert keys("photos", exclude="b/*") == ["a.png", "c.png"]
    assert sorted(asked) == ["photos/a.png", "photos/c.png"]
    asked.clear()
    assert keys(**listed(NAMES), exclude="*2*", limit=2) == NAMES[1:3]
    assert asked == [f"photos/{name}" for name in NAMES[1:3]]
    asked.clear()
    assert keys("photos/a.png", "photos/c.png", exclude="c.png") == ["a.png"]
    assert asked == ["photos/a.png"]


def test_the_run_says_what_it_left_out(here, cli):
    """The line `images` counts what is excluded and says that there are more; an idle pattern is one warning."""
    run = cli("extract", "photos", "-o", "d", "-c", "test_resnet", "--dry-run", "--exclude", "b/1*", "--limit", 3)
    assert "images         3  (1 excluded; the first of 4)" in run.err
    run = cli("extract", "photos", "-o", "d", "-c", "test_resnet", "--dry-run", "--exclude", "x*", "--exclude", "y")
    assert run.err.count("warning: --exclude 'x*', 'y': no key is like that, so it excludes nothing\n") == 1
    facts = []
    report = lambda kind, **one: facts.append(one) if (kind, one.get("name")) == ("choice", "images") else None  # noqa: E731
    featcli.extract("photos", output="d", exclude=["b/*"], limit=1, report=report, **OPTIONS)
    assert (facts[0]["value"], facts[0]["excluded"]) == (1, 3)
    assert featcli.open_dump("d").keys == ["a.png"]
    assert featcli.extract("photos/a.png", output="d", **OPTIONS).extracted == 0  # the keys alone are the identity


def test_the_run_says_how_many_listed_files_are_not_there(here, cli):
    """The line `images` counts listed files that are not there before anything is computed, and no URLs."""
    (here / "l").write_text("photos/a.png\nphotos/none.png\nphotos/b\nmemory://bucket/c.png\n")
    (here / "t.csv").write_text("path\nphotos/a.png\nphotos/none.png\n")
    for options, said in (
        (["--files-from", "l"], "4  (2 files not there)"),
        (["--table", "t.csv"], "2  (1 file not there)"),
    ):
        run = cli("extract", *options, "-o", "d", "-c", "test_resnet", "--dry-run")
        assert f"images         {said}\n" in run.err


def test_exclusions_that_leave_nothing(here):
    """A pattern that excludes all images is refused, and so are an empty one, and both options beside pictures."""
    with pytest.raises(UsageError, match="--exclude leaves no image: 5 images would be there without it"):
        keys("photos", exclude="*")
    with pytest.raises(UsageError, match="--exclude is empty"):
        keys("photos", exclude=["a", ""])
    for option in ({"exclude": "a"}, {"limit": 1}):
        with pytest.raises(UsageError, match=f"--{next(iter(option))} cannot be used with pictures in memory"):
            featcli.extract(np.zeros((8, 8), np.uint8), keys="a", output="d", **option, **OPTIONS)


def test_a_name_that_no_file_can_have(here):
    """A listed name that cannot be encoded is refused with its name."""
    with pytest.raises(UsageError, match="it has a character that no name can have"):
        keys(files_from=["a.png", "\ud800.png"])


def test_a_list_from_stdin_in_another_order(here, monkeypatch):
    """`find | featcli extract --files-from -` resumes though find has another order now."""
    for number, order in enumerate((NAMES, NAMES[::-1])):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(order).encode())))
        outcome = featcli.extract(files_from="-", root="photos", output="d", **OPTIONS)
        assert outcome.extracted == (0 if number else 5)
