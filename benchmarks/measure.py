"""Measuring latency: the protocol, the sessions, the rows.

Protocol "interleaved-3". Every candidate is warmed up until steady: blocks of 0.1 s or more until
two block medians in a row differ by less than 5 %, at most 3 s. Then rounds: in each, every
candidate runs one block of 0.2 s or more, in an order shuffled anew, with 80 ms of idle before it
so that one library's spinning threads do not meet the next; at least 5 rounds, and on until each
candidate has 1 s and 50 runs, or 5 s. A meter watches each block (see disturbance.py); one that
other programs, the host or heat disturbed runs again, at most 3 times. Times are wall clock of one
call with the batch in host memory. The process is pinned to as many CPUs as there are threads.

A ratio is that of the least block medians, in images a second: what disturbs only ever adds time.
Its interval says where a second bench of the same machine is expected: the 95 % interval of a
bootstrap over rounds, widened by what runs of one machine differ by though nothing disturbs them
(`REPEATS`: how memory is laid out, which neighbours the host has).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from litezoo.export.artifact import (
    MANIFEST,
    Accuracy,
    Artifact,
    Engine,
    LoadedArtifact,
    load_session,
    read_artifact,
)
from litezoo.export.runtime import Array, Session, get_runtime
from litezoo.models.errors import MissingError, UsageError
from litezoo.models.files import file_sha256
from litezoo.recipes.devices import get_device

from .disturbance import Conditions, Quiet, conditions_of, run_quietly
from .machine import Machine, read_machine, usable_cpus
from .rows import STRICT
from .sessions import PHOTO, EndToEnd, Nothing, Streams

__all__ = [
    "PROTOCOL",
    "Candidate",
    "Measurement",
    "Timed",
    "block",
    "candidates_of",
    "empty_session_us",
    "interleave",
    "interval",
    "measure",
    "pinned",
    "rank",
    "spread",
]

PROTOCOL = "interleaved-3"
SCHEMA = 3
BLOCK_S, IDLE_S = 0.2, 0.08
MIN_ROUNDS, MIN_SECONDS, MIN_RUNS = 5, 1.0, 50
MOST_SECONDS = 5.0  # of one candidate, past which 50 runs are not waited for
WARMUP_BLOCK_S, WARMUP_LIMIT_S, STEADY = 0.1, 3.0, 0.05
#: By how much ratios of two undisturbed runs of one machine may differ beyond their rounds.
REPEATS = 0.15
OUTLIER = 2.0
_RESAMPLES, _CONFIDENCE_PERCENT = 2000, 95
#: Blocks of the empty session: a fiftieth of a second holds tens of thousands of calls.
EMPTY_BLOCK_S, _EMPTY_BLOCKS = 0.02, 9

Scope = Literal["engine", "end-to-end"]
Medians = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of benchmarks/results/<device>.jsonl; times in milliseconds per call of a batch.

    `artifact_sha256` is that of the artifact's manifest. `streams` callers run at once, each its
    own batch on its share of the threads; times are of one caller's calls, `images_per_s` of all.
    `scope` "engine" takes a float batch in host memory, "end-to-end" decoded photos through the
    artifact's preprocessing. `best_ms` is the least block median and `ratio` this row's speed over
    that of its model's first candidate, by the least block medians (above 1 is faster);
    `ratio_low` to `ratio_high` is where a second bench is expected to find it. `spread` is the
    distance of the quartiles of the block medians over their median, `steady` whether warming up
    ended because times were steady, `outliers` the calls of more than twice their block's median
    (they count in the percentiles, not in `best_ms` or `ratio`), `harness_us` a call of a session
    that does nothing, `flops_percent` and `bytes_percent` what is reached of the machine's measured
    ceilings, `top1_data` the images that the top-1 is of and the number of classes, and `refused`
    why the row is not to be published. Rows of older schemas lack what has a default.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    model: str
    artifact_sha256: str
    weights: str
    device: str
    runtime: str
    precision: str
    graph_form: str
    batch: int
    resolution: tuple[int, int, int]
    threads: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    ratio: float
    ratio_to: str
    spread: float
    runs: int
    seconds: float
    top1_percent: float | None
    machine: Machine
    protocol: str
    date: str
    streams: int = 1
    scope: Scope = "engine"
    best_ms: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    steady: bool | None = None
    outliers: int | None = None
    harness_us: float | None = None
    flops_percent: float | None = None
    bytes_percent: float | None = None
    top1_data: str = ""
    conditions: Conditions | None = None
    refused: str = ""
    schema: int = SCHEMA

    @property
    def label(self) -> str:
        """Return e.g. "openvino fp32 deploy", with what is not usual: ", 2 streams"."""
        label = f"{self.runtime} {self.precision} {self.graph_form}"
        return label + _unusual(self.scope, self.streams)

    @property
    def id(self) -> str:
        """Return ten hex digits that name this row, whatever file it is in."""
        names = (
            self.device, self.machine.cpu, self.model, self.label, self.weights, self.resolution,
            self.batch, self.threads, self.protocol, self.date, self.p50_ms,
        )  # fmt: skip
        return hashlib.sha256(repr(names).encode()).hexdigest()[:10]


def _unusual(scope: Scope, streams: int) -> str:
    what = "" if scope == "engine" else f" {scope}"
    return what + ("" if streams == 1 else f", {streams} streams")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to measure: a session and what a row has to say of it.

    `session` takes batches of `scope`; `onnx` is the file that the engine was made from.
    """

    artifact: Artifact
    artifact_sha256: str
    runtime: str
    precision: str
    graph_form: str
    session: Session
    weights: str
    top1_percent: float | None = None
    top1_data: str = ""
    streams: int = 1
    scope: Scope = "engine"
    onnx: Path | None = None

    @property
    def label(self) -> str:
        """Return e.g. "repvgg_a0 openvino fp32 deploy"."""
        label = f"{self.artifact.model} {self.runtime} {self.precision} {self.graph_form}"
        return label + _unusual(self.scope, self.streams)

    def batch(self, size: int, *, seed: int) -> NDArray[Any]:
        """Return noise of the shape that the session takes."""
        rng = np.random.default_rng(seed)
        channels, height, width = self.artifact.preprocess.input_size
        if self.scope == "engine":
            return rng.standard_normal((size, channels, height, width), dtype=np.float32)
        return rng.integers(0, 256, (size, *PHOTO, channels), dtype=np.uint8)


def check_conditions(
    *, batches: Sequence[int], threads: int | Sequence[int], streams: Sequence[int] = (1,)
) -> None:
    """Refuse batch sizes, and numbers of threads and streams, that cannot be."""
    counts = [threads] if isinstance(threads, int) else threads
    for batch in batches:
        if batch < 1 or min(counts) < 1:
            raise UsageError(
                f"batch is {batch} and threads {min(counts)}; both need to be 1 or more"
            )
    if min(streams) < 1 or max(streams) > min(counts):
        raise UsageError(
            f"streams are {', '.join(map(str, streams))}; give 1 to {min(counts)}, as many as "
            "there are threads: each takes its share of them"
        )


def top1_data(accuracy: Accuracy | None, artifact: Artifact) -> str:
    """Return what an artifact's accuracy is of, e.g. "digits (val), 10 classes"."""
    return "" if accuracy is None else f"{accuracy.data}, {artifact.num_classes} classes"


def candidates_of(
    folder: Path, *, threads: int, streams: Sequence[int] = (1,), end_to_end: bool = False
) -> list[Candidate]:
    """Load every engine of an artifact that can run here, after checking its hashes.

    Each number of `streams` is a candidate of its own; with `end_to_end` the first engine is there
    with its preprocessing too.
    """
    artifact = read_artifact(folder)
    device = get_device(artifact.device)
    sha256 = file_sha256(folder / MANIFEST)
    candidates, reasons = [], list(artifact.not_built.values())
    for engine in artifact.engines:
        if (reason := get_runtime(engine.runtime).missing(device)) is not None:
            reasons.append(reason)
            continue
        first = Candidate(
            artifact=artifact,
            artifact_sha256=sha256,
            runtime=engine.runtime,
            precision=engine.precision,
            graph_form=artifact.graph_form,
            session=load_session(folder, artifact, engine, threads=threads),
            weights="random" if artifact.weights == "random" else "trained",
            top1_percent=engine.accuracy.top1_percent if engine.accuracy else None,
            top1_data=top1_data(engine.accuracy, artifact),
            onnx=folder / artifact.onnx[_form(artifact, engine)],
        )
        for count in streams:
            if count == 1:
                candidates.append(first)
                continue
            own = [
                load_session(folder, artifact, engine, threads=threads // count)
                for _ in range(count)
            ]
            candidates.append(dataclasses.replace(first, session=Streams(own), streams=count))
        if end_to_end and not any(one.scope == "end-to-end" for one in candidates):
            whole = EndToEnd(LoadedArtifact(artifact, engine, first.session))
            candidates.append(dataclasses.replace(first, session=whole, scope="end-to-end"))
    if not candidates:
        raise MissingError(f"{folder} has no engine that can run here: {'; '.join(reasons)}")
    return candidates


def _form(artifact: Artifact, engine: Engine) -> str:
    """Return the form of the ONNX file that an engine is, or was built from; fp32 in doubt."""
    forms = [form for form, file in artifact.onnx.items() if file in engine.files]
    forms += [form for form in artifact.onnx if f".{form}." in engine.files[0]]
    return forms[0] if forms else "fp32"


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this process on its first `threads` CPUs meanwhile, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    _set_affinity(set(usable_cpus()[:threads]))
    try:
        yield
    finally:
        _set_affinity(before)


def _set_affinity(cpus: set[int]) -> None:
    """Pin every thread of this process: a runtime's were started when its engine was loaded."""
    os.sched_setaffinity(0, cpus)
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        with suppress(ProcessLookupError):  # it may end meanwhile
            os.sched_setaffinity(int(task.name), cpus)


def block(session: Session, images: Array, seconds: float) -> list[float]:
    """Run for `seconds` or one call, whichever is longer; return each call's time in ms."""
    if isinstance(session, Streams):
        return session.together(lambda own: block(own, images, seconds))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(images)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _warm_up(session: Session, images: Array) -> bool:
    """Run until two block medians in a row differ by less than `STEADY`; return if they did."""
    end = time.perf_counter() + WARMUP_LIMIT_S
    previous = float("inf")
    while time.perf_counter() < end:
        median = float(np.median(block(session, images, WARMUP_BLOCK_S)))
        if abs(median - previous) < STEADY * previous:
            return True
        previous = median
    return False


@dataclass(kw_only=True)
class Timed:
    """The blocks of one session in an interleaved run: each call's time in ms, by round."""

    steady: bool
    blocks: list[Quiet[list[float]]] = dataclasses.field(default_factory=list)

    @property
    def times(self) -> Medians:
        """Return the times in ms of all calls."""
        return np.concatenate([np.asarray(one.value) for one in self.blocks])

    @property
    def medians(self) -> Medians:
        """Return the block medians in ms, one a round."""
        return np.array([np.median(one.value) for one in self.blocks])

    @property
    def outliers(self) -> int:
        """Return how many calls took more than `OUTLIER` times their block's median."""
        pairs = zip(self.blocks, self.medians, strict=True)
        return sum(int(time > OUTLIER * median) for one, median in pairs for time in one.value)

    def is_enough(self) -> bool:
        """Whether no further round is needed."""
        seconds = float(self.times.sum()) / 1e3 if self.blocks else 0.0
        is_long = bool(self.blocks) and len(self.times) >= MIN_RUNS and seconds >= MIN_SECONDS
        return len(self.blocks) >= MIN_ROUNDS and (is_long or seconds >= MOST_SECONDS)


def interleave(
    runs: Sequence[tuple[str, Session, Array]],
    *,
    threads: int,
    seed: int,
    progress: Callable[[str], None],
) -> list[Timed]:
    """Measure sessions in interleaved rounds; a run is (label, session, batch)."""
    rng = random.Random(seed)
    found: list[Timed] = []
    with pinned(threads):
        for label, session, images in runs:
            progress(f"batch {len(images)}: warming up {label}")
            found.append(Timed(steady=_warm_up(session, images)))
        while not all(one.is_enough() for one in found):
            number = len(found[0].blocks) + 1
            progress(f"batch {len(runs[0][2])}: round {number}, {len(runs)} engines")
            for index in rng.sample(range(len(runs)), len(runs)):
                time.sleep(IDLE_S)
                _, session, images = runs[index]
                found[index].blocks.append(run_quietly(partial(block, session, images, BLOCK_S)))
    return found


def empty_session_us(threads: int) -> float:
    """Return the median time of a session that does nothing, in microseconds."""
    nothing, one = Nothing(), np.zeros(1, np.float32)
    with pinned(threads):
        times = [t for _ in range(_EMPTY_BLOCKS) for t in block(nothing, one, EMPTY_BLOCK_S)]
    return float(f"{1e3 * float(np.median(times)):.4g}")


def spread(medians: Medians) -> float:
    """Return the distance of the quartiles of block medians over their median."""
    low, middle, high = np.percentile(medians, (25, 50, 75))
    return round(float((high - low) / middle), 3)


def interval(
    statistic: Callable[[NDArray[np.int64]], Medians], rounds: int, *, seed: int = 0
) -> tuple[float, float]:
    """Return a statistic's 95 % interval by bootstrap over rounds.

    `statistic` takes rounds drawn with replacement (resamples, rounds) and returns its values
    (resamples,).
    """
    rng = np.random.default_rng(seed)
    values = statistic(rng.integers(0, rounds, (_RESAMPLES, rounds)))
    edge = (100 - _CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(values, (edge, 100 - edge))
    return float(low), float(high)


def _least_ratio(base: Medians, own: Medians) -> tuple[float, float, float]:
    """Return the ratio of two sessions' least block medians, and where a second bench finds it."""
    low, high = interval(lambda drawn: base[drawn].min(axis=1) / own[drawn].min(axis=1), len(own))
    return float(base.min() / own.min()), low / (1 + REPEATS), high * (1 + REPEATS)


def rank(
    sessions: Mapping[str, Session],
    batch: Array,
    *,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Mapping[str, float]:
    """Measure sessions by label in one interleaved run on one batch: milliseconds a batch.

    The least of a session's block medians, which a busy machine changes least.
    """
    found = interleave(
        [(label, session, batch) for label, session in sessions.items()],
        threads=threads or len(usable_cpus()),
        seed=0,
        progress=progress,
    )
    return {
        label: round(float(one.medians.min()), 4)
        for label, one in zip(sessions, found, strict=True)
    }


def measure(
    candidates: Sequence[Candidate],
    *,
    batch: int,
    threads: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Measurement]:
    """Measure all candidates at one batch size in interleaved rounds; one row each, in order."""
    if not candidates:
        raise UsageError("nothing to measure; give the folder of an artifact")
    check_conditions(batches=[batch], threads=threads)
    machine, harness_us = read_machine(), empty_session_us(threads)
    found = interleave(
        [(one.label, one.session, one.batch(batch, seed=seed)) for one in candidates],
        threads=threads,
        seed=seed,
        progress=progress,
    )
    date = datetime.now(UTC).isoformat(timespec="seconds")
    models = [one.artifact.model for one in candidates]
    bases = [models.index(model) for model in models]
    return [
        _row(
            candidate,
            found[index],
            candidates[base],
            found[base],
            batch=batch,
            threads=threads,
            machine=machine,
            date=date,
            harness_us=harness_us,
        )
        for index, (candidate, base) in enumerate(zip(candidates, bases, strict=True))
    ]


def _row(
    candidate: Candidate,
    own: Timed,
    base: Candidate,
    of_base: Timed,
    *,
    batch: int,
    threads: int,
    machine: Machine,
    date: str,
    harness_us: float,
) -> Measurement:
    times = own.times
    p50, p90, p99 = np.percentile(times, (50, 90, 99))
    ratio, low, high = _least_ratio(of_base.medians / base.streams, own.medians / candidate.streams)
    return Measurement(
        model=candidate.artifact.model,
        artifact_sha256=candidate.artifact_sha256,
        weights=candidate.weights,
        device=candidate.artifact.device,
        runtime=candidate.runtime,
        precision=candidate.precision,
        graph_form=candidate.graph_form,
        batch=batch,
        resolution=candidate.artifact.preprocess.input_size,
        threads=threads,
        p50_ms=round(float(p50), 4),
        p90_ms=round(float(p90), 4),
        p99_ms=round(float(p99), 4),
        images_per_s=round(1e3 * candidate.streams * batch / float(p50), 1),
        ratio=round(ratio, 3),
        ratio_low=round(low, 3),
        ratio_high=round(high, 3),
        ratio_to=base.label,
        spread=spread(own.medians),
        runs=len(times),
        seconds=round(float(times.sum()) / 1e3, 2),
        top1_percent=candidate.top1_percent,
        top1_data=candidate.top1_data,
        machine=machine,
        protocol=PROTOCOL,
        date=date,
        streams=candidate.streams,
        scope=candidate.scope,
        best_ms=round(float(own.medians.min()), 4),
        steady=own.steady,
        outliers=own.outliers,
        harness_us=harness_us,
        conditions=conditions_of(own.blocks),
    )
