"""Which patches of a global view the student does not see.

Drawn in the loader's workers, from (seed, epoch, image, view) alone.

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
        kind = whole(next(uniforms), 0, len(self.ratios) - 1)
        ratio, variation = self.ratios[kind], self.variations[kind]
        target = out.size * between(next(uniforms), ratio - variation, ratio + variation)
        if self.shape == "rand":
            # the patches with the smallest of independent numbers are a uniformly random subset
            order = np.argsort([next(uniforms) for _ in range(out.size)], kind="stable")
            out.reshape(-1)[order[: int(target)]] = True
        else:
            mask_blocks(uniforms, out, target, smallest=(min(out.shape) // 3) ** 2)
