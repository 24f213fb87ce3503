import dataclasses
from pathlib import Path

import pytest
from test_bench import ROW
from test_train import litezoo

from litezoo.benchmarks.disturbance import Conditions
from litezoo.benchmarks.publish import check_files, mark_refused, refusal
from litezoo.benchmarks.results import append_rows, latest, read_rows, refresh_readme
from litezoo.models.errors import CheckFailed

QUIET = Conditions(
    blocks=5, disturbed_blocks=0, reruns=0, foreign_share=0.0, steal_share=0.0, waited_share=0.0,
    clock_min_mhz=None, clock_max_mhz=None, temperature_max_c=None, throttle_events=None,
)  # fmt: skip
GOOD = dataclasses.replace(
    ROW,
    ratio=1.0,
    ratio_low=0.8,
    ratio_high=1.2,
    ratio_to="repvgg_a0 openvino fp32 deploy",
    best_ms=8.0,
    harness_us=0.2,
    conditions=QUIET,
)


def row(**values):
    return dataclasses.replace(GOOD, **values)


def test_a_complete_row_of_a_quiet_machine_is_published():
    assert refusal(GOOD) is None and mark_refused([GOOD]) == [GOOD]


def test_rows_without_conditions_are_judged_by_the_rest():
    assert refusal(ROW) is None
    assert "its blocks differ" in refusal(dataclasses.replace(ROW, spread=0.5))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"spread": 0.31}, "its blocks differ by 31% (at most 30%)"),
        ({"ratio_low": 0.5, "ratio_high": 1.1}, "between 0.5 and 1.1, which says too little"),
        (
            {"conditions": dataclasses.replace(QUIET, disturbed_blocks=3, why="others ran")},
            "3 of 5 blocks were disturbed (others ran); measure again",
        ),
        (
            {"conditions": dataclasses.replace(QUIET, clock_min_mhz=1e3, clock_max_mhz=2e3)},
            "the clock fell from 2000 to 1000 MHz",
        ),
        ({"machine": dataclasses.replace(ROW.machine, cpu="unknown")}, "the CPU unknown"),
        ({"runtime": "ncnn"}, "incomplete: the version of ncnn unknown"),
        ({"runtime": "timm-eager"}, "incomplete: the version of timm unknown"),
        ({"runtime": "pytorch-eager"}, "incomplete: the version of torch unknown"),
        ({"runtime": "timm-onnxruntime"}, "incomplete: the version of onnxruntime unknown"),
    ],
)
def test_a_row_is_refused_and_says_why(values, reason):
    assert reason in refusal(row(**values))
    (marked,) = mark_refused([row(**values)])
    assert marked.refused == refusal(row(**values))


@pytest.mark.parametrize("runtime", ["openvino", "timm-openvino"])
def test_a_peer_that_runs_in_a_runtime_needs_that_ones_version(runtime):
    assert refusal(row(runtime=runtime)) is None


def test_what_is_compared_with_a_refused_row_is_refused_too():
    base = row(spread=0.9)
    own = row(precision="int8")
    other = row(precision="int8", ratio_to="repvgg_a0 openvino fp32 deploy", batch=8)
    first, second, third = mark_refused([base, own, other])
    assert first.refused.startswith("its blocks differ")
    assert second.refused.startswith(
        "its ratio is over repvgg_a0 openvino fp32 deploy, which is refused: its blocks differ"
    )
    assert third.refused == ""  # of another run


def test_a_refused_row_is_no_result(tmp_path):
    assert latest([GOOD, row(refused="for a test", date="2999-01-01")]) == [GOOD]


# ----------------------------------------------------------------------------------- files


def test_good_files_are_counted(tmp_path):
    files = append_rows([GOOD, row(batch=32, images_per_s=3938.5)], tmp_path)
    assert check_files(files) == 2
    assert read_rows(files)[0] == GOOD


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"refused": "for a test"}, "for a test"),
        ({"spread": 0.5}, "its blocks differ by 50%"),
        ({"p90_ms": 7.0}, "its percentiles are 8.125, 7.0 and 9.75 ms"),
        ({"p50_ms": 0.0}, "its percentiles are 0.0"),
        ({"images_per_s": 246.2}, "8.125 ms are 123.1 images/s, not 246.2"),
        ({"streams": 2}, "8.125 ms are 246.2 images/s, not 123.1"),
        ({"runs": 0}, "less than 1"),
        ({"ratio": 1.3}, "its ratio 1.3 is outside 0.8 to 1.2"),
        ({"ratio_to": "repvgg_a0 timm-eager fp32 train"}, "the row that its ratio is over"),
    ],
)
def test_a_row_that_is_not_to_be_published_is_named_by_file_and_line(tmp_path, values, reason):
    (file,) = append_rows([GOOD, row(**values)], tmp_path)
    with pytest.raises(CheckFailed) as caught:
        check_files([file])
    assert str(caught.value).startswith(f"{file}:2 is not to be published: ")
    assert reason in str(caught.value)


def test_other_results_are_read_as_what_their_folder_says(tmp_path):
    for name, words in (
        ("guidelines/cpu.jsonl", "cpu.jsonl:1 is not a guideline row"),
        ("gpu/h200.jsonl", "h200.jsonl:1 is not a row of GPU truth"),
        ("ceilings/cpu.json", "cpu.json holds no ceilings"),
        ("profiles/a.json", "a.json holds no profile"),
    ):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_text("{}\n")
        with pytest.raises(CheckFailed, match=words):
            check_files([file])


def test_results_are_checked_by_the_command(tmp_path, capsys):
    words = ("bench", "--check", "--results", tmp_path)
    assert litezoo(*words) == 4
    assert "yet; measure first: litezoo bench DIR" in capsys.readouterr().err
    (file,) = append_rows([GOOD], tmp_path)
    assert litezoo(*words) == 0
    assert capsys.readouterr().out == "1 rows in 1 files are fit to be published\n"
    append_rows([row(spread=0.4)], tmp_path)
    assert litezoo("bench", "--check", file) == 3
    assert f"{file}:2 is not to be published" in capsys.readouterr().err


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_the_committed_results_are_fit_to_be_published():
    files = sorted([*RESULTS.glob("*.jsonl"), *RESULTS.glob("*/*.json*")])
    assert check_files(files) > 100


def test_the_readmes_table_is_that_of_the_committed_results():
    rows = read_rows(sorted(RESULTS.glob("*.jsonl")))
    assert refresh_readme(ROOT / "README.md", rows, write=False), "run: make readme"
