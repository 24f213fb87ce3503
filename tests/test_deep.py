"""The deep comparison names the one node that was spoiled, in every form of the file."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from test_models import small

from litezoo.export import deep
from litezoo.export.artifact import EXPECTED, MANIFEST, Artifact, Engine
from litezoo.export.deep import (
    CONSTANT_TOLERANCE,
    ENGINE_TOLERANCE,
    OWN_TOLERANCE,
    NodeError,
    compare_nodes,
    compare_openvino,
    compare_stages,
    deep_verify,
    first_parting,
    stages_of,
)
from litezoo.export.parity import TOLERANCE, Parity
from litezoo.export.runtime import BuildSource, get_runtime
from litezoo.export.to_half import HALVES, to_half
from litezoo.export.to_int8 import quantize
from litezoo.export.to_onnx import export_onnx
from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.files import file_sha256
from litezoo.models.fuse import fuse
from litezoo.recipes.devices import get_device

SIDE = 32
IMAGES = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)
SPOILED = "stages.2.4.conv.weight"
#: The form that OpenVINO's int8 engines are made from.
INT8 = get_runtime("openvino").precisions["int8"]


@cache
def network():
    return fuse(small("repvgg_a0")).eval()


@cache
def file(form):
    if form == "fp32":
        return export_onnx(network(), IMAGES[:2], metadata={})
    if form.endswith(HALVES):
        return to_half(file("int8" if form.startswith("int8") else "fp32"), form[-4:])
    return quantize(file("fp32"), IMAGES, form=form)


def spoil(proto, weight=SPOILED, factor=1.05):
    """Return a copy in which one weight (or the scale of one that is 8-bit) is off by 5 %."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    names = (weight, f"{weight}_scale")
    (tensor,) = [tensor for tensor in copy.graph.initializer if tensor.name in names]
    values = numpy_helper.to_array(tensor)
    changed = (values * factor).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    return copy


def reader(weight=SPOILED):
    """The node of the float file that reads a weight."""
    return next(node.name for node in file("fp32").graph.node if weight in node.input)


def parting(rows, form):
    base = "int8" if form.startswith("int8") else form
    return first_parting(
        rows, TOLERANCE[base], own_tolerance=OWN_TOLERANCE[base],
        constant_tolerance=CONSTANT_TOLERANCE[base],
    )  # fmt: skip


def engine(proto, precision, folder):
    """Build OpenVINO's engine of a typed model."""
    pytest.importorskip("openvino")
    runtime = get_runtime("openvino")
    form = runtime.precisions[precision]
    folder.mkdir(exist_ok=True)
    source = folder / f"{form}.onnx"
    source.write_bytes(proto.SerializeToString())
    return runtime.build(
        BuildSource(onnx={form: source}), device=get_device("cpu"), precision=precision,
        folder=folder,
    )  # fmt: skip


forms = pytest.mark.parametrize(
    "form", ["fp16", "bf16", "int8", "int8-u8s8", "int8-fp16", "int8-bf16"]
)


@forms
def test_a_typed_file_parts_nowhere_from_the_float_file(form):
    rows = compare_nodes(file("fp32"), file(form), IMAGES)
    assert parting(rows, form) is None
    outputs = [row for row in rows if not row.is_constant]
    assert len(outputs) > 20 and len(rows) - len(outputs) == 46  # of 23 layers: weight and bias
    assert rows[-1].tensor == "logits" and rows[-1].stage == "head"


@forms
def test_the_spoiled_node_is_named_exactly(form):
    found = parting(compare_nodes(file("fp32"), spoil(file(form)), IMAGES), form)
    assert found is not None
    assert (found.node, found.op, found.stage) == (reader(), "Conv", "stages.2")
    assert found.tensor == SPOILED and found.is_constant
    assert found.relative_error == pytest.approx(0.05, abs=0.01)
    assert f"node {reader()} (Conv), its constant {SPOILED}" in str(found)


def test_a_wrong_operator_is_named_by_its_own_error_not_by_a_constant():
    """Nothing before it and nothing behind it is wrong by itself."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(file("fp16"))
    node = next(node for node in wrong.graph.node if node.name == "node_relu_9")
    node.op_type, alpha = "LeakyRelu", helper.make_attribute("alpha", 0.2)
    node.attribute.append(alpha)
    rows = compare_nodes(file("fp32"), wrong, IMAGES)
    # an operator of another kind without a pair behind it holds another value: what reads it parts
    assert "relu_9" not in {row.tensor for row in rows}
    found = parting(rows, "fp16")
    assert found is not None and found.node == "node_conv2d_10"


def test_a_narrow_range_of_an_activation_is_named_at_its_reader():
    wrong = onnx.ModelProto()
    wrong.CopyFrom(file("int8"))
    (scale,) = [t for t in wrong.graph.initializer if t.name == "relu_9_scale"]
    narrow = (numpy_helper.to_array(scale) / 20).astype(np.float32)
    scale.CopyFrom(numpy_helper.from_array(narrow, scale.name))
    found = parting(compare_nodes(file("fp32"), wrong, IMAGES), "int8")
    assert found is not None and found.node == "node_conv2d_10" and not found.is_constant


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_spoiled_node_of_an_openvino_engine_is_named_exactly(precision, tmp_path):
    good = file(get_runtime("openvino").precisions[precision])
    xml, _ = engine(spoil(good), precision, tmp_path)
    rows = compare_openvino(good, xml, IMAGES, precision=precision)
    found = first_parting(rows, TOLERANCE[precision], own_tolerance=ENGINE_TOLERANCE[precision])
    assert found is not None and not found.is_constant
    assert (found.node, found.stage) == (reader(), "stages.2")


def test_an_openvino_engine_of_another_network_is_refused(tmp_path):
    other = onnx.ModelProto()
    other.CopyFrom(file("fp32"))
    for node in other.graph.node:
        node.output[:] = [f"x/{name}" for name in node.output]
        node.input[:] = [f"x/{n}" if n in stages_of(file("fp32")) else n for n in node.input]
    other.graph.output[0].name = "x/logits"
    xml, _ = engine(other, "fp32", tmp_path)
    with pytest.raises(UsageError, match="no tensor of the ONNX file"):
        compare_openvino(file("fp32"), xml, IMAGES, precision="fp32")


def test_a_damaged_openvino_engine_is_refused(tmp_path):
    pytest.importorskip("openvino")
    xml = tmp_path / "openvino.xml"
    xml.write_text("no xml")
    with pytest.raises(CheckFailed, match="openvino refuses"):
        compare_openvino(file("fp32"), xml, IMAGES, precision="fp32")


def test_pytorchs_stages_are_compared_and_the_spoiled_one_is_first():
    good = compare_stages(network(), file("fp32"), IMAGES)
    names = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]
    assert [row.stage for row in good] == names
    assert first_parting(good, 1e-5) is None
    spoiled = compare_stages(network(), spoil(file("fp32")), IMAGES)
    found = first_parting(spoiled, TOLERANCE["fp32"])
    assert found is not None and found.stage == "stages.2"


def test_the_head_begins_with_the_pool():
    stages = stages_of(file("fp32"))
    assert stages["relu_21"] == "stages.3" and stages["mean"] == stages["logits"] == "head"
    assert stages["conv2d"] == stages["relu"] == "stem"


def row(error, own=None, constant=False):
    return NodeError(
        stage="s", node="n", op="Conv", tensor="t", relative_error=error, snr_db=0.0,
        own_error=own, is_constant=constant,
    )  # fmt: skip


def test_errors_that_only_add_up_part_where_they_pass_the_tolerance():
    rows = [row(0.01, 0.01), row(0.2, 0.01), row(0.3, 0.01)]
    assert first_parting(rows, 0.1, own_tolerance=0.05) is rows[1]
    assert first_parting(rows, 0.5, own_tolerance=0.05) is None


def test_errors_that_are_gone_at_the_output_are_no_parting():
    assert first_parting([row(0.2, 0.01), row(0.01, 0.01)], 0.1) is None


def test_nan_parts():
    assert first_parting([row(float("inf"), float("inf"))], 0.1) is not None
    sums = deep._Sums()
    sums.add(np.array([np.nan, 1.0]), np.array([1.0, 1.0]))
    sums.add(np.array([1.0, 1.0]), np.array([1.0, 1.0]))
    assert sums.relative == float("inf")


def test_files_without_a_common_tensor_are_refused():
    other = onnx.ModelProto()
    other.CopyFrom(file("fp32"))
    for node in other.graph.node:
        node.input[:] = [f"x/{n}" if n in stages_of(file("fp32")) else n for n in node.input]
        node.output[:] = [f"x/{name}" for name in node.output]
    other.graph.output[0].name = "x/logits"
    with pytest.raises(UsageError, match="no tensor in common"):
        compare_nodes(file("fp32"), other, IMAGES)


def test_images_of_another_rank_are_refused():
    with pytest.raises(UsageError, match=r"give \(N, C, H, W\)"):
        compare_nodes(file("fp32"), file("fp16"), IMAGES[0])


# ------------------------------------------------------------------------------- artifacts


def artifact(folder, *, spoiled=None, weights="random", forms=("fp32", "int8-u8s8"), engines=()):
    """Write an artifact with ONNX files and engines; the one named `spoiled` is wrong."""
    folder.mkdir()
    parity = Parity(
        stage="onnx", reference="PyTorch", batches=(1,), max_relative_error=0.0, tolerance=1e-4,
        min_cosine=1.0, top1_agreement_percent=100.0,
    )  # fmt: skip
    records = [Engine(runtime="ncnn", precision="fp32", parity=parity, files=())]
    if "openvino" in engines:
        made = engine(spoil(file(INT8)) if spoiled == "openvino" else file(INT8), "int8", folder)
        names = tuple(path.name for path in made)
        records.append(Engine(runtime="openvino", precision="int8", parity=parity, files=names))
        (folder / f"{INT8}.onnx").unlink()
    files = {form: f"model.{form}.onnx" for form in forms}
    for form, name in files.items():
        proto = spoil(file(form)) if spoiled == form else file(form)
        (folder / name).write_bytes(proto.SerializeToString())
    if "onnxruntime" in engines:
        names = (files["fp32"],)
        records.append(Engine(runtime="onnxruntime", precision="fp32", parity=parity, files=names))
    with torch.inference_mode():
        logits = network()(torch.from_numpy(IMAGES)).numpy()
    np.savez(folder / EXPECTED, inputs=IMAGES, logits=logits)
    manifest = Artifact(
        model="repvgg_a0", weights=weights, weights_sha256=None, device="cpu",
        graph_form="deploy", preprocess=Preprocess(input_size=(3, SIDE, SIDE)), classes=(),
        data=None, checks=(parity,), onnx=files, engines=tuple(records), kit=(), not_built={},
        notes=(), versions={}, created="",
        files={entry.name: file_sha256(entry) for entry in folder.iterdir()},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def stages(report):
    return [entry.stage for entry in report.compared]


def test_an_artifact_is_compared_from_pytorch_to_its_engines(tmp_path):
    folder = artifact(tmp_path / "a", forms=("fp32", INT8), engines=("openvino", "onnxruntime"))
    report = deep_verify(folder, module=network())
    assert stages(report) == ["onnx fp32", f"onnx {INT8}", "openvino int8"]
    assert report.parting is None
    assert set(report.skipped) == {"ncnn fp32", "onnxruntime fp32"}
    assert "keeps no names" in report.skipped["ncnn fp32"]
    assert "model.fp32.onnx itself" in report.skipped["onnxruntime fp32"]


def test_the_report_names_the_first_stage_and_node_that_part(tmp_path):
    report = deep_verify(artifact(tmp_path / "a", spoiled="int8-u8s8"), module=network())
    assert report.parting is not None and report.parting.stage == "onnx int8-u8s8"
    assert report.parting.parting is not None and report.parting.parting.node == reader()
    assert str(report.parting).startswith(
        "onnx int8-u8s8 parts from onnx fp32 first at stage stages.2, node " + reader()
    )


def test_a_wrong_engine_of_a_right_file_is_found(tmp_path):
    folder = artifact(
        tmp_path / "a", spoiled="openvino", forms=("fp32", INT8), engines=("openvino",)
    )
    report = deep_verify(folder, module=network())
    assert report.parting is not None and report.parting.stage == "openvino int8"
    assert report.parting.parting is not None and report.parting.parting.node == reader()


def test_an_engine_whose_onnx_file_is_gone_is_skipped_with_the_reason(tmp_path):
    folder = artifact(tmp_path / "a", forms=("fp32",), engines=("openvino",))
    report = deep_verify(folder, module=network())
    assert f"no {INT8} ONNX file" in report.skipped["openvino int8"]


def test_a_wrong_float_file_is_found_against_pytorch(tmp_path):
    report = deep_verify(artifact(tmp_path / "a", spoiled="fp32"), module=network())
    assert report.parting is not None and report.parting.reference == "PyTorch"
    assert report.parting.parting is not None and report.parting.parting.stage == "stages.2"


def test_without_the_checkpoint_pytorch_is_skipped_with_the_reason(tmp_path):
    report = deep_verify(artifact(tmp_path / "a"))
    assert "no file here" in report.skipped["pytorch"]
    assert stages(report) == ["onnx int8-u8s8"]


def test_another_checkpoint_than_the_exported_one_is_not_compared(tmp_path):
    checkpoint = tmp_path / "other.safetensors"
    save_file(dict(small("repvgg_a0").state_dict()), checkpoint)
    report = deep_verify(artifact(tmp_path / "a", weights=str(checkpoint)))
    assert "sha256 differs" in report.skipped["pytorch"]


def test_another_module_than_the_exported_one_is_not_compared(tmp_path):
    report = deep_verify(artifact(tmp_path / "a"), module=small("mobilenetv2_035"))
    assert "not the network of the artifact" in report.skipped["pytorch"]


def test_without_a_float_file_the_typed_ones_are_skipped_with_the_reason(tmp_path):
    report = deep_verify(artifact(tmp_path / "a", forms=("int8-u8s8",)), module=network())
    assert "no fp32 ONNX file" in report.skipped["onnx int8-u8s8"] and not report.compared


def test_a_changed_file_is_refused_before_anything_runs(tmp_path):
    folder = artifact(tmp_path / "a")
    (folder / "model.int8-u8s8.onnx").write_bytes(b"something else")
    with pytest.raises(CheckFailed, match=r"model\.int8-u8s8\.onnx was changed"):
        deep_verify(folder)
