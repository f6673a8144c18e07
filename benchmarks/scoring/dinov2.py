"""`hvp bench select dinov2` and `hvp bench overhead dinov2`: what selection costs, against the plain procedure written
out.

# B images, G = 4 global and V candidate crops, N = 196 patches of a global crop, R of them masked
# C combinations, S crops of one, b = 256 bottleneck dim, K = 8192 prototypes of both kinds
"""

from functools import partial
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.loading import rescue_row
from hvp.benchmarks.timing import (
    Row,
    benchmark_settings,
    interleaved,
    overhead_row,
    peak_memory_mb,
    ratio,
    same_step,
    threads,
)
from hvp.common.hardviews import Selection, Slots, select
from hvp.common.networks.heads import DINOHead
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.selecting import ViewSelector
from hvp.common.views import ViewBatch
from hvp.methods.dinov2.config import DINOv2Config
from hvp.methods.dinov2.losses import DINOv2Loss
from hvp.methods.dinov2.main_dinov2 import build_loss, build_masks, build_networks, teacher_logits
from hvp.methods.dinov2.score import loss_matrix, pair_losses

NUM_GLOBAL, PATCHES, TEMP = 4, 196, 0.05
SIZES = {"dino": {"head_n_prototypes": 8192}}


def select_rows(rounds: int = 5) -> list[Row]:
    """Scoring and selecting, on one thread, from the embeddings on: one matrix and masked patches, against the loop
    over combinations and all patches; with an EMA centre, and with Sinkhorn-Knopp."""
    with threads(1), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        slots = Slots.from_counts((2, 2, 16), (1, 1, 8), diagonal=True)
        return [
            _scoring_row(4, slots, 64, "centering", 15.0, max(1, rounds // 5)),
            _scoring_row(4, slots, 64, "sinkhorn_knopp", 15.0, max(1, rounds // 5)),
        ]


def _scoring_row(
    batch: int,
    slots: Slots,
    comparisons: int,
    centering: Literal["centering", "sinkhorn_knopp"],
    target: float | None,
    rounds: int,
) -> Row:
    config = DINOv2Config.model_validate({**SIZES, "teacher": {"centering": centering}})
    student, teacher = (DINOHead(1, 8192, nlayers=1) for _ in range(2))
    loss = build_loss(config)
    cls = F.normalize(torch.randn(2, slots.num_views, batch, 256), dim=-1)  # the student's and the teacher's
    patches = F.normalize(torch.randn(2, NUM_GLOBAL, batch, PATCHES, 256), dim=-1)
    masks = build_masks(config)([(0, image) for image in range(batch)]).flatten(2)  # [G, B, N]
    combinations = slots.sample((comparisons,))

    def ours() -> Tensor:
        rows = [of_network[masks] for of_network in patches]
        layers = [(head.last_layer, head.last_layer) for head in (teacher, student)]
        losses = loss_matrix(cls[1, :NUM_GLOBAL], rows[1], cls[0], rows[0], masks, loss, TEMP, *layers)
        return select([], losses, slots, combinations=combinations).index

    plain = partial(_plain_selection, student, teacher, cls, patches, masks, loss, combinations)
    equal = torch.equal(ours(), plain())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], rounds)
    case = (
        f"DINOv2 scoring, {batch} images, 4 global and 16 local crops, 8192 prototypes, {PATCHES} patches, "
        f"{centering}, {comparisons} combinations, against the plain loop"
    )
    return Row(
        "select", case, ratio(reference, seconds), target, False, memory, median(seconds), median(reference), equal
    )


def _plain_selection(
    student: DINOHead,
    teacher: DINOHead,
    cls: Tensor,
    patches: Tensor,
    masks: Tensor,
    loss: DINOv2Loss,
    combinations: Tensor,
) -> Tensor:
    """The procedure as the papers describe it: for every combination the objective of its crops, the maximum kept. The
    logits of all patches are made once; the patch loss is of all of them, and masked afterwards.

    Returns:
        [B, S], the combination of each image.
    """
    student_cls, teacher_cls = student.last_layer(cls[0]), teacher.last_layer(cls[1, :NUM_GLOBAL])
    student_patch, teacher_patch = student.last_layer(patches[0]), teacher.last_layer(patches[1])
    center = loss.dino_loss.of(teacher_cls.flatten(0, 1), TEMP)
    patch_center = loss.ibot_patch_loss.of(teacher_patch[masks], TEMP)
    best = torch.full((masks.shape[1],), -torch.inf)
    kept = combinations[0].expand(len(best), -1).clone()
    for combination in combinations:
        cls_terms, patch_terms = [], []
        for i, t in enumerate(combination[:2]):
            p = F.softmax((teacher_cls[t] - center) / TEMP, dim=-1)
            for j, v in enumerate(combination):
                if i != j:
                    cls_terms.append(-(p * F.log_softmax(student_cls[v] / loss.student_temp, dim=-1)).sum(dim=-1))
            p = F.softmax((teacher_patch[t] - patch_center) / TEMP, dim=-1)
            per_patch = -(p * F.log_softmax(student_patch[t] / loss.student_temp, dim=-1)).sum(dim=-1)  # [B, N]
            patch_terms.append((per_patch * masks[t]).sum(dim=-1) / masks[t].sum(dim=-1).clamp(min=1))
        score = torch.stack(cls_terms).mean(dim=0) + torch.stack(patch_terms).mean(dim=0)
        harder = score > best
        best = torch.where(harder, score, best)
        kept[harder] = combination
    return kept


def overhead_rows(rounds: int = 5, device: torch.device | None = None, batch: int | None = None) -> list[Row]:
    """The training step with HVP over the vanilla step, without the loader: ViT-S in fp32 on a CPU, ViT-L in bf16 on a
    GPU."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    arch: Literal["vit_small", "vit_large"] = "vit_large" if gpu else "vit_small"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch = batch or (32 if gpu else 4)
    with benchmark_settings(device):
        config = DINOv2Config.model_validate({"model": {"arch": arch}, **({} if gpu else SIZES)})
        step = _Step(config, batch, Precision(name, device))
        case = (
            f"DINOv2 step with HVP (4 global and 16 local crops) over vanilla (2 and 8), {arch}, {name}, "
            f"{batch} images, {device.type}"
        )
        return [overhead_row(step, case, None, rounds, device, equal=step.reuse_is_exact())]


def rescue_rows(rounds: int = 3, device: torch.device | None = None) -> list[Row]:
    """The training step with Rescue of a 64th of the batch over the step without: ViT-S in fp32 on small images on a
    CPU, ViT-L in bf16 on a GPU. Strong views are loaded for it, common ones are there."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    arch, size = ("vit_large", 224) if gpu else ("vit_small", 96)
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch = 64
    values: dict[str, Any] = {
        "model": {"arch": arch},
        "train": {"batch_size": batch},
        "rescue": {"enabled": True},
    }
    if not gpu:
        values |= SIZES | {"views": {"global_crops_size": size, "local_crops_size": size // 2}}
    with benchmark_settings(device):
        config = DINOv2Config.model_validate(values)
        step = _Step(config, batch, Precision(name, device))
        case = (
            f"DINOv2 step with Rescue (a 64th of {batch} images) over the step without, {arch}, {name}, {size} px, "
            f"{device.type}"
        )
        return [rescue_row(step.rescue, config, step.student, case, rounds, device)]


class _Step:
    """Forward and backward of one batch of noise, with and without selection."""

    def __init__(self, config: DINOv2Config, batch: int, precision: Precision):
        device, views = precision.device, config.views
        self.precision = precision
        self.student, self.teacher = build_networks(config, device)
        self.loss = build_loss(config).to(device)
        self.selector = ViewSelector(config, total_steps=1)
        self.crops = [
            torch.randn(NUM_GLOBAL, batch, 3, views.global_crops_size, views.global_crops_size, device=device),
            torch.randn(
                config.selection.local_candidates,
                batch,
                3,
                views.local_crops_size,
                views.local_crops_size,
                device=device,
            ),
        ]
        self.masks = build_masks(config)([(0, image) for image in range(batch)]).flatten(2).to(device)

    def select(self, *, reuse: bool = True) -> tuple[Selection, tuple[Tensor, Tensor] | None]:
        with self.precision.autocast():
            with self.selector.scoring(self.student):
                losses, (cls, patches) = pair_losses(
                    self.student, self.teacher, self.crops, self.masks, self.loss, TEMP
                )
            kept = self.selector.keep(self.crops, losses, step=0)
            masks = of_kept(kept, self.masks)
            return kept, (of_kept(kept, cls)(kept, patches)[masks]) if reuse else None

    def hard(self, *, reuse: bool = True) -> Selection:
        kept, embedding = self.select(reuse=reuse)
        self._train(kept.views(kept, self.masks), embedding)
        return kept

    def vanilla(self) -> None:
        self.rescue(None, None)

    def rescue(self, rescuer: Rescuer | None, part: ViewBatch | None) -> None:
        first = self.selector.first_views[:2]
        self._train(self.selector.first(self.crops), self.masks[first].flatten(0, 1), None, rescuer, part)

    def reuse_is_exact(self) -> bool:
        """Whether reusing the teacher's outputs gives the selections and gradients of computing them again."""
        again, reused = (self._gradients(reuse=reuse) for reuse in (False, True))
        return same_step(again, reused, exact=self.precision.dtype is None)

    def _gradients(self, *, reuse: bool) -> tuple[Tensor, list[Tensor]]:
        """The selection and the gradients of a step whose stochastic depth starts from the same seed."""
        torch.manual_seed(1)
        kept = self.hard(reuse=reuse)
        return kept.index, [p.grad for p in self.student.parameters() if p.grad is not None]

    def _train(
        self,
        crops: list[Tensor],
        masks: Tensor,
        embedding: tuple[Tensor, Tensor] | None,
        rescuer: Rescuer | None = None,
        part: ViewBatch | None = None,
    ) -> None:
        self.student.zero_grad(set_to_none=True)
        views = [crop.flatten(0, 1) for crop in crops]
        with self.precision.autocast():
            targets = teacher_logits(self.teacher, views[0], masks, embedding)
            out = self.student(views, masks)
            loss = self.loss(out.cls, out.patch, out.features.backbone, *targets, masks, TEMP).loss
            if rescuer is not None and part is not None:
                loss = loss + rescuer.loss(out.features, part)
        loss.backward()
