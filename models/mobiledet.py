"""MobileDets: Searching for Object Detection Architectures for Mobile Accelerators.

Xiong et al., arXiv 2004.14525, CVPR 2021. Backbones searched for one kind of chip each (CPU, DSP,
EdgeTPU, GPU): where a chip runs full convolutions well, they replace depthwise ones (section 3)::

     IBN                 fused IBN            Tucker
      x                   x                    x
    1×1  e·c            k×k /s  e·c          1×1  scale(r·c)
    DW k×k /s             │                  k×k /s  scale(q·o)
    [SE]                  │                    │
    1×1  o, linear      1×1  o, linear       1×1  o, linear
     (+ x)               (+ x)                (+ x)

c and o are the channels of input and output, e the expansion, r and q the ratios of the ranks; an
IBN of expansion 1 has no first 1×1. Every convolution is followed by BatchNorm and, but for the
last ("linear"), by the activation: ReLU6, in the CPU model h-swish, which also has
squeeze-and-excitation, scale(e·c / 4) wide, in every IBN. scale() rounds to a multiple of 8, half
up, without the 90 % rule of the other MobileNets. Whether x is added is said by the table for every
block: some that keep their shape do not add it.

Table and blocks are those of the official TensorFlow code (tensorflow/models, research/
object_detection/models/ssd_mobiledet_feature_extractor.py, at d318246), as are BatchNorm's epsilon
of 0.01 and the "SAME" padding (at stride 2 on an even input only below and to the right) that its
weights were trained with. The feature maps are its C1 to C5. No layout of foreign keys is here:
what is public are TensorFlow detectors, no classifier.

Differs from the paper in: these are detection backbones; the pooling and the linear classifier
behind C5 are ours. Their width multiplier (1.0 in the paper's models) is left out. For training,
BatchNorm's momentum and the initialisation are PyTorch's defaults: the official decay of 0.99 and
He-normal kernels are made for 400 thousand steps; in the 16 epochs of the digits recipe the CPU
model reached 87 % top-1 with them and 98 % without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import Activation, ConvBN, SqueezeExcite, relu6

__all__ = ["IBN", "FusedIBN", "MobileDet", "Tucker", "scale_filters"]

#: A block of the table: kind, width, ratio, kernel size, stride, whether x is added. The ratio is
#: the expansion of "ibn" and "fused", and (input rank, output rank) of "tucker".
Block = tuple[str, int, int | tuple[float, float], int, int, bool]

h_swish: Activation = partial(nn.Hardswish, inplace=True)
_ConvBN = partial(ConvBN, eps=0.01, same=True)


def scale_filters(filters: int, multiplier: float) -> int:
    """Return filters * multiplier as a multiple of 8, rounded half up, at least 8.

    >>> scale_filters(44, 0.25)  # 11; the 90 % rule would give 16
    8
    """
    return max(int(filters * multiplier / 8 + 0.5) * 8, 8)


class IBN(nn.Module):
    """Inverted bottleneck, (N, C, H, W) -> (N, width, H / stride, W / stride).

    With expansion 1 the first 1x1 convolution is left out.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        expansion: int,
        size: int = 3,
        stride: int = 1,
        residual: bool = False,
        act: Activation = relu6,
        squeeze_excite: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _ConvBN(in_channels, hidden, act=act) if expansion > 1 else None
        self.depthwise = _ConvBN(hidden, hidden, size, stride=stride, groups=hidden, act=act)
        self.se = (
            SqueezeExcite(hidden, scale_filters(hidden, 0.25), act=act) if squeeze_excite else None
        )
        self.project = _ConvBN(hidden, width, act=None)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Return project([SE](depthwise([expand](x)))), plus x if residual."""
        y: Tensor = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        if self.se is not None:
            y = self.se(y)
        y = self.project(y)
        return y + x if self.residual else y


class FusedIBN(nn.Module):
    """Expansion and depthwise convolution in one, (N, C, H, W) -> (N, width, H / s, W / s)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        expansion: int,
        size: int = 3,
        stride: int = 1,
        residual: bool = False,
        act: Activation = relu6,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = _ConvBN(in_channels, hidden, size, stride=stride, act=act)
        self.project = _ConvBN(hidden, width, act=None)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Return project(expand(x)), plus x if residual."""
        y: Tensor = self.project(self.expand(x))
        return y + x if self.residual else y


class Tucker(nn.Module):
    """A k x k convolution between two ranks, (N, C, H, W) -> (N, width, H / s, W / s).

    As the Tucker decomposition of a full convolution: into `ranks[0]` of the input's channels, and
    out of `ranks[1]` of the output's.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        ranks: tuple[float, float],
        size: int = 3,
        stride: int = 1,
        residual: bool = False,
        act: Activation = relu6,
    ) -> None:
        super().__init__()
        input_rank = scale_filters(in_channels, ranks[0])
        output_rank = scale_filters(width, ranks[1])
        self.reduce = _ConvBN(in_channels, input_rank, act=act)
        self.conv = _ConvBN(input_rank, output_rank, size, stride=stride, act=act)
        self.project = _ConvBN(output_rank, width, act=None)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Return project(conv(reduce(x))), plus x if residual."""
        y: Tensor = self.project(self.conv(self.reduce(x)))
        return y + x if self.residual else y


def _create_block(in_channels: int, block: Block, *, act: Activation, se: bool) -> nn.Module:
    kind, width, ratio, size, stride, residual = block
    if isinstance(ratio, tuple):
        assert kind == "tucker"
        return Tucker(
            in_channels,
            width,
            ranks=ratio,
            size=size,
            stride=stride,
            residual=residual,
            act=act,
        )
    if kind == "fused":
        return FusedIBN(
            in_channels,
            width,
            expansion=ratio,
            size=size,
            stride=stride,
            residual=residual,
            act=act,
        )
    assert kind == "ibn"
    return IBN(
        in_channels,
        width,
        expansion=ratio,
        size=size,
        stride=stride,
        residual=residual,
        act=act,
        squeeze_excite=se,
    )


class MobileDet(ImageClassifier):
    """Stem and five stages, whose outputs are C1 to C5 at strides 2 to 32.

    `swish_and_se`: h-swish for ReLU6 and squeeze-and-excitation in every IBN, as the CPU model has.
    """

    def __init__(
        self,
        *,
        stem_width: int,
        stages: Sequence[Sequence[Block]],
        swish_and_se: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        act = h_swish if swish_and_se else relu6
        built = nn.Sequential()
        feature_info = []
        channels, reduction = stem_width, 2
        for index, blocks in enumerate(stages):
            stage = nn.Sequential()
            for block in blocks:
                stage.append(_create_block(channels, block, act=act, se=swish_and_se))
                _, channels, _, _, stride, _ = block
                reduction *= stride
            built.append(stage)
            feature_info.append(
                {"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"}
            )
        super().__init__(
            stem=_ConvBN(in_chans, stem_width, 3, stride=2, act=act),
            stages=built,
            feature_info=feature_info,
            num_features=channels,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
