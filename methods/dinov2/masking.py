"""Masks that hide patches of the global views from the student.

The loader's workers draw them from (seed, epoch, image, view) and the images of the micro-batch.

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
"""Smallest number of patches in a masked rectangle."""


@dataclass(frozen=True, kw_only=True)
class MaskSampler:
    """Sampler of the masks of a micro-batch; picklable, because the loader sends it to its workers.

    Of the 2 B crops of a micro-batch, one per image and transform, exactly n = int(2 B probability) are masked, chosen
    at random. The ratio of the i-th is uniform in the i-th of n equal slices of [ratio_min, ratio_max], so a batch
    always covers the whole range. That share of patches, rounded down, is the most that its blocks cover.

    All candidates of an image and transform share whether they are masked and the ratio, but not the position. If one
    of each transform is kept, a batch therefore has as many masked crops as without hard views, with the same ratios,
    and selection cannot prefer a crop for being masked.

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
    """Random seed of the run."""

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """Return the masks of a micro-batch, [G, B, rows, columns] bool; True means masked."""
        masks = np.zeros((2, self.num_candidates, len(keys), *self.grid), dtype=bool)
        crops = [(transform, b) for transform in range(2) for b in range(len(keys))]
        drawn = {}  # for each crop, two numbers: its rank among the crops, and its position in its slice of the ratios
        for transform, b in crops:
            uniforms = uniform_stream("masks", self.seed, *keys[b], transform)
            drawn[transform, b] = next(uniforms), next(uniforms)
        num_masked = int(len(crops) * self.probability)
        for i, (transform, b) in enumerate(sorted(crops, key=drawn.__getitem__)[:num_masked]):
            ratio = between((i + drawn[transform, b][1]) / num_masked, *self.ratio)
            for candidate, mask in enumerate(masks[transform, :, b]):
                # Streams 0 and 1 were used above.
                uniforms = uniform_stream("masks", self.seed, *keys[b], 2 + 2 * candidate + transform)
                mask_blocks(uniforms, mask, int(mask.size * ratio), smallest=SMALLEST_BLOCK, largest=mask.size // 2)
        return torch.from_numpy(masks).flatten(0, 1)
