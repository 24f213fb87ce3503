"""VGG beyond parity: its head, what fusing makes of it, and the other layouts.

All but the layouts with narrow networks: the real head has 120 million weights.
"""

import copy

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from pytorchcv.models.vgg import VGG as PytorchcvVGG
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse
from litezoo.models.vgg import VGG, VGGHead
from litezoo.models.weights import convert_state_dict

#: Float32 sums of up to a thousand products, in another order.
BOUND = 1e-5


def narrow(batch_norm=True, *, hidden_size=24, classes=10, **options):
    torch.manual_seed(0)
    model = VGG(
        batch_norm=batch_norm,
        widths=(4, 6, 8, 10, 12),
        hidden_size=hidden_size,
        num_classes=classes,
        **options,
    )
    for layer in model.modules():  # else a narrow network's output is that of its biases
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return shake(model).eval()


# ----------------------------------------------------------------------- the fused network


@torch.inference_mode()
def test_fused_the_bn_variant_is_the_plain_one():
    """The deploy form's keys are vgg16's, and so is what it computes."""
    model, plain = narrow(), poison(narrow(batch_norm=False))
    deploy = fuse(model)
    plain.load_state_dict(deploy.state_dict(), strict=True)
    x = images(2, 3, 64, 96)
    assert torch.equal(plain(x), deploy(x))
    assert relative_error(plain(x), model(x)) <= BOUND


def test_a_bias_in_front_of_a_norm_is_folded():
    layer = copy.deepcopy(narrow().stem[0])
    nn.init.normal_(layer.conv.bias)
    x = images(1, 3, 5, 5)
    with torch.inference_mode():
        y = F.conv2d(x, layer.conv.weight, padding=1) + layer.conv.bias[:, None, None]
        scale = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
        y = (y - layer.bn.running_mean[:, None, None]) * scale[:, None, None]
        y = F.relu(y + layer.bn.bias[:, None, None])
        assert relative_error(layer.fused()(x), y) <= BOUND


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_there_are_13_convolutions_of_3x3_in_five_stages(name):
    """Column D of Table 1."""
    model = on_meta(create_model, name)
    stages = [model.stem, *model.stages]
    convs = [[m for m in stage.modules() if isinstance(m, nn.Conv2d)] for stage in stages]
    assert [[c.out_channels for c in stage] for stage in convs] == [
        [64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3,
    ]  # fmt: skip
    assert all(c.kernel_size == (3, 3) and c.bias is not None for s in convs for c in s)


# ----------------------------------------------------------------------- the head


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (2, 3), (8, 10), (14, 14)])
@torch.inference_mode()
def test_the_head_reads_a_map_of_7x7_whatever_the_size(size):
    head = narrow().head
    x = images(2, 12, *size)
    y = x if size == (7, 7) else F.adaptive_avg_pool2d(x, (7, 7))
    y = y.reshape(2, 12 * 49)
    y = F.relu(F.linear(y, head.neck.fc1.weight, head.neck.fc1.bias))
    y = F.relu(F.linear(y, head.neck.fc2.weight, head.neck.fc2.bias))
    assert relative_error(head(x, pre_logits=True), y) <= BOUND
    assert relative_error(head(x), F.linear(y, head.fc.weight, head.fc.bias)) <= BOUND


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("max", lambda x: F.adaptive_max_pool2d(x, 7)),
        ("fastmax", lambda x: F.adaptive_max_pool2d(x, 7)),
        ("fast", lambda x: F.adaptive_avg_pool2d(x, 7)),
        ("avgmax", lambda x: (F.adaptive_avg_pool2d(x, 7) + F.adaptive_max_pool2d(x, 7)) / 2),
    ],
)
@torch.inference_mode()
def test_other_poolings_leave_7x7_too(pool, expected):
    head = narrow(global_pool=pool).head
    x = images(2, 12, 9, 14)
    assert relative_error(head.global_pool(x), expected(x)) <= BOUND
    assert head(x).shape == (2, 10)


def test_a_pooling_that_doubles_the_channels_is_refused():
    with pytest.raises(UsageError, match="doubles the channels"):
        narrow(global_pool="catavgmax")


@torch.inference_mode()
def test_without_pooling_the_hidden_layers_go_and_come_back_new():
    model = narrow().to(torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    x = images(2, 3, 64, 96, dtype=torch.bfloat16)
    model.reset_classifier(0, "")
    assert list(model.head.parameters()) == [] and model.head_hidden_size == 12
    assert model(x).shape == (2, 12, 2, 3)
    model.reset_classifier(10, "avg")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(x).shape == (2, 10) and model.head_hidden_size == 24
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())


@torch.inference_mode()
def test_a_new_classifier_keeps_the_hidden_layers():
    """What they learned on ImageNet (the 4096 features) is what VGG is transferred for."""
    model = narrow()
    kept = copy.deepcopy(model.head.neck.state_dict())
    for pool in (None, "max"):
        model.reset_classifier(3, pool)
        assert all(torch.equal(v, kept[k]) for k, v in model.head.neck.state_dict().items())
        assert model(images(1, 3, 32, 32)).shape == (1, 3)


def test_dropout_is_behind_both_hidden_layers():
    head = VGGHead(2, hidden_size=5000, num_classes=3, global_pool="avg", drop_rate=0.25).train()
    read = []
    for layer in (head.neck.fc1, head.neck.fc2, head.fc):
        nn.init.constant_(layer.weight, 1.0)
        layer.register_forward_hook(lambda _m, inputs, _y: read.append(inputs[0]))
    head(torch.ones(1, 2, 7, 7))
    dropped = [float((x == 0).float().mean()) for x in read]
    assert dropped[0] == 0 and dropped[1:] == pytest.approx([0.25, 0.25], abs=0.03)


# ----------------------------------------------------------------------- training


@pytest.mark.parametrize("batch_norm", [False, True])
def test_grad_checkpointing_gives_the_same_gradients(batch_norm):
    """It saves too little for the contract's test, but what it gives is right."""
    plain = narrow(batch_norm).double().train()
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    saved = []
    for model in (plain, frugal):
        saved.append(0)

        def count(tensor):
            saved[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(images(2, 3, 64, 64, dtype=torch.float64)).square().mean()
        loss.backward()
    theirs = dict(frugal.named_parameters())
    assert all(torch.equal(p.grad, theirs[k].grad) for k, p in plain.named_parameters())
    assert saved[1] < saved[0]


def test_weights_start_with_torchvisions_deviations():
    model = VGG(batch_norm=False, widths=(16,) * 5, hidden_size=128)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (16 * 9)) ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.15), name
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05), name
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert not layer.bias.any(), name


# ----------------------------------------------------------------------- layouts


def openmmlab_key(key):
    """Return our key as mmpretrain spells it, written without looking at KEY_LAYOUTS."""
    head = {"head.neck.fc1": "0", "head.neck.fc2": "3", "head.fc": "6"}
    module, what = key.rsplit(".", 1)
    if module in head:
        return f"backbone.classifier.{head[module]}.{what}"
    place, kind = module.rsplit(".", 1)
    # 2, 2, 3, 3, 3 convolution modules, a max-pool behind each group, counted through
    first = {"stem": 0, "stages.0": 3, "stages.1": 6, "stages.2": 10, "stages.3": 14}
    stage, layer = place.rsplit(".", 1)
    number = first[stage] + int(layer) - (stage != "stem")
    return f"backbone.features.{number}.{kind}.{what}"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "vgg16",
            (
                "backbone.features.0.conv.weight",
                "backbone.features.3.conv.bias",
                "backbone.features.16.conv.weight",
                "backbone.classifier.0.weight",
                "backbone.classifier.6.bias",
            ),
        ),
        (
            "vgg16_bn",
            (
                "backbone.features.1.bn.running_mean",
                "backbone.features.10.conv.weight",
                "backbone.features.14.bn.weight",
                "backbone.classifier.3.weight",
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


@pytest.mark.parametrize(("name", "batch_norm"), [("vgg16", False), ("vgg16_bn", True)])
@torch.inference_mode()
def test_weights_of_pytorchcv_give_its_logits_and_feature_maps(name, batch_norm):
    """At 224, the one size its head takes; not its bn_vgg16, whose convolutions have no bias."""
    widths, depths = (4, 4, 8, 8, 8), (2, 2, 3, 3, 3)
    with torch.device("meta"):
        theirs = PytorchcvVGG(
            [[width] * depth for width, depth in zip(widths, depths, strict=True)],
            use_bn=batch_norm,
            num_classes=10,
        )
        ours = VGG(batch_norm=batch_norm, widths=widths, num_classes=10)
    fill(theirs.eval())
    state_dict = theirs.state_dict()
    converted = convert_state_dict(state_dict, get_spec(name), ours.state_dict())
    assert len(converted) == len(state_dict)
    poison(ours.eval()).load_state_dict(converted, strict=True)
    maps = []
    for info in ours.feature_info:
        ours.get_submodule(info["module"]).register_forward_hook(
            lambda _m, _i, y: maps.append(y.clone())
        )
    x = images(1, 3, 224, 224)
    assert relative_error(ours(x), theirs(x)) <= BOUND
    y = x
    for stage, mine in zip(theirs.features, maps[:5], strict=True):
        for layer in list(stage)[:-1]:
            y = layer(y)
        assert relative_error(mine, y) <= BOUND
        y = stage[-1](y)
    assert relative_error(maps[5], y) <= BOUND
