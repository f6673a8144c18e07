"""`hvp bench select simclr` and `hvp bench overhead simclr`: what selection costs, against the released code's way.

# B images, N = 4 candidate views, D embedding dim
"""

from itertools import combinations
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hvp.benchmarks.loading import rescue_row
from hvp.benchmarks.timing import Row, benchmark_settings, interleaved, overhead_row, peak_memory_mb, ratio
from hvp.common.hardviews import Selection, Slots, select
from hvp.common.training.precision import Precision
from hvp.common.training.rescuing import Rescuer
from hvp.common.training.selecting import ViewSelector
from hvp.common.views import ViewBatch
from hvp.methods.simclr.config import SimclrConfig
from hvp.methods.simclr.main_simclr import build_model
from hvp.methods.simclr.nt_xent_loss import nt_xent_loss
from hvp.methods.simclr.score import pair_losses, pair_nt_xent

NUM_VIEWS, DIM, TEMPERATURE = 4, 128, 0.1
SLOTS = Slots.from_counts((NUM_VIEWS,), (2,))
GIGABYTES_ALLOWED = 2.0
CPU = torch.device("cpu")


def select_rows(rounds: int = 5) -> list[Row]:
    """Scoring and selecting, on one thread: one similarity matrix against a broadcast for every pair; and the memory
    at the papers' batch."""
    with benchmark_settings(CPU), torch.no_grad():
        return [_scoring_row(256, rounds), *_memory_rows(4096)]


def _scoring_row(batch: int, rounds: int) -> Row:
    z = torch.randn(NUM_VIEWS, batch, DIM)

    def ours() -> Tensor:
        return select([], pair_nt_xent(z, TEMPERATURE), SLOTS).index

    def plain() -> Tensor:
        return _plain_selection(z)

    equal = torch.equal(ours(), plain())
    memory = peak_memory_mb(ours)
    seconds, reference = interleaved([ours, plain], rounds)
    case = f"SimCLR scoring, {batch} images, 4 views of {DIM} dimensions, against a [2B, 2B, D] broadcast for each pair"
    return Row(
        "select", case, ratio(reference, seconds), 50.0, False, memory, median(seconds), median(reference), equal
    )


def _plain_selection(z: Tensor) -> Tensor:
    """The released code's way: for every pair the cosines of all its views by a broadcast, and the maximum kept.

    Returns:
        [B, 2], the pair of each image.
    """
    batch = z.shape[1]
    best = torch.zeros(batch)
    kept = torch.zeros(batch, 2, dtype=torch.int64)
    others = torch.arange(2 * batch).roll(batch)
    for pair in combinations(range(len(z)), 2):
        both = F.normalize(z[list(pair)].flatten(0, 1), dim=-1)  # [2 B, D]
        cosines = F.cosine_similarity(both[:, None], both[None], dim=-1)  # [2 B, 2 B], by way of [2 B, 2 B, D]
        logits = (cosines / TEMPERATURE).fill_diagonal_(-torch.inf)
        loss = F.cross_entropy(logits, others, reduction="none").unflatten(0, (2, batch)).sum(dim=0)
        harder = loss > best
        best = torch.where(harder, loss, best)
        kept[harder] = torch.tensor(pair)
    return kept


def _memory_rows(batch: int) -> list[Row]:
    """One row; none where memory cannot be told."""
    z = torch.randn(NUM_VIEWS, batch, DIM)
    memory = peak_memory_mb(lambda: pair_nt_xent(z, TEMPERATURE))
    if memory is None:
        return []
    (seconds,) = interleaved([lambda: pair_nt_xent(z, TEMPERATURE)], 1)
    side = NUM_VIEWS * batch
    case = f"SimCLR scoring, {batch} images, {side} x {side} similarities: gigabytes at the peak"
    return [Row("select", case, memory / 1e3, GIGABYTES_ALLOWED, True, memory, seconds[0], seconds[0])]


def overhead_rows(rounds: int = 5, device: torch.device | None = None, batch: int | None = None) -> list[Row]:
    """The training step with HVP over the vanilla step, without the loader: ResNet-50 in fp32 on small images on a CPU,
    in bf16 on a GPU."""
    device = device or CPU
    gpu = device.type == "cuda"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch, size = batch or (64 if gpu else 8), 224 if gpu else 96
    with benchmark_settings(device):
        step = _Step(SimclrConfig(), batch, size, Precision(name, device))
        case = (
            f"SimCLR step with HVP (4 views) over vanilla (2), resnet50, {name}, {batch} images of {size} px, "
            f"{device.type}"
        )
        return [overhead_row(step, case, 1.60 if gpu else 1.75, 10 * rounds if gpu else rounds, device)]


def rescue_rows(rounds: int = 3, device: torch.device | None = None) -> list[Row]:
    """The training step with Rescue of a 64th of the batch over the step without: ResNet-50 in fp32 on small images on
    a CPU, in bf16 on a GPU. Strong views are loaded for it, common ones are there."""
    device = device or CPU
    gpu = device.type == "cuda"
    name: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    batch, size = (256, 224) if gpu else (128, 64)
    config = SimclrConfig.model_validate(
        {"views": {"crop_size": size}, "train": {"batch_size": batch}, "rescue": {"enabled": True}}
    )
    with benchmark_settings(device):
        step = _Step(config, batch, size, Precision(name, device))
        case = (
            f"SimCLR step with Rescue (a 64th of {batch} images) over the step without, resnet50, {name}, {size} px, "
            f"{device.type}"
        )
        return [rescue_row(step.rescue, config, step.model, case, 10 * rounds if gpu else rounds, device)]


class _Step:
    """Forward and backward of one batch of noise, with and without selection."""

    def __init__(self, config: SimclrConfig, batch: int, size: int, precision: Precision):
        self.precision = precision
        self.model = build_model(config, precision.device)
        self.selector = ViewSelector(config, total_steps=1)
        self.views = [torch.randn(NUM_VIEWS, batch, 3, size, size, device=precision.device)]

    def select(self) -> Selection:
        with self.precision.autocast():
            with self.selector.scoring(self.model):
                losses = pair_losses(self.model, self.views, TEMPERATURE)
            return self.selector.keep(self.views, losses, step=0)

    def hard(self) -> Selection:
        kept = self.select()
        self._train(kept.views)
        return kept

    def vanilla(self) -> None:
        self._train(self.selector.first(self.views))

    def rescue(self, rescuer: Rescuer | None, part: ViewBatch) -> None:
        self._train(self.selector.first(self.views), rescuer, part)

    def _train(self, views: list[Tensor], rescuer: Rescuer | None = None, part: ViewBatch | None = None) -> None:
        self.model.zero_grad(set_to_none=True)
        with self.precision.autocast():
            features = self.model(views[0].flatten(0, 1))
            loss = nt_xent_loss(features.projection.unflatten(0, (2, -1)), TEMPERATURE)
            if rescuer is not None and part is not None:
                loss = loss + rescuer.loss(features, part)
        loss.backward()
