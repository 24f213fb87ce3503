"""Quantization-aware training: what is rounded, where gradients go, what stays as it was."""

import copy
from functools import cache, partial

import numpy as np
import pytest
import test_int8
import torch
from helpers import images, relative_error, settle, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_int8_risk import images_of, stressed
from onnx import numpy_helper
from test_data import write_folder
from test_fuse import dead_identity, same, snapshot
from test_models import shallow_small
from test_train import litezoo, tiny_run
from torch import nn
from torch.func import functional_call

from litezoo.export.source import load_source
from litezoo.export.to_int8 import convolutions, quantize, quantize_weight
from litezoo.export.to_onnx import export_onnx, load_onnx
from litezoo.models.catalogue import Preprocess
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.fuse import (
    FusableBlock,
    cure_dead,
    fuse,
    fuse_with_report,
    fused_state,
    graph_form,
    hold_dead,
)
from litezoo.models.layers import ConvBN
from litezoo.models.mobileone import MobileOne
from litezoo.models.qarepvgg import QARepVGG
from litezoo.models.repoptvgg import RepOptVGG, branch_form
from litezoo.models.repvgg import RepVGG, RepVGGBlock
from litezoo.recipes import qat
from litezoo.recipes.data import open_data
from litezoo.recipes.qat import FakeQuantized, finetune_quantized, train_quantized
from litezoo.recipes.trainer import train

DIGITS = open_data("digits").preprocess
#: As little of a run as there is.
SHORT = (
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    *("--data.batch_size", "8"),
)

pytestmark = pytest.mark.usefixtures("tiny_model")


SIZES = {"depths": (1, 2, 2, 1), "stem_width": 8, "widths": (8, 8, 16, 16), "num_classes": 10}


def net(seed=0, **options):
    """Return a RepVGG of 7 small layers whose BatchNorms are not fresh, in eval mode."""
    torch.manual_seed(seed)
    return settle(RepVGG(**{**SIZES, **options}))


def gray(**options):
    """Return such a network of one channel, as it is drawn."""
    return RepVGG(**{**SIZES, **options}, in_chans=1).eval()


def small(name):
    """Return a shallow member of the zoo that is the test's own."""
    return copy.deepcopy(shallow_small(name))


def finetuned(network, **options):
    """Run QAT on the digits, as short as it can be."""
    arguments = {"granularity": "per-tensor", "unsigned": False, "preprocess": DIGITS, **options}
    return finetune_quantized(network, name="repvgg_tiny", data="digits", **arguments)


@pytest.fixture
def short(monkeypatch):
    """A run of two steps."""
    words = qat._words
    monkeypatch.setattr(qat, "_words", lambda *its: [*words(*its), *SHORT[2:]])


# ------------------------------------------------------------------- kernels with gradients


@pytest.mark.parametrize(
    "create",
    [
        partial(net, squeeze_excite=True, groups=2),
        lambda: settle(QARepVGG(**SIZES)),
        lambda: settle(MobileOne(**{**SIZES, "widths": (8, 8, 16, 32)}, branches=2)),
        lambda: settle(branch_form(RepOptVGG(**SIZES), trained_scales=True)),
        *(partial(small, name) for name in ("ghostnet_100", "mobilenetv3_small_050")),
    ],
    ids=["gates and groups", "qarepvgg", "mobileone", "csla", "ghostnet's stem", "mobilenetv3"],
)
def test_the_deploy_form_computed_from_the_train_form_is_the_fused_one(create):
    model = create().double()
    deploy = fuse(model)
    state = fused_state(model, copy.deepcopy(deploy).to("meta"))
    assert state.keys() == deploy.state_dict().keys()
    for name, value in deploy.state_dict().items():
        assert relative_error(state[name] + 1e-9, value + 1e-9) <= 1e-6, name
    x = images(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(functional_call(deploy, state, (x,)), model(x)) <= 1e-6


def test_gradients_through_the_fused_form_are_those_of_the_train_form():
    model = net().double()
    deploy, x = fuse(model), images(2, 3, 64, 64, dtype=torch.float64)
    model(x).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    functional_call(deploy, fused_state(model, deploy), (x,)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, wanted[name]) <= 1e-8, name


def test_a_block_alone_is_its_own_network():
    block = shake(RepVGGBlock(4, 4).double()).eval()
    deploy, x = fuse(block), images(2, 4, 6, 5, dtype=torch.float64)
    y = functional_call(deploy, fused_state(block, deploy), (x,))
    assert relative_error(y, block(x)) <= 1e-10


def test_a_block_that_says_no_kernel_is_refused_with_what_to_do_instead():
    class Silent(ConvBN):
        kernel = FusableBlock.kernel

    block = Silent(3, 4)
    with pytest.raises(UsageError, match=r"Silent says no kernel\(\), .* fuse the network and"):
        fused_state(block, fuse(ConvBN(3, 4)))


def test_a_cured_model_equals_what_was_fused_on_noise_too():
    block = dead_identity()
    report, x = fuse_with_report(block), images(2, 6, 4, 3, dtype=torch.float64)
    before = snapshot(block)
    cured = cure_dead(block, report.dead)
    assert same(before, snapshot(block))
    assert relative_error(cured(x), report.model(x)) <= 1e-10
    assert relative_error(hold_dead(block, report.dead)(x), cured(x)) <= 1e-10
    assert cured.branch_identity.weight[3] == 0.0 != block.branch_identity.weight[3]
    assert fuse_with_report(cured).dead == ()


# ------------------------------------------------------------------- what is rounded


@pytest.mark.parametrize("name", ["gates", "mobilenetv3_small_050"])
def test_the_same_convolutions_are_rounded_as_in_the_file(name):
    deploy, proto = (
        float_file(True) if name == "gates" else (fuse(small(name)), test_int8.float_file(name))
    )
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = {node.name or node.output[0]: node for node in proto.graph.node}
    wanted = [
        numpy_helper.to_array(initializers[nodes[name].input[1]]) for name in convolutions(proto)
    ]
    found = FakeQuantized(deploy, in_chans=3).layers
    state = deploy.state_dict()
    ours = sorted((state[f"{name}.weight"].numpy() for name in found), key=np.sum)
    assert len(ours) == len(wanted)
    for a, b in zip(ours, sorted(wanted, key=np.sum), strict=True):
        assert np.allclose(a, b, atol=1e-6)


def noise_db(x, exact):
    """Return the power of an error over that of the exact logits."""
    return 10 * np.log10(np.sum((x - exact) ** 2) / np.sum(exact**2) + 1e-12)


@cache
def calibration():
    return images(16, 3, 64, 64, seed=3)


@cache
def float_file(gates):
    deploy = fuse(net(squeeze_excite=gates))
    return deploy, export_onnx(deploy, calibration()[:2].numpy(), metadata={})


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
@pytest.mark.parametrize(("form", "activations"), [("int8", "int8"), ("int8-u8", "uint8")])
@pytest.mark.parametrize("weight_bits", [7, 8])
def test_the_rounded_network_says_what_the_file_says(
    gates, granularity, form, activations, weight_bits
):
    deploy, proto = float_file(gates)
    rounded = FakeQuantized(
        deploy,
        in_chans=3,
        granularity=granularity,
        activations=activations,
        weight_bits=weight_bits,
    ).eval()
    rounded.observe(deploy, calibration().split(4))
    file = quantize(
        proto,
        calibration().numpy(),
        form=form,
        per_channel=granularity == "per-channel",
        weight_bits=weight_bits,
    )
    x = images(8, 3, 64, 64, seed=4)
    with torch.no_grad():
        ours, exact = rounded(deploy, x).numpy(), deploy(x).numpy()
    theirs = load_onnx(file)(x.numpy())
    # they differ where a value is half a step: by far less than either differs from float
    assert noise_db(ours, theirs) < noise_db(theirs, exact) - 12


def test_ranges_are_the_extremes_and_then_follow_the_batches_only_in_training():
    deploy = fuse(net())
    rounded = FakeQuantized(deploy, in_chans=3)
    assert not rounded.has_ranges
    first, second = images(4, 3, 64, 64, seed=1), images(4, 3, 64, 64, seed=2) * 2
    rounded.observe(deploy, [first, second])
    assert rounded.has_ranges and rounded.layers[0] == "stem.conv"
    low, high = torch.cat((first, second)).aminmax()
    assert (rounded.low[0], rounded.high[0]) == (low, high)
    assert (rounded.low[1:] == 0).all(), "behind a ReLU"
    rounded.eval()(deploy, 5 * second)
    assert (rounded.low[0], rounded.high[0]) == (low, high)
    rounded.train()(deploy, 5 * second)
    assert float(rounded.high[0]) == pytest.approx(float(high + 0.01 * (5 * second.max() - high)))
    assert float(rounded.low[0]) == pytest.approx(float(low + 0.01 * (5 * second.min() - low)))


@given(
    st.integers(0, 2**16), st.sampled_from([7, 8]), st.booleans(), st.sampled_from([1e-30, 1, 1e6])
)
@settings(deadline=None, max_examples=40)
def test_weights_are_rounded_as_in_the_file(seed, bits, per_channel, size):
    weight = size * images(6, 3, 3, 3, seed=seed)
    weight[1] = 0.0
    granularity = "per-channel" if per_channel else "per-tensor"
    rounded = FakeQuantized(
        nn.Conv2d(1, 1, 1), in_chans=1, granularity=granularity, weight_bits=bits
    )
    integers, scale = quantize_weight(weight.numpy(), per_channel=per_channel, bits=bits)
    wanted = integers * (scale.reshape(-1, 1, 1, 1) if per_channel else scale)
    assert np.allclose(rounded._rounded(weight).numpy(), wanted, rtol=1e-6, atol=0)


def test_classifier_gates_and_biases_stay_float():
    deploy = fuse(net(squeeze_excite=True))
    rounded = FakeQuantized(deploy, in_chans=3, granularity="per-tensor").eval()
    rounded.observe(deploy, [images(2, 3, 64, 64)])
    given = {}

    def look(name, module, inputs):
        given[name] = {key: value.clone() for key, value in module.named_parameters()}

    for name, module in rounded._deploy[0].named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(partial(look, name))
    rounded(deploy, images(2, 3, 64, 64))
    state, changed = deploy.state_dict(), set()
    for name, parameters in given.items():
        for key, value in parameters.items():
            if not torch.equal(value, state[f"{name}.{key}"]):
                changed.add(f"{name}.{key}")
    assert changed == {f"{name}.weight" for name in rounded.layers}
    assert len(changed) == 7 and all(name.endswith(".conv.weight") for name in changed)


# ------------------------------------------------------------------- in training


def module_of(network, **options):
    """Return the Lightning module that trains a copy of a network."""
    config = {"num_classes": 10, "in_chans": 3, "granularity": "per-tensor", **options}
    module = qat._training(qat._without_dead(network, None))("repvgg_tiny", **config)
    module.quantized.observe(module.net, [images(8, 3, 64, 64, seed=1)])
    return module


def test_both_forms_say_the_same_before_the_first_step():
    model = net(squeeze_excite=True)
    x = images(4, 3, 64, 64)
    train_form, fused = module_of(model).eval(), module_of(fuse(model)).eval()
    assert relative_error(train_form(x), fused(x)) <= 1e-4
    assert relative_error(train_form(x), model(x)) > 1e-3, "it is rounded"


def test_gradients_reach_every_branch_and_batchnorms_statistics_do_not_move():
    model = net()
    module = module_of(model).train()
    before = {name: value.clone() for name, value in module.net.named_buffers()}
    labels = torch.arange(4)
    nn.functional.cross_entropy(
        module.logits_of(module.net, images(4, 3, 64, 64)), labels
    ).backward()
    for name, parameter in module.net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(torch.equal(before[name], value) for name, value in module.net.named_buffers())


def with_dead_channels():
    """Return a network two channels of which never leave 0, and images that show it."""
    model, x = net(), images(16, 3, 64, 64, seed=1)
    for module in model.stages[1][0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data[:2] = -50.0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x


def test_dead_channels_are_cured_and_stay_dead_in_training():
    model, x = with_dead_channels()
    assert max(row.largest_scale for row in fuse_with_report(model).dead) > 100
    module = module_of(model).train()
    optimizer = torch.optim.AdamW(module.net.parameters(), lr=1e-2)
    for _ in range(3):
        loss = nn.functional.cross_entropy(module.logits_of(module.net, x), torch.arange(16) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    identity = module.net.stages[1][1].branch_identity
    assert (identity.weight[:2] == 0).all() and (identity.weight[2:] != 0).all()
    assert not torch.equal(identity.weight, model.stages[1][1].branch_identity.weight)
    trained = module.net.eval()
    report = fuse_with_report(trained)
    assert not any(row.branch == "stages.1.1.branch_identity" for row in report.dead)
    assert report.model.stages[1][1].conv.weight.abs().max() < 20
    noise = 3 * images(4, 3, 64, 64, seed=9)
    state = fused_state(trained, report.model)
    assert relative_error(functional_call(report.model, state, (noise,)), trained(noise)) <= 1e-5
    assert relative_error(report.model(noise), trained(noise)) <= 1e-5


def test_a_batchnorm_weight_that_is_zero_gets_no_gradient():
    weight = torch.tensor([0.0, 0.5, -2.0], requires_grad=True)
    gradient = torch.tensor([3.0, 4.0, 5.0])
    assert torch.equal(qat._unless_zero(weight, gradient), torch.tensor([0.0, 4.0, 5.0]))


def test_what_is_learnt_from_is_the_float_network():
    model = fuse(net())
    module = module_of(model).eval()  # the ranges stay
    module.log = lambda *values, **options: None
    x = images(8, 3, 64, 64, seed=1)
    with torch.no_grad():
        said = module.logits_of(module.net, x).log_softmax(1)
        wanted = model(x).softmax(1)
    kl = (wanted * (wanted.log() - said)).sum(1).mean()
    for labels in (torch.zeros(8), torch.arange(8)):
        loss = module.training_step((x, labels.long()), 0)
        assert float(loss.detach()) == pytest.approx(float(kl), rel=1e-4)
    module.net.stem.conv.weight.data.mul_(2)  # the teacher does not learn
    assert torch.equal(module._teacher[0](x), model(x))


# ------------------------------------------------------------------- whole runs


def trained(tmp_path_factory):
    """Return the tiny network after two epochs of the digits."""
    folder = tiny_run(tmp_path_factory)
    return create_model("repvgg_tiny", weights=folder / "best.ckpt").eval()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return trained(tmp_path_factory)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_run_returns_a_new_network_of_the_same_form(network, form, short, tmp_path):
    given = network if form == "train" else fuse(network)
    before, said = snapshot(given), []
    random = torch.random.get_rng_state()
    result = finetuned(given, epochs=1, out=tmp_path / "run", progress=said.append)
    assert same(before, snapshot(given))
    assert torch.equal(random, torch.random.get_rng_state())
    assert graph_form(result) == form and not result.training
    assert result.state_dict().keys() == given.state_dict().keys()
    assert all(p.requires_grad for p in result.parameters())
    moved = {k for k, v in given.state_dict().items() if not torch.equal(v, result.state_dict()[k])}
    assert moved == {name for name, _ in given.named_parameters()}
    assert (tmp_path / "run" / "best.ckpt").is_file()
    assert said[0] == "training repvgg_tiny on digits" and said[1].startswith("epoch 1/1  loss")
    if form == "train":
        again = create_model("repvgg_tiny", weights=tmp_path / "run" / "best.ckpt").eval()
        x = images(2, 1, 32, 32)
        assert torch.equal(again(x), result(x))


def test_two_runs_are_the_same_and_leave_nothing(network, short, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    first = finetuned(fuse(network), epochs=1)
    torch.manual_seed(2)
    second = finetuned(fuse(network), epochs=1)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    for unsigned, granularity in ((True, "per-tensor"), (False, "per-channel")):
        other = finetuned(fuse(network), epochs=1, unsigned=unsigned, granularity=granularity)
        assert not torch.equal(other.stem.conv.weight, first.stem.conv.weight)


def test_a_network_of_another_width_than_the_catalogues_is_trained(short):
    wide = gray(widths=(8, 24, 16, 16))
    result = finetuned(wide, epochs=1)
    assert result.stages[1][0].branch_3x3.conv.out_channels == 24


def file_top1(deploy, split="test"):
    """Return the top-1 of the int8 file of a network, calibrated on training images."""
    pictures, labels = images_of(split)
    proto = export_onnx(deploy, pictures[:2].numpy(), metadata={})
    typed = quantize(proto, images_of("train")[0][:256].numpy(), form="int8", per_channel=False)
    return 100 * float((load_onnx(typed)(pictures.numpy()).argmax(1) == labels.numpy()).mean())


def test_a_stressed_network_gets_better_in_its_file(network, monkeypatch):
    hard = stressed(fuse(network), 16, every=8)
    words = qat._words  # it was trained for two epochs: its weights are far from where they settle
    monkeypatch.setattr(qat, "_words", lambda *its: [*words(*its), "--model.optimizer.lr=3e-3"])
    assert file_top1(finetuned(hard, epochs=1)) > file_top1(hard) + 10


# ------------------------------------------------------------------- from the command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder, so that runs/ lies there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training_from_weights_leaves_a_checkpoint_that_export_takes(tmp_path_factory, here):
    weights = tiny_run(tmp_path_factory) / "best.ckpt"
    run = train_quantized(
        "repvgg_tiny",
        out=here / "run",
        overrides=[*SHORT, "--model.weights", str(weights), "--model.granularity=per-tensor"],
    )
    assert run.checkpoint == str(here / "run" / "best.ckpt") and run.precision == "32-true"
    source = load_source("repvgg_tiny", run.checkpoint, ())
    assert source.data == "digits" and source.preprocess == DIGITS
    before = create_model("repvgg_tiny", weights=weights)
    assert not torch.equal(source.model.head.fc.weight, before.head.fc.weight)
    assert relative_error(source.model.head.fc.weight, before.head.fc.weight) < 0.1
    again = train_quantized(None, resume=here / "run", overrides=["--trainer.max_epochs=2"])
    assert again.epochs == 2
    with pytest.raises(UsageError):
        train(None, resume=here / "run", overrides=["--trainer.max_epochs=3"])


def test_preprocessing_is_the_weights_and_augmentation_the_familys():
    preprocess = Preprocess(input_size=(3, 96, 96), crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    words = qat._words("mobilenetv4_conv_small", "folder", preprocess)
    assert set(words) >= {
        "--data.input_size=96",
        "--data.crop_pct=0.9",
        "--data.interpolation=bilinear",
        "--data.mean=[0.5, 0.5, 0.5]",
        "--data.auto_augment=rand-m9-n2-p0.5",
        "--data.hflip=0.5",
    }
    assert "--data.hflip=0.0" in qat._words("repvgg_tiny", "digits", DIGITS)
    assert not any("batch_size" in word or "source" in word for word in words)


# ------------------------------------------------------------------- refusals


def test_without_weights_it_is_said_what_to_type(here):
    with pytest.raises(UsageError, match=r"add --model\.weights runs/repvgg_tiny/<time>/best.ckpt"):
        train_quantized("repvgg_tiny")
    run = here / "runs" / "repvgg_tiny" / "one"
    run.mkdir(parents=True)
    (run / "last.ckpt").touch()
    with pytest.raises(UsageError, match=r"add --model\.weights runs/repvgg_tiny/one/best.ckpt"):
        train_quantized("repvgg_tiny")


def test_the_program_trains_with_rounding_from_named_weights(tmp_path_factory, here, capsys):
    assert litezoo("train", "repvgg_tiny", "--data", "digits", "--qat") == 2
    assert "add --model.weights" in capsys.readouterr().err
    assert litezoo("train", "repvgg_tiny", "--qat", "--search-scales") == 2
    assert "take one of --qat and --search-scales" in capsys.readouterr().err
    weights = tiny_run(tmp_path_factory) / "best.ckpt"
    words = (*SHORT, "--model.weights", weights, "--out", here / "run")
    assert litezoo("train", "repvgg_tiny", "--qat", *words, "--json") == 0
    assert (here / "run" / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "per-chanel"}, "unknown granularity 'per-chanel'; did you mean 'per-cha"),
        ({"activations": "int4"}, "unknown type of activations 'int4'"),
        ({"weight_bits": 4}, "weights of 4 bits; give 8, or 7 for x86 without VNNI"),
    ],
)
def test_what_there_is_not_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        FakeQuantized(fuse(net()), in_chans=3, **options)


def test_a_network_without_convolutions_over_a_map_is_refused():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(UsageError, match="Sequential has no convolution that int8 quantizes"):
        FakeQuantized(head, in_chans=3)


def test_data_that_is_not_the_networks_is_refused(tmp_path):
    folder = str(write_folder(tmp_path, size=(32, 32)))
    with pytest.raises(UsageError, match=r"images of .* have 3 channels, the network takes 1;"):
        finetune_quantized(
            gray(), name="repvgg_tiny", data=folder, preprocess=DIGITS,
            granularity="per-tensor", unsigned=False,
        )  # fmt: skip
    with pytest.raises(UsageError, match=r"tells 10 classes apart, the data has 2; .* trained on"):
        finetune_quantized(
            net(), name="repvgg_tiny", data=folder, preprocess=Preprocess(input_size=(3, 32, 32)),
            granularity="per-tensor", unsigned=False,
        )  # fmt: skip


def test_no_epochs_are_refused():
    with pytest.raises(UsageError, match="training of 0 epochs; give 1 or more"):
        finetuned(gray(), epochs=0)


def test_training_that_diverged_is_no_result(short, monkeypatch):
    words = qat._words
    monkeypatch.setattr(qat, "_words", lambda *its: [*words(*its), "--model.optimizer.lr=1e30"])
    with pytest.raises(CheckFailed, match="training of repvgg_tiny diverged; give a lower rate"):
        finetuned(gray(), epochs=1)
