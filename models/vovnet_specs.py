"""The table of VoVNet variants (the network is in vovnet.py).

Widths and depths: section 3.3 of arXiv 1904.09730 for 27-slim, 39 and 57; the official repositories
(stigma0617/VoVNet.pytorch, youngwanLEE/vovnet-detectron2) for the others. `vovnet*` are version 1
as the official code has it, `vovnet*a` as the paper and timm; `vovnetv2_*` are version 2 as the
official code has it, `ese_vovnet*b` as timm. "Slim" is half the widths, but that the first stage of
V2 makes 112 channels where V1's 27-slim has 128.
"""

from __future__ import annotations

from typing import NamedTuple

from .catalogue import ModelSpec


class _Kind(NamedTuple):
    """What the variants of one reading of the papers have in common."""

    paper: str
    identity: bool
    squeeze_excite: str


_PAPER1, _PAPER2 = "https://arxiv.org/abs/1904.09730", "https://arxiv.org/abs/1911.06667"
_V1 = _Kind(_PAPER1, identity=True, squeeze_excite="none")
_V1_TIMM = _Kind(_PAPER1, identity=False, squeeze_excite="none")
_V2 = _Kind(_PAPER2, identity=True, squeeze_excite="every")
_V2_TIMM = _Kind(_PAPER2, identity=True, squeeze_excite="last")

# widths: stem, layers of a module, modules
_FULL = ((64, 64, 128), (128, 160, 192, 224), (256, 512, 768, 1024))
_HALF = ((64, 64, 128), (64, 80, 96, 112), (128, 256, 384, 512))
_SLIM = ((64, 64, 128), (64, 80, 96, 112), (112, 256, 384, 512))
_FULL_DW = ((64, 64, 64), *_FULL[1:])
_SLIM_DW = ((64, 64, 64), *_SLIM[1:])
# modules per stage
_D1, _D39, _D57, _D99 = (1, 1, 1, 1), (1, 1, 2, 2), (1, 1, 4, 3), (1, 3, 9, 3)

# name                    kind, widths, modules, layers of one | params: train, deploy | MACs (M)
_ROWS = (
    ("vovnet39",              _V1,      _FULL,    _D39, 5, 22_600_296, 22_590_088,  7072.2),
    ("vovnet27_slim",         _V1,      _HALF,    _D1,  5,  3_525_736,  3_522_440,  2176.7),
    ("vovnet57",              _V1,      _FULL,    _D57, 5, 36_640_296, 36_624_488,  8930.1),
    ("vovnet39a",             _V1_TIMM, _FULL,    _D39, 5, 22_600_296, 22_590_088,  7072.2),
    ("vovnet57a",             _V1_TIMM, _FULL,    _D57, 5, 36_640_296, 36_624_488,  8930.1),
    ("ese_vovnet19b_slim_dw", _V2_TIMM, _SLIM_DW, _D1,  3,  1_897_752,  1_894_952,   398.1),
    ("ese_vovnet19b_dw",      _V2_TIMM, _FULL_DW, _D1,  3,  6_543_080,  6_537_512,  1333.5),
    ("ese_vovnet19b_slim",    _V2_TIMM, _SLIM,    _D1,  3,  3_166_136,  3_163_560,  1680.2),
    ("ese_vovnet19b",         _V2_TIMM, _FULL,    _D1,  3, 11_205_416, 11_200_488,  4121.9),
    ("ese_vovnet39b",         _V2_TIMM, _FULL,    _D39, 5, 24_568_936, 24_558_728,  7074.2),
    ("ese_vovnet57b",         _V2_TIMM, _FULL,    _D57, 5, 38_608_936, 38_593_128,  8932.1),
    ("ese_vovnet99b",         _V2_TIMM, _FULL,    _D99, 5, 63_199_272, 63_172_200, 16488.2),
    ("vovnetv2_19_slim_dw",   _V2,      _SLIM_DW, _D1,  3,  1_897_752,  1_894_952,   398.1),
    ("vovnetv2_19_slim",      _V2,      _SLIM,    _D1,  3,  3_166_136,  3_163_560,  1680.2),
    ("vovnetv2_19_dw",        _V2,      _FULL_DW, _D1,  3,  6_543_080,  6_537_512,  1333.5),
    ("vovnetv2_19",           _V2,      _FULL,    _D1,  3, 11_205_416, 11_200_488,  4121.9),
    ("vovnetv2_39",           _V2,      _FULL,    _D39, 5, 26_209_128, 26_198_920,  7075.8),
    ("vovnetv2_57",           _V2,      _FULL,    _D57, 5, 42_479_912, 42_464_104,  8936.0),
    ("vovnetv2_99",           _V2,      _FULL,    _D99, 5, 70_548_520, 70_521_448, 16495.6),
)  # fmt: skip

# The papers give detection results only; these are the official repositories' ImageNet figures.
_TOP1 = {"vovnet39": 76.77, "vovnet57": 77.73}
_TOP1_SOURCE = "VoVNet.pytorch README (100 - error); the paper reports detection only"
_PARAMS_M = {
    "vovnetv2_19_slim_dw": 1.8,
    "vovnetv2_19_slim": 3.1,
    "vovnetv2_19_dw": 6.5,
    "vovnetv2_19": 11.2,
}
_PARAMS_SOURCE = "vovnet-detectron2 README; the paper reports detection only"
_SOURCES = {**dict.fromkeys(_TOP1, _TOP1_SOURCE), **dict.fromkeys(_PARAMS_M, _PARAMS_SOURCE)}
_CUT_OFF = {"paper_counts": "the README cuts off after a digit: 1.8M for 1.898M, 3.1M for 3.166M"}
_EXEMPT = {"vovnetv2_19_slim_dw": _CUT_OFF, "vovnetv2_19_slim": _CUT_OFF}

_TIMM = {name: {"timm": name} for name, kind, *_ in _ROWS if kind in (_V1_TIMM, _V2_TIMM)}
del _TIMM["ese_vovnet19b"]  # a configuration there, but not a model
_REFERENCES = {
    **_TIMM,
    # with one module per stage, "the last module" is every module
    "vovnetv2_19_slim_dw": {"timm": "ese_vovnet19b_slim_dw"},
    "vovnetv2_19_slim": {"timm": "ese_vovnet19b_slim"},
    "vovnetv2_19_dw": {"timm": "ese_vovnet19b_dw"},
    # these end in a 7x7 pooling there, so they take 224 x 224 only
    "vovnet27_slim": {"pytorchcv": "vovnet27s"},
    "vovnet39": {"pytorchcv": "vovnet39"},
    "vovnet57": {"pytorchcv": "vovnet57"},
}

# Where a stage has more than one module.
_DIFFERS = {
    _V1: "Adds a module's input to its output from a stage's second module on, as the official "
    "code does and the paper does not.",
    _V2_TIMM: "eSE is in the last module of a stage only, as in timm; the official code has it in "
    "every module.",
}

SPECS = tuple(
    ModelSpec(
        name=name,
        family="vovnet",
        factory="litezoo.models.vovnet:VoVNet",
        architecture={
            "stem_widths": stem_widths,
            "mid_widths": mid_widths,
            "widths": widths,
            "depths": depths,
            "layers": layers,
            "identity": kind.identity,
            "squeeze_excite": kind.squeeze_excite,
            "depthwise": name.endswith("_dw"),
        },
        paper=kind.paper,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=_PARAMS_M.get(name),
        paper_top1_percent=_TOP1.get(name),
        paper_source=_SOURCES.get(name, ""),
        first_convs=("stem.conv1.conv",),
        references=_REFERENCES.get(name, {}),
        differs=_DIFFERS.get(kind, "") if max(depths) > 1 else "",
        exempt=_EXEMPT.get(name, {}),
    )
    for name, kind, (stem_widths, mid_widths, widths), depths, layers, train, deploy,
        macs_m in _ROWS
)  # fmt: skip
