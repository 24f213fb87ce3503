"""The table of G-Ghost RegNetX variants (the network is in gghostnet.py).

Depths, widths and group widths are RegNetX's (arXiv 2003.13678), as the official repository
(huawei-noah/Efficient-AI-Backbones, g_ghost_pytorch/g_ghost_regnet.py) lists them. Accuracies and
weights are published for four of its twelve variants, in its readme; these come first.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/2201.03297"
_README = "g_ghost_pytorch/readme.md (its FLOPs are multiply-accumulates)"
_CODE = "official repository, code only"

# name   depths, widths, group width | params: train, deploy | MACs (M) |
# readme: params (M), MACs (M), top-1
_ROWS = (
    ("032", (2, 6, 15, 2), (96, 192, 432, 1008), 48,
     10_511_000, 10_488_576, 1801.7, 10.5, 1800, 77.8, _README),
    ("040", (2, 5, 14, 2), (80, 240, 560, 1360), 40,
     15_726_268, 15_698_526, 2228.4, 15.7, 2200, 78.6, _README),
    ("080", (2, 5, 15, 1), (80, 240, 720, 1920), 120,
     24_586_928, 24_555_556, 4149.7, 24.6, 4200, 79.0, _README),
    ("160", (2, 6, 13, 1), (256, 512, 896, 2048), 128,
     32_381_704, 32_344_360, 8997.4, 32.4, 9000, 79.9, _README),
    ("002", (1, 1, 4, 7), (24, 56, 152, 368), 8,
     1_825_440, 1_817_512, 130.9, None, None, None, _CODE),
    ("004", (1, 2, 7, 12), (32, 64, 160, 384), 16,
     2_884_456, 2_872_360, 221.2, None, None, None, _CODE),
    ("006", (1, 3, 5, 7), (48, 96, 240, 528), 24,
     4_029_776, 4_017_240, 389.8, None, None, None, _CODE),
    ("008", (1, 3, 7, 5), (64, 128, 288, 672), 16,
     5_248_328, 5_233_416, 528.6, None, None, None, _CODE),
    ("016", (2, 4, 10, 2), (72, 168, 408, 912), 24,
     7_109_660, 7_092_606, 1021.4, None, None, None, _CODE),
    ("064", (2, 4, 10, 1), (168, 392, 784, 1624), 56,
     17_993_748, 17_965_842, 4055.3, None, None, None, _CODE),
    ("120", (2, 5, 11, 1), (224, 448, 896, 2240), 112,
     30_627_208, 30_592_120, 7377.5, None, None, None, _CODE),
    ("320", (2, 7, 13, 1), (336, 672, 1344, 2520), 168,
     62_815_448, 62_760_900, 17157.8, None, None, None, _CODE),
)  # fmt: skip

SPECS = tuple(
    ModelSpec(
        name=f"g_ghost_regnetx_{name}",
        family="gghostnet",
        factory="litezoo.models.gghostnet:GGhostRegNet",
        architecture={"depths": depths, "widths": widths, "group_width": group_width},
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source=source,
        first_convs=("stem.conv",),
    )
    for name, depths, widths, group_width, train, deploy, macs_m,
        paper_params_m, paper_macs_m, top1, source in _ROWS
)  # fmt: skip
