"""One self-contained HTML page of all results: a drawing for each device, and the full table."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from litezoo.models.errors import require
from litezoo.models.files import write_whole

from .measure import Measurement
from .results import latest

__all__ = ["write_report"]

_COLUMNS = (
    "device", "model", "resolution", "runtime", "precision", "graph_form", "batch", "threads",
    "p50_ms", "p90_ms", "p99_ms", "images_per_s", "ratio", "ratio_to", "spread", "runs",
    "top1_percent", "weights", "protocol", "date",
)  # fmt: skip
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem;color:#1a1a1a}
table{border-collapse:collapse;font-size:13px}td,th{padding:3px 9px;white-space:nowrap;
border-bottom:1px solid #ddd}
th{text-align:left;position:sticky;top:0;background:#fff}td.n{text-align:right}"""


def write_report(rows: Iterable[Measurement], file: Path) -> Path:
    """Write the page and return its path; the newest row of each set of conditions counts."""
    require("plotly", purpose="the report", extra="report")
    import plotly.graph_objects as go

    shown = latest(rows)
    parts: list[str] = []
    for device in dict.fromkeys((row.device, row.machine.cpu) for row in shown):
        for batch in sorted({row.batch for row in shown}):
            own = [
                row
                for row in shown
                if (row.device, row.machine.cpu) == device and row.batch == batch
            ]
            if not own:
                continue
            figure = go.Figure()
            for label in dict.fromkeys(row.label for row in own):
                of_label = [row for row in own if row.label == label]
                figure.add_bar(
                    name=label,
                    x=[f"{row.model}<br>{row.resolution[-1]} px" for row in of_label],
                    y=[row.p50_ms for row in of_label],
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": [row.p99_ms - row.p50_ms for row in of_label],
                        "arrayminus": [0] * len(of_label),
                    },
                    text=[f"{row.p50_ms:.2f}" for row in of_label],
                )
            figure.update_layout(
                title=f"{device[0]} ({device[1]}), batch {batch}: p50, whisker to p99",
                yaxis_title="ms per call",
                barmode="group",
                template="plotly_white",
                height=420,
            )
            parts.append(
                figure.to_html(full_html=False, include_plotlyjs=True if not parts else False)
            )
    machines = dict.fromkeys(
        f"{row.device}: {row.machine.cpu}, {row.machine.cores} cores, ISA "
        f"{' '.join(row.machine.isa)}, governor {row.machine.governor}, {row.machine.system}; "
        + ", ".join(f"{name} {number}" for name, number in row.machine.versions.items())
        for row in shown
    )
    body = "".join(_line(row) for row in shown)
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>litezoo results</title>"
        f"<style>{_STYLE}</style><h1>litezoo results</h1>{''.join(parts)}"
        f"<h2>All rows</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<h2>Machines</h2><ul>{''.join(f'<li>{html.escape(m)}</li>' for m in machines)}</ul>"
    )
    return write_whole(file, page)


def _line(row: Measurement) -> str:
    cells = []
    for column in _COLUMNS:
        value = getattr(row, column)
        if isinstance(value, tuple):
            value = "x".join(map(str, value))
        kind = " class=n" if isinstance(value, (int, float)) else ""
        cells.append(f"<td{kind}>{html.escape('-' if value is None else str(value))}</td>")
    return f"<tr>{''.join(cells)}</tr>"
