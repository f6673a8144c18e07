"""Masks made of rectangles of patches, for methods that hide parts of a view from the network.

They are drawn in the loader's workers, from streams that follow from (seed, epoch, image, view) alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MAX_ASPECT = 1 / 0.3
"""Of a block: its height over its width, or its width over its height."""

BLOCK_ATTEMPTS = 10
"""Blocks that are tried in a row before a mask stays as it is."""


def mask_blocks(
    uniforms: Iterator[float],
    out: NDArray[np.bool_],
    target: float,
    *,
    smallest: int,
    largest: float = math.inf,
) -> None:
    """Adds rectangles until `target` patches are masked, or until no more find a place; never more than that.

    A rectangle's area is uniform between `smallest` and what is missing, its aspect log-uniform up to MAX_ASPECT either
    way, and it is smaller than the grid in both directions.

    Args:
        uniforms: numbers in [0, 1), as many as are needed.
        out: the mask of a view, [rows, columns], True for masked; changed in place.
        target: patches to mask.
        smallest, largest: patches of a rectangle. What is missing may be less than `smallest`.

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
    """A number in [0, 1) as one between two others, in any order."""
    return first + (last - first) * uniform


def whole(uniform: float, first: int, last: int) -> int:
    """A number in [0, 1) as a whole one from `first` to `last`, both included."""
    return first + int((last + 1 - first) * uniform)
