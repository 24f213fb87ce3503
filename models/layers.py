"""The layers that every family is made of: convolution with BatchNorm, and channel gates.

What has to be *correct* in all families stands here once; blocks are written out in each family.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from .fuse import DeployBlock, FusableBlock, Kernel, fold_conv_bn, make_conv

__all__ = ["Activation", "ConvBN", "SqueezeExcite", "relu", "relu6"]

#: Makes an activation, such as `relu` or `nn.SiLU`.
Activation = Callable[[], nn.Module]

relu: Activation = partial(nn.ReLU, inplace=True)
relu6: Activation = partial(nn.ReLU6, inplace=True)


class ConvBN(FusableBlock):
    """act(BN(conv(x))), (N, C_in, H, W) -> (N, C_out, H / stride, W / stride), padding size // 2.

    `act=None` ends in BatchNorm ("linear"). `padding` is another margin than size // 2; `same` pads
    as TensorFlow's "SAME" does: at stride 2 on an even input only below and to the right. `bias`
    puts one in front of BatchNorm, as some public weights have it. `eps` and `momentum` are
    BatchNorm's, in PyTorch's sense. Fused, it is a convolution with bias and the activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        act: Activation | None = relu,
        padding: int | None = None,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        same: bool = False,
    ) -> None:
        super().__init__()
        kind = Conv2dSame if same and stride > 1 else nn.Conv2d
        margin = size // 2 if padding is None else padding
        self.conv: nn.Conv2d = kind(
            in_channels,
            out_channels,
            size,
            stride,
            0 if kind is Conv2dSame else margin,
            groups=groups,
            bias=bias,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act = nn.Identity() if act is None else act()

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.conv.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return act(BN(conv(x)))."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y

    def kernel(self) -> Kernel:
        """Return convolution and BatchNorm as one kernel (the activation is not part of it)."""
        return fold_conv_bn(self.conv, self.bn)

    def fused(self) -> DeployBlock:
        """Return the convolution with bias, then the activation where there is one."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = make_conv(self.kernel(), like=self.conv)
        if not isinstance(self.act, nn.Identity):
            layers["act"] = copy.deepcopy(self.act)
        return DeployBlock(layers)


class SqueezeExcite(nn.Module):
    """Channel gate x * gate(fc2(act(fc1(mean(x))))), arXiv 1709.01507; (N, C, H, W) -> the same.

    `hidden` is the squeezed width; `gate` a sigmoid (default) or a hard sigmoid.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        act: Activation = relu,
        gate: Activation = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated map, same shape."""
        squeezed: Tensor = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))
        gate: Tensor = self.gate(squeezed)
        return x * gate
