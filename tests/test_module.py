"""Check a backbone as an object (shown, copied, pickled), and as a torch module beside transformers' own classes."""

import copy
import pickle

import pytest
import torch
from tiny_transformers import TINY

import featcli
from conftest import SAMPLES
from featcli.backbones import module as making
from featcli.errors import CheckpointError, UsageError

T = pytest.importorskip("transformers")

PICTURE = SAMPLES / "nature" / "sea.jpg"
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
# There is one of each kind of ModelSpec, with what is special about it.
KINDS = {
    "swin": lambda: T.SwinConfig(**TINY["swin"]),  # each stage has a norm of its own
    "dinov2": lambda: T.Dinov2Config(**TINY["dinov2"]),  # tokens, and one norm for all stages
    "vit": lambda: T.ViTConfig(**VIT),  # hidden states
    "timm vit": lambda: "test_vit",
    "timm resnet": lambda: T.TimmBackboneConfig(backbone="test_resnet"),
}


def load(kind, **options):
    made = KINDS[kind]()
    return featcli.load_backbone(made, **({"random_init": True} if isinstance(made, str) else {}), **options)


def pixels_of(backbone, batch=1):
    size = (batch, backbone.preprocessing.channels, *backbone.preprocessing.size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    """Copies, and backbones out of a pickle, compute the same bits with tensors of their own."""
    backbone = load(kind, out_features="all")
    pixels = pixels_of(backbone)
    expected = backbone(pixels)
    again = pickle.loads(pickle.dumps(backbone))
    deep = copy.deepcopy(backbone)
    for one in (again, deep, copy.copy(backbone)):
        assert all(torch.equal(found, expected[stage]) for stage, found in one(pixels).items())
        assert torch.equal(one.preprocess(PICTURE), backbone.preprocess(PICTURE))
        assert one.has_class_token == backbone.has_class_token
        if one.has_class_token:
            tokens = zip(one.class_tokens(pixels).values(), backbone.class_tokens(pixels).values(), strict=True)
            assert all(torch.equal(*pair) for pair in tokens)
    for one in (again, deep):
        for parameter in one.network.module.parameters():
            parameter.zero_()
    assert all(torch.equal(found, expected[stage]) for stage, found in backbone(pixels).items())


def test_a_backbone_is_itself():
    """A backbone's repr is one line, it equals only itself, and can be in a set; folded ones can be pickled."""
    backbone = featcli.load_backbone("test_resnet", random_init=True, fold=True, alpha="white", image_size=64)
    assert repr(backbone) == "<backbone test_resnet: stage4 96x2x2 of 3x64x64 pixels, cpu, fp32>"
    again = pickle.loads(pickle.dumps(backbone))
    assert len({backbone, backbone, again}) == 2
    assert again.rules == backbone.rules
    assert torch.equal(again(pixels_of(backbone))["stage4"], backbone(pixels_of(backbone))["stage4"])
    assert isinstance(backbone, featcli.Backbone)


def test_a_head_learns_on_what_a_backbone_gives():
    """Maps take no gradient and give none to the network, but a head on them can be trained."""
    backbone = featcli.load_backbone("test_resnet", random_init=True, image_size=64)
    (maps,) = backbone(pixels_of(backbone, 2)).values()
    assert not maps.requires_grad
    assert not maps.is_inference()
    head = torch.nn.Conv2d(maps.shape[1], 2, 1)
    head(maps).sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_gives_the_maps_of_its_backbone(kind):
    """For normalised floats a module gives its backbone's maps to the bit, whichever stages are selected later."""
    every = load(kind, out_features="all")
    pixels = pixels_of(every)
    expected, floats = every(pixels), every.preprocessing.normalize(pixels)
    middle = every.stages[-2].name
    for cut in (False, True):
        module = load(kind, out_features=[middle]).as_module(cut=cut)
        names = [stage.name for stage in every.stages][: -1 if cut else None]
        assert module.stage_names == names
        for chosen in ([middle], names, names[:1]):
            module.out_features = chosen
            with torch.no_grad():
                found = module(pixel_values=floats)
            stages = [stage for stage in every.stages if stage.name in chosen]
            assert module.out_features == chosen
            assert list(module.out_indices) == [stage.index for stage in stages]
            assert list(module.channels) == [stage.channels for stage in stages]
            assert type(found) is T.modeling_outputs.BackboneOutput
            assert all(torch.equal(m, expected[s]) for m, s in zip(found.feature_maps, chosen, strict=True))
        module.out_indices = [every.stages[0].index]
        assert module.out_features == names[:1]
        assert list(module.num_features) == [stage.channels for stage in every.stages][: len(names)]
        assert module.out_feature_channels == {s.name: s.channels for s in every.stages[: len(names)]}
        with pytest.raises(ValueError, match="stage"):
            module.out_features = [every.stages[-1].name if cut else "stage99"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_trains(kind):
    """A module learns in training mode, shares no tensor with its backbone, and never changes it."""
    backbone = load(kind)
    pixels = pixels_of(backbone, 2)
    before, floats = backbone(pixels), backbone.preprocessing.normalize(pixels)
    module = backbone.as_module()
    assert not module.training
    module.train()
    sum(found.square().mean() for found in module(floats).feature_maps).backward()
    learning = [one.grad is not None for one in module.parameters()]
    assert sum(learning) > 0.8 * len(learning)  # norms of other stages take no part
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert all(torch.equal(found, before[stage]) for stage, found in backbone(pixels).items())
    with torch.no_grad():
        assert not torch.equal(module.eval()(floats).feature_maps[-1], [*before.values()][-1])
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = backbone.as_module()
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(floats).feature_maps[-1], module(floats).feature_maps[-1])
        assert other.to(torch.bfloat16)(floats.bfloat16()).feature_maps[-1].dtype == torch.bfloat16


def test_a_module_beside_a_timm_backbone():
    """A module has the attributes, maps and hidden states of transformers' TimmBackbone of the same configuration."""
    config = T.TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 3])
    own = T.AutoBackbone.from_config(config).eval()
    module = featcli.load_backbone(config).as_module()
    missing = own._backbone.load_state_dict(module.model.state_dict(), strict=False).missing_keys
    assert missing == []
    for name in ("out_indices", "channels", "num_features", "backbone_type"):
        assert getattr(module, name) == getattr(own, name), name
    assert [*module.out_feature_channels.values()] == [*own.out_feature_channels.values()]
    assert type(module.config) is type(own.config)
    pixels = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        one, other = module(pixels, output_hidden_states=True), own(pixels, output_hidden_states=True)
        assert all(torch.equal(*pair) for pair in zip(one.feature_maps, other.feature_maps, strict=True))
        assert [maps.shape[1] for maps in one.hidden_states] == module.num_features
        assert torch.equal(one.hidden_states[3], one.feature_maps[1])
        as_tuple = module(pixels, return_dict=False)
        assert torch.equal(as_tuple[0][1], one.feature_maps[1])
        filtered = module.forward_with_filtered_kwargs(pixels, output_attentions=True, output_hidden_states=None)
        assert torch.equal(filtered.feature_maps[0], one.feature_maps[0])
    with pytest.raises(ValueError, match="attentions"):
        module(pixels, output_attentions=True)
    with pytest.raises(ValueError, match="takes normalised floats"):
        module(pixels_of(featcli.load_backbone(config)))
    with pytest.raises(ValueError, match="save_pretrained is transformers' own"):
        module.save_pretrained("nowhere")


def test_hidden_states_and_attentions(tmp_path):
    """A model outside AutoBackbone gives hidden states and attentions as its class does, and can be saved."""
    config = T.ViTConfig(**VIT)
    config._attn_implementation = "eager"
    T.ViTModel(config).save_pretrained(tmp_path / "vit")
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    module = featcli.load_backbone(tmp_path / "vit").as_module()
    module.model.set_attn_implementation("eager")
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = module(pixels, output_hidden_states=True, output_attentions=True)
        own = module.model(pixels, output_hidden_states=True, output_attentions=True)
    assert all(torch.equal(*pair) for pair in zip(found.attentions, own.attentions, strict=True))
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, own.hidden_states, strict=True))
    module.save_pretrained(tmp_path / "again")
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "again")
    again = featcli.load_backbone(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again.as_module()(pixels).feature_maps[0], found.feature_maps[0])


def test_frozen_norms(tmp_path):
    """With `freeze_batch_norm_2d` norms stay the same in training, as in transformers; without it they learn."""
    for is_frozen in (True, False):
        backbone = featcli.load_backbone(T.TimmBackboneConfig(backbone="test_resnet", freeze_batch_norm_2d=is_frozen))
        module = backbone.as_module()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items() if "running_mean" in name}
        with torch.no_grad():
            found = module(backbone.preprocessing.normalize(pixels_of(backbone))).feature_maps[0]
        torch.testing.assert_close(found, backbone(pixels_of(backbone))["stage4"], rtol=1e-4, atol=1e-5)
        module.train()(torch.rand(2, 3, 64, 64))
        same = [torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items() if name in before]
        assert len(same) > 3
        assert all(same) if is_frozen else not any(same)
    module.freeze_batch_norm_2d()
    module.unfreeze_batch_norm_2d()


@pytest.mark.parametrize("backbone", ["swin", "timm"])
def test_a_module_inside_a_maskformer(tmp_path, backbone):
    """A MaskFormer with featcli's module as encoder gives what it gives with transformers' own, and trains."""
    small = {"fpn_feature_size": 32, "mask_feature_size": 32}
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_queries": 5}
    torch.manual_seed(0)
    config = (
        T.SwinConfig(**TINY["swin"], out_features=STAGES)
        if backbone == "swin"
        else T.TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4])
    )
    model = T.MaskFormerForInstanceSegmentation(
        T.MaskFormerConfig(backbone_config=config, decoder_config=T.DetrConfig(**sizes), **small)
    ).eval()
    model.save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    level, module = model.model.pixel_level_module, featcli.load_backbone(tmp_path).as_module()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        whole = model(pixels).masks_queries_logits
        level.encoder = module
        assert torch.equal(model(pixels).masks_queries_logits, whole)
    masks, classes = [(torch.rand(2, 64, 64) > 0.5).float() for _ in pixels], [torch.tensor([0, 1]) for _ in pixels]
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(5):
        loss = model(pixels, mask_labels=masks, class_labels=classes).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sum(one.grad is not None and bool(one.grad.any()) for one in module.parameters()) > 10


@pytest.mark.parametrize("is_timm", [True, False])
def test_a_stage_that_is_refused(tmp_path, is_timm):
    """A module of featcli's class is unchanged after it refused a stage; transformers' own needs a known one set."""
    if is_timm:
        module = featcli.load_backbone("test_resnet", random_init=True, out_indices=[2, 4]).as_module()
    else:
        module = featcli.load_backbone(T.ResNetConfig(**TINY["resnet"], out_indices=[2, 4])).as_module()
    for name, value in (("out_features", ["stage2", "stage9"]), ("out_indices", [1, 7])):
        with pytest.raises(ValueError, match=r"stage9|7"):
            setattr(module, name, value)
        if is_timm:
            assert (module.out_features, module.out_indices) == (["stage2", "stage4"], [2, 4])
            assert list(module.config.out_indices) == [2, 4]
            module.out_features = ["layer2", "layer4"]  # timm's names, as TimmBackbone has them
        else:
            module.out_features = ["stage2", "stage4"]
        assert module.out_features == ["stage2", "stage4"]
        assert len(module(torch.rand(1, 3, 64, 64)).feature_maps) == 2


def test_refusals_of_as_module(tmp_path, monkeypatch):
    """Without transformers, or if the checkpoint has changed, as_module raises and says why."""
    T.ResNetModel(T.ResNetConfig(**TINY["resnet"])).save_pretrained(tmp_path)
    T.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    backbone = featcli.load_backbone(tmp_path)
    assert backbone.as_module().out_features == ["stage4"]
    T.ResNetModel(T.ResNetConfig(**TINY["resnet"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="its weights have changed since this backbone was loaded"):
        backbone.as_module()

    def absent():
        raise ModuleNotFoundError("transformers")

    monkeypatch.setattr(making, "import_transformers", absent)
    with pytest.raises(UsageError, match="as_module needs transformers"):
        backbone.as_module()
