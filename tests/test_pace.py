"""What a run says about where its time went."""

import pytest

from featcli.pace import Clock

SETTINGS = {"precision": "fp32", "compiled": False, "pool": "none", "preprocessing": {"decode": "exact"}}


@pytest.mark.parametrize(
    ("worked", "expected", "advice"),
    [
        ({"decode": 9.0, "compute": 3.0, "write": 1.0}, "decode", "--decode scaled"),
        ({"decode": 4.0, "compute": 3.0, "write": 1.0}, "compute", "--precision bf16"),
        ({"decode": 4.0, "compute": 90.0, "write": 1.0}, "compute", "--compile, --precision bf16"),
        ({"decode": 4.0, "compute": 3.0, "write": 4.0}, "write", "--dtype float16"),
    ],
)
def test_the_slowest_part_sets_the_pace(worked, expected, advice):
    """The part that is busiest, its threads taken together, is named with what could help."""
    pace = Clock(**worked).pace(1, 2, SETTINGS, "float32")
    assert pace.set_by == expected
    assert pace.advice.startswith(advice)
    assert [line.split()[0] for line in pace.lines()] == ["decode", "compute", "write", "pace"]


@pytest.mark.parametrize("part", ["decode", "compute", "write"])
def test_advice_names_nothing_that_is_in_use_or_refused(part):
    """What was given already, or does not go with the rest, is not advised."""
    used = {"precision": "bf16", "compiled": True, "pool": "avg", "preprocessing": {"decode": "scaled"}}
    native = SETTINGS | {"preprocessing": {"decode": "exact", "fit": "native"}}
    for settings, dtype in ((used, "float16"), (native, "float16")):
        advice = Clock(**{part: 5.0}).pace(1, 1, settings, dtype).advice
        for option in ("--compile", "--decode scaled", "--dtype"):
            assert option not in advice
    assert "--p" not in Clock(**{part: 5.0}).pace(1, 1, used, "float16").advice


def test_preparation_is_no_part_of_the_rate():
    """It is said beside the seconds of the run."""
    assert Clock(preparation=3.0).pace(1, 1, SETTINGS, "float32").preparation == 3.0


def test_waits_are_said():
    """Who stood still for whom, and how long."""
    clock = Clock(compute=3.0, waited_for_decode=1.25, waited_for_write=0.0)
    lines = list(clock.pace(1, 1, SETTINGS, "float32").lines())
    assert lines[1].endswith("waited 1.2 s for decode")
