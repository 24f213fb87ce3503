"""The channel shuffle: one permutation in three forms, and what they become in ONNX."""

from functools import cache

import pytest
import torch
from helpers import images, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.fuse import fuse
from litezoo.models.shuffle import (
    SHUFFLE_FORMS,
    ChannelShuffle,
    split_channels,
    with_shuffle_form,
)
from litezoo.models.shufflenetv1 import ShuffleNetV1
from litezoo.models.shufflenetv2 import ShuffleNetV2

FORMS = list(SHUFFLE_FORMS)
every_form = pytest.mark.parametrize("form", FORMS)
small_networks = pytest.mark.parametrize(
    "name",
    [
        "shufflenetv1_g3_025",
        "shufflenetv1_g3_050_megvii",
        "shufflenetv2_x0_5",
        "shufflenetv2_x0_5_megvii",
    ],
)


def shuffled_by_definition(x, groups):
    """Channel i * C/g + j becomes channel j * g + i, one channel at a time."""
    per_group = x.shape[1] // groups
    y = torch.full_like(x, float("nan"))
    for group in range(groups):
        for member in range(per_group):
            y[:, member * groups + group] = x[:, group * per_group + member]
    return y


# ----------------------------------------------------------------------- the forms are equal


def test_the_default_form_has_four_dimensions():
    assert ChannelShuffle(3).form == "4d"


@every_form
def test_it_deals_the_channels_out_as_the_picture_says(form):
    names = ["a0", "a1", "b0", "b1", "c0", "c1"]
    x = torch.arange(6.0).view(1, 6, 1, 1)
    y = ChannelShuffle(3, form=form)(x)
    assert [names[int(i)] for i in y.flatten()] == ["a0", "b0", "c0", "a1", "b1", "c1"]


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 9),
    per_group=st.integers(1, 9),
    batch=st.integers(1, 3),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int8]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_every_form_is_the_definition_to_the_bit_and_has_an_inverse(
    groups, per_group, batch, height, width, dtype, layout
):
    x = (100 * images(batch, groups * per_group, height, width)).clamp(-127, 127).to(dtype)
    x = x.contiguous(memory_format=layout)
    expected = shuffled_by_definition(x.float(), groups).to(dtype)
    for form in FORMS:
        y = ChannelShuffle(groups, form=form)(x)
        assert torch.equal(y, expected)
        assert torch.equal(ChannelShuffle(per_group, form=form)(y), x)


@every_form
def test_gradients_go_back_where_the_values_came_from(form):
    x = images(2, 12, 3, 5).requires_grad_()
    weights = images(2, 12, 3, 5, seed=1)
    (ChannelShuffle(3, form=form)(x) * weights).sum().backward()
    assert torch.equal(x.grad, ChannelShuffle(4)(weights))


def test_the_halves_are_the_first_and_the_second_channels():
    x = images(2, 6, 3, 3)
    first, second = split_channels(x)
    assert torch.equal(first, x[:, :3]) and torch.equal(second, x[:, 3:])


@torch.inference_mode()
@small_networks
def test_networks_give_the_same_bits_in_every_form(name):
    torch.manual_seed(0)
    model = shake(create_model(name, num_classes=10)).eval()
    x = images(2, 3, 33, 47)
    for network in (model, fuse(model)):
        outputs = [with_shuffle_form(network, form)(x) for form in FORMS]
        assert all(torch.equal(y, network(x)) for y in outputs)


# ----------------------------------------------------------------------- with_shuffle_form


def test_another_form_is_a_copy():
    model = create_model("shufflenetv2_x0_5", num_classes=10)
    twin = with_shuffle_form(model, "gather")
    forms = [
        {m.form for m in net.modules() if isinstance(m, ChannelShuffle)} for net in (model, twin)
    ]
    assert forms == [{"4d"}, {"gather"}]
    assert twin.state_dict().keys() == model.state_dict().keys()
    theirs = {p.data_ptr() for p in model.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in twin.parameters())


def test_an_unknown_form_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"unknown shuffle form '4-d'.*'4d'"):
        with_shuffle_form(create_model("shufflenetv2_x0_5", num_classes=10), "4-d")


def test_a_model_without_shuffles_is_refused():
    with pytest.raises(UsageError, match="Conv2d has no channel shuffle"):
        with_shuffle_form(nn.Conv2d(3, 4, 1), "gather")


# ----------------------------------------------------------------------- in ONNX


@cache
def two_shuffles(form):
    """Both shuffles of the family, by 2 groups, and back by 24; as ONNX."""
    model = nn.Sequential(
        nn.Conv2d(3, 48, 1), ChannelShuffle(2), nn.Conv2d(48, 48, 1), ChannelShuffle(24)
    )
    return exported(with_shuffle_form(model.eval(), form), images(2, 3, 8, 8))


def exported(model, x):
    to_onnx = pytest.importorskip("litezoo.export.to_onnx")
    pytest.importorskip("onnxscript")
    return to_onnx.export_onnx(model, x.numpy(), metadata={})


def ranks(proto):
    """Return the number of dimensions of every tensor that flows through the graph."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    known = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    flowing = [name for node in graph.node for name in node.output]
    assert all(known[name].HasField("shape") for name in flowing)
    return [len(known[name].shape.dim) for name in flowing]


@pytest.mark.parametrize(
    ("form", "most", "operators"),
    [
        ("4d", 4, {"Reshape", "Transpose"}),
        ("5d", 5, {"Reshape", "Transpose"}),
        ("gather", 4, {"Gather"}),
    ],
)
def test_only_the_plain_form_has_tensors_of_five_dimensions_in_onnx(form, most, operators):
    proto = two_shuffles(form)
    assert max(ranks(proto)) == most
    assert {node.op_type for node in proto.graph.node} == {"Conv"} | operators


def shallow(network, **options):
    """A deploy form of one stage of two units."""
    torch.manual_seed(0)
    return fuse(network(depths=(2,), num_classes=10, **options).eval())


@pytest.mark.parametrize(
    ("network", "options", "shuffles", "splits"),
    [
        (ShuffleNetV1, {"groups": 3, "stem_width": 6, "widths": (60,)}, 2, 0),
        (ShuffleNetV2, {"widths": (48,), "final_width": 64}, 2, 1),
        (ShuffleNetV2, {"widths": (48,), "final_width": 64, "edition": "megvii"}, 1, 1),
    ],
    ids=["v1", "v2", "v2-megvii"],
)
def test_an_exported_network_has_four_dimensions_at_most_and_constant_shapes(
    network, options, shuffles, splits
):
    from litezoo.export.to_onnx import load_onnx

    model = shallow(network, **options)
    x = images(2, 3, 64, 64)
    proto = exported(model, x)
    assert max(ranks(proto)) == 4
    constants = {tensor.name for tensor in proto.graph.initializer}
    operators = [node.op_type for node in proto.graph.node]
    assert all(
        set(node.input[1:]) <= constants
        for node in proto.graph.node
        if node.op_type in ("Reshape", "Split")
    )
    assert operators.count("Transpose") == shuffles
    assert operators.count("Split") == splits, "one node a split, no slices and no sequences"
    assert {"Slice", "Shape", "SplitToSequence", "Gather"}.isdisjoint(operators)
    with torch.inference_mode():
        expected = model(x[:1]).numpy()
    assert load_onnx(proto)(x[:1].numpy()) == pytest.approx(expected, abs=1e-4)


def test_openvino_makes_its_own_operator_of_the_default_form():
    openvino = pytest.importorskip("openvino")
    graph = openvino.Core().read_model(two_shuffles("4d").SerializeToString())
    compiled = openvino.Core().compile_model(graph, "CPU").get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_ops()]
    assert kinds.count("ShuffleChannels") == 2 and "Transpose" not in kinds
