"""The table of MobileNetV1 variants (the network is in mobilenetv1.py).

Depths and widths: Table 1 of arXiv 1704.04861, stages cut where the resolution halves; the width
multipliers are those of Table 6.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_DEPTHS = (1, 2, 2, 6, 2)
_WIDTHS = (64, 128, 256, 512, 1024)

# name, multiplier | params: train, deploy | MACs (M) | paper, Table 6: params (M), MACs (M), top-1
_ROWS = (
    ("100", 1.00, 4_231_976, 4_221_032, 568.7, 4.2, 569, 70.6),
    ("025", 0.25,   470_072,   467_336,  41.0, 0.5,  41, 50.6),
    ("050", 0.50, 1_331_592, 1_326_120, 149.5, 1.3, 149, 63.7),
    ("075", 0.75, 2_585_560, 2_577_352, 325.4, 2.6, 325, 68.4),
)  # fmt: skip

_EXEMPT = {
    "025": {"paper_counts": "the paper prints 0.5 million parameters for 0.467"},
    "050": {"paper_counts": "the paper prints 1.3 million parameters for 1.326"},
}

SPECS = tuple(
    ModelSpec(
        name=f"mobilenetv1_{name}",
        family="mobilenetv1",
        factory="litezoo.models.mobilenetv1:MobileNetV1",
        architecture={
            "depths": _DEPTHS,
            "stem_width": int(32 * multiplier),
            "widths": tuple(int(width * multiplier) for width in _WIDTHS),
        },
        paper="https://arxiv.org/abs/1704.04861",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source="Table 6",
        first_convs=("stem.conv",),
        differs=(
            "ReLU6 for ReLU, as in the authors' TensorFlow code and timm; stride 1 in the last "
            "depthwise convolution, where Table 1 prints 2."
        ),
        references={"timm": "mobilenetv1_100"} if name == "100" else {},
        exempt=_EXEMPT.get(name, {}),
    )
    for name, multiplier, train, deploy, macs_m, paper_params_m, paper_macs_m, top1 in _ROWS
)
