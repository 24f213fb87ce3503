"""The way of a network to its engines: load, fuse, ONNX, typed precision, runtimes, artifact.

Each stage is compared with PyTorch before the next one starts; the artifact's folder appears whole
at the end or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from litezoo.models.catalogue import ModelSpec, Preprocess, get_spec, resolve_name
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.fetch import find_weights
from litezoo.models.files import file_sha256, write_whole
from litezoo.models.fuse import fuse_with_report, graph_form
from litezoo.models.weights import read_checkpoint
from litezoo.recipes.data import DataError, test_loader
from litezoo.recipes.devices import Device, get_device
from litezoo.recipes.runs import BEST, last_run

from .artifact import EXPECTED, MANIFEST, Accuracy, Artifact, Engine, load_session
from .parity import BATCHES, TOLERANCE, Parity, check_batches, check_parity
from .runtime import Array, get_runtime
from .to_fp16 import check_fp16_range, to_fp16
from .to_onnx import INPUT, OUTPUT, export_onnx, load_onnx, simplify_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["EngineRequest", "choose_source", "export"]

#: auto: build what can be built here, else a kit; require: MissingError where it cannot.
EngineRequest = Literal["auto", "require"]

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
class _Source:
    """The network to export and where it is from."""

    spec: ModelSpec
    model: nn.Module
    weights: str
    sha256: str | None
    preprocess: Preprocess
    classes: tuple[str, ...]
    data: str | None


def _load_source(model: str, weights: str, allow_license: tuple[str, ...]) -> _Source:
    spec = get_spec(model)
    if weights == "random":
        torch.manual_seed(0)
        network = create_model(model)
        _settle_batchnorm(network, spec.resolution)
        return _Source(
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
    return _Source(
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


def _probe_images(source: _Source) -> tuple[Array, str | None]:
    """Return as many images as the largest parity batch: real ones where there are any."""
    count = max(BATCHES)
    note = None
    if source.data is not None:
        try:
            images, _ = next(
                iter(test_loader(source.data, source.preprocess, most=count, batch_size=count))
            )
            if len(images) == count:
                return images.numpy().astype(np.float32), None
            note = f"parity on noise: {source.data} has fewer than {count} test images"
        except (DataError, MissingError) as error:
            note = f"parity on noise and no accuracy: {error}"
    noise = np.random.default_rng(0).standard_normal((count, *source.preprocess.input_size))
    return noise.astype(np.float32), note


@torch.inference_mode()
def _logits(model: nn.Module, images: Array) -> Array:
    logits: Array = model(torch.from_numpy(images)).float().numpy()
    return logits


def export(
    model: str,
    *,
    device: str,
    weights: str,
    out: Path,
    precision: str = "auto",
    engine: EngineRequest = "auto",
    accuracy_images: int = 2000,
    allow_license: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> Artifact:
    """Export a network for a device and return the artifact written to `out`.

    Args:
        model: name of the model.
        device: name of the device.
        weights: "default", tag, URL, checkpoint file, or "random" (untrained, for measuring speed).
        out: folder of the artifact; an older artifact there is replaced.
        precision: one of the device's, or "auto" for all of them.
        engine: "require" refuses to write a build kit instead of an engine.
        accuracy_images: most images of the test split to compare top-1 on.
        allow_license: licences of weights that are accepted by name.
        progress: called with each step's name.

    Raises CheckFailed where a stage's output differs, MissingError where something is not here.
    """
    target = get_device(device)
    precisions = target.select_precisions(precision)
    spec = get_spec(model)
    if accuracy_images < 1:
        raise UsageError(f"accuracy is measured on {accuracy_images} images; give 1 or more")
    _check_replaceable(out)
    for name in target.runtimes if engine == "require" else ():
        if (reason := get_runtime(name).missing(target)) is not None:
            raise MissingError(f"no engine for {device} can be built here: {reason}")

    progress(f"loading {spec.name} ({weights})")
    source = _load_source(model, weights, tuple(allow_license))
    train_form = source.model.eval()
    images, note = _probe_images(source)

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

    with _whole_folder(out) as folder:
        progress("exporting ONNX")
        protos, stages = _typed_onnx(deploy, images, expected, precisions, source, progress)
        checks += stages
        onnx_files = {}
        for name, proto in protos.items():
            onnx_files[name] = f"model.{name}.onnx"
            write_whole(folder / onnx_files[name], proto.SerializeToString())
        np.savez(folder / EXPECTED, inputs=images, logits=expected)

        engines, not_built = _build_engines(folder, target, onnx_files, images, expected, progress)
        kit: tuple[str, ...] = ()
        if "tensorrt" in not_built:
            from .kit import write_kit

            progress("writing the build kit")
            (folder / "kit").mkdir()
            written = write_kit(
                folder / "kit",
                device=target,
                model_name=model,
                onnx_files={name: folder / file for name, file in onnx_files.items()},
                inputs=images,
                logits=expected,
                input_name=INPUT,
                output_name=OUTPUT,
            )
            kit = tuple(str(file.relative_to(folder)) for file in written)
        notes = [note] if note else []
        if source.weights == "random":
            notes.append("random weights: for measuring speed only")
        artifact = Artifact(
            model=spec.name,
            weights=source.weights,
            weights_sha256=source.sha256,
            device=device,
            graph_form="deploy",
            preprocess=source.preprocess,
            classes=source.classes,
            data=source.data,
            checks=tuple(checks),
            onnx=onnx_files,
            engines=engines,
            kit=kit,
            not_built=not_built,
            notes=tuple(notes),
            files=_hashes(folder),
            versions=_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if source.data is not None and note is None:
            progress("measuring accuracy")
            artifact = _with_accuracy(artifact, folder, deploy, accuracy_images)
        write_whole(folder / MANIFEST, artifact.to_json())
    return artifact


def _typed_onnx(
    deploy: nn.Module,
    images: Array,
    expected: Array,
    precisions: tuple[str, ...],
    source: _Source,
    progress: Callable[[str], None],
) -> tuple[dict[str, ModelProto], list[Parity]]:
    """Return one checked ONNX model for each precision, and the parity of every stage."""
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
    protos, parities = {"fp32": fp32}, [parity]
    if "fp16" in precisions:
        progress("typing float16")
        check_fp16_range(fp32, images)
        protos["fp16"] = to_fp16(fp32)
    parities += [
        check_batches(
            f"onnx {precision}", load_onnx(proto), images, expected, tolerance=TOLERANCE[precision]
        )
        for precision, proto in protos.items()
    ]
    return {name: protos[name] for name in precisions}, parities


def _build_engines(
    folder: Path,
    device: Device,
    onnx_files: Mapping[str, str],
    images: Array,
    expected: Array,
    progress: Callable[[str], None],
) -> tuple[tuple[Engine, ...], dict[str, str]]:
    """Build every precision with every runtime of the device that is here."""
    engines: list[Engine] = []
    not_built: dict[str, str] = {}
    for name in device.runtimes:
        runtime = get_runtime(name)
        if (reason := runtime.missing(device)) is not None:
            not_built[name] = reason
            continue
        for precision, onnx_file in onnx_files.items():
            progress(f"building {name} {precision}")
            files = runtime.build(
                folder / onnx_file, device=device, precision=precision, folder=folder
            )
            session = runtime.load(files, device=device)
            engines.append(
                Engine(
                    runtime=name,
                    precision=precision,
                    files=tuple(str(file.relative_to(folder)) for file in files),
                    parity=check_batches(
                        f"{name} {precision}",
                        session.run,
                        images,
                        expected,
                        tolerance=TOLERANCE[precision],
                    ),
                    versions=dict(runtime.versions()),
                )
            )
    return tuple(engines), not_built


def _with_accuracy(artifact: Artifact, folder: Path, deploy: nn.Module, most: int) -> Artifact:
    """Return the artifact with top-1 of all it holds, and of PyTorch, on the test split."""
    data = artifact.data
    assert data is not None
    sessions = [load_session(folder, artifact, engine) for engine in artifact.engines]
    device, reference = get_device("cpu"), get_runtime("onnxruntime")
    bare = artifact.bare_onnx
    sessions += [reference.load([folder / file], device=device) for file in bare.values()]
    hits, reference_hits, total = [0] * len(sessions), 0, 0
    for images, labels in test_loader(data, artifact.preprocess, most=most):
        batch, wanted = images.numpy(), labels.numpy()
        reference_hits += int((_logits(deploy, batch).argmax(1) == wanted).sum())
        for index, session in enumerate(sessions):
            hits[index] += int((session.run(batch).argmax(1) == wanted).sum())
        total += len(wanted)
    accuracies = [
        Accuracy(
            data=data,
            images=total,
            top1_percent=round(100 * correct / total, 3),
            pytorch_top1_percent=round(100 * reference_hits / total, 3),
        )
        for correct in hits
    ]
    count = len(artifact.engines)
    engines = tuple(
        dataclasses.replace(engine, accuracy=accuracy)
        for engine, accuracy in zip(artifact.engines, accuracies[:count], strict=True)
    )
    onnx_accuracy = dict(zip(bare, accuracies[count:], strict=True))
    return dataclasses.replace(artifact, engines=engines, onnx_accuracy=onnx_accuracy)


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


def _check_replaceable(out: Path) -> None:
    """Refuse to replace what is not an artifact."""
    if out.is_file():
        raise UsageError(f"{out} is a file; give a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} holds other files; give an empty or new folder with --out")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` at the end, or vanishes on an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    scratch.chmod(0o755)
    old = scratch.with_name(scratch.name + ".old")
    try:
        yield scratch
        if out.exists():
            os.replace(out, old)
        os.replace(scratch, out)
    except BaseException as error:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, CheckFailed):
            raise CheckFailed(f"{error}; nothing was written") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
