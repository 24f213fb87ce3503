import csv
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import images, relative_error
from test_data import truncate, write_folder

from litezoo.__main__ import main
from litezoo.models import catalogue
from litezoo.models.catalogue import get_spec
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError
from litezoo.models.weights import INFO_KEY, read_checkpoint
from litezoo.recipes import qat, trainer
from litezoo.recipes.data import eval_transform, open_data
from litezoo.recipes.runs import last_run
from litezoo.recipes.trainer import ClassifierModule, ImageData, MixupConfig

#: A RepVGG of 12 thousand parameters, added as another package would add it.
TINY = dataclasses.replace(
    get_spec("repvgg_a0"),
    name="repvgg_tiny",
    architecture={
        "depths": (1, 2, 2, 1),
        "stem_width": 8,
        "widths": (8, 16, 16, 32),
        "groups": 1,
        "squeeze_excite": False,
    },
    resolution=64,
    weights=(),
)


pytestmark = pytest.mark.usefixtures("tiny_model")


def litezoo(*words):
    """Run the program in this process and return its exit status."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


#: As little of an epoch as there is; what is fast to run tells nothing of accuracy.
SHORT = (
    *("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2),
    *("--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1),
    *("--data.batch_size", 8, "--model.ema_decay=null"),
)


def tiny_run(tmp_path_factory):
    """Return the folder of a run over the digits, two whole epochs, made once a session."""
    folder = tmp_path_factory.getbasetemp() / "tiny_run"
    if not folder.is_dir():
        status = litezoo(
            *("train", "repvgg_tiny", "--data", "digits", "--out", folder, "--json"),
            *("--trainer.max_epochs", 2, "--model.schedule.warmup_epochs", 0),
            *("--data.batch_size", 32, "--model.ema_decay=null"),
        )
        assert status == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder, so that runs/ and artifacts/ lie there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_plain(file):
    return torch.load(file, map_location="cpu", weights_only=True)


def read_config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def read_metrics(folder):
    with (folder / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


@torch.inference_mode()
def digits_top1(model, split):
    digits = open_data("digits")
    transform = eval_transform(digits.preprocess)
    batch = torch.stack([transform(image) for image, _ in digits.images(split)])
    wanted = torch.tensor([label for _, label in digits.images(split)])
    return 100 * float((model(batch).argmax(1) == wanted).float().mean())


# ----------------------------------------------------------------------------------- what is left


def test_a_run_leaves_checkpoints_recipe_logs_and_its_result(run):
    for name in ("best.ckpt", "last.ckpt", "config.yaml", "metrics.csv", "run.json"):
        assert (run / name).stat().st_size > 0, name
    assert any(file.stat().st_size > 0 for file in run.glob("events.out.tfevents.*"))


def test_the_result_says_what_came_of_the_run(run):
    result = json.loads((run / "run.json").read_text())
    assert result["model"] == "repvgg_tiny" and result["data"] == "digits"
    assert result["checkpoint"] == str(run / "best.ckpt")
    assert result["epochs"] == 2
    assert result["images_per_s"] > 0 and result["seconds"] > 0
    assert result["precision"] in ("32-true", "bf16-mixed", "16-mixed")


def test_the_reported_accuracy_is_that_of_the_best_checkpoint(run):
    result = json.loads((run / "run.json").read_text())
    model = create_model("repvgg_tiny", weights=run / "best.ckpt").eval()
    # one image of 360 is 0.28 %: bf16 training rounds one or two of them to another class
    assert digits_top1(model, "test") == pytest.approx(result["test_top1_percent"], abs=0.6)
    assert digits_top1(model, "val") == pytest.approx(result["val_top1_percent"], abs=0.75)
    epochs = [float(row["val/top1"]) for row in read_metrics(run) if row["val/top1"]]
    assert len(epochs) == 2
    assert result["val_top1_percent"] == pytest.approx(100 * max(epochs), abs=0.01)


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    """The folder of a run whose second epoch spoils the network."""
    step = ClassifierModule.training_step

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1:
            torch.nn.init.zeros_(self.net.head.fc.weight)
        return step(self, batch, batch_idx)

    folder = tmp_path_factory.mktemp("worse") / "run"
    words = ("--trainer.max_epochs", 2, "--model.schedule.warmup_epochs", 0)
    words += ("--data.batch_size", 32, "--model.ema_decay=null")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierModule, "training_step", training_step)
        assert litezoo("train", "repvgg_tiny", "--out", folder, *words) == 0
    return folder


def test_the_best_epoch_is_kept_and_reported_though_a_worse_one_follows(worse):
    assert read_plain(worse / "best.ckpt")["epoch"] == 0
    result = json.loads((worse / "run.json").read_text())
    assert result["test_top1_percent"] > 25
    model = create_model("repvgg_tiny", weights=worse / "best.ckpt").eval()
    assert digits_top1(model, "test") == pytest.approx(result["test_top1_percent"], abs=0.6)


def test_the_last_epoch_is_kept_though_it_is_worse(worse):
    best, last = (read_plain(worse / name) for name in ("best.ckpt", "last.ckpt"))
    assert last["global_step"] == 2 * best["global_step"]


def test_a_run_whose_last_epoch_was_worse_is_finished_too(worse, capsys):
    copy = shutil.copytree(worse, worse.with_name("copy"))
    assert litezoo("train", "repvgg_tiny", "--resume", "--out", copy) == 2
    assert "copy has finished its 2 epochs" in capsys.readouterr().err


def test_two_epochs_learn_something(run):
    assert json.loads((run / "run.json").read_text())["test_top1_percent"] > 25


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_a_checkpoint_is_loaded_without_executing_code_and_carries_what_export_needs(run, name):
    info = read_plain(run / name)[INFO_KEY]
    assert info["model"] == "repvgg_tiny"
    assert info["classes"] == list("0123456789")
    assert info["data"] == "digits"
    assert info["state_prefix"] == "net."
    assert info["preprocess"] == {
        "input_size": [1, 32, 32],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": [0.3],
        "std": [0.35],
    }
    record = read_checkpoint(run / name).info
    assert record is not None and record.to_dict() == info


def test_the_best_and_the_last_checkpoint_are_of_the_epochs_they_say(run):
    top1 = [float(row["val/top1"]) for row in read_metrics(run) if row["val/top1"]]
    assert read_plain(run / "last.ckpt")["epoch"] == 1
    assert read_plain(run / "best.ckpt")["epoch"] == int(np.argmax(top1))


def test_the_network_of_a_checkpoint_gives_the_logits_of_the_trained_module(run):
    module = ClassifierModule("repvgg_tiny", num_classes=10, in_chans=1)
    module.load_state_dict(read_plain(run / "best.ckpt")["state_dict"])
    model = create_model("repvgg_tiny", weights=run / "best.ckpt")
    batch = images(5, 1, 32, 32)
    with torch.inference_mode():
        assert relative_error(model.eval()(batch), module.eval()(batch)) <= 1e-5


def test_the_recipe_is_kept_as_it_ran(run):
    config = read_config(run)
    assert config["model"]["name"] == "repvgg_tiny"
    assert config["data"]["source"] == "digits"
    assert config["model"]["optimizer"]["opt"] == "adamw"  # of recipes/train/digits.yaml
    assert config["trainer"]["max_epochs"] == 2


def test_the_rate_is_reported_in_images_a_second(here, capsys):
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT) == 0
    output = capsys.readouterr()
    assert "epoch 1/1  loss " in output.err and " img/s" in output.err
    assert "repvgg_tiny on digits: test top-1 " in output.out and " img/s" in output.out
    assert f"checkpoint: {here / 'run' / 'best.ckpt'}" in output.out
    rates = [row["train/images_per_s"] for row in read_metrics(here / "run")]
    assert [float(rate) > 0 for rate in rates if rate] == [True]


def test_a_run_has_its_own_folder_by_model_and_time(here):
    assert litezoo("train", "repvgg_tiny", *SHORT) == 0
    (run,) = (here / "runs" / "repvgg_tiny").iterdir()
    assert (run / "best.ckpt").is_file()
    assert last_run() == Path("runs/repvgg_tiny") / run.name == last_run("repvgg_tiny")
    assert last_run("repvgg_a0") is None


# ----------------------------------------------------------------------------------- going on


@pytest.fixture
def short_run(here):
    folder = here / "runs" / "repvgg_tiny" / "first"
    assert litezoo("train", "repvgg_tiny", "--out", folder, *SHORT) == 0
    return folder


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(("repvgg_tiny",), id="named"),
        pytest.param(
            (),
            id="unnamed",
        ),
    ],
)
def test_a_run_goes_on_from_its_last_checkpoint(short_run, here, model, capsys):
    before = read_plain(short_run / "last.ckpt")
    assert (before["epoch"], before["global_step"]) == (0, 2)
    capsys.readouterr()
    assert litezoo("train", *model, "--resume", "--trainer.max_epochs", 3, "--json") == 0
    output = capsys.readouterr()
    assert [line[:9] for line in output.err.splitlines() if line.startswith("epoch")] == [
        "epoch 2/3",
        "epoch 3/3",
    ]
    result = json.loads(output.out)
    assert result["epochs"] == 3
    assert Path(result["checkpoint"]).resolve() == short_run / "best.ckpt"
    after = read_plain(short_run / "last.ckpt")
    assert after["global_step"] == 6
    assert after[INFO_KEY] == before[INFO_KEY]
    assert [folder.name for folder in (here / "runs" / "repvgg_tiny").iterdir()] == ["first"]
    assert read_config(short_run)["data"]["batch_size"] == 8  # all else as it was


def test_the_newest_run_goes_on_without_being_named(short_run, here):
    assert litezoo("train", "--resume", "--trainer.max_epochs=2") == 0
    assert read_plain(short_run / "last.ckpt")["global_step"] == 4


def test_a_run_can_go_on_again_and_again(short_run):
    for epochs in (2, 3, 4):
        words = ("--resume", f"--trainer.max_epochs={epochs}")
        assert litezoo("train", "repvgg_tiny", *words) == 0
        assert read_plain(short_run / "last.ckpt")["global_step"] == 2 * epochs


def test_the_log_of_the_epochs_before_is_kept(short_run):
    assert litezoo("train", "--resume", "--trainer.max_epochs=2") == 0
    epochs = [int(row["epoch"]) for row in read_metrics(short_run) if row["val/top1"]]
    assert epochs == [0, 1]


def test_the_run_named_by_out_goes_on(short_run, here):
    elsewhere = short_run.rename(here / "elsewhere")
    assert litezoo("train", "--resume", "--out", elsewhere, "--trainer.max_epochs=2") == 0
    assert read_plain(elsewhere / "last.ckpt")["global_step"] == 4
    assert not (here / "runs" / "repvgg_tiny" / "first").exists()


def test_a_run_that_goes_on_is_called_by_its_model(short_run, here, capsys):
    elsewhere = short_run.rename(here / "elsewhere")
    assert litezoo("train", "--resume", "--out", elsewhere, "--trainer.max_epochs=2") == 0
    assert "training repvgg_tiny on digits" in capsys.readouterr().err


def test_a_finished_run_says_so(short_run, capsys):
    assert litezoo("train", "--resume") == 2
    text = capsys.readouterr().err
    assert "first has finished its 1 epochs; to go on add --trainer.max_epochs N" in text


def test_without_a_run_there_is_nothing_to_go_on_with(here, capsys):
    assert litezoo("train", "--resume") == 2
    assert "there is no run to go on with in runs/; start one" in capsys.readouterr().err
    (here / "empty").mkdir()
    assert litezoo("train", "repvgg_tiny", "--resume", "--out", here / "empty") == 2
    assert "empty has no last.ckpt and config.yaml to go on from" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_a_corrupt_last_checkpoint_is_named_in_one_sentence(short_run, content, capsys):
    if content is None:
        truncate(short_run / "last.ckpt")
    else:
        (short_run / "last.ckpt").write_bytes(content)
    capsys.readouterr()
    assert litezoo("train", "repvgg_tiny", "--resume", "--trainer.max_epochs", 2) == 2
    text = capsys.readouterr().err
    *_, line = text.strip().splitlines()
    assert line.startswith("litezoo: ") and "last.ckpt is " in line
    assert "Traceback" not in text


@pytest.mark.parametrize("words", [("repvgg_a0",), ("repvgg_tiny", "--data", "pets")])
def test_a_run_does_not_go_on_with_another_model_or_data(short_run, here, words):
    write_folder(here / "pets")
    words += ("--resume", "--out", short_run, "--trainer.max_epochs", 2)
    assert litezoo("train", *words) == 2


def interrupt(monkeypatch, action):
    """Do `action` in the second training step."""
    step = ClassifierModule.training_step

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            action()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassifierModule, "training_step", training_step)


def press_ctrl_c():
    raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_130_and_no_traceback(here, monkeypatch, capsys):
    interrupt(monkeypatch, press_ctrl_c)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    text = capsys.readouterr().err
    assert text.endswith("litezoo: interrupted\n") and "Traceback" not in text


def test_a_terminated_run_is_no_success(here, monkeypatch):
    interrupt(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT) not in (0, None)
    assert not (here / "run" / "run.json").exists()


# ------------------------------------------------------------------------------- ways of training


def test_averaged_weights_are_the_ones_evaluated_and_exported(here):
    run = here / "run"
    words = ("--model.ema_decay", 0.5, "--trainer.limit_test_batches", 1.0)
    assert litezoo("train", "repvgg_tiny", "--out", run, *SHORT, *words) == 0
    content = read_plain(run / "best.ckpt")
    assert content[INFO_KEY]["state_prefix"] == "ema.module."
    exported = read_checkpoint(run / "best.ckpt").state_dict
    key = "head.fc.weight"
    assert torch.equal(exported[key], content["state_dict"][f"ema.module.{key}"])
    assert not torch.equal(exported[key], content["state_dict"][f"net.{key}"])
    model = create_model("repvgg_tiny", weights=run / "best.ckpt").eval()
    result = json.loads((run / "run.json").read_text())
    assert digits_top1(model, "test") == pytest.approx(result["test_top1_percent"], abs=0.6)


def test_the_average_moves_by_its_decay_at_each_step(here):
    module = ClassifierModule("repvgg_tiny", num_classes=10, in_chans=1, ema_decay=0.75)
    start = module.net.head.fc.weight.detach().clone()
    with torch.no_grad():
        module.net.head.fc.weight += 1
    module.ema.update(module.net, step=5)
    assert torch.allclose(module.ema.module.head.fc.weight, start + 0.25, atol=1e-6)
    assert module.evaluated is module.ema.module


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_a_step_with_mixup_or_cutmix_takes_odd_batches_too(size, alphas):
    mixup = MixupConfig(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    module = ClassifierModule("repvgg_tiny", num_classes=10, in_chans=1, mixup=mixup)
    module.log = lambda *_, **__: None
    loss = module.training_step((images(size, 1, 32, 32), torch.arange(size)), 0)
    loss.backward()
    assert loss.isfinite() and module.net.head.fc.weight.grad.abs().sum() > 0


def test_mixup_and_smoothing_train_by_name(here):
    words = ("--model.mixup.mixup_alpha", 0.2, "--model.mixup.cutmix_alpha", 1.0)
    words += ("--model.label_smoothing", 0.1, "--data.batch_size", 7)
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT, *words) == 0


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pets", train=4, val=2, test=3, size=(36, 32))


IN_FOLDER = ("--data.input_size", 32, "--data.num_workers", 0, "--trainer.max_epochs", 1)


def test_a_folder_of_images_is_trained_on(folder, here, capsys):
    words = ("--data", folder, "--out", "run", "--json", *IN_FOLDER, "--data.batch_size", 4)
    assert litezoo("train", "repvgg_tiny", *words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["data"] == str(folder.resolve())
    info = read_checkpoint(here / "run" / "best.ckpt").info
    assert info.classes == ("cat", "dog") and info.data == str(folder.resolve())
    assert info.preprocess.input_size == (3, 32, 32)
    config = read_config(here / "run")
    assert config["model"]["optimizer"]["opt"] == "sgd"  # the family's recipe
    assert create_model("repvgg_tiny", weights=here / "run" / "best.ckpt").num_classes == 2


def test_a_relative_folder_is_remembered_by_its_whole_path(folder, here, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert ImageData("pets").images.source == str(folder.resolve())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_training_with_one_sentence(folder, here, capsys, workers):
    file = folder / "train" / "dog" / "1.jpg"
    truncate(file)
    words = (*IN_FOLDER, "--data.batch_size", 8, "--data.num_workers", workers)
    assert litezoo("train", "repvgg_tiny", "--data", folder, *words) == 2
    text = capsys.readouterr().err
    assert text.strip().splitlines()[-1] == (
        f"litezoo: cannot read the image {file} (OSError); replace or remove it"
    )
    assert "Traceback" not in text


def test_a_wrong_layout_stops_training_with_one_sentence(here, capsys):
    assert litezoo("train", "repvgg_tiny", "--data", "nowhere") == 2
    assert "litezoo: no data set nowhere; give 'digits' or a folder" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "batch", "steps"), [(5, 4, 1), (4, 4, 1), (3, 4, 1), (9, 4, 2)])
def test_no_training_batch_has_a_lonely_image(tmp_path, count, batch, steps):
    root = write_folder(tmp_path, train=1, val=1)
    for number in range(count - 2):
        source = root / "train" / "cat" / "0.jpg"
        (root / "train" / "cat" / f"more{number}.jpg").write_bytes(source.read_bytes())
    data = ImageData(str(root), batch_size=batch, num_workers=0, input_size=32)
    sizes = [len(x) for x, _ in data.train_dataloader()]
    assert len(sizes) == steps and min(sizes) > 1
    assert sum(len(x) for x, _ in data.val_dataloader()) == 2


def test_a_trained_network_is_where_training_can_start(run, here):
    words = ("--model.weights", run / "best.ckpt", "--model.optimizer.lr", 0.0)
    words += ("--model.schedule.warmup_lr", 0.0)
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT, *words) == 0
    fine = read_checkpoint(here / "run" / "best.ckpt").state_dict["head.fc.weight"]
    assert torch.equal(fine, read_checkpoint(run / "best.ckpt").state_dict["head.fc.weight"])


# ----------------------------------------------------------------------------- words and recipes


def test_options_of_lightning_the_data_and_the_model_arrive(here):
    words = {
        "--trainer.gradient_clip_val": 0.5,
        "--data.hflip": 0.25,
        "--data.input_size": 24,
        "--model.drop_rate": 0.125,
        "--model.optimizer.lr": 0.0125,
        "--model.schedule.warmup_epochs": 0,
        "--seed_everything": 7,
    }
    flat = [f"{key}={value}" for key, value in words.items()]
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT, *flat) == 0
    config = read_config(here / "run")
    for key, value in words.items():
        found = config
        for part in key.removeprefix("--").split("."):
            found = found[part]
        assert found == value, key
    assert read_checkpoint(here / "run" / "best.ckpt").info.preprocess.input_size == (1, 24, 24)
    rate = read_plain(here / "run" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]
    assert rate["initial_lr"] == 0.0125


def test_a_recipe_of_ones_own_is_followed(here):
    recipe = here / "mine.yaml"
    recipe.write_text("trainer: {max_epochs: 1}\nmodel: {optimizer: {opt: lamb, lr: 0.001}}\n")
    words = ("--recipe", recipe, "--out", here / "run", *SHORT[2:])
    assert litezoo("train", "repvgg_tiny", *words) == 0
    config = read_config(here / "run")
    assert config["model"]["optimizer"]["opt"] == "lamb"
    assert config["trainer"]["max_epochs"] == 1


def test_a_recipe_without_epochs_is_refused(here, capsys):
    (here / "mine.yaml").write_text("model: {drop_rate: 0.1}\n")
    assert litezoo("train", "repvgg_tiny", "--recipe", here / "mine.yaml") == 2
    assert "sets no trainer.max_epochs; add --trainer.max_epochs N" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_named(here, capsys):
    assert litezoo("train", "repvgg_tiny", "--recipe", here / "none.yaml") == 2
    assert f"no recipe {here / 'none.yaml'}; give one with --recipe" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_recipe_with_an_unknown_key_is_refused(here, capsys):
    (here / "mine.yaml").write_text("trainer: {max_epochs: 1}\nmodel: {optimiser: {lr: 0.1}}\n")
    assert litezoo("train", "repvgg_tiny", "--recipe", here / "mine.yaml") == 2
    text = capsys.readouterr().err
    assert "optimiser" in text and "Traceback" not in text


def test_training_without_a_model_says_what_to_type(here, capsys):
    assert litezoo("train") == 2
    assert capsys.readouterr().err == (
        "litezoo: which model? for example: litezoo train repvgg_a0 (see: litezoo list)\n"
    )


def test_an_unknown_model_is_refused_with_the_nearest(here, capsys):
    assert litezoo("train", "repvg_a0") == 2
    assert "unknown model 'repvg_a0'; did you mean 'repvgg_a0'?" in capsys.readouterr().err


def test_an_unknown_option_is_refused(here, capsys):
    assert litezoo("train", "repvgg_tiny", "--trainer.max_epocks", 3) == 2
    text = capsys.readouterr().err
    assert "--trainer.max_epocks" in text and "did you mean '--trainer.max_epochs'" in text
    assert "Traceback" not in text
    assert not (here / "runs").exists()


def test_a_value_of_the_wrong_type_is_refused(here, capsys):
    assert litezoo("train", "repvgg_tiny", "--data.batch_size", "many") == 2
    text = capsys.readouterr().err
    assert "batch_size" in text and "Traceback" not in text


def test_a_run_too_short_to_validate_says_so(here, capsys):
    words = ("--trainer.fast_dev_run", "true")
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *words) == 2
    assert "the run was too short to validate" in capsys.readouterr().err


def test_the_options_of_lightning_can_be_shown(here, capsys):
    assert litezoo("train", "repvgg_tiny", "--options") in (0, None)
    text = capsys.readouterr().out
    for option in ("--trainer.max_epochs", "--data.batch_size", "--model.ema_decay"):
        assert option in text


def test_the_name_of_a_family_trains_its_first_model(here, capsys):
    words = ("--out", "run", *SHORT, "--data.batch_size", 2, "--json")
    assert litezoo("train", "repvgg", *words) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "repvgg_a0"
    assert read_checkpoint(here / "run" / "best.ckpt").info.model == "repvgg_a0"


RECIPES = sorted(trainer.RECIPES.glob("*.yaml"))


def build(recipe, source, *words):
    """Return LightningCLI's objects for a recipe; nothing is trained."""
    values = [f"--config={recipe}", "--model.name=repvgg_tiny", f"--data.source={source}"]
    values += ["--data.num_workers=0", *words]
    return trainer._create_cli("repvgg_tiny", values, trainer_defaults={"logger": False})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_parses_and_builds_what_it_names(recipe, tmp_path):
    on_digits = recipe.stem == "digits"
    source = "digits" if on_digits else write_folder(tmp_path, size=(32, 32))
    cli = build(recipe, source)
    named = yaml.safe_load(recipe.read_text())
    assert cli.trainer.max_epochs == named["trainer"]["max_epochs"]
    assert cli.datamodule.batch_size == named["data"]["batch_size"]
    size = named["data"].get("input_size", 32)
    assert cli.datamodule.preprocess.input_size == ((1 if on_digits else 3), size, size)
    batch, labels = next(iter(cli.datamodule.train_dataloader()))
    assert batch.shape[1:] == cli.datamodule.preprocess.input_size
    assert cli.model.net.num_classes == cli.datamodule.num_classes > int(labels.max())

    class Trainer:
        max_epochs = cli.trainer.max_epochs
        estimated_stepping_batches = 10 * cli.trainer.max_epochs

    cli.model._trainer = Trainer()
    made = cli.model.configure_optimizers()
    wanted = named["model"]["optimizer"]
    group = made["optimizer"].param_groups[-1]
    name = {"momentum": "sgd"}.get(wanted["opt"], wanted["opt"])  # timm's: without Nesterov
    assert type(made["optimizer"]).__name__.lower() == name
    assert group["initial_lr"] == wanted["lr"] and group["weight_decay"] == wanted["weight_decay"]
    schedule = made["lr_scheduler"]["scheduler"]
    assert type(schedule).__name__.lower().startswith(named["model"]["schedule"]["sched"])
    schedule.step_update(num_updates=Trainer.estimated_stepping_batches)
    assert group["lr"] < 0.01 * wanted["lr"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_says_its_paper_command_cost_and_expected_result(recipe):
    header = []
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("# "))
    text = " ".join(header)
    assert "arXiv " in text or "Not from a paper" in text
    assert "Run:" in text and "make train-" in text and "litezoo train " in text
    assert "Cost:" in text
    assert "Expected" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_the_one_taken_for_its_name(recipe):
    if recipe.stem == "digits":
        assert trainer.find_recipe("repvgg_a0", "digits") == recipe
    elif recipe.stem == "qat":  # of `litezoo train --qat`, for any model
        assert qat.RECIPE == recipe
    else:
        assert trainer.find_recipe(catalogue.resolve_name(recipe.stem), "folder") == recipe


# ------------------------------------------------------------------------------------------ speed


@pytest.mark.parametrize(
    ("gpu", "gpu_bf16", "cpu", "precision"),
    [
        (False, False, {"avx512_bf16": True}, "bf16-mixed"),
        (False, False, {"amx_bf16": True, "avx2": True}, "bf16-mixed"),
        (False, False, {"avx512_bf16": False, "avx512": True}, "32-true"),
        (False, False, {}, "32-true"),
        (True, True, {}, "bf16-mixed"),
        (True, False, {"avx512_bf16": True}, "16-mixed"),
    ],
)
def test_the_precision_follows_the_hardware(monkeypatch, gpu, gpu_bf16, cpu, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: gpu_bf16 or emulated)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert trainer.fast_precision() == precision


@pytest.mark.parametrize(("words", "precision"), [((), "bf16-mixed"), (("32-true",), "32-true")])
def test_the_fast_precision_is_taken_unless_another_is_named(monkeypatch, words, precision):
    monkeypatch.setattr(trainer, "fast_precision", lambda: "bf16-mixed")
    cli = build(RECIPES[0], "digits", *(f"--trainer.precision={word}" for word in words))
    assert cli.trainer.precision == precision


def test_bf16_training_runs_and_its_checkpoint_is_float32(here):
    words = ("--trainer.precision", "bf16-mixed")
    assert litezoo("train", "repvgg_tiny", "--out", here / "run", *SHORT, *words) == 0
    assert json.loads((here / "run" / "run.json").read_text())["precision"] == "bf16-mixed"
    state = read_checkpoint(here / "run" / "best.ckpt").state_dict
    assert state["head.fc.weight"].dtype == torch.float32


@pytest.mark.parametrize("wanted", [True, False])
def test_channels_last_is_on_unless_switched_off(wanted):
    options = {} if wanted else {"channels_last": False}
    module = ClassifierModule("repvgg_tiny", num_classes=10, **options)
    seen = []
    module.net.stem.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    module(images(2, 3, 32, 32))
    assert seen == [wanted]
    weight = module.net.stages[1][0].branch_3x3.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_compiling_is_an_option(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    assert ClassifierModule("repvgg_tiny").net not in compiled
    module = ClassifierModule("repvgg_tiny", compile=True)
    assert compiled == [module.net]


def test_training_is_repeatable(here):
    for name in ("a", "b"):
        assert litezoo("train", "repvgg_tiny", "--out", here / name, *SHORT) == 0
    a, b = (read_checkpoint(here / name / "best.ckpt").state_dict for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_data_says_what_it_cannot_preprocess():
    with pytest.raises(UsageError, match="3 means"):
        ImageData("digits", mean=(0.5, 0.5, 0.5))
