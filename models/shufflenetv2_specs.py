"""The table of ShuffleNet V2 variants (the network is in shufflenetv2.py).

Widths: Table 5 of arXiv 1807.11164; the large networks: its appendix, Table 2. Accuracy and
multiply-accumulates ("FLOPs" there): Table 8, of the large ones Table 6. The official repository's
README prints 1.4, 2.3, 3.5 and 7.4 M parameters for the four widths.
"""

from __future__ import annotations

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/1807.11164"
_T6, _T8 = "Table 6 (1 - error)", "Table 8 (1 - error)"
_TORCHVISION = (
    "As torchvision: both branches of a stride-2 unit make half of the channels, where the "
    "authors' left branch keeps its width."
)
_MEGVII = (
    "As the authors' code: the shuffle begins a stride-1 unit, by even and odd channels, and does "
    "not follow the last one."
)
_LARGE = (
    "The paper does not say how wide the two branches of a stage's first unit are: as in the "
    "authors' code of the small networks."
)

# name  widths, final | MACs, top-1 of the paper | torchvision: train, deploy, MACs | Megvii: same
_ROWS = (
    ("x1_0", (116, 232, 464), 1024, 146, 69.4,
        (2_278_604, 2_270_514, 144.9), (2_279_760, 2_271_670, 145.8)),
    ("x0_5", (48, 96, 192), 1024, 41, 60.3,
        (1_366_792, 1_362_816, 40.5), (1_366_792, 1_362_816, 40.5)),
    ("x1_5", (176, 352, 704), 1024, 299, 72.6,
        (3_503_624, 3_491_904, 295.8), (3_507_720, 3_496_000, 299.0)),
    ("x2_0", (244, 488, 976), 2048, 591, 74.9,
        (7_393_996, 7_377_138, 583.3), (7_403_600, 7_386_742, 590.8)),
)  # fmt: skip


def _spec(
    name: str,
    architecture: dict[str, object],
    counts: tuple[int, int, float],
    *,
    paper: tuple[float, float, str],
    torchvision: str | None = None,
    differs: str,
) -> ModelSpec:
    train, deploy, macs_m = counts
    return ModelSpec(
        name=name,
        family="shufflenetv2",
        factory="litezoo.models.shufflenetv2:ShuffleNetV2",
        architecture=architecture,
        paper=_PAPER,
        params_train=train,
        params_deploy=deploy,
        macs_m=macs_m,
        paper_macs_m=paper[0],
        paper_top1_percent=paper[1],
        paper_source=paper[2],
        first_convs=("stem.layers.0.conv",),
        references={} if torchvision is None else {"torchvision": torchvision},
        differs=differs,
    )


#: Published networks that are not here, and why.
LEFT_OUT = {
    "shufflenetv2_x2_0_se": "the paper (Table 8) does not give the squeezed width",
    "shufflenetv2_large": "the repository's 140.7 M network is not the paper's SE-164",
}

SPECS = (
    *(
        _spec(
            f"shufflenetv2_{name}",
            {"widths": widths, "final_width": final_width, "edition": "torchvision"},
            counts,
            paper=(paper_macs_m, top1, _T8),
            torchvision=f"shufflenet_v2_{name}",
            differs=_TORCHVISION,
        )
        for name, widths, final_width, paper_macs_m, top1, counts, _ in _ROWS
    ),
    *(
        _spec(
            f"shufflenetv2_{name}_megvii",
            {"widths": widths, "final_width": final_width, "edition": "megvii"},
            counts,
            paper=(paper_macs_m, top1, _T8),
            differs=_MEGVII,
        )
        for name, widths, final_width, paper_macs_m, top1, _, counts in _ROWS
    ),
    _spec(
        "shufflenetv2_50",
        {
            "widths": (244, 488, 976, 1952),
            "depths": (3, 4, 6, 3),
            "stem_widths": (64,),
            "final_width": 2048,
            "edition": "megvii",
        },
        (16_576_898, 16_549_590, 2314.7),
        paper=(2300, 77.2, _T6),
        differs=_LARGE,
    ),
    _spec(
        "se_shufflenetv2_164",
        {
            "widths": (340, 680, 1360, 2720),
            "depths": (10, 10, 23, 10),
            "stem_widths": (64, 64, 128),
            "final_width": 2048,
            "edition": "megvii",
            "squeeze_excite": True,
            "residual": True,
        },
        (133_116_062, 133_005_680, 12604.3),
        paper=(12700, 81.44, _T6),
        differs=_LARGE,
    ),
)
