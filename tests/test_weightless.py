"""Check that stages are found without memory for weights: on the meta device, or with zeros in their place."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from featcli.backbones import timm_model
from featcli.backbones.checkpoint import resolve
from featcli.backbones.hidden_states import HiddenStatesModelSpec
from featcli.backbones.internals import facts_of_timm as facts
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.weightless import WithoutDraws, WithoutValues, WithoutWeights, blank
from featcli.errors import CheckpointError
from featcli.spec.groups import CheckpointSpec


def test_weights_take_no_memory():
    """Each large weight is one zero, nobody writes into it, and the network gives its shapes."""
    with WithoutWeights():
        network = nn.Sequential(nn.Linear(300, 3000), nn.LayerNorm(3000), nn.Linear(3000, 5)).eval()
        assert network(torch.zeros(2, 300)).shape == (2, 5)
        network.requires_grad_(False)  # otherwise all that it computes is kept for gradients
        assert not any(parameter.requires_grad for parameter in network.parameters())
    sizes = [parameter.untyped_storage().nbytes() for parameter in network.parameters()]
    assert [sizes[0], sizes[4]] == [4, 4]
    nn.init.ones_(network[1].weight)  # outside of the block everything is as before
    assert nn.Linear(300, 3000).weight.stride() == (300, 1)


def test_weights_that_a_file_replaces_are_not_drawn():
    """No random number is drawn for a parameter, nor on the meta device; all other values are what they are outside."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with WithoutDraws():
        network = timm.create_model("test_resnet")
        timm.layers.trunc_normal_(nn.Linear(300, 300).weight)
        with torch.device("meta"):
            timm.create_model("test_vit").blocks[0].mlp.fc1.weight.data.normal_()
        assert torch.equal(torch.get_rng_state(), before)
        assert network.bn1.weight.eq(1).all()
        assert torch.equal(torch.empty(3).normal_(), torch.empty(3).normal_(generator=torch.manual_seed(0)))
    wanted = timm.create_model("test_resnet").state_dict()
    with WithoutDraws():
        network.load_state_dict(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())


def test_weights_that_no_file_may_replace_are_drawn(monkeypatch, tmp_path):
    """A network that timm's own reader fills is made with its random numbers, because the reader may leave some."""
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    states = []
    monkeypatch.setattr(timm_model, "facts_of_timm", lambda model: replace(facts(model), has_reader_of_its_own=True))
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: states.append(torch.get_rng_state()))
    spec = resolve(CheckpointSpec(checkpoint=str(tmp_path / "w.safetensors"), arch="test_resnet"))
    before = torch.get_rng_state()
    spec.load(spec.choose())
    assert [torch.equal(state, before) for state in states] == [True, False]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_coatnet"])
def test_a_network_that_looks_into_its_tensors(monkeypatch, name):
    """A network that cannot run on the meta device has the stages and the cost of one that can."""
    spec = resolve(CheckpointSpec(checkpoint=name, random_init=True))
    plain, operations = spec.stages, spec._whole.operations

    def looking(self, network, pixels):
        assert pixels.is_meta or any(not any(parameter.stride()) for parameter in network.module.parameters())
        pixels.sum().item()
        return forward_once(self, network, pixels)

    forward_once = ModelSpec._forward_once
    monkeypatch.setattr(ModelSpec, "_forward_once", looking)
    spec = resolve(CheckpointSpec(checkpoint=name, random_init=True))
    assert spec.stages == plain
    assert spec._whole.operations == pytest.approx(operations, rel=0.01)  # some are counted in another way


def test_maps_take_no_memory():
    """Results of equal values are one value of the right shape, and values that a network looks into are computed."""
    with WithoutValues():
        pixels = blank((2, 3, 640, 640))
        maps = nn.functional.conv2d(pixels, torch.ones(64, 3, 3, 3), padding=1).relu().flatten(2).transpose(1, 2)
        assert maps.shape == (2, 640 * 640, 64)
        assert maps.untyped_storage().nbytes() == 4
        assert nn.functional.avg_pool2d(pixels, 640).tolist() == [[[[0.0]]] * 3] * 2  # few values
        assert torch.arange(9000).max().item() == 8999


def test_a_refusal_costs_no_weights(monkeypatch):
    """A model without maps is refused after a run on the meta device, before it is built."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    devices, run_blank = [], HiddenStatesModelSpec._run_blank
    monkeypatch.setattr(
        HiddenStatesModelSpec, "_run_blank", lambda self, *args: devices.append(args[1]) or run_blank(self, *args)
    )
    with pytest.raises(CheckpointError, match="it packs the pictures of a batch together"):
        resolve(CheckpointSpec(checkpoint=transformers.PixtralVisionConfig(**sizes, image_size=64)))
    assert devices == ["meta"]


@pytest.mark.parametrize("name", ["tresnet_m", "csatv2"])
def test_first_layers_of_many_channels(name):
    """TResNet and CSATv2, which first make more channels of fewer pixels, take three channels."""
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0).eval()
    expected = whole.forward_intermediates(torch.empty(1, 3, 64, 64, device="meta"), intermediates_only=True)
    stages = resolve(CheckpointSpec(checkpoint=name, random_init=True, image_size=64)).stages
    assert [stage.shape for stage in stages] == [tuple(maps.shape[1:]) for maps in expected]
