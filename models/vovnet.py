r"""VoVNet (Lee et al., arXiv 1904.09730, CVPR Workshops 2019) and VoVNetV2 (1911.06667, CVPR 2020).

DenseNet concatenates before every layer; one-shot aggregation (OSA) does so once, at the end of a
module, so that all n layers have the same width in and out (section 3.2 of the first paper)::

       x ──► 3x3 ──► 3x3 ─ ... ─► 3x3              every 3x3 and 1x1: conv, BN, ReLU
       ├──┐   ├──────┐│            │
       │  └►[ x, y1, y2, ...,     yn ]             concat, the module's input first
       │                │
       │               1x1                         aggregation
       │                │
       │              [eSE]                        V2: y * hard_sigmoid(W mean(y) + b), W is C x C
       │                │
       └ ─ ─ ─ ─ ─ ─ ─►[+]──►                      identity, not in a stage's first module

V2 ("VoVNetV2 Backbone" in the CenterMask paper, arXiv 1911.06667) adds the identity and eSE, a
squeeze-and-excitation with one full layer instead of two narrow ones; the gate comes before the
sum. The networks (section 3.3): three 3x3 convolutions down to stride 4, then four stages of OSA
modules with a 3x3 max-pooling of stride 2 between them. The depthwise variants (official V2
repository) replace each 3x3 but the first by depthwise 3x3 and 1x1 with nothing in between, behind
a 1x1 reduction where a module's input is not as wide as its layers; the concatenation still takes
the unreduced input. The variants are in vovnet_specs.py.

The published codes differ. V1 has no identity in the paper and in timm (`vovnet39a`); the official
code adds it from a stage's second module on (`vovnet39`: the same keys, another function). V2 has
eSE in every module in the official code (`vovnetv2_39`), in the last module of a stage only in timm
(`ese_vovnet39b`); with one module per stage (19) the two are the same network.

Pooling is without padding and rounds up (`ceil_mode`), so H becomes H // 2 where a padded
convolution gives (H + 1) // 2: an input of 33 x 47 leaves 1 x 1 at "stride 32", not 2 x 2.

Differs from the papers in: nothing beyond those readings, but that a map of one pixel passes the
pooling, where the official code stops. Initialisation is the official code's (He normal, fan in;
timm takes fan out).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import ImageClassifier
from .layers import ConvBN

__all__ = ["KEY_LAYOUTS", "OSA", "CeilMaxPool", "EffectiveSqueezeExcite", "VoVNet"]

_TIMM = (
    (r"^stem\.0\.", r"stem.conv1."),
    (r"^stem\.1\.", r"stem.conv2."),
    (r"^stem\.2\.", r"stages.0.0."),
    (r"^(stages\.\d)\.blocks\.(\d+)\.", lambda match: f"{match[1]}.{int(match[2]) + 1}."),
    (r"\.conv_reduction\.", r".reduce."),
    (r"\.conv_mid\.", r".convs."),
    (r"\.conv_concat\.", r".aggregate."),
    (r"\.attn\.fc\.", r".ese.fc."),
)

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "timm": _TIMM,
    # a `bn` that follows two convolutions there belongs to the second here
    "timm_depthwise": (
        (r"^(stem\.[12]|.*\.conv_mid\.\d+)\.bn\.", r"\1.pointwise.bn."),
        (r"\.conv_dw\.", r".depthwise."),
        (r"\.conv_pw\.", r".pointwise.conv."),
        *_TIMM,
    ),
    # VoVNet.pytorch; vovnet-detectron2, whose files have detectron2's prefix, no classifier, and a
    # first convolution that reads BGR on the scale 0..255, only the mean taken off
    "official": (
        (r"^backbone\.bottom_up\.", r""),
        (r"^stem\.stem_([12])/", r"stem.conv\1."),
        (r"^stem\.stem_3/", r"stages.0.0."),
        (r"^stage([2-5])\.OSA\d_(\d+)\.", lambda match: f"stages.{int(match[1]) - 2}.{match[2]}."),
        (r"\.conv_reduction\.OSA\d_\d+_reduction_0/", r".reduce."),
        (r"\.layers\.(\d+)\.OSA\d_\d+_\d+/", r".convs.\1."),
        (r"\.concat\.OSA\d_\d+_concat/", r".aggregate."),
        (r"\.dw_conv3x3\.", r".depthwise."),
        (r"\.pw_conv1x1\.", r".pointwise.conv."),
        (r"\.pw_norm\.", r".pointwise.bn."),
        (r"\.norm\.", r".bn."),
        (r"^classifier\.", r"head.fc."),
    ),
    "pytorchcv": (
        (r"^features\.init_block\.conv([12])\.", r"stem.conv\1."),
        (r"^features\.init_block\.conv3\.", r"stages.0.0."),
        (
            r"^features\.stage([1-4])\.unit(\d+)\.",
            lambda match: f"stages.{int(match[1]) - 1}.{match[2]}.",
        ),
        (r"\.branches\.branch(\d+)\.", lambda match: f".convs.{int(match[1]) - 1}."),
        (r"\.concat_conv\.", r".aggregate."),
        (r"^output\.", r"head.fc."),
    ),
}


class CeilMaxPool(nn.Module):
    """3x3 max-pooling, stride 2, no padding, the last window cut off: H -> max(1, H // 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled map; a side of one or two pixels is one window."""
        window = [3 if side > 2 else side for side in x.shape[2:]]
        return F.max_pool2d(x, window, stride=2, ceil_mode=True)


class SeparableConvBN(nn.Sequential):
    """ReLU(BN(1x1(depthwise 3x3(x)))): neither BatchNorm nor activation between the two."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["depthwise"] = nn.Conv2d(
            in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False
        )
        layers["pointwise"] = ConvBN(in_channels, out_channels)
        super().__init__(layers)


def _conv3x3(
    in_channels: int, out_channels: int, *, stride: int = 1, depthwise: bool = False
) -> nn.Module:
    if depthwise:
        return SeparableConvBN(in_channels, out_channels, stride=stride)
    return ConvBN(in_channels, out_channels, 3, stride=stride)


class EffectiveSqueezeExcite(nn.Module):
    """Channel gate x * hard_sigmoid(fc(mean(x))), fc as wide as x; (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated map, same shape."""
        gate: Tensor = self.gate(self.fc(x.mean((2, 3), keepdim=True)))
        return x * gate


class OSA(nn.Module):
    """One-shot aggregation of `layers` 3x3 convolutions, (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        layers: int,
        identity: bool = False,
        squeeze_excite: bool = False,
        depthwise: bool = False,
    ) -> None:
        super().__init__()
        self.identity = identity
        reduces = depthwise and in_channels != mid_channels
        self.reduce = ConvBN(in_channels, mid_channels) if reduces else None
        channels = mid_channels if reduces else in_channels
        self.convs = nn.ModuleList()
        for _ in range(layers):
            self.convs.append(_conv3x3(channels, mid_channels, depthwise=depthwise))
            channels = mid_channels
        self.aggregate = ConvBN(in_channels + layers * mid_channels, out_channels)
        self.ese = EffectiveSqueezeExcite(out_channels) if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [x +] [eSE](1x1([x, y1, ..., yn]))."""
        maps = [x]
        y: Tensor = x if self.reduce is None else self.reduce(x)
        for conv in self.convs:
            y = conv(y)
            maps.append(y)
        y = self.aggregate(torch.cat(maps, 1))
        if self.ese is not None:
            y = self.ese(y)
        return x + y if self.identity else y


class Stem(nn.Module):
    """The first two convolutions, (N, C, H, W) -> (N, widths[1], H / 2, W / 2)."""

    def __init__(self, in_channels: int, widths: Sequence[int], *, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, widths[0], 3, stride=2)
        self.conv2 = _conv3x3(widths[0], widths[1], depthwise=depthwise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the finest feature map."""
        y: Tensor = self.conv2(self.conv1(x))
        return y


class VoVNet(ImageClassifier):
    """Both versions: two convolutions at stride 2, four stages; a stage's first layer downsamples.

    `squeeze_excite` says which modules of a stage have eSE, `identity` whether all but its first
    add their input.
    """

    def __init__(
        self,
        *,
        stem_widths: Sequence[int],
        mid_widths: Sequence[int],
        widths: Sequence[int],
        depths: Sequence[int],
        layers: int,
        identity: bool = False,
        squeeze_excite: Literal["none", "last", "every"] = "none",
        depthwise: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        *widths_at_2, channels = stem_widths
        stem = Stem(in_chans, widths_at_2, depthwise=depthwise)
        feature_info = [{"num_chs": widths_at_2[-1], "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        downsample = _conv3x3(widths_at_2[-1], channels, stride=2, depthwise=depthwise)
        for index, (mid, width, depth) in enumerate(zip(mid_widths, widths, depths, strict=True)):
            stage = nn.Sequential(downsample)
            for module in range(depth):
                gated = squeeze_excite == "every" or (
                    squeeze_excite == "last" and module == depth - 1
                )
                stage.append(
                    OSA(
                        channels,
                        mid,
                        width,
                        layers=layers,
                        identity=identity and module > 0,
                        squeeze_excite=gated,
                        depthwise=depthwise,
                    )
                )
                channels = width
            stages.append(stage)
            downsample = CeilMaxPool()
            feature_info.append(
                {"num_chs": width, "reduction": 4 * 2**index, "module": f"stages.{index}"}
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
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
