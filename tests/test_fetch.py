"""Public weights: fetched whole, checked, cached; or refused in one sentence, with nothing left.

The server is local and speaks the hub's protocol; the weights are made by timm, torchvision and
pytorchcv.
"""

import csv
import hashlib
import importlib.resources
import io
import json
import os
import re
import socket
import zipfile

import pytest
import timm
import torch
import torchvision
from helpers import images, relative_error, shake
from hub_server import HubServer
from pytorchcv.model_provider import get_model as pytorchcv_model
from safetensors.torch import save

import litezoo
from litezoo.models.catalogue import FREE_LICENCES, get_spec, list_models
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, MissingError, UsageError
from litezoo.models.fetch import fetch_weights
from litezoo.models.weights import read_checkpoint

HUB_MODEL, HUB_TAG = "mobilenetv3_small_050", "lamb_in1k"
HUB_PATH = f"/timm/{HUB_MODEL}.{HUB_TAG}/resolve/main/model.safetensors"
URL_MODEL, URL_TAG = "shufflenetv2_x0_5", "tv_in1k_v1"


def pth(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def timms():
    torch.manual_seed(0)
    return shake(timm.create_model(HUB_MODEL)).eval()


@pytest.fixture(scope="module")
def torchvisions():
    torch.manual_seed(0)
    return shake(torchvision.models.shufflenet_v2_x0_5(weights=None)).eval()


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of the hub and of torch.hub, a clean network environment."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # what is kept of a cut download
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # retries wait for nobody
    close_session()
    yield tmp_path
    close_session()


def connect(monkeypatch, endpoint):
    """Point the client at `endpoint`; it has read HF_ENDPOINT already, at import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(timms, caches, monkeypatch):
    server = HubServer({HUB_PATH: save(timms.state_dict())})
    connect(monkeypatch, server.endpoint)
    yield server
    server.stop()


@pytest.fixture
def web(torchvisions, caches, monkeypatch):
    """A plain web server, which the catalogue's entry is pointed at."""
    content = pth(torchvisions)
    digest = hashlib.sha256(content).hexdigest()
    server = HubServer({f"/models/net-{digest[:8]}.pth": content})
    server.url = f"{server.endpoint}/models/net-{digest[:8]}.pth"
    server.entry = point_at(monkeypatch, URL_MODEL, URL_TAG, server.url, f"sha256:{digest[:8]}")
    yield server
    server.stop()


def point_at(monkeypatch, name, tag, url, digest):
    """Let the catalogue say that these weights are somewhere else."""
    import dataclasses

    from litezoo.models import catalogue

    spec = get_spec(name)
    entry = dataclasses.replace(spec.get_weights(tag), source=url, digest=digest)
    weights = tuple(entry if w.tag == tag else w for w in spec.weights)
    table = {**catalogue._registry(), name: dataclasses.replace(spec, weights=weights)}
    monkeypatch.setattr(catalogue, "_registry", lambda: table)
    return entry


def left_behind(folder):
    """Return the large files in a cache."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return [p for p in files if not p.is_symlink() and p.stat().st_size > 1000]


def logits(model, x):
    with torch.inference_mode():
        return model.eval()(x)


X = images(2, 3, 64, 64)


# ----------------------------------------------------------------------- the hub


def test_weights_are_fetched_once_and_then_taken_from_the_cache(hub, caches, timms):
    model = create_model(HUB_MODEL, weights=HUB_TAG)
    assert relative_error(logits(model, X), logits(timms, X)) <= 1e-5
    assert hub.gets() == [(HUB_PATH, None)]
    hub.stop()
    again = create_model(HUB_MODEL, weights="default", num_classes=10).eval()
    with torch.inference_mode():
        assert torch.equal(again.forward_features(X), model.forward_features(X))
    assert fetch_weights(get_spec(HUB_MODEL).get_weights(), model="x").is_relative_to(caches)


def test_a_cut_download_goes_on_where_it_stopped(hub, timms):
    hub.cut = [100_000]
    model = create_model(HUB_MODEL, weights=HUB_TAG)
    assert relative_error(logits(model, X), logits(timms, X)) <= 1e-5
    [(_, first), (_, second)] = hub.gets()
    assert first is None and second.startswith(f"bytes={2**16}-")


def check_refusal(error, source, endpoint):
    text = str(error)
    assert text.startswith(f"cannot fetch {source} from {endpoint} ("), text
    for suggestion in ("`--weights FILE`", "`litezoo train ", "`--weights random`"):
        assert suggestion in text
    assert "\n" not in text and error.exit_status == 4


REPOSITORY = f"timm/{HUB_MODEL}.{HUB_TAG}"


@pytest.fixture
def nobody():
    """An endpoint where no one listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_offline_without_a_cache_three_things_to_type_are_named(caches, nobody, monkeypatch):
    connect(monkeypatch, nobody)
    with pytest.raises(MissingError) as caught:
        create_model(HUB_MODEL, weights=HUB_TAG)
    check_refusal(caught.value, REPOSITORY, nobody)
    assert left_behind(caches) == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(404, "EntryNotFound"), (401, "hf auth login"), (403, "hf auth login"), (500, "500")],
)
def test_a_refusal_of_the_hub_is_told_in_one_sentence(hub, caches, status, words):
    hub.status = status
    with pytest.raises(MissingError, match=words) as caught:
        create_model(HUB_MODEL, weights=HUB_TAG)
    check_refusal(caught.value, REPOSITORY, hub.endpoint)
    assert left_behind(caches) == []


def test_a_truncated_file_of_the_hub_leaves_nothing_behind(hub, caches):
    hub.truncated = True
    with pytest.raises(MissingError, match="should be of size") as caught:
        create_model(HUB_MODEL, weights=HUB_TAG)
    check_refusal(caught.value, REPOSITORY, hub.endpoint)
    hub.truncated = False
    create_model(HUB_MODEL, weights=HUB_TAG)


def test_other_bytes_than_the_hub_announced_are_removed(hub, caches):
    hub.lie = True
    with pytest.raises(CheckFailed, match=r"is not the published file \(sha256 .*removed"):
        create_model(HUB_MODEL, weights=HUB_TAG)
    assert left_behind(caches) == []
    hub.lie = False
    create_model(HUB_MODEL, weights=HUB_TAG)


def test_a_cache_that_rotted_is_noticed(hub, caches):
    create_model(HUB_MODEL, weights=HUB_TAG)
    [blob] = left_behind(caches)
    blob.resolve().write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckFailed, match="removed, try again"):
        create_model(HUB_MODEL, weights=HUB_TAG)
    create_model(HUB_MODEL, weights=HUB_TAG)


def test_the_file_of_another_model_is_refused_by_a_key(hub):
    hub.files[HUB_PATH] = save(timm.create_model("mobilenetv3_small_075").state_dict())
    with pytest.raises(UsageError, match=f"these weights are not of {HUB_MODEL}"):
        create_model(HUB_MODEL, weights=HUB_TAG)


# ----------------------------------------------------------------------- plain URLs


def test_a_url_of_the_catalogue_is_fetched_once(web, caches, torchvisions):
    model = create_model(URL_MODEL, weights=URL_TAG)
    assert relative_error(logits(model, X), logits(torchvisions, X)) <= 1e-5
    assert len(web.gets()) == 1
    web.stop()
    create_model(URL_MODEL, weights=URL_TAG, features_only=True)
    assert [p.parent.name for p in left_behind(caches)] == ["checkpoints"], "torch.hub's own place"


def test_a_cut_url_goes_on_where_it_stopped(web, torchvisions):
    web.cut = [100_000]
    model = create_model(URL_MODEL, weights=URL_TAG)
    assert relative_error(logits(model, X), logits(torchvisions, X)) <= 1e-5
    assert [ranges for _, ranges in web.gets()][1].startswith(f"bytes={2**16}-")


def test_a_download_that_was_killed_is_resumed(web, caches, torchvisions):
    content = web.files["/models/" + web.url.rpartition("/")[2]]
    folder = caches / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / (web.url.rpartition("/")[2] + ".incomplete")).write_bytes(content[:50_000])
    model = create_model(URL_MODEL, weights=URL_TAG)
    assert relative_error(logits(model, X), logits(torchvisions, X)) <= 1e-5
    assert [ranges for _, ranges in web.gets()] == ["bytes=50000-"]


@pytest.mark.parametrize("status", [404, 401, 503])
def test_a_refusal_of_a_web_server_is_told_in_one_sentence(web, caches, status):
    web.status = status
    with pytest.raises(MissingError, match=str(status)) as caught:
        create_model(URL_MODEL, weights=URL_TAG)
    check_refusal(caught.value, web.url, web.endpoint)
    assert left_behind(caches) == []


def test_a_web_server_that_is_not_there_is_told(caches, nobody, monkeypatch):
    point_at(monkeypatch, URL_MODEL, URL_TAG, f"{nobody}/net.pth", "")
    with pytest.raises(MissingError) as caught:
        create_model(URL_MODEL, weights=URL_TAG)
    check_refusal(caught.value, f"{nobody}/net.pth", nobody)


def test_other_bytes_than_published_are_removed(web, caches):
    web.lie = True
    with pytest.raises(CheckFailed, match=r"is not the published file \(sha256 .*removed"):
        create_model(URL_MODEL, weights=URL_TAG)
    assert left_behind(caches) == []
    web.lie = False
    create_model(URL_MODEL, weights=URL_TAG)


def test_a_truncated_file_of_a_web_server_is_refused(web, caches):
    web.truncated = True
    with pytest.raises(MissingError, match="size"):
        create_model(URL_MODEL, weights=URL_TAG)
    assert not [p for p in left_behind(caches) if p.suffix != ".incomplete"]
    web.truncated = False
    create_model(URL_MODEL, weights=URL_TAG)


def test_any_url_can_be_named_and_its_own_digest_is_checked(web, torchvisions):
    model = create_model(URL_MODEL, weights=web.url)
    assert relative_error(logits(model, X), logits(torchvisions, X)) <= 1e-5
    wrong = web.url.replace("net-", "net-0")
    web.files[wrong.removeprefix(web.endpoint)] = b"0" * 5000
    with pytest.raises(CheckFailed, match="is not the published file"):
        create_model(URL_MODEL, weights=wrong)


def test_a_page_instead_of_a_file_is_refused(web):
    web.files["/models/page.pth"] = b"<html>please log in</html>"
    with pytest.raises(UsageError, match=r"page\.pth is (corrupt|not a readable)"):
        create_model(URL_MODEL, weights=f"{web.endpoint}/models/page.pth")


def test_a_zip_of_pytorchcv_is_read_and_its_content_checked(web, monkeypatch):
    theirs = shake(pytorchcv_model("shufflenet_g1_wd4")).eval()
    content, buffer = pth(theirs), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("shufflenet_g1_wd4-1-2.pth", content)
    web.files["/s.pth.zip"] = buffer.getvalue()
    sha1 = hashlib.sha1(content).hexdigest()[:8]
    arguments = ("shufflenetv1_g1_025", "pytorchcv_in1k", f"{web.endpoint}/s.pth.zip")
    entry = point_at(monkeypatch, *arguments, f"sha1:{sha1}")
    assert not entry.unreadable
    model = create_model("shufflenetv1_g1_025", weights="pytorchcv_in1k")
    x = images(1, 3, 224, 224)
    assert relative_error(logits(model, x), logits(theirs, x)) <= 1e-5
    point_at(monkeypatch, *arguments, "sha1:00000000")
    with pytest.raises(CheckFailed, match="is not the published file"):
        create_model("shufflenetv1_g1_025", weights="pytorchcv_in1k")


# ----------------------------------------------------------------------- licences


def test_weights_that_forbid_commercial_use_must_be_accepted_by_name(hub):
    name, tag = "resnet18", "fb_swsl_ig1b_ft_in1k"
    with pytest.raises(UsageError, match=r'licence \'CC-BY-NC-4.0\'.*allow_license="CC-BY-NC-4.0"'):
        create_model(name, weights=tag)
    with pytest.raises(UsageError, match=r"CC-BY-NC-4\.0"):
        create_model(name, weights=tag, allow_license=["MIT", "unknown"])
    assert hub.requests == [], "nothing is fetched before"
    theirs = shake(timm.create_model(name)).eval()
    hub.files[f"/timm/{name}.{tag}/resolve/main/model.safetensors"] = save(theirs.state_dict())
    model = create_model(name, weights=tag, allow_license="CC-BY-NC-4.0")
    assert relative_error(logits(model, X), logits(theirs, X)) <= 1e-5


def test_an_unknown_licence_must_be_accepted_too():
    with pytest.raises(UsageError, match='allow_license="unknown"'):
        create_model("vovnet39", weights="official_in1k")


def test_the_default_weights_are_free_wherever_there_are_free_ones():
    for name in list_models(pretrained=True):
        spec = get_spec(name)
        if any(w.is_free and not w.unreadable for w in spec.weights):
            assert spec.get_weights().is_free, name


def test_weights_that_are_known_but_cannot_be_loaded_say_why():
    with pytest.raises(UsageError, match="known but cannot be loaded: a PaddlePaddle pickle"):
        create_model("repvgg_a0", weights="paddle_in1k")


# ----------------------------------------------------------------------- the table


OTHER_LICENCES = {"CC-BY-NC-4.0", "LicenseRef-ETRI", "mobileone-license", "unknown"}


def rows():
    text = (importlib.resources.files("litezoo.models") / "weights.csv").read_text()
    return list(csv.DictReader(io.StringIO(text)))


def test_every_row_of_the_table_is_of_a_model_and_says_what_it_must():
    names = set(list_models())
    for row in rows():
        assert row["model"] in names, row
        assert row["licence"] in FREE_LICENCES | OTHER_LICENCES
        assert bool(row["top1_percent"]) <= bool(row["top1_source"]), row
        assert re.fullmatch(r"(sha256|sha1):[0-9a-f]{8,64}|", row["digest"]), row


@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_every_loadable_row_can_be_fetched_by_url_or_from_the_hub(name):
    for weights in get_spec(name).weights:
        if not weights.unreadable:
            assert weights.is_url or re.fullmatch(r"[\w.-]+/[\w.-]+", weights.source)


# ----------------------------------------------------------------------- to the hub and back


@pytest.fixture(scope="module")
def registered():
    import litezoo.models.timm_entrypoints as entrypoints

    return entrypoints


def test_a_model_pushed_to_the_hub_comes_back(hub, registered):
    model = shake(create_model("mobilenetv3_small_050", num_classes=7, in_chans=1)).eval()
    url = litezoo.push_to_hub(model, "me/digits", token="hf_x")
    assert "me/digits" in hub.repositories and url.startswith(hub.endpoint)
    assert {p.rpartition("/")[2] for p in hub.files if p.startswith("/me/digits/")} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    x = images(2, 1, 64, 64)
    back = litezoo.from_pretrained("me/digits")
    assert (back.num_classes, back.in_chans) == (7, 1)
    assert torch.equal(logits(back, x), logits(model, x))
    named = create_model("mobilenetv3_small_050", weights="hf-hub:me/digits", num_classes=3)
    assert named.num_classes == 3

    by_timm = timm.create_model("hf-hub:me/digits", pretrained=True)
    assert torch.equal(logits(by_timm, x), logits(model, x))


@pytest.mark.parametrize("licence", ["apache-2.0", "cc-by-nc-4.0"])
def test_a_licence_that_the_repository_states_has_to_be_accepted(hub, licence):
    litezoo.push_to_hub(
        create_model("mobilenetv3_small_050", num_classes=2), "me/net", token="hf_x"
    )
    path = next(p for p in hub.files if p.startswith("/me/net/") and p.endswith("/config.json"))
    config = json.loads(hub.files[path])
    config["pretrained_cfg"]["license"] = licence
    hub.files[path] = json.dumps(config).encode()
    if licence == "cc-by-nc-4.0":
        with pytest.raises(UsageError, match=r"'cc-by-nc-4\.0'.*accept it by name"):
            litezoo.from_pretrained("me/net")
    assert litezoo.from_pretrained("me/net", allow_license="cc-by-nc-4.0").num_classes == 2


def test_a_deploy_form_is_not_pushed(hub):
    deploy = litezoo.fuse(create_model("mobilenetv3_small_050"))
    with pytest.raises(UsageError, match="push the train form"):
        litezoo.push_to_hub(deploy, "me/net")
    assert hub.requests == []


def test_a_hub_that_does_not_let_one_write_is_told(hub):
    hub.status = 403
    with pytest.raises(MissingError, match=r"cannot push to me/net .*hf auth login"):
        litezoo.push_to_hub(create_model("mobilenetv3_small_050"), "me/net")


def test_what_is_no_classifier_of_the_zoo_is_not_pushed():
    with pytest.raises(UsageError, match="only classifiers made by litezoo"):
        litezoo.push_to_hub(timm.create_model("test_resnet"), "me/net")


def test_a_repository_of_something_else_is_told(hub):
    hub.files["/me/other/resolve/main/config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(UsageError, match="no repository of an image classifier"):
        litezoo.from_pretrained("me/other")


# ----------------------------------------------------------------------- timm's own ways


def test_timm_knows_every_model(registered):
    assert set(timm.list_models("litezoo_*")) == {f"litezoo_{n}" for n in list_models()}
    tag = f"litezoo_{HUB_MODEL}.{HUB_TAG}"
    assert tag in timm.list_models("litezoo_*", pretrained=True)
    assert timm.get_pretrained_cfg(tag).hf_hub_id == REPOSITORY


def test_timm_creates_ours_with_their_weights(registered, hub, timms):
    model = timm.create_model(f"litezoo_{HUB_MODEL}.{HUB_TAG}", pretrained=True)
    assert relative_error(logits(model, X), logits(timms, X)) <= 1e-5
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224) and config["interpolation"] == "bicubic"
    net = timm.create_model(f"litezoo_{HUB_MODEL}", features_only=True, out_indices=(1, 2))
    assert len(net(X)) == 2


def test_timms_validation_and_training_code_runs_on_ours(registered, tmp_path):
    """The calls of timm's validate.py, train.py and benchmark.py, in their order."""
    from PIL import Image
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.models import load_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, accuracy, reparameterize_model

    for label in ("cat", "dog"):
        (tmp_path / "val" / label).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (70, 50), (90 * index, 9, 9)).save(
                tmp_path / "val" / label / f"{index}.png"
            )
    model = timm.create_model(f"litezoo_{HUB_MODEL}", num_classes=2, in_chans=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pth")
    load_checkpoint(model, str(tmp_path / "c.pth"))
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    dataset = create_dataset("", root=str(tmp_path / "val"))
    loader = create_loader(
        dataset, **{k: config[k] for k in ("input_size", "interpolation", "mean", "std")},
        batch_size=4, use_prefetcher=False, device=torch.device("cpu"), num_workers=0,
        crop_pct=config["crop_pct"],
    )  # fmt: skip
    [(batch, target)] = loader
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.9)
    torch.nn.functional.cross_entropy(model.train()(batch), target).backward()
    optimizer.step()
    ModelEmaV3(model).update(model)
    [top1] = accuracy(reparameterize_model(model.eval())(batch), target, topk=(1,))
    assert 0 <= float(top1) <= 100


def test_a_checkpoint_of_timms_trainer_gives_its_averaged_weights(timms, tmp_path):
    torch.manual_seed(1)
    averaged = shake(timm.create_model(HUB_MODEL), seed=3).eval()
    content = {
        "epoch": 3,
        "arch": HUB_MODEL,
        "state_dict": timms.state_dict(),
        "state_dict_ema": {f"module.{k}": v for k, v in averaged.state_dict().items()},
    }
    torch.save(content, tmp_path / "last.pth.tar")
    model = create_model(HUB_MODEL, weights=tmp_path / "last.pth.tar")
    assert relative_error(logits(model, X), logits(averaged, X)) <= 1e-5
    assert read_checkpoint(tmp_path / "last.pth.tar").info is None


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model."])
def test_a_lightning_checkpoint_of_any_author_is_read(timms, tmp_path, prefix):
    state = {prefix + k: v for k, v in timms.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1, "global_step": 2}, tmp_path / "x.ckpt")
    model = create_model(HUB_MODEL, weights=tmp_path / "x.ckpt")
    assert relative_error(logits(model, X), logits(timms, X)) <= 1e-5


def test_weights_with_their_own_number_of_classes_keep_them(tmp_path):
    theirs = timm.create_model(HUB_MODEL, num_classes=17)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    assert create_model(HUB_MODEL, weights=tmp_path / "x.pth").num_classes == 17
    assert create_model(HUB_MODEL, weights=tmp_path / "x.pth", num_classes=3).num_classes == 3


def test_a_backbone_without_classifier_needs_a_number_of_classes(tmp_path):
    state = create_model(HUB_MODEL).state_dict()
    backbone = {k: v for k, v in state.items() if not k.startswith("head.fc")}
    torch.save(backbone, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"have no classifier; say how many classes.*num_classes="):
        create_model(HUB_MODEL, weights=tmp_path / "x.pth")
    assert create_model(HUB_MODEL, weights=tmp_path / "x.pth", num_classes=5).num_classes == 5
    create_model(HUB_MODEL, weights=tmp_path / "x.pth", features_only=True)
    create_model(HUB_MODEL, weights=tmp_path / "x.pth", num_classes=0)
