"""The risk of int8 that is read from weights alone: its two numbers, its words, what it refuses."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers import images, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_int8_risk import NARROW, section, stressed, with_dead_channel
from test_fuse import kill_channels, tiny
from test_int8 import SMALL, small_file
from test_models import shallow_small
from torch import nn
from torch.nn import functional as F

import litezoo.export.int8_risk as int8_risk_module
from litezoo.__main__ import _plain
from litezoo.export.compare import worst_layers
from litezoo.export.int8_risk import (
    LOW_RISK_COLUMN_DB,
    LOW_RISK_DB,
    MEDIUM_RISK_COLUMN_DB,
    MEDIUM_RISK_DB,
    Risk,
    column_sqnr_db,
    dry_run,
    int8_risk,
    noise_images,
    rounded_weight,
)
from litezoo.export.source import load_source
from litezoo.export.to_int8 import convolutions, quantize
from litezoo.export.to_onnx import export_onnx
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.fuse import fuse, fuse_with_report
from litezoo.models.repvgg import RepVGG

checked = settings(max_examples=50, deadline=None, derandomize=True, database=None)
both = pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])


def onnx_of(model, side=32):
    return export_onnx(model, np.zeros((2, 3, side, side), np.float32), metadata={})


# ----------------------------------------------------------------------- the worst column


@st.composite
def weights(draw):
    """Draw a weight (out, in / groups, k, k) with columns of any size, and its groups."""
    groups = draw(st.integers(1, 3))
    outs, ins, size = (draw(st.integers(1, 4)) for _ in range(3))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    weight = random.standard_normal((groups * outs, ins, size, size))
    weight *= 10 ** random.uniform(-1, 1, (1, ins, 1, 1))
    return weight.astype(np.float32), groups


@checked
@given(weights(), st.booleans())
def test_a_column_is_what_the_filters_of_its_group_do_with_one_input_channel(drawn, per_channel):
    weight, groups = drawn
    rounded = rounded_weight(weight, per_channel=per_channel)
    found = column_sqnr_db(weight, rounded, groups=groups)
    per_group = len(weight) // groups
    for channel, value in enumerate(found):
        group, i = divmod(channel, weight.shape[1])
        mine = slice(group * per_group, (group + 1) * per_group)
        exact, got = (w[mine, i].astype(np.float64) for w in (weight, rounded))
        noise = ((got - exact) ** 2).sum()
        expected = 10 * math.log10((exact**2).sum() / noise) if noise else math.inf
        assert value == pytest.approx(expected, abs=1e-6)


@checked
@given(weights())
def test_weights_are_rounded_to_127_steps_of_the_largest(drawn):
    weight, _ = drawn
    for per_channel in (True, False):
        rounded = rounded_weight(weight, per_channel=per_channel)
        axes = (1, 2, 3) if per_channel else None
        step = np.abs(weight).max(axis=axes, keepdims=True) / 127
        assert (np.abs(rounded - weight) <= step * (0.5 + 1e-5)).all()
        assert np.abs(rounded / step - np.rint(rounded / step)).max() <= 1e-3


def test_one_huge_weight_takes_the_steps_from_all_others_of_its_scale():
    weight = np.full((4, 4, 1, 1), 0.5, np.float32)
    weight[0, 0] = 312.0
    per_tensor, per_channel = (
        column_sqnr_db(weight, rounded_weight(weight, per_channel=finer), groups=1)
        for finer in (False, True)
    )
    assert per_tensor[1:] == pytest.approx([0.0] * 3)  # they round to zero
    assert (per_channel[1:] > 5).all()  # but in the first filter


def test_a_column_that_reads_nothing_is_no_risk():
    weight = np.random.default_rng(0).standard_normal((4, 5, 3, 3)).astype(np.float32)
    weight[:, 1], weight[:, 2] = 0.0, weight[:, 2] * 1e-8
    found = column_sqnr_db(weight, rounded_weight(weight, per_channel=False), groups=1)
    assert np.isinf(found[[1, 2]]).all() and np.isfinite(found[[0, 3, 4]]).all()
    weight[:] = 0.0
    found = column_sqnr_db(weight, rounded_weight(weight, per_channel=True), groups=1)
    assert np.isinf(found).all() and len(found) == 5


def test_a_weight_that_is_not_finite_is_refused():
    model = fuse(shake(tiny()))
    model.stem[0].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(CheckFailed, match="a weight is NaN or infinite; int8 has no scale for it"):
        int8_risk(model, granularity="per-tensor")


# ----------------------------------------------------------------------- logits and layers


@both
def test_the_snr_of_the_logits_is_that_of_rounded_weights_on_noise(granularity):
    model = fuse(shake(tiny()))
    twin = copy.deepcopy(model)
    for conv in twin.modules():
        if isinstance(conv, nn.Conv2d):
            axes = (1, 2, 3) if granularity == "per-channel" else (0, 1, 2, 3)
            step = conv.weight.data.abs().amax(axes, keepdim=True) / 127
            conv.weight.data = (conv.weight.data / step).round() * step
    noise = torch.from_numpy(noise_images((3, 64, 64)))
    want, got = (m(noise).detach().double() for m in (model, twin))
    want, got = want - want.mean(0), got - got.mean(0)
    expected = 10 * math.log10(float(want.square().sum() / (got - want).square().sum()))
    found = int8_risk(model, granularity=granularity, image_shape=(3, 64, 64))
    assert found.logit_snr_db == pytest.approx(expected, abs=0.05)
    assert found.granularity == granularity


def test_a_layers_row_is_of_the_layer_alone():
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    (row,) = int8_risk(model, granularity="per-tensor", image_shape=(3, 20, 24)).layers
    noise = torch.from_numpy(noise_images((3, 20, 24)))
    weight = conv.weight.detach().numpy()
    rounded = rounded_weight(weight, per_channel=False)
    want = conv(noise).detach()
    got = F.conv2d(noise, torch.from_numpy(rounded), conv.bias, 2, 1).detach()
    expected = 10 * math.log10(float(want.square().sum() / (got - want).square().sum()))
    columns = column_sqnr_db(weight, rounded, groups=1)
    assert row.output_snr_db == pytest.approx(expected, abs=0.01) and row.name == "0"
    assert (row.worst_column, row.worst_column_sqnr_db) == (columns.argmin(), columns.min())


def test_layers_come_with_the_lowest_output_snr_first():
    risk = int8_risk(shake(tiny()), granularity="per-tensor", image_shape=(3, 32, 32))
    found = [layer.output_snr_db for layer in risk.layers]
    assert found == sorted(found) and len(found) == 7
    assert risk.worst_column_sqnr_db == min(layer.worst_column_sqnr_db for layer in risk.layers)


def test_a_network_and_its_onnx_file_have_the_same_risk():
    few = {"depths": (1, 2, 1, 1), "groups": 2, "squeeze_excite": True}
    model = fuse(shake(tiny(**few, widths=(16, 16, 16, 16))))
    proto = onnx_of(model)
    a, b = (int8_risk(m, granularity="per-tensor", image_shape=(3, 32, 32)) for m in (model, proto))
    assert a.logit_snr_db == pytest.approx(b.logit_snr_db, abs=0.1)
    assert a.worst_column_sqnr_db == pytest.approx(b.worst_column_sqnr_db, abs=1e-3)
    # what stays float in an 8-bit file is not among the layers: gates, what follows the pool
    assert {layer.name for layer in b.layers} == set(convolutions(proto))
    assert len(a.layers) == len(b.layers) == 6
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert mine.output_snr_db == pytest.approx(theirs.output_snr_db, abs=0.1)


@pytest.mark.parametrize(
    ("name", "gates"), [("mobilenetv3_small_050", 9), ("ese_vovnet19b_slim_dw", 4)]
)
def test_gates_and_what_follows_the_pool_are_no_risk(name, gates):
    """At 32 pixels the last maps of these networks are one pixel too."""
    deploy = fuse(shallow_small(name))
    inside = [k for k, m in deploy.named_modules() if isinstance(m, nn.Conv2d)]
    found = {
        layer.name
        for layer in int8_risk(deploy, granularity="per-tensor", image_shape=(3, 32, 32)).layers
    }
    left_out = [k for k in inside if k not in found]
    assert len(left_out) >= gates
    assert all("se.fc" in k or k.startswith("head.") for k in left_out), left_out


def test_layers_of_an_onnx_file_have_the_names_that_keep_float_takes():
    proto = small_file()
    names = {layer.name for layer in int8_risk(proto, granularity="per-channel").layers}
    assert names == set(convolutions(proto)) and "[excite]" in SMALL and "excite" not in names
    worst = int8_risk(proto, granularity="per-channel").layers[0].name
    noise = np.random.default_rng(1).standard_normal((8, 3, 16, 16), dtype=np.float32)
    typed = quantize(proto, noise, form="int8", keep_float=[worst])
    assert worst not in {layer.name for layer in worst_layers(proto, typed, noise)}


def test_an_onnx_file_of_one_image_at_a_time_is_read_too():
    proto = small_file()
    fixed = type(proto)()
    fixed.CopyFrom(proto)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    a, b = (int8_risk(p, granularity="per-tensor") for p in (proto, fixed))
    assert a.logit_snr_db == pytest.approx(b.logit_snr_db, abs=0.01)


def test_the_noise_is_smooth_seeded_and_of_variance_one():
    noise = noise_images((2, 32, 48))
    assert noise.shape == (64, 2, 32, 48) and noise.dtype == np.float32
    assert noise.std() == pytest.approx(1, abs=1e-3) and abs(noise.mean()) < 0.05
    neighbours = np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]
    assert neighbours > 0.7 and np.array_equal(noise, noise_images((2, 32, 48)))
    assert noise_images((3, 128, 128)).shape == (8, 3, 128, 128)  # no more: a second


# ----------------------------------------------------------------------- what it is for


def test_a_dead_channel_is_a_high_risk_and_its_cure_none():
    x = images(8, 3, 32, 32)
    model = kill_channels(tiny(widths=(16, 16, 16, 16), stem_width=16), x)
    risks = {
        (cure, granularity): int8_risk(
            fuse(model, cure=cure), granularity=granularity, image_shape=(3, 32, 32)
        )
        for cure in (True, False)
        for granularity in ("per-tensor", "per-channel")
    }
    sick, well = risks[False, "per-tensor"], risks[True, "per-tensor"]
    assert sick.verdict == "high" and sick.worst_column_sqnr_db < 1
    assert well.verdict == "low" and well.worst_column_sqnr_db > 15
    assert risks[False, "per-channel"].logit_snr_db > sick.logit_snr_db + 10
    assert risks[True, "per-channel"].verdict == "low"
    assert sick.layers[0].name in {"stages.1.1.conv", "stages.2.1.conv"}


@both
def test_the_more_unequal_the_channels_the_higher_the_risk(granularity):
    deploy = fuse(shake(tiny(widths=(16, 16, 16, 16), stem_width=16)))
    found = [
        int8_risk(
            stressed(copy.deepcopy(deploy), factor), granularity=granularity,
            image_shape=(3, 32, 32),
        )
        for factor in (1, 8, 64)
    ]  # fmt: skip
    for number in ("logit_snr_db", "worst_column_sqnr_db"):
        values = [getattr(risk, number) for risk in found]
        assert values == sorted(values, reverse=True) and values[0] > values[2] + 10


@pytest.mark.parametrize(
    ("logits_db", "column_db", "verdict"),
    [
        (math.inf, 0.0, "low"),
        (LOW_RISK_DB, 0.0, "low"),
        (LOW_RISK_DB - 0.1, 0.0, "medium"),
        (MEDIUM_RISK_DB, 0.0, "medium"),
        (MEDIUM_RISK_DB - 0.1, 0.0, "high"),
        (-math.inf, 0.0, "high"),
        (0.0, LOW_RISK_COLUMN_DB, "low"),
        (0.0, LOW_RISK_COLUMN_DB - 0.1, "medium"),
        (0.0, MEDIUM_RISK_COLUMN_DB, "medium"),
        (0.0, MEDIUM_RISK_COLUMN_DB - 0.1, "high"),
    ],
)
def test_the_verdict_follows_the_better_number(logits_db, column_db, verdict):
    layers = int8_risk(small_file(), granularity="per-tensor").layers
    risk = Risk(
        granularity="per-tensor", layers=layers, worst_column_sqnr_db=column_db,
        logit_snr_db=logits_db,
    )  # fmt: skip
    assert risk.verdict == verdict
    assert str(risk).startswith(f"int8 risk with per-tensor weights: {verdict} (logits ")
    assert (f"first to look at: {layers[0].name}" in str(risk)) == (verdict != "low")


# ----------------------------------------------------------------------- what is given


def test_a_network_is_left_untouched_and_may_be_in_train_form():
    model = shake(tiny()).train()
    before = copy.deepcopy(model.state_dict())
    first, second = (
        int8_risk(m, granularity="per-channel", image_shape=(3, 32, 32))
        for m in (model, fuse(model))
    )
    assert first == second
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


def test_the_size_of_the_noise_follows_from_the_network():
    one_channel = fuse(shake(tiny(in_chans=1)))
    given_shape = int8_risk(one_channel, granularity="per-tensor", image_shape=(1, 128, 128))
    assert int8_risk(one_channel, granularity="per-tensor") == given_shape


def test_a_network_in_half_precision_is_looked_at_too():
    model = fuse(shake(tiny()))
    shape = (3, 32, 32)
    a, b = (
        int8_risk(m, granularity="per-tensor", image_shape=shape)
        for m in (model, copy.deepcopy(model).half())
    )
    assert a.logit_snr_db == pytest.approx(b.logit_snr_db, abs=1)


def test_an_unknown_granularity_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"granularity 'per-chanel'; did you mean 'per-channel'"):
        int8_risk(tiny(), granularity="per-chanel")


def test_what_has_no_convolution_is_refused():
    with pytest.raises(UsageError, match="Linear has no convolution that int8 could round"):
        int8_risk(nn.Linear(3, 4), granularity="per-tensor")
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten())
    with pytest.raises(UsageError, match="Sequential has no convolution in front of its pooling"):
        int8_risk(pooled, granularity="per-tensor")


def test_a_file_that_is_8_bit_already_is_refused():
    noise = np.random.default_rng(1).standard_normal((8, 3, 16, 16), dtype=np.float32)
    typed = quantize(small_file(), noise, form="int8")
    with pytest.raises(UsageError, match="no convolution with float weights; give the fp32 file"):
        int8_risk(typed, granularity="per-tensor")


# ----------------------------------------------------------------------- litezoo quantize --dry-run


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    ("device", "granularities"),
    [
        (None, ["per-channel", "per-tensor"]),
        ("cpu", ["per-channel"]),
        ("npu-int8", ["per-tensor"]),
    ],
)
def test_a_dry_run_takes_the_scales_that_the_device_has(device, granularities):
    steps = []
    found = dry_run("repvgg_tiny", weights="random", device=device, progress=steps.append)
    assert [risk.granularity for risk in found.risks] == granularities
    assert (found.model, found.weights, found.dead) == ("repvgg_tiny", "random", ())
    assert steps == [
        "loading repvgg_tiny (random)",
        "fusing to deploy form",
        "rounding the weights",
    ]
    expected = int8_risk(
        load_source("repvgg_tiny", "random", ()).model,
        granularity=granularities[0],
        image_shape=(3, 64, 64),
    )
    assert found.risks[0] == expected


@pytest.mark.usefixtures("tiny_model")
def test_a_dry_run_says_which_channels_are_dead(monkeypatch):
    source = load_source("repvgg_tiny", "random", ())
    kill_channels(source.model, images(4, 3, 32, 32))
    monkeypatch.setattr(int8_risk_module, "load_source", lambda *_: source)
    found = dry_run("repvgg_tiny", weights="random")
    assert found.dead == fuse_with_report(source.model).dead != ()
    assert found.said[0].startswith("dead channel 0 of stages.")
    assert json.loads(json.dumps(found, default=_plain))["said"] == list(found.said)


# ----------------------------------------------------------------------- the table of the docs


def test_a_stressed_network_is_the_same_function():
    deploy = fuse(shake(tiny(widths=(16, 16, 16, 16), stem_width=16)).double())
    x = images(2, 3, 32, 32, dtype=torch.float64)
    twin = stressed(copy.deepcopy(deploy), 16.0, every=3)
    assert (twin(x) - deploy(x)).abs().max() <= 1e-9 * deploy(x).abs().max()
    assert not torch.equal(twin.stem[0].weight, deploy.stem[0].weight)


def test_the_tables_have_what_was_said_and_what_came_out():
    layers = int8_risk(small_file(), granularity="per-tensor").layers

    def rows(name, said, found):
        for granularity in ("per-tensor", "per-channel"):
            for seed, (snr, real) in enumerate(zip(said, found, strict=True)):
                risk = Risk(
                    granularity=granularity, layers=layers, worst_column_sqnr_db=snr,
                    logit_snr_db=snr,
                )  # fmt: skip
                yield name, seed, granularity, risk, (99.0, real, 100 - real, 95.0)

    lines = section([*rows("RepVGG", (1, 2, 23), (5, 6, 7)), *rows("Other", (29,), (0,))])
    lines = lines.splitlines()
    kin, everything = "RepVGG and its kin | per-tensor | 3", "all networks | per-channel | 4"
    assert f"| {kin} | worst column | 1.00 | 1.00 |" in lines
    assert f"| {everything} | logits on noise | -0.20 | -0.20 |" in lines
    assert "| high | 4 | 94.5 | 95.0 | 5.0 to 6.0 |" in lines
    assert "| low | 4 | 96.5 | 100.0 | 0.0 to 7.0 |" in lines
    assert not any(line.startswith("| medium") for line in lines)
    assert "| Other | 0 | per-tensor | 99.0 | 29.0 | 29.0 | low | 0.0 | 100.0 | 95.0 |" in lines


def test_a_killed_network_is_cured_by_fusing_alone():
    model = RepVGG(depths=(1, 1, 5, 1), **{**NARROW, "in_chans": 3})
    x = images(16, 3, 32, 32)
    killed = with_dead_channel(shake(model), x)
    rows = {row.branch: row for row in fuse_with_report(killed).dead}
    assert 0 in rows["stages.2.4.branch_identity"].channels
    assert (fuse(killed)(x) - killed(x)).abs().max() <= 1e-4 * killed(x).abs().max()
