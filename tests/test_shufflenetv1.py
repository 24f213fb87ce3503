"""ShuffleNet V1 beyond pytorchcv: the released codes, literally, and their key layouts."""

import re

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse
from litezoo.models.shuffle import ChannelShuffle
from litezoo.models.shufflenetv1 import ShuffleNetV1, ShuffleUnit
from litezoo.models.weights import convert_state_dict, load_state_dict

SHUFFLENETV1 = list_models("shufflenetv1_*")
#: Float32 sums of up to two thousand products, in another order.
BOUND = 1e-5
UNITS = (4, 8, 4)


# ----------------------------------------------------------------------- the codes, literally


def convolution(state, conv, x, *, stride=1, groups=1):
    weight = state[f"{conv}.weight"]
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)


def norm(state, bn, x):
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{bn}.{name}"] for name in names), eps=1e-5)


def shuffle_of_the_paper(x, groups):
    """Section 3.1: "reshaping the output channel dimension into (g, n), transposing"."""
    per_group = x.shape[1] // groups
    order = [group * per_group + member for member in range(per_group) for group in range(groups)]
    return x[:, order]


def shuffle_of_megvii(x, groups):
    """Its code reads (n, g) and transposes: every g-th channel, from each of the g first."""
    order = [channel for first in range(groups) for channel in range(first, x.shape[1], groups)]
    return x[:, order]


def megvii_network(state, x, groups):
    """ShuffleNetV1/network.py and blocks.py of megvii-model/ShuffleNet-Series, by its keys."""
    x = F.relu(norm(state, "first_conv.1", convolution(state, "first_conv.0", x, stride=2)))
    x = F.max_pool2d(x, 3, 2, 1)
    for unit in range(sum(UNITS)):
        stride = 2 if unit in (0, 4, 12) else 1
        one, two = (f"features.{unit}.branch_main_{i}" for i in (1, 2))
        y = convolution(state, f"{one}.0", x, groups=1 if unit == 0 else groups)
        y = F.relu(norm(state, f"{one}.1", y))
        y = convolution(state, f"{one}.3", y, stride=stride, groups=y.shape[1])
        y = shuffle_of_megvii(norm(state, f"{one}.4", y), groups)
        y = norm(state, f"{two}.1", convolution(state, f"{two}.0", y, groups=groups))
        if stride == 1:
            x = F.relu(y + x)
        else:
            x = torch.cat((F.avg_pool2d(x, 3, 2, 1), F.relu(y)), 1)
    return F.linear(x.mean((2, 3)), state["classifier.0.weight"])


def openmmlab_network(state, x, groups):
    """mmpretrain/models/backbones/shufflenet_v1.py, by its keys."""
    y = convolution(state, "backbone.conv1.conv", x, stride=2)
    x = F.max_pool2d(F.relu(norm(state, "backbone.conv1.bn", y)), 3, 2, 1)
    for stage, depth in enumerate(UNITS):
        for unit in range(depth):
            at = f"backbone.layers.{stage}.{unit}"
            first, stride = stage == unit == 0, 2 if unit == 0 else 1
            layer = f"{at}.g_conv_1x1_compress"
            y = convolution(state, f"{layer}.conv", x, groups=1 if first else groups)
            y = F.relu(norm(state, f"{layer}.bn", y))
            layer = f"{at}.depthwise_conv3x3_bn"
            y = convolution(state, f"{layer}.conv", y, stride=stride, groups=y.shape[1])
            y = shuffle_of_the_paper(norm(state, f"{layer}.bn", y), groups)
            layer = f"{at}.g_conv_1x1_expand"
            y = norm(state, f"{layer}.bn", convolution(state, f"{layer}.conv", y, groups=groups))
            if stride == 1:
                x = F.relu(x + y)
            else:
                x = torch.cat((F.avg_pool2d(x, 3, 2, 1), F.relu(y)), 1)
    return F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])


# ----------------------------------------------------------------------- their keys


def official_key(key):
    """Return our key as megvii-model/ShuffleNet-Series spells it (not from KEY_LAYOUTS)."""
    parts = key.split(".")
    if parts[0] == "stem":
        return f"first_conv.{('conv', 'bn').index(parts[1])}.{parts[2]}"
    if parts[0] == "head":
        return f"classifier.0.{parts[2]}"
    stage, unit, (layer, kind, rest) = int(parts[1]), int(parts[2]), parts[5:]
    place = {
        ("compress", "conv"): "branch_main_1.0",
        ("compress", "bn"): "branch_main_1.1",
        ("depthwise", "conv"): "branch_main_1.3",
        ("depthwise", "bn"): "branch_main_1.4",
        ("expand", "conv"): "branch_main_2.0",
        ("expand", "bn"): "branch_main_2.1",
    }[layer, kind]
    return f"features.{sum(UNITS[:stage]) + unit}.{place}.{rest}"


def openmmlab_key(key):
    """Return our key as mmpretrain spells it (not from KEY_LAYOUTS)."""
    parts = key.split(".")
    if parts[0] == "stem":
        return ".".join(["backbone", "conv1", *parts[1:]])
    if parts[0] == "head":
        return key
    layer = {
        "compress": "g_conv_1x1_compress",
        "depthwise": "depthwise_conv3x3_bn",
        "expand": "g_conv_1x1_expand",
    }[parts[5]]
    return ".".join(["backbone", "layers", parts[1], parts[2], layer, *parts[6:]])


LAYOUTS = {
    "megvii": (
        official_key,
        (
            "first_conv.0.weight",
            "first_conv.1.running_var",
            "features.0.branch_main_1.0.weight",
            "features.3.branch_main_1.1.bias",
            "features.4.branch_main_1.3.weight",
            "features.11.branch_main_1.4.running_mean",
            "features.12.branch_main_2.0.weight",
            "features.15.branch_main_2.1.weight",
            "classifier.0.weight",
        ),
    ),
    "openmmlab": (
        openmmlab_key,
        (
            "backbone.conv1.conv.weight",
            "backbone.layers.0.0.g_conv_1x1_compress.conv.weight",
            "backbone.layers.1.7.depthwise_conv3x3_bn.bn.running_var",
            "backbone.layers.2.3.g_conv_1x1_expand.bn.bias",
            "head.fc.bias",
        ),
    ),
}
every_layout = pytest.mark.parametrize(
    "name", ["shufflenetv1_g3_050_megvii", "shufflenetv1_g3_100_openmmlab"]
)


def as_released(name, state):
    key, _ = LAYOUTS[name.rpartition("_")[2]]
    return {key(k): v for k, v in state.items()}


@every_layout
def test_every_key_of_a_released_layout_has_one_partner(name):
    ours = on_meta(create_model, name).state_dict()
    theirs = as_released(name, ours)
    _, keys = LAYOUTS[name.rpartition("_")[2]]
    assert len(theirs) == len(ours) and set(keys) <= set(theirs)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "network", "groups"),
    [
        ("shufflenetv1_g3_050_megvii", megvii_network, 3),
        ("shufflenetv1_g8_050_megvii", megvii_network, 8),
        ("shufflenetv1_g3_100_openmmlab", openmmlab_network, 3),
    ],
)
def test_released_weights_give_what_the_released_code_computes(name, network, groups):
    filled = fill(on_meta(create_model, name)).state_dict()
    theirs = as_released(name, filled)
    theirs.pop("classifier.0.bias", None)  # Megvii's classifier has none
    ours = poison(on_meta(create_model, name))
    load_state_dict(ours, theirs, get_spec(name))
    x = images(2, 3, 65, 96)
    expected = network(theirs, x, groups)
    assert 1e-6 < expected.abs().max() < 1e6
    for model in (ours, fuse(ours)):
        assert relative_error(model(x), expected) <= BOUND


@pytest.mark.parametrize("given", ["_megvii", "_openmmlab", ""])
@pytest.mark.parametrize("edition", ["_megvii", "_openmmlab", ""])
def test_weights_of_one_edition_are_refused_by_another(given, edition):
    """Their shapes would fit, and the network would compute noise."""
    name, other = "shufflenetv1_g3_100" + edition, "shufflenetv1_g3_100" + given
    ours, theirs = (on_meta(create_model, n).state_dict() for n in (name, other))
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    states = [theirs] if not given else [theirs, as_released(other, theirs)]
    for state in states:
        if given == edition:
            assert convert_state_dict(state, get_spec(name), ours).keys() == ours.keys()
        else:
            with pytest.raises(UsageError, match=f"not of {name}"):
                convert_state_dict(state, get_spec(name), ours)


# ----------------------------------------------------------------------- the unit


@torch.inference_mode()
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_unit_is_figure_2_with_the_main_branch_first(groups, stride):
    torch.manual_seed(0)
    width, wider = 24 * groups, 24 * groups * stride
    unit = ShuffleUnit(
        width, wider, stride=stride, groups=groups, compress_groups=groups, edition="paper"
    )
    state = shake(unit).eval().state_dict()
    at, x = "main.paper", images(2, width, 7, 10).relu()
    y = convolution(state, f"{at}.compress.conv", x, groups=groups)
    y = shuffle_of_the_paper(F.relu(norm(state, f"{at}.compress.bn", y)), groups)
    y = convolution(state, f"{at}.depthwise.conv", y, stride=stride, groups=wider // 4)
    y = norm(state, f"{at}.depthwise.bn", y)
    y = norm(state, f"{at}.expand.bn", convolution(state, f"{at}.expand.conv", y, groups=groups))
    if stride == 1:
        expected = F.relu(x + y)
    else:
        expected = F.relu(torch.cat((y, F.avg_pool2d(x, 3, 2, 1)), 1))
    assert relative_error(unit(x), expected) <= BOUND


@pytest.mark.parametrize("name", SHUFFLENETV1)
def test_only_the_first_1x1_convolution_is_ungrouped(name):
    """Section 3.2: "we do not apply group convolution on the first pointwise layer"."""
    groups = int(re.search(r"_g(\d)_", name)[1])
    convolutions = [
        m
        for m in on_meta(create_model, name).stages.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)
    ]
    assert [m.groups for m in convolutions] == [1] + [groups] * 31


def test_one_group_needs_no_shuffle():
    with torch.device("meta"):
        model = ShuffleNetV1(groups=1, stem_width=12, widths=(72, 144, 288))
    assert not any(isinstance(m, ChannelShuffle) for m in model.modules())
