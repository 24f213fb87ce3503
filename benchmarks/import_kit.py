"""Results of build kits: what a machine with the GPU measured, taken into the results here.

A kit's `result.json` says what was built, how far its outputs were from the expected ones, and the
times. All of that is looked at again before a row is written; nothing of a result with a failed
engine is taken. Rows of protocol "kit-1" are not interleaved: an engine replays a CUDA graph of one
batch, already on the GPU, for some seconds; a time is from the call until the GPU is done, on the
host's clock. `ratio` is over the kit's first engine at the same batch size. The GPU's name and the
driver are among the machine's versions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from litezoo.export.artifact import (
    MANIFEST,
    Artifact,
    Engine,
    check_hashes,
    read_artifact,
)
from litezoo.export.build_engine import (
    FORMS,
    KIT_FORMAT,
    TOLERANCES,
    Parity,
    Wrong,
    read_engine_name,
)
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.files import file_sha256
from litezoo.recipes.devices import Device, get_device

from .machine import Machine
from .measure import Measurement, top1_data
from .results import append_rows, read_rows

__all__ = ["PROTOCOL", "import_result"]

PROTOCOL = "kit-1"
RUNTIME = "tensorrt"


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What the rows say of the network, and which artifact they belong to."""

    sha256: str
    weights: str
    graph_form: str
    accuracy: Mapping[str, tuple[float, str]]


def import_result(file: Path, *, results: Path, artifact: Path | None = None) -> list[Measurement]:
    """Append the rows of a kit's result.json to `results`/<device>.jsonl and return them.

    `artifact` is the folder that the kit was made in (it holds kit/): its hashes, and those of the
    kit and its ONNX files, are compared with the result's, and the rows carry its manifest's
    sha256, its weights and the top-1 of the ONNX file that each engine was built from. Without it
    they carry the sha256 of kit.json and say that the weights are "unknown".

    UsageError for a file that is no result, an unknown model or device, another artifact, rows that
    are there already. CheckFailed for failed engines, another GPU, outputs or times that cannot be.
    """
    values = _read(file)
    try:
        device = get_device(_text(values, "device"))
        model = get_spec(_text(values, "model")).name
        _check_machine(values, device)
        _check_engines(values, device, file)
        origin = _compare(values, artifact)
        rows = _rows(values, model=model, origin=origin)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(
            f"{file} is not the whole result of a kit ({error!r}); copy it again"
        ) from error
    store = results / f"{device.name}.jsonl"
    before = {_key(row) for row in read_rows([store])} if store.is_file() else set()
    if known := [row for row in rows if _key(row) in before]:
        raise UsageError(
            f"{store} has the {known[0].precision} result of {known[0].date} already; a kit that "
            "ran again writes a new result.json"
        )
    append_rows(rows, results)
    return rows


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file} is not there; give the result.json that a kit wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict) or "engines" not in values or "kit_sha256" not in values:
        raise UsageError(f"{file} is not the result of a kit; give the result.json beside kit.json")
    if values.get("format") != KIT_FORMAT:
        raise UsageError(
            f"{file} has the format {values.get('format')}, this litezoo reads {KIT_FORMAT}; make "
            "the kit again and run it"
        )
    return values


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    """Return a number that is finite and not negative."""
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} is {value!r}")
    if not 0 <= value < math.inf:
        raise CheckFailed(f"{key} is {value}, which no measurement gives; run the kit again")
    return float(value)


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if type(value) is not int:
        raise TypeError(f"{key} is {value!r}")
    if value < 1:
        raise CheckFailed(f"{key} is {value}, which no measurement gives; run the kit again")
    return value


def _check_machine(values: Mapping[str, Any], device: Device) -> None:
    found = _text(values, "compute_capability")
    if found != device.compute_capability:
        raise CheckFailed(
            f"{_text(values, 'gpu')} has compute capability {found} and {device.name} "
            f"{device.compute_capability}; these are not results of {device.name}"
        )


def _check_engines(values: Mapping[str, Any], device: Device, file: Path) -> None:
    """Refuse a result of which any engine failed, or is not what its record says."""
    if failed := dict(values["failed"]):
        precision, why = next(iter(failed.items()))
        others = " ".join(f"--precision {entry['precision']}" for entry in values["engines"])
        again = f"; for the others run again: build_engine.py {others}" if others else ""
        raise CheckFailed(f"{file}: {precision} failed there ({why}){again}")
    if not values["engines"] or values["ok"] is not True:
        raise CheckFailed(f"{file} has no engines; run the kit to its end")
    for entry in values["engines"]:
        precision = _text(entry, "precision")
        if precision not in FORMS:
            raise CheckFailed(f"{file}: runtime {RUNTIME!r} has no {precision}; run the kit again")
        try:
            named = read_engine_name(_text(entry, "engine"))
        except Wrong as error:
            raise CheckFailed(f"{file}: {error}") from error
        if (
            not named.stem.endswith(f".{FORMS[precision]}")
            or named.tensorrt_version != _text(values, "tensorrt")
            or named.compute_capability != device.compute_capability
        ):
            raise CheckFailed(
                f"{file}: {entry['engine']} is no {precision} engine of TensorRT "
                f"{values['tensorrt']} for {device.name}; run the kit again"
            )
        parity = Parity(**{**entry["parity"], "batches": tuple(entry["parity"]["batches"])})
        tolerance = min(_number(entry, "tolerance"), TOLERANCES[precision])
        if problem := parity.problem(tolerance):
            raise CheckFailed(f"{file}: {entry['engine']} is not to be used: {problem}")


def _compare(values: Mapping[str, Any], folder: Path | None) -> _Origin:
    """Return what the artifact says, after comparing it with the result."""
    if folder is None:
        kit = _text(values, "kit_sha256")
        return _Origin(sha256=kit, weights="unknown", graph_form="deploy", accuracy={})
    artifact = read_artifact(folder)
    for key, ours in (("model", artifact.model), ("device", artifact.device)):
        if values[key] != ours:
            raise UsageError(f"the result is of {values[key]} and {folder} of {ours}; give its own")
    names = {"kit/kit.json": _text(values, "kit_sha256")}
    names |= {f"kit/{_text(e, 'onnx')}": _text(e, "onnx_sha256") for e in values["engines"]}
    for name, digest in names.items():
        if artifact.files.get(name) != digest:
            raise CheckFailed(
                f"the result was made with another {name} than that of {folder}; give the artifact "
                "that its kit is from"
            )
    check_hashes(folder, artifact, list(names))
    return _Origin(
        sha256=file_sha256(folder / MANIFEST),
        weights="random" if artifact.weights == "random" else "trained",
        graph_form=artifact.graph_form,
        accuracy=_accuracies(artifact),
    )


def _accuracies(artifact: Artifact) -> dict[str, tuple[float, str]]:
    """Return the top-1 in percent of each typed ONNX file, by form, and what it is of."""
    engines: dict[str, Engine] = {
        form: engine
        for engine in artifact.engines
        for form, file in artifact.onnx.items()
        if file in engine.files
    }
    own = {form: engine.accuracy for form, engine in engines.items() if engine.accuracy}
    return {
        form: (accuracy.top1_percent, top1_data(accuracy, artifact))
        for form, accuracy in {**artifact.onnx_accuracy, **own}.items()
    }


def _machine(values: Mapping[str, Any]) -> Machine:
    host = values["host"]
    return Machine(
        cpu=_text(host, "cpu"),
        cores=_count(host, "cores"),
        isa=(),
        governor="unknown",
        memory_gib=_number(host, "memory_gib"),
        system=_text(values, "system"),
        load_1min=_number(host, "load_1min"),
        versions={
            "gpu": _text(values, "gpu"),
            "driver": _text(values, "driver"),
            "cuda": _text(values, "driver_cuda"),
            "tensorrt": _text(values, "tensorrt"),
            "python": _text(values, "python"),
        },
    )


def _rows(values: Mapping[str, Any], *, model: str, origin: _Origin) -> list[Measurement]:
    machine, device = _machine(values), _text(values, "device")
    try:
        date = datetime.fromisoformat(_text(values, "time_utc")).isoformat(timespec="seconds")
    except ValueError as error:
        raise UsageError(f"the result's time_utc is no time ({error}); copy it again") from error
    channels, height, width = (int(size) for size in values["image_shape"])
    first = values["engines"][0]
    base = {row["batch"]: _number(row, "p50_ms") for row in first["timings"]}
    rows = []
    for entry in values["engines"]:
        precision = _text(entry, "precision")
        top1_percent, data = origin.accuracy.get(FORMS[precision], (None, ""))
        if not entry["timings"]:
            raise CheckFailed(f"{entry['engine']} was not timed; run the kit again")
        for row in entry["timings"]:
            p50, p90, p99 = (_number(row, f"p{percent}_ms") for percent in (50, 90, 99))
            if not 0 < p50 <= p90 <= p99:
                raise CheckFailed(
                    f"{entry['engine']} at batch {row['batch']} has the percentiles {p50}, {p90} "
                    f"and {p99} ms, which no measurement gives; run the kit again"
                )
            batch = _count(row, "batch")
            rows.append(
                Measurement(
                    model=model,
                    artifact_sha256=origin.sha256,
                    weights=origin.weights,
                    device=device,
                    runtime=RUNTIME,
                    precision=precision,
                    graph_form=origin.graph_form,
                    batch=batch,
                    resolution=(channels, height, width),
                    threads=1,
                    p50_ms=round(p50, 4),
                    p90_ms=round(p90, 4),
                    p99_ms=round(p99, 4),
                    images_per_s=round(1e3 * batch / p50, 1),
                    ratio=round(base[batch] / p50, 3),
                    ratio_to=f"{model} {RUNTIME} {first['precision']} {origin.graph_form}",
                    spread=round(_number(row, "spread"), 3),
                    runs=_count(row, "runs"),
                    seconds=round(_number(row, "seconds"), 2),
                    top1_percent=top1_percent,
                    top1_data=data,
                    machine=machine,
                    protocol=PROTOCOL if row["cuda_graph"] is True else f"{PROTOCOL} without graph",
                    date=date,
                )
            )
    return rows


def _key(row: Measurement) -> tuple[object, ...]:
    """What two rows of one measurement share, whatever artifact they were imported with."""
    gpu = row.machine.versions.get("gpu")
    return (row.device, row.model, row.runtime, row.precision, row.batch, row.date, gpu)
