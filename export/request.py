"""What is to be built: an export's options, and the engines and files that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from litezoo.models.errors import LitezooError, UsageError, unknown_name
from litezoo.recipes.devices import Device

from .ladder import Stage
from .parity import BATCHES
from .runtime import Array, Objective, Runtime, Session, get_runtime
from .to_half import IoType

__all__ = [
    "Ranker",
    "Request",
    "batches_of",
    "check_io",
    "form_of",
    "in_parts",
    "one_size",
    "repeat_to",
    "wanted_engines",
]

#: Measures engines by label in one interleaved run: sessions, images -> milliseconds a batch.
Ranker = Callable[[Mapping[str, Session], Array], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be built, as asked for."""

    device: Device
    precisions: tuple[str, ...]
    is_auto: bool
    calibration: str | None
    keep_float: tuple[str, ...]
    max_drop: float
    accuracy_images: int
    objective: Objective
    batch: int
    threads: int | None
    dynamic_resolution: bool
    io: IoType
    last_rung: Stage = "qat"
    refused: list[LitezooError] = field(default_factory=list, repr=False)

    def refuse(self, label: str, error: LitezooError, not_built: dict[str, str]) -> None:
        """Note a candidate that failed, or raise where it was asked for by name."""
        if not self.is_auto:
            raise error
        not_built[label] = str(error)
        self.refused.append(error)


def wanted_engines(request: Request) -> list[tuple[Runtime, str]]:
    """The engines to build: every runtime of the device at every precision that it has."""
    runtimes = [get_runtime(name) for name in request.device.runtimes]
    if request.dynamic_resolution:
        runtimes = [runtime for runtime in runtimes if one_size(runtime) is None]
    wanted = [(r, p) for r in runtimes for p in request.precisions if p in r.precisions]
    if not wanted:
        raise UsageError(
            f"no runtime of {request.device.name} has {', '.join(request.precisions)}; "
            + "; ".join(f"{r.name} has {', '.join(r.precisions)}" for r in runtimes)
        )
    return wanted


def form_of(runtime: Runtime, precision: str, device: Device) -> str | None:
    """Return the form of ONNX file that an engine is built from; None is PyTorch's module."""
    form = runtime.precisions[precision]
    is_int8 = form is not None and form.startswith("int8-u8")
    return "int8" if is_int8 and device.kind == "npu" else form


def one_size(runtime: Runtime) -> str | None:
    """Return why a runtime's engines take images of one size only, None where they do not."""
    reason: str | None = getattr(runtime, "one_size", None)
    return reason


def check_io(request: Request, *, embed: bool) -> None:
    """Refuse a type of inputs and outputs that no wanted ONNX file has inside."""
    if request.io not in get_args(IoType):
        raise unknown_name("type of inputs and outputs", request.io, get_args(IoType))
    if request.io == "fp32":
        return
    if embed:
        raise UsageError(
            f"files with the preprocessing embedded take uint8 images, not {request.io}; take one "
            "of --io and --embed-preprocess"
        )
    forms = {
        form_of(runtime, precision, request.device)
        for runtime, precision in wanted_engines(request)
    }
    if not forms & {request.io, f"int8-{request.io}"}:
        raise UsageError(
            f"no ONNX file of {', '.join(request.precisions)} for {request.device.name} is "
            f"{request.io} inside; export with --io fp32"
        )


def batches_of(device: Device) -> tuple[int, ...]:
    """The batch sizes of parity that the device's engines take."""
    return tuple(size for size in BATCHES if size <= device.batch.max)


def in_parts(run: Callable[[Array], Array], most: int) -> Callable[[Array], Array]:
    """Return a function that gives `run` no more than `most` images at a time."""

    def parts(images: Array) -> Array:
        starts = range(0, len(images), most)
        return np.concatenate([run(np.ascontiguousarray(images[i : i + most])) for i in starts])

    return parts


def repeat_to(images: Array, size: int) -> Array:
    """Return `size` images, repeating them where there are not so many."""
    return np.concatenate([images] * -(-size // len(images)))[:size]
