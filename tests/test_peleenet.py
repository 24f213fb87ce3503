"""PeleeNet against its official code's equations, and against pytorchcv, whose stem is turned."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error
from pytorchcv.model_provider import get_model as pytorchcv_model
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec
from litezoo.models.create import create_model
from litezoo.models.weights import convert_state_dict, load_state_dict

#: Float32 sums of up to 7 hundred products, in another order.
BOUND = 1e-5


# ----------------------------------------------------------------------- the official code


def official_key(key):
    """Return our key as Robert-JunWang/PeleeNet spells it, without looking at KEY_LAYOUTS."""
    parts = ["norm" if part == "bn" else part for part in key.split(".")]
    if parts[0] == "head":
        return f"classifier.{parts[2]}"
    if parts[0] == "stem":
        return ".".join(["features.stemblock.stem1", *parts[1:]])
    number, place, rest = int(parts[1]) + 1, parts[2], parts[3:]
    if place == "0":
        block = "stem3" if rest[0] == "merge" else f"stem2{'ab'[int(rest[1])]}"
        return ".".join(["features.stemblock", block, *rest[-2:]])
    if place == "1":
        layer, branch, step, *last = rest
        way = f"{branch}{'abc'[int(step)]}"
        return ".".join([f"features.denseblock{number}.denselayer{int(layer) + 1}", way, *last])
    return ".".join([f"features.transition{number}", *rest])


@torch.inference_mode()
def run_as_official(weights, x):
    """The official forward, spelled in functional calls over a state dict with its keys."""

    def basic(name, x, **options):
        values = [weights[f"{name}.norm.{k}"] for k in ("running_mean", "running_var")]
        values += [weights[f"{name}.norm.{k}"] for k in ("weight", "bias")]
        x = F.conv2d(x, weights[f"{name}.conv.weight"], **options)
        return F.relu(F.batch_norm(x, *values, eps=1e-5))

    stem = "features.stemblock.stem"
    x = basic(f"{stem}1", x, stride=2, padding=1)
    branch = basic(f"{stem}2b", basic(f"{stem}2a", x), stride=2, padding=1)
    x = basic(f"{stem}3", torch.cat([F.max_pool2d(x, 2, 2), branch], 1))
    for block, layers in enumerate((3, 4, 8, 6), start=1):
        for layer in range(1, layers + 1):
            dense = f"features.denseblock{block}.denselayer{layer}.branch"
            first = basic(f"{dense}1b", basic(f"{dense}1a", x), padding=1)
            second = basic(f"{dense}2b", basic(f"{dense}2a", x), padding=1)
            second = basic(f"{dense}2c", second, padding=1)
            x = torch.cat([x, first, second], 1)
        x = basic(f"features.transition{block}", x)
        if block < 4:
            x = F.avg_pool2d(x, 2, 2)
    return F.linear(x.mean((2, 3)), weights["classifier.weight"], weights["classifier.bias"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(prefix):
    ours = on_meta(create_model, "peleenet").state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours)
    for key in (
        "features.stemblock.stem2b.conv.weight",
        "features.denseblock3.denselayer8.branch2c.norm.running_var",
        "features.denseblock1.denselayer1.branch1a.conv.weight",
        "features.transition4.norm.weight",
        "classifier.bias",
    ):
        assert prefix + key in theirs
    converted = convert_state_dict(theirs, get_spec("peleenet"), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


def test_official_weights_give_the_official_logits():
    model = fill(on_meta(create_model, "peleenet"))
    weights = {official_key(key): value for key, value in model.state_dict().items()}
    x = images(2, 3, 64, 96)
    with torch.inference_mode():
        assert relative_error(model(x), run_as_official(weights, x)) <= BOUND


# ----------------------------------------------------------------------- pytorchcv


def from_pytorchcv(key):
    """Return pytorchcv's key as the official code spells it."""
    parts = ["norm" if part == "bn" else part for part in key.split(".")]
    if parts[0] == "output":
        return f"classifier.{parts[-1]}"
    place = parts[1]
    if place == "init_block":
        names = {"first_conv": "1", "last_conv": "3", "conv1": "2a", "conv2": "2b"}
        name = parts[2] if parts[2] in names else parts[4]
        return ".".join(["features.stemblock", f"stem{names[name]}", *parts[-2:]])
    if place == "final_block":
        return ".".join(["features.transition4", *parts[-2:]])
    number = int(place.removeprefix("stage"))
    if parts[2].startswith("trans"):
        return ".".join([f"features.transition{number - 1}", *parts[-2:]])
    layer = parts[2].replace("unit", "denselayer")
    way = parts[3] + "abc"[int(parts[4].removeprefix("conv")) - 1]
    return ".".join([f"features.denseblock{number}", layer, way, *parts[-2:]])


def test_weights_of_pytorchcv_with_the_stem_turned_give_its_logits():
    """It concatenates convolution and pool in the stem, the official code pool and convolution."""
    reference = fill(on_meta(pytorchcv_model, "peleenet"))
    reference.features.final_pool = nn.AdaptiveAvgPool2d(1)  # its own is for 224 only
    state = {from_pytorchcv(key): value for key, value in reference.state_dict().items()}
    turned = "features.stemblock.stem3.conv.weight"
    state[turned] = state[turned].roll(32, dims=1)
    ours = poison(on_meta(create_model, "peleenet"))
    load_state_dict(ours, state, get_spec("peleenet"))
    x = images(2, 3, 64, 96)
    with torch.inference_mode():
        assert relative_error(ours(x), reference(x)) <= BOUND
