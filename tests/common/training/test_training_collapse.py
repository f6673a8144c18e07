"""Detection of a collapse, and the spread of features."""

import pytest
import torch

from hvp.common.training.collapse import CollapseWatch, feature_spread


def test_a_collapse_is_reported_once_after_enough_steps_in_a_row():
    said: list[str] = []
    watch = CollapseWatch(said.append, steps=3)
    for step, collapsed in enumerate([True, True, False, True, True, True, True, True]):
        watch.see(step, collapsed, "all outputs are equal")
        assert len(said) == (step >= 5)
    assert said == ["step 6: the network has collapsed: all outputs are equal"]


def test_spread_of_known_features():
    assert feature_spread(torch.ones(8, 16)) == 0
    assert feature_spread(torch.eye(16)) == pytest.approx(1)
    z = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_spread(z) == pytest.approx(1, abs=0.02)
    # lengths do not matter, and half precision changes little
    lengths = torch.rand(2000, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert feature_spread(lengths * z) == pytest.approx(feature_spread(z), rel=1e-5)
    assert feature_spread(z.bfloat16()) == pytest.approx(feature_spread(z), rel=1e-2)
    # a cloud of radius 0.1 around a distant point
    assert feature_spread(10 + 0.1 * z) == pytest.approx(0.01, rel=0.1)
