"""`--io fp16`: ONNX files that take and give 16-bit floats, from export to the kit."""

import shutil
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_train import litezoo

from litezoo.export.artifact import load, read_artifact, read_expected, verify
from litezoo.export.compare import worst_layers
from litezoo.export.deep import (
    ENGINE_TOLERANCE,
    compare_nodes,
    compare_openvino,
    deep_verify,
    first_parting,
)
from litezoo.export.embed import embed_preprocess
from litezoo.export.exporter import export
from litezoo.export.runtime import get_runtime
from litezoo.export.to_half import read_io, to_half
from litezoo.export.to_int8 import quantize
from litezoo.export.to_onnx import load_onnx
from litezoo.models.errors import UsageError
from litezoo.recipes.devices import get_device

every_form = pytest.mark.parametrize("form", ["fp16", "bf16", "int8-fp16", "int8-bf16"])
H200_FORMS = {"int8-fp16", "int8-bf16", "fp16", "bf16", "fp32"}


pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(scope="module")
def for_h200(tmp_path_factory):
    """Return an artifact with a kit whose fp16 files take and give float16."""
    folder = tmp_path_factory.mktemp("half_io") / "h200"
    export(
        "repvgg_tiny", device="h200", weights="random", out=folder, calibration="random", io="fp16",
        triton=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pair(for_h200):
    """Return a function from a form to its file with float32 ends and its file with 16-bit ends."""

    @cache
    def made(form):
        proto = onnx.load(for_h200 / "model.fp32.onnx")
        if form.startswith("int8"):
            proto = quantize(proto, read_expected(for_h200)[0], form="int8")
        return to_half(proto, form[-4:]), to_half(proto, form[-4:], io="half")

    return made


@pytest.fixture
def for_mine(tmp_path_factory, monkeypatch):
    """Return the artifact, made once, of a device whose runtimes run fp16 files here."""
    folder = tmp_path_factory.getbasetemp() / "half_io_mine"
    monkeypatch.setenv("LITEZOO_DEVICES", str(folder))
    if not folder.is_dir():
        folder.mkdir()
        (folder / "mine.yaml").write_text(
            "title: mine\nkind: cpu\nruntimes: [onnxruntime, openvino]\nprecisions: [fp16]\n"
        )
        words = ("export", "repvgg_tiny", "--weights", "random", "--device", "mine")
        assert litezoo(*words, "--io", "fp16", "--out", folder / "out") == 0
    return folder / "out"


def ios_of(folder):
    files = read_artifact(folder).onnx
    return {form: read_io(onnx.load(folder / name)) for form, name in files.items()}


# --- the type of a file --------------------------------------------------------------------------


@every_form
def test_the_type_of_a_file_is_that_of_its_ends(pair, form):
    assert [read_io(proto) for proto in pair(form)] == ["fp32", form[-4:]]


def ends_of(given, made):
    ends = [helper.make_tensor_value_info(n, k, [1]) for n, k in (("x", given), ("y", made))]
    cast = helper.make_node("Cast", ["x"], ["y"], to=made)
    return helper.make_model(helper.make_graph([cast], "ends", ends[:1], ends[1:]))


@pytest.mark.parametrize(
    "given, words",
    [(TensorProto.FLOAT16, "are FLOAT, FLOAT16;"), (TensorProto.UINT8, "are FLOAT, UINT8;")],
)
def test_a_file_of_two_types_has_no_one_type(given, words):
    with pytest.raises(UsageError, match=words):
        read_io(ends_of(given, TensorProto.FLOAT))


def test_a_file_of_integers_has_no_type_of_floats():
    with pytest.raises(UsageError, match="are INT64; export one"):
        read_io(ends_of(TensorProto.INT64, TensorProto.INT64))


# --- exporting -----------------------------------------------------------------------------------


def test_only_the_files_of_that_type_take_and_give_it(for_h200):
    wanted = {form: "fp16" if form.endswith("fp16") else "fp32" for form in H200_FORMS}
    assert ios_of(for_h200) == wanted


def test_the_artifact_says_which_files_take_halves(for_h200):
    said = [note for note in read_artifact(for_h200).notes if "inputs" in note]
    assert sorted(said) == [
        "inputs and outputs of model.fp16.onnx are fp16",
        "inputs and outputs of model.int8-fp16.onnx are fp16",
    ]


def test_files_that_take_halves_are_verified(for_h200):
    assert {f"onnx {form}" for form in H200_FORMS} <= {p.stage for p in verify(for_h200).parities}


def test_the_kit_has_the_files_and_tells_triton_their_type(for_h200):
    kit = for_h200 / "kit"
    half, full = (kit / f"repvgg_tiny_{form}.pbtxt" for form in ("fp16", "fp32"))
    assert read_io(onnx.load(kit / "repvgg_tiny.fp16.onnx")) == "fp16"
    assert half.read_text().count("TYPE_FP16") == full.read_text().count("TYPE_FP32") > 2
    assert "TYPE_FP32" not in half.read_text() and "TYPE_FP16" not in full.read_text()
    with np.load(kit / "expected.npz") as arrays:
        assert arrays["inputs"].dtype == arrays["logits_int8-fp16"].dtype == np.float32


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_engine_of_halves_takes_and_gives_float32(for_mine, runtime):
    assert ios_of(for_mine) == {"fp16": "fp16"}
    images, expected = read_expected(for_mine)
    logits = load(for_mine, runtime=runtime)(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=0.01 * np.abs(expected).max())


def test_engines_of_halves_are_verified(for_mine):
    assert litezoo("verify", for_mine) == 0


def test_the_same_type_is_up_to_date_and_another_is_another_artifact(for_mine, tmp_path):
    def ask(io):
        steps = []
        export(
            "repvgg_tiny", device="mine", weights="random", out=out, io=io, progress=steps.append
        )
        return f"{out} is up to date" in steps

    out = shutil.copytree(for_mine, tmp_path / "out")
    assert ask("fp16")
    assert not ask("fp32") and ios_of(out) == {"fp16": "fp32"}
    assert ask("fp32")


REFUSED = {
    "no type": ({"io": "half"}, "unknown type of inputs and outputs 'half'"),
    "no file of it": ({"io": "bf16", "precision": "fp16"}, "no ONNX file of fp16 for h200 is bf16"),
    "float32 only": ({"io": "fp16", "precision": "fp32"}, "no ONNX file of fp32 for h200 is fp16"),
    "made by the runtime": (
        {"io": "bf16", "device": "cpu"},
        r"bf16, fp32 for cpu is bf16 inside; export with --io fp32",
    ),
    "bytes": ({"io": "fp16", "embed": True}, "take uint8 images, not fp16"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_that_no_file_would_have_is_refused(kind, tmp_path):
    values, words = REFUSED[kind]
    with pytest.raises(UsageError, match=words):
        export(
            "repvgg_tiny", weights="random", out=tmp_path / "out", **{"device": "h200", **values}
        )
    assert not (tmp_path / "out").exists()


# --- what reads such files -----------------------------------------------------------------------


@every_form
def test_a_session_takes_float32_and_gives_float32(for_h200, pair, form, tmp_path):
    images, (_, half) = read_expected(for_h200)[0], pair(form)
    onnx.save(half, tmp_path / "a.onnx")
    runtime = get_runtime("onnxruntime")
    session = runtime.load([tmp_path / "a.onnx"], device=get_device("cpu"), precision=form)
    logits = session.run(images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, load_onnx(half)(images), rtol=1e-3, atol=1e-3)


@every_form
def test_nodes_are_compared_as_with_float32_ends(for_h200, pair, form):
    float_file = onnx.load(for_h200 / "model.fp32.onnx")
    images = read_expected(for_h200)[0][:1]
    full, half = (
        {
            (row.node, row.tensor): row.relative_error
            for row in compare_nodes(float_file, proto, images)
        }
        for proto in pair(form)
    )
    assert half == pytest.approx(full, rel=1e-2, abs=1e-3) and half


@pytest.mark.parametrize("form", ["int8-fp16", "int8-bf16"])
def test_the_worst_layers_are_those_of_float32_ends(for_h200, pair, form):
    float_file = onnx.load(for_h200 / "model.fp32.onnx")
    images = read_expected(for_h200)[0]
    full, half = (worst_layers(float_file, proto, images) for proto in pair(form))
    assert [layer.name for layer in half] == [layer.name for layer in full]
    assert [layer.snr_db for layer in half] == pytest.approx([layer.snr_db for layer in full])


def test_an_artifact_of_halves_is_verified_node_by_node(for_h200):
    report = deep_verify(for_h200, most=1)
    compared = {entry.stage: entry.parting for entry in report.compared}
    assert compared["onnx fp16"] is None and compared["onnx int8-fp16"] is None


def test_an_openvino_engine_of_halves_is_compared_node_by_node(for_mine):
    proto = onnx.load(for_mine / "model.fp16.onnx")
    images = read_expected(for_mine)[0][:1]
    rows = compare_openvino(proto, for_mine / "openvino.fp16.xml", images, precision="fp16")
    assert rows and first_parting(rows, ENGINE_TOLERANCE["fp16"]) is None


def test_halves_have_no_normalisation_put_before_them(for_h200):
    preprocess = read_artifact(for_h200).preprocess
    with pytest.raises(UsageError, match="one input of float32"):
        embed_preprocess(onnx.load(for_h200 / "model.fp16.onnx"), preprocess)
