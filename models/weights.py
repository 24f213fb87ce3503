"""Weights from a file: read, converted to our key names, loaded whole or not at all.

A state dict may use our keys or any layout in its family's `KEY_LAYOUTS`; which one is found from
the keys. Every key has to be used on both sides.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .catalogue import ModelSpec, Preprocess
from .errors import UsageError, first_line
from .files import file_sha256, open_checkpoint

if TYPE_CHECKING:
    from .classifier import ImageClassifier

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "convert_state_dict",
    "load_state_dict",
    "read_checkpoint",
]

#: Where checkpoints keep the state dict, averaged weights first: timm's and the official
#: repositories' names, Lightning's.
WRAPPINGS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model")

#: The last linear layer of every classifier of the zoo.
CLASSIFIER = ("head.fc.weight", "head.fc.bias")

#: What wrappers (DataParallel, Lightning modules) put before every key.
PREFIXES = ("module.", "model.", "net.", "network.")

#: The key of a training checkpoint under which `CheckpointInfo` lies.
INFO_KEY = "litezoo"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a training run leaves for export: the network, its classes and its input.

    `data` is the data set's source ("digits" or a folder), `state_prefix` the place of the network
    in the checkpoint's state dict (the averaged weights, where the run kept them).
    """

    model: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    data: str
    state_prefix: str
    litezoo_version: str

    def to_dict(self) -> dict[str, object]:
        """Return plain types only, so that `weights_only=True` can load them."""
        return {
            "model": self.model,
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_dict(),
            "data": self.data,
            "state_prefix": self.state_prefix,
            "litezoo_version": self.litezoo_version,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CheckpointInfo:
        """Rebuild from `to_dict`'s form."""
        try:
            return cls(
                **{
                    **values,
                    "classes": tuple(values["classes"]),
                    "preprocess": Preprocess.from_dict(values["preprocess"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"the checkpoint's litezoo record is not readable: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file's state dict, and what litezoo's own trainer wrote beside it (else None)."""

    file: Path
    state_dict: Mapping[str, Tensor]
    info: CheckpointInfo | None

    @property
    def sha256(self) -> str:
        """Digest of the file."""
        return file_sha256(self.file)


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a .safetensors, .pth, .pt or .ckpt file, never executing code from it.

    A missing, corrupt or foreign file is a UsageError that names it.
    """
    if not file.is_file():
        raise UsageError(f"no checkpoint {file}; give the path of a .ckpt, .pth or .safetensors")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            with open_checkpoint(file) as stream:
                content = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{file} is corrupt or holds more than tensors, which litezoo does not execute; save "
            "its state dict alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise UsageError(f"{file} is not a readable checkpoint: {reason}") from error
    info = content.pop(INFO_KEY, None) if isinstance(content, dict) else None
    record = None if info is None else CheckpointInfo.from_dict(info)
    for key in WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if record is not None and isinstance(content, dict):
        prefix = record.state_prefix
        content = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UsageError(f"{file} holds no state dict (names to tensors)")
    return Checkpoint(file=file, state_dict=content, info=record)


def _without_prefix(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove what a wrapper put before every key, as often as one did."""
    for prefix in PREFIXES:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            return _without_prefix({k.removeprefix(prefix): v for k, v in state_dict.items()})
    return state_dict


def _counters(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _linear_or_conv(value: Tensor, wanted: Tensor | None) -> Tensor:
    """Return a linear layer's weight as a convolution's, or the other way, where that is asked."""
    if wanted is None or {value.ndim, wanted.ndim} != {2, 4}:
        return value
    same = value.shape[0] == wanted.shape[0] and value.numel() == wanted.numel()
    return value.reshape(wanted.shape) if same else value


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    spec: ModelSpec,
    wanted: Mapping[str, Tensor],
    *,
    new_classifier: bool = False,
) -> dict[str, Tensor]:
    """Return `state_dict` under the keys of `wanted` (a state dict of the network).

    The layouts are the `KEY_LAYOUTS` of the family's module, {layout: ((pattern, replacement),
    ...)}: regular expressions applied in order. A linear layer may stand for a convolution and the
    other way. BatchNorm's batch counters and the classifier's bias (then zero) may be absent; for a
    network without classifier the file may have one, and with `new_classifier` the file may have
    none. A UsageError names the first key that has no partner.
    """
    family = importlib.import_module(spec.factory.partition(":")[0])
    layouts = {"litezoo": (), **getattr(family, "KEY_LAYOUTS", {})}
    state_dict = _without_prefix(state_dict)
    best: tuple[int, str] | None = None
    needed = {key for key in wanted if not _counters(key)}
    for layout, rules in layouts.items():
        renamed: dict[str, Tensor] = {}
        twice = ""
        for key, value in state_dict.items():
            name = key
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            if name in renamed:
                twice = f"names {name} twice, the second time as {key}"
            if name in wanted or not _counters(name):
                renamed[name] = _linear_or_conv(value, wanted.get(name))
        if CLASSIFIER[1] in needed and CLASSIFIER[1] not in renamed and CLASSIFIER[0] in renamed:
            renamed[CLASSIFIER[1]] = renamed[CLASSIFIER[0]].new_zeros(len(renamed[CLASSIFIER[0]]))
        given = {key for key in renamed if not _counters(key)}
        if not twice and given - set(CLASSIFIER) == needed - set(CLASSIFIER):
            if given >= needed:
                return renamed
            if new_classifier:
                return {**renamed, **{key: wanted[key] for key in CLASSIFIER}}
            raise UsageError(
                f"these weights of {spec.name} have no classifier; say how many classes a new one "
                "shall have (num_classes=)"
            )
        missing, unknown = sorted(needed - given), sorted(given - needed)
        unmatched = len(missing) + len(unknown) + bool(twice)
        if missing:
            problem = twice or f"lacks {missing[0]}"
        else:
            problem = twice or f"has {unknown[0]}, which the model has not"
        if best is None or unmatched < best[0]:
            counts = f"({len(missing)} keys missing, {len(unknown)} unknown)"
            best = unmatched, f"read in the {layout} layout, the file {problem} {counts}"
    assert best is not None
    raise UsageError(f"these weights are not of {spec.name}: {best[1]}")


def load_state_dict(
    model: ImageClassifier,
    state_dict: Mapping[str, Tensor],
    spec: ModelSpec,
    *,
    new_classifier: bool = False,
    own_classes: bool = False,
) -> tuple[str, ...]:
    """Load weights of any known layout into a train-form classifier.

    Where the model was built for other classes than the weights, the classifier keeps its fresh
    initialisation; where for other input channels, the first kernels are adapted (summed for one
    channel, repeated and rescaled for more, as timm does). `new_classifier` allows a file that has
    no classifier at all; with `own_classes` the model gets as many classes as the file has. Returns
    what was adapted, in words.
    """
    from timm.models import adapt_input_conv

    wanted = model.state_dict()
    adapted: list[str] = []
    converted = convert_state_dict(state_dict, spec, wanted, new_classifier=new_classifier)
    classes = len(converted.get(CLASSIFIER[0], ()))
    if own_classes and classes not in (0, model.num_classes):
        model.reset_classifier(classes)
        wanted = model.state_dict()
    for name in spec.first_convs:
        key = f"{name}.weight"
        given, needed = converted[key].shape[1], wanted[key].shape[1]
        if given == needed:
            continue
        if given != 3:
            raise UsageError(
                f"these weights take {given} input channels, the model {needed}; only weights for "
                f"3 channels can be adapted: create the model with in_chans={given}"
            )
        converted[key] = adapt_input_conv(needed, converted[key])
        adapted.append(f"{name}: {needed} input channels")
    for key in CLASSIFIER:
        if key in converted and (key not in wanted or converted[key].shape != wanted[key].shape):
            converted.pop(key)
            if key in wanted:
                converted[key] = wanted[key]
            adapted.append(f"{key}: new classifier")
    for key, value in converted.items():
        if value.shape != wanted[key].shape:
            raise UsageError(
                f"these weights are not of {spec.name}: {key} is {tuple(value.shape)}, the model "
                f"has {tuple(wanted[key].shape)}"
            )
    counters = {k: v for k, v in wanted.items() if _counters(k)}
    model.load_state_dict({**counters, **converted}, strict=True)
    return tuple(adapted)
