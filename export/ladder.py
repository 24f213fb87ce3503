"""The ladder: what to do, in order of cost, where int8 loses too much accuracy.

The rungs, each on what the ones before it brought (see docs/int8.md):

1. minmax: weights with as many scales as the device has, activation ranges by their extremes;
2. equalize: scales moved between layers, the same function (`equalize`);
3. ranges: least squared error, KL divergence, 99.9 %, and biases corrected behind the best of them;
4. float-layers: the 1, 2, 4, ... layers with the lowest output SNR stay float;
5. adaround: rounding learned layer by layer (`adaround`);
6. qat: trained on with the rounding in it, first the fused network, then its train form.

What a rung builds on, the float model and the way to find ranges, is chosen by the logits' SNR on
the calibration images; whether a rung is good enough is said by the validation images alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, LitezooError

from .artifact import Accuracy, Rung
from .compare import compare_logits, worst_layers
from .equalize import Equalized, equalize
from .runtime import Array
from .to_int8 import Form, Method, convolutions, quantize
from .to_onnx import load_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "STAGES",
    "Climb",
    "Ladder",
    "NotWorthIt",
    "NothingToTrain",
    "Retrain",
    "Stage",
    "Step",
    "Tried",
    "climb",
]

Stage = Literal["minmax", "equalize", "ranges", "float-layers", "adaround", "qat"]
STAGES: tuple[Stage, ...] = get_args(Stage)
#: Activation ranges that are tried behind the extremes, and what they are called.
_RANGES: Mapping[Method, str] = {
    "minmax": "ranges by minmax",
    "mse": "ranges of least squared error",
    "entropy": "ranges by KL divergence",
    "percentile": "ranges of 99.9 %",
}
#: Calibration images that compare float and 8-bit networks.
_COMPARED = 128
#: Most layers that stay float; half of the network's is the other limit.
_MOST_FLOAT = 8

#: Trains a network on with the rounding in it: its form and, for the fused form, a float model to
#: start from; whether activations are uint8. Returns the float model of the result and how it
#: was made; NothingToTrain where the network has not that form.
Retrain = Callable[[Literal["fused", "train"], "ModelProto", bool], tuple["ModelProto", str]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way to quantize: the float model it starts from and `quantize`'s options, in words."""

    stage: Stage
    said: str
    float_proto: ModelProto
    method: Method = "minmax"
    keep_float: tuple[str, ...] = ()
    rounded: Mapping[str, NDArray[np.int8]] | None = None


class Ladder:
    """Ways to quantize one float32 model, the cheapest first; each is made once, when asked for."""

    def __init__(
        self,
        fp32: ModelProto,
        images: Array,
        *,
        per_channel: bool = True,
        weight_bits: Literal[7, 8] = 8,
        keep_float: Collection[str] = (),
        last: Stage = "qat",
        retrain: Retrain | None = None,
        progress: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Say what is quantized and how far up to go.

        Args:
            fp32: the float32 model.
            images: calibration images (N, C, H, W), preprocessed.
            per_channel: one weight scale per output channel, else one per weight.
            weight_bits: 7 for CPUs whose 16-bit sums overflow.
            keep_float: convolutions that stay float on every rung.
            last: the highest rung that is tried.
            retrain: trains on with the rounding in it; None leaves those rungs out.
            progress: called with each step's name.
        """
        self.fp32, self.images = fp32, images
        self.per_channel, self.weight_bits = per_channel, weight_bits
        self.keep_float = tuple(keep_float)
        self.last, self.retrain, self.progress = last, retrain, progress
        self._made: dict[Form, tuple[list[Step], Iterator[Step]]] = {}
        self._quantized: dict[tuple[int, Form, tuple[str, ...]], tuple[Step, ModelProto]] = {}
        self._trained: dict[tuple[str, bool], tuple[ModelProto, str]] = {}

    def steps(self, form: Form) -> Iterator[Step]:
        """Yield the steps of an 8-bit form; those made before are not made again."""
        made, more = self._made.setdefault(form, ([], self._climb(form)))
        for index in itertools.count():
            if index == len(made):
                try:
                    made.append(next(more))
                except StopIteration:
                    return
            yield made[index]

    def quantize(self, step: Step, form: Form, *, keep_float: Collection[str] = ()) -> ModelProto:
        """Return a step's 8-bit model, with further convolutions in float; not to be changed.

        Ranges are measured once: the same model is returned again.
        """
        names = tuple(sorted({*self.keep_float, *step.keep_float, *keep_float}))
        key = id(step), form, names
        if key not in self._quantized:
            proto = quantize(
                step.float_proto,
                self.images,
                form=form,
                per_channel=self.per_channel,
                method=step.method,
                keep_float=names,
                weight_bits=self.weight_bits,
                rounded=step.rounded,
            )
            self._quantized[key] = step, proto  # the step too: its id stays its own
        return self._quantized[key][1]

    @cached_property
    def equalized(self) -> Equalized:
        """The float model with its channels' ranges made equal."""
        self.progress("int8: equalising the layers")
        return equalize(self.fp32, self.images[:_COMPARED], per_channel=self.per_channel)

    @cached_property
    def _want(self) -> Array:
        return load_onnx(self.fp32)(self.images[:_COMPARED])

    def _goes_to(self, stage: Stage) -> bool:
        return STAGES.index(stage) <= STAGES.index(self.last)

    def _snr_db(self, step: Step, form: Form) -> float:
        """Return the SNR of a step's logits on calibration images."""
        try:
            got = load_onnx(self.quantize(step, form))(self.images[:_COMPARED])
            return compare_logits(got, self._want).snr_db
        except CheckFailed:  # NaN or infinite
            return -np.inf

    def _climb(self, form: Form) -> Iterator[Step]:
        weights = "per-channel weights" if self.per_channel else "per-tensor weights"
        plain = Step(stage="minmax", said=f"{weights}, ranges by minmax", float_proto=self.fp32)
        yield plain
        best = plain
        if self._goes_to("equalize") and self.equalized.channels:
            equal = Step(
                stage="equalize", said=self.equalized.said, float_proto=self.equalized.proto
            )
            yield equal
            best = max((plain, equal), key=lambda step: self._snr_db(step, form))
        equal_base = best.float_proto
        start = "equalised, " if best is not plain else ""
        if self._goes_to("ranges"):
            tried = [best]
            for method, said in itertools.islice(_RANGES.items(), 1, None):
                self.progress(f"{form}: {said}")
                tried.append(
                    Step(stage="ranges", said=f"{start}{said}", float_proto=equal_base,
                         method=method)
                )  # fmt: skip
                yield tried[-1]
            best = max(tried, key=lambda step: self._snr_db(step, form))
            corrected = self._corrected(best, form, start)
            yield corrected
            best = max((best, corrected), key=lambda step: self._snr_db(step, form))
        if self._goes_to("float-layers"):
            yield from self._with_float_layers(best, equal_base, form)
        if self._goes_to("adaround"):
            yield self._adarounded(best, equal_base, form, start)
        if self._goes_to("qat") and self.retrain is not None:
            yield from self._trained_on(equal_base, form)

    def _corrected(self, best: Step, form: Form, start: str) -> Step:
        from .correct_bias import correct_bias

        self.progress(f"{form}: correcting biases")
        proto = correct_bias(best.float_proto, self.quantize(best, form), self.images[:_COMPARED])
        return Step(
            stage="ranges", said=f"{start}{_RANGES[best.method]}, biases corrected",
            float_proto=proto, method=best.method,
        )  # fmt: skip

    def _with_float_layers(self, best: Step, base: ModelProto, form: Form) -> Iterator[Step]:
        """Yield `best` with ever more of its worst layers in float."""
        self.progress(f"{form}: ranking layers by their output's SNR")
        own = len(set(convolutions(self.fp32)) - set(self.keep_float))
        quantized = self.quantize(best, form)
        layers = worst_layers(base, quantized, self.images[:_COMPARED], most=_MOST_FLOAT)
        for count in (1, 2, 4, 8):
            if count > min(own // 2, len(layers)):
                return
            names = tuple(layer.name for layer in layers[:count])
            plural = "s" if count > 1 else ""
            yield Step(
                stage="float-layers",
                said=f"{best.said}, {count} layer{plural} in float: {', '.join(names)}",
                float_proto=best.float_proto, method=best.method, keep_float=names,
            )  # fmt: skip

    def _adarounded(self, best: Step, base: ModelProto, form: Form, start: str) -> Step:
        from .adaround import adaround

        step = Step(
            stage="adaround", said=f"{start}{_RANGES[best.method]}, AdaRound", float_proto=base,
            method=best.method,
        )  # fmt: skip
        rounded = adaround(
            base, self.quantize(step, form), self.images,
            progress=lambda what: self.progress(f"{form}: {what}"),
        )  # fmt: skip
        return Step(
            stage="adaround", said=step.said, float_proto=base, method=best.method, rounded=rounded
        )

    def _trained_on(self, base: ModelProto, form: Form) -> Iterator[Step]:
        assert self.retrain is not None
        is_unsigned = form != "int8"
        for kind in ("fused", "train"):
            key = kind, is_unsigned
            if key not in self._trained:
                self.progress(f"{form}: training on with the rounding in it, {kind} form")
                try:
                    self._trained[key] = self.retrain(kind, base, is_unsigned)
                except NothingToTrain:
                    continue
            proto, said = self._trained[key]
            yield Step(stage="qat", said=said, float_proto=proto)


class NothingToTrain(Exception):
    """The network has not that form."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A step with its 8-bit model and what came of it."""

    step: Step
    proto: ModelProto
    rung: Rung


class NotWorthIt(CheckFailed):
    """No rung keeps the accuracy; `tried` are those there were."""

    def __init__(self, message: str, tried: Sequence[Tried]) -> None:
        super().__init__(message)
        self.tried = tuple(tried)


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Every step that was tried for a form; the last one is good enough."""

    tried: tuple[Tried, ...]

    @property
    def step(self) -> Step:
        """The step that is good enough."""
        return self.tried[-1].step

    @property
    def proto(self) -> ModelProto:
        """Its 8-bit model."""
        return self.tried[-1].proto


def climb(
    steps: Iterable[Step],
    *,
    form: str,
    make: Callable[[Step], ModelProto],
    measure: Callable[[ModelProto], Accuracy],
    check: Callable[[Step, ModelProto], None],
    max_drop: float,
    advice: str,
    progress: Callable[[str], None] = lambda step: None,
) -> Climb:
    """Try one step after the other and return the first that is good enough.

    Args:
        steps: in order of their cost.
        form: the form of ONNX file, for the record.
        make: returns a step's 8-bit model in that form.
        measure: returns its accuracy on the validation images.
        check: raises CheckFailed where its outputs are no longer the network's.
        max_drop: most points of top-1 that it may lose.
        advice: what to do where none is good enough.
        progress: called with what each rung gave.

    Raises NotWorthIt where none is.
    """
    tried: list[Tried] = []
    for step in steps:
        proto = make(step)
        accuracy = measure(proto)
        refused = None
        if accuracy.drop > max_drop:
            refused = f"loses {accuracy.drop:.2f} points"
        else:
            try:
                check(step, proto)
            except LitezooError as error:
                refused = str(error)
        rung = Rung(
            form=form, stage=step.stage, said=step.said, accuracy=accuracy,
            size_bytes=proto.ByteSize(), refused=refused,
        )  # fmt: skip
        tried.append(Tried(step=step, proto=proto, rung=rung))
        progress(str(rung))
        if refused is None:
            return Climb(tried=tuple(tried))
    best = min((own.rung for own in tried), key=lambda rung: rung.accuracy.drop)
    accuracy = best.accuracy
    why = (
        f"loses {accuracy.drop:.2f} points of top-1 ({accuracy.top1_percent:.2f} instead of "
        f"{accuracy.pytorch_top1_percent:.2f} % on {accuracy.images} images), more than "
        f"{max_drop:g} (--max-drop)"
        if accuracy.drop > max_drop
        else str(best.refused)
    )
    count = "the one rung tried" if len(tried) == 1 else f"the best of {len(tried)} rungs"
    raise NotWorthIt(
        f"onnx {form} is not worth it: {count} ({best.stage}: {best.said}) {why}; {advice}", tried
    )
