r"""MobileNets: Efficient CNNs for Mobile Vision Applications (Howard et al., arXiv 1704.04861).

A convolution is factorised into one that looks around and one that mixes channels (section 3.1,
Figure 3)::

       standard, 9*C*K MACs a pixel            depthwise separable, 9*C + C*K

       x (C) ── 3x3/s ── BN ── act ── y (K)    x (C) ── DW 3x3/s ── BN ── act
                                                                           │
                                               y (K) ── act ── BN ── PW 1x1

Table 1 is a 3x3/2 stem, thirteen such pairs and a linear classifier; the width multiplier (section
3.3) thins every layer, the stem too. Stages end where the stride goes up next. The variants are in
mobilenetv1_specs.py.

Differs from the paper in: ReLU6 for ReLU, as in the authors' TensorFlow code (slim) and in timm;
the last depthwise convolution has stride 1 (Table 1 prints 2, but 7x7 goes in and out of it).
BatchNorm eps is 1e-5 as in timm (slim: 1e-3), padding symmetric as in timm (slim: SAME).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import ConvBN, relu6

__all__ = ["KEY_LAYOUTS", "DepthwiseSeparable", "MobileNetV1"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "timm": (
        (r"^conv_stem\.", r"stem.conv."),
        (r"^bn1\.", r"stem.bn."),
        (r"^blocks\.", r"stages."),
        (r"\.conv_dw\.", r".depthwise.conv."),
        (r"\.bn1\.", r".depthwise.bn."),
        (r"\.conv_pw\.", r".pointwise.conv."),
        (r"\.bn2\.", r".pointwise.bn."),
        (r"^classifier\.", r"head.fc."),
    ),
}


class DepthwiseSeparable(nn.Module):
    """Figure 3, right: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = ConvBN(
            in_channels, in_channels, 3, stride=stride, groups=in_channels, act=relu6
        )
        self.pointwise = ConvBN(in_channels, out_channels, act=relu6)

    def forward(self, x: Tensor) -> Tensor:
        """Return pointwise(depthwise(x)), both activated."""
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


class MobileNetV1(ImageClassifier):
    """The network of Table 1; every stage but the first opens with stride 2."""

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
        stem = ConvBN(in_chans, stem_width, 3, stride=2, act=relu6)
        stages = nn.Sequential()
        feature_info = []
        channels = stem_width
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for block in range(depth):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(DepthwiseSeparable(channels, width, stride=stride))
                channels = width
            stages.append(stage)
            feature_info.append(
                {"num_chs": width, "reduction": 2 * 2**index, "module": f"stages.{index}"}
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
