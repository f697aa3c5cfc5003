"""Compare the rules by which stages are chosen with transformers' own, over every combination that can be asked."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featcli.backbones.stages import select
from featcli.errors import UsageError

backbone_utils = pytest.importorskip("transformers.backbone_utils")

NAMES = ["stem", "stage1", "stage2", "stage3", "stage4"]


class Configuration(backbone_utils.BackboneConfigMixin):
    """A transformers configuration that has only stages."""

    def __init__(self, names):
        self.stage_names = names


def by_transformers(names, features, indices):
    """Return the positions that transformers chooses, or the message with which it refuses."""
    configuration = Configuration(names)
    try:
        configuration.set_output_features_output_indices(features, indices)
    except (ValueError, IndexError) as error:  # IndexError: for an index that is too negative
        return f"refused: {error}"
    return tuple(names.index(feature) for feature in configuration.out_features)


def by_featcli(names, features, indices):
    try:
        return select([(name, name) for name in names], features, indices)
    except UsageError as error:
        return f"refused: {error.message}"


def in_order(names, features, indices):
    """Return the same request in network order."""
    if features is not None:
        features = sorted(features, key=lambda name: names.index(name) if name in names else -1)
    if indices is not None:
        indices = sorted(indices, key=lambda index: index % len(names))
    return features, indices


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 5),
    features=st.none() | st.lists(st.sampled_from([*NAMES, "layer1"]), max_size=4),
    indices=st.none() | st.lists(st.integers(-7, 6), max_size=4),
)
@example(count=5, features=None, indices=None)
@example(count=5, features=None, indices=[-6])
@example(count=5, features=["stage4"], indices=[-1])
@example(count=5, features=["stage1", "stage2"], indices=[-4, 2])
@example(count=5, features=["stage4"], indices=[4, -1])
@example(count=5, features=[], indices=[])
def test_the_same_stages_or_both_refuse(count, features, indices):
    """featcli and transformers agree, except that any order is allowed, and a choice of no stage is an error."""
    names = NAMES[:count]
    theirs, ours = by_transformers(names, features, indices), by_featcli(names, features, indices)
    if theirs == () or (isinstance(theirs, str) and isinstance(ours, str)):
        assert isinstance(ours, str)
    elif isinstance(theirs, str):
        assert by_transformers(names, *in_order(names, features, indices)) == ours
        assert by_transformers(names, features, indices) != by_transformers(names, *in_order(names, features, indices))
    else:
        assert theirs == ours
