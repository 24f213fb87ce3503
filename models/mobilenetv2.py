r"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 1801.04381, CVPR 2018).

The residual joins the narrow ends and the depthwise convolution works on the wide middle; the
narrow ends carry no activation, which would destroy information there (sections 3.2 and 3.3)::

                     x (C)
      ┌────────────────┤
      │      1x1 -> t*C, BN, ReLU6      expand; not there when t = 1
      │      DW 3x3/s,   BN, ReLU6
      │      1x1 -> C',  BN             project: a linear bottleneck
      └─────────────── +                only if s = 1 and C = C' (Figure 4d)
                     y (C')

Table 2 gives (t, c, n, s) of seven stages. The width multiplier scales c and the stem to multiples
of 8; below 1 it leaves the last 1x1 convolution alone (section 6.1). The variants are in
mobilenetv2_specs.py.

Differs from the paper in: BatchNorm eps 1e-5 and symmetric padding, as in timm and torchvision (the
authors' TensorFlow code, slim: 1e-3 and SAME).
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers.helpers import make_divisible
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, relu6
from .layouts import block_places, look_up, stage_from_one

__all__ = ["KEY_LAYOUTS", "InvertedResidual", "MobileNetV2"]

#: Where the 17 blocks of Table 2 are, for layouts that number them through from 1.
_place = look_up(block_places((1, 2, 3, 4, 3, 3, 1), first=1))

#: Regular expressions that turn a public state dict's keys into ours, by layout. The first block
#: has no expand convolution, so that other layouts number its parts differently.
KEY_LAYOUTS = {
    "timm": (
        (r"^conv_stem\.", r"stem.conv."),
        (r"^bn1\.", r"stem.bn."),
        (r"^blocks\.0\.0\.conv_dw\.", r"stages.0.0.depthwise.conv."),
        (r"^blocks\.0\.0\.bn1\.", r"stages.0.0.depthwise.bn."),
        (r"^blocks\.0\.0\.conv_pw\.", r"stages.0.0.project.conv."),
        (r"^blocks\.0\.0\.bn2\.", r"stages.0.0.project.bn."),
        (r"^blocks\.", r"stages."),
        (r"\.conv_pw\.", r".expand.conv."),
        (r"\.bn1\.", r".expand.bn."),
        (r"\.conv_dw\.", r".depthwise.conv."),
        (r"\.bn2\.", r".depthwise.bn."),
        (r"\.conv_pwl\.", r".project.conv."),
        (r"\.bn3\.", r".project.bn."),
        (r"^conv_head\.", r"final.conv."),
        (r"^bn2\.", r"final.bn."),
        (r"^classifier\.", r"head.fc."),
    ),
    "torchvision": (
        (r"^features\.0\.0\.", r"stem.conv."),
        (r"^features\.0\.1\.", r"stem.bn."),
        (r"^features\.1\.conv\.0\.0\.", r"stages.0.0.depthwise.conv."),
        (r"^features\.1\.conv\.0\.1\.", r"stages.0.0.depthwise.bn."),
        (r"^features\.1\.conv\.1\.", r"stages.0.0.project.conv."),
        (r"^features\.1\.conv\.2\.", r"stages.0.0.project.bn."),
        (r"^features\.18\.0\.", r"final.conv."),
        (r"^features\.18\.1\.", r"final.bn."),
        (r"^features\.(\d+)\.", _place),
        (r"\.conv\.0\.0\.", r".expand.conv."),
        (r"\.conv\.0\.1\.", r".expand.bn."),
        (r"\.conv\.1\.0\.", r".depthwise.conv."),
        (r"\.conv\.1\.1\.", r".depthwise.bn."),
        (r"\.conv\.2\.", r".project.conv."),
        (r"\.conv\.3\.", r".project.bn."),
        (r"^classifier\.1\.", r"head.fc."),
    ),
    "d-li14": (  # github.com/d-li14/mobilenetv2.pytorch
        (r"^conv\.0\.", r"final.conv."),
        (r"^conv\.1\.", r"final.bn."),
        (r"^features\.0\.0\.", r"stem.conv."),
        (r"^features\.0\.1\.", r"stem.bn."),
        (r"^features\.1\.conv\.0\.", r"stages.0.0.depthwise.conv."),
        (r"^features\.1\.conv\.1\.", r"stages.0.0.depthwise.bn."),
        (r"^features\.1\.conv\.3\.", r"stages.0.0.project.conv."),
        (r"^features\.1\.conv\.4\.", r"stages.0.0.project.bn."),
        (r"^features\.(\d+)\.", _place),
        (r"\.conv\.0\.", r".expand.conv."),
        (r"\.conv\.1\.", r".expand.bn."),
        (r"\.conv\.3\.", r".depthwise.conv."),
        (r"\.conv\.4\.", r".depthwise.bn."),
        (r"\.conv\.6\.", r".project.conv."),
        (r"\.conv\.7\.", r".project.bn."),
        (r"^classifier\.", r"head.fc."),
    ),
    "openmmlab": (  # mmpretrain; its head has our name
        (r"^backbone\.conv1\.", r"stem."),
        (r"^backbone\.conv2\.", r"final."),
        (r"^backbone\.layer1\.0\.conv\.0\.", r"stages.0.0.depthwise."),
        (r"^backbone\.layer1\.0\.conv\.1\.", r"stages.0.0.project."),
        (r"^backbone\.layer([2-7])\.", stage_from_one),
        (r"\.conv\.0\.", r".expand."),
        (r"\.conv\.1\.", r".depthwise."),
        (r"\.conv\.2\.", r".project."),
    ),
}


class InvertedResidual(nn.Module):
    """Figure 4d: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, stride: int = 1
    ) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = nn.Identity() if expansion == 1 else ConvBN(in_channels, hidden, act=relu6)
        self.depthwise = ConvBN(hidden, hidden, 3, stride=stride, groups=hidden, act=relu6)
        self.project = ConvBN(hidden, out_channels, act=None)
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return project(depthwise(expand(x))), plus x where that fits."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_residual else y


class MobileNetV2(ImageClassifier):
    """The network of Table 2; `stages` are its rows (t, c, n, s), `width` the multiplier."""

    def __init__(
        self,
        *,
        stages: Sequence[tuple[int, int, int, int]],
        stem_width: int,
        final_width: int,
        width: float = 1.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        channels = make_divisible(stem_width * width)
        final_width = make_divisible(final_width * max(width, 1.0))
        stem = ConvBN(in_chans, channels, 3, stride=2, act=relu6)
        reduction = 2
        built = nn.Sequential()
        maps = {}  # by reduction: of several stages at one resolution the last gives the map
        for index, (expansion, c, depth, stride) in enumerate(stages):
            out_channels = make_divisible(c * width)
            stage = nn.Sequential()
            for block in range(depth):
                stage.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        expansion=expansion,
                        stride=stride if block == 0 else 1,
                    )
                )
                channels = out_channels
            built.append(stage)
            reduction *= stride
            maps[reduction] = {
                "num_chs": channels, "reduction": reduction, "module": f"stages.{index}"
            }  # fmt: skip
        super().__init__(
            stem=stem,
            stages=built,
            final=ConvBN(channels, final_width, act=relu6),
            feature_info=list(maps.values()),
            num_features=final_width,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
