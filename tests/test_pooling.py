import numpy as np
import pytest
import torch

from featcli.errors import UsageError
from featcli.run.pooling import POOLINGS, pooling

MAPS = torch.randn(3, 5, 8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", MAPS.numpy()),
        ("avg", MAPS.numpy().mean((2, 3))),
        ("max", MAPS.numpy().max((2, 3))),
        ("4x3", MAPS.numpy().reshape(3, 5, 4, 2, 3, 2).mean((3, 5))),
        ("1x1", MAPS.numpy().mean((2, 3), keepdims=True)),
    ],
)
def test_against_numpy(name, expected):
    """Each pooling equals the numpy expression of its name, and has the shape that it announces."""
    found = pooling(name).reduce(MAPS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert tuple(found.shape[1:]) == pooling(name).shape((5, 8, 6))


def test_averages_of_low_precision_maps_are_taken_in_float32():
    """Pooling of bfloat16 maps does not add the rounding of a bfloat16 sum."""
    maps = (MAPS + 100).bfloat16()
    assert torch.equal(pooling("avg").reduce(maps), maps.float().mean((2, 3)))


@pytest.mark.parametrize("name", ["mean", "0x3", "7", "7x", "axb", "-1x2", ""])
def test_unknown_names(name):
    """An unknown pooling is refused with the names that exist."""
    with pytest.raises(UsageError) as refused:
        pooling(name)
    assert all(known in refused.value.hint for known in POOLINGS)
