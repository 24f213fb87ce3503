"""Profile: counts are PyTorch's and the catalogue's, kernels are those of runtimes, rules hold."""

import copy
import dataclasses
import html
import json
import math
import re
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from helpers import shallow
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import litezoo
from litezoo.benchmarks import ceilings as ceilings_module
from litezoo.benchmarks import roofline as roofline_module
from litezoo.benchmarks.draw_roofline import write_roofline
from litezoo.benchmarks.findings import LEAST_SHARE, RULES, design_findings, read_limits
from litezoo.benchmarks.graph import KINDS, Convolution, Layer, fix_input, read_costs
from litezoo.benchmarks.profiling import PRECISIONS, profile
from litezoo.benchmarks.roofline import LayerTime, Roof, read_roof, why_no_times
from litezoo.export.limits import check_limits
from litezoo.export.to_int8 import quantize
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.layers import ConvBN
from litezoo.models.repvgg import RepVGGBlock
from litezoo.recipes.devices import Device, Limits, get_device

OPSET = 20


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where no ceilings were measured."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def onnx_model(body, *, inputs="float[1, 8, 6, 6] x", outputs="y", opset=OPSET, **constants):
    """Return a model of ONNX text; a tuple stands for float32 weights of that shape."""
    results = ", ".join(f"float[] {name}" for name in outputs.split())
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> net ({inputs}) => ({results}) {{ {body} }}'
    )
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    for name, value in constants.items():
        array = np.ones(value, np.float32) if isinstance(value, tuple) else np.asarray(value)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = node.output[0]
    shaped = onnx.shape_inference.infer_shapes(model).graph.output  # a checker wants them
    for value, known in zip(model.graph.output, shaped, strict=True):
        value.CopyFrom(known)
    return model


def costs(model):
    return read_costs(model, name="net.onnx")


def kernels(body, **options):
    """Return the operators of each fused kernel, in order."""
    return [layer.operators for layer in costs(onnx_model(body, **options)).fused]


def i64(*values):
    return np.array(values, np.int64)


def f32(value):
    return np.float32(value)


def flops_of_torch(function, *shapes):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*(torch.empty(shape) for shape in shapes))
    return counter.get_total_flops()


# ------------------------------------------------------------------------------- counting


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 2), st.integers(0, 1),
    st.booleans(),
)  # fmt: skip
def test_convolutions_count_as_in_torch(batch, ins, outs, groups, window, stride, pad, transposed):
    shape = (batch, ins * groups, 7, 9)
    weight = (shape[1], outs, *window) if transposed else (outs * groups, ins, *window)
    options = {"stride": stride, "padding": pad, "groups": groups}
    torchs = F.conv_transpose2d if transposed else F.conv2d
    text = (
        f"y = {'ConvTranspose' if transposed else 'Conv'} <strides = [{stride}, {stride}], "
        f"pads = [{pad}, {pad}, {pad}, {pad}], group = {groups}> (x, w)"
    )
    sizes = ", ".join(map(str, shape))
    if pad and min(window) == 1 and transposed:
        return  # torch refuses what ends up empty
    (layer,) = costs(onnx_model(text, inputs=f"float[{sizes}] x", w=weight)).fused
    assert layer.flops == flops_of_torch(lambda x, w: torchs(x, w, **options), shape, weight)
    assert layer.flops == 2 * layer.macs
    assert layer.params == math.prod(weight)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.booleans(), st.booleans())
def test_matrix_products_count_as_in_torch(sizes, flipped_a, flipped_b):
    batch, rows, inner, columns = sizes
    a = (inner, rows) if flipped_a else (rows, inner)
    b = (columns, inner) if flipped_b else (inner, columns)
    text = f"y = Gemm <transA = {int(flipped_a)}, transB = {int(flipped_b)}> (x, w)"
    (layer,) = costs(onnx_model(text, inputs=f"float[{a[0]}, {a[1]}] x", w=b)).fused
    assert layer.flops == flops_of_torch(torch.mm, (rows, inner), (inner, columns))
    (layer,) = costs(
        onnx_model("y = MatMul (x, z)", inputs=f"float[{batch}, {rows}, {inner}] x, "
                   f"float[{batch}, {inner}, {columns}] z")
    ).fused  # fmt: skip
    assert layer.flops == flops_of_torch(torch.bmm, (batch, rows, inner), (batch, inner, columns))


def test_bytes_are_weights_inputs_and_outputs_each_once():
    model = onnx_model("c = Conv (x, w, b) a = Add (c, x) y = Relu (a)", w=(8, 8, 1, 1), b=(8,))
    unfused, fused = costs(model).unfused, costs(model).fused
    image, weights = 4 * 8 * 36, 4 * (64 + 8)
    assert [layer.memory_bytes for layer in unfused] == [weights + 2 * image, 3 * image, 2 * image]
    (kernel,) = fused  # x is the convolution's input and the residual: read once
    assert (kernel.weight_bytes, kernel.input_bytes, kernel.output_bytes) == (
        weights, image, image,
    )  # fmt: skip
    assert kernel.operators == ("Conv", "Add", "Relu") and kernel.params == 72
    assert kernel.intensity == kernel.flops / (weights + 2 * image)
    assert costs(model).params == 72


def test_a_tensor_that_is_read_twice_counts_once():
    (layer,) = costs(onnx_model("y = Mul (x, x)")).fused
    assert (layer.input_bytes, layer.output_bytes) == (4 * 8 * 36, 4 * 8 * 36)


def test_a_slice_reads_what_it_writes():
    (layer,) = costs(
        onnx_model("y = Slice (x, a, b, c)", a=i64(0), b=i64(2), c=i64(1))
    ).fused  # fmt: skip
    assert layer.input_bytes == layer.output_bytes == 4 * 2 * 36 and layer.kind == "move"


def test_equal_biases_stored_once_are_parameters_of_each_layer():
    """Exporters merge equal constants: biases of zeros, BatchNorms that are fresh."""
    two = "c = Conv (x, w, b) y = Conv (c, v, b)"
    assert costs(onnx_model(two, w=(8, 8, 1, 1), v=(8, 8, 3, 3), b=(8,))).params == 640 + 16
    shared = "c = Conv (x, w, b) y = Conv (c, w, b)"
    assert costs(onnx_model(shared, w=(8, 8, 1, 1), b=(8,))).params == 64 + 8
    norms = "c = BatchNormalization (x, s, s, s, s) y = BatchNormalization (c, s, s, s, s)"
    assert costs(onnx_model(norms, s=(8,))).params == 2 * 8


def test_running_statistics_and_single_numbers_are_no_parameters():
    text = "a = BatchNormalization (x, g, b, m, v) h = Mul (a, half) c = Clip (h, low, high) "
    model = onnx_model(
        text + "y = Add (c, shift)", g=(8,), b=(8,), m=(8,), v=(8,), shift=(8, 1, 1),
        half=f32(0.5), low=f32(0), high=f32(6),
    )  # fmt: skip
    assert costs(model).params == 8 + 8 + 8
    (layer,) = costs(model).fused
    assert layer.weight_bytes == 4 * 5 * 8


@pytest.mark.parametrize(
    ("words", "body", "options"),
    [
        ("is a LSTM, whose multiply-adds", "y, h, c = LSTM <hidden_size = 3> (x, w, r)",
         {"inputs": "float[2, 1, 4] x", "w": (1, 12, 4), "r": (1, 12, 3)}),
        ("the shape of a, which a (NonZero) makes is not known",
         "a = NonZero (x) y = Cast <to = 1> (a)", {}),
        ("y is of type float8e4m3fn", "y = Cast <to = 17> (x)", {"typed": 17}),
        ("does not work at this size", "y = Add (x, s)", {"s": (1, 7, 1, 1)}),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused_in_a_sentence(words, body, options):
    kind = options.pop("typed", None)
    model = onnx_model(body, **options)
    if kind:
        model.graph.output[0].type.tensor_type.elem_type = kind
    with pytest.raises(UsageError, match=re.escape(words)):
        costs(model)


def test_an_operator_of_a_runtime_is_refused():
    model = onnx_model("y = Relu (x)")
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(UsageError, match=r"com\.microsoft\.Relu, which ONNX does not define"):
        costs(model)


# ------------------------------------------------------------------------------- fusing

CONV = "c = Conv (x, w) "
W = {"w": (8, 8, 1, 1)}
NORM = {"g": (8,), "b": (8,), "m": (8,), "v": (8,)}
HARD = {"three": f32(3), "zero": f32(0), "six": f32(6)}


@pytest.mark.parametrize(
    ("body", "expected", "constants"),
    [
        # behind a convolution
        (CONV + "y = Relu (c)", [("Conv", "Relu")], {}),
        (CONV + "n = BatchNormalization (c, g, b, m, v) y = Relu (n)",
         [("Conv", "BatchNormalization", "Relu")], NORM),
        (CONV + "s = Sigmoid (c) y = Mul (c, s)", [("Conv", "Sigmoid", "Mul")], {}),
        (CONV + "a = Add (c, three) l = Clip (a, zero, six) m = Mul (c, l) y = Div (m, six)",
         [("Conv", "Add", "Clip", "Mul", "Div")], HARD),
        (CONV + "a = Add (c, x) y = Relu (a)", [("Conv", "Add", "Relu")], {}),
        (CONV + "r = Reshape (c, s) y = Relu (r)", [("Conv", "Relu")], {"s": i64(1, 288)}),
        # one residual only
        (CONV + "p = MaxPool <kernel_shape = [1, 1]> (x) a = Add (c, x) y = Add (a, p)",
         [("MaxPool",), ("Conv", "Add"), ("Add",)], {}),
        # of two convolutions that are added one is written to memory and read again
        (CONV + "d = Conv (x, v) a = Add (c, d) y = Relu (a)",
         [("Conv",), ("Conv", "Add", "Relu")], {"v": (8, 8, 1, 1)}),
        # what others need has to be written
        (CONV + "r = Relu (c) d = Conv (c, v) y = Add (r, d)",
         [("Conv",), ("Relu",), ("Conv", "Add")], {"v": (8, 8, 1, 1)}),
        # a gate of the whole map waits for all of it
        (CONV + "p = GlobalAveragePool (c) g = Sigmoid (p) y = Mul (c, g)",
         [("Conv",), ("GlobalAveragePool",), ("Sigmoid",), ("Mul",)], {}),
        # element-wise chains
        ("a = Sigmoid (x) b = Mul (a, x) y = Tanh (b)", [("Sigmoid", "Mul", "Tanh")], {}),
        ("a = Relu (x) b = Sigmoid (x) y = Concat <axis = 1> (a, b)",
         [("Relu",), ("Sigmoid",), ("Concat",)], {}),
        # nothing fuses behind a copy but another type
        ("a = Concat <axis = 1> (x, x) y = Relu (a)", [("Concat",), ("Relu",)], {}),
        ("a = Concat <axis = 1> (x, x) b = Cast <to = 10> (a) y = Cast <to = 1> (b)",
         [("Concat", "Cast", "Cast")], {}),
    ],
)  # fmt: skip
def test_kernels_are_what_runtimes_make_of_a_graph(body, expected, constants):
    constants = {**(W if "(x, w)" in body else {}), **constants}
    assert sorted(kernels(body, **constants)) == sorted(expected)


def test_what_the_network_returns_is_written():
    body = CONV + "y = Relu (c)"
    assert kernels(body, **W) == [("Conv", "Relu")]
    assert kernels(body, outputs="c y", **W) == [("Conv",), ("Relu",)]


def test_a_smaller_or_larger_addition_is_no_residual():
    two = "float[1, 8, 6, 6] x, float[1, 8, 1, 1] z"
    assert kernels(CONV + "y = Add (c, z)", inputs=two, **W) == [("Conv",), ("Add",)]
    two = "float[1, 8, 1, 1] x, float[1, 8, 6, 6] z"
    assert kernels(CONV + "y = Add (c, z)", inputs=two, **W) == [("Conv",), ("Add",)]


PAIRS = (
    "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
    "e = DequantizeLinear (v, s, z) c = Conv (d, e) r = Relu (c) "
    "p = QuantizeLinear (r, s, z) f = DequantizeLinear (p, s, z) "
    "t = QuantizeLinear (r, s, z) h = DequantizeLinear (t, s, z) "
    "k = Conv (f, e) y = Add (k, h)"
)


def test_pairs_lie_in_their_neighbours():
    """The convolution reads and writes bytes; two equal pairs of one tensor are one."""
    steps = {"s": f32(0.1), "z": np.int8(0), "v": np.ones((8, 8, 1, 1), np.int8)}
    cost = costs(onnx_model(PAIRS, **steps))
    names = [layer.operators for layer in cost.fused]
    assert names == [("QuantizeLinear",), ("Conv", "Relu", "QuantizeLinear"), ("Conv", "Add")]
    image = 8 * 36
    quantize_, first, last = cost.fused
    assert (quantize_.input_bytes, quantize_.output_bytes) == (4 * image, image)
    assert (first.weight_bytes, first.input_bytes, first.output_bytes) == (64, image, image)
    assert (last.input_bytes, last.output_bytes) == (image, 4 * image)  # residual and input: one
    assert {layer.dtype for layer in (first, last)} == {"int8"}
    assert cost.params == 64
    assert len(cost.unfused) == 10 and all(one.dtype != "int8" for one in cost.unfused if one.macs)


def test_a_convolution_of_integers_by_floats_computes_in_float():
    steps = {"s": f32(0.1), "z": np.int8(0), "w": (8, 8, 1, 1)}
    body = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Conv (d, w)"
    last = costs(onnx_model(body, **steps)).fused[-1]
    assert last.dtype == "fp32" and last.input_bytes == 8 * 36


@st.composite
def graphs(draw):
    """A random graph of the operators that networks are made of, all of one shape."""
    names, lines = ["x"], []
    for index in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(("Conv", "Relu", "Sigmoid", "Add", "Mul", "MaxPool", "Join")))
        one, two = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        name = f"t{index}"
        lines.append(
            {
                "Conv": f"{name} = Conv (one, w)",
                "Relu": f"{name} = Relu (one)",
                "Sigmoid": f"{name} = Sigmoid (one)",
                "Add": f"{name} = Add (one, two)",
                "Mul": f"{name} = Mul (one, two)",
                "MaxPool": f"{name} = MaxPool <kernel_shape = [1, 1]> (one)",
                "Join": f"{name}j = Concat <axis = 1> (one, two) {name} = Conv ({name}j, v)",
            }[kind].replace("one", one).replace("two", two)
        )  # fmt: skip
        names.append(name)
    body = " ".join(lines)
    unread = [n for n in names[1:] if not re.search(rf"[(, ]{n}[,)]", body)]
    return onnx_model(body, outputs=" ".join(unread), w=(8, 8, 1, 1), v=(8, 16, 1, 1))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_fusing_keeps_the_work_and_the_order_and_moves_no_more(model):
    cost = costs(model)
    nodes = [name for layer in cost.fused for name in layer.nodes]
    assert sorted(nodes) == sorted(layer.name for layer in cost.unfused)  # each once
    assert sum(one.macs for one in cost.fused) == sum(one.macs for one in cost.unfused)
    assert sum(one.params for one in cost.fused) == sum(one.params for one in cost.unfused)
    assert sum(one.memory_bytes for one in cost.fused) <= sum(
        one.memory_bytes for one in cost.unfused
    )
    there = {"x"}
    for layer in cost.fused:  # whatever is read was written before
        assert there.issuperset(layer.reads)
        there.update(layer.writes)
    assert there.issuperset(value.name for value in model.graph.output)


@settings(max_examples=80, deadline=None)
@given(graphs())
def test_a_kernel_ends_in_one_tensor(model):
    for layer in costs(model).fused:
        assert len(layer.writes) == 1
        adds = layer.operators.count("Add") + layer.operators.count("Mul")
        if layer.operators[0] == "Conv":
            assert len(layer.reads) <= 2 and (adds or len(layer.reads) == 1)


# ------------------------------------------------------------------------------- networks


class Small(nn.Module):
    """A stem, a RepVGG block and a separable pair with a residual; (N, 3, H, W) -> (N, 10)."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = ConvBN(3, width, 3, stride=2)
        self.block = RepVGGBlock(width, width)
        self.depthwise = ConvBN(width, width, 3, groups=width)
        self.pointwise = ConvBN(width, width, act=None)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.block(self.stem(x))
        return self.head((x + self.pointwise(self.depthwise(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Small().train()


@pytest.fixture(scope="module")
def of_small(small):
    """Profiles of the small network by what differs from the defaults."""
    made = {}

    def get(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = profile(small, **{"resolution": 32, **options})
        return made[key]

    return get


def measured_flops(network, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).to("meta").eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def test_any_module_is_profiled_and_left_as_it_is(small, of_small):
    before = copy.deepcopy(small.state_dict())
    found = of_small()
    deploy = litezoo.fuse(small)
    assert found.model == "Small" and found.graph_form == "deploy" and found.precision == "fp32"
    assert found.flops == measured_flops(deploy, 1, 3, 32, 32)
    assert found.params == sum(p.numel() for p in deploy.parameters())
    assert small.training and all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert [layer.kind for layer in found.layers] == [
        "conv", "conv", "depthwise", "pointwise", "pool", "matmul",
    ]  # fmt: skip
    assert found.layers[3].operators == ("Conv", "Add")
    assert [layer.module for layer in found.layers] == [
        "stem.conv", "block.conv", "depthwise.conv", "pointwise.conv", "", "head",
    ]  # fmt: skip


def test_the_batch_multiplies_work_but_no_weights(of_small):
    one, four = of_small(), of_small(batch=4)
    assert four.macs == 4 * one.macs and four.params == one.params and four.batch == 4
    assert four.fused.weight_bytes == one.fused.weight_bytes
    assert four.fused.input_bytes == 4 * one.fused.input_bytes
    assert four.intensity > one.intensity


def test_the_train_form_shows_what_fusing_saves(small, of_small):
    train = of_small(train_form=True)
    assert train.graph_form == "train" and train.deploy == of_small()
    assert train.flops == measured_flops(small, 1, 3, 32, 32)
    assert train.params == sum(p.numel() for p in small.parameters())
    names = [name for layer in train.layers for name in layer.operators]
    assert names.count("BatchNormalization") == 6
    assert train.fused.kernels > train.deploy.fused.kernels
    assert train.fused.memory_bytes > train.deploy.fused.memory_bytes
    assert train.unfused.kernels > train.deploy.unfused.kernels + 6


def test_biases_of_zeros_are_parameters_too():
    """An exporter drops them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).requires_grad_(False)
    for layer_ in network:
        layer_.bias.zero_()
    assert profile(network, resolution=8).params == 4 * 27 + 4 + 5 * 4 + 5
    assert not network[0].bias.any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_is_the_graph_that_export_writes(of_small, precision):
    found, fp32 = of_small(precision=precision), of_small()
    assert (found.precision, found.macs, found.params) == (precision, fp32.macs, fp32.params)
    body, _, rest = precision.partition("+")
    kinds = {layer.kind: layer.dtype for layer in found.layers}
    assert {kinds[kind] for kind in ("conv", "depthwise", "pointwise")} == {body}
    assert kinds["matmul"] == ({"int8": rest or "fp32"}.get(body, body))
    part = found.fused.weight_bytes / fp32.fused.weight_bytes
    assert part == pytest.approx({"fp32": 1, "int8": 0.3}.get(body, 0.5), abs=0.12)
    assert found.fused.memory_bytes <= fp32.fused.memory_bytes
    convolutions = [layer for layer in found.layers if layer.convolution]
    assert all("Dequantize" not in " ".join(layer.operators) for layer in convolutions)


#: The lightest of many families; all but the first are slow.
NETWORKS = ("mobilenetv3_small_050",)
MORE = ("g_ghost_regnetx_002", "repvgg_a0", "shufflenetv2_x0_5")


@cache
def profile_whole(name):
    return profile(name)


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_counts_are_those_of_torch_and_of_the_catalogue(name):
    spec, found = get_spec(name), profile_whole(name)
    with torch.device("meta"):
        deploy = litezoo.fuse(litezoo.create_model(name)).eval()
    side = spec.resolution
    assert found.resolution == (3, side, side) and found.graph_form == "deploy"
    assert found.params == spec.params_deploy
    assert found.flops == measured_flops(deploy, 1, 3, side, side)
    assert found.macs / 1e6 == pytest.approx(spec.macs_m, abs=0.1)


@pytest.mark.slow
def test_a_batchnorm_that_only_export_folds_counts_as_its_bias():
    """GhostNet's first one is in the module behind its convolution: 8 channels."""
    spec, found = get_spec("ghostnet_050"), profile("ghostnet_050")
    assert found.params == spec.params_deploy - 2 * 8 + 8
    assert found.macs / 1e6 == pytest.approx(spec.macs_m, abs=0.1)


@pytest.mark.slow
def test_counts_of_the_train_form_are_those_of_torch_and_of_the_catalogue():
    spec, found = get_spec("repvgg_a0"), profile("repvgg_a0", train_form=True)
    with torch.device("meta"):
        train = litezoo.create_model("repvgg_a0").eval()
    assert found.params == spec.params_train
    assert found.flops == measured_flops(train, 1, 3, spec.resolution, spec.resolution)
    assert found.deploy.params == spec.params_deploy


def test_counts_of_many_branches_are_those_of_torch():
    network = shallow(get_spec("mobileone_s0")).build(num_classes=10).eval()
    found = profile(network, train_form=True, resolution=64)
    assert found.params == sum(parameter.numel() for parameter in network.parameters())
    assert found.flops == measured_flops(network, 1, 3, 64, 64)
    assert found.deploy.params < found.params / 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "millions"), [("resnet18", 2.48), ("repvgg_a0", 1.79)])
def test_activations_are_those_that_timm_publishes(name, millions):
    """From timm's results/results-imagenet.csv (macts at 224 px, counted with fvcore)."""
    assert profile_whole(name).activations / 1e6 == pytest.approx(millions, abs=0.005)


# ------------------------------------------------------------------------------- files


@pytest.fixture
def file(tmp_path):
    """An ONNX file with an open batch and open sides."""
    model = onnx_model(
        "c = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) r = Relu (c) "
        "p = GlobalAveragePool (r) f = Flatten (p) y = Gemm (f, v)",
        inputs="float[n, 3, h, k] x", w=(8, 3, 3, 3), v=(8, 5),
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    return path


def test_a_file_takes_the_batch_and_the_resolution_that_it_leaves_open(file):
    found = profile(str(file), batch=2, resolution=32)
    assert (found.batch, found.resolution) == (2, (3, 32, 32))
    assert found.macs == 2 * (16 * 16 * 8 * 27 + 40)
    assert found.graph_form == "as it is" and found.precision == "fp32"
    assert profile(file, resolution=32).batch == 1
    with pytest.raises(UsageError, match=r"leaves axis 2 of x open; give it: --resolution N"):
        profile(file)


def test_a_file_keeps_what_it_fixes(file, tmp_path):
    model, shape = fix_input(onnx.load(file), batch=3, sides=(16, 16), name="net")
    assert shape == (3, 3, 16, 16)
    fixed = tmp_path / "fixed.onnx"
    onnx.save(model, fixed)
    assert profile(fixed).batch == 3
    with pytest.raises(UsageError, match="made for batch 3, not 1; leave --batch out"):
        profile(fixed, batch=1)
    with pytest.raises(UsageError, match="made for resolution 16, not 32; leave --resolution"):
        profile(fixed, resolution=32)


def test_a_typed_file_is_profiled_as_it_is(file, tmp_path):
    half = profile(file, resolution=32, precision="fp16")
    assert half.precision == "fp16"
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    onnx.save(quantize(onnx.load(file), images, form="int8"), tmp_path / "int8.onnx")
    found = profile(tmp_path / "int8.onnx", resolution=32)
    assert found.precision == "int8"
    assert found == dataclasses.replace(
        profile(file, resolution=32, precision="int8"), model=found.model
    )
    with pytest.raises(UsageError, match="is int8 already; leave --precision out"):
        profile(tmp_path / "int8.onnx", resolution=32, precision="fp16")


def test_the_form_is_read_from_the_file(file):
    model = onnx.load(file)
    helper.set_model_props(model, {"litezoo.graph_form": "deploy"})
    onnx.save(model, file)
    assert profile(file, resolution=32).graph_form == "deploy"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "repvgg_a9"}, "unknown model 'repvgg_a9'; did you mean 'repvgg_a2'?"),
        ({"model": "gone.onnx"}, "gone.onnx is not there; give an ONNX file or a name of: litezoo"),
        ({"model": "broken.onnx"}, "broken.onnx is not a whole ONNX model"),
        ({"model": "folder"}, "folder is a folder; give one of its files: folder/one.onnx"),
        ({"model": "two.onnx"}, "two.onnx takes x of 4 axes, z of 4 axes; profile takes networks "),
        ({"batch": 0}, "batch is 0; give 1 or more"),
        ({"resolution": -3}, "resolution is -3; give 1 or more"),
        ({"device": "t44"}, "unknown device 't44'; did you mean 't4'?"),
        ({"precision": "fp61"}, "unknown precision 'fp61'; did you mean 'fp16'?"),
        ({"precision": "bf16", "device": "t4"}, "t4 has no bf16; it has"),
        ({"precision": "int8-mixed"}, "is found by measuring; profile the ONNX file that export"),
        ({"precision": "int8", "train_form": True}, "int8 is made of the deploy form"),
        ({"model": "two.onnx", "train_form": True}, "has one form, its own; --train-form is for"),
    ],
)
def test_wrong_wishes_are_refused_in_a_sentence(options, words, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.onnx").touch()
    two = onnx_model("y = Add (x, z)", inputs="float[1, 1, 2, 2] x, float[1, 1, 2, 2] z")
    onnx.save(two, tmp_path / "two.onnx")
    with pytest.raises(UsageError, match=re.escape(words)):
        profile(**{"model": "repvgg_a0", **options})


def test_a_network_without_two_forms_has_no_train_form():
    with pytest.raises(UsageError, match="Conv2d has nothing to fuse"):
        profile(nn.Conv2d(3, 4, 3), train_form=True, resolution=8)


def test_a_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(UsageError, match="cannot be exported at 4x4"):
        profile(nn.Sequential(nn.Conv2d(3, 4, 7)), resolution=4)


# ------------------------------------------------------------------------------- roofline

ROOF = Roof(
    device="chip", peak_tera_ops_per_s={"fp32": 1.0, "fp16": 8.0, "int8": 16.0},
    memory_gb_per_s=100.0, launch_us=None, has_tensor_cores=True, sources={},
)  # fmt: skip


def layer(kind="pointwise", *, ins=64, outs=64, groups=1, window=1, side=14, dtype="fp16", **more):
    """Return a layer of float16 numbers as it would be counted."""
    positions, weights = side * side, ins // groups * outs * window**2
    is_convolution = kind in ("conv", "pointwise", "grouped", "depthwise")
    name = more.pop("name", kind)
    values = {
        "name": name, "parameter": "", "nodes": (name,), "operators": ("Conv",), "kind": kind,
        "dtype": dtype, "in_shape": (1, ins, side, side), "out_shape": (1, outs, side, side),
        "convolution": Convolution(
            in_channels=ins, out_channels=outs, groups=groups, window=(window, window),
            in_positions=positions, out_positions=positions,
        ) if is_convolution else None,
        "params": weights if is_convolution else 0,
        "macs": weights * positions if is_convolution else 0,
        "activations": outs * positions,
        "weight_bytes": 2 * weights if is_convolution else 0,
        "input_bytes": 2 * ins * positions, "output_bytes": 2 * outs * positions,
        "reads": (f"{name} in",), "writes": (f"{name} out",),
    }  # fmt: skip
    return Layer(**{**values, **more})


def test_the_time_is_that_of_the_ceiling_that_binds():
    wide = layer("conv", ins=512, outs=512, window=3)
    time = ROOF.time(wide)
    assert time.compute_ms == pytest.approx(1e3 * wide.flops / 8e12)
    assert time.memory_ms == pytest.approx(1e3 * wide.memory_bytes / 100e9)
    assert (time.ms, time.bound) == (time.compute_ms, "compute")
    starved = dataclasses.replace(ROOF, memory_gb_per_s=1.0)
    assert starved.time(wide).bound == "memory"
    assert starved.time(wide).ms == pytest.approx(100 * time.memory_ms)
    slow = dataclasses.replace(ROOF, launch_us=1e3)
    assert (slow.time(wide).ms, slow.time(wide).bound) == (1.0, "launch")


def test_tensor_cores_do_not_compute_depthwise_convolutions():
    one = layer("depthwise", groups=64, window=3)
    assert ROOF.peak(one) == 1.0
    assert dataclasses.replace(ROOF, has_tensor_cores=False).peak(one) == 8.0
    assert ROOF.peak(layer("conv")) == 8.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**12), st.integers(1, 10**12), st.floats(0, 1e3))
def test_no_layer_is_above_a_ceiling(macs, moved, launch_us):
    one = layer("conv", macs=macs, weight_bytes=0, input_bytes=moved, output_bytes=0)
    roof = dataclasses.replace(ROOF, launch_us=launch_us)
    ms = roof.time(one).ms
    assert one.flops / ms <= 8e9 * (1 + 1e-9)
    assert one.memory_bytes / ms <= 100e6 * (1 + 1e-9)
    assert ms >= launch_us * 1e-3 * (1 - 1e-9)


def test_without_a_fact_there_are_no_times_and_it_says_which_and_what_to_type(of_small):
    found = of_small(device="arm-phone", precision="fp32")
    assert found.times == () and found.ms is None
    assert found.note.startswith("no times: memory_gb_per_s and peak_tera_ops_per_s.fp32 of arm-")
    assert "litezoo ceilings --device arm-phone" in found.note
    assert all(finding.cost_ms is None for finding in found.findings)
    half = dataclasses.replace(ROOF, peak_tera_ops_per_s={"fp16": 8.0})
    note = why_no_times([layer("conv", dtype="int8")], half)
    assert "peak_tera_ops_per_s.int8 of chip is not known" in note
    assert "or choose another --precision" in note
    assert why_no_times([layer("conv"), layer("move", dtype="bf16")], half) is None


def measured(machine=None, **facts):
    machine = machine or ceilings_module.read_machine()
    return ceilings_module.Ceilings(
        **{
            "device": "cpu", "machine": machine, "threads": 2, "memory_gb_per_s": 20.0,
            "peak_tera_ops_per_s": {"fp32": 0.1, "bf16": 0.2, "int8": 0.4},
            "cache_gb_per_s": 90.0, "launch_us": 0.3, "how": (), "not_measured": {},
            "layer_us": {"torch": 4.0, "openvino": 1.5}, "date": "2026-11-23", "protocol": "p",
            **facts,
        }
    )  # fmt: skip


def test_measured_ceilings_are_taken_where_they_are(here):
    cpu = get_device("cpu")
    assert read_roof(cpu).memory_gb_per_s is None
    ceilings_module.write_ceilings(measured())
    roof = read_roof(cpu)
    assert roof.peak_tera_ops_per_s == {"fp32": 0.1, "bf16": 0.2, "int8": 0.4}
    assert (roof.memory_gb_per_s, roof.launch_us, roof.note) == (20.0, 1.5, "")
    assert all(source.startswith("measured (benchmarks/") for source in roof.sources.values())
    assert roof.sources["launch_us"].endswith("openvino")


def test_measured_ceilings_count_before_stated_ones():
    machine = dataclasses.replace(
        ceilings_module.read_machine(), versions={"gpu": "T4"}, cpu="another"
    )
    ceilings_module.write_ceilings(
        measured(machine, device="t4", peak_tera_ops_per_s={"fp16": 40.0}, layer_us={})
    )
    roof = read_roof(get_device("t4"))
    assert roof.peak_tera_ops_per_s == {"fp32": 8.141, "fp16": 40.0, "int8": 130.25}
    assert roof.memory_gb_per_s == 20.0 and roof.launch_us is None
    assert roof.sources["peak_tera_ops_per_s.int8"] == "stated (t4.yaml)"
    assert roof.has_tensor_cores and not read_roof(get_device("jetson-nano")).has_tensor_cores


def test_ceilings_of_another_machine_are_named_so(of_small, here, small):
    other = dataclasses.replace(ceilings_module.read_machine(), cpu="another CPU")
    ceilings_module.write_ceilings(measured(other))
    found = profile(small, resolution=32, device="cpu", precision="fp32")
    assert "another CPU" in found.note and "litezoo ceilings --device cpu" in found.note
    assert found.times


def test_damaged_ceilings_are_refused(here):
    file = ceilings_module.write_ceilings(measured())
    file.write_text("{}")
    with pytest.raises(CheckFailed, match="holds no ceilings"):
        read_roof(get_device("cpu"))


def test_the_profile_sums_its_layers(of_small):
    found = of_small(device="t4", precision="fp16")
    assert found.ms == pytest.approx(sum(time.ms for time in found.times))
    assert len(found.times) == len(found.layers)
    assert sum(kind.kernels for kind in found.fused.by_kind.values()) == found.fused.kernels
    assert sum(kind.ms for kind in found.fused.by_kind.values()) == pytest.approx(found.ms)
    for key in ("macs", "fused_bytes", "unfused_bytes", "ms"):
        assert sum(found.share(kind)[key] for kind in KINDS) == pytest.approx(1)
    first, *_, last = found.most_expensive(len(found.layers))
    assert found.times[first].ms == max(time.ms for time in found.times)
    assert found.times[last].ms == min(time.ms for time in found.times)
    assert len(found.most_expensive(3)) == 3


def test_a_profile_is_json_with_what_follows_from_it(of_small):
    found = of_small(device="t4", precision="fp16")
    values = json.loads(json.dumps(found.to_dict()))
    assert values["flops"] == 2 * values["macs"] and values["ms"] == pytest.approx(found.ms)
    assert values["layers"][0]["bound"] == found.times[0].bound
    assert values["layers"][0]["memory_bytes"] == found.layers[0].memory_bytes
    assert values["fused"]["fragmentation"] == found.fused.fragmentation
    assert values["shares"]["depthwise"]["macs"] == pytest.approx(found.share("depthwise")["macs"])
    train = json.loads(json.dumps(of_small(train_form=True).to_dict()))
    assert train["deploy"]["graph_form"] == "deploy" and values["deploy"] is None


@pytest.mark.parametrize(
    ("body", "kernels_", "path", "branches"),
    [
        ("a = MaxPool <kernel_shape = [1, 1]> (x) y = Conv (a, w)", 2, 2, 1),
        ("a = Conv (x, w) b = Conv (x, v) y = Concat <axis = 1> (a, b)", 3, 2, 2),
    ],
)
def test_fragmentation_is_kernels_over_the_longest_path(tmp_path, body, kernels_, path, branches):
    names = {name: (8, 8, 1, 1) for name in "wv" if f", {name})" in body}
    onnx.save(onnx_model(body, **names), tmp_path / "net.onnx")
    fused = profile(tmp_path / "net.onnx").fused
    assert (fused.kernels, fused.longest_path, fused.branches) == (kernels_, path, branches)
    assert fused.fragmentation == kernels_ / path


# ------------------------------------------------------------------------------- findings


def chip(**limits):
    sources = {f"limits.{key}": "data sheet" for key in limits}
    sources["compute_capability"] = "data sheet"
    return Device(
        name="chip", title="A chip", kind="gpu", runtimes=("tensorrt",), precisions=("fp16",),
        compute_capability="8.0", limits=Limits(**limits), sources=sources,
    )  # fmt: skip


def found(*layers, roof=ROOF, device=None):
    return {f.rule: f for f in design_findings(layers, device=device or chip(), roof=roof)}


MEMORY_BOUND = dataclasses.replace(ROOF, peak_tera_ops_per_s={"fp16": 1e9, "fp32": 1e9})


def elements(ins, outs, side=14):
    return side * side * (ins + outs) + ins * outs


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1024), st.integers(1, 1024))
def test_g1_costs_what_equal_widths_of_the_same_work_would_not(ins, outs):
    one = layer(ins=ins, outs=outs)
    width = math.sqrt(ins * outs)  # the same multiply-adds
    extra = elements(ins, outs) - elements(width, width)
    finding = found(one, roof=MEMORY_BOUND).get("G1 unequal widths")
    assert extra >= -1e-6
    if 2 * extra < LEAST_SHARE * one.memory_bytes * 0.999:
        assert finding is None
    elif 2 * extra > LEAST_SHARE * one.memory_bytes * 1.001:
        assert finding.extra_bytes == pytest.approx(2 * extra, abs=1)
        assert finding.cost_ms == pytest.approx(2 * extra / 100e6, rel=1e-6)
        assert f"{ins} to {outs}" in finding.message


def test_g1_costs_nothing_where_arithmetic_binds():
    roof = dataclasses.replace(ROOF, peak_tera_ops_per_s={"fp16": 1e-3})
    assert "G1 unequal widths" not in found(layer(ins=64, outs=256), roof=roof)
    assert "G1 unequal widths" in found(layer(ins=64, outs=256))


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_g2_costs_what_a_dense_layer_of_the_same_work_would_not(groups):
    one = layer("grouped", ins=256, outs=128, groups=groups, window=3)
    dense = layer(
        "conv", ins=256 // math.isqrt(groups), outs=128 // math.isqrt(groups), window=3
    ) if math.isqrt(groups) ** 2 == groups else None  # fmt: skip
    finding = found(one, roof=MEMORY_BOUND)["G2 groups"]
    if dense is not None:
        assert dense.macs == one.macs and dense.params == one.params
        assert finding.extra_bytes == one.memory_bytes - dense.memory_bytes
    assert finding.count == 1 and finding.layers == ("grouped",)
    assert "G2 groups" not in found(layer("conv"), roof=MEMORY_BOUND)


def test_g3_counts_inputs_that_are_read_again_and_concatenations():
    same = {"reads": ("x",)}
    two = (layer("conv", name="a", **same), layer("conv", name="b", **same))
    join = layer("move", name="join", operators=("Concat",), reads=("a out", "b out"))
    finding = found(*two, join)["G3 fragmentation"]
    assert finding.count == 2 and set(finding.layers) == {"b", "join"}
    assert finding.extra_bytes == two[1].input_bytes + join.memory_bytes
    residual = layer("pointwise", name="c", reads=("a out", "x"))
    chain = (two[0], residual)
    assert "G3 fragmentation" not in found(*chain)  # a residual is no branch


def test_g3_costs_a_launch_for_each_branch():
    same = {"reads": ("x",)}
    two = (layer("conv", name="a", **same), layer("conv", name="b", **same))
    roof = dataclasses.replace(ROOF, launch_us=50.0)
    assert found(*two, roof=roof)["G3 fragmentation"].cost_ms == pytest.approx(0.05)


def test_g4_costs_the_time_of_element_wise_kernels():
    gate = layer("elementwise", name="gate", operators=("Mul",))
    finding = found(layer("conv"), gate)["G4 element-wise"]
    assert finding.cost_ms == pytest.approx(ROOF.time(gate).ms) and finding.layers == ("gate",)
    assert "1 Mul" in finding.message
    assert "G4 element-wise" not in found(layer("conv"))


def test_depthwise_is_a_finding_on_tensor_cores_and_where_the_device_says_so():
    one = layer("depthwise", groups=64, window=3)
    finding = found(one)["depthwise"]
    assert finding.cost_ms == pytest.approx(ROOF.time(one).ms - 1e3 * one.flops / 8e12)
    plain = dataclasses.replace(ROOF, has_tensor_cores=False)
    assert "depthwise" not in found(one, roof=plain)
    slow = chip(slow={"depthwise-conv": "the data sheet says so"})
    assert "(the data sheet says so)" in found(one, roof=plain, device=slow)["depthwise"].message


def pair(channels):
    first = layer("depthwise", name="dw", ins=channels, outs=channels, groups=channels, window=3)
    return first, layer("pointwise", name="pw", ins=channels, outs=channels, reads=first.writes)


def test_a_separable_pair_is_a_finding_only_at_low_channels():
    """At few channels the dense convolution is bound by memory too, and moves less."""
    rule = "separable at low channels"
    low, high = found(*pair(16)), found(*pair(512))
    assert rule in low and rule not in high
    first, second = pair(16)
    dense = layer("conv", ins=16, outs=16, window=3)
    saved = ROOF.time(first).ms + ROOF.time(second).ms - ROOF.time(dense).ms
    assert low[rule].cost_ms == pytest.approx(saved) and low[rule].layers == ("dw",)
    gated = (first, dataclasses.replace(second, reads=("another",)))
    assert rule not in found(*gated)


def test_padding_is_counted_where_check_limits_sees_it(of_small):
    model = onnx_model(
        "a = Conv (x, w) b = Conv <group = 10> (a, d) c = Conv (b, v) y = Conv <group = 2> (c, u)",
        inputs="float[1, 3, 6, 6] x", w=(10, 3, 1, 1), d=(10, 1, 1, 1), v=(16, 10, 1, 1),
        u=(16, 8, 1, 1),
    )  # fmt: skip
    device = chip(channel_multiple=8)
    (limit,) = check_limits(model, device, dynamic=False, precision="fp16")
    roof = dataclasses.replace(ROOF, peak_tera_ops_per_s={"fp32": 1.0})
    finding = {f.rule: f for f in design_findings(costs(model).fused, device=device, roof=roof)}[
        "channel multiple"
    ]
    assert finding.count == limit.count == 3 and set(finding.layers) == set(limit.layers)
    image = 36 * 4
    extra = image * 6 + 4 * 3 * 6  # a: outputs and weights of 10 to 16 channels
    extra += 2 * image * 6 + 4 * 6  # b, depthwise: inputs too
    extra += image * 6 + 4 * 6 * 16  # c: inputs and weights
    assert finding.extra_bytes == extra
    assert finding.cost_ms == pytest.approx(extra / 100e6)
    assert not any("channel" in rule for rule in found(layer("conv"), device=device))


def test_launches_that_last_longer_than_their_kernel_are_a_finding():
    roof = dataclasses.replace(ROOF, launch_us=10.0)
    finding = found(layer("pointwise"), roof=roof)["launch"]
    work = ROOF.time(layer("pointwise")).ms
    assert finding.cost_ms == pytest.approx(0.01 - work) and "1 of 1 kernels" in finding.message
    assert "launch" not in found(layer("pointwise"))


def test_what_costs_under_a_hundredth_is_not_said():
    gate = layer("elementwise", name="gate", operators=("Mul",), side=1)
    big = layer("conv", ins=512, outs=512, window=3, side=56)
    assert "G4 element-wise" not in found(big, gate)
    assert "G4 element-wise" in found(layer("conv", side=1), gate)


def test_findings_without_ceilings_count_bytes():
    finding = found(layer(ins=64, outs=256), roof=None)["G1 unequal widths"]
    assert finding.cost_ms is None and finding.share == pytest.approx(
        finding.extra_bytes / layer(ins=64, outs=256).memory_bytes, rel=1e-3
    )
    assert "cost unknown, " in str(finding) and "of the bytes" in str(finding)


def test_the_limits_of_a_device_are_findings_with_their_time():
    model = onnx_model("a = Conv (x, w) b = Sigmoid (a) c = Mul (a, b) y = LeakyRelu (c)", **W)
    device = chip(slow={"silu": "no such unit"}, forbidden={"LeakyRelu": "not in its list"})
    limits = read_limits(model, device, precision="fp16")
    roof = dataclasses.replace(ROOF, peak_tera_ops_per_s={"fp32": 1.0})
    layers = costs(model).fused
    own = design_findings(layers, device=device, roof=roof, limits=limits)
    by_rule = {finding.rule: finding for finding in own}
    assert set(by_rule) == {"slow: silu", "forbidden: LeakyRelu"}
    for finding in own:
        assert finding.cost_ms == pytest.approx(roof.time(layers[0]).ms)
    assert "no such unit" in by_rule["slow: silu"].message


def test_a_limit_is_said_once():
    body = "y = Conv <group = 8> (x, w)"
    model = onnx_model(body, w=(8, 1, 1, 1))
    device = chip(slow={"depthwise-conv": "memory"}, channel_multiple=16)
    limits = read_limits(model, device, precision="fp16")
    assert {limit.finding.rule for limit in limits} == {"depthwise-conv", "channel-multiple"}
    roof = dataclasses.replace(ROOF, peak_tera_ops_per_s={"fp32": 1.0})
    own = design_findings(costs(model).fused, device=device, roof=roof, limits=limits)
    assert sorted(finding.rule for finding in own) == ["channel multiple", "depthwise"]


def test_every_rule_is_named_in_a_test():
    text = open(__file__, encoding="utf-8").read()
    assert all(f'"{rule}"' in text for rule in RULES)


def test_the_findings_of_a_device_come_with_its_profile(of_small):
    report = of_small(device="t4", precision="fp16")
    rules = [finding.rule for finding in report.findings]
    assert "depthwise" in rules
    shares = [finding.share for finding in report.findings]
    assert shares == sorted(shares, reverse=True)
    names = {layer.name for layer in report.layers}
    assert all(names.issuperset(finding.layers) for finding in report.findings)


# ------------------------------------------------------------------------------- drawing


def test_the_roofline_has_every_layer_as_a_point_and_needs_no_network(of_small, tmp_path):
    report = of_small(device="t4", precision="fp16")
    page = write_roofline(report, tmp_path / "roofline.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and not re.search(
        r"<(script|link)[^>]+(src|href)=", page
    )
    for layer_ in report.layers:
        assert html.escape(layer_.name) in page
    for dtype in ("fp32", "fp16", "int8"):
        assert f"{dtype}: {report.roof.peak_tera_ops_per_s[dtype]:g} T" in page
    assert "stated (t4.yaml)" in page and "memory: 320 GB" in page
    for finding in report.findings:
        assert html.escape(finding.rule) in page


def test_every_point_lies_on_its_ceiling(of_small):
    from litezoo.benchmarks.draw_roofline import _roofline

    report = of_small(device="t4", precision="fp16")
    figure = _roofline(report)
    points = [
        point
        for trace in figure.data
        if trace.mode == "markers"
        for point in zip(trace.x, trace.y, strict=True)
    ]
    assert len(points) == len(report.layers)
    for x, y in points:
        ceilings = (x * 0.32, *report.roof.peak_tera_ops_per_s.values())
        assert y <= min(ceilings[0], max(ceilings)) * (1 + 1e-9)
        assert any(y == pytest.approx(ceiling) for ceiling in ceilings)


def test_a_roofline_without_ceilings_says_what_to_type(of_small, tmp_path):
    with pytest.raises(MissingError, match="name one: --device t4"):
        write_roofline(of_small(), tmp_path / "roofline.html")
    with pytest.raises(MissingError, match="litezoo ceilings --device arm-phone"):
        report = of_small(device="arm-phone", precision="fp32")
        write_roofline(report, tmp_path / "roofline.html")
    assert not (tmp_path / "roofline.html").exists()


def test_the_kinds_of_bound_are_all_reachable():
    times = {
        "compute": LayerTime(compute_ms=2, memory_ms=1, launch_ms=0),
        "memory": LayerTime(compute_ms=1, memory_ms=2, launch_ms=0),
        "launch": LayerTime(compute_ms=1, memory_ms=2, launch_ms=3),
    }
    assert {bound: time.bound for bound, time in times.items()} == {b: b for b in times}
    assert roofline_module.Bound.__args__ == tuple(times)
