"""Whether int8 is worth it on a device: its engines beside a float one, and every rung's time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from litezoo.models.errors import LitezooError

from .artifact import Engine, Rung
from .ladder import Tried
from .request import Ranker, Request, form_of, repeat_to, wanted_engines
from .runtime import Array, BuildSource, Runtime, Session, get_runtime

__all__ = ["build_session", "float_rivals", "timed_rungs", "verdict", "with_engines_times"]


def timed_rungs(
    tried: Sequence[Tried], images: Array, request: Request, rank: Ranker | None
) -> tuple[Rung, ...]:
    """Return the rungs with what a batch of `request.batch` takes, all measured in one run.

    Each is built by the first runtime of the device that loads its form. They stay without a time
    where `rank` is None, the runtime is not here or refuses to build.
    """
    rungs = [own.rung for own in tried]
    if rank is None or not rungs:
        return tuple(rungs)
    sessions: dict[str, Session] = {}
    labels: dict[int, str] = {}
    with TemporaryDirectory() as folder:
        for index, own in enumerate(tried):
            found = _runtime_of(own.rung.form, request)
            if found is None:
                continue
            runtime, precision = found
            place = Path(folder) / str(index)
            place.mkdir()
            file = place / "model.onnx"
            file.write_bytes(own.proto.SerializeToString())
            label = f"{runtime.name} {precision}, rung {index + 1}"
            source = BuildSource(onnx={own.rung.form: file}, images=images)
            try:
                sessions[label] = build_session(runtime, precision, source, request, place)
            except LitezooError:
                continue
            labels[index] = label
            rungs[index] = dataclasses.replace(own.rung, engine=f"{runtime.name} {precision}")
        times = rank(sessions, repeat_to(images, request.batch)) if sessions else {}
    return tuple(
        dataclasses.replace(rung, ms_per_batch=times[labels[index]]) if index in labels else rung
        for index, rung in enumerate(rungs)
    )


def with_engines_times(
    tried: Sequence[Tried], engines: Sequence[Engine], request: Request
) -> tuple[Rung, ...]:
    """Return the rungs; those that were taken with the time of the fastest engine made of them."""
    times: dict[str, Engine] = {}
    for engine in engines:
        form = form_of(get_runtime(engine.runtime), engine.precision, request.device)
        if form is not None and engine.ms_per_batch is not None:
            times.setdefault(form, engine)
    return tuple(
        dataclasses.replace(own.rung, engine=best.label, ms_per_batch=best.ms_per_batch)
        if own.rung.refused is None and (best := times.get(own.rung.form)) is not None
        else own.rung
        for own in tried
    )


def _runtime_of(form: str, request: Request) -> tuple[Runtime, str] | None:
    """Return the first runtime of the device, and its precision, that loads a form here."""
    for runtime, precision in wanted_engines(request):
        is_here = runtime.missing(request.device) is None
        if is_here and form_of(runtime, precision, request.device) == form:
            return runtime, precision
    return None


def build_session(
    runtime: Runtime, precision: str, source: BuildSource, request: Request, folder: Path
) -> Session:
    """Build an engine into `folder` and load it, as `request` says."""
    files = runtime.build(source, device=request.device, precision=precision, folder=folder)
    return runtime.load(
        files, device=request.device, precision=precision, threads=request.threads,
        objective=request.objective,
    )  # fmt: skip


def float_rivals(
    engines: Sequence[Engine],
    typed: Callable[[str], Path],
    images: Array,
    request: Request,
    folder: Path,
) -> dict[str, Session]:
    """Return sessions, by label, of the float engines that int8 has to beat.

    They are of the runtimes of `engines`, in all float precisions that the device has there;
    `typed` writes a form's ONNX file. Their files go into `folder`.
    """
    rivals: dict[str, Session] = {}
    for name in dict.fromkeys(engine.runtime for engine in engines):
        runtime = get_runtime(name)
        for precision in request.device.precisions:
            form = runtime.precisions.get(precision)
            if precision.startswith("int8") or form is None:
                continue
            label = f"{name} {precision}"
            place = folder / label.replace(" ", "-")
            place.mkdir()
            try:
                source = BuildSource(onnx={form: typed(form)}, images=images)
                rivals[label] = build_session(runtime, precision, source, request, place)
            except LitezooError:  # no rival
                continue
    return rivals


def verdict(ms: Mapping[str, float], device: str) -> str | None:
    """Return whether int8 is worth it by the times of engines, as a sentence; None if unknown.

    `ms` holds milliseconds a batch by label, such as "openvino int8".

    >>> verdict({"openvino int8": 1.0, "openvino fp32": 2.0}, "cpu")
    'int8 is worth it on cpu: openvino int8 takes 0.50 of the time of openvino fp32'
    >>> verdict({"openvino int8": 1.0, "openvino bf16": 0.8}, "cpu")
    'int8 is not worth it on cpu: openvino int8 takes 1.25 of the time of openvino bf16; export with --precision bf16'
    """  # noqa: E501
    reduced = {label: own for label, own in ms.items() if label.split(" ")[1].startswith("int8")}
    floats = {label: own for label, own in ms.items() if label not in reduced}
    if not reduced or not floats:
        return None
    best, rival = (min(some, key=lambda label: ms[label]) for some in (reduced, floats))
    share = ms[best] / ms[rival]
    said = f"on {device}: {best} takes {share:.2f} of the time of {rival}"
    if share < 1:
        return f"int8 is worth it {said}"
    return f"int8 is not worth it {said}; export with --precision {rival.split(' ')[1]}"
