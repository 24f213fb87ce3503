"""What each layer of an ONNX graph costs: multiply-adds, and the bytes it reads and writes.

A layer is what one kernel computes. Unfused that is a node; fused, it is what runtimes make of a
graph (TensorRT, OpenVINO and ONNX Runtime agree on these):

    Conv, Gemm + BatchNorm + bias + activation + one residual addition    one kernel
    x * sigmoid(x), x * clip(x + 3) / 6 behind it                         the same kernel
    a chain of element-wise operators                                     one kernel
    QuantizeLinear, Cast                                                  the end of what is before
    DequantizeLinear                                                      the start of what is after
    Reshape, Flatten, Squeeze, Identity; what is constant                 no kernel

Concat, Split, Transpose, Gather and Pad copy; a runtime can avoid some of these copies. MACs are
those of convolutions and matrix products, as `torch.utils.flop_counter` counts them; FLOPs are
twice that. Memory access cost is what a kernel reads (weights, inputs) and writes, each tensor
once, whatever the caches save.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from litezoo.export.qdq_lint import DEQUANTIZE, QUANTIZE, GraphIndex
from litezoo.models.errors import UsageError, first_line, require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["KINDS", "Convolution", "GraphCost", "Kind", "Layer", "fix_input", "read_costs"]

Kind = Literal[
    "conv", "pointwise", "grouped", "depthwise", "matmul", "elementwise", "pool", "move"
]  # fmt: skip
#: What a layer is, in words.
KINDS: Mapping[Kind, str] = MappingProxyType(
    {
        "conv": "dense convolution",
        "pointwise": "1x1 convolution",
        "grouped": "grouped convolution",
        "depthwise": "depthwise convolution",
        "matmul": "matrix product",
        "elementwise": "element-wise",
        "pool": "pooling, means, softmax",
        "move": "copying (concat, split, shuffle, pad)",
    }
)

#: Where the weight stands among the inputs of what multiplies and adds.
_WEIGHT = {
    "Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3,
    "Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3,
}  # fmt: skip
_MATMULS = frozenset(("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul"))
_POINTWISE = frozenset(
    "Abs Add And BatchNormalization BitShift Cast Ceil Celu Clip Cos DequantizeLinear Div Elu "
    "Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish LeakyRelu Less "
    "LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal Relu "
    "Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu Where "
    "Xor".split()
)
_POOLS = frozenset(
    "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization Hardmax "
    "InstanceNormalization LRN LayerNormalization LogSoftmax LpNormalization LpPool MaxPool "
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare RMSNormalization Softmax ArgMax ArgMin TopK".split()
)
#: Operators that give a tensor another shape or name and move nothing.
_VIEWS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"))
#: Operators that read as much of their input as they write.
_PARTIAL = frozenset(("Slice", "Gather", "GatherElements", "GatherND"))
#: What ends any kernel: the same values in another type.
_TYPE_CHANGES = frozenset((QUANTIZE, "Cast"))
_ADDITIONS = frozenset(("Add", "Sum"))
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))
#: Operators with multiply-adds that are not counted: better no answer than a wrong one.
_UNCOUNTED = frozenset(
    "Attention DeformConv Einsum GRU If LSTM Loop RNN RotaryEmbedding Scan SequenceMap".split()
)
#: Inputs that are weights where they are constant; of arithmetic, all but single numbers are.
_PARAMETERS = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "ConvInteger": (1,), "QLinearConv": (3, 8),
    "Gemm": (0, 1, 2), "MatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3),
    "BatchNormalization": (1, 2, 3, 4), "PRelu": (1,), "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2), "RMSNormalization": (1,),
    "Gather": (0,),
}  # fmt: skip
#: Weights that training does not learn: running mean and variance.
_BUFFERS = {"BatchNormalization": (3, 4)}
#: What makes a tensor of one number: an unoptimized export's biases of zeros.
_FILLS = ("Expand", "ConstantOfShape")
#: Name and bytes of ONNX's types.
_TYPES = {
    "FLOAT": ("fp32", 4), "FLOAT16": ("fp16", 2), "BFLOAT16": ("bf16", 2), "DOUBLE": ("fp64", 8),
    "INT8": ("int8", 1), "UINT8": ("int8", 1), "INT16": ("int16", 2), "UINT16": ("int16", 2),
    "INT32": ("int32", 4), "UINT32": ("int32", 4), "INT64": ("int64", 8), "UINT64": ("int64", 8),
    "BOOL": ("bool", 1),
}  # fmt: skip
#: Most element-wise operators between two points at which a kernel may end.
_LONGEST = 16


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """The shape of one convolution; positions are batch times height times width."""

    in_channels: int
    out_channels: int
    groups: int
    window: tuple[int, ...]
    in_positions: int
    out_positions: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One kernel: the nodes it computes and what they cost.

    `name` is the first node's, `parameter` its weight's; `operators` are in the graph's order.
    `dtype` is what it computes in. `activations` are the elements it writes. `reads` and `writes`
    are tensors; the first read is what the first node works on.
    """

    name: str
    parameter: str
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    kind: Kind
    dtype: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    convolution: Convolution | None
    params: int
    macs: int
    activations: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that the weight belongs to, as exporters of PyTorch name it, else ""."""
        module, found, _ = self.parameter.partition(".weight")
        return module if found else ""

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.macs

    @property
    def memory_bytes(self) -> int:
        """The memory access cost: weights and inputs read, outputs written."""
        return self.weight_bytes + self.input_bytes + self.output_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.memory_bytes if self.memory_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class GraphCost:
    """All layers of a graph in an order they can run in, as nodes and as fused kernels.

    `params` counts what layers share once.
    """

    unfused: tuple[Layer, ...]
    fused: tuple[Layer, ...]
    params: int


def fix_input(
    proto: ModelProto, *, batch: int | None, sides: tuple[int, int] | None, name: str
) -> tuple[ModelProto, tuple[int, ...]]:
    """Return a copy of a model whose image input has constant sizes, and these: (N, C, H, W).

    Sizes that the file leaves open become `batch` (default 1) and `sides`; those that it fixes
    stay. UsageError, which calls the file `name`, where they are asked to be others, where the
    sides are needed, and for a model of more than one input.
    """
    fixed = type(proto)()
    fixed.CopyFrom(proto)
    weights = {tensor.name for tensor in fixed.graph.initializer}
    inputs = [value for value in fixed.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        found = ", ".join(
            f"{value.name} of {len(value.type.tensor_type.shape.dim)} axes" for value in inputs
        )
        raise UsageError(
            f"{name} takes {found or 'no input'}; profile takes networks of one image input "
            "(N, C, H, W)"
        )
    dims = inputs[0].type.tensor_type.shape.dim
    asked = (batch, None, *(sides or (None, None)))
    words = ("--batch", "", "--resolution", "--resolution")
    for axis, (dim, size) in enumerate(zip(dims, asked, strict=True)):
        if dim.HasField("dim_value"):
            if size not in (None, dim.dim_value):
                raise UsageError(
                    f"{name} is made for {words[axis][2:]} {dim.dim_value}, not {size}; leave "
                    f"{words[axis]} out, or export it with that size open"
                )
            continue
        if axis == 0:
            dim.dim_value = batch or 1
        elif size is None:
            what = f"give it: {words[axis]} N" if words[axis] else "export it with that fixed"
            raise UsageError(f"{name} leaves axis {axis} of {inputs[0].name} open; {what}")
        else:
            dim.dim_value = size
    for value in fixed.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.Clear()
    fixed.graph.ClearField("value_info")
    return fixed, tuple(dim.dim_value for dim in dims)


def read_costs(proto: ModelProto, *, name: str) -> GraphCost:
    """Return what every layer of a model with constant sizes (see `fix_input`) costs.

    UsageError, which calls the file `name`, for operators whose multiply-adds are not known, and
    for tensors without a known shape.
    """
    require("onnx", purpose="profiling", extra="export")
    graph = _Graph(proto, name)
    unfused = graph.layers([[node] for node in graph.kept(fused=False)])
    fused = graph.layers(graph.groups())
    return GraphCost(unfused=unfused, fused=fused, params=graph.count_params())


def _label(node: NodeProto) -> str:
    return node.name or node.output[0]


def _outputs(node: NodeProto) -> list[str]:
    return [name for name in node.output if name]


class _Graph:
    """A model with the shape and type of each tensor, and which tensors are the same memory."""

    def __init__(self, proto: ModelProto, name: str) -> None:
        from onnx import TensorProto, shape_inference

        self.name = name
        self.index = GraphIndex(proto.graph)
        self._type_name = TensorProto.DataType.Name
        self._check_operators(proto)
        try:
            inferred = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
        except shape_inference.InferenceError as error:
            raise UsageError(
                f"{name} does not work at this size: {first_line(error)}; choose another "
                "--resolution or --batch"
            ) from error
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.elem_types: dict[str, int] = {}
        for value in (*inferred.value_info, *inferred.input, *inferred.output):
            kind = value.type.tensor_type
            self.elem_types[value.name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim
                )
        for tensor_name, tensor in self.index.initializers.items():
            self.shapes[tensor_name] = tuple(tensor.dims)
            self.elem_types[tensor_name] = tensor.data_type
        self.constants = set(self.index.initializers)
        for node in proto.graph.node:
            inputs = [one for one in node.input if one]
            if node.op_type == "CastLike":
                inputs = inputs[:1]  # of the second only the type counts
            if node.op_type in ("Shape", "Size") or self.constants.issuperset(inputs):
                self.constants.update(_outputs(node))
        self.nodes: list[NodeProto] = [
            node
            for node in proto.graph.node
            if not self.constants.issuperset(_outputs(node)) and node.op_type not in _VIEWS
        ]
        self.position = {id(node): index for index, node in enumerate(self.nodes)}
        self.same = {
            node.output[0]: node.input[0]
            for node in proto.graph.node
            if node.op_type in _VIEWS and node.output[0] not in self.constants
        }

    def _check_operators(self, proto: ModelProto) -> None:
        for node in proto.graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise UsageError(
                    f"{self.name}: {_label(node)} is {node.domain}.{node.op_type}, which ONNX does "
                    "not define; profile the file that the runtime made this one of"
                )
            if node.op_type in _UNCOUNTED:
                raise UsageError(
                    f"{self.name}: {_label(node)} is a {node.op_type}, whose multiply-adds are not "
                    f"counted (counted are: {', '.join(_WEIGHT)})"
                )

    # ------------------------------------------------------------------- tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a tensor's sizes; UsageError where one is not known."""
        sizes = self.shapes.get(tensor)
        if sizes is None or None in sizes:
            maker = self.index.producers.get(tensor)
            by = f", which {_label(maker)} ({maker.op_type}) makes" if maker is not None else ""
            raise UsageError(
                f"{self.name}: the shape of {tensor}{by} is not known; make shapes constant first: "
                "onnxsim FILE FILE"
            )
        return tuple(size for size in sizes if size is not None)

    def elements(self, tensor: str) -> int:
        return math.prod(self.shape(tensor))

    def _type(self, tensor: str) -> tuple[str, int]:
        kind = self._type_name(self.elem_types.get(tensor, 0))
        if kind not in _TYPES:
            raise UsageError(
                f"{self.name}: {tensor} is of type {kind.lower()}, whose cost is not known (known "
                f"are: {', '.join(known.lower() for known in _TYPES)})"
            )
        return _TYPES[kind]

    def dtype(self, tensor: str) -> str:
        return self._type(tensor)[0]

    def bytes(self, tensor: str) -> int:
        return self.elements(tensor) * self._type(tensor)[1]

    def resolve(self, tensor: str) -> str:
        """Return the tensor whose memory this one is."""
        while tensor in self.same:
            tensor = self.same[tensor]
        return tensor

    def stored(self, tensor: str) -> str:
        """Return what the file holds of a constant: the integers of a dequantized weight."""
        while tensor not in self.index.initializers:
            node = self.index.producer(
                tensor, DEQUANTIZE, "Cast", "Transpose", "Reshape", "Identity", "Unsqueeze"
            )
            if node is None:
                return tensor
            tensor = node.input[0]
        return tensor

    def computed(self, node: NodeProto) -> list[str]:
        """Return the inputs of a node that are not constant, as the memory they lie in."""
        names = [self.resolve(name) for name in node.input if name and name not in self.constants]
        return list(dict.fromkeys(names))

    def weights(self, node: NodeProto) -> list[tuple[str, bool]]:
        """Return a node's constant weights as the file holds them; True for learned ones."""
        places: Sequence[int] = _PARAMETERS.get(node.op_type, ())
        if node.op_type in _ARITHMETIC:
            places = range(len(node.input))
        found = []
        for place in places:
            name = node.input[place] if place < len(node.input) else ""
            if not name or name not in self.constants:
                continue
            if node.op_type in _ARITHMETIC and self.elements(name) == 1:
                continue
            stored = self.stored(name)
            if self.index.producer(stored, *_FILLS) is None:
                found.append((stored, place not in _BUFFERS.get(node.op_type, ())))
        return found

    def count_params(self) -> int:
        """Count what is learned; of a layer that is used twice once.

        Exporters store equal tensors once, such as biases of zeros: only together with their weight
        are they the same parameter.
        """
        seen: dict[tuple[str, str], int] = {}
        for node in self.nodes:
            own = [name for name, learned in self.weights(node) if learned]
            shared = node.op_type in _WEIGHT or node.op_type == "Gather"
            for name in own:
                seen[own[0] if shared else _label(node), name] = self.elements(name)
        return sum(seen.values())

    # ------------------------------------------------------------------- kernels

    def kept(self, *, fused: bool) -> list[NodeProto]:
        """Return the nodes that cost something; `fused`, Q/DQ pairs lie in their neighbours."""
        if not fused:
            return self.nodes
        kept: list[NodeProto] = []
        first: dict[tuple[str | bytes, ...], str] = {}
        for node in self.nodes:
            if node.op_type == DEQUANTIZE:
                self.same[node.output[0]] = node.input[0]
                continue
            if node.op_type == QUANTIZE:
                steps = [self.index.values(name) for name in node.input[1:]]
                key = (
                    self.resolve(node.input[0]),
                    *(b"" if step is None else step.tobytes() for step in steps),
                    *(name for name, s in zip(node.input[1:], steps, strict=True) if s is None),
                )
                if first.setdefault(key, node.output[0]) != node.output[0]:
                    self.same[node.output[0]] = first[key]
                    continue
            kept.append(node)
        return kept

    def groups(self) -> list[list[NodeProto]]:
        """Return the nodes of each fused kernel, the kernels in an order they can run in."""
        nodes = self.kept(fused=True)
        self._readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in self.computed(node):
                self._readers.setdefault(name, []).append(node)
        self._results = {self.resolve(name) for name in self.index.outputs}
        self._taken: set[int] = set()
        groups = []
        for node in sorted(nodes, key=lambda node: node.op_type not in _WEIGHT):
            if id(node) not in self._taken:  # convolutions come first and take what they can
                groups.append(self._grow(node))
        return sorted(groups, key=lambda group: max(self.position[id(node)] for node in group))

    def _grow(self, first: NodeProto) -> list[NodeProto]:
        """Return the kernel that begins with a node, and take its nodes."""
        group, added = [first], set[str]()
        self._taken.add(id(first))
        while len(ends := self._ends(group)) == 1:
            members = self._following(first, ends[0], added)
            if not members:
                break
            group += members
            self._taken.update(map(id, members))
        return group

    def _ends(self, group: list[NodeProto]) -> list[str]:
        """Return what a group makes and others need."""
        inside = set(map(id, group))
        return [
            name
            for node in group
            for name in _outputs(node)
            if name in self._results
            or any(id(reader) not in inside for reader in self._readers.get(name, ()))
        ]

    def _following(self, first: NodeProto, end: str, added: set[str]) -> list[NodeProto]:
        """Return the fewest nodes behind the tensor `end` with which its kernel ends in one tensor.

        They are found in the graph's order, so that all a node needs of this kernel is in it before
        the node itself; whatever else it reads does not depend on the kernel. `added` holds the
        residual that the kernel adds, if any, and is kept up to date.
        """
        members: list[NodeProto] = []
        inside, residuals = {end}, set(added)
        while end not in self._results and len(members) < _LONGEST:
            known = set(map(id, members))
            waiting = {
                self.position[id(reader)]: reader
                for name in inside
                for reader in self._readers.get(name, ())
                if id(reader) not in known
            }
            open_end = any(id(r) not in known for r in self._readers.get(end, ()))
            if members and not open_end and len(self._ends(members)) == 1:
                added.update(residuals)
                return members
            if not waiting:
                return []
            node = waiting[min(waiting)]
            others = set(self.computed(node)) - inside
            if not self._fits(first, node, end, others, residuals):
                return []
            if first.op_type in _WEIGHT:
                residuals |= others
            members.append(node)
            inside.update(_outputs(node))
        return []

    def _fits(
        self, first: NodeProto, node: NodeProto, end: str, others: set[str], residuals: set[str]
    ) -> bool:
        """Whether a kernel that began with `first` can compute `node` at its end."""
        if id(node) in self._taken or len(_outputs(node)) != 1:
            return False
        if self.elements(node.output[0]) != self.elements(end):
            return False
        if first.op_type in _WEIGHT:
            if not others:
                return node.op_type in _POINTWISE
            equal = all(self.elements(name) == self.elements(end) for name in others)
            return node.op_type in _ADDITIONS and equal and len(residuals | others) == 1
        if first.op_type in _POINTWISE:
            return node.op_type in _POINTWISE
        return node.op_type in _TYPE_CHANGES and not others

    # ------------------------------------------------------------------- costs

    def layers(self, groups: Sequence[Sequence[NodeProto]]) -> tuple[Layer, ...]:
        """Return what each group of nodes costs as one kernel."""
        readers: dict[str, set[int]] = {}
        for index, group in enumerate(groups):
            for node in group:
                for name in self.computed(node):
                    readers.setdefault(name, set()).add(index)
        results = {self.resolve(name) for name in self.index.outputs}
        return tuple(
            self._layer(group, index, readers, results) for index, group in enumerate(groups)
        )

    def _layer(
        self,
        group: Sequence[NodeProto],
        index: int,
        readers: Mapping[str, set[int]],
        results: set[str],
    ) -> Layer:
        made = [name for node in group for name in _outputs(node)]
        needed = [name for name in made if name in results or readers.get(name, set()) - {index}]
        writes = needed or made[-1:]
        reads = [name for node in group for name in self.computed(node) if name not in made]
        reads = list(dict.fromkeys(reads))
        first = group[0]
        weights = {name: learned for node in group for name, learned in self.weights(node)}
        convolution = self._convolution(first)
        input_bytes = sum(map(self.bytes, reads))
        if first.op_type in _PARTIAL:
            most = self.elements(first.output[0]) * self._type(reads[0])[1] if reads else 0
            input_bytes = min(input_bytes, most)
        return Layer(
            name=_label(first),
            parameter=next(iter(weights), ""),
            nodes=tuple(_label(node) for node in group),
            operators=tuple(node.op_type for node in group),
            kind=_kind(first, convolution),
            dtype=self._computes_in(first),
            in_shape=self.shape(reads[0]) if reads else (),
            out_shape=self.shape(writes[-1]),
            convolution=convolution,
            params=sum(self.elements(name) for name, learned in weights.items() if learned),
            macs=self._macs(first),
            activations=sum(map(self.elements, writes)),
            weight_bytes=sum(map(self.bytes, weights)),
            input_bytes=input_bytes,
            output_bytes=sum(map(self.bytes, writes)),
            reads=tuple(reads),
            writes=tuple(writes),
        )

    def _computes_in(self, node: NodeProto) -> str:
        """Return int8 where both factors are in memory as integers, else the type of the data."""
        if node.op_type not in _WEIGHT:
            return self.dtype(_outputs(node)[0])
        weight = node.input[_WEIGHT[node.op_type]]
        factors = {
            self.dtype(self.stored(name) if name in self.constants else self.resolve(name))
            for name in (node.input[0], weight)
        }
        return "int8" if factors == {"int8"} else self.dtype(node.input[0])

    def _macs(self, node: NodeProto) -> int:
        if node.op_type not in _WEIGHT:
            return 0
        outputs = self.elements(node.output[0])
        if node.op_type in _MATMULS:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            return outputs * self.shape(node.input[0])[0 if transposed else -1]
        weight = self.shape(node.input[_WEIGHT[node.op_type]])
        maps = self.elements(node.input[0]) if node.op_type == "ConvTranspose" else outputs
        return maps * math.prod(weight[1:])

    def _convolution(self, node: NodeProto) -> Convolution | None:
        if node.op_type not in _WEIGHT or node.op_type in _MATMULS:
            return None
        weight = self.shape(node.input[_WEIGHT[node.op_type]])
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        source, result = self.shape(node.input[0]), self.shape(node.output[0])
        return Convolution(
            in_channels=source[1],
            out_channels=result[1],
            groups=groups,
            window=weight[2:],
            in_positions=source[0] * math.prod(source[2:]),
            out_positions=result[0] * math.prod(result[2:]),
        )


def _kind(node: NodeProto, convolution: Convolution | None) -> Kind:
    if convolution is not None:
        if convolution.groups > 1:
            return "depthwise" if convolution.groups == convolution.in_channels else "grouped"
        return "pointwise" if math.prod(convolution.window) == 1 else "conv"
    if node.op_type in _MATMULS:
        return "matmul"
    if node.op_type in _POINTWISE:
        return "elementwise"
    return "pool" if node.op_type in _POOLS else "move"
