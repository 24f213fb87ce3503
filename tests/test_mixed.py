"""8-bit and float convolutions side by side: which are tried, and which mixture is kept."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_export import exported

from litezoo.export.artifact import read_artifact, verify
from litezoo.export.compare import worst_layers
from litezoo.export.exporter import export
from litezoo.export.mixed import find_mixture, mixtures
from litezoo.export.runtime_openvino import RUNTIME, one_core
from litezoo.export.to_int8 import convolutions, quantize
from litezoo.models.errors import CheckFailed, MissingError
from litezoo.recipes.devices import get_device

HAS_BF16 = "BF16" in one_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


pytestmark = pytest.mark.usefixtures("tiny_model")


class Net:
    """The tiny network in float32 and in 8 bits, and how a mixture is searched for it."""

    def __init__(self, folder):
        self.fp32 = onnx.load(folder / "model.fp32.onnx")
        self.images = np.load(folder / "expected.npz")["inputs"]
        self.int8 = quantize(self.fp32, self.images, form="int8-u8")
        self.names = convolutions(self.fp32)
        self.folder = folder

    def search(self, *fastest, accept=lambda proto: True, **options):
        """Search with a stand-in for measuring: `fastest` are words of labels, in order."""
        return find_mixture(
            self.fp32, self.int8, accept=accept, rank=prefer(*fastest), images=self.images[:1],
            retype=lambda keep: quantize(
                self.fp32, self.images, form="int8-u8", keep_float=keep
            ),
            calibration=self.images, device=get_device("cpu"), threads=1, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return Net(exported(tmp_path_factory, "cpu"))


def prefer(*words):
    """Return a stand-in for measuring: labels with one of the words are the fastest, in order."""

    def rank(sessions, batch):
        for session in sessions.values():
            assert session.run(batch).shape == (len(batch), 10)
        order = [next((i for i, w in enumerate(words) if w in label), 9) for label in sessions]
        return {label: 1.0 + place for label, place in zip(sessions, order, strict=True)}

    return rank


def quantized(proto):
    """Return the names of the convolutions with 8-bit weights."""
    made = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    return {n.name for n in proto.graph.node if n.op_type == "Conv" and n.input[1] in made}


TIMES = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 10), min_size=1)


@given(TIMES, TIMES)
def test_what_is_tried_in_float_is_what_8_bits_do_not_make_faster(float_ms, int8_ms):
    known = {*float_ms} & {*int8_ms}
    slower = {name for name in known if float_ms[name] < int8_ms[name]}
    tried = mixtures(float_ms, int8_ms)
    assert len(tried) == len({*tried}) <= 2
    for keep in tried:
        assert slower <= {*keep} < known  # something stays 8-bit
    if slower and slower != known:
        assert {*tried[0]} == slower


@pytest.fixture
def slow_in_int8(monkeypatch):
    """Layer profiles in which the named convolutions are slower in 8 bits than in float."""
    names = set()

    def layer_ms(self, files, batch, *, device, precision, threads, objective):
        proto = onnx.load(files[0].parent / "model.onnx")
        is_int8 = precision.startswith("int8")
        return {
            name: 2.0 if not is_int8 else 4.0 if name in names else 1.0
            for name in (n.name for n in proto.graph.node if n.op_type == "Conv")
        }

    monkeypatch.setattr(type(RUNTIME), "layer_ms", layer_ms)
    return names


def test_convolutions_that_8_bits_slow_down_stay_float(net, slow_in_int8):
    slow_in_int8.update(net.names[1:3])
    mixture = net.search("convolutions in fp32")
    assert mixture.keep_float == net.names[1:3]
    assert quantized(mixture.proto) == {*net.names} - {*net.names[1:3]}
    assert f"2 of {len(net.names)} convolutions in fp32" in mixture.said


def test_a_mixture_that_is_no_faster_is_refused_with_its_time(net, slow_in_int8):
    slow_in_int8.update(net.names[:1])
    with pytest.raises(CheckFailed, match=r"int8 is the best .* takes 10\.00 of its time"):
        net.search("int8")


def test_where_8_bits_make_every_layer_faster_there_is_nothing_to_mix(net, slow_in_int8):
    with pytest.raises(CheckFailed, match="it makes every convolution faster"):
        net.search("int8")


def test_noisy_layers_go_back_to_float_until_the_network_passes(net, slow_in_int8):
    least = len(net.names) - 3
    mixture = net.search(
        "convolutions in fp32", accept=lambda proto: len(quantized(proto)) <= least
    )
    assert len(quantized(mixture.proto)) == least
    # of equal gains the noisiest: the worst by its own noise is among them
    worst = worst_layers(net.fp32, net.int8, net.images, most=1)[0].name
    assert worst in mixture.keep_float


def test_where_half_of_the_layers_do_not_help_a_float_precision_is_advised(net, slow_in_int8):
    with pytest.raises(CheckFailed, match=r"no mixture with half of the .* take a float precision"):
        net.search("int8", accept=lambda proto: False)


def test_a_faster_mixture_that_is_not_right_is_not_taken(net, slow_in_int8):
    slow_in_int8.update(net.names[:1])
    with pytest.raises(CheckFailed, match="no faster mixture than int8 is right enough"):
        net.search("fp32", accept=lambda proto: len(quantized(proto)) == len(net.names))


@pytest.mark.skipif(HAS_BF16, reason="this CPU has bf16 instructions")
def test_bf16_on_a_cpu_without_it_is_told(net):
    with pytest.raises(MissingError, match="this CPU has no bf16 instructions"):
        net.search("int8", float_type="bf16")


def test_a_layer_profile_names_the_convolutions_of_the_onnx_file(net):
    engine = next(e for e in read_artifact(net.folder).engines if e.runtime == "openvino")
    times = RUNTIME.layer_ms(
        [net.folder / file for file in engine.files], net.images[:1], device=get_device("cpu"),
        precision="fp32", threads=1,
    )  # fmt: skip
    assert {*net.names} <= {*times} and min(times.values()) > 0


def test_a_mixture_is_one_more_engine_of_the_artifact(slow_in_int8, net, tmp_path):
    slow_in_int8.update(net.names[1:3])
    best = read_artifact(net.folder).weights
    words = {"device": "cpu", "weights": best, "out": tmp_path / "a", "precision": "int8-mixed"}
    with pytest.raises(MissingError, match="searched by measuring"):
        export("repvgg_tiny", **words)
    artifact = export("repvgg_tiny", **words, rank=prefer("fp32"), max_drop=100)
    assert [engine.label for engine in artifact.engines] == ["openvino int8-mixed"]
    assert any(f"2 of {len(net.names)} convolutions in fp32" in note for note in artifact.notes)
    assert verify(tmp_path / "a").files == len(artifact.files)
