"""Ceilings of a device and the least time under them: the roofline model (Williams et al., 2009).

A kernel can be no faster than its arithmetic at the peak rate of what it computes in, than its
bytes at the memory's rate, nor than it takes to launch it:

    ms = max(2 * MACs / peak, bytes / bandwidth, launch)

These are lower bounds: no chip reaches its peaks in every kernel, and none of a network's layers
overlap here. Ceilings that `litezoo ceilings` measured on a device count before those that its
file states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from litezoo.recipes.devices import Device

from .graph import Layer

__all__ = ["Bound", "LayerTime", "Roof", "read_roof", "why_no_times"]

Bound = Literal["compute", "memory", "launch"]
#: NVIDIA GPUs have tensor cores from this compute capability on.
_TENSOR_CORES = (7, 0)


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """The least time of one kernel under each ceiling, 0 where one does not matter."""

    compute_ms: float
    memory_ms: float
    launch_ms: float

    @property
    def ms(self) -> float:
        """The least time under all ceilings."""
        return max(self.compute_ms, self.memory_ms, self.launch_ms)

    @property
    def bound(self) -> Bound:
        """Which ceiling binds."""
        if self.launch_ms > max(self.compute_ms, self.memory_ms):
            return "launch"
        return "compute" if self.compute_ms > self.memory_ms else "memory"


@dataclass(frozen=True, kw_only=True)
class Roof:
    """A device's ceilings; peaks count 2 for each multiply-accumulate.

    `launch_us` is what a kernel takes besides its work. `has_tensor_cores`: the peaks are of matrix
    products, which a depthwise convolution is not. `sources` says of each fact where it is from;
    `note` that they are of another machine.
    """

    device: str
    peak_tera_ops_per_s: Mapping[str, float]
    memory_gb_per_s: float | None
    launch_us: float | None
    has_tensor_cores: bool
    sources: Mapping[str, str]
    note: str = ""

    def peak(self, layer: Layer) -> float | None:
        """Return the peak that holds for a layer, None where it is not known.

        A depthwise convolution is no matrix product: tensor cores do not compute it, and its
        ceiling is float32's, whatever it computes in.
        """
        dtype = layer.dtype
        if layer.kind == "depthwise" and self.has_tensor_cores:
            dtype = "fp32"
        return self.peak_tera_ops_per_s.get(dtype)

    def unknown(self, layers: Iterable[Layer]) -> tuple[str, ...]:
        """Return the names of the facts that the layers' times need and that are not known."""
        names = [] if self.memory_gb_per_s is not None else ["memory_gb_per_s"]
        names += [
            f"peak_tera_ops_per_s.{layer.dtype}"
            for layer in layers
            if layer.macs and self.peak(layer) is None
        ]
        return tuple(dict.fromkeys(names))

    def time(
        self,
        layer: Layer,
        *,
        macs: float | None = None,
        memory_bytes: float | None = None,
        peak: float | None = None,
    ) -> LayerTime:
        """Return a layer's least time, also with other work, bytes or peak (in tera operations).

        All that is needed has to be known: see `unknown`.
        """
        macs = layer.macs if macs is None else macs
        moved = layer.memory_bytes if memory_bytes is None else memory_bytes
        rate = self.peak(layer) if peak is None else peak
        assert self.memory_gb_per_s is not None and (rate is not None or not macs)
        return LayerTime(
            compute_ms=2e-9 * macs / rate if macs and rate else 0.0,
            memory_ms=1e-6 * moved / self.memory_gb_per_s,
            launch_ms=1e-3 * (self.launch_us or 0.0),
        )


def read_roof(device: Device) -> Roof:
    """Return what is known of a device: measured where it is, else as its file states.

    CheckFailed for a damaged file of measured ceilings.
    """
    from .ceilings import ceilings_file, read_ceilings

    stated = f"stated ({device.name}.yaml)"
    peaks, memory, launch = dict(device.peak_tera_ops_per_s), device.memory_gb_per_s, None
    sources = {f"peak_tera_ops_per_s.{dtype}": stated for dtype in peaks}
    if memory is not None:
        sources["memory_gb_per_s"] = stated
    note = ""
    if (measured := read_ceilings(device.name)) is not None:
        where = f"measured ({ceilings_file(device.name)})"
        peaks |= measured.peak_tera_ops_per_s
        memory, note = measured.memory_gb_per_s, measured.elsewhere() or ""
        sources |= dict.fromkeys(
            (
                *(f"peak_tera_ops_per_s.{d}" for d in measured.peak_tera_ops_per_s),
                "memory_gb_per_s",
            ),
            where,
        )
        if measured.layer_us:
            library = min(measured.layer_us, key=lambda one: measured.layer_us[one])
            launch = measured.layer_us[library] or None
            sources["launch_us"] = f"{where}: what a further layer takes in {library}"
    capability = tuple(int(part) for part in (device.compute_capability or "0.0").split("."))
    return Roof(
        device=device.name,
        peak_tera_ops_per_s=peaks,
        memory_gb_per_s=memory,
        launch_us=launch,
        has_tensor_cores=device.kind == "gpu" and capability >= _TENSOR_CORES,
        sources=sources,
        note=note,
    )


def why_no_times(layers: Sequence[Layer], roof: Roof) -> str | None:
    """Return in a sentence which facts are missing for times and what to type; None if none are."""
    if not (unknown := roof.unknown(layers)):
        return None
    first = unknown[0].removeprefix("peak_tera_ops_per_s.")
    known = [f"peak_tera_ops_per_s.{dtype}" for dtype in roof.peak_tera_ops_per_s]
    known += ["memory_gb_per_s"] if roof.memory_gb_per_s is not None else []
    other = ""
    if unknown[0] != first and roof.peak_tera_ops_per_s:
        other = " or choose another --precision;"
    return (
        f"no times: {' and '.join(unknown)} of {roof.device} "
        f"{'is' if len(unknown) == 1 else 'are'} not known (known: {', '.join(known) or 'nothing'})"
        f";{other} measure them there: litezoo ceilings --device {roof.device}"
    )
