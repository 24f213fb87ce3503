"""ResNet beyond parity: OpenMMLab's key layout, the paper's strides and initialisation."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error
from pytorchcv.model_provider import get_model as pytorchcv_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.resnet import Bottleneck, ResNet
from litezoo.models.weights import convert_state_dict, load_state_dict

RESNET = [name for name in list_models() if get_spec(name).family == "resnet"]


def test_every_variant_has_partners_in_three_libraries():
    assert RESNET == ["resnet18", "resnet34", "resnet50"]
    for name in RESNET:
        assert get_spec(name).references.keys() == {"timm", "torchvision", "pytorchcv"}


# ----------------------------------------------------------------------- OpenMMLab's layout


def openmmlab_key(key):
    """Return our key as mmpretrain spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[0] == "head":
        return key
    if parts[0] == "stem":
        return f"backbone.{parts[1]}1.{parts[2]}"
    _, stage, block, place, kind, what = parts
    number = int(block) - 1 if stage == "0" else int(block)
    if place == "shortcut":
        layer = "downsample.0" if kind == "conv" else "downsample.1"
    else:
        layer = kind + place[-1]
    return f"backbone.layer{int(stage) + 1}.{number}.{layer}.{what}"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "resnet18",
            (
                "backbone.conv1.weight",
                "backbone.bn1.running_mean",
                "backbone.layer1.0.conv1.weight",
                "backbone.layer1.1.bn2.bias",
                "backbone.layer2.0.downsample.0.weight",
                "backbone.layer4.1.conv2.weight",
                "head.fc.bias",
            ),
        ),
        (
            "resnet50",
            (
                "backbone.layer1.0.downsample.1.running_var",
                "backbone.layer3.5.bn3.weight",
                "backbone.layer4.2.conv3.weight",
                "head.fc.weight",
            ),
        ),
    ],
)
def test_every_key_of_openmmlab_has_one_partner(name, keys):
    ours = on_meta(create_model, name).state_dict()
    theirs = {openmmlab_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(key in theirs for key in keys)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


# ----------------------------------------------------------------------- strides


def macs(model, side=224):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2e9


def test_with_the_strides_on_the_first_1x1_it_has_the_papers_multiply_accumulates():
    """The reason of resnet50's exemption: Table 1 prints 3.8e9."""
    model = on_meta(create_model, "resnet50")
    assert macs(model) == pytest.approx(4.09, abs=0.005)
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.conv.stride, block.conv2.conv.stride = block.conv2.conv.stride, (1, 1)
    assert macs(model) == pytest.approx(3.8, rel=0.02)


def test_weights_of_the_papers_strides_have_the_same_keys_and_are_of_another_network():
    """pytorchcv's resnet50 loads without a complaint, so its weights must not be offered."""
    theirs = fill(on_meta(pytorchcv_model, "resnet50"))
    theirs.features.final_pool = nn.AdaptiveAvgPool2d(1)
    ours = poison(on_meta(create_model, "resnet50"))
    load_state_dict(ours, theirs.state_dict(), get_spec("resnet50"))
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(ours(x), theirs(x)) > 0.01
    assert get_spec("resnet50").references["pytorchcv"] == "resnet50b"


def test_stages_open_with_the_pool_or_a_stride_and_with_projections_where_shapes_change():
    model = on_meta(create_model, "resnet50")
    assert isinstance(model.stages[0][0], nn.MaxPool2d)
    for index, stage in enumerate(model.stages):
        blocks = [block for block in stage if isinstance(block, Bottleneck)]
        assert len(blocks) == (3, 4, 6, 3)[index]
        strides = [(b.conv1.conv.stride, b.conv2.conv.stride) for b in blocks]
        first = (1, 1) if index == 0 else (2, 2)
        assert strides == [((1, 1), first)] + [((1, 1), (1, 1))] * (len(blocks) - 1)
        identity = [isinstance(block.shortcut, nn.Identity) for block in blocks]
        assert identity == [False] + [True] * (len(blocks) - 1)


# ----------------------------------------------------------------------- initialisation


def test_convolutions_start_as_he_et_al_draw_them():
    """Equation 14 of arXiv 1502.01852 (backward case): variance 2 / (outputs * window)."""
    model = ResNet(depths=(1, 1, 1, 1), bottleneck=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / fan_out) ** 0.5, rel=0.1
            ), name


def test_activations_neither_vanish_nor_explode_at_the_start():
    torch.manual_seed(0)
    features = create_model("resnet18").train().forward_features(images(4, 3, 64, 64))
    assert 0.1 < features.std() < 10
