"""Trained networks that 8 bits ruin: what the ladder has to bring back.

Two ways a RepVGG collapses with one scale for a whole weight: a channel that died in training,
whose BatchNorm divides by sqrt(eps), and channels of very unequal ranges. `stress` makes the second
of any trained RepVGG without changing what it computes, as hard as a test needs.
"""

import dataclasses
import itertools

import torch
from test_train import TINY
from torch.nn import functional as F

from litezoo.export.source import load_source
from litezoo.models.create import create_model
from litezoo.models.repvgg import RepVGGBlock
from litezoo.models.weights import INFO_KEY, CheckpointInfo
from litezoo.recipes.data import eval_transform, open_data


def bn_branches(block):
    """Return the BatchNorms of a RepVGG block's branches."""
    norms = [block.branch_3x3.bn, block.branch_1x1.bn]
    return norms if block.branch_identity is None else [*norms, block.branch_identity]


@torch.no_grad()
def stress(network, factor, *, every=16):
    """Divide one channel in `every` by `factor` and have its readers multiply it (train form)."""
    blocks = [m for m in network.modules() if isinstance(m, RepVGGBlock)]
    for first, second in itertools.pairwise(blocks):
        channels = torch.arange(0, first.branch_3x3.bn.num_features, every)
        for norm in bn_branches(first):
            norm.weight[channels] /= factor
            norm.bias[channels] /= factor
        for branch in (second.branch_3x3, second.branch_1x1):
            branch.conv.weight[:, channels] *= factor
        if (norm := second.branch_identity) is not None:
            variance = norm.running_var[channels]
            norm.running_mean[channels] /= factor
            norm.running_var[channels] = variance / factor**2
            # the same gain on a channel that is that much smaller
            shrunk = (variance / factor**2 + norm.eps).sqrt() / (variance + norm.eps).sqrt()
            norm.weight[channels] *= factor * shrunk
    return network


def changed(checkpoint, change, target):
    """Write a checkpoint whose network was changed; return its path."""
    values = torch.load(checkpoint, map_location="cpu", weights_only=True)
    source = load_source("repvgg_tiny", str(checkpoint), ())
    state = change(source.model.eval()).state_dict()
    values["state_dict"] = {f"net.{name}": value for name, value in state.items()}
    torch.save(values, target)
    return target


def images_of(split):
    """Return a split of the digits: images (N, 1, 32, 32) and classes (N,)."""
    data = open_data("digits")
    transform = eval_transform(data.preprocess)
    pairs = [(transform(image), label) for image, label in data.images(split)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


#: A RepVGG in which channels die, trained as below: it loses some 80 points with one scale for all.
DYING = dataclasses.replace(
    TINY,
    name="repvgg_dying",
    architecture={
        **TINY.architecture,
        "depths": (2, 3, 6, 1),
        "stem_width": 16,
        "widths": (16, 24, 48, 128),
    },
)


def train_dying(target, *, seed=0, epochs=12, batch=64):
    """Write a checkpoint of `DYING`, trained with a learning rate so high that ReLUs die."""
    torch.manual_seed(seed)
    network = create_model(DYING.name, num_classes=10, in_chans=1)
    images, labels = images_of("train")
    order = torch.Generator().manual_seed(seed)
    steps = len(images) // batch
    optimizer = torch.optim.SGD(network.parameters(), 1.0, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, epochs * steps, pct_start=0.1)
    network.train()
    for _ in range(epochs):
        for some in torch.randperm(len(images), generator=order)[: steps * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(network(images[some]), labels[some], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    data = open_data("digits")
    info = CheckpointInfo(
        model=DYING.name, classes=data.classes, preprocess=data.preprocess, data=data.source,
        state_prefix="net.", litezoo_version="0",
    )  # fmt: skip
    state = {f"net.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, INFO_KEY: info.to_dict()}, target)
    return target
