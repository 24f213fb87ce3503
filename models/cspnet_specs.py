"""The table of CSPNet variants (the network is in cspnet.py).

The results are those of the official README (WongKinYiu/CrossStagePartialNetworks) for the paper,
arXiv 1911.11929; the numbers of layers and channels those of its cfg files. Three networks exist
twice: under their plain names as timm builds them, which is what the public PyTorch weights fit,
and as `_darknet` as the authors did. The cs3* are timm's, scaled as YOLOv5: widths (128, 256, 512,
1024) by 0.5, 0.75, 1, 1.25 and depths (3, 6, 9, 3) by 0.5, 0.67, 1, 1.33 for s, m, l, x.
"""

from __future__ import annotations

from collections.abc import Mapping

from .catalogue import ModelSpec

_PAPER = "https://arxiv.org/abs/1911.11929"
_SOURCE = "official README, big models: BFLOPs / 2, parameters without BatchNorm's"

_RESNET: dict[str, object] = {
    "block": "bottleneck",
    "stem_widths": (64,),
    "stem_size": 7,
    "stem_stride": 2,
    "depths": (3, 3, 5, 2),
    "paths": (128, 256, 512, 1024),
}
_RESNET50 = {**_RESNET, "hidden": (64, 128, 256, 512), "widths": (128, 256, 512, 1024)}
_RESNEXT50 = {
    **_RESNET,
    "hidden": (128, 256, 512, 1024),
    "widths": (256, 512, 1024, 2048),
    "groups": 32,
}
_DARKNET53: dict[str, object] = {
    "block": "dark",
    "stem_widths": (32,),
    "stem_size": 3,
    "stem_stride": 1,
    "depths": (1, 2, 8, 8, 4),
    "paths": (64, 64, 128, 256, 512),
    "hidden": (32, 64, 128, 256, 512),
    "widths": (64, 128, 256, 512, 1024),
    "down_grows": True,
}
_TIMM = {"layout": "timm", "act": "leaky_0.01"}
_TIMM_RESNET = {**_TIMM, "pool_size": 3, "linear_split": (True, True, True, True)}
_AUTHORS = {"layout": "darknet", "act": "leaky_0.1"}
_AUTHORS_RESNET = {
    **_AUTHORS,
    "pool_size": 2,
    "first_entry": 64,
    "linear_split": (False, True, True, False),
}

_TIMM_DIFFERS = (
    "timm's layout, which the public weights have: LeakyReLU 0.01 instead of 0.1 and paths cut by "
    "one convolution and a split"
)
_TIMM_RESNET_DIFFERS = (
    f"{_TIMM_DIFFERS}, equal paths in the first stage too, no activation before any split, "
    "max-pool 3x3"
)
_CS3_DIFFERS = "not a network of the paper: timm's, after YOLOv5, with SiLU and one transition only"

# name         tables       layout           differs | params: train, deploy | MACs (M) at 256
#                                       | paper: params (M), MACs (M), top-1
_R50, _X50, _D53 = (21.57, 4485, 76.6), (20.50, 3965, 77.9), (27.61, 6535, 77.2)
_ROWS = (
    ("cspresnet50", _RESNET50, _TIMM_RESNET, _TIMM_RESNET_DIFFERS,
     21_616_168, 21_596_008, 4517.2, _R50),
    ("cspresnext50", _RESNEXT50, _TIMM_RESNET, _TIMM_RESNET_DIFFERS,
     20_569_896, 20_541_160, 4014.9, _X50),
    ("cspdarknet53", _DARKNET53, _TIMM, _TIMM_DIFFERS,
     27_642_184, 27_624_520, 6533.7, _D53),
    ("cspresnet50_darknet", _RESNET50, _AUTHORS_RESNET, "",
     21_607_848, 21_587_752, 4483.7, _R50),
    ("cspresnext50_darknet", _RESNEXT50, _AUTHORS_RESNET, "",
     20_557_480, 20_528_808, 3964.6, _X50),
    ("cspdarknet53_darknet", _DARKNET53, _AUTHORS, "",
     27_642_184, 27_624_520, 6533.7, _D53),
)  # fmt: skip

_DEPTHS = {"s": (1, 3, 4, 1), "m": (2, 4, 6, 2), "l": (3, 6, 9, 3), "x": (3, 7, 11, 3)}
_SCALE = {"s": 0.5, "m": 0.75, "l": 1.0, "x": 1.25}

# name                scale focus block  hidden / path, SE ratio | params: train, deploy | MACs (M)
_CS3_ROWS = (
    ("cs3darknet_s",       "s", 0, "dark", 1.0, 0.0,     3_276_344,  3_271_912,   712.2),
    ("cs3darknet_m",       "m", 0, "dark", 1.0, 0.0,     9_310_240,  9_301_768,  2068.7),
    ("cs3darknet_l",       "l", 0, "dark", 1.0, 0.0,    21_164_168, 21_149_672,  4847.0),
    ("cs3darknet_x",       "x", 0, "dark", 1.0, 0.0,    35_046_320, 35_026_600,  8355.2),
    ("cs3darknet_focus_s", "s", 1, "dark", 1.0, 0.0,     3_274_728,  3_270_312,   686.3),
    ("cs3darknet_focus_m", "m", 1, "dark", 1.0, 0.0,     9_304_360,  9_295_912,  1973.1),
    ("cs3darknet_focus_l", "l", 1, "dark", 1.0, 0.0,    21_151_720, 21_137_256,  4644.1),
    ("cs3darknet_focus_x", "x", 1, "dark", 1.0, 0.0,    35_025_000, 35_005_320,  8007.2),
    ("cs3sedarknet_l",     "l", 0, "dark", 1.0, 1 / 4,  21_913_592, 21_899_096,  4847.8),
    ("cs3sedarknet_x",     "x", 0, "dark", 1.0, 1 / 16, 35_397_904, 35_378_184,  8355.5),
    ("cs3edgenet_x",       "x", 0, "edge", 1.5, 0.0,    47_821_120, 47_798_000, 11500.9),
    ("cs3se_edgenet_x",    "x", 0, "edge", 1.5, 1 / 4,  50_721_584, 50_698_464, 11503.8),
)  # fmt: skip


def _cs3(
    scale: str, *, focus: bool, block: str, ratio: float, se_ratio: float
) -> Mapping[str, object]:
    factor = _SCALE[scale]
    widths = tuple(int(width * factor) for width in (128, 256, 512, 1024))
    stem = (64,) if focus else (32, 64)
    return {
        "layout": "cs3",
        "block": block,
        "act": "silu",
        "stem_widths": tuple(int(width * factor) for width in stem),
        "stem_size": 6 if focus else 3,
        "stem_stride": 2,
        "depths": _DEPTHS[scale],
        "paths": tuple(width // 2 for width in widths),
        "hidden": tuple(int(width // 2 * ratio) for width in widths),
        "widths": widths,
        "se_ratio": se_ratio,
    }


#: Published networks that are not here, and why.
_NO_TABLE = "neither the paper's tables nor the official repository give its layers"
LEFT_OUT = {
    "csppeleenet": _NO_TABLE,
    "cspdensenet201_elastic": _NO_TABLE,
    "cspresnet50d": "no public weights, not in the paper (timm only)",
    "cspresnet50w": "no public weights, not in the paper (timm only)",
    "cs3sedarknet_xdw": "no public weights, not in the paper (timm only)",
}

SPECS = (
    *(
        ModelSpec(
            name=name,
            family="cspnet",
            factory="litezoo.models.cspnet:CSPNet",
            architecture={**tables, **layout},
            paper=_PAPER,
            params_train=train,
            params_deploy=deploy,
            macs_m=macs_m,
            resolution=256,
            paper_params_m=paper_params_m,
            paper_macs_m=paper_macs_m,
            paper_top1_percent=top1,
            paper_source=_SOURCE,
            first_convs=("stem.convs.0.conv",),
            references={} if layout["layout"] == "darknet" else {"timm": name},
            differs=differs,
        )
        for name, tables, layout, differs, train, deploy, macs_m,
            (paper_params_m, paper_macs_m, top1) in _ROWS
    ),
    *(
        ModelSpec(
            name=name,
            family="cspnet",
            factory="litezoo.models.cspnet:CSPNet",
            architecture=_cs3(
                scale, focus=bool(focus), block=block, ratio=ratio, se_ratio=se_ratio
            ),
            paper=_PAPER,
            params_train=train,
            params_deploy=deploy,
            macs_m=macs_m,
            resolution=256,
            first_convs=("stem.convs.0.conv",),
            references={"timm": name},
            differs=_CS3_DIFFERS,
        )
        for name, scale, focus, block, ratio, se_ratio, train, deploy, macs_m in _CS3_ROWS
    ),
)  # fmt: skip
