"""Triton repositories: the configuration is read by Triton's own schema, the plans have names.

No server is started: what is checked is what a server reads before it loads a model.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tensorrt import create_kit, create_tiny, names_in, run_script, with_fakes

text_format = pytest.importorskip("google.protobuf.text_format")
schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")

from litezoo.export import build_engine  # noqa: E402
from litezoo.export.to_half import IoType  # noqa: E402
from litezoo.export.triton import platform_config, write_triton  # noqa: E402
from litezoo.models.errors import UsageError  # noqa: E402
from litezoo.recipes.devices import Batch, get_device  # noqa: E402

T4 = get_device("t4")
PLAN = "a0.fp16.sm75.trt11.4.0.106.plan"
SHAPES: dict[str, Any] = {
    "input_name": "input",
    "output_name": "logits",
    "image_shape": (3, 224, 224),
    "classes": 1000,
}


def parse(text: str) -> Any:
    """Read a configuration as the server does."""
    return text_format.Parse(text, schema.ModelConfig())


def config_of(**changes: Any) -> Any:
    values = {"device": T4, "platform": "tensorrt_plan", **SHAPES, **changes}
    return parse(platform_config("a0_fp16", **values))


def create_plan(folder: Path, name: str = PLAN) -> Path:
    file = folder / name
    file.write_bytes(name.encode())
    return file


# --- the configuration ---------------------------------------------------------------------------


def test_the_schema_refuses_a_field_it_does_not_have() -> None:
    text = platform_config("a0", device=T4, platform="tensorrt_plan", **SHAPES)
    assert parse(text).name == "a0"
    with pytest.raises(text_format.ParseError, match="max_batch_sise"):
        parse(text.replace("max_batch_size", "max_batch_sise"))
    with pytest.raises(text_format.ParseError, match="TYPE_FLOAT"):
        parse(text.replace("TYPE_FP32", "TYPE_FLOAT"))


def test_a_plans_configuration_says_shapes_batches_and_graphs() -> None:
    config = config_of(queue_delay_us=250, instances=2)
    assert (config.name, config.platform, config.max_batch_size) == ("a0_fp16", "tensorrt_plan", 32)
    [source], [result] = config.input, config.output
    assert (source.name, source.data_type) == ("input", schema.DataType.TYPE_FP32)
    assert list(source.dims) == [3, 224, 224]  # without the batch
    assert (result.name, list(result.dims)) == ("logits", [1000])
    assert result.label_filename == ""
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    [group] = config.instance_group
    assert (group.count, group.kind) == (2, schema.ModelInstanceGroup.KIND_GPU)
    assert config.optimization.cuda.graphs is True
    graphs = config.optimization.cuda.graph_spec
    assert [graph.batch_size for graph in graphs] == [1, 8, 32]
    assert all(list(graph.input["input"].dim) == [3, 224, 224] for graph in graphs)
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 8, 32]
    for warmup in config.model_warmup:
        assert list(warmup.inputs["input"].dims) == [3, 224, 224]
        assert warmup.inputs["input"].data_type == schema.DataType.TYPE_FP32
        assert warmup.inputs["input"].zero_data is True


@pytest.mark.parametrize("io, kind", [("fp16", "TYPE_FP16"), ("bf16", "TYPE_BF16")])
def test_a_file_of_16_bit_ends_is_said_to_be_one(tmp_path: Path, io: IoType, kind: str) -> None:
    plans = {"7.5": create_plan(tmp_path)}
    write_triton(tmp_path / "all", model="a0", device=T4, plans=plans, io=io, **SHAPES)
    written = parse((tmp_path / "all" / "a0" / "config.pbtxt").read_text())
    for config in (config_of(io=io), written):
        warmups = [warmup.inputs["input"] for warmup in config.model_warmup]
        ends = (*config.input, *config.output, *warmups)
        assert [end.data_type for end in ends] == [schema.DataType.Value(kind)] * 5


def test_onnx_on_a_cpu_has_no_graphs_and_runs_on_the_cpu() -> None:
    config = config_of(device=get_device("cpu"), platform="onnxruntime_onnx")
    assert config.platform == "onnxruntime_onnx"
    assert not config.HasField("optimization")
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU


def test_a_device_of_single_images_has_no_dynamic_batching() -> None:
    config = config_of(device=dataclasses.replace(T4, batch=Batch(min=1, opt=1, max=1)))
    assert config.max_batch_size == 1 and not config.HasField("dynamic_batching")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]


@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
    opt=st.integers(1, 64),
    more=st.integers(0, 64),
    shape=st.tuples(st.integers(1, 16), st.integers(1, 512), st.integers(1, 512)),
    classes=st.integers(1, 30000),
)
def test_any_network_makes_a_configuration_that_triton_reads(
    name: str, opt: int, more: int, shape: tuple[int, int, int], classes: int
) -> None:
    device = dataclasses.replace(T4, batch=Batch(min=1, opt=opt, max=opt + more))
    config = config_of(
        device=device, input_name=name, output_name=name, image_shape=shape, classes=classes
    )
    assert config.input[0].name == config.output[0].name == name
    assert tuple(config.input[0].dims) == shape and list(config.output[0].dims) == [classes]
    sizes = list(config.dynamic_batching.preferred_batch_size)
    assert all(1 <= size <= config.max_batch_size == opt + more for size in sizes)


MISTAKES: dict[str, dict[str, Any]] = {
    "Triton sends single requests too": {
        "device": dataclasses.replace(T4, batch=Batch(min=2, opt=8, max=32))
    },
    "sizes, classes and instances of 1 or more": {"instances": 0},
    "a delay of 0 or more": {"queue_delay_us": -1},
    "1 or more and a delay": {"classes": 0},
    "unknown type of input and output 'half'": {"io": "half"},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_configuration_that_triton_has_no_use_for_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_of(**MISTAKES[words])


# --- the folder ----------------------------------------------------------------------------------


def test_a_repository_serves_each_gpu_its_own_plan(tmp_path: Path) -> None:
    other = "a0.fp16.sm90.trt11.4.0.106.plan"
    plans = {"7.5": create_plan(tmp_path), "9.0": create_plan(tmp_path, other)}
    folder = tmp_path / "repository"
    labels = [f"class {index}" for index in range(1000)]
    written = write_triton(folder, model="a0", device=T4, plans=plans, labels=labels, **SHAPES)
    config = parse((folder / "a0" / "config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == {"7.5": PLAN, "9.0": other}
    assert config.output[0].label_filename == "labels.txt"
    assert (folder / "a0" / "labels.txt").read_text().splitlines() == labels
    assert (folder / "a0" / "1" / PLAN).read_bytes() == PLAN.encode()
    assert names_in(folder / "a0" / "1") == {PLAN, other}
    assert {str(file.relative_to(folder)) for file in written} == {
        "a0/config.pbtxt", "a0/labels.txt", f"a0/1/{PLAN}", f"a0/1/{other}",
    }  # fmt: skip
    text = (folder / "a0" / "config.pbtxt").read_text()
    assert f"# {PLAN}: the server's TensorRT must be 11.4.0.106\n" in text


def test_an_onnx_file_is_served_as_model_onnx_and_older_plans_go(tmp_path: Path) -> None:
    onnx_file = create_plan(tmp_path, "model.fp32.onnx")
    folder = tmp_path / "repository"
    plans = {"7.5": create_plan(tmp_path)}
    write_triton(folder, model="a0", device=T4, plans=plans, **SHAPES)
    write_triton(folder, model="a0", device=T4, onnx_file=onnx_file, **SHAPES)
    assert names_in(folder / "a0" / "1") == {"model.onnx"}
    config = parse((folder / "a0" / "config.pbtxt").read_text())
    assert config.platform == "onnxruntime_onnx" and not config.cc_model_filenames


def test_a_version_compatible_plan_says_how_the_server_is_started() -> None:
    name = PLAN.replace(".plan", ".vc.plan")
    text = build_engine.name_plans('name: "a"\n', [Path(name)])
    assert "must be 11.4.0.106 or newer" in text
    assert "--backend-config=tensorrt,version-compatible=true" in text
    assert dict(parse(text).cc_model_filenames) == {"7.5": name}


def test_a_repository_that_cannot_be_is_refused_and_not_begun(tmp_path: Path) -> None:
    plan, onnx_file = create_plan(tmp_path), create_plan(tmp_path, "a.onnx")
    older = create_plan(tmp_path, "a0.fp16.sm90.trt10.16.1.11.plan")
    mistakes: dict[str, dict[str, Any]] = {
        "give one": {"plans": None},
        "either plans": {"onnx_file": onnx_file},
        "3 labels are given for 1000 classes": {"labels": ["a", "b", "c"]},
        "a label has a line break": {"labels": ["a\nb"], "classes": 1},
        "for compute capability 7.5, not 9.0": {"plans": {"9.0": plan}},
        "does not say what it runs on": {"plans": {"7.5": onnx_file}},
        "a server has one": {"plans": {"7.5": plan, "9.0": older}},
        "is no name for a model's folder": {"model": "../a0"},
        "is not there": {"plans": {"7.5": tmp_path / "absent" / PLAN}},
    }
    for words, changes in mistakes.items():
        values = {"model": "a0", "device": T4, "plans": {"7.5": plan}, **SHAPES, **changes}
        with pytest.raises(UsageError, match=words):
            write_triton(tmp_path / "repository", **values)
    assert not (tmp_path / "repository").exists()


# --- in a kit ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit that was run with --triton on the fakes of 10.16, then on those of 11.4."""
    folder = tmp_path_factory.mktemp("triton")
    kit = create_kit(folder / "kit", create_tiny(folder), "fp16", "int8+fp16", triton=True)
    for version in ("10.16", "11.4"):
        env = with_fakes(folder / version, version)
        done = run_script(kit, "--triton", env=env)
        assert done.returncode == 0, done.stderr
        assert "for Triton: " in done.stdout
    return kit


def test_a_kit_lays_out_its_plans_for_triton(laid_out: Path) -> None:
    assert names_in(laid_out / "triton") == {"tiny_fp16", "tiny_int8-fp16"}
    for form in ("fp16", "int8-fp16"):
        model = laid_out / "triton" / f"tiny_{form}"
        config = parse((model / "config.pbtxt").read_text())
        plan = f"tiny.{form}.sm75.trt11.4.0.106.plan"  # the older one of this GPU gave way
        assert (config.name, config.max_batch_size) == (model.name, 32)
        assert dict(config.cc_model_filenames) == {"7.5": plan}
        assert list(config.input[0].dims) == [3, 6, 8] and list(config.output[0].dims) == [5]
        assert names_in(model / "1") == {plan}
        assert (model / "1" / plan).read_bytes() == (laid_out / plan).read_bytes()


def test_a_kit_with_triton_is_checked_and_described(laid_out: Path) -> None:
    kit = json.loads((laid_out / "kit.json").read_text())
    assert kit["triton"] == {"fp16": "tiny_fp16.pbtxt", "int8+fp16": "tiny_int8-fp16.pbtxt"}
    assert set(kit["triton"].values()) <= set(kit["files"])
    assert "build_engine.py --triton" in (laid_out / "README.md").read_text()
    assert not parse((laid_out / "tiny_fp16.pbtxt").read_text()).cc_model_filenames


def test_a_plan_of_another_gpu_joins_only_with_the_same_tensorrt(tmp_path: Path) -> None:
    template = tmp_path / "a0_fp16.pbtxt"
    template.write_text(platform_config("a0_fp16", device=T4, platform="tensorrt_plan", **SHAPES))
    hopper = "a0.fp16.sm90.trt11.4.0.106.plan"
    for name in (PLAN, hopper):
        model = build_engine.lay_out_triton(template, plan=create_plan(tmp_path, name))
    config = parse((model / "config.pbtxt").read_text())
    assert dict(config.cc_model_filenames) == {"7.5": PLAN, "9.0": hopper}
    newer = create_plan(tmp_path, "a0.fp16.sm86.trt11.5.0.1.plan")
    with pytest.raises(build_engine.Failed, match="one Triton server has one TensorRT"):
        build_engine.lay_out_triton(template, plan=newer)
    assert names_in(model / "1") == {PLAN, hopper}
