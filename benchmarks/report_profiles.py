"""Profiles that the report draws: a roofline and the time of each layer, as small JSON files.

To profile a network takes seconds, and a page shows many: `litezoo profile MODEL --device D --save`
keeps what the page needs in benchmarks/results/profiles, a file for each network, device, precision
and input.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from litezoo.models.errors import MissingError
from litezoo.models.files import write_whole

from .draw_roofline import operations
from .graph import Kind
from .profiling import Profile
from .roofline import Bound
from .rows import STRICT, read_record, results_folder

__all__ = [
    "StoredLayer",
    "StoredProfile",
    "read_profile",
    "read_profiles",
    "save_profile",
    "stored_profile",
]

SCHEMA: Final = 1


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One kernel; `operations` are its FLOPs, or what a kernel without any is drawn at."""

    name: str
    module: str
    operators: str
    kind: Kind
    dtype: str
    out_shape: tuple[int, ...]
    macs: int
    operations: int
    memory_bytes: int
    us: float
    bound: Bound


@dataclass(frozen=True, kw_only=True)
class StoredProfile:
    """The content of benchmarks/results/profiles/<model>.<device>.<precision>.<N>x<C>x<H>x<W>.json.

    Peaks count 2 operations for a multiply-accumulate; `findings` are sentences, `sources` says of
    each ceiling where it is from, `note` that they are of another machine.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    model: str
    graph_form: str
    device: str
    precision: str
    batch: int
    resolution: tuple[int, int, int]
    params: int
    macs: int
    memory_bytes: int
    peak_tera_ops_per_s: Mapping[str, float]
    memory_gb_per_s: float
    launch_us: float | None
    sources: Mapping[str, str]
    note: str
    findings: tuple[str, ...]
    layers: tuple[StoredLayer, ...]
    schema: Literal[1] = SCHEMA

    @property
    def name(self) -> str:
        """Return the name of its file, without the ending."""
        size = "x".join(map(str, (self.batch, *self.resolution)))
        model = Path(self.model).stem if self.model.endswith(".onnx") else self.model
        return f"{model}.{self.device}.{self.precision}.{size}"


def stored_profile(profile: Profile) -> StoredProfile:
    """Return what is kept of a profile; MissingError where it has no times."""
    if profile.device is None:
        raise MissingError("a profile is kept with a device's times; name one: --device cpu")
    roof = profile.roof
    if not profile.times or roof is None or roof.memory_gb_per_s is None:
        raise MissingError(f"a profile is kept with the device's times; {profile.note}")
    return StoredProfile(
        model=profile.model,
        graph_form=profile.graph_form,
        device=profile.device,
        precision=profile.precision,
        batch=profile.batch,
        resolution=profile.resolution,
        params=profile.params,
        macs=profile.macs,
        memory_bytes=profile.fused.memory_bytes,
        peak_tera_ops_per_s=dict(roof.peak_tera_ops_per_s),
        memory_gb_per_s=roof.memory_gb_per_s,
        launch_us=roof.launch_us,
        sources=dict(roof.sources),
        note=profile.note,
        findings=tuple(f"{finding.rule}: {finding}" for finding in profile.findings),
        layers=tuple(
            StoredLayer(
                name=layer.name,
                module=layer.module,
                operators=" + ".join(layer.operators),
                kind=layer.kind,
                dtype=layer.dtype,
                out_shape=layer.out_shape,
                macs=layer.macs,
                operations=operations(layer),
                memory_bytes=layer.memory_bytes,
                us=round(1e3 * time.ms, 3),
                bound=time.bound,
            )
            for layer, time in zip(profile.layers, profile.times, strict=True)
        ),
    )


def save_profile(profile: Profile, *, folder: Path | None = None) -> Path:
    """Write a profile in the place of an older one of the same conditions; return the file.

    `folder` is benchmarks/results/profiles unless another is given. MissingError where the profile
    has no times.
    """
    stored = stored_profile(profile)
    file = (folder or results_folder() / "profiles") / f"{stored.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(stored)
    layers = ",\n".join(f"  {json.dumps(layer)}" for layer in values.pop("layers"))
    head = json.dumps(values, indent=1)
    return write_whole(file, f'{head[:-2]},\n "layers": [\n{layers}\n ]\n}}\n')


def read_profiles(folder: Path | None = None) -> list[StoredProfile]:
    """Return the kept profiles in the order of their files' names; none without the folder.

    A damaged file is a CheckFailed.
    """
    files = sorted((folder or results_folder() / "profiles").glob("*.json"))
    return [read_profile(file) for file in files]


def read_profile(file: Path) -> StoredProfile:
    """Return one kept profile; a damaged file is a CheckFailed."""
    command = "litezoo profile MODEL --device D --save"
    return read_record(file, StoredProfile, name="profile", command=command)
