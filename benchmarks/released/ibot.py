"""Comparison of our iBOT selection with the one that HVP's authors released.

# B images, G global and V candidate crops in all, N patches of a global crop, K and K2 prototypes ([CLS] and patches)
"""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hvp.benchmarks.originals.harness import normalized_views
from hvp.benchmarks.released.selection import (
    BATCH_SIZE,
    Choices,
    Network,
    Outputs,
    Released,
    marked_images,
    random_outputs,
    views_in,
)
from hvp.common.hardviews import Group, Slots
from hvp.common.views import ViewBatch
from hvp.methods.ibot.head import MultiCropWrapper
from hvp.methods.ibot.ibot_loss import iBOTLoss
from hvp.methods.ibot.main_ibot import build_masks
from hvp.methods.ibot.score import loss_matrix

NUM_GLOBAL, NUM_LOCAL = 4, 6
NUM_VIEWS = NUM_GLOBAL + NUM_LOCAL
OUT_DIM, PATCH_OUT_DIM, SIDE = 512, 128, 7
EPOCH = 5
WARMUP_EPOCHS, EPOCHS = 10, 20
CLS_TEMPS, PATCH_TEMPS = (0.04, 0.07), (0.05, 0.06)
WEIGHTS: dict[str, Any] = {"lambda1": 1.0, "lambda2": 0.5}


def random(generator: torch.Generator) -> Outputs:
    """Draw [CLS] logits of student [V, B, K] and teacher [G, B, K], patch logits [G, B, N, K2] of both, masks
    [G, B, h, w], and the centres [1, K] and [1, 1, K2]. A quarter of the global crops has no masked patch."""
    ratios = torch.rand(NUM_GLOBAL, BATCH_SIZE, 1, 1, generator=generator)
    ratios = torch.where(ratios < 0.25, 0.0, ratios / 2)
    shape = SIDE**2, PATCH_OUT_DIM
    return {
        "student_cls": random_outputs(NUM_VIEWS, generator, OUT_DIM),
        "teacher_cls": random_outputs(NUM_GLOBAL, generator, OUT_DIM),
        "student_patch": random_outputs(NUM_GLOBAL, generator, *shape),
        "teacher_patch": random_outputs(NUM_GLOBAL, generator, *shape),
        "masks": torch.rand(NUM_GLOBAL, BATCH_SIZE, SIDE, SIDE, generator=generator) < ratios,
        "center": torch.randn(1, OUT_DIM, generator=generator) / 10,
        "center2": torch.randn(1, 1, PATCH_OUT_DIM, generator=generator) / 10,
    }


def network(student: MultiCropWrapper, teacher: MultiCropWrapper, _: iBOTLoss, batch: ViewBatch) -> Outputs:
    """Return the same outputs of networks. Unmasked patches of the student are 0; centres are the teacher's means."""
    assert batch.masks is not None
    views, masks = normalized_views(batch), batch.masks.flatten(2).flatten(0, 1)
    crops, split = torch.cat(views[:NUM_GLOBAL]), (NUM_GLOBAL, -1)
    features, masked = student.embed_masked(crops, masks)
    cls = torch.cat([features.projection, student.encode(torch.cat(views[NUM_GLOBAL:])).projection])
    targets, patches = (
        layer(x).unflatten(0, split)
        for layer, x in zip((teacher.head.last_layer, teacher.head.last_layer2), teacher.embed(crops), strict=True)
    )
    student_patch = torch.zeros_like(patches).flatten(0, 1)
    student_patch[masks] = student.head.last_layer2(masked)
    return {
        "student_cls": student.head.last_layer(cls).unflatten(0, (NUM_VIEWS, -1)),
        "teacher_cls": targets,
        "student_patch": student_patch.unflatten(0, split),
        "teacher_patch": patches,
        "masks": batch.masks,
        "center": targets.mean(dim=(0, 1))[None],
        "center2": patches.mean(dim=(0, 1, 2))[None, None],
    }


def theirs(outputs: Outputs) -> Choices:
    """Return the choices of the released code."""
    main_ibot = import_module("main_ibot")
    args = SimpleNamespace(
        use_hvs=True,
        hvs_limit=0,
        gcrops_num_loader=NUM_GLOBAL,
        lcrops_num_loader=NUM_LOCAL,
        local_crops_number=NUM_LOCAL,
        use_masked_im_modeling=True,
    )
    dims = outputs["teacher_cls"].shape[-1], outputs["teacher_patch"].shape[-1]
    epochs = WARMUP_EPOCHS, EPOCHS
    loss = main_ibot.iBOTLoss(*dims, 2, NUM_LOCAL, *CLS_TEMPS, *PATCH_TEMPS, *epochs, args, **WEIGHTS)
    loss.center.copy_(outputs["center"])
    loss.center2.copy_(outputs["center2"])
    scores: list[Tensor] = []
    hvs = loss.hvs

    def record_score(*inputs: Any) -> tuple[Tensor, Tensor]:
        score, selected = hvs(*inputs)
        scores.append(score)
        return score, selected

    loss.hvs = record_score
    teacher = Network(outputs["teacher_cls"], outputs["teacher_patch"])
    student: Any = Network(outputs["student_cls"], outputs["student_patch"])
    student.module = SimpleNamespace(backbone=SimpleNamespace())
    batch = outputs["masks"].shape[1]
    images = marked_images(NUM_GLOBAL, batch, size=2) + marked_images(NUM_LOCAL, batch, size=1, first=NUM_GLOBAL)
    # Its loader makes masks for all crops; the masks of local crops are not read.
    masks = [*outputs["masks"], *(torch.zeros_like(outputs["masks"][0]) for _ in range(NUM_LOCAL))]
    out, out_masks = main_ibot.hard_view_selection(teacher, student, loss, images, masks, EPOCH, args)

    index = views_in(out)
    own = outputs["masks"][index[:, :2].T.clamp(0, NUM_GLOBAL - 1), torch.arange(batch)]  # [2, B, h, w]
    right_masks = (own == torch.stack(out_masks)).flatten(2).all(dim=2).all(dim=0)
    return Choices(torch.where(right_masks[:, None], index, -1), scores[0])


def pair_losses(outputs: Outputs) -> Tensor:
    """Return our pair-loss matrix."""
    dims = outputs["teacher_cls"].shape[-1], outputs["teacher_patch"].shape[-1]
    loss = iBOTLoss(*dims, 2 + NUM_LOCAL, *CLS_TEMPS, *PATCH_TEMPS, WARMUP_EPOCHS, EPOCHS, **WEIGHTS)
    loss.center.copy_(outputs["center"])
    loss.center2.copy_(outputs["center2"])
    masks = outputs["masks"].flatten(2)
    teacher_patch, student_patch = (outputs[name][masks] for name in ("teacher_patch", "student_patch"))
    return loss_matrix(outputs["teacher_cls"], teacher_patch, outputs["student_cls"], student_patch, masks, loss, EPOCH)


RELEASED = Released(
    branch="ibot",
    commit="d9b80519db7020bafd629e019d386604afb511a4",
    function="main_ibot.hard_view_selection and iBOTLoss.hvs",
    slots=Slots(
        (Group((0, 2), 1), Group((1, 3), 1), Group(tuple(range(NUM_GLOBAL, NUM_VIEWS)), NUM_LOCAL)), diagonal=True
    ),
    random=random,
    network=network,
    values={
        "model.arch": "vit_micro",
        "model.patch_size": 8,
        "model.out_dim": 128,
        "model.patch_out_dim": 128,
        "model.drop_path_rate": 0.0,
        "optim.warmup_epochs": 1,
        "loss.warmup_teacher_temp_epochs": 1,
        "masks.pred_ratio": [0.0, 0.4],
        "masks.pred_ratio_var": [0.0, 0.1],
        "masks.pred_shape": "rand",
        "views.global_crops_size": 32,
        "views.local_crops_size": 16,
        "views.local_crops_number": NUM_LOCAL,
        "selection.local_candidates": NUM_LOCAL,
    },
    theirs=theirs,
    pair_losses=pair_losses,
    unit=1.0,
    notes=(
        f"all {NUM_LOCAL} local crops are kept, because it can only select global ones",
        "it selects in half precision on a GPU, whatever its flags",
    ),
    masks=build_masks,
)
