"""The table of GhostNet variants (the network is in ghostnet.py).

Table 1 of arXiv 1911.11907, kernel sizes from the official repository; the variants scale every
width but the last (1280) and round to multiples of 4, going down by no more than a tenth.
"""

from __future__ import annotations

from .catalogue import ModelSpec

# A stage per line, bottlenecks (kernel size, expanded, out, SE, stride), as the official repository
# groups them. The squeezed width of the SE is a quarter of the expanded.
_STAGES = (
    ((3,  16,  16, 0, 1),),
    ((3,  48,  24, 0, 2),),
    ((3,  72,  24, 0, 1),),
    ((5,  72,  40, 1, 2),),
    ((5, 120,  40, 1, 1),),
    ((3, 240,  80, 0, 2),),
    ((3, 200,  80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1),
     (3, 672, 112, 1, 1)),
    ((5, 672, 160, 1, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 1, 1), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1)),
)  # fmt: skip

# name    width | params: train, deploy | MACs (M) | paper, Table 7: params (M), MACs (M), top-1
_ROWS = (
    ("100", 1.0, 5_182_508, 5_171_540, 141.2, 5.2, 141, 73.9),
    ("050", 0.5, 2_587_292, 2_581_808, 42.3, 2.6, 42, 66.2),
    ("130", 1.3, 7_358_820, 7_344_572, 227.0, 7.3, 226, 75.7),
)


def _multiple_of_4(width: float) -> int:
    """Round as MobileNetV2's `make_divisible` does, with divisor 4."""
    rounded = max(4, int(width + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * width else rounded


def _architecture(width: float) -> dict[str, object]:
    stages = tuple(
        tuple(
            (size, expanded, _multiple_of_4(out * width), squeezed, stride)
            for size, raw, out, squeeze_excite, stride in stage
            for expanded in (_multiple_of_4(raw * width),)
            for squeezed in (_multiple_of_4(expanded / 4) if squeeze_excite else 0,)
        )
        for stage in _STAGES
    )
    return {
        "stem_width": _multiple_of_4(16 * width),
        "stages": stages,
        "final_width": _multiple_of_4(960 * width),
        "head_width": 1280,
    }


SPECS = tuple(
    ModelSpec(
        name=f"ghostnet_{name}",
        family="ghostnet",
        factory="litezoo.models.ghostnet:GhostNet",
        architecture=_architecture(width),
        paper="https://arxiv.org/abs/1911.11907",
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_params_m=paper_params_m,
        paper_macs_m=paper_macs_m,
        paper_top1_percent=top1,
        paper_source="Table 7",
        first_convs=("stem.conv",),
        references={"timm": f"ghostnet_{name}"},
    )
    for name, width, train, deploy, macs_m, paper_params_m, paper_macs_m, top1 in _ROWS
)
