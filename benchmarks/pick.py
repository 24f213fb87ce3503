"""Which backbone for a chip and a budget, and how that is known.

::

    evidence of one question         every network of the zoo           what was asked
    device, runtime, precision,      a row: its latency by the best     a budget, least top-1,
    layout, threads, graph form,     evidence there is, its top-1,      licence, size, operators
    batch, image size                size and operators                          |
            |________________________________|___________________________________|
                                             v
                   the Pareto front of latency and top-1, and one of its rows

`benchmarks.backbones` makes the rows; here they are filtered, ordered, and put into words. Nothing
imports torch: networks and their operators are kept in networks.json and operators.json, which
tests compare with the code.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.errors import CheckFailed, UsageError, unknown_name
from litezoo.recipes.devices import Device, get_device

from .backbones import (
    BASES,
    TASKS,
    Asked,
    Backbone,
    Conditions,
    Task,
    check_words,
    choose_conditions,
    conditions_of,
    known_rows,
    list_backbones,
    serves,
    three_digits,
)
from .evidence import Evidence
from .latency import compute_dtype
from .operators import check_operators, read_operators

__all__ = [
    "PERCENTILES",
    "Backbone",
    "Budget",
    "Conditions",
    "Pick",
    "front_of",
    "judged",
    "pick",
    "recommend",
]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a network may take: at most `latency_ms` a batch, or at least `throughput` images/s."""

    latency_ms: float | None = None
    throughput: float | None = None

    def __str__(self) -> str:
        """Say it in words, "" where there is none."""
        if self.latency_ms is not None:
            return f"at most {self.latency_ms:g} ms"
        if self.throughput is not None:
            return f"at least {self.throughput:g} images/s"
        return ""

    @property
    def is_open(self) -> bool:
        """Whether nothing is asked."""
        return self.latency_ms is None and self.throughput is None

    def allows(self, ms: float, images_per_s: float) -> bool:
        """Return whether a batch of `ms` at a rate of `images_per_s` is within the budget."""
        if self.latency_ms is not None:
            return ms <= self.latency_ms
        return self.throughput is None or images_per_s >= self.throughput


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The answer: a Pareto front, the most accurate first, and one network of it.

    `front` holds what was asked for at most (`top`); `recommended` is None where there is no budget
    to choose by, and may lie behind a row of the front that may miss the budget; `best_seen` is the
    most accurate within the budget that was measured or published. `unranked` are networks without
    public weights within the budget, by the paper's own top-1. `considered` counts networks.
    """

    device: str
    conditions: Conditions
    budget: Budget
    percentile: int
    task: Task
    front: tuple[Backbone, ...]
    recommended: Backbone | None
    best_seen: Backbone | None
    reason: str
    unranked: tuple[Backbone, ...]
    considered: int
    notes: tuple[str, ...]

    @property
    def rows(self) -> tuple[Backbone, ...]:
        """The front and, where it is not among them, the recommended row; most accurate first."""
        extra = () if self.recommended in (None, *self.front) else (self.recommended,)
        return tuple(sorted((*self.front, *extra), key=lambda row: (-_top1(row), row.ms)))


# ------------------------------------------------------------------------------- the algebra


def front_of(rows: Iterable[Backbone]) -> list[Backbone]:
    """Return the rows that no other is as fast and as accurate as, the fastest first.

    Rows without a top-1 have no place. Of equal rows the most trusted, then the first counts.
    """
    ranked = [row for row in rows if row.top1_percent is not None]
    ranked.sort(key=lambda row: (row.ms, -_top1(row), BASES.index(row.basis)))
    found: list[Backbone] = []
    for row in ranked:
        if not found or _top1(row) > _top1(found[-1]):
            found.append(row)
    return found


def _top1(row: Backbone) -> float:
    return -math.inf if row.top1_percent is None else row.top1_percent


def recommend(
    rows: Sequence[Backbone], budget: Budget, *, min_top1: float | None = None
) -> Backbone | None:
    """Return the row to take: of those that surely meet the budget the most accurate.

    Where none surely does, the one that is the likeliest to; without a budget but with a least
    top-1 the fastest; without both None. `rows` are within the budget and the constraints.
    """
    front = front_of(rows)
    if not front or (budget.is_open and min_top1 is None):
        return None
    if budget.is_open:
        return front[0]
    if sure := front_of(row for row in rows if not row.may_miss):
        return sure[-1]
    return min(front, key=lambda row: row.high_ms or row.ms)


# -------------------------------------------------------------------------------- the answer


def pick(
    *,
    device: str,
    latency_ms: float | None = None,
    throughput: float | None = None,
    batch: int | None = None,
    percentile: int = 50,
    resolution: int | None = None,
    precision: str | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    graph_form: str = "deploy",
    min_top1: float | None = None,
    license: str | None = None,
    task: Task = "classifier",
    avoid_op: Collection[str] = (),
    max_params_m: float | None = None,
    max_memory_mib: float | None = None,
    top: int = 10,
) -> Pick:
    """Return the Pareto front of latency and top-1 on a device under constraints, and one of it.

    device: a name of `list_devices()`. latency_ms, throughput: the budget, one of both: most
    milliseconds a batch, at `percentile` (50, 90 or 99), or least images a second. batch: default 1
    for a latency, else what most evidence is of. resolution: height and width of images (default:
    what the weights were tested at). precision, runtime, threads: default as in the result's
    `conditions`. min_top1: least ImageNet top-1 in percent. license: "free" (the default: any use),
    "any", or a licence's name. task: "backbone" takes weights without classes too. avoid_op: ONNX
    operators, or patterns such as "squeeze-excite", that no network of the answer has. top: most
    rows of the front.

    UsageError for names and numbers that cannot be, MissingError where there is no evidence of any
    kind, CheckFailed where no network meets the budget and the constraints, with what is nearest.
    """
    chip = get_device(device)
    budget = Budget(latency_ms=latency_ms, throughput=throughput)
    _check_request(
        budget, batch=batch, percentile=percentile, resolution=resolution, threads=threads,
        graph_form=graph_form, min_top1=min_top1, license=license, task=task,
        max_params_m=max_params_m, max_memory_mib=max_memory_mib, top=top,
    )  # fmt: skip
    check_operators(avoid_op)
    known = known_rows(device).get(device, [])
    asked = Asked(
        runtime=runtime, precision=precision, threads=threads, graph_form=graph_form, batch=batch,
        resolution=resolution,
    )  # fmt: skip
    check_words(chip, known, asked)
    conditions = choose_conditions(chip, known, asked, for_latency=latency_ms is not None)
    avoided = _models_with(avoid_op)
    rows = [
        row
        for row in list_backbones(
            chip, conditions, known,
            models=[name for name in list_models() if name not in avoided],
            resolution=resolution, percentile=percentile, task=task, license=license,
        )
        if _fits(row, max_params_m=max_params_m, max_memory_mib=max_memory_mib)
    ]  # fmt: skip
    ranked = [row for row in rows if row.top1_percent is not None]
    accurate = [row for row in ranked if min_top1 is None or _top1(row) >= min_top1]
    if not accurate:
        raise CheckFailed(_nothing_fits(ranked, device, min_top1=min_top1, license=license))
    within = [
        judged(row, budget, percentile) for row in accurate
        if budget.allows(row.ms, row.images_per_s)
    ]  # fmt: skip
    if not within:
        raise CheckFailed(_too_slow(accurate, budget, device, conditions))
    front = front_of(within)[::-1]
    chosen = recommend(within, budget, min_top1=min_top1)
    seen = max((row for row in within if row.is_seen), key=_top1, default=None)
    unranked = [
        row
        for row in rows
        if row.top1_percent is None
        and row.paper_top1_percent is not None
        and budget.allows(row.ms, row.images_per_s)
        and (min_top1 is None or row.paper_top1_percent >= min_top1)
        and not any(o.ms <= row.ms and _top1(o) >= row.paper_top1_percent for o in within)
    ]
    return Pick(
        device=device,
        conditions=conditions,
        budget=budget,
        percentile=percentile,
        task=task,
        front=tuple(front[:top]),
        recommended=chosen,
        best_seen=seen,
        reason=_reason(chosen, seen, front, budget, chip, min_top1),
        unranked=tuple(unranked),
        considered=len({row.model for row in ranked}),
        notes=tuple(
            _notes(
                chip, known, conditions, asked, budget, percentile, task, license, front, within,
                accurate, unranked, top,
            )
        ),
    )  # fmt: skip


def _check_request(
    budget: Budget,
    *,
    batch: int | None,
    percentile: int,
    resolution: int | None,
    threads: int | None,
    graph_form: str,
    min_top1: float | None,
    license: str | None,
    task: str,
    max_params_m: float | None,
    max_memory_mib: float | None,
    top: int,
) -> None:
    """Refuse numbers and names that cannot be."""
    if budget.latency_ms is not None and budget.throughput is not None:
        raise UsageError("--latency-ms and --throughput are two budgets; give one")
    for option, value in (
        ("--latency-ms", budget.latency_ms),
        ("--throughput", budget.throughput),
        ("--max-params-m", max_params_m),
        ("--max-memory-mib", max_memory_mib),
    ):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{option} is {value:g}; give a number above 0")
    for option, number in (
        ("--batch", batch), ("--resolution", resolution), ("--threads", threads), ("--top", top),
    ):  # fmt: skip
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}; give 1 or more")
    if percentile not in PERCENTILES:
        raise UsageError(f"--percentile is {percentile}; known are 50, 90 and 99")
    if min_top1 is not None and not 0 <= min_top1 <= 100:
        raise UsageError(f"--min-top1 is {min_top1:g}; it is a percentage")
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if graph_form not in ("deploy", "train"):
        raise unknown_name("graph form", graph_form, ("deploy", "train"))
    if license not in (None, "any", "free"):
        names = {w.licence for name in list_models() for w in get_spec(name).weights}
        if str(license).casefold() not in {name.casefold() for name in names}:
            raise unknown_name("licence", str(license), {*names, "any", "free"})


def _models_with(operators: Collection[str]) -> set[str]:
    """Return the networks that have one of the operators, or of which that is not known."""
    if not operators:
        return set()
    table = read_operators()
    return {name for name in list_models() if name not in table or table[name] & {*operators}}


def _fits(row: Backbone, *, max_params_m: float | None, max_memory_mib: float | None) -> bool:
    return (max_params_m is None or row.params_m <= max_params_m) and (
        max_memory_mib is None or row.memory_mib <= max_memory_mib
    )


def judged(row: Backbone, budget: Budget, percentile: int = 50) -> Backbone:
    """Return the row with `may_miss` filled in."""
    if budget.is_open:
        return row
    high = row.ms if row.high_ms is None else row.high_ms
    slowest = row.images_per_s * row.ms / high
    unknown = percentile != 50 and row.statistic != f"p{percentile}"
    misses = not budget.allows(high, slowest)
    return dataclasses.replace(row, may_miss=misses or unknown)


# ---------------------------------------------------------------------------------- in words


def _count(number: int, what: str = "network") -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _speed(row: Backbone, budget: Budget, *, preposition: bool = False) -> str:
    """Return what a row takes in the budget's unit, e.g. "1.23 ms" or "in 1.23 ms"."""
    if budget.throughput is not None:
        return f"{'at ' * preposition}{row.images_per_s:.4g} images/s"
    return f"{'in ' * preposition}{three_digits(row.ms)} ms"


def _nothing_fits(
    ranked: Sequence[Backbone], device: str, *, min_top1: float | None, license: str | None
) -> str:
    if not ranked:
        return (
            f"no network with public weights meets the constraints on {device}; leave one out "
            f"(see: litezoo list{'' if license is None else ' --license NAME'})"
        )
    best = max(ranked, key=_top1)
    return (
        f"no network reaches {min_top1:g} % top-1 under these constraints; the most accurate is "
        f"{best.model} ({_top1(best):.2f} %, weights {best.weights})"
    )


def _too_slow(rows: Sequence[Backbone], budget: Budget, device: str, conditions: Conditions) -> str:
    if budget.throughput is not None:
        best = max(rows, key=lambda row: row.images_per_s)
        most, verb = f"{best.images_per_s:.4g} images/s", "reaches"
    else:
        best = min(rows, key=lambda row: row.ms)
        most, verb = f"{three_digits(best.ms)} ms", "takes"
    return (
        f"no network {verb} {budget} on {device} ({conditions}); the fastest there is under these "
        f"constraints is {best.model}: {most}, {best.label}"
    )


def _reason(
    chosen: Backbone | None,
    seen: Backbone | None,
    front: Sequence[Backbone],
    budget: Budget,
    device: Device,
    min_top1: float | None,
) -> str:
    """Return in a sentence or two why this one, or why none."""
    if chosen is None:
        middle = sorted(front, key=lambda row: row.ms)[len(front) // 2]
        return (
            "no budget was given, so every row of the front can be the right one; name one, for "
            f"example --latency-ms {three_digits(middle.ms)}"
        )
    what = f"{_speed(chosen, budget, preposition=True)}, {chosen.label}"
    if budget.is_open:
        text = (
            f"the fastest with at least {min_top1:g} % top-1: {_top1(chosen):.2f} % "
            f"({chosen.weights}) {what}"
        )
    elif chosen.may_miss:
        text = (
            f"no row meets {budget} for sure; this one is the likeliest to: {_top1(chosen):.2f} % "
            f"top-1 ({chosen.weights}) {what}; measure it first"
        )
    else:
        text = (
            f"of those that surely take {budget} the most accurate: {_top1(chosen):.2f} % top-1 "
            f"({chosen.weights}) {what}"
        )
    if not chosen.is_seen:
        if seen is not None and seen.model != chosen.model:
            text += (
                f". Of what was measured or published the best is {seen.model}: "
                f"{_top1(seen):.2f} % {_speed(seen, budget, preposition=True)} ({seen.evidence})"
            )
        if device.runtimes:
            text += (
                f". To know it: litezoo export {chosen.model} --device {device.name}, then "
                f"litezoo bench --device {device.name}"
            )
    return text


def _notes(
    device: Device,
    known: Sequence[Evidence],
    conditions: Conditions,
    asked: Asked,
    budget: Budget,
    percentile: int,
    task: Task,
    license: str | None,
    front: Sequence[Backbone],
    within: Sequence[Backbone],
    accurate: Sequence[Backbone],
    unranked: Sequence[Backbone],
    top: int,
) -> Iterable[str]:
    """Yield what a reader has to know beside the rows."""
    by_basis = Counter(row.basis for row in accurate)
    if not (by_basis["measured"] or by_basis["published"]):
        yield (
            f"nothing was measured or published on {device.name} under these conditions: every "
            "latency is the model's"
        )
    elif by_basis["measured"] + by_basis["published"] == len(accurate):
        yield (
            f"no evidence of other networks on {device.name}: nothing to predict them from is known"
        )
    if others := _other_conditions(known, conditions, asked):
        yield (
            f"also known of {device.name}: {others}; to be asked by --runtime, --precision, "
            "--threads, --batch and --graph-form"
        )
    if percentile != 50 and (means := [row for row in within if row.statistic != f"p{percentile}"]):
        yield (
            f"the p{percentile} is known of {len(within) - len(means)} of {_count(len(within))}; "
            "of the others only a mean or a median, published or predicted"
        )
    if doubtful := sum(row.may_miss for row in front):
        yield f"{_count(doubtful, 'row')} of the front may miss the budget: measure before you rely"
    if near := [
        row for row in accurate
        if row.low_ms is not None and not budget.allows(row.ms, row.images_per_s)
        and budget.allows(row.low_ms, row.images_per_s * row.ms / row.low_ms)
        and _top1(row) > max(map(_top1, within))
    ]:  # fmt: skip
        names = ", ".join(f"{row.model} ({_speed(row, budget)})" for row in near[:3])
        yield f"more accurate, and over the budget by less than the interval: {names}"
    if compute_dtype(conditions.precision) == "int8":
        yield (
            "top-1 is that of the fp32 weights; what int8 keeps of it is measured by: litezoo "
            "export"
        )
    if task == "backbone":
        yield (
            "latencies are of the whole classifier; without its head (features_only=True) a "
            "network takes a little less"
        )
        if larger := [
            f"{row.model} ({w.tag})"
            for row in front
            for w in row.spec.weights
            if serves(w, task) and w.is_free and w.top1_percent is None
        ]:
            yield f"of larger data sets, so without a top-1: {', '.join(dict.fromkeys(larger))}"
    if unranked:
        names = ", ".join(
            f"{row.model} ({row.paper_top1_percent:.2f} %, {_speed(row, budget)} {row.basis})"
            for row in unranked[:4]
        )
        yield (
            f"no public weights, so no place in the front; by the paper's own top-1 "
            f"{_count(len(unranked))} would have one: {names}"
        )
    if license is None and (closed := _need_accepting(task)):
        yield (
            f"left out are {_count(len(closed))} whose weights' licence has to be accepted "
            f"({', '.join(closed[:3])}, ...): --license any"
        )
    if len(front) > top:
        yield f"{_count(len(front) - top, 'more row')} on the front: --top {len(front)}"
    if device.name == "cpu" and by_basis["measured"]:
        yield (
            "cpu is this machine's; the rows are of the machine that they name. Where yours is "
            "another: litezoo bench --device cpu"
        )


def _other_conditions(known: Sequence[Evidence], conditions: Conditions, asked: Asked) -> str:
    """Return the best known other conditions of a device, with what to type for them."""
    models: dict[Conditions, set[str]] = defaultdict(set)
    for row in known:
        models[conditions_of(row)].add(row.model)
    models.pop(conditions, None)
    order = sorted(models, key=lambda one: (-len(models[one]), str(one)))
    return "; ".join(f"{one} ({_count(len(models[one]))})" for one in order[:4]) + (
        "" if len(order) <= 4 else f"; {len(order) - 4} others"
    )


def _need_accepting(task: Task) -> list[str]:
    """Return the networks that have weights with a top-1, but none under a free licence."""
    found = []
    for name in list_models():
        own = [w for w in get_spec(name).weights if serves(w, task) and w.top1_percent]
        if own and not any(w.is_free for w in own):
            found.append(name)
    return found
