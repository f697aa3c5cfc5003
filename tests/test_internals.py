"""Check what featcli uses of other packages although they do not promise it: each test says what breaks without it.

Such names stand in one module `internals` of each package of featcli. backbones has tests of its own for them.
"""

import ast
import io
import os
import re
import signal
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, get_type_hints

import h5py
import numpy as np
import pytest
import torch
import typer
from PIL import Image, PngImagePlugin

import featcli
from featcli.cli.internals import GroupedCommand, error_of_typer, typed_in
from featcli.errors import MachineError
from featcli.inputs.internals import end_of_member, forget_members
from featcli.pixels.internals import (
    Deferred,
    decoder_of,
    exif_of_header,
    file_of,
    is_as_stored,
    marked,
    mend_transparency,
    mend_ycbcr,
    register_plugin,
    silence_libtiff,
    still_marked,
    transformations_of,
    untouched_file,
    was_unpacked,
)
from featcli.reading.internals import is_held_by_none_but, shared_tensor
from featcli.system.device import is_out_of_memory

PACKAGE = Path(featcli.__file__).parent
# Names that are documented although they begin so, and placeholders for fields of a tuple.
KNOWN = {"_replace", "_asdict", "_fields", "_make", "_exit"}


def private_names(path):
    """Return where a module takes an attribute with a leading underscore from something that it did not make itself."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        names, taken_from = [], ""
        if isinstance(node, ast.Attribute):
            names, taken_from = [node.attr], ast.unparse(node.value)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("featcli"):
            names = [one.name for one in node.names]
        for name in names:
            if re.match(r"_[a-z]", name) and name not in own | KNOWN and taken_from not in ("self", "cls", "super()"):
                yield f"{path.name}:{node.lineno}: {taken_from}.{name}"


def test_private_names_stand_in_internals():
    """Private names of other packages stand only in modules `internals`, where a later release is mended."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "internals.py"]
    assert [found for path in paths for found in private_names(path)] == []
    risky = re.compile(r"\b(getrefcount|typer\.core|UntypedStorage)\b")
    assert [path.name for path in paths if risky.search(path.read_text())] == []


# cli: Typer, and the click inside it.


def test_typer_lets_a_command_write_its_options():
    """Typer lets a command write its options into a help: else there are no headings, and -h is one long list."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    headings = {"size": "Pixels", "device": "Computation", "fit": "Pixels"}

    @app.command(cls=type("Command", (GroupedCommand,), {"headings": headings}))
    def draw(
        source: Annotated[str, typer.Argument(help="What to draw.")],
        size: Annotated[int, typer.Option(help="How large.")] = 3,
        device: Annotated[str, typer.Option(help="Where.")] = "cpu",
        fit: Annotated[str | None, typer.Option(help="How it fits.")] = None,
    ) -> None:
        """Draw something."""

    command = typer.main.get_command(app)
    text = command.get_help(command.make_context("draw", ["x"]))
    sections = dict(re.findall(r"^(\w+):\n((?:  .*\n?)+)", text, re.MULTILINE))
    assert list(sections) == ["Arguments", "Pixels", "Computation", "Options"]
    assert [re.findall(r"^  (\S+)", section.lower(), re.MULTILINE) for section in sections.values()] == [
        ["source"],
        ["--size", "--fit"],
        ["--device"],
        ["--help"],
    ]
    assert "How large.  [default: 3]" in sections["Pixels"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("-s 3 --size 3 -s3 --size=3 --fold --fold -qq", ""),
        ("-s 3 --size=4", "--size is given twice: '3' and '4'"),
        ("-s4 -s3", "--size is given twice: '4' and '3'"),
        ("--fold --quiet --no-fold", "--fold and --no-fold exclude each other"),
        ("-s 3 -- --size 4", "Got unexpected extra argument"),
    ],
)
def test_click_lets_each_option_know_what_was_given_before(typed, message):
    """click's `make_parser` and its options know earlier values: else the last of two would count silently."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    @app.command(cls=GroupedCommand)
    def draw(
        size: Annotated[int, typer.Option("-s", "--size")] = 3,
        fold: Annotated[bool | None, typer.Option("--fold/--no-fold")] = None,
        quiet: Annotated[bool, typer.Option("-q", "--quiet")] = False,
    ) -> None:
        """Draw something."""

    command = typer.main.get_command(app)
    if not message:
        assert command.make_context("draw", typed.split()).params == {"size": 3, "fold": True, "quiet": True}
        return
    with pytest.raises(Exception, match=re.escape(message)) as refused:
        command.make_context("draw", typed.split())
    assert getattr(refused.value, "exit_code", None) == 2
    command.make_context("draw", typed.split(), resilient_parsing=True)  # a shell that completes is not refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["once", "--tiems", "3"], "there is no option --tiems"),
        (["once", "--times", "x"], "Invalid value for '--times'"),
        (["once"], "Missing option '--times'"),
        (["once", "--times"], "Option '--times' requires an argument."),
        (["twice"], "No such command 'twice'"),
    ],
)
def test_errors_of_typer_say_what_is_wrong(arguments, message):
    """Errors of Typer have a message, a command and a code: else a wrong option ends in a traceback, not in a line."""
    app = typer.Typer(rich_markup_mode=None)
    app.callback()(lambda: None)

    @app.command(cls=GroupedCommand)
    def once(times: Annotated[int, typer.Option()]) -> None: ...

    try:
        typer.main.get_command(app).main(arguments, prog_name="featcli", standalone_mode=False)
    except Exception as error:
        found = error_of_typer(error)
    assert found.message.startswith(message)
    assert found.option == ("--tiems" if "--tiems" in arguments else None)
    assert (found.command, found.exit_code) == ("featcli once" if arguments[0] == "once" else "featcli", 2)


@pytest.mark.parametrize(("typed", "names"), [("", set()), ("-s 3 --no-fold x", {"size", "fold", "source"})])
def test_click_knows_what_was_typed(typed, names):
    """click knows what was typed: else a typed default, such as --device auto, gives way to an environment variable."""
    app = typer.Typer(rich_markup_mode=None, add_completion=False)

    @app.command(cls=GroupedCommand)
    def draw(
        context: typer.Context,
        source: Annotated[str | None, typer.Argument()] = None,
        size: Annotated[int, typer.Option("-s")] = 3,
        fold: Annotated[bool, typer.Option("--fold/--no-fold")] = False,
    ) -> set[str]:
        """Draw something."""
        return typed_in(context)

    assert typer.main.get_command(app).main(typed.split(), standalone_mode=False) == names


def test_other_errors_are_bugs():
    """An error that is not Typer's keeps its traceback: else a bug is taken for a wrong option."""
    assert error_of_typer(ValueError("a bug")) is None


# inputs: tarfile.


def test_tarfile_lets_go_of_members(tmp_path):
    """A tar can be walked while it keeps no member: else millions of images do not fit into memory."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(5):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(700)))
    ends, names = [], []
    with tarfile.open(tmp_path / "x.tar", "r:") as tar:
        while (member := tar.next()) is not None:
            forget_members(tar)
            assert tar.members == []
            names.append(member.name)
            ends.append(end_of_member(tar))
        assert end_of_member(tar) == ends[-1]
    assert names == [f"{i}.png" for i in range(5)]
    # Otherwise a damaged size would lead back to where the walk has been, for ever, or past the end unseen.
    assert ends == [(512 + 1024) * (i + 1) for i in range(5)]


# pixels: Pillow, its plugins, libtiff.


def png(orientation, late):
    """Return a PNG that lies on its side, and says so before its pixels or after them."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(out, "PNG")
    content, told = out.getvalue(), exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(told)) + b"eXIf" + told + struct.pack(">I", zlib.crc32(b"eXIf" + told))
    place = content.index(b"IEND") - 4 if late else content.index(b"IDAT") - 4
    return io.BytesIO(content[:place] + chunk + content[place:])


def test_pillow_reads_the_exif_of_a_header(monkeypatch):
    """The EXIF before the pixels of a PNG is read without them: else --fit native unpacks every picture twice."""
    unpacked, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: unpacked.append(True) or load(self))
    with Image.open(png(6, late=False)) as picture:
        assert exif_of_header(picture)[0x0112] == 6
    assert unpacked == []
    with Image.open(png(6, late=True)) as picture:
        assert 0x0112 not in exif_of_header(picture)
    assert unpacked == []
    with Image.open(png(6, late=True)) as picture:
        assert picture.getexif()[0x0112] == 6
    assert unpacked == [True]  # once it is not, the detour can go


def test_pillow_says_from_which_file_it_reads():
    """An opened picture has its file: else nobody sees what follows the pixels of a PNG, and each is unpacked."""
    file = png(6, late=True)
    with Image.open(file) as picture:
        assert file_of(picture) is file
    assert file_of(Image.new("RGB", (2, 2))) is None


def test_a_picture_becomes_what_was_unpacked():
    """A picture that another library unpacked becomes one of Pillow's: else kinds beyond Pillow cannot be read."""
    made = Image.new("L", (30, 20), 77)
    picture = Deferred("TIFF", (30, 20), True, lambda: made)
    assert (picture.size, picture.is_animated, picture.format) == ((30, 20), True, "TIFF")
    with picture:
        picture.load()
        assert (picture.mode, picture.getpixel((3, 4)), picture.convert("RGB").size) == ("L", 77, (30, 20))


def test_rows_that_do_not_come():
    """Pillow leaves rows of a PNG as they were if their data are missing: else nobody would see that they are."""
    out = io.BytesIO()
    Image.fromarray(np.full((9, 5), 7, np.uint8)).save(out, "PNG")
    for rows, is_left in ((9, False), (8, True)):
        data = zlib.compress((b"\0" + bytes([7] * 5)) * rows)
        kind = len(data).to_bytes(4, "big") + b"IDAT" + data + zlib.crc32(b"IDAT" + data).to_bytes(4, "big")
        with Image.open(io.BytesIO(out.getvalue()[:33] + kind + out.getvalue()[-12:])) as picture:
            mark = marked(picture, 8, b"\xa5\x3c")
            picture.load()
            assert still_marked(picture, 8, mark) == is_left


def test_what_plugins_did():
    """pillow-heif says how it turned a picture, and pillow-jxl-plugin whether it did: else neither could be undone."""
    exif, heif, jxl = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 7
    for module in ("pillow_heif", "pillow_jxl"):
        pytest.importorskip(module)
        register_plugin(module)
    Image.new("RGB", (64, 64)).save(heif, "HEIF", exif=exif.tobytes())
    Image.new("RGB", (64, 64)).save(jxl, "JXL")
    with Image.open(heif) as picture:
        assert [one for one in transformations_of(picture) if one[0] != "clap"] == [("irot", 270), ("imir", 0)]
    with Image.open(jxl) as picture:
        assert hasattr(picture, "jpeg")
        assert not is_as_stored(picture)


@pytest.mark.parametrize("given", [1, 255])
def test_the_grey_that_a_png_of_one_bit_calls_transparent(given):
    """Pillow 12.0 gives it as a bit, later ones as a grey: else white pixels of such a PNG would not be transparent."""
    picture = Image.fromarray(np.array([[True, False]]))
    picture.info["transparency"] = given
    mend_transparency(picture)
    assert (picture.mode, picture.info["transparency"]) == ("1", 255)


def test_pillows_decoder():
    """Pillow's decoder of JPEGs, fed by hand, waits for more: else early ends would become grey rows."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).save(out, "JPEG")
    whole = out.getvalue()
    with Image.open(out) as picture, decoder_of(picture) as decode:
        used = decode(whole[:-2])
        assert 0 < used < len(whole)
        assert decode(whole[used:]) == -1
    assert picture.tile == []
    with Image.open(io.BytesIO(whole)) as other:
        assert np.array_equal(picture, other)


def test_plugins_register_their_formats():
    """Pillow opens a plugin's format after its import and a call: else HEIC and JPEG XL are failures."""
    for module, name in (("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")):
        pytest.importorskip(module)
        register_plugin(module)
        assert name in Image.OPEN
    with pytest.raises(ImportError):
        register_plugin("pillow_of_nobody")


def test_libtiff_is_silent(capfd):
    """libtiff's functions that take a handler are found: else damaged TIFFs write between the lines of a run."""
    if "libtiff" not in Path("/proc/self/maps").read_text():
        pytest.skip("no libtiff that came with Pillow")
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "TIFF", compression="tiff_lzw")
    content = out.getvalue()
    silence_libtiff()
    with (
        Image.open(io.BytesIO(content[:50] + b"\xff" * 9 + content[59:])) as picture,
        pytest.raises(OSError, match="-2"),
    ):
        picture.load()
    assert capfd.readouterr() == ("", "")


# reading: torch, CPython.


def test_torch_makes_shared_memory():
    """A batch can be read straight into memory that two processes share: else each is copied once more on its way."""
    made = shared_tensor((2, 3, 4), torch.bfloat16)
    assert (made.shape, made.dtype, made.is_contiguous()) == ((2, 3, 4), torch.bfloat16, True)
    assert made.is_shared()
    assert made.untyped_storage().nbytes() == 2 * 3 * 4 * 2
    assert shared_tensor((0, 3), torch.float32).shape == (0, 3)


def test_python_counts_who_holds_an_array():
    """Everyone who holds an array, or a part of a tensor over it, is counted: else a batch in use is overwritten."""
    items = [np.empty(24, np.uint8)]
    assert is_held_by_none_but(items, 0)
    tensor = torch.from_numpy(items[0]).view(torch.float32).view(2, 3)
    assert not is_held_by_none_but(items, 0)
    part = tensor[1:].numpy()
    del tensor
    assert not is_held_by_none_but(items, 0)
    del part
    assert is_held_by_none_but(items, 0)


# dump: h5py, whose low-level functions are documented, and HDF5.


def test_hdf5_says_where_arrays_are(tmp_path):
    """HDF5 gives an array its place before it has a value: else maps cannot be written and read around it."""
    from featcli.dump.formats import hdf5
    from featcli.dump.formats.layout import ALIGNMENT

    path = tmp_path / "x.h5"
    path.touch()
    placed = hdf5.lay_out(str(path), {"maps": ("float32", (500, 5)), "valid": ("uint8", (500,))}, ["a"] * 500, {})
    assert placed.arrays["maps"].offset % ALIGNMENT == 0  # otherwise no map can be mapped into memory in place
    values = np.arange(2500, dtype=np.float32).reshape(500, 5)
    with path.open("r+b") as file:
        file.seek(placed.arrays["maps"].offset)
        file.write(values.tobytes())
    with h5py.File(path) as file:
        assert np.array_equal(file["maps"][:], values)
        assert file["maps"].id.get_offset() == placed.arrays["maps"].offset
    # Otherwise programs with an older HDF5 cannot open a dump: 2 and 3 are the versions of 1.8 and 1.10.
    assert path.read_bytes()[8] <= 3


# system: torch.


def test_allocators_say_that_memory_is_full():
    """torch's allocator reports a lack of memory in known words: else the user gets a traceback, and no hint."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("expected scalar type Half but found Float"))


# workers: Ray.


@pytest.fixture
def ray():
    return pytest.importorskip("ray")


def test_ray_knows_the_options_of_workers(ray):
    """Ray takes the options that workers are started with: else none starts, or a dead one is restarted unnoticed."""
    from featcli.workers.internals import started_worker
    from featcli.workers.worker import RayWorker

    given = []

    def accepting(**options):
        made = ray.remote(**options)  # raises ValueError for an option that it does not know
        assert options["runtime_env"].keys() <= ray.runtime_env.RuntimeEnv.known_fields

        def kind(worker):
            actor = made(worker)
            spread = lambda **more: actor.options(**more) and SimpleNamespace(remote=given.append)  # noqa: E731
            return SimpleNamespace(options=spread)

        return kind

    wants = {"num_cpus": 2, "num_gpus": 0.5}
    started_worker(SimpleNamespace(remote=accepting), RayWorker, "task", wants, {"OMP_WAIT_POLICY": "PASSIVE"})
    assert given == ["task"]
    with pytest.raises(ValueError, match="Invalid option"):
        ray.remote(max_retsarts=0)(RayWorker)


def test_ray_is_begun_quietly(ray, monkeypatch):
    """Ray takes the options that start it, and signal handlers stay: else Ctrl-C leaves half a shard behind."""
    from inspect import signature

    from featcli.workers import internals

    begun = []

    def init(**options):
        begun.append(options)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray sets one of its own
        raise ConnectionError

    before = signal.getsignal(signal.SIGTERM)
    for address in (None, "10.0.0.1:6379"):
        with pytest.raises(internals.NO_CLUSTER):
            internals.begin(SimpleNamespace(init=init), address)
        assert signal.getsignal(signal.SIGTERM) is before
    assert {*begun[0]} > {*begun[1]}
    assert {*begun[0]} <= {*signature(ray.init).parameters}
    for name in internals.HOUSEKEEPING:
        monkeypatch.delenv(name, raising=False)
    assert internals.imported_ray() is ray
    assert {name: os.environ[name] for name in internals.HOUSEKEEPING} == internals.HOUSEKEEPING


def test_a_sigterm_while_ray_starts():
    """A SIGTERM while Ray starts reaches the former handler: else Ray ends the process with a code of its own."""
    from featcli.workers.internals import begin

    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    def stop(number, _):
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt, match="15") as caught:
            begin(SimpleNamespace(init=init), None)
        assert caught.value.__context__ is None
        assert signal.getsignal(signal.SIGTERM) is stop
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(SystemExit, match="15"):  # there is no Ray to continue with
            begin(SimpleNamespace(init=init), None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_says_what_a_worker_raised(ray):
    """An error of a worker comes with its cause, a death without: else a full disk looks like workers that crash."""
    from featcli.workers.internals import raised_by_worker

    cause = MachineError("no space left", "free some")
    error = ray.exceptions.RayTaskError("make", "Traceback ...", cause, proctitle="worker", pid=1, ip="10.0.0.1")
    for one in (error, error.as_instanceof_cause()):
        assert isinstance(one, ray.exceptions.RayError)
        assert raised_by_worker(ray, one) is cause
    assert raised_by_worker(ray, ray.exceptions.ActorDiedError()) is None


def test_ray_waits_for_generators(ray):
    """`ray.wait` takes what a generator of an actor yields: else a worker's shards are known only when it is done."""
    assert {"__next__", "__iter__", "__eq__"} <= {*dir(ray.ObjectRefGenerator)}
    assert ray.ObjectRefGenerator in get_type_hints(ray.wait)["ray_waitables"].__args__[0].__args__


def test_pillow_12_reads_uncompressed_ycbcr(tmp_path):
    """An uncompressed YCbCr TIFF has three bytes a pixel: else Pillow 12 looks for four, and calls it cut short."""
    made = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).convert("YCbCr")
    made.save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as picture:
        picture._mode, tile = "RGB", picture.tile[0]
        picture.tile = [tile._replace(args=("RGBX", *tile.args[1:]))]  # as in Pillow 12
        mend_ycbcr(picture)
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(made.convert("RGB")))


def test_pillow_says_whether_a_picture_was_unpacked(tmp_path):
    """The `tile` of an opened picture shows that it is unchanged: else a changed query is read from its file."""
    Image.new("RGB", (8, 6)).save(tmp_path / "x.gif", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    with Image.open(tmp_path / "x.gif") as picture:
        assert untouched_file(picture) == str(tmp_path / "x.gif")
        assert not was_unpacked(picture)  # else one that is closed now would be taken, and fail
        picture.seek(1)
        assert untouched_file(picture) == ""
        assert untouched_file(picture.convert("RGB")) == ""
    with Image.open(tmp_path / "x.gif") as picture:
        picture.load()
        assert untouched_file(picture) == ""
        assert was_unpacked(picture)
