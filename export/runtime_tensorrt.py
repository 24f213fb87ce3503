"""TensorRT: engines for NVIDIA GPUs, each tied to one GPU architecture and one TensorRT version.

The building and running are in `build_engine.py`, which build kits carry too; this file gives them
the face of a litezoo runtime. tensorrt and cuda-python are imported when they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from litezoo.models.errors import CheckFailed, LitezooError, MissingError, UsageError, require
from litezoo.models.files import write_whole
from litezoo.recipes.devices import Device

from . import build_engine
from .build_engine import BuildOptions, Engine, Environment, Settings, Target
from .runtime import Array, BuildSource, Objective, Session

__all__ = ["RUNTIME", "TensorRT", "create_settings", "read_signature"]

_INSTALL = "pip install 'litezoo[tensorrt]'"
_ERRORS: Mapping[int, type[LitezooError]] = {2: UsageError, 3: CheckFailed, 4: MissingError}
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def _in_our_errors() -> Iterator[None]:
    """Turn the errors of build_engine.py, which knows nothing of litezoo, into litezoo's."""
    try:
        yield
    except build_engine.NotInstalled as error:
        message = f"runtime 'tensorrt' needs {error.package}: {_INSTALL}"
        raise MissingError(message) from error
    except build_engine.KitError as error:
        raise _ERRORS[error.status](str(error)) from error


def _create_target(device: Device) -> Target:
    if device.compute_capability is None:
        raise UsageError(
            f"{device.name} has no compute_capability, which runtime 'tensorrt' needs; "
            f'add to its device file: compute_capability: "7.5"'
        )
    wanted = device.toolchain.get("tensorrt", ">=10.12,<12")
    versions = re.fullmatch(r">=\s*([\d.]+)\s*,\s*<\s*([\d.]+)", wanted)
    if versions is None:
        raise UsageError(
            f"{device.name}: toolchain tensorrt has the form '>=10.12,<12', not {wanted!r}"
        )
    driver = re.fullmatch(r">=\s*(\d+)(\.\d+)*", device.toolchain.get("driver", ">=0"))
    if driver is None:
        raise UsageError(
            f"{device.name}: toolchain driver has the form '>=535', not "
            f"{device.toolchain['driver']!r}"
        )
    return Target(
        device=device.name,
        title=device.title.partition(" (")[0],
        compute_capability=device.compute_capability,
        tensorrt_min=versions[1],
        tensorrt_below=versions[2],
        driver_min=max(build_engine.DRIVER_MIN, int(driver[1])),
    )


def create_settings(
    device: Device,
    *,
    model: str,
    precision: str,
    onnx_name: str,
    input_name: str,
    output_name: str,
    image_shape: tuple[int, int, int],
    options: BuildOptions | None = None,
) -> Settings:
    """Return how the engine of a typed ONNX file is built for `device`.

    UsageError where the device or TensorRT lacks the precision, or the GPU an option.
    """
    target = _create_target(device)
    if precision not in device.precisions:
        for part in precision.split("+"):  # int8+fp16 needs both
            device.select_precisions(part)
    if precision not in build_engine.FORMS:
        known = ", ".join(build_engine.FORMS)
        raise UsageError(f"runtime 'tensorrt' builds {known} so far, not {precision}")
    channels, height, width = image_shape
    with _in_our_errors():
        return Settings(
            **dataclasses.asdict(target),
            **dataclasses.asdict(options or BuildOptions()),
            model=model,
            precision=precision,
            onnx=onnx_name,
            input_name=input_name,
            output_name=output_name,
            channels=channels,
            height=height,
            width=width,
            batch_min=device.batch.min,
            batch_opt=device.batch.opt,
            batch_max=device.batch.max,
            workspace_mib=device.workspace_mib,
            tolerance=build_engine.TOLERANCES[precision],
        )


def read_signature(onnx_file: Path) -> tuple[str, str, tuple[int, int, int]]:
    """Return an ONNX file's (input name, output name, (C, H, W)).

    A file that TensorRT could not be given here is a UsageError: several inputs or outputs, a
    fixed batch size, an open image size, or weights outside the file.
    """
    onnx = require("onnx", purpose="reading an ONNX file", extra="export")
    if not onnx_file.is_file():
        raise UsageError(f"{onnx_file} is not there; export the model to ONNX first")
    try:
        graph = onnx.load(onnx_file, load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError and what onnx makes of it
        raise UsageError(f"{onnx_file.name} is no ONNX file ({error}); export it again") from error
    outside = onnx.TensorProto.EXTERNAL
    if any(tensor.data_location == outside for tensor in graph.initializer):
        raise UsageError(
            f"{onnx_file.name} keeps weights in another file; export it with external_data=False"
        )
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise UsageError(
            f"{onnx_file.name} has {len(inputs)} inputs and {len(graph.output)} outputs; "
            "one of each is wanted"
        )
    sizes = [
        dim.dim_value if dim.HasField("dim_value") else -1
        for dim in inputs[0].type.tensor_type.shape.dim
    ]
    if len(sizes) != 4 or sizes[0] != -1 or min(sizes[1:]) < 1:
        raise UsageError(
            f"{onnx_file.name} takes {inputs[0].name!r} of shape {sizes} (-1: open); wanted is "
            "(N, C, H, W) with only N open: export it with a dynamic batch"
        )
    return inputs[0].name, graph.output[0].name, (sizes[1], sizes[2], sizes[3])


class _EngineSession:
    """An engine in GPU memory as a litezoo session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, batch: Array) -> Array:
        """Return the logits; a batch above the profile's largest is run in parts."""
        with _in_our_errors():
            return self._engine.run(batch)


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """Builds and loads TensorRT engines; `options` are those of the engines it builds.

    `timing_cache` is a file of what earlier builds measured on this GPU, kept between builds.
    """

    options: BuildOptions = field(default_factory=BuildOptions)
    timing_cache: Path | None = None
    one_size: ClassVar[str] = "runtime 'tensorrt' builds its engines and kits for one image size"

    @property
    def name(self) -> str:
        """Return "tensorrt"."""
        return "tensorrt"

    @property
    def precisions(self) -> Mapping[str, str | None]:
        """Return the form of ONNX file of each precision."""
        return dict(build_engine.FORMS)

    def missing(self, device: Device) -> str | None:
        """Return None if this machine can build and run for `device`, else why not."""
        try:
            self._find(device)
        except LitezooError as error:
            return str(error)
        return None

    def versions(self) -> Mapping[str, str]:
        """Return the versions of TensorRT and cuda-python; what is not here is left out."""
        found = {}
        with contextlib.suppress(build_engine.Missing):
            trt = build_engine.find_tensorrt(install=_INSTALL)
            found["tensorrt"] = str(trt.__version__)
        for package in ("cuda-bindings", "cuda-python"):  # the first since cuda-python 12.8
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault("cuda-python", importlib.metadata.version(package))
        return found

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Write `<stem>.<form>.sm75.trt<version>.plan` into `folder`; its outputs are not checked.

        Precision is in the typed file and nowhere else.
        """
        environment = self._find(device)
        if precision not in build_engine.FORMS:
            raise UsageError(
                f"runtime 'tensorrt' builds {', '.join(build_engine.FORMS)} so far, not {precision}"
            )
        onnx_file = source.file(build_engine.FORMS[precision])
        input_name, output_name, image_shape = read_signature(onnx_file)
        settings = create_settings(
            device,
            model=onnx_file.stem,
            precision=precision,
            onnx_name=onnx_file.name,
            input_name=input_name,
            output_name=output_name,
            image_shape=image_shape,
            options=self.options,
        )
        with _in_our_errors():
            plan = build_engine.build_plan(
                onnx_file, settings=settings, log=_LOG.warning, timing_cache=self.timing_cache
            )
        file = folder / build_engine.engine_name(
            build_engine.engine_stem(onnx_file.name, precision=precision),
            compute_capability=settings.compute_capability,
            tensorrt_version=environment.tensorrt_version,
            options=self.options,
        )
        write_whole(file, plan)
        return (file,)

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Load the .plan among `files` if it was built for this GPU and this TensorRT.

        What the file's name says is compared first, then the machine; the caller has compared its
        sha256 (a plan is code). Repeated runs of one batch size replay a CUDA graph. `threads` and
        `objective` change nothing: the GPU runs one batch at a time either way.
        """
        plans = [file for file in files if file.suffix == ".plan"]
        if len(plans) != 1:
            raise UsageError(
                f"runtime 'tensorrt' loads one .plan file, not {len(plans)}: "
                f"{', '.join(file.name for file in files) or 'no files were given'}"
            )
        file = plans[0]
        with _in_our_errors():
            named = build_engine.read_engine_name(file.name)
        if not named.stem.endswith(f".{build_engine.FORMS.get(precision, precision)}"):
            raise UsageError(
                f"{file.name} does not hold {precision}; its precision is before .sm in its name"
            )
        if not named.runs_on(device.compute_capability or "0.0"):
            plus = " and other GPUs from Ampere on" if named.ampere_plus else ""
            raise UsageError(
                f"{file.name} is for compute capability {named.compute_capability}{plus}, but "
                f"{device.name} has {device.compute_capability}; load it for the device it was "
                "built for"
            )
        environment = self._find(device, subject=f"{file.name} needs")
        if not named.runs_with(environment.tensorrt_version):
            version = named.tensorrt_version
            others = "newer ones up to the next major" if named.version_compatible else "no other"
            raise MissingError(
                f"{file.name} was built by TensorRT {version} and runs on {others}; here is "
                f"{environment.tensorrt_version}: build it again, or pip install "
                f"'tensorrt-cu12=={version}'"
            )
        with _in_our_errors():
            return _EngineSession(
                Engine(
                    file.read_bytes(),
                    environment=environment,
                    log=_LOG.warning,
                    cuda_graph=True,
                    trusted=named.version_compatible,
                )
            )

    def _find(self, device: Device, *, subject: str | None = None) -> Environment:
        target = _create_target(device)
        subject = subject or f"device {device.name!r} needs"
        with _in_our_errors():
            return build_engine.find_environment(target, subject=subject, install=_INSTALL)


RUNTIME = TensorRT()
