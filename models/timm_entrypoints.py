"""The zoo in timm's registry: importing this module makes timm know every model as litezoo_<name>.

`timm.create_model("litezoo_repvgg_a0.rvgg_in1k", pretrained=True)`, timm's train, validate and
benchmark scripts, and `timm.create_model("hf-hub:owner/name")` of what `push_to_hub` pushed then
work on networks of the zoo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from torch import nn

from .catalogue import ModelSpec, get_spec, list_models
from .create import create_model
from .fetch import HUB_PREFIX

__all__: list[str] = []  # timm's register_model appends the names


def _entrypoint(spec: ModelSpec) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        *,
        pretrained_cfg: str | Mapping[str, Any] | None = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        pretrained_model_args: Mapping[str, Any] | None = None,
        cache_dir: str | None = None,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        allow_license: str | Sequence[str] = (),
    ) -> nn.Module:
        weights = None
        if pretrained:
            weights = pretrained_cfg if isinstance(pretrained_cfg, str) else "default"
            if isinstance(pretrained_cfg, Mapping) and pretrained_cfg.get("hf_hub_id"):
                weights = HUB_PREFIX + pretrained_cfg["hf_hub_id"]
        shape = {"num_classes": num_classes, "in_chans": in_chans, "global_pool": global_pool}
        options: dict[str, Any] = {
            "global_pool": "avg",
            **(pretrained_model_args or {}),  # of a network from the hub
            **{key: value for key, value in shape.items() if value is not None},
            "weights": weights,
            "drop_rate": drop_rate,
            "allow_license": allow_license,
        }
        net: nn.Module
        if features_only:
            net = create_model(spec.name, features_only=True, out_indices=out_indices, **options)
        else:
            net = create_model(spec.name, **options)
        return net

    create.__name__ = create.__qualname__ = f"litezoo_{spec.name}"
    create.__doc__ = f"{spec.name} of litezoo ({spec.paper})."
    return create


_SPECS = [get_spec(name) for name in list_models()]

#: What timm's `list_models(pretrained=True)` and `get_pretrained_cfg` read.
default_cfgs = generate_default_cfgs(
    {
        f"litezoo_{spec.name}.{weights.tag}": {
            **vars(weights.preprocess),
            "num_classes": weights.num_classes,
            "hf_hub_id": None if weights.is_url else weights.source,
            "url": weights.source if weights.is_url else "",
            "license": weights.licence,
            "first_conv": spec.first_convs,
            "classifier": "head.fc",
        }
        for spec in _SPECS
        for weights in spec.weights
        if not weights.unreadable
    }
)

for _spec in _SPECS:
    register_model(_entrypoint(_spec))
