"""A kit's result.json, brought back, becomes rows of the results; a doubtful one becomes none."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tensorrt import create_kit, create_tiny, run_script, with_fakes

from litezoo.benchmarks.import_kit import PROTOCOL, import_result
from litezoo.benchmarks.results import markdown_table, read_rows
from litezoo.export.artifact import Accuracy, Artifact
from litezoo.export.parity import Parity
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, LitezooError, UsageError
from litezoo.models.files import file_sha256

MODEL = "repvgg_a0"
ACCURACY = {
    "data": "digits",
    "images": 100,
    "top1_percent": 97.0,
    "pytorch_top1_percent": 98.0,
    "agreement_percent": 99.0,
    "snr_db": 40.0,
}


@dataclasses.dataclass
class Ran:
    """An artifact's folder whose kit was run on the fakes, and what its result.json says."""

    artifact: Path
    values: dict[str, Any]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    artifact = folder / "artifact"
    artifact.mkdir()
    kit = create_kit(artifact / "kit", create_tiny(folder), "fp16", "int8+fp16")
    values = json.loads((kit / "kit.json").read_text())
    values["model"] = MODEL  # of a model that is in the catalogue
    (kit / "kit.json").write_text(json.dumps(values))
    files = {f"kit/{file.name}": file_sha256(file) for file in sorted(kit.iterdir())}
    write_manifest(artifact, files)
    done = run_script(kit, env=with_fakes(folder / "fakes", "11.4"))
    assert done.returncode == 0, done.stderr
    return Ran(artifact, json.loads((kit / "result.json").read_text()))


def write_manifest(folder: Path, files: dict[str, str], **changes: Any) -> None:
    check = Parity(
        stage="fuse", reference="the train form", batches=(7,), max_relative_error=0.0,
        tolerance=1e-4, min_cosine=1.0, top1_agreement_percent=100.0,
    )  # fmt: skip
    fields = {field.name for field in dataclasses.fields(Accuracy)}
    accuracy = Accuracy(**{name: value for name, value in ACCURACY.items() if name in fields})
    values: dict[str, Any] = {
        "model": MODEL, "weights": "some.ckpt", "weights_sha256": "1" * 64, "device": "t4",
        "graph_form": "deploy", "preprocess": get_spec(MODEL).default_preprocess,
        "classes": (), "data": None, "checks": (check,), "engines": (), "not_built": {},
        "onnx": {"fp16": "model.fp16.onnx"}, "onnx_accuracy": {"fp16": accuracy},
        "kit": tuple(files), "notes": (), "files": files, "versions": {}, "created": "now",
    }  # fmt: skip
    (folder / "manifest.json").write_text(Artifact(**values | changes).to_json())


Write = Callable[..., Path]


@pytest.fixture
def write(ran: Ran, tmp_path: Path) -> Write:
    """Give a function that writes the result with changes, by dotted key, and returns the file."""

    def write_result(changes: dict[str, Any] | None = None) -> Path:
        values = copy.deepcopy(ran.values)
        for key, value in (changes or {}).items():
            *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
            owner: Any = values
            for part in path:
                owner = owner[part]
            if value is GONE:
                del owner[last]
            else:
                owner[last] = value
        file = tmp_path / "result.json"
        file.write_text(json.dumps(values))
        return file

    return write_result


GONE = object()


# --- what is taken -------------------------------------------------------------------------------


def test_every_timing_becomes_a_row_that_can_be_read_back(
    ran: Ran, write: Write, tmp_path: Path
) -> None:
    rows = import_result(write(), results=tmp_path / "results", artifact=ran.artifact)
    assert [(row.precision, row.batch) for row in rows] == [
        (precision, batch) for precision in ("fp16", "int8+fp16") for batch in (1, 8, 32)
    ]
    assert read_rows([tmp_path / "results" / "t4.jsonl"]) == rows
    timing = ran.values["engines"][0]["timings"][1]
    row = rows[1]
    assert (row.model, row.device, row.runtime, row.graph_form) == (
        MODEL, "t4", "tensorrt", "deploy",
    )  # fmt: skip
    assert row.p50_ms == round(timing["p50_ms"], 4) and row.runs == timing["runs"]
    assert row.images_per_s == round(8e3 / timing["p50_ms"], 1)
    assert row.resolution == (3, 6, 8) and row.protocol == PROTOCOL == "kit-1"
    assert row.machine.versions["gpu"] == "Tesla T4"
    assert row.machine.versions["tensorrt"] == "11.4.0.106"
    assert row.date.endswith("+00:00") and row.date[:19] == ran.values["time_utc"][:19]
    assert "| t4 | repvgg_a0 | 3x6x8 |" in markdown_table(rows)


def test_rows_carry_the_artifact_they_are_of(ran: Ran, write: Write, tmp_path: Path) -> None:
    rows = import_result(write(), results=tmp_path / "a", artifact=ran.artifact)
    assert {row.artifact_sha256 for row in rows} == {file_sha256(ran.artifact / "manifest.json")}
    assert {row.weights for row in rows} == {"trained"}
    assert [row.top1_percent for row in rows] == [97.0] * 3 + [None] * 3  # of fp16's file only
    assert [row.top1_data for row in rows] == ["digits, 1000 classes"] * 3 + [""] * 3
    rows = import_result(write(), results=tmp_path / "b")
    assert {row.artifact_sha256 for row in rows} == {ran.values["kit_sha256"]}
    assert {(row.weights, row.top1_percent) for row in rows} == {("unknown", None)}


def test_ratios_are_over_the_first_engine_at_the_same_batch(write: Write, tmp_path: Path) -> None:
    changes = {
        f"engines.{engine}.timings.1.{key}": value
        for engine, value in ((0, 2.0), (1, 0.5))
        for key in ("p50_ms", "p90_ms", "p99_ms")
    }
    rows = import_result(write(changes), results=tmp_path / "results")
    assert (rows[1].ratio, rows[4].ratio) == (1.0, 4.0)
    assert rows[4].ratio_to == "repvgg_a0 tensorrt fp16 deploy"


def test_a_timing_without_a_graph_says_so(write: Write, tmp_path: Path) -> None:
    rows = import_result(
        write({"engines.0.timings.0.cuda_graph": False}), results=tmp_path / "results"
    )
    assert [row.protocol for row in rows] == ["kit-1 without graph"] + ["kit-1"] * 5


def test_a_later_run_of_the_same_kit_is_added(write: Write, tmp_path: Path) -> None:
    import_result(write(), results=tmp_path)
    import_result(write({"time_utc": "2027-01-01T00:00:00Z"}), results=tmp_path)
    assert len(read_rows([tmp_path / "t4.jsonl"])) == 12


# --- what is refused -----------------------------------------------------------------------------

ENGINE = "engines.0"
REFUSED: dict[str, tuple[dict[str, Any], type[LitezooError]]] = {
    "has the format 1, this litezoo reads 2": ({"format": 1}, UsageError),
    "is not the result of a kit": ({"engines": GONE}, UsageError),
    "is not the whole result of a kit (KeyError('driver'))": ({"driver": GONE}, UsageError),
    "KeyError('host')": ({"host": GONE}, UsageError),
    "compute_capability is 7.5": ({"compute_capability": 7.5}, UsageError),
    "batch is '8'": ({f"{ENGINE}.timings.0.batch": "8"}, UsageError),
    "time_utc is no time": ({"time_utc": "yesterday"}, UsageError),
    "unknown device 't44'; did you mean 't4'?": ({"device": "t44"}, UsageError),
    "unknown model 'repvgg_a00'": ({"model": "repvgg_a00"}, UsageError),
    "Tesla T4 has compute capability 9.0 and t4 7.5; these are not results of t4": (
        {"compute_capability": "9.0"},
        CheckFailed,
    ),
    "fp32 failed there (no kernel); for the others run again: build_engine.py --precision fp16": (
        {"failed": {"fp32": "no kernel"}, "ok": False},
        CheckFailed,
    ),
    "has no engines": ({"engines": []}, CheckFailed),
    "run the kit to its end": ({"ok": False}, CheckFailed),
    "has no tf32": ({f"{ENGINE}.precision": "tf32"}, CheckFailed),
    "is no fp16 engine of TensorRT 11.4.0.106 for t4": (
        {f"{ENGINE}.engine": "a.fp16.sm75.trt10.16.1.11.plan"},
        CheckFailed,
    ),
    "is no int8 engine": ({f"{ENGINE}.precision": "int8"}, CheckFailed),
    "does not say what it runs on": ({f"{ENGINE}.engine": "a.plan"}, CheckFailed),
    "is not to be used: relative error 3.00e-01 > 2e-02": (
        {f"{ENGINE}.parity.max_relative_error": 0.3, f"{ENGINE}.tolerance": 0.5},
        CheckFailed,
    ),
    "some outputs are not finite": ({f"{ENGINE}.parity.finite": False}, CheckFailed),
    "top-1 agrees for 50.0%": ({f"{ENGINE}.parity.top1_agreement": 0.5}, CheckFailed),
    "was not timed": ({"engines.1.timings": []}, CheckFailed),
    "has the percentiles": ({f"{ENGINE}.timings.0.p90_ms": 0.0}, CheckFailed),
    "p50_ms is nan": ({f"{ENGINE}.timings.0.p50_ms": float("nan")}, CheckFailed),
    "p99_ms is inf": ({f"{ENGINE}.timings.0.p99_ms": float("inf")}, CheckFailed),
    "runs is 0": ({f"{ENGINE}.timings.0.runs": 0}, CheckFailed),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_result_that_cannot_be_trusted_is_refused_whole(
    write: Write, tmp_path: Path, words: str
) -> None:
    changes, kind = REFUSED[words]
    with pytest.raises(kind) as error:
        import_result(write(changes), results=tmp_path / "results")
    assert words in str(error.value) and type(error.value) is kind
    assert not (tmp_path / "results").exists()


def test_the_same_result_is_not_taken_twice(ran: Ran, write: Write, tmp_path: Path) -> None:
    import_result(write(), results=tmp_path)
    before = (tmp_path / "t4.jsonl").read_bytes()
    for artifact in (None, ran.artifact):  # nor under another hash
        with pytest.raises(UsageError, match=r"has the fp16 result of .* already"):
            import_result(write(), results=tmp_path, artifact=artifact)
    assert (tmp_path / "t4.jsonl").read_bytes() == before


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with pytest.raises(UsageError, match="is not there"):
        import_result(file, results=tmp_path)
    for content, words in ((b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "the result")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            import_result(file, results=tmp_path)


def test_a_result_of_another_artifact_is_refused(ran: Ran, write: Write, tmp_path: Path) -> None:
    results = tmp_path / "results"

    def refused(changes: dict[str, Any], words: str, kind: type[LitezooError]) -> None:
        with pytest.raises(kind, match=words):
            import_result(write(changes), results=results, artifact=ran.artifact)

    refused({"kit_sha256": "0" * 64}, "made with another kit/kit.json", CheckFailed)
    refused({"engines.1.onnx_sha256": "0" * 64}, "another kit/tiny.int8-fp16.onnx", CheckFailed)
    other = tmp_path / "other"
    other.mkdir()
    write_manifest(other, {"a": ""}, model="repvgg_b0")
    with pytest.raises(UsageError, match=r"the result is of repvgg_a0 and .* of repvgg_b0"):
        import_result(write(), results=results, artifact=other)
    write_manifest(other, {"a": ""}, device="cpu")
    with pytest.raises(UsageError, match=r"the result is of t4 and .* of cpu"):
        import_result(write(), results=results, artifact=other)
    assert not results.exists()


def test_a_kit_that_was_changed_here_is_refused(ran: Ran, write: Write, tmp_path: Path) -> None:
    file = ran.artifact / "kit" / "tiny.fp16.onnx"
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    try:
        with pytest.raises(CheckFailed, match=r"kit/tiny\.fp16\.onnx was changed"):
            import_result(write(), results=tmp_path / "results", artifact=ran.artifact)
    finally:
        file.write_bytes(content)
