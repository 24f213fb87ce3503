"""Device files: each loads; each mistake is refused with the file, the key and what is allowed."""

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from litezoo.models.errors import MissingError, UsageError
from litezoo.recipes.devices import (
    PATTERNS,
    Batch,
    Device,
    Limits,
    get_device,
    list_devices,
    load_device,
)

HERE = Path(__file__).parent.parent / "recipes" / "devices"
PHYSICS = (
    "compute_capability",
    "peak_tera_ops_per_s",
    "sustained_tera_ops_per_s",
    "memory_gb_per_s",
    "memory_gib",
    "l2_cache_mib",
    "l3_cache_mib",
    "power_w",
    "units",
    "clock_ghz",
)
TABLES = ("peak_tera_ops_per_s", "sustained_tera_ops_per_s")


def minimal(**changes):
    """Return the keys a device needs, as a file has them; a change to None takes one out."""
    values = {
        "title": "A board",
        "kind": "gpu",
        "runtimes": ["tensorrt"],
        "precisions": ["fp16", "fp32"],
        **changes,
    }
    return {key: value for key, value in values.items() if value is not None}


@pytest.fixture
def write(tmp_path):
    """Write a device file and return its path."""

    def write(content, name="board"):
        file = tmp_path / f"{name}.yaml"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            text = content if isinstance(content, str) else yaml.safe_dump(content)
            file.write_text(text, encoding="utf-8")
        return file

    return write


def refusal(file):
    with pytest.raises(UsageError) as caught:
        load_device(file)
    text = str(caught.value)
    assert text.startswith(str(file)) and "\n" not in text and caught.value.exit_status == 2
    return text.removeprefix(str(file))


# ----------------------------------------------------------------------- our files


@pytest.mark.parametrize("file", sorted(HERE.glob("*")), ids=lambda file: file.name)
def test_every_device_file_loads(file):
    assert file.suffix == ".yaml" and file.stem == file.stem.lower()
    device = load_device(file)
    assert device == get_device(file.stem) and device.name == file.stem
    assert device.title and device.batch.min <= device.batch.opt <= device.batch.max
    assert device.select_precisions("auto") == device.precisions
    assert all(device.select_precisions(one) == (one,) for one in device.precisions)
    assert all(source.strip() for source in device.sources.values())


@pytest.mark.parametrize("name", list_devices())
def test_a_device_cannot_be_changed(name):
    device = get_device(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.title = "other"
    tables = (getattr(device, key) for key in TABLES)
    for mapping in (device.sources, device.toolchain, *tables):
        if mapping:
            with pytest.raises(TypeError):
                mapping["new"] = "fact"


@pytest.mark.parametrize("name", list_devices())
def test_every_physical_fact_is_positive_and_has_a_source(name):
    device = get_device(name)
    for key in PHYSICS:
        if value := getattr(device, key):
            assert device.sources[key]
            numbers = value.values() if key in TABLES else [value]
            assert all(float(number) > 0 for number in numbers)
    limits = {f"limits.{f.name}" for f in dataclasses.fields(Limits)}
    assert set(device.sources) <= {f.name for f in dataclasses.fields(Device)} | limits
    assert {f"limits.{key}" for key in device.limits.given()} == limits & set(device.sources)


def test_the_devices_that_users_name_are_there():
    names = "a10 a100 a30 a4000 arm-phone cpu h100 h200 jetson-agx-orin jetson-nano l4 npu-int8 t4"
    names += " rtx3090 rtx4090 rtx5090 rtx-pro-6000-max-q rtx2080ti titan-rtx titan-xp v100"
    names += " i7-12700h i9-10940x x86-avx2 raspberry-pi-4 raspberry-pi-5 rk3588-cpu rk3588-npu"
    names += " snapdragon-855-cpu snapdragon-888-cpu snapdragon-8-gen-3-npu rdk-x5 hailo-8 hailo-8l"
    assert set(names.split()) <= set(list_devices())


def test_no_precision_is_beyond_the_chip():
    for device in map(get_device, list_devices()):
        if device.kind == "gpu" and (float(device.compute_capability or 0)) < 8:
            assert not any("bf16" in precision for precision in device.precisions), device.name
        if device.kind == "npu":
            assert device.batch == Batch(min=1, opt=1, max=1), device.name
            assert device.limits.static_shapes or not device.runtimes, device.name
        bf16 = device.peak_tera_ops_per_s.get("bf16")
        assert bf16 is None or "bf16" in device.precisions, device.name


def test_a_generation_is_of_one_kind_and_no_gpu_is_without():
    kinds = {}
    for device in map(get_device, list_devices()):
        if device.generation is not None:
            assert kinds.setdefault(device.generation, device.kind) == device.kind, device.name
        else:
            assert device.kind != "gpu" and device.name in {"arm-phone", "cpu", "npu-int8"}
    assert {kind for kind in kinds.values()} == {"cpu", "gpu", "npu"}


def test_peaks_rise_as_numbers_get_shorter():
    for device in map(get_device, list_devices()):
        peaks = device.peak_tera_ops_per_s
        known = [peaks[one] for one in ("fp32", "fp16", "int8") if one in peaks]
        # fp16 is 1/64 of fp32 on Pascal's desktop cards; Volta's have no int8 tensor cores
        if device.name not in {"titan-xp", "gtx1080ti", "v100"}:
            assert known == sorted(known), device.name
        for dtype, sustained in device.sustained_tera_ops_per_s.items():
            assert sustained <= max(peaks[dtype], peaks["fp32"]), device.name


def test_a_cpus_peak_is_that_of_its_units_and_clock():
    cpus = [d for d in map(get_device, list_devices()) if d.kind == "cpu" and d.units is not None]
    assert len(cpus) > 20
    for device in cpus:
        cycles = device.peak_tera_ops_per_s["fp32"] * 1000 / (device.units * device.clock_ghz)
        assert 8 * 0.6 <= cycles <= 64 * 1.001, device.name  # cores of one chip differ in both


def test_facts_from_memory_say_so():
    said = "(check it)"
    recalled = [n for n in list_devices() if any(said in s for s in get_device(n).sources.values())]
    assert "rtx5090" in recalled and "t4" not in recalled


def test_every_runtime_of_a_device_is_known():
    runtime = pytest.importorskip("litezoo.export.runtime")
    for name in list_devices():
        assert set(get_device(name).runtimes) <= set(runtime.list_runtimes()), name


# ----------------------------------------------------------------------- what is allowed


def test_the_smallest_file_takes_its_name_from_the_file(write):
    device = load_device(write(minimal(), name="jetson"))
    assert device.name == "jetson" and device.batch == Batch() and device.power_w is None
    assert device.runtimes == ("tensorrt",) and device.precisions == ("fp16", "fp32")


def test_whole_numbers_are_numbers(write):
    values = minimal(memory_gb_per_s=320, sources={"memory_gb_per_s": "data sheet"})
    device = load_device(write(values))
    assert device.memory_gb_per_s == 320.0 and isinstance(device.memory_gb_per_s, float)


def test_every_key_of_a_device_can_be_given(write):
    values = minimal(
        batch={"min": 1, "opt": 2, "max": 4},
        compute_capability="8.7",
        generation="ampere",
        units=16,
        clock_ghz=1.3,
        peak_tera_ops_per_s={"fp16": 10, "int8": 20.5},
        sustained_tera_ops_per_s={"fp16": 5},
        memory_gb_per_s=102.4,
        memory_gib=8,
        l2_cache_mib=2,
        l3_cache_mib=4,
        power_w=15,
        workspace_mib=512,
        toolchain={"tensorrt": ">=10.3"},
        limits={"channel_multiple": 8},
        notes="none",
        sources=dict.fromkeys((*PHYSICS, "limits.channel_multiple"), "data sheet"),
    )
    device = load_device(write(values))
    assert {f.name for f in dataclasses.fields(Device)} == {"name", *values}
    assert device.batch == Batch(min=1, opt=2, max=4)
    assert dict(device.peak_tera_ops_per_s) == {"fp16": 10.0, "int8": 20.5}


# ----------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # a wrong key
        ({"memory_gb": 3}, "unknown key 'memory_gb'; did you mean 'memory_gib'? (known: batch, "),
        ({"runtime": []}, "unknown key 'runtime'; did you mean 'runtimes'?"),
        ({"batch": {"mni": 1}}, "unknown key 'mni'; did you mean 'min'? (known: max, min, opt)"),
        # a missing key
        ({"title": None}, "title is missing; required are kind, "),
        ({"precisions": None}, "precisions is missing"),
        # a wrong type
        ({"title": 4}, "title takes str, not 4"),
        ({"runtimes": "tensorrt"}, "runtimes takes a list, not 'tensorrt'"),
        ({"runtimes": [1]}, "runtimes takes str, not 1"),
        ({"compute_capability": 7.5}, "compute_capability takes str, not 7.5"),
        ({"sources": ["a"]}, "sources takes a mapping, not ['a']"),
        ({"toolchain": {"tensorrt": 10.12}}, "toolchain.tensorrt takes str, not 10.12"),
        ({"workspace_mib": 1.5}, "workspace_mib takes int without a unit"),
        ({"workspace_mib": True}, "workspace_mib takes int"),
        ({"memory_gib": True}, "memory_gib takes float"),
        ({"batch": {"max": "8"}}, "max takes int, not '8'"),
        # a unit in the value
        (
            {"memory_gb_per_s": "320 GB/s"},
            "memory_gb_per_s takes float without a unit (the unit is in the key), not '320 GB/s'",
        ),
        ({"power_w": "70W"}, "power_w takes float without a unit"),
        ({"memory_gib": "16 GiB"}, "memory_gib takes float without a unit"),
        (
            {"peak_tera_ops_per_s": {"fp32": "8.1 TFLOPS"}},
            "peak_tera_ops_per_s.fp32 takes float without a unit",
        ),
        # a value that is not allowed
        ({"precisions": ["fp8"]}, "precisions has 'fp8', allowed are fp32, tf32, bf16, fp16, int8"),
        ({"kind": "tpu"}, "kind has 'tpu', allowed are cpu, gpu, npu"),
        (
            {"peak_tera_ops_per_s": {"fp8": 1.0}, "sources": {"peak_tera_ops_per_s": "x"}},
            "peak_tera_ops_per_s has 'fp8', allowed are",
        ),
        ({"precisions": ["int8+fp32"]}, "precisions has 'int8+fp32', allowed are fp32, "),
        (
            {"peak_tera_ops_per_s": {"int8+fp16": 1.0}, "sources": {"peak_tera_ops_per_s": "x"}},
            "peak_tera_ops_per_s has 'int8+fp16', allowed are fp32, tf32, bf16, fp16, int8",
        ),
        # a wrong limit
        ({"limits": {"forbiden": {}}}, "unknown key 'forbiden'; did you mean 'forbidden'?"),
        ({"limits": []}, "limits takes Limits, not []"),
        ({"limits": {"forbidden": ["HardSwish"]}}, "forbidden takes a mapping, not ['HardSwish']"),
        ({"limits": {"forbidden": {"hardswish": "no"}}}, "limits.forbidden has 'hardswish', which"),
        ({"limits": {"slow": {"shuffle5d": "no"}}}, "(known: channel-shuffle, depthwise-conv, "),
        ({"limits": {"slow": {"silu": " "}}}, "limits.slow.silu needs its reason"),
        (
            {"limits": {"slow": {"silu": "a"}, "forbidden": {"silu": "b"}}},
            "limits has silu as forbidden and as slow; choose one",
        ),
        ({"limits": {"weight_bits": 4}}, "limits.weight_bits is 4, allowed are 7 and 8"),
        ({"limits": {"channel_multiple": 0}}, "limits.channel_multiple is 0; it is a whole number"),
        ({"limits": {"opset_max": -1}}, "limits.opset_max is -1; it is a whole number above 0"),
        ({"limits": {"opset_max": "11"}}, "opset_max takes int, not '11'"),
        ({"limits": {"static_shapes": "yes"}}, "static_shapes takes bool, not 'yes'"),
        (
            {"limits": {"quantization": "per-layer"}},
            "limits.quantization has 'per-layer', allowed are per-tensor, per-channel",
        ),
        ({"limits": {"leaky_relu_slopes": []}}, "limits.leaky_relu_slopes is []; it lists slopes"),
        ({"limits": {"leaky_relu_slopes": [-0.1]}}, "limits.leaky_relu_slopes is [-0.1]; it lists"),
        ({"precisions": []}, "precisions need at least one entry"),
        ({"runtimes": None}, "runtimes is missing; required are kind, precisions, runtimes, title"),
        ({"generation": "Ampere GA102"}, "generation is 'Ampere GA102'; it is a slug such as"),
        ({"generation": ""}, "generation is ''; it is a slug such as ampere or cortex-a76"),
        ({"units": 4.5}, "units takes int, not 4.5"),
        ({"units": 0, "sources": {"units": "x"}}, "units is 0; a physical fact is a number above"),
        ({"clock_ghz": "1.5 GHz"}, "clock_ghz takes float without a unit (the unit is in the key)"),
        (
            {
                "sustained_tera_ops_per_s": {"amp": 1.0},
                "sources": {"sustained_tera_ops_per_s": "x"},
            },
            "sustained_tera_ops_per_s has 'amp', allowed are fp32, tf32, bf16, fp16, int8",
        ),
        ({"batch": {"min": 4, "opt": 2}}, "batch needs 1 <= min <= opt <= max"),
        ({"batch": {"min": 0}}, "batch needs 1 <= min"),
    ],
)
def test_a_mistake_is_refused_with_the_key_and_what_is_allowed(write, changes, said):
    assert said in refusal(write(minimal(**changes)))


def test_a_key_that_is_no_text_is_refused(write):
    assert "unknown key '7' (known: batch, " in refusal(write("7: 1\n" + yaml.safe_dump(minimal())))


@pytest.mark.parametrize("key", PHYSICS)
def test_a_physical_fact_without_a_source_is_refused(write, key):
    values = {"compute_capability": "7.5", **{table: {"fp32": 8.1} for table in TABLES}}
    value = values.get(key, 70)
    said = refusal(write(minimal(**{key: value})))
    assert f"{key} is given without a source; add sources: {key}: ..." in said
    other = {"notes": "a source of something else"}
    assert "without a source" in refusal(write(minimal(**{key: value}, sources=other)))
    assert load_device(write(minimal(**{key: value}, sources={key: "data sheet"})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("forbidden", {"HardSwish": "none"}),
        ("slow", {"depthwise-conv": "memory-bound"}),
        ("channel_multiple", 8),
        ("opset_max", 11),
        ("static_shapes", True),
        ("quantization", "per-tensor"),
        ("leaky_relu_slopes", [0.1]),
    ],
)
def test_a_limit_without_a_source_is_refused(write, key, value):
    said = refusal(write(minimal(limits={key: value})))
    assert f"limits.{key} is given without a source; add sources: limits.{key}: ..." in said
    sources = {f"limits.{key}": "data sheet"}
    device = load_device(write(minimal(limits={key: value}, sources=sources)))
    assert device.limits.given() == (key,)


def test_every_pattern_can_be_a_limit_and_no_limit_needs_no_source(write):
    reasons = dict.fromkeys([*PATTERNS, "Sigmoid"], "slow here")
    device = load_device(write(minimal(limits={"slow": reasons}, sources={"limits.slow": "me"})))
    assert set(device.limits.slow) == {*PATTERNS, "Sigmoid"}
    empty = {"slow": {}, "forbidden": {}, "static_shapes": False}
    assert load_device(write(minimal(limits=empty))).limits == Limits()


@pytest.mark.parametrize("text", ["title: [", "a: b: c", "\ttitle: x", "title: 'open", "%YAML 9"])
def test_what_is_not_yaml_is_refused(write, text):
    assert "is not YAML" in refusal(write(text))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- b\n", "word", "42", "null"])
def test_a_file_without_keys_is_refused_with_an_example(write, text):
    assert "holds no keys; see recipes/devices/t4.yaml for the form" in refusal(write(text))


def test_yaml_that_would_execute_code_is_refused(write, tmp_path):
    proof = tmp_path / "executed"
    assert "is not YAML" in refusal(write(f"title: !!python/object/apply:os.mkdir ['{proof}']"))
    assert not proof.exists()


def test_a_binary_file_is_refused(write):
    refusal(write(b"\xff\xfe\x00title"))


def test_a_name_other_than_the_file_is_refused(write):
    assert "name" in refusal(write(minimal(name="other")))


@pytest.mark.parametrize("value", [0, -320, float("nan"), float("inf")])
def test_physics_that_cannot_be_is_refused(write, value):
    sources = {"memory_gb_per_s": "data sheet"}
    assert "memory_gb_per_s" in refusal(write(minimal(memory_gb_per_s=value, sources=sources)))


def test_a_key_given_twice_is_refused(write):
    text = yaml.safe_dump(minimal(workspace_mib=1)) + "workspace_mib: 2\n"
    assert "workspace_mib" in refusal(write(text))


def test_an_absent_precision_is_refused_with_those_it_has():
    with pytest.raises(UsageError, match=r"t4 has no bf16; it has int8\+fp16, fp16, fp32"):
        get_device("t4").select_precisions("bf16")


# ----------------------------------------------------------------------- without a runtime


def test_a_device_needs_no_runtime_and_then_says_what_to_type_instead(write):
    device = load_device(write(minimal(kind="npu", runtimes=[], title="A chip"), name="chip"))
    said = r"litezoo has no runtime for chip \(A chip\): .* litezoo export MODEL --device npu-int8$"
    with pytest.raises(MissingError, match=said) as caught:
        device.need_runtime()
    assert caught.value.exit_status == 4
    load_device(write(minimal())).need_runtime()
    get_device("npu-int8").need_runtime()  # what the sentence names can be exported


def test_only_npus_have_no_runtime():
    without = [device for device in map(get_device, list_devices()) if not device.runtimes]
    assert {device.kind for device in without} == {"npu"}
    assert all("litezoo has no runtime for it" in " ".join(d.notes.split()) for d in without)


def test_an_export_for_a_device_without_a_runtime_is_refused_before_anything_is_loaded(tmp_path):
    exporter = pytest.importorskip("litezoo.export.exporter")
    with pytest.raises(MissingError, match=r"no runtime for hailo-8 \(Hailo-8\)"):
        exporter.export("no such model", device="hailo-8", weights="random", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ----------------------------------------------------------------------- a folder of one's own


def test_an_own_folder_adds_devices(write, tmp_path, monkeypatch):
    ours = list_devices()
    write(minimal(title="Mine"), name="my_board")
    monkeypatch.setenv("LITEZOO_DEVICES", str(tmp_path))
    assert list_devices() == ["my_board", *ours]
    assert get_device("my_board").title == "Mine"
    with pytest.raises(UsageError, match="unknown device 'my_bord'; did you mean 'my_board'"):
        get_device("my_bord")


def test_an_own_folder_overrides_devices(write, tmp_path, monkeypatch):
    write(minimal(title="My T4"), name="t4")
    monkeypatch.setenv("LITEZOO_DEVICES", str(tmp_path))
    assert get_device("t4").title == "My T4" and list_devices().count("t4") == 1
    monkeypatch.delenv("LITEZOO_DEVICES")
    assert get_device("t4").title != "My T4"


def test_the_first_of_several_folders_wins(tmp_path, monkeypatch):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        content = yaml.safe_dump(minimal(title=folder))
        (tmp_path / folder / "board.yaml").write_text(content, encoding="utf-8")
    both = os.pathsep.join(str(tmp_path / folder) for folder in ("first", "second"))
    monkeypatch.setenv("LITEZOO_DEVICES", both)
    assert get_device("board").title == "first"


def test_a_mistake_in_an_own_file_is_refused_by_its_path(write, tmp_path, monkeypatch):
    file = write(minimal(kind="toaster"))
    monkeypatch.setenv("LITEZOO_DEVICES", str(tmp_path))
    with pytest.raises(UsageError, match=f"{file}: kind has 'toaster', allowed are cpu, gpu, npu"):
        get_device("board")


def test_an_unknown_device_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"'t44'; did you mean 't4'\? \(see: litezoo devices\)$"):
        get_device("t44")


def test_a_folder_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LITEZOO_DEVICES", str(tmp_path / "typo"))
    with pytest.raises(UsageError, match="typo"):
        get_device("t4")
