"""MobileNetV4: Universal Models for the Mobile Ecosystem (Qin et al., arXiv 2404.10518, ECCV 2024).

The conv models: one block, the universal inverted bottleneck (UIB), in four instances that differ
in which of two optional depthwise convolutions they have (section 3, Figure 4)::

            ExtraDW           IB            ConvNeXt           FFN
               x               x               x                x
     start:  DW a×a            │           DW a×a /s            │          linear
             1×1 ×e          1×1 ×e          1×1 ×e           1×1 ×e       ReLU
    middle: DW b×b /s       DW b×b /s          │                │          ReLU
             1×1             1×1             1×1              1×1          linear
               + x             + x             + x              + x

Every convolution is followed by BatchNorm, "linear" means without an activation, e is the
expansion, /s the stride: it sits on the middle depthwise convolution, or where there is none on
the start one. x is added where the block keeps its shape (in == out, s = 1).

The first stages, where channels are few, are fused inverted bottlenecks: a 3x3/2 convolution in the
place of the expansion and the depthwise one, then a 1x1. Behind the last stage follow a 1x1 to 960
channels, pooling, and a 1x1 to 1280 on the pooled map, bias-free and with BatchNorm and ReLU (in
MobileNetV3's head the same layer has a bias and no BatchNorm). Tables 11 to 13 are the rows of
mobilenetv4_specs.py. All expansions are whole numbers, so that no width has to be rounded.

Differs from the paper in: BatchNorm's epsilon 1e-5, as in timm, whose weights are made for it (the
official TensorFlow configurations: 1e-6 for S, 1e-3 for M and L); padding is symmetric as in timm;
no stochastic depth; PyTorch's default initialisation. In Conv-S the 1x1 of the fused bottlenecks is
followed by a ReLU as in the official code and in timm; in M and L it is linear.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier, NeckHead
from .layers import ConvBN, relu

__all__ = ["KEY_LAYOUTS", "FusedIB", "MobileNetV4", "UniversalInvertedBottleneck"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "timm": (
        (r"^conv_stem\.", r"stem.conv."),
        (r"^bn1\.", r"stem.bn."),
        (r"^blocks\.4\.0\.conv\.", r"final.conv."),
        (r"^blocks\.4\.0\.bn1\.", r"final.bn."),
        # a fused bottleneck is one block in M and L (conv_exp, bn1, conv_pwl, bn2), two in S
        (r"^blocks\.([01])\.0\.conv(?:_exp)?\.", r"stages.\1.0.expand.conv."),
        (r"^blocks\.([01])\.0\.bn1\.", r"stages.\1.0.expand.bn."),
        (r"^blocks\.([01])\.(?:0\.conv_pwl|1\.conv)\.", r"stages.\1.0.project.conv."),
        (r"^blocks\.([01])\.(?:0\.bn2|1\.bn1)\.", r"stages.\1.0.project.bn."),
        (r"^blocks\.", r"stages."),
        (r"\.dw_start\.", r".start."),
        (r"\.dw_mid\.", r".middle."),
        (r"\.pw_exp\.", r".expand."),
        (r"\.pw_proj\.", r".project."),
        (r"^conv_head\.", r"head.neck.conv."),
        (r"^norm_head\.", r"head.neck.bn."),
        (r"^classifier\.", r"head.fc."),
    ),
}


class FusedIB(nn.Module):
    """3x3/2 to `hidden` channels, 1x1 to `out_channels`: (N, C_in, H, W) -> (N, C_out, H/2, W/2).

    `linear`: no activation behind the 1x1. As it halves the map, there is nothing to add.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, *, linear: bool = True
    ) -> None:
        super().__init__()
        self.expand = ConvBN(in_channels, hidden, 3, stride=2)
        self.project = ConvBN(hidden, out_channels, act=None if linear else relu)

    def forward(self, x: Tensor) -> Tensor:
        """Return project(expand(x))."""
        y: Tensor = self.project(self.expand(x))
        return y


class UniversalInvertedBottleneck(nn.Module):
    """UIB, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    `start` and `middle` are the sizes of the depthwise kernels, 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        start: int,
        middle: int,
        expansion: int,
        stride: int = 1,
    ) -> None:
        super().__init__()
        assert start or middle or stride == 1, "without a depthwise convolution nothing can stride"
        hidden = in_channels * expansion
        self.start = (
            ConvBN(
                in_channels,
                in_channels,
                start,
                stride=1 if middle else stride,
                groups=in_channels,
                act=None,
            )
            if start
            else None
        )
        self.expand = ConvBN(in_channels, hidden)
        self.middle = (
            ConvBN(hidden, hidden, middle, stride=stride, groups=hidden) if middle else None
        )
        self.project = ConvBN(hidden, out_channels, act=None)
        self.residual = in_channels == out_channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Return project([middle](expand([start](x)))), plus x where the shape is kept."""
        y: Tensor = x if self.start is None else self.start(x)
        y = self.expand(y)
        if self.middle is not None:
            y = self.middle(y)
        y = self.project(y)
        return x + y if self.residual else y


class MobileNetV4(ImageClassifier):
    """The conv network: stem, fused stages, UIB stages, 1x1; every stage opens with stride 2.

    `fused` gives (hidden, width) of the one block of each fused stage, `stages` the width and the
    blocks (start, middle, expansion) of each UIB stage.
    """

    def __init__(
        self,
        *,
        stem_width: int,
        fused: Sequence[tuple[int, int]],
        fused_linear: bool,
        stages: Sequence[tuple[int, Sequence[tuple[int, int, int]]]],
        final_width: int = 960,
        hidden_size: int = 1280,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        built = nn.Sequential()
        channels = stem_width
        widths = [stem_width]
        for hidden, width in fused:
            built.append(nn.Sequential(FusedIB(channels, hidden, width, linear=fused_linear)))
            channels = width
            widths.append(width)
        for width, blocks in stages:
            stage = nn.Sequential()
            for index, (start, middle, expansion) in enumerate(blocks):
                stage.append(
                    UniversalInvertedBottleneck(
                        channels,
                        width,
                        start=start,
                        middle=middle,
                        expansion=expansion,
                        stride=2 if index == 0 else 1,
                    )
                )
                channels = width
            built.append(stage)
            widths.append(width)
        # the last map is taken behind the 1x1, which makes it wide enough to be useful
        modules = ["stem", *(f"stages.{index}" for index in range(len(built) - 1)), "final"]
        super().__init__(
            stem=ConvBN(in_chans, stem_width, 3, stride=2),
            stages=built,
            final=ConvBN(channels, final_width),
            head=NeckHead(
                ConvBN(final_width, hidden_size),
                hidden_size=hidden_size,
                num_classes=num_classes,
                global_pool=global_pool,
                drop_rate=drop_rate,
            ),
            feature_info=[
                {"num_chs": width, "reduction": 2 ** (index + 1), "module": module}
                for index, (width, module) in enumerate(
                    zip([*widths[:-1], final_width], modules, strict=True)
                )
            ],
            num_features=final_width,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
