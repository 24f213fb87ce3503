"""The design rules of lightweight networks, asked of one network's layers.

G1 to G4 are the guidelines of ShuffleNetV2 (arXiv 1807.11164, section 2), with what breaking each
costs here: the time that the layers would take less if they kept the rule, under the device's
ceilings (without those, the bytes). What costs under 1 % of the whole is not said.

    G1  unequal widths    a 1x1 convolution of c1 to c2 channels moves hw(c1 + c2) + c1*c2 elements;
                          of equal multiply-adds, equal widths move the least, 2 hw sqrt(c1*c2) +
                          c1*c2, so unequal ones cost hw (sqrt(c1) - sqrt(c2))^2 more
    G2  groups            of equal multiply-adds, g groups are sqrt(g) times as wide: they cost
                          hw (c1 + c2) (1 - 1/sqrt(g)) more
    G3  fragmentation     parallel convolutions read their input once each, and a concatenation
                          copies what they wrote; each is a kernel to launch
    G4  element-wise      kernels that only move: what no convolution could take along

Beside them: depthwise convolutions where tensor cores do the work, depthwise-separable pairs that
are no faster than one dense convolution, channels that the device pads, kernels shorter than their
launch, and what `export.limits` finds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from litezoo.export import limits as limits_of
from litezoo.recipes.devices import Device

from .graph import KINDS, Layer
from .roofline import Roof

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "LEAST_SHARE",
    "RULES",
    "DesignFinding",
    "LimitFinding",
    "design_findings",
    "read_limits",
]

#: Part of the whole below which a rule is not mentioned.
LEAST_SHARE = 0.01
_SHOWN = 5
_READERS = frozenset(("conv", "pointwise", "grouped", "depthwise", "pool"))


@dataclass(frozen=True, kw_only=True)
class DesignFinding:
    """One design rule that a network breaks.

    `layers` are the dearest of the `count` that do. `cost_ms` is what they would take less (of a
    device's limit, all that they take), None without the device's ceilings; `extra_bytes` what they
    move more. `share` is the cost's part of the whole network's time, else of its bytes; None where
    the cost has no estimate.
    """

    rule: str
    layers: tuple[str, ...]
    count: int
    cost_ms: float | None
    extra_bytes: int | None
    share: float | None
    message: str
    remedy: str

    def __str__(self) -> str:
        """Say it in one line."""
        cost = "cost unknown" if self.cost_ms is None else f"{self.cost_ms:.4f} ms"
        if self.share is not None:
            cost += (
                f", {100 * self.share:.1f} % of the {'bytes' if self.cost_ms is None else 'time'}"
            )
        more = ", ..." if self.count > len(self.layers) else ""
        where = f" [{', '.join(self.layers)}{more}]" if self.layers else ""
        return f"{self.message}{where} ({cost}): {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class LimitFinding:
    """A device's limit that a network meets, and all the nodes that it concerns."""

    finding: limits_of.Finding
    nodes: frozenset[str]


def read_limits(proto: ModelProto, device: Device, *, precision: str) -> tuple[LimitFinding, ...]:
    """Return what `export.limits.check_limits` finds in a graph, for one batch and image size."""
    findings = limits_of.check_limits(proto, device, dynamic=False, precision=precision)
    found = []
    for finding in findings:
        nodes = set(finding.layers)
        if finding.rule in {*device.limits.forbidden, *device.limits.slow}:
            nodes |= {*limits_of.layers_of(proto, finding.rule)}
        found.append(LimitFinding(finding=finding, nodes=frozenset(nodes)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The layers that the rules look at, and what they cost on a device."""

    layers: Sequence[Layer]
    device: Device | None
    roof: Roof | None

    @property
    def bytes(self) -> int:
        return sum(layer.memory_bytes for layer in self.layers)

    @property
    def ms(self) -> float:
        return sum(map(self.time, self.layers))

    @property
    def launch_ms(self) -> float:
        return 1e-3 * (self.roof.launch_us or 0.0) if self.roof else 0.0

    def time(self, layer: Layer) -> float:
        return self.roof.time(layer).ms if self.roof else 0.0

    def saved(self, layer: Layer, *, memory_bytes: float, macs: float = 0.0) -> float:
        """Return the time without these bytes and multiply-adds."""
        if self.roof is None:
            return 0.0
        less = self.roof.time(
            layer,
            macs=layer.macs - macs,
            memory_bytes=layer.memory_bytes - memory_bytes,
        )
        return self.time(layer) - less.ms

    def of_kind(self, *kinds: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind in kinds]

    def finding(
        self,
        rule: str,
        costs: Sequence[tuple[Layer, float, float]],
        message: str,
        remedy: str,
    ) -> list[DesignFinding]:
        """Return the rule's finding of (layer, extra bytes, ms); none where it costs too little."""
        extra = sum(entry[1] for entry in costs)
        cost = sum(entry[2] for entry in costs)
        share = cost / self.ms if self.roof else extra / self.bytes
        if not costs or share < LEAST_SHARE:
            return []
        dearest = sorted(costs, key=lambda entry: -(entry[2] if self.roof else entry[1]))[:_SHOWN]
        return [
            DesignFinding(
                rule=rule,
                layers=tuple(entry[0].name for entry in dearest),
                count=len(costs),
                cost_ms=cost if self.roof else None,
                extra_bytes=round(extra),
                share=share,
                message=message,
                remedy=remedy,
            )
        ]


def design_findings(
    layers: Sequence[Layer],
    *,
    device: Device | None,
    roof: Roof | None,
    limits: Iterable[LimitFinding] = (),
) -> tuple[DesignFinding, ...]:
    """Return the design rules that fused layers break, the dearest first.

    `roof` is given where all that the layers' times need is known; `limits` are those of
    `read_limits`.
    """
    network = _Network(layers=layers, device=device, roof=roof)
    found = [finding for rule in RULES.values() for finding in rule(network)]
    said = {finding.rule for finding in found}
    found += [entry for limit in limits for entry in _limit(network, limit, said)]
    return tuple(sorted(found, key=lambda finding: -(finding.share or 0.0)))


def _item(layer: Layer) -> float:
    """Return the bytes of one element that a layer writes."""
    return layer.output_bytes / layer.activations


def _mb(number: float) -> str:
    return f"{number / 1e6:.2f} MB"


def _unequal_widths(network: _Network) -> list[DesignFinding]:
    costs, worst = [], (1.0, 0, 0)
    for layer in network.of_kind("pointwise"):
        shape = layer.convolution
        assert shape is not None
        ins, outs = shape.in_channels, shape.out_channels
        is_map = math.prod(layer.out_shape[2:]) > 1  # of a vector, weights are nearly all
        if ins == outs or not is_map or shape.in_positions != shape.out_positions:
            continue
        extra = shape.out_positions * (math.sqrt(ins) - math.sqrt(outs)) ** 2 * _item(layer)
        costs.append((layer, extra, network.saved(layer, memory_bytes=extra)))
        worst = max(worst, (max(ins, outs) / min(ins, outs), ins, outs))
    return network.finding(
        "G1 unequal widths",
        costs,
        f"{len(costs)} 1x1 convolutions have unequal widths (up to {worst[1]} to {worst[2]}) and "
        f"move {_mb(sum(extra for _, extra, _ in costs))} more than equal widths of the same "
        "multiply-adds",
        "widths nearer to each other, such as a smaller expansion, move less",
    )


def _groups(network: _Network) -> list[DesignFinding]:
    costs = []
    for layer in network.of_kind("grouped"):
        shape = layer.convolution
        assert shape is not None
        elements = shape.in_positions * shape.in_channels + shape.out_positions * shape.out_channels
        extra = elements * (1 - 1 / math.sqrt(shape.groups)) * _item(layer)
        costs.append((layer, extra, network.saved(layer, memory_bytes=extra)))
    return network.finding(
        "G2 groups",
        costs,
        f"{len(costs)} grouped convolutions move {_mb(sum(extra for _, extra, _ in costs))} more "
        f"than dense ones of the same multiply-adds{_reason(network, 'grouped-conv')}",
        "fewer groups and fewer channels do the same multiply-adds on fewer bytes",
    )


def _reason(network: _Network, pattern: str) -> str:
    reason = network.device.limits.slow.get(pattern) if network.device else None
    return f" ({reason})" if reason else ""


def _fragmentation(network: _Network) -> list[DesignFinding]:
    readers: dict[str, list[Layer]] = defaultdict(list)
    for layer in network.layers:
        if layer.kind in _READERS and layer.reads:
            readers[layer.reads[0]].append(layer)
    forks = {tensor: own for tensor, own in readers.items() if len(own) > 1}
    costs = []
    for own in forks.values():
        for layer in own[1:]:
            again = min(other.input_bytes for other in own)  # one of them reads only this tensor
            saved = network.saved(layer, memory_bytes=again)
            costs.append((layer, again, max(saved, network.launch_ms)))
    joins = [layer for layer in network.layers if layer.operators[0] == "Concat"]
    costs += [(layer, layer.memory_bytes, network.time(layer)) for layer in joins]
    launch = network.roof.launch_us if network.roof else None
    return network.finding(
        "G3 fragmentation",
        costs,
        f"{len(forks)} tensors are read by parallel layers ({sum(map(len, forks.values()))} in "
        f"all) and {len(joins)} concatenations copy what layers wrote"
        + ("" if launch is None else f"; each kernel takes {launch:g} us to launch"),
        "one wide layer instead of several narrow ones; branches that fuse into one (RepVGG, "
        "MobileOne) have none in the deploy form",
    )


def _elementwise(network: _Network) -> list[DesignFinding]:
    costs = [
        (layer, layer.memory_bytes, network.time(layer)) for layer in network.of_kind("elementwise")
    ]
    names: dict[str, int] = defaultdict(int)
    for layer, *_ in costs:
        names["+".join(dict.fromkeys(layer.operators))] += 1
    most = sorted(names, key=lambda name: -names[name])[:3]
    return network.finding(
        "G4 element-wise",
        costs,
        f"{len(costs)} kernels are only element-wise, what no convolution takes along "
        f"({', '.join(f'{names[name]} {name}' for name in most)})",
        "an activation or one addition right behind a convolution costs nothing; gates, "
        "activations in front of it and second additions do",
    )


def _depthwise(network: _Network) -> list[DesignFinding]:
    device, roof = network.device, network.roof
    own = network.of_kind("depthwise")
    if device is None or not own:
        return []
    is_slow = "depthwise-conv" in device.limits.slow
    if not is_slow and not (roof and roof.has_tensor_cores):
        return []
    costs = []
    for layer in own:
        peak = roof.peak_tera_ops_per_s.get(layer.dtype) if roof else None
        saved = 0.0
        if roof and peak is not None:
            dense = roof.time(layer, memory_bytes=0, peak=peak)
            saved = network.time(layer) - dense.ms
        costs.append((layer, layer.memory_bytes, saved))
    macs = sum(layer.macs for layer in network.layers)
    part = 100 * sum(layer.macs for layer in own) / macs
    return network.finding(
        "depthwise",
        costs,
        f"{len(own)} depthwise convolutions do {part:.1f} % of the multiply-adds and wait for "
        f"memory, with no matrix product in them{_reason(network, 'depthwise-conv')}",
        "dense 3x3 convolutions (RepVGG), or fused blocks in the first stages (MobileDet, "
        "MobileNetV4), use what the chip has",
    )


def _separable(network: _Network) -> list[DesignFinding]:
    roof = network.roof
    if roof is None:
        return []
    readers: dict[str, list[Layer]] = defaultdict(list)
    for layer in network.layers:
        for name in layer.reads:
            readers[name].append(layer)
    costs, widest = [], 0
    for first in network.of_kind("depthwise"):
        behind = readers[first.writes[-1]]
        if len(behind) != 1 or behind[0].kind != "pointwise" or len(first.writes) > 1:
            continue
        second = behind[0]
        window, shape = first.convolution, second.convolution
        assert window is not None and shape is not None
        if second.reads[0] != first.writes[0]:
            continue
        weights = window.in_channels * shape.out_channels * math.prod(window.window)
        item = second.weight_bytes / max(second.params, 1)
        dense = roof.time(
            second,
            macs=shape.out_positions * weights,
            memory_bytes=first.input_bytes
            + weights * item
            + second.output_bytes
            + (second.input_bytes - first.output_bytes),
        )
        saved = network.time(first) + network.time(second) - dense.ms
        if saved > 0:
            moved = first.output_bytes + second.input_bytes
            costs.append((first, moved, saved))
            widest = max(widest, window.in_channels)
    return network.finding(
        "separable at low channels",
        costs,
        f"{len(costs)} depthwise-separable pairs (of up to {widest} channels) take longer than one "
        "dense convolution of the same window and widths, in spite of its multiply-adds",
        "a dense convolution there, as in fused blocks, takes no longer",
    )


def _padded_channels(network: _Network) -> list[DesignFinding]:
    multiple = network.device.limits.channel_multiple if network.device else None
    if multiple is None or network.device is None:
        return []
    image = set(network.layers[0].reads[:1])
    costs, count = [], 0
    for layer in network.layers:
        if layer.kind == "elementwise" and image.issuperset(layer.reads):
            image.update(layer.writes)  # the image in another type
        shape = layer.convolution
        if shape is None:
            continue
        count += 1
        ins, outs = padding(layer, multiple, reads_image=layer.reads[0] in image)
        if ins == outs == 1:
            continue
        more_macs = layer.macs * (ins * outs - 1)
        data = shape.in_positions * shape.in_channels * _item(layer)
        extra = layer.weight_bytes * (ins * outs - 1) + layer.output_bytes * (outs - 1)
        extra += data * ((outs if layer.kind == "depthwise" else ins) - 1)
        costs.append((layer, extra, -network.saved(layer, memory_bytes=-extra, macs=-more_macs)))
    return network.finding(
        "channel multiple",
        costs,
        f"{len(costs)} of {count} convolutions have channels that are no multiple of {multiple}, "
        f"to which {network.device.name} pads them",
        f"widths in steps of {multiple} cost the same and hold more",
    )


def padding(layer: Layer, multiple: int, *, reads_image: bool) -> tuple[float, float]:
    """Return by how much a device makes a convolution's inputs and outputs wider; 1 is not at all.

    Channels of each group are padded; of a depthwise convolution all together, so that its weights
    grow once, not twice. An image keeps its channels: every chip has a first layer of three.
    """
    shape = layer.convolution
    assert shape is not None

    def grows(channels: int) -> float:
        return math.ceil(channels / multiple) * multiple / channels

    if layer.kind == "depthwise":
        return 1.0, grows(shape.out_channels)
    ins = 1.0 if reads_image else grows(shape.in_channels // shape.groups)
    return ins, grows(shape.out_channels // shape.groups)


def _launches(network: _Network) -> list[DesignFinding]:
    if network.roof is None or network.roof.launch_us is None:
        return []
    costs = []
    for layer in network.layers:
        time = network.roof.time(layer)
        if time.bound == "launch":
            costs.append((layer, 0.0, time.ms - max(time.compute_ms, time.memory_ms)))
    return network.finding(
        "launch",
        costs,
        f"{len(costs)} of {len(network.layers)} kernels work for less time than their launch takes "
        f"({network.roof.launch_us:g} us)",
        "a larger batch, fewer and larger layers, or a CUDA graph",
    )


#: Every rule, in the order in which equal costs are said.
RULES: dict[str, Callable[[_Network], list[DesignFinding]]] = {
    "G1 unequal widths": _unequal_widths,
    "G2 groups": _groups,
    "G3 fragmentation": _fragmentation,
    "G4 element-wise": _elementwise,
    "depthwise": _depthwise,
    "separable at low channels": _separable,
    "channel multiple": _padded_channels,
    "launch": _launches,
}
#: Limits of which a rule here says the same and what it costs.
_SAME_AS = {
    "depthwise-conv": "depthwise",
    "grouped-conv": "G2 groups",
    "channel-multiple": "channel multiple",
}
assert set(_SAME_AS.values()) <= set(RULES) and _READERS <= set(KINDS)


def _limit(network: _Network, limit: LimitFinding, said: set[str]) -> list[DesignFinding]:
    """Return a device's limit as a finding, its cost being all that its layers take.

    Not where a rule here has said it, nor for padding, of which the rule knows when it is little.
    """
    finding = limit.finding
    if finding.kind == "channels" or _SAME_AS.get(finding.rule) in said:
        return []
    own = [layer for layer in network.layers if limit.nodes.intersection(layer.nodes)]
    timed = network.roof is not None and bool(own)
    cost = sum(map(network.time, own))
    moved = sum(layer.memory_bytes for layer in own)
    return [
        DesignFinding(
            rule=f"{finding.kind}: {finding.rule}",
            layers=finding.layers,
            count=finding.count,
            cost_ms=cost if timed else None,
            extra_bytes=moved if own else None,
            share=(cost / network.ms if timed else moved / network.bytes) if own else None,
            message=finding.message,
            remedy=finding.remedy,
        )
    ]
