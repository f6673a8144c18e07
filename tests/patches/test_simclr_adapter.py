"""Adapter of SimCLR's original: its learning rates against PyTorch's scheduler, and its flags."""

import pytest
import torch
from torch import nn

from hvp.common.config.resolving import resolve
from hvp.methods.simclr.config import SimclrConfig
from hvp.patches.simclr.adapter import flags, lr_of_epoch


@pytest.mark.parametrize("steps", [4, 12, 195])
def test_the_learning_rate_equals_that_of_the_originals_scheduler(steps):
    optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for epoch in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr_of_epoch(epoch, 0.3, steps), abs=1e-9)
        optimizer.step()
        if epoch >= 10:
            scheduler.step()


def test_switches_and_counts_appear_only_where_they_apply():
    values = {"rescue.enabled": True, "train.batch_size": 256, "train.precision": "fp16", "data.workers": 3}
    words = flags(resolve(SimclrConfig, [("test", values)]).config, "DATA", 1)
    assert words[-3:] == ["--use-hvp", "--rescue-k", "4"]
    assert "--fp16-precision" in words
    assert words[words.index("--workers") + 1] == "3"
    off = {"selection.hard_views": "none", "train.precision": "fp32"}
    words = flags(resolve(SimclrConfig, [("test", off)]).config, "DATA", 1)
    assert not {"--use-hvp", "--fp16-precision", "--workers"} & set(words)
    assert words[-2:] == ["--rescue-k", "0"]
