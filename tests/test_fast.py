"""Check --decode fast: Pillow's pixels from simplejpeg, sizes from torch within a bound, and the same failures."""

import io
from itertools import product

import numpy as np
import pytest
import simplejpeg
import test_damage as damage
import torch
from PIL import Image

import featcli
from conftest import draw
from featcli.backbones.image_processor import ImageProcessor
from featcli.backbones.preprocessing import processor_preprocessing, timm_preprocessing
from featcli.errors import ConflictError, UsageError
from featcli.inputs.image_list import Image as Input
from featcli.pixels import extras, torch_resize, turbo
from featcli.pixels.decode import fitted_pixels
from featcli.pixels.failure import UnreadableError
from featcli.pixels.resize import ResizeMode
from featcli.spec.groups import PixelSpec

FIELD = np.random.default_rng(0).integers(0, 256, (130, 130, 3), dtype=np.uint8)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def smooth(height, width, seed=0):
    """Return (H, W, 3) uint8 like a photograph: the amplitude falls with the frequency, and a few edges are sharp."""
    chance = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / max(height, width))
    plane = np.fft.irfft2(np.exp(2j * np.pi * chance.random(frequency.shape)) / frequency**1.2, s=(height, width))
    light = 128 + 48 * (plane - plane.mean()) / max(plane.std(), 1e-9)
    light[height // 3 : height // 2, width // 4 : width // 2] = 250
    return np.stack([light, light * 0.8 + 20, 255 - light], -1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function: bytes -> (pixels or failure by --decode exact, the same by fast, whether simplejpeg read)."""
    used = []

    def spied(file, picture, unpacked=turbo.unpacked):
        found = unpacked(file, picture)
        used.append(found is not None)
        return found

    monkeypatch.setattr(turbo, "unpacked", spied)

    def outcome(content, rules):
        path = tmp_path / "picture"
        path.write_bytes(content)
        try:
            image = Input("picture", str(path), len(content))
            pixels, traits = fitted_pixels(image, rules, lambda picture: np.array(picture), 3, 50)
        except UnreadableError as error:
            return error.reason, error.detail
        return pixels.shape, pixels.tobytes(), traits

    def both(content, **rules):
        used.clear()
        exact = outcome(content, PixelSpec(**rules))
        return exact, outcome(content, PixelSpec(**rules, decode="fast")), any(used)

    return both


def test_grid_of_jpegs(read):
    """RGB and grey JPEGs of every usual coding and of odd sizes are read by simplejpeg, and equal Pillow to the bit."""
    kinds = [
        *({"subsampling": subsampling, "progressive": several} for subsampling, several in product(range(3), (0, 1))),
        {"keep_rgb": True},
        {"optimize": True, "restart_marker_blocks": 3},
        {"progressive": True, "restart_marker_rows": 1, "subsampling": 2},
    ]
    sizes = [(1, 1), (1, 17), (16, 16), (33, 8), (47, 65)]
    for kind, (height, width), quality in product(kinds, sizes, (20, 95)):
        for picture in (FIELD[:height, :width], smooth(height, width)):
            for mode in ("RGB", "L") if "keep_rgb" not in kind else ("RGB",):
                of_kind = {name: value for name, value in kind.items() if mode == "RGB" or name != "subsampling"}
                content = damage.saved(picture=Image.fromarray(picture).convert(mode), quality=quality, **of_kind)
                exact, fast, is_used = read(content)
                assert (fast == exact, is_used) == (True, True), (kind, (height, width), quality, mode)
                assert exact[0] == (height, width, 3)


@pytest.mark.parametrize("subsampling", ["444", "440", "422", "420", "411", "441"])
def test_rare_subsamplings(read, subsampling):
    """JPEGs of subsamplings that Pillow does not write are equal to the bit, too."""
    for height, width in ((64, 64), (33, 47), (7, 5)):
        try:
            content = simplejpeg.encode_jpeg(np.ascontiguousarray(FIELD[:height, :width]), 85, "RGB", subsampling)
        except (KeyError, ValueError):  # an older one does not have it
            continue
        exact, fast, _ = read(content)
        assert fast == exact


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("rule", ["apply", "ignore"])
def test_orientations_and_greys(read, orientation, rule):
    """Pictures that EXIF turns, with greys among them, become upright as under --decode exact, with the same traits."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "L"):
        content = damage.saved(picture=Image.fromarray(FIELD[:33, :47]).convert(mode), exif=exif)
        exact, fast, is_used = read(content, orientation=rule)
        assert (fast == exact, is_used) == (True, True)
    broken = damage.saved(exif=b"Exif\0\0" + exif.tobytes()[6:-3])
    assert read(broken)[0] == read(broken)[1]


def test_other_kinds_are_left_to_pillow(read):
    """CMYK, arithmetic coding, MPO and other formats equal --decode exact, because Pillow reads them."""
    picture = Image.fromarray(FIELD[:40, :50])
    several = damage.saved("MPO", save_all=True, append_images=[picture])
    inks = damage.saved(picture=picture.convert("CMYK"))
    for content in (inks, several, damage.ARITHMETIC, damage.saved("PNG"), damage.saved("WEBP")):
        exact, fast, is_used = read(content)
        assert (fast == exact, is_used) == (True, False)
    profile = damage.saved(icc_profile=b"broken")
    assert read(profile)[:2] == (read(profile)[0],) * 2
    assert read(profile, colour="convert")[0] == read(profile, colour="convert")[1]


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "RGB") for kind in damage.KINDS), ("restarts", "L")])
def test_failures_are_those_of_exact(read, kind, mode):
    """A damaged JPEG gives the reason, the detail or the pixels that --decode exact gives, wherever the damage is."""
    content = damage.saved(picture=Image.fromarray(damage.NOISE).convert(mode), **damage.KINDS[kind])
    body, end, chance = content.index(b"\xff\xda") + 30, len(content), np.random.default_rng(1)
    tried = [content + b"<html>" * 9, content + content, damage.with_height(content, 48)]
    tried += [damage.with_height(content, 200), content[:-2], content[:-1], content[:-2] + b"\xff\xd5" + damage.EOI]
    for at in np.linspace(body, end - 40, 6).astype(int).tolist():
        tried += [content[:at] + damage.EOI, content[:at], content[:at] + bytes(end - at - 2) + damage.EOI]
        tried += [content[:at] + content[at + int(chance.integers(1, 30)) :]]
        tried += [content[:at] + chance.bytes(3) + content[at + 3 :]]
    tried += [content[: content.rindex(b"\xff\xda") + more] for more in range(2, 12, 3)]  # within a scan's header
    tried += [content[:at] + chance.bytes(1) + content[at + 1 :] for at in chance.integers(2, body, 12).tolist()]
    if "progressive" in damage.KINDS[kind]:
        tried += [damage.before_scan(content, number) + damage.EOI for number in range(1, 5)]
    if "restart" in kind:
        marks = [at for at in range(body, end) if content[at] == 0xFF and 0xD0 <= content[at + 1] <= 0xD7]
        tried += [content[: marks[1]] + content[marks[2] :]]
    outcomes = set()
    for number, changed in enumerate(tried):
        exact, fast, _ = read(changed)
        assert fast == exact, number
        outcomes.add(exact[0])
    assert "truncated" in outcomes


def test_missing_scans(read):
    """A JPEG of three scans is read whole, and refused without one of them, which libjpeg would not notice."""
    head, scans = damage.scan_by_scan()
    for count in (3, 2, 1):
        exact, fast, is_used = read(head + b"".join(scans[:count]) + damage.EOI)
        assert (fast == exact, is_used) == (True, count == 3)
        assert (exact[0] == "truncated") == (count < 3)


def test_bound_of_sizes():
    """Where torch resizes, photographs and noise of any size come within FURTHEST levels of Pillow's."""
    assert torch_resize.FURTHEST == 2
    edges, wanted = (1, 2, 7, 31, 130), ((1, 1), (8, 8), (31, 40), (160, 130), (300, 299))
    tried = 0
    for height, width, size, resample in product(edges, edges, wanted, (BILINEAR, BICUBIC)):
        if not torch_resize.takes((height, width), size, resample):
            continue
        tried += 1
        for values in (np.ascontiguousarray(FIELD[:height, :width]), smooth(height, width)):
            for one in (values, np.ascontiguousarray(values[..., 0])):
                pillow = np.asarray(Image.fromarray(one).resize(size[::-1], resample)).astype(int)
                found = torch_resize.resized(one, size, resample).permute(1, 2, 0).numpy()
                assert np.abs(found.reshape(pillow.shape) - pillow).max() <= 2, (height, width, size, resample)
    assert tried > 100


def test_what_torch_does_not_resize():
    """Other filters, and sizes for which Pillow begins with the height, are left to Pillow."""
    assert torch_resize.takes((20, 20), (10, 20), BICUBIC)
    for before, after, resample in (
        ((20, 20), (10, 30), BICUBIC),
        ((50, 20), (25, 10), BICUBIC),
        ((20, 20), (10, 10), Image.Resampling.LANCZOS),
        ((1, 1 << 23), (1, 100), BICUBIC),
        ((20, 1), (10, 0), BICUBIC),
    ):
        assert not torch_resize.takes(before, after, resample)


SIZES = [(50, 60), (61, 45), (97, 131), (131, 97), (20, 24), (33, 32), (300, 7), (4, 500), (64, 64)]


def both_ways(preprocessing, size):
    """Return the pixels of a picture of noise by `fit`, and of its array and of itself by the fast one."""
    values = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
    fast, picture = preprocessing.fit_for("fast"), Image.fromarray(values)
    return [
        np.asarray(one).astype(int) for one in (preprocessing.fit_for("exact")(picture), fast(values), fast(picture))
    ]


@pytest.mark.parametrize(
    ("crop_mode", "interpolation", "channels"),
    [
        *product(("center", "squash", "border"), ("bicubic", "bilinear"), (3,)),
        *product(("center", "squash", "border"), ("bicubic",), (1,)),
        ("center", "box", 3),
    ],
)
def test_geometry_of_timm(crop_mode, interpolation, channels):
    """In each of timm's ways to cut, on squares and rectangles, pixels are where --decode exact has them."""
    for edges, share in (((32, 32), 0.875), ((32, 32), 1.0), ((32, 48), 0.9), ((48, 32), 0.95)):
        config = {
            "input_size": (channels, *edges),
            "interpolation": interpolation,
            "crop_pct": share,
            "crop_mode": crop_mode,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2,) * 3,
        }
        preprocessing = timm_preprocessing(config, channels, "", None)
        assert (preprocessing.fast is None) == (interpolation == "box")
        for size in SIZES:
            exact, *found = both_ways(preprocessing, size)
            for one in found:
                assert one.shape == (channels, *edges)
                assert np.abs(one - exact).max() <= (2 if channels == 3 else 3), (edges, share, size)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "native"])
def test_geometry_of_fits(fit):
    """Under --fit, pixels are where --decode exact has them, for timm's models and for image processors."""
    from transformers import ViTImageProcessorPil

    config = {"input_size": (3, 32, 48), "interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.5, 0.4, 0.3)}
    mode = ResizeMode(fit, (32, 48), (16, 16))
    processor = ImageProcessor(ViTImageProcessorPil())
    for preprocessing in (
        timm_preprocessing({**config, "std": (0.2,) * 3}, 3, "", mode),
        processor_preprocessing(processor, (32, 48), 3, mode),
    ):
        assert (preprocessing.fast is None) == (fit == "native")
        for size in SIZES:
            exact, *found = both_ways(preprocessing, size)
            for one in found:
                assert one.shape == exact.shape
                assert np.abs(one - exact).max() <= 2, (fit, size)


def test_image_processors_keep_their_pixels():
    """An image processor resizes by itself, so that --decode fast changes none of its pixels."""
    from transformers import ViTImageProcessorPil

    preprocessing = processor_preprocessing(ImageProcessor(ViTImageProcessorPil()), (224, 224))
    exact, *found = both_ways(preprocessing, (60, 50))
    assert all(np.array_equal(one, exact) for one in found)


def test_calls_leave_torch_alone():
    """Resizing in a decode thread uses no other thread, and leaves the number of torch's threads."""
    before = torch.get_num_threads()
    torch_resize.resized(FIELD, (50, 50), BICUBIC)
    assert torch.get_num_threads() == before


TINY = {"checkpoint": "test_resnet", "random_init": True}


@pytest.fixture
def photographs(tmp_path):
    """Return a folder of four pictures: JPEGs, one of them turned and one cut short, and a PNG."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(smooth(130, 170, number)).save(folder / f"{number}.jpg", exif=turned(1 + 5 * number))
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:3000])
    draw(folder / "plain.png", 1)
    return folder


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def extract(folder, output, **options):
    return featcli.extract(folder, output=output, **TINY, **options)


def test_a_dump_says_and_keeps_its_level(photographs, tmp_path):
    """Maps are near those of exact with the same failures; plan and query have the level, and no other resumes it."""
    said = []
    extract(photographs, tmp_path / "fast", decode="fast", report=lambda kind, **facts: said.append(facts))
    extract(photographs, tmp_path / "exact")
    fast, exact = (featcli.open_dump(tmp_path / name) for name in ("fast", "exact"))
    assert fast.plan.settings["preprocessing"]["decode"] == "fast"
    assert fast.plan.environment["simplejpeg"] == simplejpeg.__version__
    assert "simplejpeg" not in exact.plan.environment
    texts = {one.get("name"): str(one.get("value")) for one in said}
    assert texts["preprocessing"].endswith(", resized by torch")
    assert texts["pictures"].endswith(", JPEGs by simplejpeg")
    assert fast.failures == exact.failures
    assert fast.valid.tolist() == exact.valid.tolist() == [True, True, False, True]
    near, far = (dump["stage4"][:][dump.valid] for dump in (fast, exact))
    assert 0 < np.abs(near - far).max() < 0.05 * np.abs(far).max()
    for key in ("0.jpg", "1.jpg", "plain.png"):
        pixels = {dump: dump.preprocess(photographs / key) for dump in (fast, exact)}
        assert (pixels[fast].int() - pixels[exact].int()).abs().max() <= torch_resize.FURTHEST
        assert torch.equal(pixels[fast], fast.load_backbone().preprocess(photographs / key))
    extract(photographs, tmp_path / "fast", decode="fast")
    for decode in ("exact", "scaled"):
        with pytest.raises(ConflictError, match="decode"):
            extract(photographs, tmp_path / "fast", decode=decode)


def test_without_simplejpeg(photographs, tmp_path, cli, monkeypatch):
    """Without the extra, fast is refused before the plan with exit 2, and a dump made with it resumes with exit 5."""
    extract(photographs, tmp_path / "d", decode="fast")
    whole = featcli.open_dump(tmp_path / "d").preprocess(photographs / "0.jpg")
    for file in (tmp_path / "d" / "shards").iterdir():
        file.unlink()
    there = {name: version for name, version in extras.versions().items() if name != "simplejpeg"}
    monkeypatch.setattr(extras, "versions", lambda: there)
    monkeypatch.setattr(turbo, "_decoder", lambda: None)
    command = ("extract", photographs, "-c", "test_resnet", "--random-init", "--decode", "fast", "-o")
    for more in ((), ("--dry-run",)):
        run = cli(*command, tmp_path / "new", *more)
        assert (run.code, "pip install 'featcli[fast]'" in run.err) == (2, True)
        assert not (tmp_path / "new").exists()
        run = cli(*command, tmp_path / "d", *more)
        assert (run.code, "made with simplejpeg" in run.err, "pip install 'featcli[fast]'" in run.err) == (
            5,
            True,
            True,
        )
    with pytest.raises(UsageError, match="--decode fast needs simplejpeg"):
        featcli.load_backbone(**TINY, decode="fast")
    assert torch.equal(featcli.open_dump(tmp_path / "d").preprocess(photographs / "0.jpg"), whole)


def test_pictures_in_memory(photographs, tmp_path):
    """Pictures in memory are resized by torch, too, opened files among them; where torch does not, fast is refused."""
    picture = Image.open(photographs / "plain.png").convert("RGB")
    with Image.open(photographs / "0.jpg") as untouched:
        extract({"a": picture, "b": untouched}, tmp_path / "memory", decode="fast")
    extract([photographs / name for name in ("plain.png", "0.jpg")], tmp_path / "files", decode="fast")
    files = featcli.open_dump(tmp_path / "files")
    rows = [files["stage4"][files.rows[name]] for name in ("plain.png", "0.jpg")]
    assert np.array_equal(featcli.open_dump(tmp_path / "memory")["stage4"][:], rows)
    with pytest.raises(UsageError, match="--decode fast changes nothing for these pictures in memory"):
        extract({"a": picture}, tmp_path / "other", decode="fast", interpolation="lanczos")


def test_simplejpeg_takes_buffers():
    """simplejpeg decodes the buffer of a BytesIO, so that no copy of the file is made."""
    content = io.BytesIO(damage.saved(picture=FIELD))
    assert simplejpeg.decode_jpeg(content.getbuffer(), "RGB", strict=True).shape == FIELD.shape
