"""ncnn: pnnx's files of small networks, run and compared with PyTorch; every error it can raise."""

import dataclasses
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from helpers import images, settle, shallow
from torch import nn

from litezoo.export import runtime_ncnn
from litezoo.export.runtime import BuildSource, Runtime, get_runtime
from litezoo.export.runtime_ncnn import RUNTIME
from litezoo.export.to_onnx import export_onnx, simplify_onnx
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.fuse import fuse
from litezoo.recipes.devices import get_device

pytest.importorskip("ncnn", reason="pip install 'litezoo[ncnn]'")
pytest.importorskip("pnnx", reason="pip install 'litezoo[ncnn]'")

CPU = get_device("cpu")
#: 33 * 33 floats are no multiple of 16 bytes: ncnn pads every channel but the last.
SHAPE = (3, 33, 33)
#: max |difference| / max |logit|: rounding; 2 ** -11 and 2 ** -8 over a few layers.
TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}


class Shuffle(nn.Module):
    def forward(self, x):
        return nn.functional.channel_shuffle(x, 2)


class Tiny(nn.Module):
    """What the zoo's networks are made of, in little: shuffle, split, add, gate, h-swish."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Shuffle())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, self.depthwise(right) + right], dim=1)
        return self.head(x * self.gate(x))


def make_source(module, folder, *, shape=SHAPE):
    """Return the BuildSource of a module, by way of its simplified ONNX file, and its logits."""
    batch = images(7, *shape).numpy()
    with torch.inference_mode():
        logits = module(torch.from_numpy(batch)).numpy()
    proto, _ = simplify_onnx(export_onnx(module, batch[:2], metadata={}), batch)
    file = folder / "model.fp32.onnx"
    file.write_bytes(proto.SerializeToString())
    return BuildSource(onnx={"fp32": file}, module=module, images=batch), logits


def error_of(logits, expected):
    assert logits.shape == expected.shape and logits.dtype == np.float32
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return make_source(Tiny().eval(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """Return the files of every precision."""
    folder = tmp_path_factory.mktemp("built")
    return {
        precision: RUNTIME.build(tiny[0], device=CPU, precision=precision, folder=folder)
        for precision in RUNTIME.precisions
    }


@pytest.fixture
def copied(built, tmp_path):
    """Return a copy of the fp32 files, to be damaged."""
    return tuple(shutil.copy(file, tmp_path) and tmp_path / file.name for file in built["fp32"])


def load(files, *, precision="fp32", threads=1):
    return RUNTIME.load(files, device=CPU, precision=precision, threads=threads)


# ------------------------------------------------------------------------------- what is right


def test_ncnn_is_found_by_its_name_and_is_a_runtime():
    assert get_runtime("ncnn") is RUNTIME and isinstance(RUNTIME, Runtime)
    assert RUNTIME.missing(CPU) is None
    assert {*RUNTIME.versions()} == {"ncnn", "pnnx"}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_logits_are_those_of_pytorch(tiny, built, precision, count):
    source, expected = tiny
    logits = load(built[precision], precision=precision).run(source.images[:count])
    assert error_of(logits, expected[:count]) < TOLERANCE[precision]


def test_every_precision_has_a_tolerance_here():
    assert {*TOLERANCE} == {*RUNTIME.precisions}


def test_lower_precisions_are_really_lower(tiny, built):
    source, expected = tiny
    errors = {
        precision: error_of(load(files, precision=precision).run(source.images), expected)
        for precision, files in built.items()
    }
    assert errors["fp32"] < 1e-5 < errors["fp16"] < errors["bf16"]


def test_fp16_files_hold_half_the_bytes(built):
    sizes = {precision: files[1].stat().st_size for precision, files in built.items()}
    assert sizes["fp16"] < 0.75 * sizes["fp32"] and sizes["bf16"] == sizes["fp32"]


def test_only_the_two_named_files_are_written(built):
    for precision, (param, weights) in built.items():
        assert (param.name, weights.name) == (f"ncnn.{precision}.param", f"ncnn.{precision}.bin")
    folder = built["fp32"][0].parent
    assert len(list(folder.iterdir())) == 2 * len(built)


def test_a_build_is_the_same_each_time(tiny, built, tmp_path):
    again = RUNTIME.build(tiny[0], device=CPU, precision="fp32", folder=tmp_path)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in built["fp32"]]


def test_files_may_come_in_any_order(tiny, built):
    source, expected = tiny
    assert error_of(load(built["fp32"][::-1]).run(source.images), expected) < TOLERANCE["fp32"]


def test_the_batch_is_left_as_it_was_and_may_have_any_strides(tiny, built):
    source, expected = tiny
    batch = np.asfortranarray(source.images)
    before = batch.copy()
    assert error_of(load(built["fp32"]).run(batch), expected) < TOLERANCE["fp32"]
    assert np.array_equal(batch, before)


def test_logits_do_not_change_when_the_session_runs_again(tiny, built):
    session = load(built["fp32"])
    first = session.run(tiny[0].images[:1])
    kept = first.copy()
    session.run(tiny[0].images[1:])
    assert np.array_equal(first, kept)


def test_two_sessions_of_different_precision_live_side_by_side(tiny, built):
    source, expected = tiny
    one, other = load(built["fp32"]), load(built["bf16"], precision="bf16")
    other.run(source.images)
    assert error_of(one.run(source.images), expected) < TOLERANCE["fp32"]


def test_a_session_serves_several_threads_at_once(tiny, built):
    source, expected = tiny
    session, errors = load(built["fp32"], threads=2), []

    def work():
        errors.extend(error_of(session.run(source.images), expected) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 20 and max(errors) < TOLERANCE["fp32"]


def test_every_option_that_decides_is_set(monkeypatch, built):
    import ncnn

    def options(precision, threads):
        net = load(built[precision], precision=precision, threads=threads)._net
        return net.opt

    for precision in RUNTIME.precisions:
        opt = options(precision, 3)
        assert opt.num_threads == 3 and not opt.use_vulkan_compute and not opt.use_int8_inference
        assert {opt.use_fp16_packed, opt.use_fp16_storage, opt.use_fp16_arithmetic} == {
            precision == "fp16"
        }
        assert {opt.use_bf16_packed, opt.use_bf16_storage} == {precision == "bf16"}
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert options("fp32", None).num_threads == 5
    assert ncnn.Option().use_fp16_storage  # ncnn's own default: what would be run unasked


# --------------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_int8_is_refused_with_its_reason(tiny, built, tmp_path, precision):
    for refused in (
        lambda: RUNTIME.build(tiny[0], device=CPU, precision=precision, folder=tmp_path),
        lambda: load(built["fp32"], precision=precision),
    ):
        with pytest.raises(UsageError, match="ncnn2table and ncnn2int8, are in no Python package"):
            refused()
    assert not list(tmp_path.iterdir())


def test_an_unknown_precision_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="'ncnn' has no fp8; it has fp32, fp16, bf16"):
        RUNTIME.build(tiny[0], device=CPU, precision="fp8", folder=tmp_path)


@pytest.mark.parametrize("package", ["ncnn", "pnnx"])
def test_what_is_missing_is_named_with_what_to_type(tiny, tmp_path, monkeypatch, package):
    find = runtime_ncnn.find_spec
    monkeypatch.setattr(
        runtime_ncnn, "find_spec", lambda name: None if name == package else find(name)
    )
    message = f"runtime 'ncnn' needs {package}: pip install 'litezoo[ncnn]'"
    assert RUNTIME.missing(CPU) == message
    assert package not in RUNTIME.versions()
    with pytest.raises(MissingError) as caught:
        RUNTIME.build(tiny[0], device=CPU, precision="fp32", folder=tmp_path)
    assert str(caught.value) == message


def test_an_engine_runs_without_pnnx_but_not_without_ncnn(tiny, built, monkeypatch):
    find = runtime_ncnn.find_spec
    monkeypatch.setattr(
        runtime_ncnn, "find_spec", lambda name: None if name == "pnnx" else find(name)
    )
    assert load(built["fp32"]).run(tiny[0].images[:1]).shape == (1, 10)
    monkeypatch.setattr(runtime_ncnn, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="needs ncnn: pip install"):
        load(built["fp32"])


def with_broken_graph(source, folder, change):
    """Return the source with its ONNX file changed."""
    import onnx

    proto = onnx.load(source.onnx["fp32"])
    change(proto.graph)
    file = folder / "broken.onnx"
    onnx.save(proto, file)
    return dataclasses.replace(source, onnx={"fp32": file})


def rename_operators(graph):
    for node in graph.node:
        node.op_type = "NoSuchOperator"


def test_pnnx_s_refusal_is_told_in_its_own_last_words(tiny, tmp_path):
    broken = with_broken_graph(tiny[0], tmp_path, rename_operators)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(CheckFailed, match=r"pnnx refuses .*broken\.onnx \(status .*NoSuchOperator"):
        RUNTIME.build(broken, device=CPU, precision="fp32", folder=folder)
    assert not list(folder.iterdir())


def test_a_pnnx_that_does_not_start_is_to_be_installed_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_ncnn, "_pnnx_program", lambda: tmp_path / "pnnx")
    with pytest.raises(MissingError, match=r"pnnx does not start .* --force-reinstall"):
        RUNTIME.build(tiny[0], device=CPU, precision="fp32", folder=tmp_path)


def test_a_layer_that_ncnn_has_not_is_named(tiny, tmp_path, monkeypatch):
    convert = runtime_ncnn._convert

    def with_foreign_layer(*words, **options):
        param, weights = convert(*words, **options)
        return param + "GatherND  gather  1 1 out0 out1\n", weights

    monkeypatch.setattr(runtime_ncnn, "_convert", with_foreign_layer)
    with pytest.raises(CheckFailed, match=r"ncnn has no layer for GatherND of .*onnx"):
        RUNTIME.build(tiny[0], device=CPU, precision="fp32", folder=tmp_path)


def test_files_that_are_not_a_pair_are_refused(built):
    param, weights = built["fp32"]
    for files in ((), (param,), (weights,), (param, weights, built["fp16"][0])):
        with pytest.raises(UsageError, match=r"loads one \.param and its \.bin, not "):
            load(files)


def test_a_short_weight_file_is_refused(copied):
    param, weights = copied
    weights.write_bytes(weights.read_bytes()[:-400])
    with pytest.raises(CheckFailed, match=r"ncnn refuses .*fp32\.bin; export the model again"):
        load(copied)
    assert param.is_file()


def test_a_network_with_unknown_layers_is_refused(copied):
    param, _ = copied
    param.write_text(param.read_text().replace("\nConvolution ", "\nNoSuchLayer ", 1))
    with pytest.raises(CheckFailed, match=r"ncnn refuses .*fp32\.param"):
        load(copied)


@pytest.mark.parametrize("content", [b"no size\n", b"\xff\xfe"], ids=["no size", "no text"])
def test_a_param_that_does_not_say_its_size_is_refused(copied, content):
    copied[0].write_bytes(content)
    with pytest.raises(UsageError, match="export the model again"):
        load(copied)


@pytest.mark.parametrize("shape", [(1, 3, 32, 33), (1, 1, 33, 33), (0, 3, 33, 33), (3, 33, 33)])
def test_a_batch_of_another_shape_is_refused(built, shape):
    with pytest.raises(UsageError, match=r"the ncnn engine takes \(N, 3, 33, 33\), not \("):
        load(built["fp32"]).run(np.zeros(shape, np.float32))


def test_a_forked_process_is_told_to_be_spawned(tiny, built, monkeypatch):
    session = load(built["fp32"])
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="forked process; start it with the 'spawn' method"):
        session.run(tiny[0].images[:1])


# ------------------------------------------------------------------------ the zoo's own networks

#: One of each kind of block, without the equal ones.
NETWORKS = ["mobilenetv3_small_050", "shufflenetv2_x0_5", "peleenet", "repvgg_a0"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_each_kind_gives_pytorch_s_logits(name, tmp_path):
    model = settle(shallow(get_spec(name)).build(num_classes=10))
    source, expected = make_source(fuse(model), tmp_path, shape=(3, 64, 64))
    for precision in ("fp32", "fp16"):
        files = RUNTIME.build(source, device=CPU, precision=precision, folder=tmp_path)
        logits = load(files, precision=precision).run(source.images)
        assert error_of(logits, expected) < {"fp32": 1e-4, "fp16": 1e-2}[precision]
