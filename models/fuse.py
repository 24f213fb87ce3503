"""Structural reparameterization: a block with several branches becomes one convolution.

The algebra (RepVGG, arXiv 2101.03697, section 3.3), all of it in float64:

* BatchNorm in eval mode is y = t*x + s with t = gamma / sqrt(var + eps), s = beta - t*mean,
  so conv + BN is a convolution with kernel t*W and bias s (`fold_bn`);
* a 1x1 kernel is a kxk kernel that is zero but for its centre (`pad_to`);
* the identity is a convolution with 1 at [i, i mod (C / groups), centre] (`identity_kernel`);
* convolution is linear: kernels of parallel branches add up (`Kernel.__add__`).

A block that can be fused derives from `FusableBlock` and says its kernel; `fuse` does the rest.

Dead channels. Where what a BatchNorm reads is one constant c over all data, var is 0 and t reaches
gamma / sqrt(eps), 316 at eps 1e-5. The branch then gives the constant t*c + s whatever its kernel,
but the fused kernel holds t, and with one 8-bit scale for all of it every other weight rounds to
zero (Sheng et al., arXiv 1803.08607, saw it in depthwise layers). There `fuse` takes t = 0 and
s = beta + t*(c - mean), with the t from before, which is the same function on the data:

* identity: c is a channel of the input; only the kernel's centre goes, so no border is involved;
* 1x1, k x k: c is a channel of the convolution's output. A k x k window over a constant other
  than 0 gives less at the border, where it reads padding; var has seen that too, and is not 0.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CheckFailed, UsageError

__all__ = [
    "DEAD_DEVIATION",
    "DEAD_VARIANCE",
    "LAGGING_VARIANCE",
    "DeadChannels",
    "DeployBlock",
    "FusableBlock",
    "Fused",
    "FusedBlock",
    "Kernel",
    "cure_dead",
    "fold_bn",
    "fold_conv_bn",
    "fuse",
    "fuse_with_report",
    "fused_state",
    "graph_form",
    "hold_dead",
    "identity_kernel",
    "pad_to",
    "then_bn",
]  # fmt: skip

#: Largest relative error of a fused block that is rounding, by the dtype it is stored in.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

#: Without images a channel is dead where its BatchNorm's variance is at most this (PyTorch's usual
#: eps) and its output's deviation, which is gamma for a living one, at most that.
DEAD_VARIANCE = 1e-5
DEAD_DEVIATION = 1e-4
#: With images it is dead where they move it no more than that, if its variance is at most this:
#: averages lag behind a channel that died (of averaged weights by 3e-3, eight epochs of digits
#: later), and one that lives on a few images of the data is to be left alone.
LAGGING_VARIANCE = 1e-2


@dataclass(frozen=True)
class Kernel:
    """A convolution as numbers: weight (O, I / groups, k, k) and bias (O,), float64."""

    weight: Tensor
    bias: Tensor

    def __add__(self, other: Kernel) -> Kernel:
        """Return the kernel of two parallel branches whose outputs are added."""
        return Kernel(self.weight + other.weight, self.bias + other.bias)


def bn_scale_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (t, s), float64 (C,), with bn(x) = t*x + s in eval mode."""
    if bn.running_mean is None or bn.running_var is None:
        raise UsageError(
            "cannot fuse a BatchNorm without running statistics; build it with "
            "track_running_stats=True"
        )
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -scale * bn.running_mean.double()
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    return scale, shift


def fold_bn(weight: Tensor, bn: nn.BatchNorm2d) -> Kernel:
    """Return the kernel of a bias-free convolution (O, I / groups, k, k) followed by `bn`."""
    scale, shift = bn_scale_shift(bn)
    return Kernel(weight.double() * scale[:, None, None, None], shift)


def then_bn(kernel: Kernel, bn: nn.BatchNorm2d) -> Kernel:
    """Return the kernel of a convolution with bias followed by `bn`."""
    scale, shift = bn_scale_shift(bn)
    return Kernel(kernel.weight * scale[:, None, None, None], kernel.bias * scale + shift)


def fold_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Kernel:
    """Return the kernel of `bn(conv(x))`, with or without a bias in the convolution."""
    if conv.bias is None:
        return fold_bn(conv.weight, bn)
    return then_bn(Kernel(conv.weight.double(), conv.bias.double()), bn)


def identity_kernel(
    channels: int, *, groups: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the weight (C, C / groups, size, size) of a convolution that changes nothing.

    Its padding is size // 2, its stride 1, so `size` has to be odd.
    """
    if size % 2 == 0 or channels % groups:
        raise UsageError(
            f"no identity kernel of size {size} for {channels} channels in {groups} groups: "
            "the size must be odd and the groups must divide the channels"
        )
    per_group = channels // groups
    weight = torch.zeros(channels, per_group, size, size, dtype=torch.float64, device=device)
    index = torch.arange(channels, device=device)
    weight[index, index % per_group, size // 2, size // 2] = 1.0
    return weight


def pad_to(kernel: Kernel, size: int) -> Kernel:
    """Return the same map with a size x size window: zeros around the given one, centred."""
    margin = size - kernel.weight.shape[-1]
    if margin < 0 or margin % 2:
        raise UsageError(f"cannot centre a {kernel.weight.shape[-1]} window in one of {size}")
    return Kernel(F.pad(kernel.weight, [margin // 2] * 4), kernel.bias)


class FusableBlock(nn.Module, ABC):
    """A train-form block that equals one convolution (and what follows it) in eval mode."""

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Channels of the input (N, C, H, W)."""

    @abstractmethod
    def fused(self) -> DeployBlock:
        """Return the deploy form as a new module that shares no parameter with this one."""

    def kernel(self) -> Kernel:
        """Return the numbers of the convolution `conv` of the deploy form; gradients go through."""
        raise UsageError(
            f"{type(self).__name__} says no kernel(), which its deploy form is trained through; "
            "fuse the network and train that"
        )


class DeployBlock(nn.Sequential):
    """What a FusableBlock becomes: a convolution with bias, then what followed the branches."""


def make_conv(kernel: Kernel, *, like: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution with this kernel; all but weight and bias as in `like`."""
    conv = copy.deepcopy(like)
    channels_last = like.weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = kernel.weight.detach().to(like.weight.dtype).contiguous(memory_format=layout)
    conv.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    conv.bias = nn.Parameter(
        kernel.bias.detach().to(like.weight.dtype), requires_grad=like.weight.requires_grad
    )
    return conv


@dataclass(frozen=True, kw_only=True)
class FusedBlock:
    """One block's certificate: max |deploy - train| / max |train| on random input.

    `max_relative_error` is None where there was nothing to compute with (meta device).
    """

    name: str
    max_relative_error: float | None


@dataclass(frozen=True, kw_only=True)
class DeadChannels:
    """Channels of one branch that carry nothing, and what was made of them.

    `branch` is the name of their BatchNorm in the model. `largest_scale` is the largest weight
    |gamma| / sqrt(var + eps) that BatchNorm gives one of them in the fused kernel, where it is
    `is_cured` avoided. `largest_deviation` is how far the output of one is from the constant that
    took its place: one standard deviation by BatchNorm's statistics or, with images, the most that
    was seen on them. `constants` are what BatchNorm reads in the channels.
    """

    branch: str
    channels: tuple[int, ...]
    constants: tuple[float, ...]
    largest_scale: float
    largest_deviation: float
    is_cured: bool

    def __str__(self) -> str:
        """Return it as a sentence."""
        some = ", ".join(map(str, self.channels[:4])) + (", ..." if len(self.channels) > 4 else "")
        what = f"dead channel{'s' * (len(self.channels) > 1)} {some} of {self.branch}"
        if self.is_cured:
            return f"{what}: constant moved into the bias, scale {self.largest_scale:.3g} avoided"
        return (
            f"{what}: left as they are, scale {self.largest_scale:.3g}, since these images move "
            f"them by {self.largest_deviation:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A deploy-form model with the certificate of every block that was fused in it.

    `dead` names the branches with dead channels, in the order of their blocks.
    """

    model: nn.Module
    blocks: tuple[FusedBlock, ...]
    dead: tuple[DeadChannels, ...] = ()

    @property
    def max_relative_error(self) -> float | None:
        """The worst block's error, None if none was measured."""
        errors = [b.max_relative_error for b in self.blocks if b.max_relative_error is not None]
        return max(errors, default=None)

    @property
    def said(self) -> tuple[str, ...]:
        """What was done about dead channels: the four largest scales, the others counted."""
        rows = sorted(self.dead, key=lambda row: -row.largest_scale)
        others = sum(len(row.channels) for row in rows[4:])
        more = (f"{others} dead channels of {len(rows) - 4} more branches",) if others else ()
        return (*map(str, rows[:4]), *more)


def graph_form(model: nn.Module) -> str:
    """Return "train" while a block can still be fused, else "deploy"."""
    return "train" if any(isinstance(m, FusableBlock) for m in model.modules()) else "deploy"


@dataclass(frozen=True)
class _Dead:
    """Channels of one BatchNorm with the constant that each reads, float64 (channels,)."""

    channels: Tensor
    constants: Tensor


def _batch_norms(block: nn.Module) -> Iterator[tuple[str, nn.BatchNorm2d]]:
    """Yield the BatchNorms with statistics that can be read, by their name in the block."""
    for name, module in block.named_modules():
        variance = module.running_var if isinstance(module, nn.BatchNorm2d) else None
        if isinstance(module, nn.BatchNorm2d) and variance is not None and not variance.is_meta:
            yield name, module


@dataclass(frozen=True)
class _Suspects:
    """Channels of one BatchNorm that may be dead, and what its statistics say of each, float64."""

    channels: Tensor
    scales: Tensor
    means: Tensor
    deviations: Tensor
    are_dead: Tensor

    @classmethod
    def of(cls, bn: nn.BatchNorm2d) -> _Suspects:
        """Look at the variances; scales of at most 1 are no danger."""
        assert bn.running_mean is not None and bn.running_var is not None
        variance = bn.running_var.double()
        scale = bn_scale_shift(bn)[0].abs()
        deviation = scale * variance.clamp_min(0).sqrt()
        channels = ((variance >= 0) & (variance <= LAGGING_VARIANCE) & (scale > 1)).nonzero()[:, 0]
        return cls(
            channels,
            scale[channels],
            bn.running_mean.double()[channels],
            deviation[channels],
            (variance <= DEAD_VARIANCE)[channels] & (deviation <= DEAD_DEVIATION)[channels],
        )


_Ranges = dict[nn.BatchNorm2d, tuple[Tensor, Tensor]]


def _ranges(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    suspects: Mapping[nn.BatchNorm2d, _Suspects],
) -> _Ranges:
    """Return the lowest and highest value that BatchNorms of `model` read in suspect channels."""
    found: _Ranges = {}

    def look(bn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(bn, nn.BatchNorm2d)
        read = inputs[0][:, suspects[bn].channels].double()
        low, high = read.amin((0, 2, 3)), read.amax((0, 2, 3))
        if bn in found:
            low, high = low.minimum(found[bn][0]), high.maximum(found[bn][1])
        found[bn] = low, high

    handles = [bn.register_forward_pre_hook(look) for bn in suspects]
    first = next(model.parameters())
    for batch in [images] if isinstance(images, Tensor) else images:
        model(batch.to(first.device, first.dtype))
    for handle in handles:
        handle.remove()
    if not found:
        raise UsageError(
            "there are no images to see dead channels on; give some hundred of the data, or None"
        )
    return found


@torch.no_grad()
def _find_dead(
    model: nn.Module, images: Tensor | Iterable[Tensor] | None
) -> tuple[dict[nn.BatchNorm2d, _Dead], list[DeadChannels]]:
    """Return what is to be cured in the blocks of `model` (eval mode), and the report."""
    branches = {
        bn: f"{name}.{part}".strip(".")
        for name, block in model.named_modules()
        if isinstance(block, FusableBlock)
        for part, bn in _batch_norms(block)
    }
    suspects = {bn: _Suspects.of(bn) for bn in branches}
    suspects = {
        bn: found
        for bn, found in suspects.items()
        if (found.are_dead.any() if images is None else len(found.channels))
    }
    seen = _ranges(model, images, suspects) if suspects and images is not None else {}
    cured: dict[nn.BatchNorm2d, _Dead] = {}
    report = []
    for bn, found in suspects.items():
        constants, deviations, is_cured = found.means, found.deviations, found.are_dead
        if bn in seen:
            low, high = seen[bn]
            constants, deviations = (low + high) / 2, found.scales * (high - low) / 2
            is_cured = deviations <= DEAD_DEVIATION
        if is_cured.any():
            cured[bn] = _Dead(found.channels[is_cured].cpu(), constants[is_cured].cpu())
        for some, flag in ((is_cured, True), (found.are_dead & ~is_cured, False)):
            if some.any():
                report.append(
                    DeadChannels(
                        branch=branches[bn],
                        channels=tuple(found.channels[some].tolist()),
                        constants=tuple(constants[some].tolist()),
                        largest_scale=float(found.scales[some].max()),
                        largest_deviation=float(deviations[some].max()),
                        is_cured=flag,
                    )
                )
    return cured, report


@torch.no_grad()
def _cure(bn: nn.BatchNorm2d, dead: _Dead) -> None:
    """Have `bn` give, in its dead channels, what it gives for their constant: t = 0, s = that."""
    scale, shift = bn_scale_shift(bn)
    weight = torch.ones_like(scale) if bn.weight is None else bn.weight.double()
    bias = torch.zeros_like(scale) if bn.bias is None else bn.bias.double()
    bias[dead.channels] = scale[dead.channels] * dead.constants.to(scale) + shift[dead.channels]
    weight[dead.channels] = 0.0
    assert bn.running_var is not None
    dtype = bn.running_var.dtype
    bn.weight, bn.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(bias.to(dtype))


def hold_dead(model: nn.Module, dead: Iterable[DeadChannels]) -> nn.Module:
    """Return a copy of a train-form model whose cured channels stay as they are on the data.

    What `fuse_with_report(model)` made equals it on any images, on noise too; `dead` is its report.
    """
    twin = copy.deepcopy(model).eval()
    for branch, channels in _cured(twin, dead):
        _hold(branch, channels)
    return twin


def cure_dead(model: nn.Module, dead: Iterable[DeadChannels]) -> nn.Module:
    """Return a copy of a train-form model whose BatchNorms are those that were fused.

    Its cured channels have the weight 0 and their constant in the bias. What
    `fuse_with_report(model)` made equals it on any images; `dead` is its report.
    """
    twin = copy.deepcopy(model)
    for branch, channels in _cured(twin, dead):
        _cure(branch, channels)
    return twin


def _cured(
    model: nn.Module, dead: Iterable[DeadChannels]
) -> Iterator[tuple[nn.BatchNorm2d, _Dead]]:
    """Yield the BatchNorms of `model` that a report has cured channels of, with these."""
    for row in dead:
        branch = model.get_submodule(row.branch)
        assert isinstance(branch, nn.BatchNorm2d)
        if row.is_cured:
            constants = torch.tensor(row.constants, dtype=torch.float64)
            yield branch, _Dead(torch.tensor(row.channels), constants)


def _hold(bn: nn.BatchNorm2d, dead: _Dead) -> None:
    """Have `bn` read its dead channels as they are on data, whatever it is given."""

    def hold(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0].clone()
        x[:, dead.channels] = dead.constants.to(x)[:, None, None]
        return x

    bn.register_forward_pre_hook(hold)


def _relative_error(block: FusableBlock, deploy: DeployBlock) -> float:
    """Compare both forms in float64 on the CPU: the stored rounding counts, the backend not."""
    reference = copy.deepcopy(block).to("cpu", torch.float64).eval()
    candidate = copy.deepcopy(deploy).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    # odd and unequal sides: a kernel that is off centre or transposed shows
    images = torch.randn(
        2, block.in_channels, 7, 9, generator=generator, dtype=torch.float64, device="cpu"
    )
    expected = reference(images.clone())
    difference = (candidate(images.clone()) - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


@torch.no_grad()
def _fuse_block(
    block: FusableBlock, name: str, dead: Mapping[nn.BatchNorm2d, _Dead]
) -> tuple[DeployBlock, FusedBlock]:
    """Fuse a block, which may be changed; its dead channels are compared as data has them."""
    reference = copy.deepcopy(block)
    for part, bn in _batch_norms(block):
        if bn in dead:
            held = reference.get_submodule(part)
            assert isinstance(held, nn.BatchNorm2d)
            _hold(held, dead[bn])
            _cure(bn, dead[bn])
    deploy = block.fused().eval()
    weight = next(deploy.parameters())
    if weight.is_meta:
        return deploy, FusedBlock(name=name, max_relative_error=None)
    finite = all(bool(parameter.isfinite().all()) for parameter in deploy.parameters())
    error = _relative_error(reference, deploy) if finite else float("nan")
    tolerance = TOLERANCE[weight.dtype]
    if not error <= tolerance:
        raise CheckFailed(
            f"fusing {name or 'the model'} changed its output by {error:.1e} (relative), more "
            f"than {tolerance:.0e} for {weight.dtype}; look for NaN or huge BatchNorm statistics"
        )
    return deploy, FusedBlock(name=name, max_relative_error=error)


def fuse_with_report(
    model: nn.Module, *, cure: bool = True, images: Tensor | Iterable[Tensor] | None = None
) -> Fused:
    """Fuse as `fuse` does; return the model with every block's error and its dead channels."""
    blocks: list[FusedBlock] = []
    replaced: dict[int, DeployBlock] = {}

    def convert(module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, FusableBlock):
            if id(module) not in replaced:  # a block used twice stays one block
                replaced[id(module)], certificate = _fuse_block(module, name, dead)
                blocks.append(certificate)
            return replaced[id(module)]
        for key, child in module._modules.items():
            if child is not None:
                module._modules[key] = convert(child, f"{name}.{key}" if name else key)
        return module

    if graph_form(model) == "deploy":
        if any(isinstance(m, DeployBlock) for m in model.modules()):
            raise UsageError("this model is in deploy form already: it was fused before")
        raise UsageError(
            f"{type(model).__name__} has nothing to fuse: it contains no FusableBlock such as "
            "ConvBN"
        )
    twin = copy.deepcopy(model).eval()
    dead, report = _find_dead(twin, images) if cure else ({}, [])
    deploy = convert(twin, "")
    return Fused(model=deploy.eval(), blocks=tuple(blocks), dead=tuple(report))


def fuse(
    model: nn.Module, *, cure: bool = True, images: Tensor | Iterable[Tensor] | None = None
) -> nn.Module:
    """Return a new model in deploy form (eval mode); the argument is left untouched.

    Every `FusableBlock` at any depth, the root included, becomes one convolution of the same
    dtype on the same device, verified on random input: an error above `TOLERANCE` raises
    CheckFailed. A model that is fused already, or has no such block, is a UsageError.

    Branch channels that are dead (see the module) get the scale 0 in place of one of up to 316,
    and their constant goes into the bias: the same function on the data, and a kernel that 8 bits
    can hold. Without `images` BatchNorm's statistics say which are dead. `images` are some hundred
    of the data, preprocessed, (N, C, H, W) or batches of them, and prove it: the constant is the
    one seen on them, and a channel that they move is left as it is; they run only where a channel
    is suspect. `cure=False` leaves all as they are; `fuse_with_report(...).dead` tells all.
    """
    return fuse_with_report(model, cure=cure, images=images).model


def fused_state(model: nn.Module, deploy: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of the deploy form as functions of the train form's.

    For `torch.func.functional_call(deploy, ...)`: what is computed has gradients with respect to
    the parameters of `model`, by the BatchNorm statistics that it has. `deploy` is what
    `fuse(model)` made and may lie on the meta device: its names and dtypes count, not its numbers.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in deploy.named_modules():
        block = model.get_submodule(name) if isinstance(module, DeployBlock) else None
        if isinstance(block, FusableBlock):
            kernel, conv = block.kernel(), f"{name}.conv".removeprefix(".")
            state |= {f"{conv}.weight": kernel.weight, f"{conv}.bias": kernel.bias}
    wanted = {**dict(deploy.named_parameters()), **dict(deploy.named_buffers())}
    return {name: state[name].to(value.dtype) for name, value in wanted.items()}
