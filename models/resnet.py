r"""ResNet: Deep Residual Learning for Image Recognition (He et al., arXiv 1512.03385, CVPR 2016).

A block learns what is to be added to its input, y = ReLU(F(x) + x)::

        basic (18, 34)                 bottleneck (50)
            x                               x
      ┌─────┴────────┐               ┌──────┴────────┐
    3x3/s BN ReLU    │             1x1 BN ReLU       │      identity, or where the shape changes
    3x3   BN     (1x1/s BN)        3x3/s BN ReLU (1x1/s BN)   a projection (option B of
      └─────+────────┘             1x1 BN, 4x wider  │        section 3.3)
           ReLU                      └──────+────────┘
                                           ReLU

Figure 5 and Table 1: a 7x7/2 stem, a 3x3/2 max-pool, four stages of 64, 128, 256 and 512 channels
(times 4 in bottlenecks), the first block of the last three with stride 2. Convolutions are
initialised as in the paper's reference [13] (He et al., arXiv 1502.01852). The table of variants is
in resnet_specs.py.

Differs from the paper in: bottlenecks have their stride on the 3x3 convolution ("v1.5", as in
torchvision and timm) where the paper has it on the first 1x1: 4.1 in place of 3.8 G multiply-adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, relu

__all__ = ["KEY_LAYOUTS", "BasicBlock", "Bottleneck", "ResNet"]


def _behind_the_pool(match: re.Match[str]) -> str:
    """Return the place of block match[2] (from 0) of stage match[1] (from 1)."""
    stage, block = int(match[1]) - 1, int(match[2])
    return f"stages.{stage}.{block + 1 if stage == 0 else block}."


_TORCHVISION = (
    (r"^conv1\.", r"stem.conv."),
    (r"^bn1\.", r"stem.bn."),
    (r"^layer(\d)\.(\d+)\.", _behind_the_pool),
    (r"\.bn(\d)\.", r".conv\1.bn."),
    (r"\.conv(\d)\.weight$", r".conv\1.conv.weight"),
    (r"\.downsample\.0\.", r".shortcut.conv."),
    (r"\.downsample\.1\.", r".shortcut.bn."),
    (r"^fc\.", r"head.fc."),
)

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "torchvision": _TORCHVISION,
    "timm": _TORCHVISION,
    "openmmlab": ((r"^backbone\.", r""), *_TORCHVISION),
    "pytorchcv": (
        (r"^features\.init_block\.conv\.", r"stem."),
        (
            r"^features\.stage(\d)\.unit(\d+)\.(?:body\.)?",
            lambda match: f"stages.{int(match[1]) - 1}.{int(match[2]) - (match[1] != '1')}.",
        ),
        (r"\.identity_conv\.", r".shortcut."),
        (r"^output\.", r"head.fc."),
    ),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut, (N, C_in, H, W) -> (N, width, H / stride, W / stride).

    Figure 5, left.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, width, 3, stride=stride)
        self.conv2 = ConvBN(width, width, 3, act=None)
        self.shortcut = _shortcut(in_channels, width, stride)
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(F(x) + shortcut(x))."""
        y: Tensor = self.act(self.conv2(self.conv1(x)) + self.shortcut(x))
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the shortcut, (N, C_in, H, W) -> (N, 4 width, H / stride, W / stride).

    Figure 5, right; the stride is the 3x3's (v1.5).
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, width, 1)
        self.conv2 = ConvBN(width, width, 3, stride=stride)
        self.conv3 = ConvBN(width, 4 * width, 1, act=None)
        self.shortcut = _shortcut(in_channels, 4 * width, stride)
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(F(x) + shortcut(x))."""
        y: Tensor = self.act(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))
        return y


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return ConvBN(in_channels, out_channels, 1, stride=stride, act=None)


class ResNet(ImageClassifier):
    """The network of Table 1; the max-pool opens the first stage."""

    def __init__(
        self,
        *,
        depths: Sequence[int],
        bottleneck: bool,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        block = Bottleneck if bottleneck else BasicBlock
        stem = ConvBN(in_chans, 64, 7, stride=2)
        feature_info = [{"num_chs": 64, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        channels = 64
        for index, depth in enumerate(depths):
            width = 64 * 2**index
            stage = nn.Sequential()
            if index == 0:
                stage.append(nn.MaxPool2d(3, stride=2, padding=1))
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(block(channels, width, stride=stride))
                channels = width * block.expansion
            stages.append(stage)
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
