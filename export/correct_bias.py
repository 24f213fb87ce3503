"""Empirical bias correction: what quantization adds to a channel's mean is taken off its bias.

Rounding errors of one output channel's weights do not cancel behind a ReLU, where x >= 0: their sum
times E[x] shifts the channel's mean and with it all that follows (Nagel et al. 2019, Data-Free
Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721, section 4.2):

    b'  =  b + E[W x + b] - E[Wq xq + b]        per output channel, over images and positions

x is what the float network gives and xq what comes to the layer in the quantized network, all
layers before it being corrected. One run does that: behind each quantized convolution stands the
correction by the means of the batch itself, as a BatchNorm in training has it.

    float      x ─ Conv ───────────────┐
    quantized  xq ─ Conv ─┬─ y ────────┴─ d = E[float - y] ─┐
                          └──────────────────────────────── + ─ y + d ─ Relu ─ ...

Narrow RepVGGs on digits (22 layers, per tensor, three seeds) gain 1.1 to 4.1 dB by it and 0.4 to
2.5 dB where each layer is measured alone, on float activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, UsageError, require

from .compare import LayerTensors, probe_layers, refuse_halves, run_probe
from .qdq_lint import GraphIndex
from .runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["correct_bias"]

_AT_ONCE = 32  # images whose means stand for all while they run


def correct_bias(float_proto: ModelProto, quantized_proto: ModelProto, images: Array) -> ModelProto:
    """Return the float model whose biases make up for what 8 bits add to each channel's mean.

    `quantize` is then run on it anew. A quantized convolution without a bias gets one; a bias that
    other nodes read too, or that is computed, stays as it is, and so does all else.

    Args:
        float_proto: what `quantize` was given.
        quantized_proto: the 8-bit file that it made, of any form of `Form`.
        images: preprocessed images (N, C, H, W), as for calibration.

    Raises UsageError for files that do not belong together and unusable images, CheckFailed where
    a layer's outputs are not finite.
    """
    require("onnx", purpose="export", extra="export")
    from onnx import numpy_helper

    refuse_halves(quantized_proto)
    model = type(float_proto)()
    model.CopyFrom(float_proto)
    graph = model.graph
    index = GraphIndex(graph)
    probe, layers = probe_layers(float_proto, quantized_proto)
    convs = {node.name or node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    layers = [layer for layer in layers if _has_own_bias(convs[layer.name], index)]
    taken = {*index.initializers, *index.producers, *(entry.name for entry in graph.input)}
    for name, shift in _shifts(probe, layers, images).items():
        node = convs[name]
        if _bias(node):
            tensor = index.initializers[_bias(node)]
            bias = numpy_helper.to_array(tensor) + shift
            tensor.CopyFrom(numpy_helper.from_array(bias.astype(np.float32), tensor.name))
            continue
        added = f"{node.output[0]}_bias"
        if added in taken:
            raise UsageError(f"the graph already has a tensor {added}; export it anew")
        graph.initializer.append(numpy_helper.from_array(shift.astype(np.float32), added))
        node.input[:] = [*node.input[:2], added]
    return model


def _bias(node: NodeProto) -> str:
    """Return the name of a convolution's bias, "" where it has none."""
    return node.input[2] if len(node.input) > 2 else ""


def _has_own_bias(node: NodeProto, index: GraphIndex) -> bool:
    """Whether a convolution's bias can be changed without changing anything else, or be added."""
    name = _bias(node)
    return not name or (name in index.initializers and index.is_only_read_by(name, node))


def _shifts(
    probe: ModelProto, layers: list[LayerTensors], images: Array
) -> dict[str, NDArray[np.float64]]:
    """Return what is to be added to the bias (channels,) of each convolution."""
    from onnx import helper

    steps: dict[str, list[NodeProto]] = {}
    for layer in layers:
        got = layer.net_output
        difference, single, row, mean, corrected = (
            f"{got}/{end}" for end in ("difference", "single", "row", "mean", "corrected")
        )
        steps[got] = [  # (N, C, H, W) -> (N, C, 1, 1) -> (1, C, N, 1) -> (1, C, 1, 1), in any opset
            helper.make_node("Sub", [layer.float_output, got], [difference]),
            helper.make_node("GlobalAveragePool", [difference], [single]),
            helper.make_node("Transpose", [single], [row], perm=(2, 1, 0, 3)),
            helper.make_node("GlobalAveragePool", [row], [mean]),
            helper.make_node("Add", [got, mean], [corrected]),
        ]
    nodes = []
    for node in probe.graph.node:
        node.input[:] = [f"{name}/corrected" if name in steps else name for name in node.input]
        nodes.append(node)
        nodes += [step for name in node.output for step in steps.get(name, ())]
    model = type(probe)()
    model.CopyFrom(probe)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    sums = [np.zeros(())] * len(layers)
    counts = [len(images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE)]
    means = [f"{layer.net_output}/mean" for layer in layers]
    found = run_probe(model, means, images, at_once=_AT_ONCE)
    for count, values in zip(counts, found, strict=True):
        sums = [
            total + count * value.astype(np.float64).ravel()
            for total, value in zip(sums, values, strict=True)
        ]
    for layer, total in zip(layers, sums, strict=True):
        if not np.isfinite(total).all():
            raise CheckFailed(
                f"the convolution {layer.name} gives NaN or infinite outputs on the images; check "
                "their preprocessing"
            )
    return {layer.name: total / len(images) for layer, total in zip(layers, sums, strict=True)}
