r"""RepOptimizers: RepOpt-VGG's prior as a multiplication of gradients (arXiv 2205.15242).

The block s (K3 * x) + t (K1 * x) + u x (CSLA, constant-scale linear addition) is one convolution
with W = s K3 + pad(t K1) + u I. Write g for the loss's gradient by W. By the chain rule that of K3
is s g, of K1 it is t g at the centre tap, of u it is g at the centre of the diagonal. One step of
each branch is one step of W, by section 3.2 of the paper ("Gradient Re-parameterization"):

- rule of initialization: W starts as s K3 + pad(t K1) + u I (models/repoptvgg.py, `start_from`);
- rule of iteration: where the block takes g, W takes M g, with the gradient multiplier

      M[c, d, p, q] = s_c^2                     off the centre tap
                      s_c^2 + t_c^2             at the centre
                      s_c^2 + t_c^2 + 1         at the centre, c = d, in blocks with an identity.

**SGD.** The order is what makes it exact: multiply, then add weight decay, then momentum. Of weight
decay w a branch has s g + w K3, which moves W by s (s g + w K3) + t (t g + w K1) + w u = M g + w W:
the decay is *not* multiplied, and a single W can know it. Momentum, dampening and Nesterov's are
linear in this sum, with the same coefficients in every branch, so they come behind. u has to be
decayed as the kernels are.

**AdamW.** Multiplying g does nothing at all: Adam divides it out again. What is exact is to add up
the branches' own steps. With m and v the moments of g (not of M g), those of K3 are s m and
s^2 v, so that its step moves W by s (s m) / (|s| sqrt(v) + eps):

      step = s^2 m / (|s| sqrt(v) + eps) + t^2 m / (|t| sqrt(v) + eps) + m / (sqrt(v) + eps)

each at the taps that its branch has. For eps -> 0 that is the paper's multiplier with first powers,
(|s| + |t| + 1) m / sqrt(v), which is the official code's; with eps it differs from the block where
sqrt(v) is not far above it. Decoupled weight decay shrinks every branch and W by one factor: exact.

**What cannot hold**, as W alone does not know its branches: Adam's coupled weight decay (L2 in the
loss: its second moment needs K3 and K1 each), clipping by a norm (the branches' norm is another),
decay of u other than the kernels', and any s or t that moves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from litezoo.models.errors import CheckFailed, UsageError, first_line
from litezoo.models.files import write_whole
from litezoo.models.layers import ConvBN
from litezoo.models.repoptvgg import BlockScales, RepOptVGG, check_scales, prior_scales

__all__ = [
    "REP_OPTIMIZERS",
    "RepAdamW",
    "RepOptimizer",
    "RepSGD",
    "ScalesOrigin",
    "SearchedScales",
    "check_rep_optimizer",
    "get_scales",
    "gradient_multiplier",
    "load_scales",
    "save_scales",
    "scaled_kernels",
]

#: Parameters, or groups of them with settings of their own, as torch.optim takes them.
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


# ------------------------------------------------------------------------------- the branches


#: A view of a kernel (C_out, C_in, 3, 3): the taps that a branch has.
View = Callable[[Tensor], Tensor]


def _all_taps(kernel: Tensor) -> Tensor:
    return kernel


def _centre(kernel: Tensor) -> Tensor:
    return kernel[:, :, 1, 1]


def _diagonal(kernel: Tensor) -> Tensor:
    return kernel[:, :, 1, 1].diagonal()


def _branches(
    scale_3x3: Tensor, scale_1x1: Tensor, has_identity: bool
) -> tuple[tuple[View, Tensor], ...]:
    """Return the taps of each branch and its scale, in a shape that multiplies them."""
    one = scale_3x3.new_ones(())
    found = (_all_taps, scale_3x3.view(-1, 1, 1, 1)), (_centre, scale_1x1.view(-1, 1))
    return (*found, (_diagonal, one)) if has_identity else found


def gradient_multiplier(scales: BlockScales, *, in_channels: int) -> Tensor:
    """Return the multiplier M of the rule of iteration, (C_out, C_in, 3, 3), for SGD."""
    s = scales.scale_3x3
    multiplier = torch.zeros(len(s), in_channels, 3, 3, dtype=s.dtype, device=s.device)
    for taps, scale in _branches(s, scales.scale_1x1, scales.identity is not None):
        taps(multiplier).add_(scale.square())
    return multiplier


# ------------------------------------------------------------------------------- the optimizers


class RepOptimizer(Optimizer):
    """Base of both: an optimizer that knows the scales of some of its parameters.

    The scales are part of its state, so that a checkpoint carries them; going on with other ones
    is a UsageError.
    """

    def __init__(
        self, params: Parameters, defaults: dict[str, Any], *, scales: Mapping[Tensor, BlockScales]
    ) -> None:
        """Keep the scales of each 3x3 kernel, in its own type and on its device."""
        super().__init__(params, defaults)
        known = {parameter for group in self.param_groups for parameter in group["params"]}
        for kernel, its in scales.items():
            if kernel not in known:
                raise UsageError("scales were given of a kernel that is not among the parameters")
            self.state[kernel].update(
                scale_3x3=its.scale_3x3.detach().to(kernel),
                scale_1x1=its.scale_1x1.detach().to(kernel),
                has_identity=its.identity is not None,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _branches_of(self, parameter: Tensor) -> tuple[tuple[View, Tensor], ...]:
        """Return the branches that a parameter stands for; without scales it is the only one."""
        state = self.state[parameter]
        if "scale_3x3" not in state:
            return ((_all_taps, parameter.new_ones(())),)
        return _branches(state["scale_3x3"], state["scale_1x1"], state["has_identity"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's state; one with other scales is a UsageError."""
        theirs = state_dict["state"]
        for index, state in self.state_dict()["state"].items():
            for key in ("scale_3x3", "scale_1x1", "has_identity"):
                mine, other = state.get(key), theirs.get(index, {}).get(key)
                if isinstance(mine, Tensor) and isinstance(other, Tensor):
                    same = mine.shape == other.shape and torch.equal(mine, other.to(mine))
                else:
                    same = mine == other
                if not same:
                    raise UsageError(
                        "the checkpoint was trained with other scales than those given now; go on "
                        "with its own (optimizer.scales in the run's config.yaml)"
                    )
        super().load_state_dict(state_dict)


class RepSGD(RepOptimizer):
    """SGD with the multiplier M on the gradient, in front of weight decay and momentum.

    Equal to torch.optim.SGD on the branches themselves, and to torch.optim.SGD for parameters
    without scales.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        scales: Mapping[Tensor, BlockScales],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        """Take torch.optim.SGD's settings, and of each 3x3 kernel its block's scales."""
        if nesterov and not momentum:
            raise UsageError("nesterov needs a momentum above 0")
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, scales=scales)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        step = torch.zeros_like(parameter)
        for taps, scale in self._branches_of(parameter):
            taps(step).add_(scale.square() * taps(gradient))
        step.add_(parameter, alpha=group["weight_decay"])
        if group["momentum"]:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
            step = step.add(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity
        parameter.add_(step, alpha=-group["lr"])


class RepAdamW(RepOptimizer):
    """AdamW whose step is the sum of the branches' steps, each with its own eps.

    Equal to torch.optim.AdamW on the branches themselves, and to torch.optim.AdamW for parameters
    without scales.
    """

    def __init__(
        self,
        params: Parameters,
        *,
        scales: Mapping[Tensor, BlockScales],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Take torch.optim.AdamW's settings, and of each 3x3 kernel its block's scales."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, scales=scales)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        count = float(state["step"])
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt() / math.sqrt(1 - beta2**count)
        step = torch.zeros_like(parameter)
        for taps, scale in self._branches_of(parameter):
            size = scale.abs()
            taps(step).add_(size.square() * taps(first) / (size * taps(root) + group["eps"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step, alpha=-group["lr"] / (1 - beta1**count))


#: The optimizers by their name in a recipe, with what timm's has by default of that name.
REP_OPTIMIZERS: dict[str, tuple[type[RepOptimizer], dict[str, Any]]] = {
    "repsgd": (RepSGD, {"nesterov": True}),
    "repadamw": (RepAdamW, {}),
}


def check_rep_optimizer(opt: str, *, model: nn.Module, name: str) -> None:
    """Refuse a RepOptimizer for a network that it carries no prior of (UsageError)."""
    if opt in REP_OPTIMIZERS and not isinstance(model, RepOptVGG):
        raise UsageError(
            f"{opt} carries the prior of RepOpt-VGG, which {name} is not; train it with "
            f"--model.optimizer.opt {opt.removeprefix('rep')}"
        )


def scaled_kernels(
    model: nn.Module, scales: Mapping[str, BlockScales]
) -> dict[Tensor, BlockScales]:
    """Return the scales by kernel instead of by name of layer; a network of branches has none."""
    if not isinstance(model, RepOptVGG):
        return {}
    return {
        layer.conv.weight: scales[name]
        for name, _, layer in model.layers()
        if isinstance(layer, ConvBN)
    }


# ------------------------------------------------------------------------------- the scales' file


@dataclass(frozen=True, kw_only=True)
class ScalesOrigin:
    """Which search a scales file is of; top-1 in percent, of its best epoch in validation."""

    model: str
    data: str
    epochs: int
    val_top1_percent: float
    litezoo_version: str


@dataclass(frozen=True, kw_only=True)
class SearchedScales:
    """What a scales file holds; `sha256` is of the numbers, not of the file."""

    layers: Mapping[str, BlockScales]
    origin: ScalesOrigin
    sha256: str


_FORMAT = "litezoo-repopt-scales-1"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors: names, shapes and float32 values in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().float().contiguous()
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def save_scales(
    layers: Mapping[str, BlockScales], file: Path, *, origin: ScalesOrigin
) -> SearchedScales:
    """Write scales as safetensors, whole, with their origin and digest in its header.

    Numbers that are not finite are a UsageError.
    """
    from safetensors.torch import save

    tensors = {
        f"{name}.{field.name}": value.detach().cpu().float().contiguous()
        for name, scales in layers.items()
        for field in fields(scales)
        if (value := getattr(scales, field.name)) is not None
    }
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UsageError(
                f"the searched {name} is no finite number: the search diverged; repeat it with a "
                "lower rate"
            )
    metadata = {key: str(value) for key, value in asdict(origin).items()}
    digest = _digest(tensors)
    write_whole(file, save(tensors, {"format": _FORMAT, "sha256": digest, **metadata}))
    return SearchedScales(layers=_by_layer(tensors), origin=origin, sha256=digest)


def load_scales(file: Path) -> SearchedScales:
    """Read a scales file, on the CPU.

    One that is missing or is not readable is a UsageError, one whose numbers are not those that
    were written a CheckFailed.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UsageError(
            f"no scales file {file}; make one by a search, or leave optimizer.scales out for those "
            "of the prior"
        )
    try:
        with safe_open(file, framework="pt") as content:
            header = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{file} is not a readable scales file ({first_line(error)}); search again"
        ) from error
    if header.get("format") != _FORMAT:
        raise UsageError(f"{file} is no scales file of litezoo ({_FORMAT}); make one by a search")
    digest = _digest(tensors)
    if digest != header.get("sha256"):
        raise CheckFailed(f"{file} is damaged: its numbers are not those written; search again")
    try:
        origin = ScalesOrigin(
            model=header["model"],
            data=header["data"],
            epochs=int(header["epochs"]),
            val_top1_percent=float(header["val_top1_percent"]),
            litezoo_version=header["litezoo_version"],
        )
        return SearchedScales(layers=_by_layer(tensors), origin=origin, sha256=digest)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} has no {first_line(error)}; search again") from error


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, BlockScales]:
    """Return tensors named <layer>.<scale> by layer; KeyError names a scale that is missing."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {
        name: BlockScales(
            scale_3x3=tensors[f"{name}.scale_3x3"],
            scale_1x1=tensors[f"{name}.scale_1x1"],
            identity=tensors.get(f"{name}.identity"),
        )
        for name in names
    }


def get_scales(model: RepOptVGG, *, file: str | None) -> dict[str, BlockScales]:
    """Return the scales of a model's layers: those of a search's file, else the prior's.

    A file of another network is a UsageError that names the layer.
    """
    if file is None:
        return prior_scales(model)
    searched = load_scales(Path(file))
    check_scales(model, searched.layers, origin=file)
    return dict(searched.layers)
