"""DenseNet beyond parity: blocks against the paper's equation, and the older and other layouts."""

import pytest
import torch
from helpers import images, on_meta, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec
from litezoo.models.create import create_model
from litezoo.models.densenet import DenseLayer, DenseNet, NormReLU, Transition
from litezoo.models.fuse import fuse
from litezoo.models.weights import convert_state_dict

SPEC = get_spec("densenet121")


# ----------------------------------------------------------------------- the paper's equation


def bn_relu(x, bn):
    return F.relu(
        F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    )


def test_every_layer_reads_the_maps_of_all_layers_before_it():
    """x_l = H_l([x_0, x_1, ..., x_{l-1}]), equation 2, with H of section 3 (DenseNet-B)."""
    torch.manual_seed(0)
    block = shake(nn.Sequential(*(DenseLayer(8 + 4 * i, 4) for i in range(5)))).double().eval()
    x = images(2, 8, 9, 7, dtype=torch.float64)
    maps = [x]
    for layer in block:
        y = F.conv2d(bn_relu(torch.cat(maps, 1), layer.pre.bn), layer.bottleneck.conv.weight)
        y = F.conv2d(bn_relu(y, layer.bottleneck.bn), layer.conv.weight, padding=1)
        maps.append(y)
    expected = torch.cat(maps, 1)
    with torch.inference_mode():
        assert block(x.clone()).shape == (2, 28, 9, 7)
        assert relative_error(block(x.clone()), expected) <= 1e-12
        assert relative_error(fuse(block)(x.clone()), expected) <= 1e-12


def test_a_layer_hands_its_input_on_unchanged():
    layer = shake(DenseLayer(8, 4)).eval()
    x = images(2, 8, 5, 5)
    kept = x.clone()
    with torch.inference_mode():
        assert torch.equal(layer(x)[:, :8], kept)
    assert torch.equal(x, kept)


def test_a_transition_convolves_and_then_averages():
    layer = shake(Transition(8, 4)).double().eval()
    x = images(2, 8, 6, 8, dtype=torch.float64)
    y = F.conv2d(bn_relu(x, layer.pre.bn), layer.conv.weight)
    expected = y.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    with torch.inference_mode():
        assert relative_error(layer(x.clone()), expected) <= 1e-12


def test_compression_halves_the_channels_between_blocks():
    model = DenseNet(growth=4, depths=(2, 3, 4))
    widths = [(t.conv.in_channels, t.conv.out_channels) for t in model.modules()
              if isinstance(t, Transition)]  # fmt: skip
    assert widths == [(16, 8), (20, 10)]
    assert model.num_features == 10 + 4 * 4 == model.feature_info[-1]["num_chs"]


# ----------------------------------------------------------------------- the deploy form


def test_of_121_layers_59_fold_and_62_norms_stay():
    """What folds: the stem and the norm behind every bottleneck. 58 + 3 + 1 norms come first."""
    model = on_meta(create_model, "densenet121")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m for m in fuse(model).modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(norms), len(kept)) == (121, 62)
    assert len([m for m in model.modules() if isinstance(m, NormReLU)]) == 62


def test_the_last_feature_map_is_the_one_the_head_reads():
    net = create_model("densenet121", features_only=True, out_indices=(-1,)).eval()
    with torch.inference_mode():
        (last,) = net(images(1, 3, 32, 32))
    assert last.shape == (1, 1024, 1, 1) and last.min() >= 0


# ----------------------------------------------------------------------- layouts


def split(key):
    """Return (stage, position, the rest) of a key inside the stages, else None."""
    parts = key.split(".")
    return (int(parts[1]), int(parts[2]), ".".join(parts[3:])) if parts[0] == "stages" else None


LAYER = {
    "pre.bn": "norm1",
    "bottleneck.conv": "conv1",
    "bottleneck.bn": "norm2",
    "conv": "conv2",
}
TRANSITION = {"pre.bn": "norm", "conv": "conv"}


def openmmlab_key(key):
    """Return our key as mmpretrain spells it, written without looking at KEY_LAYOUTS."""
    place = split(key)
    if place is None:
        fixed = {
            "stem.conv.": "backbone.stem.0.",
            "stem.bn.": "backbone.stem.1.",
            "final.bn.": "backbone.transitions.3.0.",
            "head.fc.": "head.fc.",
        }
        return next(new + key.removeprefix(old) for old, new in fixed.items() if old in key)
    stage, position, rest = place
    module, what = rest.rsplit(".", 1)
    if position == 0:
        return f"backbone.transitions.{stage - 1}.{TRANSITION[module]}.{what}"
    return f"backbone.stages.{stage}.block.{position - 1}.{LAYER[module]}.{what}"


def torchvision_key_of_2017(key):
    """Return our key as the file densenet121-a639ec97.pth spells it (norm.1 for norm1)."""
    place = split(key)
    if place is None:
        fixed = {
            "stem.conv.": "features.conv0.",
            "stem.bn.": "features.norm0.",
            "final.bn.": "features.norm5.",
            "head.fc.": "classifier.",
        }
        return next(new + key.removeprefix(old) for old, new in fixed.items() if old in key)
    stage, position, rest = place
    module, what = rest.rsplit(".", 1)
    if position == 0:
        return f"features.transition{stage}.{TRANSITION[module]}.{what}"
    word = f"{LAYER[module][:-1]}.{LAYER[module][-1]}"
    return f"features.denseblock{stage + 1}.denselayer{position}.{word}.{what}"


@pytest.mark.parametrize(
    ("spelling", "keys"),
    [
        (
            openmmlab_key,
            (
                "backbone.stem.0.weight",
                "backbone.stages.0.block.0.norm1.weight",
                "backbone.stages.2.block.23.conv2.weight",
                "backbone.transitions.0.norm.running_mean",
                "backbone.transitions.2.conv.weight",
                "backbone.transitions.3.0.bias",
            ),
        ),
        (
            torchvision_key_of_2017,
            (
                "features.conv0.weight",
                "features.denseblock1.denselayer1.norm.1.weight",
                "features.denseblock4.denselayer16.conv.2.weight",
                "features.transition3.norm.running_var",
                "features.norm5.bias",
                "classifier.weight",
            ),
        ),
    ],
)
def test_every_key_of_the_layout_has_one_partner(spelling, keys):
    ours = on_meta(create_model, "densenet121").state_dict()
    theirs = {spelling(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(key in theirs for key in keys)
    converted = convert_state_dict(theirs, SPEC, ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)
