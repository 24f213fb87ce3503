"""The fuse algebra against direct computation, and what `fuse` promises to its caller."""

import copy
import dataclasses
import pickle
from functools import partial

import pytest
import torch
from helpers import images, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import shallow_small
from torch import nn
from torch.nn import functional as F

import litezoo.models.fuse as fuse_module
import litezoo.models.repvgg as repvgg_module
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.fuse import (
    DeployBlock,
    FusableBlock,
    Kernel,
    bn_scale_shift,
    fold_bn,
    fold_conv_bn,
    fuse,
    fuse_with_report,
    graph_form,
    hold_dead,
    identity_kernel,
    pad_to,
)
from litezoo.models.layers import ConvBN
from litezoo.models.mobileone import MobileOneBlock
from litezoo.models.qarepvgg import QARepVGGBlock
from litezoo.models.repvgg import RepVGG, RepVGGBlock

# Derandomised: CI and a laptop see the same cases. No deadline: tests assert nothing about time.
checked = settings(max_examples=80, deadline=None, derandomize=True, database=None)
#: Of what fuses a block twice.
few = settings(checked, max_examples=25)
#: Float64 arithmetic in another order; a few hundred terms per output.
ROUNDING = 1e-12


# ----------------------------------------------------------------------- strategies


@st.composite
def convolutions(draw, bias=None, sizes=(1, 2, 3, 5)):
    """Draw a float64 convolution of any channels, groups, stride, kernel size and padding."""
    groups = draw(st.integers(1, 4))
    size = draw(st.sampled_from(sizes))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 4)),
        size,
        stride=draw(st.integers(1, 3)),
        padding=size // 2,
        groups=groups,
        bias=draw(st.booleans()) if bias is None else bias,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(generator=generator)
    return conv


@st.composite
def batch_norms(draw, channels):
    """Draw a float64 BatchNorm in eval mode: gammas of any sign, variances 1e-12 to 1e6."""
    bn = nn.BatchNorm2d(
        channels,
        affine=draw(st.integers(0, 4)) > 0,
        eps=draw(st.sampled_from([1e-3, 1e-5, 1e-8])),
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    exponents = torch.empty(channels, dtype=torch.float64).uniform_(-12, 6, generator=generator)
    with torch.no_grad():
        bn.running_var.copy_(10**exponents)
        bn.running_mean.normal_(0, draw(st.sampled_from([0, 1, 100])), generator=generator)
        if bn.affine:
            bn.weight.normal_(generator=generator)
            bn.weight[0] = draw(st.sampled_from([0.0, -1.0, -1e-3, 10.0]))
            bn.bias.normal_(generator=generator)
    return bn.eval()


def assert_equal_up_to_rounding(actual, expected, terms):
    """Compare channel by channel, relative to the size of the summed terms.

    An absolute bound would mean nothing: with eps 1e-8 the variances scale the channels by 1e-3 to
    1e4. Nor would one relative to the result, which can be the small difference of large terms.
    """
    bound = terms.abs().amax((0, 2, 3)).clamp_min(torch.finfo(torch.float64).tiny)
    assert ((actual - expected).abs().amax((0, 2, 3)) <= ROUNDING * bound).all()


def run(kernel, x, conv):
    """Apply a Kernel in place of a convolution."""
    return F.conv2d(x, kernel.weight, kernel.bias, conv.stride, conv.padding, 1, conv.groups)


def sizes_of_terms(conv, bn, x):
    """Bound the terms whose sum is bn(conv(x)): |t| * (|W| * |x| + |b| + |mean|) + |shift|."""
    scale, shift = bn_scale_shift(bn)
    magnitude = F.conv2d(
        x.abs(),
        conv.weight.abs(),
        None if conv.bias is None else conv.bias.abs(),
        conv.stride,
        conv.padding,
        1,
        conv.groups,
    )
    along = (slice(None), None, None)
    mean = bn.running_mean.abs()[along]
    beta = 0 if bn.bias is None else bn.bias.abs()[along]
    return scale.abs()[along] * (magnitude + mean) + shift.abs()[along] + beta


# ----------------------------------------------------------------------- the algebra


@checked
@given(st.data())
def test_scale_and_shift_are_the_batchnorm(data):
    bn = data.draw(batch_norms(data.draw(st.integers(1, 8))))
    x = images(2, bn.num_features, 3, 2, dtype=torch.float64)
    scale, shift = (v[:, None, None] for v in bn_scale_shift(bn))
    terms = (scale * x).abs() + shift.abs() + (0 if bn.bias is None else bn.bias[:, None, None])
    assert_equal_up_to_rounding(scale * x + shift, bn(x), terms)


@checked
@given(st.data())
def test_folded_kernel_gives_convolution_then_batchnorm(data):
    conv = data.draw(convolutions(bias=False))
    bn = data.draw(batch_norms(conv.out_channels))
    x = images(2, conv.in_channels, 7, 6, dtype=torch.float64)
    for kernel in (fold_bn(conv.weight, bn), fold_conv_bn(conv, bn)):
        assert kernel.weight.dtype == kernel.bias.dtype == torch.float64
        assert_equal_up_to_rounding(run(kernel, x, conv), bn(conv(x)), sizes_of_terms(conv, bn, x))


@checked
@given(st.data())
def test_folded_kernel_carries_the_bias_of_the_convolution(data):
    conv = data.draw(convolutions(bias=True))
    bn = data.draw(batch_norms(conv.out_channels))
    x = images(2, conv.in_channels, 7, 6, dtype=torch.float64)
    actual = run(fold_conv_bn(conv, bn), x, conv)
    assert_equal_up_to_rounding(actual, bn(conv(x)), sizes_of_terms(conv, bn, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folding_is_done_in_double_precision(dtype):
    conv = nn.Conv2d(4, 6, 3, bias=True, dtype=dtype)
    bn = shake(nn.BatchNorm2d(6, dtype=dtype))
    kernel = fold_conv_bn(conv, bn)
    exact = fold_conv_bn(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
    assert torch.equal(kernel.weight, exact.weight) and torch.equal(kernel.bias, exact.bias)


@checked
@given(st.data())
def test_padded_kernel_is_the_same_map(data):
    conv = data.draw(convolutions(bias=True, sizes=(1, 3, 5)))
    margin = data.draw(st.integers(0, 2))
    x = images(2, conv.in_channels, 7, 6, dtype=torch.float64)
    size = conv.kernel_size[0] + 2 * margin
    padded = pad_to(Kernel(conv.weight, conv.bias), size)
    assert padded.weight.shape[2:] == (size, size)
    actual = F.conv2d(x, padded.weight, padded.bias, conv.stride, size // 2, 1, conv.groups)
    assert relative_error(actual, conv(x)) <= ROUNDING


@pytest.mark.parametrize(("size", "wanted"), [(3, 1), (3, 4), (2, 3), (1, 2)])
def test_a_window_that_cannot_be_centred_is_refused(size, wanted):
    kernel = Kernel(torch.ones(2, 2, size, size), torch.zeros(2))
    with pytest.raises(UsageError, match=f"cannot centre a {size} window in one of {wanted}"):
        pad_to(kernel, wanted)


@checked
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 5, 7]))
def test_identity_kernel_changes_nothing(groups, per_group, size):
    channels = groups * per_group
    weight = identity_kernel(channels, groups=groups, size=size)
    assert weight.shape == (channels, per_group, size, size) and weight.dtype == torch.float64
    x = images(2, channels, 6, 5, dtype=torch.float64)
    assert torch.equal(F.conv2d(x, weight, padding=size // 2, groups=groups), x)


@pytest.mark.parametrize(("channels", "groups", "size"), [(4, 1, 2), (4, 3, 3), (6, 4, 1)])
def test_an_identity_kernel_that_cannot_be_is_refused(channels, groups, size):
    with pytest.raises(UsageError, match="size must be odd and the groups must divide"):
        identity_kernel(channels, groups=groups, size=size)


@checked
@given(st.data())
def test_sum_of_kernels_is_the_sum_of_the_branches(data):
    conv = data.draw(convolutions(bias=True))
    other = copy.deepcopy(conv)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    total = Kernel(conv.weight, conv.bias) + Kernel(other.weight, other.bias)
    x = images(2, conv.in_channels, 7, 6, dtype=torch.float64)
    assert relative_error(run(total, x, conv), conv(x) + other(x)) <= ROUNDING


# ----------------------------------------------------------------------- the block


@st.composite
def blocks(draw):
    """Draw a float64 RepVGG block in eval mode, of every kind the zoo has and others."""
    groups = draw(st.sampled_from([1, 2, 4]))
    squeeze_excite = draw(st.booleans())
    unit = 16 if squeeze_excite else groups
    out_channels = unit * draw(st.integers(1, 3))
    in_channels = out_channels if draw(st.booleans()) else groups * draw(st.integers(1, 5))
    block = RepVGGBlock(
        in_channels,
        out_channels,
        stride=draw(st.sampled_from([1, 2])),
        groups=groups,
        squeeze_excite=squeeze_excite,
    )
    return shake(block.double(), seed=draw(st.integers(0, 2**31))).eval()


@checked
@given(blocks(), st.integers(1, 9), st.integers(1, 9))
def test_fused_block_gives_the_same_output(block, height, width):
    x = images(2, block.in_channels, height, width, dtype=torch.float64)
    expected, actual = block(x), block.fused().eval()(x)
    # on top of rounding: the sum of branches before the ReLU may cancel to a small output
    assert (actual - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())


@checked
@given(blocks(), st.data())
def test_fused_block_gives_the_same_output_whatever_the_statistics(block, data):
    for branch in block.modules():
        if isinstance(branch, nn.BatchNorm2d):
            drawn = data.draw(batch_norms(branch.num_features))
            branch.running_mean.copy_(drawn.running_mean)
            branch.running_var.copy_(drawn.running_var)
    x = images(2, block.in_channels, 5, 4, dtype=torch.float64)
    # Relative to the largest term of the sum: a variance of 1e-12 scales its channel by 316, and
    # the branches may cancel. SE scales by less than one.
    three, one, identity = block.branch_3x3, block.branch_1x1, block.branch_identity
    terms = sizes_of_terms(three.conv, three.bn, x) + sizes_of_terms(one.conv, one.bn, x)
    if identity is not None:
        scale, shift = bn_scale_shift(identity)
        terms = terms + (scale[:, None, None] * x).abs() + shift.abs()[:, None, None]
    bound = 1e-11 * float(terms.detach().abs().max())
    assert (block.fused().eval()(x) - block(x)).abs().max() <= bound


@checked
@given(blocks())
def test_fused_block_shares_no_parameter(block):
    theirs = {p.data_ptr() for p in block.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in block.fused().parameters())


def test_fused_block_is_one_convolution_and_what_followed_the_branches():
    plain = RepVGGBlock(8, 8, groups=2).fused()
    assert [type(m).__name__ for m in plain] == ["Conv2d", "ReLU"]
    assert plain.conv.groups == 2 and plain.conv.kernel_size == (3, 3)
    gated = RepVGGBlock(8, 32, stride=2, squeeze_excite=True).fused()
    assert [type(m).__name__ for m in gated] == ["Conv2d", "SqueezeExcite", "ReLU"]
    assert gated.conv.stride == (2, 2)


# ----------------------------------------------------------------------- fuse: a toy detector


def tiny(**options):
    """Return a RepVGG of 7 small layers."""
    arguments = {"depths": (1, 2, 2, 1), "stem_width": 4, "widths": (8, 8, 8, 16), **options}
    return RepVGG(**arguments, num_classes=5)


class Detector(nn.Module):
    """A foreign model: blocks in a backbone and in containers, and layers of its own."""

    def __init__(self):
        super().__init__()
        self.backbone = tiny()
        self.neck = nn.ModuleDict(
            {
                "p5": nn.ModuleList([RepVGGBlock(16, 16), RepVGGBlock(16, 8, stride=2)]),
                "plain": nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
            }
        )
        self.optional = None
        self.register_module("absent", None)
        self.boxes = nn.Conv2d(8, 4, 1)
        self.anchors = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("strides", torch.tensor([8.0]))

    def forward(self, x):
        x = self.backbone.forward_features(x)
        for block in self.neck["p5"]:
            x = block(x)
        return self.boxes(self.neck["plain"](F.pad(x, [1] * 4))) + self.anchors * self.strides


def snapshot(model):
    """Everything `fuse` must leave as it was, by value and by identity."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": {k: (id(p), p.requires_grad) for k, p in model.named_parameters()},
        "buffers": {k: (id(b), b._version) for k, b in model.named_buffers()},
        "modules": {k: (id(m), type(m), m.training) for k, m in model.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
        "hooks": {
            (k, kind): {key: id(hook) for key, hook in vars(m)[kind].items()}
            for k, m in model.named_modules()
            for kind in vars(m)
            if kind.endswith("_hooks")
        },
    }


def same(a, b):
    values_a, values_b = a.pop("values"), b.pop("values")
    return a == b and all(torch.equal(values_a[k], values_b[k]) for k in values_a | values_b)


def test_fused_detector_gives_the_same_output():
    detector = shake(Detector()).eval()
    x = images(2, 3, 64, 64)
    assert relative_error(fuse(detector)(x), detector(x)) <= 1e-5


def test_only_the_blocks_of_a_foreign_model_change():
    detector = shake(Detector())
    deploy = fuse(detector)
    assert type(deploy) is Detector and deploy.absent is None and deploy.optional is None
    assert all(isinstance(b, DeployBlock) for b in deploy.neck["p5"])
    before, after = detector.state_dict(), deploy.state_dict()
    for key in before:
        if key.startswith(("neck.plain", "boxes", "anchors", "strides", "backbone.head")):
            assert torch.equal(before[key], after[key])
            assert before[key].data_ptr() != after[key].data_ptr()
    assert [type(m) for m in deploy.neck["plain"]] == [nn.Conv2d, nn.BatchNorm2d]


@pytest.mark.parametrize("training", [True, False])
def test_fuse_leaves_its_argument_untouched(training):
    detector = shake(Detector()).train(training)
    detector.neck["p5"][0].eval()
    detector.boxes.weight.requires_grad_(False)
    calls = []
    detector.backbone.stem.register_forward_hook(lambda *_: calls.append("hook"))
    detector.neck["p5"][0].branch_3x3.conv.register_forward_pre_hook(lambda *_: None)
    before, generator = snapshot(detector), torch.get_rng_state()
    fuse(detector)
    assert same(before, snapshot(detector))
    assert torch.equal(generator, torch.get_rng_state())


def test_fuse_leaves_gradients_of_its_argument_untouched():
    block = RepVGGBlock(4, 4)
    block(images(2, 4, 5, 5)).sum().backward()
    gradients = {k: p.grad.clone() for k, p in block.named_parameters()}
    fuse(block)
    assert all(torch.equal(p.grad, gradients[k]) for k, p in block.named_parameters())


def test_a_model_in_training_is_fused_with_eval_semantics():
    model = shake(tiny(drop_rate=0.5)).train()
    x = images(2, 3, 32, 32)
    deploy = fuse(model)
    assert not any(m.training for m in deploy.modules())
    assert all(m.training for m in model.modules())
    assert relative_error(deploy(x), model.eval()(x)) <= 1e-5


def test_a_block_can_be_the_root():
    block = shake(RepVGGBlock(4, 4)).eval()
    report = fuse_with_report(block)
    assert isinstance(report.model, DeployBlock) and len(report.blocks) == 1
    x = images(2, 4, 5, 6)
    assert relative_error(report.model(x), block(x)) <= 1e-5


def test_a_block_used_twice_stays_one_block():
    block = RepVGGBlock(4, 4)
    model = shake(nn.Sequential(block, nn.ModuleDict({"again": block})["again"], RepVGGBlock(4, 4)))
    model.append(nn.Sequential(block))
    report = fuse_with_report(model.eval())
    first, second, other, nested = report.model
    assert first is second is nested[0] and first is not other
    assert len(report.blocks) == 2
    x = images(2, 4, 5, 6)
    assert relative_error(report.model(x), model(x)) <= 1e-5


def test_a_shared_container_stays_shared():
    container = nn.Sequential(RepVGGBlock(4, 4))
    deploy = fuse(nn.ModuleList([container, container]))
    assert deploy[0] is deploy[1] and graph_form(deploy) == "deploy"


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
)
def test_the_dtype_is_carried(dtype, bound):
    model = shake(tiny()).to(dtype).eval()
    report = fuse_with_report(model)
    assert {p.dtype for p in report.model.parameters()} == {dtype}
    assert 0 < report.max_relative_error <= bound
    x = images(2, 3, 32, 32, dtype=dtype)
    assert report.model(x).dtype == dtype


def test_the_memory_format_is_carried():
    model = shake(tiny()).to(memory_format=torch.channels_last).eval()
    deploy = fuse(model)
    for module in deploy.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    contiguous = fuse(shake(tiny()))
    assert all(p.is_contiguous() for p in contiguous.parameters())
    x = images(2, 3, 32, 32).to(memory_format=torch.channels_last)
    assert deploy.stem(x).is_contiguous(memory_format=torch.channels_last)


def test_the_device_is_carried_where_nothing_can_be_computed():
    model = tiny().to("meta")
    report = fuse_with_report(model)
    assert all(p.is_meta for p in report.model.parameters())
    assert report.max_relative_error is None
    assert {b.max_relative_error for b in report.blocks} == {None}
    assert report.model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)


@pytest.mark.parametrize("context", ["meta", "no_grad", "inference_mode"])
def test_fusing_does_not_depend_on_what_surrounds_the_call(context):
    model = shake(tiny()).eval()
    expected = fuse(model).state_dict()
    around = {
        "meta": torch.device("meta"),
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
    }[context]
    with around:
        report = fuse_with_report(model)
    assert all(torch.equal(v, expected[k]) for k, v in report.model.state_dict().items())
    assert report.max_relative_error > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_requires_grad_is_carried(frozen):
    model = shake(tiny()).requires_grad_(not frozen)
    model.stem.requires_grad_(frozen)
    deploy = fuse(model)
    for name, parameter in deploy.named_parameters():
        assert parameter.requires_grad is (frozen == name.startswith("stem")), name
        assert parameter.is_leaf


# ----------------------------------------------------------------------- fuse: refusals


def test_a_fused_model_is_refused_with_a_clear_word():
    with pytest.raises(UsageError, match="in deploy form already: it was fused before"):
        fuse(fuse(shake(tiny())))


def test_a_model_without_blocks_is_refused_by_its_name():
    with pytest.raises(UsageError, match="Sequential has nothing to fuse: it contains no Fusable"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_batchnorm_without_running_statistics_is_refused():
    block = RepVGGBlock(4, 4)
    block.branch_1x1.bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(UsageError, match=r"without running statistics.*track_running_stats=True"):
        fuse(block)


def ruin_weight(block):
    block.branch_3x3.conv.weight.data[0, 0, 1, 1] = float("nan")


def ruin_variance(block):
    block.branch_1x1.bn.running_var[1] = -1.0


def ruin_mean(block):
    block.branch_identity.running_mean[0] = float("inf")
    block.branch_identity.weight.data[0] = -1.0  # else the ReLU would make it a sound zero


@pytest.mark.parametrize("ruin", [ruin_weight, ruin_variance, ruin_mean])
def test_broken_numbers_fail_the_check_and_name_the_block(ruin):
    model = shake(tiny())
    ruin(model.stages[1][1])
    with pytest.raises(CheckFailed, match=r"fusing stages\.1\.1 changed its output by nan"):
        fuse(model)


def test_a_kernel_that_its_dtype_cannot_hold_fails_the_check():
    block = shake(RepVGGBlock(4, 4).half())
    block.branch_3x3.bn.weight.data.fill_(6e4)
    block.branch_3x3.bn.running_var.fill_(1e-4)
    with pytest.raises(CheckFailed, match=r"fusing the model changed .* for torch\.float16"):
        fuse(block)


def ignore_batchnorm(weight, bn):
    return Kernel(weight.double(), torch.zeros_like(bn.running_mean, dtype=torch.float64))


def forget_the_mean(weight, bn):
    scale, _ = bn_scale_shift(bn)
    return Kernel(weight.double() * scale[:, None, None, None], bn.bias.double())


def forget_the_sign(weight, bn):
    scale, shift = bn_scale_shift(bn)
    return Kernel(weight.double() * scale.abs()[:, None, None, None], shift)


def pad_into_the_corner(kernel, size):
    margin = size - kernel.weight.shape[-1]
    return Kernel(F.pad(kernel.weight, [0, margin, 0, margin]), kernel.bias)


def identity_of_one_group(channels, *, groups, size, device="cpu"):
    weight = torch.zeros(channels, channels // groups, size, size, dtype=torch.float64)
    index = torch.arange(channels // groups)
    weight[index, index, size // 2, size // 2] = 1
    return weight


@pytest.mark.parametrize(
    ("module", "name", "wrong", "at"),
    [
        (fuse_module, "fold_bn", ignore_batchnorm, "backbone.stem"),
        (fuse_module, "fold_bn", forget_the_mean, "backbone.stem"),
        (fuse_module, "fold_bn", forget_the_sign, "backbone.stem"),
        (repvgg_module, "pad_to", pad_into_the_corner, "backbone.stem"),
        (repvgg_module, "fold_bn", ignore_batchnorm, "backbone.stages.0.1"),
        (repvgg_module, "identity_kernel", identity_of_one_group, "backbone.stages.0.1"),
    ],
)
def test_a_wrong_fold_fails_the_check_and_names_the_block(monkeypatch, module, name, wrong, at):
    detector = Detector()
    detector.backbone = tiny(groups=2, depths=(2, 1, 1, 1))
    shake(detector)
    fuse(detector)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(CheckFailed, match=f"fusing {at} changed its output by"):
        fuse(detector)


# ----------------------------------------------------------------------- fuse: the result


def test_every_block_is_certified_by_name():
    model = shake(create_model("repvgg_a0"))
    report = fuse_with_report(model)
    blocks = [k for k, m in model.named_modules() if isinstance(m, RepVGGBlock)]
    assert [b.name for b in report.blocks] == blocks and len(blocks) == 22
    assert all(0 < b.max_relative_error <= 1e-5 for b in report.blocks)
    assert report.max_relative_error == max(b.max_relative_error for b in report.blocks)
    assert graph_form(model) == "train" and graph_form(report.model) == "deploy"
    assert type(report.model) is type(model)
    x = images(2, 3, 64, 64)
    assert relative_error(report.model(x), model.eval()(x)) <= 1e-5


def test_no_trace_of_a_branch_remains():
    deploy = fuse(shake(Detector()))
    assert not [k for k in deploy.state_dict() if "branch" in k]
    assert not [k for k, m in deploy.named_modules() if "branch" in k or m is RepVGGBlock]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.backbone.modules())


def test_a_fused_model_can_be_copied_and_pickled():
    deploy = fuse(shake(tiny()))
    x = images(2, 3, 32, 32)
    for twin in (copy.deepcopy(deploy), pickle.loads(pickle.dumps(deploy))):
        assert twin.state_dict().keys() == deploy.state_dict().keys()
        assert torch.equal(twin(x), deploy(x))


def test_a_fused_state_dict_loads_into_the_fused_form_of_another_model():
    first, second = fuse(shake(tiny(), seed=1)), fuse(shake(tiny(), seed=2))
    second.load_state_dict(first.state_dict(), strict=True)
    x = images(2, 3, 32, 32)
    assert torch.equal(first(x), second(x))


# ----------------------------------------------------------------------- dead channels


@torch.no_grad()
def settle(model, x):
    """Give every BatchNorm the statistics of a batch: those of the data, without any lag."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()(x)
    return model.eval()


@st.composite
def blocks_with_dead_channels(draw):
    """Draw a block, images on which some input channels are 0, and those channels.

    The first output channel of every convolution reads only these, so that it is constant too.
    """
    groups = draw(st.sampled_from([1, 2]))
    channels = groups * draw(st.integers(2, 4))
    stride = draw(st.sampled_from([1, 1, 2]))
    block = draw(
        st.sampled_from(
            [
                RepVGGBlock(channels, channels, stride=stride, groups=groups),
                QARepVGGBlock(channels, channels, stride=stride, groups=groups),
                MobileOneBlock(channels, channels, 3, stride=stride, groups=channels, branches=2),
                MobileOneBlock(channels, channels, 1, branches=2),
                ConvBN(channels, channels, 3, stride=stride, groups=groups, bias=True),
                ConvBN(channels, channels, 5, groups=channels),
            ]
        )
    )
    shake(block.double(), seed=draw(st.integers(0, 2**31)))
    dead = sorted({0, *draw(st.sets(st.integers(0, channels - 1), max_size=channels - 2))})
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            mine = [c for c in range(module.weight.shape[1]) if c not in dead]
            module.weight.data[0, mine] = 0
    x = images(4, channels, 6, 5, seed=draw(st.integers(0, 99)), dtype=torch.float64)
    x[:, dead] = 0
    return settle(block, x), x, dead


@few
@given(blocks_with_dead_channels())
def test_cured_block_gives_the_same_output_where_its_dead_channels_are_constant(drawn):
    block, x, _ = drawn
    report = fuse_with_report(block)
    expected = block(x)
    assert (report.model(x) - expected).abs().max() <= 1e-10 * (1 + expected.abs().max())
    assert report.dead and all(row.is_cured and 0 in row.channels for row in report.dead)
    assert report.max_relative_error <= 1e-10


@few
@given(blocks_with_dead_channels())
def test_nothing_of_a_dead_branch_is_left_in_the_kernel(drawn):
    block, _, _ = drawn
    twin = copy.deepcopy(block)
    for row in fuse_with_report(block).dead:
        branch = twin.get_submodule(row.branch)
        gamma = branch.weight.detach()[list(row.channels)].abs().max()
        assert row.largest_scale == pytest.approx(float(gamma) / branch.eps**0.5)
        for channel in row.channels:  # what it has been without statistics of its own
            branch.running_var[channel] = torch.inf
    cured, free = fuse(block)[0], twin.fused()[0]
    assert relative_error(cured.weight, free.weight) <= 1e-12


@few
@given(st.integers(1, 3), st.sampled_from([-3.0, 0.0, 0.5, 40.0]), st.floats(0, 1e-14))
def test_a_dead_identity_may_have_any_constant(groups, constant, variance):
    block = shake(RepVGGBlock(6, 6, groups=groups).double()).eval()
    block.branch_identity.running_mean[2] = constant
    block.branch_identity.running_var[2] = variance
    x = images(2, 6, 4, 3, dtype=torch.float64)
    x[:, 2] = constant
    report = fuse_with_report(block)
    assert [(row.branch, row.channels) for row in report.dead] == [("branch_identity", (2,))]
    assert report.dead[0].constants == pytest.approx((constant,))
    assert relative_error(report.model(x), block(x)) <= 1e-10
    # only the centre of one filter was changed
    change = (report.model[0].weight - fuse(block, cure=False)[0].weight).abs()
    assert change[2, 2 % (6 // groups), 1, 1] > 1 and change.count_nonzero() == 1


def dead_identity():
    """Return a float64 block whose identity has a dead channel, 3, by its statistics."""
    block = shake(RepVGGBlock(6, 6).double()).eval()
    block.branch_identity.weight.data[3] = 1.0
    block.branch_identity.running_var[3] = 0.0
    block.branch_identity.running_mean[3] = 0.0
    return block


def test_the_cure_can_be_declined():
    block = dead_identity()
    kept, cured = fuse_with_report(block, cure=False), fuse_with_report(block)
    assert kept.dead == () and kept.said == ()
    assert kept.model[0].weight[3, 3, 1, 1] > 300 > 10 > cured.model[0].weight.abs().max()
    x = images(2, 6, 4, 3, dtype=torch.float64)
    assert relative_error(kept.model(x), block(x)) <= 1e-10


def test_a_cure_is_said_with_the_scale_that_it_avoids():
    report = fuse_with_report(dead_identity())
    assert report.said == (
        "dead channel 3 of branch_identity: constant moved into the bias, scale 316 avoided",
    )


def test_a_report_of_many_branches_names_the_worst_and_counts_the_others():
    blocks = [dead_identity() for _ in range(6)]
    for index, block in enumerate(blocks):
        block.branch_identity.weight.data[3] = 1.0 + index
    said = fuse_with_report(nn.Sequential(*blocks)).said
    assert [line.split()[4] for line in said[:4]] == [f"{i}.branch_identity:" for i in (5, 4, 3, 2)]
    assert said[4:] == ("2 dead channels of 2 more branches",)


def test_a_small_variance_that_carries_a_signal_is_no_death():
    block = shake(RepVGGBlock(6, 6).double()).eval()
    block.branch_1x1.bn.running_var[1] = 5e-6  # of small weights, say: a third of the output
    report = fuse_with_report(block)
    x = images(2, 6, 4, 3, dtype=torch.float64)
    assert report.dead == () and relative_error(report.model(x), block(x)) <= 1e-10


def test_a_channel_of_a_small_scale_is_left_alone():
    block = dead_identity()
    block.branch_identity.weight.data[3] = 1e-3
    assert fuse_with_report(block).dead == ()


def test_a_window_over_a_constant_is_not_constant_at_the_border():
    block = shake(ConvBN(2, 2, 3, act=None).double())
    x = images(2, 2, 6, 5, dtype=torch.float64)
    x[:, 1] = 0.5
    block.conv.weight.data[0, 0] = 0  # it reads the constant alone, and the padding around it
    settle(block, x)
    for given_images in (None, x):
        report = fuse_with_report(block, images=given_images)
        assert report.dead == () and relative_error(report.model(x), block(x)) <= 1e-10


def test_images_that_move_a_dead_channel_leave_it_as_it_is():
    block = dead_identity()
    x = images(2, 6, 4, 3, dtype=torch.float64)
    report = fuse_with_report(block, images=x)
    assert relative_error(report.model(x), block(x)) <= 1e-10
    (row,) = report.dead
    assert not row.is_cured and row.channels == (3,)
    spread = (x[:, 3].max() - x[:, 3].min()) / 2
    assert row.largest_deviation == pytest.approx(float(spread) / 1e-5**0.5)
    assert report.said[0].startswith("dead channel 3 of branch_identity: left as they are, scale")


@pytest.mark.parametrize("batches", [lambda x: x, lambda x: iter(x.split(3))])
def test_images_prove_a_death_that_the_averages_do_not_show_yet(batches):
    block = dead_identity()
    block.branch_identity.running_var[3] = 5e-3
    block.branch_identity.running_mean[3] = 0.02
    x = images(8, 6, 4, 3, dtype=torch.float64)
    x[:, 3] = 0.0
    assert fuse_with_report(block).dead == ()
    report = fuse_with_report(block, images=batches(x))
    (row,) = report.dead
    assert row.is_cured and row.constants == (0.0,) and row.largest_deviation == 0.0
    assert relative_error(report.model(x), block(x)) <= 1e-10
    assert report.model[0].weight[3, 3, 1, 1].abs() < 5 < row.largest_scale


def test_every_batch_of_images_counts():
    block = dead_identity()
    x = images(4, 6, 4, 3, dtype=torch.float64)
    x[:3, 3] = 0.0
    (row,) = fuse_with_report(block, images=x.split(1)).dead
    assert not row.is_cured


def test_images_are_read_only_where_a_channel_is_suspect():
    def unread():
        raise AssertionError("nothing is suspect here")
        yield

    assert fuse_with_report(shake(tiny()), images=unread()).dead == ()


def test_no_images_are_refused():
    with pytest.raises(UsageError, match="no images to see dead channels on; give some hundred"):
        fuse(dead_identity(), images=[])


def test_fuse_with_images_leaves_its_argument_untouched():
    block = dead_identity().train()
    before = snapshot(block)
    fuse(block, images=images(2, 6, 4, 3))
    assert same(before, snapshot(block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cured_block_keeps_its_dtype(dtype):
    report = fuse_with_report(dead_identity().to(dtype))
    assert report.dead and {p.dtype for p in report.model.parameters()} == {dtype}


def test_a_batchnorm_without_weights_can_be_cured():
    block = dead_identity()
    block.branch_identity = nn.BatchNorm2d(6, affine=False, dtype=torch.float64).eval()
    block.branch_identity.running_var[3] = 0.0
    x = images(2, 6, 4, 3, dtype=torch.float64)
    x[:, 3] = 0.0
    report = fuse_with_report(block)
    assert report.dead and relative_error(report.model(x), block(x.clone())) <= 1e-10


def forget_the_constant(bn, dead):
    bn.weight = nn.Parameter(bn.weight.clone().index_fill_(0, dead.channels, 0.0))


def forget_the_shift(bn, dead):
    bn.weight = nn.Parameter(bn.weight.clone().index_fill_(0, dead.channels, 0.0))
    bn.bias = nn.Parameter(bn.bias.clone().index_fill_(0, dead.channels, 0.0))


def cure_the_neighbour(bn, dead):
    cure(bn, dataclasses.replace(dead, channels=dead.channels + 1))


cure = fuse_module._cure


@pytest.mark.parametrize("wrong", [forget_the_constant, forget_the_shift, cure_the_neighbour])
def test_a_wrong_cure_fails_the_check(monkeypatch, wrong):
    block = dead_identity()
    block.branch_identity.running_mean[3] = 0.25
    x = images(2, 6, 4, 3, dtype=torch.float64)
    x[:, 3] = 0.0  # not what the mean says: the constant seen is what counts
    fuse(block, images=x)
    monkeypatch.setattr(fuse_module, "_cure", wrong)
    with pytest.raises(CheckFailed, match="changed its output by"):
        fuse(block, images=x)


@torch.no_grad()
def kill_channels(model, x):
    """Have the ReLU behind every fusable block give nothing but 0 in its first channel."""
    for block in model.modules():
        if isinstance(block, FusableBlock):
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d) and module.num_features > 2:
                    module.bias[0] = -50.0
    return settle(model, x)


@pytest.mark.parametrize(
    "create",
    [
        partial(shallow_small, "repvgg_a0"),
        partial(tiny, groups=2, squeeze_excite=True, widths=(16, 16, 16, 16)),
        partial(shallow_small, "mobileone_s0"),
        partial(shallow_small, "mobilenetv2_100"),
    ],
    ids=["repvgg", "groups and gates", "mobileone", "mobilenetv2"],
)
def test_a_cured_network_gives_the_same_output_on_its_data(create):
    x = images(4, 3, 32, 32, dtype=torch.float64)
    model = kill_channels(create().double(), x)
    report = fuse_with_report(model)
    assert report.dead and all(row.is_cured for row in report.dead)
    assert max(row.largest_scale for row in report.dead) > 25
    assert relative_error(report.model(x), model(x)) <= 1e-9
    by_statistics, on_images = (
        {(row.branch, c) for row in found.dead for c in row.channels}
        for found in (report, fuse_with_report(model, images=x))
    )
    assert by_statistics <= on_images


def test_qarepvgg_has_no_batchnorm_on_its_identity_that_could_die():
    x = images(4, 3, 32, 32, dtype=torch.float64)
    model = kill_channels(copy.deepcopy(shallow_small("qarepvgg_a0")).double(), x)
    report = fuse_with_report(model)
    assert report.dead == () and relative_error(report.model(x), model(x)) <= 1e-9


def test_a_model_whose_dead_channels_are_held_equals_the_cured_one_on_noise():
    x = images(4, 3, 32, 32, dtype=torch.float64)
    model = kill_channels(tiny().double(), x)
    model.stages[1][0].branch_3x3.bn.bias.data[0] = 200.0  # no data did: the channel wakes up
    report = fuse_with_report(model)
    assert relative_error(report.model(x), model(x)) > 0.1
    held = hold_dead(model, report.dead)
    assert relative_error(report.model(x), held(x)) <= 1e-9 and held is not model
