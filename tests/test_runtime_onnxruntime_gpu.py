"""ONNX Runtime's GPU providers, against a stand-in for the package that has them.

The stand-in runs files on the CPU and keeps what it was asked for; names of providers and of their
options are those of onnxruntime-gpu 1.31.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from test_export import exported

from litezoo.export import runtime_pytorch
from litezoo.export.artifact import read_expected
from litezoo.export.exporter import export
from litezoo.export.runtime import BuildSource, get_runtime
from litezoo.models.errors import CheckFailed, MissingError
from litezoo.recipes.devices import get_device, list_devices

RUNTIMES = ("onnxruntime_cuda", "onnxruntime_tensorrt")
PROVIDERS = {
    "onnxruntime_cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "onnxruntime_tensorrt": [
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider",
    ],
}  # fmt: skip
both = pytest.mark.parametrize("name", RUNTIMES)


pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture
def t4():
    return get_device("t4")


@pytest.fixture
def gpu(source, monkeypatch, tmp_path):
    """A machine with the device's GPU and onnxruntime-gpu; returns what was asked of sessions."""
    asked = []
    real = onnxruntime.InferenceSession

    def session(file, options=None, *, providers, disabled_optimizers=None):
        if providers == ["CPUExecutionProvider"]:  # checks of the ONNX file
            return real(file, options, providers=providers,
                        disabled_optimizers=disabled_optimizers)  # fmt: skip
        asked.append(SimpleNamespace(providers=providers, disabled=disabled_optimizers))
        inner = real(file, options, providers=["CPUExecutionProvider"],
                     disabled_optimizers=disabled_optimizers)  # fmt: skip
        names = [name for name, _ in providers]
        return SimpleNamespace(
            get_inputs=inner.get_inputs, run=inner.run, get_providers=lambda: names
        )

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: PROVIDERS["onnxruntime_tensorrt"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(runtime_pytorch, "find_gpu", lambda device: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


@pytest.fixture
def source(tmp_path_factory):
    folder = exported(tmp_path_factory, "cpu")
    return BuildSource(onnx={"fp32": folder / "model.fp32.onnx"}), read_expected(folder)


@both
def test_the_file_runs_on_the_devices_gpu_by_its_provider(name, gpu, source, t4, tmp_path):
    runtime, (built_from, (images, logits)) = get_runtime(name), source
    files = runtime.build(built_from, device=t4, precision="fp32", folder=tmp_path)
    session = runtime.load(files, device=t4, precision="fp32")
    assert np.abs(session.run(images) - logits).max() <= 1e-4 * np.abs(logits).max()
    (asked,) = gpu
    assert [provider for provider, _ in asked.providers] == PROVIDERS[name]
    assert {settings.get("device_id", 1) for _, settings in asked.providers} == {1}
    assert asked.disabled == ["WeightBiasQuantization"]


def test_float32_is_no_tf32(gpu, source, t4):
    get_runtime("onnxruntime_cuda").load([source[0].onnx["fp32"]], device=t4, precision="fp32")
    assert gpu[0].providers[0][1]["use_tf32"] == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8+fp16"])
def test_tensorrt_gets_the_batches_of_the_device_and_the_types_of_the_file(
    precision, gpu, source, t4, tmp_path
):
    runtime, file = get_runtime("onnxruntime_tensorrt"), source[0].onnx["fp32"]
    runtime.load([file], device=t4, precision=precision)
    settings = gpu[0].providers[0][1]
    assert settings["trt_profile_min_shapes"] == "input:1x1x32x32"
    assert settings["trt_profile_opt_shapes"] == "input:8x1x32x32"
    assert settings["trt_profile_max_shapes"] == "input:32x1x32x32"
    assert settings["trt_fp16_enable"] == ("fp16" in precision)
    assert settings["trt_int8_enable"] == ("int8" in precision)
    assert settings["trt_engine_cache_path"].startswith(str(tmp_path / "cache" / "litezoo"))


@both
def test_a_provider_that_does_not_start_is_told_not_replaced_by_the_cpu(
    name, gpu, source, t4, monkeypatch
):
    session = onnxruntime.InferenceSession

    def on_cpu(*arguments, **options):
        made = session(*arguments, **options)
        return SimpleNamespace(**{**vars(made), "get_providers": lambda: ["CPUExecutionProvider"]})

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    with pytest.raises(MissingError, match="does not start here; it needs the libraries of"):
        get_runtime(name).load([source[0].onnx["fp32"]], device=t4, precision="fp32")


@both
def test_a_file_that_is_refused_is_a_failed_check(name, gpu, t4, tmp_path, source):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(source[0].onnx["fp32"].read_bytes())
    import onnx

    proto = onnx.load(broken)
    proto.graph.node[0].op_type = "Nothing"
    broken.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckFailed, match=rf"{name} refuses .*model\.onnx"):
        get_runtime(name).load([broken], device=t4, precision="fp32")


@both
def test_without_the_package_of_gpus_its_name_is_told(name, t4):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is onnxruntime-gpu")
    reason = get_runtime(name).missing(t4)
    assert f"needs {PROVIDERS[name][0]}" in reason
    assert reason.endswith("pip install onnxruntime-gpu")


@both
def test_without_the_gpu_that_is_told(name, gpu, t4, monkeypatch):
    def none(device):
        raise MissingError(f"{device.name} is not here")

    monkeypatch.setattr(runtime_pytorch, "find_gpu", none)
    assert get_runtime(name).missing(t4) == "t4 is not here"
    with pytest.raises(MissingError, match="t4 is not here"):
        get_runtime(name).build(BuildSource(onnx={}), device=t4, precision="fp32", folder=None)


def test_every_server_gpu_is_served():
    served = [n for n in list_devices() if "tensorrt" in get_device(n).runtimes]
    for name in served:
        if "jetson" not in name:  # JetPack has packages of its own
            assert {*RUNTIMES} <= {*get_device(name).runtimes}, name


def test_an_export_names_them_among_what_is_not_built(tmp_path):
    artifact = export("repvgg_tiny", device="t4", weights="random", out=tmp_path / "a",
                      precision="fp32")  # fmt: skip
    assert artifact.kit
    for name in RUNTIMES:
        assert "onnxruntime-gpu" in artifact.not_built[name]


def test_on_its_gpu_an_export_has_both_engines(gpu, tmp_path):
    artifact = export("repvgg_tiny", device="t4", weights="random", out=tmp_path / "a",
                      precision="fp16")  # fmt: skip
    labels = {engine.label for engine in artifact.engines}
    assert labels == {f"{name} fp16" for name in RUNTIMES}
    assert all(dataclasses.asdict(engine.parity)["batches"] for engine in artifact.engines)
