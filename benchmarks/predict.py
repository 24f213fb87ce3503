"""What a network takes on a device, how sure that is, and how it is known.

A prediction says one of four things of itself:

    fitted       the model's parameters are fitted to rows of this device, runtime and precision
    anchored     so they are, and rows of the same family correct it
    transferred  the parameters are those of a related device or runtime, on this device's physics
    physics      nothing related has rows: defaults on this device's physics, a wide interval

The interval is where 80 % of the rows were when their family was left out of the fit (for
"transferred": when their device was), wider for networks unlike the rows. It is no promise.

Fits are looked up in the folders of LITEZOO_FITS, then in those that come with litezoo. Nothing
here imports torch, unless a network has to be traced.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litezoo.models.errors import CheckFailed, MissingError, UsageError, unknown_name
from litezoo.recipes.devices import Device, get_device, list_devices

from .fit import (
    Fit,
    Fitted,
    Prior,
    Row,
    Target,
    default_prior,
    family_of,
    fit_target,
    fits_folder,
    prior_of_fit,
    read_fits,
)  # fmt: skip
from .kernels import Kernel, make_kernels
from .latency import (
    CLASSES,
    PARAMETERS,
    Chip,
    Costs,
    Floats,
    KernelTime,
    Sample,
    Work,
    compute_dtype,
    explain,
    make_work,
    read_chip,
)  # fmt: skip
from .network import Network

if TYPE_CHECKING:
    from torch import nn

    from .evidence import Evidence

__all__ = [
    "Basis", "Kinship", "Prediction", "find_target", "fit_rows", "kernels_of", "kin_of",
    "known_fits", "list_targets", "nearest_fit", "network_work", "predict", "predict_network",
    "predict_networks", "read_user_rows", "target_of", "transfer_prior",
]  # fmt: skip

Basis = Literal["fitted", "anchored", "transferred", "physics"]
#: Rows from which on a fit of another generation is a better source than a small one of its own.
_RICH = 60
#: Rows that are so few that their quantiles say little: intervals are then wider.
_FEW = 5
#: Interval (log of the factor) where nothing was validated: from a third to three times.
_PHYSICS_INTERVAL = (-1.1, 1.1)
#: Least interval: two runs of the same published benchmark differ by this.
_LEAST_INTERVAL = 0.04
#: Runtimes that are the same engine beneath.
_KIN: Mapping[str, str] = {
    "paddle-trt": "tensorrt",
    "onnxruntime-tensorrt": "tensorrt",
    "torch-tensorrt": "tensorrt",
    "pytorch": "pytorch-compile",
    "timm-eager": "pytorch-eager",
    "torchvision-eager": "pytorch-eager",
    "tflite-qnn": "qnn",
    "onnxruntime-qnn": "qnn",
    "timm-openvino": "openvino",
    "torchvision-openvino": "openvino",
    "timm-onnxruntime": "onnxruntime",
    "torchvision-onnxruntime": "onnxruntime",
    "paddle-onednn": "openvino",
    "tflite": "paddle-lite",
}
#: Runtimes whose parameters serve another one for want of better, nearest first.
_NEIGHBOURS: Mapping[str, tuple[str, ...]] = {
    "openvino": ("onnxruntime", "pytorch-compile"),
    "onnxruntime": ("openvino", "ncnn", "paddle-lite"),
    "ncnn": ("paddle-lite", "onnxruntime"),
    "paddle-lite": ("ncnn", "onnxruntime"),
}


def _slug(runtime: str) -> str:
    return runtime.replace("_", "-")


def kin_of(runtime: str) -> str:
    """Return the engine beneath a runtime.

    >>> kin_of("paddle-trt"), kin_of("onnxruntime_tensorrt")
    ('tensorrt', 'tensorrt')
    """
    slug = _slug(runtime)
    return _KIN.get(slug, slug)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a batch takes, in ms, and between what (80 % of comparable rows were).

    `basis` says how it is known and `why` in a sentence; `source` names the device that it is
    transferred from, `rho` how well such a transfer kept the order of its rows (Spearman).
    `kernels` and `times` are there where an explanation was asked for.
    """

    model: str
    target: Target
    batch: int
    resolution: tuple[int, int, int]
    graph_form: str
    ms: float
    low_ms: float
    high_ms: float
    basis: Basis
    why: str
    source: str = ""
    rho: float | None = None
    kernels: tuple[Kernel, ...] = ()
    times: tuple[KernelTime, ...] = ()

    @property
    def images_per_s(self) -> float:
        """Images per second at this batch."""
        return 1e3 * self.batch / self.ms


# ------------------------------------------------------------------- fits and targets


def _folders() -> list[Path]:
    extra = [Path(one) for one in os.environ.get("LITEZOO_FITS", "").split(os.pathsep) if one]
    for folder in extra:
        if not folder.is_dir():
            raise UsageError(f"LITEZOO_FITS names {folder}, which is no folder")
    return [*extra, fits_folder()]


def known_fits(device: str | None = None) -> tuple[Fit, ...]:
    """Return the fits of a device, or all of them: the user's own first."""
    return tuple(fit for folder in _folders() for fit in _fits_in(folder, device))


def _fits_in(folder: Path, device: str | None) -> list[Fit]:
    found: list[Fit] = []
    files = sorted(folder.glob("*.json")) if device is None else [folder / f"{device}.json"]
    for file in files:
        if file.is_file() and not file.name.startswith("_"):
            found += _read(file, file.stat().st_mtime_ns)
    return found


@cache
def _read(file: Path, changed: int) -> tuple[Fit, ...]:
    return read_fits(file)


def target_of(fit: Fit) -> Target:
    """Return what a fit is of."""
    return Target(
        device=fit.device, runtime=fit.runtime, precision=fit.precision, layout=fit.layout,
        threads=fit.threads,
    )  # fmt: skip


def _newer(fit: Fit) -> tuple[tuple[int, ...], int]:
    """Return the order of fits of one target: the newest version, then the most rows."""
    parts = [int(part) for part in fit.version.split(".") if part.isdigit()]
    return tuple(parts), fit.rows


def _best_fit(target: Target) -> Fit | None:
    """Return a target's newest fit, of the first folder that has one: the user's own."""
    for folder in _folders():
        mine = [fit for fit in _fits_in(folder, target.device) if target_of(fit) == target]
        if mine:
            return max(mine, key=_newer)
    return None


def list_targets(device: str | None = None) -> tuple[Target, ...]:
    """Return what has a fit, of a device or of all, the best documented of each device first.

    Of a device that litezoo can build engines for, its first runtimes and precisions lead.
    """
    if device is not None and device not in list_devices():
        raise unknown_name("device", device, list_devices())
    fits = known_fits(device)
    order: dict[str, list[Fit]] = {}
    for fit in fits:
        order.setdefault(fit.device, []).append(fit)
    found: dict[Target, None] = {}
    for name, mine in order.items():
        rank = _ranking(get_device(name)) if name in list_devices() else _by_rows
        for fit in sorted(mine, key=rank):
            found[target_of(fit)] = None
    return tuple(found)


def _by_rows(fit: Fit) -> tuple[float, ...]:
    return (-fit.rows,)


#: Runtimes that run on any device, and are what one deploys on few.
_LAST = frozenset(("ncnn-vulkan",))


def _ranking(device: Device) -> Callable[[Fit], tuple[float, ...]]:
    """Return the order of a device's fits: what litezoo builds for it, then the most rows."""
    kins = [kin_of(runtime) for runtime in device.runtimes]
    dtypes = [compute_dtype(precision) for precision in device.precisions]

    def rank(fit: Fit) -> tuple[float, ...]:
        kin, dtype = kin_of(fit.runtime), compute_dtype(fit.precision)
        return (
            kin not in kins and kin in _LAST,
            fit.rows < 3 * _FEW,
            kins.index(kin) if kin in kins else len(kins),
            kin_of(fit.runtime) != _slug(fit.runtime),  # the engine itself before its wrappers
            dtypes.index(dtype) if dtype in dtypes else len(dtypes),
            -fit.threads,
            *(-part for part in _newer(fit)[0][:2]),
            -fit.rows,
        )

    return rank


def find_target(
    device: str,
    *,
    runtime: str | None = None,
    precision: str | None = None,
    layout: str | None = None,
    threads: int | None = None,
) -> Target:
    """Return the target that is meant: what is left open is what is known best on the device.

    UsageError for an unknown device or a precision that names no dtype.
    """
    known = get_device(device)
    if precision is not None:
        compute_dtype(precision)
    targets = list_targets(device)
    matching = [
        one
        for one in targets
        if (runtime is None or _slug(one.runtime) == _slug(runtime))
        and (precision is None or _same_precision(one.precision, precision))
        and (layout is None or one.layout == layout)
        and (threads is None or one.threads == threads)
    ]
    exact = [one for one in matching if precision is not None and one.precision == precision]
    found = next(iter(exact or matching), None)
    open_choice = runtime is None and precision is None and layout is None and threads is None
    if found is not None and open_choice and found.runtime in _LAST and known.runtimes:
        found = None  # what the device is made for serves better, though transferred
    if found is not None:
        return dataclasses.replace(found, precision=precision or found.precision)
    if runtime is None:
        same = [
            one
            for one in targets
            if (precision is None or one.precision == precision) and one.runtime not in _LAST
        ]
        runtime = (
            same[0].runtime if same
            else known.runtimes[0] if known.runtimes
            else targets[0].runtime if targets else "engine"
        )  # fmt: skip
    if precision is None:
        own = [one.precision for one in targets if _slug(one.runtime) == _slug(runtime)]
        floats = [one for one in known.precisions if compute_dtype(one) != "int8"]
        kept = known.precisions if known.kind == "npu" else floats  # NPUs are made for int8
        precision = next(iter(own or kept or known.precisions))
    return Target(
        device=device, runtime=_slug(runtime), precision=precision, layout=layout or "",
        threads=threads or 0,
    )  # fmt: skip


def _same_precision(one: str, other: str) -> bool:
    """Whether two precisions compute in the same dtype in the same way."""
    return compute_dtype(one) == compute_dtype(other) and one.startswith("amp") == other.startswith(
        "amp"
    )


# ------------------------------------------------------------------- what a prediction stands on


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What a target's predictions stand on: parameters, physics, and what is said of them."""

    target: Target
    chip: Chip
    values: Floats
    basis: Basis
    why: str
    interval: tuple[float, float]
    fit: Fit | None = None
    source: str = ""
    rho: float | None = None


def _ground(target: Target) -> _Ground:
    """Return what is known best for a target; MissingError where nothing is."""
    fit = _best_fit(target)
    if fit is None:  # int8+fp16 is what a fit calls int8
        same = [
            one
            for one in known_fits(target.device)
            if dataclasses.replace(target_of(one), precision="") == dataclasses.replace(
                target, precision="")
            and _same_precision(one.precision, target.precision)
        ]  # fmt: skip
        fit = max(same, key=_newer, default=None)
    if fit is not None:
        version = f" {fit.version}" if fit.version else ""
        few = 1 + _FEW / fit.rows if fit.rows < 3 * _FEW else 1.0
        return _Ground(
            target=target,
            chip=fit.chip,
            values=fit.vector,
            basis="fitted",
            why=(
                f"{fit.rows} rows of {fit.device} with {fit.runtime}{version}; families left out "
                f"were predicted within {fit.unseen.median:.0%} (median), "
                f"{fit.unseen.p90:.0%} (90 %)"
            ),
            interval=(few * fit.unseen.low, few * fit.unseen.high),
            fit=fit,
        )
    device = get_device(target.device)
    try:
        chip = read_chip(device, precision=target.precision, threads=target.threads)
    except UsageError as error:
        raise MissingError(f"nothing to predict {target} from: {error}") from error
    best = nearest_fit(target, device, known_fits())
    if best is None:
        return _Ground(
            target=target,
            chip=chip,
            values=default_prior(chip, mode=target.mode).mean,
            basis="physics",
            why=(
                f"no rows of {target.device} nor of a related device are known: the model's "
                "defaults on its physics; measure a few networks and refit: litezoo predict --fit "
                "ROWS"
            ),
            interval=_PHYSICS_INTERVAL,
        )
    kinship, fit = best
    values = transfer_prior(fit, chip, target=target).mean
    interval, rho, words = _experience(kinship)
    return _Ground(
        target=target,
        chip=chip,
        values=values,
        basis="transferred",
        why=(
            f"from {fit.device} with {fit.runtime} {fit.precision} ({fit.rows} rows; "
            f"{kinship}) by the physics of both{words}"
        ),
        interval=interval,
        source=fit.device,
        rho=rho,
    )


def transfer_prior(fit: Fit, chip: Chip, *, target: Target) -> Prior:
    """Return a fit's parameters for another chip: what a prediction by transfer uses.

    The image's copy is what the other measurement contained and stays behind.
    """
    prior = prior_of_fit(fit, chip, mode=target.mode)
    mean = prior.mean.copy()
    names = [one.name for one in PARAMETERS]
    if _slug(fit.runtime) != _slug(target.runtime):
        mean[names.index("copy_us")] = default_prior(chip, mode=target.mode).mean[
            names.index("copy_us")
        ]
    return Prior(mean=mean, trust=prior.trust, used=prior.used)


#: How a device that parameters are from is related, the nearest first.
Kinship = Literal["same device", "same generation", "same kind of device", "other runtime"]


def nearest_fit(target: Target, device: Device, fits: Iterable[Fit]) -> tuple[Kinship, Fit] | None:
    """Return the fit whose parameters serve a target without rows best, and how it is related."""
    generation = getattr(device, "generation", None)
    best: tuple[tuple[float, ...], Kinship, Fit] | None = None
    neighbours = (kin_of(target.runtime), *_NEIGHBOURS.get(kin_of(target.runtime), ()))
    dtype = compute_dtype(target.precision)
    for fit in fits:
        if fit.mode != target.mode or fit.chip.kind != device.kind or fit.rows < 8:
            continue
        same_device = fit.device == target.device
        other = _generation(fit.device)
        same_generation = generation is not None and other == generation
        kin = kin_of(fit.runtime)
        same_runtime = kin in neighbours
        if not same_runtime and device.kind == "npu" and not same_generation:
            continue
        same_dtype = compute_dtype(fit.precision) == dtype
        score = (
            neighbours.index(kin) if same_runtime else len(neighbours),
            _is_integrated(fit.device) != _is_integrated(target.device),
            not same_dtype,
            fit.precision.startswith("amp") != target.precision.startswith("amp"),
            fit.rows < _RICH and not same_device,
            not same_device,
            not same_generation,
            abs(_AGE.get(other or "", 0) - _AGE.get(generation or "", 0)),
            _slug(fit.runtime) != _slug(target.runtime),
            abs(fit.threads - target.threads),
            fit.layout != (target.layout or "nchw"),
            *(-part for part in _newer(fit)[0][:2]),
            -fit.rows,
        )
        kinship: Kinship = (
            "other runtime" if not same_runtime
            else "same device" if same_device
            else "same generation" if same_generation
            else "same kind of device"
        )  # fmt: skip
        if best is None or score < best[0]:
            best = (score, kinship, fit)
    return None if best is None else (best[1], best[2])


def _is_integrated(device: str) -> bool:
    """Whether a GPU shares its board's memory, and a slow CPU starts its kernels: Jetsons."""
    return device.startswith("jetson-")


#: The order of generations in time, to find the nearest (GPUs; CPUs by vector width).
_AGE: Mapping[str, int] = {
    "maxwell": 0, "pascal": 1, "volta": 2, "turing": 3, "ampere": 4, "ada": 5, "hopper": 6,
    "blackwell": 7, "avx2": 20, "avx512": 22, "avx512-vnni": 23,
}  # fmt: skip


def _generation(device: str) -> str | None:
    try:
        return getattr(get_device(device), "generation", None)
    except UsageError:
        return None


@cache
def _transfers() -> Mapping[str, Mapping[str, float]]:
    """Return what leaving devices out taught: by kinship low, high, rho and the number of rows."""
    file = fits_folder() / "_transfers.json"
    if not file.is_file():
        return {}
    try:
        found: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckFailed(
            f"{file} is no JSON ({error}); make it again: python -m litezoo.benchmarks.validate "
            "--write"
        ) from error
    return found


def _experience(kinship: Kinship) -> tuple[tuple[float, float], float | None, str]:
    """Return the interval of transfers of a kind, their Spearman, and both in words."""
    found = _transfers().get(kinship)
    if found is None:
        return _PHYSICS_INTERVAL, None, ""
    rho = found["rho"]
    return (
        (found["low"], found["high"]),
        rho,
        f"; such transfers had rho {rho:.2f} and a median error of {found['median']:.0%}",
    )


# ------------------------------------------------------------------- predicting


#: Works by network and what decides on its kernels: the report predicts each for a hundred targets.
_WORKS: dict[tuple[int, str, bool, bool, bool], tuple[Network, Work]] = {}


def network_work(network: Network, target: Target, *, on_gpu: bool, batch: int = 1) -> Work:
    """Return a network's kernels under a target's runtime as arrays; the same object's are kept."""
    key = (id(network), target.mode, target.autocast, on_gpu, batch > 1)
    if key not in _WORKS:
        kernels = kernels_of(network, target, on_gpu=on_gpu, batch=batch)
        _WORKS[key] = network, make_work(network, kernels)  # kept, so that no other has its id
    return _WORKS[key][1]


def kernels_of(
    network: Network, target: Target, *, on_gpu: bool, batch: int = 1
) -> tuple[Kernel, ...]:
    """Return the kernels that a target's runtime makes; PyTorch adds biases apart on a GPU.

    Under autocast norms compute in half precision, as in timm's benchmarks (--fast-norm), whose
    rows the fits are of.
    """
    if target.mode == "fused":
        kernels = make_kernels(network, target.mode)
        if kin_of(target.runtime) == "tensorrt":
            return tuple(part for kernel in kernels for part in _with_activation_apart(kernel))
        return kernels
    if target.autocast:
        network = _with_fast_norms(network)
    kernels = make_kernels(
        network, target.mode, amp=target.autocast, bias_apart=on_gpu, batch=batch
    )
    if target.mode == "compiled" and on_gpu:
        return tuple(_without_repeated(kernels))
    return kernels


#: Activations of two operators (x * gate(x)), which TensorRT computes in a kernel of their own.
_GATED = frozenset(("silu", "hardswish", "mish", "gelu", "swish", "hard_swish"))


def _with_activation_apart(kernel: Kernel) -> tuple[Kernel, ...]:
    """Return a convolution's kernel and that of a gated activation behind it, if it has one."""
    gated = [place for place, name in enumerate(kernel.ops) if name.lower() in _GATED]
    if kernel.kinds[0] not in ("conv", "matmul") or not gated:
        return (kernel,)
    first = gated[0]
    own = dataclasses.replace(kernel, ops=kernel.ops[:first], kinds=kernel.kinds[:first])
    apart = dataclasses.replace(
        kernel,
        kind="elementwise",
        ops=kernel.ops[first:],
        kinds=kernel.kinds[first:],
        macs=0,
        weight_elements=0,
        read_elements=kernel.write_elements,
        conv=None,
    )
    return own, apart


def _without_repeated(kernels: Sequence[Kernel]) -> Iterator[Kernel]:
    """Yield the kernels but BatchNorms whose map is only read by a mean and by a product with it.

    On a GPU TorchInductor repeats a BatchNorm where its map is used again (a squeeze-and-
    excitation's product) rather than writing it. With an activation that uses its input twice
    (SiLU, hard-swish) it is too long for that.
    """
    for place, kernel in enumerate(kernels):
        behind = kernels[place + 1] if place + 1 < len(kernels) else None
        if (
            kernel.ops == ("native_batch_norm",)
            and behind is not None
            and behind.ops == ("mean",)
            and behind.read_elements == kernel.write_elements
        ):
            continue
        yield kernel


def _with_fast_norms(network: Network) -> Network:
    if not any(op.sensitive and op.kind == "norm" for op in network.ops):
        return network
    ops = tuple(
        dataclasses.replace(op, sensitive=False) if op.kind == "norm" else op for op in network.ops
    )
    return dataclasses.replace(network, ops=ops)


def predict(
    model: str | Path | nn.Module,
    *,
    device: str,
    runtime: str | None = None,
    precision: str | None = None,
    batch: int = 1,
    resolution: int | None = None,
    graph_form: Literal["train", "deploy"] = "deploy",
    layout: str | None = None,
    threads: int | None = None,
) -> Prediction:
    """Return what a batch of a network takes on a device, kernel by kernel.

    `model` is a name of the catalogue, "timm:<name>", "torchvision:<name>", an ONNX file or a
    module; what is left open of the target is what is known best on the device. UsageError for
    unknown names, MissingError where the device has neither rows nor physics.
    """
    from .tracing import find_network

    target = find_target(
        device, runtime=runtime, precision=precision, layout=layout, threads=threads
    )
    network = find_network(model, graph_form=graph_form, resolution=resolution)
    return predict_network(network, target, batch=batch, graph_form=graph_form, with_kernels=True)


def predict_network(
    network: Network,
    target: Target,
    *,
    batch: int = 1,
    graph_form: str = "deploy",
    with_kernels: bool = False,
) -> Prediction:
    """Return what a batch of a network takes; `with_kernels` adds the explanation."""
    found = predict_networks([network], target, batch=batch, graph_form=graph_form)[0]
    if not with_kernels:
        return found
    ground = _ground(target)
    kernels = kernels_of(network, target, on_gpu=ground.chip.kind == "gpu", batch=batch)
    times = explain(network, kernels, ground.chip, ground.values, batch=batch, mode=target.mode)
    return dataclasses.replace(found, kernels=kernels, times=times)


def predict_networks(
    networks: Sequence[Network], target: Target, *, batch: int = 1, graph_form: str = "deploy"
) -> tuple[Prediction, ...]:
    """Return what a batch of each network takes. The networks' names are the models'.

    UsageError for a batch below 1; MissingError where neither fit nor physics are known.
    """
    if batch < 1:
        raise UsageError(f"batch is {batch}; it is a whole number above 0")
    if not networks:
        return ()
    ground = _ground(target)
    on_gpu = ground.chip.kind == "gpu"
    works = [network_work(one, target, on_gpu=on_gpu, batch=batch) for one in networks]
    costs = Costs(
        [Sample(work=work, batch=batch) for work in works],
        [ground.chip] * len(works),
        mode=target.mode,
    )
    times = costs.ms(ground.values)
    shares = costs.shares(ground.values)
    return tuple(
        _prediction(network, ground, batch, graph_form, float(ms), share, work)
        for network, ms, share, work in zip(networks, times, shares, works, strict=True)
    )


def _prediction(
    network: Network,
    ground: _Ground,
    batch: int,
    graph_form: str,
    ms: float,
    shares: Floats,
    work: Work,
) -> Prediction:
    """Return one network's prediction with its correction and its interval."""
    low, high = ground.interval
    basis, why = ground.basis, ground.why
    fit = ground.fit
    if fit is not None:
        correction, members = fit.correction(network.name)
        if members:
            ms *= math.exp(correction)
            basis = "anchored"
            name = family_of(network.name)
            why += (
                f"; {members} network{'s' if members > 1 else ''} of the family {name} "
                f"correct{'s' if members == 1 else ''} it by {math.expm1(correction):+.0%}"
            )
            if fit.anchored is not None:
                low, high = max(low, fit.anchored.low), min(high, fit.anchored.high)
        beyond = _beyond(fit, batch, work, shares)
        if beyond:
            factor = 1 + sum(amount for amount, _ in beyond)
            low, high = low * factor, high * factor
            why += f"; less sure, since {' and '.join(reason for _, reason in beyond)}"
    low, high = min(low, -_LEAST_INTERVAL), max(high, _LEAST_INTERVAL)
    return Prediction(
        model=network.name,
        target=ground.target,
        batch=batch,
        resolution=network.resolution,
        graph_form=graph_form,
        ms=ms,
        low_ms=ms * math.exp(low),
        high_ms=ms * math.exp(high),
        basis=basis,
        why=why,
        source=ground.source,
        rho=ground.rho,
    )


def _beyond(fit: Fit, batch: int, work: Work, shares: Floats) -> list[tuple[float, str]]:
    """Return in what a network is unlike the rows of a fit: how much wider that makes it, why."""
    found = []
    gmacs = batch * work.total_macs / 1e9
    least, most = fit.gmacs
    if gmacs and not least / 1.5 <= gmacs <= most * 1.5:
        distance = abs(math.log10(gmacs / (least if gmacs < least else most)))
        found.append((distance, f"its {gmacs:.3g} GMACs a batch are not between the rows' "
                                f"{least:.3g} and {most:.3g}"))  # fmt: skip
    fewest, largest = fit.batches
    if not fewest <= batch <= largest:
        distance = abs(math.log10(batch / (fewest if batch < fewest else largest)))
        rows = f"{fewest}" if fewest == largest else f"{fewest} to {largest}"
        found.append((0.7 * distance, f"the rows are of batch {rows}"))
    for place, name in enumerate(CLASSES):
        excess = float(shares[place]) - fit.greatest.get(name, 0.0)
        if excess > 0.05:
            found.append((2 * excess, f"no row spends {shares[place]:.0%} on {name}"))
    return found


# ------------------------------------------------------------------- a user's own rows


def read_user_rows(
    file: Path, *, target: Target, graph_form: str = "deploy"
) -> tuple[Evidence, ...]:
    """Read a user's rows: result rows of `litezoo bench` (.jsonl) or a table (.csv).

    A table has a header with `model` and `ms` (of a batch), and may have `batch`, `resolution` (the
    side) and `graph_form`. Of result rows those of the target count. UsageError with file and line
    for anything else.
    """
    if not file.is_file():
        raise UsageError(f"no file {file}; give a .csv with model,ms or a .jsonl of litezoo bench")
    if file.suffix == ".jsonl":
        return _result_rows(file, target)
    return _table_rows(file, target, graph_form)


def _result_rows(file: Path, target: Target) -> tuple[Evidence, ...]:
    from .results import latest, read_rows

    rows = tuple(
        _evidence(
            target, model=row.model, batch=row.batch, side=row.resolution[-1], ms=row.p50_ms,
            graph_form=row.graph_form, source=file.name,
        )
        for row in latest(read_rows([file]))
        if row.scope == "engine"
        and row.streams == 1
        and row.device == target.device
        and _slug(row.runtime) == _slug(target.runtime)
        and row.precision == target.precision
        and row.threads == (target.threads or row.threads)
    )  # fmt: skip
    if not rows:
        raise UsageError(f"{file} has no rows of {target}; say which: --runtime, --precision")
    return rows


def _table_rows(file: Path, target: Target, graph_form: str) -> tuple[Evidence, ...]:
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        known = {"model", "ms", "batch", "resolution", "graph_form"}
        columns = set(reader.fieldnames or ())
        if not {"model", "ms"} <= columns or not columns <= known:
            raise UsageError(
                f"{file} has the columns {', '.join(sorted(columns)) or 'none'}; needed are model "
                "and ms, allowed are batch, resolution and graph_form"
            )
        rows = []
        for line in reader:
            try:
                ms, batch = float(line["ms"]), int(line.get("batch") or 1)
                side = int(line.get("resolution") or 0)
                form = line.get("graph_form") or graph_form
                if not 0 < ms < math.inf or batch < 1 or side < 0:
                    raise ValueError("ms and batch are above 0")
                if form not in ("train", "deploy"):
                    raise ValueError(f"graph_form is {form!r}, allowed are train and deploy")
            except (ValueError, TypeError) as error:
                raise UsageError(f"{file}:{reader.line_num} is no row: {error}") from error
            rows.append(
                _evidence(
                    target,
                    model=line["model"],
                    batch=batch,
                    side=side,
                    ms=ms,
                    graph_form=form,
                    source=file.name,
                )
            )
    return tuple(rows)


def _evidence(
    target: Target, *, model: str, batch: int, side: int, ms: float, graph_form: str, source: str
) -> Evidence:
    from .evidence import Evidence

    return Evidence(
        model=model, device=target.device, runtime=target.runtime, runtime_version="",
        precision=target.precision, layout=target.layout, graph_form=graph_form, batch=batch,
        resolution=side, threads=target.threads, ms=ms, images_per_s=1e3 * batch / ms,
        kind="measured", source=source, note="",
    )  # fmt: skip


def fit_rows(
    rows: Sequence[Evidence],
    *,
    target: Target,
    network_of: Callable[[Evidence], Network] | None = None,
) -> Fitted:
    """Fit a target to rows, starting from what is known of it or its relatives.

    Rows of models that cannot be built are left out; `Fit.left_out` counts them and its `note`
    names them. UsageError where fewer than three rows are left.
    """
    device = get_device(target.device)
    chip = read_chip(device, precision=target.precision, threads=target.threads, nominal=True)
    find = _network_of if network_of is None else network_of
    usable: list[Row] = []
    lost: dict[str, str] = {}
    for row in rows:
        try:
            network = find(row)
        except (UsageError, MissingError) as error:
            lost[row.model] = str(error)
            continue
        work = network_work(network, target, on_gpu=chip.kind == "gpu", batch=row.batch)
        usable.append(Row(model=row.model, work=work, batch=row.batch, ms=row.ms))
    known = _best_fit(target)
    if known is None and (best := nearest_fit(target, device, known_fits())) is not None:
        known = best[1]
    prior = None if known is None else transfer_prior(known, chip, target=target)
    note = ""
    if lost:
        first = next(iter(lost))
        note = f"left out: {', '.join(lost)} ({first}: {lost[first]})"
    return fit_target(
        target,
        usable,
        chip,
        prior=prior,
        sources=sorted({row.source for row in rows}),
        left_out=len(rows) - len(usable),
        note=note,
    )


def _network_of(row: Evidence) -> Network:
    """Return the network of a row: its graph form, at its resolution (0: its own)."""
    from .tracing import find_network

    form: Literal["train", "deploy"] = "train" if row.graph_form == "train" else "deploy"
    return find_network(row.model, graph_form=form, resolution=row.resolution or None)
