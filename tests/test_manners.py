"""Check that what people type first is understood, or answered with what to type."""

import json
import re

import pytest
from test_spec import COMMANDS, of_each_command

from featcli import extract
from featcli.backbones.model_names import containing
from featcli.cli.suggestions import COMMANDS as OTHER_COMMANDS
from featcli.cli.suggestions import NOT_NEEDED
from featcli.errors import ConflictError, UsageError
from featcli.spec.option import options_of
from featcli.spec.words import OTHER_WORDS

PLAIN = {"checkpoint": "test_vit", "random_init": True, "image_size": 32}
# For each command: words of timm, torchvision, Hugging Face and others -> what the hint names.
TYPED = {
    "extract": {
        "--model": "-c/--checkpoint",
        "--weights": "-c/--checkpoint",
        "--stages": "mean --out-indices?",
        "--layers": "mean --out-indices?",
        "--num-workers": "--decode-threads",
        "--gpu": "--device",
        "--half": "--precision or --dtype",
        "--batch": "--batch-size",
        "--nonsense": "--help",
        "--outputs": "--output",
        "--image_size": "--image-size",
        "--input": "give INPUT by itself",
        "--resume": "leave it out",
        "--label-column": "leave it out: all columns of a --table",
        "--restart": "--overwrite",
        "--no-resume": "see 'featcli extract --help'",
        "-?": "lists all options",
        "-help": "lists all options",
        "-weird": "see 'featcli extract --help'",
        "-device": "--device?",
    },
    "inspect": {"-c": "give CHECKPOINT|DUMP by itself", "--model": "give CHECKPOINT|DUMP by itself"},
    "export": {
        "--resume": "see 'featcli export --help'",
        "--format": "--to",
        "--layers": "--stage",
        "--force": "--overwrite",
    },
    "show": {
        "-r": "see 'featcli show --help'",
        "--layer": "--stage",
        "-n": "--num-images",
        "--dump": "give DUMP by itself",
    },
    "verify": {"--gpu": "--device", "--model": "-c/--checkpoint"},
}


@pytest.mark.parametrize(
    ("command", "typed", "named"), [(name, *one) for name, words in TYPED.items() for one in words.items()]
)
def test_an_option_that_is_not_there(cli, command, typed, named):
    """An option of another program is answered with the one that is meant, and an unknown one with --help."""
    ended = cli(command, typed, "3")
    assert (ended.code, ended.out) == (2, "")
    message, hint = ended.err.splitlines()
    assert message == f"featcli: error: there is no option {typed}"
    assert named in hint


@pytest.mark.parametrize(
    ("typed", "message", "named"),
    [
        (["extract", "--a\nb"], r"there is no option '--a\nb'", "extract"),
        (["extract", "--output"], "option '--output' requires an argument", "extract"),
        (["verify", "d", "--repair=1"], "option '--repair' does not take a value", "verify"),
        (["verify"], "DUMP is missing", "verify"),
        (["export", "d"], "-o/--output is missing", "export"),
        (["models", "a", "b"], "there is no place for 'b' in this command", "models"),
        (["it's"], r"there is no command 'it\'s'", ""),
        (["a\nb"], r"there is no command 'a\nb'", ""),
    ],
)
def test_a_line_for_each(cli, typed, message, named):
    """Whatever is typed, its message is one line, and the hint names the command that was typed."""
    ended = cli(*typed)
    assert ended.err == f"featcli: error: {message}\nhint: see '{f'featcli {named}'.strip()} --help'\n"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["--layers", "1,2"], "--out-indices?"),
        (["--stages=-1"], "--out-indices?"),
        (["--layers", "layer2,layer3"], "--out-features?"),
        (["--layers", "--pool"], "--out-indices or --out-features?"),
        (["--half", "true"], "--precision or --dtype?"),
    ],
)
def test_what_follows_an_option_that_is_not_there(cli, typed, named):
    """If several options may be meant, the hint names the one that takes the text typed after it."""
    assert cli("extract", "x", *typed).err.endswith(f"hint: did you mean {named}\n")


@pytest.mark.parametrize(("typed", "means"), [("cpu:0", "cpu"), ("mps:0,cpu:0", "mps,cpu"), ("cuda:0", "cuda:0")])
def test_the_number_of_the_only_device(typed, means):
    """torch's names of a machine's only device of a kind are understood, and GPUs keep their number."""
    device = next(one for one in options_of(COMMANDS["extract"]) if one.name == "device")
    assert device.kept(typed) == means


def test_a_path_without_a_command(cli, tmp_path, monkeypatch):
    """Pictures or a dump in place of a command are answered with the command that takes them."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "feats").mkdir()
    (tmp_path / "feats/plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "featcli extract 'photos' -c CHECKPOINT -o DUMP" in cli("photos", "-c", "test_vit").err
    assert "featcli extract 's3://bucket' -c" in cli("s3://bucket").err
    assert "featcli inspect 'feats'" in cli("feats").err


def test_every_command_has_other_words():
    """The table of other words for commands has every command."""
    assert set(OTHER_COMMANDS) == set(COMMANDS)


@of_each_command
def test_words_of_other_programs_are_not_our_own(name):
    """No option has a name that the table gives to another option of the same command."""
    options = options_of(COMMANDS[name])
    flags = {flag for one in options if not one.option.is_argument for text in one.flags for flag in text.split("/")}
    elsewhere = {word for one in options for word in one.option.known_as} | {w for words in NOT_NEEDED for w in words}
    assert flags & elsewhere == set()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(word, name) for name, words in OTHER_COMMANDS.items() for word in words] + [("exprt", "export")],
)
def test_a_command_that_is_not_there(cli, typed, meant):
    """A command of another program, or a typing error, is answered with the command that is meant."""
    ended = cli(typed)
    assert ended.code == 2
    assert ended.err == (f"featcli: error: there is no command '{typed}'\nhint: did you mean featcli {meant}?\n")


@pytest.mark.parametrize(
    ("option", "typed", "meant"), [(o, *pair) for o, of in OTHER_WORDS.items() for pair in of.items()]
)
def test_words_for_the_same(option, typed, meant):
    """A word of another program is understood, stored as ours, and named in the help of the option."""
    one = next(one for one in options_of(COMMANDS["extract"]) if one.name == option)
    assert one.kept(typed) == ((meant,) if option == "pool" else meant)
    if option != "precision":
        assert re.search(rf"\b{typed}\b", one.option.help)


def test_words_for_the_same_in_other_commands(tmp_path, cli):
    """Options of inspect and export take the same words as those of extract."""
    export = {one.name: one for one in options_of(COMMANDS["export"])}
    of_inspect = next(one for one in options_of(COMMANDS["inspect"]) if one.name == "dtype")
    assert [one.kept("fp16") for one in (export["dtype"], of_inspect)] == ["float16", "float16"]
    assert (export["pool"].kept("gap"), export["pool"].kept("2"), export["to"].kept("h5")) == ("avg", "2x2", "hdf5")


def test_words_for_the_same_make_the_same_dump(photos, tmp_path):
    """A dump that was made with our words is resumed with those of other programs."""
    made = extract(photos, output=tmp_path / "d", pool="avg", dtype="float16", format="hdf5", **PLAIN)
    again = extract(photos, output=tmp_path / "d", pool="gap", dtype="fp16", format="h5", precision="float32", **PLAIN)
    assert (made.extracted, again.extracted) == (12, 0)
    assert extract(photos, output=tmp_path / "g", pool=2, **PLAIN).extracted == 12
    assert extract(photos, output=tmp_path / "g", pool="2x2", **PLAIN).extracted == 0


def test_a_file_for_a_dump(photos, tmp_path, monkeypatch):
    """-o x.h5 is refused with the way to get one file, unless a dump has that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"a dump is a folder, not a \.h5 file") as refused:
        extract(photos, output="x.h5", **PLAIN)
    assert refused.value.hint == "use -o 'x'; featcli export writes one file from it"
    extract(photos, output="x", **PLAIN)
    (tmp_path / "x").rename(tmp_path / "x.h5")
    assert extract(photos, output="x.h5", **PLAIN).extracted == 0


def test_two_commands_for_one_dump(photos, tmp_path):
    """A second command with other images, as xargs starts one, is told to give all names to one command."""
    one, two = sorted(photos.iterdir())[:2]
    extract(one, output=tmp_path / "d", **PLAIN)
    with pytest.raises(ConflictError, match="made of other images") as refused:
        extract(two, output=tmp_path / "d", **PLAIN)
    assert "--files-from -" in refused.value.hint


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("vit_b_16", "vit_base_patch16_224"),
        ("ViT-L/14", "vit_large_patch14_224"),
        ("dinov2", "vit_base_patch14_dinov2"),
        ("convnext-tiny", "convnext_tiny"),
        ("resnet 18", "resnet18"),
        ("ConvNeXt-B", "convnext_base"),
        ("efficientnet-v2-s", "efficientnetv2_s"),
        ("dinov2_vitb14", "vit_base_patch14_dinov2"),
        ("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2"),
        ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3"),
        ("clip_vitb16", "vit_base_patch16_clip_224"),
        ("a.*b(", None),
        ("nothing_of_it", None),
        ("", None),
        ("//", None),
    ],
)
def test_names_of_models_by_their_parts(typed, first):
    """Models are found by parts of their names, however these are written, also with letters for sizes."""
    import timm

    found = containing(typed, timm.list_models())
    assert (found[0] if found else None) == first


def plan_of(folder):
    return json.loads((folder / "plan.json").read_text())


def test_variables_stand_for_options(cli, photos, tmp_path, monkeypatch):
    """A machine's variable applies if an option is left out, and gives way to one that is typed."""
    command = ["extract", photos, "-c", "test_vit", "--random-init", "--image-size", 32, "--pool", "avg"]
    monkeypatch.setenv("FEATCLI_THREADS", "1")
    monkeypatch.setenv("FEATCLI_DECODE_THREADS", "3")
    monkeypatch.setenv("FEATCLI_DEVICE", "cpu")
    run = cli(*command, "-o", tmp_path / "one", "--json")
    assert run.code == 0
    chosen = {event["name"]: event for event in run.events if event["type"] == "choice"}
    assert (chosen["device"]["value"], chosen["device"]["reason"]) == ("cpu", "as FEATCLI_DEVICE says")
    assert chosen["threads"]["reason"].startswith("as FEATCLI_THREADS says")
    assert plan_of(tmp_path / "one")["settings"]["threads"] == 1
    run = cli(*command, "-o", tmp_path / "two", "--threads", 2)
    assert run.code == 0
    assert plan_of(tmp_path / "two")["settings"]["threads"] == 2
    assert (
        cli(*command, "-o", tmp_path / "two").code == 0
    )  # threads of a machine do not count as asked for, so the dump keeps its own
    run = cli(*command, "-o", tmp_path / "three", "--dry-run", "--device", "auto")
    assert re.search(r"device +\w+  \(auto: ", run.err)  # a typed default also wins


def test_threads_of_a_machine_give_way_to_a_dump_that_is_begun_meanwhile(cli, photos, tmp_path, monkeypatch):
    """Two machines with different FEATCLI_THREADS that begin one dump together both make it."""
    from featcli.extraction import extract as module

    make_folder = module.make_folder

    def begun_meanwhile(path):
        monkeypatch.setattr(module, "make_folder", make_folder)
        extract(photos, output=path, threads=2, pool="avg", **PLAIN)
        make_folder(path)

    monkeypatch.setattr(module, "make_folder", begun_meanwhile)
    monkeypatch.setenv("FEATCLI_THREADS", "1")
    command = ["extract", photos, "-c", "test_vit", "--random-init", "--image-size", 32, "--pool", "avg"]
    run = cli(*command, "-o", tmp_path / "d")
    assert run.code == 0
    assert "another run has begun this dump meanwhile" in run.err
    assert plan_of(tmp_path / "d")["settings"]["threads"] == 2


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("FEATCLI_DEVICE", "gpu", "FEATCLI_DEVICE 'gpu': there is no such device"),
        ("FEATCLI_DEVICE", "cuda:99", "FEATCLI_DEVICE cuda:99: t"),
        ("FEATCLI_THREADS", "0", "FEATCLI_THREADS must be at least 1, not 0"),
        ("FEATCLI_DECODE_THREADS", "many", "FEATCLI_DECODE_THREADS 'many' is neither a number nor auto"),
    ],
)
def test_a_variable_that_is_wrong(cli, photos, tmp_path, monkeypatch, variable, text, says):
    """The error for a variable's value names the variable, not an option that nobody typed."""
    monkeypatch.setenv(variable, text)
    run = cli("extract", photos, "-c", "test_vit", "--random-init", "-o", tmp_path / "d", "-q")
    assert run.code in (2, 7)
    assert run.err.startswith(f"featcli: error: {says}")
    assert "--" not in run.err.splitlines()[0]


def test_variables_without_use(cli, photos, tmp_path, monkeypatch):
    """A command ignores a variable without use: a cluster's without Ray, a device's if it computes nothing."""
    monkeypatch.setenv("FEATCLI_RAY_ADDRESS", "nowhere:1")
    command = ["extract", photos, "-c", "test_vit", "--random-init", "--image-size", 32, "-o", tmp_path / "d"]
    assert cli(*command).code == 0
    monkeypatch.setenv("FEATCLI_DEVICE", "gpu")
    assert cli("verify", tmp_path / "d").code == 0
    assert cli("inspect", "test_vit").code == 0
