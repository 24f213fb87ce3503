r"""QARepVGG: Make RepVGG Greater Again, a Quantization-aware Approach (Chu et al.).

arXiv 2212.01593, AAAI 2024. RepVGG whose BatchNorms are placed so that the fused weights and the
activations keep a range that INT8 can represent::

        RepVGG                            QARepVGG                       deploy form
          x                                  x                                x
    ┌─────┼─────┐                     ┌──────┼──────┐                         │
  3x3/s 1x1/s identity              3x3/s  1x1/s  identity                 3x3/s with bias
   BN    BN    BN                    BN      │      │                         │
    └─────+─────┘                     └──────+──────┘                       ReLU
        ReLU                              BN ReLU

    inner: K = t3*K3 + pad(K1) + I, b = s3            t, s: scale and shift of a BatchNorm
    deploy: K' = t*K, b' = t*b + s                    (t3, s3 of the 3x3 branch's)

The steps M2 to M4 of the paper's section "QARepVGG": no BatchNorm on identity and 1x1, one more
behind the sum; `QARepVGGBlockV2` of the official repository (cxxgtxy/QARepVGG), its default. M1 is
ordinary weight decay in place of RepVGG's custom one. Depths, widths and groups are RepVGG's.

Differs from the paper in: nothing in eval mode. The repository's D2se is left out: its trained
block gates before the last BatchNorm and its deployed block behind it, which are two functions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import repvgg
from .classifier import ImageClassifier
from .fuse import (
    DeployBlock,
    FusableBlock,
    Kernel,
    identity_kernel,
    make_conv,
    pad_to,
    then_bn,
)
from .layers import ConvBN, relu
from .repvgg import create_body

__all__ = ["KEY_LAYOUTS", "QARepVGG", "QARepVGGBlock"]

#: Regular expressions that turn a public state dict's keys into ours, by layout; the official code
#: is a fork of RepVGG's.
KEY_LAYOUTS = {"official": repvgg.KEY_LAYOUTS["official"]}


class QARepVGGBlock(FusableBlock):
    """One layer in train form, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.branch_3x3 = ConvBN(
            in_channels, out_channels, 3, stride=stride, groups=groups, act=None
        )
        self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)
        self.keeps_shape = in_channels == out_channels and stride == 1
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = relu()

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.branch_1x1.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(BN(BN(3x3) + 1x1 + identity))."""
        y: Tensor = self.branch_3x3(x) + self.branch_1x1(x)
        if self.keeps_shape:
            y = y + x
        activated: Tensor = self.act(self.bn(y))
        return activated

    def kernel(self) -> Kernel:
        """Return the sum of the branches and the BatchNorm behind it as one 3x3 kernel."""
        conv = self.branch_1x1
        no_bias = torch.zeros(conv.out_channels, dtype=torch.float64, device=conv.weight.device)
        inner = self.branch_3x3.kernel() + pad_to(Kernel(conv.weight.double(), no_bias), 3)
        if self.keeps_shape:
            identity = identity_kernel(
                conv.in_channels, groups=conv.groups, size=3, device=conv.weight.device
            )
            inner = inner + Kernel(identity, no_bias)
        return then_bn(inner, self.bn)

    def fused(self) -> DeployBlock:
        """Return convolution, ReLU."""
        conv = make_conv(self.kernel(), like=self.branch_3x3.conv)
        return DeployBlock(OrderedDict(conv=conv, act=relu()))


class QARepVGG(ImageClassifier):
    """RepVGG's network of these blocks: a stem and four stages, each opening with stride 2."""

    def __init__(
        self,
        *,
        depths: Sequence[int],
        stem_width: int,
        widths: Sequence[int],
        groups: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem, stages, feature_info = create_body(
            QARepVGGBlock,
            in_chans,
            depths=depths,
            stem_width=stem_width,
            widths=widths,
            groups=groups,
        )
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
