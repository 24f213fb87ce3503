import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litezoo.benchmarks.kernels import Kernel, make_kernels
from litezoo.benchmarks.latency import (
    CLASSES,
    PARAMETERS,
    Chip,
    Costs,
    Sample,
    compute_dtype,
    explain,
    make_work,
    parameters_of,
    read_chip,
)
from litezoo.benchmarks.network import ConvShape, catalogue_network
from litezoo.models.errors import UsageError
from litezoo.recipes.devices import get_device

NAMES = [one.name for one in PARAMETERS]
GPU = Chip(
    kind="gpu", matrix_tera=100.0, vector_tera=20.0, memory_gb_per_s=500.0, cache_mib=4.0,
    units=40.0, element_bytes=2.0, weight_bytes=2.0, channel_multiple=8, fp32=False,
)  # fmt: skip
CPU = dataclasses.replace(
    GPU, kind="cpu", matrix_tera=1.0, vector_tera=1.0, memory_gb_per_s=50.0, units=4.0,
    element_bytes=4.0, weight_bytes=4.0, fp32=True,
)  # fmt: skip
NETWORK = SimpleNamespace(name="net", resolution=(3, 224, 224))
MODES = st.sampled_from(["eager", "compiled", "fused"])


def conv(*, channels=64, groups=1, window=3, stride=1, side=56, **other):
    """A convolution of as many output as input channels on a square map."""
    out = side // stride
    shape = ConvShape(
        in_channels=channels, out_channels=channels, groups=groups, kernel=(window, window),
        stride=(stride, stride), out=(out, out),
    )  # fmt: skip
    weights = channels * channels // groups * window**2
    return Kernel(
        **{
            "kind": shape.kind, "name": "layer", "ops": ("convolution",), "kinds": ("conv",),
            "macs": weights * out**2, "weight_elements": weights,
            "read_elements": channels * side**2, "write_elements": channels * out**2,
            "conv": shape, "out_shape": (channels, out, out), **other,
        }
    )  # fmt: skip


def elementwise(elements=100_000, **other):
    return Kernel(
        **{
            "kind": "elementwise", "name": "act", "ops": ("relu",), "kinds": ("activation",),
            "macs": 0, "weight_elements": 0, "read_elements": elements,
            "write_elements": elements, "conv": None, "out_shape": (elements,), **other,
        }
    )  # fmt: skip


def defaults(chip, mode="fused", **changed):
    values = parameters_of(mode=mode, kind=chip.kind, fp32=chip.fp32)[0]
    for name, value in changed.items():
        values[NAMES.index(name)] = value
    return values


def time(kernels, *, chip=GPU, mode="fused", batch=1, values=None, **changed):
    """The predicted ms of a batch through kernels."""
    costs = Costs([Sample(work=make_work(NETWORK, kernels), batch=batch)], [chip], mode=mode)
    return float(costs.ms(defaults(chip, mode, **changed) if values is None else values)[0])


#: What leaves only the kernels' own times.
BARE = {
    "launch_us": 0.0, "other_launch_us": 0.0, "constant_us": 0.0, "copy_us": 0.0,
    "fill": 0.0, "depth": 0.0, "vector": 1e6,
}  # fmt: skip

KERNELS = st.lists(
    st.one_of(
        st.builds(
            conv,
            channels=st.sampled_from([16, 24, 64, 256]),
            window=st.sampled_from([1, 3, 5]),
            stride=st.sampled_from([1, 2]),
            side=st.sampled_from([7, 14, 56]),
        ),
        st.builds(lambda c: conv(channels=c, groups=c), st.sampled_from([16, 64])),
        st.builds(elementwise, st.integers(1, 10**6)),
    ),
    min_size=1,
    max_size=6,
)


# ----------------------------------------------------------------------- properties


@settings(max_examples=40, deadline=None)
@given(KERNELS, MODES, st.integers(1, 64))
def test_a_larger_batch_takes_longer_but_not_longer_for_each_image(kernels, mode, batch):
    one, more = (time(kernels, mode=mode, batch=size) for size in (batch, 2 * batch))
    assert one < more
    # but for what no longer fits into the cache
    assert more <= 2 * one * 2.6


@settings(max_examples=40, deadline=None)
@given(KERNELS, st.sampled_from(NAMES), st.floats(1.05, 4))
def test_each_parameter_works_in_its_direction(kernels, name, factor):
    slower = name.endswith("_us") or name in ("overall", "fill", "depth")
    values = defaults(CPU, "compiled")
    place = NAMES.index(name)
    before = time(kernels, chip=CPU, mode="compiled", values=values)
    values[place] *= factor
    after = time(kernels, chip=CPU, mode="compiled", values=values)
    assert after >= before * (1 - 1e-12) if slower else after <= before * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(KERNELS, st.floats(1.1, 8))
def test_a_chip_that_is_faster_in_all_is_faster_by_as_much(kernels, factor):
    faster = dataclasses.replace(
        GPU, matrix_tera=GPU.matrix_tera * factor, vector_tera=GPU.vector_tera * factor,
        memory_gb_per_s=GPU.memory_gb_per_s * factor,
    )  # fmt: skip
    assert time(kernels, **BARE) == pytest.approx(
        factor * time(kernels, chip=faster, **BARE), rel=1e-3
    )


@settings(max_examples=40, deadline=None)
@given(KERNELS, st.integers(2, 4))
def test_equal_kernels_counted_once_give_the_same_time(kernels, times):
    many = make_work(NETWORK, kernels * times)
    each = make_work(NETWORK, kernels * times, distinct=False)
    assert len(many.count) <= len(kernels) and len(each.count) == times * len(kernels)
    values = defaults(GPU)
    both = Costs([Sample(work=w, batch=3) for w in (many, each)], [GPU, GPU], mode="fused")
    assert both.ms(values)[0] == pytest.approx(both.ms(values)[1])


@settings(max_examples=30, deadline=None)
@given(KERNELS, MODES)
def test_the_explanation_adds_up_to_what_the_device_takes(kernels, mode):
    values = defaults(GPU, mode, host_us=0.0, constant_us=0.0, copy_us=0.0)
    times = explain(NETWORK, kernels, GPU, values, batch=4, mode=mode)
    assert [one.name for one in times] == [kernel.name for kernel in kernels]
    total = time(kernels, mode=mode, batch=4, values=values)
    assert sum(one.ms for one in times) == pytest.approx(total)


@settings(max_examples=20, deadline=None)
@given(st.lists(KERNELS, min_size=2, max_size=4), st.integers(1, 32))
def test_many_networks_at_once_take_what_each_takes_alone(networks, batch):
    samples = [Sample(work=make_work(NETWORK, one), batch=batch) for one in networks]
    chips = [GPU if place % 2 else dataclasses.replace(GPU, matrix_tera=7.0)
             for place in range(len(samples))]  # fmt: skip
    together = Costs(samples, chips, mode="fused").ms(defaults(GPU))
    alone = [
        Costs([sample], [chip], mode="fused").ms(defaults(GPU))[0]
        for sample, chip in zip(samples, chips, strict=True)
    ]
    assert together == pytest.approx(np.array(alone))


# ----------------------------------------------------------------------- single effects


def test_a_large_dense_convolution_runs_at_its_share_of_the_peak():
    kernel = conv(channels=1024, side=64)
    ms = time([kernel], **BARE, dense=0.5)
    assert ms == pytest.approx(2e-9 * kernel.macs / (100 * 0.5), rel=0.02)


def test_an_element_wise_kernel_runs_at_its_share_of_the_bandwidth():
    big = elementwise(10**9)
    ms = time([big], **BARE, elementwise_memory=0.8)
    assert ms == pytest.approx(2 * 10**9 * 2 / (500e6 * 0.8), rel=0.01)


def test_what_the_cache_holds_moves_faster():
    small, large = elementwise(1000), elementwise(10**9)
    for kernel, gain in ((small, 4.0), (large, 1.0)):
        plain = time([kernel], **BARE, cache=1.0)
        assert plain / time([kernel], **BARE, cache=4.0) == pytest.approx(gain, rel=0.01)


def test_a_depthwise_convolution_is_held_to_the_vector_peak():
    kernel = conv(channels=512, groups=512, window=7)
    assert time([kernel], **BARE) > 2e-9 * kernel.macs / 20


def test_winograd_speeds_up_only_float32_three_by_three_of_stride_one():
    fast = conv(channels=512)
    for kernel, chip, gain in (
        (fast, CPU, 2.0),
        (fast, GPU, 1.0),
        (conv(channels=512, stride=2), CPU, 1.0),
        (conv(channels=512, window=5), CPU, 1.0),
        (conv(channels=512, groups=4), CPU, 1.0),
    ):
        before, after = (time([kernel], chip=chip, **BARE, winograd=w) for w in (1.0, 2.0))
        assert before / after == pytest.approx(gain, rel=0.02)


def test_channels_count_as_the_chip_pads_them():
    ms = {
        width: time([conv(channels=width, side=112)], batch=64, **BARE, conv_memory=1e6, odd=1.0)
        for width in (24, 25, 32)
    }
    assert ms[25] == pytest.approx(ms[32], rel=0.05) and ms[24] < 0.7 * ms[25]


def test_half_precision_slows_down_for_odd_channels():
    for kernel, factor in (
        (conv(channels=30), 1.5),
        (conv(channels=24), 1.0),
        (conv(channels=48, groups=2), 1.5),
        (conv(channels=64, groups=2), 1.0),
    ):
        slow, plain = (time([kernel], batch=64, **BARE, odd=odd) for odd in (1.5, 1.0))
        assert slow / plain == pytest.approx(factor, rel=1e-3)


def test_groups_that_run_one_by_one_take_their_time():
    grouped = conv(channels=256, groups=32)
    one, other = (time([grouped], **BARE, group_us=us) for us in (1e-9, 10.0))
    assert other - one == pytest.approx(32 * 0.010, rel=1e-3)
    plain = conv(channels=256)
    assert time([plain], **BARE, group_us=10.0) == time([plain], **BARE, group_us=1e-9)


def test_a_cpu_does_not_move_and_compute_at_once():
    kernel, slow = conv(channels=256), dataclasses.replace(CPU, kind="gpu")
    parts = Costs([Sample(work=make_work(NETWORK, [kernel]), batch=1)], [CPU], mode="fused").parts(
        defaults(CPU, **BARE)
    )
    compute, memory = (float(part[0]) for part in parts)
    assert time([kernel], chip=CPU, **BARE) == pytest.approx(compute + memory, rel=1e-3)
    other = time([kernel], chip=slow, values=defaults(CPU, **BARE))
    assert other == pytest.approx(math.hypot(compute, memory), rel=1e-3)


def test_a_small_map_does_not_fill_the_chip():
    one, many = (time([conv(side=7)], batch=batch) / batch for batch in (1, 256))
    assert one > 4 * many


def test_weights_are_read_once_in_a_batch():
    layer = Kernel(
        kind="matmul", name="fc", ops=("addmm",), kinds=("matmul",), macs=10**8,
        weight_elements=10**8, read_elements=10**4, write_elements=10**4, conv=None,
        out_shape=(10**4,),
    )  # fmt: skip
    assert time([layer], batch=4) < 1.2 * time([layer], batch=1)


def test_an_exponential_costs_more_arithmetic_than_a_clip():
    slow = {**BARE, "vector": 1e-3}
    relu, silu = (time([elementwise(ops=(name,))], **slow) for name in ("relu", "silu"))
    assert silu == pytest.approx(10 * relu, rel=0.01)
    behind = conv(ops=("convolution", "batch_norm", "silu"), kinds=("conv", "norm", "activation"))
    assert time([behind], **slow) > time([conv()], **slow) + 0.5 * silu


def test_autocast_pays_for_float32_tensors_and_for_casting_weights():
    plain = elementwise(10**8)
    kept = elementwise(10**8, full_read_elements=10**8, full_write_elements=10**8)
    assert time([kept], **BARE) == pytest.approx(2 * time([plain], **BARE), rel=0.01)
    cast = conv(channels=2048, side=1, window=1)
    again = dataclasses.replace(cast, cast_elements=cast.weight_elements, casts=1)
    ratio = time([again], **BARE, weight_memory=0.7) / time([cast], **BARE, weight_memory=0.7)
    assert ratio == pytest.approx(4, rel=0.1)  # 4 + 2 bytes to cast, 2 to read
    slow = {"launch_us": 1000.0, "other_launch_us": 1000.0}
    assert time([again] * 10, **slow) > 1.9 * time([cast] * 10, **slow)


def test_a_program_that_starts_kernels_is_no_faster_than_that():
    kernels = [elementwise(10)] * 200
    assert time(kernels, mode="eager", host_us=50.0) >= 200 * 0.050
    assert time(kernels, mode="fused") < 1.0


def test_the_image_of_three_channels_is_a_class_of_its_own():
    shape = ConvShape(
        in_channels=3, out_channels=64, groups=1, kernel=(3, 3), stride=(2, 2), out=(112, 112)
    )
    first = dataclasses.replace(conv(), conv=shape)
    work = make_work(NETWORK, [first, conv(), conv(window=1), conv(groups=8), conv(groups=64)])
    names = [list(CLASSES)[place] for place in work.classes]
    assert names == ["image", "dense", "pointwise", "grouped", "depthwise"]


def test_the_explanation_says_what_binds():
    kernels = [conv(channels=1024, side=64), elementwise(10**8), elementwise(10)]
    times = explain(NETWORK, kernels, GPU, defaults(GPU), batch=1, mode="fused")
    assert [one.bound for one in times] == ["compute", "memory", "launch"]
    assert 0.3 < times[0].efficiency < 0.61 and 0.6 < times[1].efficiency < 0.86


def test_a_real_network_is_explained_kernel_by_kernel():
    network = catalogue_network("mobilenetv2_100", "deploy")
    kernels = make_kernels(network, "fused")
    times = explain(network, kernels, GPU, defaults(GPU), batch=1, mode="fused")
    assert len(times) == len(kernels) and {one.kind for one in times} >= {"depthwise", "image"}


# ----------------------------------------------------------------------- physics


def test_a_device_gives_its_peaks_by_precision():
    t4 = get_device("t4")
    half, full = (read_chip(t4, precision=p) for p in ("fp16", "fp32"))
    assert half.matrix_tera > 5 * full.matrix_tera and half.vector_tera == full.matrix_tera
    assert (half.element_bytes, full.element_bytes) == (2, 4)
    assert full.fp32 and not half.fp32 and full.channel_multiple == 1


def test_threads_share_a_cpu_s_peak():
    one, two = (
        read_chip(get_device("snapdragon-855-cpu"), precision="fp32", threads=n) for n in (1, 2)
    )
    assert two.matrix_tera == pytest.approx(2 * one.matrix_tera) and two.units == 2


def test_a_device_without_physics_says_what_to_type():
    device = dataclasses.replace(
        get_device("x86-avx2"), peak_tera_ops_per_s={}, memory_gb_per_s=None
    )
    with pytest.raises(UsageError, match="is not known, so there is no prediction; state it in"):
        read_chip(device, precision="fp32")
    with pytest.raises(UsageError, match="memory_gb_per_s of t4"):
        read_chip(dataclasses.replace(get_device("t4"), memory_gb_per_s=None), precision="fp16")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("amp-fp16", "fp16"), ("int8+bf16", "int8"), ("int8-mixed", "int8"), ("w8a16", "int8"),
     ("default", "fp32"), ("tf32", "tf32")],
)  # fmt: skip
def test_a_precision_names_what_it_computes_in(precision, dtype):
    assert compute_dtype(precision) == dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="precision 'half' names no dtype; known are fp32, tf32"):
        compute_dtype("half")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_physics_are_numbers_above_0(value):
    with pytest.raises(
        UsageError, match=r"memory_gb_per_s is .*; the model needs a number above 0"
    ):
        dataclasses.replace(GPU, memory_gb_per_s=value)


def test_nothing_to_predict_is_said():
    with pytest.raises(UsageError, match="net has no kernels; there is nothing to predict"):
        make_work(NETWORK, [])
    with pytest.raises(UsageError, match="takes networks, and a chip for each"):
        Costs([], [], mode="fused")


def test_a_parameter_that_a_runtime_does_not_have_does_nothing():
    values, _, used = parameters_of(mode="fused", kind="cpu", fp32=False)
    off = [name for name, on in zip(NAMES, used, strict=True) if not on]
    assert off == ["winograd", "odd", "host_us", "copy_us"]
    assert [values[NAMES.index(name)] for name in off] == [1.0, 1.0, 0.0, 0.0]
