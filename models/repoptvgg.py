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
are not in this file, so that weights drawn here start as an ordinary VGG's do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .classifier import ImageClassifier
from .layers import ConvBN

__all__ = ["KEY_LAYOUTS", "RepOptVGG"]

#: Regular expressions that turn a public state dict's keys into ours, by layout.
KEY_LAYOUTS = {
    "official": (
        (r"^stage0\.", r"stem."),
        (r"^stage([1-4])\.", lambda match: f"stages.{int(match[1]) - 1}."),
        (r"^linear\.", r"head.fc."),
    ),
}


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
        stem = ConvBN(in_chans, stem_width, 3, stride=2)
        feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        channels = stem_width
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            for block in range(depth):
                stage.append(ConvBN(channels, width, 3, stride=2 if block == 0 else 1))
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
