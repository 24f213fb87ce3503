r"""Searching for MobileNetV3 (Howard et al., arXiv 1905.02244, ICCV 2019).

MobileNetV2's inverted residual with a squeeze-and-excitation on the wide middle (Figure 4), kernels
and widths found by search, and activations that need no exponential (section 5.2)::

                     x (C)
      ┌────────────────┤
      │       1x1 -> E, BN, NL             expand; not there when E = C
      │       DW kxk/s, BN, NL ────┐
      │                │         mean ── 1x1 -> E/4, ReLU ── 1x1 -> E, hard-sigmoid
      │                × ◄─────────────────────────────────────┘     where the table ticks SE
      │       1x1 -> C', BN
      └─────────────── +                   only if s = 1 and C = C'

      last stage (Figure 5):  1x1 -> 960, BN, HS ── mean ── 1x1 -> 1280 with bias, HS ── linear

    hard-sigmoid(x) = ReLU6(x + 3) / 6,   hard-swish(x) = x * hard-sigmoid(x)

E/4 is rounded to multiples of 8. Table 1 (large) and Table 2 (small) are in mobilenetv3_specs.py,
which also says what eps and padding the three public families of weights were trained with. A width
multiplier scales C to multiples of 8, and E in the proportion E / C of the table; the stem and the
1280 (small: 1024) of the head stay.

Differs from the paper in: no squeeze-and-excitation on the last convolution of the small network,
where Table 2 ticks it, as in every public implementation, the authors' included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from timm.layers.helpers import make_divisible
from torch import Tensor, nn

from .classifier import ImageClassifier, NeckHead
from .layers import Activation, ConvBN, SqueezeExcite, relu
from .layouts import block_places, look_up

__all__ = ["KEY_LAYOUTS", "Bneck", "InvertedResidual", "MobileNetV3"]

#: A row of Table 1 or 2: kernel, expanded width, width, SE or not, "RE" or "HS", stride.
Bneck = tuple[int, int, int, bool, str, int]

_ACTIVATIONS: dict[str, Activation] = {"RE": relu, "HS": nn.Hardswish}

#: Blocks in the stages of the large and the small network; behind them comes the last convolution.
_LARGE, _SMALL = (1, 2, 3, 4, 2, 3), (1, 2, 3, 2, 3)


def _timm(depths: Sequence[int]) -> tuple[tuple[str, str], ...]:
    return (
        (r"^conv_stem\.", r"stem.conv."),
        (r"^bn1\.", r"stem.bn."),
        (rf"^blocks\.{len(depths)}\.0\.conv\.", r"final.conv."),
        (rf"^blocks\.{len(depths)}\.0\.bn1\.", r"final.bn."),
        (r"^blocks\.0\.0\.conv_dw\.", r"stages.0.0.depthwise.conv."),
        (r"^blocks\.0\.0\.bn1\.", r"stages.0.0.depthwise.bn."),
        (r"^blocks\.0\.0\.conv_pw\.", r"stages.0.0.project.conv."),
        (r"^blocks\.0\.0\.bn2\.", r"stages.0.0.project.bn."),
        (r"^blocks\.", r"stages."),
        (r"\.conv_pw\.", r".expand.conv."),
        (r"\.bn1\.", r".expand.bn."),
        (r"\.conv_dw\.", r".depthwise.conv."),
        (r"\.bn2\.", r".depthwise.bn."),
        (r"\.se\.conv_reduce\.", r".se.fc1."),
        (r"\.se\.conv_expand\.", r".se.fc2."),
        (r"\.conv_pwl\.", r".project.conv."),
        (r"\.bn3\.", r".project.bn."),
        (r"^conv_head\.", r"head.neck.conv."),
        (r"^classifier\.", r"head.fc."),
    )


def _numbered(
    prefix: str, depths: Sequence[int], rules: Sequence[tuple[str, str]]
) -> tuple[tuple[str, object], ...]:
    """Return the rules of a layout that numbers stem, blocks and last convolution through."""
    places = {"0": "stem.", **block_places(depths, first=1), str(sum(depths) + 1): "final."}
    return ((rf"^{prefix}(\d+)\.", look_up(places)), *rules)


_TORCHVISION = (
    (r"^(stem|final)\.0\.", r"\1.conv."),
    (r"^(stem|final)\.1\.", r"\1.bn."),
    (r"\.block\.\d\.(fc[12])\.", r".se.\1."),
    (r"^stages\.0\.0\.block\.0\.", r"stages.0.0.depthwise."),  # the one without expand
    (r"^stages\.0\.0\.block\.[12]\.", r"stages.0.0.project."),
    (r"\.block\.0\.", r".expand."),
    (r"\.block\.1\.", r".depthwise."),
    (r"\.block\.[23]\.", r".project."),
    (r"\.(expand|depthwise|project)\.0\.", r".\1.conv."),
    (r"\.(expand|depthwise|project)\.1\.", r".\1.bn."),
    (r"^classifier\.0\.", r"head.neck.conv."),
    (r"^classifier\.3\.", r"head.fc."),
)
_OPENMMLAB = (
    (r"\.(expand|depthwise)_conv\.", r".\1."),
    (r"\.linear_conv\.", r".project."),
    (r"\.se\.conv([12])\.conv\.", r".se.fc\1."),
    (r"^head\.layers\.0\.fc\.", r"head.neck.conv."),
    (r"^head\.layers\.1\.fc\.", r"head.fc."),
)

#: Rules that turn a public state dict's keys into ours, by layout. The last convolution of the
#: small network has the number of a block of the large one, hence two of each.
KEY_LAYOUTS = {
    "timm": _timm(_LARGE),
    "timm_small": _timm(_SMALL),
    "torchvision": _numbered(r"features\.", _LARGE, _TORCHVISION),
    "torchvision_small": _numbered(r"features\.", _SMALL, _TORCHVISION),
    "openmmlab": _numbered(r"backbone\.layer", _LARGE, _OPENMMLAB),
    "openmmlab_small": _numbered(r"backbone\.layer", _SMALL, _OPENMMLAB),
}


class InvertedResidual(nn.Module):
    """A "bneck" of Figure 4: (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    `conv_bn` is `ConvBN` with the network's eps, momentum and padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: int,
        expanded: int,
        squeeze_excite: bool,
        act: Activation,
        stride: int,
        conv_bn: partial[ConvBN],
    ) -> None:
        super().__init__()
        self.expand = (
            nn.Identity() if expanded == in_channels else conv_bn(in_channels, expanded, act=act)
        )
        self.depthwise = conv_bn(expanded, expanded, size, stride=stride, groups=expanded, act=act)
        self.se = (
            SqueezeExcite(expanded, make_divisible(expanded / 4), gate=nn.Hardsigmoid)
            if squeeze_excite
            else nn.Identity()
        )
        self.project = conv_bn(expanded, out_channels, act=None)
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return project(SE(depthwise(expand(x)))), plus x where that fits."""
        y: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.has_residual else y


class MobileNetV3(ImageClassifier):
    """The network of Table 1 or 2; `stages` are its rows, `width` the multiplier.

    `act` is the activation of the stem, the last convolution and the head. `eps` and `momentum` are
    BatchNorm's, `same` is TensorFlow's padding.
    """

    def __init__(
        self,
        *,
        stages: Sequence[Sequence[Bneck]],
        stem_width: int,
        final_width: int,
        head_width: int,
        width: float = 1.0,
        act: str = "HS",
        eps: float = 1e-5,
        momentum: float = 0.1,
        same: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        conv_bn = partial(ConvBN, eps=eps, momentum=momentum, same=same)
        activation = _ACTIVATIONS[act]
        stem = conv_bn(in_chans, stem_width, 3, stride=2, act=activation)
        reduction = 2
        # by reduction: of several modules at one resolution the last gives the map
        maps = {reduction: {"num_chs": stem_width, "reduction": reduction, "module": "stem"}}
        built = nn.Sequential()
        channels = unscaled = stem_width
        for index, rows in enumerate(stages):
            stage = nn.Sequential()
            for size, expanded, out, squeeze_excite, nonlinearity, stride in rows:
                out_channels = make_divisible(out * width)
                stage.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        size=size,
                        expanded=make_divisible(channels * expanded / unscaled),
                        squeeze_excite=squeeze_excite,
                        act=_ACTIVATIONS[nonlinearity],
                        stride=stride,
                        conv_bn=conv_bn,
                    )
                )
                channels, unscaled = out_channels, out
                reduction *= stride
            built.append(stage)
            maps[reduction] = {
                "num_chs": channels, "reduction": reduction, "module": f"stages.{index}"
            }  # fmt: skip
        final_width = make_divisible(final_width * width)
        maps[reduction] = {"num_chs": final_width, "reduction": reduction, "module": "final"}
        neck = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(final_width, head_width, 1), act=activation())
        )
        super().__init__(
            stem=stem,
            stages=built,
            final=conv_bn(channels, final_width, act=activation),
            head=NeckHead(
                neck,
                hidden_size=head_width,
                num_classes=num_classes,
                global_pool=global_pool,
                drop_rate=drop_rate,
            ),
            feature_info=list(maps.values()),
            num_features=final_width,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
