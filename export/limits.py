"""A network against a device's limits: what will not run, what will be slow, what is rewritten.

`check_limits` reads the float32 deploy graph before anything is built, and names the layers and
what to do. `apply_rewrites` writes what a device forbids in an equal way, where there is one::

    HardSwish(x)          ->  x * (Clip(x + 3, 0, 6) * 1/6)           a ReLU6 every chip has
    HardSigmoid(x)        ->  Clip(x + b/a, 0, 1/a) * a               a: slope, b: offset
    shuffle in five dims  ->  (N, g, C/g, H*W), transpose, (N, C, H, W)
    batch of any size     ->  batch 1, every shape a constant
    opset above the limit ->  the same operators as the older opset writes them

The gate is scaled before it meets x, so that no intermediate value leaves the range of x (float16
would overflow, int8 would lose bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import UsageError, require, unknown_name
from litezoo.recipes.devices import PATTERNS, Device

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

__all__ = ["Finding", "apply_rewrites", "check_limits", "layers_of"]

Kind = Literal["forbidden", "slow", "channels", "opset", "dynamic", "precision"]
_SHOWN = 5
_LOWEST_OPSET = 11

#: Networks of the zoo that do without, by pattern or operator.
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "HardSigmoid": "tf_mobilenetv3_large_minimal_100 has none",
        "HardSwish": "tf_mobilenetv3_large_minimal_100 has none",
        "LeakyRelu": "vovnet39 or repvgg_a0 have ReLU",
        "Sigmoid": "vovnet39 or repvgg_a0 have ReLU",
        "channel-shuffle": "mobilenetv2_100 or ghostnet_100 have none",
        "depthwise-conv": "repvgg_a0, resnet18 or vovnet27_slim have dense convolutions",
        "grouped-conv": "repvgg_b1 (for its g2 and g4 forms), cspresnet50 (for cspresnext50) or "
        "shufflenetv2_x1_0 (for shufflenetv1_g3_100) have none",
        "hard-swish": "tf_mobilenetv3_large_minimal_100 or mobilenetv4_conv_small have ReLU",
        "leaky-relu": "vovnet39 or repvgg_a0 have ReLU",
        "shuffle-5d": "mobilenetv2_100 or ghostnet_100 have no channel shuffle",
        "silu": "cspdarknet53 or vovnet39 have none",
        "squeeze-excite": "tf_mobilenetv3_large_minimal_100 or mobilenetv4_conv_small have none",
    }
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about a network that a device forbids or does badly.

    `rule` is the operator, pattern or limit; `layers` the first nodes it concerns, of `count`;
    `fixed` says that `apply_rewrites` removes it, so that nothing is left to do.
    """

    kind: Kind
    rule: str
    layers: tuple[str, ...]
    count: int
    message: str
    remedy: str
    fixed: bool

    def __str__(self) -> str:
        """Say it in one line."""
        more = ", ..." if self.count > len(self.layers) else ""
        where = f" [{', '.join(self.layers)}{more}]" if self.layers else ""
        return f"{self.message}{where}: {self.remedy}"


class _Graph:
    """A model's graph with what the checks look up: makers, users, constants and shapes."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper, shape_inference

        self.graph: GraphProto = model.graph
        self.nodes: Sequence[NodeProto] = list(self.graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.users: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.inputs = {value.name for value in self.graph.input}
        self.outputs = {value.name for value in self.graph.output}
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.nodes:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._tensors[node.output[0]] = attribute.t
        self._to_array = numpy_helper.to_array
        self.shapes: dict[str, tuple[int | str | None, ...]] = {}
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            if value.type.tensor_type.HasField("shape"):
                self.shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                    for dim in value.type.tensor_type.shape.dim
                )

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """Return the value of a constant tensor, None for any other."""
        if name not in self._tensors:
            return None
        value: NDArray[np.generic] = self._to_array(self._tensors[name])
        return value

    def dims(self, name: str) -> tuple[int, ...] | None:
        """Return the sizes of a constant (without reading it) or None."""
        return tuple(self._tensors[name].dims) if name in self._tensors else None

    def of_type(self, *types: str) -> list[NodeProto]:
        return [node for node in self.nodes if node.op_type in types]


def _attribute(node: NodeProto, name: str, default: object = None) -> object:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.name == name:
            value: object = helper.get_attribute_value(attribute)
            return value
    return default


def _label(node: NodeProto) -> str:
    return node.name or node.output[0]


def _is_number(graph: _Graph, name: str) -> bool:
    return graph.dims(name) is not None and int(np.prod(graph.dims(name) or (1,))) == 1


# ----------------------------------------------------------------------- patterns


def _groups(node: NodeProto) -> int:
    group = _attribute(node, "group", 1)
    assert isinstance(group, int)
    return group


def _grouped(graph: _Graph, *, depthwise: bool) -> list[NodeProto]:
    found = []
    for node in graph.of_type("Conv"):
        weight = graph.dims(node.input[1]) or graph.shapes.get(node.input[1], ())
        if _groups(node) > 1 and len(weight) > 1 and (weight[1] == 1) is depthwise:
            found.append(node)
    return found


@dataclass(frozen=True, kw_only=True)
class _Shuffle:
    """Reshape - Transpose - Reshape that transposes the channels as a (groups, C/groups) matrix."""

    first: NodeProto
    transpose: NodeProto
    last: NodeProto
    groups: int
    shape: tuple[int | str | None, ...]  # (N, C, H, W)


def _may_be(sizes: tuple[int | str | None, ...], others: tuple[int | str | None, ...]) -> bool:
    """Return whether two shapes can be the same; an open size can be any."""
    known = [(a, b) for a, b in zip(sizes, others, strict=False) if isinstance(a, int)]
    same = all(a == b for a, b in known if isinstance(b, int))
    return len(sizes) == len(others) and same


def _shuffles(graph: _Graph, *, rank: int) -> list[_Shuffle]:
    """Return the channel shuffles through a tensor of `rank` (4 or 5) dimensions."""
    found = []
    for node in graph.of_type("Transpose"):
        first = graph.maker.get(node.input[0])
        users = graph.users.get(node.output[0], [])
        if _attribute(node, "perm") != [0, 2, 1, *range(3, rank)] or first is None:
            continue
        if first.op_type != "Reshape" or [user.op_type for user in users] != ["Reshape"]:
            continue
        before, middle = (graph.shapes.get(name) for name in (first.input[0], first.output[0]))
        after = graph.shapes.get(users[0].output[0])
        if before is None or middle is None or after is None or len(before) != 4:
            continue
        groups, width, channels = middle[1], middle[2], before[1]
        if not (isinstance(groups, int) and isinstance(width, int) and groups * width == channels):
            continue
        is_image = rank == 4 or _may_be(middle[3:], before[2:])
        if after[1:2] == (channels,) and _may_be(before[2:], after[2:]) and is_image:
            shuffle = _Shuffle(
                first=first, transpose=node, last=users[0], groups=groups, shape=before
            )
            found.append(shuffle)
    return found


def _channel_shuffles(graph: _Graph) -> list[NodeProto]:
    found = [shuffle.transpose for rank in (4, 5) for shuffle in _shuffles(graph, rank=rank)]
    for node in graph.of_type("Gather"):
        index = graph.constant(node.input[1])
        if index is None or index.ndim != 1 or _attribute(node, "axis", 0) != 1:
            continue
        if sorted(index.tolist()) == list(range(index.size)) and index.size > 1:
            found.append(node)
    return found


def _other_input(graph: _Graph, node: NodeProto) -> str | None:
    """Return the data input of a two-input node whose other input is one number."""
    numbers = [_is_number(graph, name) for name in node.input]
    if numbers.count(False) != 1 or len(numbers) != 2:
        return None
    name: str = node.input[numbers.index(False)]
    return name


def _hard_gate_source(graph: _Graph, name: str) -> str | None:
    """Return x where `name` is HardSigmoid(x) or Clip(x + number), scaled or not."""
    node = graph.maker.get(name)
    if node is None:
        return None
    if node.op_type == "HardSigmoid":
        source: str = node.input[0]
        return source
    if node.op_type in ("Mul", "Div"):
        inner = _other_input(graph, node)
        return None if inner is None else _hard_gate_source(graph, inner)
    if node.op_type == "Clip":
        add = graph.maker.get(node.input[0])
        if add is not None and add.op_type == "Add":
            return _other_input(graph, add)
    return None


def _gated(graph: _Graph, source: Callable[[_Graph, str], str | None]) -> Iterator[NodeProto]:
    """Yield the products x * gate(x)."""
    for node in graph.of_type("Mul"):
        a, b = node.input
        if source(graph, a) == b or source(graph, b) == a:
            yield node


def _sigmoid_source(graph: _Graph, name: str) -> str | None:
    node = graph.maker.get(name)
    if node is None or node.op_type != "Sigmoid":
        return None
    source: str = node.input[0]
    return source


def _activated(graph: _Graph, node: NodeProto) -> str | None:
    """Return x where the node is x * gate(x): SiLU or hard swish."""
    if node.op_type != "Mul":
        return None
    names: list[str] = list(node.input)
    for source in (_sigmoid_source, _hard_gate_source):
        for gate, x in (names, reversed(names)):
            if source(graph, gate) == x:
                return x
    return None


_EXCITE = ("Relu", "LeakyRelu", "Clip", "HardSwish", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


def _pooled_by(graph: _Graph, name: str) -> str | None:
    """Return x where `name` is gate(layers(global mean of x)), with at least one layer."""
    layers, node = 0, graph.maker.get(name)
    gate: str | None = None
    while node is not None:
        step = node.op_type
        if step in ("GlobalAveragePool", "ReduceMean"):
            source: str = node.input[0]
            return source if layers and gate is not None else None
        if gate is None and step in ("Sigmoid", "HardSigmoid", "Clip"):
            gate = step
        elif step in ("Conv", "Gemm"):
            layers += 1
        elif step in ("Add", "Mul", "Div"):
            inner = _other_input(graph, node) or _activated(graph, node)
            if inner is None:
                return None
            node = graph.maker.get(inner)
            continue
        elif step not in _EXCITE:
            return None
        node = graph.maker.get(node.input[0])
    return None


_FINDERS: Mapping[str, Callable[[_Graph], list[NodeProto]]] = MappingProxyType(
    {
        "channel-shuffle": _channel_shuffles,
        "depthwise-conv": lambda graph: _grouped(graph, depthwise=True),
        "grouped-conv": lambda graph: _grouped(graph, depthwise=False),
        "hard-swish": lambda graph: [
            *graph.of_type("HardSwish"),
            *_gated(graph, _hard_gate_source),
        ],
        "leaky-relu": lambda graph: graph.of_type("LeakyRelu", "PRelu"),
        "shuffle-5d": lambda graph: [s.transpose for s in _shuffles(graph, rank=5)],
        "silu": lambda graph: [*graph.of_type("Swish"), *_gated(graph, _sigmoid_source)],
        "squeeze-excite": lambda graph: list(_gated(graph, _pooled_by)),
    }
)
assert set(_FINDERS) == set(PATTERNS)


def _find(graph: _Graph, rule: str) -> list[NodeProto]:
    """Return the nodes that a pattern or operator names."""
    if rule in _FINDERS:
        return _FINDERS[rule](graph)
    from onnx import defs

    if not defs.has(rule):
        known = {schema.name for schema in defs.get_all_schemas()}
        error = unknown_name("operator", rule, known, see="onnx.ai/onnx/operators")
        raise UsageError(f"limits: {error}")
    return graph.of_type(rule)


# ----------------------------------------------------------------------- the check


def layers_of(model: ModelProto, rule: str) -> tuple[str, ...]:
    """Return the names of all nodes that a pattern or operator names."""
    return tuple(map(_label, _find(_Graph(model), rule)))


def check_limits(
    model: ModelProto, device: Device, *, dynamic: bool, precision: str
) -> tuple[Finding, ...]:
    """Return what is against a network on a device, what cannot run first.

    `model` is the simplified float32 deploy graph; `dynamic` says that the engine is to take more
    than one batch or image size, `precision` what it is to compute in.
    """
    require("onnx", purpose="checking a device's limits", extra="export")
    graph, limits = _Graph(model), device.limits
    rewritten, _ = apply_rewrites(model, device)
    after = graph if rewritten is model else _Graph(rewritten)
    findings: list[Finding] = []

    def add(
        kind: Kind, rule: str, nodes: Iterable[str], message: str, remedy: str, *, fixed: bool
    ) -> None:
        names = list(nodes)
        shown = tuple(names[:_SHOWN])
        findings.append(
            Finding(
                kind=kind, rule=rule, layers=shown, count=len(names), message=message,
                remedy=remedy, fixed=fixed,
            )
        )  # fmt: skip

    if precision not in device.precisions:
        has = ", ".join(device.precisions)
        message = f"{device.name} has no {precision}"
        add("precision", precision, (), message, f"choose one of {has}", fixed=False)
    for rule, reason in limits.forbidden.items():
        if nodes := _find(graph, rule):
            fixed = not _find(after, rule)
            remedy = "export writes it in an equal way itself" if fixed else _instead(rule)
            message = f"{device.name} cannot run {rule}, here {len(nodes)} times ({reason})"
            add("forbidden", rule, map(_label, nodes), message, remedy, fixed=fixed)
    _check_slopes(graph, device, add)
    for free, message in _free_shapes(graph, device):
        fixed = not dynamic and not list(_free_shapes(after, device))
        remedy = (
            "export fixes the batch to 1"
            if fixed
            else "ask for one batch size and one image size; a static engine has no other"
        )
        add("dynamic", "static-shapes", (free,), message, remedy, fixed=fixed)
    opset = _opset(model)
    if limits.opset_max is not None and opset > limits.opset_max:
        fixed = _opset(rewritten) <= limits.opset_max
        message = f"{device.name} reads ONNX opset {limits.opset_max} and lower; this is {opset}"
        remedy = (
            f"export writes opset {limits.opset_max} itself"
            if fixed
            else "an operator of this network has no form in it; choose another network"
        )
        add("opset", "opset-max", (), message, remedy, fixed=fixed)
    if limits.quantization == "per-tensor" and precision.startswith("int8"):
        if lost := list(_lost_channels(graph)):
            message = (
                f"{device.name} has one int8 scale for all of a layer's weights, which rounds "
                f"whole channels of {len(lost)} convolutions to zero"
            )
            remedy = "equalise the channels before quantizing, or train qarepvgg or mobilenetv2"
            add("precision", "per-tensor", lost, message, remedy, fixed=False)
    for rule, reason in limits.slow.items():
        if nodes := _find(graph, rule):
            message = f"{device.name} is slow at {rule}, here {len(nodes)} times ({reason})"
            add("slow", rule, map(_label, nodes), message, _instead(rule), fixed=False)
    if limits.channel_multiple is not None:
        multiple = limits.channel_multiple
        if odd := list(_odd_channels(graph, multiple)):
            convolutions = len(graph.of_type("Conv"))
            message = (
                f"{len(odd)} of {convolutions} convolutions have channels that are no multiple of "
                f"{multiple}, to which {device.name} pads them"
            )
            remedy = (
                f"it runs and computes the padding too; widths in steps of {multiple} have none"
            )
            add("channels", "channel-multiple", odd, message, remedy, fixed=False)
    return tuple(findings)


def _instead(rule: str) -> str:
    return f"choose another network: {_INSTEAD.get(rule, f'one without {rule}')}"


def _check_slopes(graph: _Graph, device: Device, add: Callable[..., None]) -> None:
    allowed = device.limits.leaky_relu_slopes
    if allowed is None:
        return
    wrong: dict[float, list[str]] = {}
    for node in graph.of_type("LeakyRelu"):
        slope = _attribute(node, "alpha", 0.01)
        assert isinstance(slope, float)
        if not any(np.isclose(slope, one, rtol=1e-5) for one in allowed):
            wrong.setdefault(slope, []).append(_label(node))
    for slope, names in wrong.items():
        message = f"{device.name} has no LeakyRelu of slope {slope:.4g}"
        has = ", ".join(f"{one:g}" for one in allowed)
        remedy = f"train with a slope it has ({has}), or {_instead('LeakyRelu')}"
        add("forbidden", "leaky-relu-slope", names, message, remedy, fixed=False)


def _free_shapes(graph: _Graph, device: Device) -> Iterator[tuple[str, str]]:
    """Yield each graph input without constant sizes, where the device needs them."""
    if not device.limits.static_shapes:
        return
    for value in graph.graph.input:
        shape = graph.shapes.get(value.name, ())
        free = [str(size or "?") for size in shape if not isinstance(size, int)]
        if free or not shape:
            sizes = f"leaves {', '.join(free)} open" if free else "has no shape"
            message = f"{device.name} needs constant shapes; the input {value.name} {sizes}"
            yield value.name, message


def _odd_channels(graph: _Graph, multiple: int) -> Iterator[str]:
    """Yield the convolutions with channels (of each group) that are no multiple.

    The image's own channels are left out: every chip has a first layer of three.
    """
    for node in graph.of_type("Conv"):
        weight = graph.dims(node.input[1])
        if weight is None:
            continue
        groups, depthwise = _groups(node), _groups(node) > 1 and weight[1] == 1
        sizes = [weight[0] if depthwise else weight[0] // groups]
        if not depthwise and node.input[0] not in graph.inputs:
            sizes.append(weight[1])
        if any(size % multiple for size in sizes):
            yield _label(node)


def _lost_channels(graph: _Graph) -> Iterator[str]:
    """Yield the convolutions of which one scale for all weights rounds whole channels to zero."""
    for node in graph.of_type("Conv"):
        weight = graph.constant(node.input[1])
        if weight is None:
            continue
        largest = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).max(axis=1)
        step = largest.max() / 127
        if ((largest > 0) & (largest < step / 2)).any():
            yield _label(node)


def _opset(model: ModelProto) -> int:
    versions = {entry.domain: int(entry.version) for entry in model.opset_import}
    return versions.get("", versions.get("ai.onnx", 0))


# ----------------------------------------------------------------------- rewrites


class _Editor:
    """A copy of a model in which nodes are replaced by others."""

    def __init__(self, model: ModelProto) -> None:
        self.model = type(model)()
        self.model.CopyFrom(model)
        self.look = _Graph(self.model)
        self.graph = self.model.graph
        self._replaced: dict[str, list[NodeProto]] = {}  # by first output of the old node
        self._names = {name for node in self.graph.node for name in (*node.input, *node.output)}
        self._names |= {tensor.name for tensor in self.graph.initializer}

    def name(self, stem: str) -> str:
        """Return a name that nothing in the graph has."""
        while stem in self._names:
            stem += "_"
        self._names.add(stem)
        return stem

    def constant(self, stem: str, value: NDArray[np.generic]) -> str:
        """Add a constant and return its name."""
        from onnx import numpy_helper

        name = self.name(stem)
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def number(self, stem: str, value: float) -> str:
        """Add a float32 number and return its name."""
        return self.constant(stem, np.array(value, np.float32))

    def node(self, op_type: str, inputs: Sequence[str], output: str) -> NodeProto:
        """Return a new node of one output that is named after it."""
        from onnx import helper

        return helper.make_node(op_type, inputs, [output], name=f"{output}_{op_type.lower()}")

    def replace(self, old: NodeProto, new: Iterable[NodeProto]) -> None:
        self._replaced[old.output[0]] = list(new)

    def finish(self) -> ModelProto:
        """Return the model with the replacements in place, checked, without unused constants."""
        from onnx import checker, shape_inference

        nodes = [
            new for node in self.graph.node for new in self._replaced.get(node.output[0], [node])
        ]
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)
        used = {name for node in kept for name in node.input}
        used |= {output.name for output in self.graph.output}
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in used:
                del self.graph.initializer[index]
        self.graph.ClearField("value_info")
        model: ModelProto = shape_inference.infer_shapes(
            self.model, check_type=True, strict_mode=True, data_prop=True
        )
        checker.check_model(model, full_check=True)
        return model


def apply_rewrites(model: ModelProto, device: Device) -> tuple[ModelProto, tuple[str, ...]]:
    """Return an equal model without what the device forbids, and what was rewritten, in words.

    `model` is a float32 graph and stays as it is; where nothing is to be done it is returned
    itself. What has no equal form stays too: `check_limits` names it.
    """
    require("onnx", purpose="rewriting a graph", extra="export")
    limits, said = device.limits, []
    if limits.static_shapes and (fixed := _fix_batch(model)) is not None:
        model = fixed
        said.append("batch fixed to 1")
    for rule, rewrite in (
        ("HardSwish", _split_hard_swish),
        ("HardSigmoid", _split_hard_sigmoid),
        ("shuffle-5d", _flatten_shuffles),
    ):
        if rule in limits.forbidden and not _PARTS[rule] & set(limits.forbidden):
            model, count = rewrite(model)
            if count:
                said.append(f"{rule} written as {' - '.join(_WRITTEN[rule])}, {count} times")
    if limits.opset_max is not None and _opset(model) > limits.opset_max:
        if (lowered := _lower_opset(model, limits.opset_max)) is not None:
            said.append(f"opset {_opset(model)} written as opset {limits.opset_max}")
            model = lowered
    return model, tuple(said)


_WRITTEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "HardSwish": ("Add", "Clip", "Mul", "Mul"),
        "HardSigmoid": ("Add", "Clip", "Mul"),
        "shuffle-5d": ("Reshape", "Transpose", "Reshape"),
    }
)
#: The operators that a rewrite needs, beside those it finds in the graph.
_PARTS = {rule: set(written) for rule, written in _WRITTEN.items()}


def _hard_gate(
    editor: _Editor, node: NodeProto, output: str, *, slope: float, offset: float
) -> list[NodeProto]:
    """Return the nodes of output = Clip(x + offset/slope, 0, 1/slope) * slope."""
    x, stem = node.input[0], node.output[0]
    shifted, clipped = editor.name(f"{stem}_shifted"), editor.name(f"{stem}_clipped")
    shift = editor.number(f"{stem}_shift", offset / slope)
    low, high = editor.number(f"{stem}_low", 0.0), editor.number(f"{stem}_high", 1 / slope)
    scale = editor.number(f"{stem}_slope", slope)
    return [
        editor.node("Add", [x, shift], shifted),
        editor.node("Clip", [shifted, low, high], clipped),
        editor.node("Mul", [clipped, scale], output),
    ]


def _split_hard_swish(model: ModelProto) -> tuple[ModelProto, int]:
    editor = _Editor(model)
    nodes = editor.look.of_type("HardSwish")
    for node in nodes:
        gate = editor.name(f"{node.output[0]}_gate")
        parts = _hard_gate(editor, node, gate, slope=1 / 6, offset=0.5)
        editor.replace(node, [*parts, editor.node("Mul", [node.input[0], gate], node.output[0])])
    return (editor.finish(), len(nodes)) if nodes else (model, 0)


def _split_hard_sigmoid(model: ModelProto) -> tuple[ModelProto, int]:
    editor, count = _Editor(model), 0
    for node in editor.look.of_type("HardSigmoid"):
        slope, offset = _attribute(node, "alpha", 0.2), _attribute(node, "beta", 0.5)
        assert isinstance(slope, float) and isinstance(offset, float)
        if slope > 0:
            slope = 1 / 6 if np.isclose(slope, 1 / 6, rtol=1e-6) else slope
            editor.replace(
                node, _hard_gate(editor, node, node.output[0], slope=slope, offset=offset)
            )
            count += 1
    return (editor.finish(), count) if count else (model, 0)


def _flatten_shuffles(model: ModelProto) -> tuple[ModelProto, int]:
    """Write shuffles through five dimensions with four; those of open image sizes stay."""
    editor, count = _Editor(model), 0
    for shuffle in _shuffles(editor.look, rank=5):
        batch, channels, height, width = shuffle.shape
        middle = shuffle.first.output[0]
        if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
            continue
        if len(editor.look.users[middle]) > 1 or middle in editor.look.outputs:
            continue
        if shuffle.transpose.output[0] in editor.look.outputs:
            continue
        first = batch if isinstance(batch, int) else -1
        matrix = (first, shuffle.groups, channels // shuffle.groups, height * width)
        stem, output = shuffle.transpose.output[0], shuffle.last.output[0]
        reshaped, transposed = editor.name(f"{stem}_matrix"), editor.name(f"{stem}_transposed")
        to_matrix = editor.constant(f"{stem}_to_matrix", np.array(matrix, np.int64))
        to_image = editor.constant(
            f"{stem}_to_image", np.array((first, channels, height, width), np.int64)
        )
        transpose = editor.node("Transpose", [reshaped], transposed)
        transpose.attribute.extend([_make_attribute("perm", [0, 2, 1, 3])])
        editor.replace(shuffle.first, [])
        editor.replace(shuffle.transpose, [])
        editor.replace(
            shuffle.last,
            [
                editor.node("Reshape", [shuffle.first.input[0], to_matrix], reshaped),
                transpose,
                editor.node("Reshape", [transposed, to_image], output),
            ],
        )
        count += 1
    return (editor.finish(), count) if count else (model, 0)


def _make_attribute(name: str, value: object) -> AttributeProto:
    from onnx import helper

    return helper.make_attribute(name, value)


def _fix_batch(model: ModelProto) -> ModelProto | None:
    """Return the model for a batch of one, every reshape with constant sizes; None if it is so."""
    editor = _Editor(model)
    names = set()
    for value in editor.graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) > 1 and not dims[0].HasField("dim_value"):
            names.add(dims[0].dim_param)
            dims[0].dim_value = 1
    if not names:
        return None
    for value in editor.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_value = 1
    editor.graph.ClearField("value_info")
    shapes = _Graph(editor.model).shapes
    for node in editor.graph.node:
        target = shapes.get(node.output[0], (None,))
        if node.op_type == "Reshape" and all(isinstance(size, int) for size in target):
            node.input[1] = editor.constant(
                f"{node.output[0]}_shape", np.array(target, dtype=np.int64)
            )
    return editor.finish()


# ----------------------------------------------------------------------- older opsets


class _NoOlderForm(Exception):
    """A node has no form in the older opset."""


def _lower_opset(model: ModelProto, version: int) -> ModelProto | None:
    """Return the model in an older opset (11 and up); None where a node has no form in it."""
    from onnx import helper

    domains = {entry.domain for entry in model.opset_import}
    if version < _LOWEST_OPSET or not domains <= {"", "ai.onnx"}:
        return None
    if version < 14:
        model, _ = _split_hard_swish(model)
    editor = _Editor(model)
    try:
        for node in editor.graph.node:
            _lower_node(editor, node, version)
    except _NoOlderForm:
        return None
    del editor.model.opset_import[:]
    editor.model.opset_import.append(helper.make_opsetid("", version))
    editor.model.ir_version = helper.find_min_ir_version_for(editor.model.opset_import)
    return editor.finish()


def _lower_node(editor: _Editor, node: NodeProto, version: int) -> None:
    """Write one node as the older opset does, in place."""
    from onnx import defs

    look, kind = editor.look, node.op_type
    if kind == "Reshape" and version < 14:
        target = look.constant(node.input[1])
        if _attribute(node, "allowzero", 0) and (target is None or (target == 0).any()):
            raise _NoOlderForm
        _drop(node, "allowzero")
    elif kind in ("Squeeze", "Unsqueeze") and version < 13:
        _input_to_attribute(look, node, "axes")
    elif kind.startswith("Reduce") and version < (13 if kind == "ReduceSum" else 18):
        if _attribute(node, "noop_with_empty_axes", 0) and len(node.input) < 2:
            raise _NoOlderForm
        _drop(node, "noop_with_empty_axes")
        _input_to_attribute(look, node, "axes")
    elif kind == "Split" and version < 18:
        axis = _attribute(node, "axis", 0)
        assert isinstance(axis, int)
        sizes = [look.shapes[name][axis] for name in node.output]
        if not all(isinstance(size, int) for size in sizes):
            raise _NoOlderForm
        _drop(node, "num_outputs")
        del node.input[1:]
        if version < 13:
            node.attribute.append(_make_attribute("split", sizes))
        else:
            split = editor.constant(f"{node.output[0]}_sizes", np.array(sizes, np.int64))
            node.input.append(split)
    elif kind == "AveragePool" and version < 19:
        if set(_attribute(node, "dilations", [1])) != {1}:  # type: ignore[call-overload]
            raise _NoOlderForm
        _drop(node, "dilations")
    try:
        schema = defs.get_schema(kind, max_inclusive_version=version)
    except defs.SchemaError as error:
        raise _NoOlderForm from error
    if len(node.input) > schema.max_input:
        raise _NoOlderForm
    if any(attribute.name not in schema.attributes for attribute in node.attribute):
        raise _NoOlderForm


def _drop(node: NodeProto, name: str) -> None:
    for index in reversed(range(len(node.attribute))):
        if node.attribute[index].name == name:
            del node.attribute[index]


def _input_to_attribute(look: _Graph, node: NodeProto, name: str) -> None:
    """Move a constant second input into an attribute."""
    if len(node.input) < 2:
        return
    value = look.constant(node.input[1])
    if value is None:
        raise _NoOlderForm
    del node.input[1:]
    node.attribute.append(_make_attribute(name, [int(one) for one in value]))
