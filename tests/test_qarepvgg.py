"""QARepVGG has no partner elsewhere: its block and fold against the equations, and its keys."""

import pytest
import torch
from helpers import fill, images, on_meta, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.qarepvgg import QARepVGG, QARepVGGBlock
from litezoo.models.weights import convert_state_dict

QAREPVGG = list_models("qarepvgg_*")
#: Float32 sums of up to 12 thousand products, in another order.
BOUND = 1e-5

blocks = given(
    channels=st.sampled_from([8, 16]),
    out_channels=st.sampled_from([8, 16]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**16),
)


def shaken_block(channels, out_channels, stride, groups, seed):
    torch.manual_seed(seed)
    block = QARepVGGBlock(channels, out_channels, stride=stride, groups=groups)
    return shake(block.double().eval(), seed)


def affine(bn):
    """Return (t, s) with bn(x) = t * x + s."""
    t = bn.weight / (bn.running_var + 1e-5).sqrt()
    return t, bn.bias - t * bn.running_mean


# ----------------------------------------------------------------------- the block


@settings(deadline=None, max_examples=30)
@blocks
def test_a_block_is_relu_of_bn_of_the_three_branches(channels, out_channels, stride, groups, seed):
    """BatchNorm on the 3x3 branch and on the sum, none on the 1x1 branch and the identity."""
    block = shaken_block(channels, out_channels, stride, groups, seed)
    x = images(2, channels, 7, 10, seed=seed, dtype=torch.float64)
    (t3, s3), (t, s) = affine(block.branch_3x3.bn), affine(block.bn)
    options = {"stride": stride, "groups": groups}
    z = F.conv2d(x, block.branch_3x3.conv.weight, padding=1, **options)
    z = t3[:, None, None] * z + s3[:, None, None]
    z = z + F.conv2d(x, block.branch_1x1.weight, **options)
    if stride == 1 and channels == out_channels:
        z = z + x
    expected = torch.relu(t[:, None, None] * z + s[:, None, None])
    assert relative_error(block(x.clone()), expected) <= 1e-12
    assert relative_error(fuse(block)(x.clone()), expected) <= 1e-10


@settings(deadline=None, max_examples=30)
@blocks
def test_its_kernel_is_folded_twice(channels, out_channels, stride, groups, seed):
    """K' = t (t3 K3 + pad(K1) + I), b' = t s3 + s, tap by tap."""
    block = shaken_block(channels, out_channels, stride, groups, seed)
    (t3, s3), (t, s) = affine(block.branch_3x3.bn), affine(block.bn)
    expected = t3[:, None, None, None] * block.branch_3x3.conv.weight
    expected[:, :, 1, 1] += block.branch_1x1.weight[:, :, 0, 0]
    if stride == 1 and channels == out_channels:
        for o in range(channels):
            expected[o, o % (channels // groups), 1, 1] += 1.0
    conv = block.fused().conv
    assert relative_error(conv.weight, t[:, None, None, None] * expected) <= 1e-12
    assert relative_error(conv.bias, t * s3 + s) <= 1e-12
    assert conv.stride == (stride, stride) and conv.groups == groups


# ----------------------------------------------------------------------- the network


@pytest.mark.parametrize("name", QAREPVGG)
def test_layers_of_even_index_2_to_26_are_grouped_and_no_others(name):
    groups = {"g2": 2, "g4": 4}.get(name[-2:], 1)
    model = on_meta(create_model, name)
    layers = [m for m in model.modules() if isinstance(m, QARepVGGBlock)]
    assert layers[0] is model.stem
    for index, layer in enumerate(layers):
        expected = groups if index in range(2, 27, 2) else 1
        assert layer.branch_3x3.conv.groups == layer.branch_1x1.groups == expected, index


@pytest.mark.parametrize("name", QAREPVGG)
def test_it_has_the_shape_of_the_repvgg_of_its_name(name):
    """Layer by layer the same deploy form; only the trained branches differ."""
    models = (name, name.replace("qarepvgg", "repvgg"))
    ours, repvgg = (fuse(on_meta(create_model, model)).state_dict() for model in models)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in repvgg.items()}


def test_a_grouped_variant_is_fused_correctly():
    """The contract takes the smallest member: here b1g4 at a quarter of its widths."""
    architecture = {
        **get_spec("qarepvgg_b1g4").architecture,
        "stem_width": 16,
        "widths": (32, 64, 128, 512),
    }
    with torch.device("meta"):
        model = QARepVGG(**architecture).eval()
    fill(model)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(fuse(model)(x), model(x)) <= BOUND


# ----------------------------------------------------------------------- the official layout


def official_key(key):
    """Return our key as cxxgtxy/QARepVGG spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[0] == "head":
        return f"linear.{parts[2]}"
    if parts[0] == "stem":
        place, rest = ["stage0"], parts[1:]
    else:
        place, rest = [f"stage{int(parts[1]) + 1}", parts[2]], parts[3:]
    words = {"branch_3x3": "rbr_dense", "branch_1x1": "rbr_1x1"}
    return ".".join(place + [words.get(word, word) for word in rest])


@pytest.mark.parametrize("name", ["qarepvgg_a0", "qarepvgg_b1g4"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(name, prefix):
    ours = on_meta(create_model, name).state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    examples = (
        "stage0.rbr_dense.conv.weight",
        "stage0.rbr_dense.bn.running_var",
        "stage0.rbr_1x1.weight",
        "stage1.1.bn.weight",
        "stage3.13.bn.num_batches_tracked",
        "stage4.0.rbr_1x1.weight",
        "linear.bias",
    )
    assert len(theirs) == len(ours) and all(prefix + key in theirs for key in examples)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


def test_a_block_has_two_batchnorms_and_no_bias():
    """A trap: the repository's first version (V1) normalises every branch."""
    block = QARepVGGBlock(8, 8)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) == 2
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))
