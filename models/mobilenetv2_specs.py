"""The table of MobileNetV2 variants (the network is in mobilenetv2.py).

Stages: Table 2 of arXiv 1801.04381. Figures of the multipliers below 1 are not in the paper's
tables but in the authors' TensorFlow README, whose parameter counts leave BatchNorm out.
"""

from __future__ import annotations

from .catalogue import ModelSpec

# expansion t, width c, blocks n, stride s of the first block
_TABLE_2 = (
    (1,  16, 1, 1),
    (6,  24, 2, 2),
    (6,  32, 3, 2),
    (6,  64, 4, 2),
    (6,  96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip

_T4 = "Table 4"
_README = "tensorflow/models, research/slim/nets/mobilenet/README.md, not in the paper's tables"

# name, multiplier | params: train, deploy | MACs (M) | published: params (M), MACs (M), top-1
_ROWS = (
    ("100", 1.00, 3_504_872, 3_487_816, 300.8, 3.40, 300, 72.0, _T4),
    ("035", 0.35, 1_677_128, 1_670_088,  59.3, 1.66,  59, 60.3, _README),
    ("050", 0.50, 1_968_680, 1_959_408,  97.1, 1.95,  97, 65.4, _README),
    ("075", 0.75, 2_636_424, 2_623_104, 209.1, 2.61, 209, 69.8, _README),
    ("140", 1.40, 6_108_776, 6_084_808, 582.2, 6.90, 585, 74.7, _T4),
)  # fmt: skip

_EXEMPT = {
    "100": {"paper_counts": "the paper prints 3.4 million parameters, its authors' README 3.47"},
    "140": {"paper_counts": "the paper prints 6.9 million parameters, its authors' README 6.06"},
}

SPECS = tuple(
    ModelSpec(
        name=f"mobilenetv2_{name}",
        family="mobilenetv2",
        factory="litezoo.models.mobilenetv2:MobileNetV2",
        architecture={
            "stages": _TABLE_2,
            "stem_width": 32,
            "final_width": 1280,
            "width": multiplier,
        },
        paper="https://arxiv.org/abs/1801.04381",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source=source,
        first_convs=("stem.conv",),
        differs=(
            "BatchNorm eps 1e-5 and symmetric padding, as in timm and torchvision; the authors' "
            "TensorFlow code has 1e-3 and SAME."
        ),
        references={
            "timm": f"mobilenetv2_{name}",
            **({"torchvision": "mobilenet_v2"} if name == "100" else {}),
        },
        exempt=_EXEMPT.get(name, {}),
    )
    for name, multiplier, train, deploy, macs_m, paper_params_m, paper_macs_m, top1, source in _ROWS
)
