"""RKNN: what is asked of the toolkit, its environment, every error, the board kit.

The toolkit is a fake one (onnxruntime under its name, run by the worker as the true one is), except
in the last tests, which need its environment.
"""

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import images
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from litezoo.export import rknn_worker, run_on_board, runtime_rknn
from litezoo.export.limits import apply_rewrites
from litezoo.export.runtime import BuildSource, Runtime, get_runtime
from litezoo.export.runtime_rknn import RUNTIME, Rknn, raw_images, write_board_kit
from litezoo.export.to_onnx import export_onnx, simplify_onnx
from litezoo.models.catalogue import Preprocess
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.fuse import fuse
from litezoo.recipes.devices import get_device

onnx = pytest.importorskip("onnx", reason="pip install 'litezoo[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'litezoo[export]'")

BOARD = get_device("rk3588-npu")
PREPROCESS = Preprocess(input_size=(3, 8, 12))
#: The environment of this machine, before the tests hide it.
REAL = runtime_rknn.environment_folder()

FAKE_TOOLKIT = r"""
import hashlib, json, os, sys, time
import numpy as np

MODE = os.environ.get("FAKE_RKNN", "")


class RKNN:
    def __init__(self, verbose):
        print("I the toolkit prints on stdout", flush=True)
        os.system("echo and so do its C libraries")

    def config(self, *, mean_values, std_values, target_platform):
        self.mean, self.std = mean_values[0], std_values[0]
        self.told = {"platform": target_platform, "mean": self.mean, "std": self.std}
        return 0

    def load_onnx(self, *, model):
        if MODE == "raises":
            raise ValueError("Traceback (most recent call last):\nValueError: no such opset!")
        if MODE == "status":
            print("\x1b[31mE load_onnx: the graph has a loop\x1b[0m", file=sys.stderr)
            print("I Loading: 50%|#####     | 1/2", file=sys.stderr, flush=True)
            return -1
        if MODE == "exits":
            print("E out of memory", file=sys.stderr, flush=True)
            os._exit(7)
        if MODE == "hangs":
            time.sleep(600)
        self.model = model
        return 0

    def build(self, *, do_quantization, dataset):
        self.told["quantized"] = do_quantization
        digest = hashlib.sha256()
        if do_quantization:
            for name in open(dataset).read().split():
                image = np.load(name)
                assert image.shape[:2] == (1, len(self.mean)) and image.dtype == np.uint8
                digest.update(image.tobytes())
        self.told["calibration"] = digest.hexdigest()
        return 0

    def export_rknn(self, path):
        with open(path, "w") as stream:
            json.dump({**self.told, "address": id(self)}, stream)
        return 0

    def init_runtime(self):
        return 0

    def inference(self, *, inputs, data_format):
        import onnxruntime

        if MODE == "no output":
            return None
        if MODE == "slow image":
            time.sleep(600)
        assert data_format == ["nhwc"] and inputs[0].dtype == np.uint8
        assert inputs[0].shape[0] == 1 and inputs[0].shape[3] == len(self.mean)
        session = onnxruntime.InferenceSession(self.model)
        image = ((inputs[0] - np.array(self.mean)) / self.std).transpose(0, 3, 1, 2)
        logits = session.run(None, {"input": image.astype(np.float32)})[0]
        return [logits + float(os.environ.get("FAKE_DRIFT", 0)) * abs(logits).max()]
"""


# --------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    """Return an environment with the fake toolkit, as a first build leaves it."""
    folder = tmp_path_factory.mktemp("toolkit") / "venv"
    packages = folder / "lib" / f"python3.{sys.version_info[1]}" / "site-packages"
    (packages / "rknn").mkdir(parents=True)
    (packages / "rknn_toolkit2-2.5.0.dist-info").mkdir()
    (packages / "rknn" / "api.py").write_text(FAKE_TOOLKIT)
    (folder / "litezoo-rknn.json").write_text(json.dumps({"state": "whole"}))
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def _a_machine_that_serves(monkeypatch):
    """Whatever the machine's free disk and Python: what is refused is told in tests of its own."""
    room = types.SimpleNamespace(free=100e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    monkeypatch.setattr(runtime_rknn, "_python_version", lambda: (3, 12))


@pytest.fixture(autouse=True)
def _fake_environment(monkeypatch, toolkit):
    monkeypatch.setenv("LITEZOO_RKNN_VENV", str(toolkit))
    monkeypatch.delenv("FAKE_RKNN", raising=False)
    monkeypatch.delenv("FAKE_DRIFT", raising=False)


def normalised(pixels):
    """Return images (N, C, H, W) of 0..255 as a data loader gives them."""
    mean, std = (np.float32(v).reshape(3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    return ((pixels.astype(np.float32) / 255 - mean) / std).astype(np.float32)


def write_onnx(file, *, batch=1, channels=3, preprocess=None):
    """Write a network of one convolution and a mean: (batch, channels, 8, 12) to (batch, 5)."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, channels, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight"], ["maps"]),
            helper.make_node("GlobalAveragePool", ["maps"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, channels, 8, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(weight, "weight")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    if preprocess is not None:
        helper.set_model_props(proto, {"litezoo.preprocess": preprocess})
    file.write_bytes(proto.SerializeToString())
    return file


def told(preprocess=PREPROCESS):
    return json.dumps(preprocess.to_dict())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a BuildSource and the logits of its images."""
    import onnxruntime

    file = write_onnx(tmp_path_factory.mktemp("tiny") / "model.fp32.onnx", preprocess=told())
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 12), dtype=np.uint8)
    batch = normalised(pixels)
    session = onnxruntime.InferenceSession(file)
    logits = np.concatenate([session.run(None, {"input": one[None]})[0] for one in batch])
    return BuildSource(onnx={"fp32": file}, images=batch), logits


@pytest.fixture(scope="module")
def built(tiny, toolkit, tmp_path_factory):
    """Return the files of each precision."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITEZOO_RKNN_VENV", str(toolkit))
        return {p: build(tiny[0], folder, precision=p) for p in ("int8", "fp16")}


def build(source, folder, *, precision="fp16", runtime=RUNTIME, device=BOARD):
    return runtime.build(source, device=device, precision=precision, folder=folder)


def load(files, *, precision="fp16", runtime=RUNTIME, device=BOARD):
    return runtime.load(files, device=device, precision=precision)


@pytest.fixture
def session(built):
    session = load(built["fp16"])
    yield session
    session._worker.close()


def error_of(logits, expected):
    assert logits.shape == expected.shape and logits.dtype == np.float32
    return np.abs(logits - expected).max() / np.abs(expected).max()


def is_alive(pid):
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()


# ------------------------------------------------------------------------------ raw images


@given(
    st_numpy.arrays(np.uint8, st.tuples(st.just(2), st.just(3), st.just(3), st.just(4))),
    st.sampled_from([((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)]),
)
def test_raw_images_are_the_8_bit_ones_that_were_normalised(pixels, statistics):
    mean, std = (np.float32(v).reshape(3, 1, 1) for v in statistics)
    preprocess = Preprocess(mean=statistics[0], std=statistics[1])
    batch = ((pixels / np.float32(255) - mean) / std).astype(np.float32)
    assert np.array_equal(raw_images(batch, preprocess), pixels.transpose(0, 2, 3, 1))


def test_raw_images_clip_what_no_image_has():
    batch = np.full((1, 3, 1, 1), 1e6, dtype=np.float32)
    assert raw_images(batch, PREPROCESS).tolist() == [[[[255, 255, 255]]]]
    assert raw_images(-batch, PREPROCESS).tolist() == [[[[0, 0, 0]]]]


# --------------------------------------------------------------------------- build and load


def test_rknn_is_a_runtime():
    assert isinstance(RUNTIME, Runtime) and get_runtime("rknn") is RUNTIME
    assert RUNTIME.missing(BOARD) is None
    assert RUNTIME.versions() == {"rknn-toolkit2": "2.5.0"}


def test_the_device_file_asks_for_what_the_toolkit_takes():
    assert set(BOARD.precisions) <= set(RUNTIME.precisions) and BOARD.runtimes == ("rknn",)
    assert BOARD.limits.static_shapes and BOARD.limits.opset_max == 19


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_toolkit_gets_chip_statistics_and_raw_images(tiny, built, precision):
    asked = json.loads(built[precision][0].read_text())
    assert asked["platform"] == "rk3588" and asked["quantized"] == (precision == "int8")
    assert np.allclose(asked["mean"], [123.675, 116.28, 103.53])
    assert np.allclose(asked["std"], [58.395, 57.12, 57.375])


def test_every_image_is_given_to_the_calibration_of_int8_and_none_to_fp16(tiny, built):
    import hashlib

    raw = raw_images(tiny[0].images, PREPROCESS).transpose(0, 3, 1, 2)
    digests = {"int8": hashlib.sha256(raw.tobytes()), "fp16": hashlib.sha256()}
    for precision, digest in digests.items():
        asked = json.loads(built[precision][0].read_text())
        assert asked["calibration"] == digest.hexdigest()


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_session_gives_the_network_s_logits_of_preprocessed_images(tiny, built, precision):
    source, expected = tiny
    session = load(built[precision], precision=precision)
    assert error_of(session.run(source.images), expected) < 1e-5
    assert error_of(session.run(source.images[1:2]), expected[1:2]) < 1e-5


def test_only_the_named_files_are_written(tiny, built):
    for precision, files in built.items():
        onnx_file = tiny[0].onnx["fp32"]
        assert [f.name for f in files[:2]] == [f"rknn.{precision}.rknn", f"rknn.{precision}.npz"]
        assert files[2] == onnx_file
    assert len(list(built["int8"][0].parent.iterdir())) == 4


def test_a_session_serves_several_threads_at_once(tiny, session):
    source, expected = tiny
    errors = []
    workers = [
        threading.Thread(
            target=lambda: errors.append(error_of(session.run(source.images), expected))
        )
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 3 and max(errors) < 1e-5


def test_a_session_s_worker_and_its_folder_go_with_it(built):
    session = load(built["fp16"])
    pid, scratch = session._worker._process.pid, session._worker.scratch
    assert is_alive(pid) and scratch.is_dir()
    del session
    assert not is_alive(pid) and not scratch.exists()


def test_a_worker_ends_when_nobody_asks_any_more(built):
    worker = load(built["fp16"])._worker
    worker._stdin.close()  # what the system does for a process that was killed
    assert worker._process.wait(timeout=10) == 0


def test_a_build_leaves_no_worker(tiny, tmp_path, monkeypatch):
    started = []
    start = runtime_rknn._Worker.__init__

    def note(self, *words, **options):
        start(self, *words, **options)
        started.append(self)

    monkeypatch.setattr(runtime_rknn._Worker, "__init__", note)
    build(tiny[0], tmp_path)
    (worker,) = started
    assert worker._process.returncode == 0 and not worker.scratch.exists()


# -------------------------------------------------------------------- what is refused, and how


def refused(tiny, folder, *, onnx_file=None, **options):
    source = tiny[0] if onnx_file is None else BuildSource(
        onnx={"fp32": onnx_file}, images=tiny[0].images
    )  # fmt: skip
    build(source, folder, **options)


def test_an_unknown_precision_is_refused(tiny, built, tmp_path):
    for call in (
        lambda: refused(tiny, tmp_path, precision="fp32"),
        lambda: load(built["fp16"], precision="fp32"),
    ):
        with pytest.raises(UsageError, match="'rknn' has no fp32; it has int8, fp16"):
            call()


def test_a_device_that_names_no_chip_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"'cpu' names no Rockchip chip; .* rk3588-npu\.yaml"):
        refused(tiny, tmp_path, device=get_device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "N", "preprocess": told()}, r"takes \[-1, 3, 8, 12\] .*static_shapes: true"),
        ({"batch": 2, "preprocess": told()}, r"takes \[2, 3, 8, 12\] .* one image of constant"),
        ({}, "does not say its preprocessing; export it with litezoo"),
        ({"preprocess": "{"}, "onnx: .*; export it again"),
        ({"preprocess": "[]"}, "onnx: .*; export it again"),
        ({"preprocess": '{"sizes": 3}'}, "onnx: not a preprocessing record"),
        ({"channels": 1, "preprocess": told()}, "has 1 channels, its preprocessing 3"),
    ],
)
def test_an_onnx_file_that_cannot_serve_is_refused(tiny, tmp_path, options, message):
    file = write_onnx(tmp_path / "model.onnx", **options)
    with pytest.raises(UsageError, match=message):
        refused(tiny, tmp_path, onnx_file=file)
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_no_onnx_file_is_refused(tiny, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff no graph")
    with pytest.raises(UsageError, match="is no ONNX file"):
        refused(tiny, tmp_path, onnx_file=tmp_path / "model.onnx")


@pytest.mark.parametrize("batch", [None, np.zeros((0, 3, 8, 12)), np.zeros((2, 3, 12, 8))])
def test_a_build_needs_images_of_the_network_s_size(tiny, tmp_path, batch):
    source = BuildSource(onnx=tiny[0].onnx, images=batch)
    with pytest.raises(UsageError, match=r"calibrates on images \(N, 3, 8, 12\); give some"):
        build(source, tmp_path)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raises", r"building .* in fp16 for rk3588 failed: ValueError: no such opset!$"),
        ("status", r"load_onnx failed \(status -1\); its last words: .*E load_onnx: the graph has"),
        ("exits", r"ended while building .* \(status 7\); its last words: .*E out of memory"),
        ("no output", "simulating an image failed: ToolkitError: inference gave no output"),
    ],
)
def test_the_toolkit_s_refusal_is_told_in_its_own_words(tiny, tmp_path, monkeypatch, mode, message):
    monkeypatch.setenv("FAKE_RKNN", mode)
    with pytest.raises(CheckFailed, match=message) as caught:
        build(tiny[0], tmp_path)
    assert not list(tmp_path.iterdir())
    assert "\x1b" not in str(caught.value) and "50%" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "limits"), [("hangs", {"build_seconds": 1}), ("slow image", {"image_seconds": 1})]
)
def test_what_takes_too_long_is_stopped(tiny, tmp_path, monkeypatch, mode, limits):
    monkeypatch.setenv("FAKE_RKNN", mode)
    start = time.monotonic()
    with pytest.raises(CheckFailed, match="took longer than 1 s"):
        build(tiny[0], tmp_path, runtime=Rknn(**limits))
    assert time.monotonic() - start < 60 and not list(tmp_path.iterdir())


def test_a_worker_that_prints_nothing_of_use_is_told_too(tiny, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('this is another program')")
    with pytest.raises(CheckFailed, match=r"\(status 1\); its last words: this is another"):
        build(tiny[0], tmp_path, runtime=Rknn(worker=script))


def test_a_worker_that_answers_with_text_is_not_waited_for(tiny, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("print('I Loading: 100 % of the graph', flush=True)")
    with pytest.raises(CheckFailed, match=r"rknn-toolkit2 ended while building .* \(status 0\)"):
        build(tiny[0], tmp_path, runtime=Rknn(worker=script))


def test_the_toolkit_sees_none_of_our_files_paths_and_gpus(session, monkeypatch):
    words = session._worker._process.args
    assert Path(words[1]).parent == session._worker.scratch  # what lies beside it is importable
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setenv("PYTHONHOME", "/usr")
    variables = runtime_rknn._environment(OMP_NUM_THREADS="2")
    assert "PYTHONPATH" not in variables and "PYTHONHOME" not in variables
    assert variables["CUDA_VISIBLE_DEVICES"] == "" and variables["OMP_NUM_THREADS"] == "2"


def test_a_python_that_does_not_start_is_to_be_made_again(tiny, toolkit, tmp_path, monkeypatch):
    copy = shutil.copytree(toolkit, tmp_path / "venv")
    (copy / "bin" / "python").chmod(0o644)
    monkeypatch.setenv("LITEZOO_RKNN_VENV", str(copy))
    with pytest.raises(MissingError, match=r"does not start .*; remove .*venv and it is made"):
        build(tiny[0], tmp_path)


def test_a_session_whose_worker_died_says_so_once_and_again(tiny, session):
    session._worker._process.kill()
    for message in (r"rknn-toolkit2 ended while simulating", "the toolkit ended before; load it"):
        with pytest.raises(CheckFailed, match=message):
            session.run(tiny[0].images[:1])


def test_an_interrupted_question_ends_the_worker(tiny, session, monkeypatch):
    def interrupt(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime_rknn.rknn_worker, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.run(tiny[0].images[:1])
    assert session._worker._process.returncode is not None


@pytest.mark.parametrize("shape", [(1, 3, 12, 8), (1, 1, 8, 12), (0, 3, 8, 12), (3, 8, 12)])
def test_a_batch_of_another_shape_is_refused(session, shape):
    with pytest.raises(UsageError, match=r"the rknn engine takes \(N, 3, 8, 12\), not \("):
        session.run(np.zeros(shape, np.float32))


def test_a_forked_process_is_told_to_be_spawned_and_leaves_the_worker(tiny, session, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(UsageError, match="forked process; start it with the 'spawn' method"):
            session.run(tiny[0].images[:1])
        session._worker.close()
    assert is_alive(session._worker._process.pid) and session._worker.scratch.is_dir()
    runtime_rknn._end(session._worker._process, session._worker.scratch, os.getpid())


def test_other_files_than_those_of_a_build_are_refused(built):
    rknn, record, onnx_file = built["fp16"]
    for files in ((), (rknn,), (rknn, record), (rknn, rknn, onnx_file), (*built["fp16"], rknn)):
        with pytest.raises(UsageError, match=r"loads a \.rknn with its \.npz and \.onnx, not "):
            load(files)


def test_files_that_do_not_belong_together_are_refused(built, tmp_path):
    rknn, record, onnx_file = built["fp16"]
    with pytest.raises(UsageError, match=r"built with precision fp16, not int8"):
        load(built["fp16"], precision="int8")
    other = write_onnx(tmp_path / "other.onnx", preprocess=told(Preprocess(input_size=(3, 9, 9))))
    with pytest.raises(UsageError, match="built with onnx_sha256"):
        load((rknn, record, other))
    changed = tmp_path / "changed.rknn"
    changed.write_bytes(rknn.read_bytes() + b" ")
    with pytest.raises(UsageError, match=r"changed\.rknn was built with rknn_sha256"):
        load((changed, record, onnx_file))
    (tmp_path / "half.npz").write_bytes(record.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"half\.npz cannot be read .*; export the model again"):
        load((rknn, tmp_path / "half.npz", onnx_file))


@pytest.mark.parametrize("drift", ["0.1", "nan"])
def test_a_simulated_network_that_is_not_the_one_in_the_file_is_refused(built, monkeypatch, drift):
    monkeypatch.setenv("FAKE_DRIFT", drift)
    with pytest.raises(CheckFailed, match=r"rknn\.fp16\.rknn cannot be simulated: built again"):
        load(built["fp16"])


# ----------------------------------------------------------------------------- environment


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return where an environment will be; nothing is there yet."""
    folder = tmp_path / "deep" / "venv"
    monkeypatch.setenv("LITEZOO_RKNN_VENV", str(folder))
    return folder


def test_the_environment_is_beside_the_project_unless_it_is_named(monkeypatch):
    monkeypatch.delenv("LITEZOO_RKNN_VENV")
    project = Path(runtime_rknn.__file__).resolve().parent.parent
    assert runtime_rknn.environment_folder() == project / ".venv-rknn"
    monkeypatch.setenv("LITEZOO_RKNN_VENV", "here")
    assert runtime_rknn.environment_folder() == Path.cwd() / "here"


def test_asking_what_is_missing_makes_nothing(place):
    assert RUNTIME.missing(BOARD) is None and RUNTIME.versions() == {}
    assert not place.parent.exists()


@pytest.mark.parametrize("system", [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_another_system_is_told_why(monkeypatch, system):
    monkeypatch.setattr(platform, "system", lambda: system[0])
    monkeypatch.setattr(platform, "machine", lambda: system[1])
    assert RUNTIME.missing(BOARD).endswith(f"this is {' '.join(system)}")


def test_another_python_is_told_which_are_wanted(place, monkeypatch):
    monkeypatch.setattr(runtime_rknn, "_python_version", lambda: (3, 14))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs Python 3.8 to 3.12, as rknn-toolkit2 does; this is 3.14" in RUNTIME.missing(BOARD)
    monkeypatch.setattr(shutil, "which", lambda name: "/p" if name == "python3.10" else None)
    assert RUNTIME.missing(BOARD) is None and runtime_rknn._find_python() == "/p"


def test_a_full_disk_is_told_before(place, monkeypatch):
    usage = types.SimpleNamespace(free=2e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert "takes 9 GB of disk and 2.0 are free" in RUNTIME.missing(BOARD)


def test_an_environment_with_another_toolkit_is_told(toolkit):
    import dataclasses

    newer = dataclasses.replace(BOARD, toolchain={"rknn-toolkit2": ">=3"})
    assert "has rknn-toolkit2 2.5.0, rk3588-npu needs >=3; remove" in RUNTIME.missing(newer)


def test_a_folder_of_something_else_is_left_alone(tiny, place, tmp_path):
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    assert "is no environment with rknn-toolkit2; remove it, or set" in RUNTIME.missing(BOARD)
    with pytest.raises(MissingError, match="is no environment with rknn-toolkit2"):
        build(tiny[0], tmp_path)
    assert (place / "thesis.txt").read_text() == "mine"


def test_an_environment_made_by_hand_needs_no_stamp(toolkit, place):
    shutil.copytree(toolkit, place)
    (place / "litezoo-rknn.json").unlink()
    assert RUNTIME.missing(BOARD) is None and runtime_rknn._state(place) == "whole"


def test_a_half_made_environment_is_made_again(toolkit, place, monkeypatch):
    shutil.copytree(toolkit, place)
    (place / "litezoo-rknn.json").write_text('{"state": "unfin')
    (place / "left over").touch()
    commands = []

    def pretend(words):
        commands.append(words)
        if words[1:3] == ["-m", "venv"]:
            assert not (place / "left over").exists()
            assert runtime_rknn._state(place) == "unfinished"
            shutil.copytree(toolkit / "bin", place / "bin")
            shutil.copytree(toolkit / "lib", place / "lib")

    monkeypatch.setattr(runtime_rknn, "_run_logged", pretend)
    assert runtime_rknn._ensure_environment(BOARD) == place / "bin" / "python"
    assert commands[1][1:] == [
        "-m", "pip", "install", "--no-input", "rknn-toolkit2>=2.3.2", "pillow", "setuptools",
    ]  # fmt: skip
    assert commands[2][1:] == ["-c", "from rknn.api import RKNN"]
    assert runtime_rknn._state(place) == "whole"
    runtime_rknn._ensure_environment(BOARD)
    assert len(commands) == 3


def test_an_environment_whose_making_is_interrupted_is_removed(place, monkeypatch):
    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime_rknn, "_run_logged", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runtime_rknn._ensure_environment(BOARD)
    assert not place.exists()


def test_a_place_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LITEZOO_RKNN_VENV", str(tmp_path / "file" / "venv"))
    with pytest.raises(MissingError, match=r"cannot be made: .*that can be written"):
        build(tiny[0], tmp_path)


def write_wheel(folder, name, version, files):
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Return a folder that is all that pip sees."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    for key, value in (("CONFIG_FILE", os.devnull), ("NO_INDEX", "1"), ("FIND_LINKS", folder)):
        monkeypatch.setenv(f"PIP_{key}", str(value))
    return folder


@pytest.mark.slow
def test_the_first_use_makes_the_environment_with_pip(place, wheels, caplog):
    files = {"rknn/__init__.py": "", "rknn/api.py": "class RKNN: pass"}
    write_wheel(wheels, "rknn_toolkit2", "2.5.0", files)
    write_wheel(wheels, "pillow", "13.0.0", {})
    write_wheel(wheels, "setuptools", "80.0.0", {})
    caplog.set_level("INFO")
    python = runtime_rknn._ensure_environment(BOARD)
    words = [python, "-c", "import rknn.api, sys; print(sys.prefix)"]
    assert subprocess.run(words, capture_output=True, text=True).stdout.strip() == str(place)
    assert RUNTIME.versions() == {"rknn-toolkit2": "2.5.0"} and RUNTIME.missing(BOARD) is None
    assert "making the RKNN environment" in caplog.text
    assert "Successfully installed" in caplog.text


@pytest.fixture
def fake_pip(toolkit, tmp_path, monkeypatch):
    """Have environments made by a script, whose Python says `lines` for pip and ends so."""

    def make(lines, status):
        pip = tmp_path / "pip"
        pip.write_text(f"#!/bin/sh\nprintf '%s\\n' {lines}\nexit {status}\n")
        pip.chmod(0o755)
        venv = tmp_path / "base"
        venv.write_text(f'#!/bin/sh\nmkdir "$3/bin" && cp {pip} "$3/bin/python"\n')
        venv.chmod(0o755)
        monkeypatch.setattr(runtime_rknn, "_find_python", lambda: str(venv))

    return make


def test_pip_s_error_is_told_with_what_to_type_and_nothing_is_left(tiny, place, fake_pip, tmp_path):
    fake_pip("Collecting 'ERROR: No matching distribution found' '[notice] A new release'", 1)
    with pytest.raises(MissingError) as caught:
        build(tiny[0], tmp_path)
    said = str(caught.value)
    assert said.startswith("the RKNN environment cannot be made: ERROR: No matching distribution")
    assert f"python3 -m venv {place} && {place}/bin/python -m pip install 'rknn-toolkit2>=" in said
    assert not place.exists()


def test_pip_s_lines_are_logged_as_they_come(place, fake_pip, caplog):
    fake_pip("'Collecting rknn-toolkit2' 'Installing collected packages'", 0)
    caplog.set_level("INFO")
    runtime_rknn._ensure_environment(BOARD)
    assert "making the RKNN environment" in caplog.text
    assert "Collecting rknn-toolkit2\n" in caplog.text


def test_a_command_that_does_not_start_is_told(place, monkeypatch):
    monkeypatch.setattr(runtime_rknn, "_find_python", lambda: "/no/python")
    with pytest.raises(MissingError, match=r"cannot be made: /no/python does not start"):
        runtime_rknn._ensure_environment(BOARD)
    assert not place.exists()


# -------------------------------------------------------------------------------- messages


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
    st.none() | st_numpy.arrays(np.uint8, st_numpy.array_shapes(max_dims=4)),
)
def test_a_message_is_read_as_it_was_written(header, array):
    import io

    stream = io.BytesIO(2 * rknn_worker.encode(header, array))
    for _ in range(2):
        read, got = rknn_worker.read_message(stream)
        assert {k: v for k, v in read.items() if k != "array"} == {
            k: v for k, v in header.items() if k != "array"
        }
        assert (got is None) if array is None else np.array_equal(got, array)
    with pytest.raises(EOFError):
        rknn_worker.read_message(stream)


def test_an_image_before_any_build_is_an_error_not_the_end():
    import io

    asked = rknn_worker.encode({"do": "run"}, np.zeros((1, 2, 2, 3), np.uint8))
    answers = io.BytesIO()
    rknn_worker.serve(io.BytesIO(asked), answers)
    answers.seek(0)
    answer, _ = rknn_worker.read_message(answers)
    assert not answer["ok"] and "nothing was built" in answer["error"]


@pytest.mark.parametrize("module", [rknn_worker, run_on_board])
def test_scripts_for_other_machines_need_python_3_8_and_nothing_of_litezoo(module):
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    assert names - set(sys.stdlib_module_names) == {"numpy"}


# ------------------------------------------------------------------------------- board kit


class FakeBoard:
    """rknnlite's class on a board whose NPU gives the simulator's logits, give or take."""

    NPU_CORE_0_1_2 = 7
    expected: np.lib.npyio.NpzFile
    error = 0.0
    status = 0
    masks: tuple = ()

    def load_rknn(self, path):
        self.key = "logits_" + path.split(".")[-2]
        return 0

    def init_runtime(self, core_mask=None):
        type(self).masks += (core_mask,)
        return self.status

    def inference(self, *, inputs, data_format):
        assert data_format == ["nhwc"] and inputs[0].dtype == np.uint8
        row = [np.array_equal(image, inputs[0][0]) for image in self.expected["images"]].index(True)
        return [self.expected[self.key][row : row + 1] + np.float32(self.error)]

    def get_sdk_version(self):
        return "API: 2.5.0\n DRV: 0.9.8"

    def release(self):
        pass


KIT = {"device": BOARD, "model_name": "tiny", "preprocess": PREPROCESS, "toolkit": "2.5.0"}


@pytest.fixture
def kit(tiny, built, tmp_path, monkeypatch):
    """Return a kit's folder, on a board."""
    source, logits = tiny
    folder = tmp_path / "kit"
    folder.mkdir()
    write_board_kit(
        folder, **KIT, images=source.images, logits=logits,
        rknn_files={p: files[0] for p, files in built.items()},
        simulated={p: logits * (1 + 1e-3) for p in built},
    )  # fmt: skip
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    board = type("Board", (FakeBoard,), {"expected": expected})
    monkeypatch.setitem(sys.modules, "rknnlite", types.ModuleType("rknnlite"))
    monkeypatch.setitem(sys.modules, "rknnlite.api", types.SimpleNamespace(RKNNLite=board))
    (tmp_path / "compatible").write_bytes(b"radxa,rock-5b\0rockchip,rk3588\0")
    monkeypatch.setattr(run_on_board, "COMPATIBLE", tmp_path / "compatible")
    npu = tmp_path / "sys" / "class" / "devfreq" / "fdab0000.npu"
    npu.mkdir(parents=True)
    (npu / "cur_freq").write_text("1000000000\n")
    monkeypatch.setattr(run_on_board, "SYSTEM", tmp_path / "sys")
    return types.SimpleNamespace(folder=folder, board=board, expected=expected)


def run_kit(kit, *words):
    return run_on_board.main(["--kit", str(kit.folder), "--seconds", "0", *words])


def test_a_kit_holds_raw_images_and_the_simulator_s_logits(tiny, kit):
    source, logits = tiny
    assert np.array_equal(kit.expected["images"], raw_images(source.images, PREPROCESS))
    assert np.array_equal(kit.expected["logits"], logits)
    names = {file.name for file in kit.folder.iterdir()}
    assert names == {
        "README.md", "expected.npz", "kit.json", "requirements.txt", "run_on_board.py",
        "tiny.fp16.rknn", "tiny.int8.rknn",
    }  # fmt: skip
    copy = (kit.folder / "run_on_board.py").read_bytes()
    assert copy == Path(run_on_board.__file__).read_bytes()
    assert (kit.folder / "requirements.txt").read_text() == "rknn-toolkit-lite2==2.5.0\nnumpy\n"
    commands = [line for line in (kit.folder / "README.md").read_text().splitlines()
                if line.startswith("    ")]  # fmt: skip
    assert len(commands) == 3 and commands[-1].endswith("python run_on_board.py")


def test_a_kit_run_on_the_board_writes_times_and_differences(kit):
    assert run_kit(kit) == 0
    result = json.loads((kit.folder / "result.json").read_text())
    assert result["ok"] and result["chip"] == "rk3588" and result["image_shape"] == [3, 8, 12]
    assert result["kit_sha256"] == run_on_board.sha256_of(kit.folder / "kit.json")
    assert [entry["precision"] for entry in result["engines"]] == ["int8", "fp16"]
    for entry in result["engines"]:
        (row,) = entry["timings"]
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] and row["runs"] >= 10
        assert entry["parity"]["max_relative_error"] == 0 and entry["runtime"].startswith("API")
        assert entry["npu_before"]["frequency_hz"] == "1000000000"
        assert entry["npu_before"]["governor"] == "unknown"


def test_only_the_precision_and_the_cores_that_were_named_are_used(kit):
    assert run_kit(kit, "--precision", "fp16", "--cores", "0_1_2") == 0
    result = json.loads((kit.folder / "result.json").read_text())
    assert len(result["engines"]) == 1 and result["conditions"]["npu_cores"] == "0_1_2"
    assert kit.board.masks == (7,)


@pytest.mark.parametrize(("error", "words"), [(0.5, "relative error"), (np.nan, "not finite")])
def test_a_board_that_gives_other_logits_is_not_measured(kit, capsys, error, words):
    kit.board.error = error
    assert run_kit(kit) == 3
    result = json.loads((kit.folder / "result.json").read_text())
    assert not result["ok"] and not result["engines"] and set(result["failed"]) == {"int8", "fp16"}
    assert words in capsys.readouterr().err


def test_another_first_class_is_a_difference_unless_it_is_nearly_a_tie():
    expected = np.array([[1.0, 0.9], [1.0, 0.999]], dtype=np.float32)
    swapped = expected[:, ::-1].copy()
    parity = run_on_board.compare_logits(swapped, expected, precision="fp16")
    assert parity.top1_agreement == 0.5
    near = run_on_board.compare_logits(swapped[1:], expected[1:], precision="fp16")
    assert near.problem() is None
    wide = run_on_board.Parity("int8", 2, 0.0, 0.0, 1.0, 0.5, True)
    assert wide.problem() == "top-1 agrees for 50.0% of the images, not for all"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--precision", "fp32"], 2, "this kit has no fp32; it has int8, fp16"),
        (["--cores", "9"], 2, "--cores is default, auto"),
    ],
)
def test_a_wrong_word_is_told_on_the_board(kit, capsys, words, status, message):
    assert run_kit(kit, *words) == status
    assert message in capsys.readouterr().err


def test_what_is_missing_on_the_board_is_told(kit, capsys, monkeypatch):
    kit.board.status = -1
    assert run_kit(kit) == 4
    assert "the NPU does not start (status -1)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rknnlite.api", None)
    assert run_kit(kit) == 4
    assert "lite2 is not installed here: python3 -m pip install" in capsys.readouterr().err
    run_on_board.COMPATIBLE.write_bytes(b"pine64,quartz64\0rockchip,rk3566\0")
    assert run_kit(kit) == 4
    assert "is for the rk3588; this machine is pine64,quartz64, rock" in capsys.readouterr().err
    run_on_board.COMPATIBLE.unlink()
    assert run_kit(kit) == 4
    assert f"this machine is {platform.system()} " in capsys.readouterr().err


def test_a_changed_kit_is_told(kit, capsys):
    (kit.folder / "tiny.int8.rknn").write_bytes(b"changed")
    assert run_kit(kit) == 3
    assert "tiny.int8.rknn was changed since the kit was made" in capsys.readouterr().err
    (kit.folder / "tiny.int8.rknn").unlink()
    assert run_kit(kit) == 3
    assert "tiny.int8.rknn is not there; copy the whole kit" in capsys.readouterr().err
    text = (kit.folder / "kit.json").read_text()
    (kit.folder / "kit.json").write_text(text.replace("rknn-board-1", "rknn-board-9"))
    assert run_kit(kit) == 2
    assert "has the format rknn-board-9, this script reads" in capsys.readouterr().err
    (kit.folder / "kit.json").write_text(text[:50])
    assert run_kit(kit) == 2
    assert "kit.json is not whole" in capsys.readouterr().err
    (kit.folder / "kit.json").unlink()
    assert run_kit(kit) == 2
    assert "is no board kit" in capsys.readouterr().err


def test_a_kit_is_refused_what_it_cannot_hold(tiny, built, tmp_path):
    source, logits = tiny
    files = {"fp16": built["fp16"][0]}
    good = {
        **KIT, "rknn_files": files, "images": source.images, "logits": logits,
        "simulated": {"fp16": logits},
    }  # fmt: skip
    for change, message in (
        ({"model_name": "a/b"}, "is no name for files"),
        ({"rknn_files": {}, "simulated": {}}, "needs .rknn files and their simulated logits"),
        ({"simulated": {"int8": logits}}, "not fp16 and logits of int8"),
        ({"rknn_files": {"bf16": files["fp16"]}, "simulated": {"bf16": logits}}, "has no bf16"),
        ({"simulated": {"fp16": logits[:2]}}, r"fp16 has logits \(2, 5\) for 4 images"),
        ({"images": source.images[:2]}, r"fp32 has logits \(4, 5\) for 2 images"),
        ({"simulated": {"fp16": logits * np.nan}}, "the fp16 logits must be finite"),
        ({"device": get_device("cpu")}, "names no Rockchip chip"),
    ):
        with pytest.raises(UsageError, match=message):
            write_board_kit(tmp_path, **{**good, **change})
    assert not (tmp_path / "kit.json").exists()


# ------------------------------------------------------------------------- the true toolkit

needs_toolkit = pytest.mark.skipif(
    runtime_rknn._state(REAL) != "whole",
    reason=f"no RKNN environment in {REAL}: litezoo export --device rk3588-npu makes it (5.6 GB), "
    "LITEZOO_RKNN_VENV names another",
)


@needs_toolkit
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("mobilenetv2_035", "fp16"),
        ("mobilenetv2_035", "int8"),
        ("repvgg_a0", "fp16"),
        ("repvgg_a0", "int8"),
    ],
)
def test_the_simulator_gives_pytorch_s_logits(name, precision, tmp_path, monkeypatch):
    monkeypatch.setenv("LITEZOO_RKNN_VENV", str(REAL))
    model = create_model(name, num_classes=10)
    smooth = torch.nn.functional.interpolate(images(24, 3, 9, 9), (64, 64), mode="bilinear")
    pixels = (smooth * 60 + 128).round().clip(0, 255).numpy()
    batch = normalised(pixels)
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.from_numpy(batch[:16]))
        expected = fuse(model.eval())(torch.from_numpy(batch)).numpy()
    preprocess = told(Preprocess(input_size=(3, 64, 64)))
    proto = export_onnx(fuse(model), batch[:2], metadata={"litezoo.preprocess": preprocess})
    proto, _ = apply_rewrites(simplify_onnx(proto, batch[:2])[0], BOARD)
    file = tmp_path / "model.fp32.onnx"
    file.write_bytes(proto.SerializeToString())
    source = BuildSource(onnx={"fp32": file}, images=batch[:16])
    session = load(build(source, tmp_path, precision=precision), precision=precision)
    logits, wanted = session.run(batch[16:]), expected[16:]
    snr_db = 10 * np.log10((wanted**2).mean() / ((logits - wanted) ** 2).mean())
    assert snr_db > {"fp16": 50, "int8": 25}[precision]
    assert error_of(logits, wanted) < {"fp16": 5e-3, "int8": 0.1}[precision]
