"""The table of MobileNetV3 variants (the network is in mobilenetv3.py).

Stages: Tables 1 (large) and 2 (small) of arXiv 1905.02244v5, cut where the width changes. The same
networks were trained by three groups with different BatchNorm and padding, which the weights are
tied to, hence three families of names:

    mobilenetv3_*      timm            eps 1e-5, symmetric padding
    tf_mobilenetv3_*   the authors     eps 1e-3, TensorFlow's SAME padding
    tv_mobilenetv3_*   torchvision     eps 1e-3, symmetric padding, momentum 0.01

"Minimal" is the authors' "minimalistic" (TensorFlow README, not in the paper): no squeeze-and-
excitation, ReLU throughout, 3x3 kernels only.
"""

from __future__ import annotations

from .catalogue import ModelSpec

# kernel, expanded width, width, SE, non-linearity, stride
_LARGE = (
    ((3,  16,  16, False, "RE", 1),),
    ((3,  64,  24, False, "RE", 2), (3,  72,  24, False, "RE", 1)),
    ((5,  72,  40, True,  "RE", 2), (5, 120,  40, True,  "RE", 1), (5, 120,  40, True,  "RE", 1)),
    ((3, 240,  80, False, "HS", 2), (3, 200,  80, False, "HS", 1), (3, 184,  80, False, "HS", 1),
     (3, 184,  80, False, "HS", 1)),
    ((3, 480, 112, True,  "HS", 1), (3, 672, 112, True,  "HS", 1)),
    ((5, 672, 160, True,  "HS", 2), (5, 960, 160, True,  "HS", 1), (5, 960, 160, True,  "HS", 1)),
)  # fmt: skip
_SMALL = (
    ((3,  16,  16, True,  "RE", 2),),
    ((3,  72,  24, False, "RE", 2), (3,  88,  24, False, "RE", 1)),
    ((5,  96,  40, True,  "HS", 2), (5, 240,  40, True,  "HS", 1), (5, 240,  40, True,  "HS", 1)),
    ((5, 120,  48, True,  "HS", 1), (5, 144,  48, True,  "HS", 1)),
    ((5, 288,  96, True,  "HS", 2), (5, 576,  96, True,  "HS", 1), (5, 576,  96, True,  "HS", 1)),
)  # fmt: skip

_T3 = "Table 3 (arXiv v5)"
_README = "tensorflow/models, research/slim/nets/mobilenet/README.md, not in the paper"
_TIMM = "timm, not in the paper's tables"

# name, multiplier, whose | params: train, deploy | MACs | published: params (M), MACs (M), top-1
_ROWS = (
    ("large_100", 1.0, ("", "tf_", "tv_"), 5_483_032, 5_470_832, 216.6,  5.4,  219, 75.2, _T3),
    ("large_075", 0.75, ("", "tf_"),       3_993_528, 3_983_984, 154.6,  4.0,  155, 73.3, _T3),
    ("large_minimal_100", 1.0, ("tf_",),   3_924_288, 3_912_088, 209.1,  3.9,  209, 72.3, _README),
    ("small_100", 1.0, ("", "tf_", "tv_"), 2_542_856, 2_536_800,  56.5,  2.5,   56, 67.4, _T3),
    ("small_075", 0.75, ("", "tf_"),       2_041_872, 2_037_032,  43.4,  2.0,   44, 65.4, _T3),
    ("small_050", 0.5, ("",),              1_593_224, 1_589_976,  24.2, None, None, None, _TIMM),
    ("small_minimal_100", 1.0, ("tf_",),   2_044_736, 2_038_680,  52.3,  2.0,   65, 61.9, _README),
)  # fmt: skip

_EXEMPT = {
    "large_100": "the paper prints 5.4 million parameters for 5.47 (5.48 in training)",
    "small_100": "the paper prints 2.5 million parameters for 2.54",
    "small_075": "the paper prints 2.0 million parameters for 2.04",
    "small_minimal_100": "the README prints 2.0 million parameters and 65 million MACs for 2.04 "
    "and 52.3",
}

_SETTINGS = {
    "": {"eps": 1e-5, "momentum": 0.1, "same": False},
    "tf_": {"eps": 1e-3, "momentum": 0.1, "same": True},
    "tv_": {"eps": 1e-3, "momentum": 0.01, "same": False},
}
_TORCHVISION = {"large_100": "mobilenet_v3_large", "small_100": "mobilenet_v3_small"}

_DIFFERS = {
    "": (
        "BatchNorm eps 1e-5 and symmetric padding, as in timm; the authors' TensorFlow code has "
        "1e-3 and SAME"
    ),
    "tf_": "BatchNorm momentum 0.1, as in timm; the authors' decay of 0.99 would be 0.01",
    "tv_": "Symmetric padding, as in torchvision; the authors' TensorFlow code has SAME",
}
_NO_SE = "; no squeeze-and-excitation on the last convolution, where Table 2 ticks it"
_TICKED = ("small_100", "small_075", "small_050")


def _architecture(name: str) -> dict[str, object]:
    stages = _LARGE if name.startswith("large") else _SMALL
    minimal = "minimal" in name
    return {
        "stages": tuple(
            tuple((3, e, c, False, "RE", s) if minimal else (k, e, c, se, nl, s)
                  for k, e, c, se, nl, s in rows)
            for rows in stages
        ),
        "stem_width": 16,
        "final_width": 960 if stages is _LARGE else 576,
        "head_width": 1280 if stages is _LARGE else 1024,
        "act": "RE" if minimal else "HS",
    }  # fmt: skip


SPECS = tuple(
    ModelSpec(
        name=f"{whose}mobilenetv3_{name}",
        family="mobilenetv3",
        factory="litezoo.models.mobilenetv3:MobileNetV3",
        architecture={**_architecture(name), "width": multiplier, **_SETTINGS[whose]},
        paper="https://arxiv.org/abs/1905.02244",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source=source,
        first_convs=("stem.conv",),
        differs=_DIFFERS[whose] + (_NO_SE if name in _TICKED else "") + ".",
        references=(
            {"torchvision": _TORCHVISION[name]}
            if whose == "tv_"
            else {"timm": f"{whose}mobilenetv3_{name}"}
        ),
        exempt={"paper_counts": _EXEMPT[name]} if name in _EXEMPT else {},
    )
    for whose in _SETTINGS
    for name, multiplier, owners, train, deploy, macs_m, paper_params_m, paper_macs_m, top1, source
    in _ROWS
    if whose in owners
)  # fmt: skip
