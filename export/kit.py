"""Build kits: all that a machine with the GPU needs to build, check and measure the engines.

TensorRT builds an engine only on the GPU it is for. Where that GPU is not here, export writes a
folder to copy there: the typed ONNX files, the builder, inputs with their expected logits and a
README of three commands. What comes back is the engines and `result.json`, whose rows
`benchmarks/import_kit.py` takes into the results.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from litezoo.models.errors import CheckFailed, UsageError, require
from litezoo.models.files import file_sha256, write_whole
from litezoo.recipes.devices import Device

from . import build_engine
from .build_engine import BuildOptions, Settings, trtexec_command
from .runtime import Array
from .runtime_tensorrt import create_settings, read_signature
from .to_half import IoType, emulate_bf16, read_io
from .triton import platform_config

__all__ = ["write_kit"]


def write_kit(
    folder: Path,
    *,
    device: Device,
    model_name: str,
    onnx_files: Mapping[str, Path],
    inputs: Array,
    logits: Array,
    input_name: str = "input",
    output_name: str = "logits",
    options: BuildOptions | None = None,
    triton: bool = False,
) -> tuple[Path, ...]:
    """Write a build kit into an existing folder and return all its files.

    `onnx_files` maps a precision (those of `build_engine.FORMS`) to its typed ONNX file; `logits`
    (N, classes) are what the fp32 model gives for the preprocessed `inputs` (N, C, H, W). What an
    int8 file gives for them is computed here by ONNX Runtime: its engine is compared with that.
    `triton` adds what `build_engine.py --triton` needs to lay out a Triton model repository.
    """
    if not re.fullmatch(r"\w[\w.+-]*", model_name):
        raise UsageError(f"{model_name!r} is no name for files; use letters, digits, . _ + and -")
    if not onnx_files:
        raise UsageError("a kit needs at least one ONNX file; give onnx_files={'fp16': file}")
    if inputs.ndim != 4 or logits.ndim != 2 or not 0 < len(inputs) == len(logits):
        raise UsageError(
            f"a kit needs inputs (N, C, H, W) and logits (N, classes), not {inputs.shape} and "
            f"{logits.shape}"
        )
    if not (np.isfinite(inputs).all() and np.isfinite(logits).all()):
        raise UsageError("the kit's inputs and logits must be finite; check the model's weights")
    wanted = (input_name, output_name, inputs.shape[1:])
    engines: list[Settings] = []
    contents: dict[str, bytes] = {}
    expected = {"inputs": inputs.astype(np.float32), "logits": logits.astype(np.float32)}
    configs: dict[str, str] = {}
    for precision, file in onnx_files.items():
        if (found := read_signature(file)) != wanted:
            raise UsageError(f"{file.name} has (input, output, (C, H, W)) {found}, not {wanted}")
        settings = create_settings(
            device,
            model=model_name,
            precision=precision,
            onnx_name=f"{model_name}.{build_engine.FORMS.get(precision, precision)}.onnx",
            input_name=input_name,
            output_name=output_name,
            image_shape=found[2],
            options=options,
        )
        engines.append(settings)
        contents[settings.onnx] = file.read_bytes()
        if settings.form.startswith("int8"):
            expected[f"logits_{settings.form}"] = _logits_of(file, inputs, like=logits)
        if triton:
            name = f"{model_name}_{settings.form}"
            configs[precision] = f"{name}.pbtxt"
            contents[configs[precision]] = platform_config(
                name, device=device, platform="tensorrt_plan", input_name=input_name,
                output_name=output_name, image_shape=found[2], classes=logits.shape[1],
                io=_io_of(file),
            ).encode()  # fmt: skip
    arrays = io.BytesIO()
    np.savez(arrays, allow_pickle=False, **expected)
    contents |= {
        "build_engine.py": Path(build_engine.__file__).read_bytes(),
        "expected.npz": arrays.getvalue(),
        "requirements.txt": _requirements(engines[0]).encode(),
        "trtexec.sh": _trtexec_script(engines).encode(),
        "README.md": _readme(device, engines=engines, triton=triton).encode(),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    (folder / "trtexec.sh").chmod(0o755)
    kit = {
        "format": build_engine.KIT_FORMAT,
        "model": model_name,
        "device": device.name,
        "expected": "expected.npz",
        "engines": [dataclasses.asdict(settings) for settings in engines],
        "triton": configs,
        "files": {name: file_sha256(folder / name) for name in sorted(contents)},
    }
    write_whole(folder / "kit.json", (json.dumps(kit, indent=2) + "\n").encode())
    return tuple(folder / name for name in (*contents, "kit.json"))


def _io_of(file: Path) -> IoType:
    """Return the type that a file takes and gives."""
    onnx = require("onnx", purpose="writing a build kit", extra="export")
    return read_io(onnx.load(file))


def _logits_of(file: Path, inputs: Array, *, like: Array) -> Array:
    """Return what a typed file means: its logits by ONNX Runtime, node by node as written.

    Optimized, ONNX Runtime 1.32 gives for mobilenetv2_035 in int8 with fp16 parts logits that are
    wrong by more than the largest of them; unoptimized it agrees with OpenVINO to 0.3 %.
    """
    onnx = require("onnx", purpose="writing an int8 build kit", extra="export")
    onnxruntime = require("onnxruntime", purpose="writing an int8 build kit", extra="export")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        emulate_bf16(onnx.load(file)).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    entry = session.get_inputs()[0]
    images = inputs.astype(np.float16 if entry.type == "tensor(float16)" else np.float32)
    rows = [session.run(None, {entry.name: images[i : i + 1]})[0] for i in range(len(images))]
    found: Array = np.concatenate(rows).astype(np.float32)
    if found.shape != like.shape or not np.isfinite(found).all():
        raise CheckFailed(
            f"{file.name} gives outputs of shape {found.shape} or values that are not finite; "
            "quantize it again with other calibration images"
        )
    return found


def _requirements(settings: Settings) -> str:
    return (
        f"tensorrt-cu12>={settings.tensorrt_min},<{settings.tensorrt_below}\n"
        "# cuda-python 13 needs driver 580; 12 runs on driver 535, as tensorrt-cu12 does.\n"
        "cuda-python>=12.6.1,<13\n"
        "numpy\n"
    )


def _trtexec_script(engines: list[Settings]) -> str:
    lines = [
        "#!/bin/sh",
        "# The same engines built and timed by NVIDIA's trtexec, which pip does not install: it is",
        "# in NVIDIA's TensorRT container and its deb, rpm and tar packages. trtexec compares no",
        "# outputs, and trtexec 11 times with a CUDA graph, so its times are lower.",
        "set -eu",
        'cd "$(dirname "$0")"',
    ]
    for settings in engines:
        lines += ["", f"echo {shlex.quote(settings.precision)}"]
        lines.append(trtexec_command(settings).replace(" --", " \\\n    --"))
    return "\n".join(lines) + "\n"


def _readme(device: Device, *, engines: list[Settings], triton: bool) -> str:
    first = engines[0]
    models = "\n".join(f"- `{s.onnx}`: {s.precision}, as `{_plan(s)}`" for s in engines)
    layout = (
        f"""
    .venv/bin/python build_engine.py --triton

also writes `triton/`, a model repository for Triton Inference Server: one model for each precision,
batches up to {first.batch_max} gathered by the server. The server's TensorRT must be the one in the
plans' names. Kits of other GPUs of the same model can be laid into the same folder.
"""
        if triton
        else ""
    )
    return f"""# {first.model} for {first.title}

TensorRT builds an engine only on the GPU that will run it. This folder has what that takes; copy
all of it to a Linux machine with

- {device.title}, compute capability {first.compute_capability}
- NVIDIA driver {first.driver_min} or newer
- Python 3.10 or newer

There, in this folder:

    python3 -m venv .venv
    .venv/bin/python -m pip install -r requirements.txt
    .venv/bin/python build_engine.py

It checks this folder's files and the machine. Then, for each ONNX file, it builds the engine, runs
the inputs of `expected.npz` ({first.channels} x {first.height} x {first.width}) through it and
compares the logits: of fp32, fp16 and bf16 with the float network's, of int8 with what ONNX Runtime
makes of the same file. It keeps the engine only if they agree, and times it at the batch sizes
{first.batch_min}, {first.batch_opt} and {first.batch_max}, with a CUDA graph and without.

{models}

Beside each engine lies `....layers.json` with the time of every layer and what TensorRT made of it.
`timing.cache` makes the next build on this machine faster. Options (`--help`): one precision only,
a longer search, engines for newer TensorRT versions or for other GPUs.
{layout}
Copy back `result.json` (GPU, driver, versions, differences, times), the `.plan` and the
`.layers.json` files. `litezoo bench --import result.json` then adds the times to the results. A
.plan runs only on the same GPU architecture and exactly the TensorRT version in its name, unless
the name says otherwise (`plus`: any GPU from Ampere on, `.vc`: newer TensorRT too).

Exit status: 0 ok, 2 wrong usage, 3 a check failed (a changed file, different outputs), 4 something
is missing on the machine. Each says in one sentence what to do. `trtexec.sh` has the equivalent
trtexec lines, for those who prefer that tool.
"""


def _plan(settings: Settings) -> str:
    return build_engine.engine_name(
        build_engine.engine_stem(settings.onnx, precision=settings.precision),
        compute_capability=settings.compute_capability,
        tensorrt_version="<version>",
        options=settings,
    )
