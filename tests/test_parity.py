"""Our RepVGG against timm's, independently written: the same weights give the same numbers."""

import gc

import pytest
import timm
import torch
from helpers import images, relative_error, shake
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.repvgg import RepVGGBlock
from litezoo.models.weights import convert_state_dict, load_state_dict, read_checkpoint

REPVGG = list_models("repvgg_*")
SHARED = [name for name in REPVGG if timm.is_model(name)]
#: Float32 sums of up to 12 thousand products, in another order.
BOUND = 1e-5


def on_meta(create, name, **options):
    with torch.device("meta"):
        return create(name, **options).eval()


@torch.no_grad()
def fill(model, seed=0):
    """Give a model made on the meta device He-normal weights and shaken BatchNorms.

    Layers are slices of one pool of noise: drawing 123 million numbers would take seconds.
    """
    pool = images(2**24 + 2**21, seed=seed)
    model.to_empty(device="cpu")
    for index, parameter in enumerate(model.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        noise = pool[index * 997 :][: parameter.numel()].view(parameter.shape)
        torch.mul(noise, (2 / fan_in) ** 0.5, out=parameter.data)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return shake(model, seed)


@torch.no_grad()
def poison(model):
    """Give a model made on the meta device NaN everywhere: what is not loaded shows."""
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else -1)
    return model


@torch.inference_mode()
def maps_and_logits(model, x):
    """Return the output of every module of `feature_info`, then the logits."""
    taken = []
    hooks = [
        model.get_submodule(info["module"]).register_forward_hook(lambda m, i, y: taken.append(y))
        for info in model.feature_info
    ]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    return [*taken, logits]


def test_timm_has_the_variants_it_is_known_to_have():
    assert len(SHARED) == 11
    assert set(REPVGG) - set(SHARED) == {"repvgg_b1g2", "repvgg_b2g2", "repvgg_b3g2"}
    assert {n for n in REPVGG if get_spec(n).weights} == set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_every_key_of_timm_has_one_partner(name):
    theirs = on_meta(timm.create_model, name).state_dict()
    ours = on_meta(create_model, name).state_dict()
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys() and len(converted) == len(theirs)
    assert {id(v) for v in converted.values()} == {id(v) for v in theirs.values()}
    assert all(converted[key].shape == ours[key].shape for key in ours)


@pytest.mark.parametrize("name", SHARED)
def test_feature_maps_have_the_channels_and_strides_of_timm(name):
    theirs = on_meta(timm.create_model, name, features_only=True).feature_info
    ours = on_meta(create_model, name, features_only=True).feature_info
    assert ours.channels() == theirs.channels()
    assert ours.reduction() == theirs.reduction()


@pytest.mark.parametrize("name", SHARED)
def test_weights_of_timm_give_its_logits_and_feature_maps(name):
    size = 64 if get_spec(name).resolution > 224 else 32
    x = images(2, 3, size, size)
    theirs = fill(on_meta(timm.create_model, name))
    state_dict = theirs.state_dict()
    with torch.inference_mode():
        final, expected = theirs.forward_intermediates(x)
        expected = [*expected, theirs.forward_head(final)]
    del theirs

    ours = poison(on_meta(create_model, name))
    assert load_state_dict(ours, state_dict, get_spec(name)) == ()
    del state_dict
    assert all(v.sum().isfinite() and v.max() >= 0 for v in ours.state_dict().values())
    actual = maps_and_logits(ours, x)
    assert len(actual) == len(expected) == 6
    for mine, timms in zip(actual, expected, strict=True):
        assert 1e-2 < timms.abs().max() < 1e4, "neither dead nor exploded"
        assert relative_error(mine, timms) <= BOUND

    deploy = fuse(ours)
    del ours
    for mine, timms in zip(maps_and_logits(deploy, x), expected, strict=True):
        assert relative_error(mine, timms) <= BOUND
    del deploy
    gc.collect()


def test_feature_extractors_agree():
    theirs = fill(on_meta(timm.create_model, "repvgg_a0", features_only=True, out_indices=(1, 3)))
    ours = on_meta(create_model, "repvgg_a0", features_only=True, out_indices=(1, 3))
    poison(ours)
    rename = (
        ("stages_", "stages."),
        (".conv_kxk.", ".branch_3x3."),
        (".conv_1x1.", ".branch_1x1."),
        (".identity.", ".branch_identity."),
        ("stages.", "stages_"),
    )
    state = theirs.state_dict()
    for old, new in rename:
        state = {key.replace(old, new): value for key, value in state.items()}
    ours.load_state_dict(state, strict=True)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        for net in (ours, fuse(ours)):
            mine, timms = net(x), theirs(x)
            assert len(mine) == 2
            assert all(relative_error(a, b) <= BOUND for a, b in zip(mine, timms, strict=True))


def test_a_training_step_has_the_loss_gradients_and_statistics_of_timm():
    """In float64: BatchNorm over few values amplifies float32 rounding without limit."""
    spec = get_spec("repvgg_a0")
    theirs = fill(on_meta(timm.create_model, "repvgg_a0")).double().train()
    ours = poison(on_meta(create_model, "repvgg_a0")).double().train()
    load_state_dict(ours, theirs.state_dict(), spec)
    x, target = images(4, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 20, 300, 999])
    losses = [F.cross_entropy(model(x), target) for model in (ours, theirs)]
    assert relative_error(*losses) <= 1e-10
    for loss in losses:
        loss.backward()
    as_state = {**theirs.state_dict(), **{k: p.grad for k, p in theirs.named_parameters()}}
    expected = convert_state_dict(as_state, spec, ours.state_dict())
    actual = {**ours.state_dict(), **{k: p.grad for k, p in ours.named_parameters()}}
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= 1e-8, key


# ----------------------------------------------------------------------- the official layout


def official_key(key):
    """Return our key as DingXiaoH/RepVGG spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[:2] == ["head", "fc"]:
        return f"linear.{parts[2]}"
    if parts[0] == "stem":
        place, rest = ["stage0"], parts[1:]
    else:
        place, rest = [f"stage{int(parts[1]) + 1}", parts[2]], parts[3:]
    words = {
        "branch_3x3": "rbr_dense",
        "branch_1x1": "rbr_1x1",
        "branch_identity": "rbr_identity",
        "fc1": "down",
        "fc2": "up",
    }
    return ".".join(place + [words.get(word, word) for word in rest])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "repvgg_a0",
            (
                "stage0.rbr_dense.conv.weight",
                "stage0.rbr_1x1.bn.running_var",
                "stage1.1.rbr_identity.weight",
                "stage3.13.rbr_dense.bn.bias",
                "stage4.0.rbr_1x1.conv.weight",
                "linear.bias",
            ),
        ),
        (
            "repvgg_d2se",
            (
                "stage0.se.down.weight",
                "stage1.7.se.up.bias",
                "stage3.23.rbr_identity.running_mean",
                "stage4.0.se.up.weight",
                "linear.weight",
            ),
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(name, keys, prefix):
    ours = on_meta(create_model, name).state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(prefix + key in theirs for key in keys)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_an_official_checkpoint_loads_from_a_file(tmp_path, wrapping):
    trained = fill(on_meta(create_model, "repvgg_a0"))
    state = {official_key(k): v for k, v in trained.state_dict().items() if "num_batches" not in k}
    file = tmp_path / "RepVGG-A0-train.pth"
    torch.save(state if wrapping is None else {wrapping: state, "epoch": 119}, file)
    loaded = poison(on_meta(create_model, "repvgg_a0"))
    for key, value in loaded.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
    load_state_dict(loaded, read_checkpoint(file).state_dict, get_spec("repvgg_a0"))
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))


# ----------------------------------------------------------------------- g2 and g4


@pytest.mark.parametrize("name", REPVGG)
def test_layers_of_even_index_2_to_26_are_grouped_and_no_others(name):
    """Section 3.4 of the paper: "the 3rd, 5th, 7th, ..., 27th layer", counted from 1."""
    groups = {"g2": 2, "g4": 4}.get(name[-2:], 1)
    model = on_meta(create_model, name)
    layers = [m for m in model.modules() if isinstance(m, RepVGGBlock)]
    assert layers[0] is model.stem
    for index, layer in enumerate(layers):
        expected = groups if index in range(2, 27, 2) else 1
        convolutions = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
        branches = [m for m in convolutions if m.bias is None]
        assert len(branches) == 2 and {m.groups for m in branches} == {expected}, index


def test_the_variants_without_a_partner_in_timm_are_fused_correctly():
    """The g2 variants: the architecture of b1g2 at a quarter of its widths."""
    spec = get_spec("repvgg_b1g2")
    architecture = {**spec.architecture, "stem_width": 16, "widths": (32, 64, 128, 512)}
    from litezoo.models.repvgg import RepVGG

    with torch.device("meta"):
        model = RepVGG(**architecture).eval()
    fill(model)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(fuse(model)(x), model(x)) <= BOUND
