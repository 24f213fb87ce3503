"""The table of VGG variants (the network is in vgg.py).

Table 1, column D of arXiv 1409.1556; parameters: Table 2, top-1: Table 3 (single test scale).
BatchNorm is younger than the paper: the `_bn` variant is torchvision's.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/1409.1556"
_SINGLE_LAYERS = (
    "a block is a single layer, of which recomputing keeps the input: two thirds of what a step "
    "saves stay"
)

SPECS = (
    ModelSpec(
        name="vgg16_bn",
        family="vgg",
        factory="litezoo.models.vgg:VGG",
        architecture={"batch_norm": True},
        paper=_PAPER,
        params_train=138_365_992,
        params_deploy=138_357_544,
        macs_m=15470.3,
        first_convs=("stem.0.conv",),
        differs="BatchNorm behind every convolution, which the paper does not have.",
        references={"timm": "vgg16_bn", "torchvision": "vgg16_bn"},
        exempt={"grad_checkpointing": _SINGLE_LAYERS},
    ),
    ModelSpec(
        name="vgg16",
        family="vgg",
        factory="litezoo.models.vgg:VGG",
        architecture={"batch_norm": False},
        paper=_PAPER,
        params_train=138_357_544,
        params_deploy=138_357_544,
        macs_m=15470.3,
        paper_params_m=138,
        paper_top1_percent=74.4,
        paper_source="Tables 2 and 3 (D, trained at scales 256 to 512, tested at 384)",
        first_convs=("stem.0.conv",),
        references={"timm": "vgg16", "torchvision": "vgg16"},
        exempt={
            "fuse": "it has no BatchNorm, so there is nothing to fuse",
            "grad_checkpointing": _SINGLE_LAYERS,
        },
    ),
)
