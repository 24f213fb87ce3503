"""Triton Inference Server: a model repository of an engine, with its configuration.

The layout is `<model>/config.pbtxt` and, in the version's folder `<model>/1/`, one TensorRT plan
for each GPU (`cc_model_filenames` says which serves which compute capability) or one model.onnx,
which ONNX Runtime serves. Requests are gathered into batches; a plan replays CUDA graphs. Build
kits carry the configuration too: where they run, `build_engine.py --triton` adds the plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from litezoo.models.errors import UsageError, unknown_name
from litezoo.models.files import write_whole
from litezoo.recipes.devices import Device

from . import build_engine
from .to_half import IoType

__all__ = ["Platform", "platform_config", "write_triton"]

#: What the server runs the file with.
Platform = Literal["tensorrt_plan", "onnxruntime_onnx"]
#: The type of the file's input and output in Triton's words.
_TYPES: dict[IoType, str] = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_BF16"}
LABELS = "labels.txt"
VERSION = "1"


def platform_config(
    model: str,
    *,
    device: Device,
    platform: Platform,
    input_name: str,
    output_name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    io: IoType = "fp32",
    queue_delay_us: int = 100,
    instances: int = 1,
    has_labels: bool = False,
) -> str:
    """Return config.pbtxt without the names of plans.

    Batches are the device's; a request waits at most `queue_delay_us` microseconds for others.
    `image_shape` is (C, H, W), `io` the type of the file's input and output (`to_half.read_io`).
    Each of `instances` holds the engine once. UsageError for what Triton has no use for, and where
    the device's smallest batch is not 1.
    """
    _check_name(model)
    batch = device.batch
    if batch.min != 1:
        raise UsageError(
            f"{device.name} has batches from {batch.min} on and Triton sends single requests too; "
            "give the device batch: {min: 1, ...}"
        )
    if min(*image_shape, classes, instances) < 1 or queue_delay_us < 0:
        raise UsageError(
            f"Triton needs sizes, classes and instances of 1 or more and a delay of 0 or more, not "
            f"{image_shape}, {classes}, {instances} and {queue_delay_us}"
        )
    if io not in _TYPES:
        raise unknown_name("type of input and output", io, list(_TYPES))
    name, dims, kind_of_data = _quoted(input_name), ", ".join(map(str, image_shape)), _TYPES[io]
    labels = f"\n    label_filename: {_quoted(LABELS)}" if has_labels else ""
    sizes = sorted({batch.opt, batch.max})
    kind = "KIND_GPU" if device.kind == "gpu" else "KIND_CPU"
    parts = [
        f"""name: {_quoted(model)}
platform: {_quoted(platform)}
max_batch_size: {batch.max}
input [
  {{
    name: {name}
    data_type: {kind_of_data}
    dims: [ {dims} ]
  }}
]
output [
  {{
    name: {_quoted(output_name)}
    data_type: {kind_of_data}
    dims: [ {classes} ]{labels}
  }}
]
instance_group [
  {{
    count: {instances}
    kind: {kind}
  }}
]"""
    ]
    if batch.max > 1:
        parts.append(f"""dynamic_batching {{
  preferred_batch_size: [ {", ".join(map(str, sizes))} ]
  max_queue_delay_microseconds: {queue_delay_us}
}}""")
    if platform == "tensorrt_plan":
        graphs = "".join(
            f"""
    graph_spec {{
      batch_size: {size}
      input {{ key: {name} value {{ dim: [ {dims} ] }} }}
    }}"""
            for size in sorted({1, *sizes})
        )
        parts.append(f"""optimization {{
  cuda {{
    graphs: true{graphs}
  }}
}}""")
    parts += [
        f"""model_warmup [
  {{
    name: "batch {size}"
    batch_size: {size}
    inputs {{
      key: {name}
      value {{ data_type: {kind_of_data} dims: [ {dims} ] zero_data: true }}
    }}
  }}
]"""
        for size in sorted({1, *sizes})
    ]
    return "\n".join(parts) + "\n"


def write_triton(
    folder: Path,
    *,
    model: str,
    device: Device,
    plans: Mapping[str, Path] | None = None,
    onnx_file: Path | None = None,
    input_name: str,
    output_name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    io: IoType = "fp32",
    labels: Sequence[str] = (),
    queue_delay_us: int = 100,
    instances: int = 1,
) -> tuple[Path, ...]:
    """Write `folder`/<model>/ for Triton and return its files.

    Either `plans`, by compute capability ("7.5"), or one `onnx_file`; `io` is the type of their
    input and output. `labels` are the names of the classes, if known. UsageError for plans that one
    server cannot have together, or that are of another GPU than said.
    """
    if (not plans) == (onnx_file is None):
        raise UsageError("Triton serves either plans={'7.5': file} or one onnx_file; give one")
    if labels and len(labels) != classes:
        raise UsageError(f"{len(labels)} labels are given for {classes} classes; give each its own")
    if any("\n" in label for label in labels):
        raise UsageError("a label has a line break and labels.txt one label a line; rename it")
    files = _check_plans(plans or {})
    config = platform_config(
        model, device=device, platform="tensorrt_plan" if plans else "onnxruntime_onnx",
        input_name=input_name, output_name=output_name, image_shape=image_shape, classes=classes,
        io=io, queue_delay_us=queue_delay_us, instances=instances, has_labels=bool(labels),
    )  # fmt: skip
    if onnx_file is not None:
        files = {"model.onnx": onnx_file}
    else:
        config = build_engine.name_plans(config, files.values())
    if absent := [file for file in files.values() if not file.is_file()]:
        raise UsageError(f"{absent[0]} is not there; export the model first")
    version = folder / model / VERSION
    version.mkdir(parents=True, exist_ok=True)
    for older in version.iterdir():  # of another build: the server would not name it
        if older.suffix in (".plan", ".onnx") and older.name not in files:
            older.unlink()
    written = [
        write_whole(version / name, file.read_bytes()) for name, file in sorted(files.items())
    ]
    if labels:
        written.append(write_whole(folder / model / LABELS, "\n".join(labels) + "\n"))
    return (*written, write_whole(folder / model / "config.pbtxt", config))


def _quoted(text: str) -> str:
    """Return text as protobuf's text format reads it; its escapes are C's, not JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _check_name(model: str) -> None:
    if not model or set(model) & set('/\\"\n') or model.startswith("."):
        raise UsageError(f"{model!r} is no name for a model's folder; use letters, digits, _ and -")


def _check_plans(plans: Mapping[str, Path]) -> dict[str, Path]:
    """Return plans by file name, after comparing their names with what was said of them."""
    versions = set()
    for capability, file in plans.items():
        try:
            named = build_engine.read_engine_name(file.name)
        except build_engine.Wrong as error:
            raise UsageError(str(error)) from error
        if named.compute_capability != capability:
            raise UsageError(
                f"{file.name} is for compute capability {named.compute_capability}, not "
                f"{capability}; name it by its own"
            )
        versions.add(named.tensorrt_version)
    if len(versions) > 1:
        raise UsageError(
            f"the plans are of TensorRT {' and '.join(sorted(versions))}, and a server has one; "
            "build all with the same"
        )
    return {file.name: file for file in plans.values()}
