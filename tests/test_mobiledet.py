"""MobileDet, which no library has: the networks against a transcription of the official tables.

The tables are spelled here a second time, as words, and run with functional calls alone on the
tensors of our state dict in their order; nothing of the implementation is used.
"""

import re

import pytest
import torch
from helpers import fill, images, on_meta, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from litezoo.models.catalogue import list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.mobiledet import scale_filters

NAMES = list_models("mobiledet_*")
every_variant = pytest.mark.parametrize("name", NAMES)

#: ssd_mobiledet_feature_extractor.py of tensorflow/models; C1 to C5 are parted by "|". "+"
#: stands for residual=True; "tucker" has its rank ratios in percent; k=3, s=1 where not said.
TABLES = {
    "mobiledet_cpu": """
        ibn0 8 |
        ibn 16 e4 s2 |
        ibn 32 e8 s2, ibn 32 e4 +, ibn 32 e4 +, ibn 32 e4 + |
        ibn 72 k5 e8 s2, ibn 72 e8 +, ibn 72 k5 e4 +, ibn 72 e4 +, ibn 72 e8, ibn 72 e8 +,
            ibn 72 e8 +, ibn 72 e8 + |
        ibn 104 k5 e8 s2, ibn 104 k5 e4 +, ibn 104 k5 e4 +, ibn 104 e4 +, ibn 144 e8
    """,
    "mobiledet_dsp": """
        ibn0 24 |
        fused 32 e4 s2, fused 32 e4 +, ibn 32 e4 +, tucker 32 r25 q75 + |
        fused 64 e8 s2, ibn 64 e4 +, fused 64 e4 +, fused 64 e4 + |
        fused 120 e8 s2, ibn 120 e4 +, ibn 120 e8 +, ibn 120 e8 +, fused 144 e8, ibn 144 e8 +,
            ibn 144 e8 +, ibn 144 e8 + |
        ibn 160 e4 s2, ibn 160 e4 +, fused 160 e4 +, tucker 160 r75 q75 +, ibn 240 e8
    """,
    "mobiledet_edgetpu": """
        tucker 16 r25 q75 |
        fused 16 e8 s2, fused 16 e4 +, fused 16 e8 +, fused 16 e4 + |
        fused 40 k5 e8 s2, fused 40 e4 +, fused 40 e4 +, fused 40 e4 + |
        ibn 72 e8 s2, ibn 72 e8 +, fused 72 e4 +, fused 72 e4 +, ibn 96 k5 e8, ibn 96 k5 e8 +,
            ibn 96 e8 +, ibn 96 e8 + |
        ibn 120 k5 e8 s2, ibn 120 e8 +, ibn 120 k5 e4 +, ibn 120 e8 +, ibn 384 k5 e8
    """,
    "mobiledet_gpu": """
        tucker 16 r25 q25 |
        fused 32 e8 s2, tucker 32 r25 q25 +, tucker 32 r25 q25 +, tucker 32 r25 q25 + |
        fused 64 e8 s2, fused 64 e8 +, fused 64 e8 +, fused 64 e4 + |
        fused 128 e8 s2, fused 128 e4 +, fused 128 e4 +, fused 128 e4 +, fused 128 e8,
            fused 128 e8 +, fused 128 e8 +, fused 128 e8 + |
        fused 128 e4 s2, fused 128 e4 +, fused 128 e4 +, fused 128 e4 +, ibn 384 e8
    """,
}  # fmt: skip


class Transcription:
    """The official functions, taking their variables from a state dict one after the other."""

    def __init__(self, state_dict, *, cpu):
        self.tensors = [v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")]
        self.cpu = cpu

    def take(self, count):
        taken, self.tensors = self.tensors[:count], self.tensors[count:]
        return taken

    def act(self, x):
        return x * x.add(3).clamp(0, 6) / 6 if self.cpu else x.clamp(0, 6)

    def conv(self, x, filters, kernel=1, stride=1, *, depthwise=False, act=True):
        weight, *norm = self.take(5)
        channels = x.shape[1]
        assert weight.shape == (filters, 1 if depthwise else channels, kernel, kernel)
        margins = []
        for size in reversed(x.shape[2:]):  # TensorFlow's "SAME": the odd pixel behind
            out = -(-size // stride)
            total = max((out - 1) * stride + kernel - size, 0)
            margins += [total // 2, total - total // 2]
        y = F.conv2d(F.pad(x, margins), weight, stride=stride, groups=channels if depthwise else 1)
        gamma, beta, mean, variance = (v[:, None, None] for v in norm)
        y = gamma * (y - mean) / torch.sqrt(variance + 0.01) + beta
        return self.act(y) if act else y

    def squeeze_and_excite(self, x, hidden):
        fc1, bias1, fc2, bias2 = self.take(4)
        assert fc1.shape[0] == hidden
        squeezed = x.mean((2, 3))
        squeezed = self.act(squeezed @ fc1.flatten(1).T + bias1)
        return x * torch.sigmoid(squeezed @ fc2.flatten(1).T + bias2)[:, :, None, None]

    def ibn(self, x, filters, *, e, k, s, add):
        y, hidden = x, x.shape[1] * e
        if e > 1:
            y = self.conv(y, hidden)
        y = self.conv(y, hidden, k, s, depthwise=True)
        if self.cpu:
            y = self.squeeze_and_excite(y, round_to_8(hidden * 0.25))
        y = self.conv(y, filters, act=False)
        return y + x if add else y

    def fused(self, x, filters, *, e, k, s, add):
        y = self.conv(x, x.shape[1] * e, k, s)
        y = self.conv(y, filters, act=False)
        return y + x if add else y

    def tucker(self, x, filters, *, r, q, k, s, add):
        y = self.conv(x, round_to_8(x.shape[1] * r / 100))
        y = self.conv(y, round_to_8(filters * q / 100), k, s)
        y = self.conv(y, filters, act=False)
        return y + x if add else y

    def run(self, x, table):
        """Return C1 to C5 and the logits."""
        maps = []
        x = self.conv(x, 16 if self.cpu else 32, 3, 2)
        for stage in table.split("|"):
            for call in stage.split(","):
                kind, filters, *words = call.split()
                values = {"k": 3, "s": 1, "add": "+" in words}
                values |= {w[0]: int(w[1:]) for w in words if w != "+"}
                if kind == "ibn0":
                    kind, values["e"] = "ibn", 1
                x = getattr(self, kind)(x, int(filters), **values)
            maps.append(x)
        weight, bias = self.take(2)
        logits = x.mean((2, 3)) @ weight.T + bias
        assert not self.tensors, "variables are left over"
        return maps, logits


def round_to_8(value):
    return max(8, 8 * int(value / 8 + 0.5))


@torch.no_grad()
@every_variant
def test_the_network_is_that_of_the_official_code(name):
    model = fill(on_meta(create_model, name)).double()
    deploy = fuse(model)
    assert [info["module"] for info in model.feature_info] == [f"stages.{i}" for i in range(5)]
    taken = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _m, _i, y: taken.append(y.clone()))
    for height, width in ((32, 64), (33, 47)):  # sides even at every stride, and odd at some
        taken.clear()
        x = images(1, 3, height, width, dtype=torch.float64)
        logits = model(x)
        transcription = Transcription(model.state_dict(), cpu=name == "mobiledet_cpu")
        maps, expected = transcription.run(x, TABLES[name])
        assert len(taken) == len(maps) == 5
        for mine, theirs in zip(taken, maps, strict=True):
            assert relative_error(mine, theirs) <= 1e-10
        assert relative_error(logits, expected) <= 1e-10
        assert relative_error(deploy(x), expected) <= 1e-10


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mobiledet_cpu", 3_006_440),
        ("mobiledet_dsp", 5_839_952),
        ("mobiledet_edgetpu", 2_777_040),
        ("mobiledet_gpu", 11_689_920),
    ],
)
def test_the_backbone_has_the_parameters_of_an_independent_count(name, parameters):
    """Counted from the official code by another program, stem to C5."""
    backbone = on_meta(create_model, name, num_classes=0)
    assert sum(p.numel() for p in backbone.parameters()) == parameters


@every_variant
def test_c4_and_c5_that_a_detector_reads_have_the_widths_of_the_table(name):
    widths = [int(re.findall(r"\w+ (\d+)", stage)[-1]) for stage in TABLES[name].split("|")]
    net = on_meta(create_model, name, features_only=True, out_indices=(3, 4))
    assert net.feature_info.channels() == widths[3:]
    assert net.feature_info.reduction() == [16, 32]


@every_variant
def test_every_batchnorm_has_the_epsilon_of_the_official_code(name):
    norms = [m for m in on_meta(create_model, name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {0.01}


def test_only_the_cpu_model_has_h_swish_and_squeeze_and_excitation():
    for name in NAMES:
        model = on_meta(create_model, name)
        kinds = {type(m).__name__ for m in model.modules()}
        cpu = name == "mobiledet_cpu"
        assert ("SqueezeExcite" in kinds) == ("Hardswish" in kinds) == ("Sigmoid" in kinds) == cpu
        assert ("ReLU6" in kinds) != cpu and not kinds & {"ReLU", "Hardsigmoid"}


# ----------------------------------------------------------------------- scale


@given(st.integers(1, 4096), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_scaled_filters_are_the_nearest_multiple_of_8(filters, multiplier):
    scaled = scale_filters(filters, multiplier)
    wanted = filters * multiplier
    assert scaled % 8 == 0 and scaled >= 8
    assert abs(scaled - wanted) <= 4 or (scaled == 8 and wanted < 8)


@pytest.mark.parametrize(("filters", "scaled"), [(44, 8), (48, 16), (16, 8), (120, 32), (8, 8)])
def test_scaling_by_a_quarter_rounds_half_up_and_knows_no_90_percent_rule(filters, scaled):
    assert scale_filters(filters, 0.25) == scaled
