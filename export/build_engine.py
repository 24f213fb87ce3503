"""Build, check and measure TensorRT engines from typed ONNX files; needs nothing of litezoo.

litezoo imports this file, and every build kit carries a copy of it, so it needs only numpy,
TensorRT and cuda-python (the last two are imported when they are used) and Python 3.10. In a kit:

    python build_engine.py                      build, check and measure every engine of the kit
    python build_engine.py --precision fp16     only this one
    python build_engine.py --triton             and lay out a Triton model repository of them

Precision is in the ONNX file (a strongly typed network), so the same file serves TensorRT 10.12 to
11. An engine is published only after its outputs were compared with the expected ones; what was
found is in `result.json`. Exit status: 0 ok, 2 wrong usage, 3 a check failed, 4 something is
missing on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Log = Callable[[str], None]

KIT_FORMAT = 2
INSTALL = "python -m pip install -r requirements.txt"
#: tensorrt-cu12 wheels need driver 535 (TensorRT 11.4 prerequisites); a device file may ask more.
DRIVER_MIN = 535
#: First driver of each branch that serves a CUDA version (CUDA Toolkit release notes, table 3).
_DRIVER_CUDA: Mapping[int, tuple[int, int]] = {
    535: (12, 2),
    550: (12, 4),
    560: (12, 6),
    570: (12, 8),
    580: (13, 0),
}
#: Engine precision -> form of the typed ONNX file that it is built from.
FORMS: Mapping[str, str] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8+fp16": "int8-fp16",
    "int8+bf16": "int8-bf16",
    "int8": "int8",
}
#: Largest max |difference| / max |logit|, the measure of export/parity.py. Of floats against the
#: fp32 network (bf16 rounds eight times as coarsely as fp16); of int8 against its own ONNX file run
#: by ONNX Runtime: what quantizing itself costs was judged by export, here is asked whether the
#: engine computes that same file. A rounding that falls the other way moves an activation by a
#: whole step: OpenVINO is off by up to 3e-3 (repvgg_a0, mobilenetv2_035 at 64 px), no TensorRT
#: engine was measured yet, hence the margin.
TOLERANCES: Mapping[str, float] = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "bf16": 1e-1,
    "int8+fp16": 5e-2,
    "int8+bf16": 1e-1,
    "int8": 5e-2,
}
#: A different top-1 class counts only if the two expected logits differ by more than this share
#: of the image's largest logit: rounding may order a near tie either way.
TIES: Mapping[str, float] = {
    "fp32": 0.01,
    "fp16": 0.01,
    "bf16": 0.05,
    "int8+fp16": 0.05,
    "int8+bf16": 0.1,
    "int8": 0.05,
}
#: Lowest compute capability whose tensor cores take bfloat16 (CUDA C++ programming guide).
BF16_SINCE = "8.0"
#: Batch sizes at which every engine is compared: one, more, and one that divides nothing.
CHECK_BATCHES = (1, 2, 7)
#: Which other GPUs may run an engine -> lowest compute capability that has this.
HARDWARE_COMPATIBILITY: Mapping[str, str] = {
    "none": "0.0",
    "same_compute_capability": "7.5",
    "ampere_plus": "8.0",
}
PROFILED_RUNS = 20
TIMING_CACHE = "timing.cache"
_ENGINE_NAME = re.compile(
    r"(?P<stem>.+)\.sm(?P<sm>\d+)(?P<plus>plus)?\.trt(?P<version>\d+(\.\d+)*)(?P<vc>\.vc)?\.plan"
)


class KitError(Exception):
    """What ends the work; the message is for the user and `status` is the program's."""

    status = 3


class Wrong(KitError):
    """What was asked for is wrong in itself."""

    status = 2


class Failed(KitError):
    """A check found a difference, or TensorRT refused; nothing was published."""


class Missing(KitError):
    """Something that this step needs is not on this machine."""

    status = 4


class NotInstalled(Missing):
    """A Python package is not installed."""

    def __init__(self, package: str, install: str) -> None:
        super().__init__(f"{package} is not installed here: {install}")
        self.package = package


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an engine must run on."""

    device: str
    title: str
    compute_capability: str
    tensorrt_min: str = "10.12"
    tensorrt_below: str = "12"
    driver_min: int = DRIVER_MIN


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What may be chosen of an engine besides its network.

    `hardware_compatibility` is one of HARDWARE_COMPATIBILITY: an engine for other GPUs of the same
    compute capability, or for all from Ampere on, may be slower. `version_compatible` engines run
    on newer TensorRT too; they carry code that loading them runs. `optimization_level` 0 (builds
    soon) to 5 (searches most).
    """

    hardware_compatibility: str = "none"
    version_compatible: bool = False
    optimization_level: int = 3

    def __post_init__(self) -> None:
        """Refuse what TensorRT does not have."""
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise Wrong(
                f"hardware compatibility is {', '.join(HARDWARE_COMPATIBILITY)}, not "
                f"{self.hardware_compatibility}"
            )
        if not 0 <= self.optimization_level <= 5:
            raise Wrong(f"optimization level goes from 0 to 5, not {self.optimization_level}")


@dataclass(frozen=True, kw_only=True)
class Settings(Target, BuildOptions):
    """How one typed ONNX file becomes an engine: an entry of `engines` in kit.json.

    The input is (N, channels, height, width), N from `batch_min` to `batch_max` and fastest at
    `batch_opt`. `tolerance` is what TOLERANCES says of the precision.
    """

    model: str
    precision: str
    onnx: str
    input_name: str
    output_name: str
    channels: int
    height: int
    width: int
    batch_min: int
    batch_opt: int
    batch_max: int
    workspace_mib: int
    tolerance: float
    warm_up_ms: float = 200.0
    seconds: float = 3.0

    def __post_init__(self) -> None:
        """Refuse an option or a precision that the device's GPU has no engines of."""
        super().__post_init__()
        is_old = _numbers(self.compute_capability) < _numbers(BF16_SINCE)
        if self.precision.endswith("bf16") and is_old:
            raise Wrong(
                f"{self.precision} engines need compute capability {BF16_SINCE} or more and "
                f"{self.title} has {self.compute_capability}; take "
                f"{self.precision.replace('bf16', 'fp16')}"
            )
        lowest = HARDWARE_COMPATIBILITY[self.hardware_compatibility]
        if _numbers(self.compute_capability) < _numbers(lowest):
            raise Wrong(
                f"{self.hardware_compatibility} engines need compute capability {lowest} or more "
                f"and {self.title} has {self.compute_capability}; take none or "
                "same_compute_capability"
            )

    @property
    def form(self) -> str:
        """Return the form of the ONNX file, e.g. "int8-fp16"."""
        return FORMS.get(self.precision, self.precision)

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """Return the input's shape at this batch size."""
        return (batch, self.channels, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The TensorRT module, the CUDA runtime module and the GPU that were found here."""

    trt: Any
    cuda: Any
    gpu_index: int
    gpu_name: str
    compute_capability: str
    driver_cuda: str

    @property
    def tensorrt_version(self) -> str:
        """Return TensorRT's full version, which an engine is tied to."""
        return str(self.trt.__version__)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an engine's logits are from the expected ones, over all batch sizes."""

    precision: str
    images: int  # compared, an image at three batch sizes being three
    batches: tuple[int, ...]
    max_abs_error: float
    max_relative_error: float
    min_cosine: float
    top1_agreement: float
    finite: bool

    def problem(self, tolerance: float) -> str | None:
        """Return None if the engine may be used, else what is wrong, in a sentence."""
        if not self.finite:
            return "some outputs are not finite numbers"
        if self.max_relative_error > tolerance:
            return f"relative error {self.max_relative_error:.2e} > {tolerance:.0e}"
        if self.top1_agreement < 1:
            return f"top-1 agrees for {self.top1_agreement:.1%} of the images, not for all"
        return None


# --- files ---------------------------------------------------------------------------------------


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    part = _write_part(file, content)
    part.replace(file)


def _write_part(file: Path, content: bytes) -> Path:
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part


@dataclass(frozen=True, kw_only=True)
class EngineName:
    """What an engine's file name says of where it loads."""

    stem: str
    compute_capability: str
    tensorrt_version: str
    ampere_plus: bool = False
    version_compatible: bool = False

    def runs_on(self, compute_capability: str) -> bool:
        """Whether GPUs of this compute capability take the engine."""
        if self.ampere_plus:
            return _numbers(compute_capability) >= (8, 0)
        return compute_capability == self.compute_capability

    def runs_with(self, tensorrt_version: str) -> bool:
        """Whether this TensorRT takes the engine.

        A version compatible one: the TensorRT that built it and newer, of its major version or the
        next one.
        """
        if not self.version_compatible:
            return tensorrt_version == self.tensorrt_version
        ours, theirs = _numbers(self.tensorrt_version), _numbers(tensorrt_version)
        return ours <= theirs and theirs[0] <= ours[0] + 1


def engine_stem(onnx_name: str, *, precision: str) -> str:
    """Return the beginning of an engine's file name, which says its precision once.

    >>> engine_stem("a0.onnx", precision="int8+fp16"), engine_stem("a0.fp16.onnx", precision="fp16")
    ('a0.int8-fp16', 'a0.fp16')
    """
    stem, form = Path(onnx_name).stem, FORMS[precision]
    return stem if stem.endswith(f".{form}") else f"{stem}.{form}"


def engine_name(
    stem: str, *, compute_capability: str, tensorrt_version: str, options: BuildOptions
) -> str:
    """Return an engine's file name, which says where it loads.

    >>> gpu = {"compute_capability": "8.6", "tensorrt_version": "10.16.1.11"}
    >>> engine_name("a0.fp16", **gpu, options=BuildOptions())
    'a0.fp16.sm86.trt10.16.1.11.plan'
    >>> any_gpu = BuildOptions(hardware_compatibility="ampere_plus", version_compatible=True)
    >>> engine_name("a0.fp16", **gpu, options=any_gpu)
    'a0.fp16.sm86plus.trt10.16.1.11.vc.plan'
    """
    plus = "plus" if options.hardware_compatibility == "ampere_plus" else ""
    compatible = ".vc" if options.version_compatible else ""
    sm = compute_capability.replace(".", "")
    return f"{stem}.sm{sm}{plus}.trt{tensorrt_version}{compatible}.plan"


def read_engine_name(name: str) -> EngineName:
    """Return what an engine's file name says.

    >>> found = read_engine_name("a0.fp16.sm75.trt10.16.1.11.plan")
    >>> found.stem, found.compute_capability, found.tensorrt_version
    ('a0.fp16', '7.5', '10.16.1.11')
    """
    found = _ENGINE_NAME.fullmatch(name)
    if not found or len(found["sm"]) < 2:
        raise Wrong(
            f"{name!r} does not say what it runs on; the name has the form "
            "MODEL.fp16.sm75.trt10.16.1.11.plan"
        )
    return EngineName(
        stem=found["stem"],
        compute_capability=f"{found['sm'][:-1]}.{found['sm'][-1]}",
        tensorrt_version=found["version"],
        ampere_plus=found["plus"] is not None,
        version_compatible=found["vc"] is not None,
    )


# --- what is on this machine ---------------------------------------------------------------------


def find_tensorrt(*, install: str) -> Any:
    """Import TensorRT, or raise Missing; `install` is what the user should type."""
    try:
        trt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name == "tensorrt":
            raise NotInstalled("tensorrt", install) from error
        raise _no_libraries(error, install) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _no_libraries(error, install) from error
    if getattr(trt, "IS_STUB", False) or not hasattr(trt, "Builder"):
        raise _no_libraries("it is a stub", install)
    return trt


def _no_libraries(reason: object, install: str) -> Missing:
    return Missing(
        f"TensorRT is here only as Python bindings, without its libraries "
        f"({_one_line(reason)}): {install} --force-reinstall"
    )


def find_environment(
    target: Target, *, subject: str = "this kit is for", install: str = INSTALL
) -> Environment:
    """Find TensorRT and a GPU that `target` allows and make that GPU current, or raise Missing.

    `subject` begins the sentence about a wrong GPU; `install` ends the one about a wrong package.
    """
    trt = find_tensorrt(install=install)
    version = str(trt.__version__)
    low, below = target.tensorrt_min, target.tensorrt_below
    if not _numbers(low) <= _numbers(version) < _numbers(below):
        raise Missing(
            f"TensorRT {version} is here, but {target.device} needs >={low},<{below}: {install}"
        )
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise NotInstalled("cuda-python", install) from error
    try:
        return _find_gpu(trt, cuda, target=target, subject=subject)
    except Failed as error:
        raise Missing(str(error)) from error


def _find_gpu(trt: Any, cuda: Any, *, target: Target, subject: str) -> Environment:
    """Make the first GPU of the target's compute capability current."""
    driver = _check_driver(cuda, target)
    gpus = []
    for index in range(_checked(cuda, cuda.cudaGetDeviceCount())):
        properties = _checked(cuda, cuda.cudaGetDeviceProperties(index))
        name = _text(properties.name)
        capability = f"{properties.major}.{properties.minor}"
        if capability == target.compute_capability:
            _checked(cuda, cuda.cudaSetDevice(index))
            return Environment(
                trt=trt,
                cuda=cuda,
                gpu_index=index,
                gpu_name=name,
                compute_capability=capability,
                driver_cuda=driver,
            )
        gpus.append(f"{name} with {capability}")
    raise Missing(
        f"{subject} compute capability {target.compute_capability} ({target.title}); the GPU here "
        f"is {', '.join(gpus)}; run it where this lists {target.title}: nvidia-smi -L"
    )


def _check_driver(cuda: Any, target: Target) -> str:
    """Return the CUDA version that the driver serves, or raise Missing."""
    packed = _checked(cuda, cuda.cudaDriverGetVersion())
    driver = (packed // 1000, packed % 1000 // 10)
    named = f"{driver[0]}.{driver[1]}"
    status, count = cuda.cudaGetDeviceCount()
    errors = cuda.cudaError_t
    if packed == 0 or status == errors.cudaErrorNoDevice or (int(status) == 0 and count == 0):
        raise Missing(
            f"no NVIDIA GPU is visible here and {target.device} needs compute capability "
            f"{target.compute_capability} ({target.title}); to see what the driver sees: nvidia-smi"
        )
    served = [cuda for first, cuda in _DRIVER_CUDA.items() if first <= target.driver_min]
    wanted = max(served, default=_DRIVER_CUDA[DRIVER_MIN])
    if driver < wanted:
        raise Missing(
            f"the NVIDIA driver here serves CUDA {named} only; {target.device} with the "
            f"tensorrt-cu12 wheels needs driver {target.driver_min} or newer (CUDA {wanted[0]}."
            f"{wanted[1]}); update it, then see its version with: nvidia-smi"
        )
    if status == errors.cudaErrorInsufficientDriver:
        raise Missing(
            f"cuda-python here needs a newer driver than this one (CUDA {named}): "
            f"python -m pip install 'cuda-python>=12.6.1,<{driver[0] + 1}'"
        )
    return named


def _checked(cuda: Any, answer: Sequence[Any]) -> Any:
    """Return the value of a CUDA runtime call, or raise Failed with CUDA's words."""
    status, *values = answer
    if int(status) != 0:
        words = _text(cuda.cudaGetErrorString(status)[1])
        raise Failed(f"CUDA error {int(status)} ({words}); to see the GPU's state: nvidia-smi")
    return values[0] if values else None


def _text(words: object) -> str:
    return words.decode() if isinstance(words, bytes) else str(words)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# --- building ------------------------------------------------------------------------------------


def _create_logger(trt: Any, log: Log) -> Any:
    """Return a TensorRT logger that passes warnings on to `log` and keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.Logger.ERROR):
                self.errors.append(_one_line(msg))
            if int(severity) <= int(trt.Logger.WARNING):
                log(f"TensorRT: {_one_line(msg)}")

    return Logger()


def _create_monitor(trt: Any, progress: Log) -> Any:
    """Return a TensorRT progress monitor that says which step of which phase was done."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(f"{phase_name} {step + 1}/{self.steps.get(phase_name, '?')}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def build_plan(
    onnx_file: Path,
    *,
    settings: Settings,
    log: Log,
    progress: Log | None = None,
    timing_cache: Path | None = None,
) -> bytes:
    """Build the engine of a typed ONNX file on the current GPU and return it serialized.

    `log` takes TensorRT's warnings and errors, `progress` one short text per build step.
    `timing_cache` is a file of what earlier builds measured on this GPU: read, then written anew.
    """
    trt = find_tensorrt(install=INSTALL)
    logger = _create_logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the bindings' way to say that the library gave no builder
        raise Failed(
            f"TensorRT {trt.__version__} cannot start on this GPU: {_last_words(logger)}"
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        raise Failed(f"TensorRT cannot read {onnx_file.name}: {_parser_errors(parser, logger)}")
    _check_network(network, settings)

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.avg_timing_iterations = 8  # what trtexec takes
    config.builder_optimization_level = settings.optimization_level
    config.hardware_compatibility_level = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }[settings.hardware_compatibility]
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # else "fp32" would multiply 10-bit mantissas
    if progress is not None:
        config.progress_monitor = _create_monitor(trt, progress)
    profile = builder.create_optimization_profile()
    profile.set_shape(
        settings.input_name,
        settings.shape(settings.batch_min),
        settings.shape(settings.batch_opt),
        settings.shape(settings.batch_max),
    )
    if config.add_optimization_profile(profile) < 0:
        raise Failed(
            f"TensorRT refuses the batch sizes {settings.batch_min}, {settings.batch_opt}, "
            f"{settings.batch_max} for {onnx_file.name}: {_last_words(logger)}"
        )
    if timing_cache is not None:
        _read_timing_cache(config, timing_cache, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Failed(f"TensorRT built no engine of {onnx_file.name}: {_last_words(logger)}")
    if timing_cache is not None:
        learned = config.get_timing_cache()
        if learned is not None:
            write_whole(timing_cache, bytes(learned.serialize()))
    return bytes(plan)


def _read_timing_cache(config: Any, file: Path, log: Log) -> None:
    """Give the builder what `file` holds; what it refuses is said and replaced by nothing."""
    content = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return
    if content:
        log(
            f"{file.name} is of another GPU or TensorRT version and is not used; "
            "this build measures anew and replaces it"
        )
        empty = config.create_timing_cache(b"")
        if empty is not None and config.set_timing_cache(empty, ignore_mismatch=False):
            return
    log("TensorRT takes no timing cache here; the next build measures again")


def _check_network(network: Any, settings: Settings) -> None:
    """Refuse an ONNX file that is not what the settings say."""
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise Failed(
            f"{settings.onnx} has {network.num_inputs} inputs and {network.num_outputs} outputs; "
            "one of each is wanted"
        )
    source, result = network.get_input(0), network.get_output(0)
    wanted = (settings.input_name, *settings.shape(-1))
    found = (source.name, *tuple(source.shape))
    if found != wanted:
        raise Failed(
            f"{settings.onnx} has the input {found[0]!r} of shape {found[1:]}; wanted is "
            f"{wanted[0]!r} of shape {wanted[1:]} (-1: any batch size)"
        )
    if result.name != settings.output_name:
        raise Failed(
            f"{settings.onnx} has the output {result.name!r}; wanted is {settings.output_name!r}"
        )


def _parser_errors(parser: Any, logger: Any) -> str:
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        errors.append(
            f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): "
            f"{_one_line(error.desc())}"
        )
    return "; ".join(errors) or _last_words(logger)


def _last_words(logger: Any) -> str:
    errors: list[str] = logger.errors
    return "; ".join(errors[-3:]) or "it gives no reason"


def trtexec_command(settings: Settings) -> str:
    """Return the trtexec line that builds and times the same engine (trtexec 10.12 to 11)."""

    def shapes(batch: int) -> str:
        return f"{settings.input_name}:{'x'.join(map(str, settings.shape(batch)))}"

    levels = {"same_compute_capability": "sameComputeCapability", "ampere_plus": "ampere+"}
    level = levels.get(settings.hardware_compatibility)
    hardware = [f"--hardwareCompatibilityLevel={level}"] if level else []
    words = [
        "trtexec",
        f"--onnx={settings.onnx}",
        f"--saveEngine={Path(settings.onnx).stem}.trtexec.plan",
        "--stronglyTyped",  # trtexec 10 needs it, 11 accepts it
        f"--minShapes={shapes(settings.batch_min)}",
        f"--optShapes={shapes(settings.batch_opt)}",
        f"--maxShapes={shapes(settings.batch_max)}",
        f"--shapes={shapes(settings.batch_opt)}",
        f"--memPoolSize=workspace:{settings.workspace_mib}",
        *(["--noTF32"] if settings.precision == "fp32" else []),
        f"--builderOptimizationLevel={settings.optimization_level}",
        *(["--versionCompatible"] if settings.version_compatible else []),
        *hardware,
        "--timingCacheFile=trtexec.cache",
        "--profilingVerbosity=detailed",
        "--avgTiming=8",
        f"--warmUp={round(settings.warm_up_ms)}",
        f"--duration={max(1, round(settings.seconds))}",
        "--percentile=50,90,99",
    ]
    return shlex.join(words)


# --- running -------------------------------------------------------------------------------------


#: What holds an engine's input or output on the host, by type; numpy has no bfloat16.
_HOST: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


def encode(values: Array, kind: str) -> NDArray[Any]:
    """Return float32 values in what holds `kind`, rounded to the nearest, ties to even."""
    if kind != "bf16":
        with np.errstate(over="ignore"):  # what is beyond float16 is infinite, and so said later
            return values.astype(_HOST[kind], copy=False)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(_HOST[kind])


def decode(values: NDArray[Any], kind: str) -> Array:
    """Return what `encode` or an engine wrote as float32."""
    if kind != "bf16":
        return values.astype(np.float32, copy=False)
    return (values.astype(np.uint32) << 16).view(np.float32)


class Engine:
    """One engine in GPU memory: takes (N, C, H, W) float32 and gives (N, classes).

    Where the engine's own input or output is a 16-bit float, the host converts; no measured time
    has that in it.
    With `cuda_graph` the second run of a batch size is captured and the following ones are replays;
    another batch size begins anew, so that no graph outlives the shapes it was captured with.
    `trusted` lets a version compatible plan run the code that it carries.
    """

    def __init__(
        self,
        plan: bytes,
        *,
        environment: Environment,
        log: Log,
        cuda_graph: bool = False,
        trusted: bool = False,
    ) -> None:
        trt = environment.trt
        self._trt, self._log = trt, log
        self._cuda_graph, self._graph, self._eager_runs = cuda_graph, None, 0
        self._cuda = environment.cuda
        self._gpu_index = environment.gpu_index
        self._stream: Any = None
        self._input_address = self._output_address = 0
        self._context: Any = None
        _checked(self._cuda, self._cuda.cudaSetDevice(self._gpu_index))
        self._logger = _create_logger(trt, log)
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as error:
            raise Failed(
                f"TensorRT {trt.__version__} cannot start here: {_last_words(self._logger)}"
            ) from error
        if trusted:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise Failed(
                f"TensorRT {trt.__version__} cannot load this engine; build it again on this "
                f"machine ({_last_words(self._logger)})"
            )
        self._name_tensors(trt)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise Failed(f"the engine does not fit this GPU: {_last_words(self._logger)}")
        self._allocate()

    def _name_tensors(self, trt: Any) -> None:
        floats = {
            trt.DataType.FLOAT: "fp32",
            trt.DataType.HALF: "fp16",
            trt.DataType.BF16: "bf16",
        }
        kinds: dict[str, str] = {}
        inputs: list[str] = []
        outputs: list[str] = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (inputs if is_input else outputs).append(name)
            kind = self._engine.get_tensor_dtype(name)
            if kind not in floats:
                raise Failed(
                    f"the engine's tensor {name!r} is {kind}, neither float32, float16 nor "
                    "bfloat16; make the kit again"
                )
            kinds[name] = floats[kind]
        if len(inputs) != 1 or len(outputs) != 1:
            raise Failed(f"the engine has the inputs {inputs} and outputs {outputs}, not one each")
        self.input_name, self.output_name = inputs[0], outputs[0]
        self._input_kind, self._output_kind = kinds[inputs[0]], kinds[outputs[0]]
        lowest, _, highest = (
            tuple(dims) for dims in self._engine.get_tensor_profile_shape(self.input_name, 0)
        )
        self.batch_min, self.batch_max = int(lowest[0]), int(highest[0])
        self.image_shape = tuple(int(size) for size in highest[1:])

    def _allocate(self) -> None:
        """Take the GPU memory of the largest batch once."""
        cuda = self._cuda
        self._batch = 0
        self._set_batch(self.batch_max)
        shape = tuple(self._context.get_tensor_shape(self.output_name))
        if len(shape) != 2 or shape[0] != self.batch_max or shape[1] < 1:
            raise Failed(f"the engine's output has the shape {shape}, not (N, classes)")
        self.classes = int(shape[1])
        self._stream = _checked(cuda, cuda.cudaStreamCreate())
        image_bytes = _HOST[self._input_kind].itemsize * int(np.prod(self.image_shape))
        logits_bytes = _HOST[self._output_kind].itemsize * self.classes
        self._input_address = _checked(cuda, cuda.cudaMalloc(self.batch_max * image_bytes))
        self._output_address = _checked(cuda, cuda.cudaMalloc(self.batch_max * logits_bytes))
        for name, address in (
            (self.input_name, self._input_address),
            (self.output_name, self._output_address),
        ):
            if not self._context.set_tensor_address(name, address):
                raise Failed(f"TensorRT refuses the memory of {name!r}: {self._words()}")

    def _words(self) -> str:
        return _last_words(self._logger)

    def _set_batch(self, batch: int) -> None:
        if batch == self._batch:
            return
        shape = (batch, *self.image_shape)
        if not self._context.set_input_shape(self.input_name, shape):
            raise Failed(f"the engine refuses the input shape {shape}: {self._words()}")
        if unknown := self._context.infer_shapes():
            raise Failed(f"the engine leaves the shapes of {unknown} open: {self._words()}")
        self._batch = batch
        self._drop_graph()

    @property
    def has_graph(self) -> bool:
        """Whether the last run was, or the next one will be, a replay of a CUDA graph."""
        return self._graph is not None

    def use_cuda_graph(self, on: bool) -> None:
        """Replay a CUDA graph from the second run of a batch size on, or run every time."""
        self._drop_graph()
        self._cuda_graph = on

    def _drop_graph(self) -> None:
        graph, self._graph, self._eager_runs = self._graph, None, 0
        if graph is not None:
            _checked(self._cuda, self._cuda.cudaGraphExecDestroy(graph))

    def _capture(self) -> None:
        """Capture one run as a CUDA graph; where that is refused, say so and go on without."""
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(cuda, cuda.cudaStreamBeginCapture(self._stream, mode))
        accepted = self._context.execute_async_v3(int(self._stream))
        status, graph = cuda.cudaStreamEndCapture(self._stream)
        if int(status) == 0 and accepted:
            self._graph = _checked(cuda, cuda.cudaGraphInstantiate(graph, 0))
        else:
            self._cuda_graph = False
            words = self._words() if int(status) == 0 else _text(cuda.cudaGetErrorString(status)[1])
            self._log(f"this engine runs without a CUDA graph, capturing it failed: {words}")
        if int(status) == 0:
            _checked(cuda, cuda.cudaGraphDestroy(graph))

    def _execute(self) -> None:
        if self._cuda_graph and self._graph is None and self._eager_runs:
            self._capture()
        if self._graph is not None:
            _checked(self._cuda, self._cuda.cudaGraphLaunch(self._graph, self._stream))
            return
        if not self._context.execute_async_v3(int(self._stream)):
            raise Failed(f"the engine did not run: {self._words()}")
        self._eager_runs += 1

    def _synchronize(self) -> None:
        _checked(self._cuda, self._cuda.cudaStreamSynchronize(self._stream))

    def _upload(self, images: NDArray[Any]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        answer = self._cuda.cudaMemcpyAsync(
            self._input_address, images.ctypes.data, images.nbytes, kind, self._stream
        )
        _checked(self._cuda, answer)

    def _download(self, logits: NDArray[Any]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        answer = self._cuda.cudaMemcpyAsync(
            logits.ctypes.data, self._output_address, logits.nbytes, kind, self._stream
        )
        _checked(self._cuda, answer)

    def _logits(self, count: int) -> NDArray[Any]:
        """Return room for the logits of a batch, as the engine gives them."""
        return np.empty((count, self.classes), dtype=_HOST[self._output_kind])

    def _prepare(self, images: Array) -> NDArray[Any]:
        """Return a batch's images as the engine takes them."""
        if self._context is None:
            raise Wrong("this engine was closed; load it again")
        if images.dtype != np.float32 or images.shape[1:] != self.image_shape or images.ndim != 4:
            raise Wrong(
                f"this engine takes float32 of shape (N, {', '.join(map(str, self.image_shape))}), "
                f"not {images.dtype} of shape {images.shape}"
            )
        _checked(self._cuda, self._cuda.cudaSetDevice(self._gpu_index))
        return encode(np.ascontiguousarray(images), self._input_kind)

    def run(self, images: Array) -> Array:
        """Return the logits of any number of images, in batches that the engine takes."""
        given = self._prepare(images)
        logits = np.empty((len(images), self.classes), dtype=np.float32)
        for start in range(0, len(given), self.batch_max):
            part = given[start : start + self.batch_max]
            count = len(part)
            if count < self.batch_min:  # fill up with the last image
                part = np.concatenate([part, np.repeat(part[-1:], self.batch_min - count, axis=0)])
            self._set_batch(len(part))
            result = self._logits(len(part))
            self._upload(part)
            self._execute()
            self._download(result)
            self._synchronize()
            logits[start : start + count] = decode(result[:count], self._output_kind)
        return logits

    def time_ms(
        self, images: Array, *, warm_up_ms: float, seconds: float, copies: bool
    ) -> NDArray[np.float64]:
        """Return the milliseconds of each run of one batch, at least ten of them.

        A run is from the call until the GPU is done, with or without copying images and logits.
        """
        given = self._prepare(images)
        if not self.batch_min <= len(given) <= self.batch_max:
            raise Wrong(f"this engine takes batches of {self.batch_min} to {self.batch_max}")
        self._set_batch(len(given))
        logits = self._logits(len(given))
        self._upload(given)
        self._synchronize()

        def once() -> float:
            start = time.perf_counter()
            if copies:
                self._upload(given)
            self._execute()
            if copies:
                self._download(logits)
            self._synchronize()
            return (time.perf_counter() - start) * 1e3

        once()
        once()  # the second one captures the CUDA graph
        end = time.perf_counter() + warm_up_ms / 1e3
        while time.perf_counter() < end:
            once()
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 10 or time.perf_counter() < end:
            taken.append(once())
        return np.array(taken)

    def profile(self, images: Array, *, runs: int) -> list[dict[str, Any]]:
        """Return each layer's name and median time in ms over replays of a CUDA graph.

        The engine keeps the profiler, which costs time: do not time it afterwards.
        """
        given = self._prepare(images)
        self._set_batch(len(given))
        profiler = _create_profiler(self._trt)
        self._context.profiler = profiler
        self._context.enqueue_emits_profile = False  # reported below, after each replay
        self.use_cuda_graph(True)
        self._upload(given)
        for run in range(runs + 2):  # the first is eager, the second captures
            self._execute()
            self._synchronize()
            if not self._context.report_to_profiler():
                raise Failed(f"TensorRT reports no layer times: {self._words()}")
            if run == 1:
                profiler.times.clear()
        total = sum(float(np.median(times)) for times in profiler.times.values())
        return [
            {
                "name": name,
                "ms": float(np.median(times)),
                "percent": float(100 * np.median(times) / total) if total else 0.0,
            }
            for name, times in profiler.times.items()
        ]

    def inspect(self) -> Any:
        """Return what TensorRT says of the engine's layers (JSON, read); text where it is none."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        try:
            return json.loads(text)
        except ValueError:
            self._log("TensorRT's description of the engine is not JSON; it is kept as text")
            return str(text)

    def close(self) -> None:
        """Give the GPU memory back; the engine cannot be used afterwards."""
        self._drop_graph()
        self._context = self._engine = self._runtime = None
        addresses = (self._input_address, self._output_address)
        self._input_address = self._output_address = 0
        for address in addresses:
            if address:
                _checked(self._cuda, self._cuda.cudaFree(address))
        stream, self._stream = self._stream, None
        if stream is not None:
            _checked(self._cuda, self._cuda.cudaStreamDestroy(stream))

    def __del__(self) -> None:
        """Close an engine that its user dropped."""
        with contextlib.suppress(Exception):
            self.close()


def _create_profiler(trt: Any) -> Any:
    """Return a TensorRT profiler that keeps each layer's times in ms."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Profiler()


def compare_logits(
    logits: Array, expected: Array, *, precision: str, batches: Sequence[int]
) -> Parity:
    """Compare the logits of some images with the expected ones, row by row."""
    ours, theirs = logits.astype(np.float64), expected.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    with np.errstate(invalid="ignore"):  # what is not finite is said by `finite`
        error = np.abs(ours - theirs).max()
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosine = (ours * theirs).sum(axis=1) / np.maximum(norms, tiny)
    picked = np.take_along_axis(theirs, ours.argmax(axis=1)[:, None], axis=1)[:, 0]
    agrees = theirs.max(axis=1) - picked <= TIES[precision] * np.abs(theirs).max(axis=1)
    return Parity(
        precision=precision,
        images=len(expected),
        batches=tuple(batches),
        max_abs_error=float(error),
        max_relative_error=float(error / max(np.abs(theirs).max(), tiny)),
        min_cosine=float(cosine.min()),
        top1_agreement=float(agrees.mean()),
        finite=bool(np.isfinite(ours).all()),
    )


def check_engine(engine: Engine, *, settings: Settings, images: Array, expected: Array) -> Parity:
    """Run every image at batch 1, 2 and 7 (those the engine takes) and compare the logits."""
    low, high = settings.batch_min, settings.batch_max
    batches = [batch for batch in CHECK_BATCHES if low <= batch <= high] or [low]
    logits, rows = [], []
    for batch in batches:
        for start in range(0, len(images), batch):
            chosen = [i % len(images) for i in range(start, start + batch)]
            logits.append(engine.run(images[chosen]))
            rows += chosen
    return compare_logits(
        np.concatenate(logits), expected[rows], precision=settings.precision, batches=batches
    )


def measure_engine(
    engine: Engine, *, settings: Settings, images: Array
) -> list[dict[str, int | float | bool]]:
    """Time the engine at its smallest, tuned and largest batch, replaying a CUDA graph.

    Without the graph, and with copies of images and logits, it is timed apart. `spread` is the
    distance of the quartiles of the medians of ten parts of the runs, over their median.
    """
    found: list[dict[str, int | float | bool]] = []
    limits = {"warm_up_ms": settings.warm_up_ms, "seconds": settings.seconds}
    for batch in sorted({settings.batch_min, settings.batch_opt, settings.batch_max}):
        chosen = images[[i % len(images) for i in range(batch)]]
        engine.use_cuda_graph(False)
        eager = engine.time_ms(chosen, copies=False, **limits)
        engine.use_cuda_graph(True)
        taken = engine.time_ms(chosen, copies=False, **limits)
        graph = engine.has_graph
        with_copies = engine.time_ms(chosen, copies=True, **limits)
        p50_ms, p90_ms, p99_ms = (float(p) for p in np.percentile(taken, (50, 90, 99)))
        parts = [float(np.median(part)) for part in np.array_split(taken, 10)]
        low, middle, high = np.percentile(parts, (25, 50, 75))
        found.append(
            {
                "batch": batch,
                "cuda_graph": graph,
                "p50_ms": p50_ms,
                "p90_ms": p90_ms,
                "p99_ms": p99_ms,
                "images_per_s": float(batch * len(taken) / (taken.sum() / 1e3)),
                "spread": float((high - low) / middle),
                "runs": len(taken),
                "seconds": float(taken.sum() / 1e3),
                "p50_without_graph_ms": float(np.median(eager)),
                "p50_with_copies_ms": float(np.median(with_copies)),
            }
        )
    return found


def describe_layers(
    plan: bytes,
    *,
    settings: Settings,
    environment: Environment,
    images: Array,
    log: Log,
    runs: int = PROFILED_RUNS,
) -> dict[str, Any]:
    """Return each layer's time at the tuned batch size and TensorRT's description of the layers.

    An engine of its own is loaded for this: a profiler costs time.
    """
    chosen = images[[i % len(images) for i in range(settings.batch_opt)]]
    trusted = settings.version_compatible
    engine = Engine(plan, environment=environment, log=log, trusted=trusted)
    try:
        times = engine.profile(chosen, runs=runs)
        return {
            "timed": "replays of a CUDA graph" if engine.has_graph else "runs, no CUDA graph",
            "batch": settings.batch_opt,
            "runs": runs,
            "times": times,
            "engine": engine.inspect(),
        }
    finally:
        engine.close()


# --- the kit -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What kit.json says."""

    model: str
    device: str
    expected: str
    engines: tuple[Settings, ...]
    files: Mapping[str, str]
    triton: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_kit(folder: Path) -> Kit:
    """Read kit.json; a folder without one is wrong usage."""
    file = folder / "kit.json"
    if not file.is_file():
        raise Wrong(f"{folder} has no kit.json; type: python build_engine.py --kit FOLDER")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != KIT_FORMAT:
            raise ValueError(f"its format is {values['format']}, this script reads {KIT_FORMAT}")
        kit = Kit(
            model=values["model"],
            device=values["device"],
            expected=values["expected"],
            engines=tuple(Settings(**entry) for entry in values["engines"]),
            files=dict(values["files"]),
            triton=dict(values.get("triton", {})),
        )
        if not kit.engines:
            raise ValueError("it lists no engines")
        for settings in kit.engines:
            _check_types(settings)
        wanted = {kit.expected, *(s.onnx for s in kit.engines), *kit.triton.values()}
        if absent := wanted - set(kit.files):
            raise ValueError(f"it has no sha256 of {', '.join(sorted(absent))}")
        return kit
    except (ValueError, KeyError, TypeError, Wrong) as error:
        raise Failed(f"kit.json cannot be used ({error!r}); copy the whole kit again") from error


def _check_types(settings: Settings) -> None:
    allowed = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if type(value) not in allowed[str(field.type)]:
            raise TypeError(f"{field.name} is {value!r}, not of type {field.type}")


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raise Failed with the name of each kit file that is missing or changed."""
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise Failed(f"{', '.join(missing)} is missing from the kit; copy the whole kit again")
    changed = [name for name, digest in files.items() if sha256_of(folder / name) != digest]
    if changed:
        raise Failed(f"{', '.join(changed)} differs from kit.json; copy the whole kit again")


def read_expected(file: Path, settings: Settings) -> tuple[Array, Array]:
    """Return (images, logits) of the kit: of int8 those of its own ONNX file, else of fp32."""
    own = f"logits_{settings.form}"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = arrays["inputs"]
            logits = arrays[own if settings.form.startswith("int8") else "logits"]
    except (KeyError, ValueError, OSError) as error:
        raise Failed(f"{file.name} cannot be read ({error}); copy the whole kit again") from error
    if images.shape != settings.shape(len(images)) or logits.shape[:1] != images.shape[:1]:
        raise Failed(
            f"{file.name} holds inputs of shape {images.shape} and logits of shape "
            f"{logits.shape}, not {settings.shape(len(images))}; make the kit again"
        )
    return images.astype(np.float32), logits.astype(np.float32)


def make_engine(
    folder: Path,
    *,
    settings: Settings,
    environment: Environment,
    images: Array,
    expected: Array,
    log: Log,
    progress: Log | None = None,
) -> dict[str, Any]:
    """Build, check, measure and publish one engine of a kit; return its entry of result.json."""
    onnx_file = folder / settings.onnx
    name = engine_name(
        engine_stem(settings.onnx, precision=settings.precision),
        compute_capability=settings.compute_capability,
        tensorrt_version=environment.tensorrt_version,
        options=settings,
    )
    file = folder / name
    layers_file = file.with_suffix(".layers.json")
    for older in (file, layers_file):
        older.unlink(missing_ok=True)
    start = time.perf_counter()
    plan = build_plan(
        onnx_file,
        settings=settings,
        log=log,
        progress=progress,
        timing_cache=folder / TIMING_CACHE,
    )
    build_s = time.perf_counter() - start
    part = _write_part(file, plan)
    try:
        engine = Engine(
            part.read_bytes(),
            environment=environment,
            log=log,
            cuda_graph=True,
            trusted=settings.version_compatible,
        )
        parity = check_engine(engine, settings=settings, images=images, expected=expected)
        if problem := parity.problem(settings.tolerance):
            raise Failed(f"{name} is not kept, it differs from the expected logits: {problem}")
        timings = measure_engine(engine, settings=settings, images=images)
        engine.close()
        try:
            layers = describe_layers(
                plan, settings=settings, environment=environment, images=images, log=log
            )
            write_whole(layers_file, (json.dumps(layers, indent=2) + "\n").encode())
        except Failed as error:  # the engine itself was checked and measured
            log(f"{name} is kept without {layers_file.name}: {error}")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return {
        "precision": settings.precision,
        "engine": name,
        "engine_sha256": sha256_of(file),
        "onnx": settings.onnx,
        "onnx_sha256": sha256_of(onnx_file),
        "layers": layers_file.name if layers_file.is_file() else None,
        "build_s": round(build_s, 3),
        "options": {
            field.name: getattr(settings, field.name) for field in dataclasses.fields(BuildOptions)
        },
        "tolerance": settings.tolerance,
        "parity": dataclasses.asdict(parity),
        "timings": timings,
    }


def run_kit(
    folder: Path,
    *,
    precisions: Sequence[str] = (),
    seconds: float | None = None,
    options: Mapping[str, Any] | None = None,
    triton: bool = False,
    log: Log = print,
) -> int:
    """Do all of a kit's work in its folder and return the exit status.

    `options` are fields of BuildOptions that replace the kit's; `triton` lays out a Triton model
    repository of the engines too.
    """
    kit = read_kit(folder)
    verify_files(folder, kit.files)
    known = [settings.precision for settings in kit.engines]
    if unknown := [name for name in precisions if name not in known]:
        raise Wrong(f"this kit has no {unknown[0]}; it has {', '.join(known)}")
    if triton and not kit.triton:
        raise Wrong("this kit was made without Triton's configuration; make it with --triton")
    chosen = [s for s in kit.engines if not precisions or s.precision in precisions]
    changes = dict(options or {}) | ({} if seconds is None else {"seconds": seconds})
    chosen = [dataclasses.replace(settings, **changes) for settings in chosen]
    expected = {s.precision: read_expected(folder / kit.expected, s) for s in chosen}
    environment = find_environment(chosen[0])
    log(
        f"{kit.model} for {chosen[0].title}: TensorRT {environment.tensorrt_version} on "
        f"{environment.gpu_name}"
    )
    result_file = folder / "result.json"
    result_file.unlink(missing_ok=True)
    made: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for settings in chosen:
        log(f"building {settings.precision} from {settings.onnx} (this can take minutes)")
        images, logits = expected[settings.precision]
        try:
            made.append(
                make_engine(
                    folder,
                    settings=settings,
                    environment=environment,
                    images=images,
                    expected=logits,
                    log=log,
                    progress=_show_progress if sys.stderr.isatty() else None,
                )
            )
        except Failed as error:
            failed[settings.precision] = str(error)
    result = _describe(folder, kit, environment=environment, chosen=chosen)
    result |= {"ok": not failed, "engines": made, "failed": failed}
    write_whole(result_file, (json.dumps(result, indent=2) + "\n").encode())
    if made:
        log(_table(made))
    for entry in made if triton else ():
        model = lay_out_triton(
            folder / kit.triton[entry["precision"]], plan=folder / entry["engine"]
        )
        log(f"for Triton: {model}")
    if failed:
        raise Failed("; ".join(f"{name}: {why}" for name, why in failed.items()))
    log(f"all is in {result_file}; copy it, the .plan and the .layers.json files back")
    return 0


def lay_out_triton(template: Path, *, plan: Path) -> Path:
    """Copy a plan into the Triton repository beside `template`; return the model's folder.

    Plans of other compute capabilities that are there already stay, an older one of the same gives
    way; the configuration is the template with the name of each.
    """
    model = template.parent / "triton" / template.stem
    version = model / "1"
    version.mkdir(parents=True, exist_ok=True)
    ours = read_engine_name(plan.name)
    for other in version.glob("*.plan"):
        theirs = read_engine_name(other.name)
        if theirs.compute_capability == ours.compute_capability:
            other.unlink()
        elif theirs.tensorrt_version != ours.tensorrt_version:
            raise Failed(
                f"{version} has {other.name}, and one Triton server has one TensorRT: remove it, "
                f"or build both with {ours.tensorrt_version}"
            )
    write_whole(version / plan.name, plan.read_bytes())
    text = template.read_text(encoding="utf-8")
    write_whole(model / "config.pbtxt", name_plans(text, version.glob("*.plan")).encode())
    return model


def name_plans(config: str, plans: Iterable[Path]) -> str:
    """Return a Triton configuration with the file name of each GPU's plan."""
    lines = [config.rstrip("\n")]
    for name in sorted(plan.name for plan in plans):
        found = read_engine_name(name)
        lines += [
            f"# {name}: the server's TensorRT must be {found.tensorrt_version}"
            + (" or newer" if found.version_compatible else ""),
            f'cc_model_filenames {{ key: "{found.compute_capability}" value: "{name}" }}',
        ]
        if found.version_compatible:
            lines.append("# start it with: --backend-config=tensorrt,version-compatible=true")
    return "\n".join(lines) + "\n"


def _describe(
    folder: Path, kit: Kit, *, environment: Environment, chosen: Sequence[Settings]
) -> dict[str, Any]:
    """Return what result.json says of this machine and of the conditions."""
    return {
        "format": KIT_FORMAT,
        "model": kit.model,
        "device": kit.device,
        "kit_sha256": sha256_of(folder / "kit.json"),
        "image_shape": list(chosen[0].shape(1)[1:]),
        "gpu": environment.gpu_name,
        "compute_capability": environment.compute_capability,
        "driver": _driver_version(),
        "driver_cuda": environment.driver_cuda,
        "tensorrt": environment.tensorrt_version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "host": _describe_host(),
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "conditions": {
            "timed": "one run from the call until the GPU is done, on the host's clock",
            "copies": False,
            "cuda_graph": "in each row of timings",
            "clocks_set_by_this_script": False,
            "warm_up_ms": chosen[0].warm_up_ms,
            "seconds": chosen[0].seconds,
        },
    }


def _describe_host() -> dict[str, Any]:
    """Return what Linux says of this machine's CPU and memory; "unknown" and 0 elsewhere."""
    files = {"cpu": "/proc/cpuinfo", "memory": "/proc/meminfo"}
    text = {}
    for name, file in files.items():
        with contextlib.suppress(OSError):
            text[name] = Path(file).read_text(encoding="utf-8", errors="replace")
    cpu = re.search(r"^model name\s*:\s*(.+)$", text.get("cpu", ""), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", text.get("memory", ""), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine() or "unknown",
        "cores": os.cpu_count() or 0,
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else 0.0,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    }


def _driver_version() -> str:
    """Return the driver's own version, or "unknown" where nvidia-smi does not tell."""
    if not (program := shutil.which("nvidia-smi")):
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def _show_progress(text: str) -> None:
    print(f"\r\033[K{text[:78]}", end="", file=sys.stderr, flush=True)


def _table(made: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'precision':<10}{'batch':>6}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'images/s':>12}"
    ]
    for entry in made:
        for row in entry["timings"]:
            lines.append(
                f"{entry['precision']:<10}{row['batch']:>6}{row['p50_ms']:>10.3f}"
                f"{row['p90_ms']:>10.3f}{row['p99_ms']:>10.3f}{row['images_per_s']:>12.1f}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="build_engine.py", description="Build, check and measure the engines of a kit."
    )
    parser.add_argument(
        "--kit",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="FOLDER",
        help="the folder with kit.json (default: where this script is)",
    )
    parser.add_argument(
        "--precision", action="append", default=[], help="only this one (may be repeated)"
    )
    parser.add_argument("--seconds", type=float, help="how long each batch size is timed")
    parser.add_argument(
        "--hardware-compatibility", metavar="LEVEL", help=", ".join(HARDWARE_COMPATIBILITY)
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        default=None,
        help="engines that newer TensorRT versions take too",
    )
    parser.add_argument("--optimization-level", type=int, metavar="0..5", help="5 searches most")
    parser.add_argument(
        "--triton", action="store_true", help="lay out a Triton model repository of the engines"
    )
    given = parser.parse_args(arguments)
    names = [field.name for field in dataclasses.fields(BuildOptions)]
    options = {name: value for name in names if (value := getattr(given, name)) is not None}
    try:
        return run_kit(
            given.kit,
            precisions=given.precision,
            seconds=given.seconds,
            options=options,
            triton=given.triton,
        )
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"error: {error}; free the disk or copy the kit elsewhere", file=sys.stderr)
        return Missing.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
