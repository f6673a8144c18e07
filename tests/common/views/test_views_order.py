"""The order of the images: each at most once an epoch, however a batch is divided and wherever a run resumes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from hvp.common.views import epoch_order, micro_batches, steps_per_epoch

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


def test_every_image_comes_equally_often_at_every_place():
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
    # In order, so whatever divides a global batch, a step sees the same images, and an epoch none of them twice.
    np.testing.assert_array_equal(np.concatenate(seen), order[: steps * global_batch])


@pytest.mark.parametrize(("step", "rank"), [(2, 0), (-1, 0), (0, 2), (0, -1)])
def test_outside_of_the_epoch_or_the_world(step, rank):
    with pytest.raises(ValueError, match="step"):
        micro_batches(epoch_order(9, 0, 0), step, batch_size=2, rank=rank, world_size=2)
