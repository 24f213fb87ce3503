"""The drawn roofline of a profile: one self-contained HTML file, on which every layer is a point.

Both axes are logarithmic: FLOPs per byte against the rate that the device's ceilings allow. A point
lies under the sloped ceiling where memory binds, under a flat one where arithmetic does, and below
both where the launch does. Layers without multiply-adds are hollow points at one operation for each
element they read (or write, if that is more), so that they have a place; they count no FLOPs
anywhere else.
"""

from __future__ import annotations

import html
import math
from pathlib import Path

from litezoo.models.errors import MissingError, require
from litezoo.models.files import write_whole

from .graph import KINDS, Layer
from .profiling import Profile

__all__ = ["KIND_COLOURS", "operations", "write_roofline"]

#: Colours by kind, told apart by the colour-blind too (Okabe and Ito), on dark and on light.
KIND_COLOURS = {
    "conv": "#0072b2",
    "pointwise": "#56b4e9",
    "grouped": "#cc79a7",
    "depthwise": "#d55e00",
    "matmul": "#009e73",
    "elementwise": "#e69f00",
    "pool": "#999999",
    "move": "#b8a600",
}
assert set(KIND_COLOURS) == set(KINDS)
_INK, _GRID = "#808080", "rgba(128,128,128,.25)"
_CONFIG = {"displaylogo": False, "displayModeBar": False, "responsive": True}
_STYLE = """:root{color-scheme:light dark;--line:#8884;--back:#fff;--ink:#1a1a1a}
@media(prefers-color-scheme:dark){:root{--back:#15171a;--ink:#e6e6e6}}
body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:1100px;padding:0 1rem;
background:var(--back);color:var(--ink)}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 9px;white-space:nowrap;border-bottom:1px solid var(--line);text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}li{margin:.5rem 0}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 2rem}.facts b{display:block;font-size:1.2rem}"""


def write_roofline(profile: Profile, file: Path) -> Path:
    """Write the page and return its path; MissingError where the device's ceilings are unknown."""
    require("plotly", purpose="the drawn roofline", extra="report")
    if profile.device is None:
        raise MissingError("a roofline has a device's ceilings; name one: --device t4")
    if not profile.times or profile.roof is None:
        raise MissingError(f"a roofline needs the device's ceilings; {profile.note}")
    points = _roofline(profile).to_html(full_html=False, include_plotlyjs=True, config=_CONFIG)
    bars = _bars(profile).to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
    title = html.escape(_title(profile))
    findings = "".join(
        f"<li><b>{html.escape(finding.rule)}</b>: {html.escape(str(finding))}</li>"
        for finding in profile.findings
    )
    sources = "".join(
        f"<li>{html.escape(fact)}: {html.escape(source)}</li>"
        for fact, source in profile.roof.sources.items()
    )
    return write_whole(
        file,
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{_facts(profile)}"
        f"<h2>Roofline</h2>{points}"
        f"<h2>Time of each layer, in the network's order</h2>{bars}"
        f"<h2>Findings</h2><ul>{findings or '<li>no design rule costs 1 % or more</li>'}</ul>"
        f"<h2>Layers</h2><div class=scroll>{_table(profile)}</div>"
        f"<h2>Ceilings</h2><ul>{sources}</ul><p>{html.escape(profile.note)}</p>"
        "<p>Times are lower bounds: the most of arithmetic, memory and launch for each kernel, one "
        "after another. FLOPs are 2 for each multiply-accumulate.</p>",
    )


def _title(profile: Profile) -> str:
    channels, height, width = profile.resolution
    return (
        f"{profile.model} ({profile.graph_form} form) on {profile.device}, {profile.precision}, "
        f"batch {profile.batch}, {channels}x{height}x{width}"
    )


def _facts(profile: Profile) -> str:
    facts = (
        ("least time", f"{profile.ms or 0:.4f} ms"),
        ("parameters", f"{profile.params / 1e6:.2f} M"),
        ("MACs", f"{profile.macs / 1e6:.1f} M"),
        ("memory access", f"{profile.fused.memory_bytes / 1e6:.1f} MB"),
        ("intensity", f"{profile.intensity:.1f} FLOP/B"),
        ("kernels", f"{profile.fused.kernels} (unfused {profile.unfused.kernels})"),
    )
    inside = "".join(f"<div>{name}<b>{value}</b></div>" for name, value in facts)
    return f"<div class=facts>{inside}</div>"


def operations(layer: Layer) -> int:
    """Return what a layer is drawn at: its FLOPs, else the elements it reads or writes."""
    return layer.flops or max(math.prod(layer.in_shape), layer.activations)


def _hover(profile: Profile, index: int) -> str:
    layer, time = profile.layers[index], profile.times[index]
    shapes = " to ".join("x".join(map(str, shape)) for shape in (layer.in_shape, layer.out_shape))
    return "<br>".join(
        map(
            html.escape,
            (
                f"{layer.name}  {layer.module}",
                f"{' + '.join(layer.operators)}, {layer.dtype}",
                shapes,
                f"{layer.macs / 1e6:.2f} M MACs, {layer.memory_bytes / 1e6:.3f} MB, "
                f"{layer.intensity:.1f} FLOP/B",
                f"{1e3 * time.ms:.2f} us, bound by {time.bound}",
            ),
        )
    )


def _roofline(profile: Profile):  # type: ignore[no-untyped-def]  # plotly has no types
    import plotly.graph_objects as go

    roof = profile.roof
    assert roof is not None and roof.memory_gb_per_s is not None
    figure = go.Figure()
    places = {
        index: (
            operations(layer) / layer.memory_bytes,
            operations(layer) / profile.times[index].ms / 1e9,
        )
        for index, layer in enumerate(profile.layers)
        if layer.memory_bytes
    }
    slope = roof.memory_gb_per_s / 1e3  # tera operations a second at one FLOP per byte
    peaks = roof.peak_tera_ops_per_s
    low = min([x for x, _ in places.values()] + [min(peaks.values(), default=1.0) / slope]) / 2
    high = max([x for x, _ in places.values()] + [max(peaks.values(), default=1.0) / slope]) * 3
    used = {layer.dtype for layer in profile.layers if layer.macs}
    ridges = [peak / slope for dtype, peak in peaks.items() if dtype in used]
    figure.add_scatter(
        x=[low, max(ridges, default=high)],
        y=[low * slope, max(ridges, default=high) * slope],
        mode="lines",
        name=f"memory: {roof.memory_gb_per_s:g} GB/s",
        line={"color": _INK, "width": 2},
        hoverinfo="name",
    )
    for dtype, peak in sorted(peaks.items(), key=lambda entry: entry[1]):
        is_used = dtype in used
        figure.add_scatter(
            x=[peak / slope, high],
            y=[peak, peak],
            mode="lines",
            name=f"{dtype}: {peak:g} T/s",
            line={
                "color": _INK,
                "width": 2 if is_used else 1,
                "dash": "dash" if is_used else "dot",
            },
            hovertemplate=f"{dtype} peak {peak:g} T/s, from {peak / slope:.0f} FLOP/B on"
            "<extra></extra>",
        )
    whole = profile.ms or 1.0
    for kind, words in KINDS.items():
        own = [index for index in places if profile.layers[index].kind == kind]
        if not own:
            continue
        is_counted = any(profile.layers[index].macs for index in own)
        figure.add_scatter(
            x=[places[index][0] for index in own],
            y=[places[index][1] for index in own],
            mode="markers",
            name=f"{words} ({len(own)})",
            marker={
                "color": KIND_COLOURS[kind],
                "symbol": "circle" if is_counted else "circle-open",
                "size": [6 + 40 * math.sqrt(profile.times[index].ms / whole) for index in own],
                "opacity": 0.85,
                "line": {"width": 1.5 if not is_counted else 0.5},
            },
            text=[_hover(profile, index) for index in own],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(
        **_layout(), height=560, xaxis=_axis("FLOPs per byte", log=True),
        yaxis=_axis("tera operations per second", log=True),
    )  # fmt: skip
    return figure


def _bars(profile: Profile):  # type: ignore[no-untyped-def]  # plotly has no types
    import plotly.graph_objects as go

    figure = go.Figure()
    for kind, words in KINDS.items():
        own = [index for index, layer in enumerate(profile.layers) if layer.kind == kind]
        if own:
            figure.add_bar(
                x=own,
                y=[1e3 * profile.times[index].ms for index in own],
                name=words,
                marker={"color": KIND_COLOURS[kind]},
                text=[_hover(profile, index) for index in own],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
    figure.update_layout(
        **_layout(), height=340, bargap=0.15, xaxis=_axis("layer", log=False),
        yaxis=_axis("microseconds", log=False),
    )  # fmt: skip
    return figure


def _layout() -> dict[str, object]:
    """Return what both drawings share: readable on a dark and on a light page."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": _INK},
        "margin": {"l": 70, "r": 10, "t": 20, "b": 50},
        "legend": {"orientation": "h", "y": -0.18},
        "barmode": "stack",
    }


def _axis(title: str, *, log: bool) -> dict[str, object]:
    return {
        "title": {"text": title},
        "type": "log" if log else "linear",
        "gridcolor": _GRID,
        "zeroline": False,
        **({"dtick": 1} if log else {}),
    }


def _table(profile: Profile) -> str:
    columns = (
        "layer", "module", "operators", "kind", "type", "output", "params", "M MACs", "MB",
        "FLOP/B", "us", "bound",
    )  # fmt: skip
    lines = []
    for layer, time in zip(profile.layers, profile.times, strict=True):
        texts = (
            layer.name, layer.module, " + ".join(layer.operators), KINDS[layer.kind],
            layer.dtype, "x".join(map(str, layer.out_shape)),
        )  # fmt: skip
        numbers = (
            f"{layer.params:,}", f"{layer.macs / 1e6:.2f}", f"{layer.memory_bytes / 1e6:.3f}",
            f"{layer.intensity:.1f}", f"{1e3 * time.ms:.2f}",
        )  # fmt: skip
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        cells += "".join(f"<td class=n>{number}</td>" for number in numbers)
        lines.append(f"<tr>{cells}<td>{time.bound}</td></tr>")
    head = "".join(
        f"<th{' class=n' if 6 <= place <= 10 else ''}>{column}</th>"
        for place, column in enumerate(columns)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
