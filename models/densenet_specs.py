"""The table of DenseNet variants (the network is in densenet.py).

Depths and growth rate: Table 1 of arXiv 1608.06993; top-1: Table 3, single crop.
"""

from __future__ import annotations

from .catalogue import ModelSpec

SPECS = (
    ModelSpec(
        name="densenet121",
        family="densenet",
        factory="litezoo.models.densenet:DenseNet",
        architecture={"growth": 32, "depths": (6, 12, 24, 16)},
        paper="https://arxiv.org/abs/1608.06993",
        params_train=7_978_856,
        params_deploy=7_971_368,
        macs_m=2834.2,
        paper_top1_percent=74.98,
        paper_source="Table 3 (single crop)",
        first_convs=("stem.conv",),
        references=dict.fromkeys(("timm", "torchvision", "pytorchcv"), "densenet121"),
    ),
)
