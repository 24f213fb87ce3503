"""To the Hugging Face hub and back, in timm's form (config.json beside model.safetensors)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .classifier import ImageClassifier
from .create import create_model
from .errors import MissingError, UsageError, first_line
from .fetch import HUB_PREFIX, fetch_hub_config
from .fuse import DeployBlock

__all__ = ["from_pretrained", "push_to_hub"]


def push_to_hub(
    model: nn.Module, repository: str, *, private: bool = False, token: str | None = None
) -> str:
    """Push a train-form classifier of the zoo to "owner/name" and return the commit's URL.

    The repository is made where it does not exist. It can be read back with `from_pretrained`, and
    by timm with `timm.create_model("hf-hub:owner/name")` once `litezoo.models.timm_entrypoints` is
    imported. MissingError where the hub cannot be written to.
    """
    from timm.models import push_to_hf_hub

    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not isinstance(model, ImageClassifier) or not architecture:
        raise UsageError("only classifiers made by litezoo.create_model can be pushed to the hub")
    if any(isinstance(module, DeployBlock) for module in model.modules()):
        raise UsageError(
            "this model is in deploy form; push the train form (it can be fused again after "
            "loading, and trained on)"
        )
    try:
        commit = push_to_hf_hub(
            model,
            repository,
            token=token,
            private=private,
            model_config={"architecture": architecture, "num_classes": model.num_classes},
            model_card={"tags": ["image-classification", "litezoo", "timm"]},
            safe_serialization=True,
        )
    except Exception as error:
        raise MissingError(
            f"cannot push to {repository} ({type(error).__name__}: {first_line(error)}); log in "
            "with `hf auth login`, or give a token that may write there"
        ) from error
    return str(commit)


def from_pretrained(
    repository: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    allow_license: str | Sequence[str] = (),
) -> ImageClassifier:
    """Return the classifier that `push_to_hub` left in "owner/name" (or "owner/name@revision").

    A licence in its config.json that is not free has to be accepted by name in `allow_license`.
    """
    config, _ = fetch_hub_config(repository)
    architecture = str(config.get("architecture", ""))
    if not architecture.startswith("litezoo_"):
        raise UsageError(
            f"{repository} holds {architecture or 'no architecture'}, which was not pushed by "
            f"litezoo; name the network: create_model(NAME, weights='{HUB_PREFIX}{repository}')"
        )
    return create_model(
        architecture.removeprefix("litezoo_"),
        weights=HUB_PREFIX + repository,
        num_classes=num_classes,
        in_chans=in_chans,
        allow_license=allow_license,
    )
