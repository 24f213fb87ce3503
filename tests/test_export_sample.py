"""What `make test-export-all` does with every network, done with one of each family in little.

Of the lightest network of a family equal blocks are left out, so that all its kinds of layers go
all the way. The table of docs/export.md is of whole networks.
"""

import pytest
from export_all import export_one
from helpers import kinds_of_layers, on_meta, settle, shallow

from litezoo.models.catalogue import get_spec, list_models
from litezoo.models.create import create_model


def lightest():
    """Return of each family the variant with the fewest multiply-accumulates."""
    found = {}
    for spec in map(get_spec, list_models()):
        if spec.family not in found or spec.macs_m < found[spec.family].macs_m:
            found[spec.family] = spec
    return sorted(spec.name for spec in found.values())


#: Each precision and each runtime; what ONNX Runtime says of float32 is compared on the way.
CELLS = ("onnxruntime fp16", "onnxruntime int8", "openvino fp32", "openvino int8")


@pytest.mark.parametrize("name", lightest())
def test_a_network_is_itself_in_every_precision(name):
    network = shallow(get_spec(name)).build()
    assert kinds_of_layers(network) == kinds_of_layers(on_meta(create_model, name).train())
    *cells, _seconds = export_one(name, CELLS, network=settle(network), images_for_int8=8)
    assert [cell for cell in cells if cell[0] == "!"] == []
    decibels = [float(cell) for label, cell in zip(CELLS, cells, strict=True) if "int8" in label]
    assert min(decibels) > 10, decibels  # 8 bits that are right; of wrong ones 0 are left
