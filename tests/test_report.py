"""The report: one page that a browser opens without a network, and the README's pictures."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from test_train import litezoo

from litezoo.benchmarks import report_data
from litezoo.benchmarks.ceilings import Ceilings, Way, write_ceilings
from litezoo.benchmarks.disturbance import Conditions
from litezoo.benchmarks.draw_pictures import (
    PICTURES,
    draw_accuracy,
    draw_speed,
    pictures_are_fresh,
    write_pictures,
)
from litezoo.benchmarks.evidence import read_measured
from litezoo.benchmarks.gpu_counters import Achieved, GpuCounters, KernelProfile
from litezoo.benchmarks.gpu_demo import Truth, append_truth
from litezoo.benchmarks.guidelines import Guideline, VariantCost, append_guidelines
from litezoo.benchmarks.machine import Machine
from litezoo.benchmarks.measure import Measurement
from litezoo.benchmarks.profiling import profile
from litezoo.benchmarks.report import write_report
from litezoo.benchmarks.report_data import comparable_top1s, page_data, top1_of
from litezoo.benchmarks.report_profiles import read_profiles, save_profile
from litezoo.benchmarks.results import BEGIN, END, append_rows, read_rows
from litezoo.models.catalogue import get_spec
from litezoo.models.errors import CheckFailed, MissingError, UsageError

REPO = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
#: Devices of the shared page's picker.
PICKED = ("cpu", "t4", "snapdragon-855-cpu")
EVIL = "<script>window.ran=1</script><img src=x onerror='window.ran=1'>"

MACHINE = Machine(
    cpu="Some CPU", cores=2, isa=("avx2", "fma"), governor="performance", memory_gib=8.0,
    system="Linux x86_64", load_1min=0.5, versions={"python": "3.12.1", "openvino": "2025.1"},
)  # fmt: skip
ROW = Measurement(
    model="repvgg_a0", artifact_sha256="cd" * 32, weights="random", device="cpu",
    runtime="openvino", precision="fp32", graph_form="deploy", batch=1, resolution=(3, 224, 224),
    threads=2, p50_ms=8.125, p90_ms=8.5, p99_ms=9.75, images_per_s=123.1, ratio=2.5,
    ratio_to="repvgg_a0 timm-eager fp32 train", spread=0.01, runs=120, seconds=1.01,
    top1_percent=None, machine=MACHINE, protocol="interleaved-3", date="2026-01-02T03:04:05+00:00",
)  # fmt: skip


def row(**values):
    return dataclasses.replace(ROW, **values)


def some_rows():
    """Rows of three places with two or more of every condition that the page filters by."""
    rows = []
    for number, model in enumerate(("repvgg_a0", "repvgg_a1", "mobilenetv2_100"), 1):
        for place, (runtime, precision) in enumerate(
            (("timm-eager", "fp32"), ("openvino", "fp32"), ("openvino", "int8"), ("ncnn", "bf16"))
        ):
            for batch, threads in ((1, 1), (1, 2), (8, 2)):
                ms = round(9 * number * batch / (threads * (place + 1)), 3)
                rows.append(
                    row(
                        model=model, runtime=runtime, precision=precision, batch=batch,
                        threads=threads, p50_ms=ms, p99_ms=1.2 * ms, ratio=1.0 + place,
                        graph_form="train" if runtime == "timm-eager" else "deploy",
                        images_per_s=round(1e3 * batch / ms, 1),
                    )
                )  # fmt: skip
    other = dataclasses.replace(MACHINE, cpu="Another CPU")
    rows += [row(machine=other, p50_ms=5.0), row(machine=other, model="repvgg_a1", p50_ms=6.0)]
    gpu = dataclasses.replace(MACHINE, versions={"gpu": "Tesla T4", "tensorrt": "10.16"})
    for precision, ms in (("fp32", 1.5), ("fp16", 0.7)):
        rows.append(
            row(device="t4", runtime="tensorrt", precision=precision, threads=0, p50_ms=ms,
                machine=gpu)
        )  # fmt: skip
    conditions = Conditions(
        blocks=7, disturbed_blocks=1, reruns=2, foreign_share=0.01, steal_share=0.0,
        waited_share=0.0, clock_min_mhz=2400.0, clock_max_mhz=2500.0, temperature_max_c=None,
        throttle_events=None, why="foreign load 12 %",
    )  # fmt: skip
    rows += [
        row(streams=2, images_per_s=210.0, p50_ms=9.5),
        row(scope="end-to-end", p50_ms=11.0),
        row(model=EVIL, p50_ms=7.0),
        row(model="repvgg_a2", top1_percent=76.1, precision="int8", p50_ms=4.0, best_ms=3.9,
            ratio_low=2.3, ratio_high=2.7, harness_us=0.4, flops_percent=41.0, bytes_percent=12.0,
            conditions=conditions, steady=True),
    ]  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def small_profile(tmp_path_factory):
    """A profile of a small network under the t4's ceilings, as if of repvgg_a0."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 20]>
        net (float[1, 3, 16, 16] x) => (float[1, 8] y) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, conv)
            b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8> (a, depthwise)
            c = GlobalAveragePool (b)
            d = Flatten (c)
            y = MatMul (d, head)
        }""")
    for name, shape in {"conv": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "head": (8, 8)}.items():
        weight = np.ones(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    file = tmp_path_factory.mktemp("profile") / "net.onnx"
    onnx.save(model, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(file.parent)  # where no ceilings were measured
        found = profile(file, device="t4")
    return dataclasses.replace(found, model="repvgg_a0", resolution=(3, 224, 224))


def guideline(**values):
    variants = (
        VariantCost(name="wide", macs=10, ms=1.0, ratio=1.0, low=1.0, high=1.0),
        VariantCost(name="narrow", macs=10, ms=1.5, ratio=1.5, low=1.4, high=1.6),
    )
    base = {
        "rule": "G1", "claim": "equal widths are fast", "source": "a paper", "device": "cpu",
        "runtime": "openvino", "precision": "fp32", "batch": 1, "threads": 1, "quick": False,
        "slow": "narrow", "fast": "wide", "per": "time", "ratio": 1.5, "low": 1.4, "high": 1.6,
        "threshold": 1.0, "band": 0.06, "control": 0.02, "verdict": "holds", "close": False,
        "finding": "narrow costs 1.5 times wide", "variants": variants, "rounds": 9,
        "machine": MACHINE, "protocol": "interleaved-3", "date": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return Guideline(**{**base, **values})


def truth(**values):
    base = {
        "case": "one-block", "what": "one block", "device": "h200", "precision": "fp32",
        "images_per_run": 0, "runs": 100,
        "counters": GpuCounters(gpu="NVIDIA H200", uuid="GPU-1", driver="580", seconds=3.0,
                                samples=30, gpu_util_percent=100.0, sm_active_percent=0.8),
        "achieved": Achieved(images_per_s=0.0, tera_flops_per_s=0.1, flops_percent=0.2,
                             moved_gb_per_s=None, moved_percent=None, dram_gb_per_s=None,
                             energy_mj_per_image=None),
        "kernels": KernelProfile(runs=1, kernels_per_run=1.0, kernel_us_per_run=9.0,
                                 busy_percent=99.0, sm_reach_percent=0.8, shares={}, longest={}),
        "sentences": ("GPU-Util reads 100 %, but the SMs were active 0.8 %",),
        "machine": MACHINE, "protocol": "gpu-truth-1", "date": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return Truth(**{**base, **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_profile):
    """A results folder with something of everything beside rows."""
    folder = tmp_path_factory.mktemp("results")
    way = Way(what="gemm", backend="torch", kind="gemm", dtype="fp32", value=0.2,
              unit="tera-ops/s", spread=0.01)  # fmt: skip
    write_ceilings(
        Ceilings(device="cpu", machine=MACHINE, threads=2, peak_tera_ops_per_s={"fp32": 0.2},
                 memory_gb_per_s=40.0, cache_gb_per_s=180.0, launch_us=0.1,
                 layer_us={"openvino fp32": 1.1}, how=(way,), not_measured={},
                 date="2026-01-02T03:04:05+00:00", protocol="interleaved-3"),
        folder=folder / "ceilings",
    )  # fmt: skip
    append_guidelines(
        [
            guideline(),
            guideline(rule="G2", verdict="does not hold", ratio=0.8, low=0.7, high=0.9),
            guideline(rule="G3", verdict="no difference", ratio=1.0, low=0.98, high=1.02),
            guideline(device="t4", runtime="tensorrt"),
        ],
        folder=folder / "guidelines",
    )
    append_truth([truth(), truth(case="gemm")], folder / "gpu")
    save_profile(small_profile, folder=folder / "profiles")
    append_rows(
        [ROW, row(model="repvgg_a1", p50_ms=12.0), row(model="resnet18", p50_ms=9.0)], folder
    )
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, folder):
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report(some_rows(), file, folder=folder, devices=PICKED) == file
    return file


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The page of rows of one device, with nothing beside them."""
    where = tmp_path_factory.mktemp("bare")
    return write_report([ROW, row(runtime="ncnn")], where / "report.html", folder=where, devices=())


# ------------------------------------------------------------------------------ what is shown


def test_a_row_without_an_accuracy_of_its_own_is_drawn_at_the_published_one():
    weights = get_spec("repvgg_a0").get_weights()
    found = top1_of(ROW)
    assert (found.percent, found.is_own) == (weights.top1_percent, True)
    assert weights.tag in found.source and found.source.endswith("not measured here")


def test_a_reduced_precision_is_not_said_to_have_the_published_accuracy():
    assert not top1_of(row(precision="int8")).is_own
    own = top1_of(row(precision="int8", top1_percent=71.5))
    assert (own.percent, own.is_own, own.source) == (71.5, True, "measured on this engine")


def test_accuracies_of_another_data_set_are_not_drawn_beside_imagenets():
    digits = row(runtime="ncnn", top1_percent=97.5, top1_data="digits (val), 10 classes")
    own = row(runtime="tvm", top1_percent=71.5, top1_data="/data/in1k (val), 1000 classes")
    data, (first, second, third) = comparable_top1s([ROW, digits, own])
    assert (data, first, second) == ("ImageNet", top1_of(ROW), None)
    assert third.source == "measured on this engine, /data/in1k (val), 1000 classes"
    data, found = comparable_top1s([digits, digits, ROW])
    assert data == "digits (val), 10 classes"
    assert [one and one.percent for one in found] == [97.5, 97.5, None]


@pytest.mark.parametrize("values", [{"model": "elsewhere"}, {"resolution": (3, 160, 160)}],
                         ids=["unknown network", "another resolution"])  # fmt: skip
def test_no_accuracy_is_made_up(values):
    assert top1_of(row(**values)) is None


def test_a_papers_accuracy_counts_where_no_weights_state_one(monkeypatch):
    spec = dataclasses.replace(
        get_spec("repvgg_a0"), weights=(), paper_top1_percent=72.41, paper_source="Table 4"
    )
    monkeypatch.setattr(report_data, "_spec", lambda name: spec)
    assert top1_of(ROW) == report_data.Top1(
        percent=72.41, is_own=True, source="published (Table 4), not measured here"
    )


def test_refused_and_outdated_rows_are_not_shown(tmp_path):
    newer = row(p50_ms=8.0, date="2026-01-03T00:00:00+00:00")
    refused = row(runtime="ncnn", refused="its spread is too wide")
    data = page_data([ROW, newer, refused], folder=tmp_path, devices=())
    places = {name: place for place, name in enumerate(data["columns"])}
    assert [line[places["id"]] for line in data["rows"]] == [newer.id]


def test_devices_are_told_apart_by_their_chip_where_a_name_has_several(tmp_path):
    data = page_data(some_rows(), folder=tmp_path, devices=())
    place = data["columns"].index("place")
    assert {line[place] for line in data["rows"]} == {"cpu (Some CPU)", "cpu (Another CPU)", "t4"}


def test_all_that_is_measured_is_on_the_page(folder):
    data = page_data(some_rows(), folder=folder, devices=())
    assert [one["device"] for one in data["ceilings"]] == ["cpu"]
    assert [one["rule"] for one in data["guidelines"]] == ["G1", "G2", "G3", "G1"]
    assert [one["case"] for one in data["truths"]] == ["one-block", "gemm"]
    assert [one["name"] for one in data["profiles"]] == ["repvgg_a0.t4.fp32.1x3x224x224"]
    assert len(data["profiles"][0]["layers"]) == 4


def test_of_gpu_truth_the_newest_counts(tmp_path):
    newer = truth(what="again", date="2026-01-03T00:00:00+00:00")
    append_truth([newer, truth()], tmp_path / "gpu")
    [one] = page_data([ROW], folder=tmp_path, devices=())["truths"]
    assert one["what"] == "again"


# ----------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "@@" not in re.sub(
        r"(?s)<script>.*?</script>", "", text
    )
    assert not re.search(r"<script[^>]*\ssrc=", text)
    assert not re.search(r"<link[^>]*\shref=(?!\"data:)", text)
    assert "@import" not in text.partition("</style>")[0]
    assert "default-src 'none'" in text


def test_a_thousand_rows_fit_in_six_megabytes(tmp_path, folder, small_profile):
    rows = [
        row(model=f"{model}_{number}", runtime=runtime, machine=MACHINE, conditions=base.conditions)
        for base in some_rows()[-1:]
        for model in ("mobilenetv4_conv_small", "cspresnext50")
        for runtime in ("openvino", "onnxruntime", "ncnn", "timm-eager")
        for number in range(125)
    ]
    deep = dataclasses.replace(small_profile, layers=small_profile.layers * 25,
                               times=small_profile.times * 25)  # fmt: skip
    for number in range(14):
        save_profile(dataclasses.replace(deep, model=f"net{number}"), folder=tmp_path / "profiles")
    file = write_report(rows, tmp_path / "report.html", folder=tmp_path)
    assert len(page_data(rows, folder=tmp_path, devices=())["rows"]) == 1000
    assert file.stat().st_size < 6e6


def test_a_name_in_the_results_ends_no_script(page):
    text = page.read_text()
    assert EVIL not in text and "</script><img" not in text
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert EVIL in {line[1] for line in json.loads(data)["rows"]}


def test_the_same_rows_make_the_same_page(page, folder, tmp_path):
    again = write_report(some_rows(), tmp_path / "again.html", folder=folder, devices=PICKED)
    assert again.read_bytes() == page.read_bytes()


def test_nothing_to_show_says_what_to_type(tmp_path):
    for rows in ([], [row(refused="its spread is too wide")]):
        with pytest.raises(UsageError, match="no results to show; measure first: litezoo bench"):
            write_report(rows, tmp_path / "report.html", folder=tmp_path, devices=())
    assert not list(tmp_path.iterdir())


def test_without_plotly_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(
        MissingError, match=r"the report needs plotly: pip install 'litezoo\[report\]'"
    ):
        write_report([ROW], tmp_path / "report.html", folder=tmp_path, devices=())


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    file = tmp_path / "no" / "report.html"
    with pytest.raises(UsageError, match=r"report\.html cannot be written \(No such file"):
        write_report([ROW], file, folder=tmp_path, devices=())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ceilings/cpu.json", r"cpu\.json holds no ceilings"),
        ("guidelines/cpu.jsonl", r"cpu\.jsonl:1 is not a guideline row"),
        ("gpu/h200.jsonl", r"h200\.jsonl:1 is not a row of GPU truth"),
        ("profiles/x.cpu.fp32.1x3x8x8.json", r"8x8\.json holds no profile"),
    ],
)
def test_a_damaged_file_is_named(name, said, tmp_path):
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text('{"schema": 1}\n')
    with pytest.raises(CheckFailed, match=said):
        write_report([ROW], tmp_path / "report.html", folder=tmp_path, devices=())
    assert not (tmp_path / "report.html").exists()


# ----------------------------------------------------------------------------- kept profiles


def test_a_kept_profile_is_what_was_profiled(small_profile, tmp_path):
    file = save_profile(small_profile, folder=tmp_path)
    assert file.name == "repvgg_a0.t4.fp32.1x3x224x224.json"
    [kept] = read_profiles(tmp_path)
    assert (kept.macs, kept.params) == (small_profile.macs, small_profile.params)
    assert sum(layer.macs for layer in kept.layers) == kept.macs
    assert sum(layer.us for layer in kept.layers) == pytest.approx(1e3 * small_profile.ms, rel=0.01)
    assert [layer.kind for layer in kept.layers] == [layer.kind for layer in small_profile.layers]
    assert kept.peak_tera_ops_per_s == small_profile.roof.peak_tera_ops_per_s


def test_a_kept_profile_takes_the_place_of_the_one_before(small_profile, tmp_path):
    save_profile(small_profile, folder=tmp_path)
    save_profile(dataclasses.replace(small_profile, note="again"), folder=tmp_path)
    save_profile(dataclasses.replace(small_profile, batch=8), folder=tmp_path)
    assert [kept.note == "again" for kept in read_profiles(tmp_path)] == [True, False]


def test_a_profile_without_times_is_not_kept(small_profile, tmp_path):
    with pytest.raises(MissingError, match=r"kept with a device's times; name one: --device cpu"):
        save_profile(dataclasses.replace(small_profile, device=None), folder=tmp_path)
    without = dataclasses.replace(small_profile, times=(), note="no times: x is not known")
    with pytest.raises(MissingError, match="no times: x is not known"):
        save_profile(without, folder=tmp_path)
    assert read_profiles(tmp_path) == []


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"kind": "conv"', '"kind": "magic"', 1),
    lambda text: text.replace('"schema": 1', '"schema": 7'),
    lambda text: text.replace('"macs"', '"mac"', 1),
], ids=["half", "a kind that is none", "another schema", "a field too few"])  # fmt: skip
def test_a_damaged_profile_is_named(damage, small_profile, tmp_path):
    file = save_profile(small_profile, folder=tmp_path)
    file.write_text(damage(file.read_text()))
    with pytest.raises(CheckFailed, match=r"224x224\.json holds no profile \(.+make it again"):
        read_profiles(tmp_path)


# ------------------------------------------------------------------------ the README's pictures


def texts(svg):
    nodes = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [node.text for node in nodes]


def test_the_pictures_are_written_and_compared_byte_for_byte(tmp_path):
    rows = some_rows()
    folder = tmp_path / "pictures"
    assert not pictures_are_fresh(rows, folder)
    assert [file.name for file in write_pictures(rows, folder)] == list(PICTURES)
    assert pictures_are_fresh(rows, folder)
    before = [file.read_bytes() for file in folder.iterdir()]
    write_pictures(rows, folder)
    assert [file.read_bytes() for file in folder.iterdir()] == before
    faster = [dataclasses.replace(one, ratio=2 * one.ratio) for one in rows]
    assert not pictures_are_fresh(faster, folder)


def test_the_speed_picture_has_the_best_engine_of_each_network_and_precision():
    rows = [
        row(runtime="timm-eager", ratio=1.0, graph_form="train"),
        ROW,
        row(runtime="ncnn", ratio=3.5),
        row(precision="int8", ratio=7.0),
        row(runtime="timm-onnxruntime", ratio=9.0),  # a peer is no engine of ours
        row(model="repvgg_a1", ratio_to="repvgg_a1 ncnn fp32 deploy", ratio=20.0),  # to no peer
        row(batch=8, ratio=50.0),
        row(refused="too wide a spread", precision="bf16", ratio=60.0),
    ]
    svg = draw_speed(rows)
    assert [text for text in texts(svg) if re.match(r"\d+\.\dx ", text)] == [
        "3.5x ncnn",
        "7.0x openvino",
    ]
    assert texts(svg)[1] == "cpu (Some CPU), batch 1, 2 threads"
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)


def test_the_accuracy_pictures_front_leaves_out_what_was_not_measured():
    fast = row(model="mobilenetv2_100", p50_ms=2.0)
    hollow = row(precision="int8", p50_ms=1.0)
    alone, with_hollow = draw_accuracy([ROW, fast]), draw_accuracy([ROW, fast, hollow])
    assert with_hollow.count('fill="none" stroke="#d55e00"') == 1
    path = r'<path d="(M[^"]*)" fill="none" stroke="#767676" stroke-width'
    fronts = [re.findall(path, svg)[0] for svg in (alone, with_hollow)]
    assert fronts[0].count("H") == fronts[1].count("H") == 0  # mobilenetv2 alone, before and after
    own = draw_accuracy([ROW, fast, row(precision="int8", p50_ms=1.0, top1_percent=79.9)])
    assert re.findall(path, own)[0].count("H") == 0  # it is the fastest and the best


def test_names_beside_the_accuracy_picture_do_not_lie_on_one_another():
    names = ("repvgg_a0", "repvgg_a1", "repvgg_a2", "mobilenetv2_100", "resnet18", "resnet50")
    svg = draw_accuracy([row(model=name, p50_ms=5.0 + i) for i, name in enumerate(names)])
    places = [float(node.get("y")) for node in ElementTree.fromstring(svg).iter()
              if node.tag.endswith("text") and node.text in names]  # fmt: skip
    assert len(places) == 6
    assert all(b - a >= 14.9 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))


def test_pictures_are_well_formed_whatever_a_network_is_called():
    for svg in (draw_speed([row(model=EVIL)]), draw_accuracy([row(model=EVIL, top1_percent=70.0)])):
        assert EVIL in texts(svg) and "<script" not in svg and "<img" not in svg
    assert "No row has a known top-1" in draw_accuracy([row(model="elsewhere")])
    assert "No row has a ratio" in draw_speed([row(runtime="timm-eager")])


def test_pictures_of_nothing_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no results to show"):
        write_pictures([], tmp_path)


# ------------------------------------------------------------------------- the command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("litezoo.benchmarks.report_picker.list_devices", lambda: ["t4"])
    return tmp_path


def test_the_report_is_written_by_its_command(here, capsys):
    assert litezoo("report") == 4
    assert "no results in benchmarks/results yet; measure first" in capsys.readouterr().err
    append_rows([ROW], Path("benchmarks/results"))
    append_guidelines([guideline(claim="this is beside the rows")])
    assert litezoo("report", "--out", "page.html", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"written": "page.html", "rows": 1}
    text = (here / "page.html").read_text()
    assert "<h1>litezoo results</h1>" in text and "this is beside the rows" in text


def test_what_lies_beside_the_named_results_is_on_the_page(here):
    [file] = append_rows([ROW], here / "elsewhere")
    append_guidelines([guideline(claim="far away")], folder=here / "elsewhere" / "guidelines")
    assert litezoo("report", file) == 0
    assert "far away" in (here / "report.html").read_text()


def test_the_readmes_pictures_are_written_and_checked_with_its_table(here, capsys):
    [file] = append_rows([ROW], here / "results")
    readme = here / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert litezoo("report", file, "--readme", readme) == 0
    assert {one.name for one in (here / "docs" / "pictures").iterdir()} == set(PICTURES)
    assert litezoo("report", file, "--readme", readme, "--check") == 0
    (here / "docs" / "pictures" / PICTURES[0]).write_text("<svg/>")
    capsys.readouterr()
    assert litezoo("report", file, "--readme", readme, "--check") == 3
    assert capsys.readouterr().err == (
        f"litezoo: the pictures in {here}/docs/pictures are not up to date; run: make readme\n"
    )


def test_a_profile_is_kept_for_the_report(here, small_profile, monkeypatch, capsys):
    monkeypatch.setattr("litezoo.benchmarks.profiling.profile", lambda *_, **__: small_profile)
    assert litezoo("profile", "repvgg_a0", "--device", "t4", "--save") == 0
    shown = capsys.readouterr().out
    assert "kept for the report: benchmarks/results/profiles/repvgg_a0.t4.fp32" in shown
    assert [kept.model for kept in read_profiles()] == ["repvgg_a0"]
    assert litezoo("profile", "repvgg_a0", "--device", "t4") == 0
    assert "kept for" not in capsys.readouterr().out


# ----------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def wrong():
    """What went wrong in the pages that are open, or was asked of a network."""
    return []


@pytest.fixture(scope="module")
def open_tab(browser, wrong):
    """Open a page in a window of its own."""

    def open_tab(file, hash="", *, width=1200, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        tab = context.new_page()
        tab.set_default_timeout(5000)
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: wrong.append(request.url)
               if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
        tab.goto(file.as_uri() + hash)
        return tab

    return open_tab


@pytest.fixture(autouse=True)
def _nothing_goes_wrong(wrong):
    yield
    assert wrong == []


@pytest.fixture(scope="module")
def one_tab(open_tab, page):
    """The page, opened once: to load it takes longer than all that is tried in it."""
    return open_tab(page)


def go(tab, hash):
    """Follow an address in the page at once, as its listener does after a moment."""
    tab.evaluate(
        """hash => { history.replaceState(null, "", location.pathname + hash);
                     dispatchEvent(new HashChangeEvent("hashchange")); }""",
        hash,
    )
    return tab


@pytest.fixture
def tab(one_tab):
    """The page as it opens, on a light desk."""
    one_tab.emulate_media(color_scheme="light")
    return go(one_tab, "")


def hash_of(tab):
    return "#" + tab.url.partition("#")[2]


#: Each chart's section, and how many points it has.
DRAWN = """() => Object.fromEntries([...document.querySelectorAll(".panels")].map(box => [
    box.id || box.closest("section").id,
    [...box.querySelectorAll(".chart")].map(chart => chart.data
        .filter(trace => trace.customdata || trace.hovertext)
        .reduce((sum, trace) => sum + trace.x.length, 0))]))"""


def listed(tab):
    return tab.locator("#rows tbody tr").count()


def test_every_chart_has_points_and_the_table_every_row(tab):
    go(tab, "#device=all&batch=all&threads=all&streams=all&scope=all")
    drawn = tab.evaluate(DRAWN)
    assert set(drawn) == {"pick", "accuracy", "devices", "throughput", "roofline", "layers",
                          "rules", "gpu"}  # fmt: skip
    assert all(charts and all(charts) for charts in drawn.values()), drawn
    assert listed(tab) == len(some_rows())
    assert sum(drawn["rules"]) == 3 and sum(drawn["layers"]) == 4
    assert tab.locator("#notice").is_hidden()
    assert tab.evaluate("window.ran") is None  # a name with tags in it
    assert tab.locator("#rows tbody").get_by_text(EVIL, exact=True).count() == 1


def test_no_filled_point_is_faster_and_as_accurate_as_one_of_the_front(tab):
    go(tab, "#device=cpu%20(Some%20CPU)&batch=1&threads=2&streams=1")
    traces = tab.evaluate("document.querySelector('#accuracy .chart').data")
    points = next(trace for trace in traces if "customdata" in trace)
    places = list(zip(points["x"], points["y"], points["marker"]["symbol"], strict=True))
    filled = {(x, y) for x, y, symbol in places if not symbol.endswith("-open")}
    everything = {(x, y) for x, y, _ in places}
    lines = {trace["line"]["dash"]: trace for trace in traces if trace["mode"] == "lines"}
    assert filled < everything and set(lines) == {"solid", "dot"}
    for dash, candidates in (("solid", filled), ("dot", everything)):
        front = set(zip(lines[dash]["x"], lines[dash]["y"], strict=True))
        better = {
            (x, y)
            for x, y in candidates
            if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in candidates)
        }
        assert front == better


def test_the_page_opens_with_single_calls_of_most_rows(tab):
    assert tab.locator("#chosen").inner_text() == (
        "cpu (Some CPU), batch 1, 2 threads, 1 stream, engine alone: 14 of 44 rows"
    )
    assert listed(tab) == 14
    drawn = tab.evaluate(DRAWN)
    assert drawn["accuracy"] == [13]  # but for the one of no known accuracy
    assert drawn["devices"] == [14, 2, 2]  # every device, whatever is chosen


@pytest.mark.parametrize(
    ("name", "value", "rows"),
    [
        ("device", "t4", 0), ("device", "all", 16), ("batch", "8", 12), ("batch", "all", 26),
        ("threads", "1", 12), ("threads", "all", 26), ("streams", "2", 1), ("scope", "all", 15),
    ],
)  # fmt: skip
def test_a_select_changes_what_is_drawn_and_listed(name, value, rows, tab):
    before = tab.evaluate(DRAWN)
    tab.select_option(f"#filter-{name}", value)
    assert listed(tab) == rows
    assert f"{name}={value}" in tab.url
    drawn = tab.evaluate(DRAWN)
    assert sum(drawn["accuracy"]) in (rows, rows - 1)
    assert drawn != before
    assert tab.locator("#accuracy .none").count() == (rows == 0)
    shared = hash_of(tab)
    tab.click("#reset")
    assert tab.evaluate(DRAWN) == before
    go(tab, shared)
    assert tab.evaluate(DRAWN) == drawn and listed(tab) == rows


@pytest.mark.parametrize(
    ("box", "value", "rows"), [("runtimes", "openvino", 6), ("precisions", "int8", 10)]
)
def test_a_box_takes_its_rows_away_and_brings_them_back(box, value, rows, tab):
    before = tab.evaluate(DRAWN)
    tab.uncheck(f"#{box} input[value={value}]")
    assert listed(tab) == rows
    assert tab.evaluate(DRAWN)["accuracy"] != before["accuracy"]
    assert tab.evaluate(DRAWN)["throughput"] != before["throughput"]
    shared = hash_of(tab)
    tab.check(f"#{box} input[value={value}]")
    assert tab.evaluate(DRAWN) == before
    assert listed(go(tab, shared)) == rows
    assert not tab.is_checked(f"#{box} input[value={value}]")


def test_words_choose_rows(tab):
    tab.fill("#find", "mobilenet INT8")
    assert listed(tab) == 1 and sum(tab.evaluate(DRAWN)["accuracy"]) == 1
    assert "find=mobilenet%20INT8" in tab.url
    tab.fill("#find", "nothing has this")
    assert listed(tab) == 0
    assert tab.locator("#accuracy .none").inner_text() == (
        "No row under these filters has a known top-1."
    )
    tab.fill("#find", "")
    assert listed(tab) == 14


def test_the_table_is_sorted_by_any_column_both_ways(tab):

    def column(field):
        place = tab.evaluate(
            """field => [...document.querySelectorAll("#rows thead th")]
                .findIndex(cell => cell.dataset.field === field)""",
            field,
        )
        return tab.locator(f"#rows tbody tr > :nth-child({place + 1})").all_inner_texts()

    assert column("p50_ms") == sorted(column("p50_ms"), key=float)
    tab.click("#rows th[data-field=images_per_s] button")
    up = [float(text) for text in column("images_per_s")]
    assert up == sorted(up)
    assert tab.get_attribute("#rows th[data-field=images_per_s]", "aria-sort") == "ascending"
    tab.click("#rows th[data-field=images_per_s] button")
    down = column("images_per_s")
    assert [float(text) for text in down] == sorted(map(float, down), reverse=True)
    assert tab.get_attribute("#rows th[data-field=images_per_s]", "aria-sort") == "descending"
    assert column("model") != sorted(column("model"))
    tab.click("#rows th[data-field=model] button")
    assert column("model") == sorted(column("model"), key=str.casefold)
    assert tab.get_attribute("#rows th[data-field=images_per_s]", "aria-sort") == "none"


def test_an_address_opens_its_row_with_all_conditions(tab):
    chosen = some_rows()[-1]
    go(tab, f"#row-{chosen.id}")
    assert tab.locator("dialog#row").is_visible()
    assert tab.locator("#row-title").inner_text() == "repvgg_a2 openvino int8"
    assert tab.locator("#row code").inner_text() == f"litezoo bench --repro {chosen.id}"
    body = tab.locator("#row-body").inner_text()
    for words in (
        "4, 8.5, 9.75 ms", "2.30 to 2.70", "76.1 %, measured on this engine",
        "7, 1 disturbed, 2 measured again (foreign load 12 %)", "2,400 to 2,500 MHz",
        "41.0 % of peak", chosen.artifact_sha256, "Some CPU", "avx2 fma", "openvino 2025.1",
        "interleaved-3", chosen.date,
    ):  # fmt: skip
        assert words in body, words
    tab.keyboard.press("Escape")
    assert tab.locator("dialog#row").is_hidden() and "row-" not in tab.url


#: Where a point of the first chart is on the screen, and whose it is.
POINT = """() => {
    const chart = document.querySelector("#accuracy .chart");
    chart.scrollIntoView({block: "center", behavior: "instant"});
    const trace = chart.data.find(trace => trace.customdata);
    const {xaxis, yaxis, _size} = chart._fullLayout, box = chart.getBoundingClientRect();
    return {x: box.x + _size.l + xaxis.d2p(trace.x[0]), y: box.y + _size.t + yaxis.d2p(trace.y[0]),
            id: trace.customdata[0]};
}"""


def test_a_point_opens_its_row(tab):
    at = tab.evaluate(POINT)
    tab.mouse.move(at["x"] - 30, at["y"])
    tab.mouse.move(at["x"], at["y"], steps=4)
    tab.mouse.click(at["x"], at["y"])
    tab.wait_for_selector("dialog#row[open]")
    assert f"#row-{at['id']}&device=" in tab.url
    assert tab.locator("#row code").inner_text() == f"litezoo bench --repro {at['id']}"
    tab.click("dialog .close")
    assert tab.locator("dialog#row").is_hidden()
    assert "row-" not in tab.url and "device=" in tab.url


def test_a_section_is_gone_to_by_its_link_and_stands_below_the_filters(tab):
    before = hash_of(tab)
    tab.get_by_role("link", name="Rules", exact=True).click()
    tab.wait_for_function("""() => {
        const [bar, head] = ["#filters", "#rules h2"].map(name => document.querySelector(name));
        const [above, below] = [bar, head].map(node => node.getBoundingClientRect());
        return below.top >= above.bottom && below.top < innerHeight / 2;
    }""")
    assert tab.evaluate("document.activeElement.innerText") == "Design rules, measured"
    assert hash_of(tab) == before  # what is chosen stays in the address
    tab.evaluate("scrollTo({top: 0, behavior: 'instant'})")


def test_a_keyboard_is_enough(tab):
    link = tab.locator("#rows tbody a").first
    link.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("dialog#row[open]")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("dialog#row:not([open])", state="hidden")
    tab.locator("#runtimes input[value=openvino]").focus()
    tab.keyboard.press("Space")
    assert listed(tab) == 6
    tab.locator("#rows th[data-field=runtime] button").focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.closest('th').dataset.field") == "runtime"


def test_what_an_address_names_and_the_page_has_not_is_said(tab):
    go(tab, "#batch=7&device=t4&row-0123456789&runtime=magic,ncnn&constructor=1")
    assert tab.locator("#notice").inner_text() == (
        "The address names what this page has not: batch 7, row 0123456789, runtime magic, "
        "constructor."
    )
    assert "t4" in tab.locator("#chosen").inner_text()
    assert tab.locator("dialog#row").is_hidden()


def test_a_changed_address_is_followed(tab):
    tab.evaluate("location.hash = '#device=t4&threads=0'")
    tab.wait_for_function("() => document.querySelectorAll('#rows tbody tr').length === 2")
    tab.evaluate(f"location.hash = '#row-{some_rows()[0].id}'")
    tab.wait_for_selector("dialog#row[open]")


def test_dark_and_light_follow_the_system_until_one_is_chosen(tab):
    def paper(tab):
        return tab.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = "rgb(255, 255, 255)", "rgb(21, 23, 26)"
    assert paper(tab) == light
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_selector("html[data-theme=dark]")
    assert paper(tab) == dark
    tab.emulate_media(color_scheme="light")
    tab.wait_for_selector("html[data-theme=light]")
    words = tab.evaluate("document.querySelector('#accuracy .chart').layout.font.color")
    tab.click("#theme")
    assert paper(tab) == dark and "theme=dark" in tab.url
    assert tab.get_attribute("#theme", "aria-pressed") == "true"
    assert tab.evaluate("document.querySelector('#accuracy .chart').layout.font.color") != words
    shared = hash_of(tab)
    tab.click("#theme")
    assert paper(tab) == light
    assert paper(go(tab, shared)) == dark


def luminance(color):
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_every_colour_stands_out_on_both_papers(tab):
    go(tab, "#device=all&batch=all&threads=all")
    marks = tab.evaluate("""() => [...document.querySelectorAll(".chart")]
        .filter(chart => !chart.closest("#network")).flatMap(chart => chart.data)
        .flatMap(trace => trace.marker?.color ?? [])""")
    assert len(set(marks)) >= 6
    for color in set(marks):
        for paper in ("#ffffff", "#15171a"):
            a, b = sorted((luminance(color), luminance(paper)))
            assert (b + 0.05) / (a + 0.05) >= 2.9, (color, paper)


def test_every_control_has_a_name(tab):
    nameless = tab.evaluate("""() => [...document.querySelectorAll("button, select, input, a")]
        .filter(node => node.checkVisibility() && !node.innerText?.trim()
            && !node.getAttribute("aria-label") && !node.labels?.[0]?.innerText.trim())
        .map(node => node.outerHTML)""")
    assert nameless == []
    units = tab.evaluate("""() => [...document.querySelectorAll(".chart")].flatMap(
        ({layout}) => [layout.xaxis, layout.yaxis].filter(axis => axis.type !== "category")
            .map(axis => axis.title.text))""")
    assert len(units) > 10 and all(units)


def test_a_network_is_chosen_for_its_drawings(tab):
    assert tab.locator("#roofline figcaption").inner_text() == (
        "repvgg_a0 (as it is), t4, fp32, batch 1, 3x224x224"
    )
    said = tab.locator("#roofline-caption").inner_text()
    assert "at least; the fastest row measured is 1.50 ms (tensorrt)" in said
    tab.select_option("#choose-net", "repvgg_a1")
    assert tab.locator("#roofline .none").inner_text() == (
        "No profile of repvgg_a1 is kept. Add one: litezoo profile repvgg_a1 --device cpu --save, "
        "then litezoo report."
    )
    assert "net=repvgg_a1" in tab.url
    assert "repvgg_a1, cpu" in tab.locator("#throughput figcaption").inner_text()


# ------------------------------------------------------------------------ the page's picker

#: What is asked on the page.
QUESTIONS = (
    {"device": "t4"},
    {"device": "t4", "latency": "2"},
    {"device": "t4", "latency": "2", "licence": "any", "avoid": "squeeze-excite"},
    {"device": "t4", "throughput": "500", "params": "12", "top": "3"},
    {"device": "t4", "top1": "77", "avoid": "channel-shuffle,depthwise-conv"},
    {"device": "snapdragon-855-cpu", "latency": "30", "side": "224", "memory": "40"},
    {"device": "snapdragon-855-cpu", "top1": "75", "task": "backbone", "licence": "MIT"},
    {"device": "cpu", "latency": "10", "percentile": "99"},
)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda asked: " ".join(asked.values()))
def test_the_page_picks_as_the_command_that_it_shows(question, tab, folder, monkeypatch, capsys):
    monkeypatch.setattr(
        "litezoo.benchmarks.backbones.read_measured", lambda _: read_measured(folder)
    )
    go(tab, "#" + "&".join(f"pick-{name}={value}" for name, value in question.items()))
    assert tab.locator("#notice").is_hidden()
    command = tab.locator("#pick-command").inner_text()
    assert litezoo(*command.split()[1:], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    shown = tab.evaluate("""() => [...document.querySelectorAll("#pick tbody tr")].map(
        line => [...line.children].map(cell => cell.innerText))""")
    rows, best = found["front"], found["recommended"]
    rows = sorted(rows + [best] * (best not in [None, *rows]), key=lambda one: -one["top1_percent"])
    assert [[line[0], line[3]] for line in shown] == [[r["model"], r["weights"]] for r in rows]
    for line, one in zip(shown, rows, strict=True):
        assert float(line[1].replace(",", "")) == pytest.approx(one["ms"], rel=0.006)
        assert float(line[9].replace(",", "")) == pytest.approx(one["memory_mib"], rel=0.006)
        assert line[4].startswith(one["basis"])
        assert one["low_ms"] is not None or line[4] == f"{one['basis']} ({one['evidence']})"
        assert ("may miss" in line[5]) == one["may_miss"]
        assert ("picked" in line[5]) == (one == best)
    marked = tab.locator("#pick tbody tr.open th").all_inner_texts()
    assert marked == ([best["model"]] if best else [])
    said = tab.locator("#picked").inner_text()
    assert said.startswith(f"{best['model']}: " if best else "No budget is given")


def test_the_pickers_controls_change_the_answer_and_the_address_keeps_it(tab):
    tab.select_option("#pick-device", "t4")
    whole = tab.locator("#pick tbody tr").all_inner_texts()
    tab.fill("#pick-latency", "2")
    assert tab.locator("#pick tbody tr").all_inner_texts() != whole
    tab.evaluate("document.querySelector('#avoiding').open = true")
    tab.check("#avoid input[value=depthwise-conv]")
    within = tab.locator("#pick tbody tr").all_inner_texts()
    assert "pick-latency=2" in tab.url and "pick-avoid=depthwise-conv" in tab.url
    assert (
        tab.locator("#pick-command")
        .inner_text()
        .endswith("--batch 1 --latency-ms 2 --avoid-op depthwise-conv")
    )
    shared = hash_of(tab)
    tab.fill("#pick-throughput", "900")  # another budget in place of the first
    assert tab.input_value("#pick-latency") == ""
    tab.click("#pick-reset")
    assert "pick-" not in tab.url and tab.input_value("#pick-throughput") == ""
    go(tab, shared)
    assert tab.locator("#pick tbody tr").all_inner_texts() == within
    assert tab.is_checked("#avoid input[value=depthwise-conv]")


def test_an_impossible_budget_names_the_fastest_on_the_page(tab):
    go(tab, "#pick-device=t4&pick-latency=0.0001")
    said = tab.locator("#picked").inner_text()
    assert said.startswith(
        "No network takes at most 0.0001 ms; the fastest under these constraints"
    )
    assert tab.locator("#pick tbody tr").count() == 0
    assert tab.locator("#pick .none").inner_text() == (
        "Nothing is within the budget and the constraints."
    )
    go(tab, "#pick-device=t4&pick-params=0.001")
    assert tab.locator("#picked").inner_text().startswith("No network with public weights meets")


def test_what_the_picker_cannot_be_asked_is_said(tab):
    go(tab, "#pick-device=t44&pick-latency=fast&pick-avoid=magic&pick-colour=red")
    assert tab.locator("#notice").inner_text() == (
        "The address names what this page has not: pick-device t44, pick-latency fast, "
        "pick-avoid magic, pick-colour red."
    )


def test_a_page_without_anything_to_pick_from_has_no_picker(bare, open_tab):
    tab = open_tab(bare)
    assert tab.locator("#pick").is_hidden()
    assert tab.get_by_role("link", name="Pick", exact=True).count() == 0


def test_a_device_without_evidence_is_not_on_the_page(tmp_path):
    data = page_data([ROW], folder=tmp_path, devices=("arm-phone", "t4"))
    assert {one["device"] for one in data["picker"]["sets"]} == {"t4"}


def test_what_is_not_measured_says_what_to_type(bare, open_tab):
    tab = open_tab(bare)
    said = tab.locator("main").inner_text()
    for command in (
        "litezoo bench --device NAME", "litezoo bench --models repvgg_a0 --batch 1 8 32",
        "litezoo profile repvgg_a0 --device cpu --save", "litezoo guidelines --device cpu",
        "litezoo bench --gpu-truth", "litezoo ceilings --device cpu",
    ):  # fmt: skip
        assert command in said, command
    assert listed(tab) == 2


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of the rows in this checkout."""
    folder = REPO / "benchmarks/results"
    rows = read_rows(sorted(folder.glob("*.jsonl")))
    return write_report(rows, tmp_path_factory.mktemp("real") / "report.html", folder=folder)


PHONE = {"width": 360, "height": 740, "is_mobile": True, "has_touch": True}


def test_charts_keep_to_their_places_when_the_window_changes(tab):
    go(tab, "#device=all&batch=all")
    fits = """columns => [...document.querySelectorAll("figure")].every(figure =>
            Math.abs(figure.querySelector(".main-svg").getBoundingClientRect().width
                     - figure.getBoundingClientRect().width) <= 1)
        && columns === getComputedStyle(document.querySelector(".panels"))
            .gridTemplateColumns.split(" ").length"""
    assert tab.evaluate(fits, 2)
    before = tab.evaluate(DRAWN)
    tab.set_viewport_size({"width": 700, "height": 900})
    tab.wait_for_function(fits, arg=1)
    assert tab.evaluate(DRAWN) == before
    tab.set_viewport_size({"width": 1200, "height": 900})
    tab.wait_for_function(fits, arg=2)


@pytest.fixture(scope="module")
def phone(open_tab, page):
    return open_tab(page, **PHONE)


def too_wide(tab):
    """What of a page leaves its window."""
    wide = tab.evaluate("""() => [...document.querySelectorAll(".chart, .scroll, select, dialog")]
        .filter(node => node.getBoundingClientRect().right > innerWidth)
        .map(node => node.outerHTML)""")
    return wide or tab.evaluate("document.documentElement.scrollWidth") > tab.viewport_size["width"]


def test_a_phone_shows_everything_in_its_width(phone):
    assert not too_wide(phone)
    assert phone.locator("#find").is_hidden()  # the filters are folded, not in the way
    phone.tap("#filters summary")
    assert phone.locator("#find").is_visible() and not too_wide(phone)
    small = phone.evaluate("""() => [...document.querySelectorAll(
            "select, input[type=search], .chip, button")]
        .filter(node => node.checkVisibility() && !node.closest("table")
            && node.getBoundingClientRect().height < 44).map(node => node.outerHTML)""")
    assert small == []
    phone.tap("#filters summary")
    phone.locator("#rows tbody a").first.tap()
    phone.wait_for_selector("dialog#row[open]")
    assert not too_wide(phone)
    phone.tap("dialog .close")
    phone.wait_for_selector("dialog#row:not([open])", state="hidden")


def test_a_tap_opens_a_row_and_a_thumbs_drag_scrolls_the_page(phone):
    at = phone.evaluate(POINT)
    phone.touchscreen.tap(at["x"], at["y"])
    phone.wait_for_selector("dialog#row[open]")
    assert phone.locator("#row code").inner_text() == f"litezoo bench --repro {at['id']}"
    phone.tap("dialog .close")
    at = phone.evaluate(POINT)
    before = phone.evaluate("scrollY")
    thumb = phone.context.new_cdp_session(phone)
    for step in range(16):
        thumb.send("Input.dispatchTouchEvent", {
            "type": "touchMove" if step else "touchStart",
            "touchPoints": [{"x": at["x"], "y": at["y"] - 10 * step}],
        })  # fmt: skip
    thumb.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    phone.wait_for_function("before => scrollY > before + 100", arg=before)
    assert phone.locator("dialog#row").is_hidden()


def test_the_page_of_the_committed_rows_opens(open_tab, tmp_path):
    folder = REPO / "benchmarks/results"
    rows = read_rows(sorted(folder.glob("*.jsonl")))
    file = write_report(rows, tmp_path / "report.html", folder=folder)
    tab = open_tab(file, f"#row-{rows[-1].id}", **PHONE)
    assert tab.locator("#row code").inner_text() == f"litezoo bench --repro {rows[-1].id}"
    drawn = tab.evaluate(DRAWN)
    assert sum(drawn["accuracy"]) > 0 and sum(drawn["devices"]) > 0 and sum(drawn["throughput"]) > 0
    assert listed(tab) > 0 and not too_wide(tab)
    assert file.stat().st_size < 6e6
