"""The table of MobileDet backbones (the network is in mobiledet.py).

Rows are the official TensorFlow code's (tensorflow/models, research/object_detection/models/
ssd_mobiledet_feature_extractor.py, at d318246), one stage a line. Counts are with a 1000-class
classifier, which the official backbones do not have; the paper prints those of whole detectors.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/2004.14525"


# Blocks: kind, width, expansion e or Tucker ranks (r, q), kernel k, stride s, whether x is added.
_Block = tuple[str, int, int | tuple[float, float], int, int, bool]


def _ibn(width: int, *, e: int, k: int = 3, s: int = 1, add: bool = True) -> _Block:
    return "ibn", width, e, k, s, add


def _fused(width: int, *, e: int, k: int = 3, s: int = 1, add: bool = True) -> _Block:
    return "fused", width, e, k, s, add


def _tucker(width: int, *, r: float, q: float, add: bool = True) -> _Block:
    return "tucker", width, (r, q), 3, 1, add


_CPU = (
    (_ibn(8, e=1, add=False),),
    (_ibn(16, e=4, s=2, add=False),),
    (_ibn(32, e=8, s=2, add=False), *3 * (_ibn(32, e=4),)),
    (_ibn(72, e=8, k=5, s=2, add=False), _ibn(72, e=8), _ibn(72, e=4, k=5), _ibn(72, e=4),
     _ibn(72, e=8, add=False), *3 * (_ibn(72, e=8),)),
    (_ibn(104, e=8, k=5, s=2, add=False), *2 * (_ibn(104, e=4, k=5),), _ibn(104, e=4),
     _ibn(144, e=8, add=False)),
)  # fmt: skip
_DSP = (
    (_ibn(24, e=1, add=False),),
    (_fused(32, e=4, s=2, add=False), _fused(32, e=4), _ibn(32, e=4), _tucker(32, r=0.25, q=0.75)),
    (_fused(64, e=8, s=2, add=False), _ibn(64, e=4), *2 * (_fused(64, e=4),)),
    (_fused(120, e=8, s=2, add=False), _ibn(120, e=4), *2 * (_ibn(120, e=8),),
     _fused(144, e=8, add=False), *3 * (_ibn(144, e=8),)),
    (_ibn(160, e=4, s=2, add=False), _ibn(160, e=4), _fused(160, e=4),
     _tucker(160, r=0.75, q=0.75), _ibn(240, e=8, add=False)),
)  # fmt: skip
_EDGETPU = (
    (_tucker(16, r=0.25, q=0.75, add=False),),
    (_fused(16, e=8, s=2, add=False), _fused(16, e=4), _fused(16, e=8), _fused(16, e=4)),
    (_fused(40, e=8, k=5, s=2, add=False), *3 * (_fused(40, e=4),)),
    (_ibn(72, e=8, s=2, add=False), _ibn(72, e=8), *2 * (_fused(72, e=4),),
     _ibn(96, e=8, k=5, add=False), _ibn(96, e=8, k=5), *2 * (_ibn(96, e=8),)),
    (_ibn(120, e=8, k=5, s=2, add=False), _ibn(120, e=8), _ibn(120, e=4, k=5), _ibn(120, e=8),
     _ibn(384, e=8, k=5, add=False)),
)  # fmt: skip
_GPU = (
    (_tucker(16, r=0.25, q=0.25, add=False),),
    (_fused(32, e=8, s=2, add=False), *3 * (_tucker(32, r=0.25, q=0.25),)),
    (_fused(64, e=8, s=2, add=False), *2 * (_fused(64, e=8),), _fused(64, e=4)),
    (_fused(128, e=8, s=2, add=False), *3 * (_fused(128, e=4),),
     _fused(128, e=8, add=False), *3 * (_fused(128, e=8),)),
    (_fused(128, e=4, s=2, add=False), *3 * (_fused(128, e=4),), _ibn(384, e=8, add=False)),
)  # fmt: skip

# name      stages, stem width, h-swish and SE | params: train, deploy | MACs (M) at 320 px
_ROWS = (
    ("cpu",     _CPU,     16, True,   3_151_440,  3_136_296,  408.2),
    ("dsp",     _DSP,     32, False,  6_080_952,  6_057_696, 2763.6),
    ("edgetpu", _EDGETPU, 32, False,  3_162_040,  3_142_832, 1474.2),
    ("gpu",     _GPU,     32, False, 12_074_920, 12_060_600, 5010.3),
)  # fmt: skip

SPECS = tuple(
    ModelSpec(
        name=f"mobiledet_{name}",
        family="mobiledet",
        factory="litezoo.models.mobiledet:MobileDet",
        architecture={"stem_width": stem_width, "stages": stages, "swish_and_se": swish_and_se},
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        resolution=320,
        first_convs=("stem.conv",),
        differs="A detection backbone: the pooling and the linear classifier behind it are ours.",
    )
    for name, stages, stem_width, swish_and_se, train, deploy, macs_m in _ROWS
)
