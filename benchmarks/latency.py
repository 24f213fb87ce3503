"""The analytic latency model: what a chip needs for a network's kernels.

    kernel   = sqrt(compute^2 + memory^2) + launch         (CPUs: compute + memory + launch)
    compute  = 2 * MACs / (peak * efficiency) * (1 + fill * units / outputs) * (1 + depth / K)
    memory   = activation bytes / (bandwidth * efficiency) + weight bytes / (...)
    network  = overall * (max(sum of kernels, host * kernels) + copy * images + constant)

Compute: the efficiency is one number for each class of kernel (dense, 1x1, grouped, depthwise, of
the image). Channels are counted as the chip pads them (`Chip.channel_multiple`), those of a group
to 16 on tensor cores; what fills no tile is slower still in half precision (`odd`), and a library
may start a kernel for each group (`group_us`). `outputs` are the elements that a kernel writes: few
of them leave units idle (`fill` outputs a unit halve the rate), and `K` multiply-adds of each: few
of them do not amortise a tile (`depth`). Float32 3x3 convolutions of stride 1 gain by Winograd, the
less the fewer outputs there are. Depthwise convolutions run at the vector units' peak, and so do
the element-wise operations of any kernel (`vector`).
Memory: what fits in the cache beside what it makes moves `cache` times as fast, and so do weights
where those of the whole network fit; they are read once in a batch. Autocast, and a CPU's library
that wants another layout, first reads the float32 weights in every call and writes them anew.
Host: a program that starts kernels one by one takes `host` for each, whatever the GPU does
meanwhile; the max is a smooth one. `copy` is the image's way to the device, where a measurement
contains it.

Every number is a `Parameter`: positive, with a default and how far (in log units) it is trusted.
`fit` finds them from rows, a few of them from hundreds of rows and, towards the default, from few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import UsageError

if TYPE_CHECKING:
    from litezoo.recipes.devices import Device

    from .kernels import Kernel
    from .network import Network

__all__ = [
    "CLASSES", "PARAMETERS", "Chip", "Class", "Costs", "KernelTime", "Mode", "Parameter",
    "Sample", "Work", "explain", "make_work", "parameters_of", "read_chip",
]  # fmt: skip

Floats = NDArray[np.float64]
#: How a runtime runs a network: `kernels.Policy`.
Mode = Literal["eager", "compiled", "fused"]
Class = Literal[
    "dense", "pointwise", "grouped", "depthwise", "image", "matmul", "elementwise", "pool",
    "reduce", "move",
]  # fmt: skip
#: What a kernel is to the model, in words. `image`: a convolution of at most four channels.
CLASSES: Mapping[Class, str] = {
    "dense": "dense convolution",
    "pointwise": "1x1 convolution",
    "grouped": "grouped convolution",
    "depthwise": "depthwise convolution",
    "image": "convolution of the image",
    "matmul": "matrix product",
    "elementwise": "element-wise",
    "pool": "pooling over windows, resizing",
    "reduce": "means, softmax, norms of a map",
    "move": "copying (concat, split, shuffle, pad)",
}
_CLASS_PLACES: Mapping[str, int] = {name: place for place, name in enumerate(CLASSES)}
_CLASS_NAMES: tuple[Class, ...] = tuple(CLASSES)
#: Most channels of an image.
_IMAGE_CHANNELS = 4
#: Output channels of a group that tensor cores compute at once.
_GROUP_TILE = 16
#: Fewest channels for which libraries choose Winograd.
_WINOGRAD_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One number of the model: its default, its trust in it (standard deviation, log units).

    `modes` and `kinds` are the runtimes and the kinds of device that have it; elsewhere it does
    nothing. `default` may differ by mode or kind.
    """

    name: str
    unit: str
    what: str
    default: float
    trust: float
    defaults: Mapping[str, float]
    modes: tuple[str, ...] = ("eager", "compiled", "fused")
    kinds: tuple[str, ...] = ("cpu", "gpu", "npu")
    fp32_only: bool = False
    half_only: bool = False

    def start(self, mode: str, kind: str) -> float:
        """Return the default for a mode and a kind of device."""
        for key in (f"{kind} {mode}", kind, mode):
            if key in self.defaults:
                return self.defaults[key]
        return self.default


def _share(name: str, what: str, default: float, trust: float = 0.6, **other: float) -> Parameter:
    defaults = {key.replace("_", " "): value for key, value in other.items()}
    return Parameter(
        name=name, unit="share of the peak", what=what, default=default, trust=trust,
        defaults=defaults,
    )  # fmt: skip


#: All parameters, in the order of a vector of them.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        name="overall", unit="times", what="everything, as a device is slower than its sheet",
        default=1.0, trust=0.4, defaults={},
    ),
    _share("dense", "arithmetic of dense convolutions", 0.6, npu=0.4),
    _share("pointwise", "arithmetic of 1x1 convolutions and matrix products", 0.6, npu=0.4),
    _share("grouped", "arithmetic of grouped convolutions", 0.3, npu=0.2),
    _share("depthwise", "arithmetic of depthwise convolutions (vector peak)", 0.3, npu=0.05),
    _share("image", "arithmetic of the convolution of the image", 0.3),
    _share("vector", "element-wise arithmetic, in kernels of its own or behind others", 0.3),
    _share("conv_memory", "bandwidth of convolutions and matrix products", 0.7, gpu_eager=0.55),
    _share("depthwise_memory", "bandwidth of depthwise convolutions", 0.7),
    _share("elementwise_memory", "bandwidth of element-wise kernels", 0.85, 0.4),
    _share("pool_memory", "bandwidth of pooling", 0.6),
    _share("reduce_memory", "bandwidth of means, softmax and norms", 0.7),
    _share("move_memory", "bandwidth of concatenation, splits, shuffles", 0.7),
    _share("weight_memory", "bandwidth of convolutions' weights", 0.7),
    _share("matmul_memory", "bandwidth of matrix products' weights", 0.6, 0.8),
    Parameter(
        name="winograd", unit="times", what="gain of float32 3x3 convolutions of stride 1",
        default=1.5, trust=0.3, defaults={"npu": 1.0}, fp32_only=True,
    ),
    Parameter(
        name="odd", unit="times", what="half-precision convolutions of channels that fill no tile",
        default=1.2, trust=0.3, defaults={}, kinds=("gpu",), half_only=True,
    ),
    Parameter(
        name="cache", unit="times", what="rate of what the cache holds, over the memory's",
        default=2.5, trust=0.4, defaults={"cpu": 3.0},
    ),
    Parameter(
        name="cache_share", unit="times", what="how much of the cache a kernel's tensors may fill",
        default=1.0, trust=0.7, defaults={},
    ),
    Parameter(
        name="fill", unit="outputs/unit", what="outputs a unit needs for half its rate",
        default=1000.0, trust=0.8, defaults={"cpu": 200.0, "npu": 2000.0},
    ),
    Parameter(
        name="depth", unit="MACs/output", what="multiply-adds of an output for half the rate",
        default=12.0, trust=0.7, defaults={"npu": 16.0},
    ),
    Parameter(
        name="launch_us", unit="us", what="a convolution or matrix product, besides its work",
        default=2.0, trust=0.6, defaults={"cpu": 4.0, "cpu compiled": 8.0, "npu": 5.0},
    ),
    Parameter(
        name="other_launch_us", unit="us", what="any other kernel, besides its work",
        default=2.0, trust=0.6, defaults={"cpu": 4.0, "cpu compiled": 6.0, "npu": 5.0},
    ),
    Parameter(
        name="group_us", unit="us", what="a group of a grouped convolution, besides its work",
        default=0.05, trust=2.0, defaults={},
    ),
    Parameter(
        name="host_us", unit="us", what="a kernel's start by a program that starts each",
        default=8.0, trust=0.5, defaults={"compiled": 6.0}, modes=("eager", "compiled"),
        kinds=("gpu",),
    ),
    Parameter(
        name="constant_us", unit="us", what="a call, besides its kernels",
        default=30.0, trust=0.8, defaults={"cpu": 30.0, "cpu compiled": 200.0, "npu": 150.0},
    ),
    Parameter(
        name="copy_us", unit="us/image of 224x224", what="the way of an image to the device",
        default=8.0, trust=1.2, defaults={}, modes=("fused",), kinds=("gpu", "npu"),
    ),
)  # fmt: skip
_PLACES: Mapping[str, int] = {one.name: place for place, one in enumerate(PARAMETERS)}
#: Of each class: where the parameters of its arithmetic, its bytes and its weights stand.
_ARITHMETIC = np.array(
    [_PLACES[n] for n in ("dense", "pointwise", "grouped", "depthwise", "image", "pointwise",
                          "pointwise", "pointwise", "pointwise", "pointwise")]
)  # fmt: skip
_ACTIVATIONS = np.array(
    [_PLACES[f"{n}_memory"] for n in ("conv", "conv", "conv", "depthwise", "conv", "conv",
                                      "elementwise", "pool", "reduce", "move")]
)  # fmt: skip
_WEIGHTS = np.array(
    [_PLACES[f"{n}_memory"] for n in ("weight", "weight", "weight", "weight", "weight", "matmul",
                                      "weight", "weight", "weight", "weight")]
)  # fmt: skip


def parameters_of(*, mode: Mode, kind: str, fp32: bool) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return the defaults (natural units), the trust (log units) and which parameters are in use.

    A parameter that is not in use has the value that does nothing.
    """
    defaults, trust, used = [], [], []
    for one in PARAMETERS:
        on = (
            mode in one.modes
            and kind in one.kinds
            and not (one.half_only if fp32 else one.fp32_only)
        )
        off = 1.0 if one.unit == "times" else 0.0
        defaults.append(one.start(mode, kind) if on else off)
        trust.append(one.trust)
        used.append(on)
    return np.array(defaults), np.array(trust), np.array(used)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The physics of a device in one precision: what a roofline needs.

    `matrix_tera` and `vector_tera` are tera operations per second (2 for a multiply-accumulate) of
    matrix and of vector units; `element_bytes` and `weight_bytes` what one number takes where it is
    kept; `units` the multiprocessors or cores that share a kernel.
    """

    kind: str
    matrix_tera: float
    vector_tera: float
    memory_gb_per_s: float
    cache_mib: float
    units: float
    element_bytes: float
    weight_bytes: float
    channel_multiple: int
    fp32: bool

    def __post_init__(self) -> None:
        """Refuse what is no physics."""
        for name in (
            "matrix_tera", "vector_tera", "memory_gb_per_s", "units", "element_bytes",
            "weight_bytes", "channel_multiple",
        ):  # fmt: skip
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}; the model needs a number above 0")


#: The dtype that a precision computes in, best known first.
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "tf32": ("tf32", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "int8": ("int8", "fp16", "fp32"),
}
_BYTES: Mapping[str, float] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
#: What convolutions' channels are padded to where the device does not say.
_MULTIPLES: Mapping[str, int] = {"cpu": 8, "gpu": 8, "npu": 16}
#: Multiprocessors, cores and caches where the device does not say.
_UNITS: Mapping[str, float] = {"cpu": 4, "gpu": 40, "npu": 1}
_CACHES_MIB: Mapping[str, float] = {"cpu": 8, "gpu": 4, "npu": 1}


def compute_dtype(precision: str) -> str:
    """Return the dtype that a precision computes in: "amp-fp16" fp16, "int8+bf16" int8.

    UsageError for a word that names none.

    >>> compute_dtype("int8-mixed")
    'int8'
    """
    for word in precision.replace("+", "-").split("-"):
        if word in _DTYPES:
            return word
    for known, dtype in (("w8a8", "int8"), ("w8a16", "int8"), ("default", "fp32")):
        if precision.startswith(known):
            return dtype
    raise UsageError(
        f"precision {precision!r} names no dtype; known are {', '.join(_DTYPES)}, and "
        "amp-fp16, int8+bf16 and the like"
    )


#: Physics to fit rows of a chip on whose maker states none: its efficiencies are then shares of
#: these, and good for nothing but that chip.
_NOMINAL: Mapping[str, tuple[Mapping[str, float], float]] = {
    "cpu": ({"fp32": 0.06, "fp16": 0.12, "int8": 0.24}, 15.0),
    "npu": ({"fp16": 10.0, "int8": 20.0}, 40.0),
}


def read_chip(device: Device, *, precision: str, threads: int = 0, nominal: bool = False) -> Chip:
    """Return a device's physics for a precision and a number of threads (0: all of its cores).

    Sustained peaks count before those of the data sheet. `nominal` fills in what a CPU's or NPU's
    file does not state, for fitting. UsageError where the device's file states too little; it says
    what to type.
    """
    dtype = compute_dtype(precision)
    sheet = dict(device.peak_tera_ops_per_s)
    memory = device.memory_gb_per_s
    cache_mib = getattr(device, "l3_cache_mib", None) or device.l2_cache_mib
    sheet |= getattr(device, "sustained_tera_ops_per_s", None) or {}
    units = getattr(device, "units", None)
    if device.name == "cpu" and not sheet:
        sheet, memory, units = _measured_physics(device.name)
    if nominal and device.kind in _NOMINAL:
        peaks, rate = _NOMINAL[device.kind]
        sheet = sheet or dict(peaks)
        memory = memory or rate
    found = next((name for name in _DTYPES[dtype] if name in sheet), None)
    if found is None and sheet and device.kind == "npu":
        found = max(sheet, key=lambda name: sheet[name])
    if found is None or memory is None:
        lacking = "memory_gb_per_s" if found is not None else f"peak_tera_ops_per_s.{dtype}"
        raise UsageError(
            f"{lacking} of {device.name} is not known, so there is no prediction; state it in "
            f"{device.name}.yaml with its source, or measure it there: litezoo ceilings --device "
            f"{device.name}"
        )
    kind = device.kind
    size = _BYTES[dtype]
    cores = float(units or _UNITS[kind])
    used = min(float(threads), cores) if threads and kind == "cpu" else cores
    matrix = sheet[found] * used / cores
    vector = matrix
    if kind == "gpu":
        vector = sheet.get("fp32", matrix)
    return Chip(
        kind=kind,
        matrix_tera=matrix,
        vector_tera=vector,
        memory_gb_per_s=memory,
        cache_mib=cache_mib or _CACHES_MIB[kind],
        units=used,
        element_bytes=size,
        weight_bytes=size,
        channel_multiple=_multiple(device, kind, found),
        fp32=dtype == "fp32" and found == "fp32",
    )


def _multiple(device: Device, kind: str, dtype: str) -> int:
    """Return what channels are padded to: of tensor cores and NPUs what is stated."""
    if kind == "gpu" and dtype == "fp32":
        return 1
    return device.limits.channel_multiple or _MULTIPLES[kind]


def _measured_physics(device: str) -> tuple[dict[str, float], float | None, float | None]:
    """Return the measured peaks, memory bandwidth and cores of a device, as far as known."""
    from .ceilings import read_ceilings

    measured = read_ceilings(device)
    if measured is None:
        return {}, None, None
    return (
        dict(measured.peak_tera_ops_per_s),
        measured.memory_gb_per_s,
        float(measured.threads),
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """The kernels of one network for one image, as arrays: one entry for each distinct kernel.

    `count` says how often; elements are numbers, not bytes. `depth` are the multiply-adds of an
    output, `vector` the element-wise operations; the channels are a group's, 0 where padding costs
    nothing; `groups` are those of grouped convolutions, else 0. `full` are the activations that
    autocast keeps in float32, `cast` the weights that it casts, in `casts` kernels more.
    """

    classes: NDArray[np.int64]
    count: Floats
    macs: Floats
    vector: Floats
    activations: Floats
    weights: Floats
    outputs: Floats
    depth: Floats
    in_channels: Floats
    out_channels: Floats
    groups: Floats
    winograd: NDArray[np.bool_]
    full: Floats
    cast: Floats
    casts: Floats
    image_elements: float
    total_weights: float
    total_macs: float

    @property
    def kernels(self) -> float:
        """How many kernels there are."""
        return float(self.count.sum())


def classify(kernel: Kernel) -> Class:
    """Return what a kernel is to the model."""
    shape = kernel.conv
    if kernel.kind == "pool":
        return "pool" if {"pool", "resize"} & set(kernel.kinds) else "reduce"
    if shape is None or kernel.kind not in ("conv", "pointwise", "grouped", "depthwise"):
        return "dense" if kernel.kind == "conv" else kernel.kind
    if shape.groups == 1 and shape.in_channels <= _IMAGE_CHANNELS:
        return "image"
    return "dense" if kernel.kind == "conv" else kernel.kind


def make_work(network: Network, kernels: Sequence[Kernel], *, distinct: bool = True) -> Work:
    """Return a network's kernels as arrays; `distinct` counts equal ones once, with their number.

    UsageError for a network without kernels.
    """
    if not kernels:
        raise UsageError(f"{network.name} has no kernels; there is nothing to predict")
    counts: dict[tuple[float, ...], int] = {}
    entries: list[tuple[float, ...]] = []
    for kernel in kernels:
        entry = _entry(kernel)
        if distinct and entry in counts:
            counts[entry] += 1
        else:
            counts[entry] = 1
            entries.append(entry)
    table = np.array(entries, dtype=np.float64)
    count = np.array([counts[e] if distinct else 1 for e in entries], dtype=np.float64)
    return Work(
        classes=table[:, 0].astype(np.int64),
        count=count,
        macs=table[:, 1],
        vector=table[:, 2],
        activations=table[:, 3],
        weights=table[:, 4],
        outputs=table[:, 5],
        depth=table[:, 6],
        in_channels=table[:, 7],
        out_channels=table[:, 8],
        groups=table[:, 9],
        winograd=table[:, 10].astype(bool),
        full=table[:, 11],
        cast=table[:, 12],
        casts=table[:, 13],
        image_elements=float(math.prod(network.resolution)),
        total_weights=float((table[:, 4] * count).sum()),
        total_macs=float((table[:, 1] * count).sum()),
    )


#: Operations for one element: what is not named takes one. Those with an exponential are
#: polynomials of about this many terms.
_OPERATIONS: Mapping[str, float] = dict.fromkeys(
    "elu erf exp gelu log mish selu sigmoid silu softmax softplus swish tanh".split(), 10.0
) | dict.fromkeys("div hardsigmoid hardswish native_layer_norm pow rsqrt sqrt".split(), 4.0)
_VECTOR_KINDS = frozenset(("activation", "add", "mul", "norm", "softmax"))


def _vector(kernel: Kernel, outputs: float) -> float:
    """Return a kernel's element-wise operations; a BatchNorm behind a convolution is folded."""
    weighted = kernel.kinds[0] in ("conv", "matmul")
    each = sum(
        _OPERATIONS.get(name.lower().strip("_"), 1.0)
        for name, kind in zip(kernel.ops, kernel.kinds, strict=True)
        if kind in _VECTOR_KINDS and not (weighted and kind == "norm")
    )
    return each * outputs


def _entry(kernel: Kernel) -> tuple[float, ...]:
    """Return one kernel's numbers, in the order of `Work`'s arrays."""
    place = float(_CLASS_PLACES[classify(kernel)])
    moved = float(kernel.read_elements + kernel.write_elements)
    shape = kernel.conv
    outputs = float(max(kernel.write_elements, 1))
    inputs = channels = 0.0
    winograd = False
    depth = kernel.macs / outputs if kernel.macs else 1.0
    if shape is not None:
        outputs = float(shape.out_channels * shape.out[0] * shape.out[1])
        inputs = shape.in_channels / shape.groups
        channels = shape.out_channels / shape.groups
        depth = inputs * shape.kernel[0] * shape.kernel[1]
        winograd = (
            shape.groups == 1
            and shape.kernel == (3, 3)
            and shape.stride == (1, 1)
            and shape.in_channels >= _WINOGRAD_CHANNELS
        )
        if shape.groups == shape.in_channels:
            inputs = channels = 0.0
    return (
        place, float(kernel.macs), _vector(kernel, outputs), moved,
        float(kernel.weight_elements), outputs, max(depth, 1.0), inputs, channels,
        float(shape.groups) if shape is not None and place == _CLASS_PLACES["grouped"] else 0.0,
        float(winograd), *_autocast(kernel),
    )  # fmt: skip


def _autocast(kernel: Kernel) -> tuple[float, float, float]:
    """Return what autocast adds: activations in float32, weights to cast, kernels that cast."""
    return (
        float(kernel.full_read_elements + kernel.full_write_elements),
        float(kernel.cast_elements),
        float(kernel.casts),
    )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question to the model: a network's work, in a batch."""

    work: Work
    batch: int


def _padded(channels: Floats, multiple: Floats | int) -> Floats:
    """Return by how much padding to a multiple grows a number of channels; 1 where there is none.

    >>> _padded(np.array([24.0, 8.0, 3.0, 0.0]), 16)
    array([1.33333333, 2.        , 5.33333333, 1.        ])
    """
    safe = np.where(channels > 0, channels, multiple)
    grown: Floats = np.ceil(safe / multiple) * multiple / safe
    return grown


class Costs:
    """Many samples, each on a chip, with all that does not depend on the parameters worked out.

    `chips` is one for each sample; they are of one kind. Times are in ms.
    """

    def __init__(
        self, samples: Sequence[Sample], chips: Sequence[Chip], *, mode: Mode
    ) -> None:  # fmt: skip
        if not samples or len(samples) != len(chips):
            raise UsageError("the model takes networks, and a chip for each")
        self.mode = mode
        self.in_turn = chips[0].kind == "cpu"
        works = [sample.work for sample in samples]
        self.rows = len(samples)
        self.row = np.repeat(np.arange(self.rows), [len(work.count) for work in works])
        self.batch = np.array([float(sample.batch) for sample in samples])
        batch = self.batch[self.row]

        def of_chip(name: str) -> Floats:
            found: Floats = np.array([float(getattr(chip, name)) for chip in chips])[self.row]
            return found

        def joined(name: str) -> Floats:
            found: Floats = np.concatenate([getattr(work, name) for work in works])
            return found

        self.classes = np.concatenate([work.classes for work in works])
        self.count = joined("count")
        self.winograd = joined("winograd") * of_chip("fp32") > 0
        depthwise = self.classes == _CLASS_PLACES["depthwise"]
        image = self.classes == _CLASS_PLACES["image"]
        peak = np.where(depthwise, of_chip("vector_tera"), of_chip("matrix_tera"))
        multiple = of_chip("channel_multiple")
        grouped = self.classes == _CLASS_PLACES["grouped"]
        inputs, outputs = joined("in_channels"), joined("out_channels")
        tiled = grouped & (of_chip("matrix_tera") > of_chip("vector_tera"))
        grown = _padded(outputs, np.where(tiled, _GROUP_TILE, multiple))
        grown *= np.where(image, 1.0, _padded(inputs, multiple))
        whole = self.classes <= _CLASS_PLACES["pointwise"]
        ragged = whole & ((inputs % 8 > 0) | (outputs % 8 > 0))
        ragged |= grouped & (inputs > _GROUP_TILE) & (inputs % _GROUP_TILE > 0)
        self.odd = ragged & (multiple > 1)
        self.compute_ms = 2e-9 * joined("macs") * batch * grown / peak
        self.vector_ms = 1e-9 * joined("vector") * batch / of_chip("vector_tera")
        self.idle = of_chip("units") / (joined("outputs") * batch)
        self.shallow = 1.0 / joined("depth")
        full, size = joined("full"), of_chip("element_bytes")
        moved = batch * ((joined("activations") - full) * size + full * 4.0)
        per_ms = 1e6 * of_chip("memory_gb_per_s")
        self.activation_ms = moved / per_ms
        weight_bytes = of_chip("weight_bytes")
        cast_bytes = 4.0 + size  # float32 is read, and what is computed with is written
        moved_weights = joined("weights") * weight_bytes + joined("cast") * cast_bytes
        self.weight_ms = moved_weights / per_ms
        cache = of_chip("cache_mib") * 2**20
        self.of_cache = (moved / cache) ** 2
        totals = np.array([work.total_weights for work in works])[self.row] * weight_bytes
        self.weights_of_cache = (totals / cache) ** 2
        weighted = self.classes <= _CLASS_PLACES["matmul"]
        self.launches = np.where(weighted, 1.0, 0.0)
        self.groups = joined("groups")
        self.other_launches = np.where(weighted, joined("casts"), 1.0)
        self.kernels = np.bincount(
            self.row,
            weights=self.count * (self.launches + self.other_launches),
            minlength=self.rows,
        )
        pixels = np.array([work.image_elements for work in works])
        self.images = self.batch * pixels / (3 * 224 * 224)

    def parts(self, values: Floats) -> tuple[Floats, Floats]:
        """Return each kernel's compute and memory time for parameter values (natural units)."""
        compute = self.compute_ms / values[_ARITHMETIC[self.classes]]
        idle = values[_PLACES["fill"]] * self.idle
        gain = 1.0 + (values[_PLACES["winograd"]] - 1.0) / (1.0 + idle)
        compute = compute * (1.0 + idle) * (1.0 + values[_PLACES["depth"]] * self.shallow)
        compute = np.where(self.winograd, compute / gain, compute)
        odd = np.where(self.odd, values[_PLACES["odd"]], 1.0)
        compute = compute * odd + self.vector_ms / values[_PLACES["vector"]]
        gain, share = values[_PLACES["cache"]] - 1.0, values[_PLACES["cache_share"]] ** 2
        activations = self.activation_ms / (1 + gain / (1 + self.of_cache / share))
        weights = self.weight_ms / (1 + gain / (1 + self.weights_of_cache / share))
        memory = activations * odd / values[_ACTIVATIONS[self.classes]]
        memory = memory + weights / values[_WEIGHTS[self.classes]]
        return compute, memory

    def kernel_ms(self, values: Floats) -> Floats:
        """Return the time of each distinct kernel, once."""
        compute, memory = self.parts(values)
        both = compute + memory if self.in_turn else np.sqrt(compute**2 + memory**2)
        total: Floats = both + self.launch_ms(values)
        return total

    def launch_ms(self, values: Floats) -> Floats:
        """Return what each distinct kernel takes besides its work, once."""
        own = values[_PLACES["launch_us"]] * self.launches
        other = values[_PLACES["other_launch_us"]] * self.other_launches
        found: Floats = 1e-3 * (own + other + values[_PLACES["group_us"]] * self.groups)
        return found

    def ms(self, values: Floats) -> Floats:
        """Return the time of each sample: a batch through the network."""
        device = np.bincount(
            self.row, weights=self.kernel_ms(values) * self.count, minlength=self.rows
        )
        host = 1e-3 * values[_PLACES["host_us"]] * self.kernels
        total = (device**4 + host**4) ** 0.25
        total = total + 1e-3 * values[_PLACES["copy_us"]] * self.images
        total = total + 1e-3 * values[_PLACES["constant_us"]]
        found: Floats = values[_PLACES["overall"]] * total
        return found

    def shares(self, values: Floats) -> Floats:
        """Return which share of its kernels' time each class takes, (rows, classes)."""
        each = self.kernel_ms(values) * self.count
        size = self.rows * len(_CLASS_NAMES)
        flat = np.bincount(self.row * len(_CLASS_NAMES) + self.classes, weights=each,
                           minlength=size)  # fmt: skip
        table = flat.reshape(self.rows, len(_CLASS_NAMES))
        found: Floats = table / table.sum(axis=1, keepdims=True)
        return found


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One kernel's part of a prediction, in the network's order.

    `bound` says what takes most of its time; `efficiency` is the share of the bound's peak (of
    arithmetic or of bandwidth) that the model gives it.
    """

    name: str
    kind: Class
    ms: float
    compute_ms: float
    memory_ms: float
    launch_ms: float
    bound: Literal["compute", "memory", "launch"]
    efficiency: float


def explain(
    network: Network,
    kernels: Sequence[Kernel],
    chip: Chip,
    values: Floats,
    *,
    batch: int,
    mode: Mode,
) -> tuple[KernelTime, ...]:
    """Return what each kernel takes, and why; their sum is the device's part of the prediction."""
    work = make_work(network, kernels, distinct=False)
    costs = Costs([Sample(work=work, batch=batch)], [chip], mode=mode)
    compute, memory = costs.parts(values)
    total = costs.kernel_ms(values)
    overall = values[_PLACES["overall"]]
    launches = costs.launch_ms(values)
    times = []
    for place, kernel in enumerate(kernels):
        c, m, launch = float(compute[place]), float(memory[place]), float(launches[place])
        if launch > max(c, m):
            bound: Literal["compute", "memory", "launch"] = "launch"
            ideal = max(costs.compute_ms[place], costs.activation_ms[place])
        elif c > m:
            bound, ideal = "compute", costs.compute_ms[place]
        else:
            bound, ideal = "memory", costs.activation_ms[place] + costs.weight_ms[place]
        ms = float(total[place] * overall)
        times.append(
            KernelTime(
                name=kernel.name,
                kind=_CLASS_NAMES[int(costs.classes[place])],
                ms=ms,
                compute_ms=c * float(overall),
                memory_ms=m * float(overall),
                launch_ms=float(launch * overall),
                bound=bound,
                efficiency=float(ideal) / ms if ms else 0.0,
            )
        )
    return tuple(times)
