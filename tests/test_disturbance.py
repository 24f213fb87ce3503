"""The meter of foreign load, on made-up /proc and /sys folders, and once on this machine's own."""

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litezoo.benchmarks import disturbance as module
from litezoo.benchmarks.disturbance import (
    Disturbance,
    Meter,
    Quiet,
    conditions_of,
    run_quietly,
)
from litezoo.models.errors import UsageError

COLUMNS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest")


class System:
    """A machine's /proc and /sys, whose counters a test moves on."""

    def __init__(self, root, *, cpus=(0, 1)):
        self.proc, self.sys = root / "proc", root / "sys"
        self.ticks = {cpu: dict.fromkeys(COLUMNS, 100) for cpu in cpus}
        self.own, self.now = 50, 1000.0
        (self.proc / "self/task").mkdir(parents=True)
        self.sys.mkdir()
        self.spend()

    def perf_counter(self):
        return self.now

    def put(self, where, text):
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(f"{text}\n")

    def spend(self, *, seconds=0.0, own=0, **of_cpus):
        """Let time pass: spend(seconds=1, own=30, cpu0={"user": 90, "idle": 10})."""
        self.now += seconds
        self.own += own
        for cpu, ticks in of_cpus.items():
            for column, count in ticks.items():
                self.ticks[int(cpu.removeprefix("cpu"))][column] += count
        lines = ["cpu  1 2 3 4 5 6 7 8 9 0"]
        lines += [
            f"cpu{cpu} {' '.join(map(str, ticks.values()))} 0" for cpu, ticks in self.ticks.items()
        ]
        self.put(self.proc / "stat", "\n".join([*lines, "intr 12 3", "ctxt 99"]))
        half, rest = self.own // 2, self.own - self.own // 2
        self.put(
            self.proc / "self/stat",
            f"4711 (a (b) 3 c) R 1 1 1 0 -1 4 9 0 0 0 {half} {rest} 7 7 20 0 1 0 5",
        )

    def thread(self, number, *, waited_ns):
        self.put(self.proc / f"self/task/{number}/schedstat", f"123456 {waited_ns} 7")

    def meter(self, *cpus):
        return Meter(cpus=cpus or (0,), proc=self.proc, sys=self.sys)


@pytest.fixture
def system(tmp_path, monkeypatch):
    made = System(tmp_path)
    monkeypatch.setattr(module, "time", made)
    return made


# ----------------------------------------------------------------------- ticks


def test_foreign_is_what_is_busy_and_not_ours(system):
    with system.meter(0) as meter:
        system.spend(seconds=0.2, own=4, cpu0={"user": 9, "system": 3, "idle": 8})
    assert meter.foreign_share == meter.disturbance.foreign_share == pytest.approx(8 / 20)
    assert meter.disturbance.seconds == pytest.approx(0.2)
    assert meter.disturbance.reason() == "other programs took 40 % of CPU 0"


def test_our_own_threads_disturb_nobody(system):
    with system.meter(0, 1) as meter:
        system.spend(seconds=1, own=200, cpu0={"user": 100}, cpu1={"user": 60, "system": 40})
    assert meter.foreign_share == 0
    assert meter.disturbance.reason() is None


def test_stolen_time_is_the_hosts_and_not_a_programs(system):
    with system.meter(0) as meter:
        system.spend(seconds=1, own=70, cpu0={"user": 70, "steal": 30})
    assert (meter.foreign_share, meter.steal_share) == (0, 0.3)
    assert meter.disturbance.reason() == "the host took 30 % of CPU 0 for other machines"


def test_interrupts_are_foreign_and_waiting_for_a_disk_is_not(system):
    with system.meter(0) as meter:
        system.spend(seconds=1, cpu0={"irq": 10, "softirq": 15, "iowait": 40, "idle": 35})
    assert meter.foreign_share == 0.25


def test_a_guests_time_is_not_counted_twice(system):
    with system.meter(0) as meter:
        system.spend(seconds=1, cpu0={"user": 50, "guest": 50, "idle": 50})
    assert meter.foreign_share == 0.5


def test_a_counter_that_runs_backwards_counts_as_none(system):
    """Linux says so of iowait."""
    with system.meter(0) as meter:
        system.spend(seconds=1, own=50, cpu0={"iowait": -30, "user": 50, "idle": 50})
    assert meter.foreign_share == 0


def test_other_cpus_are_told_apart(system):
    with system.meter(0) as meter:
        system.spend(seconds=1, own=100, cpu0={"user": 100}, cpu1={"user": 80, "idle": 20})
    found = meter.disturbance
    assert (found.foreign_share, found.elsewhere_share) == (0, 0.8)
    assert found.reason() is None, "what runs elsewhere is said, and does not repeat a block"


def test_a_cpu_that_comes_online_meanwhile_is_left_out(system):
    with system.meter(0, 1, 2) as meter:
        system.ticks[2] = dict.fromkeys(COLUMNS, 5000)
        system.spend(seconds=1, own=100, cpu0={"user": 100}, cpu1={"idle": 100})
    assert meter.foreign_share == 0


def test_what_ticks_cannot_tell_is_not_held_against_a_block(system):
    """Two ticks of twenty on one CPU: the edges of the block can be the cause."""
    with system.meter(0) as meter:
        system.spend(seconds=0.2, own=16, cpu0={"user": 18, "idle": 2})
    found = meter.disturbance
    assert (found.foreign_share, found.resolution_share) == (0.1, 0.1)
    assert found.reason() is None
    with system.meter(0) as meter:
        system.spend(seconds=2, own=160, cpu0={"user": 180, "idle": 20})
    assert meter.disturbance.reason() == "other programs took 10 % of CPU 0"


@settings(max_examples=40, deadline=None)
@given(
    spent=st.lists(st.tuples(*[st.integers(0, 500)] * 8), min_size=1, max_size=4),
    own_share=st.floats(0, 1),
)
def test_the_shares_add_up_to_all_of_the_time(spent, own_share):
    with tempfile.TemporaryDirectory() as folder:
        system = System(Path(folder), cpus=range(len(spent)))
        own = round(own_share * sum(t[0] + t[1] + t[2] for t in spent))
        with system.meter(*range(len(spent))) as meter:
            system.spend(
                own=own,
                **{f"cpu{i}": dict(zip(COLUMNS, t, strict=False)) for i, t in enumerate(spent)},
            )
        found, total = meter.disturbance, sum(map(sum, spent))
        if not total:
            assert found.foreign_share is None and found.why_not["foreign_share"]
            return
        idle = sum(t[3] + t[4] for t in spent)
        parts = own / total + found.foreign_share + found.steal_share + idle / total
        assert math.isclose(parts, 1, abs_tol=1e-3)
        assert 0 <= found.level <= 1


# ----------------------------------------------------------------------- what ticks do not say


def test_waiting_for_a_cpu_is_measured_in_nanoseconds(system):
    system.thread(11, waited_ns=5_000_000)
    system.thread(12, waited_ns=0)
    with system.meter(0) as meter:
        system.thread(11, waited_ns=25_000_000)
        system.thread(13, waited_ns=4_000_000)  # started meanwhile
        (system.proc / "self/task/12/schedstat").unlink()  # ended meanwhile
        system.spend(seconds=0.2, own=20, cpu0={"user": 20})
    assert meter.disturbance.waited_share == pytest.approx(24 / 200)
    assert meter.disturbance.reason() == ("our threads waited for 12 % of the time for CPU 0")


@pytest.mark.parametrize(
    ("file", "key", "per_second"),
    [("cpu.stat", "throttled_usec", 10**6), ("cpu/cpu.stat", "throttled_time", 10**9)],
)
def test_a_containers_quota_is_found(system, file, key, per_second):
    stat = system.sys / "fs/cgroup" / file
    system.put(stat, f"nr_periods 5\nnr_throttled 1\n{key} {3 * per_second}")
    with system.meter(0, 1) as meter:
        system.put(stat, f"nr_periods 9\nnr_throttled 3\n{key} {3.5 * per_second:.0f}")
        system.spend(seconds=1, own=100, cpu0={"user": 50}, cpu1={"user": 50})
    assert meter.disturbance.quota_share == 0.25
    assert (
        meter.disturbance.reason() == "the container's CPU quota stopped us for 25 % of CPUs 0, 1"
    )


def test_without_a_quota_there_is_no_share(system):
    system.put(system.sys / "fs/cgroup/cpu.stat", "usage_usec 5")
    with system.meter() as meter:
        pass
    assert meter.disturbance.quota_share is None


def test_heat_stops_of_these_cpus_are_counted(system):
    counts = {cpu: system.sys / f"devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count"
              for cpu in (0, 1)}  # fmt: skip
    for file in counts.values():
        system.put(file, 7)
    with system.meter(0) as meter:
        system.put(counts[0], 9)
        system.put(counts[1], 99)
        system.spend(seconds=1, own=100, cpu0={"user": 100})
    assert meter.disturbance.throttle_events == 2
    assert meter.disturbance.reason() == "heat slowed CPU 0 2 times"


def test_the_clock_is_cpufreqs(system):
    for cpu, khz in ((0, 3_000_000), (1, 2_000_000)):
        system.put(system.sys / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", khz)
    with system.meter(0, 1) as both, system.meter(1) as one:
        pass
    assert (both.clock_mhz, one.clock_mhz) == (2500, 2000)


def test_the_clock_is_cpuinfos_where_there_is_no_cpufreq(system):
    cpus = [
        f"processor\t: {cpu}\nmodel name\t: Y 2.00GHz\ncpu MHz\t\t: {mhz}\nflags\t: fpu\n"
        for cpu, mhz in ((0, 2300.0), (1, 3100.5))
    ]
    system.put(system.proc / "cpuinfo", "\n".join(cpus))
    with system.meter(1) as meter:
        pass
    assert meter.clock_mhz == 3100.5


def test_the_temperature_is_the_cpus_hottest(system):
    for chip, name, values in (
        ("hwmon0", "nvme", [90_000]),
        ("hwmon1", "coretemp", [41_000, 67_500]),
    ):
        system.put(system.sys / f"class/hwmon/{chip}/name", name)
        for index, value in enumerate(values, 1):
            system.put(system.sys / f"class/hwmon/{chip}/temp{index}_input", value)
    with system.meter() as meter:
        pass
    assert meter.disturbance.temperature_c == 67.5


def test_the_temperature_is_a_cpu_zones_where_there_is_no_chip(system):
    for zone, kind, value in (("0", "gpu-thermal", 88_000), ("1", "cpu-thermal", 52_100)):
        system.put(system.sys / f"class/thermal/thermal_zone{zone}/type", kind)
        system.put(system.sys / f"class/thermal/thermal_zone{zone}/temp", value)
    with system.meter() as meter:
        pass
    assert meter.disturbance.temperature_c == 52.1


def test_what_a_system_does_not_say_is_none_with_a_reason(tmp_path):
    with Meter(cpus=[0], proc=tmp_path / "proc", sys=tmp_path / "sys") as meter:
        pass
    found = meter.disturbance
    unknown = {"foreign_share", "steal_share", "waited_share", "clock_mhz", "temperature_c"}
    assert found.why_not.keys() == unknown
    assert all(getattr(found, name) is None for name in unknown)
    assert found.reason() is None and found.level == 0
    assert found.why_not["foreign_share"].startswith("this system has no ")


def test_a_sandbox_that_counts_nothing_is_not_called_quiet(system):
    system.ticks = {0: dict.fromkeys(COLUMNS, 0)}
    system.spend()
    with system.meter(0) as meter:
        system.spend(seconds=1)
    assert meter.foreign_share is None
    assert "counted no time of these CPUs" in meter.disturbance.why_not["foreign_share"]


# ----------------------------------------------------------------------- the meter as a tool


def test_a_meter_is_read_after_its_block(system):
    with system.meter() as meter, pytest.raises(UsageError, match="read it after"):
        meter.foreign_share  # noqa: B018
    assert meter.foreign_share is None or meter.foreign_share >= 0


def test_a_meter_needs_a_cpu():
    with pytest.raises(UsageError, match="cpus is empty"):
        Meter(cpus=[])


def test_a_meter_can_be_used_again(system):
    meter = system.meter(0)
    shares = []
    for busy in (100, 0):
        with meter:
            system.spend(seconds=1, cpu0={"user": busy, "idle": 100 - busy})
        shares.append(meter.foreign_share)
    assert shares == [1, 0]


def test_an_error_in_the_block_is_not_hidden(system):
    meter = system.meter(0)
    with pytest.raises(ZeroDivisionError), meter:
        1 / 0  # noqa: B018
    assert meter.disturbance.cpus == (0,)


def test_a_meter_reads_this_machine():
    with Meter() as meter:
        sum(range(100_000))
    found = meter.disturbance
    assert found.seconds > 0 and found.cpus
    for name in ("foreign_share", "steal_share", "waited_share"):
        assert (getattr(found, name) is None) == (name in found.why_not)
        assert getattr(found, name) is None or getattr(found, name) >= 0


# ----------------------------------------------------------------------- blocks run again


class Scripted:
    """Meters whose blocks are disturbed as told, one after the other."""

    def __init__(self, monkeypatch, *shares):
        self.shares, self.slept = list(shares), []
        monkeypatch.setattr(
            module, "time", SimpleNamespace(sleep=self.slept.append, perf_counter=lambda: 0.0)
        )

    def __call__(self):
        share = self.shares.pop(0)

        class Told(Meter):
            @property
            def disturbance(self):
                return Disturbance(seconds=0.2, cpus=(0,), foreign_share=share)

        return Told()


def count(times):
    """A block that returns 1, 2, ..."""
    times.append(len(times) + 1)
    return times[-1]


def test_a_quiet_block_runs_once(monkeypatch):
    meters = Scripted(monkeypatch, 0.01)
    quiet = run_quietly(lambda: "done", meter=meters)
    assert (quiet.value, quiet.tries, quiet.disturbance.foreign_share) == ("done", 1, 0.01)
    assert meters.slept == []


def test_a_disturbed_block_runs_again_until_it_is_quiet(monkeypatch):
    meters, times = Scripted(monkeypatch, 0.5, 0.3, 0.02, 0.0), []
    quiet = run_quietly(lambda: count(times), tries=4, pause_s=0.1, meter=meters)
    assert (quiet.value, quiet.tries, times) == (3, 3, [1, 2, 3])
    assert meters.slept == pytest.approx([0.1, 0.2])


def test_the_least_disturbed_try_is_kept(monkeypatch):
    meters, times = Scripted(monkeypatch, 0.5, 0.2, 0.4), []
    quiet = run_quietly(lambda: count(times), meter=meters)
    assert (quiet.value, quiet.tries, quiet.disturbance.foreign_share) == (2, 3, 0.2)
    assert quiet.disturbance.reason() == "other programs took 20 % of CPU 0"


def test_what_disturbs_can_be_chosen(monkeypatch):
    quiet = run_quietly(lambda: 0, most_share=0.6, meter=Scripted(monkeypatch, 0.5))
    assert quiet.tries == 1


def test_a_block_needs_a_try():
    with pytest.raises(UsageError, match="tries is 0"):
        run_quietly(lambda: 0, tries=0)


# ----------------------------------------------------------------------- what a row says of it


def block(foreign, *, tries=1, **values):
    found = Disturbance(seconds=0.2, cpus=(0, 1), foreign_share=foreign, **values)
    return Quiet(value=[1.0], disturbance=found, tries=tries)


def test_a_row_says_how_its_blocks_were_disturbed():
    found = conditions_of(
        [
            block(0.01, steal_share=0.0, clock_mhz=3000, temperature_c=55, throttle_events=0),
            block(0.02, tries=2, clock_mhz=2900, temperature_c=60, throttle_events=0),
            block(0.30, tries=3, steal_share=0.02, clock_mhz=2950, throttle_events=1),
        ]
    )
    assert (found.blocks, found.disturbed_blocks, found.reruns) == (3, 1, 3)
    assert (found.foreign_share, found.steal_share, found.waited_share) == (0.02, 0.01, None)
    assert (found.clock_min_mhz, found.clock_max_mhz, found.temperature_max_c) == (2900, 3000, 60)
    assert found.throttle_events == 1
    assert found.why == "other programs took 30 % of CPUs 0, 1"
    assert found.refusal() is None


def test_a_row_of_disturbed_blocks_is_refused():
    found = conditions_of([block(0.4), block(0.6), block(0.0)])
    assert found.refusal() == (
        "2 of 3 blocks were disturbed (other programs took 60 % of CPUs 0, 1); measure again when "
        "the machine is quiet"
    )


def test_heat_alone_is_a_reason():
    found = conditions_of([block(0.0, throttle_events=2), block(0.04)])
    assert (found.disturbed_blocks, found.why) == (1, "heat slowed CPUs 0, 1 2 times")


def test_a_row_whose_clock_fell_is_refused():
    found = conditions_of([block(0.0, clock_mhz=3000), block(0.0, clock_mhz=2600)])
    assert found.refusal().startswith("the clock fell from 3000 to 2600 MHz while")
    assert conditions_of([block(0.0, clock_mhz=3000), block(0.0)]).refusal() is None


def test_a_row_where_nothing_is_known_is_not_refused():
    found = conditions_of([block(None), block(None)])
    assert (found.foreign_share, found.clock_min_mhz, found.why) == (None, None, "")
    assert found.refusal() is None


def test_no_blocks_are_no_row():
    with pytest.raises(UsageError, match="there are no blocks"):
        conditions_of([])
