r"""Channel shuffle (Zhang et al., arXiv 1707.01083, section 3.1): one permutation, three forms.

Seen as a (groups, C / groups) matrix the channels are transposed, so that the next group
convolution reads from every group of the one before::

    3 groups of 2       a0 a1 | b0 b1 | c0 c1    ->    a0 b0 c0 | a1 b1 c1

Shuffling by C / groups undoes shuffling by groups. The forms compute the same bits:

* "5d", as the papers write it: view (N, g, C/g, H, W), transpose, reshape. TensorFlow Lite's and
  NNAPI's transposes and reshapes end at four dimensions, and such networks fall back or fail
  (tensorflow/models#7528, tensorflow#47546).
* "4d", the default: reshape (N, g, C/g, H*W), transpose, reshape (N, C, H, W). Nothing has more
  than four dimensions; with a static image size both shapes are constants in the ONNX file and the
  batch stays free. All three operators are in every runtime (TensorRT: two Shuffle layers), and it
  is the very definition of OpenVINO's ShuffleChannels, which its ShuffleChannelsFusion makes of it.
* "gather": one index_select by a constant list of channels, the same in NCHW and NHWC layouts.
  Fewest nodes; OpenVINO's CPU plugin keeps its blocked layouts around it. What an NPU's compiler
  makes of a Gather has to be tried.

Which is fastest differs from runtime to runtime: `with_shuffle_form` makes the model for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from .errors import UsageError, unknown_name

__all__ = [
    "SHUFFLE_FORMS",
    "ChannelShuffle",
    "ShuffleForm",
    "shuffle_4d",
    "shuffle_5d",
    "shuffle_gather",
    "split_channels",
    "with_shuffle_form",
]

ShuffleForm = Literal["4d", "5d", "gather"]
Model = TypeVar("Model", bound=nn.Module)


def shuffle_5d(x: Tensor, groups: int) -> Tensor:
    """Return (N, C, H, W) shuffled, by a transpose of five dimensions."""
    n, channels, height, width = x.shape
    x = x.view(n, groups, channels // groups, height, width).transpose(1, 2)
    return x.reshape(n, channels, height, width)


def shuffle_4d(x: Tensor, groups: int) -> Tensor:
    """Return (N, C, H, W) shuffled, by a transpose of four dimensions."""
    _, channels, height, width = x.shape
    x = x.reshape(-1, groups, channels // groups, height * width).transpose(1, 2)
    return x.reshape(-1, channels, height, width)


def shuffle_gather(x: Tensor, groups: int) -> Tensor:
    """Return (N, C, H, W) shuffled, by a constant list of channels."""
    index = torch.arange(x.shape[1], device=x.device).view(groups, -1).t().reshape(-1)
    return x.index_select(1, index)


#: How a channel shuffle can be written, by name.
SHUFFLE_FORMS: Mapping[ShuffleForm, Callable[[Tensor, int], Tensor]] = MappingProxyType(
    {"4d": shuffle_4d, "5d": shuffle_5d, "gather": shuffle_gather}
)


class ChannelShuffle(nn.Module):
    """Channel i * C/groups + j becomes channel j * groups + i; (N, C, H, W) -> the same shape.

    It has no parameters. `form` is how it is written, in training as in export.
    """

    def __init__(self, groups: int, *, form: ShuffleForm = "4d") -> None:
        super().__init__()
        self.groups = groups
        self.form: ShuffleForm = form

    def forward(self, x: Tensor) -> Tensor:
        """Return the same channels in the other order."""
        return SHUFFLE_FORMS[self.form](x, self.groups)

    def extra_repr(self) -> str:
        """Say groups and form in the printed module."""
        return f"groups={self.groups}, form={self.form!r}"


def split_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of the channels, (N, C, H, W) -> twice (N, C / 2, H, W).

    `chunk` becomes one ONNX Split of two static sizes; two slices would be two nodes, and taking
    every second channel a strided slice, which few NPUs have.
    """
    first, second = x.chunk(2, dim=1)
    return first, second


def with_shuffle_form(model: Model, form: ShuffleForm) -> Model:
    """Return a copy of `model` (train or deploy form) whose channel shuffles are of this form.

    The outputs are the same to the bit. A model without channel shuffle is a UsageError.
    """
    if form not in SHUFFLE_FORMS:
        raise unknown_name("shuffle form", form, SHUFFLE_FORMS)
    twin = copy.deepcopy(model)
    shuffles = [module for module in twin.modules() if isinstance(module, ChannelShuffle)]
    if not shuffles:
        raise UsageError(
            f"{type(model).__name__} has no channel shuffle to give a form to; "
            "shufflenetv1 and shufflenetv2 have"
        )
    for shuffle in shuffles:
        shuffle.form = form
    return twin
