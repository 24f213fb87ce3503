"""Weights from disk and from the hub: read, converted to our key names, loaded whole or not at all.

A state dict may use our keys or any layout in its family's `KEY_LAYOUTS`; which one is found from
the keys. Every key has to be used on both sides.
"""

from __future__ import annotations

import importlib
import pickle
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .catalogue import ModelSpec, Preprocess, Weights
from .errors import CheckFailed, MissingError, UsageError
from .files import file_sha256

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "convert_state_dict",
    "fetch_weights",
    "load_state_dict",
    "read_checkpoint",
]

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

    state_dict: Mapping[str, Tensor]
    info: CheckpointInfo | None
    sha256: str


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
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{file} is corrupt or holds more than tensors, which litezoo does not execute; save "
            "its state dict alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{file} is not a readable checkpoint: {reason}") from error
    info = content.pop(INFO_KEY, None) if isinstance(content, dict) else None
    record = None if info is None else CheckpointInfo.from_dict(info)
    for key in ("state_dict", "model"):  # Lightning's and the official repositories' wrapping
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if record is not None and isinstance(content, dict):
        prefix = record.state_prefix
        content = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UsageError(f"{file} holds no state dict (names to tensors)")
    return Checkpoint(state_dict=content, info=record, sha256=file_sha256(file))


def fetch_weights(weights: Weights, *, model: str) -> Path:
    """Download a public checkpoint into the hub's cache and return its path.

    MissingError, with what to type instead, when it can not be fetched.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    name, revision = weights.filename, weights.revision
    try:
        if not isinstance(try_to_load_from_cache(weights.hub_id, name, revision=revision), str):
            _check_reachable(constants.ENDPOINT)  # the hub client alone retries for 20 s
        file = Path(hf_hub_download(weights.hub_id, name, revision=revision))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise MissingError(
            f"cannot fetch {weights.hub_id} from {constants.ENDPOINT} "
            f"({type(error).__name__}: {reason}); type one of: "
            f"`--weights FILE` (a checkpoint of yours), `litezoo train {model}` (then export that "
            "run), `--weights random` (untrained, for measuring speed)"
        ) from error
    if weights.sha256 is not None and file_sha256(file) != weights.sha256:
        raise CheckFailed(
            f"{file} is not the published file (sha256 differs); delete it and try again"
        )
    return file


def _check_reachable(endpoint: str) -> None:
    """Raise OSError at once where the hub cannot be connected to (proxies are not looked at)."""
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies().get(url.scheme):
        return
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    socket.create_connection((url.hostname or "", port), timeout=10).close()


def _counters(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _linear_or_conv(value: Tensor, wanted: Tensor | None) -> Tensor:
    """Return a linear layer's weight as a convolution's, or the other way, where that is asked."""
    if wanted is None or {value.ndim, wanted.ndim} != {2, 4}:
        return value
    same = value.shape[0] == wanted.shape[0] and value.numel() == wanted.numel()
    return value.reshape(wanted.shape) if same else value


def convert_state_dict(
    state_dict: Mapping[str, Tensor], spec: ModelSpec, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return `state_dict` under the keys of `wanted` (a state dict of the network).

    The layouts are the `KEY_LAYOUTS` of the family's module, {layout: ((pattern, replacement),
    ...)}: regular expressions applied in order. A linear layer may stand for a convolution and the
    other way. BatchNorm's batch counters may be absent. A UsageError names the first key that has
    no partner.
    """
    family = importlib.import_module(spec.factory.partition(":")[0])
    layouts = {"litezoo": (), **getattr(family, "KEY_LAYOUTS", {})}
    best: tuple[int, str, dict[str, Tensor]] | None = None
    needed = {key for key in wanted if not _counters(key)}
    for layout, rules in layouts.items():
        renamed = {}
        for key, value in state_dict.items():
            name = key.removeprefix("module.")
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            if name in renamed:
                raise UsageError(
                    f"these weights name {name} twice, the second time as {key}; keep one layout"
                )
            if name in wanted or not _counters(name):
                renamed[name] = _linear_or_conv(value, wanted.get(name))
        given = {key for key in renamed if not _counters(key)}
        if given == needed:
            return renamed
        unmatched = len(given ^ needed)
        if best is None or unmatched < best[0]:
            best = unmatched, layout, renamed
    assert best is not None
    _, layout, renamed = best
    missing = sorted(needed - set(renamed))
    unknown = sorted(set(renamed) - set(wanted))
    problem = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model has not"
    raise UsageError(
        f"these weights are not of {spec.name}: read in the {layout} layout, the file {problem} "
        f"({len(missing)} keys missing, {len(unknown)} unknown)"
    )


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], spec: ModelSpec
) -> tuple[str, ...]:
    """Load weights of any known layout into a train-form classifier.

    Where the model was built for other classes than the weights, the classifier keeps its fresh
    initialisation; where for other input channels, the first kernels are adapted (summed for one
    channel, repeated and rescaled for more, as timm does). Returns what was adapted, in words.
    """
    from timm.models import adapt_input_conv

    wanted = model.state_dict()
    adapted: list[str] = []
    converted = convert_state_dict(
        state_dict, spec, {**wanted, **_head_placeholder(model, state_dict)}
    )
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
    for key in [k for k in converted if k.startswith("head.fc.")]:
        if key not in wanted or converted[key].shape != wanted[key].shape:
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


def _head_placeholder(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A headless model still takes weights that have a classifier: name the keys to expect."""
    if "head.fc.weight" in model.state_dict():
        return {}
    classifier = ("head.fc.", "linear.", "fc.", "classifier.")
    if any(key.startswith(classifier) for key in state_dict):
        return {"head.fc.weight": torch.empty(0), "head.fc.bias": torch.empty(0)}
    return {}
