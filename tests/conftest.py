import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors: OpenMP's waiting costs more than it gives (8 times, beside another job)."""
    torch.set_num_threads(1)


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
    from litezoo.models.catalogue import list_models

    counts = {library: len({n for n, lib in passed if lib == library}) for _, library in passed}
    failed = sum("test_parity" in r.nodeid for r in terminalreporter.stats.get("failed", ()))
    compared = ", ".join(f"{n} parity-checked against {lib}" for lib, n in sorted(counts.items()))
    verdict = "all exact" if not failed else f"{failed} parity tests FAILED"
    terminalreporter.write_line(f"litezoo: {len(list_models())} variants, {compared}, {verdict}")
