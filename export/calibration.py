"""Images that int8 ranges are measured on: real ones, of the data the network was trained on.

Ranges of noise fit no photograph, so noise is taken only for measuring speed and when it is asked
for by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import MissingError, UsageError
from litezoo.recipes.data import eval_loader, open_data

from .runtime import Array

__all__ = ["LEAST", "Calibration", "choose_calibration"]

#: Fewer images leave ranges to chance.
LEAST = 256
MOST = 512


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Preprocessed images (N, C, H, W) float32 and where they are from."""

    images: Array
    source: str


def choose_calibration(
    asked: str | None, *, data: str | None, weights: str, preprocess: Preprocess
) -> Calibration:
    """Return the images for int8: of `asked`, else of the data the weights were trained on.

    `asked` is "digits", a folder of images, or "random" (noise, for measuring speed). MissingError
    where nothing is known to calibrate on; UsageError where there are fewer than 256 images.
    """
    if asked == "random":
        noise = np.random.default_rng(1).standard_normal((LEAST, *preprocess.input_size))
        return Calibration(images=noise.astype(np.float32), source="noise")
    source = asked if asked is not None else data
    if source is None:
        what = "random weights have" if weights == "random" else f"{weights} says"
        raise MissingError(
            f"int8 needs images to calibrate on and {what} no training data; type one of: "
            "`--calibration FOLDER` (train/<class>/*.jpg and val/<class>/*.jpg), `--calibration "
            "random --yes-really` (noise: for measuring speed only)"
        )
    kind, wanted = open_data(source).preprocess.input_size[0], preprocess.input_size[0]
    if kind != wanted:
        raise UsageError(
            f"the images of {source} have {kind} channels, the network takes {wanted}; give data "
            "of its kind with --calibration"
        )
    batches = [
        images.numpy() for images, _ in eval_loader(source, preprocess, split="train", most=MOST)
    ]
    images = np.concatenate(batches).astype(np.float32)
    if len(images) < LEAST:
        raise UsageError(
            f"{source} has {len(images)} training images; int8 is calibrated on {LEAST} or more"
        )
    return Calibration(images=images, source=f"{len(images)} training images of {source}")
