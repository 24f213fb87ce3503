"""Engines that take images of many sizes: which devices can have them, and networks made ready."""

from __future__ import annotations

import copy

from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from litezoo.models.errors import UsageError
from litezoo.models.shuffle import ChannelShuffle, with_shuffle_form

from .request import Request, one_size
from .runtime import get_runtime

__all__ = ["check_open_resolution", "free_of_size"]


def check_open_resolution(request: Request) -> None:
    """Refuse an open resolution for a device of constant shapes or without a runtime for it."""
    device = request.device
    if device.limits.static_shapes:
        raise UsageError(
            f"{device.name} runs images of one size only; export without an open resolution "
            "(--dynamic-resolution)"
        )
    reasons = [one_size(get_runtime(name)) for name in device.runtimes]
    if None not in reasons:
        raise UsageError(
            f"{device.name} has no runtime for an open resolution: {'; '.join(map(str, reasons))}; "
            "export without it (--dynamic-resolution)"
        )


def free_of_size(network: nn.Module) -> nn.Module:
    """Return a network of the same outputs in which less is computed from the image's size.

    TensorFlow's padding is a constant where every side is even, as it is at each stride of 2 of an
    open resolution; as a function of the size it takes torch minutes to export.

    Channel shuffles get their form of five dimensions.
    Five dimensions need no product of height and width: pnnx then makes ncnn's ShuffleChannel of
    them, where the form of four dimensions has the example's size in it and is wrong at others.
    As gathers they are no choice: shufflenetv2_x0_5 was then wrong in OpenVINO 2026.4 (relative
    error 0.1), and ncnn stopped at it.
    """
    for name, module in network.named_modules():
        is_pool = isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))
        if is_pool and module.output_size not in (1, (1, 1)):
            raise UsageError(
                f"{name} pools to {module.output_size} windows, which ONNX has for one image size "
                "only; export without an open resolution (--dynamic-resolution)"
            )
    if any(isinstance(module, ChannelShuffle) for module in network.modules()):
        network = with_shuffle_form(network, "5d")
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv2dSame):
                setattr(parent, name, _padded(child))
    return network


def _padded(same: Conv2dSame) -> nn.Sequential:
    """Return TensorFlow's padding before a convolution of it: that of sides its stride divides."""
    tall, wide = (max(k - s, 0) for k, s in zip(same.kernel_size, same.stride, strict=True))
    margins = (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
    plain = nn.Conv2d(
        same.in_channels, same.out_channels, (same.kernel_size[0], same.kernel_size[1]),
        (same.stride[0], same.stride[1]), groups=same.groups, bias=same.bias is not None,
    )  # fmt: skip
    plain.weight, plain.bias = same.weight, same.bias
    return nn.Sequential(nn.ZeroPad2d(margins), plain)
