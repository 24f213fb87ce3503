"""Cross-layer equalisation: the same function, ranges that are alike, and what is left alone."""

import numpy as np
import pytest
import torch
from helpers import settle, shallow
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.parser import parse_model
from test_int8 import float_file, small_file

from litezoo.export.equalize import LARGEST_SCALE, equalize
from litezoo.export.to_int8 import quantize
from litezoo.export.to_onnx import export_onnx, load_onnx
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse

CHANNELS = 6


def images(count=4, channels=3, side=16, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((count, channels, side, side)).astype(np.float32)


def weights(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def between(body, extra="", seed=0):
    """Return a network in which `body` stands between the convolution `x` and the one of `y`."""
    proto = parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
    net (float[batch,3,16,16] input) => (float[batch,4] logits)
    <float[6,3,3,3] w0, float[6] b0, float[4,6,3,3] w1, float[4] b1, float[6,3,1,1] w2,
     float[6,1,3,3] wd, float[4,6] head, float zero = {{0.0}}, float six = {{6.0}},
     int64[2] axes = {{2, 3}}, float[6,1,1] slope {extra}>
    {{
      [first] x = Conv <pads = [1,1,1,1]> (input, w0, b0)
      {body}
      [last] z = Conv <pads = [1,1,1,1]> (y, w1, b1)
      [pool] logits = ReduceMean <keepdims = 0> (z, axes)
    }}""")
    random = np.random.default_rng(seed)
    shapes = {
        "w0": (6, 3, 3, 3), "b0": (6,), "w1": (4, 6, 3, 3), "b1": (4,), "w2": (6, 3, 1, 1),
        "wd": (6, 1, 3, 3), "head": (4, 6), "slope": (6, 1, 1),
    }  # fmt: skip
    read = {name for node in proto.graph.node for name in node.input}
    for name, shape in shapes.items():
        if name in read:
            values = random.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(values, name))
    proto.graph.ClearField("value_info")
    return proto


def scaled(proto, name, factors, axis=0):
    """Return a copy in which a weight's rows (axis 0) or columns (1) are multiplied."""
    twin = type(proto)()
    twin.CopyFrom(proto)
    for tensor in twin.graph.initializer:
        if tensor.name == name:
            value = numpy_helper.to_array(tensor)
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            tensor.CopyFrom(
                numpy_helper.from_array(
                    (value * np.reshape(factors, shape)).astype(np.float32), name
                )
            )
    return twin


RELU = "[act] y = Relu (x)"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.02, 50), min_size=CHANNELS, max_size=CHANNELS))
def test_a_rescaling_that_changes_nothing_is_undone(factors):
    factors = np.array(factors)
    plain = between(RELU)
    hard = scaled(scaled(scaled(plain, "w0", 1 / factors), "b0", 1 / factors), "w1", factors, 1)
    x = images()
    assert np.allclose(load_onnx(hard)(x), load_onnx(plain)(x), rtol=1e-3, atol=1e-4)
    one, other = (weights(equalize(proto, x).proto) for proto in (plain, hard))
    for name in ("w0", "w1"):  # up to one factor for all channels, which 8 bits do not see
        own, twin = (some[name] / np.abs(some[name]).max() for some in (one, other))
        assert np.allclose(own, twin, rtol=0.05, atol=0.02)


def test_a_channel_has_the_same_precision_where_it_is_made_and_where_it_is_read():
    result = equalize(scaled(between(RELU), "w0", [1, 0.1, 8, 1, 1, 0.02]), images())
    values = weights(result.proto)
    made = np.abs(values["w0"]).max((1, 2, 3))
    read = np.abs(values["w1"]).max((0, 2, 3))
    assert np.allclose(made / made.max(), read / read.max(), rtol=0.02)
    assert result.channels >= 5
    assert result.layers == 1
    assert 1 < result.largest_scale <= LARGEST_SCALE
    assert "rescaled" in result.said


@pytest.mark.parametrize(
    "body",
    [
        RELU,
        "[act] y = LeakyRelu <alpha = 0.1> (x)",
        "[act] y = PRelu (x, slope)",
        "[act] a = Relu (x)  [pool2] y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)",
        "[act] a = Relu (x)  [pool2] y = AveragePool <kernel_shape = [3,3]> (a)",
        "[act] a = Relu (x)  [d] b = Conv <group = 6> (a, wd)  [act2] y = Relu (b)",
        "[o] b = Conv (input, w2)  [join] c = Add (x, b)  [act] y = Relu (c)",
        "[act] a = Relu (x)  [m] g0 = ReduceMean <keepdims = 1> (a, axes)  "
        "[s] g = Sigmoid (g0)  [scale] y = Mul (a, g)",
    ],
    ids=["relu", "leaky", "prelu", "max pool", "mean pool", "depthwise", "sum", "gate"],
)
def test_the_function_is_the_same_whatever_stands_between(body):
    hard = scaled(between(body), "w0", [1, 0.1, 8, 1, 1, 0.02])
    result = equalize(hard, images())
    assert result.max_relative_error <= 1e-4
    is_gated = "Sigmoid" in body  # the gate reads what it scales: nothing may move
    assert (result.channels == 0) == is_gated
    x = images(seed=7)
    want = load_onnx(hard)(x)
    assert np.abs(load_onnx(result.proto)(x) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    "body",
    [
        "[act] y = Clip (x, zero, six)",
        "[act] y = HardSwish (x)",
        "[s] g = Sigmoid (x)  [act] y = Mul (x, g)",
        "[act] y = Mul (x, x)",
    ],
)
def test_what_is_not_homogeneous_keeps_its_channels_as_they_are(body):
    hard = scaled(between(body), "w0", [1, 0.1, 8, 1, 1, 0.02])
    result = equalize(hard, images())
    assert result.channels == 0
    assert "nothing to rescale" in result.said
    assert all(np.array_equal(v, weights(hard)[name]) for name, v in weights(result.proto).items())


def test_a_weight_that_two_layers_share_is_left_alone():
    proto = between("[act] a = Relu (x)  [twin] b = Conv (input, w2)  [join] y = Add (a, b)")
    shared = helper.make_node("Conv", ["input", "w2"], ["c"], "other")
    join = next(node for node in proto.graph.node if node.name == "join")
    proto.graph.node.insert(2, shared)
    proto.graph.node.insert(4, helper.make_node("Add", ["b", "c"], ["bc"], "join0"))
    join.input[1] = "bc"
    before = weights(proto)["w2"]
    assert np.array_equal(weights(equalize(proto, images()).proto)["w2"], before)


def test_channels_of_nothing_but_zeros_are_no_trouble():
    dead = scaled(scaled(between(RELU), "w0", [0, 1, 1, 1, 1, 1]), "w1", [1, 0, 1, 1, 1, 1], 1)
    result = equalize(dead, images())
    assert all(np.isfinite(v).all() for v in weights(result.proto).values())
    assert result.largest_scale <= LARGEST_SCALE


def random_member(name):
    """Return a member of the zoo of few blocks, of its own."""
    torch.manual_seed(0)
    return settle(shallow(get_spec(name)).build(num_classes=10))


@pytest.mark.parametrize(
    "name",
    [
        "repvgg_a0", "mobilenetv2_100", "resnet50", "ese_vovnet19b_dw", "shufflenetv2_x1_0",
        "mobilenetv3_small_050", "cspresnet50",
    ],
)  # fmt: skip
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_zoo_s_networks_compute_the_same(name, per_channel):
    x = np.random.default_rng(1).standard_normal((4, 3, 64, 64)).astype(np.float32)
    if name in ("ese_vovnet19b_dw", "shufflenetv2_x1_0", "cspresnet50"):
        proto = export_onnx(fuse(random_member(name)), x[:2], metadata={})
    else:
        proto = float_file(name)
    result = equalize(proto, x, per_channel=per_channel)
    assert result.max_relative_error <= 1e-4
    assert result.channels > 0
    names = [node.name for node in proto.graph.node]
    assert [node.name for node in result.proto.graph.node] == names


def test_a_network_that_8_bits_ruin_is_brought_back():
    torch.manual_seed(0)
    deploy = fuse(random_member("repvgg_a0"))
    from measure_int8_risk import stressed

    x = np.random.default_rng(1).standard_normal((8, 3, 64, 64)).astype(np.float32)
    proto = export_onnx(stressed(deploy, 64, every=8), x[:2], metadata={})
    want = load_onnx(proto)(x)

    def noise(float_proto, per_channel):
        typed = quantize(float_proto, x, form="int8", per_channel=per_channel)
        return np.sum((load_onnx(typed)(x) - want) ** 2)

    for per_channel in (True, False):
        equal = equalize(proto, x, per_channel=per_channel).proto
        assert noise(equal, per_channel) < 0.1 * noise(proto, per_channel)


def test_a_quantized_file_is_refused():
    typed = quantize(small_file(), images(), form="int8")
    with pytest.raises(UsageError, match="this ONNX file is quantized"):
        equalize(typed, images())
