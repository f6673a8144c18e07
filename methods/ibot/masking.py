"""Masks that hide patches of the global views from the student.

The loader's workers draw them from (seed, epoch, image, view) alone.

# B images, G global views of each, a grid of rows x columns patches
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvp.common.views.block_masks import between, mask_blocks, whole
from hvp.common.views.loader import Key
from hvp.common.views.randomness import uniform_stream


@dataclass(frozen=True, kw_only=True)
class MaskSampler:
    """Sampler of the masks of a micro-batch; picklable, because the loader sends it to its workers.

    Each view draws one of the ratios with equal probability. With ratio r and variation d, the share of patches to mask
    is uniform in [r - d, r + d]. `rand` masks that share, rounded down to whole patches. `block` adds rectangles up to
    that share and may fall short of it. A rectangle covers at least (shorter side of the grid // 3)^2 patches, or the
    missing number if that is smaller; its aspect is log-uniform up to MAX_ASPECT either way; and it is smaller than the
    grid in both directions.

    Source: bytedance/ibot loader.py ImageFolderMask; its block masks follow BEiT (arXiv:2106.08254).
    """

    grid: tuple[int, int]
    """Rows and columns of patches."""

    num_views: int
    """Global views of an image, G."""

    ratios: tuple[float, ...]
    """Shares of patches to mask, one of which is drawn for each view; 0 leaves it unmasked."""

    variations: tuple[float, ...]
    """Largest deviation of the share from each ratio."""

    shape: Literal["block", "rand"]
    """Rectangles, or single patches."""

    start_epoch: int
    """First epoch with masks."""

    seed: int
    """Random seed of the run."""

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """Return the masks of a micro-batch, [G, B, rows, columns] bool; True means masked."""
        masks = np.zeros((self.num_views, len(keys), *self.grid), dtype=bool)
        for b, (epoch, image) in enumerate(keys):
            if epoch < self.start_epoch:
                continue
            for view in range(self.num_views):
                self._mask(uniform_stream("masks", self.seed, epoch, image, view), masks[view, b])
        return torch.from_numpy(masks)

    def _mask(self, uniforms: Iterator[float], out: NDArray[np.bool_]) -> None:
        """Draw the mask of one view into `out`, [rows, columns], which is all False."""
        kind = whole(next(uniforms), 0, len(self.ratios) - 1)
        ratio, variation = self.ratios[kind], self.variations[kind]
        target = out.size * between(next(uniforms), ratio - variation, ratio + variation)
        if self.shape == "rand":
            # The patches with the smallest of independent random numbers are a uniformly random subset.
            order = np.argsort([next(uniforms) for _ in range(out.size)], kind="stable")
            out.reshape(-1)[order[: int(target)]] = True
        else:
            mask_blocks(uniforms, out, target, smallest=(min(out.shape) // 3) ** 2)
