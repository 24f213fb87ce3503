"""An artifact: the engines of one network for one device, with the evidence that they are right.

A folder with manifest.json, the typed ONNX files, each runtime's files, expected.npz (images and
PyTorch's logits) and, where the device is not here, kit/. It cannot be constructed without parity
numbers, and no file of it is loaded before its sha256 has been compared. No torch in here: what
`load` returns runs on a machine that has only the runtime.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from litezoo.models.catalogue import Preprocess, get_spec
from litezoo.models.errors import CheckFailed, LitezooError, MissingError, UsageError
from litezoo.models.files import file_sha256
from litezoo.recipes.devices import get_device

from .parity import TOLERANCE, Parity, at_size, check_batches, check_parity
from .runtime import Array, Objective, Session, check_size, get_runtime

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Accuracy",
    "Artifact",
    "Engine",
    "LoadedArtifact",
    "Rung",
    "load",
    "read_artifact",
    "verify",
]

SCHEMA = 2
MANIFEST = "manifest.json"
EXPECTED = "expected.npz"
GOLDEN = "golden.npz"
ARTIFACTS = Path("artifacts")
_ZEROS = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How an engine and PyTorch (float32) classify the same images of a data set's split.

    `agreement_percent` is the share of images with the same first class, `snr_db` the power of
    PyTorch's logits over that of the difference, in decibels.
    """

    data: str
    images: int
    top1_percent: float
    pytorch_top1_percent: float
    agreement_percent: float
    snr_db: float

    @property
    def drop(self) -> float:
        """Points of top-1 lost."""
        return self.pytorch_top1_percent - self.top1_percent


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to quantize that export tried (see ladder.py), with what came of it.

    `form` is the ONNX file's; `size_bytes` its size; `refused` says why it is not good enough, None
    of the one that was taken. `engine` is what `ms_per_batch` was measured with, where the device
    is here: the least of the medians of its blocks, beside all other rungs in one run.
    """

    form: str
    stage: str
    said: str
    accuracy: Accuracy
    size_bytes: int
    refused: str | None = None
    engine: str | None = None
    ms_per_batch: float | None = None

    def __str__(self) -> str:
        """Return it as a line."""
        verdict = "taken" if self.refused is None else f"refused: {self.refused}"
        return (
            f"{self.form}, {self.stage}: top-1 {self.accuracy.top1_percent:.2f} % "
            f"({-self.accuracy.drop:+.2f}), agreement {self.accuracy.agreement_percent:.1f} %, "
            f"{self.accuracy.snr_db:.0f} dB, {verdict}"
        )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One runtime's files at one precision, with their evidence.

    `ms_per_batch` is the time of a batch of `batch` images, where export compared engines: the
    least of the medians of its blocks, with `threads` (None: all cores) and the hint `objective`.
    """

    runtime: str
    precision: str
    files: tuple[str, ...]
    parity: Parity
    accuracy: Accuracy | None = None
    objective: Objective = "latency"
    threads: int | None = None
    batch: int = 1
    ms_per_batch: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return e.g. "openvino fp32"."""
        return f"{self.runtime} {self.precision}"

    @property
    def tuned_label(self) -> str:
        """Return e.g. "openvino fp32 (1 thread, latency)"."""
        count = "all threads" if self.threads is None else f"{self.threads} thread"
        plural = "s" if (self.threads or 1) > 1 else ""
        return f"{self.label} ({count}{plural}, {self.objective})"


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What manifest.json says.

    `weights` is a tag, a checkpoint's path or "random" (speed only); `checks` are the parity of the
    stages before the engines; `onnx` maps each form of the graph to its file, `onnx_accuracy` those
    to their accuracy that no engine here loads; `not_built` says for each absent runtime, form or
    engine why. `inputs` is all that decides what was built; `ladder` is every rung that int8 tried.
    With `dynamic_resolution` the engines take images of other sizes than `preprocess` makes.
    """

    model: str
    weights: str
    weights_sha256: str | None
    device: str
    graph_form: str
    preprocess: Preprocess
    classes: tuple[str, ...]
    data: str | None
    checks: tuple[Parity, ...]
    onnx: Mapping[str, str]
    engines: tuple[Engine, ...]
    kit: tuple[str, ...]
    not_built: Mapping[str, str]
    notes: tuple[str, ...]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    created: str
    onnx_accuracy: Mapping[str, Accuracy] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    dynamic_resolution: bool = False
    ladder: tuple[Rung, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Refuse an artifact without evidence, or with nothing to run."""
        if not self.checks:
            raise CheckFailed(f"{self.model} has no parity numbers; it is not an artifact")
        if not self.engines and not self.kit:
            raise MissingError(f"nothing to run was built: {'; '.join(self.not_built.values())}")

    @property
    def num_classes(self) -> int:
        """The number of classes; public weights, which have no names for them, are of 1000."""
        return len(self.classes) or 1000

    @property
    def bare_onnx(self) -> Mapping[str, str]:
        """The ONNX files, by form, that no engine of this artifact loads as they are."""
        loaded = {file for engine in self.engines for file in engine.files}
        return {form: file for form, file in self.onnx.items() if file not in loaded}

    def to_json(self) -> str:
        """Return manifest.json's text; it holds its own sha256, taken with zeros in its place."""
        return signed_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Artifact:
        """Read manifest.json's text; anything else is a UsageError."""
        try:
            values = json.loads(text)
            own = values.pop("manifest_sha256")
            if hashlib.sha256(text.replace(own, _ZEROS, 1).encode()).hexdigest() != own:
                raise CheckFailed(f"{MANIFEST} was changed (sha256 differs)")
            if values.get("schema") != SCHEMA:
                raise UsageError(
                    f"manifest schema {values.get('schema')} is not {SCHEMA}; export again with "
                    "this version of litezoo"
                )
            return cls(
                **{
                    **values,
                    "preprocess": Preprocess.from_dict(values["preprocess"]),
                    "classes": tuple(values["classes"]),
                    "checks": tuple(_parity(check) for check in values["checks"]),
                    "engines": tuple(_engine(engine) for engine in values["engines"]),
                    "onnx_accuracy": {
                        name: Accuracy(**entry) for name, entry in values["onnx_accuracy"].items()
                    },
                    "ladder": tuple(
                        Rung(**{**entry, "accuracy": Accuracy(**entry["accuracy"])})
                        for entry in values.get("ladder", ())
                    ),
                    "kit": tuple(values["kit"]),
                    "notes": tuple(values["notes"]),
                }
            )
        except LitezooError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"not a litezoo manifest ({error})") from error


def signed_json(values: Mapping[str, Any]) -> str:
    """Return a manifest's text with its own sha256 in it."""
    text = json.dumps({**values, "manifest_sha256": _ZEROS}, indent=2, default=dict) + "\n"
    return text.replace(_ZEROS, hashlib.sha256(text.encode()).hexdigest(), 1)


def _parity(values: Mapping[str, Any]) -> Parity:
    sizes = tuple((height, width) for height, width in values.get("resolutions", ()))
    return Parity(**{**values, "batches": tuple(values["batches"]), "resolutions": sizes})


def _engine(values: Mapping[str, Any]) -> Engine:
    accuracy = values["accuracy"]
    return Engine(
        **{
            **values,
            "files": tuple(values["files"]),
            "parity": _parity(values["parity"]),
            "accuracy": None if accuracy is None else Accuracy(**accuracy),
        }
    )


def read_artifact(folder: Path) -> Artifact:
    """Read a folder's manifest; a folder that is no artifact is a UsageError that names it."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UsageError(f"{folder} is no artifact: it has no {MANIFEST}; make one: litezoo export")
    try:
        return Artifact.from_json(file.read_bytes().decode())
    except (LitezooError, UnicodeDecodeError) as error:
        raise CheckFailed(f"{file} is damaged: {error}; export again") from error


def find_artifacts(device: str, models: Sequence[str] | None = None) -> list[Path]:
    """Return the default folders artifacts/<model>/<device> that exist, or those of `models`.

    MissingError, with what to type, where one of them (or any) was not exported yet.
    """
    name = get_device(device).name
    if models is None:
        found = sorted(file.parent for file in ARTIFACTS.glob(f"*/{name}/{MANIFEST}"))
        if not found:
            raise MissingError(
                f"nothing is exported for {name}; type: litezoo export --device {name}"
            )
        return found
    for model in models:
        if not (default_folder(get_spec(model).name, name) / MANIFEST).is_file():
            raise MissingError(
                f"{model} is not exported for {name}; type: litezoo export {model} --device {name} "
                "(with --weights random if it is for speed only)"
            )
    return [default_folder(model, name) for model in models]


def default_folder(model: str, device: str) -> Path:
    """Return artifacts/<model>/<device>."""
    return ARTIFACTS / model / device


def check_hashes(folder: Path, artifact: Artifact, names: Sequence[str] | None = None) -> None:
    """Compare sha256 of the named files (default: all); CheckFailed names each that differs."""
    wrong = []
    for name in artifact.files if names is None else names:
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file_sha256(file) != artifact.files.get(name):
            wrong.append(f"{name} was changed (sha256 differs)")
    if wrong:
        raise CheckFailed(f"{folder}: {'; '.join(wrong)}; export again or copy the folder anew")


def load_session(
    folder: Path, artifact: Artifact, engine: Engine, *, threads: int | None = None
) -> Session:
    """Check the engine's files and load them, with its own number of threads unless told."""
    check_hashes(folder, artifact, engine.files)
    files = [folder / name for name in engine.files]
    return get_runtime(engine.runtime).load(
        files,
        device=get_device(artifact.device),
        precision=engine.precision,
        threads=engine.threads if threads is None else threads,
        objective=engine.objective,
    )


def read_expected(folder: Path) -> tuple[Array, Array]:
    """Return the images (N, C, H, W) and PyTorch's logits (N, classes) the folder came with."""
    with np.load(folder / EXPECTED) as arrays:
        return arrays["inputs"], arrays["logits"]


def save_expected(
    folder: Path, images: Array, logits: Array, second: tuple[Array, Array] | None
) -> None:
    """Write what `read_expected` and `read_second` return."""
    other = {} if second is None else {_key(second[0].shape[2:]): second[1]}
    np.savez(folder / EXPECTED, allow_pickle=False, inputs=images, logits=logits, **other)


def read_second(folder: Path, size: tuple[int, int]) -> tuple[Array, Array]:
    """Return the folder's images (N, C, *size) and PyTorch's logits of them (N, classes)."""
    with np.load(folder / EXPECTED) as arrays:
        if (key := _key(size)) not in arrays:
            raise CheckFailed(f"{folder / EXPECTED} has no {key}; export again")
        return at_size(arrays["inputs"], size), arrays[key]


def _key(size: Sequence[int]) -> str:
    return "logits_{}x{}".format(*size)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` found: how many files are intact, each engine's parity, what could not run."""

    files: int
    parities: tuple[Parity, ...]
    skipped: Mapping[str, str]


def verify(folder: Path) -> Verified:
    """Check every hash, load every runtime's file and repeat its parity.

    CheckFailed at the first thing that differs. An engine whose runtime is not on this machine is
    reported in `skipped`; MissingError where nothing at all could be run.
    """
    artifact = read_artifact(folder)
    check_hashes(folder, artifact)
    images, expected = read_expected(folder)
    device = get_device(artifact.device)
    parities: list[Parity] = _check_preprocessing(folder, artifact, images)
    skipped: dict[str, str] = {}
    for engine in artifact.engines:
        if (reason := get_runtime(engine.runtime).missing(device)) is not None:
            skipped[engine.label] = reason
            continue
        session = load_session(folder, artifact, engine)
        parities.append(_repeat(folder, engine.parity, engine.label, session, images, expected))
    reference = get_runtime("onnxruntime")
    for check in artifact.checks:
        form = check.stage.removeprefix("onnx ")
        if form == check.stage or form not in artifact.bare_onnx:
            continue
        if (reason := reference.missing(device)) is not None:
            skipped[check.stage] = reason
            continue
        file = folder / artifact.onnx[form]
        session = reference.load([file], device=device, precision=form)
        parities.append(_repeat(folder, check, check.stage, session, images, expected))
    if not any(parity.stage != "preprocessing" for parity in parities):
        raise MissingError(f"{folder} cannot be run here: {'; '.join(skipped.values())}")
    return Verified(files=len(artifact.files), parities=tuple(parities), skipped=skipped)


def _repeat(
    folder: Path, parity: Parity, stage: str, session: Session, images: Array, expected: Array
) -> Parity:
    """Compare again as it was compared at export."""
    return check_batches(
        stage, session.run, images, expected, tolerance=parity.tolerance, batches=parity.batches,
        second=read_second(folder, parity.resolutions[1]) if parity.resolutions else None,
    )  # fmt: skip


def _check_preprocessing(folder: Path, artifact: Artifact, expected: Array) -> list[Parity]:
    """Preprocess the golden images as `load` does and compare with what training's code gave."""
    if not (folder / GOLDEN).is_file():
        return []
    from PIL import Image

    with np.load(folder / GOLDEN) as arrays:
        names = sorted(name for name in arrays if name.startswith("image_"))
        photos = [Image.fromarray(arrays[name]) for name in names]
    got = np.stack([preprocess_image(photo, artifact.preprocess) for photo in photos])
    return [
        check_parity(
            "preprocessing", got.reshape(len(got), -1), expected.reshape(len(expected), -1),
            reference="timm", tolerance=TOLERANCE["fp32"],
        )
    ]  # fmt: skip


class LoadedArtifact:
    """A ready engine: call it with images, get logits (N, classes) float32."""

    def __init__(self, artifact: Artifact, engine: Engine, session: Session) -> None:
        self.artifact, self.engine, self.session = artifact, engine, session
        self.classes = artifact.classes

    def preprocess(self, image: Image.Image | str | os.PathLike[str]) -> Array:
        """Return one image file or PIL image as the network's input (C, H, W)."""
        return preprocess_image(image, self.artifact.preprocess)

    def __call__(self, images: Array | Sequence[Image.Image | str | os.PathLike[str]]) -> Array:
        """Return logits of a preprocessed batch (N, C, H, W), or of image files or PIL images."""
        if isinstance(images, np.ndarray) and images.dtype.kind in "fiub":
            batch = images
        elif isinstance(images, (list, tuple)) and images:
            batch = np.stack([self.preprocess(image) for image in images])
        else:
            raise UsageError(
                f"images is a {type(images).__name__}; give a float32 array (N, C, H, W) or a "
                "list of image files or PIL images"
            )
        size = self.artifact.preprocess.input_size
        if self.artifact.dynamic_resolution:
            if batch.ndim != 4 or batch.shape[1] != size[0] or not len(batch):
                raise UsageError(
                    f"images have shape {batch.shape}; this engine takes (N, {size[0]}, H, W)"
                )
            check_size(batch.shape[2], batch.shape[3], "images are")
        elif batch.ndim != 4 or batch.shape[1:] != size or not len(batch):
            raise UsageError(
                f"images have shape {batch.shape}; this engine takes "
                f"(N, {', '.join(map(str, size))})"
            )
        return self.session.run(np.ascontiguousarray(batch, dtype=np.float32))


def load(
    folder: str | os.PathLike[str], *, runtime: str | None = None, threads: int | None = None
) -> LoadedArtifact:
    """Load an artifact's first engine that can run here, or the one of `runtime`.

    Hashes are compared first. MissingError where no engine of it can run on this machine.
    """
    path = Path(folder)
    artifact = read_artifact(path)
    if runtime is not None:
        get_runtime(runtime)  # an unknown name has a better answer than "not in this artifact"
    reasons = list(artifact.not_built.values())
    for engine in artifact.engines:
        if runtime not in (None, engine.runtime):
            continue
        if (reason := get_runtime(engine.runtime).missing(get_device(artifact.device))) is None:
            session = load_session(path, artifact, engine, threads=threads)
            return LoadedArtifact(artifact, engine, session)
        reasons.append(reason)
    built = ", ".join(engine.label for engine in artifact.engines) or "only a build kit"
    raise MissingError(f"{path} has no engine that can run here ({built}): {'; '.join(reasons)}")


def preprocess_image(image: Image.Image | str | os.PathLike[str], preprocess: Preprocess) -> Array:
    """Resize the short side, crop the centre, normalise: timm's evaluation transform, by PIL.

    Takes an image file or PIL image of any size, returns (C, H, W) float32.
    """
    from PIL import Image

    channels, height, width = preprocess.input_size
    if not isinstance(image, (Image.Image, str, os.PathLike)):
        raise UsageError(
            f"cannot use {type(image).__name__} as an image; give an image file or a PIL image"
        )
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as opened:
                image = opened.convert("L" if channels == 1 else "RGB")
        except OSError as error:
            raise UsageError(f"cannot read the image {image} ({type(error).__name__})") from error
    image = image.convert("L" if channels == 1 else "RGB")
    scale = int(np.floor(height / preprocess.crop_pct))
    short, long = sorted(image.size)
    sides = (scale, int(scale * long / short))
    size = sides if image.size[0] <= image.size[1] else sides[::-1]
    methods = {
        "nearest": Image.Resampling.NEAREST,
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
    }
    image = image.resize(size, methods[preprocess.interpolation])
    left, top = round((image.size[0] - width) / 2), round((image.size[1] - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / 255
    mean, std = (np.asarray(v, dtype=np.float32) for v in (preprocess.mean, preprocess.std))
    normalised: Array = ((pixels - mean) / std).transpose(2, 0, 1).astype(np.float32)
    return np.ascontiguousarray(normalised)
