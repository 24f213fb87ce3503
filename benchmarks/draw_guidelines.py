"""One self-contained HTML page of the design rules as measured: a small drawing for each rule."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litezoo.models.errors import UsageError, require
from litezoo.models.files import write_whole

from .guidelines import Guideline, VariantCost, latest_guidelines

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["conditions_in_words", "guideline_figure", "write_guidelines"]

#: Readable on white and on black.
_COLORS = {"holds": "#2a9d62", "does not hold": "#d1495b", "no difference": "#8a8a8a"}
_LINES = ("#3d7dca", "#d98324")
_GRID, _TEXT = "rgba(128,128,128,0.25)", "#808080"
_HEIGHT = 260
_STYLE = """:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;margin:1.2rem;max-width:1500px}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1rem}
article{border:1px solid #8884;border-radius:8px;padding:.8rem;min-width:0}
h2{margin:1.6rem 0 .6rem}h3{font-size:1rem;margin:0}p{margin:.35rem 0}
.verdict{color:#fff;border-radius:9px;padding:0 .55rem;font-size:.85rem;white-space:nowrap}
small{color:#808080;display:block}"""


def guideline_figure(row: Guideline) -> go.Figure:
    """Return a rule's drawing: what its networks cost, the fast one being 1.

    Lines over x where the networks are in series, else bars. Whiskers are the intervals; the grey
    band is noise. The two networks of the measure are in the verdict's colour.
    """
    require("plotly", purpose="the drawings", extra="report")
    import plotly.graph_objects as go

    figure = go.Figure()
    series = list(dict.fromkeys(variant.series for variant in row.variants))
    if series != [""]:
        for color, name in zip(_LINES * len(series), series, strict=False):
            _add_line(figure, row, name, color)
        figure.update_xaxes(type="log", title="channels", tickvals=_places(row.variants))
        figure.update_yaxes(type="log")
    else:
        _add_bars(figure, row)
        figure.add_hrect(
            y0=1 / (1 + row.band), y1=1 + row.band, fillcolor=_GRID, line_width=0, layer="below"
        )
    figure.update_yaxes(title=f"{_cost(row)}, {row.fast} = 1", gridcolor=_GRID)
    figure.update_layout(
        height=_HEIGHT,
        margin={"l": 50, "r": 10, "t": 10, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": _TEXT, "size": 11},
        legend={"orientation": "h", "y": 1.12},
        showlegend=series != [""],
    )
    return figure


def _cost(row: Guideline) -> str:
    return "time of a MAC" if row.per == "mac" else "time"


def _places(variants: Sequence[VariantCost]) -> list[float]:
    return sorted({variant.x for variant in variants if variant.x is not None})


def _whiskers(variants: Sequence[VariantCost]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [v.high - v.ratio for v in variants],
        "arrayminus": [v.ratio - v.low for v in variants],
    }


def _hover(row: Guideline, variants: Sequence[VariantCost]) -> list[str]:
    return [
        f"{v.name}: {v.ratio:.2f} ({v.low:.2f} to {v.high:.2f})<br>{v.ms:.3f} ms, "
        f"{v.macs / 1e6:.1f} M MACs an image, {2 * row.batch * v.macs / v.ms / 1e6:.1f} GFLOP/s"
        for v in variants
    ]


def _add_line(figure: go.Figure, row: Guideline, name: str, color: str) -> None:
    variants = [variant for variant in row.variants if variant.series == name]
    figure.add_scatter(
        x=[v.x for v in variants],
        y=[v.ratio for v in variants],
        error_y=_whiskers(variants),
        name=name,
        mode="lines+markers",
        line={"color": color},
        hovertext=_hover(row, variants),
        hoverinfo="text",
    )


def _add_bars(figure: go.Figure, row: Guideline) -> None:
    measured = {row.slow, row.fast}
    figure.add_bar(
        x=[v.name for v in row.variants],
        y=[v.ratio for v in row.variants],
        error_y=_whiskers(row.variants),
        marker_color=[_COLORS[row.verdict] if v.name in measured else "#b8b8b8"
                      for v in row.variants],
        text=[f"{v.ratio:.2f}" for v in row.variants],
        textposition="inside",
        insidetextanchor="start",
        hovertext=_hover(row, row.variants),
        hoverinfo="text",
    )  # fmt: skip


def write_guidelines(rows: Iterable[Guideline], file: Path) -> Path:
    """Write the page of the newest row of each rule and conditions, and return its path.

    UsageError where there is no row.
    """
    require("plotly", purpose="the drawings", extra="report")
    shown = latest_guidelines(rows)
    if not shown:
        raise UsageError("no guidelines to draw; measure them first: litezoo guidelines")
    groups: dict[str, list[Guideline]] = {}
    for row in shown:
        groups.setdefault(conditions_in_words(row), []).append(row)
    parts, is_first = [], True
    for title, own in groups.items():
        cards = []
        for row in own:
            cards.append(_card(row, with_plotly=is_first))
            is_first = False
        counts = ", ".join(
            f"{sum(row.verdict == verdict for row in own)} {verdict}" for verdict in _COLORS
        )
        parts.append(
            f"<h2>{html.escape(title)}</h2><p>{len(own)} rules: {counts}</p>"
            f"<main>{''.join(cards)}</main>"
        )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>litezoo guidelines</title><style>{_STYLE}</style>"
        "<h1>Design rules, measured</h1><p>Each drawing compares small networks; the measure is "
        "how much more the one costs than the other, its interval 95 % by bootstrap over "
        "interleaved rounds. What lies in the grey band is noise.</p>" + "".join(parts)
    )
    return write_whole(file, page)


def conditions_in_words(row: Guideline) -> str:
    """Return what a row was measured on and with, in a line."""
    chip = row.machine.versions.get("gpu") or row.machine.cpu
    threads = (
        "" if "gpu" in row.machine.versions else f", {row.threads} thread" + "s" * (row.threads > 1)
    )
    size = ", small networks" if row.quick else ""
    return f"{row.device} ({chip}): {row.runtime} {row.precision}, batch {row.batch}{threads}{size}"


def _card(row: Guideline, *, with_plotly: bool) -> str:
    drawing = guideline_figure(row).to_html(
        full_html=False, include_plotlyjs=with_plotly, config={"displayModeBar": False,
        "responsive": True},
    )  # fmt: skip
    close = ", close to the border" if row.close else ""
    return (
        f"<article><h3>{html.escape(row.rule)} "
        f"<span class=verdict style='background:{_COLORS[row.verdict]}'>{row.verdict}{close}"
        f"</span></h3><p>{html.escape(row.claim)}</p>{drawing}<p>{html.escape(row.finding)}</p>"
        f"<small>{html.escape(row.source)}</small><small>{row.rounds} rounds, {row.protocol}, "
        f"{html.escape(row.date[:10])}; a copy of a network differs by up to {row.control:.1%}"
        "</small></article>"
    )
