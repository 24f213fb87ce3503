"""Who else was running: foreign load, stolen time, clock and heat while a block was measured.

A CPU's time over a block, as Linux counts it (/proc, in ticks of 10 ms)::

    |  ours  |  foreign  |  steal  |   idle   |
    |        |           |         +- nothing to run here
    |        |           +- the host gave this virtual CPU to another machine
    |        +- other programs, and interrupts
    +- this process, all of its threads

`Meter` reads it before and after, over the CPUs that this process is pinned to. Beside it stands
what ticks are too coarse for: the time that our threads waited for a CPU (schedstat, nanoseconds).
`run_quietly` runs a block again while it was disturbed. Where a system does not say, a value is
None and `why_not` says why; what is not known disturbs nobody.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

from litezoo.models.errors import UsageError

from .machine import usable_cpus

__all__ = ["Conditions", "Disturbance", "Meter", "Quiet", "conditions_of", "run_quietly"]

_Result = TypeVar("_Result")

#: Most of the CPUs' time, beyond what ticks cannot tell, before a block counts as disturbed.
MOST_SHARE = 0.05
#: Most of a row's blocks that may be disturbed, and the least of its clock that it may fall to.
MOST_DISTURBED, LEAST_CLOCK = 0.5, 0.9
#: Chips of hwmon, and names of thermal zones, that are a CPU's.
_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal")
_ZONES = re.compile(r"cpu|x86_pkg|soc|cluster|core", re.IGNORECASE)
#: Columns of a CPU in /proc/stat that are no work: idle, iowait, and what `steal` holds; guests'
#: time (the last two) is in user's already.
_IDLE, _STEAL, _COLUMNS = (3, 4), 7, 8


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What else happened during `seconds` of measuring on `cpus`; shares are of these CPUs' time.

    `foreign_share` is other programs' time, `elsewhere_share` the busy share of the machine's other
    CPUs, `steal_share` what the host took, `waited_share` the time our threads were ready and had
    no CPU, `quota_share` the time for which the container's CPU quota stopped us;
    `resolution_share` is what ticks cannot tell. `throttle_events` counts heat stops of these CPUs,
    `clock_mhz` is their mean clock and `temperature_c` the hottest sensor, both at the end.
    """

    seconds: float
    cpus: tuple[int, ...]
    foreign_share: float | None = None
    elsewhere_share: float | None = None
    steal_share: float | None = None
    waited_share: float | None = None
    quota_share: float | None = None
    resolution_share: float = 0.0
    throttle_events: int | None = None
    clock_mhz: float | None = None
    temperature_c: float | None = None
    why_not: Mapping[str, str] = field(default_factory=dict)

    @property
    def level(self) -> float:
        """Return the largest of the shares that disturb, 0 where nothing is known."""
        shares = (self.foreign_share, self.steal_share, self.waited_share, self.quota_share)
        return max(share or 0.0 for share in shares)

    def reason(self, *, most_share: float = MOST_SHARE) -> str | None:
        """Return what disturbed in one sentence, None where nothing did.

        Shares that are counted in ticks may exceed `most_share` by `resolution_share`.

        >>> Disturbance(seconds=0.2, cpus=(0,), foreign_share=0.4).reason()
        'other programs took 40 % of CPU 0'
        """
        where = f"CPU{'s' if len(self.cpus) > 1 else ''} {', '.join(map(str, self.cpus))}"
        by_ticks = most_share + self.resolution_share
        for share, most, text in (
            (self.foreign_share, by_ticks, "other programs took {} of {}"),
            (self.steal_share, by_ticks, "the host took {} of {} for other machines"),
            (self.waited_share, most_share, "our threads waited for {} of the time for {}"),
            (self.quota_share, most_share, "the container's CPU quota stopped us for {} of {}"),
        ):
            if share is not None and share > most:
                return text.format(f"{100 * share:.0f} %", where)
        if self.throttle_events:
            return f"heat slowed {where} {self.throttle_events} times"
        return None


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What the system says at one moment; ticks and counters since it was started."""

    at_s: float
    ticks: Mapping[int, tuple[int, ...]]
    own_ticks: int | None
    waited_ns: Mapping[str, int] | None
    stopped_s: float | None
    throttles: int | None


class Meter:
    """Watches a `with` block: `with Meter() as meter: ...; meter.disturbance`.

    `cpus` are those that the block runs on (default: those this process is pinned to); `proc` and
    `sys` are where Linux shows its counters.
    """

    def __init__(
        self,
        *,
        cpus: Sequence[int] | None = None,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
    ) -> None:
        if cpus is not None and not cpus:
            raise UsageError("cpus is empty; a meter needs one CPU or more")
        self._given = cpus
        self._cpus: tuple[int, ...] = ()
        self._proc = proc
        self._sys = sys
        self._before: _Reading | None = None
        self._disturbance: Disturbance | None = None

    def __enter__(self) -> Meter:
        """Read the counters."""
        self._cpus = tuple(usable_cpus() if self._given is None else self._given)
        self._disturbance = None
        self._before = self._read(self._cpus)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Read them again."""
        assert self._before is not None
        self._disturbance = self._compare(self._before, self._read(self._cpus), self._cpus)

    @property
    def disturbance(self) -> Disturbance:
        """Return what was seen; UsageError while the block still runs."""
        if self._disturbance is None:
            raise UsageError("the meter has no block yet; read it after `with Meter() as meter:`")
        return self._disturbance

    @property
    def foreign_share(self) -> float | None:
        """Return the share of these CPUs' time that other programs took."""
        return self.disturbance.foreign_share

    @property
    def steal_share(self) -> float | None:
        """Return the share of these CPUs' time that the host took."""
        return self.disturbance.steal_share

    @property
    def clock_mhz(self) -> float | None:
        """Return these CPUs' mean clock at the end."""
        return self.disturbance.clock_mhz

    # ------------------------------------------------------------------------------- reading

    def _read(self, cpus: Sequence[int]) -> _Reading:
        return _Reading(
            at_s=time.perf_counter(),
            ticks=_cpu_ticks(_text(self._proc / "stat")),
            own_ticks=_own_ticks(_text(self._proc / "self/stat")),
            waited_ns=_waited_ns(self._proc / "self/task"),
            stopped_s=_stopped_s(self._sys / "fs/cgroup"),
            throttles=_throttles(self._sys, cpus),
        )

    def _compare(self, before: _Reading, after: _Reading, cpus: tuple[int, ...]) -> Disturbance:
        why_not: dict[str, str] = {}
        seconds = after.at_s - before.at_s
        spent = {cpu: _spent(before.ticks[cpu], now) for cpu, now in after.ticks.items()
                 if cpu in before.ticks}  # fmt: skip
        total, busy, steal = (sum(spent[c][i] for c in cpus if c in spent) for i in range(3))
        foreign = elsewhere = stolen = waited = None
        if total and after.own_ticks is not None and before.own_ticks is not None:
            ours = after.own_ticks - before.own_ticks
            foreign, stolen = max(busy - ours, 0) / total, steal / total
            others = [spent[cpu] for cpu in spent if cpu not in cpus]
            if sum(other[0] for other in others):
                elsewhere = sum(o[1] for o in others) / sum(o[0] for o in others)
        else:
            why_not["foreign_share"] = why_not["steal_share"] = (
                f"{self._proc}/stat counted no time of these CPUs" if before.ticks else
                f"this system has no {self._proc}/stat"
            )  # fmt: skip
        if after.waited_ns is not None and before.waited_ns is not None and seconds > 0:
            more = (now - before.waited_ns.get(task, 0) for task, now in after.waited_ns.items())
            waited = sum(more) / (1e9 * seconds * len(cpus))
        else:
            why_not["waited_share"] = f"this system has no {self._proc}/self/task/*/schedstat"
        quota = None
        if after.stopped_s is not None and before.stopped_s is not None and seconds > 0:
            quota = (after.stopped_s - before.stopped_s) / (seconds * len(cpus))
        throttles = None
        if after.throttles is not None and before.throttles is not None:
            throttles = after.throttles - before.throttles
        clock, temperature = _clock_mhz(self._proc, self._sys, cpus), _temperature_c(self._sys)
        if clock is None:
            why_not["clock_mhz"] = "this system does not show the CPUs' clock"
        if temperature is None:
            why_not["temperature_c"] = "this system shows no sensor of the CPU"
        return Disturbance(
            seconds=round(seconds, 4),
            cpus=cpus,
            foreign_share=_rounded(foreign),
            elsewhere_share=_rounded(elsewhere),
            steal_share=_rounded(stolen),
            waited_share=_rounded(waited),
            quota_share=_rounded(quota),
            resolution_share=round((len(cpus) + 1) / total, 4) if total else 0.0,
            throttle_events=throttles,
            clock_mhz=clock,
            temperature_c=temperature,
            why_not=why_not,
        )


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:
        return None


def _cpu_ticks(stat: str) -> dict[int, tuple[int, ...]]:
    r"""Return the ticks of every CPU, from user to steal; {} where /proc/stat has none.

    >>> _cpu_ticks("cpu  9 9\ncpu1 5 0 2 90 3 0 1 7 0 0\nintr 1")
    {1: (5, 0, 2, 90, 3, 0, 1, 7)}
    """
    lines = re.finditer(r"^cpu(\d+) ([\d ]+)$", stat, re.MULTILINE)
    return {int(m[1]): tuple(map(int, m[2].split()))[:_COLUMNS] for m in lines}


def _spent(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a CPU's ticks between two readings: all, busy, stolen.

    A counter that runs backwards (iowait may) counts as none.
    """
    ticks = [max(now - then, 0) for then, now in zip(before, after, strict=True)]
    steal = ticks[_STEAL] if len(ticks) > _STEAL else 0
    return sum(ticks), sum(ticks) - steal - sum(ticks[i] for i in _IDLE), steal


def _own_ticks(stat: str) -> int | None:
    """Return the ticks of this process's threads, user and system; None where it is not said.

    >>> _own_ticks("7 (a (b) c) S 1 7 7 0 -1 4 1 0 0 0 120 30 0 0 20")
    150
    """
    columns = stat.rpartition(")")[2].split()
    return int(columns[11]) + int(columns[12]) if len(columns) > 12 else None


def _waited_ns(tasks: Path) -> dict[str, int] | None:
    """Return for each thread how long it was ready and had no CPU; None where it is not said."""
    waited = {}
    with suppress(OSError):
        for task in tasks.iterdir():
            columns = _text(task / "schedstat").split()  # "" of one that has just ended
            if len(columns) > 1:
                waited[task.name] = int(columns[1])
    return waited or None


def _stopped_s(cgroup: Path) -> float | None:
    """Return how long the container's CPU quota has stopped its threads; None without a quota."""
    for file, key, per_second in (
        ("cpu.stat", "throttled_usec", 1e6),
        ("cpu/cpu.stat", "throttled_time", 1e9),
    ):
        if found := re.search(rf"^{key} (\d+)$", _text(cgroup / file), re.MULTILINE):
            return int(found[1]) / per_second
    return None


def _throttles(sys: Path, cpus: Sequence[int]) -> int | None:
    """Return how often heat has slowed these CPUs' cores; None where it is not counted."""
    counts = [
        _number(sys / f"devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count")
        for cpu in cpus
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _clock_mhz(proc: Path, sys: Path, cpus: Sequence[int]) -> float | None:
    """Return the mean clock of these CPUs: cpufreq's, else what /proc/cpuinfo says."""
    clocks = [
        clock_khz / 1e3
        for cpu in cpus
        if (clock_khz := _number(sys / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq"))
    ]
    if not clocks:
        said = re.finditer(
            r"^processor\s*:\s*(\d+)$(?:\n.+)*?\ncpu MHz\s*:\s*([\d.]+)$",
            _text(proc / "cpuinfo"),
            re.MULTILINE,
        )
        clocks = [float(m[2]) for m in said if int(m[1]) in cpus]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _temperature_c(sys: Path) -> float | None:
    """Return the hottest sensor of the CPU."""
    values = [
        _number(file)
        for chip in sorted((sys / "class/hwmon").glob("hwmon*"))
        if _text(chip / "name").strip() in _SENSORS
        for file in sorted(chip.glob("temp*_input"))
    ] or [
        _number(zone / "temp")
        for zone in sorted((sys / "class/thermal").glob("thermal_zone*"))
        if _ZONES.search(_text(zone / "type"))
    ]
    known = [value for value in values if value is not None]
    return round(max(known) / 1e3, 1) if known else None


# ------------------------------------------------------------------------------- quiet blocks


@dataclass(frozen=True, kw_only=True)
class Quiet(Generic[_Result]):
    """The result of a block, what disturbed it (the try that was kept), and how often it ran."""

    value: _Result
    disturbance: Disturbance
    tries: int


def run_quietly(
    block: Callable[[], _Result],
    *,
    tries: int = 3,
    pause_s: float = 0.2,
    most_share: float = MOST_SHARE,
    meter: Callable[[], Meter] = Meter,
) -> Quiet[_Result]:
    """Run `block` until nothing disturbs it, at most `tries` times; the least disturbed counts.

    Before each further try this waits `pause_s`, longer each time: what disturbs may end.
    """
    if tries < 1:
        raise UsageError(f"tries is {tries}; a block needs 1 or more")
    best: Quiet[_Result] | None = None
    for count in range(1, tries + 1):
        if count > 1:
            time.sleep(pause_s * (count - 1))
        with meter() as watch:
            value = block()
        found = watch.disturbance
        if best is None or found.level < best.disturbance.level:
            best = Quiet(value=value, disturbance=found, tries=count)
        if found.reason(most_share=most_share) is None:
            return Quiet(value=value, disturbance=found, tries=count)
    assert best is not None
    return Quiet(value=best.value, disturbance=best.disturbance, tries=tries)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a row says of the blocks it is made of: medians of their shares, and extremes.

    `reruns` are tries that were thrown away, `disturbed_blocks` those that no try was quiet for,
    and `why` what disturbed the worst of them.
    """

    blocks: int
    disturbed_blocks: int
    reruns: int
    foreign_share: float | None
    steal_share: float | None
    waited_share: float | None
    clock_min_mhz: float | None
    clock_max_mhz: float | None
    temperature_max_c: float | None
    throttle_events: int | None
    why: str = ""

    def refusal(self) -> str | None:
        """Return in one sentence why a row of such blocks is not to be published, else None."""
        if self.disturbed_blocks > MOST_DISTURBED * self.blocks:
            return (
                f"{self.disturbed_blocks} of {self.blocks} blocks were disturbed ({self.why}); "
                "measure again when the machine is quiet"
            )
        low, high = self.clock_min_mhz, self.clock_max_mhz
        if low is not None and high is not None and low < LEAST_CLOCK * high:
            return (
                f"the clock fell from {high:.0f} to {low:.0f} MHz while this was measured; fix it "
                "(cpupower frequency-set -g performance) or let the machine cool"
            )
        return None


def conditions_of(blocks: Sequence[Quiet[_Result]]) -> Conditions:
    """Sum up what disturbed the blocks of one row."""
    if not blocks:
        raise UsageError("there are no blocks; measure first")
    found = [block.disturbance for block in blocks]
    reasons = [reason for one in found if (reason := one.reason()) is not None]
    worst = max(found, key=lambda one: one.level)
    clocks = [one.clock_mhz for one in found if one.clock_mhz is not None]
    heats = [one.temperature_c for one in found if one.temperature_c is not None]
    stops = [one.throttle_events for one in found if one.throttle_events is not None]
    return Conditions(
        blocks=len(blocks),
        disturbed_blocks=len(reasons),
        reruns=sum(block.tries - 1 for block in blocks),
        foreign_share=_median([one.foreign_share for one in found]),
        steal_share=_median([one.steal_share for one in found]),
        waited_share=_median([one.waited_share for one in found]),
        clock_min_mhz=min(clocks, default=None),
        clock_max_mhz=max(clocks, default=None),
        temperature_max_c=max(heats, default=None),
        throttle_events=sum(stops) if stops else None,
        why=(worst.reason() or reasons[0]) if reasons else "",
    )


def _median(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(statistics.median(known), 4) if known else None
