"""The images of each optimiser step: pure functions of (seed, epoch, step)."""

import numpy as np
from numpy.typing import NDArray

from hvp.common.views.randomness import random_bits


def epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Draw a random permutation of the dataset, from the seed and the epoch alone.

    Returns:
        [num_images] int64, every index once.
    """
    return np.argsort(random_bits("order", seed, epoch, 0, num_images), kind="stable").astype(np.int64, copy=False)


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """Count the full batches in an epoch; an incomplete last batch is dropped, as upstream."""
    return num_images // global_batch


def micro_batches(
    order: NDArray[np.int64], step: int, *, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return the images of one process in one optimiser step.

    The global batch is the next `batch_size * accumulate * world_size` images of the order. Each process takes a
    contiguous part of it, and each of its micro-batches a contiguous part of that. So the images of a step do not
    depend on how the global batch is divided.

    Args:
        order: [N] int64, from `epoch_order`.
        step: optimiser step within the epoch, 0 <= step < steps_per_epoch.
        batch_size: images in a micro-batch of one process.
        accumulate: micro-batches of a process in a step.
        rank, world_size: this process, and the number of processes.

    Returns:
        [accumulate, batch_size] int64.

    Raises:
        ValueError: the step is outside the epoch, or the rank is outside the world.
    """
    per_process = batch_size * accumulate
    global_batch = per_process * world_size
    steps = steps_per_epoch(len(order), global_batch)
    if not (0 <= step < steps and 0 <= rank < world_size):
        raise ValueError(f"micro_batches: step {step} of {steps}, rank {rank} of {world_size}")
    first = step * global_batch + rank * per_process
    return order[first : first + per_process].reshape(accumulate, batch_size)
