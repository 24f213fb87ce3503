"""Kernels: each policy fuses what its runtimes do, and counting adds up; no torch is needed."""

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litezoo.benchmarks.kernels import make_kernels
from litezoo.benchmarks.network import (
    ConvShape,
    Network,
    Op,
    Window,
    catalogue_network,
    list_networks,
    scale,
)
from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.errors import UsageError

SIDE = 8


class Net:
    """Builds a network; each method appends an operator and returns its place."""

    def __init__(self, side=SIDE):
        self.side = side
        self.ops = []

    def shape(self, value):
        return (3, self.side, self.side) if value < 0 else self.ops[value].out_shape

    def size(self, value):
        return math.prod(self.shape(value))

    def op(self, kind, *inputs, name=None, shape=None, **fields):
        shape = self.shape(inputs[0]) if shape is None else shape
        values = {"reads": tuple(map(self.size, inputs)), "out_elements": math.prod(shape)} | fields
        self.ops.append(Op(kind=kind, name=name or kind, inputs=inputs, out_shape=shape, **values))
        return len(self.ops) - 1

    def conv(self, value, out=8, *, kernel=3, stride=1, groups=1, bias=False):
        channels, *sides = self.shape(value)
        window = Window(
            kernel=(kernel, kernel), stride=(stride, stride), padding=(kernel // 2 * 2,) * 2
        )
        result = window.slide(tuple(sides))
        depth = channels // groups * kernel**2
        return self.op(
            "conv",
            value,
            shape=(out, *result),
            weight_elements=out * depth + bias * out,
            bias_elements=bias * out,
            macs=out * math.prod(result) * depth,
            conv=ConvShape(
                in_channels=channels,
                out_channels=out,
                groups=groups,
                kernel=window.kernel,
                stride=window.stride,
                out=result,
                padding=window.padding,
            ),
        )

    def norm(self, value):
        return self.op("norm", value, weight_elements=4 * self.shape(value)[0])

    def relu(self, value):
        return self.op("activation", value, name="relu")

    def add(self, *values):
        return self.op("add", *values)

    def mul(self, value, gate):
        return self.op("mul", value, gate)

    def mean(self, value):
        return self.op("reduce", value, shape=(self.shape(value)[0], 1, 1))

    def concat(self, *values):
        channels = sum(self.shape(value)[0] for value in values)
        return self.op("concat", *values, shape=(channels, *self.shape(values[0])[1:]))

    def block(self, value, out=8, **options):
        """A convolution, BatchNorm and ReLU."""
        return self.relu(self.norm(self.conv(value, out, **options)))

    def network(self, *outputs):
        return Network(
            name="net",
            resolution=(3, self.side, self.side),
            ops=tuple(self.ops),
            outputs=outputs or (len(self.ops) - 1,),
            params=sum(op.weight_elements for op in self.ops),
        )


def names(network, policy, **options):
    """Return the operators of each kernel as words, but for the layout of the image."""
    kernels = make_kernels(network, policy, **options)
    return [" ".join(kernel.ops) for kernel in kernels if kernel.ops != ("layout",)]


# ------------------------------------------------------------------- eager


def test_eager_runs_each_operator_apart_and_views_for_nothing():
    net = Net()
    whole = net.block(-1)
    half = net.op("view", whole, name="slice", shape=(4, 8, 8), reads=(256,))
    net.concat(net.relu(half), half)
    network = net.network()
    assert names(network, "eager") == ["conv", "norm", "relu", "relu", "concat"]
    last = make_kernels(network, "eager")[-1]
    assert (last.read_elements, last.write_elements, last.kind) == (512, 512, "move")


def test_some_channels_are_copied_for_a_convolution():
    net = Net()
    half = net.op("view", net.relu(net.conv(-1)), name="slice", shape=(4, 8, 8), reads=(256,))
    net.conv(net.op("copy", half, name="contiguous"))
    network = net.network()
    assert names(network, "eager") == ["conv", "relu", "conv"]  # of one image they are one piece
    assert make_kernels(network, "eager")[-1].read_elements == 256
    assert names(network, "eager", batch=2) == ["conv", "relu", "contiguous", "conv"]
    assert names(network, "compiled") == ["conv", "relu", "contiguous", "conv"]
    assert names(network, "fused", batch=2) == ["conv relu", "slice", "conv"]


def test_what_is_read_through_a_view_is_its_part():
    net = Net()
    whole = net.conv(-1)
    net.relu(net.op("view", whole, shape=(2, 8, 8), reads=(128,)))
    assert make_kernels(net.network(), "eager")[1].read_elements == 128


def test_a_bias_on_cuda_is_an_addition_but_for_depthwise_convolutions():
    net = Net()
    net.conv(net.conv(-1, bias=True), groups=8, bias=True)
    network = net.network()
    apart = make_kernels(network, "eager", bias_apart=True)
    assert [kernel.ops for kernel in apart] == [("conv",), ("bias",), ("conv",)]
    assert apart[1].read_elements == apart[1].write_elements == 512
    assert sum(kernel.weight_elements for kernel in apart) == network.weight_elements
    assert names(network, "compiled", bias_apart=True) == ["conv", "bias", "conv", "bias"]
    assert names(network, "compiled") == ["conv", "conv"]


def test_a_pool_of_pytorch_writes_the_places_of_what_it_took():
    net = Net()
    window = Window(kernel=(2, 2), stride=(2, 2))
    net.op("pool", net.conv(-1), name="max_pool2d_with_indices", shape=(8, 4, 4), window=window)
    network = net.network()
    pool = make_kernels(network, "eager")[-1]
    assert pool.write_elements == 128 + 2 * 128  # int64 is twice a float
    pool = make_kernels(network, "eager", amp=True)[-1]
    assert 2 * pool.write_elements + 2 * pool.full_write_elements == 128 * (2 + 8)
    assert make_kernels(network, "compiled")[-1].write_elements == 128


# ------------------------------------------------------------------- autocast


def test_autocast_casts_the_image_and_the_weights_of_each_convolution():
    net = Net()
    net.relu(net.conv(net.conv(-1, bias=True)))
    kernels = make_kernels(net.network(), "eager", amp=True)
    assert [kernel.ops for kernel in kernels] == [("cast",), ("conv",), ("conv",), ("relu",)]
    cast, first, second, last = kernels
    assert (cast.full_read_elements, cast.full_write_elements) == (192, 0)
    assert (first.cast_elements, first.casts) == (27 * 8 + 8, 2)
    assert (second.cast_elements, second.casts) == (72 * 8, 1)
    assert last.full_read_elements == last.full_write_elements == last.casts == 0


def test_a_float32_weight_makes_what_follows_float32_until_a_convolution():
    net = Net()
    scaled = net.op("mul", net.conv(-1), name="gamma", weight_elements=8)
    net.conv(net.relu(scaled))
    network = net.network()
    kernels = {kernel.ops: kernel for kernel in make_kernels(network, "eager", amp=True)}
    gamma = kernels["gamma",]
    assert (gamma.full_read_elements, gamma.full_write_elements) == (0, 512)
    assert kernels["relu",].full_read_elements == kernels["relu",].full_write_elements == 512
    assert names(network, "eager", amp=True) == ["cast", "conv", "gamma", "relu", "cast", "conv"]
    compiled = make_kernels(network, "compiled", amp=True)
    assert [" ".join(kernel.ops) for kernel in compiled] == ["cast", "conv", "gamma relu", "conv"]
    assert compiled[2].full_write_elements == 0  # it writes what the convolution reads: a half


def test_a_bias_of_its_own_is_added_as_a_half():
    net = Net()
    net.relu(net.conv(-1, bias=True))
    bias = make_kernels(net.network(), "eager", amp=True, bias_apart=True)[2]
    assert (bias.ops, bias.full_write_elements) == (("bias",), 0)
    assert (bias.cast_elements, bias.casts) == (8, 1)


def test_layer_norm_is_cast_to_float32_before_and_softmax_within():
    net = Net()
    normed = net.op("norm", net.conv(-1), name="layer_norm", sensitive=True, weight_elements=16)
    net.op("softmax", net.conv(normed), sensitive=True)
    kernels = make_kernels(net.network(), "eager", amp=True)
    assert [" ".join(kernel.ops) for kernel in kernels] == [
        "cast", "conv", "cast", "layer_norm", "cast", "conv", "softmax",
    ]  # fmt: skip
    norm, softmax = kernels[3], kernels[6]
    assert norm.full_read_elements == norm.full_write_elements == 512 and norm.sensitive
    assert (softmax.full_read_elements, softmax.full_write_elements) == (0, 512)


# ------------------------------------------------------------------- fused


def test_engines_fuse_a_convolution_with_its_norm_activation_and_residual():
    net = Net()
    first = net.block(-1)
    net.relu(net.add(net.norm(net.conv(first)), first))
    assert names(net.network(), "fused") == ["conv norm relu", "conv norm add relu"]


def test_a_second_residual_stays_apart():
    net = Net()
    one = net.block(-1)
    two = net.op("pool", one)
    net.add(net.add(net.conv(one), one), two)
    assert names(net.network(), "fused") == ["conv norm relu", "pool", "conv add", "add"]


def test_a_gate_is_multiplied_in_a_kernel_of_its_own():
    net = Net()
    whole = net.block(-1)
    gate = net.op("activation", net.conv(net.mean(whole), kernel=1), name="sigmoid")
    net.mul(whole, gate)
    assert names(net.network(), "fused") == ["conv norm relu", "reduce", "conv sigmoid", "mul"]


def test_x_times_sigmoid_of_x_is_the_end_of_its_convolution():
    net = Net()
    value = net.norm(net.conv(-1))
    net.mul(value, net.op("activation", value, name="sigmoid"))
    assert names(net.network(), "fused") == ["conv norm sigmoid mul"]


def test_a_value_that_is_a_result_ends_its_kernel():
    net = Net()
    value = net.conv(-1)
    net.relu(value)
    assert names(net.network(value, value + 1), "fused") == ["conv", "relu"]


def test_engines_copy_what_views_take_and_need_no_layouts():
    net = Net()
    turned = net.op("view", net.conv(-1), name="transpose")
    net.conv(net.op("copy", turned, name="clone"))
    network = net.network()
    assert names(network, "fused") == ["conv", "transpose", "conv"]
    assert names(network, "eager") == ["conv", "clone", "conv"]


def test_what_is_made_of_weights_alone_is_folded_by_engines():
    net = Net()
    net.op("other", name="standardize", shape=(), out_elements=0, weight_elements=432)
    net.conv(-1)
    network = net.network()
    assert names(network, "fused") == ["conv"]
    assert make_kernels(network, "eager")[0].weight_elements == 432


# ------------------------------------------------------------------- compiled


def test_compiled_joins_point_wise_operators_between_convolutions():
    net = Net()
    first = net.block(-1)
    net.relu(net.add(net.norm(net.conv(first)), first))
    layout, *kernels = make_kernels(net.network(), "compiled")
    assert (layout.ops, layout.read_elements, layout.write_elements) == (("layout",), 192, 192)
    assert [" ".join(kernel.ops) for kernel in kernels] == [
        "conv", "norm relu", "conv", "norm add relu",
    ]  # fmt: skip
    assert (kernels[3].read_elements, kernels[3].write_elements) == (1024, 512)


def test_compiled_lays_weights_of_windows_out_anew_on_cpus():
    net = Net()
    net.conv(net.conv(net.conv(-1), groups=8), kernel=1)
    network = net.network()
    cpu = [k for k in make_kernels(network, "compiled") if k.macs]
    assert [(k.cast_elements, k.casts) for k in cpu] == [(27 * 8, 1), (0, 0), (0, 0)]
    assert not any(k.casts for k in make_kernels(network, "compiled", bias_apart=True))


def test_compiled_branches_that_meet_are_one_kernel():
    net = Net()
    net.relu(net.add(net.norm(net.conv(-1)), net.norm(net.conv(-1, kernel=1))))
    assert sorted(names(net.network(), "compiled")) == ["conv", "conv", "norm norm add relu"]


def test_compiled_computes_a_mean_where_its_map_is_written_if_nothing_else_reads_it():
    net = Net()
    net.mean(net.block(-1))
    last = make_kernels(net.network(), "compiled")[-1]
    assert (last.ops, last.kind) == (("norm", "relu", "reduce"), "pool")
    assert (last.read_elements, last.write_elements) == (512, 8)


def test_compiled_reads_a_map_again_for_the_mean_of_its_gate():
    net = Net()
    whole = net.block(-1)
    gate = net.op("activation", net.conv(net.mean(whole), kernel=1), name="sigmoid")
    net.mul(whole, gate)
    kernels = make_kernels(net.network(), "compiled")[1:]
    assert [" ".join(kernel.ops) for kernel in kernels] == [
        "conv", "norm relu", "reduce", "conv", "sigmoid mul",
    ]  # fmt: skip
    assert kernels[4].read_elements == 512 + 8


def test_what_needs_a_sum_over_channels_of_its_own_map_waits_for_it():
    net = Net()
    value = net.relu(net.conv(-1, 16))
    net.mul(value, net.op("reduce", value, name="sum", shape=(1, 8, 8)))
    assert names(net.network(), "compiled") == ["conv", "relu sum", "mul"]


def test_compiled_writes_the_parts_of_a_concatenation_into_their_place():
    net = Net()
    net.conv(net.concat(net.relu(net.conv(-1)), net.relu(net.conv(-1))))
    kernels = make_kernels(net.network(), "compiled")
    assert "concat" not in {kernel.ops[0] for kernel in kernels}
    assert kernels[-1].read_elements == 1024


def test_compiled_copies_what_a_library_made():
    net = Net()
    net.conv(net.concat(net.conv(-1), net.relu(net.conv(-1))))
    (copy,) = (k for k in make_kernels(net.network(), "compiled") if k.ops == ("concat",))
    assert (copy.read_elements, copy.write_elements, copy.kind) == (512, 512, "move")


def test_compiled_writes_twice_what_a_library_reads_before_the_concatenation():
    net = Net()
    read = net.relu(net.conv(-1))
    net.conv(net.concat(read, net.relu(net.conv(read))))
    layout, _, first, _, second, last = make_kernels(net.network(), "compiled")
    assert (first.ops, second.ops) == (("relu",), ("relu",)) and layout.ops == ("layout",)
    assert (first.write_elements, second.write_elements) == (1024, 512)
    assert last.read_elements == 1024


def test_compiled_adds_few_terms_one_by_one():
    net = Net()
    few = net.op("reduce", net.conv(-1), name="sum", shape=(1, 8, 8))
    net.mean(net.relu(few))
    assert names(net.network(), "compiled") == ["conv", "sum relu reduce"]


def test_what_is_copied_into_two_concatenations_is_read_once():
    net = Net()
    made = net.conv(-1)
    net.conv(net.concat(made, net.conv(net.concat(made, net.relu(made)))))
    kernels = make_kernels(net.network(), "compiled")
    first = next(k for k in kernels if k.ops == ("concat",))
    assert (first.read_elements, first.write_elements) == (512, 1024)


def test_compiled_reads_the_parts_where_they_are_on_cuda():
    net = Net()
    net.conv(net.relu(net.concat(net.conv(-1), net.conv(-1))))
    network = net.network()
    joined = make_kernels(network, "compiled", bias_apart=True)[3]
    assert joined.ops == ("concat", "relu")
    assert joined.read_elements == joined.write_elements == 1024
    words = ["conv", "conv", "concat", "concat", "relu", "conv"]
    assert names(network, "compiled") == words
    for _ in range(7):  # a kernel of too many parts
        net.concat(net.conv(-1))
    parts = [place for place, op in enumerate(net.ops) if op.kind == "conv"]
    net.relu(net.concat(*parts))
    assert "relu" in names(net.network(), "compiled", bias_apart=True)


def test_a_pool_reads_a_map_that_was_written():
    net = Net()
    window = Window(kernel=(2, 2), stride=(2, 2))
    pooled = net.op("pool", net.block(-1), shape=(8, 4, 4), window=window)
    net.relu(pooled)
    assert names(net.network(), "compiled") == ["conv", "norm relu", "pool relu"]


# ------------------------------------------------------------------- all policies


@st.composite
def networks(draw):
    """Draw a network of convolutions, point-wise operators, branches and gates."""
    net = Net(side=draw(st.integers(2, 9)))
    maps, gates = [net.conv(-1)], []
    for _ in range(draw(st.integers(1, 18))):
        kind = draw(
            st.sampled_from(["conv", "norm", "relu", "add", "mul", "gate", "concat", "depthwise"])
        )
        value = draw(st.sampled_from(maps))
        if kind == "conv":
            maps.append(
                net.conv(value, kernel=draw(st.sampled_from([1, 3])), bias=draw(st.booleans()))
            )
        elif kind == "depthwise":
            maps.append(net.conv(value, groups=8))
        elif kind in ("norm", "relu"):
            maps.append(getattr(net, kind)(value))
        elif kind == "add":
            maps.append(net.add(*dict.fromkeys((value, draw(st.sampled_from(maps))))))
        elif kind == "gate":
            gates.append(net.conv(net.mean(value), kernel=1))
        elif kind == "mul" and gates:
            maps.append(net.mul(value, draw(st.sampled_from(gates))))
        elif kind == "concat":
            joined = net.concat(value, draw(st.sampled_from(maps)))
            maps.append(net.conv(joined, kernel=1))
    read = {one for op in net.ops for one in op.inputs}
    return net.network(*(place for place in range(len(net.ops)) if place not in read))


def moved(kernels):
    return sum(kernel.read_elements + kernel.write_elements for kernel in kernels)


@settings(max_examples=120, deadline=None)
@given(network=networks(), policy=st.sampled_from(["compiled", "fused"]))
def test_fusing_keeps_the_work_and_adds_no_traffic(network, policy):
    eager, fused = make_kernels(network, "eager"), make_kernels(network, policy)
    assert sum(kernel.macs for kernel in fused) == network.macs
    assert sum(kernel.weight_elements for kernel in fused) == network.weight_elements
    layout = 2 * math.prod(network.resolution) * (policy == "compiled")
    assert moved(fused) <= moved(eager) + layout
    assert policy == "compiled" or len(fused) <= len(eager)


@settings(max_examples=120, deadline=None)
@given(network=networks(), policy=st.sampled_from(["compiled", "fused"]))
def test_kernels_can_run_one_after_the_other(network, policy):
    numbered = dataclasses.replace(
        network,
        ops=tuple(dataclasses.replace(op, name=str(i)) for i, op in enumerate(network.ops)),
    )
    kernels = [k for k in make_kernels(numbered, policy) if k.kinds[0] not in ("copy", "concat")]
    groups = [set(map(int, kernel.ops)) for kernel in kernels]
    assert len(set().union(*groups)) == sum(map(len, groups))
    kernel_of = {index: place for place, group in enumerate(groups) for index in group}
    in_place = {i for i, op in enumerate(network.ops) if i not in kernel_of}
    assert all(network.ops[index].kind == "concat" for index in in_place)
    waits = {
        place: {
            kernel_of[one]
            for index in group
            for one in network.ops[index].inputs
            if one in kernel_of and kernel_of[one] != place
        }
        for place, group in enumerate(groups)
    }
    done = set()
    while len(done) < len(groups):  # a circle would never end
        ready = {place for place in waits if place not in done and waits[place] <= done}
        assert ready
        done |= ready


@settings(max_examples=100, deadline=None)
@given(network=networks())
def test_a_network_survives_its_text(network):
    assert Network.from_json(network.to_json()) == network


def test_a_text_that_is_no_network_is_refused():
    with pytest.raises(UsageError, match=r"this is no network .*write it with Network\.to_json"):
        Network.from_json('{"name": "x"}')
    with pytest.raises(UsageError, match="this is no network"):
        Network.from_json("conv")


def test_a_wrong_policy_is_named_with_the_nearest_right_one():
    with pytest.raises(UsageError, match="unknown policy 'fuse'; did you mean 'fused'"):
        make_kernels(Net().network(), "fuse")


@pytest.mark.parametrize("option", ["amp", "bias_apart"])
def test_options_of_pytorch_are_refused_for_engines(option):
    with pytest.raises(UsageError, match="are of PyTorch; leave them out"):
        make_kernels(Net().network(), "fused", **{option: True})


def test_kinds_of_convolutions_are_those_of_the_profiler():
    net = Net()
    net.conv(-1, 8)
    net.conv(0, 8, kernel=1)
    net.conv(0, 8, groups=2)
    net.conv(0, 16, groups=8)
    kinds = [kernel.kind for kernel in make_kernels(net.network(), "eager")]
    assert kinds == ["conv", "pointwise", "grouped", "depthwise"]


# ------------------------------------------------------------------- another resolution


def test_scaling_follows_strides_and_leaves_gates_and_classifiers():
    net = Net()
    whole = net.block(-1, stride=2)
    gate = net.conv(net.mean(whole), kernel=1)
    pooled = net.mean(net.mul(whole, gate))
    net.op("matmul", pooled, shape=(10,), macs=80, weight_elements=80)
    network = net.network()
    larger = scale(network, (3, 16, 16))
    wide = Net(side=16)
    wide.ops = []
    whole = wide.block(-1, stride=2)
    gate = wide.conv(wide.mean(whole), kernel=1)
    pooled = wide.mean(wide.mul(whole, gate))
    wide.op("matmul", pooled, shape=(10,), macs=80, weight_elements=80)
    assert larger == wide.network()
    assert scale(larger, (3, 8, 8)) == network
    assert scale(network, (3, 8, 8)) is network


def test_scaling_to_other_channels_is_refused():
    net = Net()
    net.conv(-1)
    with pytest.raises(UsageError, match="net takes 3 channels, not 1"):
        scale(net.network(), (1, 16, 16))


def test_scaling_to_nothing_is_refused():
    net = Net()
    window = Window(kernel=(8, 8), stride=(1, 1))
    net.op("pool", -1, shape=(3, 1, 1), window=window)
    with pytest.raises(UsageError, match="net needs larger images"):
        scale(net.network(), (3, 4, 4))


# ------------------------------------------------------------------- networks.json


def test_the_file_has_every_model_of_the_zoo():
    assert list_networks() == list_models()


def test_the_file_agrees_with_the_catalogue():
    for name in list_models():
        spec, network = get_spec(name), catalogue_network(name)
        assert network.params == spec.params_deploy, name
        assert network.macs / 1e6 == pytest.approx(spec.macs_m, abs=0.06), name


def test_an_unknown_model_or_form_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="unknown network 'repvgg_a9'; did you mean 'repvgg_a"):
        catalogue_network("repvgg_a9")
    with pytest.raises(UsageError, match="unknown graph form 'deployed'; did you mean 'deploy'"):
        catalogue_network("repvgg_a0", "deployed")


def test_kernels_of_the_zoo_need_no_torch():
    code = """
import sys
from litezoo.benchmarks.kernels import make_kernels
from litezoo.benchmarks.network import catalogue_network, scale
network = scale(catalogue_network("mobilenetv3_small_050"), (3, 192, 192))
assert make_kernels(network, "fused")
assert not {"torch", "numpy", "timm", "onnx"} & set(sys.modules), sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
