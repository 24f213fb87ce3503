"""What a measured row reaches of its machine's measured ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .ceilings import Ceilings, read_ceilings
from .measure import Candidate, Measurement

__all__ = ["with_shares"]


@cache
def _work(onnx: Path, batch: int) -> tuple[int, int]:
    """Return the MACs of an ONNX file's network, and the bytes it moves when fused."""
    from .profiling import profile

    found = profile(onnx, batch=batch)
    return found.macs, found.fused.memory_bytes


def with_shares(
    row: Measurement,
    candidate: Candidate,
    *,
    ceilings: Path,
    progress: Callable[[str], None] = lambda step: None,
) -> Measurement:
    """Return the row with `flops_percent` and `bytes_percent`, by its least block median.

    Operations are 2 for a multiply-accumulate, bytes those of weights, inputs and outputs of the
    fused graph in the row's precision. The row is left as it is where its work is not known (not
    our own engine, not the engine alone), or where the folder `ceilings` has none of this machine
    and this number of threads. Winograd convolutions do less work than is counted: over 100 %.
    """
    if candidate.onnx is None or row.scope != "engine" or row.best_ms is None:
        return row
    peaks = read_ceilings(row.device, folder=ceilings)
    if peaks is None or not _are_of(peaks, row):
        return row
    progress(f"batch {row.batch}: counting the work of {candidate.label}")
    macs, moved = _work(candidate.onnx, row.batch)
    calls_per_s = 1e3 * row.streams / row.best_ms
    dtype = row.precision.replace("+", "-").split("-")[0]
    found = peaks.peak_tera_ops_per_s
    # where a type has no instructions, runtimes compute in float32
    peak = max((found[name] for name in ("fp32", dtype) if name in found), default=None)
    flops = None if peak is None else 100 * 2 * macs * calls_per_s / (peak * 1e12)
    return dataclasses.replace(
        row,
        flops_percent=None if flops is None else round(flops, 1),
        bytes_percent=round(100 * moved * calls_per_s / (peaks.memory_gb_per_s * 1e9), 1),
    )


def _are_of(peaks: Ceilings, row: Measurement) -> bool:
    return peaks.elsewhere(row.machine) is None and peaks.threads == row.threads
