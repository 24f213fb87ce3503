"""A family from outside is one file: by its entry point it is listed and held to the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAMILY = '''
from torch import nn

from litezoo.models.catalogue import ModelSpec
from litezoo.models.classifier import ImageClassifier
from litezoo.models.layers import ConvBN


class PlainNet(ImageClassifier):
    """3x3 convolutions, each opening a stage with stride 2."""

    def __init__(self, *, widths, num_classes, in_chans, global_pool, drop_rate):
        info = [{"num_chs": widths[0], "reduction": 2, "module": "stem"}]
        stages = nn.Sequential()
        for index, (before, width) in enumerate(zip(widths, widths[1:])):
            stages.append(
                nn.Sequential(ConvBN(before, width, 3, stride=2), ConvBN(width, width, 3))
            )
            info.append(
                {"num_chs": width, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            )
        super().__init__(
            stem=ConvBN(in_chans, widths[0], 3, stride=2), stages=stages, feature_info=info,
            num_features=widths[-1], num_classes=num_classes, in_chans=in_chans,
            global_pool=global_pool, drop_rate=drop_rate,
        )


SPECS = [
    ModelSpec(
        name="plainnet_8", family="plainnet", factory="plainnet:PlainNet",
        architecture={"widths": (8, 16, 32)}, paper="https://example.org/plainnet",
        params_train=50_704, params_deploy=50_600, macs_m=24.4, first_convs=("stem.conv",),
        exempt={"grad_checkpointing": "its blocks are single layers, whose inputs are kept"},
    )
]
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Put one file and the entry point that an installer would write on the path."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "plainnet.py").write_text(FAMILY)
    info = folder / "plainnet-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plainnet\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[litezoo.models]\nplainnet = plainnet:SPECS\n")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def run(installed, *words):
    return subprocess.run(
        [sys.executable, "-m", *words], env=installed, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_family_dropped_in_as_one_file_is_listed(installed):
    result = run(installed, "litezoo", "list", "--family", "plainnet")
    assert result.returncode == 0, result.stderr
    assert " plainnet_8 " in result.stdout


@pytest.mark.slow
def test_a_family_dropped_in_as_one_file_is_held_to_the_contract(installed):
    result = run(
        installed, "pytest", "tests/test_models.py", "tests/test_zoo.py", "-v", "-n0",
        "-k", "plainnet",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 30, result.stdout
