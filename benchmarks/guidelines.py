"""The design rules, measured on this chip: does a claim of the literature hold here?

Each rule (`design_rules`) compares small networks at equal or known MACs. All networks of an
experiment, and a second copy of one of them, run in the interleaved protocol of `measure`, several
times over, minutes apart. Of every round the quotient of two networks' block medians is taken; the
measure is the median of these quotients, its interval the 95 % bootstrap over rounds.

A difference has to be larger than the machine's own noise: within the band it is none. The band is
what this protocol was found to tell on a shared 2-core machine (2026-11: 2 to 6 % on one pinned
thread; on two, less than 15 % meant nothing), or what the copy differs from the network itself, the
control, if that is more. With t the rule's threshold and b the band:

    holds            the whole interval is above t * (1 + b)
    does not hold    the whole interval is below t / (1 + b): the opposite is so
    no difference    else

A verdict is `close` while a border lies within its interval: then the experiment is measured again,
up to twice as often, and what is still close may come out otherwise in the next run.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from litezoo.export.runtime import Array, BuildSource, Runtime, Session, get_runtime
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.recipes.devices import Device, get_device

from .machine import Machine, read_machine
from .measure import PROTOCOL, Timed, check_conditions, interleave, interval
from .rows import STRICT, Store, newest, results_folder

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from .design_rules import Per, Rule, Variant

__all__ = [
    "EAGER",
    "Agreement",
    "Guideline",
    "Guidelines",
    "VariantCost",
    "append_guidelines",
    "compare_runs",
    "find_turn",
    "guidelines_file",
    "judge",
    "latest_guidelines",
    "measure_guidelines",
    "noise_band",
    "ratio_interval",
    "read_guidelines",
]

SCHEMA = 1
#: PyTorch without an engine, beside the runtimes of `litezoo.export`.
EAGER = "pytorch-eager"
Verdict = Literal["holds", "does not hold", "no difference"]
#: Relative differences that are noise: on one pinned thread (and a GPU), on more.
NOISE_ONE_THREAD, NOISE_THREADS = 0.06, 0.15
PASSES, QUICK_PASSES = 3, 1
_RESAMPLES, _CONFIDENCE_PERCENT = 2000, 95
_CONTROL = "the same again"
#: Images that an int8 form is calibrated on; noise, as the networks are.
_CALIBRATION_IMAGES = 8

Medians = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class VariantCost:
    """One network: its median block in ms, and its cost over that of the rule's fast one.

    `low` and `high` are the interval of `ratio`; `x` and `series` place it on the drawing.
    """

    name: str
    macs: int
    ms: float
    ratio: float
    low: float
    high: float
    x: float | None = None
    series: str = ""


@dataclass(frozen=True, kw_only=True)
class Guideline:
    """One row of benchmarks/results/guidelines/<device>.jsonl: a rule's verdict and why.

    `ratio` is the cost of `slow` over that of `fast` (`per` time or MAC), `control` the largest
    relative difference that the interval of a network against its own copy allows, `finding` the
    result in a sentence.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = STRICT

    rule: str
    claim: str
    source: str
    device: str
    runtime: str
    precision: str
    batch: int
    threads: int
    quick: bool
    slow: str
    fast: str
    per: str
    ratio: float
    low: float
    high: float
    threshold: float
    band: float
    control: float
    verdict: Verdict
    close: bool
    finding: str
    variants: tuple[VariantCost, ...]
    rounds: int
    machine: Machine
    protocol: str
    date: str
    schema: int = SCHEMA

    @property
    def conditions(self) -> tuple[object, ...]:
        """What has to be the same for two rows to be of the same question."""
        return (
            self.rule, self.device, self.machine.cpu, self.machine.versions.get("gpu"),
            self.runtime, self.precision, self.batch, self.threads, self.quick,
        )  # fmt: skip


_STORE = Store(
    row=Guideline,
    name="guideline row",
    file_name="guidelines",
    command="litezoo guidelines",
    schemas=(SCHEMA,),
)


@dataclass(frozen=True, kw_only=True)
class Guidelines:
    """One run: a row for each rule that was measured, and why the experiments `left_out` were not.

    Left out is an experiment of which a runtime refuses a network, or computes something else.
    """

    rows: tuple[Guideline, ...]
    left_out: Mapping[str, str]


# ---------------------------------------------------------------------------------- statistics


def ratio_interval(slow: Medians, fast: Medians, *, seed: int = 0) -> tuple[float, float, float]:
    """Return the median of slow / fast over rounds, and its 95 % interval by bootstrap.

    Both are the block medians (rounds,) of two networks in the same rounds.
    """
    quotients = slow / fast
    low, high = interval(
        lambda drawn: np.median(quotients[drawn], axis=1), len(quotients), seed=seed
    )
    return float(np.median(quotients)), low, high


def noise_band(control: float, *, threads: int) -> float:
    """Return the relative difference that is noise; `control` is what a copy differs at most."""
    return max(NOISE_ONE_THREAD if threads == 1 else NOISE_THREADS, control)


def judge(low: float, high: float, *, threshold: float, band: float) -> tuple[Verdict, bool]:
    """Return the verdict on an interval, and whether it is close to another one.

    >>> judge(1.3, 1.4, threshold=1.0, band=0.06), judge(0.98, 1.02, threshold=1.0, band=0.06)
    (('holds', False), ('no difference', False))
    """
    above, below = threshold * (1 + band), threshold / (1 + band)
    close = low <= above <= high or low <= below <= high
    if low > above:
        return "holds", close
    if high < below:
        return "does not hold", close
    return "no difference", close


def find_turn(points: Sequence[tuple[float, float]], *, band: float) -> str:
    """Return at which widths the fast network of `pairs` is faster: points (x, slow / fast).

    >>> find_turn([(16, 0.8), (32, 1.4), (64, 3.0)], band=0.06)
    'faster from 32 on'
    """
    ordered = sorted(points)
    faster = [ratio > 1 + band for _, ratio in ordered]
    names = [f"{x:g}" for x, _ in ordered]
    if all(faster):
        return f"faster at every width from {names[0]} to {names[-1]}"
    if not any(faster):
        return f"faster at no width from {names[0]} to {names[-1]}"
    count = sum(faster)
    if all(faster[-count:]):
        return f"faster from {names[-count]} on"
    if all(faster[:count]):
        return f"faster up to {names[count - 1]}"
    return (
        f"faster at {', '.join(n for n, is_faster in zip(names, faster, strict=True) if is_faster)}"
    )


# ------------------------------------------------------------------------------------- sessions


@dataclass(kw_only=True)
class _Experiment:
    """The loaded networks of rules that are measured together, and the block medians so far.

    `medians` is (networks, rounds), the last network being the control.
    """

    name: str
    rules: list[Rule]
    variants: list[Variant]
    macs: dict[str, int]
    runs: list[tuple[str, Session, Array]]
    control_of: str
    medians: Medians = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, found: Sequence[Timed]) -> None:
        """Take the blocks of one more interleaved run."""
        medians = np.array([own.medians for own in found])
        self.medians = np.hstack([self.medians, medians]) if self.medians.size else medians

    def of(self, name: str) -> Medians:
        """Return the block medians of a variant."""
        own: Medians = self.medians[[variant.name for variant in self.variants].index(name)]
        return own

    def control(self) -> float:
        """Return the largest difference between a network and its copy that cannot be excluded."""
        _, low, high = ratio_interval(self.medians[-1], self.of(self.control_of))
        return max(high, 1 / low) - 1


def _choose_runtime(device: Device, name: str | None, precision: str) -> str:
    """Return the runtime to measure with; MissingError where it, or every one, cannot run here."""
    if name == EAGER:
        return name
    if name is not None:
        runtime = get_runtime(name)
        _check_precision(runtime, precision)
        if (reason := runtime.missing(device)) is not None:
            raise MissingError(reason)
        return name
    device.need_runtime()
    reasons = []
    for candidate in device.runtimes:
        runtime = get_runtime(candidate)
        if precision not in runtime.precisions:
            reasons.append(f"{candidate} has no {precision}")
        elif (reason := runtime.missing(device)) is not None:
            reasons.append(reason)
        else:
            return candidate
    raise MissingError(
        f"no runtime of {device.name} can be measured here: {'; '.join(reasons)}; PyTorch itself "
        f"is --runtime {EAGER}"
    )


def _check_precision(runtime: Runtime, precision: str) -> None:
    if precision not in runtime.precisions:
        raise UsageError(
            f"runtime {runtime.name!r} has no {precision}; it has {', '.join(runtime.precisions)}"
        )


def _images(variant: Variant, count: int, seed: int = 0) -> Array:
    """Return noise from 0 to 1 (N, C, H, W): what is averaged in the end is not zero."""
    return np.random.default_rng(seed).random((count, *variant.shape), dtype=np.float32)


def _place(network: nn.Module, device: Device) -> nn.Module:
    """Return the network where the device's PyTorch runs."""
    if device.kind == "cpu":
        return network
    if device.kind != "gpu":
        raise UsageError(f"PyTorch runs on CPUs and NVIDIA GPUs; {device.name} is an {device.kind}")
    from litezoo.export.runtime_pytorch import find_gpu

    return network.to(f"cuda:{find_gpu(device)}")


def _sessions(
    variant: Variant,
    *,
    device: Device,
    runtime: str,
    precision: str,
    batch: int,
    threads: int,
    folder: Path,
    copies: int,
) -> list[Session]:
    """Return `copies` sessions of a variant that were loaded apart, after comparing the outputs."""
    import torch

    from litezoo.export.parity import check_parity
    from litezoo.export.typed import tolerance_of

    from .design_rules import create

    network = create(variant)
    images = _images(variant, max(batch, 2))
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    if runtime == EAGER:
        from litezoo.export.runtime_pytorch import eager_session

        sessions = [
            eager_session(
                _place(copy.deepcopy(network), device),
                channels_last=device.kind == "gpu",
                compiled=False,
                precision=precision,
                threads=threads,
            )
            for _ in range(copies)
        ]
    else:
        built = get_runtime(runtime)
        source = _source(network, images, built, device, precision, folder)
        files = built.build(source, device=device, precision=precision, folder=folder)
        sessions = [
            built.load(files, device=device, precision=precision, threads=threads)
            for _ in range(copies)
        ]
    for session in sessions:
        check_parity(
            f"{variant.name} in {runtime}",
            session.run(images[:batch]),
            expected[:batch],
            reference="PyTorch",
            tolerance=tolerance_of(precision),
        )
    return sessions


def _source(
    network: nn.Module,
    images: Array,
    runtime: Runtime,
    device: Device,
    precision: str,
    folder: Path,
) -> BuildSource:
    """Return what the engine is built from: the typed ONNX file and the module."""
    from litezoo.export.request import form_of

    form = form_of(runtime, precision, device)
    if form is None:
        return BuildSource(onnx={}, module=network, images=images)
    if "mixed" in form:
        raise UsageError(
            f"{precision} is a mixture that export searches for a whole network; measure the "
            "rules at int8 and at fp32"
        )
    import onnx

    from litezoo.export.to_onnx import export_onnx, simplify_onnx

    exported = export_onnx(network, images, metadata={"litezoo.graph_form": "benchmark"})
    proto, _ = simplify_onnx(exported, images)
    file = folder / "model.onnx"
    onnx.save(_typed(proto, form, images, device), file)
    return BuildSource(onnx={form: file}, module=network, images=images)


def _typed(proto: ModelProto, form: str, images: Array, device: Device) -> ModelProto:
    """Return a float32 model in one of the forms that engines are built from."""
    from litezoo.export.limits import apply_rewrites
    from litezoo.export.to_half import HALVES, to_half
    from litezoo.export.to_int8 import Form, quantize

    body = form.removeprefix("int8-")
    if form.startswith("int8"):
        noise = np.random.default_rng(1)
        shape = (_CALIBRATION_IMAGES, *images.shape[1:])
        proto = quantize(
            proto,
            noise.random(shape, dtype=np.float32),
            form="int8" if body in HALVES else cast(Form, form),
            per_channel=device.limits.quantization != "per-tensor",
            weight_bits=7 if device.limits.weight_bits == 7 else 8,
        )
    if body in HALVES:
        proto = to_half(proto, body)
    rewritten, _ = apply_rewrites(proto, device)
    return rewritten


# ------------------------------------------------------------------------------------ measuring


def measure_guidelines(
    device: str,
    *,
    runtime: str | None = None,
    precision: str = "fp32",
    threads: int = 1,
    batch: int = 1,
    quick: bool = False,
    rules: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> Guidelines:
    """Measure the rules (by name, default: all) on a device that is here.

    `runtime` is one of `list_runtimes()` or `EAGER` (default: the device's first that can run
    here); `quick` takes smaller networks and a third of the rounds. On a CPU one pinned thread is
    what differences can be told on; more widen the band of noise. CheckFailed where no network
    could be built right.
    """
    from .design_rules import design_rules

    chosen = get_device(device)
    check_conditions(batches=[batch], threads=threads)
    if batch > chosen.batch.max:
        raise UsageError(f"{chosen.name} takes batches up to {chosen.batch.max}, not {batch}")
    selected = design_rules(rules, quick=quick)
    name = _choose_runtime(chosen, runtime, precision)
    machine, date = _machine(chosen), datetime.now(UTC).isoformat(timespec="seconds")
    with TemporaryDirectory(prefix="litezoo-guidelines-") as folder:
        experiments: list[_Experiment] = []
        left_out: dict[str, str] = {}
        for experiment in dict.fromkeys(rule.experiment for rule in selected):
            try:
                experiments.append(
                    _load(
                        experiment,
                        [rule for rule in selected if rule.experiment == experiment],
                        device=chosen,
                        runtime=name,
                        precision=precision,
                        batch=batch,
                        threads=threads,
                        folder=Path(folder),
                        progress=progress,
                    )
                )
            except CheckFailed as error:
                left_out[experiment] = str(error)
        if not experiments:
            raise CheckFailed(f"nothing could be measured: {'; '.join(left_out.values())}")
        _measure(experiments, threads=threads, quick=quick, seed=seed, progress=progress)
    rows = [
        _row(
            experiment,
            rule,
            device=chosen,
            runtime=name,
            precision=precision,
            batch=batch,
            threads=threads,
            quick=quick,
            machine=machine,
            date=date,
        )
        for experiment in experiments
        for rule in experiment.rules
    ]
    order = [rule.name for rule in selected]
    ordered = sorted(rows, key=lambda row: order.index(row.rule))
    return Guidelines(rows=tuple(ordered), left_out=left_out)


def _machine(device: Device) -> Machine:
    """Return this machine's record, with its GPU where PyTorch finds the device's."""
    if device.kind != "gpu":
        return read_machine()
    import torch

    from litezoo.export.runtime_pytorch import find_gpu

    from .ceilings import gpu_versions

    try:
        place = torch.device("cuda", find_gpu(device))
    except MissingError:
        return read_machine()  # TensorRT may have found one
    return read_machine(gpu_versions(place))


def _load(
    name: str,
    rules: list[Rule],
    *,
    device: Device,
    runtime: str,
    precision: str,
    batch: int,
    threads: int,
    folder: Path,
    progress: Callable[[str], None],
) -> _Experiment:
    """Build, check and load every network of an experiment, and one of them twice."""
    from .design_rules import check_macs

    macs: dict[str, int] = {}
    variants: dict[str, Variant] = {}
    for rule in rules:
        macs |= check_macs(rule)
        variants |= {variant.name: variant for variant in rule.variants}
    control_of = rules[0].fast
    runs: list[tuple[str, Session, Array]] = []
    control: tuple[str, Session, Array] | None = None
    for number, variant in enumerate(variants.values()):
        progress(f"{name}: building {variant.name} in {runtime} {precision}")
        own = folder / f"{name}-{number}"
        own.mkdir()
        first, *again = _sessions(
            variant,
            device=device,
            runtime=runtime,
            precision=precision,
            batch=batch,
            threads=threads,
            folder=own,
            copies=2 if variant.name == control_of else 1,
        )
        images = _images(variant, batch)
        runs.append((variant.name, first, images))
        if again:
            control = (_CONTROL, again[0], images.copy())
    assert control is not None
    return _Experiment(
        name=name,
        rules=rules,
        variants=list(variants.values()),
        macs=macs,
        runs=[*runs, control],
        control_of=control_of,
    )


def _measure(
    experiments: Sequence[_Experiment],
    *,
    threads: int,
    quick: bool,
    seed: int,
    progress: Callable[[str], None],
) -> None:
    """Run every experiment in each pass, in an order shuffled anew; the close ones more often."""
    rng = random.Random(seed)
    passes = QUICK_PASSES if quick else PASSES
    for number in range(2 * passes):
        due = [
            experiment
            for experiment in experiments
            if number < passes or _is_close(experiment, threads)
        ]
        for experiment in rng.sample(due, len(due)):
            experiment.add(
                interleave(
                    experiment.runs,
                    threads=threads,
                    seed=rng.randrange(2**32),
                    progress=partial(_tell, progress, f"pass {number + 1}, {experiment.name}"),
                )
            )


def _tell(progress: Callable[[str], None], title: str, step: str) -> None:
    progress(f"{title}: {step}")


def _is_close(experiment: _Experiment, threads: int) -> bool:
    band = noise_band(experiment.control(), threads=threads)
    intervals = [
        (_cost(experiment, rule.slow, rule.fast, rule.per), rule) for rule in experiment.rules
    ]
    return any(
        judge(low, high, threshold=rule.threshold, band=band)[1]
        for (_, low, high), rule in intervals
    )


def _cost(experiment: _Experiment, name: str, base: str, per: Per) -> tuple[float, float, float]:
    """Return a variant's cost over another's, and its interval."""
    scale = experiment.macs[base] / experiment.macs[name] if per == "mac" else 1.0
    ratio, low, high = ratio_interval(experiment.of(name), experiment.of(base))
    return scale * ratio, scale * low, scale * high


def _row(
    experiment: _Experiment,
    rule: Rule,
    *,
    device: Device,
    runtime: str,
    precision: str,
    batch: int,
    threads: int,
    quick: bool,
    machine: Machine,
    date: str,
) -> Guideline:
    """Return the row of a rule from what its experiment measured."""
    control = experiment.control()
    band = noise_band(control, threads=threads)
    ratio, low, high = _cost(experiment, rule.slow, rule.fast, rule.per)
    verdict, close = judge(low, high, threshold=rule.threshold, band=band)
    costs = []
    for variant in rule.variants:
        own = _cost(experiment, variant.name, rule.fast, rule.per)
        costs.append(
            VariantCost(
                name=variant.name,
                macs=experiment.macs[variant.name],
                ms=round(float(np.median(experiment.of(variant.name))), 4),
                ratio=round(own[0], 4),
                low=round(own[1], 4),
                high=round(own[2], 4),
                x=variant.x,
                series=variant.series,
            )
        )
    return Guideline(
        rule=rule.name,
        claim=rule.claim,
        source=rule.source,
        device=device.name,
        runtime=runtime,
        precision=precision,
        batch=batch,
        threads=threads,
        quick=quick,
        slow=rule.slow,
        fast=rule.fast,
        per=rule.per,
        ratio=round(ratio, 4),
        low=round(low, 4),
        high=round(high, 4),
        threshold=rule.threshold,
        band=round(band, 4),
        control=round(control, 4),
        verdict=verdict,
        close=close,
        finding=_finding(experiment, rule, ratio, low, high, band),
        variants=tuple(costs),
        rounds=experiment.medians.shape[1],
        machine=machine,
        protocol=PROTOCOL,
        date=date,
    )


def _finding(
    experiment: _Experiment, rule: Rule, ratio: float, low: float, high: float, band: float
) -> str:
    """Return what was found in a sentence."""
    measure = "time of a MAC" if rule.per == "mac" else "time"
    said = (
        f"{rule.slow}: {ratio:.2f} ({low:.2f} to {high:.2f}) times the {measure} of {rule.fast}; "
        f"less than {band:.0%} is noise"
    )
    if not rule.pairs:
        return said
    points = [(x, _cost(experiment, slow, fast, rule.per)[0]) for x, slow, fast in rule.pairs]
    series = rule.variant(rule.fast).series
    return f"{said}; {series} is {find_turn(points, band=band)}"


# ---------------------------------------------------------------------------------------- files


def guidelines_file(device: str, *, folder: Path | None = None) -> Path:
    """Return where a device's rows are kept: benchmarks/results/guidelines/<device>.jsonl."""
    return (folder or results_folder() / "guidelines") / f"{device}.jsonl"


def append_guidelines(rows: Sequence[Guideline], *, folder: Path | None = None) -> list[Path]:
    """Append rows to their devices' files, each line whole; return the files."""
    return _STORE.append_by_device(rows, folder or results_folder() / "guidelines")


def read_guidelines(files: Iterable[Path]) -> list[Guideline]:
    """Read files of rows; a damaged line is a CheckFailed with file and line number."""
    return _STORE.read(files)


def latest_guidelines(rows: Iterable[Guideline]) -> list[Guideline]:
    """Keep the newest row of each rule and conditions, in order of first appearance."""
    return newest(rows, lambda row: row.conditions)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two runs under the same conditions agree; `differ` says of each other verdict what."""

    compared: int
    differ: tuple[str, ...]


def compare_runs(new: Iterable[Guideline], old: Iterable[Guideline]) -> Agreement:
    """Compare the verdicts of new rows with the latest old ones of the same conditions."""
    before = {row.conditions: row for row in latest_guidelines(old)}
    pairs = [(row, before[row.conditions]) for row in new if row.conditions in before]
    differ = tuple(
        f"{now.rule}: {now.verdict} ({now.ratio:.2f}), was {then.verdict} ({then.ratio:.2f})"
        + (", close to the border" if now.close or then.close else "")
        for now, then in pairs
        if now.verdict != then.verdict
    )
    return Agreement(compared=len(pairs), differ=differ)
