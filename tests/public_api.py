"""What a user's type checker sees of the public names; pyright reads it, nothing runs it."""

from pathlib import Path
from typing import assert_type

import numpy as np
from timm.models import FeatureListNet
from torch import nn

import litezoo
from litezoo.benchmarks.pick import Pick
from litezoo.export.artifact import LoadedArtifact
from litezoo.models.classifier import ImageClassifier
from litezoo.recipes.devices import Device

model = litezoo.create_model("repvgg_a0", num_classes=10)
assert_type(model, ImageClassifier)
assert_type(litezoo.create_model("repvgg_a0", features_only=True), FeatureListNet)
assert_type(litezoo.fuse(model), nn.Module)
assert_type(litezoo.fuse_with_report(model).max_relative_error, float | None)
assert_type(litezoo.list_models("repvgg*"), list[str])
assert_type(litezoo.get_device("t4"), Device)
assert_type(litezoo.pick(device="t4", latency_ms=2), Pick)
engine = litezoo.load(Path("artifacts/repvgg_a0/cpu"), runtime="openvino")
assert_type(engine, LoadedArtifact)
logits = engine(np.zeros((1, 3, 224, 224), dtype=np.float32))
labels = engine(["a.png", Path("b.png")])
