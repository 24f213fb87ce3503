"""A bench as a whole: what it measures, what it appends, how it compares with the one before."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from test_bench import ROW, row
from test_train import litezoo

from litezoo.benchmarks import bench as module
from litezoo.benchmarks import measure as protocol
from litezoo.benchmarks import publish
from litezoo.benchmarks.bench import (
    REFERENCE_SET,
    bench,
    compare_rows,
    export_reference_set,
    find_knees,
    repeat,
)
from litezoo.benchmarks.disturbance import Disturbance, Quiet
from litezoo.benchmarks.machine import read_machine
from litezoo.benchmarks.measure import candidates_of
from litezoo.benchmarks.results import append_rows, read_rows
from litezoo.export import exporter
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import MissingError, UsageError

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture
def here(tmp_path, monkeypatch, short):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "MOST_CALL_MS", float("inf"))
    return tmp_path


@pytest.fixture
def noisy(monkeypatch):
    """A machine that never is quiet."""
    busy = Disturbance(seconds=0.2, cpus=(0,), foreign_share=0.6)
    monkeypatch.setattr(
        protocol, "run_quietly", lambda block: Quiet(value=block(), disturbance=busy, tries=3)
    )


@pytest.fixture
def smooth(monkeypatch):
    """Blocks of one length: what is tested here is not how far they are apart."""
    monkeypatch.setattr(protocol, "spread", lambda medians: 0.01)
    monkeypatch.setattr(protocol, "_least_ratio", lambda base, own: (2.0, 1.9, 2.1))


def test_each_number_of_threads_and_streams_is_measured(here, for_cpu, smooth):
    found = bench([for_cpu], batches=[1, 2], threads=[1, 2], streams=[1])
    assert {(r.threads, r.batch) for r in found.rows} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    rows = read_rows(found.files)
    assert rows == found.published == list(found.rows)
    found = bench([for_cpu], batches=[1], threads=[2], streams=[1, 2])
    assert [r.streams for r in found.rows] == [1, 2] * (len(found.rows) // 2)
    assert all(r.label.endswith(", 2 streams") for r in found.rows if r.streams == 2)


def test_more_callers_than_threads_are_refused(here, for_cpu):
    with pytest.raises(UsageError, match="streams are 1, 3; give 1 to 2, as many as there are"):
        bench([for_cpu], threads=[2], streams=[1, 3])
    assert litezoo("bench", for_cpu, "--threads", 1, "--streams", 0) == 2
    assert not (here / "benchmarks").exists()


def test_the_first_engine_is_measured_from_photos_too(here, for_cpu):
    first, *others = candidates_of(for_cpu, threads=1, end_to_end=True)
    whole = [one for one in others if one.scope == "end-to-end"]
    assert [one.label for one in whole] == [f"{first.label} end-to-end"]
    photos = whole[0].batch(2, seed=0)
    assert photos.shape == (2, 375, 500, 1) and photos.dtype == np.uint8
    logits = whole[0].session.run(photos)
    assert logits.shape == (2, 10) and np.isfinite(logits).all()
    assert np.array_equal(logits[0], whole[0].session.run(photos[:1])[0])


def test_a_row_says_what_it_reaches_of_the_ceilings(here, for_cpu, smooth):
    from test_ceilings import some

    from litezoo.benchmarks.ceilings import write_ceilings
    from litezoo.benchmarks.profiling import profile

    folder = here / "results"
    write_ceilings(some(threads=1), folder=folder / "ceilings")
    found = bench([for_cpu], batches=[2], threads=[1, 2], end_to_end=True, results=folder)
    work = profile(for_cpu / "model.fp32.onnx", batch=2)
    for r in found.rows:
        if r.threads == 2 or r.scope == "end-to-end":
            assert r.flops_percent is r.bytes_percent is None
            continue
        per_s = 1e3 / r.best_ms
        assert r.flops_percent == pytest.approx(100 * 2 * work.macs * per_s / 0.2e12, abs=0.06)
        moved = work.fused.memory_bytes * per_s
        assert r.bytes_percent == pytest.approx(100 * moved / 40e9, abs=0.06)
    assert {r.threads for r in found.rows if r.flops_percent} == {1}


def test_rows_of_a_disturbed_machine_are_not_published(here, for_cpu, noisy, capsys):
    assert litezoo("bench", for_cpu, "--batch", 1, "--threads", 1) == 3
    out, err = capsys.readouterr()
    assert "not published: repvgg_tiny openvino fp32 deploy, batch 1: " in out
    assert "appended 0 rows to no file" in out
    assert "no row is to be published: " in err and "blocks were disturbed" in err
    assert not (here / "benchmarks").exists()
    words = ("--batch", 1, "--threads", 1, "--keep-disturbed", "--results", "mine")
    assert litezoo("bench", for_cpu, *words) == 0
    rows = read_rows([here / "mine" / "cpu.jsonl"])
    assert len(rows) == 3 and all("disturbed" in r.refused for r in rows)


def test_a_network_with_refused_rows_is_measured_again(here, for_cpu, monkeypatch):
    runs = []

    def measure(candidates, *, batch, threads, progress):
        runs.append(batch)
        wide = {(1, 1): (0.9, 0.9, 0.01), (1, 2): (0.01, 0.9, 0.9)}.get(
            (batch, len(runs)), (0.01,) * 3
        )
        return [
            row(batch=batch, precision=name, spread=value, date=f"run {len(runs)}")
            for name, value in zip(("fp32", "bf16", "int8"), wide, strict=True)
        ]

    monkeypatch.setattr(publish, "MOST_SPREAD", 0.3)
    monkeypatch.setattr(module, "measure", measure)
    steps = []
    found = bench([for_cpu], batches=[1, 2], threads=[1], progress=steps.append)
    assert runs == [1, 1, 2]
    assert "batch 1: again, as 2 of 3 rows were refused" in steps
    # the second run was no better: the first counts, with what it refuses
    assert [r.date for r in found.rows] == ["run 1"] * 3 + ["run 3"] * 3
    assert [bool(r.refused) for r in found.rows] == [True, True, False] + [False] * 3
    assert len(read_rows(found.files)) == len(found.published) == 4


def test_a_sweep_ends_where_throughput_gains_no_more(here, for_cpu, monkeypatch):
    speeds = {1: 100.0, 2: 180.0, 4: 300.0, 8: 330.0, 16: 335.0, 32: 500.0}

    def measure(candidates, *, batch, threads, progress):
        return [row(batch=batch, images_per_s=speeds[batch], p50_ms=1e3 * batch / speeds[batch])]

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(
        module, "candidates_of", lambda *a, **k: candidates_of(for_cpu, threads=1)[:1]
    )
    found = bench([for_cpu], batches=None, threads=[1])
    assert [r.batch for r in found.rows] == [1, 2, 4, 8, 16]
    ((knee, most),) = find_knees(found.rows).values()
    assert (knee.batch, most.batch) == (8, 16)
    assert find_knees(found.rows[:2]) == {}


def test_a_sweep_ends_before_calls_take_too_long(here, for_cpu, monkeypatch):
    def measure(candidates, *, batch, threads, progress):
        return [row(batch=batch, images_per_s=10.0 * batch, p50_ms=600.0 * batch)]

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "MOST_CALL_MS", 2000.0)
    monkeypatch.setattr(
        module, "candidates_of", lambda *a, **k: candidates_of(for_cpu, threads=1)[:1]
    )
    assert [r.batch for r in bench([for_cpu], batches=None, threads=[1]).rows] == [1, 2]


def test_two_benches_agree_where_the_new_ratio_is_in_the_old_interval():
    base = "repvgg_a0 pytorch fp32 train"
    old = [
        row(ratio=1.0, ratio_low=0.9, ratio_high=1.1, runtime="pytorch", graph_form="train"),
        row(ratio=2.0, ratio_low=1.8, ratio_high=2.2),
        row(ratio=4.0, ratio_low=3.9, ratio_high=4.1, precision="int8"),
        row(ratio=4.0, precision="bf16"),  # no interval
    ]
    assert {r.ratio_to for r in old} == {base}
    new = [dataclasses.replace(r, date="2026-02-02", ratio=r.ratio * 1.05) for r in old]
    new.append(row(precision="fp16", ratio=9.0))
    agreement = compare_rows(new, old)
    assert agreement.compared == 2
    assert agreement.differ == (
        "repvgg_a0 openvino int8 deploy, batch 1, 2 threads: 4.20x, was 4.00x (3.90 to 4.10)",
    )


def test_a_second_bench_says_how_it_agrees(here, for_cpu, smooth, capsys):
    words = ("bench", for_cpu, "--batch", 1, "--threads", 1)
    assert litezoo(*words) == 0
    assert "as in the bench before" not in capsys.readouterr().out
    assert litezoo(*words) == 0
    assert "as in the bench before: 2 of 2 ratios" in capsys.readouterr().out


def test_networks_run_one_after_another_unless_together(here, for_cpu, smooth):
    other = shutil.copytree(for_cpu, here / "other")
    steps = []
    bench([for_cpu, other], batches=[1], threads=[1], progress=steps.append)
    assert sum(step.endswith("round 1, 3 engines") for step in steps) == 2
    steps.clear()
    bench([for_cpu, other], batches=[1], threads=[1], together=True, progress=steps.append)
    assert sum(step.endswith("round 1, 6 engines") for step in steps) == 1


# ----------------------------------------------------------------------------- reference set


def test_the_reference_set_is_of_the_zoo():
    assert len({*REFERENCE_SET}) == 14
    for name in REFERENCE_SET:
        assert get_spec(name).name == name


def test_what_is_missing_of_the_reference_set_is_exported(here):
    (here / "artifacts" / "resnet18" / "cpu").mkdir(parents=True)
    made, steps = [], []
    folders = export_reference_set(
        "cpu", export=lambda name, folder: made.append((name, str(folder))), progress=steps.append
    )
    assert len(folders) == 14 and len(made) == 13 and "resnet18" not in dict(made)
    assert made[0] == ("mobilenetv1_100", "artifacts/mobilenetv1_100/cpu")
    assert steps[0] == "exporting mobilenetv1_100, 1 of 13 that are missing"


def test_the_command_exports_with_random_weights_and_measures(here, for_cpu, smooth, monkeypatch):
    asked = {}

    def export(model, **words):
        asked.update(words, model=model)
        shutil.copytree(for_cpu, words["out"])

    monkeypatch.setattr(module, "REFERENCE_SET", ("repvgg_tiny",))
    monkeypatch.setattr(exporter, "export", export)
    words = ("bench", "--reference-set", "--batch", 1, "--threads", 1)
    assert litezoo(*words) == 0
    assert (asked["model"], asked["device"]) == ("repvgg_tiny", "cpu")
    assert asked["weights"] == asked["calibration"] == "random" and callable(asked["rank"])
    assert len(read_rows([here / "benchmarks" / "results" / "cpu.jsonl"])) == 3
    asked.clear()
    assert litezoo(*words) == 0 and asked == {}


# -------------------------------------------------------------------------------- repeating


@pytest.fixture
def measured(here, for_cpu, smooth):
    shutil.copytree(for_cpu, here / "artifacts" / "repvgg_tiny" / "cpu")
    return bench([for_cpu], batches=[1], threads=[1], pytorch=True).rows


def test_a_row_is_measured_again_beside_what_it_was_compared_with(measured):
    old = measured[-1]
    steps = []
    found = repeat(old.id[:6], progress=steps.append)
    assert found.old == old and found.new.label == old.label
    assert found.new.ratio_to == old.ratio_to == "repvgg_tiny pytorch-eager fp32 train"
    assert found.agrees and found.same_machine
    assert found.time_ratio == pytest.approx(found.new.best_ms / old.best_ms, abs=1e-3)
    assert any("round 1, 2 engines" in step for step in steps)


def test_a_row_that_others_are_compared_with_has_no_ratio_to_agree(measured):
    found = repeat(measured[0].id)
    assert found.agrees is None and found.time_ratio > 0


def test_a_ratio_outside_the_interval_ends_with_3_on_the_same_machine(
    measured, here, monkeypatch, capsys
):
    monkeypatch.setattr(protocol, "_least_ratio", lambda base, own: (3.0, 2.9, 3.1))
    name = measured[-1].id
    assert litezoo("bench", "--repro", name) == 3
    out, err = capsys.readouterr()
    assert "time now over then: " in out and "does not agree with the interval" in out
    assert f"the ratio of row {name} is 3.00, outside 1.90 to 2.10" in err
    elsewhere = dataclasses.replace(read_machine(), cpu="Another")
    monkeypatch.setattr(protocol, "read_machine", lambda: elsewhere)
    assert litezoo("bench", "--repro", name, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["agrees"] is False and shown["same_machine"] is False


def test_what_a_row_needs_to_be_measured_again_is_named(here, for_cpu, measured):
    append_rows([ROW, row(weights="random", batch=3)], here / "benchmarks" / "results")
    with pytest.raises(MissingError, match=r"repvgg_a0/cpu is not there; make it: litezoo export "
                       r"repvgg_a0 --device cpu$"):  # fmt: skip
        repeat(ROW.id)
    with pytest.raises(MissingError, match=r"--weights random --calibration random --yes-really$"):
        repeat(row(weights="random", batch=3).id)
    with pytest.raises(UsageError, match="has no row whose id begins with 'zz'"):
        repeat("zz")
    with pytest.raises(UsageError, match="has no row whose id begins with ''"):
        repeat("")
    with pytest.raises(MissingError, match=r"has no repvgg_a0 pytorch fp32 train \(it has repvgg_"):
        repeat(ROW.id, folder=for_cpu)
    assert litezoo("bench", "--repro", "abc", for_cpu, for_cpu) == 2


def test_two_things_at_once_are_refused(here, capsys):
    assert litezoo("bench", "--check", "--repro", "abc") == 2
    assert "--check and --repro are different things; ask for one" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _threads_as_before():
    yield
    torch.set_num_threads(1)
