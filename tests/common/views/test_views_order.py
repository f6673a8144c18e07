"""Order of the images: each at most once per epoch, for any division of a batch and any step to resume at."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hvp.common.views import MultiViewLoader, ViewSlot, ViewTransform, epoch_order, steps_per_epoch
from hvp.common.views.order import micro_batches
from tests.common.views.view_images import Photographs

COUNTS = st.integers(1, 300)
SEEDS = st.integers(0, 2**64 - 1)


@given(count=COUNTS, seed=SEEDS, epoch=st.integers(0, 10_000))
def test_an_epoch_is_a_permutation(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    np.testing.assert_array_equal(order, epoch_order(count, seed, epoch))


def test_epochs_and_seeds_differ():
    orders = [epoch_order(50, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_every_image_is_equally_likely_at_every_position():
    orders = np.array([epoch_order(10, 0, epoch) for epoch in range(4000)])
    for place in (0, 4, 9):
        assert chisquare(np.bincount(orders[:, place], minlength=10)).pvalue > 1e-3


def test_the_order_never_changes():
    # A run that resumes on another machine must see the same images.
    assert epoch_order(10, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]


@given(
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    world_size=st.integers(1, 4),
    surplus=st.integers(0, 200),
    seed=SEEDS,
)
def test_all_processes_together_read_the_order(batch_size, accumulate, world_size, surplus, seed):
    global_batch = batch_size * accumulate * world_size
    order = epoch_order(global_batch + surplus, seed, 0)
    steps = steps_per_epoch(len(order), global_batch)
    assert 0 <= len(order) - steps * global_batch < global_batch
    seen = []
    for step in range(steps):
        parts = [
            micro_batches(order, step, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert all(part.shape == (accumulate, batch_size) for part in parts)
        seen.append(np.concatenate(parts).ravel())
    # In order: a step sees the same images for any division of a global batch, and an epoch sees none twice.
    np.testing.assert_array_equal(np.concatenate(seen), order[: steps * global_batch])


@pytest.mark.parametrize(("step", "rank"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_steps_and_ranks_out_of_range_are_refused(step, rank):
    with pytest.raises(ValueError, match="step"):
        micro_batches(epoch_order(9, 0, 0), step, batch_size=2, rank=rank, world_size=2)


ONE_VIEW = (ViewSlot("global", ViewTransform(size=8, scale=(0.4, 1.0), blur=0.0), candidates=1, kept=1),)


def loaded(
    count: int, seed: int, epoch: int, steps: range, *, global_batch: int, accumulate: int, world_size: int
) -> list[list[int]]:
    """Load some steps of an epoch with the loaders of all processes: the images of each step, rank by rank."""
    batch_size = global_batch // (accumulate * world_size)
    ranks = [
        MultiViewLoader(
            Photographs(count, size=(12, 16)),
            ONE_VIEW,
            batch_size=batch_size,
            seed=seed,
            workers=0,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
        ).epoch(epoch, start_step=steps.start)
        for rank in range(world_size)
    ]
    seen = []
    for _ in steps:
        parts = [part for rank in ranks for part in next(rank)]
        assert all(len(part.index) == batch_size for part in parts)
        seen.append([index for part in parts for index in part.index.tolist()])
    return seen


WORLDS = st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (6, 1), (2, 3), (3, 2), (1, 6)])


@settings(max_examples=40)
@given(data=st.data(), count=st.integers(6, 24), seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_loaders_follow_the_order_for_any_division_and_any_resume(data, count, seed, epoch):
    """The number of processes and parts may change when a run resumes."""
    order = epoch_order(count, seed, epoch)
    steps = steps_per_epoch(count, 6)
    resumed = data.draw(st.integers(0, steps), label="resumed")
    seen = []
    for part in (range(resumed), range(resumed, steps)):
        world_size, accumulate = data.draw(WORLDS, label="world_size, accumulate")
        seen += loaded(count, seed, epoch, part, global_batch=6, accumulate=accumulate, world_size=world_size)
    assert [index for images in seen for index in images] == order[: 6 * steps].tolist()
