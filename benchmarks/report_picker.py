"""What the report's picker chooses from: every network's latency by the best evidence, as numbers.

The page filters and orders them as `litezoo pick` does; latencies, labels and sizes are made here,
once for each device and set of conditions.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from litezoo.models.catalogue import get_spec
from litezoo.models.errors import MissingError
from litezoo.recipes.devices import PATTERNS, Device, get_device, list_devices

from .backbones import (
    BASES,
    Asked,
    Backbone,
    Conditions,
    bytes_of,
    choose_conditions,
    conditions_of,
    known_rows,
    list_backbones,
    peak_at,
    serves,
)
from .evidence import Evidence
from .operators import read_operators

__all__ = ["picker_data"]

#: Of the conditions of a device beside those that a request without them gets: least networks that
#: have to be known of them, and how many are on the page.
_LEAST, _MOST = 10, 2
#: Up to which images a second are those that batch and latency give.
_SAME = 0.005


def picker_data(
    devices: Sequence[str] | None = None, *, folder: Path | None = None
) -> dict[str, Any]:
    """Return the networks, their public weights, and their latencies, one set for each conditions.

    `devices` (default: all) are those on the page; those without any evidence are left out.
    `folder` holds the measured rows (default: benchmarks/results). Networks are [model, side,
    million parameters, elements of activations, operators]; weights [network, tag, licence, is
    free, top-1, has classes]; a set's lists are in the networks' order.
    """
    chips = [get_device(name) for name in (list_devices() if devices is None else devices)]
    known = known_rows(folder=folder)
    sets = [one for chip in chips for one in _sets(chip, known.get(chip.name, []))]
    places = sorted({place for one in sets for place in one.rows})
    table = read_operators()
    used = [table.get(model, frozenset()) for model, _ in places]
    distinct = {name for own in used for name in own if any(name not in o for o in used)}
    names = sorted(distinct, key=lambda name: (name not in PATTERNS, name))
    networks, weights = [], []
    for number, (model, side) in enumerate(places):
        spec = get_spec(model)
        own = table.get(model)
        networks.append(
            [
                model,
                side,
                spec.params_deploy / 1e6,
                peak_at(model, "deploy", side),
                None if own is None else [at for at, name in enumerate(names) if name in own],
            ]
        )
        weights += [
            [number, w.tag, w.licence, w.is_free, w.top1_percent, serves(w, "classifier")]
            for w in spec.weights
            if w.top1_percent is not None
            and serves(w, "backbone")
            and w.preprocess.input_size[-1] == side
        ]
    return {
        "bases": BASES,
        "operators": names,
        "networks": networks,
        "weights": weights,
        "sets": [_plain(one, places) for one in sets],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Set:
    """What is known of a device under one set of conditions, by network and image side.

    `tails` are the p90 and p99 of what was measured.
    """

    device: Device
    conditions: Conditions
    rows: dict[tuple[str, int], Backbone]
    tails: dict[int, dict[tuple[str, int], float]]


def _sets(device: Device, known: Sequence[Evidence]) -> Iterator[_Set]:
    try:
        for conditions in _conditions(device, known):
            rows = {(row.model, row.resolution): row for row in _rows(device, conditions, known)}
            measured = any(row.basis == "measured" for row in rows.values())
            tails = {
                percentile: {
                    (row.model, row.resolution): row.ms
                    for row in _rows(device, conditions, known, percentile)
                    if row.statistic == f"p{percentile}"
                }
                for percentile in ((90, 99) if measured else ())
            }
            yield _Set(device=device, conditions=conditions, rows=rows, tails=tails)
    except MissingError:  # neither rows nor physics
        return


def _rows(
    device: Device, conditions: Conditions, known: Sequence[Evidence], percentile: int = 50
) -> list[Backbone]:
    rows = list_backbones(
        device, conditions, known, percentile=percentile, task="backbone", license="any"
    )
    return [row for row in rows if row.weights]


def _conditions(device: Device, known: Sequence[Evidence]) -> list[Conditions]:
    """Return those that a request for a latency gets, for a throughput, and the best known ones."""
    asked = Asked(
        runtime=None, precision=None, threads=None, graph_form="deploy", batch=None,
        resolution=None,
    )  # fmt: skip
    first = [
        choose_conditions(device, known, asked, for_latency=for_latency)
        for for_latency in (True, False)
    ]
    models: dict[Conditions, set[str]] = defaultdict(set)
    for row in known:
        if row.graph_form == "deploy" and conditions_of(row) not in first:
            models[conditions_of(row)].add(row.model)
    most = sorted(models, key=lambda one: (-len(models[one]), str(one)))
    others = [one for one in most if len(models[one]) >= _LEAST][:_MOST]
    return list(dict.fromkeys([*first, *others]))


def _plain(one: _Set, places: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return a set as lists in the order of `places`; null where a network has no evidence."""
    rows = [one.rows.get(place) for place in places]
    words = list(dict.fromkeys(_words(row) for row in rows if row is not None))
    batch = one.conditions.batch
    activations, weights = bytes_of(one.conditions.precision)
    return {
        "device": one.device.name,
        "title": one.device.title,
        "conditions": str(one.conditions),
        "options": _options(one.conditions),
        "batch": batch,
        "activation_bytes": activations,
        "weight_bytes": weights,
        "words": words,
        "basis": "".join("-" if row is None else str(BASES.index(row.basis)) for row in rows),
        "evidence": [None if row is None else words.index(_words(row)) for row in rows],
        "ms": [None if row is None else _digits(row.ms) for row in rows],
        "low": [None if row is None or row.low_ms is None else _digits(row.low_ms) for row in rows],
        "high": [
            None if row is None or row.high_ms is None else _digits(row.high_ms) for row in rows
        ],
        # published apart from the latency, as by several callers at once
        "rates": {
            str(place): _digits(row.images_per_s)
            for place, row in enumerate(rows)
            if row is not None and abs(row.images_per_s * row.ms / 1e3 / batch - 1) > _SAME
        },
        "tails": {
            str(percentile): [_digits(ms[place]) if place in ms else None for place in places]
            for percentile, ms in one.tails.items()
        },
    }


def _options(conditions: Conditions) -> str:
    """Return what asks `litezoo pick` for these conditions."""
    words = f"--runtime {conditions.runtime} --precision {conditions.precision}"
    if conditions.threads:
        words += f" --threads {conditions.threads}"
    return f"{words} --batch {conditions.batch}"


def _words(row: Backbone) -> str:
    """Return how a row is known, but for its interval."""
    return row.evidence if row.is_seen else row.evidence.rpartition(", ")[0]


def _digits(value: float) -> float:
    """Return four digits: enough to compare, and the page stays small."""
    return float(f"{value:.4g}")
