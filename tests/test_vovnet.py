"""VoVNet beyond what timm has: the official networks written out again, and the algebra of OSA.

`official_logits` is the equations of stigma0617/VoVNet.pytorch and youngwanLEE/vovnet-detectron2 in
functional calls on a state dict with those repositories' keys; it shares no code with the zoo.
"""

import itertools
import math
from functools import cache

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vovnet import VovNet as TimmVovNet
from timm.models.vovnet import model_cfgs as timm_configurations
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import FusableBlock, fuse
from litezoo.models.vovnet import (
    OSA,
    CeilMaxPool,
    EffectiveSqueezeExcite,
    SeparableConvBN,
    VoVNet,
)
from litezoo.models.weights import convert_state_dict, load_state_dict

VOVNET = [name for name in list_models("*vovnet*") if get_spec(name).family == "vovnet"]
every_variant = pytest.mark.parametrize("name", VOVNET)
checked = settings(max_examples=25, deadline=None, derandomize=True, database=None)
#: Float64 arithmetic in another order, through up to a hundred layers.
ROUNDING = 1e-10


# ----------------------------------------------------------------------- the official equations


def conv_bn_relu(state, conv, norm, x, *, stride=1):
    weight = state[f"{conv}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    return F.relu(
        F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"], False, 0.1, 1e-5)
    )


def official_conv(state, place, x, *, stride=1):
    """A "conv" with its "norm", or a "dw_conv3x3" and a "pw_conv1x1" with one "pw_norm"."""
    if f"{place}/conv.weight" in state:
        return conv_bn_relu(state, f"{place}/conv", f"{place}/norm", x, stride=stride)
    x = F.conv2d(x, state[f"{place}/dw_conv3x3.weight"], None, stride, 1, 1, x.shape[1])
    return conv_bn_relu(state, f"{place}/pw_conv1x1", f"{place}/pw_norm", x)


def official_module(state, stage, module, x, *, identity):
    name = f"OSA{stage}_{module}"
    place = f"stage{stage}.{name}"
    outputs = [x]
    y = x
    if f"{place}.conv_reduction.{name}_reduction_0/conv.weight" in state:
        y = official_conv(state, f"{place}.conv_reduction.{name}_reduction_0", y)
    for layer in itertools.count():
        conv = f"{place}.layers.{layer}.{name}_{layer}"
        if not any(key.startswith(f"{conv}/") for key in state):
            break
        y = official_conv(state, conv, y)
        outputs.append(y)
    y = official_conv(state, f"{place}.concat.{name}_concat", torch.cat(outputs, 1))
    if f"{place}.ese.fc.weight" in state:
        pooled = F.adaptive_avg_pool2d(y, 1)
        gate = F.conv2d(pooled, state[f"{place}.ese.fc.weight"], state[f"{place}.ese.fc.bias"])
        y = y * (F.relu6(gate + 3.0) / 6.0)
    return y + x if identity else y


@torch.inference_mode()
def official_logits(state, x, *, identity=True):
    x = official_conv(state, "stem.stem_1", x, stride=2)
    x = official_conv(state, "stem.stem_2", x)
    x = official_conv(state, "stem.stem_3", x, stride=2)
    for stage in (2, 3, 4, 5):
        if stage != 2:
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for module in itertools.count(1):
            if not any(key.startswith(f"stage{stage}.OSA{stage}_{module}.") for key in state):
                break
            x = official_module(state, stage, module, x, identity=identity and module > 1)
    return F.linear(x.mean((2, 3)), state["classifier.weight"], state["classifier.bias"])


def official_key(key):
    """Return our key as the official repositories spell it, without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    kind = parts[-1]
    if parts[0] == "head":
        return f"classifier.{kind}"
    layer = parts[-2]
    if parts[-3] == "pointwise":
        layer = {"conv": "pw_conv1x1", "bn": "pw_norm"}[layer]
    else:
        layer = {"bn": "norm", "depthwise": "dw_conv3x3"}.get(layer, layer)
    if parts[0] == "stem":
        return f"stem.stem_{parts[1][-1]}/{layer}.{kind}"
    if parts[:3] == ["stages", "0", "0"]:
        return f"stem.stem_3/{layer}.{kind}"
    stage, module, what = int(parts[1]) + 2, parts[2], parts[3]
    name = f"OSA{stage}_{module}"
    inside = {
        "convs": f"layers.{parts[4]}.{name}_{parts[4]}/{layer}",
        "aggregate": f"concat.{name}_concat/{layer}",
        "reduce": f"conv_reduction.{name}_reduction_0/{layer}",
        "ese": "ese.fc",
    }[what]
    return f"stage{stage}.{name}.{inside}.{kind}"


def narrow(name):
    """A variant at a sixteenth of its widths with random weights, in float64."""
    spec = get_spec(name)
    widths = {
        key: tuple(width // 16 for width in spec.architecture[key])
        for key in ("stem_widths", "mid_widths", "widths")
    }
    model = VoVNet(**{**spec.architecture, **widths}, num_classes=10)
    return shake(model).double().eval()


@every_variant
def test_it_computes_the_official_equations(name):
    """At a size that every downsampling has to round: 65 x 110, 33 x 55, ..., 2 x 3."""
    model = narrow(name)
    x = images(2, 3, 65, 110, dtype=torch.float64)
    state = {official_key(key): value for key, value in model.state_dict().items()}
    expected = official_logits(state, x, identity=get_spec(name).architecture["identity"])
    with torch.inference_mode():
        assert relative_error(model(x), expected) <= ROUNDING


@pytest.mark.parametrize("name", ["vovnetv2_19", "vovnetv2_39"])
def test_official_networks_without_a_partner_are_fused_correctly(name):
    model = narrow(name)
    x = images(2, 3, 65, 110, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(fuse(model)(x), model(x)) <= ROUNDING


def test_the_official_v1_is_not_the_paper_s_though_it_has_the_same_keys():
    official, paper = narrow("vovnet39"), narrow("vovnet39a")
    paper.load_state_dict(official.state_dict(), strict=True)
    x = images(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_error(official(x), paper(x)) > 0.01


# ----------------------------------------------------------------------- where what is


@cache
def on_paper(name):
    """A variant without storage; tests must not change it."""
    return on_meta(create_model, name)


def modules_of_stages(name):
    model = on_paper(name)
    return [[m for m in stage if isinstance(m, OSA)] for stage in model.stages]


@every_variant
def test_identity_is_in_all_modules_but_the_first_of_a_stage_or_nowhere(name):
    """In 27-slim the first module of stage 2 keeps its 128 channels, and still has none."""
    without = name in ("vovnet39a", "vovnet57a")
    for modules in modules_of_stages(name):
        expected = [False] + [not without] * (len(modules) - 1)
        assert [m.identity for m in modules] == expected


def test_the_first_module_of_27_slim_keeps_its_channels_without_an_identity():
    [module] = modules_of_stages("vovnet27_slim")[0]
    assert module.convs[0].in_channels == module.aggregate.conv.out_channels == 128
    assert not module.identity


@every_variant
def test_ese_is_in_every_module_in_the_last_of_a_stage_or_nowhere(name):
    for modules in modules_of_stages(name):
        gated = [m.ese is not None for m in modules]
        if name.startswith("vovnetv2"):
            assert all(gated)
        elif name.startswith("ese_"):
            assert gated == [False] * (len(modules) - 1) + [True]
        else:
            assert not any(gated)


@every_variant
def test_the_name_says_how_many_layers_it_has(name):
    """Convolutions but those that only reduce, a depthwise and its 1x1 counted as one."""
    digits = "".join(c for c in name.removeprefix("vovnetv2") if c.isdigit())
    modules = list(itertools.chain(*modules_of_stages(name)))
    assert 3 + sum(len(m.convs) + 1 for m in modules) == int(digits)


@every_variant
def test_only_the_first_convolution_of_a_depthwise_variant_is_a_dense_3x3(name):
    model = on_paper(name)
    dense = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    if name.endswith("_dw"):
        assert dense[0] is model.stem.conv1.conv and dense[0].groups == 1
        assert all(m.groups == m.in_channels == m.out_channels for m in dense[1:])
    else:
        assert all(m.groups == 1 for m in dense)


@pytest.mark.parametrize("name", ["vovnet27_slim", "ese_vovnet19b_slim_dw"])
def test_weights_start_he_normal_over_the_fan_in(name):
    model = create_model(name)
    assert not model.get_classifier().bias.any()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            fan_in = layer.weight[0].numel()
            assert float(layer.weight.detach().std()) == pytest.approx(
                math.sqrt(2 / fan_in), rel=0.05
            )


# ----------------------------------------------------------------------- one-shot aggregation


@st.composite
def osa_modules(draw, **given):
    """An OSA module with random weights and shaken BatchNorms, float64, eval mode."""
    options = {
        "identity": draw(st.booleans()),
        "squeeze_excite": draw(st.booleans()),
        "depthwise": draw(st.booleans()),
        **given,
    }
    channels = draw(st.integers(1, 6))
    out_channels = channels if options["identity"] else draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 1000)))
    module = OSA(
        channels,
        draw(st.integers(1, 6)),
        out_channels,
        layers=draw(st.integers(1, 4)),
        **options,
    )
    return shake(module).double().eval()


def osa_input(module):
    aggregate = module.aggregate.conv.in_channels
    layers = sum(width_of(conv) for conv in module.convs)
    return images(2, aggregate - layers, 5, 7, dtype=torch.float64)


def width_of(conv):
    last = conv.pointwise if isinstance(conv, SeparableConvBN) else conv
    return last.conv.out_channels


def make_identity(bn):
    """Make a BatchNorm exactly the identity in eval mode."""
    nn.init.zeros_(bn.running_mean)
    nn.init.constant_(bn.running_var, 1 - bn.eps)
    nn.init.ones_(bn.weight)
    nn.init.zeros_(bn.bias)


@checked
@given(osa_modules())
@torch.inference_mode()
def test_a_module_computes_the_official_equations(module):
    x = osa_input(module)
    state = {official_key(f"stages.1.2.{k}"): v for k, v in module.state_dict().items()}
    expected = official_module(state, 3, 2, x, identity=module.identity)
    assert torch.allclose(module(x), expected, ROUNDING, ROUNDING)


@checked
@given(osa_modules())
@torch.inference_mode()
def test_a_fused_module_computes_the_same(module):
    x = osa_input(module)
    deploy = fuse(module)
    assert not any(isinstance(m, (FusableBlock, nn.BatchNorm2d)) for m in deploy.modules())
    assert torch.allclose(deploy(x), module(x), ROUNDING, ROUNDING)


@checked
@given(osa_modules(identity=False, squeeze_excite=False))
@torch.inference_mode()
def test_the_concatenation_is_the_module_s_input_then_its_layers_in_order(module):
    """Each is looked at by an aggregation that lets one of the concatenated maps through."""
    x = osa_input(module)
    layers = [x]
    y = x if module.reduce is None else module.reduce(x)
    for conv in module.convs:
        y = conv(y)
        layers.append(y)
    start = 0
    total = module.aggregate.conv.in_channels
    for expected in layers:
        width = expected.shape[1]
        module.aggregate.conv = nn.Conv2d(total, width, 1, bias=False).double()
        module.aggregate.bn = nn.BatchNorm2d(width).double().eval()
        make_identity(module.aggregate.bn)
        nn.init.zeros_(module.aggregate.conv.weight)
        module.aggregate.conv.weight[range(width), range(start, start + width)] = 1.0
        assert torch.allclose(module(x), expected.relu(), rtol=1e-12, atol=1e-12)
        start += width
    assert start == total, "nothing else is concatenated"


@checked
@given(osa_modules(depthwise=True))
def test_a_depthwise_module_reduces_where_the_width_changes_and_concatenates_the_input(module):
    x = osa_input(module)
    mid = width_of(module.convs[0])
    assert (module.reduce is None) == (x.shape[1] == mid)
    assert module.aggregate.conv.in_channels == x.shape[1] + len(module.convs) * mid


@checked
@given(osa_modules(depthwise=False))
def test_a_dense_module_never_reduces(module):
    assert module.reduce is None
    assert module.convs[0].in_channels == osa_input(module).shape[1]


@checked
@given(osa_modules(squeeze_excite=True))
@torch.inference_mode()
def test_a_closed_gate_leaves_the_identity_and_an_open_one_everything(module):
    """The gate is behind the aggregation and before the sum, or it would close the identity too."""
    x = osa_input(module)
    nn.init.constant_(module.ese.fc.weight, 0)
    nn.init.constant_(module.ese.fc.bias, -3)
    closed = module(x)
    assert torch.equal(closed, x if module.identity else torch.zeros_like(closed))
    nn.init.constant_(module.ese.fc.bias, 3)
    opened = module(x)
    module.ese = None
    assert torch.equal(opened, module(x))


@checked
@given(osa_modules(identity=True))
@torch.inference_mode()
def test_the_identity_adds_the_module_s_own_input_behind_the_last_relu(module):
    x = osa_input(module)
    whole = module(x)
    module.identity = False
    assert torch.equal(whole, x + module(x))
    assert (module(x) >= 0).all(), "the last activation comes before the sum"


@checked
@given(st.integers(1, 8), st.integers(0, 1000))
@torch.inference_mode()
def test_effective_squeeze_excite_gates_each_channel_by_all_means(channels, seed):
    torch.manual_seed(seed)
    gate = EffectiveSqueezeExcite(channels).double()
    x = images(2, channels, 3, 5, seed=seed, dtype=torch.float64)
    weight, bias = gate.fc.weight[:, :, 0, 0], gate.fc.bias
    for image in range(2):
        means = torch.stack([x[image, c].sum() / 15 for c in range(channels)])
        scale = ((weight @ means + bias + 3) / 6).clamp(0, 1)
        assert torch.allclose(gate(x)[image], scale[:, None, None] * x[image], rtol=1e-12)


# ----------------------------------------------------------------------- pooling that rounds up


@checked
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_pooling_takes_the_largest_of_each_window_of_three_every_two(height, width, seed):
    x = images(2, 3, height, width, seed=seed)
    y = CeilMaxPool()(x)
    assert y.shape == (2, 3, max(1, height // 2), max(1, width // 2))
    for i, j in itertools.product(range(y.shape[2]), range(y.shape[3])):
        window = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        assert torch.equal(y[:, :, i, j], window.amax((2, 3)))


@checked
@given(st.integers(2, 40), st.integers(2, 40))
def test_pooling_is_the_official_one_wherever_that_takes_the_map(height, width):
    x = images(1, 2, height, width)
    assert torch.equal(CeilMaxPool()(x), nn.MaxPool2d(3, 2, ceil_mode=True)(x))


def test_a_map_of_one_pixel_survives_where_the_official_pooling_stops():
    pixel = images(2, 4, 1, 1)
    assert torch.equal(CeilMaxPool()(pixel), pixel)
    with pytest.raises(RuntimeError, match="too small"):
        nn.MaxPool2d(3, 2, ceil_mode=True)(pixel)


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((224, 224), [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]),
        ((33, 47), [(17, 24), (9, 12), (4, 6), (2, 3), (1, 1)]),
        ((225, 223), [(113, 112), (57, 56), (28, 28), (14, 14), (7, 7)]),
        ((16, 16), [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]),
        ((1, 70), [(1, 35), (1, 18), (1, 9), (1, 4), (1, 2)]),
        ((1, 1), [(1, 1)] * 5),
    ],
)
@pytest.mark.parametrize("name", ["vovnet39", "ese_vovnet19b_slim_dw"])
def test_convolutions_round_a_side_up_and_poolings_down(name, size, sides):
    net = on_meta(create_model, name, features_only=True)
    maps = net(torch.empty(1, 3, *size, device="meta"))
    assert [tuple(m.shape[2:]) for m in maps] == sides


# ----------------------------------------------------------------------- key layouts


def test_all_but_these_have_a_partner_in_another_library():
    alone = {name for name in VOVNET if not get_spec(name).references}
    official = {"vovnetv2_19", "vovnetv2_39", "vovnetv2_57", "vovnetv2_99"}
    assert alone == {"ese_vovnet19b"} | official


@pytest.mark.parametrize("name", ["ese_vovnet19b", "vovnetv2_19"])
def test_timm_has_the_configuration_of_19_though_not_the_model(name):
    with torch.device("meta"):
        theirs = TimmVovNet(timm_configurations["ese_vovnet19b"])
    theirs = fill(theirs).eval()
    ours = poison(on_meta(create_model, name))
    load_state_dict(ours, theirs.state_dict(), get_spec(name))
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(ours(x), theirs(x)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "vovnet39",
            (
                "stem.stem_1/conv.weight",
                "stem.stem_3/norm.running_mean",
                "stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight",
                "stage5.OSA5_2.layers.4.OSA5_2_4/norm.bias",
                "stage5.OSA5_2.concat.OSA5_2_concat/norm.weight",
                "classifier.bias",
            ),
        ),
        (
            "vovnetv2_99",
            (
                "stage3.OSA3_3.ese.fc.weight",
                "stage4.OSA4_9.layers.0.OSA4_9_0/conv.weight",
                "stage4.OSA4_9.concat.OSA4_9_concat/conv.weight",
            ),
        ),
        (
            "vovnetv2_19_dw",
            (
                "stem.stem_1/norm.weight",
                "stem.stem_2/dw_conv3x3.weight",
                "stem.stem_3/pw_conv1x1.weight",
                "stem.stem_3/pw_norm.running_var",
                "stage2.OSA2_1.conv_reduction.OSA2_1_reduction_0/conv.weight",
                "stage2.OSA2_1.conv_reduction.OSA2_1_reduction_0/norm.bias",
                "stage3.OSA3_1.layers.2.OSA3_1_2/dw_conv3x3.weight",
                "stage5.OSA5_1.layers.2.OSA5_1_2/pw_norm.weight",
                "stage5.OSA5_1.ese.fc.bias",
            ),
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_these_are_keys_of_the_official_repositories(name, keys, prefix):
    ours = on_paper(name).state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    assert all(prefix + key in theirs for key in keys)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert all(converted[key] is ours[key] for key in ours)


@every_variant
def test_every_key_of_the_official_repositories_has_one_partner(name):
    ours = on_paper(name).state_dict()
    theirs = {official_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


@pytest.mark.parametrize("name", ["vovnetv2_19_slim_dw", "vovnetv2_39"])
@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_a_backbone_of_detectron2_loads_without_classifier(name, prefix):
    """Its files have detectron2's prefix; FrozenBatchNorm2d counts no batches."""
    backbone = on_meta(create_model, name, num_classes=0)
    ours = backbone.state_dict()
    theirs = {
        prefix + official_key(key): value
        for key, value in ours.items()
        if not key.endswith("num_batches_tracked")
    }
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert all(converted[key] is ours[key] for key in ours if "num_batches" not in key)
    assert len(converted) == len(theirs)


@pytest.mark.parametrize(
    ("given_to", "of"), [("vovnetv2_39", "ese_vovnet39b"), ("ese_vovnet39b", "vovnetv2_39")]
)
def test_weights_with_ese_elsewhere_are_refused(given_to, of):
    with pytest.raises(UsageError, match=f"not of {given_to}"):
        convert_state_dict(
            on_paper(of).state_dict(),
            get_spec(given_to),
            on_paper(given_to).state_dict(),
        )
