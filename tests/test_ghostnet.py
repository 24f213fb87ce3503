"""GhostNet beyond what parity with timm shows: equation 3, the official layout, the stem's map."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.ghostnet import GhostBottleneck, GhostModule
from litezoo.models.layers import relu
from litezoo.models.weights import convert_state_dict, load_state_dict

GHOSTNET = list_models("ghostnet_*")


def norm(x, bn):
    """BatchNorm in eval mode, in words: (x - mean) / sqrt(var + 1e-5) * gamma + beta."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


def ghost(x, module, act):
    """Equations 2 and 3: y'_i = x * f'_i, then y_ij = Phi_ij(y'_i), each channel its own Phi."""
    intrinsic = act(norm(F.conv2d(x, module.primary.conv.weight), module.primary.bn))
    ghosts = torch.stack(
        [
            F.conv2d(intrinsic[:, i : i + 1], kernel[None], padding=1)[:, 0]
            for i, kernel in enumerate(module.cheap.conv.weight)
        ],
        dim=1,
    )
    return torch.cat([intrinsic, act(norm(ghosts, module.cheap.bn))], 1)


def same(x):
    return x


# ----------------------------------------------------------------------- the paper's equations


@pytest.mark.parametrize(("act", "function"), [(relu, F.relu), (None, same)])
@torch.no_grad()
def test_a_ghost_module_is_equation_3_with_the_intrinsic_channels_first(act, function):
    module = shake(GhostModule(6, 12, act=act)).double().eval()
    x = images(2, 6, 7, 9, dtype=torch.float64)
    expected = ghost(x, module, function)
    assert relative_error(module(x), expected) <= 1e-12
    assert relative_error(fuse(module)(x), expected) <= 1e-12


@pytest.mark.parametrize("squeezed", [0, 4])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "size", "stride"),
    [(8, 8, 3, 1), (8, 12, 5, 1), (8, 8, 3, 2), (8, 12, 5, 2)],
)
@torch.no_grad()
def test_a_bottleneck_is_figure_3(in_channels, out_channels, size, stride, squeezed):
    block = GhostBottleneck(
        in_channels, out_channels, expanded=16, size=size, squeezed=squeezed, stride=stride
    )
    block = shake(block).double().eval()
    x = images(2, in_channels, 9, 11, dtype=torch.float64)

    def depthwise(x, layer):
        kernel = layer.conv.weight
        y = F.conv2d(x, kernel, stride=stride, padding=(size - 1) // 2, groups=len(kernel))
        return norm(y, layer.bn)

    y = ghost(x, block.ghost1, F.relu)
    if stride == 2:
        y = depthwise(y, block.dw)
    if squeezed:
        fc1, fc2 = block.se.fc1, block.se.fc2
        hidden = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), fc1.weight, fc1.bias))
        y = y * (F.relu6(F.conv2d(hidden, fc2.weight, fc2.bias) + 3) / 6)
    y = ghost(y, block.ghost2, same)
    if stride == 1 and in_channels == out_channels:
        expected = y + x
    else:
        first, second = block.shortcut
        expected = y + norm(F.conv2d(depthwise(x, first), second.conv.weight), second.bn)
    assert relative_error(block(x), expected) <= 1e-12
    assert relative_error(fuse(block)(x), expected) <= 1e-12


@pytest.mark.parametrize("name", GHOSTNET)
def test_squeezed_widths_are_a_quarter_of_the_expanded_rounded_to_4(name):
    """As listed by an independent count; 9 becomes 12, as 8 would be less than nine tenths."""
    expected = {
        "ghostnet_100": [20, 32, 120, 168, 168, 240, 240],
        "ghostnet_050": [12, 16, 60, 84, 84, 120, 120],
        "ghostnet_130": [24, 40, 156, 220, 220, 312, 312],
    }
    model = on_meta(create_model, name)
    gates = [m.se for m in model.modules() if isinstance(m, GhostBottleneck) if m.se]
    assert [gate.fc1.out_channels for gate in gates] == expected[name]


def test_the_deploy_form_keeps_one_batchnorm_behind_the_stem():
    """The finest feature map is timm's, the stem's convolution alone."""
    model = on_meta(create_model, "ghostnet_050")
    deploy = fuse(model)
    assert [n for n, m in deploy.named_modules() if isinstance(m, nn.BatchNorm2d)] == [
        "stages.0.0.bn"
    ]
    for form in (model, deploy):
        assert isinstance(form.stem.conv, nn.Conv2d) and form.stem.conv.bias is None


# ----------------------------------------------------------------------- the official layout


def official_key(key):
    """Return our key as huawei-noah's ghostnet.py spells it, without looking at KEY_LAYOUTS."""
    whole = {
        "stem.conv.": "conv_stem.",
        "stages.0.0.bn.": "bn1.",
        "final.conv.": "blocks.9.0.conv.",
        "final.bn.": "blocks.9.0.bn1.",
        "head.neck.conv.": "conv_head.",
        "head.fc.": "classifier.",
    }
    for ours, theirs in whole.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    _, stage, block, part, *rest = key.split(".")
    place = f"blocks.{stage}.{int(block) - 1 if stage == '0' else block}."
    if part in ("ghost1", "ghost2"):
        name = {"primary": "primary_conv", "cheap": "cheap_operation"}[rest[0]]
        return place + f"{part}.{name}.{ {'conv': 0, 'bn': 1}[rest[1]] }.{rest[2]}"
    if part == "dw":
        return place + f"{rest[0]}_dw.{rest[1]}"
    if part == "se":
        return place + f"se.{ {'fc1': 'conv_reduce', 'fc2': 'conv_expand'}[rest[0]] }.{rest[1]}"
    assert part == "shortcut"
    return place + f"shortcut.{2 * int(rest[0]) + (rest[1] == 'bn')}.{rest[2]}"


@pytest.mark.parametrize("name", GHOSTNET)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(name, prefix):
    ours = on_meta(create_model, name).state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours)
    for key in (
        "conv_stem.weight",
        "bn1.running_mean",
        "blocks.0.0.ghost1.primary_conv.0.weight",
        "blocks.1.0.conv_dw.weight",
        "blocks.1.0.bn_dw.running_var",
        "blocks.3.0.se.conv_reduce.bias",
        "blocks.6.3.shortcut.0.weight",
        "blocks.6.3.shortcut.3.bias",
        "blocks.8.3.ghost2.cheap_operation.1.weight",
        "blocks.9.0.bn1.weight",
        "conv_head.bias",
        "classifier.weight",
    ):
        assert prefix + key in theirs
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


def test_official_weights_load():
    trained = fill(on_meta(create_model, "ghostnet_050"))
    state = {official_key(key): value for key, value in trained.state_dict().items()}
    loaded = poison(on_meta(create_model, "ghostnet_050"))
    assert load_state_dict(loaded, state, get_spec("ghostnet_050")) == ()
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))
