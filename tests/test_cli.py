import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from test_train import litezoo

import litezoo as package
from litezoo.models.catalogue import list_models
from litezoo.recipes.devices import list_devices

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "litezoo"]


pytestmark = pytest.mark.usefixtures("tiny_model")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, **options):
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=100, **options
    )


# ----------------------------------------------------------------------------- looking things up

VERBS = (
    "train", "list", "info", "devices", "export", "verify", "bench", "profile", "ceilings",
    "guidelines", "pick", "predict", "report",
)  # fmt: skip


def test_help_lists_the_verbs_and_the_exit_statuses(capsys):
    assert litezoo("--help") in (0, None)
    text = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^\s+{verb}\s", text, re.MULTILINE), verb
    assert "0 ok, 2 wrong usage, 3 a check failed, 4 something" in " ".join(text.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb, capsys):
    assert litezoo(verb, "--help") in (0, None)
    output = capsys.readouterr()
    assert "--json" in output.out
    assert re.match(rf"usage: litezoo (\[options\] )?{verb} ", output.out)


def test_without_words_the_help_is_shown_and_the_status_is_2(capsys):
    assert litezoo() == 2
    assert "VERB" in capsys.readouterr().err


def test_all_models_are_listed(capsys):
    assert litezoo("list") == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in list_models())
    [row] = [line.split() for line in text.splitlines() if " repvgg_a0 " in line]
    assert row[4:] == ["72.41", "rvgg_in1k", "72.43", "MIT"]


def listed(capsys, *words):
    assert litezoo("list", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_models_are_listed_by_pattern_and_by_weights(capsys):
    names = [entry["name"] for entry in listed(capsys, "repvgg_b2*")]
    assert names == ["repvgg_b2", "repvgg_b2g2", "repvgg_b2g4"]
    pretrained = listed(capsys, "repvgg_b2*", "--pretrained")
    assert [entry["name"] for entry in pretrained] == ["repvgg_b2", "repvgg_b2g4"]
    assert pretrained[0]["licence"] == "MIT" and pretrained[0]["top1_percent"] == 78.788
    assert litezoo("list", "nothing*") == 2
    assert "no model matches 'nothing*' and the conditions" in capsys.readouterr().err


def test_models_are_listed_by_size_accuracy_and_licence(capsys):
    small = listed(capsys, "--max-params-m", "4", "--min-top1", "73")
    assert small and all(entry["params_deploy"] <= 4e6 for entry in small)
    assert "mobilenetv4_conv_small" in {entry["name"] for entry in small}
    assert {e["family"] for e in listed(capsys, "--family", "vovnet")} == {"vovnet"}
    assert litezoo("list", "--family", "vovnett") == 2
    assert "unknown family 'vovnett'; did you mean 'vovnet'?" in capsys.readouterr().err
    unknown = {entry["name"] for entry in listed(capsys, "--license", "unknown")}
    assert "vovnet39" in unknown and "repvgg_a0" not in unknown
    free = {entry["name"] for entry in listed(capsys, "--license", "free")}
    assert {"repvgg_a0", "vovnet39"} <= free and "vovnetv2_39" not in free


def test_a_licence_that_must_be_accepted_is_shown(capsys):
    assert litezoo("info", "vovnet57") == 0
    assert "(unknown)" in capsys.readouterr().out


def test_a_model_is_described(capsys):
    assert litezoo("info", "repvgg_a0") == 0
    text = capsys.readouterr().out
    for words in ("2101.03697", "9,108,968", "8,309,384", "72.41", "timm/repvgg_a0.rvgg_in1k"):
        assert words in text
    assert litezoo("info", "repvgg_a0", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["name"] == "repvgg_a0" and values["params_deploy"] == 8_309_384
    assert values["weights"][0]["preprocess"]["input_size"] == [3, 224, 224]


def test_devices_are_listed_and_described(capsys):
    assert litezoo("devices") == 0
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in list_devices()) and "tensorrt" in text
    assert litezoo("devices", "t4") == 0
    assert "65.13" in capsys.readouterr().out
    assert litezoo("devices", "t4", "--json") == 0
    (device,) = json.loads(capsys.readouterr().out)
    assert device["name"] == "t4" and device["batch"] == {"min": 1, "opt": 8, "max": 32}
    assert device["peak_tera_ops_per_s"]["fp16"] == 65.13


def test_looking_things_up_imports_no_framework_and_no_runtime():
    code = """
import sys
from litezoo.__main__ import main
for words in (["--help"], ["list"], ["info", "repvgg_a0"], ["devices"], ["devices", "t4"],
              ["list", "--json"], ["info", "repvgg_a9"], ["devices", "t44"], ["bensh"],
              ["export", "repvgg_a0", "--device", "t44"], ["export"], ["train"], ["pick"]):
    try:
        main(words)
    except SystemExit:
        pass
heavy = {"torch", "torchvision", "timm", "pytorch_lightning", "lightning", "torchmetrics", "onnx",
         "onnxruntime", "onnxsim", "openvino", "tensorrt", "sklearn", "plotly", "pandas", "numpy"}
print("imported:", sorted(heavy.intersection(sys.modules)))
"""
    result = run(sys.executable, "-c", code)
    assert result.stdout.splitlines()[-1] == "imported: []", result.stderr


def test_the_module_runs_as_a_program():
    result = run(*PROGRAM, "list", "repvgg_a*", "--json")
    assert result.returncode == 0 and result.stderr == ""
    names = [entry["name"] for entry in json.loads(result.stdout)]
    assert names == ["repvgg_a0", "repvgg_a1", "repvgg_a2"]
    result = run(*PROGRAM, "info", "repvgg_a9")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "litezoo: unknown model 'repvgg_a9'; did you mean 'repvgg_a2'? (see: litezoo list)\n"
    )


def test_the_installed_program_is_the_module():
    program = Path(sys.executable).parent / "litezoo"
    if not program.is_file():
        pytest.skip("litezoo is not installed beside this Python")
    result = run(program, "devices", "--json")
    assert result.returncode == 0
    assert [device["name"] for device in json.loads(result.stdout)] == list_devices()


def test_a_reader_that_stops_early_sees_no_traceback():
    command = f"{sys.executable} -m litezoo list | head -1"
    result = run("bash", "-c", f"set -o pipefail; {command}")
    assert result.returncode == 0 and result.stderr == ""


# --------------------------------------------------------------------------------------- mistakes

WRONG_USAGE = {
    "bensh": "unknown command 'bensh'; did you mean 'bench'?",
    "exprot repvgg_a0": "unknown command 'exprot'; did you mean 'export'?",
    "info": "",
    "info repvgg_a9": "did you mean 'repvgg_a2'",
    "info repvg_b1g4": "unknown model 'repvg_b1g4'; did you mean 'repvgg_b1g4'",
    "list nothing*": "no model matches",
    "list --pretraned": "did you mean '--pretrained'",
    "list --unheard-of": "--unheard-of",
    "devices t44": "unknown device 't44'; did you mean 't4'? (see: litezoo devices)",
    "export": "for which device?",
    "export repvgg_a0 --device ccpu": "did you mean 'cpu'",
    "export repvgg_a9 --device cpu": "did you mean 'repvgg_a2'",
    "export repvgg_a0 --device t4 --precision bf16": "t4 has no bf16; it has int8+fp16, fp16",
    "export repvgg_a0 --device cpu --precision fp16": "cpu has no fp16; it has int8+bf16",
    "export repvgg_a0 --device cpu --precisoin fp32": "did you mean '--precision'",
    "export repvgg_a0 --device cpu --engine maybe": "maybe",
    "export repvgg_a0 --device cpu --weights rvgg_in1": "did you mean 'rvgg_in1k'",
    "export repvgg_b2g2 --device cpu --weights in1k": "repvgg_b2g2 has no public weights",
    "export repvgg_a0 --device cpu --weights none.ckpt": "no checkpoint none.ckpt",
    "export --device cpu --weights none.ckpt": "no checkpoint none.ckpt",
    "export --device cpu --weights random": "which model are the weights 'random' for?",
    "verify": "",
    "verify nowhere": "nowhere is no artifact",
    "bench nowhere": "nowhere is no artifact",
    "bench --device cpux": "did you mean 'cpu'",
    "bench --batch many": "many",
    "bench --bach 3": "did you mean '--batch'",
    "report none.jsonl": "no results none.jsonl",
    "profile": "",
    "profile repvgg_a9": "did you mean 'repvgg_a2'",
    "profile repvgg_a0 --device t5": "unknown device 't5'",
    "guidelines --rules g2-few-group": "did you mean 'g2-few-groups'",
    "guidelines --device cpux": "did you mean 'cpu'",
    "train": "which model?",
    "train repvgg_a9": "did you mean 'repvgg_a2'",
    "train repvgg_tiny --data nowhere": "no data set nowhere",
    "train repvgg_tiny --trainer.max_epocks 3": "did you mean '--trainer.max_epochs'",
    "train --resume": "there is no run to go on with",
}
MISSING = {
    "bench": "nothing is exported for cpu; type: litezoo export --device cpu",
    "bench --models repvgg_a0": "type: litezoo export repvgg_a0 --device cpu",
    "report": "no results in benchmarks/results yet; measure first: litezoo bench DIR",
    "export repvgg_b2g2 --device cpu": "repvgg_b2g2 has no public weights and no run here",
    "export repvgg_a0 --device t4 --engine require --weights random": "pip install",
    "guidelines --device t4": "no runtime of t4 can be measured here",
    "ceilings --device t4": "needs a GPU of compute capability 7.5",
}


@pytest.mark.parametrize("line", [*WRONG_USAGE, *MISSING])
def test_a_mistake_is_answered_in_one_sentence_and_by_the_status(line, here, capsys):
    status, words = (2, WRONG_USAGE[line]) if line in WRONG_USAGE else (4, MISSING[line])
    assert litezoo(*line.split()) == status
    output = capsys.readouterr()
    *_, sentence = output.err.strip().splitlines()
    assert sentence.startswith("litezoo: ") and words in sentence
    assert "Traceback" not in output.err and output.out == ""
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("line", [*WRONG_USAGE, *MISSING])
def test_with_json_a_mistake_is_an_object_on_standard_output(line, capsys):
    status = 2 if line in WRONG_USAGE else 4
    assert litezoo(*line.split(), "--json") == status
    output = capsys.readouterr()
    answer = json.loads(output.out)
    assert answer["status"] == status
    assert output.err.strip().splitlines()[-1] == f"litezoo: {answer['error']}"


def test_a_failed_check_ends_with_3(for_cpu, here, capsys):
    copy = shutil.copytree(for_cpu, here / "copy")
    (copy / "model.fp32.onnx").write_bytes(b"changed")
    assert litezoo("verify", "copy", "--json") == 3
    output = capsys.readouterr()
    answer = json.loads(output.out)
    assert answer["status"] == 3 and "model.fp32.onnx was changed" in answer["error"]
    assert "Traceback" not in output.err


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own(for_cpu, here):
    copy = shutil.copytree(for_cpu, here / "copy")
    (copy / "manifest.json").write_text("{")
    for words, status in (
        (("verify", "copy"), 3),
        (("bench", "copy", "--batch", "x"), 2),
        (("pick",), 2),
    ):
        result = run(*PROGRAM, *words)
        assert result.returncode == status
        assert result.stdout == "" and "Traceback" not in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("litezoo: ")


# ------------------------------------------------------------------------------------------- JSON


def test_what_a_verb_does_is_printed_as_json(for_cpu, here, capsys, short):
    words = ("--device", "cpu", "--weights", "random", "--out", "out")
    assert litezoo("export", "repvgg_tiny", *words, "--json") == 0
    artifact = json.loads(capsys.readouterr().out)
    assert artifact["folder"] == "out" and artifact["model"] == "repvgg_tiny"
    manifest = json.loads((here / "out" / "manifest.json").read_text())
    assert {key: artifact[key] for key in manifest} == manifest
    assert litezoo("verify", for_cpu, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 7 and report["skipped"] == {}
    assert [parity["stage"] for parity in report["parities"]] == [
        "preprocessing",
        "openvino fp32",
        "onnxruntime fp32",
        "ncnn fp32",
    ]


def test_steps_are_shown_beside_the_result(for_cpu, capsys):
    assert litezoo("verify", for_cpu, "--json") == 0
    output = capsys.readouterr()
    assert output.err == f"- verifying {for_cpu}\n"
    json.loads(output.out)


@pytest.mark.parametrize(
    "words",
    [
        ("export", "--device", "cpu", "repvgg_a9"),
        ("export", "--precision", "fp32", "repvgg_a9", "--device", "cpu"),
        ("train", "--data", "digits", "repvgg_a9"),
        ("info", "--json", "repvgg_a9"),
    ],
    ids=" ".join,
)
def test_options_may_come_before_the_model(words, capsys):
    assert litezoo(*words) == 2
    assert "unknown model 'repvgg_a9'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- profile


def test_profile_counts_a_model_and_draws_its_roofline(here, capsys):
    words = ("profile", "repvgg_tiny", "--device", "t4", "--precision", "fp16")
    assert litezoo(*words, "--html", here / "roof.html") in (0, None)
    text = capsys.readouterr().out
    assert "FLOPs (2 per MAC)" in text and "least time" in text and "bound" in text
    assert "roofline: " in text and (here / "roof.html").stat().st_size > 10**6
    assert litezoo(*words, "--json") in (0, None)
    values = json.loads(capsys.readouterr().out)
    assert values["flops"] == 2 * values["macs"] and values["ms"] > 0
    assert values["layers"][0]["bound"] in ("compute", "memory", "launch")


def test_profile_of_the_train_form_has_the_deploy_form_beside_it(capsys):
    assert litezoo("profile", "repvgg_tiny", "--train-form") in (0, None)
    text = capsys.readouterr().out
    assert "train form" in text and "deploy form" in text


def test_profile_says_what_to_type_where_a_device_has_no_ceilings(capsys):
    assert litezoo("profile", "repvgg_tiny", "--device", "arm-phone") in (0, None)
    assert "litezoo ceilings --device arm-phone" in capsys.readouterr().out
    assert litezoo("profile", "repvgg_tiny", "--device", "arm-phone", "--html", "roof.html") == 4


# ----------------------------------------------------------------------------------------- Python

PUBLIC = (
    *("CheckFailed", "FusableBlock", "LitezooError", "MissingError", "UsageError"),
    *("create_model", "from_pretrained", "fuse", "fuse_with_report", "get_device", "get_spec"),
    *("list_devices", "list_models", "load", "pick", "push_to_hub", "verify"),
)


def test_the_public_names_are_those_of_the_contract():
    assert tuple(sorted(package.__all__)) == PUBLIC
    assert {*PUBLIC} <= {*dir(package)}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_what_its_home_defines(name):
    value = getattr(package, name)
    assert value.__name__ == name and value.__module__.startswith("litezoo.")
    assert value.__doc__


def test_the_version_is_that_of_the_package():
    assert package.__version__ == version("litezoo")


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'litezoo' has no attribute 'create_modl'"):
        package.create_modl  # noqa: B018
    assert not hasattr(package, "quantize")


def test_the_python_of_the_contract_works():
    model = package.create_model("repvgg_tiny", num_classes=10, in_chans=1)
    maps = package.create_model("repvgg_tiny", in_chans=1, features_only=True)
    assert package.list_models("repvgg_a*") == ["repvgg_a0", "repvgg_a1", "repvgg_a2"]
    assert package.fuse(model) is not model
    assert len(maps.feature_info.channels()) >= 4
    assert package.get_spec("repvgg_a0").name == "repvgg_a0"
    assert package.get_device("t4").name == "t4"
    assert issubclass(package.UsageError, package.LitezooError)
    assert issubclass(package.LitezooError, ValueError)


# ------------------------------------------------------------------------------------------- make

#: The targets of the contract (architecture.md, section 5), and those of the house.
TARGETS = tuple(
    "help demo test test-export-all check train-% export bench profile guidelines pick predict "
    "report install lint types docs wheel digits fits networks readme recommendations clean".split()
)

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words):
    """Run make in the checkout without what it was started by, touching no environment."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    variables = {"DEVICE", "MODEL", "WEIGHTS", "PRECISION", "OUT", "DATA", "ARGS", "MODELS"}
    environment = {k: v for k, v in os.environ.items() if k not in inherited | variables}
    result = run("make", *words, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_make
@pytest.mark.parametrize("words", [(), ("help",)], ids=["default", "help"])
def test_make_lists_every_target_with_a_line(words):
    lines = make(*words).splitlines()
    listed = {line.split()[1]: line.split()[2:] for line in lines if line.startswith("  make ")}
    assert {*listed} == {*TARGETS}
    assert all(listed.values())


EXPANSIONS = {
    "train-repvgg": "train repvgg --data 'digits'",
    "train-repvgg_a2": "train repvgg_a2 --data 'digits'",
    "train-repvgg DATA=/data/my_pets ARGS='--trainer.max_epochs 3'": (
        "train repvgg --data '/data/my_pets' --trainer.max_epochs 3"
    ),
    "export": "export --device cpu",
    "export DEVICE=t4": "export --device t4",
    "export DEVICE=t4 MODEL=m WEIGHTS=w PRECISION=fp16 OUT=o": (
        "export m --device t4 --weights 'w' --precision fp16 --out 'o'"
    ),
    "export MODEL=m WEIGHTS=random ARGS=--json": "export m --device cpu --weights 'random' --json",
    "bench DEVICE=t4": "bench --device t4 --reference-set --peers",
    "bench DEVICE=cpu MODELS='a b'": "bench --device cpu --models a b",
    "profile MODEL=m DEVICE=t4": "profile m --device t4",
    "profile MODEL=m DEVICE=t4 PRECISION=int8 HTML=p": (
        "profile m --device t4 --precision int8 --html 'p'"
    ),
    "guidelines DEVICE=t4": "guidelines --device t4",
    "pick DEVICE=t4 LATENCY_MS=2": "pick --device t4 --latency-ms 2",
    "predict MODEL=m DEVICE=t4": "predict m --device t4",
    "predict MODEL=m DEVICE=t4 PRECISION=fp16 ARGS=--explain": (
        "predict m --device t4 --precision fp16 --explain"
    ),
    "report": "report",
    "readme": "report --readme README.md",
}


@needs_make
@pytest.mark.parametrize("line", EXPANSIONS)
def test_a_target_is_one_line_that_calls_the_program(line):
    commands = make("-n", "-o", ".venv/.made", *shlex.split(line)).splitlines()
    assert [" ".join(command.split()) for command in commands] == [
        f".venv/bin/litezoo {EXPANSIONS[line]}"
    ]


@needs_make
def test_the_demo_is_the_main_job_from_training_to_measuring():
    verbs = [line.split()[1] for line in make("-n", "-o", ".venv/.made", "demo").splitlines()]
    assert verbs == ["train", "export", "verify", "bench"]


@needs_make
def test_check_is_lint_types_tests_docs_and_the_wheel():
    text = make("-n", "-o", ".venv/.made", "check")
    for command in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "pyright",
        "pytest",
        "drive_wheel",
    ):
        assert command in text


@needs_make
def test_the_environment_is_made_anew_when_setup_cfg_changes():
    text = make("-n", "-W", "setup.cfg", "report")
    assert "-m venv .venv" in text and "--editable '.[dev]'" in text
    assert text.splitlines()[-1].split() == [".venv/bin/litezoo", "report"]


@needs_make
def test_a_target_named_like_a_folder_is_still_run():
    assert (ROOT / "export").is_dir()
    assert "litezoo export" in make("-n", "-o", ".venv/.made", "export")
