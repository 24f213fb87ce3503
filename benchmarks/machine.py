"""The record of the machine that every result carries."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from litezoo.models.errors import require

__all__ = ["Machine", "read_machine"]

#: Instruction sets that decide how fast a CPU runs a network.
_ISA = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
#: Packages whose versions decide on a time; either name of ONNX Runtime's.
_PACKAGES = (
    "litezoo", "torch", "torchvision", "timm", "onnxruntime", "onnxruntime-gpu", "openvino", "ncnn",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a number depends on besides the network; "unknown" where the system does not say.

    `governor` is cpufreq's policy, `load_1min` the system's load average before measuring.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    governor: str
    memory_gib: float
    system: str
    load_1min: float
    versions: Mapping[str, str] = field(default_factory=dict)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def usable_cpus() -> list[int]:
    """Return the CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def read_machine(packages: Mapping[str, str] | None = None) -> Machine:
    """Describe this machine; `packages` adds versions to Python's and torch's."""
    psutil = require("psutil", purpose="measuring", extra="cpu")
    cpuinfo = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package.removesuffix("-gpu")] = version(package)
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return Machine(
        cpu=name[1] if name else platform.processor() or platform.machine() or "unknown",
        cores=len(usable_cpus()),
        isa=tuple(flag for flag in _ISA if flag in have),
        governor=governor or "unknown",
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        load_1min=round(psutil.getloadavg()[0], 2),
        versions={**versions, **(packages or {})},
    )
