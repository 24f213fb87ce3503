"""The store of results: one JSON line for each measurement, and the tables made from it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from litezoo.models.errors import CheckFailed, UsageError

from .machine import Machine
from .measure import SCHEMA, Measurement

__all__ = ["append_rows", "markdown_table", "read_rows", "refresh_readme", "results_folder"]

BEGIN, END = "<!-- results: begin (make readme) -->", "<!-- results: end -->"


def results_folder() -> Path:
    """Return benchmarks/results of the checkout, or ./benchmarks/results elsewhere."""
    return Path("benchmarks/results")


def append_rows(rows: Sequence[Measurement], folder: Path) -> list[Path]:
    """Append rows to <device>.jsonl in `folder`, each line whole; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for device in dict.fromkeys(row.device for row in rows):
        file = folder / f"{device}.jsonl"
        lines = [
            json.dumps(dataclasses.asdict(row), default=dict) + "\n"
            for row in rows
            if row.device == device
        ]
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        files.append(file)
    return files


def _row(values: dict[str, Any]) -> Measurement:
    if values.get("schema") != SCHEMA:
        raise ValueError(f"schema {values.get('schema')} is not {SCHEMA}")
    machine = values["machine"]
    return Measurement(
        **{
            **values,
            "resolution": tuple(values["resolution"]),
            "machine": Machine(**{**machine, "isa": tuple(machine["isa"])}),
        }
    )


def read_rows(files: Iterable[Path]) -> list[Measurement]:
    """Read result files; a damaged line is a CheckFailed with file and line number."""
    rows = []
    for file in files:
        if not file.is_file():
            raise UsageError(f"no results {file}; measure first: litezoo bench")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(_row(json.loads(line)))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckFailed(f"{file}:{number} is not a result row: {error}") from error
    return rows


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """Keep the newest row (by date) of each set of conditions, in order of first appearance."""
    newest: dict[tuple[object, ...], Measurement] = {}
    for row in rows:
        key = (
            row.device, row.machine.cpu, row.model, row.resolution, row.runtime, row.precision,
            row.graph_form, row.batch, row.threads, row.weights, row.protocol,
        )  # fmt: skip
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return list(newest.values())


def markdown_table(rows: Iterable[Measurement]) -> str:
    """Return the README's table: a line for each model, of each batch and threads the fastest."""
    newest = latest(rows)
    fastest: dict[tuple[object, ...], Measurement] = {}
    for row in newest:
        key = (row.device, row.model, row.resolution, row.batch, row.threads)
        if key not in fastest or row.images_per_s > fastest[key].images_per_s:
            fastest[key] = row
    conditions = sorted({(row.batch, -row.threads) for row in newest})
    names = [f"batch {batch}, {_count(-threads, 'thread')}" for batch, threads in conditions]
    lines = [
        f"| device | model | input | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for device, model, size in dict.fromkeys((r.device, r.model, r.resolution) for r in newest):
        found = (fastest.get((device, model, size, b, -t)) for b, t in conditions)
        cells = " | ".join("-" if row is None else _cell(row) for row in found)
        lines.append(f"| {device} | {model} | {'x'.join(map(str, size))} | {cells} |")
    rows = newest
    machines = dict.fromkeys(
        f"{row.device}: {row.machine.cpu}, {row.machine.cores} cores "
        f"({', '.join(row.machine.isa)}), "
        + ", ".join(f"{name} {number}" for name, number in row.machine.versions.items())
        + f", protocol {row.protocol}, {row.date[:10]}"
        for row in rows
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
