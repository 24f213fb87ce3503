r"""RepVGG's custom L2: weight decay of the kernel that is deployed (arXiv 2101.03697).

The official code (DingXiaoH/RepVGG, `get_custom_L2`; by now deprecated there) has it as an option.
In place of ordinary decay of K3 and K1 each, the kernel that the two become is decayed::

      t3, t1 = gamma / sqrt(running_var + eps) of the 3x3 and 1x1 branch, constants here
      R = |K3 off the centre|^2 + sum (t3 K3_centre + t1 K1)^2 / (t3^2 + t1^2)
      loss + weight_decay / 2 * R,   R summed over the blocks

The second term is the least |K3_centre|^2 + |K1|^2 of all pairs that make the same centre: what
the branches have against each other is not decayed. The identity branch is not part of it.

**Its price in INT8.** The denominator lets t grow, and with it the variance of the activations and
the spread of the fused kernel (arXiv 2212.01593 names it as a cause of RepVGG's collapse; its first
step M1 is to decay plainly). In our trials (2026-11; 22 narrow blocks, 20 texture classes,
TensorRT-like per-tensor INT8, noise of a drop +-0.5): plain decay 78.05 % and 0.1 points lost in
INT8 with 17 dB of logit SNR; custom L2 79.5 % and 0.7; with four times the weight decay 81.65 % and
1.7 with 8.6 dB (per channel 0.9 with 12 dB). Where the network goes to INT8, decay plainly or train
QARepVGG.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from litezoo.models.errors import UsageError
from litezoo.models.layers import ConvBN
from litezoo.models.repvgg import RepVGGBlock

__all__ = ["check_custom_l2", "custom_l2", "decayed_by_custom_l2"]

#: timm's names of SGD: only there is a term of the loss what weight decay is.
_SGD = ("sgd", "momentum", "nesterov")


def custom_l2(model: nn.Module) -> Tensor:
    """Return R of all RepVGG blocks, a scalar; its gradient goes to the kernels alone."""
    return torch.stack([_of_block(block) for block in _blocks(model).values()]).sum()


def decayed_by_custom_l2(model: nn.Module) -> frozenset[str]:
    """Return the names of the kernels that R decays, which ordinary decay has to leave out."""
    return frozenset(
        f"{name}.{branch}.conv.weight"
        for name in _blocks(model)
        for branch in ("branch_3x3", "branch_1x1")
    )


def check_custom_l2(model: nn.Module, *, name: str, opt: str, weight_decay: float) -> None:
    """Refuse what custom L2 is not defined for, or has no meaning in, with a UsageError."""
    if not _blocks(model):
        raise UsageError(
            f"custom_l2 is of RepVGG's blocks, which {name} has not; leave model.custom_l2 out"
        )
    if opt not in _SGD:
        raise UsageError(
            f"custom_l2 is a term of the loss, which {opt} does not treat as weight decay; use "
            "--model.optimizer.opt sgd"
        )
    if not weight_decay:
        raise UsageError("custom_l2 is as strong as optimizer.weight_decay, which is 0; set it")


def _blocks(model: nn.Module) -> dict[str, RepVGGBlock]:
    return {name: at for name, at in model.named_modules() if isinstance(at, RepVGGBlock)}


def _of_block(block: RepVGGBlock) -> Tensor:
    k3, k1 = block.branch_3x3.conv.weight, block.branch_1x1.conv.weight
    t3, t1 = _scale(block.branch_3x3), _scale(block.branch_1x1)
    centre = k3[:, :, 1, 1]
    made = centre * t3 + k1[:, :, 0, 0] * t1
    # both gammas 0: nothing is made, and 0 / 0 is to be 0
    size = (t3.square() + t1.square()).clamp_min(torch.finfo(t3.dtype).tiny)
    return k3.square().sum() - centre.square().sum() + (made.square() / size).sum()


def _scale(branch: ConvBN) -> Tensor:
    """Return gamma / sqrt(var + eps), (C_out, 1), without a gradient."""
    bn = branch.bn
    assert bn.running_var is not None
    return (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().view(-1, 1)
