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
