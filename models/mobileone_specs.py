"""The table of MobileOne variants (the network is in mobileone.py).

Depths, widths, k and SE: the specification table of arXiv 2206.04040 as the official repository
(apple/ml-mobileone) has it. Widths are 64, 128, 256, 512 times the stage's multiplier behind a stem
of min(64, 64 times the first). The top-1 figures are of the README of that repository.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_SOURCE = "arXiv 2206.04040 (parameters, FLOPs = MACs, of the deploy form), official README (top-1)"

# name  width multipliers, k, SE | params: train, deploy | MACs (M) | paper: params, MACs (M), top-1
_ROWS = (
    ("s0", (0.75, 1.0, 1.0, 2.0), 4, 0,  5_293_272,  2_078_504,  275.1,  2.1,  275, 71.4),
    ("s1", (1.5,  1.5, 2.0, 2.5), 1, 0,  4_825_192,  4_764_840,  825.1,  4.8,  825, 75.9),
    ("s2", (1.5,  2.0, 2.5, 4.0), 1, 0,  7_884_648,  7_808_168, 1298.4,  7.8, 1299, 77.4),
    ("s3", (2.0,  2.5, 3.0, 4.0), 1, 0, 10_170_600, 10_078_312, 1895.8, 10.1, 1896, 78.1),
    ("s4", (3.0,  3.5, 3.5, 4.0), 1, 1, 14_951_248, 14_838_352, 2979.3, 14.8, 2978, 79.4),
)  # fmt: skip

_EXEMPT = {"s0": {"paper_counts": "the paper prints 2.1 M parameters for 2.0785 M, 1.04 % more"}}

SPECS = tuple(
    ModelSpec(
        name=f"mobileone_{name}",
        family="mobileone",
        factory="litezoo.models.mobileone:MobileOne",
        architecture={
            "depths": (2, 8, 10, 1),
            "stem_width": int(min(64, 64 * multipliers[0])),
            "widths": tuple(int(64 * 2**i * m) for i, m in enumerate(multipliers)),
            "branches": branches,
            "se_depths": (0, 0, 5, 1) if squeeze_excite else (0, 0, 0, 0),
        },
        paper="https://arxiv.org/abs/2206.04040",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source=_SOURCE,
        first_convs=("stem.branch_convs.0.conv", "stem.branch_1x1.conv"),
        references={"timm": f"mobileone_{name}"},
        exempt=_EXEMPT.get(name, {}),
    )
    for name, multipliers, branches, squeeze_excite, train, deploy, macs_m,
        paper_params_m, paper_macs_m, top1 in _ROWS
)  # fmt: skip
