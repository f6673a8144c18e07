"""iBOT's masks depend on (seed, epoch, image, view) alone; their statistics are tested in tests/parity."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvp.methods.ibot.masking import MaskSampler

KEYS = [(3, image) for image in range(40)]


def sampler(**options: Any) -> MaskSampler:
    values: dict[str, Any] = {
        "grid": (14, 14),
        "num_views": 4,
        "ratios": (0.0, 0.3),
        "variations": (0.0, 0.2),
        "shape": "block",
    }
    return MaskSampler(**(values | {"start_epoch": 0, "seed": 5} | options))


def test_shape_and_type() -> None:
    masks = sampler(grid=(6, 4))(KEYS)
    assert masks.shape == (4, 40, 6, 4)
    assert masks.dtype == torch.bool


def test_a_mask_does_not_depend_on_its_batch_nor_on_the_other_views() -> None:
    masks = sampler()(KEYS)
    assert torch.equal(pickle.loads(pickle.dumps(sampler()))(KEYS[7:9]), masks[:, 7:9])
    assert torch.equal(sampler(num_views=2)(KEYS), masks[:2])


@pytest.mark.parametrize("other", [{"seed": 6}, {"keys": [(4, image) for image in range(40)]}])
def test_seed_and_epoch_draw_other_masks(other: dict[str, Any]) -> None:
    keys = other.pop("keys", KEYS)
    differ = (sampler(**other)(keys) != sampler()(KEYS)).flatten(2).any(dim=2)
    assert differ.double().mean() > 0.6  # a quarter of pairs are both empty
    views = sampler()(KEYS)
    assert (views[0] != views[1]).flatten(1).any(dim=1).double().mean() > 0.6


def test_masks_start_at_the_configured_epoch() -> None:
    keys = [(epoch, 0) for epoch in range(6)]
    masks = sampler(ratios=(0.3,), variations=(0.0,), start_epoch=4)(keys)
    assert masks.flatten(2).any(dim=2).tolist() == [[False] * 4 + [True] * 2] * 4


@settings(max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ratio=st.floats(0, 1),
    shape=st.sampled_from(["block", "rand"]),
    seed=st.integers(0, 2**32),
)
def test_masks_never_exceed_the_ratio(grid: tuple[int, int], ratio: float, shape: str, seed: int) -> None:
    masks = sampler(grid=grid, ratios=(ratio,), variations=(0.0,), shape=shape, seed=seed)(KEYS[:3])
    counts = masks.flatten(2).sum(dim=2)
    assert (counts <= ratio * grid[0] * grid[1]).all()
    if shape == "rand":
        assert (counts == int(ratio * grid[0] * grid[1])).all()


def test_ratio_variation_and_choice() -> None:
    masks = sampler(ratios=(0.1, 0.6), variations=(0.0, 0.1), shape="rand")([(0, image) for image in range(500)])
    shares = masks.flatten(2).double().mean(dim=2).flatten()
    low, high = shares[shares < 0.3], shares[shares > 0.3]
    assert len(low) / len(shares) == pytest.approx(0.5, abs=0.05)
    assert low.unique().tolist() == [19 / 196]
    assert 0.49 < high.min() < 0.52 < 0.68 < high.max() <= 0.7
    assert high.mean().item() == pytest.approx(0.6, abs=0.01)


def test_blocks_are_contiguous_and_single_patches_are_not() -> None:
    touching = {}
    for shape in ("block", "rand"):
        masks = sampler(ratios=(0.3,), variations=(0.0,), shape=shape)(KEYS).flatten(0, 1)
        below, above = masks[:, 1:], masks[:, :-1]
        touching[shape] = ((below & above).sum() / above.sum()).item()
    assert touching["block"] > 0.75
    assert touching["rand"] == pytest.approx(0.3, abs=0.05)


def test_sampler_is_a_value() -> None:
    assert replace(sampler(), seed=5) == sampler()
    assert replace(sampler(), seed=6) != sampler()
