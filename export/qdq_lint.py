"""Does a quantized ONNX file place its Q/DQ pairs as TensorRT fuses them?

TensorRT takes the precision of every layer from where QuantizeLinear and DequantizeLinear stand. A
pair in the wrong place is no error: the layer silently runs in float, or twice as many tensors are
written. What `lint` asks for, where [Q] is a pair:

    x ─┬─[Q]─ Conv ─ Relu ─[Q]─ Conv ─ Add ─ Relu ─     weights: int8 and a DequantizeLinear
       └─[Q]────────────────────────────┘               the other branch of an Add only

    ... ─ Conv ─ Relu ─ GlobalAveragePool ─ Gemm         no pair behind the pool, none at the end
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["RULES", "GraphIndex", "Problem", "check_lint", "lint"]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
#: What TensorRT fuses into the convolution before it.
ACTIVATIONS = frozenset(
    "Clip Elu Gelu HardSigmoid HardSwish LeakyRelu Mish PRelu Relu Selu Sigmoid Softplus "
    "Swish Tanh".split()
)
_POOLS = frozenset(("GlobalAveragePool", "GlobalMaxPool"))
_CLASSIFIERS = frozenset(("Gemm", "MatMul"))
#: Producers that a following activation is fused with.
_FUSES_ACTIVATION = frozenset(("Conv", "Add", "BatchNormalization"))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that TensorRT would refuse or run slowly, the node it is at and what to do."""

    rule: str
    node: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}; {self.remedy} ({self.rule})"


class GraphIndex:
    """Who makes and who reads each tensor of a graph."""

    def __init__(self, graph: GraphProto):
        self.graph = graph
        self.initializers: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.outputs = {output.name for output in graph.output}
        self.producers: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            self.producers.update((name, node) for name in node.output if name)
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                self.initializers.setdefault(node.output[0], node.attribute[0].t)

    def producer(self, tensor: str, *op_types: str) -> NodeProto | None:
        """Return the node that makes a tensor, if it is one of `op_types`."""
        node = self.producers.get(tensor)
        return node if node is not None and node.op_type in op_types else None

    def values(self, tensor: str) -> NDArray[np.generic] | None:
        """Return a constant's values, None for what is computed."""
        from onnx import numpy_helper

        constant = self.initializers.get(tensor)
        return None if constant is None else np.asarray(numpy_helper.to_array(constant))

    def data_inputs(self, node: NodeProto) -> list[str]:
        """Return the inputs of a node that are computed from the network's input."""
        return [
            name
            for name in node.input
            if name
            and name not in self.initializers
            and (
                name not in self.producers
                or not self.producer(name, DEQUANTIZE)
                or self.producers[name].input[0] not in self.initializers
            )
        ]

    def is_only_read_by(self, tensor: str, node: NodeProto) -> bool:
        """Whether nothing but `node` needs a tensor."""
        return tensor not in self.outputs and self.readers[tensor] == [node]

    def source(self, tensor: str) -> str:
        """Return the float tensor that a Q/DQ pair stands for; other tensors are themselves."""
        dequantize = self.producer(tensor, DEQUANTIZE)
        quantize = dequantize and self.producer(dequantize.input[0], QUANTIZE)
        return quantize.input[0] if quantize else tensor

    def activation_readers(self, tensor: str) -> list[NodeProto]:
        """Return the activations that read a tensor; x * gate(x), Swish written out, is one."""
        found = [node for node in self.readers[tensor] if node.op_type in ACTIVATIONS]
        gates = {name for node in found for name in node.output}
        found += [
            node
            for node in self.readers[tensor]
            if node.op_type == "Mul" and gates.intersection(node.input)
        ]
        return found

    def pooled(self) -> set[str]:
        """Return the tensors behind a global pool or a Gemm: a classifier's, an SE gate's.

        A tensor is one if everything it is computed from is; x * gate is a feature map again.
        """
        found: set[str] = set()
        for node in self.graph.node:
            inputs = self.data_inputs(node)
            if self._is_global_pool(node) or (inputs and found.issuperset(inputs)):
                found.update(node.output)
        return found

    def _is_global_pool(self, node: NodeProto) -> bool:
        if node.op_type in _POOLS or node.op_type in _CLASSIFIERS:
            return True
        if node.op_type != "ReduceMean":
            return False
        axes = self.values(node.input[1]) if len(node.input) > 1 else None
        if axes is None:
            axes = np.array([i for a in node.attribute if a.name == "axes" for i in a.ints])
        return sorted(int(axis) % 4 for axis in axes) == [2, 3]


def _name(node: NodeProto) -> str:
    return node.name or node.output[0]


Found = Iterator[tuple["NodeProto", str]]


def _pairs(index: GraphIndex) -> Found:
    for node in index.graph.node:
        if node.op_type == QUANTIZE:
            readers = index.readers[node.output[0]]
            others = [reader.op_type for reader in readers if reader.op_type != DEQUANTIZE]
            if others or not readers:
                yield node, f"{' and '.join(others) or 'nothing'} reads its integers"
        if node.op_type == DEQUANTIZE and index.values(node.input[0]) is None:
            if not index.producer(node.input[0], QUANTIZE):
                yield node, "its integers come from no QuantizeLinear"


def _activations(index: GraphIndex) -> Found:
    for node in index.graph.node:
        if node.op_type not in (QUANTIZE, DEQUANTIZE) or index.values(node.input[0]) is not None:
            continue
        zero = index.values(node.input[2]) if len(node.input) > 2 else None
        scale = index.values(node.input[1])
        if zero is None and node.op_type == QUANTIZE:
            yield node, "without a zero point it gives uint8"
        elif zero is not None and zero.dtype != np.int8:
            yield node, f"the activation is {zero.dtype}, not int8"
        elif zero is not None and np.any(zero != 0):
            yield node, f"the zero point is {int(zero.flat[0])}, not 0"
        elif scale is not None and scale.size != 1:
            yield node, f"the activation has {scale.size} scales, one per channel"


def _weights(index: GraphIndex) -> Found:
    for node in index.graph.node:
        weight = index.values(node.input[0]) if node.op_type == DEQUANTIZE else None
        if weight is None or weight.dtype == np.int32:
            continue
        zero = index.values(node.input[2]) if len(node.input) > 2 else None
        scale = index.values(node.input[1])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if weight.dtype != np.int8:
            yield node, f"the weight is {weight.dtype}, not int8"
        elif zero is not None and np.any(zero != 0):
            yield node, "the weight's zero point is not 0"
        elif scale is not None and scale.size > 1 and axis % weight.ndim != 0:
            yield node, f"the weight's scales lie along axis {axis}, not 0"
        elif scale is not None and scale.size not in (1, len(weight)):
            yield node, f"the weight has {scale.size} scales for {len(weight)} output channels"


def _biases(index: GraphIndex) -> Found:
    for node in index.graph.node:
        if node.op_type == DEQUANTIZE:
            values = index.values(node.input[0])
            if values is not None and values.dtype == np.int32:
                yield node, "a bias is dequantized from int32"


def _scales(index: GraphIndex) -> Found:
    for node in index.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            scale = index.values(node.input[1])
            if scale is None:
                yield node, "its scale is computed in the graph"
                continue
            steps = scale.astype(np.float64)
            if not np.isfinite(steps).all():
                yield node, "a scale is not finite"
            elif (steps <= 0).any():
                yield node, f"a scale is {steps.min()}"


def _conv_activations(index: GraphIndex) -> Found:
    for node in index.graph.node:
        if node.op_type == DEQUANTIZE:
            producer = index.producer(index.source(node.output[0]), *_FUSES_ACTIVATION)
            fused = index.activation_readers(node.output[0]) if producer else []
            if producer and fused:
                yield node, f"it stands between {_name(producer)} and its {fused[0].op_type}"


def _conv_inputs(index: GraphIndex) -> Found:
    for node in index.graph.node:
        if node.op_type == "Conv":
            data, weight = (index.producer(name, DEQUANTIZE) for name in node.input[:2])
            if (data is None) != (weight is None):
                ends = ("weight", "input") if data is None else ("input", "weight")
                yield node, f"its {ends[0]} is int8 and its {ends[1]} float"


def _residuals(index: GraphIndex) -> Found:
    pooled = index.pooled()
    for node in index.graph.node:
        inputs = index.data_inputs(node)
        if node.op_type != "Add" or len(inputs) != 2 or pooled.intersection(inputs):
            continue
        quantized = [index.producer(name, DEQUANTIZE) for name in inputs]
        fusible = [_is_fusible(index, name, node) for name in inputs]
        if not any(quantized) and any(fusible):
            yield node, "neither branch is int8, so the convolution before it ends in float"
        if all(quantized) and any(fusible):
            yield node, "both branches are int8, one behind the convolution that it fuses into"


def _is_fusible(index: GraphIndex, tensor: str, add: NodeProto) -> bool:
    """Whether an input of an Add is a quantized convolution's that nothing else reads."""
    chain, reader = [tensor], add
    dequantize = index.producer(tensor, DEQUANTIZE)
    if dequantize is not None:
        quantize = index.producer(dequantize.input[0], QUANTIZE)
        if quantize is None:
            return False
        chain += [quantize.output[0], quantize.input[0]]
    for name in chain:
        if not index.is_only_read_by(name, reader):
            return False
        reader = index.producers[name]
    conv = index.producer(chain[-1], "Conv")
    return conv is not None and index.producer(conv.input[1], DEQUANTIZE) is not None


def _outputs(index: GraphIndex) -> Found:
    for name in sorted(index.outputs):
        node = index.producer(name, QUANTIZE, DEQUANTIZE)
        if node is not None:
            yield node, f"the network's output {name} is quantized"


def _classifiers(index: GraphIndex) -> Found:
    pooled = index.pooled()
    for node in index.graph.node:
        inputs = [name for name in node.input if index.producer(name, DEQUANTIZE)]
        behind = pooled.intersection(map(index.source, node.input))
        if node.op_type in _CLASSIFIERS and inputs:
            yield node, f"this {node.op_type} is quantized"
        elif node.op_type == "Conv" and inputs and behind:
            yield node, "this convolution is quantized and reads what a global pool gave"


#: Every rule: what to do, and the function that finds where it is broken.
RULES: dict[str, tuple[str, Callable[[GraphIndex], Found]]] = {
    "pair": ("put a DequantizeLinear behind every QuantizeLinear", _pairs),
    "activation": ("quantize activations to symmetric int8, one scale each", _activations),
    "weight": ("quantize weights to symmetric int8, per output channel (axis 0)", _weights),
    "bias": ("leave biases in float (QuantizeBias=False)", _biases),
    "scale": ("calibrate again with images that reach this layer", _scales),
    "conv-activation": ("move the pair behind the activation", _conv_activations),
    "conv-inputs": ("quantize both or neither", _conv_inputs),
    "residual": ("quantize the shortcut branch and only that", _residuals),
    "output": ("leave the output in float", _outputs),
    "classifier": ("leave what follows the global pool in float", _classifiers),
}


def lint(proto: ModelProto) -> tuple[Problem, ...]:
    """Return all places where the file breaks TensorRT's Q/DQ rules, in the order of `RULES`."""
    require("onnx", purpose="checking ONNX files", extra="export")
    index = GraphIndex(proto.graph)
    return tuple(
        Problem(rule=rule, node=_name(node), message=message, remedy=remedy)
        for rule, (remedy, find) in RULES.items()
        for node, message in find(index)
    )


def check_lint(proto: ModelProto) -> None:
    """Raise CheckFailed with the first problem, and their number, where `lint` finds any."""
    problems = lint(proto)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckFailed(f"the Q/DQ pairs do not suit TensorRT: {problems[0]}{more}")
