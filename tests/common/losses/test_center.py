"""Batch mean for a moving centre; several processes are tested with DINO's loss."""

import pytest
import torch

from hvp.common.losses.center import GlobalMean


def test_mean_of_the_rows_added_since_the_last_one() -> None:
    mean, rows = GlobalMean(), torch.randn(7, 3)
    for part in (rows[:2], rows[2:3], rows[3:]):
        mean.add(part)
    torch.testing.assert_close(mean.take(), rows.mean(dim=0, keepdim=True))
    mean.add(rows[:2])
    torch.testing.assert_close(mean.take(), rows[:2].mean(dim=0, keepdim=True))


def test_half_precision_is_summed_in_float32() -> None:
    mean = GlobalMean()
    mean.add(torch.full((4096, 1), 100.0, dtype=torch.float16))  # their sum overflows float16
    assert mean.take().tolist() == [[100.0]]


def test_a_mean_needs_rows() -> None:
    with pytest.raises(ValueError, match="no rows were counted"):
        GlobalMean().take()
