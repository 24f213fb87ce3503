"""Which network is exported: its weights, what is known of them, and images to compare it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from litezoo.models.catalogue import ModelSpec, Preprocess, get_spec, resolve_name
from litezoo.models.create import create_model
from litezoo.models.errors import MissingError, UsageError
from litezoo.models.fetch import find_weights
from litezoo.models.weights import read_checkpoint
from litezoo.recipes.data import DataError, eval_transform, open_data
from litezoo.recipes.runs import BEST, last_run

from .runtime import Array

__all__ = [
    "PROBES",
    "Source",
    "choose_source",
    "load_source",
    "logits_of",
    "probe_images",
    "settle_batchnorm",
]

#: Images whose logits an artifact carries.
PROBES = 16


def choose_source(model: str | None, weights: str | None) -> tuple[str, str]:
    """Fill in what a request leaves open: the last trained checkpoint, else public weights.

    Returns the model's name and its weights. Without a run and without a model, that is repvgg_a0.
    """
    if weights is not None and model is None:
        info = read_checkpoint(Path(weights)).info if Path(weights).suffix else None
        if info is None:
            raise UsageError(f"which model are the weights {weights!r} for? name it first")
        return info.model, weights
    if weights is not None and model is not None:
        return resolve_name(model), weights
    run = last_run("*" if model is None else resolve_name(model))
    if run is not None:
        checkpoint = run / BEST
        info = read_checkpoint(checkpoint).info
        if info is not None:
            return info.model, str(checkpoint)
    name = "repvgg_a0" if model is None else resolve_name(model)
    spec = get_spec(name)
    if not spec.is_pretrained:
        raise MissingError(
            f"{name} has no public weights and no run here; type one of: `litezoo train {name}`, "
            "`--weights FILE`, `--weights random` (untrained, for measuring speed)"
        )
    return name, spec.get_weights().tag


@dataclass(frozen=True, kw_only=True)
class Source:
    """The network to export and where it is from."""

    spec: ModelSpec
    model: nn.Module
    weights: str
    sha256: str | None
    preprocess: Preprocess
    classes: tuple[str, ...]
    data: str | None


def load_source(model: str, weights: str, allow_license: tuple[str, ...]) -> Source:
    """Return the network that `weights` are of, in train form, and what is known of them."""
    spec = get_spec(model)
    if weights == "random":
        torch.manual_seed(0)
        network = create_model(model)
        settle_batchnorm(network, spec.resolution)
        return Source(
            spec=spec, model=network, weights="random", sha256=None,
            preprocess=spec.default_preprocess,
            classes=(), data=None,
        )  # fmt: skip
    file, entry = find_weights(spec, weights, allow_license=allow_license)
    checkpoint = read_checkpoint(file)
    info = checkpoint.info
    preprocess = spec.default_preprocess
    if entry is not None:
        preprocess = entry.preprocess
    elif info is not None:
        preprocess = info.preprocess
    return Source(
        spec=spec,
        model=create_model(model, weights=file),
        weights=weights if entry is None else entry.tag,
        sha256=checkpoint.sha256,
        preprocess=preprocess,
        classes=info.classes if info else (),
        data=info.data if info else None,
    )


@torch.no_grad()
def settle_batchnorm(network: nn.Module, resolution: int) -> None:
    """Give random weights BatchNorm statistics of noise, so that activations stay finite."""
    network.train()
    for _ in range(2):
        network(torch.randn(4, 3, min(resolution, 64), min(resolution, 64)))


def probe_images(source: Source) -> tuple[list[Image.Image], Array, str | None]:
    """Return `PROBES` images, as they are and preprocessed: real ones where there are any."""
    note: str | None = None
    photos: list[Image.Image] = []
    if source.data is not None:
        try:
            photos = _test_photos(source.data)
            if len(photos) < PROBES:
                note = f"parity on noise: {source.data} has fewer than {PROBES} test images"
        except (DataError, MissingError) as error:
            note = f"parity on noise and no accuracy: {error}"
    channels, height, width = source.preprocess.input_size
    rng = np.random.default_rng(0)
    if channels not in (1, 3):  # no kind of photograph
        noise = rng.standard_normal((PROBES, channels, height, width), dtype=np.float32)
        return [], noise, note
    if len(photos) < PROBES:
        shape = (PROBES, height + 10, width + 20, channels)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        photos = [Image.fromarray(one.squeeze(-1) if channels == 1 else one) for one in pixels]
    transform = eval_transform(source.preprocess)
    return photos, np.stack([transform(photo).numpy() for photo in photos]), note


def _test_photos(data: str) -> list[Image.Image]:
    """Return `PROBES` images evenly spread over the test split, none with a side above 512."""
    images = open_data(data).images("test")
    photos = []
    for index in np.linspace(0, len(images) - 1, min(PROBES, len(images))).round():
        photo = images[int(index)][0].copy()
        photo.thumbnail((512, 512))
        photos.append(photo)
    return photos


@torch.inference_mode()
def logits_of(model: nn.Module, images: Array) -> Array:
    """Return a network's logits (N, classes) of images (N, C, H, W), float32."""
    logits: Array = model(torch.from_numpy(images)).float().numpy()
    return logits
