"""What `make test-export-all` does with every network, done with the lightest of each family."""

import pytest
from export_all import CELLS, export_one

from litezoo.models.catalogue import get_spec, list_models


def lightest():
    """Return of each family the variant with the fewest multiply-accumulates."""
    found = {}
    for spec in map(get_spec, list_models()):
        if spec.family not in found or spec.macs_m < found[spec.family].macs_m:
            found[spec.family] = spec
    return sorted(spec.name for spec in found.values())


@pytest.mark.parametrize("name", lightest())
def test_a_network_is_itself_in_every_precision_of_both_runtimes(name):
    *cells, _seconds = export_one(name)
    assert len(cells) == len(CELLS)
    assert [cell for cell in cells if cell[0] == "!"] == []
    decibels = [float(cell) for label, cell in zip(CELLS, cells, strict=True) if "int8" in label]
    assert min(decibels) > 20, decibels  # 8 bits that are right; noise calibrated on noise
