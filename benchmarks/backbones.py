"""What every network of the zoo costs under one set of conditions, by the best evidence there is.

Trust has a strict order: measured (by `litezoo bench`), published (by others), transferred (from
rows of another chip), predicted (by the analytic model). Of each network the most trusted evidence
counts, that of another network with the same graph too, and every row says which it is. Rows of
other conditions are not looked at: what a request leaves open is chosen once, for all networks.

Nothing here imports torch: the networks' operators are kept in networks.json.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from litezoo.models.catalogue import ModelSpec, Weights, get_spec, list_models
from litezoo.models.errors import MissingError, UsageError, unknown_name
from litezoo.recipes.devices import Device, get_device, list_devices

from .evidence import Evidence, read_measured, read_published
from .fit import Target
from .latency import compute_dtype
from .network import Network, catalogue_network, scale
from .predict import Prediction, list_targets, predict_networks

__all__ = [
    "BASES",
    "TASKS",
    "Asked",
    "Backbone",
    "Basis",
    "Conditions",
    "Task",
    "bytes_of",
    "check_words",
    "choose_conditions",
    "conditions_of",
    "known_rows",
    "list_backbones",
    "network_at",
    "peak_at",
    "peak_elements",
    "peak_memory_mib",
    "serves",
    "three_digits",
]

Basis = Literal["measured", "published", "transferred", "predicted"]
#: How a latency is known, the most trusted first.
BASES: tuple[Basis, ...] = ("measured", "published", "transferred", "predicted")
Task = Literal["classifier", "backbone"]
TASKS: tuple[Task, ...] = ("classifier", "backbone")
#: Bytes of a number.
_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
#: Precisions in which top-1 is as that of the fp32 weights, by kind of device, the usual first.
_FAITHFUL: Mapping[str, tuple[str, ...]] = {
    "gpu": ("fp16", "bf16", "tf32", "fp32"),
    "cpu": ("fp32", "fp16", "bf16"),
    "npu": ("fp16", "bf16"),
}
#: Runtimes that run on many devices and are what one deploys on none of these, unless asked for.
_LAST = frozenset(("ncnn-vulkan",))


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a latency is of; two are compared only where all of it is the same.

    `layout` is "nchw", "nhwc" or "" (the runtime's own); `threads` is 0 where there are none, or
    none are stated.
    """

    runtime: str
    precision: str
    layout: str
    threads: int
    graph_form: str
    batch: int

    def __str__(self) -> str:
        """Say it in words, e.g. "tensorrt fp16, deploy form, batch 1"."""
        words = [f"{self.runtime} {self.precision}", f"{self.graph_form} form"]
        if self.layout:
            words.insert(1, self.layout)
        if self.threads:
            words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join([*words, f"batch {self.batch}"])


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """One network at one image size: what it costs on the device, and how that is known.

    `ms` is of a batch; `low_ms` to `high_ms` is the interval of a prediction, None of what was
    measured. `statistic` says what `ms` is ("p50", "p90", "p99", or "as published": a mean or a
    median), `evidence` where and when, by whom, or from what. `top1_percent` is that of `weights`
    ("" where no public ones can be loaded; then it is None, and the paper's own figure is
    `paper_top1_percent`). `memory_mib` is the least that weights and activations of the batch need.
    `may_miss`: the budget lies within the interval, or the asked percentile is not known.
    """

    model: str
    family: str
    resolution: int
    weights: str
    licence: str
    top1_percent: float | None
    top1_source: str
    paper_top1_percent: float | None
    params_m: float
    memory_mib: float
    ms: float
    low_ms: float | None
    high_ms: float | None
    images_per_s: float
    statistic: str
    basis: Basis
    evidence: str
    may_miss: bool = False

    @property
    def spec(self) -> ModelSpec:
        """The network's entry in the catalogue; `create_model(model, weights=weights)` makes it."""
        return get_spec(self.model)

    @property
    def label(self) -> str:
        """How the latency is known, in words, e.g. "published (paddle-t4)"."""
        return f"{self.basis} ({self.evidence})"

    @property
    def is_seen(self) -> bool:
        """Whether somebody ran it: measured or published, not transferred or predicted."""
        return self.basis in ("measured", "published")


def peak_memory_mib(peak: int, params: int, *, batch: int, precision: str) -> float:
    """Return the least memory in MiB that weights and activations of a batch need.

    `peak` is that of one image (see `peak_elements`). A runtime's own libraries, workspaces and
    copies come on top.
    """
    activations, weights = bytes_of(precision)
    return (batch * peak * activations + params * weights) / 2**20


def bytes_of(precision: str) -> tuple[int, int]:
    """Return the bytes of an activation and of a weight: autocast keeps weights in float32."""
    size = _BYTES[compute_dtype(precision)]
    return size, 4 if precision.startswith("amp") else size


def peak_elements(network: Network) -> int:
    """Return the most elements of one image's activations that have to be kept at any operator.

    Kept is what is read there or later, and what it writes. Point-wise operators write where they
    read and views take no memory of their own, as runtimes have it.
    """
    place_of = {-1: -1}  # whose memory a value lies in: a view's is that of what it shows
    last = {}
    for index, op in enumerate(network.ops):
        is_view = op.kind == "view" and op.inputs
        place_of[index] = place_of[op.inputs[0]] if is_view else index
        for source in op.inputs:
            last[place_of[source]] = index
    for index in network.outputs:
        last[place_of[index]] = len(network.ops)
    kept = {-1: math.prod(network.resolution)}
    peak = kept[-1]
    for index, op in enumerate(network.ops):
        sources = {place_of[source] for source in op.inputs}
        ends = [source for source in sources if last[source] == index]
        if place_of[index] == index:
            reused = 0
            if op.is_pointwise:
                fit = [kept[s] for s in ends if kept.get(s, 0) >= op.out_elements]
                reused = min(fit, default=0)
            peak = max(peak, sum(kept.values()) - reused + op.out_elements)
            if index in last:
                kept[index] = op.out_elements
        for source in ends:
            kept.pop(source, None)
    return peak


# ------------------------------------------------------------------------------- the evidence


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Look for no garbage meanwhile: among many small objects it takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collecting()
def known_rows(
    device: str | None = None, *, folder: Path | None = None
) -> dict[str, list[Evidence]]:
    """Return what was measured or published of the zoo's networks, by device: of one, or of all.

    `folder` holds the measured rows (default: benchmarks/results).
    """
    models = set(list_models())
    found: dict[str, list[Evidence]] = defaultdict(list)
    for row in (*read_measured(folder), *read_published(device)):
        if row.model in models and device in (None, row.device):
            found[row.device].append(row)
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request fixes of the conditions; None is open."""

    runtime: str | None
    precision: str | None
    threads: int | None
    graph_form: str
    batch: int | None
    resolution: int | None

    def matches(self, row: Evidence, *, any_batch: bool = False) -> bool:
        """Return whether a row is of what is asked; with `any_batch` at whatever batch."""
        return (
            self.runtime in (None, row.runtime)
            and self.precision in (None, row.precision)
            and self.threads in (None, row.threads)
            and row.graph_form == self.graph_form
            and (any_batch or self.batch in (None, row.batch))
            and self.resolution in (None, row.resolution)
        )

    def fits(self, target: Target) -> bool:
        """Return whether predictions for a target are of what is asked."""
        return (
            self.runtime in (None, target.runtime)
            and self.precision in (None, target.precision)
            and self.threads in (None, target.threads)
        )


def conditions_of(row: Evidence) -> Conditions:
    """Return what a row is of, but for its network and image size."""
    return Conditions(
        runtime=row.runtime, precision=row.precision, layout=row.layout, threads=row.threads,
        graph_form=row.graph_form, batch=row.batch,
    )  # fmt: skip


def choose_conditions(
    device: Device, rows: Sequence[Evidence], asked: Asked, *, for_latency: bool
) -> Conditions:
    """Return the conditions of an answer: those asked for, and the best known for what is open.

    A batch that is open is 1 for a latency, else what most evidence is of. An open precision is one
    that keeps the accuracy, where anything is known of one; an open runtime one that litezoo builds
    engines of for the device, where the model is fitted to one. Of what is known for at least half
    as many networks as the best known (precision, runtime, layout, threads), that counts which is
    the fastest on the networks they share. Where no row fits: what fits but for the batch, what the
    model was fitted for, the device's own first runtime.
    """
    own = [row for row in rows if asked.matches(row)]
    if asked.batch is None:
        batches = Counter(b for b, _ in {(r.batch, r.model) for r in own})
        most = max(batches, key=lambda batch: (batches[batch], -batch), default=1)
        asked = dataclasses.replace(asked, batch=1 if for_latency else most)
        own = [row for row in own if row.batch == asked.batch]
    assert asked.batch is not None
    at_any_batch = [row for row in rows if asked.matches(row, any_batch=True)]
    targets = [target for target in list_targets(device.name) if asked.fits(target)]
    faithful = _FAITHFUL[device.kind]

    def keeps_accuracy(one: Evidence | Target) -> bool:
        return asked.precision is not None or compute_dtype(one.precision) in faithful

    def is_usual(one: Evidence | Target) -> bool:
        return asked.runtime is not None or one.runtime not in _LAST

    built = {_slug(runtime) for runtime in device.runtimes}
    fitted = built & {_slug(target.runtime) for target in targets if keeps_accuracy(target)}

    def is_built(one: Evidence | Target) -> bool:
        return asked.runtime is not None or _slug(one.runtime) in fitted

    for wanted in ((keeps_accuracy, is_built), (keeps_accuracy, is_usual), (is_usual,), ()):
        for some in (own, at_any_batch):
            if kept := [row for row in some if all(is_so(row) for is_so in wanted)]:
                return dataclasses.replace(conditions_of(_fastest(kept)), batch=asked.batch)
        if found := next((t for t in targets if all(is_so(t) for is_so in wanted)), None):
            return _conditions_for(found, asked, asked.batch)
    return _conditions_for(_own_target(device, asked), asked, asked.batch)


def _slug(runtime: str) -> str:
    return runtime.replace("_", "-")


def _conditions_for(target: Target, asked: Asked, batch: int) -> Conditions:
    return Conditions(
        runtime=target.runtime, precision=target.precision, layout=target.layout,
        threads=target.threads, graph_form=asked.graph_form, batch=batch,
    )  # fmt: skip


def _fastest(rows: Sequence[Evidence]) -> Evidence:
    """Return a row of the well known conditions that are the fastest on shared networks."""
    groups: dict[Conditions, dict[tuple[str, int], Evidence]] = defaultdict(dict)
    for row in rows:
        known = dataclasses.replace(conditions_of(row), batch=1)
        groups[known].setdefault((row.model, row.resolution), row)
    most = max(groups.values(), key=len)
    best, best_ratio = most, 1.0
    for group in groups.values():
        shared = group.keys() & most.keys()
        if 2 * len(group) < len(most) or 2 * len(shared) < len(group):
            continue
        ratio = math.exp(
            sum(
                math.log(most[key].images_per_s / group[key].images_per_s) for key in sorted(shared)
            )
            / len(shared)
        )
        if ratio < best_ratio:
            best, best_ratio = group, ratio
    return next(iter(best.values()))


def _own_target(device: Device, asked: Asked) -> Target:
    """Return the device's own first runtime, in the first precision that keeps the accuracy."""
    runtime = asked.runtime or next(iter(device.runtimes), None)
    if runtime is None and device.generation:  # what its relatives are known with
        runtime = next(
            (t.runtime for t in list_targets() if _generation(t.device) == device.generation), None
        )
    if runtime is None:
        raise MissingError(
            f"no evidence: nothing that is asked was measured or published on {device.name}, and "
            "litezoo has no runtime for it to predict; choose another device (see: litezoo devices)"
        )
    known = {compute_dtype(one): one for one in reversed(device.precisions)}
    order = (*_FAITHFUL[device.kind], *map(compute_dtype, device.precisions))
    precision = asked.precision or next(known[dtype] for dtype in order if dtype in known)
    return Target(
        device=device.name, runtime=runtime, precision=precision, threads=asked.threads or 0
    )


def _generation(device: str) -> str | None:
    return get_device(device).generation if device in list_devices() else None


def check_words(device: Device, rows: Sequence[Evidence], asked: Asked) -> None:
    """Refuse a runtime or a precision that the device has not."""
    targets = list_targets(device.name)
    runtimes = {*device.runtimes, *(r.runtime for r in rows), *(t.runtime for t in targets)}
    precisions = {*device.precisions, *(r.precision for r in rows)}
    precisions |= {target.precision for target in targets}
    for words, value, known in (
        ("runtime", asked.runtime, runtimes),
        ("precision", asked.precision, precisions),
    ):
        if value is not None and value not in known:
            raise unknown_name(f"{words} of {device.name}:", value, known)


def _best_evidence(rows: Iterable[Evidence]) -> dict[tuple[str, int], Evidence]:
    """Return the most trusted row of each network and image size, of those the newest."""
    best: dict[tuple[str, int], Evidence] = {}
    for row in rows:
        key = (row.model, row.resolution)
        if key not in best or _trust(row) > _trust(best[key]):
            best[key] = row
    return best


def _trust(row: Evidence) -> tuple[bool, str, tuple[int, ...]]:
    numbers = tuple(int(n) for n in row.runtime_version.split(".") if n.isdigit())
    return row.kind == "measured", row.date, numbers


# ----------------------------------------------------------------------------- the candidates


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A network at an image size, with the public weights that it would be used with, if any."""

    spec: ModelSpec
    resolution: int
    weights: Weights | None
    network: Network


def _accepts(weights: Weights, license: str | None) -> bool:
    if license in (None, "free"):
        return weights.is_free
    return license == "any" or weights.licence.casefold() == str(license).casefold()


def serves(weights: Weights, task: Task) -> bool:
    """Whether weights serve a task: a classifier has to have its classes."""
    return not weights.unreadable and (task == "backbone" or weights.num_classes > 0)


def _weights_by_size(
    spec: ModelSpec, *, task: Task, license: str | None, resolution: int | None
) -> dict[int, Weights]:
    """Return the most accurate public weights of each image size, the first of equal ones."""
    best: dict[int, Weights] = {}
    for one in spec.weights:
        side = one.preprocess.input_size[-1]
        if not serves(one, task) or one.top1_percent is None or not _accepts(one, license):
            continue
        if resolution in (None, side):
            before = best.get(side)
            if before is None or one.top1_percent > (before.top1_percent or 0.0):
                best[side] = one
    return best


@cache
def network_at(model: str, graph_form: str, resolution: int) -> Network | None:
    """Return a network's operations at an image size; None for one that is not precomputed."""
    try:
        network = catalogue_network(model, "train" if graph_form == "train" else "deploy")
    except UsageError:  # of another package
        return None
    if network.resolution[-1] == resolution:
        return network
    return scale(network, (network.resolution[0], resolution, resolution))


@cache
def peak_at(model: str, graph_form: str, resolution: int) -> int:
    """Return `peak_elements` of a network that `network_at` has."""
    network = network_at(model, graph_form, resolution)
    assert network is not None
    return peak_elements(network)


@_without_collecting()
def list_backbones(
    device: Device,
    conditions: Conditions,
    evidence: Iterable[Evidence],
    *,
    models: Collection[str] | None = None,
    resolution: int | None = None,
    percentile: int = 50,
    task: Task = "classifier",
    license: str | None = None,
) -> list[Backbone]:
    """Return the networks of the zoo with their latency under the conditions, fastest first.

    One row for each image size that it has weights of. A network without a row of its own takes one
    of a network that is the same graph in this form. Where no licence is asked for, networks that
    have no public weights but a top-1 in their paper are there too, at their own size and without a
    top-1. `models` names those that are asked for (default: all). Where nothing can be predicted
    only what was measured or published is there; MissingError where that is nothing.
    """
    rows = _best_evidence(
        row for row in evidence if row.device == device.name and conditions_of(row) == conditions
    )
    target = Target(
        device=device.name, runtime=conditions.runtime, precision=conditions.precision,
        layout=conditions.layout, threads=conditions.threads,
    )  # fmt: skip
    found, open_entries = [], []
    for name in list_models() if models is None else models:
        spec = get_spec(name)
        sizes: dict[int, Weights | None] = dict(
            _weights_by_size(spec, task=task, license=license, resolution=resolution)
        )
        if not sizes and license is None and resolution in (None, spec.resolution):
            has_any = any(w.top1_percent and serves(w, task) for w in spec.weights)
            if not has_any and spec.paper_top1_percent is not None:
                sizes = {spec.resolution: None}
        for side, weights in sizes.items():
            network = network_at(name, conditions.graph_form, side)
            if network is None:
                continue
            entry = _Entry(spec=spec, resolution=side, weights=weights, network=network)
            row = rows.get((name, side))
            if row is None:
                open_entries.append(entry)
            else:
                found.append(_seen(entry, row, conditions, percentile))
    twins = _twins_of(rows, conditions.graph_form) if open_entries else {}
    for entry in list(open_entries):
        if (row := twins.get(_graph_of(entry.network))) is not None:
            open_entries.remove(entry)
            found.append(_seen(entry, row, conditions, percentile))
    networks = [entry.network for entry in open_entries]
    try:
        made = predict_networks(
            networks, target, batch=conditions.batch, graph_form=conditions.graph_form
        )
    except MissingError as error:  # neither rows of a relative nor physics
        if not found:
            raise MissingError(
                f"no evidence: nothing was measured or published on {device.name} ({conditions}); "
                f"{error}"
            ) from error
        open_entries, made = [], ()
    found += [
        _predicted(entry, one, conditions) for entry, one in zip(open_entries, made, strict=True)
    ]
    return sorted(found, key=lambda row: (row.ms, row.model, row.resolution))


def _graph_of(network: Network) -> Hashable:
    """Return what makes two networks the same to a runtime: all but names and weights."""
    ops = ((op.kind, op.name, op.inputs, op.out_shape, op.conv, op.window) for op in network.ops)
    return network.resolution, tuple(ops), network.outputs


def _twins_of(
    rows: Mapping[tuple[str, int], Evidence], graph_form: str
) -> dict[Hashable, Evidence]:
    """Return rows by the graph that they are of: a QARepVGG fused is a RepVGG fused."""
    found: dict[Hashable, Evidence] = {}
    for (model, side), row in rows.items():
        network = network_at(model, graph_form, side)
        if network is not None:
            found.setdefault(_graph_of(network), row)
    return found


def _backbone(
    entry: _Entry,
    conditions: Conditions,
    *,
    ms: float,
    low_ms: float | None,
    high_ms: float | None,
    images_per_s: float,
    statistic: str,
    basis: Basis,
    evidence: str,
) -> Backbone:
    spec, weights = entry.spec, entry.weights
    params = spec.params_train if conditions.graph_form == "train" else spec.params_deploy
    return Backbone(
        model=spec.name,
        family=spec.family,
        resolution=entry.resolution,
        weights="" if weights is None else weights.tag,
        licence="" if weights is None else weights.licence,
        top1_percent=None if weights is None else weights.top1_percent,
        top1_source="" if weights is None else weights.top1_source,
        paper_top1_percent=spec.paper_top1_percent,
        params_m=params / 1e6,
        memory_mib=peak_memory_mib(
            peak_at(spec.name, conditions.graph_form, entry.resolution),
            params,
            batch=conditions.batch,
            precision=conditions.precision,
        ),
        ms=ms,
        low_ms=low_ms,
        high_ms=high_ms,
        images_per_s=images_per_s,
        statistic=statistic,
        basis=basis,
        evidence=evidence,
    )


def _seen(entry: _Entry, row: Evidence, conditions: Conditions, percentile: int) -> Backbone:
    """Return the row of a measurement, at the percentile that is asked for where it is known."""
    at = {50: row.ms if row.kind == "measured" else None, 90: row.p90_ms, 99: row.p99_ms}
    known = at[percentile]
    if row.kind == "measured":
        evidence = f"{row.where}, {row.date}"
    else:
        version = f", {row.runtime_version}" if row.runtime_version else ""
        evidence = f"{row.source}{version}"
    if row.model != entry.spec.name:
        evidence += f", of {row.model}: the same graph"
    return _backbone(
        entry,
        conditions,
        ms=row.ms if known is None else known,
        low_ms=None,
        high_ms=None,
        images_per_s=row.images_per_s,
        statistic="as published" if known is None else f"p{percentile}",
        basis="measured" if row.kind == "measured" else "published",
        evidence=evidence,
    )


def _predicted(entry: _Entry, made: Prediction, conditions: Conditions) -> Backbone:
    interval = f"{three_digits(made.low_ms)} to {three_digits(made.high_ms)} ms"
    known = "physics, " if made.basis == "physics" else ""
    if made.basis == "transferred":
        rho = "" if made.rho is None else f"rho {made.rho:.2f}, "
        known = f"from {made.source}, {rho}"
    return _backbone(
        entry,
        conditions,
        ms=made.ms,
        low_ms=made.low_ms,
        high_ms=made.high_ms,
        images_per_s=made.images_per_s,
        statistic="model",
        basis="transferred" if made.basis == "transferred" else "predicted",
        evidence=f"{known}{interval}",
    )


def three_digits(value: float) -> str:
    """Return a number with as many digits as a latency deserves.

    >>> three_digits(0.012345), three_digits(1234.5)
    ('0.0123', '1234')
    """
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
