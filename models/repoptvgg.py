r"""RepOpt-VGG: Re-parameterizing Your Optimizers rather than Architectures (Ding et al.).

arXiv 2205.15242, ICLR 2023. A plain VGG body whose prior lives in the optimizer: RepVGG's branches
exist only on paper, as a block whose scales s, t are constants per output channel (CSLA, constant-
scale linear addition, section 3.2). A convolution that starts where that block would start and
whose gradient is multiplied by a constant moves exactly as that block would move::

        imaginary CSLA block                     what is trained
                 x                                      x
         ┌───────┼────────┐                             │
       3x3/s   1x1/s   identity                       3x3/s    start: s*K3 + pad(t*K1) + u*I
        * s     * t      * u                            │      gradient: * s^2; at the centre
         └───────+────────┘                            BN        * (s^2 + t^2), + 1 on the diagonal
                BN ReLU                               ReLU       of blocks with an identity

The identity branch exists where the block keeps shape; its u is trained. The body is RepVGG's: a
stem of min(64, 64a) channels and four stages that open with stride 2 (section 4.1); the table of
variants is in repoptvgg_specs.py, the optimizers are in recipes/rep_optimizer.py.

The scales come from a search (hyper-search, section 3.3): the same body of real blocks, in which s
and t are trained too (`branch_form`), on a small data set. Of it only the scales are kept.

Differs from the paper in: the identity starts at the u that was searched for, as in the official
code (the paper says 1). Weights drawn without a search start with the scales that it starts with.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import ImageClassifier
from .errors import UsageError
from .fuse import DeployBlock, FusableBlock, Kernel, fold_bn, identity_kernel
from .layers import ConvBN, relu
from .layouts import STAGES_0_TO_4
from .repvgg import create_body

__all__ = [
    "KEY_LAYOUTS",
    "BlockScales",
    "CSLABlock",
    "RepOptVGG",
    "branch_form",
    "prior_scales",
    "start_from",
    "target_form",
]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "official": (
        *STAGES_0_TO_4,
        (r"^linear\.", r"head.fc."),
    ),
}


@dataclass(frozen=True, kw_only=True)
class BlockScales:
    """The scales of one block, (C_out,) each: s of the 3x3, t of the 1x1, u of the identity.

    s and t stay what they are in training; u is where the identity starts, None without one.
    """

    scale_3x3: Tensor
    scale_1x1: Tensor
    identity: Tensor | None

    @classmethod
    def at_position(cls, position: int, *, layer: ConvBN) -> BlockScales:
        """Return what the search starts with in the `position`-th block of a stage.

        s = t = sqrt(2 / i), and 1 in the block that opens the stage; u = 1 (section 4.1).
        """
        value = (2.0 / position) ** 0.5 if position else 1.0
        weight = layer.conv.weight
        channels = weight.shape[0]
        ones = torch.ones(channels, dtype=weight.dtype, device=weight.device)
        return cls(
            scale_3x3=value * ones,
            scale_1x1=value * ones,
            identity=ones if keeps_shape(layer) else None,
        )


def keeps_shape(layer: ConvBN) -> bool:
    """Return whether the block in a layer's place has an identity branch."""
    return layer.conv.in_channels == layer.conv.out_channels and layer.conv.stride == (1, 1)


@torch.no_grad()
def start_as_block(layer: ConvBN, scales: BlockScales) -> None:
    """Give a new 3x3 layer the kernel s*K3 + pad(t*K1) + u*I of the block in its place.

    K3 is what the layer has, K1 is drawn as PyTorch draws any convolution (the paper's rule of
    initialization). Without the identity the deep stages hardly start to learn.
    """
    conv, weight = layer.conv, layer.conv.weight
    pointwise = nn.Conv2d(
        conv.in_channels, conv.out_channels, 1, bias=False, device=weight.device, dtype=weight.dtype
    )
    weight.mul_(_as_map(scales.scale_3x3, weight))
    weight.add_(F.pad(pointwise.weight * _as_map(scales.scale_1x1, weight), (1, 1, 1, 1)))
    if scales.identity is not None:
        weight[:, :, 1, 1].diagonal().add_(scales.identity.to(weight))


def _as_map(scale: Tensor, weight: Tensor) -> Tensor:
    """Return (C_out,) as (C_out, 1, 1, 1), of the weight's type and device."""
    return scale.to(weight).view(-1, 1, 1, 1)


class CSLABlock(FusableBlock):
    """ReLU(BN(s (K3 * x) + t (K1 * x) + u x)), (N, C_in, H, W) -> (N, C_out, H / s, W / s).

    The block that is imaginary in the target network, made real to search for its scales or to
    compare with. K3, K1 and u are trained, s and t only with `trained_scales`; u has the shape
    (C, 1, 1), which makes weight decay take it for a kernel, as in the official search: the 1-D
    s and t are not decayed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        scales: BlockScales,
        trained_scales: bool,
    ) -> None:
        super().__init__()
        self.branch_3x3 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.scale_3x3 = nn.Parameter(scales.scale_3x3.clone(), requires_grad=trained_scales)
        self.scale_1x1 = nn.Parameter(scales.scale_1x1.clone(), requires_grad=trained_scales)
        u = scales.identity
        self.identity = None if u is None else nn.Parameter(u.clone().view(-1, 1, 1))
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = relu()

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.branch_3x3.in_channels

    @property
    def scales(self) -> BlockScales:
        """What the scales are now, as copies."""
        return BlockScales(
            scale_3x3=self.scale_3x3.detach().clone(),
            scale_1x1=self.scale_1x1.detach().clone(),
            identity=None if self.identity is None else self.identity.detach().flatten().clone(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(BN(sum of the scaled branches))."""
        y: Tensor = self.branch_3x3(x) * self.scale_3x3.view(-1, 1, 1)
        y = y + self.branch_1x1(x) * self.scale_1x1.view(-1, 1, 1)
        if self.identity is not None:
            y = y + x * self.identity
        activated: Tensor = self.act(self.bn(y))
        return activated

    @torch.no_grad()
    def target(self) -> ConvBN:
        """Return the one convolution that does the same now, with a copy of the BatchNorm."""
        conv, scales = self.branch_3x3, self.scales
        layer = ConvBN(conv.in_channels, conv.out_channels, 3, stride=conv.stride[0])
        layer.to(conv.weight)
        kernel = conv.weight * _as_map(scales.scale_3x3, conv.weight)
        kernel += F.pad(
            self.branch_1x1.weight * _as_map(scales.scale_1x1, conv.weight), (1, 1, 1, 1)
        )
        if scales.identity is not None:
            kernel[:, :, 1, 1].diagonal().add_(scales.identity)
        layer.conv.weight.copy_(kernel)
        layer.bn = copy.deepcopy(self.bn)
        return layer.train(self.training)

    def kernel(self) -> Kernel:
        """Return the sum of the scaled branches and the BatchNorm behind it as one 3x3 kernel."""
        conv = self.branch_3x3
        weight = conv.weight.double()
        weight = weight * _as_map(self.scale_3x3, weight)
        pointwise = self.branch_1x1.weight.double() * _as_map(self.scale_1x1, weight)
        weight = weight + F.pad(pointwise, (1, 1, 1, 1))
        if self.identity is not None:
            plain = identity_kernel(conv.in_channels, groups=1, size=3, device=weight.device)
            weight = weight + plain * _as_map(self.identity, weight)
        return fold_bn(weight, self.bn)

    def fused(self) -> DeployBlock:
        """Return convolution, ReLU."""
        conv, act = self.target().fused()
        return DeployBlock(OrderedDict(conv=conv, act=act))


class RepOptVGG(ImageClassifier):
    """The target model: every layer is 3x3 convolution, BatchNorm, ReLU."""

    def __init__(
        self,
        *,
        depths: Sequence[int],
        stem_width: int,
        widths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem, stages, feature_info = create_body(
            partial(ConvBN, size=3), in_chans, depths=depths, stem_width=stem_width, widths=widths
        )
        for _, position, layer in _layers(stem, stages):
            assert isinstance(layer, ConvBN)
            start_as_block(layer, BlockScales.at_position(position, layer=layer))
        super().__init__(
            stem=stem,
            stages=stages,
            feature_info=feature_info,
            num_features=widths[-1],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    def layers(self) -> Iterator[tuple[str, int, nn.Module]]:
        """Yield every layer of the body: its name, its position in its stage, the module."""
        yield from _layers(self.stem, self.stages)


def _layers(stem: nn.Module, stages: nn.Sequential) -> Iterator[tuple[str, int, nn.Module]]:
    yield "stem", 0, stem
    for index, stage in enumerate(stages):
        assert isinstance(stage, nn.Sequential)
        for position, layer in enumerate(stage):
            yield f"stages.{index}.{position}", position, layer


def prior_scales(model: RepOptVGG) -> dict[str, BlockScales]:
    """Return the scales that the search starts with, by the name of the layer."""
    return {
        name: BlockScales.at_position(position, layer=layer)
        for name, position, layer in model.layers()
        if isinstance(layer, ConvBN)
    }


def check_scales(model: RepOptVGG, scales: Mapping[str, BlockScales], *, origin: str) -> None:
    """Refuse scales that are not one finite set per layer, of its channels, with a UsageError.

    `origin` is what the error calls them, such as the file.
    """
    layers = {name: layer for name, _, layer in model.layers() if isinstance(layer, ConvBN)}
    if missing := _first(name for name in layers if name not in scales):
        raise UsageError(f"{origin} has no scales of the layer {missing}; search with this model")
    if unknown := _first(name for name in scales if name not in layers):
        raise UsageError(
            f"{origin} has scales of a layer {unknown}, which this model has not; search with it"
        )
    for name, layer in layers.items():
        given, channels = scales[name], layer.conv.out_channels
        if keeps_shape(layer) != (given.identity is not None):
            have = "has an" if keeps_shape(layer) else "has no"
            raise UsageError(f"{origin} is of another network: the block at {name} {have} identity")
        for tensor in (given.scale_3x3, given.scale_1x1, given.identity):
            if tensor is not None and tensor.shape != (channels,):
                raise UsageError(
                    f"{origin} has scales of shape {tuple(tensor.shape)} for the {channels} "
                    f"channels of {name}; search with this model"
                )
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise UsageError(
                    f"{origin} has scales at {name} that are no finite numbers: that search "
                    "diverged; repeat it with a lower rate"
                )


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)


def start_from(model: RepOptVGG, scales: Mapping[str, BlockScales]) -> None:
    """Draw the body's convolutions anew, as the blocks with these scales start.

    Scales that do not fit are a UsageError.
    """
    check_scales(model, scales, origin="what was given")
    for name, _, layer in model.layers():
        assert isinstance(layer, ConvBN)
        layer.conv.reset_parameters()
        start_as_block(layer, scales[name])


def branch_form(
    model: RepOptVGG,
    *,
    scales: Mapping[str, BlockScales] | None = None,
    trained_scales: bool,
) -> RepOptVGG:
    """Return a copy whose body is of real, newly drawn blocks in place of the 3x3 layers.

    With `trained_scales` it is the network of the search. `scales` are those it begins with; the
    default is `prior_scales`.
    """
    given = prior_scales(model) if scales is None else scales
    check_scales(model, given, origin="what was given")

    def block(name: str, layer: ConvBN) -> nn.Module:
        conv = layer.conv
        made = CSLABlock(
            conv.in_channels,
            conv.out_channels,
            stride=conv.stride[0],
            scales=given[name],
            trained_scales=trained_scales,
        )
        return made.to(conv.weight).train(layer.training)

    return _with_layers(
        model,
        {name: block(name, at) for name, _, at in model.layers() if isinstance(at, ConvBN)},
    )


def target_form(model: RepOptVGG) -> RepOptVGG:
    """Return a copy whose blocks are the 3x3 layers that do the same now."""
    return _with_layers(
        model,
        {name: at.target() for name, _, at in model.layers() if isinstance(at, CSLABlock)},
    )


def _with_layers(model: RepOptVGG, layers: Mapping[str, nn.Module]) -> RepOptVGG:
    """Return a copy of a model with these layers of the body in place of its own."""
    changed = copy.deepcopy(model)
    for name, layer in layers.items():
        changed.set_submodule(name, layer)
    return changed
