"""pick: the right network for a device and a budget, with how its latency is known."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import shallow
from hypothesis import given
from hypothesis import strategies as st
from test_train import litezoo

import litezoo as package
from litezoo.benchmarks import backbones, operators, recommend
from litezoo.benchmarks.backbones import (
    BASES,
    Asked,
    Backbone,
    Conditions,
    choose_conditions,
    list_backbones,
    peak_elements,
    peak_memory_mib,
)
from litezoo.benchmarks.evidence import Evidence, read_measured, read_published
from litezoo.benchmarks.fit import Target
from litezoo.benchmarks.network import Network, Op, catalogue_network, list_networks
from litezoo.benchmarks.operators import find_operators, read_operators
from litezoo.benchmarks.pick import Budget, front_of, judged, pick
from litezoo.benchmarks.pick import recommend as recommend_row
from litezoo.benchmarks.predict import Prediction, predict
from litezoo.benchmarks.report_picker import picker_data
from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.recipes.devices import PATTERNS, get_device

ROOT = Path(__file__).parents[1]

ROW = Backbone(
    model="repvgg_a0", family="repvgg", resolution=224, weights="in1k", licence="MIT",
    top1_percent=72.0, top1_source="a paper", paper_top1_percent=72.4, params_m=8.3,
    memory_mib=20.0, ms=1.0, low_ms=None, high_ms=None, images_per_s=1000.0, statistic="p50",
    basis="measured", evidence="a machine, 2026-01-02",
)  # fmt: skip
EVIDENCE = Evidence(
    model="resnet18", device="t4", runtime="tensorrt", runtime_version="10.1", precision="fp16",
    layout="", graph_form="deploy", batch=1, resolution=224, threads=0, ms=1.0, images_per_s=1000.0,
    kind="published", source="somebody",
)  # fmt: skip


def row(**values):
    made = dataclasses.replace(ROW, **values)
    return dataclasses.replace(made, images_per_s=values.get("images_per_s", 1e3 / made.ms))


def evidence(**values):
    made = dataclasses.replace(EVIDENCE, **values)
    speed = 1e3 * made.batch / made.ms
    return dataclasses.replace(made, images_per_s=values.get("images_per_s", speed))


# ------------------------------------------------------------------------------- the algebra

some_rows = st.lists(
    st.builds(
        lambda ms, top1, basis, high: row(
            ms=ms, top1_percent=top1, basis=basis,
            high_ms=None if basis in ("measured", "published") else ms * high,
            low_ms=None if basis in ("measured", "published") else ms / high,
        ),
        ms=st.integers(1, 30).map(lambda n: n / 4),
        top1=st.integers(40, 90).map(float),
        basis=st.sampled_from(BASES),
        high=st.sampled_from((1.0, 1.25, 2.0)),
    ),
    max_size=30,
)  # fmt: skip


def better(a, b):
    """Whether `a` is as fast and as accurate as `b`, and one of both more."""
    return (
        a.ms <= b.ms
        and a.top1_percent >= b.top1_percent
        and (a.ms, a.top1_percent) != (b.ms, b.top1_percent)
    )


@given(some_rows)
def test_the_front_is_what_nothing_is_better_than(rows):
    front = front_of(rows)
    assert all(not any(better(a, b) for a in rows) for b in front)
    places = {(one.ms, one.top1_percent) for one in front}
    assert len(places) == len(front)
    assert all(
        (b.ms, b.top1_percent) in places for b in rows if not any(better(a, b) for a in rows)
    )
    assert [one.ms for one in front] == sorted(one.ms for one in front)


def test_of_equal_rows_the_most_trusted_is_on_the_front():
    rows = [row(basis=basis, model=basis) for basis in reversed(BASES)]
    assert [one.basis for one in front_of(rows)] == ["measured"]


def test_a_network_without_a_top1_has_no_place_on_the_front():
    assert front_of([row(top1_percent=None, ms=0.1), row()]) == [row()]


@given(some_rows, st.integers(1, 30).map(lambda n: n / 4))
def test_what_is_recommended_surely_meets_the_budget_where_anything_does(rows, latency):
    budget = Budget(latency_ms=latency)
    within = [judged(one, budget) for one in rows if one.ms <= latency]
    chosen = recommend_row(within, budget)
    sure = [one for one in within if (one.high_ms or one.ms) <= latency]
    assert all(one.may_miss == (one not in sure) for one in within)
    if not within:
        assert chosen is None
    elif sure:
        assert not chosen.may_miss
        assert chosen.top1_percent == max(one.top1_percent for one in sure)
    else:
        assert chosen.may_miss and chosen in front_of(within)


@given(some_rows, st.integers(100, 4000))
def test_a_throughput_is_the_same_budget_the_other_way_round(rows, throughput):
    by_rate, by_time = Budget(throughput=throughput), Budget(latency_ms=1e3 / throughput)
    for one in rows:
        if one.ms != by_time.latency_ms and (one.high_ms or 0) != by_time.latency_ms:
            assert by_rate.allows(one.ms, one.images_per_s) == by_time.allows(one.ms, 0)
            assert judged(one, by_rate).may_miss == judged(one, by_time).may_miss


def test_without_a_budget_nothing_is_recommended_and_with_a_least_top1_the_fastest():
    rows = [row(ms=1.0), row(ms=2.0, top1_percent=80.0)]
    assert recommend_row(rows, Budget()) is None
    assert recommend_row(rows, Budget(), min_top1=70.0).ms == 1.0


# -------------------------------------------------------------------------------- the memory


def op(kind, elements, *inputs, name="x"):
    return Op(
        kind=kind, name=name, inputs=inputs, reads=(1,) * len(inputs), out_shape=(elements, 1, 1),
        out_elements=elements,
    )  # fmt: skip


def network(*ops, outputs=None, image=(3, 10, 10), params=0):
    places = (len(ops) - 1,) if outputs is None else outputs
    return Network(name="n", resolution=image, ops=ops, outputs=places, params=params)


def test_an_operator_needs_what_it_reads_and_what_it_writes():
    assert peak_elements(network(op("conv", 500, -1))) == 300 + 500
    assert peak_elements(network(op("conv", 500, -1), op("conv", 900, 0))) == 500 + 900


def test_what_is_read_later_is_kept():
    chain = (op("conv", 500, -1), op("conv", 200, 0), op("conv", 400, 1))
    assert peak_elements(network(*chain)) == 800
    assert peak_elements(network(*chain, op("add", 400, 2, 0))) == 500 + 200 + 400


def test_what_nobody_reads_is_not_kept_but_results_are():
    ops = (op("conv", 500, -1), op("conv", 100, -1), op("conv", 700, 1))
    assert peak_elements(network(*ops)) == 300 + 500
    assert peak_elements(network(*ops, outputs=(0, 2))) == 500 + 100 + 700


def test_point_wise_operators_write_where_they_read():
    assert peak_elements(network(op("conv", 500, -1), op("activation", 500, 0))) == 800
    branch = (op("conv", 500, -1), op("activation", 500, 0), op("conv", 100, 0))
    assert peak_elements(network(*branch, outputs=(1, 2))) == 500 + 500 + 100  # both are read


def test_a_view_takes_no_memory_and_keeps_what_it_shows():
    ops = (op("conv", 500, -1), op("view", 250, 0), op("conv", 50, 1), op("conv", 60, 1))
    assert peak_elements(network(*ops)) == 800
    assert peak_elements(network(*ops, outputs=(2, 3))) == 800
    big = (*ops[:3], op("conv", 400, 1))
    assert peak_elements(network(*big, outputs=(2, 3))) == 500 + 50 + 400


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_peak_lies_between_the_largest_step_and_all_tensors(steps):
    ops = [op("conv", n, max(-1, place - 1 - back)) for place, (n, back) in enumerate(steps)]
    sizes = {-1: 300, **{place: one.out_elements for place, one in enumerate(ops)}}
    peak = peak_elements(network(*ops))
    assert peak >= max(sizes[one.inputs[0]] + one.out_elements for one in ops)
    assert peak <= sum(sizes.values())


@pytest.mark.parametrize(
    ("precision", "activation", "weight"),
    [("fp32", 4, 4), ("fp16", 2, 2), ("int8", 1, 1), ("int8+fp16", 1, 1), ("amp-fp16", 2, 4)],
)
def test_memory_is_counted_by_the_precision_and_the_batch(precision, activation, weight):
    expected = (3 * 800 * activation + 10_000 * weight) / 2**20
    found = peak_memory_mib(800, 10_000, batch=3, precision=precision)
    assert found == pytest.approx(expected)


def test_the_peak_of_mobilenetv2_is_at_its_first_expansion():
    assert peak_elements(catalogue_network("mobilenetv2_100")) == 96 * (112**2 + 56**2)


# ------------------------------------------------------------------------------- the evidence


@pytest.fixture
def known(monkeypatch):
    """What is known, in place of what is: rows are put into the list that this returns."""
    rows = []

    def predict_networks(networks, target, *, batch, graph_form):
        return tuple(
            Prediction(
                model=one.name, target=target, batch=batch, resolution=one.resolution,
                graph_form=graph_form, ms=4.0, low_ms=3.0, high_ms=5.0, basis="fitted", why="",
            )
            for one in networks
        )  # fmt: skip

    monkeypatch.setattr(backbones, "read_published", lambda device: tuple(rows))
    monkeypatch.setattr(backbones, "read_measured", lambda folder: ())
    monkeypatch.setattr(backbones, "list_targets", lambda device: ())
    monkeypatch.setattr(backbones, "predict_networks", predict_networks)
    return rows


def of(rows, model, side=224):
    [found] = [one for one in rows if (one.model, one.resolution) == (model, side)]
    return found


CONDITIONS = Conditions(
    runtime="tensorrt", precision="fp16", layout="", threads=0, graph_form="deploy", batch=1
)


def backbones_of(rows, **values):
    found = list_backbones(
        get_device("t4"), CONDITIONS, rows, models=["resnet18", "repvgg_a0"], **values
    )
    return of(found, "resnet18")


def test_measured_counts_before_published_and_published_before_predicted(known):
    published = evidence(ms=2.0)
    measured = evidence(ms=3.0, kind="measured", where="T4", date="2026-01-02", p90_ms=3.5)
    assert backbones_of([]).label == "predicted (3 to 5 ms)"
    assert backbones_of([published]).label == "published (somebody, 10.1)"
    for rows in ([published, measured], [measured, published]):
        assert backbones_of(rows).label == "measured (T4, 2026-01-02)"


def test_of_published_rows_the_newest_version_counts(known):
    rows = [evidence(ms=2.0, runtime_version=version) for version in ("9.2", "10.1", "8.6")]
    assert backbones_of(rows).evidence == "somebody, 10.1"


@pytest.mark.parametrize(
    "values",
    [
        {"device": "v100"}, {"runtime": "paddle-trt"}, {"precision": "fp32"}, {"layout": "nhwc"},
        {"threads": 4}, {"graph_form": "train"}, {"batch": 8}, {"resolution": 256},
        {"model": "resnet50"},
    ],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_a_row_of_other_conditions_is_not_joined(values, known):
    assert backbones_of([evidence(**values)]).basis == "predicted"
    assert backbones_of([evidence()]).basis == "published"


def test_a_row_of_a_network_that_is_the_same_graph_counts_and_is_named(known):
    t4, models = get_device("t4"), ["vgg16", "vgg16_bn"]
    rows = [evidence(model="vgg16", ms=2.0)]
    found = of(list_backbones(t4, CONDITIONS, rows, models=models), "vgg16_bn")
    assert found.label == "published (somebody, 10.1, of vgg16: the same graph)"
    own = [*rows, evidence(model="vgg16_bn", ms=2.5)]
    assert of(list_backbones(t4, CONDITIONS, own, models=models), "vgg16_bn").ms == 2.5
    train = dataclasses.replace(CONDITIONS, graph_form="train")  # with BatchNorm and without
    rows = [evidence(model="vgg16", graph_form="train")]
    assert of(list_backbones(t4, train, rows, models=models), "vgg16_bn").basis == "predicted"


def test_a_transferred_row_names_its_device_and_rho(known, monkeypatch):
    made = Prediction(
        model="resnet18", target=Target(device="t4", runtime="tensorrt", precision="fp16"), batch=1,
        resolution=(3, 224, 224), graph_form="deploy", ms=4.0, low_ms=3.0, high_ms=5.0,
        basis="transferred", why="", source="v100", rho=0.974,
    )  # fmt: skip
    monkeypatch.setattr(
        backbones, "predict_networks", lambda networks, *_, **__: [made] * len(networks)
    )
    assert backbones_of([]).label == "transferred (from v100, rho 0.97, 3 to 5 ms)"
    physics = dataclasses.replace(made, basis="physics", source="", rho=None)
    monkeypatch.setattr(
        backbones, "predict_networks", lambda networks, *_, **__: [physics] * len(networks)
    )
    assert backbones_of([]).label == "predicted (physics, 3 to 5 ms)"


def test_a_percentile_is_the_measured_one_where_it_is_known(known):
    measured = evidence(kind="measured", p90_ms=1.5, p99_ms=1.9, where="T4", date="2026-01-02")
    rows = [backbones_of([measured], percentile=p) for p in (50, 90, 99)]
    assert [(one.ms, one.statistic) for one in rows] == [(1.0, "p50"), (1.5, "p90"), (1.9, "p99")]
    published = backbones_of([evidence()], percentile=99)
    assert (published.ms, published.statistic) == (1.0, "as published")
    assert judged(published, Budget(latency_ms=2), 99).may_miss
    assert not judged(published, Budget(latency_ms=2), 50).may_miss
    assert judged(backbones_of([], percentile=99), Budget(latency_ms=99), 99).may_miss
    assert not judged(rows[2], Budget(latency_ms=2), 99).may_miss


# ------------------------------------------------------------------------- which conditions

OPEN = Asked(
    runtime=None, precision=None, threads=None, graph_form="deploy", batch=None, resolution=None
)


def chosen(rows, *, device="t4", for_latency=True, **asked):
    return choose_conditions(
        get_device(device), rows, dataclasses.replace(OPEN, **asked), for_latency=for_latency
    )


def of_models(*models, **values):
    return [evidence(model=model, **values) for model in models]


MODELS = ("resnet18", "resnet50", "repvgg_a0", "mobilenetv2_100", "ghostnet_100")


def test_a_latency_is_of_one_image_and_a_throughput_of_the_best_known_batch(known):
    rows = of_models(*MODELS, batch=8) + of_models(*MODELS[:3])
    assert chosen(rows).batch == 1
    assert chosen(rows, for_latency=False).batch == 8
    assert chosen(rows, for_latency=False, batch=4).batch == 4
    assert chosen([], for_latency=False).batch == 1


def test_the_fastest_of_the_well_known_runtimes_is_taken(known):
    slow = of_models(*MODELS, runtime="paddle-trt", ms=2.0)
    fast = of_models(*MODELS[:3])
    assert chosen(slow + fast).runtime == "tensorrt"
    assert chosen(slow + fast[:2]).runtime == "paddle-trt"  # known for too few
    assert chosen(slow + of_models(*MODELS[:3], ms=3.0)).runtime == "paddle-trt"
    assert chosen(slow + fast, runtime="paddle-trt").runtime == "paddle-trt"


def test_a_precision_that_keeps_the_accuracy_goes_before_a_faster_one(known):
    rows = of_models(*MODELS, precision="int8", ms=0.5) + of_models(*MODELS[:2], precision="fp16")
    assert chosen(rows).precision == "fp16"
    assert chosen(rows, precision="int8").precision == "int8"
    assert chosen(rows[:5]).precision == "int8"  # nothing else is known
    rows = [dataclasses.replace(one, device="rk3588-npu", runtime="rknn") for one in rows]
    assert chosen(rows, device="rk3588-npu").precision == "fp16"
    assert chosen(rows[:5], device="rk3588-npu").precision == "int8"


def test_of_precisions_that_keep_the_accuracy_one_that_is_known_for_few_does_not_count(known):
    rows = of_models(*MODELS, precision="fp32", ms=2.0)
    assert chosen(rows + of_models(*MODELS[:2], precision="fp16")).precision == "fp32"
    assert chosen(rows + of_models(*MODELS[:3], precision="fp16")).precision == "fp16"


def test_a_runtime_for_any_device_is_taken_where_nothing_else_is_known(known, monkeypatch):
    rows = of_models(*MODELS, runtime="ncnn-vulkan", ms=0.1)
    assert chosen(rows).runtime == "ncnn-vulkan"
    assert chosen(rows + of_models(*MODELS[:3])).runtime == "tensorrt"
    assert chosen(rows, runtime="ncnn-vulkan").runtime == "ncnn-vulkan"
    targets = [Target(device="t4", runtime="paddle-trt", precision="fp16")]
    monkeypatch.setattr(backbones, "list_targets", lambda device: targets)
    assert chosen(rows).runtime == "paddle-trt"


def test_where_only_another_batch_is_known_its_runtime_is_taken(known):
    assert chosen(of_models(*MODELS, runtime="paddle-trt", batch=8)).runtime == "paddle-trt"


def test_the_train_form_is_not_mixed_in(known):
    rows = of_models(*MODELS, runtime="pytorch-eager", graph_form="train")
    assert chosen(rows).runtime == "tensorrt"  # the device's own
    assert chosen(rows, graph_form="train").runtime == "pytorch-eager"


def test_a_runtime_that_litezoo_builds_goes_first_where_the_model_is_fitted_to_it(
    known, monkeypatch
):
    rows = of_models(*MODELS, runtime="paddle-trt", ms=0.1) + of_models("resnet18", ms=1.0)
    assert chosen(rows).runtime == "paddle-trt"
    targets = [
        Target(device="t4", runtime=runtime, precision="fp16")
        for runtime in ("paddle-trt", "tensorrt")
    ]
    monkeypatch.setattr(backbones, "list_targets", lambda device: targets)
    assert chosen(rows).runtime == "tensorrt"
    assert chosen(rows[:5]).runtime == "tensorrt"  # without a row of its own too
    assert chosen(rows, runtime="paddle-trt").runtime == "paddle-trt"
    monkeypatch.setattr(backbones, "list_targets", lambda device: targets[:1])
    assert chosen(rows).runtime == "paddle-trt"


def test_without_rows_what_is_fitted_counts_then_the_devices_first_runtime(known, monkeypatch):
    assert str(chosen([])) == "tensorrt fp16, deploy form, batch 1"
    targets = [Target(device="t4", runtime="paddle-trt", precision=p) for p in ("int8", "fp32")]
    monkeypatch.setattr(backbones, "list_targets", lambda device: targets)
    assert str(chosen([])) == "paddle-trt fp32, deploy form, batch 1"
    assert chosen([], precision="int8").precision == "int8"


def test_threads_that_are_asked_for_are_those_of_the_answer(known):
    rows = of_models(*MODELS, threads=4) + of_models(*MODELS, threads=1, ms=3.0)
    assert chosen(rows).threads == 4 and chosen(rows, threads=1).threads == 1
    assert chosen([], threads=2).threads == 2


def test_conditions_are_said_in_words():
    words = dataclasses.replace(CONDITIONS, layout="nhwc", threads=4, batch=8)
    assert str(words) == "tensorrt fp16, nhwc, deploy form, 4 threads, batch 8"


# ------------------------------------------------------------------------------- the answer


@pytest.fixture
def t4(known):
    """A T4 of which three networks are published; all others are predicted at 4 ms."""
    known.extend(
        (
            evidence(model="resnet18", ms=1.0),
            evidence(model="repvgg_a0", ms=0.5),
            evidence(model="resnet50", ms=3.0),
            evidence(model="mobilenetv2_100", ms=2.0, resolution=224),
        )
    )
    return known


def test_the_most_accurate_network_within_the_budget_is_recommended(t4):
    found = pick(device="t4", latency_ms=2)
    assert [one.model for one in found.front] == ["resnet18", "repvgg_a0"]  # of 73.3 and 72.4 %
    assert found.recommended.basis == "published"
    assert found.recommended == found.front[0] == found.best_seen
    assert all(one.ms <= 2 for one in found.front)
    assert "of those that surely take at most 2 ms the most accurate" in found.reason
    assert "published (somebody, 10.1)" in found.reason


def test_a_row_whose_interval_straddles_the_budget_may_miss_and_is_not_recommended(t4):
    found = pick(device="t4", latency_ms=4.5, top=200)
    predicted = [one for one in found.front if one.basis == "predicted"]
    assert predicted and all(one.may_miss for one in predicted)
    assert found.recommended.basis == "published" and not found.recommended.may_miss
    assert "may miss the budget: measure before you rely" in " ".join(found.notes)
    surely = pick(device="t4", latency_ms=6)
    assert surely.recommended.basis == "predicted" and not surely.recommended.may_miss
    assert "Of what was measured or published the best is resnet50" in surely.reason
    assert f"litezoo export {surely.recommended.model} --device t4" in surely.reason


def test_a_recommended_row_behind_one_that_may_miss_is_shown_beside_the_front(t4):
    t4[2] = evidence(model="resnet50", ms=4.2)  # what is predicted at 4 ms is more accurate
    found = pick(device="t4", latency_ms=4.5)
    assert found.recommended not in found.front and found.recommended in found.rows
    assert set(found.rows) == {*found.front, found.recommended}
    accuracies = [one.top1_percent for one in found.rows]
    assert accuracies == sorted(accuracies, reverse=True)
    surely = pick(device="t4", latency_ms=2)
    assert surely.rows == surely.front


def test_where_none_surely_meets_the_budget_the_likeliest_is_named_and_said_so(known):
    found = pick(device="t4", latency_ms=4.5)
    assert found.recommended.may_miss
    assert "no row meets at most 4.5 ms for sure" in found.reason
    assert "measure it first" in found.reason
    assert "nothing was measured or published on t4 under these conditions" in found.notes[0]


def test_an_interval_that_reaches_into_the_budget_is_told(t4):
    notes = " ".join(pick(device="t4", latency_ms=3.5).notes)
    assert "more accurate, and over the budget by less than the interval: " in notes


def test_without_a_budget_the_front_is_shown_with_a_note(t4):
    found = pick(device="t4")
    assert found.recommended is None and len(found.front) > 1
    assert "no budget was given" in found.reason and "--latency-ms" in found.reason
    assert not any(one.may_miss for one in found.front)
    least = pick(device="t4", min_top1=75)
    assert least.recommended == least.front[-1]
    assert "the fastest with at least 75 % top-1" in least.reason


def test_an_impossible_budget_names_the_fastest_there_is(t4):
    with pytest.raises(
        CheckFailed,
        match=r"no network takes at most 0\.1 ms on t4 \(tensorrt fp16, deploy form, batch 1\); "
        r"the fastest there is under these constraints is repvgg_a0: 0\.5 ms, published",
    ):
        pick(device="t4", latency_ms=0.1)
    with pytest.raises(CheckFailed, match=r"no network reaches at least 9000 .* 2000 images/s"):
        pick(device="t4", throughput=9000)


def test_an_impossible_accuracy_names_the_most_accurate(t4):
    with pytest.raises(CheckFailed, match=r"no network reaches 99 % .* most accurate is \w+ \(8"):
        pick(device="t4", min_top1=99)


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"min_top1": 76}, lambda one: one.top1_percent >= 76),
        ({"max_params_m": 4}, lambda one: one.params_m <= 4),
        ({"max_memory_mib": 12}, lambda one: one.memory_mib <= 12),
        ({"resolution": 256}, lambda one: one.resolution == 256),
        ({"license": "MIT"}, lambda one: one.licence == "MIT"),
        ({}, lambda one: one.licence in ("MIT", "Apache-2.0", "BSD-3-Clause", "BSD-2-Clause")),
        ({"avoid_op": ["depthwise-conv", "Sigmoid"]},
         lambda one: not {"depthwise-conv", "Sigmoid"} & read_operators()[one.model]),
    ],
    ids=lambda value: next(iter(value), "free") if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_constraint_holds_for_every_row_and_leaves_some(limits, holds, t4):
    free = pick(device="t4", top=500, license="any").front
    found = pick(device="t4", top=500, **limits).front
    assert found and all(map(holds, found))
    assert limits == {} or not all(map(holds, free)), "the constraint does nothing"


def test_a_constraint_that_nothing_meets_is_said(t4):
    with pytest.raises(CheckFailed, match="no network with public weights meets the constraints"):
        pick(device="t4", max_params_m=0.01)


def test_weights_are_those_that_a_task_and_a_licence_allow(t4):
    free = {one.model for one in pick(device="t4", top=500).front}
    mobileone = pick(device="t4", license="mobileone-license", top=500)
    assert {one.family for one in mobileone.front} == {"mobileone"}
    assert not any(model.startswith("mobileone") for model in free)
    assert any("licence has to be accepted (mobileone_s0" in n for n in pick(device="t4").notes)


def test_a_row_names_the_most_accurate_weights_of_its_image_size(t4):
    for one in pick(device="t4", top=500).front:
        same = [
            w.top1_percent
            for w in one.spec.weights
            if w.is_free and not w.unreadable and w.top1_percent and w.num_classes
            and w.preprocess.input_size[-1] == one.resolution
        ]  # fmt: skip
        assert one.top1_percent == max(same)


def test_networks_without_public_weights_are_named_by_the_papers_figure(known):
    known.append(evidence(model="shufflenetv2_x0_5_megvii", ms=0.1))
    known.append(evidence(model="ghostnet_050", ms=0.2))
    found = pick(device="t4", latency_ms=6)
    assert "ghostnet_050" in {one.model for one in found.unranked}
    for one in found.unranked:
        assert one.top1_percent is None and one.weights == "" and one.paper_top1_percent
    assert not {one.model for one in found.front} & {one.model for one in found.unranked}
    [note] = [note for note in found.notes if "no public weights" in note]
    assert "by the paper's own top-1" in note and "ghostnet_050" in note


def test_a_percentile_that_is_not_known_is_said(t4):
    found = pick(device="t4", latency_ms=2, percentile=99)
    assert all(one.may_miss for one in found.front)
    [note] = [note for note in found.notes if "p99" in note]
    assert note.startswith("the p99 is known of 0 of")


def test_int8_says_that_its_accuracy_is_not_known(t4):
    t4.extend(evidence(model=model, precision="int8", ms=0.4) for model in MODELS)
    notes = " ".join(pick(device="t4", precision="int8").notes)
    assert "top-1 is that of the fp32 weights" in notes
    assert "top-1 is that of the fp32 weights" not in " ".join(pick(device="t4").notes)


def test_a_backbone_may_have_weights_without_classes_which_are_named(t4):
    t4.append(evidence(model="mobilenetv4_conv_medium", ms=0.3))
    notes = " ".join(pick(device="t4", task="backbone", top=500).notes)
    assert "latencies are of the whole classifier" in notes
    assert "of larger data sets, so without a top-1: mobilenetv4_conv_medium (e1" in notes
    assert "without a top-1" not in " ".join(pick(device="t4", top=500).notes)


def test_rows_of_this_machines_kind_of_device_say_whose_they_are():
    found = pick(device="cpu", percentile=99, latency_ms=20)
    assert any("litezoo bench --device cpu" in note for note in found.notes)
    measured = [one for one in found.rows if one.basis == "measured"]
    assert measured and all(one.statistic == "p99" for one in measured)
    [note] = [note for note in found.notes if note.startswith("the p99 is known of")]
    assert not note.startswith("the p99 is known of 0")
    assert found.recommended.basis == "measured"  # of all others no p99 is known


def test_what_else_is_known_is_said_with_what_to_type(t4):
    t4.extend(of_models(*MODELS, batch=8))
    [note] = [note for note in pick(device="t4", latency_ms=2).notes if "also known" in note]
    assert "tensorrt fp16, deploy form, batch 8 (5 networks)" in note and "--batch" in note


def test_more_rows_than_asked_for_are_counted(t4):
    found = pick(device="t4", top=1)
    assert len(found.front) == 1
    whole = pick(device="t4", top=500).front
    assert found.front == whole[:1]
    assert any(f"--top {len(whole)}" in note for note in found.notes)


# ------------------------------------------------------------------- the data of the page


def test_the_pages_numbers_are_those_of_the_rows(t4, tmp_path):
    t4[0] = evidence(model="resnet18", ms=1.0, images_per_s=1500.0)  # of several callers
    data = picker_data(["t4"], folder=tmp_path)
    [one] = data["sets"]
    assert one["conditions"] == "tensorrt fp16, deploy form, batch 1"
    assert one["options"] == "--runtime tensorrt --precision fp16 --batch 1"
    places = [(model, side) for model, side, *_ in data["networks"]]
    at = places.index(("resnet18", 224))
    assert (one["ms"][at], one["low"][at], one["rates"]) == (1.0, None, {str(at): 1500.0})
    assert one["words"][one["evidence"][at]] == "somebody, 10.1"
    other = places.index(("vgg16", 224))
    assert (one["ms"][other], one["low"][other], one["high"][other]) == (4.0, 3.0, 5.0)
    assert data["bases"][int(one["basis"][other])] == "predicted"
    tags = {tag for number, tag, *_ in data["weights"] if number == at}
    spec = get_spec("resnet18")
    assert tags == {
        w.tag
        for w in spec.weights
        if w.top1_percent and not w.unreadable and w.preprocess.input_size[-1] == 224
    }
    assert all(len(one[key]) == len(places) for key in ("ms", "low", "high", "basis", "evidence"))


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"device": "t44"}, "unknown device 't44'; did you mean 't4'"),
        ({"latency_ms": 0.0}, "--latency-ms is 0; give a number above 0"),
        ({"latency_ms": float("nan")}, "--latency-ms is nan"),
        ({"throughput": -1.0}, "--throughput is -1"),
        ({"latency_ms": 1.0, "throughput": 1.0}, "two budgets; give one"),
        ({"batch": 0}, "--batch is 0; give 1 or more"),
        ({"top": 0}, "--top is 0"),
        ({"percentile": 95}, "--percentile is 95; known are 50, 90 and 99"),
        ({"min_top1": 101.0}, "--min-top1 is 101; it is a percentage"),
        ({"task": "detector"}, "unknown task 'detector'"),
        ({"graph_form": "deployed"}, "unknown graph form 'deployed'; did you mean 'deploy'"),
        ({"license": "GPL"}, "unknown licence 'GPL'"),
        ({"avoid_op": ["squeeze-excited"]}, "did you mean 'squeeze-excite'"),
        ({"avoid_op": ["Sigmoit"]}, "did you mean 'Sigmoid'"),
        ({"runtime": "tensort"}, "unknown runtime of t4: 'tensort'; did you mean 'tensorrt'"),
        ({"precision": "fp61"}, "unknown precision of t4: 'fp61'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(values, said):
    with pytest.raises(UsageError) as error:
        pick(**{"device": "t4", **values})
    assert said in str(error.value)


def test_a_device_of_which_nothing_is_known_is_no_evidence():
    with pytest.raises(
        MissingError, match=r"no evidence: nothing was measured or published on arm-phone .ncnn"
    ):
        pick(device="arm-phone", latency_ms=10)


def test_a_device_without_rows_and_runtimes_is_no_evidence(known, monkeypatch):
    alone = dataclasses.replace(get_device("t4"), name="alone", runtimes=(), generation=None)
    monkeypatch.setattr("litezoo.benchmarks.pick.get_device", lambda name: alone)
    with pytest.raises(MissingError, match=r"no evidence: .* on alone, and litezoo has no"):
        pick(device="alone")


def test_where_nothing_can_be_predicted_what_was_run_is_there(t4, monkeypatch):
    def nothing(*_, **__):
        raise MissingError("nothing to predict from")

    monkeypatch.setattr(backbones, "predict_networks", nothing)
    found = pick(device="t4", top=500)
    assert found.front and all(one.basis == "published" for one in found.front)
    assert any(note.startswith("no evidence of other networks on t4") for note in found.notes)


def test_a_device_without_rows_takes_the_runtime_of_its_relatives(known, monkeypatch):
    alone = dataclasses.replace(get_device("t4"), name="alone", runtimes=())
    targets = [
        Target(device="v100", runtime="ncnn-vulkan", precision="fp16"),
        Target(device="titan-rtx", runtime="pytorch-eager", precision="fp16"),  # a Turing as well
    ]
    monkeypatch.setattr(backbones, "list_targets", lambda device=None: [] if device else targets)
    assert choose_conditions(alone, [], OPEN, for_latency=True).runtime == "pytorch-eager"


# --------------------------------------------------------------------------------- operators


def test_every_network_has_its_operators():
    table = read_operators()
    assert set(table) == set(list_models()) == set(list_networks())
    found = {name for own in table.values() for name in own}
    assert {*PATTERNS} - {"leaky-relu", "shuffle-5d"} <= found
    assert all("Conv" in own for own in table.values())


@pytest.mark.parametrize("model", ["mobilenetv3_small_050"])
def test_the_kept_operators_are_those_of_the_exported_graph(model):
    """Of a network with every kind of layer, but few of each; all are exported by the generator."""
    assert (
        find_operators(shallow(get_spec(model)).build().eval(), resolution=64)
        == (read_operators()[model])
    )


def test_a_damaged_table_of_operators_is_named(tmp_path):
    file = tmp_path / "operators.json"
    file.write_text("[")
    with pytest.raises(CheckFailed, match=r"operators\.json holds no operators .* make it again"):
        read_operators(file)


def test_a_line_of_operators_is_written_anew_and_the_others_stay(tmp_path, monkeypatch):
    file = tmp_path / "operators.json"
    file.write_text('{"repvgg_a0": "Conv", "resnet18": "Conv Add"}')
    monkeypatch.setattr(operators, "find_operators", lambda *_, **__: frozenset({"Relu", "Conv"}))
    operators.write_operators(["resnet18"], file)
    assert read_operators(file) == {"repvgg_a0": {"Conv"}, "resnet18": {"Conv", "Relu"}}
    assert [line.split('"')[1] for line in file.read_text().splitlines()[1:-1]] == [
        name for name in list_models() if name in ("repvgg_a0", "resnet18")
    ]


# ------------------------------------------------------------- the evidence that is there

#: What the issue asks to be answered on a fresh clone.
ASKED = ("t4", "a4000", "cpu", "snapdragon-855-cpu", "rk3588-npu", "rtx4090")


@pytest.mark.parametrize("device", ASKED)
def test_every_row_of_a_device_says_how_it_is_known(device):
    found = pick(device=device, top=500)
    assert found.front
    rows = {
        (e.model, e.resolution, e.ms)
        for e in (*read_measured(), *read_published())
        if e.device == device
    }
    for one in found.front:
        _, _, twin = one.evidence.partition(", of ")
        name = twin.partition(":")[0] or one.model
        seen = (name, one.resolution, one.ms) in rows
        assert one.is_seen == seen
        assert (one.low_ms is None) == (one.high_ms is None) == seen
        if not seen:
            assert one.low_ms < one.ms < one.high_ms and " to " in one.label
    ms, top1 = [o.ms for o in found.front], [o.top1_percent for o in found.front]
    assert ms == sorted(ms, reverse=True) and top1 == sorted(top1, reverse=True)


def test_a_t4_within_two_milliseconds_is_answered():
    found = pick(device="t4", latency_ms=2)
    assert found.recommended is not None and not found.recommended.may_miss
    assert (found.recommended.high_ms or found.recommended.ms) <= 2
    assert found.conditions.precision == "fp16"


def test_what_is_picked_can_be_created():
    found = package.pick(device="cpu", latency_ms=20, max_params_m=6)
    model = package.create_model(found.recommended.model)
    assert sum(p.numel() for p in model.parameters()) == found.recommended.spec.params_train
    assert found.recommended.spec.get_weights(found.recommended.weights).top1_percent == (
        found.recommended.top1_percent
    )


def test_picking_imports_no_torch_and_asks_no_network():
    code = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a network was asked")
socket.socket.connect = refuse
from litezoo.__main__ import main
assert main(["pick", "--device", "cpu"]) == 0
assert main(["pick", "--device", "t4", "--latency-ms", "2", "--json"]) == 0
assert main(["pick", "--device", "t4", "--latency-ms", "0.0001"]) == 3
assert main(["predict", "repvgg_a0", "--device", "t4"]) == 0
heavy = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino", "lightning", "scipy",
         "pytorch_lightning", "tensorrt", "plotly", "pandas", "sklearn")
print("imported:", [name for name in heavy if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert result.stdout.splitlines()[-1] == "imported: []", result.stderr


# ------------------------------------------------------------------------- the command line


def test_the_answer_is_a_table_a_sentence_and_notes(t4, capsys):
    assert litezoo("pick", "--device", "t4", "--latency-ms", "2") == 0
    text = capsys.readouterr().out
    assert "t4: tensorrt fp16, deploy form, batch 1; at most 2 ms" in text
    assert "published (somebody, 10.1)" in text and "meets, picked" in text
    assert ": of those that surely take at most 2 ms the most accurate" in text


def test_the_answer_is_json_for_programs(t4, capsys):
    words = ("--min-top1", "60", "--avoid-op", "HardSigmoid", "silu", "--top", "2")
    assert litezoo("pick", "--device", "t4", "--latency-ms", "6", *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["conditions"]["runtime"] == "tensorrt" and found["budget"]["latency_ms"] == 6
    assert len(found["front"]) == 2
    assert {"model", "weights", "ms", "low_ms", "high_ms", "basis", "evidence", "may_miss"} <= set(
        found["front"][0]
    )
    assert found["recommended"]["model"] in list_models()


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("pick", 2, "for which device? for example --device t4"),
        ("pick --device t44", 2, "did you mean 't4'"),
        ("pick --device t4 --latency-ms 0.0001", 3, "the fastest there is"),
        ("pick --device arm-phone", 4, "arm-phone"),
        ("pick --device t4 --latencyms 2", 2, "did you mean '--latency-ms'"),
        ("predict repvgg_a0", 2, "for which device?"),
        ("predict --device t4", 2, "which network?"),
        ("predict repvgg_a0 --model resnet18 --device t4", 2, "are two networks; give one"),
        ("predict repvgg_a9 --device t4", 2, "did you mean 'repvgg_a"),
        ("predict repvgg_a0 --device t44", 2, "did you mean 't4'"),
        ("predict repvgg_a0 --device arm-phone", 4, "arm-phone"),
        ("predict --fit none.csv --device t4", 2, "none.csv"),
    ],
)
def test_a_mistake_is_answered_by_its_status(line, status, said, capsys):
    assert litezoo(*line.split()) == status
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and "Traceback" not in error


def test_a_network_is_predicted_with_its_interval_and_explained(capsys):
    assert litezoo("predict", "repvgg_a0", "--device", "t4", "--batch", "8") == 0
    text = capsys.readouterr().out
    assert "batch 8, 3x224x224, deploy form" in text and "80 % of comparable rows" in text
    assert "bound by" not in text
    words = ("predict", "--model", "repvgg_a0", "--device", "t4", "--explain", "--layers", "3")
    assert litezoo(*words) == 0
    text = capsys.readouterr().out
    assert "the 3 longest of " in text and "bound by" in text
    assert litezoo(*words, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["low_ms"] < values["ms"] < values["high_ms"]
    assert values["images_per_s"] == pytest.approx(1e3 / values["ms"])
    assert len(values["times"]) == len(values["kernels"]) > 20
    assert {"name", "ms", "bound", "efficiency"} <= set(values["times"][0])


def test_the_model_is_fitted_to_a_users_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LITEZOO_FITS", raising=False)
    models = ("resnet18", "resnet50", "repvgg_a0", "mobilenetv2_100", "ghostnet_100",
              "shufflenetv2_x1_0", "mobilenetv3_large_100", "vgg16", "densenet121")  # fmt: skip
    target = {"device": "t4", "runtime": "tensorrt", "precision": "fp32"}
    before = {name: predict(name, **target).ms for name in (*models, "repvgg_a2")}
    lines = [f"{name},{2.5 * before[name]:.4f}" for name in models]  # a card of less clock
    (tmp_path / "rows.csv").write_text("\n".join(["model,ms", *lines]) + "\n")
    words = [word for key, value in target.items() for word in (f"--{key}", value)]
    assert litezoo("predict", "repvgg_a2", "--fit", "rows.csv", *words, "--json") == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["fit"]["rows"] == 9 and fitted["basis"] in ("fitted", "anchored")
    assert fitted["ms"] == pytest.approx(2.5 * before["repvgg_a2"], rel=0.15)
    assert litezoo("predict", "--fit", "rows.csv", *words) == 0
    text = capsys.readouterr().out
    assert f"to use it: export LITEZOO_FITS={tmp_path / 'fits'}" in text


# ------------------------------------------------------------------------- recommendations


def test_the_recommendations_are_what_the_rows_give():
    text = (ROOT / "docs" / "recommendations.md").read_text(encoding="utf-8")
    assert text == recommend.recommendations(), "run: make recommendations"


def test_every_chip_of_the_recommendations_is_there_with_labelled_numbers():
    text = (ROOT / "docs" / "recommendations.md").read_text(encoding="utf-8")
    for case in recommend.CASES:
        assert f"## {case.title}: {get_device(case.device).title}" in text
    cells = [line for line in text.splitlines() if line.startswith(("| `", "| within"))]
    assert len(cells) > 30
    assert all(any(f"| {basis} (" in line for basis in BASES) for line in cells)


@pytest.mark.parametrize(
    ("on_front", "front", "of_all", "every", "verdict"),
    [
        (6, 8, 20, 80, "agrees"), (1, 8, 40, 80, "disagrees"), (0, 8, 20, 80, "disagrees"),
        (4, 8, 40, 80, "says neither"), (2, 2, 20, 80, "says too little"),
        (0, 8, 0, 80, "says too little"),
    ],
)  # fmt: skip
def test_a_verdict_is_by_the_share_of_the_front(on_front, front, of_all, every, verdict):
    share = recommend.Share(on_front=on_front, front=front, of_all=of_all, all=every)
    assert share.verdict == verdict
    assert (
        str(share) == f"{verdict}: {on_front} of {front} rows of the front, {of_all} of all {every}"
    )


def test_a_share_counts_what_is_meant_among_all_rows_and_on_their_front():
    rows = [
        row(model="a", family="repvgg", ms=1.0), row(model="b", ms=2.0, family="repvgg"),
        row(model="c", ms=3.0, top1_percent=80.0, family="resnet"),
        row(model="d", top1_percent=None, family="repvgg"),
    ]  # fmt: skip
    share = recommend.share_of(rows, lambda one: one.family == "repvgg")
    assert (share.on_front, share.front, share.of_all, share.all) == (1, 2, 2, 3)


def test_by_papers_a_network_counts_once_at_its_own_size_with_or_without_weights():
    rows = [
        row(ms=1.0), row(ms=0.8, resolution=160),
        row(model="ghostnet_050", weights="", top1_percent=None, paper_top1_percent=66.2),
    ]  # fmt: skip
    found = recommend.by_papers(rows)
    assert [(one.model, one.top1_percent) for one in found] == [
        ("repvgg_a0", 72.4),
        ("ghostnet_050", 66.2),
    ]


def test_outdated_recommendations_end_with_status_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recommend, "recommendations", lambda: "fresh\n")
    file = tmp_path / "recommendations.md"
    assert recommend.main([str(file), "--check"]) == 3
    assert "is not up to date; run: make recommendations" in (capsys.readouterr().err)
    assert recommend.main([str(file)]) == 0
    assert file.read_text() == "fresh\n"
    assert recommend.main([str(file), "--check"]) == 0
