"""What several test files need; `from helpers import ...` works as pytest puts tests/ first."""

import math

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def fill(model, seed=0):
    """Give a model made on the meta device He-normal weights and shaken BatchNorms.

    Layers are slices of one pool of noise: drawing 123 million numbers would take seconds.
    """
    dtype = next(model.parameters()).dtype
    pool = images(2**24 + 2**21, seed=seed).to(dtype)
    model.to_empty(device="cpu")
    for index, parameter in enumerate(model.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        start, size = (index * 997) % 2**20, parameter.numel()
        while size > len(pool) - start:
            pool = pool.repeat(2)
        noise = pool[start:][:size].view(parameter.shape)
        torch.mul(noise, (2 / fan_in) ** 0.5, out=parameter.data)
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
