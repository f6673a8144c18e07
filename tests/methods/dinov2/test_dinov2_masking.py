"""DINOv2 masks an exact number of crops over the whole range of ratios; the statistics are tested in tests/parity."""

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvp.methods.dinov2.masking import MaskSampler

KEYS = [(3, image) for image in range(20)]


def sampler(**options: Any) -> MaskSampler:
    values: dict[str, Any] = {"grid": (14, 14), "num_candidates": 2, "probability": 0.5, "ratio": (0.1, 0.5), "seed": 5}
    return MaskSampler(**(values | options))


@settings(max_examples=30)
@given(
    images=st.integers(1, 12),
    probability=st.floats(0.01, 1),
    candidates=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_the_configured_share_of_crops_is_masked_whichever_candidate_is_kept(
    images: int, probability: float, candidates: int, seed: int
) -> None:
    masks = sampler(num_candidates=candidates, probability=probability, seed=seed)(KEYS[:images])
    assert masks.shape == (2 * candidates, images, 14, 14)
    masked = masks.flatten(2).any(dim=2).unflatten(0, (2, candidates))  # [2, candidates, B]
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randint(candidates, (2, 1, images), generator=generator)
    assert int(masked.gather(1, kept).sum()) == int(2 * images * probability)


def test_ratios_are_spread_over_their_range() -> None:
    masks = sampler(num_candidates=1)(KEYS)
    shares = masks.flatten(2).double().mean(dim=2).flatten().sort().values
    shares = shares[shares > 0]
    slices = torch.linspace(0.1, 0.5, len(shares) + 1, dtype=torch.float64)
    # blocks may fall a little short, by whole patches
    assert (shares <= slices[1:]).all()
    assert (shares > slices[:-1] - 4 / 196).all()


def test_candidates_share_the_amount_of_masking_but_not_its_place() -> None:
    first, second = sampler()(KEYS).unflatten(0, (2, 2)).unbind(dim=1)
    counts = first.flatten(2).sum(dim=2), second.flatten(2).sum(dim=2)
    assert torch.equal(counts[0] > 0, counts[1] > 0)
    assert (counts[0] - counts[1]).abs().max() <= 4
    different = (first != second).flatten(2).any(dim=2)
    assert different[counts[0] > 0].all()


def test_masks_depend_on_seed_epoch_and_images_alone() -> None:
    masks = sampler()(KEYS)
    assert torch.equal(pickle.loads(pickle.dumps(sampler()))(KEYS), masks)
    # more candidates do not change the first
    assert torch.equal(sampler(num_candidates=1)(KEYS), masks[[0, 2]])
    for other in (sampler(seed=6)(KEYS), sampler()([(4, image) for _, image in KEYS])):
        assert (other != masks).any()


def test_with_every_crop_masked_at_one_ratio_a_mask_does_not_depend_on_its_batch() -> None:
    fixed = sampler(probability=1.0, ratio=(0.3, 0.3))
    assert torch.equal(fixed(KEYS)[:, 7:9], fixed(KEYS[7:9]))


@pytest.mark.parametrize("images", [1, 5])
def test_a_probability_too_small_for_the_batch_masks_nothing(images: int) -> None:
    assert not sampler(probability=0.05)(KEYS[:images]).any()
