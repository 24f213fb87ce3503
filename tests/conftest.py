import gc
import hashlib
import os
import tempfile

import pytest

# read where torch loads OpenMP: ncnn's threads otherwise wait for each other in busy loops
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from litezoo.models.catalogue import get_spec, list_models


def pytest_configure(config):
    _keep_to_one_core(config)
    _write_onnx_once()


def _keep_to_one_core(config):
    """Give each parallel worker a core: runtimes then start one thread.

    Threads of ONNX Runtime and OpenVINO that wait for each other beside another worker on the
    same cores took more time than their work.
    """
    if hasattr(config, "workerinput") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        worker = int(config.workerinput["workerid"].removeprefix("gw"))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


def _write_onnx_once():
    """Write each network as ONNX once: the same weights for the same images share torch's work."""
    from litezoo.export import to_onnx

    export_onnx, made = to_onnx.export_onnx, {}

    def remember(model, images, **options):
        writer = (id(torch.onnx.export), to_onnx.OPSET)  # tests replace them
        key = hashlib.sha256(f"{writer} {images.shape} {sorted(options.items())}".encode())
        for name, module in model.named_modules():
            plain = (bool, int, float, str, tuple)
            flags = {k: v for k, v in vars(module).items() if isinstance(v, plain)}
            key.update(f"{name} {type(module).__qualname__} {flags}".encode())
        for name, value in model.state_dict().items():
            key.update(name.encode() + value.contiguous().numpy().tobytes())
        if key.digest() not in made:
            proto = export_onnx(model, images, **options)
            if proto.ByteSize() > 2**24:
                return proto
            made[key.digest()] = proto
        copy = type(made[key.digest()])()
        copy.CopyFrom(made[key.digest()])
        return copy

    to_onnx.export_onnx = remember


def pytest_collection_modifyitems(items):
    """Put the tests of a family together: networks are made once, by one parallel worker."""
    family = {name: get_spec(name).family for name in list_models()}

    def place(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return family.get(parameters.get("name"), "")

    items.sort(key=place)


def pytest_collection_finish():
    """What was imported stays: looking through it in every garbage collection takes minutes."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Python tidies up at its end as ever."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def tiny_model():
    """Have "repvgg_tiny" in the catalogue meanwhile."""
    from helpers import in_catalogue
    from test_train import TINY

    with in_catalogue(TINY):
        yield


@pytest.fixture(scope="module")
def for_cpu(tiny_model, tmp_path_factory):
    """Return the tiny run's artifact for this CPU."""
    from test_export import exported

    return exported(tmp_path_factory, "cpu")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors: OpenMP's waiting costs more than it gives (8 times, beside another job)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _batchnorm_on_meta():
    """On the meta device BatchNorm is dozens of Python operations: a third of a network's time.

    It keeps shape and dtype; where they do not fit its own, and in training and export, it is
    PyTorch's.
    """
    forward = torch.nn.BatchNorm2d.forward

    def keep(self, x):
        plain = type(x) is torch.Tensor and x.is_meta and not self.training
        plain = plain and torch._C._len_torch_dispatch_stack() == 0  # a tracer wants the operator
        if plain and x.ndim == 4 and x.shape[1] == self.num_features:
            if self.affine and self.track_running_stats and x.dtype == self.weight.dtype:
                return torch.empty_like(x)
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.BatchNorm2d, "forward", keep)
        yield


@pytest.fixture(scope="session", autouse=True)
def _scratch(tmp_path_factory):
    """What torch, inductor and killed processes leave as temporary files goes with pytest's.

    Inductor's cache is for all workers: its compiled headers take longer than a network's code.
    """
    folder, base = tmp_path_factory.mktemp("scratch"), tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(session / "inductor"))
        patch.setenv("TRITON_CACHE_DIR", str(session / "inductor" / "triton"))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture
def quiet(monkeypatch):
    """A machine on which nothing else runs, whatever else runs."""
    from litezoo.benchmarks import measure
    from litezoo.benchmarks.disturbance import Disturbance, Quiet

    none = Disturbance(seconds=0.2, cpus=(0,), foreign_share=0.0, steal_share=0.0)
    monkeypatch.setattr(
        measure, "run_quietly", lambda block: Quiet(value=block(), disturbance=none, tries=1)
    )


@pytest.fixture
def short(monkeypatch, quiet):
    """A protocol of measuring that takes an instant; the numbers are not looked at."""
    from litezoo.benchmarks import measure, publish

    for name in ("MOST_SPREAD", "MOST_INTERVAL"):
        monkeypatch.setattr(publish, name, float("inf"))
    values = {"BLOCK_S": 0.002, "IDLE_S": 0.0, "MIN_ROUNDS": 2, "MIN_SECONDS": 0.004}
    values |= {"MIN_RUNS": 4, "WARMUP_BLOCK_S": 0.001, "WARMUP_LIMIT_S": 0.005}
    values |= {"EMPTY_BLOCK_S": 1e-4}
    for name, value in values.items():
        monkeypatch.setattr(measure, name, value)


@pytest.fixture(autouse=True)
def _seeded():
    """Initial weights are drawn from the global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_extra_devices(monkeypatch):
    """A developer's own device folder is not under test."""
    monkeypatch.delenv("LITEZOO_DEVICES", raising=False)


def pytest_terminal_summary(terminalreporter):
    """Say how much of the zoo was compared with the libraries that have the same networks."""
    passed = [
        value
        for report in terminalreporter.stats.get("passed", ())
        for key, value in report.user_properties
        if key == "parity"
    ]
    if not passed:
        return
    counts = {library: len({n for n, lib in passed if lib == library}) for _, library in passed}
    failed = sum("test_parity" in r.nodeid for r in terminalreporter.stats.get("failed", ()))
    compared = ", ".join(f"{n} parity-checked against {lib}" for lib, n in sorted(counts.items()))
    verdict = "all exact" if not failed else f"{failed} parity tests FAILED"
    terminalreporter.write_line(f"litezoo: {len(list_models())} variants, {compared}, {verdict}")
