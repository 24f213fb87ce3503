import dataclasses
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litezoo.benchmarks import predict as module
from litezoo.benchmarks import validate
from litezoo.benchmarks.evidence import Evidence
from litezoo.benchmarks.fit import (
    Row,
    Target,
    default_prior,
    family_of,
    fit_target,
    fits_folder,
    leave_groups_out,
    pool,
    prior_of_fit,
    read_fits,
    residuals_of,
    solve,
    write_fits,
)
from litezoo.benchmarks.latency import PARAMETERS, Costs, Sample, read_chip
from litezoo.benchmarks.network import catalogue_network, list_networks
from litezoo.benchmarks.predict import (
    find_target,
    fit_rows,
    known_fits,
    list_targets,
    nearest_fit,
    network_work,
    predict_network,
    predict_networks,
    read_user_rows,
    target_of,
)
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.recipes.devices import get_device, list_devices

NAMES = [one.name for one in PARAMETERS]
TARGET = Target(device="t4", runtime="tensorrt", precision="fp16")
CHIP = read_chip(get_device("t4"), precision="fp16")
MODELS = (
    "mobilenetv1_100", "mobilenetv2_050", "mobilenetv2_100", "mobilenetv2_140", "repvgg_a0",
    "repvgg_a1", "repvgg_b0", "shufflenetv2_x0_5", "shufflenetv2_x1_0", "ghostnet_100",
    "mobilenetv3_large_100", "mobilenetv3_small_100", "vgg11", "resnet18", "resnet50",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Rows of a made-up device: the model with other parameters, and 3 % of noise."""
    known = [name for name in MODELS if name in list_networks()]
    assert len(known) > 10
    works = [network_work(catalogue_network(name), TARGET, on_gpu=True) for name in known]
    generator = np.random.default_rng(6)
    found = []
    for batch in (1, 8):
        costs = Costs(
            [Sample(work=work, batch=batch) for work in works], [CHIP] * len(works), mode="fused"
        )
        values = default_prior(CHIP, mode="fused").mean
        values[NAMES.index("dense")] = 0.25
        values[NAMES.index("depthwise_memory")] = 0.2
        values[NAMES.index("copy_us")] = 90.0
        times = costs.ms(values) * np.exp(generator.normal(0, 0.03, len(works)))
        found += [
            Row(model=name, work=work, batch=batch, ms=float(ms))
            for name, work, ms in zip(known, works, times, strict=True)
        ]
    return tuple(found)


@pytest.fixture(scope="module")
def fitted(rows):
    return fit_target(TARGET, rows, CHIP)


@pytest.fixture
def own_fits(tmp_path, monkeypatch, fitted):
    """A folder of fits that holds only the made-up device's."""
    write_fits([fitted.fit], tmp_path)
    monkeypatch.setattr(module, "_folders", lambda: [tmp_path])
    return tmp_path


def costs_of(rows):
    return Costs(
        [Sample(work=row.work, batch=row.batch) for row in rows], [CHIP] * len(rows), mode="fused"
    )


def times_of(rows):
    return np.array([row.ms for row in rows])


# ----------------------------------------------------------------------- fitting


def test_a_fit_finds_what_made_the_rows(rows, fitted):
    assert np.abs(np.log(fitted.inside / times_of(rows))).max() < 0.12
    assert fitted.fit.values["dense"] < 0.4  # 0.25; the default is 0.6
    assert fitted.fit.values["copy_us"] > 45  # 90; the default is 8
    assert fitted.fit.noise < 0.08


def test_a_few_wrong_rows_do_not_move_a_fit(rows, fitted):
    wrong = [dataclasses.replace(row, ms=row.ms * 5) if row.model == "vgg11" else row
             for row in rows]  # fmt: skip
    again = fit_target(TARGET, wrong, CHIP)
    right = np.array([row.model != "vgg11" for row in rows])
    assert np.abs(np.log(again.inside / times_of(rows)))[right].max() < 0.2


def test_without_rows_that_say_otherwise_a_parameter_stays_at_its_prior(rows):
    some = [row for row in rows if row.model.startswith("repvgg")]
    values = fit_target(TARGET, some, CHIP).fit.values
    assert values["depthwise"] == pytest.approx(0.3) and values["move_memory"] == pytest.approx(0.7)


def test_a_family_that_is_left_out_is_not_seen(rows, fitted):
    mine = np.array([row.family == "repvgg" for row in rows])
    slower = [dataclasses.replace(row, ms=row.ms * 1.3) if own else row
              for row, own in zip(rows, mine, strict=True)]  # fmt: skip
    again = fit_target(TARGET, slower, CHIP)
    assert again.unseen[mine] == pytest.approx(fitted.unseen[mine], rel=0.02)
    assert again.inside[mine].mean() > 1.05 * fitted.inside[mine].mean()


def test_one_known_member_corrects_its_family(rows):
    slower = [dataclasses.replace(row, ms=row.ms * 1.8) if row.family == "mobilenetv2" else row
              for row in rows]  # fmt: skip
    found = fit_target(TARGET, slower, CHIP)
    mine = np.array([row.family == "mobilenetv2" for row in rows]) & np.isfinite(found.anchored)
    errors = [np.abs(np.log(p[mine] / times_of(slower)[mine])).mean()
              for p in (found.unseen, found.anchored)]  # fmt: skip
    assert errors[1] < errors[0]
    only = [place for place, row in enumerate(rows) if row.family == "ghostnet"]
    assert np.all(np.isnan(found.anchored[only]))  # no other member is known


def test_a_prior_of_other_rows_holds_for_the_family_that_is_left_out(rows):
    costs, ms = costs_of(rows), times_of(rows)
    prior = default_prior(CHIP, mode="fused")
    found = solve(costs, ms, prior)
    groups = [row.family for row in rows]
    mean = prior.mean * np.where(prior.used, 3.0, 1.0)
    wrong = dataclasses.replace(prior, mean=mean, trust=prior.trust * 1e-3)
    unseen = leave_groups_out(costs, ms, prior, groups, found, priors={"vgg": wrong})
    plain = leave_groups_out(costs, ms, prior, groups, found)
    mine = np.array([group == "vgg" for group in groups])
    assert unseen[~mine] == pytest.approx(plain[~mine])
    assert unseen[mine] == pytest.approx(costs.ms(mean)[mine], rel=0.05)


def test_devices_fitted_together_have_each_their_factor(rows):
    half = [dataclasses.replace(row, ms=row.ms * 4) for row in rows[: len(rows) // 2]]
    other = dataclasses.replace(TARGET, device="l4")
    prior = pool({TARGET: rows, other: half}, {TARGET: CHIP, other: CHIP})
    assert prior.mean[NAMES.index("dense")] < 0.45  # what both say, whatever their factors
    alone = fit_target(other, half, CHIP, prior=prior)
    assert np.abs(np.log(alone.inside / times_of(half))).max() < 0.2


def test_another_fit_is_a_prior_but_for_the_overall_factor(rows, fitted):
    prior = prior_of_fit(fitted.fit, CHIP, mode="fused", trust=0.1)
    some = [dataclasses.replace(row, ms=row.ms * 2) for row in rows[:4]]
    found = solve(costs_of(some), times_of(some), prior)
    assert found.values[0] > 1.3 * fitted.fit.values["overall"]
    assert found.values[1] == pytest.approx(fitted.fit.values["dense"], rel=0.1)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(rows, wrong):
    prior = default_prior(CHIP, mode="fused")
    ms = times_of(rows)
    ms[3] = wrong
    with pytest.raises(UsageError, match="numbers of ms above 0, one for each row"):
        solve(costs_of(rows), ms, prior)


def test_two_rows_are_too_few(rows):
    with pytest.raises(UsageError, match="t4, tensorrt, fp16 has 2 rows to fit; three different"):
        fit_target(TARGET, rows[:2], CHIP)


def test_intervals_need_rows():
    with pytest.raises(UsageError, match="no rows to take an interval from"):
        residuals_of(np.array([]), np.array([]))


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("timm:tf_mobilenetv3_large_100", "mobilenetv3"), ("timm:ecaresnet50d", "resnet"),
        ("timm:seresnext50_32x4d", "resnext"), ("shufflenetv2_x1_0", "shufflenetv2"),
        ("torchvision:shufflenet_v2_x1_0", "shufflenetv2"), ("timm:cs3darknet_l", "cspnet"),
        ("timm:tf_efficientnet_lite0", "efficientnet_lite"), ("timm:semnasnet_100", "mnasnet"),
        ("timm:efficientnet_b0", "efficientnet"), ("timm:wide_resnet50_2", "resnet"),
        ("timm:repghostnet_100", "repghost"), ("timm:selecsls60", "selecsls"),
    ],
)  # fmt: skip
def test_a_name_tells_its_family(model, family):
    assert family_of(model) == family


# ----------------------------------------------------------------------- the files of fits


def test_a_fit_is_the_same_after_writing_and_reading(tmp_path, fitted):
    [file] = write_fits([fitted.fit], tmp_path)
    [again] = read_fits(file)
    assert again.values == pytest.approx(fitted.fit.values, rel=1e-3)
    assert dataclasses.replace(again, values=fitted.fit.values) == fitted.fit


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"dense": ', '"tense": ', "parameter tense is unknown"),
        ('"rows": ', '"lines": ', "lines"),
        ('"overall": ', '"overall": -', "a parameter is not above 0"),
        ("[\n", "", "Extra data|Expecting"),
    ],
)
def test_a_damaged_fit_is_named(tmp_path, fitted, old, new, reason):
    [file] = write_fits([fitted.fit], tmp_path)
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(CheckFailed, match=rf"t4.json holds no fits .*({reason}).*--write"):
        read_fits(file)


def test_the_fits_that_come_with_litezoo_are_readable_and_of_known_devices():
    fits = known_fits()
    assert len(fits) > 20
    assert {fit.device for fit in fits} <= set(list_devices())
    keys = [(target_of(fit), fit.version) for fit in fits]
    assert len(set(keys)) == len(keys)
    for fit in fits:
        assert fit.rows >= 4 and fit.sources and fit.unseen.low <= fit.unseen.high


def test_the_page_of_the_validation_has_the_fits_numbers():
    text = (Path(__file__).parent.parent / "docs" / "predictor.md").read_text(encoding="utf-8")
    shown = 0
    for fit in known_fits():
        if fit.rows >= 15:
            device, runtime = validate._words(target_of(fit), fit.version)
            line = re.search(
                rf"^\| {device} \| {re.escape(runtime)} \| {fit.rows} \|.*$", text, re.M
            )
            assert line, (device, runtime, fit.rows)
            shown += 1
    assert shown > 20
    heads = (validate._HEAD, validate._BOARDS_HEAD, validate._PROXIES_HEAD, validate._TRANSFER_HEAD)
    assert all(head in text for head in heads), "run: python -m litezoo.benchmarks.validate --write"


# ----------------------------------------------------------------------- predicting


def test_a_prediction_is_within_its_interval_and_says_what_it_stands_on(own_fits, fitted):
    found = predict_network(catalogue_network("mobilenetv1_100"), TARGET, batch=8)
    assert found.low_ms < found.ms < found.high_ms
    assert found.images_per_s == pytest.approx(8e3 / found.ms)
    assert found.basis in ("fitted", "anchored")
    assert f"{fitted.fit.rows} rows of t4 with tensorrt" in found.why


def test_a_family_with_rows_is_anchored_and_another_only_fitted(own_fits, fitted):
    families = {name: values for name, values in fitted.fit.families.items() if name != "ghostnet"}
    fit = dataclasses.replace(
        fitted.fit, families={**families, "mobilenetv2": (0.4, 3)}, models={},
        between_families=0.04, within_family=0.01,
    )  # fmt: skip
    write_fits([fit], own_fits)
    module._read.cache_clear()
    near = predict_network(catalogue_network("mobilenetv2_100"), TARGET)
    assert near.basis == "anchored" and "3 networks of the family mobilenetv2 correct" in near.why
    write_fits([dataclasses.replace(fit, families=families)], own_fits)
    module._read.cache_clear()
    plain = predict_network(catalogue_network("mobilenetv2_100"), TARGET)
    assert near.ms == pytest.approx(plain.ms * math.exp(0.4 * 3 / 3.25), rel=1e-3)
    assert predict_network(catalogue_network("ghostnet_100"), TARGET).basis == "fitted"


def test_what_is_unlike_the_rows_has_a_wider_interval(own_fits):
    network = catalogue_network("repvgg_a0")
    near, far = (predict_network(network, TARGET, batch=batch) for batch in (8, 512))
    widths = [math.log(one.high_ms / one.low_ms) for one in (near, far)]
    assert widths[1] > 1.5 * widths[0]
    assert "the rows are of batch 1 to 8" in far.why and "less sure" not in near.why


def test_many_networks_at_once_are_predicted_as_each_alone(own_fits):
    networks = [catalogue_network(name) for name in MODELS[:4]]
    together = predict_networks(networks, TARGET, batch=2)
    alone = [predict_network(network, TARGET, batch=2) for network in networks]
    assert [one.ms for one in together] == pytest.approx([one.ms for one in alone])
    assert predict_networks([], TARGET) == ()


def test_an_explanation_has_every_kernel(own_fits):
    found = predict_network(catalogue_network("repvgg_a0"), TARGET, with_kernels=True)
    assert len(found.kernels) == len(found.times) > 20
    assert sum(one.ms for one in found.times) < found.ms * 1.5


def test_a_device_without_rows_is_transferred_to_and_says_from_where(own_fits):
    target = Target(device="a10", runtime="tensorrt", precision="fp16")
    found = predict_network(catalogue_network("resnet50"), target, batch=8)
    assert (found.basis, found.source) == ("transferred", "t4")
    assert "from t4 with tensorrt fp16" in found.why
    here = predict_network(catalogue_network("resnet50"), TARGET, batch=8)
    assert found.ms < here.ms  # it is the faster chip


def test_without_related_rows_only_physics_is_left(monkeypatch):
    monkeypatch.setattr(module, "_folders", list)
    found = predict_network(catalogue_network("resnet50"), TARGET)
    assert found.basis == "physics" and "no rows of t4 nor of a related device" in found.why
    assert found.high_ms / found.low_ms > 5


def test_without_rows_and_physics_there_is_no_prediction(own_fits):
    target = Target(device="arm-phone", runtime="ncnn", precision="fp16")
    with pytest.raises(MissingError, match="nothing to predict arm-phone, ncnn, fp16 from: "):
        predict_network(catalogue_network("resnet50"), target)


def test_a_batch_below_one_is_refused(own_fits):
    with pytest.raises(UsageError, match="batch is 0; it is a whole number above 0"):
        predict_network(catalogue_network("resnet50"), TARGET, batch=0)


# ----------------------------------------------------------------------- which target


def test_what_is_left_open_is_what_is_known_best(own_fits):
    assert find_target("t4") == TARGET
    assert find_target("t4", precision="fp16", runtime="tensorrt") == TARGET
    assert find_target("t4", precision="int8+fp16").runtime == "tensorrt"
    other = find_target("t4", runtime="onnxruntime_tensorrt")
    assert (other.runtime, other.precision) == ("onnxruntime-tensorrt", "fp16")


def test_without_rows_an_npu_is_asked_for_int8_and_others_for_floats(own_fits):
    assert find_target("rk3588-npu").precision.startswith("int8")
    assert find_target("a10").precision == "fp16"


def test_what_a_gpu_is_made_for_comes_before_a_portable_runtime(own_fits, fitted):
    fit = dataclasses.replace(fitted.fit, device="jetson-orin-nano", runtime="ncnn-vulkan")
    write_fits([fit], own_fits)
    assert find_target("jetson-orin-nano").runtime == "tensorrt"
    assert find_target("jetson-orin-nano", runtime="ncnn-vulkan").runtime == "ncnn-vulkan"


def test_unknown_names_get_the_nearest():
    with pytest.raises(UsageError, match="unknown device 't44'; did you mean 't4'"):
        find_target("t44")
    with pytest.raises(UsageError, match="unknown device 't44'; did you mean 't4'"):
        list_targets("t44")
    with pytest.raises(UsageError, match="precision 'half' names no dtype"):
        find_target("t4", precision="half")


def test_a_target_says_how_its_runtime_runs_networks():
    modes = {
        "pytorch-eager": "eager", "timm-eager": "eager", "pytorch-compile": "compiled",
        "pytorch": "compiled", "tensorrt": "fused", "onnxruntime_cuda": "fused",
    }  # fmt: skip
    for runtime, mode in modes.items():
        assert dataclasses.replace(TARGET, runtime=runtime).mode == mode
    amp = dataclasses.replace(TARGET, runtime="pytorch-eager", precision="amp-fp16")
    assert amp.autocast and not dataclasses.replace(amp, precision="fp16").autocast
    assert str(dataclasses.replace(amp, layout="nchw", threads=2)) == (
        "t4, pytorch-eager, amp-fp16, nchw, 2 threads"
    )


def test_the_fit_of_the_nearest_relative_serves(fitted):
    def fit(**values):
        return dataclasses.replace(fitted.fit, **values)

    fits = [
        fit(device="l4", runtime="pytorch-eager", mode="eager"),
        fit(device="l4", runtime="hailort"),
        fit(device="l4", runtime="paddle-trt", precision="fp32"),
        fit(device="a100", runtime="tensorrt", rows=5),
        fit(device="a100", runtime="paddle-trt"),
    ]
    target = Target(device="a10", runtime="tensorrt", precision="fp16")
    kinship, found = nearest_fit(target, get_device("a10"), fits)
    assert (found.device, found.runtime) == ("a100", "paddle-trt")  # its dtype, enough rows
    assert kinship in ("same kind of device", "same generation")
    same = [*fits, fit(device="a10", runtime="paddle-trt", precision="fp16")]
    assert nearest_fit(target, get_device("a10"), same)[0] == "same device"
    npu = Target(device="rk3588-npu", runtime="rknn", precision="int8")
    assert nearest_fit(npu, get_device("rk3588-npu"), fits) is None


# ----------------------------------------------------------------------- a user's rows


def table(folder, text):
    file = folder / "mine.csv"
    file.write_text(text)
    return file


def test_a_user_s_table_refits_a_device(own_fits, tmp_path, rows, fitted):
    lines = [f"{row.model},{2 * row.ms},{row.batch}" for row in rows if row.batch == 1]
    file = table(tmp_path, "\n".join(["model,ms,batch", *lines, "no_such_net,3.0,1"]))
    evidence = read_user_rows(file, target=TARGET)

    def network_of(row):
        if row.model == "no_such_net":
            raise UsageError("unknown model 'no_such_net'")
        return catalogue_network(row.model)

    found = fit_rows(evidence, target=TARGET, network_of=network_of)
    assert (
        found.fit.left_out == 1 and "left out: no_such_net (no_such_net: unknown" in found.fit.note
    )
    assert found.fit.rows == len(lines)
    measured = np.array([2 * row.ms for row in rows if row.batch == 1])
    assert np.median(np.abs(np.log(found.inside / measured))) < 0.1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,ms\nresnet50,1\n", "has the columns ms, name; needed are model and ms"),
        ("model,ms,speed\nresnet50,1,2\n", "allowed are batch, resolution and graph_form"),
        ("model,ms\nresnet50,fast\n", r"mine.csv:2 is no row: could not convert"),
        ("model,ms\nresnet50,-1\n", r"mine.csv:2 is no row: ms and batch are above 0"),
        ("model,ms,batch\nresnet50,1,0\n", r"mine.csv:2 is no row: ms and batch are above 0"),
        ("model,ms,graph_form\nresnet50,1,fused\n", "graph_form is 'fused', allowed are train"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path, text, reason):
    with pytest.raises(UsageError, match=reason):
        read_user_rows(table(tmp_path, text), target=TARGET)


def test_the_rows_of_litezoo_bench_refit_this_cpu():
    file = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu.jsonl"
    target = Target(device="cpu", runtime="openvino", precision="fp32", threads=2)
    rows = read_user_rows(file, target=target)
    assert len(rows) > 10 and {row.threads for row in rows} == {2}
    other = dataclasses.replace(target, runtime="tensorrt")
    with pytest.raises(
        UsageError, match=r"cpu.jsonl has no rows of cpu, tensorrt, fp32, 2 threads"
    ):
        read_user_rows(file, target=other)


def test_a_batch_norm_that_inductor_repeats_is_no_kernel():
    target = Target(device="rtx4090", runtime="pytorch-compile", precision="amp-fp16")
    network = catalogue_network("ghostnet_100", "train")
    gpu, cpu = (module.kernels_of(network, target, on_gpu=on_gpu) for on_gpu in (True, False))
    assert ("native_batch_norm",) in [kernel.ops for kernel in gpu]
    before = {
        kernels: {one.ops for one, other in pairwise(kernels) if other.ops == ("mean",)}
        for kernels in (gpu, cpu)
    }
    assert ("native_batch_norm",) in before[cpu] and ("native_batch_norm",) not in before[gpu]


def test_tensorrt_computes_gated_activations_apart():
    network = catalogue_network("mobilenetv3_large_100")
    engine = module.kernels_of(network, TARGET, on_gpu=True)
    other = module.kernels_of(
        network, dataclasses.replace(TARGET, runtime="openvino"), on_gpu=False
    )
    assert len(engine) > len(other)
    assert sum(one.macs for one in engine) == sum(one.macs for one in other)
    assert sum(one.weight_elements for one in engine) == sum(one.weight_elements for one in other)
    assert not any(one.conv is not None and "hardswish" in one.ops for one in engine)


def test_autocast_keeps_norms_in_half_precision():
    amp = Target(device="rtx4090", runtime="pytorch-eager", precision="amp-fp16")
    network = catalogue_network("resnet18", "train")
    norms = tuple(dataclasses.replace(op, sensitive=op.kind == "norm") for op in network.ops)
    kernels = module.kernels_of(dataclasses.replace(network, ops=norms), amp, on_gpu=True)
    normed = [kernel for kernel in kernels if "native_batch_norm" in kernel.ops]
    assert normed and not any(one.full_write_elements or one.sensitive for one in normed)


def test_a_missing_file_says_what_is_taken(tmp_path):
    with pytest.raises(UsageError, match=r"no file .*gone.csv; give a .csv with model,ms"):
        read_user_rows(tmp_path / "gone.csv", target=TARGET)


def test_a_folder_of_fits_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LITEZOO_FITS", str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"LITEZOO_FITS names .*gone, which is no folder"):
        known_fits()


def test_one_s_own_fits_come_first(monkeypatch, tmp_path, fitted):
    write_fits([dataclasses.replace(fitted.fit, version="")], tmp_path)
    assert module._best_fit(TARGET).version == "7.2"
    monkeypatch.setenv("LITEZOO_FITS", str(tmp_path))
    assert known_fits("t4")[0].version == "" and len(known_fits("t4")) > 1
    assert module._best_fit(TARGET).version == ""


# ----------------------------------------------------------------------- validation


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=40))
def test_spearman_is_scipy_s(pairs):
    from scipy import stats

    one, other = (np.array([pair[side] for pair in pairs], dtype=float) for side in (0, 1))
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert validate.spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0])


def test_a_score_counts_what_is_within():
    found = validate.score(np.array([1.0, 1.12, 1.18, 2.0]), np.ones(4))
    assert (found.w10, found.w15, found.w20) == (25, 50, 75)
    assert (
        found.median == pytest.approx(15) and validate.score(np.array([]), np.array([])).rows == 0
    )


def test_a_level_that_is_missed_says_by_how_much():
    good = validate.Score(rows=9, rho=0.995, w10=90, w15=95, w20=99, median=4, p90=10)
    bad = dataclasses.replace(good, rho=0.95, w15=60)
    eager = Target(device="rtx4090", runtime="pytorch-eager", precision="amp-fp16")
    assert validate._judged(eager, good, good, good) == "reached"
    assert validate._judged(eager, bad, bad, good) == (
        "missed: rho 0.950 of 0.99, w15 60 of 90, light w15 60 of 88"
    )
    assert validate._judged(dataclasses.replace(eager, device="l4"), bad, bad, bad) == ""


def evidence_of(**values):
    return Evidence(
        **{
            "model": "resnet18", "device": "t4", "runtime": "tensorrt", "runtime_version": "",
            "precision": "fp16", "layout": "", "graph_form": "deploy", "batch": 1,
            "resolution": 224, "threads": 0, "ms": 1.0, "images_per_s": 1000.0,
            "kind": "published", "source": "a", **values,
        }
    )  # fmt: skip


def test_sources_that_disagree_are_fitted_apart():
    one = [evidence_of(batch=batch) for batch in (1, 2, 4)]
    near = [evidence_of(batch=batch, ms=1.1, source="b") for batch in (1, 2, 4)]
    far = [evidence_of(batch=batch, ms=2.0, source="b") for batch in (1, 2, 4)]
    assert set(validate._by_source([*one, *near])) == {""}
    assert set(validate._by_source([*one, *far])) == {"a", "b"}


def test_boards_of_ncnn_are_held_to_their_level():
    good = validate.Score(rows=9, rho=0.96, w10=50, w15=60, w20=80, median=9, p90=30)
    assert validate._judged_boards("ncnn", "fp32", good, good) == "reached"
    poor = dataclasses.replace(good, rho=0.94, w20=60)
    assert validate._judged_boards("ncnn", "fp16", poor, poor) == (
        "missed: rho 0.940 of 0.95, w20 with 5 anchors 60 of 75"
    )
    assert validate._judged_boards("qnn", "fp16", poor, poor) == ""


def test_anchors_go_from_the_fastest_to_the_slowest(rows):
    single = [row for row in rows if row.batch == 1]
    chosen = validate._spread_models(single, times_of(single))
    order = sorted(single, key=lambda row: row.ms)
    assert len(chosen) == 5
    assert chosen & {row.model for row in order[:4]} and chosen & {row.model for row in order[-4:]}


def test_a_network_is_traced_once_and_a_reason_is_kept(tmp_path, monkeypatch):
    from litezoo.benchmarks import tracing

    asked = []

    def find(model, *, graph_form, resolution):
        asked.append(model)
        if model == "timm:gone":
            raise UsageError("unknown timm model 'gone'")
        return catalogue_network("resnet18", graph_form)

    monkeypatch.setattr(tracing, "find_network", find)
    for _ in range(2):
        networks = validate.Networks(tmp_path)
        assert networks.find(evidence_of()) == catalogue_network("resnet18")
        assert networks.find(evidence_of(model="timm:gone")) == "unknown timm model 'gone'"
    assert asked == ["resnet18", "timm:gone"]


def test_what_transfers_taught_is_kept_by_kinship():
    found = json.loads((fits_folder() / "_transfers.json").read_text(encoding="utf-8"))
    assert set(found) <= {
        "same device", "same generation", "same kind of device", "other runtime",
    }  # fmt: skip
    assert all(one["low"] < 0 < one["high"] and 0 < one["rho"] <= 1 for one in found.values())


def test_predicting_a_model_of_the_catalogue_imports_no_torch():
    program = (
        "import sys; from litezoo.benchmarks.predict import find_target, predict_networks; "
        "from litezoo.benchmarks.network import catalogue_network; "
        "predict_networks([catalogue_network('repvgg_a0')], find_target('t4')); "
        "heavy = {'torch', 'timm', 'onnx', 'scipy', 'openvino', 'onnxruntime'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
