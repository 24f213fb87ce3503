"""ONNX Runtime on the CPU: loads the typed ONNX file as it is.

Only bfloat16 files, which no engine of this runtime is built from, are loaded in float32 with their
roundings, so that what is in them can be verified where no such kernel is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from litezoo.models.errors import CheckFailed, MissingError, require
from litezoo.recipes.devices import Device

from .runtime import Array, BuildSource, Objective, Session

__all__ = [
    "DISABLED_OPTIMIZERS",
    "RUNTIME",
    "OnnxRuntime",
    "OnnxSession",
    "package_version",
    "session_options",
]

#: Of ONNX Runtime 1.32: with it Q/DQ files typed float16 have errors above 1 (as we read it, a
#: bias gets the scale s_x * s_w, which is 0 in float16).
DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]


def package_version() -> str:
    """Return the version of ONNX Runtime, of whichever of its packages is installed."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise MissingError("ONNX Runtime is not installed: pip install 'litezoo[export]'")


def session_options(threads: int | None) -> Any:
    """Return options of a session that runs one operator at a time on `threads` CPU threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


class OnnxSession:
    """A session of any execution provider; takes and gives float32."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.input = session.get_inputs()[0].name
        self.is_half = session.get_inputs()[0].type == "tensor(float16)"

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes) of a batch (N, C, H, W)."""
        given = batch.astype(np.float16) if self.is_half else batch
        logits: Array = np.asarray(self.session.run(None, {self.input: given})[0], np.float32)
        return logits


class OnnxRuntime:
    """The CPU execution provider, pinned to a number of threads."""

    name = "onnxruntime"
    precisions: ClassVar[Mapping[str, str | None]] = {
        "fp32": "fp32",
        "fp16": "fp16",
        "int8": "int8-u8s8",
    }

    def missing(self, device: Device) -> str | None:
        """Return what to install, or None."""
        if find_spec("onnxruntime") is None:
            return "runtime 'onnxruntime' needs onnxruntime: pip install 'litezoo[export]'"
        return None

    def versions(self) -> Mapping[str, str]:
        """Return the package's version."""
        return {"onnxruntime": package_version()}

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Return the ONNX file itself."""
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        form = self.precisions[precision]
        assert form is not None
        if device.kind == "npu" and precision == "int8":
            form = "int8"  # what the chip's compiler takes, not what a CPU is fast at
        return (source.file(form),)

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load the ONNX file; `objective` changes nothing here.

        `precision` may be a form of file that is not among `precisions`, to verify it.
        """
        if (reason := self.missing(device)) is not None:
            raise MissingError(reason)
        import onnxruntime

        if is_bf16 := precision.endswith("bf16"):
            require("onnx", purpose="verifying a bf16 file", extra="export")
        try:
            session = onnxruntime.InferenceSession(
                _emulated(files[0]) if is_bf16 else str(files[0]),
                session_options(threads),
                providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:
            raise CheckFailed(f"onnxruntime refuses {files[0]}: {error}") from error
        return OnnxSession(session)


def _emulated(file: Path) -> bytes:
    import onnx

    from .to_half import emulate_bf16

    content: bytes = emulate_bf16(onnx.load(file)).SerializeToString()
    return content


RUNTIME = OnnxRuntime()
