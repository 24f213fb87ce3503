"""PyTorch: AOTInductor packages and eager sessions of a small network; every error they can raise.

A package takes half a minute to compile: one fp32 package serves all tests that load one.
"""

import copy
import dataclasses
import json
import os
import platform
import shutil
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from helpers import images, shake
from torch import nn

from litezoo.export import runtime_pytorch
from litezoo.export.runtime import BuildSource, Runtime, get_runtime
from litezoo.export.runtime_pytorch import RUNTIME, eager_session
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.recipes.devices import Batch, get_device

#: Largest batch 4: a batch of 7 is run in two parts, the second a smaller one.
CPU = dataclasses.replace(get_device("cpu"), batch=Batch(min=1, opt=2, max=4))
NPU = dataclasses.replace(CPU, name="some-npu", kind="npu")
GPU = dataclasses.replace(
    CPU, name="h200", kind="gpu", compute_capability="9.0", sources={"compute_capability": "a test"}
)
HERE = ".".join(torch.__version__.split(".")[:2])
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="apt-get install g++"
)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here"),
]


class Tiny(nn.Sequential):
    """A strided, a depthwise and a pointwise convolution with BatchNorm, and a classifier."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
            nn.Conv2d(16, 32, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    module = shake(Tiny()).eval()
    return BuildSource(onnx={}, module=module, images=images(7, 3, 33, 33).numpy())


@pytest.fixture(scope="module")
def expected(source):
    with torch.inference_mode():
        return source.module(torch.from_numpy(source.images)).numpy()


@pytest.fixture(scope="module")
def package(source, tmp_path_factory):
    """Return the fp32 package."""
    folder = tmp_path_factory.mktemp("package")
    (file,) = RUNTIME.build(source, device=CPU, precision="fp32", folder=folder)
    assert list(folder.iterdir()) == [file]
    return file


@pytest.fixture
def plain(tmp_path):
    """Return a file that says all a package says, and holds no code."""
    return write_package(tmp_path / f"pytorch.fp32.torch{HERE}.pt2")


def write_package(file, **changes):
    metadata = {
        "AOTI_DEVICE_KEY": "cpu",
        "AOTI_PLATFORM": sys.platform,
        "AOTI_MACHINE": platform.machine(),
        "AOTI_CPU_ISA": "",
        "LITEZOO_BATCH_MAX": "4",
        "LITEZOO_SHAPE": "3,33,33",
    }
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data/aotinductor/model/x_metadata.json", json.dumps(metadata | changes))
    return file


def load(*files, device=CPU, precision="fp32", threads=1):
    return RUNTIME.load(files, device=device, precision=precision, threads=threads)


def error_of(logits, expected):
    assert logits.shape == expected.shape and logits.dtype == np.float32
    return np.abs(logits - expected).max() / np.abs(expected).max()


def test_pytorch_is_found_by_its_name_and_is_a_runtime():
    assert get_runtime("pytorch") is RUNTIME and isinstance(RUNTIME, Runtime)
    assert RUNTIME.versions()["torch"] == torch.__version__
    assert {*RUNTIME.precisions} == {*TOLERANCE} and {*RUNTIME.precisions.values()} == {None}


# ------------------------------------------------------------------------------------ packages


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_package_gives_pytorch_s_logits_at_every_batch(package, source, expected, count):
    logits = load(package).run(source.images[:count])
    assert error_of(logits, expected[:count]) < TOLERANCE["fp32"]


@needs_compiler
def test_a_package_has_frozen_convolutions_and_takes_its_threads_at_load(package):
    with zipfile.ZipFile(package) as archive:
        code = "".join(
            archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp")
        )
    assert "aoti_torch_cpu_convolution(" not in code  # a convolution that unpacks its weights
    assert "num_threads(" not in code


@needs_compiler
def test_a_package_says_what_it_is_for(package):
    assert package.name == f"pytorch.fp32.torch{HERE}.pt2"
    metadata = runtime_pytorch._read_metadata(package)
    assert metadata["AOTI_DEVICE_KEY"] == "cpu" and metadata["AOTI_PLATFORM"] == sys.platform
    assert metadata["LITEZOO_BATCH_MAX"] == "4" and metadata["LITEZOO_SHAPE"] == "3,33,33"


@needs_compiler
def test_the_module_is_left_as_it_was(package, source):
    assert {tensor.dtype for tensor in source.module.parameters()} == {torch.float32}
    assert source.module[0].weight.is_contiguous()


@needs_compiler
def test_a_package_takes_any_strides_and_serves_several_threads(package, source, expected):
    session, errors = load(package), []
    batch = np.asfortranarray(source.images)

    def work():
        errors.extend(error_of(session.run(batch), expected) for _ in range(3))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 9 and max(errors) < TOLERANCE["fp32"]


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 3, 32, 33), (1, 1, 33, 33), (0, 3, 33, 33), (3, 33, 33)])
def test_a_batch_of_another_shape_is_refused(package, shape):
    with pytest.raises(UsageError, match=r"the pytorch engine takes \(N, 3, 33, 33\), not \("):
        load(package).run(np.zeros(shape, np.float32))


@needs_compiler
def test_a_bf16_package_computes_in_bf16(source, expected, tmp_path):
    files = RUNTIME.build(source, device=CPU, precision="bf16", folder=tmp_path)
    error = error_of(load(*files, precision="bf16").run(source.images), expected)
    assert 1e-4 < error < TOLERANCE["bf16"]


class Refused(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # a branch on a value: torch.export has no graph for it


def test_a_network_that_torch_cannot_compile_is_refused(source, tmp_path):
    broken = dataclasses.replace(source, module=Refused())
    with pytest.raises(CheckFailed, match=rf"torch {HERE}.* refuses to compile the network for"):
        RUNTIME.build(broken, device=CPU, precision="fp32", folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("absent", ["module", "images"])
def test_a_build_needs_the_module_and_images(source, tmp_path, absent):
    with pytest.raises(UsageError, match="built from the PyTorch module and example images"):
        RUNTIME.build(
            dataclasses.replace(source, **{absent: None}),
            device=CPU, precision="fp32", folder=tmp_path,
        )  # fmt: skip


def test_without_a_compiler_the_answer_is_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = "compiler no-such-compiler to build: apt-get install"
    assert message in RUNTIME.missing(CPU)
    with pytest.raises(MissingError, match=message):
        RUNTIME.build(source, device=CPU, precision="fp32", folder=tmp_path)
    with pytest.raises(MissingError, match=message):
        eager_session(source.module, channels_last=True, compiled=True, precision="fp32")


@needs_compiler
def test_where_all_is_here_nothing_is_missing():
    assert RUNTIME.missing(CPU) is None


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions_that_the_cpu_has_not_are_refused(source, tmp_path, precision):
    with pytest.raises(UsageError, match=f"no {precision} on the CPU; it has fp32, bf16"):
        RUNTIME.build(source, device=CPU, precision=precision, folder=tmp_path)


def test_a_device_that_torch_does_not_run_on_is_named(monkeypatch):
    assert RUNTIME.missing(NPU) == (
        "runtime 'pytorch' runs on CPUs and NVIDIA GPUs; some-npu is an npu"
    )
    nameless = dataclasses.replace(GPU, compute_capability=None)
    assert "h200 has no compute_capability" in RUNTIME.missing(nameless)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert RUNTIME.missing(GPU) == (
        "device 'h200' needs a GPU of compute capability 9.0; PyTorch finds no GPU here: build and "
        "run it on a machine that has one"
    )


def test_the_first_gpu_of_the_wanted_capability_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0), (9, 0))[index]
    )
    assert runtime_pytorch.find_gpu(GPU) == 1
    with pytest.raises(MissingError, match=r"capability 8\.0; PyTorch finds GPU 0 with 7\.5, GPU"):
        runtime_pytorch.find_gpu(dataclasses.replace(GPU, compute_capability="8.0"))


# ------------------------------------------------------------- what is refused before it is loaded


def test_one_package_is_loaded_and_no_other_file(plain):
    for files in ((), (plain, plain), (plain.with_suffix(".onnx"),)):
        with pytest.raises(UsageError, match=r"loads one \.pt2 file, not [02]: "):
            load(*files)


@pytest.mark.parametrize("name", ["model.pt2", "pytorch.int8.torch2.15.pt2", "pytorch.fp32.pt2"])
def test_a_name_that_says_too_little_is_refused(plain, name):
    with pytest.raises(UsageError, match="does not say its precision and torch version"):
        load(plain.rename(plain.with_name(name)))


def test_another_precision_is_refused(plain):
    with pytest.raises(UsageError, match="is fp32, not bf16"):
        load(plain, precision="bf16")


def test_a_package_of_another_torch_is_refused(plain):
    old = plain.rename(plain.with_name("pytorch.fp32.torch1.0.pt2"))
    with pytest.raises(MissingError, match=r"built by torch 1\.0 .* or pip install 'torch==1\.0"):
        load(old)


def test_a_gpu_package_is_refused_for_a_cpu_and_the_other_way_round(plain, monkeypatch):
    monkeypatch.setattr(runtime_pytorch, "find_gpu", lambda device: 0)
    with pytest.raises(UsageError, match="is for the CPU, which h200 is not"):
        load(plain, device=GPU)
    on_gpu = plain.rename(plain.with_name(f"pytorch.fp32.sm90.torch{HERE}.pt2"))
    with pytest.raises(UsageError, match="is for a GPU of sm90, which cpu is not"):
        load(on_gpu)
    with pytest.raises(UsageError, match="is for a GPU of sm90, which h200 is not"):
        load(on_gpu, device=dataclasses.replace(GPU, compute_capability="7.5"))
    with pytest.raises(UsageError, match="holds code for cpu, not for cuda"):
        load(on_gpu, device=GPU)
    write_package(on_gpu, AOTI_DEVICE_KEY="cuda", AOTI_COMPUTE_CAPABILITY="80")
    with pytest.raises(UsageError, match=r"for compute capability 80, and h200 has 9\.0"):
        load(on_gpu, device=GPU)


@pytest.mark.parametrize("key", ["AOTI_PLATFORM", "AOTI_MACHINE"])
def test_a_package_of_another_system_is_refused(plain, key):
    write_package(plain, **{key: "riscv"})
    with pytest.raises(MissingError, match=r"was built for riscv and this is .*; export it here"):
        load(plain)


def test_a_package_of_a_newer_cpu_is_refused(plain, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    write_package(plain, AOTI_CPU_ISA="AVX2 AVX512 SOMETHING_NEW")
    with pytest.raises(MissingError, match="for a CPU with AVX512, which this one has not; export"):
        load(plain)


@pytest.mark.parametrize("content", [b"no archive", b""], ids=["other bytes", "empty"])
def test_what_is_no_package_is_refused(plain, content):
    plain.write_bytes(content)
    with pytest.raises(UsageError, match=r"is no package .*; export the model again"):
        load(plain)


def test_a_package_of_somebody_else_is_refused(plain):
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("x_metadata.json", json.dumps({"AOTI_DEVICE_KEY": "cpu"}))
    with pytest.raises(UsageError, match="is no package of litezoo's"):
        load(plain)


def test_a_package_without_code_is_refused(plain):
    with pytest.raises(CheckFailed, match=r"torch refuses .*\.pt2: .*; export the model again"):
        load(plain)


# --------------------------------------------------------------------------------- eager sessions


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_eager_session_gives_the_module_s_logits(source, expected, precision, channels_last):
    session = eager_session(
        source.module, channels_last=channels_last, compiled=False, precision=precision, threads=1
    )
    for count in (1, 7):
        error = error_of(session.run(source.images[:count]), expected[:count])
        assert error < TOLERANCE[precision]
    assert {tensor.dtype for tensor in source.module.parameters()} == {torch.float32}
    assert source.module[0].weight.is_contiguous()


def test_channels_last_is_what_the_convolutions_see(source):
    seen = []
    module = nn.Sequential(Spy(seen), source.module)
    for channels_last in (False, True):
        eager_session(
            module, channels_last=channels_last, compiled=False, precision="bf16", threads=1
        ).run(source.images)
    # A session runs a copy of the module, which shares the list through Spy.__deepcopy__.
    assert seen == [(torch.bfloat16, False), (torch.bfloat16, True)]


class Spy(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __deepcopy__(self, memo):
        return Spy(self.seen)

    def forward(self, x):
        self.seen.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        return x


def test_a_session_s_threads_are_its_own():
    during = []

    def call(batch):
        during.append(torch.get_num_threads())
        return batch

    before = torch.get_num_threads()
    runtime_pytorch._CpuSession(call, threads=before + 1).run(np.zeros((1, 3), np.float32))
    assert during == [before + 1] and torch.get_num_threads() == before


@needs_compiler
def test_a_compiled_session_is_frozen_and_gives_the_module_s_logits(source, expected):
    from torch._dynamo.utils import counters

    counters.clear()
    session = eager_session(
        source.module, channels_last=True, compiled=True, precision="fp32", threads=1
    )
    for _ in range(2):
        assert error_of(session.run(source.images), expected) < TOLERANCE["fp32"]
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 3


def test_fp16_on_the_cpu_is_refused(source):
    with pytest.raises(UsageError, match="no fp16 on the CPU; it has fp32, bf16"):
        eager_session(source.module, channels_last=True, compiled=False, precision="fp16")


# ------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def gpu():
    """Return the device of the GPU that is here."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return dataclasses.replace(GPU, compute_capability=capability)


@pytest.mark.parametrize("precision", [*TOLERANCE])
@pytest.mark.parametrize("compiled", [False, True])
class TestEagerOnGpu:
    pytestmark = needs_gpu

    def test_graphs_give_the_module_s_logits_again_and_again(
        self, source, expected, precision, compiled
    ):
        session = eager_session(
            copy.deepcopy(source.module).cuda(),
            channels_last=True, compiled=compiled, precision=precision,
        )  # fmt: skip
        for count in (1, 2, 7, 1):
            for batch, wanted in ((source.images, expected), (source.images[::-1], expected[::-1])):
                error = error_of(session.run(batch[:count]), wanted[:count])
                assert error < TOLERANCE[precision]


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("precision", [*TOLERANCE])
    def test_a_package_gives_the_module_s_logits(self, source, expected, gpu, tmp_path, precision):
        files = RUNTIME.build(source, device=gpu, precision=precision, folder=tmp_path)
        session = load(*files, device=gpu, precision=precision)
        for count in (1, 2, 7, 1):
            logits = session.run(source.images[:count])
            assert error_of(logits, expected[:count]) < TOLERANCE[precision]

    def test_every_batch_size_is_captured_once(self):
        calls = []

        def call(batch):
            calls.append(batch.shape[0])
            return batch.mean((2, 3))

        session = runtime_pytorch._GraphSession(call, index=0)
        for count in (1, 2, 1, 2, 1):
            session.run(np.ones((count, 3, 4, 4), np.float32))
        assert calls == [1] * 3 + [2] * 3  # two before the capture, one in it

    def test_what_cannot_be_captured_runs_as_it_is(self, caplog):
        def call(batch):
            return batch.mean((2, 3)) * float(batch.max())  # waits for the GPU: no graph can

        session = runtime_pytorch._GraphSession(call, index=0)
        for scale in (1, 2):
            logits = session.run(np.full((2, 3, 4, 4), scale, np.float32))
            assert np.allclose(logits, scale * scale)
        assert "no CUDA graph at (2, 3, 4, 4)" in caplog.text
