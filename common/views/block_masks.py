"""Masks made of rectangles of patches, for methods that hide parts of a view from the network.

They are drawn in the loader's workers, from random streams that depend only on (seed, epoch, image, view).
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MAX_ASPECT = 1 / 0.3
"""Largest aspect ratio of a block: height over width, or width over height."""

BLOCK_ATTEMPTS = 10
"""Failed attempts in a row after which a mask is left as it is."""


def mask_blocks(
    uniforms: Iterator[float],
    out: NDArray[np.bool_],
    target: float,
    *,
    smallest: int,
    largest: float = math.inf,
) -> None:
    """Add rectangles until `target` patches are masked or no further one fits; never mask more than `target`.

    A rectangle's area is uniform between `smallest` and the number of missing patches, its aspect ratio is log-uniform
    up to MAX_ASPECT either way, and it is smaller than the grid in both directions.

    Args:
        uniforms: random numbers in [0, 1), as many as needed.
        out: the mask of a view, [rows, columns], True for masked; changed in place.
        target: patches to mask.
        smallest, largest: patches of a rectangle. Fewer than `smallest` may be missing.

    Source: BEiT (arXiv:2106.08254) Algorithm 1; its form in bytedance/ibot and facebookresearch/dinov2.
    """
    rows, columns = out.shape
    missing = target - int(out.sum())
    failures = 0
    while missing > 0 and failures < BLOCK_ATTEMPTS:
        most = min(missing, largest)
        area = between(next(uniforms), smallest, most)
        aspect = math.exp(between(next(uniforms), -math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        added = 0
        if height < rows and width < columns:
            top, left = whole(next(uniforms), 0, rows - height), whole(next(uniforms), 0, columns - width)
            block = out[top : top + height, left : left + width]
            added = block.size - int(block.sum())
        if 0 < added <= most:
            block[:] = True
            missing -= added
            failures = 0
        else:
            failures += 1


def between(uniform: float, first: float, last: float) -> float:
    """Scale a number in [0, 1) to the interval between two numbers, in any order."""
    return first + (last - first) * uniform


def whole(uniform: float, first: int, last: int) -> int:
    """Scale a number in [0, 1) to an integer from `first` to `last`, both included."""
    return first + int((last + 1 - first) * uniform)
