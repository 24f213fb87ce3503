"""Evidence: every published row is read, checked and sane; measured rows are bench's own."""

import csv
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litezoo.benchmarks import evidence
from litezoo.benchmarks.evidence import (
    PRECISIONS,
    Evidence,
    best_top1,
    read_measured,
    read_published,
    sources,
)
from litezoo.models.catalogue import FREE_LICENCES, get_spec, list_models
from litezoo.models.errors import CheckFailed, UsageError
from litezoo.recipes.devices import get_device, list_devices

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "benchmarks" / "published"
RESULTS = ROOT / "benchmarks" / "results"
GOOD = {
    "device": "t4",
    "runtime": "tensorrt",
    "version": "8.6",
    "precision": "fp16",
    "layout": "",
    "threads": "",
    "source": "a-paper",
    "model": "repvgg_a0",
    "form": "deploy",
    "batch": "8",
    "side": "224",
    "ms": "4",
    "images_per_s": "",
    "note": "",
}
SOURCE = {
    "id": "a-paper",
    "repository": "someone/something@0123abc",
    "path": "README.md",
    "licence": "MIT",
    "measured": "ten calls",
}


def family_of(row):
    """Return what has to be the same for two rows to differ in the batch alone."""
    return (
        row.device, row.runtime, row.runtime_version, row.precision, row.layout, row.threads,
        row.source, row.model, row.graph_form, row.resolution,
    )  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return read_published()


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes latency.csv and sources.csv and returns their folder."""

    def write(*rows, header=tuple(GOOD), known=(SOURCE,), source_header=tuple(SOURCE)):
        for name, columns, lines in (
            ("latency.csv", header, rows),
            ("sources.csv", source_header, known),
        ):
            with (tmp_path / name).open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(columns)
                for line in lines:
                    writer.writerow(line.values() if isinstance(line, dict) else line)
        return tmp_path

    return write


def refusal(folder):
    with pytest.raises(CheckFailed) as caught:
        read_published(folder=folder)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_status == 3
    return text.removeprefix(f"{folder}/")


# ----------------------------------------------------------------------- the published rows


def test_there_is_evidence_of_many_networks_on_many_devices(published):
    assert len(published) > 10_000 and len({row.model for row in published}) > 400
    rows_of = defaultdict(int)
    for row in published:
        rows_of[row.device] += 1
    for device, least in {"rtx4090": 2000, "rtx3090": 2000, "i7-12700h": 500, "t4": 400,
                          "v100": 250, "snapdragon-855-cpu": 80, "rk3588-cpu": 80,
                          "hailo-8": 30, "rdk-x5": 30}.items():  # fmt: skip
        assert rows_of[device] >= least, device


def test_every_published_device_has_a_file(published):
    assert {row.device for row in published} <= set(list_devices())


def test_every_source_is_used_and_every_row_has_one(published):
    assert {row.source for row in published} == set(sources())
    for source in sources().values():
        assert "@" in source.repository or "." in source.repository, source.id
        assert len(source.measured) > 20, source.id


def test_a_published_network_of_the_zoo_has_the_zoos_name(published):
    ours = {
        f"{library}:{name}": model
        for model in list_models()
        for library, name in get_spec(model).references.items()
    }
    assert not {row.model for row in published} & set(ours)
    assert {"repvgg_a0", "mobilenetv2_100", "resnet50"} <= {row.model for row in published}


def test_every_near_relative_is_a_network_of_its_library(published):
    names = defaultdict(set)
    for row in published:
        library, colon, name = row.model.partition(":")
        if colon:
            names[library].add(name)
    assert set(names) == {"timm", "torchvision"}
    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    assert names["timm"] <= set(timm.list_models())
    assert names["torchvision"] <= set(models.list_models())


def test_published_times_are_sane(published):
    for row in published:
        assert 0.02 < row.ms < 60_000 and 20 <= row.resolution <= 1024, row
        assert row.batch <= 1024 and row.threads <= 128 and row.precision in PRECISIONS, row
        assert row.kind == "published" and row.p90_ms is None and row.date == "", row


def test_no_published_time_falls_as_the_batch_grows(published):
    times = defaultdict(dict)
    for row in published:
        times[family_of(row)][row.batch] = row.ms
    grown = 0
    for conditions, of_batch in times.items():
        ordered = [of_batch[batch] for batch in sorted(of_batch)]
        grown += len(ordered) > 1
        for before, after in itertools.pairwise(ordered):
            assert after > 0.95 * before, (conditions, of_batch)
    assert grown > 300


def test_no_network_was_faster_than_winograd_lets_its_chip_be(published):
    checked, devices = 0, {name: get_device(name) for name in list_devices()}
    for row in published:
        device = devices[row.device]
        dtype = row.precision.removeprefix("amp-").replace("w8a16", "int8")
        peaks = (device.peak_tera_ops_per_s, device.sustained_tera_ops_per_s)
        peak = max(peak.get(dtype, 0.0) for peak in peaks)
        if ":" in row.model or not peak:
            continue
        spec = get_spec(row.model)
        giga_macs = spec.macs_m / 1000 * (row.resolution / spec.resolution) ** 2
        reached = 2 * giga_macs * row.batch / row.ms / peak
        assert reached < (1.05 if dtype == "int8" else 2.6), (row, reached)
        checked += 1
    assert checked > 1500


def test_the_same_network_on_the_same_gpu_differs_little_between_pytorch_versions(published):
    speed = defaultdict(dict)
    for row in published:
        if row.device == "rtx4090" and row.runtime == "pytorch-eager" and row.layout == "nchw":
            place = (row.model, row.graph_form, row.resolution)
            speed[place][row.runtime_version] = row.images_per_s
    ratios = sorted(v["2.9"] / v["2.4"] for v in speed.values() if {"2.4", "2.9"} <= set(v))
    assert len(ratios) > 400 and ratios[0] > 0.8 and ratios[-1] < 1.25


def test_branches_that_ran_are_in_train_form(published):
    forms = defaultdict(set)
    for row in published:
        forms[row.runtime, get_family(row.model)].add(row.graph_form)
    assert forms["pytorch-eager", "resnet"] == {"train"}
    assert forms["tensorrt", "resnet"] == forms["ncnn", "mobilenetv2"] == {"deploy"}
    assert "train" in forms["cann", "repvgg"]  # Huawei's script exports RepVGG's branches
    assert forms["hailort", "repvgg"] == {"deploy"}  # its operation counts are the fused ones


def get_family(model):
    return "" if ":" in model else get_spec(model).family


def test_only_pytorch_rows_state_a_layout(published):
    layouts = defaultdict(set)
    for row in published:
        layouts[row.runtime.startswith("pytorch")].add(row.layout)
    assert layouts == {True: {"nchw", "nhwc"}, False: {""}}


def test_one_devices_rows_are_those_of_all(published):
    for device in ("t4", "hailo-8"):
        assert read_published(device) == tuple(row for row in published if row.device == device)
    assert read_published("hailo-8l") == ()


def test_the_table_stays_small_enough_to_read_and_to_ship():
    assert (PUBLISHED / "latency.csv").stat().st_size < 1_600_000


def test_the_readme_of_the_table_names_its_columns_and_precisions():
    text = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    for name in (*GOOD, *PRECISIONS):
        assert name in text, name


def test_looking_evidence_up_imports_nothing_heavy():
    code = (
        "import sys, litezoo.benchmarks.evidence as e\n"
        "assert e.read_published('t4') and e.read_measured() and e.best_top1('repvgg_a0')\n"
        "heavy = {'torch', 'timm', 'numpy', 'pydantic', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ----------------------------------------------------------------------- what a row may be


def test_a_row_is_read_with_what_it_leaves_out(folder):
    (row,) = read_published(folder=folder(GOOD))
    assert row == Evidence(
        model="repvgg_a0", device="t4", runtime="tensorrt", runtime_version="8.6",
        precision="fp16", layout="", graph_form="deploy", batch=8, resolution=224, threads=0,
        ms=4.0, images_per_s=2000.0, kind="published", source="a-paper",
    )  # fmt: skip
    with pytest.raises(AttributeError):
        row.ms = 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "RTX 4090"}, "device 'RTX 4090' is not a slug (a-z, 0-9, - and .)"),
        ({"runtime": "tensorrt 8"}, "runtime 'tensorrt 8' is not a slug"),
        ({"precision": "half"}, "precision has 'half', allowed are fp32, tf32, fp16, "),
        ({"layout": "NHWC"}, "layout has 'NHWC', allowed are (empty), nchw, nhwc"),
        ({"form": "fused"}, "form has 'fused', allowed are train, deploy"),
        ({"source": "a-poster"}, "source 'a-poster' is not in sources.csv"),
        ({"model": "repvgg_a9"}, "model 'repvgg_a9' is neither in the catalogue nor timm:<name>"),
        ({"model": "keras:resnet50"}, "model 'keras:resnet50' is neither in the catalogue"),
        ({"model": "timm:ResNet-50"}, "model 'timm:ResNet-50' is neither in the catalogue"),
        ({"batch": "0"}, "batch is '0'; it is a whole number above 0"),
        ({"batch": "8.0"}, "batch is '8.0'; it is a whole number above 0"),
        ({"side": ""}, "side is ''; it is a whole number above 0"),
        ({"threads": "all"}, "threads is 'all'; it is a whole number above 0"),
        ({"ms": "4 ms"}, "ms is '4 ms'; it is a number above 0, without a unit"),
        ({"ms": "nan"}, "ms is 'nan'; it is a number above 0"),
        ({"ms": "-1"}, "ms is '-1'; it is a number above 0"),
        ({"images_per_s": "inf"}, "images_per_s is 'inf'; it is a number above 0"),
        (
            {"images_per_s": "250"},
            "images_per_s 250 is not that of 4 ms for a batch of 8 (2000); leave it empty",
        ),
    ],
)
def test_a_row_that_cannot_be_is_refused_with_its_line(folder, changes, said):
    text = refusal(folder(GOOD, {**GOOD, "side": "192", **changes}))
    assert text.startswith(f"latency.csv:3: {said}")


def test_conditions_given_twice_by_one_source_are_refused(folder):
    again = {**GOOD, "ms": "5", "note": "another day"}
    text = refusal(folder(GOOD, {**GOOD, "side": "192"}, again))
    assert text == ("latency.csv:4: the conditions of line 2 again, from one source; keep one row")
    other = {**SOURCE, "id": "a-blog"}
    rows = read_published(folder=folder(GOOD, {**again, "source": "a-blog"}, known=(SOURCE, other)))
    assert [row.ms for row in rows] == [4, 5]


def test_a_line_of_another_table_is_refused(folder):
    assert "latency.csv:2: 3 cells, not the 14 of the header" in refusal(folder(["t4", "x", "1"]))
    said = refusal(folder(GOOD, header=[*GOOD][:-1]))
    assert said.startswith("latency.csv:1: the columns are device,runtime,version,precision,")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([SOURCE, SOURCE], "sources.csv:3: the source a-paper is given twice"),
        ([{**SOURCE, "id": "A paper"}], "sources.csv:2: id 'A paper' is not a slug"),
        ([{**SOURCE, "licence": " "}], "sources.csv:2: licence of the source a-paper is empty"),
        ([["a-paper"]], "sources.csv:2: 1 cells, not the 5 of the header"),
    ],
)
def test_a_source_that_says_too_little_is_refused(folder, known, said):
    assert refusal(folder(GOOD, known=known)).startswith(said)


def test_a_folder_without_the_table_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no .*sources.csv; it comes with litezoo"):
        read_published(folder=tmp_path)


@given(batch=st.integers(1, 4096), ms=st.floats(0.01, 1e5), factor=st.floats(0.81, 1.24))
@settings(max_examples=50, deadline=None)
def test_images_a_second_follow_from_batch_and_time(batch, ms, factor):
    check = evidence._Check({"a-paper": evidence.SourceText(**SOURCE)})
    derived = 1000 * batch / ms
    cells = {**GOOD, "batch": str(batch), "ms": repr(ms)}
    assert check.read([*cells.values()]).images_per_s == pytest.approx(derived)
    given_apart = {**cells, "images_per_s": repr(derived * factor)}
    assert check.read([*given_apart.values()]).images_per_s == pytest.approx(derived * factor)
    with pytest.raises(ValueError, match="leave it empty"):
        check.read([*{**cells, "images_per_s": repr(derived * 2 * factor)}.values()])


# ----------------------------------------------------------------------- measured rows


def result_row(**changes):
    """Return a line of results as `litezoo bench` writes it, from one that it wrote."""
    line = json.loads((RESULTS / "cpu.jsonl").read_text(encoding="utf-8").splitlines()[0])
    values = {
        "model": "repvgg_a0", "device": "board", "runtime": "openvino", "precision": "int8",
        "graph_form": "deploy", "batch": 8, "threads": 2, "p50_ms": 4.0, "p90_ms": 5.0,
        "p99_ms": 6.0, "images_per_s": 2000.0, "streams": 1, "scope": "engine", "refused": "",
        "date": "2026-11-23T05:56:06+00:00",
    }  # fmt: skip
    return {**line, **values, **changes}


@pytest.fixture
def results(tmp_path):
    def write(*rows):
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        (tmp_path / "board.jsonl").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_measured_rows_are_the_engine_rows_that_results_would_show():
    from litezoo.benchmarks.results import conditions, read_rows
    from litezoo.benchmarks.rows import newest

    rows = [row for row in read_rows(sorted(RESULTS.glob("*.jsonl"))) if not row.refused]
    rows = newest(rows, lambda row: conditions(row)[:-1])  # whatever the ratio is over
    shown = [
        row
        for row in rows
        if (row.streams, row.scope) == (1, "engine")
        and (
            row.runtime.endswith("-eager") or not row.runtime.startswith(("timm-", "torchvision-"))
        )
    ]
    found = read_measured(RESULTS)
    assert len(found) == len(shown) > 100
    assert sorted((r.model, r.precision, r.batch, r.threads, r.ms, r.p99_ms) for r in found) == (
        sorted((r.model, r.precision, r.batch, r.threads, r.p50_ms, r.p99_ms) for r in shown)
    )
    assert {row.device for row in found} <= set(list_devices())
    assert {row.model for row in found} <= set(list_models())


def test_a_measured_row_says_where_and_when(results):
    (row,) = read_measured(results(result_row()))
    assert row.kind == "measured" and row.date == "2026-11-23" and row.source == "board.jsonl"
    assert row.where.endswith(" cores") and row.runtime_version and row.note.startswith("protocol")
    assert (row.ms, row.p90_ms, row.p99_ms, row.images_per_s) == (4.0, 5.0, 6.0, 2000.0)
    assert (row.runtime, row.layout, row.resolution, row.threads) == ("openvino", "", 224, 2)


def test_pytorch_run_eagerly_counts_and_other_peers_do_not(results):
    peers = ("timm-eager", "timm-onnxruntime", "timm-openvino", "torchvision-eager")
    rows = read_measured(results(*(result_row(runtime=name, graph_form="train") for name in peers)))
    assert [(row.runtime, row.layout) for row in rows] == [("pytorch-eager", "nchw")] * 2
    assert rows[0].runtime_version.startswith("2.")


@pytest.mark.parametrize(
    "changes",
    [{"scope": "end-to-end"}, {"streams": 2}, {"refused": "disturbed"},
     {"resolution": [3, 224, 160]}],
    ids=["end to end", "several callers", "refused", "not square"],
)  # fmt: skip
def test_what_is_no_engines_latency_is_left_out(results, changes):
    assert read_measured(results(result_row(**changes))) == ()


def test_the_newest_of_the_same_conditions_counts(results):
    old = result_row(date="2026-11-01T00:00:00+00:00", p50_ms=9.0)
    other = result_row(threads=1)
    rows = read_measured(results(result_row(), old, other))
    assert sorted((row.ms, row.threads) for row in rows) == [(4.0, 1), (4.0, 2)]
    refused = result_row(date="2026-12-01T00:00:00+00:00", refused="disturbed", p50_ms=1.0)
    assert [row.ms for row in read_measured(results(result_row(), refused))] == [4.0]


def test_a_damaged_result_is_refused_with_its_line(results):
    for line in ('{"model": 1', '["a list"]\n', '{"model": "repvgg_a0"}\n'):
        with pytest.raises(
            CheckFailed, match=r"board.jsonl:2 is not a result row .* litezoo bench"
        ):
            read_measured(results(result_row(), line))


def test_results_of_the_working_folder_count_before_those_that_come_with_litezoo(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    packaged = read_measured()
    assert packaged == read_measured(RESULTS)
    mine = tmp_path / "benchmarks" / "results"
    mine.mkdir(parents=True)
    assert read_measured() == packaged  # a folder without rows counts as none
    lines = (RESULTS / "cpu.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (mine / "cpu.jsonl").write_text(lines[0], encoding="utf-8")
    assert len(read_measured()) == 1
    shutil.rmtree(mine)


# ----------------------------------------------------------------------- accuracy


def test_the_best_top1_is_of_a_checkpoint_that_can_be_loaded_under_the_licence():
    some = 0
    for model in list_models():
        free, any_licence = best_top1(model), best_top1(model, license=None)
        if any_licence is None:
            assert free is None
            continue
        some += 1
        weights = get_spec(model).get_weights(any_licence.weights)
        assert not weights.unreadable and weights.top1_percent == any_licence.percent
        assert weights.preprocess.input_size[1] == any_licence.resolution
        if free is not None:
            assert free.licence in FREE_LICENCES and free.percent <= any_licence.percent
            assert best_top1(model, license=free.licence).percent == free.percent
        assert best_top1(model, license="no such licence") is None
    assert some > 60


def test_a_network_without_loadable_weights_or_outside_the_zoo_has_no_top1():
    without = next(name for name in list_models() if not get_spec(name).is_pretrained)
    assert best_top1(without) is None
    assert best_top1("timm:resnext50_32x4d") is None
    with pytest.raises(UsageError, match="unknown model 'repvgg_a9'"):
        best_top1("repvgg_a9")


def test_a_checkpoint_of_other_classes_does_not_count(monkeypatch):
    spec = get_spec("repvgg_a0")
    other = dataclasses.replace(spec.weights[0], tag="in21k", num_classes=21841, top1_percent=99.0)
    more = dataclasses.replace(spec, weights=(other, *spec.weights))
    monkeypatch.setattr(evidence, "get_spec", lambda name: more)
    assert best_top1("repvgg_a0").percent < 99
    same = dataclasses.replace(spec, weights=(dataclasses.replace(other, num_classes=1000),))
    monkeypatch.setattr(evidence, "get_spec", lambda name: same)
    assert best_top1("repvgg_a0").percent == 99
