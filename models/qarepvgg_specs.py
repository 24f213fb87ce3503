"""The table of QARepVGG variants (the network is in qarepvgg.py).

Depths, widths and groups are RepVGG's (Table 2 of arXiv 2101.03697); the variants are those that
the official repository (cxxgtxy/QARepVGG) makes of `QARepVGGBlockV2`, its D2se excepted.
"""

from __future__ import annotations

from .catalogue import ModelSpec
from .repvgg_specs import scaled_body

_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)
_A0 = "arXiv 2212.01593, in a second-hand summary (INT8 after training: 70.4)"
_B0 = "B0_log.txt of the official repository, after 120 epochs (best epoch: 74.84)"

# name   depths, a, b, g | params: train, deploy | MACs (M) | top-1 and who says so
_ROWS = (
    ("a0",   _A, 0.75,  2.5, 1,  9_103_304,  8_309_384,  1361.5,  72.2, _A0),
    ("a1",   _A,  1.0,  2.5, 1, 14_084_712, 12_789_864,  2364.0,  None, ""),
    ("a2",   _A,  1.5, 2.75, 1, 28_199_272, 25_499_944,  5117.0,  None, ""),
    ("b0",   _B,  1.0,  2.5, 1, 15_808_616, 14_339_048,  3057.6, 74.78, _B0),
    ("b1",   _B,  2.0,  4.0, 1, 57_396_328, 51_829_480, 11815.5,  None, ""),
    ("b1g2", _B,  2.0,  4.0, 2, 45_763_688, 41_360_104,  8809.7,  None, ""),
    ("b1g4", _B,  2.0,  4.0, 4, 39_947_368, 36_125_416,  7306.9,  None, ""),
    ("b2",   _B,  2.5,  5.0, 1, 88_999_016, 80_315_112, 18376.6,  None, ""),
    ("b2g4", _B,  2.5,  5.0, 4, 61_735_016, 55_777_512, 11331.9,  None, ""),
)  # fmt: skip

#: Published networks that are not here, and why.
LEFT_OUT = {
    "qarepvgg_d2se": "the repository's trained block gates before its last BatchNorm, its deployed "
    "block behind it: two functions",
}

SPECS = tuple(
    ModelSpec(
        name=f"qarepvgg_{name}",
        family="qarepvgg",
        factory="litezoo.models.qarepvgg:QARepVGG",
        architecture={
            **scaled_body(depths, a, b),
            "groups": groups,
        },
        paper="https://arxiv.org/abs/2212.01593",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_top1_percent=top1,
        paper_source=source,
        first_convs=("stem.branch_3x3.conv", "stem.branch_1x1"),
    )
    for name, depths, a, b, groups, train, deploy, macs_m, top1, source in _ROWS
)
