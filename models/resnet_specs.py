"""The table of ResNet variants (the network is in resnet.py).

Depths, block kinds and multiply-adds ("FLOPs"): Table 1 of arXiv 1512.03385. The top-1 figures are
the paper's of 10 crops; its ResNet-18 is given with zero-padded shortcuts only (Table 2, option A).
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/1512.03385"
_MACS = "; multiply-adds: Table 1"
_V15 = (
    "Bottlenecks have their stride on the 3x3 convolution (v1.5: torchvision, timm), the paper's "
    "on the first 1x1."
)
_A18 = "Projection shortcuts (option B of section 3.3) where the paper's figure is for option A."

# size  depths, bottleneck | params: train, deploy | MACs (M) | paper: MACs (M), top-1, its source
_ROWS = (
    (18, (2, 2, 2, 2), 0, 11_689_512, 11_684_712, 1814.1, 1800, 72.12, "Table 2 (10-crop)", _A18),
    (34, (3, 4, 6, 3), 0, 21_797_672, 21_789_160, 3663.8, 3600, 75.48, "Table 3 (B, 10-crop)", ""),
    (50, (3, 4, 6, 3), 1, 25_557_032, 25_530_472, 4089.2, 3800, 77.15, "Table 3 (10-crop)", _V15),
)  # fmt: skip

SPECS = tuple(
    ModelSpec(
        name=f"resnet{size}",
        family="resnet",
        factory="litezoo.models.resnet:ResNet",
        architecture={"depths": depths, "bottleneck": bool(bottleneck)},
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source=source + _MACS,
        first_convs=("stem.conv",),
        differs=differs,
        references={
            "timm": f"resnet{size}",
            "torchvision": f"resnet{size}",
            # its resnet50 has the paper's strides: the same keys and shapes, another network
            "pytorchcv": f"resnet{size}b" if bottleneck else f"resnet{size}",
        },
        exempt={
            "paper_counts": "the paper's 3.8 G are for the stride on the first 1x1 of a "
            "bottleneck; with it on the 3x3 (v1.5) they are 4.09 G"
        }
        if bottleneck
        else {},
    )
    for size, depths, bottleneck, train, deploy, macs_m, paper_macs_m, top1, source, differs
        in _ROWS
)  # fmt: skip
