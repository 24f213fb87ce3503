"""What several test files need; `from helpers import ...` works as pytest puts tests/ first."""

import dataclasses
import math
import types
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from litezoo.models import catalogue

#: Blocks of a stage, where not two but so many have every kind of layer.
DEPTHS = {"gghostnet": 3, "repvgg in groups": 4}
#: Table values of families whose lightest member is wide, in little.
NARROW = {
    "repoptvgg": {"stem_width": 16, "widths": (32, 64, 128, 512)},
    "vgg": {"widths": (32, 64, 64, 128, 128), "hidden_size": 256},
}
#: What is no part of the table, as all members have it.
COMMON_DEPTHS = {"shufflenetv1": (4, 8, 4), "shufflenetv2": (4, 8, 4), "vgg": (2, 2, 3, 3, 3)}
#: Of a row of `stages`, by family: the kind of block, the width and the stride of its map.
ROWS = {
    "ghostnet": lambda row: ((row[0], row[3] > 0), row[2], row[4]),
    "mobiledet": lambda row: ((row[0], row[3], row[5]), row[1], row[4]),
    "mobilenetv3": lambda row: ((row[0], *row[3:5]), row[2], row[5]),
}


def narrow(spec):
    """Return a spec of few parameters of a family that has no light member, another as it is."""
    table = {**spec.architecture, **NARROW.get(spec.family, {})}
    return dataclasses.replace(spec, architecture=table)


def shallow(spec):
    """Return a spec whose network has every kind of layer that this one's has, but few of each.

    For what takes long and is the same at any depth, as is the way to ONNX: of equal blocks that
    follow each other two are left, of equal rows of a table one. `kinds_of_layers` tells whether
    none is missing.
    """
    if not spec.factory.startswith("litezoo.models."):  # what its table means is not known here
        return spec
    table = dict(narrow(spec).architecture)
    grouped = spec.family.endswith("repvgg") and table["groups"] > 1
    most = DEPTHS.get("repvgg in groups" if grouped else spec.family, 2)
    if spec.family in COMMON_DEPTHS:
        table.setdefault("depths", COMMON_DEPTHS[spec.family])
    if "depths" in table:
        table["depths"] = tuple(min(depth, most) for depth in table["depths"])
    if "se_depths" in table:
        table["se_depths"] = tuple(min(depth, 1) for depth in table["se_depths"])
    if spec.family == "mobilenetv2":
        table["stages"] = tuple((t, c, min(n, 2), s) for t, c, n, s in table["stages"])
    elif spec.family == "mobilenetv4":
        stages = (
            (w, first, {row[:2]: row for row in rows}) for w, (first, *rows) in table["stages"]
        )
        table["stages"] = tuple((w, (first, *rows.values())) for w, first, rows in stages)
    elif spec.family in ROWS:
        table["stages"] = tuple(_without_repeats(table["stages"], ROWS[spec.family]))
    return dataclasses.replace(spec, architecture=table)


def _without_repeats(stages, describe):
    """Yield stages without the rows that keep size and width as an equal one before them does."""
    before, seen = None, set()
    for rows in stages:
        kept = []
        for row in rows:
            kind, width, stride = describe(row)
            repeats = stride == 1 and width == before
            if not (repeats and kind in seen and kept):
                kept.append(row)
            if repeats:
                seen.add(kind)
            before = width
        yield tuple(kept)


def structure(model):
    """Return what a network is made of, but for its widths: its modules, their place and flags."""
    return tuple(
        (
            name,
            type(module).__qualname__,
            *(str(getattr(module, key, "")) for key in ("kernel_size", "stride", "padding")),
            getattr(module, "groups", 1) == 1,
            *(f"{k}={v}" for k, v in vars(module).items() if isinstance(v, (bool, str))),
        )
        for name, module in model.named_modules()
    )


def kinds_of_layers(model):
    """Return the kinds of modules that a network is made of, wherever and how often."""
    return frozenset(kind[1:] for kind in structure(model))


@torch.no_grad()
def settle(model):
    """Give BatchNorms the statistics of noise and return the network in eval mode.

    Not random ones: those let a deep network say the same to every image, and then a wrong map
    between stem and head is not seen. Channels that are dead get no tiny variance, which would
    blow rounding up.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]

    def lift(norm, _x, _y):
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))

    hooks = [norm.register_forward_hook(lift) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0.5, 0.2)  # most of each ReLU is open: little chaos
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    model.train()(images(16, channels, 64, 64, seed=1))
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        norm.momentum = momentum
        hook.remove()
    return model.eval()


@torch.no_grad()
def shake(model, seed=0):
    """Randomise every BatchNorm in place and return the model.

    A fresh BatchNorm is the identity, so a fold that ignores it altogether would pass. Gammas are
    negative too; the variances span two decades, which keeps a deep network's activations finite.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(math.log(0.1), math.log(10), generator=generator)
                module.running_var.exp_()
            if module.affine:
                module.weight.normal_(0, 0.6, generator=generator)
                module.bias.normal_(0, 0.5, generator=generator)
    return model


def largest(x: Tensor) -> float:
    """Return max|x|, or NaN where there is one; `x.abs().max()` takes four times as long."""
    low, high = x.detach().aminmax()
    return float(torch.maximum(-low, high))


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|b|; NaN where either has one, so that no bound holds."""
    assert a.shape == b.shape, (a.shape, b.shape)
    b = b.detach().double()
    return largest(a.detach().double() - b) / largest(b)


def images(*shape, seed=0, dtype=torch.float32):
    """Return seeded normal noise (N, C, H, W)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on_meta(create, name, **options):
    with torch.device("meta"):
        return create(name, **options).eval()


@cache
def _noise(dtype, seed):
    return images(2**24 + 2**22, seed=seed).to(dtype)


@torch.no_grad()
def fill(model, seed=0):
    """Give a model made on the meta device He-normal weights and shaken BatchNorms.

    Layers are slices of one pool of noise: drawing 123 million numbers would take seconds.
    """
    pool = _noise(next(model.parameters()).dtype, seed)
    model.to_empty(device="cpu")
    for index, parameter in enumerate(model.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        start = (index * 997) % 2**20
        for part in parameter.data.view(-1).split(2**22):
            torch.mul(pool[start:][: len(part)], (2 / fan_in) ** 0.5, out=part)
            start = (start + 2**22) % 2**24 if start < 2**24 else 0
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return shake(model, seed)


@torch.no_grad()
def poison(model):
    """Give a model made on the meta device NaN everywhere: what is not loaded shows."""
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else -1)
    return model


@contextmanager
def in_catalogue(*specs):
    """Have models in the catalogue meanwhile, through the entry point group."""
    point = types.SimpleNamespace(name="tests", load=lambda: specs)

    def entry_points(*, group):
        return [point] if group == "litezoo.models" else []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "entry_points", entry_points)
        catalogue._registry.cache_clear()
        yield
    catalogue._registry.cache_clear()
