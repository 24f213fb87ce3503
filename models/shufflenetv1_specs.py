"""The table of ShuffleNet V1 variants (the network is in shufflenetv1.py).

Names: groups, then the width in percent. Widths at 1.0x: Table 1 of arXiv 1707.01083, doubling from
stage to stage. Other widths scale them; the stems are those of the official repository
(megvii-model/ShuffleNet-Series) at 0.5x, 1.5x and 2.0x with 3 and 8 groups, else pytorchcv's, which
scale too. Scaled, the networks have the multiply-accumulates that Table 2 prints for its rows (140,
38, 13 M, one figure for all groups) or fewer; with stems of 24 they would have 17 M and more at
0.25x. At 0.5x and 0.25x there is none with 2 or 4 groups, whose widths do not divide.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/1707.01083"
_T2, _T5 = "Table 2 (1 - error)", "Table 5 (1 - error)"
_CV = "not in the paper (a width of pytorchcv)"
_REPO = "README of megvii-model/ShuffleNet-Series, not the paper"
_STEM = (
    "The widths of the stem at widths other than 1.0x and the order of the stride-2 unit's "
    "concatenation are not in the paper."
)
_ORDER = "The order of the stride-2 unit's concatenation is not in the paper."
_MEGVII = (
    "As the authors' code, not the figure: the inverse shuffle behind the depthwise convolution, "
    "the shortcut first in the concatenation."
)
_OPENMMLAB = (
    "As mmpretrain, not the figure: the shuffle behind the depthwise convolution, the shortcut "
    "first in the concatenation."
)
_QUARTER = (
    "11.0 M multiply-accumulates against the 13 M printed for all 0.25x rows: the paper does not "
    "say how wide the stem is"
)
_HALF_G8 = (
    "40.5 M multiply-accumulates against the 38 M printed for all 0.5x rows: the official stem is "
    "16 wide, as 12 does not divide into 8 groups"
)

# name     g stem widths[0] | params: train, deploy | MACs (M) | paper: MACs (M), top-1 | pytorchcv
_ROWS = (
    ("g3_100", 3, 24, 240, 1_865_728, 1_853_488, 137.5,  140, 67.4, _T2, "shufflenet_g3_w1"),
    ("g1_100", 1, 24, 144, 1_531_936, 1_524_592, 143.1,  140, 66.4, _T2, "shufflenet_g1_w1"),
    ("g2_100", 2, 24, 200, 1_733_848, 1_723_648, 140.8,  140, 67.3, _T2, "shufflenet_g2_w1"),
    ("g4_100", 4, 24, 272, 1_968_344, 1_954_472, 134.3,  140, 67.2, _T2, "shufflenet_g4_w1"),
    ("g8_100", 8, 24, 384, 2_434_768, 2_415_184, 138.4,  140, 67.6, _T2, "shufflenet_g8_w1"),
    ("g1_025", 1,  6,  36,   209_746,   207_910,  11.0,   13, 42.9, _T2, "shufflenet_g1_wd4"),
    ("g3_025", 3,  6,  60,   305_902,   302_842,  11.0,   13, 45.0, _T2, "shufflenet_g3_wd4"),
    ("g8_025", 8,  8,  96,   454_504,   449_608,  12.4,   13, 47.3, _T2, None),
    ("g1_050", 1, 12,  72,   534_484,   530_812,  38.5,   38, 54.9, _T2, "shufflenet_g1_wd2"),
    ("g3_050", 3, 12, 120,   718_324,   712_204,  37.6,   38, 56.8, _T2, "shufflenet_g3_wd2"),
    ("g8_050", 8, 16, 192, 1_011_448, 1_001_656,  40.5,   38, 57.7, _T2, None),
    ("g1_075", 1, 18, 108,   975_214,   969_706,  82.5, None, None, _CV, "shufflenet_g1_w3d4"),
    ("g3_075", 3, 18, 180, 1_238_266, 1_229_086,  79.7, None, None, _CV, "shufflenet_g3_w3d4"),
    ("g3_150", 3, 24, 360, 3_442_168, 3_423_808, 292.4,  292, 71.5, _T5, None),
    ("g8_150", 8, 24, 576, 4_269_952, 4_240_576, 290.2, None, None, _REPO, None),
    ("g3_200", 3, 48, 480, 5_450_776, 5_426_296, 524.1,  524, 73.7, _T5, None),
    ("g8_200", 8, 48, 768, 6_522_232, 6_483_064, 521.9, None, None, _REPO, None),
)  # fmt: skip

# The authors' code: name -> MACs (M) and top-1 of its README.
_MEGVII_ROWS = {
    "g3_050": (38, 57.3), "g3_100": (138, 67.8), "g3_150": (292, 71.6), "g3_200": (524, 74.1),
    "g8_050": (40, 58.8), "g8_100": (138, 68.0), "g8_150": (290, 71.0), "g8_200": (522, 72.9),
}  # fmt: skip

_EXEMPT = {"g1_025": _QUARTER, "g3_025": _QUARTER, "g8_050": _HALF_G8}


#: Groups, width of the stem and of the first stage; params_train, params_deploy, macs_m.
_Counts = tuple[int, int, int, int, int, float]


def _spec(
    name: str,
    counts: _Counts,
    *,
    paper: tuple[float | None, float | None, str],
    pytorchcv: str | None = None,
    edition: str = "paper",
    differs: str,
    exempt: str | None = None,
) -> ModelSpec:
    groups, stem, width, train, deploy, macs_m = counts
    return ModelSpec(
        name=f"shufflenetv1_{name}" + ("" if edition == "paper" else f"_{edition}"),
        family="shufflenetv1",
        factory="litezoo.models.shufflenetv1:ShuffleNetV1",
        architecture={
            "groups": groups,
            "stem_width": stem,
            "widths": (width, 2 * width, 4 * width),
            "edition": edition,
        },
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_macs_m=paper[0],
        paper_top1_percent=paper[1],
        paper_source=paper[2],
        first_convs=("stem.conv",),
        references={} if pytorchcv is None else {"pytorchcv": pytorchcv},
        differs=differs,
        exempt={} if exempt is None else {"paper_counts": exempt},
    )


#: Published networks that are not here, and why.
_ROUNDING = "its widths do not divide by the groups, and the paper does not say how it rounds them"
LEFT_OUT = {
    **{f"shufflenetv1_{g}_{w}": _ROUNDING for g in ("g2", "g4") for w in ("050", "025")},
    "shufflenetv1_g3_200_se": "the paper (Table 5) does not give the squeezed width",
    "shufflenetv1_g3_050_shallow": "the paper (Table 5) does not say which units are left out",
    "shufflenetv1_50": "named in ShuffleNetV2's paper only, without its widths",
}

SPECS = (
    *(
        _spec(
            name,
            (g, stem, width, train, deploy, macs_m),
            paper=(paper_macs_m, top1, source),
            pytorchcv=theirs,
            differs=_ORDER if name.endswith("100") else _STEM,
            exempt=_EXEMPT.get(name),
        )
        for name, g, stem, width, train, deploy, macs_m, paper_macs_m, top1, source, theirs in _ROWS
    ),
    *(
        _spec(
            name,
            (g, stem, width, train, deploy, macs_m),
            paper=(*_MEGVII_ROWS[name], _REPO),
            edition="megvii",
            differs=_MEGVII,
        )
        for name, g, stem, width, train, deploy, macs_m, *_ in _ROWS
        if name in _MEGVII_ROWS
    ),
    *(
        _spec(
            name,
            (g, stem, width, train, deploy, macs_m),
            paper=(paper_macs_m, top1, source),
            edition="openmmlab",
            differs=_OPENMMLAB,
        )
        for name, g, stem, width, train, deploy, macs_m, paper_macs_m, top1, source, _ in _ROWS
        if name == "g3_100"
    ),
)  # fmt: skip
