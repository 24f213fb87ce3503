"""8-bit and float convolutions side by side: each in what it is faster in on this machine.

An 8-bit convolution is not always the faster one: a depthwise one is bound by memory and pays for
the conversion of its results, one between float operators (squeeze-and-excite, h-swish) for two
passes over its tensors, the first for quantizing the image. Which ones, a layer profile of the
float and of the 8-bit engine says; what comes of it is measured as a whole, beside the 8-bit
engine, because neighbours share a conversion and a sum of layers is no time of a network.

Where 8 bits cost too much accuracy, the layers with the most noise (see `compare.worst_layers`) for
the time that they save go back to float, until the network passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from litezoo.models.errors import CheckFailed
from litezoo.recipes.devices import Device

from .compare import worst_layers
from .runtime import Array, BuildSource, Objective, Session
from .runtime_openvino import RUNTIME
from .to_int8 import convolutions

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Mixture", "find_mixture", "mixtures"]

#: A convolution that 8 bits make less than this much faster is tried in float as well: its
#: neighbours' conversions, which its own time does not hold, may cost more.
_NEARLY = 1.15
_NOISE_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A Q/DQ model with the names of its convolutions that stay float, and why, in a sentence."""

    proto: ModelProto
    keep_float: tuple[str, ...]
    said: str


def mixtures(float_ms: Mapping[str, float], int8_ms: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return which convolutions to try in float, by the times of each in float and in 8 bits.

    >>> mixtures({"a": 1.0, "b": 1.0, "c": 3.0}, {"a": 2.0, "b": 0.9, "c": 1.0})
    [('a',), ('a', 'b')]
    """
    known = [name for name in float_ms if name in int8_ms]
    sets = [
        tuple(name for name in known if float_ms[name] < gain * int8_ms[name])
        for gain in (1.0, _NEARLY)
    ]
    return [own for own in dict.fromkeys(sets) if own and len(own) < len(known)]


def find_mixture(
    fp32: ModelProto,
    int8: ModelProto,
    *,
    retype: Callable[[Collection[str]], ModelProto],
    accept: Callable[[ModelProto], bool],
    rank: Callable[[Mapping[str, Session], Array], Mapping[str, float]],
    images: Array,
    calibration: Array,
    device: Device,
    float_type: Literal["fp32", "bf16"] = "fp32",
    threads: int | None = None,
    objective: Objective = "latency",
    progress: Callable[[str], None] = lambda step: None,
) -> Mixture:
    """Return the fastest accepted mixture of 8-bit and float convolutions in OpenVINO.

    Args:
        fp32: the float32 model.
        int8: its form int8-u8, with every convolution in 8 bits.
        retype: makes that form anew with some convolutions, by name, in float.
        accept: whether a Q/DQ model is right enough.
        rank: measures sessions by label in one interleaved run: milliseconds a batch.
        images: the batch (N, C, H, W) that is timed.
        calibration: images (N, C, H, W) that layers' noise is measured on.
        device: the device, which is this machine.
        float_type: what the float convolutions compute in.
        threads: CPU threads (default: all cores).
        objective: what the engines are tuned for.
        progress: called with each step's name.

    Raises CheckFailed where int8 itself is the fastest or no mixture is accepted, MissingError
    where the CPU lacks the type.
    """
    precision = "int8-mixed" if float_type == "fp32" else "int8-mixed+bf16"
    with TemporaryDirectory() as folder:

        def build(label: str, proto: ModelProto, own: str) -> tuple[Path, ...]:
            form = RUNTIME.precisions[own]
            assert form is not None
            place = Path(folder) / label
            place.mkdir()
            file = place / "model.onnx"
            file.write_bytes(proto.SerializeToString())
            return RUNTIME.build(
                BuildSource(onnx={form: file}), device=device, precision=own, folder=place
            )

        def load(files: Sequence[Path]) -> Session:
            return RUNTIME.load(
                files, device=device, precision=precision, threads=threads, objective=objective
            )

        def layer_ms(files: Sequence[Path], own: str) -> dict[str, float]:
            return RUNTIME.layer_ms(
                files, images, device=device, precision=own, threads=threads, objective=objective
            )

        progress(f"{precision}: timing the layers in {float_type} and in int8")
        known = convolutions(fp32)
        float_ms = layer_ms(build("float", fp32, float_type), float_type)
        all_int8 = build("int8", int8, precision)
        int8_ms = layer_ms(all_int8, precision)
        tries = mixtures(
            *({name: own[name] for name in known if name in own} for own in (float_ms, int8_ms))
        )
        sessions: dict[str, Session] = {}
        made: dict[str, tuple[ModelProto, tuple[str, ...]]] = {}

        def add(keep: tuple[str, ...]) -> bool:
            label = f"{len(keep)} of {len(known)} convolutions in {float_type}"
            progress(f"{precision}: {label}")
            proto = retype(keep)
            if not accept(proto):
                return False
            made[label] = proto, keep
            sessions[label] = load(build(f"mixture{len(made)}", proto, precision))
            return True

        accepted = [add(keep) for keep in tries]
        if accept(int8):
            sessions["int8"] = load(all_int8)
        elif not any(accepted):
            saved = {name: float_ms.get(name, 0.0) - int8_ms.get(name, 0.0) for name in known}
            for keep in _noisiest_first(fp32, int8, calibration, saved, tries[:1]):
                if add(keep):
                    break
            else:
                raise CheckFailed(
                    f"no mixture with half of the {len(known)} convolutions in {float_type} is "
                    "right enough; take a float precision"
                )
        if not made:
            raise CheckFailed(
                "int8 is the best mixture here: it makes every convolution faster"
                if not tries
                else "no faster mixture than int8 is right enough"
            )
        progress(f"{precision}: measuring {len(sessions)} engines")
        times = rank(sessions, images)
    best = min(times, key=lambda label: times[label])
    if best == "int8":
        others = min(times[label] for label in made)
        raise CheckFailed(
            f"int8 is the best mixture here: of {len(made)} others the fastest takes "
            f"{others / times['int8']:.2f} of its time"
        )
    proto, keep = made[best]
    return Mixture(
        proto=proto, keep_float=keep,
        said=f"{precision}: {best}, which are faster so or too noisy in int8",
    )  # fmt: skip


def _noisiest_first(
    fp32: ModelProto,
    int8: ModelProto,
    calibration: Array,
    saved_ms: Mapping[str, float],
    start: Sequence[tuple[str, ...]],
) -> list[tuple[str, ...]]:
    """Return ever larger sets to keep in float, up to half of all: most noise per time saved first.

    Each holds `start`'s, which cost nothing.
    """
    free = start[0] if start else ()
    layers = worst_layers(fp32, int8, calibration[:_NOISE_IMAGES], most=len(saved_ms))
    least = 0.01 * max(
        sum(saved_ms.values()), 1e-3
    )  # ms; a layer that costs nothing is no free win
    worth = {
        layer.name: 10 ** (-layer.snr_db / 10) / max(saved_ms[layer.name], least)
        for layer in layers
        if layer.name not in free
    }
    order = sorted(worth, key=lambda name: -worth[name])
    room = min(len(saved_ms) // 2 - len(free), len(order))
    sizes = [size for i in range(room.bit_length()) if (size := 2**i) < room]
    return [(*free, *order[:size]) for size in (*sizes, room) if size > 0]
