"""The catalogue: what a network is called, where it is from, and what its weights claim.

Torch-free, so that looking things up is instant. A family is two files: `<family>_specs.py` holds
the table of its variants (this module's nouns, no torch) and `<family>.py` the network.
"""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import importlib
import importlib.resources
import io
import pkgutil
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Literal, cast

from .errors import UsageError, unknown_name

if TYPE_CHECKING:
    from .classifier import ImageClassifier

__all__ = [
    "FREE_LICENCES",
    "ModelSpec",
    "Preprocess",
    "Weights",
    "get_spec",
    "list_left_out",
    "list_models",
    "resolve_name",
]

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


#: Licences under which a file may be used for anything; any other has to be accepted by name.
FREE_LICENCES = frozenset({"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause"})


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One public checkpoint and what is claimed of it, with who says so.

    `source` is a Hugging Face repository ("owner/name", then `filename` and `revision` count) or a
    URL. `digest` is what its publisher says of the file, "sha256:<hex>" or "sha1:<hex>", whole or
    the first digits. `licence` is an SPDX identifier, or else says what is known. `unreadable` is
    the reason why litezoo knows the file but can not load it.
    """

    tag: str
    source: str
    licence: str = ""
    top1_percent: float | None = None
    top1_source: str = ""
    digest: str = ""
    filename: str = "model.safetensors"
    revision: str = "main"
    preprocess: Preprocess = field(default_factory=Preprocess)
    num_classes: int = 1000
    unreadable: str = ""

    @property
    def is_free(self) -> bool:
        """Whether the licence allows any use, commercial use too."""
        return self.licence.casefold() in {licence.casefold() for licence in FREE_LICENCES}

    @property
    def is_url(self) -> bool:
        """Whether `source` is a URL, not a repository of the Hugging Face hub."""
        return "://" in self.source

    def check_licence(self, accepted: Collection[str], *, model: str) -> None:
        """Raise a UsageError where the licence needs accepting and is not among `accepted`."""
        if self.is_free or self.licence in accepted:
            return
        raise UsageError(
            f"the weights {self.tag!r} of {model} are under the licence {self.licence!r}, which "
            f"may forbid your use; read it at {self.source}, then accept it by name: "
            f'allow_license="{self.licence}" (on the command line: --allow-license '
            f"{shlex.quote(self.licence)})"
        )


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

    def get_weights(self, tag: str = "default") -> Weights:
        """Look up a public checkpoint by its tag; an unknown tag is a UsageError.

        "default" is the first of `weights` that can be loaded.
        """
        if not self.weights:
            raise UsageError(
                f"{self.name} has no public weights to fetch; give the path of a checkpoint"
            )
        if tag == "default":
            for weights in self.weights:
                if not weights.unreadable:
                    return weights
            raise UsageError(
                f"none of the public weights of {self.name} can be loaded (see: litezoo info "
                f"{self.name}); give the path of a checkpoint"
            )
        for weights in self.weights:
            if weights.tag == tag:
                return weights
        raise unknown_name(f"weights of {self.name}:", tag, [w.tag for w in self.weights])

    @property
    def default_preprocess(self) -> Preprocess:
        """What is taken for weights that say nothing of their input."""
        return Preprocess(input_size=(3, self.resolution, self.resolution))

    @property
    def is_pretrained(self) -> bool:
        """Whether public weights can be loaded."""
        return any(not weights.unreadable for weights in self.weights)


def _read_weights_table() -> Mapping[str, tuple[Weights, ...]]:
    """Read models/weights.csv: the public checkpoints of every model, the default first."""
    file = importlib.resources.files(__package__) / "weights.csv"
    table: dict[str, tuple[Weights, ...]] = {}
    for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))):
        side = int(row["input_size"])
        weights = Weights(
            tag=row["tag"],
            source=row["source"],
            digest=row["digest"],
            licence=row["licence"],
            top1_percent=float(row["top1_percent"]) if row["top1_percent"] else None,
            top1_source=row["top1_source"],
            num_classes=int(row["num_classes"]),
            unreadable=row["unreadable"],
            preprocess=Preprocess(
                input_size=(3, side, side),
                crop_pct=float(row["crop_pct"]),
                interpolation=cast(Interpolation, row["interpolation"]),
                mean=_triple(row["mean"]),
                std=_triple(row["std"]),
            ),
        )
        table[row["model"]] = (*table.get(row["model"], ()), weights)
    return table


def _triple(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split())


@cache
def _families() -> tuple[ModuleType, ...]:
    """The modules in this folder that hold the tables of the families."""
    package = importlib.import_module(__package__)
    names = sorted(
        f"{__package__}.{info.name}"
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.endswith("_specs")
    )
    return tuple(importlib.import_module(name) for name in names)


def list_left_out(family: str | None = None) -> Mapping[str, str]:
    """Return the published networks that the zoo does not have, {name: reason}.

    They are the `LEFT_OUT` of the families' tables; `family` asks for one family's.
    """
    return {
        name: reason
        for module in _families()
        if family in (None, module.SPECS[0].family)
        for name, reason in getattr(module, "LEFT_OUT", {}).items()
    }


@cache
def _registry() -> Mapping[str, ModelSpec]:
    """Every spec by name: the families in this folder, then those of other packages."""
    tables = [module.SPECS for module in _families()]
    tables += [point.load() for point in sorted(entry_points(group="litezoo.models"))]
    public = _read_weights_table()
    registry: dict[str, ModelSpec] = {}
    for spec in (spec for table in tables for spec in table):
        if spec.name in registry:
            raise UsageError(f"two models are named {spec.name!r}; rename one of them")
        weights = (*spec.weights, *public.get(spec.name, ()))
        registry[spec.name] = dataclasses.replace(spec, weights=weights)
    return MappingProxyType(registry)


def list_models(
    pattern: str = "*",
    *,
    pretrained: bool = False,
    family: str | None = None,
    max_params_m: float | None = None,
    min_top1: float | None = None,
    license: str | None = None,
) -> list[str]:
    """Return the names that match a shell pattern and every condition, in the order of the tables.

    `pretrained`: public weights can be loaded. `max_params_m`: at most so many million parameters
    in deploy form. `min_top1` (percent) and `license` ("free" for any that allows all use, or its
    name): one and the same of the loadable weights fulfils both.

    >>> list_models("repvgg_a*")
    ['repvgg_a0', 'repvgg_a1', 'repvgg_a2']
    >>> list_models(family="repvgg", max_params_m=13, min_top1=73)
    ['repvgg_a1']
    """
    families = {spec.family for spec in _registry().values()}
    if family is not None and family not in families:
        raise unknown_name("family", family, families)

    def fits(weights: Weights) -> bool:
        return (
            not weights.unreadable
            and (min_top1 is None or (weights.top1_percent or 0.0) >= min_top1)
            and (license in (None, weights.licence) or (license == "free" and weights.is_free))
        )

    of_weights = pretrained or min_top1 is not None or license is not None
    return [
        name
        for name, spec in _registry().items()
        if fnmatch.fnmatch(name, pattern)
        and family in (None, spec.family)
        and (max_params_m is None or spec.params_deploy <= max_params_m * 1e6)
        and (not of_weights or any(map(fits, spec.weights)))
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
        if name in (left_out := list_left_out()):
            raise UsageError(f"{name} is not in the zoo: {left_out[name]}")
        raise unknown_name("model", name, _registry(), see="litezoo list")
    return _registry()[name]
