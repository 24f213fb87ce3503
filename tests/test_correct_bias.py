"""Bias correction: what is added to which bias, what stays, what it is good for."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.parser import parse_model
from test_int8 import noise, run, small_file, small_int8

from litezoo.export.compare import compare_logits, probe_layers, run_probe
from litezoo.export.correct_bias import correct_bias
from litezoo.export.qdq_lint import lint
from litezoo.export.to_half import to_half
from litezoo.export.to_int8 import convolutions, quantize
from litezoo.models.errors import CheckFailed, UsageError

IMAGES = noise(16, 3, 16, 16, seed=5)

#: Four convolutions behind each other; one channel in eight is small and read by large weights.
STACK = """<ir_version: 10, opset_import: ["" : 20]>
stack (float[batch, 3, 16, 16] input) => (float[batch, 10] logits)
<float[16,3,3,3] w0, float[16] b0, float[16,16,3,3] w1, float[16] b1, float[24,16,3,3] w2,
 float[24] b2, float[24,24,1,1] w3, float[24] b3, float[10,24] w4, int64[2] axes = {2, 3}>
{
  [c0] y0 = Conv <pads = [1,1,1,1], strides = [2,2]> (input, w0, b0)
  [r0] x0 = Relu (y0)
  [c1] y1 = Conv <pads = [1,1,1,1]> (x0, w1, b1)
  [r1] x1 = Relu (y1)
  [c2] y2 = Conv <pads = [1,1,1,1], strides = [2,2]> (x1, w2, b2)
  [r2] x2 = Relu (y2)
  [c3] y3 = Conv (x2, w3, b3)
  [r3] x3 = Relu (y3)
  [pool] q = ReduceMean <keepdims = 0> (x3, axes)
  [head] logits = Gemm <transB = 1> (q, w4)
}"""


def stack(factor=1.0, text=STACK):
    """Return the network with random weights; `factor` makes it hard to quantize, not another."""
    proto = parse_model(text)
    random = np.random.default_rng(0)
    values = {}
    for entry in proto.graph.value_info:
        shape = [d.dim_value for d in entry.type.tensor_type.shape.dim]
        if entry.name[0] in "wb" and shape:
            spread = (2 / np.prod(shape[1:])) ** 0.5 if shape[1:] else 0.1
            values[entry.name] = random.standard_normal(shape) * spread
    for number in range(3):
        values[f"w{number}"][::8] /= factor
        values[f"b{number}"][::8] /= factor
        values[f"w{number + 1}"][:, ::8] *= factor
    tensors = (numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items())
    proto.graph.initializer.extend(tensors)
    proto.graph.ClearField("value_info")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def values_of(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def conv(proto, name):
    return next(node for node in proto.graph.node if node.name == name)


def with_biases_of(quantized, corrected):
    """Return the quantized file, its ranges as they are, with the biases of a float file."""
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    names = {name: conv(corrected, name).input[2] for name in convolutions(corrected)}
    kept = [t for t in model.graph.initializer if t.name not in names.values()]
    biases = [t for t in corrected.graph.initializer if t.name in names.values()]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept + biases)
    for name, bias in names.items():
        conv(model, name).input[2:] = [bias]
    return model


def mean_errors(proto, quantized, images):
    """Return each layer's mean error by channel, over the mean magnitude of its output."""
    probe, layers = probe_layers(proto, quantized)
    names = [name for layer in layers for name in (layer.float_output, layer.net_output)]
    (values,) = run_probe(probe, names, images, at_once=len(images))
    wants, gots = values[::2], values[1::2]
    return {
        layer.name: np.abs((want - got).mean((0, 2, 3), dtype=np.float64)).max()
        / np.abs(want).mean(dtype=np.float64)
        for layer, want, got in zip(layers, wants, gots, strict=True)
    }


@pytest.mark.parametrize("form", ["int8", "int8-u8"])
@pytest.mark.parametrize("create", [small_file, lambda: stack(8.0)], ids=["small", "stack"])
def test_no_layer_has_a_mean_error_left_behind_the_corrected_ones_before_it(form, create):
    proto = create()
    quantized = quantize(proto, IMAGES, form=form, per_channel=False)
    corrected = with_biases_of(quantized, correct_bias(proto, quantized, IMAGES))
    before, after = (mean_errors(proto, file, IMAGES) for file in (quantized, corrected))
    assert max(after.values()) < 1e-4 < min(before.values()), (before, after)


@settings(max_examples=8, deadline=None)
@given(count=st.integers(1, 70))
def test_all_images_weigh_the_same_however_many_run_at_once(count):
    proto, quantized = small_file(), small_int8()
    images = noise(70, 3, 16, 16, seed=6)[:count]
    images[: count // 2] *= 2
    probe, layers = probe_layers(proto, quantized)
    names = [layers[0].float_output, layers[0].lone_output]
    ((want, got),) = run_probe(probe, names, images, at_once=count)
    shift = values_of(correct_bias(proto, quantized, images))["b0"] - values_of(proto)["b0"]
    exact = (want - got).mean((0, 2, 3), dtype=np.float64)
    assert shift == pytest.approx(exact, abs=1e-6)


def test_a_convolution_without_a_bias_gets_one_and_all_else_is_as_it_was():
    proto, quantized = small_file(), small_int8()
    before = proto.SerializeToString()
    corrected = correct_bias(proto, quantized, IMAGES)
    assert proto.SerializeToString() == before
    old, new = values_of(proto), values_of(corrected)
    assert {*new} - {*old} == {"c5_bias", "c6_bias"}
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {"b0", "b1", "b3", "b4"}  # not the gate's, which stays in float
    for node, twin in zip(proto.graph.node, corrected.graph.node, strict=True):
        if node.name in ("body", "shortcut"):
            assert list(twin.input) == [*node.input, f"{node.output[0]}_bias"]
            twin.input[:] = node.input
        assert node == twin
    onnx.checker.check_model(corrected, full_check=True)
    assert lint(quantize(corrected, IMAGES, form="int8")) == ()


def test_a_bias_that_is_shared_stays_and_the_layers_behind_it_make_up_for_it():
    proto = stack(8.0)
    conv(proto, "c1").input[2] = "b0"
    quantized = quantize(proto, IMAGES, form="int8", per_channel=False)
    model = correct_bias(proto, quantized, IMAGES)
    old, new = values_of(proto), values_of(model)
    assert np.array_equal(old["b0"], new["b0"])
    corrected = with_biases_of(quantized, model)
    errors = mean_errors(proto, corrected, IMAGES)
    assert min(errors["c0"], errors["c1"]) > 1e-4 > max(errors["c2"], errors["c3"])


def test_a_bias_in_a_constant_node_is_corrected_there():
    proto = stack(8.0)
    want = values_of(correct_bias(proto, quantize(proto, IMAGES, form="int8"), IMAGES))["b1"]
    (tensor,) = (t for t in proto.graph.initializer if t.name == "b1")
    node = helper.make_node("Constant", [], ["b1"], "constant", value=tensor)
    proto.graph.initializer.remove(tensor)
    proto.graph.node.insert(0, node)
    corrected = correct_bias(proto, quantize(proto, IMAGES, form="int8"), IMAGES)
    got = numpy_helper.to_array(conv(corrected, "constant").attribute[0].t)
    assert got == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize("form", ["int8", "int8-u8", "int8-u8s8"])
def test_logits_come_nearer_to_the_float_networks(form):
    proto = stack(8.0)
    options = {"form": form, "per_channel": False}
    quantized = quantize(proto, IMAGES, **options)
    better = quantize(correct_bias(proto, quantized, IMAGES), IMAGES, **options)
    fresh = noise(32, 3, 16, 16, seed=7)
    want = run(proto, fresh)
    before, after = (compare_logits(run(file, fresh), want).snr_db for file in (quantized, better))
    assert after > before + 3, (before, after)


def test_what_cannot_be_corrected_is_refused():
    proto, quantized = small_file(), small_int8()
    with pytest.raises(UsageError, match="has no quantized convolution"):
        correct_bias(proto, proto, IMAGES)
    with pytest.raises(UsageError, match="of the quantized file is not in the float file"):
        correct_bias(stack(), quantized, IMAGES)
    with pytest.raises(UsageError, match="holds 16-bit floats; give the 8-bit file"):
        correct_bias(proto, to_half(quantized, "fp16"), IMAGES)
    with pytest.raises(UsageError, match=r"images have shape \(3, 16, 16\)"):
        correct_bias(proto, quantized, IMAGES[0])
    with pytest.raises(CheckFailed, match="stem gives NaN or infinite outputs on the images"):
        correct_bias(proto, quantized, IMAGES * np.float32(np.inf))
    clash = onnx.ModelProto()
    clash.CopyFrom(proto)
    clash.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "c5_bias"))
    with pytest.raises(UsageError, match="already has a tensor c5_bias"):
        correct_bias(clash, quantized, IMAGES)
