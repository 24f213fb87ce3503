"""What a GPU does behind its GPU-Util: activity, work, power, and where the time goes.

nvidia-smi's GPU-Util is the share of time in which at least one kernel was running, be it on one
multiprocessor (SM) of a hundred. One thread that spins reads 100 %::

    GPU-Util     ####################   a kernel was running
    SM active    #                      of all SMs, those that had work
    tensor       .                      ... whose tensor cores worked
    DRAM         .                      of the memory's bandwidth

`watch_gpu` reads GPU-Util together with what NVML knows beside: the counters of GPM (GPUs from
Hopper on), power, energy, clock, heat. `achieve` sets the work that was done meanwhile against the
device file's peaks, `profile_kernels` says which kernels took the time (torch's profiler, CUPTI),
and `explain` puts all of it into sentences.

GPU-Util and power are means over up to a second before they are read (NVML's reference:
nvmlUtilization_t, nvmlDeviceGetPowerUsage), so readings of the first second are left out where
there are later ones; the energy counter moves in steps of about 0.1 s, so a shorter watch than a
second has no energy.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from litezoo.models.errors import MissingError, UsageError, require
from litezoo.recipes.devices import Device, get_device, list_devices

__all__ = [
    "KINDS",
    "Achieved",
    "GpuCounters",
    "KernelProfile",
    "Watch",
    "Work",
    "achieve",
    "explain",
    "find_device",
    "kernel_kind",
    "kernel_shares",
    "profile_kernels",
    "summarize_trace",
    "watch_gpu",
    "watch_runs",
]

_Value = TypeVar("_Value")

SETTLE_S = 1.0  # GPU-Util and power look back that far
SHORTEST_GPM_S = 0.1  # two samples of GPM need that distance
SHORTEST_ENERGY_S = 1.0

#: The metric of GPM that each field is read from.
_GPM: Mapping[str, str] = {
    "engine_active_percent": "NVML_GPM_METRIC_GRAPHICS_UTIL",
    "sm_active_percent": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy_percent": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor_active_percent": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram_active_percent": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}
#: What holds a clock back (bits of NVML's clock reasons); idling and a chosen clock do not.
_SLOWDOWNS: Mapping[str, str] = {
    "nvmlClocksThrottleReasonSwPowerCap": "the power limit",
    "nvmlClocksThrottleReasonHwSlowdown": "the board (heat or power)",
    "nvmlClocksThrottleReasonSyncBoost": "a slower GPU that it is kept in step with",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "heat (the driver)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "heat (the chip)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "the server's power brake",
}
#: What a field is called in a sentence.
_WORDS: Mapping[str, str] = {
    "gpu_util_percent": "GPU-Util",
    "engine_active_percent": "engine activity",
    "sm_active_percent": "SM activity",
    "sm_occupancy_percent": "SM occupancy",
    "tensor_active_percent": "tensor activity",
    "dram_active_percent": "DRAM activity",
    "power_w": "power",
    "power_limit_w": "power limit",
    "energy_j": "energy",
    "temperature_c": "temperature",
    "sm_clock_mhz": "clock",
    "sm_clock_max_mhz": "highest clock",
    "throttled": "reasons for its clock",
}


@dataclass(frozen=True, kw_only=True)
class GpuCounters:
    """What NVML counted on one GPU over `seconds`; None where it cannot (`why_not` by field).

    `gpu_util_percent` is nvidia-smi's GPU-Util and `engine_active_percent` the same question put to
    GPM over exactly these seconds. `sm_active_percent` is the share of SMs that had work, the mean
    over time; `sm_occupancy_percent` of the warps that fit those that were there;
    `tensor_active_percent` and `dram_active_percent` are of what the chip could do. `power_w` is
    energy over time where energy is counted, else the mean of the readings; `temperature_c` the
    highest; `sm_clock_mhz` the mean; `throttled` maps what held the clock back to the percentage of
    the `samples` readings that saw it.
    """

    gpu: str
    uuid: str
    driver: str
    seconds: float
    samples: int
    gpu_util_percent: float | None = None
    engine_active_percent: float | None = None
    sm_active_percent: float | None = None
    sm_occupancy_percent: float | None = None
    tensor_active_percent: float | None = None
    dram_active_percent: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    sm_clock_max_mhz: float | None = None
    throttled: Mapping[str, float] = field(default_factory=dict)
    why_not: Mapping[str, str] = field(default_factory=dict)


class Watch:
    """What `watch_gpu` gives: `counters`, once the block has ended."""

    def __init__(self) -> None:
        self._counters: GpuCounters | None = None

    @property
    def counters(self) -> GpuCounters:
        """Return what was counted; UsageError while the GPU is still being watched."""
        if self._counters is None:
            raise UsageError("the GPU has not been watched to the end; read the counters after "
                             "the block of `with watch_gpu() as watch:`")  # fmt: skip
        return self._counters


# ------------------------------------------------------------------------------- watching


@contextmanager
def watch_gpu(gpu: int | str = 0, *, period_s: float = 0.1) -> Iterator[Watch]:
    """Watch a GPU while the block runs; its `counters` are there when the block has ended.

    `gpu` is the number that nvidia-smi shows (CUDA's order may be another one) or a UUID, of a GPU
    or a MIG slice. A thread reads every `period_s`; the GPU's settings are left alone. MissingError
    without nvidia-ml-py, driver or GPU; UsageError for one that is not there::

        with watch_gpu() as watch:
            work()
        print(watch.counters.sm_active_percent)
    """
    if not period_s > 0:
        raise UsageError(f"period_s is {period_s}; the time between readings is above 0")
    nvml = require("pynvml", purpose="reading a GPU's counters", extra="gpu")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise MissingError(
            f"a GPU's counters need an NVIDIA driver, which does not answer here ({_said(error)}); "
            "run this where `nvidia-smi` works"
        ) from error
    try:
        watch, watched = Watch(), _Watched(nvml, gpu)
        stop = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="watch_gpu") as pool:
            try:
                watched.start()
                polling = pool.submit(_poll, watched, stop, period_s)
                yield watch
                stop.set()
                polling.result()
                watch._counters = watched.finish()
            finally:
                stop.set()
                watched.release()
    finally:
        nvml.nvmlShutdown()


def watch_runs(
    run: Callable[[], object], *, seconds: float = 3.0, gpu: int | str = 0
) -> tuple[int, GpuCounters]:
    """Repeat `run`, which waits for its own end, for `seconds`; return how often, and the counters.

    What a session's `run(batch)` does, copies to the GPU and back included.
    """
    if not seconds >= SHORTEST_ENERGY_S:
        raise UsageError(f"seconds is {seconds:g}; power and energy need {SHORTEST_ENERGY_S:g}")
    runs = 0
    with watch_gpu(gpu) as watch:
        end = time.perf_counter() + seconds
        while not runs or time.perf_counter() < end:
            run()
            runs += 1
    return runs, watch.counters


def _poll(watched: _Watched, stop: threading.Event, period_s: float) -> None:
    while not stop.wait(period_s):
        watched.sample()


def _said(error: Exception) -> str:
    """Return what NVML says of an error, as the middle of a sentence."""
    return str(error).strip().rstrip(".") or type(error).__name__


def _name(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What is read every now and then; `at_s` after the start."""

    at_s: float
    util_percent: float | None
    power_w: float | None
    temperature_c: float | None
    clock_mhz: float | None
    reasons: int | None


class _Watched:
    """One GPU, or one MIG slice of it, through NVML; an answer NVML refuses is a reason."""

    def __init__(self, nvml: Any, gpu: int | str) -> None:
        self._nvml = nvml
        self._why_not: dict[str, str] = {}
        self._readings: list[_Reading] = []
        self._gpm: list[Any] = []
        handle, slice_of = _find(nvml, gpu)
        self._handle = handle
        #: The whole GPU: a slice has no clock and no sensors of its own.
        self._board = handle if slice_of is None else slice_of
        self._instance: int | None = None
        if slice_of is not None:
            self._instance = self._ask("instance", lambda: nvml.nvmlDeviceGetGpuInstanceId(handle))
        self._start_s = self._seconds = 0.0
        self._energy_mj: int | None = None

    def _ask(self, what: str, call: Callable[[], _Value]) -> _Value | None:
        """Return NVML's answer, or None with the first reason why there is none."""
        try:
            return call()
        except self._nvml.NVMLError as error:
            self._why_not.setdefault(what, f"NVML says: {_said(error)}")
            return None

    @property
    def _is_slice(self) -> bool:
        return self._board is not self._handle

    def start(self) -> None:
        """Take the first sample of everything."""
        nvml = self._nvml
        if self._is_slice:
            for what in ("gpu_util_percent", "power_w", "power_limit_w", "energy_j"):
                self._why_not[what] = "it is counted for whole GPUs, and this is a MIG slice"
        self._start_gpm()
        if not self._is_slice:
            self._energy_mj = self._ask(
                "energy_j", lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._board))
            )
        self._start_s = time.perf_counter()
        self.sample()

    def sample(self) -> None:
        """Read what has no counter: GPU-Util, power, heat, clock and what holds it back."""
        nvml, board = self._nvml, self._board
        at_s = time.perf_counter() - self._start_s
        util = power_mw = None
        if not self._is_slice:
            util = self._ask(
                "gpu_util_percent", lambda: float(nvml.nvmlDeviceGetUtilizationRates(board).gpu)
            )
            power_mw = self._ask("power_w", lambda: float(nvml.nvmlDeviceGetPowerUsage(board)))
        self._readings.append(
            _Reading(
                at_s=at_s,
                util_percent=util,
                power_w=None if power_mw is None else power_mw / 1e3,
                temperature_c=self._ask(
                    "temperature_c",
                    lambda: float(nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU)),
                ),
                clock_mhz=self._ask(
                    "sm_clock_mhz",
                    lambda: float(nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM)),
                ),
                reasons=self._ask("throttled", self._reasons),
            )
        )

    def _reasons(self) -> int:
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(self._board))
        except nvml.NVMLError_FunctionNotFound:  # drivers before 535
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._board))

    # --------------------------------------------------------------------------- GPM

    def _start_gpm(self) -> None:
        nvml = self._nvml
        try:
            is_there = bool(nvml.nvmlGpmQueryDeviceSupport(self._board).isSupportedDevice)
            reason = "GPUs have NVML's GPM counters from Hopper (H100) on, and this one has none"
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound) as error:
            is_there = False
            reason = (
                "NVML's GPM counters need a GPU from Hopper (H100) on and a driver that knows "
                f"them; NVML: {_said(error)}"
            )
        except nvml.NVMLError as error:
            is_there, reason = False, f"NVML says: {_said(error)}"
        if is_there and self._is_slice and self._instance is None:
            is_there, reason = False, self._why_not["instance"]
        if is_there:
            try:
                self._gpm = [nvml.nvmlGpmSampleAlloc()]
                self._gpm.append(nvml.nvmlGpmSampleAlloc())
                self._sample_gpm(self._gpm[0])
                return
            except nvml.NVMLError as error:
                reason = f"NVML says: {_said(error)}"
                self.release()
        for what in _GPM:
            self._why_not[what] = reason

    def _sample_gpm(self, sample: Any) -> None:
        if self._is_slice:
            self._nvml.nvmlGpmMigSampleGet(self._board, self._instance, sample)
        else:
            self._nvml.nvmlGpmSampleGet(self._board, sample)

    def _read_gpm(self) -> dict[str, float]:
        """Return the counters between the two samples, those that there are."""
        nvml, found = self._nvml, {}
        if not self._gpm:
            return {}
        if self._seconds < SHORTEST_GPM_S:
            reason = f"GPM needs {SHORTEST_GPM_S:g} s, and this was {self._seconds:.3f} s"
            self._why_not.update(dict.fromkeys(_GPM, reason))
            return {}
        get = nvml.c_nvmlGpmMetricsGet_t()
        get.version = nvml.NVML_GPM_METRICS_GET_VERSION
        get.numMetrics = len(_GPM)
        get.sample1, get.sample2 = self._gpm
        for index, metric in enumerate(_GPM.values()):
            get.metrics[index].metricId = getattr(nvml, metric)
        try:
            self._sample_gpm(self._gpm[1])
            nvml.nvmlGpmMetricsGet(get)
        except nvml.NVMLError as error:
            self._why_not.update(dict.fromkeys(_GPM, f"NVML says: {_said(error)}"))
            return {}
        for index, what in enumerate(_GPM):
            answer = get.metrics[index]
            if answer.nvmlReturn != nvml.NVML_SUCCESS:
                self._why_not[what] = f"NVML says: {_said(nvml.NVMLError(answer.nvmlReturn))}"
            elif not 0 <= answer.value <= 101:  # NaN is not either
                self._why_not[what] = f"GPM answered {answer.value:g}, which is no percentage"
            else:
                found[what] = round(min(answer.value, 100.0), 2)
        return found

    def release(self) -> None:
        """Give GPM's samples back."""
        samples, self._gpm = self._gpm, []
        for sample in samples:
            self._ask("release", partial(self._nvml.nvmlGpmSampleFree, sample))

    # --------------------------------------------------------------------------- the sum

    def finish(self) -> GpuCounters:
        """Take the last sample of everything and return what was counted."""
        nvml, board = self._nvml, self._board
        self._seconds = time.perf_counter() - self._start_s
        gpm = self._read_gpm()
        energy_j = self._read_energy()
        self.sample()
        power = self._mean("power_w") if energy_j is None else energy_j / self._seconds
        temperatures = [r.temperature_c for r in self._readings if r.temperature_c is not None]
        limit_mw = None
        if not self._is_slice:
            limit_mw = self._ask(
                "power_limit_w", lambda: float(nvml.nvmlDeviceGetEnforcedPowerLimit(board))
            )
        highest = self._ask(
            "sm_clock_max_mhz",
            lambda: float(nvml.nvmlDeviceGetMaxClockInfo(board, nvml.NVML_CLOCK_SM)),
        )
        values: dict[str, float | None] = {
            "gpu_util_percent": self._mean("util_percent"),
            "power_w": power,
            "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
            "energy_j": energy_j,
            "temperature_c": max(temperatures, default=None),
            "sm_clock_mhz": self._mean("clock_mhz"),
            "sm_clock_max_mhz": highest,
            **{what: gpm.get(what) for what in _GPM},
        }
        throttled = self._throttled()
        known = {what for what, value in values.items() if value is not None}
        if throttled is not None:
            known.add("throttled")
        return GpuCounters(
            gpu=_name(self._ask("name", lambda: nvml.nvmlDeviceGetName(self._handle)) or "unknown"),
            uuid=_name(self._ask("uuid", lambda: nvml.nvmlDeviceGetUUID(self._handle)) or ""),
            driver=_name(self._ask("driver", nvml.nvmlSystemGetDriverVersion) or "unknown"),
            seconds=round(self._seconds, 6),
            samples=len(self._readings),
            throttled=throttled or {},
            why_not={
                what: reason
                for what, reason in self._why_not.items()
                if what in _WORDS and what not in known
            },
            **{k: None if v is None else round(v, 3) for k, v in values.items()},
        )

    def _read_energy(self) -> float | None:
        """Return the joules since the start."""
        if self._energy_mj is None:
            return None
        if self._seconds < SHORTEST_ENERGY_S:
            self._why_not["energy_j"] = (
                f"the energy counter needs {SHORTEST_ENERGY_S:g} s, and this was "
                f"{self._seconds:.3f} s"
            )
            return None
        after_mj = self._ask(
            "energy_j",
            lambda: int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board)),
        )
        if after_mj is None:
            return None
        if after_mj <= self._energy_mj:
            self._why_not["energy_j"] = "the energy counter did not move, or was set back"
            return None
        return (after_mj - self._energy_mj) / 1e3

    def _mean(self, what: str) -> float | None:
        """Return the mean of a reading, without the first second where there is more."""
        known = [(r.at_s, value) for r in self._readings if (value := getattr(r, what)) is not None]
        settled = [value for at_s, value in known if at_s >= SETTLE_S]
        values = settled or [value for _, value in known[-1:]]
        return sum(values) / len(values) if values else None

    def _throttled(self) -> dict[str, float] | None:
        bits = [r.reasons for r in self._readings if r.reasons is not None]
        if not bits:
            return None
        shares = {
            words: 100 * sum(bool(b & getattr(self._nvml, name)) for b in bits) / len(bits)
            for name, words in _SLOWDOWNS.items()
        }
        return {words: round(share, 1) for words, share in shares.items() if share}


def _find(nvml: Any, gpu: int | str) -> tuple[Any, Any | None]:
    """Return NVML's handle of a GPU or slice, and of the GPU that a slice is of."""
    if isinstance(gpu, int):
        count = nvml.nvmlDeviceGetCount()
        if count == 0:
            raise MissingError("NVML finds no NVIDIA GPU here; run this where `nvidia-smi` shows "
                               "one")  # fmt: skip
        if not 0 <= gpu < count:
            raise UsageError(f"there is no GPU {gpu}; nvidia-smi numbers them 0 to {count - 1}")
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
    else:
        handle = _by_uuid(nvml, gpu)
    try:
        if nvml.nvmlDeviceIsMigDeviceHandle(handle):
            return handle, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
        if mode != nvml.NVML_DEVICE_MIG_ENABLE:
            return handle, None
        places = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except nvml.NVMLError:  # a GPU or driver that knows no MIG
        return handle, None
    slices = []
    for place in range(places):
        try:
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
        except nvml.NVMLError:  # nothing in this place
            continue
    if len(slices) > 1:
        uuids = ", ".join(_name(nvml.nvmlDeviceGetUUID(one)) for one in slices)
        raise UsageError(f"GPU {gpu} is cut into {len(slices)} MIG slices; name one: {uuids}")
    return (slices[0], handle) if slices else (handle, None)


def _by_uuid(nvml: Any, uuid: str) -> Any:
    """Return the handle of a UUID, which CUDA tells without NVML's prefix."""
    has_prefix = uuid.startswith(("GPU-", "MIG-"))
    for name in (uuid,) if has_prefix else (f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            continue
    raise UsageError(f"there is no GPU {uuid}; the UUIDs are what `nvidia-smi -L` lists")


#: Words in a GPU's name that change its peaks, unless the device file's title has them, too.
_OTHER_BOARDS = ("pcie", "nvl", "mig", "laptop", "max", "d", "super", "ti")


def find_device(gpu: str) -> Device | None:
    """Return the device file of a GPU by the name that NVML or CUDA gives it, None without one.

    A board of another kind has other peaks: "NVIDIA H100 PCIe" is not h100, an SXM module, nor
    "NVIDIA A100-SXM4-80GB" a100, which has 40 GB; a MIG slice has a part of them.

    >>> find_device("NVIDIA H200").name, find_device("NVIDIA GeForce RTX 4090").name
    ('h200', 'rtx4090')
    """
    words = re.findall("[a-z0-9]+", gpu.lower())
    named = {*words, *("".join(pair) for pair in itertools.pairwise(words))}  # "rtx 4090", too
    memory = re.search(r"\b(\d+) ?gb\b", gpu.lower())
    for name in named.intersection(list_devices()):
        device = get_device(name)
        said = re.findall("[a-z0-9]+", device.title.lower())
        if device.kind != "gpu" or any(w in words and w not in said for w in _OTHER_BOARDS):
            continue
        if memory and device.memory_gib and abs(int(memory[1]) / device.memory_gib - 1) > 0.1:
            continue
        return device
    return None


# ------------------------------------------------------------------------------- work and peaks


@dataclass(frozen=True, kw_only=True)
class Work:
    """What was done while a GPU was watched, in sum; counted, not measured.

    `flops` is 2 for each multiply-accumulate. `moved_bytes` counts every tensor once for each
    kernel that reads or writes it, from a cache too. `precision` names the peak to compare with;
    `images` is 0 for work that is no network's.
    """

    images: int
    precision: str
    flops: float
    moved_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """Rates over the watched seconds, and their percentage of the device file's peaks.

    `moved_gb_per_s` is from the counted bytes, caches included; `dram_gb_per_s` from the measured
    DRAM activity. None where counter, device file or peak is missing.
    """

    images_per_s: float
    tera_flops_per_s: float
    flops_percent: float | None
    moved_gb_per_s: float | None
    moved_percent: float | None
    dram_gb_per_s: float | None
    energy_mj_per_image: float | None


def achieve(counters: GpuCounters, work: Work, *, device: Device | None) -> Achieved:
    """Return what `work` comes to, over the seconds in which `counters` were read."""
    if work.images < 0 or work.flops < 0 or (work.moved_bytes or 0) < 0:
        raise UsageError("work counts images, flops and bytes from 0 up")
    if not counters.seconds > 0:
        raise UsageError("the GPU was watched for 0 s; watch it while the work runs")
    tera_flops_per_s = work.flops / counters.seconds / 1e12
    peak = device.peak_tera_ops_per_s.get(work.precision) if device else None
    memory = device.memory_gb_per_s if device else None
    moved = None if work.moved_bytes is None else work.moved_bytes / counters.seconds / 1e9
    dram, energy = counters.dram_active_percent, counters.energy_j
    return Achieved(
        images_per_s=work.images / counters.seconds,
        tera_flops_per_s=tera_flops_per_s,
        flops_percent=None if peak is None else 100 * tera_flops_per_s / peak,
        moved_gb_per_s=moved,
        moved_percent=None if moved is None or memory is None else 100 * moved / memory,
        dram_gb_per_s=None if dram is None or memory is None else dram / 100 * memory,
        energy_mj_per_image=(
            1e3 * energy / work.images if energy is not None and work.images else None
        ),
    )


# ------------------------------------------------------------------------------- kernels

#: Kinds of kernels, in the order of a table.
KINDS = ("convolution", "gemm", "element-wise", "copy", "other")
#: The first that a kernel's name has decides: a cuDNN convolution may say gemm or relu, too.
_RULES: Sequence[tuple[str, re.Pattern[str]]] = (
    ("copy", re.compile(r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|transpose|convert|reformat"
                        r"|catarray|fillfunctor")),
    ("convolution", re.compile(r"conv|[fdw]prop|[dw]grad|winograd|implicit_?gemm|im2col"
                               r"|[a-z0-9]cudnn|depthwise")),
    ("gemm", re.compile(r"gemm|gemv|nvjet|matmul|cutlass|splitk|cublas")),
    ("element-wise", re.compile(r"element_?wise|pointwise|bn_fw_inf|batch_?norm|relu|silu|sigmoid"
                                r"|hardswish|triton_poi|scale_?bias|addop|activation")),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KernelProfile:
    """Where a GPU's time goes, from torch's profiler over `runs` runs.

    `shares` are percent of all kernels' time by kind, `longest` of the kernels that take most, by
    name. `busy_percent` is the part of the time from the first kernel to the last in which one ran:
    what GPU-Util asks. `sm_reach_percent` is the most SMs that the launched blocks can cover, mean
    over kernels' time: a bound on SM activity that needs no counter.
    """

    runs: int
    kernels_per_run: float
    kernel_us_per_run: float
    busy_percent: float
    sm_reach_percent: float | None
    shares: Mapping[str, float]
    longest: Mapping[str, float]


def kernel_kind(name: str) -> str:
    """Return the kind of a CUDA kernel by its name.

    A 1x1 convolution that a library runs as a matrix product is "gemm": the name says no more.

    >>> kernel_kind("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64")
    'convolution'
    """
    lower = name.lower()
    return next((kind for kind, pattern in _RULES if pattern.search(lower)), "other")


def kernel_shares(run: Callable[[Any], object], images: Any) -> Mapping[str, float]:
    """Return the percentage of the GPU's kernel time by kind (`KINDS`) for `run(images)`."""
    return profile_kernels(lambda: run(images)).shares


def profile_kernels(run: Callable[[], object], *, runs: int = 10) -> KernelProfile:
    """Return where the GPU's time goes in `run`: torch's profiler with CUDA's activities (CUPTI).

    It sees every kernel of this process, another library's too. MissingError without a CUDA GPU.
    """
    if runs < 1:
        raise UsageError(f"runs is {runs}; a profile needs 1 or more")
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise MissingError("kernel times need an NVIDIA GPU that PyTorch can use, and there is "
                           "none here; run this on a machine with one")  # fmt: skip
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    return summarize_trace(trace, runs=runs)


def summarize_trace(trace: Mapping[str, Any], *, runs: int) -> KernelProfile:
    """Return the profile in a Chrome trace of torch's profiler, of `runs` runs.

    MissingError where it holds no kernel.
    """
    events = [
        event
        for event in trace.get("traceEvents", ())
        if event.get("ph") == "X"
        and str(event.get("cat", "")).lower() in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    total_us = sum(float(event["dur"]) for event in events)
    if not total_us:
        raise MissingError(
            "the profiler saw no kernel: nothing ran on the GPU, or CUPTI is held by another "
            "profiler or not permitted; close other profilers, or try as administrator"
        )
    by_kind, by_name = dict.fromkeys(KINDS, 0.0), dict[str, float]()
    for event in events:
        name, share = str(event["name"]), 100 * float(event["dur"]) / total_us
        is_kernel = str(event["cat"]).lower() == "kernel"
        by_kind[kernel_kind(name) if is_kernel else "copy"] += share
        by_name[name] = by_name.get(name, 0.0) + share
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events)
    busy_us, end = 0.0, -math.inf
    for start, stop in spans:
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
    longest = sorted(by_name, key=lambda name: -by_name[name])[:8]
    return KernelProfile(
        runs=runs,
        kernels_per_run=round(len(events) / runs, 1),
        kernel_us_per_run=round(total_us / runs, 2),
        busy_percent=round(100 * busy_us / (end - spans[0][0]), 2),
        sm_reach_percent=_sm_reach(events),
        shares={kind: round(share, 2) for kind, share in by_kind.items()},
        longest={name: round(by_name[name], 2) for name in longest},
    )


def _sm_reach(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean percentage of SMs that have a block, over the time of the kernels."""
    reach_us = known_us = 0.0
    for event in events:
        blocks_per_sm = event.get("args", {}).get("blocks per SM")
        if blocks_per_sm is not None:
            duration_us = float(event["dur"])
            known_us += duration_us
            reach_us += duration_us * min(1.0, float(blocks_per_sm))  # "inf" is a float, too
    return round(100 * reach_us / known_us, 2) if known_us else None


# ------------------------------------------------------------------------------- in words


def explain(
    counters: GpuCounters,
    *,
    work: Work | None = None,
    device: Device | None = None,
    kernels: KernelProfile | None = None,
) -> list[str]:
    """Return in sentences what GPU-Util says here and what it hides."""
    lines = [*_activity(counters, kernels)]
    tensor, dram = counters.tensor_active_percent, counters.dram_active_percent
    if tensor is not None:
        though = ""
        if tensor < 10 and work and work.flops and work.precision not in ("fp32", "fp64"):
            though = f", though the work is {work.precision}"
        lines.append(f"The tensor cores worked {_percent(tensor)} of the time{though}.")
    if dram is not None:
        rate = ""
        if device and device.memory_gb_per_s:
            rate = (f": {dram / 100 * device.memory_gb_per_s:.0f} of "
                    f"{device.memory_gb_per_s:.0f} GB/s")  # fmt: skip
        lines.append(f"DRAM was used at {_percent(dram)} of its bandwidth{rate}.")
    if work is not None:
        lines += _rates(counters, work, device)
    if kernels is not None:
        parts = [f"{_percent(s)} {kind}" for kind, s in kernels.shares.items() if s >= 0.5]
        lines.append(
            f"Kernel time: {', '.join(parts)}; {kernels.kernels_per_run:g} kernels and "
            f"{kernels.kernel_us_per_run:.0f} us a run."
        )
    lines += _power(counters)
    reasons: dict[str, list[str]] = {}
    for what, reason in counters.why_not.items():
        reasons.setdefault(reason, []).append(_WORDS[what])
    lines += [f"No {', no '.join(words)}: {reason}." for reason, words in reasons.items()]
    return lines


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def _activity(counters: GpuCounters, kernels: KernelProfile | None) -> Iterator[str]:
    util, name = counters.gpu_util_percent, "GPU-Util reads"
    if util is None:
        util, name = counters.engine_active_percent, "Engine activity (GPM) reads"
    active = counters.sm_active_percent
    reach = kernels.sm_reach_percent if kernels else None
    if util is not None and active is not None:
        if util >= 90 and active < 50:
            yield (f"{name} {_percent(util)}, but the SMs were active {_percent(active)} of the "
                   "time: it counts the time in which any kernel runs, on one SM or on all."
                   )  # fmt: skip
        elif util >= 90:
            yield (f"{name} {_percent(util)} and the SMs were active {_percent(active)} of the "
                   "time: the kernels cover the GPU.")  # fmt: skip
        else:
            yield (f"{name} {_percent(util)}: for {_percent(100 - util)} of the time no kernel "
                   f"ran, the GPU waits for the host; the SMs were active {_percent(active)} of "
                   "the time.")  # fmt: skip
    elif util is not None:
        yield f"{name} {_percent(util)}, which says that a kernel ran, not on how many SMs."
    elif active is not None:
        yield f"The SMs were active {_percent(active)} of the time."
    if counters.sm_occupancy_percent is not None:
        yield f"Of the warps that fit, {_percent(counters.sm_occupancy_percent)} were there."
    if reach is not None and reach < 90:
        yield f"The launched blocks cover at most {_percent(reach)} of the SMs."


def _rates(counters: GpuCounters, work: Work, device: Device | None) -> Iterator[str]:
    done = achieve(counters, work, device=device)
    if work.flops:
        of = f": no peak for {work.precision} is known"
        if device is not None and done.flops_percent is not None:
            peak = device.peak_tera_ops_per_s[work.precision]
            of = (f" of {peak:.3g} ({work.precision}, {device.name}.yaml): "
                  f"{_percent(done.flops_percent)}")  # fmt: skip
        yield f"{done.tera_flops_per_s:.3g} TFLOP/s{of}."
    if done.moved_gb_per_s is not None:
        of = "" if done.moved_percent is None else f", {_percent(done.moved_percent)} of DRAM's"
        cached = ""
        if done.dram_gb_per_s is not None and done.moved_gb_per_s > 2 * done.dram_gb_per_s:
            cached = f"; DRAM gave {done.dram_gb_per_s:.0f} GB/s, the rest came from caches"
        yield f"Kernels moved {done.moved_gb_per_s:.0f} GB/s by count{of}{cached}."
    if done.energy_mj_per_image is not None:
        yield f"An image took {done.energy_mj_per_image:.3g} mJ."


def _power(counters: GpuCounters) -> Iterator[str]:
    if counters.power_w is not None:
        limit = "" if counters.power_limit_w is None else f" of {counters.power_limit_w:.0f}"
        yield f"It drew {counters.power_w:.0f}{limit} W."
    if counters.throttled:
        said = ", ".join(f"{words} ({_percent(s)} of readings)"
                         for words, s in counters.throttled.items())  # fmt: skip
        clock = ""
        if counters.sm_clock_mhz is not None and counters.sm_clock_max_mhz is not None:
            clock = f", {counters.sm_clock_mhz:.0f} of {counters.sm_clock_max_mhz:.0f} MHz"
        yield f"Its clock was held back by {said}{clock}: compare with runs at the same clock only."
