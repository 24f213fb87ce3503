"""A float32 ONNX graph to an 8-bit one (Q/DQ form), calibrated on images.

Three forms, because no file is right for all runtimes:

- `int8`, for TensorRT: symmetric int8 everywhere, pairs where TensorRT fuses them (the rules of
  `qdq_lint`), biases in float. `to_half` makes its 16-bit twins, `int8-fp16` and `int8-bf16`.
- `int8-u8`, for OpenVINO: the same places, but uint8 activations with a zero point. It runs the
  int8 form's convolutions in 8 bits too, but of symmetric int8 that goes through a Concat it keeps
  about 5 bits (OpenVINO 2026.4).
- `int8-u8s8`, for ONNX Runtime on CPUs: uint8 activations, and pairs around every operator that has
  an integer kernel there. The int8 form runs several times slower.

In all, what follows the last global pool stays float (a quantized classifier costs 10 dB and saves
nothing, a matrix times one vector being bound by memory), and so do squeeze-and-excite gates.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, UsageError, require, unknown_name

from .qdq_lint import DEQUANTIZE, QUANTIZE, GraphIndex, check_lint
from .runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Form", "Method", "calibrate", "convolutions", "quantize", "quantize_weight"]

Form = Literal["int8", "int8-u8", "int8-u8s8"]
#: How an activation's range follows from the images: all of it, 99.9 % of it, least squared error,
#: least divergence of its distribution.
Method = Literal["minmax", "percentile", "mse", "entropy"]

_PERCENTILE = 99.9
_BINS = 2048
_AT_ONCE = 8  # images that run together
#: The property of the file that says how it was quantized, as JSON.
PROPERTY = "litezoo.quantization"

#: The lowest and the highest value of a tensor.
Range = tuple[float, float]


def quantize(
    proto: ModelProto,
    calibration: Iterable[Array] | Array,
    *,
    form: Form,
    per_channel: bool = True,
    method: Method = "minmax",
    keep_float: Collection[str] = (),
    weight_bits: Literal[7, 8] = 8,
    rounded: Mapping[str, NDArray[np.int8]] | None = None,
) -> ModelProto:
    """Return an 8-bit copy of a float32 model.

    Args:
        proto: what `export_onnx` wrote.
        calibration: preprocessed images (N, C, H, W), or batches of them.
        form: which placement of Q/DQ pairs.
        per_channel: one scale per output channel of a weight, not one per weight.
        method: how activation ranges are found.
        keep_float: names of convolutions (see `convolutions`) that are left in float.
        weight_bits: 7 for x86 CPUs without VNNI, whose 16-bit sums of uint8 x int8 overflow.
        rounded: integers in place of the nearest, by the name of the float weight, of its shape and
            at the same scales, as `adaround` gives them. Other weights go to the nearest.

    Raises UsageError for unknown names, unusable images and integers that are not a rounding of
    their weight, CheckFailed where activations are not
    finite or the result breaks TensorRT's rules.
    """
    require("onnx", purpose="export", extra="export")
    if form not in get_args(Form):
        raise unknown_name("8-bit form", form, get_args(Form))
    if method not in get_args(Method):
        raise unknown_name("calibration method", method, get_args(Method))
    if any(node.op_type in (QUANTIZE, DEQUANTIZE) for node in proto.graph.node):
        raise UsageError("this ONNX file is quantized; int8 starts from the float32 file")
    known = convolutions(proto)
    for name in keep_float:
        if name not in known:
            raise unknown_name("convolution", name, known, see="the float file's node names")
    chosen = [name for name in known if name not in set(keep_float)]
    if not chosen:
        raise UsageError("nothing is left to quantize: all convolutions stay float; export fp16")
    batches = image_batches(calibration)
    rounded = rounded or {}
    _check_rounded(proto, chosen, rounded)

    model = type(proto)()
    model.CopyFrom(proto)
    _name_nodes(model)
    if form in ("int8", "int8-u8"):
        unsigned = form == "int8-u8"
        model = _fused(model, batches, chosen, per_channel, method, weight_bits, unsigned, rounded)
    else:
        model = _everywhere(model, batches, chosen, per_channel, method, weight_bits, rounded)
    _finish(
        model,
        proto,
        {
            "form": form,
            "method": method,
            "images": sum(len(batch) for batch in batches),
            "per_channel": per_channel,
            "weight_bits": weight_bits,
            "keep_float": sorted(keep_float),
            "rounding": "adaround" if rounded else "nearest",
        },
    )
    if form == "int8":
        check_lint(model)
    return model


def convolutions(proto: ModelProto) -> tuple[str, ...]:
    """Return the names of the convolutions that `quantize` makes 8-bit, in the graph's order."""
    model = type(proto)()
    model.CopyFrom(proto)
    _name_nodes(model)
    index = GraphIndex(model.graph)
    pooled = index.pooled()
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.input[0] not in pooled
        and node.input[1] in index.initializers
    )


def quantize_weight(
    weight: Array, *, per_channel: bool = True, bits: int = 8
) -> tuple[NDArray[np.int8], Array]:
    """Return a weight (out, in, kh, kw) as int8 of the same shape and its scale.

    The scale is (out,) or, without `per_channel`, (); int8 times scale is nowhere further from the
    weight than half a scale. A channel of zeros has scale 1.
    """
    largest = 2 ** (bits - 1) - 1
    axes = tuple(range(1, weight.ndim)) if per_channel else None
    reach = np.abs(weight).max(axis=axes, initial=0.0).astype(np.float64)
    tiny = float(np.finfo(np.float32).tiny)  # below it a float32 scale loses its digits
    scale = np.where(reach > 0, np.maximum(reach / largest, tiny), 1.0).astype(np.float32)
    steps = scale.astype(np.float64)
    if per_channel:
        steps = steps.reshape(-1, *[1] * (weight.ndim - 1))
    integers = np.clip(np.rint(weight / steps), -largest, largest).astype(np.int8)
    return integers, np.asarray(scale)


def _check_rounded(
    proto: ModelProto, chosen: Collection[str], rounded: Mapping[str, NDArray[np.int8]]
) -> None:
    """Refuse integers of what is no weight of a `chosen` convolution, or not of its shape."""
    names = set(chosen)
    read = {
        node.input[1]
        for node in proto.graph.node
        if node.op_type == "Conv" and (node.name or node.output[0]) in names
    }
    shapes = {t.name: tuple(t.dims) for t in proto.graph.initializer if t.name in read}
    for name, integers in rounded.items():
        if name not in shapes:
            raise unknown_name("weight", name, shapes, see="the float file's 8-bit convolutions")
        if integers.dtype != np.int8 or integers.shape != shapes[name]:
            raise UsageError(
                f"the rounded weight {name} is {integers.dtype} of shape {integers.shape}; give "
                f"int8 of shape {shapes[name]}"
            )


def _rounded_weight(
    name: str,
    weight: Array,
    scale: NDArray[np.generic],
    rounded: Mapping[str, NDArray[np.int8]],
    largest: int,
) -> NDArray[np.int8] | None:
    """Return the integers that are given for a weight, None without; `scale` is () or (out,)."""
    integers = rounded.get(name)
    if integers is None:
        return None
    steps = weight / scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    off = float(np.abs(integers - steps).max(initial=0.0))
    reach = int(np.abs(integers.astype(np.int64)).max(initial=0))
    if off > 1.001 or reach > largest:  # float32 scales
        raise UsageError(
            f"the rounded weight {name} is up to {off:.3g} steps from the float weight and reaches "
            f"{reach} of {largest}; it is of another network or other scales: round it anew"
        )
    return integers


def image_batches(calibration: Iterable[Array] | Array) -> list[Array]:
    """Return images (N, C, H, W), or batches of them, in checked batches of at most `_AT_ONCE`."""
    given = [calibration] if isinstance(calibration, np.ndarray) else list(calibration)
    batches = []
    for batch in given:
        images = np.asarray(batch, dtype=np.float32)
        if images.ndim != 4:
            raise UsageError(
                f"calibration images have shape {images.shape}; give batches (N, C, H, W)"
            )
        if not np.isfinite(images).all():
            raise UsageError("calibration images hold NaN or infinite values; preprocess them anew")
        batches += [images[i : i + _AT_ONCE] for i in range(0, len(images), _AT_ONCE)]
    if not batches:
        raise UsageError("there are no calibration images; give some hundred real ones")
    return batches


def _name_nodes(model: ModelProto) -> None:
    """Give every node without a name its own, so that layers can be spoken of."""
    taken = {node.name for node in model.graph.node}
    for node in model.graph.node:
        if not node.name:
            node.name = node.output[0]
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)


def _finish(model: ModelProto, source: ModelProto, record: Mapping[str, object]) -> None:
    """Put the source's properties and the record of this step into the file, and check it."""
    from onnx import checker, helper

    properties = {entry.key: entry.value for entry in source.metadata_props}
    properties[PROPERTY] = json.dumps(record, sort_keys=True)
    model.ClearField("metadata_props")
    helper.set_model_props(model, properties)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    model.graph.ClearField("value_info")
    checker.check_model(model, full_check=True)


# ------------------------------------------------------------------------------- calibration


def calibrate(
    proto: ModelProto,
    tensors: Collection[str],
    batches: Iterable[Array],
    *,
    method: Method = "minmax",
    levels: int = 127,
) -> dict[str, Range]:
    """Return the range of each tensor of a float32 model over batches (N, C, H, W).

    All but "minmax" go over the batches twice and may cut the range at a magnitude, never widen
    it; `levels` is the number of steps of a tensor with both signs, on each side. Kept are running
    extremes and histograms, and one image's activations at a time.
    """
    batches = list(batches)
    ranges: dict[str, Range] = {}
    for extremes in run_probes(proto, batches, _extremes(tensors)):
        for name in tensors:
            low, high = (float(extremes[f"calibrate/{name}/{end}"]) for end in ("Min", "Max"))
            if not np.isfinite((low, high)).all():
                raise CheckFailed(
                    f"the activation {name} is NaN or infinite on the calibration images; check "
                    "their preprocessing"
                )
            before = ranges.get(name, (low, high))
            ranges[name] = min(low, before[0]), max(high, before[1])
    if method == "minmax":
        return ranges
    counts = {name: np.zeros(_BINS) for name in ranges}
    reach = {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}
    singles = [batch[i : i + 1] for batch in batches for i in range(len(batch))]
    for magnitudes in run_probes(proto, singles, _magnitudes(tensors)):
        for name in tensors:
            if reach[name] > 0:
                values = magnitudes[f"calibrate/{name}/Abs"]
                counts[name] += np.histogram(values, _BINS, range=(0, reach[name]))[0]
    for name, (low, high) in ranges.items():
        if reach[name] > 0:
            steps = levels * 2 if low >= 0 and levels > 127 else levels
            cut = reach[name] * _SHARES[method](counts[name], steps)
            ranges[name] = max(low, -cut), min(high, cut)
    return ranges


def _extremes(tensors: Collection[str]) -> list[NodeProto]:
    """Return the nodes that give the lowest and the highest value of each tensor."""
    from onnx import helper

    return [
        helper.make_node(f"Reduce{end}", [name], [f"calibrate/{name}/{end}"], keepdims=0)
        for name in tensors
        for end in ("Min", "Max")
    ]


def _magnitudes(tensors: Collection[str]) -> list[NodeProto]:
    from onnx import helper

    return [helper.make_node("Abs", [name], [f"calibrate/{name}/Abs"]) for name in tensors]


def run_probes(
    proto: ModelProto, batches: Iterable[Array], nodes: Sequence[NodeProto]
) -> Iterator[dict[str, Array]]:
    """Yield what `nodes`, put behind the model's, give on each batch."""
    runtime = require("onnxruntime", purpose="calibration", extra="export")
    from onnx import ValueInfoProto

    model = type(proto)()
    model.CopyFrom(proto)
    model.graph.node.extend(nodes)
    names = [name for node in nodes for name in node.output]
    model.graph.output.extend(ValueInfoProto(name=name) for name in names)  # types are inferred
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    entry = session.get_inputs()[0].name
    for batch in batches:
        yield dict(zip(names, session.run(names, {entry: batch}), strict=True))


def _percentile(counts: NDArray[np.float64], levels: int) -> float:
    """Return the share of the range that holds `_PERCENTILE` of the values."""
    cumulated = np.cumsum(counts) / counts.sum()
    return float(np.searchsorted(cumulated, _PERCENTILE / 100) + 1) / _BINS


def _least_error(counts: NDArray[np.float64], levels: int) -> float:
    """Return the share of the range whose `levels` steps leave the least squared error."""
    middles = (np.arange(_BINS) + 0.5) / _BINS
    shares = np.linspace(0.2, 1.0, 81)
    errors = []
    for share in shares:
        step = share / levels
        rounded = np.minimum(np.rint(middles / step), levels) * step
        errors.append(float(counts @ (rounded - middles) ** 2))
    return float(shares[int(np.argmin(errors))])


def _least_divergence(counts: NDArray[np.float64], levels: int) -> float:
    """Return the share of the range with the least Kullback-Leibler divergence, as TensorRT does.

    Migacz, 8-bit Inference with TensorRT, GTC 2017. Of every number of bins from the levels on: the
    reference P are these bins with all that lies beyond added to the last, the candidate Q the same
    bins without it, summed into as many groups as there are levels, each spread evenly over its
    bins that are not empty. Zeros, of which ReLU makes many, are exact at any scale and are left
    out: the first bin counts as much as the second (as in NVIDIA's pytorch-quantization).
    """
    groups = max(levels, 128)  # 127 steps and 0
    bins = counts.copy()
    bins[0] = bins[1]
    if not bins.any():
        return 1.0
    kept = np.arange(groups, _BINS + 1)
    edges = -(-np.arange(groups + 1) * kept[:, None] // groups)  # (candidates, groups + 1)
    mass = np.concatenate([[0.0], np.cumsum(bins)])
    full = np.concatenate([[0], np.cumsum(bins > 0)])
    total, sums, filled = mass[-1], np.diff(mass[edges]), np.diff(full[edges])
    beyond = total - mass[kept]
    own = np.concatenate([[0.0], np.cumsum(_x_log_x(bins))])
    last = bins[kept - 1]
    height = np.log(np.where(sums > 0, sums, 1.0) / np.maximum(filled, 1))
    reference = own[kept - 1] + _x_log_x(last + beyond)
    cross = np.sum(sums * height, 1) + beyond * height[:, -1]
    with np.errstate(divide="ignore"):
        divergence = (reference - cross) / total - np.log(total) + np.log(mass[kept])
    divergence[(last == 0) & (beyond > 0)] = np.inf  # P has what Q has not
    best = np.flatnonzero(divergence <= divergence.min() + 1e-12)[-1]
    return float(kept[best]) / _BINS


def _x_log_x(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = x * np.log(np.where(x > 0, x, 1.0))
    return result


_SHARES = {"percentile": _percentile, "mse": _least_error, "entropy": _least_divergence}


# ------------------------------------------------------------------------------- int8, int8-u8


@dataclass(frozen=True)
class _Edge:
    """One input of one node."""

    node: int
    input: int


def _places(model: ModelProto, chosen: Collection[str]) -> dict[str, set[_Edge]]:
    """Return, by tensor, the edges that are to read its quantized values.

    All readers of a convolution's input do, so that it is written once, in int8; but an activation
    reads what the node before it gives, because it is fused with it, and a convolution that is left
    in float reads floats.
    """
    graph = model.graph
    index = GraphIndex(graph)
    position = {node.name: i for i, node in enumerate(graph.node)}
    places: dict[str, set[_Edge]] = {}
    for node in graph.node:
        if node.op_type == "Conv" and node.name in chosen:
            tensor = node.input[0]
            floats = {reader.name for reader in index.activation_readers(tensor)}
            if tensor not in index.producers:
                floats = set()  # the network's input is fused with nothing
            floats |= {
                reader.name
                for reader in index.readers[tensor]
                if reader.op_type == "Conv" and reader.name not in chosen
            }
            places[tensor] = {
                _Edge(position[reader.name], i)
                for reader in index.readers[tensor]
                if reader.name not in floats
                for i, name in enumerate(reader.input)
                if name == tensor
            }
    for node, shortcut in _shortcuts(index, chosen):
        edge = _Edge(position[node.name], list(node.input).index(shortcut))
        places.setdefault(shortcut, set()).add(edge)
    return places


def _shortcuts(index: GraphIndex, chosen: Collection[str]) -> Iterator[tuple[NodeProto, str]]:
    """Yield every residual Add and its shortcut: the input that it does not fuse into.

    An Add fuses into the convolution before it that nothing else reads; of two such, into the one
    behind more convolutions, which is the body.
    """
    depth: dict[str, int] = {}
    for node in index.graph.node:
        deepest = max((depth.get(name, 0) for name in node.input), default=0)
        depth.update((name, deepest + (node.op_type == "Conv")) for name in node.output)
    pooled = index.pooled()
    for node in index.graph.node:
        inputs = index.data_inputs(node)
        if node.op_type != "Add" or len(set(inputs)) != 2 or pooled.intersection(inputs):
            continue
        bodies = [
            name
            for name in inputs
            if (conv := index.producer(name, "Conv")) is not None
            and conv.name in chosen
            and index.is_only_read_by(name, node)
        ]
        if bodies:
            body = max(bodies, key=lambda name: depth[name])
            yield node, next(name for name in inputs if name != body)


def _fused(
    model: ModelProto,
    batches: list[Array],
    chosen: Collection[str],
    per_channel: bool,
    method: Method,
    weight_bits: int,
    unsigned: bool,
    rounded: Mapping[str, NDArray[np.int8]],
) -> ModelProto:
    """Insert pairs where TensorRT fuses them; `unsigned` activations are uint8."""
    from onnx import helper, numpy_helper

    graph = model.graph
    index = GraphIndex(graph)
    places = _places(model, chosen)
    levels = 128 if unsigned else 127
    ranges = calibrate(model, places, batches, method=method, levels=levels)
    added: dict[str, NDArray[np.generic]] = {}
    pairs: dict[str, list[NodeProto]] = {}
    nodes = list(graph.node)
    for tensor, edges in places.items():
        scale, zero = f"{tensor}_scale", f"{tensor}_zero_point"
        added[scale], added[zero] = _parameters(ranges[tensor], unsigned=unsigned)
        integers, values = f"{tensor}_quantized", f"{tensor}_dequantized"
        pairs[tensor] = [
            helper.make_node(QUANTIZE, [tensor, scale, zero], [integers], f"{integers}_node"),
            helper.make_node(DEQUANTIZE, [integers, scale, zero], [values], f"{values}_node"),
        ]
        for edge in edges:
            nodes[edge.node].input[edge.input] = values
    weights: dict[str, NodeProto] = {}  # by name of the float weight, which two layers may share
    for node in nodes:
        if node.op_type != "Conv" or node.name not in chosen:
            continue
        name = node.input[1]
        if name not in weights:
            weight = numpy_helper.to_array(index.initializers[name])
            integers, scale, zero = (f"{name}_{end}" for end in ("int8", "scale", "zero_point"))
            nearest, added[scale] = quantize_weight(
                weight, per_channel=per_channel, bits=weight_bits
            )
            most = 2 ** (weight_bits - 1) - 1
            given = _rounded_weight(name, weight, added[scale], rounded, most)
            added[integers] = nearest if given is None else given
            added[zero] = np.zeros(added[scale].shape, np.int8)
            values = f"{name}_dequantized"
            weights[name] = helper.make_node(
                DEQUANTIZE, [integers, scale, zero], [values], f"{values}_node"
            )
            if per_channel:
                weights[name].attribute.append(helper.make_attribute("axis", 0))
        node.input[1] = f"{name}_dequantized"

    ordered = [node for entry in graph.input for node in pairs.get(entry.name, ())]
    ordered += weights.values()
    for node in nodes:
        ordered.append(node)
        ordered += [part for name in node.output for part in pairs.get(name, ())]
    taken = {*index.initializers, *index.producers}
    if clash := taken.intersection(added, *(node.output for node in weights.values())):
        raise UsageError(f"the graph already has a tensor {min(clash)}; export it anew")
    graph.ClearField("node")
    graph.node.extend(ordered)
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in added.items())
    _drop_unread(model)
    return model


def _parameters(
    extremes: Range, *, unsigned: bool
) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    """Return the scale and the zero point of an activation's pair, both of shape ()."""
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)  # 0 pads: it must be exact
    reach = high - low if unsigned else max(-low, high)
    steps = 255 if unsigned else 127
    scale = max(reach / steps, float(np.finfo(np.float32).tiny)) if reach else 1.0
    if unsigned:
        return np.asarray(scale, np.float32), np.asarray(round(-low / scale), np.uint8)
    return np.asarray(scale, np.float32), np.zeros((), np.int8)


def _drop_unread(model: ModelProto) -> None:
    """Remove the initializers that no node reads any more: float weights of 8-bit layers."""
    read = {name for node in model.graph.node for name in node.input}
    read |= {entry.name for entry in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    if len(kept) < len(model.graph.initializer):
        model.graph.ClearField("initializer")
        model.graph.initializer.extend(kept)


# ------------------------------------------------------------------------------- form int8-u8s8

#: ONNX Runtime's quantizer puts pairs around these, but no 8-bit kernel follows from them.
_NO_INTEGER_KERNEL = {"BatchNormalization", "InstanceNormalization", "LayerNormalization"}


def _everywhere(
    model: ModelProto,
    batches: list[Array],
    chosen: Collection[str],
    per_channel: bool,
    method: Method,
    weight_bits: int,
    rounded: Mapping[str, NDArray[np.int8]],
) -> ModelProto:
    """Run ONNX Runtime's quantizer (the half of `quantize_static` behind calibration)."""
    require("onnxruntime", purpose="quantization", extra="export")
    from onnx import TensorProto, shape_inference
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    source = model  # the quantizer drops weights from the copy that it is given
    model = shape_inference.infer_shapes(model)
    graph = model.graph
    index = GraphIndex(graph)
    pooled = index.pooled()
    excluded = [
        node.name
        for node in graph.node
        if pooled.intersection(node.output) or (node.op_type == "Conv" and node.name not in chosen)
    ]
    floats = [
        entry.name
        for entry in (*graph.input, *graph.value_info, *graph.output)
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT
        and entry.name not in index.initializers
    ]
    ranges = calibrate(model, dict.fromkeys(floats), batches, method=method, levels=128)
    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it warns of biases whose scale it adjusts
    try:
        quantizer = QDQQuantizer(
            model,
            per_channel,
            weight_bits == 7,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            excluded,
            sorted({*QLinearOpsRegistry, *QDQRegistry} - _NO_INTEGER_KERNEL),
            {"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    finally:
        logging.getLogger().setLevel(level)
    quantized: ModelProto = quantizer.model.model
    _put_rounded(quantized, source, rounded, 2 ** (weight_bits - 1) - (weight_bits == 8))
    return quantized


def _put_rounded(
    quantized: ModelProto, source: ModelProto, rounded: Mapping[str, NDArray[np.int8]], largest: int
) -> None:
    """Write the given integers over those of ONNX Runtime's quantizer, whose scales remain."""
    from onnx import numpy_helper

    floats = GraphIndex(source.graph)
    weights = {node.name: node.input[1] for node in source.graph.node if node.op_type == "Conv"}
    index = GraphIndex(quantized.graph)
    for node in quantized.graph.node:
        name = weights.get(node.name, "")
        pair = index.producer(node.input[1], DEQUANTIZE) if name in rounded else None
        if pair is not None:
            weight = numpy_helper.to_array(floats.initializers[name])
            scale = numpy_helper.to_array(index.initializers[pair.input[1]])
            integers = _rounded_weight(name, weight, scale, rounded, largest)
            assert integers is not None
            tensor = index.initializers[pair.input[0]]
            tensor.CopyFrom(numpy_helper.from_array(integers, tensor.name))
