"""Rockchip NPUs: rknn-toolkit2 builds a .rknn file and simulates it on x86; the board runs it.

The toolkit pins old versions of torch, onnx and numpy, so it lives in an environment of its own,
`.venv-rknn` beside the project or the folder that LITEZOO_RKNN_VENV names. The first build makes
it (5.6 GB, some minutes). What is asked of the toolkit is done by `rknn_worker.py` in there.

What a precision is:

    int8   the toolkit quantizes by itself: weights by channel, activations by tensor, ranges from
           the images of the build
    fp16   nothing is quantized; the NPU computes in float16

The network in a .rknn normalises by itself: it takes raw images (1, H, W, C) of 0..255, and its
calibration images are such. They are recovered from the preprocessed ones: round(255 * (x * std +
mean)), clipped to 0..255. That is exact for what was an 8-bit image after resizing; anything else,
noise say, is rounded to 8 bits, as a camera's image would be.

The simulator runs only what the same process built (toolkit 2.5.0: `load_rknn` has no simulator),
so `load` builds the network again, from the ONNX file and the calibration images that `build` left
beside the .rknn. Two builds' files differ in bytes that nothing reads (addresses of the process's
memory), so it is the outputs that are compared: those of one image, as the first build gave them.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from litezoo.models.catalogue import Preprocess
from litezoo.models.errors import CheckFailed, MissingError, UsageError, require
from litezoo.models.files import file_sha256, write_whole
from litezoo.recipes.devices import Device

from . import rknn_worker, run_on_board
from .runtime import Array, BuildSource, Objective, Session

__all__ = ["RUNTIME", "Rknn", "environment_folder", "raw_images", "write_board_kit"]

_LOG = logging.getLogger(__name__)
_VARIABLE = "LITEZOO_RKNN_VENV"
_STAMP = "litezoo-rknn.json"
#: rknn-toolkit2 2.5.0 has wheels for these.
_PYTHONS = ((3, 8), (3, 12))
#: The environment is 5.6 GB; while it is made, pip keeps the downloaded wheels as well (2.8 GB).
_NEEDED_GB = 9
_LAST_LINES = 4
#: Two builds of one network give the same outputs here, to the last bit; a CPU with other vector
#: instructions may round an activation the other way.
_SAME_NETWORK = 0.02

RawImages = NDArray[np.uint8]


# ------------------------------------------------------------------------- the environment


def environment_folder() -> Path:
    """Return where the toolkit's environment is, or will be."""
    if named := os.environ.get(_VARIABLE):
        return Path(named).absolute()
    project = Path(__file__).resolve().parent.parent
    return (project if (project / "pyproject.toml").is_file() else Path.cwd()) / ".venv-rknn"


def _toolkit_version(folder: Path) -> str | None:
    """Return the version of rknn-toolkit2 in an environment, None where there is none."""
    for found in folder.glob("lib/python3*/site-packages/rknn_toolkit2-*.dist-info"):
        return found.name.removeprefix("rknn_toolkit2-").removesuffix(".dist-info")
    return None


def _state(folder: Path) -> Literal["absent", "unfinished", "whole", "other"]:
    """Say what lies at the environment's place; one made by hand needs no stamp."""
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        if stamp["state"] != "whole":
            return "unfinished"
    except (OSError, ValueError, KeyError, TypeError):
        if (folder / _STAMP).exists():
            return "unfinished"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "absent"
    whole = (folder / "bin" / "python").is_file() and _toolkit_version(folder) is not None
    return "whole" if whole else "other"


def _python_version() -> tuple[int, int]:
    return sys.version_info[:2]


def _find_python() -> str | None:
    """Return a Python that the toolkit has wheels for: this one, else one on the PATH."""
    low, high = _PYTHONS
    if low <= _python_version() <= high:
        return sys.executable
    minors = range(high[1], low[1] - 1, -1)
    found = (shutil.which(f"python3.{minor}") for minor in minors)
    return next((path for path in found if path), None)


def _no_environment(device: Device, folder: Path) -> str | None:
    """Return why there is no environment for a device and none can be made, or None; quick."""
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        return f"runtime 'rknn' needs x86-64 Linux, as rknn-toolkit2 does; this is {system}"
    state, wanted = _state(folder), device.toolchain.get("rknn-toolkit2", "")
    if state == "whole":
        specifiers = require("packaging.specifiers", purpose="reading versions", extra="export")
        version = _toolkit_version(folder)
        if not specifiers.SpecifierSet(wanted).contains(version):
            return (
                f"{folder} has rknn-toolkit2 {version}, {device.name} needs {wanted}; remove that "
                "folder and it is made again"
            )
        return None
    if state == "other":
        return (
            f"{folder} is no environment with rknn-toolkit2; remove it, or set {_VARIABLE} to "
            "another folder"
        )
    if _find_python() is None:
        low, high = (".".join(map(str, version)) for version in _PYTHONS)
        here = ".".join(map(str, _python_version()))
        return (
            f"runtime 'rknn' needs Python {low} to {high}, as rknn-toolkit2 does; this is {here}, "
            f"so install one of them as well (apt-get install python{high}-venv)"
        )
    parent = next(above for above in folder.parents if above.is_dir())
    if (free := shutil.disk_usage(parent).free / 1e9) < _NEEDED_GB:
        return (
            f"making the RKNN environment {folder} takes {_NEEDED_GB} GB of disk and {free:.1f} "
            f"are free; set {_VARIABLE} to a folder on another disk"
        )
    return None


def _run_logged(words: Sequence[str]) -> None:
    """Run a command, log its lines as they come; MissingError with its last one if it fails."""
    lines = ["it said nothing"]
    try:
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env=_environment(),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in filter(None, map(str.strip, process.stdout)):
                _LOG.info("%s", line)
                lines.append(line)
    except OSError as error:
        raise MissingError(f"{words[0]} does not start ({error})") from error
    if process.returncode != 0:
        errors = [line for line in lines if line.startswith("ERROR")]
        raise MissingError((errors or lines)[-1])


def _environment(**more: str) -> dict[str, str]:
    """Return the variables of a process in the toolkit's environment: no paths of ours, no GPU."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1", **more}


def _ensure_environment(device: Device) -> Path:
    """Return the environment's Python, made first where there is none yet.

    Whoever comes second waits. A half-made environment, of a process that was killed say, is made
    again from the start; one that cannot be made is removed, and MissingError says why.
    """
    folder = environment_folder()
    python = folder / "bin" / "python"
    if (reason := _no_environment(device, folder)) is not None:
        raise MissingError(reason)
    if _state(folder) == "whole":
        return python
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _state(folder) != "whole":
                _make_environment(folder, device.toolchain.get("rknn-toolkit2", ""))
    except OSError as error:
        raise MissingError(
            f"the RKNN environment {folder} cannot be made: {error}; set {_VARIABLE} to a folder "
            "that can be written"
        ) from error
    return python


def _make_environment(folder: Path, versions: str) -> None:
    base, python = _find_python(), str(folder / "bin" / "python")
    assert base is not None
    _LOG.warning("making the RKNN environment %s (5.6 GB, some minutes)", folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        write_whole(folder / _STAMP, json.dumps({"state": "unfinished"}))
        _run_logged([base, "-m", "venv", str(folder)])
        packages = [f"rknn-toolkit2{versions}", "pillow", "setuptools"]
        _run_logged([python, "-m", "pip", "install", "--no-input", *packages])
        _run_logged([python, "-c", "from rknn.api import RKNN"])
        stamp = {"state": "whole", "rknn-toolkit2": _toolkit_version(folder)}
        write_whole(folder / _STAMP, json.dumps(stamp))
    except MissingError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise MissingError(
            f"the RKNN environment cannot be made: {error}; with a network, export again, or make "
            f"it by hand: python3 -m venv {folder} && {python} -m pip install 'rknn-toolkit2"
            f"{versions}' pillow setuptools"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------ the worker


def _end(process: subprocess.Popen[bytes], scratch: Path, owner: int) -> None:
    """End a worker and remove its folder; a forked copy of us leaves both alone."""
    if os.getpid() != owner:
        return
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _last_words(text: str) -> list[str]:
    """Return the lines of the toolkit's log that say something: no progress bars, no tracebacks."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain)]
    noise = r"Traceback|File \"|\^+$|\|[^|]*\| *\d+/\d+|={5}|During handling|toolkit2 version"
    return [line for line in lines if line and not re.search(noise, line)][-_LAST_LINES:]


class _Worker:
    """A process of the toolkit's environment that answers requests one after the other."""

    def __init__(self, python: Path, script: Path, *, threads: int | None) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="litezoo-rknn-"))
        # A copy: beside the original lie files named as packages that torch imports (triton).
        copy = Path(shutil.copyfile(script, scratch / "rknn_worker.py"))
        more = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self.scratch, self._log = scratch, scratch / "log.txt"
        try:
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    [str(python), str(copy)], cwd=scratch, env=_environment(**more), bufsize=0,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise MissingError(
                f"the Python of the RKNN environment does not start ({error}); remove "
                f"{python.parent.parent} and it is made again"
            ) from error
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        self.close = weakref.finalize(self, _end, process, scratch, os.getpid())

    def ask(
        self, request: dict[str, Any], image: RawImages | None = None, *, what: str, seconds: float
    ) -> tuple[dict[str, Any], Any]:
        """Return the answer; CheckFailed where it is an error or does not come in `seconds`.

        `what` is being done, for the message. After no answer the worker is gone.
        """
        deadline = time.monotonic() + seconds
        if not self.close.alive:
            raise CheckFailed(f"{what} cannot go on, as the toolkit ended before; load it again")
        try:
            self._send(rknn_worker.encode(request, image), deadline)
            answer, array = rknn_worker.decode(partial(self._receive, deadline=deadline))
        except TimeoutError as error:
            words = self._words()
            self._process.kill()
            self.close()
            raise CheckFailed(f"{what} took longer than {seconds:g} s{words}") from error
        except (EOFError, BrokenPipeError) as error:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:  # what came was no answer
                self._process.kill()
                self._process.wait()
            words = self._words()
            self.close()
            raise CheckFailed(
                f"rknn-toolkit2 ended while {what} (status {self._process.returncode}){words}"
            ) from error
        except BaseException:  # an answer is still under way, and would be taken for the next one
            self._process.kill()
            self.close()
            raise
        if not answer["ok"]:
            said = [line for line in str(answer["error"]).splitlines() if line.strip()]
            # an exception tells its reason, the status of a step only that there is one
            words = self._words() if answer["error"].startswith("ToolkitError") else ""
            raise CheckFailed(f"{what} failed: {said[-1].strip()}{words}")
        return answer, array

    def _words(self) -> str:
        """Return the last lines of the toolkit's log, as the end of a sentence."""
        lines = _last_words(self._log.read_text(encoding="utf-8", errors="replace"))
        return f"; its last words: {' / '.join(lines)}" if lines else ""

    def _send(self, content: bytes, deadline: float) -> None:
        while content:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([], [self._stdin], [], left)[1]:
                raise TimeoutError
            content = content[os.write(self._stdin.fileno(), content) :]

    def _receive(self, size: int, *, deadline: float) -> bytes:
        parts: list[bytes] = []
        while size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self._stdout.fileno(), min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


# --------------------------------------------------------------------------------- runtime


def raw_images(images: Array, preprocess: Preprocess) -> RawImages:
    """Return preprocessed images (N, C, H, W) as they were: (N, H, W, C) of 0..255."""
    mean, std = (
        np.array(values, dtype=np.float64).reshape(1, -1, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    pixels = np.rint((images.astype(np.float64) * std + mean) * 255).clip(0, 255)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))


def _platform(device: Device) -> str:
    """Return the chip's name for the toolkit, which a device's name holds: rk3588-npu, rk3566."""
    found = re.search(r"r[kv]\d{4}[a-z]?", device.name)
    if found is None:
        raise UsageError(
            f"{device.name!r} names no Rockchip chip; name its device file as the chip, such as "
            "rk3588-npu.yaml"
        )
    return found[0]


def _read_model(onnx_file: Path) -> tuple[tuple[int, int, int], Preprocess]:
    """Return (C, H, W) and the preprocessing of an ONNX file; UsageError where it cannot serve."""
    onnx = require("onnx", purpose="reading an ONNX file", extra="export")
    try:
        model = onnx.load(onnx_file)
    except Exception as error:  # protobuf's DecodeError and what onnx makes of it
        raise UsageError(f"{onnx_file} is no ONNX file ({error}); export it again") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    sizes = [
        dim.dim_value if dim.HasField("dim_value") else -1
        for value in inputs
        for dim in value.type.tensor_type.shape.dim
    ]
    if len(inputs) != 1 or len(sizes) != 4 or sizes[0] != 1 or min(sizes) < 1:
        raise UsageError(
            f"{onnx_file} takes {sizes} (-1: open), runtime 'rknn' one image of constant size; "
            "export it for a device with limits: {static_shapes: true}"
        )
    told = {entry.key: entry.value for entry in model.metadata_props}
    if "litezoo.preprocess" not in told:
        raise UsageError(f"{onnx_file} does not say its preprocessing; export it with litezoo")
    try:
        preprocess = Preprocess.from_dict(json.loads(told["litezoo.preprocess"]))
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{onnx_file}: {error}; export it again") from error
    if len(preprocess.mean) != sizes[1]:
        raise UsageError(
            f"{onnx_file} has {sizes[1]} channels, its preprocessing {len(preprocess.mean)}; "
            "export it again"
        )
    return (sizes[1], sizes[2], sizes[3]), preprocess


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What `build` leaves beside a .rknn, so that `load` can build the same network again.

    `calibration` is None for fp16; `logits` (1, classes) are what the network that was written gave
    for `probe` (1, H, W, C) in the simulator.
    """

    settings: Mapping[str, Any]
    calibration: RawImages | None
    probe: RawImages
    logits: Array

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        images = self.probe[:0] if self.calibration is None else self.calibration
        np.savez_compressed(
            stream, allow_pickle=False, settings=np.array(json.dumps(self.settings)),
            calibration=images, probe=self.probe, logits=self.logits,
        )  # fmt: skip
        return stream.getvalue()

    @classmethod
    def read(cls, file: Path) -> _Record:
        try:
            with np.load(file, allow_pickle=False) as values:
                settings = json.loads(str(values["settings"]))
                images = values["calibration"]
                return cls(
                    settings=settings, calibration=images if len(images) else None,
                    probe=values["probe"], logits=values["logits"],
                )  # fmt: skip
        except Exception as error:  # zipfile's, numpy's and json's own kinds
            raise UsageError(f"{file} cannot be read ({error}); export the model again") from error


class _Session:
    """A network in the simulator; `shape` is its (C, H, W)."""

    def __init__(
        self, worker: _Worker, shape: tuple[int, int, int], preprocess: Preprocess, seconds: float
    ) -> None:
        self._worker, self._shape, self._preprocess = worker, shape, preprocess
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process = os.getpid()

    def run(self, batch: Array) -> Array:
        """Return the logits (N, classes); images are simulated one after the other.

        UsageError for another shape than (N, C, H, W) of the network and in a forked process,
        CheckFailed where the toolkit fails.
        """
        if batch.shape[1:] != self._shape or not len(batch):
            wanted = ", ".join(str(size) for size in self._shape)
            raise UsageError(f"the rknn engine takes (N, {wanted}), not {batch.shape}")
        if os.getpid() != self._process:
            raise UsageError(
                "an rknn engine cannot be used in a forked process; start it with the 'spawn' "
                "method and load the engine there"
            )
        return self.run_raw(raw_images(batch, self._preprocess))

    def run_raw(self, images: RawImages) -> Array:
        """Return the logits of images (N, H, W, C) of 0..255."""
        with self._lock:
            rows = [_simulate(self._worker, image[None], self._seconds) for image in images]
        return np.concatenate(rows)


def _simulate(worker: _Worker, image: RawImages, seconds: float) -> Array:
    """Return the logits (1, classes) of one image (1, H, W, C)."""
    _, logits = worker.ask({"do": "run"}, image, what="simulating an image", seconds=seconds)
    found: Array = logits.astype(np.float32)
    return found


@dataclass(frozen=True, kw_only=True)
class Rknn:
    """Builds .rknn files with rknn-toolkit2 and runs them in its simulator.

    `worker` is the script that runs in the toolkit's environment; a build may take `build_seconds`
    and one simulated image `image_seconds` before it is stopped.
    """

    worker: Path = Path(rknn_worker.__file__)
    build_seconds: float = 3600
    image_seconds: float = 300

    name: ClassVar[str] = "rknn"
    precisions: ClassVar[Mapping[str, str | None]] = {"int8": "fp32", "fp16": "fp32"}

    def missing(self, device: Device) -> str | None:
        """Return None if the toolkit's environment is here or can be made, else why not."""
        return _no_environment(device, environment_folder())

    def versions(self) -> Mapping[str, str]:
        """Return the version of rknn-toolkit2, where its environment is here."""
        version = _toolkit_version(environment_folder())
        return {} if version is None else {"rknn-toolkit2": version}

    def build(
        self, source: BuildSource, *, device: Device, precision: str, folder: Path
    ) -> tuple[Path, ...]:
        """Write `rknn.<precision>.rknn` and, for `load`, `.npz`; return them and the ONNX file.

        int8 is calibrated on `source.calibration`, or without it on `source.images`. UsageError for
        a precision or a chip that there is not, an ONNX file with an open batch or no images;
        MissingError where the toolkit's environment cannot be made; CheckFailed with its last
        words where the toolkit fails.
        """
        self._check_precision(precision)
        chip = _platform(device)
        onnx_file = source.file("fp32")
        shape, preprocess = _read_model(onnx_file)
        if source.images is None or source.images.shape[1:] != shape or not len(source.images):
            wanted = ", ".join(str(size) for size in shape)
            raise UsageError(f"runtime 'rknn' calibrates on images (N, {wanted}); give some")
        images = raw_images(source.images, preprocess)
        file = folder / f"rknn.{precision}.rknn"
        settings = {
            "chip": chip,
            "precision": precision,
            "mean": [255 * value for value in preprocess.mean],
            "std": [255 * value for value in preprocess.std],
            "onnx_sha256": file_sha256(onnx_file),
        }
        calibration = None
        if precision == "int8":
            calibration = images
            if source.calibration is not None:
                calibration = raw_images(source.calibration, preprocess)
        python = _ensure_environment(device)
        worker = _Worker(python, self.worker, threads=None)
        try:
            self._start(worker, onnx_file, settings, calibration)
            logits = _simulate(worker, images[:1], self.image_seconds)
            write_whole(file, (worker.scratch / "model.rknn").read_bytes())
        finally:
            worker.close()
        settings["rknn_sha256"] = file_sha256(file)
        record = _Record(
            settings=settings, calibration=calibration, probe=images[:1], logits=logits
        )
        return file, write_whole(file.with_suffix(".npz"), record.to_bytes()), onnx_file

    def load(
        self,
        files: Sequence[Path],
        *,
        device: Device,
        precision: str,
        threads: int | None = None,
        objective: Objective = "latency",
    ) -> Session:
        """Build the network again in a simulator that lives as long as the session.

        `files` are what `build` returned. `threads` limits the simulator; `objective` changes
        nothing. UsageError for other files, CheckFailed where the simulated network is not the one
        in the .rknn.
        """
        self._check_precision(precision)
        named = {file.suffix: file for file in files}
        if sorted(named) != [".npz", ".onnx", ".rknn"] or len(files) != 3:
            raise UsageError(
                "runtime 'rknn' loads a .rknn with its .npz and .onnx, not "
                f"{', '.join(file.name for file in files) or 'no file'}"
            )
        record, onnx_file = _Record.read(named[".npz"]), named[".onnx"]
        shape, preprocess = _read_model(onnx_file)
        here = {
            "chip": _platform(device),
            "precision": precision,
            "onnx_sha256": file_sha256(onnx_file),
            "rknn_sha256": file_sha256(named[".rknn"]),
        }
        for key, value in here.items():
            if record.settings.get(key) != value:
                raise UsageError(
                    f"{named['.rknn'].name} was built with {key} {record.settings.get(key)}, not "
                    f"{value}; export the model again"
                )
        worker = _Worker(_ensure_environment(device), self.worker, threads=threads)
        try:
            self._start(worker, onnx_file, record.settings, record.calibration)
            logits = _simulate(worker, record.probe, self.image_seconds)
            _check_same(logits, record.logits, named[".rknn"])
        except BaseException:
            worker.close()
            raise
        return _Session(worker, shape, preprocess, self.image_seconds)

    def _start(
        self,
        worker: _Worker,
        onnx_file: Path,
        settings: Mapping[str, Any],
        calibration: RawImages | None,
    ) -> None:
        """Have a worker build the network, into `model.rknn` of its own folder, and simulate it."""
        request: dict[str, Any] = {
            "do": "build",
            "onnx": str(onnx_file.absolute()),
            "rknn": "model.rknn",
            "platform": settings["chip"],
            "mean": settings["mean"],
            "std": settings["std"],
            "calibration": None,
        }
        if calibration is not None:
            request["calibration"] = "images.npy"
            np.save(worker.scratch / "images.npy", calibration)
        what = f"building {onnx_file.name} in {settings['precision']} for {settings['chip']}"
        answer, _ = worker.ask(request, what=what, seconds=self.build_seconds)
        _LOG.info("%s took %.1f s", what, answer["build_s"])

    def _check_precision(self, precision: str) -> None:
        if precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise UsageError(f"runtime 'rknn' has no {precision}; it has {known}")


def _check_same(logits: Array, expected: Array, file: Path) -> None:
    """Raise CheckFailed unless two builds gave the same logits for the same image."""
    largest = np.abs(expected).max()
    if logits.shape == expected.shape and np.isfinite(logits).all():
        error = np.abs(logits - expected).max() / max(largest, np.finfo(np.float32).tiny)
        if error <= _SAME_NETWORK:
            return
        how = f"by {error:.1e} (relative)"
    else:
        how = "in shape or by values that are not finite"
    raise CheckFailed(
        f"{file.name} cannot be simulated: built again, its outputs differ {how} from its own; "
        "export the model again with the rknn-toolkit2 that is here now"
    )


# ------------------------------------------------------------------------------- board kit


def write_board_kit(
    folder: Path,
    *,
    device: Device,
    model_name: str,
    rknn_files: Mapping[str, Path],
    images: Array,
    preprocess: Preprocess,
    logits: Array,
    simulated: Mapping[str, Array],
    toolkit: str,
) -> tuple[Path, ...]:
    """Write what a board needs to check and measure .rknn files; return all files of the kit.

    `folder` exists. `rknn_files` maps a precision to its .rknn and `simulated` to the logits (N,
    classes) that the simulator gave for the preprocessed `images` (N, C, H, W), `logits` are the
    float32 network's; `toolkit` is the version of rknn-toolkit2. UsageError where they do not fit.
    """
    if not re.fullmatch(r"\w[\w.+-]*", model_name):
        raise UsageError(f"{model_name!r} is no name for files; use letters, digits, . _ + and -")
    if not rknn_files or set(rknn_files) != set(simulated):
        raise UsageError(
            f"a board kit needs .rknn files and their simulated logits, not {', '.join(rknn_files)}"
            f" and logits of {', '.join(simulated)}"
        )
    if unknown := set(rknn_files) - set(run_on_board.TOLERANCES):
        known = ", ".join(run_on_board.TOLERANCES)
        raise UsageError(f"a board kit has no {min(unknown)}; it has {known}")
    for precision, rows in {"fp32": logits, **simulated}.items():
        if rows.ndim != 2 or rows.shape != logits.shape or not 0 < len(rows) == len(images):
            raise UsageError(
                f"{precision} has logits {rows.shape} for {len(images)} images; one row for each "
                "is wanted"
            )
        if not np.isfinite(rows).all():
            raise UsageError(f"the {precision} logits must be finite; check the model's weights")
    networks = [
        {"precision": p, "rknn": f"{model_name}.{p}.rknn", "expected": f"logits_{p}"}
        for p in rknn_files
    ]
    arrays = io.BytesIO()
    np.savez(
        arrays, allow_pickle=False, images=raw_images(images, preprocess),
        logits=logits.astype(np.float32),
        **{f"logits_{p}": rows.astype(np.float32) for p, rows in simulated.items()},
    )  # fmt: skip
    contents = {
        "run_on_board.py": Path(run_on_board.__file__).read_bytes(),
        "expected.npz": arrays.getvalue(),
        "requirements.txt": _board_requirements(toolkit).encode(),
        "README.md": _board_readme(device, model_name, tuple(rknn_files), toolkit).encode(),
        **{f"{model_name}.{p}.rknn": file.read_bytes() for p, file in rknn_files.items()},
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    kit = {
        "format": run_on_board.KIT_FORMAT,
        "model": model_name,
        "device": device.name,
        "chip": _platform(device),
        "rknn-toolkit2": toolkit,
        "networks": networks,
        "files": {name: file_sha256(folder / name) for name in sorted(contents)},
    }
    write_whole(folder / "kit.json", json.dumps(kit, indent=2) + "\n")
    return tuple(folder / name for name in (*contents, "kit.json"))


def _board_requirements(toolkit: str) -> str:
    return f"rknn-toolkit-lite2=={toolkit}\nnumpy\n"


def _board_readme(
    device: Device, model_name: str, precisions: tuple[str, ...], toolkit: str
) -> str:
    models = "\n".join(f"- `{model_name}.{p}.rknn`: {p}" for p in precisions)
    return f"""# {model_name} for {device.title}

Built by rknn-toolkit2 {toolkit} and run in its simulator; this folder checks and measures it on the
board. Copy all of it to a board with the {_platform(device).upper()}, 64-bit Linux with Rockchip's
kernel and its NPU driver, `/usr/lib/librknnrt.so` {toolkit} or newer and Python 3.8 to 3.12. There,
in this folder:

    python3 -m venv .venv
    .venv/bin/python -m pip install -r requirements.txt
    .venv/bin/python run_on_board.py

It checks this folder's files and the chip. Then it gives each network the images of `expected.npz`
(raw, 0..255, as rows of pixels: the network normalises by itself), compares the logits with the
simulator's, and times one image after the other, copies to and from the NPU included.

{models}

`--cores 0_1_2` uses three NPU cores instead of one, `--precision` takes one network only, `--help`
tells the rest. The clocks are left as they are; `result.json` says what they were. Times are
steadier with a fan and, as root, `echo performance > /sys/class/devfreq/*npu*/governor`.

Copy back `result.json`. Exit status: 0 ok, 2 wrong usage, 3 a check failed (a changed file,
different outputs), 4 something is missing on the board. Each says in one sentence what to do.
"""


RUNTIME = Rknn()
