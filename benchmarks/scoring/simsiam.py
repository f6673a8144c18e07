"""Scoring of SimSiam, against the plain procedure.

# B images, N = 4 candidate views, D projection dim
"""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hvp.benchmarks.scoring.rows import CPU, scoring_row
from hvp.benchmarks.timing import Row, benchmark_settings
from hvp.common.hardviews import Slots, select
from hvp.methods.simsiam.score import negative_cosines

NUM_VIEWS, DIM, SIZE = 4, 2048, 224
SLOTS = Slots.from_counts((NUM_VIEWS,), (2,))


def scoring_rows(rounds: int = 5) -> list[Row]:
    """Time scoring and selecting, with the pixels: the pair matrix and one gather, against the loop over pairs."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_row(64, rounds)]


def _row(batch: int, rounds: int) -> Row:
    p, z = torch.randn(2, NUM_VIEWS, batch, DIM)
    views = torch.randn(NUM_VIEWS, batch, 3, SIZE, SIZE)

    def ours() -> Tensor:
        return select([views], negative_cosines(p, z), SLOTS).views[0]

    def plain() -> Tensor:
        """The paper's procedure: compute the loss of each pair of views, and keep the pixels of the harder pair."""
        best = torch.full((batch,), torch.inf)
        kept = [views[0], views[0]]
        for i, j in combinations(range(NUM_VIEWS), 2):
            similarity = 0.5 * (cosine_similarity(p[i], z[j]) + cosine_similarity(p[j], z[i]))
            harder = similarity < best
            best = torch.where(harder, similarity, best)
            kept = [torch.where(harder[:, None, None, None], views[v], k) for v, k in zip((i, j), kept, strict=True)]
        return torch.stack(kept)

    case = (
        f"SimSiam scoring and picking, {batch} images of {SIZE} px, 6 pairs, against the loop over pairs with `where`"
    )
    return scoring_row(case, ours, plain, rounds)
