"""The part of the RKNN runtime that runs inside the environment of rknn-toolkit2; one per session.

The toolkit pins old versions of torch, onnx and numpy, so it has an environment of its own and is
asked over pipes. This file needs only that environment (rknn, numpy) and nothing of litezoo;
`runtime_rknn.py` starts it and imports its message functions.

A message is a JSON object and, where its "array" is true, an array; each is preceded by its length
in bytes (8, little endian). Requests on stdin:

    {"do": "build", "onnx": file, "rknn": file, "platform": "rk3588", "mean": [...], "std": [...],
     "calibration": file.npy or null}
    {"do": "run", "array": true} and one image (1, H, W, C) uint8

`mean` and `std` are on the scale 0..255, `calibration` holds images (N, H, W, C) uint8 and makes an
int8 network, null an fp16 one. Each request is answered on what was stdout: {"ok": true, ...}, for
a run with the logits (1, classes) float32, or {"ok": false, "error": sentence}. What the toolkit
prints goes to stderr. The worker ends with its stdin.

The simulator runs only a network that was built in the same process (`load_rknn` has none), so a
session builds its network again from the same inputs.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

__all__ = ["decode", "encode", "main", "read_message"]

_LENGTH_BYTES, _LONGEST_BYTES = 8, 1 << 32


class ToolkitError(Exception):
    """The toolkit refused; the message says at which step."""


def encode(header: dict[str, Any], array: Any = None) -> bytes:
    """Return a message as bytes."""
    text = json.dumps({**header, "array": array is not None}).encode()
    parts = [len(text).to_bytes(_LENGTH_BYTES, "little"), text]
    if array is not None:
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        content = stream.getvalue()
        parts += [len(content).to_bytes(_LENGTH_BYTES, "little"), content]
    return b"".join(parts)


def decode(read: Callable[[int], bytes]) -> tuple[dict[str, Any], Any]:
    """Return the message that `read` (size -> exactly so many bytes) gives; EOFError for none."""

    def part() -> bytes:
        size = int.from_bytes(read(_LENGTH_BYTES), "little")
        if size > _LONGEST_BYTES:  # text that something printed there
            raise EOFError
        return read(size)

    header = json.loads(part().decode())
    array = np.load(io.BytesIO(part()), allow_pickle=False) if header["array"] else None
    return header, array


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], Any]:
    """Return the next message of a stream; EOFError at its end."""

    def read(size: int) -> bytes:
        content = stream.read(size)
        if len(content) != size:
            raise EOFError
        return content

    return decode(read)


def _checked(step: str, status: Any) -> None:
    """Raise unless a step of the toolkit returned 0."""
    if status != 0:
        raise ToolkitError(f"{step} failed (status {status})")


def _list_images(calibration: str) -> str:
    """Write each calibration image into a file of its own and return the list the toolkit reads.

    Such a file is (1, C, H, W), unlike what inference takes; the toolkit refuses the other layout.
    """
    images = np.load(calibration, allow_pickle=False).transpose(0, 3, 1, 2)
    names = []
    for index in range(len(images)):
        names.append(f"calibration-{index}.npy")
        np.save(names[-1], np.ascontiguousarray(images[index : index + 1]))
    with open("calibration.txt", "w", encoding="utf-8") as stream:
        stream.write("\n".join(names) + "\n")
    return "calibration.txt"


def build(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build a network, write its .rknn and return the toolkit's object and the answer."""
    start = time.perf_counter()
    rknn = importlib.import_module("rknn.api").RKNN(verbose=False)
    calibration = request["calibration"]
    _checked(
        "config",
        rknn.config(
            mean_values=[request["mean"]],
            std_values=[request["std"]],
            target_platform=request["platform"],
        ),
    )
    _checked("load_onnx", rknn.load_onnx(model=request["onnx"]))
    dataset = None if calibration is None else _list_images(calibration)
    _checked("build", rknn.build(do_quantization=dataset is not None, dataset=dataset))
    _checked("export_rknn", rknn.export_rknn(request["rknn"]))
    build_s = time.perf_counter() - start
    _checked("init_runtime", rknn.init_runtime())
    return rknn, {"ok": True, "build_s": round(build_s, 3)}


def run(rknn: Any, image: Any) -> Any:
    """Return the logits (1, classes) of one image (1, H, W, C) in the simulator."""
    outputs = rknn.inference(inputs=[image], data_format=["nhwc"])
    if not outputs:
        raise ToolkitError("inference gave no output")
    return np.asarray(outputs[0], dtype=np.float32).reshape(1, -1)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more; an error is an answer too."""
    rknn = None
    while True:
        try:
            request, array = read_message(requests)
        except EOFError:
            return
        logits = None
        try:
            if request["do"] == "build":
                rknn, answer = build(request)
            elif rknn is None:
                raise ToolkitError("nothing was built before the first image")
            else:
                logits = run(rknn, array)
                answer = {"ok": True}
        except Exception as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(encode(answer, logits))
        answers.flush()


def main() -> int:
    """Answer on stdout; what anything else writes there, C libraries too, goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            serve(sys.stdin.buffer, answers)
        except BrokenPipeError:  # who asked is gone
            return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the toolkit's own tidying up at exit can hang or crash
