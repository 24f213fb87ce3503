"""The way of a network to its engines: load, fuse, ONNX, typed precision, runtimes, artifact.

Each stage is compared with PyTorch before the next one starts; the artifact's folder appears whole
at the end or not at all.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor, nn

from litezoo.models.catalogue import Preprocess, get_spec
from litezoo.models.errors import (
    CheckFailed,
    LitezooError,
    MissingError,
    UsageError,
    unknown_name,
)
from litezoo.models.files import file_sha256, write_whole
from litezoo.models.fuse import Fused, fuse_with_report, graph_form, hold_dead
from litezoo.recipes.data import eval_loader
from litezoo.recipes.devices import Device, get_device

from .artifact import (
    EXPECTED,
    GOLDEN,
    MANIFEST,
    Accuracy,
    Artifact,
    Engine,
    check_hashes,
    read_artifact,
    save_expected,
)
from .embed import embed_preprocess
from .int8_risk import int8_risk, small_shape
from .ladder import STAGES, Stage
from .limits import Finding, check_limits
from .open_resolution import check_open_resolution, free_of_size
from .parity import (
    TOLERANCE,
    Parity,
    at_size,
    check_batches,
    check_parity,
    second_size,
)
from .request import (
    Ranker,
    Request,
    batches_of,
    check_io,
    form_of,
    in_parts,
    one_size,
    repeat_to,
    wanted_engines,
)
from .runtime import Array, BuildSource, Objective, Session, check_size, get_runtime
from .source import Source, load_source, logits_of, probe_images
from .to_half import IoType, read_io
from .to_onnx import INPUT, OUTPUT, export_onnx, load_onnx, simplify_onnx
from .tune import fastest_first
from .typed import Typed, float_form, tolerance_of, typed_onnx
from .validation import Validation, good_engines, good_forms, least_right_layers
from .whole_folder import check_replaceable, whole_folder
from .worth import float_rivals, timed_rungs, verdict, with_engines_times

__all__ = ["EngineRequest", "check", "export"]

#: auto: build what can be built here, else a kit; require: MissingError where it cannot.
EngineRequest = Literal["auto", "require"]

_PACKAGES = ("litezoo", "torch", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy")


def export(
    model: str,
    *,
    device: str,
    weights: str,
    out: Path,
    precision: str = "auto",
    engine: EngineRequest = "auto",
    calibration: str | None = None,
    keep_float: Sequence[str] = (),
    max_drop: float = 0.5,
    last_rung: Stage | None = None,
    accuracy_images: int = 2000,
    objective: Objective = "latency",
    batch: int = 1,
    threads: int | None = None,
    rank: Ranker | None = None,
    triton: bool = False,
    embed: bool = False,
    dynamic_resolution: bool = False,
    io: IoType = "fp32",
    force: bool = False,
    allow_license: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> Artifact:
    """Export a network for a device and return the artifact written to `out`.

    Args:
        model: name of the model.
        device: name of the device.
        weights: "default", tag, URL, checkpoint file, or "random" (untrained, for measuring speed).
        out: folder of the artifact; an older artifact there is replaced.
        precision: one of the device's, or "auto" for all of them that pass.
        engine: "require" refuses to write a build kit instead of an engine.
        calibration: images for int8: "digits", a folder, or "random" (noise, for speed only);
            default: the training images of the data that the weights were trained on.
        keep_float: names of ONNX nodes that int8 leaves in float.
        max_drop: most points of top-1 that a reduced precision may lose on the validation images.
        last_rung: how far int8 climbs to keep them (see ladder.py); default: to the top, "qat",
            where int8 is asked for by name, else to "float-layers", before anything is trained.
        accuracy_images: most validation images to compare top-1 on.
        objective: what the engines are tuned for, at batch size `batch`.
        batch: batch size at which `rank` compares the engines.
        threads: CPU threads of the engines (default: all cores).
        rank: measures the engines; the artifact then lists the fastest first.
        triton: lay a repository for Triton Inference Server into the build kit.
        embed: also write ONNX files that take uint8 images and normalise inside.
        dynamic_resolution: build engines that take images of other sizes than the network's own,
            sides of multiples of 32 from 64 on, and compare them at a second size too.
        io: "fp16" or "bf16": ONNX files of that type take and give it too; all others, and what is
            loaded of an artifact, take and give float32.
        force: build again where `out` holds what the same inputs gave.
        allow_license: licences of weights that are accepted by name.
        progress: called with each step's name.

    Raises CheckFailed where a stage's output differs, MissingError where something is not here.
    """
    target = get_device(device)
    target.need_runtime()
    request = Request(
        device=target, precisions=target.select_precisions(precision), is_auto=precision == "auto",
        calibration=calibration, keep_float=tuple(keep_float), max_drop=max_drop,
        last_rung=last_rung or ("float-layers" if precision == "auto" else "qat"),
        accuracy_images=accuracy_images, objective=objective, batch=batch, threads=threads,
        dynamic_resolution=dynamic_resolution, io=io,
    )  # fmt: skip
    if dynamic_resolution:
        check_open_resolution(request)
    if request.last_rung not in STAGES:
        raise unknown_name("rung", request.last_rung, STAGES)
    check_io(request, embed=embed)
    spec = get_spec(model)
    if accuracy_images < 1 or batch < 1:
        raise UsageError(
            f"accuracy is measured on {accuracy_images} images and speed at batch {batch}; both "
            "need 1 or more"
        )
    check_replaceable(out)
    for name in target.runtimes if engine == "require" else ():
        if (reason := get_runtime(name).missing(target)) is not None:
            raise MissingError(f"no engine for {device} can be built here: {reason}")

    progress(f"loading {spec.name} ({weights})")
    source = load_source(model, weights, tuple(allow_license))
    _, height, width = source.preprocess.input_size
    if dynamic_resolution:
        check_size(height, width, f"{spec.name}'s own images are")
    inputs = {**_inputs(source, request, precision), "triton": str(triton), "embed": str(embed)}
    if not force and (same := _unchanged(out, inputs)) is not None:
        progress(f"{out} is up to date")
        return same
    train_form = source.model.eval()
    photos, images, note = probe_images(source)

    progress("fusing to deploy form")
    form = graph_form(train_form)
    is_real = source.data is not None and note is None
    fused = Fused(model=train_form, blocks=())
    if form == "train":
        fused = fuse_with_report(train_form, images=_data_images(source) if is_real else None)
    deploy = fused.model
    # noise may wake up a channel that is dead on data
    reference = train_form if is_real else hold_dead(train_form, fused.dead)
    if dynamic_resolution:
        deploy = free_of_size(deploy)
    expected = logits_of(deploy, images)
    second: tuple[Array, Array] | None = None
    if dynamic_resolution:
        resized = at_size(images, second_size(height, width))
        second = resized, logits_of(deploy, resized)
    checks = [
        check_parity(
            "fuse", expected, logits_of(reference, images), reference="the train form",
            tolerance=TOLERANCE["fp32"],
        )
    ]  # fmt: skip

    with whole_folder(out) as folder:
        progress("exporting ONNX")
        not_built: dict[str, str] = {}
        validation: Validation | None = None
        if source.data is not None and is_real:
            validation = Validation(source.data, source.preprocess, deploy, accuracy_images)
        typed = typed_onnx(
            deploy, images, expected, second, source, request, validation, rank, train_form,
            not_built, progress,
        )  # fmt: skip
        accuracies: dict[str, Accuracy] = {}
        if validation is not None:
            progress("measuring the accuracy of the ONNX files")
            typed, accuracies = good_forms(typed, validation, request, not_built)
        onnx_files = {}
        for name, proto in typed.protos.items():
            onnx_files[name] = f"model.{name}.onnx"
            write_whole(folder / onnx_files[name], proto.SerializeToString())
        if embed:
            progress("putting the normalisation into the graph")
            checks += _embed(folder, onnx_files, typed, deploy, images, source.preprocess, target)
        save_expected(folder, images, expected, second)
        if photos:
            _save_golden(folder, photos, expected)

        build = BuildSource(
            onnx={name: folder / file for name, file in onnx_files.items()},
            module=deploy,
            images=images,
            calibration=None if typed.calibration is None else typed.calibration.images,
            open_resolution=dynamic_resolution,
        )
        engines, sessions = _build_engines(
            folder, build, expected, second, request, not_built, progress
        )
        has_kit = "tensorrt" in not_built and not dynamic_resolution
        if not engines and request.refused and not has_kit:
            raise request.refused[-1]
        if validation is not None and engines:
            progress("measuring the accuracy of the engines")
            engines = good_engines(engines, sessions, validation, typed, request, not_built)
        is_here = device == "cpu" or target.kind == "gpu"
        if rank is not None and is_here and len(engines) > 1:
            progress("measuring the speed of the engines")
            engines = fastest_first(folder, engines, sessions, images, request, rank, progress)
        rungs = with_engines_times(typed.rungs, engines, request)
        if rank is not None and is_here and any(rung.refused for rung in rungs):
            progress(f"measuring the speed of {len(rungs)} rungs")
            rungs = timed_rungs(typed.rungs, images, request, rank)
        worth = None
        if rank is not None and is_here:
            worth = _worth(engines, sessions, build, images, typed, request, rank, progress)
        used = {file for engine in engines for file in engine.files} | {*onnx_files.values()}
        for file in folder.iterdir():  # what no engine that was kept is made of
            if file.name not in used | {EXPECTED, GOLDEN}:
                file.unlink()
        kit: tuple[str, ...] = ()
        if has_kit:
            progress("writing the build kit")
            kit = _write_kit(folder, build, model, expected, request, triton=triton)
        elif any(engine.runtime == "rknn" for engine in engines):
            progress("writing the board kit")
            kit = _write_board_kit(
                folder, engines, sessions, model, images, expected, source, target
            )
        notes = [note] if note else []
        if source.weights == "random":
            notes.append("random weights: for measuring speed only")
        notes += fused.said
        if any(precision.startswith("int8") for precision in request.precisions):
            finest = target.limits.quantization != "per-tensor"
            risk = int8_risk(
                fused.model,
                granularity="per-channel" if finest else "per-tensor",
                image_shape=small_shape(source.preprocess),
            )
            notes.append(str(risk))
        notes += typed.rewrites
        for form, proto in typed.protos.items():
            if (ends := read_io(proto)) != "fp32":
                notes.append(f"inputs and outputs of {onnx_files[form]} are {ends}")
        if engines and not is_here:
            notes.append(f"speed not measured: this machine is not {target.title}")
        if typed.calibration is not None:
            notes.append(f"int8 calibrated on {typed.calibration.source}")
            if validation is not None:
                notes += least_right_layers(typed)
        notes += [worth] if worth else []
        artifact = Artifact(
            model=spec.name,
            weights=source.weights,
            weights_sha256=source.sha256,
            device=device,
            graph_form="deploy",
            preprocess=source.preprocess,
            classes=source.classes,
            data=source.data,
            checks=(*checks, *typed.parities),
            onnx=onnx_files,
            engines=engines,
            kit=kit,
            not_built=not_built,
            notes=tuple(notes),
            inputs=inputs,
            files=_hashes(folder),
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            onnx_accuracy=accuracies,
            dynamic_resolution=dynamic_resolution,
            ladder=rungs,
        )
        write_whole(folder / MANIFEST, artifact.to_json())
    return artifact


def _data_images(source: Source) -> Iterator[Tensor]:
    """Yield training images; they are read only where a channel may be dead."""
    assert source.data is not None
    for images, _ in eval_loader(source.data, source.preprocess, split="train", most=256):
        yield images


def check(
    model: str,
    *,
    device: str,
    weights: str,
    precision: str = "auto",
    dynamic_resolution: bool = False,
    allow_license: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Finding, ...]:
    """Return what is against a network on a device, before anything is built for it.

    The arguments are those of `export`.
    """
    target = get_device(device)
    precisions = target.select_precisions(precision)
    progress(f"loading {model} ({weights})")
    source = load_source(model, weights, tuple(allow_license))
    network = source.model.eval()
    deploy = fuse_with_report(network).model if graph_form(network) == "train" else network
    if dynamic_resolution:
        deploy = free_of_size(deploy)
    images = np.random.default_rng(0).standard_normal((2, *source.preprocess.input_size))
    progress("exporting ONNX")
    exported = export_onnx(
        deploy, images.astype(np.float32), metadata={}, dynamic_resolution=dynamic_resolution
    )
    fp32, _ = simplify_onnx(exported, images.astype(np.float32))
    dynamic = target.batch.max > 1 or dynamic_resolution
    return check_limits(fp32, target, dynamic=dynamic, precision=precisions[0])


def _build_engines(
    folder: Path,
    source: BuildSource,
    expected: Array,
    second: tuple[Array, Array] | None,
    request: Request,
    not_built: dict[str, str],
    progress: Callable[[str], None],
) -> tuple[tuple[Engine, ...], dict[str, Session]]:
    """Build every precision with every runtime of the device that is here, and check each.

    Returns the engines, and their sessions by label.
    """
    assert source.images is not None
    engines: list[Engine] = []
    sessions: dict[str, Session] = {}
    for name in request.device.runtimes if source.open_resolution else ():
        if (reason := one_size(get_runtime(name))) is not None:
            not_built[name] = reason
    for runtime, precision in wanted_engines(request):
        label = f"{runtime.name} {precision}"
        if runtime.name in not_built:
            continue
        if (reason := runtime.missing(request.device)) is not None:
            not_built[runtime.name] = reason
            continue
        if precision.startswith("int8") and source.calibration is None:
            continue
        form = form_of(runtime, precision, request.device)
        if form is not None and form not in source.onnx:
            not_built[label] = not_built[f"onnx {form}"]
            continue
        progress(f"building {label}")
        try:
            files = runtime.build(source, device=request.device, precision=precision, folder=folder)
            session = runtime.load(
                files, device=request.device, precision=precision, threads=request.threads,
                objective=request.objective,
            )  # fmt: skip
            parity = check_batches(
                label,
                session.run,
                source.images,
                expected,
                tolerance=TOLERANCE[precision],
                batches=batches_of(request.device),
                second=second,
            )
        except (CheckFailed, MissingError) as error:
            request.refuse(label, error, not_built)
            continue
        sessions[label] = session
        engines.append(
            Engine(
                runtime=runtime.name,
                precision=precision,
                files=tuple(str(file.relative_to(folder)) for file in files),
                parity=parity,
                objective=request.objective,
                threads=request.threads,
                versions=dict(runtime.versions()),
            )
        )
    return tuple(engines), sessions


def _worth(
    engines: Sequence[Engine],
    sessions: Mapping[str, Session],
    build: BuildSource,
    images: Array,
    typed: Typed,
    request: Request,
    rank: Ranker,
    progress: Callable[[str], None],
) -> str | None:
    """Return whether int8 is worth it here; float engines that were not asked for are measured."""
    if not any(engine.precision.startswith("int8") for engine in engines):
        return None
    times = {engine.label: engine.ms_per_batch for engine in engines}
    known = {label: ms for label, ms in times.items() if ms is not None}
    if len(known) < len(times) or all(e.precision.startswith("int8") for e in engines):
        progress("measuring int8 beside float engines")
        with TemporaryDirectory() as scratch:

            def file_of(form: str) -> Path:
                if form in build.onnx:
                    return build.onnx[form]
                file = Path(scratch) / f"model.{form}.onnx"
                write_whole(file, float_form(typed.fp32, form, request).SerializeToString())
                return file

            rivals = float_rivals(engines, file_of, images, request, Path(scratch))
            own = {engine.label: sessions[engine.label] for engine in engines}
            known = dict(rank({**rivals, **own}, repeat_to(images, request.batch)))
    return verdict(known, request.device.name)


def _write_kit(
    folder: Path,
    source: BuildSource,
    model: str,
    expected: Array,
    request: Request,
    *,
    triton: bool,
) -> tuple[str, ...]:
    """Write TensorRT's build kit with every form it takes; return its files."""
    from .kit import write_kit

    assert source.images is not None
    tensorrt = get_runtime("tensorrt").precisions
    (folder / "kit").mkdir()
    written = write_kit(
        folder / "kit",
        device=request.device,
        model_name=model,
        onnx_files={
            p: source.onnx[form]
            for p in request.precisions
            if (form := tensorrt.get(p)) is not None and form in source.onnx
        },
        inputs=source.images,
        logits=expected,
        input_name=INPUT,
        output_name=OUTPUT,
        triton=triton,
    )
    return tuple(str(file.relative_to(folder)) for file in written)


def _write_board_kit(
    folder: Path,
    engines: Sequence[Engine],
    sessions: Mapping[str, Session],
    model: str,
    images: Array,
    expected: Array,
    source: Source,
    device: Device,
) -> tuple[str, ...]:
    """Write what a Rockchip board needs to check and measure its engines; return its files."""
    from .runtime_rknn import write_board_kit

    rknn = {engine.precision: engine for engine in engines if engine.runtime == "rknn"}
    (folder / "kit").mkdir()
    written = write_board_kit(
        folder / "kit",
        device=device,
        model_name=model,
        rknn_files={precision: folder / engine.files[0] for precision, engine in rknn.items()},
        images=images,
        preprocess=source.preprocess,
        logits=expected,
        simulated={
            precision: in_parts(sessions[engine.label].run, 1)(images)
            for precision, engine in rknn.items()
        },
        toolkit=next(iter(rknn.values())).versions["rknn-toolkit2"],
    )
    return tuple(str(file.relative_to(folder)) for file in written)


def _embed(
    folder: Path,
    onnx_files: dict[str, str],
    typed: Typed,
    deploy: nn.Module,
    images: Array,
    preprocess: Preprocess,
    device: Device,
) -> list[Parity]:
    """Write each form once more with the normalisation inside, and compare with PyTorch."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
    pixels = np.clip(np.round((images * std + mean) * 255), 0, 255)
    expected = logits_of(deploy, ((pixels / 255 - mean) / std).astype(np.float32))
    raw: Any = pixels.astype(np.uint8).transpose(0, 2, 3, 1)
    parities = []
    for form, proto in typed.protos.items():
        embedded = embed_preprocess(proto, preprocess)
        parities.append(
            check_batches(
                f"embedded {form}", load_onnx(embedded), raw, expected,
                tolerance=tolerance_of(form),
                batches=batches_of(device),
            )
        )  # fmt: skip
        onnx_files[f"embedded {form}"] = f"model.{form}.images.onnx"
        write_whole(folder / f"model.{form}.images.onnx", embedded.SerializeToString())
    return parities


def _save_golden(folder: Path, photos: Sequence[Image.Image], expected: Array) -> None:
    """Keep the images as they are, with PyTorch's logits: evidence for the preprocessing too."""
    arrays: dict[str, Any] = {f"image_{i:02}": np.asarray(p) for i, p in enumerate(photos)}
    np.savez_compressed(folder / GOLDEN, logits=expected, **arrays)


def _inputs(source: Source, request: Request, precision: str) -> dict[str, str]:
    """Return what decides what is built: with the same of these the artifact is the same.

    A folder of images counts by its name; after a change in it, export with `force`.
    """
    runtimes = {name: get_runtime(name) for name in request.device.runtimes}
    return {
        "model": source.spec.name,
        "weights": source.sha256 or source.weights,
        "preprocess": json.dumps(source.preprocess.to_dict()),
        "precision": precision,
        **{key: repr(value) for key, value in vars(request).items() if key != "refused"},
        **{name: r.missing(request.device) or repr(r.versions()) for name, r in runtimes.items()},
        "versions": json.dumps(_versions()),
    }


def _unchanged(out: Path, inputs: Mapping[str, str]) -> Artifact | None:
    """Return the artifact in `out` if it was made from the same and is whole."""
    try:
        artifact = read_artifact(out)
        check_hashes(out, artifact)
    except LitezooError:
        return None
    same = artifact.inputs == inputs and {*_hashes(out)} == {*artifact.files, MANIFEST}
    return artifact if same else None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
