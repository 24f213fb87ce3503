"""litezoo: lightweight CNNs from recipe to verified, measured engine.

Everything is imported when it is first used: `import litezoo` costs nothing and needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmarks.pick import pick as pick
    from .export.artifact import load as load
    from .export.artifact import verify as verify
    from .models.catalogue import get_spec as get_spec
    from .models.catalogue import list_models as list_models
    from .models.create import create_model as create_model
    from .models.errors import CheckFailed as CheckFailed
    from .models.errors import LitezooError as LitezooError
    from .models.errors import MissingError as MissingError
    from .models.errors import UsageError as UsageError
    from .models.fuse import FusableBlock as FusableBlock
    from .models.fuse import fuse as fuse
    from .models.fuse import fuse_with_report as fuse_with_report
    from .models.sharing import from_pretrained as from_pretrained
    from .models.sharing import push_to_hub as push_to_hub
    from .recipes.devices import get_device as get_device
    from .recipes.devices import list_devices as list_devices

_HOME = {
    "CheckFailed": "models.errors",
    "FusableBlock": "models.fuse",
    "LitezooError": "models.errors",
    "MissingError": "models.errors",
    "UsageError": "models.errors",
    "create_model": "models.create",
    "from_pretrained": "models.sharing",
    "fuse": "models.fuse",
    "fuse_with_report": "models.fuse",
    "get_device": "recipes.devices",
    "get_spec": "models.catalogue",
    "list_devices": "recipes.devices",
    "list_models": "models.catalogue",
    "load": "export.artifact",
    "pick": "benchmarks.pick",
    "push_to_hub": "models.sharing",
    "verify": "export.artifact",
}

__all__ = [
    "CheckFailed",
    "FusableBlock",
    "LitezooError",
    "MissingError",
    "UsageError",
    "create_model",
    "from_pretrained",
    "fuse",
    "fuse_with_report",
    "get_device",
    "get_spec",
    "list_devices",
    "list_models",
    "load",
    "pick",
    "push_to_hub",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home on first use."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("litezoo")
    if name not in _HOME:
        raise AttributeError(f"module 'litezoo' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
