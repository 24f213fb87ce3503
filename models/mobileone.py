r"""MobileOne: An Improved One Millisecond Mobile Backbone (Vasu et al.).

arXiv 2206.04040, CVPR 2023. MobileNet-V1's pairs of depthwise and pointwise convolution, each of
the two trained over-parameterised, as k equal branches and two cheap ones::

        train form                                      deploy form
             x                                               x
    ┌────────┼─────────┬──────────┐                          │
  k of     (1x1/s   (identity)    depthwise: size 3        size/s with bias
  size/s    BN)        BN         pointwise: size 1,         │
   BN        │         │            no 1x1 branch         [SE] ReLU
    └────────+─────────┘
         [SE] ReLU                K = sum of the k kernels + pad(K1) + I, each scaled by its BN

Section 3.3 and Figure 3 of the paper. The 1x1 "scale" branch is there where size > 1, the identity
where the block keeps shape (in == out, stride 1). A stage opens with a depthwise block of stride 2;
the stem is one such block with an ordinary 3x3 convolution and k = 1. k is 4 in S0 and 1 in the
others; S4 has squeeze-and-excitation, ratio 1/16, in both halves of its last 5 + 1 pairs. The
table of variants is in mobileone_specs.py.

Differs from the paper in: nothing in eval mode. Initialisation is PyTorch's default, as in the
official repository (apple/ml-mobileone).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import cast

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
from .layouts import STAGES_0_TO_4

__all__ = ["KEY_LAYOUTS", "MobileOne", "MobileOneBlock"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "timm": (
        (r"\.conv_kxk\.", r".branch_convs."),
        (r"\.conv_scale\.", r".branch_1x1."),
        (r"\.identity\.", r".branch_identity."),
        (r"\.attn\.fc(\d)\.", r".se.fc\1."),
    ),
    "official": (
        *STAGES_0_TO_4,
        (r"\.rbr_conv\.", r".branch_convs."),
        (r"\.rbr_scale\.", r".branch_1x1."),
        (r"\.rbr_skip\.", r".branch_identity."),
        (r"\.se\.reduce\.", r".se.fc1."),
        (r"\.se\.expand\.", r".se.fc2."),
        (r"^linear\.", r"head.fc."),
    ),
    "openmmlab": (
        (r"^backbone\.", r""),
        *STAGES_0_TO_4,
        (r"\.branch_conv_list\.(\d+)\.norm\.", r".branch_convs.\1.bn."),
        (r"\.branch_conv_list\.", r".branch_convs."),
        (r"\.branch_scale\.norm\.", r".branch_1x1.bn."),
        (r"\.branch_scale\.", r".branch_1x1."),
        (r"\.branch_norm\.", r".branch_identity."),
        (r"\.se\.conv(\d)\.conv\.", r".se.fc\1."),
    ),
}


class MobileOneBlock(FusableBlock):
    """One layer in train form, (N, C_in, H, W) -> (N, C_out, H / stride, W / stride).

    `branches` counts the equal branches of `size` (the paper's k).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        branches: int = 1,
        squeeze_excite: bool = False,
    ) -> None:
        super().__init__()
        branch = partial(ConvBN, in_channels, out_channels, stride=stride, groups=groups, act=None)
        self.branch_convs = nn.ModuleList(branch(size) for _ in range(branches))
        self.branch_1x1 = branch(1) if size > 1 else None
        keeps_shape = in_channels == out_channels and stride == 1
        self.branch_identity = nn.BatchNorm2d(in_channels) if keeps_shape else None
        self.se = SqueezeExcite(out_channels, out_channels // 16) if squeeze_excite else None
        self.act = relu()

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self._conv_branches()[0].in_channels

    def _conv_branches(self) -> list[ConvBN]:
        return cast(list[ConvBN], list(self.branch_convs))

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(SE(sum of the branches))."""
        y: Tensor = reduce(add, [branch(x) for branch in self.branch_convs])
        if self.branch_1x1 is not None:
            y = y + self.branch_1x1(x)
        if self.branch_identity is not None:
            y = y + self.branch_identity(x)
        if self.se is not None:
            y = self.se(y)
        activated: Tensor = self.act(y)
        return activated

    def kernel(self) -> Kernel:
        """Return the sum of the branches as one kernel of the block's size (section 3.3)."""
        conv = self._conv_branches()[0].conv
        size = conv.kernel_size[0]
        kernels = [branch.kernel() for branch in self._conv_branches()]
        if self.branch_1x1 is not None:
            kernels.append(pad_to(self.branch_1x1.kernel(), size))
        if self.branch_identity is not None:
            identity = identity_kernel(
                conv.in_channels, groups=conv.groups, size=size, device=conv.weight.device
            )
            kernels.append(fold_bn(identity, self.branch_identity))
        return reduce(add, kernels)

    def fused(self) -> DeployBlock:
        """Return convolution, SE where there is one, ReLU."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = make_conv(self.kernel(), like=self._conv_branches()[0].conv)
        if self.se is not None:
            layers["se"] = copy.deepcopy(self.se)
        layers["act"] = relu()
        return DeployBlock(layers)


class MobileOne(ImageClassifier):
    """A stem and four stages of pairs (depthwise, pointwise), each opening with stride 2.

    `depths` and `se_depths` count pairs: a stage's last `se_depths` pairs have SE.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        stem_width: int,
        widths: Sequence[int],
        branches: int = 1,
        se_depths: Sequence[int] = (0, 0, 0, 0),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem = MobileOneBlock(in_chans, stem_width, 3, stride=2)
        feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        channels = stem_width
        for index, (depth, width, se_depth) in enumerate(
            zip(depths, widths, se_depths, strict=True)
        ):
            stage = nn.Sequential()
            for pair in range(depth):
                block = partial(
                    MobileOneBlock, branches=branches, squeeze_excite=pair >= depth - se_depth
                )
                stride = 2 if pair == 0 else 1
                stage.append(block(channels, channels, 3, stride=stride, groups=channels))
                stage.append(block(channels, width, 1))
                channels = width
            stages.append(stage)
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
