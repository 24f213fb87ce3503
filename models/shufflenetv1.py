r"""ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices.

Zhang et al., arXiv 1707.01083, CVPR 2018.

Most of a small ResNeXt's work is in its 1x1 convolutions, so these are grouped too; a channel
shuffle lets the groups see each other::

         stride 1                          stride 2
            x                                 x
      ┌─────┴─────────┐               ┌───────┴──────┐
      │         1x1 g  BN ReLU        │        1x1 g  BN ReLU    hidden = out / 4
      │         shuffle g          avg-pool    shuffle g         (see shuffle.py)
      │         3x3 depthwise  BN    3x3/2     3x3/2 depthwise  BN
      │         1x1 g  BN             │        1x1 g  BN         to out - in channels
      └───── + ───────┘               └─ concat ─────┘
            ReLU                          ReLU

Figures 2 and 3; Table 1 has the widths for g = 1, 2, 3, 4, 8 groups. The first 1x1 convolution of
all is not grouped, as it reads only the stem's few channels (section 3.2).

Figure and text leave open in which order the stride-2 unit concatenates, and the released code
shuffles elsewhere. With grouped convolutions behind it the order counts, so weights belong to one
`Edition`; its name is part of every key, which keeps the weights of one out of another:

    paper      shuffle before the depthwise convolution   main branch first   pytorchcv's weights
    openmmlab  shuffle behind the depthwise convolution   shortcut first      mmpretrain's weights
    megvii     inverse shuffle, behind the depthwise      shortcut first      the authors' weights

Both released codes apply ReLU before the concatenation; the averages it spares are of outputs of
a ReLU, so that nothing changes. The table of variants is in shufflenetv1_specs.py.

Differs from the paper in: the widths of scaled stems and the order of concatenation, which it does
not say; Megvii's classifier has no bias (ours then loads zeros). Initialisation is PyTorch's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, relu
from .layouts import block_places, look_up
from .shuffle import ChannelShuffle

__all__ = ["KEY_LAYOUTS", "Edition", "ShuffleNetV1", "ShuffleUnit"]

Edition = Literal["paper", "openmmlab", "megvii"]

#: The order of the main branch, by edition.
_ORDERS: dict[Edition, tuple[str, ...]] = {
    "paper": ("compress", "shuffle", "depthwise", "expand"),
    "openmmlab": ("compress", "depthwise", "shuffle", "expand"),
    "megvii": ("compress", "depthwise", "shuffle", "expand"),
}


#: Where Megvii's features.<unit> are.
_PLACES = block_places((4, 8, 4), first=0)

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "pytorchcv": (
        (r"^features\.init_block\.", r"stem."),
        (
            r"^features\.stage(\d+)\.unit(\d+)\.",
            lambda match: f"stages.{int(match[1]) - 1}.{int(match[2]) - 1}.main.paper.",
        ),
        (r"\.compress_(conv|bn)1\.", r".compress.\1."),
        (r"\.dw_(conv|bn)2\.", r".depthwise.\1."),
        (r"\.expand_(conv|bn)3\.", r".expand.\1."),
        (r"^output\.", r"head.fc."),
    ),
    "openmmlab": (
        (r"^backbone\.conv1\.", r"stem."),
        (r"^backbone\.layers\.(\d+)\.(\d+)\.", r"stages.\1.\2.main.openmmlab."),
        (r"\.g_conv_1x1_compress\.", r".compress."),
        (r"\.depthwise_conv3x3_bn\.", r".depthwise."),
        (r"\.g_conv_1x1_expand\.", r".expand."),
    ),
    "official": (
        (r"^first_conv\.0\.", r"stem.conv."),
        (r"^first_conv\.1\.", r"stem.bn."),
        (r"^features\.(\d+)\.", look_up(_PLACES, then="main.megvii.")),
        (r"\.branch_main_1\.0\.", r".compress.conv."),
        (r"\.branch_main_1\.1\.", r".compress.bn."),
        (r"\.branch_main_1\.3\.", r".depthwise.conv."),
        (r"\.branch_main_1\.4\.", r".depthwise.bn."),
        (r"\.branch_main_2\.0\.", r".expand.conv."),
        (r"\.branch_main_2\.1\.", r".expand.bn."),
        (r"^classifier\.0\.", r"head.fc."),
    ),
}


class ShuffleUnit(nn.Module):
    """One unit, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); stride 1 keeps the width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        groups: int,
        compress_groups: int,
        edition: Edition,
    ) -> None:
        super().__init__()
        hidden = out_channels // 4
        made = out_channels if stride == 1 else out_channels - in_channels
        inverse = edition == "megvii"
        layers: dict[str, nn.Module] = {
            "compress": ConvBN(in_channels, hidden, groups=compress_groups),
            "depthwise": ConvBN(hidden, hidden, 3, stride=stride, groups=hidden, act=None),
            "expand": ConvBN(hidden, made, groups=groups, act=None),
        }
        if groups > 1:
            layers["shuffle"] = ChannelShuffle(hidden // groups if inverse else groups)
        order = [name for name in _ORDERS[edition] if name in layers]
        branch = nn.Sequential(OrderedDict((name, layers[name]) for name in order))
        self.main = nn.Sequential(OrderedDict({edition: branch}))
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride, padding=1)
        self.main_first = edition == "paper"
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(x + main(x)), or where the stride is 2 ReLU of pool(x) beside main(x)."""
        y: Tensor = self.main(x)
        if self.pool is None:
            y = x + y
        else:
            shortcut: Tensor = self.pool(x)
            y = torch.cat((y, shortcut) if self.main_first else (shortcut, y), dim=1)
        activated: Tensor = self.act(y)
        return activated


class ShuffleNetV1(ImageClassifier):
    """The network of Table 1: stem, max-pool (first of stages.0), three stages, no last 1x1."""

    def __init__(
        self,
        *,
        groups: int,
        stem_width: int,
        widths: Sequence[int],
        depths: Sequence[int] = (4, 8, 4),
        edition: Edition = "paper",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem = ConvBN(in_chans, stem_width, 3, stride=2)
        feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        channels = stem_width
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            if index == 0:
                stage.add_module("pool", nn.MaxPool2d(3, 2, padding=1))
            for block in range(depth):
                unit = ShuffleUnit(
                    channels,
                    width,
                    stride=2 if block == 0 else 1,
                    groups=groups,
                    compress_groups=1 if index == block == 0 else groups,
                    edition=edition,
                )
                stage.add_module(str(block), unit)
                channels = width
            stages.append(stage)
            feature_info.append(
                {"num_chs": width, "reduction": 8 * 2**index, "module": f"stages.{index}"}
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
