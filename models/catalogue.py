"""The catalogue: what a network is called, where it is from, and what its weights claim.

Torch-free, so that looking things up is instant. A family is two files: `<family>_specs.py` holds
the table of its variants (this module's nouns, no torch) and `<family>.py` the network.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from .errors import UsageError, unknown_name

if TYPE_CHECKING:
    from .classifier import ImageClassifier

__all__ = ["ModelSpec", "Preprocess", "Weights", "get_spec", "list_models", "resolve_name"]

Interpolation = Literal["nearest", "bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the network's input: resize the short side, centre crop, normalise.

    `input_size` is (C, H, W) in pixels; `mean` and `std` are per channel on the scale 0..1.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Refuse a mean or std that does not match the channels."""
        channels = self.input_size[0]
        if not len(self.mean) == len(self.std) == channels:
            raise UsageError(
                f"preprocessing has {channels} channels but {len(self.mean)} means and "
                f"{len(self.std)} standard deviations; give one of each per channel"
            )

    def to_dict(self) -> dict[str, object]:
        """Return plain lists and numbers, for a checkpoint or a manifest."""
        return {
            "input_size": list(self.input_size),
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Preprocess:
        """Rebuild from `to_dict`'s form; a missing or unknown key is a UsageError."""
        try:
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**plain)  # type: ignore[arg-type]
        except TypeError as error:
            raise UsageError(f"not a preprocessing record: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One public checkpoint and what is claimed of it, with who says so.

    `hub_id` is a Hugging Face repository; `layout` names the key layout of its state dict.
    """

    tag: str
    hub_id: str
    licence: str
    top1_percent: float
    top1_source: str
    layout: str
    filename: str = "model.safetensors"
    revision: str = "main"
    sha256: str | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)
    num_classes: int = 1000


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One variant: how it is built and what is known of it.

    Counts are exact, of the 1000-class network; `macs_m` are millions of multiply-accumulates of
    the deploy form at `resolution`; the `paper_` figures are the publication's own, and `differs`
    says in a sentence where this network is not the paper's. `references` names the same network in
    other libraries, {"timm": name, "torchvision": name}: tests hold it to be equal to those.
    `first_convs` are the convolutions that see the image; `exempt` gives, for a duty of the
    contract in tests/test_models.py that this model can not fulfil, the reason.
    """

    name: str
    family: str
    factory: str
    architecture: Mapping[str, object]
    paper: str
    params_train: int
    params_deploy: int
    macs_m: float
    resolution: int = 224
    paper_params_m: float | None = None
    paper_macs_m: float | None = None
    paper_top1_percent: float | None = None
    paper_source: str = ""
    first_convs: tuple[str, ...] = ()
    weights: tuple[Weights, ...] = ()
    differs: str = ""
    references: Mapping[str, str] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)

    def build(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> ImageClassifier:
        """Return the randomly initialised network in train form."""
        module, _, attribute = self.factory.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        network: ImageClassifier = factory(
            **self.architecture,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        return network

    def get_weights(self, tag: str) -> Weights:
        """Look up a public checkpoint by its tag; an unknown tag is a UsageError."""
        for weights in self.weights:
            if weights.tag == tag:
                return weights
        if not self.weights:
            raise UsageError(
                f"{self.name} has no public weights to fetch; give the path of a checkpoint"
            )
        raise unknown_name(f"weights of {self.name}:", tag, [w.tag for w in self.weights])


@cache
def _registry() -> Mapping[str, ModelSpec]:
    """Every spec by name: the families in this folder, then those of other packages."""
    package = importlib.import_module(__package__)
    modules = [
        f"{__package__}.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.endswith("_specs")
    ]
    tables = [importlib.import_module(name).SPECS for name in sorted(modules)]
    tables += [point.load() for point in sorted(entry_points(group="litezoo.models"))]
    registry: dict[str, ModelSpec] = {}
    for spec in (spec for table in tables for spec in table):
        if spec.name in registry:
            raise UsageError(f"two models are named {spec.name!r}; rename one of them")
        registry[spec.name] = spec
    return MappingProxyType(registry)


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Return the names that match a shell pattern, in the order of the tables.

    >>> list_models("repvgg_a*")
    ['repvgg_a0', 'repvgg_a1', 'repvgg_a2']
    """
    return [
        name
        for name, spec in _registry().items()
        if fnmatch.fnmatch(name, pattern) and (spec.weights or not pretrained)
    ]


def resolve_name(name: str) -> str:
    """Return a model's name for a model's or a family's: a family stands for its first model.

    >>> resolve_name("repvgg")
    'repvgg_a0'
    """
    for spec in _registry().values():
        if spec.family == name:
            return spec.name
    return get_spec(name).name


def get_spec(name: str) -> ModelSpec:
    """Look up one variant.

    >>> get_spec("repvgg_a9")
    Traceback (most recent call last):
    litezoo.models.errors.UsageError: unknown model 'repvgg_a9'; did you mean 'repvgg_a2'? (see: litezoo list)
    """  # noqa: E501
    if name not in _registry():
        raise unknown_name("model", name, _registry(), see="litezoo list")
    return _registry()[name]
