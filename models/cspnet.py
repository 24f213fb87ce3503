r"""CSPNet: A New Backbone that can Enhance Learning Capability of CNN.

Wang, Liao, Yeh, Wu, Chen, Hsieh; arXiv 1911.11929, CVPR Workshops 2020. A stage sends only a part
of its channels through the blocks; the rest crosses the stage and meets them at its end, so that
gradients are not duplicated and up to 20 % of the computation goes. Three layouts of it exist
(blk: the residual blocks; 1x1 and 3x3 are convolution, BatchNorm, activation)::

        "darknet"                      "timm"                          "cs3"
     the paper's authors     the ra_in1k weights of timm     after YOLOv5, timm's cs3*

            x                            x                             x
      [3x3/2 or pool]             [3x3/2 or pool]                  [3x3/2]
       ┌────┴────┐                      1x1                          1x1
      1x1       1x1                  split in two                split in two
     cross       │                   cross    │                   │       cross
       │        blk                    │     blk                 blk        │
       │        1x1                    │     1x1                  │         │
       └────┬────┘                     └──┬───┘                   └────┬────┘
     concat (blk, cross)          concat (cross, blk)          concat (blk, cross)
           1x1                          1x1                           1x1

Figure 3 (b) of the paper (transition -> concatenation -> transition). One 1x1 convolution and a
split of its channels are two 1x1 convolutions side by side, so the first two layouts are the same
function space, but for what the list below says.

Differs from the paper in: nothing in the `_darknet` networks, which are the authors' cfg files
(csresnet50, csresnext50, csdarknet53.cfg of WongKinYiu/CrossStagePartialNetworks): LeakyReLU 0.1,
max-pool 2x2/2 after the 7x7 stem, in the first stage of the ResNets 128 channels cross and 64
enter the blocks, whose first shortcut is partial (64 channels of 128), and the two 1x1 in front of
the blocks have no activation in stages 2 and 3. cspresnet50, cspresnext50 and cspdarknet53 are
timm's: LeakyReLU 0.01, max-pool 3x3/2, halves everywhere, no activation before the split in any
stage of the ResNets. cs3* are no paper's: SiLU and one transition only; "focus" is a stem of one
6x6/2 convolution (YOLOv5's Focus layer, written as convolution). Everywhere: initialisation is
PyTorch's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .classifier import ImageClassifier
from .layers import Activation, ConvBN, SqueezeExcite

__all__ = ["KEY_LAYOUTS", "CSPNet", "CrossStage"]

Layout = Literal["darknet", "timm", "cs3"]
Block = Literal["bottleneck", "dark", "edge"]

_ACTIVATIONS: dict[str, Activation] = {
    "leaky_0.1": partial(nn.LeakyReLU, 0.1, inplace=True),
    "leaky_0.01": partial(nn.LeakyReLU, 0.01, inplace=True),
    "silu": partial(nn.SiLU, inplace=True),
}

#: Regular expressions that turn a public state dict's keys into ours, by layout. The authors'
#: own weights are darknet files, no state dicts; parameters here lie in the order of those.
KEY_LAYOUTS = {
    "timm": (
        (r"^stem\.conv(\d)\.", lambda match: f"stem.convs.{int(match[1]) - 1}."),
        (r"^stages\.(\d)\.conv_down\.", r"stages.\1.0."),
        (r"^stages\.(\d)\.conv_exp\.", r"stages.\1.1.expand."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1.1.blocks."),
        (r"^stages\.(\d)\.conv_transition_b\.", r"stages.\1.1.block_transition."),
        (r"^stages\.(\d)\.conv_transition\.", r"stages.\1.1.transition."),
        (r"\.attn\.", r".se."),
    ),
    "openmmlab": (
        (r"^backbone\.", r""),
        (r"^stem\.(?:0\.)?(conv|bn)\.", r"stem.convs.0.\1."),
        (r"^stages\.(\d)\.downsample_conv\.", r"stages.\1.0."),
        (r"^stages\.(\d)\.expand_conv\.", r"stages.\1.1.expand."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1.1.blocks."),
        (r"^stages\.(\d)\.atfer_blocks_conv\.", r"stages.\1.1.block_transition."),
        (r"^stages\.(\d)\.final_conv\.", r"stages.\1.1.transition."),
        (r"\.conv(\d)\.weight$", r".conv\1.conv.weight"),
        (r"\.bn(\d)\.", r".conv\1.bn."),
    ),
}


class Bottleneck(nn.Module):
    """act(x + 1x1(3x3(1x1(x)))), (N, C_in, H, W) -> (N, C_out, H, W).

    Where C_in < C_out the shortcut is partial: x is added to the first C_in channels.
    """

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, *, groups: int, act: Activation
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.partial_shortcut = in_channels < out_channels
        self.conv1 = ConvBN(in_channels, hidden, act=act)
        self.conv2 = ConvBN(hidden, hidden, 3, groups=groups, act=act)
        self.conv3 = ConvBN(hidden, out_channels, act=None)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated sum."""
        y: Tensor = self.conv3(self.conv2(self.conv1(x)))
        if self.partial_shortcut:
            y = torch.cat((y[:, : self.in_channels] + x, y[:, self.in_channels :]), dim=1)
        else:
            y = y + x
        activated: Tensor = self.act(y)
        return activated


class DarkBlock(nn.Module):
    """x + conv2(SE(conv1(x))), (N, C, H, W) -> the same; the sum is not activated.

    Kernel `sizes` (1, 3) are DarkNet's, (3, 1) those of timm's edge block. `squeeze` is the width
    of the squeeze-and-excitation, 0 for none.
    """

    def __init__(
        self, channels: int, hidden: int, *, sizes: tuple[int, int], squeeze: int, act: Activation
    ) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, hidden, sizes[0], act=act)
        self.se = SqueezeExcite(hidden, squeeze, act=act) if squeeze else None
        self.conv2 = ConvBN(hidden, channels, sizes[1], act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        y = self.conv1(x)
        if self.se is not None:
            y = self.se(y)
        summed: Tensor = x + self.conv2(y)
        return summed


def _make_block(
    kind: Block,
    in_channels: int,
    hidden: int,
    channels: int,
    *,
    groups: int,
    se_ratio: float,
    act: Activation,
) -> nn.Module:
    if kind == "bottleneck":
        return Bottleneck(in_channels, hidden, channels, groups=groups, act=act)
    sizes = (1, 3) if kind == "dark" else (3, 1)
    squeeze = max(8, int(hidden * se_ratio + 4) // 8 * 8) if se_ratio else 0
    return DarkBlock(channels, hidden, sizes=sizes, squeeze=squeeze, act=act)


class CrossStage(nn.Module):
    """The stage behind its downsampling, as drawn above: (N, C_in, H, W) -> (N, C_out, H, W).

    `path` is the width of the cross path and of the blocks, `hidden` that inside the blocks,
    `entry` (darknet) what the first block is given, `linear_split` leaves the activation out in
    front of the paths. In the one-convolution layouts `expand` makes both paths; in darknet's
    `cross` and `entry` do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layout: Layout,
        block: Block,
        depth: int,
        path: int,
        hidden: int,
        act: Activation,
        entry: int | None = None,
        linear_split: bool = False,
        groups: int = 1,
        se_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        entry = path if entry is None else entry
        split_act = None if linear_split else act
        self.expand = self.cross = self.entry = self.block_transition = None
        if layout == "darknet":
            self.cross = ConvBN(in_channels, path, act=split_act)
            self.entry = ConvBN(in_channels, entry, act=split_act)
        else:
            self.expand = ConvBN(in_channels, path + entry, act=split_act)
        self.cross_first = layout == "timm"
        self.widths = (path, entry) if self.cross_first else (entry, path)
        make = partial(_make_block, block, groups=groups, se_ratio=se_ratio, act=act)
        self.blocks = nn.Sequential(
            *(make(path if index else entry, hidden, path) for index in range(depth))
        )
        if layout != "cs3":
            self.block_transition = ConvBN(path, path, act=act)
        self.transition = ConvBN(2 * path, out_channels, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fused paths."""
        if self.expand is None:
            assert self.cross is not None and self.entry is not None
            cross, y = self.cross(x), self.entry(x)
        else:
            first, second = self.expand(x).split(self.widths, dim=1)
            cross, y = (first, second) if self.cross_first else (second, first)
        y = self.blocks(y)
        if self.block_transition is not None:
            y = self.block_transition(y)
        both = (cross, y) if self.cross_first else (y, cross)
        fused: Tensor = self.transition(torch.cat(both, dim=1))
        return fused


class Stem(nn.Module):
    """Convolutions, the first with the stride: (N, C, H, W) -> (N, width, H / stride, W / stride).

    No nn.Sequential itself: timm's feature extractor would take it apart.
    """

    def __init__(
        self, in_chans: int, widths: Sequence[int], *, size: int, stride: int, act: Activation
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential()
        channels = in_chans
        for index, width in enumerate(widths):
            # 6x6/2 with padding 2 is space to depth by 2, then 3x3 (even sizes)
            padding = 2 if size == 6 else None
            step = 1 if index else stride
            self.convs.append(ConvBN(channels, width, size, stride=step, padding=padding, act=act))
            channels = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the stem's map."""
        y: Tensor = self.convs(x)
        return y


class CSPNet(ImageClassifier):
    """A stem and cross stages, each behind a 3x3/2 convolution or (the first one) a max-pool.

    The tables are per stage: `depths` blocks, `paths` and `hidden` as in `CrossStage`, `widths` the
    outputs. `pool_size` 3 or 2 puts a max-pool in the place of the first stage's convolution;
    with `down_grows` the 3x3/2 convolutions already make the stage's width, else they keep theirs.
    `first_entry` is darknet's narrower block path of the first stage.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        block: Block,
        act: str,
        stem_widths: Sequence[int],
        stem_size: int,
        stem_stride: int,
        depths: Sequence[int],
        paths: Sequence[int],
        hidden: Sequence[int],
        widths: Sequence[int],
        pool_size: int | None = None,
        down_grows: bool = False,
        first_entry: int | None = None,
        linear_split: Sequence[bool] | None = None,
        groups: int = 1,
        se_ratio: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        make_act = _ACTIVATIONS[act]
        stem = Stem(in_chans, stem_widths, size=stem_size, stride=stem_stride, act=make_act)
        channels = stem_widths[-1]
        feature_info = [{"num_chs": channels, "reduction": stem_stride, "module": "stem"}]
        linear_split = [False] * len(depths) if linear_split is None else linear_split
        stages = nn.Sequential()
        for index, (depth, path, width) in enumerate(zip(depths, paths, widths, strict=True)):
            down: nn.Module
            if index == 0 and pool_size is not None:
                # darknet rounds up where the size is odd
                down = nn.MaxPool2d(2, ceil_mode=True) if pool_size == 2 else nn.MaxPool2d(3, 2, 1)
            else:
                grown = width if down_grows else channels
                down = ConvBN(channels, grown, 3, stride=2, groups=groups, act=make_act)
                channels = grown
            cross_stage = CrossStage(
                channels,
                width,
                layout=layout,
                block=block,
                depth=depth,
                path=path,
                hidden=hidden[index],
                act=make_act,
                entry=first_entry if index == 0 else None,
                linear_split=linear_split[index],
                groups=groups,
                se_ratio=se_ratio,
            )
            stages.append(nn.Sequential(down, cross_stage))
            channels = width
            feature_info.append(
                {
                    "num_chs": width,
                    "reduction": stem_stride * 2 ** (index + 1),
                    "module": f"stages.{index}",
                }
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
