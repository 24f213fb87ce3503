"""MobileNetV2 beyond what parity shows: Figure 4d, widths, other repositories' layouts."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse
from litezoo.models.mobilenetv2 import InvertedResidual
from litezoo.models.weights import convert_state_dict, load_state_dict, read_checkpoint

MOBILENETV2 = list_models("mobilenetv2_*")


def norm(x, bn):
    """BatchNorm in eval mode, in words: (x - mean) / sqrt(var + 1e-5) * gamma + beta."""
    mean, var, gamma, beta = (
        v[:, None, None] for v in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * gamma + beta


def awake(block):
    """Give a block weights and inputs that reach every bend of its activations."""
    torch.manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return shake(block).double().eval()


def mix(x, layer):
    return torch.einsum("nchw,kc->nkhw", x, layer.conv.weight[:, :, 0, 0])


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "expansion", "stride", "added"),
    [(8, 8, 6, 1, True), (8, 12, 6, 1, False), (8, 8, 6, 2, False), (8, 8, 1, 1, True)],
)
@torch.no_grad()
def test_a_block_is_figure_4d_with_a_linear_end(
    in_channels, out_channels, expansion, stride, added
):
    block = awake(InvertedResidual(in_channels, out_channels, expansion=expansion, stride=stride))
    x = 9 * images(2, in_channels, 7, 9, dtype=torch.float64)
    wide = x
    if expansion > 1:
        wide = norm(mix(x, block.expand), block.expand.bn).clamp(0, 6)
    assert wide.shape[1] == expansion * in_channels
    kernels = block.depthwise.conv.weight
    filtered = F.conv2d(wide, kernels, stride=stride, padding=1, groups=len(kernels))
    seen = norm(filtered, block.depthwise.bn).clamp(0, 6)
    assert {0.0, 6.0} <= set(seen.unique().tolist()), "both bends of ReLU6 are reached"
    expected = norm(mix(seen, block.project), block.project.bn)
    assert expected.min() < 0, "nothing is cut off at the end"
    if added:
        expected = expected + x
    assert relative_error(block(x), expected) <= 1e-12
    assert relative_error(fuse(block)(x), expected) <= 1e-12


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("mobilenetv2_035", [16, 8, 8, 16, 24, 32, 56, 112, 1280]),
        ("mobilenetv2_050", [16, 8, 16, 16, 32, 48, 80, 160, 1280]),
        ("mobilenetv2_075", [24, 16, 24, 24, 48, 72, 120, 240, 1280]),
        ("mobilenetv2_100", [32, 16, 24, 32, 64, 96, 160, 320, 1280]),
        ("mobilenetv2_140", [48, 24, 32, 48, 88, 136, 224, 448, 1792]),
    ],
)
def test_widths_are_multiples_of_8_and_the_last_never_shrinks(name, widths):
    model = on_meta(create_model, name)
    ends = [stage[-1].project for stage in model.stages]
    assert [layer.conv.out_channels for layer in (model.stem, *ends, model.final)] == widths


@pytest.mark.parametrize("name", MOBILENETV2)
def test_ten_of_the_17_blocks_have_a_residual(name):
    """Only blocks inside a stage: a first block either changes the width or has stride 2."""
    model = on_meta(create_model, name)
    added = [[block.has_residual for block in stage] for stage in model.stages]
    assert [len(stage) for stage in added] == [1, 2, 3, 4, 3, 3, 1]
    assert all(stage == [False] + [True] * (len(stage) - 1) for stage in added)


@pytest.mark.parametrize("name", MOBILENETV2)
def test_every_activation_is_relu6_and_projections_have_none(name):
    model = on_meta(create_model, name)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Conv2d) == 52 and kinds.count(nn.ReLU6) == 52 - 17
    assert nn.ReLU not in kinds


# ----------------------------------------------------------------------- other repositories' keys

FIRST = [0, 1, 3, 6, 10, 13, 16]  # the number, from 0, of each stage's first block


def d_li14_key(key):
    """Return our key as d-li14/mobilenetv2.pytorch spells it: sequences of conv, BN, ReLU6."""
    parts = key.split(".")
    leaf = parts[-1]
    if parts[0] == "head":
        return f"classifier.{leaf}"
    step = {"conv": 0, "bn": 1}[parts[-2]]
    if parts[0] == "stem":
        return f"features.0.{step}.{leaf}"
    if parts[0] == "final":
        return f"conv.{step}.{leaf}"
    stage, block, part = int(parts[1]), int(parts[2]), parts[3]
    before = ["depthwise", "project"] if stage == 0 else ["expand", "depthwise", "project"]
    return f"features.{1 + FIRST[stage] + block}.conv.{3 * before.index(part) + step}.{leaf}"


def openmmlab_key(key):
    """Return our key as mmpretrain spells it: ConvModules in "layer1" to "layer7"."""
    parts = key.split(".")
    if parts[0] == "head":
        return key
    if parts[0] in ("stem", "final"):
        return ".".join(["backbone", {"stem": "conv1", "final": "conv2"}[parts[0]], *parts[1:]])
    stage, part = int(parts[1]), parts[3]
    before = ["depthwise", "project"] if stage == 0 else ["expand", "depthwise", "project"]
    place = ["backbone", f"layer{stage + 1}", parts[2], "conv", str(before.index(part))]
    return ".".join(place + parts[4:])


@pytest.mark.parametrize(
    ("spell", "keys"),
    [
        (
            d_li14_key,
            (
                "features.0.0.weight",
                "features.1.conv.3.weight",
                "features.1.conv.4.running_var",
                "features.17.conv.6.weight",
                "features.17.conv.7.bias",
                "conv.0.weight",
                "conv.1.running_mean",
                "classifier.bias",
            ),
        ),
        (
            openmmlab_key,
            (
                "backbone.conv1.conv.weight",
                "backbone.layer1.0.conv.0.conv.weight",
                "backbone.layer1.0.conv.1.bn.bias",
                "backbone.layer4.3.conv.2.bn.running_var",
                "backbone.layer7.0.conv.1.conv.weight",
                "backbone.conv2.bn.weight",
                "head.fc.weight",
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", MOBILENETV2)
def test_every_key_of_other_repositories_has_one_partner(name, spell, keys):
    ours = on_meta(create_model, name).state_dict()
    theirs = {spell(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(key in theirs for key in keys)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


def test_weights_of_another_network_are_refused_in_words():
    """Numbers of blocks that there are not must not end in a KeyError."""
    ours = on_meta(create_model, "mobilenetv2_100")
    theirs = {f"features.{i}.conv.0.weight": torch.zeros(1) for i in range(40)}
    with pytest.raises(UsageError, match="not of mobilenetv2_100"):
        convert_state_dict(theirs, get_spec("mobilenetv2_100"), ours.state_dict())


def test_a_checkpoint_of_d_li14_loads_from_a_file(tmp_path):
    trained = fill(on_meta(create_model, "mobilenetv2_035"))
    state = {d_li14_key(k): v for k, v in trained.state_dict().items()}
    torch.save(state, tmp_path / "mobilenetv2_0.35.pth")
    loaded = poison(on_meta(create_model, "mobilenetv2_035"))
    read = read_checkpoint(tmp_path / "mobilenetv2_0.35.pth").state_dict
    assert load_state_dict(loaded, read, get_spec("mobilenetv2_035")) == ()
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))
