"""The zoo against timm, torchvision and pytorchcv, independently written: same weights and numbers.

A spec's `references` says which network of which library is the same. Weights are random and every
BatchNorm is shaken; all keys have to be used on both sides. How many were compared stands in the
last line of the test report.
"""

import copy
import gc
import importlib
import types

import pytest
import timm
import torch
import torchvision
from helpers import fill, images, largest, on_meta, poison, relative_error
from pytorchcv.model_provider import get_model as pytorchcv_model
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.weights import convert_state_dict, load_state_dict

#: Variants of more parameters than this are not trained: their layers are their family's, wider.
TRAINED_PARAMS = 20e6
SMALLEST = {}  # parameters, by family
for _spec in map(get_spec, list_models()):
    SMALLEST[_spec.family] = min(_spec.params_train, SMALLEST.get(_spec.family, 1e12))
#: Sums of up to 25 thousand products in float64, in another order.
BOUND = 1e-9
LIBRARIES = {
    "timm": timm.create_model,
    "torchvision": lambda name: torchvision.models.get_model(name, weights=None),
    "pytorchcv": pytorchcv_model,
}
PAIRS = [
    pytest.param(name, library, theirs, id=f"{name}-{library}")
    for name in list_models()
    for library, theirs in get_spec(name).references.items()
]
every_pair = pytest.mark.parametrize(("name", "library", "theirs"), PAIRS)
timm_pairs = pytest.mark.parametrize(
    ("name", "library", "theirs"), [p for p in PAIRS if p.values[1] == "timm"]
)


def create_theirs(library, name):
    model = on_meta(LIBRARIES[library], name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(model, "drop_rate"):
        model.drop_rate = 0.0
    if library == "pytorchcv":  # its pooling is a window of 7, for inputs of 224 alone
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def fused(model):
    """Return the deploy form, faster: sharing what stays, and no block compared on its own."""

    def share(module):
        kept = (*module.parameters(), *module.buffers())
        return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})

    fuse = importlib.import_module("litezoo.models.fuse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "copy", types.SimpleNamespace(deepcopy=share))
        patch.setattr(fuse, "_relative_error", lambda _block, _deploy: 0.0)
        return fuse.fuse(model)


@torch.inference_mode()
def run_with_maps(model, modules, x):
    """Return the outputs of these modules, in their order, and the logits."""
    taken = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, y, name=name: taken.__setitem__(name, y.clone())
        )
        for name in modules
    ]
    logits = model(x)
    for hook in hooks:
        hook.remove()
    return [taken[name] for name in modules if name in taken], logits


@every_pair
def test_weights_of_the_other_library_give_its_numbers(name, library, theirs, record_property):
    """Logits, feature maps, fused form; loss, gradients and statistics of a training step against
    the first library (but of the widest variants, whose layers are those of the others).

    In float64, in which equal networks differ by next to nothing: float32 rounding is amplified
    without limit by dozens of shaken BatchNorms.
    """
    spec = get_spec(name)
    reference = fill(create_theirs(library, theirs).double())
    state_dict = reference.state_dict()
    ours = poison(on_meta(create_model, name).double())
    converted = convert_state_dict(state_dict, spec, ours.state_dict())
    assert converted.keys() == ours.state_dict().keys() and len(converted) == len(state_dict)
    assert load_state_dict(ours, state_dict, spec) == ()
    assert all(v.sum().isfinite() for v in ours.state_dict().values())
    check_outputs(reference, ours, library, spec)
    first = next(iter(spec.references))
    if library == first and spec.params_train <= max(TRAINED_PARAMS, SMALLEST[spec.family]):
        check_training_step(reference.train(), ours.train(), spec)
    record_property("parity", (name, library))
    del reference, state_dict, converted, ours
    gc.collect()


def check_outputs(reference, ours, library, spec):
    x = images(1, 3, 64, 64, dtype=torch.float64)
    modules = (
        [info["module"] for info in reference.feature_info]
        if library == "timm"
        else [name for name, _ in reference.named_modules() if name]
    )
    expected, logits = run_with_maps(reference, modules, x)
    assert 1e-6 < largest(logits) < 1e20, "neither dead nor exploded"
    if library != "timm":  # some activations are functions, whose outputs no module has
        expected += [m.relu() for m in expected]
    info = [entry["module"] for entry in ours.feature_info]
    for model in (ours,) if "fuse" in spec.exempt else (ours, fused(ours)):
        maps, mine = run_with_maps(model, info, x)
        assert relative_error(mine, logits) <= BOUND
        if library == "timm":
            assert len(maps) == len(expected)
            assert all(relative_error(a, b) <= BOUND for a, b in zip(maps, expected, strict=True))
        else:
            for mine in maps:
                same = [m for m in expected if m.shape == mine.shape]
                assert min(relative_error(mine, m) for m in same) <= BOUND


def check_training_step(reference, ours, spec):
    x, target = images(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 999])
    losses = [F.cross_entropy(model(x), target) for model in (ours, reference)]
    assert relative_error(*losses) <= BOUND
    for loss in losses:
        loss.backward()
    as_state = {**reference.state_dict(), **{k: p.grad for k, p in reference.named_parameters()}}
    expected = convert_state_dict(as_state, spec, ours.state_dict())
    actual = {**ours.state_dict(), **{k: p.grad for k, p in ours.named_parameters()}}
    # a bias in front of a BatchNorm has a gradient that is zero but for rounding
    least = 1e-4 * max(largest(p.grad) for p in ours.parameters())
    for key, value in expected.items():
        assert largest(actual[key] - value) <= 1e-8 * max(largest(value), least), key


@timm_pairs
def test_feature_extractors_have_the_channels_and_strides_of_timm(name, library, theirs):
    reference = on_meta(timm.create_model, theirs, features_only=True).feature_info
    ours = on_meta(create_model, name, features_only=True).feature_info
    assert ours.channels() == reference.channels()
    assert ours.reduction() == reference.reduction()
