import numpy as np
import pytest
import torch

from featcli.backbones.stages import select
from featcli.errors import UsageError
from featcli.spec.parsers import parse_features, parse_indices

PYRAMID = [("stem", "act1"), ("stage1", "layer1"), ("stage2", "layer2"), ("stage3", "layer3"), ("stage4", "layer4")]
NAMES = [name for name, _ in PYRAMID]


def chosen(**options):
    return [NAMES[i] for i in select(PYRAMID, **options)]


def test_default_is_last_stage():
    """Without any choice the last stage alone is selected."""
    assert chosen() == ["stage4"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"out_indices": [0, 1, 2]}, ["stem", "stage1", "stage2"]),
        ({"out_indices": [-1]}, ["stage4"]),
        ({"out_indices": [-5]}, ["stem"]),
        ({"out_indices": [2, -1]}, ["stage2", "stage4"]),
        ({"out_indices": "all"}, NAMES),
        ({"out_features": ["stem", "stage2"]}, ["stem", "stage2"]),
        ({"out_features": ["all"]}, NAMES),
        ({"out_features": ["stage2:stage4"]}, ["stage2", "stage3", "stage4"]),
        ({"out_features": ["stage3:"]}, ["stage3", "stage4"]),
        ({"out_features": [":stage1"]}, ["stem", "stage1"]),
        ({"out_features": [":"]}, NAMES),
        ({"out_features": ["stem", "stage2:stage3"]}, ["stem", "stage2", "stage3"]),
        ({"out_features": ["stage4"], "out_indices": [-1]}, ["stage4"]),
        ({"out_features": ["layer2"]}, ["stage2"]),
        ({"out_features": ["act1", "layer1:layer3"]}, ["stem", "stage1", "stage2", "stage3"]),
        ({"out_features": ["layer2", "stage4"], "out_indices": [2, 4]}, ["stage2", "stage4"]),
        ({"out_features": ["stage4", "stem"], "out_indices": [0, 4]}, ["stem", "stage4"]),
    ],
)
def test_choices(options, expected):
    """Names, indices, negative indices, ranges and `all` choose the stages that they name."""
    assert chosen(**options) == expected


def test_order_of_the_question_does_not_matter():
    """Stages come in network order, in whatever order they are asked for."""
    assert chosen(out_indices=[4, 0, 2]) == chosen(out_indices=[0, 2, 4]) == ["stem", "stage2", "stage4"]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"out_indices": [5]}, "stage index 5 is out of range", "0 to 4"),
        ({"out_indices": [-6]}, "stage index -6 is out of range", "-5 to -1"),
        ({"out_indices": [1, 1]}, "chooses stage1 twice", "once"),
        ({"out_indices": [4, -1]}, "chooses stage4 twice", "once"),
        ({"out_indices": []}, "chooses no stage", "stem, stage1"),
        ({"out_features": []}, "chooses no stage", "stem, stage1"),
        ({"out_features": ["stage3:stage2"]}, "runs backwards", "stage2:stage3"),
        ({"out_features": ["stage2", "stage2"]}, "chooses stage2 twice", "once"),
        ({"out_features": ["stage5"]}, "there is no stage 'stage5'", "did you mean stage4"),
        ({"out_features": ["layer2", "stage2"]}, "chooses stage2 twice", "once"),
        ({"out_features": ["layer5"]}, "there is no stage 'layer5'", "did you mean layer4"),
        ({"out_features": ["xyz"]}, "there is no stage 'xyz'", "choose from stem, stage1"),
    ],
)
def test_refusals(options, message, hint):
    """An impossible choice is refused, with what may have been meant."""
    with pytest.raises(UsageError) as refused:
        select(PYRAMID, **options)
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_disagreement_names_both_sides():
    """Names and indices that mean different stages are refused, and the message says what each of them means."""
    with pytest.raises(UsageError) as refused:
        select(PYRAMID, out_features=["stem", "stage1"], out_indices=[1, 2])
    assert "stem, stage1" in refused.value.message
    assert "stage1, stage2" in refused.value.message


def test_a_module_of_several_stages():
    """A module that gives several stages chooses none of them, and the hint has the names to choose by."""
    with pytest.raises(UsageError, match="there is no stage 'blocks'") as refused:
        select([("stage1", "blocks"), ("stage2", "blocks"), ("stage3", "norm")], out_features=["blocks"])
    assert "stage1 and stage2" in refused.value.hint


@pytest.mark.parametrize(
    "text", ["1,2,-1", " 1, 2,-1 ", "(1,2,-1)", "[1, 2, -1]", "1,2,-1,", "(1, 2, -1,)", "['1','2',-1]"]
)
def test_indices_as_the_documents_write_them(text):
    """Indices may be written with the brackets, the quotes and the last comma of Python."""
    assert parse_indices(text) == (1, 2, -1)


@pytest.mark.parametrize("text", ["stem,stage2:stage4", "['stem', 'stage2:stage4']", '("stem", "stage2:stage4",)'])
def test_names_as_the_documents_write_them(text):
    """Names may be written with the brackets, the quotes and the last comma of Python."""
    assert parse_features(text) == ("stem", "stage2:stage4")


def test_one_index_and_all():
    """An index with a comma is a tuple of one, as in Python, and empty brackets choose no stage."""
    assert parse_indices("0,") == parse_indices("(0,)") == parse_indices("[0]") == parse_indices(0) == (0,)
    assert parse_indices("all") == "all"
    assert parse_indices("()") == parse_indices([]) == ()
    assert parse_features("[]") == ()


@pytest.mark.parametrize(
    "asked", [np.array([0, 2]), torch.tensor([0, 2]), (np.int64(0), torch.tensor(2)), ["0", "2"], range(0, 3, 2)]
)
def test_indices_of_python(asked):
    """Whole numbers of numpy and torch, also as text, are indices, and become a tuple of plain numbers."""
    assert parse_indices(asked) == (0, 2)
    assert all(type(index) is int for index in parse_indices(asked))


@pytest.mark.parametrize("asked", [1.0, (1.5,), [None], [True], np.array([True]), [[0, 1]], ["stage1"], {"a": 1}])
def test_what_is_no_index(asked):
    """Anything but a whole number is refused as an index, in one line."""
    with pytest.raises(UsageError, match="--out-indices"):
        parse_indices(asked)


@pytest.mark.parametrize("text", ["", ",", "1,,2", "(1,2", "stage1", "1.5", "(1)(2)"])
def test_indices_that_are_no_numbers(text):
    """Names given as indices are refused with the option that takes names."""
    with pytest.raises(UsageError) as refused:
        parse_indices(text)
    assert "--out-features" in refused.value.hint


def test_agrees_with_transformers_on_every_choice():
    """Every choice that transformers accepts selects the same stages here, and what it refuses is refused.

    There are two known differences: any order is accepted, and an empty choice is refused.
    """
    itertools = pytest.importorskip("itertools")
    transformers = pytest.importorskip("transformers")
    values = [*range(-6, 6)]
    choices = [list(c) for n in (1, 2) for c in itertools.product(values, repeat=n)]
    for indices in choices:
        if [i % 5 for i in indices] != sorted(i % 5 for i in indices) and all(-5 <= i < 5 for i in indices):
            continue  # out of order
        try:
            theirs = transformers.ResNetConfig(out_indices=list(indices)).out_features
        except (ValueError, IndexError):
            theirs = None
        try:
            ours = chosen(out_indices=indices)
        except UsageError:
            ours = None
        assert ours == theirs, indices
