"""Where do two forms of a network part? Every tensor in between is compared, not the logits alone.

The fp32 ONNX file, run node by node without an optimizer, is the reference of the other typed
files; a typed file is the reference of the OpenVINO engine made from it; PyTorch is that of the
fp32 file, by stages (stem, stages.i, final, head). A node's error has two parts:

    own error        the node reads the reference's tensors, so that what it adds is its own
    relative error   the node reads what the network before it gives: the errors of all before it

The own error names a culprit even where 8-bit rounding of the layers before it is as large. The
constants that a node reads are compared too, each 8-bit weight as what it stands for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, LitezooError, UsageError, first_line, require

from .artifact import Artifact, Engine, check_hashes, read_artifact, read_expected
from .compare import snr_db
from .parity import TOLERANCE
from .qdq_lint import DEQUANTIZE, QUANTIZE, GraphIndex
from .runtime import Array
from .to_half import emulate_bf16

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from torch import nn

__all__ = [
    "Compared",
    "DeepReport",
    "NodeError",
    "compare_nodes",
    "compare_openvino",
    "compare_stages",
    "deep_verify",
    "first_parting",
]

#: Largest own error of a node: several times what its rounding can do. For int8, values beyond
#: the calibrated range count, of which images other than the calibration's have some.
OWN_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2, "int8": 0.35}
#: Largest error of a constant: float16's or bfloat16's rounding; half a step of 1/127 (of 1/63 with
#: 7 bits).
CONSTANT_TOLERANCE = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 4e-3, "int8": 0.0085}
#: Largest own error of an engine's node, the typed file's 8-bit values being the reference: those
#: next to the middle of a step go up instead of down.
ENGINE_TOLERANCE = {
    "fp32": 1e-4,
    "fp16": 1e-2,
    "bf16": 3e-2,
    "int8": 2e-2,
    "int8+bf16": 3e-2,
    "int8-mixed": 2e-2,
    "int8-mixed+bf16": 3e-2,
}
_ALONE = "alone/"
#: Files that carry no ONNX names.
_NO_NAMES = "keeps no names of ONNX tensors; only its logits can be compared: litezoo verify"

#: Values by tensor, of one image.
_Values = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class NodeError:
    """How far one tensor of a network is from the reference's, on the same images.

    `stage`, `node` and `op` say which node of the reference makes the tensor, or reads it where
    the tensor `is_constant`. Errors are max |difference| / max |reference|, `snr_db` is over all
    values; `own_error` is None where the node could not be run alone.
    """

    stage: str
    node: str
    op: str
    tensor: str
    relative_error: float
    snr_db: float
    own_error: float | None = None
    is_constant: bool = False

    def __str__(self) -> str:
        what = f"its constant {self.tensor}" if self.is_constant else self.tensor
        own = "" if self.own_error is None else f", {self.own_error:.1e} by itself"
        return (
            f"stage {self.stage}, node {self.node} ({self.op}), {what}: off by "
            f"{self.relative_error:.1e} (relative{own}), SNR {self.snr_db:.0f} dB"
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One form against its reference: the first node where they part (None: nowhere), all rows."""

    stage: str
    reference: str
    precision: str
    rows: tuple[NodeError, ...]
    parting: NodeError | None

    def __str__(self) -> str:
        where = "nowhere" if self.parting is None else f"first at {self.parting}"
        return f"{self.stage} parts from {self.reference} {where} ({len(self.rows)} compared)"


@dataclass(frozen=True, kw_only=True)
class DeepReport:
    """What was compared, and what could not be, with the reason."""

    compared: tuple[Compared, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def parting(self) -> Compared | None:
        """The first comparison that parts; later ones may start from its error."""
        return next((entry for entry in self.compared if entry.parting is not None), None)


@dataclass
class _Sums:
    """What two tensors' difference is over all images."""

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    difference: float = 0.0

    def add(self, got: NDArray[Any], want: NDArray[Any]) -> None:
        if got.shape != want.shape:
            raise CheckFailed(f"shapes {got.shape} and {want.shape} of one tensor differ")
        exact = want.astype(np.float64)
        wrong = got.astype(np.float64) - exact
        self.signal += float(np.sum(exact**2))
        self.noise += float(np.sum(wrong**2))
        self.largest = max(self.largest, float(np.abs(exact).max(initial=0.0)))
        # np.max keeps a NaN, builtin max would drop it
        self.difference = float(np.max([self.difference, np.abs(wrong).max(initial=0.0)]))

    @property
    def relative(self) -> float:
        if not math.isfinite(self.difference):
            return math.inf
        return self.difference / max(self.largest, float(np.finfo(np.float32).tiny))

    @property
    def snr(self) -> float:
        return snr_db(self.signal, self.noise)


def first_parting(
    rows: Sequence[NodeError],
    tolerance: float,
    *,
    own_tolerance: float | None = None,
    constant_tolerance: float | None = None,
) -> NodeError | None:
    """Return the first row whose error is beyond what its precision explains, None if all fit.

    Each node counts by its own error where there is one, else by the error it ends with. Where all
    these fit but the last row is beyond `tolerance`, small errors have added up: then it is the
    first node beyond `tolerance`. Both other bounds default to `tolerance`.
    """
    own_tolerance = tolerance if own_tolerance is None else own_tolerance
    constant_tolerance = tolerance if constant_tolerance is None else constant_tolerance
    for row in rows:
        error, bound = row.relative_error, constant_tolerance if row.is_constant else tolerance
        if row.own_error is not None:
            error, bound = row.own_error, own_tolerance
        if not error <= bound:
            return row
    if rows and not rows[-1].relative_error <= tolerance:
        return next(row for row in rows if not row.relative_error <= tolerance)
    return None


def compare_nodes(reference: ModelProto, other: ModelProto, images: Array) -> tuple[NodeError, ...]:
    """Compare every float tensor of two ONNX models with the same node and tensor names.

    `images` is (N, C, H, W); they run one by one, which bounds what is kept to the tensors of one.
    Rows are in the reference's order; tensors that the other model has not (an activation that was
    fused away) are left out. UsageError where no tensor is in both.
    """
    if images.ndim != 4 or not len(images):
        raise UsageError(f"images have shape {images.shape}; give (N, C, H, W), N of 1 or more")
    typed, other = other, emulate_bf16(other)
    wanted, offered = _float_tensors(reference), _float_tensors(other)
    seen = _observed(reference.graph, other.graph, wanted.keys() & offered.keys())
    if not seen:
        raise UsageError(
            "the two ONNX files have no tensor in common; give the file that the other was made of"
        )
    run_reference = _runner(_showing(reference, list(seen)))
    run_other = _runner(_showing(other, list(seen.values())))
    alone, inputs = _cut(other, seen, _float_tensors(other))
    run_alone = _runner(alone)
    all_errors = {name: _Sums() for name in seen}
    own_errors = {name: _Sums() for name in seen}
    entry, other_entry = reference.graph.input[0].name, other.graph.input[0].name
    for index in range(len(images)):
        image = images[index : index + 1]
        want = run_reference({entry: image})
        fed = {name: want[name].astype(kind) for name, kind in inputs.items()}
        got = run_other({other_entry: image})
        own = run_alone({other_entry: image, **fed})
        for name, place in seen.items():
            all_errors[name].add(got[place], want[name])
            own_errors[name].add(own[_ALONE + place], want[name])
    return tuple(_rows(reference, all_errors, own_errors, typed))


def compare_openvino(
    reference: ModelProto, model_file: Path, images: Array, *, precision: str
) -> tuple[NodeError, ...]:
    """Compare the tensors of an .xml, run on this CPU, with those of the ONNX model it is from.

    `precision` is the engine's: its hint is set as when the engine is loaded. Tensors that
    OpenVINO's conversion fused away are left out; those shown are written in full precision, but
    what stands between them is fused as little as it needs for that.
    """
    require("openvino", purpose="comparing an OpenVINO engine", extra="cpu")
    from .runtime_openvino import one_core

    wanted = _float_tensors(reference)
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision.endswith("bf16") else "f32"}
    try:
        run_all, run_alone = (
            make(one_core(), model_file, wanted.keys(), hint)
            for make in (_show_openvino, _cut_openvino)
        )
    except LitezooError:
        raise
    except Exception as error:
        raise CheckFailed(f"openvino refuses {model_file}: {first_line(error)}") from error
    run_reference = _runner(_showing(reference, list(wanted)))
    entry = reference.graph.input[0].name
    errors: dict[str, _Sums] = {}
    own: dict[str, _Sums] = {}
    for index in range(len(images)):
        image = np.ascontiguousarray(images[index : index + 1])
        want = {**run_reference({entry: image}), entry: image}
        for sums, run in ((errors, run_all), (own, run_alone)):
            for name, got in run(want).items():
                sums.setdefault(name, _Sums()).add(got, want[name])
    return tuple(_rows(reference, errors, own, None))


def _named(model: Any, wanted: Collection[str]) -> dict[str, Any]:
    """Return the outputs of an OpenVINO model's operations that are these ONNX tensors."""
    found: dict[str, Any] = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in ("Constant", "Parameter", "Result"):
            continue
        for output in operation.outputs():
            names = sorted(wanted & output.get_names())
            if names:  # several where an operation in between was dropped
                found[names[0]] = output
    if not found:
        raise UsageError("the OpenVINO engine has no tensor of the ONNX file it is said to be from")
    return found


def _show_openvino(
    core: Any, file: Path, wanted: Collection[str], hint: Mapping[str, str]
) -> Callable[[_Values], dict[str, NDArray[Any]]]:
    """Return the network as a function from its input, among others, to all its tensors."""
    model = core.read_model(file)
    names = list(_named(model, wanted))
    shown = {name for output in model.outputs for name in output.get_names()}
    model.add_outputs([name for name in names if name not in shown])
    entry = model.inputs[0].get_any_name()
    request = core.compile_model(model, "CPU", dict(hint)).create_infer_request()

    def run(values: _Values) -> dict[str, NDArray[Any]]:
        request.infer({0: values[entry]})
        return {name: np.array(request.get_tensor(name).data) for name in names}

    return run


def _cut_openvino(
    core: Any, file: Path, wanted: Collection[str], hint: Mapping[str, str]
) -> Callable[[_Values], dict[str, NDArray[Any]]]:
    """Return all nodes, each by itself, as a function from the reference's tensors to theirs."""
    import openvino

    model = core.read_model(file)
    entry = model.inputs[0].get_any_name()
    parameters, fed = list(model.get_parameters()), [entry]
    named = _named(model, wanted)
    for name, output in named.items():
        readers = [
            r for r in output.get_target_inputs() if r.get_node().get_type_name() != "Result"
        ]
        if readers:
            parameter = openvino.opset13.parameter(
                output.get_partial_shape(), output.get_element_type()
            )
            for reader in readers:
                reader.replace_source_output(parameter.output(0))
            parameters.append(parameter)
            fed.append(name)
    results = [openvino.opset13.result(output) for output in named.values()]
    cut = openvino.Model(results, parameters, "alone")
    request = core.compile_model(cut, "CPU", dict(hint)).create_infer_request()
    kinds = [parameter.get_element_type().to_dtype() for parameter in parameters]

    def run(values: _Values) -> dict[str, NDArray[Any]]:
        request.infer(
            {
                i: values[name].astype(kind)
                for i, (name, kind) in enumerate(zip(fed, kinds, strict=True))
            }
        )
        return {name: np.array(request.get_output_tensor(i).data) for i, name in enumerate(named)}

    return run


def compare_stages(
    module: nn.Module, reference: ModelProto, images: Array
) -> tuple[NodeError, ...]:
    """Compare the stages of a network in PyTorch (deploy form, eval mode) with its ONNX file's.

    PyTorch is right here. The row of a stage names the last node of it; stages without a node of
    their own (an identity) are left out.
    """
    import torch

    stages = stages_of(reference)
    graph = reference.graph
    floats = _float_tensors(reference)
    last: dict[str, tuple[str, NodeProto]] = {}
    for node in graph.node:
        if node.output[0] in floats:
            last[stages[node.output[0]]] = node.output[0], node
    kept: dict[str, NDArray[Any]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: kept.update({name: output.numpy()})

    names = {name for name, _ in module.named_modules()}
    hooks = [
        module.get_submodule(name).register_forward_hook(keep(name))
        for name in last
        if name in names
    ]
    run = _runner(_showing(reference, [tensor for tensor, _ in last.values()]))
    sums = {name: _Sums() for name in last if name in names}
    try:
        for index in range(len(images)):
            image = images[index : index + 1]
            with torch.inference_mode():
                module(torch.from_numpy(image))
            got = run({graph.input[0].name: image})
            for name, sum_ in sums.items():
                sum_.add(got[last[name][0]], kept[name])
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(
        NodeError(
            stage=name, node=_name(last[name][1]), op=last[name][1].op_type, tensor=last[name][0],
            relative_error=sum_.relative, snr_db=sum_.snr,
        )
        for name, sum_ in sums.items()
    )  # fmt: skip


def stages_of(model: ModelProto) -> dict[str, str]:
    """Return the stage (stem, stages.0, ..., final, head) of every node's first output.

    A node that reads weights is of the stage they are named after; any other of the latest stage
    it reads from; what follows the last pool before the head's weights, and that pool, is the head.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    order: list[str] = ["input"]
    found: dict[str, str] = {}
    for node in graph.node:
        own = [_stage_name(name) for name in node.input if name in weights and "." in name]
        read = [found[name] for name in node.input if name in found]
        stage = own[0] if own else max(read, key=order.index, default=order[-1])
        if stage not in order:
            order.append(stage)
        found.update((name, stage) for name in node.output)
    index = GraphIndex(graph)
    ends = [name for name in (output.name for output in graph.output) if name in index.producers]
    _widen_head(index, found, ends)
    return found


def _widen_head(index: GraphIndex, found: dict[str, str], ends: list[str]) -> None:
    """Give the global pool that the head starts with, and all behind it, to the head."""
    pooled = index.pooled()
    waiting, done = list(ends), set[str]()
    while waiting:  # back from the logits while everything is pooled
        name = waiting.pop()
        if name in done or name not in pooled:
            continue
        done.add(name)
        found[name] = "head"
        waiting += index.data_inputs(index.producers[name])


def _stage_name(weight: str) -> str:
    parts = weight.split(".")
    return ".".join(parts[:2]) if parts[0] == "stages" else parts[0]


def _name(node: NodeProto) -> str:
    return node.name or node.output[0]


def _float_tensors(model: ModelProto) -> dict[str, type[np.generic]]:
    """Return the float tensors that a model computes from its input, with their type."""
    from onnx import TensorProto, shape_inference

    kinds: dict[int, type[np.generic]] = {
        TensorProto.FLOAT: np.float32,
        TensorProto.FLOAT16: np.float16,
    }
    graph = shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)
    }
    computed = _computed(model.graph)
    return {
        name: kinds[types[name]]
        for node in model.graph.node
        for name in node.output
        if name in computed and types.get(name) in kinds
    }


def _computed(graph: GraphProto) -> set[str]:
    """Return what depends on the network's input."""
    weights = {tensor.name for tensor in graph.initializer}
    found = {entry.name for entry in graph.input} - weights
    for node in graph.node:
        if found.intersection(node.input):
            found.update(node.output)
    return found


def _observed(reference: GraphProto, other: GraphProto, common: set[str]) -> dict[str, str]:
    """Return, by tensor of the reference, which of the other's holds the same value.

    That is the one of the same name, but where ONNX Runtime's quantizer left an activation to the
    clipping of the pair behind it: there it is what the pair gives.
    """
    index = GraphIndex(other)
    makes = {name: node.op_type for node in reference.node for name in node.output}
    seen = {}
    for node in reference.node:
        for name in node.output:
            if name not in common:
                continue
            maker = index.producers[name].op_type
            if maker in (makes[name], "Cast"):
                seen[name] = name
                continue
            ends = [
                end.output[0]
                for pair in index.readers[name]
                if pair.op_type == QUANTIZE
                for end in index.readers[pair.output[0]]
                if end.op_type == DEQUANTIZE
            ]
            if ends:
                seen[name] = ends[0]
    return seen


def _showing(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return a copy whose outputs are these tensors."""
    from onnx import ValueInfoProto

    copy = type(model)()
    copy.CopyFrom(model)
    copy.graph.ClearField("output")
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)  # types are inferred
    return copy


def _cut(
    other: ModelProto, seen: Mapping[str, str], kinds: Mapping[str, type[np.generic]]
) -> tuple[ModelProto, dict[str, type[np.generic]]]:
    """Return the model with all its nodes apart, each between tensors that are compared.

    A compared tensor is an input under the reference's name, in the type of `kinds`, and its node's
    result an output, `alone/<name>`.
    """
    from onnx import helper

    copy = _showing(other, [_ALONE + place for place in seen.values()])
    graph = copy.graph
    given = {place: name for name, place in seen.items()}
    read: dict[str, type[np.generic]] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in given:
                node.input[i] = given[name]
                read[given[name]] = kinds[name]
        node.output[:] = [_ALONE + name if name in given else name for name in node.output]
    made = {name for node in graph.node for name in node.output}
    clash = {name for name in read if name in made}
    for node in graph.node:  # an activation that was fused away: its pair reads the node's own
        node.output[:] = [f"own/{name}" if name in clash else name for name in node.output]
    for node in graph.node:
        if node.op_type == QUANTIZE and node.input[0] in clash:
            node.input[0] = f"own/{node.input[0]}"
    for name, kind in read.items():
        elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        graph.input.append(helper.make_tensor_value_info(name, elem_type, None))
    return copy, read


def _runner(model: ModelProto) -> Callable[[_Values], dict[str, NDArray[Any]]]:
    """Return a model as a function from inputs to outputs by name, run as it is written."""
    runtime = require("onnxruntime", purpose="comparing nodes", extra="export")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise CheckFailed(f"onnxruntime refuses the ONNX file: {first_line(error)}") from error
    model.Clear()  # the session has its own copy
    names = [output.name for output in session.get_outputs()]
    halves = {entry.name for entry in session.get_inputs() if entry.type == "tensor(float16)"}

    def run(inputs: _Values) -> dict[str, NDArray[Any]]:
        given = {n: v.astype(np.float16) if n in halves else v for n, v in inputs.items()}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _rows(
    reference: ModelProto,
    errors: Mapping[str, _Sums],
    own: Mapping[str, _Sums],
    other: ModelProto | None,
) -> Iterator[NodeError]:
    """Yield the rows in the reference's order: a node's constants, then what it makes."""
    stages = stages_of(reference)
    constants = {} if other is None else _constants(other)
    mine = _constants(reference)
    for node in reference.graph.node:
        row = NodeError(
            stage=stages[node.output[0]], node=_name(node), op=node.op_type, tensor="",
            relative_error=0.0, snr_db=math.inf,
        )  # fmt: skip
        theirs = constants.get((_name(node), node.op_type), {})
        for place, (name, want) in mine.get((_name(node), node.op_type), {}).items():
            if place in theirs:
                sums = _Sums()
                sums.add(theirs[place][1], want)
                yield dataclasses.replace(
                    row, tensor=name, relative_error=sums.relative, snr_db=sums.snr,
                    is_constant=True,
                )  # fmt: skip
        for name in node.output:
            if name in errors:
                yield dataclasses.replace(
                    row, tensor=name, relative_error=errors[name].relative,
                    snr_db=errors[name].snr,
                    own_error=own[name].relative if name in own else None,
                )  # fmt: skip


def _constants(
    model: ModelProto,
) -> dict[tuple[str, str], dict[int, tuple[str, NDArray[Any]]]]:
    """Return the float constants that nodes read, by (node, operator) and place.

    8-bit ones count as what their DequantizeLinear gives.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    quantized = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == DEQUANTIZE and all(name in tensors for name in node.input)
    }
    found: dict[tuple[str, str], dict[int, tuple[str, NDArray[Any]]]] = {}
    for node in model.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        for place, name in enumerate(node.input):
            if name in quantized:
                value = _dequantize(
                    quantized[name],
                    [numpy_helper.to_array(tensors[part]) for part in quantized[name].input],
                )
            elif name in tensors:
                value = numpy_helper.to_array(tensors[name])
            else:
                continue
            if np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16":
                found.setdefault((_name(node), node.op_type), {})[place] = name, value
    return found


def _dequantize(node: NodeProto, parts: list[NDArray[Any]]) -> NDArray[np.float64]:
    """Return (integers - zero point) * scale; per channel along the node's axis."""
    integers, scale = parts[0].astype(np.float64), parts[1].astype(np.float64)
    zero = parts[2].astype(np.float64) if len(parts) > 2 else np.zeros_like(scale)
    if scale.ndim:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % integers.ndim
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    difference: NDArray[np.float64] = (integers - zero) * scale
    return difference


# ------------------------------------------------------------------------------- artifacts


def deep_verify(folder: Path, *, module: nn.Module | None = None, most: int = 4) -> DeepReport:
    """Compare whatever of an artifact can be, tensor by tensor, and say what cannot and why.

    Args:
        folder: of the artifact.
        module: its network in PyTorch (deploy form, eval mode), if the caller has it; else the
            checkpoint that the manifest names is read, where it is still there and the same.
        most: how many of the artifact's images are compared.

    Raises CheckFailed where a file was changed, UsageError where the folder is no artifact.
    """
    onnx = require("onnx", purpose="comparing nodes", extra="export")
    artifact = read_artifact(folder)
    check_hashes(folder, artifact)
    images, expected = read_expected(folder)
    images = images[:most]
    compared: list[Compared] = []
    skipped: dict[str, str] = {}

    def note(
        stage: str, against: str, precision: str, rows: tuple[NodeError, ...], own: float
    ) -> None:
        parting = first_parting(
            rows, TOLERANCE[precision], own_tolerance=own,
            constant_tolerance=CONSTANT_TOLERANCE[_base(precision)],
        )  # fmt: skip
        compared.append(
            Compared(stage=stage, reference=against, precision=precision, rows=rows,
                     parting=parting)
        )  # fmt: skip

    protos = {form: onnx.load(folder / file) for form, file in artifact.onnx.items()}
    if "fp32" not in protos:
        lacking = "the artifact has no fp32 ONNX file to compare with; export with --precision auto"
        skipped["pytorch"] = lacking
        skipped.update((f"onnx {form}", lacking) for form in protos)
    else:
        try:
            network = module or _module(artifact)
            _check_same(network, images, expected[: len(images)])
            rows = compare_stages(network, protos["fp32"], images)
            note("onnx fp32", "PyTorch", "fp32", rows, OWN_TOLERANCE["fp32"])
        except (LitezooError, OSError) as error:
            skipped["pytorch"] = first_line(error)
        for form, proto in protos.items():
            if form != "fp32":
                precision = form.replace("int8-fp16", "int8+fp16").replace("int8-bf16", "int8+bf16")
                precision = "int8" if precision.startswith("int8-") else precision
                note(f"onnx {form}", "onnx fp32", precision,
                     compare_nodes(protos["fp32"], proto, images),
                     OWN_TOLERANCE[_base(precision)])  # fmt: skip
    for engine in artifact.engines:
        _compare_engine(folder, engine, protos, images, note, skipped)
    return DeepReport(compared=tuple(compared), skipped=skipped)


def _base(precision: str) -> str:
    """Return the precision whose rounding decides how far a single node may be off."""
    return "int8" if precision.startswith("int8") else precision


def _compare_engine(
    folder: Path,
    engine: Engine,
    protos: Mapping[str, ModelProto],
    images: Array,
    note: Callable[[str, str, str, tuple[NodeError, ...], float], None],
    skipped: dict[str, str],
) -> None:
    """Compare an engine with the ONNX file it was made from."""
    from .runtime_openvino import RUNTIME as openvino

    files = [folder / name for name in engine.files]
    if engine.runtime == "onnxruntime":
        skipped[engine.label] = f"it runs {files[0].name} itself, which was compared as ONNX"
        return
    if engine.runtime != openvino.name:
        skipped[engine.label] = f"{engine.runtime} {_NO_NAMES}"
        return
    form = openvino.precisions[engine.precision]
    if form is None or form not in protos:
        skipped[engine.label] = f"the artifact has no {form} ONNX file, which it was made from"
        return
    try:
        rows = compare_openvino(
            protos[form], next(f for f in files if f.suffix == ".xml"), images,
            precision=engine.precision,
        )  # fmt: skip
    except LitezooError as error:
        skipped[engine.label] = first_line(error)
        return
    note(engine.label, f"onnx {form}", engine.precision, rows, ENGINE_TOLERANCE[engine.precision])


def _module(artifact: Artifact) -> nn.Module:
    """Return the network again in PyTorch, as it was exported; MissingError where it is gone."""
    from litezoo.models.create import create_model
    from litezoo.models.fuse import fuse, graph_form
    from litezoo.models.weights import read_checkpoint

    file = Path(artifact.weights)
    if not file.suffix or not file.is_file():
        raise UsageError(
            f"the weights {artifact.weights!r} are no file here; compare with PyTorch where the "
            "checkpoint is"
        )
    if read_checkpoint(file).sha256 != artifact.weights_sha256:
        raise UsageError(f"{file} is not the checkpoint that was exported (sha256 differs)")
    network = create_model(artifact.model, weights=file).eval()
    return fuse(network).eval() if graph_form(network) == "train" else network


def _check_same(network: nn.Module, images: Array, expected: Array) -> None:
    """Refuse a module that is not the network of the artifact."""
    import torch

    with torch.inference_mode():
        got = network(torch.from_numpy(images)).numpy()
    sums = _Sums()
    sums.add(got, expected)
    if not sums.relative <= TOLERANCE["fp32"]:
        raise UsageError(
            f"the module given is not the network of the artifact: its logits are off by "
            f"{sums.relative:.1e}; give the deploy form in eval mode"
        )
