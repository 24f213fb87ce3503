"""OpenVINO on the CPU: an .xml with its .bin.

The file says which layers are int8 (Q/DQ); in which type the others compute is a hint, which is
always set: without one a CPU with bf16 runs float32 files in bf16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from litezoo.models.errors import CheckFailed, MissingError
from litezoo.recipes.devices import Device

from .runtime import Array, BuildSource, Objective, Session

__all__ = ["RUNTIME", "one_core"]


@cache
def one_core() -> Any:
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
    """The CPU plugin, pinned to a number of threads."""

    name = "openvino"
    precisions: ClassVar[Mapping[str, str | None]] = {
        "fp32": "fp32",
        "fp16": "fp16",
        "bf16": "fp32",
        "int8": "int8-u8",
        "int8+bf16": "int8-u8",
    }

    def missing(self, device: Device) -> str | None:
        """Return what to install, or None."""
        if find_spec("openvino") is None:
            return "runtime 'openvino' needs openvino: pip install 'litezoo[cpu]'"
        return None

    def versions(self) -> Mapping[str, str]:
        """Return the package's version."""
        return {"openvino": version("openvino")}

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Convert the ONNX file; weights are kept in its precision."""
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        import openvino

        form = self.precisions[precision]
        assert form is not None
        xml, onnx_file = folder / f"openvino.{form}.xml", source.file(form)
        try:
            openvino.save_model(openvino.convert_model(onnx_file), xml, compress_to_fp16=False)
        except Exception as error:
            raise CheckFailed(f"openvino refuses {onnx_file}: {error}") from error
        return xml, xml.with_suffix(".bin")

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load and compile for this CPU; MissingError where it has no bf16 and `precision` has."""
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        half = precision.endswith("bf16")
        if half and "BF16" not in one_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise MissingError(
                f"this CPU has no bf16 instructions, which {precision} needs; take int8 or fp32"
            )
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "INFERENCE_NUM_THREADS": threads or os.cpu_count() or 1,
            "PERFORMANCE_HINT": objective.upper(),
        }
        try:
            model = one_core().read_model(files[0])
            return _Session(one_core().compile_model(model, "CPU", settings))
        except Exception as error:
            raise CheckFailed(f"openvino refuses {files[0]}: {error}") from error


RUNTIME = OpenVino()
