"""Export's choice among precisions and runtimes, and what it does on a second run."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from filelock import FileLock
from test_data import write_folder
from test_train import litezoo, tiny_run

from litezoo.export import exporter, typed
from litezoo.export.artifact import load as litezoo_load
from litezoo.export.artifact import read_artifact, signed_json, verify
from litezoo.export.calibration import LEAST, choose_calibration
from litezoo.export.exporter import export
from litezoo.export.ladder import STAGES, NotWorthIt
from litezoo.export.runtime_openvino import RUNTIME as OPENVINO
from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import CheckFailed, MissingError, UsageError

SMALL = Preprocess(input_size=(3, 32, 32))


pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return str(tiny_run(tmp_path_factory) / "best.ckpt")


@pytest.fixture(scope="module")
def made(tmp_path_factory, best):
    """All that this CPU can have, ranked by a stand-in: the last label is the fastest."""
    out = tmp_path_factory.mktemp("made") / "engines"
    export("repvgg_tiny", device="cpu", weights=best, out=out, rank=last_is_fastest, max_drop=100)
    return out


def last_is_fastest(sessions, batch):
    assert batch.shape[0] == 1 and all(s.run(batch).shape == (1, 10) for s in sessions.values())
    return {label: 10.0 - index for index, label in enumerate(sessions)}


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def no_builds(monkeypatch):
    """Building anything fails the test."""

    def build(*_args, **_options):
        raise AssertionError("it was built again")

    monkeypatch.setattr(typed, "export_onnx", build)


# ----------------------------------------------------------------------- candidates


def test_every_engine_is_listed_with_its_time_and_the_fastest_is_first(made):
    engines = read_artifact(made).engines
    times = [engine.ms_per_batch for engine in engines]
    assert times == sorted(times) and len(times) >= 4
    assert {"openvino int8", "onnxruntime int8", "openvino fp32"} <= {e.label for e in engines}


def test_every_engine_says_how_near_it_is_to_pytorch(made):
    for engine in read_artifact(made).engines:
        accuracy = engine.accuracy
        assert accuracy.data == "digits (val)" and accuracy.images == 288
        float32 = engine.precision == "fp32"
        assert (accuracy.snr_db > 80) == float32 and accuracy.snr_db > 10
        assert accuracy.agreement_percent > (99.9 if float32 else 80)


def test_int8_is_calibrated_on_the_images_that_the_network_was_trained_on(made):
    assert "int8 calibrated on 512 training images of digits" in read_artifact(made).notes


def test_random_weights_get_no_int8_unless_told_what_to_calibrate_on(tmp_path):
    artifact = export("repvgg_tiny", device="cpu", weights="random", out=tmp_path / "a")
    assert {e.precision for e in artifact.engines}.isdisjoint({"int8", "int8+bf16"})
    assert "--calibration" in artifact.not_built["int8"]
    with pytest.raises(MissingError, match="--calibration FOLDER"):
        export("repvgg_tiny", device="cpu", weights="random", out=tmp_path / "b", precision="int8")
    assert not (tmp_path / "b").exists()


def test_noise_is_calibrated_on_when_asked_for_twice(tmp_path, capsys, short):
    words = ("export", "repvgg_tiny", "--device", "cpu", "--weights", "random", "--out",
             tmp_path / "a", "--precision", "int8", "--calibration", "random")  # fmt: skip
    assert litezoo(*words) == 2
    assert "--yes-really" in capsys.readouterr().err
    assert litezoo(*words, "--yes-really") == 0
    assert "int8 calibrated on noise" in read_artifact(tmp_path / "a").notes


@pytest.mark.parametrize(
    ("asked", "data", "message"),
    [
        ("folder", None, f"{LEAST} or more"),
        (None, "digits", "have 1 channels, the network takes 3"),
    ],
)
def test_images_that_do_not_serve_are_refused(asked, data, message, tmp_path):
    if asked == "folder":
        asked = str(write_folder(tmp_path / "few"))
    with pytest.raises(UsageError, match=message):
        choose_calibration(asked, data=data, weights="x.ckpt", preprocess=SMALL)


def test_the_layers_that_8_bits_hurt_most_are_named(made):
    notes = [note for note in read_artifact(made).notes if note.startswith("the least right")]
    assert len(notes) >= 2 and all(note.count(" dB)") == 3 for note in notes)


def one_thread_is_fastest(sessions, batch):
    times = {label: 5.0 - ("1 thread," in label) - ("throughput" in label) for label in sessions}
    return {label: ms + 0.001 * i for i, (label, ms) in enumerate(times.items())}


def test_the_fastest_engines_keep_the_threads_and_the_hint_that_they_are_fastest_with(
    best, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    words = {"device": "cpu", "weights": best, "precision": "fp32"}
    tuned = export("repvgg_tiny", out=tmp_path / "a", rank=one_thread_is_fastest, **words)
    labels = [engine.tuned_label for engine in tuned.engines]
    assert labels == [
        "openvino fp32 (1 thread, throughput)",
        "onnxruntime fp32 (1 thread, latency)",
        "ncnn fp32 (1 thread, latency)",
    ]
    loaded = []
    load = type(OPENVINO).load
    monkeypatch.setattr(type(OPENVINO), "load", lambda *a, **k: loaded.append(k) or load(*a, **k))
    litezoo_load(tmp_path / "a")
    assert (loaded[0]["threads"], loaded[0]["objective"]) == (1, "throughput")
    asked = export(
        "repvgg_tiny", out=tmp_path / "b", rank=one_thread_is_fastest, threads=2, **words
    )
    assert {engine.threads for engine in asked.engines} == {2}


# ----------------------------------------------------------------------- accuracy


def test_int8_that_loses_too_much_on_every_rung_is_refused_with_the_best_of_them(best, tmp_path):
    with pytest.raises(NotWorthIt, match=r"the best of \d+ rungs .* points of top-1") as error:
        export(
            "repvgg_tiny", device="npu-int8", weights=best, out=tmp_path / "a", precision="int8",
            max_drop=-100,
        )  # fmt: skip
    tried = [own.rung for own in error.value.tried]
    assert {rung.stage for rung in tried} == {*STAGES}
    trained = [rung.said for rung in tried if rung.stage == "qat"]
    assert trained[0].endswith("QAT of the fused network")
    assert trained[1] == "QAT of the train form"
    assert all(rung.accuracy.drop < 5 for rung in tried if rung.stage == "qat")
    assert not (tmp_path / "a").exists()


def test_auto_notes_what_loses_too_much_and_keeps_the_rest(best, tmp_path):
    artifact = export("repvgg_tiny", device="cpu", weights=best, out=tmp_path / "a", max_drop=-100)
    assert {e.precision for e in artifact.engines} == {"fp32"}
    assert set(artifact.onnx) == {"fp32"}
    assert "points of top-1" in artifact.not_built["onnx int8-u8"]
    assert not list((tmp_path / "a").glob("*int8*"))


def test_a_layer_kept_in_float_is_not_quantized(best, tmp_path):
    import onnx

    from litezoo.export.to_int8 import convolutions

    plain = export(
        "repvgg_tiny", device="cpu", weights=best, out=tmp_path / "a", precision="int8",
        max_drop=100,
    )  # fmt: skip
    assert set(plain.onnx) == {"int8-u8", "int8-u8s8"}
    export("repvgg_tiny", device="cpu", weights=best, out=tmp_path / "c", precision="fp32")
    first = convolutions(onnx.load(tmp_path / "c/model.fp32.onnx"))[0]
    export(
        "repvgg_tiny", device="cpu", weights=best, out=tmp_path / "b", precision="int8",
        max_drop=100, keep_float=[first],
    )  # fmt: skip
    counts = [
        sum(n.op_type == "DequantizeLinear" for n in onnx.load(tmp_path / f).graph.node)
        for f in ("a/model.int8-u8.onnx", "b/model.int8-u8.onnx")
    ]
    assert counts[1] < counts[0]


# ----------------------------------------------------------------------- a second run


def repeat(folder, best, **options):
    options = {"rank": last_is_fastest, "max_drop": 100, **options}
    return export("repvgg_tiny", device="cpu", weights=best, out=folder, **options)


def test_nothing_is_built_again_from_the_same(copy, best, no_builds):
    before = (copy / "manifest.json").read_bytes()
    assert repeat(copy, best) == read_artifact(copy)
    assert (copy / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"force": True}, {"precision": "fp32"}, {"objective": "throughput"}, {"batch": 2}]
)
def test_it_is_built_again_from_something_else(copy, best, no_builds, change):
    with pytest.raises(AssertionError, match="built again"):
        repeat(copy, best, **change)


def test_a_damaged_artifact_is_built_again(copy, best, no_builds):
    (copy / "model.fp32.onnx").write_bytes(b"x")
    with pytest.raises(AssertionError, match="built again"):
        repeat(copy, best)


def test_a_second_export_into_the_same_folder_is_refused_meanwhile(copy, best):
    before = (copy / "manifest.json").read_bytes()
    with FileLock(copy.parent / f".{copy.name}.lock"), pytest.raises(UsageError, match="another"):
        repeat(copy, best, force=True)
    assert (copy / "manifest.json").read_bytes() == before


def test_what_a_killed_export_left_is_removed(made, best, tmp_path, no_builds):
    (tmp_path / ".a.k1ll3d").mkdir()
    (tmp_path / ".a.k1ll3d" / "model.fp32.onnx").write_bytes(b"half")
    with pytest.raises(AssertionError):
        repeat(tmp_path / "a", best)
    assert not list(tmp_path.iterdir())


def test_an_artifact_that_a_killed_export_had_moved_is_put_back(copy, best, no_builds):
    moved = copy.with_name(f".{copy.name}.k1ll3d.old")
    copy.rename(moved)
    with pytest.raises(AssertionError):
        repeat(copy, best)
    assert verify(copy).files and not moved.exists()


def test_a_full_disk_is_told_and_leaves_nothing(best, tmp_path, monkeypatch):
    import errno

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter, "write_whole", full)
    with pytest.raises(MissingError, match=r"disk .* is full; nothing was written"):
        repeat(tmp_path / "a", best, precision="fp32")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------- golden images


def test_an_artifact_carries_images_and_what_pytorch_says_of_them(made):
    with np.load(made / "golden.npz") as arrays:
        assert sum(name.startswith("image_") for name in arrays) == 16
        assert arrays["image_00"].dtype == np.uint8 and arrays["logits"].shape == (16, 10)
    stages = [parity.stage for parity in verify(made).parities]
    assert stages[0] == "preprocessing"


def test_another_preprocessing_than_in_training_is_noticed(copy):
    content = json.loads((copy / "manifest.json").read_text())
    content["preprocess"]["mean"] = [0.31]
    (copy / "manifest.json").write_text(signed_json(content))
    with pytest.raises(CheckFailed, match="preprocessing differs from timm"):
        verify(copy)


def test_an_accuracy_knows_its_drop(made):
    accuracy = read_artifact(made).engines[0].accuracy
    worse = dataclasses.replace(accuracy, top1_percent=90.0, pytorch_top1_percent=91.5)
    assert worse.drop == pytest.approx(1.5)


def test_a_rewritten_network_can_be_quantized(tmp_path):
    """Names that the rewrite gives must not be those that quantization gives."""
    artifact = export(
        "mobilenetv3_small_050", device="npu-int8", weights="random", out=tmp_path / "a",
        calibration="random",
    )  # fmt: skip
    assert set(artifact.onnx) == {"int8"} and artifact.engines[0].parity.batches == (1,)
    assert any("HardSwish written as" in note for note in artifact.notes)
    assert any(note.startswith("speed not measured") for note in artifact.notes)


def test_the_normalisation_can_be_in_the_file(best, tmp_path):
    import onnxruntime

    artifact = export(
        "repvgg_tiny", device="cpu", weights=best, out=tmp_path / "a", precision="fp32", embed=True
    )
    assert "embedded fp32" in {check.stage for check in artifact.checks}
    session = onnxruntime.InferenceSession(tmp_path / "a" / artifact.onnx["embedded fp32"])
    (images,) = session.get_inputs()
    assert images.type == "tensor(uint8)" and images.shape[1:] == [32, 32, 1]
    assert verify(tmp_path / "a").files == len(artifact.files)


def test_the_node_at_which_a_file_parts_is_named_by_the_command(best, tmp_path, capsys):
    export("repvgg_tiny", device="cpu", weights=best, out=tmp_path / "b", precision="fp32")
    assert litezoo("verify", "--deep", tmp_path / "b") == 0
    assert "parts from" in capsys.readouterr().out
    file = tmp_path / "b" / "openvino.fp32.bin"
    values = np.fromfile(file, np.float32)
    values[: len(values) // 20] *= 1.2
    values.tofile(file)
    assert litezoo("verify", "--deep", tmp_path / "b") == 3


def test_where_nothing_is_right_the_last_reason_ends_the_export(best, tmp_path, monkeypatch):
    from litezoo.export.runtime_ncnn import RUNTIME as NCNN
    from litezoo.export.runtime_onnxruntime import RUNTIME as ONNXRUNTIME

    def broken(*_args, **_options):
        raise MissingError("the toolkit cannot be had")

    monkeypatch.setattr(type(NCNN), "build", broken)
    monkeypatch.setattr(type(ONNXRUNTIME), "build", broken)
    with pytest.raises(MissingError, match="the toolkit cannot be had"):
        export("repvgg_tiny", device="jetson-nano", weights=best, out=tmp_path / "a")
    assert not list(tmp_path.iterdir())
