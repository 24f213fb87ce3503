"""What every classifier of the zoo can do: timm's conventions, written once.

stem -> stages (nn.Sequential of nn.Sequential) -> head (pooling, dropout, linear).
"""

from __future__ import annotations

from typing import Any

from timm.layers.classifier import ClassifierHead
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .errors import UsageError, unknown_name

__all__ = ["ImageClassifier"]


class ImageClassifier(nn.Module):
    """A backbone with a linear classifier; shapes (N, C, H, W) -> (N, num_classes).

    Any input size that the strides leave at least one pixel of. `global_pool=""` together with
    `num_classes=0` returns the last feature map (N, num_features, H / 32, W / 32).
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
    ) -> None:
        super().__init__()
        _check_head(num_classes, global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = num_features
        self.feature_info = feature_info
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = stages
        self.head = ClassifierHead(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features that the classifier reads."""
        width: int = self.head.num_features
        return width

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map (N, num_features, H', W')."""
        x = self.stem(x)
        if self.grad_checkpointing and self.training:
            blocks = [block for stage in self.stages for block in stage]  # type: ignore[attr-defined]
            features: Tensor = checkpoint_seq(blocks, x)
            return features
        features = self.stages(x)
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
        self.head.reset(num_classes, global_pool)
        self.head.to(device=parameter.device, dtype=parameter.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training: keep only block inputs, recompute the rest."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that sort parameters into layers (layer-wise lr decay)."""
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
