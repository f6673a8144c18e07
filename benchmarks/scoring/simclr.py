"""Scoring of SimCLR, against the released code's procedure.

# B images, N = 4 candidate views, D embedding dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.scoring.rows import CPU, memory_rows, plain_selection, scoring_row
from hvp.benchmarks.timing import Row, benchmark_settings
from hvp.common.hardviews import Slots, select
from hvp.methods.simclr.score import pair_nt_xent

NUM_VIEWS, DIM, TEMPERATURE = 4, 128, 0.1
SLOTS = Slots.from_counts((NUM_VIEWS,), (2,))


def scoring_rows(rounds: int = 5) -> list[Row]:
    """Time scoring and selecting, one similarity matrix against a broadcast for every pair; and measure the memory at
    the papers' batch size."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_scoring_row(256, rounds), *_memory_rows(4096)]


def _scoring_row(batch: int, rounds: int) -> Row:
    z = torch.randn(NUM_VIEWS, batch, DIM)
    others = torch.arange(2 * batch).roll(batch)

    def ours() -> Tensor:
        return select([], pair_nt_xent(z, TEMPERATURE), SLOTS).index

    def pair_loss(pair: Tensor) -> Tensor:
        """The released code's cosines of all views of a pair, by a broadcast."""
        both = F.normalize(z[pair].flatten(0, 1), dim=-1)  # [2 B, D]
        cosines = F.cosine_similarity(both[:, None], both[None], dim=-1)  # [2 B, 2 B], by way of [2 B, 2 B, D]
        logits = (cosines / TEMPERATURE).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, others, reduction="none").unflatten(0, (2, batch)).sum(dim=0)

    def plain() -> Tensor:
        return plain_selection(SLOTS.all_combinations(), batch, pair_loss)

    case = f"SimCLR scoring, {batch} images, 4 views of {DIM} dimensions, against a [2B, 2B, D] broadcast for each pair"
    return scoring_row(case, ours, plain, rounds, target=50.0)


def _memory_rows(batch: int) -> list[Row]:
    z = torch.randn(NUM_VIEWS, batch, DIM)
    side = NUM_VIEWS * batch
    case = f"SimCLR scoring, {batch} images, {side} x {side} similarities: peak memory in gigabytes"
    return memory_rows(case, lambda: pair_nt_xent(z, TEMPERATURE), 2.0)
