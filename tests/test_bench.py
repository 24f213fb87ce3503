import dataclasses
import itertools
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_export import exported
from test_train import litezoo

from litezoo.benchmarks import machine as machine_module
from litezoo.benchmarks import measure as protocol
from litezoo.benchmarks.disturbance import Disturbance, Quiet
from litezoo.benchmarks.machine import Machine, read_machine, usable_cpus
from litezoo.benchmarks.measure import (
    Candidate,
    Measurement,
    candidates_of,
    interval,
    measure,
)
from litezoo.benchmarks.peers import peer_candidates, pytorch_candidates
from litezoo.benchmarks.results import (
    BEGIN,
    END,
    append_rows,
    latest,
    markdown_table,
    read_rows,
    refresh_readme,
)
from litezoo.benchmarks.sessions import Streams
from litezoo.export.artifact import read_artifact
from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.files import file_sha256

pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Clock:
    """Time that passes only where a session or a sleep says so; stands in for `time`."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch, quiet):
    clock = Clock()
    monkeypatch.setattr(protocol, "time", clock)
    monkeypatch.setattr(protocol, "empty_session_us", lambda threads: 0.25)
    return clock


class Scripted:
    """A session whose n-th call takes `duration(n)` milliseconds of the clock."""

    def __init__(self, clock, duration):
        self.clock, self.duration = clock, duration
        self.times, self.starts, self.batches = [], [], []

    def run(self, batch):
        took = self.duration(len(self.times))
        self.starts.append(self.clock.now)
        self.batches.append(batch)
        self.times.append(took)
        self.clock.now += took / 1e3
        return np.zeros((len(batch), 10), np.float32)


@pytest.fixture
def candidate(for_cpu, clock):
    """Return a candidate with scripted times."""

    def make(duration, *, runtime="onnxruntime", form="deploy"):
        session = Scripted(clock, duration if callable(duration) else lambda _: duration)
        return Candidate(
            artifact=read_artifact(for_cpu),
            artifact_sha256="ab" * 32,
            runtime=runtime,
            precision="fp32",
            graph_form=form,
            session=session,
            weights="trained",
            top1_percent=98.5,
        )

    return make


# --------------------------------------------------------------------------------------- measuring


def test_a_row_says_what_was_measured_and_how(candidate):
    first, second = candidate(4.0, runtime="pytorch", form="train"), candidate(2.0)
    rows = measure([first, second], batch=3, threads=1)
    assert [row.label for row in rows] == ["pytorch fp32 train", "onnxruntime fp32 deploy"]
    row = rows[1]
    assert (row.model, row.device, row.weights) == ("repvgg_tiny", "cpu", "trained")
    assert (row.runtime, row.precision, row.graph_form) == ("onnxruntime", "fp32", "deploy")
    assert (row.batch, row.resolution, row.threads) == (3, (1, 32, 32), 1)
    assert row.artifact_sha256 == "ab" * 32 and row.top1_percent == 98.5
    assert row.ratio_to == "repvgg_tiny pytorch fp32 train"
    assert row.protocol == "interleaved-3" and row.date.endswith("+00:00")
    assert row.p50_ms == row.p90_ms == row.p99_ms == pytest.approx(2.0)
    assert row.images_per_s == pytest.approx(3 / 2e-3)
    assert (rows[0].ratio, row.ratio) == (1.0, 2.0)
    assert (row.ratio_low, row.ratio_high) == pytest.approx((2 / 1.15, 2 * 1.15), abs=1e-3)
    assert row.spread == 0 and row.best_ms == pytest.approx(2.0) and row.steady
    assert row.harness_us == 0.25
    assert (row.streams, row.scope, row.refused, row.schema) == (1, "engine", "", 3)
    assert row.conditions.blocks == 5 and row.conditions.disturbed_blocks == 0
    assert dataclasses.asdict(row.machine) == {
        **dataclasses.asdict(read_machine()),
        "load_1min": row.machine.load_1min,
    }


def test_the_network_gets_batches_of_its_own_shape(candidate):
    one = candidate(5.0)
    measure([one], batch=7, threads=1)
    shapes = {batch.shape for batch in one.session.batches}
    assert shapes == {(7, 1, 32, 32)}
    assert all(batch.dtype == np.float32 for batch in one.session.batches)


def measured(session, row):
    """Return the calls of a session that count, its last `row.runs`."""
    return session.times[-row.runs :]


def test_percentiles_are_those_of_the_calls_after_warming_up(candidate):
    times = np.random.default_rng(0).lognormal(1, 0.5, 5000)
    one = candidate(lambda n: float(times[n]))
    (row,) = measure([one], batch=2, threads=1)
    own = measured(one.session, row)
    p50, p90, p99 = np.percentile(own, (50, 90, 99))
    assert (row.p50_ms, row.p90_ms, row.p99_ms) == pytest.approx((p50, p90, p99), abs=1e-4)
    assert row.p50_ms < row.p90_ms < row.p99_ms
    assert row.seconds == pytest.approx(sum(own) / 1e3, abs=0.01)
    assert row.images_per_s == pytest.approx(2e3 / p50, rel=1e-3)


@pytest.mark.parametrize("duration", [0.01, 1.0, 15.0, 30.0, 300.0])
def test_each_candidate_has_five_rounds_and_fifty_runs_or_five_seconds(candidate, duration):
    slow, fast = candidate(duration), candidate(duration / 3)
    rounds = []
    rows = measure([slow, fast], batch=1, threads=1, progress=rounds.append)
    for row in rows:
        assert (row.runs >= 50 and row.seconds >= 1.0) or row.seconds >= 5.0
    count = max(int(re.search(r"round (\d+)", step)[1]) for step in rounds if "round" in step)
    assert count >= 5

    # and no more rounds than that takes: each block is 0.2 s or one call
    def rounds_of(own):
        per_round = max(1, round(200 / own))
        return min(-(-50 // per_round), round(5e3 / (per_round * own)))

    needed = max(5, rounds_of(duration), rounds_of(duration / 3))
    assert count <= needed + 1


def test_every_candidate_runs_in_every_round_in_an_order_shuffled_anew(candidate, clock):
    candidates = [candidate(10.0) for _ in range(4)]
    order = []
    for number, one in enumerate(candidates):
        right = one.session.run

        def run(batch, number=number, right=right):
            order.append((clock.now, number))
            return right(batch)

        one.session.run = run
    steps = []
    measure(candidates, batch=1, threads=1, progress=lambda s: steps.append((clock.now, s)))
    starts = [now for now, step in steps if "round" in step] + [float("inf")]
    orders = []
    for begin, end in itertools.pairwise(starts):
        numbers = [number for now, number in order if begin <= now < end]
        blocks = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n]
        assert sorted(blocks) == [0, 1, 2, 3]  # one block each
        orders.append(tuple(blocks))
    assert len({*orders}) > 1


def test_before_every_block_there_is_a_pause(candidate, clock):
    steps = []
    measure([candidate(10.0), candidate(10.0)], batch=1, threads=1, progress=steps.append)
    rounds = [step for step in steps if "round" in step]
    assert clock.slept == [0.08] * (2 * len(rounds))


def test_a_ratio_is_that_of_the_least_block_medians(candidate, monkeypatch):
    monkeypatch.setattr(protocol, "MIN_SECONDS", 0.9)  # five blocks of 0.2 s but for rounding
    rounds = []

    def in_round(*durations):
        return lambda _: durations[max(0, len(rounds) - 1)]

    first, second = candidate(in_round(6, 4, 5, 8, 10)), candidate(in_round(2, 4, 6, 2, 5))

    def progress(step):
        if "round" in step:
            rounds.append(step)

    rows = measure([first, second], batch=1, threads=1, progress=progress)
    assert len(rounds) == 5
    assert rows[1].ratio == 2.0 and [row.best_ms for row in rows] == [4.0, 2.0]
    assert rows[1].ratio_low < 1.1 and 3.0 < rows[1].ratio_high  # of some of the rounds
    assert rows[0].ratio_low <= 1 <= rows[0].ratio_high


def test_what_disturbs_some_rounds_does_not_move_the_ratio(candidate, clock):
    # the machine slows down threefold meanwhile; the second is twice as fast at any moment
    def drift():
        return 1 + 2 * min(1.0, max(0.0, (clock.now - 1002) / 4))

    first, second = candidate(lambda _: 8 * drift()), candidate(lambda _: 4 * drift())
    rows = measure([first, second], batch=1, threads=1)
    assert rows[1].ratio == pytest.approx(2.0, rel=0.1)
    assert rows[0].spread > 0.1


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=9), st.integers(0, 99))
def test_an_interval_is_around_what_is_drawn(medians, seed):
    own = np.array(medians)
    low, high = interval(lambda drawn: own[drawn].min(axis=1), len(own), seed=seed)
    assert min(medians) <= low <= high <= max(medians)


def test_an_interval_holds_the_mean_of_as_many_draws_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        own = rng.normal(5, 1, 30)
        low, high = interval(lambda drawn, own=own: own[drawn].mean(axis=1), 30, seed=seed)
        hits += low <= 5 <= high
    assert 175 <= hits <= 200


def test_a_block_that_was_disturbed_is_measured_again(candidate, monkeypatch):
    tries = []

    def twice(block):
        tries.append([block(), block()])
        none = Disturbance(seconds=0.2, cpus=(0,))
        return Quiet(value=tries[-1][1], disturbance=none, tries=2)

    monkeypatch.setattr(protocol, "run_quietly", twice)
    (row,) = measure([candidate(10.0)], batch=1, threads=1)
    assert row.conditions.reruns == len(tries) == row.conditions.blocks
    assert row.runs == sum(len(second) for _, second in tries)


def test_calls_far_above_their_blocks_median_are_counted(candidate):
    one = candidate(lambda n: 25.0 if n % 10 == 9 else 10.0)
    (row,) = measure([one], batch=1, threads=1)
    assert row.outliers == sum(time > 20 for time in measured(one.session, row)) > 0
    assert row.best_ms == 10.0 and row.p99_ms == pytest.approx(25.0)
    assert measure([candidate(10.0)], batch=1, threads=1)[0].outliers == 0


def test_times_that_do_not_become_steady_are_said(candidate):
    shaky, calm = candidate(lambda n: 150.0 * (1 + n % 2)), candidate(5.0)
    assert [row.steady for row in measure([shaky, calm], batch=1, threads=1)] == [False, True]


def test_an_empty_session_takes_what_the_harness_takes(monkeypatch):
    class Ticking:
        now = 0.0

        def perf_counter(self):
            self.now += 2e-6
            return self.now

    monkeypatch.setattr(protocol, "time", Ticking())
    assert protocol.empty_session_us(1) == pytest.approx(2.0)


def test_callers_that_run_at_once_share_the_time(candidate, clock):
    first = candidate(10.0)
    both = dataclasses.replace(first, session=Streams([first.session, first.session]), streams=2)
    rows = measure([first, both], batch=4, threads=2)
    assert [row.label for row in rows] == [
        "onnxruntime fp32 deploy",
        "onnxruntime fp32 deploy, 2 streams",
    ]
    assert rows[1].streams == 2
    assert rows[1].images_per_s == pytest.approx(2 * rows[0].p50_ms / rows[1].p50_ms
                                                 * rows[0].images_per_s, rel=1e-3)  # fmt: skip
    assert rows[1].ratio == pytest.approx(2 * rows[0].best_ms / rows[1].best_ms, rel=1e-3)


def test_each_caller_has_its_own_session_and_they_overlap():
    inside, most = [], []
    entered = threading.Barrier(3, timeout=20)

    class Slow:
        def run(self, batch):
            inside.append(self)
            entered.wait()  # all three are in `run`, or this breaks
            most.append(len({*inside}))
            return batch

    streams = Streams([Slow(), Slow(), Slow()])
    times = protocol.block(streams, np.zeros(1, np.float32), 0.0)
    assert len(times) == 3 and most == [3, 3, 3]
    assert streams.run(np.ones(2, np.float32)).tolist() == [1, 1]


def test_the_first_slow_calls_are_not_counted(candidate):
    one = candidate(lambda n: 400.0 / (n + 1) if n < 3 else 10.0)
    (row,) = measure([one], batch=1, threads=1)
    assert row.p99_ms == pytest.approx(10.0)
    assert {*measured(one.session, row)} == {10.0}
    assert len(one.session.times) - row.runs >= 2 * 10  # two steady blocks of 0.1 s


def test_warming_up_ends_after_three_seconds_though_unsteady(candidate, clock):
    one = candidate(lambda n: 150.0 * (1 + n % 2))
    begun = []
    measure(
        [one],
        batch=1,
        threads=1,
        progress=lambda s: begun.append(clock.now) if "round" in s else None,
    )
    assert 3.0 <= begun[0] - 1000 <= 3.0 + 0.3


def test_measuring_is_shown_step_by_step(candidate):
    steps = []
    measure([candidate(10.0)], batch=2, threads=1, progress=steps.append)
    assert steps[0] == "batch 2: warming up repvgg_tiny onnxruntime fp32 deploy"
    assert steps[1] == "batch 2: round 1, 1 engines"


@pytest.fixture
def all_cpus():
    """Every CPU that this machine lets us have: a parallel worker of pytest is kept on one."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    os.sched_setaffinity(0, before)


def test_the_process_is_kept_on_as_many_cpus_as_threads(candidate, all_cpus):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot pin a process")
    before = os.sched_getaffinity(0)
    seen = []
    one = candidate(10.0)
    right = one.session.run
    one.session.run = lambda batch: (seen.append(os.sched_getaffinity(0)), right(batch))[1]
    measure([one], batch=1, threads=1)
    assert all(cpus == {usable_cpus()[0]} for cpus in seen)
    assert os.sched_getaffinity(0) == before


def test_the_process_is_released_after_an_error(candidate):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot pin a process")
    before = os.sched_getaffinity(0)
    one = candidate(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure([one], batch=1, threads=1)
    assert os.sched_getaffinity(0) == before


def test_threads_that_a_runtime_started_before_are_pinned_too(candidate, all_cpus):
    if not hasattr(os, "sched_setaffinity") or len(usable_cpus()) < 2:
        pytest.xfail("needs a system that can pin, and two CPUs")
    done = threading.Event()
    worker = threading.Thread(target=done.wait, daemon=True)
    worker.start()
    seen = []
    one = candidate(10.0)
    right = one.session.run
    one.session.run = lambda batch: (
        seen.append(os.sched_getaffinity(worker.native_id)),
        right(batch),
    )[1]
    try:
        measure([one], batch=1, threads=1)
    finally:
        done.set()
    assert all(cpus == {usable_cpus()[0]} for cpus in seen)


def test_random_weights_are_marked_in_the_row(candidate):
    random = dataclasses.replace(candidate(10.0), weights="random")
    (row,) = measure([random], batch=1, threads=1)
    assert row.weights == "random"


def test_numbers_that_cannot_be_are_refused(candidate):
    for batch, threads in ((0, 1), (1, 0), (-1, 1), (1, -2)):
        with pytest.raises(UsageError) as caught:
            measure([candidate(1.0)], batch=batch, threads=threads)
        assert str(caught.value) == (
            f"batch is {batch} and threads {threads}; both need to be 1 or more"
        )
    with pytest.raises(UsageError, match="nothing to measure; give the folder of an artifact"):
        measure([], batch=1, threads=1)


# ------------------------------------------------------------------------------------- the machine


def test_the_machine_record_is_complete():
    machine = read_machine({"tensorrt": "10.13"})
    assert machine.cpu and machine.system and machine.governor
    assert machine.cores == len(usable_cpus()) >= 1
    assert machine.memory_gib > 0 and machine.load_1min >= 0
    assert {"python", "litezoo", "torch", "onnxruntime", "openvino"} < {*machine.versions}
    assert machine.versions["tensorrt"] == "10.13"
    assert all(machine.versions.values())


X86 = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse avx2 fma avx512f avx512_vnni amx_bf16 avx512cd
processor\t: 1
model name\t: Some CPU @ 2.00GHz
"""


def test_the_machine_is_read_from_the_system(monkeypatch):
    files = {
        "/proc/cpuinfo": X86,
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    }
    monkeypatch.setattr(machine_module, "_read", lambda path: files.get(path, ""))
    machine = read_machine()
    assert machine.cpu == "Some CPU @ 2.00GHz" and machine.governor == "performance"
    assert machine.isa == ("avx2", "fma", "avx512f", "avx512_vnni", "amx_bf16")


def test_what_the_system_does_not_say_is_unknown(monkeypatch):
    monkeypatch.setattr(machine_module, "_read", lambda path: "")
    machine = read_machine()
    assert machine.governor == "unknown" and machine.isa == () and machine.cpu


# --------------------------------------------------------------------------------------- the store

ROW = Measurement(
    model="repvgg_a0",
    artifact_sha256="cd" * 32,
    weights="trained",
    device="cpu",
    runtime="openvino",
    precision="fp32",
    graph_form="deploy",
    batch=1,
    resolution=(3, 224, 224),
    threads=2,
    p50_ms=8.125,
    p90_ms=8.5,
    p99_ms=9.75,
    images_per_s=123.1,
    ratio=2.5,
    ratio_to="repvgg_a0 pytorch fp32 train",
    spread=0.01,
    runs=120,
    seconds=1.01,
    top1_percent=None,
    machine=Machine(
        cpu="Some CPU",
        cores=2,
        isa=("avx2", "fma"),
        governor="performance",
        memory_gib=8.0,
        system="Linux x86_64",
        load_1min=0.5,
        versions={"python": "3.12.1", "openvino": "2025.1"},
    ),
    protocol="interleaved-2",
    date="2026-01-02T03:04:05+00:00",
)


def row(**values):
    return dataclasses.replace(ROW, **values)


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [ROW, row(batch=32, top1_percent=72.4), row(device="t4"), row(runtime="pytorch")]
    files = append_rows(rows, tmp_path / "new" / "results")
    assert [file.name for file in files] == ["cpu.jsonl", "t4.jsonl"]
    assert read_rows(files) == [rows[0], rows[1], rows[3], rows[2]]
    assert len(files[0].read_text().splitlines()) == 3


def test_older_lines_are_kept(tmp_path):
    (file,) = append_rows([ROW], tmp_path)
    before = file.read_text()
    append_rows([row(batch=8)], tmp_path)
    assert file.read_text().startswith(before)
    assert read_rows([file]) == [ROW, row(batch=8)]


def test_a_line_holds_plain_json_with_its_units(tmp_path):
    (file,) = append_rows([ROW], tmp_path)
    values = json.loads(file.read_text())
    assert values["p50_ms"] == 8.125 and values["schema"] == 3
    assert values["machine"]["versions"] == {"python": "3.12.1", "openvino": "2025.1"}


DAMAGED = {
    "half a line": lambda line: line[: len(line) // 2],
    "no json": lambda line: "hello",
    "empty": lambda line: "",
    "a number": lambda line: "3",
    "another schema": lambda line: line.replace('"schema": 3', '"schema": 7'),
    "a field too few": lambda line: line.replace('"runs": 120, ', ""),
    "a field too many": lambda line: line.replace('"runs": 120', '"runs": 120, "x": 1'),
    "not a number": lambda line: line.replace('"p50_ms": 8.125', '"p50_ms": NaN'),
    "another type": lambda line: line.replace('"batch": 1', '"batch": "1"'),
    "a machine too few": lambda line: line.replace('"cores": 2, ', ""),
}


@pytest.mark.parametrize(
    "kind",
    DAMAGED,
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path, kind):
    (file,) = append_rows([ROW, ROW, ROW], tmp_path)
    lines = file.read_text().splitlines()
    spoilt = DAMAGED[kind](lines[1])
    assert spoilt != lines[1]
    file.write_text("\n".join([lines[0], spoilt, lines[2]]) + "\n")
    with pytest.raises(CheckFailed) as caught:
        read_rows([file])
    assert str(caught.value).startswith(f"{file}:2 is not a result row: ")


def test_rows_of_the_first_schema_are_read(tmp_path):
    (file,) = append_rows([ROW], tmp_path)
    values = json.loads(file.read_text())
    fields = dataclasses.fields(Measurement)
    new = [f.name for f in fields if f.default is not dataclasses.MISSING]
    file.write_text(json.dumps({k: v for k, v in values.items() if k not in new} | {"schema": 1}))
    assert read_rows([file]) == [row(schema=1)]


def test_a_row_has_a_name_of_its_own(tmp_path):
    elsewhere = dataclasses.replace(ROW.machine, cpu="Another")
    changes = {"batch": 2, "p50_ms": 8.126, "streams": 2, "date": "2026-01-02",
               "scope": "end-to-end", "machine": elsewhere}  # fmt: skip
    others = [row(**{key: value}) for key, value in changes.items()]
    ids = [one.id for one in [ROW, *others]]
    assert len({*ids}) == 7 and all(re.fullmatch("[0-9a-f]{10}", one) for one in ids)
    (file,) = append_rows([ROW, *others], tmp_path)
    assert [one.id for one in read_rows([file])] == ids


def test_a_results_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no results .*none\.jsonl; measure first: litezoo bench"):
        read_rows([tmp_path / "none.jsonl"])


def test_the_newest_row_of_each_set_of_conditions_counts():
    rows = [ROW, row(batch=8), row(p50_ms=7.0), row(batch=8, p50_ms=50.0)]
    assert latest(rows) == rows[2:]


def test_an_older_row_read_later_does_not_count():
    old = row(date="2020-01-01T00:00:00+00:00", p50_ms=1.0)
    assert latest([ROW, old]) == [ROW]


@pytest.mark.parametrize(
    "values",
    [
        {"device": "t4"},
        {"model": "repvgg_a1"},
        {"resolution": (3, 32, 32)},
        {"runtime": "onnxruntime"},
        {"precision": "fp16"},
        {"graph_form": "train"},
        {"batch": 2},
        {"threads": 1},
        {"streams": 2},
        {"scope": "end-to-end"},
        {"weights": "elsewhere"},
        {"protocol": "another"},
        {"ratio_to": "repvgg_a0 another"},
        {"machine": dataclasses.replace(ROW.machine, cpu="Another")},
    ],
    ids=lambda values: next(iter(values)),
)
def test_rows_of_different_conditions_are_never_joined(values):
    assert latest([ROW, row(**values)]) == [ROW, row(**values)]


def test_the_table_has_the_fastest_of_each_model_batch_and_number_of_threads():
    eager = row(runtime="pytorch-eager", graph_form="train", images_per_s=49.0, ratio=1.0)
    other = row(model="repvgg_a1", threads=1)
    text = markdown_table([eager, row(images_per_s=99.0), ROW, row(batch=32), other])
    lines = text.splitlines()
    assert lines[0] == (
        "| device | model | input | batch 1, 2 threads | batch 1, 1 thread | batch 32, 2 threads |"
    )
    assert lines[2] == (
        "| cpu | repvgg_a0 | 3x224x224 | 8.12 ms, 2.5x (openvino fp32) | - "
        "| 123/s, 2.5x (openvino fp32) |"
    )
    assert lines[3].startswith("| cpu | repvgg_a1 | 3x224x224 | - | 8.12 ms") and lines[4] == ""
    assert {line.count("|") for line in lines[:4]} == {7}
    assert lines[5] == (
        "cpu: Some CPU, 2 cores (avx2, fma), python 3.12.1, openvino 2025.1, protocol "
        "interleaved-2, 2026-01-02."
    )
    assert len(lines) == 6  # one line for the one machine


def test_the_table_begins_with_the_fastest_network_and_leaves_out_what_few_were_measured_at():
    names = [f"net{number}" for number in range(5)]
    rows = [row(model=name, p50_ms=9.0 - place) for place, name in enumerate(names)]
    few = [row(model=names[0], batch=batch) for batch in (2, 4)]
    lines = markdown_table([*rows, *few]).splitlines()
    assert lines[0] == "| device | model | input | batch 1, 2 threads |"
    assert [line.split(" | ")[1] for line in lines[2:7]] == names[::-1]
    assert "batch 2" in markdown_table([*rows, *(row(model=n, batch=2) for n in names[:2])])


# -------------------------------------------------------------------------------------- the README


@pytest.fixture
def readme(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"# litezoo\n\n{BEGIN}\nold table\n{END}\n\nThe end.\n")
    return file


def test_the_readmes_table_is_written_between_its_marks(readme):
    assert not refresh_readme(readme, [ROW], write=True)
    text = readme.read_text()
    assert text.startswith(f"# litezoo\n\n{BEGIN}\n\n| device |")
    assert text.endswith(f"\n\n{END}\n\nThe end.\n")
    assert markdown_table([ROW]) in text and "old table" not in text
    assert refresh_readme(readme, [ROW], write=True)
    assert readme.read_text() == text


def test_a_check_of_the_readme_changes_nothing(readme):
    before = readme.read_text()
    assert not refresh_readme(readme, [ROW], write=False)
    assert readme.read_text() == before
    refresh_readme(readme, [ROW], write=True)
    assert refresh_readme(readme, [ROW], write=False)
    assert not refresh_readme(readme, [row(p50_ms=1.0)], write=False)


@pytest.mark.parametrize("text", ["# litezoo\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n"])
def test_a_readme_without_marks_is_refused(readme, text):
    readme.write_text(text)
    with pytest.raises(UsageError, match=r"README\.md has no marks"):
        refresh_readme(readme, [ROW], write=True)
    assert readme.read_text() == text


def test_a_readme_that_is_out_of_date_ends_with_3(readme, capsys):
    (file,) = append_rows([ROW], readme.parent)
    assert litezoo("report", file, "--readme", readme, "--check") == 3
    assert capsys.readouterr().err == (
        f"litezoo: the results in {readme} are not up to date; run: make readme\n"
    )
    assert litezoo("report", file, "--readme", readme) == 0
    assert litezoo("report", file, "--readme", readme, "--check", "--json") == 0
    assert json.loads(capsys.readouterr().out.partition("rows\n")[2]) == {
        "written": str(readme),
        "rows": 1,
    }


# ------------------------------------------------------------------------------- engines for real


def test_engines_are_measured_beside_pytorch_in_both_forms(here, for_cpu, short, capsys):
    words = ("--pytorch", "--batch", 1, 3, "--threads", 1, "--results", "results", "--json")
    assert litezoo("bench", for_cpu, *words) == 0
    shown = json.loads(capsys.readouterr().out)
    rows = read_rows([here / "results" / "cpu.jsonl"])
    labels = [
        "pytorch-eager fp32 train",
        "pytorch-eager fp32 deploy",
        "pytorch-eager-channels-last fp32 deploy",
        "openvino fp32 deploy",
        "onnxruntime fp32 deploy",
        "ncnn fp32 deploy",
    ]
    assert [row.label for row in rows] == 2 * labels
    assert [row.batch for row in rows] == 6 * [1] + 6 * [3]
    assert len(shown["rows"]) == 12 and shown["rows"][6]["runtime"] == "pytorch-eager"
    assert all(row["p50_ms"] > 0 for row in shown["rows"])
    assert shown["ids"] == [row.id for row in rows]
    top1 = read_artifact(for_cpu).engines[0].accuracy.top1_percent
    for row in rows:
        assert row.artifact_sha256 == file_sha256(for_cpu / "manifest.json")
        assert row.top1_percent == top1 and row.weights == "trained"
        assert row.top1_data == "digits (val), 10 classes"
        assert row.resolution == (1, 32, 32) and row.threads == 1
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms and row.images_per_s > 0
        assert row.ratio > 0 and row.ratio_to == "repvgg_tiny pytorch-eager fp32 train"
    assert [row.ratio for row in rows[::6]] == [1.0, 1.0]


@pytest.fixture
def named(for_cpu, tmp_path):
    """Return the artifact under the name of another network: peers look at nothing else of it."""

    def name(model):
        copy = shutil.copytree(for_cpu, tmp_path / model)
        other = dataclasses.replace(read_artifact(copy), model=model)
        (copy / "manifest.json").write_text(other.to_json())
        return copy

    return name


def test_timms_network_computes_the_same_in_every_way(named):
    batch = np.random.default_rng(0).standard_normal((2, 1, 32, 32)).astype(np.float32)
    ways = ("eager", "onnxruntime", "openvino")
    peers = peer_candidates(named("repvgg_a0"), ways, threads=1)
    assert [peer.label for peer in peers] == [
        f"repvgg_a0 timm-{way} {'default' if way == 'openvino' else 'fp32'} {form}"
        for way in ways
        for form in ("train", "deploy")
    ]
    first, *others = [peer.session.run(batch) for peer in peers]
    assert first.shape == (2, 10)
    for other in others:
        assert np.abs(other - first).max() <= 1e-3 * np.abs(first).max()


def test_a_network_that_timm_lacks_is_torchvisions(named):
    folder = named("shufflenetv2_x0_5")
    with pytest.raises(UsageError, match="takes 3 channels, this artifact 1; measure it without"):
        peer_candidates(folder, ["eager"], threads=1)
    artifact = read_artifact(folder)
    colour = dataclasses.replace(artifact, preprocess=Preprocess(input_size=(3, 32, 32)))
    (folder / "manifest.json").write_text(colour.to_json())
    (peer,) = peer_candidates(folder, ["eager"], threads=1)
    assert peer.label == "shufflenetv2_x0_5 torchvision-eager fp32 train"
    assert peer.session.run(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)


def test_without_such_a_network_or_way_there_is_no_peer(named, capsys):
    with pytest.raises(UsageError, match="unknown peer 'eagre'; did you mean 'eager'"):
        peer_candidates(named("repvgg_a0"), ["eagre"], threads=1)
    assert litezoo("bench", named("shufflenetv1_g3_050"), "--peers", "--threads", 1) == 2
    assert "neither timm nor torchvision has shufflenetv1_g3_050" in capsys.readouterr().err


def test_peers_are_measured_before_the_engines_which_are_compared_with_them(named, here, short):
    words = ("--peers", "eager", "--batch", 1, "--threads", 1, "--results", "results")
    assert litezoo("bench", named("repvgg_a0"), *words) == 0
    rows = read_rows([here / "results" / "cpu.jsonl"])
    assert [row.runtime for row in rows[:3]] == ["timm-eager", "timm-eager", "openvino"]
    assert {row.ratio_to for row in rows} == {"repvgg_a0 timm-eager fp32 train"}


def test_the_table_ends_with_three_lines_that_use_the_engine(here, for_cpu, short, capsys):
    words = ("--batch", 1, "--threads", 1)
    assert litezoo("bench", for_cpu, *words) == 0
    text = capsys.readouterr().out
    assert "p50 ms" in text and "1.00x" in text
    assert "appended 3 rows to benchmarks/results/cpu.jsonl" in text
    snippet = text.partition("use it:\n")[2]
    lines = [line.strip() for line in snippet.strip().splitlines()]
    assert len(lines) == 3
    exec("\n".join(lines), {})
    assert re.fullmatch(r"\[\d\]", capsys.readouterr().out.strip())


def test_both_forms_of_pytorch_compute_the_same_as_the_engines(for_cpu):
    batch = np.random.default_rng(0).standard_normal((2, 1, 32, 32)).astype(np.float32)
    sessions = [c.session for c in pytorch_candidates(for_cpu, threads=1)]
    sessions += [c.session for c in candidates_of(for_cpu, threads=1)]
    assert len(sessions) == 6
    first, *others = [session.run(batch) for session in sessions]
    for other in others:
        assert np.abs(other - first).max() <= 1e-4 * np.abs(first).max()


def test_pytorch_is_measured_with_random_weights_where_the_checkpoint_is_gone(for_cpu, tmp_path):
    copy = shutil.copytree(for_cpu, tmp_path / "copy")
    moved = dataclasses.replace(read_artifact(copy), weights=str(tmp_path / "gone.ckpt"))
    (copy / "manifest.json").write_text(moved.to_json())
    train, deploy, channels_last = pytorch_candidates(copy, threads=1)
    assert (train.graph_form, deploy.graph_form) == ("train", "deploy")
    assert channels_last.runtime == "pytorch-eager-channels-last"
    assert train.session.run(np.zeros((2, 1, 32, 32), np.float32)).shape == (2, 10)


def test_random_weights_have_no_accuracy(for_cpu, tmp_path):
    copy = shutil.copytree(for_cpu, tmp_path / "copy")
    moved = dataclasses.replace(read_artifact(copy), weights=str(tmp_path / "gone.ckpt"))
    (copy / "manifest.json").write_text(moved.to_json())
    assert [c.top1_percent for c in pytorch_candidates(copy, threads=1)] == [None] * 3


def test_a_changed_engine_is_not_measured(for_cpu, tmp_path, capsys):
    copy = shutil.copytree(for_cpu, tmp_path / "copy")
    (copy / "openvino.fp32.bin").write_bytes(b"")
    words = ("--threads", 1, "--results", tmp_path / "results")
    assert litezoo("bench", copy, *words) == 3
    assert "openvino.fp32.bin was changed" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_kit_has_nothing_to_measure_here(tmp_path_factory):
    with pytest.raises(MissingError, match="has no engine that can run here: runtime 'tensorrt'"):
        candidates_of(exported(tmp_path_factory, "t4"), threads=1)


def test_exported_artifacts_are_found_by_device_and_model(here, for_cpu, short, capsys):
    assert litezoo("bench", "--device", "cpu") == 4
    text = capsys.readouterr().err
    assert text.endswith(
        "litezoo: nothing is exported for cpu; type: litezoo export --device cpu\n"
    )
    shutil.copytree(for_cpu, here / "artifacts" / "repvgg_tiny" / "cpu")
    words = ("--device", "cpu", "--threads", 1, "--batch", 1)
    assert litezoo("bench", *words) == 0
    assert litezoo("bench", *words, "--models", "repvgg_tiny") == 0
    assert len(read_rows([here / "benchmarks" / "results" / "cpu.jsonl"])) == 6
    assert litezoo("bench", *words, "--models", "repvgg_a1") == 4
    assert "type: litezoo export repvgg_a1 --device cpu" in capsys.readouterr().err
    assert litezoo("bench", *words, "--models", "repvg_a1") == 2
    assert "did you mean 'repvgg_a1'" in capsys.readouterr().err
    assert litezoo("bench", "nowhere") == 2
    assert "nowhere is no artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--batch", 0),
        ("--batch", -1),
        ("--batch", 1, 0),
        ("--threads", 0),
        ("--threads", 0, "--pytorch"),
        ("--threads", -1),
    ],
    ids=str,
)
def test_fewer_than_one_image_or_thread_is_refused(here, for_cpu, short, capsys, words):
    assert litezoo("bench", for_cpu, *words) == 2
    assert "both need to be 1 or more" in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.fixture(autouse=True)
def _threads_as_before():
    yield
    torch.set_num_threads(1)
