"""ShuffleNet V2 beyond torchvision: the authors' code, literally, and the large networks' units."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse
from litezoo.models.shufflenetv2 import MegviiUnit, ShuffleV2Unit
from litezoo.models.weights import convert_state_dict, load_state_dict

#: Float32 sums of up to a thousand products, in another order.
BOUND = 1e-5
UNITS = (4, 8, 4)


# ----------------------------------------------------------------------- the code, literally


def convolution(state, conv, x, *, stride=1, groups=1):
    weight = state[f"{conv}.weight"]
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)


def norm(state, bn, x):
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{bn}.{name}"] for name in names), eps=1e-5)


def megvii_network(state, x):
    """ShuffleNetV2/network.py and blocks.py of megvii-model/ShuffleNet-Series, by its keys."""
    x = F.relu(norm(state, "first_conv.1", convolution(state, "first_conv.0", x, stride=2)))
    x = F.max_pool2d(x, 3, 2, 1)
    for unit in range(sum(UNITS)):
        stride = 2 if unit in (0, 4, 12) else 1
        left, right = (x, x) if stride == 2 else (x[:, 0::2], x[:, 1::2])
        if stride == 2:
            at = f"features.{unit}.branch_proj"
            left = convolution(state, f"{at}.0", left, stride=2, groups=left.shape[1])
            left = convolution(state, f"{at}.2", norm(state, f"{at}.1", left))
            left = F.relu(norm(state, f"{at}.3", left))
        at = f"features.{unit}.branch_main"
        right = F.relu(norm(state, f"{at}.1", convolution(state, f"{at}.0", right)))
        right = convolution(state, f"{at}.3", right, stride=stride, groups=right.shape[1])
        right = convolution(state, f"{at}.5", norm(state, f"{at}.4", right))
        x = torch.cat((left, F.relu(norm(state, f"{at}.6", right))), 1)
    x = F.relu(norm(state, "conv_last.1", convolution(state, "conv_last.0", x)))
    return F.linear(x.mean((2, 3)), state["classifier.0.weight"])


# ----------------------------------------------------------------------- keys


def official_key(key):
    """Return our key as megvii-model/ShuffleNet-Series spells it (not from KEY_LAYOUTS)."""
    parts = key.split(".")
    kind = ("conv", "bn").index(parts[-2]) if parts[-2] in ("conv", "bn") else None
    if parts[0] in ("stem", "final"):
        place = {"stem": "first_conv", "final": "conv_last"}[parts[0]]
        return f"{place}.{kind}.{parts[-1]}"
    if parts[0] == "head":
        return f"classifier.0.{parts[2]}"
    stage, unit, side, layer = int(parts[1]), int(parts[2]), parts[3], int(parts[4])
    first = {"left": (0, 2), "right": (0, 3, 5)}[side][layer]
    branch = {"left": "branch_proj", "right": "branch_main"}[side]
    return f"features.{sum(UNITS[:stage]) + unit}.{branch}.{first + kind}.{parts[-1]}"


def openmmlab_key(key):
    """Return our key as mmpretrain spells it (not from KEY_LAYOUTS)."""
    start, _, rest = key.partition(".")
    if start == "head":
        return key
    rest = rest.removeprefix("layers.0.")
    place = {"stem": "conv1", "stages": "layers", "final": "layers.3"}[start]
    return f"backbone.{place}.{rest}"


@pytest.mark.parametrize(
    ("name", "spell", "keys"),
    [
        (
            "shufflenetv2_x1_0_megvii",
            official_key,
            (
                "first_conv.0.weight",
                "first_conv.1.bias",
                "features.0.branch_proj.0.weight",
                "features.0.branch_proj.3.running_var",
                "features.3.branch_main.3.weight",
                "features.4.branch_proj.1.weight",
                "features.15.branch_main.6.bias",
                "conv_last.0.weight",
                "conv_last.1.running_mean",
                "classifier.0.weight",
            ),
        ),
        (
            "shufflenetv2_x1_0",
            openmmlab_key,
            (
                "backbone.conv1.conv.weight",
                "backbone.layers.0.0.branch1.0.bn.bias",
                "backbone.layers.0.0.branch1.1.conv.weight",
                "backbone.layers.1.7.branch2.2.bn.running_var",
                "backbone.layers.3.conv.weight",
                "backbone.layers.3.bn.weight",
                "head.fc.bias",
            ),
        ),
    ],
)
def test_every_key_of_a_released_layout_has_one_partner(name, spell, keys):
    ours = on_meta(create_model, name).state_dict()
    theirs = {spell(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and set(keys) <= set(theirs)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["shufflenetv2_x0_5_megvii", "shufflenetv2_x1_0_megvii"])
def test_the_authors_weights_give_what_their_code_computes(name):
    filled = fill(on_meta(create_model, name)).state_dict()
    theirs = {official_key(k): v for k, v in filled.items() if k != "head.fc.bias"}  # has no bias
    ours = poison(on_meta(create_model, name))
    load_state_dict(ours, theirs, get_spec(name))
    x = images(2, 3, 65, 96)
    expected = megvii_network(theirs, x)
    assert 1e-6 < expected.abs().max() < 1e6
    for model in (ours, fuse(ours)):
        assert relative_error(model(x), expected) <= BOUND


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("shufflenetv2_x0_5", "shufflenetv2_x0_5_megvii"),
        ("shufflenetv2_x0_5_megvii", "shufflenetv2_x0_5"),
    ],
)
def test_weights_of_one_edition_are_refused_by_the_other(name, other):
    """At 0.5x their shapes would fit, and the network would compute noise."""
    ours, theirs = (on_meta(create_model, n).state_dict() for n in (name, other))
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    with pytest.raises(UsageError, match=f"not of {name}"):
        convert_state_dict(theirs, get_spec(name), ours)


# ----------------------------------------------------------------------- the units


def branch(state, at, x, *, stride=1):
    """1x1, 3x3 depthwise, 1x1, without the last ReLU."""
    y = F.relu(norm(state, f"{at}.0.bn", convolution(state, f"{at}.0.conv", x)))
    y = convolution(state, f"{at}.1.conv", y, stride=stride, groups=y.shape[1])
    return norm(
        state, f"{at}.2.bn", convolution(state, f"{at}.2.conv", norm(state, f"{at}.1.bn", y))
    )


def gate(state, y):
    """Squeeze-and-excitation, arXiv 1709.01507."""
    squeezed = y.mean((2, 3))
    hidden = F.relu(squeezed @ state["se.fc1.weight"][:, :, 0, 0].T + state["se.fc1.bias"])
    scale = (hidden @ state["se.fc2.weight"][:, :, 0, 0].T + state["se.fc2.bias"]).sigmoid()
    return y * scale[:, :, None, None]


@torch.inference_mode()
@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_unit_of_the_large_networks_is_appendix_figure_2(squeeze_excite, residual):
    torch.manual_seed(0)
    unit = MegviiUnit(
        20, 20, stride=1, opens=False, squeeze_excite=squeeze_excite, residual=residual
    )
    state, x = shake(unit).eval().state_dict(), images(2, 20, 7, 9)
    left, right = x[:, 0::2], x[:, 1::2]
    y = branch(state, "right", right)
    y = gate(state, y) if squeeze_excite else y
    y = right + y if residual else y
    assert relative_error(unit(x), torch.cat((left, F.relu(y)), 1)) <= BOUND


@torch.inference_mode()
@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_unit_of_a_stage_keeps_its_width_on_the_left(stride):
    torch.manual_seed(0)
    unit = MegviiUnit(8, 20, stride=stride, opens=True, squeeze_excite=True, residual=True)
    state, x = shake(unit).eval().state_dict(), images(2, 8, 7, 10)
    left = norm(state, "left.0.bn", convolution(state, "left.0.conv", x, stride=stride, groups=8))
    left = F.relu(norm(state, "left.1.bn", convolution(state, "left.1.conv", left)))
    right = F.relu(gate(state, branch(state, "right", x, stride=stride)))
    assert (left.shape[1], right.shape[1]) == (8, 12)
    assert relative_error(unit(x), torch.cat((left, right), 1)) <= BOUND


@torch.inference_mode()
def test_half_of_the_channels_pass_a_unit_untouched():
    x = images(2, 8, 5, 5)
    y = ShuffleV2Unit(8, 8, stride=1, opens=False).eval()(x)
    assert torch.equal(y[:, 0::2], x[:, :4])
    y = MegviiUnit(8, 8, stride=1, opens=False).eval()(x)
    assert torch.equal(y[:, :4], x[:, 0::2])


@pytest.mark.parametrize(
    ("name", "convolutions"), [("shufflenetv2_50", 50), ("se_shufflenetv2_164", 163)]
)
def test_the_large_networks_are_as_deep_as_their_names(name, convolutions):
    """164 counts the classifier, 50 does not."""
    model = on_meta(create_model, name)
    longest = [
        m
        for key, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and ".left." not in key and ".se." not in key
    ]
    assert len(longest) == convolutions


def test_the_squeezed_width_is_half_of_the_unit():
    """Appendix, Table 2: "the neuron numbers in SE modules to be 1/2 of the channel numbers"."""
    model = on_meta(create_model, "se_shufflenetv2_164")
    for stage, width in zip(model.stages, (340, 680, 1360, 2720), strict=True):
        units = [m for m in stage if isinstance(m, MegviiUnit)]
        assert {unit.se.fc1.out_channels for unit in units} == {width // 2}
