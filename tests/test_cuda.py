"""Check what a GPU gives: the numbers of the libraries on it, and dumps as safe as those of the CPU.

Tests are skipped without a GPU, except those in which the CPU stands in. FEATCLI_STAND_IN=cpu lets it stand in for the
GPU in nearly all of them, to try the tests themselves.
"""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import featcli
from conftest import GPUS, MANY_SHARDS, SAMPLES, content, draw, tree
from featcli import load_backbone, open_dump
from featcli.backbones.backbone import Backbone
from featcli.dump.verify import verify
from featcli.run.transfers import Buffers, transfers

GPU = os.environ.get("FEATCLI_STAND_IN", "cuda")
has_gpu = pytest.mark.skipif(not GPUS, reason="no GPU")
on_gpu = pytest.mark.skipif(GPU == "cuda" and not GPUS, reason="no GPU")
pytestmark = pytest.mark.usefixtures("gpus")

DEVICES = ["cpu", pytest.param("cuda", marks=has_gpu)]
OPTIONS = {"checkpoint": "test_resnet", "random_init": True, "batch_size": 4, "shard_size": 8, "out_indices": "all"}
PRECISIONS = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 2e-2), "fp16": (torch.float16, 4e-3)}


@pytest.fixture
def pictures(tmp_path):
    """Make eighteen pictures, one of them broken: three shards, and a short last batch."""
    for i in range(18):
        draw(tmp_path / "pictures" / f"{i:02d}.png", i)
    (tmp_path / "pictures" / "05.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def said():
    """Return a list, and a function for `report` that puts every event into it."""
    events = []
    return events, lambda kind, **facts: events.append((kind, facts))


def warnings_of(events):
    return [facts["text"] for kind, facts in events if kind == "warning"]


def distance(found, expected):
    """Return the largest difference of two arrays or tensors, as a share of the largest number."""
    found, expected = (torch.as_tensor(one).detach().float().cpu() for one in (found, expected))
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_close(one, other, tolerance):
    """Compare every stage by its largest number; both must have the same failed rows."""
    assert one.valid.tolist() == other.valid.tolist()
    assert one.stages == other.stages
    for stage in one.stages:
        maps, found = (dump[stage].tensor().float().numpy() for dump in (one, other))
        assert np.isnan(found[~one.valid]).all()
        np.testing.assert_allclose(found, maps, rtol=0, atol=tolerance * np.nanmax(np.abs(maps)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-4),
        ({"layout": "channels-last", "fold": True}, 1e-4),
        ({"pool": "2x2", "dtype": "float16"}, 1e-3),
        ({"precision": "bf16", "dtype": "bfloat16"}, 5e-2),
        ({"precision": "fp16", "pool": "avg"}, 1e-2),
    ],
    ids=str,
)
def test_the_rows_of_the_cpu(pictures, tmp_path, device, options, tolerance):
    """A GPU gives the rows of the CPU, however the network is run and maps are reduced."""
    kept = {name: options[name] for name in ("pool", "dtype") if name in options}
    featcli.extract(pictures, output=tmp_path / "cpu", device="cpu", **OPTIONS, **kept)
    outcome = featcli.extract(pictures, output=tmp_path / "d", device=device, **OPTIONS, **options)
    assert (outcome.written, outcome.failed) == (17, 1)
    assert_close(open_dump(tmp_path / "cpu"), open_dump(tmp_path / "d"), tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bytes_again(pictures, tmp_path, device):
    """Shards made by two runs have the bytes of one run."""
    options = {**OPTIONS, "device": device}
    featcli.extract(pictures, output=tmp_path / "whole", **options)
    featcli.extract(pictures, output=tmp_path / "d", part="1/3", **options)
    featcli.extract(pictures, output=tmp_path / "d", **options)
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_runs_out_in_the_middle_of_a_batch(pictures, tmp_path, device, monkeypatch):
    """Rows that were already on their way are overwritten in their places when their batch is computed again."""
    featcli.extract(pictures, output=tmp_path / "whole", device=device, **OPTIONS)
    run, tried = Backbone.run, []

    def less_and_less(backbone, pixels, **more):
        tried.append(len(pixels))
        if len(pixels) > (2 if len(tried) < 5 else 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(backbone, pixels, **more)

    monkeypatch.setattr(Backbone, "run", less_and_less)
    featcli.extract(pictures, output=tmp_path / "d", device=device, **OPTIONS)
    assert tried[:9] == [4, 2, 2, 2, 2, 1, 1, 1, 1]  # the fifth is the second half of the second batch
    assert_close(open_dump(tmp_path / "whole"), open_dump(tmp_path / "d"), 1e-5)


# What follows needs a GPU, or what stands in for it.


@on_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "pool"), [("test_resnet", "none,avg,2x2"), ("test_vit", "none,avg,cls")])
def test_the_numbers_of_timm_on_the_same_gpu(pictures, tmp_path, name, pool, precision):
    """Whole maps, reductions and the embedding are those that timm's own model gives on that GPU, in each precision."""
    dtype, tolerance = PRECISIONS[precision]
    run = {"random_init": True, "device": GPU, "precision": precision, "batch_size": 4, "layout": "channels-first"}
    featcli.extract(
        pictures,
        checkpoint=name,
        output=tmp_path / "d",
        out_features=["all", "embedding"],
        pool=pool,
        fold=False,
        **run,
    )
    dump, backbone = open_dump(tmp_path / "d"), load_backbone(name, random_init=True, device="cpu")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).to(GPU, dtype).eval()
    keys = [key for key, is_there in zip(dump.keys, dump.valid, strict=True) if is_there]
    pixels = torch.stack([backbone.preprocess(pictures / key) for key in keys])
    ready = backbone.preprocessing.normalize(pixels).to(GPU, dtype)
    with torch.inference_mode():
        maps = model.forward_intermediates(ready, output_fmt="NCHW", intermediates_only=True)
        embedding = model.forward_head(model.forward_features(ready), pre_logits=True)
        if "cls" in pool:
            with_tokens = model.forward_intermediates(ready, return_prefix_tokens=True, intermediates_only=True)
    found = {output: dump[output][:][dump.valid] for output in dump.outputs}
    expected = {"embedding": embedding}
    for stage, values in zip(backbone.stages, maps, strict=True):
        expected[stage.name] = values
        expected[f"{stage.name}@avg"] = values.float().mean((2, 3))
        if "2x2" in pool:
            expected[f"{stage.name}@2x2"] = torch.nn.functional.adaptive_avg_pool2d(values.float(), 2)
    if "cls" in pool:
        tokens = (tokens[:, 0] for _, tokens in with_tokens)
        expected |= {f"{stage.name}@cls": token for stage, token in zip(backbone.stages, tokens, strict=True)}
    assert expected.keys() <= found.keys()
    assert {output: distance(found[output], one) for output, one in expected.items()} == {
        output: pytest.approx(0, abs=tolerance) for output in expected
    }


@on_gpu
def test_native_sizes_on_a_gpu(tmp_path):
    """Pictures that keep their own sizes give the maps of timm's model for each picture alone."""
    sizes = [(96, 80), (200, 120), (64, 64), (300, 40), (96, 80)]
    for i, size in enumerate(sizes):
        draw(tmp_path / "p" / f"{i}.png", i, size)
    options = {"checkpoint": "test_resnet", "random_init": True, "fit": "native"}
    featcli.extract(tmp_path / "p", output=tmp_path / "d", out_features="all", batch_size=2, device=GPU, **options)
    dump, backbone = open_dump(tmp_path / "d"), load_backbone(**options, device="cpu")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).to(GPU).eval()
    for row, key in enumerate(dump.keys):
        ready = backbone.preprocessing.normalize(backbone.preprocess(tmp_path / "p" / key)[None]).to(GPU)
        with torch.inference_mode():
            maps = model.forward_intermediates(ready, output_fmt="NCHW", intermediates_only=True)
        for stage, expected in zip(dump.stages, maps, strict=True):
            assert distance(dump[stage][row], expected[0]) < 1e-5, (key, stage)


@on_gpu
def test_the_numbers_of_transformers_on_the_same_gpu(pictures, tmp_path, dinov2_folder):
    """The maps of a transformers backbone are those of its own class on that GPU."""
    transformers = pytest.importorskip("transformers")
    featcli.extract(pictures, checkpoint=dinov2_folder, output=tmp_path / "d", out_features="all", device=GPU)
    dump, backbone = open_dump(tmp_path / "d"), load_backbone(dinov2_folder, device="cpu")
    model = transformers.Dinov2Backbone.from_pretrained(dinov2_folder, out_features=list(dump.stages)).to(GPU).eval()
    keys = [key for key, is_there in zip(dump.keys, dump.valid, strict=True) if is_there]
    pixels = torch.stack([backbone.preprocess(pictures / key) for key in keys])
    with torch.inference_mode():
        maps = model(backbone.preprocessing.normalize(pixels).to(GPU)).feature_maps
    for stage, expected in zip(dump.stages, maps, strict=True):
        assert distance(dump[stage][:][dump.valid], expected) < 1e-5, stage


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_on_and_off_the_gpu(cli, pictures, tmp_path, precision):
    """A dump of a GPU is recomputed there bit for bit, and on the CPU within the tolerance, and the reverse."""
    command = ("-c", "test_resnet", "--random-init", "--out-indices", "all", "--precision", precision)
    for first, second in ((GPU, GPU), (GPU, "cpu"), ("cpu", GPU)):
        dump = tmp_path / f"{first}-{second}"
        made = cli("extract", pictures, *command, "--device", first, "--batch-size", 4, "-o", dump)
        assert made.code == 3, made.err
        checked = cli("verify", dump, pictures, "--recompute", 17, "--device", second)
        assert checked.code == 0, checked.out + checked.err
        assert "17 images extracted anew" in checked.out
        assert first != second or "17 equal bit for bit" in checked.out


@on_gpu
@pytest.mark.parametrize(("first", "second"), [("cpu", GPU), (GPU, "cpu")])
def test_another_device_resumes(pictures, tmp_path, said, first, second):
    """A GPU resumes what a CPU began, and the reverse: by the first one's settings, with a warning and right rows."""
    events, report = said
    featcli.extract(pictures, output=tmp_path / "whole", device="cpu", **OPTIONS)
    options = {**OPTIONS, "batch_size": "auto", "layout": "auto", "output": tmp_path / "d"}
    featcli.extract(pictures, part="0/2", device=first, **OPTIONS | {"output": tmp_path / "d"})
    outcome = featcli.extract(pictures, device=second, report=report, **options)
    assert (outcome.written, outcome.failed) == (17, 1)
    assert_close(open_dump(tmp_path / "whole"), open_dump(tmp_path / "d"), 1e-4)
    assert open_dump(tmp_path / "d").plan.settings.batch_size == 4
    assert verify(tmp_path / "d").damages == []
    names = {"cpu": "cpu", "cuda": torch.cuda.get_device_name(0) if GPUS else ""}
    changed = f"device {names[first]} -> {names[second]}"
    assert [changed in text for text in warnings_of(events) if "begun elsewhere" in text] == [True] * (first != second)


@on_gpu
def test_an_interrupted_shard_goes_on(pictures, tmp_path, said):
    """Rows that a GPU had computed before Ctrl-C are kept, and the shard ends with the bytes of an unbroken run."""
    options = {**OPTIONS, "shard_size": 20, "batch_size": 2, "device": GPU}
    featcli.extract(pictures, output=tmp_path / "whole", **options)
    seen = []

    def interrupt(kind, **_):
        seen.append(kind)
        if kind == "batch" and seen.count("batch") == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featcli.extract(pictures, output=tmp_path / "d", report=interrupt, **options)
    events, report = said
    featcli.extract(pictures, output=tmp_path / "d", report=report, **options)
    assert [facts["rows"] > 0 for kind, facts in events if kind == "resumed"] == [True]
    assert tree(tmp_path / "d") == tree(tmp_path / "whole")


@on_gpu
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes(cli, many, tmp_path, number):
    """A process on a GPU that is killed is resumed with the bytes of an unbroken run."""
    command = ["extract", many, *MANY_SHARDS, "--device", GPU, "-v", "-o"]
    assert cli(*command, tmp_path / "whole").code == 3
    arguments = [sys.executable, "-m", "featcli", *map(str, command), str(tmp_path / "d")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        committed = 0
        for line in process.stderr:
            committed += "committed" in line
            if committed == 10:
                process.send_signal(number)
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
    assert cli("inspect", tmp_path / "d").code == 8
    assert cli(*command, tmp_path / "d").code == 3
    assert content(tmp_path / "d") == content(tmp_path / "whole")


@on_gpu
@pytest.mark.parametrize(
    "devices", ["{0},{0}", "{0},{0},{0},{0}", pytest.param("cuda:all", marks=has_gpu)], ids=["two", "four", "all"]
)
def test_workers_on_gpus(cli, many, tmp_path, devices):
    """Several workers on one GPU, and one on each, make the bytes of one process."""
    one = "cuda:0" if GPU == "cuda" else GPU
    command = ["extract", many, *MANY_SHARDS, "-o"]
    assert cli(*command, tmp_path / "whole", "--device", GPU).code == 3
    run = cli(*command, tmp_path / "d", "--device", devices.format(one))
    assert run.code == 3, run.err
    assert content(tmp_path / "d") == content(tmp_path / "whole")


@on_gpu
def test_decode_processes_beside_a_gpu(pictures, tmp_path):
    """Pictures that other processes decode, into memory that the GPU copies from, give the same bytes."""
    featcli.extract(pictures, output=tmp_path / "whole", device=GPU, decode_processes=0, **OPTIONS)
    for decode_threads, processes in ((2, 2), (8, 3)):
        target = tmp_path / f"{processes}"
        more = {"decode_threads": decode_threads, "decode_processes": processes}
        featcli.extract(pictures, output=target, device=GPU, **more, **OPTIONS)
        assert tree(target) == tree(tmp_path / "whole")


@on_gpu
def test_compiled_on_a_gpu(pictures, tmp_path):
    """A compiled network gives the rows of one that is not, and the same bytes each time."""
    if GPU == "cuda":
        pytest.importorskip("triton")
    featcli.extract(pictures, output=tmp_path / "plain", device=GPU, **OPTIONS)
    for name in ("one", "two"):
        outcome = featcli.extract(pictures, output=tmp_path / name, device=GPU, compile=True, **OPTIONS)
        assert outcome.written == 17
    assert_close(open_dump(tmp_path / "plain"), open_dump(tmp_path / "one"), 1e-4)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@on_gpu
def test_everything_chosen_on_a_gpu(pictures, tmp_path, said):
    """What is measured on a GPU ends in right rows, each choice has its reason, and the next run measures nothing."""
    events, report = said
    options = {**OPTIONS, "batch_size": "auto", "precision": "auto", "layout": "auto", "output": tmp_path / "d"}
    featcli.extract(pictures, output=tmp_path / "cpu", device="cpu", **OPTIONS)
    featcli.extract(pictures, device=GPU, part="0/2", report=report, **options)
    reasons = {facts["name"]: facts.get("reason", "") for kind, facts in events if kind == "choice"}
    assert reasons["batch size"].startswith("auto: ")
    assert reasons["precision"].startswith("auto: ")
    assert "trying" in reasons
    events.clear()
    featcli.extract(pictures, device=GPU, report=report, **options)
    assert "trying" not in {facts["name"] for kind, facts in events if kind == "choice"}
    assert_close(open_dump(tmp_path / "cpu"), open_dump(tmp_path / "d"), 5e-2)


@has_gpu
def test_auto_is_the_gpu(cli, pictures, tmp_path):
    """--device auto takes the first GPU and says how many there are; every other test here sees none."""
    run = cli("extract", pictures, "-c", "test_resnet", "--random-init", "-o", tmp_path / "d")
    assert run.code == 3
    assert f"device         cuda:0  (auto: {GPUS} GPU{'s' * (GPUS > 1)})" in run.err
    assert open_dump(tmp_path / "d").plan.environment["device"] == torch.cuda.get_device_name(0)


@has_gpu
def test_memory_that_really_runs_out(cli, pictures, tmp_path, said):
    """A batch that does not fit into the GPU's memory is halved until it does, with a warning and right rows."""
    events, report = said
    options = {**OPTIONS, "image_size": 512, "batch_size": 16, "pool": "avg", "layout": "channels-first", "fold": False}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    featcli.extract(pictures, output=tmp_path / "whole", device="cuda", **options)
    needed = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 0.35 * needed
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        outcome = featcli.extract(pictures, output=tmp_path / "d", device="cuda", report=report, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (outcome.written, outcome.failed) == (17, 1)
    assert "16 images do not fit into the memory of cuda:0: 8 are computed at once" in warnings_of(events)
    assert_close(open_dump(tmp_path / "whole"), open_dump(tmp_path / "d"), 1e-4)
    assert cli("verify", tmp_path / "d", pictures, "--recompute", 5, "--device", "cuda").code == 0


@has_gpu
def test_not_even_one_image(cli, pictures, tmp_path):
    """If one image does not fit into the GPU's memory, the run ends with exit 7 and says so, and can be resumed."""
    command = ["extract", pictures, "-c", "test_resnet", "--random-init", "--image-size", 2048, "-o", tmp_path / "d"]
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        refused = cli(*command, "--device", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (refused.code, "not fit into the memory of cuda:0" in refused.err) == (7, True)
    assert "Traceback" not in refused.err


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transfers_keep_their_order(dtype):
    """Many batches on their way at once arrive whole, in pinned memory, while their buffers are used again."""
    device = torch.device("cuda:0" if GPU == "cuda" else GPU)
    ways = transfers(device)
    buffers, waiting, places = Buffers(ways.pinned), [], set()
    assert buffers.take("a", 1000).is_pinned() == (GPU == "cuda")
    for number in range(60):
        pixels = torch.full((8, 3, 256, 256), number, dtype=torch.uint8, pin_memory=ways.pinned)
        there = ways.to_device(pixels)
        if ways.pinned:
            pixels.fill_(255)  # as when the buffer is filled with the next batch at once
        since = ways.mark()
        values = there.float().mul(2) @ torch.eye(256, device=device)  # some work before the rows leave
        buffer = buffers.take("a", values.numel() * dtype.itemsize)[: values.numel() * dtype.itemsize]
        places.add(buffer.data_ptr())
        target = buffer.view(dtype).view(values.shape)
        ends = ways.to_host(values, target)
        waiting.append((number, buffer, target, ends, ways.arrival(since)))
        del values, there  # their memory may be used again at once
        if len(waiting) == 3:
            number, buffer, target, ends, arrive = waiting.pop(0)
            assert arrive() >= 0
            assert (target == 2 * number).all()
            assert ends.tolist() == [2 * number] * 2
            target.fill_(-1)
            buffers.give_back("a", buffer)
    assert len(places) == 3


@on_gpu
def test_a_backbone_and_its_module_on_a_gpu():
    """A backbone's maps stay on its GPU and equal timm's, and its module there trains without changing it."""
    backbone = load_backbone("test_resnet", random_init=True, device=GPU, out_features="all", layout="channels-first")
    pixels = torch.stack([backbone.preprocess(path) for path in sorted((SAMPLES / "nature").glob("*.jpg"))[:2]])
    found, floats = backbone(pixels), backbone.preprocessing.normalize(pixels).to(GPU)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=0).to(GPU).eval()
    with torch.inference_mode():
        expected = model.forward_intermediates(floats, output_fmt="NCHW", intermediates_only=True)
    for (stage, one), maps in zip(found.items(), expected, strict=True):
        assert one.device.type == GPU
        assert distance(one, maps) < 1e-5, stage
    module = backbone.as_module().train()
    assert next(module.parameters()).device.type == GPU
    sum(one.square().mean() for one in module(floats).feature_maps).backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert all(torch.equal(again, found[stage]) for stage, again in backbone(pixels).items())


@on_gpu
def test_replay_on_a_gpu(tmp_path):
    """The rest of a model on a GPU, run on the maps of a dump, gives what the whole model gives there."""
    pytest.importorskip("transformers")
    import transformers
    from test_composites import COMPOSITES

    torch.manual_seed(0)
    model = COMPOSITES["maskformer-swin"][0]().eval()
    model.save_pretrained(tmp_path / "m")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "m")
    featcli.extract(SAMPLES / "nature", checkpoint=tmp_path / "m", output=tmp_path / "d", device=GPU)
    dump, backbone = open_dump(tmp_path / "d"), load_backbone(tmp_path / "m", device=GPU)
    pixels = torch.stack([backbone.preprocess(SAMPLES / "nature" / key) for key in dump.keys])
    model = model.to(GPU)
    with torch.inference_mode():
        whole = model(pixel_values=backbone.preprocessing.normalize(pixels).to(GPU))
        for maps in (dump, {stage: dump[stage].tensor().to(GPU) for stage in dump.stages}):
            again = featcli.replay(model, maps, (64, 64))
            for name in ("class_queries_logits", "masks_queries_logits"):
                assert again[name].device.type == GPU
                assert distance(again[name], whole[name]) < 1e-4, name


@on_gpu
def test_settings_of_the_caller_on_a_gpu(pictures, tmp_path):
    """Settings of CUDA that a program has made change no row, and are there afterwards, as are its random numbers."""
    featcli.extract(pictures, output=tmp_path / "plain", device=GPU, **OPTIONS)
    before = {"matmul": torch.backends.cuda.matmul.fp32_precision, "conv": torch.backends.cudnn.conv.fp32_precision}
    random = torch.cuda.get_rng_state_all() if GPUS else []
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    try:
        featcli.extract(pictures, output=tmp_path / "d", device=GPU, **OPTIONS)
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cuda.matmul.fp32_precision = before["matmul"]
        torch.backends.cudnn.conv.fp32_precision = before["conv"]
        torch.backends.cudnn.benchmark = False
    assert tree(tmp_path / "d") == tree(tmp_path / "plain")
    for one, other in zip(random, torch.cuda.get_rng_state_all() if GPUS else [], strict=True):
        assert torch.equal(one, other)


@on_gpu
def test_ray_workers_share_a_gpu(cli, many, tmp_path):
    """Two workers of Ray on one GPU make the bytes of one process."""
    pytest.importorskip("ray")
    command = ["extract", many, *MANY_SHARDS, "--device", GPU, "-o"]
    assert cli(*command, tmp_path / "whole").code == 3
    shares = ["--gpus-per-worker", 0.5] if GPU == "cuda" else []
    run = cli(*command, tmp_path / "d", "--engine", "ray", "--workers", 2, *shares)
    assert run.code == 3, run.err
    assert content(tmp_path / "d") == content(tmp_path / "whole")


@pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs")
def test_another_gpu_alone(pictures, tmp_path):
    """A run on the second GPU takes no memory of the first."""
    free = torch.cuda.mem_get_info(0)[0]
    held = torch.cuda.memory_reserved(0)
    featcli.extract(pictures, output=tmp_path / "d", device="cuda:1", **OPTIONS)
    assert torch.cuda.memory_reserved(0) == held
    assert torch.cuda.mem_get_info(0)[0] == free
