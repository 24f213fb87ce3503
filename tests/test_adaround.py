"""AdaRound: what rounding it may choose, that it is better, and on what it looks."""

import itertools
import math
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.parser import parse_model
from test_correct_bias import conv, stack, values_of
from test_int8 import noise, run, small_file, small_int8

from litezoo.export import adaround as module
from litezoo.export.adaround import adaround, choose_rounding, rectified_sigmoid
from litezoo.export.compare import compare_logits, probe_layers, run_probe
from litezoo.export.qdq_lint import GraphIndex, lint
from litezoo.export.to_half import to_half
from litezoo.export.to_int8 import Form, convolutions, quantize, quantize_weight
from litezoo.models.errors import CheckFailed, UsageError

FORMS = get_args(Form)


def smooth(count, seed):
    """Return images whose pixels are like their neighbours: of noise, nearest is all but best."""
    coarse = noise(count, 3, 4, 4, seed=seed) + 0.5
    return (np.kron(coarse, np.ones((4, 4))) + 0.2 * noise(count, 3, 16, 16)).astype(np.float32)


IMAGES = smooth(24, seed=5)

#: Strides, dilations, groups, pads that differ on each side, no pads, no biases; ReLU and ReLU6.
ODD = """<ir_version: 10, opset_import: ["" : 20]>
odd (float[batch, 3, 16, 16] input) => (float[batch, 16, h, w] y3)
<float[8,3,3,2] w0, float[8] b0, float[16,4,3,3] w1, float[16,1,3,3] w2, float[16] b2,
 float[16,16,1,1] w3, float zero = {0.0}, float six = {6.0}>
{
  [c0] y0 = Conv <pads = [2,0,1,1], strides = [2,1]> (input, w0, b0)
  [r0] x0 = Relu (y0)
  [c1] y1 = Conv <dilations = [1,2], group = 2, pads = [0,2,0,1]> (x0, w1)
  [r1] x1 = Clip (y1, zero, six)
  [c2] y2 = Conv <group = 16, strides = [1,3], pads = [1,1,1,1]> (x1, w2, b2)
  [c3] y3 = Conv (y2, w3)
}"""


def odd():
    proto = parse_model(ODD)
    random = np.random.default_rng(1)
    for entry in proto.graph.value_info:
        shape = [d.dim_value for d in entry.type.tensor_type.shape.dim]
        if entry.name[0] in "wb" and shape:
            values = random.standard_normal(shape) * (2 / max(np.prod(shape[1:]), 2)) ** 0.5
            tensor = numpy_helper.from_array(values.astype(np.float32), entry.name)
            proto.graph.initializer.append(tensor)
    proto.graph.ClearField("value_info")
    return proto


def stored(proto, quantized, name):
    """Return the name and the values of a convolution's integers, and its scale by channel."""
    index = GraphIndex(quantized.graph)
    dequantize = index.producers[conv(quantized, name).input[1]]
    integers = index.values(dequantize.input[0])
    scale = np.broadcast_to(index.values(dequantize.input[1]).reshape(-1), len(integers))
    return dequantize.input[0], integers, scale.astype(np.float64)


def with_integers(proto, quantized, rounded):
    """Return the quantized file with other integers, by the names of the float weights."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in convolutions(proto):
        weight = conv(proto, name).input[1]
        if weight in rounded:
            tensor = tensors[stored(proto, quantized, name)[0]]
            tensor.CopyFrom(numpy_helper.from_array(rounded[weight], tensor.name))
    return model


def error(proto, quantized, name, low=-np.inf, high=np.inf):
    """Return each channel's squared error of a convolution's output in the quantized network."""
    probe, layers = probe_layers(proto, quantized)
    (layer,) = (layer for layer in layers if layer.name == name)
    names = [layer.float_output, layer.net_output]
    ((want, got),) = run_probe(probe, names, IMAGES, at_once=len(IMAGES))
    return ((got.clip(low, high) - want.clip(low, high)) ** 2).mean((0, 2, 3), dtype=np.float64)


# ------------------------------------------------------------------------------- the algebra
@given(values=st.lists(st.floats(-50, 50), min_size=2, max_size=20))
def test_the_rectified_sigmoid_rises_from_0_to_1_and_reaches_both(values):
    v = torch.tensor(sorted(values), dtype=torch.float64)
    h = rectified_sigmoid(v)
    assert ((h >= 0) & (h <= 1)).all() and (h.diff() >= 0).all()
    assert torch.allclose(h + rectified_sigmoid(-v), torch.ones_like(h))
    ends = rectified_sigmoid(torch.tensor([-2.5, -2.3, 0.0, 2.3, 2.5], dtype=torch.float64))
    assert ends[0] == 0 < ends[1] < ends[2] < ends[3] < 1 == ends[4]
    assert float(ends[2]) == pytest.approx(0.5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.integers(1, 3),
    out=st.integers(1, 4),
    depth=st.integers(1, 12),
    rows=st.integers(1, 300),
    per_channel=st.booleans(),
    bits=st.sampled_from([7, 8]),
    low=st.sampled_from([-math.inf, 0.0]),
)
def test_integers_stay_within_a_step_and_no_channels_error_rises(
    seed, groups, out, depth, rows, per_channel, bits, low
):
    random = np.random.default_rng(seed)
    weight = random.standard_normal((groups * out, depth, 1, 1)).astype(np.float32)
    weight[random.random(weight.shape) < 0.2] = 0
    nearest, scale = quantize_weight(weight, per_channel=per_channel, bits=bits)
    scale = np.broadcast_to(scale, (groups * out,)).reshape(groups, out)
    weight, nearest = (x.reshape(groups, out, depth) for x in (weight, nearest))
    bias = random.standard_normal((groups, out)).astype(np.float32)
    exact = random.standard_normal((groups, rows, depth)).astype(np.float32)
    inputs = exact + random.normal(0, 0.02, exact.shape).astype(np.float32)
    targets = exact @ weight.swapaxes(1, 2) + bias[:, None]

    def off(integers):
        got = inputs @ (integers * scale[..., None]).swapaxes(1, 2) + bias[:, None]
        return ((got.clip(low) - targets.clip(low)) ** 2).mean(1)

    found = choose_rounding(
        inputs, targets, weight, bias, scale, nearest, reach=(low, math.inf), steps=20
    )
    assert found.dtype == np.int8 and found.shape == nearest.shape
    assert (np.abs(found - weight / scale[..., None].astype(np.float64)) < 1).all()
    assert np.abs(found).max() <= np.abs(nearest).max() <= 2 ** (bits - 1) - 1
    assert (found[weight == 0] == 0).all()
    assert (off(found) <= off(nearest) * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_nearly_half_of_what_the_best_of_all_roundings_gains_is_gained(seed):
    random = np.random.default_rng(seed)
    weight = random.normal(0, 3, (1, 20, 8)).astype(np.float32)
    weight[..., 0] = 100  # so that no weight's neighbour is out of reach
    nearest = np.rint(weight).astype(np.int8)
    mix = random.standard_normal((8, 8)) * [[3.0], [2.0], *[[0.3]] * 6]  # inputs that go together
    inputs = (random.standard_normal((1, 1000, 8)) @ mix + 0.5).astype(np.float32)
    targets = inputs @ weight.swapaxes(1, 2)
    ones = np.ones((1, 20), np.float32)
    found = choose_rounding(inputs, targets, weight, 0 * ones, ones, nearest)
    moments = inputs[0].T @ inputs[0] / 1000

    def off(integers):
        return np.einsum("...i,ij,...j", integers - weight[0], moments, integers - weight[0])

    choices = np.array(list(itertools.product((0, 1), repeat=7)))
    choices = np.floor(weight[0]) + np.insert(choices, 0, 0, axis=1)[:, None]
    best = off(choices).min(axis=0).sum()
    left, all_of_it = (off(integers[0]).sum() - best for integers in (found, nearest))
    assert left < 0.6 * all_of_it


def test_what_a_relu_cuts_off_is_no_error():
    random = np.random.default_rng(0)
    weight = random.standard_normal((1, 4, 20)).astype(np.float32)
    nearest, scale = quantize_weight(weight[0, :, :, None, None], per_channel=True)
    given = (
        noise(1, 200, 20) + 1,
        (noise(1, 200, 20) + 1) @ weight.swapaxes(1, 2) - [0, 0, 1000, 1000],
        weight,
        np.array([[0, 0, -1000, -1000]], np.float32),
        scale[None],
        nearest.reshape(1, 4, 20),
    )
    cut, whole = (choose_rounding(*given, reach=(low, np.inf)) for low in (0.0, -np.inf))
    changed = [(found != given[-1]).any(axis=2)[0].tolist() for found in (cut, whole)]
    assert changed == [[True, True, False, False], [True] * 4]


# ------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
def test_each_kind_of_layers_error_falls_in_the_network_it_is_in(form, per_channel):
    proto = odd()
    quantized = quantize(proto, IMAGES, form=form, per_channel=per_channel)
    rounded = adaround(proto, quantized, IMAGES, steps=80)
    assert [*rounded] == ["w0", "w1", "w2", "w3"]
    limits = {"c0": (0, np.inf), "c1": (0, 6)}
    before = {}
    for name, (weight, integers) in zip(convolutions(proto), rounded.items(), strict=True):
        nearest = error(proto, with_integers(proto, quantized, before), name, *limits.get(name, ()))
        before[weight] = integers
        found = error(proto, with_integers(proto, quantized, before), name, *limits.get(name, ()))
        assert (found <= nearest * 1.001 + 1e-9).all(), name
        assert found.sum() < 0.99 * nearest.sum(), name
        _, old, scale = stored(proto, quantized, name)
        exact = values_of(proto)[weight] / scale[:, None, None, None]
        assert np.abs(integers - exact).max() < 1
        assert np.abs(integers).max() <= np.abs(old).max()


@pytest.mark.parametrize("form", FORMS)
def test_a_network_that_is_hard_to_quantize_comes_nearer_to_its_floats(form):
    proto = stack(8.0)
    quantized = quantize(proto, IMAGES, form=form, per_channel=False)
    model = with_integers(proto, quantized, adaround(proto, quantized, IMAGES, steps=100))
    fresh = smooth(32, seed=7)
    want = run(proto, fresh)
    before, after = (compare_logits(run(file, fresh), want).snr_db for file in (quantized, model))
    assert after > before + 5, (before, after)
    onnx.checker.check_model(model, full_check=True)
    assert form != "int8" or lint(model) == ()


def test_seven_bits_stay_seven():
    proto = stack()
    quantized = quantize(proto, IMAGES, form="int8-u8", weight_bits=7)
    rounded = adaround(proto, quantized, IMAGES, steps=20)
    assert max(np.abs(integers).max() for integers in rounded.values()) == 63


def test_the_same_seed_gives_the_same_and_each_layer_is_announced(monkeypatch):
    monkeypatch.setattr(module, "_ROWS_MIB", 0.3)  # so that positions are chosen
    proto, quantized = small_file(), small_int8()
    said = []
    first, second, other = (
        adaround(proto, quantized, IMAGES, steps=20, seed=seed, progress=said.append)
        for seed in (3, 3, 4)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)
    assert said[:6] == [f"AdaRound: layer {number} of 6" for number in range(1, 7)]
    assert first.keys() == {"w0", "w1", "w3", "w4", "w5", "w6"}  # the gate's is not quantized


@pytest.mark.parametrize("mib", [0.05, 0.5])
def test_what_is_kept_of_a_layer_fits_the_budget(monkeypatch, mib):
    sizes = []

    def spy(inputs, targets, *given, **options):
        sizes.append((inputs.shape, inputs.nbytes + targets.nbytes))
        return choose_rounding(inputs, targets, *given, **options)

    monkeypatch.setattr(module, "_ROWS_MIB", mib)
    monkeypatch.setattr(module, "_ROWS", 8)
    monkeypatch.setattr(module, "choose_rounding", spy)
    proto = stack()
    adaround(proto, quantize(proto, IMAGES, form="int8"), IMAGES, steps=1)
    assert max(size for _, size in sizes) <= mib * 2**20
    rows = [shape[1] for shape, _ in sizes]
    assert rows == [  # images times positions, the largest multiple of the images that fits
        min(side**2, int(mib * 2**20 / 4 / (depth + out)) // 24) * 24
        for side, depth, out in ((8, 27, 16), (8, 144, 16), (4, 144, 24), (4, 24, 24))
    ]


def test_a_shared_weight_and_pads_that_are_not_written_down_keep_their_integers():
    proto = stack()
    conv(proto, "c1").ClearField("attribute")
    conv(proto, "c1").attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))
    quantized = quantize(proto, IMAGES, form="int8")
    assert [*adaround(proto, quantized, IMAGES, steps=1)] == ["w0", "w2", "w3"]
    proto = stack()
    proto.graph.node.insert(8, helper.make_node("Conv", ["x3", "w3"], ["y"], name="again"))
    conv(proto, "pool").input[0] = "y"
    quantized = quantize(proto, IMAGES, form="int8")
    assert [*adaround(proto, quantized, IMAGES, steps=1)] == ["w0", "w1", "w2"]


def test_what_cannot_be_rounded_is_refused():
    proto, quantized = small_file(), small_int8()
    with pytest.raises(UsageError, match="has no quantized convolution"):
        adaround(proto, proto, IMAGES)
    with pytest.raises(UsageError, match="of the quantized file is not in the float file"):
        adaround(stack(), quantized, IMAGES)
    with pytest.raises(UsageError, match="c0 has other weights in the quantized file than in the"):
        adaround(stack(), quantize(stack(2.0), IMAGES, form="int8"), IMAGES)
    with pytest.raises(UsageError, match="holds 16-bit floats; give the 8-bit file"):
        adaround(proto, to_half(quantized, "bf16"), IMAGES)
    with pytest.raises(UsageError, match=r"images have shape \(3, 16, 16\)"):
        adaround(proto, quantized, IMAGES[0])
    with pytest.raises(UsageError, match="AdaRound takes 1 step or more, not 0"):
        adaround(proto, quantized, IMAGES, steps=0)
    with pytest.raises(CheckFailed, match="stem has NaN or infinite activations on the images"):
        adaround(proto, quantized, IMAGES * np.float32(np.inf))
