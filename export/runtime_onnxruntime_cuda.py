"""ONNX Runtime on an NVIDIA GPU, by its CUDA execution provider; the typed ONNX file as it is.

The provider is in the package onnxruntime-gpu, which takes the place of onnxruntime. Where its CUDA
libraries do not load ONNX Runtime goes on with the CPU; here that is an error. Times hold the
copies of images and logits between host and GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from litezoo.models.errors import CheckFailed, MissingError, first_line
from litezoo.recipes.devices import Device

from .runtime import Objective, Session
from .runtime_onnxruntime import DISABLED_OPTIMIZERS, OnnxRuntime, OnnxSession, session_options

__all__ = ["RUNTIME", "OnnxRuntimeCuda"]


class OnnxRuntimeCuda(OnnxRuntime):
    """The CUDA execution provider; builds as the CPU's does: the ONNX file itself."""

    name = "onnxruntime_cuda"
    provider = "CUDAExecutionProvider"
    libraries = "CUDA 13 and cuDNN 9"
    #: Q/DQ files have no 8-bit convolutions in this provider.
    precisions: ClassVar[Mapping[str, str | None]] = {"fp32": "fp32", "fp16": "fp16"}

    def missing(self, device: Device) -> str | None:
        """Return what to install, or which GPU is not here, or None."""
        if find_spec("onnxruntime") is None:
            return f"runtime {self.name!r} needs ONNX Runtime for GPUs: {_INSTALL}"
        import onnxruntime

        if self.provider not in onnxruntime.get_available_providers():
            return (
                f"runtime {self.name!r} needs {self.provider}, which the package onnxruntime lacks:"
                f" pip uninstall onnxruntime; {_INSTALL}"
            )
        from .runtime_pytorch import find_gpu

        try:
            find_gpu(device)
        except MissingError as error:
            return str(error)
        return None

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load the file on the device's GPU; MissingError where the provider does not start."""
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        import onnxruntime

        from .runtime_pytorch import find_gpu

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # those that came with torch
        index = find_gpu(device)
        settings = self.settings(files[0], device, precision, index)
        try:
            session = onnxruntime.InferenceSession(
                str(files[0]),
                session_options(threads),
                providers=[(self.provider, settings), *self.others(index)],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:
            raise CheckFailed(f"{self.name} refuses {files[0]}: {first_line(error)}") from error
        if session.get_providers()[0] != self.provider:
            raise MissingError(
                f"runtime {self.name!r}: {self.provider} does not start here; it needs the "
                f"libraries of {self.libraries} (onnxruntime prints which one it did not find)"
            )
        return OnnxSession(session)

    def settings(self, file: Path, device: Device, precision: str, index: int) -> dict[str, Any]:
        """Return the provider's options: float32 is no TF32, and algorithms are tried out."""
        return {"device_id": index, "use_tf32": 0, "cudnn_conv_algo_search": "EXHAUSTIVE"}

    def others(self, index: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the providers that take the operators which this one has not."""
        return [("CPUExecutionProvider", {})]


_INSTALL = "pip install onnxruntime-gpu"
RUNTIME = OnnxRuntimeCuda()
