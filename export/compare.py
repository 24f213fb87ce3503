"""How far a quantized network is from its float one: in its logits, and layer by layer.

Signal-to-noise ratios are 10 log10(sum want^2 / sum (got - want)^2), in dB: every 6 dB are one more
bit that is right. Accuracy hides degradation behind its margins; SNR and agreement do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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

__all__ = [
    "LayerSnr",
    "LayerTensors",
    "LogitsSnr",
    "compare_logits",
    "probe_layers",
    "refuse_halves",
    "run_probe",
    "snr_db",
    "worst_layers",
]

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


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """The tensors of one quantized convolution in the graph of `probe_layers`, all float32.

    `lone_` is the layer given the float network's activations, `net_` the same behind all quantized
    layers before it; inputs are what is left of them behind the Q/DQ pair. `name` is the node's.
    """

    name: str
    float_input: str
    float_output: str
    lone_input: str
    lone_output: str
    net_input: str
    net_output: str


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
    require("onnxruntime", purpose="comparing layers", extra="export")
    from onnx import helper

    probe, tensors = probe_layers(float_proto, quantized_proto)
    totals = []
    for layer in tensors:
        for end, got in (("signal", None), ("own", layer.lone_output), ("noise", layer.net_output)):
            total, summand = f"{layer.name}/{end}", layer.float_output
            if got is not None:
                summand = f"{total}/difference"
                terms = [got, layer.float_output]
                probe.graph.node.append(helper.make_node("Sub", terms, [summand]))
            node = helper.make_node("ReduceSumSquare", [summand], [total], keepdims=0)
            probe.graph.node.append(node)
            totals.append(total)
    sums = np.zeros((len(tensors), 3))  # signal, noise of the layer alone, accumulated noise
    for values in run_probe(probe, totals, images):
        sums += np.asarray(values, np.float64).reshape(sums.shape)
    layers = [
        LayerSnr(
            name=layer.name, snr_db=snr_db(signal, own), accumulated_snr_db=snr_db(signal, noise)
        )
        for layer, (signal, own, noise) in zip(tensors, sums.tolist(), strict=True)
    ]
    return tuple(sorted(layers, key=lambda layer: layer.snr_db)[:most])


def run_probe(
    probe: ModelProto, outputs: Sequence[str], images: Array, *, at_once: int = _AT_ONCE
) -> Iterator[list[Array]]:
    """Yield what tensors of a graph of `probe_layers` are on images, `at_once` of them at a time.

    Only what these tensors need is computed. `images` is (N, C, H, W); UsageError for others.
    """
    if images.ndim != 4 or not len(images):
        raise UsageError(f"images have shape {images.shape}; give (N, C, H, W), N of 1 or more")
    runtime = require("onnxruntime", purpose="comparing layers", extra="export")
    from onnx import ValueInfoProto

    model = type(probe)()
    model.CopyFrom(probe)
    _keep_what_gives(model, outputs)
    model.graph.output.extend(ValueInfoProto(name=name) for name in outputs)  # types are inferred
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # float16 constants that it does not fold are no news
    session = runtime.InferenceSession(
        emulate_bf16(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=DISABLED_OPTIMIZERS,
    )
    entry = session.get_inputs()[0].name
    for start in range(0, len(images), at_once):
        yield session.run(list(outputs), {entry: images[start : start + at_once]})


def _keep_what_gives(model: ModelProto, outputs: Sequence[str]) -> None:
    """Remove the nodes and initializers that none of the outputs is computed from."""
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):  # a graph's order is topological
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    model.graph.ClearField("node")
    model.graph.ClearField("initializer")
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(tensors)


def probe_layers(
    float_proto: ModelProto, quantized_proto: ModelProto
) -> tuple[ModelProto, list[LayerTensors]]:
    """Return a graph with both networks, and each quantized layer alone on float activations.

        the float network     float_input ─┬─ Conv ─ float_output
        each layer alone                   └─ Q ─ DQ ─ lone_input ─ Conv ─ lone_output
        the quantized one     ............... Q ─ DQ ─ net_input ── Conv ─ net_output

    The quantized convolutions are in the graph's order. The graph has no outputs: add nodes that
    read these tensors, and have `run_probe` run it. Constants of the quantized file have `q/`
    before their names. Raises UsageError where the second file was not made from the first one.
    """
    from onnx import ModelProto, TensorProto, helper

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

    def cast(tensor: str, result: str, kind: int) -> str:
        graph.node.append(helper.make_node("Cast", [tensor], [result], f"{result}_node", to=kind))
        return result

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
        cast(entry, f"q/{entry}", kind)
    for node in list(quantized.graph.node):
        graph.node.append(prefixed(node, "q/", shared))

    layers = []
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
        # the layer alone: float activation -> the pair's parameters -> the quantized convolution
        alone = f"alone/{node.name}/"
        start = cast(source, f"{alone}half", half) if half else source
        integers, values, got = (f"{alone}{end}" for end in ("integers", "values", "got"))
        for part, inputs, output in (
            (quantize, [start, *(f"q/{i}" for i in quantize.input[1:])], integers),
            (pair, [integers, *(f"q/{i}" for i in pair.input[1:])], values),
            (node, [values, *(f"q/{i}" for i in node.input[1:])], got),
        ):
            graph.node.append(_with_inputs(part, inputs, output))
        found = [values, got, f"q/{node.input[0]}", f"q/{node.output[0]}"]
        if half:
            ends = ("input", "output", "net_input", "net_output")
            found = [
                cast(name, f"{alone}float_{end}", TensorProto.FLOAT)
                for name, end in zip(found, ends, strict=True)
            ]
        layers.append(
            LayerTensors(
                name=node.name,
                float_input=source,
                float_output=floats[node.name].output[0],
                lone_input=found[0],
                lone_output=found[1],
                net_input=found[2],
                net_output=found[3],
            )
        )
    if not layers:
        raise UsageError("the second file has no quantized convolution; give a Q/DQ file")
    return probe, layers


def refuse_halves(quantized_proto: ModelProto) -> None:
    """Raise UsageError for a 16-bit twin of an 8-bit file, whose scales are rounded."""
    from onnx import TensorProto

    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    if any(tensor.data_type in halves for tensor in quantized_proto.graph.initializer):
        raise UsageError(
            "the quantized file holds 16-bit floats; give the 8-bit file that it was made from"
        )


def _with_inputs(node: NodeProto, inputs: list[str], output: str) -> NodeProto:
    """Return a copy of a node with other inputs and another output."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.name = f"{output}_node"
    copy.input[:] = inputs
    copy.output[:] = [output]
    return copy


def _name_after_output(nodes: Iterable[NodeProto]) -> None:
    """Give nodes without a name the one that `quantize` gives them."""
    for node in nodes:
        node.name = node.name or node.output[0]
