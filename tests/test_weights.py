"""Weights from disk and from a hub: whole, adapted where asked, or refused in one sentence."""

import hashlib
import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers import images, relative_error, shake
from safetensors.torch import save_file
from timm.models import adapt_input_conv

from litezoo.models.catalogue import Preprocess, get_spec
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.files import file_sha256
from litezoo.models.fuse import fuse
from litezoo.models.weights import (
    INFO_KEY,
    CheckpointInfo,
    convert_state_dict,
    load_state_dict,
    read_checkpoint,
)

A0 = get_spec("repvgg_a0")
FIRST = ("stem.branch_3x3.conv.weight", "stem.branch_1x1.conv.weight")


@pytest.fixture(scope="module")
def timms_a0():
    torch.manual_seed(0)
    return shake(timm.create_model("repvgg_a0")).eval()


@pytest.fixture(scope="module")
def file(timms_a0, tmp_path_factory):
    """timm's repvgg_a0 as the hub has it."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timms_a0.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    """The same network, ours; tests must not change it."""
    return create_model("repvgg_a0", weights=file).eval()


def same_but(model, other, *, except_for=()):
    """Compare two state dicts; `except_for` are prefixes of keys that are not looked at."""
    first, second = model.state_dict(), other.state_dict()
    keys = [k for k in first if not k.startswith(tuple(except_for))]
    assert keys and all(torch.equal(first[k], second[k]) for k in keys)


# ----------------------------------------------------------------------- files


def test_a_safetensors_file_gives_the_logits_of_its_author(file, timms_a0, ours):
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        assert relative_error(ours(x), timms_a0(x)) <= 1e-5


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_a_saved_state_dict_is_read_whole(tmp_path, suffix):
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1])}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.info is None and checkpoint.state_dict.keys() == state.keys()
    assert all(torch.equal(checkpoint.state_dict[k], state[k]) for k in state)
    assert checkpoint.sha256 == file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["absent.pth", "folder.pth"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UsageError, match=rf"no checkpoint .*{name}; give the path of a \.ckpt"):
        create_model("repvgg_a0", weights=tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, suffix, kept):
    state = {"a": torch.randn(1000), "b": torch.randn(1000)}
    path = tmp_path / f"cut{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UsageError, match=rf"cut\{suffix} is (not a readable|corrupt)") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", bytes(range(256))])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    for name in ("what.pth", "what.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            create_model("repvgg_a0", weights=tmp_path / name)


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, save):
    path, proof = tmp_path / "evil.pth", tmp_path / "executed"
    save({"state_dict": Malicious(proof)}, path)
    with pytest.raises(UsageError, match=r"evil\.pth is corrupt or holds more than tensors"):
        read_checkpoint(path)
    assert not proof.exists()


def test_a_pickled_network_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"torch\.save\(model\.state_dict\(\)"):
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {"a": {"b": torch.zeros(1)}}]
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"other\.pth holds no state dict"):
        read_checkpoint(tmp_path / "other.pth")


def test_a_state_dict_with_numbers_for_keys_is_refused(tmp_path):
    torch.save({1: torch.zeros(3)}, tmp_path / "numbered.pth")
    with pytest.raises(UsageError, match=r"numbered\.pth holds no state dict"):
        create_model("repvgg_a0", weights=tmp_path / "numbered.pth")


# ----------------------------------------------------------------------- a checkpoint of ours


def info(**changes):
    values = {
        "model": "repvgg_a0",
        "classes": ("cat", "dog"),
        "preprocess": Preprocess(input_size=(1, 32, 32), mean=(0.5,), std=(0.25,)),
        "data": "digits",
        "state_prefix": "ema.",
        "litezoo_version": "0.1.0",
    }
    return CheckpointInfo(**{**values, **changes})


def save_run(path, model, record):
    """Save what a training run leaves: the averaged weights under a prefix, beside others."""
    state = {f"ema.{k}": v for k, v in model.state_dict().items()}
    state |= {f"model.{k}": torch.zeros_like(v) for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, INFO_KEY: record}, path)


def test_a_run_says_its_classes_and_channels(tmp_path):
    trained = shake(create_model("repvgg_a0", num_classes=2, in_chans=1)).eval()
    save_run(tmp_path / "last.ckpt", trained, info().to_dict())
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.info == info()
    loaded = create_model("repvgg_a0", weights=tmp_path / "last.ckpt").eval()
    x = images(2, 1, 32, 32)
    with torch.inference_mode():
        assert loaded(x).shape == (2, 2) and torch.equal(loaded(x), trained(x))


def test_the_record_of_a_run_survives_its_plain_form():
    assert CheckpointInfo.from_dict(info().to_dict()) == info()


@pytest.mark.parametrize(
    "record",
    [
        {"model": "repvgg_a0"},
        {**info().to_dict(), "surplus": 1},
        {**info().to_dict(), "classes": 3},
        {**info().to_dict(), "preprocess": {"input_size": [3, 32, 32], "sharpen": 1}},
    ],
)
def test_a_broken_record_is_refused(tmp_path, record):
    torch.save({"state_dict": {}, INFO_KEY: record}, tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match="record"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_run_of_another_model_is_refused(tmp_path):
    torch.save({"state_dict": {}, INFO_KEY: info(model="repvgg_b0").to_dict()}, tmp_path / "l.ckpt")
    with pytest.raises(UsageError, match=r"l\.ckpt is of repvgg_b0, not of repvgg_a0"):
        create_model("repvgg_a0", weights=tmp_path / "l.ckpt")


@pytest.mark.parametrize(("has", "wanted"), [(1, 2), (1, 3), (1, 4), (4, 1), (4, 3)])
def test_a_run_says_which_channels_it_cannot_be_adapted_to(tmp_path, has, wanted):
    preprocess = Preprocess(input_size=(has, 32, 32), mean=(0.5,) * has, std=(0.25,) * has)
    trained = create_model("repvgg_a0", num_classes=2, in_chans=has)
    save_run(tmp_path / "last.ckpt", trained, info(preprocess=preprocess).to_dict())
    with pytest.raises(UsageError, match="channel"):
        create_model("repvgg_a0", weights=tmp_path / "last.ckpt", in_chans=wanted)


# ----------------------------------------------------------------------- adapting


def test_other_classes_keep_everything_but_the_classifier(file, ours):
    model = create_model("repvgg_a0", weights=file, num_classes=10)
    same_but(model, ours, except_for=["head."])
    weight, bias = model.head.fc.weight, model.head.fc.bias
    assert weight.shape == (10, 1280) and weight.std() > 0 and weight.isfinite().all()
    assert not torch.equal(weight, ours.head.fc.weight[:10]) and bias.shape == (10,)
    fresh = create_model("repvgg_a0", num_classes=10)
    words = load_state_dict(fresh, ours.state_dict(), A0)
    assert words == ("head.fc.weight: new classifier", "head.fc.bias: new classifier")


def test_without_classes_everything_but_the_classifier_is_loaded(file, ours):
    model = create_model("repvgg_a0", weights=file, num_classes=0).eval()
    assert not [k for k in model.state_dict() if k.startswith("head.fc")]
    same_but(model, ours)
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        expected = ours.forward_head(ours.forward_features(x), pre_logits=True)
        assert torch.equal(model(x), expected)


def test_feature_maps_are_those_of_the_weights(file, ours):
    net = create_model("repvgg_a0", weights=file, features_only=True, out_indices=(4,)).eval()
    x = images(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(net(x)[0], ours.forward_features(x))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_adapt_the_first_kernels_as_timm_does(file, ours, channels):
    model = create_model("repvgg_a0", weights=file, in_chans=channels)
    same_but(model, ours, except_for=FIRST)
    for key in FIRST:
        expected = adapt_input_conv(channels, ours.state_dict()[key].clone())
        assert torch.equal(model.state_dict()[key], expected)


def test_a_grey_image_gives_the_logits_of_its_three_equal_channels(file, ours):
    model = create_model("repvgg_a0", weights=file, in_chans=1).eval()
    x = images(2, 1, 32, 32)
    with torch.inference_mode():
        assert relative_error(model(x), ours(x.expand(-1, 3, -1, -1))) <= 1e-5


def test_adapting_changes_neither_the_weights_nor_their_file(file, ours):
    before, digest = {k: v.clone() for k, v in ours.state_dict().items()}, file_sha256(file)
    given = ours.state_dict()
    load_state_dict(create_model("repvgg_a0", in_chans=4, num_classes=3), given, A0)
    assert given.keys() == before.keys()
    assert all(torch.equal(given[k], before[k]) for k in before)
    create_model("repvgg_a0", weights=file, in_chans=4, num_classes=3)
    assert file_sha256(file) == digest


def test_channels_and_classes_can_be_adapted_at_once(file, ours):
    model = create_model("repvgg_a0", weights=file, in_chans=1, num_classes=7).eval()
    same_but(model, ours, except_for=[*FIRST, "head."])
    with torch.inference_mode():
        assert model(images(2, 1, 32, 32)).shape == (2, 7)


def test_batch_counters_may_be_absent(ours):
    state = {k: v for k, v in ours.state_dict().items() if not k.endswith("num_batches_tracked")}
    model = create_model("repvgg_a0")
    load_state_dict(model, state, A0)
    same_but(model, ours, except_for=[k for k in ours.state_dict() if k not in state])


# ----------------------------------------------------------------------- refusals


def message(model_name, weights_of, **options):
    """Return the refusal of one model's (meta) weights by another."""
    with torch.device("meta"):
        state = create_model(weights_of).state_dict()
        model = create_model(model_name, **options)
    with pytest.raises(UsageError) as caught:
        load_state_dict(model, state, get_spec(model_name))
    return str(caught.value)


def test_weights_of_a_deeper_model_are_refused_by_a_key():
    text = message("repvgg_a0", "repvgg_b0")
    assert text.startswith("these weights are not of repvgg_a0: read in the litezoo layout")
    assert "has stages.0.2.branch_1x1.bn.bias, which the model has not" in text
    assert "stages.0.2.branch_1x1.bn.bias" in text and "unknown" in text
    assert "lacks stages.0.2.branch_1x1.bn.bias" in message("repvgg_b0", "repvgg_a0")


@pytest.mark.parametrize("options", [{}, {"num_classes": 10}, {"num_classes": 0}])
def test_weights_of_a_wider_model_are_refused_by_a_key(options):
    text = message("repvgg_a0", "repvgg_a1", **options)
    assert (
        "these weights are not of repvgg_a0: stem.branch_3x3.conv.weight is (64, 3, 3, 3)" in text
    )


def test_weights_of_the_grouped_sibling_are_refused_by_a_key():
    text = message("repvgg_b1", "repvgg_b1g4")
    assert "stages.0.1.branch_3x3.conv.weight is (128, 32, 3, 3), the model has (128, 128" in text


def test_a_refusal_leaves_the_model_as_it_was(ours):
    model = create_model("repvgg_a0", num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = dict(ours.state_dict())
    wrong["stages.3.0.branch_1x1.bn.bias"] = torch.zeros(3)
    with pytest.raises(UsageError, match=r"stages\.3\.0\.branch_1x1\.bn\.bias is \(3,\)"):
        load_state_dict(model, wrong, A0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_the_deploy_form_are_refused(ours):
    with pytest.raises(UsageError, match=r"not of repvgg_a0: .*lacks .*branch.* keys missing"):
        load_state_dict(create_model("repvgg_a0"), fuse(ours).state_dict(), A0)


def test_weights_with_a_key_of_no_layout_are_refused_by_it(ours, timms_a0):
    state = dict(timms_a0.state_dict())
    state["stem.conv_kxk.conv.scale"] = torch.ones(1)
    with pytest.raises(
        UsageError, match=r"timm layout, the file has stem\.branch_3x3\.conv\.scale"
    ):
        convert_state_dict(state, A0, ours.state_dict())


def test_two_keys_for_one_parameter_are_refused(ours, timms_a0):
    both = {**ours.state_dict(), **timms_a0.state_dict()}
    with pytest.raises(UsageError):
        convert_state_dict(both, A0, ours.state_dict())


def test_an_unknown_batch_counter_is_refused_or_dropped(ours):
    model = create_model("repvgg_a0")
    state = {**ours.state_dict(), "extra.bn.num_batches_tracked": torch.tensor(1)}
    try:
        load_state_dict(model, state, A0)
    except UsageError as error:
        assert "extra.bn.num_batches_tracked" in str(error)
    else:
        same_but(model, ours)


def test_an_empty_state_dict_is_refused():
    with pytest.raises(UsageError, match=r"lacks head\.fc\.bias"):
        load_state_dict(create_model("repvgg_a0"), {}, A0)


def test_an_unknown_tag_is_refused_with_the_nearest():
    with pytest.raises(
        UsageError,
        match=r"unknown weights of repvgg_a0: 'rvgg_in1'; did you mean 'rvgg_in1k'\?",
    ):
        create_model("repvgg_a0", weights="rvgg_in1")


def test_a_variant_without_public_weights_says_so():
    with pytest.raises(UsageError, match="repvgg_b2g2 has no public weights to fetch; give the pa"):
        create_model("repvgg_b2g2", weights="rvgg_in1k")


def test_a_path_is_never_taken_for_a_tag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint weights; give the path"):
        create_model("repvgg_a0", weights=Path("weights"))
