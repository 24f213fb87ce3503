"""OpenVINO on the CPU: an .xml with its .bin.

The file says which layers are int8 (Q/DQ); in which type the others compute is a hint, which is
always set: without one a CPU with bf16 runs float32 files in bf16.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from litezoo.models.errors import CheckFailed, MissingError
from litezoo.recipes.devices import Device

from .runtime import Array, BuildSource, Objective, Session

__all__ = ["RUNTIME", "one_core"]

_PROFILE_S, _PROFILE_RUNS = 0.5, 10


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
        # where the file takes float16, infer converts
        result = self.request.infer({0: batch}, share_inputs=True)
        logits: Array = np.array(result[0], np.float32, copy=True)
        return logits


class OpenVino:
    """The CPU plugin, pinned to a number of threads."""

    name = "openvino"
    objectives: ClassVar[tuple[Objective, ...]] = get_args(Objective)
    precisions: ClassVar[Mapping[str, str | None]] = {
        "fp32": "fp32",
        "fp16": "fp16",
        "bf16": "fp32",
        "int8": "int8-u8",
        "int8+bf16": "int8-u8",
        "int8-mixed": "int8-u8-mixed",
        "int8-mixed+bf16": "int8-u8-mixed-bf16",
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
        compiled = self._compile(files, device, precision, threads, objective)
        return _Session(compiled)

    def layer_ms(
        self,
        files: Sequence[Path],
        batch: Array,
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> dict[str, float]:
        """Return the least time in ms of every layer over runs of a batch (N, C, H, W).

        The names are those of the ONNX nodes; a layer's time holds what is fused into it.
        """
        compiled = self._compile(files, device, precision, threads, objective, profile=True)
        request = compiled.create_infer_request()
        least: dict[str, float] = {}
        end, runs = time.perf_counter() + _PROFILE_S, 0
        while runs < _PROFILE_RUNS or time.perf_counter() < end:
            request.infer({0: batch}, share_inputs=True)
            runs += 1
            for layer in request.get_profiling_info():
                name = layer.node_name.removesuffix("/WithoutBiases")
                ms = 1e3 * layer.real_time.total_seconds()
                if ms > 0:
                    least[name] = min(ms, least.get(name, ms))
        return least

    def _compile(
        self,
        files: Sequence[Path],
        device: Device,
        precision: str,
        threads: int | None,
        objective: Objective,
        *,
        profile: bool = False,
    ) -> Any:
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        half = precision.endswith("bf16")
        if half and "BF16" not in one_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise MissingError(
                f"this CPU has no bf16 instructions, which {precision} needs; take int8 or fp32"
            )
        cores = os.cpu_count() or 1
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            "INFERENCE_NUM_THREADS": threads or cores,
            # several sessions of fewer threads would all be kept on the first cores
            "ENABLE_CPU_PINNING": (threads or cores) >= cores,
            "PERFORMANCE_HINT": objective.upper(),
            "PERF_COUNT": profile,
        }
        try:
            return one_core().compile_model(one_core().read_model(files[0]), "CPU", settings)
        except Exception as error:
            raise CheckFailed(f"openvino refuses {files[0]}: {error}") from error


RUNTIME = OpenVino()
