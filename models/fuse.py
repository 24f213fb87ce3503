"""Structural reparameterization: a block with several branches becomes one convolution.

The algebra (RepVGG, arXiv 2101.03697, section 3.3), all of it in float64:

* BatchNorm in eval mode is y = t*x + s with t = gamma / sqrt(var + eps), s = beta - t*mean,
  so conv + BN is a convolution with kernel t*W and bias s (`fold_bn`);
* a 1x1 kernel is a kxk kernel that is zero but for its centre (`pad_to`);
* the identity is a convolution with 1 at [i, i mod (C / groups), centre] (`identity_kernel`);
* convolution is linear: kernels of parallel branches add up (`Kernel.__add__`).

A block that can be fused derives from `FusableBlock` and says its kernel; `fuse` does the rest.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CheckFailed, UsageError

__all__ = [
    "DeployBlock",
    "FusableBlock",
    "Fused",
    "FusedBlock",
    "Kernel",
    "fold_bn",
    "fold_conv_bn",
    "fuse",
    "fuse_with_report",
    "graph_form",
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
class Fused:
    """A deploy-form model with the certificate of every block that was fused in it."""

    model: nn.Module
    blocks: tuple[FusedBlock, ...]

    @property
    def max_relative_error(self) -> float | None:
        """The worst block's error, None if none was measured."""
        errors = [b.max_relative_error for b in self.blocks if b.max_relative_error is not None]
        return max(errors, default=None)


def graph_form(model: nn.Module) -> str:
    """Return "train" while a block can still be fused, else "deploy"."""
    return "train" if any(isinstance(m, FusableBlock) for m in model.modules()) else "deploy"


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
def _fuse_block(block: FusableBlock, name: str) -> tuple[DeployBlock, FusedBlock]:
    deploy = block.fused().eval()
    weight = next(deploy.parameters())
    if weight.is_meta:
        return deploy, FusedBlock(name=name, max_relative_error=None)
    finite = all(bool(parameter.isfinite().all()) for parameter in deploy.parameters())
    error = _relative_error(block, deploy) if finite else float("nan")
    tolerance = TOLERANCE[weight.dtype]
    if not error <= tolerance:
        raise CheckFailed(
            f"fusing {name or 'the model'} changed its output by {error:.1e} (relative), more "
            f"than {tolerance:.0e} for {weight.dtype}; look for NaN or huge BatchNorm statistics"
        )
    return deploy, FusedBlock(name=name, max_relative_error=error)


def fuse_with_report(model: nn.Module) -> Fused:
    """Fuse as `fuse` does and return the model with every block's measured error."""
    blocks: list[FusedBlock] = []
    replaced: dict[int, DeployBlock] = {}

    def convert(module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, FusableBlock):
            if id(module) not in replaced:  # a block used twice stays one block
                replaced[id(module)], certificate = _fuse_block(module, name)
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
    deploy = convert(copy.deepcopy(model), "")
    return Fused(model=deploy.eval(), blocks=tuple(blocks))


def fuse(model: nn.Module) -> nn.Module:
    """Return a new model in deploy form (eval mode); the argument is left untouched.

    Every `FusableBlock` at any depth, the root included, becomes one convolution of the same
    dtype on the same device, verified on random input: an error above `TOLERANCE` raises
    CheckFailed. A model that is fused already, or has no such block, is a UsageError.
    """
    return fuse_with_report(model).model
