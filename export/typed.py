"""One ONNX file for each form that an engine is built from, each compared with PyTorch."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import nn

from litezoo.models.catalogue import list_models
from litezoo.models.errors import CheckFailed, MissingError
from litezoo.models.fuse import fuse, graph_form
from litezoo.recipes.devices import get_device

from .artifact import Accuracy
from .calibration import Calibration, choose_calibration
from .ladder import Ladder, NothingToTrain, NotWorthIt, Step, Tried, climb
from .limits import apply_rewrites, check_limits
from .parity import BATCHES, TOLERANCE, Parity, check_batches
from .qdq_lint import check_lint
from .request import (
    Ranker,
    Request,
    batches_of,
    form_of,
    in_parts,
    repeat_to,
    wanted_engines,
)
from .runtime import Array, BuildSource, get_runtime
from .source import Source, logits_of
from .to_half import HALVES, Half, check_fp16_range, to_half
from .to_int8 import Form
from .to_onnx import export_onnx, load_onnx, simplify_onnx
from .worth import build_session

if TYPE_CHECKING:
    from onnx import ModelProto

    from .validation import Validation

__all__ = ["Typed", "check_form", "float_form", "tolerance_of", "typed_onnx"]


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The typed ONNX models by form, their parity, and what int8 was calibrated on.

    `floats` are the float models that 8-bit forms were made from, `rungs` all that they tried.
    """

    protos: Mapping[str, ModelProto]
    parities: tuple[Parity, ...]
    fp32: ModelProto
    calibration: Calibration | None
    rewrites: tuple[str, ...]
    floats: Mapping[str, ModelProto] = field(default_factory=dict)
    rungs: tuple[Tried, ...] = ()


def typed_onnx(
    deploy: nn.Module,
    images: Array,
    expected: Array,
    second: tuple[Array, Array] | None,
    source: Source,
    request: Request,
    validation: Validation | None,
    rank: Ranker | None,
    train_form: nn.Module,
    not_built: dict[str, str],
    progress: Callable[[str], None],
) -> Typed:
    """Return one checked ONNX model for each form that an engine is built from.

    An 8-bit form climbs the ladder where there are validation images, else it is its first rung.
    """
    if (reason := get_runtime("onnxruntime").missing(get_device("cpu"))) is not None:
        raise MissingError(reason)
    progress("simplifying with onnxsim, comparing, checking the device's limits")
    fp32, parity, rewrites = _float_onnx(deploy, images, source, request)
    parities = [parity]
    if rewrites:
        parities.append(check_form("fp32", fp32, images, expected, second, stage="rewritten onnx"))
    wanted = [
        form
        for r, p in wanted_engines(request)
        if (form := form_of(r, p, request.device)) is not None
    ]
    protos: dict[str, ModelProto] = {}
    floats: dict[str, ModelProto] = {}
    calibration = None
    try:
        if any(precision.startswith("int8") for _, precision in wanted_engines(request)):
            calibration = choose_calibration(
                request.calibration, data=source.data, weights=source.weights,
                preprocess=source.preprocess,
            )  # fmt: skip
    except MissingError as error:
        request.refuse("int8", error, not_built)
    int8 = None
    if calibration is not None:
        int8 = _Int8(
            fp32, deploy, train_form, calibration, images, expected, second, source, request,
            validation, rank, progress,
        )  # fmt: skip
    for form in dict.fromkeys(wanted):
        if form.startswith("int8") and int8 is None:
            continue
        try:
            progress(f"typing {form}")
            said: list[str] = []
            if not form.startswith("int8"):
                if form == "fp16":
                    check_fp16_range(fp32, images)
                typed = float_form(fp32, form, request)
            else:
                assert int8 is not None
                typed, floats[form], said = int8.typed(form)
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
    rungs = () if int8 is None else [tried for some in int8.tried.values() for tried in some]
    return Typed(
        protos=protos, parities=tuple(parities), fp32=fp32, calibration=calibration,
        rewrites=tuple(rewrites), floats=floats, rungs=tuple(rungs),
    )  # fmt: skip


def _float_onnx(
    deploy: nn.Module, images: Array, source: Source, request: Request
) -> tuple[ModelProto, Parity, list[str]]:
    """Return the float32 model that the device can take, onnxsim's parity, what was rewritten."""
    metadata = {
        "litezoo.model": source.spec.name,
        "litezoo.graph_form": "deploy",
        "litezoo.preprocess": json.dumps(source.preprocess.to_dict()),
        "litezoo.classes": json.dumps(source.classes),
    }
    exported = export_onnx(
        deploy, images[:2], metadata=metadata, dynamic_resolution=request.dynamic_resolution
    )
    simplified, parity = simplify_onnx(exported, images)
    fp32, rewrites = _within_limits(simplified, request)
    return fp32, parity, rewrites


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


def float_form(fp32: ModelProto, form: str, request: Request) -> ModelProto:
    """Return the float32 model in a float form: itself, or with 16 bits."""
    return fp32 if form == "fp32" else _halved(fp32, form, request)


def _halved(proto: ModelProto, form: str, request: Request) -> ModelProto:
    """Return a model with the 16-bit floats that its form is named for."""
    half = half_of(form)
    assert half is not None
    typed = to_half(proto, half, io="half" if half == request.io else "fp32")
    if form != half:
        check_lint(typed)
    return typed


def half_of(form: str) -> Half | None:
    """Return the 16-bit type of a form's floats, None where they have 32 bits.

    >>> half_of("int8-fp16"), half_of("bf16"), half_of("int8-u8")
    ('fp16', 'bf16', None)
    """
    body = form.removeprefix("int8-")
    return body if body in HALVES else None


class _Int8:
    """The 8-bit forms of one network: the ladder they climb, and what each tried."""

    def __init__(
        self,
        fp32: ModelProto,
        deploy: nn.Module,
        train_form: nn.Module,
        calibration: Calibration,
        images: Array,
        expected: Array,
        second: tuple[Array, Array] | None,
        source: Source,
        request: Request,
        validation: Validation | None,
        rank: Ranker | None,
        progress: Callable[[str], None],
    ) -> None:
        self.deploy, self.train_form = deploy, train_form
        self.calibration, self.images = calibration, images
        self.expected, self.second, self.source = expected, second, source
        self.request, self.validation, self.rank = request, validation, rank
        self.progress = progress
        limits = request.device.limits
        self.ladder = Ladder(
            fp32,
            calibration.images,
            per_channel=limits.quantization != "per-tensor",
            weight_bits=7 if limits.weight_bits == 7 else 8,
            keep_float=request.keep_float,
            last=request.last_rung,
            retrain=None if validation is None else self._retrain,
            progress=progress,
        )
        self.tried: dict[str, tuple[Tried, ...]] = {}

    def typed(self, form: str) -> tuple[ModelProto, ModelProto, list[str]]:
        """Return a form's model, the float model it is made from, and what is to be said of it."""
        if "mixed" in form:
            return self._mixed(form)
        if self.validation is None:
            step = next(self.ladder.steps(self._base(form)))
            self._check_range(form, step)
            return self._make(form, step), step.float_proto, []
        step, proto = self._climbed(form, self.validation)
        return proto, step.float_proto, []

    def _base(self, form: str) -> Form:
        return "int8" if half_of(form) is not None else cast(Form, form)

    def _make(self, form: str, step: Step) -> ModelProto:
        proto = self.ladder.quantize(step, self._base(form))
        if half_of(form) is None:
            return proto
        return _halved(proto, form, self.request)

    def _check_range(self, form: str, step: Step) -> None:
        if half_of(form) == "fp16":
            check_fp16_range(step.float_proto, self.images)

    def _climbed(self, form: str, validation: Validation) -> tuple[Step, ModelProto]:
        def measure(proto: ModelProto) -> Accuracy:
            return validation.accuracies({form: load_onnx(proto)})[form]

        def check(step: Step, proto: ModelProto) -> None:
            self._check_range(form, step)
            check_form(form, proto, self.images, self.expected, self.second)
            self._check_engines(form, proto, validation)

        try:
            found = climb(
                self.ladder.steps(self._base(form)),
                form=form,
                make=lambda step: self._make(form, step),
                measure=measure,
                check=check,
                max_drop=self.request.max_drop,
                advice=advice(self.source, self.request),
                progress=self.progress,
            )
        except NotWorthIt as error:
            self.tried[form] = error.tried
            raise
        self.tried[form] = found.tried
        return found.step, found.proto

    def _check_engines(self, form: str, proto: ModelProto, validation: Validation) -> None:
        """Raise CheckFailed where an engine made of the form here loses more than the file does.

        What cannot be built is no reason to climb: the export itself says why.
        """
        request = self.request
        typed, _ = apply_rewrites(proto, request.device)
        for runtime, precision in wanted_engines(request):
            is_here = runtime.missing(request.device) is None
            if not is_here or form_of(runtime, precision, request.device) != form:
                continue
            with TemporaryDirectory() as scratch:
                file = Path(scratch) / f"model.{form}.onnx"
                file.write_bytes(typed.SerializeToString())
                source = BuildSource(
                    onnx={form: file}, images=self.images,
                    open_resolution=request.dynamic_resolution,
                )  # fmt: skip
                try:
                    session = build_session(runtime, precision, source, request, Path(scratch))
                except (CheckFailed, MissingError):
                    continue
                label = f"{runtime.name} {precision}"
                run = in_parts(session.run, request.device.batch.max)
                accuracy = validation.accuracies({label: run})[label]
            if accuracy.drop > request.max_drop:
                raise CheckFailed(f"{label} loses {accuracy.drop:.2f} points")

    def _retrain(
        self, kind: Literal["fused", "train"], base: ModelProto, unsigned: bool
    ) -> tuple[ModelProto, str]:
        """Return the float model of the network trained on with the rounding in it, and how."""
        from litezoo.recipes.qat import finetune_quantized

        assert self.source.data is not None
        limits = self.request.device.limits
        start, network = "", self.train_form
        if kind == "train" and graph_form(network) != "train":
            raise NothingToTrain
        if kind == "fused":
            twin = with_weights(self.deploy, base, self.images)
            start, network = ("", self.deploy) if twin is None else ("equalised, ", twin)
        trained = finetune_quantized(
            network,
            name=self.source.spec.name,
            data=self.source.data,
            preprocess=self.source.preprocess,
            granularity="per-tensor" if limits.quantization == "per-tensor" else "per-channel",
            unsigned=unsigned,
            weight_bits=7 if limits.weight_bits == 7 else 8,
            progress=self.progress,
        )
        deploy = fuse(trained) if kind == "train" else trained
        fp32, _, _ = _float_onnx(deploy, self.images, self.source, self.request)
        what = "fused network" if kind == "fused" else "train form"
        return fp32, f"{start}QAT of the {what}"

    def _mixed(self, form: str) -> tuple[ModelProto, ModelProto, list[str]]:
        """Return the fastest mixture of 8-bit and float convolutions, and what it is."""
        if self.rank is None:
            raise MissingError("a mixture is searched by measuring; export with a function to rank")
        from .mixed import find_mixture

        step = next(self.ladder.steps("int8-u8"))
        validation = self.validation
        if validation is not None:
            if "int8-u8" not in self.tried:
                with contextlib.suppress(NotWorthIt):
                    self._climbed("int8-u8", validation)
            tried = self.tried["int8-u8"]
            step = min(tried, key=lambda t: (t.rung.refused is not None, t.rung.accuracy.drop)).step

        def accept(proto: ModelProto) -> bool:
            if validation is None:
                return True
            accuracy = validation.accuracies({form: load_onnx(proto)})[form]
            return accuracy.drop <= self.request.max_drop

        def retype(keep_float: Collection[str]) -> ModelProto:
            return self.ladder.quantize(step, "int8-u8", keep_float=keep_float)

        mixture = find_mixture(
            step.float_proto,
            retype(()),
            retype=retype,
            accept=accept,
            rank=self.rank,
            images=repeat_to(self.images, self.request.batch),
            calibration=self.calibration.images,
            device=self.request.device,
            float_type="bf16" if form.endswith("bf16") else "fp32",
            threads=self.request.threads,
            objective=self.request.objective,
            progress=self.progress,
        )
        return mixture.proto, step.float_proto, [mixture.said]


def with_weights(deploy: nn.Module, proto: ModelProto, images: Array) -> nn.Module | None:
    """Return a copy of a network with the weights of an ONNX model of it, changed since.

    Weights are known by their names. None where the two do not compute the same then.
    """
    from onnx import numpy_helper

    twin = copy.deepcopy(deploy)
    given = {tensor.name: tensor for tensor in proto.graph.initializer}
    with torch.no_grad():
        for name, own in twin.state_dict().items():
            if name in given and tuple(given[name].dims) == tuple(own.shape):
                own.copy_(torch.from_numpy(numpy_helper.to_array(given[name]).copy()))
    want = load_onnx(proto)(images)
    error = np.abs(logits_of(twin, images) - want).max() / np.abs(want).max()
    return twin if error <= TOLERANCE["fp32"] else None


def advice(source: Source, request: Request) -> str:
    """Return what to do where no rung keeps the accuracy."""
    name = source.spec.name
    kin = {
        f"qa{name}": "QARepVGG holds int8",
        name.replace("repvgg", "repoptvgg"): "RepOpt-VGG has one branch and nothing to fuse",
    }
    data = f" --data {source.data}" if source.data else ""
    known = [
        f"`litezoo train {other}{data}` ({why})"
        for other, why in kin.items()
        if name.startswith("repvgg") and other in list_models()
    ]
    floats = [p for p in request.device.precisions if not p.startswith("int8")]
    more = [f"`--precision {floats[0]}`"] if floats else []
    if request.last_rung != "qat":
        more.insert(0, "`--precision int8 --last-rung qat` (climbs on, by training)")
    return "type one of: " + ", ".join([*more, *known, "`--max-drop POINTS`"])


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
