"""What every classifier of the zoo can do: timm's conventions, written once.

stem -> stages (nn.Sequential of nn.Sequential) -> final -> head (pooling, [neck], dropout, linear).
"""

from __future__ import annotations

from typing import Any

from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.classifier import ClassifierHead
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .errors import UsageError, unknown_name

__all__ = ["ImageClassifier", "NeckHead"]


class NeckHead(nn.Module):
    """Pooling, `neck` on the pooled map, dropout, linear: (N, C, H, W) -> (N, num_classes).

    The efficient last stage of MobileNetV3 (arXiv 1905.02244, Figure 5). `neck` is a module
    (N, C * pool, 1, 1) -> (N, hidden_size, 1, 1); it stays when the classes are taken away, as in
    timm. The interface is that of timm's `ClassifierHead`.
    """

    def __init__(
        self,
        neck: nn.Module,
        *,
        hidden_size: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.num_features = hidden_size
        self.neck = neck
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the linear layer, and the pooling if one is named."""
        if pool_type is not None:
            if pool_type not in _POOLS:
                raise unknown_name("global_pool", pool_type, _POOLS)
            if pool_type.startswith("cat"):
                raise UsageError(
                    f"global_pool={pool_type!r} doubles the channels, which the layer behind the "
                    "pooling is not built for; use 'avg', 'max' or 'avgmax'"
                )
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type)
        self.flatten = nn.Flatten(1) if self.global_pool.pool_type else nn.Identity()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or with `pre_logits` what the linear layer would read."""
        x = self.drop(self.flatten(self.neck(self.global_pool(x))))
        logits: Tensor = x if pre_logits else self.fc(x)
        return logits


class ImageClassifier(nn.Module):
    """A backbone with a linear classifier; shapes (N, C, H, W) -> (N, num_classes).

    Any input size that the strides leave at least one pixel of. `global_pool=""` together with
    `num_classes=0` returns the last feature map (N, num_features, H / 32, W / 32), or with a
    `NeckHead` what its neck makes of it.

    A family gives `stem`, `stages` (every stage an nn.Sequential of blocks), where there are layers
    between the last stage and the pooling `final` (which then makes `num_features` channels), and
    where the head is not pooling and linear a `head` with the interface of timm's ClassifierHead.
    `feature_info` names, finest first, the modules (stem, stages.<i>, final) whose outputs are the
    feature maps: {"num_chs": channels, "reduction": stride, "module": name}. `pretrained_cfg` is
    what timm's data and hub functions read; `create_model` fills it.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: nn.Sequential,
        feature_info: list[dict[str, Any]],
        num_features: int,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        final: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = num_features
        self.feature_info = feature_info
        self.pretrained_cfg: dict[str, Any] = {}
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = stages
        self.final = nn.Identity() if final is None else final
        self.head: Any = head or ClassifierHead(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features that the classifier reads."""
        width: int = self.head.num_features
        return width

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map that the head reads (N, num_features, H', W')."""
        x = self.stem(x)
        if self.grad_checkpointing and self.training:
            blocks = [block for stage in self.stages for block in stage]  # type: ignore[attr-defined]
            x = checkpoint_seq(blocks, x)
        else:
            x = self.stages(x)
        features: Tensor = self.final(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, num_classes), or with `pre_logits` the pooled features."""
        logits: Tensor = self.head(x, pre_logits=pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer (Identity without classes)."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, and the pooling if one is named."""
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        _check_head(num_classes, pool)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        with parameter.device:
            self.head.reset(num_classes, global_pool)
        self.head.to(dtype=parameter.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: keep only block inputs, recompute the rest."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that sort parameters into layers (layer-wise lr decay).

        What comes behind the stages belongs to the last layer, as the classifier does.
        """
        depth = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(depth, None)]}


_POOLS = ("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax")


def _check_head(num_classes: int, global_pool: str) -> None:
    if global_pool not in _POOLS:
        raise unknown_name("global_pool", global_pool, _POOLS)
    if global_pool == "" and num_classes:
        raise UsageError(
            f"global_pool='' keeps the feature map, which {num_classes} classes cannot be read "
            "from; use num_classes=0 with it"
        )
