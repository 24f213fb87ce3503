import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from litezoo.benchmarks import ceilings as module
from litezoo.benchmarks import measure as protocol
from litezoo.benchmarks.ceilings import (
    Ceilings,
    Sizes,
    Way,
    ceilings_file,
    ceilings_table,
    measure_ceilings,
    read_ceilings,
    write_ceilings,
)
from litezoo.benchmarks.disturbance import Disturbance, Quiet
from litezoo.benchmarks.machine import read_machine
from litezoo.benchmarks.measure import Timed
from litezoo.export import runtime_openvino, runtime_pytorch
from litezoo.models.errors import CheckFailed, MissingError, UsageError

#: Of every number another one: a swapped one shows.
SMALL = Sizes(
    gemm=24, channels=16, side=6, batch=3, depthwise_channels=8, depthwise_side=5, chain=2,
    far_mib=0.5, near_mib=0.0625, repeats=2,
)  # fmt: skip
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


NONE = Disturbance(seconds=0.2, cpus=(0,))


@pytest.fixture
def steady(monkeypatch):
    """Every block takes what the job's label says, in ms, whatever it does."""
    times = {}

    def interleave(runs, *, threads, seed, progress):
        blocks = []
        for label, session, batch in runs:
            session.run(batch)
            progress(f"batch 1: warming up {label}")
            own = [Quiet(value=[ms], disturbance=NONE, tries=1) for ms in times.get(label, (1.0,))]
            blocks.append(Timed(steady=True, blocks=own))
        return blocks

    monkeypatch.setattr(module, "interleave", interleave)
    return times


def way(kind="gemm", dtype="fp32", value=1.0, backend="torch.mm"):
    unit = {"gemm": "tera-ops/s", "conv3x3": "tera-ops/s", "copy": "GB/s", "cache": "GB/s"}
    return Way(
        what=f"{kind} of a size", backend=backend, kind=kind, dtype=dtype, value=value,
        unit=unit.get(kind, "us"), spread=0.012,
    )  # fmt: skip


def some(**changes):
    values = {
        "device": "cpu",
        "machine": read_machine(),
        "threads": 2,
        "peak_tera_ops_per_s": {"fp32": 0.2, "int8": 0.8},
        "memory_gb_per_s": 40.0,
        "cache_gb_per_s": 180.0,
        "launch_us": 0.09,
        "layer_us": {"openvino fp32": 1.1},
        "how": (
            way(value=0.1),
            way("conv3x3", value=0.2, backend="torch conv2d"),
            way(dtype="int8", value=0.8),
            way("copy", "", 40.0),
            way("call", "", 4.0, "a"),
            way("call", "", 3.0, "b"),
        ),
        "not_measured": {"openvino bf16 gemm": "this CPU has no bf16"},
        "date": "2026-11-23T00:00:00+00:00",
        "protocol": "interleaved-3",
    }
    return Ceilings(**{**values, **changes})


# ----------------------------------------------------------------------------------- the whole


def test_all_ceilings_of_this_machine_are_measured(short):
    steps = []
    found = measure_ceilings("cpu", threads=1, sizes=SMALL, progress=steps.append)
    assert found.device == "cpu" and found.threads == 1
    assert {"fp32", "bf16", "fp16", "int8"} == {*found.peak_tera_ops_per_s}
    assert found.memory_gb_per_s == found.best("copy").value > 0
    assert found.cache_gb_per_s == found.best("cache").value > 0
    assert found.best("read").value > 0
    assert {*found.layer_us} == {"torch eager fp32", "openvino fp32", "onnxruntime fp32"}
    assert found.launch_us > 0 and found.protocol == protocol.PROTOCOL
    backends = {entry.backend for entry in found.how if entry.dtype == "fp32"}
    assert backends == {
        "torch.mm", "torch conv2d channels-last", "openvino MatMul", "openvino Conv",
        "onnxruntime MatMul", "onnxruntime Conv",
    }  # fmt: skip
    kinds = {(e.kind, e.dtype) for e in found.how}
    for dtype in ("fp32", "int8"):
        assert {(k, dtype) for k in ("gemm", "conv3x3", "depthwise3x3")} <= kinds
    for label, reason in found.not_measured.items():
        assert label and reason
    assert any(step.startswith("fp32: warming up torch.mm fp32 gemm 24x24x24") for step in steps)
    assert any(step.startswith("memory: round 1") for step in steps)


def test_of_each_dtype_the_best_arithmetic_is_the_ceiling(steady):
    ops = 2 * 24**3 * 2  # torch's calls of the gemm
    steady["torch.mm fp32 gemm 24x24x24"] = (4.0, 2.0, 8.0)
    steady["torch._int_mm int8 gemm 24x24x24"] = (0.5,)
    found = measure_ceilings("cpu", threads=1, sizes=SMALL)
    gemm = found.best("gemm", "int8")
    assert gemm.backend == "torch._int_mm"
    assert gemm.value == pytest.approx(ops / 0.5e-3 / 1e12, rel=1e-3)
    mm = next(entry for entry in found.how if entry.backend == "torch.mm")
    assert mm.value == pytest.approx(ops / 2e-3 / 1e12, rel=1e-3)  # its best block
    assert mm.spread == pytest.approx((6 - 3) / 4)
    for dtype, peak in found.peak_tera_ops_per_s.items():
        own = [e.value for e in found.how if e.dtype == dtype and e.kind in ("gemm", "conv3x3")]
        assert peak == max(own)


def test_depthwise_convolutions_are_no_ceiling(steady):
    label = "torch conv2d channels-last fp32 depthwise 3x3, 8 channels, 5x5, batch 3"
    steady[label] = (1e-6,)
    found = measure_ceilings("cpu", threads=1, sizes=SMALL)
    assert found.best("depthwise3x3", "fp32").value > 100 * found.peak_tera_ops_per_s["fp32"]


def test_a_further_layer_costs_a_64th_of_what_64_more_take(steady):
    steady["openvino fp32 a network of one 1x1 of 8 channels at 4x4"] = (0.010,)
    steady["openvino fp32 each further 1x1 of 8 channels at 4x4"] = (0.074,)
    found = measure_ceilings("cpu", threads=1, sizes=SMALL)
    assert found.layer_us["openvino fp32"] == pytest.approx(1.0)
    [layer] = [e for e in found.how if (e.kind, e.backend) == ("layer", "openvino fp32")]
    assert layer.value == pytest.approx(1.0) and layer.unit == "us"
    assert found.layer_us["torch eager fp32"] == 0  # both take 1 ms here; it is never below


def test_a_deep_network_alone_says_nothing_of_a_layer():
    ways, layers = module._with_layers([way("layer", "", 9.0, "a"), way("gemm")])
    assert layers == {} and [entry.kind for entry in ways] == ["gemm"]


def test_pytorch_gets_its_threads_and_has_its_own_again_afterwards(steady, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "empty_session_us", lambda threads: seen.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    with pytest.raises(TypeError):
        measure_ceilings("cpu", threads=before + 1, sizes=SMALL, progress=None)
    assert torch.get_num_threads() == before
    measure_ceilings("cpu", threads=before + 1, sizes=SMALL)
    assert seen == [before + 1] and torch.get_num_threads() == before


# ---------------------------------------------------------------------------- what is left out


def job(run, label="x"):
    return module._Job(
        what=label, backend="a", kind="gemm", dtype="fp32", work=2e9, unit="tera-ops/s", run=run
    )


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda: np.full(3, np.nan), "gives NaN or infinite outputs"),
        (lambda: torch.tensor([1.0, float("inf")], dtype=torch.bfloat16), "gives NaN or infinite"),
        (lambda: torch.zeros(3, dtype=torch.int32), "gives nothing but zeros"),
        (lambda: 1 / 0, "division by zero"),
    ],
)
def test_what_does_not_compute_is_named_with_the_reason_and_never_timed(run, reason, steady):
    left_out = {}
    ways = module._measure_group(
        "fp32",
        [("wrong", lambda: job(run, "wrong")), ("right", lambda: job(lambda: np.ones(3)))],
        threads=1,
        seed=0,
        not_measured=left_out,
        progress=lambda step: None,
    )
    assert [entry.what for entry in ways] == ["x"]
    assert left_out.keys() == {"wrong"} and reason in left_out["wrong"]


def test_a_library_that_refuses_without_words_is_named_by_its_error(steady):
    left_out = {}

    def refuse():
        raise NotImplementedError

    arguments = {"threads": 1, "seed": 0, "not_measured": left_out, "progress": lambda step: None}
    assert module._measure_group("int8", [("torch int8", refuse)], **arguments) == []
    assert left_out == {"torch int8": "NotImplementedError"}


def test_a_runtime_that_is_not_installed_is_left_out_with_what_to_type(steady, monkeypatch):
    monkeypatch.setattr(runtime_openvino, "find_spec", lambda name: None)
    found = measure_ceilings("cpu", threads=1, sizes=SMALL)
    assert found.not_measured["openvino"].endswith("pip install 'litezoo[cpu]'")
    assert not any("openvino" in entry.backend for entry in found.how)


def test_without_onnx_the_runtimes_are_left_out(steady, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    found = measure_ceilings("cpu", threads=1, sizes=SMALL)
    assert found.not_measured["onnxruntime"].endswith("pip install 'litezoo[export]'")
    assert {e.backend.split()[0].split(".")[0] for e in found.how} == {"torch"}


def test_a_machine_on_which_nothing_computes_has_no_ceilings(steady, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no such instruction")

    for name in ("_torch_gemm", "_torch_conv", "_chain_job", "_integer_job"):
        monkeypatch.setattr(module, name, refuse)
    with pytest.raises(MissingError, match="no arithmetic could be measured: torch fp32 gemm: no"):
        measure_ceilings("cpu", threads=1, sizes=SMALL)


def test_devices_that_are_no_cpu_or_gpu_and_zero_threads_are_refused():
    with pytest.raises(UsageError, match="CPUs and NVIDIA GPUs; rk3588-npu is an npu"):
        measure_ceilings("rk3588-npu")
    with pytest.raises(UsageError, match="threads 0; both need to be 1 or more"):
        measure_ceilings("cpu", threads=0)
    with pytest.raises(UsageError, match="unknown device 'cpuu'; did you mean 'cpu'"):
        measure_ceilings("cpuu")


# ------------------------------------------------------------------------- what is counted, and how


@pytest.mark.parametrize("kind", ["gemm", "conv3x3", "depthwise3x3"])
def test_pytorchs_work_is_what_its_flop_counter_counts(kind):
    make = module._torch_gemm if kind == "gemm" else module._torch_conv
    made = make(CPU, SMALL, "fp32", *(() if kind == "gemm" else (kind,)))
    counter = FlopCounterMode(display=False)
    with counter:
        made.run()
    assert made.work == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["gemm", "conv3x3", "depthwise3x3"])
def test_a_chain_computes_what_it_is_counted_for(kind):
    """The file is run by ONNX Runtime, and its weights by PyTorch under the flop counter."""
    import onnx
    from onnx import numpy_helper

    seen = {}

    def load(content, batch, dtype):
        seen.update(content=content, batch=batch)
        return lambda: None

    made = module._chain_job(SMALL, kind, "fp32", form="fp32", backend="x", load=load)
    got = module._in_onnxruntime(1, seen["content"], seen["batch"], "fp32")()
    x = torch.from_numpy(seen["batch"])
    counter = FlopCounterMode(display=False)
    with counter:
        for tensor in onnx.load_from_string(seen["content"]).graph.initializer:
            weight = torch.from_numpy(numpy_helper.to_array(tensor).copy())
            groups = x.shape[1] // weight.shape[1] if x.ndim == 4 else 1
            x = x @ weight if kind == "gemm" else torch.conv2d(x, weight, padding=1, groups=groups)
    assert made.work == counter.get_total_flops()
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-4, atol=1e-5)


def test_an_int8_chain_is_the_float_one_but_for_rounding_and_a_relu():
    weights = [np.random.default_rng(0).standard_normal((16, 16), dtype=np.float32) / 4]
    batch = np.random.default_rng(1).random((16, 16), dtype=np.float32)
    exact = module._in_onnxruntime(
        1, module._chain("MatMul", weights, (16, 16), form="fp32"), batch, "fp32"
    )()
    content = module._chain("MatMul", weights, (16, 16), form="int8")
    for got in (
        module._in_onnxruntime(1, content, batch, "int8")(),
        module._in_openvino(1, content, batch, "int8")(),
    ):
        np.testing.assert_allclose(got, np.clip(exact, 0, 4), atol=0.12)
    assert np.abs(exact).max() > 0.5


@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_an_int8_chain_multiplies_uint8_with_int8(operator):
    import onnx

    shape = (4, 4) if operator == "MatMul" else (4, 4, 3, 3)
    weights = [np.ones(shape, np.float32)] * 2
    given_shape = (4, 4) if operator == "MatMul" else (1, 4, 5, 5)
    model = onnx.load_from_string(module._chain(operator, weights, given_shape, form="int8"))
    types = [tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("_q")]
    assert types == [onnx.TensorProto.INT8] * 2
    [zero] = [tensor for tensor in model.graph.initializer if tensor.name == "zero"]
    assert zero.data_type == onnx.TensorProto.UINT8
    count = [node.op_type for node in model.graph.node].count("QuantizeLinear")
    assert count == 3  # before each layer, and after the last


def test_an_integer_gemm_is_uint8_times_int8():
    made = module._integer_job(SMALL, lambda *given: given)
    content, batch, dtype = made.run
    assert (batch.dtype, dtype, made.work) == (np.uint8, "int8", 2 * 24**3)
    got = module._in_onnxruntime(1, content, batch, dtype)()
    import onnx

    [weight] = onnx.load_from_string(content).graph.initializer
    weights = onnx.numpy_helper.to_array(weight).astype(np.int32)
    assert weights.min() < 0 and batch.max() > 127
    np.testing.assert_array_equal(got, batch.astype(np.int32) @ weights)


@pytest.mark.parametrize(
    ("dtype", "hint"), [("fp32", "f32"), ("int8", "f32"), ("bf16", "bf16"), ("fp16", "f16")]
)
def test_openvino_always_gets_a_precision_hint_and_its_threads(dtype, hint, monkeypatch):
    core = runtime_openvino.one_core()
    settings = []

    class Core:
        def get_property(self, device, key):
            assert (device, key) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "BF16", "FP16"]

        def read_model(self, file):
            return core.read_model(file)

        def compile_model(self, model, device, given):
            settings.append(given)
            return core.compile_model(model, device)

    monkeypatch.setattr(runtime_openvino, "one_core", Core)
    content = module._chain("MatMul", [np.eye(4, dtype=np.float32)], (4, 4), form="fp32")
    module._in_openvino(3, content, np.ones((4, 4), np.float32), dtype)
    [given] = settings
    assert given["INFERENCE_PRECISION_HINT"] == hint and given["INFERENCE_NUM_THREADS"] == 3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cpu_without_a_16_bit_float_is_not_measured_in_it(dtype, monkeypatch):
    class Core:
        def get_property(self, *key):
            return ["FP32", "INT8"]

    monkeypatch.setattr(runtime_openvino, "one_core", Core)
    with pytest.raises(MissingError, match=f"this CPU has no {dtype} instructions"):
        module._in_openvino(1, b"", None, dtype)


def test_bytes_are_read_plus_written():
    copy, read, cache = (module._torch_memory(CPU, SMALL, k) for k in ("copy", "read", "cache"))
    buffer = 0.5 * 2**20 / 2
    assert copy.work == 2 * buffer * 2  # twice, in two repeats
    assert read.work == buffer * 2
    assert cache.work == 2 * (0.0625 * 2**20 / 2) * 40
    assert copy.run().sum() == buffer / 4 == read.run()


def test_memory_is_measured_beyond_the_caches(monkeypatch):
    monkeypatch.setattr(module, "_largest_cache_mib", lambda: 100.0)
    monkeypatch.setattr(module, "_memory_mib", lambda: 1e6)
    assert module._cpu_sizes().far_mib == 800
    monkeypatch.setattr(module, "_memory_mib", lambda: 1600.0)
    assert module._cpu_sizes().far_mib == 200  # of what is free, an eighth


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=9), st.floats(1e6, 1e12))
def test_a_rate_is_that_of_the_shortest_block(medians, work):
    made = dataclasses.replace(job(lambda: None), work=work)
    rate = module._way(made, np.array(medians))
    assert rate.value == pytest.approx(work / min(medians) / 1e9, rel=1e-3)
    assert rate.spread >= 0
    rate = module._way(dataclasses.replace(made, unit="GB/s"), np.array(medians))
    assert rate.value == pytest.approx(work / min(medians) / 1e6, rel=1e-3)
    assert module._way(
        dataclasses.replace(made, unit="us"), np.array(medians)
    ).value == pytest.approx(1e3 * min(medians), rel=1e-3)


# --------------------------------------------------------------------------------- on a GPU


def test_a_gpu_is_found_by_its_compute_capability(monkeypatch):
    monkeypatch.setattr(runtime_pytorch, "find_gpu", lambda device: 3)
    from litezoo.recipes.devices import get_device

    assert module._place(get_device("t4")) == torch.device("cuda", 3)


def test_a_gpu_that_is_not_here_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match=r"'t4' needs a GPU of compute capability 7\.5"):
        measure_ceilings("t4")


def test_a_gpu_is_measured_by_pytorch_alone_and_in_tf32_too(monkeypatch, steady):
    monkeypatch.setattr(runtime_pytorch, "find_gpu", lambda device: 0)
    monkeypatch.setattr(module, "gpu_versions", lambda place: {"gpu": "NVIDIA T4"})
    monkeypatch.setattr(module, "_gpu_sizes", lambda place: SMALL)
    right = {name: getattr(module, name) for name in
             ("_torch_gemm", "_torch_conv", "_torch_memory", "_torch_tiny")}  # fmt: skip
    for name, make in right.items():
        monkeypatch.setattr(
            module, name,
            lambda place, *more, make=make: make(CPU if place == CUDA else place, *more),
        )  # fmt: skip
    found = measure_ceilings("t4", threads=1)
    assert {*found.peak_tera_ops_per_s} == {"fp32", "tf32", "bf16", "fp16", "int8"}
    assert {e.backend.split()[0].split(".")[0] for e in found.how} == {"torch"}
    assert found.device == "t4" and found.machine.versions["gpu"] == "NVIDIA T4"
    assert found.elsewhere() is None


@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpus_kernels_are_waited_for_and_float32_is_float32(tf32, monkeypatch):
    events, flags = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda place: nullcontext())

    def call():
        events.append("call")
        flags.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return torch.ones(1)

    with module._torch_threads(1):
        module._repeated(CUDA, call, 3, tf32=tf32)()
    assert events == ["call", "call", "call", "wait"]
    assert {*flags} == {("high" if tf32 else "highest", tf32)}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpus_copies_are_beyond_and_within_its_second_level_cache(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=48 * 2**20, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: properties)
    sizes = module._gpu_sizes(CUDA)
    assert (sizes.far_mib, sizes.near_mib) == (2048, 12)
    properties.total_memory = 8 * 2**30
    assert module._gpu_sizes(CUDA).far_mib == 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
def test_a_real_gpu_has_ceilings_of_every_dtype(short):
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    from litezoo.recipes.devices import get_device, list_devices

    names = [n for n in list_devices() if get_device(n).compute_capability == capability]
    if not names:
        pytest.skip(f"no device file has compute capability {capability}")
    found = measure_ceilings(names[0], threads=1, sizes=dataclasses.replace(SMALL, gemm=64))
    assert {"fp32", "tf32", "fp16", "int8"} <= {*found.peak_tera_ops_per_s}


# ----------------------------------------------------------------------------------- the file


def test_ceilings_are_kept_in_one_file_for_each_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ceilings("cpu") is None
    file = write_ceilings(some())
    assert str(file) == "benchmarks/results/ceilings/cpu.json"
    values = json.loads(file.read_text())
    assert values["peak_tera_ops_per_s"] == {"fp32": 0.2, "int8": 0.8}
    assert values["how"][0].keys() >= {"what", "backend", "value"}
    assert read_ceilings("cpu") == some(machine=read_ceilings("cpu").machine)
    write_ceilings(some(memory_gb_per_s=41.0))
    assert read_ceilings("cpu").memory_gb_per_s == 41.0
    assert read_ceilings("t4") is None
    elsewhere = write_ceilings(some(device="t4"), folder=tmp_path / "mine")
    assert elsewhere == ceilings_file("t4", folder=tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.update(schema=99), "schema: Input should be 1"),
        (lambda v: v.pop("machine"), "machine"),
        (lambda v: v.update(memory_gb_per_s=0), "above 0"),
        (lambda v: v.update(peak_tera_ops_per_s={}), "above 0"),
        (lambda v: v.update(colour="red"), "colour"),
        (lambda v: v["how"][0].pop("unit"), "unit"),
    ],
)
def test_a_damaged_file_says_how_to_get_a_right_one(change, reason, tmp_path):
    file = write_ceilings(some(), folder=tmp_path)
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(CheckFailed, match=f"(?s){reason}.*again: litezoo ceilings --device cpu"):
        read_ceilings("cpu", folder=tmp_path)
    file.write_text("{")
    with pytest.raises(CheckFailed, match="holds no ceilings"):
        read_ceilings("cpu", folder=tmp_path)


def test_ceilings_of_another_machine_say_so():
    here = read_machine()
    assert some().elsewhere(here) is None
    there = dataclasses.replace(here, cpu="Some Other CPU", cores=64)
    said = some(machine=there).elsewhere(here)
    assert "Some Other CPU, 64 cores" in said and "measure: litezoo ceilings --device cpu" in said


def test_the_best_way_is_the_most_or_the_least_time():
    ceilings = some()
    assert ceilings.best("gemm", "fp32").value == 0.1
    assert ceilings.best("call").backend == "b"
    assert ceilings.best("gemm", "fp16") is None


def test_the_table_marks_what_the_ceilings_are_made_of():
    rows = ceilings_table(some())
    marked = [row[:3] for row in rows if row[-1] == "best"]
    assert marked == [
        ("conv3x3 of a size", "fp32", "torch conv2d"),
        ("gemm of a size", "int8", "torch.mm"),
        ("copy of a size", "-", "torch.mm"),
        ("call of a size", "-", "b"),
    ]
    assert rows[0][3:] == ("0.1", "tera-ops/s", "1%", "")


def test_reading_ceilings_needs_no_torch():
    code = (
        "import sys; from litezoo.benchmarks.ceilings import read_ceilings; read_ceilings('none'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
