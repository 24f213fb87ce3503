"""TensorRT without TensorRT: names against the API lists, kits, and the main path on a fake.

`data/tensorrt_api_*.json` hold the names of the real bindings (no text of theirs), so a name that
one of the two versions lacks is found on a machine that has neither. The fake `tensorrt` is made
from the same lists: what is not in a list raises, and the numbers come from onnxruntime.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ml_dtypes = pytest.importorskip("ml_dtypes")

from litezoo.export import build_engine, runtime_tensorrt  # noqa: E402
from litezoo.export.build_engine import BuildOptions  # noqa: E402
from litezoo.export.kit import write_kit  # noqa: E402
from litezoo.export.runtime import BuildSource, Runtime, get_runtime  # noqa: E402
from litezoo.export.to_half import Half, Io, to_half  # noqa: E402
from litezoo.export.to_int8 import quantize  # noqa: E402
from litezoo.models.errors import CheckFailed, MissingError, UsageError  # noqa: E402
from litezoo.recipes.devices import Batch, get_device  # noqa: E402

VERSIONS = ("10.16", "11.4")
DATA = Path(__file__).parent / "data"
SOURCES = (Path(build_engine.__file__), Path(runtime_tensorrt.__file__))
NEEDS_TENSORRT = "runtime 'tensorrt' needs tensorrt: pip install 'litezoo[tensorrt]'"
T4 = get_device("t4")
SETTINGS = dataclasses.fields(build_engine.Settings)


# --- a check of names against the API lists ------------------------------------------------------


class Api:
    """One API list: what a class has, its bases included."""

    def __init__(self, version: str) -> None:
        values = json.loads((DATA / f"tensorrt_api_{version}.json").read_text())
        self.version, self.classes = values["version"], dict(values["classes"])
        self.functions, self.constants = values["functions"], set(values["constants"])
        for name, entry in values["classes"].items():
            for inner, nested in entry.get("nested", {}).items():
                if isinstance(nested, dict):
                    self.classes[f"{name}.{inner}"] = nested

    def find(self, cls: str, section: str, name: str) -> Any:
        """Return (found, value) of a member; a list's members have no value."""
        entry = self.classes[cls]
        members = entry.get(section, {})
        if name in members:
            return True, members[name] if isinstance(members, dict) else None
        for base in entry.get("bases", []):
            if base in self.classes and (found := self.find(base, section, name))[0]:
                return found
        return False, None


class Checker:
    """Follows TensorRT objects through one source file and lists what `api` does not have.

    The module is what is called `trt`. A thing's type is ("module",), ("class", C),
    ("object", C), ("method", C, name), ("function", name) or None for unknown.
    """

    def __init__(self, source: str, api: Api) -> None:
        self.api, self.tree = api, ast.parse(source)
        self.types: dict[tuple[str, str], Any] = {}
        self.problems: dict[str, None] = {}
        self.seen: set[str] = set()
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}
        self.scopes: dict[ast.AST, str] = {}
        self._name_scopes(self.tree, "")
        while True:  # until nothing new is learned about any variable
            known = len(self.types)
            for node in ast.walk(self.tree):
                self._learn(node)
            if len(self.types) == known:
                break
        for node in ast.walk(self.tree):
            self._check(node)

    def _name_scopes(self, node: ast.AST, scope: str) -> None:
        for child in ast.iter_child_nodes(node):
            self.scopes[child] = scope
            inside = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            self._name_scopes(child, child.name if inside else scope)  # type: ignore[attr-defined]

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if function := self.functions.get(node.func.id):
                names = [argument.arg for argument in function.args.args]
                pairs = [*zip(names, node.args, strict=False)]
                pairs += [(keyword.arg or "", keyword.value) for keyword in node.keywords]
                for name, value in pairs:
                    if found := self.infer(value):
                        self.types.setdefault((function.name, name), found)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other)
        elif found := self.infer(value):
            if isinstance(target, ast.Name):
                self.types.setdefault((self.scopes[target], target.id), found)
            elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                self.types.setdefault(("self", target.attr), found)

    def infer(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id == "trt":
                return ("module",)
            return self.types.get((self.scopes[node], node.id))
        if isinstance(node, ast.Attribute):
            if node.attr == "trt":
                return ("module",)
            if ast.unparse(node.value) == "self" and ("self", node.attr) in self.types:
                return self.types["self", node.attr]
            return self._member(self.infer(node.value), node.attr)[1]
        if isinstance(node, ast.Call) and (called := self.infer(node.func)):
            if called[0] == "class":
                return ("object", called[1])
            if called[0] == "method":
                returned = self.api.find(called[1], "returns", called[2])[1]
                return ("object", returned) if returned in self.api.classes else None
        return None

    def _member(self, owner: Any, name: str) -> tuple[bool, Any]:
        """Return (does it exist, its type) of a member."""
        api = self.api
        if owner is None or owner[0] in ("method", "function"):
            return True, None
        if owner == ("module",):
            if name in api.classes:
                return True, ("class", name)
            if name in api.functions:
                return True, ("function", name)
            return name in api.constants or name == "__version__", None
        cls = owner[1]
        if f"{cls}.{name}" in api.classes:
            return True, ("class", f"{cls}.{name}")
        if api.find(cls, "methods", name)[0]:
            return True, ("method", cls, name)
        sections = ["properties", "constants", "enum", "nested"]
        return any(api.find(cls, section, name)[0] for section in sections), None

    def _say(self, node: Any, words: str) -> None:
        self.problems[f"line {node.lineno}: {words} (TensorRT {self.api.version})"] = None

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Attribute):
            owner = self.infer(node.value)
            named = ".".join(["trt", *owner[1:], node.attr]) if owner else ""
            if not self._member(owner, node.attr)[0]:
                self._say(node, f"there is no {named}")
            elif owner:
                self.seen.add(named)
        elif isinstance(node, ast.Call) and (called := self.infer(node.func)):
            self._check_call(node, called)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if (found := self.infer(base)) and found[0] == "class":
                    self._check_overrides(node, found[1])

    def _check_call(self, node: ast.Call, called: Any) -> None:
        if called[0] == "function":
            named, keywords = called[1], self.api.functions[called[1]]
        elif called[0] in ("class", "method"):
            named = called[2] if called[0] == "method" else "__init__"
            keywords = self.api.find(called[1], "methods", named)[1]
        else:
            return
        given = [keyword.arg for keyword in node.keywords if keyword.arg]
        inner = any(isinstance(a, ast.Starred) for a in node.args)
        subclass = bool(node.args) and ast.unparse(node.args[0]) == "self"  # Base.__init__(self)
        count = len(node.args) - (called[0] == "method" and subclass)
        if keywords is None or inner:
            return
        for name in set(given) - set(keywords):
            self._say(node, f"{'.'.join(called[1:])} takes no {name}=, it takes {keywords}")
        if set(given) <= set(keywords) and count + len(given) > len(keywords):
            self._say(node, f"{'.'.join(called[1:])} takes {len(keywords)} arguments at most")

    def _check_overrides(self, node: ast.ClassDef, base: str) -> None:
        for method in node.body:
            if not isinstance(method, ast.FunctionDef) or method.name.startswith("__"):
                continue
            found, keywords = self.api.find(base, "methods", method.name)
            if not found:
                self._say(method, f"there is no trt.{base}.{method.name} to override")
            elif keywords is not None and len(method.args.args) - 1 != len(keywords):
                self._say(method, f"trt.{base}.{method.name} is called with {keywords}")
            self.seen.add(f"trt.{base}.{method.name}")


def find_problems(source: str, version: str) -> list[str]:
    return list(Checker(source, Api(version)).problems)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_every_tensorrt_name_we_use_is_in_both_versions(file: Path, version: str) -> None:
    assert find_problems(file.read_text(), version) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_check_sees_what_build_engine_calls(version: str) -> None:
    seen = Checker(SOURCES[0].read_text(), Api(version)).seen
    called = """
        trt.Builder trt.Runtime trt.OnnxParser trt.BuilderFlag.TF32 trt.MemoryPoolType.WORKSPACE
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED trt.Logger.WARNING trt.DataType.FLOAT
        trt.DataType.HALF trt.DataType.BF16
        trt.Builder.create_network trt.Builder.create_builder_config
        trt.Builder.build_serialized_network trt.Builder.create_optimization_profile
        trt.OnnxParser.parse_from_file trt.OnnxParser.num_errors trt.OnnxParser.get_error
        trt.ParserError.node trt.ParserError.node_name trt.ParserError.node_operator
        trt.ParserError.desc trt.IBuilderConfig.set_memory_pool_limit
        trt.IBuilderConfig.clear_flag trt.IBuilderConfig.profiling_verbosity
        trt.IBuilderConfig.progress_monitor trt.IBuilderConfig.avg_timing_iterations
        trt.IBuilderConfig.add_optimization_profile trt.IOptimizationProfile.set_shape
        trt.INetworkDefinition.get_input trt.INetworkDefinition.num_outputs trt.ITensor.shape
        trt.Runtime.deserialize_cuda_engine trt.ICudaEngine.create_execution_context
        trt.ICudaEngine.get_tensor_profile_shape trt.ICudaEngine.get_tensor_mode
        trt.IExecutionContext.set_input_shape trt.IExecutionContext.infer_shapes
        trt.IExecutionContext.set_tensor_address trt.IExecutionContext.execute_async_v3
        trt.ILogger.log trt.IProgressMonitor.step_complete trt.IProgressMonitor.phase_start
        trt.HardwareCompatibilityLevel.AMPERE_PLUS trt.HardwareCompatibilityLevel.NONE
        trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY trt.BuilderFlag.VERSION_COMPATIBLE
        trt.IBuilderConfig.hardware_compatibility_level trt.IBuilderConfig.set_flag
        trt.IBuilderConfig.builder_optimization_level trt.IBuilderConfig.create_timing_cache
        trt.IBuilderConfig.set_timing_cache trt.IBuilderConfig.get_timing_cache
        trt.ITimingCache.serialize trt.Runtime.engine_host_code_allowed
        trt.IProfiler.report_layer_time trt.IExecutionContext.profiler
        trt.IExecutionContext.enqueue_emits_profile trt.IExecutionContext.report_to_profiler
        trt.ICudaEngine.create_engine_inspector trt.EngineInspector.execution_context
        trt.EngineInspector.get_engine_information trt.LayerInformationFormat.JSON
        """
    assert set(called.split()) - seen == set()


MISTAKES = {
    "removed flag": ("trt.BuilderFlag.FP16", "no trt.BuilderFlag.FP16"),
    "removed creation flag": ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "EXPLICIT_BATCH"),
    "unknown class": ("trt.Bilder(logger)", "no trt.Bilder"),
    "misspelt method": ("config.set_memory_pool_limits(1, 2)", "set_memory_pool_limits"),
    "misspelt property": ("config.profiling_verbose = 1", "profiling_verbose"),
    "unknown keyword": ("builder.create_network(flag=1)", "takes no flag="),
    "too many arguments": ("builder.create_network(1, 2)", "takes 1 arguments at most"),
    "wrong constructor": ("trt.Runtime(logger, plan=1)", "takes no plan="),
    "method of a result": ("builder.create_network(1).get_inputs(0)", "get_inputs"),
    "in a helper": ("helper(config)", "int8_calibrator"),
    "override": ("class M(trt.IProgressMonitor):\n        def step(self): ...", "Monitor.step"),
    "override's arguments": ("class M(trt.ILogger):\n        def log(self, a): ...", "is called"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_check_fails_on_each_kind_of_mistake(mistake: str) -> None:
    code, words = MISTAKES[mistake]
    source = (
        "def helper(given):\n    given.int8_calibrator = None\n"
        "def build(logger):\n    builder = trt.Builder(logger)\n"
        f"    config = builder.create_builder_config()\n    {code}\n"
    )
    if mistake != "in a helper":
        source = source.replace("given.int8_calibrator = None", "pass")
    problems = find_problems(source, "11.4")
    assert len(problems) == 1 and words in problems[0], problems


def test_a_removed_flag_is_still_there_in_the_older_version() -> None:
    assert find_problems("trt.BuilderFlag.FP16", "10.16") == []
    assert len(find_problems("trt.BuilderFlag.FP16", "11.4")) == 1


def test_every_cuda_name_and_argument_count_is_that_of_cuda_python() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    used = set()
    for node in ast.walk(ast.parse(SOURCES[0].read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda"):
            used.add(node.attr)
            if ast.unparse(node.value) in ("cuda", "self._cuda"):
                assert hasattr(cuda, node.attr), node.attr
            elif node.attr.startswith("cudaMemcpy"):
                assert hasattr(cuda.cudaMemcpyKind, node.attr)
            elif node.attr.startswith("cudaStreamCaptureMode"):
                assert node.attr == "cudaStreamCaptureMode" or hasattr(
                    cuda.cudaStreamCaptureMode, node.attr
                )
            elif node.attr.startswith("cudaError"):
                assert hasattr(cuda.cudaError_t, node.attr), node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if (name := node.func.attr).startswith("cuda"):
                first = (getattr(cuda, name).__doc__ or "").partition("\n")[0]
                assert (found := re.match(r"\w+\((.*)\)", first)), first
                assert len(node.args) == len([a for a in found[1].split(",") if a.strip()]), first
    assert {"cudaMemcpyAsync", "cudaGetDeviceProperties", "cudaFree", "cudaErrorNoDevice"} <= used
    assert {"cudaStreamBeginCapture", "cudaGraphLaunch", "cudaGraphExecDestroy"} <= used


def test_the_builder_imports_only_numpy_and_runs_on_python_3_10() -> None:
    tree = ast.parse(SOURCES[0].read_text(), feature_version=(3, 10))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    packages = {str(name).partition(".")[0] for name in imported}
    assert packages - sys.stdlib_module_names == {"numpy"}


# --- a model, a kit and the fakes ----------------------------------------------------------------

FAKE_TENSORRT = r"""
import ctypes, enum, json, os
import ml_dtypes, numpy as np, onnxruntime

CONFIG = json.loads(os.environ["FAKE_TENSORRT"])
with open(CONFIG["api"]) as stream:
    API = json.load(stream)
__version__ = CONFIG.get("version", API["version"])
BUILT = []  # what each build was asked for


def open_session(content):
    if CONFIG.get("bf16"):  # of which onnxruntime has no kernels
        import onnx
        from litezoo.export.to_half import emulate_bf16
        content = emulate_bf16(onnx.load_from_string(content)).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def new(cls, /, **values):
    made = object.__new__(globals()[cls])
    made.__dict__.update(values)
    return made


def method_of(cls, name, keywords):
    def method(self, *args, **kwargs):
        if keywords is None:
            raise TypeError(f"{cls}: no constructor defined")
        if set(kwargs) - set(keywords) or len(args) + len(kwargs) > len(keywords):
            raise TypeError(f"{cls}.{name}(): incompatible function arguments {args} {kwargs}")
        if (cls, name) not in DOES:
            raise NotImplementedError(f"the fake has no {cls}.{name}")
        return DOES[cls, name](self, *args, **kwargs)

    return method


def class_of(name, entry):
    if "enum" in entry:
        return enum.IntEnum(name, entry["enum"])
    allowed = set(entry.get("properties", ()))
    body = {n: method_of(name, n, k) for n, k in entry.get("methods", {}).items()}
    for inner, nested in entry.get("nested", {}).items():
        if isinstance(nested, dict):
            body[inner] = class_of(inner, nested)
            body.update({c: getattr(body[inner], c) for c in entry.get("constants", ())})

    def set_property(self, key, value):
        if type(self).__module__ == __name__ and key not in allowed:
            raise AttributeError(f"{name} has no property {key}")
        self.__dict__[key] = value

    body["__setattr__"] = set_property
    bases = tuple(globals()[b] for b in entry.get("bases", ()) if b in globals())
    return type(name, bases, body)


DOES = {}
todo = dict(API["classes"])
while todo:
    for name, entry in list(todo.items()):
        if not set(entry.get("bases", ())) & set(todo):
            globals()[name] = class_of(name, todo.pop(name))

def does(function):
    cls, _, name = function.__name__.partition("_")
    DOES[cls, "__init__" if name == "init" else name] = function


@does
def ILogger_init(self): pass
@does
def IProgressMonitor_init(self): pass
@does
def Builder_init(self, logger):
    if CONFIG.get("no_builder"):
        logger.log(ILogger.Severity.INTERNAL_ERROR, "CUDA initialization\n failure")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    self.__dict__["logger"] = logger
@does
def Builder_create_network(self, flags=0):
    assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return new("INetworkDefinition", num_inputs=0, num_outputs=0)
@does
def Builder_create_builder_config(self):
    return new("IBuilderConfig", tf32=True, flagged=[], pools={}, profiles=[], cache=None,
               progress_monitor=None)
@does
def Builder_create_optimization_profile(self):
    return new("IOptimizationProfile", shapes={})
@does
def Builder_build_serialized_network(self, network, config):
    if config.progress_monitor:
        config.progress_monitor.phase_start("Building engine", None, 1)
        assert config.progress_monitor.step_complete("Building engine", 0) is True
        config.progress_monitor.phase_finish("Building engine")
    self.logger.log(ILogger.Severity.WARNING, "a warning")
    self.logger.log(ILogger.Severity.INFO, "not to be shown")
    if CONFIG.get("build_none"):
        self.logger.log(ILogger.Severity.ERROR, "no implementation for\nnode conv")
        return None
    [shapes] = config.profiles
    asked = {"shapes": shapes, "tf32": config.tf32, "pools": config.pools,
             "profiling": config.profiling_verbosity.name, "flags": config.flagged,
             "hardware": config.hardware_compatibility_level.name,
             "level": config.builder_optimization_level, "cache": config.cache and config.cache.got}
    BUILT.append(asked)
    plan = b"FAKE" + json.dumps(asked).encode() + b"\0" + network.content
    return new("IHostMemory", content=plan)
IHostMemory.__bytes__ = lambda self: self.content


@does
def OnnxParser_init(self, network, logger):
    self.__dict__.update(network=network, num_errors=0)
@does
def OnnxParser_parse_from_file(self, model):
    if CONFIG.get("parser_errors"):
        self.__dict__["num_errors"] = len(CONFIG["parser_errors"])
        return False
    with open(model, "rb") as stream:
        content = stream.read()
    session = open_session(content)
    self.network.__dict__.update(
        content=content, num_inputs=len(session.get_inputs()),
        num_outputs=len(session.get_outputs()),
        tensors=[session.get_inputs(), session.get_outputs()])
    return True
@does
def OnnxParser_get_error(self, index):
    return new("ParserError", values=CONFIG["parser_errors"][index])
for index, name in enumerate(("node", "node_name", "node_operator", "desc")):
    DOES["ParserError", name] = lambda self, index=index: self.values[index]


def tensor(value):
    return new("ITensor", name=value.name,
               shape=tuple(size if isinstance(size, int) else -1 for size in value.shape))
@does
def INetworkDefinition_get_input(self, index):
    return tensor(self.tensors[0][index])
@does
def INetworkDefinition_get_output(self, index):
    return tensor(self.tensors[1][index])
@does
def IBuilderConfig_set_memory_pool_limit(self, pool, pool_size):
    self.pools[pool.name] = pool_size
@does
def IBuilderConfig_clear_flag(self, flag):
    self.__dict__["tf32"] = self.tf32 and flag != BuilderFlag.TF32
@does
def IBuilderConfig_set_flag(self, flag):
    self.flagged.append(flag.name)
@does
def IBuilderConfig_create_timing_cache(self, serialized_timing_cache):
    return new("ITimingCache", got=serialized_timing_cache.decode())
@does
def IBuilderConfig_set_timing_cache(self, cache, ignore_mismatch):
    assert ignore_mismatch is False
    if CONFIG.get("no_cache") or cache.got and not cache.got.startswith(__version__):
        return False
    self.__dict__["cache"] = cache
    return True
@does
def IBuilderConfig_get_timing_cache(self):
    return self.cache
@does
def ITimingCache_serialize(self):
    return new("IHostMemory", content=(self.got or __version__).encode() + b" one build")
@does
def IBuilderConfig_add_optimization_profile(self, profile):
    if CONFIG.get("no_profile"):
        return -1
    self.profiles.append(profile.shapes)
    return 0
@does
def IOptimizationProfile_set_shape(self, input, min, opt, max):
    self.shapes[input] = [min, opt, max]


@does
def Runtime_init(self, logger):
    self.__dict__["logger"] = logger
@does
def Runtime_deserialize_cuda_engine(self, serialized_engine):
    if not serialized_engine.startswith(b"FAKE"):
        self.logger.log(ILogger.Severity.ERROR, "magicTag does not match")
        return None
    asked, _, content = serialized_engine[4:].partition(b"\0")
    if "VERSION_COMPATIBLE" in json.loads(asked)["flags"]:
        if not self.__dict__.get("engine_host_code_allowed"):
            self.logger.log(ILogger.Severity.ERROR, "host code is not allowed")
            return None
    session = open_session(content)
    names = [session.get_inputs()[0].name, session.get_outputs()[0].name]
    return new("ICudaEngine", num_io_tensors=2, names=names, session=session,
               profile=json.loads(asked)["shapes"])
@does
def ICudaEngine_get_tensor_name(self, index):
    return self.names[index]
@does
def ICudaEngine_get_tensor_mode(self, name):
    return (TensorIOMode.INPUT, TensorIOMode.OUTPUT)[self.names.index(name)]
@does
def ICudaEngine_get_tensor_dtype(self, name):
    return DataType[CONFIG.get("tensors", "FLOAT")]
@does
def ICudaEngine_get_tensor_profile_shape(self, name, profile_index):
    return self.profile[name]
@does
def ICudaEngine_create_execution_context(self):
    return new("IExecutionContext", of=self, addresses={}, shape=None, profiler=None)
@does
def ICudaEngine_create_engine_inspector(self):
    return new("EngineInspector", of=self)
@does
def EngineInspector_get_engine_information(self, format):
    assert format == LayerInformationFormat.JSON and self.execution_context.of is self.of
    return CONFIG.get("inspector", '{"Layers": [{"Name": "conv + relu"}], "I/O Tensors": []}')
@does
def IProfiler_init(self): pass
@does
def IExecutionContext_report_to_profiler(self):
    if CONFIG.get("no_profiler") or self.profiler is None:
        return False
    assert self.enqueue_emits_profile is False
    for name, ms in (("conv + relu", 0.3), ("pool", 0.1)):
        self.profiler.report_layer_time(name, ms)
    return True
@does
def IExecutionContext_set_input_shape(self, name, shape):
    low, _, high = self.of.profile[name]
    if len(shape) != 4 or not all(l <= s <= h for l, s, h in zip(low, shape, high)):
        return False
    self.__dict__["shape"] = shape
    return True
@does
def IExecutionContext_infer_shapes(self):
    return [] if self.shape else [self.of.names[0]]
@does
def IExecutionContext_get_tensor_shape(self, name):
    assert name == self.of.names[1]
    return (self.shape[0], self.of.session.get_outputs()[0].shape[1])
@does
def IExecutionContext_set_tensor_address(self, name, memory):
    self.addresses[name] = memory
    return name in self.of.names
@does
def IExecutionContext_execute_async_v3(self, stream_handle):
    import cuda.bindings.runtime as cudart
    assert isinstance(stream_handle, int) and stream_handle
    if cudart.CAPTURING:
        cudart.CAPTURING[0].append(lambda shape=self.shape: enqueue(self, shape))
        return not CONFIG.get("no_capture")
    return enqueue(self, self.shape)
def enqueue(self, shape):
    source, target = (self.addresses[name] for name in self.of.names)
    kind = CONFIG.get("tensors", "FLOAT")
    held = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    size = np.dtype(held).itemsize * int(np.prod(shape))
    images = np.frombuffer(ctypes.string_at(source, size), held).reshape(shape)
    wanted = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    images = images.astype(wanted[self.of.session.get_inputs()[0].type])
    [logits] = self.of.session.run(None, {self.of.names[0]: images})
    if len(images) == CONFIG.get("wrong_at_batch", len(images)):
        logits = logits + np.float32(CONFIG.get("wrong_by", 0))
    content = np.ascontiguousarray(logits, dtype=held).tobytes()
    ctypes.memmove(target, content, len(content))
    return not CONFIG.get("no_run")
"""

FAKE_CUDA = r"""
import ctypes, enum, json, os

CONFIG = json.loads(os.environ["FAKE_TENSORRT"])
GPUS = CONFIG.get("gpus", [["Tesla T4", 7, 5]])
DRIVER, RUNTIME = CONFIG.get("driver", 12020), CONFIG.get("runtime", 12090)
MEMORY, CURRENT, STREAMS = {}, [], []
CAPTURING, GRAPHS, LAUNCHES = [], {}, []  # what is being captured, what exists, what was replayed


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceProp:
    def __init__(self, name, major, minor):
        self.name, self.major, self.minor = name.encode(), major, minor


OK, BAD = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue
def cudaGetErrorString(error): return OK, error.name.encode()
def cudaDriverGetVersion(): return OK, DRIVER
def cudaGetDeviceCount():
    if DRIVER // 1000 < RUNTIME // 1000:
        return cudaError_t.cudaErrorInsufficientDriver, None
    return (OK, len(GPUS)) if GPUS else (cudaError_t.cudaErrorNoDevice, 0)
def cudaGetDeviceProperties(device): return OK, cudaDeviceProp(*GPUS[device])
def cudaSetDevice(device):
    CURRENT[:] = [device]
    return (OK,)
def cudaStreamCreate():
    STREAMS.append(7)
    return OK, 7
def cudaStreamSynchronize(stream): return (OK,)
def cudaStreamDestroy(stream):
    STREAMS.remove(stream)
    return (OK,)
def cudaStreamBeginCapture(stream, mode):
    assert mode == cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal and not CAPTURING
    CAPTURING.append([])
    return (OK,)
def cudaStreamEndCapture(stream):
    work = CAPTURING.pop()
    if CONFIG.get("no_graph"):
        return BAD, None
    GRAPHS["graph"] = work
    return OK, "graph"
def cudaGraphInstantiate(graph, flags):
    GRAPHS["exec"] = GRAPHS[graph]
    return OK, "exec"
def cudaGraphDestroy(graph):
    del GRAPHS[graph]
    return (OK,)
def cudaGraphExecDestroy(graphExec):
    return cudaGraphDestroy(graphExec)
def cudaGraphLaunch(graphExec, stream):
    LAUNCHES.append(graphExec)
    for work in GRAPHS[graphExec]:
        work()
    return (OK,)
def cudaMalloc(size):
    buffer = ctypes.create_string_buffer(size)
    MEMORY[ctypes.addressof(buffer)] = buffer
    return OK, ctypes.addressof(buffer)
def cudaFree(devPtr):
    del MEMORY[devPtr]
    return (OK,)
def cudaMemcpyAsync(dst, src, count, kind, stream):
    device = dst if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else src
    if CONFIG.get("copy_fails") or count > len(MEMORY[device]):
        return (BAD,)
    ctypes.memmove(dst, src, count)
    return (OK,)
"""


@dataclasses.dataclass
class Tiny:
    """A network of one convolution with the logits it should give."""

    onnx_file: Path
    images: np.ndarray
    logits: np.ndarray


def save_network(file: Path, *, batch: int | str = "batch", weight: np.ndarray) -> Path:
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", kinds.FLOAT, [batch, 3, 6, 8])],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, [batch, len(weight)])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), file)
    return file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return create_tiny(tmp_path_factory.mktemp("onnx"))


def create_tiny(folder: Path) -> Tiny:
    random = np.random.default_rng(0)
    weight = random.standard_normal((5, 3, 3, 3)).astype(np.float32)
    file = save_network(folder / "tiny.fp32.onnx", weight=weight)
    images = random.standard_normal((9, 3, 6, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return Tiny(file, images, session.run(None, {"input": images})[0])


def source_of(tiny: Tiny) -> BuildSource:
    return BuildSource(onnx=dict.fromkeys(("fp32", "fp16", "int8", "int8-fp16"), tiny.onnx_file))


INT8_T4 = dataclasses.replace(T4, precisions=("int8", "fp16", "fp32"))


def create_kit(folder: Path, tiny: Tiny, *precisions: str, triton: bool = False) -> Path:
    folder.mkdir()
    write_kit(
        folder,
        device=INT8_T4,
        triton=triton,
        model_name="tiny",
        onnx_files=dict.fromkeys(precisions or ("fp16", "fp32"), tiny.onnx_file),
        inputs=tiny.images,
        logits=tiny.logits,
    )
    kit = json.loads((folder / "kit.json").read_text())
    for entry in kit["engines"]:  # tests have no time to measure
        entry.update(warm_up_ms=0.0, seconds=0.0)
    (folder / "kit.json").write_text(json.dumps(kit))
    return folder


@pytest.fixture
def kit(tmp_path: Path, tiny: Tiny) -> Path:
    return create_kit(tmp_path / "kit", tiny)


Install = Callable[..., types.ModuleType]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Give a function that puts the fake modules in the place of tensorrt and cuda-python."""

    def install(**config: object) -> types.ModuleType:
        config["api"] = str(DATA / "tensorrt_api_11.4.json")
        monkeypatch.setenv("FAKE_TENSORRT", json.dumps(config))
        sources = {"tensorrt": FAKE_TENSORRT, "cuda.bindings.runtime": FAKE_CUDA}
        for name, source in {"cuda": "", "cuda.bindings": "", **sources}.items():
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(source, f"fake {name}", "exec"), module.__dict__)
        return sys.modules["tensorrt"]

    yield install


def without_tensorrt(folder: Path) -> dict[str, str]:
    """Return an environment in which `import tensorrt` fails as if it were not installed."""
    folder.mkdir()
    (folder / "tensorrt.py").write_text("raise ModuleNotFoundError('none', name='tensorrt')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def with_fakes(folder: Path, version: str) -> dict[str, str]:
    """Return an environment in which a script finds the fakes, and no litezoo."""
    (folder / "cuda" / "bindings").mkdir(parents=True)
    (folder / "tensorrt.py").write_text(FAKE_TENSORRT)
    (folder / "cuda" / "__init__.py").write_text("")
    (folder / "cuda" / "bindings" / "__init__.py").write_text("")
    (folder / "cuda" / "bindings" / "runtime.py").write_text(FAKE_CUDA)
    (folder / "litezoo.py").write_text("raise ImportError('the kit must not need litezoo')")
    api = DATA / f"tensorrt_api_{version}.json"
    config = json.dumps({"api": str(api)})
    return {**os.environ, "PYTHONPATH": str(folder), "FAKE_TENSORRT": config}


def run_script(kit: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(kit / "build_engine.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=kit, timeout=60)


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.name != "__pycache__"}


KIT_FILES = {
    "README.md",
    "build_engine.py",
    "expected.npz",
    "kit.json",
    "requirements.txt",
    "tiny.fp16.onnx",
    "tiny.fp32.onnx",
    "trtexec.sh",
}


# --- what is in a kit ----------------------------------------------------------------------------


def test_a_kit_has_its_files_with_right_hashes(tmp_path: Path, tiny: Tiny) -> None:
    written = write_kit(
        tmp_path,
        device=T4,
        model_name="tiny",
        onnx_files={"fp16": tiny.onnx_file, "fp32": tiny.onnx_file},
        inputs=tiny.images,
        logits=tiny.logits,
    )
    assert {file.name for file in written} == names_in(tmp_path) == KIT_FILES
    values = json.loads((tmp_path / "kit.json").read_text())
    assert set(values["files"]) == KIT_FILES - {"kit.json"}
    for name, digest in values["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert (tmp_path / "build_engine.py").read_bytes() == SOURCES[0].read_bytes()
    requirements = (tmp_path / "requirements.txt").read_text().splitlines()
    assert "tensorrt-cu12>=10.12,<12" in requirements and "numpy" in requirements
    fp16, fp32 = build_engine.read_kit(tmp_path).engines
    assert (fp16.precision, fp32.precision) == ("fp16", "fp32")
    assert fp16.shape(8) == (8, 3, 6, 8)
    assert (fp16.batch_min, fp16.batch_opt, fp16.batch_max) == (1, 8, 32)
    assert (fp16.compute_capability, fp16.title) == ("7.5", "NVIDIA T4")


def test_the_trtexec_script_is_valid_shell_and_says_what_we_build(kit: Path) -> None:
    script = kit / "trtexec.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    fp16, fp32 = build_engine.read_kit(kit).engines
    words = shlex.split(build_engine.trtexec_command(fp32))
    assert words[0] == "trtexec" and "--noTF32" in words and "--stronglyTyped" in words
    assert "--onnx=tiny.fp32.onnx" in words and "--memPoolSize=workspace:1024" in words
    assert "--minShapes=input:1x3x6x8" in words and "--maxShapes=input:32x3x6x8" in words
    assert "--noTF32" not in build_engine.trtexec_command(fp16)
    removed = {"--fp16", "--int8", "--bf16", "--fp8", "--int4", "--best", "--calib"}
    assert not removed & set(script.read_text().split())


def test_the_script_runs_each_trtexec_line_whole(kit: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$*"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run([kit / "trtexec.sh"], env=env, capture_output=True, text=True, check=True)
    wanted = [build_engine.trtexec_command(s) for s in build_engine.read_kit(kit).engines]
    lines = [line for line in done.stdout.splitlines() if line.startswith("--")]
    # the kit fixture shortened the seconds, after the script was written
    assert [re.sub(r"--(warmUp|duration)=\d+", "", line) for line in lines] == [
        re.sub(r"--(warmUp|duration)=\d+", "", line.removeprefix("trtexec ")) for line in wanted
    ]


def test_a_kit_is_refused_what_tensorrt_could_not_use(tmp_path: Path, tiny: Tiny) -> None:
    def write(**changes: Any) -> None:
        values: dict[str, Any] = {
            "device": T4,
            "model_name": "tiny",
            "onnx_files": {"fp16": tiny.onnx_file},
            "inputs": tiny.images,
            "logits": tiny.logits,
        }
        write_kit(tmp_path, **(values | changes))

    weight = np.zeros((5, 3, 3, 3), np.float32)
    outside = tmp_path.parent / "outside.onnx"
    onnx.save(onnx.load(tiny.onnx_file), outside, save_as_external_data=True, size_threshold=0)
    nothing = tmp_path.parent / "nothing.onnx"
    nothing.write_bytes(b"no onnx")
    fixed = save_network(tmp_path.parent / "fixed.onnx", batch=1, weight=weight)
    mistakes: dict[str, dict[str, Any]] = {
        "t4 has no bf16": {"onnx_files": {"bf16": tiny.onnx_file}},
        "at least one ONNX file": {"onnx_files": {}},
        "dynamic batch": {"onnx_files": {"fp16": fixed}},
        "external_data=False": {"onnx_files": {"fp16": outside}},
        "is no ONNX file": {"onnx_files": {"fp16": nothing}},
        "is not there": {"onnx_files": {"fp16": tmp_path / "absent.onnx"}},
        "logits \\(N, classes\\)": {"logits": tiny.logits[:-1]},
        "not \\('x', 'logits'": {"input_name": "x"},
        "must be finite": {"logits": tiny.logits * np.float32("nan")},
        "is no name for files": {"model_name": "../tiny"},
        "cpu has no compute_capability": {"device": get_device("cpu")},
    }
    for words, changes in mistakes.items():
        with pytest.raises(UsageError, match=words):
            write(**changes)
    assert names_in(tmp_path) == set()


# --- the kit's script on a machine that lacks something ------------------------------------------


def test_without_tensorrt_the_script_says_so_and_exits_4(kit: Path, tmp_path: Path) -> None:
    done = run_script(kit, env=without_tensorrt(tmp_path / "empty"))
    assert done.returncode == 4
    assert done.stderr == (
        "error: tensorrt is not installed here: python -m pip install -r requirements.txt\n"
    )
    assert names_in(kit) == KIT_FILES


def test_a_flipped_bit_exits_3_and_names_the_file(kit: Path, tmp_path: Path) -> None:
    file = kit / "tiny.fp16.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (kit / "trtexec.sh").unlink()
    env = without_tensorrt(tmp_path / "empty")
    done = run_script(kit, env=env)
    assert done.returncode == 3 and "trtexec.sh is missing" in done.stderr
    (kit / "trtexec.sh").write_bytes(b"")
    done = run_script(kit, env=env)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "tiny.fp16.onnx, trtexec.sh differs from kit.json" in done.stderr


def test_wrong_usage_exits_2(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_engine.main(["--kit", str(kit), "--precision", "int8"]) == 2
    assert "this kit has no int8; it has fp16, fp32" in capsys.readouterr().err
    (kit / "kit.json").unlink()
    assert build_engine.main(["--kit", str(kit)]) == 2
    assert "has no kit.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        build_engine.main(["--wrong"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"engines": []},
        {"files": {}},
        {"engines": [{"precision": "fp16"}]},
        {"engines": [dict.fromkeys((f.name for f in SETTINGS), "8")]},
        {"expected": "other.npz"},
    ],
)
def test_a_spoilt_kit_json_exits_3(
    kit: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    values = json.loads((kit / "kit.json").read_text()) | change
    (kit / "kit.json").write_text(json.dumps(values))
    assert build_engine.main(["--kit", str(kit)]) == 3
    (kit / "kit.json").write_text("{")
    assert build_engine.main(["--kit", str(kit)]) == 3
    assert capsys.readouterr().err.count("kit.json cannot be used") == 2


MACHINES: dict[str, tuple[dict[str, object], str]] = {
    "another GPU": (
        {"gpus": [["NVIDIA H200", 9, 0]]},
        "this kit is for compute capability 7.5 (NVIDIA T4); the GPU here is NVIDIA H200 with 9.0",
    ),
    "no GPU": ({"gpus": []}, "no NVIDIA GPU is visible here"),
    "no driver": ({"driver": 0}, "no NVIDIA GPU is visible here"),
    "old driver": ({"driver": 11040}, "tensorrt-cu12 wheels needs driver 535 or newer"),
    "old driver for cuda-python": ({"runtime": 13000}, "'cuda-python>=12.6.1,<13'"),
    "old TensorRT": ({"version": "10.9.0.34"}, "TensorRT 10.9.0.34 is here, but t4 needs >=10.12"),
    "new TensorRT": ({"version": "12.0.0"}, "needs >=10.12,<12"),
    "stub": ({}, "without its libraries"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_that_does_not_fit_exits_4_with_one_sentence(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str], machine: str
) -> None:
    config, words = MACHINES[machine]
    trt: Any = fake(**config)
    trt.IS_STUB = machine == "stub"
    assert build_engine.main(["--kit", str(kit)]) == 4
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert names_in(kit) == KIT_FILES


def test_a_package_that_cannot_be_imported_is_named(
    fake: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    words = "runtime 'tensorrt' needs cuda-python: pip install 'litezoo[tensorrt]'"
    assert runtime_tensorrt.RUNTIME.missing(T4) == words


# --- the main path on the fake -------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_kit_builds_checks_and_measures_its_engines(
    kit: Path, tmp_path: Path, version: str
) -> None:
    env = with_fakes(tmp_path / "fakes", version)
    done = run_script(kit, env=env)
    assert done.returncode == 0, done.stderr
    full = Api(version).version
    plans = {f"tiny.{p}.sm75.trt{full}.plan" for p in ("fp16", "fp32")}
    layers = {name.replace(".plan", ".layers.json") for name in plans}
    assert names_in(kit) == KIT_FILES | plans | layers | {"result.json", "timing.cache"}
    result = json.loads((kit / "result.json").read_text())
    assert result["ok"] is True and result["failed"] == {}
    assert (result["device"], result["gpu"], result["tensorrt"]) == ("t4", "Tesla T4", full)
    assert result["compute_capability"] == "7.5" and result["driver_cuda"] == "12.2"
    for entry, precision in zip(result["engines"], ("fp16", "fp32"), strict=True):
        assert entry["precision"] == precision
        assert entry["engine_sha256"] == build_engine.sha256_of(kit / entry["engine"])
        assert entry["onnx_sha256"] == build_engine.sha256_of(kit / entry["onnx"])
        assert entry["parity"]["finite"] and entry["parity"]["batches"] == [1, 2, 7]
        assert entry["parity"]["images"] == 9 + 10 + 14
        assert entry["parity"]["max_relative_error"] < 1e-5
        assert [row["batch"] for row in entry["timings"]] == [1, 8, 32]
        for row in entry["timings"]:
            assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
            assert row["runs"] >= 10 and row["images_per_s"] > 0 and row["p50_with_copies_ms"] > 0
            assert row["cuda_graph"] is True and row["p50_without_graph_ms"] > 0
            assert row["seconds"] > 0 and row["spread"] >= 0
        told = json.loads((kit / entry["layers"]).read_text())
        assert [(time["name"], time["ms"]) for time in told["times"]] == [
            ("conv + relu", 0.3), ("pool", 0.1),
        ]  # fmt: skip
        assert sum(time["percent"] for time in told["times"]) == pytest.approx(100)
        assert told["timed"] == "replays of a CUDA graph" and told["batch"] == 8
        assert told["engine"]["Layers"] == [{"Name": "conv + relu"}]
    assert result["kit_sha256"] == build_engine.sha256_of(kit / "kit.json")
    assert result["image_shape"] == [3, 6, 8] and result["host"]["cores"] >= 1
    assert "images/s" in done.stdout and "a warning" in done.stdout
    assert "not to be shown" not in done.stdout
    assert "Traceback" not in done.stderr


def test_an_engine_is_built_as_the_settings_say(kit: Path, fake: Install) -> None:
    trt = fake()
    fp16, fp32 = build_engine.read_kit(kit).engines
    steps: list[str] = []
    for settings in (fp16, fp32):
        build_engine.build_plan(
            kit / settings.onnx, settings=settings, log=print, progress=steps.append
        )
    half, full = trt.BUILT
    assert (half["hardware"], half["flags"], half["level"]) == ("NONE", [], 3)
    assert half["shapes"] == {"input": [(1, 3, 6, 8), (8, 3, 6, 8), (32, 3, 6, 8)]}
    assert half["pools"] == {"WORKSPACE": 1024 * 2**20} and half["profiling"] == "DETAILED"
    assert (half["tf32"], full["tf32"]) == (True, False)
    assert steps == ["Building engine 1/1"] * 2


FAILURES: dict[str, tuple[dict[str, object], str]] = {
    "wrong logits": ({"wrong_by": 1.0}, "differs from the expected logits"),
    "wrong at one batch size": ({"wrong_by": 1.0, "wrong_at_batch": 7}, "relative error"),
    "not a number": ({"wrong_by": float("nan"), "wrong_at_batch": 2}, "not finite"),
    "no engine": ({"build_none": True}, "built no engine of tiny.fp32.onnx: no implementation for"),
    "parser errors": (
        {"parser_errors": [[3, "conv", "Conv", "bad\npads"], [5, "x", "Loop", "not supported"]]},
        "node 3 'conv' (Conv): bad pads; node 5 'x' (Loop): not supported",
    ),
    "no builder": ({"no_builder": True}, "cannot start on this GPU: CUDA initialization failure"),
    "no profile": ({"no_profile": True}, "refuses the batch sizes 1, 8, 32"),
    "8-bit tensors": ({"tensors": "INT8"}, "neither float32, float16 nor bfloat16"),
    "it does not run": ({"no_run": True}, "the engine did not run"),
    "a CUDA error": ({"copy_fails": True}, "CUDA error 1 (cudaErrorInvalidValue)"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_exits_3_and_leaves_no_engine(
    tmp_path: Path, tiny: Tiny, fake: Install, capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    config, words = FAILURES[failure]
    trt = fake(**config)
    kit = create_kit(tmp_path / "kit", tiny, "fp32")
    older = kit / f"tiny.fp32.sm75.trt{trt.__version__}.plan"
    older.write_bytes(b"of an earlier run")
    assert build_engine.main(["--kit", str(kit)]) == 3
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: fp32: ") and error.count("\n") == 1
    left = names_in(kit) - {"timing.cache"}  # what was measured before the failure stays
    assert left == KIT_FILES - {"tiny.fp16.onnx"} | {"result.json"}
    result = json.loads((kit / "result.json").read_text())
    assert (result["ok"], result["engines"]) == (False, [])
    assert words in result["failed"]["fp32"]


def test_an_engine_is_judged_by_relative_error_and_top1() -> None:
    def problem(logits: np.ndarray, expected: np.ndarray) -> str | None:
        parity = build_engine.compare_logits(logits, expected, precision="fp16", batches=[1])
        return parity.problem(build_engine.TOLERANCES["fp16"])

    logits = np.array([[1.0, 3.0, -2.0], [2.0, 0.0, 1.0]], np.float32)
    assert problem(logits * np.float32(1.001), logits) is None
    assert "relative error" in str(problem(logits + np.float32(0.1), logits))
    tie = np.array([[3.0, 3.001, 0.0]], np.float32)
    assert problem(tie[:, [1, 0, 2]], tie) is None
    ours, expected = np.full((2, 2, 1000), 10.0, np.float32)
    expected[:, 0], ours[0, 0], ours[1, 1] = 10.15, 10.15, 10.2
    assert problem(ours, expected) == "top-1 agrees for 50.0% of the images, not for all"


def test_the_other_precision_is_kept_when_one_fails(
    kit: Path, fake: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    real = build_engine.build_plan

    def build(onnx_file: Path, **options: Any) -> bytes:
        if options["settings"].precision == "fp16":
            raise build_engine.Failed("no")
        return real(onnx_file, **options)

    monkeypatch.setattr(build_engine, "build_plan", build)
    assert build_engine.main(["--kit", str(kit)]) == 3
    result = json.loads((kit / "result.json").read_text())
    assert result["failed"] == {"fp16": "no"}
    assert [entry["precision"] for entry in result["engines"]] == ["fp32"]
    assert [name for name in names_in(kit) if name.endswith(".plan")] == [
        result["engines"][0]["engine"]
    ]


# --- the runtime ---------------------------------------------------------------------------------


def test_without_tensorrt_the_runtime_says_what_to_type(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    runtime = get_runtime("tensorrt")
    assert isinstance(runtime, Runtime) and runtime.name == "tensorrt"
    assert runtime.missing(T4) == NEEDS_TENSORRT
    assert "tensorrt" not in runtime.versions()
    with pytest.raises(MissingError) as error:
        runtime.build(source_of(tiny), device=T4, precision="fp32", folder=tmp_path)
    assert str(error.value) == NEEDS_TENSORRT
    with pytest.raises(MissingError) as error:
        runtime.load([tmp_path / "a.fp32.sm75.trt11.4.0.106.plan"], device=T4, precision="fp32")
    assert str(error.value) == NEEDS_TENSORRT
    assert names_in(tmp_path) == set()


def test_the_runtime_builds_and_runs_batches_of_any_size(
    tiny: Tiny, tmp_path: Path, fake: Install
) -> None:
    trt, runtime = fake(), get_runtime("tensorrt")
    cuda: Any = sys.modules["cuda.bindings.runtime"]
    device = dataclasses.replace(T4, batch=Batch(min=2, opt=2, max=4))
    assert runtime.missing(device) is None
    assert runtime.versions()["tensorrt"] == trt.__version__
    files = runtime.build(source_of(tiny), device=device, precision="fp32", folder=tmp_path)
    assert [file.name for file in files] == ["tiny.fp32.sm75.trt11.4.0.106.plan"]
    session = runtime.load([tmp_path / "manifest.json", *files], device=device, precision="fp32")
    for count in (9, 1, 4, 2):  # 9 = 4 + 4 + 1, and 1 is below the smallest batch
        logits = session.run(tiny.images[:count])
        assert logits.shape == (count, 5) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, tiny.logits[:count], rtol=1e-5, atol=1e-6)
    assert session.run(tiny.images[:0]).shape == (0, 5)
    np.testing.assert_allclose(  # not contiguous
        session.run(tiny.images[::2]), tiny.logits[::2], rtol=1e-5, atol=1e-6
    )
    doubles: Any = tiny.images.astype(np.float64)
    for wrong in (tiny.images[0], tiny.images[:, :1], doubles):
        with pytest.raises(UsageError, match=r"takes float32 of shape \(N, 3, 6, 8\)"):
            session.run(wrong)
    assert len(cuda.MEMORY) == 2 and cuda.STREAMS
    for _ in range(3):  # the second is captured, the third a replay
        logits = session.run(tiny.images[4:8])
        np.testing.assert_allclose(logits, tiny.logits[4:8], rtol=1e-5, atol=1e-6)
    assert cuda.LAUNCHES and list(cuda.GRAPHS) == ["exec"]
    del session
    assert not cuda.MEMORY and not cuda.STREAMS and not cuda.GRAPHS


@pytest.mark.parametrize("tensors, half", [("HALF", "fp16"), ("BF16", "bf16")])
@pytest.mark.parametrize("io", ["fp32", "half"])
def test_an_engine_whose_ends_are_16_bit_floats_takes_and_gives_float32(
    tiny: Tiny, tmp_path: Path, fake: Install, tensors: str, half: Half, io: Io
) -> None:
    fake(tensors=tensors, bf16=half == "bf16")
    cuda: Any = sys.modules["cuda.bindings.runtime"]
    file = tmp_path / "tiny.fp16.onnx"
    onnx.save(to_half(onnx.load(tiny.onnx_file), half, io=io), file)
    runtime = get_runtime("tensorrt")
    device = dataclasses.replace(T4, batch=Batch(min=2, opt=2, max=4))
    source = BuildSource(onnx={"fp16": file})
    files = runtime.build(source, device=device, precision="fp16", folder=tmp_path)
    session = runtime.load(files, device=device, precision="fp16")
    assert sorted(map(len, cuda.MEMORY.values())) == [2 * 4 * 5, 2 * 4 * 3 * 6 * 8]
    for count in (9, 1, 4):
        logits = session.run(tiny.images[:count])
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, tiny.logits[:count], rtol=0.05, atol=0.02)


def test_a_kit_of_files_with_16_bit_ends_is_built_and_measured(
    tmp_path: Path, tiny: Tiny, fake: Install
) -> None:
    fake(tensors="HALF")
    file = tmp_path / "half.onnx"
    onnx.save(to_half(onnx.load(tiny.onnx_file), "fp16", io="half"), file)
    kit = create_kit(tmp_path / "kit", dataclasses.replace(tiny, onnx_file=file), "fp16")
    assert build_engine.main(["--kit", str(kit)]) == 0
    [engine] = json.loads((kit / "result.json").read_text())["engines"]
    assert 0 < engine["parity"]["max_relative_error"] < 0.01 and engine["timings"]


@given(arrays.arrays(np.float32, st.integers(0, 9), elements=st.floats(width=32)))
def test_values_are_held_as_ml_dtypes_rounds_them(values: np.ndarray) -> None:
    kinds = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    for kind, dtype in kinds.items():
        with np.errstate(over="ignore"):
            wanted = values.astype(dtype).astype(np.float32)
        held = build_engine.encode(values, kind)
        assert held.nbytes == values.size * np.dtype(dtype).itemsize
        np.testing.assert_array_equal(build_engine.decode(held, kind), wanted)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_what_is_no_number_stays_so_in_bfloat16(bits: int) -> None:
    values = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(build_engine.decode(build_engine.encode(values, "bf16"), "bf16")).all()


def test_the_gpu_of_the_right_kind_is_chosen(fake: Install) -> None:
    fake(gpus=[["NVIDIA H200", 9, 0], ["Tesla T4", 7, 5]])
    assert get_runtime("tensorrt").missing(T4) is None
    assert sys.modules["cuda.bindings.runtime"].CURRENT == [1]


def test_an_engine_of_another_machine_is_refused_in_words(
    tiny: Tiny, tmp_path: Path, fake: Install
) -> None:
    fake()
    runtime = get_runtime("tensorrt")

    def load(name: str) -> None:
        runtime.load([tmp_path / name], device=T4, precision="fp16")

    with pytest.raises(UsageError, match=r"for compute capability 9\.0, but t4 has 7\.5"):
        load("a.fp16.sm90.trt11.4.0.106.plan")
    with pytest.raises(MissingError, match=r"built by TensorRT 10\.16\.1\.11 .* is 11\.4\.0\.106"):
        load("a.fp16.sm75.trt10.16.1.11.plan")
    with pytest.raises(UsageError, match="does not say what it runs on"):
        load("a.plan")
    with pytest.raises(UsageError, match=r"one \.plan file, not 0: a\.onnx"):
        load("a.onnx")
    with pytest.raises(UsageError, match=r"does not hold fp16; its precision is before \.sm"):
        load("a.int8-fp16.sm75.trt11.4.0.106.plan")
    (tmp_path / "a.fp16.sm75.trt11.4.0.106.plan").write_bytes(b"damaged")
    with pytest.raises(CheckFailed, match="cannot load this engine"):
        load("a.fp16.sm75.trt11.4.0.106.plan")
    fake(gpus=[["NVIDIA A10", 8, 6]])
    with pytest.raises(MissingError, match=r"plan needs compute capability 7\.5 .* A10 with 8\.6"):
        load("a.fp16.sm75.trt11.4.0.106.plan")
    fake(parser_errors=[[0, "conv", "Conv", "bad"]])
    with pytest.raises(CheckFailed, match=r"node 0 'conv' \(Conv\): bad"):
        runtime.build(source_of(tiny), device=T4, precision="fp16", folder=tmp_path)


def test_a_network_with_other_names_is_refused_by_the_builder(kit: Path, fake: Install) -> None:
    fake()
    settings = build_engine.read_kit(kit).engines[0]
    for change in ({"input_name": "x"}, {"height": 7}, {"output_name": "y"}):
        with pytest.raises(build_engine.Failed, match="wanted is"):
            build_engine.build_plan(
                kit / settings.onnx, settings=dataclasses.replace(settings, **change), log=print
            )


# --- precisions, options and what lies beside an engine ------------------------------------------


def test_an_int8_engine_is_compared_with_what_its_own_file_gives(
    tmp_path: Path, tiny: Tiny, fake: Install
) -> None:
    fake()
    weight = onnx.numpy_helper.to_array(onnx.load(tiny.onnx_file).graph.initializer[0])
    coarse = save_network(tmp_path / "coarse.onnx", weight=np.round(weight))  # far from fp32
    kit = tmp_path / "kit"
    kit.mkdir()
    files = {"int8+fp16": coarse, "int8": coarse}
    write_kit(
        kit,
        device=INT8_T4,
        model_name="tiny",
        onnx_files=files,
        inputs=tiny.images,
        logits=tiny.logits,
    )
    assert {"tiny.int8.onnx", "tiny.int8-fp16.onnx"} <= names_in(kit)
    assert build_engine.main(["--kit", str(kit), "--seconds", "0"]) == 0
    entries = json.loads((kit / "result.json").read_text())["engines"]
    assert [entry["engine"] for entry in entries] == [
        "tiny.int8-fp16.sm75.trt11.4.0.106.plan",
        "tiny.int8.sm75.trt11.4.0.106.plan",
    ]
    assert all(entry["parity"]["max_relative_error"] < 1e-5 for entry in entries)
    with pytest.raises(build_engine.Failed, match="differs from the expected logits"):
        _make_with(kit, logits=tiny.logits)


def _make_with(kit: Path, *, logits: np.ndarray) -> None:
    settings = build_engine.read_kit(kit).engines[0]
    images, _ = build_engine.read_expected(kit / "expected.npz", settings)
    build_engine.make_engine(
        kit,
        settings=settings,
        environment=build_engine.find_environment(settings),
        images=images,
        expected=logits,
        log=print,
    )


def test_what_an_int8_file_gives_is_computed_as_it_is_written(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    real = onnxruntime.InferenceSession

    def open_session(file: object, options: Any = None, **others: Any) -> Any:
        levels.append(options and options.graph_optimization_level)
        return real(file, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    create_kit(tmp_path / "kit", tiny, "int8", "fp16")
    assert levels == [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL]


def test_int8_logits_that_are_not_finite_make_no_kit(tmp_path: Path, tiny: Tiny) -> None:
    broken = save_network(tmp_path / "a.onnx", weight=np.full((5, 3, 3, 3), np.nan, np.float32))
    with pytest.raises(CheckFailed, match="not finite; quantize it again"):
        write_kit(
            tmp_path,
            device=INT8_T4,
            model_name="tiny",
            onnx_files={"int8": broken},
            inputs=tiny.images,
            logits=tiny.logits,
        )


def test_every_form_of_tensorrt_has_a_tolerance_and_a_tie() -> None:
    forms = set(build_engine.FORMS)
    assert forms == set(build_engine.TOLERANCES) == set(build_engine.TIES)
    assert get_runtime("tensorrt").precisions == {
        "fp32": "fp32", "fp16": "fp16", "bf16": "bf16",
        "int8": "int8", "int8+fp16": "int8-fp16", "int8+bf16": "int8-bf16",
    }  # fmt: skip


A10 = get_device("a10")


def bf16_files(folder: Path, tiny: Tiny) -> dict[str, Path]:
    """Return the tiny network's bfloat16 file and one with a quantized convolution in bfloat16."""
    proto = onnx.load(tiny.onnx_file)
    images = np.random.default_rng(1).standard_normal((16, 3, 6, 8)).astype(np.float32)
    typed = {"bf16": proto, "int8+bf16": quantize(proto, images, form="int8", keep_float=[])}
    files = {}
    for precision, model in typed.items():
        files[precision] = folder / f"a.{build_engine.FORMS[precision]}.onnx"
        onnx.save(to_half(model, "bf16"), files[precision])
    return files


def test_bf16_engines_are_built_from_their_typed_files_and_compared(
    tmp_path: Path, tiny: Tiny, fake: Install
) -> None:
    trt = fake(bf16=True, gpus=[["NVIDIA A10", 8, 6]])
    kit = tmp_path / "kit"
    kit.mkdir()
    write_kit(
        kit,
        device=A10,
        model_name="tiny",
        onnx_files=bf16_files(tmp_path, tiny),
        inputs=tiny.images,
        logits=tiny.logits,
    )
    tolerances = {s.precision: s.tolerance for s in build_engine.read_kit(kit).engines}
    assert tolerances == {"bf16": 0.1, "int8+bf16": 0.1}
    assert build_engine.main(["--kit", str(kit), "--seconds", "0"]) == 0
    assert [built["tf32"] for built in trt.BUILT] == [True, True]
    entries = json.loads((kit / "result.json").read_text())["engines"]
    assert [entry["engine"] for entry in entries] == [
        "tiny.bf16.sm86.trt11.4.0.106.plan",
        "tiny.int8-bf16.sm86.trt11.4.0.106.plan",
    ]
    errors = {e["precision"]: e["parity"]["max_relative_error"] for e in entries}
    assert 1e-4 < errors["bf16"] < 2e-2  # of the float network: bfloat16's rounding shows
    assert errors["int8+bf16"] < 1e-5  # of the same file


def test_the_runtime_builds_and_loads_a_bf16_engine(
    tmp_path: Path, tiny: Tiny, fake: Install
) -> None:
    fake(bf16=True, gpus=[["NVIDIA A10", 8, 6]])
    runtime = get_runtime("tensorrt")
    source = BuildSource(onnx={"bf16": bf16_files(tmp_path, tiny)["bf16"]})
    files = runtime.build(source, device=A10, precision="bf16", folder=tmp_path)
    assert [file.name for file in files] == ["a.bf16.sm86.trt11.4.0.106.plan"]
    session = runtime.load(files, device=A10, precision="bf16")
    error = np.abs(session.run(tiny.images) - tiny.logits).max() / np.abs(tiny.logits).max()
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("precision", ["bf16", "int8+bf16"])
def test_a_gpu_before_ampere_is_given_no_bf16_engine(
    tmp_path: Path, tiny: Tiny, precision: str
) -> None:
    instead = precision.replace("bf16", "fp16")
    words = rf"need compute capability 8\.0 or more and .* has 7\.5; take {re.escape(instead)}"
    with pytest.raises(UsageError, match=words):
        write_kit(
            tmp_path,
            device=dataclasses.replace(T4, precisions=(precision,)),
            model_name="tiny",
            onnx_files={precision: tiny.onnx_file},
            inputs=tiny.images,
            logits=tiny.logits,
        )
    assert names_in(tmp_path) == set()


def test_the_options_reach_the_builder_and_the_name(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake()
    words = ["--version-compatible", "--hardware-compatibility", "same_compute_capability"]
    words += ["--optimization-level", "5", "--seconds", "0", "--precision", "fp16"]
    assert build_engine.main(["--kit", str(kit), *words]) == 0
    [built] = trt.BUILT
    assert built["flags"] == ["VERSION_COMPATIBLE"]
    assert (built["hardware"], built["level"]) == ("SAME_COMPUTE_CAPABILITY", 5)
    [entry] = json.loads((kit / "result.json").read_text())["engines"]
    assert entry["engine"] == "tiny.fp16.sm75.trt11.4.0.106.vc.plan"
    assert entry["options"] == {
        "hardware_compatibility": "same_compute_capability",
        "version_compatible": True,
        "optimization_level": 5,
    }
    fp16 = build_engine.read_kit(kit).engines[0]
    changed = dataclasses.replace(fp16, **entry["options"])
    line = build_engine.trtexec_command(changed)
    assert "--versionCompatible" in line and "--builderOptimizationLevel=5" in line
    assert "--hardwareCompatibilityLevel=sameComputeCapability" in line
    assert "--hardwareCompatibilityLevel" not in build_engine.trtexec_command(fp16)


OPTIONS = {
    "ampere_plus engines need compute capability 8.0 or more and NVIDIA T4 has 7.5": [
        "--hardware-compatibility",
        "ampere_plus",
    ],
    "hardware compatibility is none, same_compute_capability, ampere_plus, not turing": [
        "--hardware-compatibility",
        "turing",
    ],
    "optimization level goes from 0 to 5, not 6": ["--optimization-level", "6"],
    "this kit was made without Triton's configuration": ["--triton"],
}


@pytest.mark.parametrize("words", OPTIONS)
def test_an_option_that_cannot_be_exits_2(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    fake()
    assert build_engine.main(["--kit", str(kit), *OPTIONS[words]]) == 2
    assert words in capsys.readouterr().err
    assert names_in(kit) == KIT_FILES


def test_a_kit_of_t4_is_not_made_for_ampere_plus(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="take none or same_compute_capability"):
        write_kit(
            tmp_path,
            device=T4,
            model_name="tiny",
            onnx_files={"fp16": tiny.onnx_file},
            inputs=tiny.images,
            logits=tiny.logits,
            options=BuildOptions(hardware_compatibility="ampere_plus"),
        )
    assert names_in(tmp_path) == set()


def test_the_timing_cache_is_kept_and_used_again(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake()
    assert build_engine.main(["--kit", str(kit)]) == 0
    assert [built["cache"] for built in trt.BUILT] == ["", "11.4.0.106 one build"]
    assert (kit / "timing.cache").read_bytes() == b"11.4.0.106 one build one build"
    assert "timing.cache" not in capsys.readouterr().out


def test_a_timing_cache_of_another_version_is_said_and_replaced(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = fake()
    (kit / "timing.cache").write_bytes(b"10.16 old")
    assert build_engine.main(["--kit", str(kit), "--precision", "fp16"]) == 0
    assert trt.BUILT[0]["cache"] == ""
    assert "timing.cache is of another GPU or TensorRT version" in capsys.readouterr().out
    assert (kit / "timing.cache").read_bytes() == b"11.4.0.106 one build"
    trt = fake(no_cache=True)
    assert build_engine.main(["--kit", str(kit), "--precision", "fp16"]) == 0
    assert trt.BUILT[0]["cache"] is None
    assert "takes no timing cache here" in capsys.readouterr().out


@pytest.mark.parametrize("config", [{"no_graph": True}, {"no_capture": True}])
def test_an_engine_that_cannot_be_captured_runs_without_a_graph(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str], config: dict[str, object]
) -> None:
    fake(**config)
    assert build_engine.main(["--kit", str(kit), "--precision", "fp32"]) == 0
    assert "runs without a CUDA graph" in capsys.readouterr().out
    [entry] = json.loads((kit / "result.json").read_text())["engines"]
    assert {row["cuda_graph"] for row in entry["timings"]} == {False}
    told = json.loads((kit / entry["layers"]).read_text())
    assert told["timed"] == "runs, no CUDA graph"
    assert not sys.modules["cuda.bindings.runtime"].GRAPHS


def test_a_replay_is_compared_too(tmp_path: Path, tiny: Tiny, fake: Install) -> None:
    fake()
    kit = create_kit(tmp_path / "kit", tiny, "fp32")
    cuda: Any = sys.modules["cuda.bindings.runtime"]
    launch = cuda.cudaGraphLaunch

    def spoilt(graph: object, stream: object) -> object:
        answer = launch(graph, stream)
        for buffer in cuda.MEMORY.values():
            if len(buffer) == 32 * 5 * 4:  # the logits
                buffer[:] = b"\0" * len(buffer)
        return answer

    cuda.cudaGraphLaunch = spoilt
    assert build_engine.main(["--kit", str(kit)]) == 3
    failed = json.loads((kit / "result.json").read_text())["failed"]
    assert "relative error" in failed["fp32"]


def test_an_engine_is_kept_where_its_layers_are_not_told(
    kit: Path, fake: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(no_profiler=True)
    assert build_engine.main(["--kit", str(kit), "--precision", "fp16"]) == 0
    assert "is kept without tiny.fp16.sm75" in (out := capsys.readouterr().out)
    assert "TensorRT reports no layer times" in out
    [entry] = json.loads((kit / "result.json").read_text())["engines"]
    assert entry["layers"] is None and (kit / entry["engine"]).is_file()
    fake(inspector="no JSON")
    assert build_engine.main(["--kit", str(kit), "--precision", "fp16"]) == 0
    [entry] = json.loads((kit / "result.json").read_text())["engines"]
    assert json.loads((kit / entry["layers"]).read_text())["engine"] == "no JSON"
    assert "is not JSON; it is kept as text" in capsys.readouterr().out


def test_layer_times_are_of_replays_only(kit: Path, fake: Install) -> None:
    trt = fake()
    settings = build_engine.read_kit(kit).engines[0]
    environment = build_engine.find_environment(settings)
    plan = build_engine.build_plan(kit / settings.onnx, settings=settings, log=print)
    images, _ = build_engine.read_expected(kit / "expected.npz", settings)
    reports: list[int] = []
    real = trt.IExecutionContext.report_to_profiler

    def report(context: Any) -> bool:  # the first two runs are no replays, and slow
        reports.append(len(sys.modules["cuda.bindings.runtime"].LAUNCHES))
        answer: bool = real(context)
        if len(reports) == 1:
            context.profiler.times["pool"][0] = 100.0
        return answer

    trt.IExecutionContext.report_to_profiler = report
    told = build_engine.describe_layers(
        plan, settings=settings, environment=environment, images=images, log=print, runs=1
    )
    assert reports == [0, 1, 2]
    assert [time["ms"] for time in told["times"]] == [0.3, 0.1]


def test_a_device_may_ask_for_a_newer_driver_than_the_wheels(tiny: Tiny, fake: Install) -> None:
    fake()
    newer = dataclasses.replace(T4, toolchain={**T4.toolchain, "driver": ">=580"})
    assert "needs driver 580 or newer (CUDA 13.0)" in str(get_runtime("tensorrt").missing(newer))
    wrong = dataclasses.replace(T4, toolchain={**T4.toolchain, "driver": "535"})
    assert "driver has the form '>=535'" in str(get_runtime("tensorrt").missing(wrong))
    older = dataclasses.replace(T4, toolchain={**T4.toolchain, "driver": ">=400"})
    assert runtime_tensorrt._create_target(older).driver_min == build_engine.DRIVER_MIN


def test_a_version_compatible_engine_runs_on_the_next_version_only_forward(
    tiny: Tiny, tmp_path: Path, fake: Install
) -> None:
    fake(version="10.16.1.11")
    runtime = runtime_tensorrt.TensorRT(options=BuildOptions(version_compatible=True))
    [file] = runtime.build(source_of(tiny), device=T4, precision="fp32", folder=tmp_path)
    assert file.name == "tiny.fp32.sm75.trt10.16.1.11.vc.plan"
    fake(version="11.4.0.106")
    session = get_runtime("tensorrt").load([file], device=T4, precision="fp32")
    np.testing.assert_allclose(session.run(tiny.images), tiny.logits, rtol=1e-5, atol=1e-6)
    fake(version="10.12.0.1")
    with pytest.raises(MissingError, match="runs on newer ones up to the next major"):
        get_runtime("tensorrt").load([file], device=T4, precision="fp32")


def test_the_code_in_a_plan_is_run_only_where_its_name_says_it_has_some(
    tiny: Tiny, tmp_path: Path, fake: Install
) -> None:
    fake()
    runtime = runtime_tensorrt.TensorRT(options=BuildOptions(version_compatible=True))
    [file] = runtime.build(source_of(tiny), device=T4, precision="fp32", folder=tmp_path)
    renamed = file.rename(tmp_path / file.name.replace(".vc", ""))
    with pytest.raises(CheckFailed, match="host code is not allowed"):
        runtime.load([renamed], device=T4, precision="fp32")


def test_an_ampere_plus_engine_names_the_gpus_that_take_it() -> None:
    options = BuildOptions(hardware_compatibility="ampere_plus")
    name = build_engine.engine_name(
        "a.fp16", compute_capability="8.6", tensorrt_version="11.4.0.106", options=options
    )
    named = build_engine.read_engine_name(name)
    assert [named.runs_on(sm) for sm in ("7.5", "8.0", "8.6", "9.0", "12.0")] == [
        False, True, True, True, True,
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"8\.6 and other GPUs from Ampere on, but t4 has 7\.5"):
        get_runtime("tensorrt").load([Path(name)], device=T4, precision="fp16")


VERSION_NUMBERS = st.lists(st.integers(0, 99), min_size=1, max_size=4).map(
    lambda numbers: ".".join(map(str, numbers))
)


@given(
    stem=st.from_regex(r"[a-z]\w{0,5}(\.(fp16|bf16|int8-fp16|int8-bf16))?", fullmatch=True),
    sm=st.tuples(st.integers(7, 12), st.integers(0, 9)),
    version=VERSION_NUMBERS,
    level=st.sampled_from(sorted(build_engine.HARDWARE_COMPATIBILITY)),
    compatible=st.booleans(),
)
def test_what_an_engines_name_says_is_read_back(
    stem: str, sm: tuple[int, int], version: str, level: str, compatible: bool
) -> None:
    capability = f"{sm[0]}.{sm[1]}"
    name = build_engine.engine_name(
        stem,
        compute_capability=capability,
        tensorrt_version=version,
        options=BuildOptions(hardware_compatibility=level, version_compatible=compatible),
    )
    named = build_engine.read_engine_name(name)
    assert named == build_engine.EngineName(
        stem=stem,
        compute_capability=capability,
        tensorrt_version=version,
        ampere_plus=level == "ampere_plus",
        version_compatible=compatible,
    )
    assert named.runs_with(version)


def test_the_runtime_names_what_it_cannot_build(tiny: Tiny, tmp_path: Path, fake: Install) -> None:
    fake()
    runtime = get_runtime("tensorrt")

    def build(precision: str, source: BuildSource) -> None:
        runtime.build(source, device=T4, precision=precision, folder=tmp_path)

    with pytest.raises(UsageError, match=r"builds fp32, fp16, bf16, .* so far, not tf32"):
        build("tf32", source_of(tiny))
    with pytest.raises(UsageError, match="there is no fp16 ONNX file; there is fp32"):
        build("fp16", BuildSource(onnx={"fp32": tiny.onnx_file}))
    no_int8 = dataclasses.replace(T4, precisions=("fp16",))
    with pytest.raises(UsageError, match="t4 has no int8"):
        runtime.build(source_of(tiny), device=no_int8, precision="int8+fp16", folder=tmp_path)
    assert names_in(tmp_path) == set()
