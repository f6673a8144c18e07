"""`hvp bench select` and `hvp bench overhead`: what selection costs, against the plain procedure written out.

# B images, G = 4 global and V = 20 candidate crops, C combinations, K prototypes
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
from hvp.common.hardviews import Selection, Slots, combination_losses, gather_views, select
from hvp.common.losses.cross_entropy import pair_cross_entropies
from hvp.common.training.precision import Precision
from hvp.common.training.selecting import ViewSelector
from hvp.methods.dino.config import DinoConfig
from hvp.methods.dino.main_dino import build_loss, build_networks, teacher_output_of
from hvp.methods.dino.score import pair_losses

PROTOTYPES, NUM_GLOBAL, NUM_LOCAL, COMPARISONS = 65536, 4, 16, 128
TEACHER_TEMP, STUDENT_TEMP = 0.04, 0.1
SLOTS = Slots.from_counts((2, 2, NUM_LOCAL), (1, 1, 8))


def select_rows(rounds: int = 5) -> list[Row]:
    """Scoring and selecting, on one thread: the pair matrix against the loop over combinations; exact search against
    sampled search; picking pixels by index against one `where` a view and slot."""
    with threads(1), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return [_scoring_row(8, rounds), _exact_row(64, 20 * rounds), _pixels_row(32, rounds)]


def _scoring_row(batch: int, rounds: int) -> Row:
    teacher = torch.randn(NUM_GLOBAL, batch, PROTOTYPES)
    student = torch.randn(NUM_GLOBAL + NUM_LOCAL, batch, PROTOTYPES)
    center = torch.randn(1, PROTOTYPES)
    combinations = SLOTS.sample((COMPARISONS,))

    def ours() -> Tensor:
        losses = pair_cross_entropies(teacher, student, center, TEACHER_TEMP, STUDENT_TEMP)
        return select([], losses, SLOTS, combinations=combinations).index

    plain = partial(_plain_selection, teacher, student, center, combinations)
    equal = torch.equal(ours(), plain())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], max(1, rounds // 2))
    case = f"DINO scoring, {batch} images, {PROTOTYPES} prototypes, {COMPARISONS} combinations, against the plain loop"
    return Row(
        "select", case, ratio(reference, seconds), 30.0, False, memory, median(seconds), median(reference), equal
    )


def _plain_selection(teacher: Tensor, student: Tensor, center: Tensor, combinations: Tensor) -> Tensor:
    """The procedure as the papers describe it: for every combination the objective of its crops, the maximum kept.

    Returns:
        [B, S], the combination of each image.
    """
    probabilities = F.softmax((teacher - center) / TEACHER_TEMP, dim=-1)
    best = torch.full((teacher.shape[1],), -torch.inf)
    kept = combinations[0].expand(len(best), -1).clone()
    for combination in combinations:
        loss = torch.zeros(len(best))
        for i, t in enumerate(combination[:2]):
            for j, v in enumerate(combination):
                if i != j:
                    loss -= (probabilities[t] * F.log_softmax(student[v] / STUDENT_TEMP, dim=-1)).sum(dim=-1)
        harder = loss > best
        best = torch.where(harder, loss, best)
        kept[harder] = combination
    return kept


def _exact_row(batch: int, rounds: int) -> Row:
    losses = torch.rand(batch, NUM_GLOBAL, NUM_GLOBAL + NUM_LOCAL)

    def exact() -> Tensor:
        return select([], losses, SLOTS, search="exact").index

    def sampled() -> Tensor:
        return select([], losses, SLOTS, comparisons=COMPARISONS).index

    every = combination_losses(losses, SLOTS.all_combinations(), SLOTS).amax(dim=1)
    equal = torch.allclose(combination_losses(losses, exact()[:, None], SLOTS)[:, 0], every, rtol=1e-6)
    memory = peak_memory_mb(exact)
    seconds, reference = interleaved([exact, sampled], rounds)
    case = (
        f"exact search over {SLOTS.num_combinations} combinations, {batch} images, given the pair losses, against "
        f"drawing and gathering {COMPARISONS}"
    )
    return Row("select", case, ratio(reference, seconds), 1.0, False, memory, median(seconds), median(reference), equal)


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

    equal = all(torch.equal(a, b) for a, b in zip((view for stack in ours() for view in stack), plain(), strict=True))
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], rounds)
    case = f"picking the kept crops' pixels, {batch} images, against one `where` a slot and candidate"
    return Row(
        "select", case, ratio(reference, seconds), None, False, memory, median(seconds), median(reference), equal
    )


def overhead_rows(rounds: int = 5, device: torch.device | None = None, batch: int | None = None) -> list[Row]:
    """The training step with HVP over the vanilla step, without the loader: ViT-Ti in fp32 on a CPU, ViT-S in bf16 on a
    GPU."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    arch: Literal["vit_tiny", "vit_small"] = "vit_small" if gpu else "vit_tiny"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch = batch or (64 if gpu else 4)
    with benchmark_settings(device):
        config = DinoConfig().model_copy(update={"model": DinoConfig().model.model_copy(update={"arch": arch})})
        step = _Step(config, batch, Precision(name, device))
        case = f"DINO step with HVP (4 + 16 crops) over vanilla (2 + 8), {arch}, {name}, {batch} images, {device.type}"
        target = 1.70 if gpu else 1.80
        return [overhead_row(step, case, target, 10 * rounds if gpu else rounds, device, equal=step.reuse_is_exact())]


class _Step:
    """Forward and backward of one batch of noise, with and without selection."""

    def __init__(self, config: DinoConfig, batch: int, precision: Precision):
        device = precision.device
        self.precision = precision
        self.student, self.teacher = build_networks(config, device)
        self.loss = build_loss(config).to(device)
        self.selector = ViewSelector(config, total_steps=1)
        self.crops = [
            torch.randn(NUM_GLOBAL, batch, 3, 224, 224, device=device),
            torch.randn(NUM_LOCAL, batch, 3, 96, 96, device=device),
        ]

    def select(self, *, reuse: bool = True) -> tuple[Selection, Tensor | None]:
        with self.precision.autocast():
            with self.selector.scoring(self.student, self.teacher):
                losses, teacher_logits = pair_losses(self.student, self.teacher, self.crops, self.loss, epoch=0)
            kept = self.selector.keep(self.crops, losses, step=0)
            return kept, teacher_output_of(kept, teacher_logits) if reuse else None

    def hard(self, *, reuse: bool = True) -> Selection:
        kept, teacher_output = self.select(reuse=reuse)
        self._train(kept.views, teacher_output)
        return kept

    def vanilla(self) -> None:
        self._train(self.selector.first(self.crops), None)

    def reuse_is_exact(self) -> bool:
        """Whether reusing the teacher's outputs gives the selections and gradients of computing them again."""
        again, reused = (self._gradients(reuse=reuse) for reuse in (False, True))
        return same_step(again, reused, exact=self.precision.dtype is None)

    def _gradients(self, *, reuse: bool) -> tuple[Tensor, list[Tensor]]:
        """The selection and the gradients of a step whose stochastic depth starts from the same seed."""
        torch.manual_seed(1)
        kept = self.hard(reuse=reuse)
        return kept.index, [p.grad for p in self.student.parameters() if p.grad is not None]

    def _train(self, crops: list[Tensor], teacher_output: Tensor | None) -> None:
        self.student.zero_grad(set_to_none=True)
        views = [crop.flatten(0, 1) for crop in crops]
        with self.precision.autocast():
            if teacher_output is None:
                with torch.no_grad():
                    teacher_output, _ = self.teacher(views[:1])
            loss = self.loss(self.student(views)[0], teacher_output, 0)
        loss.backward()
