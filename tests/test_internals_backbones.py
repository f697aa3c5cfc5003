"""Check the fence around torch, timm, transformers and huggingface_hub: what breaks if a name there goes."""

import contextlib
import errno
import importlib
import inspect
import json
import logging
import os
import pickle
import re
import warnings
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import featcli
from featcli.backbones import internals
from featcli.errors import CheckpointError, MachineError
from featcli.system.faults import fault_behind

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def resnet():
    """Return timm's smallest ResNet, in eval mode."""
    return timm.create_model("test_resnet", num_classes=0).eval()


@pytest.fixture(scope="module")
def vit():
    """Return timm's smallest ViT, without weights."""
    with torch.device("meta"):
        return timm.create_model("test_vit", num_classes=0).eval()


# torch and numpy


def test_nothing_private_is_used_outside_the_fence():
    """No other module of backbones/ imports a library below its public names: such imports belong into the fence."""
    private = re.compile(
        r"(?:from|import) (timm\.(?!data\b)|transformers\.(?!modeling_outputs\b)"
        r"|torch\.(?!utils\.flop_counter\b|overrides\b)|huggingface_hub\.(?!errors\b))"
        r"|modeling_auto|pretrained_cfg\b\.get|__func__|nn\.Module\.\w+ ="
    )
    wrong = [
        f"{path.name}: {found[0]}"
        for path in (Path(featcli.__file__).parent / "backbones").glob("*.py")
        if path.name not in ("internals.py", "torchvision_operators.py")
        for found in private.finditer(path.read_text())
    ]
    assert wrong == []


def test_loads_are_reported():
    """If modules cannot be hooked as they are made, nobody can say which weights a library did not load."""
    made_before = nn.Sequential(nn.Linear(1, 1))
    with internals.reported_loads() as loads:
        made_before.load_state_dict({}, strict=False)
        module = nn.Sequential(nn.Linear(1, 1))
        module.load_state_dict({"0.weight": torch.zeros(1, 1), "0.more": torch.zeros(1)}, strict=False)
        other = Thread(target=lambda: nn.Sequential(nn.Linear(1, 1)).load_state_dict({}, strict=False))
        other.start()
        other.join()
    assert all(isinstance(load, internals.Load) for load in loads)
    assert [(load.module, [*load.arrived], load.missing, load.unexpected) for load in loads] == [
        (module, ["0.weight", "0.more"], ["0.bias"], ["0.more"])
    ]
    module.load_state_dict({}, strict=False)
    assert len(loads) == 1  # the hooks are gone


def test_heads_of_models_that_were_trained_without():
    """If timm again refuses a head that its configuration says is absent, fine-tuned DINOv2 cannot be read."""
    with torch.device("meta"):
        state = timm.create_model("test_vit3", num_classes=3).state_dict()
        options = {**internals.option_for_weights((), state | {"head.more": torch.zeros(1)})}
        options["pretrained_cfg"] = {"num_classes": 0}
        with internals.reported_loads() as loads:
            timm.create_model("test_vit3", pretrained=True, num_classes=0, **options)
    assert "head.more" in loads[-1].unexpected


def test_errors_of_the_meta_device():
    """If these errors are not known, networks that look into their tensors are refused for their size."""
    for look in (lambda tensor: tensor.item(), lambda tensor: tensor.numpy(), lambda tensor: tensor + torch.ones(1, 2)):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)) as error:
            look(torch.ones(1, 1, device="meta"))
        assert internals.is_of_meta(error.value)
    assert not internals.is_of_meta(AssertionError("Input height (97) doesn't match model (64)"))


def test_whole_models_of_transformers():
    """If whole models are not known, parts that a backbone does not need, such as a pooler, count as its own."""
    config = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32)
    with torch.device("meta"):
        backbone = transformers.SwinBackbone(config)
    assert internals.prefix_of_transformers(backbone) == "swin"
    assert internals.is_whole_model(backbone.swin)
    assert not internals.is_whole_model(backbone.swin.encoder)
    patterns = internals.ignored_names_of_transformers(backbone)
    assert any("relative_position_index" in pattern for pattern in patterns)


def test_loads_are_reported_where_timm_loads(resnet):
    """If timm loads its models in another way, nobody knows what it did not load."""
    with internals.reported_loads() as loads:
        options = internals.option_for_weights(("fc",), resnet.state_dict() | {"layer1.0.more": torch.zeros(1)})
        made = timm.create_model("test_resnet", pretrained=True, num_classes=0, **options)
    (load,) = (load for load in loads if load.module is made)
    assert (load.missing, load.unexpected) == ([], ["layer1.0.more"])
    assert {"layer1.0.more", "conv1.0.weight"} <= {*load.arrived}
    assert "fc.weight" not in load.arrived


def test_weights_are_read_not_mapped(tmp_path, resnet):
    """If a library maps weights in another way, a share that goes away kills the process by a signal."""
    path, pickle_path = tmp_path / "model.safetensors", tmp_path / "w.pth"
    safetensors.torch.save_file(resnet.state_dict(), path)
    torch.save(resnet.state_dict(), pickle_path)
    maps = Path("/proc/self/maps")
    plain = safetensors.torch.load_file, torch.load
    with internals.files_are_read():
        found = timm.models.load_state_dict(str(path)), torch.load(pickle_path, mmap=True)
        assert str(tmp_path) not in maps.read_text()
    assert (safetensors.torch.load_file, torch.load) == plain
    mapped = safetensors.torch.load_file(path), torch.load(pickle_path, mmap=True)
    assert maps.read_text().count(str(tmp_path)) >= 2
    for one, other in zip(found, mapped, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_libraries_ask_for_files_by_os_path(tmp_path, monkeypatch):
    """If libraries ask for files in another way, a failing share is again reported as a broken checkpoint."""
    transformers.ResNetConfig().save_pretrained(tmp_path)
    plain, stat = (os.path.isfile, os.path.isdir, os.path.exists), os.stat

    def failing(path, **options):
        if str(tmp_path) in str(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(OSError, match="repo") as swallowed:
        transformers.AutoConfig.from_pretrained(str(tmp_path))
    assert fault_behind(swallowed.value) is None
    with pytest.raises(MachineError, match="Stale file handle"), internals.faults_are_heard(str(tmp_path)):
        transformers.AutoConfig.from_pretrained(str(tmp_path))
    with pytest.raises(MachineError), internals.faults_are_heard(str(tmp_path)), contextlib.suppress(OSError):
        os.path.exists(tmp_path)
    monkeypatch.undo()
    with internals.faults_are_heard(str(tmp_path)):
        there, gone, folder = tmp_path / "config.json", tmp_path / "gone", tmp_path
        for ask, real in zip((os.path.isfile, os.path.isdir, os.path.exists), plain, strict=True):
            assert [ask(path) for path in (there, gone, folder, "\0")] == [
                real(path) for path in (there, gone, folder, "\0")
            ]
    assert (os.path.isfile, os.path.isdir, os.path.exists) == plain


def test_transformers_reads_weights(tmp_path):
    """If transformers opens weights in another way, it maps files, or tensors lie in memory in another way."""
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    model.save_pretrained(tmp_path)

    def places(model):
        return {name: tensor.data_ptr() % 4096 for name, tensor in model.named_parameters()}

    with internals.files_are_read():
        found, _ = internals.load_pretrained(type(model), str(tmp_path), model.config, None)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    mapped = type(model).from_pretrained(tmp_path)
    assert places(found) == places(mapped)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_pickles_that_could_run_code_are_known(tmp_path):
    """If torch words this differently, a file that could run code is called damaged, and its advice is repeated."""
    torch.save({"a": Path()}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError) as refused:
        torch.load(tmp_path / "code.pt", weights_only=True)
    assert internals.holds_more_than_tensors(refused.value)
    assert internals.class_in_pickle(refused.value).startswith("pathlib.")  # else nobody is told what is in the file
    assert internals.class_in_pickle(ValueError("weights_only")) == ""
    assert "weights_only" in str(refused.value)  # transformers raises it again as an error of another type
    assert not internals.ends_too_early(refused.value)


def test_numbers_of_numpy_are_read(tmp_path):
    """If numpy pickles its numbers in another way, training checkpoints that hold a best accuracy are refused."""
    torch.save({"best": np.float64(0.5), "step": np.int64(3)}, tmp_path / "x.pt")
    with torch.serialization.safe_globals(internals.numpy_numbers()):
        assert torch.load(tmp_path / "x.pt", weights_only=True) == {"best": 0.5, "step": 3}


def test_norms_of_timm_are_known_by_name():
    """If BatchNormAct2d or Conv2dSame get other names or parts, convolution nets of timm are not folded, and slower."""
    norm = timm.layers.BatchNormAct2d(4).eval()
    assert type(norm).__name__ == internals.NORM_WITH_ACTIVATION
    assert internals.is_plain_norm(norm)
    assert internals.steps_after_norm(norm) == [norm.drop, norm.act]
    norm.running_mean.fill_(0.3)
    pixels = torch.randn(2, 4, 3, 3)
    plain = nn.functional.batch_norm(
        pixels, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps, training=False
    )
    assert torch.equal(norm(pixels), nn.Sequential(*internals.steps_after_norm(norm))(plain))
    assert internals.is_plain_convolution(timm.layers.create_conv2d(3, 4, 3, stride=2, padding="same"))
    assert not internals.is_plain_convolution(timm.layers.StdConv2d(3, 4, 3))
    assert not internals.is_plain_norm(nn.BatchNorm2d(4, track_running_stats=False))


def test_fused_weights_do_what_both_did():
    """If `fuse_conv_bn_weights` goes, or its arguments change, folding changes maps or fails."""
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
    norm.running_mean.fill_(0.2)
    norm.running_var.fill_(2.0)
    pixels = torch.randn(1, 3, 8, 8)
    weight, bias = internals.fused_weights(conv, norm)
    assert torch.allclose(nn.functional.conv2d(pixels, weight, bias), norm(conv(pixels)), atol=1e-5)


def test_operations_are_counted():
    """If torch renames its operators, no layout is ever tried, because no network seems to have convolutions."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 8, 8))
    convolutions = 2 * 36 * 4 * 3 * 9
    assert internals.operations_of(counter) == (convolutions + 2 * 4 * 36 * 5, convolutions)


def test_options_of_the_compiler_exist():
    """If torch.compile loses an option, --compile fails, or uses the memory of maps again too early."""
    options = torch._inductor.list_options()
    assert {"freezing", "triton.cudagraphs"} <= set(options)
    internals.compiled(lambda pixels: pixels)  # an unknown option is refused here


def test_every_network_is_compiled(monkeypatch):
    """If torch counts compilations otherwise, the ninth network of a process runs as it is, though a plan says more."""
    real, graphs = torch.compile, []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=backend, dynamic=False))
    for number in range(10):
        assert internals.compiled(partial(torch.add, other=number))(torch.zeros(2))[0] == number
    assert len(graphs) == 10


# huggingface_hub


def test_the_hub_can_be_left_out():
    """If the client reads HF_HUB_OFFLINE in another place, machines without a network retry for half a minute."""
    import huggingface_hub

    before = internals.hub_is_offline()
    try:
        for is_offline in (False, True):
            internals.set_hub_offline(is_offline)
            assert internals.hub_is_offline() == huggingface_hub.is_offline_mode() == is_offline
        with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError) as refused:
            huggingface_hub.hf_hub_download("nobody/nothing", "config.json")
        assert type(refused.value.__cause__).__name__ == "OfflineModeIsEnabled"  # nobody was asked
    finally:
        internals.set_hub_offline(before)


def test_the_hub_can_be_asked(monkeypatch):
    """If the client's session or the hub's address get other names, every hub counts as one that does not answer."""
    import huggingface_hub

    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append((address, timeout))

    assert callable(huggingface_hub.get_session)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    internals.ask_hub(3)
    assert asked == [(huggingface_hub.constants.ENDPOINT, 3)]
    assert asked[0][0].startswith("http")


def test_errors_of_the_hub_have_these_names():
    """If the client's exceptions get other names, users read the client's own words about a missing repository."""
    errors = importlib.import_module("huggingface_hub.errors")
    assert [name for name in internals.HUB_ERRORS if not issubclass(getattr(errors, name), Exception)] == []


# The models of timm


def test_facts_of_a_model(resnet):
    """If timm's configurations get other fields, names lack their tags and weights files their hashes."""
    facts = internals.facts_of_timm(resnet)
    assert (facts.architecture, facts.tag) == ("test_resnet", "r160_in1k")
    assert facts.hub_id == "timm/test_resnet.r160_in1k"
    assert (facts.hub_filename, facts.has_reader_of_its_own) == (None, False)


def test_models_with_a_reader_of_their_own():
    """If `custom_load` goes, formats that timm reads by itself are refused as if nothing had been loaded."""
    fields = timm.get_pretrained_cfg("resnet18").__dataclass_fields__
    assert {"custom_load", "hf_hub_id", "hf_hub_filename", "first_conv", "tag", "architecture"} <= set(fields)
    assert [name for name in timm.list_models("resnetv2_*") if timm.get_pretrained_cfg(name).custom_load]


def test_channels_of_the_pixels():
    """If `in_chans` goes, nobody can tell what a model takes: TResNet's first layer has 48 channels for three."""
    with torch.device("meta"):
        grey, deep = timm.create_model("test_resnet", in_chans=1), timm.create_model("tresnet_m")
    assert (internals.in_chans_of_timm(grey), internals.in_chans_of_timm(deep)) == (1, 3)


def test_options_of_constructors(resnet, vit):
    """If constructors get other parameters, --image-size and --fit native refuse models that could take them."""
    assert internals.is_option_of_timm(vit, "img_size")
    assert internals.is_option_of_timm(vit, "dynamic_img_size")
    assert not internals.is_option_of_timm(resnet, "img_size")
    assert internals.is_option_of_timm(resnet, "in_chans")


def test_patches_and_class_tokens(resnet, vit):
    """If models say in another way what tokens they have, class tokens are refused, and odd sizes lose their border."""
    assert internals.patch_of_timm(vit) == (16, 16)
    assert internals.patch_of_timm(resnet) == ()
    assert internals.has_class_token_of_timm(vit)
    assert not internals.has_class_token_of_timm(resnet)
    with torch.device("meta"):
        assert not internals.has_class_token_of_timm(timm.create_model("test_vit4"))  # it has only registers


def test_stages_and_pruning(resnet):
    """If timm prunes or taps in another way, maps are of other stages, or a whole model is computed for the first."""
    assert internals.stages_of_timm(resnet)[:2] == [("act1", 2), ("layer1", 4)]
    cut = timm.create_model("test_resnet", num_classes=0).eval()
    cut.load_state_dict(resnet.state_dict())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole, _ = internals.run_timm(resnet, pixels, [0, 1], normed=False)
        indices = internals.prune_timm(cut, [0, 1], keeps_norm=False)
        found, _ = internals.run_timm(cut, pixels, indices, normed=False)
    assert [tuple(maps.shape[2:]) for maps in found] == [(32, 32), (16, 16)]
    assert all(torch.equal(one, other) for one, other in zip(whole, found, strict=True))
    assert not any(name.startswith("layer2") for name, _ in cut.named_parameters())


def test_class_tokens_come_with_the_maps():
    """If timm gives prefix tokens in another way, --pool cls stores what is no class token."""
    vit = timm.create_model("test_vit", num_classes=0).eval()
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        (plain,), none = internals.run_timm(vit, pixels, [0], normed=False)
        (maps,), (tokens,) = internals.run_timm(vit, pixels, [0], normed=False, with_prefixes=True)
        whole = vit.blocks[0](vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels))))
    assert none == []
    assert torch.equal(plain, maps)
    assert torch.equal(torch.cat([tokens, maps.flatten(2).transpose(1, 2)], 1), whole)


def test_vectors_come_with_the_maps(resnet):
    """If timm's `forward_head` takes something else than the last map, embeddings are not those of the model."""
    model = timm.create_model("test_resnet").eval()
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        found = internals.run_whole_timm(model, pixels, [1], normed=False, vectors=["embedding", "logits"])
        none, _, vectors = internals.run_whole_timm(model, pixels, [], normed=False, vectors=["embedding"])
        features, expected = model.forward_features(pixels), model(pixels)
        embedding = model.forward_head(features, pre_logits=True)
        (second,), _ = internals.run_timm(model, pixels, [1], normed=False)
    assert none == []
    assert torch.equal(found[0][0], second)
    assert torch.equal(vectors["embedding"], embedding)
    assert torch.equal(found[2]["embedding"], embedding)
    assert torch.equal(found[2]["logits"], expected)


def test_registers_are_counted():
    """If timm calls its registers otherwise, --pool registers finds none."""
    with torch.device("meta"):
        assert internals.num_registers_of_timm(timm.create_model("test_vit4")) > 0
        assert internals.num_registers_of_timm(timm.create_model("test_vit")) == 0


def test_heads_that_project():
    """If timm says otherwise how wide the heads of its image-text models are, a projection is taken for classes."""
    assert internals.head_projects_of_timm("vit_base_patch16_clip_224", "openai")
    assert internals.head_projects_of_timm("resnet50_clip", "")
    for architecture, tag in (("vit_base_patch16_clip_224", "openai_ft_in1k"), ("resnet18", ""), ("nothing", "")):
        assert not internals.head_projects_of_timm(architecture, tag)
    names = timm.list_pretrained()
    projecting = {name for name in names if internals.head_projects_of_timm(*name.split(".", 1))}
    with_texts = {name for name in names if "clip" in name or "pe_core" in name}
    assert len(projecting) > 100
    assert projecting <= with_texts
    others = with_texts - projecting  # which have no head, or were trained further to tell classes
    assert all("_ft_in" in name or timm.get_pretrained_cfg(name).num_classes == 0 for name in others)


def test_models_that_make_a_vector(resnet):
    """If timm's models make vectors by another name, none has an embedding."""
    assert internals.has_head_of_timm(resnet)
    assert not internals.has_head_of_timm(nn.Identity())


def test_arguments_in_the_configuration_of_a_folder(tmp_path):
    """If a folder's `model_args` are not read, two different networks with the same weights have one plan."""
    config = {"architecture": "test_resnet", "model_args": {"act_layer": "gelu"}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert internals.model_args_of_timm(f"local-dir:{tmp_path}") == {"act_layer": "gelu"}
    assert internals.model_args_of_timm("test_resnet.r160_in1k") == {}


@pytest.mark.parametrize(("name", "is_pretrained"), [("resnet5", False), ("resnet50.no_such", True)])
def test_names_that_timm_does_not_know(name, is_pretrained):
    """If timm refuses names in other words, wrong names end as broken checkpoints, without similar names."""
    with pytest.raises(Exception, match=name.partition(".")[2] or name) as refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm.create_model(name, pretrained=is_pretrained)
    assert internals.is_unknown_to_timm(refused.value)


def test_weights_from_memory(resnet):
    """If `pretrained_cfg_overlay` goes, only timm reads weights: no prefixes, no containers, and code in pickles."""
    options = internals.option_for_weights(("fc",), resnet.state_dict())
    made = timm.create_model("test_resnet", pretrained=True, num_classes=0, **options)
    assert torch.equal(made.conv1[0].weight, resnet.conv1[0].weight)
    assert "state_dict" in made.pretrained_cfg
    internals.forget_weights(made)
    assert "state_dict" not in made.pretrained_cfg


def test_timm_is_silent_and_heard_again(caplog):
    """If timm logs under another name, every superfluous head is a warning of many lines."""
    logger = logging.getLogger("timm")
    assert logging.getLogger("timm.models._builder").name.startswith(logger.name)
    before = logger.level
    with internals.silent_timm():
        assert not logging.getLogger("timm.models._builder").isEnabledFor(logging.WARNING)
    assert logger.level == before
    assert timm.models._builder._logger.name.startswith("timm.")


def test_operations_are_seen():
    """If torch's blocks see no operations, the shapes of networks that look into their tensors cost gigabytes."""
    seen = []

    class Noting(internals.OperationMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), len(internals.leaves_of(args))))
            return internals.mapped(lambda one: one + 1, func(*args, **kwargs or {}))

    with Noting():
        found = torch.cat([torch.ones(1), torch.zeros(1)])
    assert ("aten.cat.default", 2) in seen
    assert found.tolist() == [3.0, 2.0]  # one more for what was made, and one more for what was joined


def test_what_timm_prints_is_not_heard(capsys):
    """If EVA's converter prints in another way, a checkpoint of DINOv3 breaks the JSON of a command."""
    eva = internals._module_of_eva()
    with internals.silent_timm():
        eval("print('heard')", vars(eva))
    assert capsys.readouterr().out == ""
    eval("print('heard')", vars(eva))
    assert capsys.readouterr().out == "heard\n"
    assert "print(" in inspect.getsource(eva.checkpoint_filter_fn)


def test_arguments_of_constructors():
    """If constructors do not say what they take, an argument without effect looks like an unknown one."""
    found = internals.arguments_of_timm(timm.create_model("test_vit"))
    assert found["qkv_bias"] is True
    assert "self" not in found
    assert "blocks" in internals.arguments_of_timm(timm.create_model("test_byobnet"))  # in its family's dataclass
    noted = vars(timm.create_model("test_vit")).keys()
    assert noted >= internals.NOTES_OF_TIMM


# The preprocessing of timm


def test_the_transform_leaves_bytes():
    """If the last step does more than make a tensor, or steps have other parts, pixels differ, or steps lack names."""
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("resnet18").to_dict())
    transform, steps = internals.timm_transform(config)
    picture = Image.new("RGB", (300, 260), (10, 20, 30))
    found = np.asarray(transform(picture))
    assert (found.shape, found.dtype) == ((224, 224, 3), np.uint8)
    whole = timm.data.create_transform(**config, is_training=False, use_prefetcher=True)(picture)
    assert np.array_equal(found.transpose(2, 0, 1), whole)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, :235]
    assert torch.equal(transform(tensor), tensor[:, 5:229, 38:262])
    assert steps == ["Resize 235 bicubic", "CenterCrop 224x224"]


def test_words_and_greys_of_timm():
    """If timm's loader changes how it normalises greys or names filters, pixels differ from timm's own."""
    assert internals.timm_resampling("bicubic") is Image.Resampling.BICUBIC
    assert internals.values_for_channels((0.1, 0.2, 0.6), 1) == pytest.approx((0.3,))
    assert internals.values_for_channels((0.1, 0.2, 0.6), 3) == (0.1, 0.2, 0.6)


@pytest.mark.parametrize("mode", ["center", "border"])
@pytest.mark.parametrize("edges", [(64, 64), (48, 80)])
@pytest.mark.parametrize("size", [(90, 130), (130, 91)])
def test_sizes_before_a_crop(mode, edges, size):
    """If timm rounds differently, the middle of a long picture gets another size than the whole would have."""
    config = {"input_size": (3, *edges), "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": mode}
    transform = timm.data.create_transform(config["input_size"], use_prefetcher=True, **dict([*config.items()][1:]))
    resized = transform.transforms[0](Image.new("RGB", size[::-1]))
    assert internals.timm_sizes(config)(size) == (resized.height, resized.width)


# The models of transformers


def test_renamings_of_transformers():
    """If the table of renamed tensors has another form, old folders of larger models with a backbone are refused."""
    config = transformers.LwDetrConfig(architectures=["LwDetrForObjectDetection"])
    found = internals.renamings_of_transformers(config)
    assert found["attention.attention.query"] == "attention.q_proj"
    assert found["attention.output"] == "attention.o_proj"
    assert internals.renamings_of_transformers(transformers.UperNetConfig()) == {}


def test_mappings_of_transformers():
    """If the mappings get other names, no checkpoint of transformers is read at all."""
    assert internals.backbone_classes()[transformers.ResNetConfig] is transformers.ResNetBackbone
    assert transformers.ViTConfig not in internals.backbone_classes()
    assert internals.vision_class(transformers.ViTConfig()) is transformers.ViTModel
    assert internals.vision_class(transformers.CLIPVisionConfig()) is transformers.CLIPVisionModel
    assert internals.vision_class(transformers.BertConfig()) is None
    assert internals.plain_class(transformers.CLIPConfig()) is transformers.CLIPModel
    two = (transformers.DeiTForImageClassification, transformers.DeiTForImageClassificationWithTeacher)
    assert internals.classes_of_classifiers(transformers.DeiTConfig()) == two
    assert internals.classes_of_classifiers(transformers.ResNetConfig()) == (transformers.ResNetForImageClassification,)
    assert internals.classes_of_classifiers(transformers.SamVisionConfig()) == ()


def test_models_outside_the_mapping_are_found_by_name():
    """If configurations and models no longer have similar names, towers that AutoModel does not know are refused."""
    assert "owlvit_vision_model" not in transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    assert internals.vision_class(transformers.OwlViTVisionConfig()) is transformers.OwlViTVisionModel


def test_a_configuration_is_read_as_it_is_written(tmp_path):
    """If defaults are added to what config.json says, a new version of transformers makes another plan."""
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 16}')
    assert internals.written_config(str(tmp_path)) == {"model_type": "dinov2", "hidden_size": 16}
    assert internals.read_config_of(str(tmp_path)).hidden_size == 16


def test_revisions_are_an_argument_of_their_own():
    """If transformers' loaders rename `revision` or the name, hub ids with a revision are not found."""
    found = internals.name_and_revision("lab/tiny@v2")
    assert found == {"pretrained_model_name_or_path": "lab/tiny", "revision": "v2"}
    assert internals.name_and_revision("lab/tiny").keys() == {"pretrained_model_name_or_path"}
    assert found.keys() <= inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters.keys()


def test_the_plain_loader_is_there(tmp_path):
    """If `from_pretrained` or its report changes, weights are not read, or not proven."""
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[8, 8], embedding_size=8)
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    with internals.silent_transformers():
        found, report = internals.load_pretrained(transformers.ResNetModel, str(tmp_path), config, {"^resnet\\.": ""})
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    assert not report["missing_keys"]
    assert sorted(report["unexpected_keys"]) == ["classifier.1.bias", "classifier.1.weight"]
    assert torch.equal(found.embedder.embedder.convolution.weight, model.resnet.embedder.embedder.convolution.weight)


def test_every_model_that_freezes_its_norms_is_known():
    """If a model gains or loses `replace_batch_norm` unnoticed, its maps differ from its own in last bits."""
    models = Path(transformers.__file__).parent / "models"
    there = {
        path.parent.name for path in models.glob("*/modeling_*.py") if "def replace_batch_norm" in path.read_text()
    }
    assert there == internals.REPLACE_NORMS


def test_norms_are_replaced_in_place():
    """If `replace_batch_norm` moves or needs more, replay of DETR and its relatives differs from the whole model."""
    replace = internals.norm_replacer(transformers.DetrConfig())
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        replace(network)
    assert type(network[1]) is not nn.BatchNorm2d
    assert "Frozen" in type(network[1]).__name__
    assert internals.norm_replacer(transformers.UperNetConfig()) is None
    assert internals.norm_replacer(transformers.RTDetrConfig(freeze_backbone_batch_norms=False)) is None


def test_a_replacement_that_is_gone_is_said(monkeypatch):
    """A known model whose replacement of norms is gone is refused, so norms are never left unfrozen silently."""
    from transformers.models.detr import modeling_detr

    monkeypatch.delattr(modeling_detr, "replace_batch_norm")
    with pytest.raises(CheckpointError, match="lacks replace_batch_norm"):
        internals.norm_replacer(transformers.DetrConfig())


def test_code_of_a_checkpoint_is_refused_in_these_words(tmp_path):
    """If transformers refuses code in other words, users are told to trust it."""
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}')
    (tmp_path / "code.py").write_text("class Mine: pass\n")
    with pytest.raises(ValueError, match=r"custom code|trust_remote_code") as refused:
        transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert internals.needs_code_of_its_own(refused.value)


def test_transformers_is_silent_and_heard_again():
    """If its logging gets other switches, bars and reports of transformers stand between featcli's own lines."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    with internals.silent_transformers():
        assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == (logging.CRITICAL, False)
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before


# The preprocessing of transformers


def test_processors_of_one_backend(tmp_path):
    """If backends get other names, another backend's pixels are taken for the checkpoint's, or none is found."""
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    for backend, kind in (("pil", transformers.ViTImageProcessorPil), ("torchvision", transformers.ViTImageProcessor)):
        processor = internals.load_processor(str(tmp_path), backend)
        assert (type(processor), processor.backend) == (kind, backend)
        assert dict(internals.plain_processor((64, 96), backend).size)["height"] == 64
    assert internals.processor_class("convnext", "pil") is transformers.ConvNextImageProcessorPil
    assert internals.processor_class("nothing", "pil") is None


def test_torchvision_resizes_as_its_backend_does():
    """If torchvision or the table of its filters moves, rectangles of that backend are no longer its own pixels."""
    picture = Image.effect_noise((50, 33), 90).convert("RGB")
    processor = internals.plain_processor((24, 40), "torchvision")
    expected = processor(picture, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(internals.resized_by_torchvision(picture, (24, 40), int(processor.resample)), expected)


def test_what_is_asked_of_an_image_processor():
    """If processors lose one of these attributes, sizes, steps or normalisation are unknown."""
    processor = internals.plain_processor((64, 96), "pil")
    wanted = "do_resize do_rescale do_normalize size resample rescale_factor image_mean image_std backend".split()
    assert [name for name in wanted if not hasattr(processor, name)] == []
    options = {"return_tensors": "np", "do_rescale": False, "do_normalize": False}
    pixels = processor(Image.new("RGB", (30, 20), (10, 20, 30)), **options)["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((1, 3, 64, 96), np.uint8)


def test_what_a_module_knows_and_lacks():
    """If torch no longer keeps None under the names of parameters and modules, tensors for them load unnoticed."""
    module = nn.Module()
    module.token, module.there = None, 1
    module.register_parameter("bias", None)
    module.register_parameter("weight", nn.Parameter(torch.ones(1)))
    module.register_module("norm", None)
    of_torch = internals.names_without_value(nn.Module())
    assert internals.names_without_value(module) - of_torch == {"token", "bias", "norm"}


def test_every_function_of_the_fence_is_spoken_for():
    """Every function of the fence has a test here that says what breaks without it."""
    public = [
        name
        for name, value in vars(internals).items()
        if getattr(value, "__module__", "") == internals.__name__ and not name.startswith("_")
    ]
    text = inspect.getsource(inspect.getmodule(test_nothing_private_is_used_outside_the_fence))
    assert [name for name in public if f"internals.{name}" not in text and name != "TimmFacts"] == []


def test_twins_of_modules(resnet):
    """If torch keeps parts and hooks of a module elsewhere, replay changes the caller's model."""
    before = [(part, len(part._forward_hooks)) for part in resnet.modules()]
    twin = internals.twin_of(resnet, {resnet.layer2: nn.Identity()})
    assert type(twin) is type(resnet)
    assert isinstance(twin.layer2, nn.Identity)
    assert twin.layer1 is not resnet.layer1
    assert twin.layer1[0].conv1.weight is resnet.layer1[0].conv1.weight
    for part in twin.modules():
        part.register_forward_hook(lambda *_: None)
    twin.layer3 = nn.Identity()
    assert [(part, len(part._forward_hooks)) for part in resnet.modules()] == before
    shared = nn.Linear(2, 2)
    both = internals.twin_of(nn.Sequential(shared, shared))
    assert both[0] is both[1]
    empty = internals.twin_of(resnet, tensors=internals.without_values)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert not any(tensor.is_meta for tensor in (*resnet.parameters(), *resnet.buffers()))


def test_modules_speak_the_words_of_transformers(resnet):
    """If transformers' word for its library or timm's frozen norms change, a module lacks TimmBackbone's interface."""
    from transformers import AutoBackbone, TimmBackboneConfig

    own = AutoBackbone.from_config(TimmBackboneConfig(backbone="test_resnet", freeze_batch_norm_2d=True))
    assert internals.backbone_type("timm") is own.backbone_type
    twin = timm.create_model("test_resnet")
    internals.freeze_norms_of_timm(twin)
    frozen = type(own._backbone.layer1[0].bn1)
    assert type(twin.layer1[0].bn1) is frozen is not type(resnet.layer1[0].bn1)
    internals.unfreeze_norms_of_timm(twin)
    assert type(twin.layer1[0].bn1) is type(resnet.layer1[0].bn1)


def test_copies_record_outputs_again():
    """If transformers records outputs by other hooks, a backbone cannot be sent to another process."""
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    model = transformers.Dinov2Backbone(config).eval()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(model)
    twin, hooked = internals.to_be_copied(model)
    again = pickle.loads(pickle.dumps(twin))
    internals.hook_again(again, hooked)
    pixels = torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(again(pixels).feature_maps[0], model(pixels).feature_maps[0])
        assert len(again(pixels, output_hidden_states=True).hidden_states) == 2
    assert internals.to_be_copied(torch.nn.Linear(1, 1))[1] is False
