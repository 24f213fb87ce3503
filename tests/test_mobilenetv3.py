"""MobileNetV3 beyond what parity shows: Figure 4, eps and padding, minimal networks, layouts."""

from functools import partial

import pytest
import torch
from helpers import fill, images, on_meta, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse
from litezoo.models.layers import ConvBN, relu
from litezoo.models.mobilenetv3 import InvertedResidual
from litezoo.models.weights import convert_state_dict

MOBILENETV3 = [name for name in list_models() if get_spec(name).family == "mobilenetv3"]
BOUND = 1e-5


def h_sigmoid(x):
    return (x + 3).clamp(0, 6) / 6


def h_swish(x):
    return x * h_sigmoid(x)


def norm(x, bn, eps):
    """BatchNorm in eval mode, in words: (x - mean) / sqrt(var + eps) * gamma + beta."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + eps).sqrt() * gamma + beta


def awake(block):
    """Give a block weights and inputs that reach every bend of its activations."""
    torch.manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return shake(block).double().eval()


def mix(x, conv):
    return torch.einsum("nchw,kc->nkhw", x, conv.weight[:, :, 0, 0])


def margin(length, size, stride, same):
    """Zeros in front of and behind an axis: TensorFlow's SAME or PyTorch's size // 2."""
    if not same:
        return size // 2, size // 2
    steps = -(-length // stride)
    zeros = max(0, (steps - 1) * stride + size - length)
    return zeros // 2, zeros - zeros // 2


# ----------------------------------------------------------------------- Figure 4


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("act", "function"), [(relu, F.relu), (nn.Hardswish, h_swish)])
@pytest.mark.parametrize("squeeze_excite", [False, True])
@pytest.mark.parametrize(
    ("out_channels", "expanded", "size", "stride"),
    [(16, 40, 5, 1), (16, 16, 3, 1), (24, 40, 3, 2), (16, 40, 5, 2)],
)
@torch.no_grad()
def test_a_block_is_figure_4_with_the_gate_behind_the_activation(
    out_channels, expanded, size, stride, squeeze_excite, act, function, same
):
    block = awake(
        InvertedResidual(
            16,
            out_channels,
            size=size,
            expanded=expanded,
            squeeze_excite=squeeze_excite,
            act=act,
            stride=stride,
            conv_bn=partial(ConvBN, eps=1e-3, same=same),
        )
    )
    for height, width in ((8, 11), (7, 12)):
        x = 9 * images(2, 16, height, width, dtype=torch.float64)
        wide = x
        if expanded != 16:
            wide = function(norm(mix(x, block.expand.conv), block.expand.bn, 1e-3))
        zeros = (*margin(width, size, stride, same), *margin(height, size, stride, same))
        filtered = F.conv2d(
            F.pad(wide, zeros), block.depthwise.conv.weight, stride=stride, groups=expanded
        )
        seen = function(norm(filtered, block.depthwise.bn, 1e-3))
        if squeeze_excite:
            squeeze, excite = block.se.fc1, block.se.fc2
            hidden = (mix(seen.mean((2, 3), True), squeeze) + squeeze.bias[:, None, None]).relu()
            seen = seen * h_sigmoid(mix(hidden, excite) + excite.bias[:, None, None])
        expected = norm(mix(seen, block.project.conv), block.project.bn, 1e-3)
        if stride == 1 and out_channels == 16:
            expected = expected + x
        assert relative_error(block(x), expected) <= 1e-12
        assert relative_error(fuse(block)(x), expected) <= 1e-12


@torch.no_grad()
def test_the_last_stage_pools_before_the_wide_convolution():
    """Figure 5: mean, 1x1 with bias and no BatchNorm, h-swish, linear."""
    model = fill(on_meta(create_model, "mobilenetv3_small_100")).double()
    features = images(2, 576, 3, 5, dtype=torch.float64)
    wide, linear = model.head.neck.conv, model.head.fc
    hidden = h_swish(features.mean((2, 3)) @ wide.weight[:, :, 0, 0].T + wide.bias)
    assert hidden.shape == (2, 1024)
    expected = hidden @ linear.weight.T + linear.bias
    assert relative_error(model.forward_head(features), expected) <= 1e-12


# ----------------------------------------------------------------------- what weights are tied to


@pytest.mark.parametrize("name", MOBILENETV3)
def test_eps_momentum_and_padding_are_those_of_who_trained_it(name):
    whose = name.partition("mobilenetv3")[0]
    eps, momentum, same = {
        "": (1e-5, 0.1, False),
        "tf_": (1e-3, 0.1, True),
        "tv_": (1e-3, 0.01, False),
    }[whose]
    model = on_meta(create_model, name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(eps, momentum)}
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5
    assert all((type(m).__name__ == "Conv2dSame") == same for m in strided)
    assert all(m.padding == ((0, 0) if same else (m.kernel_size[0] // 2,) * 2) for m in strided)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (50, 31)])
@torch.inference_mode()
def test_same_padding_survives_fusing_at_odd_and_even_sizes(size):
    model = fill(on_meta(create_model, "tf_mobilenetv3_small_minimal_100"))
    x = images(2, 3, *size)
    assert relative_error(fuse(model)(x), model(x)) <= BOUND


@pytest.mark.parametrize("size", [32, 33])
@torch.inference_mode()
def test_same_padding_is_below_and_to_the_right_of_even_inputs(size):
    stem = on_meta(create_model, "tf_mobilenetv3_large_100").to_empty(device="cpu").stem.conv
    stem.weight.fill_(1.0)
    ones = stem(torch.ones(1, 3, size, size))[0, 0] / 3
    assert ones.shape == ((size + 1) // 2,) * 2
    corners = [ones[0, 0], ones[0, -1], ones[-1, 0], ones[-1, -1]]
    assert [int(v) for v in corners] == ([9, 6, 6, 4] if size % 2 == 0 else [4, 4, 4, 4])


# ----------------------------------------------------------------------- variants


@pytest.mark.parametrize("name", MOBILENETV3)
def test_minimal_networks_have_relu_and_3x3_kernels_only(name):
    modules = list(on_meta(create_model, name).modules())
    kinds = {type(m).__name__ for m in modules}
    sizes = {m.kernel_size[0] for m in modules if isinstance(m, nn.Conv2d)}
    fancy = {"Hardswish", "Hardsigmoid", "SqueezeExcite"}
    assert kinds & fancy == (set() if "minimal" in name else fancy)
    assert sizes == ({1, 3} if "minimal" in name else {1, 3, 5})


@pytest.mark.parametrize(
    ("name", "squeezed"),
    [
        ("mobilenetv3_large_100", [24, 32, 32, 120, 168, 168, 240, 240]),
        ("mobilenetv3_large_075", [24, 24, 24, 96, 136, 136, 184, 184]),
        ("mobilenetv3_small_100", [8, 24, 64, 64, 32, 40, 72, 144, 144]),
        ("mobilenetv3_small_050", [8, 16, 40, 40, 24, 24, 40, 72, 72]),
    ],
)
def test_squeezed_widths_are_a_quarter_of_the_expanded_rounded_to_8(name, squeezed):
    model = on_meta(create_model, name)
    gates = [m for m in model.modules() if type(m).__name__ == "SqueezeExcite"]
    assert [gate.fc1.out_channels for gate in gates] == squeezed


@pytest.mark.parametrize("name", MOBILENETV3)
def test_the_last_convolution_has_no_gate_and_the_head_does_not_shrink(name):
    model = on_meta(create_model, name)
    assert not any(type(m).__name__ == "SqueezeExcite" for m in model.final.modules())
    assert model.stem.conv.out_channels == 16
    assert model.head_hidden_size == (1280 if "large" in name else 1024)


def test_at_half_width_a_first_block_may_have_a_residual():
    """40 and 48 both become 24, and stage 3 opens with stride 1."""
    model = on_meta(create_model, "mobilenetv3_small_050")
    assert model.stages[3][0].has_residual
    assert not on_meta(create_model, "mobilenetv3_small_100").stages[3][0].has_residual


# ----------------------------------------------------------------------- openmmlab's keys


def openmmlab_key(key, depths):
    """Return our key as mmpretrain spells it: layer0 is the stem, then the blocks, then final."""
    parts = key.split(".")
    if parts[0] == "head":
        return f"head.layers.{['neck', 'fc'].index(parts[1])}.fc.{parts[-1]}"
    if parts[0] == "stem":
        return ".".join(["backbone.layer0", *parts[1:]])
    if parts[0] == "final":
        return ".".join([f"backbone.layer{sum(depths) + 1}", *parts[1:]])
    number = 1 + sum(depths[: int(parts[1])]) + int(parts[2])
    words = {
        "expand": "expand_conv",
        "depthwise": "depthwise_conv",
        "project": "linear_conv",
        "fc1": "conv1.conv",
        "fc2": "conv2.conv",
    }
    return ".".join([f"backbone.layer{number}"] + [words.get(part, part) for part in parts[3:]])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "tv_mobilenetv3_large_100",
            (
                "backbone.layer0.conv.weight",
                "backbone.layer1.depthwise_conv.conv.weight",
                "backbone.layer4.se.conv1.conv.bias",
                "backbone.layer15.linear_conv.bn.running_var",
                "backbone.layer16.bn.bias",
                "head.layers.0.fc.weight",
                "head.layers.1.fc.bias",
            ),
        ),
        (
            "mobilenetv3_small_075",
            (
                "backbone.layer1.se.conv2.conv.weight",
                "backbone.layer2.expand_conv.bn.weight",
                "backbone.layer11.linear_conv.conv.weight",
                "backbone.layer12.conv.weight",
            ),
        ),
    ],
)
def test_every_key_of_openmmlab_has_one_partner(name, keys):
    model = on_meta(create_model, name)
    ours = model.state_dict()
    depths = [len(stage) for stage in model.stages]
    theirs = {openmmlab_key(key, depths): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(key in theirs for key in keys)
    # mmpretrain's and torchvision's heads are linear layers, ours begins with a convolution
    theirs["head.layers.0.fc.weight"] = ours["head.neck.conv.weight"].flatten(1)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[k].shape == ours[k].shape for k in ours)
    assert all(converted[k] is ours[k] for k in ours if k != "head.neck.conv.weight")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("mobilenetv3_large_100", "mobilenetv3_small_100"),
        ("mobilenetv3_small_100", "mobilenetv3_large_100"),
    ],
)
def test_weights_of_the_other_size_are_refused_in_words(name, other):
    theirs = on_meta(create_model, other).state_dict()
    ours = on_meta(create_model, name).state_dict()
    with pytest.raises(UsageError, match=f"not of {name}"):
        convert_state_dict(theirs, get_spec(name), ours)
