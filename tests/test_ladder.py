"""The int8 ladder: which rungs there are, which one is taken, what is said, and what it brings."""

import itertools
import json
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from collapsing import DYING, changed, images_of, stress, train_dying
from helpers import in_catalogue, settle
from test_int8 import run, small_file
from test_train import TINY, litezoo

from litezoo.export import ladder as ladder_module
from litezoo.export.artifact import Accuracy, read_artifact
from litezoo.export.artifact import load as load_artifact
from litezoo.export.compare import compare_logits
from litezoo.export.exporter import export
from litezoo.export.ladder import STAGES, Ladder, NothingToTrain, NotWorthIt, Step, climb
from litezoo.export.qdq_lint import lint
from litezoo.export.source import load_source
from litezoo.export.to_int8 import PROPERTY, convolutions, quantize
from litezoo.export.to_onnx import export_onnx, load_onnx
from litezoo.export.typed import with_weights
from litezoo.export.worth import verdict
from litezoo.models.errors import CheckFailed
from litezoo.models.fuse import fuse
from litezoo.models.repvgg import RepVGG

# ------------------------------------------------------------------------------ the climb


def step(stage="minmax", said="as it is"):
    return Step(stage=stage, said=said, float_proto=small_file())


def accuracy(drop):
    return Accuracy(
        data="digits (val)", images=288, top1_percent=90.0 - drop, pytorch_top1_percent=90.0,
        agreement_percent=99.0, snr_db=20.0,
    )  # fmt: skip


def climbed(drops, **options):
    """Climb steps that lose so many points, the worst being reported where none is right."""
    made = []

    def make(own):
        made.append(own.said)
        return own.float_proto

    words = {"max_drop": 0.5, "advice": "try another network", "check": lambda s, p: None}
    left = iter(drops)
    found = climb(
        (step(said=f"rung {i}") for i in range(len(drops))), form="int8", make=make,
        measure=lambda proto: accuracy(next(left)), **{**words, **options},
    )  # fmt: skip
    return found, made


def test_the_first_rung_that_is_good_enough_is_taken_and_no_further_one_is_made():
    found, made = climbed([26.0, 3.0, 0.5, 0.0])
    assert made == ["rung 0", "rung 1", "rung 2"]
    assert found.step.said == "rung 2"
    refused = [own.rung.refused for own in found.tried]
    assert refused == ["loses 26.00 points", "loses 3.00 points", None]
    assert [own.rung.accuracy.drop for own in found.tried] == [26.0, 3.0, 0.5]
    assert all(own.rung.size_bytes == small_file().ByteSize() for own in found.tried)


def test_where_no_rung_is_good_enough_the_best_and_what_to_do_are_said():
    with pytest.raises(NotWorthIt) as error:
        climbed([26.0, 0.75, 3.0])
    assert str(error.value) == (
        "onnx int8 is not worth it: the best of 3 rungs (minmax: rung 1) loses 0.75 points of "
        "top-1 (89.25 instead of 90.00 % on 288 images), more than 0.5 (--max-drop); try another "
        "network"
    )
    assert len(error.value.tried) == 3


def test_a_rung_whose_outputs_are_no_longer_the_network_s_is_refused_though_it_is_accurate():
    def check(own, proto):
        if own.said == "rung 0":
            raise CheckFailed("onnx int8 differs by 0.9")

    found, _ = climbed([0.0, 0.1], check=check)
    assert [own.rung.refused for own in found.tried] == ["onnx int8 differs by 0.9", None]
    with pytest.raises(NotWorthIt, match=r"the one rung tried \(minmax: rung 0\) onnx int8 diff"):
        climbed([0.0], check=check)


def test_each_rung_is_told_as_it_is_known():
    told = []
    climbed([26.0, 0.0], progress=told.append)
    assert told == [
        "int8, minmax: top-1 64.00 % (-26.00), agreement 99.0 %, 20 dB, refused: loses 26.00 "
        "points",
        "int8, minmax: top-1 90.00 % (-0.00), agreement 99.0 %, 20 dB, taken",
    ]


# ------------------------------------------------------------------------------ the rungs


def retrained(kind, base, unsigned):
    """Stand in for training: the network as it is."""
    if kind == "train":
        raise NothingToTrain
    return base, "QAT of the fused network"


def tiny_deploy(**options):
    """Return a small RepVGG, random, some of its channels 64 times too small, in deploy form."""
    torch.manual_seed(0)
    table = {**TINY.architecture, "num_classes": 10, "in_chans": 1, **options}
    return fuse(stress(settle(RepVGG(**table)), 64, every=8))


@cache
def tiny_file():
    return export_onnx(tiny_deploy(), tiny_images()[:2], metadata={})


def tiny_images():
    return np.random.default_rng(0).standard_normal((16, 1, 32, 32)).astype(np.float32)


@cache
def all_steps(form, per_channel=True):
    own = Ladder(tiny_file(), tiny_images(), per_channel=per_channel, retrain=retrained)
    return own, tuple(own.steps(form))


@pytest.mark.parametrize("form", ["int8", "int8-u8", "int8-u8s8"])
def test_the_rungs_come_in_the_order_of_their_cost(form):
    _, steps = all_steps(form)
    stages = [own.stage for own in steps]
    assert stages == sorted(stages, key=STAGES.index)
    assert {*stages} == {*STAGES}
    ranges = [own for own in steps if own.stage == "ranges"]
    assert [own.method for own in ranges[:3]] == ["mse", "entropy", "percentile"]
    assert ranges[3].said.endswith("biases corrected")
    floats = [len(own.keep_float) for own in steps if own.stage == "float-layers"]
    assert floats == [n for n in (1, 2, 4, 8) if n <= len(convolutions(tiny_file())) // 2]
    assert all(own.rounded for own in steps if own.stage == "adaround")


@pytest.mark.parametrize("form", ["int8", "int8-u8", "int8-u8s8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_rung_is_a_file_that_runs_and_that_tensorrt_would_fuse(form, per_channel):
    own, steps = all_steps(form, per_channel)
    for found in steps:
        proto = own.quantize(found, form)
        if form == "int8":
            assert lint(proto) == ()
        assert np.isfinite(run(proto, tiny_images()[:2])).all()
        record = {entry.key: entry.value for entry in proto.metadata_props}[PROPERTY]
        assert json.loads(record)["per_channel"] is per_channel


def test_rungs_are_made_when_they_are_asked_for_and_once():
    own = Ladder(tiny_file(), tiny_images())
    told = []
    own.progress = told.append
    first = next(own.steps("int8"))
    assert first.stage == "minmax"
    assert told == []
    two = list(itertools.islice(own.steps("int8"), 2))
    assert two[0] is first
    assert two[1].stage == "equalize"
    assert told == ["int8: equalising the layers"]
    assert list(itertools.islice(own.steps("int8"), 2)) == two
    assert len(told) == 1


def test_a_step_is_quantized_once_for_each_form_and_choice_of_float_layers(monkeypatch):
    made = []

    def count(proto, images, **options):
        made.append(options["form"])
        return quantize(proto, images, **options)

    monkeypatch.setattr(ladder_module, "quantize", count)
    own = Ladder(small_file(), small_images())
    plain = next(own.steps("int8"))
    first = own.quantize(plain, "int8")
    assert own.quantize(plain, "int8") is first
    assert made == ["int8"]
    keep = convolutions(small_file())[:1]
    assert own.quantize(plain, "int8", keep_float=keep) is not first
    own.quantize(plain, "int8-u8")
    assert made == ["int8", "int8", "int8-u8"]


@pytest.mark.parametrize("last", STAGES)
def test_no_rung_above_the_last_one_is_tried(last):
    own = Ladder(small_file(), small_images(), last=last, retrain=retrained)
    tried = {found.stage for found in own.steps("int8")}
    assert tried <= {*STAGES[: STAGES.index(last) + 1]}
    assert last in tried or last == "equalize"


def small_images():
    return np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)


def test_convolutions_that_are_to_stay_float_do_on_every_rung():
    keep = convolutions(small_file())[1]
    own = Ladder(small_file(), small_images(), keep_float=[keep])
    for found in own.steps("int8"):
        record = {e.key: e.value for e in own.quantize(found, "int8").metadata_props}[PROPERTY]
        assert keep in json.loads(record)["keep_float"]


def test_without_a_trainer_nothing_is_trained():
    own = Ladder(small_file(), small_images())
    assert "qat" not in {found.stage for found in own.steps("int8")}


def test_a_network_takes_the_weights_of_its_equalised_file_by_their_names():
    deploy = tiny_deploy()
    images = tiny_images()
    proto = export_onnx(deploy, images[:2], metadata={})
    equal = ladder_module.equalize(proto, images)
    twin = with_weights(deploy, equal.proto, images)
    assert equal.channels and twin is not None
    own, other = (dict(net.named_parameters()) for net in (deploy, twin))
    assert any(not torch.equal(own[name], other[name]) for name in own)
    likeness = compare_logits(
        twin(torch.from_numpy(images)).detach().numpy(), load_onnx(proto)(images)
    )
    assert likeness.snr_db > 80


def test_weights_of_another_network_are_not_taken():
    other = tiny_deploy(depths=(1, 1, 1, 1))
    proto = export_onnx(other, tiny_images()[:2], metadata={})
    assert with_weights(tiny_deploy(), proto, tiny_images()) is None


def test_int8_that_is_slower_than_a_float_precision_is_not_worth_it():
    times = {"openvino int8": 1.5, "onnxruntime int8": 2.0, "openvino fp32": 1.0}
    assert verdict(times, "cpu") == (
        "int8 is not worth it on cpu: openvino int8 takes 1.50 of the time of openvino fp32; "
        "export with --precision fp32"
    )
    assert verdict({"openvino int8": 1.5}, "cpu") is None


# ---------------------------------------------------------------------- networks that collapse


@pytest.fixture(scope="module", autouse=True)
def catalogue():
    with in_catalogue(TINY, DYING):
        yield


@pytest.fixture(scope="module")
def dying(tmp_path_factory):
    return train_dying(tmp_path_factory.mktemp("dying") / "best.ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    status = litezoo(
        *("train", "repvgg_tiny", "--data", "digits", "--out", folder, "--json"),
        *("--trainer.max_epochs", 10, "--model.ema_decay=null"),
    )
    assert status == 0
    return folder / "best.ckpt"


def points_lost(model, checkpoint, *, per_channel, cure=True):
    """Return what plain int8 loses on the digits' validation images."""
    network = load_source(model, str(checkpoint), ()).model.eval()
    proto = export_onnx(fuse(network, cure=cure), images_of("val")[0][:2].numpy(), metadata={})
    images, labels = images_of("val")
    typed = quantize(
        proto, images_of("train")[0][:512].numpy(), form="int8", per_channel=per_channel
    )
    right = [
        100 * (load_onnx(p)(images.numpy()).argmax(1) == labels.numpy()).mean()
        for p in (proto, typed)
    ]
    return right[0] - right[1]


def top1_of(folder, runtime):
    """Return the top-1 of an artifact's engine on the digits' validation images, in percent."""
    images, labels = images_of("val")
    session = load_artifact(folder, runtime=runtime)
    got = np.concatenate([session(images[i : i + 1].numpy()) for i in range(len(images))])
    return 100 * (got.argmax(1) == labels.numpy()).mean()


def brought_back(model, checkpoint, device, folder):
    """Export int8 as a user would; return the artifact, whose engines give what it claims."""
    export(model, device=device, weights=str(checkpoint), precision="int8", out=folder)
    artifact = read_artifact(folder)
    assert artifact.engines
    for engine in artifact.engines:
        assert engine.accuracy.drop <= 0.5
        assert top1_of(folder, engine.runtime) == pytest.approx(
            engine.accuracy.top1_percent, abs=0.001
        )
    return artifact


def test_a_seed_whose_channels_died_collapses_and_is_cured_before_the_first_rung(dying, tmp_path):
    assert points_lost(DYING.name, dying, per_channel=False, cure=False) > 20
    artifact = brought_back(DYING.name, dying, "npu-int8", tmp_path / "out")
    assert [rung.stage for rung in artifact.ladder] == ["minmax"]
    assert any(note.startswith("dead channel") for note in artifact.notes)


def test_a_stressed_network_collapses_per_tensor_and_is_brought_back(trained, tmp_path):
    checkpoint = changed(trained, lambda net: stress(net, 16, every=8), tmp_path / "stressed.ckpt")
    assert points_lost("repvgg_tiny", checkpoint, per_channel=False) > 20
    artifact = brought_back("repvgg_tiny", checkpoint, "npu-int8", tmp_path / "out")
    first, second, *_ = artifact.ladder
    assert first.accuracy.drop > 20
    assert first.refused.startswith("loses ")
    assert second.stage == "equalize"
    assert second.accuracy.snr_db > first.accuracy.snr_db + 20
    assert artifact.ladder[-1].refused is None
    again = read_artifact(tmp_path / "out")
    assert again.ladder == artifact.ladder


@pytest.fixture(scope="module")
def stressed(trained, tmp_path_factory):
    target = tmp_path_factory.mktemp("stressed") / "stressed.ckpt"
    return changed(trained, lambda net: stress(net, 64, every=8), target)


def test_per_channel_scales_do_not_save_a_network_under_more_stress_but_the_ladder_does(
    stressed, tmp_path
):
    assert points_lost("repvgg_tiny", stressed, per_channel=True) > 20
    artifact = brought_back("repvgg_tiny", stressed, "cpu", tmp_path / "out")
    assert {engine.runtime for engine in artifact.engines} == {"openvino", "onnxruntime"}
    assert {rung.form for rung in artifact.ladder if rung.refused is None} == {
        "int8-u8", "int8-u8s8"
    }  # fmt: skip


def test_a_file_for_tensorrt_climbs_too_and_stays_one_that_it_fuses(stressed, tmp_path):
    out = tmp_path / "out"
    words = ("--device", "t4", "--precision", "int8+fp16", "--out", out)
    assert litezoo("export", "repvgg_tiny", "--weights", stressed, *words, "--json") == 0
    artifact = read_artifact(out)
    assert artifact.onnx_accuracy["int8-fp16"].drop <= 0.5
    assert artifact.ladder[0].accuracy.drop > 20
    assert lint(onnx.load(out / artifact.onnx["int8-fp16"])) == ()


def test_where_nothing_helps_the_rungs_are_shown_and_nothing_is_written(trained, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("--device", "cpu", "--precision", "int8", "--max-drop", -100, "--last-rung", "ranges")
    assert litezoo("export", "repvgg_tiny", "--weights", trained, *words, "--out", out) == 3
    shown = capsys.readouterr()
    assert "int8: the rungs tried" in shown.out and "biases corrected" in shown.out
    assert "is not worth it: the best of" in shown.err
    assert "`--precision int8 --last-rung qat`" in shown.err
    assert not out.exists()


def test_among_all_precisions_nothing_is_trained_and_int8_is_left_out(trained, tmp_path):
    out = tmp_path / "out"
    export("repvgg_tiny", device="cpu", weights=str(trained), out=out, max_drop=-100)
    artifact = read_artifact(out)
    assert not any(engine.precision.startswith("int8") for engine in artifact.engines)
    assert {rung.stage for rung in artifact.ladder} == {*STAGES[:4]}
    assert "is not worth it" in artifact.not_built["onnx int8-u8"]


def test_an_unknown_rung_is_refused_with_a_suggestion(capsys):
    words = ("--weights", "random", "--device", "cpu", "--last-rung", "adaroun")
    assert litezoo("export", "repvgg_tiny", *words) == 2
    assert "did you mean 'adaround'" in capsys.readouterr().err
