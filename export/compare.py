"""How far a quantized network is from its float one: in its logits, and layer by layer.

Signal-to-noise ratios are 10 log10(sum want^2 / sum (got - want)^2), in dB: every 6 dB are one more
bit that is right. Accuracy hides degradation behind its margins; SNR and agreement do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from litezoo.models.errors import CheckFailed, UsageError, require

from .qdq_lint import DEQUANTIZE, QUANTIZE, GraphIndex
from .runtime import Array
from .runtime_onnxruntime import DISABLED_OPTIMIZERS
from .to_half import emulate_bf16

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["LayerSnr", "LogitsSnr", "compare_logits", "snr_db", "worst_layers"]

_AT_ONCE = 4  # images


@dataclass(frozen=True, kw_only=True)
class LogitsSnr:
    """Quantized logits against float ones: SNR in dB (inf if equal), same first class in %."""

    snr_db: float
    top1_agreement_percent: float


@dataclass(frozen=True, kw_only=True)
class LayerSnr:
    """One quantized convolution's output against the float network's.

    `snr_db` is what the layer does by itself, given the float network's activations;
    `accumulated_snr_db` what is left of its output behind all quantized layers before it.
    """

    name: str
    snr_db: float
    accumulated_snr_db: float


def snr_db(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in dB.

    >>> snr_db(100.0, 1.0), snr_db(1.0, 0.0), snr_db(0.0, 1.0)
    (20.0, inf, -inf)
    """
    if math.isnan(noise) or math.isinf(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def compare_logits(got: Array, want: Array) -> LogitsSnr:
    """Compare logits (N, classes) of a quantized network with the float network's.

    Raises CheckFailed where shapes differ or the quantized logits are not finite.
    """
    if got.shape != want.shape or got.ndim != 2 or not len(got):
        raise CheckFailed(
            f"logits of shape {got.shape} cannot be compared with {want.shape}; give both as "
            "(images, classes)"
        )
    if not np.isfinite(got).all():
        raise CheckFailed("the quantized network gives NaN or infinite outputs")
    exact = want.astype(np.float64)
    noise = got.astype(np.float64) - exact
    return LogitsSnr(
        snr_db=snr_db(float(np.sum(exact**2)), float(np.sum(noise**2))),
        top1_agreement_percent=float(100 * np.mean(got.argmax(1) == want.argmax(1))),
    )


def worst_layers(
    float_proto: ModelProto, quantized_proto: ModelProto, images: Array, *, most: int = 8
) -> tuple[LayerSnr, ...]:
    """Return the quantized convolutions with the lowest output SNR by themselves, worst first.

    Their names are what `quantize(keep_float=...)` takes. The quantized file may be of any form
    made from this float file. Both networks run in one graph that gives sums of squares only.
    `images` is (N, C, H, W).
    """
    runtime = require("onnxruntime", purpose="comparing layers", extra="export")
    if images.ndim != 4 or not len(images):
        raise UsageError(f"images have shape {images.shape}; give (N, C, H, W), N of 1 or more")
    probe, names = _probe(float_proto, quantized_proto)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # float16 constants that it does not fold are no news
    session = runtime.InferenceSession(
        emulate_bf16(probe).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=DISABLED_OPTIMIZERS,
    )
    entry = session.get_inputs()[0].name
    sums = np.zeros((len(names), 3))  # signal, noise of the layer alone, accumulated noise
    for start in range(0, len(images), _AT_ONCE):
        values = session.run(None, {entry: images[start : start + _AT_ONCE]})
        sums += np.asarray(values, np.float64).reshape(sums.shape)
    layers = [
        LayerSnr(name=name, snr_db=snr_db(signal, own), accumulated_snr_db=snr_db(signal, noise))
        for name, (signal, own, noise) in zip(names, sums.tolist(), strict=True)
    ]
    return tuple(sorted(layers, key=lambda layer: layer.snr_db)[:most])


def _probe(float_proto: ModelProto, quantized_proto: ModelProto) -> tuple[ModelProto, list[str]]:
    """Return a graph with both networks, and a copy of each quantized layer on float activations.

    Its outputs are three scalars for each of the layers whose names are returned: the sums of
    squares of the float output, of the lone layer's difference to it, and of the network's.
    """
    from onnx import ModelProto, TensorProto, ValueInfoProto, helper

    probe = ModelProto()
    probe.CopyFrom(float_proto)
    graph = probe.graph
    _name_after_output(graph.node)
    quantized = ModelProto()
    quantized.CopyFrom(quantized_proto)
    _name_after_output(quantized.graph.node)
    floats = {node.name: node for node in graph.node if node.op_type == "Conv"}
    entry = graph.input[0].name
    index = GraphIndex(quantized.graph)
    made = {name for node in graph.node for name in node.output} | {entry}
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    half = next((t.data_type for t in quantized.graph.initializer if t.data_type in halves), 0)

    def prefixed(node: NodeProto, prefix: str, keep: set[str]) -> NodeProto:
        copy = type(node)()
        copy.CopyFrom(node)
        copy.name = prefix + node.name
        copy.input[:] = [i if i in keep or not i else prefix + i for i in node.input]
        copy.output[:] = [prefix + name if name else "" for name in node.output]
        return copy

    graph.ClearField("output")
    graph.ClearField("value_info")
    for tensor in quantized.graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = f"q/{tensor.name}"
        graph.initializer.append(copy)
    shared = {entry}
    if (kind := quantized.graph.input[0].type.tensor_type.elem_type) in halves:
        shared = set()
        cast = helper.make_node("Cast", [entry], [f"q/{entry}"], f"q/{entry}_node", to=kind)
        graph.node.append(cast)
    for node in list(quantized.graph.node):
        graph.node.append(prefixed(node, "q/", shared))

    names = []
    for node in quantized.graph.node:
        pair = index.producer(node.input[0], DEQUANTIZE) if node.op_type == "Conv" else None
        quantize = pair and index.producer(pair.input[0], QUANTIZE)
        if pair is None or quantize is None or not index.producer(node.input[1], DEQUANTIZE):
            continue
        source = quantize.input[0]
        if half and source in (f"{entry}_fp16", f"{entry}_bf16"):
            source = entry
        if node.name not in floats or source not in made:
            raise UsageError(
                f"the convolution {node.name} of the quantized file is not in the float file; "
                "give the file that it was made from"
            )
        names.append(node.name)
        # the layer alone: float activation -> the pair's parameters -> the quantized convolution
        alone = f"alone/{node.name}/"
        want = floats[node.name].output[0]
        start = source
        if half:
            start = f"{alone}half"
            cast = helper.make_node("Cast", [source], [start], f"{start}_node")
            cast.attribute.append(helper.make_attribute("to", half))
            graph.node.append(cast)
        values = f"{alone}values"
        graph.node.extend(
            [
                _with_inputs(quantize, [start, *(f"q/{i}" for i in quantize.input[1:])],
                             f"{alone}integers"),
                _with_inputs(pair, [f"{alone}integers", *(f"q/{i}" for i in pair.input[1:])],
                             values),
                _with_inputs(node, [values, *(f"q/{i}" for i in node.input[1:])], f"{alone}got"),
            ]
        )  # fmt: skip
        for got in (f"{alone}got", f"q/{node.output[0]}"):
            if half:
                cast = helper.make_node("Cast", [got], [f"{got}/float"], f"{got}/float_node")
                cast.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
                graph.node.append(cast)
        ends = "/float" if half else ""
        for end, terms in (
            ("signal", [want]),
            ("own", [f"{alone}got{ends}", want]),
            ("noise", [f"q/{node.output[0]}{ends}", want]),
        ):
            summand = terms[0]
            if len(terms) == 2:
                summand = f"{alone}{end}/difference"
                graph.node.append(helper.make_node("Sub", terms, [summand], f"{summand}_node"))
            total = f"{alone}{end}"
            graph.node.append(
                helper.make_node("ReduceSumSquare", [summand], [total], f"{total}_node", keepdims=0)
            )
            graph.output.append(ValueInfoProto(name=total))  # the type is inferred
    if not names:
        raise UsageError("the second file has no quantized convolution; give a Q/DQ file")
    return probe, names


def _with_inputs(node: NodeProto, inputs: list[str], output: str) -> NodeProto:
    """Return a copy of a node with other inputs and another output."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.name = f"{output}_node"
    copy.input[:] = inputs
    copy.output[:] = [output]
    return copy


def _name_after_output(nodes: list[NodeProto]) -> None:
    """Give nodes without a name the one that `quantize` gives them."""
    for node in nodes:
        node.name = node.name or node.output[0]
