"""Engines that take images of several sizes: their ONNX files, evidence, and refusals."""

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from helpers import shake, shallow
from hypothesis import given
from hypothesis import strategies as st
from test_train import litezoo
from torch import nn

from litezoo.export import exporter, typed
from litezoo.export.artifact import EXPECTED, MANIFEST, load, read_artifact, signed_json, verify
from litezoo.export.exporter import check, export
from litezoo.export.limits import check_limits
from litezoo.export.open_resolution import free_of_size
from litezoo.export.parity import at_size, check_batches, second_size
from litezoo.export.runtime import SIDE_MIN, SIDE_STEP, BuildSource, get_runtime
from litezoo.export.source import settle_batchnorm
from litezoo.export.to_onnx import export_onnx, load_onnx, simplify_onnx
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.files import file_sha256
from litezoo.models.fuse import fuse
from litezoo.models.layers import ConvBN, SqueezeExcite
from litezoo.models.shuffle import ChannelShuffle
from litezoo.models.vovnet import CeilMaxPool
from litezoo.recipes.devices import get_device

OTHER = (96, 128)  # what second_size says of 64 x 64


pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(scope="module")
def small():
    """Let networks come with images of 64 pixels, the smallest that may be open."""
    original = exporter.load_source

    def load_source(*arguments):
        source = original(*arguments)
        preprocess = dataclasses.replace(source.preprocess, input_size=(3, 64, 64))
        return dataclasses.replace(source, preprocess=preprocess)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "load_source", load_source)
        yield patch


@pytest.fixture(scope="module")
def opened(small, tmp_path_factory):
    """Return an artifact of an open resolution, in float and in 8 bits."""
    folder = tmp_path_factory.mktemp("open") / "out"
    export(
        "repvgg_tiny", device="x86-avx2", weights="random", out=folder, calibration="random",
        dynamic_resolution=True,
    )  # fmt: skip
    return folder


@pytest.fixture
def copy(opened, tmp_path):
    return shutil.copytree(opened, tmp_path / "copy")


def noise(count, height, width, *, channels=3):
    shape = (count, channels, height, width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def open_form(network, *, channels=3):
    """Return a network's simplified ONNX form of open sizes, made from 64 x 64."""
    images = noise(2, 64, 64, channels=channels)
    proto = export_onnx(network.eval(), images, metadata={}, dynamic_resolution=True)
    return simplify_onnx(proto, images)[0]


@torch.inference_mode()
def assert_same(network, proto, *, channels=3):
    run = load_onnx(proto)
    for size in ((64, 64), OTHER, (160, 64)):
        images = noise(2, *size, channels=channels)
        expected = network(torch.from_numpy(images)).numpy()
        assert np.abs(run(images) - expected).max() <= 1e-5 * np.abs(expected).max(), size


# ---------------------------------------------------------------------------------- the other size

STEPS = st.integers(SIDE_MIN // SIDE_STEP, 40).map(lambda steps: steps * SIDE_STEP)


@given(STEPS, STEPS)
def test_the_second_size_is_allowed_and_hides_nothing(height, width):
    sides = second_size(height, width)
    assert all(side >= SIDE_MIN and side % SIDE_STEP == 0 for side in sides)
    assert len({*sides} | {height, width}) == 2 + len({height, width})
    if height == width >= 160:
        assert max(sides) < height


@given(STEPS.filter(lambda side: side < 300), STEPS.filter(lambda side: side < 300))
def test_images_of_another_size_hold_the_same_pixels(height, width):
    images = noise(1, 96, 128, channels=1)
    cut = at_size(images, (height, width))
    assert cut.shape == (1, 1, height, width)
    rows, columns = np.arange(height) % 96, np.arange(width) % 128
    assert np.array_equal(cut, images[:, :, rows][:, :, :, columns])


# -------------------------------------------------------------------------------- the ONNX file


BLOCKS = {
    "squeeze-excite": lambda: nn.Sequential(ConvBN(3, 8, 3, stride=2), SqueezeExcite(8, 4)),
    "pooling with a cut window": lambda: nn.Sequential(ConvBN(3, 8, 3, stride=4), CeilMaxPool()),
    "padding as in TensorFlow": lambda: nn.Sequential(ConvBN(3, 8, 3, stride=2, same=True)),
    "channel shuffle": lambda: nn.Sequential(ConvBN(3, 8, 3, stride=2), ChannelShuffle(2)),
    "shuffle in five dimensions": lambda: nn.Sequential(
        ConvBN(3, 8, 3, stride=2), ChannelShuffle(2, form="5d")
    ),
    "halving by both": lambda: Halving(),
}


class Halving(nn.Module):
    """Two branches that halve a side: equal only for even sides."""

    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.AvgPool2d(2), nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, x):
        return self.pool(x) + self.conv(x)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_file_of_open_sizes_is_the_network_at_each_of_them(block):
    torch.manual_seed(0)
    network = nn.Sequential(BLOCKS[block](), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert_same(shake(network).eval(), open_form(network))


def test_its_axes_have_names_and_nothing_depends_on_the_example_s_size():
    network = nn.Sequential(ConvBN(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    proto = open_form(network)
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in sizes] == ["batch", 3, "height", "width"]
    assert "Pad" not in {node.op_type for node in proto.graph.node}


@pytest.mark.parametrize("form", ["4d", "5d"])
def test_a_shuffle_of_open_size_is_seen_by_the_limits(form):
    network = nn.Sequential(ConvBN(3, 8), ChannelShuffle(2, form=form), ConvBN(8, 8), nn.Flatten(2))
    device = get_device("x86-avx2")
    limits = dataclasses.replace(device.limits, slow={"channel-shuffle": "moves memory"})
    sources = {**device.sources, "limits.slow": "this test"}
    device = dataclasses.replace(device, limits=limits, sources=sources)
    findings = check_limits(open_form(network), device, dynamic=True, precision="fp32")
    assert [(finding.rule, finding.count) for finding in findings] == [("channel-shuffle", 1)]


#: A channel shuffle, TensorFlow's padding with squeeze-and-excite, pools that round up; without
#: the blocks that repeat these.
ODD = ("shufflenetv2_x0_5", "tf_mobilenetv3_small_075", "ese_vovnet19b_slim_dw")


@pytest.mark.parametrize("name", ODD)
def test_a_network_whose_sizes_are_odd_has_a_file_of_open_sizes(name):
    torch.manual_seed(0)
    network = shallow(get_spec(name)).build()
    settle_batchnorm(network, 64)
    deploy = free_of_size(fuse(network.eval())).eval()
    assert_same(deploy, open_form(deploy))


# --------------------------------------------------------------------------------- the artifact


def test_engines_are_compared_at_two_resolutions(opened):
    artifact = read_artifact(opened)
    assert artifact.dynamic_resolution
    assert {engine.label for engine in artifact.engines} >= {
        "openvino fp32", "onnxruntime fp32", "ncnn fp32", "openvino int8", "onnxruntime int8",
    }  # fmt: skip
    files = [check for check in artifact.checks if check.stage.startswith("onnx ")]
    assert len(files) >= 3
    for parity in (*files, *(engine.parity for engine in artifact.engines)):
        assert parity.resolutions == ((64, 64), OTHER), parity
        assert parity.batches == (1, 2, 7)
    assert [parity.resolutions for parity in verify(opened).parities].count(
        ((64, 64), OTHER)
    ) >= len(artifact.engines)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "ncnn"])
def test_an_engine_takes_images_of_any_size_in_steps(opened, runtime):
    model = load(opened, runtime=runtime)
    with np.load(opened / EXPECTED) as arrays:
        images, expected = arrays["inputs"], arrays["logits_96x128"]
    got = model(at_size(images, OTHER))
    assert np.abs(got - expected).max() < 0.35 * np.abs(expected).max()
    assert model(noise(1, 320, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 96, 100), "images are 96x100 pixels; an open resolution takes sides that are mult"),
        ((1, 3, 32, 96), "images are 32x96 pixels"),
        ((1, 1, 64, 64), r"images have shape \(1, 1, 64, 64\); this engine takes \(N, 3, H, W\)"),
        ((0, 3, 64, 64), "this engine takes"),
        ((3, 64, 64), "this engine takes"),
    ],
)
def test_another_size_is_refused_in_a_sentence(opened, shape, words):
    with pytest.raises(UsageError, match=words):
        load(opened)(np.zeros(shape, np.float32))


def doctor(folder, change):
    """Change arrays of expected.npz and sign the folder again, as if it had been exported so."""
    with np.load(folder / EXPECTED) as arrays:
        values = {name: arrays[name] for name in arrays}
    change(values)
    np.savez(folder / EXPECTED, **values)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["files"][EXPECTED] = file_sha256(folder / EXPECTED)
    (folder / MANIFEST).write_text(signed_json(manifest))


def test_verify_compares_the_second_resolution_too(copy):
    doctor(copy, lambda values: values["logits_96x128"].__imul__(-1))
    with pytest.raises(CheckFailed, match="at 96x128 differs from PyTorch by"):
        verify(copy)


def test_verify_misses_the_second_resolution_s_logits(copy):
    doctor(copy, lambda values: values.pop("logits_96x128"))
    with pytest.raises(CheckFailed, match=r"expected.npz has no logits_96x128; export again"):
        verify(copy)


def test_an_engine_that_is_wrong_at_the_second_resolution_only_is_not_kept():
    images = noise(7, 64, 64)
    expected = np.arange(70, dtype=np.float32).reshape(7, 10)

    def run(batch):
        return expected[: len(batch)] * (1 if batch.shape[2:] == (64, 64) else 1.5)

    second = (at_size(images, OTHER), expected)
    assert check_batches("it", run, images, expected, tolerance=1e-4).resolutions == ()
    with pytest.raises(CheckFailed, match=r"it at 96x128 differs from PyTorch by 5\.0e-01"):
        check_batches("it", run, images, expected, tolerance=1e-4, second=second)
    parity = check_batches("it", run, images, expected, tolerance=0.6, second=second)
    assert parity.max_relative_error == pytest.approx(0.5) and parity.stage == "it"


def test_export_and_verify_say_both_sizes(opened, capsys):
    assert litezoo("verify", opened) == 0
    assert "at batch 1, 2, 7 at 64x64 and 96x128 (allowed" in capsys.readouterr().out


def test_an_open_and_a_fixed_artifact_have_different_inputs(opened):
    assert read_artifact(opened).inputs["dynamic_resolution"] == "True"


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("npu-int8", "npu-int8 runs images of one size only; export without an open resolution"),
        ("rk3588-npu", "rk3588-npu runs images of one size only"),
        ("jetson-agx-orin", "has no runtime for an open resolution: runtime 'tensorrt' builds"),
    ],
)
def test_a_device_of_one_size_is_refused_before_anything_is_done(tmp_path, capsys, device, words):
    status = litezoo(
        *("export", "repvgg_tiny", "--device", device, "--weights", "random"),
        *("--dynamic-resolution", "--out", tmp_path / "out"),
    )
    assert status == 2 and words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_its_own_odd_size_is_refused(small, tmp_path, monkeypatch):
    inner = exporter.load_source

    def odd(*arguments):
        source = inner(*arguments)
        preprocess = dataclasses.replace(source.preprocess, input_size=(3, 80, 80))
        return dataclasses.replace(source, preprocess=preprocess)

    monkeypatch.setattr(exporter, "load_source", odd)
    with pytest.raises(UsageError, match="repvgg_tiny's own images are 80x80 pixels; an open"):
        export(
            "repvgg_tiny", device="cpu", weights="random", out=tmp_path / "out",
            dynamic_resolution=True,
        )  # fmt: skip


def test_the_limits_of_a_static_device_name_the_open_axes(small, opened, monkeypatch):
    proto = onnx.load(opened / "model.fp32.onnx")
    monkeypatch.setattr(typed, "export_onnx", lambda *_, dynamic_resolution, **__: proto)
    findings = check("repvgg_tiny", device="npu-int8", weights="random", dynamic_resolution=True)
    open_axes = next(finding for finding in findings if finding.kind == "dynamic")
    assert "leaves batch, height, width open" in open_axes.message and not open_axes.fixed


def test_ncnn_refuses_a_shuffle_whose_size_pnnx_wrote_down(tmp_path):
    network = nn.Sequential(
        ConvBN(3, 8, 3, stride=2), ChannelShuffle(2), ConvBN(8, 8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    file = tmp_path / "model.fp32.onnx"
    onnx.save(open_form(network), file)
    source = BuildSource(onnx={"fp32": file}, images=noise(2, 64, 64), open_resolution=True)
    with pytest.raises(CheckFailed, match="pnnx writes the image size into 2 reshapes"):
        get_runtime("ncnn").build(
            source, device=get_device("cpu"), precision="fp32", folder=tmp_path
        )


def test_pooling_to_several_windows_is_refused():
    network = nn.Sequential(ConvBN(3, 8), nn.AdaptiveAvgPool2d(7))
    with pytest.raises(UsageError, match="1 pools to 7 windows, which ONNX has for one image size"):
        free_of_size(network)


def test_padding_as_in_tensorflow_is_a_constant_at_even_sides():
    network = shake(nn.Sequential(ConvBN(3, 8, 3, stride=2, same=True), ConvBN(8, 8, same=True)))
    free = free_of_size(network.eval())
    assert "Conv2dSame" in repr(network) and "Conv2dSame" not in repr(free)
    for size in ((64, 96), (2, 4)):
        images = torch.from_numpy(noise(2, *size))
        assert torch.equal(free(images), network(images))
    kinds = {node.op_type for node in open_form(nn.Sequential(free, nn.Flatten(2))).graph.node}
    assert "Conv" in kinds and not kinds & {"Ceil", "Max", "Div"}


def test_channel_shuffles_of_open_size_are_written_in_five_dimensions():
    network = nn.Sequential(ConvBN(4, 8), ChannelShuffle(2))
    free = free_of_size(network)
    assert [m.form for m in free.modules() if isinstance(m, ChannelShuffle)] == ["5d"]
    assert network[1].form == "4d"
    images = torch.from_numpy(noise(1, 4, 4, channels=4))
    assert torch.equal(free.eval()(images), network.eval()(images))


@pytest.mark.slow
@torch.inference_mode()
def test_a_package_of_open_size_is_the_network_at_each_size_it_takes(tmp_path):
    network = nn.Sequential(
        ConvBN(3, 8, 3, stride=2), SqueezeExcite(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    runtime, device = get_runtime("pytorch"), get_device("cpu")
    source = BuildSource(
        onnx={}, module=network.eval(), images=noise(2, 64, 64), open_resolution=True
    )
    files = runtime.build(source, device=device, precision="fp32", folder=tmp_path)
    session = runtime.load(files, device=device, precision="fp32")
    for size in ((1, 64, 64), (7, *OTHER)):
        images = noise(*size)
        expected = network(torch.from_numpy(images)).numpy()
        assert np.abs(session.run(images) - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(UsageError, match="images are 70x64 pixels"):
        session.run(noise(1, 70, 64))
