"""Scoring of DINOv2, against the plain procedure.

# B images, G = 4 global and V candidate crops, N = 196 patches of a global crop
"""

from typing import Literal

import torch
from torch import Tensor

from hvp.benchmarks.scoring.masked import (
    NUM_GLOBAL,
    PATCHES,
    PROTOTYPES,
    Logits,
    plain_masked_selection,
    random_embeddings,
)
from hvp.benchmarks.scoring.rows import CPU, scoring_row
from hvp.benchmarks.timing import Row, benchmark_settings
from hvp.common.hardviews import Slots, select
from hvp.common.networks.heads import DINOHead
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.main_dinov2 import build_loss, build_masks
from hvp.methods.dinov2.score import loss_matrix

TEMP, COMPARISONS = 0.05, 64
SLOTS = Slots.from_counts((2, 2, 16), (1, 1, 8), diagonal=True)


def scoring_rows(rounds: int = 5) -> list[Row]:
    """Time scoring and selecting from the embeddings on: one matrix and masked patches, against the loop over
    combinations with all patches; with an EMA centre, and with Sinkhorn-Knopp."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_row(4, "centering", max(1, rounds // 5)), _row(4, "sinkhorn_knopp", max(1, rounds // 5))]


def _row(batch: int, centering: Literal["centering", "sinkhorn_knopp"], rounds: int) -> Row:
    config = DINOv2Config.model_validate(
        {"dino": {"head_n_prototypes": PROTOTYPES}, "teacher": {"centering": centering}}
    )
    student, teacher = (DINOHead(1, PROTOTYPES, nlayers=1).last_layer for _ in range(2))
    loss = build_loss(config)
    cls, patches = random_embeddings(SLOTS, batch)
    masks = build_masks(config)([(0, image) for image in range(batch)]).flatten(2)  # [G, B, N]
    combinations = SLOTS.sample((COMPARISONS,))

    def ours() -> Tensor:
        losses = loss_matrix(
            cls[1, :NUM_GLOBAL],
            patches[1][masks],
            cls[0],
            patches[0][masks],
            masks,
            loss,
            TEMP,
            (teacher, teacher),
            (student, student),
        )
        return select([], losses, SLOTS, combinations=combinations).index

    def plain() -> Tensor:
        teacher_cls, teacher_patch = teacher(cls[1, :NUM_GLOBAL]), teacher(patches[1])
        center = loss.dino_loss.center_for(teacher_cls.flatten(0, 1), TEMP)
        patch_center = loss.ibot_patch_loss.center_for(teacher_patch[masks], TEMP)
        return plain_masked_selection(
            Logits(student(cls[0]), teacher_cls, center, TEMP, loss.student_temp),
            Logits(student(patches[0]), teacher_patch, patch_center, TEMP, loss.student_temp),
            masks,
            combinations,
        )

    case = (
        f"DINOv2 scoring, {batch} images, 4 global and 16 local crops, {PROTOTYPES} prototypes, {PATCHES} patches, "
        f"{centering}, {COMPARISONS} combinations, against the plain loop"
    )
    return scoring_row(case, ours, plain, rounds, target=15.0)
