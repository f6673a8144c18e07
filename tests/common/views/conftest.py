"""Slots for the tests of the views."""

import pytest

from hvp.benchmarks import loading as benchmark
from hvp.common.views import ViewSlot, ViewTransform


@pytest.fixture
def dino_slots() -> tuple[ViewSlot, ...]:
    """DINO's 2 + 2 global and 16 local views, at its sizes."""
    return benchmark.SLOTS


@pytest.fixture
def small_slots() -> tuple[ViewSlot, ...]:
    """The same kinds of views at sizes that render quickly."""
    return (
        ViewSlot("global1", ViewTransform(size=24, scale=(0.4, 1.0), blur=1.0), candidates=2, kept=1),
        ViewSlot("global2", ViewTransform(size=24, scale=(0.4, 1.0), blur=0.1, solarize=0.2), candidates=2, kept=1),
        ViewSlot("local", ViewTransform(size=12, scale=(0.05, 0.4), blur=0.5), candidates=4, kept=2),
    )
