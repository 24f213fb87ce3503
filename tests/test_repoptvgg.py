"""RepOpt-VGG: a VGG layer stands for a block with branches (CSLA), at the start and in training."""

import pytest
import torch
from helpers import images, on_meta, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import Kernel, fuse, identity_kernel, pad_to
from litezoo.models.layers import ConvBN
from litezoo.models.repoptvgg import BlockScales, start_as_block
from litezoo.models.weights import convert_state_dict

REPOPTVGG = list_models("repoptvgg_*")


# ----------------------------------------------------------------------- the imaginary block


class ImaginaryBlock(nn.Module):
    """Section 3.2 of the paper, without its BatchNorm: s (W3 * x) + t (W1 * x) + u x.

    s and t are constants per output channel, W3, W1 and u are trained; u exists where the block
    keeps shape. Spelled with functional calls only.
    """

    def __init__(self, channels, out_channels, stride, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.stride = stride
        self.s, self.t = draw(out_channels, 1, 1).exp(), draw(out_channels, 1, 1).exp()
        self.w3 = nn.Parameter(draw(out_channels, channels, 3, 3))
        self.w1 = nn.Parameter(draw(out_channels, channels, 1, 1))
        keeps_shape = stride == 1 and channels == out_channels
        self.u = nn.Parameter(draw(channels, 1, 1)) if keeps_shape else None

    def forward(self, x):
        y = self.s * F.conv2d(x, self.w3, stride=self.stride, padding=1)
        y = y + self.t * F.conv2d(x, self.w1, stride=self.stride)
        return y if self.u is None else y + self.u * x

    @torch.no_grad()
    def start(self):
        """The kernel that the trained convolution starts with, by the algebra of fuse.py."""
        no_bias = torch.zeros(len(self.s), dtype=torch.float64)
        kernel = Kernel(self.s[..., None] * self.w3, no_bias)
        kernel = kernel + pad_to(Kernel(self.t[..., None] * self.w1, no_bias), 3)
        if self.u is not None:
            identity = identity_kernel(len(self.u), groups=1, size=3)
            kernel = kernel + Kernel(self.u[..., None] * identity, no_bias)
        return kernel.weight

    @torch.no_grad()
    def gradient_multiplier(self):
        """What SGD multiplies the single kernel's gradient by, tap by tap."""
        multiplier = (self.s**2)[..., None] * torch.ones_like(self.w3)
        multiplier[:, :, 1, 1] += (self.t**2)[..., 0]
        if self.u is not None:
            for channel in range(len(self.u)):
                multiplier[channel, channel, 1, 1] += 1.0
        return multiplier


blocks = given(
    channels=st.sampled_from([4, 6]),
    out_channels=st.sampled_from([4, 6]),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)


def layer_that_starts_as(block, seed):
    out_channels, channels, _, _ = block.w3.shape
    layer = shake(ConvBN(channels, out_channels, 3, stride=block.stride).double(), seed)
    layer.conv.weight.data = block.start()
    return layer


@settings(deadline=None, max_examples=30)
@blocks
def test_a_layer_can_start_as_the_imaginary_block(channels, out_channels, stride, seed):
    block = ImaginaryBlock(channels, out_channels, stride, seed)
    layer = layer_that_starts_as(block, seed).eval()
    x = images(2, channels, 7, 10, seed=seed, dtype=torch.float64)
    expected = torch.relu(layer.bn(block(x)))
    assert relative_error(layer(x.clone()), expected) <= 1e-12
    assert relative_error(fuse(layer)(x.clone()), expected) <= 1e-10


@settings(deadline=None, max_examples=15)
@blocks
def test_a_layer_with_multiplied_gradients_trains_as_the_imaginary_block(
    channels, out_channels, stride, seed
):
    """The equivalence of section 3.2, with Nesterov momentum and weight decay (on u as well)."""
    block = ImaginaryBlock(channels, out_channels, stride, seed)
    layer = layer_that_starts_as(block, seed)
    multiplier = block.gradient_multiplier()
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    imaginary = torch.optim.SGD(block.parameters(), **options)
    real = torch.optim.SGD([layer.conv.weight], **options)
    bn = nn.BatchNorm2d(out_channels).double().train()
    bn.load_state_dict(layer.train().bn.state_dict())
    for step in range(3):
        x = images(4, channels, 6, 5, seed=seed + step, dtype=torch.float64)
        for optimizer, output in ((imaginary, torch.relu(bn(block(x)))), (real, layer(x))):
            optimizer.zero_grad()
            output[:, 0].square().mean().add(output.mean()).backward()
        layer.conv.weight.grad *= multiplier
        imaginary.step()
        real.step()
        assert relative_error(layer.conv.weight, block.start()) <= 1e-9


@pytest.mark.parametrize("position", [0, 1, 5])
@pytest.mark.parametrize("out_channels", [4, 6])
def test_new_weights_are_those_of_a_block_with_the_scales_of_the_search(position, out_channels):
    """Section 4.1: sqrt(2 / i) in the i-th block of a stage, 1 in the first."""
    layer = ConvBN(4, out_channels, 3)
    block = ImaginaryBlock(4, out_channels, 1, seed=0)
    block.w3.data = layer.conv.weight.detach().double()
    scale = {0: 1.0, 1: 1.41421356, 5: 0.63245553}[position]
    block.s, block.t = (torch.full_like(block.s, scale) for _ in range(2))
    if block.u is not None:
        nn.init.ones_(block.u)
    state = torch.get_rng_state()
    start_as_block(layer, BlockScales.at_position(position, layer=layer))
    torch.set_rng_state(state)
    block.w1.data = nn.Conv2d(4, out_channels, 1, bias=False).weight.detach().double()
    assert relative_error(layer.conv.weight.double(), block.start()) <= 1e-6


# ----------------------------------------------------------------------- the network


def test_every_layer_starts_so():
    """The identity stands on the diagonal; around it the numbers are small."""
    layers = [m for m in create_model("repoptvgg_b1").modules() if isinstance(m, ConvBN)]
    for layer in layers:
        keeps_shape = layer.conv.stride == (1, 1)
        diagonal = layer.conv.weight.detach()[:, :, 1, 1].diagonal()
        assert float(diagonal.mean()) == pytest.approx(1.0 if keeps_shape else 0.0, abs=0.2)


@pytest.mark.parametrize("name", REPOPTVGG)
def test_every_layer_is_a_3x3_convolution_and_fuses_to_one(name):
    model = on_meta(create_model, name)
    layers = [m for m in model.modules() if isinstance(m, ConvBN)]
    assert len(layers) == {"b": 28, "l": 48}[name[-2]]
    assert {m.conv.kernel_size for m in layers} == {(3, 3)}
    strided = [i for i, m in enumerate(layers) if m.conv.stride == (2, 2)]
    assert strided == ([0, 1, 5, 11, 27] if name[-2] == "b" else [0, 1, 9, 23, 47])
    channels = sum(m.conv.out_channels for m in layers)
    train, deploy = (sum(p.numel() for p in m.parameters()) for m in (model, fuse(model)))
    assert train - deploy == channels, "a scale and a shift become one bias"


@pytest.mark.parametrize(("name", "repvgg"), [("b1", "repvgg_b1"), ("b2", "repvgg_b2")])
def test_it_deploys_to_the_shapes_of_the_repvgg_of_its_name(name, repvgg):
    models = (f"repoptvgg_{name}", repvgg)
    ours, theirs = (fuse(on_meta(create_model, model)).state_dict() for model in models)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# ----------------------------------------------------------------------- the official layout


def official_key(key):
    """Return our key as DingXiaoH/RepOptimizers spells it, without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[0] == "head":
        return f"linear.{parts[2]}"
    if parts[0] == "stem":
        return ".".join(["stage0", *parts[1:]])
    return ".".join([f"stage{int(parts[1]) + 1}", *parts[2:]])


@pytest.mark.parametrize("name", REPOPTVGG)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(name, prefix):
    ours = on_meta(create_model, name).state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    examples = (
        "stage0.conv.weight",
        "stage0.bn.running_var",
        "stage1.3.bn.weight",
        "stage3.15.conv.weight",
        "stage4.0.bn.num_batches_tracked",
        "linear.weight",
    )
    assert len(theirs) == len(ours) and all(prefix + key in theirs for key in examples)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)
