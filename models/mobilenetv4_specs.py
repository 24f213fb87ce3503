"""The table of MobileNetV4 conv variants (the network is in mobilenetv4.py).

Tables 11 (Conv-S), 12 (Conv-M) and 13 (Conv-L) of arXiv 2404.10518; counts, top-1 and resolutions
of Table 5. A UIB is (start depthwise kernel, middle depthwise kernel, expansion), 0 for none:
(a, b, e) is the paper's ExtraDW, (0, b, e) its IB, (a, 0, e) ConvNeXt, (0, 0, e) FFN.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/2404.10518"

_SMALL = {
    "stem_width": 32,
    "fused": ((32, 32), (96, 64)),
    "fused_linear": False,
    "stages": (
        (96, ((5, 5, 3), *4 * ((0, 3, 2),), (3, 0, 4))),
        (128, ((3, 3, 6), (5, 5, 4), (0, 5, 4), (0, 5, 3), (0, 3, 4), (0, 3, 4))),
    ),
}
_MEDIUM = {
    "stem_width": 32,
    "fused": ((4 * 32, 48),),
    "fused_linear": True,
    "stages": (
        (80, ((3, 5, 4), (3, 3, 2))),
        (160, ((3, 5, 6), (3, 3, 4), (3, 3, 4), (3, 5, 4), (3, 3, 4), (3, 0, 4), (0, 0, 2),
               (3, 0, 4))),
        (256, ((5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 4), (3, 0, 4), (3, 5, 2),
               (5, 5, 4), (0, 0, 4), (0, 0, 4), (5, 0, 2))),
    ),
}  # fmt: skip
_LARGE = {
    "stem_width": 24,
    "fused": ((4 * 24, 48),),
    "fused_linear": True,
    "stages": (
        (96, ((3, 5, 4), (3, 3, 4))),
        (192, ((3, 5, 4), *3 * ((3, 3, 4),), (3, 5, 4), *5 * ((5, 3, 4),), (3, 0, 4))),
        (512, (*4 * ((5, 5, 4),), (5, 0, 4), (5, 3, 4), (5, 0, 4), (5, 0, 4), (5, 3, 4), (5, 5, 4),
               *3 * ((5, 0, 4),))),
    ),
}  # fmt: skip

# name   architecture | params: train, deploy | MACs (M), at | paper: params (M), MACs (M), top-1
_ROWS = (
    ("small",  _SMALL,   3_774_024,  3_761_480,  186.0, 224,  3.8,  200, 73.8),
    ("medium", _MEDIUM,  9_715_512,  9_681_560, 1080.2, 256,  9.2, 1000, 79.9),
    ("large",  _LARGE,  32_590_864, 32_516_088, 6376.2, 384, 31.0, 5900, 82.9),
)  # fmt: skip

_COUNTS = {
    "small": "the paper prints 0.2 G MACs, one digit of the 186 M that its Table 11 counts",
    "medium": "the paper prints 9.2 M and 1.0 G, its Table 12 counts 9.7 M and 1.08 G at 256 px",
    "large": "the paper prints 31.0 M and 5.9 G, its Table 13 counts 32.6 M and 6.38 G at 384 px",
}

SPECS = tuple(
    ModelSpec(
        name=f"mobilenetv4_conv_{name}",
        family="mobilenetv4",
        factory="litezoo.models.mobilenetv4:MobileNetV4",
        architecture=architecture,
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        resolution=resolution,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source="Table 5",
        first_convs=("stem.conv",),
        references={"timm": f"mobilenetv4_conv_{name}"},
        differs="BatchNorm's epsilon is 1e-5 as in timm, and there is no stochastic depth.",
        exempt={"paper_counts": _COUNTS[name]},
    )
    for name, architecture, train, deploy, macs_m, resolution,
        paper_params_m, paper_macs_m, top1 in _ROWS
)  # fmt: skip
