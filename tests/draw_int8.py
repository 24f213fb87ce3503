"""How 8 bits break a network and what mends it, drawn: docs/pictures/int8-mechanism.svg.

Two networks are trained on the embedded digits (20 s of one core): one in which channels die, and a
healthy one whose channels are made unequal without changing what it computes. Of a layer of each
the picture shows the largest weight of every output channel beside the step that 8 bits have with
one scale for the whole weight, before and after the cure.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from collapsing import DYING, images_of, stress, train_dying
from helpers import in_catalogue
from onnx import numpy_helper

from litezoo.benchmarks.draw_pictures import _svg, _text
from litezoo.export.equalize import equalize
from litezoo.export.source import load_source
from litezoo.export.to_onnx import export_onnx
from litezoo.models.files import write_whole
from litezoo.models.fuse import fuse

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "int8-mechanism.svg"
_WIDTH, _HEIGHT, _GAP = 380, 190, 40
_KEPT, _COARSE, _LOST = "#2b7bd6", "#e6a117", "#d55e00"
#: A channel with fewer steps than this from zero to its largest weight is hardly told from others.
_FEW = 8


def reaches(proto, name):
    """Return max |w| of each output channel of a convolution, and of its whole weight."""
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    rows = np.abs(weights[name]).reshape(len(weights[name]), -1).max(1)
    return rows, float(rows.max())


def panel(x, y, title, rows, largest):
    """Return the parts of one panel: bars on a logarithmic scale and the step as a line."""
    step = largest / 127
    top, low = 300.0, 1e-3

    def height(value):
        share = math.log(max(value, low) / low) / math.log(top / low)
        return share * (_HEIGHT - 60)

    base = y + _HEIGHT - 18
    steps = rows / step
    parts = [_text(x, y + 14, title, "b")]
    width = _WIDTH / len(rows)
    for index, value in enumerate(rows):
        count = steps[index]
        colour = _LOST if count < 0.5 else _COARSE if count < _FEW else _KEPT
        tall = height(value)
        parts.append(
            f'<rect x="{x + index * width:.1f}" y="{base - tall:.1f}" width="{width * 0.72:.1f}" '
            f'height="{tall:.1f}" fill="{colour}"/>'
        )
    line = base - height(step / 2)
    parts.append(
        f'<path d="M{x} {line:.1f}H{x + _WIDTH}" stroke="#767676" stroke-dasharray="4 3"/>'
    )
    lost, coarse = int((steps < 0.5).sum()), int(((steps >= 0.5) & (steps < _FEW)).sum())
    said = f"largest weight {largest:.3g}, step {step:.2g}; {lost} of {len(rows)} channels lost"
    said += f", {coarse} coarse"
    return [*parts, _text(x, y + 32, said, size=11)]


def layers():
    """Return (title, ranges, largest) of the four panels, from trained networks."""
    pictures = images_of("train")[0][:256]
    with in_catalogue(DYING), tempfile.TemporaryDirectory() as folder:
        dying = load_source(
            DYING.name, str(train_dying(Path(folder) / "dying.ckpt")), ()
        ).model.eval()
    example = pictures[:2].numpy()

    def proto_of(network):
        return export_onnx(network, example, metadata={})

    sick, cured = proto_of(fuse(dying, cure=False)), proto_of(fuse(dying, images=pictures))
    names = [n.input[1] for n in sick.graph.node if n.op_type == "Conv"]
    worst = max(names, key=lambda name: reaches(sick, name)[1])
    # the cured network, whose channels are then made unequal: the same function again
    with torch.no_grad():
        hard = proto_of(fuse(stress(dying, 64.0, every=5), images=pictures))
    equal = equalize(hard, pictures.numpy()).proto
    other = names[4]
    return [
        (f"{worst.removesuffix('.conv.weight')}: a channel died", *reaches(sick, worst)),
        ("the same layer, cured by fuse", *reaches(cured, worst)),
        (f"{other.removesuffix('.conv.weight')}: unequal channels", *reaches(hard, other)),
        ("the same layer, equalised", *reaches(equal, other)),
    ]


def main():
    torch.set_num_threads(1)
    parts = []
    for index, found in enumerate(layers()):
        x = (index % 2) * (_WIDTH + _GAP)
        y = (index // 2) * (_HEIGHT + 20)
        parts += panel(x, y, *found)
    y = 2 * (_HEIGHT + 20)
    legend = {
        _KEPT: f"{_FEW} steps and more",
        _COARSE: f"coarse: under {_FEW} steps",
        _LOST: "lost: rounds to 0",
    }
    for index, (colour, words) in enumerate(legend.items()):
        parts.append(f'<rect x="{index * 170}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(index * 170 + 18, y + 11, words, size=12))
    parts.append(_text(510, y + 11, "- - -  half a step: 0 below it", size=12))
    parts.append(
        _text(0, y + 32, "Bars: the largest weight of each output channel (logarithmic).", size=12)
    )
    write_whole(PICTURE, _svg(y + 42, parts, "Channel ranges before and after the cures"))
    print(PICTURE)


if __name__ == "__main__":
    main()
