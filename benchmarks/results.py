"""Result rows: their store, the newest of each set of conditions, and the README's table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from litezoo.models.errors import UsageError

from .measure import SCHEMA, Measurement
from .rows import Store, newest, results_folder

__all__ = ["append_rows", "latest", "markdown_table", "read_rows", "refresh_readme"]

BEGIN, END = "<!-- results: begin (make readme) -->", "<!-- results: end -->"
STORE = Store(
    row=Measurement,
    name="result row",
    file_name="results",
    command="litezoo bench",
    schemas=(1, SCHEMA),
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
        row.weights, row.protocol,
    )  # fmt: skip


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """Keep the newest row that may be published of each set of conditions, in order."""
    return newest((row for row in rows if not row.refused), conditions)


def markdown_table(rows: Iterable[Measurement]) -> str:
    """Return the README's table: a line for each model, of each batch and threads the fastest."""
    shown = [row for row in latest(rows) if (row.streams, row.scope) == (1, "engine")]
    fastest: dict[tuple[object, ...], Measurement] = {}
    for row in shown:
        key = (row.device, row.model, row.resolution, row.batch, row.threads)
        if key not in fastest or row.images_per_s > fastest[key].images_per_s:
            fastest[key] = row
    conditions = sorted({(row.batch, -row.threads) for row in shown})
    names = [f"batch {batch}, {_count(-threads, 'thread')}" for batch, threads in conditions]
    lines = [
        f"| device | model | input | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for device, model, size in dict.fromkeys((r.device, r.model, r.resolution) for r in shown):
        found = (fastest.get((device, model, size, b, -t)) for b, t in conditions)
        cells = " | ".join("-" if row is None else _cell(row) for row in found)
        lines.append(f"| {device} | {model} | {'x'.join(map(str, size))} | {cells} |")
    machines = dict.fromkeys(
        f"{row.device}: {row.machine.cpu}, {row.machine.cores} cores "
        f"({', '.join(row.machine.isa)}), "
        + ", ".join(f"{name} {number}" for name, number in row.machine.versions.items())
        + f", protocol {row.protocol}, {row.date[:10]}"
        for row in shown
    )
    return "\n".join([*lines, "", *(f"{machine}." for machine in machines)])


def _count(number: int, what: str) -> str:
    """Return e.g. "2 threads"; 0 (a GPU has none) is "-"."""
    return f"{number} {what}{'s' if number > 1 else ''}" if number else "-"


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
