r"""VGG: Very Deep Convolutional Networks for Large-Scale Image Recognition
(Simonyan & Zisserman, arXiv 1409.1556, ICLR 2015).

Nothing but 3x3 convolutions, and a head that holds nine tenths of the parameters::

    two 3x3 in place of one 5x5, three in place of one 7x7: the same field of view with fewer
    weights and more ReLUs (section 2.3)

      224    112      56       28       14     7
    64 64 | 128 128 | 256 x3 | 512 x3 | 512 x3 | -> fc 4096 -> fc 4096 -> fc 1000
         2x2 max-pool between stages          2x2

Table 1, column D (16 weight layers); every convolution has a bias, a ReLU behind it and, in the
`_bn` variants, BatchNorm (arXiv 1502.03167) in between; fused, those are the plain network. The
head reads a 7x7 map: one of another size is pooled to it (as in torchvision), so any input size
works. Dropout is behind either hidden layer. Initialisation is torchvision's: He-normal
convolutions (arXiv 1502.01852), linear layers of standard deviation 0.01. The table of variants is
in vgg_specs.py.

Differs from the paper in: the paper initialised from a trained shallower network (section 3.1) and
tested its fully connected layers as convolutions over the whole image (section 3.2).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from torch import Tensor, nn

from .classifier import ImageClassifier, NeckHead
from .layers import ConvBN, relu

__all__ = ["KEY_LAYOUTS", "VGG", "FullyConnected", "VGGHead"]

#: Column D of Table 1, the one that the public layouts below number.
_DEPTHS = (2, 2, 3, 3, 3)


def _numbered(parts: Sequence[str], *, pool: int) -> Callable[[re.Match[str]], str]:
    """Return what turns number match[1] in a flat list of modules into a place in our stages.

    A layer takes one number for each of `parts`, a max-pool `pool` numbers.
    """
    places: list[str] = []
    for index, depth in enumerate(_DEPTHS):
        for layer in range(depth):
            # the max-pool in front is layer 0 of all stages but the stem
            name = f"stem.{layer}" if index == 0 else f"stages.{index - 1}.{layer + 1}"
            places.extend(f"{name}{part}" for part in parts)
        places.extend([""] * pool)

    def place(match: re.Match[str]) -> str:
        number = int(match[1])
        found = places[number] if number < len(places) else ""
        return f"{found}." if found else match[0]

    return place


_PLAIN = (r"^features\.(\d+)\.", _numbered((".conv", ""), pool=1))
_WITH_BN = (r"^features\.(\d+)\.", _numbered((".conv", ".bn", ""), pool=1))
_CLASSIFIER = (
    (r"^classifier\.0\.", r"head.neck.fc1."),
    (r"^classifier\.3\.", r"head.neck.fc2."),
    (r"^classifier\.6\.", r"head.fc."),
)
_TIMM_HEAD = ((r"^pre_logits\.", r"head.neck."),)

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "torchvision": (_PLAIN, *_CLASSIFIER),
    "torchvision_bn": (_WITH_BN, *_CLASSIFIER),
    "timm": (_PLAIN, *_TIMM_HEAD),
    "timm_bn": (_WITH_BN, *_TIMM_HEAD),
    "openmmlab": (
        (r"^backbone\.", r""),
        (r"^features\.(\d+)\.", _numbered(("",), pool=1)),
        *_CLASSIFIER,
    ),
    "pytorchcv": (
        (r"^features\.stage1\.unit(\d)\.", lambda match: f"stem.{int(match[1]) - 1}."),
        (
            r"^features\.stage([2-5])\.unit(\d)\.",
            lambda match: f"stages.{int(match[1]) - 2}.{match[2]}.",
        ),
        (r"^output\.fc([12])\.fc\.", r"head.neck.fc\1."),
        (r"^output\.fc3\.", r"head.fc."),
    ),
}


def _layer(in_channels: int, out_channels: int, batch_norm: bool) -> nn.Module:
    if batch_norm:
        # BatchNorm takes the bias away again; the public weights have it
        return ConvBN(in_channels, out_channels, 3, bias=True)
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, act=relu()))


class Stem(nn.ModuleList):
    """The layers in front of the first max-pool, (N, C_in, H, W) -> (N, C, H, W).

    No nn.Sequential: timm's feature extractor would give those apart.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of full size."""
        for layer in self:
            x = layer(x)
        return x


@torch.no_grad()
def _initialise(layer: nn.Linear) -> None:
    """Give weights the deviation 0.01: PyTorch's uniform draw, of 1 / sqrt(3 inputs), scaled."""
    layer.weight *= 0.01 * (3 * layer.in_features) ** 0.5
    nn.init.zeros_(layer.bias)


class FullyConnected(nn.Module):
    """The two hidden layers, (N, C, 7, 7) -> (N, hidden_size)."""

    def __init__(self, in_channels: int, hidden_size: int, *, drop_rate: float) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.fc1 = nn.Linear(in_channels * 7 * 7, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.act = relu()
        self.drop = nn.Dropout(drop_rate)
        _initialise(self.fc1)
        _initialise(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(fc2(dropout(ReLU(fc1(x)))))."""
        y: Tensor = self.act(self.fc2(self.drop(self.act(self.fc1(x.flatten(1))))))
        return y


class VGGHead(NeckHead):
    """Pooling to 7x7, two hidden layers, dropout, linear: (N, C, H, W) -> (N, num_classes).

    The pooling is named as everywhere, but leaves 7x7. With `pool_type=""` the hidden layers, which
    need its 7x7, go with it: the output is the map itself; a pooling named later makes new ones.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        hidden_size: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__(
            nn.Identity(),
            hidden_size=in_channels,
            num_classes=0,
            global_pool="",
            drop_rate=drop_rate,
        )
        self.hidden_size = hidden_size
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the linear layer, and the pooling if one is named."""
        if pool_type == "" and isinstance(self.neck, FullyConnected):
            self.num_features = self.neck.in_channels
            self.neck = nn.Identity()
        elif pool_type and not isinstance(self.neck, FullyConnected):
            self.neck = FullyConnected(self.num_features, self.hidden_size, drop_rate=self.drop.p)
            self.num_features = self.hidden_size
        super().reset(num_classes, pool_type)
        if pool_type:
            kind = pool_type.removeprefix("fast") or "avg"
            self.global_pool = SelectAdaptivePool2d(7, pool_type=kind)
        if isinstance(self.fc, nn.Linear):
            _initialise(self.fc)
        self.train(self.training)


class VGG(ImageClassifier):
    """The network of Table 1, its max-pools each in front of a stage, the last one `final`."""

    def __init__(
        self,
        *,
        batch_norm: bool,
        depths: Sequence[int] = _DEPTHS,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        hidden_size: int = 4096,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem = Stem()
        stages = nn.Sequential()
        feature_info = []
        channels = in_chans
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage: nn.ModuleList | nn.Sequential = stem
            if index > 0:
                stage = nn.Sequential(nn.MaxPool2d(2))
                stages.append(stage)
            for _ in range(depth):
                stage.append(_layer(channels, width, batch_norm))
                channels = width
            name = f"stages.{index - 1}" if index else "stem"
            feature_info.append({"num_chs": width, "reduction": 2**index, "module": name})
        feature_info.append({"num_chs": channels, "reduction": 2 ** len(depths), "module": "final"})
        super().__init__(
            stem=stem,
            stages=stages,
            final=nn.MaxPool2d(2),
            head=VGGHead(
                channels,
                hidden_size=hidden_size,
                num_classes=num_classes,
                global_pool=global_pool,
                drop_rate=drop_rate,
            ),
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
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
