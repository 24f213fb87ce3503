"""How good predictions are: families and devices left out, and the naive proxies beside them.

    python -m litezoo.benchmarks.validate            the tables, to look at
    python -m litezoo.benchmarks.validate --write    also docs/predictor.md and benchmarks/fits/

Every row that is published or measured is predicted by a fit that has not seen its family; then
with one other member of the family known; then from another device. Networks are traced once and
kept in ~/.cache/litezoo/networks. It takes minutes on one core; needed are torch and timm, for the
networks' shapes only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from litezoo.models.errors import LitezooError
from litezoo.models.files import write_whole
from litezoo.recipes.devices import get_device, list_devices

from .evidence import Evidence, read_measured, read_published
from .fit import (
    Fit,
    Fitted,
    Prior,
    Row,
    Target,
    fit_target,
    fits_folder,
    pool,
    solve,
    write_fits,
)  # fmt: skip
from .latency import Chip, Costs, Floats, Mode, Sample, Work, compute_dtype, read_chip
from .network import Network
from .predict import kin_of, nearest_fit, network_work, transfer_prior

__all__ = ["Group", "Score", "Transfer", "main", "read_groups", "score", "spearman"]

#: Least rows of a group to fit it, and to have its line in the table.
_LEAST_ROWS, _LEAST_SHOWN = 4, 15
#: Networks of a device that are measured where "five anchors" is said, and least others to score.
_ANCHORS, _LEAST_SCORED = 5, 3
#: Rows from which on a group is fitted from the defaults, not from what its like say together.
_RICH = 60
#: By which factor sources differ (median of what both have) that are not of one machine.
_DISAGREE = 1.25


@dataclass(frozen=True, kw_only=True)
class Level:
    """What a group of rows is to reach: rho and percent within 15 %, of all and of light nets.

    `light_anchored` is with one member of the family measured.
    """

    rho: float
    w15: float | None = None
    light: float | None = None
    light_anchored: float | None = None


#: What is aimed at, by (device, runtime); "" is any.
LEVELS: Mapping[tuple[str, str], Level] = {
    ("rtx3090", "pytorch-eager"): Level(rho=0.99, w15=90, light=88),
    ("rtx4090", "pytorch-eager"): Level(rho=0.99, w15=90, light=88),
    ("rtx4090", "pytorch-compile"): Level(rho=0.985, w15=82, light=80),
    ("i7-12700h", "pytorch-compile"): Level(rho=0.99, w15=80),
    ("i9-10940x", "pytorch-compile"): Level(rho=0.97, w15=70),
    ("v100", "paddle-trt"): Level(rho=0.98, w15=62, light_anchored=80),
    ("t4", "paddle-trt"): Level(rho=0.96, w15=55, light_anchored=70),
    ("t4", "tensorrt"): Level(rho=0.96, w15=55, light_anchored=70),
    ("snapdragon-855-cpu", "paddle-lite"): Level(rho=0.99, w15=90),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows of one target and version, with the physics of its device."""

    target: Target
    version: str
    chip: Chip
    rows: tuple[Row, ...]
    proxies: Mapping[str, Floats]
    sources: tuple[str, ...]
    left_out: int

    @property
    def key(self) -> tuple[Target, str]:
        """What it is of."""
        return self.target, self.version


@dataclass(frozen=True, kw_only=True)
class Score:
    """How near predictions are to measurements: shares are percent, `median` and `p90` errors."""

    rows: int
    rho: float
    w10: float
    w15: float
    w20: float
    median: float
    p90: float


def spearman(one: Floats, other: Floats) -> float:
    """Return Spearman's rank correlation; NaN for fewer than three values.

    >>> round(spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])), 2)
    0.8
    """
    if len(one) < 3:
        return math.nan
    first, second = _ranks(one), _ranks(other)
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else math.nan


def _ranks(values: Floats) -> Floats:
    """Return ranks, equal values sharing their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean: Floats = (last - (count - 1) / 2)[place]
    return mean


def score(predicted: Floats, measured: Floats) -> Score:
    """Return how near predictions are to what was measured; NaN without rows."""
    if not len(predicted):
        nothing = math.nan
        return Score(rows=0, rho=nothing, w10=nothing, w15=nothing, w20=nothing, median=nothing,
                     p90=nothing)  # fmt: skip
    ratio = predicted / measured

    def within(share: float) -> float:
        return 100 * float(np.mean(np.abs(ratio - 1) <= share))

    errors = np.abs(ratio - 1)
    return Score(
        rows=len(ratio),
        rho=spearman(predicted, measured),
        w10=within(0.10),
        w15=within(0.15),
        w20=within(0.20),
        median=100 * float(np.median(errors)),
        p90=100 * float(np.quantile(errors, 0.9)),
    )


# ------------------------------------------------------------------- rows and networks


class Networks:
    """The networks of evidence, traced once and kept as text in a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or root / "litezoo" / "networks" / _tracer_hash()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[str, str, int], Network | str] = {}

    def find(self, row: Evidence) -> Network | str:
        """Return a row's network, or in a sentence why there is none."""
        key = (row.model, row.graph_form, row.resolution)
        if key not in self._known:
            self._known[key] = self._read_or_trace(*key)
        return self._known[key]

    def _read_or_trace(self, model: str, graph_form: str, side: int) -> Network | str:
        file = self.folder / f"{model.replace(':', '.')}@{side}.{graph_form}.json"
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            return text[1:] if text.startswith("!") else Network.from_json(text)
        from .tracing import find_network

        form: Literal["train", "deploy"] = "train" if graph_form == "train" else "deploy"
        try:
            found: Network | str = find_network(model, graph_form=form, resolution=side)
        except (LitezooError, RuntimeError, ValueError) as error:
            found = str(error).partition("\n")[0]
        write_whole(file, "!" + found if isinstance(found, str) else found.to_json())
        return found


def _tracer_hash() -> str:
    """Return what changes with what traces: litezoo's tracer and timm's version."""
    from importlib.metadata import version

    here = Path(__file__).parent
    text = (here / "tracing.py").read_bytes() + version("timm").encode()
    return hashlib.sha256(text).hexdigest()[:12]


def read_groups(
    rows: Iterable[Evidence], networks: Networks, *, progress: Callable[[str], None]
) -> list[Group]:
    """Return the rows as groups of one target and version, with their networks' work.

    Sources that publish the same conditions and disagree (other boards of the chip) are groups of
    their own, the source being part of the version.
    Groups of fewer than four rows, and of devices whose physics are not known, are left out.
    """
    sorted_rows: dict[tuple[Target, str], list[Evidence]] = {}
    for row in rows:
        target = Target(
            device=row.device, runtime=row.runtime, precision=row.precision, layout=row.layout,
            threads=row.threads,
        )  # fmt: skip
        sorted_rows.setdefault((target, row.runtime_version), []).append(row)
    sorted_rows = {
        (target, f"{version} {source}".strip()): part
        for (target, version), mine in sorted_rows.items()
        for source, part in _by_source(mine).items()
    }
    works: dict[tuple[int, Mode, bool, bool, bool], Work] = {}
    groups = []
    for (target, version), mine in sorted_rows.items():
        if len(mine) < _LEAST_ROWS:
            continue
        chip = _chip(target, progress)
        if chip is None:
            continue
        progress(f"{target}: {len(mine)} rows")
        found: list[Row] = []
        kept: list[Network] = []
        for row in mine:
            network = networks.find(row)
            if isinstance(network, str):
                progress(f"left out: {row.model} ({network})")
                continue
            on_gpu = chip.kind == "gpu"
            key = (id(network), target.mode, target.autocast, on_gpu, row.batch > 1)
            if key not in works:
                works[key] = network_work(network, target, on_gpu=on_gpu, batch=row.batch)
            found.append(Row(model=row.model, work=works[key], batch=row.batch, ms=row.ms))
            kept.append(network)
        if len(found) < _LEAST_ROWS:
            continue
        groups.append(
            Group(
                target=target,
                version=version,
                chip=chip,
                rows=tuple(found),
                proxies=_proxies(found, kept, chip, target.mode),
                sources=tuple(sorted({row.source for row in mine})),
                left_out=len(mine) - len(found),
            )
        )
    return groups


def _by_source(rows: Sequence[Evidence]) -> dict[str, list[Evidence]]:
    """Return rows by their source where sources disagree, else all under ""."""
    parts: dict[str, list[Evidence]] = {}
    for row in rows:
        parts.setdefault(row.source, []).append(row)
    times: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        times.setdefault((row.model, row.batch, row.resolution), []).append(row.ms)
    ratios = [max(some) / min(some) for some in times.values() if len(some) > 1]
    if len(parts) < 2 or not ratios or float(np.median(ratios)) < _DISAGREE:
        return {"": list(rows)}
    return parts


def _chip(target: Target, progress: Callable[[str], None]) -> Chip | None:
    if target.device not in list_devices():
        progress(f"left out: {target} (no such device)")
        return None
    try:
        return read_chip(
            get_device(target.device),
            precision=target.precision,
            threads=target.threads,
            nominal=True,
        )
    except LitezooError as error:
        progress(f"left out: {target} ({error})")
        return None


#: What people use instead of a model, in the table's order.
PROXIES = ("params", "MACs", "activations", "roofline")


def _proxies(
    rows: Sequence[Row], networks: Sequence[Network], chip: Chip, mode: Mode
) -> Mapping[str, Floats]:
    """Return each proxy of each row: counts times the batch, and the plain roofline in ms."""
    batch = np.array([float(row.batch) for row in rows])
    costs = Costs(
        [Sample(work=row.work, batch=row.batch) for row in rows], [chip] * len(rows), mode=mode
    )
    least = np.maximum(costs.compute_ms, costs.activation_ms + costs.weight_ms) * costs.count
    return {
        "params": batch * np.array([float(network.params) for network in networks]),
        "MACs": batch * np.array([float(network.macs) for network in networks]),
        "activations": batch * np.array([float(network.activations) for network in networks]),
        "roofline": np.bincount(costs.row, weights=least, minlength=costs.rows),
    }


# ------------------------------------------------------------------- fitting everything


def fit_groups(
    groups: Sequence[Group], *, progress: Callable[[str], None]
) -> dict[tuple[Target, str], Fitted]:
    """Fit every group: rich ones from the defaults, others from what their like say together."""
    found: dict[tuple[Target, str], Fitted] = {}
    for like in _likes(groups).values():
        priors: dict[str, Prior] = {}
        poor = [group for group in like if len(group.rows) < _RICH]
        if len(like) > 1 and poor:
            progress(f"{like[0].target.runtime}, {like[0].target.precision}: {len(like)} together")
            priors = _pools(like)
        for group in like:
            alone = len(group.rows) >= _RICH or not priors
            progress(f"fit {group.target} {group.version}: {len(group.rows)} rows")
            found[group.key] = fit_target(
                group.target,
                group.rows,
                group.chip,
                prior=None if alone else priors[""],
                priors=None if alone else priors,
                version=group.version,
                sources=group.sources,
                left_out=group.left_out,
            )
    return found


def _likes(groups: Sequence[Group]) -> dict[tuple[str, ...], list[Group]]:
    """Return groups whose parameters are alike: one engine, kind of device and dtype."""
    found: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        dtype = compute_dtype(group.target.precision)
        float_or_int = "int8" if dtype == "int8" else "float"
        key = (
            kin_of(group.target.runtime), group.target.mode, group.chip.kind, float_or_int,
            str(group.chip.fp32) if group.chip.kind == "gpu" else "",
        )  # fmt: skip
        found.setdefault(key, []).append(group)
    return found


def _pools(groups: Sequence[Group]) -> dict[str, Prior]:
    """Return what groups say together, "" of all rows and of each family without it."""
    rows = {group.target: group.rows for group in groups}
    chips = {group.target: group.chip for group in groups}
    whole = pool(rows, chips)
    found = {"": whole}
    families = {row.family for group in groups if len(group.rows) < _RICH for row in group.rows}
    for family in sorted(families):
        if any(row.family != family for group in groups for row in group.rows):
            found[family] = pool(rows, chips, without=family, start=whole)
    return found


# ------------------------------------------------------------------- transfer


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Rows of a device predicted from another's: by physics alone, and with five anchors.

    `errors` are log(measured / predicted) by physics; `known` are the predictions with anchors, NaN
    for the anchors, and `ms` what was measured.
    """

    source: Fit
    target: Target
    kinship: str
    physics: Score
    anchored: Score | None
    errors: Floats
    known: Floats
    ms: Floats


def transfers(
    groups: Sequence[Group],
    fitted: Mapping[tuple[Target, str], Fitted],
    *,
    progress: Callable[[str], None],
) -> list[Transfer]:
    """Predict each group by the fit that would serve it if its device, or only it, had no rows."""
    found = []
    for group in groups:
        if len(group.rows) < _LEAST_SCORED + _ANCHORS:
            continue
        seen = set[tuple[str, str, str]]()
        for only in (True, False):
            fits = [
                one.fit
                for (target, _), one in fitted.items()
                if target != group.target and (only or target.device != group.target.device)
            ]
            best = nearest_fit(group.target, get_device(group.target.device), fits)
            if best is None:
                continue
            kinship, fit = best
            name = (fit.device, fit.runtime, fit.precision)
            if name in seen:
                continue
            seen.add(name)
            progress(f"transfer {fit.device} -> {group.target}")
            found.append(_transfer(group, kinship, fit))
    return found


def _transfer(group: Group, kinship: str, fit: Fit) -> Transfer:
    """Predict a group by another fit, without and with five of its own rows."""
    prior = transfer_prior(fit, group.chip, target=group.target)
    ms = np.array([row.ms for row in group.rows])
    costs = Costs(
        [Sample(work=row.work, batch=row.batch) for row in group.rows],
        [group.chip] * len(group.rows),
        mode=group.target.mode,
    )
    predicted = costs.ms(prior.mean)
    chosen = _spread_models(group.rows, predicted)
    rest = np.array([row.model not in chosen for row in group.rows])
    anchored = None
    known = np.full(len(ms), np.nan)
    if rest.sum() >= _LEAST_SCORED:
        solution = solve(costs, ms, prior, weights=np.where(rest, 0.0, 1.0))
        known[rest] = costs.ms(solution.values)[rest]
        anchored = score(known[rest], ms[rest])
    return Transfer(
        source=fit,
        target=group.target,
        kinship=kinship,
        physics=score(predicted, ms),
        anchored=anchored,
        errors=np.log(ms / predicted),
        known=known,
        ms=ms,
    )


def _spread_models(rows: Sequence[Row], predicted: Floats) -> set[str]:
    """Return five models from the fastest to the slowest predicted, ends left out."""
    means: dict[str, float] = {}
    for row, ms in zip(rows, predicted, strict=True):
        means.setdefault(row.model, float(ms) / row.batch)
    order = sorted(means, key=lambda name: means[name])
    return {order[round((place + 0.5) / _ANCHORS * (len(order) - 1))] for place in range(_ANCHORS)}


def experience(found: Sequence[Transfer]) -> dict[str, dict[str, float]]:
    """Return what transfers of each kinship taught: quantiles of log(measured / predicted), rho."""
    taught = {}
    for kinship in dict.fromkeys(one.kinship for one in found):
        mine = [one for one in found if one.kinship == kinship]
        # each transfer counts alike, however many rows it has
        errors = np.concatenate([np.quantile(one.errors, np.linspace(0.05, 0.95, 19))
                                 for one in mine])  # fmt: skip
        low, high = np.quantile(errors, (0.1, 0.9))
        taught[kinship] = {
            "transfers": len(mine),
            "low": round(float(low), 3),
            "high": round(float(high), 3),
            "rho": round(float(np.median([one.physics.rho for one in mine])), 3),
            "median": round(float(np.median([one.physics.median for one in mine])) / 100, 3),
        }
    return taught


# ------------------------------------------------------------------- the tables


def _cell(number: float | None, digits: int = 0) -> str:
    if number is None or math.isnan(number):
        return "-"
    text = f"{number:.{digits}f}"
    return text.removeprefix("0") if digits and text.startswith("0.") else text


def _words(target: Target, version: str) -> tuple[str, str]:
    extra = [target.precision, target.layout] if target.layout else [target.precision]
    if target.threads:
        extra.append(f"{target.threads} thr.")
    return target.device, " ".join([target.runtime, version, *extra]).replace("  ", " ")


def _judged(target: Target, whole: Score, light: Score, light_anchored: Score) -> str:
    """Return whether a group's levels are reached, and by how much they are missed."""
    level = LEVELS.get((target.device, target.runtime))
    if level is None:
        return ""
    missed = []
    if round(whole.rho, 3) < level.rho:
        missed.append(f"rho {whole.rho:.3f} of {level.rho}")
    for name, wanted, found in (
        ("w15", level.w15, whole.w15),
        ("light w15", level.light, light.w15),
        ("light w15 with a member", level.light_anchored, light_anchored.w15),
    ):
        if wanted is not None and not round(found) >= wanted:
            missed.append(f"{name} {found:.0f} of {wanted:.0f}")
    return "missed: " + ", ".join(missed) if missed else "reached"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One group's scores: all rows, light ones, with a member of the family known, proxies."""

    group: Group
    whole: Score
    light: Score
    anchored: Score
    light_anchored: Score
    covered: float
    proxies: Mapping[str, Score]
    verdict: str


def read_lines(groups: Sequence[Group], fitted: Mapping[tuple[Target, str], Fitted]) -> list[Line]:
    """Return the scores of every group with enough rows."""
    lines = []
    for group in groups:
        if len(group.rows) < _LEAST_SHOWN:
            continue
        one = fitted[group.key]
        ms = np.array([row.ms for row in group.rows])
        light = np.array([row.is_light for row in group.rows])
        known = np.isfinite(one.anchored)
        inside = np.log(ms / one.unseen)
        covered = np.mean((inside >= one.fit.unseen.low) & (inside <= one.fit.unseen.high))
        whole, light_score = score(one.unseen, ms), score(one.unseen[light], ms[light])
        light_anchored = score(one.anchored[light & known], ms[light & known])
        proxies = {}
        for name, values in group.proxies.items():
            factor = math.exp(float(np.median(np.log(ms / values))))
            proxies[name] = score(values * factor, ms)
        lines.append(
            Line(
                group=group,
                whole=whole,
                light=light_score,
                anchored=score(one.anchored[known], ms[known]),
                light_anchored=light_anchored,
                covered=100 * float(covered),
                proxies=proxies,
                verdict=_judged(group.target, whole, light_score, light_anchored),
            )
        )
    return sorted(lines, key=lambda line: -line.whole.rows)


def family_table(lines: Sequence[Line]) -> list[str]:
    """Return the table of families left out."""
    text = [
        "| device | runtime | rows | rho | w10 / w15 / w20 | median / p90 % "
        "| light: rows, rho, w15 | + 1 member: w15, light | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        whole, light = line.whole, line.light
        device, runtime = _words(*line.group.key)
        text.append(
            f"| {device} | {runtime} | {whole.rows} | {_cell(whole.rho, 3)} "
            f"| {_cell(whole.w10)} / {_cell(whole.w15)} / {_cell(whole.w20)} "
            f"| {_cell(whole.median, 1)} / {_cell(whole.p90)} "
            f"| {light.rows}, {_cell(light.rho, 3)}, {_cell(light.w15)} "
            f"| {_cell(line.anchored.w15)}, {_cell(line.light_anchored.w15)} | {line.verdict} |"
        )
    return text


def proxy_table(lines: Sequence[Line]) -> list[str]:
    """Return the table of what people use instead, on the same rows."""
    text = [
        f"| device | runtime | rows | {' | '.join(PROXIES)} | model, family left out |",
        f"|---|---|---|{'---|' * (len(PROXIES) + 1)}",
    ]
    for line in lines:
        device, runtime = _words(*line.group.key)
        cells = " | ".join(
            f"{_cell(line.proxies[name].rho, 2)}, {_cell(line.proxies[name].w15)}"
            for name in PROXIES
        )
        text.append(
            f"| {device} | {runtime} | {line.whole.rows} | {cells} "
            f"| {_cell(line.whole.rho, 2)}, {_cell(line.whole.w15)} |"
        )
    return text


def together_table(
    groups: Sequence[Group],
    fitted: Mapping[tuple[Target, str], Fitted],
    moved: Sequence[Transfer],
) -> list[str]:
    """Return the table of runtimes on many boards of few rows each, the boards taken together."""
    text = [
        "| runtime | boards | rows | rho | w15 / w20 | median / p90 % | rho in a board (median) "
        "| 5 anchors: rows, w15 / w20, median % | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[str, str, str], list[Group]] = {}
    for group in groups:
        if len(group.rows) < _RICH:
            name = (group.target.runtime, group.target.precision, group.chip.kind)
            kinds.setdefault(name, []).append(group)
    for (runtime, precision, _), mine in sorted(kinds.items(), key=lambda item: -len(item[1])):
        if len(mine) < 3:
            continue
        ms = np.concatenate([[row.ms for row in group.rows] for group in mine])
        unseen = np.concatenate([fitted[group.key].unseen for group in mine])
        within = [
            spearman(fitted[group.key].unseen, np.array([row.ms for row in group.rows]))
            for group in mine
        ]
        own = {group.target for group in mine}
        best = {one.target: one for one in moved if one.target in own and one.anchored}
        known = np.concatenate([[], *(one.known for one in best.values())])
        truth = np.concatenate([[], *(one.ms for one in best.values())])
        scored = np.isfinite(known)
        whole, anchored = score(unseen, ms), score(known[scored], truth[scored])
        text.append(
            f"| {runtime} {precision} | {len(mine)} | {whole.rows} | {_cell(whole.rho, 3)} "
            f"| {_cell(whole.w15)} / {_cell(whole.w20)} "
            f"| {_cell(whole.median, 1)} / {_cell(whole.p90)} "
            f"| {_cell(float(np.median(within)), 3)} "
            f"| {anchored.rows}, {_cell(anchored.w15)} / {_cell(anchored.w20)}, "
            f"{_cell(anchored.median, 1)} "
            f"| {_judged_boards(runtime, precision, whole, anchored)} |"
        )
    return text


def _judged_boards(runtime: str, precision: str, whole: Score, anchored: Score) -> str:
    """Return whether ncnn's boards reach their level: rho 0.95, with anchors 75 % within 20 %."""
    if runtime != "ncnn" or precision == "int8":
        return ""
    missed = [f"rho {whole.rho:.3f} of 0.95"] if round(whole.rho, 3) < 0.95 else []
    if round(anchored.w20) < 75:
        missed.append(f"w20 with 5 anchors {anchored.w20:.0f} of 75")
    return "missed: " + ", ".join(missed) if missed else "reached"


def transfer_table(found: Sequence[Transfer]) -> list[str]:
    """Return the table of devices left out."""
    text = [
        "| to | from | kinship | rows | rho | physics: w20, median % | 5 anchors: w20, median % |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(found, key=lambda one: -one.physics.rows):
        if one.physics.rows < _LEAST_SHOWN:
            continue
        device, runtime = _words(one.target, "")
        source = f"{one.source.device}, {one.source.runtime} {one.source.version}".rstrip()
        source += f" {one.source.precision} {one.source.layout}".rstrip()
        anchored = "-"
        if one.anchored is not None:
            anchored = f"{_cell(one.anchored.w20)}, {_cell(one.anchored.median, 1)}"
        text.append(
            f"| {device}, {runtime} | {source} | {one.kinship} | {one.physics.rows} "
            f"| {_cell(one.physics.rho, 3)} "
            f"| {_cell(one.physics.w20)}, {_cell(one.physics.median, 1)} | {anchored} |"
        )
    return text


#: Why groups miss their level, as far as was found; a group without an entry says so.
REASONS: Mapping[tuple[str, str], str] = {
    ("v100", "paddle-trt"): (
        "The table of the documents' older version agrees with this one within 15 % in only two "
        "thirds of the rows, and a fit that has seen every family reaches 64 %. Grouped "
        "convolutions run group by group at batch 4 and 8 and not at 1 (ResNeXt-50 32x4d: 2.4 ms "
        "for one image, 8.4 for four); MobileNetV3 takes 0.07 ms an image more than its kernels' "
        "work, SqueezeNet and AlexNet less: the copy of the image is not the same for all."
    ),
    ("t4", "tensorrt"): (
        "Few rows of light networks have a second member of their family, MnasNet's most of them."
    ),
    ("rtx4090", "pytorch-compile"): (
        "Version 2.4 compiled concatenations and SE gates with other kernels than 2.9 does, whose "
        "schedule the model has: EfficientNet +18 %, MixNet and GhostNetV2 +20 %, RepGhost -20 %."
    ),
    ("rtx4090", "pytorch-eager"): (
        "Float32 promotions and depthwise 7x7 convolutions of StarNet (+18 %), and "
        "EfficientNet-CC, whose kernels differ for each image (+25 %); channels-last, RegNet's "
        "groups of 24 and 40."
    ),
    ("rtx3090", "pytorch-eager"): (
        "Channels-last: RegNet and ResNeXt groups whose width is no power of two run up to 1.6 "
        "times as long (older versions: 3 times), Xception's depthwise convolutions 1.35 times."
    ),
    ("", "ncnn"): (
        "ResNet-18 differs by 27 % (standard deviation) from board to board of equal physics, "
        "ShuffleNetV2 and EfficientNetV2-B0 by 16 %; the rows do not say the version of ncnn, "
        "which chooses the convolutions."
    ),
    ("", "npu"): (
        "Each group has 15 to 40 rows of large and small networks, whose order the roofline gets "
        "right without a fit; what a compiler maps badly is known only from rows of that network, "
        "so a measured neighbour is preferred (the table of devices left out)."
    ),
    ("i9-10940x", "pytorch-compile"): (
        "Version 2.2 only (2.4 reaches it): left out, VGG's classifier is predicted at a third of "
        "its time, as its 100 million weights are read at 5 GB/s; ResNet is a third of the rows, "
        "and without it the other families predict it 20 % slow."
    ),
}

_HEAD = """# How good predictions are

Generated by `python -m litezoo.benchmarks.validate --write`; do not edit. The model is
`benchmarks/latency.py`: about twenty numbers for a device, runtime and precision, one meaning each,
fitted to published and measured rows (`benchmarks/fits/`). `litezoo predict MODEL --device D`
answers with an interval and with what it stands on; `--explain` shows each kernel, and
`--fit ROWS` refits a device from your own rows.

rho is Spearman's rank correlation, w15 the percent of rows predicted within 15 %, light are
networks under 1.5 GMACs an image. Every row of the first table was predicted by a fit that had seen
no network of its family; "+ 1 member" then knows one of them, that of middle size, and is scored on
the others. Sources that disagree by more than a quarter under the same conditions (other boards of
a chip) are lines of their own, named in the runtime's column.
"""

_BOARDS_HEAD = """
## Boards of few rows, together

Families left out of all boards at once; what the boards say together is each one's prior. With
anchors a board starts from its nearest relative and knows five of its own networks, from a fast to
a slow one. The aim for ncnn is rho 0.95 together and 75 % within 20 % with five anchors.
"""

_PROXIES_HEAD = """
## Against the naive proxies

rho, w15 on the same rows. Each proxy is scaled by one factor, the best for that group, and counts
the batch; the roofline takes each kernel's greater time of arithmetic and memory at the chip's
peaks. What the model buys is the difference to the last column.
"""

_TRANSFER_HEAD = """
## Devices left out

What the nearest fit of another device (or of another runtime or precision of the same) predicts by
the physics of both, and what five measured networks add, scored on the others.
"""


def page(lines: Sequence[Line], boards: Sequence[str], moved: Sequence[Transfer]) -> str:
    """Return docs/predictor.md; `boards` is the table of boards together."""
    covered = [line.covered for line in lines]
    text = [
        _HEAD,
        "## Families left out",
        "",
        *family_table(lines),
        "",
        f"The intervals are the 10 % and 90 % quantiles of these errors: {np.median(covered):.0f} "
        "% of a group's rows lie within (median over groups).",
        "",
        _BOARDS_HEAD,
        *boards,
        "",
        "## Where a level is missed, and why",
        "",
        *_misses(lines, boards),
        _PROXIES_HEAD,
        *proxy_table(lines),
        _TRANSFER_HEAD,
        *transfer_table(moved),
    ]
    return "\n".join(text) + "\n"


def _misses(lines: Sequence[Line], boards: Sequence[str]) -> list[str]:
    """Return a line for each group that misses its level: by how much, and the reason found."""
    found = []
    for line in lines:
        if line.verdict.startswith("missed"):
            device, runtime = _words(*line.group.key)
            target = line.group.target
            reason = REASONS.get((target.device, target.runtime), "No reason was found.")
            found.append(f"- {device}, {runtime}: {line.verdict}. {reason}")
    for row in boards:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[-1].startswith("missed"):
            found.append(f"- {cells[0]}, {cells[1]} boards: {cells[-1]}. {REASONS['', 'ncnn']}")
    return [*found, *_npus(lines)] or ["None is."]


def _npus(lines: Sequence[Line]) -> list[str]:
    """Return in a line how networks are ranked on NPUs, where no milliseconds are promised."""
    mine = [line for line in lines if line.group.chip.kind == "npu"]
    if not mine:
        return []
    whole = float(np.mean([line.whole.rho for line in mine]))
    proxies = {name: float(np.mean([line.proxies[name].rho for line in mine])) for name in PROXIES}
    missed = whole <= proxies["roofline"]
    return [
        f"- NPUs ({len(mine)} groups), ranking better than the plain roofline: "
        f"{'missed' if missed else 'reached'}. rho is {whole:.3f} on average with the family left "
        f"out, {', '.join(f'{proxies[name]:.3f} by {name}' for name in PROXIES)}."
        f"{' ' + REASONS['', 'npu'] if missed else ''}"
    ]


# ------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the validation; return the program's exit status."""
    parser = argparse.ArgumentParser(prog="python -m litezoo.benchmarks.validate")
    parser.add_argument("--write", action="store_true", help="write docs/predictor.md and fits/")
    parser.add_argument("--device", action="append", help="only this device (may be repeated)")
    options = parser.parse_args(arguments)
    if options.write and options.device:
        parser.error("--write is for all devices; leave --device out")

    def progress(step: str) -> None:
        print(step, file=sys.stderr)

    try:
        rows = [*read_published(), *read_measured()]
        if options.device:
            rows = [row for row in rows if row.device in options.device]
        groups = read_groups(rows, Networks(), progress=progress)
        fitted = fit_groups(groups, progress=progress)
        lines = read_lines(groups, fitted)
        moved = transfers(groups, fitted, progress=progress)
    except LitezooError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    boards = together_table(groups, fitted, moved)
    tables = (family_table(lines), boards, proxy_table(lines), transfer_table(moved))
    print("\n\n".join("\n".join(table) for table in tables))
    if options.write:
        folder = fits_folder()
        fits = [one.fit for one in fitted.values()]
        for file in folder.glob("*.json"):
            if file.stem not in {fit.device for fit in fits}:
                file.unlink()
        write_fits(fits, folder)
        text = json.dumps(experience(moved), indent=1) + "\n"
        write_whole(folder / "_transfers.json", text)
        write_whole(Path("docs/predictor.md"), page(lines, boards, moved))
    return 0


if __name__ == "__main__":
    sys.exit(main())
