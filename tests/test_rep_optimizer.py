"""RepOptimizers against the blocks they stand for, the search of scales, and RepVGG's custom L2."""

import copy
import dataclasses
import pickle

import pytest
import torch
import yaml
from helpers import images, in_catalogue, relative_error, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_data import truncate
from test_repoptvgg import ImaginaryBlock, layer_that_starts_as
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.layers import ConvBN
from litezoo.models.qarepvgg import QARepVGG
from litezoo.models.repoptvgg import (
    BlockScales,
    CSLABlock,
    RepOptVGG,
    branch_form,
    prior_scales,
    start_from,
    target_form,
)
from litezoo.models.repvgg import RepVGG, RepVGGBlock
from litezoo.models.weights import read_checkpoint
from litezoo.recipes import trainer
from litezoo.recipes.custom_l2 import custom_l2, decayed_by_custom_l2
from litezoo.recipes.rep_optimizer import (
    RepAdamW,
    RepSGD,
    ScalesOrigin,
    get_scales,
    gradient_multiplier,
    load_scales,
    save_scales,
    scaled_kernels,
)
from litezoo.recipes.scale_search import ScaleSearchModule, search_scales
from litezoo.recipes.trainer import ClassifierModule, OptimizerConfig, train

#: The equality that the paper proves, in double precision.
EXACT = 1e-10

TABLE = {"depths": (1, 2, 2, 1), "stem_width": 6, "widths": (6, 8, 8, 12)}
TINY = dataclasses.replace(
    get_spec("repoptvgg_b1"), name="repoptvgg_tiny", architecture=TABLE, weights=()
)
ORIGIN = ScalesOrigin(
    model="repoptvgg_tiny", data="digits", epochs=3, val_top1_percent=91.25, litezoo_version="0.1.0"
)


#: A RepVGG as narrow.
NARROW = {"depths": (1, 2, 1, 1), "stem_width": 8, "widths": (8, 8, 8, 8)}
NARROW_SPEC = dataclasses.replace(
    get_spec("repvgg_a0"),
    name="repvgg_narrow",
    architecture={**get_spec("repvgg_a0").architecture, **NARROW},
    weights=(),
)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Have the two small models in the catalogue meanwhile."""
    with in_catalogue(TINY, NARROW_SPEC):
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder, so that runs/ lies there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


in_an_empty_folder = pytest.mark.usefixtures("here")


def tiny_net(**changes):
    torch.manual_seed(0)
    return RepOptVGG(**{**TABLE, "num_classes": 5, **changes}).double()


def random_scales(model, seed=0):
    """Scales of both signs, some near 0, that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    return {
        name: BlockScales(
            scale_3x3=draw(its.scale_3x3),
            scale_1x1=draw(its.scale_1x1),
            identity=None if its.identity is None else draw(its.identity),
        )
        for name, its in prior_scales(model).items()
    }


def scales_of(block):
    """The scales of the tests' own imaginary block."""
    identity = None if block.u is None else block.u.detach().flatten()
    return BlockScales(scale_3x3=block.s.flatten(), scale_1x1=block.t.flatten(), identity=identity)


def distance(block, layer):
    return relative_error(layer.conv.weight, block.start())


# ----------------------------------------------------------------------- equality with the block


kinds = pytest.mark.parametrize(
    ("out_channels", "stride"),
    [
        pytest.param(4, 1, id="identity"),
        pytest.param(4, 2, id="stride 2"),
        pytest.param(6, 1, id="wider"),
    ],
)
SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.02},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.02},
    "nesterov and decay": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
}
ADAMW = {
    "default": {},
    "decay": {"weight_decay": 0.1},
    "large eps": {"eps": 1e-2, "weight_decay": 0.1},
    "betas": {"betas": (0.6, 0.95), "eps": 1e-3},
}


def train_both(block, layer, block_optimizer, layer_optimizer, *, steps=40):
    """Train the imaginary block and the layer alike; yield after each step."""
    channels = layer.conv.in_channels
    bn = nn.BatchNorm2d(layer.conv.out_channels).double().train()
    bn.load_state_dict(layer.train().bn.state_dict())
    for step in range(steps):
        x = images(4, channels, 6, 5, seed=step, dtype=torch.float64)
        for optimizer, output in (
            (block_optimizer, torch.relu(bn(block(x)))),
            (layer_optimizer, layer(x)),
        ):
            optimizer.zero_grad()
            wanted = images(*output.shape, seed=step + 1000, dtype=torch.float64)
            (output - wanted).square().sum().backward()
            optimizer.step()
        yield step


def pair(out_channels, stride, seed=3):
    block = ImaginaryBlock(4, out_channels, stride, seed)
    block.s[0], block.t[1] = -block.s[0], 0.0  # the sign is of no matter, and no scale is one too
    return block, layer_that_starts_as(block, seed)


@pytest.mark.parametrize("options", SGD.values(), ids=SGD)
@kinds
def test_a_layer_under_repsgd_is_the_block_under_sgd_at_every_step(out_channels, stride, options):
    block, layer = pair(out_channels, stride)
    start = layer.conv.weight.detach().clone()
    plain = torch.optim.SGD(block.parameters(), lr=0.03, **options)
    scales = {layer.conv.weight: scales_of(block)}
    ours = RepSGD([layer.conv.weight], scales=scales, lr=0.03, **options)
    for _ in train_both(block, layer, plain, ours):
        assert distance(block, layer) <= EXACT
    assert relative_error(layer.conv.weight, start) > 0.01, "it has moved"


@pytest.mark.parametrize("options", ADAMW.values(), ids=ADAMW)
@kinds
def test_a_layer_under_repadamw_is_the_block_under_adamw_at_every_step(
    out_channels, stride, options
):
    block, layer = pair(out_channels, stride)
    start = layer.conv.weight.detach().clone()
    plain = torch.optim.AdamW(block.parameters(), lr=0.01, **{"weight_decay": 0.0, **options})
    scales = {layer.conv.weight: scales_of(block)}
    ours = RepAdamW([layer.conv.weight], scales=scales, lr=0.01, **options)
    for _ in train_both(block, layer, plain, ours):
        assert distance(block, layer) <= EXACT
    assert relative_error(layer.conv.weight, start) > 0.01, "it has moved"


@settings(deadline=None, max_examples=20)
@given(
    out_channels=st.sampled_from([4, 6]),
    stride=st.sampled_from([1, 2]),
    lr=st.floats(1e-4, 0.1),
    momentum=st.floats(0.1, 0.95),
    nesterov=st.booleans(),
    weight_decay=st.floats(0, 0.1),
    seed=st.integers(0, 2**16),
)
def test_the_equality_holds_for_any_setting_of_sgd(out_channels, stride, seed, **options):
    options = {key: options[key] for key in ("lr", "momentum", "nesterov", "weight_decay")}
    block, layer = pair(out_channels, stride, seed)
    plain = torch.optim.SGD(block.parameters(), **options)
    ours = RepSGD([layer.conv.weight], scales={layer.conv.weight: scales_of(block)}, **options)
    for _ in train_both(block, layer, plain, ours, steps=6):
        assert distance(block, layer) <= EXACT


def train_networks(branches, target, branch_optimizer, target_optimizer, *, steps):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64)
        wanted = torch.randint(5, (6,), generator=generator)
        for net, optimizer in ((branches, branch_optimizer), (target, target_optimizer)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), wanted).backward()
            optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_whole_network_under_a_repoptimizer_is_the_network_of_blocks(kind):
    """Weights, BatchNorm's statistics, classifier: after 40 steps of every setting at once."""
    model = tiny_net()
    scales = random_scales(model)
    branches = branch_form(model, scales=scales, trained_scales=False)
    target = target_form(branches)
    begin = copy.deepcopy(target)
    trained = [p for p in branches.parameters() if p.requires_grad]
    kernels = scaled_kernels(target, scales)
    if kind == "sgd":
        options = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        plain, ours = torch.optim.SGD(trained, **options), RepSGD
    else:
        options = {"lr": 0.005, "weight_decay": 0.05, "eps": 1e-6}
        plain, ours = torch.optim.AdamW(trained, **options), RepAdamW
    optimizer = ours(target.parameters(), scales=kernels, **options)
    train_networks(branches, target, plain, optimizer, steps=40)
    wanted, moved = target_form(branches).state_dict(), 0.0
    for key, value in target.state_dict().items():
        assert relative_error(value.double(), wanted[key].double()) <= EXACT, key
        moved += float((value - begin.state_dict()[key]).abs().sum())
    assert moved > 1
    x = images(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(target.eval()(x), branches.eval()(x)) <= EXACT


# ----------------------------------------------------------------------- what is not exact


def test_weight_decay_is_not_multiplied():
    """M (g + w W) instead of M g + w W leaves the block at once: the order is a claim."""
    block, layer = pair(4, 1)
    weight, multiplier = layer.conv.weight, block.gradient_multiplier()
    plain = torch.optim.SGD(block.parameters(), lr=0.03, weight_decay=0.05)
    wrong = torch.optim.SGD([weight], lr=0.03)

    def multiply_both(*_):
        weight.grad.add_(weight.detach(), alpha=0.05).mul_(multiplier)

    wrong.register_step_pre_hook(multiply_both)
    for _ in train_both(block, layer, plain, wrong, steps=1):
        assert distance(block, layer) > 1e-4


def test_multiplying_the_gradient_does_nothing_under_adamw():
    results = {}
    for multiplied in (False, True):
        block, layer = pair(4, 1)
        weight, multiplier = layer.conv.weight, block.gradient_multiplier()
        optimizer = torch.optim.AdamW([weight], lr=0.01, eps=1e-20)
        if multiplied:

            def multiply(*_, weight=weight, by=multiplier):
                weight.grad.mul_(by)

            optimizer.register_step_pre_hook(multiply)
        plain = torch.optim.AdamW(block.parameters(), lr=0.01, eps=1e-20)
        for _ in train_both(block, layer, plain, optimizer, steps=10):
            pass
        results[multiplied] = layer.conv.weight.detach()
        assert distance(block, layer) > 1e-3
    # the network moves, and with it later gradients: only the first steps are alike to rounding
    assert relative_error(results[True], results[False]) < 1e-6


@pytest.mark.parametrize(("eps", "equal"), [(1e-30, True), (1e-2, False)])
def test_the_official_first_powers_are_the_step_without_eps(eps, equal):
    block, layer = pair(4, 1)
    weight, scales = layer.conv.weight, scales_of(block)
    theirs = weight.detach().clone().requires_grad_()
    gradient = torch.randn(weight.shape, dtype=torch.float64)
    weight.grad, theirs.grad = gradient.clone(), gradient.clone()
    before = theirs.detach().clone()
    RepAdamW([weight], scales={weight: scales}, lr=0.01, eps=eps).step()
    torch.optim.AdamW([theirs], lr=0.01, eps=eps, weight_decay=0).step()
    powers = gradient_multiplier(
        BlockScales(
            scale_3x3=scales.scale_3x3.abs().sqrt(),
            scale_1x1=scales.scale_1x1.abs().sqrt(),
            identity=scales.identity,
        ),
        in_channels=4,
    )
    wanted = before + powers * (theirs.detach() - before)
    difference = relative_error(weight - before, wanted - before)
    assert difference <= 1e-9 if equal else difference > 1e-3


# ----------------------------------------------------------------------- the optimizers as such


@kinds
def test_the_multiplier_is_that_of_the_paper_tap_by_tap(out_channels, stride):
    block, _ = pair(out_channels, stride)
    found = gradient_multiplier(scales_of(block), in_channels=4)
    assert relative_error(found, block.gradient_multiplier()) <= 1e-15


def test_repsgd_steps_by_the_multiplied_gradient_and_leaves_the_gradient_alone():
    block, layer = pair(4, 1)
    weight = layer.conv.weight
    before, gradient = weight.detach().clone(), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    weight.grad = gradient.clone()
    optimizer = RepSGD([weight], scales={weight: scales_of(block)}, lr=0.5)
    wanted = before - 0.5 * block.gradient_multiplier() * gradient
    optimizer.step()
    assert relative_error(weight, wanted) <= 1e-14
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_parameters_without_scales_move_as_under_torch(kind):
    ours, theirs = (tiny_net() for _ in range(2))
    if kind == "sgd":
        options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        first = RepSGD(ours.parameters(), scales={}, **options)
        second = torch.optim.SGD(theirs.parameters(), **options)
    else:
        options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-5, "weight_decay": 0.1}
        first = RepAdamW(ours.parameters(), scales={}, **options)
        second = torch.optim.AdamW(theirs.parameters(), **options)
    train_networks(theirs, ours, second, first, steps=5)
    for key, value in ours.state_dict().items():
        assert relative_error(value.double(), theirs.state_dict()[key].double()) <= 1e-11, key


def rep_pair(kind=RepSGD, seed=0):
    model = tiny_net()
    kernels = scaled_kernels(model, random_scales(model, seed))
    options = {"lr": 0.02, "weight_decay": 0.01}
    if kind is RepSGD:
        options["momentum"] = 0.9
    return model, kind(model.parameters(), scales=kernels, **options)


def one_step(model, optimizer, seed):
    def closure():
        optimizer.zero_grad()
        loss = model(images(4, 3, 32, 32, seed=seed, dtype=torch.float64)).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


@pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
def test_a_step_returns_the_loss_of_its_closure(kind):
    model, optimizer = rep_pair(kind)
    before = model.stem.conv.weight.detach().clone()
    loss = one_step(model, optimizer, 0)
    assert loss.requires_grad and not torch.equal(model.stem.conv.weight, before)


@pytest.mark.parametrize("kind", [RepSGD, RepAdamW])
@pytest.mark.parametrize("way", ["state dict", "pickle"])
def test_training_goes_on_from_a_state_as_if_it_had_not_stopped(kind, way):
    model, optimizer = rep_pair(kind)
    for seed in range(3):
        one_step(model, optimizer, seed)
    if way == "pickle":
        again, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        again, resumed = rep_pair(kind)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (3, 4):
        one_step(model, optimizer, seed)
        one_step(again, resumed, seed)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_with_other_scales_is_refused():
    _, trained = rep_pair(seed=0)
    _, other = rep_pair(seed=1)
    with pytest.raises(UsageError, match="trained with other scales than those given now; go on"):
        other.load_state_dict(trained.state_dict())
    model = tiny_net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="other scales"):
        trained.load_state_dict(plain.state_dict())


def test_scales_of_a_parameter_that_is_not_trained_are_refused():
    model = tiny_net()
    kernels = scaled_kernels(model, prior_scales(model))
    with pytest.raises(UsageError, match="not among the parameters"):
        RepSGD(model.head.parameters(), scales=kernels, lr=0.1)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(UsageError, match="nesterov needs a momentum"):
        RepSGD(tiny_net().parameters(), scales={}, lr=0.1, nesterov=True)


# ----------------------------------------------------------------------- start and forms


def test_a_network_starts_from_given_scales():
    """s K3 + pad(t K1) + u I: with s = t = 0 only the identity stays, with t = 0 the drawn K3."""
    model = tiny_net()

    def scales(s, t, u):
        return {
            name: BlockScales(
                scale_3x3=torch.full_like(its.scale_3x3, s),
                scale_1x1=torch.full_like(its.scale_1x1, t),
                identity=None if its.identity is None else torch.full_like(its.identity, u),
            )
            for name, its in prior_scales(model).items()
        }

    start_from(model, scales(0.0, 0.0, 0.5))
    eye = 0.5 * torch.eye(6, dtype=torch.float64)
    block = model.stages[1][1].conv.weight
    assert torch.equal(block[:, :, 1, 1], 0.5 * torch.eye(8, dtype=torch.float64)) and eye.any()
    assert float(block.abs().sum()) == 4.0
    assert float(model.stem.conv.weight.abs().sum()) == 0.0

    torch.manual_seed(3)
    start_from(model, scales(2.0, 0.0, 0.0))
    torch.manual_seed(3)
    drawn = nn.Conv2d(3, 6, 3, bias=False, dtype=torch.float64).weight
    assert relative_error(model.stem.conv.weight, 2 * drawn) <= 1e-15


def test_the_forms_compute_the_same_and_leave_their_argument_alone():
    model = tiny_net()
    before = copy.deepcopy(model.state_dict())
    branches = branch_form(model, scales=random_scales(model), trained_scales=True).eval()
    shake(branches)
    x = images(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(target_form(branches)(x), branches(x)) <= 1e-12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(isinstance(m, CSLABlock) for m in branches.modules()) == 7
    assert not any(isinstance(m, CSLABlock) for m in target_form(branches).modules())


def test_a_network_of_blocks_is_fused_as_any_other():
    from litezoo.models.fuse import fuse

    branches = shake(branch_form(tiny_net(), trained_scales=True)).eval()
    x = images(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(fuse(branches)(x), branches(x)) <= 1e-10


def changed(model, name, **values):
    scales = prior_scales(model)
    return {**scales, name: dataclasses.replace(scales[name], **values)}


WRONG = {
    "missing": (lambda m: {k: v for k, v in prior_scales(m).items() if k != "stem"}, "layer stem"),
    "unknown": (lambda m: {**prior_scales(m), "stages.9": prior_scales(m)["stem"]}, "stages.9"),
    "channels": (lambda m: changed(m, "stem", scale_1x1=torch.ones(5)), "for the 6 channels of st"),
    "shape": (lambda m: changed(m, "stem", scale_3x3=torch.ones(6, 1)), r"shape \(6, 1\)"),
    "identity": (lambda m: changed(m, "stages.1.1", identity=None), "1.1 has an identity"),
    "no identity": (lambda m: changed(m, "stem", identity=torch.ones(6)), "stem has no identity"),
    "nan": (lambda m: changed(m, "stem", scale_3x3=torch.full((6,), torch.nan)), "finite"),
}


@pytest.mark.parametrize(("scales", "message"), WRONG.values(), ids=WRONG)
def test_scales_that_do_not_fit_are_refused_by_name(scales, message):
    model = tiny_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message):
        start_from(model, scales(model))
    with pytest.raises(UsageError, match=message):
        branch_form(model, scales=scales(model), trained_scales=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------- the scales' file


@pytest.fixture
def file(tmp_path):
    model = tiny_net().float()
    file = tmp_path / "scales.safetensors"
    save_scales(random_scales(model), file, origin=ORIGIN)
    return file


def test_scales_come_back_as_they_were_written_with_their_origin(tmp_path):
    model = tiny_net().float()
    scales = random_scales(model)
    written = save_scales(scales, tmp_path / "s.safetensors", origin=ORIGIN)
    read = load_scales(tmp_path / "s.safetensors")
    assert read.origin == ORIGIN == written.origin
    assert read.sha256 == written.sha256 and len(read.sha256) == 64
    assert read.layers.keys() == scales.keys()
    for name, its in scales.items():
        assert torch.equal(read.layers[name].scale_3x3, its.scale_3x3)
        assert torch.equal(read.layers[name].scale_1x1, its.scale_1x1)
        if its.identity is None:
            assert read.layers[name].identity is None
        else:
            assert torch.equal(read.layers[name].identity, its.identity)
    assert get_scales(model, file=str(tmp_path / "s.safetensors")).keys() == scales.keys()


def test_the_digest_is_of_the_numbers(tmp_path):
    model, digests = tiny_net(), set()
    for seed in (0, 0, 1):
        target = tmp_path / f"{len(digests)}.safetensors"
        digests.add(save_scales(random_scales(model, seed), target, origin=ORIGIN).sha256)
    assert len(digests) == 2


def test_without_a_file_the_scales_are_the_priors():
    model = tiny_net()
    found = get_scales(model, file=None)
    assert float(found["stages.1.1"].scale_3x3[0]) == pytest.approx(2**0.5)
    assert float(found["stem"].scale_1x1[0]) == 1.0 and found["stem"].identity is None


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"no scales file .*none.st; make one by a search, or lea"):
        load_scales(tmp_path / "none.st")


@pytest.mark.parametrize("content", [None, b"", b"no tensors at all"])
def test_a_file_that_cannot_be_read_is_named(file, content):
    if content is None:
        truncate(file)
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"scales.safetensors is not a readable scales file \("):
        load_scales(file)


def test_a_file_with_one_wrong_bit_is_damaged(file):
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckFailed, match=r"scales.safetensors is damaged"):
        load_scales(file)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"stem.scale_3x3": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="is no scales file of litezoo"):
        load_scales(tmp_path / "other.safetensors")


@pytest.mark.parametrize("key", ["model", "epochs"])
def test_a_file_without_its_origin_is_refused(file, key):
    with safe_open(file, framework="pt") as content:
        header = dict(content.metadata())
        tensors = {name: content.get_tensor(name) for name in content.keys()}
    del header[key]
    save_file(tensors, file, header)
    with pytest.raises(UsageError, match=f"has no '{key}'"):
        load_scales(file)


def test_a_file_of_another_network_is_refused(file):
    deeper = tiny_net(depths=(1, 2, 3, 1))
    with pytest.raises(UsageError, match=r"scales.safetensors has no scales of the layer stages.2"):
        get_scales(deeper, file=str(file))


def test_scales_of_a_search_that_diverged_are_not_written(tmp_path):
    scales = changed(tiny_net(), "stem", scale_1x1=torch.full((6,), torch.inf))
    with pytest.raises(UsageError, match=r"stem.scale_1x1 is no finite number: the search div"):
        save_scales(scales, tmp_path / "s.safetensors", origin=ORIGIN)
    assert not (tmp_path / "s.safetensors").exists()


# ----------------------------------------------------------------------- in the trainer


#: As little of an epoch as there is.
SHORT = [
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2"),
    *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"),
    *("--data.batch_size=8", "--model.ema_decay=null", "--trainer.precision=32-true"),
]
REP = "--model.optimizer.opt=repsgd"


def optimizer_of(module, epochs=1):
    """What Lightning would get from a module."""

    class Trainer:
        max_epochs = epochs
        estimated_stepping_batches = 10 * epochs

    module._trainer = Trainer()
    return module.configure_optimizers()["optimizer"]


def module_of(name="repoptvgg_tiny", **options):
    torch.manual_seed(0)
    return ClassifierModule(name, num_classes=10, in_chans=1, **options)


def config_of(opt="repsgd", **options):
    return OptimizerConfig(opt=opt, **options)


@pytest.mark.parametrize("opt", ["repsgd", "repadamw"])
def test_a_name_in_the_recipe_gives_the_optimizer_its_kernels_and_settings(opt):
    module = module_of(optimizer=config_of(opt, lr=0.03, weight_decay=0.25))
    optimizer = optimizer_of(module)
    assert type(optimizer).__name__.lower() == opt
    kernels = [m.conv.weight for m in module.net.modules() if isinstance(m, ConvBN)]
    assert len(kernels) == 7
    for kernel in kernels:
        assert "scale_3x3" in optimizer.state[kernel]
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(decay[p] == (0.25 if p.ndim > 1 else 0.0) for p in module.net.parameters())
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == 0.03
    if opt == "repsgd":
        assert group["nesterov"] and group["momentum"] == 0.9


def test_rates_by_layer_reach_a_repoptimizer():
    groups = optimizer_of(module_of(optimizer=config_of(layer_decay=0.5))).param_groups
    assert len({group["lr_scale"] for group in groups}) > 2


def test_the_recipe_of_the_family_trains_by_repsgd_with_the_priors_scales():
    recipe = yaml.safe_load((trainer.RECIPES / "repoptvgg.yaml").read_text())["model"]["optimizer"]
    module = module_of(optimizer=OptimizerConfig(**recipe))
    optimizer = optimizer_of(module)
    assert isinstance(optimizer, RepSGD)
    weight = module.net.stages[1][1].conv.weight
    weight.grad = torch.ones_like(weight)
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    group.update(lr=1.0, momentum=0.0, weight_decay=0.0, nesterov=False)
    before = weight.detach().clone()
    for other in module.net.parameters():
        if other is not weight:
            other.grad = None
    optimizer.step()
    taps = (before - weight.detach())[:2, :2]
    assert float(taps[0, 0, 0, 0]) == pytest.approx(2, abs=1e-4)  # s^2 = 2 / i, i = 1
    assert float(taps[0, 1, 1, 1]) == pytest.approx(4, abs=1e-4)
    assert float(taps[0, 0, 1, 1]) == pytest.approx(5, abs=1e-4)


@in_an_empty_folder
def test_training_with_the_priors_scales_needs_no_file():
    words = [*SHORT, "--model.optimizer.opt=repadamw"]
    result = train("repoptvgg_tiny", out=trainer.RUNS / "run", overrides=words)
    assert (trainer.RUNS / "run" / "best.ckpt").is_file() and result.epochs == 1


def test_a_network_starts_with_the_scales_of_the_file_and_steps_by_them(file):
    config = config_of(scales=str(file))
    module = module_of(optimizer=config)
    searched = load_scales(file).layers["stages.1.1"]
    diagonal = module.net.stages[1][1].conv.weight.detach()[:, :, 1, 1].diagonal()
    u = searched.identity
    assert float((diagonal - u).abs().mean()) < 0.25 * float(u.abs().mean())
    state = optimizer_of(module).state[module.net.stages[1][1].conv.weight]
    assert torch.equal(state["scale_3x3"], searched.scale_3x3)


def test_given_weights_are_not_drawn_anew(file, tmp_path):
    state = module_of().net.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    config = config_of(scales=str(file))
    torch.manual_seed(1)
    module = ClassifierModule(
        "repoptvgg_tiny",
        num_classes=10,
        in_chans=1,
        weights=str(tmp_path / "weights.pth"),
        optimizer=config,
    )
    assert torch.equal(module.net.stem.conv.weight, state["stem.conv.weight"])
    assert module.scales["stem"].scale_1x1 is not None


@in_an_empty_folder
def test_a_run_goes_on_with_its_scales_and_not_with_others(file):
    words = [*SHORT, REP, f"--model.optimizer.scales={file.resolve()}"]
    run = trainer.RUNS / "run"
    train("repoptvgg_tiny", out=run, overrides=words)
    train(None, resume=run, overrides=["--trainer.max_epochs=2"])
    save_scales(random_scales(tiny_net().float(), seed=5), file, origin=ORIGIN)
    with pytest.raises(UsageError, match="trained with other scales"):
        train(None, resume=run, overrides=["--trainer.max_epochs=3"])


REFUSED = {
    "repsgd for repvgg": (
        "repvgg_a0",
        [REP],
        "repsgd carries the prior of RepOpt-VGG, which repvgg_a0 is not; train it with "
        "--model.optimizer.opt sgd",
    ),
    "scales for adamw": (
        "repoptvgg_tiny",
        ["--model.optimizer.scales=x"],
        "optimizer.scales is of repsgd and repadamw, not of adamw",
    ),
    "no file": ("repoptvgg_tiny", [REP, "--model.optimizer.scales=x"], "no scales file x"),
    "custom L2 of QARepVGG": (
        "qarepvgg_a0",
        ["--model.custom_l2=true", "--model.optimizer.opt=sgd"],
        "custom_l2 is of RepVGG's blocks, which qarepvgg_a0 has not",
    ),
    "custom L2 under AdamW": (
        "repvgg_a0",
        ["--model.custom_l2=true"],
        "which adamw does not treat as weight decay",
    ),
    "custom L2 of nothing": (
        "repvgg_a0",
        ["--model.custom_l2=true", "--model.optimizer={opt: sgd, weight_decay: 0.0}"],
        "as strong as optimizer.weight_decay, which is 0",
    ),
}


@in_an_empty_folder
@pytest.mark.parametrize(("model", "words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_defined_is_refused_before_a_run_begins(model, words, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        train(model, out=trainer.RUNS / "run", overrides=[*SHORT, *words])
    assert not trainer.RUNS.exists()


# ----------------------------------------------------------------------- the search


@in_an_empty_folder
def test_a_search_trains_the_scales_and_writes_a_file_that_training_takes():
    found = search_scales("repoptvgg_tiny", overrides=SHORT)
    (run,) = (trainer.RUNS / "scales" / "repoptvgg_tiny").iterdir()
    assert found.scales == str(run / "scales.safetensors")
    scales = load_scales(run / "scales.safetensors")
    assert scales.sha256 == found.sha256
    assert scales.origin.model == "repoptvgg_tiny" and scales.origin.data == "digits"
    assert scales.origin.epochs == 1
    assert scales.origin.val_top1_percent == found.run.val_top1_percent
    prior = prior_scales(tiny_net().float())
    assert scales.layers.keys() == prior.keys()
    for name, its in prior.items():
        assert not torch.equal(scales.layers[name].scale_3x3, its.scale_3x3), name
        assert not torch.equal(scales.layers[name].scale_1x1, its.scale_1x1), name
        if its.identity is not None:
            assert not torch.equal(scales.layers[name].identity, its.identity), name
    words = [*SHORT, REP, f"--model.optimizer.scales={found.scales}"]
    train("repoptvgg_tiny", out=trainer.RUNS / "target", overrides=words)
    from litezoo.recipes.runs import last_run

    assert last_run() is None, "export would take it for a checkpoint of the model"


@in_an_empty_folder
def test_a_search_goes_on_and_its_scales_are_the_last_ones():
    out = trainer.RUNS / "search"
    first = search_scales("repoptvgg_tiny", out=out, overrides=SHORT)
    with pytest.raises(UsageError, match="trained another form of repoptvgg_tiny; go on as it was"):
        train(None, resume=out, overrides=["--trainer.max_epochs=2"])
    again = search_scales(None, resume=out, overrides=["--trainer.max_epochs=2"])
    assert (
        again.sha256 != first.sha256 and load_scales(out / "scales.safetensors").origin.epochs == 2
    )
    state = read_checkpoint(out / "last.ckpt").state_dict
    kept = load_scales(out / "scales.safetensors").layers["stages.1.1"]
    assert torch.equal(kept.scale_1x1, state["stages.1.1.scale_1x1"])
    assert torch.equal(kept.identity, state["stages.1.1.identity"].flatten())


@pytest.mark.parametrize("opt", ["sgd", "repsgd"])
def test_in_a_search_all_scales_are_trained_and_only_the_identitys_are_decayed(opt):
    module = ScaleSearchModule(
        "repoptvgg_tiny", num_classes=10, in_chans=1, optimizer=config_of(opt, weight_decay=0.5)
    )
    decay = {p: g["weight_decay"] for g in optimizer_of(module).param_groups for p in g["params"]}
    block = module.net.stages[1][1]
    assert decay[block.scale_3x3] == decay[block.scale_1x1] == decay[block.bn.weight] == 0.0
    assert decay[block.identity] == decay[block.branch_3x3.weight] == 0.5
    optimizer = optimizer_of(module)
    assert not any("scale_3x3" in state for state in optimizer.state.values())
    assert decay.keys() == set(module.net.parameters())


def test_a_search_begins_with_the_priors_scales_and_ones():
    module = ScaleSearchModule("repoptvgg_tiny", num_classes=10, in_chans=1)
    stage = module.net.stages[2]
    assert stage[0].scale_3x3.eq(1).all() and stage[0].identity is None
    assert float(stage[1].scale_1x1[0]) == pytest.approx(2**0.5)
    assert stage[1].identity.eq(1).all() and stage[1].identity.shape == (8, 1, 1)


@in_an_empty_folder
def test_a_search_is_refused_for_another_family_and_with_given_scales(file):
    with pytest.raises(UsageError, match="scales are searched for RepOpt-VGG, which repvgg_a0 is"):
        search_scales("repvgg_a0", overrides=SHORT)
    words = [*SHORT, REP, f"--model.optimizer.scales={file}"]
    with pytest.raises(UsageError, match="a search begins with the prior's scales"):
        search_scales("repoptvgg_tiny", overrides=words)


# ----------------------------------------------------------------------- RepVGG's custom L2


def repvgg_block(channels, out_channels, stride, groups, seed):
    torch.manual_seed(seed)
    block = RepVGGBlock(channels, out_channels, stride=stride, groups=groups).double()
    return shake(block, seed)


blocks = given(
    channels=st.sampled_from([4, 8]),
    out_channels=st.sampled_from([4, 8]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)


def branch_scale(branch):
    return (branch.bn.weight / (branch.bn.running_var + 1e-5).sqrt()).detach().tolist()


@settings(deadline=None, max_examples=15)
@blocks
def test_custom_l2_is_its_definition_number_by_number(channels, out_channels, stride, groups, seed):
    block = repvgg_block(channels, out_channels, stride, groups, seed)
    k3 = block.branch_3x3.conv.weight.detach()
    k1 = block.branch_1x1.conv.weight.detach()
    t3, t1 = branch_scale(block.branch_3x3), branch_scale(block.branch_1x1)
    wanted = 0.0
    for o in range(k3.shape[0]):
        for i in range(k3.shape[1]):
            for y in range(3):
                for x in range(3):
                    if (y, x) != (1, 1):
                        wanted += float(k3[o, i, y, x]) ** 2
            made = float(k3[o, i, 1, 1]) * t3[o] + float(k1[o, i, 0, 0]) * t1[o]
            wanted += made**2 / (t3[o] ** 2 + t1[o] ** 2)
    assert float(custom_l2(block)) == pytest.approx(wanted, rel=1e-12)


@settings(deadline=None, max_examples=15)
@blocks
def test_custom_l2_is_the_least_l2_of_the_kernels_that_deploy_to_the_same(
    channels, out_channels, stride, groups, seed
):
    """What the branches have against each other is free, and nothing is below R."""
    block = repvgg_block(channels, out_channels, stride, groups, seed)
    k3, k1 = block.branch_3x3.conv.weight, block.branch_1x1.conv.weight
    t3, t1 = (
        torch.tensor(branch_scale(b), dtype=torch.float64)[:, None]
        for b in (block.branch_3x3, block.branch_1x1)
    )
    least = float(custom_l2(block))
    deployed = block.kernel().weight
    generator = torch.Generator().manual_seed(seed)
    against = torch.randn(k1.shape[:2], generator=generator, dtype=torch.float64)
    with torch.no_grad():
        k3[:, :, 1, 1] += against * t1
        k1[:, :, 0, 0] -= against * t3
    assert relative_error(block.kernel().weight, deployed) <= 1e-12
    assert float(custom_l2(block)) == pytest.approx(least, rel=1e-10)
    assert float(k3.square().sum() + k1.square().sum()) >= least * (1 - 1e-12)
    with torch.no_grad():  # the pair without that part is as small as R says
        part = (k3[:, :, 1, 1] * t1 - k1[:, :, 0, 0] * t3) / (t3.square() + t1.square())
        k3[:, :, 1, 1] -= part * t1
        k1[:, :, 0, 0] += part * t3
    assert float(k3.square().sum() + k1.square().sum()) == pytest.approx(least, rel=1e-10)


def test_custom_l2_moves_the_kernels_alone_and_outlives_dead_gammas():
    block = repvgg_block(4, 4, 1, 1, 0)
    with torch.no_grad():
        for branch in (block.branch_3x3, block.branch_1x1):
            branch.bn.weight[0] = 0.0
    custom_l2(block).backward()
    with_gradient = {name for name, p in block.named_parameters() if p.grad is not None}
    assert with_gradient == {"branch_3x3.conv.weight", "branch_1x1.conv.weight"}
    assert all(bool(p.grad.isfinite().all()) for p in block.parameters() if p.grad is not None)
    assert bool(block.branch_3x3.conv.weight.grad[1:].ne(0).all())


def test_custom_l2_takes_the_place_of_decay_for_the_kernels_of_blocks_alone():
    config = config_of("sgd", weight_decay=0.5, lr=0.125)
    module = module_of("repvgg_narrow", custom_l2=True, optimizer=config)
    names = decayed_by_custom_l2(module.net)
    assert len(names) == 12 and all(name.endswith(".conv.weight") for name in names)
    optimizer = optimizer_of(module)
    assert type(optimizer) is torch.optim.SGD
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in module.net.named_parameters():
        ordinary = parameter.ndim > 1 and name not in names
        assert decay[parameter] == (0.5 if ordinary else 0.0), name
    assert decay.keys() == set(module.net.parameters())

    module.log = lambda *_, **__: None
    batch = (images(4, 1, 32, 32), torch.arange(4))
    shake(module.net)
    state = copy.deepcopy(module.state_dict())
    with_l2 = module.training_step(batch, 0)
    penalty = 0.25 * custom_l2(module.net)
    module.load_state_dict(state)
    module.custom_l2 = False
    assert float(with_l2 - module.training_step(batch, 0)) == pytest.approx(
        float(penalty), rel=1e-4
    )
    assert float(penalty) > 0.1


def test_the_recipe_of_qarepvgg_decays_every_kernel_plainly():
    """Step M1 of the paper: plain L2 on kernels, in the loss's place nothing; RepVGG's the same."""
    for family, net in (("qarepvgg", QARepVGG(**NARROW)), ("repvgg", RepVGG(**NARROW))):
        model = yaml.safe_load((trainer.RECIPES / f"{family}.yaml").read_text())["model"]
        assert "custom_l2" not in model
        module = module_of(optimizer=OptimizerConfig(**model["optimizer"]))
        module.net = net
        decay = {
            p: g["weight_decay"] for g in optimizer_of(module).param_groups for p in g["params"]
        }
        wanted = {"qarepvgg": 4e-5, "repvgg": 1e-4}[family]
        assert all(decay[p] == (wanted if p.ndim > 1 else 0) for p in net.parameters())
