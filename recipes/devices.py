"""Devices: one YAML file each, in recipes/devices/ or a folder named by LITEZOO_DEVICES.

A file's name is the device's name. A key that `Device` does not have, a value of the wrong type,
or a physical fact or limit without a source is refused with the file, the key and what is allowed.
An unknown fact is left out, never invented.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from litezoo.models.errors import MissingError, UsageError, unknown_name

__all__ = ["PATTERNS", "Batch", "Device", "Limits", "get_device", "list_devices", "load_device"]

_HERE = Path(__file__).parent / "devices"
_KINDS = ("cpu", "gpu", "npu")
_DTYPES = ("fp32", "tf32", "bf16", "fp16", "int8")
#: What an engine computes in; int8 with a second name says what its float parts are.
_PRECISIONS = (*_DTYPES, "int8+fp16", "int8+bf16", "int8-mixed", "int8-mixed+bf16")
_QUANTIZATIONS = ("per-tensor", "per-channel")
#: What a limit can name beside an ONNX operator: a group of nodes, however it is written.
PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "channel-shuffle": "channels transposed as a matrix, by a transpose or a gather",
        "depthwise-conv": "a convolution with one input channel a group",
        "grouped-conv": "a convolution in groups of several input channels",
        "hard-swish": "x * clip(x + 3, 0, 6) / 6, as one operator or in parts",
        "leaky-relu": "LeakyRelu or PRelu",
        "shuffle-5d": "channel shuffle through a tensor of five dimensions",
        "silu": "x * sigmoid(x), as one operator or in parts",
        "squeeze-excite": "x * gate(layers(mean of x)), a gate for each channel",
    }
)
#: Physical facts: each needs an entry of the same name in `sources`.
_PHYSICS = (
    "compute_capability",
    "peak_tera_ops_per_s",
    "sustained_tera_ops_per_s",
    "memory_gb_per_s",
    "memory_gib",
    "l2_cache_mib",
    "l3_cache_mib",
    "power_w",
    "units",
    "clock_ghz",
)
#: YAML's C parser where PyYAML has it: ten times as fast, and dozens of files are read at once.
_YamlLoader: typing.Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch sizes an engine is built for: smallest, the one it is tuned for, largest."""

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        """Refuse sizes out of order."""
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(f"batch needs 1 <= min <= opt <= max, not {dataclasses.asdict(self)}")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a device cannot run, or runs badly; `litezoo.export.limits` checks a graph against it.

    `forbidden` and `slow` map an ONNX operator ("HardSwish": only that operator) or one of
    `PATTERNS` ("hard-swish": the function in any writing) to the reason. `channel_multiple` is what
    a convolution's channels are padded to; `quantization` the finest scale of weights it has;
    `leaky_relu_slopes` the slopes it has; `weight_bits` (7 or 8) what an int8 weight may fill. What
    is unknown is left out.
    """

    forbidden: Mapping[str, str] = field(default_factory=dict)
    slow: Mapping[str, str] = field(default_factory=dict)
    channel_multiple: int | None = None
    opset_max: int | None = None
    static_shapes: bool = False
    quantization: str | None = None
    leaky_relu_slopes: tuple[float, ...] | None = None
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse what names nothing or cannot be."""
        for key in ("forbidden", "slow"):
            for rule, reason in getattr(self, key).items():
                if rule not in PATTERNS and not re.fullmatch("[A-Z][A-Za-z0-9]*", rule):
                    known = f"known: {', '.join(PATTERNS)}, or an ONNX operator such as HardSwish"
                    raise UsageError(f"limits.{key} has {rule!r}, which is no pattern ({known})")
                if not reason.strip():
                    raise UsageError(f"limits.{key}.{rule} needs its reason")
        if both := set(self.forbidden) & set(self.slow):
            raise UsageError(f"limits has {min(both)} as forbidden and as slow; choose one")
        for key in ("channel_multiple", "opset_max"):
            if (number := getattr(self, key)) is not None and number < 1:
                raise UsageError(f"limits.{key} is {number}; it is a whole number above 0")
        if self.quantization not in (None, *_QUANTIZATIONS):
            allowed = ", ".join(_QUANTIZATIONS)
            raise UsageError(
                f"limits.quantization has {self.quantization!r}, allowed are {allowed}"
            )
        if self.weight_bits not in (None, 7, 8):
            raise UsageError(f"limits.weight_bits is {self.weight_bits}, allowed are 7 and 8")
        slopes = self.leaky_relu_slopes
        if slopes is not None and not (slopes and all(0 <= s < math.inf for s in slopes)):
            raise UsageError(
                f"limits.leaky_relu_slopes is {list(slopes)}; it lists slopes from 0 up (forbid "
                "leaky-relu where there are none)"
            )

    def given(self) -> tuple[str, ...]:
        """Return the names of the limits that are set."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name))


@dataclass(frozen=True, kw_only=True)
class Device:
    """One target chip and what runs on it.

    `peak_tera_ops_per_s` is dense arithmetic (2 per multiply-accumulate) by dtype, of all `units`
    together: the multiprocessors, or the cores of one kind, that share one kernel. What a chip
    keeps up in networks, by its power limit or because sums are of float32, is
    `sustained_tera_ops_per_s` where that differs. `clock_ghz` is the highest of the units;
    chips of one architecture share a `generation`. `precisions` are what export offers, the best
    first; `toolchain` maps a package to the versions that serve this device. `runtimes` are empty
    where litezoo builds nothing for the chip: times are then published or predicted ones.
    """

    name: str
    title: str
    kind: str
    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    batch: Batch = Batch()
    compute_capability: str | None = None
    generation: str | None = None
    units: int | None = None
    clock_ghz: float | None = None
    peak_tera_ops_per_s: Mapping[str, float] = field(default_factory=dict)
    sustained_tera_ops_per_s: Mapping[str, float] = field(default_factory=dict)
    memory_gb_per_s: float | None = None
    memory_gib: float | None = None
    l2_cache_mib: float | None = None
    l3_cache_mib: float | None = None
    power_w: float | None = None
    workspace_mib: int = 1024
    toolchain: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    notes: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        for key, values, allowed in (
            ("kind", (self.kind,), _KINDS),
            ("precisions", self.precisions, _PRECISIONS),
            ("peak_tera_ops_per_s", self.peak_tera_ops_per_s, _DTYPES),
            ("sustained_tera_ops_per_s", self.sustained_tera_ops_per_s, _DTYPES),
        ):
            for value in values:
                if value not in allowed:
                    raise UsageError(f"{key} has {value!r}, allowed are {', '.join(allowed)}")
        if not self.precisions:
            raise UsageError("precisions need at least one entry")
        if self.generation is not None and not re.fullmatch(
            "[a-z0-9]+(-[a-z0-9]+)*", self.generation
        ):
            raise UsageError(
                f"generation is {self.generation!r}; it is a slug such as ampere or cortex-a76"
            )
        for key in _PHYSICS:
            value = getattr(self, key)
            if value in (None, {}):
                continue
            if key not in self.sources:
                raise UsageError(f"{key} is given without a source; add sources: {key}: ...")
            numbers = value.values() if isinstance(value, Mapping) else (value,)
            if any(isinstance(n, (int, float)) and not 0 < n < math.inf for n in numbers):
                raise UsageError(f"{key} is {value}; a physical fact is a number above 0")
        for key in self.limits.given():
            if f"limits.{key}" not in self.sources:
                raise UsageError(
                    f"limits.{key} is given without a source; add sources: limits.{key}: ..."
                )

    def need_runtime(self) -> None:
        """Raise a MissingError that says what to type instead where litezoo has no runtime.

        >>> get_device("hailo-8").need_runtime()
        Traceback (most recent call last):
        litezoo.models.errors.MissingError: litezoo has no runtime for hailo-8 (Hailo-8): its \
vendor's compiler builds for it; for checked static ONNX files to give to one: litezoo export \
MODEL --device npu-int8
        """
        if not self.runtimes:
            raise MissingError(
                f"litezoo has no runtime for {self.name} ({self.title}): its vendor's compiler "
                "builds for it; for checked static ONNX files to give to one: litezoo export MODEL "
                "--device npu-int8"
            )

    def select_precisions(self, precision: str) -> tuple[str, ...]:
        """Return the precisions to export for a request, "auto" being all the device has.

        >>> get_device("t4").select_precisions("bf16")
        Traceback (most recent call last):
        litezoo.models.errors.UsageError: t4 has no bf16; it has int8+fp16, fp16, fp32
        """
        if precision == "auto":
            return self.precisions
        if precision not in self.precisions:
            raise UsageError(f"{self.name} has no {precision}; it has {', '.join(self.precisions)}")
        return (precision,)


def _folders() -> list[Path]:
    extra = [Path(p) for p in os.environ.get("LITEZOO_DEVICES", "").split(os.pathsep) if p]
    for folder in extra:
        if not folder.is_dir():
            raise UsageError(f"LITEZOO_DEVICES names {folder}, which is no folder")
    return [*extra, _HERE]


class _UniqueKeys(_YamlLoader):  # type: ignore[misc]
    """YAML in which a key given twice is a mistake, not the last one's victory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"the key {key} is given twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def list_devices() -> list[str]:
    """Return the names of all devices, of LITEZOO_DEVICES first."""
    names = [file.stem for folder in _folders() for file in sorted(folder.glob("*.yaml"))]
    return list(dict.fromkeys(names))


def get_device(name: str) -> Device:
    """Look up a device by name.

    >>> get_device("t44")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    litezoo.models.errors.UsageError: unknown device 't44'; did you mean 't4'? (see: litezoo ...)
    """
    for folder in _folders():
        if (folder / f"{name}.yaml").is_file():
            return load_device(folder / f"{name}.yaml")
    raise unknown_name("device", name, list_devices(), see="litezoo devices")


def load_device(file: Path) -> Device:
    """Load one device file; every mistake in it is a UsageError that names file and key."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds no keys; see recipes/devices/t4.yaml for the form")
    if "name" in values:
        raise UsageError(f"{file}: name is the file's own name; leave it out")
    try:
        device: Device = _build(Device, {"name": file.stem, **values})
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    return device


def _build(cls: typing.Any, values: Mapping[str, object]) -> typing.Any:
    """Build a dataclass from a mapping, checking every key and type."""
    hints = _type_hints(cls)
    for key in values:
        if key not in hints:
            raise UsageError(str(unknown_name("key", str(key), hints)))
    required = {f.name for f in dataclasses.fields(cls) if _is_required(f)}
    if missing := sorted(required - set(values)):
        wanted = ", ".join(sorted(required - {"name"}))
        raise UsageError(f"{missing[0]} is missing; required are {wanted}")
    return cls(**{key: _convert(key, hints[key], value) for key, value in values.items()})


@functools.cache
def _type_hints(cls: typing.Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _is_required(entry: dataclasses.Field[typing.Any]) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _convert(key: str, hint: typing.Any, value: object) -> object:
    """Return `value` as the type `hint`, or say which type the key takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value)
    if origin is types.UnionType:
        return _convert(key, arguments[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(key, arguments[0], item) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return MappingProxyType(
            {str(k): _convert(f"{key}.{k}", arguments[1], v) for k, v in value.items()}
        )
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    wanted = {tuple: "a list", Mapping: "a mapping"}.get(origin) or getattr(hint, "__name__", hint)
    unit = (
        ""
        if "_per_s" not in key and not key.endswith(("_w", "_gib", "_mib", "_ghz"))
        else (" without a unit (the unit is in the key)")
    )
    raise UsageError(f"{key} takes {wanted}{unit}, not {value!r}")
