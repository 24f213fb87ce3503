r"""DenseNet: Densely Connected Convolutional Networks (Huang et al., arXiv 1608.06993, CVPR 2017).

Every layer reads the maps of all layers before it in its block, and adds k maps (DenseNet-BC)::

         x (C channels)
      ┌──┴───────────────┐
      │            BN ReLU 1x1 -> 4k        order BN-ReLU-conv: a 1x1 and the BN behind it fold
      │            BN ReLU 3x3 -> k         into one convolution; the BN in front of the 1x1
      └──── concat ──────┘                  reads a concatenation and stays (deploy form)
         (C + k channels)

Section 3 and Table 1: a 7x7/2 stem of 2k channels, a 3x3/2 max-pool, dense blocks, between two of
them a transition BN-ReLU-1x1-average-pool that halves channels and size (compression 0.5), behind
the last one BN-ReLU. A block of L layers is written here as L modules x -> concat(x, new(x)).
Initialisation as in the paper's section 4.2 (He et al., arXiv 1502.01852). The table of variants is
in densenet_specs.py.

Differs from the paper in: nothing. timm's and torchvision's networks are equal to this one; their
feature map of the last stage is, as here, the one behind the last BN-ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, relu

__all__ = ["KEY_LAYOUTS", "DenseLayer", "DenseNet", "NormReLU", "Transition"]

_LAYER = (
    (r"\.norm1\.", r".pre.bn."),
    (r"\.conv1\.", r".bottleneck.conv."),
    (r"\.norm2\.", r".bottleneck.bn."),
    (r"\.conv2\.", r".conv."),
)
_TORCHVISION = (
    (r"^features\.", r""),
    (r"^conv0\.", r"stem.conv."),
    (r"^norm0\.", r"stem.bn."),
    (r"^norm5\.", r"final.bn."),
    (r"^classifier\.", r"head.fc."),
    (r"^transition(\d)\.", lambda match: f"stages.{match[1]}.0."),
    (
        r"^denseblock(\d)\.denselayer(\d+)\.",
        lambda match: f"stages.{int(match[1]) - 1}.{match[2]}.",
    ),
    (r"\.norm\.(?=[^12])", r".pre.bn."),
    (r"\.(norm|conv)\.([12])\.", r".\1\2."),  # torchvision's files of 2017
    *_LAYER,
)

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "torchvision": _TORCHVISION,
    "timm": _TORCHVISION,
    "openmmlab": (
        (r"^backbone\.", r""),
        (r"^stem\.0\.", r"stem.conv."),
        (r"^stem\.1\.", r"stem.bn."),
        (r"^transitions\.(\d)\.norm\.", lambda match: f"stages.{int(match[1]) + 1}.0.pre.bn."),
        (r"^transitions\.(\d)\.conv\.", lambda match: f"stages.{int(match[1]) + 1}.0.conv."),
        (r"^transitions\.\d\.0\.", r"final.bn."),
        (r"^stages\.(\d)\.block\.(\d+)\.", lambda match: f"stages.{match[1]}.{int(match[2]) + 1}."),
        *_LAYER,
    ),
    "pytorchcv": (
        (r"^features\.init_block\.", r"stem."),
        (r"^features\.post_activ\.", r"final."),
        (r"^output\.", r"head.fc."),
        (r"^features\.stage(\d)\.trans\d\.conv\.bn\.", r"features.stage\1.unit0.pre.bn."),
        (r"^features\.stage(\d)\.trans\d\.conv\.conv\.", r"features.stage\1.unit0.conv."),
        (r"\.conv1\.bn\.", r".pre.bn."),
        (r"\.conv1\.conv\.", r".bottleneck.conv."),
        (r"\.conv2\.bn\.", r".bottleneck.bn."),
        (r"\.conv2\.conv\.", r".conv."),
        (
            r"^features\.stage(\d)\.unit(\d+)\.",
            lambda match: f"stages.{int(match[1]) - 1}.{match[2]}.",
        ),
    ),
}


class NormReLU(nn.Module):
    """ReLU(BN(x)), (N, C, H, W) -> the same; no convolution precedes it that it could fold into."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(BN(x))."""
        y: Tensor = self.act(self.bn(x))
        return y


class DenseLayer(nn.Module):
    """Append `growth` maps to those given, (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.pre = NormReLU(in_channels)
        self.bottleneck = ConvBN(in_channels, 4 * growth, 1)
        self.conv = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return concat(x, conv(bottleneck(pre(x))))."""
        return torch.cat([x, self.conv(self.bottleneck(self.pre(x)))], dim=1)


class Transition(nn.Module):
    """Halve size and channels between two blocks, (N, C, H, W) -> (N, C_out, H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pre = NormReLU(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the average-pooled 1x1 convolution of ReLU(BN(x))."""
        y: Tensor = self.pool(self.conv(self.pre(x)))
        return y


class DenseNet(ImageClassifier):
    """The network of Table 1; a stage is the layer that halves the size and a dense block."""

    def __init__(
        self,
        *,
        growth: int,
        depths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        channels = 2 * growth
        stem = ConvBN(in_chans, channels, 7, stride=2)
        feature_info = [{"num_chs": channels, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        for index, depth in enumerate(depths):
            stage = nn.Sequential()
            if index == 0:
                stage.append(nn.MaxPool2d(3, stride=2, padding=1))
            else:
                stage.append(Transition(channels, channels // 2))
                channels //= 2
            for _ in range(depth):
                stage.append(DenseLayer(channels, growth))
                channels += growth
            stages.append(stage)
            last = index == len(depths) - 1
            feature_info.append(
                {
                    "num_chs": channels,
                    "reduction": 4 * 2**index,
                    "module": "final" if last else f"stages.{index}",
                }
            )
        super().__init__(
            stem=stem,
            stages=stages,
            final=NormReLU(channels),
            feature_info=feature_info,
            num_features=channels,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
