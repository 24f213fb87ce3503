"""G-Ghost RegNetX, which no library has: its stage against the official equations, its layout."""

import pytest
import timm
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.gghostnet import Bottleneck, GGhostRegNet, GhostBlocks
from litezoo.models.weights import convert_state_dict, load_state_dict

G_GHOST = list_models("g_ghost_*")


# ----------------------------------------------------------------------- equations


def norm(x, bn):
    """BatchNorm in eval mode, in words: (x - mean) / sqrt(var + 1e-5) * gamma + beta."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


def layer(x, conv_bn, *, stride=1, width=None):
    """Convolution, in groups of `width` channels where it is given, and BatchNorm."""
    weight = conv_bn.conv.weight
    groups = 1 if width is None else len(weight) // min(len(weight), width)
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    return norm(y, conv_bn.bn)


def regnet_block(x, block, width, stride=1):
    """The official `Bottleneck`: 1x1, grouped 3x3, 1x1, and the shortcut, projected or not."""
    y = F.relu(layer(x, block.conv1))
    y = F.relu(layer(y, block.conv2, stride=stride, width=width))
    y = layer(y, block.conv3)
    if stride > 1 or y.shape[1] != x.shape[1]:
        x = layer(x, block.shortcut, stride=stride)
    return F.relu(y + x)


def official_stage(x, stage, width):
    """The official `Stage.forward`, cheap ratio 0.5, line by line."""
    base, ghosts, end = stage
    x0 = regnet_block(x, base, width, stride=2)
    planes = x0.shape[1]
    thin = int(width * 0.75)
    raw_planes = int(planes * (1 - 0.5) / thin) * thin
    m_list = [x0]
    e = x0[:, :raw_planes]
    for block in ghosts.layers:
        e = regnet_block(e, block, thin)
        m_list.append(e)
    m = F.adaptive_avg_pool2d(torch.cat(m_list, 1), 1)
    m = layer(F.relu(layer(m, ghosts.mix1)), ghosts.mix2)
    c = F.relu(layer(x0[:, raw_planes:], ghosts.cheap) + m)
    return regnet_block(torch.cat((e, c), 1), end, width)


def network(depth, group_width, width):
    """A shaken network with one stage of this kind between two ordinary ones, in float64."""
    torch.manual_seed(0)
    model = GGhostRegNet(
        depths=(1, depth, 2),
        widths=(8, width, 16),
        group_width=group_width,
        stem_width=8,
        num_classes=5,
    )
    return shake(model).double().eval()


@pytest.mark.parametrize("depth", [3, 4, 7])
@pytest.mark.parametrize(("group_width", "width"), [(8, 40), (8, 56), (24, 96), (16, 64)])
@torch.no_grad()
def test_a_stage_is_the_official_one(depth, group_width, width):
    stage = network(depth, group_width, width).stages[1]
    x = images(2, 8, 13, 10, dtype=torch.float64)
    expected = official_stage(x, stage, group_width)
    assert relative_error(stage(x), expected) <= 1e-12
    assert relative_error(fuse(stage)(x), expected) <= 1e-12


@torch.no_grad()
def test_the_network_is_stem_stages_mean_and_linear():
    model = network(4, 8, 40)
    x = images(2, 3, 33, 47, dtype=torch.float64)
    y = F.relu(layer(x, model.stem, stride=2))
    y = regnet_block(y, model.stages[0][0], 8, stride=2)
    y = official_stage(y, model.stages[1], 8)
    y = regnet_block(y, model.stages[2][0], 8, stride=2)
    y = regnet_block(y, model.stages[2][1], 8)
    expected = F.linear(y.mean((2, 3)), model.head.fc.weight, model.head.fc.bias)
    assert relative_error(model(x), expected) <= 1e-12
    assert relative_error(fuse(model)(x), expected) <= 1e-12


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_only_stages_of_three_blocks_or_more_have_ghosts(depth):
    kinds = [type(block) for block in network(depth, 8, 40).stages[1]]
    assert kinds == {
        1: [Bottleneck],
        2: [Bottleneck, Bottleneck],
    }.get(depth, [Bottleneck, GhostBlocks, Bottleneck])


@given(
    groups=st.integers(2, 12), group_width=st.sampled_from([8, 16, 24, 48]), depth=st.integers(1, 5)
)
@settings(max_examples=30, deadline=None)
def test_half_of_the_channels_or_less_are_computed_in_whole_thin_groups(groups, group_width, depth):
    planes = groups * group_width
    with torch.device("meta"):
        blocks = GhostBlocks(planes, depth=depth, group_width=group_width)
    raw, thin = blocks.intrinsic, int(0.75 * group_width)
    assert raw == int(planes * 0.5 / thin) * thin and planes / 2 - thin < raw <= planes / 2
    assert blocks.cheap.conv.weight.shape == (planes - raw, planes - raw, 1, 1)
    assert blocks.mix1.conv.in_channels == planes + raw * depth
    assert {block.conv2.conv.groups for block in blocks.layers} == {raw // thin}


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 2), (16, 1), (48, 1)])
@torch.no_grad()
def test_the_ordinary_block_is_timms_regnetx_block(in_channels, stride):
    theirs = timm.models.regnet.Bottleneck(
        in_channels, 48, stride=stride, group_size=24, se_ratio=0.0
    )
    theirs = shake(theirs).double().eval()
    ours = Bottleneck(in_channels, 48, group_width=24, stride=stride).double().eval()
    ours.load_state_dict(
        {k.replace("downsample", "shortcut"): v for k, v in theirs.state_dict().items()}
    )
    x = images(2, in_channels, 9, 12, dtype=torch.float64)
    assert relative_error(ours(x), theirs(x)) <= 1e-12


@pytest.mark.parametrize("name", G_GHOST)
def test_depths_widths_and_group_widths_are_those_of_regnetx(name):
    regnet = on_meta(timm.create_model, name.removeprefix("g_ghost_"))
    stages = [regnet.s1, regnet.s2, regnet.s3, regnet.s4]
    convs = [stage.b1.conv2.conv for stage in stages]
    architecture = get_spec(name).architecture
    assert architecture["depths"] == tuple(len(list(stage.children())) for stage in stages)
    assert architecture["widths"] == tuple(conv.out_channels for conv in convs)
    ours = [stage[0].conv2.conv for stage in on_meta(create_model, name).stages]
    assert [conv.groups for conv in ours] == [conv.groups for conv in convs]


# ----------------------------------------------------------------------- the official layout


def official_key(key, depths):
    """Return our key as g_ghost_regnet.py spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[:2] == ["head", "fc"]:
        return f"fc.{parts[2]}"
    if parts[0] == "stem":
        return f"{parts[1]}1.{parts[2]}"
    stage, block, rest = int(parts[1]), int(parts[2]), parts[3:]
    place = f"layer{stage + 1}."
    if depths[stage] <= 2:
        place += f"{block}."
    elif block != 1:
        place += {0: "base.", 2: "end."}[block]
    elif rest[0] == "layers":
        place += f"layers.{rest[1]}."
        rest = rest[2:]
    else:
        number = {
            ("cheap", "conv"): "cheap.0",
            ("cheap", "bn"): "cheap.1",
            ("mix1", "conv"): "merge.1",
            ("mix1", "bn"): "merge.2",
            ("mix2", "conv"): "merge.4",
            ("mix2", "bn"): "merge.5",
        }[rest[0], rest[1]]
        return f"{place}{number}.{rest[2]}"
    part, kind, leaf = rest
    if part == "shortcut":
        return f"{place}downsample.{int(kind == 'bn')}.{leaf}"
    return f"{place}{kind}{part.removeprefix('conv')}.{leaf}"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "g_ghost_regnetx_032",
            (
                "conv1.weight",
                "bn1.running_mean",
                "layer1.0.downsample.0.weight",
                "layer1.1.bn3.bias",
                "layer2.base.downsample.1.running_var",
                "layer2.end.conv2.weight",
                "layer3.layers.12.bn3.weight",
                "layer3.merge.1.weight",
                "layer3.merge.2.running_mean",
                "layer3.merge.4.weight",
                "layer3.merge.5.bias",
                "layer3.cheap.0.weight",
                "layer3.cheap.1.weight",
                "layer4.1.conv3.weight",
                "fc.bias",
            ),
        ),
        (
            "g_ghost_regnetx_160",
            ("layer3.layers.10.conv1.weight", "layer4.0.downsample.1.weight", "fc.weight"),
        ),
        ("g_ghost_regnetx_002", ("layer2.0.conv1.weight", "layer4.layers.4.conv2.weight")),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(name, keys, prefix):
    spec = get_spec(name)
    ours = on_meta(create_model, name).state_dict()
    theirs = {prefix + official_key(k, spec.architecture["depths"]): v for k, v in ours.items()}
    assert len(theirs) == len(ours) and all(prefix + key in theirs for key in keys)
    converted = convert_state_dict(theirs, spec, ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


def test_official_weights_load():
    spec = get_spec("g_ghost_regnetx_002")
    trained = fill(on_meta(create_model, spec.name))
    depths = spec.architecture["depths"]
    state = {official_key(key, depths): v for key, v in trained.state_dict().items()}
    loaded = poison(on_meta(create_model, spec.name))
    assert load_state_dict(loaded, state, spec) == ()
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))


def test_convolutions_start_as_he_normal_by_fan_out_and_batchnorms_as_the_identity():
    torch.manual_seed(0)
    model = create_model("g_ghost_regnetx_002", num_classes=10)
    conv = model.stages[3][0].conv1.conv
    assert float(conv.weight.detach().std()) == pytest.approx(
        (2 / conv.out_channels) ** 0.5, rel=0.02
    )
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.weight.eq(1).all() and m.bias.eq(0).all() for m in norms)
