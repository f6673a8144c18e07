"""The benchmark runs and says what it promises; how fast things are is for `hvp bench loader` to say."""

import cv2
import numpy as np
import pytest
import torch
from torchvision import transforms

from hvp.benchmarks import loading as benchmark
from hvp.common.networks.resnet import ConvNetMicro
from hvp.common.training.rescuing import Rescuer
from hvp.common.views import ViewBatch
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.model import SimCLR, SimCLRProjectionHead


def test_rows(monkeypatch):
    monkeypatch.setattr(benchmark, "IMAGES", 1)
    before = torch.get_rng_state(), torch.get_num_threads(), cv2.getNumThreads()
    rows = benchmark.loader_rows(rounds=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before[1:]
    hard, vanilla, traffic = rows
    for row in (hard, vanilla):
        assert row.ratio == pytest.approx(row.reference_seconds / row.seconds)  # of one round
        assert row.as_dict()["ok"] == (row.ratio >= row.target)
    assert traffic.as_dict()["ok"]
    assert 1.0 < traffic.ratio <= traffic.target


def test_the_reference_makes_the_views_the_loader_makes():
    image = benchmark._Jpegs(1).open(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = benchmark._plain_views(2, 2, 16)(image)
    assert [view.shape[-1] for view in views] == [224] * 4 + [96] * 16
    assert all(view.dtype == torch.float32 for view in views)
    whole = transforms.functional.to_tensor(image)
    assert np.std([view.mean() for view in views]) > 0.05
    assert whole.shape == (3, *benchmark.IMAGE_SIZE)


def test_strong_views_read_again_are_those_of_kept_images():
    (row,) = benchmark.strong_rows(rounds=1)
    assert row.equal
    assert row.memory_mb == pytest.approx(128 * 375 * 500 * 3 / 1e6)


def test_the_rescue_row_compares_a_step_with_and_without():
    config = SimclrConfig.model_validate(
        {"views": {"crop_size": 32}, "train": {"batch_size": 4}, "rescue": {"enabled": True, "k": 2}}
    )
    model = SimCLR(ConvNetMicro(), SimCLRProjectionHead(96, 8, 8))
    seen: list[bool] = []

    def train(rescuer: Rescuer | None, part: ViewBatch) -> None:
        assert part.index.tolist() == [0, 1, 2, 3]
        seen.append(rescuer is not None)
        if rescuer is not None:
            loss = rescuer.loss(model(torch.randn(8, 3, 32, 32)), part)
            assert -1 <= loss.item() <= 1

    row = benchmark.rescue_row(train, config, model, "a step", 2, torch.device("cpu"))
    assert seen == [True, False] * 3
    assert row.target == 1.05
