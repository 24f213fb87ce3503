"""MobileNetV1 beyond what parity with timm's 1.0x shows: the thin variants, strides, ReLU6."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.mobilenetv1 import DepthwiseSeparable
from litezoo.models.weights import load_state_dict

MOBILENETV1 = list_models("mobilenetv1_*")
#: Float32 sums of up to a thousand products, in another order.
BOUND = 1e-5


def norm(x, bn):
    """BatchNorm in eval mode, in words: (x - mean) / sqrt(var + 1e-5) * gamma + beta."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


def awake(block):
    """Give a block weights and inputs that reach every bend of its activations."""
    torch.manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return shake(block).double().eval()


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_pair_is_the_right_side_of_figure_3(stride):
    block = awake(DepthwiseSeparable(6, 10, stride=stride))
    x = 9 * images(2, 6, 7, 9, dtype=torch.float64)
    kernels = block.depthwise.conv.weight
    filtered = torch.cat(
        [F.conv2d(x[:, i : i + 1], kernels[i : i + 1], stride=stride, padding=1) for i in range(6)],
        dim=1,
    )
    seen = norm(filtered, block.depthwise.bn).clamp(0, 6)
    assert {0.0, 6.0} <= set(seen.unique().tolist()), "both bends of ReLU6 are reached"
    mixed = torch.einsum("nchw,kc->nkhw", seen, block.pointwise.conv.weight[:, :, 0, 0])
    expected = norm(mixed, block.pointwise.bn).clamp(0, 6)
    assert relative_error(block(x), expected) <= 1e-12
    assert relative_error(fuse(block)(x), expected) <= 1e-12


@pytest.mark.parametrize(
    ("name", "multiplier"),
    [("mobilenetv1_025", 0.25), ("mobilenetv1_050", 0.5), ("mobilenetv1_075", 0.75)],
)
@torch.inference_mode()
def test_the_thin_variants_are_timms_network_with_that_multiplier(name, multiplier):
    """Timm registers only 1.0x of these, but its generator makes them."""
    with torch.device("meta"):
        reference = _gen_mobilenet_v1("mobilenetv1_100", multiplier).eval()
    fill(reference)
    ours = poison(on_meta(create_model, name))
    assert load_state_dict(ours, reference.state_dict(), get_spec(name)) == ()
    x = images(2, 3, 64, 64)
    assert relative_error(ours(x), reference(x)) <= BOUND
    assert relative_error(fuse(ours)(x), reference(x)) <= BOUND


@pytest.mark.parametrize("name", MOBILENETV1)
def test_the_last_pair_keeps_the_resolution_whatever_table_1_prints(name):
    model = on_meta(create_model, name)
    blocks = [block for stage in model.stages for block in stage]
    strides = [block.depthwise.conv.stride[0] for block in blocks]
    assert strides == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert all(block.pointwise.conv.stride == (1, 1) for block in blocks)
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[2:] == (7, 7)


@pytest.mark.parametrize("name", MOBILENETV1)
def test_all_27_convolutions_are_normalised_and_end_in_relu6(name):
    model = on_meta(create_model, name)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU6) == 27
    assert nn.ReLU not in kinds
