r"""RepVGG: Making VGG-style ConvNets Great Again (Ding et al., arXiv 2101.03697, CVPR 2021).

Trained as three parallel branches, deployed as one 3x3 convolution per layer::

          train form                        deploy form
              x                                  x
      ┌───────┼────────────┐                     │
    3x3/s   1x1/s      identity          3x3/s with bias      K = K3 + pad(K1) + I, each
     BN      BN           BN                     │                scaled by its BatchNorm
      └───────+────────────┘                     │            b = sum of the BN shifts
           [SE] ReLU                         [SE] ReLU

Section 3.3 and Figure 4 of the paper; the identity branch exists where the block keeps shape
(in == out, stride 1). D2se (official repository) puts a squeeze-and-excitation, ratio 1/16,
between the sum and the ReLU. In the g2/g4 variants every second layer, counted from the stem as 0,
is grouped (section 3.4). The table of variants is in repvgg_specs.py.

Differs from the paper in: nothing in eval mode. Initialisation is PyTorch's default, as in the
official repository (timm draws the branch BatchNorm gammas from N(0.1, 0.1) instead).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from .classifier import ImageClassifier
from .fuse import (
    DeployBlock,
    FusableBlock,
    Kernel,
    fold_bn,
    identity_kernel,
    make_conv,
    pad_to,
)
from .layers import ConvBN, SqueezeExcite, relu
from .layouts import STAGES_0_TO_4, stage_from_one

__all__ = ["KEY_LAYOUTS", "RepVGG", "RepVGGBlock", "create_body"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "timm": (
        (r"\.conv_kxk\.(conv|bn)\.", r".branch_3x3.\1."),
        (r"\.conv_1x1\.(conv|bn)\.", r".branch_1x1.\1."),
        (r"\.identity\.", r".branch_identity."),
        (r"\.attn\.fc(\d)\.", r".se.fc\1."),
    ),
    "official": (
        *STAGES_0_TO_4,
        (r"\.rbr_dense\.", r".branch_3x3."),
        (r"\.rbr_1x1\.", r".branch_1x1."),
        (r"\.rbr_identity\.", r".branch_identity."),
        (r"\.se\.down\.", r".se.fc1."),
        (r"\.se\.up\.", r".se.fc2."),
        (r"^linear\.", r"head.fc."),
    ),
    "openmmlab": (
        (r"^backbone\.", r""),
        (r"^stage_([1-4])\.", stage_from_one),
        (r"\.(branch_\dx\d)\.norm\.", r".\1.bn."),
        (r"\.branch_norm\.", r".branch_identity."),
        (r"\.se_layer\.conv(\d)\.conv\.", r".se.fc\1."),
    ),
}


class RepVGGBlock(FusableBlock):
    """One layer in train form, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        groups: int = 1,
        squeeze_excite: bool = False,
    ) -> None:
        super().__init__()
        branch = partial(ConvBN, in_channels, out_channels, stride=stride, groups=groups, act=None)
        self.branch_3x3 = branch(3)
        self.branch_1x1 = branch(1)
        keeps_shape = in_channels == out_channels and stride == 1
        self.branch_identity = nn.BatchNorm2d(in_channels) if keeps_shape else None
        self.se = (
            SqueezeExcite(out_channels, max(1, out_channels // 16)) if squeeze_excite else None
        )
        self.act = relu()

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.branch_3x3.conv.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(SE(3x3 + 1x1 + identity))."""
        y: Tensor = self.branch_3x3(x) + self.branch_1x1(x)
        if self.branch_identity is not None:
            y = y + self.branch_identity(x)
        if self.se is not None:
            y = self.se(y)
        activated: Tensor = self.act(y)
        return activated

    def kernel(self) -> Kernel:
        """Return the sum of the branches as one 3x3 kernel (section 3.3, Figure 4)."""
        kernel = self.branch_3x3.kernel() + pad_to(self.branch_1x1.kernel(), 3)
        if self.branch_identity is None:
            return kernel
        conv = self.branch_3x3.conv
        identity = identity_kernel(
            conv.in_channels, groups=conv.groups, size=3, device=conv.weight.device
        )
        return kernel + fold_bn(identity, self.branch_identity)

    def fused(self) -> DeployBlock:
        """Return convolution, SE where there is one, ReLU."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = make_conv(self.kernel(), like=self.branch_3x3.conv)
        if self.se is not None:
            layers["se"] = copy.deepcopy(self.se)
        layers["act"] = relu()
        return DeployBlock(layers)


class VGGBlock(Protocol):
    """Makes one layer of a RepVGG body, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __call__(
        self, in_channels: int, out_channels: int, *, stride: int, groups: int
    ) -> nn.Module: ...


def create_body(
    block: VGGBlock,
    in_chans: int,
    *,
    depths: Sequence[int],
    stem_width: int,
    widths: Sequence[int],
    groups: int = 1,
) -> tuple[nn.Module, nn.Sequential, list[dict[str, Any]]]:
    """Return stem, stages and `feature_info` of Table 2's body: every stage opens with stride 2.

    The networks after RepVGG have the same with blocks of their own. Every second layer, counted
    from the stem as 0, has `groups` groups (section 3.4).
    """
    stem = block(in_chans, stem_width, stride=2, groups=1)
    feature_info: list[dict[str, Any]] = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
    stages = nn.Sequential()
    channels, layer = stem_width, 1
    for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        stage = nn.Sequential()
        for position in range(depth):
            stage.append(
                block(
                    channels,
                    width,
                    stride=2 if position == 0 else 1,
                    groups=groups if layer % 2 == 0 else 1,
                )
            )
            channels, layer = width, layer + 1
        stages.append(stage)
        feature_info.append(
            {"num_chs": width, "reduction": 4 * 2**index, "module": f"stages.{index}"}
        )
    return stem, stages, feature_info


class RepVGG(ImageClassifier):
    """The network of Table 2: a stem and four stages, each opening with stride 2."""

    def __init__(
        self,
        *,
        depths: Sequence[int],
        stem_width: int,
        widths: Sequence[int],
        groups: int = 1,
        squeeze_excite: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        block = partial(RepVGGBlock, squeeze_excite=squeeze_excite)
        stem, stages, feature_info = create_body(
            block, in_chans, depths=depths, stem_width=stem_width, widths=widths, groups=groups
        )
        super().__init__(
            stem=stem,
            stages=stages,
            feature_info=feature_info,
            num_features=widths[-1],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
