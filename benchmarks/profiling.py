"""What a network costs, layer by layer, and what a device's ceilings make of it.

The network is the graph that export writes: a model of the zoo in deploy form (or train form), any
`nn.Module`, or an ONNX file as it is. Weights are random and never run for their values: a cost
depends on shapes, types and operators only. `benchmarks.graph` counts, `benchmarks.roofline` has
the times, `benchmarks.findings` the design rules.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from litezoo.models.catalogue import get_spec, resolve_name
from litezoo.models.errors import LitezooError, UsageError, first_line, require, unknown_name
from litezoo.recipes.devices import Device, get_device

from .findings import DesignFinding, LimitFinding, design_findings, read_limits
from .graph import KINDS, Layer, fix_input, read_costs
from .roofline import LayerTime, Roof, read_roof, why_no_times

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

__all__ = ["PRECISIONS", "KindTotals", "Profile", "Totals", "profile"]

#: What a network of the zoo can be profiled in; export's mixtures are found by measuring.
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8+fp16", "int8+bf16")
#: Layers whose output is an activation as RegNet's paper (arXiv 2003.13678) and fvcore count them.
_COUNTED = frozenset(("conv", "pointwise", "grouped", "depthwise", "matmul"))
#: Images that int8 is calibrated on: where Q/DQ pairs stand does not depend on them.
_CALIBRATION = 2


@dataclass(frozen=True, kw_only=True)
class KindTotals:
    """What the layers of one kind cost together; `ms` is None without times."""

    kernels: int
    macs: int
    memory_bytes: int
    ms: float | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """A whole graph's cost, as nodes or as fused kernels.

    `longest_path` is the number of kernels that have to wait for one another, `branches` the most
    that could run side by side.
    """

    kernels: int
    longest_path: int
    branches: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    by_kind: Mapping[str, KindTotals]

    @property
    def memory_bytes(self) -> int:
        """The memory access cost."""
        return self.weight_bytes + self.input_bytes + self.output_bytes

    @property
    def fragmentation(self) -> float:
        """Kernels for each one on the longest path: 1 is a chain, 2 are two equal branches."""
        return self.kernels / self.longest_path if self.longest_path else 1.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The cost of one network at one batch size, resolution (C, H, W) and precision.

    `activations` are the elements that convolutions and matrix products write, `layers` the fused
    kernels and `times` theirs, in the same order; `note` says what is missing for times, or that
    they are of another machine.
    `deploy` is the deploy form's profile beside a train form's.
    """

    model: str
    graph_form: str
    precision: str
    batch: int
    resolution: tuple[int, int, int]
    params: int
    macs: int
    activations: int
    unfused: Totals
    fused: Totals
    layers: tuple[Layer, ...]
    device: str | None
    roof: Roof | None
    times: tuple[LayerTime, ...]
    note: str
    findings: tuple[DesignFinding, ...]
    deploy: Profile | None = None

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate."""
        return 2 * self.macs

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that the fused kernels read and write."""
        return self.flops / self.fused.memory_bytes

    @property
    def ms(self) -> float | None:
        """The sum of the layers' least times, None without times."""
        return sum(time.ms for time in self.times) if self.times else None

    def share(self, kind: str) -> Mapping[str, float | None]:
        """Return the share of one kind of layer: of MACs, bytes (unfused and fused) and time."""
        own, before = self.fused.by_kind.get(kind), self.unfused.by_kind.get(kind)
        whole = self.ms
        return {
            "macs": own.macs / self.macs if own and self.macs else 0.0,
            "unfused_bytes": before.memory_bytes / self.unfused.memory_bytes if before else 0.0,
            "fused_bytes": own.memory_bytes / self.fused.memory_bytes if own else 0.0,
            "ms": None if whole is None else ((own.ms or 0.0) / whole if own else 0.0),
        }

    def most_expensive(self, count: int) -> tuple[int, ...]:
        """Return the places in `layers` of those with the longest times, else the most bytes."""
        cost: Sequence[float] = (
            [time.ms for time in self.times]
            if self.times
            else [layer.memory_bytes for layer in self.layers]
        )
        return tuple(sorted(range(len(self.layers)), key=lambda i: -cost[i])[:count])

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, derived ones too."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("layers", "times", "roof", "unfused", "fused", "deploy")
        }
        values |= {"flops": self.flops, "intensity": self.intensity, "ms": self.ms}
        values["findings"] = [dataclasses.asdict(finding) for finding in self.findings]
        values["shares"] = {kind: dict(self.share(kind)) for kind in KINDS}
        for key in ("unfused", "fused"):
            totals: Totals = getattr(self, key)
            values[key] = {
                **dataclasses.asdict(totals),
                "memory_bytes": totals.memory_bytes,
                "fragmentation": totals.fragmentation,
            }
        values["roof"] = dataclasses.asdict(self.roof) if self.roof else None
        values["layers"] = []
        for index, layer in enumerate(self.layers):
            more: dict[str, Any] = {
                "module": layer.module,
                "flops": layer.flops,
                "memory_bytes": layer.memory_bytes,
                "intensity": layer.intensity,
            }
            if self.times:
                time = self.times[index]
                more |= {**dataclasses.asdict(time), "ms": time.ms, "bound": time.bound}
            values["layers"].append({**dataclasses.asdict(layer), **more})
        values["deploy"] = self.deploy.to_dict() if self.deploy else None
        return values


def profile(
    model: str | Path | nn.Module,
    *,
    device: str | None = None,
    batch: int | None = None,
    resolution: int | None = None,
    precision: str | None = None,
    train_form: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Profile:
    """Count what a network costs, and with a device how long that takes at least.

    Args:
        model: a name of `list_models`, a path of an ONNX file, or a network (in any mode; it is
            left as it is).
        device: whose ceilings and limits count; a name of `list_devices`.
        batch: images at once; default 1, or what an ONNX file fixes.
        resolution: height and width; default the model's own, 224, or what an ONNX file fixes.
        precision: default the device's best, or fp32; of an ONNX file what it is in.
        train_form: of the network before fusing, with the deploy form's profile beside it.
        progress: is told each step.

    UsageError for unknown names, sizes and precisions that cannot be, and graphs that cannot be
    counted.
    """
    for words, size in (("batch", batch), ("resolution", resolution)):
        if size is not None and size < 1:
            raise UsageError(f"{words} is {size}; give 1 or more")
    target = None if device is None else get_device(device)
    require("onnx", purpose="profiling", extra="export")
    if isinstance(model, (str, Path)) and _is_file(model):
        if train_form:
            raise UsageError(
                f"{model} has one form, its own; --train-form is for models of the zoo"
            )
        return _profile_file(Path(model), target, batch, resolution, precision, progress)
    chosen = _choose_precision(precision, target, train_form=train_form)
    if isinstance(model, (str, Path)):
        from litezoo.export.source import load_source

        name = resolve_name(str(model))
        progress(f"building {name}")
        network = _twin(load_source(name, "random", ()).model)
        channels, side = 3, resolution or get_spec(name).resolution
    else:
        network, name = _twin(model), type(model).__name__
        channels, side = _channels(network), resolution or 224
    network.eval()
    shape = (channels, side, side)
    conditions = (name, target, batch or 1, shape, chosen, progress)
    from litezoo.models.fuse import fuse, graph_form

    if graph_form(network) == "deploy":
        if train_form:
            raise UsageError(f"{name} has nothing to fuse: it has one form; leave --train-form out")
        return _profile_network(network, "deploy", *conditions)
    progress(f"fusing {name}")
    deploy = _profile_network(fuse(network), "deploy", *conditions)
    if not train_form:
        return deploy
    train = _profile_network(network, "train", *conditions)
    return dataclasses.replace(train, deploy=deploy)


def _is_file(model: str | Path) -> bool:
    """Whether a path is meant, not a name; UsageError for a folder and a file that is not there."""
    path = Path(model)
    if path.is_dir():
        files = sorted(str(file) for file in path.glob("*.onnx"))
        what = f"give one of its files: {', '.join(files)}" if files else "it has no .onnx file"
        raise UsageError(f"{model} is a folder; {what}")
    if path.suffix == ".onnx" and not path.is_file():
        raise UsageError(f"{model} is not there; give an ONNX file or a name of: litezoo list")
    return path.is_file()


def _choose_precision(precision: str | None, target: Device | None, *, train_form: bool) -> str:
    """Return what to count in, by default the device's best that the form can be in."""
    if precision is not None and "mixed" in precision:
        raise UsageError(
            f"which layers {precision} leaves in float is found by measuring; profile the ONNX "
            "file that export wrote: litezoo profile artifacts/MODEL/DEVICE/FILE.onnx"
        )
    if precision is not None:
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        if target is not None:
            target.select_precisions(precision)
        if train_form and precision.startswith("int8"):
            raise UsageError("int8 is made of the deploy form; profile the train form in a float")
        return precision
    if target is None:
        return "fp32"
    fit = [
        one
        for one in target.precisions
        if one in PRECISIONS and not (train_form and one.startswith("int8"))
    ]
    return fit[0] if fit else "fp32"


def _twin(model: nn.Module) -> nn.Module:
    """Return a float32 copy on the CPU whose weights are no zeros: an exporter drops those."""
    import torch

    network = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if any(parameter.is_meta for parameter in network.parameters()):
            network.to_empty(device="cpu")
            for tensor in network.state_dict().values():
                tensor.fill_(1)
        network.to("cpu", torch.float32)
        for parameter in network.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
    return network


def _channels(network: nn.Module) -> int:
    """Return the image channels that a network's first convolution takes, else 3."""
    from torch.nn import Conv2d

    convolutions = (module for module in network.modules() if isinstance(module, Conv2d))
    first = next(convolutions, None)
    return 3 if first is None else first.in_channels


def _profile_network(
    network: nn.Module,
    form: str,
    name: str,
    target: Device | None,
    batch: int,
    size: tuple[int, int, int],
    precision: str,
    progress: Callable[[str], None],
) -> Profile:
    progress(f"exporting the {form} form of {name}")
    noise = np.random.default_rng(0).standard_normal((_CALIBRATION, *size)).astype(np.float32)
    try:
        proto = _export(network, noise) if form == "deploy" else _export_train(network, batch, size)
    except LitezooError:
        raise
    except Exception as error:  # the exporter's errors have no common type
        raise UsageError(
            f"{name} cannot be exported at {size[1]}x{size[2]}: {first_line(error)}; choose "
            "another --resolution"
        ) from error
    limits: tuple[LimitFinding, ...] = ()
    if target is not None:
        limits = read_limits(proto, target, precision=precision)
        proto = _rewritten(proto, target)
    progress(f"counting {name} in {precision}")
    proto, shape = fix_input(
        _retype(proto, precision, noise, target), batch=batch, sides=None, name=name
    )
    return _finish(proto, name, form, precision, shape, target, limits)


def _export(network: nn.Module, images: np.ndarray[Any, np.dtype[np.float32]]) -> ModelProto:
    """Return the graph that export starts from."""
    from litezoo.export.to_onnx import export_onnx, simplify_onnx

    return simplify_onnx(export_onnx(network, images, metadata={}), images)[0]


def _export_train(network: nn.Module, batch: int, size: tuple[int, int, int]) -> ModelProto:
    """Return the graph with every BatchNorm as a node: export's optimizer would fold them.

    Its shapes are constants, as nothing simplifies what an open batch makes of them.
    """
    import torch
    from onnx import inliner

    from litezoo.export.to_onnx import INPUT, OPSET, OUTPUT

    require("onnxscript", purpose="profiling", extra="export")
    from onnxscript import optimizer

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (torch.zeros(batch, *size),),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    proto: ModelProto = inliner.inline_local_functions(program.model_proto)
    # shapes become constants; biases of zeros that the export made stay known as such
    optimizer.fold_constants(proto, should_fold=lambda node: node.op_type != "Expand" and None)
    optimizer.remove_unused_nodes(proto)
    return proto


def _rewritten(proto: ModelProto, target: Device) -> ModelProto:
    """Return the graph as export writes it for a device: without what it forbids."""
    from litezoo.export.limits import apply_rewrites

    limits = dataclasses.replace(target.limits, static_shapes=False, opset_max=None)
    return apply_rewrites(proto, dataclasses.replace(target, limits=limits))[0]


def _retype(
    proto: ModelProto,
    precision: str,
    images: np.ndarray[Any, np.dtype[np.float32]],
    target: Device | None,
) -> ModelProto:
    """Return a float32 graph in a precision, typed as export types it."""
    from litezoo.export.to_half import HALVES, to_half
    from litezoo.export.to_int8 import quantize

    if precision.startswith("int8"):
        per_tensor = target is not None and target.limits.quantization == "per-tensor"
        proto = quantize(proto, images, form="int8", per_channel=not per_tensor)
    for half in HALVES:
        if precision.endswith(half):
            return to_half(proto, half)
    return proto


def _profile_file(
    file: Path,
    target: Device | None,
    batch: int | None,
    resolution: int | None,
    precision: str | None,
    progress: Callable[[str], None],
) -> Profile:
    import onnx

    progress(f"reading {file}")
    try:
        proto = onnx.load(file)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf's errors have no common type
        raise UsageError(f"{file} is not a whole ONNX model: {first_line(error)}") from error
    sides = None if resolution is None else (resolution, resolution)
    fixed, shape = fix_input(proto, batch=batch, sides=sides, name=str(file))
    own = _precision_of(read_costs(fixed, name=str(file)).fused)
    limits: tuple[LimitFinding, ...] = ()
    if target is not None:
        limits = read_limits(proto, target, precision=precision or own)
    if precision is not None and precision != own:
        if own != "fp32":
            raise UsageError(f"{file} is {own} already; leave --precision out")
        chosen = _choose_precision(precision, target, train_form=False)
        progress(f"typing {file} as {chosen}")
        images = np.random.default_rng(0).standard_normal(_try_shape(proto, shape))
        typed = _retype(proto, chosen, images.astype(np.float32), target)
        fixed, shape = fix_input(typed, batch=batch, sides=sides, name=str(file))
        own = chosen
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    form = properties.get("litezoo.graph_form", "as it is")
    return _finish(fixed, str(file), form, own, shape, target, limits)


def _try_shape(proto: ModelProto, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a batch that calibration runs: small where the file leaves it open."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    value = next(value for value in proto.graph.input if value.name not in weights)
    is_fixed = value.type.tensor_type.shape.dim[0].HasField("dim_value")
    return (shape[0] if is_fixed else _CALIBRATION, *shape[1:])


def _precision_of(layers: Sequence[Layer]) -> str:
    """Return what a graph computes in, by export's names: int8 alone has float32 beside it."""
    kinds = {layer.dtype for layer in layers if layer.macs} or {"fp32"}
    if kinds == {"int8", "fp32"}:
        return "int8"
    return "+".join(sorted(kinds, key=lambda kind: (kind != "int8", kind)))


def _finish(
    proto: ModelProto,
    name: str,
    form: str,
    precision: str,
    shape: tuple[int, ...],
    target: Device | None,
    limits: tuple[LimitFinding, ...],
) -> Profile:
    """Count a graph of constant sizes."""
    cost = read_costs(proto, name=name)
    if not cost.fused:
        raise UsageError(f"{name} computes nothing: its graph has no layer")
    roof = None if target is None else read_roof(target)
    missing = None if roof is None else why_no_times(cost.fused, roof)
    timed = roof if missing is None else None
    times = () if timed is None else tuple(timed.time(layer) for layer in cost.fused)
    return Profile(
        model=name,
        graph_form=form,
        precision=precision,
        batch=shape[0],
        resolution=(shape[1], shape[2], shape[3]),
        params=cost.params,
        macs=sum(layer.macs for layer in cost.fused),
        activations=sum(layer.activations for layer in cost.unfused if layer.kind in _COUNTED),
        unfused=_totals(cost.unfused, ()),
        fused=_totals(cost.fused, times),
        layers=cost.fused,
        device=None if target is None else target.name,
        roof=roof,
        times=times,
        note=missing or (roof.note if roof else ""),
        findings=design_findings(cost.fused, device=target, roof=timed, limits=limits),
    )


def _totals(layers: Sequence[Layer], times: Sequence[LayerTime]) -> Totals:
    depth: dict[str, int] = {}
    width: Counter[int] = Counter()
    for layer in layers:
        level = 1 + max((depth.get(name, 0) for name in layer.reads), default=0)
        depth |= dict.fromkeys(layer.writes, level)
        width[level] += 1
    by_kind: dict[str, KindTotals] = {}
    for kind in KINDS:
        own = [index for index, layer in enumerate(layers) if layer.kind == kind]
        if own:
            by_kind[kind] = KindTotals(
                kernels=len(own),
                macs=sum(layers[index].macs for index in own),
                memory_bytes=sum(layers[index].memory_bytes for index in own),
                ms=sum(times[index].ms for index in own) if times else None,
            )
    return Totals(
        kernels=len(layers),
        longest_path=max(width, default=0),
        branches=max(width.values(), default=0),
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        input_bytes=sum(layer.input_bytes for layer in layers),
        output_bytes=sum(layer.output_bytes for layer in layers),
        by_kind=by_kind,
    )
