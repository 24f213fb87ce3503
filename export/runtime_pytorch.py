"""PyTorch itself: AOTInductor packages, and eager or compiled modules to compare them with.

An engine is `pytorch.<precision>[.sm<GPU>].torch<version>.pt2`: the network compiled ahead of time
(torch.export with an open batch, then AOTInductor), which needs torch but no Python code of the
network, and runs with the torch version, the kind of CPU or GPU and the system it was built for.
On the CPU weights are frozen: folded, and laid out for oneDNN's fused convolutions. Inputs and
outputs are float32; in bf16 and fp16 everything between them has that type.

On a GPU every batch size becomes one CUDA graph when it is first run: an input that stays in its
place, and the whole network started by one call. fp32 is float32 there: TF32, which torch allows
convolutions, is off.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from litezoo.models.errors import CheckFailed, MissingError, UsageError, first_line
from litezoo.models.files import write_whole
from litezoo.recipes.devices import Device

from .runtime import Array, BuildSource, Objective, Session, check_size
from .to_onnx import open_axes

__all__ = ["RUNTIME", "PyTorch", "eager_session", "find_gpu"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FILE = re.compile(r"pytorch\.(fp32|bf16|fp16)(?:\.sm(\d+))?\.torch(\d+\.\d+)\.pt2")
#: Instruction sets in a package's metadata, and the function of torch.cpu that knows of each.
_ISA = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AVX512_BF16": "_is_avx512_bf16_supported",
    "AMX_TILE": "_is_amx_tile_supported",
    "AMX_FP16": "_is_amx_fp16_supported",
}
#: Eager runs before a CUDA graph is captured: libraries choose kernels and allocate in them.
_RUNS_BEFORE_CAPTURE = 2
_LOG = logging.getLogger(__name__)


class _InPrecision(nn.Module):
    """A network that takes and gives float32 and computes in `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, channels_last: bool) -> None:
        super().__init__()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.dtype = dtype
        self.module = copy.deepcopy(module).eval().to(dtype=dtype)
        if channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of `images` (N, C, H, W)."""
        logits: Tensor = self.module(images.to(dtype=self.dtype, memory_format=self.layout))
        return logits.float()


# ------------------------------------------------------------------------------------- sessions


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Let cuDNN choose by trying, and not take TF32 (10 bits) for float32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let this thread's work run on `count` threads meanwhile; free where it is so already."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _CpuSession:
    """A function of a tensor (N, C, H, W), run on a number of threads."""

    def __init__(self, call: Callable[[Tensor], Tensor], *, threads: int) -> None:
        self._call = call
        self._threads = threads

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes)."""
        images = torch.from_numpy(np.ascontiguousarray(batch, dtype=np.float32))
        with _threads(self._threads), torch.inference_mode():
            logits: Array = self._call(images).numpy()
        return logits


class _GraphSession:
    """A function of a CUDA tensor (N, C, H, W), captured once for each batch size.

    One thread runs at a time: the tensors of a graph stay in their places.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], *, index: int) -> None:
        self._call = call
        self._device = torch.device("cuda", index)
        self._lock = threading.Lock()
        self._graphs: dict[torch.Size, tuple[Tensor, Callable[[], Tensor]]] = {}

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes)."""
        images = torch.from_numpy(np.ascontiguousarray(batch, dtype=np.float32))
        with (
            self._lock,
            torch.cuda.device(self._device),
            torch.no_grad(),
            _exact_convolutions(),
        ):
            if images.shape not in self._graphs:
                self._graphs[images.shape] = self._capture(images)
            place, start = self._graphs[images.shape]
            place.copy_(images)
            logits: Array = start().cpu().numpy()
        return logits

    def _capture(self, images: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return an input and what computes the logits of it: a graph, else plain calls."""
        place = images.to(self._device)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_RUNS_BEFORE_CAPTURE):
                self._call(place)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                logits = self._call(place)
        except RuntimeError as error:
            torch.cuda.synchronize()
            _LOG.warning("no CUDA graph at %s: %s", tuple(images.shape), first_line(error))
            return place, lambda: self._call(place)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return place, replay


class _PackageSession:
    """A package's session that takes any batch of its image size, in parts that it was built for.

    In `shape` (C, H, W) H and W are 0 where they are open. AOTInductor checks no shapes: another
    one would be read as if it were right.
    """

    def __init__(self, session: Session, *, shape: tuple[int, ...], largest: int) -> None:
        self._session = session
        self._shape = shape
        self._largest = largest

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes); UsageError for another image size or no image."""
        wanted = self._shape if self._shape[1] else (self._shape[0], *batch.shape[2:])
        if batch.ndim != 4 or batch.shape[1:] != wanted or not len(batch):
            sizes = ", ".join(str(size or "any") for size in self._shape)
            raise UsageError(f"the pytorch engine takes (N, {sizes}), not {batch.shape}")
        if not self._shape[1]:
            check_size(batch.shape[2], batch.shape[3], "images are")
        parts = range(0, len(batch), self._largest)
        return np.concatenate(
            [self._session.run(batch[start : start + self._largest]) for start in parts]
        )


def eager_session(
    module: nn.Module,
    *,
    channels_last: bool,
    compiled: bool,
    precision: str,
    threads: int | None = None,
) -> Session:
    """Return a module as a session, to measure engines against; the module itself is left alone.

    It runs where the module's parameters are: on the CPU with `threads` (default: all cores), on a
    GPU as one CUDA graph for each batch size. `compiled` is torch.compile for each shape, with
    frozen weights on the CPU and max-autotune on a GPU; `precision` is fp32, bf16 or fp16.
    """
    place = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    _check_precision(precision, on_gpu=place.type == "cuda")
    network = _InPrecision(module, _DTYPES[precision], channels_last=channels_last)
    call: Callable[[Tensor], Tensor] = network
    if compiled:
        _check_compiler()
        call = _compile(network, on_gpu=place.type == "cuda")
    if place.type == "cuda":
        return _GraphSession(call, index=place.index or 0)
    return _CpuSession(call, threads=threads or os.cpu_count() or 1)


def _compile(network: nn.Module, *, on_gpu: bool) -> Callable[[Tensor], Tensor]:
    from torch._inductor import config

    # On a GPU the graphs are ours: one protocol for compiled, eager and ahead of time.
    mode = "max-autotune-no-cudagraphs" if on_gpu else None
    compiled = torch.compile(network, mode=mode, dynamic=False)
    seen: set[torch.Size] = set()

    def call(images: Tensor) -> Tensor:
        if images.shape in seen:
            return compiled(images)  # type: ignore[no-any-return]
        with config.patch(freezing=not on_gpu):  # it is compiled in the first call of a shape
            logits: Tensor = compiled(images)
        seen.add(images.shape)
        return logits

    return call


# -------------------------------------------------------------------------- what is on this machine


def _check_precision(precision: str, *, on_gpu: bool) -> None:
    known = [name for name in _DTYPES if on_gpu or name != "fp16"]
    if precision not in known:
        where = "on a GPU" if on_gpu else "on the CPU"
        raise UsageError(f"runtime 'pytorch' has no {precision} {where}; it has {', '.join(known)}")


def _compiler_missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    program = os.environ.get("CXX", "g++")
    if shutil.which(program) is None:
        return (
            f"runtime 'pytorch' needs the C++ compiler {program} to build: apt-get install g++, "
            "or name another one in CXX"
        )
    return None


def _check_compiler() -> None:
    if (reason := _compiler_missing()) is not None:
        raise MissingError(reason)


def _sm(capability: str) -> str:
    return capability.replace(".", "")


def find_gpu(device: Device) -> int:
    """Return the index of the first GPU of the device's compute capability."""
    wanted = device.compute_capability
    if wanted is None:
        raise UsageError(
            f"{device.name} has no compute_capability, which runtime 'pytorch' needs; add to its "
            'device file: compute_capability: "9.0"'
        )
    here = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = "{}.{}".format(*torch.cuda.get_device_capability(index))
        if found == wanted:
            return index
        here.append(f"{torch.cuda.get_device_name(index)} with {found}")
    raise MissingError(
        f"device {device.name!r} needs a GPU of compute capability {wanted}; PyTorch finds "
        f"{', '.join(here) or 'no GPU'} here: build and run it on a machine that has one"
    )


def _torch_version() -> str:
    """Return torch's version as far as packages depend on it, e.g. "2.15"."""
    return ".".join(torch.__version__.split(".")[:2])


# ------------------------------------------------------------------------------------- packages


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's notes off the terminal (torch.utils' on CUDA's absence, for one)."""
    loggers = [logging.getLogger(name) for name in ("torch.utils.cpp_extension", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _package(
    network: nn.Module, images: Tensor, *, largest: int, open_resolution: bool, file: Path
) -> bytes:
    """Return the package of a network for batches of 1 to `largest`.

    `images` (N, C, H, W) is the batch it is tuned for, the only size unless `open_resolution`.
    Freezing works only without gradients: with
    them inductor skips it, silently.
    """
    on_gpu = images.device.type == "cuda"
    shape = (images.shape[1], 0, 0) if open_resolution else images.shape[1:]
    settings: dict[str, Any] = {
        "freezing": not on_gpu,
        "cpp.dynamic_threads": True,  # as many as load asks for, not as the builder had
        "aot_inductor.metadata": {
            "LITEZOO_BATCH_MAX": str(largest),
            "LITEZOO_SHAPE": ",".join(str(size) for size in shape),
        },
    }
    axes = open_axes(largest, dynamic_resolution=open_resolution)
    exact = _exact_convolutions() if on_gpu else nullcontext()
    with _quiet(), torch.no_grad(), exact:
        program = torch.export.export(network, (images,), dynamic_shapes=(axes,))
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(file), inductor_configs=settings
        )
    return file.read_bytes()


def _read_metadata(file: Path) -> dict[str, str]:
    """Return what a package says of itself, without loading its code."""
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    found.update(json.loads(archive.read(name)))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file} is no package ({error}); export the model again") from error
    if not {"AOTI_DEVICE_KEY", "LITEZOO_BATCH_MAX", "LITEZOO_SHAPE"} <= {*found}:
        raise UsageError(f"{file} is no package of litezoo's; export the model again")
    return found


def _has_isa(word: str) -> bool:
    """Return whether this CPU has an instruction set; what torch does not know of is believed."""
    return word not in _ISA or bool(getattr(torch.cpu, _ISA[word], lambda: True)())


def _check_cpu(file: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a package of another system or processor before its code is loaded."""
    for key, here in (("AOTI_PLATFORM", sys.platform), ("AOTI_MACHINE", platform.machine())):
        if metadata.get(key, here) != here:
            raise MissingError(
                f"{file.name} was built for {metadata[key]} and this is {here}; export it here"
            )
    words = metadata.get("AOTI_CPU_ISA", "").split()
    if absent := [word for word in words if not _has_isa(word)]:
        raise MissingError(
            f"{file.name} was built for a CPU with {', '.join(absent)}, which this one has not; "
            "export it here"
        )


class PyTorch:
    """AOTInductor packages on this machine's CPU or NVIDIA GPU."""

    name = "pytorch"
    precisions: ClassVar[Mapping[str, str | None]] = {"fp32": None, "bf16": None, "fp16": None}

    def missing(self, device: Device) -> str | None:
        """Return None if this machine can build and run for `device`, else why not."""
        try:
            self._find(device)
        except (MissingError, UsageError) as error:
            return str(error)
        return _compiler_missing()

    def versions(self) -> Mapping[str, str]:
        """Return the versions of torch and of what it compiles with."""
        found = {"torch": str(torch.__version__)}
        try:
            found["triton"] = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            pass
        return found

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Write the package for the device's batches; about a minute.

        UsageError without a module or for a precision that the device has not, MissingError
        without the GPU or the compiler, CheckFailed where torch refuses the network.
        """
        index = self._find(device)
        _check_precision(precision, on_gpu=index is not None)
        _check_compiler()
        if source.module is None or source.images is None:
            raise UsageError(
                "runtime 'pytorch' is built from the PyTorch module and example images, which are "
                "not at hand; export the model by its name"
            )
        place = torch.device("cpu") if index is None else torch.device("cuda", index)
        sm = "" if device.compute_capability is None else f".sm{_sm(device.compute_capability)}"
        on_gpu = index is not None
        name = f"pytorch.{precision}{sm if on_gpu else ''}.torch{_torch_version()}.pt2"
        network = _InPrecision(source.module, _DTYPES[precision], channels_last=on_gpu)
        batch = min(max(device.batch.opt, 2), device.batch.max)  # one would close the batch
        shape = (batch, *source.images.shape[1:])
        try:
            with tempfile.TemporaryDirectory(prefix="litezoo-aoti-") as scratch:
                content = _package(
                    network.to(place),
                    torch.zeros(shape, device=place),
                    largest=device.batch.max,
                    open_resolution=source.open_resolution,
                    file=Path(scratch) / name,
                )
        except Exception as error:  # whatever torch's compiler stumbles over
            raise CheckFailed(
                f"torch {torch.__version__} refuses to compile the network for {device.name} "
                f"{precision}: {type(error).__name__}: {first_line(error)}"
            ) from error
        return (write_whole(folder / name, content),)

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load the .pt2 among `files` if it was built for this machine and this torch.

        `threads` counts on the CPU; `objective` changes nothing: what is fastest is the same.
        """
        packages = [file for file in files if file.suffix == ".pt2"]
        if len(packages) != 1:
            raise UsageError(
                f"runtime 'pytorch' loads one .pt2 file, not {len(packages)}: "
                f"{', '.join(file.name for file in files) or 'no files were given'}"
            )
        file = packages[0]
        name = _FILE.fullmatch(file.name)
        if name is None:
            raise UsageError(
                f"{file.name} does not say its precision and torch version, as in "
                f"pytorch.fp32.torch2.15.pt2; export the model again"
            )
        if name[1] != precision:
            raise UsageError(f"{file.name} is {name[1]}, not {precision}; load it as that")
        index = self._find(device)
        wanted = None if index is None else _sm(device.compute_capability or "")
        if name[2] != wanted:
            kind = "the CPU" if name[2] is None else f"a GPU of sm{name[2]}"
            raise UsageError(
                f"{file.name} is for {kind}, which {device.name} is not; load it for the device it "
                "was built for"
            )
        if name[3] != _torch_version():
            raise MissingError(
                f"{file.name} was built by torch {name[3]} and runs with no other; here is "
                f"{torch.__version__}: export it again, or pip install 'torch=={name[3]}.*'"
            )
        metadata = _read_metadata(file)
        self._check_metadata(file, metadata, device)
        shape = tuple(int(size) for size in metadata["LITEZOO_SHAPE"].split(","))
        try:
            call = torch._inductor.aoti_load_package(
                str(file),
                run_single_threaded=index is not None,
                device_index=-1 if index is None else index,
            )
        except Exception as error:
            raise CheckFailed(
                f"torch refuses {file}: {first_line(error)}; export the model again"
            ) from error
        session: Session
        if index is None:
            session = _CpuSession(call, threads=threads or os.cpu_count() or 1)
        else:
            session = _GraphSession(call, index=index)
        return _PackageSession(session, shape=shape, largest=int(metadata["LITEZOO_BATCH_MAX"]))

    def _check_metadata(self, file: Path, metadata: Mapping[str, str], device: Device) -> None:
        kind = "cuda" if device.kind == "gpu" else "cpu"
        if metadata["AOTI_DEVICE_KEY"] != kind:
            raise UsageError(
                f"{file.name} holds code for {metadata['AOTI_DEVICE_KEY']}, not for {kind}; export "
                "the model again"
            )
        _check_cpu(file, metadata)
        built_for = metadata.get("AOTI_COMPUTE_CAPABILITY", "")
        if kind == "cuda" and built_for:
            capability = device.compute_capability or ""
            if _sm(built_for) != _sm(capability):
                raise UsageError(
                    f"{file.name} holds code for compute capability {built_for}, and {device.name} "
                    f"has {capability}; export the model again"
                )

    def _find(self, device: Device) -> int | None:
        """Return the index of the device's GPU, None for the CPU."""
        if device.kind == "gpu":
            return find_gpu(device)
        if device.kind != "cpu":
            raise UsageError(
                f"runtime 'pytorch' runs on CPUs and NVIDIA GPUs; {device.name} is an {device.kind}"
            )
        return None


RUNTIME = PyTorch()
