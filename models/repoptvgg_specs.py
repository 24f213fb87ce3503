"""The table of RepOpt-VGG variants (the network is in repoptvgg.py).

Depths and widths as in the official repository (DingXiaoH/RepOptimizers): B1 and B2 are RepVGG's
of that name, L1 and L2 have their widths and the depths 8, 14, 24, 1.
"""

from __future__ import annotations

from .catalogue import ModelSpec
from .repvgg_specs import scaled_body

_B, _L = (4, 6, 16, 1), (8, 14, 24, 1)

# name  depths, a, b | params: train, deploy | MACs (M) | README: params (M), top-1
_ROWS = (
    ("b1", _B, 2.0, 4.0,  51_841_832,  51_829_480, 11815.5,  51.8, 78.62),
    ("b2", _B, 2.5, 5.0,  80_330_536,  80_315_112, 18376.6,  80.3, 79.68),
    ("l1", _L, 2.0, 4.0,  76_037_928,  76_018_920, 21063.9,  76.0, 79.82),
    ("l2", _L, 2.5, 5.0, 118_132_776, 118_109_032, 32827.3, 118.1, 80.47),
)  # fmt: skip

SPECS = tuple(
    ModelSpec(
        name=f"repoptvgg_{name}",
        family="repoptvgg",
        factory="litezoo.models.repoptvgg:RepOptVGG",
        architecture=scaled_body(depths, a, b),
        paper="https://arxiv.org/abs/2205.15242",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_top1_percent=top1,
        paper_source="official README (arXiv 2205.15242), trained with RepOptimizer",
        first_convs=("stem.conv",),
        differs="the gradient-multiplying optimizer that carries the prior is not in the network",
    )
    for name, depths, a, b, train, deploy, macs_m, paper_params_m, top1 in _ROWS
)
