import numpy as np
import pytest
import torch

from featcli.errors import UsageError
from featcli.run.pooling import POOLINGS, StageTensors, clamped, pooling

MAPS = torch.randn(3, 5, 8, 6, generator=torch.Generator().manual_seed(0))
PREFIX = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))  # a class token, another, two registers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", MAPS.numpy()),
        ("avg", MAPS.numpy().mean((2, 3))),
        ("max", MAPS.numpy().max((2, 3))),
        ("4x3", MAPS.numpy().reshape(3, 5, 4, 2, 3, 2).mean((3, 5))),
        ("1x1", MAPS.numpy().mean((2, 3), keepdims=True)),
        ("gem", np.cbrt((np.maximum(MAPS.numpy().astype(np.float64), 1e-6) ** 3).mean((2, 3)))),
        ("cls", PREFIX.numpy()[:, 0]),
        ("registers", PREFIX.numpy()[:, 2:]),
        ("cls+avg", np.concatenate([PREFIX.numpy()[:, 0], MAPS.numpy().mean((2, 3))], 1)),
    ],
)
def test_against_numpy(name, expected):
    """Each pooling equals the numpy expression of its name, and has the shape that it announces."""
    found = pooling(name).reduce(StageTensors(MAPS, PREFIX, num_registers=2))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert tuple(found.shape[1:]) == pooling(name).shape((5, 8, 6), 2)
    assert len(pooling(name).axes) == found.ndim - 1


def test_averages_of_low_precision_maps_are_taken_in_float32():
    """Pooling of bfloat16 maps does not add the rounding of a bfloat16 sum."""
    maps = (MAPS + 100).bfloat16()
    assert torch.equal(pooling("avg").of_maps(maps), maps.float().mean((2, 3)))


def test_the_share_that_is_clamped():
    """Of each image it is the share of values below 1e-6, which the generalised mean takes for that."""
    assert np.allclose(clamped(MAPS).numpy(), (MAPS.numpy() < 1e-6).mean((1, 2, 3)))


@pytest.mark.parametrize("name", ["mean", "0x3", "7", "7x", "axb", "-1x2", ""])
def test_unknown_names(name):
    """An unknown pooling is refused with the names that exist."""
    with pytest.raises(UsageError) as refused:
        pooling(name)
    assert all(known in refused.value.hint for known in POOLINGS)
