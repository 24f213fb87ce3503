"""Ceilings of this machine, measured: arithmetic by dtype, memory, the cost of a call and a layer.

A ceiling is the best of the ways that were tried, each at its best block of the interleaved
protocol (`measure`), and a statement about this machine and these libraries, not about the chip:
a faster library would raise it, and a Winograd convolution counts as the direct one that it
replaces. All ways are kept beside it, with their spread.

    gemm            square matrices: torch.mm and _int_mm, MatMul and MatMulInteger of the runtimes
    conv3x3         as many output as input channels
    depthwise3x3    no ceiling of arithmetic; what depthwise layers reach at best
    copy, read      far beyond the caches and, "cache", within them: bytes read plus bytes written
    call, layer     a network of one tiny layer, and what each further such layer adds

ONNX files are chains of equal layers, so that what a runtime does at its ends counts little; bf16
and fp16 are OpenVINO's precision hint, int8 is Q/DQ with uint8 activations and int8 weights.
A dtype that the CPU has no instructions for is measured as the library runs it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np

from litezoo.export.runtime import Array, get_runtime
from litezoo.models.errors import CheckFailed, MissingError, UsageError, first_line, require
from litezoo.models.files import write_whole
from litezoo.recipes.devices import Device, get_device

from .machine import Machine, read_machine, usable_cpus
from .measure import PROTOCOL, Medians, check_conditions, empty_session_us, interleave, spread
from .rows import STRICT, read_record, results_folder

if TYPE_CHECKING:
    import torch

__all__ = [
    "Ceilings",
    "Sizes",
    "Way",
    "ceilings_file",
    "ceilings_table",
    "gpu_versions",
    "measure_ceilings",
    "read_ceilings",
    "write_ceilings",
]

SCHEMA: Final = 1
Kind = Literal["gemm", "conv3x3", "depthwise3x3", "copy", "read", "cache", "call", "layer"]
Unit = Literal["tera-ops/s", "GB/s", "us"]
#: Arithmetic whose best way is a dtype's ceiling.
_PEAK_KINDS: tuple[Kind, ...] = ("gemm", "conv3x3")
_CONVOLUTIONS: tuple[Kind, ...] = ("conv3x3", "depthwise3x3")
_MEMORY: tuple[Kind, ...] = ("copy", "read", "cache")
_TINY: tuple[Kind, ...] = ("call", "layer")
_DTYPES = ("fp32", "bf16", "fp16", "int8")
#: Layers of the deep twin of the network of one tiny layer, and its channels and pixels a side.
_DEEP, _TINY_CHANNELS, _TINY_SIDE = 65, 8, 4
_OPSET, _IR_VERSION = 20, 10
_ONE: Array = np.zeros(1, np.float32)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One thing measured: what, with which library, and the value of its best block.

    `dtype` is "" where it makes no difference; `spread` is the distance of the quartiles of the
    block medians over their median.
    """

    what: str
    backend: str
    kind: Kind
    dtype: str
    value: float
    unit: Unit
    spread: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The content of benchmarks/results/ceilings/<device>.json.

    `peak_tera_ops_per_s` counts 2 operations for a multiply-accumulate; bandwidths count bytes read
    and written; `launch_us` is the harness's own share of every time (a session that does nothing),
    `layer_us` what a layer costs besides its work, by library; `not_measured` says why not.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    device: str
    machine: Machine
    threads: int
    peak_tera_ops_per_s: Mapping[str, float]
    memory_gb_per_s: float
    cache_gb_per_s: float
    launch_us: float
    layer_us: Mapping[str, float]
    how: tuple[Way, ...]
    not_measured: Mapping[str, str]
    date: str
    protocol: str
    schema: Literal[1] = SCHEMA

    def __post_init__(self) -> None:
        """Refuse numbers that are no ceilings."""
        rates = (*self.peak_tera_ops_per_s.values(), self.memory_gb_per_s, self.cache_gb_per_s)
        if not self.peak_tera_ops_per_s or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"ceilings are numbers above 0, not {rates}")

    def best(self, kind: Kind, dtype: str = "") -> Way | None:
        """Return the best way of a kind and dtype, None where none was measured."""
        ways = [way for way in self.how if (way.kind, way.dtype) == (kind, dtype)]
        return _best(ways) if ways else None

    def elsewhere(self, machine: Machine | None = None) -> str | None:
        """Return None if they were measured on such a machine (default: this one), else where.

        Those of a GPU hold for its device, whatever machine it is in.
        """
        if "gpu" in self.machine.versions:
            return None  # the device file says which GPU it is
        theirs, ours = (_signature(m) for m in (self.machine, machine or read_machine()))
        if theirs == ours:
            return None
        return (
            f"the ceilings of {self.device} are of another machine ({theirs}; this is {ours}); "
            f"measure: litezoo ceilings --device {self.device}"
        )


def _best(ways: Sequence[Way]) -> Way:
    return (min if ways[0].unit == "us" else max)(ways, key=lambda way: way.value)


def _signature(machine: Machine) -> str:
    return f"{machine.cpu}, {machine.cores} cores"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is computed: large enough to reach the ceilings, small enough to be repeated.

    `gemm` is the side of the matrices; convolutions have `channels` at `side` x `side` pixels (in
    PyTorch `batch` images at once, in ONNX files `chain` layers), depthwise ones their own; `far`
    and `near` are MiB of both buffers of a copy, beyond and within the caches; `repeats` the calls
    of a PyTorch kernel for each time that is taken.
    """

    gemm: int
    channels: int
    side: int
    batch: int
    depthwise_channels: int
    depthwise_side: int
    chain: int
    far_mib: float
    near_mib: float
    repeats: int


def _cpu_sizes() -> Sizes:
    return Sizes(
        gemm=1024,
        channels=256,
        side=28,
        batch=4,
        depthwise_channels=96,
        depthwise_side=56,
        chain=4,
        far_mib=min(max(512.0, 8 * _largest_cache_mib()), _memory_mib() / 8),
        near_mib=1.0,
        repeats=1,
    )


def _gpu_sizes(place: torch.device) -> Sizes:
    import torch

    properties = torch.cuda.get_device_properties(place)
    l2_mib = max(properties.L2_cache_size / 2**20, 1.0)
    return Sizes(
        gemm=8192,
        channels=512,
        side=56,
        batch=32,
        depthwise_channels=512,
        depthwise_side=56,
        chain=1,
        far_mib=min(max(2048.0, 32 * l2_mib), properties.total_memory / 2**20 / 8),
        near_mib=l2_mib / 4,
        repeats=10,
    )


def _largest_cache_mib() -> float:
    """Return the size of the largest cache that Linux tells of, 32 MiB where it tells none."""
    found = [32.0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KM])\s*", file.read_text(encoding="ascii"))
        if size is not None:
            found.append(int(size[1]) / (1024 if size[2] == "K" else 1))
    return max(found)


def _memory_mib() -> float:
    psutil = require("psutil", purpose="measuring", extra="cpu")
    return float(psutil.virtual_memory().available / 2**20)


# ------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is timed: `run` does `work` operations or bytes, and returns its result."""

    what: str
    backend: str
    kind: Kind
    dtype: str
    work: float
    unit: Unit
    run: Callable[[], object]

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.backend, self.dtype, self.what)))


#: A group of ways that are interleaved, a name for the reports, and what makes the job.
_Plan = tuple[str, str, Callable[[], _Job]]


class _Timed:
    """A job as a session: the batch that goes in comes out."""

    def __init__(self, job: _Job) -> None:
        self._run = job.run

    def run(self, batch: Array) -> Array:
        """Do the job once."""
        self._run()
        return batch


def measure_ceilings(
    device: str = "cpu",
    *,
    threads: int | None = None,
    sizes: Sizes | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> Ceilings:
    """Measure this machine's ceilings, a device's CPU with `threads` (default: all) or its GPU.

    UsageError for devices that are neither, MissingError without the device's GPU.
    """
    chosen = get_device(device)
    count = len(usable_cpus()) if threads is None else threads
    check_conditions(batches=[1], threads=count)
    place = _place(chosen)
    on_gpu = place.type == "cuda"
    sizes = sizes or (_gpu_sizes(place) if on_gpu else _cpu_sizes())
    machine = read_machine(gpu_versions(place) if on_gpu else None)
    plan = _torch_plan(place, sizes)
    not_measured: dict[str, str] = {}
    if not on_gpu:
        for runtime, part in (
            ("openvino", _openvino_plan),
            ("onnxruntime", _onnxruntime_plan),
        ):
            if (reason := _missing(runtime, chosen)) is not None:
                not_measured[runtime] = reason
            else:
                plan += part(sizes, count)
    ways: list[Way] = []
    with _torch_threads(count):
        for group in dict.fromkeys(name for name, _, _ in plan):
            own = [(label, make) for name, label, make in plan if name == group]
            ways += _measure_group(
                group, own, threads=count, seed=seed, not_measured=not_measured, progress=progress
            )
        progress("timing a session that does nothing")
        launch_us = empty_session_us(count)
    ways, layer_us = _with_layers(ways)
    return Ceilings(
        device=chosen.name,
        machine=machine,
        threads=count,
        peak_tera_ops_per_s=_peaks(ways, not_measured),
        memory_gb_per_s=_rate(ways, "copy", not_measured),
        cache_gb_per_s=_rate(ways, "cache", not_measured),
        launch_us=launch_us,
        layer_us=layer_us,
        how=tuple(ways),
        not_measured=not_measured,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        protocol=PROTOCOL,
    )


def _place(device: Device) -> torch.device:
    """Return where PyTorch runs for a device; it has to be in this machine."""
    if device.kind not in ("cpu", "gpu"):
        raise UsageError(
            f"ceilings are measured on CPUs and NVIDIA GPUs; {device.name} is an {device.kind}"
        )
    import torch

    if device.kind == "cpu":
        return torch.device("cpu")
    from litezoo.export.runtime_pytorch import find_gpu

    return torch.device("cuda", find_gpu(device))


def gpu_versions(place: torch.device) -> dict[str, str]:
    """Return what a GPU adds to the versions of a machine's record."""
    import torch

    return {"gpu": torch.cuda.get_device_name(place), "cuda": str(torch.version.cuda)}


def _missing(runtime: str, device: Device) -> str | None:
    """Return why ONNX files of a runtime cannot be measured here, or None."""
    if (reason := get_runtime(runtime).missing(device)) is not None:
        return reason
    try:
        require("onnx", purpose=f"ceilings of {runtime}", extra="export")
    except MissingError as error:
        return str(error)
    return None


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute in float32 itself and on `count` threads meanwhile."""
    import torch

    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def _measure_group(
    group: str,
    plan: Sequence[tuple[str, Callable[[], _Job]]],
    *,
    threads: int,
    seed: int,
    not_measured: dict[str, str],
    progress: Callable[[str], None],
) -> list[Way]:
    """Measure what can be made of a group in one interleaved run; note what cannot, and why."""
    jobs = []
    for label, make in plan:
        progress(f"{group}: preparing {label}")
        try:
            job = make()
            _check_numbers(job.run())
        except Exception as error:  # whatever a library says to a dtype it does not have
            not_measured[label] = first_line(error) or type(error).__name__
            continue
        jobs.append(job)
    if not jobs:
        return []
    found = interleave(
        [(job.label, _Timed(job), _ONE) for job in jobs],
        threads=threads,
        seed=seed,
        progress=lambda step: progress(f"{group}: {step.removeprefix('batch 1: ')}"),
    )
    return [_way(job, own.medians) for job, own in zip(jobs, found, strict=True)]


def _check_numbers(result: object) -> None:
    """Refuse a result that is not of finite numbers, or is nothing but zeros."""
    if hasattr(result, "float"):  # a tensor, of whatever type and place
        result = result.float().cpu().numpy()
    values = np.asarray(result)
    if not np.isfinite(values).all():
        raise CheckFailed("gives NaN or infinite outputs")
    if not values.any():
        raise CheckFailed("gives nothing but zeros")


def _way(job: _Job, medians: Medians) -> Way:
    """Return a job's way from its block medians in ms."""
    best_s = float(medians.min()) / 1e3
    value = {
        "tera-ops/s": job.work / best_s / 1e12,
        "GB/s": job.work / best_s / 1e9,
        "us": 1e6 * best_s,
    }[job.unit]
    return Way(
        what=job.what,
        backend=job.backend,
        kind=job.kind,
        dtype=job.dtype,
        value=_digits(value),
        unit=job.unit,
        spread=spread(medians),
    )


def _digits(value: float) -> float:
    """Return a number to four digits."""
    return float(f"{value:.4g}")


def _with_layers(ways: Sequence[Way]) -> tuple[list[Way], dict[str, float]]:
    """Put what a further layer costs in the place of the deep networks' times."""
    found: list[Way] = []
    layer_us: dict[str, float] = {}
    for way in ways:
        if way.kind != "layer":
            found.append(way)
            continue
        one = next((w for w in ways if w.kind == "call" and w.backend == way.backend), None)
        if one is None:
            continue
        cost = _digits(max(way.value - one.value, 0.0) / (_DEEP - 1))
        layer_us[way.backend] = cost
        found.append(dataclasses.replace(way, value=cost))
    return found, layer_us


def _peaks(ways: Sequence[Way], not_measured: Mapping[str, str]) -> dict[str, float]:
    """Return the best of each dtype, the widest first."""
    peaks: dict[str, float] = {}
    for way in ways:
        if way.kind in _PEAK_KINDS:
            peaks[way.dtype] = max(way.value, peaks.get(way.dtype, 0.0))
    if not peaks:
        raise MissingError(f"no arithmetic could be measured: {_reasons(not_measured)}")
    return peaks


def _rate(ways: Sequence[Way], kind: Kind, not_measured: Mapping[str, str]) -> float:
    rates = [way.value for way in ways if way.kind == kind]
    if not rates:
        raise MissingError(f"no {kind} could be measured: {_reasons(not_measured)}")
    return max(rates)


def _reasons(not_measured: Mapping[str, str]) -> str:
    return "; ".join(f"{label}: {reason}" for label, reason in not_measured.items())


# -------------------------------------------------------------------------------------- PyTorch


def _torch_plan(place: torch.device, sizes: Sizes) -> list[_Plan]:
    """Return everything that PyTorch can be asked for on a CPU or a GPU."""
    dtypes = (*_DTYPES, "tf32") if place.type == "cuda" else _DTYPES
    plan: list[_Plan] = [
        (dtype, f"torch {dtype} gemm", partial(_torch_gemm, place, sizes, dtype))
        for dtype in dtypes
    ]
    plan += [
        (dtype, f"torch {dtype} {kind}", partial(_torch_conv, place, sizes, dtype, kind))
        for dtype in dtypes
        if dtype != "int8"  # PyTorch has none outside its own quantized tensors
        for kind in _CONVOLUTIONS
    ]
    plan += [
        ("memory", f"torch {kind}", partial(_torch_memory, place, sizes, kind)) for kind in _MEMORY
    ]
    plan += [("calls", f"torch {kind}", partial(_torch_tiny, place, kind)) for kind in _TINY]
    return plan


def _torch_type(dtype: str) -> torch.dtype:
    import torch

    types: dict[str, torch.dtype] = {
        "fp32": torch.float32,
        "tf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    return types[dtype]


def _repeated(
    place: torch.device, call: Callable[[], torch.Tensor], repeats: int, *, tf32: bool = False
) -> Callable[[], torch.Tensor]:
    """Return a function that calls a kernel `repeats` times and waits until it is done."""
    import torch

    on_gpu = place.type == "cuda"

    def run() -> torch.Tensor:
        if on_gpu:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        with torch.inference_mode():
            for _ in range(repeats):
                result = call()
        if on_gpu:
            torch.cuda.synchronize(place)
        return result

    if not on_gpu:
        return run

    def on_its_gpu() -> torch.Tensor:
        with (
            torch.cuda.device(place),
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32),
        ):
            return run()

    return on_its_gpu


def _torch_gemm(place: torch.device, sizes: Sizes, dtype: str) -> _Job:
    import torch

    n = sizes.gemm
    if dtype == "int8":
        a, b = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=place) for _ in range(2))
        columns = b.t().contiguous().t()  # as cuBLASLt wants the second one
        call: Callable[[], torch.Tensor] = partial(torch._int_mm, a, columns)
        backend = "torch._int_mm"
    else:
        left, right = (
            (torch.randn(n, n, device=place) / n**0.25).to(_torch_type(dtype)) for _ in range(2)
        )
        call, backend = partial(torch.mm, left, right), "torch.mm"
    return _Job(
        what=f"gemm {n}x{n}x{n}",
        backend=backend,
        kind="gemm",
        dtype=dtype,
        work=2.0 * n**3 * sizes.repeats,
        unit="tera-ops/s",
        run=_repeated(place, call, sizes.repeats, tf32=dtype == "tf32"),
    )


def _convolution(sizes: Sizes, kind: str) -> tuple[int, int, int]:
    """Return channels, side and groups of a kind of convolution."""
    if kind == "conv3x3":
        return sizes.channels, sizes.side, 1
    return sizes.depthwise_channels, sizes.depthwise_side, sizes.depthwise_channels


def _torch_conv(place: torch.device, sizes: Sizes, dtype: str, kind: Kind) -> _Job:
    import torch
    from torch.nn import functional as F

    channels, side, groups = _convolution(sizes, kind)
    images = torch.rand(sizes.batch, channels, side, side, device=place)
    weight = torch.randn(channels, channels // groups, 3, 3, device=place)
    weight = weight / (9 * channels // groups) ** 0.5
    images, weight = (
        t.to(dtype=_torch_type(dtype), memory_format=torch.channels_last) for t in (images, weight)
    )
    call = partial(F.conv2d, images, weight, padding=1, groups=groups)
    macs = 9 * channels * (channels // groups) * side**2 * sizes.batch
    return _Job(
        what=f"{_said(kind)}, {channels} channels, {side}x{side}, batch {sizes.batch}",
        backend="torch conv2d channels-last",
        kind=kind,
        dtype=dtype,
        work=2.0 * macs * sizes.repeats,
        unit="tera-ops/s",
        run=_repeated(place, call, sizes.repeats, tf32=dtype == "tf32"),
    )


def _said(kind: str) -> str:
    return "conv 3x3" if kind == "conv3x3" else "depthwise 3x3"


def _torch_memory(place: torch.device, sizes: Sizes, kind: Kind) -> _Job:
    import torch

    mib = sizes.near_mib if kind == "cache" else sizes.far_mib
    numbers = max(int(mib * 2**20 / 8), 1)  # in each of two buffers of float32
    source, target = torch.ones(numbers, device=place), torch.zeros(numbers, device=place)
    call: Callable[[], torch.Tensor]
    if kind == "read":
        call, work, said = source.sum, 4.0 * numbers, f"read {4 * numbers / 2**20:.4g} MiB"
    else:
        call, work = partial(target.copy_, source), 8.0 * numbers
        said = f"copy {4 * numbers / 2**20:.4g} MiB"
    # a copy in the cache is over before a timer has been read twice
    repeats = sizes.repeats * (20 if kind == "cache" else 1)
    return _Job(
        what=said,
        backend="torch sum" if kind == "read" else "torch copy_",
        kind=kind,
        dtype="",
        work=work * repeats,
        unit="GB/s",
        run=_repeated(place, call, repeats),
    )


def _torch_tiny(place: torch.device, kind: Kind) -> _Job:
    import torch
    from torch import nn

    depth = 1 if kind == "call" else _DEEP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(_TINY_CHANNELS, _TINY_CHANNELS, 1) for _ in range(depth)]
    network = nn.Sequential(*layers).to(place).eval()
    images = torch.ones(1, _TINY_CHANNELS, _TINY_SIDE, _TINY_SIDE, device=place)
    return _Job(
        what=_tiny_said(kind),
        backend="torch eager fp32",
        kind=kind,
        dtype="",
        work=0.0,
        unit="us",
        run=_repeated(place, partial(network, images), 1),
    )


def _tiny_said(kind: str) -> str:
    layer = f"1x1 of {_TINY_CHANNELS} channels at {_TINY_SIDE}x{_TINY_SIDE}"
    return f"a network of one {layer}" if kind == "call" else f"each further {layer}"


# ----------------------------------------------------------------------------------- ONNX files


def _chain(
    operator: str, weights: Sequence[Array], shape: Sequence[int], *, form: str, groups: int = 1
) -> bytes:
    """Return an ONNX file in which `operator` runs with each weight in turn, "x" to "y".

    `form` is fp32, fp16 (all of the file) or int8 (Q/DQ: uint8 from 0 to 4 as after a ReLU, int8
    weights with one scale each).
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    half = np.dtype(np.float16 if form == "fp16" else np.float32)
    kind = TensorProto.FLOAT16 if form == "fp16" else TensorProto.FLOAT
    nodes, tensors = [], []

    def constant(name: str, value: object) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def pair(name: str, stem: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, *unsigned], [f"{stem}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{stem}_q", *unsigned], [f"{stem}_dq"]))
        return f"{stem}_dq"

    unsigned: tuple[str, ...] = ()
    if form == "int8":
        scale = constant("scale", np.float32(4 / 255))
        unsigned = (scale, constant("zero", np.uint8(0)))
    attributes: dict[str, Any] = {}
    if operator == "Conv":
        margin = weights[0].shape[-1] // 2
        attributes = {"pads": [margin] * 4, "group": groups}
    x = "x"
    for index, weight in enumerate(weights):
        if form == "int8":
            x = pair(x, f"x{index}")
            step = np.float32(np.abs(weight).max() / 127)
            integers = np.rint(weight / step).astype(np.int8)
            names = [
                constant(f"w{index}_q", integers),
                constant(f"w{index}_scale", step),
                constant(f"w{index}_zero", np.int8(0)),
            ]
            nodes.append(helper.make_node("DequantizeLinear", names, [f"w{index}"]))
        else:
            constant(f"w{index}", weight.astype(half))
        nodes.append(helper.make_node(operator, [x, f"w{index}"], [f"y{index}"], **attributes))
        x = f"y{index}"
    if form == "int8":
        x = pair(x, "last")
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", kind, list(shape))],
        [helper.make_tensor_value_info("y", kind, list(shape))],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR_VERSION
    checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _integer_gemm(n: int) -> bytes:
    """Return an ONNX file with one MatMulInteger, uint8 "x" times int8 weights to int32 "y"."""
    from onnx import TensorProto, checker, helper, numpy_helper

    weights = np.random.default_rng(0).integers(-127, 128, (n, n), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [n, n])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [n, n])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR_VERSION
    checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


#: Makes a function that runs an ONNX file on an input, for a dtype.
_Load = Callable[[bytes, Any, str], Callable[[], object]]


def _chain_job(
    sizes: Sizes, kind: Kind, dtype: str, *, form: str, backend: str, load: _Load
) -> _Job:
    """Return a job of a chain of matrices or convolutions in a runtime."""
    random = np.random.default_rng(0)
    if kind == "gemm":
        n = sizes.gemm
        shape: tuple[int, ...] = (n, n)
        weight_shape: tuple[int, ...] = (n, n)
        operator, groups, fan_in, macs = "MatMul", 1, n, n**3
        said = f"gemm {n}x{n}x{n}, {sizes.chain} in a chain"
    else:
        channels, side, groups = _convolution(sizes, kind)
        shape = (1, channels, side, side)
        weight_shape = (channels, channels // groups, 3, 3)
        operator, fan_in = "Conv", 9 * channels // groups
        macs = fan_in * channels * side**2
        said = f"{_said(kind)}, {channels} channels, {side}x{side}, {sizes.chain} in a chain"
    weights = [
        (random.standard_normal(weight_shape, dtype=np.float32) * fan_in**-0.5).astype(np.float32)
        for _ in range(sizes.chain)
    ]
    content = _chain(operator, weights, shape, form=form, groups=groups)
    given = random.random(shape, dtype=np.float32)
    return _Job(
        what=said,
        backend=f"{backend} {operator}",
        kind=kind,
        dtype=dtype,
        work=2.0 * macs * sizes.chain,
        unit="tera-ops/s",
        run=load(content, given.astype(np.float16) if form == "fp16" else given, dtype),
    )


def _tiny_job(kind: Kind, *, backend: str, load: _Load) -> _Job:
    """Return a job of one tiny layer in a runtime, or of many."""
    random = np.random.default_rng(0)
    shape = (1, _TINY_CHANNELS, _TINY_SIDE, _TINY_SIDE)
    weights = [
        random.standard_normal((_TINY_CHANNELS, _TINY_CHANNELS, 1, 1), dtype=np.float32)
        / np.float32(_TINY_CHANNELS**0.5)
        for _ in range(1 if kind == "call" else _DEEP)
    ]
    content = _chain("Conv", weights, shape, form="fp32")
    return _Job(
        what=_tiny_said(kind),
        backend=f"{backend} fp32",
        kind=kind,
        dtype="",
        work=0.0,
        unit="us",
        run=load(content, random.random(shape, dtype=np.float32), "fp32"),
    )


def _runtime_plan(sizes: Sizes, name: str, forms: Mapping[str, str], load: _Load) -> list[_Plan]:
    """Return the chains of a runtime; `forms` maps a dtype to the form of file it is run from."""
    plan: list[_Plan] = [
        (
            dtype,
            f"{name} {dtype} {kind}",
            partial(_chain_job, sizes, kind, dtype, form=form, backend=name, load=load),
        )
        for dtype, form in forms.items()
        for kind in ("gemm", *_CONVOLUTIONS)
    ]
    plan += [
        ("calls", f"{name} {kind}", partial(_tiny_job, kind, backend=name, load=load))
        for kind in _TINY
    ]
    return plan


def _openvino_plan(sizes: Sizes, threads: int) -> list[_Plan]:
    forms = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "int8": "int8"}
    return _runtime_plan(sizes, "openvino", forms, partial(_in_openvino, threads))


def _in_openvino(threads: int, content: bytes, given: Any, dtype: str) -> Callable[[], object]:
    """Compile an ONNX file for the CPU; MissingError for a 16-bit float that the CPU has not."""
    from litezoo.export.runtime_openvino import one_core

    core = one_core()
    if dtype in ("bf16", "fp16"):
        if dtype.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise MissingError(f"this CPU has no {dtype} instructions that OpenVINO uses")
    settings = {
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp16": "f16"}.get(dtype, "f32"),
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with TemporaryDirectory(prefix="litezoo-ceilings-") as folder:
        file = Path(folder) / "chain.onnx"
        file.write_bytes(content)
        request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()

    def run() -> object:
        return request.infer({0: given}, share_inputs=True, share_outputs=True)[0]

    return run


def _onnxruntime_plan(sizes: Sizes, threads: int) -> list[_Plan]:
    load = partial(_in_onnxruntime, threads)
    forms = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
    return [
        *_runtime_plan(sizes, "onnxruntime", forms, load),
        ("int8", "onnxruntime int8 MatMulInteger", partial(_integer_job, sizes, load)),
    ]


def _integer_job(sizes: Sizes, load: _Load) -> _Job:
    n = sizes.gemm
    given = np.random.default_rng(0).integers(0, 256, (n, n), dtype=np.uint8)
    return _Job(
        what=f"gemm {n}x{n}x{n}",
        backend="onnxruntime MatMulInteger uint8 x int8",
        kind="gemm",
        dtype="int8",
        work=2.0 * n**3,
        unit="tera-ops/s",
        run=load(_integer_gemm(n), given, "int8"),
    )


def _in_onnxruntime(threads: int, content: bytes, given: Any, dtype: str) -> Callable[[], object]:
    """Load an ONNX file for the CPU."""
    import onnxruntime

    from litezoo.export.runtime_onnxruntime import session_options

    session = onnxruntime.InferenceSession(
        content, session_options(threads), providers=["CPUExecutionProvider"]
    )

    def run() -> object:
        return session.run(None, {"x": given})[0]

    return run


# ---------------------------------------------------------------------------------------- files


def ceilings_file(device: str, *, folder: Path | None = None) -> Path:
    """Return where a device's ceilings are kept: benchmarks/results/ceilings/<device>.json."""
    return (folder or results_folder() / "ceilings") / f"{device}.json"


def write_ceilings(ceilings: Ceilings, *, folder: Path | None = None) -> Path:
    """Write the ceilings in the place of the device's older ones, and return the file."""
    file = ceilings_file(ceilings.device, folder=folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(
        file, json.dumps(dataclasses.asdict(ceilings), indent=1, default=dict) + "\n"
    )


def read_ceilings(device: str, *, folder: Path | None = None) -> Ceilings | None:
    """Return a device's measured ceilings, None where there are none.

    They may be of another machine (`Ceilings.elsewhere`). A damaged file is a CheckFailed.
    """
    file = ceilings_file(device, folder=folder)
    if not file.is_file():
        return None
    return read_record(
        file, Ceilings, name="ceilings", command=f"litezoo ceilings --device {device}"
    )


def ceilings_table(ceilings: Ceilings) -> list[tuple[str, ...]]:
    """Return (what, dtype, library, value, unit, spread, "best" or "") of every way.

    The best of a dtype's arithmetic and of each other kind is what the ceilings are made of.
    """
    groups: dict[tuple[str, str], list[Way]] = {}
    for way in ceilings.how:
        kind = "arithmetic" if way.kind in _PEAK_KINDS else way.kind
        groups.setdefault((kind, way.dtype), []).append(way)
    best = [_best(ways) for ways in groups.values()]
    return [
        (
            way.what,
            way.dtype or "-",
            way.backend,
            f"{way.value:.4g}",
            way.unit,
            f"{way.spread:.0%}",
            "best" if any(way is one for one in best) else "",
        )
        for way in ceilings.how
    ]
