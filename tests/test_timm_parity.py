"""Check timm's model files with one small architecture of each: featcli gives what timm gives."""

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from conftest import SAMPLES, upright
from featcli import extract, load_backbone, open_dump

PICTURE = SAMPLES / "nature" / "sea.jpg"
ARCHITECTURES = """
test_byobnet convit_tiny test_convnext cpubone_nano cs3darknet_focus_s cspnext_tiny deit_tiny_patch16_224
densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet
efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 gcvit_xxtiny
ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto lcnetv2_small
levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035 mobilevit_xxs nest_tiny
test_nfnet pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 resnest14d test_resnet resnetv2_18
rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tiny_vit_5m_224 visformer_tiny test_vit vit_tiny_r_s16_p8_224
test_vit_relpos ese_vovnet19b_slim_dw xcit_nano_12_p8_224
""".split()
# Tokens, both orders of axes, several paths, and all kinds of norms, attention and convolutions are among them.
OF_EACH_KIND = """
test_byobnet cs3darknet_focus_s efficientvim_m1 efficientvit_m0 eva02_tiny_patch14_224 hgnetv2_b0 hrnet_w18_small
levit_128s test_mambaout test_coatnet mobilevit_xxs test_nfnet pvt_v2_b0 swinv2_cr_tiny_224 vit_tiny_r_s16_p8_224
""".split()


def test_so_many_files():
    """`make sweep` has at least sixty architectures here, from at least fifty of timm's model files."""
    assert len(set(ARCHITECTURES)) >= 60
    assert len({timm.models.model_entrypoint(name).__module__ for name in ARCHITECTURES}) >= 50
    assert set(OF_EACH_KIND) <= set(ARCHITECTURES)


def differences(name, folder):
    """Return the largest differences of featcli's maps, of a row and of a cut backbone, from timm's whole model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    pixels = create_transform(**resolve_model_data_config(model), is_training=False)(upright(PICTURE))[None]
    with torch.inference_mode():
        expected = model.forward_intermediates(pixels, output_fmt="NCHW", intermediates_only=True)
    dump = open_dump(
        extract([str(PICTURE)], checkpoint=name, random_init=True, out_indices="all", output=folder / "d").dump
    )
    middle = (len(expected) - 1) // 2
    cut = load_backbone(name, random_init=True, out_indices=[middle])
    found = [torch.from_numpy(dump[stage][:]) for stage in dump.stages]
    found += cut(cut.preprocess(upright(PICTURE))[None]).values()
    return [(one - other).abs().max().item() for one, other in zip(found, [*expected, expected[middle]], strict=True)]


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_rows_are_timms_own(tmp_path, name):
    """A row of every stage, and the map of a backbone cut in the middle, equal timm's whole model bit for bit.

    `make sweep` compares one architecture of each of timm's files in this way.
    """
    assert set(differences(name, tmp_path)) == {0.0}
