"""Typed 16-bit ONNX files: float16 and bfloat16, and how bfloat16 is checked on any CPU."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from litezoo.export.artifact import read_artifact, verify  # noqa: E402
from litezoo.export.embed import embed_preprocess  # noqa: E402
from litezoo.export.exporter import export  # noqa: E402
from litezoo.export.runtime import get_runtime  # noqa: E402
from litezoo.export.to_half import HALVES, emulate_bf16, to_half  # noqa: E402
from litezoo.export.to_onnx import load_onnx  # noqa: E402
from litezoo.models.catalogue import Preprocess  # noqa: E402
from litezoo.models.errors import CheckFailed, UsageError  # noqa: E402
from litezoo.recipes.devices import get_device  # noqa: E402

KIND = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
halves = pytest.mark.parametrize("half", HALVES)

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((3, 3, 8, 8)).astype(np.float32)


def model_of(nodes, weights, *, opset=20, output="logits", shape=("batch", 5)):
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@cache
def network():
    """Every kind of node whose types differ: pools, an activation, a resize, a Cast, a Constant."""
    draw = np.random.default_rng(1).standard_normal
    constant = numpy_helper.from_array(np.float32([0.7]), "slope")
    nodes = [
        helper.make_node("Conv", ["input", "w0", "b0"], ["c0"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("HardSwish", ["c0"], ["h0"], "act"),
        helper.make_node("MaxPool", ["h0"], ["p0"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["p0", "", "sizes"], ["r0"], "resize", mode="nearest"),
        helper.make_node("Add", ["r0", "h0"], ["a0"], "add"),
        helper.make_node("Constant", [], ["slope"], "constant", value=constant),
        helper.make_node("Mul", ["a0", "slope"], ["m0"], "mul"),
        helper.make_node("Cast", ["m0"], ["f0"], "cast", to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["f0"], ["g0"], "gap"),
        helper.make_node("Flatten", ["g0"], ["v0"], "flatten"),
        helper.make_node("Gemm", ["v0", "w1", "b1"], ["logits"], "head", transB=1),
    ]
    weights = {
        "w0": draw((4, 3, 3, 3)).astype(np.float32),
        "b0": draw(4).astype(np.float32),
        "sizes": np.float32([1, 1, 2, 2]),
        "w1": draw((5, 4)).astype(np.float32),
        "b1": draw(5).astype(np.float32),
    }
    return model_of(nodes, weights)


def types_of(model):
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


# --- the converter -------------------------------------------------------------------------------


@halves
def test_all_inside_is_16_bit_and_the_ends_are_float32(half):
    model = to_half(network(), half)
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    assert types.pop("input") == types.pop("logits") == TensorProto.FLOAT
    assert {*types.values()} == {KIND[half]} and len(types) >= 10
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds.pop("sizes") == TensorProto.FLOAT  # which ONNX defines so
    assert {*kinds.values()} == {KIND[half]}


@halves
def test_with_16_bit_ends_there_is_no_cast_but_the_networks_own(half):
    model = to_half(network(), half, io="half")
    assert {*types_of(model).values()} == {KIND[half]}
    assert [node.name for node in model.graph.node if node.op_type == "Cast"] == ["cast"]
    got, want = load_onnx(model)(IMAGES), load_onnx(to_half(network(), half))(IMAGES)
    assert got.dtype == np.float32
    assert np.array_equal(got, torch.from_numpy(got).to(TORCH[half]).float().numpy())
    step = {"fp16": 2**-10, "bf16": 2**-7}[half]
    np.testing.assert_allclose(got, want, atol=2 * step * np.abs(want).max())


def test_float16_keeps_the_opset_and_bfloat16_takes_the_first_that_has_it():
    assert to_half(network(), "fp16").opset_import[0].version == 20
    assert to_half(network(), "bf16").opset_import[0].version == 22
    newer = onnx.version_converter.convert_version(network(), 23)
    assert to_half(newer, "bf16").opset_import[0].version == 23


@halves
def test_names_dimensions_and_properties_stay(half):
    before = onnx.ModelProto()
    before.CopyFrom(network())
    before.metadata_props.add(key="litezoo.model", value="small")
    bytes_before = before.SerializeToString()
    after = to_half(before, half)
    assert before.SerializeToString() == bytes_before
    assert [(p.key, p.value) for p in after.metadata_props] == [("litezoo.model", "small")]
    nodes = [(n.op_type, n.name) for n in after.graph.node if n.name]
    assert nodes == [(n.op_type, n.name) for n in before.graph.node]
    for old, new in zip(before.graph.input, after.graph.input, strict=True):
        assert (old.name, old.type) == (new.name, new.type)
    for old, new in zip(before.graph.output, after.graph.output, strict=True):
        assert (old.name, old.type) == (new.name, new.type)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded_weight(half, values):
    """Return what the converter makes of a weight that is added to the input."""
    model = model_of(
        [helper.make_node("Add", ["input", "w"], ["sum"], "add")],
        {"w": values}, output="sum", shape=["batch", 3, 8, 8],
    )  # fmt: skip
    (made,) = (t for t in to_half(model, half).graph.initializer if t.name == "w")
    assert made.data_type == KIND[half]
    return numpy_helper.to_array(made).astype(np.float32)


@given(values=arrays.arrays(np.float32, 8, elements=FLOATS))
def test_a_bfloat16_weight_is_what_torch_rounds_it_to(values):
    if np.abs(values).max() > float(torch.finfo(torch.bfloat16).max):
        with pytest.raises(CheckFailed, match=r"the weight w reaches 3\.4e\+38, beyond bfloat16's"):
            rounded_weight("bf16", values)
        return
    want = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded_weight("bf16", values), want)


@given(values=arrays.arrays(np.float32, 8, elements=st.floats(-65504, 65504, width=32)))
def test_a_float16_weight_is_what_torch_rounds_it_to(values):
    want = torch.from_numpy(values).half().float().numpy()
    np.testing.assert_array_equal(rounded_weight("fp16", values), want)


def test_what_overflows_float16_is_refused_by_name_and_fits_bfloat16():
    values = np.full(8, 1e6, np.float32)
    with pytest.raises(CheckFailed) as caught:
        rounded_weight("fp16", values)
    assert str(caught.value) == (
        "the weight w reaches 1e+06, beyond float16's 65504; export fp32 instead"
    )
    assert rounded_weight("bf16", values) == pytest.approx(values, rel=2**-8)


def test_another_type_is_refused():
    with pytest.raises(UsageError, match="is fp16 or bf16, io fp32 or half; not fp8, fp32"):
        to_half(network(), "fp8")
    with pytest.raises(UsageError, match="not bf16, fp16"):
        to_half(network(), "bf16", io="fp16")


def quantized(scale):
    """Return a network of one Q/DQ pair and one int8 weight of 1 x 1, all of one scale."""
    weights = {"s": np.float32(scale), "z": np.int8(0), "w_int8": np.int8([[[[3]]] * 3])}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w_int8", "s", "z"], ["w"], "dw"),
        helper.make_node("Conv", ["d", "w"], ["sum"], "conv"),
    ]
    return model_of(nodes, weights, output="sum", shape=["batch", 1, 8, 8])


def test_a_scale_that_float16_would_lose_stays_in_bfloat16():
    scale = np.float32(2**-30)
    files = {half: to_half(quantized(scale), half) for half in HALVES}
    made = {
        half: {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
        for half, file in files.items()
    }
    assert made["fp16"]["s"] == np.finfo(np.float16).smallest_normal  # raised
    assert made["bf16"]["s"].astype(np.float32) == scale
    assert made["fp16"]["w_int8"].max() == 0 and made["bf16"]["w_int8"].max() == 3


# --- bfloat16 without bfloat16 kernels -----------------------------------------------------------


def test_onnx_runtime_has_no_bfloat16_convolution_on_the_cpu():
    """If this fails, onnxruntime has learned it and `emulate_bf16` may go."""
    content = to_half(network(), "bf16").SerializeToString()
    with pytest.raises(Exception, match="Could not find an implementation for Conv"):
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def test_only_a_bfloat16_file_is_emulated():
    for model in (network(), to_half(network(), "fp16")):
        assert emulate_bf16(model) is model
    emulated = emulate_bf16(to_half(network(), "bf16"))
    onnx.checker.check_model(emulated, full_check=True)
    assert (
        emulate_bf16(to_half(network(), "bf16", io="half")).graph.input[0]
        == (network().graph.input[0])
    )


def torch_bf16(images):
    """Return the small network in torch: float32 arithmetic, every result rounded to bfloat16."""
    functional = torch.nn.functional
    weights = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in network().graph.initializer
    }

    def rounded(x):
        return x.bfloat16().float()

    w0, b0, w1, b1 = (rounded(weights[name]) for name in ("w0", "b0", "w1", "b1"))
    x = rounded(torch.from_numpy(images))
    hard = rounded(functional.hardswish(rounded(functional.conv2d(x, w0, b0, padding=1))))
    pooled = functional.max_pool2d(hard, 2)
    added = rounded(pooled.repeat_interleave(2, 2).repeat_interleave(2, 3) + hard)
    scaled = rounded(added * rounded(torch.tensor(0.7)))
    return rounded(rounded(scaled.mean((2, 3))) @ w1.T + b1).numpy()


def test_an_emulated_file_gives_what_torch_gives_with_the_same_roundings():
    got = load_onnx(to_half(network(), "bf16"))(IMAGES)
    want = torch_bf16(IMAGES)
    # a sum in another order may round the other way, by one unit in the last place: 2**-7
    assert np.mean(got == want) > 0.5
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-8)
    exact = load_onnx(network())(IMAGES)
    assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 3e-2


def test_every_tensor_of_an_emulated_file_holds_bfloat16_values():
    emulated = emulate_bf16(to_half(network(), "bf16"))
    names = ["input_bf16", "c0", "h0", "p0", "r0", "a0", "m0", "f0", "g0", "v0", "logits_bf16"]
    emulated.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        emulated.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for name, values in zip(names, session.run(names, {"input": IMAGES}), strict=True):
        assert values.dtype == np.float32, name
        assert np.array_equal(values, torch.from_numpy(values).bfloat16().float().numpy()), name


@given(values=arrays.arrays(np.float32, (1, 3, 8, 8), elements=FLOATS))
def test_the_emulations_rounding_is_torchs(values):
    assert np.array_equal(identity()(values), torch.from_numpy(values).bfloat16().float().numpy())


@cache
def identity():
    nodes = [helper.make_node("Identity", ["input"], ["same"], "same")]
    return load_onnx(to_half(model_of(nodes, {}, output="same", shape=["batch", 3, 8, 8]), "bf16"))


def test_quantized_parts_compute_the_same_in_bfloat16():
    images = np.round(IMAGES * 8) / 8
    want = load_onnx(quantized(0.125))(images)  # all its values are bfloat16's
    np.testing.assert_array_equal(load_onnx(to_half(quantized(0.125), "bf16"))(images), want)


@halves
def test_the_normalisation_is_put_before_the_first_cast(half):
    preprocess = Preprocess(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    pixels = RANDOM.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = ((pixels / 255 - preprocess.mean) / preprocess.std).transpose(0, 3, 1, 2)
    model = to_half(network(), half)
    got = load_onnx(embed_preprocess(model, preprocess))(pixels)
    want = load_onnx(model)(images.astype(np.float32))
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
    with pytest.raises(UsageError, match="one input of float32"):
        embed_preprocess(to_half(network(), half, io="half"), preprocess)


# --- the way of a network ------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.mark.parametrize(("precision", "form"), [("bf16", "bf16"), ("int8+bf16", "int8-bf16")])
def test_a_gpu_gets_a_kit_of_the_bfloat16_file_with_its_parity(tmp_path, precision, form):
    artifact = export(
        "repvgg_tiny", device="a10", weights="random", out=tmp_path / "a", precision=precision,
        calibration="random",
    )  # fmt: skip
    assert artifact.onnx == {form: f"model.{form}.onnx"}
    assert f"kit/repvgg_tiny.{form}.onnx" in artifact.kit
    (parity,) = (check for check in artifact.checks if check.stage == f"onnx {form}")
    assert 0 < parity.max_relative_error < parity.tolerance
    assert parity.tolerance == {"bf16": 0.1, "int8-bf16": 0.4}[form]
    types = types_of(onnx.load(tmp_path / "a" / "kit" / f"repvgg_tiny.{form}.onnx"))
    assert TensorProto.BFLOAT16 in types.values()
    assert [t for t in types if types[t] == TensorProto.FLOAT] == ["input", "logits"]
    assert read_artifact(tmp_path / "a") == artifact
    again = {found.stage: found for found in verify(tmp_path / "a").parities}[f"onnx {form}"]
    assert again.max_relative_error == pytest.approx(parity.max_relative_error, rel=1e-3)


def test_a_changed_weight_of_a_bfloat16_file_is_found_by_its_parity(tmp_path):
    file = tmp_path / "model.bf16.onnx"
    model = to_half(network(), "bf16")
    for tensor in model.graph.initializer:
        if tensor.name == "w0":
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values * 2).astype(values.dtype), "w0"))
    file.write_bytes(model.SerializeToString())
    session = get_runtime("onnxruntime").load(
        [file], device=get_device("cpu"), precision="bf16", threads=1
    )
    want = load_onnx(network())(IMAGES)
    assert np.abs(session.run(IMAGES) - want).max() > 0.1 * np.abs(want).max()
