"""MobileOne beyond parity with timm: its block as the paper writes it, and two more key layouts."""

import pytest
import timm
import torch
from helpers import fill, images, on_meta, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.mobileone import MobileOneBlock
from litezoo.models.weights import convert_state_dict, load_state_dict

MOBILEONE = list_models("mobileone_*")


# ----------------------------------------------------------------------- the block


def normalised(x, bn):
    """Return y = gamma * (x - mean) / sqrt(var + eps) + beta, without nn.BatchNorm2d."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return gamma * (x - mean) / (var + 1e-5).sqrt() + beta


def block_of_the_paper(block, x, *, size, stride, groups):
    """Figure 3: the branches read off the block's state, added in the paper's order."""
    branch = {"stride": stride, "groups": groups}
    y = 0.0
    for conv_bn in block.branch_convs:
        z = F.conv2d(x, conv_bn.conv.weight, padding=size // 2, **branch)
        y = y + normalised(z, conv_bn.bn)
    if size == 3:
        z = F.conv2d(x, block.branch_1x1.conv.weight, **branch)
        y = y + normalised(z, block.branch_1x1.bn)
    if stride == 1 and y.shape == x.shape:
        y = y + normalised(x, block.branch_identity)
    if block.se is not None:
        fc1, fc2 = block.se.fc1, block.se.fc2
        squeezed = torch.relu(F.conv2d(F.adaptive_avg_pool2d(y, 1), fc1.weight, fc1.bias))
        y = y * torch.sigmoid(F.conv2d(squeezed, fc2.weight, fc2.bias))
    return torch.relu(y)


@settings(deadline=None, max_examples=30)
@given(
    depthwise=st.booleans(),
    channels=st.sampled_from([16, 48]),
    out_channels=st.sampled_from([16, 48]),
    stride=st.sampled_from([1, 2]),
    branches=st.sampled_from([1, 4]),
    squeeze_excite=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_block_is_the_sum_of_its_branches_before_and_after_fusing(
    depthwise, channels, out_channels, stride, branches, squeeze_excite, seed
):
    """Depthwise 3x3 keeps the channels and may stride; pointwise does the opposite."""
    out_channels, stride = (channels, stride) if depthwise else (out_channels, 1)
    size, groups = (3, channels) if depthwise else (1, 1)
    torch.manual_seed(seed)
    block = MobileOneBlock(
        channels,
        out_channels,
        size,
        stride=stride,
        groups=groups,
        branches=branches,
        squeeze_excite=squeeze_excite,
    )
    shake(block.double().eval(), seed)
    x = images(2, channels, 7, 10, seed=seed, dtype=torch.float64)
    with torch.inference_mode():
        expected = block_of_the_paper(block, x.clone(), size=size, stride=stride, groups=groups)
        assert relative_error(block(x.clone()), expected) <= 1e-12
        assert relative_error(fuse(block)(x.clone()), expected) <= 1e-10
    assert len(block.branch_convs) == branches
    assert (block.branch_1x1 is None) == (size == 1)
    assert (block.branch_identity is None) == (stride == 2 or channels != out_channels)


def test_fusing_gives_the_kernels_that_timm_gives():
    """The smallest with four branches; timm folds in float32."""
    theirs = fill(on_meta(timm.create_model, "mobileone_s0"))
    ours = create_model("mobileone_s0").eval()
    load_state_dict(ours, theirs.state_dict(), get_spec("mobileone_s0"))
    deployed = [m for m in reparameterize_model(theirs).modules() if isinstance(m, nn.Conv2d)]
    fused = [m for m in fuse(ours).modules() if isinstance(m, nn.Conv2d)]
    assert len(fused) == len(deployed) == 1 + 2 * 21
    for mine, other in zip(fused, deployed, strict=True):
        assert relative_error(mine.weight, other.weight) <= 1e-5
        assert relative_error(mine.bias, other.bias) <= 1e-5


# ----------------------------------------------------------------------- the network


@pytest.mark.parametrize("name", MOBILEONE)
def test_only_s0_has_four_branches_and_its_stem_has_one(name):
    model = on_meta(create_model, name)
    blocks = [m for m in model.modules() if isinstance(m, MobileOneBlock)]
    assert blocks[0] is model.stem and len(blocks) == 1 + 2 * 21
    assert len(model.stem.branch_convs) == 1
    counts = {len(block.branch_convs) for block in blocks[1:]}
    assert counts == ({4} if name == "mobileone_s0" else {1})


@pytest.mark.parametrize("name", MOBILEONE)
def test_only_the_last_half_of_stage_3_and_all_of_stage_4_of_s4_gate_their_channels(name):
    model = on_meta(create_model, name)
    gated = {
        key.removesuffix(".se"): module.fc1.out_channels
        for key, module in model.named_modules()
        if key.endswith(".se")
    }
    if name != "mobileone_s4":
        assert gated == {}
        return
    third = {f"stages.2.{i}": 896 // 16 for i in range(10, 20)}
    assert gated == {**third, "stages.3.0": 896 // 16, "stages.3.1": 2048 // 16}


# ----------------------------------------------------------------------- key layouts


def official_key(key):
    """Return our key as apple/ml-mobileone spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[0] == "head":
        return f"linear.{parts[2]}"
    if parts[0] == "stem":
        place, rest = ["stage0"], parts[1:]
    else:
        place, rest = [f"stage{int(parts[1]) + 1}", parts[2]], parts[3:]
    words = {
        "branch_convs": "rbr_conv",
        "branch_1x1": "rbr_scale",
        "branch_identity": "rbr_skip",
        "fc1": "reduce",
        "fc2": "expand",
    }
    return ".".join(place + [words.get(word, word) for word in rest])


def mmpretrain_key(key):
    """Return our key as open-mmlab/mmpretrain spells it, also from the model's source."""
    parts = key.split(".")
    if parts[0] == "head":
        return key
    if parts[0] == "stem":
        place, rest = ["stage0"], parts[1:]
    else:
        place, rest = [f"stage{int(parts[1]) + 1}", parts[2]], parts[3:]
    words = {
        "branch_convs": "branch_conv_list",
        "branch_1x1": "branch_scale",
        "branch_identity": "branch_norm",
        "bn": "norm",
        "fc1": "conv1.conv",
        "fc2": "conv2.conv",
    }
    return ".".join(["backbone", *place, *(words.get(word, word) for word in rest)])


OFFICIAL = {
    "mobileone_s0": (
        "stage0.rbr_conv.0.conv.weight",
        "stage0.rbr_scale.bn.running_var",
        "stage1.0.rbr_conv.3.bn.weight",
        "stage2.2.rbr_skip.running_mean",
        "stage3.19.rbr_conv.2.conv.weight",
        "stage4.1.rbr_conv.0.bn.bias",
        "linear.weight",
    ),
    "mobileone_s4": (
        "stage3.10.se.reduce.weight",
        "stage3.10.rbr_scale.conv.weight",
        "stage4.1.se.expand.bias",
        "linear.bias",
    ),
}
MMPRETRAIN = {
    "mobileone_s0": (
        "backbone.stage0.branch_conv_list.0.conv.weight",
        "backbone.stage0.branch_scale.norm.running_var",
        "backbone.stage1.0.branch_conv_list.3.norm.weight",
        "backbone.stage2.2.branch_norm.running_mean",
        "backbone.stage3.19.branch_conv_list.2.conv.weight",
        "head.fc.weight",
    ),
    "mobileone_s4": (
        "backbone.stage3.10.se.conv1.conv.weight",
        "backbone.stage4.1.se.conv2.conv.bias",
        "head.fc.bias",
    ),
}


@pytest.mark.parametrize("name", ["mobileone_s0", "mobileone_s4"])
@pytest.mark.parametrize(
    ("spelled", "examples"), [(official_key, OFFICIAL), (mmpretrain_key, MMPRETRAIN)]
)
def test_every_key_of_the_other_layouts_has_one_partner(name, spelled, examples):
    ours = on_meta(create_model, name).state_dict()
    theirs = {spelled(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and theirs.keys() >= set(examples[name])
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)
