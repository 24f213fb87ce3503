"""The Lightning trainer that runs the recipes in recipes/train/.

A run's folder holds best.ckpt (by validation top-1), last.ckpt, config.yaml (the whole recipe as it
ran), metrics.csv, TensorBoard events and run.json. A checkpoint carries what export needs.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentError
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from litezoo.models.catalogue import Interpolation, get_spec
from litezoo.models.create import create_model
from litezoo.models.errors import UsageError, wrong_words
from litezoo.models.files import write_whole
from litezoo.models.repoptvgg import BlockScales, RepOptVGG, start_from
from litezoo.models.weights import INFO_KEY, CheckpointInfo, read_checkpoint

from .custom_l2 import check_custom_l2, custom_l2, decayed_by_custom_l2
from .data import Split, eval_transform, open_data
from .rep_optimizer import REP_OPTIMIZERS, check_rep_optimizer, get_scales, scaled_kernels
from .runs import BEST, LAST, RUNS

__all__ = ["ClassifierModule", "ImageData", "TrainResult", "train"]

RECIPES = Path(__file__).parent / "train"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """timm's `create_optimizer_v2`: 1-D tensors and biases get no weight decay.

    `eps`, `alpha` and `betas` are the optimizer's own, None for its default. "repsgd" and
    "repadamw" are RepOpt-VGG's (rep_optimizer.py), with the scales of the file `scales` of a
    search, None for the prior's.
    """

    opt: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    layer_decay: float | None = None
    eps: float | None = None
    alpha: float | None = None
    betas: tuple[float, float] | None = None
    scales: str | None = None


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """timm's `create_scheduler_v2` over the run's epochs, stepped every update."""

    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float = 30.0
    decay_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """timm's `Mixup`; both alphas 0 switch it off."""

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5


class ImageData(pl.LightningDataModule):
    """Batches of a data set with timm's transforms."""

    def __init__(
        self,
        source: str = "digits",
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        input_size: int | None = None,
        crop_pct: float | None = None,
        interpolation: Interpolation | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (0.75, 1.3333),
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erase: float = 0.0,
    ) -> None:
        """Open the data set; sizes in pixels, None for the data set's own value.

        Args:
            source: "digits" or a folder with train/<class>/ and val/<class>/.
            batch_size: images per step and device.
            num_workers: loader processes (default: none for digits, else the cores).
            input_size: side of the square network input.
            crop_pct: part of the resized side that evaluation crops.
            interpolation: how images are resized.
            mean: per channel, on the scale 0..1.
            std: per channel, on the scale 0..1.
            scale: area range of the random resized crop.
            ratio: aspect range of the random resized crop.
            hflip: probability of a horizontal flip.
            color_jitter: strength of timm's colour jitter.
            auto_augment: timm's policy string, such as "rand-m9-mstd0.5".
            random_erase: probability of timm's random erasing.
        """
        super().__init__()
        self.images = open_data(source)
        given = {
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "mean": mean and tuple(mean),
            "std": std and tuple(std),
        }
        own = self.images.preprocess
        side = own.input_size[1] if input_size is None else input_size
        self.preprocess = dataclasses.replace(
            own,
            input_size=(own.input_size[0], side, side),
            **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
        self.batch_size = batch_size
        if num_workers is None:
            num_workers = 0 if source == "digits" else os.cpu_count() or 1
        self.num_workers = num_workers
        self.train_transform = create_transform(
            self.preprocess.input_size,
            is_training=True,
            scale=(scale[0], scale[1]),
            ratio=(ratio[0], ratio[1]),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=self.preprocess.interpolation,
            mean=self.preprocess.mean,
            std=self.preprocess.std,
            re_prob=random_erase,
        )
        self.eval_transform = eval_transform(self.preprocess)

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return len(self.images.classes)

    @property
    def in_chans(self) -> int:
        """Channels of its images."""
        return self.preprocess.input_size[0]

    def _loader(self, split: Split) -> DataLoader[Any]:
        train = split == "train"
        dataset = self.images.dataset(split, self.train_transform if train else self.eval_transform)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=train,
            # a last batch of one image would stop BatchNorm
            drop_last=train and len(dataset) > self.batch_size,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented, shuffled."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Chooses the best checkpoint."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Gives the number that is reported."""
        return self._loader("test")


class ClassifierModule(pl.LightningModule):
    """One classifier of the zoo in training."""

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        allow_license: str | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        mixup: MixupConfig = MixupConfig(),
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        custom_l2: bool = False,
        grad_checkpointing: bool = False,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        """Build the network.

        Args:
            name: model name (see: litezoo list).
            weights: "default", tag, URL or checkpoint to fine-tune from (default: random
                initialisation).
            allow_license: licence of the weights that is accepted, where it needs accepting.
            num_classes: set from the data.
            in_chans: set from the data.
            drop_rate: dropout before the classifier.
            optimizer: optimizer settings.
            schedule: learning rate schedule.
            mixup: mixup and cutmix.
            label_smoothing: part of the target spread over all classes.
            ema_decay: average the weights with this decay; they are evaluated and exported then.
            custom_l2: RepVGG's decay of the deployed kernel; costs accuracy in INT8 (custom_l2.py).
            grad_checkpointing: less memory, more compute.
            channels_last: NHWC memory layout.
            compile: torch.compile the network (minutes at the start, faster steps).
        """
        super().__init__()
        self.name = name
        self.optimizer_config, self.schedule_config = optimizer, schedule
        net = create_model(
            name,
            weights=weights,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            allow_license=allow_license or (),
        )
        net.set_grad_checkpointing(grad_checkpointing)
        self.net = self.trained_form(net)
        self.scales = self._start_with_scales(start=weights is None)
        self.custom_l2 = custom_l2
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self.layout)
        self.ema = ModelEmaV3(self.net, decay=ema_decay) if ema_decay is not None else None
        if compile:
            self.net.compile()
        self.mixup: Mixup | None = None
        self.train_loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        if mixup.mixup_alpha or mixup.cutmix_alpha:
            self.mixup = Mixup(
                **dataclasses.asdict(mixup),
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
            self.train_loss = SoftTargetCrossEntropy()
        self.eval_loss = nn.CrossEntropyLoss()
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.test_top1 = MulticlassAccuracy(num_classes, average="micro")

    def trained_form(self, net: nn.Module) -> nn.Module:
        """Return the form of the network that is trained: as it was created."""
        return net

    def _start_with_scales(self, *, start: bool) -> dict[str, BlockScales]:
        """Return a RepOptimizer's scales; with `start` the network begins as a file's say."""
        config, net = self.optimizer_config, self.net
        if config.scales is not None and config.opt not in REP_OPTIMIZERS:
            raise UsageError(
                f"optimizer.scales is of {' and '.join(REP_OPTIMIZERS)}, not of {config.opt}; name "
                "one as optimizer.opt"
            )
        if config.opt not in REP_OPTIMIZERS or not isinstance(net, RepOptVGG):
            return {}
        scales = get_scales(net, file=config.scales)
        if start and config.scales is not None:
            start_from(net, scales)
        return scales

    def check(self) -> None:
        """Refuse to train a network by what is not defined for it, with a UsageError."""
        config = self.optimizer_config
        check_rep_optimizer(config.opt, model=self.net, name=self.name)
        if self.custom_l2:
            check_custom_l2(
                self.net, name=self.name, opt=config.opt, weight_decay=config.weight_decay
            )

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and exported: the average where one is kept."""
        return self.net if self.ema is None else self.ema.module

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the evaluated network."""
        return self.logits_of(self.evaluated, images)

    def logits_of(self, net: nn.Module, images: Tensor) -> Tensor:
        """Return what the trained or the evaluated network says of images, as it is."""
        logits: Tensor = net(images.contiguous(memory_format=self.layout))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, targets = batch
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, targets)
        elif self.mixup is not None:
            targets = nn.functional.one_hot(targets, self.mixup.num_classes).to(images.dtype)
        loss: Tensor = self.train_loss(self.logits_of(self.net, images), targets)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        if self.custom_l2:
            loss = loss + 0.5 * self.optimizer_config.weight_decay * custom_l2(self.net)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average after each optimizer step."""
        accumulate = self.trainer.accumulate_grad_batches
        if self.ema is not None and (batch_idx + 1) % accumulate == 0:
            self.ema.update(self.net, step=self.global_step)

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, targets = batch
        logits = self(images)
        metric = self.val_top1 if split == "val" else self.test_top1
        metric(logits, targets)
        self.log(f"{split}/top1", metric, on_epoch=True, batch_size=len(images))
        self.log(
            f"{split}/loss", self.eval_loss(logits, targets), on_epoch=True, batch_size=len(images)
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate validation loss and top-1."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate test loss and top-1."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """Return timm's optimizer, or a RepOptimizer, and timm's schedule."""
        optimizer = self._create_optimizer()
        epochs = self.trainer.max_epochs or 1
        steps = max(1, int(self.trainer.estimated_stepping_batches) // epochs)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            **dataclasses.asdict(self.schedule_config),
            num_epochs=epochs,
            updates_per_epoch=steps,
            step_on_epochs=False,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _create_optimizer(self) -> torch.optim.Optimizer:
        config = dataclasses.asdict(self.optimizer_config)
        given = {k: v for k, v in config.items() if v is not None and k != "scales"}
        if given["opt"] not in REP_OPTIMIZERS and not self.custom_l2:
            return create_optimizer_v2(self.net, **given)
        opt, decay, by_layer = given["opt"], given["weight_decay"], given.pop("layer_decay", None)
        undecayed = decayed_by_custom_l2(self.net) if self.custom_l2 else frozenset()
        groups = (
            param_groups_weight_decay(self.net, decay, no_weight_decay_list=undecayed)
            if by_layer is None
            else param_groups_layer_decay(
                self.net, decay, no_weight_decay_list=undecayed, layer_decay=by_layer
            )
        )
        if opt not in REP_OPTIMIZERS:
            return create_optimizer_v2(groups, **given)
        kind, defaults = REP_OPTIMIZERS[opt]
        taken = inspect.signature(kind).parameters
        return kind(
            groups,
            scales=scaled_kernels(self.net, self.scales),
            **{**defaults, **{k: v for k, v in given.items() if k in taken}},
        )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's scheduler, which counts updates."""
        scheduler.step_update(num_updates=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what export needs."""
        from importlib.metadata import version

        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[INFO_KEY] = CheckpointInfo(
            model=self.name,
            classes=data.images.classes,
            preprocess=data.preprocess,
            data=data.images.source,
            state_prefix="net." if self.ema is None else "ema.module.",
            litezoo_version=version("litezoo"),
        ).to_dict()


class _EpochLine(Callback):
    """One line an epoch, and how many training images a second went through."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.rates: list[float] = []
        self._started = 0.0
        self._rate = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._images = 0
        self._rate = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        self._images += len(batch[0])
        # taken here, not at the epoch's end, which comes after validation
        self._rate = self._images / (time.perf_counter() - self._started)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rate = self._rate * trainer.world_size
        self.rates.append(rate)
        pl_module.log("train/images_per_s", rate)
        metrics = trainer.callback_metrics
        loss, top1 = metrics.get("train/loss"), metrics.get("val/top1")
        self._say(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            + (f"  loss {float(loss):.4f}" if loss is not None else "")
            + (f"  val top-1 {100 * float(top1):.2f} %" if top1 is not None else "")
            + f"  {rate:.0f} img/s"
        )


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run ended with; top-1 in percent, of the best checkpoint by validation."""

    model: str
    data: str
    checkpoint: str
    val_top1_percent: float
    test_top1_percent: float
    epochs: int
    images_per_s: float
    seconds: float
    precision: str


class _CLI(LightningCLI):
    """LightningCLI whose defaults are those of the zoo."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key in ("num_classes", "in_chans"):
            parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        if self.config.trainer.precision is None:
            self.config.trainer.precision = fast_precision()
        if self.config.trainer.max_epochs is None:
            raise UsageError("the recipe sets no trainer.max_epochs; add --trainer.max_epochs N")


Precision = Literal["bf16-mixed", "16-mixed", "32-true"]


def fast_precision() -> Precision:
    """Return the fastest safe training precision of this machine."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(False) else "16-mixed"
    has_bf16 = any(v is True and "bf16" in k for k, v in torch.cpu.get_capabilities().items())
    return "bf16-mixed" if has_bf16 else "32-true"


def find_recipe(model: str, data: str) -> Path:
    """Return the recipe file: digits.yaml for the digits, else the family's."""
    name = "digits" if data == "digits" else get_spec(model).family
    return RECIPES / f"{name}.yaml"


def train(
    model: str | None,
    *,
    data: str | None = None,
    recipe: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
    module: type[ClassifierModule] = ClassifierModule,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a model by a recipe and return what came of it.

    Args:
        model: name of the model; None only with `resume`.
        data: "digits" (the default) or a folder with train/<class>/ and val/<class>/.
        recipe: a LightningCLI YAML; default: `find_recipe`.
        out: the run's folder; default: runs/<model>/<time>.
        resume: folder of a run to go on with, by its last.ckpt and config.yaml.
        overrides: LightningCLI arguments, such as --trainer.max_epochs=3.
        progress: called with what is trained, before the work begins.
        module: what is trained, where it is not the classifier as it is.
        say: called with a line an epoch; None prints it on standard error, and bars on a terminal.
    """
    _quiet()
    started = time.perf_counter()
    if resume is not None:
        model, data = _check_resume(resume, model=model, data=data, recipe=recipe)
        config, arguments, folder = resume / "config.yaml", [], resume
    elif model is None:
        raise UsageError("which model? for example repvgg_a0 (see: litezoo list)")
    else:
        data = data or "digits"
        config = recipe or find_recipe(model, data)
        arguments = [f"--model.name={model}", f"--data.source={data}"]
        folder = out or RUNS / get_spec(model).name / f"{datetime.now():%Y%m%d-%H%M%S}"
    if not config.is_file():
        raise UsageError(f"no recipe {config}; give one with --recipe FILE")
    progress(f"training {model} on {data}")
    best = ModelCheckpoint(
        dirpath=folder, filename=Path(BEST).stem, monitor="val/top1", mode="max",
        enable_version_counter=False,
    )  # fmt: skip
    # not save_last=True, which writes only with a new best one
    last = ModelCheckpoint(
        dirpath=folder, filename=Path(LAST).stem, every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    lines = _EpochLine(say or _on_stderr)
    has_bars = say is None and sys.stderr.isatty()
    bars = [RichProgressBar()] if has_bars else []
    cli = _create_cli(
        model,
        [f"--config={config}", *arguments, *overrides],
        trainer_defaults={
            "callbacks": [best, last, lines, *bars],
            "enable_progress_bar": has_bars,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
        module=module,
    )
    cli.model.check()
    checkpoint = None if resume is None else resume / LAST
    if checkpoint is not None:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["state_dict"].keys() != cli.model.state_dict().keys():
            raise UsageError(
                f"{folder} trained another form of {cli.model.name}; go on as it was started (a "
                "search of scales as a search, with model.ema_decay or without)"
            )
        done = saved["epoch"] + 1
        if done >= (cli.trainer.max_epochs or 0):
            raise UsageError(
                f"{folder} has finished its {done} epochs; to go on add --trainer.max_epochs N"
            )
    folder.mkdir(parents=True, exist_ok=True)
    cli.parser.save(cli.config, folder / "config.yaml", overwrite=True)
    with _kept_metrics(folder / "metrics.csv"):
        if cli.config.trainer.logger is None:
            cli.trainer.loggers = [
                CSVLogger(folder, name="", version=""),
                TensorBoardLogger(folder, name="", version=""),
            ]
        _fit(cli, checkpoint)
        if not best.best_model_path:
            raise UsageError("the run was too short to validate; give it a whole epoch")
        cli.trainer.test(
            cli.model,
            cli.datamodule,
            ckpt_path=best.best_model_path,
            verbose=False,
            weights_only=True,
        )
    result = TrainResult(
        model=cli.model.name,
        data=cli.datamodule.images.source,
        checkpoint=str(folder / BEST),
        val_top1_percent=round(100 * float(best.best_model_score or 0), 2),
        test_top1_percent=round(100 * float(cli.trainer.callback_metrics["test/top1"]), 2),
        epochs=cli.trainer.max_epochs or 0,
        images_per_s=round(sorted(lines.rates)[len(lines.rates) // 2], 1),
        seconds=round(time.perf_counter() - started, 1),
        precision=str(cli.trainer.precision),
    )
    write_whole(folder / "run.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _check_resume(
    run: Path, *, model: str | None, data: str | None, recipe: Path | None
) -> tuple[str, str]:
    """Return a run's model and data; asking for others is a UsageError."""
    if not (run / LAST).is_file() or not (run / "config.yaml").is_file():
        raise UsageError(f"{run} has no {LAST} and config.yaml to go on from")
    info = read_checkpoint(run / LAST).info  # says in a sentence if it is corrupt
    if info is None:
        raise UsageError(f"{run / LAST} is not of litezoo's trainer; it cannot be gone on with")
    same_data = data in (None, info.data) or str(Path(str(data)).resolve()) == info.data
    if model not in (None, info.model) or not same_data or recipe is not None:
        raise UsageError(
            f"{run} trained {info.model} on {info.data} by its own config.yaml; a run goes on with "
            "the same model, data and recipe (--trainer.* and other options may change)"
        )
    return info.model, info.data


def _fit(cli: _CLI, checkpoint: Path | None) -> None:
    """Train; Ctrl-C is a KeyboardInterrupt and SIGTERM status 143, whatever Lightning makes."""
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise SystemExit(error.code or 143) from error
    if cli.trainer.interrupted:
        raise KeyboardInterrupt


@contextmanager
def _kept_metrics(file: Path) -> Iterator[None]:
    """Keep the rows of a run that goes on: CSVLogger begins its file anew."""
    before = file.with_name("metrics.before.csv")
    if file.is_file():
        _join_csv([before, file], before)
    try:
        yield
    finally:
        if before.is_file():
            _join_csv([before, file], file)
            before.unlink()


def _join_csv(files: Sequence[Path], target: Path) -> None:
    rows: list[dict[str, str]] = []
    for file in files:
        if file.is_file():
            with file.open(newline="") as stream:
                rows += csv.DictReader(stream)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(target, text.getvalue())


def _create_cli(
    model: str,
    words: list[str],
    *,
    trainer_defaults: dict[str, Any],
    module: type[ClassifierModule] = ClassifierModule,
) -> _CLI:
    """Parse LightningCLI's words and build what they name; a wrong word is a UsageError."""
    options: list[str] = []

    class Cli(_CLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            options.extend(o for action in parser._actions for o in action.option_strings)

    try:
        return Cli(
            module,
            ImageData,
            run=False,
            args=words,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"litezoo train {model}", "exit_on_error": False},
            trainer_defaults=trainer_defaults,
        )
    except ArgumentError as error:
        raise wrong_words(str(error), options) from error


def _quiet() -> None:
    """Keep Lightning's advertising and its hints for its own developers off the terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*args parameter is intended.*",
        ".*does not have many workers.*",
        ".*module\\(s\\) in eval mode.*",  # the averaged weights
        ".*The number of training batches.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*Experiment logs directory.*exists.*",
        ".*Detected call of `lr_scheduler.step.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
