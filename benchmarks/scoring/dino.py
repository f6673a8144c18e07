"""Scoring of DINO, against the plain procedure.

# B images, G = 4 global and V = 20 candidate crops, K prototypes
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.scoring.rows import CPU, plain_selection, scoring_row
from hvp.benchmarks.timing import Row, benchmark_settings
from hvp.common.hardviews import Slots, combination_losses, gather_views, select
from hvp.common.losses.cross_entropy import pair_cross_entropies

PROTOTYPES, NUM_GLOBAL, NUM_LOCAL, COMPARISONS = 65536, 4, 16, 128
TEACHER_TEMP, STUDENT_TEMP = 0.04, 0.1
SLOTS = Slots.from_counts((2, 2, NUM_LOCAL), (1, 1, 8))


def scoring_rows(rounds: int = 5) -> list[Row]:
    """Time scoring and selecting: the pair matrix against the loop over combinations; exact search against sampled
    search; picking pixels by index against one `where` per view and slot."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_scoring_row(8, rounds), _exact_row(64, 20 * rounds), _pixels_row(32, rounds)]


def _scoring_row(batch: int, rounds: int) -> Row:
    teacher = torch.randn(NUM_GLOBAL, batch, PROTOTYPES)
    student = torch.randn(NUM_GLOBAL + NUM_LOCAL, batch, PROTOTYPES)
    center = torch.randn(1, PROTOTYPES)
    combinations = SLOTS.sample((COMPARISONS,))

    def ours() -> Tensor:
        losses = pair_cross_entropies(teacher, student, center, TEACHER_TEMP, STUDENT_TEMP)
        return select([], losses, SLOTS, combinations=combinations).index

    def plain() -> Tensor:
        probabilities = F.softmax((teacher - center) / TEACHER_TEMP, dim=-1)

        def loss_of(combination: Tensor) -> Tensor:
            loss = torch.zeros(batch)
            for i, t in enumerate(combination[:2]):
                for j, v in enumerate(combination):
                    if i != j:
                        loss -= (probabilities[t] * F.log_softmax(student[v] / STUDENT_TEMP, dim=-1)).sum(dim=-1)
            return loss

        return plain_selection(combinations, batch, loss_of)

    case = f"DINO scoring, {batch} images, {PROTOTYPES} prototypes, {COMPARISONS} combinations, against the plain loop"
    return scoring_row(case, ours, plain, max(1, rounds // 2), target=30.0)


def _exact_row(batch: int, rounds: int) -> Row:
    losses = torch.rand(batch, NUM_GLOBAL, NUM_GLOBAL + NUM_LOCAL)
    largest = combination_losses(losses, SLOTS.all_combinations(), SLOTS).amax(dim=1)

    def exact() -> Tensor:
        return select([], losses, SLOTS, search="exact").index

    def sampled() -> Tensor:
        return select([], losses, SLOTS, comparisons=COMPARISONS).index

    def finds_largest(index: Tensor, _: Tensor) -> bool:
        return torch.allclose(combination_losses(losses, index[:, None], SLOTS)[:, 0], largest, rtol=1e-6)

    case = (
        f"exact search over {SLOTS.num_combinations} combinations, {batch} images, given the pair losses, against "
        f"drawing and gathering {COMPARISONS}"
    )
    return scoring_row(case, exact, sampled, rounds, target=1.0, same=finds_largest)


def _pixels_row(batch: int, rounds: int) -> Row:
    views = [torch.randn(NUM_GLOBAL, batch, 3, 224, 224), torch.randn(NUM_LOCAL, batch, 3, 96, 96)]
    index = SLOTS.sample((batch,))

    def ours() -> list[Tensor]:
        return gather_views(views, index, SLOTS)

    def plain() -> list[Tensor]:
        single = [view for stack in views for view in stack]
        kept = []
        for slot in range(SLOTS.num_slots):
            stack = views[0] if slot < 2 else views[1]
            chosen = torch.zeros_like(stack[0])
            for number in range(NUM_GLOBAL) if slot < 2 else range(NUM_GLOBAL, NUM_GLOBAL + NUM_LOCAL):
                chosen = torch.where((index[:, slot] == number)[:, None, None, None], single[number], chosen)
            kept.append(chosen)
        return kept

    def same(stacks: list[Tensor], crops: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip((crop for stack in stacks for crop in stack), crops, strict=True))

    case = f"picking the kept crops' pixels, {batch} images, against one `where` per slot and candidate"
    return scoring_row(case, ours, plain, rounds, same=same)
