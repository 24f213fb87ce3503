"""One ONNX file for each form that an engine is built from, each compared with PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from litezoo.models.errors import CheckFailed, MissingError
from litezoo.recipes.devices import get_device

from .calibration import Calibration, choose_calibration
from .limits import apply_rewrites, check_limits
from .parity import BATCHES, TOLERANCE, Parity, check_batches
from .qdq_lint import check_lint
from .request import Ranker, Request, batches_of, form_of, repeat_to, wanted_engines
from .runtime import Array, get_runtime
from .source import Source
from .to_half import HALVES, Half, Io, check_fp16_range, to_half
from .to_int8 import Form, quantize
from .to_onnx import export_onnx, load_onnx, simplify_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

    from .validation import Validation

__all__ = ["Typed", "check_form", "tolerance_of", "typed_onnx"]


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The typed ONNX models by form, their parity, and what int8 was calibrated on."""

    protos: Mapping[str, ModelProto]
    parities: tuple[Parity, ...]
    fp32: ModelProto
    calibration: Calibration | None
    rewrites: tuple[str, ...]


def typed_onnx(
    deploy: nn.Module,
    images: Array,
    expected: Array,
    second: tuple[Array, Array] | None,
    source: Source,
    request: Request,
    validation: Validation | None,
    rank: Ranker | None,
    not_built: dict[str, str],
    progress: Callable[[str], None],
) -> Typed:
    """Return one checked ONNX model for each form that an engine is built from."""
    if (reason := get_runtime("onnxruntime").missing(get_device("cpu"))) is not None:
        raise MissingError(reason)
    metadata = {
        "litezoo.model": source.spec.name,
        "litezoo.graph_form": "deploy",
        "litezoo.preprocess": json.dumps(source.preprocess.to_dict()),
        "litezoo.classes": json.dumps(source.classes),
    }
    exported = export_onnx(
        deploy, images[:2], metadata=metadata, dynamic_resolution=request.dynamic_resolution
    )
    progress("simplifying with onnxsim, comparing")
    fp32, parity = simplify_onnx(exported, images)
    parities = [parity]
    progress("checking the device's limits")
    fp32, rewrites = _within_limits(fp32, request)
    if rewrites:
        parities.append(check_form("fp32", fp32, images, expected, second, stage="rewritten onnx"))
    wanted = [
        form
        for r, p in wanted_engines(request)
        if (form := form_of(r, p, request.device)) is not None
    ]
    protos: dict[str, ModelProto] = {}
    calibration = None
    try:
        if any(precision.startswith("int8") for _, precision in wanted_engines(request)):
            calibration = choose_calibration(
                request.calibration, data=source.data, weights=source.weights,
                preprocess=source.preprocess,
            )  # fmt: skip
    except MissingError as error:
        request.refuse("int8", error, not_built)
    for form in dict.fromkeys(wanted):
        if form.startswith("int8") and calibration is None:
            continue
        try:
            progress(f"typing {form}")
            if "mixed" in form:
                assert calibration is not None
                typed, said = _mixed(
                    fp32, form, images, calibration, protos, request, validation, rank, progress
                )
            else:
                typed, said = _retype(fp32, form, images, calibration, request), []
            proto, done = apply_rewrites(typed, request.device)
            rewrites += [what for what in (*said, *done) if what not in rewrites]
            parities.append(
                check_form(
                    form, proto, images, expected, second, batches=batches_of(request.device)
                )
            )
            protos[form] = proto
        except (CheckFailed, MissingError) as error:
            request.refuse(f"onnx {form}", error, not_built)
    if not protos:
        raise CheckFailed(f"no ONNX file could be made: {'; '.join(not_built.values())}")
    return Typed(
        protos=protos, parities=tuple(parities), fp32=fp32, calibration=calibration,
        rewrites=tuple(rewrites),
    )  # fmt: skip


def _within_limits(fp32: ModelProto, request: Request) -> tuple[ModelProto, list[str]]:
    """Return the float32 model without the operators that the device forbids, and what was done.

    Batch and opset are left for the typed file: quantization works on the open, newer form.
    """
    findings = check_limits(
        fp32, request.device, dynamic=request.device.batch.max > 1 or request.dynamic_resolution,
        precision=request.precisions[0],
    )  # fmt: skip
    if wrong := [f for f in findings if f.kind == "forbidden" and not f.fixed]:
        raise CheckFailed("; ".join(map(str, wrong)))
    limits = dataclasses.replace(request.device.limits, static_shapes=False, opset_max=None)
    model, said = apply_rewrites(fp32, dataclasses.replace(request.device, limits=limits))
    return model, list(said)


def _retype(
    fp32: ModelProto,
    form: str,
    images: Array,
    calibration: Calibration | None,
    request: Request,
) -> ModelProto:
    """Return the float32 model in a form; CheckFailed where it cannot be."""
    if form == "fp32":
        return fp32
    body = form.removeprefix("int8-")
    half: Half | None = body if body in HALVES else None
    ends: Io = "half" if half == request.io else "fp32"
    if half == "fp16":
        check_fp16_range(fp32, images)
    if half is not None and form == half:
        return to_half(fp32, half, io=ends)
    assert calibration is not None
    limits = request.device.limits
    proto = quantize(
        fp32,
        calibration.images,
        form="int8" if half is not None else cast(Form, form),
        per_channel=limits.quantization != "per-tensor",
        keep_float=request.keep_float,
        weight_bits=7 if limits.weight_bits == 7 else 8,
    )
    if half is not None:
        proto = to_half(proto, half, io=ends)
        check_lint(proto)
    return proto


def _mixed(
    fp32: ModelProto,
    form: str,
    images: Array,
    calibration: Calibration,
    protos: Mapping[str, ModelProto],
    request: Request,
    validation: Validation | None,
    rank: Ranker | None,
    progress: Callable[[str], None],
) -> tuple[ModelProto, list[str]]:
    """Return the fastest mixture of 8-bit and float convolutions, and what it is in a sentence."""
    if rank is None:
        raise MissingError("a mixture is searched by measuring; export with a function to rank")
    from .mixed import find_mixture

    def accept(proto: ModelProto) -> bool:
        if validation is None:
            return True
        accuracy = validation.accuracies({form: load_onnx(proto)})[form]
        return accuracy.drop <= request.max_drop

    def retype(keep_float: Collection[str]) -> ModelProto:
        more = dataclasses.replace(request, keep_float=(*request.keep_float, *keep_float))
        return _retype(fp32, "int8-u8", images, calibration, more)

    mixture = find_mixture(
        fp32,
        protos.get("int8-u8") or retype(()),
        retype=retype,
        accept=accept,
        rank=rank,
        images=repeat_to(images, request.batch),
        calibration=calibration.images,
        device=request.device,
        float_type="bf16" if form.endswith("bf16") else "fp32",
        threads=request.threads,
        objective=request.objective,
        progress=progress,
    )
    return mixture.proto, [mixture.said]


def tolerance_of(form: str) -> float:
    """How far a form's logits may be from PyTorch's; an int8 form without its own has int8's."""
    return TOLERANCE.get(form.replace("int8-", "int8+"), TOLERANCE["int8"])


def check_form(
    form: str,
    proto: ModelProto,
    images: Array,
    expected: Array,
    second: tuple[Array, Array] | None,
    *,
    stage: str | None = None,
    batches: tuple[int, ...] = BATCHES,
) -> Parity:
    """Compare a typed model with PyTorch at every batch size, and at the second resolution."""
    return check_batches(
        stage or f"onnx {form}", load_onnx(proto), images, expected, tolerance=tolerance_of(form),
        batches=batches, second=second,
    )  # fmt: skip
