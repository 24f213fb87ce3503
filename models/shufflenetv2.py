r"""ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design.

Ma et al., arXiv 1807.11164, ECCV 2018.

Equal widths, no grouped 1x1 convolution, few branches, no elementwise sum (guidelines G1 to G4): a
unit processes half of the channels and passes the other half on, so that features are reused::

           stride 1                              stride 2 (first of a stage)
              x                                        x
            split                              ┌───────┴───────┐
      ┌───────┴───────┐                  3x3/2 depthwise BN   1x1   BN ReLU
      │         1x1   BN ReLU            1x1   BN ReLU        3x3/2 depthwise BN
      │         3x3   depthwise BN             │              1x1   BN ReLU
      │         1x1   BN ReLU                  │               │
      └─ concat ──────┘                        └─ concat ──────┘
         shuffle 2                                shuffle 2  (see shuffle.py)

Figure 3 (c, d); widths in Table 5. The unit exists in two editions, whose weights do not fit each
other (their keys differ, though at 0.5x the shapes do not):

* torchvision (`ShuffleV2Unit`): at stride 2 each branch makes out / 2 channels; every unit
  shuffles at its end; the split takes contiguous halves. The public PyTorch weights.
* Megvii (`MegviiUnit`): at stride 2 the left branch keeps the `in` channels and the right one makes
  out - in, which gives the multiply-accumulates that the paper prints; a stride-1 unit shuffles at
  its start, by even and odd channels (the inverse shuffle), and the last unit's output stays as it
  is. The authors' weights.

The large networks of the appendix (Tables 2 and 3 there, Figure 2) are of Megvii units: v2-50 and
SE-ShuffleNet v2-164, which adds x to the processed half and gates it by a squeeze-and-excitation
with out / 2 hidden channels: concat(left, ReLU(x + SE(BN(1x1(...))))). Their first stage keeps the
resolution: its first unit is the right one above with stride 1.

Differs from the paper in: the widths of the stride-2 branches in the torchvision edition; Megvii's
classifier has no bias (ours then loads zeros), and its code drops 20 % of the features before the
classifier at 2.0x (give drop_rate=0.2). Initialisation is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, SqueezeExcite, relu
from .layouts import block_places, look_up
from .shuffle import ChannelShuffle, split_channels

__all__ = ["KEY_LAYOUTS", "Edition", "MegviiUnit", "ShuffleNetV2", "ShuffleV2Unit"]

Edition = Literal["torchvision", "megvii"]

#: Place of convolution and BatchNorm in the public branches: left has no ReLU between the two
#: convolutions, right has one behind its first BatchNorm.
_LEFT = {"0": "0.conv", "1": "0.bn", "2": "1.conv", "3": "1.bn"}
_RIGHT = {"0": "0.conv", "1": "0.bn", "3": "1.conv", "4": "1.bn", "5": "2.conv", "6": "2.bn"}


#: Where Megvii's features.<unit> are.
_PLACES = block_places((4, 8, 4), first=0)

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "torchvision": (
        (r"^conv1\.0\.", r"stem.layers.0.conv."),
        (r"^conv1\.1\.", r"stem.layers.0.bn."),
        (r"^stage([2-4])\.", lambda match: f"stages.{int(match[1]) - 2}."),
        (r"\.branch1\.([0-3])\.", lambda match: f".branch1.{_LEFT[match[1]]}."),
        (r"\.branch2\.([013456])\.", lambda match: f".branch2.{_RIGHT[match[1]]}."),
        (r"^conv5\.0\.", r"final.conv."),
        (r"^conv5\.1\.", r"final.bn."),
        (r"^fc\.", r"head.fc."),
    ),
    "openmmlab": (
        (r"^backbone\.conv1\.", r"stem.layers.0."),
        (r"^backbone\.layers\.3\.", r"final."),
        (r"^backbone\.layers\.", r"stages."),
    ),
    "official": (
        (r"^first_conv\.0\.", r"stem.layers.0.conv."),
        (r"^first_conv\.1\.", r"stem.layers.0.bn."),
        (r"^features\.(\d+)\.", look_up(_PLACES)),
        (r"\.branch_proj\.([0-3])\.", lambda match: f".left.{_LEFT[match[1]]}."),
        (r"\.branch_main\.([013456])\.", lambda match: f".right.{_RIGHT[match[1]]}."),
        (r"^conv_last\.0\.", r"final.conv."),
        (r"^conv_last\.1\.", r"final.bn."),
        (r"^classifier\.0\.", r"head.fc."),
    ),
}


def _left(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    """3x3 depthwise with the stride, 1x1."""
    return nn.Sequential(
        ConvBN(in_channels, in_channels, 3, stride=stride, groups=in_channels, act=None),
        ConvBN(in_channels, out_channels),
    )


def _right(
    in_channels: int, hidden: int, out_channels: int, *, stride: int, last_relu: bool = True
) -> nn.Sequential:
    """1x1, 3x3 depthwise with the stride, 1x1."""
    return nn.Sequential(
        ConvBN(in_channels, hidden),
        ConvBN(hidden, hidden, 3, stride=stride, groups=hidden, act=None),
        ConvBN(hidden, out_channels, act=relu if last_relu else None),
    )


class ShuffleV2Unit(nn.Module):
    """One unit as in torchvision, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    `opens` a stage: both branches read all channels, else the second half is processed.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, opens: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.branch1 = _left(in_channels, half, stride=stride) if opens else None
        self.branch2 = _right(in_channels if opens else half, half, half, stride=stride)
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return shuffle(concat(left, right))."""
        if self.branch1 is None:
            left, right = split_channels(x)
        else:
            left, right = self.branch1(x), x
        y: Tensor = self.shuffle(torch.cat((left, self.branch2(right)), dim=1))
        return y


class MegviiUnit(nn.Module):
    """One unit as in the authors' code, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    `opens` a stage: both branches read all channels, else the odd ones are processed, and with
    `residual` added to what is made of them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        opens: bool,
        squeeze_excite: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        half = out_channels // 2
        read = in_channels if opens else half
        made = out_channels - read
        plain = not (squeeze_excite or residual)
        # even channels, then odd ones: the inverse of a shuffle by 2
        self.unshuffle = None if opens else ChannelShuffle(half)
        self.left = _left(in_channels, in_channels, stride=stride) if opens else None
        self.right = _right(read, half, made, stride=stride, last_relu=plain)
        self.se = SqueezeExcite(made, half) if squeeze_excite else None
        self.residual = residual and not opens
        self.act = None if plain else relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return concat(left, ReLU([x +] [SE](right)))."""
        if self.unshuffle is not None:
            left, x = split_channels(self.unshuffle(x))
        else:
            assert self.left is not None
            left = self.left(x)
        y: Tensor = self.right(x)
        if self.se is not None:
            y = self.se(y)
        if self.residual:
            y = y + x
        if self.act is not None:
            y = self.act(y)
        return torch.cat((left, y), dim=1)


class Stem(nn.Module):
    """3x3 convolutions, the first of stride 2: (N, C, H, W) -> (N, widths[-1], H / 2, W / 2).

    Not an nn.Sequential, whose parts timm's feature extractor would take for separate maps.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for index, width in enumerate(widths):
            self.layers.append(ConvBN(in_channels, width, 3, stride=2 if index == 0 else 1))
            in_channels = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the map that the max-pool reads."""
        y: Tensor = self.layers(x)
        return y


class ShuffleNetV2(ImageClassifier):
    """Table 5 (appendix Table 2 for the large ones): stem, max-pool in stages.0, stages, last 1x1.

    Four stages begin at a quarter of the resolution, three at an eighth.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        final_width: int,
        depths: Sequence[int] = (4, 8, 4),
        stem_widths: Sequence[int] = (24,),
        edition: Edition = "torchvision",
        squeeze_excite: bool = False,
        residual: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        channels = stem_widths[-1]
        stem = Stem(in_chans, stem_widths)
        feature_info = [{"num_chs": channels, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        reduction = 4
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            stride = 2
            if index == 0:
                stage.add_module("pool", nn.MaxPool2d(3, 2, padding=1))
                stride = 1 if len(widths) == 4 else 2
            reduction *= stride
            for block in range(depth):
                opens = block == 0
                unit: nn.Module
                if edition == "torchvision":
                    unit = ShuffleV2Unit(
                        channels, width, stride=stride if opens else 1, opens=opens
                    )
                else:
                    unit = MegviiUnit(
                        channels,
                        width,
                        stride=stride if opens else 1,
                        opens=opens,
                        squeeze_excite=squeeze_excite,
                        residual=residual,
                    )
                stage.add_module(str(block), unit)
                channels = width
            stages.append(stage)
            feature_info.append(
                {"num_chs": width, "reduction": reduction, "module": f"stages.{index}"}
            )
        super().__init__(
            stem=stem,
            stages=stages,
            final=ConvBN(channels, final_width),
            feature_info=feature_info,
            num_features=final_width,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
