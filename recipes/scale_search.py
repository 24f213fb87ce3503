"""The search of RepOpt-VGG's scales (hyper-search, arXiv 2205.15242, sections 3.3 and 4.1).

The body of the model with real blocks in place of its layers, whose scales are trained too, goes
through the trainer on a small data set (the paper: CIFAR-100). Of it the scales are kept, in a
file that `optimizer.scales` takes. The strides stay those of the model, also on 32 x 32 images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from torch import Tensor, nn

from litezoo.models.catalogue import get_spec
from litezoo.models.errors import UsageError
from litezoo.models.repoptvgg import BlockScales, RepOptVGG, branch_form
from litezoo.models.weights import read_checkpoint

from .rep_optimizer import ScalesOrigin, save_scales
from .runs import LAST, RUNS
from .trainer import ClassifierModule, TrainResult, train

__all__ = ["SCALES", "ScaleSearchModule", "ScaleSearchResult", "search_scales"]

SCALES = "scales.safetensors"


class ScaleSearchModule(ClassifierModule):
    """The network of the search in training: RepOpt-VGG's blocks with trained scales.

    A RepOptimizer of the recipe is the ordinary one here, as no layer stands for a block.
    """

    def trained_form(self, net: nn.Module) -> nn.Module:
        """Return the network with real blocks."""
        if not isinstance(net, RepOptVGG):
            raise UsageError(
                f"scales are searched for RepOpt-VGG, which {self.name} is not; see: litezoo list "
                "repoptvgg*"
            )
        if self.optimizer_config.scales is not None:
            raise UsageError("a search begins with the prior's scales; leave optimizer.scales out")
        return branch_form(net, trained_scales=True)


@dataclass(frozen=True, kw_only=True)
class ScaleSearchResult:
    """What a search ended with: the scales file, the digest of its numbers, and the run."""

    scales: str
    sha256: str
    run: TrainResult


def search_scales(
    model: str | None,
    *,
    data: str | None = None,
    recipe: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> ScaleSearchResult:
    """Search the scales of a RepOpt-VGG and write them to scales.safetensors in the run's folder.

    The scales are the last epoch's. The run lies in runs/scales/<model>/<time> unless `out` names
    a folder, apart from the runs that export looks at: its checkpoints are not of the model. The
    other arguments are `trainer.train`'s.
    """
    if out is None and resume is None and model is not None:
        out = RUNS / "scales" / get_spec(model).name / f"{datetime.now():%Y%m%d-%H%M%S}"
    run = train(
        model, data=data, recipe=recipe, out=out, resume=resume, overrides=overrides,
        progress=progress, module=ScaleSearchModule,
    )  # fmt: skip
    folder = Path(run.checkpoint).parent
    saved = save_scales(
        _trained_scales(read_checkpoint(folder / LAST).state_dict),
        folder / SCALES,
        origin=ScalesOrigin(
            model=run.model,
            data=run.data,
            epochs=run.epochs,
            val_top1_percent=run.val_top1_percent,
            litezoo_version=version("litezoo"),
        ),
    )
    return ScaleSearchResult(scales=str(folder / SCALES), sha256=saved.sha256, run=run)


def _trained_scales(state: Mapping[str, Tensor]) -> dict[str, BlockScales]:
    """Return the scales of a network of real blocks from its state dict, by layer."""
    suffix = ".scale_3x3"
    names = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    return {
        name: BlockScales(
            scale_3x3=state[f"{name}.scale_3x3"],
            scale_1x1=state[f"{name}.scale_1x1"],
            identity=state[key].flatten() if (key := f"{name}.identity") in state else None,
        )
        for name in names
    }
