"""What every inference runtime does for litezoo, and how one is found by name.

A runtime is one file, `export/runtime_<name>.py`, with `RUNTIME = ...`; its package is imported
only when it is used. Other packages add theirs through the entry point group `litezoo.runtimes`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import UsageError, unknown_name
from litezoo.recipes.devices import Device

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "SIDE_MIN",
    "SIDE_STEP",
    "Array",
    "BuildSource",
    "Objective",
    "Runtime",
    "Session",
    "check_size",
    "get_runtime",
    "list_runtimes",
]

Array = NDArray[np.float32]
#: What an engine is tuned for: one batch soonest, or most images per second.
Objective = Literal["latency", "throughput"]

#: Sides, in pixels, of the images that an engine of open resolution takes: multiples of the zoo's
#: total stride, from the size on at which no feature map is a single pixel.
SIDE_STEP, SIDE_MIN = 32, 64


def check_size(height: int, width: int, what: str) -> None:
    """Refuse a size that no open resolution takes: a UsageError that begins with `what` it is of.

    >>> check_size(200, 320, "images are")
    Traceback (most recent call last):
    litezoo.models.errors.UsageError: images are 200x320 pixels; an open resolution takes sides \
that are multiples of 32, from 64 on
    """
    if min(height, width) < SIDE_MIN or height % SIDE_STEP or width % SIDE_STEP:
        raise UsageError(
            f"{what} {height}x{width} pixels; an open resolution takes sides that are "
            f"multiples of {SIDE_STEP}, from {SIDE_MIN} on"
        )


@dataclass(frozen=True, kw_only=True)
class BuildSource:
    """What engines are built from.

    `onnx` maps a form of the graph (fp32, fp16, bf16, int8, int8-fp16, int8-u8s8...) to its file;
    `module` is the same network in PyTorch (deploy form, float32, eval mode), where it is at hand;
    `images` (N, C, H, W) are preprocessed examples, `calibration` more of them, for toolkits that
    quantize by themselves. With `open_resolution` the files leave the image's height and width open
    and the engines have to take every size of `check_size`; a runtime that has no such engines
    says why in an attribute `one_size`.
    """

    onnx: Mapping[str, Path]
    module: nn.Module | None = None
    images: Array | None = None
    calibration: Array | None = None
    open_resolution: bool = False

    def file(self, form: str) -> Path:
        """Return the typed file of a form; UsageError where it was not made."""
        if form not in self.onnx:
            raise UsageError(f"there is no {form} ONNX file; there is {', '.join(self.onnx)}")
        return self.onnx[form]


class Session(Protocol):
    """An engine in memory, ready to run."""

    def run(self, batch: Array) -> Array:
        """Return logits (N, classes) of a preprocessed batch (N, C, H, W)."""


@runtime_checkable
class Runtime(Protocol):
    """Builds and loads the engines of one inference library."""

    @property
    def name(self) -> str:
        """The name used in device files, manifests and results."""

    @property
    def precisions(self) -> Mapping[str, str | None]:
        """The form of ONNX file that each precision is built from; None is PyTorch's module."""

    def missing(self, device: Device) -> str | None:
        """Return None if this machine can build and run for `device`, else why not, in a sentence.

        The sentence ends with what to type where typing helps.
        """

    def versions(self) -> Mapping[str, str]:
        """Return the versions of the packages that decide what is built."""

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Write this runtime's files for one of `precisions` into `folder` and return them.

        The ONNX file itself is returned where the runtime loads it as it is. Raises MissingError
        where `missing` has a reason, CheckFailed where the library refuses the graph.
        """

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load what `build` wrote; `threads` limits CPU runtimes (default: all cores)."""


def _modules() -> dict[str, str]:
    package = importlib.import_module(__package__)
    prefix = "runtime_"
    return {
        info.name.removeprefix(prefix): f"{__package__}.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.startswith(prefix)
    }


def list_runtimes() -> list[str]:
    """Return the names of all runtimes, installed or not."""
    return sorted({*_modules(), *(p.name for p in entry_points(group="litezoo.runtimes"))})


def get_runtime(name: str) -> Runtime:
    """Look up a runtime by name; its package is not imported yet.

    >>> get_runtime("tensort")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    litezoo.models.errors.UsageError: unknown runtime 'tensort'; did you mean 'tensorrt'? ...
    """
    if name in _modules():
        runtime: Runtime = importlib.import_module(_modules()[name]).RUNTIME
        return runtime
    for point in entry_points(group="litezoo.runtimes", name=name):
        runtime = point.load()
        return runtime
    raise unknown_name("runtime", name, list_runtimes())
