"""Measuring latency: the protocol, the sessions, the rows.

Protocol "interleaved-2". Every candidate is warmed up until steady: blocks of 0.1 s or more until
two block medians in a row differ by less than 5 %, at most 3 s. Then rounds: in each, every
candidate runs one block of 0.2 s or more, in an order shuffled anew, with 80 ms of idle before it
so that one library's spinning threads do not meet the next; at least 5 rounds, and on until each
candidate has 1 s and 50 runs, or 5 s. A drift of the machine meets all candidates alike; ratios are
taken between block medians of the same round, and their median is given. Times are wall clock of
one call with the batch in host memory. The process is pinned to as many CPUs as there are threads.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from litezoo.export.artifact import MANIFEST, Artifact, load_session, read_artifact
from litezoo.export.runtime import Array, Session, get_runtime
from litezoo.models.errors import MissingError, UsageError
from litezoo.models.files import file_sha256
from litezoo.recipes.devices import get_device

from .machine import Machine, read_machine, usable_cpus

__all__ = [
    "PROTOCOL",
    "Candidate",
    "Measurement",
    "candidates_of",
    "measure",
    "rank",
]

PROTOCOL = "interleaved-2"
SCHEMA = 1
BLOCK_S, IDLE_S = 0.2, 0.08
MIN_ROUNDS, MIN_SECONDS, MIN_RUNS = 5, 1.0, 50
MOST_SECONDS = 5.0  # of one candidate, past which 50 runs are not waited for
WARMUP_BLOCK_S, WARMUP_LIMIT_S, STEADY = 0.1, 3.0, 0.05


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of benchmarks/results/<device>.jsonl; times in milliseconds per call of a batch.

    `artifact_sha256` is that of the artifact's manifest; `ratio` is the median of this row's speed
    over that of its model's first candidate in the same rounds (above 1 is faster), `spread` the
    distance of the quartiles of the block medians over their median.
    """

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
    schema: int = SCHEMA

    @property
    def label(self) -> str:
        """Return e.g. "openvino fp32 deploy"."""
        return f"{self.runtime} {self.precision} {self.graph_form}"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to measure: a session and what a row has to say of it."""

    artifact: Artifact
    artifact_sha256: str
    runtime: str
    precision: str
    graph_form: str
    session: Session
    weights: str
    top1_percent: float | None = None

    @property
    def label(self) -> str:
        """Return e.g. "repvgg_a0 openvino fp32 deploy"."""
        return f"{self.artifact.model} {self.runtime} {self.precision} {self.graph_form}"


def check_conditions(*, batches: Sequence[int], threads: int) -> None:
    """Refuse batch sizes and thread counts that cannot be."""
    for batch in batches:
        if batch < 1 or threads < 1:
            raise UsageError(f"batch is {batch} and threads {threads}; both need to be 1 or more")


def candidates_of(folder: Path, *, threads: int) -> list[Candidate]:
    """Load every engine of an artifact that can run here, after checking its hashes."""
    artifact = read_artifact(folder)
    device = get_device(artifact.device)
    sha256 = file_sha256(folder / MANIFEST)
    candidates, reasons = [], list(artifact.not_built.values())
    for engine in artifact.engines:
        if (reason := get_runtime(engine.runtime).missing(device)) is not None:
            reasons.append(reason)
            continue
        candidates.append(
            Candidate(
                artifact=artifact,
                artifact_sha256=sha256,
                runtime=engine.runtime,
                precision=engine.precision,
                graph_form=artifact.graph_form,
                session=load_session(folder, artifact, engine, threads=threads),
                weights="random" if artifact.weights == "random" else "trained",
                top1_percent=engine.accuracy.top1_percent if engine.accuracy else None,
            )
        )
    if not candidates:
        raise MissingError(f"{folder} has no engine that can run here: {'; '.join(reasons)}")
    return candidates


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
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


def _block(session: Session, images: Array, seconds: float) -> list[float]:
    """Run for `seconds` or one call, whichever is longer; return each call's time in ms."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(images)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _warm_up(session: Session, images: Array) -> None:
    end = time.perf_counter() + WARMUP_LIMIT_S
    previous = float("inf")
    while time.perf_counter() < end:
        median = float(np.median(_block(session, images, WARMUP_BLOCK_S)))
        if abs(median - previous) < STEADY * previous:
            return
        previous = median


def _interleave(
    runs: Sequence[tuple[str, Session, Array]],
    *,
    threads: int,
    seed: int,
    progress: Callable[[str], None],
) -> list[list[list[float]]]:
    """Return the times in ms of every run's blocks; a run is (label, session, batch)."""
    rng = random.Random(seed)
    blocks: list[list[list[float]]] = [[] for _ in runs]
    with _pinned(threads):
        for label, session, images in runs:
            progress(f"batch {len(images)}: warming up {label}")
            _warm_up(session, images)
        while not all(_enough(own) for own in blocks):
            progress(f"batch {len(runs[0][2])}: round {len(blocks[0]) + 1}, {len(runs)} engines")
            for index in rng.sample(range(len(runs)), len(runs)):
                time.sleep(IDLE_S)
                blocks[index].append(_block(*runs[index][1:], BLOCK_S))
    return blocks


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
    blocks = _interleave(
        [(label, session, batch) for label, session in sessions.items()],
        threads=threads or len(usable_cpus()),
        seed=0,
        progress=progress,
    )
    return {
        label: round(min(float(np.median(block)) for block in own), 4)
        for label, own in zip(sessions, blocks, strict=True)
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
    machine, noise = read_machine(), np.random.default_rng(seed)
    blocks = _interleave(
        [
            (
                c.label,
                c.session,
                noise.standard_normal((batch, *c.artifact.preprocess.input_size), dtype=np.float32),
            )
            for c in candidates
        ],
        threads=threads,
        seed=seed,
        progress=progress,
    )
    medians = np.array([[np.median(block) for block in own] for own in blocks])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        _row(candidates, index, blocks[index], medians, batch, threads, machine, date)
        for index in range(len(candidates))
    ]


def _enough(own: list[list[float]]) -> bool:
    times = [time for block in own for time in block]
    seconds = sum(times) / 1e3
    is_long = len(times) >= MIN_RUNS and seconds >= MIN_SECONDS
    return len(own) >= MIN_ROUNDS and (is_long or seconds >= MOST_SECONDS)


def _row(
    candidates: Sequence[Candidate],
    index: int,
    own: list[list[float]],
    medians: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    batch: int,
    threads: int,
    machine: Machine,
    date: str,
) -> Measurement:
    candidate = candidates[index]
    models = [other.artifact.model for other in candidates]
    base = models.index(candidate.artifact.model)
    times = np.concatenate([np.asarray(block) for block in own])
    p50, p90, p99 = np.percentile(times, (50, 90, 99))
    low, middle, high = np.percentile(medians[index], (25, 50, 75))
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
        images_per_s=round(1e3 * batch / float(p50), 1),
        ratio=round(float(np.median(medians[base] / medians[index])), 3),
        ratio_to=candidates[base].label,
        spread=round(float((high - low) / middle), 3),
        runs=len(times),
        seconds=round(float(times.sum()) / 1e3, 2),
        top1_percent=candidate.top1_percent,
        machine=dataclasses.replace(machine),
        protocol=PROTOCOL,
        date=date,
    )
