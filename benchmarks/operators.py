"""Which operators and patterns the deploy graph of every network has, for `pick --avoid-op`.

benchmarks/operators.json is generated: `python -m litezoo.benchmarks.operators` exports networks of
the zoo as `litezoo export` does and looks for ONNX operators and for the patterns that a device's
limits can name. Networks of the same kinds of layers, however many and wide, have the same
operators: of those the one of least multiply-adds is exported. The table is read without torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from litezoo.models.catalogue import ModelSpec, get_spec, list_models
from litezoo.models.errors import CheckFailed, unknown_name
from litezoo.recipes.devices import PATTERNS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_operators", "find_operators", "read_operators", "write_operators"]

_FILE = Path(__file__).parent / "operators.json"


@cache
def read_operators(file: Path = _FILE) -> Mapping[str, frozenset[str]]:
    """Return the operators and patterns of each network's deploy graph, {model: names}.

    CheckFailed for a file that is damaged.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        table = {str(model): frozenset(str(names).split()) for model, names in values.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckFailed(
            f"{file} holds no operators ({error}); make it again: "
            "python -m litezoo.benchmarks.operators"
        ) from error
    return MappingProxyType(table)


def check_operators(names: Collection[str]) -> None:
    """Raise a UsageError for a name that is no pattern and that no network of the zoo has.

    >>> check_operators(["squeze-excite"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    litezoo.models.errors.UsageError: unknown operator 'squeze-excite'; did you mean ...
    """
    if not names:
        return
    known = {*PATTERNS, *(name for own in read_operators().values() for name in own)}
    for name in names:
        if name not in known:
            raise unknown_name("operator", name, known)


def find_operators(network: nn.Module, *, resolution: int) -> frozenset[str]:
    """Return the ONNX operators and the patterns of a network's deploy graph.

    `network` takes images (N, 3, resolution, resolution); it is fused here where it can be.
    """
    import numpy as np

    from litezoo.export.limits import layers_of
    from litezoo.export.to_onnx import export_onnx, simplify_onnx
    from litezoo.models.fuse import fuse, graph_form

    deploy = fuse(network) if graph_form(network) == "train" else network.eval()
    images = np.random.default_rng(0).standard_normal((2, 3, resolution, resolution), np.float32)
    graph, _ = simplify_onnx(export_onnx(deploy, images, metadata={}), images)
    operators = {node.op_type for node in graph.graph.node}
    return frozenset({*operators, *(rule for rule in PATTERNS if layers_of(graph, rule))})


def write_operators(models: Sequence[str], file: Path = _FILE) -> Path:
    """Export what `models` are made of and write the table, a line for each; other lines stay."""
    import torch

    from litezoo.models.files import write_whole

    table = {model: set(names) for model, names in _existing(file).items()}
    alike: dict[Hashable, list[ModelSpec]] = {}
    for model in models:
        spec = get_spec(model)
        alike.setdefault(kinds_of(spec), []).append(spec)
    for place, specs in enumerate(alike.values(), 1):
        one = min(specs, key=lambda spec: spec.macs_m)
        print(f"- {place} of {len(alike)}: {one.name}", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        found = find_operators(one.build().eval(), resolution=one.resolution)
        table.update({spec.name: set(found) for spec in specs})
    order = [model for model in list_models() if model in table]
    lines = [
        f"{json.dumps(model)}: {json.dumps(' '.join(sorted(table[model])))}" for model in order
    ]
    read_operators.cache_clear()
    return write_whole(file, "{\n" + ",\n".join(lines) + "\n}\n")


def kinds_of(spec: ModelSpec) -> Hashable:
    """Return what a network is made of: its kinds of modules and of operators, however many."""
    import torch

    from .tracing import trace

    with torch.device("meta"):
        network = spec.build().eval()
    modules = frozenset(
        (
            type(module).__qualname__,
            str(getattr(module, "kernel_size", "")),
            str(getattr(module, "stride", "")),
            *(f"{k}={v}" for k, v in sorted(vars(module).items()) if isinstance(v, (bool, str))),
        )
        for module in network.modules()
    )
    traced = trace(network, name=spec.name, resolution=(3, spec.resolution, spec.resolution))
    operators = frozenset((op.kind, op.name, op.conv and op.conv.kind) for op in traced.ops)
    return modules, operators


def _existing(file: Path) -> Mapping[str, frozenset[str]]:
    return read_operators(file) if file.is_file() else {}


def main(words: Sequence[str] | None = None) -> int:
    """Write the table again: of all networks, or of those that are named."""
    parser = argparse.ArgumentParser(prog="python -m litezoo.benchmarks.operators")
    parser.add_argument(
        "models", nargs="*", help="default: every network of the zoo (some minutes)"
    )
    models = parser.parse_args(words).models or list_models()
    if unknown := set(models) - set(list_models()):
        raise unknown_name("model", min(unknown), list_models(), see="litezoo list")
    print(write_operators(models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
