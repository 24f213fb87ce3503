"""PyTorch to one ONNX file: dynamo exporter, opset 20, dynamic batch, checked and simplified."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from litezoo.models.errors import CheckFailed, require

from .parity import Parity, check_parity
from .runtime import SIDE_MIN, SIDE_STEP, Array
from .runtime_onnxruntime import DISABLED_OPTIMIZERS
from .to_half import emulate_bf16

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["INPUT", "OPSET", "OUTPUT", "export_onnx", "load_onnx", "open_axes", "simplify_onnx"]

OPSET = 20
INPUT, OUTPUT = "input", "logits"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress prints and deprecation notes off the terminal."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)


def open_axes(largest: int | None = None, *, dynamic_resolution: bool) -> dict[int, Any]:
    """Return torch.export's names of the open axes of (N, C, H, W); N goes up to `largest` (not 1).

    Height and width are written as 32 times a number from 2 on (`runtime.check_size`): torch then
    has nothing to prove about rounding, as where branches of a block halve a side in two ways.
    """
    dim = torch.export.Dim
    axes: dict[int, Any] = {} if largest == 1 else {0: dim("batch", min=1, max=largest)}
    if dynamic_resolution:
        for axis, name in ((2, "height"), (3, "width")):
            axes[axis] = SIDE_STEP * dim(f"{name}_steps", min=SIDE_MIN // SIDE_STEP)
    return axes


def export_onnx(
    model: nn.Module,
    images: Array,
    *,
    metadata: Mapping[str, str],
    dynamic_resolution: bool = False,
) -> ModelProto:
    """Return the ONNX form of `model` (eval mode): (batch, C, H, W) to (batch, classes).

    `images` is an example batch of two or more; `metadata` goes into the file's properties. With
    `dynamic_resolution` height and width are open as well: axes "batch", "height" and "width".
    """
    require("onnx", purpose="export", extra="export")
    require("onnxscript", purpose="export", extra="export")
    with _silence():
        program = torch.onnx.export(
            model,
            (torch.from_numpy(images),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(open_axes(dynamic_resolution=dynamic_resolution),),
            verbose=False,
        )
    assert program is not None
    proto: ModelProto = program.model_proto
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if versions.get("") != OPSET:
        raise CheckFailed(f"the exporter wrote opset {versions.get('')} instead of {OPSET}")
    if dynamic_resolution:
        proto.graph.ClearField("value_info")  # in height_steps and width_steps; inferred anew
        sides = proto.graph.input[0].type.tensor_type.shape.dim[2:]
        for side, name in zip(sides, ("height", "width"), strict=True):
            side.dim_param = name
    return _finish(proto, metadata)


def _finish(proto: ModelProto, metadata: Mapping[str, str]) -> ModelProto:
    """Drop the exporter's notes on every node, add ours to the file, and check it whole."""
    from onnx import checker, helper

    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("doc_string")
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    helper.set_model_props(proto, dict(metadata))
    checker.check_model(proto, full_check=True)
    return proto


def load_onnx(proto: ModelProto) -> Callable[[Array], Array]:
    """Return an ONNX model in memory as a function, run by ONNX Runtime on the CPU.

    A bfloat16 model runs in float32 with its roundings. The function takes float32 and gives
    float32 (N, classes), whatever 16-bit float the model's own input and output may be.
    """
    runtime = require("onnxruntime", purpose="checking ONNX files", extra="export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        emulate_bf16(proto).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=DISABLED_OPTIMIZERS,
    )
    entry = session.get_inputs()[0]
    is_half = entry.type == "tensor(float16)"

    def run(images: Array) -> Array:
        given = images.astype(np.float16) if is_half else images
        logits: Array = np.asarray(session.run(None, {entry.name: given})[0], np.float32)
        return logits

    return run


def simplify_onnx(proto: ModelProto, images: Array) -> tuple[ModelProto, Parity]:
    """Return onnxsim's form of the model and the proof that it computes the same."""
    onnxsim = require("onnxsim", purpose="export", extra="export")
    with _silence():
        simplified, _ = onnxsim.simplify(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    simplified = _finish(simplified, metadata)
    parity = check_parity(
        "onnxsim",
        load_onnx(simplified)(images),
        load_onnx(proto)(images),
        reference="the ONNX file before it",
        tolerance=1e-5,
    )
    return simplified, parity
