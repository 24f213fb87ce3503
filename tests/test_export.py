import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from helpers import images
from onnx import TensorProto, numpy_helper
from PIL import Image
from test_data import write_folder
from test_fuse import kill_channels
from test_train import SHORT, digits_top1, litezoo, read_plain, tiny_run

from litezoo.export import exporter, runtime_ncnn, runtime_onnxruntime, runtime_openvino, typed
from litezoo.export.artifact import (
    Artifact,
    default_folder,
    load,
    read_artifact,
    signed_json,
    verify,
)
from litezoo.export.exporter import export
from litezoo.export.parity import BATCHES, Parity
from litezoo.export.runtime import BuildSource, get_runtime
from litezoo.export.runtime_openvino import OpenVino
from litezoo.export.source import choose_source, load_source
from litezoo.export.to_half import activation_maxima, check_fp16_range, to_half
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.files import file_sha256
from litezoo.models.weights import read_checkpoint
from litezoo.recipes.data import open_data
from litezoo.recipes.devices import get_device

NO_OPENVINO = "runtime 'openvino' needs openvino: pip install 'litezoo[cpu]'"
NO_ONNXRUNTIME = "runtime 'onnxruntime' needs onnxruntime: pip install 'litezoo[export]'"
NO_TENSORRT = "runtime 'tensorrt' needs tensorrt: pip install 'litezoo[tensorrt]'"


def exported(tmp_path_factory, device):
    """Return the tiny run's artifact for a device, made once a session."""
    folder = tmp_path_factory.getbasetemp() / f"tiny_{device}"
    if not folder.is_dir():
        weights = tiny_run(tmp_path_factory) / "best.ckpt"
        precision = "fp32" if device == "cpu" else "auto"
        export(
            "repvgg_tiny", device=device, weights=str(weights), out=folder, precision=precision,
            max_drop=100,
        )  # fmt: skip
    return folder


#: "short": the command ranks engines by a measurement that takes an instant.
pytestmark = pytest.mark.usefixtures("tiny_model", "short")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory)


@pytest.fixture(scope="module")
def best(run):
    return str(run / "best.ckpt")


@pytest.fixture(scope="module")
def for_t4(tmp_path_factory):
    assert get_runtime("tensorrt").missing(get_device("t4")) is not None  # no engine, a kit
    return exported(tmp_path_factory, "t4")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(for_cpu, tmp_path):
    return shutil.copytree(for_cpu, tmp_path / "copy")


def files_of(folder):
    return {
        str(file.relative_to(folder)): file_sha256(file)
        for file in folder.rglob("*")
        if file.is_file()
    }


def flip(file, position=0.5):
    """Flip one bit at a relative position of a file."""
    content = bytearray(file.read_bytes())
    content[min(int(position * len(content)), len(content) - 1)] ^= 4
    file.write_bytes(content)


@torch.inference_mode()
def pytorch_logits(weights, batch):
    return create_model("repvgg_tiny", weights=weights).eval()(torch.from_numpy(batch)).numpy()


def noise(count, *, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 1, 32, 32)).astype(np.float32)


# ------------------------------------------------------------------------------- what is written

CPU_FILES = (
    "expected.npz",
    "golden.npz",
    "manifest.json",
    "model.fp32.onnx",
    "ncnn.fp32.bin",
    "ncnn.fp32.param",
    "openvino.fp32.bin",
    "openvino.fp32.xml",
)
T4_FILES = (
    "expected.npz",
    "golden.npz",
    "kit/README.md",
    "kit/build_engine.py",
    "kit/expected.npz",
    "kit/kit.json",
    "kit/repvgg_tiny.fp16.onnx",
    "kit/repvgg_tiny.fp32.onnx",
    "kit/repvgg_tiny.int8-fp16.onnx",
    "kit/requirements.txt",
    "kit/trtexec.sh",
    "manifest.json",
    "model.fp16.onnx",
    "model.fp32.onnx",
    "model.int8-fp16.onnx",
)


def test_an_artifact_has_its_files_and_their_hashes(for_cpu):
    found = files_of(for_cpu)
    assert tuple(sorted(found)) == CPU_FILES
    del found["manifest.json"]
    assert dict(read_artifact(for_cpu).files) == found


def test_the_manifest_says_what_it_is_of(for_cpu, run):
    artifact = read_artifact(for_cpu)
    assert artifact.model == "repvgg_tiny" and artifact.device == "cpu"
    assert artifact.graph_form == "deploy"
    assert artifact.weights == str(run / "best.ckpt")
    assert artifact.weights_sha256 == file_sha256(run / "best.ckpt")
    assert artifact.classes == tuple("0123456789") and artifact.data == "digits"
    assert artifact.preprocess == read_checkpoint(run / "best.ckpt").info.preprocess
    assert artifact.onnx == {"fp32": "model.fp32.onnx"}
    assert not artifact.kit and not artifact.not_built and not artifact.notes
    assert {"python", "litezoo", "torch", "onnx", "onnxsim", "onnxruntime"} <= {*artifact.versions}
    assert artifact.created.endswith("+00:00")


def test_the_manifest_is_read_as_it_was_written(for_cpu):
    text = (for_cpu / "manifest.json").read_text()
    assert Artifact.from_json(text).to_json() == text


def test_every_stage_and_engine_has_its_parity(for_cpu):
    artifact = read_artifact(for_cpu)
    assert [check.stage for check in artifact.checks] == ["fuse", "onnxsim", "onnx fp32"]
    labels = {engine.label for engine in artifact.engines}
    assert labels == {"openvino fp32", "onnxruntime fp32", "ncnn fp32"}
    for parity in (artifact.checks[-1], *(engine.parity for engine in artifact.engines)):
        assert parity.batches == BATCHES == (1, 2, 7)
        assert 0 < parity.max_relative_error <= parity.tolerance == 1e-4
        assert parity.min_cosine > 0.9999 and parity.top1_agreement_percent == 100
        assert parity.reference == "PyTorch"


def test_engines_say_their_versions_and_files(for_cpu):
    engines = {engine.runtime: engine for engine in read_artifact(for_cpu).engines}
    openvino, onnxruntime, ncnn = (engines[n] for n in ("openvino", "onnxruntime", "ncnn"))
    assert ncnn.files == ("ncnn.fp32.param", "ncnn.fp32.bin")
    assert openvino.files == ("openvino.fp32.xml", "openvino.fp32.bin")
    assert onnxruntime.files == ("model.fp32.onnx",)
    assert {*openvino.versions} == {"openvino"} and {*onnxruntime.versions} == {"onnxruntime"}


def test_accuracy_is_that_of_pytorch_on_the_validation_split(for_cpu, best):
    reference = digits_top1(create_model("repvgg_tiny", weights=best).eval(), "val")
    for engine in read_artifact(for_cpu).engines:
        accuracy = engine.accuracy
        assert (accuracy.data, accuracy.images) == ("digits (val)", 288)
        assert accuracy.pytorch_top1_percent == pytest.approx(reference, abs=1e-3)
        assert accuracy.top1_percent == accuracy.pytorch_top1_percent


@pytest.mark.parametrize(("threads", "pinned"), [(1, False), (3, False), (4, True), (None, True)])
def test_openvinos_sessions_of_few_threads_are_not_kept_on_the_same_cores(
    for_cpu, monkeypatch, threads, pinned
):
    """Pinned, two sessions of one thread each shared one core: half the throughput of one."""
    monkeypatch.setattr(runtime_openvino.os, "cpu_count", lambda: 4)
    core, files = MagicMock(), [for_cpu / "openvino.fp32.xml"]
    monkeypatch.setattr(runtime_openvino, "one_core", lambda: core)
    OpenVino().load(files, device=get_device("cpu"), precision="fp32", threads=threads)
    _model, _device, given = core.compile_model.call_args.args
    assert given["ENABLE_CPU_PINNING"] is pinned


def test_the_expected_logits_are_those_of_the_checkpoint_on_real_images(for_cpu, best):
    with np.load(for_cpu / "expected.npz") as arrays:
        inputs, logits = arrays["inputs"], arrays["logits"]
    assert inputs.shape == (16, 1, 32, 32) and logits.shape == (16, 10)
    wanted = pytorch_logits(best, inputs)
    assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert inputs.min() == pytest.approx(-0.3 / 0.35, abs=1e-6)  # the digits' black


def test_the_command_prints_the_evidence(here, best, capsys):
    assert (
        litezoo(
            "export", "repvgg_tiny", "--device", "cpu", "--precision", "fp32", "--weights", best
        )
        == 0
    )
    text = capsys.readouterr().out
    for words in ("fuse", "onnxsim", "onnx fp32", "openvino fp32", "onnxruntime fp32", "1, 2, 7"):
        assert words in text
    assert "288 images" in text
    assert text.strip().endswith("artifact: artifacts/repvgg_tiny/cpu")
    assert (here / default_folder("repvgg_tiny", "cpu") / "manifest.json").is_file()


def test_fewer_images_are_enough_for_a_look_at_accuracy(best, tmp_path):
    artifact = export(
        "repvgg_tiny",
        device="cpu",
        precision="fp32",
        weights=best,
        out=tmp_path / "a",
        accuracy_images=50,
    )
    assert [engine.accuracy.images for engine in artifact.engines] == [50, 50, 50]


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_images_that_cannot_be_is_refused(best, tmp_path, count):
    words = ("--weights", best, "--out", tmp_path / "a", "--accuracy-images", count)
    assert litezoo("export", "repvgg_tiny", "--device", "cpu", "--precision", "fp32", *words) == 2


def test_an_older_artifact_is_replaced_whole(copy, best):
    (copy / "leftover.bin").write_bytes(b"old")
    export("repvgg_tiny", device="cpu", precision="fp32", weights=best, out=copy, force=True)
    assert tuple(sorted(files_of(copy))) == CPU_FILES
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
    assert (copy.stat().st_mode & 0o777) == 0o755


@pytest.mark.parametrize(("name", "kept"), [("photo.jpg", b"mine"), (".hidden", b"")])
def test_a_folder_with_other_files_is_left_alone(best, tmp_path, name, kept):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(kept)
    with pytest.raises(UsageError, match="mine holds other files; give an empty or new folder"):
        export("repvgg_tiny", device="cpu", precision="fp32", weights=best, out=tmp_path / "mine")
    assert {**files_of(tmp_path)}.keys() == {f"mine/{name}"}
    assert (tmp_path / "mine" / name).read_bytes() == kept


def test_a_file_is_no_place_for_an_artifact(best, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UsageError, match="a is a file; give a folder with --out"):
        export("repvgg_tiny", device="cpu", precision="fp32", weights=best, out=tmp_path / "a")


# ------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def fp32(for_t4):
    return onnx.load(for_t4 / "model.fp32.onnx")


@pytest.fixture(scope="module")
def fp16(for_t4):
    return onnx.load(for_t4 / "model.fp16.onnx")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_onnx_file_is_one_checked_file_of_opset_20_with_an_open_batch(for_t4, precision):
    file = for_t4 / f"model.{precision}.onnx"
    model = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert outside == []
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("input", "logits")
    for value, sizes in ((image, [1, 32, 32]), (logits, [10])):
        first, *rest = value.type.tensor_type.shape.dim
        assert first.dim_param and not first.HasField("dim_value")
        assert [dim.dim_value for dim in rest] == sizes
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_onnx_file_is_of_the_deploy_form_and_says_so(for_t4, precision):
    model = onnx.load(for_t4 / f"model.{precision}.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == 7  # the stem and six blocks, one convolution each
    assert "Add" not in kinds  # no branches
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert notes["litezoo.graph_form"] == "deploy" and notes["litezoo.model"] == "repvgg_tiny"
    assert json.loads(notes["litezoo.classes"]) == list("0123456789")
    assert json.loads(notes["litezoo.preprocess"])["input_size"] == [1, 32, 32]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_of_the_exporting_machine_is_in_an_onnx_file(for_t4, precision):
    file = for_t4 / f"model.{precision}.onnx"
    graph = onnx.load(file).graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        assert not part.metadata_props
    assert not any(node.doc_string for node in graph.node)
    for path in (Path(__file__).parent.parent, Path(torch.__file__).parent):
        assert str(path).encode() not in file.read_bytes()


def test_every_float_of_the_fp16_file_is_typed_and_only_its_ends_are_float32(fp32, fp16):
    kinds = {tensor.data_type for tensor in fp16.graph.initializer}
    assert TensorProto.FLOAT16 in kinds and TensorProto.FLOAT not in kinds
    casts = [node for node in fp16.graph.node if node.op_type == "Cast"]
    ends = [(node.input[0], node.output[0], node.attribute[0].i) for node in casts]
    assert ends == [
        ("input", "input_fp16", TensorProto.FLOAT16),
        ("logits_fp16", "logits", TensorProto.FLOAT),
    ]
    inner = {value.name: value.type.tensor_type.elem_type for value in fp16.graph.value_info}
    assert inner and {*inner.values()} <= {TensorProto.FLOAT16, TensorProto.INT64}
    weights = {t.name: numpy_helper.to_array(t) for t in fp32.graph.initializer}
    for tensor in fp16.graph.initializer:
        half, full = numpy_helper.to_array(tensor), weights[tensor.name]
        assert np.array_equal(half, full.astype(half.dtype))


def test_the_fp16_file_gives_close_logits(for_t4, best):
    artifact = read_artifact(for_t4)
    parity = {check.stage: check for check in artifact.checks}["onnx fp16"]
    assert 0 < parity.max_relative_error < 0.01 and parity.batches == BATCHES
    session = get_runtime("onnxruntime").load(
        [for_t4 / "model.fp16.onnx"], device=get_device("cpu"), precision="fp16", threads=1
    )
    batch = noise(3)
    got, want = session.run(batch), pytorch_logits(best, batch)
    assert got.dtype == np.float32
    assert 0 < np.abs(got - want).max() <= 0.01 * np.abs(want).max()


def test_typing_leaves_the_float32_model_as_it_was(fp32):
    before = fp32.SerializeToString()
    to_half(fp32, "fp16")
    assert fp32.SerializeToString() == before


def scaled(proto, factor):
    """Return a copy whose first convolution's weights are scaled, and their name."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    name = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor) * np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model, name


def test_a_weight_beyond_float16_is_refused_by_name(fp32):
    model, name = scaled(fp32, 1e6)
    with pytest.raises(CheckFailed) as caught:
        to_half(model, "fp16")
    assert str(caught.value).startswith(f"the weight {name} reaches ")
    assert str(caught.value).endswith(", beyond float16's 65504; export fp32 instead")


def test_an_activation_beyond_float16_is_refused_by_name(fp32):
    assert check_fp16_range(fp32, noise(3)) < 1000
    maxima = activation_maxima(fp32, noise(3) * 1e6)
    largest = max(maxima, key=maxima.get)
    with pytest.raises(CheckFailed) as caught:
        check_fp16_range(fp32, noise(3) * 1e6)
    assert str(caught.value) == (
        f"the activation {largest} reaches {maxima[largest]:.3g}, beyond float16's 65504; export "
        "fp32 instead"
    )


def test_the_range_is_that_of_the_worst_image(fp32):
    images = noise(4)
    images[2] *= 100
    together = activation_maxima(fp32, images)
    alone = activation_maxima(fp32, images[2:3])
    assert {*together} == {name for node in fp32.graph.node for name in node.output}
    assert all(together[name] == pytest.approx(alone[name], rel=1e-5) for name in alone)


@pytest.fixture
def overflowing(run, tmp_path):
    """A checkpoint whose logits are beyond 65504 for some digit."""
    content = read_plain(run / "best.ckpt")
    content["state_dict"]["net.head.fc.weight"] *= 5e4
    torch.save(content, tmp_path / "large.ckpt")
    return tmp_path / "large.ckpt"


def test_a_network_that_overflows_in_fp16_is_exported_in_fp32_only(overflowing, here, capsys):
    words = ("export", "repvgg_tiny", "--device", "t4", "--weights", overflowing, "--out", "out")
    assert litezoo(*words, "--precision", "fp16") == 3
    text = capsys.readouterr().err
    assert "the activation logits reaches" in text and "export fp32 instead" in text
    assert [entry.name for entry in here.iterdir()] == ["large.ckpt"]
    assert litezoo(*words) == 0
    artifact = read_artifact(here / "out")
    assert artifact.onnx == {"fp32": "model.fp32.onnx"}
    assert "the activation logits reaches" in artifact.not_built["onnx fp16"]


# ------------------------------------------------------------------------- a device that is absent


def test_for_an_absent_gpu_there_is_a_kit(for_t4):
    assert tuple(sorted(files_of(for_t4))) == T4_FILES
    artifact = read_artifact(for_t4)
    assert artifact.device == "t4" and artifact.engines == ()
    assert artifact.not_built["tensorrt"] == NO_TENSORRT
    assert {*artifact.not_built} == {"tensorrt", "onnxruntime_cuda", "onnxruntime_tensorrt"}
    assert {*artifact.kit} == {name for name in T4_FILES if name.startswith("kit/")}
    assert {*artifact.onnx} == {"int8-fp16", "fp16", "fp32"}
    assert [check.stage for check in artifact.checks] == [
        "fuse",
        "onnxsim",
        "onnx int8-fp16",
        "onnx fp16",
        "onnx fp32",
    ]
    for form, file in artifact.onnx.items():
        inside = for_t4 / "kit" / f"repvgg_tiny.{form}.onnx"
        assert inside.read_bytes() == (for_t4 / file).read_bytes()


def test_accuracy_of_an_absent_gpus_files_is_measured_by_onnx_runtime(for_t4):
    accuracy = read_artifact(for_t4).onnx_accuracy
    assert {*accuracy} == {"int8-fp16", "fp16", "fp32"}
    assert accuracy["fp32"].top1_percent == accuracy["fp32"].pytorch_top1_percent
    assert accuracy["fp16"].top1_percent == pytest.approx(
        accuracy["fp16"].pytorch_top1_percent, abs=0.6
    )


def test_the_command_says_what_was_not_built_and_ends_well(here, best, capsys):
    words = ("export", "repvgg_tiny", "--device", "t4", "--weights", best, "--precision", "fp16")
    assert litezoo(*words) == 0
    text = capsys.readouterr().out
    assert f"tensorrt: not built ({NO_TENSORRT})" in text
    assert "build kit: artifacts/repvgg_tiny/t4/kit" in text
    artifact = read_artifact(here / "artifacts" / "repvgg_tiny" / "t4")
    assert artifact.onnx == {"fp16": "model.fp16.onnx"}


def test_an_engine_that_is_required_is_missing(here, best, capsys):
    words = ("export", "repvgg_tiny", "--device", "t4", "--weights", best, "--engine", "require")
    assert litezoo(*words) == 4
    assert capsys.readouterr().err.endswith(
        f"litezoo: no engine for t4 can be built here: {NO_TENSORRT}\n"
    )
    assert list(here.iterdir()) == []


def test_a_device_of_ones_own_gets_fp16_engines(tmp_path, monkeypatch, best):
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nkind: cpu\nruntimes: [onnxruntime, openvino]\nprecisions: [fp16]\n"
    )
    monkeypatch.setenv("LITEZOO_DEVICES", str(tmp_path))
    artifact = export("repvgg_tiny", device="mine", weights=best, out=tmp_path / "out")
    assert [engine.label for engine in artifact.engines] == ["onnxruntime fp16", "openvino fp16"]
    assert all(engine.parity.max_relative_error <= 0.01 for engine in artifact.engines)
    assert len(verify(tmp_path / "out").parities) == 3


# -------------------------------------------------------------------------- a stage that is wrong


class Wrong:
    """A session whose outputs are spoilt."""

    def __init__(self, session, spoil):
        self.session, self.spoil = session, spoil

    def run(self, batch):
        return self.spoil(self.session.run(batch).copy())


def slightly(logits):
    logits[-1, 3] += 0.01 * np.abs(logits).max()
    return logits


def with_nan(logits):
    logits[0, 0] = np.nan
    return logits


def only_for_seven(logits):
    return logits if len(logits) < 7 else logits[::-1]


WRONG = {
    "slightly": (slightly, "openvino fp32 differs from PyTorch by "),
    "nan": (with_nan, "openvino fp32 gives NaN or infinite outputs"),
    "first image only": (lambda x: x[:1], "openvino fp32 at batch 2 gives outputs of shape"),
    "mixed at seven": (only_for_seven, "openvino fp32 differs from PyTorch by "),
    "classes lost": (lambda x: x[:, :9], "openvino fp32 at batch 1 gives outputs of shape"),
}


def spoil_openvino(monkeypatch, spoil):
    right = OpenVino.load
    monkeypatch.setattr(OpenVino, "load", lambda *a, **k: Wrong(right(*a, **k), spoil))


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_engine_is_named_and_nothing_is_written(tmp_path, best, monkeypatch, kind):
    spoil, words = WRONG[kind]
    spoil_openvino(monkeypatch, spoil)
    with pytest.raises(CheckFailed) as caught:
        export("repvgg_tiny", device="cpu", precision="fp32", weights=best, out=tmp_path / "out")
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith("; nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_artifact_before_it_as_it_was(copy, best, monkeypatch, capsys):
    before = files_of(copy.parent)
    spoil_openvino(monkeypatch, slightly)
    words = ("--device", "cpu", "--precision", "fp32", "--weights", best, "--out", copy)
    assert litezoo("export", "repvgg_tiny", *words, "--force") == 3
    assert "litezoo: openvino fp32 differs from PyTorch" in capsys.readouterr().err
    assert files_of(copy.parent) == before
    monkeypatch.undo()
    assert verify(copy).files == len(CPU_FILES) - 1


def test_an_interrupted_export_leaves_the_artifact_before_it_as_it_was(copy, best):
    before = files_of(copy.parent)

    def progress(step):
        if step.startswith("building"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(
            "repvgg_tiny", device="cpu", precision="fp32", weights=best, out=copy, force=True,
            progress=progress,
        )  # fmt: skip
    assert files_of(copy.parent) == before
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]


def test_an_artifact_that_cannot_be_put_in_place_leaves_the_one_before_it(copy, best, monkeypatch):
    before = files_of(copy.parent)
    replace = os.replace

    def full_disk(source, target):
        if Path(target) == copy and not str(source).endswith(".old"):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export("repvgg_tiny", device="cpu", precision="fp32", weights=best, out=copy, force=True)
    assert files_of(copy.parent) == before


def spoil_proto(proto):
    return scaled(proto, 1.01)[0]


def spoil_fuse(monkeypatch):
    right = exporter.fuse_with_report

    def wrong(model, *, images):
        report = right(model, images=images)
        with torch.no_grad():
            next(report.model.parameters()).mul_(1.01)
        return report

    monkeypatch.setattr(exporter, "fuse_with_report", wrong)


def spoil_exporter(monkeypatch):
    right = typed.export_onnx
    monkeypatch.setattr(typed, "export_onnx", lambda *a, **k: spoil_proto(right(*a, **k)))


def spoil_onnxsim(monkeypatch):
    right = onnxsim.simplify
    monkeypatch.setattr(onnxsim, "simplify", lambda p: (spoil_proto(right(p)[0]), True))


def spoil_fp16(monkeypatch):
    right = typed.to_half

    def wrong(proto, half, *, io):
        return right(scaled(proto, 1.2)[0], half, io=io)

    monkeypatch.setattr(typed, "to_half", wrong)


STAGES = {
    "fuse differs from the train form by": spoil_fuse,
    "onnx fp32 differs from PyTorch by": spoil_exporter,
    "onnxsim differs from the ONNX file before it by": spoil_onnxsim,
    "onnx fp16 differs from PyTorch by": spoil_fp16,
}


@pytest.mark.parametrize("words", STAGES)
def test_the_stage_at_which_outputs_part_is_named(tmp_path, best, monkeypatch, words):
    STAGES[words](monkeypatch)
    precision = "fp16" if "fp16" in words else "fp32"
    with pytest.raises(CheckFailed) as caught:
        export(
            "repvgg_tiny", device="t4", weights=best, out=tmp_path / "out", precision=precision
        )  # fmt: skip
    assert str(caught.value).startswith(words)
    assert list(tmp_path.iterdir()) == []


def test_another_opset_than_asked_for_is_noticed(tmp_path, best, monkeypatch):
    monkeypatch.setattr("litezoo.export.to_onnx.OPSET", 21)
    artifact = export(
        "repvgg_tiny", device="cpu", precision="fp32", weights=best, out=tmp_path / "a"
    )
    model = onnx.load(tmp_path / "a" / artifact.onnx["fp32"])
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 21


PARITY = Parity(
    stage="a stage",
    reference="PyTorch",
    batches=(1, 2, 7),
    max_relative_error=1e-6,
    tolerance=1e-4,
    min_cosine=1.0,
    top1_agreement_percent=100.0,
)


@pytest.mark.parametrize("error", [1.1e-4, 0.5, float("nan"), float("inf")])
def test_parity_beyond_its_tolerance_cannot_be_stated(error):
    with pytest.raises(CheckFailed, match="a stage differs from PyTorch by"):
        dataclasses.replace(PARITY, max_relative_error=error)


def test_an_artifact_without_parity_cannot_be_stated(for_cpu):
    artifact = read_artifact(for_cpu)
    with pytest.raises(CheckFailed, match="repvgg_tiny has no parity numbers"):
        dataclasses.replace(artifact, checks=())


def test_an_artifact_with_nothing_to_run_cannot_be_stated(for_cpu):
    artifact = read_artifact(for_cpu)
    with pytest.raises(MissingError, match=r"nothing to run was built: no openvino here"):
        dataclasses.replace(artifact, engines=(), not_built={"openvino": "no openvino here"})


# ----------------------------------------------------------------- dead channels, and int8 risk


def test_dead_channels_are_cured_and_said_though_noise_wakes_them_up(tmp_path, monkeypatch):
    source = load_source("repvgg_tiny", "random", ())
    kill_channels(source.model, images(8, 3, 32, 32))
    source.model.stages[1][0].branch_3x3.bn.bias.data[0] = 200.0  # no data did
    monkeypatch.setattr(exporter, "load_source", lambda *_: source)
    artifact = export(
        "repvgg_tiny", device="cpu", precision="fp32", weights="random", out=tmp_path / "a"
    )
    assert any(n.startswith("dead channel") and "avoided" in n for n in artifact.notes)
    assert artifact.checks[0].stage == "fuse" and artifact.checks[0].max_relative_error <= 1e-4


def test_int8_comes_with_the_risk_that_its_weights_are(tmp_path):
    artifact = export(
        "repvgg_tiny",
        device="cpu",
        precision="int8",
        weights="random",
        calibration="random",
        out=tmp_path / "a",
    )
    assert any(n.startswith("int8 risk with per-channel weights: ") for n in artifact.notes)


def test_a_dead_channel_is_proved_on_the_training_images(tmp_path, monkeypatch):
    source = load_source("repvgg_tiny", "random", ())
    source = dataclasses.replace(
        source,
        data="digits",
        model=source.spec.build(num_classes=10, in_chans=1),
        preprocess=dataclasses.replace(
            source.preprocess, input_size=(1, 32, 32), mean=(0.3,), std=(0.35,)
        ),
        classes=tuple("0123456789"),
    )
    torch.manual_seed(0)
    x = torch.cat(list(exporter._data_images(source)))
    assert x.shape == (256, 1, 32, 32)
    kill_channels(source.model, x)
    source.model.stages[1][1].branch_identity.running_var[0] = 5e-3  # it died late
    monkeypatch.setattr(exporter, "load_source", lambda *_: source)
    artifact = export(
        "repvgg_tiny", device="cpu", precision="fp32", weights="random", out=tmp_path / "a"
    )
    assert any("stages.1.1.branch_identity: constant moved" in n for n in artifact.notes)


# --------------------------------------------------------------------------- where weights are from


def test_random_weights_are_marked_as_for_speed_only(here, capsys):
    assert (
        litezoo(
            "export", "repvgg_tiny", "--device", "cpu", "--precision", "fp32", "--weights", "random"
        )
        == 0
    )
    assert "note: random weights: for measuring speed only" in capsys.readouterr().out
    artifact = read_artifact(here / "artifacts" / "repvgg_tiny" / "cpu")
    assert artifact.weights == "random" and artifact.weights_sha256 is None
    assert artifact.notes == ("random weights: for measuring speed only",)
    assert artifact.classes == () and artifact.data is None
    assert artifact.preprocess.input_size == (3, 64, 64)
    assert all(engine.accuracy is None for engine in artifact.engines)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Point the hub client to a port that nobody listens at, and to an empty cache."""
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return endpoint


@pytest.mark.parametrize("words", [(), ("repvgg_a1",), ("repvgg",), ("repvgg_a2", "rvgg_in1k")])
def test_public_weights_that_cannot_be_fetched_name_three_things_to_type(
    here, no_hub, capsys, words
):
    model, *tag = words or ("repvgg_a0",)
    arguments = [
        *words[:1],
        "--device",
        "cpu",
        "--precision",
        "fp32",
        *(("--weights", tag[0]) if tag else ()),
    ]
    assert litezoo("export", *arguments) == 4
    *_, text = capsys.readouterr().err.strip().splitlines()
    name = "repvgg_a0" if model == "repvgg" else model
    assert text.startswith(f"litezoo: cannot fetch timm/{name}.rvgg_in1k from {no_hub} (")
    for command in ("`--weights FILE`", f"`litezoo train {name}`", "`--weights random`"):
        assert command in text
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_corrupt_checkpoint_is_named_in_one_sentence(here, run, content, capsys):
    whole = (run / "best.ckpt").read_bytes()
    (here / "broken.ckpt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert (
        litezoo(
            "export",
            "repvgg_tiny",
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--weights",
            "broken.ckpt",
        )
        == 2
    )
    text = capsys.readouterr().err
    *_, line = text.strip().splitlines()
    assert line.startswith("litezoo: broken.ckpt is ") and "Traceback" not in text
    assert [entry.name for entry in here.iterdir()] == ["broken.ckpt"]


def place_run(run, folder, *, age):
    shutil.copytree(run, folder)
    stamp = (folder / "last.ckpt").stat().st_mtime - age
    os.utime(folder / "last.ckpt", (stamp, stamp))


def test_the_newest_run_is_what_is_exported(here, run):
    place_run(run, here / "runs" / "repvgg_tiny" / "a", age=0)
    place_run(run, here / "runs" / "repvgg_tiny" / "b", age=60)
    newest = ("repvgg_tiny", "runs/repvgg_tiny/a/best.ckpt")
    assert choose_source(None, None) == newest
    assert choose_source("repvgg_tiny", None) == newest
    os.utime(here / "runs" / "repvgg_tiny" / "b" / "last.ckpt")
    assert choose_source(None, None) == ("repvgg_tiny", "runs/repvgg_tiny/b/best.ckpt")


def test_a_run_of_another_model_does_not_count(here, run):
    place_run(run, here / "runs" / "repvgg_tiny" / "a", age=0)
    assert choose_source("repvgg_a1", None) == ("repvgg_a1", "rvgg_in1k")


def test_without_a_run_public_weights_are_taken(here):
    assert choose_source(None, None) == ("repvgg_a0", "rvgg_in1k")
    assert choose_source("repvgg", None) == ("repvgg_a0", "rvgg_in1k")
    assert choose_source("repvgg_b1", None) == ("repvgg_b1", "rvgg_in1k")


def test_without_a_run_and_public_weights_three_things_to_type_are_named(here):
    with pytest.raises(MissingError) as caught:
        choose_source("repvgg_b2g2", None)
    for words in ("`litezoo train repvgg_b2g2`", "`--weights FILE`", "`--weights random`"):
        assert words in str(caught.value)


def test_what_is_asked_for_is_taken(here, run, best):
    place_run(run, here / "runs" / "repvgg_tiny" / "a", age=0)
    assert choose_source("repvgg_tiny", "random") == ("repvgg_tiny", "random")
    assert choose_source("repvgg", "some.pth") == ("repvgg_a0", "some.pth")
    assert choose_source(None, best) == ("repvgg_tiny", best)


@pytest.mark.parametrize("weights", ["random", "rvgg_in1k"])
def test_weights_without_a_model_are_refused(here, weights):
    with pytest.raises(UsageError, match=f"which model are the weights '{weights}' for\\?"):
        choose_source(None, weights)


def test_a_state_dict_without_a_record_needs_its_models_name(here):
    model = create_model("repvgg_tiny", num_classes=4)
    torch.save(model.state_dict(), "plain.pth")
    with pytest.raises(UsageError, match=r"which model are the weights 'plain\.pth' for\?"):
        choose_source(None, "plain.pth")


def test_an_unknown_model_is_refused_with_the_nearest(here):
    with pytest.raises(UsageError, match="did you mean 'repvgg_tiny'"):
        choose_source("repvgg_tinny", None)


def test_a_data_set_that_is_gone_or_too_small_is_noted(here):
    pets = write_folder(here / "pets", val=2, size=(32, 32))
    words = ("--data", pets, "--data.input_size", 32, "--data.num_workers", 0, *SHORT)
    assert litezoo("train", "repvgg_tiny", "--out", "run", *words) == 0
    artifact = export(
        "repvgg_tiny", device="cpu", precision="fp32", weights="run/best.ckpt", out=here / "small"
    )
    assert artifact.notes == (f"parity on noise: {pets.resolve()} has fewer than 16 test images",)
    shutil.rmtree(pets)
    artifact = export(
        "repvgg_tiny", device="cpu", precision="fp32", weights="run/best.ckpt", out=here / "gone"
    )
    assert artifact.notes[0].startswith(
        f"parity on noise and no accuracy: no data set {pets.resolve()};"
    )
    assert artifact.classes == ("cat", "dog")
    assert all(engine.accuracy is None for engine in artifact.engines)


# ------------------------------------------------------------------------- a runtime that is absent


def uninstall(monkeypatch, *names):
    """Have these packages not be found."""
    for module in (runtime_onnxruntime, runtime_openvino, runtime_ncnn):
        right = module.find_spec
        monkeypatch.setattr(
            module, "find_spec", lambda name, right=right: None if name in names else right(name)
        )


def test_a_runtime_that_is_not_installed_is_noted(here, best, monkeypatch, capsys):
    uninstall(monkeypatch, "openvino")
    words = ("export", "repvgg_tiny", "--device", "cpu", "--precision", "fp32", "--weights", best)
    assert litezoo(*words, "--out", "out") == 0
    assert f"openvino: not built ({NO_OPENVINO})" in capsys.readouterr().out
    artifact = read_artifact(here / "out")
    assert artifact.not_built == {"openvino": NO_OPENVINO}
    assert {engine.runtime for engine in artifact.engines} == {"onnxruntime", "ncnn"}
    assert not artifact.kit
    with pytest.raises(MissingError, match="needs openvino: pip install"):
        load(here / "out", runtime="openvino")
    assert litezoo(*words, "--out", "other", "--engine", "require") == 4
    assert NO_OPENVINO in capsys.readouterr().err
    assert not (here / "other").exists()


def test_without_onnx_runtime_nothing_is_exported(here, best, monkeypatch, capsys):
    uninstall(monkeypatch, "onnxruntime")
    assert (
        litezoo(
            "export", "repvgg_tiny", "--device", "cpu", "--precision", "fp32", "--weights", best
        )
        == 4
    )
    assert capsys.readouterr().err.endswith(f"litezoo: {NO_ONNXRUNTIME}\n")
    assert not list(here.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "sentence"), [("openvino", NO_OPENVINO), ("onnxruntime", NO_ONNXRUNTIME)]
)
def test_a_runtime_that_is_not_installed_says_what_to_type(
    for_cpu, tmp_path, monkeypatch, name, sentence
):
    uninstall(monkeypatch, name)
    cpu, runtime = get_device("cpu"), get_runtime(name)
    assert runtime.missing(cpu) == sentence
    file = for_cpu / "model.fp32.onnx"
    with pytest.raises(MissingError) as caught:
        source = BuildSource(onnx={"fp32": file})
        runtime.build(source, device=cpu, precision="fp32", folder=tmp_path)
    assert str(caught.value) == sentence
    with pytest.raises(MissingError) as caught:
        runtime.load([file], device=cpu, precision="fp32")
    assert str(caught.value) == sentence


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_file_that_a_runtime_cannot_read_fails_the_check(tmp_path, name):
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(CheckFailed, match=f"{name} refuses .*model.xml"):
        get_runtime(name).load([tmp_path / "model.xml"], device=get_device("cpu"), precision="fp32")


# ------------------------------------------------------------------------------------------ verify


def test_an_intact_artifact_is_verified(for_cpu, capsys):
    report = verify(for_cpu)
    assert report.files == 7 and not report.skipped
    stages = {parity.stage: parity for parity in report.parities}
    assert set(stages) == {"preprocessing", "openvino fp32", "onnxruntime fp32", "ncnn fp32"}
    assert stages["openvino fp32"].batches == stages["onnxruntime fp32"].batches == BATCHES
    assert litezoo("verify", for_cpu) == 0
    text = capsys.readouterr().out
    assert f"{for_cpu}: 7 files intact" in text
    assert "openvino fp32: relative error" in text and "at batch 1, 2, 7" in text


def test_a_kit_is_verified_by_its_onnx_files(for_t4):
    report = verify(for_t4)
    assert report.files == len(T4_FILES) - 1
    stages = {parity.stage for parity in report.parities}
    assert stages == {"preprocessing", "onnx int8-fp16", "onnx fp32", "onnx fp16"}


@pytest.mark.parametrize("position", [0, 0.3, 1])
@pytest.mark.parametrize("name", [n for n in CPU_FILES if n != "manifest.json"])
def test_a_flipped_bit_is_reported_by_the_files_name(copy, name, position):
    flip(copy / name, position)
    with pytest.raises(CheckFailed) as caught:
        verify(copy)
    assert f"{copy}: {name} was changed (sha256 differs); export again" in str(caught.value)


@pytest.mark.parametrize("name", [n for n in T4_FILES if n != "manifest.json"])
def test_a_flipped_bit_in_a_kit_is_reported_by_the_files_name(for_t4, tmp_path, name):
    copy = shutil.copytree(for_t4, tmp_path / "copy")
    flip(copy / name)
    with pytest.raises(CheckFailed) as caught:
        verify(copy)
    assert f"{copy}: {name} was changed" in str(caught.value)


def test_a_flipped_bit_in_the_manifest_is_reported_by_its_name(copy):
    whole = (copy / "manifest.json").read_bytes()
    for position in np.linspace(0, 1, 23):
        (copy / "manifest.json").write_bytes(whole)
        flip(copy / "manifest.json", position)
        with pytest.raises(CheckFailed, match=r"manifest\.json"):
            verify(copy)


def test_a_changed_file_ends_the_program_with_3(copy, capsys):
    flip(copy / "openvino.fp32.bin")
    assert litezoo("verify", copy) == 3
    assert "openvino.fp32.bin was changed" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in CPU_FILES if n != "manifest.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckFailed, match=f"{name} is missing"):
        verify(copy)


def test_every_changed_file_is_named_at_once(copy):
    flip(copy / "expected.npz")
    (copy / "openvino.fp32.xml").unlink()
    with pytest.raises(CheckFailed) as caught:
        verify(copy)
    assert "expected.npz was changed (sha256 differs); openvino.fp32.xml is missing" in str(
        caught.value
    )


def edit(folder, **values):
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(signed_json({**content, **values}))


DAMAGE = {
    "truncated": lambda f: (f / "manifest.json").write_text('{"model": "repvgg_tiny"'),
    "empty": lambda f: (f / "manifest.json").write_text(""),
    "binary": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: (f / "manifest.json").write_text("[]"),
    "no fields": lambda f: (f / "manifest.json").write_text('{"schema": 1}'),
    "another schema": lambda f: edit(f, schema=99),
    "a field too many": lambda f: edit(f, colour="red"),
    "an engine of nothing": lambda f: edit(f, engines=[{}]),
    "a check of nothing": lambda f: edit(f, checks=[{}]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_manifest_is_named(copy, kind):
    DAMAGE[kind](copy)
    for read in (verify, load):
        with pytest.raises(CheckFailed) as caught:
            read(copy)
        assert str(caught.value).startswith(f"{copy / 'manifest.json'} is damaged: ")
        assert "\n" not in str(caught.value)


def test_a_manifest_whose_evidence_was_removed_is_refused(copy):
    edit(copy, checks=[])
    with pytest.raises(CheckFailed, match="has no parity numbers"):
        verify(copy)


@pytest.mark.parametrize("name", ["", "nothing"])
def test_a_folder_that_is_no_artifact_is_named(tmp_path, name, capsys):
    assert litezoo("verify", tmp_path / name) == 2
    assert capsys.readouterr().err.endswith(
        f"litezoo: {tmp_path / name} is no artifact: it has no manifest.json; make one: "
        "litezoo export\n"
    )


def test_verifying_runs_the_engines_again(for_cpu, monkeypatch):
    spoil_openvino(monkeypatch, slightly)
    with pytest.raises(CheckFailed, match="openvino fp32 differs from PyTorch by"):
        verify(for_cpu)


def test_an_engine_that_cannot_run_here_is_skipped_and_said_so(for_cpu, monkeypatch, capsys):
    uninstall(monkeypatch, "openvino")
    report = verify(for_cpu)
    assert report.skipped == {"openvino fp32": NO_OPENVINO}
    assert [parity.stage for parity in report.parities] == [
        "preprocessing",
        "onnxruntime fp32",
        "ncnn fp32",
    ]
    assert litezoo("verify", for_cpu) == 0
    assert f"openvino fp32: not run here ({NO_OPENVINO})" in capsys.readouterr().out
    uninstall(monkeypatch, "openvino", "onnxruntime", "ncnn")
    with pytest.raises(MissingError, match=r"cannot be run here: .*needs openvino.*onnxruntime"):
        verify(for_cpu)


# -------------------------------------------------------------------------------------------- load


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_a_loaded_engine_gives_the_logits_of_pytorch(for_cpu, best, runtime, count):
    engine = load(str(for_cpu), runtime=runtime, threads=1)
    assert engine.engine.runtime == runtime and engine.classes == tuple("0123456789")
    batch = noise(count)
    got, want = engine(batch), pytorch_logits(best, batch)
    assert got.shape == (count, 10) and got.dtype == np.float32
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_results_are_not_overwritten_by_the_next_call(for_cpu):
    for runtime in ("openvino", "onnxruntime"):
        engine = load(for_cpu, runtime=runtime, threads=1)
        first = engine(noise(2))
        kept = first.copy()
        engine(noise(2, seed=1))
        assert np.array_equal(first, kept)


def test_image_files_and_pil_images_are_preprocessed(for_cpu, best, tmp_path):
    engine = load(for_cpu, threads=1)
    pictures = [image for image, _ in open_data("digits").images("test")[:4]]
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    want = pytorch_logits(best, np.stack([engine.preprocess(picture) for picture in pictures]))
    for batch in (pictures, tuple(pictures), files, [str(file) for file in files]):
        assert np.abs(engine(batch) - want).max() <= 1e-4 * np.abs(want).max()
    colour = [Image.open(file).convert("RGB").resize((50, 70)) for file in files]
    assert engine(colour).shape == (4, 10)


def test_arrays_of_other_layout_or_type_are_taken(for_cpu):
    engine = load(for_cpu, threads=1)
    batch = noise(3)
    want = engine(batch)
    for other in (batch.astype(np.float64), np.asfortranarray(batch), noise(6)[::2]):
        assert engine(other).dtype == np.float32
    assert np.array_equal(engine(batch.astype(np.float64)), want)
    assert np.array_equal(engine(np.asfortranarray(batch)), want)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 32, 31), (1, 32, 32), (0, 1, 32, 32)])
def test_a_wrong_shape_is_refused(for_cpu, shape):
    with pytest.raises(UsageError) as caught:
        load(for_cpu, threads=1)(np.zeros(shape, np.float32))
    assert str(caught.value) == f"images have shape {shape}; this engine takes (N, 1, 32, 32)"


@pytest.mark.parametrize("images", ["digit.png", 3, None, torch.zeros(1, 1, 32, 32), {}])
def test_a_wrong_type_is_refused(for_cpu, images):
    with pytest.raises(UsageError, match=f"images is a {type(images).__name__}; give a float32"):
        load(for_cpu, threads=1)(images)


@pytest.mark.parametrize(
    "images",
    [[], [np.zeros((1, 32, 32), np.float32)], [3.5], [None], np.full((1, 1, 32, 32), "a")],
    ids=["empty", "arrays", "numbers", "none", "words"],
)
def test_a_list_of_something_else_is_refused(for_cpu, images):
    with pytest.raises(UsageError):
        load(for_cpu, threads=1)(images)


def test_an_unreadable_image_is_named(for_cpu, tmp_path):
    engine = load(for_cpu, threads=1)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UsageError, match=r"cannot read the image .*text\.jpg \(Unidentified"):
        engine([tmp_path / "text.jpg"])
    with pytest.raises(UsageError, match=r"cannot read the image .*none\.jpg \(FileNotFound"):
        engine([tmp_path / "none.jpg"])


@pytest.mark.parametrize(
    ("runtime", "name"), [("openvino", "openvino.fp32.bin"), ("onnxruntime", "model.fp32.onnx")]
)
def test_a_changed_engine_is_not_loaded(copy, runtime, name):
    flip(copy / name)
    with pytest.raises(CheckFailed, match=f"{name} was changed"):
        load(copy, runtime=runtime)
    (copy / name).unlink()
    with pytest.raises(CheckFailed, match=f"{name} is missing"):
        load(copy, runtime=runtime)


def test_the_first_engine_that_can_run_here_is_loaded(for_cpu, monkeypatch):
    assert load(for_cpu).engine.runtime == "openvino"
    uninstall(monkeypatch, "openvino")
    assert load(for_cpu).engine.runtime == "onnxruntime"
    uninstall(monkeypatch, "openvino", "onnxruntime", "ncnn")
    with pytest.raises(MissingError) as caught:
        load(for_cpu)
    assert "has no engine that can run here (openvino fp32, onnxruntime fp32, ncnn fp32)" in str(
        caught.value
    )
    assert NO_OPENVINO in str(caught.value) and NO_ONNXRUNTIME in str(caught.value)


def test_an_unknown_runtime_is_refused_with_the_nearest(for_cpu):
    with pytest.raises(UsageError, match="unknown runtime 'openvno'; did you mean 'openvino'"):
        load(for_cpu, runtime="openvno")


def test_a_runtime_that_the_artifact_has_not_is_missing(for_cpu, for_t4):
    with pytest.raises(
        MissingError, match=r"can run here \(openvino fp32, onnxruntime fp32, ncnn fp32\)"
    ):
        load(for_cpu, runtime="tensorrt")
    with pytest.raises(MissingError) as caught:
        load(for_t4)
    assert f"(only a build kit): {NO_TENSORRT}" in str(caught.value)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_running_an_artifact_needs_no_torch(for_cpu, runtime):
    code = f"""
import sys, numpy, litezoo
engine = litezoo.load({str(for_cpu)!r}, runtime={runtime!r}, threads=1)
assert engine(numpy.zeros((2, 1, 32, 32), numpy.float32)).shape == (2, 10)
heavy = "torch", "torchvision", "timm", "pytorch_lightning", "onnx", "sklearn"
print([name for name in heavy if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_a_signal_after_two_engines_with_crossed_lives_does_no_harm(for_cpu):
    # OpenVINO's plugin puts up a signal stack; a freed one is a segmentation fault
    code = """
import gc, os, signal, sys, litezoo
signal.signal(signal.SIGUSR1, lambda *_: print("still here"))
first, second = (litezoo.load(sys.argv[1], runtime="openvino") for _ in range(2))
del first
gc.collect()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(for_cpu)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr
