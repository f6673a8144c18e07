"""The loader benchmarks run and report the promised rows; their speed is not tested."""

import cv2
import numpy as np
import pytest
import torch
from torchvision import transforms

from hvp.benchmarks import loading as benchmark


def test_loader_rows(monkeypatch):
    monkeypatch.setattr(benchmark, "IMAGES", 1)
    before = torch.get_rng_state(), torch.get_num_threads(), cv2.getNumThreads()
    rows = benchmark.loader_rows(rounds=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before[1:]
    hard, vanilla, traffic = rows
    for row in (hard, vanilla):
        assert row.ratio == pytest.approx(row.reference_seconds / row.seconds)  # of one round
        assert row.target is not None
        assert row.as_dict()["ok"] == (row.ratio >= row.target)
    assert traffic.as_dict()["ok"]
    assert traffic.target is not None
    assert 1.0 < traffic.ratio <= traffic.target


def test_the_reference_makes_the_same_kinds_of_views_as_the_loader():
    image = benchmark.Jpegs(1).open(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = benchmark._plain_views(2, 2, 16)(image)
    assert [view.shape[-1] for view in views] == [224] * 4 + [96] * 16
    assert all(view.dtype == torch.float32 for view in views)
    whole = transforms.functional.to_tensor(image)
    assert np.std([view.mean() for view in views]) > 0.05
    assert whole.shape == (3, *benchmark.IMAGE_SIZE)


def test_strong_views_of_reread_images_equal_those_of_kept_images():
    (row,) = benchmark.strong_rows(rounds=1)
    assert row.equal
    assert row.memory_mb == pytest.approx(128 * 375 * 500 * 3 / 1e6)
