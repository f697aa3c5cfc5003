"""Check what a run says about where its time went."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from featcli.dump.settings import Settings
from featcli.run.stats import Throughput, Timings
from featcli.system.machine import available_cores

SETTINGS = Settings(
    backbone={},
    weights_digest="",
    preprocessing={"decode": "exact"},
    precision="fp32",
    layout="channels-first",
    folded=False,
    compiled=False,
    batch_size=32,
    threads=1,
    pool="none",
    format="hdf5",
)


WORK = {"decode": 0.0, "compute": 0.0, "write": 0.0}


def plan(settings=SETTINGS, dtype="float32", device="cpu"):
    """Return a plan with what the pace needs."""
    outputs = [SimpleNamespace(dtype=dtype, is_map=settings.pool == "none")]
    return SimpleNamespace(settings=settings, environment={"device": device}, outputs=outputs)


@pytest.mark.parametrize(
    ("worked", "expected", "advice"),
    [
        ({"decode": 9.0, "compute": 3.0, "write": 1.0}, "decode", "--decode fast, --decode scaled"),
        ({"decode": 4.0, "compute": 3.0, "write": 1.0}, "compute", "--precision bf16"),
        ({"decode": 4.0, "compute": 90.0, "write": 1.0}, "compute", "--compile, --precision bf16"),
        ({"decode": 4.0, "compute": 3.0, "write": 4.0}, "write", "--dtype float16"),
    ],
)
def test_the_slowest_part_sets_the_pace(worked, expected, advice):
    """The part whose threads are busiest, taken together, is named with what could help."""
    pace = Timings(**worked).pace(1, 2, plan())
    assert pace.set_by == expected
    assert pace.advice.startswith(advice)
    assert [line.split()[0] for line in pace.lines()] == ["decode", "compute", "write", "pace"]


def test_runs_one_after_another():
    """Seconds and work of several runs are added up, and shares are those of all the time."""
    one, two = (
        Throughput(seconds, 1.0, {**WORK, "compute": at_work}, {**WORK, "compute": at_work / seconds}, {}, {}, name, "")
        for seconds, at_work, name in ((10.0, 9.0, "compute"), (30.0, 3.0, "write"))
    )
    both = one.followed_by(two)
    assert (both.seconds, both.preparation, both.set_by) == (40.0, 2.0, "write")
    assert (both.worked["compute"], both.busy["compute"]) == (12.0, 0.3)


@pytest.mark.parametrize("part", ["decode", "compute", "write"])
def test_advice_names_nothing_that_is_in_use_or_refused(part):
    """Options that are already given, or do not go with the others, are not advised."""
    used = replace(
        SETTINGS,
        batch_size=64,
        precision="bf16",
        compiled=True,
        pool="avg",
        preprocessing={"decode": "scaled"},
    )
    native = replace(SETTINGS, preprocessing={"decode": "exact", "fit": "native"})
    for settings, dtype in ((used, "float16"), (native, "float16")):
        advice = Timings(**{part: 5.0}).pace(1, 1, plan(settings, dtype)).advice
        for option in ("--compile", "--decode fast", "--decode scaled", "--dtype"):
            assert option not in advice
    assert "--p" not in Timings(**{part: 5.0}).pace(1, 1, plan(used, "float16")).advice


def test_preparation_is_no_part_of_the_rate():
    """Preparation is shown beside the seconds of the run, and is no part of the rate."""
    assert Timings(preparation=3.0).pace(1, 1, plan()).preparation == 3.0


def test_waits_are_said():
    """The summary says which part waited for which, and how long."""
    timings = Timings(compute=3.0, waited_for_decode=1.25, waited_for_write=0.0)
    lines = list(timings.pace(1, 1, plan()).lines())
    assert lines[1].endswith("waited 1.2 s for decode")


def test_advice_for_a_gpu():
    """For a GPU a larger batch is advised, and nothing about decoding, which takes nothing from it."""
    timings = Timings(decode=4.0, compute=3.0)
    assert "--decode scaled" in timings.pace(1, 2, plan()).advice
    advice = timings.pace(1, 2, plan(device="NVIDIA H200")).advice
    assert "--batch-size auto" in advice
    assert "--decode" not in advice


def test_several_workers():
    """Busy shares are averages over workers; work and waits are sums, and are called so."""
    timings = Timings()
    timings.started -= 10.0
    for _ in range(2):
        other = Timings(preparation=0.0, compute=8.0, decode=4.0, waited_for_decode=2.0)
        timings.add(other)
    pace = timings.pace(2, 4, plan())
    assert pace.busy["compute"] == pytest.approx(0.8, abs=0.01)
    assert pace.busy["decode"] == pytest.approx(0.2, abs=0.01)
    assert list(pace.lines())[1].endswith("16.0 s of work on 2 threads; waited 4.0 s for decode in all")


def test_advice_where_parts_share_the_cores():
    """On a CPU no more threads than cores are advised, but a lighter forward pass, which leaves more for decoding."""
    timings, cores = Timings(decode=9.0, compute=1.0), available_cores()
    assert "--decode-threads" not in timings.pace(1, cores, plan()).advice
    assert "--precision bf16" in timings.pace(1, cores, plan()).advice
    assert ("--decode-threads" in timings.pace(1, 1, plan()).advice) == (cores > 1)
    slow = Timings(compute=3.0).pace(1, cores, plan(replace(SETTINGS, precision="fp16")))
    assert "--precision bf16" in slow.advice
