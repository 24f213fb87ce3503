"""Result rows: their store, the newest of each set of conditions, and the README's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from litezoo.models.errors import UsageError

from .measure import SCHEMA, Measurement
from .rows import Store, newest, results_folder

__all__ = [
    "append_rows",
    "baseline_of",
    "count_of",
    "is_baseline",
    "latest",
    "markdown_table",
    "read_rows",
    "refresh_readme",
]

#: Least share of a table's networks that a batch size is shown of: sweeps are of a few.
MIN_SHARE = 0.25
BEGIN, END = "<!-- results: begin (make readme) -->", "<!-- results: end -->"
STORE = Store(
    row=Measurement,
    name="result row",
    file_name="results",
    command="litezoo bench",
    schemas=(1, 2, SCHEMA),
)


def append_rows(rows: Sequence[Measurement], folder: Path | None = None) -> list[Path]:
    """Append rows to <device>.jsonl in `folder` (default: benchmarks/results); return the files."""
    return STORE.append_by_device(rows, folder or results_folder())


def read_rows(files: Iterable[Path]) -> list[Measurement]:
    """Read result files; a damaged line is a CheckFailed with file and line number."""
    return STORE.read(files)


def conditions(row: Measurement) -> tuple[object, ...]:
    """Return what has to be the same for two rows to be of the same question."""
    return (
        row.device, row.machine.cpu, row.machine.versions.get("gpu"), row.model, row.resolution,
        row.runtime, row.precision, row.graph_form, row.batch, row.threads, row.streams, row.scope,
        row.weights, row.protocol, row.ratio_to,
    )  # fmt: skip


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """Keep the newest row that may be published of each set of conditions, in order."""
    return newest((row for row in rows if not row.refused), conditions)


def is_baseline(runtime: str) -> bool:
    """Return whether a runtime is what others run, which the zoo's engines are compared with."""
    return runtime.startswith(("timm-", "torchvision-", "pytorch-eager"))


def baseline_of(row: Measurement) -> str | None:
    """Return the runtime of the baseline that a row's ratio is over, None where it is another."""
    return next((word for word in row.ratio_to.split() if is_baseline(word)), None)


def markdown_table(rows: Iterable[Measurement]) -> str:
    """Return the README's table: a line for each model, of each batch and threads the fastest.

    Columns are of what at least a quarter of the networks were measured at; the line of the fastest
    network comes first. Rows whose ratio is over another library's go before others.
    """
    shown = [row for row in latest(rows) if (row.streams, row.scope) == (1, "engine")]
    fastest: dict[tuple[object, ...], Measurement] = {}
    networks: dict[tuple[int, int], set[object]] = {}
    for row in shown:
        network = (row.device, row.model, row.resolution)
        networks.setdefault((row.batch, -row.threads), set()).add(network)
        key = (*network, row.batch, -row.threads)
        best = fastest.get(key)
        if best is None or _rank(row) > _rank(best):
            fastest[key] = row
    most = max(map(len, networks.values()), default=0)
    columns = [one for one in sorted(networks) if len(networks[one]) >= MIN_SHARE * most]
    names = [f"batch {batch}, {count_of(-threads, 'thread')}" for batch, threads in columns]
    lines: list[tuple[float, str]] = []
    for device, model, size in dict.fromkeys((r.device, r.model, r.resolution) for r in shown):
        found = [fastest.get((device, model, size, *column)) for column in columns]
        cells = " | ".join("-" if row is None else _cell(row) for row in found)
        first = next((row.p50_ms / row.batch for row in found if row is not None), math.inf)
        lines.append((first, f"| {device} | {model} | {'x'.join(map(str, size))} | {cells} |"))
    machines = dict.fromkeys(
        f"{row.device}: {row.machine.cpu}, {row.machine.cores} cores "
        f"({', '.join(row.machine.isa)}), "
        + ", ".join(f"{name} {number}" for name, number in row.machine.versions.items())
        + f", protocol {row.protocol}, {row.date[:10]}"
        for row in shown
    )
    return "\n".join(
        [
            f"| device | model | input | {' | '.join(names)} |",
            f"|---|---|---|{'---|' * len(names)}",
            *(line for _, line in sorted(lines)),
            "",
            *(f"{machine}." for machine in machines),
        ]
    )


def count_of(number: int, what: str) -> str:
    """Return e.g. "2 threads"; 0 (a GPU has none) is "-"."""
    return f"{number} {what}{'s' if number > 1 else ''}" if number else "-"


def _rank(row: Measurement) -> tuple[bool, float]:
    """Order rows for the table: a ratio over a baseline counts more than speed."""
    return baseline_of(row) is not None, row.images_per_s


def _cell(row: Measurement) -> str:
    speed = f"{row.p50_ms:.2f} ms" if row.batch == 1 else f"{row.images_per_s:.0f}/s"
    return f"{speed}, {row.ratio:.1f}x ({row.runtime} {row.precision})"


def refresh_readme(readme: Path, rows: Iterable[Measurement], *, write: bool) -> bool:
    """Put the table between the README's marks; return whether the text was up to date.

    With `write` off nothing is changed.
    """
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{readme} has no marks {BEGIN} and {END}")
    fresh = f"{head}{BEGIN}\n\n{markdown_table(rows)}\n\n{END}{tail}"
    if write and fresh != text:
        from litezoo.models.files import write_whole

        write_whole(readme, fresh)
    return fresh == text
