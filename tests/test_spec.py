"""Check the specs: every option is written once, and shell, Python, help and type checkers agree on it."""

import contextlib
import inspect
import pydoc
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import featcli
from conftest import REPOSITORY
from featcli.cli.signature import FEW, in_order_of_help
from featcli.errors import UsageError
from featcli.spec import calls, commands, words
from featcli.spec.groups import GROUPS
from featcli.spec.option import Spec, narrowed, options_of

COMMANDS = {
    "extract": commands.ExtractCommand,
    "inspect": commands.InspectCommand,
    "models": commands.ModelsCommand,
    "verify": commands.VerifyCommand,
    "export": commands.ExportCommand,
    "show": commands.ShowCommand,
    "finalize": commands.FinalizeCommand,
}
CALLS = {"extract": calls.ExtractCall, "load_backbone": calls.BackboneCall}
of_each_spec = pytest.mark.parametrize("spec", [*COMMANDS.values(), *CALLS.values()], ids=lambda spec: spec.__name__)
of_each_command = pytest.mark.parametrize("name", COMMANDS)
of_each_call = pytest.mark.parametrize("name", CALLS)


def test_every_spec_is_looked_at(cli):
    """These tests cover every spec, and the command line has the commands of those specs."""
    homes = (*vars(commands).values(), *vars(calls).values())
    made = {one for one in homes if inspect.isclass(one) and issubclass(one, Spec)}
    ends = {spec for spec in made if not any(spec in other.__bases__ for other in made)} - {Spec}
    assert ends == {*COMMANDS.values(), *CALLS.values()}
    listed = cli("--help").out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == list(COMMANDS)


@of_each_spec
def test_options_say_what_they_are(spec):
    """Each option has a help that ends as a sentence and names its words, and a group of the help or a place."""
    for one in options_of(spec):
        assert one.option.help.endswith("."), one.name
        assert [word for word in one.words if word not in one.option.help] == [], one.name
        if one.option.is_argument:
            assert one.option.metavar, one.name
        else:
            assert one.option.group in GROUPS, one.name
    flags = Counter(flag for one in options_of(spec) if not one.option.is_argument for flag in one.flags)
    assert [flag for flag, count in flags.items() if count > 1] == []


@of_each_spec
def test_defaults_pass_their_own_checks(spec):
    """The default of each option is a value that could be given."""
    for one in options_of(spec):
        if one.default not in (None, MISSING):
            if one.words and isinstance(one.default, str):
                assert one.default in one.words, one.name
            if one.option.check is not None:
                one.option.check(one.called, one.default)


def test_tables_of_types_agree(tmp_path):
    """A precision or a stored dtype is known everywhere or nowhere."""
    import torch

    from featcli.backbones.execution import LAYOUTS, PRECISIONS
    from featcli.dump.formats import FORMATS, layout, safetensors
    from featcli.dump.formats.layout import NUMPY_TYPES

    assert all(isinstance(getattr(torch, name), torch.dtype) for name in (*words.DTYPES, *PRECISIONS.values()))
    assert all(isinstance(getattr(torch, name), torch.memory_format) for name in LAYOUTS.values())
    stored = {*words.DTYPES, "uint8", "uint32"}
    for table in (layout.ITEM_BYTES, safetensors.NAMES, NUMPY_TYPES):
        assert set(table) == stored
    assert {name: np.dtype(kind).itemsize for name, kind in NUMPY_TYPES.items()} == layout.ITEM_BYTES
    for name, shards in FORMATS.items():
        path = tmp_path / name
        path.touch()
        made = shards.lay_out(str(path), {dtype: (dtype, (2, 3)) for dtype in stored}, ["a", "b"], {})
        with path.open("r+b") as file:
            file.write(made.header)
        found = shards.read_layout(str(path), 2).arrays
        assert {array: (one.dtype, one.shape) for array, one in found.items()} == {
            dtype: (dtype, (2, 3)) for dtype in stored
        }
        with pytest.raises(KeyError):
            shards.lay_out(str(path), {"x": ("float64", (2, 3))}, [], {})


def test_words_are_known_where_they_are_used():
    """Every table keyed by the words of an option has an entry for each word, and no other."""
    from featcli.backbones.execution import LAYOUTS, PRECISIONS
    from featcli.dump.formats import FORMATS
    from featcli.export.formats import SUFFIXES, export_format
    from featcli.run.pooling import POOLINGS, pooling

    for known, table in (
        (words.PRECISIONS, PRECISIONS),
        (words.LAYOUTS, LAYOUTS),
        (words.FORMATS, FORMATS),
        (words.EXPORT_FORMATS, SUFFIXES),
        (words.POOLS, POOLINGS),
    ):
        assert tuple(table) == known
    assert [pooling(name).name for name in words.POOLS] == [*words.POOLS]
    for name in words.EXPORT_FORMATS:
        exported = export_format(name)
        assert callable(exported.write)
        assert {"float32"} <= {*exported.DTYPES} <= {*words.DTYPES}
    for name in words.FORMATS:
        assert FORMATS[name].SUFFIX in SUFFIXES[name]
    assert get_args(words.Auto) == (words.AUTO,)


def test_every_fit_is_a_way_of_its_own():
    """Each word of --fit gives other pixels, of the size that it is for."""
    from featcli.pixels.resize import ResizeMode

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    made = {}
    for fit in words.FITS:
        size = None if fit == words.NATIVE else (32, 40)
        fitted = ResizeMode(fit, size, (16, 16)).fitted(Image.Resampling.BILINEAR)(picture)
        made[fit] = fitted.tobytes()
        assert fitted.size == (picture.size if size is None else (40, 32)), fit
    assert len(set(made.values())) == len(words.FITS)


def test_colours_behind_transparency_are_colours():
    """Every word of --alpha except drop is a colour that Pillow knows."""
    colours = {word: ImageColor.getrgb(word) for word in get_args(words.Alpha) if word != "drop"}
    assert colours == {"white": (255, 255, 255), "black": (0, 0, 0)}


@pytest.mark.parametrize("name", ["extract", "load_backbone"])
def test_hints_of_functions_say_what_they_return(name):
    """typing.get_type_hints of a function gives the class that it returns."""
    returned = get_type_hints(getattr(featcli, name))["return"]
    assert returned.__name__ == {"extract": "Outcome", "load_backbone": "Backbone"}[name]


@of_each_call
def test_functions_list_their_keywords(name):
    """inspect.signature and typing.get_type_hints of a function give each keyword of its spec with a plain type."""
    function, spec = getattr(featcli, name), CALLS[name]
    parameters, plain = inspect.signature(function).parameters, get_type_hints(spec)
    assert list(parameters) == [field.name for field in fields(spec)]
    hints = get_type_hints(function, localns={"Backbone": None}, include_extras=True)
    del hints["return"]
    assert hints == {parameter.name: parameter.annotation for parameter in parameters.values()} == plain
    assert not any(get_origin(hint) is Annotated for hint in hints.values())
    for field in fields(spec):
        is_needed = parameters[field.name].default is inspect.Parameter.empty
        assert is_needed or parameters[field.name].default == field.default, field.name


@of_each_call
def test_help_of_functions(name):
    """`help(featcli.extract)` shows every keyword, and its words, with nothing of how options are made."""
    text = pydoc.render_doc(getattr(featcli, name), renderer=pydoc.plaintext)
    assert [field.name for field in fields(CALLS[name]) if f"{field.name}: " not in text] == []
    assert "fit: Optional[Literal['crop', 'squash', 'pad', 'native']] = None" in text
    assert [odd for odd in ("**", "*args", "Option(", "Annotated") if odd in text] == []


NEEDED = {"extract": {"checkpoint": "resnet18", "output": "d"}, "load_backbone": {"checkpoint": "resnet18"}}


@of_each_call
def test_keywords_that_are_wrong(name):
    """An unknown or missing keyword raises TypeError with the names of the function and the keyword."""
    function, needed = getattr(featcli, name), NEEDED[name]
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'outindices'$"):
        function(**needed, outindices=[1])
    with pytest.raises(TypeError, match=rf"^{name}\(\) missing a required argument: '{list(needed)[-1]}'$"):
        function(**dict(list(needed.items())[:-1]))
    mistyped = {name + "s": value for name, value in needed.items()}
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{next(iter(mistyped))}'$"):
        function(**mistyped)


@of_each_call
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("fit", "stretch", "--fit cannot be 'stretch'"),
        ("norm", "none", "--norm cannot be 'none'"),
        ("precision", "fp8", "--precision cannot be 'fp8'"),
        ("layout", "rows-first", "--layout cannot be 'rows-first'"),
        ("image_size", "big", "--image-size 'big' is not a size"),
        ("out_indices", "first", "--out-indices 'first' is not a list of whole numbers"),
        ("out_features", ",", "--out-features ',': one of the names is empty"),
        ("num_channels", 0, "--num-channels must be from 1 to 1024, not 0"),
        ("num_channels", "three", "--num-channels 'three' is not a number"),
        ("fold", 3, "--fold '3' is neither on nor off"),
        ("random_init", "yes", "--random-init 'yes' is neither on nor off"),
        ("seed", -1, "--seed must be from 0 to 2**63 - 1, not -1"),
    ],
)
def test_values_that_are_wrong(name, option, value, says):
    """An impossible value raises a UsageError that names the option, before anything is read."""
    with pytest.raises(UsageError, match=f"^(--)?{re.escape(says.removeprefix('--'))}"):
        getattr(featcli, name)("nowhere", **{**NEEDED[name], option: value} if name == "extract" else {option: value})


CALLS_IN_PYTHON = """\
from pathlib import Path
import featcli
from featcli import extract, load_backbone
extract("photos", checkpoint="resnet18", output="d", batch_size="auto", out_indices=[1, -1], fold=False)
extract([Path("a"), "b"], checkpoint="resnet18", output=Path("d"), report=lambda kind, **facts: None)
load_backbone("resnet18", out_features="stage4", image_size=(224, 288), precision="bf16")
reveal_type(extract("photos", checkpoint="resnet18", output="d"))  # note: Revealed type is "featcli.*.Outcome"
reveal_type(featcli.load_backbone("resnet18"))  # note: Revealed type is "featcli.*.Backbone"
extract("photos", checkpoint="resnet18", output="d", batchsize=3)  # error: .* "batchsize" for "extract"
extract("photos", checkpoint="resnet18", output="d", batch_size=0.5)  # error: Argument "batch_size" .* type "float"
extract("photos", checkpoint="resnet18", output="d", decode="quick")  # error: Argument "decode" .*'exact', 'fast'
extract("photos", output="d")  # error: Missing named argument "checkpoint" for "extract"
load_backbone("resnet18", 224)  # error: Too many positional arguments for "load_backbone"
load_backbone(random_init=True)  # error: Missing positional argument "checkpoint"
load_backbone("resnet18", outindices=[1])  # error: .* "outindices" for "load_backbone"
load_backbone("resnet18", precision="auto")  # error: Argument "precision" .*'fp32', 'bf16', 'fp16'
"""
# Everything but the signatures is left out, because mypy would take a minute to read it.
MYPY = """\
[mypy]
strict = True
follow_imports = silent
[mypy-torch.*,numpy.*,PIL.*,timm.*,transformers.*,h5py.*,safetensors.*,rich.*,tqdm.*,xxhash.*,fsspec.*,pyarrow.*,ray.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_type_checkers_know_the_keywords(tmp_path, monkeypatch):
    """mypy finds misspelt and missing keywords and values of a wrong type, and nothing in a right call."""
    api = pytest.importorskip("mypy.api")
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "calls.py").write_text(CALLS_IN_PYTHON)
    monkeypatch.setenv("MYPYPATH", str(REPOSITORY))
    options = ("--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "cache", "--no-error-summary")
    out, err, _ = api.run([*map(str, options), str(tmp_path / "calls.py")])
    assert err == ""
    said = defaultdict(list)
    for line in out.splitlines():
        number, message = re.search(r"calls\.py:(\d+): (.*)", line).groups()
        if "defined in" not in message:
            said[int(number)].append(message)
    for number, line in enumerate(CALLS_IN_PYTHON.splitlines(), 1):
        expected = line.partition("  # ")[2]
        if expected:
            assert said[number], line
            assert re.match(expected, said[number][0]), said[number]
        else:
            assert said[number] == [], line


def completed(cli, monkeypatch, line, shell="bash"):
    """Return what a shell is told to offer for what was typed so far."""
    monkeypatch.setenv("_FEATCLI_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    run = cli()
    assert (run.code, run.err) == (0, "")
    return run.out


def script_of(shell, cli, monkeypatch):
    """Return what `--show-completion` prints in that shell."""
    monkeypatch.setenv("_FEATCLI_COMPLETE", f"source_{shell}")
    return cli().out


@of_each_command
def test_a_shell_is_offered_the_words(cli, monkeypatch, name):
    """A shell offers the words of an option, and of these the ones that begin as typed."""
    for one in options_of(COMMANDS[name]):
        if words := one.words or one.option.offers:
            assert completed(cli, monkeypatch, f"featcli {name} {one.called} ").split() == [*words]
            begun = words[0][:2]
            offered = [word for word in words if word.startswith(begun)]
            assert completed(cli, monkeypatch, f"featcli {name} {one.called} {begun}").split() == offered


@of_each_command
def test_words_that_no_type_names_are_taken(name):
    """Words that a shell offers for an option that also takes other text are in its help and pass its check."""
    for one in options_of(COMMANDS[name]):
        for word in one.option.offers:
            assert word in one.option.help, one.name
            assert one.kept(word) is not None, one.name


@pytest.mark.parametrize("typed", ["extract -c ", "extract --arch ", "verify -c ", "inspect ", "models "])
def test_a_shell_is_offered_models(cli, monkeypatch, typed):
    """Wherever a model is named, a shell offers names that begin so, and after a dot the tags of a name."""
    import timm

    found = completed(cli, monkeypatch, f"featcli {typed}resnet5").split()
    assert found == timm.list_models("resnet5*")
    tagged = completed(cli, monkeypatch, f"featcli {typed}resnet50.a1").split()
    assert sorted(tagged) == sorted(name for name in timm.list_pretrained("resnet50") if ".a1" in name)
    assert completed(cli, monkeypatch, f"featcli {typed}./resnet50").split() == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_that_are_offered_something(cli, monkeypatch, shell):
    """bash, zsh and fish get a script that asks for commands, options, words and names of models."""
    for typed, offered in (
        ("", {"extract", "inspect"}),
        ("extract --dec", {"--decode", "--decode-threads"}),
        ("extract --decode ", {"exact", "fast", "scaled"}),
        ("extract -c resnet1", {"resnet18", "resnet101"}),
    ):
        found = completed(cli, monkeypatch, f"featcli {typed}", shell)
        assert offered <= set(re.findall(r"[\w-]+", found)), typed
    assert f"_FEATCLI_COMPLETE=complete_{shell}" in script_of(shell, cli, monkeypatch)
    monkeypatch.delenv("_FEATCLI_COMPLETE")
    listed = cli("--help").out
    assert "--install-completion" in listed
    assert "--show-completion" in listed


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_in_bash(cli, monkeypatch, tmp_path):
    """The script that `--show-completion` prints in bash makes bash find the words."""
    script = script_of("bash", cli, monkeypatch)
    monkeypatch.delenv("_FEATCLI_COMPLETE")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    command = tmp_path / "featcli"
    command.write_text(f"#!{sys.executable}\nfrom featcli.cli import main\nmain()\n")
    command.chmod(0o755)
    typed = f"COMP_WORDS=(featcli extract --decode ''); COMP_CWORD=3; _featcli_completion {command}"
    asked = f'{script}\n{typed}\necho "${{COMPREPLY[*]}}"'
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("exact fast scaled\n", "")


def test_completion_imports_no_torch():
    """Completion imports none of the heavy libraries, not even for names of models."""
    script = (
        "import os, sys; from featcli.cli.boundary import main\n"
        "for line in ('featcli extract --decode ', 'featcli extract -c resnet18'):\n"
        "    os.environ.update(_FEATCLI_COMPLETE='complete_bash', COMP_WORDS=line, COMP_CWORD='3')\n"
        "    try: main([])\n"
        "    except SystemExit: pass\n"
        "print({'torch', 'timm', 'transformers', 'h5py', 'PIL', 'numpy', 'rich.console'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[:4], lines[-1]) == (["exact", "fast", "scaled", "resnet18"], "set()")


@of_each_command
def test_help_in_groups(cli, monkeypatch, name):
    """A help has every option once, under the heading of its group, in the order of groups, within 80 columns."""
    monkeypatch.setenv("COLUMNS", "200")
    run = cli(name, "-h")
    assert (run.code, run.err) == (0, "")
    assert [line for line in run.out.splitlines() if len(line) > 80] == []
    under, heading = defaultdict(list), ""
    for line in run.out.partition("\n  Exit codes:")[0].splitlines():
        if re.fullmatch(r"[A-Z][a-z ]+:", line):
            heading = line[:-1]
        elif entry := re.match(r"  (?! )(.*?)(?:  |$)", line):
            under[heading].append(entry[1])
    options = in_order_of_help(COMMANDS[name])
    has_groups = sum(not one.option.is_argument for one in options) > FEW
    expected = defaultdict(list)
    for one in options:
        group = "Arguments" if one.option.is_argument else one.option.group if has_groups else "Options"
        expected[group].append(one.option.metavar if one.option.is_argument else one.called)
    expected["Options"].append("--help")
    shown = [found for found in under if found in ("Arguments", "Options", *GROUPS)]
    assert shown == list(expected) == [found for found in ("Arguments", *GROUPS, "Options") if found in expected]
    for group, names in expected.items():
        assert len(under[group]) == len(names), group
        assert [name for name, entry in zip(names, under[group], strict=True) if name not in entry] == [], group
    assert has_groups == (name in ("extract", "verify", "export"))


PLAIN = {
    "device": [("cpu", torch.device("cpu")), ("cuda:1", torch.device("cuda", 1)), ("cpu,cuda:0", ["cpu", "cuda:0"])],
    "precision": [
        ("bf16", torch.bfloat16),
        ("fp16", np.float16),
        ("fp32", np.dtype("float32")),
        ("fp16", np.str_("fp16")),
    ],
    "image_size": [(224, np.int64(224)), ((32, 64), np.array([32, 64])), ((32, 64), torch.Size([32, 64])), ("8", "8")],
    "out_indices": [
        ((1,), np.int64(1)),
        ((0, 1), torch.tensor([0, 1])),
        ((1, -1), ["1", np.int8(-1)]),
        ((2,), np.array(2)),
    ],
    "out_features": [(("stem",), np.array(["stem"])), (("stem", "stage1"), {"stem": 1, "stage1": 2}.keys())],
    "depth_range": [("0:4095", (0, 4095)), ("0:0.5", [np.int64(0), np.float32(0.5)])],
    "max_pixels": [(5, np.uint8(5)), (5, "5")],
    "num_channels": [(1, "1"), (3, np.int64(3))],
    "random_init": [(True, np.True_), (True, 1)],
}
WRONG = {
    "device": [3, torch.float16, b"cpu"],
    "precision": [torch.int8, 16, np.float64],
    "image_size": [224.0, True, (32, 32, 32), torch.ones(1, 1), "2²", -1],
    "out_indices": [[1.0], [True], "one", [None], torch.ones(1), ["1.0"], object()],
    "out_features": [[1], [None], 5, [b"stem"]],
    "depth_range": [(0,), 5, ("0", "1"), (1, 0), (0, np.nan)],
    "max_pixels": [5.5, True, "five", "5.0", float("nan")],
    "num_channels": [1.0, np.float32(3), [1]],
    "random_init": ["yes", 2, 0.5],
}


@pytest.mark.parametrize("option", PLAIN)
def test_values_of_other_libraries(option):
    """Values of numpy and torch, and numbers as text, become the same as Python's own."""
    for expected, value in PLAIN[option]:
        found = getattr(calls.BackboneCall("x", **{option: value}), option)
        assert (found, str(found)) == (expected, str(expected)), value
        assert type(found) is type(expected)
    for value in WRONG[option]:
        with pytest.raises(UsageError) as raised:
            calls.BackboneCall("x", **{option: value})
        assert isinstance(raised.value, ValueError)  # transformers raises that, too


ODD = [None, True, 7, 2.5, object(), ["a"], (1, 2), np.array([1, 2]), np.array(["a"]), Path("p"), b"x", {}.keys()]


@of_each_call
@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{type(value).__name__}-{value!r:.12}")
def test_any_value_is_taken_or_refused(name, value):
    """Any Python value of an option is taken, or refused by a UsageError that says what is wrong."""
    spec = CALLS[name]
    needed = {"checkpoint": "y"} | ({"inputs": "x", "output": "z"} if name == "extract" else {})
    for one in options_of(spec):
        with contextlib.suppress(UsageError):
            made = spec(**{**needed, one.name: value})
            assert made == spec(**{**needed, one.name: value})


def test_words_are_words():
    """An option that takes words takes nothing else, and None only if its type has it."""
    for option in ("norm", "alpha", "decode", "dtype", "precision", "format", "engine"):
        for value in (True, 1, ["model"], (255, 255, 255)):
            with pytest.raises(UsageError, match=f"--{option} cannot be"):
                calls.ExtractCall("x", checkpoint="y", output="z", **{option: value})
    with pytest.raises(UsageError, match="--max-pixels 'None' is not a number"):
        calls.ExtractCall("x", checkpoint="y", output="z", max_pixels=None)


def test_what_can_be_gone_through_once_is_kept():
    """Generators, arrays and paths are kept as what they give, so a spec made from another has the same."""
    asked = calls.ExtractCall(
        (Path(name) for name in "ab"), checkpoint="y", output=Path("z"), out_indices=np.array([1, 2]), root=None
    )
    assert (asked.inputs, asked.output, asked.out_indices) == (("a", "b"), "z", (1, 2))
    again = narrowed(asked, commands.ExtractSpec)
    assert (again.input_names, again.indices) == (("a", "b"), (1, 2))
    named = calls.BackboneCall("y", out_features=(name for name in ("stem", "stage1:stage3")))
    assert named.features == ("stem", "stage1:stage3")
