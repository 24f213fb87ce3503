r"""RepOpt-VGG: Re-parameterizing Your Optimizers rather than Architectures (Ding et al.).

arXiv 2205.15242, ICLR 2023. A plain VGG body whose prior lives in the optimizer: RepVGG's branches
exist only on paper, as a block whose scales s, t are constants per output channel (CSLA, section
3.2). A convolution that starts where that block would start and whose gradient is multiplied by a
constant moves exactly as that block would move::

        imaginary CSLA block                     what is trained
                 x                                      x
         ┌───────┼────────┐                             │
       3x3/s   1x1/s   identity                       3x3/s    start: s*K3 + pad(t*K1) + u*I
        * s     * t      * u                            │      gradient: * s^2; at the centre
         └───────+────────┘                            BN        * (s^2 + t^2), + 1 on the diagonal
                BN ReLU                               ReLU       of blocks with an identity

(multipliers of SGD; AdamW's have the first powers of s and t). The identity branch exists where
the block keeps shape; its u is trained. The body is RepVGG's: a stem of min(64, 64a) channels and
four stages that open with stride 2 (section 4.1); the table of variants is in repoptvgg_specs.py.

Differs from the paper in: the network is the paper's; its optimizer and the search of the scales
are not in this file. Weights drawn here start with the scales that the search starts with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .classifier import ImageClassifier
from .layers import ConvBN
from .layouts import STAGES_0_TO_4
from .repvgg import create_body

__all__ = ["KEY_LAYOUTS", "RepOptVGG"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "official": (
        *STAGES_0_TO_4,
        (r"^linear\.", r"head.fc."),
    ),
}


@torch.no_grad()
def start_as_block(layer: ConvBN, position: int) -> None:
    """Give a 3x3 layer the kernel that the imaginary block in its place starts with.

    s = t = sqrt(2 / i) for the i-th block of a stage, 1 for the one that opens it, and u = 1
    (section 4.1); K3 and K1 are drawn as PyTorch draws any convolution. Without the identity the
    deep stages hardly start to learn.
    """
    conv, scale = layer.conv, (2.0 / position) ** 0.5 if position else 1.0
    pointwise = nn.Conv2d(
        conv.in_channels, conv.out_channels, 1, bias=False, device=conv.weight.device
    )
    conv.weight.add_(F.pad(pointwise.weight, (1, 1, 1, 1))).mul_(scale)
    if conv.in_channels == conv.out_channels and conv.stride == (1, 1):
        conv.weight[:, :, 1, 1].diagonal().add_(1.0)


class RepOptVGG(ImageClassifier):
    """The target model: every layer is 3x3 convolution, BatchNorm, ReLU."""

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
        stem, stages, feature_info = create_body(
            partial(ConvBN, size=3), in_chans, depths=depths, stem_width=stem_width, widths=widths
        )
        for layers in ([stem], *stages):
            for position, layer in enumerate(layers):
                start_as_block(layer, position)
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
