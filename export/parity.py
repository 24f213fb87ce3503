"""Parity: is a stage's output still the network's output? Nothing is written unless it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from litezoo.models.errors import CheckFailed

from . import build_engine
from .runtime import SIDE_MIN, SIDE_STEP, Array

__all__ = [
    "BATCHES",
    "TOLERANCE",
    "Parity",
    "at_size",
    "check_batches",
    "check_parity",
    "second_size",
]

#: Batch sizes at which every engine is compared: one, more, and one that divides nothing.
BATCHES = build_engine.CHECK_BATCHES

#: Largest max |difference| / max |logit| from float32 PyTorch, by precision: rounding for floats;
#: for int8 what a network that is still itself shows (its accuracy is judged apart, by top-1).
TOLERANCE = {
    "fp32": build_engine.TOLERANCES["fp32"],
    "fp16": build_engine.TOLERANCES["fp16"],
    "bf16": build_engine.TOLERANCES["bf16"],
    "int8": 0.35,
    "int8+fp16": 0.35,
    "int8+bf16": 0.4,
    "int8-mixed": 0.35,
    "int8-mixed+bf16": 0.4,
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far one stage's logits are from the reference's, on the same images.

    `max_relative_error` is max |difference| / max |reference logit|, `min_cosine` the worst image's
    cosine similarity, `top1_agreement_percent` the share of images with the same first class.
    `resolutions` are the image sizes (height, width) of an open resolution that were compared;
    none where the network's own is the only one.
    """

    stage: str
    reference: str
    batches: tuple[int, ...]
    max_relative_error: float
    tolerance: float
    min_cosine: float
    top1_agreement_percent: float
    resolutions: tuple[tuple[int, int], ...] = ()

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
    second: tuple[Array, Array] | None = None,
) -> Parity:
    """Run `images` (N, C, H, W) at every size of `batches` and compare all outputs at once.

    `second` are images of another size and their expected logits, for what takes more than one:
    they are run and compared in the same way, and the worse of the two figures are kept.
    """
    if second is not None:
        parts = []
        for part, logits in ((images, expected), second):
            height, width = part.shape[2:]
            parts.append(
                check_batches(
                    f"{stage} at {height}x{width}", run, part, logits, reference=reference,
                    tolerance=tolerance, batches=batches,
                )
            )  # fmt: skip
        return dataclasses.replace(
            parts[0],
            stage=stage,
            max_relative_error=max(part.max_relative_error for part in parts),
            min_cosine=min(part.min_cosine for part in parts),
            top1_agreement_percent=min(part.top1_agreement_percent for part in parts),
            resolutions=tuple((p.shape[2], p.shape[3]) for p in (images, second[0])),
        )
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


def second_size(height: int, width: int) -> tuple[int, int]:
    """Return the other image size at which an open resolution is compared.

    About three quarters of each side, a multiple of `SIDE_STEP` and never the same as before; no
    square of a square, which would hide height and width in each other's place. Small sides grow.

    >>> second_size(224, 224)
    (160, 192)
    >>> second_size(64, 64)
    (96, 128)
    """
    sides: list[int] = []
    for side in (height, width):
        steps = max(3 * side // (4 * SIDE_STEP), SIDE_MIN // SIDE_STEP)
        while steps * SIDE_STEP in (height, width, *sides):
            steps += 1
        sides.append(steps * SIDE_STEP)
    return sides[0], sides[1]


def at_size(images: Array, size: tuple[int, int]) -> Array:
    """Return images (N, C, H, W) cut to another (height, width), or repeated up to it."""
    more = [(0, max(new - old, 0)) for new, old in zip(size, images.shape[2:], strict=True)]
    repeated = np.pad(images, ((0, 0), (0, 0), *more), mode="wrap")
    return np.ascontiguousarray(repeated[:, :, : size[0], : size[1]])
