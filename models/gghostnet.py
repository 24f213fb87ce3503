r"""G-GhostNet: GhostNets on Heterogeneous Devices via Cheap Operations (Han et al., arXiv
2201.03297, IJCV 2022), here the G-Ghost RegNetX networks.

GhostNet's redundancy (ghostnet.py) is sought across a whole stage, with no depthwise convolution,
which GPUs are slow at. Of a stage of n blocks the first and the last are ordinary; those in between
compute only about half of the channels, the rest are ghosts of the first block's output::

                 base: RegNetX bottleneck / 2, all P channels
                       │ x0
            ┌──────────┴────────────┐
         x0[:R]                  x0[R:]
     bottlenecks 1 .. n-2           │                  m = mix of all outputs so far:
       R channels each          1x1 ─ BN                 mean of [x0, e1, .., e_(n-2)] over (H, W)
     e1, e2, .., e_(n-2)            + m                  ─ 1x1 ─ BN ─ ReLU ─ 1x1 ─ BN
            │                      ReLU
            └──── concat ───────────┘
                       │
                 end: RegNetX bottleneck, P channels

The paper's "G-Ghost stage" with its "mix" operation. A stage of two blocks or one is RegNetX's
own. R is the largest multiple of the thinner group width (3/4 of the stage's) in P / 2. The table
of variants is in gghostnet_specs.py.

Differs from the paper in: nothing known; the details (R, the group widths, the mix and the linear
cheap convolution) are those of the official repository, whose weights fit
(huawei-noah/Efficient-AI-Backbones, g_ghost_pytorch). Here the maps are averaged before they are
concatenated, which is the same number and takes less memory, and the slice that is the first thin
block's shortcut there is the identity (its input is sliced already). Dropout 0.2 there is
`drop_rate`, 0 by default here. Initialisation is the official one (He, fan out).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, relu
from .layouts import stage_from_one

__all__ = ["KEY_LAYOUTS", "Bottleneck", "GGhostRegNet", "GhostBlocks"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "official": (
        (r"^conv1\.", r"stem.conv."),
        (r"^bn1\.", r"stem.bn."),
        (r"^layer([1-4])\.", stage_from_one),
        (r"^(stages\.\d)\.base\.", r"\1.0."),
        (r"^(stages\.\d)\.end\.", r"\1.2."),
        (r"^(stages\.\d)\.layers\.", r"\1.1.layers."),
        (r"^(stages\.\d)\.cheap\.0\.", r"\1.1.cheap.conv."),
        (r"^(stages\.\d)\.cheap\.1\.", r"\1.1.cheap.bn."),
        (r"^(stages\.\d)\.merge\.1\.", r"\1.1.mix1.conv."),
        (r"^(stages\.\d)\.merge\.2\.", r"\1.1.mix1.bn."),
        (r"^(stages\.\d)\.merge\.4\.", r"\1.1.mix2.conv."),
        (r"^(stages\.\d)\.merge\.5\.", r"\1.1.mix2.bn."),
        (r"\.conv([123])\.", r".conv\1.conv."),
        (r"\.bn([123])\.", r".conv\1.bn."),
        (r"\.downsample\.0\.", r".shortcut.conv."),
        (r"\.downsample\.1\.", r".shortcut.bn."),
        (r"^fc\.", r"head.fc."),
    ),
}


class Bottleneck(nn.Module):
    """RegNetX's block (arXiv 2003.13678, Figure 4), bottleneck ratio 1: 1x1, grouped 3x3/s, 1x1.

    (N, C_in, H, W) -> (N, C_out, H / stride, W / stride); groups of `group_width` channels, of all
    where there are fewer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, group_width: int, stride: int = 1
    ) -> None:
        super().__init__()
        groups = out_channels // min(out_channels, group_width)
        self.conv1 = ConvBN(in_channels, out_channels)
        self.conv2 = ConvBN(out_channels, out_channels, 3, stride=stride, groups=groups)
        self.conv3 = ConvBN(out_channels, out_channels, act=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = ConvBN(in_channels, out_channels, stride=stride, act=None)
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(1x1(3x3(1x1(x))) + shortcut(x))."""
        y: Tensor = self.act(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))
        return y


class GhostBlocks(nn.Module):
    """The inner `depth` blocks of a G-Ghost stage, (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, *, depth: int, group_width: int) -> None:
        super().__init__()
        thin = group_width * 3 // 4
        self.intrinsic = channels // 2 // thin * thin
        ghosts = channels - self.intrinsic
        self.layers = nn.Sequential(
            *(Bottleneck(self.intrinsic, self.intrinsic, group_width=thin) for _ in range(depth))
        )
        self.cheap = ConvBN(ghosts, ghosts, act=None)
        self.mix1 = ConvBN(channels + depth * self.intrinsic, ghosts)
        self.mix2 = ConvBN(ghosts, ghosts, act=None)
        self.act = relu()

    def forward(self, x: Tensor) -> Tensor:
        """Return [e, ReLU(cheap(x[R:]) + mix(means))], the intrinsic channels first."""
        intrinsic = x[:, : self.intrinsic]
        means = [x.mean((2, 3), keepdim=True)]
        for layer in self.layers:
            intrinsic = layer(intrinsic)
            means.append(intrinsic.mean((2, 3), keepdim=True))
        mixed = self.mix2(self.mix1(torch.cat(means, 1)))
        ghosts = self.act(self.cheap(x[:, self.intrinsic :]) + mixed)
        return torch.cat((intrinsic, ghosts), 1)


class GGhostRegNet(ImageClassifier):
    """RegNetX with G-Ghost stages: a stem and four stages, each opening with stride 2."""

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        group_width: int,
        stem_width: int = 32,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        channels = stem_width
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential(Bottleneck(channels, width, group_width=group_width, stride=2))
            if depth > 2:
                stage.append(GhostBlocks(width, depth=depth - 2, group_width=group_width))
            if depth > 1:
                stage.append(Bottleneck(width, width, group_width=group_width))
            stages.append(stage)
            channels = width
            feature_info.append(
                {"num_chs": width, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            )
        super().__init__(
            stem=ConvBN(in_chans, stem_width, 3, stride=2),
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
