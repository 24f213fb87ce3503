"""The normalisation of `Preprocess` as the first nodes of an ONNX file: bytes in, logits out.

    images (N, H, W, C) uint8 ─ Cast ─ Transpose ─ Sub ─ Mul ─ input (N, C, H, W) float32 ─ ...

Resizing and cropping stay outside: images come at the network's size. The nodes are not folded into
the first convolution: it pads with zeros behind the normalisation, which before it would be the
mean colour, so that folded weights are wrong along the border. (A runtime may fuse what is exact.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import UsageError, require

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["EMBEDDED", "IMAGES", "embed_preprocess"]

#: The new input's name.
IMAGES = "images"
#: The property of a file that has the normalisation in it.
EMBEDDED = "litezoo.embedded_preprocess"


def embed_preprocess(model: ModelProto, preprocess: Preprocess) -> ModelProto:
    """Return a copy that takes uint8 images (N, H, W, C) and normalises them itself.

    `model` is a typed file of any form (fp32, fp16, int8): its float32 input (N, C, H, W) becomes
    (image - 255 mean) / (255 std), computed in float32, before a float16 file's first Cast.
    UsageError where that was done before, or where the file's input is not what `preprocess` makes.
    """
    require("onnx", purpose="embedding the preprocessing", extra="export")
    from onnx import TensorProto, checker, helper, numpy_helper

    if any(entry.key == EMBEDDED for entry in model.metadata_props):
        raise UsageError(
            "this ONNX file normalises its images already; embed the preprocessing in the file "
            "that was exported without it"
        )
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        raise UsageError("the ONNX file must have one input of float32 to put normalisation before")
    entry = inputs[0]
    dims = entry.type.tensor_type.shape.dim
    sizes = tuple(dim.dim_value for dim in dims)
    pairs = list(zip(sizes[1:], preprocess.input_size, strict=False))
    if len(sizes) != 4 or not sizes[1] or any(size not in (0, made) for size, made in pairs):
        wanted = ", ".join(map(str, preprocess.input_size))
        raise UsageError(
            f"the ONNX file takes {entry.name} of shape {sizes} (0: open), but the preprocessing "
            f"makes (N, {wanted}); give the one that it was exported with"
        )
    names = [f"{IMAGES}/{part}" for part in ("float", "planes", "centred", "mean", "deviation")]
    taken = weights | {name for node in model.graph.node for name in (*node.input, *node.output)}
    if clash := taken.intersection([IMAGES, *names]):
        raise UsageError(f"the graph already has a tensor {min(clash)}; export it anew")

    embedded = type(model)()
    embedded.CopyFrom(model)
    graph = embedded.graph
    floats, planes, centred, mean, deviation = names
    shape = (-1, 1, 1)
    scale = 255 * np.asarray(preprocess.std, np.float64)
    graph.initializer.extend(
        [
            numpy_helper.from_array(
                (255 * np.asarray(preprocess.mean, np.float64)).astype(np.float32).reshape(shape),
                mean,
            ),
            numpy_helper.from_array((1 / scale).astype(np.float32).reshape(shape), deviation),
        ]
    )
    first = [
        helper.make_node("Cast", [IMAGES], [floats], f"{floats}_node", to=TensorProto.FLOAT),
        helper.make_node("Transpose", [floats], [planes], f"{planes}_node", perm=(0, 3, 1, 2)),
        helper.make_node("Sub", [planes, mean], [centred], f"{centred}_node"),
        helper.make_node("Mul", [centred, deviation], [entry.name], f"{IMAGES}/normalised_node"),
    ]
    nodes = [*first, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)
    count, channels, height, width = (dim.dim_param or dim.dim_value or None for dim in dims)
    bytes_in = helper.make_tensor_value_info(
        IMAGES, TensorProto.UINT8, (count, height, width, channels)
    )
    kept = [value for value in graph.input if value.name != entry.name]
    graph.ClearField("input")
    graph.input.extend([bytes_in, *kept])
    graph.value_info.append(entry)
    embedded.metadata_props.add(key=EMBEDDED, value="true")
    checker.check_model(embedded, full_check=True)
    return embedded
