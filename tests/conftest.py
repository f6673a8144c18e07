"""Settings and fixtures for every test."""

import signal
from collections.abc import Iterator

import cv2
import pytest
import torch
from hypothesis import HealthCheck, settings

# Slowness on a busy machine must not fail a test.
settings.register_profile("hvp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hvp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send tests that share fixtures, those of a file or of a method, to the same pytest-xdist process."""
    for item in items:
        values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        method = values.get("name", "") if item.path.name == "test_every_method.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path} {method}"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Use one thread: the tensors are small, and more threads would only compete with loader workers."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(autouse=True)
def _own_interrupts() -> Iterator[None]:
    """Restore signal handlers: a finished command leaves its own behind, and they would end the test process."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
