r"""PeleeNet: Pelee, A Real-Time Object Detection System on Mobile Devices.

Wang, Li, Ling; arXiv 1804.06882, NeurIPS 2018. A DenseNet without depthwise convolutions::

        stem block (Figure 2)               two-way dense layer (Figure 1)
                image                                   x
               3x3/2 32                      ┌──────────┼──────────┐
          ┌───────┴───────┐                  │       1x1 16b    1x1 16b
      max 2x2/2         1x1 16               │       3x3 16     3x3 16
          │            3x3/2 32              │          │       3x3 16
          └───concat──────┘                  └───────concat────────┘
               1x1 32                           x and 32 channels more

Section 2 of the paper, with the channels of the official code (Robert-JunWang/PeleeNet): four dense
stages of 3, 4, 8 and 6 layers, bottleneck factors b = 1, 2, 4, 4 (a bottleneck never wider than its
input), after each stage a 1x1 transition that keeps the channels, and between stages an average
pool 2x2/2. Post-activation throughout: convolution, BatchNorm, ReLU.

Differs from the paper in: nothing at sizes divisible by 32; at others the stem's max-pool rounds up
as the convolution beside it does (the official code fails there). Concatenation is in the official
repository's order, the pool first (pytorchcv has the convolution first).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN

__all__ = ["KEY_LAYOUTS", "PeleeNet"]

#: Regular expressions that turn a public state dict's keys into ours, by layout. pytorchcv's
#: weights need more than names: its stem concatenates in the other order.
KEY_LAYOUTS = {
    "official": (
        (r"^features\.stemblock\.stem1\.", r"stem."),
        (r"^features\.stemblock\.stem2a\.", r"stages.0.0.branch.0."),
        (r"^features\.stemblock\.stem2b\.", r"stages.0.0.branch.1."),
        (r"^features\.stemblock\.stem3\.", r"stages.0.0.merge."),
        (
            r"^features\.denseblock(\d)\.denselayer(\d)\.branch([12])([abc])\.",
            lambda match: (
                f"stages.{int(match[1]) - 1}.1.{int(match[2]) - 1}"
                f".branch{match[3]}.{'abc'.index(match[4])}."
            ),
        ),
        (r"^features\.transition(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.2."),
        (r"\.norm\.", r".bn."),
        (r"^classifier\.", r"head.fc."),
    ),
}


class StemBlock(nn.Module):
    """The stem behind its first convolution (Figure 2): (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # as the convolution beside it, the pool rounds up where the size is odd
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.branch = nn.Sequential(
            ConvBN(channels, channels // 2), ConvBN(channels // 2, channels, 3, stride=2)
        )
        self.merge = ConvBN(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map at half the size."""
        merged: Tensor = self.merge(torch.cat((self.pool(x), self.branch(x)), dim=1))
        return merged


class DenseLayer(nn.Module):
    """Two-way dense layer (Figure 1): (N, C, H, W) -> (N, C + growth, H, W), x in front."""

    def __init__(self, channels: int, growth: int, *, bottleneck: int) -> None:
        super().__init__()
        way = growth // 2
        hidden = way * bottleneck
        self.branch1 = nn.Sequential(ConvBN(channels, hidden), ConvBN(hidden, way, 3))
        self.branch2 = nn.Sequential(
            ConvBN(channels, hidden), ConvBN(hidden, way, 3), ConvBN(way, way, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and what the two ways make of it."""
        return torch.cat((x, self.branch1(x), self.branch2(x)), dim=1)


class PeleeNet(ImageClassifier):
    """Stem and four dense stages; a stage's feature map is its transition's, before the pool.

    `bottlenecks` are the factors b of the stages, in channels of one way (growth / 2).
    """

    def __init__(
        self,
        *,
        stem_width: int,
        growth: int,
        depths: Sequence[int],
        bottlenecks: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem = ConvBN(in_chans, stem_width, 3, stride=2)
        feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        channels = stem_width
        for index, (depth, bottleneck) in enumerate(zip(depths, bottlenecks, strict=True)):
            layers = nn.Sequential()
            for _ in range(depth):
                layers.append(DenseLayer(channels, growth, bottleneck=bottleneck))
                channels += growth
            entry = nn.AvgPool2d(2) if index else StemBlock(stem_width)
            stages.append(nn.Sequential(entry, layers, ConvBN(channels, channels)))
            feature_info.append(
                {"num_chs": channels, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            )
        super().__init__(
            stem=stem,
            stages=stages,
            feature_info=feature_info,
            num_features=channels,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
