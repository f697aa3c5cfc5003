"""Check which module a map comes from, as one run shows it."""

import pytest
import torch
from torch import nn

from featcli.backbones.places import Places


class Pair(nn.Module):
    """Returns a tuple with the tensor of interest first."""

    def forward(self, x):
        return x * 2, x.shape


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.keeps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.LayerNorm(4), nn.Identity()
        self.pair, self.twice = Pair(), nn.Tanh()

    def forward(self, x):
        first = self.first(x)
        pair, _ = self.pair(self.keeps(first.permute(0, 2, 3, 1)))
        added = self.twice(self.twice(pair)).clone()
        added += 1
        return {
            "moved": first.flatten(2).transpose(1, 2)[:, 1:],
            "normed": self.norm(first.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            "pair": pair.reshape(1, -1),
            "added": added,
            "computed": first + 1,
            "input": x.contiguous().view(1, 3, -1),
        }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_places(device):
    """A map belongs to the outermost module that returns its values, moved but not changed."""
    with torch.device(device):
        toy, pixels = Toy(), torch.zeros(1, 3, 4, 5)
    places = Places(pixels, lambda name: name == "norm")
    with places.watched(toy):
        found = toy(pixels)
    assert {name: places.of(tensor) for name, tensor in found.items()} == {
        "moved": "first",
        "normed": "first",
        "pair": "pair",
        "added": None,
        "computed": None,
        "input": "pixel_values",
    }
    assert not any(part._forward_hooks for part in toy.modules())
