"""AdaRound: weights are rounded up or down as the layer's output asks, not to the nearest integer.

Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv 2004.10568.
Each weight's share h of the step above its floor is learned in [0, 1] and driven to either end
(equations 21 to 25):

    W~ = s (floor(W / s) + h(V))            h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    min over V   |f(W x + b) - f(W~ xq + b)|^2  +  lambda sum(1 - |2 h - 1|^beta)

f is the ReLU that follows; x is what the float network gives the layer, xq what comes to it in the
quantized one, whose layers before it are rounded already. Beta falls from 20, where only what is
near an end is drawn to it, to 2.

Against the paper: the squared error is divided by that of the file's own integers, so that one
lambda suits all layers; and an output channel that comes out no better keeps these integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, UsageError, require

from .compare import LayerTensors, probe_layers, refuse_halves, run_probe
from .qdq_lint import GraphIndex
from .runtime import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from torch import Tensor

__all__ = ["STEPS", "adaround", "choose_rounding", "rectified_sigmoid"]

#: Steps of Adam for each layer.
STEPS = 300
_LEARNING_RATE = 0.05
_LAMBDA = 4.0
_BETAS = 20.0, 2.0
_WARM_UP = 0.2  # of the steps have no regulariser
_LOW, _HIGH = -0.1, 1.1  # of the sigmoid before it is clipped
_ROWS = 256  # output positions in a step
_ROWS_MIB = 64  # of a layer's inputs, as its kernel reads them, and outputs; copies not counted
_MOST_IMAGES = 256
_AT_ONCE = 16  # images

_Integers = NDArray[np.int8]


def adaround(
    float_proto: ModelProto,
    quantized_proto: ModelProto,
    images: Array,
    *,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda said: None,
) -> dict[str, _Integers]:
    """Return integers of the weights by float initializer, for `quantize(rounded=...)`.

    Layers follow each other in the graph's order. The scales are the file's, and no integer is as
    far as 1 from weight / scale or further from 0 than the file's are. What the file has stays
    where a weight is read by several nodes, and where a convolution is not 2-d or has `auto_pad`.

    Args:
        float_proto: what `quantize` was given.
        quantized_proto: the 8-bit file that it made, of any form of `Form`.
        images: preprocessed images (N, C, H, W); 256 are used. Of large maps, random positions are.
        steps: of Adam, for each layer.
        seed: of the positions and their order.
        progress: is called with a sentence before each layer.

    Raises UsageError for files that do not belong together and unusable images, CheckFailed where
    activations are not finite.
    """
    require("onnx", purpose="export", extra="export")
    from onnx import numpy_helper

    if steps < 1:
        raise UsageError(f"AdaRound takes 1 step or more, not {steps}")
    refuse_halves(quantized_proto)
    probe, tensors = probe_layers(float_proto, quantized_proto)
    layers = _layers(float_proto, quantized_proto, tensors)
    constants = {tensor.name: tensor for tensor in probe.graph.initializer}
    random = np.random.default_rng(seed)
    found: dict[str, _Integers] = {}
    for number, layer in enumerate(layers, 1):
        progress(f"AdaRound: layer {number} of {len(layers)}")
        inputs, targets = _rows(probe, layer, images[:_MOST_IMAGES], random)
        groups, _, depth = inputs.shape
        integers = choose_rounding(
            inputs,
            targets,
            layer.weight.reshape(groups, -1, depth),
            layer.bias.reshape(groups, -1),
            layer.scale.reshape(groups, -1),
            layer.integers.reshape(groups, -1, depth),
            reach=layer.reach,
            steps=steps,
        ).reshape(layer.integers.shape)
        found[layer.weight_name] = integers
        constant = constants[f"q/{layer.integers_name}"]
        constant.CopyFrom(numpy_helper.from_array(integers, constant.name))
    return found


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One convolution: its tensors in the probe, what the two files hold of it, how it convolves.

    `scale` is (out,) whatever the file has; `reach` are the bounds of the activation that follows.
    """

    tensors: LayerTensors
    weight_name: str
    integers_name: str
    weight: Array
    bias: Array
    scale: Array
    integers: _Integers
    reach: tuple[float, float]
    groups: int
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]  # top, left, bottom, right


def _layers(
    float_proto: ModelProto, quantized_proto: ModelProto, tensors: list[LayerTensors]
) -> list[_Layer]:
    """Return the convolutions whose integers can be chosen, in the graph's order."""
    floats, quantized = GraphIndex(float_proto.graph), GraphIndex(quantized_proto.graph)
    convs, twins = (
        {node.name or node.output[0]: node for node in graph.node if node.op_type == "Conv"}
        for graph in (float_proto.graph, quantized_proto.graph)
    )
    layers = []
    for layer in tensors:
        node = convs[layer.name]
        dequantize = quantized.producers[twins[layer.name].input[1]]
        stored, scale = (quantized.values(name) for name in dequantize.input[:2])
        given = floats.values(node.input[1])
        if given is None or stored is None or scale is None or given.shape != stored.shape:
            raise _other_file(layer.name)
        weight, integers = given.astype(np.float32), stored.astype(np.int8)
        has_bias = len(node.input) > 2 and node.input[2]
        bias = floats.values(node.input[2]) if has_bias else np.zeros(len(weight), np.float32)
        options = _options(node)
        is_plain = weight.ndim == 4 and options.get("auto_pad", b"NOTSET") == b"NOTSET"
        if not is_plain or bias is None or not floats.is_only_read_by(node.input[1], node):
            continue
        steps = np.broadcast_to(scale.astype(np.float32).reshape(-1), (len(weight),))
        exact = weight / steps[:, None, None, None].astype(np.float64)
        if not (np.abs(exact - integers) < 1).all():
            raise _other_file(layer.name)
        layers.append(
            _Layer(
                tensors=layer,
                weight_name=node.input[1],
                integers_name=dequantize.input[0],
                weight=weight,
                bias=bias.astype(np.float32),
                scale=steps,
                integers=integers,
                reach=_activation(floats, node.output[0]),
                groups=options.get("group", 1),
                strides=tuple(options.get("strides", (1, 1))),
                dilations=tuple(options.get("dilations", (1, 1))),
                pads=tuple(options.get("pads", (0, 0, 0, 0))),
            )
        )
    return layers


def _other_file(name: str) -> UsageError:
    return UsageError(
        f"the convolution {name} has other weights in the quantized file than in the float file; "
        "give the file that it was made from"
    )


def _options(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _activation(index: GraphIndex, tensor: str) -> tuple[float, float]:
    """Return between which values a ReLU or Clip that alone reads a tensor lets it through."""
    readers = index.readers[tensor]
    if len(readers) == 1 and tensor not in index.outputs:
        (node,) = readers
        if node.op_type == "Relu":
            return 0.0, np.inf
        if node.op_type == "Clip" and len(node.input) == 3:
            low, high = (index.values(name) for name in node.input[1:])
            if low is not None and high is not None:
                return float(low), float(high)
    return -np.inf, np.inf


def _rows(
    probe: ModelProto, layer: _Layer, images: Array, random: np.random.Generator
) -> tuple[Array, Array]:
    """Return what a layer reads and what it is to give, at random positions in random order.

    Inputs are (groups, rows, in x kh x kw), from the quantized network; targets (groups, rows,
    out), from the float one, without the activation.
    """
    height, width = layer.weight.shape[2:]
    (down, right), (apart_y, apart_x) = layer.strides, layer.dilations
    top, left, bottom, end = layer.pads
    window = (height - 1) * apart_y + 1, (width - 1) * apart_x + 1
    size = layer.weight[0].size * layer.groups + len(layer.weight)  # floats of a row
    most = max(int(_ROWS_MIB * 2**20 / (4 * size)), _ROWS)
    images = images[:most]
    parts = []
    wanted = [layer.tensors.net_input, layer.tensors.float_output]
    for values, target in run_probe(probe, wanted, images, at_once=_AT_ONCE):
        if not (np.isfinite(values).all() and np.isfinite(target).all()):
            raise CheckFailed(
                f"the convolution {layer.tensors.name} has NaN or infinite activations on the "
                "images; check their preprocessing"
            )
        padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, end)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, window, axis=(2, 3))
        count, _, _, across = target.shape
        places = target[0, 0].size
        order = random.random((count, places)).argsort(axis=1)[:, : most // len(images)]
        y, x = np.divmod(order, across)
        image = np.arange(count)[:, None]
        read = windows[image, :, y * down, x * right, ::apart_y, ::apart_x]
        rows = order.size
        parts.append(
            (read.reshape(rows, layer.groups, -1), target[image, :, y, x].reshape(rows, -1))
        )
    inputs, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
    shuffled = random.permutation(len(inputs))
    targets = targets[shuffled].reshape(len(inputs), layer.groups, -1)
    return inputs[shuffled].swapaxes(0, 1), targets.swapaxes(0, 1)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Return h(V), which reaches 0 and 1 at finite V (equation 23)."""
    return (v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def choose_rounding(
    inputs: Array,
    targets: Array,
    weight: Array,
    bias: Array,
    scale: Array,
    nearest: _Integers,
    *,
    reach: tuple[float, float] = (-np.inf, np.inf),
    steps: int = STEPS,
) -> _Integers:
    """Return integers that bring a grouped matrix product nearer to its targets than `nearest`.

    An output channel for which none are found keeps `nearest`, and so does a weight that is a
    multiple of its scale, or whose other neighbour is further from 0 than `nearest` goes.

    Args:
        inputs: rows in random order (groups, rows, in).
        targets: what they are to give (groups, rows, out).
        weight: (groups, out, in) in float.
        bias: (groups, out).
        scale: (groups, out), of the weight.
        nearest: (groups, out, in), less than 1 from weight / scale.
        reach: the bounds of the activation that follows.
        steps: of Adam.
    """
    import torch

    def tensor(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(values, np.float32, order="C"))

    step = scale[..., None].astype(np.float64)
    exact = weight / step
    floor = np.floor(exact)
    largest = int(np.abs(nearest.astype(np.int16)).max(initial=0))
    is_free = (exact > floor) & (floor >= -largest) & (floor < largest)
    x, start, offset = tensor(inputs), tensor(nearest), tensor(bias[:, None])
    size, free = tensor(step), torch.from_numpy(is_free)
    want = tensor(targets).clamp(*reach)

    def error(integers: Tensor, x: Tensor, want: Tensor) -> Tensor:
        """Return the squared error (groups, rows, out)."""
        got = torch.baddbmm(offset, x, (integers * size).transpose(1, 2))
        return (got.clamp(*reach) - want).square()

    with torch.no_grad():
        before = error(start, x, want).mean(1)
    if not float(before.mean()) > 0 or not is_free.any():
        return nearest
    lower, span = torch.where(free, tensor(floor), start), free.float()
    fraction = tensor(np.where(is_free, exact - floor, 0.5))
    v = -torch.log((_HIGH - _LOW) / (fraction - _LOW) - 1)
    v.requires_grad_()
    optimizer = torch.optim.Adam([v], _LEARNING_RATE)
    rows = x.shape[1]
    batches = max(rows // _ROWS, 1)
    for number in range(steps):
        some = slice(number % batches * _ROWS, (number % batches + 1) * _ROWS)
        h = rectified_sigmoid(v)
        loss = error(lower + span * h, x[:, some], want[:, some]).mean() / before.mean()
        done = (number / steps - _WARM_UP) / (1 - _WARM_UP)
        if done >= 0:
            beta = _BETAS[1] + (_BETAS[0] - _BETAS[1]) * (1 + np.cos(np.pi * done)) / 2
            loss = loss + _LAMBDA * (1 - (2 * h - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        chosen = lower + span * (v >= 0)
        after = error(chosen, x, want).mean(1)
        chosen = torch.where((after < before)[..., None], chosen, start)
    return chosen.numpy().astype(np.int8)
