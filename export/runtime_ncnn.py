"""ncnn on the CPU: a .param with its .bin, written by pnnx; for phones and boards, and x86 too.

The files are portable: those for an Arm board are built and verified here and run there.

What a precision is:

    fp32   weights and arithmetic in float32
    fp16   weights are stored in float16, which halves the .bin. An x86 CPU computes with them in
           float32 (ncnn has no float16 kernels for it), so it is float16's rounding of the weights
           that parity sees here; an Arm CPU of version 8.2 computes in float16 as well.
    bf16   weights and activations are kept in bfloat16 in memory; the file is that of fp32. ncnn
           20261020 gives NaN for networks with grouped (not depthwise) convolutions on AVX-512
           (cspresnext50, g_ghost_regnetx_002, shufflenetv1_g3_025): the parity check refuses them.

There is no int8: ncnn makes it with ncnn2table and ncnn2int8, C++ programs that are in no wheel
(ncnn 1.0.20261020, pnnx 20261020), and pnnx converts no Q/DQ file.

ncnn runs one image at a time, so a batch is a loop. A session serves many threads, but only the
process that loaded it: OpenMP's workers do not survive a fork.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.files import write_whole
from litezoo.recipes.devices import Device

from .runtime import Array, BuildSource, Objective, Session
from .runtime_tensorrt import read_signature

__all__ = ["RUNTIME", "Ncnn"]

#: The names pnnx gives to a network's input and output.
_INPUT, _OUTPUT = "in0", "out0"
_LAST_LINES = 5


class _Session:
    """A network in memory; `shape` is its (C, H, W), H and W being 0 where they are open."""

    def __init__(self, net: Any, shape: tuple[int, int, int]) -> None:
        self._net = net
        self._shape = shape
        self._process = os.getpid()

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes); images are run one after the other.

        UsageError for another shape than (N, C, H, W) of the network and in a forked process.
        """
        wanted = self._shape if self._shape[1] else (self._shape[0], *batch.shape[2:])
        if batch.ndim != 4 or batch.shape[1:] != wanted or not len(batch):
            sizes = ", ".join(str(size or "any") for size in self._shape)
            raise UsageError(f"the ncnn engine takes (N, {sizes}), not {batch.shape}")
        if os.getpid() != self._process:
            raise UsageError(
                "an ncnn engine cannot be used in a forked process; start it with the 'spawn' "
                "method and load the engine there"
            )
        return np.stack([self._run_one(image) for image in batch])

    def _run_one(self, image: Array) -> Array:
        import ncnn

        extractor = self._net.create_extractor()
        # A Mat borrows the array's memory and keeps no reference: the array lives until the clone,
        # whose channels are aligned and in which ncnn may work in place.
        plain = np.ascontiguousarray(image, dtype=np.float32)
        extractor.input(_INPUT, ncnn.Mat(plain).clone())
        status, output = extractor.extract(_OUTPUT)
        if status != 0:
            raise CheckFailed(f"ncnn stops with status {status}; there may be too little memory")
        logits: Array = np.array(output, dtype=np.float32)
        return logits


def _absent(*packages: str) -> str | None:
    """Return what to install where one of the packages is not here."""
    for package in packages:
        if find_spec(package) is None:
            return f"runtime 'ncnn' needs {package}: pip install 'litezoo[ncnn]'"
    return None


def _pnnx_program() -> Path:
    """Return the program inside the pnnx package, whose import would load torch."""
    spec = find_spec("pnnx")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / ("pnnx.exe" if os.name == "nt" else "pnnx")


def _convert(onnx_file: Path, *, shape: tuple[int, int, int], half: bool) -> tuple[str, bytes]:
    """Return pnnx's .param and .bin of an ONNX file; it runs in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="litezoo-pnnx-") as scratch:
        folder = Path(scratch)
        shutil.copyfile(onnx_file, folder / "model.onnx")
        sizes = ",".join(str(size) for size in (1, *shape))
        words = [str(_pnnx_program()), "model.onnx", f"inputshape=[{sizes}]", f"fp16={int(half)}"]
        try:
            done = subprocess.run(
                words,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise MissingError(
                f"pnnx does not start ({error}); install it again: "
                "pip install --force-reinstall --no-deps pnnx"
            ) from error
        param, weights = folder / "model.ncnn.param", folder / "model.ncnn.bin"
        if done.returncode != 0 or not param.is_file() or not weights.is_file():
            lines = done.stdout.decode(errors="replace").split("\n")
            last = "; ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])
            raise CheckFailed(f"pnnx refuses {onnx_file} (status {done.returncode}): {last}")
        return param.read_text(encoding="utf-8"), weights.read_bytes()


def _with_shape(param: str, shape: tuple[int, int, int]) -> str:
    """Return the .param with the input's size in it.

    pnnx leaves it out, and ncnn takes any size, a wrong one too: `load` reads it for its check.
    """
    channels, height, width = shape
    hint = rf"\1 0={width} 1={height} 2={channels}"
    sized, count = re.subn(rf"^(Input\s.*\b{_INPUT})[ \t]*$", hint, param, flags=re.MULTILINE)
    if count != 1:
        raise CheckFailed(f"pnnx wrote {count} inputs named {_INPUT}, one is wanted")
    return sized


def _baked_layers(param: str) -> list[str]:
    """Return the reshapes to an image size that pnnx wrote down: (H * W, ...) of channel shuffles.

    At another size their output is wrong without an error. Reshaping to a vector is free of it.
    """
    layers = [line.split() for line in param.splitlines()[2:] if line.startswith("Reshape ")]
    return [words[1] for words in layers if any(word.startswith("1=") for word in words)]


def _read_shape(file: Path) -> tuple[int, int, int]:
    """Return (C, H, W) from a .param that `build` wrote; H and W are 0 where they are open."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); export the model again") from error
    found = re.search(rf"^Input\s.*\b{_INPUT} 0=(\d+) 1=(\d+) 2=(\d+)$", text, re.MULTILINE)
    if found is None:
        raise UsageError(f"{file} does not say its input's size; export the model again")
    return int(found[3]), int(found[2]), int(found[1])


def _foreign_layers(param: str) -> list[str]:
    """Return the layers that ncnn has not, e.g. "GatherND": pnnx leaves such ones in."""
    import ncnn

    types = {line.split()[0] for line in param.splitlines()[2:] if line.strip()}
    return sorted(name for name in types if ncnn.create_layer(name) is None)


def _set_options(options: Any, *, precision: str, threads: int) -> None:
    """Set whatever decides what is executed, so that no default of ncnn's does."""
    is_half, is_bf16 = precision == "fp16", precision == "bf16"
    options.num_threads = threads
    options.openmp_blocktime = 20  # ms that workers spin after a layer
    options.lightmode = True  # intermediate outputs go when they have been read
    options.use_vulkan_compute = False
    options.use_packing_layout = True
    options.use_sgemm_convolution = True
    options.use_winograd_convolution = True
    options.use_fp16_packed = is_half
    options.use_fp16_storage = is_half
    options.use_fp16_arithmetic = is_half
    options.use_bf16_packed = is_bf16
    options.use_bf16_storage = is_bf16
    options.use_int8_inference = False
    options.use_int8_packed = False
    options.use_int8_storage = False
    options.use_int8_arithmetic = False


class Ncnn:
    """ncnn's CPU layers, pinned to a number of threads."""

    name = "ncnn"
    precisions: ClassVar[Mapping[str, str | None]] = {
        "fp32": "fp32",
        "fp16": "fp32",
        "bf16": "fp32",
    }

    def missing(self, device: Device) -> str | None:
        """Return what to install, or None."""
        return _absent("ncnn", "pnnx")

    def versions(self) -> Mapping[str, str]:
        """Return the versions of ncnn and of its converter."""
        return {name: version(name) for name in ("ncnn", "pnnx") if find_spec(name) is not None}

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Write `ncnn.<precision>.param` and `.bin` from the fp32 ONNX file.

        UsageError for a precision that ncnn has not, MissingError without ncnn or pnnx,
        CheckFailed with pnnx's last lines where it or ncnn refuses the graph.
        """
        self._check_precision(precision)
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        onnx_file = source.file("fp32")
        if source.open_resolution:
            if source.images is None:
                raise UsageError("pnnx needs an example's size; build from a source with images")
            channels, height, width = source.images.shape[1:]
            shape, kept = (channels, height, width), (channels, 0, 0)
        else:
            _, _, shape = read_signature(onnx_file)
            kept = shape
        param, weights = _convert(onnx_file, shape=shape, half=precision == "fp16")
        if foreign := _foreign_layers(param):
            raise CheckFailed(
                f"ncnn has no layer for {', '.join(foreign)} of {onnx_file}; take another variant"
            )
        if source.open_resolution and (baked := _baked_layers(param)):
            raise CheckFailed(
                f"pnnx writes the image size into {len(baked)} reshapes of {onnx_file.name} "
                f"({baked[0]} first), so ncnn's file takes one size only"
            )
        file = folder / f"ncnn.{precision}.param"
        write_whole(file, _with_shape(param, kept))
        return file, write_whole(file.with_suffix(".bin"), weights)

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load the .param and the .bin among `files`.

        `threads` share one image's work; `objective` changes nothing, as ncnn has no batches.
        """
        self._check_precision(precision)
        if (reason := _absent("ncnn")) is not None:  # pnnx only builds
            raise MissingError(reason)
        params = [file for file in files if file.suffix == ".param"]
        weights = [file for file in files if file.suffix == ".bin"]
        if len(params) != 1 or len(weights) != 1:
            raise UsageError(
                "runtime 'ncnn' loads one .param and its .bin, not "
                f"{', '.join(file.name for file in files) or 'no file'}"
            )
        shape = _read_shape(params[0])
        import ncnn

        net = ncnn.Net()
        _set_options(net.opt, precision=precision, threads=threads or os.cpu_count() or 1)
        for load, file in ((net.load_param, params[0]), (net.load_model, weights[0])):
            if load(str(file)) != 0:
                raise CheckFailed(f"ncnn refuses {file}; export the model again")
        return _Session(net, shape)

    def _check_precision(self, precision: str) -> None:
        if precision.startswith("int8"):
            raise UsageError(
                f"runtime 'ncnn' has no {precision}: the tools that quantize for it, ncnn2table "
                f"and ncnn2int8, are in no Python package; it has {', '.join(self.precisions)}"
            )
        if precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise UsageError(f"runtime 'ncnn' has no {precision}; it has {known}")


RUNTIME = Ncnn()
