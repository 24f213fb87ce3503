"""Which engine is the fastest here, and with how many threads and which hint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .artifact import Engine
from .request import Ranker, Request, repeat_to
from .runtime import Array, Objective, Session, get_runtime

__all__ = ["fastest_first"]

#: Engines within this factor of the fastest are tuned, and no more than so many.
_CLOSE, _MOST = 1.5, 3


def fastest_first(
    folder: Path,
    engines: Sequence[Engine],
    sessions: Mapping[str, Session],
    images: Array,
    request: Request,
    rank: Ranker,
    progress: Callable[[str], None],
) -> tuple[Engine, ...]:
    """Return the engines with their times, the fastest first.

    All are measured beside each other as `request` says; on a CPU the fastest few then with other
    numbers of threads and hints too, in one more run, and keep what they were fastest with.
    """
    batch = repeat_to(images, request.batch)
    times = rank({engine.label: sessions[engine.label] for engine in engines}, batch)
    timed = sorted(
        (
            dataclasses.replace(engine, ms_per_batch=times[engine.label], batch=request.batch)
            for engine in engines
        ),
        key=lambda engine: times[engine.label],
    )
    if request.device.kind != "cpu":
        return tuple(timed)
    limit = _CLOSE * times[timed[0].label]
    close = [engine for engine in timed if times[engine.label] <= limit][:_MOST]
    variants = {
        variant.tuned_label: variant for own in close for variant in _variants(own, request)
    }
    if len(variants) == len(close):
        return tuple(timed)
    progress("measuring the fastest engines with other numbers of threads and hints")
    tried = {
        label: sessions[variant.label] if variant in close else _load(folder, variant, request)
        for label, variant in variants.items()
    }
    tuned_ms = rank(tried, batch)
    best = []
    for own in close:
        labels = [label for label, variant in variants.items() if variant.label == own.label]
        label = min(labels, key=lambda label: tuned_ms[label])
        best.append(dataclasses.replace(variants[label], ms_per_batch=tuned_ms[label]))
    rest = [engine for engine in timed if engine not in close]
    return tuple(sorted((*best, *rest), key=lambda engine: engine.ms_per_batch or 0.0))


def _variants(engine: Engine, request: Request) -> list[Engine]:
    """Return the engine with each number of threads and each hint that may be worth trying."""
    cores = os.cpu_count() or 1
    threads: tuple[int | None, ...] = (request.threads,)
    if request.threads is None:  # None is all cores; half of them where two share one's units
        threads = (None, *dict.fromkeys(n for n in (cores // 2, 1) if 0 < n < cores))
    runtime = get_runtime(engine.runtime)
    hints: tuple[Objective, ...] = getattr(runtime, "objectives", ()) or (engine.objective,)
    return [
        dataclasses.replace(engine, threads=count, objective=hint)
        for count in threads
        for hint in hints
    ]


def _load(folder: Path, engine: Engine, request: Request) -> Session:
    return get_runtime(engine.runtime).load(
        [folder / file for file in engine.files],
        device=request.device,
        precision=engine.precision,
        threads=engine.threads,
        objective=engine.objective,
    )
