"""The way of a network to its engines: load, fuse, ONNX, typed precision, runtimes, artifact.

Each stage is compared with PyTorch before the next one starts; the artifact's folder appears whole
at the end or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from litezoo.models.catalogue import ModelSpec, Preprocess, get_spec, resolve_name
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, LitezooError, MissingError, UsageError
from litezoo.models.fetch import find_weights
from litezoo.models.files import file_sha256, write_whole
from litezoo.models.fuse import fuse_with_report, graph_form
from litezoo.models.weights import read_checkpoint
from litezoo.recipes.data import DataError, eval_loader, eval_transform, open_data
from litezoo.recipes.devices import Device, get_device
from litezoo.recipes.runs import BEST, last_run

from .artifact import (
    EXPECTED,
    GOLDEN,
    MANIFEST,
    Accuracy,
    Artifact,
    Engine,
    check_hashes,
    read_artifact,
)
from .calibration import Calibration, choose_calibration
from .compare import compare_logits, worst_layers
from .embed import embed_preprocess
from .limits import Finding, apply_rewrites, check_limits
from .parity import BATCHES, TOLERANCE, Parity, check_batches, check_parity
from .qdq_lint import check_lint
from .runtime import Array, BuildSource, Objective, Runtime, Session, get_runtime
from .to_fp16 import check_fp16_range, to_fp16
from .to_int8 import Form, quantize
from .to_onnx import INPUT, OUTPUT, export_onnx, load_onnx, simplify_onnx
from .whole_folder import check_replaceable, whole_folder

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["EngineRequest", "Ranker", "check", "choose_source", "export", "load_source"]

#: auto: build what can be built here, else a kit; require: MissingError where it cannot.
EngineRequest = Literal["auto", "require"]
#: Measures engines by label in one interleaved run: sessions, images -> milliseconds a batch.
Ranker = Callable[[Mapping[str, Session], Array], Mapping[str, float]]

#: Images whose logits an artifact carries.
PROBES = 16
_PACKAGES = ("litezoo", "torch", "timm", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy")


def choose_source(model: str | None, weights: str | None) -> tuple[str, str]:
    """Fill in what a request leaves open: the last trained checkpoint, else public weights.

    Returns the model's name and its weights. Without a run and without a model, that is repvgg_a0.
    """
    if weights is not None and model is None:
        info = read_checkpoint(Path(weights)).info if Path(weights).suffix else None
        if info is None:
            raise UsageError(f"which model are the weights {weights!r} for? name it first")
        return info.model, weights
    if weights is not None and model is not None:
        return resolve_name(model), weights
    run = last_run("*" if model is None else resolve_name(model))
    if run is not None:
        checkpoint = run / BEST
        info = read_checkpoint(checkpoint).info
        if info is not None:
            return info.model, str(checkpoint)
    name = "repvgg_a0" if model is None else resolve_name(model)
    spec = get_spec(name)
    if not spec.is_pretrained:
        raise MissingError(
            f"{name} has no public weights and no run here; type one of: `litezoo train {name}`, "
            "`--weights FILE`, `--weights random` (untrained, for measuring speed)"
        )
    return name, spec.get_weights().tag


@dataclass(frozen=True, kw_only=True)
class Source:
    """The network to export and where it is from."""

    spec: ModelSpec
    model: nn.Module
    weights: str
    sha256: str | None
    preprocess: Preprocess
    classes: tuple[str, ...]
    data: str | None


def load_source(model: str, weights: str, allow_license: tuple[str, ...]) -> Source:
    """Return the network that `weights` are of, in train form, and what is known of them."""
    spec = get_spec(model)
    if weights == "random":
        torch.manual_seed(0)
        network = create_model(model)
        _settle_batchnorm(network, spec.resolution)
        return Source(
            spec=spec, model=network, weights="random", sha256=None,
            preprocess=spec.default_preprocess,
            classes=(), data=None,
        )  # fmt: skip
    file, entry = find_weights(spec, weights, allow_license=allow_license)
    checkpoint = read_checkpoint(file)
    info = checkpoint.info
    preprocess = spec.default_preprocess
    if entry is not None:
        preprocess = entry.preprocess
    elif info is not None:
        preprocess = info.preprocess
    return Source(
        spec=spec,
        model=create_model(model, weights=file),
        weights=weights if entry is None else entry.tag,
        sha256=checkpoint.sha256,
        preprocess=preprocess,
        classes=info.classes if info else (),
        data=info.data if info else None,
    )


@torch.no_grad()
def _settle_batchnorm(network: nn.Module, resolution: int) -> None:
    """Give random weights BatchNorm statistics of noise, so that activations stay finite."""
    network.train()
    for _ in range(2):
        network(torch.randn(4, 3, min(resolution, 64), min(resolution, 64)))


def _probe_images(source: Source) -> tuple[list[Image.Image], Array, str | None]:
    """Return `PROBES` images, as they are and preprocessed: real ones where there are any."""
    note: str | None = None
    photos: list[Image.Image] = []
    if source.data is not None:
        try:
            photos = _test_photos(source.data)
            if len(photos) < PROBES:
                note = f"parity on noise: {source.data} has fewer than {PROBES} test images"
        except (DataError, MissingError) as error:
            note = f"parity on noise and no accuracy: {error}"
    channels, height, width = source.preprocess.input_size
    rng = np.random.default_rng(0)
    if channels not in (1, 3):  # no kind of photograph
        noise = rng.standard_normal((PROBES, channels, height, width), dtype=np.float32)
        return [], noise, note
    if len(photos) < PROBES:
        shape = (PROBES, height + 10, width + 20, channels)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        photos = [Image.fromarray(one.squeeze(-1) if channels == 1 else one) for one in pixels]
    transform = eval_transform(source.preprocess)
    return photos, np.stack([transform(photo).numpy() for photo in photos]), note


def _test_photos(data: str) -> list[Image.Image]:
    """Return `PROBES` images evenly spread over the test split, none with a side above 512."""
    images = open_data(data).images("test")
    photos = []
    for index in np.linspace(0, len(images) - 1, min(PROBES, len(images))).round():
        photo = images[int(index)][0].copy()
        photo.thumbnail((512, 512))
        photos.append(photo)
    return photos


@torch.inference_mode()
def _logits(model: nn.Module, images: Array) -> Array:
    logits: Array = model(torch.from_numpy(images)).float().numpy()
    return logits


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be built, as asked for."""

    device: Device
    precisions: tuple[str, ...]
    is_auto: bool
    calibration: str | None
    keep_float: tuple[str, ...]
    max_drop: float
    accuracy_images: int
    objective: Objective
    batch: int
    threads: int | None
    refused: list[LitezooError] = field(default_factory=list, repr=False)

    def refuse(self, label: str, error: LitezooError, not_built: dict[str, str]) -> None:
        """Note a candidate that failed, or raise where it was asked for by name."""
        if not self.is_auto:
            raise error
        not_built[label] = str(error)
        self.refused.append(error)


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
    accuracy_images: int = 2000,
    objective: Objective = "latency",
    batch: int = 1,
    threads: int | None = None,
    rank: Ranker | None = None,
    triton: bool = False,
    embed: bool = False,
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
        accuracy_images: most validation images to compare top-1 on.
        objective: what the engines are tuned for, at batch size `batch`.
        batch: batch size at which `rank` compares the engines.
        threads: CPU threads of the engines (default: all cores).
        rank: measures the engines; the artifact then lists the fastest first.
        triton: lay a repository for Triton Inference Server into the build kit.
        embed: also write ONNX files that take uint8 images and normalise inside.
        force: build again where `out` holds what the same inputs gave.
        allow_license: licences of weights that are accepted by name.
        progress: called with each step's name.

    Raises CheckFailed where a stage's output differs, MissingError where something is not here.
    """
    target = get_device(device)
    request = _Request(
        device=target, precisions=target.select_precisions(precision), is_auto=precision == "auto",
        calibration=calibration, keep_float=tuple(keep_float), max_drop=max_drop,
        accuracy_images=accuracy_images, objective=objective, batch=batch, threads=threads,
    )  # fmt: skip
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
    inputs = {**_inputs(source, request, precision), "triton": str(triton), "embed": str(embed)}
    if not force and (same := _unchanged(out, inputs)) is not None:
        progress(f"{out} is up to date")
        return same
    train_form = source.model.eval()
    photos, images, note = _probe_images(source)

    progress("fusing to deploy form")
    form = graph_form(train_form)
    deploy = fuse_with_report(train_form).model if form == "train" else train_form
    expected = _logits(deploy, images)
    checks = [
        check_parity(
            "fuse", expected, _logits(train_form, images), reference="the train form",
            tolerance=TOLERANCE["fp32"],
        )
    ]  # fmt: skip

    with whole_folder(out) as folder:
        progress("exporting ONNX")
        not_built: dict[str, str] = {}
        typed = _typed_onnx(deploy, images, expected, source, request, not_built, progress)
        validation: _Validation | None = None
        accuracies: dict[str, Accuracy] = {}
        if source.data is not None and note is None:
            progress("measuring the accuracy of the ONNX files")
            validation = _Validation(source.data, source.preprocess, deploy, accuracy_images)
            typed, accuracies = _good_forms(typed, validation, request, not_built)
        onnx_files = {}
        for name, proto in typed.protos.items():
            onnx_files[name] = f"model.{name}.onnx"
            write_whole(folder / onnx_files[name], proto.SerializeToString())
        if embed:
            progress("putting the normalisation into the graph")
            checks += _embed(folder, onnx_files, typed, deploy, images, source.preprocess, target)
        np.savez(folder / EXPECTED, inputs=images, logits=expected)
        if photos:
            _save_golden(folder, photos, expected)

        build = BuildSource(
            onnx={name: folder / file for name, file in onnx_files.items()},
            module=deploy,
            images=images,
            calibration=None if typed.calibration is None else typed.calibration.images,
        )
        engines, sessions = _build_engines(folder, build, expected, request, not_built, progress)
        if not engines and request.refused and "tensorrt" not in not_built:
            raise request.refused[-1]
        if validation is not None and engines:
            progress("measuring the accuracy of the engines")
            engines = _good_engines(engines, sessions, validation, typed, request, not_built)
        is_here = device == "cpu" or target.kind == "gpu"
        if rank is not None and is_here and len(engines) > 1:
            progress("measuring the speed of the engines")
            engines = _fastest_first(engines, sessions, images, request, rank)
        used = {file for engine in engines for file in engine.files} | {*onnx_files.values()}
        for file in folder.iterdir():  # what no engine that was kept is made of
            if file.name not in used | {EXPECTED, GOLDEN}:
                file.unlink()
        kit: tuple[str, ...] = ()
        if "tensorrt" in not_built:
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
        notes += typed.rewrites
        if engines and not is_here:
            notes.append(f"speed not measured: this machine is no {target.title}")
        if typed.calibration is not None:
            notes.append(f"int8 calibrated on {typed.calibration.source}")
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
        )
        write_whole(folder / MANIFEST, artifact.to_json())
    return artifact


def check(
    model: str,
    *,
    device: str,
    weights: str,
    precision: str = "auto",
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
    images = np.random.default_rng(0).standard_normal((2, *source.preprocess.input_size))
    progress("exporting ONNX")
    exported = export_onnx(deploy, images.astype(np.float32), metadata={})
    fp32, _ = simplify_onnx(exported, images.astype(np.float32))
    return check_limits(fp32, target, dynamic=target.batch.max > 1, precision=precisions[0])


@dataclass(frozen=True, kw_only=True)
class _Typed:
    """The typed ONNX models by form, their parity, and what int8 was calibrated on."""

    protos: Mapping[str, ModelProto]
    parities: tuple[Parity, ...]
    fp32: ModelProto
    calibration: Calibration | None
    rewrites: tuple[str, ...]


def _wanted(request: _Request) -> list[tuple[Runtime, str]]:
    """The engines to build: every runtime of the device at every precision that it has."""
    runtimes = [get_runtime(name) for name in request.device.runtimes]
    wanted = [(r, p) for r in runtimes for p in request.precisions if p in r.precisions]
    if not wanted:
        raise UsageError(
            f"no runtime of {request.device.name} has {', '.join(request.precisions)}; "
            + "; ".join(f"{r.name} has {', '.join(r.precisions)}" for r in runtimes)
        )
    return wanted


def _typed_onnx(
    deploy: nn.Module,
    images: Array,
    expected: Array,
    source: Source,
    request: _Request,
    not_built: dict[str, str],
    progress: Callable[[str], None],
) -> _Typed:
    """Return one checked ONNX model for each form that an engine is built from."""
    if (reason := get_runtime("onnxruntime").missing(get_device("cpu"))) is not None:
        raise MissingError(reason)
    metadata = {
        "litezoo.model": source.spec.name,
        "litezoo.graph_form": "deploy",
        "litezoo.preprocess": json.dumps(source.preprocess.to_dict()),
        "litezoo.classes": json.dumps(source.classes),
    }
    exported = export_onnx(deploy, images[:2], metadata=metadata)
    progress("simplifying with onnxsim, comparing")
    fp32, parity = simplify_onnx(exported, images)
    parities = [parity]
    progress("checking the device's limits")
    fp32, rewrites = _within_limits(fp32, request)
    if rewrites:
        parities.append(_check_form("fp32", fp32, images, expected, stage="rewritten onnx"))
    wanted = [
        form for r, p in _wanted(request) if (form := _form(r, p, request.device)) is not None
    ]
    protos: dict[str, ModelProto] = {}
    calibration = None
    try:
        if any(precision.startswith("int8") for _, precision in _wanted(request)):
            calibration = choose_calibration(
                request.calibration, data=source.data, weights=source.weights,
                preprocess=source.preprocess,
            )  # fmt: skip
    except MissingError as error:
        request.refuse("int8", error, not_built)
    for form in dict.fromkeys(wanted):
        if form.startswith("int8") and calibration is None:
            continue
        try:
            progress(f"typing {form}")
            proto, said = apply_rewrites(
                _retype(fp32, form, images, calibration, request), request.device
            )
            rewrites += [what for what in said if what not in rewrites]
            parities.append(
                _check_form(form, proto, images, expected, batches=_batches(request.device))
            )
            protos[form] = proto
        except (CheckFailed, MissingError) as error:
            request.refuse(f"onnx {form}", error, not_built)
    if not protos:
        raise CheckFailed(f"no ONNX file could be made: {'; '.join(not_built.values())}")
    return _Typed(
        protos=protos, parities=tuple(parities), fp32=fp32, calibration=calibration,
        rewrites=tuple(rewrites),
    )  # fmt: skip


def _within_limits(fp32: ModelProto, request: _Request) -> tuple[ModelProto, list[str]]:
    """Return the float32 model without the operators that the device forbids, and what was done.

    Batch and opset are left for the typed file: quantization works on the open, newer form.
    """
    findings = check_limits(
        fp32, request.device, dynamic=request.device.batch.max > 1,
        precision=request.precisions[0],
    )  # fmt: skip
    if wrong := [f for f in findings if f.kind == "forbidden" and not f.fixed]:
        raise CheckFailed("; ".join(map(str, wrong)))
    limits = dataclasses.replace(request.device.limits, static_shapes=False, opset_max=None)
    model, said = apply_rewrites(fp32, dataclasses.replace(request.device, limits=limits))
    return model, list(said)


def _form(runtime: Runtime, precision: str, device: Device) -> str | None:
    """Return the form of ONNX file that an engine is built from; None is PyTorch's module."""
    form = runtime.precisions[precision]
    is_int8 = form is not None and form.startswith("int8-u8")
    return "int8" if is_int8 and device.kind == "npu" else form


def _batches(device: Device) -> tuple[int, ...]:
    """The batch sizes of parity that the device's engines take."""
    return tuple(size for size in BATCHES if size <= device.batch.max)


def _in_parts(run: Callable[[Array], Array], most: int) -> Callable[[Array], Array]:
    """Return a function that gives `run` no more than `most` images at a time."""

    def parts(images: Array) -> Array:
        starts = range(0, len(images), most)
        return np.concatenate([run(np.ascontiguousarray(images[i : i + most])) for i in starts])

    return parts


def _retype(
    fp32: ModelProto,
    form: str,
    images: Array,
    calibration: Calibration | None,
    request: _Request,
) -> ModelProto:
    """Return the float32 model in a form; CheckFailed where it cannot be."""
    if form == "fp32":
        return fp32
    if form == "fp16":
        check_fp16_range(fp32, images)
        return to_fp16(fp32)
    assert calibration is not None
    limits = request.device.limits
    proto = quantize(
        fp32,
        calibration.images,
        form="int8" if form == "int8-fp16" else cast(Form, form),
        per_channel=limits.quantization != "per-tensor",
        keep_float=request.keep_float,
        weight_bits=7 if limits.weight_bits == 7 else 8,
    )
    if form == "int8-fp16":
        check_fp16_range(fp32, images)
        proto = to_fp16(proto)
        check_lint(proto)
    return proto


def _tolerance(form: str) -> float:
    """How far a form's logits may be from PyTorch's; every int8 form has int8's."""
    return TOLERANCE["int8" if form.startswith("int8") else form]


def _check_form(
    form: str,
    proto: ModelProto,
    images: Array,
    expected: Array,
    *,
    stage: str | None = None,
    batches: tuple[int, ...] = BATCHES,
) -> Parity:
    return check_batches(
        stage or f"onnx {form}", load_onnx(proto), images, expected, tolerance=_tolerance(form),
        batches=batches,
    )  # fmt: skip


def _build_engines(
    folder: Path,
    source: BuildSource,
    expected: Array,
    request: _Request,
    not_built: dict[str, str],
    progress: Callable[[str], None],
) -> tuple[tuple[Engine, ...], dict[str, Session]]:
    """Build every precision with every runtime of the device that is here, and check each.

    Returns the engines, and their sessions by label.
    """
    assert source.images is not None
    engines: list[Engine] = []
    sessions: dict[str, Session] = {}
    for runtime, precision in _wanted(request):
        label = f"{runtime.name} {precision}"
        if runtime.name in not_built:
            continue
        if (reason := runtime.missing(request.device)) is not None:
            not_built[runtime.name] = reason
            continue
        if precision.startswith("int8") and source.calibration is None:
            continue
        form = _form(runtime, precision, request.device)
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
                batches=_batches(request.device),
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
                versions=dict(runtime.versions()),
            )
        )
    return tuple(engines), sessions


def _write_kit(
    folder: Path,
    source: BuildSource,
    model: str,
    expected: Array,
    request: _Request,
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


class _Validation:
    """Compares logits with PyTorch's on the validation images of a data set."""

    def __init__(self, data: str, preprocess: Preprocess, deploy: nn.Module, most: int) -> None:
        self.data, self.preprocess, self.deploy, self.most = data, preprocess, deploy, most
        self.expected: list[Array] = []

    def accuracies(self, runs: Mapping[str, Callable[[Array], Array]]) -> dict[str, Accuracy]:
        """Return the accuracy of every function from images to logits, in one pass."""
        logits: dict[str, list[Array]] = {name: [] for name in runs}
        labels = []
        loader = eval_loader(self.data, self.preprocess, split="val", most=self.most)
        for index, (images, classes) in enumerate(loader):
            batch = images.numpy()
            labels.append(classes.numpy())
            if index == len(self.expected):
                self.expected.append(_logits(self.deploy, batch))
            for name, run in runs.items():
                logits[name].append(run(batch))
        truth, expected = np.concatenate(labels), np.concatenate(self.expected)
        return {
            name: self._compare(np.concatenate(own), expected, truth)
            for name, own in logits.items()
        }

    def _compare(self, got: Array, expected: Array, truth: np.ndarray[Any, Any]) -> Accuracy:
        likeness = compare_logits(got, expected)
        top1, reference = (100 * np.mean(v.argmax(1) == truth) for v in (got, expected))
        return Accuracy(
            data=f"{self.data} (val)",
            images=len(truth),
            top1_percent=round(float(top1), 3),
            pytorch_top1_percent=round(float(reference), 3),
            agreement_percent=round(likeness.top1_agreement_percent, 3),
            snr_db=round(likeness.snr_db, 1),
        )


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
            precision: _in_parts(sessions[engine.label].run, 1)(images)
            for precision, engine in rknn.items()
        },
        toolkit=next(iter(rknn.values())).versions["rknn-toolkit2"],
    )
    return tuple(str(file.relative_to(folder)) for file in written)


def _good_forms(
    typed: _Typed, validation: _Validation, request: _Request, not_built: dict[str, str]
) -> tuple[_Typed, dict[str, Accuracy]]:
    """Return the forms that lose no more than `max_drop` points, and their accuracies."""
    most = request.device.batch.max
    accuracies = validation.accuracies(
        {form: _in_parts(load_onnx(proto), most) for form, proto in typed.protos.items()}
    )
    for form, accuracy in list(accuracies.items()):
        if form != "fp32" and accuracy.drop > request.max_drop:
            error = CheckFailed(_loss(f"onnx {form}", accuracy, form, typed, request))
            request.refuse(f"onnx {form}", error, not_built)
            del accuracies[form]
    protos = {form: proto for form, proto in typed.protos.items() if form in accuracies}
    return dataclasses.replace(typed, protos=protos), accuracies


def _good_engines(
    engines: Sequence[Engine],
    sessions: Mapping[str, Session],
    validation: _Validation,
    typed: _Typed,
    request: _Request,
    not_built: dict[str, str],
) -> tuple[Engine, ...]:
    """Return the engines that lose no more than `max_drop` points, with their accuracies."""
    most = request.device.batch.max
    accuracies = validation.accuracies(
        {label: _in_parts(session.run, most) for label, session in sessions.items()}
    )
    kept = []
    for engine in engines:
        accuracy = accuracies[engine.label]
        if engine.precision == "fp32" or accuracy.drop <= request.max_drop:
            kept.append(dataclasses.replace(engine, accuracy=accuracy))
            continue
        form = _form(get_runtime(engine.runtime), engine.precision, request.device)
        error = CheckFailed(_loss(engine.label, accuracy, form, typed, request))
        request.refuse(engine.label, error, not_built)
    return tuple(kept)


def _loss(
    label: str, accuracy: Accuracy, form: str | None, typed: _Typed, request: _Request
) -> str:
    """Return the sentence on a precision that loses too much, and which layers to keep in float."""
    text = (
        f"{label} loses {accuracy.drop:.2f} points of top-1 ({accuracy.top1_percent:.2f} instead "
        f"of {accuracy.pytorch_top1_percent:.2f} % on {accuracy.images} images), more than "
        f"{request.max_drop:g} (--max-drop)"
    )
    if form is None or not form.startswith("int8") or typed.calibration is None:
        return text
    layers = worst_layers(typed.fp32, typed.protos[form], typed.calibration.images[:64], most=4)
    names = " ".join(layer.name for layer in layers)
    worst = layers[0]
    return f"{text}; worst layer {worst.name} ({worst.snr_db:.0f} dB); try --keep-float {names}"


def _fastest_first(
    engines: Sequence[Engine],
    sessions: Mapping[str, Session],
    images: Array,
    request: _Request,
    rank: Ranker,
) -> tuple[Engine, ...]:
    """Return the engines with their times, the fastest first."""
    batch = np.concatenate([images] * -(-request.batch // len(images)))[: request.batch]
    times = rank({engine.label: sessions[engine.label] for engine in engines}, batch)
    timed = [
        dataclasses.replace(engine, ms_per_batch=times[engine.label], batch=request.batch)
        for engine in engines
    ]
    return tuple(sorted(timed, key=lambda engine: times[engine.label]))


def _embed(
    folder: Path,
    onnx_files: dict[str, str],
    typed: _Typed,
    deploy: nn.Module,
    images: Array,
    preprocess: Preprocess,
    device: Device,
) -> list[Parity]:
    """Write each form once more with the normalisation inside, and compare with PyTorch."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
    pixels = np.clip(np.round((images * std + mean) * 255), 0, 255)
    expected = _logits(deploy, ((pixels / 255 - mean) / std).astype(np.float32))
    raw: Any = pixels.astype(np.uint8).transpose(0, 2, 3, 1)
    parities = []
    for form, proto in typed.protos.items():
        embedded = embed_preprocess(proto, preprocess)
        parities.append(
            check_batches(
                f"embedded {form}", load_onnx(embedded), raw, expected,
                tolerance=_tolerance(form),
                batches=_batches(device),
            )
        )  # fmt: skip
        onnx_files[f"embedded {form}"] = f"model.{form}.images.onnx"
        write_whole(folder / f"model.{form}.images.onnx", embedded.SerializeToString())
    return parities


def _save_golden(folder: Path, photos: Sequence[Image.Image], expected: Array) -> None:
    """Keep the images as they are, with PyTorch's logits: evidence for the preprocessing too."""
    arrays: dict[str, Any] = {f"image_{i:02}": np.asarray(p) for i, p in enumerate(photos)}
    np.savez_compressed(folder / GOLDEN, logits=expected, **arrays)


def _inputs(source: Source, request: _Request, precision: str) -> dict[str, str]:
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
