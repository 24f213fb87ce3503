"""Quantization-aware training: a trained network goes on under the rounding of its int8 file.

Weights and activations are rounded in the forward pass and gradients pass straight through (Jacob
et al., arXiv 1712.05877, section 3; Krishnamoorthi, arXiv 1806.08342, section 3.2). What is rounded
is what `litezoo.export.to_int8` makes 8-bit: of every convolution but those behind a global pool
(classifiers, squeeze-and-excite gates) the weight and the input. Not simulated: the shortcuts of
residual additions.

Both forms of a network are trained through its deploy form, the one that is exported::

    deploy form: its kernels ──────────────────────────────┐
                                                           ├─ round ─> deploy form ─> loss
    train form: branches ─ fuse, in every step, with fixed ┘   (and round every input)
                           BatchNorm statistics

The parameters stay those of the form that was given, so its state dict is what it ever was. What
is trained is the rounded network: in float it may have become worse.

* Loss: the divergence of the classes from the float network's, no labels, so that the rounded
  network says what the float one said. Adam, rate 2e-4, cosine to 0. On the digits (22 narrow
  blocks, per-tensor, fused; one channel in 16 scaled by 16, seed 1) the int8 file loses 55.0 points
  before and 0.8 after two epochs; learning from labels 3.1, from labels by SGD at 1e-4 24. On seed
  0 it loses 28.6 and then 4.2 (from labels by SGD at 1e-3: 86). RepVGGs as trained lose 0.0 to 0.8
  points before and -1.1 to 0.6 after (an image is 0.3).
* Weights: symmetric; the scale is max |w| / 127 of the present weight, per-tensor or per-channel.
* Activations: the extremes over 256 images, then moving averages of each batch's extremes (momentum
  0.01 a step), fixed in validation. They serve training only: export calibrates anew.
* Dead channels of a train form (models/fuse.py) are cured first; a BatchNorm weight of exactly 0 in
  a fusable block then stays 0: its gradient is up to 316 times as large as that of a living one.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
import yaml
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.func import functional_call

from litezoo.models.catalogue import Preprocess
from litezoo.models.create import create_model
from litezoo.models.errors import CheckFailed, UsageError, unknown_name
from litezoo.models.fuse import (
    FusableBlock,
    cure_dead,
    fuse,
    fuse_with_report,
    fused_state,
    graph_form,
)
from litezoo.models.weights import read_checkpoint

from .data import eval_loader, open_data
from .runs import BEST, last_run
from .trainer import (
    RECIPES,
    ClassifierModule,
    OptimizerConfig,
    ScheduleConfig,
    TrainResult,
    find_recipe,
    train,
)

__all__ = ["FakeQuantized", "QatModule", "finetune_quantized", "train_quantized"]

Granularity = Literal["per-channel", "per-tensor"]
Activations = Literal["int8", "uint8"]

RECIPE = RECIPES / "qat.yaml"
_OPTIMIZER = OptimizerConfig(opt="adamw", lr=2e-4, weight_decay=0.0)
_SCHEDULE = ScheduleConfig()
#: Training images whose extremes the ranges start from, as many as export calibrates on.
_OBSERVED = 256
#: How much a step moves a range to its batch's extremes (arXiv 1712.05877, section 3.1).
_RANGE_MOMENTUM = 0.01
#: Side of the image that tells what is behind a global pool: no other map is 1 x 1 then.
_LARGE_SIDE = 256
#: What a family's recipe says of the images in training.
_AUGMENTATION = ("scale", "ratio", "hflip", "color_jitter", "auto_augment", "random_erase")


class FakeQuantized(nn.Module):
    """The deploy form of a network as its 8-bit file would compute it, with gradients.

    It has no parameters: `forward` takes the network whose they are. In train mode the ranges of
    activations follow the batches. `layers` are the names of the convolutions that are quantized in
    the deploy form, `low` and `high` (layers,) the ranges of their inputs.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        in_chans: int,
        granularity: Granularity = "per-channel",
        activations: Activations = "int8",
        weight_bits: int = 8,
    ) -> None:
        """Find out what is quantized in a network of either form, which is not changed."""
        super().__init__()
        if granularity not in get_args(Granularity):
            raise unknown_name("granularity", granularity, get_args(Granularity))
        if activations not in get_args(Activations):
            raise unknown_name("type of activations", activations, get_args(Activations))
        if weight_bits not in (7, 8):
            raise UsageError(f"weights of {weight_bits} bits; give 8, or 7 for x86 without VNNI")
        skeleton = copy.deepcopy(network).to("meta")
        if graph_form(skeleton) == "train":
            skeleton = fuse(skeleton, cure=False)
        self._deploy = (skeleton.eval(),)  # in a tuple, as its parameters are no one's
        self.layers, self.num_classes = _look_through(skeleton, in_chans)
        if not self.layers:
            raise UsageError(
                f"{type(network).__name__} has no convolution that int8 quantizes; export fp16"
            )
        self._per_channel = granularity == "per-channel"
        self._unsigned = activations == "uint8"
        self._largest = 2 ** (weight_bits - 1) - 1
        self._observes = False
        self.register_buffer("low", torch.full((len(self.layers),), torch.inf))
        self.register_buffer("high", torch.full((len(self.layers),), -torch.inf))
        for index, name in enumerate(self.layers):
            skeleton.get_submodule(name).register_forward_pre_hook(partial(self._read, index))

    @property
    def has_ranges(self) -> bool:
        """Whether the ranges of activations are known."""
        return bool(self.low.isfinite().all())

    @torch.no_grad()
    def observe(self, network: nn.Module, batches: Iterable[Tensor]) -> None:
        """Widen the ranges to the extremes of the float network on images (N, C, H, W)."""
        self._observes = True
        try:
            for images in batches:
                functional_call(self._deploy[0], fused_state(network, self._deploy[0]), (images,))
        finally:
            self._observes = False

    def forward(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of `network` with rounded weights and activations."""
        state = fused_state(network, self._deploy[0])
        for name in self.layers:
            state[f"{name}.weight"] = self._rounded(state[f"{name}.weight"])
        logits: Tensor = functional_call(self._deploy[0], state, (images,))
        return logits

    def _rounded(self, weight: Tensor) -> Tensor:
        """Return a weight (O, I / groups, k, k) in steps of its scale."""
        size, largest = weight.detach().abs(), self._largest
        if not self._per_channel:
            scale = _scale(size.amax(), largest)
            zero = torch.zeros_like(scale, dtype=torch.int32)
            return torch.fake_quantize_per_tensor_affine(weight, scale, zero, -largest, largest)
        scale = _scale(size.amax((1, 2, 3)), largest)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -largest, largest)

    def _read(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Round what a convolution reads; a forward hook."""
        x = inputs[0]
        low, high = self.low[index], self.high[index]  # views, which change with the buffers
        if self._observes or self.training:
            lowest, highest = (end.to(low) for end in x.detach().aminmax())
            if self._observes:
                low.copy_(low.minimum(lowest))
                high.copy_(high.maximum(highest))
                return None
            low.lerp_(lowest, _RANGE_MOMENTUM)
            high.lerp_(highest, _RANGE_MOMENTUM)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # 0 pads: it must be exact
        if self._unsigned:
            scale = _scale(high - low, 255)
            zero = (-low / scale).round().int()
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
        scale = _scale(torch.maximum(-low, high), 127)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127)


def _scale(reach: Tensor, steps: int) -> Tensor:
    """Return the step of a range of `steps` steps, 1 where it is empty."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(reach > 0, (reach.float() / steps).clamp(min=tiny), 1.0)


def _look_through(deploy: nn.Module, in_chans: int) -> tuple[tuple[str, ...], int]:
    """Return the convolutions of a deploy form on the meta device that int8 quantizes, and how
    many classes it has.
    """
    found: dict[str, bool] = {}

    def look(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = tuple(inputs[0].shape[2:]) != (1, 1)

    handles = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in deploy.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        logits = deploy(torch.empty(1, in_chans, _LARGE_SIDE, _LARGE_SIDE, device="meta"))
    for handle in handles:
        handle.remove()
    return tuple(name for name, is_map in found.items() if is_map), logits.shape[1]


class QatModule(ClassifierModule):
    """A classifier in quantization-aware training; validated as its int8 file would compute it."""

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        allow_license: str | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        optimizer: OptimizerConfig = _OPTIMIZER,
        schedule: ScheduleConfig = _SCHEDULE,
        granularity: Granularity = "per-channel",
        activations: Activations = "int8",
        weight_bits: int = 8,
    ) -> None:
        """Build the network.

        Args:
            name: model name (see: litezoo list).
            weights: tag, URL or checkpoint of the trained network.
            allow_license: licence of the weights that is accepted, where it needs accepting.
            num_classes: set from the data.
            in_chans: set from the data.
            optimizer: optimizer settings.
            schedule: learning rate schedule.
            granularity: one scale for each output channel of a weight, or one for all of it.
            activations: int8 (symmetric, TensorRT) or uint8 with a zero point (OpenVINO).
            weight_bits: 8, or 7 for x86 CPUs without VNNI.
        """
        super().__init__(
            name,
            weights=weights,
            allow_license=allow_license,
            num_classes=num_classes,
            in_chans=in_chans,
            optimizer=optimizer,
            schedule=schedule,
        )
        self.quantized = FakeQuantized(
            self.net,
            in_chans=in_chans,
            granularity=granularity,
            activations=activations,
            weight_bits=weight_bits,
        )
        if self.quantized.num_classes != num_classes:
            raise UsageError(
                f"this network tells {self.quantized.num_classes} classes apart, the data has "
                f"{num_classes}; quantization-aware training takes the data it was trained on"
            )
        teacher = copy.deepcopy(self.net).eval().requires_grad_(False)
        if graph_form(teacher) == "train":
            teacher = fuse(teacher, cure=False)
        self._teacher = (teacher,)  # in a tuple, as it is no part of what is trained and saved
        for weight in _batch_norm_weights(self.net):
            weight.register_hook(partial(_unless_zero, weight))  # type: ignore[no-untyped-call]

    def trained_form(self, net: nn.Module) -> nn.Module:
        """Return the network without dead channels, by its BatchNorm statistics."""
        return _without_dead(net, None)

    def logits_of(self, net: nn.Module, images: Tensor) -> Tensor:
        """Return what the 8-bit file of a network of this form would say."""
        logits: Tensor = self.quantized(net, images.contiguous(memory_format=self.layout))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return how far one batch's classes are from the float network's (KL divergence)."""
        images, _ = batch
        with torch.no_grad():
            wanted = self._teacher[0](images.contiguous(memory_format=self.layout))
        logits = self.logits_of(self.net, images)
        loss = nn.functional.kl_div(
            logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def on_train_start(self) -> None:
        """Bring the float network to the device and take the first ranges."""
        self._teacher[0].to(self.device)
        self._observe()

    def on_validation_start(self) -> None:
        """Take the first ranges, where a sanity check comes before training."""
        self._observe()

    def _observe(self) -> None:
        if self.quantized.has_ranges:
            return

        def batches() -> Iterator[Tensor]:
            seen = 0
            for images, _ in self.trainer.datamodule.train_dataloader():  # type: ignore[attr-defined]
                yield images.to(self.device).contiguous(memory_format=self.layout)
                seen += len(images)
                if seen >= _OBSERVED:
                    return

        self.quantized.observe(self.net, batches())


def _batch_norm_weights(net: nn.Module) -> list[Tensor]:
    """Return the weights of the BatchNorms that are fused."""
    return [
        *{
            module.weight: None
            for block in net.modules()
            if isinstance(block, FusableBlock)
            for module in block.modules()
            if isinstance(module, nn.BatchNorm2d) and module.weight is not None
        }
    ]


def _unless_zero(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a weight, without that of elements that are 0."""
    return gradient * (weight.detach() != 0)


def _without_dead(net: nn.Module, images: Iterable[Tensor] | None) -> nn.Module:
    """Return a copy of a network of either form whose dead channels are cured."""
    if graph_form(net) == "deploy":
        return copy.deepcopy(net)
    return cure_dead(net, fuse_with_report(net, images=images).dead)


def _training(network: nn.Module) -> type[QatModule]:
    """Return what trains a copy of this network in place of a newly made one."""

    class Given(QatModule):
        def trained_form(self, net: nn.Module) -> nn.Module:
            return copy.deepcopy(network).requires_grad_()

    return Given


def _images(data: str, preprocess: Preprocess) -> Iterator[Tensor]:
    """Yield training images; they are read only where a channel may be dead."""
    for images, _ in eval_loader(data, preprocess, split="train", most=_OBSERVED):
        yield images


def _words(name: str, data: str, preprocess: Preprocess) -> list[str]:
    """Return LightningCLI's words for a network's preprocessing and its family's augmentation."""
    own = yaml.safe_load(find_recipe(name, data).read_text(encoding="utf-8"))["data"]
    options: dict[str, Any] = {key: own[key] for key in _AUGMENTATION if key in own}
    options |= {**preprocess.to_dict(), "input_size": preprocess.input_size[1]}
    plain = {key: v if isinstance(v, str) else json.dumps(v) for key, v in options.items()}
    return [f"--data.{key}={value}" for key, value in plain.items()]


def _check_data(data: str, preprocess: Preprocess) -> None:
    kind, wanted = open_data(data).preprocess.input_size[0], preprocess.input_size[0]
    if kind != wanted:
        raise UsageError(
            f"the images of {data} have {kind} channels, the network takes {wanted}; "
            "quantization-aware training takes the data it was trained on"
        )


def finetune_quantized(
    network: nn.Module,
    *,
    name: str,
    data: str,
    preprocess: Preprocess,
    granularity: Granularity,
    unsigned: bool,
    weight_bits: Literal[7, 8] = 8,
    epochs: int = 2,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> nn.Module:
    """Train a network under the rounding of its int8 file; return a new one of the same form.

    It is in eval mode and of the best epoch by validation top-1 with rounding. The argument is not
    changed and may be of another width than the catalogue's.

    Args:
        network: a trained classifier, train or deploy form.
        name: of its model in the catalogue, whose recipe says how images are augmented.
        data: "digits" or a folder with train/<class>/ and val/<class>/; what it was trained on.
        preprocess: how images become its input.
        granularity: of the weights' scales.
        unsigned: uint8 activations with a zero point, as in the forms int8-u8 and int8-u8s8.
        weight_bits: 7 for x86 CPUs without VNNI.
        epochs: over the training images; the rate falls to 0 in the last.
        out: folder of the run; default: one that is removed.
        progress: called with what is trained and with a line an epoch.

    Raises UsageError for data that is not the network's, CheckFailed where training diverged.
    """
    if epochs < 1:
        raise UsageError(f"quantization-aware training of {epochs} epochs; give 1 or more")
    _check_data(data, preprocess)
    words = [
        *_words(name, data, preprocess),
        f"--trainer.max_epochs={epochs}",
        f"--model.granularity={granularity}",
        f"--model.activations={'uint8' if unsigned else 'int8'}",
        f"--model.weight_bits={weight_bits}",
    ]
    with _folder(out) as folder, isolate_rng():
        start = _without_dead(network, _images(data, preprocess))
        train(
            name, data=data, recipe=RECIPE, out=folder, overrides=words, progress=progress,
            module=_training(start), say=progress,
        )  # fmt: skip
        start.load_state_dict(read_checkpoint(folder / BEST).state_dict)
    if not all(bool(value.isfinite().all()) for value in start.parameters()):
        raise CheckFailed(
            f"quantization-aware training of {name} diverged; give a lower rate in recipes/train/"
            "qat.yaml"
        )
    return start.eval()


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with TemporaryDirectory(prefix="litezoo-qat-") as folder:
        yield Path(folder)


def train_quantized(
    model: str | None,
    *,
    data: str | None = None,
    recipe: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> TrainResult:
    """Train a model's train form under the rounding of its int8 file, from trained weights.

    The weights are --model.weights in `overrides`. The run's checkpoints are as any other's: export
    takes them. The arguments are `trainer.train`'s; `recipe` is in the form of recipes/train/
    qat.yaml, the default.
    """
    if resume is not None or model is None or "--help" in overrides:
        return train(
            model, data=data, recipe=None if resume else recipe or RECIPE, resume=resume, out=out,
            overrides=overrides, progress=progress, module=QatModule,
        )  # fmt: skip
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model.weights", dest="weights")
    parser.add_argument("--model.allow_license", dest="allow_license", default=())
    given, _ = parser.parse_known_args(list(overrides))
    if given.weights is None:
        run = last_run(model)
        file = f"runs/{model}/<time>/{BEST}" if run is None else str(run / BEST)
        raise UsageError(
            f"quantization-aware training goes on from trained weights; add --model.weights {file}"
        )
    data = data or "digits"
    network = create_model(model, weights=given.weights, allow_license=given.allow_license)
    config = network.pretrained_cfg
    preprocess = Preprocess(
        **{key: config[key] for key in ("input_size", "crop_pct", "interpolation", "mean", "std")}
    )
    _check_data(data, preprocess)
    start = _without_dead(network, _images(data, preprocess))
    return train(
        model, data=data, recipe=recipe or RECIPE, out=out,
        overrides=[*_words(model, data, preprocess), *overrides], progress=progress,
        module=_training(start),
    )  # fmt: skip
