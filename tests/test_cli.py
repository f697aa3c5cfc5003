import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from conftest import SAMPLES, Featcli, draw, finished, tree
from featcli import open_dump
from featcli.errors import UsageError
from featcli.extraction import extract
from featcli.run import tuning
from featcli.spec.commands import ExtractSpec

TINY = "-c test_resnet --random-init".split()


def test_help_imports_no_torch():
    """`featcli --help` imports none of the heavy libraries."""
    script = (
        "import sys; from featcli.cli.boundary import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'timm', 'transformers', 'h5py', 'PIL', 'numpy', 'rich.console'} & set(sys.modules))"
    )
    for arguments in (["--help"], ["extract", "--help"], ["inspect", "--help"], ["--version"]):
        out = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert out.stdout.splitlines()[-1] == "set()", arguments


def test_a_dump_is_read_without_torch(tmp_path):
    """Commands that read a dump import none of the libraries that only making one needs."""
    script = (
        "import sys; from featcli.cli.boundary import main\n"
        "for words in ('inspect', 'verify', f'export -o {sys.argv[2]} '):\n"
        "    try: main([*words.split(), sys.argv[1]])\n"
        "    except SystemExit as end: print(end.code)\n"
        "print({'torch', 'timm', 'transformers'} & set(sys.modules))"
    )
    arguments = [script, str(Path(__file__).parent / "zoo" / "dumps" / "bfloat16"), str(tmp_path / "arrays")]
    out = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=True)
    assert (out.stdout.splitlines()[-1], out.stdout.splitlines().count("0")) == ("set()", 3), out


def test_imports_are_not_searched_for_garbage(cli, monkeypatch, tmp_path):
    """Python looks for garbage from the start of a run on, and not before, while libraries are imported."""
    found = []

    def run(spec, report, **_):
        for kind in ("warning", "start", "warning"):
            report(kind, **({"text": ""} if kind == "warning" else {"images": 1, "done": 0}))
            found.append(gc.isenabled())
        raise UsageError("enough", "")

    monkeypatch.setattr(extract, "run", run)
    assert cli("extract", tmp_path, "-c", "resnet18", "-o", tmp_path / "d").code == 2
    assert (found, gc.isenabled()) == ([False, True, True], True)


def test_options_are_the_configurations():
    """Each option of `extract` is a field of its spec, with the same default, and each field an option."""
    import typer.main

    from featcli.cli.commands import app

    parameters = {one.name: one for one in typer.main.get_command(app).commands["extract"].params}
    fields = {field.name: field for field in dataclasses.fields(ExtractSpec)}
    assert set(parameters) - set(fields) == {"dry_run", "rate", "as_json", "quiet", "verbose"}
    assert set(fields) <= set(parameters)
    for name, field in fields.items():
        if name not in ("inputs", "checkpoint", "output"):
            default = str(field.default) if type(field.default) is int else field.default  # numbers are text in a shell
            assert parameters[name].default == (None if default == () else default), name


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        ("extract", 2, "-c/--checkpoint is missing", "see 'featcli extract --help'"),
        ("extract --nonsense", 2, "there is no option --nonsense", "see 'featcli extract --help'"),
        ("nonsense", 2, "there is no command 'nonsense'", "see 'featcli --help'"),
        ("extract -c resnet18 -o d", 2, "no input", "--files-from"),
        ("extract nowhere -c resnet18 -o d", 2, "input 'nowhere': there is no such file", "folder"),
        ("extract . -c resnet18 -o d --batch-size 0", 2, "--batch-size must be at least 1, not 0", "default"),
        ("extract . -c resnet18 -o d --batch-size x", 2, "--batch-size 'x' is neither a number nor auto", "default"),
        ("extract . -c resnet18 -o d --shard-size banana", 2, "--shard-size 'banana' is not a whole number", "default"),
        ("extract . -c resnet18 -o d --max-pixels 1.5", 2, "--max-pixels '1.5' is not a whole number", "default"),
        ("extract . -c resnet18 -o d --dry-run --rate x", 2, "--rate 'x' is not a number", "default"),
        ("extract . -c resnet18 -o d --dry-run --rate nan", 2, "--rate must be from 1e-06 to", "default"),
        ("extract . -c resnet18 -o d --threads 100000", 2, "--threads must be at most 1024, not 100000", "default"),
        ("extract . -c resnet18 -o d --decode-threads 1025", 2, "--decode-threads must be at most", "default"),
        ("extract . -c resnet18 -o d --threads many", 2, "--threads 'many' is neither a number nor auto", "default"),
        ("extract . -c resnet18 -o d --pool median", 2, "--pool cannot be 'median'", "none, avg, max, gem, cls"),
        ("extract . -c resnet18 -o d --format npy", 2, "a dump cannot be stored as npy", "featcli export --to npy"),
        ("extract . -c resnet18 -o d --format zarr", 2, "--format cannot be 'zarr'", "hdf5 or safetensors"),
        ("extract . -c resnet18 -o d --dtype int8", 2, "--dtype cannot be 'int8'", "float32, float16 or bfloat16"),
        ("extract . -c resnet18 -o d --precision fp8", 2, "--precision cannot be 'fp8'", "fp32, bf16, fp16 or auto"),
        (
            "extract - -c resnet18 -o d",
            2,
            "input '-': there is no such file or folder",
            "--files-from -, which reads names from stdin",
        ),
        (
            "extract SAMPLES -c dinov2 -o d",
            2,
            "checkpoint 'dinov2': there is no such timm model",
            "vit_base_patch14_dinov2",
        ),
        (
            "extract SAMPLES -c vit_b_16 -o d",
            2,
            "checkpoint 'vit_b_16': there is no such timm model",
            "vit_base_patch16_224",
        ),
        (
            "extract SAMPLES -c clip -o d",
            2,
            "checkpoint 'clip': there is no such timm model",
            "featcli models clip lists all",
        ),
        ("models qqxx", 2, "no model has 'qqxx' in its name", "a part of its name"),
        ("extract . -c resnet18 -o d --image-size big", 2, "--image-size 'big' is not a size", "224x288"),
        ("extract . -c resnet18 -o d --device tpu", 2, "--device 'tpu': there is no such device", "cuda:N"),
        ("extract . -c resnet18 -o d -0", 2, "--null needs --files-from", "list"),
        ("extract . -c resnet18 -o d --root .", 2, "--root needs --files-from", "list"),
        ("extract . -c a -c b -o d", 2, "--checkpoint is given twice: 'a' and 'b'", "once"),
        ("extract . -ca --checkpoint=b -o d", 2, "--checkpoint is given twice: 'a' and 'b'", "once"),
        ("extract . -c a -o d --no-fold --fold", 2, "--no-fold and --fold exclude each other", "one of the two"),
        (
            "extract SAMPLES -c resnt18 -o d",
            2,
            "checkpoint 'resnt18': there is no such timm model",
            "did you mean resnet18",
        ),
        ("extract SAMPLES -c resnet18 -o d --out-features stage9", 2, "there is no stage 'stage9'", "did you mean"),
        ("extract SAMPLES -c resnet18 -o d --out-indices 7", 2, "stage index 7 is out of range", "0 to 4"),
        ("extract SAMPLES -c resnet18 -o d --out-indices a", 2, "--out-indices 'a' is not a list", "--out-features"),
        (
            "extract SAMPLES -c resnet18 -o d --out-indices 1,2 --out-features stem",
            2,
            "--out-features means stem but --out-indices means stage1, stage2",
            "make them agree",
        ),
        ("extract SAMPLES -c resnet18 --random-init --pool cls -o d", 2, "resnet18 gives no class token", "--pool avg"),
        ("extract SAMPLES -c resnet18 -o x.png/d", 7, "cannot write in 'x.png': Not a directory", "another -o"),
        ("extract SAMPLES -c resnet18 -o d", 6, "checkpoint 'resnet18", "--random-init"),
        (
            "extract SAMPLES -c nobody/nothing -o d",
            6,
            "checkpoint 'nobody/nothing': it is not on this machine",
            "check the name",
        ),
        ("verify nowhere", 2, "dump 'nowhere': there is no such folder", "extract -o"),
        ("inspect nowhere/at/all", 2, "checkpoint 'nowhere/at/all': there is no such folder or file", "owner/name"),
        (
            "inspect nothere",
            2,
            "there is no dump 'nothere', and no checkpoint 'nothere': there is no such timm model",
            "hub id",
        ),
        ("inspect resnt18", 2, "there is no dump 'resnt18', and no checkpoint 'resnt18'", "did you mean resnet18"),
        (
            "inspect no/body",
            6,
            "there is no dump 'no/body', and no checkpoint 'no/body': it is not on this",
            "check the name",
        ),
        ("inspect resnet18 --out-indices 9", 2, "stage index 9 is out of range", "0 to 4"),
        ("inspect resnet18 --dtype int8", 2, "--dtype cannot be 'int8'", "float32"),
        ("inspect .", 2, "'.': this is a folder of pictures, neither a dump nor a checkpoint", "featcli extract INPUT"),
        (
            "inspect SAMPLES",
            2,
            "this is a folder of pictures, neither a dump nor a checkpoint",
            "featcli extract INPUT",
        ),
        ("inspect x.png", 2, "'x.png': this is a picture, neither a dump nor a checkpoint", "featcli extract INPUT"),
        ("inspect TESTS", 6, "this folder has no config.json", "save_pretrained"),
    ],
)
def test_mistakes_end_in_one_line_and_a_hint(cli, tmp_path, monkeypatch, arguments, code, message, hint):
    """A mistake of the user ends with the documented code, one error line and one hint, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "x.png", 0)
    given = arguments.replace("SAMPLES", str(SAMPLES)).replace("TESTS", str(Path(__file__).parent))
    run = cli(*given.split(), *(["-q"] if "extract" in arguments else []))
    lines = run.err.splitlines()
    assert run.code == code, run.err
    assert run.out == ""
    assert len(lines) == 2, run.err
    assert lines[0].startswith("featcli: error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_names_in_messages_are_escaped(cli, tmp_path):
    """A name with control characters cannot write to the terminal."""
    run = cli("inspect", tmp_path / "a\x1b[31m\nb")
    assert "\x1b" not in run.err
    assert r"a\x1b[31m\nb" in run.err
    assert len(run.err.splitlines()) == 2


def test_unwritable_places(cli, tmp_path):
    """A dump that cannot be written is refused before any checkpoint is read."""
    (tmp_path / "file").write_text("")
    assert cli("extract", SAMPLES, *TINY, "-o", tmp_path / "file").code == 5
    run = cli("extract", SAMPLES, *TINY, "-o", "/proc/featcli/dump", "-q")
    assert run.code == 7
    assert "cannot write in '/proc'" in run.err


def test_missing_extra(cli, swin_folder, monkeypatch):
    """Without transformers installed, a transformers folder names the extra that it needs."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    run = cli("inspect", swin_folder)
    assert run.code == 6
    assert "transformers is not installed" in run.err
    assert "pip install 'featcli[transformers]'" in run.err


def test_inspect_shows_stages(cli):
    """The table has a line for each stage, marks the selected ones, and says how much of the model they need."""
    run = cli("inspect", "resnet50", "--out-indices", "2,-1", "--dtype", "float16")
    lines = [line.split() for line in run.out.splitlines()]
    assert (run.code, run.err) == (0, "")
    assert lines[1] == ["index", "stage", "module", "channels", "stride", "shape", "float16/image"]
    assert lines[2] == ["0", "stem", "act1", "64", "2", "64x112x112", "1.61", "MB"]
    assert lines[4] == ["*", "2", "stage2", "layer2", "512", "8", "512x28x28", "803", "kB"]
    assert "2 of 5 stages selected (*), 1 MB per image, computes 100% of the model" in run.out
    assert "Resize 235 bicubic, CenterCrop 224x224, mean 0.485 0.456 0.406" in run.out


def test_inspect_json(cli, swin_folder):
    """`inspect --json` gives the same facts as one JSON object."""
    facts = json.loads(cli("inspect", swin_folder, "--json", "--out-features", "stage1").out)
    assert facts["type"] == "checkpoint"
    assert [stage["name"] for stage in facts["stages"] if stage["selected"]] == ["stage1"]
    assert facts["stages"][1]["shape"] == [24, 56, 56]
    assert facts["stages"][1]["bytes_per_image"] == 24 * 56 * 56 * 4 == facts["bytes_per_image"]
    assert 0 < facts["share_computed"] < 0.5
    assert facts["preprocessing"]["settings"]["size"] == {"height": 224, "width": 224}


def test_inspect_image_size(cli):
    """Shapes follow --image-size, also for models whose constructor needs to know it."""
    facts = json.loads(cli("inspect", "vit_tiny_patch16_224", "--image-size", "64x96", "--json").out)
    assert facts["stages"][0]["shape"] == [192, 4, 6]


def test_inspect_dump(cli, photos, tmp_path):
    """A dump says what it holds, and ends with code 8 while shards are missing."""
    cli("extract", photos, *TINY, "-o", tmp_path / "d", "--batch-size", 4, "--shard-size", 4, "-q")
    run = cli("inspect", tmp_path / "d")
    assert run.code == 0
    assert "complete, 3 of 3 shards" in run.out
    assert "12: 12 written, 0 failed" in run.out
    assert json.loads(cli("inspect", tmp_path / "d", "--json").out)["state"] == "complete"
    (tmp_path / "d" / "manifest.json").unlink()
    (tmp_path / "d" / "shards" / "00001.json").unlink()
    run = cli("inspect", tmp_path / "d")
    assert run.code == 8
    assert "incomplete, 2 of 3 shards" in run.out


def test_start_and_end_of_a_run(cli, photos, tmp_path):
    """A run prints every choice with its reason, and at the end what it wrote and what set the pace."""
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "notes.txt").write_text("no picture either")
    run = cli("extract", photos, *TINY, "-o", tmp_path / "d", "-v")
    assert run.code == 3
    assert run.out == ""
    for expected in (
        "checkpoint     test_resnet (timm)",
        "stages         stage4 96x5x5  (default: the last)",
        "precision      fp32  (default)",
        "images         13  (1 other file skipped: 1 .txt)",
        "random weights, seed 0",
        "Resize 168 bilinear, CenterCrop 160x160",
        "computes       100% of the model",
        "failed 'broken.jpg': not_an_image (no known picture format: text)",
        "layout         channels-first  (auto: fewer than 1,000 images; --layout channels-last --fold may be faster)",
        "batch size     32  (default)",
        "s of work on ",
        "pace set by ",
        "12 images, 1 failed (1 not_an_image)",
        "failures.jsonl",
    ):
        assert expected in run.err
    assert "nothing left to do" in cli("extract", photos, *TINY, "-o", tmp_path / "d").err


def test_quiet(cli, photos, tmp_path):
    """With -q a run prints nothing unless something is wrong."""
    run = cli("extract", photos, *TINY, "-o", tmp_path / "d", "-q")
    assert (run.code, run.out, run.err) == (0, "", "")


def test_quiet_about_what_libraries_log(photos, tmp_path):
    """With -q Pillow's own complaints about a picture are not printed: they name no file. The failure is recorded."""
    fields = struct.pack("<HHIIHHIIHHII", 256, 3, 1, 64, 257, 3, 1, 64, 277, 3, 1, 65535)
    (photos / "x.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, 3) + fields + bytes(4))
    with Featcli("extract", photos, *TINY, "-o", tmp_path / "d", "-q") as process:
        said = process.communicate()
    assert (process.returncode, said) == (3, ("", f"{tmp_path / 'd'}: 1 of 13 images failed (1 format_not_allowed)\n"))


def test_verbose(cli, photos, tmp_path):
    """-v names every failure and every shard."""
    for i in range(8):
        (photos / f"broken{i}.jpg").write_bytes(b"")
    options = ["--batch-size", 10, "--shard-size", 10]
    assert cli("extract", photos, *TINY, "-o", tmp_path / "a", *options).err.count("failed 'broken") == 5
    run = cli("extract", photos, *TINY, "-o", tmp_path / "b", *options, "-v")
    assert run.err.count("failed 'broken") == 8
    assert run.err.count("committed 0000") == 2


def test_json_events(cli, photos, tmp_path):
    """--json prints one JSON object a line: choices, shards, failures, and the end with its exit code."""
    (photos / "broken.jpg").write_bytes(b"no picture")
    run = cli("extract", photos, *TINY, "-o", tmp_path / "d", "--json", "-q")
    kinds = [event["type"] for event in run.events]
    assert kinds[-1] == "end"
    assert {"choice", "start", "failure", "shard", "end"} == set(kinds)
    assert run.events[-1]["exit_code"] == run.code == 3
    assert run.events[-1]["failed_by_reason"] == {"not_an_image": 1}
    run = cli("extract", photos, *TINY, "-o", tmp_path / "d", "--json", "-q", "--pool", "avg")
    assert run.events[-1]["type"] == "error"
    assert run.events[-1]["exit_code"] == run.code == 5


def test_dry_run(cli, photos, tmp_path):
    """--dry-run prints stages, shapes, shards and bytes, reads no weights, and writes nothing."""
    command = ["extract", photos, "-c", "resnet18", "-o", tmp_path / "d", "--dry-run"]
    before = tmp_path.stat().st_mtime_ns
    run = cli(*command, "--out-features", "stage1,stage4", "--dtype", "float16")
    assert run.code == 0
    assert "12 images in 1 shard, 5.42 MB" in run.err
    (event,) = [event for event in cli(*command, "--json", "-q").events if event["type"] == "dry_run"]
    assert event["bytes"] == 12 * 512 * 7 * 7 * 4
    assert event["stages"][0]["shape"] == [512, 7, 7]
    assert not (tmp_path / "d").exists()
    assert tmp_path.stat().st_mtime_ns == before  # not even for a moment


MEASURED = "auto  (a run measures)"


@pytest.mark.parametrize(
    ("options", "of_few", "of_many"),
    [
        ("resnet18", "channels-first  (auto: fewer than 1,000 images; --layout channels-last --fold may", MEASURED),
        ("resnet18 --fold", "channels-first, norms folded  (folding as asked; auto: fewer than 1,000 images", MEASURED),
        ("vit_tiny_patch16_224", "channels-first  (auto: few convolutions", "channels-first  (auto: few convolutions"),
    ],
)
def test_a_dry_run_chooses_as_a_run(cli, photos, tmp_path, monkeypatch, options, of_few, of_many):
    """A dry run prints choices as the run will, and says which ones a run measures."""
    command = ["extract", photos, "-c", *options.split(), "-o", tmp_path / "d", "--dry-run"]
    assert f"layout         {of_few}" in cli(*command).err
    monkeypatch.setattr(tuning, "FEWEST", 12)
    err = cli(*command, "--precision", "auto").err
    assert f"layout         {of_many}" in err
    assert f"precision      {MEASURED}" in err


def test_broken_pipe(photos):
    """If the reader of stdout goes away, featcli ends without a message."""
    with Featcli("inspect", "resnet18") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, "")


def test_broken_pipe_in_a_run(photos, tmp_path):
    """If the reader of a run's JSON goes away, the run continues without a message, and its dump is complete."""
    with Featcli("extract", photos, *TINY, "-o", tmp_path / "d", "--json", "-q") as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, "")
    assert open_dump(tmp_path / "d").valid.all()


def test_a_bar_on_a_terminal_only(photos, tmp_path):
    """A terminal gets a progress bar, a pipe or a file does not; NO_COLOR and plain terminals get no colours."""
    command = ["extract", photos, *TINY, "-o"]
    code, piped = finished(*command, tmp_path / "a")
    assert (code, "extracting" in piped) == (0, False)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    environment = {**os.environ, "NO_COLOR": "1"}
    with Featcli(*command, tmp_path / "b", stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                received = os.read(master, 4096)
            except OSError:  # Linux reports a closed terminal in this way
                break
            if not received:
                break
            shown += received
    os.close(master)
    assert process.returncode == 0
    assert b"extracting" in shown
    assert b"\x1b[3" not in shown
    assert b"x1b[" not in on_a_terminal("inspect", tmp_path / "b", width=60).replace(b"\x1b[", b"")  # never spelt out
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_long_reads_have_a_bar_too(photos, tmp_path):
    """verify, export and show have a bar on a terminal, and leave no trace of it at the end."""
    assert finished("extract", photos, *TINY, "-o", tmp_path / "d", "-q") == (0, "")
    commands = {
        b"verifying": ("verify", tmp_path / "d"),
        b"exporting": ("export", tmp_path / "d", "-o", tmp_path / "x.h5"),
        b"drawing": ("show", tmp_path / "d", "--root", photos, "-o", tmp_path / "x.html"),
    }
    for word, arguments in commands.items():
        shown = on_a_terminal(*arguments, width=60)
        assert word in shown
        assert word not in shown.splitlines()[-1].rpartition(b"\r")[2]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", ["models siglip_gap", "inspect swin_tiny_patch4_window7_224"])
def test_a_terminal_of_any_width(command, width, cli):
    """No line is wider than the terminal, and everything that a pipe gets is shown."""
    whole = cli(*command.split()).out
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(*command.split(), width=width).decode())
    assert max(map(len, shown.splitlines())) <= width
    words = {word.strip(",") for word in shown.split()}
    assert {word.strip(",") for word in whole.split()} - words <= {"model", "index"}  # headers of what begins a line


def test_an_export_that_is_interrupted(photos, tmp_path):
    """Ctrl-C in an export ends with its own code and leaves no file."""
    assert finished("extract", photos, *TINY, "-o", tmp_path / "d", "-q") == (0, "")
    with Featcli("export", tmp_path / "d", "-o", "-", "--to", "jsonl", bufsize=0) as process:
        process.stdout.read(10)  # it is at work, because more is to come than fits into the pipe
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (
            process.stderr.read() == "featcli: error: interrupted\nhint: run it again: nothing that was there is lost\n"
        )
    assert process.returncode == 130


def on_a_terminal(*arguments, width):
    """Return what a command shows on a terminal with so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with Featcli(*arguments, stdout=slave, stderr=slave, env={**environment, "TERM": "xterm"}) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # Linux reports a closed terminal in this way
            while received := os.read(master, 4096):
                shown += received
    os.close(master)
    assert process.returncode == 0
    return shown


def test_version(cli):
    """`--version` prints the package's version, and featcli without a command prints its help."""
    from importlib.metadata import version

    assert cli("--version").out == f"featcli {version('featcli')}\n"
    run = cli()
    assert (run.code, run.out.splitlines()[0]) == (0, "Usage: featcli [OPTIONS] COMMAND [ARGS]...")


@pytest.mark.parametrize(
    ("listed", "message", "hint"),
    [(b"a.png\0b.png\0", "the list has zero bytes in it", "give -0"), (b"", "no images in", "is the list empty?")],
)
def test_lists_that_are_no_lists(cli, tmp_path, listed, message, hint):
    """A list from -print0 without -0, and an empty list, are refused with what is probably meant."""
    (tmp_path / "list").write_bytes(listed)
    run = cli("extract", "--files-from", tmp_path / "list", *TINY, "-o", tmp_path / "d")
    assert run.code == 2
    assert message in run.err
    assert hint in run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seed 99999999999999999999", "--seed must be from 0"),
        ("--files-from list --root nowhere", "--root 'nowhere': there is no such folder"),
    ],
)
def test_values_out_of_range(cli, tmp_path, arguments, message):
    """Values that no library accepts are refused before any library is asked."""
    run = cli("extract", SAMPLES, *TINY, "-o", tmp_path / "d", *arguments.split())
    assert (run.code, message in run.err) == (2, True)
    assert cli("extract", "", *TINY, "-o", tmp_path / "d").code == 2


def test_dry_run_sees_what_is_there(cli, photos, tmp_path):
    """--dry-run says whether the existing dump would be resumed, refused or deleted."""
    cli("extract", photos, *TINY, "-o", tmp_path / "d", "-q")
    command = ["extract", photos, *TINY, "-o", tmp_path / "d", "--dry-run"]
    err = cli(*command, "--batch-size", "auto").err
    assert "is a dump with 1 of 1 shards: it would be resumed" in err
    for choice in ("layout         channels-first", "batch size     32"):
        assert f"{choice}  (as this dump was begun)" in err
    assert "of other stages or images: it would be refused" in cli(*command, "--out-indices", 0).err
    assert "the dump that is there would be deleted" in cli(*command, "--overwrite").err
    assert cli(*command, "--pool", "cls").code == 2


def test_results_that_cannot_be_written(photos):
    """If stdout is full, the error says so."""
    with open("/dev/full", "w") as full:
        code, err = finished("inspect", "resnet18", "--json", stdout=full)
    assert code == 7
    assert "Traceback" not in err


def test_no_gpu(cli, photos, tmp_path, monkeypatch):
    """A GPU that is asked for but missing ends the run before anything is loaded, with the reason and a way out."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = cli("extract", photos, *TINY, "--device", "cuda", "-o", tmp_path / "d")
    assert (run.code, "--device cuda: torch" in run.err, "--device cpu" in run.err) == (7, True, True)
    assert not (tmp_path / "d").exists()
