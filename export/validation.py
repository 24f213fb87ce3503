"""Which precisions are right enough: accuracy on the validation images of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import CheckFailed
from litezoo.recipes.data import eval_loader

from .artifact import Accuracy, Engine
from .compare import compare_logits, worst_layers
from .request import Request, form_of, in_parts
from .runtime import Array, Session, get_runtime
from .source import logits_of
from .to_onnx import load_onnx

if TYPE_CHECKING:
    from .typed import Typed

__all__ = ["Validation", "good_engines", "good_forms", "least_right_layers"]


class Validation:
    """Compares logits with PyTorch's on the validation images of a data set."""

    def __init__(self, data: str, preprocess: Preprocess, deploy: nn.Module, most: int) -> None:
        self.data, self.preprocess, self.deploy, self.most = data, preprocess, deploy, most
        self.expected: list[Array] = []

    def accuracies(self, runs: Mapping[str, Callable[[Array], Array]]) -> dict[str, Accuracy]:
        """Return the accuracy of every function from images to logits, in one pass."""
        logits: dict[str, list[Array]] = {name: [] for name in runs}
        labels = []
        loader = eval_loader(self.data, self.preprocess, split="val", most=self.most)
        for index, (images, classes) in enumerate(loader):
            batch = images.numpy()
            labels.append(classes.numpy())
            if index == len(self.expected):
                self.expected.append(logits_of(self.deploy, batch))
            for name, run in runs.items():
                logits[name].append(run(batch))
        truth, expected = np.concatenate(labels), np.concatenate(self.expected)
        return {
            name: self._compare(np.concatenate(own), expected, truth)
            for name, own in logits.items()
        }

    def _compare(self, got: Array, expected: Array, truth: np.ndarray[Any, Any]) -> Accuracy:
        likeness = compare_logits(got, expected)
        top1, reference = (100 * np.mean(v.argmax(1) == truth) for v in (got, expected))
        return Accuracy(
            data=f"{self.data} (val)",
            images=len(truth),
            top1_percent=round(float(top1), 3),
            pytorch_top1_percent=round(float(reference), 3),
            agreement_percent=round(likeness.top1_agreement_percent, 3),
            snr_db=round(likeness.snr_db, 1),
        )


def good_forms(
    typed: Typed, validation: Validation, request: Request, not_built: dict[str, str]
) -> tuple[Typed, dict[str, Accuracy]]:
    """Return the forms that lose no more than `max_drop` points, and their accuracies."""
    most = request.device.batch.max
    accuracies = validation.accuracies(
        {form: in_parts(load_onnx(proto), most) for form, proto in typed.protos.items()}
    )
    for form, accuracy in list(accuracies.items()):
        if form != "fp32" and accuracy.drop > request.max_drop:
            error = CheckFailed(_loss(f"onnx {form}", accuracy, form, typed, request))
            request.refuse(f"onnx {form}", error, not_built)
            del accuracies[form]
    protos = {form: proto for form, proto in typed.protos.items() if form in accuracies}
    return dataclasses.replace(typed, protos=protos), accuracies


def good_engines(
    engines: Sequence[Engine],
    sessions: Mapping[str, Session],
    validation: Validation,
    typed: Typed,
    request: Request,
    not_built: dict[str, str],
) -> tuple[Engine, ...]:
    """Return the engines that lose no more than `max_drop` points, with their accuracies."""
    most = request.device.batch.max
    accuracies = validation.accuracies(
        {label: in_parts(session.run, most) for label, session in sessions.items()}
    )
    kept = []
    for engine in engines:
        accuracy = accuracies[engine.label]
        if engine.precision == "fp32" or accuracy.drop <= request.max_drop:
            kept.append(dataclasses.replace(engine, accuracy=accuracy))
            continue
        form = form_of(get_runtime(engine.runtime), engine.precision, request.device)
        error = CheckFailed(_loss(engine.label, accuracy, form, typed, request))
        request.refuse(engine.label, error, not_built)
    return tuple(kept)


def least_right_layers(typed: Typed) -> list[str]:
    """Return for each 8-bit form a sentence that names its layers of the lowest SNR."""
    sentences = []
    for form, proto in typed.protos.items():
        if form.startswith("int8") and typed.calibration is not None:
            base = typed.floats.get(form, typed.fp32)
            layers = worst_layers(base, proto, typed.calibration.images[:32], most=3)
            names = ", ".join(f"{layer.name} ({layer.snr_db:.0f} dB)" for layer in layers)
            sentences.append(f"the least right layers of onnx {form} are {names}")
    return sentences


def _loss(label: str, accuracy: Accuracy, form: str | None, typed: Typed, request: Request) -> str:
    """Return the sentence on a precision that loses too much, and which layers to keep in float."""
    text = (
        f"{label} loses {accuracy.drop:.2f} points of top-1 ({accuracy.top1_percent:.2f} instead "
        f"of {accuracy.pytorch_top1_percent:.2f} % on {accuracy.images} images), more than "
        f"{request.max_drop:g} (--max-drop)"
    )
    if form is None or not form.startswith("int8") or typed.calibration is None:
        return text
    base = typed.floats.get(form, typed.fp32)
    layers = worst_layers(base, typed.protos[form], typed.calibration.images[:64], most=4)
    names = " ".join(layer.name for layer in layers)
    worst = layers[0]
    return f"{text}; worst layer {worst.name} ({worst.snr_db:.0f} dB); try --keep-float {names}"
