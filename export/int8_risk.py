"""What 8-bit weights would cost a network, from its weights alone: no images, about a second.

Two numbers, both of weights quantized as TensorRT does it (int8, symmetric), activations in float:

* the worst input column: of all that a layer's filters do with one input channel, W[:, i], the
  signal-to-quantization-noise ratio. One huge weight takes the steps from all others of its scale,
  and a column that rounds to zero (0 dB) is a channel that the layer does not read any more;
* the SNR of the logits on smooth noise, float weights against 8-bit ones.

How well they foretell what quantization does to trained networks is measured in docs/int8.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import CheckFailed, UsageError, require, unknown_name
from litezoo.models.fuse import DeadChannels, Fused, fuse, fuse_with_report, graph_form
from litezoo.recipes.devices import get_device

from .compare import compare_logits, snr_db
from .qdq_lint import GraphIndex
from .runtime import Array
from .runtime_onnxruntime import DISABLED_OPTIMIZERS
from .source import load_source
from .to_int8 import convolutions, quantize_weight

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = [
    "DryRun",
    "Granularity",
    "LayerRisk",
    "Risk",
    "Verdict",
    "dry_run",
    "int8_risk",
    "noise_images",
    "small_shape",
]

Granularity = Literal["per-channel", "per-tensor"]
Verdict = Literal["low", "medium", "high"]

#: Least SNR of the logits on noise, dB, for a low and for a medium risk, and least SQNR of the
#: worst column; one of the two is enough, as each has false alarms where the other has none.
#: Fitted to the table of docs/int8.md.
LOW_RISK_DB, MEDIUM_RISK_DB = 20.0, 12.0
LOW_RISK_COLUMN_DB, MEDIUM_RISK_COLUMN_DB = 22.0, 15.0
#: A column this much weaker (energy) than the layer's median is taken for one that reads nothing.
_FAINT = 1e-6
#: Side of the noise images where none is given.
_SIDE = 128

_ADVICE: dict[Verdict, str] = {
    "low": "int8 should keep the accuracy",
    "medium": "int8 may cost some points of accuracy",
    "high": "int8 is likely to lose the accuracy",
}


@dataclass(frozen=True, kw_only=True)
class LayerRisk:
    """One convolution with 8-bit weights.

    `worst_column_sqnr_db` is that of the input channel `worst_column`; `output_snr_db` is of the
    layer's output on noise images, given float activations; inf where nothing is lost.
    """

    name: str
    worst_column_sqnr_db: float
    worst_column: int
    output_snr_db: float


@dataclass(frozen=True, kw_only=True)
class Risk:
    """What 8-bit weights would cost a network; `layers` have the lowest output SNR first."""

    granularity: Granularity
    layers: tuple[LayerRisk, ...]
    worst_column_sqnr_db: float
    logit_snr_db: float

    @property
    def verdict(self) -> Verdict:
        """The risk in a word, by the better of the two numbers."""
        logits, column = self.logit_snr_db, self.worst_column_sqnr_db
        if logits >= LOW_RISK_DB or column >= LOW_RISK_COLUMN_DB:
            return "low"
        is_medium = logits >= MEDIUM_RISK_DB or column >= MEDIUM_RISK_COLUMN_DB
        return "medium" if is_medium else "high"

    def __str__(self) -> str:
        """Return it as a sentence."""
        said = (
            f"int8 risk with {self.granularity} weights: {self.verdict} (logits "
            f"{self.logit_snr_db:.0f} dB on noise, worst column {self.worst_column_sqnr_db:.0f} "
            f"dB); {_ADVICE[self.verdict]}"
        )
        return said if self.verdict == "low" else f"{said}; first to look at: {self.layers[0].name}"


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What can be said of a network's int8 without data: its dead channels and its risks.

    `dead` is what `fuse` did about dead channels, `said` that in sentences.
    """

    model: str
    weights: str
    dead: tuple[DeadChannels, ...]
    said: tuple[str, ...]
    risks: tuple[Risk, ...]


def dry_run(
    model: str,
    *,
    weights: str,
    device: str | None = None,
    allow_license: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> DryRun:
    """Load a network as `export` does and return what can be said of its int8 without data.

    With `device` the risk is that of the finest scales it has, without one of both granularities.
    The noise has the size of the network's images, but sides of at most 128.
    """
    granularities: tuple[Granularity, ...] = get_args(Granularity)
    if device is not None:
        per_tensor = get_device(device).limits.quantization == "per-tensor"
        granularities = ("per-tensor",) if per_tensor else ("per-channel",)
    progress(f"loading {model} ({weights})")
    source = load_source(model, weights, tuple(allow_license))
    network = source.model.eval()
    progress("fusing to deploy form")
    is_train = graph_form(network) == "train"
    fused = fuse_with_report(network) if is_train else Fused(model=network, blocks=())
    shape = small_shape(source.preprocess)
    progress("rounding the weights")
    risks = [int8_risk(fused.model, granularity=g, image_shape=shape) for g in granularities]
    return DryRun(
        model=source.spec.name, weights=source.weights, dead=fused.dead, said=fused.said,
        risks=tuple(risks),
    )  # fmt: skip


def small_shape(preprocess: Preprocess) -> tuple[int, int, int]:
    """Return the (C, H, W) of a network's images, but sides of at most 128."""
    channels, height, width = preprocess.input_size
    return channels, min(height, _SIDE), min(width, _SIDE)


def int8_risk(
    model: nn.Module | ModelProto,
    *,
    granularity: Granularity,
    image_shape: tuple[int, int, int] | None = None,
) -> Risk:
    """Return what 8-bit weights would cost a float network, (N, C, H, W) -> (N, classes).

    Args:
        model: a network of any form (it is fused first), or what `export_onnx` wrote of one.
        granularity: one scale for each output channel of a weight, or one for all of it.
        image_shape: (C, H, W) of the noise; default: what the ONNX file takes, else the channels
            that the first convolution takes and sides of 128.

    Squeeze-and-excite gates and the classifier are left out, as `quantize` leaves them in float.
    Raises UsageError for what has no convolution, CheckFailed where weights or logits are not
    finite.
    """
    if granularity not in get_args(Granularity):
        raise unknown_name("granularity", granularity, get_args(Granularity))
    per_channel = granularity == "per-channel"
    if isinstance(model, nn.Module):
        layers, logit_snr_db = _risk_of_module(model, per_channel, image_shape)
    else:
        layers, logit_snr_db = _risk_of_onnx(model, per_channel, image_shape)
    return Risk(
        granularity=granularity,
        layers=tuple(sorted(layers, key=lambda layer: layer.output_snr_db)),
        worst_column_sqnr_db=min(layer.worst_column_sqnr_db for layer in layers),
        logit_snr_db=logit_snr_db,
    )


def rounded_weight(weight: Array, *, per_channel: bool) -> Array:
    """Return a weight (out, in / groups, kh, kw) as its 8-bit form has it, float32."""
    if not np.isfinite(weight).all():
        raise CheckFailed("a weight is NaN or infinite; int8 has no scale for it")
    integers, scale = quantize_weight(weight, per_channel=per_channel)
    steps = scale.reshape(-1, *[1] * (weight.ndim - 1)) if per_channel else scale
    return (integers * steps).astype(np.float32)


def column_sqnr_db(weight: Array, rounded: Array, *, groups: int) -> NDArray[np.float64]:
    """Return the SQNR (in,) of what the filters do with each input channel; inf for no noise.

    A column of zeros, or one that is faint beside the median column, reads nothing: inf.
    """
    split = (groups, weight.shape[0] // groups, *weight.shape[1:])
    exact = weight.astype(np.float64).reshape(split)
    over = (1, *range(3, exact.ndim))
    signal = (exact**2).sum(over).reshape(-1)
    noise = ((rounded.astype(np.float64).reshape(split) - exact) ** 2).sum(over).reshape(-1)
    found = np.full(len(signal), np.inf)
    if not signal.any():
        return found
    some = (noise > 0) & (signal > _FAINT * np.median(signal[signal > 0]))
    found[some] = 10 * np.log10(signal[some] / noise[some])
    return found


def _layer(
    name: str, weight: Array, rounded: Array, groups: int, sums: Sequence[float]
) -> LayerRisk:
    """Put a layer's row together; `sums` are of squares, of its output and of the noise in it."""
    columns = column_sqnr_db(weight, rounded, groups=groups)
    worst = int(columns.argmin())
    return LayerRisk(
        name=name,
        worst_column_sqnr_db=float(columns[worst]),
        worst_column=worst,
        output_snr_db=snr_db(*sums),
    )


def noise_images(shape: tuple[int, int, int]) -> Array:
    """Return smooth noise (N, C, H, W) of variance 1, between 8 and 64 images of it.

    Its grain is 4 pixels: of white noise a network's first averages leave little, and what they
    leave foretells less (docs/int8.md).
    """
    channels, height, width = shape
    count = min(max(2**17 // (height * width), 8), 64)
    coarse = np.random.default_rng(0).standard_normal(
        (count, channels, -(-height // 4), -(-width // 4)), dtype=np.float32
    )
    smooth = F.interpolate(torch.from_numpy(coarse), size=(height, width), mode="bilinear")
    images: Array = (smooth / smooth.std()).numpy()
    return images


def _logit_snr_db(got: Array, want: Array) -> float:
    """Return the SNR of what tells images (N, ...) from each other: logits less their means."""
    got, want = (logits.reshape(len(logits), -1) for logits in (got, want))
    return compare_logits(got - got.mean(0), want - want.mean(0)).snr_db


# ------------------------------------------------------------------------------- PyTorch


@torch.inference_mode()
def _risk_of_module(
    model: nn.Module, per_channel: bool, image_shape: tuple[int, int, int] | None
) -> tuple[list[LayerRisk], float]:
    """Run the float network, and beside each of its convolutions what rounding adds to it."""
    network = fuse(model) if graph_form(model) == "train" else copy.deepcopy(model).eval()
    network = network.to("cpu", torch.float32)
    found = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    if not found:
        raise UsageError(f"{type(model).__name__} has no convolution that int8 could round")
    if image_shape is None:
        image_shape = next(iter(found.values())).in_channels, _SIDE, _SIDE
    gates = _behind_pools(network, image_shape)
    convs = {name: conv for name, conv in found.items() if conv not in gates}
    if not convs:
        raise UsageError(f"{type(model).__name__} has no convolution in front of its pooling")
    exact = {name: conv.weight.numpy().copy() for name, conv in convs.items()}
    rounded = {name: rounded_weight(w, per_channel=per_channel) for name, w in exact.items()}

    sums = {name: [0.0, 0.0] for name in convs}
    handles = []
    for name, conv in convs.items():
        difference = copy.deepcopy(conv)
        difference.bias = None
        difference.weight.copy_(torch.from_numpy(rounded[name] - exact[name]))

        def look(
            _: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            difference: nn.Conv2d = difference,
            total: list[float] = sums[name],
        ) -> None:
            total[0] += float(output.square().sum())
            total[1] += float(difference(inputs[0]).square().sum())

        handles.append(conv.register_forward_hook(look))
    images = torch.from_numpy(noise_images(image_shape))
    want = network(images)
    for handle in handles:
        handle.remove()
    for name, conv in convs.items():
        conv.weight.copy_(torch.from_numpy(rounded[name]))
    got = network(images)
    layers = [
        _layer(name, exact[name], rounded[name], conv.groups, sums[name])
        for name, conv in convs.items()
    ]
    return layers, _logit_snr_db(got.numpy(), want.numpy())


def _behind_pools(network: nn.Module, image_shape: tuple[int, int, int]) -> set[nn.Module]:
    """Return the convolutions that read one pixel however large the image is: gates, heads."""
    channels, height, width = image_shape
    larger = (channels, 2 * max(height, 32), 2 * max(width, 32))
    found: set[nn.Module] = set()

    def look(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[2:] == (1, 1):
            found.add(conv)

    handles = [
        m.register_forward_pre_hook(look) for m in network.modules() if isinstance(m, nn.Conv2d)
    ]
    network(torch.from_numpy(noise_images(larger)[:1]))
    for handle in handles:
        handle.remove()
    return found


# ------------------------------------------------------------------------------- ONNX


def _risk_of_onnx(
    proto: ModelProto, per_channel: bool, image_shape: tuple[int, int, int] | None
) -> tuple[list[LayerRisk], float]:
    """Run the float graph with a convolution of the difference beside each of its own."""
    require("onnx", purpose="reading ONNX files", extra="export")
    from onnx import ValueInfoProto, helper, numpy_helper

    names = set(convolutions(proto))
    if not names:
        raise UsageError("this ONNX file has no convolution with float weights; give the fp32 file")
    probe, quantized = _copy(proto), _copy(proto)
    index = GraphIndex(probe.graph)
    chosen = [n for n in probe.graph.node if n.op_type == "Conv" and n.name in names]
    exact: dict[str, Array] = {}
    rounded: dict[str, Array] = {}
    for node in chosen:
        weight = index.values(node.input[1])
        assert weight is not None
        exact[node.name] = weight.astype(np.float32)
        rounded[node.name] = rounded_weight(exact[node.name], per_channel=per_channel)
        difference = f"{node.name}/difference"
        values = rounded[node.name] - exact[node.name]
        probe.graph.initializer.append(numpy_helper.from_array(values, difference))
        beside = _with_weight(node, difference, f"{node.name}/noise")
        probe.graph.node.append(beside)
        for tensor in (node.output[0], beside.output[0]):
            total = f"{tensor}/energy"
            probe.graph.node.append(
                helper.make_node("ReduceSumSquare", [tensor], [total], total, keepdims=0)
            )
            probe.graph.output.append(ValueInfoProto(name=total))
    for node in quantized.graph.node:
        if node.name in rounded:
            node.input[1] = f"{node.name}/rounded"
            quantized.graph.initializer.append(
                numpy_helper.from_array(rounded[node.name], node.input[1])
            )

    batches = _batches(proto, image_shape)
    sums, want = np.zeros(2 * len(chosen)), []
    for logits, *energies in _run(probe, batches):
        want.append(logits)
        sums += np.array(energies, np.float64)
    got = [logits for logits, *_ in _run(quantized, batches)]
    layers = [
        _layer(
            node.name, exact[node.name], rounded[node.name],
            next((a.i for a in node.attribute if a.name == "group"), 1),
            sums[2 * i : 2 * i + 2].tolist(),
        )
        for i, node in enumerate(chosen)
    ]  # fmt: skip
    return layers, _logit_snr_db(np.concatenate(got), np.concatenate(want))


def _copy(proto: ModelProto) -> ModelProto:
    """Return a copy whose nodes have the names that `convolutions` gives them."""
    model = type(proto)()
    model.CopyFrom(proto)
    for node in model.graph.node:
        node.name = node.name or node.output[0]
    model.graph.ClearField("value_info")
    return model


def _with_weight(node: NodeProto, weight: str, output: str) -> NodeProto:
    """Return a convolution of the same input with another weight and no bias."""
    beside = type(node)()
    beside.CopyFrom(node)
    beside.name = output
    beside.input[:] = [node.input[0], weight]
    beside.output[:] = [output]
    return beside


def _batches(proto: ModelProto, image_shape: tuple[int, int, int] | None) -> list[Array]:
    """Return noise in batches that the graph takes; open sides are `_SIDE`."""
    axes = [axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim]
    own = axes[1], axes[2] or _SIDE, axes[3] or _SIDE
    images = noise_images(image_shape or own)
    most = axes[0] or len(images)
    return [images[i : i + most] for i in range(0, len(images), most)]


def _run(model: ModelProto, batches: Sequence[Array]) -> Iterator[list[Array]]:
    """Yield all outputs of a graph for each batch."""
    runtime = require("onnxruntime", purpose="running ONNX files", extra="export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=DISABLED_OPTIMIZERS,
    )  # fmt: skip
    entry = session.get_inputs()[0].name
    for batch in batches:
        yield session.run(None, {entry: batch})
