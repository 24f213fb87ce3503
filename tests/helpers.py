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


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return max|a - b| / max|b|; NaN where either has one, so that no bound holds."""
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = (a.detach().double() - b.detach().double()).abs().max()
    return float(difference / b.detach().double().abs().max())


def images(*shape, seed=0, dtype=torch.float32):
    """Return seeded normal noise (N, C, H, W)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
