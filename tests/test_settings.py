"""Check what plan.json says about the choices of a run: it is read back whole, and compared by name."""

import json
from dataclasses import dataclass, replace

import pytest

import featcli
from featcli import open_dump
from featcli.dump.checksummed_json import publish_checksummed, read_checksummed
from featcli.dump.plan import refuse_other_plan, with_fingerprint
from featcli.dump.settings import Settings
from featcli.dump.verify import repair, verify
from featcli.errors import ConflictError
from featcli.pixels.colour import settings_of
from featcli.pixels.resize import ResizeMode
from featcli.spec.commands import ExtractSpec
from featcli.spec.groups import PixelSpec
from featcli.spec.option import options_of

NAMES = "backbone weights_digest preprocessing precision layout folded compiled batch_size threads pool format".split()
WRONG = "number|precision|choice|name|size"  # words for what is wrong with each
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 4}


@dataclass(frozen=True, kw_only=True, eq=False)
class LaterSettings(Settings):
    """The settings of a future featcli, with a choice that this one lacks."""

    filter: str = "none"


@pytest.fixture
def content():
    """Return settings as a plan.json holds them."""
    return {
        "backbone": {"library": "timm", "input_size": [160, 128], "options": {}, "norm": "raw"},
        "weights_digest": "0" * 32,
        "preprocessing": {"mean": [0.5, 0.5, 0.5], **settings_of(PixelSpec())},
        "precision": "fp32",
        "layout": "channels-first",
        "folded": False,
        "compiled": False,
        "batch_size": 32,
        "threads": 2,
        "pool": "none",
        "format": "hdf5",
    }


def test_settings_come_back_as_they_were_written(content):
    """Reading and writing settings changes neither a value nor their order, on which the bytes of plan.json depend."""
    assert list(content) == NAMES
    assert json.dumps(Settings.from_json(content).to_json()) == json.dumps(content)
    turned = dict(reversed(content.items()))
    assert json.dumps(Settings.from_json(turned).to_json()) == json.dumps(turned)
    assert Settings.from_json(turned) == Settings.from_json(content)


def test_settings_are_a_mapping_for_users(content):
    """Settings are a mapping with the names of plan.json, which examples and notebooks use."""
    settings = Settings.from_json(content | {"filter": "sharp"})
    assert (settings["batch_size"], settings["backbone"]["norm"], settings["filter"]) == (32, "raw", "sharp")
    assert settings.get("unknown") is None
    assert dict(settings) == content | {"filter": "sharp"}
    assert settings != content


def test_the_order_of_a_plan_that_is_new(tmp_path, photos):
    """A new plan has its settings in the order of the first version."""
    featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    expected = [name for name in NAMES if name != "pool"]
    assert list(json.loads((tmp_path / "d" / "plan.json").read_text())["settings"]) == expected


def test_a_later_setting_that_is_absent_means_its_default(content):
    """A later setting is written only if it is not its default, so older plans keep their fingerprint."""
    absent = LaterSettings.from_json(content)
    assert absent.filter == "none"
    assert absent.to_json() == content
    sharp = replace(absent, filter="sharp")
    assert list(sharp.to_json()) == [*NAMES, "filter"]
    assert LaterSettings.from_json(sharp.to_json()) == sharp
    spelled_out = {"filter": "none", **content}
    assert json.dumps(LaterSettings.from_json(spelled_out).to_json()) == json.dumps(spelled_out)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pool"])
def test_a_first_setting_that_is_absent(content, name):
    """A missing setting that every plan has had from the beginning is an error with its name."""
    del content[name]
    with pytest.raises(KeyError, match=name):
        Settings.from_json(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", True),
        ("threads", 1.5),
        ("precision", "fp8"),
        ("layout", "rows-first"),
        ("folded", 1),
        ("compiled", None),
        ("pool", 7),
        ("format", ["hdf5"]),
        ("backbone", {"input_size": [160]}),
        ("backbone", {"input_size": [160, -1]}),
    ],
)
def test_settings_that_are_none(content, name, value):
    """Settings that readers rely on are checked when a plan is read, because anybody may have written it."""
    with pytest.raises(ValueError, match=WRONG):
        Settings.from_json(content | {name: value})


def test_an_unknown_setting_is_kept_and_refused_by_its_name(tmp_path, photos):
    """A dump of a later featcli can be read, verified and repaired to the byte, but resuming it is refused."""
    featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    shards = tmp_path / "d" / "shards"
    plan = read_checksummed(tmp_path / "d" / "plan.json")
    chosen = list(plan["settings"].items())
    plan["settings"] = dict([*chosen[:3], ("filter", "sharp"), *chosen[3:]])
    known = open_dump(tmp_path / "d").plan
    unsealed = replace(known, settings=Settings.from_json(plan["settings"]))
    assert unsealed.settings.unknown == {"filter": "sharp"}
    assert list(unsealed.to_json()["settings"]) == list(plan["settings"])
    assert unsealed.fingerprint != known.fingerprint
    for file in shards.iterdir():  # as if that plan had been there from the beginning, and nothing were made yet
        file.unlink()
    for name in ("manifest.json", "failures.jsonl"):
        (tmp_path / "d" / name).unlink()
    publish_checksummed(tmp_path / "d" / "plan.json", with_fingerprint(unsealed), replace=True)
    before = (tmp_path / "d" / "plan.json").read_bytes()
    assert open_dump(tmp_path / "d", incomplete=True).plan == unsealed
    assert verify(tmp_path / "d").state == "incomplete"
    with pytest.raises(ConflictError, match='made with another plan: filter: "sharp" there, absent now'):
        featcli.extract(photos, output=tmp_path / "d", **OPTIONS)
    with pytest.raises(ConflictError, match="filter: absent there"):
        refuse_other_plan("d", known, unsealed)
    publish_checksummed(tmp_path / "d" / "manifest.json", with_fingerprint(unsealed))
    (tmp_path / "d" / "plan.json").write_bytes(b"{")
    repair(verify(tmp_path / "d"))
    assert (tmp_path / "d" / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    "rules",
    [
        PixelSpec(),
        PixelSpec(orientation="ignore", alpha="white", depth_range="0.0:4095.0", max_pixels=10**6, decode="scaled"),
    ],
    ids=["default", "other"],
)
def test_pixel_rules_come_back(content, rules):
    """A plan gives back the rules by which pictures were read."""
    words = json.loads(json.dumps(settings_of(rules)))
    settings = Settings.from_json(content | {"preprocessing": words})
    assert settings.pixel_rules == rules
    assert settings.pixels_are_exact == (rules.decode == "exact")
    assert settings.can_be_repeated


OTHER_PIXELS = {
    "orientation": "ignore",
    "alpha": "white",
    "depth_range": "0.0:4095.0",
    "max_pixels": 10**6,
    "decode": "scaled",
    "colour": "convert",
}


@pytest.mark.parametrize("name", [option.name for option in options_of(PixelSpec)])
def test_every_option_on_pixels_is_in_the_plan(content, name):
    """Every option that changes pixels changes the settings, so no dump is resumed with another value."""
    rules = PixelSpec(**{name: OTHER_PIXELS[name]})
    words = json.loads(json.dumps(settings_of(rules)))
    assert words != settings_of(PixelSpec())
    assert Settings.from_json(content | {"preprocessing": words}).pixel_rules == rules


def test_settings_say_which_options_ask_for_them(content):
    """The options that a plan gives ask for the same choices again, whatever the defaults are."""
    other = {
        "backbone": {"input_size": [64, 96], "norm": "model", "options": {"in_chans": 1}},
        "preprocessing": {
            "fit": "native",
            "step": [32, 32],
            "largest": [64, 96],
            **settings_of(PixelSpec(**OTHER_PIXELS)),
        },
        "precision": "bf16",
        "layout": "channels-last",
        "folded": True,
        "compiled": True,
        "batch_size": 5,
        "threads": 3,
        "format": "safetensors",
    }
    chosen = Settings.from_json(content | other).options()
    asked = {"norm": "model", "num_channels": 1, "fit": "native", "image_size": (64, 96), "fold": True, "compile": True}
    asked |= {name: other[name] for name in ("precision", "layout", "batch_size", "threads", "format")}
    asked |= {"processor_backend": None}
    assert chosen == asked | OTHER_PIXELS
    assert chosen.keys() <= {option.name for option in options_of(ExtractSpec)}


@pytest.mark.parametrize(
    "mode",
    [
        None,
        ResizeMode("pad", (160, 128), (1, 1)),
        ResizeMode("native", None, (32, 16)),
        ResizeMode("native", (64, 96), (32, 32)),
    ],
    ids=["own", "pad", "native", "native with a limit"],
)
def test_the_way_of_resizing_comes_back(content, mode):
    """A plan gives back how pictures got their size; None stands for the checkpoint's own way."""
    words = {} if mode is None else json.loads(json.dumps(mode.settings))
    settings = Settings.from_json(content | {"preprocessing": words})
    assert settings.resize_mode == mode
    assert settings.is_native == (mode is not None and mode.is_native)
    assert settings.largest == (mode.size if mode is not None and mode.is_native else None)
    assert (settings.input_size, settings.norm) == ((160, 128), "raw")


@pytest.mark.parametrize(
    ("words", "num_channels", "channels"),
    [
        ({"options": {}}, None, 3),
        ({"options": {"in_chans": 1}}, 1, 1),
        ({"config": {"num_channels": 4}}, 4, 4),
        ({"config": {}}, None, 3),
    ],
)
def test_channels_in_the_words_of_both_libraries(content, words, num_channels, channels):
    """The number of input channels is known by the words of both libraries, and is three without them."""
    settings = Settings.from_json(content | {"backbone": {"input_size": [1, 1], **words}})
    assert (settings.num_channels, settings.channels) == (num_channels, channels)
