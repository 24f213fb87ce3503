"""Tracing: the operators of any network, their counts are torch's, and engines' kernels follow."""

import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import onnx
import pytest
import timm
import torch
from helpers import shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import litezoo
from litezoo.benchmarks import tracing
from litezoo.benchmarks.graph import fix_input, read_costs
from litezoo.benchmarks.kernels import make_kernels
from litezoo.benchmarks.network import Window, catalogue_network, scale
from litezoo.benchmarks.tracing import find_network, trace, trace_onnx
from litezoo.export.to_onnx import export_onnx, simplify_onnx
from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.errors import MissingError, UsageError
from litezoo.models.layers import ConvBN, SqueezeExcite


class Function(nn.Module):
    """A module that runs a function, with layers to call in it."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images):
        return self.function(self, images)


def traced(function, *, shape=(3, 8, 8), **layers):
    """Return the network of a function of (module, images)."""
    return trace(Function(function, **layers), name="net", resolution=shape)


def names(network):
    return [op.name for op in network.ops]


def conv(ins=3, outs=4, size=3, **options):
    return nn.Conv2d(ins, outs, size, padding=size // 2, bias=False, **options)


# ------------------------------------------------------------------- operators


def test_an_operator_says_what_it_reads_writes_and_where_it_stands():
    network = trace(
        nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        name="net",
        resolution=(3, 8, 8),
    )
    assert [op.kind for op in network.ops] == ["conv", "norm", "activation"]
    assert [op.module for op in network.ops] == ["0", "1", "2"]
    assert [op.inputs for op in network.ops] == [(-1,), (0,), (1,)]
    assert [op.in_elements for op in network.ops] == [192, 256, 256]
    assert [op.weight_elements for op in network.ops] == [108, 16, 0]
    assert network.params == 108 + 8 and network.outputs == (2,)
    shape = network.ops[0].conv
    assert (shape.in_channels, shape.out_channels, shape.groups) == (3, 4, 1)
    assert (shape.kernel, shape.stride, shape.out, shape.padding) == (
        (3, 3), (1, 1), (8, 8), (2, 2),
    )  # fmt: skip


def test_the_module_is_left_as_it_is():
    module = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    network = trace(module, name="net", resolution=(3, 8, 8))
    assert [op.kind for op in network.ops] == ["conv", "norm"]
    assert module.training and not next(module.parameters()).is_meta
    assert next(module.parameters()).requires_grad
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_no_weight_is_allocated_for_a_network_on_the_meta_device():
    with torch.device("meta"):
        module = nn.Sequential(nn.Flatten(), nn.Linear(10**6, 10**6))
    network = trace(module, name="net", resolution=(1, 1000, 1000))
    assert network.macs == 10**12 and network.ops[0].bias_elements == 10**6


def test_names_of_axes_cost_nothing_and_parts_are_views():
    def function(net, x):
        x = net.conv(x)
        left, right = x.chunk(2, dim=1)
        return left.flatten(1).unsqueeze(2).squeeze(2), right.relu()

    network = traced(function, conv=conv())
    assert [op.kind for op in network.ops] == ["conv", "view", "activation"]
    part, relu = network.ops[1:]
    assert part.out_elements == 256 and relu.reads == (128,) and relu.inputs == (1,)
    assert network.outputs == (1, 2)
    assert len(make_kernels(network, "eager")) == 2
    assert [k.ops[0] for k in make_kernels(network, "fused")][1:] == [part.name, "relu"]


def test_a_convolution_of_some_channels_has_them_copied():
    def function(net, x):
        left, right = net.conv(x).chunk(2, dim=1)
        return net.last(left), net.last(right[:, :, 1:]), left.relu()

    network = traced(function, conv=conv(), last=conv(2))
    assert [op.name for op in network.ops if op.kind == "copy"] == ["contiguous", "clone"]
    assert sum(kernel.ops == ("contiguous",) for kernel in make_kernels(network, "eager")) == 0
    several = make_kernels(network, "eager", batch=8)
    assert sum(kernel.ops == ("contiguous",) for kernel in several) == 1


def test_a_parameter_of_one_number_is_a_weight_and_a_number_of_the_code_none():
    def function(net, x):
        return net.gain * x + 3

    network = traced(function, gain=nn.Parameter(torch.ones(1)))
    assert [op.weight_elements for op in network.ops] == [1, 0]


def test_what_is_written_into_a_part_is_seen_through_the_whole():
    def function(net, x):
        x = net.conv(x)
        x[:, :2].relu_()
        return net.last(x)

    network = traced(function, conv=conv(), last=conv(4, 1))
    assert names(network) == ["convolution", "slice", "relu", "convolution"]
    assert set(network.ops[3].inputs) == {0, 2} and network.ops[3].in_elements == 256


def test_what_is_written_into_one_half_leaves_the_other():
    def function(net, x):
        left, right = net.conv(x).chunk(2, dim=1)
        left.relu_()
        return torch.cat([left, right], dim=1)

    relu, cat = traced(function, conv=conv()).ops[2:]
    assert (relu.kind, cat.kind) == ("activation", "concat")
    assert (cat.inputs, cat.reads) == ((2, 1), (128, 128))


def test_a_shuffle_is_a_turn_that_engines_copy_and_a_layout_that_pytorch_copies():
    def function(net, x):
        x = net.conv(x)
        x = x.view(1, 2, 2, 8, 8).transpose(1, 2).reshape(1, 4, 8, 8)
        return net.last(x)

    network = traced(function, conv=conv(), last=conv(4, 1))
    assert names(network) == ["convolution", "transpose", "clone", "convolution"]
    for policy in ("eager", "fused"):
        kernels = make_kernels(network, policy)
        assert [kernel.kind for kernel in kernels] == ["conv", "move", "conv"]
        assert kernels[1].read_elements == kernels[1].write_elements == 256


def test_a_gate_is_read_once_for_its_map():
    def function(net, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()

    mean, _, mul = traced(function).ops
    assert (mean.kind, mean.out_elements, mul.reads) == ("reduce", 3, (192, 3))


def test_padding_copies_and_pools_have_windows():
    def function(net, x):
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2, ceil_mode=True)

    pad, pool = traced(function).ops
    assert (pad.kind, pad.out_shape) == ("copy", (3, 9, 9))
    assert pool.window == Window(kernel=(3, 3), stride=(2, 2), ceil_mode=True)


def test_layer_norm_lays_a_turned_map_out_anew():
    def function(net, x):
        return net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    network = traced(function, norm=nn.LayerNorm(3))
    assert names(network) == ["permute", "clone", "native_layer_norm", "permute"]
    assert network.ops[2].sensitive and network.ops[2].weight_elements == 6


def test_attention_is_one_product():
    def function(net, x):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)

    network = traced(function)
    assert [op.kind for op in network.ops] == ["view", "matmul"]
    assert network.macs == 2 * 64 * 64 * 3


def test_what_is_made_of_weights_alone_reads_no_image():
    def function(net, x):
        return F.conv2d(x, net.conv.weight * net.gain, padding=1)

    network = traced(function, conv=conv(), gain=nn.Parameter(torch.ones(4, 1, 1, 1)))
    assert [op.kind for op in network.ops] == ["other", "conv"]
    assert network.ops[0].inputs == () and network.ops[0].weight_elements == 108 + 4 + 108
    assert [k.macs for k in make_kernels(network, "fused")] == [network.macs]


def test_what_a_first_call_keeps_costs_nothing_later():
    def function(net, x):
        if not hasattr(net, "kept"):
            net.kept = net.table * 2
        return x + net.kept

    module = Function(function, table=nn.Parameter(torch.ones(3, 8, 8)))
    network = trace(module, name="net", resolution=(3, 8, 8))
    assert names(network) == ["add"] and network.ops[0].weight_elements == 192
    assert not hasattr(module, "kept")


def test_convolutions_over_one_axis_and_transposed_ones_have_shapes():
    def function(net, x):
        net.line(x.mean((2, 3)).unsqueeze(1))
        return net.up(x)

    network = traced(
        function,
        line=nn.Conv1d(1, 1, 3, padding=1),
        up=nn.ConvTranspose2d(3, 2, 2, stride=2),
    )
    line, up = (op.conv for op in network.ops if op.conv is not None)
    assert (line.kernel, line.out, line.padding) == ((1, 3), (1, 3), (0, 2))
    assert up.transposed and up.out == (16, 16) and up.out_channels == 2


def test_an_image_that_is_too_small_is_said():
    with pytest.raises(UsageError, match=r"net does not run on an image of 3x2x2: .*; choose"):
        trace(nn.Conv2d(3, 4, 5), name="net", resolution=(3, 2, 2))


# ------------------------------------------------------------------- counts

NETWORKS = [
    "repvgg_a0", "timm:mixnet_s", "timm:ghostnetv2_100", "timm:fastvit_sa12", "timm:skresnet18",
    "timm:convnext_atto", "torchvision:shufflenet_v2_x0_5",
]  # fmt: skip


@cache
def build(name):
    library, found, model = name.partition(":")
    with torch.device("meta"):
        if not found:
            return litezoo.create_model(name).eval()
        if library == "timm":
            return timm.create_model(model).eval()
        from torchvision import models

        return models.get_model(model).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_are_those_of_torchs_counter(name):
    network = find_network(name, graph_form="train")
    module = build(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, *network.resolution, device="meta"))
    assert counter.get_total_flops() == 2 * network.macs
    assert network.params == sum(parameter.numel() for parameter in module.parameters())
    assert "other" not in {op.kind for op in network.ops}


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(2, 5),
    side=st.integers(7, 40),
    name=st.sampled_from(["mobilenetv3_small_050", "shufflenetv1_g3_025"]),
)
def test_a_batch_costs_its_images(batch, side, name):
    module = build(name)
    one, _ = tracing._record(module, name, (1, 3, side, side))
    many, _ = tracing._record(module, name, (batch, 3, side, side))
    assert one == many


def test_the_deploy_form_of_timm_is_what_it_reparameterizes():
    train = find_network("timm:mobileone_s0", graph_form="train")
    deploy = find_network("timm:mobileone_s0")
    assert deploy.macs < train.macs and len(deploy.ops) < len(train.ops) / 2
    assert {op.kind for op in deploy.ops} <= {"conv", "activation", "reduce", "mul", "matmul"}


def test_a_network_whose_code_reads_values_is_built_on_the_cpu():
    network = find_network("torchvision:regnet_y_400mf", graph_form="train")
    assert network.params == 4_344_144  # its page in torchvision's documentation


# ------------------------------------------------------------------- ONNX files


class Mixture(nn.Module):
    """A gate, a shuffle, halves, a residual and a pool: what graphs and traces name differently."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBN(3, 16, 3, stride=2, act=nn.Hardswish)
        self.gate = SqueezeExcite(16, 8, gate=nn.Hardsigmoid)
        self.depthwise = ConvBN(8, 8, 3, groups=8, act=nn.SiLU)
        self.last = ConvBN(16, 16, 1, act=None)
        self.fc = nn.Linear(16, 10)

    def forward(self, images):
        x = self.gate(self.stem(images))
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, self.depthwise(right)], dim=1)
        y = y.view(-1, 2, 8, *y.shape[2:]).transpose(1, 2).reshape(x.shape)
        x = F.max_pool2d(F.relu(self.last(y) + x), 3, 2, 1)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def exported():
    """A module, its graph as export writes it, and this with a batch of one."""
    module = litezoo.fuse(shake(Mixture().eval()))
    images = np.zeros((2, 3, 32, 32), np.float32)
    proto = simplify_onnx(export_onnx(module, images, metadata={}), images)[0]
    return module, proto, fix_input(proto, batch=1, sides=(32, 32), name="net")[0]


def costs(kernel):
    """What has to be equal of a kernel here (elements) and a layer there (bytes)."""
    if hasattr(kernel, "weight_bytes"):
        sizes = (kernel.weight_bytes, kernel.input_bytes, kernel.output_bytes)
        return kernel.kind, kernel.macs, *(size // 4 for size in sizes)
    sizes = (kernel.weight_elements, kernel.read_elements, kernel.write_elements)
    return kernel.kind, kernel.macs, *sizes


def test_fused_kernels_of_a_file_are_those_of_the_profiler(exported):
    proto = exported[-1]
    expected = read_costs(proto, name="net")
    network = trace_onnx(proto, name="net")
    assert list(map(costs, make_kernels(network, "fused"))) == list(map(costs, expected.fused))
    assert network.params == expected.params


def test_fused_kernels_of_a_traced_module_are_those_of_its_file(exported):
    module, _, proto = exported
    network = find_network(module, resolution=32)
    expected = Counter(map(costs, read_costs(proto, name="net").fused))
    assert Counter(map(costs, make_kernels(network, "fused"))) == expected


def test_a_file_has_the_operators_of_its_nodes(tmp_path, exported):
    module, proto, fixed = exported
    onnx.save(proto, tmp_path / "net.onnx")
    network = find_network(tmp_path / "net.onnx", resolution=32)
    assert network == trace_onnx(fixed, name="net.onnx")
    assert (network.name, network.resolution) == ("net.onnx", (3, 32, 32))
    traced = find_network(module, resolution=32).ops
    shapes = [Counter(op.conv for op in ops if op.conv) for ops in (network.ops, traced)]
    assert shapes[0] == shapes[1]


def test_a_file_that_is_none_is_said(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no protobuf")
    with pytest.raises(UsageError, match="is not a whole ONNX model"):
        find_network(tmp_path / "net.onnx")
    with pytest.raises(UsageError, match=r"other\.onnx is not there; give an ONNX file"):
        find_network("other.onnx")


# ------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repvgg_a9", "unknown model 'repvgg_a9'; did you mean 'repvgg_a"),
        ("timm:resnet51", "unknown timm model 'resnet51'; did you mean 'resnet"),
        ("torchvision:resnet19", "unknown torchvision model 'resnet19'; did you mean 'resnet"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(UsageError, match=message):
        find_network(name)


def test_a_wrong_form_or_size_is_said():
    with pytest.raises(UsageError, match="unknown graph form 'fused'"):
        find_network("repvgg_a0", graph_form="fused")
    with pytest.raises(UsageError, match="resolution is 0; give 1 or more"):
        find_network("repvgg_a0", resolution=0)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingError, match="tracing timm:resnet18 needs timm: pip install"):
        find_network("timm:resnet18")


def test_a_module_is_traced_in_the_form_that_is_asked_for():
    module = litezoo.create_model("repvgg_a0", num_classes=10, in_chans=1)
    deploy = find_network(module, resolution=64)
    train = find_network(module, graph_form="train", resolution=64)
    assert deploy.resolution == (1, 64, 64)
    assert len(deploy.ops) < len(train.ops) and module.training
    assert "norm" in {op.kind for op in train.ops} - {op.kind for op in deploy.ops}


def test_a_name_of_the_zoo_needs_no_torch():
    code = """
import sys
from litezoo.benchmarks.tracing import find_network
find_network("mobilenetv3_small_050", graph_form="train", resolution=192)
assert not {"torch", "timm", "onnx"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------- networks.json


def lightest():
    """The lightest model of each family; all: python -m litezoo.benchmarks.tracing --check."""
    specs = sorted(map(get_spec, list_models()), key=lambda spec: -spec.macs_m)
    return sorted({spec.family: spec.name for spec in specs}.values())


@pytest.mark.parametrize("name", lightest()[::4])
def test_the_file_of_networks_is_what_the_code_makes(name):
    stored = catalogue_network(name), catalogue_network(name, "train")
    assert stored == tracing.trace_model(name), (
        "write it anew: python -m litezoo.benchmarks.tracing"
    )


def test_checking_the_file_says_what_is_old(monkeypatch, capsys):
    monkeypatch.setattr(tracing, "list_models", lambda: ["mobilenetv3_small_050"])
    assert tracing.main(["--check"]) == 0
    monkeypatch.setattr(tracing, "trace_model", lambda name: (None, None))
    assert tracing.main(["--check"]) == 3
    assert "mobilenetv3_small_050 in networks.json is not what" in capsys.readouterr().err


# ------------------------------------------------------------------- another resolution


@settings(max_examples=200, deadline=None)
@given(
    side=st.integers(8, 40),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    pad=st.integers(0, 2),
    ceil_mode=st.booleans(),
)
def test_a_window_slides_as_torchs(side, kernel, stride, pad, ceil_mode):
    pad = min(pad, kernel // 2)
    window = Window(
        kernel=(kernel,) * 2, stride=(stride,) * 2, padding=(2 * pad,) * 2, ceil_mode=ceil_mode
    )
    images = torch.empty(1, 1, side, side, device="meta")
    result = F.max_pool2d(images, kernel, stride, pad, ceil_mode=ceil_mode)
    assert window.slide((side, side)) == tuple(result.shape[2:])


@pytest.mark.parametrize("side", [160, 192, 256])
@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "shufflenetv2_x0_5", "cs3sedarknet_l", "ghostnet_050"]
)
def test_scaling_is_tracing_at_another_size(name, side):
    network = tracing._trace_twin(build(name), name, (3, side, side))
    assert scale(catalogue_network(name, "train"), network.resolution) == network
