"""GPU-Util next to what it hides: five pieces of work that all look busy.

=========== ===============================================================================
one-block   softmax of one long row: a kernel that PyTorch runs in a single block
light-eager MobileNetV2, batch 1, eager: every small kernel is launched by the host
light-graph the same as one CUDA graph: no gap between kernels, and none of them fills the GPU
heavy-batch RepVGG-A0, a large batch, as one CUDA graph: dense convolutions over all of the GPU
gemm        a matrix product of 8192: what the tensor cores are for
=========== ===============================================================================

GPU-Util reads about 100 % for all but perhaps the second. `litezoo bench --gpu-truth` runs them
for some seconds each and prints GPU-Util beside the counters of `gpu_counters`. Random weights and
noise: they cost the same time.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from litezoo.models.errors import MissingError, UsageError, require, unknown_name
from litezoo.models.files import write_whole
from litezoo.recipes.devices import Device, get_device

from .gpu_counters import (
    Achieved,
    GpuCounters,
    KernelProfile,
    Work,
    achieve,
    explain,
    find_device,
    profile_kernels,
    watch_gpu,
)
from .machine import Machine, read_machine
from .rows import STRICT, Store

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "CASES",
    "COLUMNS",
    "Case",
    "Truth",
    "append_truth",
    "columns_of",
    "count_work",
    "keep_busy",
    "measure_truth",
    "percents_of",
    "read_truth",
    "write_picture",
]

PROTOCOL = "gpu-truth-1"
SCHEMA = 1
WARMUP_S = 1.5  # clocks, cuDNN's choices, and GPU-Util's look back
CHUNK_S = 0.02  # runs that are launched before the host looks again
_RUNS_BEFORE_CAPTURE = 2
#: What each case shows.
CASES: Mapping[str, str] = {
    "one-block": "softmax of one row of 4 million numbers: one block",
    "light-eager": "mobilenetv2_100, batch 1, fp16, eager",
    "light-graph": "mobilenetv2_100, batch 1, fp16, one CUDA graph",
    "heavy-batch": "repvgg_a0 fused, batch 256, fp16, one CUDA graph",
    "gemm": "matrix product 8192 x 8192 x 8192, fp16",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Work that can be repeated: `run` starts it on the GPU and need not wait for it.

    `flops` and `moved_bytes` are of one run (`count_work`), `images` its batch, 0 for no network.
    """

    name: str
    precision: str
    images: int
    run: Callable[[], object]
    flops: float
    moved_bytes: float


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One row: what a GPU's counters say while a case keeps it busy, and what that comes to.

    `device` is the device file whose peaks are meant, "" without one; `runs` were done in
    `counters.seconds`; `sentences` are `explain`'s.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    case: str
    what: str
    device: str
    precision: str
    images_per_run: int
    runs: int
    counters: GpuCounters
    achieved: Achieved
    kernels: KernelProfile
    sentences: tuple[str, ...]
    machine: Machine
    protocol: str
    date: str
    schema: int = SCHEMA


_STORE = Store(
    row=Truth,
    name="row of GPU truth",
    file_name="results",
    command="litezoo bench --gpu-truth",
    schemas=(SCHEMA,),
)


# ------------------------------------------------------------------------------- cases


def count_work(run: Callable[[], object]) -> tuple[float, float]:
    """Return the flops and the bytes moved of one eager run, by operator.

    Flops are 2 for each multiply-accumulate of convolutions and matrix products; bytes are every
    operator's inputs and outputs, a view's none.
    """
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    class Bytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        total = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            """Run an operator and add up its tensors."""
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                read = {name: value for name, value in (kwargs or {}).items() if name != "out"}
                leaves = tree_leaves((args, read, result))
                self.total += sum(
                    leaf.numel() * leaf.element_size()
                    for leaf in leaves
                    if isinstance(leaf, Tensor)
                )
            return result

    moved = Bytes()  # type: ignore[no-untyped-call]
    with FlopCounterMode(display=False) as flops, moved:
        run()
    return float(flops.get_total_flops()), float(moved.total)


def _make_case(name: str, place: torch.device) -> Case:
    """Build a case on a GPU."""
    import torch

    half = torch.float16
    if name == "one-block":
        row = torch.zeros(4 << 20, device=place)
        return _case(name, "fp32", 0, lambda: torch.softmax(row, 0))
    if name == "gemm":
        left = torch.randn(8192, 8192, device=place, dtype=half)
        right, product = torch.randn_like(left), torch.empty_like(left)
        return _case(name, "fp16", 0, lambda: torch.mm(left, right, out=product))
    model, batch = ("repvgg_a0", 256) if name == "heavy-batch" else ("mobilenetv2_100", 1)
    run = _network(model, batch=batch, resolution=224, place=place, dtype=half)
    case = _case(name, "fp16", batch, run)
    return case if name == "light-eager" else dataclasses.replace(case, run=_captured(run))


def _case(name: str, precision: str, images: int, run: Callable[[], object]) -> Case:
    import torch

    with torch.inference_mode():
        flops, moved_bytes = count_work(run)
    return Case(
        name=name, precision=precision, images=images, run=run, flops=flops, moved_bytes=moved_bytes
    )


def _network(
    model: str, *, batch: int, resolution: int, place: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Return a run of a fused network on noise, channels last."""
    import torch

    from litezoo.models.create import create_model
    from litezoo.models.fuse import fuse

    network: nn.Module = fuse(create_model(model).eval()).eval()
    network = network.to(place, dtype).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, resolution, resolution, device=place, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        return network(images)

    return run


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return a run as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_CAPTURE):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept  # the graph writes there

    return replay


# ------------------------------------------------------------------------------- measuring


def keep_busy(
    run: Callable[[], object],
    *,
    seconds: float,
    chunk: int,
    mark: Callable[[], Callable[[], object]],
) -> int:
    """Run for `seconds`, all of it done at the end; return how many runs that were.

    `mark` marks the place in the GPU's queue and returns what waits for it. The next `chunk` runs
    are queued before the last ones are waited for, so that the GPU never waits for the host's look.
    """
    if chunk < 1:
        raise UsageError(f"chunk is {chunk}; it is a number of runs, 1 or more")
    runs, waiting = 0, mark()
    end = time.perf_counter() + seconds
    while not runs or time.perf_counter() < end:
        for _ in range(chunk):
            run()
        runs += chunk
        waiting, last = mark(), waiting
        last()
    waiting()
    return runs


def _mark() -> Callable[[], object]:
    import torch

    # blocking, not spinning: the thread that reads counters needs the CPU, too
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def _check(cases: Sequence[str], seconds: float) -> None:
    for name in cases:
        if name not in CASES:
            raise unknown_name("case", name, CASES)
    if not seconds >= 2:
        raise UsageError(f"seconds is {seconds:g}; GPU-Util and energy need 2 or more for a case")


def _check_gpu() -> None:
    """Say in one sentence what is missing here."""
    import torch

    if torch.version.cuda is None:
        raise MissingError(
            "showing what GPU-Util hides needs an NVIDIA GPU, and this PyTorch is built without "
            "CUDA; run `litezoo bench --gpu-truth` where torch.cuda.is_available() is true"
        )
    if not torch.cuda.is_available():
        raise MissingError(
            "showing what GPU-Util hides needs an NVIDIA GPU that PyTorch can use, and there is "
            "none here; run `litezoo bench --gpu-truth` on a machine with one"
        )


def measure_truth(
    *,
    gpu: int = 0,
    device: str | None = None,
    cases: Sequence[str] = tuple(CASES),
    seconds: float = 4.0,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Truth]:
    """Run each case for `seconds` on CUDA's GPU number `gpu` and return a row for each.

    `device` names the file whose peaks are meant (default: by the GPU's name). MissingError on a
    machine without an NVIDIA GPU.
    """
    _check(cases, seconds)
    chosen = None if device is None else get_device(device)
    _check_gpu()
    require("pynvml", purpose="reading a GPU's counters", extra="gpu")
    import torch

    if not 0 <= gpu < torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f"there is no GPU {gpu}; PyTorch numbers them 0 to {count - 1}")
    place = torch.device("cuda", gpu)
    uuid = str(torch.cuda.get_device_properties(place).uuid)
    chosen = chosen or find_device(torch.cuda.get_device_name(place))
    machine = read_machine({"cuda": str(torch.version.cuda)})
    rows = []
    with torch.cuda.device(place), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for name in cases:
            progress(f"{name}: {CASES[name]}")
            case = _make_case(name, place)
            with torch.inference_mode():
                rows.append(
                    _measure(case, uuid=uuid, device=chosen, seconds=seconds, machine=machine)
                )
            del case
            torch.cuda.empty_cache()
    return rows


def _measure(
    case: Case, *, uuid: str, device: Device | None, seconds: float, machine: Machine
) -> Truth:
    start = time.perf_counter()
    warm = keep_busy(case.run, seconds=WARMUP_S, chunk=1, mark=_mark)
    chunk = max(1, round(CHUNK_S * warm / (time.perf_counter() - start)))
    with watch_gpu(uuid) as watch:
        runs = keep_busy(case.run, seconds=seconds, chunk=chunk, mark=_mark)
    kernels = profile_kernels(case.run)
    return make_row(
        case, runs=runs, counters=watch.counters, kernels=kernels, device=device, machine=machine
    )


def make_row(
    case: Case,
    *,
    runs: int,
    counters: GpuCounters,
    kernels: KernelProfile,
    device: Device | None,
    machine: Machine,
) -> Truth:
    """Return the row of a case that ran `runs` times while `counters` were read."""
    work = Work(
        images=case.images * runs,
        precision=case.precision,
        flops=case.flops * runs,
        moved_bytes=case.moved_bytes * runs,
    )
    return Truth(
        case=case.name,
        what=CASES[case.name],
        device=device.name if device else "",
        precision=case.precision,
        images_per_run=case.images,
        runs=runs,
        counters=counters,
        achieved=achieve(counters, work, device=device),
        kernels=kernels,
        sentences=tuple(explain(counters, work=work, device=device, kernels=kernels)),
        machine=machine,
        protocol=PROTOCOL,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


# ------------------------------------------------------------------------------- showing

COLUMNS = (
    "case", "GPU-Util %", "SM active %", "warps %", "tensor %", "DRAM %", "TFLOP/s", "of peak %",
    "W", "mJ/image", "kernels", "blocks reach %",
)  # fmt: skip


def columns_of(row: Truth) -> tuple[str, ...]:
    """Return a row as text in the order of `COLUMNS`; "-" where the GPU has no counter."""
    c, a, k = row.counters, row.achieved, row.kernels
    values = (
        c.gpu_util_percent if c.gpu_util_percent is not None else c.engine_active_percent,
        c.sm_active_percent, c.sm_occupancy_percent, c.tensor_active_percent,
        c.dram_active_percent, a.tera_flops_per_s, a.flops_percent, c.power_w,
        a.energy_mj_per_image, k.kernels_per_run, k.sm_reach_percent,
    )  # fmt: skip
    return (row.case, *("-" if v is None else f"{v:.3g}" if v < 100 else f"{v:.0f}"
                        for v in values))  # fmt: skip


def percents_of(row: Truth) -> dict[str, float | None]:
    """Return the bars of a row by name, in percent; None for what the GPU does not tell."""
    return {
        "GPU-Util": row.counters.gpu_util_percent,
        "engine active (GPM)": row.counters.engine_active_percent,
        "SM active": row.counters.sm_active_percent,
        "SMs that blocks reach": row.kernels.sm_reach_percent,
        "tensor cores active": row.counters.tensor_active_percent,
        "DRAM bandwidth": row.counters.dram_active_percent,
        "FLOP/s of peak": row.achieved.flops_percent,
    }


def write_picture(rows: Iterable[Truth], file: Path) -> Path:
    """Draw the rows of one GPU as bars, one page that needs no network; return its path."""
    require("plotly", purpose="the picture", extra="report")
    import plotly.graph_objects as go

    shown = list(rows)
    if not shown:
        raise UsageError("there is nothing to draw; measure first: litezoo bench --gpu-truth")
    figure = go.Figure()
    for name in percents_of(shown[0]):
        values = [percents_of(row)[name] for row in shown]
        if any(value is not None for value in values):
            figure.add_bar(
                name=name,
                x=[f"{row.case}<br>{row.precision}" for row in shown],
                y=values,
                text=["" if value is None else f"{value:.3g}" for value in values],
                hovertext=["<br>".join(row.sentences) for row in shown],
            )
    gpu = shown[0].counters.gpu
    figure.update_layout(
        title=f"{gpu}: GPU-Util and what it hides",
        yaxis={"title": "percent", "range": [0, 105]},
        barmode="group",
        template="plotly_white",
        height=460,
    )
    return write_whole(file, figure.to_html(include_plotlyjs=True))


# ------------------------------------------------------------------------------- rows


def append_truth(rows: Sequence[Truth], folder: Path) -> Path:
    """Append rows to <device>.jsonl in `folder`, each line whole; return the file.

    Without a device file the file is named after the GPU.
    """
    if not rows:
        raise UsageError("there is nothing to append; measure first: litezoo bench --gpu-truth")
    slug = re.sub("[^a-z0-9]+", "-", rows[0].counters.gpu.lower()).strip("-")
    return _STORE.append(rows, folder / f"{rows[0].device or slug}.jsonl")


def read_truth(file: Path) -> list[Truth]:
    """Read rows; a damaged line is a CheckFailed with file and line number."""
    return _STORE.read([file])
