"""Comparison of our DINO selection with the one that HVP's authors released.

# B images, G global and V candidate crops in all, K prototypes
"""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hvp.benchmarks.originals.harness import normalized_views
from hvp.benchmarks.released.selection import (
    Choices,
    Network,
    Outputs,
    Released,
    agreed,
    marked_images,
    random_outputs,
    views_in,
)
from hvp.common.hardviews import Group, Slots
from hvp.common.views import ViewBatch
from hvp.methods.dino.dino_loss import DINOLoss
from hvp.methods.dino.multi_crop import MultiCropWrapper
from hvp.methods.dino.score import pair_losses as score

NUM_GLOBAL, NUM_LOCAL, KEPT_LOCAL = 4, 16, 8
NUM_VIEWS = NUM_GLOBAL + NUM_LOCAL
OUT_DIM = 1024
COMPARISONS = 128
EPOCH = 5
TEMPERATURES: dict[str, Any] = {  # EPOCH is in their warm-up
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 10,
    "nepochs": 20,
}


def random(generator: torch.Generator) -> Outputs:
    """Draw logits of student [V, B, K] and teacher [G, B, K], and a centre [1, K]."""
    student, teacher = (random_outputs(views, generator, OUT_DIM) for views in (NUM_VIEWS, NUM_GLOBAL))
    return {"student": student, "teacher": teacher, "center": torch.randn(1, OUT_DIM, generator=generator) / 10}


def network(student: MultiCropWrapper, teacher: MultiCropWrapper, _: DINOLoss, batch: ViewBatch) -> Outputs:
    """Return the logits of networks; the centre is the mean of the teacher's logits."""
    views = normalized_views(batch)
    crops = [torch.cat(views[:NUM_GLOBAL]), torch.cat(views[NUM_GLOBAL:])]
    logits = teacher(crops[:1])[0].unflatten(0, (NUM_GLOBAL, -1))
    return {
        "student": student(crops)[0].unflatten(0, (NUM_VIEWS, -1)),
        "teacher": logits,
        "center": logits.mean(dim=(0, 1))[None],
    }


def theirs(outputs: Outputs) -> Choices:
    """Return the choices of the released code, among combinations that it draws."""
    pretrain = import_module("pretrain")
    student, teacher = outputs["student"], outputs["teacher"]
    criterion = import_module("utils.dino").DINOLoss(student.shape[2], 2 + KEPT_LOCAL, **TEMPERATURES)
    criterion.center.copy_(outputs["center"])
    args = SimpleNamespace(
        num_global_crops_loader=NUM_GLOBAL,
        num_local_crops_loader=NUM_LOCAL,
        local_crops_number=KEPT_LOCAL,
        limit_comparisons=COMPARISONS,
    )
    drawn = list(pretrain.index_generator(args))
    batch = student.shape[1]
    images = marked_images(NUM_GLOBAL, batch, size=2) + marked_images(NUM_LOCAL, batch, size=1, first=NUM_GLOBAL)
    with patch.object(pretrain, "index_generator", lambda _: drawn):
        out, selected, total = pretrain.hvs(images, Network(student), Network(teacher), criterion, EPOCH, args)
    return Choices(agreed(views_in(out), selected.T), total, torch.tensor(drawn))


def pair_losses(outputs: Outputs) -> Tensor:
    """Return our pair-loss matrix. The networks are stand-ins that return logits, which the last layer passes on."""
    copied: Callable[[Tensor], Tensor] = torch.clone  # its result is overwritten
    student: Any = SimpleNamespace(
        embed=lambda _: outputs["student"].flatten(0, 1),
        head=SimpleNamespace(last_layer=SimpleNamespace(frozen=lambda: copied)),
    )
    teacher: Any = lambda _: (outputs["teacher"].flatten(0, 1), None)  # noqa: E731
    batch, out_dim = outputs["student"].shape[1:]
    loss = DINOLoss(out_dim, 2 + KEPT_LOCAL, **TEMPERATURES)
    loss.center.copy_(outputs["center"])
    crops = [torch.empty(views, batch, 1, 1, 1) for views in (NUM_GLOBAL, NUM_LOCAL)]
    return score(student, teacher, crops, loss, EPOCH)[0]


RELEASED = Released(
    branch="dino",
    commit="c1c435fe6fdb1703c5a87887970cf856d2172910",
    function="pretrain.hvs, on the combinations of pretrain.index_generator",
    slots=Slots((Group((0, 2), 1), Group((1, 3), 1), Group(tuple(range(NUM_GLOBAL, NUM_VIEWS)), KEPT_LOCAL))),
    random=random,
    network=network,
    values={
        "model.arch": "vit_micro",
        "model.patch_size": 8,
        "model.out_dim": 128,
        "model.drop_path_rate": 0.0,
        "optim.warmup_epochs": 1,
        "views.global_crops_size": 32,
        "views.local_crops_size": 16,
        "views.local_crops_number": KEPT_LOCAL,
        "selection.local_candidates": NUM_LOCAL,
    },
    theirs=theirs,
    pair_losses=pair_losses,
    unit=1 / (2 * (1 + KEPT_LOCAL)),
    notes=(
        f"its score is the sum over {2 * (1 + KEPT_LOCAL)} pairs, our loss the mean",
        f"it is set to compare {COMPARISONS} combinations; as shipped it compares none, and so selects nothing",
        "it selects in half precision on a GPU, whatever its flags",
    ),
)
