"""Limits: each rule finds what it names and nothing else; each rewrite computes the same."""

import dataclasses

import numpy as np
import onnx
import pytest
from helpers import shallow
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, numpy_helper, parser
from torch import nn

import litezoo
from litezoo.export.limits import _FINDERS, _INSTEAD, apply_rewrites, check_limits
from litezoo.export.to_onnx import OPSET, export_onnx, load_onnx, simplify_onnx
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import UsageError
from litezoo.models.layers import SqueezeExcite
from litezoo.models.shuffle import with_shuffle_form
from litezoo.recipes.devices import PATTERNS, Device, Limits, get_device, list_devices

HARD = "alpha: float = 0.16666667, beta: float = 0.5"


def device(**limits):
    """Return a device of these limits, every one with a source."""
    sources = {f"limits.{key}": "data sheet" for key in limits}
    return Device(
        name="chip", title="A chip", kind="npu", runtimes=("onnxruntime",),
        precisions=("int8", "fp32"), limits=Limits(**limits), sources=sources,
    )  # fmt: skip


def graph(body, *, output="N, 8, 6, 6", weights=(), seed=0, opset=OPSET, **constants):
    """Return a model of ONNX text: x (N, 8, 6, 6) to y, with constants by name."""
    text = (
        f'<ir_version: 10, opset_import: ["": {opset}]> '
        f"net (float[N, 8, 6, 6] x) => (float[{output}] y) {{ {body} }}"
    )
    model = parser.parse_model(text)
    random = np.random.RandomState(seed)
    for name, shape in dict(weights).items():
        constants[name] = random.randn(*shape).astype(np.float32)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    checker.check_model(model, full_check=True)
    return model


def f32(value):
    return np.float32(value)


def i64(*values):
    return np.array(values, np.int64)


def check(model, chip, *, dynamic=False, precision="int8"):
    return check_limits(model, chip, dynamic=dynamic, precision=precision)


def only(findings):
    (finding,) = findings
    return finding


def same(model, other, *, batch=1, tolerance=0.0, shape=(8, 6, 6), scale=4.0):
    """Assert that two models give the same for one random batch."""
    x = np.random.RandomState(1).randn(batch, *shape).astype(np.float32) * f32(scale)
    got, want = load_onnx(other)(x), load_onnx(model)(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# ----------------------------------------------------------------------- graphs by pattern

DENSE = graph("y = Conv (x, w)", weights={"w": (8, 8, 1, 1)})
DEPTHWISE = graph("y = Conv <group = 8> (x, w)", weights={"w": (8, 1, 1, 1)})
GROUPED = graph("y = Conv <group = 2> (x, w)", weights={"w": (8, 4, 1, 1)})
SHUFFLE_5D = graph(
    "a = Reshape (x, s) b = Transpose <perm = [0, 2, 1, 3, 4]> (a) y = Reshape (b, t)",
    s=i64(-1, 2, 4, 6, 6), t=i64(-1, 8, 6, 6),
)  # fmt: skip
SHUFFLE_4D = graph(
    "a = Reshape (x, s) b = Transpose <perm = [0, 2, 1, 3]> (a) y = Reshape (b, t)",
    s=i64(-1, 2, 4, 36), t=i64(-1, 8, 6, 6),
)  # fmt: skip
SHUFFLE_GATHER = graph("y = Gather <axis = 1> (x, s)", s=i64(0, 4, 1, 5, 2, 6, 3, 7))
PICKED = graph("y = Gather <axis = 1> (x, s)", s=i64(0, 0, 1, 5, 2, 6, 3, 7))
HARD_SWISH = graph("y = HardSwish (x)")
HARD_SWISH_PARTS = graph(
    "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, six)",
    three=f32(3), zero=f32(0), six=f32(6),
)  # fmt: skip
HARD_SIGMOID = graph("y = HardSigmoid <alpha = 0.3, beta = 0.4> (x)")
RELU6 = graph("y = Clip (x, zero, six)", zero=f32(0), six=f32(6))
SILU = graph("a = Sigmoid (x) y = Mul (a, x)")
SIGMOID = graph("y = Sigmoid (x)")
LEAKY = graph("y = LeakyRelu <alpha = 0.1> (x)")
RELU = graph("y = Relu (x)")
SE_WEIGHTS = {"w": (4, 8, 1, 1), "v": (8, 4, 1, 1)}


def squeeze_excite(*, pool="GlobalAveragePool (x)", act="r = Relu (q)", gate="g = Sigmoid (e)"):
    body = f"p = {pool} q = Conv (p, w) {act} e = Conv (r, v) {gate} y = Mul (x, g)"
    used = {"axes": i64(2, 3), "three": f32(3), "zero": f32(0), "six": f32(6)}
    return graph(
        body, weights=SE_WEIGHTS, **{k: v for k, v in used.items() if k in body.replace("(", " ")}
    )


SE = squeeze_excite()
SE_HARD = squeeze_excite(pool="ReduceMean (x, axes)", gate="g = HardSigmoid (e)")
SE_PARTS = squeeze_excite(gate="f = Add (e, three) h = Clip (f, zero, six) g = Div (h, six)")
SE_SILU = squeeze_excite(act="o = Sigmoid (q) r = Mul (q, o)")
SCALED = graph("p = GlobalAveragePool (x) g = Sigmoid (p) y = Mul (x, g)")  # no layer between


@pytest.mark.parametrize(
    ("rule", "has", "has_not"),
    [
        ("depthwise-conv", [DEPTHWISE], [DENSE, GROUPED]),
        ("grouped-conv", [GROUPED], [DENSE, DEPTHWISE]),
        ("shuffle-5d", [SHUFFLE_5D], [SHUFFLE_4D, SHUFFLE_GATHER]),
        ("channel-shuffle", [SHUFFLE_5D, SHUFFLE_4D, SHUFFLE_GATHER], [PICKED, DENSE]),
        ("hard-swish", [HARD_SWISH, HARD_SWISH_PARTS], [HARD_SIGMOID, RELU6, SILU]),
        ("silu", [SILU], [SIGMOID, HARD_SWISH_PARTS, SE]),
        ("leaky-relu", [LEAKY], [RELU]),
        ("squeeze-excite", [SE, SE_HARD, SE_PARTS, SE_SILU], [SILU, HARD_SWISH_PARTS, SCALED]),
        ("HardSwish", [HARD_SWISH], [HARD_SWISH_PARTS]),
        ("Sigmoid", [SIGMOID, SILU, SE], [SE_HARD]),
    ],
)
@pytest.mark.parametrize("kind", ["forbidden", "slow"])
def test_a_rule_finds_what_it_names_and_nothing_else(rule, has, has_not, kind):
    chip = device(**{kind: {rule: "the data sheet says so"}})
    for model in has:
        finding = only(check(model, chip))
        assert (finding.kind, finding.rule, finding.count) == (kind, rule, 1)
        assert "the data sheet says so" in finding.message and finding.remedy
        assert finding.layers[0] in {node.name for node in model.graph.node}
        assert finding.layers[0] in str(finding)
    for model in has_not:
        assert check(model, chip) == ()


def test_every_pattern_of_a_device_file_has_a_finder():
    assert set(PATTERNS) == set(_FINDERS)


def test_what_is_named_instead_is_in_the_zoo():
    words = " ".join(_INSTEAD.values()).replace(",", " ").replace("(for", "").split()
    names = {word.strip("()") for word in words if any(map(str.isdigit, word))} - {"g2", "g4"}
    assert names and names <= set(litezoo.list_models())
    assert set(PATTERNS) <= set(_INSTEAD)


def test_every_operator_that_a_device_file_names_is_one():
    for name in list_devices():
        limits = get_device(name).limits
        for rule in (*limits.forbidden, *limits.slow):
            assert rule in PATTERNS or onnx.defs.has(rule), (name, rule)


def test_an_operator_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="unknown operator 'Hardswish'; did you mean 'HardSwish'"):
        check(RELU, device(forbidden={"Hardswish": "a slip"}))


def test_many_layers_are_counted_and_the_first_named():
    body = " ".join(f"a{i + 1} = Relu (a{i})" for i in range(9)).replace("(a0)", "(x)")
    model = graph(body + " y = Relu (a9)")
    finding = only(check(model, device(forbidden={"Relu": "none here"})))
    assert finding.count == 10 and finding.layers == tuple(f"node_a{i}" for i in range(1, 6))
    assert str(finding).count("node_a") == 5 and "node_a5, ...]" in str(finding)


# ----------------------------------------------------------------------- the other limits


@pytest.mark.parametrize(
    ("model", "odd"),
    [
        (graph("y = Conv (x, w)", weights={"w": (12, 8, 1, 1)}, output="N, 12, 6, 6"), True),
        (graph("a = Conv (x, v) y = Conv (a, w)", weights={"v": (12, 8, 1, 1), "w": (8, 12, 1, 1)}),
         True),
        (GROUPED, True),  # 4 channels a group
        (DEPTHWISE, False),
        (DENSE, False),
    ],
)  # fmt: skip
def test_channels_that_are_no_multiple_are_found(model, odd):
    findings = check(model, device(channel_multiple=8))
    assert [f.kind for f in findings] == (["channels"] if odd else [])
    assert all("multiple of 8" in f.message for f in findings)
    assert check(model, device(channel_multiple=4)) == ()


def test_the_image_may_have_three_channels():
    text = "net (float[N, 3, 6, 6] x) => (float[N, 8, 6, 6] y) { y = Conv (x, w) }"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {OPSET}]> {text}')
    weight = np.ones((8, 3, 1, 1), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    assert check(model, device(channel_multiple=8)) == ()


def test_a_slope_that_the_device_has_not_is_found():
    chip = device(leaky_relu_slopes=(0.1, 0.125))
    assert check(LEAKY, chip) == ()
    finding = only(check(graph("y = LeakyRelu (x)"), chip))  # ONNX's own default
    assert finding.kind == "forbidden" and "slope 0.01" in finding.message
    assert "0.1, 0.125" in finding.remedy and not finding.fixed


def test_an_open_batch_is_fixed_unless_it_was_asked_for():
    chip = device(static_shapes=True)
    finding = only(check(RELU, chip))
    assert finding.kind == "dynamic" and finding.fixed and "leaves N open" in finding.message
    assert not only(check(RELU, chip, dynamic=True)).fixed
    assert check(RELU, device()) == check(RELU, device(), dynamic=True) == ()
    static, said = apply_rewrites(RELU, chip)
    assert said == ("batch fixed to 1",) and check(static, chip) == ()


def test_an_open_image_size_is_not_fixed():
    text = "net (float[N, 8, H, W] x) => (float[N, 8, H, W] y) { y = Relu (x) }"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {OPSET}]> {text}')
    finding = only(check(model, device(static_shapes=True)))
    assert not finding.fixed and "leaves N, H, W open" in finding.message
    assert "one image size" in finding.remedy


def test_a_precision_that_the_device_has_not_is_found():
    finding = only(check(RELU, device(), precision="bf16"))
    assert finding.kind == "precision" and "chip has no bf16" in str(finding)
    assert "int8, fp32" in finding.remedy
    assert check(RELU, device(), precision="fp32") == ()


def test_one_scale_for_all_weights_that_loses_a_channel_is_found():
    weight = np.ones((8, 8, 1, 1), np.float32)
    weight[3] *= 1 / 300  # below half a step of 1/127
    weight[4] = 0  # no information to lose
    model = graph("y = Conv (x, w)", w=weight)
    finding = only(check(model, device(quantization="per-tensor")))
    assert finding.kind == "precision" and finding.layers == ("node_y",)
    assert check(model, device(quantization="per-tensor"), precision="fp32") == ()
    assert check(model, device(quantization="per-channel")) == ()
    weight[3] *= 2
    model = graph("y = Conv (x, w)", w=weight)
    assert check(model, device(quantization="per-tensor")) == ()


def test_an_opset_above_the_limit_is_found():
    finding = only(check(HARD_SWISH, device(opset_max=11)))
    assert finding.kind == "opset" and finding.fixed and "opset 11" in finding.message
    assert check(HARD_SWISH, device(opset_max=OPSET)) == ()
    gelu = graph("y = Gelu (x)")  # exists from opset 20
    finding = only(check(gelu, device(opset_max=11)))
    assert not finding.fixed and "no form" in finding.remedy
    assert not only(check(RELU, device(opset_max=10))).fixed


# ----------------------------------------------------------------------- rewrites


@pytest.mark.parametrize(
    ("model", "rule", "parts"),
    [
        (HARD_SWISH, "HardSwish", {"Add", "Clip", "Mul"}),
        (HARD_SIGMOID, "HardSigmoid", {"Add", "Clip", "Mul"}),
        (SE_HARD, "HardSigmoid", {"Add", "Clip"}),
        (SHUFFLE_5D, "shuffle-5d", {"Reshape", "Transpose"}),
    ],
)
def test_a_forbidden_operator_is_written_in_an_equal_way(model, rule, parts):
    before = model.SerializeToString()
    chip = device(forbidden={rule: "not there"})
    assert only(check(model, chip)).fixed
    rewritten, said = apply_rewrites(model, chip)
    assert rule in only(said) and "1 times" in only(said)
    assert model.SerializeToString() == before and check(rewritten, chip) == ()
    assert parts <= {node.op_type for node in rewritten.graph.node}
    for batch in (1, 3):
        same(model, rewritten, batch=batch, tolerance=3e-7)
    used = {name for node in rewritten.graph.node for name in node.input}
    assert {tensor.name for tensor in rewritten.graph.initializer} <= used


def test_a_rewrite_whose_parts_are_forbidden_is_not_made():
    chip = device(forbidden={"HardSwish": "none", "Clip": "none"})
    assert apply_rewrites(HARD_SWISH, chip) == (HARD_SWISH, ())
    finding = only(check(HARD_SWISH, chip))
    assert not finding.fixed and "tf_mobilenetv3_large_minimal_100" in finding.remedy


def test_a_hard_sigmoid_that_falls_is_not_rewritten():
    model = graph("y = HardSigmoid <alpha = -0.2> (x)")
    chip = device(forbidden={"HardSigmoid": "none"})
    assert apply_rewrites(model, chip)[0] is model and not only(check(model, chip)).fixed


def test_nothing_to_do_gives_the_model_itself():
    chip = device(forbidden={"HardSwish": "none", "shuffle-5d": "none"}, opset_max=OPSET)
    model, said = apply_rewrites(SHUFFLE_4D, chip)
    assert model is SHUFFLE_4D and said == ()


def test_a_shuffle_whose_middle_is_read_elsewhere_stays():
    body = (
        "a = Reshape (x, s) b = Transpose <perm = [0, 2, 1, 3, 4]> (a) c = Reshape (b, t) "
        "d = Reshape (a, t) y = Add (c, d)"
    )
    model = graph(body, s=i64(-1, 2, 4, 6, 6), t=i64(-1, 8, 6, 6))
    chip = device(forbidden={"shuffle-5d": "none"})
    assert apply_rewrites(model, chip)[0] is model and not only(check(model, chip)).fixed


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(2, 6), width=st.integers(1, 5), height=st.integers(1, 5),
    columns=st.integers(1, 5), batch=st.integers(1, 3), is_open=st.booleans(),
)  # fmt: skip
def test_a_shuffle_in_four_dimensions_is_the_same_to_the_bit(
    groups, width, height, columns, batch, is_open
):
    shape = (groups * width, height, columns)
    size = "N" if is_open else str(batch)
    sizes = f"{size}, {', '.join(map(str, shape))}"
    text = (
        f'<ir_version: 10, opset_import: ["": {OPSET}]> net (float[{sizes}] x) => '
        f"(float[{sizes}] y) {{ a = Reshape (x, s) "
        "b = Transpose <perm = [0, 2, 1, 3, 4]> (a) y = Reshape (b, t) }"
    )
    model = parser.parse_model(text)
    first = -1 if is_open else batch
    for name, value in (("s", (first, groups, width, *shape[1:])), ("t", (first, *shape))):
        model.graph.initializer.append(numpy_helper.from_array(i64(*value), name))
    rewritten, said = apply_rewrites(model, device(forbidden={"shuffle-5d": "none"}))
    assert len(said) == 1
    assert all(len(v.type.tensor_type.shape.dim) < 5 for v in rewritten.graph.value_info)
    same(model, rewritten, batch=batch, shape=shape)


@settings(max_examples=25, deadline=None)
@given(
    slope=st.integers(1, 40).map(lambda n: n / 20),
    offset=st.integers(-20, 20).map(lambda n: n / 20), scale=st.sampled_from([0.1, 1, 50]),
)  # fmt: skip
def test_a_hard_sigmoid_of_any_rising_slope_is_equal_in_parts(slope, offset, scale):
    node = helper.make_node("HardSigmoid", ["x"], ["y"], alpha=slope, beta=offset)
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8, 6, 6]) for n in "xy"]
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        helper.make_graph([node], "net", value[:1], value[1:]), opset_imports=opset, ir_version=10
    )
    rewritten, _ = apply_rewrites(model, device(forbidden={"HardSigmoid": "none"}))
    x = np.random.RandomState(0).randn(2, 8, 6, 6).astype(np.float32) * f32(scale)
    error = np.abs(load_onnx(model)(x) - load_onnx(rewritten)(x)).max()
    assert error <= 1e-6 * max(1, float(np.abs(x).max()) * slope)


@pytest.mark.parametrize(
    "body",
    [
        "a, b = Split <axis = 1> (x, s) y = Concat <axis = 1> (b, a)",
        "a, b = Split <axis = 1, num_outputs = 2> (x) y = Concat <axis = 1> (b, a)",
        "a = ReduceMean <keepdims = 1> (x, axes) y = Add (x, a)",
        "a = ReduceMean <keepdims = 0> (x, axes) b = Unsqueeze (a, axes) y = Add (x, b)",
        "a = GlobalAveragePool (x) b = Squeeze (a, axes) c = Unsqueeze (b, axes) y = Add (x, c)",
        "a = Reshape <allowzero = 1> (x, flat) y = Reshape (a, back)",
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], dilations = [1, 1]> (x)",
        "y = HardSwish (x)",
    ],
)
@pytest.mark.parametrize("version", [11, 13, 17])
def test_an_older_opset_computes_the_same(body, version):
    constants = {"s": i64(3, 5), "axes": i64(2, 3), "flat": i64(-1, 288), "back": i64(-1, 8, 6, 6)}
    words = body.replace(",", " ").replace(")", " ").replace("(", " ").split()
    model = graph(body, **{name: constants[name] for name in constants if name in words})
    lowered, said = apply_rewrites(model, device(opset_max=version))
    assert said == (f"opset {OPSET} written as opset {version}",)
    assert lowered.opset_import[0].version == version and len(lowered.opset_import) == 1
    assert lowered.ir_version == helper.find_min_ir_version_for(lowered.opset_import)
    checker.check_model(lowered, full_check=True)
    same(model, lowered, batch=3, tolerance=3e-7)


def test_a_reshape_to_no_elements_has_no_older_form():
    model = graph("y = Reshape <allowzero = 1> (x, s)", s=i64(0, 8, 6, 6), output="0, 8, 6, 6")
    assert not only(check(model, device(opset_max=11))).fixed


# ----------------------------------------------------------------------- real networks


@pytest.fixture(scope="module")
def network():
    """Return networks of the zoo as export writes them, their equal blocks left out, 64 pixels."""
    made = {}

    def make(name, form=None):
        if (name, form) not in made:
            model = litezoo.fuse(shallow(get_spec(name)).build(num_classes=7).eval())
            model = with_shuffle_form(model, form) if form else model
            x = np.random.RandomState(0).randn(2, 3, 64, 64).astype(np.float32)
            made[name, form] = simplify_onnx(export_onnx(model, x, metadata={}), x)[0]
        return made[name, form]

    return make


@pytest.mark.parametrize(
    ("name", "form", "forbidden", "slow"),
    [
        ("mobilenetv2_035", None, set(), set()),
        ("mobilenetv3_small_050", None, {"HardSwish", "HardSigmoid"},
         {"hard-swish", "squeeze-excite"}),
        ("shufflenetv2_x0_5", "5d", {"shuffle-5d"}, {"channel-shuffle"}),
    ],
)  # fmt: skip
def test_a_network_of_the_zoo_is_made_to_fit_the_smallest_chip(
    network, name, form, forbidden, slow
):
    model, chip = network(name, form), get_device("npu-int8")
    findings = check(model, chip)
    assert {f.rule for f in findings if f.kind == "forbidden"} == forbidden
    assert {f.rule for f in findings if f.kind == "slow"} == slow
    assert all(f.fixed for f in findings if f.kind in ("forbidden", "dynamic", "opset"))
    rewritten, said = apply_rewrites(model, chip)
    assert said[0] == "batch fixed to 1" and len(said) == 2 + len(forbidden)
    assert {f.kind for f in check(rewritten, chip)} <= {"slow", "precision"}
    assert not any(v.type.tensor_type.shape.dim[0].dim_param for v in rewritten.graph.value_info)
    same(model, rewritten, shape=(3, 64, 64), scale=1, tolerance=1e-5 if forbidden else 0)
    assert apply_rewrites(rewritten, chip)[0] is rewritten


def test_squeeze_excite_of_a_real_network_is_counted(network):
    chip = device(slow={"squeeze-excite": "stalls", "hard-swish": "two passes"})
    counts = {f.rule: f.count for f in check(network("mobilenetv3_small_050"), chip)}
    modules = list(shallow(get_spec("mobilenetv3_small_050")).build().modules())
    pooled, switched = (
        sum(isinstance(m, kind) for m in modules) for kind in (SqueezeExcite, nn.Hardswish)
    )
    assert counts == {"squeeze-excite": pooled, "hard-swish": switched} and pooled >= 3


def test_a_network_without_what_a_gpu_is_bad_at_has_no_finding(network):
    model = network("mobilenetv2_035")
    kinds = {f.rule for f in check_limits(model, get_device("t4"), dynamic=True, precision="fp16")}
    assert kinds == {"depthwise-conv"}
    assert check_limits(DENSE, get_device("t4"), dynamic=True, precision="fp16") == ()


def test_a_finding_cannot_be_changed():
    finding = only(check(LEAKY, device(slow={"leaky-relu": "slow"})))
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.fixed = True
