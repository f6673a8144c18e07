"""Scoring of MoCo v3, against all similarities in one matrix.

# B images, V = 4 candidate views, D projection dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.scoring.rows import CPU, memory_rows, scoring_row
from hvp.benchmarks.timing import Row, benchmark_settings
from hvp.common.hardviews import Slots, select
from hvp.methods.mocov3.score import pair_info_nce

NUM_VIEWS, DIM, TEMPERATURE = 4, 256, 1.0
SLOTS = Slots.from_counts((2, 2), (1, 1))


def scoring_rows(rounds: int = 5) -> list[Row]:
    """Time scoring and selecting, the pairs in use against all similarities in one matrix; and measure the memory at
    the papers' batch size."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_scoring_row(1024, rounds), *_memory_rows(4096)]


def _scoring_row(batch: int, rounds: int) -> Row:
    q, k = torch.randn(2, NUM_VIEWS, batch, DIM)

    def ours() -> Tensor:
        return select([], pair_info_nce(q, k, SLOTS, TEMPERATURE), SLOTS).index

    def whole() -> Tensor:
        return select([], _whole_matrix(q, k), SLOTS).index

    case = f"MoCo v3 scoring, {batch} images, 4 views of {DIM} dimensions, against all similarities in one matrix"
    return scoring_row(case, ours, whole, rounds)


def _whole_matrix(q: Tensor, k: Tensor) -> Tensor:
    """Losses of all ordered pairs, [B, V, V], including a view with itself and pairs of one transform."""
    q, k = F.normalize(q, dim=-1) / TEMPERATURE, F.normalize(k, dim=-1)
    similarity = q.flatten(0, 1) @ k.flatten(0, 1).T  # [V B, V B]
    sums = similarity.unflatten(1, (NUM_VIEWS, -1)).logsumexp(dim=2).unflatten(0, (NUM_VIEWS, -1)).permute(1, 2, 0)
    return (sums - k.transpose(0, 1) @ q.permute(1, 2, 0)) * (2 * TEMPERATURE)


def _memory_rows(batch: int) -> list[Row]:
    q, k = torch.randn(2, NUM_VIEWS, batch, DIM)
    case = f"MoCo v3 scoring, {batch} images, 8 times {batch} x {batch} similarities: peak memory in gigabytes"
    return memory_rows(case, lambda: pair_info_nce(q, k, SLOTS, TEMPERATURE), 2.0)
