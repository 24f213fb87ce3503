"""CSPNet beyond what timm has: the authors' networks, layer by layer as their cfg files say."""

import pytest
import torch
from helpers import fill, images, on_meta, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.cspnet import Bottleneck, CrossStage, Stem
from litezoo.models.weights import convert_state_dict

AUTHORS = list_models("csp*_darknet")
#: Float32 sums of up to 5 thousand products, in another order.
BOUND = 1e-5


def test_only_the_networks_of_the_authors_have_no_partner_in_timm():
    family = [n for n in list_models() if get_spec(n).family == "cspnet"]
    assert {n for n in family if "timm" not in get_spec(n).references} == set(AUTHORS)
    assert len(AUTHORS) == 3


# ----------------------------------------------------------------------- the authors' cfg files


def conv(filters, size=1, stride=1, act="leaky", groups=1):
    return ("conv", filters, size, stride, act, groups)


def resnet_cfg(mids, outs, groups):
    """csresnet50.cfg and csresnext50.cfg: layer numbers of routes and shortcuts as they stand."""
    cfg = [conv(64, 7, 2), ("maxpool",)]
    stages = zip(mids, (128, 256, 512, 1024), outs, (3, 3, 5, 2), (-16, -16, -24, -12), strict=True)
    for number, (mid, width, out, blocks, to_cross) in enumerate(stages, start=1):
        if number > 1:
            cfg.append(conv(outs[number - 2], 3, 2, groups=groups))
        act = "linear" if number in (2, 3) else "leaky"
        cfg += [conv(width, act=act), ("route", -2), conv(64 if number == 1 else width, act=act)]
        for _ in range(blocks):
            cfg += [conv(mid), conv(mid, 3, groups=groups), conv(width, act="linear")]
            cfg.append(("shortcut", -4, "leaky"))
        cfg += [conv(width), ("route", -1, to_cross), conv(out)]
    return cfg


def darknet_cfg():
    """csdarknet53.cfg."""
    cfg = [conv(32, 3)]
    stages = zip((64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), (-7, -10, -28, -28, -16), strict=True)
    for out, blocks, to_cross in stages:
        half, mid = (64, 32) if out == 64 else (out // 2, out // 2)
        cfg += [conv(out, 3, 2), conv(half), ("route", -2), conv(half)]
        for _ in range(blocks):
            cfg += [conv(mid), conv(half, 3), ("shortcut", -3, "linear")]
        cfg += [conv(half), ("route", -1, to_cross), conv(out)]
    return cfg


CFG = {
    "cspresnet50_darknet": resnet_cfg((64, 128, 256, 512), (128, 256, 512, 1024), 1),
    "cspresnext50_darknet": resnet_cfg((128, 256, 512, 1024), (256, 512, 1024, 2048), 32),
    "cspdarknet53_darknet": darknet_cfg(),
}


def activate(x, act):
    return F.leaky_relu(x, 0.1) if act == "leaky" else x


@torch.inference_mode()
def run_as_darknet(cfg, parameters, x):
    """Darknet's meaning of a cfg; `parameters` are taken in the order of the layers."""
    left = iter(parameters)
    outputs = []
    for kind, *values in cfg:
        x = outputs[-1] if outputs else x
        if kind == "conv":
            filters, size, stride, act, groups = values
            weight, gamma, beta, mean, var = (next(left) for _ in range(5))
            assert weight.shape == (filters, x.shape[1] // groups, size, size)
            x = F.conv2d(x, weight, None, stride, size // 2, 1, groups)
            x = activate(F.batch_norm(x, mean, var, gamma, beta, eps=1e-5), act)
        elif kind == "maxpool":  # 2x2/2; one column and row of padding, at the far side
            x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-float("inf")), 2, 2)
        elif kind == "route":
            x = torch.cat([outputs[index] for index in values], 1)
        else:
            index, act = values
            x, other = x.clone(), outputs[index]
            common = min(x.shape[1], other.shape[1])
            x[:, :common] += other[:, :common]
            x = activate(x, act)
        outputs.append(x)
    weight, bias = left
    return x, F.linear(x.mean((2, 3)), weight, bias)


@pytest.mark.parametrize("name", AUTHORS)
def test_the_network_is_what_darknet_makes_of_the_cfg_file(name):
    """Also at odd sizes; the parameters lie in the order of a .weights file."""
    model = fill(on_meta(create_model, name))
    values = [v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")]
    for size in ((64, 96), (45, 37)):
        x = images(2, 3, *size)
        features, logits = run_as_darknet(CFG[name], values, x)
        with torch.inference_mode():
            assert relative_error(model.forward_features(x), features) <= BOUND
            assert relative_error(model(x), logits) <= BOUND


def test_the_first_shortcut_of_the_authors_resnets_is_partial():
    for name in AUTHORS:
        blocks = [m for m in on_meta(create_model, name).modules() if isinstance(m, Bottleneck)]
        expected = [] if "darknet53" in name else [True, *[False] * 12]
        assert [block.partial_shortcut for block in blocks] == expected


# ----------------------------------------------------------------------- the layouts


@pytest.mark.parametrize("linear_split", [False, True])
def test_one_convolution_and_a_split_are_two_convolutions(linear_split):
    """What the drawing in cspnet.py says of the layouts "timm" and "darknet"."""
    torch.manual_seed(0)
    common = dict(
        block="bottleneck", depth=2, path=6, hidden=4, act=nn.SiLU, linear_split=linear_split
    )
    one = shake(CrossStage(5, 7, layout="timm", **common)).eval()
    two = CrossStage(5, 7, layout="darknet", **common).eval()
    state = one.state_dict()
    for key in [k for k in state if k.startswith("expand.")]:
        cross, entry = (state[key],) * 2 if state[key].ndim == 0 else state[key].chunk(2)
        del state[key]
        state[key.replace("expand", "cross")] = cross
        state[key.replace("expand", "entry")] = entry
    state["transition.conv.weight"] = state["transition.conv.weight"].roll(6, dims=1)
    two.load_state_dict(state, strict=True)
    x = images(2, 5, 9, 7)
    with torch.inference_mode():
        assert relative_error(two(x), one(x)) <= BOUND


def test_the_focus_stem_is_space_to_depth_and_a_3x3_convolution():
    torch.manual_seed(0)
    stem = shake(Stem(3, (8,), size=6, stride=2, act=nn.SiLU)).eval()
    weight, bn = stem.convs[0].conv.weight, stem.convs[0].bn
    x = images(2, 3, 12, 16)
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    deep = torch.cat([x[:, :, row::2, column::2] for row, column in corners], 1)
    small = torch.cat([weight[:, :, row::2, column::2] for row, column in corners], 1)
    with torch.inference_mode():
        expected = F.silu(bn(F.conv2d(deep, small, padding=1)))
        assert relative_error(stem(x), expected) <= BOUND


# ----------------------------------------------------------------------- openmmlab's keys


def openmmlab_key(key, *, resnet):
    """Return our key as mmpretrain's CSPNet spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[0] == "head":
        return key
    if parts[0] == "stem":
        return ".".join(["backbone.stem", *(["0"] if resnet else []), *parts[3:]])
    stage, place, rest = ["backbone", "stages", parts[1]], parts[2], parts[3:]
    if place == "0":
        return ".".join([*stage, "downsample_conv", *rest])
    if rest[0] == "blocks":
        if resnet:  # conv2.conv.weight -> conv2.weight, conv2.bn.bias -> bn2.bias
            layer, kind, value = rest[2:]
            name = layer if kind == "conv" else layer.replace("conv", "bn")
            return ".".join([*stage, *rest[:2], name, value])
        return ".".join([*stage, *rest])
    names = {
        "expand": "expand_conv",
        "block_transition": "atfer_blocks_conv",
        "transition": "final_conv",
    }
    return ".".join([*stage, names[rest[0]], *rest[1:]])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "cspresnet50",
            (
                "backbone.stem.0.conv.weight",
                "backbone.stages.0.expand_conv.bn.bias",
                "backbone.stages.1.downsample_conv.conv.weight",
                "backbone.stages.2.blocks.4.conv2.weight",
                "backbone.stages.2.blocks.4.bn3.running_var",
                "head.fc.weight",
            ),
        ),
        (
            "cspdarknet53",
            (
                "backbone.stem.bn.running_mean",
                "backbone.stages.4.blocks.3.conv2.conv.weight",
                "backbone.stages.4.atfer_blocks_conv.bn.weight",
                "backbone.stages.0.final_conv.conv.weight",
                "head.fc.bias",
            ),
        ),
    ],
)
def test_every_key_of_openmmlab_has_one_partner(name, keys):
    ours = on_meta(create_model, name).state_dict()
    resnet = "resnet" in name
    theirs = {openmmlab_key(key, resnet=resnet): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(key in theirs for key in keys)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)
