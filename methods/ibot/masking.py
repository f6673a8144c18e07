"""Which patches of a global view the student does not see.

Drawn in the loader's workers, from (seed, epoch, image, view) alone.

# B images, G global views of each, a grid of rows x columns patches
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvp.common.views.loader import Key
from hvp.common.views.randomness import uniform_stream

MAX_ASPECT = 1 / 0.3
"""Of a block: its height over its width, or its width over its height."""

BLOCK_ATTEMPTS = 10
"""Blocks that are tried in a row before a mask stays as it is."""


@dataclass(frozen=True, kw_only=True)
class MaskSampler:
    """Masks for the loader's batches; picklable, as it is sent to the workers.

    A view draws one of the ratios, evenly; with ratio r and variation d the share of patches to mask is uniform in
    [r - d, r + d]. `rand` masks that share, rounded down to whole patches. `block` adds rectangles until the share is
    reached, never more, so that it may stay below; a rectangle covers at least (shorter side of the grid // 3)^2
    patches, or what is missing where that is less, its aspect is log-uniform up to MAX_ASPECT either way, and it is
    smaller than the grid in both directions.

    Source: bytedance/ibot loader.py ImageFolderMask; its block masks follow BEiT (arXiv:2106.08254).
    """

    grid: tuple[int, int]
    """Rows and columns of patches."""

    num_views: int
    """Global views of an image, G."""

    ratios: tuple[float, ...]
    """Shares of patches to mask, one of which is drawn for a view; 0 leaves it unmasked."""

    variations: tuple[float, ...]
    """For each ratio, how far the share may be from it."""

    shape: Literal["block", "rand"]
    """Rectangles, or single patches."""

    start_epoch: int
    """Earlier epochs mask nothing."""

    seed: int
    """Of the run."""

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """The masks of a micro-batch, [G, B, rows, columns] bool; True: masked."""
        masks = np.zeros((self.num_views, len(keys), *self.grid), dtype=bool)
        for b, (epoch, image) in enumerate(keys):
            if epoch < self.start_epoch:
                continue
            for view in range(self.num_views):
                self._mask(uniform_stream("masks", self.seed, epoch, image, view), masks[view, b])
        return torch.from_numpy(masks)

    def _mask(self, uniforms: Iterator[float], out: NDArray[np.bool_]) -> None:
        """Masks one view, `out` [rows, columns], which is all False."""
        kind = _whole(next(uniforms), 0, len(self.ratios) - 1)
        ratio, variation = self.ratios[kind], self.variations[kind]
        target = out.size * _between(next(uniforms), ratio - variation, ratio + variation)
        if self.shape == "rand":
            # the patches with the smallest of independent numbers are a uniformly random subset
            order = np.argsort([next(uniforms) for _ in range(out.size)], kind="stable")
            out.reshape(-1)[order[: int(target)]] = True
        else:
            _mask_blocks(uniforms, out, target)


def _mask_blocks(uniforms: Iterator[float], out: NDArray[np.bool_], target: float) -> None:
    """Adds rectangles until `target` patches are masked, or until no more find a place."""
    rows, columns = out.shape
    smallest = (min(rows, columns) // 3) ** 2
    missing = target
    failures = 0
    while missing > 0 and failures < BLOCK_ATTEMPTS:
        area = _between(next(uniforms), smallest, missing)
        aspect = math.exp(_between(next(uniforms), -math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        added = 0
        if height < rows and width < columns:
            top, left = _whole(next(uniforms), 0, rows - height), _whole(next(uniforms), 0, columns - width)
            block = out[top : top + height, left : left + width]
            added = block.size - int(block.sum())
        if 0 < added <= missing:
            block[:] = True
            missing -= added
            failures = 0
        else:
            failures += 1


def _between(uniform: float, first: float, last: float) -> float:
    """A number in [0, 1) as one between two others, in any order."""
    return first + (last - first) * uniform


def _whole(uniform: float, first: int, last: int) -> int:
    """A number in [0, 1) as a whole one from `first` to `last`, both included."""
    return first + int((last + 1 - first) * uniform)
