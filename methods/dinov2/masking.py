"""Which patches of a global view the student does not see.

Drawn in the loader's workers, from (seed, epoch, image, view) and the images of the micro-batch.

# B images, G global views of each: the candidates of the first transform, then those of the second
# a grid of rows x columns patches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvp.common.views.block_masks import between, mask_blocks
from hvp.common.views.loader import Key
from hvp.common.views.randomness import uniform_stream

SMALLEST_BLOCK = 4
"""Patches."""


@dataclass(frozen=True, kw_only=True)
class MaskSampler:
    """Masks for the loader's batches; picklable, as it is sent to the workers.

    Of the 2 B crops of a micro-batch, one of each image and transform, exactly int(2 B probability) are masked, chosen
    at random: n of them. The ratio of the i-th is uniform in the i-th of n equal slices of [ratio_min, ratio_max], so a
    batch always has the whole range; that share of patches, rounded down, is the most that its blocks cover.

    All candidates of an image and transform share whether and how much is masked, not where. So if one of each
    transform is kept, the masked crops of the batch are as many as without hard views, and with the same ratios; and
    selection cannot prefer a crop for being masked.

    Source: facebookresearch/dinov2 dinov2/data/collate.py collate_data_and_cast, dinov2/data/masking.py.
    """

    grid: tuple[int, int]
    """Rows and columns of patches."""

    num_candidates: int
    """Candidates of each transform, G / 2."""

    probability: float
    """Share of the crops that are masked."""

    ratio: tuple[float, float]
    """Smallest and largest share of a masked crop's patches."""

    seed: int
    """Of the run."""

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """The masks of a micro-batch, [G, B, rows, columns] bool; True: masked."""
        masks = np.zeros((2, self.num_candidates, len(keys), *self.grid), dtype=bool)
        crops = [(transform, b) for transform in range(2) for b in range(len(keys))]
        own = {}  # of every crop two numbers: its place among the crops, and its place in its slice of the ratios
        for transform, b in crops:
            uniforms = uniform_stream("masks", self.seed, *keys[b], transform)
            own[transform, b] = next(uniforms), next(uniforms)
        num_masked = int(len(crops) * self.probability)
        for i, (transform, b) in enumerate(sorted(crops, key=own.__getitem__)[:num_masked]):
            ratio = between((i + own[transform, b][1]) / num_masked, *self.ratio)
            for candidate, mask in enumerate(masks[transform, :, b]):
                # streams 0 and 1 are those above
                uniforms = uniform_stream("masks", self.seed, *keys[b], 2 + 2 * candidate + transform)
                mask_blocks(uniforms, mask, int(mask.size * ratio), smallest=SMALLEST_BLOCK, largest=mask.size // 2)
        return torch.from_numpy(masks).flatten(0, 1)
