"""GPU counters without a GPU: NVIDIA's own Python bindings on a driver that is made up.

`pynvml` is the real module: its names, its structures, its error classes. Only the C library below
it is a stand-in, which takes what ctypes gives it and answers as NVML's reference says. The
answers are made up, none was recorded from a GPU.
"""

import ast
import ctypes
import dataclasses
import itertools
import json
import math
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pynvml = pytest.importorskip("pynvml")

from litezoo.benchmarks import gpu_counters, gpu_demo  # noqa: E402
from litezoo.benchmarks.gpu_counters import (  # noqa: E402
    KINDS,
    GpuCounters,
    KernelProfile,
    Work,
    achieve,
    explain,
    find_device,
    kernel_kind,
    kernel_shares,
    profile_kernels,
    summarize_trace,
    watch_gpu,
    watch_runs,
)
from litezoo.benchmarks.gpu_demo import (  # noqa: E402
    CASES,
    COLUMNS,
    append_truth,
    columns_of,
    count_work,
    keep_busy,
    make_row,
    measure_truth,
    read_truth,
    write_picture,
)
from litezoo.benchmarks.machine import Machine  # noqa: E402
from litezoo.models.catalogue import get_spec  # noqa: E402
from litezoo.models.errors import CheckFailed, MissingError, UsageError  # noqa: E402
from litezoo.recipes.devices import get_device  # noqa: E402

SOURCE = Path(gpu_counters.__file__)
H200 = get_device("h200")
UUID = "GPU-11111111-2222-3333-4444-555555555555"
SLICES = ("MIG-aaaaaaaa-0000-0000-0000-000000000000", "MIG-bbbbbbbb-0000-0000-0000-000000000000")
METRICS = {"engine": 1, "sm": 2, "occupancy": 3, "tensor": 5, "dram": 10}


# ----------------------------------------------------------------------- the stand-in


def address(pointer):
    return ctypes.cast(pointer, ctypes.c_void_p).value


def point(reference, number):
    """Write an address where a C function returns a handle."""
    ctypes.memmove(
        ctypes.addressof(reference._obj), ctypes.byref(ctypes.c_void_p(number)), ctypes.sizeof(
            ctypes.c_void_p)
    )  # fmt: skip


class Driver:
    """libnvidia-ml as ctypes sees it: C arguments in, NVML's return code out.

    `refuses` maps a function to the code it returns; a function in `absent` is not in the library.
    Times are `now`; `gpm` are the mean percentages that GPM counts.
    """

    def __init__(self):
        self.now = 100.0
        self.gpus, self.slices, self.mig = 1, (), False
        self.name = "NVIDIA H200"
        self.has_gpm, self.gpm, self.gpm_codes = True, dict.fromkeys(METRICS, 50.0), {}
        self.util = self.power_w = lambda now: 100
        self.energy_j = lambda now: 1e6 + 400 * now
        self.reasons = lambda now: 0
        self.refuses, self.absent, self.calls, self.samples = {}, set(), [], {}
        self.scripted_s = ()
        self.asked = threading.Event()

    def __getattr__(self, function):
        """Return a C function, as a CDLL does."""
        if not function.startswith("nvml") or function in self.absent:
            raise AttributeError(function)
        try:
            answer = object.__getattribute__(self, f"_{function}")
        except AttributeError:
            pytest.fail(f"the stand-in knows no {function}")

        def call(*arguments):
            self.calls.append(function)
            if function in self.refuses:
                return self.refuses[function]
            return answer(*arguments) or 0

        return call

    # what is asked of NVML itself

    def perf_counter(self):
        return self.now

    def _nvmlInitWithFlags(self, flags):
        pass

    def _nvmlShutdown(self):
        pass

    def _nvmlErrorString(self, code):
        return b"an error of the stand-in"

    def _nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"570.86.15"

    def _nvmlDeviceGetCount_v2(self, count):
        count._obj.value = self.gpus

    # handles: a GPU is its number + 1000, a slice + 2000

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        point(handle, 1000 + index.value)

    def _nvmlDeviceGetHandleByUUID(self, uuid, handle):
        names = {
            UUID: 1000,
            **{name: 2000 + i for i, name in enumerate(SLICES[: len(self.slices)])},
        }
        found = names.get(uuid.value.decode())
        if found is None:
            return pynvml.NVML_ERROR_NOT_FOUND
        point(handle, found)

    def _nvmlDeviceIsMigDeviceHandle(self, handle, answer):
        answer._obj.value = int(address(handle) >= 2000)

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle, gpu):
        point(gpu, 1000)

    def _nvmlDeviceGetMigMode(self, handle, now, later):
        now._obj.value = later._obj.value = int(self.mig)

    def _nvmlDeviceGetMaxMigDeviceCount(self, handle, count):
        count._obj.value = 7

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, handle, place, found):
        if place.value not in self.slices:
            return pynvml.NVML_ERROR_NOT_FOUND
        point(found, 2000 + self.slices.index(place.value))

    def _nvmlDeviceGetGpuInstanceId(self, handle, number):
        assert address(handle) >= 2000
        number._obj.value = 9

    def _nvmlDeviceGetName(self, handle, text, size):
        text.value = (self.name + (" MIG 1g.18gb" if address(handle) >= 2000 else "")).encode()

    def _nvmlDeviceGetUUID(self, handle, text, size):
        number = address(handle)
        text.value = (SLICES[number - 2000] if number >= 2000 else UUID).encode()

    # readings, of whole GPUs only

    def _nvmlDeviceGetUtilizationRates(self, handle, rates):
        assert address(handle) == 1000
        rates._obj.gpu, rates._obj.memory = round(self.util(self.now)), 12
        if self.calls.count("nvmlDeviceGetUtilizationRates") >= 5:
            self.asked.set()

    def _nvmlDeviceGetPowerUsage(self, handle, milliwatts):
        milliwatts._obj.value = round(1e3 * self.power_w(self.now))

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle, milliwatts):
        milliwatts._obj.value = 700_000

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        millijoules._obj.value = round(1e3 * self.energy_j(self.now))

    def _nvmlDeviceGetTemperature(self, handle, sensor, celsius):
        assert address(handle) == 1000 and sensor.value == pynvml.NVML_TEMPERATURE_GPU
        celsius._obj.value = 40 + round(self.now - 100)

    def _nvmlDeviceGetClockInfo(self, handle, clock, mhz):
        assert clock.value == pynvml.NVML_CLOCK_SM
        mhz._obj.value = 1755

    def _nvmlDeviceGetMaxClockInfo(self, handle, clock, mhz):
        mhz._obj.value = 1980

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle, bits):
        bits._obj.value = self.reasons(self.now)

    _nvmlDeviceGetCurrentClocksThrottleReasons = _nvmlDeviceGetCurrentClocksEventReasons

    # GPM

    def _nvmlGpmQueryDeviceSupport(self, handle, support):
        assert support._obj.version == pynvml.NVML_GPM_SUPPORT_VERSION
        support._obj.isSupportedDevice = int(self.has_gpm)

    def _nvmlGpmSampleAlloc(self, sample):
        number = 5000 + self.calls.count("nvmlGpmSampleAlloc")
        self.samples[number] = None
        point(sample, number)

    def _nvmlGpmSampleFree(self, sample):
        del self.samples[address(sample)]

    def _nvmlGpmSampleGet(self, handle, sample):
        assert address(handle) == 1000 and not self.mig
        self.samples[address(sample)] = ("gpu", self.now)

    def _nvmlGpmMigSampleGet(self, handle, instance, sample):
        assert (address(handle), instance) == (1000, 9)
        self.samples[address(sample)] = ("slice", self.now)

    def _nvmlGpmMetricsGet(self, reference):
        get = reference._obj
        assert get.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        first, last = (self.samples[address(s)] for s in (get.sample1, get.sample2))
        assert first[0] == last[0] and first[1] < last[1], "two samples, the older one first"
        by_id = {METRICS[name]: name for name in METRICS}
        for index in range(get.numMetrics):
            metric = get.metrics[index]
            name = by_id[metric.metricId]
            metric.nvmlReturn = self.gpm_codes.get(name, 0)
            metric.value = self.gpm[name]


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(pynvml, "nvmlLib", made)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(gpu_counters, "time", made)

    def poll(watched, stop, period_s):
        for moment in made.scripted_s:
            made.now = 100 + moment
            watched.sample()
        made.asked.set()

    monkeypatch.setattr(gpu_counters, "_poll", poll)
    return made


def watched(driver, *, seconds=3.0, gpu=0, at_s=(0.5, 1.5, 2.5)):
    """Watch for `seconds`, with readings at the start, at these moments, and at the end."""
    driver.now, driver.scripted_s = 100.0, at_s
    driver.asked.clear()
    with watch_gpu(gpu) as watch:
        assert driver.asked.wait(10)
        driver.now = 100 + seconds
    return watch.counters


# ----------------------------------------------------------------------- names


def names_used(source):
    """Return the names of NVML that a source uses, as attributes or in strings."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nvml", "self._nvml"):
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.update(re.findall(r"^(?:nvml[A-Z]\w+|NVML_\w+)$", node.value))
    return used


def test_every_name_of_nvml_is_in_nvidias_module():
    used = names_used(SOURCE.read_text(encoding="utf-8"))
    assert {"nvmlGpmMetricsGet", "NVML_GPM_METRIC_SM_UTIL", "c_nvmlGpmMetricsGet_t",
            "nvmlClocksThrottleReasonSwPowerCap", "NVMLError_NotSupported"} <= used  # fmt: skip
    assert {name for name in used if not hasattr(pynvml, name)} == set()


def test_the_name_test_sees_an_invented_name():
    used = names_used("nvml.nvmlGpmMetricsFetch(1); self._nvml.NVML_X; a = 'NVML_GPM_METRIC_Y'")
    assert used == {"nvmlGpmMetricsFetch", "NVML_X", "NVML_GPM_METRIC_Y"}
    assert not any(hasattr(pynvml, name) for name in used)


def test_the_stand_ins_metrics_are_nvidias():
    assert METRICS == {
        "engine": pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
        "sm": pynvml.NVML_GPM_METRIC_SM_UTIL,
        "occupancy": pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
        "tensor": pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
        "dram": pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
    }


# ----------------------------------------------------------------------- watching


def test_gpu_util_stands_next_to_what_it_hides(driver):
    driver.gpm = {"engine": 99.5, "sm": 0.76, "occupancy": 0.4, "tensor": 0.0, "dram": 1.25}
    counters = watched(driver)
    assert counters == GpuCounters(
        gpu="NVIDIA H200",
        uuid=UUID,
        driver="570.86.15",
        seconds=3,
        samples=5,
        gpu_util_percent=100,
        engine_active_percent=99.5,
        sm_active_percent=0.76,
        sm_occupancy_percent=0.4,
        tensor_active_percent=0,
        dram_active_percent=1.25,
        power_w=400,
        power_limit_w=700,
        energy_j=1200,
        temperature_c=43,
        sm_clock_mhz=1755,
        sm_clock_max_mhz=1980,
    )
    assert explain(counters)[0] == (
        "GPU-Util reads 100 %, but the SMs were active 0.76 % of the time: it counts the time in "
        "which any kernel runs, on one SM or on all."
    )


def test_watching_changes_no_setting_and_leaves_nothing_behind(driver):
    watched(driver)
    assert not [name for name in driver.calls if re.search("Set[A-Z]|Reset|Clear", name)]
    assert driver.samples == {}, "GPM's samples are given back"
    assert driver.calls.count("nvmlInitWithFlags") == driver.calls.count("nvmlShutdown") == 1
    assert driver.calls[-1] == "nvmlShutdown"


def test_a_thread_reads_while_the_block_runs(driver, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(pynvml, "nvmlLib", driver)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    driver.has_gpm = False  # the stand-in's time stands still here
    with watch_gpu(period_s=0.001) as watch:
        assert driver.asked.wait(10)
    assert watch.counters.samples >= 5
    alive = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("watch_gpu") for name in alive)


def test_readings_of_the_first_second_are_left_out(driver):
    """GPU-Util and power look back up to a second: at idle, before the block."""
    driver.absent = {"nvmlDeviceGetTotalEnergyConsumption"}
    driver.util = lambda now: 0 if now < 101 else 80 if now < 102 else 100
    driver.power_w = lambda now: 90 if now < 101 else 300
    counters = watched(driver, seconds=3, at_s=(0.2, 0.9, 1.2, 2.2))
    assert counters.gpu_util_percent == pytest.approx((80 + 100 + 100) / 3, abs=1e-3)
    assert counters.power_w == 300


def test_a_watch_of_less_than_a_second_takes_its_last_reading(driver):
    driver.util = lambda now: 10 if now < 100.4 else 70
    counters = watched(driver, seconds=0.5, at_s=(0.2,))
    assert counters.gpu_util_percent == 70
    assert counters.energy_j is None
    assert counters.why_not["energy_j"] == ("the energy counter needs 1 s, and this was 0.500 s")
    assert counters.sm_active_percent == 50, "GPM needs a tenth of a second only"


def test_gpm_needs_a_tenth_of_a_second(driver):
    counters = watched(driver, seconds=0.05, at_s=())
    assert counters.sm_active_percent is None
    assert counters.why_not["sm_active_percent"] == "GPM needs 0.1 s, and this was 0.050 s"


def test_power_is_energy_over_time_where_energy_is_counted(driver):
    driver.power_w = lambda now: 333
    driver.energy_j = lambda now: 5000 + 250 * (now - 100)
    counters = watched(driver, seconds=4)
    assert (counters.energy_j, counters.power_w) == (1000, 250)


def test_an_energy_counter_that_was_set_back_is_no_energy(driver):
    driver.energy_j = lambda now: 5000 - now
    counters = watched(driver)
    assert counters.energy_j is None and "set back" in counters.why_not["energy_j"]
    assert counters.power_w == 100, "the mean of the readings instead"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: setattr(d, "has_gpm", False), "this one has none"),
        (lambda d: d.refuses.update(nvmlGpmQueryDeviceSupport=3), "NVML: Not Supported"),
        (lambda d: d.absent.add("nvmlGpmQueryDeviceSupport"), "NVML: Function Not Found"),
        (lambda d: d.refuses.update(nvmlGpmQueryDeviceSupport=4), "Insufficient Permissions"),
        (lambda d: d.refuses.update(nvmlGpmSampleAlloc=20), "NVML says: Insufficient Memory"),
        (lambda d: d.refuses.update(nvmlGpmSampleGet=999), "NVML says: Unknown Error"),
        (lambda d: d.refuses.update(nvmlGpmMetricsGet=2), "NVML says: Invalid Argument"),
    ],
)
def test_without_gpm_the_rest_is_there_and_the_reason_is_said(driver, change, why):
    driver.name = "Tesla T4"
    change(driver)
    counters = watched(driver)
    assert counters.sm_active_percent is None and why in counters.why_not["sm_active_percent"]
    assert counters.gpu_util_percent == 100 and counters.energy_j == 1200
    lines = explain(counters)
    assert lines[0] == ("GPU-Util reads 100 %, which says that a kernel ran, not on how many SMs.")
    assert lines[-1].startswith("No engine activity, no SM activity, no SM occupancy,")
    assert driver.samples == {}


def test_a_metric_that_gpm_cannot_give_is_alone(driver):
    driver.gpm_codes = {"tensor": pynvml.NVML_ERROR_NOT_SUPPORTED}
    driver.gpm["dram"] = math.nan
    driver.gpm["sm"] = 100.4  # a rounding of the counters
    counters = watched(driver)
    assert counters.tensor_active_percent is None and counters.dram_active_percent is None
    assert counters.why_not == {
        "tensor_active_percent": "NVML says: Not Supported",
        "dram_active_percent": "GPM answered nan, which is no percentage",
    }
    assert (counters.sm_active_percent, counters.sm_occupancy_percent) == (100, 50)


def test_what_held_the_clock_back_is_said_in_words(driver):
    cap, heat = (pynvml.nvmlClocksThrottleReasonSwPowerCap,
                 pynvml.nvmlClocksThrottleReasonHwThermalSlowdown)  # fmt: skip
    driver.reasons = lambda now: cap | (heat if now > 102 else 0)
    counters = watched(driver, at_s=(1, 1.5, 2.5))
    assert counters.throttled == {"the power limit": 100, "heat (the chip)": 40}
    assert explain(counters)[-1] == (
        "Its clock was held back by the power limit (100 % of readings), heat (the chip) (40 % of "
        "readings), 1755 of 1980 MHz: compare with runs at the same clock only."
    )


def test_idling_and_a_chosen_clock_hold_nothing_back(driver):
    driver.reasons = lambda now: (
        pynvml.nvmlClocksThrottleReasonGpuIdle
        | pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting
    )
    assert watched(driver).throttled == {}


def test_an_older_driver_is_asked_by_the_older_name(driver):
    driver.absent = {"nvmlDeviceGetCurrentClocksEventReasons"}
    driver.reasons = lambda now: pynvml.nvmlClocksThrottleReasonSwPowerCap
    assert watched(driver).throttled == {"the power limit": 100}


def test_clock_reasons_that_nobody_tells_are_not_called_none(driver):
    driver.refuses = {"nvmlDeviceGetCurrentClocksEventReasons": 3}
    counters = watched(driver)
    assert counters.throttled == {} and counters.why_not == {
        "throttled": "NVML says: Not Supported"
    }
    assert explain(counters)[-1] == "No reasons for its clock: NVML says: Not Supported."


def test_a_gpu_that_is_lost_meanwhile_ends_no_measurement(driver):
    driver.scripted_s = (0.5,)
    with watch_gpu() as watch:
        assert driver.asked.wait(10)
        driver.now = 103
        lost = pynvml.NVML_ERROR_GPU_IS_LOST
        driver.refuses = {
            name.removeprefix("_"): lost
            for name in dir(Driver)
            if name.startswith(("_nvmlDevice", "_nvmlGpm"))
        }
    assert watch.counters.gpu == "unknown"
    assert watch.counters.gpu_util_percent == 100, "what was read before stands"
    assert watch.counters.why_not["energy_j"] == "NVML says: GPU is lost"


def test_runs_are_counted_while_they_are_watched(driver):
    def run():
        driver.now += 0.25

    runs, counters = watch_runs(run, seconds=2.0)
    assert (runs, counters.seconds, counters.energy_j) == (8, 2, 800)
    with pytest.raises(UsageError, match=r"seconds is 0\.5; power and energy need 1"):
        watch_runs(run, seconds=0.5)


# ----------------------------------------------------------------------- which GPU


def test_a_gpu_is_found_by_uuid_with_and_without_nvidias_prefix(driver):
    for uuid in (UUID, UUID.removeprefix("GPU-")):
        assert watched(driver, gpu=uuid).uuid == UUID


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (3, "there is no GPU 3; nvidia-smi numbers them 0 to 0"),
        (-1, "there is no GPU -1; nvidia-smi numbers them 0 to 0"),
        ("GPU-nowhere", "there is no GPU GPU-nowhere; the UUIDs are what `nvidia-smi -L` lists"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_users_mistake(driver, gpu, words):
    with pytest.raises(UsageError) as error, watch_gpu(gpu):
        pass
    assert str(error.value) == words
    assert driver.calls[-1] == "nvmlShutdown"


def test_a_slice_of_a_gpu_has_gpm_and_no_gpu_util(driver):
    driver.mig, driver.slices = True, (4,)
    driver.gpm["engine"] = 97.0
    driver.gpm["sm"] = 8.0
    counters = watched(driver)
    assert counters.uuid == SLICES[0] and counters.gpu == "NVIDIA H200 MIG 1g.18gb"
    assert "nvmlGpmMigSampleGet" in driver.calls and "nvmlGpmSampleGet" not in driver.calls
    assert counters.sm_active_percent == 8 and counters.gpu_util_percent is None
    assert counters.energy_j is None and counters.power_w is None
    assert counters.temperature_c == 43
    assert explain(counters)[0].startswith("Engine activity (GPM) reads 97 %, but the SMs were")
    assert explain(counters)[-1] == (
        "No GPU-Util, no power, no power limit, no energy: it is counted for whole GPUs, and this "
        "is a MIG slice."
    )


def test_one_of_several_slices_has_to_be_named(driver):
    driver.mig, driver.slices = True, (0, 4)
    with pytest.raises(UsageError, match="cut into 2 MIG slices; name one: " + ", ".join(SLICES)):
        watched(driver)
    assert watched(driver, gpu=SLICES[1]).uuid == SLICES[1]


def test_a_gpu_in_mig_mode_without_slices_is_watched_as_a_whole(driver):
    driver.mig = True
    driver._nvmlGpmSampleGet = lambda handle, sample: pynvml.NVML_ERROR_NOT_SUPPORTED
    counters = watched(driver)
    assert counters.uuid == UUID and counters.gpu_util_percent == 100


def test_a_gpu_that_knows_no_mig_is_watched(driver):
    driver.absent = {"nvmlDeviceIsMigDeviceHandle"}
    driver.refuses = {"nvmlDeviceGetMigMode": pynvml.NVML_ERROR_NOT_SUPPORTED}
    assert watched(driver).gpu_util_percent == 100


def test_a_machine_without_a_gpu_says_what_is_missing(driver):
    driver.gpus = 0
    with pytest.raises(MissingError, match="NVML finds no NVIDIA GPU here; run this where"):
        watched(driver)


def test_a_machine_without_a_driver_says_what_is_missing(driver):
    driver.refuses = {"nvmlInitWithFlags": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
    with pytest.raises(MissingError) as error:
        watched(driver)
    assert str(error.value) == (
        "a GPU's counters need an NVIDIA driver, which does not answer here (Driver Not Loaded); "
        "run this where `nvidia-smi` works"
    )


def test_without_nvidias_module_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingError, match=re.escape("needs pynvml: pip install 'litezoo[gpu]'")):
        watch_gpu().__enter__()


def test_the_period_is_above_zero():
    with pytest.raises(UsageError, match="period_s is 0; the time between readings is above 0"):
        watch_gpu(period_s=0).__enter__()


def test_counters_are_read_after_the_block(driver):
    with watch_gpu() as watch, pytest.raises(UsageError, match="read the counters after the"):
        watch.counters  # noqa: B018


def test_an_error_in_the_block_is_not_hidden_and_everything_is_given_back(driver):
    with pytest.raises(ZeroDivisionError), watch_gpu() as watch:
        1 / 0  # noqa: B018
    assert driver.samples == {} and driver.calls[-1] == "nvmlShutdown"
    with pytest.raises(UsageError, match="not been watched to the end"):
        watch.counters  # noqa: B018


def test_an_error_in_the_reading_thread_is_not_hidden(driver, monkeypatch):
    def broken(watched, stop, period_s):
        raise RuntimeError("the thread broke")

    monkeypatch.setattr(gpu_counters, "_poll", broken)
    with pytest.raises(RuntimeError, match="the thread broke"), watch_gpu():
        pass
    assert driver.samples == {}


# ----------------------------------------------------------------------- work and peaks


def counters_of(**values):
    return GpuCounters(
        **{
            "gpu": "NVIDIA H200",
            "uuid": UUID,
            "driver": "1",
            "seconds": 2.0,
            "samples": 3,
            **values,
        }
    )


def test_work_is_set_against_the_device_files_peaks():
    counters = counters_of(dram_active_percent=10, energy_j=800)
    work = Work(images=4000, precision="fp16", flops=0.02 * 989.4e12, moved_bytes=9.6e11)
    done = achieve(counters, work, device=H200)
    assert done.images_per_s == 2000
    assert done.tera_flops_per_s == pytest.approx(9.894)
    assert done.flops_percent == pytest.approx(1)
    assert (done.moved_gb_per_s, done.moved_percent) == (480, pytest.approx(10))
    assert done.dram_gb_per_s == pytest.approx(480)
    assert done.energy_mj_per_image == 200


def test_what_has_no_peak_has_no_percentage():
    work = Work(images=0, precision="int4", flops=1e12, moved_bytes=1e9)
    for device in (H200, None):
        done = achieve(counters_of(energy_j=5), work, device=device)
        assert done.flops_percent is None and done.energy_mj_per_image is None
    assert (done.moved_percent, done.dram_gb_per_s) == (None, None)
    assert "0.5 TFLOP/s: no peak for int4 is known." in explain(
        counters_of(), work=work, device=H200
    )


@given(
    flops=st.floats(0, 1e16), seconds=st.floats(0.1, 1e3), times=st.floats(1, 100),
    images=st.integers(1, 10**6), energy=st.floats(0.1, 1e5),
)  # fmt: skip
def test_rates_fall_with_time_and_energy_per_image_does_not(flops, seconds, times, images, energy):
    work = Work(images=images, precision="fp16", flops=flops, moved_bytes=flops / 7)
    fast = achieve(counters_of(seconds=seconds, energy_j=energy), work, device=H200)
    slow = achieve(counters_of(seconds=seconds * times, energy_j=energy), work, device=H200)
    for name in ("images_per_s", "tera_flops_per_s", "flops_percent", "moved_percent"):
        assert getattr(fast, name) == pytest.approx(times * getattr(slow, name), rel=1e-9)
    assert fast.energy_mj_per_image == slow.energy_mj_per_image
    peak = H200.peak_tera_ops_per_s["fp16"]
    assert fast.flops_percent == pytest.approx(100 * fast.tera_flops_per_s / peak)


@pytest.mark.parametrize("wrong", [{"images": -1}, {"flops": -1.0}, {"moved_bytes": -1.0}])
def test_work_is_not_negative(wrong):
    work = Work(**{"images": 1, "precision": "fp16", "flops": 1.0, **wrong})
    with pytest.raises(UsageError, match="counts images, flops and bytes from 0 up"):
        achieve(counters_of(), work, device=None)


def test_a_watch_of_no_time_has_no_rates():
    work = Work(images=1, precision="fp16", flops=1.0)
    with pytest.raises(UsageError, match="watched for 0 s"):
        achieve(counters_of(seconds=0.0), work, device=None)


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA RTX A4000", "a4000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_gpus_device_file_is_found_by_its_name(gpu, device):
    found = find_device(gpu)
    assert (found and found.name) == device


# ----------------------------------------------------------------------- sentences


def test_a_busy_gpu_is_called_busy():
    counters = counters_of(
        gpu_util_percent=100, sm_active_percent=97, tensor_active_percent=62,
        dram_active_percent=21, sm_occupancy_percent=12.4, power_w=655, power_limit_w=700,
        energy_j=1310,
    )  # fmt: skip
    work = Work(images=0, precision="fp16", flops=1400e12)
    lines = explain(counters, work=work, device=H200)
    assert lines == [
        "GPU-Util reads 100 % and the SMs were active 97 % of the time: the kernels cover the GPU.",
        "Of the warps that fit, 12 % were there.",
        "The tensor cores worked 62 % of the time.",
        "DRAM was used at 21 % of its bandwidth: 1008 of 4800 GB/s.",
        "700 TFLOP/s of 989 (fp16, h200.yaml): 71 %.",
        "It drew 655 of 700 W.",
    ]


def test_a_gpu_that_waits_for_the_host_is_told_from_one_that_is_hardly_used():
    lines = explain(counters_of(gpu_util_percent=38, sm_active_percent=4.4))
    assert lines == [
        "GPU-Util reads 38 %: for 62 % of the time no kernel ran, the GPU waits for the host; the "
        "SMs were active 4.4 % of the time."
    ]


def test_idle_tensor_cores_and_caches_are_pointed_out():
    counters = counters_of(
        tensor_active_percent=1.5, dram_active_percent=2, energy_j=4, sm_active_percent=9
    )
    work = Work(images=1000, precision="fp16", flops=6e11, moved_bytes=1.2e12)
    lines = explain(counters, work=work, device=H200)
    assert lines == [
        "The SMs were active 9.0 % of the time.",
        "The tensor cores worked 1.5 % of the time, though the work is fp16.",
        "DRAM was used at 2.0 % of its bandwidth: 96 of 4800 GB/s.",
        "0.3 TFLOP/s of 989 (fp16, h200.yaml): 0.03 %.",
        "Kernels moved 600 GB/s by count, 12 % of DRAM's; DRAM gave 96 GB/s, the rest came from "
        "caches.",
        "An image took 4 mJ.",
    ]


def test_without_a_counter_the_launched_blocks_bound_the_activity():
    kernels = summarize_trace(
        {"traceEvents": [kernel("softmax", 0, 90, 1 / 132), kernel("gemm", 90, 10, 4.0)]}, runs=1
    )
    lines = explain(counters_of(gpu_util_percent=99), kernels=kernels)
    assert lines[:2] == [
        "GPU-Util reads 99 %, which says that a kernel ran, not on how many SMs.",
        "The launched blocks cover at most 11 % of the SMs.",
    ]
    assert lines[2] == "Kernel time: 10 % gemm, 90 % other; 2 kernels and 100 us a run."


# ----------------------------------------------------------------------- kernels


def kernel(name, start_us, duration_us, blocks_per_sm=None, *, cat="kernel"):
    """One event as torch's profiler writes it."""
    args = {"device": 0, "stream": 7, "grid": [1, 1, 1], "block": [128, 1, 1]}
    if blocks_per_sm is not None:
        args["blocks per SM"] = blocks_per_sm
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": start_us,
            "dur": duration_us, "args": args}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64",
         "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_64x64>",
         "convolution"),
        ("void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false>", "convolution"),
        ("volta_scudnn_128x64_relu_interior_nn_v1", "convolution"),
        ("turing_h1688cudnn_256x128_sliced1x2_ldg8_relu_exp_medium_nhwc_tn_v1", "convolution"),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(...)", "convolution"),
        ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::Half, "
         "int>(...)", "convolution"),
        ("void at::native::im2col_kernel<float>(long, float const*)", "convolution"),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_relu_f2f_stages_64x4_tn", "gemm"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_256x128_32x3_tn>",
         "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __half>(...)", "gemm"),
        ("void gemv2T_kernel_val<int, int, __half>(...)", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
         "element-wise"),
        ("void cudnn::bn_fw_inf_1C11_kernel_NHWC<__half, float, true, 1>(...)", "element-wise"),
        ("triton_poi_fused_hardtanh_0", "element-wise"),
        ("void onnxruntime::cuda::_BinaryElementWise<__half, OP_Add>(...)", "element-wise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>",
         "copy"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>(...)", "copy"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copy"),
        ("void cudnn::ops::convertTensor_kernel<float, __half, float>(...)", "copy"),
        ("void genericReformat::copyVectorizedKernel<double, float, __half, true>(...)", "copy"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 10>", "other"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::Half>>", "other"),
        ("void cudnn::ops::pooling_fw_4d_kernel<__half, float>(...)", "other"),
    ],
)  # fmt: skip
def test_a_kernels_kind_is_in_its_name(name, kind):
    assert kernel_kind(name) == kind


def test_a_trace_says_where_the_time_goes():
    profile = summarize_trace(
        {
            "traceEvents": [
                kernel("sm90_xmma_fprop_implicit_gemm", 100, 60, 2.0),
                kernel("nvjet_hsh_128", 160, 20, 0.5),
                kernel("relu_kernel", 190, 10, 0.25),
                kernel("Memcpy DtoH (Device -> Pageable)", 200, 10, cat="gpu_memcpy"),
                {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 500},
                {"ph": "M", "name": "process_name", "pid": 0},
                {"ph": "s", "cat": "kernel", "name": "arrow", "ts": 5},
            ]
        },
        runs=2,
    )
    assert profile == KernelProfile(
        runs=2,
        kernels_per_run=2,
        kernel_us_per_run=50,
        busy_percent=90.91,
        sm_reach_percent=80.56,  # (60 + 10 + 2.5) / 90
        shares={"convolution": 60, "gemm": 20, "element-wise": 10, "copy": 10, "other": 0},
        longest={
            "sm90_xmma_fprop_implicit_gemm": 60,
            "nvjet_hsh_128": 20,
            "relu_kernel": 10,
            "Memcpy DtoH (Device -> Pageable)": 10,
        },
    )


def test_kernels_side_by_side_are_busy_once():
    events = [kernel("a", 0, 10), kernel("b", 5, 5), kernel("c", 2, 18), kernel("d", 30, 10)]
    assert summarize_trace({"traceEvents": events}, runs=1).busy_percent == 75


def test_blocks_that_the_profiler_cannot_count_are_left_out():
    """Kineto writes "inf" where it knows no number of SMs, and nothing for a copy."""
    events = [kernel("a", 0, 10, "inf"), kernel("b", 10, 30, 0.5), kernel("c", 40, 60)]
    assert summarize_trace({"traceEvents": events}, runs=1).sm_reach_percent == 62.5
    assert summarize_trace({"traceEvents": events[2:]}, runs=1).sm_reach_percent is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["conv", "gemm", "relu", "copy", "what"]), st.floats(0, 1e6),
            st.floats(0.5, 1e4), st.floats(0, 64),
        ),
        min_size=1, max_size=30,
    )
)  # fmt: skip
def test_shares_are_of_one_whole(events):
    profile = summarize_trace({"traceEvents": [kernel(*event) for event in events]}, runs=3)
    assert tuple(profile.shares) == KINDS
    assert sum(profile.shares.values()) == pytest.approx(100, abs=0.05)
    assert 0 <= profile.busy_percent <= 100.01 and 0 <= profile.sm_reach_percent <= 100


def test_a_trace_without_a_kernel_says_what_may_be_wrong():
    with pytest.raises(MissingError, match="the profiler saw no kernel"):
        summarize_trace({"traceEvents": [{"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 9}]}, runs=1)


def test_kernel_times_need_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (lambda: profile_kernels(lambda: None), lambda: kernel_shares(abs, 1)):
        with pytest.raises(MissingError, match="kernel times need an NVIDIA GPU"):
            call()
    with pytest.raises(UsageError, match="runs is 0"):
        profile_kernels(lambda: None, runs=0)


def test_kernels_are_profiled_on_a_gpu(monkeypatch):
    """The steps around torch's profiler, with a trace in place of CUPTI's."""
    ran, synchronized = [], []

    class Profiler:
        def __init__(self, *, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            assert len(ran) == len(synchronized) == 1, "one run before, waited for"
            return self

        def __exit__(self, *error):
            assert len(synchronized) == 2, "the last run is waited for inside"

        def export_chrome_trace(self, file):
            Path(file).write_text(json.dumps({"traceEvents": [kernel("conv", 0, 8)] * 4}))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(1))
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    profile = profile_kernels(lambda: ran.append(1), runs=4)
    assert (len(ran), profile.kernels_per_run, profile.kernel_us_per_run) == (5, 1, 8)
    ran.clear()
    synchronized.clear()
    assert kernel_shares(ran.append, "images")["convolution"] == 100
    assert ran == ["images"] * 11


# ----------------------------------------------------------------------- the demonstration


def test_without_a_gpu_the_demonstration_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, words in (("13.0", "there is none here"), (None, "is built without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(MissingError) as error:
            measure_truth()
        assert words in str(error.value) and "litezoo bench --gpu-truth" in str(error.value)
        assert ". " not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"cases": ["gem"]}, "unknown case 'gem'; did you mean 'gemm'?"),
        ({"seconds": 1}, "seconds is 1; GPU-Util and energy need 2 or more"),
        ({"device": "h2000"}, "unknown device 'h2000'; did you mean 'h200'?"),
    ],
)
def test_a_mistake_is_found_before_a_gpu_is_looked_for(monkeypatch, wrong, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    with pytest.raises(UsageError, match=re.escape(words)):
        measure_truth(**wrong)


def test_a_gpu_number_that_pytorch_has_not_is_a_mistake(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="there is no GPU 2; PyTorch numbers them 0 to 1"):
        measure_truth(gpu=2)


def test_work_is_counted_by_operator():
    layer = torch.nn.Conv2d(4, 8, 3, padding=1, bias=True).eval()
    images = torch.zeros(2, 4, 10, 10)
    numbers = images.numel() + layer.weight.numel() + 8 + 2 * 8 * 100
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            flops, moved = count_work(lambda: layer(images))
            assert flops == 2 * 2 * 8 * 100 * 4 * 9
            assert moved == 4 * numbers
            _, with_relu = count_work(lambda: layer(images).relu_().view(-1))
            assert with_relu == moved + 4 * 2 * 1600, "in and out once more, and no view"


@pytest.fixture(scope="module")
def on_meta():
    """Every case built on the device that has shapes only."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu_demo, "_captured", lambda run: run)
    yield {name: gpu_demo._make_case(name, torch.device("meta")) for name in CASES}
    patch.undo()


def test_every_case_can_be_built_and_counted(on_meta):
    flops = {name: case.flops for name, case in on_meta.items()}
    assert flops["one-block"] == 0
    assert flops["gemm"] == 2 * 8192**3
    light, heavy = (get_spec(name).macs_m for name in ("mobilenetv2_100", "repvgg_a0"))
    assert flops["light-eager"] == flops["light-graph"] == pytest.approx(2e6 * light, rel=0.005)
    assert flops["heavy-batch"] == pytest.approx(256 * 2e6 * heavy, rel=0.005)
    assert {name: case.images for name, case in on_meta.items()} == {
        "one-block": 0, "light-eager": 1, "light-graph": 1, "heavy-batch": 256, "gemm": 0
    }  # fmt: skip
    assert on_meta["gemm"].moved_bytes == 3 * 2 * 8192**2, "the output is written, not read"
    assert on_meta["one-block"].moved_bytes == 2 * 4 * (4 << 20)
    assert all(case.name == name for name, case in on_meta.items())


def test_the_gpu_is_kept_busy_while_the_host_looks(monkeypatch):
    """The queue always holds a chunk more than what is waited for, and ends empty."""
    clock = Driver()
    monkeypatch.setattr(gpu_demo, "time", clock)
    queued, done, ahead = [], [0], []

    def run():
        queued.append(1)
        clock.now += 0.1

    def mark():
        place = len(queued)

        def wait():
            ahead.append(len(queued) - place)
            done[0] = place

        return wait

    runs = keep_busy(run, seconds=1.0, chunk=4, mark=mark)
    assert runs == len(queued) == done[0] == 12
    assert ahead == [4, 4, 4, 0]


def test_at_least_one_chunk_is_run():
    assert keep_busy(lambda: None, seconds=0, chunk=2, mark=lambda: lambda: None) == 2
    with pytest.raises(UsageError, match="chunk is 0"):
        keep_busy(lambda: None, seconds=1, chunk=0, mark=lambda: lambda: None)


MACHINE = Machine(
    cpu="a CPU", cores=2, isa=("avx2",), governor="unknown", memory_gib=8.0, system="Linux x86_64",
    load_1min=0.1, versions={"torch": "2.15.0"},
)  # fmt: skip


def rows_of(driver, on_meta):
    """One idle-looking and one busy row of a watched stand-in."""
    kernels = summarize_trace({"traceEvents": [kernel("softmax", 0, 10, 1 / 132)]}, runs=1)
    driver.gpm = {"engine": 99, "sm": 0.76, "occupancy": 0.4, "tensor": 0.0, "dram": 1.25}
    rows = []
    for name, runs in (("one-block", 4000), ("light-graph", 9000)):
        rows.append(
            make_row(
                on_meta[name], runs=runs, counters=watched(driver), kernels=kernels,
                device=H200, machine=MACHINE,
            )
        )  # fmt: skip
        driver.has_gpm = False
    return rows


def test_a_row_is_what_the_counters_and_the_work_come_to(driver, on_meta):
    first, second = rows_of(driver, on_meta)
    assert (first.case, first.device, first.protocol) == ("one-block", "h200", "gpu-truth-1")
    assert first.achieved.energy_mj_per_image is None
    assert first.sentences[0].startswith("GPU-Util reads 100 %, but the SMs were active 0.76 %")
    assert second.achieved.images_per_s == 3000
    assert second.achieved.energy_mj_per_image == pytest.approx(1200e3 / 9000)
    assert len(COLUMNS) == len(columns_of(first)) == len(columns_of(second))
    assert columns_of(first)[:6] == ("one-block", "100", "0.76", "0.4", "0", "1.25")
    assert columns_of(second)[2:6] == ("-",) * 4


def test_a_case_is_measured_after_a_warm_up(driver, monkeypatch):
    """A hundred runs a second: two at a time are queued, and what was watched is counted."""
    marks = []

    def run():
        driver.now += 0.01

    def mark():
        marks.append(driver.now)
        return lambda: None

    kernels = summarize_trace({"traceEvents": [kernel("conv", 0, 10)]}, runs=1)
    monkeypatch.setattr(gpu_demo, "time", driver)
    monkeypatch.setattr(gpu_demo, "_mark", mark)
    monkeypatch.setattr(gpu_demo, "profile_kernels", lambda run: kernels)
    case = gpu_demo.Case(
        name="light-graph", precision="fp16", images=8, run=run, flops=2e9, moved_bytes=1e6
    )
    row = gpu_demo._measure(case, uuid=UUID, device=H200, seconds=2.0, machine=MACHINE)
    assert row.runs == pytest.approx(200, abs=2) and row.kernels == kernels
    assert row.counters.seconds == pytest.approx(0.01 * row.runs)
    assert row.achieved.images_per_s == pytest.approx(800)
    assert row.achieved.tera_flops_per_s == pytest.approx(0.2)
    gaps = [round(later - sooner, 3) for sooner, later in itertools.pairwise(marks)]
    assert set(gaps[:150]) == {0.01} and set(gaps[-90:]) == {0.02}


def test_rows_come_back_as_they_were_written(driver, on_meta, tmp_path):
    rows = rows_of(driver, on_meta)
    file = append_truth(rows[:1], tmp_path / "gpu")
    assert append_truth(rows[1:], tmp_path / "gpu") == file == tmp_path / "gpu" / "h200.jsonl"
    assert read_truth(file) == rows
    nameless = dataclasses.replace(rows[0], device="")
    assert append_truth([nameless], tmp_path).name == "nvidia-h200.jsonl"


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:40],
        lambda line: line.replace('"schema": 1', '"schema": 7'),
        lambda line: line.replace('"runs": ', '"rums": ', 1),
        lambda line: line.replace('"samples": ', '"sampels": '),
        lambda line: "[]",
    ],
)
def test_a_damaged_row_is_named_by_file_and_line(driver, on_meta, tmp_path, damage):
    file = append_truth(rows_of(driver, on_meta), tmp_path)
    good, bad = file.read_text().splitlines()
    file.write_text(f"{good}\n{damage(bad)}\n")
    with pytest.raises(CheckFailed, match=r"h200\.jsonl:2 is not a row of GPU truth"):
        read_truth(file)


def test_nothing_measured_is_nothing_to_show(tmp_path):
    for call in (lambda: append_truth([], tmp_path), lambda: write_picture([], tmp_path / "x"),
                 lambda: read_truth(tmp_path / "none.jsonl")):  # fmt: skip
        with pytest.raises(UsageError, match="measure first: litezoo bench --gpu-truth"):
            call()


def test_the_picture_has_every_case_and_every_counter(driver, on_meta, tmp_path):
    pytest.importorskip("plotly")
    rows = rows_of(driver, on_meta)
    page = write_picture(rows, tmp_path / "truth.html").read_text(encoding="utf-8")
    for words in ("GPU-Util and what it hides", "NVIDIA H200", "one-block", "light-graph",
                  "SM active", "SMs that blocks reach", "of peak"):  # fmt: skip
        assert words in page
    assert 'src="http' not in page
    nothing = SimpleNamespace(**{f.name: None for f in dataclasses.fields(GpuCounters)})
    nothing.gpu = "Tesla T4"
    without = [dataclasses.replace(rows[1], counters=nothing)]
    page = write_picture(without, tmp_path / "t4.html").read_text(encoding="utf-8")
    assert "Tesla T4" in page and "tensor cores active" not in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
def test_one_block_reads_as_a_full_gpu_and_uses_one_sm():
    idle, busy = measure_truth(cases=["one-block", "gemm"], seconds=3)
    assert idle.kernels.sm_reach_percent < 5 < 80 < busy.kernels.sm_reach_percent
    for row in (idle, busy):
        util = row.counters.gpu_util_percent
        assert util is None or util > 90
    if idle.counters.sm_active_percent is not None:
        assert idle.counters.sm_active_percent < 5
        assert busy.counters.sm_active_percent > 80
