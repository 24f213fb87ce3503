"""Check and measure .rknn networks on a Rockchip board; needs nothing of litezoo.

A board kit carries a copy of this file. It needs Python 3.8, numpy and rknn-toolkit-lite2:

    python3 run_on_board.py                     check and measure every network of the kit
    python3 run_on_board.py --precision int8    only this one
    python3 run_on_board.py --cores 0_1_2       on three cores instead of one

A network's times are kept only after its logits were compared with those of the simulator; what was
found is in `result.json`. Exit status: 0 ok, 2 wrong usage, 3 a check failed, 4 something is
missing on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KIT_FORMAT = "rknn-board-1"
INSTALL = "python3 -m pip install -r requirements.txt"
#: Largest max |difference| / max |logit| from the simulator's logits. No board was measured yet;
#: these are the bounds that TensorRT's engines have from the logits of their own ONNX files.
TOLERANCES = {"int8": 5e-2, "fp16": 2e-2}
#: A different first class counts only if the two expected logits differ by more than this share of
#: the image's largest logit: rounding may order a near tie either way.
TIES = {"int8": 0.05, "fp16": 0.01}
COMPATIBLE = Path("/proc/device-tree/compatible")
SYSTEM = Path("/sys")
LOWEST_RUNS = 10


class KitError(Exception):
    """What ends the work; the message is for the user and `status` is the program's."""

    status = 3


class Wrong(KitError):
    """What was asked for is wrong in itself."""

    status = 2


class Failed(KitError):
    """A check found a difference, or the NPU's library refused."""


class Missing(KitError):
    """Something that this step needs is not on this machine."""

    status = 4


@dataclass(frozen=True)
class Network:
    """One .rknn of a kit."""

    precision: str
    rknn: str
    expected: str


@dataclass(frozen=True)
class Kit:
    """What kit.json says; `files` maps each other file of the kit to its sha256."""

    model: str
    device: str
    chip: str
    toolkit: str
    networks: tuple[Network, ...]
    files: dict[str, str]


@dataclass(frozen=True)
class Parity:
    """How far the board's logits are from the expected ones, on the same images."""

    precision: str
    images: int
    max_abs_error: float
    max_relative_error: float
    min_cosine: float
    top1_agreement: float
    finite: bool

    def problem(self) -> str | None:
        """Return None if the network may be used, else what is wrong, in a sentence."""
        tolerance = TOLERANCES[self.precision]
        if not self.finite:
            return "some outputs are not finite numbers"
        if self.max_relative_error > tolerance:
            return f"relative error {self.max_relative_error:.2e} > {tolerance:.0e}"
        if self.top1_agreement < 1:
            return f"top-1 agrees for {self.top1_agreement:.1%} of the images, not for all"
        return None


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError:
        if part.exists():
            part.unlink()
        raise


def read_kit(folder: Path) -> Kit:
    """Read kit.json and compare every file with its hash there."""
    file = folder / "kit.json"
    if not file.is_file():
        raise Wrong(f"{folder} is no board kit: it has no kit.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != KIT_FORMAT:
            raise Wrong(
                f"kit.json has the format {values['format']}, this script reads {KIT_FORMAT}; use "
                "the script that came with the kit"
            )
        kit = Kit(
            model=values["model"],
            device=values["device"],
            chip=values["chip"],
            toolkit=values["rknn-toolkit2"],
            networks=tuple(Network(**entry) for entry in values["networks"]),
            files=values["files"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong(f"kit.json is not whole ({error!r}); copy the kit again") from error
    for name, sha256 in sorted(kit.files.items()):
        if not (folder / name).is_file():
            raise Failed(f"{name} is not there; copy the whole kit again")
        if sha256_of(folder / name) != sha256:
            raise Failed(f"{name} was changed since the kit was made; copy the kit again")
    return kit


def check_chip(chip: str) -> list[str]:
    """Return what the device tree calls this board; Missing where its chip is another one."""
    try:
        names = COMPATIBLE.read_bytes().decode(errors="replace").strip("\0").split("\0")
    except OSError:
        names = []
    if not any(name.partition(",")[2].startswith(chip) for name in names):
        found = ", ".join(names) or f"{platform.system()} {platform.machine()}"
        raise Missing(f"this kit is for the {chip}; this machine is {found}")
    return names


def find_library() -> Any:
    """Return the class RKNNLite."""
    try:
        return importlib.import_module("rknnlite.api").RKNNLite
    except ImportError as error:
        raise Missing(f"rknn-toolkit-lite2 is not installed here: {INSTALL}") from error


def load_network(library: Any, file: Path, cores: str) -> Any:
    """Return a loaded network; `cores` is "default" or the end of a name NPU_CORE_..."""
    network = library()
    if network.load_rknn(str(file)) != 0:
        raise Failed(f"{file.name} cannot be loaded by rknn-toolkit-lite2; make the kit again")
    if cores == "default":
        status = network.init_runtime()
    else:
        mask = getattr(library, "NPU_CORE_" + cores.upper(), None)
        if mask is None:
            raise Wrong(f"--cores is default, auto, 0, 1, 2, 0_1 or 0_1_2, not {cores}")
        status = network.init_runtime(core_mask=mask)
    if status != 0:
        raise Missing(
            f"the NPU does not start (status {status}): the board's NPU driver and "
            "/usr/lib/librknnrt.so must be as new as the toolkit in kit.json"
        )
    return network


def run_one(network: Any, image: Any) -> Any:
    """Return the logits (classes,) of one image (1, H, W, C) uint8."""
    outputs = network.inference(inputs=[image], data_format=["nhwc"])
    if not outputs:
        raise Failed("the NPU gave no output; look at `dmesg` and run it again")
    return np.asarray(outputs[0], dtype=np.float32).reshape(-1)


def compare_logits(logits: Any, expected: Any, *, precision: str) -> Parity:
    """Compare logits (N, classes) with the expected ones, row by row."""
    if logits.shape != expected.shape:
        raise Failed(f"the outputs are {logits.shape}, expected are {expected.shape}")
    ours, theirs = logits.astype(np.float64), expected.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    with np.errstate(invalid="ignore"):  # what is not finite is said by `finite`
        error = np.abs(ours - theirs).max()
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosine = (ours * theirs).sum(axis=1) / np.maximum(norms, tiny)
    picked = np.take_along_axis(theirs, ours.argmax(axis=1)[:, None], axis=1)[:, 0]
    agrees = theirs.max(axis=1) - picked <= TIES[precision] * np.abs(theirs).max(axis=1)
    return Parity(
        precision=precision,
        images=len(expected),
        max_abs_error=float(error),
        max_relative_error=float(error / max(np.abs(theirs).max(), tiny)),
        min_cosine=float(cosine.min()),
        top1_agreement=float(agrees.mean()),
        finite=bool(np.isfinite(ours).all()),
    )


def measure(network: Any, image: Any, *, warm_up_ms: float, seconds: float) -> dict[str, Any]:
    """Time one image, copies to and from the NPU included, one run after the other."""
    end = time.perf_counter() + warm_up_ms / 1e3
    while time.perf_counter() < end:
        run_one(network, image)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < LOWEST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        run_one(network, image)
        taken.append((time.perf_counter() - start) * 1e3)
    p50_ms, p90_ms, p99_ms = (float(p) for p in np.percentile(taken, (50, 90, 99)))
    parts = [float(np.median(part)) for part in np.array_split(taken, LOWEST_RUNS)]
    low, middle, high = np.percentile(parts, (25, 50, 75))
    return {
        "batch": 1,
        "p50_ms": p50_ms,
        "p90_ms": p90_ms,
        "p99_ms": p99_ms,
        "images_per_s": 1e3 * len(taken) / sum(taken),
        "spread": float((high - low) / middle),
        "runs": len(taken),
        "seconds": sum(taken) / 1e3,
    }


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "unknown"


def describe_npu() -> dict[str, str]:
    """Return the NPU's clock, governor and driver as Linux tells them; some need root."""
    found = {"driver": _read_text(SYSTEM / "kernel" / "debug" / "rknpu" / "version")}
    for folder in sorted((SYSTEM / "class" / "devfreq").glob("*npu*")):
        found["frequency_hz"] = _read_text(folder / "cur_freq")
        found["frequency_max_hz"] = _read_text(folder / "max_freq")
        found["governor"] = _read_text(folder / "governor")
    return found


def _library_version(network: Any) -> str:
    try:
        return " ".join(str(network.get_sdk_version()).split())
    except Exception as error:  # it is only told, and older versions lack it
        return f"unknown ({type(error).__name__})"


def run_network(
    folder: Path, network: Network, *, library: Any, cores: str, seconds: float, warm_up_ms: float
) -> dict[str, Any]:
    """Check one network and, where it is right, measure it; return its part of the result."""
    with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
        images, expected = arrays["images"], arrays[network.expected]
    loaded = load_network(library, folder / network.rknn, cores)
    try:
        logits = np.stack([run_one(loaded, image[None]) for image in images])
        parity = compare_logits(logits, expected, precision=network.precision)
        problem = parity.problem()
        if problem:
            raise Failed(f"{network.rknn} differs from the simulator: {problem}")
        before = describe_npu()
        row = measure(loaded, images[:1], warm_up_ms=warm_up_ms, seconds=seconds)
        return {
            "precision": network.precision,
            "engine": network.rknn,
            "engine_sha256": sha256_of(folder / network.rknn),
            "tolerance": TOLERANCES[network.precision],
            "parity": dataclasses.asdict(parity),
            "timings": [row],
            "runtime": _library_version(loaded),
            "npu_before": before,
            "npu_after": describe_npu(),
        }
    finally:
        loaded.release()


def run_kit(
    folder: Path,
    *,
    precisions: Sequence[str] = (),
    cores: str = "default",
    seconds: float = 5.0,
    warm_up_ms: float = 1000.0,
) -> int:
    """Do all of a kit's work in its folder and return the exit status."""
    kit = read_kit(folder)
    known = [network.precision for network in kit.networks]
    for name in precisions:
        if name not in known:
            raise Wrong(f"this kit has no {name}; it has {', '.join(known)}")
    names = check_chip(kit.chip)
    library = find_library()
    result_file = folder / "result.json"
    if result_file.exists():
        result_file.unlink()
    made: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for network in kit.networks:
        if precisions and network.precision not in precisions:
            continue
        print(f"checking and measuring {network.rknn}")
        try:
            made.append(
                run_network(
                    folder,
                    network,
                    library=library,
                    cores=cores,
                    seconds=seconds,
                    warm_up_ms=warm_up_ms,
                )
            )
        except Failed as error:
            failed[network.precision] = str(error)
    with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
        _, height, width, channels = arrays["images"].shape
    result = {
        "format": KIT_FORMAT,
        "model": kit.model,
        "device": kit.device,
        "chip": kit.chip,
        "board": names,
        "kit_sha256": sha256_of(folder / "kit.json"),
        "image_shape": [channels, height, width],
        "rknn-toolkit2": kit.toolkit,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cores_of_cpu": os.cpu_count() or 0,
        "load_1min": round(os.getloadavg()[0], 2),
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "conditions": {
            "timed": "one image from the call until its logits, on the CPU's clock",
            "copies": True,
            "npu_cores": cores,
            "clocks_set_by_this_script": False,
            "warm_up_ms": warm_up_ms,
            "seconds": seconds,
        },
        "ok": not failed,
        "engines": made,
        "failed": failed,
    }
    write_whole(result_file, (json.dumps(result, indent=2) + "\n").encode())
    for entry in made:
        row = entry["timings"][0]
        print(
            f"{entry['precision']:<10} p50 {row['p50_ms']:.3f} ms  p90 {row['p90_ms']:.3f} ms  "
            f"p99 {row['p99_ms']:.3f} ms  {row['images_per_s']:.1f} images/s"
        )
    if failed:
        raise Failed("; ".join(f"{name}: {why}" for name, why in sorted(failed.items())))
    print(f"all is in {result_file}; copy it back")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="run_on_board.py", description="Check and measure the networks of a board kit."
    )
    parser.add_argument(
        "--kit",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="FOLDER",
        help="the folder with kit.json (default: where this script is)",
    )
    parser.add_argument(
        "--precision", action="append", default=[], help="only this one (may be repeated)"
    )
    parser.add_argument(
        "--cores", default="default", help="NPU cores: default, auto, 0, 1, 2, 0_1 or 0_1_2"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a network is timed")
    given = parser.parse_args(arguments)
    try:
        return run_kit(
            given.kit,
            precisions=given.precision,
            cores=given.cores,
            seconds=given.seconds,
            warm_up_ms=200 * given.seconds,
        )
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"error: {error}; free the disk or copy the kit elsewhere", file=sys.stderr)
        return Missing.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
