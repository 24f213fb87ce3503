r"""GhostNet: More Features from Cheap Operations (Han et al., arXiv 1911.11907, CVPR 2020).

Half of a layer's channels are computed, the other half ("ghosts") made of them by a depthwise
convolution::

    Ghost module                                  bottleneck
    x ─ 1x1 ─ BN ─ [ReLU] ─┬───────────────┐        x ────────────────┐
                           │ C/2           │        Ghost, ReLU       │
                     3x3 depthwise         │        [k x k dw/2, BN]  identity, or
                     BN ─ [ReLU] ─ C/2 ─ concat     [SE]              k x k dw/s, BN, 1x1, BN
                                    (x first)       Ghost, linear     │
                                                    └─────── + ───────┘

Equation 3 and Figure 2 (ratio s = 2, kernel d = 3), Figure 3 (bottlenecks), Table 1 (network). The
depthwise convolution within the bottleneck is there at stride 2 only and has no activation; the
squeeze-and-excitation has a hard sigmoid. There is no activation behind the sum. In deploy form
every convolution has its BatchNorm in it but the stem's: the finest feature map, as timm gives it,
is the stem's convolution alone, so its BatchNorm opens stages.0 and stays (a runtime folds it).
The table of variants is in ghostnet_specs.py.

Differs from the paper in: nothing; where Table 1 leaves a choice it is the official repository's
(huawei-noah/Efficient-AI-Backbones, ghostnet_pytorch): kernel sizes, the widths rounded to 4, the
bias in place of BatchNorm in the 1280-channel layer behind the pooling, PyTorch's initialisation.
Dropout 0.2 there is `drop_rate`, 0 by default here.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier, NeckHead
from .fuse import DeployBlock, FusableBlock, Kernel
from .layers import Activation, ConvBN, SqueezeExcite, relu

__all__ = ["KEY_LAYOUTS", "GhostBottleneck", "GhostModule", "GhostNet"]

_OFFICIAL = (
    (r"^conv_stem\.", r"stem.conv."),
    (r"^bn1\.", r"stages.0.0.bn."),
    (r"^blocks\.9\.0\.conv\.", r"final.conv."),
    (r"^blocks\.9\.0\.bn1\.", r"final.bn."),
    (r"^blocks\.0\.0\.", r"stages.0.1."),
    (r"^blocks\.", r"stages."),
    (r"\.primary_conv\.0\.", r".primary.conv."),
    (r"\.primary_conv\.1\.", r".primary.bn."),
    (r"\.cheap_operation\.0\.", r".cheap.conv."),
    (r"\.cheap_operation\.1\.", r".cheap.bn."),
    (r"\.(conv|bn)_dw\.", r".dw.\1."),
    (r"\.se\.conv_reduce\.", r".se.fc1."),
    (r"\.se\.conv_expand\.", r".se.fc2."),
    (
        r"\.shortcut\.([0-3])\.",
        lambda match: f".shortcut.{int(match[1]) // 2}.{('conv', 'bn')[int(match[1]) % 2]}.",
    ),
    (r"^conv_head\.", r"head.neck.conv."),
    (r"^classifier\.", r"head.fc."),
)

#: Regular expressions that turn a public state dict's keys into ours, by layout; timm kept the
#: official repository's names.
KEY_LAYOUTS = {"timm": _OFFICIAL, "official": _OFFICIAL}


class StemConv(FusableBlock):
    """The stem's 3x3/2 convolution alone, (N, C_in, H, W) -> (N, C_out, H / 2, W / 2).

    In deploy form it is itself: there is nothing to fold, as its output is a feature map.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return self.conv.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution, without BatchNorm or activation."""
        y: Tensor = self.conv(x)
        return y

    def kernel(self) -> Kernel:
        """Return the convolution, which has no bias, as numbers."""
        weight = self.conv.weight.double()
        return Kernel(weight, weight.new_zeros(len(weight)))

    def fused(self) -> DeployBlock:
        """Return a copy of the convolution."""
        return DeployBlock(OrderedDict(conv=copy.deepcopy(self.conv)))


class GhostModule(nn.Module):
    """Primary channels and as many ghosts of them, (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, act: Activation | None) -> None:
        super().__init__()
        assert out_channels % 2 == 0, "every width of the table is a multiple of 4"
        half = out_channels // 2
        self.primary = ConvBN(in_channels, half, act=act)
        self.cheap = ConvBN(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Return [primary(x), cheap(primary(x))], the primary channels first."""
        primary = self.primary(x)
        return torch.cat((primary, self.cheap(primary)), 1)


class GhostBottleneck(nn.Module):
    """Ghost up, [depthwise], [SE], Ghost down, shortcut; (N, C_in, H, W) -> (N, C_out, H/s, W/s).

    `expanded` is the width in between, `squeezed` that of the squeeze-and-excitation, 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expanded: int,
        size: int,
        squeezed: int = 0,
        stride: int = 1,
    ) -> None:
        super().__init__()
        depthwise = partial(ConvBN, size=size, stride=stride, act=None)
        self.ghost1 = GhostModule(in_channels, expanded, act=relu)
        self.dw = depthwise(expanded, expanded, groups=expanded) if stride > 1 else None
        self.se = SqueezeExcite(expanded, squeezed, gate=nn.Hardsigmoid) if squeezed else None
        self.ghost2 = GhostModule(expanded, out_channels, act=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                depthwise(in_channels, in_channels, groups=in_channels),
                ConvBN(in_channels, out_channels, act=None),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return Ghost2(SE(dw(Ghost1(x)))) + shortcut(x)."""
        y: Tensor = self.ghost1(x)
        if self.dw is not None:
            y = self.dw(y)
        if self.se is not None:
            y = self.se(y)
        summed: Tensor = self.ghost2(y) + self.shortcut(x)
        return summed


class GhostNet(ImageClassifier):
    """The network of Table 1.

    `stages` lists the bottlenecks as (kernel size, expanded, out, squeezed, stride); a feature map
    is taken where a stage halves the resolution.
    """

    def __init__(
        self,
        *,
        stem_width: int,
        stages: Sequence[Sequence[tuple[int, int, int, int, int]]],
        final_width: int,
        head_width: int,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        stem_norm = nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(stem_width), act=relu()))
        blocks = nn.Sequential()
        channels, reduction = stem_width, 2
        for index, rows in enumerate(stages):
            stage = nn.Sequential(stem_norm) if index == 0 else nn.Sequential()
            stride_of_stage = 1
            for size, expanded, out_channels, squeezed, stride in rows:
                stage.append(
                    GhostBottleneck(
                        channels,
                        out_channels,
                        expanded=expanded,
                        size=size,
                        squeezed=squeezed,
                        stride=stride,
                    )
                )
                channels, stride_of_stage = out_channels, stride_of_stage * stride
            blocks.append(stage)
            if stride_of_stage > 1:
                reduction *= stride_of_stage
                feature_info.append(
                    {"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"}
                )
        neck = nn.Sequential(OrderedDict(conv=nn.Conv2d(final_width, head_width, 1), act=relu()))
        super().__init__(
            stem=StemConv(in_chans, stem_width),
            stages=blocks,
            final=ConvBN(channels, final_width),
            head=NeckHead(
                neck,
                hidden_size=head_width,
                num_classes=num_classes,
                global_pool=global_pool,
                drop_rate=drop_rate,
            ),
            feature_info=feature_info,
            num_features=final_width,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
