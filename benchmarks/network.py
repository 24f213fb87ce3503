"""A network as the operators that it runs, for one image. No torch.

`benchmarks.tracing` makes networks of modules, ONNX files and names; the file networks.json has
those of the zoo, made beforehand. `benchmarks.kernels` says what a runtime makes of the operators.
All counts are elements for one image, but weights, which a batch reads once.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from litezoo.models.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from .graph import Kind

__all__ = [
    "ConvShape",
    "GraphForm",
    "Network",
    "Op",
    "OpKind",
    "Window",
    "catalogue_network",
    "list_networks",
    "scale",
    "write_networks",
]

#: What an operator does. "mul" is any arithmetic of two tensors but adding, "activation" any of
#: one; "view" takes a part of a tensor or turns its axes, "copy" pads, gathers or lays it out anew.
OpKind = Literal[
    "conv", "matmul", "norm", "activation", "add", "mul", "pool", "reduce", "concat", "copy",
    "resize", "softmax", "view", "other",
]  # fmt: skip
GraphForm = Literal["train", "deploy"]

#: Operators with multiply-accumulates.
WEIGHTED: frozenset[OpKind] = frozenset(("conv", "matmul"))
#: Operators that need more of their input than the element in the place of the result.
_POOLS: frozenset[OpKind] = frozenset(("norm", "pool", "reduce", "softmax"))
#: The name of the copy that a library makes of some channels of a map, where images are several.
PART = "contiguous"
_POINTWISE: frozenset[OpKind] = frozenset(("activation", "add", "mul"))
_FILE = "networks.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """How a window moves over a map, each (height, width); padding is that of both sides."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def slide(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Return the sides of the result for a map of these sides.

        >>> Window(kernel=(3, 3), stride=(2, 2), padding=(2, 2)).slide((224, 224))
        (112, 112)
        """
        return self._slide(0, sides[0]), self._slide(1, sides[1])

    def _slide(self, axis: int, side: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        room, stride = side + self.padding[axis] - reach, self.stride[axis]
        if not self.ceil_mode:
            return room // stride + 1
        steps = -(-room // stride)
        if steps * stride >= side + self.padding[axis] // 2:  # begins behind the map: left out
            steps -= 1
        return steps + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvShape:
    """One convolution; `kernel`, `stride` and `out` are (height, width), of 1-d ones (1, width)."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    out: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    transposed: bool = False

    @property
    def kind(self) -> Kind:
        """The class of convolution, by `benchmarks.graph.KINDS`."""
        if self.groups > 1:
            return "depthwise" if self.groups == self.in_channels else "grouped"
        return "pointwise" if math.prod(self.kernel) == 1 else "conv"

    @property
    def window(self) -> Window:
        """How it moves."""
        return Window(
            kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operator, as PyTorch or an ONNX file names it; counts are elements of one image.

    `inputs` are places of the operators whose values it reads, -1 the image, and `reads` how much
    of each; weights are in `weight_elements`, and so is all of an operator on weights alone
    (`inputs` is empty then). `out_shape` has no batch. `bias_elements` are among the weights.
    `sensitive` operators run in float32 under autocast.
    """

    kind: OpKind
    name: str
    module: str = ""
    inputs: tuple[int, ...]
    reads: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_elements: int
    weight_elements: int = 0
    bias_elements: int = 0
    macs: int = 0
    conv: ConvShape | None = None
    window: Window | None = None
    sensitive: bool = False

    @property
    def in_elements(self) -> int:
        """Elements that it reads of what others made."""
        return sum(self.reads)

    @property
    def is_pointwise(self) -> bool:
        """Whether each element of the result needs one of each input: eval BatchNorm too."""
        return self.kind in _POINTWISE or (self.kind == "norm" and not self.sensitive)

    @property
    def kernel_kind(self) -> Kind:
        """What a kernel that begins with it is."""
        if self.conv is not None:
            return self.conv.kind
        if self.kind == "matmul":
            return "matmul"
        if self.is_pointwise:
            return "elementwise"
        return "pool" if self.kind in _POOLS else "move"


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Operators in an order they can run in, for one image of `resolution` (C, H, W).

    `outputs` are the places of the operators whose values are the result. `params` counts what is
    learned, once.
    """

    name: str
    resolution: tuple[int, int, int]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    params: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and matrix products."""
        return sum(op.macs for op in self.ops)

    @property
    def activations(self) -> int:
        """Elements that convolutions and matrix products write (arXiv 2003.13678)."""
        return sum(op.out_elements for op in self.ops if op.kind in WEIGHTED)

    @property
    def weight_elements(self) -> int:
        """Elements of weights that a forward pass reads."""
        return sum(op.weight_elements for op in self.ops)

    def to_json(self) -> str:
        """Return the network as compact text that `from_json` reads."""
        writer = _Writer()
        values = {
            "name": self.name,
            "resolution": self.resolution,
            "params": self.params,
            "outputs": self.outputs,
            "ops": writer.write(self.ops),
            **writer.tables(),
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Network:
        """Rebuild from `to_json`'s text; anything else is a UsageError."""
        try:
            values = json.loads(text)
            return cls(
                name=str(values["name"]),
                resolution=_triple(values["resolution"]),
                params=int(values["params"]),
                outputs=tuple(values["outputs"]),
                ops=_Reader(values).read(values["ops"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UsageError(
                f"this is no network that litezoo wrote ({type(error).__name__}: {error}); write "
                "it with Network.to_json"
            ) from error


# ------------------------------------------------------------------- another resolution


def scale(network: Network, resolution: tuple[int, int, int]) -> Network:
    """Return the network for images of another size (C, H, W), worked out without running it.

    Maps follow the windows of convolutions and pools, 'same' padding and resizing. It is what
    `trace` finds where each map's sides keep their part in each other; networks that view a map as
    tiles, or have weights for each position, are only near. UsageError for another number of
    channels, and for images that are too small.
    """
    if resolution[0] != network.resolution[0]:
        raise UsageError(
            f"{network.name} takes {network.resolution[0]} channels, not {resolution[0]}; only "
            "the sides of an image can be others"
        )
    if resolution == network.resolution:
        return network
    scaling = _Scaling(network, resolution)
    ops = tuple(scaling.scaled(index) for index in range(len(network.ops)))
    return dataclasses.replace(network, ops=ops, resolution=resolution)


Sides = tuple[int, int]
#: Operators whose result can be a map with rows and columns left out.
_PARTS: frozenset[OpKind] = frozenset(("view", "copy", "other"))


class _Scaling:
    """The sides of every map before and after, as far as known in the order of operators."""

    def __init__(self, network: Network, resolution: tuple[int, int, int]) -> None:
        self.network = network
        self.ops = network.ops
        self.image = math.prod(network.resolution), math.prod(resolution)
        #: Of the image and each operator its map's sides before and after; None where it has none.
        self.sides: dict[int, tuple[Sides, Sides] | None] = {
            -1: (network.resolution[1:], resolution[1:])
        }
        self.sizes: dict[int, tuple[int, int]] = {-1: self.image}
        self.shapes = {-1: network.resolution, **{i: op.out_shape for i, op in enumerate(self.ops)}}
        self.readers: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for one in op.inputs:
                self.readers.setdefault(one, []).append(index)

    def scaled(self, index: int) -> Op:
        """Return an operator at the new size; those before it were asked for first."""
        op = self.ops[index]
        before, after = self._sides(op, index)
        if min(after) < 1:
            raise UsageError(
                f"{self.network.name} needs larger images: nothing is left of the map at "
                f"{op.module or op.name}"
            )
        of_map = any(before in _pairs(self.shapes[one]) for one in op.inputs)
        in_order = op.conv is None and not (op.kind == "reduce" and of_map)
        shape = self._shape(op.out_shape, before, after, in_order=in_order)
        elements = self._ratio(op.out_elements, math.prod(op.out_shape), math.prod(shape))
        has_map = shape != op.out_shape or before in _pairs(op.out_shape)
        self.sides[index] = (before, after) if has_map else None
        self.sizes[index] = (op.out_elements, elements)
        reads = tuple(
            self._ratio(count, *self.sizes[one])
            for one, count in zip(op.inputs, op.reads, strict=True)
        )
        conv = op.conv
        if conv is not None and conv.out == before:
            conv = dataclasses.replace(conv, out=after)
        return dataclasses.replace(
            op,
            out_shape=shape,
            out_elements=elements,
            reads=reads,
            macs=self._macs(op, elements, reads),
            conv=conv,
        )

    def _macs(self, op: Op, elements: int, reads: tuple[int, ...]) -> int:
        if not op.macs:
            return 0
        if op.conv is not None:
            if op.conv.transposed:
                return self._ratio(op.macs, op.reads[0], reads[0])
            return self._ratio(op.macs, op.out_elements, elements)
        depth = op.macs // max(1, op.out_elements)
        source = self.sides[op.inputs[0]] if op.inputs else None
        positions = math.prod(source[0]) if source is not None else 0
        if source is not None and not op.weight_elements and depth in (positions, 2 * positions):
            depth = depth // positions * math.prod(source[1])  # over positions: attention
        return depth * elements

    @staticmethod
    def _ratio(count: int, before: int, after: int) -> int:
        return round(count * after / before) if before else count

    def _sides(self, op: Op, index: int) -> tuple[Sides, Sides]:
        """Return the sides of an operator's map before and after."""
        known = [sides for one in op.inputs if (sides := self.sides[one]) is not None]
        if not known:
            return (1, 1), (1, 1)
        old, new = known[0] if op.conv else max(known, key=lambda pair: math.prod(pair[0]))
        window = op.conv.window if op.conv is not None else op.window
        pairs = _pairs(op.out_shape)
        if op.conv is None and not pairs:
            return old, new
        out = op.conv.out if op.conv is not None else old if old in pairs else pairs[-1]
        if window is not None and not (op.conv and op.conv.transposed):
            if window.slide(old) == out:
                return out, window.slide(new)
            return out, _proportional(out, old, new)
        if op.kind == "pool":
            return out, out  # adaptive: the same for every size
        if op.kind == "copy" and "pad" in op.name.lower():
            return out, self._padded(index, old, new, out)
        if op.kind == "resize":
            return out, self._resized(index, out) or _proportional(out, old, new)
        if op.conv is not None or (op.kind in _PARTS and _is_part(out, old)):
            return out, _proportional(out, old, new)
        return old, new

    def _resized(self, index: int, out: Sides) -> Sides | None:
        """Return the sides of the map that a resized one is combined with."""
        others = (one for reader in self.readers.get(index, ()) for one in self.ops[reader].inputs)
        for one in others:
            sides = self.sides.get(one)
            if one != index and sides is not None and sides[0] == out:
                return sides[1]
        return None

    def _padded(self, index: int, old: Sides, new: Sides, out: Sides) -> Sides:
        """Return the sides of a padded map: for a window that keeps what divides, or as before."""
        for reader in self.readers.get(index, ()):
            op = self.ops[reader]
            window = op.conv.window if op.conv is not None else op.window
            if window is not None and _same(window, old) == out:
                return _same(window, new)
        return new[0] + out[0] - old[0], new[1] + out[1] - old[1]

    def _shape(
        self, shape: tuple[int, ...], before: Sides, after: Sides, *, in_order: bool
    ) -> tuple[int, ...]:
        """Return a shape with the sides replaced, or positions that stand one after the other."""
        if before == after:
            return shape
        pairs = _pairs(shape)
        if before in pairs:
            place = len(pairs) - 1 - pairs[::-1].index(before)  # the last: (C, H, W)
            return (*shape[:place], *after, *shape[place + 2 :])
        old, new = math.prod(before), math.prod(after)
        if not in_order:
            return shape
        return tuple(new if size == old else size for size in shape)


def _pairs(shape: tuple[int, ...]) -> list[Sides]:
    return list(pairwise(shape))


def _is_part(out: Sides, old: Sides) -> bool:
    """Whether a map is one of another's with rows and columns left out, as many of both."""
    parts = out[0] / old[0], out[1] / old[1]
    return min(out) > 1 and max(parts) < 1 and math.isclose(*parts, rel_tol=0.1)


def _proportional(out: Sides, old: Sides, new: Sides) -> Sides:
    return (
        max(1, round(out[0] * new[0] / old[0])),
        max(1, round(out[1] * new[1] / old[1])),
    )


def _same(window: Window, sides: Sides) -> Sides:
    """Return the sides of a map that is padded so that a window gives ceil(side / stride)."""

    def padded(axis: int) -> int:
        stride = window.stride[axis]
        reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1
        return max(sides[axis], (-(-sides[axis] // stride) - 1) * stride + reach)

    return padded(0), padded(1)


# ------------------------------------------------------------------- networks.json

#: Of the numbers that describe an operator those that are not what its shape implies.
_Row = list[Any]


class _Writer:
    """Operators as tokens that refer to tables: of kinds and names, of rows, of modules.

    A token is the place of the operator's row; then, where it is not the operator before, ":" and
    how far back each input is; then, where it is not the next one, "@" and the place of its module.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.modules: dict[str, int] = {}

    def write(self, ops: Iterable[Op]) -> str:
        """Return the tokens of some operators, one space between."""
        tokens, module_before = [], -1
        for index, op in enumerate(ops):
            row = json.dumps(self._row(op), separators=(",", ":"))
            token = str(self.rows.setdefault(row, len(self.rows)))
            if op.inputs != (index - 1,):
                token += ":" + ",".join(str(index - one) for one in op.inputs)
            module = self.modules.setdefault(op.module, len(self.modules))
            if module != module_before + 1:
                token += f"@{module}"
            module_before = module
            tokens.append(token)
        return " ".join(tokens)

    def tables(self) -> dict[str, Any]:
        """Return the tables that the tokens written so far refer to."""
        return {
            "names": " ".join(self.names),
            "modules": _front_coded(self.modules),
            "rows": [json.loads(row) for row in self.rows],
        }

    def _row(self, op: Op) -> _Row:
        name = self.names.setdefault(f"{op.kind}.{op.name}", len(self.names))
        shape, size, weight, macs = _implied(op.conv, op.out_shape)
        values = [
            name,
            0 if shape == op.out_shape and op.conv is not None else list(op.out_shape),
            0 if op.reads == (size,) * len(op.inputs) else list(op.reads),
            op.weight_elements - op.bias_elements - weight,
            op.bias_elements,
            op.macs - macs,
            0 if op.conv is None else _numbers(op.conv),
            0 if op.window is None else _numbers(op.window),
            int(op.sensitive),
            op.out_elements - size,
        ]
        while values and values[-1] == 0:
            values.pop()
        return values


def _implied(
    conv: ConvShape | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int, int, int]:
    """Return the shape, elements, weights without bias and MACs that a convolution implies."""
    if conv is None:
        return shape, math.prod(shape), 0, 0
    shape = shape or (conv.out_channels, *conv.out)
    size = math.prod(shape)
    window = math.prod(conv.kernel)
    weight = conv.in_channels * conv.out_channels // conv.groups * window
    return shape, size, weight, size * conv.in_channels // conv.groups * window


#: Padding, dilation, and whether transposed or rounded up: what stands last, where it is not this.
_DEFAULTS = (0, 1, False)


def _numbers(shape: ConvShape | Window) -> list[Any]:
    """Return a window's numbers: of two equal sides one, and no defaults at the end."""
    numbers: list[Any] = []
    for value in dataclasses.astuple(shape):
        if isinstance(value, tuple):
            numbers.append(value[0] if value[0] == value[1] else list(value))
        else:
            numbers.append(value)
    least = len(numbers) - len(_DEFAULTS)
    while len(numbers) > least and numbers[-1] == _DEFAULTS[len(numbers) - least - 1]:
        numbers.pop()
    return numbers


def _with_defaults(numbers: Sequence[Any]) -> tuple[Any, Any, Any]:
    values = [*numbers, *_DEFAULTS[len(numbers) :]]
    return values[0], values[1], values[2]


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, list) else (value, value)


def _window(numbers: Sequence[Any]) -> Window:
    kernel, stride, *more = numbers
    padding, dilation, ceil_mode = _with_defaults(more)
    return Window(
        kernel=_pair(kernel),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        ceil_mode=bool(ceil_mode),
    )


def _conv(numbers: Sequence[Any]) -> ConvShape:
    inputs, outputs, groups, kernel, stride, out, *more = numbers
    padding, dilation, transposed = _with_defaults(more)
    return ConvShape(
        in_channels=inputs,
        out_channels=outputs,
        groups=groups,
        kernel=_pair(kernel),
        stride=_pair(stride),
        out=_pair(out),
        padding=_pair(padding),
        dilation=_pair(dilation),
        transposed=bool(transposed),
    )


class _Reader:
    """The inverse of `_Writer`."""

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self.names = [name.split(".", 1) for name in tables["names"].split(" ")]
        self.modules = _front_decoded(tables["modules"])
        self.coded: Sequence[_Row] = tables["rows"]
        self.decoded: dict[int, tuple[Any, ...]] = {}

    def _row(self, place: int) -> tuple[Any, ...]:
        """Return a row of the table, decoded once; a form needs about half of them."""
        if place not in self.decoded:
            self.decoded[place] = self._decode(self.coded[place])
        return self.decoded[place]

    def _decode(self, row: _Row) -> tuple[Any, ...]:
        row = [*row, *(0,) * (10 - len(row))]
        kind, name = self.names[row[0]]
        conv = _conv(row[6]) if row[6] else None
        shape, size, weight, macs = _implied(conv, tuple(row[1] or ()))
        elements = size + row[9]
        reads = tuple(row[2]) if row[2] else size
        window = _window(row[7]) if row[7] else None
        weights = row[3] + row[4] + weight
        return (
            kind, name, shape, reads, elements, weights, row[4], row[5] + macs, conv, window,
            bool(row[8]),
        )  # fmt: skip

    def read(self, tokens: str) -> tuple[Op, ...]:
        """Return the operators of some tokens."""
        ops: list[Op] = []
        module = -1
        for index, token in enumerate(tokens.split(" ") if tokens else ()):
            token, _, place = token.partition("@")
            module = int(place) if place else module + 1
            row, found, back = token.partition(":")
            kind, name, shape, reads, elements, weight, bias, macs, conv, window, sensitive = (
                self._row(int(row))
            )
            if found:
                inputs = tuple(index - int(one) for one in back.split(",")) if back else ()
            else:
                inputs = (index - 1,)
            ops.append(
                Op(
                    kind=kind,
                    name=name,
                    module=self.modules[module],
                    inputs=inputs,
                    reads=reads if isinstance(reads, tuple) else (reads,) * len(inputs),
                    out_shape=shape,
                    out_elements=elements,
                    weight_elements=weight,
                    bias_elements=bias,
                    macs=macs,
                    conv=conv,
                    window=window,
                    sensitive=sensitive,
                )
            )
        return tuple(ops)


def _front_coded(names: Iterable[str]) -> str:
    """Return names with the leading parts that each shares with the one before as a number."""
    coded, before = [], list[str]()
    for name in names:
        parts = name.split(".") if name else []
        same = 0
        while same < min(len(parts), len(before)) and parts[same] == before[same]:
            same += 1
        coded.append(f"{same}/{'.'.join(parts[same:])}")
        before = parts
    return " ".join(coded)


def _front_decoded(text: str) -> list[str]:
    names, before = [], list[str]()
    for coded in text.split(" ") if text else ():
        same, _, rest = coded.partition("/")
        before = [*before[: int(same)], *(rest.split(".") if rest else ())]
        names.append(".".join(before))
    return names


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = values
    return channels, height, width


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    """Read networks.json: {model: its forms and their tables}."""
    text = (importlib.resources.files("litezoo.benchmarks") / _FILE).read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return table


@cache
def _tables_of(name: str) -> _Reader:
    return _Reader(_table()[name])


def list_networks() -> list[str]:
    """Return the models whose operators are in networks.json, in the catalogue's order."""
    return list(_table())


@cache
def catalogue_network(name: str, graph_form: GraphForm = "deploy") -> Network:
    """Return a model of the zoo as operators, at its own resolution; needs no torch.

    UsageError for a name that is not in networks.json.

    >>> network = catalogue_network("repvgg_a0")
    >>> len(network.ops), network.macs, network.activations
    (46, 1361451008, 1794792)
    """
    if graph_form not in get_args(GraphForm):
        raise unknown_name("graph form", graph_form, get_args(GraphForm))
    if name not in _table():
        raise unknown_name("network", name, _table(), see="litezoo list")
    values = _table()[name]
    form = values[graph_form]
    return Network(
        name=name,
        resolution=_triple(values["resolution"]),
        params=form["params"],
        outputs=tuple(form["outputs"]),
        ops=_tables_of(name).read(form["ops"]),
    )


def write_networks(networks: Iterable[tuple[Network, Network]]) -> str:
    """Return the text of networks.json for pairs of (deploy form, train form): a line for each."""
    lines = []
    for deploy, train in networks:
        writer = _Writer()
        forms = {
            form: {"params": one.params, "outputs": one.outputs, "ops": writer.write(one.ops)}
            for form, one in (("deploy", deploy), ("train", train))
        }
        values = {"resolution": deploy.resolution, **forms, **writer.tables()}
        text = json.dumps(values, separators=(",", ":"))
        lines.append(f"{json.dumps(deploy.name)}:{text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
