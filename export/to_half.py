"""A float32 ONNX graph to a strongly typed float16 or bfloat16 one.

Precision lives in the file, not in a builder's flag: every weight becomes float16 (or bfloat16) and
a Cast stands behind the input and before the output, which stay float32 (unless `io` says half).

    fp16   10 bits of mantissa, up to 65504. What is beyond is refused by name: weights always,
           activations as measured on the given images, because a CPU runtime computes in float32
           inside and would not show the overflow.
    bf16   7 bits of mantissa, float32's range: nothing overflows. ONNX has bfloat16 convolutions
           and pools from opset 22 on, so the file is of that opset (TensorRT 10.6 and newer).

A Q/DQ file becomes the form int8-fp16 or int8-bf16: its integers stay, its scales and all that is
not 8-bit become 16-bit floats. Scales that float16 could only hold as subnormals, or not at all,
are raised.

ONNX Runtime has no bfloat16 kernels for the CPU but Cast and what only moves values:
`emulate_bf16` gives a bfloat16 file the form that runs there with the same roundings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from litezoo.models.errors import CheckFailed, UsageError, require

from .runtime import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = [
    "HALVES",
    "Half",
    "Io",
    "IoType",
    "activation_maxima",
    "check_fp16_range",
    "emulate_bf16",
    "read_io",
    "to_half",
]

#: The 16-bit floats of a typed file.
Half = Literal["fp16", "bf16"]
#: What a typed file takes and gives: float32, or the 16-bit float of its inside.
Io = Literal["fp32", "half"]
#: The type of a file's input and output.
IoType = Literal["fp32", "fp16", "bf16"]
HALVES: tuple[Half, ...] = ("fp16", "bf16")
_NAMES = {"fp16": "float16", "bf16": "bfloat16"}
_LARGEST = {"fp16": float(np.finfo(np.float16).max), "bf16": (2 - 2**-7) * 2.0**127}
_LARGEST_TEXT = {"fp16": "65504", "bf16": "3.39e+38"}
_SMALLEST = np.float32(np.finfo(np.float16).smallest_normal)
#: The first opset in which Conv, the pools and HardSwish may be bfloat16.
_BF16_OPSET = 22
#: Inputs that ONNX defines as float32 whatever the data's type is, by operator.
_STAYS_FLOAT = {"Resize": (1, 2)}


def to_half(proto: ModelProto, half: Half, *, io: Io = "fp32") -> ModelProto:
    """Return a float16 or bfloat16 copy of a float32 or Q/DQ model.

    `io` "half" makes its inputs and outputs 16-bit too, for callers that have such images already.
    """
    require("onnx", purpose="export", extra="export")
    from onnx import TensorProto, checker, shape_inference

    if half not in HALVES or io not in ("fp32", "half"):
        known = " or ".join(HALVES)
        raise UsageError(f"a typed file is {known}, io fp32 or half; not {half}, {io}")
    kind = TensorProto.FLOAT16 if half == "fp16" else TensorProto.BFLOAT16
    model = type(proto)()
    model.CopyFrom(proto)
    if half == "fp16":
        _raise_scales(model)
    else:
        model = _raise_opset(model)
    graph = model.graph
    stays = {
        node.input[i]
        for node in graph.node
        for i in _STAYS_FLOAT.get(node.op_type, ())
        if i < len(node.input)
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in stays:
            _halve(tensor, tensor.name, half)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                if not stays.intersection(node.output):
                    _halve(attribute.t, node.output[0], half)
            elif node.op_type == "Cast" and attribute.name == "to":
                if attribute.i == TensorProto.FLOAT:
                    attribute.i = kind
    graph.ClearField("value_info")
    if io == "fp32":
        _cast_ends(graph, kind, half)
    else:
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = kind
    model = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    checker.check_model(model, full_check=True)
    return model


def read_io(proto: ModelProto) -> IoType:
    """Return the type of a file's inputs and outputs; UsageError where they are not of one float.

    Initializers that are listed as inputs do not count.
    """
    from onnx import TensorProto

    floats: dict[int, IoType] = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
    }
    weights = {tensor.name for tensor in proto.graph.initializer}
    ends = [v for v in (*proto.graph.input, *proto.graph.output) if v.name not in weights]
    kinds = {value.type.tensor_type.elem_type for value in ends}
    if len(kinds) != 1 or not kinds <= floats.keys():
        found = ", ".join(TensorProto.DataType.Name(kind) for kind in sorted(kinds)) or "none"
        raise UsageError(
            f"the ONNX file's inputs and outputs are {found}; export one whose are all float32, "
            "float16 or bfloat16"
        )
    return floats[kinds.pop()]


def _halve(tensor: TensorProto, name: str, half: Half) -> None:
    """Round a constant in place, to the nearest, ties to even."""
    from onnx import TensorProto, helper, numpy_helper

    values = numpy_helper.to_array(tensor)
    if np.abs(values).max(initial=0.0) > _LARGEST[half]:
        raise CheckFailed(
            f"the weight {name} reaches {np.abs(values).max():.3g}, beyond {_NAMES[half]}'s "
            f"{_LARGEST_TEXT[half]}; export fp32 instead"
        )
    kind = TensorProto.FLOAT16 if half == "fp16" else TensorProto.BFLOAT16
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))


def _cast_ends(graph: GraphProto, kind: int, half: Half) -> None:
    """Put a Cast behind every float32 input and before every float32 output, in place."""
    from onnx import TensorProto, helper

    floats = [i.name for i in graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT]
    for name in floats:
        inside = f"{name}_{half}"
        for node in graph.node:
            node.input[:] = [inside if i == name else i for i in node.input]
        graph.node.insert(0, helper.make_node("Cast", [name], [inside], to=kind))
    for output in graph.output:
        if output.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        inside = f"{output.name}_{half}"
        rename = {output.name: inside}
        for node in graph.node:
            node.output[:] = [rename.get(name, name) for name in node.output]
            node.input[:] = [rename.get(name, name) for name in node.input]
        graph.node.append(helper.make_node("Cast", [inside], [output.name], to=TensorProto.FLOAT))


def _raise_opset(model: ModelProto) -> ModelProto:
    """Return the model in the first opset that has its operators in bfloat16, or as it is."""
    from onnx import version_converter

    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset >= _BF16_OPSET:
        return model
    return version_converter.convert_version(model, _BF16_OPSET)


def _raise_scales(model: ModelProto) -> None:
    """Raise scales in place to what float16 holds in full; a weight's integers shrink with them.

    An activation's pair rounds more coarsely then, below 6e-5, which float16 could not hold either.
    """
    from onnx import numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {n.input[1]: numpy_helper.to_array(tensors[n.input[1]]) for n in pairs}
    for name, scale in scales.items():
        if (scale >= _SMALLEST).all():
            continue
        raised = np.maximum(scale, _SMALLEST)
        tensors[name].CopyFrom(numpy_helper.from_array(raised, name))
        for node in pairs:
            if node.input[1] == name and node.input[0] in tensors:
                integers = numpy_helper.to_array(tensors[node.input[0]])
                share = (scale.astype(np.float64) / raised).reshape(
                    -1, *[1] * (integers.ndim - 1 if scale.ndim else 0)
                )
                shrunk = np.rint(integers * share).reshape(integers.shape).astype(integers.dtype)
                tensors[node.input[0]].CopyFrom(numpy_helper.from_array(shrunk, node.input[0]))


# --- bfloat16 where no kernel is -----------------------------------------------------------------


def emulate_bf16(proto: ModelProto) -> ModelProto:
    """Return a bfloat16 model in float32 with every result rounded to bfloat16; others as they are.

        x ─ Conv ─ y       becomes       x ─ Conv ─ y/exact ─ Cast ─ y/bf16 ─ Cast ─ y

    Tensors keep their names, and hold the values that bfloat16 has; its inputs and outputs are
    float32. A kernel that sums in float32 and rounds once, as tensor cores do, gives the same.
    """
    require("onnx", purpose="running a bf16 file", extra="export")
    from onnx import TensorProto, shape_inference

    if not _has_bf16(proto):
        return proto
    kind = TensorProto.BFLOAT16
    shown = shape_inference.infer_shapes(proto).graph
    rounded = {
        value.name
        for value in (*shown.value_info, *shown.output)
        if value.type.tensor_type.elem_type == kind
    }
    model = type(proto)()
    model.CopyFrom(proto)
    graph = model.graph
    graph.ClearField("value_info")
    for tensor in graph.initializer:
        _widen(tensor)
    entries = [value for value in graph.input if value.type.tensor_type.elem_type == kind]
    inside = {value.name: f"{value.name}/rounded" for value in entries}
    nodes = [cast for outer, inner in inside.items() for cast in _round(outer, inner)]
    for node in graph.node:
        node.input[:] = [inside.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == kind:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        if node.op_type != "Constant":  # which holds what was rounded
            for i, name in enumerate(node.output):
                if name in rounded:
                    node.output[i] = f"{name}/exact"
                    nodes += _round(f"{name}/exact", name)
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)
    for value in (*entries, *graph.output):
        if value.type.tensor_type.elem_type == kind:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def _has_bf16(proto: ModelProto) -> bool:
    """Whether a file computes in bfloat16: its inputs are, or something is cast to it."""
    from onnx import TensorProto

    kind = TensorProto.BFLOAT16
    return any(v.type.tensor_type.elem_type == kind for v in proto.graph.input) or any(
        attribute.name == "to" and attribute.i == kind
        for node in proto.graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
    )


def _widen(tensor: TensorProto) -> None:
    """Make a bfloat16 constant float32 in place: the same values."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.BFLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _round(exact: str, name: str) -> list[NodeProto]:
    """Return the nodes that make float32 `name` of `exact` by rounding to bfloat16."""
    from onnx import TensorProto, helper

    half = f"{name}/bf16"
    return [
        helper.make_node("Cast", [exact], [half], f"{half}_node", to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [half], [name], f"{name}/float32_node", to=TensorProto.FLOAT),
    ]


# --- the range of activations --------------------------------------------------------------------


def activation_maxima(proto: ModelProto, images: Array) -> dict[str, float]:
    """Return max |activation| of every float tensor in the graph, by name, on `images`."""
    require("onnx", purpose="export", extra="export")
    runtime = require("onnxruntime", purpose="measuring activations", extra="export")
    from onnx import ValueInfoProto

    model = type(proto)()
    model.CopyFrom(proto)
    shown = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in shown:
                model.graph.output.append(ValueInfoProto(name=name))  # the type is inferred
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    maxima: dict[str, float] = {}
    for image in images:  # one at a time: all activations are kept in memory
        values = session.run(names, {session.get_inputs()[0].name: image[None]})
        for name, value in zip(names, values, strict=True):
            if np.issubdtype(value.dtype, np.floating):
                largest = float(np.abs(value).max(initial=0.0))
                maxima[name] = max(maxima.get(name, 0.0), largest)
    return maxima


def check_fp16_range(proto: ModelProto, images: Array) -> float:
    """Return the largest activation; CheckFailed, with the tensor's name, beyond float16."""
    maxima = activation_maxima(proto, images)
    name = max(maxima, key=lambda key: maxima[key])
    if maxima[name] > _LARGEST["fp16"]:
        raise CheckFailed(
            f"the activation {name} reaches {maxima[name]:.3g}, beyond float16's 65504; export "
            "fp32 instead"
        )
    return maxima[name]
