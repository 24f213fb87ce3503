"""MobileNetV4 beyond parity with timm: the block against its equations, and where things sit."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.mobilenetv4 import FusedIB, UniversalInvertedBottleneck
from litezoo.models.weights import convert_state_dict, load_state_dict, read_checkpoint

NAMES = list_models("mobilenetv4_*")
every_variant = pytest.mark.parametrize("name", NAMES)
INSTANCES = {"ExtraDW": (5, 3), "IB": (0, 5), "ConvNeXt": (3, 0), "FFN": (0, 0)}
BOUND = 1e-12


def blocks(name, kind=UniversalInvertedBottleneck):
    return [m for m in on_meta(create_model, name).modules() if isinstance(m, kind)]


def instance(block):
    """Return the paper's name of a UIB, from which depthwise convolutions are there."""
    return {
        (True, True): "ExtraDW",
        (False, True): "IB",
        (True, False): "ConvNeXt",
        (False, False): "FFN",
    }[block.start is not None, block.middle is not None]


# ----------------------------------------------------------------------- the block


def conv_bn(x, layer, **options):
    """Convolution and BatchNorm with epsilon 1e-5, from the numbers alone."""
    y = F.conv2d(x, layer.conv.weight, padding=layer.conv.weight.shape[-1] // 2, **options)
    mean, variance = layer.bn.running_mean, layer.bn.running_var
    scale = layer.bn.weight / torch.sqrt(variance + 1e-5)
    return (y - mean[:, None, None]) * scale[:, None, None] + layer.bn.bias[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("kind", INSTANCES)
@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_block_is_that_of_figure_4(kind, out_channels, stride):
    start, middle = INSTANCES[kind]
    stride = stride if start or middle else 1  # an FFN has nothing that could stride
    block = UniversalInvertedBottleneck(
        8, out_channels, start=start, middle=middle, expansion=3, stride=stride
    )
    block = fill(block).double().eval()
    assert instance(block) == kind
    x = images(2, 8, 9, 11, dtype=torch.float64)
    y = x
    if start:  # followed by no activation
        y = conv_bn(y, block.start, groups=8, stride=1 if middle else stride)
    y = conv_bn(y, block.expand).relu()
    if middle:
        y = conv_bn(y, block.middle, groups=24, stride=stride).relu()
    y = conv_bn(y, block.project)
    if stride == 1 and out_channels == 8:
        y = y + x
    assert relative_error(block(x.clone()), y) <= BOUND
    assert relative_error(fuse(nn.Sequential(block))(x.clone()), y) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
def test_a_fused_bottleneck_is_two_convolutions(linear):
    block = fill(FusedIB(3, 8, 16, linear=linear)).double().eval()
    x = images(2, 3, 9, 12, dtype=torch.float64)
    y = conv_bn(conv_bn(x, block.expand, stride=2).relu(), block.project)
    assert y.min() < 0 < y.max()
    assert relative_error(block(x), y if linear else y.relu()) <= BOUND


def test_a_block_without_depthwise_convolutions_cannot_stride():
    with pytest.raises(AssertionError, match="nothing can stride"):
        UniversalInvertedBottleneck(8, 8, start=0, middle=0, expansion=4, stride=2)


# ----------------------------------------------------------------------- the tables of the paper


@pytest.mark.parametrize(
    ("name", "instances"),
    [
        ("mobilenetv4_conv_small", {"ExtraDW": 3, "IB": 8, "ConvNeXt": 1}),
        ("mobilenetv4_conv_medium", {"ExtraDW": 13, "ConvNeXt": 4, "FFN": 4}),
        ("mobilenetv4_conv_large", {"ExtraDW": 19, "ConvNeXt": 7}),
    ],
)
def test_the_instances_are_those_of_tables_11_to_13(name, instances):
    found = [instance(block) for block in blocks(name)]
    assert {kind: found.count(kind) for kind in set(found)} == instances


@every_variant
def test_only_the_first_block_of_a_stage_strides_and_on_its_middle_convolution(name):
    model = on_meta(create_model, name)
    for stage in model.stages:
        strided = [
            key
            for key, m in stage.named_modules()
            if isinstance(m, nn.Conv2d) and m.stride == (2, 2)
        ]
        fused = isinstance(stage[0], FusedIB)
        assert strided == ["0.expand.conv" if fused else "0.middle.conv"]
        assert [getattr(block, "residual", False) for block in stage] == [
            index > 0 for index in range(len(stage))
        ]


@every_variant
def test_the_fused_stages_end_in_a_relu_in_small_only(name):
    activated = {not isinstance(b.project.act, nn.Identity) for b in blocks(name, FusedIB)}
    assert activated == {name.endswith("small")}


@every_variant
def test_the_layer_behind_the_pooling_has_a_batchnorm_and_no_bias(name):
    """MobileNetV3's has a bias and no BatchNorm."""
    neck = on_meta(create_model, name).head.neck
    assert neck.conv.bias is None and neck.conv.weight.shape == (1280, 960, 1, 1)
    assert isinstance(neck.bn, nn.BatchNorm2d) and isinstance(neck.act, nn.ReLU)


@every_variant
def test_every_batchnorm_has_the_epsilon_of_the_public_weights(name):
    norms = blocks(name, nn.BatchNorm2d)
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}


# ----------------------------------------------------------------------- timm's keys


def timm_key(key, *, small):
    """Return our key as timm spells it, written without looking at KEY_LAYOUTS."""
    part = key.split(".")
    if part[0] == "stem":
        return f"conv_stem.{part[2]}" if part[1] == "conv" else f"bn1.{part[2]}"
    if part[:3] == ["head", "neck", "conv"]:
        return f"conv_head.{part[3]}"
    if part[:3] == ["head", "neck", "bn"]:
        return f"norm_head.{part[3]}"
    if part[0] == "head":
        return f"classifier.{part[2]}"
    if part[0] == "final":
        return ".".join(["blocks.4.0", "conv" if part[1] == "conv" else "bn1", part[2]])
    _, stage, block, layer, kind, tensor = part
    if int(stage) < (2 if small else 1):
        second = layer == "project"
        if small:  # two blocks
            return f"blocks.{stage}.{int(second)}.{'conv' if kind == 'conv' else 'bn1'}.{tensor}"
        names = ("conv_pwl", "bn2") if second else ("conv_exp", "bn1")
        return f"blocks.{stage}.{block}.{names[kind == 'bn']}.{tensor}"
    word = {"start": "dw_start", "expand": "pw_exp", "middle": "dw_mid", "project": "pw_proj"}
    return f"blocks.{stage}.{block}.{word[layer]}.{kind}.{tensor}"


def test_a_timm_checkpoint_loads_from_a_file(tmp_path):
    name = "mobilenetv4_conv_small"
    trained = fill(on_meta(create_model, name))
    state = {timm_key(k, small=True): v for k, v in trained.state_dict().items()}
    assert {
        "conv_stem.weight",
        "bn1.running_var",
        "blocks.0.1.bn1.bias",
        "blocks.1.0.conv.weight",
        "blocks.2.0.dw_start.bn.weight",
        "blocks.3.5.pw_proj.conv.weight",
        "blocks.4.0.bn1.running_mean",
        "norm_head.weight",
        "classifier.bias",
    } <= state.keys()
    file = tmp_path / "model.pth"
    torch.save(state, file)
    loaded = poison(on_meta(create_model, name))
    load_state_dict(loaded, read_checkpoint(file).state_dict, get_spec(name))
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))


@every_variant
def test_every_key_of_timm_has_one_partner(name):
    ours = on_meta(create_model, name).state_dict()
    theirs = {timm_key(k, small=name.endswith("small")): v for k, v in ours.items()}
    assert len(theirs) == len(ours)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert all(converted[key] is ours[key] for key in ours)


@every_variant
def test_rounding_of_widths_would_change_nothing(name):
    """The official code rounds every expanded width to a multiple of 8; they all are already."""
    assert all(block.expand.conv.out_channels % 8 == 0 for block in blocks(name))
