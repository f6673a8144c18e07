"""Scoring of iBOT, against the plain procedure.

# B images, G = 4 global and V candidate crops, N = 196 patches of a global crop
"""

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
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.head import iBOTHead
from hvp.methods.ibot.main_ibot import build_loss, build_masks
from hvp.methods.ibot.score import Prototypes, loss_matrix

RECIPE = {"pred_ratio": (0.0, 0.3), "pred_ratio_var": (0.0, 0.2)}
"""Masks of the upstream's ViT-S recipe and of the presets."""


def scoring_rows(rounds: int = 5) -> list[Row]:
    """Time scoring and selecting from the embeddings on: one matrix and masked patches, against the loop over
    combinations with all patches. Global views only, as in the paper, and with local crops."""
    with benchmark_settings(CPU), torch.no_grad():
        return [
            _row(4, Slots.from_counts((2, 2), (1, 1), diagonal=True), 4, None, rounds),
            _row(4, Slots.from_counts((2, 2, 16), (1, 1, 8), diagonal=True), 64, 15.0, max(1, rounds // 5)),
        ]


def _row(batch: int, slots: Slots, comparisons: int, target: float | None, rounds: int) -> Row:
    config = IbotConfig.model_validate({"masks": RECIPE})
    student, teacher = (
        iBOTHead(1, PROTOTYPES, patch_out_dim=PROTOTYPES, shared_head=True, nlayers=1) for _ in range(2)
    )
    loss = build_loss(config)
    cls, patches = random_embeddings(slots, batch)
    masks = build_masks(config)([(0, image) for image in range(batch)]).flatten(2)  # [G, B, N]
    combinations = slots.all_combinations() if comparisons >= slots.num_combinations else slots.sample((comparisons,))

    def ours() -> Tensor:
        losses = loss_matrix(
            teacher.last_layer(cls[1, :NUM_GLOBAL]),
            patches[1][masks],
            cls[0],
            patches[0][masks],
            masks,
            loss,
            0,
            Prototypes(student.last_layer.frozen(), student.last_layer2.frozen(), teacher.last_layer2.frozen()),
        )
        return select([], losses, slots, combinations=combinations).index

    def plain() -> Tensor:
        cls_logits = Logits(
            student.last_layer(cls[0]),
            teacher.last_layer(cls[1, :NUM_GLOBAL]),
            loss.center,
            loss.teacher_temp(0),
            loss.student_temp,
        )
        patch_logits = Logits(
            student.last_layer2(patches[0]),
            teacher.last_layer2(patches[1]),
            loss.center2,
            loss.teacher_patch_temp(0),
            loss.student_temp,
        )
        return plain_masked_selection(cls_logits, patch_logits, masks, combinations)

    case = (
        f"iBOT scoring, {batch} images, 4 global and {slots.num_views - NUM_GLOBAL} local crops, {PROTOTYPES} "
        f"prototypes, {PATCHES} patches, {len(combinations)} combinations, against the plain loop"
    )
    return scoring_row(case, ours, plain, rounds, target=target)
