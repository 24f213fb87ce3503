"""`create_model`: a name goes in, a network comes out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from timm.models import FeatureListNet

from .catalogue import get_spec
from .classifier import ImageClassifier
from .errors import UsageError
from .weights import fetch_weights, load_state_dict, read_checkpoint

__all__ = ["create_model"]


@overload
def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    features_only: Literal[False] = False,
) -> ImageClassifier: ...


@overload
def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    features_only: Literal[True],
    out_indices: Sequence[int] | None = None,
) -> FeatureListNet: ...


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
) -> ImageClassifier | FeatureListNet:
    """Build a network in train form, `(N, in_chans, H, W) -> (N, num_classes)`.

    `weights` is a tag of the catalogue (fetched from the hub), a checkpoint file, or None for
    random initialisation; classes and channels default to the weights' own, else 1000 and 3.
    With `features_only` the result is timm's feature extractor, (N, C, H, W) -> a list of maps,
    one for each of `out_indices` (ascending; default: all); it can be fused like the classifier.
    """
    spec = get_spec(name)
    if num_classes is not None and num_classes < 0:
        raise UsageError(f"num_classes is {num_classes}; give 0 (no classifier) or more")
    if in_chans is not None and in_chans < 1:
        raise UsageError(f"in_chans is {in_chans}; give 1 or more")
    if out_indices is not None and not features_only:
        raise UsageError("out_indices chooses feature maps; it needs features_only=True")
    state_dict = None
    default_classes, default_chans = 1000, 3
    if weights is not None:
        if not isinstance(weights, str) or Path(weights).suffix or os.sep in weights:
            file = Path(weights)
        else:
            entry = spec.get_weights(weights)
            file, default_classes = fetch_weights(entry, model=name), entry.num_classes
        checkpoint = read_checkpoint(file)
        state_dict = checkpoint.state_dict
        if checkpoint.info is not None:
            if checkpoint.info.model != name:
                raise UsageError(f"{file} is of {checkpoint.info.model}, not of {name}")
            default_classes = len(checkpoint.info.classes)
            default_chans = checkpoint.info.preprocess.input_size[0]
    model = spec.build(
        num_classes=default_classes if num_classes is None else num_classes,
        in_chans=default_chans if in_chans is None else in_chans,
        global_pool=global_pool,
        drop_rate=drop_rate,
    )
    if state_dict is not None:
        load_state_dict(model, state_dict, spec)
    if not features_only:
        return model
    maps = len(model.feature_info)
    asked = tuple(range(maps)) if out_indices is None else tuple(out_indices)
    indices = tuple(index % maps for index in asked if -maps <= index < maps)
    if not asked or len(indices) < len(asked) or list(indices) != sorted(set(indices)):
        raise UsageError(
            f"{name} has feature maps 0 to {maps - 1}; out_indices is {asked}, give each once and "
            "in ascending order"
        )
    return FeatureListNet(model, out_indices=indices, flatten_sequential=True)
