"""`hvp bench select ibot` and `hvp bench overhead ibot`: what selection costs, against the plain procedure written out.

# B images, G = 4 global and V candidate crops, N = 196 patches of a global crop, R of them masked
# C combinations, S crops of one, b = 256 bottleneck dim, K = 8192 prototypes of both kinds
"""

from functools import partial
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
from hvp.common.training.precision import Precision
from hvp.common.training.selecting import ViewSelector
from hvp.methods.ibot.config import IbotConfig
from hvp.methods.ibot.head import iBOTHead
from hvp.methods.ibot.ibot_loss import iBOTLoss
from hvp.methods.ibot.main_ibot import build_loss, build_masks, build_networks, teacher_outputs
from hvp.methods.ibot.score import Prototypes, loss_matrix, pair_losses

NUM_GLOBAL, PATCHES = 4, 196
RECIPE = {"pred_ratio": (0.0, 0.3), "pred_ratio_var": (0.0, 0.2)}
"""The masks of the upstream's ViT-S recipe, which the presets have too."""


def select_rows(rounds: int = 5) -> list[Row]:
    """Scoring and selecting, on one thread, from the embeddings on: one matrix and masked patches, against the loop
    over combinations and all patches. Global views only, as in the paper, and with local crops."""
    with threads(1), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [
            _scoring_row(4, Slots.from_counts((2, 2), (1, 1), diagonal=True), 4, None, rounds),
            _scoring_row(4, Slots.from_counts((2, 2, 16), (1, 1, 8), diagonal=True), 64, 15.0, max(1, rounds // 5)),
        ]


def _scoring_row(batch: int, slots: Slots, comparisons: int, target: float | None, rounds: int) -> Row:
    config = IbotConfig.model_validate({"masks": RECIPE})
    student, teacher = (iBOTHead(1, 8192, patch_out_dim=8192, shared_head=True, nlayers=1) for _ in range(2))
    loss = build_loss(config)
    cls = F.normalize(torch.randn(2, slots.num_views, batch, 256), dim=-1)  # the student's and the teacher's
    patches = F.normalize(torch.randn(2, NUM_GLOBAL, batch, PATCHES, 256), dim=-1)
    masks = build_masks(config)([(0, image) for image in range(batch)]).flatten(2)  # [G, B, N]
    combinations = slots.all_combinations() if comparisons >= slots.num_combinations else slots.sample((comparisons,))

    def ours() -> Tensor:
        rows = masks.flatten(0, 1)
        frozen = Prototypes(student.last_layer.frozen(), student.last_layer2.frozen(), teacher.last_layer2.frozen())
        losses = loss_matrix(
            teacher.last_layer(cls[1, :NUM_GLOBAL]),
            patches[1].flatten(0, 1)[rows],
            cls[0],
            patches[0].flatten(0, 1)[rows],
            masks,
            loss,
            0,
            frozen,
        )
        return select([], losses, slots, combinations=combinations).index

    plain = partial(_plain_selection, student, teacher, cls, patches, masks, loss, combinations)
    equal = torch.equal(ours(), plain())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], rounds)
    case = (
        f"iBOT scoring, {batch} images, 4 global and {slots.num_views - NUM_GLOBAL} local crops, 8192 prototypes, "
        f"{PATCHES} patches, {len(combinations)} combinations, against the plain loop"
    )
    return Row(
        "select", case, ratio(reference, seconds), target, False, memory, median(seconds), median(reference), equal
    )


def _plain_selection(
    student: iBOTHead,
    teacher: iBOTHead,
    cls: Tensor,
    patches: Tensor,
    masks: Tensor,
    loss: iBOTLoss,
    combinations: Tensor,
) -> Tensor:
    """The procedure as the papers describe it: for every combination the objective of its crops, the maximum kept. The
    logits of all patches are made once; the patch loss is of all of them, and masked afterwards.

    Returns:
        [B, S], the combination of each image.
    """
    student_cls, teacher_cls = student.last_layer(cls[0]), teacher.last_layer(cls[1, :NUM_GLOBAL])
    student_patch, teacher_patch = student.last_layer2(patches[0]), teacher.last_layer2(patches[1])
    best = torch.full((masks.shape[1],), -torch.inf)
    kept = combinations[0].expand(len(best), -1).clone()
    for combination in combinations:
        cls_terms, patch_terms = [], []
        for i, t in enumerate(combination[:2]):
            p = F.softmax((teacher_cls[t] - loss.center) / loss.teacher_temp(0), dim=-1)
            for j, v in enumerate(combination):
                if i != j:
                    cls_terms.append(-(p * F.log_softmax(student_cls[v] / loss.student_temp, dim=-1)).sum(dim=-1))
            p = F.softmax((teacher_patch[t] - loss.center2) / loss.teacher_patch_temp(0), dim=-1)
            per_patch = -(p * F.log_softmax(student_patch[t] / loss.student_temp, dim=-1)).sum(dim=-1)  # [B, N]
            patch_terms.append((per_patch * masks[t]).sum(dim=-1) / masks[t].sum(dim=-1).clamp(min=1))
        score = torch.stack(cls_terms).mean(dim=0) + torch.stack(patch_terms).mean(dim=0)
        harder = score > best
        best = torch.where(harder, score, best)
        kept[harder] = combination
    return kept


def overhead_rows(rounds: int = 5, device: torch.device | None = None, batch: int | None = None) -> list[Row]:
    """The training step with HVP over the vanilla step, without the loader: ViT-Ti in fp32 on a CPU, ViT-S in bf16 on a
    GPU."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    arch: Literal["vit_tiny", "vit_small"] = "vit_small" if gpu else "vit_tiny"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch = batch or (64 if gpu else 4)
    with benchmark_settings(device):
        config = IbotConfig.model_validate({"model": {"arch": arch}, "masks": RECIPE})
        step = _Step(config, batch, Precision(name, device))
        case = (
            f"iBOT step with HVP (4 global crops) over vanilla (2), {arch}, {name}, {batch} images, {device.type}; "
            "the paper: x2.13"
        )
        return [overhead_row(step, case, 2.13, 10 * rounds if gpu else rounds, device, equal=step.reuse_is_exact())]


class _Step:
    """Forward and backward of one batch of noise, with and without selection."""

    def __init__(self, config: IbotConfig, batch: int, precision: Precision):
        device = precision.device
        self.precision = precision
        self.student, self.teacher = build_networks(config, device)
        self.loss = build_loss(config).to(device)
        self.selector = ViewSelector(config, total_steps=1)
        self.crops = [torch.randn(NUM_GLOBAL, batch, 3, 224, 224, device=device)]
        self.masks = build_masks(config)([(0, image) for image in range(batch)]).flatten(2).to(device)

    def select(self, *, reuse: bool = True) -> tuple[Selection, tuple[Tensor, Tensor] | None]:
        with self.precision.autocast():
            with self.selector.scoring(self.student, self.teacher):
                losses, (cls, patches) = pair_losses(
                    self.student, self.teacher, self.crops, self.masks, self.loss, epoch=0
                )
            kept = self.selector.keep(self.crops, losses, step=0)
            return kept, (of_kept(kept, cls)(kept, patches)) if reuse else None

    def hard(self, *, reuse: bool = True) -> Selection:
        kept, embedding = self.select(reuse=reuse)
        self._train(kept.views(kept, self.masks), embedding)
        return kept

    def vanilla(self) -> None:
        self._train(self.selector.first(self.crops), self.masks[self.selector.first_views].flatten(0, 1), None)

    def reuse_is_exact(self) -> bool:
        """Whether reusing the teacher's outputs gives the selections and gradients of computing them again."""
        again, reused = (self._gradients(reuse=reuse) for reuse in (False, True))
        return same_step(again, reused, exact=self.precision.dtype is None)

    def _gradients(self, *, reuse: bool) -> tuple[Tensor, list[Tensor]]:
        """The selection and the gradients of a step whose stochastic depth starts from the same seed."""
        torch.manual_seed(1)
        kept = self.hard(reuse=reuse)
        return kept.index, [p.grad for p in self.student.parameters() if p.grad is not None]

    def _train(self, crops: list[Tensor], masks: Tensor, embedding: tuple[Tensor, Tensor] | None) -> None:
        self.student.zero_grad(set_to_none=True)
        views = [crop.flatten(0, 1) for crop in crops]
        with self.precision.autocast():
            if embedding is None:
                with torch.no_grad():
                    embedding = self.teacher.embed(views[0])
            teacher_cls, teacher_patch, _ = teacher_outputs(self.teacher.head, *embedding, masks)
            losses = self.loss(*self.student(views, masks)[:2], teacher_cls, teacher_patch, masks, 0)
        losses.loss.backward()
