"""Parity: is a stage's output still the network's output? Nothing is written unless it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from litezoo.models.errors import CheckFailed

from . import build_engine
from .runtime import Array

__all__ = ["BATCHES", "TOLERANCE", "Parity", "check_batches", "check_parity"]

#: Batch sizes at which every engine is compared: one, more, and one that divides nothing.
BATCHES = build_engine.CHECK_BATCHES

#: Largest max |difference| / max |logit| from float32 PyTorch, by precision: rounding for floats;
#: for int8 what a network that is still itself shows (its accuracy is judged apart, by top-1).
TOLERANCE = {
    "fp32": build_engine.TOLERANCES["fp32"],
    "fp16": build_engine.TOLERANCES["fp16"],
    "bf16": 0.1,
    "int8": 0.35,
    "int8+fp16": 0.35,
    "int8+bf16": 0.4,
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far one stage's logits are from the reference's, on the same images.

    `max_relative_error` is max |difference| / max |reference logit|, `min_cosine` the worst image's
    cosine similarity, `top1_agreement_percent` the share of images with the same first class.
    """

    stage: str
    reference: str
    batches: tuple[int, ...]
    max_relative_error: float
    tolerance: float
    min_cosine: float
    top1_agreement_percent: float

    def __post_init__(self) -> None:
        """Refuse to exist as evidence of something that failed."""
        if not self.max_relative_error <= self.tolerance:
            raise CheckFailed(
                f"{self.stage} differs from {self.reference} by {self.max_relative_error:.1e} "
                f"(relative), more than {self.tolerance:.0e}"
            )


def check_parity(
    stage: str,
    logits: Array,
    expected: Array,
    *,
    reference: str,
    tolerance: float,
    batches: tuple[int, ...] | None = None,
) -> Parity:
    """Compare logits (N, classes); a difference above `tolerance`, or NaN, raises CheckFailed."""
    if logits.shape != expected.shape:
        raise CheckFailed(
            f"{stage} gives outputs of shape {logits.shape}, {reference} of {expected.shape}"
        )
    if not np.isfinite(logits).all():
        raise CheckFailed(f"{stage} gives NaN or infinite outputs")
    got, want = logits.astype(np.float64), expected.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    norms = np.maximum(np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1), tiny)
    return Parity(
        stage=stage,
        reference=reference,
        batches=batches or (len(want),),
        max_relative_error=float(np.abs(got - want).max() / max(np.abs(want).max(), tiny)),
        tolerance=tolerance,
        min_cosine=float((np.sum(got * want, axis=1) / norms).min()),
        top1_agreement_percent=float(100 * np.mean(got.argmax(1) == want.argmax(1))),
    )


def check_batches(
    stage: str,
    run: Callable[[Array], Array],
    images: Array,
    expected: Array,
    *,
    reference: str = "PyTorch",
    tolerance: float,
    batches: tuple[int, ...] = BATCHES,
) -> Parity:
    """Run `images` (N, C, H, W) at every size of `batches` and compare all outputs at once."""
    outputs = [run(np.ascontiguousarray(images[:size])) for size in batches]
    wanted = [expected[:size] for size in batches]
    for size, got, want in zip(batches, outputs, wanted, strict=True):
        if got.shape != want.shape:
            raise CheckFailed(
                f"{stage} at batch {size} gives outputs of shape {got.shape}, {reference} of "
                f"{want.shape}"
            )
    return check_parity(
        stage,
        np.concatenate(outputs),
        np.concatenate(wanted),
        reference=reference,
        tolerance=tolerance,
        batches=batches,
    )
