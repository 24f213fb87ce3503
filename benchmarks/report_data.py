"""What the report's page shows, as plain lists and numbers: rows, ceilings, rules, GPU truth."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from litezoo.models.catalogue import ModelSpec, get_spec
from litezoo.models.errors import UsageError

from .ceilings import read_ceilings
from .draw_guidelines import conditions_in_words
from .draw_roofline import KIND_COLOURS
from .gpu_demo import percents_of, read_truth
from .graph import KINDS
from .guidelines import latest_guidelines, read_guidelines
from .measure import Measurement
from .report_picker import picker_data
from .report_profiles import read_profiles
from .results import is_baseline, latest
from .rows import newest, results_folder

__all__ = [
    "Top1",
    "comparable_top1s",
    "page_data",
    "published_rows",
    "top1_of",
]

#: The data set of published accuracies.
IMAGENET = "ImageNet"
#: Fields of a row as the page has them, besides those that `_row` makes.
_FIELDS = (
    "id", "model", "device", "runtime", "precision", "graph_form", "batch", "threads", "streams",
    "scope", "p50_ms", "p90_ms", "p99_ms", "best_ms", "images_per_s", "ratio", "ratio_low",
    "ratio_high", "ratio_to", "spread", "runs", "seconds", "steady", "harness_us", "flops_percent",
    "bytes_percent", "weights", "artifact_sha256", "protocol", "date", "schema",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Top1:
    """The accuracy that a row is drawn at, in percent, and whose it is.

    `is_own`: measured on this row's engine, or of the same arithmetic (fp32); otherwise a reduced
    precision is drawn at what fp32 weights reach, which it may miss. `data` is ImageNet (any 1000
    classes), or what else the images are of.
    """

    percent: float
    is_own: bool
    source: str
    data: str = IMAGENET


def published_rows(rows: Iterable[Measurement]) -> list[Measurement]:
    """Return the newest row of each set of conditions that may be published.

    UsageError where there is none.
    """
    shown = latest(rows)
    if not shown:
        raise UsageError("there are no results to show; measure first: litezoo bench")
    return shown


@cache
def _spec(model: str) -> ModelSpec | None:
    try:
        return get_spec(model)
    except UsageError:
        return None


def top1_of(row: Measurement) -> Top1 | None:
    """Return a row's own accuracy, else the published one of its network at its resolution.

    Published is that of the default public weights, else of other ones, else the paper's.
    """
    if row.top1_percent is not None:
        data = row.top1_data
        return Top1(
            percent=row.top1_percent,
            is_own=True,
            source="measured on this engine" + (f", {data}" if data else ""),
            data=data if data and not data.endswith(" 1000 classes") else IMAGENET,
        )
    spec, side, is_own = _spec(row.model), row.resolution[-1], row.precision == "fp32"
    if spec is None:
        return None
    for weights in sorted(spec.weights, key=lambda one: bool(one.unreadable)):
        if weights.top1_percent is not None and weights.preprocess.input_size[-1] == side:
            source = (
                f"published, of the fp32 weights {weights.tag} ({weights.top1_source}), "
                "not measured here"
            )
            return Top1(percent=weights.top1_percent, is_own=is_own, source=source)
    if spec.paper_top1_percent is not None and spec.resolution == side:
        source = f"published ({spec.paper_source or spec.paper}), not measured here"
        return Top1(percent=spec.paper_top1_percent, is_own=is_own, source=source)
    return None


def comparable_top1s(rows: Sequence[Measurement]) -> tuple[str, list[Top1 | None]]:
    """Return the data set that most rows have an accuracy of, and each row's on it, else None."""
    found = [top1_of(row) for row in rows]
    count = Counter(top1.data for top1 in found if top1 is not None)
    data = max(count, key=lambda data: (count[data], data), default=IMAGENET)
    return data, [top1 if top1 is not None and top1.data == data else None for top1 in found]


def page_data(
    rows: Iterable[Measurement],
    *,
    folder: Path | None = None,
    devices: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the content of the page.

    `folder` (default: benchmarks/results) is where ceilings, guidelines, GPU truth and profiles
    lie; what is not there is an empty list. `devices` (default: all) are those of the picker.
    UsageError without rows, CheckFailed for a damaged file.
    """
    shown = published_rows(rows)
    where = folder or results_folder()
    places = _places(shown)
    machines = list(dict.fromkeys(_machine(row) for row in shown))
    data, top1s = comparable_top1s(shown)
    sources = list(dict.fromkeys(top1.source for top1 in top1s if top1 is not None))
    lines = [
        _row(row, top1, places[_place(row)], machines, sources)
        for row, top1 in zip(shown, top1s, strict=True)
    ]
    return {
        "picker": picker_data(devices, folder=folder),
        "columns": list(lines[0]),
        "rows": [list(line.values()) for line in lines],
        "baselines": sorted({row.runtime for row in shown if is_baseline(row.runtime)}),
        "machines": [dict(machine) for machine in machines],
        "sources": sources,
        "top1_data": data,
        "ceilings": _ceilings(shown, where),
        "guidelines": _guidelines(where),
        "truths": _truths(where),
        "profiles": _profiles(where),
        "kinds": [[kind, words, KIND_COLOURS[kind]] for kind, words in KINDS.items()],
    }


def _place(row: Measurement) -> tuple[str, str]:
    return row.device, row.machine.versions.get("gpu", row.machine.cpu)


def _places(rows: Sequence[Measurement]) -> dict[tuple[str, str], str]:
    """Return a name for each device and chip: the device's, with the chip where it has several."""
    found = list(dict.fromkeys(map(_place, rows)))
    count = Counter(device for device, _ in found)
    return {
        (device, chip): device if count[device] == 1 else f"{device} ({chip})"
        for device, chip in found
    }


def _machine(row: Measurement) -> tuple[tuple[str, Any], ...]:
    """Return what a machine is known by, without what changes from row to row."""
    machine = row.machine
    return (
        ("cpu", machine.cpu),
        ("cores", machine.cores),
        ("isa", " ".join(machine.isa)),
        ("governor", machine.governor),
        ("memory_gib", machine.memory_gib),
        ("system", machine.system),
        ("versions", ", ".join(f"{name} {is_}" for name, is_ in machine.versions.items())),
    )


def _row(
    row: Measurement,
    top1: Top1 | None,
    place: str,
    machines: Sequence[tuple[tuple[str, Any], ...]],
    sources: Sequence[str],
) -> dict[str, Any]:
    return {
        **{field: getattr(row, field) for field in _FIELDS},
        "place": place,
        "input": "x".join(map(str, row.resolution)),
        "top1": None if top1 is None else top1.percent,
        "top1_is_own": top1 is not None and top1.is_own,
        "top1_source": None if top1 is None else sources.index(top1.source),
        "machine": machines.index(_machine(row)),
        "load_1min": row.machine.load_1min,
        "conditions": None if row.conditions is None else dataclasses.asdict(row.conditions),
    }


def _ceilings(rows: Sequence[Measurement], where: Path) -> list[dict[str, Any]]:
    found = []
    known = {file.stem for file in (where / "ceilings").glob("*.json")}
    for device in sorted(known | {row.device for row in rows}):
        ceilings = read_ceilings(device, folder=where / "ceilings")
        if ceilings is not None:
            found.append(
                {
                    "device": device,
                    "chip": ceilings.machine.versions.get("gpu", ceilings.machine.cpu),
                    "threads": ceilings.threads,
                    "peaks": dict(ceilings.peak_tera_ops_per_s),
                    "memory": ceilings.memory_gb_per_s,
                    "cache": ceilings.cache_gb_per_s,
                    "layer_us": dict(ceilings.layer_us),
                    "date": ceilings.date,
                }
            )
    return found


def _guidelines(where: Path) -> list[dict[str, Any]]:
    rows = read_guidelines(sorted((where / "guidelines").glob("*.jsonl")))
    return [
        {
            "conditions": conditions_in_words(row),
            "device": row.device,
            **{
                field: getattr(row, field)
                for field in (
                    "rule", "claim", "source", "slow", "fast", "per", "ratio", "low", "high",
                    "threshold", "band", "verdict", "close", "finding", "rounds", "date",
                )
            },
        }
        for row in latest_guidelines(rows)
    ]  # fmt: skip


def _truths(where: Path) -> list[dict[str, Any]]:
    rows = [row for file in sorted((where / "gpu").glob("*.jsonl")) for row in read_truth(file)]
    return [
        {
            "gpu": row.counters.gpu,
            "case": row.case,
            "what": row.what,
            "precision": row.precision,
            "percents": percents_of(row),
            "sentences": list(row.sentences),
            "date": row.date,
        }
        for row in newest(rows, lambda row: (row.counters.gpu, row.case, row.precision))
    ]


def _profiles(where: Path) -> list[dict[str, Any]]:
    profiles = []
    for stored in read_profiles(where / "profiles"):
        values = dataclasses.asdict(stored)
        values["name"] = stored.name
        values["layers"] = [
            [
                layer.name, layer.module, layer.operators, layer.kind, layer.dtype,
                "x".join(map(str, layer.out_shape)), layer.macs, layer.operations,
                layer.memory_bytes, layer.us, layer.bound,
            ]
            for layer in stored.layers
        ]  # fmt: skip
        profiles.append(values)
    return profiles
