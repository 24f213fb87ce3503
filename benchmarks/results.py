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
    """Return the README's table: of each model, batch and number of threads the fastest row."""
    lines = [
        "| device | model | input | batch | threads | fastest | p50 ms | img/s | ratio | to |",
        "|---|---|---|---:|---:|---|---:|---:|---:|---|",
    ]
    fastest: dict[tuple[object, ...], Measurement] = {}
    for row in latest(rows):
        key = (row.device, row.machine.cpu, row.batch, row.threads, row.model, row.resolution)
        if key not in fastest or row.images_per_s > fastest[key].images_per_s:
            fastest[key] = row
    rows = list(fastest.values())
    for row in rows:
        size = "x".join(map(str, row.resolution))
        lines.append(
            f"| {row.device} | {row.model} | {size} | {row.batch} | {row.threads} | {row.label} "
            f"| {row.p50_ms:.2f} | {row.images_per_s:.0f} | {row.ratio:.1f}x "
            f"| {row.ratio_to.removeprefix(row.model + ' ')} |"
        )
    machines = dict.fromkeys(
        f"{row.device}: {row.machine.cpu}, {row.machine.cores} cores "
        f"({', '.join(row.machine.isa)}), "
        + ", ".join(f"{name} {number}" for name, number in row.machine.versions.items())
        + f", protocol {row.protocol}, {row.date[:10]}"
        for row in rows
    )
    return "\n".join([*lines, "", *(f"{machine}." for machine in machines)])


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
