"""Cross-layer equalisation: the same float32 network with weights that 8 bits hold better.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, arXiv
1906.04721, section 4.1. ReLU(s x) = s ReLU(x) for s > 0, so a channel between two convolutions may
be divided by s where it is made and multiplied by s where it is read::

    Conv W1, b1 ── Relu ── Conv W2        W1[i] / s_i, b1[i] / s_i        W2[:, i] * s_i

The paper equalises pairs of layers. Here every channel of every tensor has an s. A walk through the
graph finds which must be the same (`_Walk`): both branches of an Add, what a Concat or a channel
shuffle only moves, a channel and its gated self; and which must be 1: what Clip (ReLU6), HardSwish
or Sigmoid reads, what enters and leaves the network, what is not understood. What shares an s is a
group. It is made by some tensors (rows of weights) and read by some (columns).

The precision of a channel in a tensor is its range over the tensor's (eq. 9), r_i / R. As in eq. 11
the s are sought at which a channel has the same precision where it is made and where it is read: in
each round s_i *= sqrt(made_i / read_i), with the largest precision among several makers or readers.
Layers that stay in float are exactly rescaled as well, but have no say.

Differs from the paper in: activations count, since they share 8 bits too. A channel that is little
more than its bias has small weights, and to make those large would make its activation tower over
all others. So its activation's precision over `_HEADROOM` counts as made as well; and where every
row has a scale of its own, its range costs nothing, and the activation's precision is all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import UsageError, require

from .parity import TOLERANCE, check_parity
from .qdq_lint import DEQUANTIZE, QUANTIZE, GraphIndex
from .runtime import Array
from .to_int8 import convolutions, image_batches, run_probes
from .to_onnx import load_onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["LARGEST_SCALE", "Equalized", "equalize"]

#: No channel is scaled by more than this or less than its reciprocal: a channel that is all but
#: zero would else be blown up, and 16-bit floats reach no further than 2^16.
LARGEST_SCALE = 2.0**10
#: Rounds at most, and the change of log s below which there is no further one.
_ROUNDS, _SETTLED = 40, 1e-3
#: How many times the precision of its weights an activation may have. Of trained digits networks
#: with constant channels, per tensor: 22 dB before, 10 dB without this, 24 with 4; others the same.
_HEADROOM = 4.0
#: Change of log s from which a channel counts as scaled: 1 %.
_NOTICEABLE = 0.01

_Ids = NDArray[np.intp]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """A float32 network and how far its channels were rescaled.

    `channels` is how many output channels of convolutions were scaled by 1 % or more, `layers` in
    how many convolutions; `largest_scale` is the largest factor, up or down, and
    `max_relative_error` max |difference| / max |logit| to the network before.
    """

    proto: ModelProto
    channels: int
    layers: int
    largest_scale: float
    max_relative_error: float

    @property
    def said(self) -> str:
        """What was done, in a sentence."""
        if not self.channels:
            return "cross-layer equalisation found nothing to rescale; the network is as it was"
        return (
            f"cross-layer equalisation rescaled {self.channels} channels of {self.layers} "
            f"convolutions by up to {self.largest_scale:.3g}; the logits moved by "
            f"{self.max_relative_error:.1e} (relative)"
        )


def equalize(proto: ModelProto, images: Array, *, per_channel: bool = False) -> Equalized:
    """Return the same function with its channels' ranges equalised.

    Args:
        proto: what `export_onnx` wrote, in float32; it is left as it is.
        images: preprocessed images (N, C, H, W) on which activations are measured and both networks
            compared.
        per_channel: for weights with one scale per output channel. Where it is not known, leave it:
            what suits one scale per weight suits both.

    Raises UsageError for a quantized file and unusable images, CheckFailed where the two networks
    differ by more than float32's rounding.
    """
    require("onnx", purpose="export", extra="export")
    if any(node.op_type in (QUANTIZE, DEQUANTIZE) for node in proto.graph.node):
        raise UsageError("this ONNX file is quantized; equalisation starts from the float32 file")
    batches = image_batches(images)
    walk = _Walk(proto)
    scales = _balance(walk, _activations(walk, proto, batches), per_channel=per_channel)
    model = type(proto)()
    model.CopyFrom(proto)
    moved = np.abs(np.log(scales)) >= _NOTICEABLE
    rows = [int(moved[conv.rows].sum()) for conv in walk.convs]
    if any(rows):
        walk.apply(model, scales)
    before, after = load_onnx(proto), load_onnx(model)
    parity = check_parity(
        "the equalised network",
        np.concatenate([after(batch) for batch in batches]),
        np.concatenate([before(batch) for batch in batches]),
        reference="the network before it",
        tolerance=TOLERANCE["fp32"],
    )
    made = np.unique(np.concatenate([np.zeros(1, np.intp), *(conv.rows for conv in walk.convs)]))
    return Equalized(
        proto=model,
        channels=sum(rows),
        layers=sum(row > 0 for row in rows),
        largest_scale=float(np.exp(np.abs(np.log(scales[made])).max())),
        max_relative_error=parity.max_relative_error,
    )


# ------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Conv:
    """A convolution whose weight (O, I / groups, kh, kw) is its own.

    `rows` (O,) and `columns` (O, I / groups) are the channels that it makes and reads; `reach` is
    the largest |weight| of a window, (O, I / groups). `counts` tells whether int8 quantizes it.
    """

    data: str
    rows: _Ids
    columns: _Ids
    groups: int
    reach: _Floats
    counts: bool


@dataclass(frozen=True)
class _Activation:
    """The largest magnitude `reach` (C,) of each of a tensor's `channels` (C,)."""

    channels: _Ids
    reach: _Floats


def _activations(walk: _Walk, proto: ModelProto, batches: Sequence[Array]) -> list[_Activation]:
    """Return the activations that int8 quantizes, measured: what the convolutions read."""
    from onnx import helper, numpy_helper

    model = type(proto)()
    model.CopyFrom(proto)
    axes = "equalize/axes"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3]), axes))
    names = list(dict.fromkeys(conv.data for conv in walk.convs if conv.counts))
    nodes = []
    for name in names:
        size, most = f"equalize/{name}/size", f"equalize/{name}/most"
        nodes.append(helper.make_node("Abs", [name], [size]))
        nodes.append(helper.make_node("ReduceMax", [size, axes], [most], keepdims=0))
    reach: dict[str, Array] = {}
    for found in run_probes(model, batches, nodes):
        for name in names:
            largest = found[f"equalize/{name}/most"]
            reach[name] = np.maximum(largest, reach.get(name, largest))
    return [
        _Activation(ids, reach[name].astype(np.float64))
        for name in names
        if (ids := walk.data(name)) is not None
    ]


def _balance(walk: _Walk, activations: Sequence[_Activation], *, per_channel: bool) -> _Floats:
    """Return every channel's s: the same precision where it is made and where it is read.

    What makes a channel are rows of weights and, with headroom, its activations; `per_channel` the
    activations alone. What nothing counted makes or reads, or reads only with zeros, has s = 1;
    what only float layers read is brought to the range of the tensor that makes it, and the other
    way round.
    """
    roots = walk.roots()
    count = len(roots)
    convs = [conv for conv in walk.convs if conv.counts and conv.reach.any()]
    is_made, is_read = np.zeros(count, bool), np.zeros(count, bool)
    for conv in convs:
        is_made[roots[conv.rows]] = not per_channel
        is_read[roots[conv.columns]] = True
    for activation in activations:
        is_made[roots[activation.channels]] |= per_channel
    logs = np.zeros(count)
    limit = np.log(LARGEST_SCALE)
    for _ in range(_ROUNDS):
        scales = np.exp(logs)
        made, read, active = np.zeros(count), np.zeros(count), np.zeros(count)
        for conv in convs:
            reach = conv.reach * scales[roots[conv.columns]] / scales[roots[conv.rows]][:, None]
            reach /= reach.max()
            np.maximum.at(made, roots[conv.rows], reach.max(1))
            shape = (conv.groups, -1, reach.shape[1])
            columns = conv.columns.reshape(shape)[:, 0]
            np.maximum.at(read, roots[columns], reach.reshape(shape).max(1))
        for activation in activations:
            groups = roots[activation.channels]
            size = activation.reach / scales[groups]
            if size.any():
                np.maximum.at(active, groups, size / size.max())
        made = (
            active if per_channel else np.where(made > 0, np.maximum(made, active / _HEADROOM), 0)
        )
        has_made, has_read = made > 0, read > 0
        up, down = (
            np.log(np.where(has, x, 1.0)) for has, x in ((has_made, made), (has_read, read))
        )
        step = np.zeros(count)
        both, top, end = has_made & has_read, has_made & ~is_read, has_read & ~is_made
        step[both] = (up - down)[both] / 2
        step[top], step[end] = up[top], -down[end]
        step[0] = 0.0
        after = np.clip(logs + step, -limit, limit)
        change = np.abs(after - logs).max()
        logs = after
        if change < _SETTLED:
            break
    scales = np.exp(logs[roots])
    return scales


# ------------------------------------------------------------------------------- the graph

#: Operators f with f(s x) = s f(x), channel by channel: on any axes, and on axes 2 and further.
_HOMOGENEOUS = frozenset(("Dropout", "Identity", "LeakyRelu", "Relu"))
_POOLS = frozenset(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"))


@dataclass(frozen=True)
class _Edit:
    """A constant that is multiplied by s^power, `channels` having a shape that broadcasts to it."""

    name: str
    channels: _Ids
    power: int


class _Walk:
    """Whose channel every channel of a graph is, and what has to change when one is scaled.

    Channels are numbers; number 0 is never scaled, and channels that are tied are one. `channels`
    gives those of a tensor along its axes 1 and further: as a rule (C,), and (g, C / g) inside a
    channel shuffle. A tensor without an entry has no channels that could be scaled.
    """

    def __init__(self, proto: ModelProto) -> None:
        self.index = GraphIndex(proto.graph)
        self.shapes = _shapes(proto)
        self.counted = frozenset(convolutions(proto))
        self.convs: list[_Conv] = []
        self.edits: list[_Edit] = []
        self.channels: dict[str, _Ids] = {}
        self._parents = [0]
        graph = proto.graph
        self._parameters = {tensor.name for tensor in graph.initializer}
        self._parameters -= {entry.name for entry in graph.input} | self.index.outputs
        if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
            return  # what the branches of an If read is not looked into
        for node in graph.node:
            rule = _RULES.get(node.op_type)
            found = None if rule is None else rule(self, node)
            if found is None:
                for name in node.input:
                    self._fix(name)
                found = [self._fixed(name) for name in node.output]
            for name, ids in zip(node.output, found, strict=False):
                if ids is not None:
                    self.channels[name] = ids
        for name in self.index.outputs:
            self._fix(name)

    def roots(self) -> _Ids:
        """Return the group of every channel, named after one of them; that of channel 0 is 0."""
        return np.array([self._root(channel) for channel in range(len(self._parents))], np.intp)

    def apply(self, model: ModelProto, scales: _Floats) -> None:
        """Scale the constants of `model`, a copy of the graph, by `scales`, one per channel."""
        from onnx import numpy_helper

        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        values: dict[str, _Floats] = {}
        for edit in self.edits:
            value = values.get(edit.name)
            if value is None:
                value = numpy_helper.to_array(tensors[edit.name]).astype(np.float64)
            values[edit.name] = value * scales[edit.channels] ** edit.power
        for name, value in values.items():
            tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))

    # ---------------------------------------------------------------------- groups of channels

    def _root(self, channel: int) -> int:
        parents = self._parents
        while parents[channel] != channel:
            parents[channel] = parents[parents[channel]]
            channel = parents[channel]
        return channel

    def _tie(self, some: _Ids, others: _Ids) -> None:
        for a, b in zip(some.ravel().tolist(), others.ravel().tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            self._parents[high] = low  # so that 0 remains a root

    def _fresh(self, count: int) -> _Ids:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def _fix(self, name: str) -> None:
        if name in self.channels:
            self._tie(self.channels[name], np.zeros_like(self.channels[name]))

    def _fixed(self, name: str) -> _Ids | None:
        """Return channels that are never scaled, None for a tensor of unknown size."""
        shape = self.shapes.get(name, ())
        width = shape[1] if len(shape) > 1 else None
        return None if width is None else np.zeros(width, np.intp)

    def _is_fixed(self, ids: _Ids) -> bool:
        return all(self._root(channel) == 0 for channel in ids.ravel().tolist())

    # ---------------------------------------------------------------------- what a node reads

    def data(self, name: str) -> _Ids | None:
        """Return a computed tensor's channels along axis 1 alone, None where it has none."""
        if name in self.channels:
            ids = self.channels[name]
        elif name in self.index.producers or self.index.values(name) is not None:
            return None
        else:
            fixed = self._fixed(name)  # the network's input
            if fixed is None:
                return None
            ids = fixed
        return ids if ids.ndim == 1 else None

    def _own(self, name: str, node: NodeProto) -> NDArray[np.generic] | None:
        """Return a float32 constant that only this input of this node reads, else None."""
        if name not in self._parameters or not self.index.is_only_read_by(name, node):
            return None
        value = self.index.values(name)
        is_once = list(node.input).count(name) == 1
        return value if value is not None and value.dtype == np.float32 and is_once else None

    def _constant(self, node: NodeProto, position: int) -> NDArray[np.generic] | None:
        name = node.input[position] if len(node.input) > position else ""
        return self.index.values(name) if name else None


def _shapes(proto: ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return the size of every tensor, None along an open axis."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto, data_prop=True).graph
    return {
        entry.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in entry.type.tensor_type.shape.dim
        )
        for entry in (*graph.value_info, *graph.input, *graph.output)
        if entry.type.tensor_type.HasField("shape")
    }


def _attribute(node: NodeProto, name: str, default: object) -> object:
    from onnx import helper

    found = [attribute for attribute in node.attribute if attribute.name == name]
    return helper.get_attribute_value(found[0]) if found else default


def _size(sizes: Sequence[int | None]) -> int | None:
    """Return the product of sizes, None where one is open."""
    known = [size for size in sizes if size is not None]
    return int(np.prod(known)) if len(known) == len(sizes) else None


# A rule returns the channels of its node's outputs, None where nothing of what the node reads and
# makes may be scaled.
_Outputs = Sequence[_Ids | None] | None


def _conv(walk: _Walk, node: NodeProto) -> _Outputs:
    ids, weight = walk.data(node.input[0]), walk._own(node.input[1], node)
    groups = _attribute(node, "group", 1)
    assert isinstance(groups, int)
    if ids is None or weight is None or len(ids) != groups * weight.shape[1]:
        return None
    count, width = weight.shape[:2]
    bias = node.input[2] if len(node.input) > 2 else ""
    has_rows = not bias or walk._own(bias, node) is not None
    rows = walk._fresh(count) if has_rows else np.zeros(count, np.intp)
    columns = ids.reshape(groups, 1, width).repeat(count // groups, 1).reshape(count, width)
    window = (1,) * (weight.ndim - 2)
    walk.edits += [
        _Edit(node.input[1], columns.reshape(count, width, *window), 1),
        _Edit(node.input[1], rows.reshape(count, 1, *window), -1),
    ]
    if bias and has_rows:
        walk.edits.append(_Edit(bias, rows, -1))
    walk.convs.append(
        _Conv(
            data=node.input[0],
            rows=rows,
            columns=columns,
            groups=groups,
            reach=np.abs(weight).reshape(count, width, -1).max(2, initial=0.0).astype(np.float64),
            counts=(node.name or node.output[0]) in walk.counted,
        )
    )
    return [rows]


def _linear(walk: _Walk, node: NodeProto) -> _Outputs:
    """Gemm and MatMul by a constant: it reads channels, its outputs are not scaled."""
    ids, weight = walk.data(node.input[0]), walk._own(node.input[1], node)
    is_plain = not _attribute(node, "transA", 0) and len(walk.shapes.get(node.input[0], ())) == 2
    if ids is None or weight is None or weight.ndim != 2 or not is_plain:
        return None
    along = 1 if _attribute(node, "transB", 0) else 0
    if weight.shape[along] != len(ids):
        return None
    walk.edits.append(_Edit(node.input[1], ids[None, :] if along else ids[:, None], 1))
    for name in node.input[2:]:
        walk._fix(name)
    return [np.zeros(weight.shape[1 - along], np.intp)]


def _homogeneous(walk: _Walk, node: NodeProto) -> _Outputs:
    ids = walk.channels.get(node.input[0])
    return None if ids is None else [ids]


def _pool(walk: _Walk, node: NodeProto) -> _Outputs:
    ids = walk.data(node.input[0])
    return None if ids is None else [ids]


def _prelu(walk: _Walk, node: NodeProto) -> _Outputs:
    return None if walk._constant(node, 1) is None else _homogeneous(walk, node)


def _mean(walk: _Walk, node: NodeProto) -> _Outputs:
    """ReduceMean over axes behind the channels."""
    given = walk._constant(node, 1) if len(node.input) > 1 else _attribute(node, "axes", ())
    rank = len(walk.shapes.get(node.input[0], ()))
    axes = (
        [int(axis) % rank for axis in np.asarray(given).ravel()]
        if given is not None and rank
        else []
    )
    return _pool(walk, node) if axes and min(axes) >= 2 else None


def _pad(walk: _Walk, node: NodeProto) -> _Outputs:
    """Zeros, or copies of the border, around height and width."""
    pads, value = walk._constant(node, 1), walk._constant(node, 2)
    is_zero = len(node.input) < 3 or not node.input[2] or (value is not None and not value.any())
    if _attribute(node, "mode", b"constant") == b"constant" and not is_zero:
        return None
    if pads is None or len(node.input) > 3 or pads.reshape(2, -1)[:, :2].any():
        return None
    return _pool(walk, node)


def _add(walk: _Walk, node: NodeProto) -> _Outputs:
    """Add and Sub: both operands' channels are the same; a constant is scaled along."""
    constants = [walk.index.values(name) for name in node.input]
    ranks = [len(walk.shapes.get(name, ())) for name in node.input]
    a, b = (walk.data(name) for name in node.input)
    if constants[0] is None and constants[1] is None:
        if a is None or b is None or len(a) != len(b) or ranks[0] != ranks[1]:
            return None
        walk._tie(a, b)
        return [a]
    data, other = (1, 0) if constants[1] is None else (0, 1)
    ids, constant, name = (a, b)[data], constants[other], node.input[other]
    if ids is None or constant is None:
        return None
    axis = 1 - (ranks[data] - constant.ndim)
    if constant.ndim > ranks[data]:
        return None
    if not constant.any():
        is_narrow = axis < 0 or constant.shape[axis] in (1, len(ids))
        return [ids] if is_narrow else None
    if axis < 0 or constant.shape[axis] != len(ids) or walk._own(name, node) is None:
        return None
    walk.edits.append(_Edit(name, ids.reshape(-1, *(1,) * (constant.ndim - axis - 1)), -1))
    return [ids]


def _mul(walk: _Walk, node: NodeProto) -> _Outputs:
    """Mul: x times a constant or times a gate that is not scaled; Div: x by a constant."""
    for position in (0, 1) if node.op_type == "Mul" else (0,):
        name, factor = node.input[position], node.input[1 - position]
        ids, constant = walk.data(name), walk.index.values(factor)
        rank = len(walk.shapes.get(name, ()))
        if ids is None or not rank:
            continue
        if constant is not None:
            axis = 1 - (rank - constant.ndim)
            if axis < 0 or (axis < 2 and constant.shape[axis] in (1, len(ids))):
                return [ids]
        elif node.op_type == "Mul":
            gate = walk.data(factor)
            is_alike = len(walk.shapes.get(factor, ())) == rank
            if gate is not None and len(gate) in (1, len(ids)) and is_alike:
                if walk._is_fixed(gate):
                    return [ids]
    return None


def _is_axis_1(walk: _Walk, node: NodeProto, *, default: int) -> bool:
    axis, rank = _attribute(node, "axis", default), len(walk.shapes.get(node.input[0], ()))
    assert isinstance(axis, int)
    return axis == 1 or (rank > 0 and axis == 1 - rank)


def _concat(walk: _Walk, node: NodeProto) -> _Outputs:
    parts = [walk.data(name) for name in node.input]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not _is_axis_1(walk, node, default=1):
        return None
    return [np.concatenate(known)]


def _split(walk: _Walk, node: NodeProto) -> _Outputs:
    ids = walk.data(node.input[0])
    sizes = [walk.shapes.get(name, (None,) * 2)[1:2] for name in node.output]
    known = [size[0] for size in sizes if size and size[0] is not None]
    if ids is None or len(known) < len(sizes) or not _is_axis_1(walk, node, default=0):
        return None
    return np.split(ids, np.cumsum(known)[:-1]) if sum(known) == len(ids) else None


def _slice(walk: _Walk, node: NodeProto) -> _Outputs:
    """Slice: some channels, or some of height and width."""
    ids, rank = walk.data(node.input[0]), len(walk.shapes.get(node.input[0], ()))
    starts, ends = walk._constant(node, 1), walk._constant(node, 2)
    if ids is None or starts is None or ends is None or not rank:
        return None
    count = starts.size
    axes = walk._constant(node, 3) if len(node.input) > 3 else np.arange(count)
    steps = walk._constant(node, 4) if len(node.input) > 4 else np.ones(count, np.int64)
    if axes is None or steps is None or min(np.asarray(steps, np.int64), default=1) < 1:
        return None
    for axis, start, end, step in zip(axes % rank, starts, ends, steps, strict=True):
        if axis == 1:
            ids = ids[int(start) : int(end) : int(step)]
    return [ids]


def _gather(walk: _Walk, node: NodeProto) -> _Outputs:
    """Gather by a constant list of channels: a channel shuffle in one node."""
    ids, places = walk.data(node.input[0]), walk._constant(node, 1)
    if ids is None or places is None or places.ndim != 1 or not _is_axis_1(walk, node, default=0):
        return None
    return [ids[places.astype(np.intp)]]


def _reshape(walk: _Walk, node: NodeProto) -> _Outputs:
    """Reshape, Flatten and Squeeze that leave the images of a batch apart."""
    ids = walk.channels.get(node.input[0])
    before, after = (walk.shapes.get(name, ()) for name in (node.input[0], node.output[0]))
    size = _size(before[1:])
    if ids is None or size is None or size != _size(after[1:]) or len(after) < 2:
        return None
    for axes in range(1, len(after)):
        if _size(after[1 : 1 + axes]) == ids.size:
            sizes = [width for width in after[1 : 1 + axes] if width is not None]
            return [ids.reshape(sizes)]
    if len(after) == 2:  # (N, C, H, W) to (N, C * H * W)
        return [ids.ravel().repeat(size // ids.size)]
    return None


def _transpose(walk: _Walk, node: NodeProto) -> _Outputs:
    """Transpose of the axes that hold channels among themselves."""
    ids, order = walk.channels.get(node.input[0]), _attribute(node, "perm", None)
    if ids is None or not isinstance(order, list):
        return None
    inner = order[1 : 1 + ids.ndim]
    if order[0] != 0 or sorted(inner) != list(range(1, 1 + ids.ndim)):
        return None
    return [ids.transpose([axis - 1 for axis in inner])]


_RULES: dict[str, Callable[[_Walk, NodeProto], _Outputs]] = {
    **dict.fromkeys(_HOMOGENEOUS, _homogeneous),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(("Add", "Sub"), _add),
    **dict.fromkeys(("Mul", "Div"), _mul),
    **dict.fromkeys(("Gemm", "MatMul"), _linear),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze"), _reshape),
    "Concat": _concat,
    "Conv": _conv,
    "Gather": _gather,
    "Pad": _pad,
    "PRelu": _prelu,
    "ReduceMean": _mean,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
