"""The table of PeleeNet variants (the network is in peleenet.py), of arXiv 1804.06882.

It is the baseline of CSPPeleeNet (arXiv 1911.11929), of which neither paper nor repository gives
the layers.
"""

from __future__ import annotations

from .catalogue import ModelSpec

SPECS = (
    ModelSpec(
        name="peleenet",
        family="peleenet",
        factory="litezoo.models.peleenet:PeleeNet",
        architecture={
            "stem_width": 32,
            "growth": 32,
            "depths": (3, 4, 8, 6),
            "bottlenecks": (1, 2, 4, 4),
        },
        paper="https://arxiv.org/abs/1804.06882",
        params_train=2_802_248,
        params_deploy=2_797_384,
        macs_m=507.8,
        paper_params_m=2.8,
        paper_macs_m=508,
        paper_top1_percent=72.6,
        paper_source="arXiv 1804.06882; the repository says 72.1 of its PyTorch weights",
        first_convs=("stem.conv",),
    ),
)
