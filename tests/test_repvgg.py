"""RepVGG beyond what timm has: the official repository's key layout, and the grouped variants."""

import pytest
import torch
from helpers import fill, images, on_meta, poison, relative_error
from torch import nn

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.fuse import fuse
from litezoo.models.repvgg import RepVGG, RepVGGBlock
from litezoo.models.weights import convert_state_dict, load_state_dict, read_checkpoint

REPVGG = list_models("repvgg_*")
#: Float32 sums of up to 12 thousand products, in another order.
BOUND = 1e-5


def test_only_the_g2_variants_have_no_partner_in_timm():
    assert {n for n in REPVGG if "timm" not in get_spec(n).references} == {
        "repvgg_b1g2",
        "repvgg_b2g2",
        "repvgg_b3g2",
    }


# ----------------------------------------------------------------------- the official layout


def official_key(key):
    """Return our key as DingXiaoH/RepVGG spells it, written without looking at KEY_LAYOUTS."""
    parts = key.split(".")
    if parts[:2] == ["head", "fc"]:
        return f"linear.{parts[2]}"
    if parts[0] == "stem":
        place, rest = ["stage0"], parts[1:]
    else:
        place, rest = [f"stage{int(parts[1]) + 1}", parts[2]], parts[3:]
    words = {
        "branch_3x3": "rbr_dense",
        "branch_1x1": "rbr_1x1",
        "branch_identity": "rbr_identity",
        "fc1": "down",
        "fc2": "up",
    }
    return ".".join(place + [words.get(word, word) for word in rest])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "repvgg_a0",
            (
                "stage0.rbr_dense.conv.weight",
                "stage0.rbr_1x1.bn.running_var",
                "stage1.1.rbr_identity.weight",
                "stage3.13.rbr_dense.bn.bias",
                "stage4.0.rbr_1x1.conv.weight",
                "linear.bias",
            ),
        ),
        (
            "repvgg_d2se",
            (
                "stage0.se.down.weight",
                "stage1.7.se.up.bias",
                "stage3.23.rbr_identity.running_mean",
                "stage4.0.se.up.weight",
                "linear.weight",
            ),
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_key_of_the_official_repository_has_one_partner(name, keys, prefix):
    ours = on_meta(create_model, name).state_dict()
    theirs = {prefix + official_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours) and all(prefix + key in theirs for key in keys)
    converted = convert_state_dict(theirs, get_spec(name), ours)
    assert converted.keys() == ours.keys()
    assert all(converted[key] is ours[key] for key in ours)


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_an_official_checkpoint_loads_from_a_file(tmp_path, wrapping):
    trained = fill(on_meta(create_model, "repvgg_a0"))
    state = {official_key(k): v for k, v in trained.state_dict().items() if "num_batches" not in k}
    file = tmp_path / "RepVGG-A0-train.pth"
    torch.save(state if wrapping is None else {wrapping: state, "epoch": 119}, file)
    loaded = poison(on_meta(create_model, "repvgg_a0"))
    for key, value in loaded.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
    load_state_dict(loaded, read_checkpoint(file).state_dict, get_spec("repvgg_a0"))
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), trained(x))


# ----------------------------------------------------------------------- g2 and g4


@pytest.mark.parametrize("name", REPVGG)
def test_layers_of_even_index_2_to_26_are_grouped_and_no_others(name):
    """Section 3.4 of the paper: "the 3rd, 5th, 7th, ..., 27th layer", counted from 1."""
    groups = {"g2": 2, "g4": 4}.get(name[-2:], 1)
    model = on_meta(create_model, name)
    layers = [m for m in model.modules() if isinstance(m, RepVGGBlock)]
    assert layers[0] is model.stem
    for index, layer in enumerate(layers):
        expected = groups if index in range(2, 27, 2) else 1
        convolutions = [m for m in layer.modules() if isinstance(m, nn.Conv2d)]
        branches = [m for m in convolutions if m.bias is None]
        assert len(branches) == 2 and {m.groups for m in branches} == {expected}, index


def test_the_variants_without_a_partner_in_timm_are_fused_correctly():
    """The g2 variants: the architecture of b1g2 at a quarter of its widths."""
    spec = get_spec("repvgg_b1g2")
    architecture = {**spec.architecture, "stem_width": 16, "widths": (32, 64, 128, 512)}
    with torch.device("meta"):
        model = RepVGG(**architecture).eval()
    fill(model)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(fuse(model)(x), model(x)) <= BOUND
