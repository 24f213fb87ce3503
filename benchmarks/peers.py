"""What engines are measured against: PyTorch itself, and the library that users have today.

`pytorch_candidates` are litezoo's own network in PyTorch; `peer_candidates` the same network as
timm (or torchvision) builds it, run as its users run it: eager, under torch.compile, and its own
ONNX export in ONNX Runtime and OpenVINO at their default settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from litezoo.export.artifact import MANIFEST, Artifact, read_artifact
from litezoo.export.runtime import Array, Session
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import UsageError, require, unknown_name
from litezoo.models.files import file_sha256

from .measure import Candidate, top1_data

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PEERS", "peer_candidates", "pytorch_candidates"]

#: Ways to run the other library's network, in the order of the rows.
PEERS = ("eager", "compile", "onnxruntime", "openvino")


def pytorch_candidates(folder: Path, *, threads: int) -> list[Candidate]:
    """Return PyTorch eager in train form and fused, fused also channels-last, of an artifact.

    From the artifact's own checkpoint where it is still there, else with random weights, which
    cost the same time.
    """
    from litezoo.export.runtime_pytorch import eager_session
    from litezoo.models.create import create_model
    from litezoo.models.fuse import fuse

    artifact = read_artifact(folder)
    file = Path(artifact.weights)
    is_here = file.is_file() and file_sha256(file) == artifact.weights_sha256
    if is_here:
        train = create_model(artifact.model, weights=file)
    else:
        train = create_model(
            artifact.model,
            num_classes=artifact.num_classes,
            in_chans=artifact.preprocess.input_size[0],
        )
    found = [engine.accuracy for engine in artifact.engines if engine.accuracy]
    accuracy = found[0] if found and is_here else None
    deploy = fuse(train)
    return [
        Candidate(
            artifact=artifact,
            artifact_sha256=file_sha256(folder / MANIFEST),
            runtime=runtime,
            precision="fp32",
            graph_form=form,
            session=eager_session(
                model, channels_last=layout, compiled=False, precision="fp32", threads=threads
            ),
            weights="trained" if is_here else "random",
            top1_percent=accuracy.pytorch_top1_percent if accuracy else None,
            top1_data=top1_data(accuracy, artifact),
        )
        for runtime, form, model, layout in (
            ("pytorch-eager", "train", train.eval(), False),
            ("pytorch-eager", "deploy", deploy, False),
            ("pytorch-eager-channels-last", "deploy", deploy, True),
        )
    ]


def peer_candidates(folder: Path, peers: Sequence[str], *, threads: int) -> list[Candidate]:
    """Return the artifact's network as timm (or torchvision) has it, run in each way of `peers`.

    Weights are random: they cost the same time. A network that the library can reparameterize is
    there in both forms. UsageError for unknown ways and where no library has the network.
    """
    for way in peers:
        if way not in PEERS:
            raise unknown_name("peer", way, PEERS)
    artifact = read_artifact(folder)
    library, forms = _theirs(artifact)
    sha256 = file_sha256(folder / MANIFEST)
    return [
        Candidate(
            artifact=artifact,
            artifact_sha256=sha256,
            runtime=f"{library}-{way}",
            precision="default" if way == "openvino" else "fp32",
            graph_form=form,
            session=_session(way, model, artifact, threads),
            weights="random",
        )
        for way in PEERS
        if way in peers
        for form, model in forms.items()
    ]


def _theirs(artifact: Artifact) -> tuple[str, dict[str, nn.Module]]:
    """Return the library's name and its network by graph form, in eval mode."""
    references = get_spec(artifact.model).references
    library = next((name for name in ("timm", "torchvision") if name in references), None)
    if library is None:
        raise UsageError(
            f"neither timm nor torchvision has {artifact.model} as we do; measure it without "
            "--peers"
        )
    classes, channels = len(artifact.classes) or 1000, artifact.preprocess.input_size[0]
    if library == "torchvision":
        if channels != 3:
            raise UsageError(
                f"torchvision's {artifact.model} takes 3 channels, this artifact {channels}; "
                "measure it without --peers"
            )
        import torchvision

        model = torchvision.models.get_model(
            references[library], weights=None, num_classes=classes
        ).eval()
        return library, {"train": model}
    import timm
    from timm.utils.model import reparameterize_model

    model = timm.create_model(references[library], num_classes=classes, in_chans=channels).eval()
    deploy = reparameterize_model(model)
    if sum(1 for _ in deploy.modules()) == sum(1 for _ in model.modules()):
        return library, {"train": model}
    return library, {"train": model, "deploy": deploy}


def _session(way: str, model: nn.Module, artifact: Artifact, threads: int) -> Session:
    if way in ("eager", "compile"):
        from litezoo.export.runtime_pytorch import eager_session

        return eager_session(
            model, channels_last=False, compiled=way == "compile", precision="fp32",
            threads=threads,
        )  # fmt: skip
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        _export_as_timm(model, artifact.preprocess.input_size, file)
        return (
            _OrtDefault(file, threads) if way == "onnxruntime" else _OpenVinoDefault(file, threads)
        )


def _export_as_timm(model: nn.Module, size: tuple[int, int, int], file: Path) -> None:
    """Write the ONNX file that timm's onnx_export.py writes by default, with an open batch."""
    import torch
    from timm.utils.onnx import onnx_export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export(model, str(file), example_input=torch.randn(1, *size))


class _OrtDefault:
    """ONNX Runtime as it comes, but for the number of threads."""

    def __init__(self, file: Path, threads: int) -> None:
        runtime = require("onnxruntime", purpose="this peer", extra="export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session: Any = runtime.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0].name

    def run(self, batch: Array) -> Array:
        return np.asarray(self.session.run(None, {self.input: batch})[0])


class _OpenVinoDefault:
    """OpenVINO as it comes, but for the number of threads: in bf16 where the CPU has it."""

    def __init__(self, file: Path, threads: int) -> None:
        from litezoo.export.runtime_openvino import one_core

        model = one_core().read_model(file)
        compiled = one_core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.request = compiled.create_infer_request()

    def run(self, batch: Array) -> Array:
        return np.array(self.request.infer({0: batch}, share_inputs=True)[0], copy=True)
