import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import images, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from litezoo.benchmarks import design_rules as rules_module
from litezoo.benchmarks import guidelines as module
from litezoo.benchmarks import measure as protocol
from litezoo.benchmarks.design_rules import (
    Rule,
    Variant,
    check_macs,
    count_macs,
    create,
    design_rules,
)
from litezoo.benchmarks.draw_guidelines import guideline_figure, write_guidelines
from litezoo.benchmarks.guidelines import (
    EAGER,
    append_guidelines,
    compare_runs,
    find_turn,
    guidelines_file,
    judge,
    latest_guidelines,
    measure_guidelines,
    noise_band,
    ratio_interval,
    read_guidelines,
)
from litezoo.benchmarks.machine import read_machine
from litezoo.export import runtime_openvino, runtime_pytorch
from litezoo.export.runtime import get_runtime
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.recipes.devices import get_device

ALL = [
    pytest.param(rule, id=f"{rule.name}-{'quick' if quick else 'full'}")
    for quick in (True, False)
    for rule in design_rules(quick=quick)
]
VARIANTS = {
    (rule.experiment, variant.name): variant
    for rule in design_rules(quick=True)
    for variant in rule.variants
}


def rule(name, *, quick=False):
    return design_rules([name], quick=quick)[0]


# -------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("each", ALL)
def test_networks_are_compared_at_the_macs_that_the_rule_says(each):
    macs = check_macs(each)
    assert all(count > 0 for count in macs.values())
    if each.per == "time" and each.equal_within is None:
        assert each.pairs  # a trade of MACs, over widths
    assert each.claim and re.search(r"\d{4}\.\d{5}|NVIDIA|TensorRT", each.source)


def test_rules_have_names_of_their_own_and_share_an_experiments_networks():
    for quick in (False, True):
        rules = design_rules(quick=quick)
        assert len({r.name for r in rules}) == len(rules) == 16
        for one, other in itertools.combinations(rules, 2):
            if one.experiment == other.experiment:
                assert one.variants == other.variants


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        # pixels, blocks and channels of ShuffleNetV2's tables, multiplied by hand
        ("g1-equal-widths", {"1:1": 20 * 128 * 128, "1:2": 20 * 90 * 180, "1:6": 20 * 52 * 312,
                             "1:12": 20 * 36 * 432}),
        ("g2-few-groups", {"1 group": 10 * 128**2, "2 groups": 10 * 180**2 // 2,
                           "4 groups": 10 * 256**2 // 4, "8 groups": 10 * 360**2 // 8}),
        ("g3-parallel", {"1 fragment": 10 * 128**2, "2 in series": 20 * 90**2,
                         "4 in series": 40 * 64**2, "2 in parallel": 20 * 90**2,
                         "4 in parallel": 40 * 64**2}),
        ("g4-element-wise", dict.fromkeys(
            ("neither", "shortcut", "ReLU", "ReLU and shortcut"), 10 * 17 * 128**2 // 16)),
        ("density-1x1", {"1x1": 49 * 64**2, "3x3": 45 * 64**2, "5x5": 50 * 64**2,
                         "7x7": 49 * 64**2}),
        ("branches", {"fused 3x3": 36 * 64**2, "3x3 + identity": 36 * 64**2,
                      "3x3 + 1x1": 40 * 64**2, "3x3 + 1x1 + identity": 40 * 64**2}),
    ],
)  # fmt: skip
def test_the_set_ups_are_those_of_the_papers(name, macs):
    assert check_macs(rule(name)) == {key: 56 * 56 * value for key, value in macs.items()}


def test_dense_and_one_shot_aggregation_have_equal_macs():
    for quick in (False, True):
        macs = check_macs(rule("one-shot", quick=quick))
        assert macs["dense"] == macs["one-shot"]


def test_a_separable_convolution_has_a_ninth_and_its_widths_share_of_a_plain_ones_macs():
    macs = check_macs(rule("separable-64"))
    for width in (8, 64, 256):
        share = macs[f"separable {width}"] / macs[f"plain {width}"]
        assert share == pytest.approx(1 / 9 + 1 / width)


@pytest.mark.parametrize("key", VARIANTS, ids=" ".join)
def test_every_network_is_a_classifier_whose_numbers_stay_in_range(key):
    variant = VARIANTS[key]
    network = create(variant)
    channels, height, width = variant.shape
    with torch.inference_mode():
        logits = network(images(2, channels, height // 2, width // 2).abs())
    assert logits.ndim == 2 and len(logits) == 2
    assert logits.isfinite().all() and 1e-3 < logits.abs().max() < 100
    assert not torch.equal(logits[0], logits[1])
    half = network.to(torch.bfloat16)
    with torch.inference_mode():
        rounded = half(images(2, channels, height // 2, width // 2).abs().to(torch.bfloat16))
    assert relative_error(rounded.float(), logits) < 0.1


def test_networks_are_the_same_every_time_and_leave_the_generator_alone():
    variant = rule("branches", quick=True).variants[-1]
    state = torch.get_rng_state()
    first, second = create(variant), create(variant)
    assert torch.equal(torch.get_rng_state(), state)
    batch = images(1, *variant.shape)
    with torch.inference_mode():
        assert torch.equal(first(batch), second(batch))


def test_the_fused_block_computes_what_its_branches_do():
    own = rule("branches", quick=True)
    batch = images(2, 32, 9, 7)
    with torch.inference_mode():
        branches, fused = (
            create(own.variant(name))(batch) for name in ("3x3 + 1x1 + identity", "fused 3x3")
        )
    assert relative_error(fused, branches) < 1e-5
    kinds = [type(m) for m in create(own.variant("fused 3x3")).modules()]
    assert kinds.count(nn.Conv2d) == 4 and nn.BatchNorm2d not in kinds


def conv(channels):
    return lambda: nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def variant(name, channels=8, **more):
    return Variant(name=name, build=conv(channels), shape=(channels, 4, 4), **more)


def made(**changes):
    values = {
        "name": "a-rule", "claim": "b takes more time than a", "source": "a test, Table 0",
        "experiment": "e", "variants": (variant("a"), variant("b")), "slow": "b", "fast": "a",
        "per": "time", "equal_within": 0.0,
    }  # fmt: skip
    return Rule(**{**values, **changes})


def test_macs_are_those_of_one_image():
    assert count_macs(variant("a", 8)) == 8 * 8 * 16


def test_unequal_macs_are_refused():
    unequal = (variant("a", 16), variant("b", 15))
    with pytest.raises(CheckFailed, match=r"b has 3,600 and a 4,096, more than 10\.0% apart"):
        check_macs(made(variants=unequal, equal_within=0.1))
    assert check_macs(made(variants=unequal, equal_within=0.13)) == {"a": 4096, "b": 3600}
    assert check_macs(made(variants=unequal, equal_within=None))["b"] == 3600


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slow": "c"}, "unknown variant of rule 'a-rule' 'c'"),
        ({"pairs": ((1.0, "a", "d"),)}, "unknown variant of rule 'a-rule' 'd'"),
        ({"slow": "a"}, "compares a with itself"),
        ({"variants": (variant("a"), variant("a"))}, "two variants of one name"),
        ({"per": "flop"}, "unknown measure 'flop'"),
        ({"threshold": 0.0}, "threshold 0.0"),
    ],
)
def test_a_rule_that_measures_nothing_is_refused(changes, reason):
    with pytest.raises(UsageError, match=reason):
        made(**changes)


def test_rules_are_chosen_by_name():
    chosen = design_rules(["one-shot", "g2-few-groups"])
    assert [r.name for r in chosen] == ["g2-few-groups", "one-shot"]
    with pytest.raises(
        UsageError, match="unknown rule 'g2-few-group'; did you mean 'g2-few-groups'"
    ):
        design_rules(["g2-few-group"])


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("interval", "verdict", "close"),
    [
        ((1.10, 1.20), "holds", False),
        ((1.04, 1.20), "no difference", True),
        ((0.97, 1.03), "no difference", False),
        ((0.90, 1.20), "no difference", True),
        ((0.93, 0.99), "no difference", True),
        ((0.70, 0.80), "does not hold", False),
    ],
)
def test_the_interval_decides(interval, verdict, close):
    assert judge(*interval, threshold=1.0, band=0.06) == (verdict, close)


def test_a_rule_may_ask_for_more_than_a_difference():
    assert judge(1.5, 1.6, threshold=2.0, band=0.06)[0] == "does not hold"
    assert judge(2.3, 2.6, threshold=2.0, band=0.06)[0] == "holds"


intervals = st.tuples(st.floats(0.2, 5), st.floats(1, 3)).map(lambda p: (p[0], p[0] * p[1]))


@given(intervals, st.floats(0.01, 0.5))
def test_the_opposite_claim_has_the_opposite_verdict(interval, band):
    low, high = interval
    opposite = {"holds": "does not hold", "does not hold": "holds"}
    verdict, _ = judge(low, high, threshold=1.0, band=band)
    mirrored, _ = judge(1 / high, 1 / low, threshold=1.0, band=band)
    border = min(abs(edge * (1 + band) ** way - 1) for edge in interval for way in (1, -1))
    if border > 1e-9:  # but for rounding at a border
        assert mirrored == opposite.get(verdict, verdict)


@given(intervals, st.floats(0.01, 0.5), st.floats(1, 2), st.floats(0, 0.5))
def test_more_doubt_makes_no_difference_out_of_nothing(interval, band, wider, more):
    low, high = interval
    certain, _ = judge(low, high, threshold=1.0, band=band)
    doubtful, _ = judge(low / wider, high * wider, threshold=1.0, band=band + more)
    assert doubtful in (certain, "no difference")


medians = st.lists(st.floats(0.5, 2), min_size=3, max_size=12).map(np.array)


@given(medians, st.floats(0.1, 10))
def test_drift_of_the_machine_cancels_out_of_a_ratio(drift, factor):
    ratio, low, high = ratio_interval(factor * drift, drift)
    assert ratio == pytest.approx(factor)
    assert low == pytest.approx(factor) and high == pytest.approx(factor)


@given(medians, st.integers(0, 9), st.floats(0.1, 10))
def test_a_ratios_interval_holds_it_and_scales_with_it(slow, seed, factor):
    fast = np.random.default_rng(seed).uniform(0.5, 2, len(slow))
    ratio, low, high = ratio_interval(slow, fast)
    quotients = slow / fast
    tiny = 1e-9
    assert quotients.min() - tiny <= low <= ratio + tiny
    assert ratio - tiny <= high <= quotients.max() + tiny
    assert ratio == pytest.approx(float(np.median(quotients)))
    assert ratio_interval(factor * slow, fast) == pytest.approx((factor * ratio, factor * low,
                                                                 factor * high))  # fmt: skip


def test_more_rounds_make_a_narrower_interval():
    noise = np.random.default_rng(0)

    def width(rounds):
        slow, fast = noise.lognormal(0, 0.05, (2, rounds))
        _, low, high = ratio_interval(slow, fast)
        return high - low

    assert width(400) < width(15) / 2


def test_noise_is_wider_on_more_threads_and_as_wide_as_a_copy_shows():
    assert noise_band(0.01, threads=1) == 0.06
    assert noise_band(0.01, threads=2) == 0.15
    assert noise_band(0.31, threads=1) == 0.31


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(32, 1.4), (16, 0.8), (64, 3.0)], "faster from 32 on"),
        ([(16, 1.5), (32, 1.4)], "faster at every width from 16 to 32"),
        ([(16, 0.5), (32, 1.04)], "faster at no width from 16 to 32"),
        ([(16, 1.5), (32, 0.9), (64, 0.8)], "faster up to 16"),
        ([(8, 1.5), (16, 0.9), (32, 2.0), (64, 1.0)], "faster at 8, 32"),
    ],
)
def test_the_width_at_which_it_turns_is_found(points, said):
    assert find_turn(points, band=0.06) == said


# ------------------------------------------------------------------------------------- measuring


class Clock:
    """Time that passes only where a session says so; stands in for `time`."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Scripted:
    """A session whose calls take `duration()` milliseconds of the clock."""

    def __init__(self, clock, duration):
        self.clock, self.duration, self.calls = clock, duration, 0

    def run(self, batch):
        self.calls += 1
        self.clock.now += self.duration() / 1e3
        return np.zeros((len(batch), 1), np.float32)


@pytest.fixture
def scripted(monkeypatch, quiet):
    """Measure made-up rules whose networks take made-up times, `times` by variant, in ms.

    `noise` is the machine's: every block of a session is off by its own factor.
    """
    clock = Clock()
    monkeypatch.setattr(protocol, "time", clock)

    def measured(rules, times, *, noise=0.0, copy_is=1.0, noise_seed=0, **more):
        generator = np.random.default_rng(noise_seed)
        loaded = {}

        def sessions(variant, *, copies, **conditions):
            made = []
            for number in range(copies):
                factor = copy_is if number else 1.0
                state = {"block": -1, "off": 1.0}

                def duration(name=variant.name, factor=factor, state=state):
                    block = int(clock.now / 0.2)
                    if block != state["block"]:
                        state.update(block=block, off=float(generator.lognormal(0, noise)))
                    return times[name] * factor * state["off"] * (1 + (clock.now % 100) / 200)

                made.append(Scripted(clock, duration))
            loaded[variant.name] = (made, conditions)
            return made

        monkeypatch.setattr(module, "_sessions", sessions)
        monkeypatch.setattr(rules_module, "design_rules", lambda names, quick: tuple(rules))
        steps = []
        run = measure_guidelines("cpu", runtime=EAGER, progress=steps.append, **more)
        assert run.left_out == {}
        return run.rows, loaded, steps

    return measured


def test_a_rule_holds_where_its_slow_network_takes_longer(scripted):
    [row], _, steps = scripted([made()], {"a": 4.0, "b": 6.0})
    assert (row.verdict, row.close) == ("holds", False)
    assert row.ratio == pytest.approx(1.5, rel=0.02)
    assert row.low <= row.ratio <= row.high
    assert (row.rule, row.claim, row.source) == ("a-rule", made().claim, made().source)
    assert (row.device, row.runtime, row.precision) == ("cpu", EAGER, "fp32")
    assert (row.batch, row.threads, row.quick, row.per) == (1, 1, False, "time")
    assert row.band == 0.06 and row.control < 0.06
    assert [(v.name, v.macs) for v in row.variants] == [("a", 1024), ("b", 1024)]
    assert row.variants[0].ratio == row.variants[0].low == row.variants[0].high == 1.0
    assert row.variants[1].ms / row.variants[0].ms == pytest.approx(1.5, rel=0.02)
    assert row.finding.startswith(f"b: {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) times the "
                                  "time of a; less than 6% is noise")  # fmt: skip
    assert row.rounds == 15 and row.protocol == protocol.PROTOCOL
    assert steps[0] == f"e: building a in {EAGER} fp32"
    assert "pass 3, e: batch 1: round 5, 3 engines" in steps
    assert not any(step.startswith("pass 4") for step in steps)


def test_a_rule_does_not_hold_where_the_opposite_is_so_and_equals_are_no_difference(scripted):
    [row], *_ = scripted([made()], {"a": 6.0, "b": 4.0})
    assert row.verdict == "does not hold" and row.ratio == pytest.approx(1 / 1.5, rel=0.02)
    [row], *_ = scripted([made()], {"a": 4.0, "b": 4.1})
    assert row.verdict == "no difference"


def test_a_cost_may_be_that_of_a_mac(scripted):
    networks = (variant("a", 8), variant("b", 16))
    per_mac = made(variants=networks, per="mac", equal_within=None)
    [row], *_ = scripted([per_mac], {"a": 4.0, "b": 8.0})  # four times the MACs in twice the time
    assert row.verdict == "does not hold" and row.ratio == pytest.approx(0.5, rel=0.02)
    assert "times the time of a MAC of a" in row.finding


def test_rules_of_one_experiment_share_its_networks_and_keep_their_order(scripted):
    networks = (variant("a"), variant("b"), variant("c"))
    rules = [
        made(name="first", variants=networks),
        made(name="other", experiment="f"),
        made(name="second", variants=networks, slow="c"),
    ]
    rows, _, steps = scripted(rules, {"a": 4.0, "b": 6.0, "c": 3.0})
    assert [row.rule for row in rows] == ["first", "other", "second"]
    assert [row.verdict for row in rows] == ["holds", "holds", "does not hold"]
    assert sum(step.startswith("e: building") for step in steps) == 3
    assert rows[0].variants[0].ms == rows[2].variants[0].ms


def test_a_copy_of_a_network_shows_the_noise_that_the_band_is_made_of(scripted):
    times = {"a": 4.0, "b": 4.6}
    [row], *_ = scripted([made()], times)
    assert row.verdict == "holds"
    [row], loaded, _ = scripted([made()], times, copy_is=1.25)
    assert row.verdict == "no difference"
    assert row.band == row.control == pytest.approx(0.25, abs=0.02)
    [row], *_ = scripted([made()], times, copy_is=0.8)  # a faster copy is as bad
    assert row.verdict == "no difference" and row.band == pytest.approx(0.25, abs=0.02)
    assert {name: len(sessions) for name, (sessions, _) in loaded.items()} == {"a": 2, "b": 1}


def test_a_close_verdict_is_measured_twice_as_often(scripted):
    _, _, steps = scripted([made()], {"a": 4.0, "b": 4.24}, noise=0.05)
    assert any(step.startswith("pass 6, e") for step in steps)
    assert not any(step.startswith("pass 7") for step in steps)
    rules = [made(), made(name="clear", experiment="f")]
    monkey = {"a": 4.0, "b": 4.24}
    _, _, steps = scripted(rules, monkey, noise=0.05, quick=True)
    assert any(step.startswith("pass 2") for step in steps)
    assert not any(step.startswith("pass 3") for step in steps)


@pytest.mark.parametrize("effect", [0.6, 0.8, 1.0, 1.25, 1.6])
def test_two_runs_on_one_machine_give_the_same_verdicts(effect, scripted):
    times = {"a": 4.0, "b": 4.0 * effect}
    rows = [scripted([made()], times, noise=0.02, noise_seed=seed)[0] for seed in range(6)]
    agreements = [compare_runs(new, rows[0]) for new in rows[1:]]
    assert all(agreement.compared == 1 and not agreement.differ for agreement in agreements)


def test_where_a_rule_has_pairs_the_finding_says_where_it_turns(scripted):
    names = {f"{series} {w}": t for w, *both in ((8, 2, 3), (16, 4, 3), (32, 9, 4))
             for series, t in zip(("plain", "cheap"), both, strict=True)}  # fmt: skip
    networks = tuple(variant(n, 8, x=float(n.split()[1]), series=n.split()[0]) for n in names)
    turning = made(
        variants=networks, slow="plain 16", fast="cheap 16",
        pairs=tuple((float(w), f"plain {w}", f"cheap {w}") for w in (8, 16, 32)),
    )  # fmt: skip
    [row], *_ = scripted([turning], names)
    assert row.finding.endswith("; cheap is faster from 16 on")
    assert [(v.x, v.series) for v in row.variants[:2]] == [(8.0, "plain"), (8.0, "cheap")]


def test_conditions_reach_the_sessions(scripted):
    _, loaded, _ = scripted([made()], {"a": 4.0, "b": 6.0}, threads=2, batch=3, precision="bf16")
    (sessions, conditions) = loaded["b"]
    assert conditions["device"] == get_device("cpu")
    wanted = {"runtime": EAGER, "precision": "bf16", "batch": 3, "threads": 2}
    assert wanted.items() <= conditions.items() and conditions["folder"].name
    assert sessions[0].calls > 10


def test_an_experiment_that_cannot_be_built_right_is_left_out_with_the_reason(monkeypatch, quiet):
    clock = Clock()
    monkeypatch.setattr(protocol, "time", clock)

    def sessions(variant, *, copies, **conditions):
        if variant.name == "wrong":
            raise CheckFailed("wrong differs from PyTorch by 1")
        return [Scripted(clock, lambda: 4.0) for _ in range(copies)]

    monkeypatch.setattr(module, "_sessions", sessions)
    networks = (variant("a"), variant("wrong"))
    bad = made(name="bad", experiment="f", variants=networks, slow="wrong")
    monkeypatch.setattr(rules_module, "design_rules", lambda names, quick: (bad, made()))
    run = measure_guidelines("cpu", runtime=EAGER)
    assert [row.rule for row in run.rows] == ["a-rule"]
    assert run.left_out == {"f": "wrong differs from PyTorch by 1"}
    monkeypatch.setattr(rules_module, "design_rules", lambda names, quick: (bad,))
    with pytest.raises(CheckFailed, match="nothing could be measured: wrong differs"):
        measure_guidelines("cpu", runtime=EAGER)


# ------------------------------------------------------------------------------- real sessions

SMALL = Variant(
    name="small",
    build=lambda: rules_module._net(rules_module._conv(8, 16, 3, gain=2), nn.ReLU()),
    shape=(8, 8, 8),
)


def loaded(tmp_path, runtime, precision, **more):
    values = {"device": get_device("cpu"), "batch": 2, "threads": 1, "copies": 2}
    return module._sessions(
        SMALL, runtime=runtime, precision=precision, folder=tmp_path, **{**values, **more}
    )


@pytest.mark.parametrize(
    ("runtime", "precision", "tolerance"),
    [
        (EAGER, "fp32", 1e-5), (EAGER, "bf16", 2e-2), ("onnxruntime", "fp16", 1e-2),
        ("onnxruntime", "int8", 0.2), ("openvino", "fp32", 1e-5),
    ],
)  # fmt: skip
def test_a_runtimes_engine_computes_the_network(runtime, precision, tolerance, tmp_path):
    sessions = loaded(tmp_path, runtime, precision)
    assert len(sessions) == 2 and sessions[0] is not sessions[1]
    batch = module._images(SMALL, 2, seed=5)
    with torch.inference_mode():
        expected = create(SMALL)(torch.from_numpy(batch))
    for session in sessions:
        got = torch.from_numpy(session.run(batch))
        error = relative_error(got, expected)
        assert error < tolerance
        assert precision == "fp32" or error > 1e-5  # it is another precision


def test_an_engine_that_computes_something_else_is_never_timed(tmp_path, monkeypatch):
    class Wrong:
        def run(self, batch):
            return np.ones((len(batch), 16), np.float32)

    monkeypatch.setattr(runtime_pytorch, "eager_session", lambda *a, **k: Wrong())
    with pytest.raises(CheckFailed, match="small in pytorch-eager differs from PyTorch by"):
        loaded(tmp_path, EAGER, "fp32")


def test_a_whole_rule_is_measured_here(short):
    [row] = measure_guidelines("cpu", runtime=EAGER, quick=True, rules=["one-shot"]).rows
    assert row.rule == "one-shot" and row.quick and row.verdict in module.Verdict.__args__
    assert row.rounds >= 2 and all(v.ms > 0 for v in row.variants)
    assert 0.1 < row.ratio < 10


# ------------------------------------------------------------------------------ what cannot be


def test_the_first_runtime_that_is_here_and_has_the_precision_is_taken(monkeypatch):
    cpu = get_device("cpu")
    assert module._choose_runtime(cpu, None, "fp32") == "openvino"
    assert module._choose_runtime(cpu, None, "fp16") == "openvino"
    assert module._choose_runtime(cpu, "onnxruntime", "fp32") == "onnxruntime"
    assert module._choose_runtime(cpu, EAGER, "fp32") == EAGER
    monkeypatch.setattr(runtime_openvino, "find_spec", lambda name: None)
    assert module._choose_runtime(cpu, None, "fp32") == "onnxruntime"


def test_a_device_that_is_not_here_is_missing_with_every_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match=r"no runtime of t4 can be measured here: .*tensorrt"):
        measure_guidelines("t4")
    with pytest.raises(MissingError, match="needs openvino: pip install"):
        monkeypatch.setattr(runtime_openvino, "find_spec", lambda name: None)
        measure_guidelines("cpu", runtime="openvino")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"runtime": "openvin"}, "unknown runtime 'openvin'; did you mean 'openvino'"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "'onnxruntime' has no bf16; it has fp32"),
        ({"threads": 0}, "both need to be 1 or more"),
        ({"batch": 33}, "cpu takes batches up to 32, not 33"),
        ({"rules": ["g5"]}, "unknown rule 'g5'"),
        ({"runtime": EAGER, "precision": "int4", "rules": ["one-shot"]}, "has no int4 on the CPU"),
        ({"precision": "int8-mixed", "rules": ["one-shot"]}, "measure the rules at int8"),
    ],
)
def test_what_cannot_be_measured_says_what_can(arguments, reason):
    with pytest.raises(UsageError, match=reason):
        measure_guidelines("cpu", quick=True, **arguments)


def test_pytorch_itself_runs_on_cpus_and_gpus_only():
    network = nn.Identity()
    assert module._place(network, get_device("cpu")) is network
    with pytest.raises(UsageError, match="rk3588-npu is an npu"):
        module._place(network, get_device("rk3588-npu"))


def test_on_a_gpu_networks_are_moved_to_it(monkeypatch):
    places = []
    monkeypatch.setattr(runtime_pytorch, "find_gpu", lambda device: 2)

    class Network(nn.Identity):
        def to(self, place):
            places.append(place)
            return self

    module._place(Network(), get_device("t4"))
    assert places == ["cuda:2"]


def test_a_row_of_a_gpu_names_it(monkeypatch):
    monkeypatch.setattr(runtime_pytorch, "find_gpu", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"GPU {place.index}")
    assert module._machine(get_device("t4")).versions["gpu"] == "GPU 1"
    assert "gpu" not in module._machine(get_device("cpu")).versions

    def absent(device):
        raise MissingError("no GPU")

    monkeypatch.setattr(runtime_pytorch, "find_gpu", absent)
    assert "gpu" not in module._machine(get_device("t4")).versions


def test_mixtures_are_for_whole_networks():
    assert "int8-mixed" in get_runtime("openvino").precisions  # else the refusal above is another


# ---------------------------------------------------------------------------------------- files


@pytest.fixture
def rows(scripted):
    networks = (variant("a"), variant("b"), variant("c & d"))
    lines = tuple(
        variant(f"{s} {w}", 8, x=float(w), series=s) for s in ("plain", "cheap") for w in (8, 16)
    )
    rules = [
        made(variants=networks, claim="b takes <more> time than a"),
        made(name="opposite", variants=networks, slow="c & d"),
        made(name="line", experiment="l", variants=lines, slow="plain 16", fast="cheap 16",
             pairs=((8.0, "plain 8", "cheap 8"), (16.0, "plain 16", "cheap 16"))),
    ]  # fmt: skip
    times = {"a": 4.0, "b": 6.0, "c & d": 2.0, "plain 8": 1.0, "cheap 8": 1.0, "plain 16": 3.0,
             "cheap 16": 1.5}  # fmt: skip
    return scripted(rules, times)[0]


def test_rows_are_appended_and_read_again(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [file] = append_guidelines(rows[:2])
    assert str(file) == "benchmarks/results/guidelines/cpu.jsonl" == str(guidelines_file("cpu"))
    append_guidelines(rows[2:])
    again = read_guidelines([file])
    assert [row.rule for row in again] == ["a-rule", "opposite", "line"]
    assert again == [dataclasses.replace(row, machine=other.machine) for row, other in
                     zip(rows, again, strict=True)]  # fmt: skip
    assert dataclasses.asdict(again[0].machine) == json.loads(
        json.dumps(dataclasses.asdict(rows[0].machine), default=dict)
    ) | {"isa": rows[0].machine.isa}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(schema=0),
        lambda v: v.pop("verdict"),
        lambda v: v["variants"][0].pop("ms"),
        lambda v: v.update(unknown=1),
    ],
)
def test_a_damaged_row_is_named_by_file_and_line(change, rows, tmp_path):
    [file] = append_guidelines(rows, folder=tmp_path)
    first, second, third = file.read_text().splitlines()
    values = json.loads(second)
    change(values)
    file.write_text("\n".join([first, json.dumps(values), third]) + "\n")
    with pytest.raises(CheckFailed, match=r"cpu\.jsonl:2 is not a guideline row"):
        read_guidelines([file])
    with pytest.raises(UsageError, match="measure first: litezoo guidelines"):
        read_guidelines([tmp_path / "none.jsonl"])


def test_of_the_same_conditions_the_latest_row_counts(rows):
    row = rows[0]
    later = dataclasses.replace(row, date="2999-01-01", ratio=9.0)
    others = [
        dataclasses.replace(row, **{key: value})
        for key, value in {"threads": 2, "batch": 8, "precision": "int8", "runtime": "openvino",
                           "quick": True, "device": "t4"}.items()
    ]  # fmt: skip
    others.append(
        dataclasses.replace(row, machine=dataclasses.replace(read_machine(), cpu="another"))
    )
    assert latest_guidelines([later, row, *others]) == [later, *others]


def test_runs_are_compared_verdict_by_verdict(rows):
    changed = dataclasses.replace(rows[0], verdict="no difference", ratio=1.05, close=True)
    agreement = compare_runs(rows, [changed, *rows[1:]])
    assert agreement.compared == 3
    assert agreement.differ == (
        f"a-rule: holds ({rows[0].ratio:.2f}), was no difference (1.05), close to the border",
    )
    other = dataclasses.replace(rows[0], threads=4)
    assert compare_runs([other], rows).compared == 0


# -------------------------------------------------------------------------------------- drawings


def test_the_page_has_a_drawing_for_each_rule_and_needs_no_network(rows, tmp_path):
    file = write_guidelines(rows, tmp_path / "guidelines.html")
    page = file.read_text(encoding="utf-8")
    assert page.count('class="plotly-graph-div"') == 3
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert len(page) < 6e6
    assert "b takes &lt;more&gt; time than a" in page and "<more>" not in page
    assert "3 rules: 2 holds, 1 does not hold, 0 no difference" in page
    for row in rows:
        assert f"<h3>{row.rule} " in page and row.source in page
    again = write_guidelines([*rows, *rows], tmp_path / "twice.html").read_text(encoding="utf-8")
    assert again.count('class="plotly-graph-div"') == 3


def test_conditions_are_apart_and_said(rows, tmp_path):
    other = dataclasses.replace(rows[0], threads=2, quick=True)
    page = write_guidelines([*rows, other], tmp_path / "g.html").read_text(encoding="utf-8")
    assert "pytorch-eager fp32, batch 1, 1 thread</h2>" in page
    assert "pytorch-eager fp32, batch 1, 2 threads, small networks</h2>" in page


def test_bars_are_the_costs_with_their_intervals(rows):
    row = dataclasses.replace(rows[0], band=0.1)
    figure = guideline_figure(row)
    [bars] = figure.data
    assert list(bars.x) == ["a", "b", "c & d"]
    assert list(bars.y) == [v.ratio for v in row.variants]
    tops = [y + plus for y, plus in zip(bars.y, bars.error_y.array, strict=True)]
    assert tops == pytest.approx([v.high for v in row.variants])
    assert len({*bars.marker.color[:2]}) == 1 and bars.marker.color[2] != bars.marker.color[0]
    [band] = figure.layout.shapes
    assert (band.y0, band.y1) == pytest.approx((1 / 1.1, 1.1))
    assert "GFLOP/s" in bars.hovertext[0]
    rate = float(re.search(r"([\d.]+) GFLOP/s", bars.hovertext[0])[1])
    assert rate == pytest.approx(2 * 1024 / row.variants[0].ms / 1e6, abs=0.05)


def test_series_are_lines_over_their_width(rows):
    figure = guideline_figure(rows[2])
    assert [line.name for line in figure.data] == ["plain", "cheap"]
    assert [list(line.x) for line in figure.data] == [[8.0, 16.0]] * 2
    assert math.isclose(figure.data[1].y[1], 1.0)


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="measure them first: litezoo guidelines"):
        write_guidelines([], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_reading_rows_needs_no_torch():
    code = "import sys; import litezoo.benchmarks.draw_guidelines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
