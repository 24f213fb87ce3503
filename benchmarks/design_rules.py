"""The literature's design rules for fast networks, each as a few small networks to time.

    g1  equal widths        ShuffleNetV2, Table 1     1x1 stacks, c_in : c_out from 1:1 to 1:12
    g2  few groups          ShuffleNetV2, Table 2     grouped 1x1 stacks
    g3  no fragments        ShuffleNetV2, Table 3     one 1x1, or two and four in series, parallel
    g4  few element-wise    ShuffleNetV2, Table 4     bottlenecks without ReLU, without shortcut
    density                 RepVGG, Table 1           1x1, 3x3, 5x5, 7x7 at one width
    separable               MobileNetV1, 3.1          against plain 3x3 over widths
    channels                NVIDIA's guide            widths around multiples of 8, 16, 32
    branches                RepVGG, Table 6           3x3 + 1x1 + identity against the fused 3x3
    one-shot                VoVNet, 3                 dense against one-shot aggregation

Every network takes images (N, C, H, W) and ends in a global pool, (N, channels), so that each
runtime takes it for a classifier. Convolutions have biases, as they have where BatchNorm has been
folded, and weights that keep the size of what goes through: no 16-bit float over- or underflows.

The set-ups are those of the papers' tables where a table prints one; what it does not print is
said in `source`, and "recalled" of what was not looked up in the paper itself. `quick` takes the
widths of ShuffleNetV2's ARM column, and smaller images elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from litezoo.models.errors import CheckFailed, UsageError, unknown_name
from litezoo.models.fuse import fuse
from litezoo.models.repvgg import RepVGGBlock

__all__ = ["Per", "Rule", "Variant", "check_macs", "count_macs", "create", "design_rules"]

#: What is compared: the time of the whole network, or its time for each multiply-accumulate.
Per = Literal["time", "mac"]

_SHUFFLENET = "ShuffleNetV2, arXiv 1807.11164"
_REPVGG = "RepVGG, arXiv 2101.03697"
#: Blocks in each of ShuffleNetV2's benchmark networks.
_STACK = 10


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One network of a comparison: `build` makes it, `shape` is its image (C, H, W).

    `x` is its place on a drawing's axis (a width, a number of groups), where it has one, and
    `series` the line that it belongs to.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    x: float | None = None
    series: str = ""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A claim of the literature and what decides whether it holds on a chip.

    The measure is the cost of the variant `slow` over that of `fast`, a cost being a time or a time
    for each multiply-accumulate (`per`); the claim holds where it is above `threshold`.
    `equal_within` is the share by which MACs of variants may differ, None where they differ by
    design. Rules of one `experiment` are measured together. `pairs` (x, slow, fast) are the same
    comparison at other widths, to find where it turns.
    """

    name: str
    claim: str
    source: str
    experiment: str
    variants: tuple[Variant, ...]
    slow: str
    fast: str
    per: Per
    equal_within: float | None
    threshold: float = 1.0
    pairs: tuple[tuple[float, str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a measure that names no variant, or cannot be."""
        names = [variant.name for variant in self.variants]
        if len({*names}) != len(names):
            raise UsageError(f"rule {self.name!r} has two variants of one name: {names}")
        wanted = {self.slow, self.fast, *(n for _, *pair in self.pairs for n in pair)}
        for name in sorted(wanted):
            if name not in names:
                raise unknown_name(f"variant of rule {self.name!r}", name, names)
        if self.slow == self.fast:
            raise UsageError(f"rule {self.name!r} compares {self.slow} with itself")
        if self.per not in get_args(Per):
            raise unknown_name("measure", self.per, get_args(Per))
        if not 0 < self.threshold < math.inf:
            raise UsageError(f"rule {self.name!r} has threshold {self.threshold}; it is above 0")

    def variant(self, name: str) -> Variant:
        """Return the variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


def create(variant: Variant) -> nn.Module:
    """Build a variant in eval mode with seeded weights; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return variant.build().eval()


def count_macs(variant: Variant) -> int:
    """Return a variant's multiply-accumulates for one image: half of torch's FLOPs."""
    with torch.device("meta"):
        network, image = variant.build().eval(), torch.empty(1, *variant.shape)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(image)
    total: int = counter.get_total_flops()
    return total // 2


def check_macs(rule: Rule) -> dict[str, int]:
    """Return the MACs of every variant by name; CheckFailed where they are less equal than said."""
    macs = {variant.name: count_macs(variant) for variant in rule.variants}
    if rule.equal_within is not None:
        base = macs[rule.fast]
        for name, own in macs.items():
            if abs(own / base - 1) > rule.equal_within:
                raise CheckFailed(
                    f"rule {rule.name!r} compares at equal MACs, but {name} has {own:,} and "
                    f"{rule.fast} {base:,}, more than {rule.equal_within:.1%} apart"
                )
    return macs


# ------------------------------------------------------------------------------- what they are of


def _conv(c_in: int, c_out: int, size: int = 1, *, groups: int = 1, gain: float = 1.0) -> nn.Conv2d:
    """Return a convolution that keeps height and width; its output has `gain` times the variance.

    2 is for what a ReLU follows, which halves it; 1 / n for one of n that are added.
    """
    conv = nn.Conv2d(c_in, c_out, size, padding=size // 2, groups=groups)
    nn.init.normal_(conv.weight, std=math.sqrt(gain / (c_in // groups * size * size)))
    assert conv.bias is not None
    nn.init.normal_(conv.bias, std=0.01)
    return conv


def _net(*body: nn.Module) -> nn.Module:
    """Return a body with a classifier's end: (N, C, H, W) to (N, channels)."""
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _widths(c1: int, c2: int) -> nn.Module:
    """Return 10 pairs of 1x1 convolutions, c1 to c2 and back (G1)."""
    return _net(*(conv for _ in range(_STACK) for conv in (_conv(c1, c2), _conv(c2, c1))))


def _grouped(channels: int, groups: int) -> nn.Module:
    """Return 10 grouped 1x1 convolutions (G2)."""
    return _net(*(_conv(channels, channels, groups=groups) for _ in range(_STACK)))


class _Parallel(nn.Module):
    """1x1 convolutions of one input, added: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            _conv(channels, channels, gain=1 / count) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches."""
        first, *others = self.branches
        y: Tensor = first(x)
        for branch in others:
            y = y + branch(x)
        return y


def _fragments(channels: int, count: int, *, parallel: bool) -> nn.Module:
    """Return 10 blocks of `count` 1x1 convolutions (G3)."""
    if parallel:
        return _net(*(_Parallel(channels, count) for _ in range(_STACK)))
    return _net(*(_conv(channels, channels) for _ in range(_STACK * count)))


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 through a quarter of the channels: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, *, relu: bool, shortcut: bool) -> None:
        super().__init__()
        inner, gain = channels // 4, 2.0 if relu else 1.0
        self.reduce = _conv(channels, inner, gain=gain)
        self.middle = _conv(inner, inner, 3, gain=gain)
        # ten of them are added where there is a shortcut
        self.expand = _conv(inner, channels, gain=0.1 if shortcut else gain)
        self.relu, self.shortcut = relu, shortcut

    def _act(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.relu else x

    def forward(self, x: Tensor) -> Tensor:
        """Return the bottleneck's output, with what G4 asks of element-wise work."""
        y: Tensor = self.expand(self._act(self.middle(self._act(self.reduce(x)))))
        return self._act(y + x if self.shortcut else y)


def _bottlenecks(channels: int, *, relu: bool, shortcut: bool) -> nn.Module:
    """Return 10 bottlenecks (G4)."""
    return _net(*(_Bottleneck(channels, relu=relu, shortcut=shortcut) for _ in range(_STACK)))


def _kernels(channels: int, size: int, count: int) -> nn.Module:
    """Return `count` plain convolutions of one size."""
    return _net(*(_conv(channels, channels, size) for _ in range(count)))


def _plain(channels: int) -> nn.Module:
    """Return 4 plain 3x3 convolutions with ReLU."""
    layers = (_conv(channels, channels, 3, gain=2) for _ in range(4))
    return _net(*(part for layer in layers for part in (layer, nn.ReLU())))


def _separable(channels: int) -> nn.Module:
    """Return 4 times a depthwise 3x3 with ReLU and a 1x1 with ReLU, as MobileNetV1 has them."""
    return _net(
        *(
            part
            for _ in range(4)
            for part in (
                _conv(channels, channels, 3, groups=channels, gain=2),
                nn.ReLU(),
                _conv(channels, channels, gain=2),
                nn.ReLU(),
            )
        )
    )


class _Branches(nn.Module):
    """ReLU of a 3x3 with BatchNorm and another branch: a part of RepVGG's block."""

    def __init__(self, channels: int, *, other: Literal["1x1", "identity"]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.other: nn.Module = nn.BatchNorm2d(channels)
        if other == "1x1":
            conv = nn.Conv2d(channels, channels, 1, bias=False)
            self.other = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(3x3 + other)."""
        return F.relu(self.bn(self.conv(x)) + self.other(x))


def _shaken(network: nn.Module) -> nn.Module:
    """Return the network with BatchNorms that are not the identity, which a tool could drop."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return network.eval()


def _branched(channels: int, other: Literal["1x1", "identity", "both"]) -> nn.Module:
    """Return 4 blocks of a 3x3 and other branches."""
    blocks: list[nn.Module] = [
        RepVGGBlock(channels, channels) if other == "both" else _Branches(channels, other=other)
        for _ in range(4)
    ]
    return _shaken(_net(*blocks))


def _fused(channels: int) -> nn.Module:
    """Return the 4 blocks of all branches in deploy form."""
    return fuse(_branched(channels, "both"))


class _Dense(nn.Module):
    """5 layers that each read all before them, and a 1x1 over all: DenseNet's way."""

    def __init__(self, channels: int, growth: int, out: int) -> None:
        super().__init__()
        widths = [channels + index * growth for index in range(6)]
        self.layers = nn.ModuleList(_conv(width, growth, 3, gain=2) for width in widths[:-1])
        self.last = _conv(widths[-1], out, gain=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out, H, W)."""
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return F.relu(self.last(torch.cat(features, 1)))


class _OneShot(nn.Module):
    """5 layers in a chain, and a 1x1 over all of them at once: VoVNet's way."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _conv(channels if index == 0 else width, width, 3, gain=2) for index in range(5)
        )
        self.last = _conv(channels + 5 * width, out, gain=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out, H, W)."""
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(features[-1])))
        return F.relu(self.last(torch.cat(features, 1)))


# -------------------------------------------------------------------------------------- the rules


def design_rules(names: Sequence[str] = (), *, quick: bool = False) -> tuple[Rule, ...]:
    """Return the rules, or those of `names`; UsageError for a name that no rule has.

    `quick` are smaller networks: a CPU takes a tenth of the time.
    """
    rules = (
        *_shufflenet(quick),
        *_density(quick),
        *_depthwise(quick),
        *_channels(quick),
        *_repvgg(quick),
        *_vovnet(quick),
    )
    known = {rule.name: rule for rule in rules}
    for name in names:
        if name not in known:
            raise unknown_name("rule", name, known)
    return tuple(rule for rule in rules if not names or rule.name in names)


def _shufflenet(quick: bool) -> tuple[Rule, ...]:
    """Return G1 to G4: 10 blocks at 56x56 of the widths in the GPU column, quick in the ARM one."""
    side = 56
    column = "ARM" if quick else "GPU"
    ratios = ("1:1", "1:2", "1:6", "1:12")
    pairs = ((32, 32), (22, 44), (13, 78), (9, 108)) if quick else (
        (128, 128), (90, 180), (52, 312), (36, 432)
    )  # fmt: skip
    # the ARM column prints 180 channels for 8 groups, which does not divide
    groups = ((1, 64), (2, 90), (4, 128), (8, 184)) if quick else (
        (1, 128), (2, 180), (4, 256), (8, 360)
    )  # fmt: skip
    one, two, four = (64, 45, 32) if quick else (128, 90, 64)
    width = 32 if quick else 128
    fragments = tuple(
        Variant(
            name=name,
            build=partial(_fragments, channels, count, parallel=parallel),
            shape=(channels, side, side),
        )
        for name, channels, count, parallel in (
            ("1 fragment", one, 1, False),
            ("2 in series", two, 2, False),
            ("4 in series", four, 4, False),
            ("2 in parallel", two, 2, True),
            ("4 in parallel", four, 4, True),
        )
    )
    elements = tuple(
        Variant(
            name=name,
            build=partial(_bottlenecks, width, relu=relu, shortcut=shortcut),
            shape=(width, side, side),
        )
        for name, relu, shortcut in (
            ("neither", False, False),
            ("shortcut", False, True),
            ("ReLU", True, False),
            ("ReLU and shortcut", True, True),
        )
    )
    g3 = f"{_SHUFFLENET}, Table 3 ({column} column, {one} channels; parallel outputs are added)"
    return (
        Rule(
            name="g1-equal-widths",
            claim="1x1 convolutions with as many outputs as inputs take the least time",
            source=f"{_SHUFFLENET}, Table 1 ({column} column)",
            experiment="g1",
            variants=tuple(
                Variant(
                    name=ratio, build=partial(_widths, c1, c2), shape=(c1, side, side), x=c2 / c1
                )
                for ratio, (c1, c2) in zip(ratios, pairs, strict=True)
            ),
            slow="1:12",
            fast="1:1",
            per="mac",
            equal_within=0.06,
        ),
        Rule(
            name="g2-few-groups",
            claim="more groups in 1x1 convolutions take more time at equal MACs",
            source=f"{_SHUFFLENET}, Table 2 ({column} column)",
            experiment="g2",
            variants=tuple(
                Variant(
                    name=f"{count} group{'s' * (count > 1)}",
                    build=partial(_grouped, channels, count),
                    shape=(channels, side, side),
                    x=count,
                )
                for count, channels in groups
            ),
            slow="8 groups",
            fast="1 group",
            per="mac",
            equal_within=0.04,
        ),
        *(
            Rule(
                name=f"g3-{way}",
                claim=f"a 1x1 convolution in four fragments {said} takes more time than one",
                source=g3,
                experiment="g3",
                variants=fragments,
                slow=f"4 in {way}",
                fast="1 fragment",
                per="mac",
                equal_within=0.02,
            )
            for way, said in (("series", "one after the other"), ("parallel", "side by side"))
        ),
        Rule(
            name="g4-element-wise",
            claim="ReLU and shortcut take time, though they have no MACs",
            source=f"{_SHUFFLENET}, Table 4 ({column} column, {width} channels; the inner width, "
            "which the table does not print, is a quarter as in ResNet, the image 56x56)",
            experiment="g4",
            variants=elements,
            slow="ReLU and shortcut",
            fast="neither",
            per="time",
            equal_within=0.0,
        ),
    )  # fmt: skip


def _density(quick: bool) -> tuple[Rule, ...]:
    channels, side = (32, 28) if quick else (64, 56)
    variants = tuple(
        Variant(
            name=f"{size}x{size}",
            build=partial(_kernels, channels, size, count),
            shape=(channels, side, side),
            x=size,
        )
        for size, count in ((1, 49), (3, 5), (5, 2), (7, 1))  # 49, 45, 50 and 49 taps
    )
    return tuple(
        Rule(
            name=f"density-{size}",
            claim=f"a 3x3 convolution does more MACs a second than a {size}",
            source=f"{_REPVGG}, Table 1, recalled (there 2048 channels at batch 32; here "
            f"{channels} at {side}x{side}, and as many layers as make about equal MACs)",
            experiment="density",
            variants=variants,
            slow=size,
            fast="3x3",
            per="mac",
            equal_within=0.12,
        )
        for size in ("1x1", "5x5", "7x7")
    )


def _depthwise(quick: bool) -> tuple[Rule, ...]:
    widths = (16, 32, 64, 128) if quick else (8, 16, 32, 64, 128, 256)
    side = 28
    variants = tuple(
        Variant(
            name=f"{series} {width}",
            build=partial(build, width),
            shape=(width, side, side),
            x=width,
            series=series,
        )
        for series, build in (("plain", _plain), ("separable", _separable))
        for width in widths
    )
    pairs = tuple((float(w), f"plain {w}", f"separable {w}") for w in widths)
    size = f"4 layers at {side}x{side}; the widths are ours"
    return (
        *(
            Rule(
                name=f"separable-{width}",
                claim=f"at {width} channels a depthwise-separable 3x3 takes less time than a plain "
                "one",
                source=f"MobileNetV1, arXiv 1704.04861, section 3.1, recalled ({size})",
                experiment="separable",
                variants=variants,
                slow=f"plain {width}",
                fast=f"separable {width}",
                per="time",
                equal_within=None,
                pairs=pairs,
            )
            for width in (16, 64)
        ),
        Rule(
            name="separable-rate",
            claim="a MAC takes more time in a depthwise-separable 3x3 than in a plain one",
            source=f"EfficientNetV2, arXiv 2104.00298, section 3.2, recalled ({size})",
            experiment="separable",
            variants=variants,
            slow="separable 128",
            fast="plain 128",
            per="mac",
            equal_within=None,
        ),
    )


def _channels(quick: bool) -> tuple[Rule, ...]:
    side = 28 if quick else 56
    widths = (56, 60, 64, 65, 72, 80, 96)
    variants = tuple(
        Variant(
            name=f"{width} channels",
            build=partial(_kernels, width, 1, _STACK),
            shape=(width, side, side),
            x=width,
        )
        for width in widths
    )
    # The multiple is the narrower: what width gains by itself speaks against the claim.
    return tuple(
        Rule(
            name=f"channels-{multiple}",
            claim=f"a MAC takes more time in {slow} channels than in {fast}, a multiple of "
            f"{multiple}",
            source=f"{source} (10 1x1 convolutions at {side}x{side}; the widths are ours)",
            experiment="channels",
            variants=variants,
            slow=f"{slow} channels",
            fast=f"{fast} channels",
            per="mac",
            equal_within=None,
        )
        for multiple, slow, fast, source in (
            (8, 60, 56, "MobileNetV2's make_divisible(8); NVIDIA's deep learning performance guide,"
             " tensor core requirements in fp16, recalled"),
            (16, 72, 64, "NVIDIA's deep learning performance guide, tensor core requirements in "
             "int8, recalled; 16 floats are an AVX-512 register"),
            (32, 80, 64, "32 channels are a block of TensorRT's int8 format CHW32, recalled"),
        )
    )  # fmt: skip


def _repvgg(quick: bool) -> tuple[Rule, ...]:
    channels, side = (32, 28) if quick else (64, 56)
    builds: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        ("fused 3x3", partial(_fused, channels)),
        ("3x3 + identity", partial(_branched, channels, "identity")),
        ("3x3 + 1x1", partial(_branched, channels, "1x1")),
        ("3x3 + 1x1 + identity", partial(_branched, channels, "both")),
    )
    variants = tuple(
        Variant(name=name, build=build, shape=(channels, side, side)) for name, build in builds
    )
    return (
        Rule(
            name="branches",
            claim="a block of 3x3, 1x1 and identity takes more time than the 3x3 it fuses to",
            source=f"{_REPVGG}, Table 6, recalled (there RepVGG-B0; here 4 blocks of {channels} "
            f"channels at {side}x{side}; the 1x1 has a ninth of the 3x3's MACs)",
            experiment="branches",
            variants=variants,
            slow="3x3 + 1x1 + identity",
            fast="fused 3x3",
            per="time",
            equal_within=0.12,
        ),
    )


def _vovnet(quick: bool) -> tuple[Rule, ...]:
    side = 28
    channels, growth, width, out = (72, 16, 32, 216) if quick else (144, 32, 64, 432)
    return (
        Rule(
            name="one-shot",
            claim="dense aggregation takes more time than one-shot aggregation at equal MACs",
            source="VoVNet, arXiv 1904.09730, section 3, recalled (there whole networks; here 5 "
            f"layers of 3x3 and a 1x1 at {side}x{side}, with widths at which the MACs are equal)",
            experiment="one-shot",
            variants=(
                Variant(
                    name="one-shot",
                    build=partial(_one_shot, channels, width, out),
                    shape=(channels, side, side),
                ),
                Variant(
                    name="dense",
                    build=partial(_dense, channels, growth, out),
                    shape=(channels, side, side),
                ),
            ),
            slow="dense",
            fast="one-shot",
            per="time",
            equal_within=0.0,
        ),
    )


def _one_shot(channels: int, width: int, out: int) -> nn.Module:
    return _net(_OneShot(channels, width, out))


def _dense(channels: int, growth: int, out: int) -> nn.Module:
    return _net(_Dense(channels, growth, out))
