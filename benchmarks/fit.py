"""Fitting the latency model: few parameters from rows, pulled towards what is known without them.

    least of   sum over rows  w * robust((log predicted - log measured) / noise)
             + sum over parameters  ((log value - log prior) / trust)^2

The error is relative, hence the logarithms; it is robust (Student's t), since published rows hold
mistakes; the prior is the generation's or the defaults'. The noise is estimated from the rows.
Gauss-Newton with step control finds the least; twenty parameters and 600 networks take about a
second.

What a fit leaves, it keeps: the mean residual of each family and of each model (shrunk; see
`Fit.correction`), and the quantiles of the residuals of families that it has not seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litezoo.models.errors import CheckFailed, UsageError
from litezoo.models.files import write_whole

from .latency import CLASSES, PARAMETERS, Chip, Costs, Floats, Mode, Sample, Work, parameters_of

__all__ = [
    "Fit", "Fitted", "Prior", "Residuals", "Row", "Solution", "default_prior", "family_of",
    "fit_target", "fits_folder", "leave_groups_out", "pool", "prior_of_fit", "read_fits",
    "residuals_of", "solve", "write_fits",
]  # fmt: skip

#: Least noise that rows are trusted with: published tables repeat themselves no better.
_LEAST_NOISE = 0.04
#: Degrees of freedom of the error: small, so that wrong rows count little.
_FREEDOM = 4.0
_NAMES = tuple(one.name for one in PARAMETERS)
#: What a network's name says of its family, the first that matches.
_FAMILIES: tuple[tuple[str, str], ...] = (
    (r"efficientnet_lite", "efficientnet_lite"),
    (r"efficientnet_(e[sml]|edgetpu)", "efficientnet_edgetpu"),
    (r"efficientnet_?v2", "efficientnetv2"),
    (r"efficientnet", "efficientnet"),
    (r"mobilenet_?edgetpu", "mobilenet_edgetpu"),
    (r"mobilenet_?v(\d)", r"mobilenetv\1"),
    (r"s?e?mnasnet|spnasnet", "mnasnet"),
    (r"(cs3)|(csp)", "cspnet"),
    (r"darknet", "darknet"),
    (r"densenet", "densenet"),
    (r"(eca_|ese_)?vovnet", "vovnet"),
    (r"(se_)?hrnet", "hrnet"),
    (r"lcnet", "lcnet"),
    (r"ghostnet_?v([23])", r"ghostnetv\1"),
    (r"g?ghostnet", "ghostnet"),
    (r"regnet", "regnet"),
    (r"rep_?ghost", "repghost"),
    (r"repvgg", "repvgg"),
    (r"res2ne", "res2net"),
    (r"resnest", "resnest"),
    (r"rexnet", "rexnet"),
    (r"shufflenet_?v?(\d)", r"shufflenetv\1"),
    (r"s?e?c?a?resnext|resnext", "resnext"),
    (r"(se|eca|sk|gc|wide_)?resnet|senet|nf_resnet", "resnet"),
    (r"convnext", "convnext"),
    (r"inception_next", "inception_next"),
    (r"inception|googlenet", "inception"),
    (r"hgnet(v2)?", "hgnet"),
    (r"fbnet", "fbnet"),
    (r"p?nasnet", "nasnet"),
    (r"dla", "dla"),
    (r"vgg", "vgg"),
)


@cache
def family_of(model: str) -> str:
    """Return what networks are counted as one family for validation, from the name.

    >>> family_of("timm:tf_efficientnetv2_s"), family_of("mobilenetv2_100"), family_of("seresnet50")
    ('efficientnetv2', 'mobilenetv2', 'resnet')
    """
    name = model.rpartition(":")[2].lower().removeprefix("tf_")
    for pattern, family in _FAMILIES:
        if found := re.match(pattern, name):
            return found.expand(family) if "\\" in family else family
    found = re.match(r"[a-z]+(?=[_\d]|$)", name)
    return found.group() if found else name


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a prediction is for: a device, a runtime on it and what it computes in.

    `threads` are 0 where they do not matter or are not stated; `layout` is "nchw", "nhwc" or "".
    """

    device: str
    runtime: str
    precision: str
    layout: str = ""
    threads: int = 0

    @property
    def mode(self) -> Mode:
        """How the runtime runs a network."""
        return _MODES.get(self.runtime.replace("_", "-"), "fused")

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast in each call."""
        return self.precision.startswith("amp") and self.mode != "fused"

    def __str__(self) -> str:
        """Return it in words, e.g. "t4, tensorrt, fp16"."""
        words = [self.device, self.runtime, self.precision]
        words += [self.layout] if self.layout else []
        if self.threads:
            words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(words)


#: Runtimes that do not fuse as inference engines do. Our own `pytorch` is AOTInductor's.
_MODES: Mapping[str, Mode] = {
    "pytorch-eager": "eager",
    "timm-eager": "eager",
    "torchvision-eager": "eager",
    "pytorch-compile": "compiled",
    "pytorch": "compiled",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement to fit: a network's work, the time of a batch, and whose it is."""

    model: str
    work: Work
    batch: int
    ms: float

    @property
    def family(self) -> str:
        """The family that is left out with it."""
        return family_of(self.model)

    @property
    def is_light(self) -> bool:
        """Whether it has less than 1.5 GMACs an image: our users' kind."""
        return self.work.total_macs < 1.5e9


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What is known of the parameters before the rows: `mean` in natural units, `trust` in log."""

    mean: Floats
    trust: Floats
    used: NDArray[np.bool_]


def default_prior(chip: Chip, *, mode: Mode) -> Prior:
    """Return the model's defaults for a chip and a mode."""
    mean, trust, used = parameters_of(mode=mode, kind=chip.kind, fp32=chip.fp32)
    return Prior(mean=mean, trust=trust, used=used)


def prior_of_fit(
    fit: Fit, chip: Chip, *, mode: Mode, trust: float = 0.5, overall: float = 0.5
) -> Prior:
    """Return another fit's values as a prior, each trusted `1 / trust` times as much as a default.

    Only the overall factor is left `overall` free. Where the other fit does not use a parameter,
    its default stays.
    """
    base = default_prior(chip, mode=mode)
    mean, trusts = base.mean.copy(), base.trust.copy()
    for place, name in enumerate(_NAMES):
        if base.used[place] and fit.values.get(name):
            mean[place] = fit.values[name]
            trusts[place] = base.trust[place] * trust
    trusts[_NAMES.index("overall")] = overall
    return Prior(mean=mean, trust=trusts, used=base.used)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Fitted values (natural units), the residuals log(predicted / measured), and the noise."""

    values: Floats
    residuals: Floats
    noise: float
    steps: int


def solve(
    costs: Costs,
    ms: Floats,
    prior: Prior,
    *,
    weights: Floats | None = None,
    start: Floats | None = None,
    boards: Sequence[str] | None = None,
    most_steps: int = 40,
) -> Solution:
    """Return the parameters under which the model is nearest to the measured `ms`, one a row.

    A row of weight 0 does not count. `boards` says of which board each row is where several are
    fitted together: each then has a factor of its own, which the residuals are without. UsageError
    for times that are none.
    """
    ms = np.asarray(ms, dtype=np.float64)
    if len(ms) != costs.rows or not np.all(np.isfinite(ms) & (ms > 0)):
        raise UsageError("measured times are numbers of ms above 0, one for each row")
    weights = np.ones(len(ms)) if weights is None else weights
    free = np.flatnonzero(prior.used)
    centre = np.log(prior.mean[free])
    precision = prior.trust[free] ** -2.0
    target = np.log(ms)
    values = prior.mean.copy() if start is None else start.copy()
    theta = np.log(values[free])
    counted = weights > 0
    board = np.unique(boards, return_inverse=True)[1] if boards is not None else None
    held = None if board is None else np.bincount(board, weights=weights)

    def residuals_at(point: Floats) -> Floats:
        values[free] = np.exp(point)
        found: Floats = np.log(costs.ms(values)) - target
        if board is not None and held is not None:
            found = found - (np.bincount(board, weights=weights * found) / (held + 0.2))[board]
        return found

    def objective(errors: Floats, point: Floats, noise: float) -> float:
        robust = (_FREEDOM + 1) * np.log1p((errors / noise) ** 2 / _FREEDOM)
        return float((weights * robust).sum() + (precision * (point - centre) ** 2).sum())

    errors = residuals_at(theta)
    noise = _noise(errors[counted])
    damping, steps = 1e-3, 0
    while steps < most_steps:
        steps += 1
        jacobian = np.empty((len(ms), len(free)))
        for place in range(len(free)):
            moved = theta.copy()
            moved[place] += 1e-4
            jacobian[:, place] = (residuals_at(moved) - errors) / 1e-4
        noise = _noise(errors[counted])
        robust = weights * (_FREEDOM + 1) / (_FREEDOM + (errors / noise) ** 2) / noise**2
        slope = jacobian.T @ (robust * errors) + precision * (theta - centre)
        curve = (jacobian.T * robust) @ jacobian + np.diag(precision)
        here = objective(errors, theta, noise)
        gained = False
        for _ in range(8):
            step = -np.linalg.solve(curve + damping * np.diag(np.diag(curve)), slope)
            step = np.clip(step, -1.0, 1.0)
            trial = residuals_at(theta + step)
            there = objective(trial, theta + step, noise)
            if there < here:
                theta, errors, gained = theta + step, trial, True
                damping = max(damping / 5, 1e-6)
                break
            damping *= 6
        if not gained or (here - there < 1e-4 * here + 1e-6 and np.abs(step).max() < 0.02):
            break
    residuals = residuals_at(theta)
    return Solution(values=values.copy(), residuals=residuals, noise=noise, steps=steps)


def _noise(errors: Floats) -> float:
    """Return the residuals' standard deviation, whatever a few of them are."""
    if len(errors) < 6:
        return max(_LEAST_NOISE, 0.1)
    return max(_LEAST_NOISE, 1.4826 * float(np.median(np.abs(errors))))


def leave_groups_out(
    costs: Costs,
    ms: Floats,
    prior: Prior,
    groups: Sequence[str],
    solution: Solution,
    *,
    priors: Mapping[str, Prior] | None = None,
) -> Floats:
    """Return what is predicted for each row by a fit that has not seen any row of its group.

    Each fit starts from `solution`, the one of all rows, so that few steps suffice. `priors` has
    the prior for a group where that is from rows of the group on other devices, too.
    """
    labels = np.array(groups)
    predicted = np.empty(costs.rows)
    for group in dict.fromkeys(groups):
        mine = labels == group
        known = prior if priors is None else priors.get(group, prior)
        found = solve(
            costs, ms, known, weights=np.where(mine, 0.0, 1.0), start=solution.values,
            most_steps=6,
        )  # fmt: skip
        predicted[mine] = costs.ms(found.values)[mine]
    return predicted


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """The size of the errors log(predicted / measured) of rows: what an interval is made of.

    `low` and `high` are the 10 % and 90 % quantiles of log(measured / predicted).
    """

    rows: int
    median: float
    p90: float
    low: float
    high: float


def residuals_of(predicted: Floats, measured: Floats) -> Residuals:
    """Return the size of the errors of predictions; UsageError without any."""
    if not len(predicted):
        raise UsageError("there are no rows to take an interval from")
    errors = np.log(measured / predicted)
    absolute = np.abs(np.expm1(np.abs(errors)))
    low, high = np.quantile(errors, (0.1, 0.9))
    return Residuals(
        rows=len(errors),
        median=round(float(np.median(absolute)), 4),
        p90=round(float(np.quantile(absolute, 0.9)), 4),
        low=round(float(low), 4),
        high=round(float(high), 4),
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The parameters of one device, runtime and precision, and what they are worth.

    `values` are natural units (see `latency.PARAMETERS`); `families` and `models` map a name to the
    mean of log(measured / predicted) and its number of rows. `unseen` are the errors for families
    that a fit has not seen, `anchored` those with one other member of the family known. `greatest`
    is the largest share of time that each class of kernel has among the rows; `gmacs` their range,
    batch included. `sources` says where the rows are from.
    """

    device: str
    runtime: str
    version: str
    precision: str
    layout: str
    threads: int
    mode: Mode
    chip: Chip
    values: Mapping[str, float]
    rows: int
    left_out: int
    noise: float
    unseen: Residuals
    anchored: Residuals | None
    families: Mapping[str, tuple[float, int]]
    models: Mapping[str, tuple[float, int]]
    greatest: Mapping[str, float]
    gmacs: tuple[float, float]
    batches: tuple[int, int]
    between_families: float
    within_family: float
    sources: tuple[str, ...] = field(default=())
    note: str = ""

    @property
    def vector(self) -> Floats:
        """The values in the order of `latency.PARAMETERS`."""
        start, _, used = parameters_of(mode=self.mode, kind=self.chip.kind, fp32=self.chip.fp32)
        found = [self.values.get(name, start[place]) for place, name in enumerate(_NAMES)]
        return np.where(used, np.array(found), start)

    def correction(self, model: str) -> tuple[float, int]:
        """Return what rows of its family say of a model: log(measured / predicted), how many.

        The mean of n rows counts n / (n + k), k being how much the members of a family differ
        over how much families do; a row of the model itself counts as its family's do, and again.
        """
        mean, rows = self.families.get(family_of(model), (0.0, 0))
        if not rows or self.between_families <= 0:
            return 0.0, 0
        k = self.within_family / self.between_families
        found = mean * rows / (rows + k)
        own, times = self.models.get(model, (0.0, 0))
        if times:
            found += (own - found) * times / (times + 0.5)
        return found, rows


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fit, and what it predicts for its own rows.

    `inside` is by the fit itself, `unseen` by fits without the row's family, `anchored` the same
    with one other member of the family known: that of the middle size; NaN for itself and for
    families of one member.
    """

    fit: Fit
    rows: tuple[Row, ...]
    inside: Floats
    unseen: Floats
    anchored: Floats


def _fixed_overall(values: Floats) -> Floats:
    found = values.copy()
    found[_NAMES.index("overall")] = 1.0
    return found


def pool(
    rows: Mapping[Target, Sequence[Row]],
    chips: Mapping[Target, Chip],
    *,
    without: str = "",
    start: Prior | None = None,
) -> Prior:
    """Return what the rows of several devices say together, each with a factor of its own.

    It serves as the prior of each of them. The targets are of one mode and kind of device; rows of
    the family `without` do not count; `start` is where to begin.
    """
    rows = {target: [row for row in mine if row.family != without] for target, mine in rows.items()}
    targets = [target for target, mine in rows.items() if mine]
    every = [(target, row) for target in targets for row in rows[target]]
    costs = Costs(
        [Sample(work=row.work, batch=row.batch) for _, row in every],
        [chips[target] for target, _ in every],
        mode=targets[0].mode,
    )
    base = default_prior(chips[targets[0]], mode=targets[0].mode)
    used = base.used.copy()
    used[_NAMES.index("overall")] = False
    found = solve(
        costs,
        np.array([row.ms for _, row in every]),
        Prior(mean=base.mean, trust=base.trust, used=used),
        start=None if start is None else _fixed_overall(start.mean),
        boards=[str(target) for target, _ in every],
    )
    raw = np.log(np.array([row.ms for _, row in every]) / costs.ms(found.values))
    factors = [mean for mean, _ in _means([str(target) for target, _ in every], raw).values()]
    overall = _NAMES.index("overall")
    mean = found.values.copy()
    mean[overall] = math.exp(float(np.median(factors)))
    trust = base.trust * 0.4
    trust[overall] = max(0.3, float(np.std(factors)))
    return Prior(mean=mean, trust=trust, used=base.used)


def fit_target(
    target: Target,
    rows: Sequence[Row],
    chip: Chip,
    *,
    prior: Prior | None = None,
    priors: Mapping[str, Prior] | None = None,
    version: str = "",
    sources: Sequence[str] = (),
    left_out: int = 0,
    note: str = "",
) -> Fitted:
    """Fit one target to its rows, with what is predicted for rows of families left out.

    `prior` is another fit's or the pool's (`prior_of_fit`, `pool`), else the defaults; `priors` are
    those of a pool without a family. UsageError for fewer than three rows.
    """
    if len(rows) < 3:
        raise UsageError(
            f"{target} has {len(rows)} row{'s' if len(rows) != 1 else ''} to fit; three different "
            "networks are the least, and thirty make a good fit"
        )
    costs = Costs(
        [Sample(work=row.work, batch=row.batch) for row in rows],
        [chip] * len(rows),
        mode=target.mode,
    )
    ms = np.array([row.ms for row in rows])
    groups = [row.family for row in rows]
    known = default_prior(chip, mode=target.mode) if prior is None else prior
    found = solve(costs, ms, known)
    inside = costs.ms(found.values)
    unseen = leave_groups_out(costs, ms, known, groups, found, priors=priors)
    between, within = _spreads(rows, np.log(ms / unseen))
    anchored = _anchor(rows, unseen, ms, within / between if between else math.inf)
    counted = np.isfinite(anchored)
    by_model = _means([row.model for row in rows], np.log(ms / inside))
    members: dict[str, dict[str, float]] = {}
    for row in rows:
        members.setdefault(row.family, {})[row.model] = by_model[row.model][0]
    gmacs = [row.batch * row.work.total_macs / 1e9 for row in rows]
    fit = Fit(
        **dataclasses.asdict(target),
        version=version,
        mode=target.mode,
        chip=chip,
        values=named_values(found.values, known),
        rows=len(rows),
        left_out=left_out,
        noise=round(found.noise, 4),
        unseen=residuals_of(unseen, ms),
        anchored=residuals_of(anchored[counted], ms[counted]) if counted.sum() >= 8 else None,
        families={
            family: (round(float(np.mean(list(means.values()))), 4), len(means))
            for family, means in sorted(members.items())
        },
        models={name: (round(mean, 4), number) for name, (mean, number) in by_model.items()},
        greatest=greatest_shares(costs, found.values),
        gmacs=(round(min(gmacs), 5), round(max(gmacs), 3)),
        batches=(min(row.batch for row in rows), max(row.batch for row in rows)),
        between_families=round(between, 6),
        within_family=round(within, 6),
        sources=tuple(sources),
        note=note,
    )
    return Fitted(fit=fit, rows=tuple(rows), inside=inside, unseen=unseen, anchored=anchored)


def _means(names: Sequence[str], values: Floats) -> dict[str, tuple[float, int]]:
    """Return the mean and the number of the values of each name."""
    found: dict[str, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        found.setdefault(name, []).append(float(value))
    return {name: (sum(some) / len(some), len(some)) for name, some in found.items()}


def _spreads(rows: Sequence[Row], errors: Floats) -> tuple[float, float]:
    """Return how much families differ in their mean error, and members in theirs (variances)."""
    models = _means([row.model for row in rows], errors)
    families: dict[str, list[float]] = {}
    for model, (mean, _) in models.items():
        families.setdefault(family_of(model), []).append(max(-1.0, min(1.0, mean)))
    several = [np.array(some) for some in families.values() if len(some) > 1]
    freedom = sum(len(some) - 1 for some in several)
    if freedom < 3 or len(several) < 3:
        return 0.0, 0.0
    within = sum(float(((some - some.mean()) ** 2).sum()) for some in several) / freedom
    size = float(np.mean([1 / len(some) for some in several]))
    between = float(np.mean([some.mean() ** 2 for some in several])) - within * size
    return max(between, 0.0), max(within, 1e-6)


def _anchor(rows: Sequence[Row], unseen: Floats, ms: Floats, k: float) -> Floats:
    """Return the predictions corrected by one member of each family, NaN where there is no other.

    The member is the one of middle size; its mean error counts 1 / (1 + k).
    """
    found = np.full(len(rows), np.nan)
    families: dict[str, dict[str, float]] = {}
    for row in rows:
        families.setdefault(row.family, {})[row.model] = row.work.total_macs
    errors = _means([row.model for row in rows], np.log(ms / unseen))
    middle = {
        family: sorted(sizes, key=lambda name: sizes[name])[(len(sizes) - 1) // 2]
        for family, sizes in families.items()
        if len(sizes) > 1
    }
    for place, row in enumerate(rows):
        member = middle.get(row.family)
        if member is not None and member != row.model:
            found[place] = unseen[place] * math.exp(errors[member][0] / (1 + k))
    return found


def fits_folder() -> Path:
    """Return the folder of the fits that come with litezoo."""
    return Path(__file__).parent / "fits"


def _plain(fit: Fit) -> dict[str, Any]:
    found = dataclasses.asdict(fit)
    found["values"] = {name: float(f"{value:.4g}") for name, value in fit.values.items()}
    return found


def write_fits(fits: Sequence[Fit], folder: Path) -> list[Path]:
    """Write the fits of each device to `folder`/<device>.json, whole; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for device in dict.fromkeys(fit.device for fit in fits):
        mine = [_plain(fit) for fit in fits if fit.device == device]
        text = "[\n" + ",\n".join(_text(one) for one in mine) + "\n]\n"
        files.append(write_whole(folder / f"{device}.json", text))
    return files


def _text(fit: Mapping[str, Any]) -> str:
    """Return one fit with a line for each of its fields."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fit.items()]
    return " {\n" + ",\n".join(lines) + "\n }"


def read_fits(file: Path) -> tuple[Fit, ...]:
    """Read one device's fits; a damaged file is a CheckFailed that names it."""
    try:
        return tuple(_fit(values) for values in json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckFailed(
            f"{file} holds no fits of the latency model ({error}); make them again: "
            "python -m litezoo.benchmarks.validate --write"
        ) from error


def _fit(values: Mapping[str, Any]) -> Fit:
    unknown = set(values["values"]) - set(_NAMES)
    if unknown:
        raise ValueError(f"parameter {min(unknown)} is unknown")
    if any(not 0 < number < math.inf for number in values["values"].values()):
        raise ValueError("a parameter is not above 0")
    anchored = values["anchored"]
    return Fit(
        **{
            **values,
            "chip": Chip(**values["chip"]),
            "unseen": Residuals(**values["unseen"]),
            "anchored": None if anchored is None else Residuals(**anchored),
            "families": {name: (mean, rows) for name, (mean, rows) in values["families"].items()},
            "models": {name: (mean, rows) for name, (mean, rows) in values["models"].items()},
            "gmacs": tuple(values["gmacs"]),
            "batches": tuple(values["batches"]),
            "sources": tuple(values["sources"]),
        }
    )


def named_values(values: Floats, prior: Prior) -> dict[str, float]:
    """Return the parameters in use by name."""
    return {name: float(values[place]) for place, name in enumerate(_NAMES) if prior.used[place]}


def greatest_shares(costs: Costs, values: Floats) -> dict[str, float]:
    """Return the largest share of time of each class of kernel among the rows."""
    shares = costs.shares(values).max(axis=0)
    return {name: round(float(share), 3) for name, share in zip(CLASSES, shares, strict=True)}
