"""OpenVINO on the CPU: an .xml with its .bin, run in the precision of the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from litezoo.models.errors import CheckFailed, MissingError
from litezoo.recipes.devices import Device

from .runtime import Array, Session

__all__ = ["RUNTIME"]


@cache
def _core() -> Any:
    """Return the process's one Core, never dropped.

    Each Core's CPU plugin puts up a signal stack and puts back the one before when it goes: two
    with crossed lives leave the process a freed one, and the next signal (a worker's end, Ctrl-C)
    is a segmentation fault.
    """
    import openvino

    return openvino.Core()


class _Session:
    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()

    def run(self, batch: Array) -> Array:
        result = self.request.infer({0: batch}, share_inputs=True)
        logits: Array = np.array(result[0], copy=True)
        return logits


class OpenVino:
    """The CPU plugin with its latency hint, pinned to a number of threads."""

    name = "openvino"

    def missing(self, device: Device) -> str | None:
        """Return what to install, or None."""
        if find_spec("openvino") is None:
            return "runtime 'openvino' needs openvino: pip install 'litezoo[cpu]'"
        return None

    def versions(self) -> Mapping[str, str]:
        """Return the package's version."""
        return {"openvino": version("openvino")}

    def build(
        self, onnx_file: Path, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Convert the ONNX file; weights are kept in its precision."""
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        import openvino

        xml = folder / f"openvino.{precision}.xml"
        try:
            openvino.save_model(openvino.convert_model(onnx_file), xml, compress_to_fp16=False)
        except Exception as error:
            raise CheckFailed(f"openvino refuses {onnx_file}: {error}") from error
        return xml, xml.with_suffix(".bin")

    def load(self, files: Sequence[Path], *, device: Device, threads: int | None = None) -> Session:
        """Load and compile for this CPU."""
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # without it a bf16 CPU runs fp32 files in bf16
            "INFERENCE_NUM_THREADS": threads or os.cpu_count() or 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            model = _core().read_model(files[0])
            return _Session(_core().compile_model(model, "CPU", settings))
        except Exception as error:
            raise CheckFailed(f"openvino refuses {files[0]}: {error}") from error


RUNTIME = OpenVino()
