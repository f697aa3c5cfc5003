import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from conftest import REPOSITORY, SAMPLES, forks
from featcli.reading import picture_files

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMING = re.compile(r"^extracted .*(\n  .*)*", re.MULTILINE)
DISK = re.compile(r"; [\d.]+ [kMGT]B free$", re.MULTILINE)
MACHINE = re.compile(r"^(device|threads) .*", re.MULTILINE)


def blocks(page):
    """Return the code blocks of a page in order: (language, text)."""
    return BLOCK.findall((REPOSITORY / page).read_text())


SHELL = re.compile(r"[|&;$<>]")  # signs that only a shell understands


def commands(text):
    """Return the commands of a console block with what they print."""
    for part in text.split("$ ")[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def settled(output):
    """Return output without what differs between machines and runs."""
    return DISK.sub("", MACHINE.sub(r"\1", TIMING.sub("extracted", output))).strip()


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Make a folder as a reader of the README has it."""
    shutil.copytree(SAMPLES, tmp_path / "sample_images", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    try:
        os.setxattr(tmp_path, "user.test", b"")
    except (AttributeError, OSError):  # on file systems that note no folders, the pages show what others would
        monkeypatch.setattr(picture_files, "remembered_pictures", lambda _: [("", str(tmp_path / "sample_images"))])
    return tmp_path


PAGES = {
    "README.md": 8,
    "docs/backbones.md": 1,
    "docs/export.md": 7,
    "docs/extract.md": 8,
    "docs/finalize.md": 5,
    "docs/inspect.md": 6,
    "docs/models.md": 2,
    "docs/numbers.md": 4,
    "docs/pictures.md": 4,
    "docs/pipelines.md": 15,
    "docs/python.md": 8,
    "docs/replay.md": 6,
    "docs/scale.md": 14,
    "docs/show.md": 3,
    "docs/stages.md": 4,
    "docs/tables.md": 30,
    "docs/verify.md": 10,
}


# Other tests try the commands of these pages, so the pages themselves are run by `make docs`.
LONG = "backbones export inspect numbers pictures pipelines python replay scale show stages tables verify".split()


@pytest.mark.parametrize(
    ("page", "at_least"),
    [pytest.param(*one, marks=pytest.mark.long if Path(one[0]).stem in LONG else ()) for one in PAGES.items()],
)
def test_pages_run_from_top_to_bottom(scratch, cli, shell, page, at_least):
    """Every command and every Python block of the page runs in order and prints what it shows."""
    if re.search(r"\| jq |\njq ", (REPOSITORY / page).read_text()) and not shutil.which("jq"):
        pytest.skip("no jq here")
    ran, printed = [], ""
    for language, text in blocks(page):
        if language == "console":
            for command, shown in commands(text):
                assert settled(output_of(command, cli, shell)) == settled(shown), command
                ran.append(command)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, page, "exec"), {})
            ran.append("python")
            printed = out.getvalue()
        elif language == "text" and page != "README.md":
            assert text == printed
    assert len(ran) >= at_least


@pytest.fixture(scope="module")
def shell():
    """Return a function that runs a command in a shell whose `featcli` need not import torch again."""
    environment = {**os.environ, "PATH": f"{forks()}{os.pathsep}{os.environ['PATH']}"}
    return partial(subprocess.run, shell=True, capture_output=True, text=True, env=environment)


def output_of(command, cli, shell):
    if command.startswith("featcli ") and not SHELL.search(command):
        run = cli(*shlex.split(command)[1:])
        assert run.code == 0, run.err
        return run.err + run.out
    done = shell(command)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def test_tables_of_options_are_fresh():
    """The tables of options and exit codes in the pages are those that `make docs` writes."""
    sys.path.insert(0, str(REPOSITORY / "docs"))
    try:
        from write_options import SPECS, pages
    finally:
        sys.path.pop(0)
    assert {path.name: path.read_text() for path in pages()} == {path.name: text for path, text in pages().items()}
    helped = subprocess.run([sys.executable, "-m", "featcli", "--help"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  ([a-z]+)  +[A-Z]", helped.stdout, re.MULTILINE)) == set(SPECS)


def test_first_screen_of_the_readme():
    """The README shows how to install, extract, inspect and read back within its first 46 lines."""
    first = "\n".join((REPOSITORY / "README.md").read_text().splitlines()[:46])
    for expected in ("pip install", "$ featcli extract", "$ featcli inspect", "open_dump"):
        assert expected in first


def test_every_exit_code_and_reason_is_documented():
    """--help has every exit code, and the format page has every reason for which an image can fail."""
    from featcli.cli.boundary import BROKEN_PIPE, INTERRUPTED, TERMINATED
    from featcli.cli.commands import EPILOG
    from featcli.errors import EXIT_CODES, NOTHING_READ, SOME_FAILED, FeatcliError
    from featcli.pixels.failure import REASONS

    codes = {kind.exit_code for kind in [FeatcliError, *FeatcliError.__subclasses__()]}
    codes |= {0, SOME_FAILED, NOTHING_READ, INTERRUPTED, TERMINATED, BROKEN_PIPE}
    assert codes == {number for code in EXIT_CODES for number in code.codes}
    assert all(f"\n  {'/'.join(map(str, code.codes))}  " in EPILOG for code in EXIT_CODES)
    page = (REPOSITORY / "docs" / "format.md").read_text()
    assert all(f"| `{reason}` |" in page for reason in REASONS)
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    assert all(f"`{reason}`" in page for reason in REASONS)


def test_makefile_targets_are_listed():
    """`make help` lists every target that is meant to be called."""
    makefile = (REPOSITORY / "Makefile").read_text()
    listed = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    assert {
        "help",
        "demo",
        "test",
        "check",
        "format",
        "bench",
        "sweep",
        "torture",
        "smoke",
        "floors",
        "docs",
        "clean",
    } == listed


def test_sample_images_are_small_and_various():
    """About a dozen sample images, below 1 MB, have every format, mode and orientation that the README names."""
    from PIL import Image

    paths = [path for path in SAMPLES.rglob("*") if path.suffix in (".jpg", ".png", ".webp")]
    assert sum(path.stat().st_size for path in paths) < 1_000_000
    facts = set()
    for path in paths:
        with Image.open(path) as picture:
            facts |= {picture.format, picture.mode, "wide" if picture.width > picture.height else "tall"}
            facts |= {"turned"} if picture.getexif().get(0x0112, 1) != 1 else set()
    assert {"JPEG", "PNG", "WEBP", "RGB", "RGBA", "L", "P", "wide", "tall", "turned"} <= facts
    assert len(paths) == 12
    assert {path.parent.name for path in paths} == {"nature", "things"}


def test_what_differs_from_transformers_by_design_is_said():
    """Every row of benchmarks/conformance.py that differs by design names a sentence of the documentation."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from conformance import GROUPS

    rows = [row for group in GROUPS for row in group() if row.page]
    assert {row.id for row in rows} >= {"A15", "A16", "A17", "D6", "E5", "G2 maskformer-swin", "H2 4"}
    assert [(row.id, row.says) for row in rows if not row.is_said()] == []
