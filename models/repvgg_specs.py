"""The table of RepVGG variants (the network is in repvgg.py).

Depths: Table 2 of arXiv 2101.03697. Widths: 64a, 128a, 256a, 512b behind a stem of min(64, 64a),
(a, b) from Table 2; the g2/g4 variants group every second layer. The g2 variants of B2 and B3 and
D2se are from the official repository (DingXiaoH/RepVGG), not from the paper.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/2101.03697"
_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
_T4, _T5 = "Table 4 (120 epochs)", "Table 5 (200 epochs, AutoAugment, label smoothing, mixup)"
_R = "official repository, not in the paper"

# The paper's parameter and MAC columns are of the deploy form; its "Theo FLOPs" are MACs.
# name   depths, a, b, g, SE | params: train, deploy | MACs (M) | paper: params (M), MACs (M), top-1
_ROWS = (
    ("a0",   _A, 0.75,  2.5, 1, 0,   9_108_968,   8_309_384,  1361.5,   8.30,  1400, 72.41, _T4),
    ("a1",   _A,  1.0,  2.5, 1, 0,  14_092_264,  12_789_864,  2364.0,  12.78,  2400, 74.46, _T4),
    ("a2",   _A,  1.5, 2.75, 1, 0,  28_210_600,  25_499_944,  5117.0,  25.49,  5100, 76.48, _T4),
    ("b0",   _B,  1.0,  2.5, 1, 0,  15_817_960,  14_339_048,  3057.6,  14.33,  3100, 75.14, _T4),
    ("b1",   _B,  2.0,  4.0, 1, 0,  57_415_016,  51_829_480, 11815.5,  51.82, 11800, 78.37, _T4),
    ("b1g2", _B,  2.0,  4.0, 2, 0,  45_782_376,  41_360_104,  8809.7,  41.36,  8800, 77.78, _T4),
    ("b1g4", _B,  2.0,  4.0, 4, 0,  39_966_056,  36_125_416,  7306.9,  36.12,  7300, 77.58, _T4),
    ("b2",   _B,  2.5,  5.0, 1, 0,  89_022_376,  80_315_112, 18376.6,  80.31, 18400, 78.78, _T4),
    ("b2g2", _B,  2.5,  5.0, 2, 0,  70_846_376,  63_956_712, 13680.1,   None,  None,  None, _R),
    ("b2g4", _B,  2.5,  5.0, 4, 0,  61_758_376,  55_777_512, 11331.9,  55.77, 11300, 78.50, _T4),
    ("b3",   _B,  3.0,  5.0, 1, 0, 123_085_288, 110_960_872, 26208.9, 110.96, 26200, 80.52, _T5),
    ("b3g2", _B,  3.0,  5.0, 2, 0,  96_911_848,  87_404_776, 19446.0,   None,  None,  None, _R),
    ("b3g4", _B,  3.0,  5.0, 4, 0,  83_825_128,  75_626_728, 16064.5,  75.62, 16100, 80.21, _T5),
    ("d2se", _D,  2.5,  5.0, 1, 1, 133_334_836, 120_387_572, 32829.6,   None,  None,  None, _R),
)  # fmt: skip

#: The variants that timm has too.
_TIMM = {"a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se"}


def scaled_body(depths: tuple[int, ...], a: float, b: float) -> dict[str, object]:
    """Return Table 2's body at the multipliers a (all stages but the last) and b (the last)."""
    return {
        "depths": depths,
        "stem_width": int(min(64, 64 * a)),
        "widths": (int(64 * a), int(128 * a), int(256 * a), int(512 * b)),
    }


SPECS = tuple(
    ModelSpec(
        name=f"repvgg_{name}",
        family="repvgg",
        factory="litezoo.models.repvgg:RepVGG",
        architecture={
            **scaled_body(depths, a, b),
            "groups": groups,
            "squeeze_excite": bool(squeeze_excite),
        },
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source=source,
        first_convs=("stem.branch_3x3.conv", "stem.branch_1x1.conv"),
        references={"timm": f"repvgg_{name}"} if name in _TIMM else {},
    )
    for name, depths, a, b, groups, squeeze_excite, train, deploy, macs_m,
        paper_params_m, paper_macs_m, top1, source in _ROWS
)  # fmt: skip
