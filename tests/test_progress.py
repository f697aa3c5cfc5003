"""Check how far a run says it is: lines and events once a minute, what is safe, and what failed."""

import ast
import inspect
import io
import re
import traceback

import pytest

import featcli
from conftest import REPOSITORY
from featcli.cli.terminal import Terminal
from featcli.errors import MachineError
from featcli.events import Report
from featcli.run import progress as progress_module
from featcli.run.progress import ProgressBar, ProgressReport
from featcli.workers.shard_progress import ShardProgress

TINY = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 4, "image_size": 32}
OPTIONS = "-c test_resnet --random-init --batch-size 4 --shard-size 4 --image-size 32".split()


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Told(list):
    """A report that remembers events."""

    def __call__(self, kind, **facts):
        self.append((kind, facts))

    def of(self, kind):
        """Return the facts of the events of one kind."""
        return [facts for one, facts in self if one == kind]


@pytest.fixture
def run(monkeypatch):
    """Make a run that has just begun, what it reports, and its clock. It does not wait for rows to be kept."""
    monkeypatch.setattr(progress_module, "GRACE", 0.0)
    told, clock = Told(), Clock()
    report = ProgressReport(told, clock)
    report("start", images=1000, done=100, shards=9, bytes=9000)

    def passes(seconds, kind, **facts):
        clock.now += seconds
        report(kind, **facts)
        return told[-1]

    passes.told = told
    return passes


def test_progress_once_a_minute(run):
    """Every event is passed on, and with the first batch after each minute `progress` follows, in numbers."""
    for _ in range(11):
        run(15, "batch", images=30)
    assert [kind for kind, _ in run.told].count("batch") == 11
    first, second = run.told.of("progress")
    assert first == {
        "images": 1000, "done": 220, "safe": 100, "failed": 0, "images_per_second": 2.0, "seconds": 60.0,
        "seconds_left": 390.0,
    }  # fmt: skip
    assert (second["done"], second["seconds"], second["images_per_second"]) == (340, 120.0, 2.0)


def test_progress_waits_for_rows_that_are_being_kept(run, monkeypatch):
    """The line of a minute comes when its rows are on the disk, or soon after if none are put there."""
    monkeypatch.setattr(progress_module, "GRACE", 10.0)
    run(61, "batch", images=30)
    run(1, "kept", shard=2, rows=25)
    assert [(facts["seconds"], facts["safe"]) for facts in run.told.of("progress")] == [(62.0, 125)]
    run(65, "batch", images=30)
    run(6, "batch", images=30)
    assert [facts["seconds"] for facts in run.told.of("progress")] == [62.0, 133.0]


def test_what_was_not_computed_is_no_pace(run):
    """Rows of a resumed shard, and shards of other processes, are done but never count for the rate."""
    run(5, "batch", images=4)
    run(1, "resumed", shard=3, rows=300)
    run(1, "there", shard=5, rows=200, images=200)
    assert run(58, "batch", images=60) == (
        "progress",
        {"images": 1000, "done": 664, "safe": 600, "failed": 0, "images_per_second": 1.0, "seconds": 65.0,
         "seconds_left": 336.0},
    )  # fmt: skip


def test_loading_is_no_pace(run):
    """Time before the first batch, such as that of loading workers, counts for the pace only if there is one batch."""
    slow = run(100, "batch", images=50)
    assert slow[1]["images_per_second"] == 0.5
    assert run(60, "batch", images=600)[1]["images_per_second"] == 10


def test_the_pace_is_that_of_the_last_minutes(run):
    """A run that has become slower says so within some minutes."""
    for _ in range(3):
        run(60, "batch", images=100)
    for _ in range(7):
        _, facts = run(60, "batch", images=6)
    assert facts["images_per_second"] == 0.1


def test_what_is_safe(run):
    """Committed shards are safe, and rows of others that are on the disk, but not rows that are only computed."""
    run(10, "batch", images=90)
    run(1, "kept", shard=1, rows=60)
    run(1, "kept", shard=2, rows=10)
    assert run(60, "batch", images=10)[1]["safe"] == 170
    run(1, "kept", shard=1, rows=90)  # all rows of the shard, and not the sum of both
    run(1, "shard", shard=1, file="00001.h5", rows=100, bytes=10, failed=0)
    run(1, "failure", key="a", row=3, reason="empty", detail="")
    run(1, "there", shard=2, rows=100, images=0)  # another was faster: these batches were counted before
    facts = run(60, "batch", images=100)[1]
    assert (facts["done"], facts["safe"], facts["failed"]) == (300, 300, 1)


@pytest.mark.parametrize(
    ("events", "done", "safe"),
    [
        ([], 170, 170),
        ([("resumed", {"shard": 4, "rows": 50})], 170, 170),
        ([("resumed", {"shard": 4, "rows": 30})], 150, 150),  # the other rows are made again
        ([("kept", {"shard": 4, "rows": 0}), ("resumed", {"shard": 4, "rows": 0})], 120, 120),  # they were of no use
        ([("resumed", {"shard": 4, "rows": 0}), ("batch", {"images": 10})], 130, 170),  # another process makes it
        ([("there", {"shard": 4, "rows": 100, "images": 100})], 220, 220),
        ([("there", {"shard": 4, "rows": 100, "images": 100}), ("resumed", {"shard": 7, "rows": 20})], 220, 220),
    ],
)
def test_rows_that_wait_to_be_taken_up(events, done, safe):
    """Rows that other runs have put on the disk are safe and done from the start, and counted once."""
    report, stream = ProgressReport(Told(), Clock()), io.StringIO()
    stream.isatty = lambda: True
    bar = ProgressBar(stream)
    found = [{"shard": 4, "kept": 50, "rows": 100}, {"shard": 7, "kept": 20, "rows": 100}]
    start = ("start", {"images": 1000, "done": 100, "shards": 9, "bytes": 9000, "unfinished_shards": found})
    for kind, facts in (start, *events):
        report(kind, **facts)
        bar.hear(kind, **facts)
    assert (report.progress.done, report.progress.safe) == (done, safe)
    assert bar._bar.format_dict["n"] == done
    assert report.progress.bytes_left == 10 * (1000 - done)
    bar.close()


def test_a_worker_that_dies(run):
    """Images that a dead worker did not commit are not done; rows on the disk stay safe for the next worker."""
    from featcli.dump.plan import Outline

    plan = Outline(outputs=(), num_images=1000, keys_digest="", shard_rows=100)
    worker, other = (ShardProgress(plan, lambda kind, **facts: run(1, kind, **facts)) for _ in range(2))
    assert worker.hear("resumed", {"shard": 4, "rows": 30}) is None  # the shard is not committed yet
    worker.hear("batch", {"images": 40})
    assert worker.hear("kept", {"shard": 4, "rows": 60}) is None
    worker.take_back()
    done, safe = (run(60, "batch", images=0)[1][name] for name in ("done", "safe"))
    assert (done, safe) == (100, 160)
    other.hear("resumed", {"shard": 4, "rows": 60})
    other.hear("batch", {"images": 40})
    assert other.hear("shard", {"shard": 4, "rows": 100}) == 4
    other.take_back()  # nothing is left to take back
    done, safe = (run(60, "batch", images=0)[1][name] for name in ("done", "safe"))
    assert (done, safe) == (200, 200)


@pytest.mark.parametrize(("images", "expected"), [(20, [{"images": 860, "bytes": 8600}]), (400, [])])
def test_a_long_run_begins_with_an_estimate(run, images, expected):
    """A run that will take more than a minute says once what is left, at the pace of the first batches."""
    for _ in range(3 if images == 20 else 2):
        run(6, "batch", images=images)
    found = run.told.of("estimate")
    assert [{name: facts[name] for name in ("images", "bytes")} for facts in found] == expected
    assert [(facts["seconds"], facts["images_per_second"]) for facts in found] == [(258.0, 3.333)][: len(found)]


def shown(*events, is_terminal=False, **options):
    """Return what a terminal, or a pipe, shows of events."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    terminal = Terminal(stream=stream, **options)
    for kind, facts in events:
        terminal(kind, **facts)
    terminal.close()
    return stream.getvalue()


START = ("start", {"images": 15010, "done": 0, "shards": 4, "bytes": 123456789})
PROGRESS = ("progress", {
    "images": 15010, "done": 3008, "safe": 2944, "failed": 2, "images_per_second": 20.4567, "seconds": 60.0,
    "seconds_left": 586.7,
})  # fmt: skip


def test_lines_without_a_terminal():
    """A log gets a line a minute and the estimate; a terminal has its bar instead."""
    line = "3,008 of 15,010 images (20%), 2,944 safe, 2 failed, 20.5 images/s, 9.8 min left\n"
    assert shown(START, PROGRESS) == line
    assert line not in shown(START, PROGRESS, is_terminal=True)
    estimate = {"images": 14986, "seconds": 733.7, "bytes": 123456789, "images_per_second": 20.4567}
    expected = "expected       14,986 more images in 12.2 min, 123 MB  (20.5 images/s; "
    kill = "a kill costs at most a minute of it and the batches at hand)\n"
    assert shown(START, ("estimate", estimate)) == expected + kill
    short = shown(START, ("estimate", {**estimate, "images": 1, "seconds": 61.0}))  # a minute is nearly all of it
    assert short == "expected       1 more image in 61 s, 123 MB  (20.5 images/s; Ctrl-C keeps what is done)\n"
    assert shown(START, ("stopped", {"images": 15010, "safe": 2944})) == "stopped: 2,944 of 15,010 images are safe\n"


def test_work_that_makes_no_shards():
    """Long work in verify, export and show gets a line a minute, too, which says nothing of safety or a kill."""
    told, clock = Told(), Clock()
    report = ProgressReport(told, clock)
    report("start", images=90, done=0)
    for _ in range(8):
        clock.now += 10
        report("batch", images=1)
    assert [kind for kind, _ in told if kind != "batch"] == ["start", "progress"]
    assert shown(*told) == "6 of 90 images (7%), 0.1 images/s, 14.0 min left\n"


def test_what_a_kill_costs(cli, photos, tmp_path):
    """The cost of a kill is said beforehand, with -v or in a dry run of more than a minute, but not in shorter runs."""
    command = ["extract", photos, *OPTIONS, "-o", tmp_path / "d"]
    cost = "a kill costs those of the last minute at most, and the batches at hand"
    words = f"rows are put on the disk every minute: {cost}"
    for options, is_said in {("-v",): True, (): False, ("--rate", 1): False, ("--rate", 0.1): True}.items():
        assert (words in cli(*command, "--dry-run", *options).err) == is_said
    assert (words in cli(*command).err, words in cli(*command, "-v").err) == (False, False)  # nothing is left to do
    assert words in cli(*command, "-v", "--overwrite").err


def test_a_bar_moves_by_what_is_done():
    """The bar shows what is safe and failed; rows of others move it without making it faster."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = ProgressBar(stream)
    bar.hear("start", images=1000, done=100, shards=9)
    bar.hear("batch", images=10)
    bar.hear("resumed", shard=3, rows=300)
    bar.hear("there", shard=2, rows=100, images=100)
    bar.hear("failure", key="a", row=0, reason="empty", detail="")
    state = bar._bar.format_dict
    assert (state["n"], state["total"], state["postfix"]) == (510, 1000, "500 safe, 1 failed")
    assert state["n"] - state["initial"] == 10  # the numbers that a rate is made of
    bar.hear("stopped", images=1000, safe=500)
    assert not bar.is_shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_in_python(photos, tmp_path, is_terminal, monkeypatch):
    """`featcli.progress_bar()` gives a report: a bar on a terminal, lines in a log, and warnings."""
    monkeypatch.setattr(progress_module, "MINUTE", 0.0)
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    (photos / "later.gif").write_bytes((photos / "01.png").read_bytes())
    featcli.extract(photos, output=tmp_path / "d", report=featcli.progress_bar(stream), **TINY)
    said = stream.getvalue()
    assert ("extracting: 100%" in said) == is_terminal
    assert (
        bool(re.search(r"^13 of 13 images \(100%\), \d+ safe, [\d.,]+ images/s, 0 s left$", said, re.M)) != is_terminal
    )


def test_numbers_are_numbers(cli, photos, tmp_path, monkeypatch):
    """In JSON events counts are numbers, times are numbers to the millisecond, and stages are objects."""
    monkeypatch.setattr(progress_module, "MINUTE", 0.0)
    monkeypatch.setattr(progress_module, "GRACE", 0.0)
    monkeypatch.setattr(progress_module, "SETTLED", 0.0)
    run = cli("extract", photos, *OPTIONS, "-o", tmp_path / "d", "--json", "-q")
    assert run.err == ""
    chosen = {event["name"]: event for event in run.events if event["type"] == "choice"}
    assert chosen["images"]["value"] == 12
    assert chosen["stages"]["value"] == [{"name": "stage4", "shape": [96, 1, 1]}]
    assert (chosen["dump"]["shards"], chosen["dump"]["shard_rows"]) == (3, 4)
    events = {kind: [one for one in run.events if one["type"] == kind] for kind in ("start", "progress", "estimate")}
    start = {"images": 12, "done": 0, "shards": 3, "bytes": 12 * 96 * 4, "unfinished_shards": []}
    assert events["start"] == [{"type": "start", **start}]
    assert sorted({event["done"] for event in events["progress"]}) == [4, 8, 12]
    for event in (*events["progress"], *events["estimate"]):
        assert all(type(number) in (int, float) and number == round(number, 3) for name, number in event.items()
                   if name != "type")  # fmt: skip
    end, stored = run.events[-1], chosen["stored"]
    assert end["pace"]["seconds"] == round(end["pace"]["seconds"], 3) == end["seconds"]
    assert end["images_per_second"] == pytest.approx(12 / end["seconds"], rel=0.01)
    assert (stored["pool"], stored["dtype"], stored["format"]) == ("none", "float32", "hdf5")
    assert (stored["bytes"], stored["bytes_per_image"]) == (12 * 96 * 4, 96 * 4)
    assert (chosen["computes"]["share"], chosen["device"]["devices"]) == (1, ["cpu"])
    assert chosen["threads"]["decode_threads"] >= 1


@pytest.fixture
def stops(monkeypatch):
    """Return a function that makes runs end at their second shard with an error."""

    def stops(error):
        real = progress_module.Progress.hear

        def hear(self, kind, **facts):
            real(self, kind, **facts)
            if kind == "shard" and facts["shard"] == 1:
                raise error

        monkeypatch.setattr(progress_module.Progress, "hear", hear)

    return stops


@pytest.mark.parametrize("options", [[], ["-q"], ["--json", "-q"]])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (MachineError("no space left"), 7)])
def test_a_run_that_ends_before_its_time(cli, photos, tmp_path, stops, options, error, code):
    """A run that ends early says how many images are safe, also with -q, and also if the machine failed."""
    stops(error)
    run = cli("extract", photos, *OPTIONS, "-o", tmp_path / "d", *options)
    assert run.code == code
    assert "stopped: 8 of 12 images are safe\nfeatcli: error: " in run.err
    if "--json" in options:
        assert run.events[-2] == {"type": "stopped", "images": 12, "safe": 8}


def test_ctrl_c_in_a_script(photos, tmp_path):
    """`featcli.extract` raises KeyboardInterrupt with one traceback, even if Ctrl-C comes again later."""

    def report(kind, **facts):
        if kind in ("batch", "kept", "shard", "stopped"):
            raise KeyboardInterrupt(kind)

    with pytest.raises(KeyboardInterrupt, match="stopped") as caught:
        featcli.extract(photos, output=tmp_path / "d", report=report, **TINY)
    printed = "".join(traceback.format_exception(caught.value))
    assert printed.count("Traceback") == printed.count("KeyboardInterrupt: ") == 1


def test_a_run_that_could_not_begin_says_nothing_of_safety(cli, photos, tmp_path):
    """An error before anything was made is printed alone, without a word about safety."""
    featcli.extract(photos, output=tmp_path / "d", **TINY)
    run = cli("extract", photos, *OPTIONS, "-o", tmp_path / "d", "--pool", "avg", "-q")
    assert (run.code, "safe" in run.err) == (5, False)


def test_what_is_new(photos, tmp_path):
    """The run that begins a dump calls it new, but not one that finds its plan and no shards."""
    reasons = []
    for _ in range(2):
        told = Told()
        featcli.extract(photos, output=tmp_path / "d", report=told, **TINY)
        reasons += [facts["reason"] for facts in told.of("choice") if facts["name"] == "dump"]
        for path in (tmp_path / "d" / "manifest.json", *(tmp_path / "d" / "shards").iterdir()):
            path.unlink()
    assert reasons == ["new; shard size as asked", "begun already; shard size as asked"]


def test_failures_are_heard(cli, photos, tmp_path):
    """With -q one line says how many images failed, each time; a complete dump that is resumed ends with 3 again."""
    (photos / "broken.jpg").write_bytes(b"no picture")
    command, path = ["extract", photos, *OPTIONS, "-o", tmp_path / "d", "-q"], tmp_path / "d"
    line = f"{path}: 1 of 13 images failed (1 not_an_image)\n"
    first, again = cli(*command), cli(*command)
    assert (first.code, first.err) == (again.code, again.err) == (3, line)
    assert cli(*command[:-1]).code == 3
    assert cli("finalize", path, "-q").err == line
    assert repr(featcli.open_dump(path)) == f"<dump '{path}': 13 images, 1 failed, stages stage4>"


def test_what_an_export_leaves_out_is_heard(cli, photos, tmp_path):
    """An export says how many failed images it leaves out or keeps, and how many are missing, also with -o - and -q."""
    (photos / "broken.jpg").write_bytes(b"no picture")
    path = tmp_path / "d"
    featcli.extract(photos, output=path, **TINY)
    left_out = "1 failed image left out"
    assert cli("export", path, "-o", tmp_path / "a.h5").out.endswith(f" kB; {left_out}\n")
    assert cli("export", path, "-o", tmp_path / "b.h5", "--keep-failed").out.endswith("; 1 failed image kept as NaN\n")
    for options in (["-o", "-"], ["-o", "-", "-q"], ["-o", tmp_path / "c.h5", "-q"]):
        assert cli("export", path, *options).err == f"{path}: {left_out}\n"
    (path / "manifest.json").unlink()
    (path / "shards" / "00003.json").unlink()  # of one image
    run = cli("export", path, "-o", tmp_path / "d.h5", "--incomplete")
    assert run.out.endswith(f"; {left_out}; 1 image not there yet\n")
    assert cli("export", path, "-o", "-", "--incomplete").err == f"{path}: {left_out}; 1 image not there yet\n"
    assert "13 images, 1 failed, 1 missing, stages" in repr(featcli.open_dump(path, incomplete=True))


EVENT = re.compile(r"^ {4}(\w+) +([\w, \n]+?):", re.MULTILINE)


def documented():
    """Return event -> the names of its facts, from the docstring of Report."""
    return {kind: set(re.split(r",\s+", names)) for kind, names in EVENT.findall(inspect.getdoc(Report))}


def facts_of_choices():
    """Return name of a choice -> the facts that only this choice has, by `help(featcli.Report)`."""
    text = " ".join(inspect.getdoc(Report).split()).partition("Some have more facts: ")[2].partition(" warning ")[0]
    named = re.findall(r"(`\w+`(?: and `\w+`)?) ha(?:s|ve) ([\w, ]+)", text)
    return {name: set(re.split(", | and ", facts)) for names, facts in named for name in re.findall(r"\w+(?=`)", names)}


def test_every_event_is_documented():
    """`help(featcli.Report)` and the page on Python name every event that the program reports, with all its facts."""
    found = {}
    for path in (REPOSITORY / "featcli").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if name in ("report", "_report"):
                    names = {keyword.arg for keyword in call.keywords} - {None}  # None stands for **facts
                    found.setdefault(call.args[0].value, set()).update(names)
    assert found.keys() == documented().keys()
    known = documented()
    known["choice"] = known["choice"].union(*facts_of_choices().values())
    assert {kind: names - known[kind] for kind, names in found.items() if names - known[kind]} == {}
    page = (REPOSITORY / "docs" / "python.md").read_text()
    for kind, names in known.items():
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", page, re.MULTILINE)
        assert names <= set(re.findall(r"\w+", row)), kind


def test_events_are_as_documented(photos, tmp_path):
    """A report gets only the events and facts that the page names."""
    (photos / "broken.jpg").write_bytes(b"no picture")
    told = Told()
    featcli.extract(photos, output=tmp_path / "d", report=told, **TINY)
    assert {"choice", "start", "batch", "failure", "shard", "end"} <= {kind for kind, _ in told}
    for kind, facts in told:
        if kind == "choice":
            assert facts.keys() - documented()[kind] == facts_of_choices().get(facts["name"], set())
        else:
            assert facts.keys() == documented()[kind]
