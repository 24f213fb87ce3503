"""The contract: what every member of the zoo does, whatever its family.

An exemption is an entry of the spec's `exempt`, {duty: reason}; the duties are in `DUTIES`. Numbers
are computed for the smallest member of each family, shapes and counts (on the meta device) for all.
"""

import copy
import io
from functools import cache

import pytest
import torch
from helpers import images, narrow, relative_error, settle, shallow
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.classifier import ImageClassifier, NeckHead
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse, graph_form

DUTIES = {
    "fuse": "has a deploy form",
    "counts": "has exactly the parameters and multiply-accumulates of its spec",
    "paper_counts": "has the parameters and multiply-accumulates that the paper prints",
    "channels": "can be built for any number of input channels",
    "sizes": "takes inputs of any size",
    "features": "gives its feature maps",
    "grad_checkpointing": "can recompute instead of store in training",
    "layer_groups": "sorts its parameters into layers",
}
NAMES = list_models()


def smallest_of_each_family():
    chosen = {}
    for spec in map(get_spec, NAMES):
        if spec.family not in chosen or spec.params_train < chosen[spec.family].params_train:
            chosen[spec.family] = spec
    return [spec.name for spec in chosen.values()]


#: For what can differ from row to row of a family's table.
every_member = pytest.mark.parametrize("name", NAMES)
#: For what a family's code does whatever the row, or what takes time.
small_members = pytest.mark.parametrize("name", smallest_of_each_family())


def duty(name, key):
    """Skip where the spec gives a reason to; a duty that no spec could be exempt of is a typo."""
    assert key in DUTIES
    if key in get_spec(name).exempt:
        pytest.skip(f"{name}: {get_spec(name).exempt[key]}")


def create_on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options).eval()


@cache
def train_form(name):
    """The classifier without storage; tests must not change it."""
    return create_on_meta(name)


@cache
def deploy_form(name):
    return fuse(train_form(name)) if "fuse" not in get_spec(name).exempt else train_form(name)


def create_small(name, **options):
    """Create a network with weights; of a family that is heavy throughout, a narrower one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litezoo.models.create.get_spec", lambda name: narrow(get_spec(name)))
        return create_model(name, **options)


@cache
def small(name):
    """A 10-class network whose output hangs on the image; tests must not change it."""
    torch.manual_seed(0)
    return settle(create_small(name, num_classes=10))


@cache
def shallow_small(name):
    """The same with its blocks once or twice, where every further one takes time, no more."""
    torch.manual_seed(0)
    return settle(shallow(get_spec(name)).build(num_classes=10))


@cache
def small_forms(name):
    """The same network in train and in deploy form, in float64: in float32 rounding would show."""
    model = copy.deepcopy(small(name)).double()
    return model, fuse(model)


#: The deploy form of the others is run where its multiply-accumulates are counted.
every_form = pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, train_form) for name in NAMES),
        *((name, deploy_form) for name in smallest_of_each_family()),
    ],
)


def blank(*shape):
    return torch.empty(*shape, device="meta")


@torch.inference_mode()
def shape(module, *size):
    """Return the shape of a module's output for an input of this size, on the meta device."""
    return module(blank(*size)).shape


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------- the catalogue


def test_names_are_unique_and_found_by_pattern():
    assert len(set(NAMES)) == len(NAMES)
    assert list_models("repvgg_b?g4") == ["repvgg_b1g4", "repvgg_b2g4", "repvgg_b3g4"]
    assert list_models("nothing*") == []
    assert set(list_models(pretrained=True)) == {n for n in NAMES if get_spec(n).is_pretrained}


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="unknown model 'repvgg_a00'; did you mean 'repvgg_a0'"):
        create_model("repvgg_a00")


@every_member
def test_every_exemption_is_a_known_duty_and_has_a_reason(name):
    for key, reason in get_spec(name).exempt.items():
        assert key in DUTIES, f"{name} is exempt of {key!r}; known duties: {', '.join(DUTIES)}"
        assert len(reason.split()) >= 3, f"{name}: {key}: {reason!r} is no reason"


@every_member
def test_every_claim_has_a_source(name):
    spec = get_spec(name)
    assert spec.paper.startswith("https://")
    claims = (spec.paper_params_m, spec.paper_macs_m, spec.paper_top1_percent)
    assert spec.paper_source or not any(claims)
    assert len({w.tag for w in spec.weights}) == len(spec.weights)
    for weights in spec.weights:
        assert weights.licence
        if weights.top1_percent is not None:
            assert 0 < weights.top1_percent < 100 and weights.top1_source


# ----------------------------------------------------------------------- counts


@every_member
def test_parameters_are_those_of_the_spec(name):
    duty(name, "counts")
    spec = get_spec(name)
    assert graph_form(train_form(name)) == "train" or "fuse" in spec.exempt
    assert parameters(train_form(name)) == spec.params_train
    assert parameters(deploy_form(name)) == spec.params_deploy


@every_member
def test_multiply_accumulates_are_those_of_the_spec(name):
    duty(name, "counts")
    spec = get_spec(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deploy_form(name)(blank(1, 3, spec.resolution, spec.resolution))
    assert counter.get_total_flops() / 2e6 == pytest.approx(spec.macs_m, abs=0.1)


@every_member
def test_counts_are_close_to_those_of_the_paper(name):
    """The papers round, to three digits at worst."""
    duty(name, "paper_counts")
    spec = get_spec(name)
    if spec.paper_params_m is not None:
        assert spec.params_deploy / 1e6 == pytest.approx(spec.paper_params_m, rel=0.01)
    if spec.paper_macs_m is not None:
        assert spec.macs_m == pytest.approx(spec.paper_macs_m, rel=0.05)


# ----------------------------------------------------------------------- head and shapes


@every_form
def test_logits_come_from_the_parts_it_says(name, form):
    model = form(name)
    assert isinstance(model, ImageClassifier)
    assert model.num_classes == 1000 and model.in_chans == 3
    features = shape(model.forward_features, 2, 3, 32, 32)
    assert features[:2] == (2, model.num_features)
    assert shape(model.forward_head, *features) == (2, 1000)
    pooled = model.forward_head(blank(*features), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    classifier = model.get_classifier()
    assert (classifier.in_features, classifier.out_features) == (model.head_hidden_size, 1000)


@small_members
def test_the_parts_give_what_the_whole_gives(name):
    model = small(name)
    x = images(2, 3, 64, 64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    if not isinstance(model.head, NeckHead):
        assert relative_error(pooled, features.mean((2, 3))) <= 1e-5
    assert torch.equal(model(x), model.forward_head(features))
    assert torch.equal(model(x), model.get_classifier()(pooled))


@small_members
def test_it_has_as_many_classes_as_asked_for(name):
    model = create_on_meta(name, num_classes=7)
    assert model.num_classes == 7 and model.get_classifier().out_features == 7
    assert shape(model.forward_head, 2, model.num_features, 2, 3) == (2, 7)


@small_members
def test_without_classes_it_gives_pooled_features_or_the_map(name):
    pooled = create_on_meta(name, num_classes=0)
    assert isinstance(pooled.get_classifier(), nn.Identity)
    features = (2, pooled.num_features, 2, 3)
    assert shape(pooled.forward_head, *features) == (2, pooled.head_hidden_size)
    unpooled = create_on_meta(name, num_classes=0, global_pool="")
    assert shape(unpooled.forward_head, *features) == (2, unpooled.head_hidden_size, 2, 3)


@small_members
def test_without_classes_and_pooling_the_output_is_the_last_map(name):
    model = copy.deepcopy(small(name))
    model.reset_classifier(0, "")
    x = images(2, 3, 64, 96)
    features = small(name).forward_features(x)
    neck = model.head.neck if isinstance(model.head, NeckHead) else nn.Identity()
    assert torch.equal(model(x), neck(features))


@small_members
def test_classes_without_pooling_are_refused(name):
    with pytest.raises(UsageError, match=r"global_pool='' keeps the feature map.*num_classes=0"):
        create_on_meta(name, num_classes=10, global_pool="")
    with pytest.raises(UsageError, match="num_classes=0"):
        create_on_meta(name).reset_classifier(10, "")


@pytest.mark.parametrize(
    "pool",
    ["max", "avgmax", "catavgmax"],
)
def test_other_pooling_says_its_width(pool):
    model = create_on_meta("repvgg_a0", global_pool=pool)
    features = model.forward_features(blank(2, 3, 64, 64))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(UsageError, match="average"):
        create_on_meta("repvgg_a0", global_pool="average")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1; give 0"),
        ({"in_chans": 0}, "in_chans is 0; give 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_on_meta("repvgg_a0", **options)


@small_members
@pytest.mark.parametrize("channels", [1, 4])
def test_it_takes_as_many_channels_as_asked_for(name, channels):
    duty(name, "channels")
    model = create_on_meta(name, in_chans=channels)
    assert model.in_chans == channels
    assert (
        shape(model.stem, 2, channels, 32, 32)[:2] == shape(train_form(name).stem, 2, 3, 32, 32)[:2]
    )


@every_member
def test_the_spec_names_every_convolution_that_sees_the_image(name):
    """Else weights for other channels could not be adapted."""
    duty(name, "channels")
    one, three = create_on_meta(name, in_chans=1), train_form(name)
    shapes = {k: p.shape for k, p in one.named_parameters()}
    changed = {k for k, p in three.named_parameters() if p.shape != shapes[k]}
    assert changed == {f"{layer}.weight" for layer in get_spec(name).first_convs}
    for layer in get_spec(name).first_convs:
        assert one.get_submodule(layer).in_channels == 1


@small_members
def test_dropout_is_before_the_classifier_and_in_training_only(name):
    model = create_small(name, num_classes=10, drop_rate=1.0)
    features = images(2, model.num_features, 2, 2)
    bias = model.get_classifier().bias.expand(2, 10)
    assert torch.equal(model.train().forward_head(features), bias)
    assert not torch.equal(model.eval().forward_head(features), bias)
    quiet = create_small(name, num_classes=10).train()
    assert torch.equal(quiet.forward_head(features), quiet.forward_head(features))


@every_form
def test_it_takes_any_input_size(name, form):
    duty(name, "sizes")
    assert shape(form(name), 1, 3, 33, 47) == (1, 1000)


@small_members
def test_fused_model_gives_the_same_output_at_any_size(name):
    duty(name, "fuse")
    model, deploy = small_forms(name)
    for height, width in ((32, 32), (33, 47), (64, 96)):
        x = images(2, 3, height, width, dtype=torch.float64)
        assert relative_error(deploy(x), model(x)) <= 1e-9


# ----------------------------------------------------------------------- reset_classifier


@small_members
def test_the_classifier_can_be_replaced(name):
    model = create_on_meta(name)
    features = (2, model.num_features, 2, 3)
    model.reset_classifier(5)
    assert model.num_classes == 5 and shape(model.forward_head, *features) == (2, 5)
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
    assert shape(model.forward_head, *features) == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert shape(model.forward_head, *features) == (2, model.head_hidden_size, 2, 3)
    model.reset_classifier(3, "avg")
    assert shape(model.forward_head, *features) == (2, 3)
    assert all(p.is_meta for p in model.parameters())


@small_members
def test_a_new_classifier_has_the_dtype_and_mode_of_the_old(name):
    model = create_small(name, num_classes=10).to(torch.bfloat16).eval()
    model.reset_classifier(4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())
    assert model(images(2, 3, 32, 32, dtype=torch.bfloat16)).shape == (2, 4)


@small_members
def test_a_fused_model_can_be_given_a_new_classifier(name):
    duty(name, "fuse")
    deploy = copy.deepcopy(small_forms(name)[1])
    x = images(2, 3, 32, 32, dtype=torch.float64)
    features = deploy.forward_features(x)
    deploy.reset_classifier(4)
    assert torch.equal(deploy.forward_features(x), features)
    assert deploy(x).shape == (2, 4)


# ----------------------------------------------------------------------- features


@every_form
def test_feature_info_is_true(name, form):
    duty(name, "features")
    model = form(name)
    maps = {}
    handles = [
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _inputs, output, key=index: maps.__setitem__(key, output)
        )
        for index, info in enumerate(model.feature_info)
    ]
    shape(model, 2, 3, 64, 128)
    for handle in handles:
        handle.remove()
    for index, info in enumerate(model.feature_info):
        reduction = info["reduction"]
        assert maps[index].shape == (2, info["num_chs"], 64 // reduction, 128 // reduction)
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == sorted(set(reductions)), "one map per reduction, finest first"


def check_feature_maps(name, indices, forms):
    info = train_form(name).feature_info
    wanted = info if indices is None else [info[i] for i in indices]
    expected = [(i["num_chs"], i["reduction"]) for i in wanted]
    for form in forms:
        with torch.inference_mode():
            maps = form(blank(2, 3, 64, 64))
        assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == expected
        assert form.feature_info.channels() == [channels for channels, _ in expected]
        assert form.feature_info.reduction() == [reduction for _, reduction in expected]


@small_members
def test_all_feature_maps_are_given_unless_some_are_asked_for(name):
    duty(name, "features")
    net = create_on_meta(name, features_only=True)
    check_feature_maps(name, None, [net if "fuse" in get_spec(name).exempt else fuse(net)])


@small_members
@pytest.mark.parametrize("indices", [(1, 2), (-1,), (0, -1)])
def test_feature_maps_are_those_asked_for(name, indices):
    duty(name, "features")
    net = create_on_meta(name, features_only=True, out_indices=indices)
    check_feature_maps(name, indices, [net])
    if indices == (0, -1) and "fuse" not in get_spec(name).exempt:
        check_feature_maps(name, indices, [fuse(net)])


def test_feature_maps_out_of_order_are_refused():
    with pytest.raises(UsageError, match="ascending order"):
        create_on_meta("repvgg_a0", features_only=True, out_indices=(-1, 0))


@pytest.mark.parametrize("indices", [(1, 1), (0, -5)])
def test_a_map_asked_for_twice_is_refused(indices):
    with pytest.raises(UsageError, match="each once"):
        create_on_meta("repvgg_a0", features_only=True, out_indices=indices)


@pytest.mark.parametrize("indices", [(5,), (0, 7), (-6,), ()])
def test_feature_maps_that_do_not_exist_are_refused(indices):
    with pytest.raises(UsageError, match=r"repvgg_a0 has feature maps 0 to 4; out_indices is \("):
        create_on_meta("repvgg_a0", features_only=True, out_indices=indices)


def test_out_indices_of_a_classifier_are_refused():
    with pytest.raises(UsageError, match="features_only"):
        create_on_meta("repvgg_a0", out_indices=(0, 1))


@small_members
def test_feature_maps_are_those_of_the_classifier_before_and_after_fusing(name):
    duty(name, "features")
    model = small_forms(name)[0] if "fuse" not in get_spec(name).exempt else small(name)
    dtype = next(model.parameters()).dtype
    net = create_small(name, features_only=True).to(dtype).eval()
    state = {k.replace("stages.", "stages_"): v for k, v in model.state_dict().items()}
    net.load_state_dict({k: state[k] for k in net.state_dict()}, strict=True)
    x = images(2, 3, 64, 96, dtype=dtype)
    taken = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda m, _, y: taken.__setitem__(m, y.clone()))
    model(x)
    expected = [taken[model.get_submodule(i["module"])] for i in model.feature_info]
    for module in taken:
        module._forward_hooks.clear()
    assert all(map(torch.equal, net(x), expected))
    if "fuse" not in get_spec(name).exempt:
        fused = fuse(net)(x)
        assert len(fused) == len(expected)
        assert all(relative_error(a, b) <= 1e-9 for a, b in zip(fused, expected, strict=True))


# ----------------------------------------------------------------------- training


@small_members
def test_grad_checkpointing_gives_the_same_gradients(name):
    duty(name, "grad_checkpointing")
    plain = copy.deepcopy(small(name)).double().train()
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    x = images(4, 3, 64, 64, dtype=torch.float64)
    saved = {}
    for key, model in (("plain", plain), ("frugal", frugal)):
        saved[key] = 0

        def count(tensor, key=key):
            if not (tensor.is_leaf and tensor.requires_grad):  # weights are there anyway
                saved[key] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(x).square().mean()
        loss.backward()
    theirs = dict(frugal.named_parameters())
    assert all(torch.equal(p.grad, theirs[k].grad) for k, p in plain.named_parameters())
    assert saved["frugal"] < saved["plain"] / 2, "nothing was saved"
    frugal.set_grad_checkpointing(False)
    assert not frugal.grad_checkpointing


@small_members
def test_every_parameter_gets_a_gradient(name):
    model = copy.deepcopy(small(name)).train()
    model(images(4, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_member
@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_is_sorted_into_a_layer(name, coarse):
    duty(name, "layer_groups")
    model = train_form(name)
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert layers.keys() == {k for k, _ in model.named_parameters()}
    last = max(layers.values())
    assert set(layers.values()) == set(range(last + 1))
    assert {k for k, layer in layers.items() if layer == last} >= {"head.fc.weight", "head.fc.bias"}
    in_order = [layers[k] for k, _ in model.named_parameters()]
    assert in_order == sorted(in_order), "layers follow the network from input to output"
    if coarse:
        assert last == len(model.stages) + 1
    else:
        assert last > len(model.stages)


@every_member
def test_layer_wise_decay_takes_every_parameter_once(name):
    duty(name, "layer_groups")
    model = train_form(name)
    groups = param_groups_layer_decay(model, layer_decay=0.9)
    taken = [id(p) for group in groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = [scale[id(p)] for p in model.parameters()]
    assert scales == sorted(scales) and scales[0] < scales[-1] == 1.0


# ----------------------------------------------------------------------- copies


@small_members
def test_state_dict_has_the_keys_of_a_second_instance(name):
    first, second = train_form(name).state_dict(), create_on_meta(name).state_dict()
    assert list(first) == list(second)
    assert [v.shape for v in first.values()] == [v.shape for v in second.values()]


@small_members
def test_state_dict_survives_a_round_trip_through_a_file(name):
    model, other = small(name), create_small(name, num_classes=10).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = images(2, 3, 32, 32)
    assert torch.equal(other(x), model(x))


@small_members
def test_a_copy_gives_the_same_output_and_shares_nothing(name):
    model = small(name)
    twin = copy.deepcopy(model)
    x = images(2, 3, 32, 32)
    assert torch.equal(twin(x), model(x))
    theirs = {p.data_ptr() for p in model.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in twin.parameters())
