"""ONNX Runtime on an NVIDIA GPU, by its TensorRT execution provider.

It builds a TensorRT engine from the ONNX file when the file is loaded, and keeps it in litezoo's
cache for the next time. `runtime_tensorrt` is TensorRT itself, with engine files of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from litezoo.models.files import file_sha256
from litezoo.recipes.devices import Device

from .runtime_onnxruntime_cuda import OnnxRuntimeCuda
from .to_onnx import INPUT

__all__ = ["RUNTIME", "OnnxRuntimeTensorRT"]


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """The TensorRT execution provider; what it does not take runs in CUDA's."""

    name = "onnxruntime_tensorrt"
    provider = "TensorrtExecutionProvider"
    libraries = "TensorRT 10 and CUDA 13"
    one_size = "its engine is built for images of one size"
    precisions: ClassVar[Mapping[str, str | None]] = {
        "fp32": "fp32",
        "fp16": "fp16",
        "int8+fp16": "int8-fp16",
    }

    def settings(self, file: Path, device: Device, precision: str, index: int) -> dict[str, Any]:
        """Return the provider's options: the device's batches, the file's own types, the cache.

        The provider reads the precision from flags, not from the file's types, so both are set.
        """
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "litezoo"
        folder = cache / self.name / file_sha256(file)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        size = _image_size(file)
        shapes = {
            f"trt_profile_{end}_shapes": f"{INPUT}:{'x'.join(map(str, (count, *size)))}"
            for end, count in (
                ("min", device.batch.min), ("opt", device.batch.opt), ("max", device.batch.max),
            )
        }  # fmt: skip
        return {
            "device_id": index,
            "trt_fp16_enable": precision.endswith("fp16"),
            "trt_int8_enable": precision.startswith("int8"),
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_cuda_graph_enable": False,
            **shapes,
        }

    def others(self, index: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the providers that take the operators which this one has not."""
        return [("CUDAExecutionProvider", {"device_id": index}), ("CPUExecutionProvider", {})]


def _image_size(file: Path) -> tuple[int, int, int]:
    """Return (C, H, W) of an ONNX file's input."""
    import onnx

    shape = onnx.load(file, load_external_data=False).graph.input[0].type.tensor_type.shape
    channels, height, width = (dimension.dim_value for dimension in shape.dim[1:])
    return channels, height, width


RUNTIME = OnnxRuntimeTensorRT()
