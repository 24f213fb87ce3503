"""The README's pictures of the results: two SVG files, made from the same rows as its table.

They are plain text without dates, so that a check can compare them byte for byte, and read on a
white and on a dark page: the background is clear and the words are grey.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from litezoo.models.files import write_whole

from .measure import Measurement
from .report_data import Top1, comparable_top1s, published_rows
from .results import baseline_of, count_of, is_baseline

__all__ = ["PICTURES", "draw_accuracy", "draw_speed", "pictures_are_fresh", "write_pictures"]

#: What `write_pictures` writes, by file name.
PICTURES = ("speed.svg", "accuracy.svg")
_INK, _LINE = "#767676", "#76767655"
_BASE = "peers"  # what a network is compared with
_COLOURS = {
    _BASE: "#8a8a8a",
    "fp32": "#2b7bd6",
    "bf16": "#009e73",
    "fp16": "#b05fc4",
    "int8": "#d55e00",
}
_WIDTH = 820
_HOW_TO_READ = (
    "ms a call (median). Filled: the accuracy is published, or measured, of this arithmetic.",
    "Hollow: published of the fp32 weights, which a reduced precision may miss; not in the front "
    "(line).",
)
_STYLE = f"text{{font:13px system-ui,sans-serif;fill:{_INK}}}.b{{font-weight:600}}"


def draw_speed(rows: Iterable[Measurement]) -> str:
    """Return an SVG of each network's speed over the eager baseline, best engine by precision.

    Of one set of conditions: single images, the device and number of threads with the most rows.
    """
    own, where = _usual(rows)
    best: dict[tuple[str, str], Measurement] = {}
    for row in own:
        key, base = (_name(row), row.precision), baseline_of(row)
        if base is None or is_baseline(row.runtime) or row.precision not in _COLOURS:
            continue
        if key not in best or row.ratio > best[key].ratio:
            best[key] = row
    if not best:
        return _svg(60, [_text(0, 20, f"No row has a ratio to a baseline ({where}).")], where)
    fastest: dict[str, float] = {}
    for (name, _), row in best.items():
        fastest[name] = max(row.ratio, fastest.get(name, 0.0))
    names = sorted(fastest, key=lambda name: (-fastest[name], name))
    precisions = [one for one in _COLOURS if any(key[1] == one for key in best)]
    left, bar = 190, 11
    step = bar * len(precisions) + 10
    scale = (_WIDTH - left - 150) / max(row.ratio for row in best.values())
    bases = sorted({base for row in best.values() if (base := baseline_of(row)) is not None})
    title = f"How many times the speed of {' or '.join(bases)}, in the same run"
    parts = [
        _text(0, 16, title, "b"),
        _text(0, 36, where),
        *_legend([(one, _COLOURS[one], "square") for one in precisions], 58),
    ]
    top = 74
    end = top + len(names) * step
    one = left + scale
    parts.append(f'<path d="M{one:.1f} {top - 4}V{end}" stroke="{_INK}" stroke-dasharray="3 3"/>')
    parts.append(_text(one, end + 14, "1x", anchor="middle", size=11))
    for place, name in enumerate(names):
        y = top + place * step
        parts.append(_text(left - 8, y + step / 2, name, anchor="end"))
        for index, precision in enumerate(precisions):
            if (name, precision) not in best:
                continue
            row = best[name, precision]
            width, at = row.ratio * scale, y + index * bar
            parts.append(
                f'<rect x="{left}" y="{at:.1f}" width="{width:.1f}" height="{bar - 1}" '
                f'fill="{_COLOURS[precision]}"/>'
            )
            words = f"{row.ratio:.1f}x {row.runtime}"
            parts.append(_text(left + width + 6, at + 9.5, words, size=11))
    return _svg(end + 22, parts, f"{title}: {where}")


def draw_accuracy(rows: Iterable[Measurement]) -> str:
    """Return an SVG of top-1 against latency: a network's fastest row of each precision.

    The line is the Pareto front of rows whose accuracy is their own; a reduced precision drawn at
    its fp32 weights' published top-1 is hollow and no part of it.
    """
    own, where = _usual(rows)
    best: dict[tuple[str, str], tuple[Measurement, Top1]] = {}
    data, top1s = comparable_top1s(own)
    for row, top1 in zip(own, top1s, strict=True):
        key = (_name(row), _BASE if is_baseline(row.runtime) else row.precision)
        if key[1] not in _COLOURS or top1 is None:
            continue
        if key not in best or row.p50_ms < best[key][0].p50_ms:
            best[key] = row, top1
    if not best:
        return _svg(60, [_text(0, 20, f"No row has a known top-1 ({where}).")], where)
    families = {row.runtime.split("-")[0] for row, _ in best.values() if is_baseline(row.runtime)}
    peers = f"fastest of {' and '.join(sorted(families))}"
    left, right, top, bottom = 46, _WIDTH - 190, 78, 440
    times = [row.p50_ms for row, _ in best.values()]
    tops = [top1.percent for _, top1 in best.values()]
    x_low, x_high = math.log10(min(times) / 1.15), math.log10(max(times) * 1.15)
    y_low, y_high = math.floor(min(tops) - 0.5), math.ceil(max(tops) + 0.5)

    def place(row: Measurement, top1: Top1) -> tuple[float, float]:
        x = left + (math.log10(row.p50_ms) - x_low) / (x_high - x_low) * (right - left)
        return x, bottom - (top1.percent - y_low) / (y_high - y_low) * (bottom - top)

    title = f"{data} top-1 against milliseconds a call"
    parts = [
        _text(0, 16, title, "b"),
        _text(0, 36, where),
        *_legend(
            [
                (peers if one == _BASE else one, color, _shape(one))
                for one, color in _COLOURS.items()
                if any(key[1] == one for key in best)
            ],
            58,
        ),
    ]
    for tick in _ticks(10**x_low, 10**x_high):
        x = left + (math.log10(tick) - x_low) / (x_high - x_low) * (right - left)
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="{_LINE}"/>')
        parts.append(_text(x, bottom + 16, f"{tick:g}", anchor="middle", size=12))
    for percent in range(y_low, y_high + 1, max(1, (y_high - y_low) // 6)):
        y = bottom - (percent - y_low) / (y_high - y_low) * (bottom - top)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{_LINE}"/>')
        parts.append(_text(left - 6, y + 4, f"{percent} %", anchor="end", size=12))
    line, highest = "", 0.0
    for row, top1 in sorted(best.values(), key=lambda one: (one[0].p50_ms, -one[1].percent)):
        if top1.is_own and top1.percent > highest:
            x, y = place(row, top1)
            line += f"H{x:.1f}V{y:.1f}" if line else f"M{x:.1f} {y:.1f}"
            highest = top1.percent
    parts.append(f'<path d="{line}" fill="none" stroke="{_INK}" stroke-width="1.5"/>')
    ends: dict[str, tuple[float, float]] = {}
    for (name, precision), (row, top1) in sorted(best.items()):
        x, y = place(row, top1)
        parts.append(_mark(_shape(precision), x, y, _COLOURS[precision], hollow=not top1.is_own))
        ends[name] = max(ends.get(name, (x, y)), (x, y))
    parts += _names(ends, right + 14, top, bottom)
    for number, words in enumerate(_HOW_TO_READ):
        parts.append(_text(left, bottom + 38 + 16 * number, words, size=12))
    return _svg(bottom + 64, parts, f"{title}: {where}")


def write_pictures(rows: Iterable[Measurement], folder: Path) -> list[Path]:
    """Write the pictures into `folder` and return them; UsageError where there is no row."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_whole(folder / name, text) for name, text in _drawn(rows).items()]


def pictures_are_fresh(rows: Iterable[Measurement], folder: Path) -> bool:
    """Return whether the files in `folder` are what `write_pictures` would write now."""
    return all(
        (folder / name).is_file() and (folder / name).read_text(encoding="utf-8") == text
        for name, text in _drawn(rows).items()
    )


def _drawn(rows: Iterable[Measurement]) -> dict[str, str]:
    shown = published_rows(rows)
    return dict(zip(PICTURES, (draw_speed(shown), draw_accuracy(shown)), strict=True))


def _usual(rows: Iterable[Measurement]) -> tuple[list[Measurement], str]:
    """Return the rows of single images on the device and threads that have most, and say which.

    Where networks were measured beside another library's, only of those runs: what was measured
    more often is not faster for it.
    """
    shown = published_rows(rows)
    plain = [r for r in shown if (r.batch, r.streams, r.scope) == (1, 1, "engine")] or shown
    counts = Counter((r.device, r.machine.cpu, r.threads, r.batch) for r in plain)
    device, cpu, threads, batch = max(counts, key=lambda key: (counts[key], key))
    own = [r for r in plain if (r.device, r.machine.cpu, r.threads, r.batch)
           == (device, cpu, threads, batch)]  # fmt: skip
    own = [r for r in own if baseline_of(r) is not None] or own
    chip = own[0].machine.versions.get("gpu", cpu).replace("(R)", "")
    said = f"{device} ({chip}), batch {batch}"
    return own, said + (f", {count_of(threads, 'thread')}" if threads else "")


def _name(row: Measurement) -> str:
    return row.model if row.resolution[-1] == 224 else f"{row.model} {row.resolution[-1]}"


def _shape(precision: str) -> str:
    return {_BASE: "circle", "fp32": "circle", "bf16": "diamond", "fp16": "square"}.get(
        precision, "triangle"
    )


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [t for power in powers for t in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
            if low <= t <= high]  # fmt: skip


def _mark(shape: str, x: float, y: float, color: str, *, hollow: bool = False) -> str:
    fill = "none" if hollow else color
    paint = f'fill="{fill}" stroke="{color}" stroke-width="1.6"/>'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {paint}'
    corners: Sequence[tuple[float, float]] = {
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "triangle": ((0, -5.5), (5.2, 4), (-5.2, 4)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" {paint}'


def _legend(entries: Sequence[tuple[str, str, str]], y: float) -> list[str]:
    parts, x = [], 6.0
    for words, color, shape in entries:
        parts += [_mark(shape, x, y - 4.5, color), _text(x + 10, y, words)]
        x += 30 + 7.5 * len(words)
    return parts


def _names(ends: dict[str, tuple[float, float]], x: float, top: float, bottom: float) -> list[str]:
    """Return the names in a column beside the points, pushed apart, each with a thin line."""
    order = sorted(ends, key=lambda name: (ends[name][1], ends[name][0]))
    places: list[float] = []
    for name in order:
        places.append(max(ends[name][1], (places[-1] + 15) if places else top))
    for index in range(len(places) - 1, -1, -1):
        limit = bottom + 4 if index == len(places) - 1 else places[index + 1] - 15
        places[index] = min(places[index], limit)
    parts = []
    for name, y in zip(order, places, strict=True):
        x_end, y_end = ends[name]
        parts.append(
            f'<path d="M{x_end + 7:.1f} {y_end:.1f}H{x - 20:.1f}L{x - 4:.1f} {y:.1f}" fill="none" '
            f'stroke="{_LINE}"/>'
        )
        parts.append(_text(x, y + 4, name, size=12))
    return parts


def _text(
    x: float, y: float, words: str, kind: str = "", *, anchor: str = "start", size: int = 13
) -> str:
    name = f' class="{kind}"' if kind else ""
    style = f' style="font-size:{size}px"' if size != 13 else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}{style}>{escape(words)}</text>'
    )


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'width="{_WIDTH}" height="{height:.0f}" role="img">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )
