"""How well `int8_risk` foretells what int8 does: trained digits networks into docs/int8.md.

Small networks of nine families are trained on the embedded digits, written as 8-bit ONNX (in
TensorRT's form, calibrated on training images) and run on the test images; the tables set the risk,
known from the float weights alone, beside what came out. All of it takes some 6 minutes of one
core. `--cache DIR` keeps the trained networks.
"""

import argparse
import copy
import itertools
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from helpers import shallow
from torch.nn import functional as F

from litezoo.benchmarks.validate import spearman
from litezoo.export.compare import compare_logits
from litezoo.export.int8_risk import int8_risk
from litezoo.export.to_int8 import quantize
from litezoo.export.to_onnx import export_onnx, load_onnx
from litezoo.models.catalogue import get_spec
from litezoo.models.fuse import fuse, graph_form
from litezoo.models.mobileone import MobileOne
from litezoo.models.qarepvgg import QARepVGG
from litezoo.models.repoptvgg import RepOptVGG
from litezoo.models.repvgg import RepVGG
from litezoo.recipes.data import eval_transform, open_data

DOCS = Path(__file__).parents[1] / "docs" / "int8.md"
BEGIN, END = "<!-- risk table: tests/measure_int8_risk.py -->", "<!-- end of risk table -->"

#: RepVGG's 22 layers, narrow: what facts and papers say of the collapse is said of these.
NARROW = {"stem_width": 16, "widths": (16, 24, 48, 128), "num_classes": 10, "in_chans": 1}
DEEP = {"depths": (2, 4, 14, 1), **NARROW}


def member(name):
    """Return a network of few blocks of a family of the zoo."""
    return shallow(get_spec(name)).build(num_classes=10, in_chans=1)


#: Label: (how it is made, seeds, learning rate).
NETS = {
    "RepVGG": (partial(RepVGG, **DEEP), (0, 1, 2), 2e-3),
    "RepVGG, g2": (partial(RepVGG, **DEEP, groups=2), (0,), 2e-3),
    "RepVGG, short": (partial(RepVGG, depths=(1, 2, 3, 1), **NARROW), (0, 1), 4e-3),
    "QARepVGG": (partial(QARepVGG, **DEEP), (0, 1), 2e-3),
    "RepOpt-VGG": (partial(RepOptVGG, **DEEP), (0,), 1e-3),
    "MobileOne": (partial(MobileOne, branches=2, depths=(2, 3, 3, 1), **NARROW), (0,), 4e-3),
    "MobileNetV1": (partial(member, "mobilenetv1_050"), (0,), 2e-3),
    "MobileNetV2": (partial(member, "mobilenetv2_050"), (0, 1), 2e-3),
    "MobileNetV3": (partial(member, "mobilenetv3_small_050"), (0,), 2e-3),
    "ShuffleNetV2": (partial(member, "shufflenetv2_x0_5"), (0,), 2e-3),
    "VoVNet": (partial(member, "ese_vovnet19b_slim_dw"), (0,), 2e-3),
}


def images_of(split):
    """Return a split of the digits: images (N, 1, 32, 32) and classes."""
    data = open_data("digits")
    transform = eval_transform(data.preprocess)
    pairs = [(transform(image), label) for image, label in data.images(split)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def train(network, seed, learning_rate, epochs=14, batch=64):
    """AdamW in one cycle over shifted digits; the network ends in eval mode."""
    images, labels = images_of("train")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for some in order[: steps * batch].split(batch):
            shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
            logits = network(images[some].roll(shift, (2, 3)))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[some], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def stressed(deploy, factor, every=16):
    """Return the same function: one output channel in `every` divided, its readers multiplied.

    Only between convolutions that follow each other in a plain stack, as RepVGG's deploy form is.
    """
    convs = [m for m in deploy.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        for first, second in itertools.pairwise(convs):
            channels = torch.arange(0, first.out_channels, every)
            first.weight[channels] /= factor
            first.bias[channels] /= factor
            second.weight[:, channels] *= factor
    return deploy


@torch.no_grad()
def with_dead_channel(network, images):
    """Return a trained RepVGG with a ReLU that never fires and the statistics that follow."""
    twin = copy.deepcopy(network)
    block = twin.stages[2][3]
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias[0] = -50.0
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    twin.train()(images)
    return twin.eval()


def outcome(proto, per_channel, images, labels, calibration):
    """Return what int8 makes of an ONNX file: top-1 before, SNR in dB, points lost, agreement."""
    typed = quantize(proto, calibration.numpy(), form="int8", per_channel=per_channel)
    want, got = load_onnx(proto)(images.numpy()), load_onnx(typed)(images.numpy())
    likeness = compare_logits(got, want)
    top1 = [100 * float((x.argmax(1) == labels.numpy()).mean()) for x in (want, got)]
    return top1[0], likeness.snr_db, top1[0] - top1[1], likeness.top1_agreement_percent


def trained(label, create, seed, learning_rate, cache):
    """Return a trained network, from the cache where it lies there."""
    file = cache / (re.sub(r"\W+", "_", f"{label} {seed}") + ".pt") if cache else None
    torch.manual_seed(seed)
    network = create()
    if file and file.is_file():
        network.load_state_dict(torch.load(file, weights_only=True))
        return network.eval()
    started = time.process_time()
    train(network, seed, learning_rate)
    print(f"trained {label} {seed} in {time.process_time() - started:.0f} CPU s", flush=True)
    if file:
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), file)
    return network


def measure(cache):
    """Yield (label, seed, granularity, risk, outcome) of every network and granularity."""
    images, labels = images_of("test")
    calibration = images_of("train")[0][:256]
    for label, (create, seeds, learning_rate) in NETS.items():
        for seed in seeds:
            network = trained(label, create, seed, learning_rate, cache)
            forms = {label: fuse(network) if graph_form(network) == "train" else network}
            if label == "RepVGG":
                forms |= {f"RepVGG / {k}": stressed(fuse(network), k) for k in (4, 16)}
                killed = with_dead_channel(network, calibration)
                forms["RepVGG, a dead channel"] = fuse(killed, cure=False)
                forms["RepVGG, the dead channel cured"] = fuse(killed)
            for name, deploy in forms.items():
                proto = export_onnx(deploy, images[:2].numpy(), metadata={})
                for granularity in ("per-tensor", "per-channel"):
                    risk = int8_risk(deploy, granularity=granularity, image_shape=(1, 32, 32))
                    per_channel = granularity == "per-channel"
                    found = outcome(proto, per_channel, images, labels, calibration)
                    yield name, seed, granularity, risk, found


def is_kin(name):
    """Whether a network is a plain stack of full convolutions."""
    return name.startswith(("Rep", "QARep"))


def is_as_trained(name):
    """Whether nothing was done to a network to make it harder."""
    return "/" not in name and "dead" not in name


#: Whose rows a line of the correlations is of.
GROUPS = {
    "RepVGG and its kin": is_kin,
    "of these as trained": lambda name: is_kin(name) and is_as_trained(name),
    "all networks": lambda name: True,
    "all as trained": is_as_trained,
}
#: What is known without data.
KNOWN = {
    "logits on noise": lambda risk: risk.logit_snr_db,
    "worst column": lambda risk: risk.worst_column_sqnr_db,
}


def correlations(rows):
    """Return lines of the ranks' correlation of each number with the SNR and points measured."""
    lines = []
    for group, is_of in GROUPS.items():
        for granularity in ("per-tensor", "per-channel"):
            some = [row for row in rows if row[2] == granularity and is_of(row[0])]
            snr, drop = (np.array([row[4][i] for row in some]) for i in (1, 2))
            for what, number in KNOWN.items():
                said = np.array([number(row[3]) for row in some])
                lines.append(
                    f"| {group} | {granularity} | {len(some)} | {what} | {spearman(said, snr):.2f} "
                    f"| {-spearman(said, drop):.2f} |"
                )
    return lines


def verdicts(rows):
    """Return lines of what came out behind each word."""
    lines = []
    for word in ("low", "medium", "high"):
        found = [row[4] for row in rows if row[3].verdict == word]
        if found:
            drops, snrs = [f[2] for f in found], [f[1] for f in found]
            lines.append(
                f"| {word} | {len(found)} | {np.median(drops):.1f} | {max(drops):.1f} "
                f"| {min(snrs):.1f} to {max(snrs):.1f} |"
            )
    return lines


def section(rows):
    """Return the three tables as Markdown."""
    lines = [
        "| networks | weights | how many | known without data | correlation with the logits' SNR "
        "| with the points kept |",
        "|---|---|---:|---|---:|---:|",
        *correlations(rows),
        "",
        "| risk said | how often | points lost, median | points lost, most "
        "| logits on test images dB |",
        "|---|---:|---:|---:|---:|",
        *verdicts(rows),
        "",
        "| network | seed | weights | top-1 % | worst column dB | logits on noise dB | risk "
        "| logits on test images dB | points lost | agreement % |",
        "|---|---:|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for name, seed, granularity, risk, (top1, snr, drop, agreement) in rows:
        lines.append(
            f"| {name} | {seed} | {granularity} | {top1:.1f} | {risk.worst_column_sqnr_db:.1f} "
            f"| {risk.logit_snr_db:.1f} | {risk.verdict} | {snr:.1f} | {drop:.1f} "
            f"| {agreement:.1f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder that keeps the trained networks")
    torch.set_num_threads(1)
    rows = []
    for row in measure(parser.parse_args().cache):
        rows.append(row)
        print(*row[:3], str(row[3]), [round(value, 1) for value in row[4]], flush=True)
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n{section(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
