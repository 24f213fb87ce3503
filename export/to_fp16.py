"""A float32 ONNX graph to a strongly typed float16 one.

Precision lives in the file, not in a builder's flag: every weight becomes float16 and a Cast stands
behind the input and before the output, which stay float32. What float16 cannot hold (beyond 65504)
is refused by name: weights always, activations as measured on the given images, because a CPU
runtime computes in float32 inside and would not show the overflow.

A Q/DQ file becomes the form int8-fp16: its integers stay, its scales and all that is not 8-bit
become float16. Scales that float16 could only hold as subnormals, or not at all, are raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from litezoo.models.errors import CheckFailed, require

from .runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["activation_maxima", "to_fp16"]

_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = np.float32(np.finfo(np.float16).smallest_normal)
#: Inputs that ONNX defines as float32 whatever the data's type is, by operator.
_STAYS_FLOAT = {"Resize": (1, 2)}


def to_fp16(proto: ModelProto) -> ModelProto:
    """Return a float16 copy of a float32 or Q/DQ model; inputs and outputs stay float32."""
    require("onnx", purpose="export", extra="export")
    from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

    model = type(proto)()
    model.CopyFrom(proto)
    graph = model.graph
    _raise_scales(model)

    def halve(tensor: TensorProto, name: str) -> None:
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max(initial=0.0) > _LARGEST:
            raise CheckFailed(
                f"the weight {name} reaches {np.abs(values).max():.3g}, beyond float16's 65504; "
                "export fp32 instead"
            )
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))

    stays = {
        node.input[i]
        for node in graph.node
        for i in _STAYS_FLOAT.get(node.op_type, ())
        if i < len(node.input)
    }
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in stays:
            halve(tensor, tensor.name)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                if not stays.intersection(node.output):
                    halve(attribute.t, node.output[0])
            elif node.op_type == "Cast" and attribute.name == "to":
                if attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
    graph.ClearField("value_info")
    floats = [i.name for i in graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT]
    for name in floats:
        for node in graph.node:
            node.input[:] = [f"{name}_fp16" if i == name else i for i in node.input]
        graph.node.insert(
            0, helper.make_node("Cast", [name], [f"{name}_fp16"], to=TensorProto.FLOAT16)
        )
    for output in graph.output:
        if output.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        for node in graph.node:
            rename = {output.name: f"{output.name}_fp16"}
            node.output[:] = [rename.get(name, name) for name in node.output]
            node.input[:] = [rename.get(name, name) for name in node.input]
        graph.node.append(
            helper.make_node("Cast", [f"{output.name}_fp16"], [output.name], to=TensorProto.FLOAT)
        )
    model = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    checker.check_model(model, full_check=True)
    return model


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
    if maxima[name] > _LARGEST:
        raise CheckFailed(
            f"the activation {name} reaches {maxima[name]:.3g}, beyond float16's 65504; export "
            "fp32 instead"
        )
    return maxima[name]
